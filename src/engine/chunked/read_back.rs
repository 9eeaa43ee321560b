//! Reads a backup back, to restore or to verify it: every object of its chain, each byte of the volume once.
//!
//! All is checked, always: that the objects are those of the metadata, each object's size and CRC-32 in the store
//! (where we wrote it), its length and MD5 unpacked, and each block's SHA-256 against the list of the backup that was
//! asked for, before it is written. Objects that newer ones cover are read as well: the chain is damaged without them.
//! A restore that goes on where an attempt before it stopped does not read again what that one has checked and written.
//! Only a restore takes no MD5 of an object of ours all of whose blocks it checks by their SHA-256: MD5 would take as long
//! as all the rest.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::stream::{self, FuturesUnordered, StreamExt};
use md5::Digest as _;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinError;

use super::compression::Compression;
use super::digest::{BlockDigester, Digest, ListDigest, Md5, is_zero, sha256};
use super::layers::{Broken, Item, LayerEntry, Layers};
use super::lists::{DigestList, nobody_listens, read_full};
use super::restored::Restored;
use super::stored::StoredReader;
use super::{Chunked, Error, Lost, Names, REQUESTS_MAX, blocking, damaged};
use crate::engine::Faults;
use crate::job::{Context, Counts, Record, Sample};
use crate::store::{Listed, ObjectName, Pieces};
use crate::volume::{Before, VolumeTarget};

/// Unpacked bytes that are looked at together; a block where that is larger.
const PIECE_BYTES: usize = 1 << 20;
/// What reading one object may take: pieces read ahead, the unpacker's window, and the piece that it fills, unless its blocks
/// are larger than that one.
const OBJECT_MEMORY_BYTES: usize = 24 << 20;
/// An object that is packed into no more than this may be nothing but zeros, and is looked up among those.
const ZERO_OBJECT_BYTES_MAX: usize = 128 << 10;
/// Different objects of zeros that are remembered.
const ZERO_OBJECTS_MAX: usize = 64;
/// Entries of the metadata that are read ahead.
const ENTRIES_AHEAD_MAX: usize = 256;

impl Chunked {
    /// Reads the backup `chain[0]`, which builds on those behind it, checks all of it, and writes it to the target, which is
    /// not finished by that. Ends with the first fault. Returns the digest over the block digests.
    pub async fn restore(
        &self,
        ctx: &Context,
        chain: &[Record],
        target: Arc<dyn VolumeTarget>,
    ) -> Result<String, Error> {
        self.read_back(ctx, chain, Some(target), None, &mut |error| Err(error)).await
    }

    /// Reads the backup `chain[0]` likewise, or a sample of its objects, and goes on after a fault as far as it can. The
    /// number beside the sample is its seed.
    pub async fn verify(
        &self,
        ctx: &Context,
        chain: &[Record],
        sample: Option<(Sample, u64)>,
        faults: &mut Faults,
    ) -> Result<String, Error> {
        let mut take = |error: Error| faults.take(error);
        self.read_back(ctx, chain, None, sample, &mut take).await
    }

