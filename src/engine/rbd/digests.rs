//! The digests of the blocks that an RBD backup has copied, in an object of our own.
//!
//! Cinder has none. The object begins with a line of text; then come runs of blocks that lie next to each other: the
//! number of the first block (8 bytes), their count (4 bytes), and a SHA-256 for each. It ends with a run of no blocks,
//! whose first number is the count of all digests. Numbers are little-endian. A block that is not listed is zeros in
//! a full backup, and as in the parent in an incremental one.

use std::future::Future;
use std::io::{self, BufReader, Read};
use std::iter::Peekable;
use std::sync::Arc;
use std::vec;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::pieces::BLOCK_BYTES;
use crate::engine::chunked::digest::Digest;
use crate::engine::chunked::stored::HashedReader;
use crate::engine::cpu::Lost;
use crate::engine::error::Error;
use crate::job::{BackupId, Record};
use crate::store::{Folder, ObjectName, ObjectStore, ObjectWriter, Pieces, Reason};

/// What is gathered before it is written.
const BUFFER_BYTES: usize = 1 << 20;
/// Digests that are handed over at once.
const BATCH_DIGESTS: usize = 4096;
/// Batches that are read ahead.
const BATCHES_AHEAD_MAX: usize = 4;
/// The first line.
const HEAD: &[u8] = b"backhaul rbd digests 1 sha256 65536\n";

/// The digest of one block, by its number.
pub type Numbered = (u64, Digest);

/// Where the digests of all backups lie.
pub fn folder() -> Folder {
    Folder::own("digests")
}

/// What the names of all lists of a backup begin with. There is more than one when it was made in more than one go.
pub fn prefix(id: BackupId) -> String {
    format!("{id}.")
}

/// Writes the digests of a backup, in the order of the blocks.
pub struct DigestWriter {
    object: ObjectName,
    writer: Box<dyn ObjectWriter>,
    buffer: Vec<u8>,
    sha256: Sha256,
    count: u64,
}

impl DigestWriter {
    /// Begins another list of a backup, behind those that its record names. No other attempt has one of that name.
    pub async fn create(store: &dyn ObjectStore, record: &Record) -> Result<Self, Error> {
        let (prefix, number) = (prefix(record.backup_id), record.object_digests.len());
        let object = folder().object(&format!("{prefix}{number}.{}", record.writer))?;
        let writer = store.create(&object).await?;
        Ok(Self { object, writer, buffer: HEAD.to_vec(), sha256: Sha256::new(), count: 0 })
    }

    /// Adds the digests of blocks that lie next to each other.
    pub async fn append(&mut self, first: u64, digests: &[Digest]) -> Result<(), Error> {
        let Ok(count) = u32::try_from(digests.len()) else { return Err(Error::Lost(Lost)) };
        if count == 0 {
            return Ok(());
        }
        self.count += u64::from(count);
        self.run(first, count, digests);
        if self.buffer.len() >= BUFFER_BYTES {
            self.write().await?;
        }
        Ok(())
    }

    fn run(&mut self, first: u64, count: u32, digests: &[Digest]) {
        self.buffer.extend(first.to_le_bytes());
        self.buffer.extend(count.to_le_bytes());
        self.buffer.extend(digests.as_flattened());
    }

    async fn write(&mut self) -> Result<(), Error> {
        let bytes = Bytes::from(std::mem::take(&mut self.buffer));
        self.sha256.update(&bytes);
        Ok(self.writer.write(bytes).await?)
    }

    /// Ends the object; returns its name and its digest, as records keep them.
    pub async fn finish(mut self) -> Result<(String, String), Error> {
        self.run(self.count, 0, &[]);
        self.write().await?;
        self.writer.finish().await?;
        Ok((self.object.name, hex::encode(self.sha256.finalize())))
    }
}

/// The digests of all blocks of a chain, in order, of each the newest.
pub struct DigestReader {
    batches: mpsc::Receiver<Vec<Numbered>>,
    reader: Option<JoinHandle<Result<(), Error>>>,
    /// Open the lists. They end with the reader.
    _openers: JoinSet<()>,
    ahead: Vec<Numbered>,
    /// Whether the digests of all blocks are known that are not zero.
    pub complete: bool,
}

impl DigestReader {
    /// Begins to read the digests of a chain, the newest backup first. A backup that Cinder made has none.
    pub fn open(store: &Arc<dyn ObjectStore>, chain: &[Record]) -> Self {
        // A backup without digests may hide any block of those that it builds on.
        let known = chain.iter().take_while(|record| !record.object_digests.is_empty());
        let (mut layers, mut openers) = (Vec::new(), JoinSet::new());
        for record in known {
            let (layer, opener) = Layer::new(store, record.backup_id, &record.object_digests);
            openers.spawn(opener);
            layers.push(layer);
        }
        let complete = layers.len() == chain.len();
        let (sender, batches) = mpsc::channel(BATCHES_AHEAD_MAX);
        let reader = tokio::task::spawn_blocking(move || merge(layers, &sender));
        Self { batches, reader: Some(reader), _openers: openers, ahead: Vec::new(), complete }
    }

