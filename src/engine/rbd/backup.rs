//! Makes a backup: an image for a chain, a snapshot of it for each backup.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tracing::info;
use uuid::Uuid;

use super::digests::DigestWriter;
use super::pieces::{BLOCK_BYTES, pieces};
use super::transfer::{From, Task, To, Transfer};
use super::{Rbd, digest, is_differential, names, open, snapshot_of};
use crate::ceph::{Extent, Features, Image, Mode, NewImage, Pool, Snapshot};
use crate::engine::cpu::{Lost, blocking};
use crate::engine::error::Error;
use crate::engine::source::Source;
use crate::engine::{Catalog, Updated};
use crate::error::Problem;
use crate::job::{BackupId, Checkpoint, Context, Counts, Method, Mode as Share, Record};
use crate::volume::rbd::{RbdOrigin, WINDOW_BYTES, changed, existing};
use crate::volume::{self, RbdSource, VolumeSource};

/// Checkpoints of a backup, at most. Its record names a list of digests for each, and must not become too large.
const CHECKPOINTS_MAX: u64 = 4096;

/// The key under which an image says which job writes it.
pub(super) const JOB_KEY: &str = "backhaul.job";
/// The key under which it says which attempt of that job does.
pub(super) const WRITER_KEY: &str = "backhaul.writer";

/// A backup that is whole but for the snapshot that makes it visible.
pub struct Unfinished {
    image: Arc<Image>,
    snapshot: String,
}

impl Unfinished {
    /// Makes the backup visible.
    pub async fn finish(self) -> Result<(), Error> {
        Ok(blocking(move || self.image.create_snapshot(&self.snapshot)).await??)
    }
}

/// Removes the oldest snapshots of backups from a volume, so that not more than `count_max` stay beside those of the
/// backups that are `being_made`. One that is in use stays, which is an error when the others are gone. Blocks.
pub fn trim(source: &RbdOrigin, count_max: usize, being_made: &BTreeSet<BackupId>) -> Result<(), Error> {
    let image = source.head();
    let snapshots = image.snapshots()?;
    let may_go = |name: &str| names::backup_of(name).is_some_and(|id| !being_made.contains(&id));
    let of_backups = snapshots.iter().filter(|snapshot| may_go(&snapshot.name));
    let of_backups: Vec<u64> = of_backups.map(|snapshot| snapshot.id).collect();
    let surplus = &of_backups[..of_backups.len().saturating_sub(count_max)];
    Ok(image.remove_unused_snapshots(|snapshot| surplus.contains(&snapshot.id))?)
}

/// What is to be copied, and how it is found.
struct Plan {
    /// The volume as it was at the snapshot, or as it is.
    from: From,
    volume: Arc<dyn VolumeSource>,
    /// The snapshots of the volume, where that is an RBD image.
    snapshot: Option<Arc<RbdSource>>,
    /// The pool that it goes to.
    pool: Pool,
    /// Where it goes; its head may have been written since the parent.
    image: Arc<Image>,
    image_id: String,
    /// The snapshot of the parent on either image; none of a full backup.
    parent: Option<ParentSnapshot>,
    differential: bool,
    volume_bytes: u64,
}

/// A volume to read, and the same as an image if it is one.
type Frozen = (Arc<dyn VolumeSource>, Option<Arc<RbdSource>>);

#[derive(Clone)]
struct ParentSnapshot {
    on_source: String,
    id_on_source: u64,
    on_image: String,
    bytes: u64,
}

