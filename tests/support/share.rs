//! A share of an NFS server, as far as there is one without a server, for which not every kernel has the client: something else
//! is mounted under its name, and strace refuses what NFS refuses, which is to rename only where nothing is replaced.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use backhaul::store::Share;

/// Says to a test that was started again below which folder the share is mounted.
const BASE_VARIABLE: &str = "BACKHAUL_TEST_SHARE_BASE";

/// The name of the share, which is asked of no server: it is mounted already.
pub(crate) const SHARE: &str = "nfs.example.org:/backups";

/// The share as ours to mount, on a folder below `base`.
pub(crate) fn ours(base: &Path) -> Share {
    Share::Ours { share: SHARE.into(), options: None, base: base.into() }
}

/// Below which folder the share is mounted for this process, if it is.
pub(crate) fn base() -> Option<PathBuf> {
    std::env::var_os(BASE_VARIABLE).map(PathBuf::from)
}

/// This program, to which arguments may be added, in a namespace with the share mounted below `base`. What was refused stands
/// in `log` then.
pub(crate) fn command_on_share(base: &Path, log: &Path) -> Command {
    let folder = ours(base).folder();
    fs::create_dir_all(&folder).unwrap();
    let mut command = Command::new("unshare");
    // Root may mount without being root of a user namespace of its own, which not every place allows.
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        command.args(["--user", "--map-root-user"]);
    }
    let script = "mount -t tmpfs \"$0\" \"$1\" && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, SHARE]).arg(folder);
    command.args(["strace", "--follow-forks", "--seccomp-bpf", "--quiet=all", "--trace=renameat2"]);
    command.args(["--inject=renameat2:error=EINVAL", "--output"]).arg(log);
    command.arg(std::env::current_exe().unwrap()).env(BASE_VARIABLE, base);
    command
}
