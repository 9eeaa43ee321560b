//! The control plane of OpenStack's Cinder that `dev/cinder-stack.sh` starts, and backup services beside it: our worker in the
//! place of Cinder's own, and that one itself.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use backhaul::job::Container;
use backhaul::store::{Folder, ObjectStore, S3, Swift};
use md5::{Digest, Md5};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use super::ceph::{Ceph, Image};
use super::content::Content;
use super::oslo::Oslo;
use super::stack::until;
use super::{s3, swift};

/// Our worker with this driver beside the control plane and the cluster that all tests share.
pub(crate) fn backhaul_beside_cinder(driver: &str) -> (Ceph, Openstack, Service) {
    let (ceph, openstack) = (Ceph::shared(), Openstack::shared());
    let worker = openstack.backhaul(driver, ceph.conf());
    (ceph, openstack, worker)
}

fn backhaul_cinder() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_backhaul"));
    command.arg("cinder");
    command
}

/// The image of a volume.
pub(crate) fn image<'a>(ceph: &'a Ceph, volume: &str) -> Image<'a> {
    ceph.existing(&format!("volumes/volume-{volume}"))
}

/// Fails unless the volume is there to be used and holds what it held when `content` was taken.
pub(crate) fn assert_holds(ceph: &Ceph, volume: &Value, content: &Content) {
    assert_eq!(volume["status"], "available", "{volume}");
    let image = image(ceph, &text(&volume["id"]));
    assert!(ceph.content(image.spec()) == *content, "{} holds something else", image.spec());
}