    /// What is wrong goes to `fault`, which says whether that is the end.
    async fn read_back(
        &self,
        ctx: &Context,
        chain: &[Record],
        target: Option<Arc<dyn VolumeTarget>>,
        sample: Option<(Sample, u64)>,
        fault: &mut (dyn FnMut(Error) -> Result<(), Error> + Send),
    ) -> Result<String, Error> {
        let record = &chain[0];
        ctx.progress.begin(record.volume_bytes);
        let names = chain.iter().map(Names::of).collect::<Result<Vec<_>, _>>()?;
        // Before a byte is written: all objects must be there, and the lists be what they were.
        let mut known_bad = HashSet::new();
        for (layer, (record, names)) in chain.iter().zip(&names).enumerate() {
            ctx.check()?;
            self.check_lists(record).await?;
            let wrong = stream::iter(self.check_objects(record, names).await?)
                .map(|wrong| self.unless_late(names, wrong))
                .buffered(REQUESTS_MAX);
            let mut wrong = std::pin::pin!(wrong);
            while let Some(wrong) = wrong.next().await {
                ctx.check()?;
                if let Some((number, error)) = wrong {
                    fault(error)?;
                    known_bad.insert((layer, number));
                }
            }
        }

        let mut list = self.digest_list(record).await?;
        let block_bytes = list.block_bytes().await?;
        let mut window = Window {
            list,
            block_bytes,
            ahead: VecDeque::new(),
            first_block: 0,
            digest: ListDigest::default(),
        };
        let mut layers = Vec::new();
        // That a list is whole was checked above, but not that it can be read a second time.
        let unread = Arc::new(Mutex::new(None));
        for record in chain {
            let (sender, entries) = mpsc::channel(ENTRIES_AHEAD_MAX);
            let (lists, unread) = (self.object_lists(record).await?, unread.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = lists.read(|entry| sender.blocking_send(entry).map_err(nobody_listens)) {
                    // Before the channel ends, which looks like the end of the list.
                    *unread.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            });
            layers.push(entries);
        }
        let broken = |broken| {
            let unread = unread.lock().unwrap_or_else(PoisonError::into_inner).take();
            unread.unwrap_or_else(|| broken_chain(chain, broken))
        };
        let mut layers = Layers::new(layers, record.volume_bytes);
        let reader = Arc::new(ObjectReader {
            digester: BlockDigester::new(block_bytes as usize),
            zero_objects: Mutex::default(),
            target: target.clone(),
            ctx: ctx.clone(),
        });

        let mut restored = target.as_deref().map(|target| Restored::of(ctx, target, chain));
        let restored_before = restored.as_ref().map_or(0, Restored::object_count);
        let mut in_flight = FuturesUnordered::new();
        let mut index = 0;
        let result = async {
            while let Some(item) = layers.next().await.map_err(broken)? {
                ctx.check()?;
                let layer = item.layer;
                let object = names[layer].data(item.object.entry.number)?;
                let expected = window.expected(&item, &object, record.volume_bytes).await?;
                window.forget_before(layers.low_water());
                let number = index;
                index += 1;
                if number < restored_before {
                    continue;
                }
                let taken = sample.is_none_or(|(sample, seed)| sample.takes(seed, number));
                if !taken || known_bad.contains(&(layer, Some(item.object.entry.number))) {
                    ctx.progress.done(item.ranges.iter().map(|range| range.end - range.start).sum());
                    continue;
                }
                // Objects are read side by side, each on a thread of its own that may block.
                if in_flight.len() > self.cpu.threads() {
                    finished(in_flight.next().await, &mut restored).or_else(&mut *fault)?;
                }
                if let (Some(restored), Some(target)) = (&mut restored, &target) {
                    restored.keep(target, self.checkpoint_bytes).await?;
                }
                let beyond_a_piece = (block_bytes as usize).saturating_sub(PIECE_BYTES);
                let memory = self.memory.reserve(OBJECT_MEMORY_BYTES + beyond_a_piece).await;
                let pieces = match self.get(&chain[layer], &object).await {
                    Ok(pieces) => pieces,
                    Err(error) => {
                        fault(error)?;
                        continue;
                    }
                };
                let reader = reader.clone();
                in_flight.push(tokio::task::spawn_blocking(move || {
                    let _memory = memory;
                    reader.read(&object, &item, pieces, &expected).map(|counts| (number, counts))
                }));
            }
            while !in_flight.is_empty() {
                finished(in_flight.next().await, &mut restored).or_else(&mut *fault)?;
            }
            Ok::<_, Error>(())
        }
        .await;
        // After an error, too: nothing may write to the target once the job has ended.
        while in_flight.next().await.is_some() {}
        result?;

        let digest = window.finish(&names[0], record).await?;
        if let Some(restored) = restored {
            let (restored_bytes, volume_bytes) = (restored.bytes(), record.volume_bytes);
            if restored_bytes != volume_bytes {
                return Err(Error::RestoredOthers { restored_bytes, volume_bytes });
            }
        }
        Ok(digest)
    }

