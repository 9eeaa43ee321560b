//! Makes, reads back and removes backups, by the one method that it is asked for, or says why not.
//!
//! An engine works on one store, with the volumes that jobs name. It must not know messages, the broker or events,
//! and it never runs a job a second time: that is for `runner`.

pub(crate) mod catalog;
pub mod chunked;
mod cpu;
mod error;
mod gc;
#[cfg(feature = "ceph")]
pub mod rbd;
mod source;
mod volumes;

pub use catalog::{Begun, Catalog, KEPT, KeptOutcome, Listing, Updated, describe};
pub use cpu::Cpu;
pub use error::Error;
pub use gc::{Found, Garbage, Kind};
pub use source::Source;
pub use volumes::Volumes;

use jiff::Timestamp;
use tracing::warn;

use crate::error::{Causes, Class, Problem};
use crate::job::{
    BackupId, BackupWork, Cancelled, Context, Counts, Job, JobId, Method, Mode, Parent, Record, RecordState,
    RestoreWork, Strategy, Verified, VerifyWork, VolumeId, Work,
};

#[cfg(feature = "ceph")]
use crate::job::Location;
#[cfg(feature = "ceph")]
use crate::volume::rbd::RbdOrigin;

use chunked::Chunked;
use cpu::blocking;
#[cfg(feature = "ceph")]
use rbd::Rbd;

/// What a method did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Receipt {
    /// The backup that a new one builds on.
    pub parent_id: Option<BackupId>,
    /// The volume's size.
    pub volume_bytes: u64,
    /// What was moved.
    pub counts: Counts,
    /// The digest over the volume's block digests; none of a delete.
    pub digest: Option<String>,
}

/// What keeps the data of a store's backups, and in which form.
#[derive(Debug, Clone)]
pub enum Format {
    /// Objects, as Cinder's chunked drivers write them.
    Chunked(Chunked),
    /// RBD images, as Cinder's Ceph driver makes them.
    #[cfg(feature = "ceph")]
    Rbd(Rbd),
}

impl From<Chunked> for Format {
    fn from(chunked: Chunked) -> Self {
        Self::Chunked(chunked)
    }
}

#[cfg(feature = "ceph")]
impl From<Rbd> for Format {
    fn from(rbd: Rbd) -> Self {
        Self::Rbd(rbd)
    }
}

/// Works on one store.
#[derive(Debug, Clone)]
pub struct Engine {
    catalog: Catalog,
    format: Format,
    volumes: Volumes,
}

impl Engine {
    /// Puts an engine together.
    pub fn new(format: impl Into<Format>, volumes: Volumes) -> Self {
        let format = format.into();
        let store = match &format {
            Format::Chunked(chunked) => chunked.store(),
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.store(),
        };
        Self { catalog: Catalog::new(store), format, volumes }
    }

    /// The strategies that the store can make a backup of this source with, the best one first.
    pub fn strategies(&self, work: &Work) -> Vec<Strategy> {
        match (&self.format, work) {
            (Format::Chunked(_), _) => vec![Strategy::Chunked],
            #[cfg(feature = "ceph")]
            (Format::Rbd(_), Work::Backup(work)) => match &work.source {
                Location::Rbd(image) if image.snapshot.is_none() => vec![Strategy::Rbd, Strategy::Copy],
                // Of a file nobody knows what has changed, and of a snapshot there is no later one to compare with.
                _ => vec![Strategy::Copy],
            },
            #[cfg(feature = "ceph")]
            (Format::Rbd(_), _) => vec![Strategy::Rbd],
        }
    }

    /// The same engine on the same store, for volumes that are elsewhere.
    pub fn with_volumes(&self, volumes: Volumes) -> Self {
        Self { volumes, ..self.clone() }
    }

    /// Whether there is anything at the place that a job restores to, as far as one can see.
    pub async fn target_is_there(&self, work: &RestoreWork) -> bool {
        self.volumes.is_there(&work.target).await
    }

    /// The metadata of the volume that was kept with a backup, as Cinder writes it.
    pub async fn volume_meta(&self, id: BackupId) -> Result<Option<String>, Error> {
        let record = self.catalog.available(id).await?;
        match &self.format {
            Format::Chunked(chunked) => chunked.volume_meta(&record).await,
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.volume_meta(&record).await,
        }
    }

    /// The records of the store.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Does the job by this method.
    pub async fn run(&self, ctx: &Context, job: &Job, method: Method) -> Result<Receipt, Error> {
        match &job.work {
            // These two look whether they are to end: a backup that is done already is found done, whoever wants its end,
            // and what was restored of an image is removed.
            Work::Backup(work) => self.backup(ctx, job.id, work, method).await,
            Work::Restore(work) => self.restore(ctx, job.id, work).await,
            _ if ctx.cancel.is_cancelled() => Err(Cancelled.into()),
            Work::Verify(work) => self.verify(ctx, job.id, *work).await,
            Work::Delete(id) => self.delete(ctx, job.id, *id).await,
        }
    }

