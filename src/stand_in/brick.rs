//! Volumes that are not in Ceph, attached to this host by os-brick, OpenStack's library for that, as Cinder's own service has it
//! done.
//!
//! os-brick is written in Python. Each thing that is asked of it is asked of a process of its own, `brick.py`: what blocks or breaks
//! there ends with it, and nothing has to be known of how a worker that died was getting on. Attaching what is attached already, and
//! letting go of what is not, are no faults.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cinder::conf::Conf;
use crate::cinder::volumes::OtherConnection;
use crate::error::Causes;

/// What asks os-brick.
const PROGRAM: &str = include_str!("brick.py");
/// Names the Python that has os-brick.
const PYTHON: &str = "BACKHAUL_PYTHON";
/// A program that comes with what os-brick needs, and is run by the same Python.
const NEIGHBOUR: &str = "privsep-helper";
/// How long it may take to look at this host.
const LOOK_TIME_MAX: Duration = Duration::from_secs(60);
/// How long it may take to attach a volume or to let go of it. os-brick itself gives each of its commands ten minutes.
const WORK_TIME_MAX: Duration = Duration::from_secs(900);
/// How long a process may take to end that has answered, and what it has said besides to come.
const END_TIME_MAX: Duration = Duration::from_secs(1);
/// The longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// How much is logged of what it says besides.
const WORDS_BYTES_MAX: u64 = 1 << 16;
/// How much of each line.
const LINE_CHARS_MAX: usize = 1000;
/// How much of why something has failed is told.
const WHY_CHARS_MAX: usize = 2000;
/// What names of secrets have in them, in the data of all the kinds of connections that os-brick knows.
const SECRET_NAMES: [&str; 5] = ["password", "secret", "token", "credential", "key"];
/// A shorter text is in too many others to be hidden in them.
const SECRET_BYTES_MIN: usize = 4;

/// Why a volume is not attached, or not let go of.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No Python has it.
    #[error(
        "os-brick is not installed, which attaches volumes that are not in Ceph: install it (python3-os-brick, or pip install \
         os-brick) for {looked_at}, or name the Python that has it in {PYTHON}"
    )]
    NotInstalled {
        /// Where it was looked for.
        looked_at: String,
    },
    /// Python, or what os-brick wants, did not run.
    #[error("run {} to attach volumes by os-brick", python.display())]
    Run {
        /// The Python.
        python: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// os-brick has tried, and failed.
    #[error("os-brick could not {action}: {exception}: {message}")]
    Failed {
        /// What it was asked for.
        action: &'static str,
        /// The class of the exception.
        exception: String,
        /// What it says.
        message: String,
    },
    /// It did not come to an end.
    #[error(
        "os-brick was ended, since it took more than {seconds} seconds to {action}: look at the log for what it was waiting for"
    )]
    TimedOut {
        /// What it was asked for.
        action: &'static str,
        /// How long it had.
        seconds: u64,
    },
    /// It ended without a word.
    #[error(
        "os-brick ended without an answer when it was to {action}; the last that it said was {last_words:?}"
    )]
    NoAnswer {
        /// What it was asked for.
        action: &'static str,
        /// The last line of what it said besides.
        last_words: String,
    },
    /// Its answer means nothing.
    #[error("os-brick was to {action}, and its answer cannot be used: {why}")]
    Nonsense {
        /// What it was asked for.
        action: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// os-brick on this host.
#[derive(Debug)]
pub struct Brick {
    settings: Settings,
    /// What was found of it, once somebody has looked.
    found: Mutex<Option<Result<Arc<Host>, Arc<Error>>>>,
}

/// What `cinder.conf` and this host say of attaching.
#[derive(Debug)]
pub struct Settings {
    /// The Pythons that may have os-brick, the likeliest one first.
    pub pythons: Vec<PathBuf>,
    /// The files of `cinder.conf`, some of whose options os-brick reads itself.
    pub conf_files: Vec<PathBuf>,
    /// This host's address.
    pub my_ip: String,
    /// Whether volumes are attached by several paths.
    pub multipath: bool,
    /// Whether that there is no multipathd is an error then.
    pub enforce_multipath: bool,
    /// How often a new device is looked for.
    pub scan_attempts: u64,
    /// The file that says which commands the user that we run as may run as root.
    pub rootwrap_config: String,
}

impl Settings {
    /// Takes them out of `cinder.conf` and of the environment.
    pub fn new(conf: &Conf) -> Self {
        let default = &conf.default;
        Self {
            pythons: pythons(),
            conf_files: conf.files.clone(),
            my_ip: default.my_ip.clone(),
            multipath: default.use_multipath_for_image_xfer,
            enforce_multipath: default.enforce_multipath_for_image_xfer,
            scan_attempts: default.num_volume_device_scan_tries,
            rootwrap_config: default.rootwrap_config.clone(),
        }
    }
}

/// This host, as os-brick sees it.
#[derive(Debug)]
pub struct Host {
    python: PathBuf,
    /// What a volume service must know of it to let it have volumes.
    pub connector: Value,
}

/// A volume that is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The block device or the file.
    pub path: PathBuf,
    /// What os-brick needs to let go of it.
    attached: Value,
}

