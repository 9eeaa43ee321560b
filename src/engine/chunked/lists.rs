//! Reads the lists of a backup as streams, each on a thread that may block: its objects from the metadata and our
//! checksums, and its block digests.

use std::collections::VecDeque;
use std::io::{self, BufReader};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::digest::Digest;
use super::layers::LayerEntry;
use super::metadata::{Head, ObjectEntry};
use super::stored::HashedReader;
use super::{
    Chunked, Error, Lost, Names, blocking, check_version, checksums, damaged, metadata, sha256_file,
};
use crate::job::Record;
use crate::store::{ObjectName, Pieces};

/// Lines are read out of a buffer of this size.
const BUFFER_BYTES: usize = 128 << 10;
/// Batches of digests that are read ahead.
const BATCHES_AHEAD_MAX: usize = 4;
/// Blocks are never larger; a damaged size must not fill the memory.
const BLOCK_BYTES_MAX: u64 = 64 << 20;

/// The metadata object and the checksums of a backup, opened.
pub struct ObjectLists {
    names: Names,
    record: Record,
    metadata: Pieces,
    checksums: Option<Pieces>,
}

impl Chunked {
    /// Opens the lists of the backup's objects.
    pub async fn object_lists(&self, record: &Record) -> Result<ObjectLists, Error> {
        let names = Names::of(record)?;
        let metadata = self.get(record, &names.metadata).await?;
        // A backup that Cinder wrote has none.
        let checksums = match stored_digest(record, &names.checksums) {
            Some(_) => Some(self.get(record, &names.checksums).await?),
            None => None,
        };
        Ok(ObjectLists { names, record: record.clone(), metadata, checksums })
    }

    /// Checks that the lists of the backup are, to the byte, those that the record was made with. What they say is
    /// believed only after this, so that what is damaged is named, and not what it would have said something about.
    pub async fn check_lists(&self, record: &Record) -> Result<(), Error> {
        let Names { metadata, sha256_file, checksums, .. } = Names::of(record)?;
        for object in [metadata, sha256_file, checksums] {
            if stored_digest(record, &object).is_some() {
                self.check_list(record, &object).await?;
            }
        }
        Ok(())
    }

    /// Reads a list to its end, and checks it against the record, where that has its digest. Returns the digest.
    pub async fn check_list(&self, record: &Record, object: &ObjectName) -> Result<Digest, Error> {
        let pieces = self.get(record, object).await?;
        let (object, record) = (object.clone(), record.clone());
        blocking(move || {
            let mut stored = HashedReader::new(pieces);
            if let Err(error) = io::copy(&mut stored, &mut io::sink()) {
                return Err(stored.take_error().map_or_else(|| damaged(&object, error), Error::from));
            }
            check_digest(&record, &object, &stored)?;
            Ok(stored.sha256())
        })
        .await?
    }

    /// Opens the list of the backup's block digests.
    pub async fn digest_list(&self, record: &Record) -> Result<DigestList, Error> {
        let names = Names::of(record)?;
        let pieces = self.get(record, &names.sha256_file).await?;
        let (sender, batches) = mpsc::channel(BATCHES_AHEAD_MAX);
        let (object, record) = (names.sha256_file.clone(), record.clone());
        let reader = tokio::task::spawn_blocking(move || {
            let mut stored = HashedReader::new(pieces);
            let head = sha256_file::read(&mut stored, |block_bytes, digests| {
                sender.blocking_send((block_bytes, digests)).map_err(|_| "nobody wants the digests any more")
            });
            let head = head.map_err(|error| unreadable(&object, &mut stored, error))?;
            check_digest(&record, &object, &stored)?;
            check_version(&object, &head.version)?;
            check_backup(&record, &object, &head.backup_id)
        });
        let (object, reader) = (names.sha256_file, Some(reader));
        Ok(DigestList { object, batches, reader, block_bytes: None, ahead: VecDeque::new() })
    }
}

