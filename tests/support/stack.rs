//! A folder with volumes, a store, a configuration, and the real program to run in it.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use backhaul::broker::{Broker, QueueKind, Settings, Subscription, Tls};
use serde_json::Value;
use tempfile::TempDir;

use super::rabbit::Rabbit;

/// Nothing that a test waits for takes this long.
const PATIENCE: Duration = Duration::from_secs(150);

/// A folder with volumes, a store and a configuration.
pub(crate) struct Stack {
    folder: TempDir,
    prefix: String,
}

impl Stack {
    /// Makes one on this broker, with these lines added to its `[worker]` and `[store.local]` sections.
    pub(crate) fn new(url: &str, worker: &str, store: &str) -> Self {
        let folder = TempDir::new().unwrap();
        for name in ["volumes", "backups"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let prefix = format!("test-{}", uuid::Uuid::new_v4().simple());
        let config = format!(
            "[broker]\nurl = \"{url}\"\nprefix = \"{prefix}\"\nretry_delay_seconds = 1\nretry_delay_seconds_max = 1\n\n\
             [worker]\nfile_roots = [\"volumes\"]\n{worker}\n\n\
             [store.local]\nkind = \"posix\"\npath = \"backups\"\n{store}\n"
        );
        fs::write(folder.path().join("backhaul.toml"), config).unwrap();
        Self { folder, prefix }
    }

    /// Leaves the folder where it is, for people to look into.
    pub(crate) fn keep(self) -> PathBuf {
        self.folder.keep()
    }

    /// The first part of the names of its exchanges and queues.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn volume(&self, name: &str) -> PathBuf {
        self.path("volumes").join(name)
    }

    /// The volume as a source or target.
    pub(crate) fn location(&self, name: &str) -> String {
        format!("file:{}", self.volume(name).display())
    }

    /// The program, about to be run in the folder.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.command_by(&[], arguments)
    }

    /// The same, begun by another program, such as `["strace", "-f"]`.
    pub(crate) fn command_by(&self, launcher: &[&str], arguments: &[&str]) -> Command {
        let words = [launcher, &[env!("CARGO_BIN_EXE_backhaul")], arguments].concat();
        let mut command = Command::new(words[0]);
        command.current_dir(self.folder.path()).args(&words[1..]).stdin(Stdio::null());
        command.env_remove("BACKHAUL_CONFIG").env_remove("BACKHAUL_LOG");
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs the program, which must succeed, and gives what it printed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?} {}: {told}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Submits a job and waits for its end: the exit code and the `data` of the completion event.
    pub(crate) fn submit(&self, arguments: &[&str]) -> (i32, Value) {
        let output = self.run(&[&["submit"], arguments, &["--wait", "--json"]].concat());
        let told = String::from_utf8_lossy(&output.stderr);
        let event: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {told}"));
        (output.status.code().unwrap(), event["data"].clone())
    }

    /// Starts a worker and waits until it takes jobs.
    pub(crate) fn worker(&self) -> Worker {
        self.until_ready(self.start(self.command(&["worker"])))
    }

    /// The same, begun by another program, which must become the worker.
    pub(crate) fn worker_by(&self, launcher: &[&str]) -> Worker {
        self.until_ready(self.start(self.command_by(launcher, &["worker"])))
    }

    /// The same, with these variables in its environment.
    pub(crate) fn worker_with(&self, variables: &[(&str, &str)]) -> Worker {
        let mut command = self.command(&["worker"]);
        command.envs(variables.iter().copied());
        self.until_ready(self.start(command))
    }

    fn until_ready(&self, worker: Worker) -> Worker {
        let takes_jobs = |log: String| log.contains("worker started") && log.contains("broker connected");
        until("the worker takes jobs", || takes_jobs(worker.log()));
        worker
    }

    /// Starts a worker.
    pub(crate) fn start_worker(&self) -> Worker {
        self.start(self.command(&["worker"]))
    }

    fn start(&self, mut command: Command) -> Worker {
        let log = self.path(&format!("worker-{}.log", uuid::Uuid::new_v4().simple()));
        let child = command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
        Worker { child, log }
    }

    /// The objects of the store, with the records and lists of our own, by path below the root.
    pub(crate) fn objects(&self) -> Vec<String> {
        let root = self.path("backups");
        let mut objects = Vec::new();
        walk(&root, &mut |path| objects.push(path.strip_prefix(&root).unwrap().display().to_string()));
        objects.sort();
        objects
    }
}

fn walk(folder: &Path, visit: &mut dyn FnMut(&Path)) {
    // A folder may go while it is looked at.
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() { walk(&path, visit) } else { visit(&path) }
    }
}

/// A worker that runs. Dropping it kills it.
pub(crate) struct Worker {
    child: Child,
    log: PathBuf,
}

impl Worker {
    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGKILL, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// Waits until it ends by itself, and gives its exit code.
    pub(crate) fn ended(&mut self) -> i32 {
        until("the worker has ended", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap().code().unwrap()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of the worker:\n{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// Sets how many files a process may have open; what it has stays open.
pub(crate) fn limit_handles(pid: u32, count: &str) {
    let limit = [format!("--pid={pid}"), format!("--nofile={count}:")];
    assert!(Command::new("prlimit").args(limit).status().unwrap().success());
}

/// The most memory that a process has used.
pub(crate) fn memory_bytes_most(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    most.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// How the broker is reached, with the exchanges and queues of the stack.
pub(crate) fn settings(rabbit: &Rabbit, stack: &Stack) -> Settings {
    Settings {
        url: rabbit.url().parse().unwrap(),
        prefix: stack.prefix().into(),
        connection_name: "test".into(),
        heartbeat_seconds: 60,
        tls: Tls::default(),
        queue_kind: QueueKind::Quorum,
        retry_delay_seconds: 1,
        retry_delay_seconds_max: 1,
        reconnect_seconds_max: 1,
        publish_seconds_max: 30,
        message_bytes_max: 1 << 20,
    }
}

/// Connects to the broker, and hears all events from now on.
pub(crate) async fn listen(rabbit: &Rabbit, stack: &Stack) -> (Broker, Subscription) {
    let broker = Broker::connect(settings(rabbit, stack)).await.unwrap();
    let events = broker.events("#").await.unwrap();
    (broker, events)
}

/// The next event of a job with one of these states.
pub(crate) async fn event(events: &mut Subscription, states: &[&str]) -> Value {
    loop {
        let notice = tokio::time::timeout(PATIENCE, events.next()).await;
        let notice = notice.expect("an event in time").expect("a broker");
        if states.iter().any(|state| notice.routing_key.split('.').nth(1) == Some(state)) {
            return serde_json::from_slice(&notice.body).unwrap();
        }
    }
}

/// Waits until `is_so`.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A volume that is not easily compressed, the same for the same seed.
pub(crate) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// Reads all that a child prints on standard output.
pub(crate) fn rest_of(child: &mut Child) -> String {
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    text
}
