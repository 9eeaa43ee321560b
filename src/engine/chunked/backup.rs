//! Makes a backup: a pipeline from the volume to the store.
//!
//! ```text
//! read ahead ──▶ digest, compare ──▶ number ──▶ compress ──▶ put ──▶ list
//! own thread       CPU threads      in order   CPU threads  async   in order
//! ```
//!
//! What an earlier attempt of the same backup has stored, and is still what the volume has, is neither compressed nor put,
//! but copied by the store (`checkpoints.rs`).
//!
//! Between the stages there is never more than the memory budget allows, and results come out in the volume's order.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use futures_util::future::FutureExt;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc};
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::changes::{Known, Survey, to_read};
use super::checkpoints::{Earlier, Found, Notes, StoredObject};
use super::digest::{BlockDigester, Digest, ListDigest, Md5, md5, sha256};
use super::lists::DigestList;
use super::memory::Reserved;
use super::metadata::{self, ObjectEntry};
use super::stored::Checksum;
use super::{Chunked, Compression, Error, Names, REQUESTS_MAX, Settings, check_size, checksums, sha256_file};
use crate::error::{Causes, Class};
use crate::job::{Context, Counts, RbdImage, Record};
use crate::store::{self, ObjectName, ObjectStore, ObjectWriter, Reason};
use crate::volume::{Read, VolumeSource};

/// Bytes that are read from a volume at once, at most.
const READ_BYTES_MAX: usize = 4 << 20;
/// Bytes that are read side by side, at most, where the volume can do so; a cancelled job stops between two such calls.
const READS_BYTES_MAX: usize = 32 << 20;
/// Reads that are done side by side, at most.
const READS_MAX: usize = 64;
/// Chunks that are read before a stage asks for them; the memory budget may allow fewer.
const CHUNKS_AHEAD_MAX: usize = 2;
/// Text that is gathered before it is written to a list.
const LIST_BUFFER_BYTES: usize = 1 << 20;

/// A backup that is whole but for the object that makes it visible.
pub struct Unfinished {
    engine: Chunked,
    record: Record,
    names: Names,
    /// Whether there are notes of what was stored.
    noted: bool,
    metadata: Box<dyn ObjectWriter>,
}

impl Unfinished {
    /// Removes what is of use only to a backup that is not whole, which is all that earlier attempts have left, and makes
    /// the backup visible.
    pub async fn finish(self) -> Result<(), Error> {
        let Self { engine, record, names, noted, metadata } = self;
        if record.displaced_writer.is_some() {
            engine.remove_earlier_attempts(&record, &Context::default()).await?;
        }
        if noted {
            engine.remove_notes(&names).await?;
        }
        Ok(metadata.finish().await?)
    }
}

impl Chunked {
    /// Copies the volume, or what of it differs from the parent, and completes the record but for its state.
    pub async fn backup(
        &self,
        ctx: &Context,
        record: &mut Record,
        volume_meta: Option<&str>,
        parent: Option<&Record>,
        source: Arc<dyn VolumeSource>,
    ) -> Result<Unfinished, Error> {
        ctx.progress.begin(record.volume_bytes);
        metadata::check_texts(record, volume_meta)?;
        let names = Names::of(record)?;
        // The one object that may be too large for a store, which is to be told before the volume is read.
        let block_count = record.volume_bytes.div_ceil(self.settings.sha_block_bytes as u64);
        let digests_bytes = block_count.saturating_mul(sha256_file::DIGEST_LINE_BYTES as u64);
        self.store.check_size(&names.sha256_file, digests_bytes)?;
        let parent_list = match parent {
            Some(parent) => Some((parent, self.parent_list(parent, record.volume_bytes).await?)),
            None => None,
        };
        let puts = TaskTracker::new();
        let result = self.copy(ctx, record, &names, volume_meta, parent_list, source, &puts).await;
        // A put that is under way when another one fails must not bring its object in after the clean-up.
        puts.close();
        puts.wait().await;
        if let (Err(Error::UnseenChange { .. }), Some(parent)) = (&result, parent) {
            // Damaged digests would differ from the volume as well.
            self.check_lists(parent).await?;
        }
        result
    }

