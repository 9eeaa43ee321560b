//! The nouns: jobs, what they work on, how they end, and what is kept of a backup.
//!
//! Nothing here does I/O, knows a wire format or names another room (but for `error`). The derives of serde
//! serve the backup record; messages have types of their own in `message`.

mod account;
mod context;
mod event;
mod ids;
mod location;
mod names;
mod pace;
mod record;
mod sample;

pub use account::{Account, Attempt, Completion, Counts, Method, Mode, Outcome, Strategy};
pub use context::{Cancelled, Context, Hold, Progress, Reading};
pub use event::{Event, Happening};
pub use ids::{BackupId, InvalidId, JobId, VolumeId};
pub use location::{InvalidLocation, Location, RbdImage};
pub use names::{Container, InvalidName, StoreName};
pub use pace::{Limit, Pace};
pub use record::{Checkpoint, Record, RecordState, SourceSnapshot, Verified};
pub use sample::{InvalidSample, Sample};

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Copies a volume into a store.
    Backup,
    /// Copies a backup onto a volume.
    Restore,
    /// Removes a backup from its store.
    Delete,
    /// Reads a whole backup and compares it with its digests.
    Verify,
}

impl Operation {
    /// The word of messages, routing keys and the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Restore => "restore",
            Self::Delete => "delete",
            Self::Verify => "verify",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Is one thing that we were asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Names the job in every event; the same id is the same job, however often it is delivered.
    pub id: JobId,
    /// The store to work on; the default one if absent.
    pub store: Option<StoreName>,
    /// When it must have ended; never if absent.
    pub deadline: Option<Timestamp>,
    /// What to do.
    pub work: Work,
}

/// What a job is asked to do, with what it needs for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Copies a volume into the store.
    Backup(BackupWork),
    /// Copies a backup onto a volume.
    Restore(RestoreWork),
    /// Removes a backup.
    Delete(BackupId),
    /// Checks a backup.
    Verify(VerifyWork),
}

/// What a backup job works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupWork {
    /// The id that the new backup gets.
    pub backup_id: BackupId,
    /// The volume that the bytes belong to.
    pub volume_id: VolumeId,
    /// Where the bytes are.
    pub source: Location,
    /// What the backup builds on.
    pub parent: Parent,
    /// Where in the store the objects go; the store's own rule if absent.
    pub container: Option<Container>,
    /// A name for people.
    pub name: Option<String>,
    /// A description for people.
    pub description: Option<String>,
    /// The tenant that the backup belongs to.
    pub project_id: Option<String>,
    /// Metadata of the volume, as Cinder keeps it: a string that holds JSON.
    pub volume_meta: Option<String>,
}

/// What a backup builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// Nothing: a full backup.
    None,
    /// The newest usable backup of the same volume in the same store.
    Latest,
    /// This one.
    Given(BackupId),
}

/// What a restore job works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreWork {
    /// The backup to restore.
    pub backup_id: BackupId,
    /// Where the bytes go.
    pub target: Location,
    /// The volume that the target belongs to, where it is known.
    pub volume_id: Option<VolumeId>,
}

/// What a verify job works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyWork {
    /// The backup to check.
    pub backup_id: BackupId,
    /// How much of its data to read; all of it if absent.
    pub sample: Option<Sample>,
}

impl From<BackupId> for VerifyWork {
    /// Checks all of a backup.
    fn from(backup_id: BackupId) -> Self {
        Self { backup_id, sample: None }
    }
}

impl Job {
    /// The word for what the job does.
    pub fn operation(&self) -> Operation {
        match &self.work {
            Work::Backup(_) => Operation::Backup,
            Work::Restore(_) => Operation::Restore,
            Work::Delete(_) => Operation::Delete,
            Work::Verify(_) => Operation::Verify,
        }
    }

    /// The backup that the job makes, reads or removes.
    pub fn backup_id(&self) -> BackupId {
        match &self.work {
            Work::Backup(work) => work.backup_id,
            Work::Restore(work) => work.backup_id,
            Work::Verify(work) => work.backup_id,
            Work::Delete(id) => *id,
        }
    }

    /// Whether the job must have ended by `now`.
    pub fn is_late(&self, now: Timestamp) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// The volume, where the job itself names it.
    pub fn volume_id(&self) -> Option<VolumeId> {
        match &self.work {
            Work::Backup(work) => Some(work.volume_id),
            Work::Restore(work) => work.volume_id,
            Work::Delete(_) | Work::Verify(_) => None,
        }
    }
}

/// What arrives at a worker's door.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Work to do.
    Run(Box<Job>),
    /// The end of a job that was asked for earlier.
    Cancel(JobId),
}
