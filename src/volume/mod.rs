//! Both ends of a copy: where a volume's bytes are read, and where they go.
//!
//! Everything here blocks; it must not know jobs, stores or what is done with the bytes.

mod file;
#[cfg(feature = "ceph")]
pub mod rbd;

pub use file::{FileRoots, FileSource, FileTarget};
#[cfg(feature = "ceph")]
pub use rbd::{RbdSource, RbdTarget};

use std::io;
use std::ops::Range;

use rustix::io::Errno;

use crate::error::Class;

/// A volume to read.
pub trait VolumeSource: Send + Sync {
    /// Its size; never 0.
    fn bytes(&self) -> u64;

    /// The first range at or behind `offset` that may hold data, up to `end`; what lies before it is a hole and reads
    /// as zeros. None when all of it is.
    fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<Range<u64>>>;

    /// Fills `buffer` with the bytes from `offset` on; fails with `UnexpectedEof` when the volume ends before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Does many reads, all at once where that is quicker. An error comes with the offset of the read that failed.
    fn read_all(&self, reads: Vec<Read<'_>>) -> Result<(), (u64, io::Error)> {
        reads
            .into_iter()
            .try_for_each(|read| self.read_at(read.buffer, read.offset).map_err(|error| (read.offset, error)))
    }

    /// The parts of `range`, in order, that may have changed since the backup that the new one builds on; all else is
    /// as it was. None when nobody knows.
    fn changed(&self, _range: Range<u64>) -> io::Result<Option<Vec<Range<u64>>>> {
        Ok(None)
    }
}

/// A part of a volume that is to be read.
#[derive(Debug)]
pub struct Read<'a> {
    /// Where it begins.
    pub offset: u64,
    /// Where its bytes go, as many as there is room for.
    pub buffer: &'a mut [u8],
}

/// A volume to write. May be written from several threads at once, each its own ranges.
pub trait VolumeTarget: Send + Sync {
    /// What the target held before.
    fn before(&self) -> Before;

    /// Writes `bytes` from `offset` on.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the range read as zeros, without taking space for them where the target can do so.
    fn zero(&self, range: Range<u64>) -> io::Result<()>;

    /// What an attempt of the same restore before this one noted last. All that it had written by then is in the target.
    fn note(&self) -> Option<&str>;

    /// Makes durable what was written before this is called, and then keeps a note with a new target of how far its restore
    /// is. One that was there before may be written by others between two attempts, so nothing is noted of it.
    fn keep_note(&self, note: &str) -> io::Result<()>;

    /// Whether a target that was there before has been written to.
    fn is_changed(&self) -> bool;

    /// Leaves a new target where it is though it is not whole, for the next attempt of the same restore.
    fn leave(&self);

    /// Makes all that was written durable, and visible under the target's name. Nothing may follow.
    fn finish(&self) -> io::Result<()>;
}

/// How the name of a new target ends until it is whole.
const PARTIAL: &str = ".backhaul-partial";

/// What a target held before it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Zeros all over: ranges of zeros need not be touched.
    Zeros,
    /// Anything.
    Anything,
}

/// Why a volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path leads, perhaps through a link, out of where volumes may be.
    #[error(
        "{path} is not below one of worker.file_roots ({roots}): name one that is, or add its folder to that setting"
    )]
    OutsideRoots {
        /// The path as it was asked for.
        path: String,
        /// Where volumes may be.
        roots: String,
    },
    /// It would be restored over, or among, the objects of a store.
    #[error("{path} lies in the store in {store}, where backups are: restore to a place outside of it")]
    InStore {
        /// The path as it was asked for.
        path: String,
        /// The folder of the store.
        store: String,
    },
    /// What an attempt of a restore is to go on with has such a name, and may be removed.
    #[error(
        "{path} has a name that ends in {PARTIAL}, as restores that are not whole have: name another one"
    )]
    ReservedName {
        /// The path as it was asked for.
        path: String,
    },
    /// It is neither a file nor a block device.
    #[error(
        "{path} is neither a regular file nor a block device: name one, such as /var/lib/volumes/a.img or /dev/vg/volume"
    )]
    NotAVolume {
        /// The path as it was asked for.
        path: String,
    },
    /// There is nothing in it.
    #[error("{path} is empty: there is nothing to back up")]
    Empty {
        /// The path as it was asked for.
        path: String,
    },
    /// The backup does not fit.
    #[error(
        "{path} has {target_bytes} bytes and is smaller than the backup, which has {backup_bytes}: give a target of at \
         least that size, or one that does not exist yet"
    )]
    TooSmall {
        /// The path as it was asked for.
        path: String,
        /// The target's size.
        target_bytes: u64,
        /// The backed up volume's size.
        backup_bytes: u64,
    },
    /// A block device that is mounted, or a target that another restore writes to.
    #[error("{path} is in use: it is mounted, or another restore writes to it; end that first")]
    InUse {
        /// The path as it was asked for.
        path: String,
    },
    /// An image that another client writes to, or did until just now: the cluster forgets one that died half a minute
    /// later.
    #[cfg(feature = "ceph")]
    #[error("{path} is in use: another client has it open to write; detach it first")]
    ImageInUse {
        /// The pool and the image.
        path: String,
    },
    /// It would be restored over, or beside, backups that are images.
    #[cfg(feature = "ceph")]
    #[error(
        "{path} has the name of an image that backups are in, `volume-<volume>.backup.…`: name another one"
    )]
    BackupImage {
        /// The target as it was asked for.
        path: String,
    },
    /// A snapshot, or the image, is gone or replaced that was read until now.
    #[cfg(feature = "ceph")]
    #[error("{path} was removed while it was read, so that what was read is not certain")]
    RemovedMeanwhile {
        /// What was read.
        path: String,
    },
    /// A Ceph cluster said no.
    #[cfg(feature = "ceph")]
    #[error(transparent)]
    Ceph(#[from] crate::ceph::Error),
    /// The operating system said no.
    #[error("{action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path as it was asked for.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// What it means for the job.
    pub fn class(&self) -> Class {
        match self {
            Self::Io { source, .. } => class(source),
            #[cfg(feature = "ceph")]
            Self::Ceph(error) => class_of(error.kind()),
            #[cfg(feature = "ceph")]
            Self::ImageInUse { .. } | Self::RemovedMeanwhile { .. } => Class::Transient,
            // Whoever has it may be the same job, on a worker that the broker took for dead.
            Self::InUse { .. } => Class::Transient,
            _ => Class::Permanent,
        }
    }
}

/// What an error of a volume's reads and writes means for the job.
pub fn class(error: &io::Error) -> Class {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        // Handles come back when other jobs end.
        Some(Errno::MFILE | Errno::NFILE) => Class::Transient,
        _ => class_of(error.kind()),
    }
}

/// The same by the kind of the error.
pub fn class_of(kind: io::ErrorKind) -> Class {
    use io::ErrorKind as Kind;
    match kind {
        Kind::Interrupted
        | Kind::TimedOut
        | Kind::StaleNetworkFileHandle
        | Kind::ResourceBusy
        | Kind::ConnectionAborted
        | Kind::NotConnected => Class::Transient,
        _ => Class::Permanent,
    }
}