    /// The digests of the parent, if they are of blocks of our size, and of a volume of this size.
    async fn parent_list(&self, parent: &Record, volume_bytes: u64) -> Result<DigestList, Error> {
        check_size(parent, volume_bytes)?;
        let mut list = self.digest_list(parent).await?;
        let block_bytes = self.settings.sha_block_bytes as u64;
        let parent_block_bytes = list.block_bytes().await?;
        if parent_block_bytes == block_bytes {
            return Ok(list);
        }
        Err(Error::BlockSizeChanged { parent_id: parent.backup_id, parent_block_bytes, block_bytes })
    }

    #[allow(clippy::too_many_arguments)] // Each is one end of the pipeline.
    async fn copy(
        &self,
        ctx: &Context,
        record: &mut Record,
        names: &Names,
        volume_meta: Option<&str>,
        parent: Option<(&Record, DigestList)>,
        source: Arc<dyn VolumeSource>,
        puts: &TaskTracker,
    ) -> Result<Unfinished, Error> {
        let digester = Arc::new(BlockDigester::new(self.settings.sha_block_bytes));
        let zeros = Arc::new(ZeroObjects::default());
        let refused = AtomicBool::new(false);
        let in_flight = self.cpu.threads() + REQUESTS_MAX;

        let chunks = self.read_ahead(ctx, source);
        let block_bytes = self.settings.sha_block_bytes;
        let (parent, parent_list) = parent.unzip();
        let chunks = stream::try_unfold((chunks, parent_list), move |(mut chunks, mut parent)| async move {
            let Some(chunk) = chunks.recv().await.transpose()? else {
                // All of the parent's digests are needed to know that the list is whole.
                if let Some(parent) = &mut parent {
                    parent.take(1).await?;
                }
                return Ok(None);
            };
            let before = match &mut parent {
                Some(list) => Some(list.take(chunk.length.div_ceil(block_bytes)).await?),
                None => None,
            };
            Ok::<_, Error>(Some(((chunk, before), (chunks, parent))))
        });
        let digested = chunks
            .map_ok(|(chunk, before)| {
                let (cpu, digester) = (self.cpu.clone(), digester.clone());
                async move {
                    let digested = cpu.run(move || Digested::of(chunk, before, &digester)).await?;
                    digested.map_err(|offset| unseen_change(parent, offset))
                }
                .boxed()
            })
            .try_buffered(in_flight);
        // One chunk after the other: nobody ever waits for the lock.
        let numbers = Mutex::new(Numbers { earlier: self.earlier(record).await?, next: 1 });
        let numbered = digested.map_ok(|digested| self.number(&numbers, digested).boxed()).try_buffered(1);
        let stored = numbered
            .map_ok(|digested| self.store_chunk(names, digested, &zeros, &refused, puts).boxed())
            .try_buffered(in_flight);
        let mut stored = std::pin::pin!(stored);

        let mut sha256_list = List::create(&*self.store, &names.sha256_file).await?;
        let mut checksum_list = List::create(&*self.store, &names.checksums).await?;
        let mut metadata = List::create(&*self.store, &names.metadata).await?;
        sha256_list.append(sha256_file::head(record, self.settings.sha_block_bytes).as_bytes()).await?;
        metadata.append(metadata::head(record).as_bytes()).await?;
        let mut notes = Notes::new(&*self.store, names, self.checkpoint_bytes);
        let mut digest = ListDigest::default();
        let (mut first_digest, mut first_object, mut bytes_done) = (true, true, 0);
        while let Some(chunk) = stored.try_next().await? {
            ctx.check()?;
            digest.update(&chunk.digests);
            sha256_list.append(&sha256_file::digests(&chunk.digests, first_digest)).await?;
            first_digest = false;
            for StoredObject { entry, checksum, .. } in &chunk.objects {
                metadata.append(metadata::object(names.prefix(), entry, first_object).as_bytes()).await?;
                checksum_list.append(checksums::line(entry.number, *checksum).as_bytes()).await?;
                first_object = false;
            }
            notes.add(&chunk.objects).await?;
            ctx.progress.add(&chunk.counts);
            ctx.progress.done(chunk.length as u64);
            bytes_done += chunk.length as u64;
        }
        // Without an error there are fewer only if the thread that reads has panicked.
        if bytes_done != record.volume_bytes {
            return Err(super::Lost.into());
        }
        sha256_list.append(sha256_file::tail(record, !first_digest).as_bytes()).await?;
        metadata.append(metadata::tail(record, volume_meta, !first_object).as_bytes()).await?;

        record.counts = ctx.progress.read().counts;
        record.digest = Some(digest.finish());
        let (checksum_writer, checksum_digest) = checksum_list.close().await?;
        let (sha256_writer, sha256_digest) = sha256_list.close().await?;
        let (metadata, metadata_digest) = metadata.close().await?;
        record.object_digests = vec![
            (names.metadata.name.clone(), metadata_digest),
            (names.sha256_file.name.clone(), sha256_digest),
            (names.checksums.name.clone(), checksum_digest),
        ];
        checksum_writer.finish().await?;
        sha256_writer.finish().await?;
        let (engine, record, names) = (self.clone(), record.clone(), names.clone());
        Ok(Unfinished { engine, record, names, noted: notes.any(), metadata })
    }