    /// Checks, without reading the data, that the lists are whole, and that the store has the objects that they name,
    /// at their sizes, and no others, by its listing. Gives what is wrong.
    async fn check_objects(&self, record: &Record, names: &Names) -> Result<Vec<Wrong>, Error> {
        let mut wrong = Vec::new();
        let other = |object: Listed| {
            if object.name != names.metadata.name && object.name != names.sha256_file.name {
                wrong.push((None, extra_object(record, names, &object.name)));
            }
        };
        let objects = self.data_objects(names, other).await?;
        let lists = self.object_lists(record).await?;
        let (owned_names, backup_id) = (names.clone(), record.backup_id);
        let (listed_wrong, unlisted) = blocking(move || {
            let (mut listed, mut missing) = (vec![false; objects.len()], HashSet::new());
            let mut wrong = Vec::new();
            lists.read(|LayerEntry { entry, checksum }| {
                let object = owned_names.data(entry.number)?;
                let (fault, is_new) = match objects.binary_search_by_key(&entry.number, |there| there.number)
                {
                    Err(_) => {
                        let error = Error::MissingObject { object: object.to_string(), backup_id };
                        (Some(error), missing.insert(entry.number))
                    }
                    Ok(at) => {
                        let bytes = objects[at].bytes;
                        let fault = checksum.filter(|checksum| checksum.bytes != bytes).map(|checksum| {
                            let why =
                                format!("it has {bytes} bytes now, and was written with {}", checksum.bytes);
                            damaged(&object, why)
                        });
                        (fault, !std::mem::replace(&mut listed[at], true))
                    }
                };
                wrong.extend(fault.map(|error| (Some(entry.number), error)));
                if !is_new {
                    return Err(damaged(&owned_names.metadata, format!("it lists {object} twice")));
                }
                Ok(())
            })?;
            let unlisted = objects.iter().zip(listed).find(|(_, is_listed)| !is_listed);
            Ok::<_, Error>((wrong, unlisted.map(|(object, _)| object.number)))
        })
        .await??;
        wrong.extend(listed_wrong);
        if let Some(number) = unlisted {
            wrong.push((None, extra_object(record, names, &names.data(number)?.name)));
        }
        Ok(wrong)
    }

    /// Asks for an object itself that the listing does not have, which may be late: nothing is wrong if it is there.
    async fn unless_late(&self, names: &Names, (number, error): Wrong) -> Option<Wrong> {
        let (Error::MissingObject { .. }, Some(missing)) = (&error, number) else {
            return Some((number, error));
        };
        let found = async { self.has(&names.data(missing)?).await };
        match found.await {
            Ok(true) => None,
            Ok(false) => Some((number, error)),
            Err(unknown) => Some((number, unknown)),
        }
    }
}

fn extra_object(record: &Record, names: &Names, name: &str) -> Error {
    let object = format!("{}/{name}", names.folder.as_str());
    Error::ExtraObject { object, backup_id: record.backup_id }
}

fn broken_chain(chain: &[Record], broken: Broken) -> Error {
    let layer = match &broken {
        Broken::Overlap { layer, .. } | Broken::BeyondTheEnd { layer, .. } => *layer,
        Broken::Gap { .. } => 0,
    };
    Error::BrokenChain { backup_id: chain[layer].backup_id, source: broken }
}

/// What is wrong with a backup, with the number of the object if the lists have it.
type Wrong = (Option<u64>, Error);

/// The number of an object that was read, and what was counted of it.
type ObjectRead = (u64, Counts);

