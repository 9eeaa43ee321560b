//! The records of the backups of a store, beside their data, and the outcomes of jobs until they are told.
//!
//! All lie in `.backhaul/`, where Cinder does not look. A record's text is kept with its SHA-256, so that a damaged
//! one is never believed.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use jiff::{SignedDuration, Timestamp};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tracing::warn;
use uuid::Uuid;

use super::chunked::digest::sha256;
use super::error::Error;
use crate::error::Causes;
use crate::job::{
    BackupId, Completion, Hold, JobId, Operation, Outcome, Record, RecordState, Verified, VolumeId,
};
use crate::store::{self, Folder, ObjectName, ObjectStore, Reason};

/// No record is larger: most of it is a volume's metadata in Cinder's fields.
const RECORD_BYTES_MAX: usize = 4 << 20;
/// How many records are read side by side: each takes as long as the store needs to answer.
const RECORDS_AT_ONCE_MAX: usize = 16;
/// How often a change is tried that somebody else was faster with.
const UPDATES_MAX: u32 = 20;
/// The version of what is written here.
const FORMAT: u32 = 1;

/// For how long is kept what is of use only as long as the messages of a job may still lie in a queue.
pub const KEPT: SignedDuration = SignedDuration::from_hours(7 * 24);

/// The records of one store.
#[derive(Debug, Clone)]
pub struct Catalog {
    store: Arc<dyn ObjectStore>,
}

/// The records of a store.
#[derive(Debug, Default)]
pub struct Listing {
    /// Those that could be read, the oldest first.
    pub records: Vec<Record>,
    /// What is wrong with each of the others.
    pub damaged: Vec<Error>,
}

/// How a job ended, as it is kept until its message is gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeptOutcome {
    /// When that was written down.
    pub at: Timestamp,
    /// That it ended so is known to have been told.
    pub told: bool,
    /// How it ended.
    pub completion: Completion,
}

/// Who of several runs of a job may end it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    at: Timestamp,
    /// The run.
    run: Uuid,
    revival_count: u32,
    /// How often the job was begun after a worker had ended, or was cut off, before the job did.
    restart_count: u32,
}

/// What lies under a job's id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kept {
    Claimed(Claim),
    Ended(Box<KeptOutcome>),
}

impl Kept {
    /// How often the job had been brought back when this was written: what is from before that says nothing of how it goes
    /// now.
    fn revival_count(&self) -> u32 {
        match self {
            Self::Claimed(claim) => claim.revival_count,
            Self::Ended(kept) => kept.completion.account.revival_count,
        }
    }
}

/// What a run of a job finds when it begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Begun {
    /// It is over.
    Over(Box<KeptOutcome>),
    /// It is this run's to do.
    Held {
        /// What shows that.
        hold: Hold,
        /// How often the job was begun after a worker had ended, or was cut off, before the job did.
        restart_count: u32,
    },
    /// Another run has claimed it.
    Claimed,
}

/// What became of a change of a record.
#[derive(Debug)]
pub enum Updated {
    /// It is this now.
    To(Record),
    /// It is what it was, if there is one.
    Not(Option<Record>),
}

#[derive(Serialize, Deserialize)]
struct Sealed<'a> {
    format: u32,
    sha256: String,
    #[serde(borrow)]
    content: &'a RawValue,
}