    /// The next digests of blocks below `end`, of which there may be more.
    pub async fn take_below(&mut self, end: u64) -> Result<Vec<Numbered>, Error> {
        if self.ahead.is_empty() {
            match self.batches.recv().await {
                Some(batch) => self.ahead = batch,
                None => {
                    if let Some(reader) = self.reader.take() {
                        reader.await.map_err(|_| Lost)??;
                    }
                }
            }
        }
        let count = self.ahead.partition_point(|(block, _)| *block < end);
        Ok(self.ahead.drain(..count).collect())
    }
}

fn merge(layers: Vec<Layer>, sender: &mpsc::Sender<Vec<Numbered>>) -> Result<(), Error> {
    let mut layers: Vec<Peekable<Layer>> = layers.into_iter().map(Iterator::peekable).collect();
    let mut batch = Vec::with_capacity(BATCH_DIGESTS);
    loop {
        // The newest layer that has the lowest block comes first, and hides the others.
        let mut next: Option<(u64, usize)> = None;
        for (index, layer) in layers.iter_mut().enumerate() {
            match layer.peek() {
                Some(Ok((block, _))) if next.is_none_or(|(lowest, _)| *block < lowest) => {
                    next = Some((*block, index))
                }
                Some(Err(_)) => return layer.next().map_or(Ok(()), |error| error.map(drop)),
                _ => {}
            }
        }
        let Some((block, newest)) = next else { break };
        for (index, layer) in layers.iter_mut().enumerate() {
            if let Some(Ok(numbered)) =
                layer.next_if(|numbered| matches!(numbered, Ok((b, _)) if *b == block))
                && index == newest
            {
                batch.push(numbered);
            }
        }
        if batch.len() == BATCH_DIGESTS
            && sender.blocking_send(std::mem::replace(&mut batch, Vec::with_capacity(BATCH_DIGESTS))).is_err()
        {
            // Nobody wants them any more.
            return Ok(());
        }
    }
    if !batch.is_empty() {
        sender.blocking_send(batch).ok();
    }
    Ok(())
}

/// A list whose bytes can be read, or why they cannot.
type Opened = Result<(ObjectName, Pieces), Error>;

/// The digests of one backup. A large one has a list for each checkpoint: no more than the one that is read and the next one
/// are open at a time, so that memory does not grow with the volume.
struct Layer {
    /// Of each list that is not read yet.
    sha256s: vec::IntoIter<String>,
    opened: mpsc::Receiver<Opened>,
    open: Option<List>,
    ended: bool,
}

impl Layer {
    /// Makes one, and what opens its lists while it is read.
    fn new(
        store: &Arc<dyn ObjectStore>,
        backup_id: BackupId,
        lists: &[(String, String)],
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (names, sha256s): (Vec<String>, Vec<String>) = lists.iter().cloned().unzip();
        let (sender, opened) = mpsc::channel(1);
        let store = store.clone();
        let opener = async move {
            for name in names {
                // Nobody may want them any more.
                let Ok(place) = sender.reserve().await else { return };
                place.send(open(&*store, backup_id, &name).await);
            }
        };
        (Self { sha256s: sha256s.into_iter(), opened, open: None, ended: false }, opener)
    }

    fn read(&mut self) -> Result<Option<Numbered>, Error> {
        loop {
            if let Some(numbered) = self.open.as_mut().map_or(Ok(None), List::read)? {
                return Ok(Some(numbered));
            }
            let end = self.open.take().map_or(0, |list| list.end);
            let Some(sha256) = self.sha256s.next() else { return Ok(None) };
            let (object, pieces) = self.opened.blocking_recv().unwrap_or(Err(Lost.into()))?;
            self.open = Some(List::new(object, HashedReader::new(pieces), sha256, end));
        }
    }
}

async fn open(store: &dyn ObjectStore, backup_id: BackupId, name: &str) -> Opened {
    let object = folder().object(name)?;
    match store.get(&object).await {
        Err(error) if matches!(error.reason(), Reason::Missing) => {
            Err(Error::MissingObject { object: object.to_string(), backup_id })
        }
        pieces => Ok((object, pieces?)),
    }
}

impl Iterator for Layer {
    type Item = Result<Numbered, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.read().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

/// One list of digests.
struct List {
    object: ObjectName,
    stored: BufReader<HashedReader>,
    sha256: String,
    begun: bool,
    /// The next block of the current run, and how many more it has.
    run: (u64, u32),
    count: u64,
    /// Behind the last block so far; blocks come in order from one list to the next.
    end: u64,
}

impl List {
    fn new(object: ObjectName, stored: HashedReader, sha256: String, end: u64) -> Self {
        let stored = BufReader::with_capacity(BUFFER_BYTES / 8, stored);
        Self { object, stored, sha256, begun: false, run: (0, 0), count: 0, end }
    }