    /// Starts a thread that reads the volume chunk by chunk, as far ahead as the memory allows.
    fn read_ahead(
        &self,
        ctx: &Context,
        source: Arc<dyn VolumeSource>,
    ) -> mpsc::Receiver<Result<Chunk, Error>> {
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD_MAX);
        let (engine, ctx, runtime) = (self.clone(), ctx.clone(), Handle::current());
        tokio::task::spawn_blocking(move || {
            let mut offset = 0;
            let mut survey = Survey::new(source.as_ref(), &engine.settings);
            while offset < source.bytes() {
                let length = (source.bytes() - offset).min(engine.settings.object_bytes as u64) as usize;
                let known = survey.known(offset, length);
                let chunk = engine.read_chunk(&ctx, source.as_ref(), offset, length, known, &runtime);
                let failed = chunk.is_err();
                // Without a receiver the backup is over.
                if sender.blocking_send(chunk).is_err() || failed {
                    return;
                }
                offset += length as u64;
            }
        });
        receiver
    }

    fn read_chunk(
        &self,
        ctx: &Context,
        source: &dyn VolumeSource,
        offset: u64,
        length: usize,
        known: Vec<Known>,
        runtime: &Handle,
    ) -> Result<Chunk, Error> {
        ctx.check()?;
        let failed = |at, error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::SourceShrank { offset: at, volume_bytes: source.bytes() },
            _ => Error::ReadVolume { offset: at, source: error },
        };
        let (mut pieces, mut ranges, mut places, mut held) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for wanted in to_read(&known, length, self.settings.sha_block_bytes) {
            let (mut at, end) = (offset + wanted.start as u64, offset + wanted.end as u64);
            let had = ranges.len();
            while let Some(data) = source.next_data(at, end).map_err(|e| failed(at, e))? {
                at = data.end;
                let range = (data.start - offset) as usize..(data.end - offset) as usize;
                places.push(held + range.start - wanted.start);
                ranges.push(range);
            }
            if ranges.len() > had {
                let bytes = wanted.len();
                pieces.push(Piece { range: wanted, at: held });
                held += bytes;
            }
        }
        if pieces.is_empty() {
            return Ok(Chunk { offset, length, known, content: Content::default() });
        }
        // What it is packed into needs as much room again, at most, and must never be waited for while this is held.
        let packed_bytes = if self.settings.compression == Compression::None { 0 } else { held };
        let mut reserved = runtime.block_on(self.memory.reserve(held + packed_bytes));
        let packed = reserved.split(packed_bytes);
        let mut bytes = vec![0; held];
        // What comes at once is to be little where there is to be little in a second.
        let batch_bytes_max = if ctx.pace.is_limited() { READ_BYTES_MAX } else { READS_BYTES_MAX };
        let mut reads = reads(&mut bytes, &ranges, &places, offset).into_iter().peekable();
        while reads.peek().is_some() {
            let mut bytes_left = batch_bytes_max;
            let batch = std::iter::from_fn(|| {
                let read = reads.next_if(|read| read.buffer.len() <= bytes_left)?;
                bytes_left -= read.buffer.len();
                Some(read)
            });
            let batch: Vec<_> = batch.take(READS_MAX).collect();
            runtime.block_on(ctx.pace((batch_bytes_max - bytes_left) as u64))?;
            source.read_all(batch).map_err(|(at, error)| failed(at, error))?;
        }
        Ok(Chunk {
            offset,
            length,
            known,
            content: Content { bytes: reserved.hold(bytes), pieces, ranges, packed: Some(packed) },
        })
    }

    /// Numbers the objects of the next chunk, and looks for what earlier attempts have stored of them.
    async fn number(&self, numbers: &Mutex<Numbers>, mut digested: Digested) -> Result<Digested, Error> {
        let mut numbers = numbers.lock().await;
        for segment in &mut digested.segments {
            segment.number = numbers.next;
            numbers.next += 1;
            if let Some(blocks) = &segment.blocks {
                let offset = digested.chunk.offset + segment.range.start as u64;
                let length = segment.range.len() as u64;
                segment.found = numbers.earlier.find(&*self.store, offset, length, blocks).await?;
            }
        }
        Ok(digested)
    }

    /// Stores the objects of one chunk: takes over those that an earlier attempt has stored, packs and puts the others.
    async fn store_chunk(
        &self,
        names: &Names,
        digested: Digested,
        zeros: &Arc<ZeroObjects>,
        refused: &AtomicBool,
        puts: &TaskTracker,
    ) -> Result<StoredChunk, Error> {
        let Digested { chunk, digests, segments, mut counts } = digested;
        let (length, settings, zeros) = (chunk.length, self.settings, zeros.clone());
        let tried = stream::iter(segments)
            .map(|segment| self.take_over(names, segment, refused, puts).boxed())
            .buffered(REQUESTS_MAX)
            .try_collect::<Vec<_>>()
            .await?;
        let (mut objects, mut segments) = (Vec::with_capacity(tried.len()), Vec::new());
        for tried in tried {
            match tried {
                Tried::TakenOver(object) => objects.push(object),
                Tried::ToStore(segment) => segments.push(segment),
            }
        }
        counts.bytes_reused = objects.iter().map(|object| object.entry.length).sum();
        let packed = if segments.is_empty() {
            Vec::new()
        } else {
            self.cpu.run(move || pack(chunk, segments, &settings, &zeros)).await??
        };
        let put = stream::iter(packed)
            .map(|Packed { entry, blocks, body }| {
                let (name, store, puts) = (names.data(entry.number), self.store.clone(), puts.clone());
                async move {
                    let checksum = Checksum::of(&body);
                    let name = name?;
                    // On a task of its own, so that whoever cleans up after an error can wait for its end.
                    puts.spawn(async move { store.put(&name, body).await })
                        .await
                        .map_err(|_| super::Lost)??;
                    Ok::<_, Error>(StoredObject { entry, checksum, blocks })
                }
            })
            .buffered(REQUESTS_MAX)
            .try_collect::<Vec<_>>()
            .await?;
        objects.extend(put);
        objects.sort_unstable_by_key(|object| object.entry.number);
        counts.object_count = objects.len() as u64;
        counts.bytes_stored = objects.iter().map(|object| object.checksum.bytes).sum();
        Ok(StoredChunk { length, digests, objects, counts })
    }

    /// Has the store copy what an earlier attempt has stored of a segment to a name of this one. Once the store has
    /// `refused`, it is not asked again.
    async fn take_over(
        &self,
        names: &Names,
        mut segment: Segment,
        refused: &AtomicBool,
        puts: &TaskTracker,
    ) -> Result<Tried, Error> {
        let found = segment.found.take().filter(|_| !refused.load(Ordering::Relaxed));
        let Some(Found { name: from, mut object }) = found else { return Ok(Tried::ToStore(segment)) };
        object.entry.number = segment.number;
        let (name, store) = (names.data(segment.number)?, self.store.clone());
        // As for a put.
        let to = name.clone();
        let copied =
            puts.spawn(async move { store.copy(&from, &to).await }).await.map_err(|_| super::Lost)?;
        match copied {
            Ok(true) => Ok(Tried::TakenOver(object)),
            // The answer to an earlier try was lost, and the attempt still lives, and has removed what was copied: nothing else can
            // be put under that name, and the next attempt has others.
            Ok(false) if self.has(&name).await? => {
                let error = Arc::new(io::Error::other("it is there, and what it was copied from is gone"));
                Err(store::Error::new("copy", &name, Reason::Passing(error)).into())
            }
            // The attempt still lives, and has removed it.
            Ok(false) => Ok(Tried::ToStore(segment)),
            // It may have been copied, so that it cannot be put under that name.
            Err(error) if error.class() == Class::Transient => Err(error.into()),
            Err(error) => {
                if !refused.swap(true, Ordering::Relaxed) {
                    warn!(error = %Causes(&error), "what an earlier attempt has stored cannot be copied, and is stored anew");
                }
                Ok(Tried::ToStore(segment))
            }
        }
    }
}