    async fn backup(
        &self,
        ctx: &Context,
        job_id: JobId,
        work: &BackupWork,
        method: Method,
    ) -> Result<Receipt, Error> {
        let earlier = self.catalog.record(work.backup_id).await?;
        if let Some(record) = &earlier {
            if record.volume_id != work.volume_id {
                return Err(Error::BackupExists(work.backup_id));
            }
            match &record.state {
                // The job was done, and whoever did it died before it could say so.
                RecordState::Available if record.job_id == Some(job_id) => return Ok(receipt(record)),
                RecordState::Creating(owner) if *owner == job_id => {}
                // The job was cancelled, and whoever ended it died before that was told, or before all was removed.
                RecordState::Deleting(owner) if *owner == job_id => {
                    self.remove(record, &Context::default()).await?;
                    return Err(Cancelled.into());
                }
                // Somebody has brought the job back.
                RecordState::Error(_)
                    if record.job_id == Some(job_id) && record.revival_count < ctx.hold.revival_count => {}
                // Whoever was at it died before that was told, or before all was removed.
                RecordState::Error(problem) if record.job_id == Some(job_id) => {
                    let error =
                        Error::CameToNothing { backup_id: work.backup_id, problem: problem.to_string() };
                    self.remove(record, &Context::default()).await?;
                    return Err(error);
                }
                _ => return Err(Error::BackupExists(work.backup_id)),
            }
        }
        ctx.check()?;
        // After the record was looked at: what another run writes from here on, the record tells.
        self.catalog.check_held(job_id, work.backup_id, &ctx.hold).await?;
        // Of what has failed for good nothing is left to go on with.
        let unfinished = earlier.as_ref().filter(|record| matches!(record.state, RecordState::Creating(_)));
        #[cfg(feature = "ceph")]
        if let (Format::Rbd(_), Some(earlier)) = (&self.format, unfinished)
            && let Some(reason) = rbd::given_up(earlier, method)
        {
            return Err(Error::GivenUp(reason));
        }
        let parent = match (method.mode, work.parent) {
            // What a chain lacks, nothing on top of it could be restored without.
            (Some(Mode::Incremental), Parent::Given(id)) => {
                let parent = self.parent(id, work.volume_id).await?;
                self.catalog.chain(id).await?;
                Some(parent)
            }
            (Some(Mode::Incremental), _) => {
                let latest = self.catalog.latest(work.volume_id, work.backup_id).await?;
                let latest = latest.ok_or(Error::NoParent(work.volume_id))?;
                let chain = self.catalog.chain(latest.backup_id).await;
                chain.map_err(|error| error.of_chosen_chain(latest.backup_id))?;
                Some(latest)
            }
            (Some(Mode::Full) | None, _) => None,
        };
        let source = self.volumes.source(&work.source).await?;
        #[cfg(feature = "ceph")]
        let origin = source.origin();

        let resumed = self.resumed(unfinished, parent.as_ref(), &source, method).await?;
        let mut record = match (resumed, unfinished) {
            (Some(resumed), Some(earlier)) => self.displace(earlier, resumed).await?,
            _ => self.begin(ctx, job_id, work, parent.as_ref(), &source, method, earlier).await?,
        };
        record.fallback_reason = ctx.fallback_reason.clone().or(record.fallback_reason);
        if let Some(parent) = &parent {
            self.catalog.check_listed(work.backup_id).await?;
            // From now on a delete of the parent sees its child; one that had begun before has left its mark on the parent.
            if let Err(error) = self.parent(parent.backup_id, work.volume_id).await {
                return Err(match work.parent {
                    // Nobody asked for just this one.
                    Parent::None | Parent::Latest => error.of_chosen_parent(),
                    Parent::Given(_) => error,
                });
            }
        }

        let copied = self.copy(ctx, &mut record, work, parent.as_ref(), source).await;
        // Sooner than below, so that nothing becomes visible that must go again.
        let current = self.catalog.record(work.backup_id).await?;
        if !record.stands(current.as_ref()) {
            drop(copied);
            return Err(self.give_way(&record, current).await);
        }
        let unfinished = copied?;
        #[cfg(feature = "ceph")]
        if let Some(origin) = origin.clone() {
            let taken = record.source.clone();
            blocking(move || origin.check_still_there(taken.as_ref())).await??;
        }
        let finished = match unfinished {
            Unfinished::Chunked(unfinished) => unfinished.finish().await,
            #[cfg(feature = "ceph")]
            Unfinished::Rbd(unfinished) => unfinished.finish().await,
        };
        if let Err(error) = finished {
            // Another one may have taken over since, and have had the cluster shut this one out.
            let current = self.catalog.record(work.backup_id).await?;
            return Err(match record.stands(current.as_ref()) {
                true => error,
                false => self.give_way(&record, current).await,
            });
        }
        let done = Record { state: RecordState::Available, checkpoint: None, ..record.clone() };
        let saved = self
            .catalog
            .update(work.backup_id, |current| record.stands(Some(current)).then(|| done.clone()))
            .await?;
        let record = match saved {
            Updated::To(record) => record,
            // It was written, though that could not be told.
            Updated::Not(Some(current)) if current.is_done_of(&record) => current,
            Updated::Not(current) => return Err(self.give_way(&record, current).await),
        };
        #[cfg(feature = "ceph")]
        if let Some(origin) = origin
            && let Err(error) = self.trim(&record, origin).await
        {
            warn!(error = %Causes(&error), "snapshots of older backups stay on the volume");
        }
        Ok(receipt(&record))
    }

