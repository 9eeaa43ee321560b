//! OpenStack's own messaging, in a process of its own: `tests/peers/oslo_rpc.py`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

/// A client and server of oslo.messaging.
pub(crate) struct Oslo {
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Oslo {
    /// Starts it on a broker, with options of `[oslo_messaging_rabbit]`, each `OPTION=VALUE` with the value in JSON.
    pub(crate) fn start(transport_url: &str, exchange: &str, options: &[&str]) -> Self {
        let python = std::env::var_os("BACKHAUL_TEST_CINDER").expect(
            "BACKHAUL_TEST_CINDER names no Python that has Cinder: run `make test`, which installs one",
        );
        let mut process = Command::new(python)
            .args(["-W", "ignore"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/oslo_rpc.py"))
            .args([transport_url, exchange])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (commands, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, commands, answers: BufReader::new(answers) }
    }

    /// Runs a command; gives the error's class, module and text if it fails.
    pub(crate) fn ask(&mut self, command: &Value) -> Result<Value, Value> {
        writeln!(self.commands, "{command}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        let mut answer: Value =
            serde_json::from_str(&answer).unwrap_or_else(|_| panic!("oslo ended in {command}"));
        match answer["error"].take() {
            Value::Null => Ok(answer["ok"].take()),
            error => Err(error),
        }
    }

    /// Runs a command that must succeed.
    pub(crate) fn must(&mut self, command: &Value) -> Value {
        self.ask(command).unwrap_or_else(|error| panic!("oslo's {command}: {error}"))
    }

    /// Waits for the next thing that its server or its listener was told.
    pub(crate) fn told(&mut self) -> Value {
        self.must(&json!({ "do": "told" }))
    }
}

impl Drop for Oslo {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