/// Says that nobody can be believed about what has changed since the parent.
fn unseen_change(parent: Option<&Record>, offset: u64) -> Error {
    match parent.and_then(|parent| Some((parent.backup_id, parent.source.clone()?))) {
        Some((parent_id, taken)) => {
            let image = RbdImage { snapshot: None, ..taken.image }.to_string();
            Error::UnseenChange { parent_id, image, offset }
        }
        // Not reached: only with a snapshot of the parent anything is known of changes.
        None => Error::Lost(super::Lost),
    }
}

/// Cuts the ranges of a chunk at `offset` that are to be read, each to its place in `bytes`, into single reads.
fn reads<'a>(bytes: &'a mut [u8], ranges: &[Range<usize>], places: &[usize], offset: u64) -> Vec<Read<'a>> {
    let mut reads = Vec::new();
    let (mut rest, mut at) = (bytes, 0);
    for (range, place) in ranges.iter().zip(places) {
        let (_, behind) = rest.split_at_mut(place - at);
        let (buffers, behind) = behind.split_at_mut(range.len());
        let starts = range.clone().step_by(READ_BYTES_MAX);
        reads.extend(
            starts
                .zip(buffers.chunks_mut(READ_BYTES_MAX))
                .map(|(start, buffer)| Read { offset: offset + start as u64, buffer }),
        );
        (rest, at) = (behind, place + range.len());
    }
    reads
}