    /// Ends an attempt of which the record says that it is not its own any more; says why.
    async fn give_way(&self, record: &Record, current: Option<Record>) -> Error {
        // Whoever took over removed what there was of ours then, and does not know of what came after it. What is whole was not
        // taken over.
        if current.as_ref().is_none_or(|current| !current.is_done_of(record))
            && let Err(error) = self.remove_attempt(record, current.as_ref()).await
        {
            // That must not look like the end of the job.
            warn!(error = %Causes(&error), "some of what a job had written that was taken over could not be removed");
        }
        Error::displaced(record.backup_id, current.as_ref())
    }

    /// Writes the record of a new attempt over that of an earlier one, which can save nothing more then.
    async fn displace(&self, earlier: &Record, record: Record) -> Result<Record, Error> {
        let is_earlier =
            |current: &Record| current.writer == earlier.writer && current.state == earlier.state;
        let saved = self
            .catalog
            .update(record.backup_id, |current| is_earlier(current).then(|| record.clone()))
            .await?;
        match saved {
            Updated::To(record) => Ok(record),
            // Another worker that was handed the same job was faster.
            Updated::Not(current) => Err(Error::displaced(record.backup_id, current.as_ref())),
        }
    }

    /// The record of an attempt that died, if this one can go on where that one stopped.
    #[cfg_attr(not(feature = "ceph"), allow(unused_variables, clippy::unused_async))]
    async fn resumed(
        &self,
        earlier: Option<&Record>,
        parent: Option<&Record>,
        source: &Source,
        method: Method,
    ) -> Result<Option<Record>, Error> {
        match (&self.format, earlier, source) {
            #[cfg(feature = "ceph")]
            (Format::Rbd(rbd), Some(earlier), Source::Rbd(origin)) => {
                rbd.resume(earlier, parent, origin, method).await
            }
            _ => Ok(None),
        }
    }

    /// Makes the record that a backup begins with. What an attempt that died has left, and this one can make no use of, is
    /// removed.
    #[allow(clippy::too_many_arguments)]
    async fn begin(
        &self,
        ctx: &Context,
        job_id: JobId,
        work: &BackupWork,
        parent: Option<&Record>,
        source: &Source,
        method: Method,
        earlier: Option<Record>,
    ) -> Result<Record, Error> {
        let mut record = match &self.format {
            Format::Chunked(chunked) => chunked.begin(job_id, work, parent, source.bytes(), method)?,
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.begin(job_id, work, parent, source.bytes(), method)?,
        };
        record.revival_count = ctx.hold.revival_count;
        if let Some(earlier) = &earlier {
            // Names have the time in them, in seconds; an attempt that died must not have the same ones.
            let after = earlier.created_at + jiff::SignedDuration::from_secs(1);
            record.created_at = record.created_at.max(after);
            record.displaced_writer = Some(earlier.writer.clone());
        }
        if let Some(parent) = parent {
            // Clocks differ, and the time of the parent may have been put off as above; it is older all the same. No more
            // than needed, so that what is begun after this one is not older than it.
            let after = parent.created_at + jiff::SignedDuration::from_nanos(1);
            record.created_at = record.created_at.max(after);
        }
        self.name(&mut record);
        #[cfg(feature = "ceph")]
        let record = rbd::with_source_snapshot(record, source).await?;
        match earlier {
            // Its names are not ours, so that it can do no harm if it still lives.
            Some(earlier) => {
                let record = self.displace(&earlier, record).await?;
                match &self.format {
                    // What it has stored goes at the end of this attempt, which takes over what it can use of that.
                    Format::Chunked(_) if earlier.container == record.container => {
                        #[cfg(feature = "ceph")]
                        self.remove_source_snapshot(&earlier, None).await?;
                    }
                    _ => self.remove_attempt(&earlier, None).await?,
                }
                Ok(record)
            }
            None => match self.create(&record).await {
                Err(error @ (Error::BackupExists(_) | Error::NotRecorded { .. })) => {
                    let current = self.catalog.record(work.backup_id).await?;
                    // Another worker may have begun the same job since we looked.
                    let same_job = current.is_some_and(|current| current.job_id == Some(job_id));
                    Err(if same_job { Error::TakenOver(work.backup_id) } else { error })
                }
                Err(error) => Err(error),
                // Another run may have ended the job, and have left no record of the backup.
                Ok(()) => match self.catalog.check_held(job_id, work.backup_id, &ctx.hold).await {
                    Err(error @ Error::TakenOver(_)) => {
                        self.withdraw(&record).await?;
                        Err(error)
                    }
                    held => held.map(|()| record),
                },
            },
        }
    }

