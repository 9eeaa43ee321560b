//! Moves pieces of a volume, many at once: read, digest, look for zeros, write. What was done comes out in order.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{self, FutureExt};
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};

use super::digests::{Numbered, block};
use super::pieces::{BLOCK_BYTES, Piece, Run, runs};
use crate::ceph::{self, Image};
use crate::engine::chunked::Budget;
use crate::engine::chunked::digest::{BlockDigester, Digest};
use crate::engine::cpu::{Cpu, blocking};
use crate::engine::error::Error;
use crate::job::{Context, Counts};
use crate::volume::{Before, RbdTarget, VolumeSource, VolumeTarget};

/// Pieces that are under way at once; a small one needs as long as a large one.
const PIECES_MAX: usize = 64;
/// Bytes that are under way at once.
const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
/// What has no more data than one part in so many is written without the rest of it, for which others may wait.
const SPARSE_PARTS_MIN: u64 = 16;
/// librbd takes less than 4 GiB in one request.
const ZERO_BYTES_MAX: u64 = 1 << 30;

/// Where bytes are read.
#[derive(Clone)]
pub enum From {
    /// An image, or a snapshot of one.
    Image(Arc<Image>),
    /// Anything else.
    Volume(Arc<dyn VolumeSource>),
}

/// Where bytes are written.
#[derive(Clone)]
pub enum To {
    /// The image that holds a backup.
    Image(Arc<Image>),
    /// An image that is restored onto.
    Rbd(Arc<RbdTarget>),
    /// Anything else.
    Volume(Arc<dyn VolumeTarget>),
    /// Nowhere: what is read is only checked.
    Nowhere,
}

/// A piece, with what is known of it before it is read.
pub struct Task {
    /// What is to be moved.
    pub piece: Piece,
    /// Where zeros must be written, because the target may hold something else there; in order.
    pub stale: Vec<Range<u64>>,
    /// The digests that its blocks must have, if they are to be checked; a block without one must be zeros.
    pub expected: Option<Vec<Numbered>>,
    /// Whether there are digests of all blocks that are not zeros.
    pub complete: bool,
}

/// What became of a piece.
pub struct Moved {
    /// The number of its first block.
    pub first_block: u64,
    /// The digests of its blocks, and whether each is all zeros.
    pub blocks: Vec<(Digest, bool)>,
    /// What was moved.
    pub counts: Counts,
}

/// Moves pieces from one place to the other.
pub struct Transfer {
    pub ctx: Context,
    pub cpu: Cpu,
    pub memory: Budget,
    pub from: From,
    pub to: To,
    /// Names what is read, in errors.
    pub name: String,
    pub digester: Arc<BlockDigester>,
}