impl Catalog {
    /// The records that lie in `store`.
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store }
    }

    /// The record of a backup, if there is one.
    pub async fn record(&self, id: BackupId) -> Result<Option<Record>, Error> {
        self.record_at(&record_name(id)?).await
    }

    async fn record_at(&self, name: &ObjectName) -> Result<Option<Record>, Error> {
        self.bytes(name).await?.map(|bytes| record_in(name, &bytes)).transpose()
    }

    /// The record of a backup that must be there and whole.
    pub async fn available(&self, id: BackupId) -> Result<Record, Error> {
        let record = self.record(id).await?.ok_or(Error::UnknownBackup(id))?;
        match &record.state {
            RecordState::Available => Ok(record),
            state => Err(Error::NotAvailable { backup_id: id, state: describe(state) }),
        }
    }

    /// All records. A damaged one does not hide the others.
    pub async fn records(&self) -> Result<Listing, Error> {
        let folder = Folder::own("records");
        let mut listing = Listing::default();
        let mut objects = Vec::new();
        for listed in self.store.list(&folder, "").await? {
            match folder.object(&listed.name).ok().filter(is_of_a_record) {
                Some(object) => objects.push(object),
                // It may be a record that somebody has put aside. Not to be passed over, for its backup would have no owner then.
                None => listing.damaged.push(Error::DamagedRecord {
                    object: format!("{}/{}", folder.as_str(), listed.name.escape_debug()),
                    why: "it has no name of a record, which is a backup's id and `.json`: rename it, if it is one"
                        .into(),
                }),
            }
        }
        // None of them begins before it is asked for.
        let reads: Vec<_> = objects.iter().map(|object| self.record_at(object)).collect();
        let mut records = stream::iter(reads).buffered(RECORDS_AT_ONCE_MAX);
        while let Some(record) = records.next().await {
            match record {
                Ok(Some(record)) => listing.records.push(record),
                // It was deleted between the listing and the reading.
                Ok(None) => {}
                Err(error @ Error::DamagedRecord { .. }) => listing.damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        listing.records.sort_by_key(|record: &Record| (record.created_at, record.backup_id));
        Ok(listing)
    }

    /// The newest whole backup of a volume, `besides` the one that is being made.
    pub async fn latest(&self, volume_id: VolumeId, besides: BackupId) -> Result<Option<Record>, Error> {
        let usable = |record: &Record| {
            record.volume_id == volume_id
                && record.backup_id != besides
                && record.state == RecordState::Available
        };
        Ok(self.records().await?.records.into_iter().rfind(usable))
    }

    /// The backup and all that it builds on, itself first; all must be there and whole.
    pub async fn chain(&self, id: BackupId) -> Result<Vec<Record>, Error> {
        let mut chain = vec![self.available(id).await?];
        while let Some(parent_id) = chain.last().and_then(|record| record.parent_id) {
            if chain.iter().any(|record| record.backup_id == parent_id) {
                return Err(Error::DamagedRecord {
                    object: record_name(parent_id)?.to_string(),
                    why: "it builds on itself".into(),
                });
            }
            chain.push(match self.available(parent_id).await {
                Err(Error::UnknownBackup(parent_id)) => {
                    return Err(Error::ParentGone { backup_id: id, parent_id });
                }
                parent => parent?,
            });
        }
        Ok(chain)
    }

    /// The records of all other backups that have data in the store. Fails when a damaged record leaves that open.
    pub async fn others(&self, id: BackupId) -> Result<Vec<Record>, Error> {
        let Listing { mut records, damaged } = self.records().await?;
        if let Some(error) = damaged.into_iter().next() {
            return Err(match error {
                Error::DamagedRecord { object, why } => {
                    let why = format!("{why}, so that nobody knows whether it builds on backup {id}");
                    Error::DamagedRecord { object, why }
                }
                error => error,
            });
        }
        records.retain(|record| record.backup_id != id && !matches!(record.state, RecordState::Error(_)));
        Ok(records)
    }

    /// The backups that build on this one. Fails when a damaged record leaves that open.
    pub async fn children(&self, id: BackupId) -> Result<Vec<BackupId>, Error> {
        let others = self.others(id).await?;
        Ok(others.iter().filter(|r| r.parent_id == Some(id)).map(|record| record.backup_id).collect())
    }

    /// Fails, in a way that passes, while listings do not have the record of a backup that was written: [`Catalog::children`]
    /// does not find it then.
    pub async fn check_listed(&self, id: BackupId) -> Result<(), Error> {
        let name = record_name(id)?;
        let listed = self.store.list(&name.folder, &name.name).await?;
        match listed.iter().any(|listed| listed.name == name.name) {
            true => Ok(()),
            false => Err(Error::NotListedYet { object: name.to_string() }),
        }
    }

    /// Writes the record of a new backup; fails when there is one of that id.
    pub async fn create(&self, record: &Record) -> Result<(), Error> {
        let name = record_name(record.backup_id)?;
        match self.store.put(&name, seal(&name, record)?).await {
            Err(error) if matches!(error.reason(), Reason::Exists) => {
                Err(Error::BackupExists(record.backup_id))
            }
            result => Ok(result?),
        }
    }

    /// Changes the record of a backup to what `change` makes of it; if that is nothing, or there is no record, nothing is
    /// changed. Nobody else writes in between: `change` is asked again with what they wrote.
    pub async fn update(
        &self,
        id: BackupId,
        change: impl Fn(&Record) -> Option<Record> + Send,
    ) -> Result<Updated, Error> {
        let name = record_name(id)?;
        for _ in 0..UPDATES_MAX {
            let Some(was) = self.bytes(&name).await? else { return Ok(Updated::Not(None)) };
            let current = record_in(&name, &was)?;
            let Some(changed) = change(&current) else { return Ok(Updated::Not(Some(current))) };
            if self.store.swap(&name, was, seal(&name, &changed)?).await? {
                return Ok(Updated::To(changed));
            }
        }
        Err(overtaken(&name))
    }

    /// Removes a record, if it is there.
    pub async fn remove(&self, id: BackupId) -> Result<(), Error> {
        self.forget(&verified_name(id)?).await?;
        self.forget(&record_name(id)?).await
    }

    /// When a backup was last found whole, if it ever was.
    pub async fn verified(&self, id: BackupId) -> Result<Option<Verified>, Error> {
        self.read(&verified_name(id)?).await
    }

    /// Keeps that a backup was found whole. Beside the record and not in it: a delete may change that meanwhile.
    pub async fn keep_verified(&self, id: BackupId, verified: &Verified) -> Result<(), Error> {
        let name = verified_name(id)?;
        Ok(self.store.replace(&name, seal(&name, verified)?).await?)
    }

    /// These backups and all that build on one of them, the oldest first. Damaged records are left out.
    pub async fn with_all_children(&self, ids: &[BackupId]) -> Result<Vec<BackupId>, Error> {
        let mut found: Vec<BackupId> = Vec::new();
        // The oldest first, so that a parent comes before its children.
        for record in self.records().await?.records {
            let builds_on_one = record.parent_id.is_some_and(|parent_id| found.contains(&parent_id));
            if ids.contains(&record.backup_id) || builds_on_one {
                found.push(record.backup_id);
            }
        }
        Ok(found)
    }

    /// How a job ended that may come once more.
    pub async fn outcome(&self, id: JobId) -> Result<Option<KeptOutcome>, Error> {
        Ok(match self.read(&outcome_name(id)?).await? {
            Some(Kept::Ended(kept)) => Some(*kept),
            Some(Kept::Claimed(_)) | None => None,
        })
    }

    /// Begins a run of a job. One whose message `was_out_before` claims the job, from whoever has claimed it before: of
    /// all runs only the last one that did so can end it. `restarts` says that a worker had the message, and is gone.
    pub async fn begin(
        &self,
        id: JobId,
        revival_count: u32,
        was_out_before: bool,
        restarts: bool,
    ) -> Result<Begun, Error> {
        let name = outcome_name(id)?;
        for _ in 0..UPDATES_MAX {
            let was = self.bytes(&name).await?;
            let kept: Option<Kept> = was.as_ref().map(|was| unseal(&name, was)).transpose()?;
            let restart_count = match kept.filter(|kept| kept.revival_count() >= revival_count) {
                Some(Kept::Ended(kept)) => return Ok(Begun::Over(kept)),
                Some(Kept::Claimed(_)) if !was_out_before => return Ok(Begun::Claimed),
                Some(Kept::Claimed(claim)) => claim.restart_count,
                None => 0,
            }
            .saturating_add(restarts.into());
            if !was_out_before {
                return Ok(Begun::Held { hold: Hold { claim: None, revival_count }, restart_count });
            }
            let run = Uuid::new_v4();
            let claim = Kept::Claimed(Claim { at: Timestamp::now(), run, revival_count, restart_count });
            if self.write_over(&name, was, seal(&name, &claim)?).await? {
                return Ok(Begun::Held { hold: Hold { claim: Some(run), revival_count }, restart_count });
            }
        }
        Err(overtaken(&name))
    }

    /// Makes the claim of a run that goes on as if it were new, so that [`Catalog::sweep`] leaves it. Does nothing when another
    /// run has claimed the job since, or ended it, and for a run that needs no claim.
    pub async fn renew(&self, id: JobId, hold: &Hold) -> Result<(), Error> {
        let name = outcome_name(id)?;
        let Some(was) = self.bytes(&name).await? else { return Ok(()) };
        if let Kept::Claimed(claim) = unseal(&name, &was)?
            && Some(claim.run) == hold.claim
        {
            let renewed = Kept::Claimed(Claim { at: Timestamp::now(), ..claim });
            self.store.swap(&name, was, seal(&name, &renewed)?).await?;
        }
        Ok(())
    }

    /// Whether a run has claimed the job, and nobody has ended it since: then it may be alive. A claim counts for as long as
    /// [`Catalog::sweep`] leaves it.
    pub async fn is_claimed(&self, id: JobId) -> Result<bool, Error> {
        let kept = self.read(&outcome_name(id)?).await?;
        Ok(matches!(kept, Some(Kept::Claimed(claim)) if claim.at >= Timestamp::now() - KEPT))
    }

    /// Fails when another run has claimed the job, or ended it, since this one began.
    pub async fn check_held(&self, id: JobId, backup_id: BackupId, hold: &Hold) -> Result<(), Error> {
        match is_held(self.read(&outcome_name(id)?).await?.as_ref(), hold) {
            true => Ok(()),
            false => Err(Error::TakenOver(backup_id)),
        }
    }

    /// Keeps how a job ended until that is told. Fails with [`Error::TakenOver`] when another run has claimed the job, or
    /// ended it.
    pub async fn conclude(&self, completion: &Completion, hold: &Hold) -> Result<(), Error> {
        let name = outcome_name(completion.job_id)?;
        let kept = KeptOutcome { at: Timestamp::now(), told: false, completion: completion.clone() };
        let kept = seal(&name, &Kept::Ended(Box::new(kept)))?;
        for _ in 0..UPDATES_MAX {
            let was = self.bytes(&name).await?;
            let current: Option<Kept> = was.as_ref().map(|was| unseal(&name, was)).transpose()?;
            if !is_held(current.as_ref(), hold) {
                return Err(Error::TakenOver(completion.backup_id));
            }
            if self.write_over(&name, was, kept.clone()).await? {
                return self.finish(completion).await;
            }
            // What was faster may have been the last renewal of this run's own claim.
        }
        Err(overtaken(&name))
    }

    /// The last step of a job that leaves no record: that must not go before it is known how the job ended. It may be done
    /// again.
    pub async fn finish(&self, completion: &Completion) -> Result<(), Error> {
        let by = match (completion.operation, &completion.outcome) {
            // Whichever of several deletes has marked it last.
            (Operation::Delete, Outcome::Succeeded) => None,
            (Operation::Backup, Outcome::Cancelled) => Some(completion.job_id),
            _ => return Ok(()),
        };
        match self.record(completion.backup_id).await? {
            Some(Record { state: RecordState::Deleting(job_id), .. }) if by.is_none_or(|by| by == job_id) => {
                self.remove(completion.backup_id).await
            }
            _ => Ok(()),
        }
    }

    /// Writes over what `was` there, or where there was nothing. Says whether that was so.
    async fn write_over(&self, name: &ObjectName, was: Option<Bytes>, bytes: Bytes) -> Result<bool, Error> {
        let Some(was) = was else {
            return match self.store.put(name, bytes).await {
                Err(error) if matches!(error.reason(), Reason::Exists) => Ok(false),
                written => Ok(written.map(|()| true)?),
            };
        };
        Ok(self.store.swap(name, was, bytes).await?)
    }

    /// Keeps that the end of a job has been told, because it may come once more.
    pub async fn keep_told(&self, completion: &Completion) -> Result<(), Error> {
        let name = outcome_name(completion.job_id)?;
        let kept = KeptOutcome { at: Timestamp::now(), told: true, completion: completion.clone() };
        let was = self.bytes(&name).await?;
        let current: Option<Kept> = was.as_ref().map(|was| unseal(&name, was)).transpose()?;
        let kept = Kept::Ended(Box::new(kept));
        // What is of a job that was brought back since is not to be written over. Whoever was faster says the same.
        if current.is_none_or(|current| current.revival_count() <= kept.revival_count()) {
            self.write_over(&name, was, seal(&name, &kept)?).await?;
        }
        Ok(())
    }

    /// Forgets how a job ended, because it has been told and does not come again.
    pub async fn settle(&self, id: JobId) -> Result<(), Error> {
        self.forget(&outcome_name(id)?).await
    }

    /// Keeps that somebody asked at that time for the end of a job, for whenever it is taken up. Of several times the last one
    /// is kept, whichever comes first here.
    pub async fn cancel(&self, id: JobId, at: Timestamp) -> Result<(), Error> {
        let name = cancel_name(id)?;
        // One that is damaged is of no use to anybody.
        if let Ok(Some(kept)) = self.cancelled_at(id).await
            && kept >= at
        {
            return Ok(());
        }
        Ok(self.store.replace(&name, seal(&name, &at)?).await?)
    }

    /// When somebody asked for the end of a job, if anybody did.
    pub async fn cancelled_at(&self, id: JobId) -> Result<Option<Timestamp>, Error> {
        self.read(&cancel_name(id)?).await
    }

    /// Forgets that somebody asked for the end of a job, because it has ended.
    pub async fn forget_cancel(&self, id: JobId) -> Result<(), Error> {
        self.forget(&cancel_name(id)?).await
    }

    /// Forgets what was kept of jobs before this time and nobody will ask for any more: ends that were told, claims of jobs
    /// that nobody brought to an end, and cancels of jobs that never came. An end that was not told stays.
    pub async fn sweep(&self, before: Timestamp) -> Result<(), Error> {
        let is_old = |kept: &Kept| match kept {
            Kept::Claimed(claim) => claim.at < before,
            Kept::Ended(kept) => kept.told && kept.at < before,
        };
        self.sweep_folder("outcomes", Some(before), is_old).await?;
        // They may be older than what has them: a store that is away gets them later.
        self.sweep_folder("cancels", None, |at: &Timestamp| *at < before).await
    }

    async fn sweep_folder<T: DeserializeOwned>(
        &self,
        folder: &'static str,
        written_before: Option<Timestamp>,
        is_old: impl Fn(&T) -> bool,
    ) -> Result<(), Error> {
        let folder = Folder::own(folder);
        for listed in self.store.list(&folder, "").await? {
            // Each look takes as long as the store needs to answer.
            if written_before.is_some_and(|before| listed.modified.is_some_and(|at| at >= before)) {
                continue;
            }
            let name = folder.object(&listed.name)?;
            match self.read(&name).await {
                Ok(Some(kept)) if is_old(&kept) => self.forget(&name).await?,
                // It is for whoever asks for it to say what is wrong with it.
                Ok(_) | Err(Error::DamagedRecord { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn forget(&self, name: &ObjectName) -> Result<(), Error> {
        self.store.delete(name).await?;
        // What a worker left that was killed while it wrote it. It is in nobody's way, and `gc` finds it: what is done must
        // not be told as failed for that.
        if let Err(error) = self.store.tidy(&name.folder, &name.name).await {
            warn!(object = %name, error = %Causes(&error), "what a worker that died may have left was not looked for");
        }
        Ok(())
    }

    async fn read<T: DeserializeOwned>(&self, name: &ObjectName) -> Result<Option<T>, Error> {
        self.bytes(name).await?.map(|bytes| unseal(name, &bytes)).transpose()
    }

    async fn bytes(&self, name: &ObjectName) -> Result<Option<Bytes>, Error> {
        match self.store.get(name).await {
            Err(error) if matches!(error.reason(), Reason::Missing) => Ok(None),
            pieces => Ok(Some(pieces?.collect(name, RECORD_BYTES_MAX).await?)),
        }
    }
}

/// A state in words for people.
pub fn describe(state: &RecordState) -> String {
    match state {
        RecordState::Creating(job_id) => format!("still being made by job {job_id}"),
        RecordState::Available => "whole".into(),
        RecordState::Error(problem) => format!("in error: {problem}"),
        RecordState::Deleting(job_id) => format!("being deleted by job {job_id}"),
    }
}

/// The text of something that is kept, with its SHA-256.
pub(crate) fn seal<T: Serialize>(name: &ObjectName, content: &T) -> Result<Bytes, Error> {
    let failed =
        |error: serde_json::Error| Error::DamagedRecord { object: name.to_string(), why: error.to_string() };
    let content = serde_json::value::to_raw_value(content).map_err(failed)?;
    let sha256 = hex::encode(sha256(content.get().as_bytes()));
    let sealed = Sealed { format: FORMAT, sha256, content: &content };
    Ok(serde_json::to_vec(&sealed).map_err(failed)?.into())
}

/// Reads what [`seal`] has made; fails with [`Error::DamagedRecord`] if it is not that any more.
pub(crate) fn unseal<T: DeserializeOwned>(name: &ObjectName, bytes: &[u8]) -> Result<T, Error> {
    let damaged = |why: String| Error::DamagedRecord { object: name.to_string(), why };
    let sealed: Sealed = serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
    if sealed.format != FORMAT {
        return Err(damaged(format!("it has format {}, and this version reads {FORMAT}", sealed.format)));
    }
    let content = sealed.content.get();
    if hex::encode(sha256(content.as_bytes())) != sealed.sha256 {
        return Err(damaged("its digest does not match".into()));
    }
    serde_json::from_str(content).map_err(|error| damaged(error.to_string()))
}

/// Whether nobody but this run has claimed the job, or ended it, by what is `kept` of it.
fn is_held(kept: Option<&Kept>, hold: &Hold) -> bool {
    match (kept.filter(|kept| kept.revival_count() >= hold.revival_count), hold.claim) {
        (None, None) => true,
        (Some(Kept::Claimed(claim)), Some(run)) => claim.run == run,
        (_, _) => false,
    }
}

fn overtaken(name: &ObjectName) -> Error {
    let error = io::Error::new(ErrorKind::ResourceBusy, "others change it all the time");
    store::Error::io("change", name, error).into()
}

/// The record that lies under this name.
fn record_in(name: &ObjectName, bytes: &[u8]) -> Result<Record, Error> {
    let record: Record = unseal(name, bytes)?;
    if record_name(record.backup_id)? != *name {
        let why = format!("it is the record of {}", record.backup_id);
        return Err(Error::DamagedRecord { object: name.to_string(), why });
    }
    Ok(record)
}

fn record_name(id: BackupId) -> Result<ObjectName, Error> {
    Ok(Folder::own("records").object(&format!("{id}.json"))?)
}

/// Whether an object among the records has the name of one.
fn is_of_a_record(object: &ObjectName) -> bool {
    object.name.strip_suffix(".json").is_some_and(|id| id.parse::<BackupId>().is_ok())
}

fn cancel_name(id: JobId) -> Result<ObjectName, Error> {
    Ok(Folder::own("cancels").object(&format!("{id}.json"))?)
}

fn verified_name(id: BackupId) -> Result<ObjectName, Error> {
    Ok(Folder::own("verified").object(&format!("{id}.json"))?)
}

fn outcome_name(id: JobId) -> Result<ObjectName, Error> {
    Ok(Folder::own("outcomes").object(&format!("{id}.json"))?)
}