    fn damaged(&self, why: impl ToString) -> Error {
        Error::Damaged { object: self.object.to_string(), why: why.to_string() }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        match self.stored.read_exact(&mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// What a read that failed means: the store may have failed, which is no damage.
    fn failed(&mut self, error: io::Error) -> Error {
        match self.stored.get_mut().take_error() {
            Some(error) => error.into(),
            None if error.kind() == io::ErrorKind::UnexpectedEof => self.damaged("it is cut short"),
            None => self.damaged(error),
        }
    }

    fn read(&mut self) -> Result<Option<Numbered>, Error> {
        if !self.begun {
            self.begun = true;
            if self.bytes::<{ HEAD.len() }>()? != HEAD {
                return Err(
                    self.damaged("it is no list of digests, or of a version that this one does not know")
                );
            }
        }
        if self.run.1 == 0 {
            let first = u64::from_le_bytes(self.bytes()?);
            let count = u32::from_le_bytes(self.bytes()?);
            if count == 0 {
                return self.finish(first).map(|()| None);
            }
            if first < self.end || first.checked_add(count.into()).is_none() {
                return Err(self.damaged("its blocks are not in order"));
            }
            self.run = (first, count);
        }
        let digest = self.bytes()?;
        let block = self.run.0;
        self.run = (block + 1, self.run.1 - 1);
        self.end = block + 1;
        self.count += 1;
        Ok(Some((block, digest)))
    }

    fn finish(&mut self, count: u64) -> Result<(), Error> {
        if count != self.count {
            return Err(self.damaged(format!("it has {} digests and says {count}", self.count)));
        }
        // Nothing may follow.
        if io::copy(&mut self.stored, &mut io::sink()).map_err(|error| self.failed(error))? != 0 {
            return Err(self.damaged("something follows its end"));
        }
        if hex::encode(self.stored.get_ref().sha256()) != self.sha256 {
            return Err(self.damaged("its SHA-256 is not the one in the record"));
        }
        Ok(())
    }
}

/// Reads the digests of a backup to their end, and checks them against the record. What they say is believed only
/// after this, so that a damaged list is named, and not the blocks that it is wrong about.
pub async fn check(store: &Arc<dyn ObjectStore>, record: &Record) -> Result<(), Error> {
    let mut reader = DigestReader::open(store, std::slice::from_ref(record));
    while !reader.take_below(u64::MAX).await?.is_empty() {}
    Ok(())
}

/// The number of the block at a byte of the volume.
pub fn block(offset: u64) -> u64 {
    offset / BLOCK_BYTES
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::store::Memory;

    /// Writes the digests of some blocks, and gives what a record says of the list.
    async fn write(store: &Arc<dyn ObjectStore>, name: &str, blocks: Range<u64>) -> (String, String) {
        let object = folder().object(name).unwrap();
        let writer = store.create(&object).await.unwrap();
        let mut list =
            DigestWriter { object, writer, buffer: HEAD.to_vec(), sha256: Sha256::new(), count: 0 };
        for block in blocks {
            list.append(block, &[[7; 32]]).await.unwrap();
        }
        list.finish().await.unwrap()
    }

    fn layer(store: &Arc<dyn ObjectStore>, lists: &[(String, String)]) -> Layer {
        let (layer, opener) = Layer::new(store, BackupId::random(), lists);
        tokio::spawn(opener);
        layer
    }

    /// Reads up to `count` blocks, where it may block.
    async fn read(mut layer: Layer, count: usize) -> (Vec<Result<u64, Error>>, Layer) {
        let read = move || {
            let blocks = layer.by_ref().take(count).map(|next| next.map(|(block, _)| block)).collect();
            (blocks, layer)
        };
        tokio::task::spawn_blocking(read).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_the_lists_of_a_backup_only_two_are_open_at_a_time() {
        let store: Arc<dyn ObjectStore> = Arc::new(Memory::default());
        let mut lists = Vec::new();
        for number in 0..4 {
            lists.push(write(&store, &format!("{number}"), 2 * number..2 * number + 2).await);
        }
        let (blocks, layer) = read(layer(&store, &lists), 3).await;
        let blocks: Vec<u64> = blocks.into_iter().map(Result::unwrap).collect();
        assert_eq!(blocks, [0, 1, 2]);

        // The one of the blocks 2 and 3 is read, the next one may be open.
        store.delete(&folder().object(&lists[3].0).unwrap()).await.unwrap();

        let (rest, _) = read(layer, usize::MAX).await;
        let [Ok(3), Ok(4), Ok(5), Err(error)] = &rest[..] else { panic!("{rest:?}") };
        assert!(matches!(error, Error::MissingObject { .. }), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn blocks_that_are_in_two_lists_of_a_backup_are_damage() {
        let store: Arc<dyn ObjectStore> = Arc::new(Memory::default());
        let lists = vec![write(&store, "0", 0..2).await, write(&store, "1", 1..3).await];

        let (blocks, _) = read(layer(&store, &lists), usize::MAX).await;

        let [Ok(0), Ok(1), Err(error)] = &blocks[..] else { panic!("{blocks:?}") };
        assert!(error.to_string().contains("not in order"), "{error}");
    }
}