impl Transfer {
    /// Moves all pieces; what became of them comes out in their order.
    pub fn run<'a>(
        &'a self,
        tasks: impl Stream<Item = Result<Task, Error>> + Send + 'a,
    ) -> impl Stream<Item = Result<Moved, Error>> + Send + 'a {
        let in_flight = Budget::new(IN_FLIGHT_BYTES_MAX);
        tasks
            .map_ok(move |task| {
                let in_flight = in_flight.clone();
                async move { self.one(task, &in_flight).await }.boxed()
            })
            .try_buffered(PIECES_MAX)
    }

    async fn one(&self, task: Task, in_flight: &Budget) -> Result<Moved, Error> {
        self.ctx.check()?;
        let Task { piece, stale, expected, complete } = task;
        let length = piece.range.end - piece.range.start;
        let first_block = block(piece.range.start);
        if piece.zero {
            let (digester, range) = (self.digester.clone(), piece.range.clone());
            let blocks = self.cpu.run(move || blocks_of_zeros(&digester, range)).await?;
            self.check(first_block, &blocks, expected.as_deref(), complete)?;
            self.write(vec![(piece.range, None)], &stale).await?;
            let counts = Counts { bytes_hole: length, ..Counts::default() };
            return Ok(Moved { first_block, blocks, counts });
        }
        // Before it has memory, for which other jobs may wait.
        self.ctx.pace(length).await?;
        // In this order everywhere, so that nobody waits for ever.
        let in_flight = in_flight.reserve(length as usize).await;
        let memory = self.memory.reserve(length as usize).await;
        let bytes = memory.hold(self.read(&piece.range).await?);
        let (digester, wanted, start) = (self.digester.clone(), piece.wanted, piece.range.start);
        let analysed = self.cpu.run(move || {
            let blocks: Vec<_> =
                bytes.chunks(BLOCK_BYTES as usize).map(|block| digester.digest(block)).collect();
            (blocks, runs(&bytes, start, &wanted), bytes)
        });
        let (blocks, runs, bytes) = analysed.await?;
        self.check(first_block, &blocks, expected.as_deref(), complete)?;
        let sum = |zero| -> u64 {
            runs.iter().filter(|run| run.zero == zero).map(|run| run.range.end - run.range.start).sum()
        };
        let (zero_bytes, data_bytes) = (sum(true), sum(false));
        let sparse = data_bytes * SPARSE_PARTS_MIN <= length;
        let data = |run: &Run| {
            let data = bytes.slice((run.range.start - start) as usize..(run.range.end - start) as usize);
            if sparse { Bytes::copy_from_slice(&data) } else { data }
        };
        let parts = runs.iter().map(|run| (run.range.clone(), (!run.zero).then(|| data(run)))).collect();
        drop(bytes);
        let _in_flight = (!sparse).then_some(in_flight);
        self.write(parts, &stale).await?;

        let mut counts = Counts { bytes_read: length, bytes_zero: zero_bytes, ..Counts::default() };
        match self.to {
            To::Image(_) => counts.bytes_stored = data_bytes,
            To::Rbd(_) | To::Volume(_) => {
                (counts.bytes_stored, counts.bytes_written) = (length, data_bytes);
            }
            To::Nowhere => counts.bytes_stored = length,
        }
        Ok(Moved { first_block, blocks, counts })
    }

    async fn read(&self, range: &Range<u64>) -> Result<Vec<u8>, Error> {
        let (offset, length) = (range.start, (range.end - range.start) as usize);
        let failed = |source| Error::ReadVolume { offset, source };
        match &self.from {
            From::Image(image) => image.read(offset, length).await.map_err(|error| failed(error.into_io())),
            From::Volume(volume) => {
                let volume = volume.clone();
                blocking(move || {
                    let mut bytes = vec![0; length];
                    volume.read_at(&mut bytes, offset).map(|()| bytes)
                })
                .await?
                .map_err(|error| match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => {
                        Error::SourceShrank { offset, volume_bytes: range.end.max(offset) }
                    }
                    _ => failed(error),
                })
            }
        }
    }

    /// Checks the digests of a piece's blocks.
    fn check(
        &self,
        first_block: u64,
        blocks: &[(Digest, bool)],
        expected: Option<&[Numbered]>,
        complete: bool,
    ) -> Result<(), Error> {
        let Some(expected) = expected else { return Ok(()) };
        let mut expected = expected.iter().peekable();
        for (block, (digest, zero)) in (first_block..).zip(blocks) {
            let wanted = expected.next_if(|(number, _)| *number == block).map(|(_, digest)| *digest);
            let right = match wanted {
                Some(wanted) => wanted == *digest,
                None => !complete || *zero,
            };
            if !right {
                let at = block * BLOCK_BYTES;
                let why = format!("the block at byte {at} is not the one that was backed up");
                return Err(Error::Damaged { object: self.name.clone(), why });
            }
        }
        Ok(())
    }

    /// Writes parts of a piece, in order; those without bytes are zeros.
    async fn write(
        &self,
        parts: Vec<(Range<u64>, Option<Bytes>)>,
        stale: &[Range<u64>],
    ) -> Result<(), Error> {
        let image = match &self.to {
            To::Nowhere => return Ok(()),
            To::Image(image) => image.clone(),
            To::Rbd(target) => target.image().map_err(|source| {
                let offset = parts.first().map_or(0, |(range, _)| range.start);
                Error::WriteVolume { offset, source }
            })?,
            To::Volume(volume) => {
                let volume = volume.clone();
                return blocking(move || {
                    for (range, bytes) in parts {
                        let written = match (bytes, volume.before()) {
                            (Some(bytes), _) => volume.write_at(&bytes, range.start),
                            (None, Before::Zeros) => Ok(()),
                            (None, Before::Anything) => volume.zero(range.clone()),
                        };
                        written.map_err(|source| Error::WriteVolume { offset: range.start, source })?;
                    }
                    Ok(())
                })
                .await?;
            }
        };
        let failed =
            |offset| move |error: ceph::Error| Error::WriteVolume { offset, source: error.into_io() };
        let mut writes = Vec::new();
        for (range, bytes) in parts {
            match bytes {
                Some(bytes) => {
                    let written = image.write(range.start, bytes);
                    writes.push(written.map(move |r| r.map_err(failed(range.start))).boxed());
                }
                None => writes.extend(overlaps(&range, stale).into_iter().map(|range| {
                    let start = range.start;
                    zero(&image, range).map(move |r| r.map_err(failed(start))).boxed()
                })),
            }
        }
        future::try_join_all(writes).await.map(drop)
    }
}

/// Makes a range of an image read as zeros.
pub async fn zero(image: &Image, range: Range<u64>) -> Result<(), ceph::Error> {
    let starts = range.clone().step_by(ZERO_BYTES_MAX as usize);
    let zeroed =
        starts.map(|start| image.write_zeroes(start, ZERO_BYTES_MAX.min(range.end - start) as usize));
    stream::iter(zeroed).buffer_unordered(4).try_collect::<()>().await
}

/// The parts of `ranges`, which are in order, that lie in `span`.
pub fn overlaps(span: &Range<u64>, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let first = ranges.partition_point(|range| range.end <= span.start);
    let overlapping = ranges[first..].iter().take_while(|range| range.start < span.end);
    overlapping.map(|range| range.start.max(span.start)..range.end.min(span.end)).collect()
}

fn blocks_of_zeros(digester: &BlockDigester, range: Range<u64>) -> Vec<(Digest, bool)> {
    let starts = range.clone().step_by(BLOCK_BYTES as usize);
    starts
        .map(|start| (digester.digest_of_zeros(BLOCK_BYTES.min(range.end - start) as usize), true))
        .collect()
}
