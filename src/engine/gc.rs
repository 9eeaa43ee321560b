//! Finds what jobs that died have left in a store, and removes it.
//!
//! Only what is known to be Backhaul's may go, and only if no backup and no job needs it: `docs/gc.md` has the rules. A job
//! that was claimed may be alive, and what is of it stays. Of others the store does not tell whether they run, so whoever
//! removes something asks the workers first.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use uuid::Uuid;

use super::chunked::Attempt;
#[cfg(feature = "ceph")]
use super::rbd::{self, Known, Leftover, List};
use super::{Engine, Error, Format, Listing, Updated, deleting};
use crate::job::{BackupId, Context, JobId, Record, RecordState};
use crate::store::{Folder, Listed, ObjectName, ObjectStore, Partial, Reason};

/// Our own folders in which objects are written in one go, so that what is not finished soon never will be.
const SMALL_OBJECTS: [&str; 5] = ["records", "outcomes", "cancels", "verified", CHECKS];
/// Where objects lie for a moment, to see what the store does with them.
const CHECKS: &str = "check";

/// What a look through a store has found.
#[derive(Debug)]
pub struct Found {
    /// What may go, what builds on something before that.
    pub garbage: Vec<Garbage>,
    /// What could not be looked at, such as a damaged record: what is of its backup, or job, is not among the garbage.
    pub problems: Vec<Error>,
}

/// Something that nobody needs any more.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Garbage {
    /// What kind of thing it is.
    pub kind: Kind,
    /// Where it lies in the store.
    pub name: String,
    /// The backup that it is of.
    pub backup_id: Option<BackupId>,
    /// The job that it is of: it may go only if no worker runs that.
    pub job_id: Option<JobId>,
    /// Its size, as far as the store says it.
    pub bytes: u64,
    /// How many objects it is.
    pub object_count: u64,
    /// When it was last written; none if the store does not say that.
    pub modified: Option<Timestamp>,
    /// Why nobody needs it.
    pub reason: String,
    #[serde(skip)]
    thing: Thing,
}

/// A kind of garbage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A backup that was begun and never ended, with its record.
    Backup,
    /// A backup whose delete was begun and never ended, with its record.
    Delete,
    /// The objects of an attempt to make a backup that came to nothing.
    Attempt,
    /// A note on a backup that is gone, or on the store.
    Mark,
    /// Something whose writer never finished it.
    Partial,
    /// An RBD image.
    Image,
    /// A snapshot of an RBD image.
    Snapshot,
    /// A list of the digests of what was copied into an RBD image.
    Digests,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backup => "backup",
            Self::Delete => "delete",
            Self::Attempt => "attempt",
            Self::Mark => "mark",
            Self::Partial => "partial",
            Self::Image => "image",
            Self::Snapshot => "snapshot",
            Self::Digests => "digests",
        })
    }
}

/// What is to be removed.
#[derive(Debug, Clone, PartialEq)]
enum Thing {
    /// A backup with its record, which is still this one.
    Unended(Box<Record>),
    Attempt(Box<Attempt>),
    /// An object that was last written when the garbage says. One of a backup goes only if that has no record.
    Object(ObjectName),
    Partial(Partial),
    /// Something in a cluster, with the record that its backup had.
    #[cfg(feature = "ceph")]
    Leftover(Box<Leftover>, Option<Box<Record>>),
    /// A list of digests, or what there is of it.
    #[cfg(feature = "ceph")]
    List(ObjectName, Option<Partial>),
}

/// Tells what is old enough, by the store's clock.
struct Clock {
    now: Timestamp,
    older_than: SignedDuration,
}

impl Clock {
    fn is_old(&self, modified: Option<Timestamp>) -> bool {
        self.older_than.is_zero() || modified.is_some_and(|at| self.now.duration_since(at) >= self.older_than)
    }
}

