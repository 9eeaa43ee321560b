//! A real Ceph for tests: one of the two clusters that all tests share, or one of a test's own, which may be broken.
//!
//! Everything here goes through Ceph's own programs, as client.admin, and through none of our code.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;
use uuid::Uuid;

use super::content::Content;

/// A cluster that tests may use. It has the pools `volumes`, `backups` and `backups2`, and the user `cinder`.
pub(crate) struct Ceph {
    conf: PathBuf,
    /// Where its files are; none if it is shared.
    own: Option<TempDir>,
}

impl Ceph {
    /// The cluster that `make test` starts for all tests. It must not be broken, and every test needs images of its own.
    pub(crate) fn shared() -> Self {
        Self::named("BACKHAUL_TEST_CEPH_CONF")
    }

    /// Another cluster for all tests, which shares nothing with the first one but the names of pools and users.
    pub(crate) fn other() -> Self {
        Self::named("BACKHAUL_TEST_CEPH_CONF_2")
    }

    fn named(variable: &str) -> Self {
        let conf = std::env::var_os(variable).unwrap_or_else(|| {
            panic!("{variable} names no cluster's ceph.conf: run `make test`, which starts one")
        });
        Self { conf: conf.into(), own: None }
    }

    /// Starts a cluster of one's own, with these lines added to its ceph.conf, which takes some seconds.
    pub(crate) fn start_with(conf_lines: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let told = text(run(ceph_sh("up", folder.path()).args(conf_lines)));
        Self { conf: told.trim_end().into(), own: Some(folder) }
    }

    /// Its ceph.conf, which names the keyring.
    pub(crate) fn conf(&self) -> &Path {
        &self.conf
    }

    /// Runs ceph against it and gives what it printed.
    pub(crate) fn ceph(&self, arguments: &[&str]) -> String {
        text(run(Command::new("ceph").arg("-c").arg(&self.conf).args(arguments)))
    }

    /// Runs rbd against it and gives what it printed.
    pub(crate) fn rbd(&self, arguments: &[&str]) -> String {
        text(run(&mut self.rbd_command(arguments)))
    }

    /// What an image holds, or a snapshot of one.
    pub(crate) fn content(&self, spec: &str) -> Content {
        let mut export = self.rbd_command(&["export-diff", "--no-progress", spec, "-"]);
        let mut export = export.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let content = Content::of_diff(export.stdout.take().unwrap());
        assert!(export.wait().unwrap().success(), "rbd export-diff {spec} -");
        content
    }

    fn rbd_command(&self, arguments: &[&str]) -> Command {
        let mut rbd = Command::new("rbd");
        rbd.arg("-c").arg(&self.conf).args(arguments);
        rbd
    }

    /// Whether it is one's own.
    pub(crate) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Stops the OSD of one's own cluster: whoever reads or writes waits.
    pub(crate) fn stop_osd(&self) {
        run(&mut ceph_sh("stop-osd", self.own_folder()));
    }

    /// Starts the OSD again.
    pub(crate) fn start_osd(&self) {
        run(&mut ceph_sh("start-osd", self.own_folder()));
    }

    /// Has one's own cluster forget how large the older states of a RADOS object are, which its snapshots keep: it reads
    /// them as before, and refuses to tell what differs between them. Stops the OSD for that, and starts it again.
    pub(crate) fn forget_clone_sizes(&self, object: &str) {
        self.stop_osd();
        let data = self.own_folder().join("osd.0");
        let tool = |arguments: &[&str]| {
            let mut tool = Command::new("ceph-objectstore-tool");
            tool.args(["--no-mon-config", "--data-path"]).arg(&data);
            text(run(tool.args(arguments)))
        };
        let states = tool(&["--op", "list", object]);
        let newest = states.lines().find(|state| state.contains(r#""snapid":-2"#)).unwrap();
        tool(&[newest, "clear-snapset", "clone_size"]);
        self.start_osd();
    }

    /// Starts the gateway of one's own cluster, if it does not run, and gives the URL at which it speaks S3.
    pub(crate) fn start_gateway(&self) -> String {
        text(run(&mut ceph_sh("gateway", self.own_folder()))).trim_end().into()
    }

    /// Stops the gateway.
    pub(crate) fn stop_gateway(&self) {
        run(&mut ceph_sh("stop-gateway", self.own_folder()));
    }

    fn own_folder(&self) -> &Path {
        self.own.as_ref().expect("the shared clusters are not to be broken").path()
    }

    /// Runs rados against it and gives what it printed.
    pub(crate) fn rados(&self, arguments: &[&str]) -> String {
        text(run(Command::new("rados").arg("-c").arg(&self.conf).args(arguments)))
    }

    /// The names of the images and RADOS objects of a pool that have one of these in them.
    pub(crate) fn names_with(&self, pool: &str, parts: &[&str]) -> Vec<String> {
        let (images, objects) = (self.rbd(&["ls", pool]), self.rados(&["-p", pool, "ls"]));
        let names = images.lines().chain(objects.lines());
        names.filter(|name| parts.iter().any(|part| name.contains(part))).map(Into::into).collect()
    }

    /// An image that is there already.
    pub(crate) fn existing(&self, spec: &str) -> Image<'_> {
        Image { ceph: self, spec: spec.into() }
    }

    /// Makes an image of nothing but holes, with a name that no other has.
    pub(crate) fn image(&self, pool: &str, bytes: u64) -> Image<'_> {
        let name = format!("volume-{}", Uuid::new_v4());
        self.rbd(&["create", "--size", &format!("{bytes}B"), &format!("{pool}/{name}")]);
        Image { ceph: self, spec: format!("{pool}/{name}") }
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        if let Some(folder) = &self.own {
            let _ = ceph_sh("down", folder.path()).output();
        }
    }
}

