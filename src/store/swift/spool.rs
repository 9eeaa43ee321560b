//! Objects that are written piece by piece: gathered here, since Swift is told the size of an object first, and put whole.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use md5::{Digest, Md5};
use tokio::task::spawn_blocking;

use super::Swift;
use crate::error::Class;
use crate::store::http::Payload;
use crate::store::{Error, ObjectName, ObjectStore, ObjectWriter, Reason, Result};

/// What is kept in memory; more goes to a file.
const MEMORY_BYTES_MAX: usize = 8 << 20;

/// Gathers an object.
pub(super) struct Writer {
    store: Swift,
    object: ObjectName,
    /// All of it, or what is not in the file yet.
    buffer: BytesMut,
    spool: Option<Spool>,
    /// A write that failed leaves unknown what there is, so nothing may follow.
    failed: bool,
}

/// A file without a name, which goes when it is closed.
struct Spool {
    file: File,
    bytes: u64,
    md5: Md5,
}

impl Writer {
    pub(super) fn new(store: Swift, object: ObjectName) -> Self {
        Self { store, object, buffer: BytesMut::new(), spool: None, failed: false }
    }

    /// Moves what is in memory to the file.
    async fn spill(&mut self) -> Result<()> {
        if self.failed {
            return Err(Error::after_failure(&self.object));
        }
        self.failed = true;
        let (spool, piece) = (self.spool.take(), self.buffer.split().freeze());
        let spilled = spawn_blocking(move || {
            let mut spool = match spool {
                Some(spool) => spool,
                None => Spool { file: tempfile::tempfile_in(folder())?, bytes: 0, md5: Md5::new() },
            };
            spool.file.write_all(&piece)?;
            spool.bytes += piece.len() as u64;
            spool.md5.update(&piece);
            Ok::<_, io::Error>(spool)
        });
        let spool = spilled.await.unwrap_or_else(|error| Err(error.into())).map_err(|error| {
            let text = format!(
                "{}, where it is gathered first, cannot be written ({error}): let TMPDIR name a folder with room for it",
                folder().display()
            );
            let told = Arc::new(io::Error::new(error.kind(), text));
            // Others that gather something there will end, and leave room.
            let is_full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
            let passes = is_full || Error::io("write", &self.object, error).class() == Class::Transient;
            let reason = if passes { Reason::Passing(told) } else { Reason::Other(told) };
            Error::new("write", &self.object, reason)
        })?;
        self.store.check_size(&self.object, spool.bytes)?;
        self.spool = Some(spool);
        self.failed = false;
        Ok(())
    }
}

/// Where files are gathered: `TMPDIR`, or else where there is room for large ones.
fn folder() -> PathBuf {
    std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty()).map_or("/var/tmp".into(), Into::into)
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.buffer.extend_from_slice(&bytes);
        if self.buffer.len() > MEMORY_BYTES_MAX || self.failed { self.spill().await } else { Ok(()) }
    }

    async fn finish(mut self: Box<Self>) -> Result<()> {
        if self.spool.is_none() && !self.failed {
            return self.store.put(&self.object, self.buffer.freeze()).await;
        }
        self.spill().await?;
        let Some(Spool { file, bytes, md5 }) = self.spool else { return Ok(()) };
        let md5 = hex::encode(md5.finalize());
        self.store.put_whole(&self.object, Payload::File(Arc::new(file), bytes), &md5, true).await
    }
}