impl ObjectLists {
    /// Reads them to their ends, hands over the objects in order, and returns what else the metadata says. Blocks.
    pub fn read(self, mut take: impl FnMut(LayerEntry) -> Result<(), Error>) -> Result<Head, Error> {
        let Self { names, record, metadata, checksums } = self;
        let mut checksums =
            checksums.map(|pieces| BufReader::with_capacity(BUFFER_BYTES, HashedReader::new(pieces)));
        let mut stored = HashedReader::new(metadata);
        let mut failed = None;
        let head = metadata::read(&mut stored, names.prefix(), |entry| {
            let taken = next_checksum(checksums.as_mut(), &names.checksums, &entry)
                .and_then(|checksum| take(LayerEntry { entry, checksum }));
            taken.map_err(|error| {
                failed = Some(error);
                "stopped"
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let head = head.map_err(|error| unreadable(&names.metadata, &mut stored, error))?;
        check_digest(&record, &names.metadata, &stored)?;
        check_version(&names.metadata, &head.version)?;
        check_backup(&record, &names.metadata, &head.backup_id)?;
        if let Some(mut checksums) = checksums {
            if read_checksum(&mut checksums, &names.checksums)?.is_some() {
                return Err(damaged(&names.checksums, "it lists more objects than the metadata"));
            }
            check_digest(&record, &names.checksums, checksums.get_ref())?;
        }
        Ok(head)
    }
}

type Checksums = BufReader<HashedReader>;

fn read_checksum(
    checksums: &mut Checksums,
    object: &ObjectName,
) -> Result<Option<(u64, super::stored::Checksum)>, Error> {
    checksums::read(checksums).map_err(|error| match checksums.get_mut().take_error() {
        Some(error) => error.into(),
        None => damaged(object, error),
    })
}

fn next_checksum(
    checksums: Option<&mut Checksums>,
    object: &ObjectName,
    entry: &ObjectEntry,
) -> Result<Option<super::stored::Checksum>, Error> {
    let Some(checksums) = checksums else { return Ok(None) };
    match read_checksum(checksums, object)? {
        Some((number, checksum)) if number == entry.number => Ok(Some(checksum)),
        _ => Err(damaged(object, format!("it does not list object {}, as the metadata does", entry.number))),
    }
}

/// What reading a list failed of: the store, or the list.
fn unreadable(object: &ObjectName, stored: &mut HashedReader, error: serde_json::Error) -> Error {
    match stored.take_error() {
        Some(error) => error.into(),
        None => damaged(object, error),
    }
}

fn stored_digest<'a>(record: &'a Record, object: &ObjectName) -> Option<&'a str> {
    let digest = record.object_digests.iter().find(|(name, _)| *name == object.name);
    digest.map(|(_, digest)| digest.as_str())
}

/// Checks a list that was read to its end against the record, where that has its digest.
fn check_digest(record: &Record, object: &ObjectName, stored: &HashedReader) -> Result<(), Error> {
    let Some(expected) = stored_digest(record, object) else { return Ok(()) };
    if hex::encode(stored.sha256()) == expected {
        return Ok(());
    }
    Err(damaged(object, "its SHA-256 is not the one in the record"))
}

fn check_backup(record: &Record, object: &ObjectName, backup_id: &str) -> Result<(), Error> {
    if backup_id == record.backup_id.to_string() {
        return Ok(());
    }
    Err(damaged(object, format!("it is of backup {backup_id}")))
}

/// The block digests of a backup, in order.
pub struct DigestList {
    object: ObjectName,
    batches: mpsc::Receiver<(u64, Vec<Digest>)>,
    reader: Option<JoinHandle<Result<(), Error>>>,
    block_bytes: Option<u64>,
    ahead: VecDeque<Digest>,
}

impl DigestList {
    /// The size of the blocks.
    pub async fn block_bytes(&mut self) -> Result<u64, Error> {
        while self.block_bytes.is_none() && self.read_batch().await? {}
        // A list that ends without a batch was refused when it was read.
        self.block_bytes.ok_or(Error::Lost(Lost))
    }

    /// The next `count` digests; fewer at the end of the list.
    pub async fn take(&mut self, count: usize) -> Result<Vec<Digest>, Error> {
        while self.ahead.len() < count && self.read_batch().await? {}
        Ok(self.ahead.drain(..count.min(self.ahead.len())).collect())
    }

    /// Reads a batch; false at the end of the list, which was whole then.
    async fn read_batch(&mut self) -> Result<bool, Error> {
        let Some((block_bytes, digests)) = self.batches.recv().await else {
            if let Some(reader) = self.reader.take() {
                reader.await.map_err(|_| Lost)??;
            }
            return Ok(false);
        };
        if !(1..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            return Err(damaged(&self.object, format!("its chunk_size cannot be {block_bytes}")));
        }
        self.block_bytes = Some(block_bytes);
        self.ahead.extend(digests);
        Ok(true)
    }
}

/// Ends a reading that has nobody to hand over to.
pub fn nobody_listens<T>(_: T) -> Error {
    Error::Lost(Lost)
}

/// Reads until `buffer` is full or the reader ends, and returns how much that was.
pub fn read_full(reader: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