/// How a thread that read an object ended.
fn finished(
    ended: Option<Result<Result<ObjectRead, Error>, JoinError>>,
    restored: &mut Option<Restored>,
) -> Result<(), Error> {
    let Some(ended) = ended else { return Ok(()) };
    let (number, counts) = ended.map_err(|_| Error::Lost(Lost))??;
    if let Some(restored) = restored {
        restored.add(number, counts);
    }
    Ok(())
}

/// The digests between the oldest object that is still to come and the newest one.
struct Window {
    list: DigestList,
    block_bytes: u64,
    ahead: VecDeque<Digest>,
    first_block: u64,
    digest: ListDigest,
}

/// The digests of the blocks from the first range of an item on.
struct Expected {
    first_block: u64,
    digests: Vec<Digest>,
}

impl Window {
    async fn expected(
        &mut self,
        item: &Item,
        object: &ObjectName,
        volume_bytes: u64,
    ) -> Result<Expected, Error> {
        let (Some(first), Some(last)) = (item.ranges.first(), item.ranges.last()) else {
            return Ok(Expected { first_block: 0, digests: Vec::new() });
        };
        let aligned = |offset: u64| offset.is_multiple_of(self.block_bytes) || offset == volume_bytes;
        let ends = item.ranges.iter().flat_map(|range| [range.start, range.end]);
        if !ends.chain([item.object.entry.offset]).all(aligned) {
            let why = format!(
                "the metadata has it, or one above it, begin or end within a block of {}",
                self.block_bytes
            );
            return Err(damaged(object, why));
        }
        let (first, end) = (first.start / self.block_bytes, last.end.div_ceil(self.block_bytes));
        let known = self.first_block + self.ahead.len() as u64;
        if end > known {
            let more = self.list.take((end - known) as usize).await?;
            self.digest.update(&more);
            if (more.len() as u64) < end - known {
                return Err(damaged(object, "the sha256 file has no digests for its last blocks"));
            }
            self.ahead.extend(more);
        }
        let range = (first - self.first_block) as usize..(end - self.first_block) as usize;
        Ok(Expected { first_block: first, digests: self.ahead.range(range).copied().collect() })
    }

    fn forget_before(&mut self, offset: u64) {
        let blocks = (offset / self.block_bytes).saturating_sub(self.first_block);
        let blocks = blocks.min(self.ahead.len() as u64);
        self.ahead.drain(..blocks as usize);
        self.first_block += blocks;
    }

    /// Checks that the list has ended, and that it is the one that the record was made with.
    async fn finish(mut self, names: &Names, record: &Record) -> Result<String, Error> {
        if !self.list.take(1).await?.is_empty() {
            return Err(damaged(&names.sha256_file, "it has more digests than the volume has blocks"));
        }
        let digest = self.digest.finish();
        if record.digest.as_ref().is_some_and(|stored| *stored != digest) {
            return Err(damaged(
                &names.sha256_file,
                "its digests are not those that the record was made with",
            ));
        }
        Ok(digest)
    }
}

/// Reads objects and writes what they hold.
struct ObjectReader {
    digester: BlockDigester,
    /// Objects that were found to be nothing but zeros, by what they are in the store, with their MD5.
    zero_objects: Mutex<HashMap<(Compression, u64, Digest), Md5>>,
    target: Option<Arc<dyn VolumeTarget>>,
    ctx: Context,
}

/// Why an object could not be unpacked.
enum Fault {
    /// The object, or the store, failed.
    Read(io::Error),
    /// Anything that is known already.
    Known(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Known(error)
    }
}