impl Brick {
    /// os-brick with these settings, wherever it is.
    pub fn new(settings: Settings) -> Self {
        Self { settings, found: Mutex::default() }
    }

    /// Looks at this host once, and tells the same each time.
    pub async fn host(&self) -> Result<Arc<Host>, Arc<Error>> {
        let mut found = self.found.lock().await;
        if let Some(found) = &*found {
            return found.clone();
        }
        let looked = self.look().await.map(Arc::new).map_err(Arc::new);
        match &looked {
            Ok(host) => {
                info!(python = %host.python.display(), "volumes that are not in Ceph are attached by os-brick")
            }
            Err(error) if matches!(**error, Error::NotInstalled { .. }) => {
                info!(%error, "only volumes in Ceph can be attached")
            }
            Err(error) => warn!(error = %Causes(&**error), "only volumes in Ceph can be attached"),
        }
        *found = Some(looked.clone());
        looked
    }

    /// Has the next look be a new one: something may have been installed, started or renamed since the last one.
    pub async fn look_again(&self) {
        self.found.lock().await.take();
    }

    /// Attaches a volume. With `take`, where that is needed and possible, its device or file belongs to the user that we run as until
    /// it is let go of.
    pub async fn connect(
        &self,
        host: &Host,
        connection: &OtherConnection,
        take: bool,
    ) -> Result<Device, Error> {
        let request = json!({ "do": "connect", "connection": connection.reveal(), "take": take });
        let action = "attach the volume";
        Device::read(&self.ask(&host.python, action, request, WORK_TIME_MAX).await?)
            .map_err(|why| Error::Nonsense { action, why })
    }

    /// Lets go of a volume; without a device, of whatever is left of one that was not attached to the end.
    pub async fn disconnect(
        &self,
        host: &Host,
        connection: &OtherConnection,
        device: Option<&Device>,
    ) -> Result<(), Error> {
        let attached = device.map(|device| &device.attached);
        let request = json!({ "do": "disconnect", "connection": connection.reveal(), "attached": attached });
        self.ask(&host.python, "let go of the volume", request, WORK_TIME_MAX).await.map(drop)
    }