    /// Makes the record of a backup. There must be nothing of it yet: what is there would be removed as this one's own.
    async fn create(&self, record: &Record) -> Result<(), Error> {
        #[cfg(feature = "ceph")]
        if let Format::Rbd(rbd) = &self.format {
            rbd.check_unused(record).await?;
        }
        self.catalog.create(record).await
    }

    /// Removes the record of a backup that was begun and that nobody wants any more, before there is anything of it.
    async fn withdraw(&self, record: &Record) -> Result<(), Error> {
        let mark = |current: &Record| (current == record).then(|| deleting(current, JobId::random()));
        match self.catalog.update(record.backup_id, mark).await? {
            Updated::To(_) => self.catalog.remove(record.backup_id).await,
            Updated::Not(_) => Ok(()),
        }
    }

    /// Removes the snapshots that were taken for older backups from a volume, so that not too many stay; never those of
    /// backups that are being made.
    #[cfg(feature = "ceph")]
    async fn trim(&self, record: &Record, origin: RbdOrigin) -> Result<(), Error> {
        let Some(newest) = &record.source else { return Ok(()) };
        let count_max = match &self.format {
            Format::Chunked(chunked) => chunked.source_snapshots_max(),
            Format::Rbd(rbd) => rbd.source_snapshots_max(),
        };
        if count_max == 0 {
            return Ok(());
        }
        let records = self.catalog.records().await?.records;
        if let Format::Rbd(_) = self.format {
            let is_being_made = |record: &&Record| matches!(record.state, RecordState::Creating(_));
            let being_made = records.iter().filter(is_being_made).map(|record| record.backup_id).collect();
            return blocking(move || rbd::trim(&origin, count_max as usize, &being_made)).await?;
        }
        // Those of other stores are not ours to remove.
        let newest_first = records.into_iter().rev();
        let taken = newest_first
            .filter(|other| other.volume_id == record.volume_id && other.state == RecordState::Available)
            .filter_map(|other| other.source)
            .filter(|taken| taken.image_id == newest.image_id);
        let taken: Vec<_> = taken.skip(count_max as usize).collect();
        Ok(blocking(move || origin.trim(&taken)).await??)
    }

    async fn copy(
        &self,
        ctx: &Context,
        record: &mut Record,
        work: &BackupWork,
        parent: Option<&Record>,
        source: Source,
    ) -> Result<Unfinished, Error> {
        let volume_meta = work.volume_meta.as_deref();
        Ok(match &self.format {
            Format::Chunked(chunked) => {
                let source = source.open(record, parent).await?;
                Unfinished::Chunked(Box::new(chunked.backup(ctx, record, volume_meta, parent, source).await?))
            }
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => Unfinished::Rbd(rbd.backup(ctx, record, volume_meta, parent, source).await?),
        })
    }

    /// Gives the objects of a backup the names that its time asks for.
    fn name(&self, record: &mut Record) {
        match &self.format {
            Format::Chunked(chunked) => chunked.name(record),
            // An image has the backup's id in its name, and nothing of its time.
            #[cfg(feature = "ceph")]
            Format::Rbd(_) => {}
        }
    }

