//! How a job went: the whole account that its completion gives.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{BackupId, JobId, Operation, StoreName, VolumeId};
use crate::error::Problem;

/// Which engine does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Objects in a store, in the format of Cinder's chunked drivers.
    Chunked,
    /// Snapshots of RBD images, of which only what differs is copied, as Cinder's Ceph driver does it.
    Rbd,
    /// An RBD image with a copy of all of the volume.
    Copy,
}

/// How much of the volume is stored anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All of it.
    Full,
    /// What differs from the parent.
    Incremental,
}

/// One way to do a job: an engine, and full or incremental where that makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Method {
    /// The engine.
    pub strategy: Strategy,
    /// Full or incremental; of a backup only.
    pub mode: Option<Mode>,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.strategy {
            Strategy::Chunked => "chunked",
            Strategy::Rbd => "rbd",
            Strategy::Copy => "copy",
        })?;
        match self.mode {
            None => Ok(()),
            Some(Mode::Full) => f.write_str(" full"),
            Some(Mode::Incremental) => f.write_str(" incremental"),
        }
    }
}

/// What was moved, and what was not because it did not have to be.
///
/// Of a backup or a restore that succeeded, `bytes_read`, `bytes_hole` and, for a restore, the punched zeros
/// together are the volume's size; less what of an RBD image was not read because Ceph says that it has not changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Bytes of volume data read: from the source by a backup, out of the objects by a restore or verify.
    pub bytes_read: u64,
    /// Bytes that were read and found to be zero: neither hashed, compressed nor written.
    pub bytes_zero: u64,
    /// Bytes in holes of the source, which were not even read.
    pub bytes_hole: u64,
    /// Bytes that are as in the parent, read or not, but for holes of the source, which count as such only.
    pub bytes_unchanged: u64,
    /// Bytes of the volume that an earlier attempt of the job had dealt with, so that they did not have to be again: a backup
    /// has read and compared them, and found them stored; a restore had written them.
    #[serde(default)]
    pub bytes_reused: u64,
    /// Bytes in the store: written by a backup, read by a restore or verify, freed by a delete. Data objects only.
    pub bytes_stored: u64,
    /// Bytes written to the target of a restore.
    pub bytes_written: u64,
    /// Data objects written, read or deleted.
    pub object_count: u64,
}

impl Counts {
    /// Adds others to these.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in [
            (&mut self.bytes_read, other.bytes_read),
            (&mut self.bytes_zero, other.bytes_zero),
            (&mut self.bytes_hole, other.bytes_hole),
            (&mut self.bytes_unchanged, other.bytes_unchanged),
            (&mut self.bytes_reused, other.bytes_reused),
            (&mut self.bytes_stored, other.bytes_stored),
            (&mut self.bytes_written, other.bytes_written),
            (&mut self.object_count, other.object_count),
        ] {
            *count = count.saturating_add(more);
        }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// All was done.
    Succeeded,
    /// It was not, and why.
    Failed(Problem),
    /// Somebody asked for its end.
    Cancelled,
}

/// An attempt that failed, and was not the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Which one, from 1.
    pub attempt: u32,
    /// When it had failed.
    pub time: Timestamp,
    /// Why, with all causes.
    pub error: String,
}

/// What a job did on its way to its end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// The method that did it, or the last one that was tried.
    pub method: Option<Method>,
    /// How often a method was begun for this job, over all deliveries.
    pub attempt_count: u32,
    /// How often people brought the job back after it had failed.
    #[serde(default)]
    pub revival_count: u32,
    /// The attempts before the last one, each of which ended in an error that might have passed: the first of them, and
    /// the latest.
    #[serde(default)]
    pub earlier_attempts: Vec<Attempt>,
    /// Why the first method of the plan was given up, where it was.
    pub fallback_reason: Option<Problem>,
    /// The backup that this one builds on; of a backup only.
    pub parent_id: Option<BackupId>,
    /// The volume's size.
    pub volume_bytes: Option<u64>,
    /// The target of a restore that was not done was there before, and holds a part of the backup only, or may.
    #[serde(default)]
    pub target_unfinished: bool,
    /// What was moved.
    pub counts: Counts,
    /// From start to end.
    pub seconds: f64,
    /// `sha256-list:` and the SHA-256 over the volume's block digests, in order, as 32 bytes each; of a backup in an RBD
    /// image `sha256-blocks:` and the SHA-256 of the list of the digests of the blocks that it copied.
    pub digest: Option<String>,
}

/// Is the end of a job with its whole account: what the completion event says, and what is kept until it is sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// The job.
    pub job_id: JobId,
    /// What it did.
    pub operation: Operation,
    /// The backup it worked on.
    pub backup_id: BackupId,
    /// The volume, where it is known.
    pub volume_id: Option<VolumeId>,
    /// The store.
    pub store: Option<StoreName>,
    /// What it restored to, as messages write that. It is kept, and not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// What it did on the way.
    pub account: Account,
}