/// A way to ask the control plane for things, and a host and an availability zone that nobody else has.
pub(crate) struct Openstack {
    folder: PathBuf,
    work: TempDir,
    name: String,
    /// What its backup services are told besides.
    further: String,
    api: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Openstack {
    /// Takes the one that all tests share.
    pub(crate) fn shared() -> Self {
        let folder = std::env::var_os("BACKHAUL_TEST_CINDER_STACK")
            .expect("BACKHAUL_TEST_CINDER_STACK names no control plane: run `make test`, which starts one");
        let mut api = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/cinder-stack.sh"))
            .arg("api")
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (requests, answers) = (api.stdin.take().unwrap(), api.stdout.take().unwrap());
        let name = format!("node-{}", Uuid::new_v4().simple());
        let work = TempDir::new().unwrap();
        let answers = BufReader::new(answers);
        Self { folder: folder.into(), work, name, further: String::new(), api, requests, answers }
    }

    /// Asks for something, as `dev/cinder-api` lists it.
    pub(crate) fn ask(&mut self, words: &[&str]) -> Result<Value, Value> {
        writeln!(self.requests, "{}", words.join(" ")).unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let mut answer: Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        if answer.get("error").is_some() { Err(answer) } else { Ok(answer["ok"].take()) }
    }

    /// Asks for something that must be possible.
    pub(crate) fn ok(&mut self, words: &[&str]) -> Value {
        self.ask(words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// A new volume of 1 GiB, by its id.
    pub(crate) fn volume(&mut self) -> String {
        let volume = self.ok(&["create-volume", "1"]);
        assert_eq!(volume["status"], "available", "{volume}");
        text(&volume["id"])
    }

    /// The same on the share, and its file.
    pub(crate) fn volume_on_share(&mut self) -> (String, PathBuf) {
        let share = fs::read_to_string(self.folder.join("share")).unwrap();
        assert_ne!(share, "", "dev/cinder-stack.sh could mount nothing");
        let volume = self.ok(&["create-volume", "1", "nfs"]);
        assert_eq!(volume["status"], "available", "{volume}");
        let id = text(&volume["id"]);
        let file = Path::new(share.trim()).join(format!("volume-{id}"));
        (id, file)
    }

    /// Asks for a backup by this test's own backup service, and gives its id.
    pub(crate) fn begin_backup(&mut self, volume: &str, options: &[&str]) -> String {
        let zone = self.name.clone();
        let backup = self.ok(&[&["backup", volume, "--zone", &zone], options].concat());
        text(&backup["id"])
    }

    /// The same, to its end.
    pub(crate) fn backup(&mut self, volume: &str, options: &[&str]) -> Value {
        let id = self.begin_backup(volume, options);
        self.ok(&["settled", &id])
    }

    /// Restores a backup, and gives the volume that it was restored to.
    pub(crate) fn restore(&mut self, words: &[&str]) -> Value {
        let begun = self.ok(&[&["restore"], words].concat());
        let volume = text(&begun["volume_id"]);
        until("the restore has ended", || {
            let status = self.ok(&["volume", &volume])["status"].clone();
            status != "restoring-backup" && status != "creating"
        });
        // The volume is free a moment earlier than the backup.
        self.ok(&["settled", words[0]]);
        self.ok(&["volume", &volume])
    }

    /// Deletes a backup, and gives what is left of its row.
    pub(crate) fn delete(&mut self, backup: &str) -> Value {
        self.ok(&["delete", backup]);
        self.ok(&["settled", backup])
    }

    /// The host of this test's own backup services.
    pub(crate) fn host(&self) -> &str {
        &self.name
    }

    /// Where the backups of the posix driver lie.
    pub(crate) fn backups(&self) -> PathBuf {
        self.work.path().join("backups")
    }

    /// All files there, by their paths.
    pub(crate) fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.backups()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => folders.push(entry.path()),
                    false => found.push(entry.path().to_string_lossy().into_owned()),
                }
            }
        }
        found
    }

    /// Lets them take no more space than so many MiB.
    pub(crate) fn limit_backups(&self, mebibytes: u32) {
        fs::create_dir_all(self.backups()).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"]).arg(self.backups());
        assert!(mount.status().unwrap().success(), "{mount:?}");
    }

    /// What this test's host, availability zone, bucket and container are called.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Asks with a token of a user of Swift from now on.
    pub(crate) fn log_in(&mut self) {
        let (token, account) = run(swift::token(&swift::url()));
        self.ok(&["log-in", &token, &account]);
    }

    /// Has the backup services that are started from now on told this, too, which begins with a section.
    pub(crate) fn configure(&mut self, further: &str) {
        self.further = further.into();
    }

    /// The names of all objects of a driver that has a bucket or a container, without our own records.
    pub(crate) fn objects(&self, driver: &str) -> Vec<String> {
        let store: Box<dyn ObjectStore> = match driver {
            "s3" => Box::new(S3::new(s3::settings(&s3::url(), &self.name)).unwrap()),
            _ => Box::new(Swift::new(swift::settings(&swift::url(), &self.name)).unwrap()),
        };
        let folder = Folder::from(&self.name.parse::<Container>().unwrap());
        run(store.list(&folder, "")).unwrap().into_iter().map(|listed| listed.name).collect()
    }

    /// Where the share of the nfs driver is mounted.
    fn share(&self) -> (String, PathBuf) {
        let share = format!("127.0.0.1:/{}", self.name);
        let folder = self.work.path().join("mounts").join(hex::encode(Md5::digest(&share)));
        (share, folder)
    }

    /// Mounts something in the place of the share, which this kernel need not be able to: it has the share's name.
    pub(crate) fn mount_share(&self) {
        let (share, folder) = self.share();
        fs::create_dir_all(&folder).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "mode=770,size=512m", &share]).arg(folder);
        assert!(mount.status().unwrap().success(), "{mount:?}");
    }

    /// The options of a backup service with this driver, on this test's own host.
    fn conf(&self, driver: &str, ceph_conf: &Path, more: &str) -> PathBuf {
        fs::create_dir_all(self.backups()).unwrap();
        let name = &self.name;
        let (class, options) = match driver {
            "ceph" => ("ceph.CephBackupDriver", format!("backup_ceph_conf = {}", ceph_conf.display())),
            "posix" => {
                ("posix.PosixBackupDriver", format!("backup_posix_path = {}", self.backups().display()))
            }
            "nfs" => {
                let base = self.work.path().join("mounts");
                let (share, base) = (self.share().0, base.display());
                let options = format!("backup_share = {share}\nbackup_mount_point_base = {base}");
                ("nfs.NFSBackupDriver", options)
            }
            "s3" => {
                let (access, secret) = swift::user_and_key(&s3::url());
                let endpoint = s3::settings(&s3::url(), name).endpoint;
                let options = format!(
                    "backup_s3_endpoint_url = {endpoint}\nbackup_s3_store_bucket = {name}\n\
                     backup_s3_store_access_key = {access}\nbackup_s3_store_secret_key = {secret}"
                );
                ("s3.S3BackupDriver", options)
            }
            "swift" => {
                let (user, key) = swift::user_and_key(&swift::url());
                let auth_url = swift::settings(&swift::url(), name).auth_url;
                let options = format!(
                    "backup_swift_auth = single_user\nbackup_swift_auth_url = {auth_url}\n\
                     backup_swift_user = {user}\nbackup_swift_key = {key}\nbackup_swift_container = {name}"
                );
                ("swift.SwiftBackupDriver", options)
            }
            "swift of users" => {
                let options = format!("backup_swift_region_name = here\nbackup_swift_container = {name}");
                ("swift.SwiftBackupDriver", options)
            }
            other => panic!("{other}"),
        };
        let conf = format!(
            "[DEFAULT]\nhost = {name}\nstorage_availability_zone = {name}\nbackup_file_size = 33554432\n\
             backup_driver = cinder.backup.drivers.{class}\nbackup_timer_interval = 1\n{options}\n{more}\n\
             [oslo_messaging_rabbit]\nheartbeat_timeout_threshold = 2\n\
             [oslo_messaging_notifications]\ntopics = {name}\n{}",
            self.further,
        );
        let path = self.work.path().join("backup.conf");
        fs::write(&path, conf).unwrap();
        path
    }

    /// Starts our worker, and waits until the scheduler gives it backups.
    pub(crate) fn backhaul(&self, driver: &str, ceph_conf: &Path) -> Service {
        self.backhaul_with(driver, ceph_conf, "")
    }

    /// The same with these lines in `[DEFAULT]`.
    pub(crate) fn backhaul_with(&self, driver: &str, ceph_conf: &Path, more: &str) -> Service {
        self.known(self.begin(backhaul_cinder(), driver, ceph_conf, more))
    }

    /// Starts our worker, and does not wait for anything.
    pub(crate) fn start_backhaul(&self, driver: &str, ceph_conf: &Path) -> Service {
        self.begin(backhaul_cinder(), driver, ceph_conf, "")
    }

    /// The same with a Python that is to have os-brick.
    pub(crate) fn backhaul_by(&self, python: &Path, driver: &str, ceph_conf: &Path) -> Service {
        let mut command = backhaul_cinder();
        command.env("BACKHAUL_PYTHON", python);
        self.known(self.begin(command, driver, ceph_conf, ""))
    }

    /// The Python that has Cinder, and os-brick with it.
    pub(crate) fn python(&self) -> PathBuf {
        fs::read_to_string(self.folder.join("python")).unwrap().trim().into()
    }

    /// A folder of this test's own.
    pub(crate) fn work(&self) -> &Path {
        self.work.path()
    }

    /// Starts Cinder's own backup service in the same place.
    pub(crate) fn cinder_backup(&self, driver: &str, ceph_conf: &Path) -> Service {
        let python = self.python();
        let program = python.with_file_name("cinder-backup");
        let mut command = Command::new(&python);
        command.arg(program).env("PYTHONWARNINGS", "ignore");
        self.known(self.begin(command, driver, ceph_conf, ""))
    }

    fn begin(&self, mut command: Command, driver: &str, ceph_conf: &Path, more: &str) -> Service {
        let log = self.work.path().join(format!("{}.log", Uuid::new_v4().simple()));
        let heard_count = self.reports().len();
        let file = |path: PathBuf| format!("--config-file={}", path.display());
        command.arg(file(self.folder.join("cinder.conf"))).arg(file(self.conf(driver, ceph_conf, more)));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            // Cinder's own makes processes of its own.
            .process_group(0)
            .spawn()
            .unwrap();
        Service { child, log, heard_count }
    }

    /// Waits until the scheduler gives backups to a service that was started.
    fn known(&self, mut service: Service) -> Service {
        until("the scheduler has heard of the backup service", || {
            assert!(service.child.try_wait().unwrap().is_none(), "it has ended: {}", service.log());
            self.reports()[service.heard_count..].contains(&true)
        });
        service
    }

    /// Hears the notifications of this test's own backup services, whenever they were sent.
    pub(crate) fn listen(&self) -> Oslo {
        let mut oslo = self.oslo();
        oslo.must(&json!({ "do": "listen", "topic": self.name }));
        oslo
    }

    /// Calls and casts to its services.
    pub(crate) fn oslo(&self) -> Oslo {
        let url = fs::read_to_string(self.folder.join("rabbit/url")).unwrap();
        Oslo::start(&url.trim().replacen("amqp://", "rabbit://", 1), "openstack", &[])
    }

    /// The client of its HTTP API, as a user with a project of its own.
    pub(crate) fn client(&self) -> CinderClient {
        let python = std::env::var_os("BACKHAUL_TEST_CINDER")
            .expect("run `make test`, which installs Cinder's client");
        let endpoint = fs::read_to_string(self.folder.join("url")).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/cinder_client.py");
        let (user, project) = (Uuid::new_v4().simple().to_string(), Uuid::new_v4().simple().to_string());
        let mut process = Command::new(python)
            .args(["-W", "ignore", script, endpoint.trim(), &user, &project])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (calls, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        CinderClient { process, calls, answers: BufReader::new(answers), project }
    }

    /// What the volume service has logged.
    pub(crate) fn log_of_volumes(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("log/volume.log")).unwrap()).into_owned()
    }

    /// Runs a statement in Cinder's database, which others use, too.
    pub(crate) fn sql(&self, statement: &str) {
        let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/mariadb.sh"));
        script.arg("sql").arg(self.folder.join("mariadb")).args(["--delimiter=//", "--execute", statement]);
        assert!(script.status().unwrap().success(), "{statement}");
    }

    /// What the scheduler has heard so far of whether this test's backup service takes backups.
    pub(crate) fn reports(&self) -> Vec<bool> {
        let log = fs::read(self.folder.join("log/scheduler.log")).unwrap();
        let log = String::from_utf8_lossy(&log);
        let of_us = format!("Received backup service update from {}", self.name);
        let reports = log.lines().filter(|line| line.contains(&of_us));
        reports.map(|line| line.contains("'backend_state': True")).collect()
    }
}