impl ObjectReader {
    /// Reads one object, checks it, and writes the ranges that are wanted of it. Gives what was counted of it. Blocks.
    fn read(
        &self,
        object: &ObjectName,
        item: &Item,
        pieces: Pieces,
        expected: &Expected,
    ) -> Result<Counts, Error> {
        let entry = &item.object.entry;
        let mut stored = StoredReader::new(pieces);
        let mut counts = Counts::default();
        let md5 = match self.unpack(object, item, &mut stored, expected, &mut counts) {
            Ok(md5) => md5,
            Err(Fault::Known(error)) => return Err(error),
            Err(Fault::Read(error)) => {
                return Err(match stored.take_error() {
                    Some(error) => error.into(),
                    None => {
                        damaged(object, format!("it cannot be unpacked as {}: {error}", entry.compression))
                    }
                });
            }
        };
        if let Err(error) = stored.drain() {
            return Err(stored.take_error().map_or_else(|| damaged(object, error), Error::from));
        }
        if item.object.checksum.is_some_and(|checksum| checksum != stored.checksum()) {
            return Err(damaged(object, "its bytes in the store are not those that were written"));
        }
        if md5.is_some_and(|md5| md5 != entry.md5) {
            return Err(damaged(object, "its MD5 is not the one in the metadata"));
        }
        let bytes_stored = stored.checksum().bytes;
        self.count(&Counts { bytes_stored, object_count: 1, ..Counts::default() }, &mut counts);
        Ok(counts)
    }

    /// Unpacks the object and returns the MD5 of what it holds, if that is to be checked.
    fn unpack(
        &self,
        object: &ObjectName,
        item: &Item,
        stored: &mut StoredReader,
        expected: &Expected,
        counts: &mut Counts,
    ) -> Result<Option<Md5>, Fault> {
        let (entry, runtime) = (&item.object.entry, Handle::current());
        let mut head = Vec::new();
        stored.by_ref().take(ZERO_OBJECT_BYTES_MAX as u64 + 1).read_to_end(&mut head).map_err(Fault::Read)?;
        let key =
            (head.len() <= ZERO_OBJECT_BYTES_MAX).then(|| (entry.compression, entry.length, sha256(&head)));
        if let Some(md5) = key.and_then(|key| self.zero_objects().get(&key).copied()) {
            self.place_zeros(object, item, expected, counts)?;
            return Ok(Some(md5));
        }

        let mut unpacked = entry.compression.decompress(head.chain(stored)).map_err(Fault::Read)?;
        let block_bytes = self.digester.block_bytes();
        let mut piece = vec![0; (PIECE_BYTES / block_bytes).max(1) * block_bytes];
        let whole = item.ranges.iter().map(|range| range.end - range.start).sum::<u64>() == entry.length;
        let is_proven = self.target.is_some() && item.object.checksum.is_some() && whole;
        let mut md5 = (!is_proven || key.is_some()).then(md5::Md5::new);
        let (mut offset, mut all_zero) = (entry.offset, true);
        while offset < entry.end() {
            let length = (entry.end() - offset).min(piece.len() as u64) as usize;
            runtime.block_on(self.ctx.pace(length as u64)).map_err(Error::from)?;
            let piece = &mut piece[..length];
            if read_full(&mut unpacked, piece).map_err(Fault::Read)? < length {
                let why =
                    format!("it unpacks to fewer bytes than the {} that the metadata says", entry.length);
                return Err(damaged(object, why).into());
            }
            if let Some(md5) = &mut md5 {
                md5.update(&*piece);
            }
            all_zero = all_zero && is_zero(piece);
            self.place(object, item, piece, offset, expected, counts)?;
            offset += length as u64;
        }
        if unpacked.read(&mut [0]).map_err(Fault::Read)? != 0 {
            let why = format!("it unpacks to more bytes than the {} that the metadata says", entry.length);
            return Err(damaged(object, why).into());
        }
        let md5 = md5.map(|md5| md5.finalize().into());
        if let (Some(key), Some(md5), true) = (key, md5, all_zero) {
            let mut zero_objects = self.zero_objects();
            if zero_objects.len() < ZERO_OBJECTS_MAX {
                zero_objects.insert(key, md5);
            }
        }
        Ok(md5)
    }