impl Engine {
    /// Looks through the store for what jobs that died have left, and nobody has written to for so long; zero is any time.
    /// Changes nothing.
    pub async fn garbage(&self, older_than: SignedDuration) -> Result<Found, Error> {
        let clock = Clock { now: self.store_time().await?, older_than };
        let Listing { records, damaged: mut problems } = self.catalog.records().await?;
        let unended: Vec<Record> = records.iter().filter(|record| is_unended(record)).cloned().collect();
        let records: BTreeMap<BackupId, Record> =
            records.into_iter().map(|record| (record.backup_id, record)).collect();
        let attempts = match &self.format {
            Format::Chunked(chunked) => chunked.attempts(&records).await?,
            #[cfg(feature = "ceph")]
            Format::Rbd(_) => Vec::new(),
        };
        let mut garbage = Vec::new();
        // What is known by a record goes before that; and of one that cannot be read nobody knows what it needs.
        #[cfg(feature = "ceph")]
        if problems.is_empty() {
            match self.in_clusters(&records, &clock).await {
                Ok(found) => garbage.extend(found),
                Err(error) => problems.push(error),
            }
        }
        for attempt in &attempts {
            garbage.extend(self.orphaned(attempt, &records, &clock).await?);
        }
        // The newest first, which may build on older ones.
        for record in unended.into_iter().rev() {
            garbage.extend(self.unended(record, &attempts, &clock).await?);
        }
        garbage.extend(self.marks(&records, &clock).await?);
        for folder in SMALL_OBJECTS.map(Folder::own) {
            let partials = self.store().partials(&folder, "").await?.into_iter();
            let old = partials.filter(|partial| clock.is_old(partial.modified));
            garbage.extend(old.map(|partial| unfinished(partial, &records)));
        }
        // A record that somebody has put aside, under another name beside it, may come back.
        let told: Vec<String> = problems.iter().map(Error::to_string).collect();
        garbage.retain(|garbage: &Garbage| {
            let is_told = |id: BackupId| told.iter().any(|text| text.contains(&id.to_string()));
            !garbage.backup_id.is_some_and(is_told)
        });
        let garbage = self.without_claimed(garbage, &mut problems).await?;
        Ok(Found { garbage, problems })
    }

    /// Leaves out what is of jobs that may be alive, because a run has claimed them, or because nobody can tell.
    async fn without_claimed(
        &self,
        garbage: Vec<Garbage>,
        problems: &mut Vec<Error>,
    ) -> Result<Vec<Garbage>, Error> {
        let jobs: BTreeSet<JobId> = garbage.iter().filter_map(|garbage| garbage.job_id).collect();
        let mut claimed = BTreeSet::new();
        for id in jobs {
            let is_claimed = match self.catalog.is_claimed(id).await {
                Err(error @ Error::DamagedRecord { .. }) => {
                    problems.push(error);
                    true
                }
                is_claimed => is_claimed?,
            };
            if is_claimed {
                claimed.insert(id);
            }
        }
        let may_go = |garbage: &Garbage| garbage.job_id.is_none_or(|id| !claimed.contains(&id));
        Ok(garbage.into_iter().filter(may_go).collect())
    }

    /// Removes garbage, if it still is that, and says whether it was. That no worker runs its job is for the caller to know.
    pub async fn remove_garbage(&self, garbage: &Garbage) -> Result<bool, Error> {
        // It may have come again since.
        if let Some(job_id) = garbage.job_id
            && self.catalog.is_claimed(job_id).await?
        {
            return Ok(false);
        }
        match &garbage.thing {
            Thing::Unended(seen) => return self.end(seen).await,
            Thing::Attempt(attempt) => match &self.format {
                Format::Chunked(chunked) => {
                    let current = self.catalog.record(attempt.backup_id).await?;
                    let visible = chunked.is_attempt_visible(attempt).await?;
                    let seen = Attempt { visible, ..(**attempt).clone() };
                    if why_orphaned(&seen, current.as_ref()).is_none() {
                        return Ok(false);
                    }
                    chunked.remove_attempt(attempt).await?;
                }
                #[cfg(feature = "ceph")]
                Format::Rbd(_) => return Ok(false),
            },
            Thing::Object(object) => {
                let (store, folder) = (self.store(), &object.folder);
                let listed = store.list(folder, &object.name).await?;
                let is_same =
                    |found: &Listed| found.name == object.name && found.modified == garbage.modified;
                if !listed.iter().any(is_same) {
                    return Ok(false);
                }
                if let Some(id) = garbage.backup_id
                    && self.catalog.record(id).await?.is_some()
                {
                    return Ok(false);
                }
                store.delete(object).await?;
            }
            Thing::Partial(partial) => {
                let found = self.store().partials(&partial.object.folder, &partial.object.name).await?;
                // Somebody may have gone on with it.
                if !found.contains(partial) {
                    return Ok(false);
                }
                self.store().discard(partial).await?;
            }
            #[cfg(feature = "ceph")]
            Thing::Leftover(leftover, record) => {
                if self.catalog.record(leftover.backup_id).await? != record.as_deref().cloned() {
                    return Ok(false);
                }
                return leftover.remove(&self.volumes.clusters).await;
            }
            #[cfg(feature = "ceph")]
            Thing::List(object, partial) => {
                let Some(id) = garbage.backup_id else { return Ok(false) };
                let record = self.catalog.record(id).await?;
                if rbd::why_list_orphaned(&object.name, record.as_ref()).is_none() {
                    return Ok(false);
                }
                match partial {
                    Some(partial) => self.store().discard(partial).await?,
                    None => self.store().delete(object).await?,
                }
            }
        }
        Ok(true)
    }