impl Drop for Openstack {
    fn drop(&mut self) {
        let _ = self.api.kill();
        let _ = self.api.wait();
        for mounted in [self.share().1, self.backups()] {
            if mounted.exists() {
                // Most tests have mounted nothing.
                let _ = Command::new("umount").arg("--lazy").arg(mounted).stderr(Stdio::null()).status();
            }
        }
    }
}

/// Waits for something that is asked of a server.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(future)
}

/// A backup service that runs. Dropping it kills it.
pub(crate) struct Service {
    child: Child,
    log: PathBuf,
    /// How often the scheduler had heard of one on its host before it was started.
    heard_count: usize,
}

impl Service {
    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Has it end in good order.
    pub(crate) fn stop(mut self) {
        let group = format!("-{}", self.child.id());
        assert!(Command::new("kill").args(["-TERM", "--", &group]).status().unwrap().success());
        self.child.wait().unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let group = format!("-{}", self.child.id());
        // Its processes may have ended already.
        let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of the backup service:\n{}", self.log());
        }
    }
}

/// python-cinderclient, in a process of its own.
pub(crate) struct CinderClient {
    process: Child,
    calls: ChildStdin,
    answers: BufReader<ChildStdout>,
    project: String,
}

impl CinderClient {
    /// The id of its project.
    pub(crate) fn project(&self) -> &str {
        &self.project
    }

