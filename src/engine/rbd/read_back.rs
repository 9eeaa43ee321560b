//! Reads a backup back: to restore it, or to verify it. Every block is compared with its digest, where there is one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use futures_util::stream::{self, TryStreamExt};
use tracing::{info, warn};

use super::digests::{self, DigestReader, block};
use super::pieces::{BLOCK_BYTES, Piece, pieces};
use super::transfer::{From, Task, To, Transfer, zero};
use super::{Rbd, names, open, snapshot_of};
use crate::ceph::{Extent, Image, Pool};
use crate::engine::cpu::blocking;
use crate::engine::error::Error;
use crate::job::{Checkpoint, Context, Counts, Record, Sample};
use crate::volume::rbd::{WINDOW_BYTES, existing, still_there};
use crate::volume::{Before, VolumeTarget};

impl Rbd {
    /// Reads the whole backup, the first of `chain`, or a sample of its pieces, and writes it to the target, where there is
    /// one, which is not finished by that. Returns its digest, if it has one. The number beside the sample is its seed.
    pub async fn read_back(
        &self,
        ctx: &Context,
        chain: &[Record],
        to: To,
        sample: Option<(Sample, u64)>,
    ) -> Result<Option<String>, Error> {
        let record = &chain[0];
        let volume_bytes = record.volume_bytes;
        ctx.progress.begin(volume_bytes);
        for record in chain.iter().filter(|record| !record.object_digests.is_empty()) {
            digests::check(&self.store, record).await?;
        }
        let reader = DigestReader::open(&self.store, chain);
        if !reader.complete {
            warn!(
                "Cinder made this backup, or one that it builds on, without digests: what is read is checked in part only"
            );
        }
        let Opened { pool, name, image_id, snapshot_id, image } = {
            let (engine, record) = (self.clone(), record.clone());
            blocking(move || engine.open_backup(&record)).await??
        };
        let target: Option<Arc<dyn VolumeTarget>> = match &to {
            To::Volume(volume) => Some(volume.clone()),
            To::Rbd(target) => Some(target.clone()),
            To::Image(_) | To::Nowhere => None,
        };
        let before = target.as_ref().map_or(Before::Zeros, |target| target.before());
        let transfer = Transfer {
            ctx: ctx.clone(),
            cpu: self.cpu.clone(),
            memory: self.memory.clone(),
            from: From::Image(image.clone()),
            to: to.clone(),
            name: image.path().into(),
            digester: self.digester.clone(),
        };
        let begin = target.as_deref().map_or(0, |target| resumed(ctx, target, volume_bytes));
        let mut state = Reading {
            ctx: ctx.clone(),
            image: image.clone(),
            reader,
            before,
            volume_bytes,
            at: begin,
            pieces: VecDeque::new(),
            sample,
            index: 0,
        };
        // What is restored already is not checked again, a shorter block at the end included.
        while !state.reader.take_below(begin.div_ceil(BLOCK_BYTES)).await?.is_empty() {}
        let tasks = stream::try_unfold(state, |mut state| async move {
            Ok::<_, Error>(state.next().await?.map(|task| (task, state)))
        });
        let mut moved = std::pin::pin!(transfer.run(tasks));
        let read: Result<(), Error> = async {
            let mut unsaved_bytes = 0;
            while let Some(piece) = moved.try_next().await? {
                ctx.check()?;
                ctx.progress.add(&piece.counts);
                ctx.progress.done(piece.counts.bytes_read + piece.counts.bytes_hole);
                unsaved_bytes += piece.counts.bytes_read;
                if let Some(target) = &target
                    && unsaved_bytes >= self.settings.checkpoint_bytes
                {
                    let end = (piece.first_block + piece.blocks.len() as u64) * BLOCK_BYTES;
                    let counts = ctx.progress.read().counts;
                    keep_checkpoint(target, Checkpoint { bytes_done: end.min(volume_bytes), counts }).await?;
                    unsaved_bytes = 0;
                }
            }
            Ok(())
        }
        .await;
        // What is deleted while it is read looks damaged, or like zeros.
        blocking(move || still_there(&pool, &name, &image_id, snapshot_id)).await??;
        read?;
        if let To::Rbd(target) = to
            && before == Before::Anything
            && target.bytes() > volume_bytes
        {
            let image = target.image().map_err(|source| Error::FinishVolume { source })?;
            // What the image held behind the end of the volume is not the volume's.
            zero(&image, volume_bytes..target.bytes()).await?;
        }
        Ok(record.digest.clone())
    }