    /// Removes all of a backup but its record.
    async fn remove(&self, record: &Record, ctx: &Context) -> Result<(), Error> {
        match &self.format {
            Format::Chunked(chunked) => {
                chunked.remove(record, ctx).await?;
                if record.displaced_writer.is_some() {
                    chunked.remove_earlier_attempts(record, ctx).await?;
                }
            }
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => {
                let others = self.catalog.others(record.backup_id).await?;
                rbd.remove(record, ctx, &others).await?;
            }
        }
        #[cfg(feature = "ceph")]
        match self.remove_from_source(record).await {
            Err(error) if error.class() == Class::Permanent => match (error, &record.source) {
                // Without the record nobody finds the snapshot again. That of a backup that came to nothing stays.
                (Error::Ceph(source), Some(taken))
                    if !source.is_unknown_cluster() && !matches!(record.state, RecordState::Error(_)) =>
                {
                    return Err(Error::SnapshotStays { snapshot: taken.image.to_string(), source });
                }
                // Its cluster may be known no more, and the backup is to go all the same.
                (error, _) => {
                    warn!(error = %Causes(&error), "the snapshot of the backup stays on the volume");
                }
            },
            removed => removed?,
        }
        Ok(())
    }

    /// Removes the snapshot that a backup was made of from the volume.
    #[cfg(feature = "ceph")]
    async fn remove_from_source(&self, record: &Record) -> Result<(), Error> {
        match (&record.source, &self.format) {
            (Some(taken), _) => self.volumes.remove_snapshots(&taken.image, vec![taken.clone()]).await,
            // Cinder leaves it there, and does not say where that is; but no other snapshot has such a name.
            (None, Format::Rbd(_)) if record.job_id.is_none() => {
                let (image, id) = (rbd::source_image(record.volume_id), record.backup_id);
                let is_its_own = move |snapshot: &str| rbd::backup_of(snapshot) == Some(id);
                self.volumes.remove_snapshots_somewhere(image, is_its_own).await.map(drop)
            }
            (None, _) => Ok(()),
        }
    }

    /// Removes what an attempt has left that came to nothing, and nothing of the one that went on with its job, of which
    /// the record is `current`: that may be done by now.
    #[cfg_attr(not(feature = "ceph"), allow(unused_variables))]
    async fn remove_attempt(&self, record: &Record, current: Option<&Record>) -> Result<(), Error> {
        let current = current.filter(|current| !matches!(current.state, RecordState::Deleting(_)));
        match &self.format {
            // The names of its objects are its own.
            Format::Chunked(chunked) => chunked.remove(record, &Context::default()).await?,
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.remove_attempt(record, current).await?,
        }
        #[cfg(feature = "ceph")]
        self.remove_source_snapshot(record, current).await?;
        Ok(())
    }

    /// Removes the snapshot of the volume that was taken for an attempt, unless the one that went on with its job uses it.
    #[cfg(feature = "ceph")]
    async fn remove_source_snapshot(&self, record: &Record, current: Option<&Record>) -> Result<(), Error> {
        match &record.source {
            Some(taken)
                if current
                    .and_then(|current| current.source.as_ref())
                    .is_none_or(|other| other.image != taken.image) =>
            {
                self.volumes.remove_snapshots(&taken.image, vec![taken.clone()]).await
            }
            _ => Ok(()),
        }
    }

    /// Whether the store has nothing any more of what makes a backup visible that was whole: somebody has deleted it who does
    /// not know of its record.
    pub async fn has_lost(&self, id: BackupId) -> Result<bool, Error> {
        Ok(match self.catalog.record(id).await? {
            Some(record) => record.state == RecordState::Available && !self.is_visible(&record).await?,
            None => false,
        })
    }

    async fn is_visible(&self, record: &Record) -> Result<bool, Error> {
        match &self.format {
            Format::Chunked(chunked) => chunked.is_visible(record).await,
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.is_visible(record).await,
        }
    }

    async fn parent(&self, id: BackupId, volume_id: VolumeId) -> Result<Record, Error> {
        let parent = self.catalog.record(id).await?.ok_or(Error::UnknownParent(id))?;
        if parent.volume_id != volume_id {
            let parent_volume_id = parent.volume_id;
            return Err(Error::ParentOfAnotherVolume { parent_id: id, parent_volume_id, volume_id });
        }
        match &parent.state {
            RecordState::Available => Ok(parent),
            state => Err(Error::ParentNotAvailable { parent_id: id, state: describe(state) }),
        }
    }

