//! A share of an NFS server, in a Linux of its own, which `dev/nfs.sh` has: this program runs there again.

use std::path::PathBuf;
use std::process::{Command, Output};

use backhaul::store::Share;

/// Says to a test that it runs there.
const THERE_VARIABLE: &str = "BACKHAUL_TEST_ON_NFS";

/// The share as ours to mount with these options, where it is mounted with no others.
pub(crate) fn ours(options: Option<&str>) -> Share {
    let base = PathBuf::from("/var/tmp/mounts").join(options.unwrap_or("none"));
    Share::Ours { share: "nfs.example.org:/backups".into(), options: options.map(Into::into), base }
}

/// Whether this process runs where the share is.
pub(crate) fn is_there() -> bool {
    std::env::var_os(THERE_VARIABLE).is_some()
}

/// Runs tests of this program where the share is.
pub(crate) fn run_there(arguments: &[&str]) -> Output {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/nfs.sh"));
    command.arg(std::env::current_exe().unwrap()).args(arguments).env(THERE_VARIABLE, "1");
    command.output().unwrap()
}

/// Runs the one test of this name there, which must pass.
pub(crate) fn passes_there(test: &str) {
    let output = run_there(&[test, "--exact", "--nocapture"]);
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}