    /// Ends a backup, or a delete of one, that nobody goes on with, unless somebody does: then its record is not `seen` any
    /// more. Says whether it did.
    async fn end(&self, seen: &Record) -> Result<bool, Error> {
        let id = seen.backup_id;
        let by = JobId::random();
        let deleted = match seen.state {
            RecordState::Creating(_) => {
                // As an attempt that takes over, and then gives up. If the job comes meanwhile, it takes over from this one,
                // and cannot lose what it makes: only what the attempt has left that was seen is removed.
                let taken = Record {
                    writer: Uuid::new_v4().to_string(),
                    displaced_writer: Some(seen.writer.clone()),
                    checkpoint: None,
                    ..seen.clone()
                };
                let is_taken = match self.change(seen, &taken).await {
                    // It is what is removed here that makes room.
                    Err(error) if error.is_full() => {
                        self.remove_attempt(seen, None).await?;
                        self.change(seen, &taken).await?
                    }
                    changed => changed?,
                };
                if !is_taken {
                    return Ok(false);
                }
                self.remove_attempt(seen, None).await?;
                // From now on nobody can take over, so that no more than the record of this is removed.
                let marked = deleting(&taken, by);
                if !self.change(&taken, &marked).await? {
                    return Ok(false);
                }
                self.remove(&marked, &Context::default()).await?;
                marked
            }
            // As another delete of the same backup.
            RecordState::Deleting(_) => {
                let marked = deleting(seen, by);
                if !self.change(seen, &marked).await? {
                    return Ok(false);
                }
                self.delete_marked(&Context::default(), by, seen.state.clone(), marked.clone()).await?;
                marked
            }
            RecordState::Available | RecordState::Error(_) => return Ok(false),
        };
        if self.catalog.record(id).await? == Some(deleted) {
            self.catalog.remove(id).await?;
        }
        Ok(true)
    }

    /// Changes a record, if it is still what it `was`. Says whether it did.
    async fn change(&self, was: &Record, to: &Record) -> Result<bool, Error> {
        let change = |current: &Record| (current == was).then(|| to.clone());
        Ok(matches!(self.catalog.update(was.backup_id, change).await?, Updated::To(_)))
    }

    fn store(&self) -> Arc<dyn ObjectStore> {
        match &self.format {
            Format::Chunked(chunked) => chunked.store(),
            #[cfg(feature = "ceph")]
            Format::Rbd(rbd) => rbd.store(),
        }
    }

    /// What time it is for the store; for us, if it keeps no times, or is too full to write anything.
    async fn store_time(&self) -> Result<Timestamp, Error> {
        let (store, folder) = (self.store(), Folder::own(CHECKS));
        let object = folder.object(&Uuid::new_v4().to_string())?;
        match store.put(&object, Bytes::new()).await {
            Err(error) if matches!(error.reason(), Reason::Full) => return Ok(Timestamp::now()),
            written => written?,
        }
        let listed = store.list(&folder, &object.name).await;
        store.delete(&object).await?;
        store.tidy(&folder, &object.name).await?;
        Ok(listed?.into_iter().find_map(|listed| listed.modified).unwrap_or_else(Timestamp::now))
    }