    /// Asks the first of these that has os-brick.
    async fn look(&self) -> Result<Host, Error> {
        let action = "look at this host";
        let pythons = &self.settings.pythons;
        for python in pythons {
            match self.ask(python, action, json!({ "do": "properties" }), LOOK_TIME_MAX).await {
                Ok(connector) if connector.is_object() => {
                    return Ok(Host { python: python.clone(), connector });
                }
                Ok(other) => {
                    return Err(Error::Nonsense {
                        action,
                        why: format!("it is {}", short(&other.to_string())),
                    });
                }
                Err(Error::NotInstalled { .. }) => {}
                Err(Error::Run { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let looked_at: Vec<String> = pythons.iter().map(|python| python.display().to_string()).collect();
        Err(Error::NotInstalled { looked_at: looked_at.join(" or ") })
    }

    async fn ask(
        &self,
        python: &Path,
        action: &'static str,
        mut request: Value,
        time_max: Duration,
    ) -> Result<Value, Error> {
        let settings = &self.settings;
        let secrets = Secrets::of(&request);
        request["conf_files"] = json!(settings.conf_files);
        request["my_ip"] = json!(settings.my_ip);
        request["multipath"] = json!(settings.multipath);
        request["enforce_multipath"] = json!(settings.enforce_multipath);
        request["scan_attempts"] = json!(settings.scan_attempts);
        request["root_helper"] = json!(format!("sudo cinder-rootwrap {}", settings.rootwrap_config));
        let process = Process { python, program: PROGRAM, action, secrets: &secrets };
        process.ask(&request, time_max).await
    }
}

impl Device {
    fn read(answer: &Value) -> Result<Self, String> {
        let path = answer.get("path").and_then(Value::as_str).unwrap_or_default();
        if !path.starts_with('/') || path.contains(char::is_control) {
            return Err(format!("it names no file, but {}", short(&answer["path"].to_string())));
        }
        Ok(Self { path: path.into(), attached: answer.clone() })
    }
}

/// The Pythons that may have os-brick, the likeliest one first.
fn pythons() -> Vec<PathBuf> {
    if let Some(python) = env::var_os(PYTHON).filter(|python| !python.is_empty()) {
        return vec![python.into()];
    }
    let folders = env::var_os("PATH").unwrap_or_default();
    let neighbour =
        env::split_paths(&folders).map(|folder| folder.join(NEIGHBOUR)).find_map(|path| interpreter(&path));
    neighbour.into_iter().chain(["python3".into()]).collect()
}

/// The program that runs a script, if its first line says which.
fn interpreter(script: &Path) -> Option<PathBuf> {
    let text = fs::read(script).ok()?;
    let line =
        String::from_utf8_lossy(text.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?).into_owned();
    let mut words = line.split_whitespace();
    let program = match words.next()? {
        env if env.ends_with("/env") => words.next()?,
        program => program,
    };
    // Where its path is too long for such a line, a shell stands there.
    program.contains("python").then(|| program.into())
}

/// The secrets in what is asked, which must not come to a log or to people.
struct Secrets(Vec<String>);

impl Secrets {
    fn of(request: &Value) -> Self {
        let mut found = Vec::new();
        collect(request, false, &mut found);
        // One may be a part of another one.
        found.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self(found)
    }

    fn hide(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, secret| text.replace(secret, "***"))
    }
}

fn collect(value: &Value, is_secret: bool, found: &mut Vec<String>) {
    match value {
        Value::String(text) if is_secret && text.len() >= SECRET_BYTES_MIN => found.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| collect(item, is_secret, found)),
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = name.to_lowercase();
                let names_secret = SECRET_NAMES.iter().any(|part| name.contains(part));
                collect(value, is_secret || names_secret, found);
            }
        }
        _ => {}
    }
}

/// What `brick.py` answers.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Done { done: Value },
    Failed { exception: String, message: String },
    Missing { missing: bool },
}

/// A process that is asked for one thing.
struct Process<'a> {
    python: &'a Path,
    program: &'a str,
    action: &'static str,
    secrets: &'a Secrets,
}

