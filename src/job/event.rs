//! What is told to the world while a job lives.

use jiff::Timestamp;

use super::{BackupId, Completion, JobId, Method, Operation, Reading, StoreName, VolumeId};
use crate::error::Problem;

/// One thing that happened to a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The job.
    pub job_id: JobId,
    /// What it does.
    pub operation: Operation,
    /// The backup it works on.
    pub backup_id: BackupId,
    /// The volume, where it is known.
    pub volume_id: Option<VolumeId>,
    /// The store, where it is known.
    pub store: Option<StoreName>,
    /// When it happened.
    pub time: Timestamp,
    /// Counts the events of one run of a job, from 1.
    pub sequence: u64,
    /// What happened.
    pub happening: Happening,
}

/// What happened to a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Happening {
    /// A worker took the job in.
    Accepted,
    /// A method was begun.
    Started {
        /// The method.
        method: Method,
        /// Counts the attempts of this job, from 1.
        attempt: u32,
    },
    /// The job goes on.
    Progress(Reading),
    /// A method turned out not to be usable, and the next one is tried.
    FellBack {
        /// The method that was given up.
        from: Method,
        /// The method that is tried now.
        to: Method,
        /// Why.
        reason: Problem,
    },
    /// The job ended: succeeded, failed or cancelled, as its completion says.
    Ended(Box<Completion>),
}