    /// A backup, or a delete of one, that nobody has gone on with for long.
    async fn unended(
        &self,
        record: Record,
        attempts: &[Attempt],
        clock: &Clock,
    ) -> Result<Option<Garbage>, Error> {
        let (kind, job_id, reason) = match record.state {
            RecordState::Creating(job_id) => (Kind::Backup, job_id, "it was begun and never ended"),
            RecordState::Deleting(job_id) => (Kind::Delete, job_id, "its delete was begun and never ended"),
            RecordState::Available | RecordState::Error(_) => return Ok(None),
        };
        let (folder, file) = (Folder::own("records"), format!("{}.json", record.backup_id));
        let listed = self.store().list(&folder, &file).await?;
        let written = listed.into_iter().find_map(|listed| listed.modified).or(Some(record.created_at));
        let objects = attempts.iter().find(|attempt| attempt.is_of(&record));
        let modified = written.max(objects.and_then(|attempt| attempt.modified));
        if !clock.is_old(modified) {
            return Ok(None);
        }
        Ok(Some(Garbage {
            kind,
            name: format!("{}/{}", record.container, record.service_metadata),
            backup_id: Some(record.backup_id),
            job_id: Some(job_id),
            bytes: objects.map_or(0, |attempt| attempt.bytes),
            object_count: objects.map_or(0, |attempt| attempt.object_count),
            modified,
            reason: reason.into(),
            thing: Thing::Unended(Box::new(record)),
        }))
    }

    /// The objects of an attempt that no record names.
    async fn orphaned(
        &self,
        attempt: &Attempt,
        records: &BTreeMap<BackupId, Record>,
        clock: &Clock,
    ) -> Result<Option<Garbage>, Error> {
        let id = attempt.backup_id;
        let late;
        let record = match records.get(&id) {
            Some(record) => Some(record),
            None => match self.catalog.record(id).await {
                Err(Error::DamagedRecord { .. }) => return Ok(None),
                record => {
                    late = record?;
                    late.as_ref()
                }
            },
        };
        let Some(reason) = why_orphaned(attempt, record) else { return Ok(None) };
        if !clock.is_old(attempt.modified.or(Some(attempt.begun))) {
            return Ok(None);
        }
        Ok(Some(Garbage {
            kind: Kind::Attempt,
            name: format!("{}/{}", attempt.container, attempt.prefix),
            backup_id: Some(id),
            job_id: record.and_then(|record| record.job_id),
            bytes: attempt.bytes,
            object_count: attempt.object_count,
            modified: attempt.modified,
            reason: reason.into(),
            thing: Thing::Attempt(Box::new(attempt.clone())),
        }))
    }

    /// Notes on backups that are gone, and on what the store can do. Those on jobs are for [`super::Catalog::sweep`].
    async fn marks(
        &self,
        records: &BTreeMap<BackupId, Record>,
        clock: &Clock,
    ) -> Result<Vec<Garbage>, Error> {
        let store = self.store();
        let mark = |object: ObjectName, listed: Listed, reason: &str| Garbage {
            kind: Kind::Mark,
            name: object.to_string(),
            backup_id: None,
            job_id: None,
            bytes: listed.bytes,
            object_count: 1,
            modified: listed.modified,
            reason: reason.into(),
            thing: Thing::Object(object),
        };
        let mut marks = Vec::new();
        let folder = Folder::own("verified");
        for listed in store.list(&folder, "").await? {
            let Some(Ok(id)) = listed.name.strip_suffix(".json").map(str::parse) else { continue };
            if records.contains_key(&id) || !clock.is_old(listed.modified) {
                continue;
            }
            // One that is damaged is a record, too.
            if matches!(self.catalog.record(id).await, Ok(None)) {
                let object = folder.object(&listed.name)?;
                let reason = "the backup that was verified has no record";
                marks.push(Garbage { backup_id: Some(id), ..mark(object, listed, reason) });
            }
        }
        let folder = Folder::own(CHECKS);
        for listed in store.list(&folder, "").await? {
            if clock.is_old(listed.modified) {
                let object = folder.object(&listed.name)?;
                marks.push(mark(object, listed, "it was to show what the store can do"));
            }
        }
        Ok(marks)
    }
}