impl Process<'_> {
    /// Waits for its answer, and for its end. Dropped before, it is killed, with all that it has begun.
    async fn ask(&self, request: &Value, time_max: Duration) -> Result<Value, Error> {
        let action = self.action;
        let run = |source| Error::Run { python: self.python.into(), source };
        let mut child = Command::new(self.python)
            .args(["-W", "ignore", "-c", self.program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(run)?;
        let (Some(mut asked), Some(told), Some(said)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(run(io::ErrorKind::BrokenPipe.into()));
        };
        let mut group = Group(child.id());
        let (mut answer, mut last_words) = (Vec::new(), String::new());
        let answered = CancellationToken::new();
        let talk = async {
            // One that does not listen may have answered all the same.
            let _ = asked.write_all(format!("{request}\n").as_bytes()).await;
            BufReader::new(told.take(ANSWER_BYTES_MAX)).read_until(b'\n', &mut answer).await
        };
        let talk = async {
            let talked = timeout(time_max, talk).await;
            answered.cancel();
            talked
        };
        let log = async {
            // Services that it has started go on, and may have the same pipe.
            let late = async {
                answered.cancelled().await;
                sleep(END_TIME_MAX).await;
            };
            tokio::select! {
                () = self.log(said, &mut last_words) => {}
                () = late => {}
            }
        };
        match tokio::join!(talk, log).0 {
            Ok(read) => {
                read.map_err(run)?;
            }
            Err(_) => return Err(Error::TimedOut { action, seconds: time_max.as_secs() }),
        }
        drop(asked);
        if let Ok(Ok(_)) = timeout(END_TIME_MAX, child.wait()).await {
            group.0 = None;
        }
        self.read(&answer, last_words)
    }

    /// Reads the one line that it has written.
    fn read(&self, answer: &[u8], last_words: String) -> Result<Value, Error> {
        let action = self.action;
        if answer.trim_ascii().is_empty() {
            return Err(Error::NoAnswer { action, last_words });
        }
        match serde_json::from_slice(answer) {
            Ok(Answer::Done { done }) => Ok(done),
            Ok(Answer::Failed { exception, message }) => {
                let words: Vec<&str> = message.split_whitespace().collect();
                let message = self.secrets.hide(&words.join(" ")).chars().take(WHY_CHARS_MAX).collect();
                Err(Error::Failed { action, exception, message })
            }
            Ok(Answer::Missing { missing: true }) => {
                Err(Error::NotInstalled { looked_at: self.python.display().to_string() })
            }
            Ok(Answer::Missing { missing: false }) | Err(_) => {
                let text = self.secrets.hide(&String::from_utf8_lossy(answer));
                Err(Error::Nonsense { action, why: format!("it is {}", short(&text)) })
            }
        }
    }

    /// Logs what it says besides.
    async fn log(&self, said: ChildStderr, last_words: &mut String) {
        let mut said = BufReader::new(said.take(WORDS_BYTES_MAX));
        let mut line = Vec::new();
        while said.read_until(b'\n', &mut line).await.is_ok_and(|bytes| bytes > 0) {
            let text: String =
                String::from_utf8_lossy(&line).trim_end().chars().take(LINE_CHARS_MAX).collect();
            let text = self.secrets.hide(&text);
            if !text.is_empty() {
                warn!(action = self.action, text, "said by os-brick");
                *last_words = text;
            }
            line.clear();
        }
        // It must not wait for somebody to read the rest.
        let _ = tokio::io::copy(&mut said.into_inner().into_inner(), &mut tokio::io::sink()).await;
    }
}

/// A process and what it has begun.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(id) = id {
            // What has ended meanwhile need not be killed.
            let _ = kill_process_group(id, Signal::KILL);
        }
    }
}