impl Rbd {
    /// Copies the volume, or what of it differs from the parent, and completes the record but for its state.
    pub async fn backup(
        &self,
        ctx: &Context,
        record: &mut Record,
        volume_meta: Option<&str>,
        parent: Option<&Record>,
        source: Source,
    ) -> Result<Unfinished, Error> {
        ctx.progress.begin(record.volume_bytes);
        let method = record.method.unwrap_or(Method { strategy: crate::job::Strategy::Copy, mode: None });
        let origin = source.origin();
        let plan = {
            let (engine, record, parent, ctx) = (self.clone(), record.clone(), parent.cloned(), ctx.clone());
            blocking(move || engine.prepare(&ctx, &record, parent.as_ref(), source, method)).await??
        };
        record.volume_bytes = plan.volume_bytes;
        record.image_id = Some(plan.image_id.clone());
        ctx.progress.begin(record.volume_bytes);
        if let (Some(snapshot), Some(source)) = (&plan.snapshot, &mut record.source) {
            source.snapshot_id = snapshot.snapshot_id();
        }

        let plan = Arc::new(plan);
        self.copy(ctx, record, plan.clone()).await?;
        if let (Some(parent), Some(compared), Some(origin)) = (parent, &plan.parent, origin) {
            let id = compared.id_on_source;
            match blocking(move || origin.check_compared(id)).await? {
                Err(volume::Error::RemovedMeanwhile { path }) => {
                    let why =
                        format!("its snapshot on {path} was removed while the volume was compared with it");
                    return Err(unsuitable(parent, &why));
                }
                there => there?,
            }
        }
        plan.image.flush().await?;
        // Whoever takes a job over removes the lists of the attempt before. One that has not seen that, because it noted
        // at that moment how far it was, must not end with a record that names them.
        if !self.has_lists(record).await? {
            return Err(Error::TakenOver(record.backup_id));
        }
        record.counts = ctx.progress.read().counts;
        record.digest = Some(digest(&record.object_digests));
        if let Some(metadata) = volume_meta.map(ToOwned::to_owned) {
            let (pool, name) = (plan.pool.clone(), names::metadata_object(record.backup_id));
            let written = blocking(move || {
                match pool.create_object(&name, metadata.as_bytes()) {
                    // An attempt that was taken over may have come as far meanwhile.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                        let there = pool.read_object(&name, 0, metadata.len() + 1)?;
                        if there != metadata.as_bytes() { Err(error.into()) } else { Ok::<_, Error>(()) }
                    }
                    created => Ok(created?),
                }
            });
            written.await??;
        }
        Ok(Unfinished { image: plan.image.clone(), snapshot: names::snapshot(record) })
    }

    /// Takes the snapshot of the volume, and opens both ends. Blocks.
    fn prepare(
        &self,
        ctx: &Context,
        record: &Record,
        parent: Option<&Record>,
        source: Source,
        method: Method,
    ) -> Result<Plan, Error> {
        ctx.check()?;
        let pool = self.pool(&self.connect()?, record)?;
        // The parent must be usable before anything is made.
        let parent_record = parent;
        let (parent, begun) = match (parent, &source, method.mode) {
            (Some(parent), Source::Rbd(origin), Some(Share::Incremental)) if origin.is_head() => {
                let (snapshot, image) = self.parent_snapshot(&pool, parent, origin)?;
                (Some(snapshot), Some(image))
            }
            (Some(parent), _, Some(Share::Incremental)) => {
                return Err(unsuitable(parent, "of what is no RBD image nobody knows what has changed"));
            }
            // That of the attempt before.
            _ if record.checkpoint.is_some() => {
                (None, Some(pool.open_image(&names::image(record), None, Mode::Write)?))
            }
            _ => (None, None),
        };
        let freeze = || -> Result<Frozen, Error> {
            Ok(match source {
                Source::File(file) => (file, None),
                Source::Rbd(origin) => {
                    let opened = Arc::new(origin.freeze(record.source.as_ref())?);
                    (opened.clone(), Some(opened))
                }
            })
        };
        let ((volume, snapshot), image) = match begun {
            None => (freeze()?, None),
            // A snapshot is mostly waiting for the monitors.
            Some(image) => {
                let frozen = thread::scope(|scope| {
                    let taken = scope.spawn(|| self.take_over(&image, record, parent_record));
                    let frozen = freeze();
                    taken.join().map_err(|_| Lost)??;
                    frozen
                })?;
                (frozen, Some(image))
            }
        };
        let volume_bytes = volume.bytes();
        let from = match &snapshot {
            Some(snapshot) => From::Image(snapshot.image().clone()),
            None => From::Volume(volume.clone()),
        };
        let image = match image {
            None => self.new_image(&pool, record, volume_bytes)?,
            Some(image) => {
                // The attempt before may have come as far as this, and died before it could say so.
                if let Some(snapshot) = snapshot_of(&image, record)? {
                    image.remove_snapshot(&snapshot.name)?;
                }
                if image.bytes()? != volume_bytes {
                    image.resize(volume_bytes)?;
                }
                image
            }
        };
        if record.displaced_writer.is_some() {
            // The same; and the volume may have another name, say, by now.
            pool.remove_object(&names::metadata_object(record.backup_id))?;
        }
        let (differential, image_id) = (is_differential(method), image.id()?);
        Ok(Plan {
            from,
            volume,
            snapshot,
            pool,
            image: Arc::new(image),
            image_id,
            parent,
            differential,
            volume_bytes,
        })
    }

    /// Makes the image of the parent, or of the attempt before, this attempt's to write.
    fn take_over(&self, image: &Image, record: &Record, parent: Option<&Record>) -> Result<(), Error> {
        if record.checkpoint.is_some() {
            shut_out(image, record)?;
        }
        lock(image)?;
        // Since this was looked at, and before the lock. The next try begins anew.
        if record.checkpoint.is_some() && !is_last_writer(image, record, parent)? {
            return Err(Error::ImageInUse { image: image.path().into() });
        }
        sign(image, record)
    }

    fn new_image(&self, pool: &Pool, record: &Record, bytes: u64) -> Result<Image, Error> {
        let name = names::image(record);
        let mut features = Features::USUAL;
        if self.settings.journaling {
            features = features | Features::JOURNALING;
        }
        if self.settings.stripes.is_some() {
            features = features | Features::STRIPING;
        }
        match pool.create_image(&name, &NewImage { bytes, features, stripes: self.settings.stripes }) {
            // An attempt that was taken over has just made it, and removes it when it finds that out.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(Error::ImageInUse { image: format!("{}/{name}", pool.name()) });
            }
            created => created?,
        }
        let image = pool.open_image(&name, None, Mode::Write)?;
        lock(&image)?;
        sign(&image, record)?;
        Ok(image)
    }

    /// Finds the snapshots of the parent on both sides, and makes sure that they are what they were. Opens its image to write.
    fn parent_snapshot(
        &self,
        pool: &Pool,
        parent: &Record,
        origin: &RbdOrigin,
    ) -> Result<(ParentSnapshot, Image), Error> {
        let name = names::image(parent);
        let image = match pool.open_image(&name, None, Mode::Write) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(unsuitable(parent, &format!("its image {}/{name} is gone", pool.name())));
            }
            image => image?,
        };
        if let Some(id) = &parent.image_id
            && image.id()? != *id
        {
            return Err(unsuitable(
                parent,
                &format!("{} is another image than the one it was stored in", image.path()),
            ));
        }
        if !image.features()?.has(Features::EXCLUSIVE_LOCK) {
            let why = format!("{} has no exclusive lock, which keeps two writers apart", image.path());
            return Err(unsuitable(parent, &why));
        }
        let one_of = |image: &Image| match snapshot_of(image, parent) {
            Err(error @ Error::TwoSnapshots { .. }) => Err(unsuitable(parent, &error.to_string())),
            found => found,
        };
        let Some(on_image) = one_of(&image)? else {
            return Err(unsuitable(parent, &format!("its snapshot on {} is gone", image.path())));
        };
        let head = origin.head();
        if let Some(source) = &parent.source
            && head.id()? != source.image_id
        {
            return Err(unsuitable(
                parent,
                &format!("{} is another image than the one that it was made of", head.path()),
            ));
        }
        let Some(on_source) = one_of(head)? else {
            return Err(unsuitable(parent, &format!("its snapshot on {} is gone", head.path())));
        };
        let known_id = parent.source.as_ref().and_then(|source| source.snapshot_id);
        if known_id.is_some_and(|id| id != on_source.id) {
            return Err(unsuitable(
                parent,
                &format!("its snapshot on {} is another one of that name", head.path()),
            ));
        }
        if on_source.bytes != on_image.bytes {
            let why = format!(
                "its snapshots differ in size: {} bytes on {}, {} on {}",
                on_source.bytes,
                head.path(),
                on_image.bytes,
                image.path()
            );
            return Err(unsuitable(parent, &why));
        }
        if head.bytes()? < on_source.bytes {
            return Err(unsuitable(parent, "the volume is smaller now than it was then"));
        }
        for side in [head.as_ref(), &image] {
            if side.maps_invalid()? {
                return Err(unsuitable(
                    parent,
                    &format!("Ceph says that the object map of {} is invalid", side.path()),
                ));
            }
        }
        let snapshot = ParentSnapshot {
            on_source: on_source.name,
            id_on_source: on_source.id,
            on_image: on_image.name,
            bytes: on_image.bytes,
        };
        Ok((snapshot, image))
    }

    /// The record of an attempt that died, for one that goes on where it stopped, if all that it needs is still there.
    pub async fn resume(
        &self,
        earlier: &Record,
        parent: Option<&Record>,
        origin: &RbdOrigin,
        method: Method,
    ) -> Result<Option<Record>, Error> {
        let same_work = earlier.method == Some(method)
            && earlier.checkpoint.is_some()
            && earlier.parent_id == parent.map(|parent| parent.backup_id);
        let Some(source) = earlier.source.clone().filter(|_| same_work) else { return Ok(None) };
        if !self.has_lists(earlier).await? {
            return Ok(None);
        }
        let (engine, origin, mut record) = (self.clone(), origin.clone(), earlier.clone());
        let parent = parent.cloned();
        blocking(move || {
            let head = origin.head();
            let taken = head.snapshots()?.into_iter().any(|s| Some(s.id) == source.snapshot_id);
            let pool = engine.pool(&engine.connect()?, &record)?;
            let Some(image) = open(&pool, &names::image(&record), None)? else { return Ok(None) };
            let written =
                Some(image.id()?) == record.image_id && is_last_writer(&image, &record, parent.as_ref())?;
            if !taken || !written || head.id()? != source.image_id {
                return Ok(None);
            }
            let displaced = std::mem::replace(&mut record.writer, Uuid::new_v4().to_string());
            record.displaced_writer = Some(displaced);
            Ok(Some(record))
        })
        .await?
    }

    /// Copies what the plan says, from the record's checkpoint on, and keeps new ones. Completes the record with the
    /// lists of digests.
    async fn copy(&self, ctx: &Context, record: &mut Record, plan: Arc<Plan>) -> Result<(), Error> {
        let begin = record.checkpoint.map_or(0, |checkpoint| checkpoint.bytes_done);
        if let Some(checkpoint) = &record.checkpoint {
            info!(bytes = begin, "going on where an attempt before this one stopped");
            ctx.progress.add(&Counts { bytes_reused: begin, ..checkpoint.counts });
            ctx.progress.done(begin);
            // A list that the attempt before had finished when it died is made again.
            self.remove_lists(record, &record.object_digests).await?;
        }
        let mut digests = DigestWriter::create(&*self.store, record).await?;
        let transfer = Transfer {
            ctx: ctx.clone(),
            cpu: self.cpu.clone(),
            memory: self.memory.clone(),
            from: plan.from.clone(),
            to: To::Image(plan.image.clone()),
            name: plan.image.path().into(),
            digester: self.digester.clone(),
        };
        let windows = (begin..plan.volume_bytes).step_by(WINDOW_BYTES as usize);
        let tasks = stream::iter(windows)
            .then(|start| {
                let plan = plan.clone();
                async move {
                    let window = start..plan.volume_bytes.min(start + WINDOW_BYTES);
                    Ok::<_, Error>(stream::iter(blocking(move || plan.tasks(window)).await??).map(Ok))
                }
            })
            .try_flatten();
        let mut moved = std::pin::pin!(transfer.run(tasks));
        let checkpoint_bytes = self.settings.checkpoint_bytes.max(plan.volume_bytes / CHECKPOINTS_MAX);
        let (mut at, mut unsaved_bytes) = (begin, 0);
        while let Some(piece) = moved.try_next().await? {
            ctx.check()?;
            let start = piece.first_block * BLOCK_BYTES;
            let end = plan.volume_bytes.min(start + piece.blocks.len() as u64 * BLOCK_BYTES);
            plan.skipped(ctx, start - at);
            at = end;
            let mut first = piece.first_block;
            // Zeros need no digest where nothing but zeros was before.
            let groups = piece.blocks.chunk_by(|a, b| a.1 == b.1);
            for group in groups {
                if plan.parent.is_some() || !group[0].1 {
                    let group: Vec<_> = group.iter().map(|(digest, _)| *digest).collect();
                    digests.append(first, &group).await?;
                }
                first += group.len() as u64;
            }
            ctx.progress.add(&piece.counts);
            ctx.progress.done(end - start);
            unsaved_bytes += piece.counts.bytes_read;
            // Only of a snapshot is the rest later what it is now.
            if unsaved_bytes >= checkpoint_bytes && record.source.is_some() {
                plan.image.flush().await?;
                record.object_digests.push(digests.finish().await?);
                let counts = ctx.progress.read().counts;
                record.checkpoint = Some(Checkpoint { bytes_done: at, counts });
                self.save_checkpoint(record).await?;
                digests = DigestWriter::create(&*self.store, record).await?;
                unsaved_bytes = 0;
            }
        }
        plan.skipped(ctx, plan.volume_bytes - at);
        record.object_digests.push(digests.finish().await?);
        Ok(())
    }

    async fn save_checkpoint(&self, record: &Record) -> Result<(), Error> {
        let catalog = Catalog::new(self.store.clone());
        let saved = catalog
            .update(record.backup_id, |current| record.stands(Some(current)).then(|| record.clone()))
            .await?;
        match saved {
            Updated::To(_) => Ok(()),
            Updated::Not(current) => Err(Error::displaced(record.backup_id, current.as_ref())),
        }
    }
}