#[cfg(feature = "ceph")]
impl Engine {
    /// What is in clusters: snapshots of the volumes that were backed up, and in a store of images the backups themselves.
    async fn in_clusters(
        &self,
        records: &BTreeMap<BackupId, Record>,
        clock: &Clock,
    ) -> Result<Vec<Garbage>, Error> {
        let mut known = Known { records: records.clone(), listed: BTreeSet::new() };
        let mut lists = Vec::new();
        if let Format::Rbd(rbd) = &self.format {
            let found = rbd.lists().await?;
            let listed: BTreeSet<BackupId> = found.iter().map(|list| list.backup_id).collect();
            let is_lost = |id: &BackupId| !records.contains_key(id);
            // As in any store: what is whole stays, for `record import` to take it in again, and what a record builds on.
            let mut kept = rbd.whole(listed.iter().copied().filter(is_lost).collect()).await?;
            kept.extend(records.values().filter_map(|record| record.parent_id).filter(is_lost));
            known.listed = &listed - &kept;
            for list in found {
                let List { backup_id: id, object, bytes, modified, partial } = list;
                if kept.contains(&id) {
                    continue;
                }
                let record = self.catalog.record(id).await?;
                let Some(reason) = rbd::why_list_orphaned(&object.name, record.as_ref()) else { continue };
                if !clock.is_old(modified) {
                    continue;
                }
                lists.push(Garbage {
                    kind: Kind::Digests,
                    name: object.to_string(),
                    backup_id: Some(id),
                    job_id: record.and_then(|record| record.job_id),
                    bytes,
                    object_count: 1,
                    modified,
                    reason: reason.into(),
                    thing: Thing::List(object, partial),
                });
            }
        }
        let mut leftovers = rbd::source_leftovers(&self.volumes.clusters, &known).await?;
        if let Format::Rbd(rbd) = &self.format {
            leftovers.extend(rbd.leftovers(&known).await?);
        }
        let mut garbage = Vec::new();
        for leftover in leftovers {
            let modified = Timestamp::try_from(leftover.modified).ok();
            // What has no record in the listing may have been begun since.
            let record = self.catalog.record(leftover.backup_id).await?;
            if record.as_ref() != known.records.get(&leftover.backup_id) || !clock.is_old(modified) {
                continue;
            }
            garbage.push(Garbage {
                kind: if leftover.place.snapshot.is_some() { Kind::Snapshot } else { Kind::Image },
                name: leftover.place.to_string(),
                backup_id: Some(leftover.backup_id),
                job_id: leftover.job_id,
                bytes: leftover.bytes,
                object_count: 1,
                modified,
                reason: leftover.reason.into(),
                thing: Thing::Leftover(Box::new(leftover), record.map(Box::new)),
            });
        }
        // They may be all that shows that a snapshot is ours.
        garbage.extend(lists);
        Ok(garbage)
    }
}

/// The job that was at the backup last, if that is known.
fn job_at(record: &Record) -> Option<JobId> {
    match record.state {
        RecordState::Creating(id) | RecordState::Deleting(id) => Some(id),
        RecordState::Available | RecordState::Error(_) => record.job_id,
    }
}

/// Whether nobody may use the backup, and somebody was at it.
fn is_unended(record: &Record) -> bool {
    matches!(record.state, RecordState::Creating(_) | RecordState::Deleting(_))
}

/// Why nobody needs what an attempt has stored, if that is certain, by the `record` that its backup has now.
fn why_orphaned(attempt: &Attempt, record: Option<&Record>) -> Option<&'static str> {
    match record {
        // Cinder made it, and may know more about it than its record.
        Some(record) if record.job_id.is_none() => None,
        // Each attempt is later than the one that it took over from; nobody but a later one can still be at work.
        Some(record) if attempt.begun > record.created_at => None,
        Some(Record { state: RecordState::Error(_), .. }) => Some("its backup came to nothing"),
        Some(record) if attempt.is_of(record) => None,
        Some(_) => Some("another attempt of its job took over"),
        // It may be one of Cinder's that is being made, and of Backhaul's whole ones Cinder may have the record.
        None if !attempt.is_ours || attempt.visible => None,
        None => Some("its backup has no record, and never was whole"),
    }
}

/// A small object of our own that was never finished: a note on a job, or a record or a note of a backup.
fn unfinished(partial: Partial, records: &BTreeMap<BackupId, Record>) -> Garbage {
    let id = partial.object.name.strip_suffix(".json").unwrap_or_default();
    let is_of_job = ["outcomes", "cancels"].map(Folder::own).contains(&partial.object.folder);
    let backup_id = if is_of_job { None } else { id.parse().ok() };
    let job_id = match backup_id {
        Some(id) => records.get(&id).and_then(job_at),
        None => id.parse().ok(),
    };
    Garbage {
        kind: Kind::Partial,
        name: partial.object.to_string(),
        backup_id,
        job_id,
        bytes: partial.bytes,
        object_count: 1,
        modified: partial.modified,
        reason: "it was begun and never finished".into(),
        thing: Thing::Partial(partial),
    }
}
