//! OpenStack Cinder's own backup drivers, in a process of their own: `tests/peers/cinder_driver.py`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use backhaul::cinder::export_record::{self, ExportRecord};
use backhaul::job::{BackupId, Record, VolumeId};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What Cinder is to back up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of<'a> {
    /// An RBD image, `pool/image`.
    Image(&'a str),
    /// An image that was made of this snapshot of the volume.
    Snapshot(&'a str),
    /// A file.
    File(&'a str),
}

/// A Cinder with a database of its own, and one of its drivers.
pub(crate) struct Cinder {
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    _folder: TempDir,
}

impl Cinder {
    /// Starts it, which takes some seconds: with the driver of that name in Cinder's words, and options of its own,
    /// each `OPTION=VALUE`.
    pub(crate) fn start(driver: &str, options: &[String]) -> Self {
        Self::start_with(driver, options, None)
    }

    /// The same with a variable in its environment.
    pub(crate) fn start_with(driver: &str, options: &[String], variable: Option<(&str, String)>) -> Self {
        let python = std::env::var_os("BACKHAUL_TEST_CINDER").expect(
            "BACKHAUL_TEST_CINDER names no Python that has Cinder: run `make test`, which installs one",
        );
        let folder = TempDir::new().unwrap();
        let mut process = Command::new(python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/cinder_driver.py"))
            .arg(folder.path())
            .arg(driver)
            .args(options)
            .envs(variable)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (commands, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, commands, answers: BufReader::new(answers), _folder: folder }
    }

    /// Enters a volume of so many GiB into its database.
    pub(crate) fn add_volume(&mut self, id: VolumeId, gib: u64) {
        self.ask("add_volume", json!({ "volume_id": id, "gib": gib }));
    }

    /// Backs a volume up under a new id.
    pub(crate) fn backup(
        &mut self,
        volume_id: VolumeId,
        of: Of<'_>,
        parent_id: Option<BackupId>,
    ) -> Result<BackupId, String> {
        let id = BackupId::random();
        let (source, snapshot_id) = match of {
            Of::Image(spec) => (json!({ "image": spec }), None),
            Of::Snapshot(spec) => (json!({ "image": spec }), Some(BackupId::random())),
            Of::File(path) => (json!({ "file": path }), None),
        };
        let arguments = json!({
            "backup_id": id,
            "volume_id": volume_id,
            "source": source,
            "parent_id": parent_id,
            "snapshot_id": snapshot_id,
        });
        self.try_ask("backup", arguments).map(|_| id)
    }

    /// Restores a backup onto the image of a volume that is in its database.
    pub(crate) fn restore(&mut self, id: BackupId, volume_id: VolumeId, spec: &str, new: bool) {
        let target = json!({ "image": spec });
        self.ask("restore", json!({ "backup_id": id, "volume_id": volume_id, "target": target, "new": new }));
    }

    /// Restores a backup onto a file that is there.
    pub(crate) fn restore_file(&mut self, id: BackupId, volume_id: VolumeId, path: &Path, new: bool) {
        let target = json!({ "file": path });
        self.ask("restore", json!({ "backup_id": id, "volume_id": volume_id, "target": target, "new": new }));
    }

    /// Deletes a backup.
    pub(crate) fn delete(&mut self, id: BackupId) {
        self.ask("delete", json!({ "backup_id": id }));
    }

    /// Takes in a backup that Backhaul made.
    pub(crate) fn import(&mut self, record: &Record) {
        let ExportRecord { backup_service, backup_url } = export_record::encode(record);
        self.ask("import_record", json!({ "backup_service": backup_service, "backup_url": backup_url }));
    }

    /// Runs a command that must succeed.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.try_ask(command, arguments).unwrap_or_else(|error| panic!("Cinder's {command}: {error}"))
    }

    /// Runs a command; gives the error's class and text if it fails.
    pub(crate) fn try_ask(&mut self, command: &str, mut arguments: Value) -> Result<Value, String> {
        arguments["do"] = command.into();
        writeln!(self.commands, "{arguments}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        let mut answer: Value =
            serde_json::from_str(&answer).unwrap_or_else(|_| panic!("Cinder ended in {command}"));
        match answer["error"].as_str() {
            Some(error) => Err(error.into()),
            None => Ok(answer["ok"].take()),
        }
    }
}

impl Drop for Cinder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