    async fn restore(&self, ctx: &Context, job_id: JobId, work: &RestoreWork) -> Result<Receipt, Error> {
        let record = self.catalog.available(work.backup_id).await;
        // A backup that was deleted and made again has another writer.
        let name = |record: &Record| format!("{job_id} {} {}", record.backup_id, record.writer);
        if ctx.check().is_err() {
            if let Ok(record) = &record
                && !ctx.hand_back.is_cancelled()
                && let Err(error) =
                    self.volumes.discard(&work.target, record.volume_bytes, name(record)).await
            {
                warn!(error = %Causes(&error), "what there is of the volume that was restored to could not be removed");
            }
            return Err(Cancelled.into());
        }
        let record = record?;
        let restore = name(&record);
        let target = self.volumes.target(&work.target, record.volume_bytes, restore).await?;
        let chain = self.catalog.chain(work.backup_id).await?;
        let volume = target.clone().into_volume();
        let restored = async {
            let digest = match &self.format {
                Format::Chunked(chunked) => Some(chunked.restore(ctx, &chain, volume.clone()).await?),
                #[cfg(feature = "ceph")]
                Format::Rbd(rbd) => rbd.read_back(ctx, &chain, target.into(), None).await?,
            };
            // Whoever has the job by now may have told that it failed, and nothing is to appear after that.
            self.catalog.check_held(job_id, work.backup_id, &ctx.hold).await?;
            ctx.check()?;
            let volume = volume.clone();
            let finished = blocking(move || volume.finish()).await?;
            finished.map(|()| digest).map_err(|source| Error::FinishVolume { source })
        };
        match restored.await {
            Ok(digest) => Ok(read_receipt(ctx, &chain[0], digest)),
            Err(error) => {
                if volume.is_changed() {
                    ctx.progress.leave_target_unfinished();
                }
                if error.is_damage() {
                    // Somebody may have begun to delete it.
                    self.catalog.chain(work.backup_id).await?;
                }
                let goes_on = match &error {
                    Error::TakenOver(_) => self.catalog.is_claimed(job_id).await.unwrap_or(false),
                    error => error.class() == Class::Cancelled && ctx.hand_back.is_cancelled(),
                };
                // After any other error this is the end of the job, or it begins anew.
                if goes_on {
                    volume.leave();
                }
                Err(error)
            }
        }
    }

    /// Reads a backup, or a sample of it, to find what is wrong with it: in objects all of it, in RBD images the first. Keeps when
    /// it was found whole.
    async fn verify(&self, ctx: &Context, job_id: JobId, work: VerifyWork) -> Result<Receipt, Error> {
        let chain = self.catalog.chain(work.backup_id).await?;
        // A job that is tried again takes the same sample, the next job another one.
        let sample = work.sample.map(|sample| (sample, job_id.seed()));
        let mut faults = Faults::default();
        let read = match &self.format {
            Format::Chunked(chunked) => chunked.verify(ctx, &chain, sample, &mut faults).await.map(Some),
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.read_back(ctx, &chain, rbd::To::Nowhere, sample).await,
        };
        let digest = match read {
            Ok(digest) => digest,
            Err(error) => {
                faults.take(error)?;
                None
            }
        };
        if !faults.found.is_empty() {
            // Somebody may have begun to delete it.
            self.catalog.chain(work.backup_id).await?;
            return Err(self.damaged(&chain, faults).await);
        }
        // A sample proves less than what is kept of the whole.
        // What is kept, and cannot be read, is written anew.
        let kept = self.catalog.verified(work.backup_id).await.ok().flatten();
        if work.sample.is_none() || kept.is_none_or(|kept| kept.sample_percent.is_some()) {
            let verified = Verified { at: Timestamp::now(), sample_percent: work.sample };
            // The store may be full, or not to be written any more. The proof counts; only `show` does not tell of it.
            if let Err(error) = self.catalog.keep_verified(work.backup_id, &verified).await {
                warn!(error = %Causes(&error), "the backup is whole, and that could not be kept in the store");
            }
        }
        Ok(read_receipt(ctx, &chain[0], digest.filter(|_| work.sample.is_none())))
    }

    /// Says what is wrong with `chain[0]`, and which other backups lack the same.
    async fn damaged(&self, chain: &[Record], mut faults: Faults) -> Error {
        let backup_id = chain[0].backup_id;
        let owner = |error: &Error| {
            let text = error.to_string();
            let named = |record: &&Record| {
                text.contains(&record.service_metadata) && !record.service_metadata.is_empty()
                    || text.contains(&record.backup_id.to_string())
            };
            chain.iter().find(named).map_or(backup_id, |record| record.backup_id)
        };
        let owners: Vec<BackupId> = faults.found.iter().map(owner).collect();
        // That must not hide what was found.
        let sharing = self.catalog.with_all_children(&owners).await.unwrap_or_default();
        let others: Vec<String> =
            sharing.iter().filter(|id| **id != backup_id).map(ToString::to_string).collect();
        let shared = match others.as_slice() {
            // It says all that there is to say.
            [] if faults.found.len() == 1 => return faults.found.remove(0),
            [] => String::new(),
            [one] => format!("; backup {one} shares what is damaged"),
            several => format!("; the backups {} share what is damaged", several.join(", ")),
        };
        let mut texts: Vec<String> = faults.found.iter().map(|error| Causes(error).to_string()).collect();
        if faults.more_count > 0 {
            texts.push(format!("and {} more", faults.more_count));
        }
        Error::DamagedBackup { backup_id, faults: texts.join("; "), shared }
    }

