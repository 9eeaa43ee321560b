//! Ceph, through librados and librbd: the only place with unsafe code, all of it behind types that cannot be misused.
//!
//! It must not know jobs or backups. All that is not `async` blocks, and is to be called from threads that may.

mod clusters;
mod image;
mod librbd;
mod rados;

pub use clusters::{Access, Clusters};
pub use image::{Diff, Extent, Features, Image, Mode, NewImage, Snapshot};
pub use rados::{Cluster, MapChange, Pool};

use std::ffi::{CString, NulError, c_int};
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;

/// What went wrong in a cluster.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name or path that cannot be handed over.
    #[error("a name for Ceph has a zero byte")]
    ZeroByte(#[from] NulError),
    /// A cluster was named, but none is in the configuration.
    #[error("no cluster is in the configuration: write [ceph.NAME] with conf and user")]
    NoCluster,
    /// The configuration has no such cluster.
    #[error("no cluster {name:?} is in the configuration: it has {known}")]
    UnknownCluster {
        /// What was asked for.
        name: String,
        /// What there is, for people.
        known: String,
    },
    /// Of several clusters none was named.
    #[error("it is not said which cluster is meant: name one of {known}")]
    UnnamedCluster {
        /// What there is, for people.
        known: String,
    },
    /// The configuration file cannot be read.
    #[error("read {conf}: {error}", conf = conf.display())]
    Conf {
        /// The file.
        conf: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The cluster does not answer, or not to this user.
    #[error(
        "connect to the cluster of {conf} as client.{user}: {error}; are its monitors up, and is the user's keyring \
         readable and right?",
        conf = conf.display()
    )]
    Connect {
        /// The configuration file.
        conf: PathBuf,
        /// The user, without `client.`.
        user: String,
        /// Why.
        error: io::Error,
    },
    /// A cluster said no.
    #[error("{action} {object}: {error}")]
    Operation {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: String,
        /// Why it failed.
        error: io::Error,
    },
}

impl Error {
    fn operation(action: &'static str, object: impl ToString, code: c_int) -> Self {
        Self::Operation { action, object: object.to_string(), error: os_error(code) }
    }

    /// The same for those who speak in the operating system's errors.
    pub fn into_io(self) -> io::Error {
        io::Error::new(self.kind(), self)
    }

    /// Whether a cluster says that there is no such thing. A file of ours that is missing says nothing about the cluster.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Operation { .. }) && self.kind() == io::ErrorKind::NotFound
    }

    /// Whether the configuration does not say which cluster is meant, so that none was asked.
    pub fn is_unknown_cluster(&self) -> bool {
        matches!(self, Self::NoCluster | Self::UnknownCluster { .. } | Self::UnnamedCluster { .. })
    }

    /// What the operating system, in whose words Ceph speaks, calls the error.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::ZeroByte(_)
            | Self::NoCluster
            | Self::UnknownCluster { .. }
            | Self::UnnamedCluster { .. } => io::ErrorKind::InvalidInput,
            // The cluster has shut this client out, mostly because somebody else has taken over what it did.
            Self::Operation { error, .. } if error.raw_os_error() == Some(Errno::SHUTDOWN.raw_os_error()) => {
                io::ErrorKind::ConnectionAborted
            }
            // Handles come back when other jobs end.
            Self::Conf { error, .. } | Self::Connect { error, .. } | Self::Operation { error, .. }
                if [Errno::MFILE, Errno::NFILE]
                    .map(|e| Some(e.raw_os_error()))
                    .contains(&error.raw_os_error()) =>
            {
                io::ErrorKind::ConnectionAborted
            }
            Self::Conf { error, .. } | Self::Connect { error, .. } | Self::Operation { error, .. } => {
                error.kind()
            }
        }
    }
}

impl From<Error> for io::Error {
    /// Leaves what the operating system would say; what was tried on what is for the caller to tell.
    fn from(error: Error) -> Self {
        match error {
            Error::Operation { error, .. } => error,
            other => Self::new(other.kind(), other),
        }
    }
}

/// Ceph returns errors as negative numbers of the operating system's.
fn os_error(code: c_int) -> io::Error {
    io::Error::from_raw_os_error(-code)
}

/// Ceph frees an image that a client had open when it died only after half a minute.
const BUSY_TIME_MAX: Duration = Duration::from_secs(40);
const BUSY_WAIT: Duration = Duration::from_secs(1);

/// Does something again and again for as long as an image or snapshot is in use, up to a limit.
pub fn while_busy<T>(mut action: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    // Not by their number, because a try may take some seconds.
    let begun = Instant::now();
    loop {
        match action() {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && begun.elapsed() < BUSY_TIME_MAX => {
                thread::sleep(BUSY_WAIT);
            }
            done => return done,
        }
    }
}

/// Does what blocks. Where the thread has tasks, the others go on elsewhere meanwhile.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => block_in_place(work),
        _ => work(),
    }
}

fn check(code: c_int) -> Result<c_int, c_int> {
    if code < 0 { Err(code) } else { Ok(code) }
}

fn c_string(text: &str) -> Result<CString, NulError> {
    CString::new(text)
}