/// An image in a cluster.
pub(crate) struct Image<'a> {
    ceph: &'a Ceph,
    spec: String,
}

impl Image<'_> {
    /// `pool/image`, as rbd wants it.
    pub(crate) fn spec(&self) -> &str {
        &self.spec
    }

    /// Writes these bytes at these offsets, and nothing else.
    pub(crate) fn write(&self, extents: &[(u64, &[u8])]) {
        let mut diff = Vec::new();
        for (offset, bytes) in extents {
            diff.push(b'w');
            diff.extend([offset.to_le_bytes(), (bytes.len() as u64).to_le_bytes()].concat());
            diff.extend(*bytes);
        }
        self.import_diff(&diff);
    }

    /// Makes a hole: deletes objects, and cuts them short or fills them with zeros where they are touched in part.
    pub(crate) fn discard(&self, offset: u64, bytes: u64) {
        self.import_diff(&[b"z", &offset.to_le_bytes()[..], &bytes.to_le_bytes()[..]].concat());
    }

    /// Applies records of rbd's format `rbd diff v1`, which say what is written where.
    fn import_diff(&self, records: &[u8]) {
        let mut import = self.ceph.rbd_command(&["import-diff", "--no-progress", "-", &self.spec]);
        let mut import = import.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut diff = import.stdin.take().unwrap();
        diff.write_all(&[b"rbd diff v1\n", records, b"e"].concat()).unwrap();
        drop(diff);
        assert!(import.wait().unwrap().success(), "rbd import-diff - {}", self.spec);
    }

    /// Its id, which the names of its RADOS objects have.
    pub(crate) fn id(&self) -> String {
        let info = self.ceph.rbd(&["info", "--format", "json", &self.spec]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        info["id"].as_str().unwrap().into()
    }

    /// The name of its RADOS object of that number.
    pub(crate) fn object(&self, number: u64) -> String {
        format!("rbd_data.{}.{number:016x}", self.id())
    }

    /// Has Ceph let each client that opens it from now on read and write so many bytes a second.
    pub(crate) fn slow_down(&self, bytes_per_second: u64) {
        let limit = bytes_per_second.to_string();
        self.ceph.rbd(&["config", "image", "set", &self.spec, "rbd_qos_bps_limit", &limit]);
    }

    /// Ends that, for those who open it from now on.
    pub(crate) fn hurry(&self) {
        // rbd would tell all who have it open, and wait half a minute for one that is dead.
        let pool = self.spec.split_once('/').unwrap().0;
        let header = format!("rbd_header.{}", self.id());
        self.ceph.rados(&["-p", pool, "rmomapkey", &header, "metadata_conf_rbd_qos_bps_limit"]);
    }

    /// Has somebody open it.
    pub(crate) fn watch(&self) -> Watcher {
        let mut watch = self.ceph.rbd_command(&["watch", &self.spec]);
        let mut watch = watch.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut told = String::new();
        BufReader::new(watch.stdout.take().unwrap()).read_line(&mut told).unwrap();
        assert!(told.contains("press enter"), "{told}");
        Watcher(watch)
    }

    /// Makes a snapshot of it.
    pub(crate) fn snapshot(&self, name: &str) {
        self.ceph.rbd(&["snap", "create", "--no-progress", &format!("{}@{name}", self.spec)]);
    }

    /// Makes a clone of a snapshot, which need not be protected for that.
    pub(crate) fn clone_of(&self, snapshot: &str) -> Self {
        let spec = format!("volumes/clone-{}", Uuid::new_v4());
        let snapshot = format!("{}@{snapshot}", self.spec);
        self.ceph.rbd(&["clone", "--rbd-default-clone-format", "2", &snapshot, &spec]);
        Image { ceph: self.ceph, spec }
    }

    /// Leaves a snapshot as Ceph does when its removal is broken off: in the trash, though nobody needs it.
    pub(crate) fn half_remove_snapshot(&self, snapshot: &str) {
        let clone = self.clone_of(snapshot);
        self.ceph.rbd(&["snap", "rm", "--no-progress", &format!("{}@{snapshot}", self.spec)]);
        // The last of its clones would take it along, if nobody had the lock.
        self.ceph.rbd(&["lock", "add", &self.spec, "test"]);
        self.ceph.rbd(&["rm", "--no-progress", clone.spec()]);
        let lock = self.ceph.rbd(&["lock", "ls", "--format", "json", &self.spec]);
        let lock: serde_json::Value = serde_json::from_str(&lock).unwrap();
        self.ceph.rbd(&["lock", "rm", &self.spec, "test", lock[0]["locker"].as_str().unwrap()]);
        let left = self.ceph.rbd(&["snap", "ls", "--all", &self.spec]);
        assert!(left.contains(&format!("trash ({snapshot})")), "{left}");
    }

    /// All its bytes as they are now.
    pub(crate) fn read(&self) -> Vec<u8> {
        self.export(&self.spec)
    }

    /// All its bytes as they were at a snapshot.
    pub(crate) fn read_at(&self, snapshot: &str) -> Vec<u8> {
        self.export(&format!("{}@{snapshot}", self.spec))
    }

    fn export(&self, spec: &str) -> Vec<u8> {
        run(&mut self.ceph.rbd_command(&["export", "--no-progress", spec, "-"])).stdout
    }
}

/// Somebody who has an image open. Dropping it ends that.
pub(crate) struct Watcher(Child);

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn ceph_sh(command: &str, folder: &Path) -> Command {
    let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/ceph.sh"));
    script.arg(command).arg(folder);
    script
}

/// Runs it to its end, which must be a good one.
fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {told}");
    output
}

fn text(output: Output) -> String {
    String::from_utf8(output.stdout).unwrap()
}