/// Why an attempt that died had given this method up, if it has left a checkpoint of one further down in the plan: by this
/// one the job would begin anew, and what that attempt has copied would be removed.
pub fn given_up(earlier: &Record, method: Method) -> Option<Problem> {
    earlier.checkpoint?;
    let order = |method: Method| (!is_differential(method), method.mode == Some(Share::Full));
    earlier.fallback_reason.clone().filter(|_| earlier.method.is_some_and(|made| order(method) < order(made)))
}

/// Makes sure that no other job writes to the image.
fn lock(image: &Image) -> Result<(), Error> {
    image.lock().map_err(|source| match source.kind() {
        ErrorKind::ReadOnlyFilesystem | ErrorKind::ResourceBusy => {
            Error::ImageInUse { image: image.path().into() }
        }
        _ => source.into(),
    })
}

/// Says on an image that is locked who writes to it from now on.
fn sign(image: &Image, record: &Record) -> Result<(), Error> {
    let job = record.job_id.map_or_else(String::new, |id| id.to_string());
    image.set_metadata(JOB_KEY, &job)?;
    Ok(image.set_metadata(WRITER_KEY, &record.writer)?)
}

/// Whether no other job has written to the image since an attempt of this one has: that would show in what the attempt has
/// copied, which is not compared with the parent again. Cinder signs nothing, but leaves its snapshot.
fn is_last_writer(image: &Image, record: &Record, parent: Option<&Record>) -> Result<bool, Error> {
    if image.metadata(JOB_KEY)? != record.job_id.map(|id| id.to_string()) {
        return Ok(false);
    }
    let Some(parent) = parent else { return Ok(true) };
    let snapshots = image.snapshots()?;
    let of = |id| move |snapshot: &&Snapshot| names::backup_of(&snapshot.name) == Some(id);
    let since = snapshots.iter().filter(of(parent.backup_id)).map(|snapshot| snapshot.id).max();
    Ok(!snapshots.iter().any(|found| Some(found.id) > since && !of(record.backup_id)(&found)))
}