/// Where a range of a chunk lies in what is held of it; nowhere if it has nothing but holes, or was not to be read. A range
/// never begins in one piece and ends in another: there are blocks between them that are not read.
fn place(pieces: &[Piece], range: &Range<usize>) -> Option<Range<usize>> {
    let piece = &pieces[pieces.partition_point(|piece| piece.range.start <= range.start).checked_sub(1)?];
    let start = piece.at + (range.start - piece.range.start);
    (range.end <= piece.range.end).then(|| start..start + range.len())
}

/// A part of the volume that one read of Cinder's driver would take.
struct Chunk {
    offset: u64,
    length: usize,
    /// What was known of its blocks before; empty if nothing was.
    known: Vec<Known>,
    content: Content,
}

/// What was read of a chunk: nothing, if it has but holes and blocks that were not to be read. Of a chunk in which one block has
/// changed, or is checked, only that block takes memory.
#[derive(Default)]
struct Content {
    /// The pieces, one behind the other.
    bytes: Bytes,
    /// The runs of blocks that were to be read and are not all holes.
    pieces: Vec<Piece>,
    /// Which parts of the chunk were read; the others are in holes, or in blocks that were not to be read.
    ranges: Vec<Range<usize>>,
    /// Memory for what the bytes are packed into.
    packed: Option<Reserved>,
}