    /// Removes the data of a backup. Its record goes with [`Catalog::conclude`].
    async fn delete(&self, ctx: &Context, job_id: JobId, id: BackupId) -> Result<Receipt, Error> {
        let (state_before, record) = loop {
            let before = self.catalog.record(id).await?.ok_or(Error::UnknownBackup(id))?;
            // One that is to stay is not even marked: who reads or builds on it meanwhile would take it for lost.
            if !matches!(before.state, RecordState::Deleting(_)) {
                has_none(id, self.catalog.children(id).await?)?;
            }
            self.catalog.check_held(job_id, id, &ctx.hold).await?;
            // A backup whose job died, or is lost, may be deleted too. If the job lives, it finds that out at its end.
            let mark = |current: &Record| (*current == before).then(|| deleting(current, job_id));
            match self.catalog.update(id, mark).await {
                Ok(Updated::To(record)) => break (before.state, record),
                // It has become whole, or gone, since we looked.
                Ok(Updated::Not(_)) => {}
                // It is the delete that makes room. Nobody can begin to build on the backup either.
                Err(error) if error.is_full() => {
                    warn!("the store is full: the backup is deleted without being marked as such first");
                    break (before.state.clone(), before);
                }
                Err(error) => return Err(error),
            }
        };
        self.delete_marked(ctx, job_id, state_before, record).await
    }

    /// Removes the data of a backup that this job has marked, which was in `state_before`.
    async fn delete_marked(
        &self,
        ctx: &Context,
        job_id: JobId,
        state_before: RecordState,
        record: Record,
    ) -> Result<Receipt, Error> {
        let id = record.backup_id;
        // Only after the mark is set: a backup that begins to build on this one either is seen here, or sees the mark.
        let children = self.catalog.children(id).await;
        if !matches!(&children, Ok(children) if children.is_empty()) {
            // An earlier try may have removed some of it; what is no longer visible must not seem whole again.
            let state = match state_before {
                RecordState::Deleting(_) if self.is_visible(&record).await? => RecordState::Available,
                state => state,
            };
            let unmark = |current: &Record| {
                let as_before = || Record { state: state.clone(), ..current.clone() };
                (current.state == RecordState::Deleting(job_id)).then(as_before)
            };
            self.catalog.update(id, unmark).await?;
            has_none(id, children?)?;
        }
        self.remove(&record, ctx).await?;
        if record.state != RecordState::Deleting(job_id) {
            // There is room for the mark now, without which no record goes.
            self.catalog
                .update(id, |current| (*current == record).then(|| deleting(current, job_id)))
                .await?;
        }
        Ok(Receipt {
            parent_id: record.parent_id,
            volume_bytes: record.volume_bytes,
            counts: ctx.progress.read().counts,
            digest: None,
        })
    }

    /// Removes what a backup that came to nothing left behind. With a problem, its record stays and tells it; without
    /// one, because the job was cancelled, that goes with [`Catalog::conclude`]. If another worker that was handed the job has made the backup
    /// meanwhile, it stays, and this is its receipt.
    pub async fn abandon(&self, job: &Job, problem: Option<&Problem>) -> Result<Option<Receipt>, Error> {
        let Work::Backup(work) = &job.work else { return Ok(None) };
        let id = work.backup_id;
        let mark = |current: &Record| {
            let state = match problem {
                Some(problem) => RecordState::Error(problem.clone()),
                None => RecordState::Deleting(job.id),
            };
            let is_own = match current.state {
                RecordState::Creating(owner) | RecordState::Deleting(owner) => owner == job.id,
                RecordState::Available | RecordState::Error(_) => false,
            } && current.volume_id == work.volume_id;
            is_own.then(|| Record { state, ..current.clone() })
        };
        // The mark first: from then on nobody makes visible, or goes on with, what is removed here.
        let (record, marked) = match self.catalog.update(id, mark).await {
            Ok(Updated::To(record)) => (record, true),
            Ok(Updated::Not(current)) => {
                let is_done = |record: &Record| {
                    record.state == RecordState::Available
                        && record.job_id == Some(job.id)
                        && record.volume_id == work.volume_id
                };
                return Ok(current.filter(is_done).as_ref().map(receipt));
            }
            // It is what is removed here that makes room.
            Err(error) if error.is_full() => match self.catalog.record(id).await? {
                Some(record) if mark(&record).is_some() => (record, false),
                _ => return Err(error),
            },
            Err(error) => return Err(error),
        };
        self.remove(&record, &Context::default()).await?;
        if !marked {
            self.catalog.update(id, mark).await?;
        }
        Ok(None)
    }

