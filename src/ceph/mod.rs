//! Ceph, through librados: the only place with unsafe code, all of it behind types that cannot be misused.
//!
//! It must not know jobs or backups.

use std::ffi::{CString, NulError, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;

use ::ceph::rados;

/// Why a cluster cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name or path that cannot be handed to librados.
    #[error("a Ceph setting has a zero byte")]
    ZeroByte(#[from] NulError),
    /// The configuration file cannot be read.
    #[error("read {conf}: {error}", conf = conf.display())]
    Conf {
        /// The file.
        conf: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The cluster does not answer, or not to this user.
    #[error(
        "connect to the cluster of {conf} as client.{user}: {error}; are its monitors up, and is the user's keyring \
         readable?",
        conf = conf.display()
    )]
    Connect {
        /// The configuration file.
        conf: PathBuf,
        /// The user, without `client.`.
        user: String,
        /// Why.
        error: std::io::Error,
    },
}

/// A connection to a cluster.
pub struct Cluster {
    handle: rados::rados_t,
}

impl Cluster {
    /// Connects with a configuration file and a user, whose name goes without `client.`. Gives up after
    /// `seconds_max`. Blocks.
    pub fn connect(conf: &Path, user: &str, seconds_max: u32) -> Result<Self, Error> {
        let failed = |code| Error::Connect { conf: conf.into(), user: user.into(), error: os_error(code) };
        let (id, path) = (CString::new(user)?, CString::new(conf.as_os_str().as_bytes())?);
        let mut handle: rados::rados_t = ptr::null_mut();
        // SAFETY: both pointers are valid for the call; librados keeps neither. After success the handle is ours, and
        // `Cluster` gives it back once, when it is dropped.
        check(unsafe { rados::rados_create(&mut handle, id.as_ptr()) }).map_err(failed)?;
        let cluster = Self { handle };
        // SAFETY: the handle was created above and is not yet connected; the path is valid for the call.
        check(unsafe { rados::rados_conf_read_file(cluster.handle, path.as_ptr()) })
            .map_err(|code| Error::Conf { conf: conf.into(), error: os_error(code) })?;
        // Without these a cluster that is down is waited for five minutes, or for ever.
        let seconds = CString::new(seconds_max.to_string())?;
        for option in [c"client_mount_timeout", c"rados_mon_op_timeout", c"rados_osd_op_timeout"] {
            // SAFETY: the handle is valid, and both strings are for the call.
            check(unsafe { rados::rados_conf_set(cluster.handle, option.as_ptr(), seconds.as_ptr()) })
                .map_err(failed)?;
        }
        // SAFETY: the handle is valid, configured, and connected only here.
        check(unsafe { rados::rados_connect(cluster.handle) }).map_err(failed)?;
        Ok(cluster)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: the handle came from rados_create, which a shutdown undoes whether it was connected or not; nobody
        // has it after this.
        unsafe { rados::rados_shutdown(self.handle) }
    }
}

fn check(code: c_int) -> Result<(), c_int> {
    if code < 0 { Err(code) } else { Ok(()) }
}

/// librados returns errors as negative numbers of the operating system's.
fn os_error(code: c_int) -> std::io::Error {
    std::io::Error::from_raw_os_error(-code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_without_a_configuration_or_monitors_is_a_clear_error() {
        let folder = tempfile::tempdir().unwrap();
        let conf = folder.path().join("ceph.conf");

        let error = Cluster::connect(&conf, "cinder", 1).err().unwrap();
        assert!(matches!(error, Error::Conf { .. }), "{error}");
        assert!(error.to_string().contains("ceph.conf: No such file"), "{error}");

        std::fs::write(&conf, "[global]\nmon_host = 127.0.0.1:1\nauth_client_required = none\n").unwrap();
        let error = Cluster::connect(&conf, "cinder", 1).err().unwrap();
        assert!(error.to_string().contains("client.cinder"), "{error}");
    }
}
