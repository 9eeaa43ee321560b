//! Block devices for tests: loop devices, which only root can make, and not on every machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::NamedTempFile;

/// A block device of a test's own.
pub(crate) struct BlockDevice {
    path: PathBuf,
    _file: NamedTempFile,
}

impl BlockDevice {
    /// Makes one that holds these bytes.
    pub(crate) fn holding(bytes: &[u8]) -> Self {
        let file = NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let output = losetup(&[Path::new("--find"), Path::new("--show"), file.path()]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "losetup: {told}; `make test` leaves out what it cannot have here");
        Self { path: String::from_utf8(output.stdout).unwrap().trim().into(), _file: file }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        losetup(&[Path::new("--detach"), &self.path]);
    }
}

fn losetup(arguments: &[&Path]) -> Output {
    // It is where an ordinary user does not look.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    Command::new("losetup").env("PATH", path).args(arguments).stdin(Stdio::null()).output().unwrap()
}