/// The begin of a text that was not written by us.
fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use rustix::fs::{FlockOperation, flock};

    use super::*;

    const ACTION: &str = "attach the volume";

    fn secret() -> Secrets {
        Secrets::of(&json!({ "connection": { "data": { "auth_password": "sesame open" } } }))
    }

    /// Has Python run a program in the place of ours.
    async fn ask(program: &str, time_max: Duration) -> Result<Value, Error> {
        let python = Path::new("python3");
        let process = Process { python, program, action: ACTION, secrets: &secret() };
        process.ask(&json!({ "file": "x" }), time_max).await
    }

    #[tokio::test]
    async fn an_answer_is_read_and_what_is_said_besides_is_not() {
        let program =
            r#"import sys; print("noise", file=sys.stderr); print('{"done": {"path": "/dev/sdx"}}')"#;
        assert_eq!(ask(program, LOOK_TIME_MAX).await.unwrap(), json!({ "path": "/dev/sdx" }));
        let much = r#"import sys; sys.stderr.write("x" * 9_000_000); print('{"done": null}')"#;
        assert_eq!(ask(much, LOOK_TIME_MAX).await.unwrap(), Value::Null);
    }

    #[tokio::test]
    async fn what_goes_wrong_is_told_and_no_password_with_it() {
        let junk = ask("print('sesame open, says the library')", LOOK_TIME_MAX).await.unwrap_err();
        assert!(
            matches!(&junk, Error::Nonsense { why, .. } if why == "it is ***, says the library\n"),
            "{junk}"
        );
        let other = ask("print('[1]')", LOOK_TIME_MAX).await.unwrap_err();
        assert!(matches!(other, Error::Nonsense { .. }), "{other}");
        let silent =
            ask("import sys; sys.exit('one\\nno library: sesame open')", LOOK_TIME_MAX).await.unwrap_err();
        assert!(
            matches!(&silent, Error::NoAnswer { last_words, .. } if last_words == "no library: ***"),
            "{silent}"
        );
        let program =
            r#"print('{"exception": "TargetPortalNotFound", "message": "not\\n found by sesame open"}')"#;
        let failed = ask(program, LOOK_TIME_MAX).await.unwrap_err().to_string();
        assert_eq!(failed, "os-brick could not attach the volume: TargetPortalNotFound: not found by ***");
        let slow = ask("import time; time.sleep(1000)", Duration::from_millis(200)).await.unwrap_err();
        assert!(matches!(slow, Error::TimedOut { .. }), "{slow}");
        let missing = ask(r#"print('{"missing": true}')"#, LOOK_TIME_MAX).await.unwrap_err();
        assert!(matches!(missing, Error::NotInstalled { .. }), "{missing}");
    }

    #[tokio::test]
    async fn one_that_nobody_waits_for_any_more_ends_with_what_it_has_begun() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let program = format!(
            "import fcntl, subprocess
held = open({:?})
fcntl.flock(held, fcntl.LOCK_EX)
subprocess.run(['sleep', '1000'], pass_fds=[held.fileno()])",
            file.path()
        );
        let becomes = async |held: bool| {
            let is_held = || {
                let other = File::open(file.path()).unwrap();
                flock(&other, FlockOperation::NonBlockingLockExclusive).is_err()
            };
            while is_held() != held {
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            answer = ask(&program, WORK_TIME_MAX) => panic!("{answer:?}"),
            () = becomes(true) => {}
        }
        timeout(Duration::from_secs(30), becomes(false)).await.unwrap();
    }

    #[tokio::test]
    async fn without_os_brick_it_is_told_what_to_install_and_where() {
        let folder = tempfile::tempdir().unwrap();
        // A Python of which it is certain that it has nothing but what it came with.
        let bare = folder.path().join("python");
        fs::write(&bare, "#!/bin/sh\nexec python3 -I -S \"$@\"\n").unwrap();
        fs::set_permissions(&bare, Permissions::from_mode(0o700)).unwrap();
        let settings = Settings {
            pythons: vec!["/nowhere/python3".into(), bare.clone()],
            conf_files: Vec::new(),
            my_ip: "192.0.2.1".into(),
            multipath: false,
            enforce_multipath: false,
            scan_attempts: 3,
            rootwrap_config: String::new(),
        };

        let error = Brick::new(settings).host().await.unwrap_err();

        assert!(matches!(&*error, Error::NotInstalled { .. }), "{error}");
        let told = error.to_string();
        assert!(told.contains(&format!("/nowhere/python3 or {}", bare.display())), "{told}");
    }

    #[test]
    fn secrets_are_hidden_wherever_they_are() {
        let request = json!({ "connection": { "driver_volume_type": "iscsi", "data": {
            "auth_username": "user-of-chap", "auth_password": "abcdefgh", "discovery_auth_password": "abcdefghij",
            "target_lun": 1, "portals": [{ "tokens": ["t0ken"] }], "encryption_key": "no",
        } } });
        let secrets = Secrets::of(&request);
        let said = "iscsiadm -n user-of-chap -v abcdefgh -v abcdefghij t0ken no";
        assert_eq!(secrets.hide(said), "iscsiadm -n user-of-chap -v *** -v *** *** no");
    }

    #[test]
    fn what_is_attached_must_be_a_path() {
        let answer = json!({ "path": "/dev/disk/by-id/x", "device": { "type": "block" }, "owner": 0 });
        let device = Device::read(&answer).unwrap();
        assert_eq!((device.path.as_path(), &device.attached), (Path::new("/dev/disk/by-id/x"), &answer));
        for path in [json!(null), json!(""), json!("sdx"), json!("/dev/a\nb"), json!({ "fileno": 7 })] {
            assert!(Device::read(&json!({ "path": path })).is_err(), "{path}");
        }
    }

    #[test]
    fn the_python_of_a_script_is_the_one_that_its_first_line_names() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, python) in [
            ("#!/opt/cinder/bin/python3\n", Some("/opt/cinder/bin/python3")),
            ("#!/usr/bin/python3 -s\nimport sys\n", Some("/usr/bin/python3")),
            ("#! /usr/bin/env python3\n", Some("python3")),
            ("#!/bin/sh\n'''exec' '/a path/python' \"$0\"\n", None),
            ("#!", None),
            ("\u{7f}ELF", None),
        ] {
            fs::write(file.path(), text).unwrap();
            assert_eq!(interpreter(file.path()), python.map(PathBuf::from), "{text}");
        }
        assert_eq!(interpreter(Path::new("/nowhere")), None);
    }
}