    /// Calls a method of one of its managers, such as `get` of `backups`. An error has the `status` of HTTP.
    pub(crate) fn ask(&mut self, manager: &str, method: &str, arguments: &Value) -> Result<Value, Value> {
        writeln!(self.calls, "{}", json!([manager, method, arguments])).unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let mut answer: Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        if answer.get("error").is_some() { Err(answer["error"].take()) } else { Ok(answer["ok"].take()) }
    }

    /// The same of what must be possible.
    pub(crate) fn ok(&mut self, manager: &str, method: &str, arguments: &Value) -> Value {
        self.ask(manager, method, arguments)
            .unwrap_or_else(|error| panic!("{manager}.{method} {arguments}: {error}"))
    }

    /// Waits until something has a status that stays.
    pub(crate) fn settled(&mut self, manager: &str, id: &str) -> Value {
        self.ok(manager, "settled", &json!(id))
    }
}

impl Drop for CinderClient {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A text in JSON.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).into()
}

/// Ceilometer's own definitions of meters and events, in a process of its own.
pub(crate) struct Ceilometer {
    process: Child,
    notifications: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Ceilometer {
    pub(crate) fn start() -> Self {
        let python =
            std::env::var_os("BACKHAUL_TEST_CINDER").expect("run `make test`, which installs Ceilometer");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/ceilometer_meters.py");
        let mut process = Command::new(python)
            .args(["-W", "ignore", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (notifications, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, notifications, answers: BufReader::new(answers) }
    }

    /// The samples and the event that it makes of a notification.
    pub(crate) fn makes_of(&mut self, notification: &Value) -> Value {
        writeln!(self.notifications, "{notification}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|_| panic!("Ceilometer ended in {notification}"))
    }
}

impl Drop for Ceilometer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
