//! A real RabbitMQ for tests: a node of one's own, which may be broken, or the one that all tests share.

use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// A RabbitMQ node that tests may use.
pub(crate) struct Rabbit {
    url: String,
    /// Where its files are; none if it is shared.
    own: Option<TempDir>,
}

impl Rabbit {
    /// The node that `make test` starts for all tests. It must not be broken, and every test needs a prefix of its own.
    pub(crate) fn shared() -> Self {
        let url = std::env::var("BACKHAUL_TEST_AMQP_URL").unwrap_or_else(|_| {
            panic!("BACKHAUL_TEST_AMQP_URL names no RabbitMQ: run `make test`, which starts one")
        });
        Self { url, own: None }
    }

    /// Starts a node of one's own, which takes some seconds.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a node of one's own, with these lines added to its rabbitmq.conf.
    pub(crate) fn start_with(conf_lines: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let output = script("up", folder.path(), conf_lines);
        let url = String::from_utf8(output.stdout).unwrap().trim().to_string();
        Self { url, own: Some(folder) }
    }

    /// Its AMQP URL, with the password in it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Runs rabbitmqctl against a node of one's own and gives what it printed.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let folder = self.own.as_ref().expect("the shared node is not to be changed");
        String::from_utf8(script("ctl", folder.path(), arguments).stdout).unwrap()
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        if let Some(folder) = &self.own {
            let _ = rabbit_sh("down", folder.path(), &[]).output();
        }
    }
}

fn script(command: &str, folder: &Path, arguments: &[&str]) -> Output {
    let output = rabbit_sh(command, folder, arguments).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "dev/rabbit.sh {command} {arguments:?}: {told}");
    output
}

fn rabbit_sh(command: &str, folder: &Path, arguments: &[&str]) -> Command {
    let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/rabbit.sh"));
    script.arg(command).arg(folder).args(arguments);
    script
}