/// Takes the image away from an attempt of the same job that may still live: the cluster is to refuse all that it
/// still writes. Another job keeps it.
pub(super) fn shut_out(image: &Image, record: &Record) -> Result<(), Error> {
    let job = record.job_id.map(|id| id.to_string());
    if job.is_some() && image.metadata(JOB_KEY)? == job {
        image.break_lock()?;
    }
    Ok(())
}

impl Plan {
    /// Counts bytes that did not have to be looked at.
    fn skipped(&self, ctx: &Context, bytes: u64) {
        let mut counts = Counts::default();
        match self.parent {
            Some(_) => counts.bytes_unchanged = bytes,
            None => counts.bytes_hole = bytes,
        }
        ctx.progress.add(&counts);
        ctx.progress.done(bytes);
    }

    /// What of a part of the volume is to be copied. Blocks.
    fn tasks(&self, window: Range<u64>) -> Result<Vec<Task>, Error> {
        let failed = |source| Error::DiffFailed { source };
        let task = |piece| Task { piece, stale: Vec::new(), expected: None, complete: false };
        let (Some(parent), Some(snapshot)) = (&self.parent, &self.snapshot) else {
            let data = match (&self.snapshot, self.differential) {
                (Some(snapshot), true) => existing(snapshot.image(), window).map_err(failed)?,
                _ => self.data(window)?,
            };
            let extents: Vec<Extent> = data.into_iter().map(|range| extent(range, true)).collect();
            return Ok(pieces(&extents, self.volume_bytes).into_iter().map(task).collect());
        };
        let mut extents = changed(snapshot.image(), &parent.on_source, window.clone()).map_err(failed)?;
        // What was written to the image since the parent, by a later backup or by one that failed, is copied again.
        let written = changed(&self.image, &parent.on_image, window.clone()).map_err(failed)?;
        extents.extend(written.into_iter().map(|extent| Extent { exists: true, ..extent }));
        // The last block of a volume that has grown is a longer one now.
        if parent.bytes < self.volume_bytes && window.contains(&parent.bytes) {
            let start = parent.bytes / BLOCK_BYTES * BLOCK_BYTES;
            extents.push(extent(start..parent.bytes, true));
        }
        let stale = existing(&self.image, window).map_err(failed)?;
        let pieces = pieces(&united(extents), self.volume_bytes).into_iter();
        Ok(pieces
            .map(|piece| {
                let stale = super::transfer::overlaps(&piece.range, &stale);
                Task { stale, ..task(piece) }
            })
            .collect())
    }