    fn zero_objects(&self) -> std::sync::MutexGuard<'_, HashMap<(Compression, u64, Digest), Md5>> {
        // Nothing panics while it holds the lock.
        self.zero_objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the blocks of `piece` that are wanted, and writes them run by run.
    fn place(
        &self,
        object: &ObjectName,
        item: &Item,
        piece: &[u8],
        offset: u64,
        expected: &Expected,
        counts: &mut Counts,
    ) -> Result<(), Error> {
        let end = offset + piece.len() as u64;
        for range in wanted(&item.ranges, offset..end) {
            let bytes = &piece[(range.start - offset) as usize..(range.end - offset) as usize];
            let mut run = Run { start: range.start, end: range.start, zero: false };
            for block in bytes.chunks(self.digester.block_bytes()) {
                let (digest, zero) = self.digester.digest(block);
                self.check(object, run.end, &digest, expected)?;
                if zero != run.zero {
                    self.write(&run, &piece[(run.start - offset) as usize..], counts)?;
                    run = Run { start: run.end, end: run.end, zero };
                }
                run.end += block.len() as u64;
            }
            self.write(&run, &piece[(run.start - offset) as usize..], counts)?;
        }
        Ok(())
    }

    /// The same for an object that is known to be all zeros.
    fn place_zeros(
        &self,
        object: &ObjectName,
        item: &Item,
        expected: &Expected,
        counts: &mut Counts,
    ) -> Result<(), Error> {
        let block_bytes = self.digester.block_bytes() as u64;
        for range in &item.ranges {
            self.ctx.check()?;
            let mut at = range.start;
            while at < range.end {
                let length = block_bytes.min(range.end - at);
                self.check(object, at, &self.digester.digest_of_zeros(length as usize), expected)?;
                at += length;
            }
            self.write(&Run { start: range.start, end: range.end, zero: true }, &[], counts)?;
        }
        Ok(())
    }

    fn check(&self, object: &ObjectName, at: u64, digest: &Digest, expected: &Expected) -> Result<(), Error> {
        let index = (at / self.digester.block_bytes() as u64 - expected.first_block) as usize;
        if expected.digests.get(index) == Some(digest) {
            return Ok(());
        }
        Err(damaged(
            object,
            format!("the block at byte {at} of the volume is not the one in the sha256 file"),
        ))
    }

    fn write(&self, run: &Run, bytes: &[u8], counted: &mut Counts) -> Result<(), Error> {
        let length = run.end - run.start;
        if length == 0 {
            return Ok(());
        }
        let mut counts = Counts { bytes_read: length, ..Counts::default() };
        if run.zero {
            counts.bytes_zero = length;
        }
        if let Some(target) = &self.target {
            let failed = |source| Error::WriteVolume { offset: run.start, source };
            match (run.zero, target.before()) {
                (true, Before::Zeros) => {}
                (true, Before::Anything) => target.zero(run.start..run.end).map_err(failed)?,
                (false, _) => {
                    target.write_at(&bytes[..length as usize], run.start).map_err(failed)?;
                    counts.bytes_written = length;
                }
            }
        }
        self.count(&counts, counted);
        self.ctx.progress.done(length);
        Ok(())
    }

    /// Counts for all to see, and for the object.
    fn count(&self, counts: &Counts, counted: &mut Counts) {
        self.ctx.progress.add(counts);
        counted.add(counts);
    }
}

/// Blocks next to each other that are all zeros, or all not.
struct Run {
    start: u64,
    end: u64,
    zero: bool,
}

/// The parts of `ranges` that lie in `span`.
fn wanted(ranges: &[Range<u64>], span: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let first = ranges.partition_point(|range| range.end <= span.start);
    let overlapping = ranges[first..].iter().take_while(move |range| range.start < span.end);
    overlapping.map(move |range| range.start.max(span.start)..range.end.min(span.end))
}
