//! Where backups are kept: named objects in folders, put whole or not at all.
//!
//! A store knows bytes and names. It must not know jobs, volumes, or what the objects mean.

mod gcs;
pub(crate) mod http;
pub(crate) mod logins;
mod memory;
mod name;
mod nfs;
mod posix;
#[cfg(feature = "ceph")]
mod rados;
mod reading;
mod s3;
mod secret;
pub(crate) mod swift;

pub use gcs::{Gcs, GcsSettings};
pub use http::HttpSettings;
pub use memory::Memory;
pub use name::{Folder, InvalidObjectName, ObjectName};
pub use nfs::{Mount, Share};
pub use posix::Posix;
#[cfg(feature = "ceph")]
pub use rados::Rados;
pub use s3::{S3, S3Settings, is_bucket_name};
pub use secret::{Secret, SecretFrom};
pub use swift::{Credentials, Endpoint, Swift, SwiftSettings};

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, TryStreamExt};
use jiff::Timestamp;
use rustix::io::Errno;
use tokio::sync::mpsc;

use crate::error::Class;

/// Bytes that a read hands over at a time, at most.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces that are read ahead of whoever takes them.
const PIECES_AHEAD_MAX: usize = 4;

/// Objects that are deleted at once, where each takes a request.
const DELETES_MAX: usize = 16;

/// Keeps objects.
///
/// Every method may be called again after it failed; what it did in between is done once.
#[async_trait]
pub trait ObjectStore: Send + Sync + std::fmt::Debug {
    /// Writes a new object: when this returns, it is there for good, whole. Fails with [`Reason::Exists`] and
    /// changes nothing when there is one of that name.
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()>;

    /// Writes an object over the one that may be there; readers see the old one or the new one, whole.
    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()>;

    /// Writes an object over one that still has the bytes `was`, and says whether it had. If it has others, or is not there
    /// any more, nothing is changed. Nobody else writes in between; of the stores only Swift cannot promise that.
    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool>;

    /// Begins an object of unknown size. It becomes visible by [`ObjectWriter::finish`]; dropping the writer
    /// instead leaves nothing visible.
    async fn create(&self, object: &ObjectName) -> Result<Box<dyn ObjectWriter>>;

    /// Fails if an object of so many bytes can never be written, for whoever knows that before there is one.
    fn check_size(&self, _object: &ObjectName, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// Reads an object from its beginning. Fails with [`Reason::Missing`] when it is not there.
    async fn get(&self, object: &ObjectName) -> Result<Pieces>;

    /// Makes a new object of the bytes of another one, without their coming here. Says whether it did: if `from` is not there,
    /// or this kind of store cannot, nothing is changed. There must be none of the new name, and nobody else who writes one:
    /// not every kind of store looks.
    async fn copy(&self, _from: &ObjectName, _to: &ObjectName) -> Result<bool> {
        Ok(false)
    }

    /// Hands over the finished objects of `folder` whose names begin with `prefix`, in any order, as the store tells of
    /// them: nobody has to hold the names of millions of objects. A folder that is not there has none. After an error some
    /// have been handed over.
    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()>;

    /// Lists them, by name.
    async fn list(&self, folder: &Folder, prefix: &str) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        self.list_each(folder, prefix, &mut |object| listed.push(object)).await?;
        listed.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(listed)
    }

    /// Deletes the object. Deleting what is not there succeeds, so a repeated delete is harmless.
    /// After `Class::Transient` it is unknown whether the object is gone.
    async fn delete(&self, object: &ObjectName) -> Result<()>;

    /// Deletes many objects of one folder, as [`ObjectStore::delete`] does each. After an error some are gone and others
    /// are not.
    async fn delete_all(&self, objects: &[ObjectName]) -> Result<()> {
        stream::iter(objects.iter().map(Ok))
            .try_for_each_concurrent(DELETES_MAX, |object| self.delete(object))
            .await
    }

    /// Removes what writers that never finished left in `folder` under names that begin with `prefix`, and the
    /// folder itself where it is empty then and the kind of store has folders.
    async fn tidy(&self, folder: &Folder, prefix: &str) -> Result<()>;

    /// Lists what writers that have not finished yet, or never will, have in `folder` under names that begin with
    /// `prefix`, as far as the kind of store can tell.
    async fn partials(&self, _folder: &Folder, _prefix: &str) -> Result<Vec<Partial>> {
        Ok(Vec::new())
    }

    /// Removes what [`ObjectStore::partials`] has listed, if it is still there; its writer fails then, if it lives.
    async fn discard(&self, _partial: &Partial) -> Result<()> {
        Ok(())
    }
}

/// Writes one object, piece by piece.
#[async_trait]
pub trait ObjectWriter: Send {
    /// Appends bytes.
    async fn write(&mut self, bytes: Bytes) -> Result<()>;