    /// Takes in a backup that Cinder exported, whose objects lie in this store; its parent goes first. All of the
    /// backup is looked at, none of its data: `verify` does that.
    pub async fn import(&self, record: Record) -> Result<Record, Error> {
        let record = self.inspected(record).await?;
        match self.catalog.create(&record).await {
            // Its data lies here, so that the way out of the error on a new backup, a delete, would cost it.
            Err(Error::BackupExists(backup_id)) => {
                Err(Error::NotImportable { backup_id, why: "it is in this store already".into() })
            }
            result => result.map(|()| record),
        }
    }

    /// Takes in a backup that Cinder made after an attempt of ours had been given up, of which the store has the record
    /// `earlier`: what that one has stored is removed. If it still lives, it finds that out, as when another one takes over.
    pub async fn import_over(&self, earlier: &Record, record: Record) -> Result<(), Error> {
        let record = self.inspected(record).await?;
        let record = self.displace(earlier, record).await?;
        self.remove_attempt(earlier, Some(&record)).await
    }

    /// Takes in what there is of a backup of Cinder's that is no whole one, and why it is not, only to be deleted; over the
    /// record of an attempt of ours, as [`Engine::import_over`], if there is one.
    pub async fn import_to_delete(
        &self,
        earlier: Option<&Record>,
        mut record: Record,
        problem: Problem,
    ) -> Result<(), Error> {
        record.state = RecordState::Error(problem);
        match earlier {
            Some(earlier) => {
                let record = self.displace(earlier, record).await?;
                self.remove_attempt(earlier, Some(&record)).await
            }
            None => self.catalog.create(&record).await,
        }
    }

    /// Looks at all of a backup of Cinder's but its data, and makes its record that of a whole one.
    async fn inspected(&self, mut record: Record) -> Result<Record, Error> {
        let parent = match record.parent_id {
            Some(id) if self.catalog.record(id).await?.is_none() => {
                let why = format!("it builds on {id}, which is not in this store: take that one in first");
                return Err(Error::NotImportable { backup_id: record.backup_id, why });
            }
            Some(id) => Some(self.parent(id, record.volume_id).await?),
            None => None,
        };
        record.created_at = record.created_at.min(Timestamp::now());
        match &self.format {
            Format::Chunked(chunked) => chunked.inspect(&mut record, parent.as_ref()).await?,
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.inspect(&mut record).await?,
        }
        record.state = RecordState::Available;
        Ok(record)
    }
}

/// What a verification has found to be wrong.
#[derive(Debug, Default)]
pub struct Faults {
    found: Vec<Error>,
    more_count: u64,
}

impl Faults {
    /// More are counted, but not told one by one.
    const FOUND_MAX: usize = 20;

    /// Keeps what tells of damage; gives back anything else.
    fn take(&mut self, error: Error) -> Result<(), Error> {
        if !error.is_damage() {
            return Err(error);
        }
        if self.found.len() < Self::FOUND_MAX {
            self.found.push(error);
        } else {
            self.more_count += 1;
        }
        Ok(())
    }
}

/// The record of a backup that this job deletes.
fn deleting(record: &Record, job_id: JobId) -> Record {
    Record { state: RecordState::Deleting(job_id), ..record.clone() }
}

/// Refuses the delete of a backup that others build on.
fn has_none(backup_id: BackupId, children: Vec<BackupId>) -> Result<(), Error> {
    if children.is_empty() {
        return Ok(());
    }
    let children: Vec<String> = children.iter().map(ToString::to_string).collect();
    Err(Error::HasChildren { backup_id, children: children.join(", ") })
}

fn read_receipt(ctx: &Context, record: &Record, digest: Option<String>) -> Receipt {
    Receipt {
        parent_id: record.parent_id,
        volume_bytes: record.volume_bytes,
        counts: ctx.progress.read().counts,
        digest,
    }
}

/// A backup that is whole but for what makes it visible.
enum Unfinished {
    Chunked(Box<chunked::Unfinished>),
    #[cfg(feature = "ceph")]
    Rbd(rbd::Unfinished),
}

fn receipt(record: &Record) -> Receipt {
    Receipt {
        parent_id: record.parent_id,
        volume_bytes: record.volume_bytes,
        counts: record.counts,
        digest: record.digest.clone(),
    }
}