    /// The data of a part of a volume of any kind.
    fn data(&self, window: Range<u64>) -> Result<Vec<Range<u64>>, Error> {
        let mut data: Vec<Range<u64>> = Vec::new();
        let mut at = window.start;
        while let Some(next) = self
            .volume
            .next_data(at, window.end)
            .map_err(|source| Error::ReadVolume { offset: at, source })?
        {
            at = next.end;
            data.push(next);
        }
        Ok(data)
    }
}

fn extent(range: Range<u64>, exists: bool) -> Extent {
    Extent { offset: range.start, length: range.end - range.start, exists }
}

/// Extents from several sides, in order and apart from each other. Where one says that there is something, it is looked
/// at, whatever another says.
fn united(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.retain(|extent| extent.length > 0);
    extents.sort_by_key(|extent| extent.offset);
    let mut united: Vec<Extent> = Vec::with_capacity(extents.len());
    for next in extents {
        match united.last_mut() {
            Some(last) if next.offset < last.end() => {
                last.length = last.end().max(next.end()) - last.offset;
                last.exists = last.exists || next.exists;
            }
            _ => united.push(next),
        }
    }
    united
}

fn unsuitable(parent: &Record, why: &str) -> Error {
    Error::ParentUnsuitable { parent_id: parent.backup_id, why: why.into() }
}
