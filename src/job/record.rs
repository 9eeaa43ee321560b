//! What is kept of a backup beside its data: enough to restore, list, verify and delete it without any database.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{BackupId, Container, Counts, JobId, Method, RbdImage, Sample, VolumeId};
use crate::error::Problem;

/// Where a backup is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordState {
    /// It is being written by this job; nothing of it may be used.
    Creating(JobId),
    /// It is whole.
    Available,
    /// It came to nothing; what there was of its data is removed.
    Error(Problem),
    /// It is being removed by this job; it may be half gone.
    Deleting(JobId),
}

/// The record of a backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The backup.
    pub backup_id: BackupId,
    /// The volume that was backed up.
    pub volume_id: VolumeId,
    /// Where it is in its life.
    pub state: RecordState,
    /// The backup that this one builds on.
    pub parent_id: Option<BackupId>,
    /// The job that made it; none for a backup that was taken in from Cinder.
    pub job_id: Option<JobId>,
    /// How often people had brought that job back when it began this.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub revival_count: u32,
    /// Tells the attempt that writes it from any other attempt of the same job.
    #[serde(default)]
    pub writer: String,
    /// The attempt before it, of which all was removed or taken over: what that one still says counts no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub displaced_writer: Option<String>,
    /// How far that attempt is known to be, if another one may go on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// The driver that wrote it, in Cinder's words, such as `cinder.backup.drivers.posix.PosixBackupDriver`.
    pub service: String,
    /// What Cinder's driver needs to find the data: for the chunked drivers the prefix of all its objects.
    pub service_metadata: String,
    /// Where in the store the objects lie.
    pub container: Container,
    /// A name for people.
    pub name: Option<String>,
    /// A description for people.
    pub description: Option<String>,
    /// The tenant that it belongs to.
    pub project_id: Option<String>,
    /// When it was begun.
    pub created_at: Timestamp,
    /// The volume's exact size. Cinder's own records only know whole GiB.
    pub volume_bytes: u64,
    /// The method that made it.
    pub method: Option<Method>,
    /// Why it was not made by the method that was planned first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback_reason: Option<Problem>,
    /// What was moved to make it.
    pub counts: Counts,
    /// The digest over the volume's block digests, as in the account of the job.
    pub digest: Option<String>,
    /// SHA-256 of the metadata object, of the sha256 file and of our checksums of the data objects, by object name.
    /// There are no checksums of a backup that was taken in from Cinder.
    pub object_digests: Vec<(String, String)>,
    /// The snapshot of the volume that the backup was made of, which stays for the next one to be compared with; of an
    /// RBD image only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceSnapshot>,
    /// The id of the RBD image that holds the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<String>,
    /// Everything else of Cinder's record, kept so that an export gives back what an import took.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub cinder_fields: serde_json::Map<String, serde_json::Value>,
}

impl Record {
    /// Whether this is the record of the backup that the attempt which writes `record` makes, and says that it is whole.
    pub fn is_done_of(&self, record: &Self) -> bool {
        self.writer == record.writer && self.state == RecordState::Available
    }

    /// Whether the attempt that writes this record still makes the backup, of which the store has `current`. In a store that
    /// knows no compare-and-swap, the attempt before it may have written its own over this one.
    pub fn stands(&self, current: Option<&Self>) -> bool {
        current.is_some_and(|current| {
            let is_own = current.writer == self.writer && current.state == self.state;
            let is_displaced = self.displaced_writer.as_ref() == Some(&current.writer)
                && matches!(current.state, RecordState::Creating(_) | RecordState::Available);
            is_own || is_displaced
        })
    }
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// A snapshot of a volume that a backup was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSnapshot {
    /// Where it is, with its name.
    pub image: RbdImage,
    /// The id of the image; one of the same name that is made later has another.
    pub image_id: String,
    /// The id of the snapshot, once it was taken.
    pub snapshot_id: Option<u64>,
}

/// When a backup was last read back and found whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// When that had been done.
    pub at: Timestamp,
    /// How much of its data was read; all of it if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_percent: Option<Sample>,
}

/// How far a backup is known to be: all before it is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// How much of the volume, from its beginning.
    pub bytes_done: u64,
    /// What was moved for that.
    pub counts: Counts,
}