/// A run of blocks.
struct Piece {
    /// Where it is in its chunk.
    range: Range<usize>,
    /// Where it begins in the bytes that are held.
    at: usize,
}

/// A run of blocks of a chunk that becomes one object.
struct Segment {
    range: Range<usize>,
    zero: bool,
    /// The SHA-256 over the digests of the blocks; none of zeros.
    blocks: Option<Digest>,
    /// The object's; 0 until it has one.
    number: u64,
    /// What an earlier attempt has stored of the same.
    found: Option<Found>,
}

/// What has come of taking a segment over from an earlier attempt.
enum Tried {
    /// Its object has a name of this attempt now.
    TakenOver(StoredObject),
    /// There is nothing to take over, or the store cannot copy it: it is to be stored.
    ToStore(Segment),
}

/// What objects get their numbers by, in the volume's order.
struct Numbers {
    earlier: Earlier,
    next: u64,
}

struct Digested {
    chunk: Chunk,
    digests: Vec<Digest>,
    segments: Vec<Segment>,
    counts: Counts,
}

impl Digested {
    /// Digests the blocks of a chunk, and finds the runs that differ from what they were `before`. Fails with the
    /// offset of a block that differs and should not.
    fn of(chunk: Chunk, before: Option<Vec<Digest>>, digester: &BlockDigester) -> Result<Self, u64> {
        let block_bytes = digester.block_bytes();
        let mut counts = Counts::default();
        let mut digests = Vec::with_capacity(chunk.length.div_ceil(block_bytes));
        let mut segments: Vec<Segment> = Vec::new();
        let mut in_segment = false;
        for start in (0..chunk.length).step_by(block_bytes) {
            let block = start..chunk.length.min(start + block_bytes);
            // Cinder's parent may have fewer blocks than it should; what it does not have is new.
            let before = before.as_ref().and_then(|before| before.get(digests.len()));
            let known = chunk.known.get(digests.len()).copied().unwrap_or(Known::Nothing);
            if known == Known::Unchanged {
                digests.push(*before.ok_or(chunk.offset + start as u64)?);
                counts.bytes_unchanged += block.len() as u64;
                in_segment = false;
                continue;
            }
            let (digest, zero) = match place(&chunk.content.pieces, &block) {
                Some(place) => digester.digest(&chunk.content.bytes[place]),
                None => (digester.digest_of_zeros(block.len()), true),
            };
            let read = chunk.content.bytes_read(&block);
            counts.bytes_read += read;
            counts.bytes_hole += block.len() as u64 - read;
            if zero {
                counts.bytes_zero += read;
            }
            let unchanged = before == Some(&digest);
            if known == Known::Checked && !unchanged {
                return Err(chunk.offset + start as u64);
            }
            digests.push(digest);
            match segments.last_mut() {
                // What is a hole is counted as one already.
                _ if unchanged => counts.bytes_unchanged += read,
                Some(segment) if in_segment => {
                    segment.range.end = block.end;
                    segment.zero &= zero;
                }
                _ => segments.push(Segment { range: block, zero, blocks: None, number: 0, found: None }),
            }
            in_segment = !unchanged;
        }
        for segment in segments.iter_mut().filter(|segment| !segment.zero) {
            let blocks = segment.range.start / block_bytes..segment.range.end.div_ceil(block_bytes);
            segment.blocks = Some(sha256(digests[blocks].as_flattened()));
        }
        Ok(Self { chunk, digests, segments, counts })
    }
}