    /// Opens the snapshot of a backup, or the image of one that has none. Blocks.
    fn open_backup(&self, record: &Record) -> Result<Opened, Error> {
        let pool = self.pool(&self.connect()?, record)?;
        let name = names::image(record);
        let missing = |object: String| Error::MissingObject { object, backup_id: record.backup_id };
        let image =
            open(&pool, &name, None)?.ok_or_else(|| missing(format!("image {}/{name}", pool.name())))?;
        let image_id = image.id()?;
        let (image, snapshot_id) = match snapshot_of(&image, record)? {
            Some(snapshot) => {
                let opened = open(&pool, &name, Some(&snapshot.name))?
                    .ok_or_else(|| missing(format!("snapshot {}/{name}@{}", pool.name(), snapshot.name)))?;
                (opened, Some(snapshot.id))
            }
            // Cinder takes none of what it copies as a whole.
            None if record.job_id.is_none() && image.snapshots()?.is_empty() => (image, None),
            None => {
                return Err(missing(format!("snapshot {}/{name}@{}", pool.name(), names::snapshot(record))));
            }
        };
        Ok(Opened { pool, name, image_id, snapshot_id, image: Arc::new(image) })
    }
}

/// What is read, and how it is found again.
struct Opened {
    pool: Pool,
    name: String,
    image_id: String,
    snapshot_id: Option<u64>,
    image: Arc<Image>,
}

/// Finds what is to be read, and what it must be.
struct Reading {
    ctx: Context,
    image: Arc<Image>,
    reader: DigestReader,
    before: Before,
    volume_bytes: u64,
    at: u64,
    pieces: VecDeque<Piece>,
    sample: Option<(Sample, u64)>,
    index: u64,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Task>, Error> {
        while let Some(piece) = self.next_piece().await? {
            let mut expected = Vec::new();
            loop {
                let more = self.reader.take_below(block(piece.range.end - 1) + 1).await?;
                if more.is_empty() {
                    break;
                }
                expected.extend(more);
            }
            // What Ceph has nothing for costs nothing to compare.
            if !piece.zero && !self.sample_takes_next() {
                self.ctx.check()?;
                self.ctx.progress.done(piece.range.end - piece.range.start);
                continue;
            }
            let stale = match self.before {
                Before::Zeros => Vec::new(),
                Before::Anything => vec![piece.range.clone()],
            };
            return Ok(Some(Task { piece, stale, expected: Some(expected), complete: self.reader.complete }));
        }
        Ok(None)
    }

    fn sample_takes_next(&mut self) -> bool {
        let index = self.index;
        self.index += 1;
        self.sample.is_none_or(|(sample, seed)| sample.takes(seed, index))
    }

    async fn next_piece(&mut self) -> Result<Option<Piece>, Error> {
        while self.pieces.is_empty() {
            if self.at == self.volume_bytes {
                if !self.reader.take_below(u64::MAX).await?.is_empty() {
                    let why = "there are digests of blocks behind the end of the volume".into();
                    return Err(Error::Damaged { object: self.image.path().into(), why });
                }
                return Ok(None);
            }
            let window = self.at..self.volume_bytes.min(self.at + WINDOW_BYTES);
            self.at = window.end;
            let (image, volume_bytes) = (self.image.clone(), self.volume_bytes);
            self.pieces = blocking(move || {
                let data = existing(&image, window.clone())?;
                Ok::<_, Error>(pieces(&with_holes(&data, window), volume_bytes).into())
            })
            .await??;
        }
        Ok(self.pieces.pop_front())
    }
}

/// Where a restore goes on that an attempt before this one has begun.
fn resumed(ctx: &Context, target: &dyn VolumeTarget, volume_bytes: u64) -> u64 {
    let checkpoint = target.note().and_then(|note| serde_json::from_str::<Checkpoint>(note).ok());
    let Some(Checkpoint { bytes_done, counts }) = checkpoint.filter(|it| it.bytes_done <= volume_bytes)
    else {
        return 0;
    };
    info!(bytes = bytes_done, "going on where an attempt before this one stopped");
    ctx.progress.add(&Counts { bytes_reused: bytes_done, ..counts });
    ctx.progress.done(bytes_done);
    bytes_done
}

/// Notes with the target how far its restore is.
async fn keep_checkpoint(target: &Arc<dyn VolumeTarget>, checkpoint: Checkpoint) -> Result<(), Error> {
    let (target, offset) = (target.clone(), checkpoint.bytes_done);
    let failed = |source| Error::WriteVolume { offset, source };
    let note = serde_json::to_string(&checkpoint).map_err(|error| failed(error.into()))?;
    blocking(move || target.keep_note(&note)).await?.map_err(failed)
}

/// The data of a window, and the holes between.
fn with_holes(data: &[Range<u64>], window: Range<u64>) -> Vec<Extent> {
    let mut extents = Vec::with_capacity(2 * data.len() + 1);
    let mut add = |range: Range<u64>, exists| {
        if !range.is_empty() {
            extents.push(Extent { offset: range.start, length: range.end - range.start, exists });
        }
    };
    let mut at = window.start;
    for range in data {
        add(at..range.start, false);
        add(range.clone(), true);
        at = range.end;
    }
    add(at..window.end, false);
    extents
}
