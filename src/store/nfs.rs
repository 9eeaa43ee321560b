//! Shares of NFS servers: folders of a [`Posix`](super::Posix) store, once they are mounted, which is done here if nobody else
//! does it.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use md5::{Digest, Md5};

use super::{Error, Reason, Result};

/// What the kernel says of what is mounted where.
const MOUNTS: &str = "/proc/self/mounts";

/// Where `mount` looks for the program that mounts shares.
const HELPERS: [&str; 3] = ["/sbin/mount.nfs", "/sbin/fs.d/mount.nfs", "/sbin/fs/mount.nfs"];

/// Where a share is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Share {
    /// On this folder, where somebody else mounts it.
    Mounted(PathBuf),
    /// Where we mount it, unless it is there already.
    Ours {
        /// The share: `host:/path`.
        share: String,
        /// What the mount is given as `-o`.
        options: Option<String>,
        /// The folder with the folder that it is mounted on. That one is called as Cinder calls it.
        base: PathBuf,
    },
}

impl Share {
    /// The folder that it is mounted on, or is to be mounted on.
    pub fn folder(&self) -> PathBuf {
        match self {
            Self::Mounted(path) => path.clone(),
            Self::Ours { share, base, .. } => base.join(hex::encode(Md5::digest(share))),
        }
    }

    /// Mounts the share if that is ours to do and it is not mounted yet, and gives its folder. Blocks, for some minutes if the
    /// server does not answer.
    pub fn mount(&self) -> Result<PathBuf> {
        let Self::Ours { share, options, base } = self else { return Ok(self.folder()) };
        let at = |error| Error::io("make the folder for the share in", base.display(), error);
        fs::create_dir_all(self.folder()).map_err(at)?;
        // The kernel names folders without links.
        let folder = self.folder().canonicalize().map_err(at)?;
        if is_there(share, &folder)? {
            return Ok(folder);
        }
        let mut command = Command::new("mount");
        command.args(["-t", "nfs"]).args(options.iter().flat_map(|options| ["-o", options]));
        command.arg("--").arg(share).arg(&folder).stdin(Stdio::null());
        let output = command
            .output()
            .map_err(|error| failed(share, &folder, &format!("run mount: {error}{}", missing_helper())))?;
        // Another process may have mounted it in between.
        match is_there(share, &folder)? {
            true => Ok(folder),
            false if output.status.success() => {
                Err(failed(share, &folder, "mount has ended well, and it is not there"))
            }
            false => {
                let said = String::from_utf8_lossy(&output.stderr);
                Err(failed(share, &folder, &format!("{}{}", said.trim(), missing_helper())))
            }
        }
    }
}

/// What to do about a mount that failed, if it must have for want of a program.
fn missing_helper() -> &'static str {
    match HELPERS.iter().any(|helper| Path::new(helper).exists()) {
        true => "",
        false => {
            ": the program mount.nfs is not there; install the package that has it, nfs-common on Debian and Ubuntu, nfs-utils \
             elsewhere"
        }
    }
}

/// What is mounted where a folder is, as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// A device, or a share.
    source: String,
    /// The kind of its file system.
    kind: String,
}

impl Mount {
    /// Looks up what a folder, which must be there, lies on.
    pub fn of(folder: &Path) -> Result<Self> {
        let at = |error| Error::io("look up what is mounted at", folder.display(), error);
        let mounts = fs::read(MOUNTS).map_err(at)?;
        let folder = folder.canonicalize().map_err(at)?;
        Self::among(&mounts, &folder).ok_or_else(|| at(ErrorKind::NotFound.into()))
    }

    /// Of those that the folder is below it is the nearest one, and the last of several on one folder.
    fn among(mounts: &[u8], folder: &Path) -> Option<Self> {
        let lines = mounts.split(|byte| *byte == b'\n').filter_map(fields);
        let (source, _, kind) = lines
            .filter(|(_, on, _)| folder.starts_with(OsStr::from_bytes(on)))
            .max_by_key(|(_, on, _)| on.len())?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Some(Self { source: text(source), kind: text(kind) })
    }

    /// Whether it is a share of an NFS server.
    pub fn is_nfs(&self) -> bool {
        matches!(self.kind.as_str(), "nfs" | "nfs4")
    }
}