impl Content {
    fn bytes_read(&self, block: &Range<usize>) -> u64 {
        let first = self.ranges.partition_point(|range| range.end <= block.start);
        let overlap = |range: &Range<usize>| range.end.min(block.end) - range.start.max(block.start);
        self.ranges[first..]
            .iter()
            .take_while(|range| range.start < block.end)
            .map(|range| overlap(range) as u64)
            .sum()
    }
}

struct Packed {
    entry: ObjectEntry,
    blocks: Option<Digest>,
    body: Bytes,
}

fn pack(
    chunk: Chunk,
    segments: Vec<Segment>,
    settings: &Settings,
    zeros: &ZeroObjects,
) -> Result<Vec<Packed>, Error> {
    let Chunk { offset, content: Content { bytes, pieces, packed: mut room, .. }, .. } = chunk;
    let Settings { compression, compression_level, .. } = *settings;
    let mut objects = Vec::with_capacity(segments.len());
    for segment in segments {
        let length = segment.range.len();
        let (body, word, md5) = if segment.zero {
            let zero = zeros.get(length, settings)?;
            (zero.body, zero.compression, zero.md5)
        } else {
            // It is there: the blocks of a segment were digested from one piece.
            let raw = bytes.slice(place(&pieces, &segment.range).ok_or(super::Lost)?);
            match compression.compress(&raw, compression_level).map_err(Error::Compress)? {
                Some(packed) => {
                    let md5 = md5(&raw);
                    let body = match &mut room {
                        Some(room) => room.split(packed.len()).hold(packed),
                        None => packed.into(),
                    };
                    (body, compression, md5)
                }
                None => (raw.clone(), Compression::None, md5(&raw)),
            }
        };
        let entry = ObjectEntry {
            number: segment.number,
            offset: offset + segment.range.start as u64,
            length: length as u64,
            compression: word,
            md5,
        };
        objects.push(Packed { entry, blocks: segment.blocks, body });
    }
    Ok(objects)
}

/// Objects of nothing but zeros. A volume that is mostly empty has thousands of the same.
#[derive(Default)]
struct ZeroObjects {
    by_length: std::sync::Mutex<HashMap<usize, ZeroObject>>,
}

#[derive(Clone)]
struct ZeroObject {
    body: Bytes,
    compression: Compression,
    md5: Md5,
}

impl ZeroObjects {
    /// Different lengths that are kept; a full backup has two.
    const KEPT_MAX: usize = 64;

    fn get(&self, length: usize, settings: &Settings) -> Result<ZeroObject, Error> {
        // Held while the object is made, so that only one thread makes it.
        let mut by_length = self.by_length.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(zero) = by_length.get(&length) {
            return Ok(zero.clone());
        }
        let zeros = vec![0; length];
        let compression = settings.compression.of_zeros();
        let zero = match compression.compress(&zeros, settings.compression_level).map_err(Error::Compress)? {
            Some(packed) => ZeroObject { body: packed.into(), compression, md5: md5(&zeros) },
            // A last block of a few bytes does not get smaller.
            None => ZeroObject { md5: md5(&zeros), body: zeros.into(), compression: Compression::None },
        };
        if by_length.len() < Self::KEPT_MAX {
            by_length.insert(length, zero.clone());
        }
        Ok(zero)
    }
}

struct StoredChunk {
    length: usize,
    digests: Vec<Digest>,
    objects: Vec<StoredObject>,
    counts: Counts,
}