    /// Makes the object durable and visible, or fails with [`Reason::Exists`].
    async fn finish(self: Box<Self>) -> Result<()>;
}

/// Who is handed the objects of a listing, one after the other.
pub type TakeListed<'a> = dyn FnMut(Listed) + Send + 'a;

/// One object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name within the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// When it was written, by the store's clock; none where the kind of store does not keep that.
    pub modified: Option<Timestamp>,
}

/// What a writer has written of an object that is not finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partial {
    /// The object that it was to become.
    pub object: ObjectName,
    /// What tells it from others of the same name; the store's own.
    pub id: String,
    /// What is there of it, where the store says that.
    pub bytes: u64,
    /// When it was last written to, or begun, by the store's clock; none where the kind of store does not keep that.
    pub modified: Option<Timestamp>,
}

/// The bytes of an object, in order, read ahead of whoever takes them.
#[derive(Debug)]
pub struct Pieces {
    pieces: mpsc::Receiver<Result<Bytes>>,
}

impl Pieces {
    /// Makes the two ends of a read: the store sends, the reader receives.
    pub fn channel() -> (mpsc::Sender<Result<Bytes>>, Self) {
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD_MAX);
        (sender, Self { pieces })
    }

    /// The next piece; none at the end of the object.
    pub async fn next(&mut self) -> Option<Result<Bytes>> {
        self.pieces.recv().await
    }

    /// The same for a thread that may block. Not to be called on the async executor.
    pub fn next_blocking(&mut self) -> Option<Result<Bytes>> {
        self.pieces.blocking_recv()
    }

    /// Collects the whole object, which must not be larger than `bytes_max`.
    pub async fn collect(mut self, object: &ObjectName, bytes_max: usize) -> Result<Bytes> {
        let mut whole = BytesMut::new();
        while let Some(piece) = self.next().await {
            let piece = piece?;
            if whole.len() + piece.len() > bytes_max {
                return Err(Error::new("read", object, Reason::TooLarge { bytes_max }));
            }
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }
}

/// The result of what a store was asked.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong in a store, with which object.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{action} {object}")]
pub struct Error {
    action: &'static str,
    object: String,
    #[source]
    reason: Reason,
}

/// Why a store could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Reason {
    /// There is no such object.
    #[error("it is not there")]
    Missing,
    /// There is one of that name.
    #[error("there is one of that name already")]
    Exists,
    /// No room is left.
    #[error("the store is full: free some space, then run the job again")]
    Full,
    /// The store does not let us.
    #[error("permission denied: let the user that runs backhaul read and write the store")]
    Denied,
    /// The object is larger than what it can be.
    #[error(
        "it is larger than {bytes_max} bytes, which this kind of object never is: it is damaged or not ours"
    )]
    TooLarge {
        /// The limit.
        bytes_max: usize,
    },
    /// Something that may pass.
    #[error("{0}")]
    Passing(Arc<io::Error>),
    /// Anything else.
    #[error("{0}")]
    Other(Arc<io::Error>),
}

impl Error {
    /// Says what was being done to what.
    pub fn new(action: &'static str, object: impl ToString, reason: Reason) -> Self {
        Self { action, object: object.to_string(), reason }
    }

    /// The same, from what the operating system said.
    pub fn io(action: &'static str, object: impl ToString, error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        let reason = match error.kind() {
            Kind::NotFound => Reason::Missing,
            Kind::AlreadyExists => Reason::Exists,
            Kind::StorageFull | Kind::QuotaExceeded => Reason::Full,
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => Reason::Denied,
            Kind::Interrupted
            | Kind::TimedOut
            | Kind::StaleNetworkFileHandle
            | Kind::ResourceBusy
            | Kind::WouldBlock
            | Kind::ConnectionReset
            | Kind::ConnectionRefused
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable => Reason::Passing(Arc::new(error)),
            _ => match error.raw_os_error().map(Errno::from_raw_os_error) {
                // A disk that fails once may do so no more; a broken one fails the later tries as well. A Ceph cluster
                // that has shut this client out does so for an hour.
                // Handles come back when other jobs end.
                Some(Errno::IO | Errno::SHUTDOWN | Errno::MFILE | Errno::NFILE) => {
                    Reason::Passing(Arc::new(error))
                }
                _ => Reason::Other(Arc::new(error)),
            },
        };
        Self::new(action, object, reason)
    }

    /// That nothing more can be written to an object, since a write that failed leaves unknown what there is of it.
    fn after_failure(object: &ObjectName) -> Self {
        Self::io("write", object, io::Error::other("an earlier write to it failed"))
    }

    /// Why it failed.
    pub fn reason(&self) -> &Reason {
        &self.reason
    }

    /// What it means for the job.
    pub fn class(&self) -> Class {
        match self.reason {
            Reason::Passing(_) => Class::Transient,
            _ => Class::Permanent,
        }
    }
}