impl fmt::Display for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.source, self.kind)
    }
}

/// Whether this share is mounted on a folder; fails if something else is.
fn is_there(share: &str, folder: &Path) -> Result<bool> {
    let mounts = fs::read(MOUNTS).map_err(|error| Error::io("read", MOUNTS, error))?;
    match source_on(&mounts, folder) {
        None => Ok(false),
        Some(source) if source == share.as_bytes() => Ok(true),
        Some(source) => {
            let source = String::from_utf8_lossy(&source).into_owned();
            Err(failed(share, folder, &format!("{source} is mounted there: unmount it")))
        }
    }
}

fn failed(share: &str, folder: &Path, why: &str) -> Error {
    let reason = Reason::Other(Arc::new(io::Error::new(ErrorKind::NotFound, why.to_owned())));
    Error::new("mount", format!("{share} on {}", folder.display()), reason)
}

/// What is mounted on a folder, by the lines of the kernel; the last one is what one sees.
fn source_on(mounts: &[u8], folder: &Path) -> Option<Vec<u8>> {
    let mut lines = mounts.split(|byte| *byte == b'\n').filter_map(fields);
    lines.rfind(|(_, on, _)| on == folder.as_os_str().as_bytes()).map(|(source, _, _)| source)
}

/// What is mounted, on which folder, and its kind, of a line of the kernel's.
fn fields(line: &[u8]) -> Option<(Vec<u8>, Vec<u8>, Vec<u8>)> {
    let mut fields = line.split(|byte| *byte == b' ').map(plain);
    Some((fields.next()?, fields.next()?, fields.next()?))
}

/// A field without the octal numbers that stand for blanks and the like.
fn plain(field: &[u8]) -> Vec<u8> {
    let (mut plain, mut rest) = (Vec::new(), field);
    while let Some((first, behind)) = rest.split_first() {
        let number = behind.get(..3).filter(|_| *first == b'\\');
        let number = number.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        plain.push(number.unwrap_or(*first));
        rest = if number.is_some() { behind.split_at(3).1 } else { behind };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_on_a_folder_is_known_by_the_lines_of_the_kernel() {
        let mounts = b"/dev/vda / ext4 rw 0 0\n\
                       other:/x /mnt/with\\040blank nfs4 rw 0 0\n\
                       nfs.example.org:/backups\\040all /mnt/with\\040blank nfs4 rw,vers=4.2 0 0\n";
        let on = |folder: &str| {
            source_on(mounts, Path::new(folder)).map(|source| String::from_utf8(source).unwrap())
        };
        assert_eq!(on("/mnt/with blank").unwrap(), "nfs.example.org:/backups all");
        assert_eq!(on("/").unwrap(), "/dev/vda");
        assert_eq!(on("/mnt"), None);

        let below = |folder: &str| Mount::among(mounts, Path::new(folder)).unwrap().to_string();
        assert_eq!(below("/mnt/with blank/a/b"), "nfs.example.org:/backups all (nfs4)");
        assert_eq!(below("/mnt/with blankets"), "/dev/vda (ext4)");
        assert!(Mount::among(mounts, Path::new("/mnt/with blank")).unwrap().is_nfs());
        assert!(!Mount::of(Path::new("/proc")).unwrap().is_nfs());
        Mount::of(Path::new("/no/such/folder")).unwrap_err();
    }

    #[test]
    fn a_share_is_mounted_where_cinder_mounts_it_and_its_failure_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let share = Share::Ours {
            share: "127.0.0.1:/no-such-share".into(),
            options: Some("vers=4.2,retry=0,timeo=1".into()),
            base: folder.path().join("mounts"),
        };
        // What `md5sum` says of the share.
        let name = "86195c1231be2adf17eac3f48349e9b5";
        assert_eq!(share.folder(), folder.path().join("mounts").join(name));

        let error = share.mount().unwrap_err();

        let told = crate::error::Causes(&error).to_string();
        assert!(told.starts_with("mount 127.0.0.1:/no-such-share on "), "{told}");
        assert!(told.contains("mount: ") || told.contains("mount.nfs"), "{told}");
        assert_eq!(told.contains("nfs-common"), !Path::new("/sbin/mount.nfs").exists(), "{told}");
        assert!(share.folder().is_dir());
    }
}