/// An object of text that is written while the backup goes on.
struct List {
    writer: Box<dyn ObjectWriter>,
    buffer: Vec<u8>,
    sha256: Sha256,
}

impl List {
    async fn create(store: &dyn ObjectStore, name: &ObjectName) -> store::Result<Self> {
        Ok(Self { writer: store.create(name).await?, buffer: Vec::new(), sha256: Sha256::new() })
    }

    async fn append(&mut self, text: &[u8]) -> store::Result<()> {
        self.buffer.extend_from_slice(text);
        if self.buffer.len() >= LIST_BUFFER_BYTES { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> store::Result<()> {
        self.sha256.update(&self.buffer);
        self.writer.write(std::mem::take(&mut self.buffer).into()).await
    }

    /// Writes what is left. The object stays invisible until the writer is finished.
    async fn close(mut self) -> store::Result<(Box<dyn ObjectWriter>, String)> {
        self.flush().await?;
        Ok((self.writer, hex::encode(self.sha256.finalize())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_packed_at_the_level_that_is_set() {
        let text: &[u8] = include_bytes!("backup.rs");
        let packed_bytes = |compression_level| {
            let settings = Settings {
                compression: Compression::Zstd,
                compression_level,
                object_bytes: 1 << 20,
                sha_block_bytes: 512,
                unchanged_check_per_mille: 1,
                source_snapshots_max: 1,
            };
            let pieces = vec![Piece { range: 0..text.len(), at: 0 }];
            let content =
                Content { bytes: Bytes::from_static(text), pieces, ranges: Vec::new(), packed: None };
            let chunk = Chunk { offset: 0, length: text.len(), known: Vec::new(), content };
            let segment = Segment { range: 0..text.len(), zero: false, blocks: None, number: 1, found: None };
            let objects = pack(chunk, vec![segment], &settings, &ZeroObjects::default()).unwrap();
            objects[0].body.len()
        };
        let sizes = [1, 3, 9].map(packed_bytes);
        assert!(sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
    }

    #[test]
    fn no_byte_is_counted_in_two_ways_of_not_being_read() {
        const BLOCK: usize = 512;
        let digester = BlockDigester::new(BLOCK);
        let zeros = digester.digest_of_zeros(BLOCK);
        let (data, _) = digester.digest(&[7; BLOCK]);
        // Data that nobody read, data as before, zeros as before, a hole as before, half a hole as before, a new hole, new data.
        let mut half = [0; BLOCK];
        half[BLOCK / 2..].fill(7);
        let (half_digest, _) = digester.digest(&half);
        let bytes = [[0; BLOCK], [7; BLOCK], [0; BLOCK], [0; BLOCK], half, [0; BLOCK], [9; BLOCK]].concat();
        let before = vec![data, data, zeros, zeros, half_digest, data, data];
        let known = [&[Known::Unchanged][..], &[Known::Nothing; 6]].concat();
        let ranges = vec![BLOCK..3 * BLOCK, 4 * BLOCK + BLOCK / 2..5 * BLOCK, 6 * BLOCK..7 * BLOCK];
        let length = bytes.len();
        let pieces = vec![Piece { range: BLOCK..length, at: 0 }];
        let content = Content { bytes: Bytes::from(bytes).slice(BLOCK..), pieces, ranges, packed: None };
        let chunk = Chunk { offset: 0, length, known, content };

        let counts = Digested::of(chunk, Some(before), &digester).unwrap().counts;

        let block = BLOCK as u64;
        let expected = Counts {
            bytes_read: 3 * block + block / 2,
            bytes_hole: 2 * block + block / 2,
            bytes_zero: block,
            // Not read, and read.
            bytes_unchanged: block + 2 * block + block / 2,
            ..Counts::default()
        };
        assert_eq!(counts, expected);
        assert_eq!(counts.bytes_read + counts.bytes_hole + block, length as u64);
    }
}
