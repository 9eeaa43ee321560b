//! What can go wrong while a backup is made, read or removed.

use std::io;

use crate::error::Class;
#[cfg(feature = "ceph")]
use crate::error::Problem;
use crate::job::{BackupId, Cancelled, InvalidName, Record, RecordState, VolumeId};
use crate::store::{self, Folder, InvalidObjectName};
use crate::volume;

use super::chunked::Broken;
use super::cpu::Lost;

/// Why an engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody asked for the end of the job.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),

    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),

    /// The source or target cannot be used.
    #[error(transparent)]
    Volume(#[from] volume::Error),

    /// Volumes of that kind need Ceph.
    #[cfg(not(feature = "ceph"))]
    #[error("{location} cannot be used: this program was built without Ceph, for file: volumes only")]
    UnsupportedVolume {
        /// The source or target.
        location: String,
    },

    /// The source failed while it was read.
    #[error("read the source at byte {offset}")]
    ReadVolume {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },

    /// The target failed while it was written.
    #[error("write the target at byte {offset}; what it holds now is not a whole volume")]
    WriteVolume {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },

    /// The target could not be made durable.
    #[error("finish the target; what it holds now may not be a whole volume")]
    FinishVolume {
        /// Why.
        source: io::Error,
    },

    /// What a restore went on with was not what the note beside it says.
    #[error(
        "{restored_bytes} of {volume_bytes} bytes are restored, because an attempt before had noted other objects than these; \
         the next one begins anew"
    )]
    RestoredOthers {
        /// How much is restored, by what this attempt and the note count.
        restored_bytes: u64,
        /// The volume's size.
        volume_bytes: u64,
    },

    /// There is no record of such a backup.
    #[error("backup {0} is not in this store: `backhaul list` shows what is")]
    UnknownBackup(BackupId),

    /// There is a backup under the id that a new one was to get.
    #[error("there is a backup {0} already: give the new one an id of its own, or delete the old one first")]
    BackupExists(BackupId),

    /// There is something under the id that a new backup was to get, of which this store has no record.
    #[error(
        "there is {found} already, and backup {backup_id} is not in this store: give the new one an id of its own; \
         `backhaul record import` takes in one of Cinder's, and `backhaul gc` removes what a job has left that died"
    )]
    NotRecorded {
        /// The backup that was to be made.
        backup_id: BackupId,
        /// What is there: an image, a snapshot or an object.
        found: String,
    },

    /// The backup is not whole.
    #[error("backup {backup_id} cannot be used: it is {state}")]
    NotAvailable {
        /// The backup.
        backup_id: BackupId,
        /// What it is, for people.
        state: String,
    },

    /// A record, or what is kept of a job, could not be understood.
    #[error("{object} is damaged: {why}; move that file away{}", after_moved(.object))]
    DamagedRecord {
        /// Which.
        object: String,
        /// How that shows.
        why: String,
    },

    /// Another worker has taken the job over.
    #[error("another worker has taken over backup {0}")]
    TakenOver(BackupId),

    /// The job that makes the backup had failed before.
    #[error("backup {backup_id} has come to nothing: {problem}")]
    CameToNothing {
        /// The backup.
        backup_id: BackupId,
        /// Why.
        problem: String,
    },

    /// Somebody deleted the backup while it was made.
    #[error("backup {0} was deleted while it was being made")]
    DeletedMeanwhile(BackupId),

    /// No earlier backup to build on.
    #[error("volume {0} has no earlier backup in this store to build on")]
    NoParent(VolumeId),

    /// The parent that was asked for is not in the store.
    #[error(
        "the parent {0} is not in this store: name a backup that `backhaul list` shows, or ask for a full backup"
    )]
    UnknownParent(BackupId),

    /// A backup that another one builds on is not in the store.
    #[error(
        "backup {backup_id} builds on {parent_id}, which is not in this store: if that one's data is, take it in again \
         with `backhaul record import`"
    )]
    ParentGone {
        /// The backup that was asked for.
        backup_id: BackupId,
        /// The one that is missing in its chain.
        parent_id: BackupId,
    },

    /// The parent belongs to another volume.
    #[error("the parent {parent_id} is a backup of volume {parent_volume_id}, not of {volume_id}")]
    ParentOfAnotherVolume {
        /// The parent.
        parent_id: BackupId,
        /// Its volume.
        parent_volume_id: VolumeId,
        /// The volume that is backed up now.
        volume_id: VolumeId,
    },

    /// The parent is not whole.
    #[error("the parent {parent_id} cannot be built on: it is {state}")]
    ParentNotAvailable {
        /// The parent.
        parent_id: BackupId,
        /// What it is, for people.
        state: String,
    },

    /// The parent cannot be compared with the volume.
    #[error("the parent {parent_id} cannot be built on: {why}")]
    ParentUnsuitable {
        /// The parent.
        parent_id: BackupId,
        /// Why, for people.
        why: String,
    },

    /// An attempt before this one, which the job is to go on from, could not make the backup by this method.
    #[cfg(feature = "ceph")]
    #[error("{0}")]
    GivenUp(Problem),

    /// A block has changed that nobody said had changed.
    #[error(
        "the block at byte {offset} of {image} differs from the parent {parent_id}, and Ceph says that it has not changed \
         since: what it knows of changes in this image is wrong, so other backups of it that were made incrementally may \
         lack some too. Look at it with `rbd object-map check`, and run `rbd object-map rebuild` on it and its snapshots"
    )]
    UnseenChange {
        /// The parent.
        parent_id: BackupId,
        /// The image.
        image: String,
        /// Where the block begins.
        offset: u64,
    },

    /// Ceph would not say what has changed.
    #[cfg(feature = "ceph")]
    #[error("what is to be copied cannot be found")]
    DiffFailed {
        /// Why.
        source: crate::ceph::Error,
    },

    /// A Ceph cluster failed.
    #[cfg(feature = "ceph")]
    #[error("the cluster failed")]
    Ceph(#[from] crate::ceph::Error),

    /// A backup is deleted but for the snapshot that it was made of.
    #[cfg(feature = "ceph")]
    #[error(
        "the backup is deleted, but for its snapshot {snapshot} on the volume, which cannot be removed: put that right, or \
         take the cluster out of the configuration to leave the snapshot there, and delete the backup again"
    )]
    SnapshotStays {
        /// Which.
        snapshot: String,
        /// Why.
        source: crate::ceph::Error,
    },

    /// Somebody else writes to an image, or has cloned it.
    #[error(
        "image {image} is in use by somebody else: if nobody should, `rbd status` tells who has it open, and \
         `rbd children` what clones there are of it"
    )]
    ImageInUse {
        /// Which.
        image: String,
    },

    /// An image has more than one snapshot of a backup.
    #[error("image {image} has more than one snapshot of backup {backup_id}, and only one can be right")]
    TwoSnapshots {
        /// The image.
        image: String,
        /// The backup.
        backup_id: BackupId,
    },

    /// The volume has another size than at the time of the parent.
    #[error(
        "the volume has {volume_bytes} bytes now and had {parent_bytes} at the time of the parent {parent_id}"
    )]
    VolumeResized {
        /// The parent.
        parent_id: BackupId,
        /// The size then.
        parent_bytes: u64,
        /// The size now.
        volume_bytes: u64,
    },

    /// The parent's digests are of blocks of another size.
    #[error(
        "the parent {parent_id} has digests of blocks of {parent_block_bytes} bytes, and sha_block_bytes is set to \
         {block_bytes} now"
    )]
    BlockSizeChanged {
        /// The parent.
        parent_id: BackupId,
        /// The parent's.
        parent_block_bytes: u64,
        /// Ours.
        block_bytes: u64,
    },

    /// The volume's size changed while it was read.
    #[error(
        "the source ended at byte {offset}, before its end at {volume_bytes}: it shrank during the backup"
    )]
    SourceShrank {
        /// Where the read failed.
        offset: u64,
        /// The size it had at the start.
        volume_bytes: u64,
    },

    /// What is to be kept with a backup is more than what is read back.
    #[error(
        "name, description and volume_meta of backup {backup_id} take {bytes} bytes as they are kept with it, and no more than \
         {bytes_max} are read back: give less"
    )]
    TextsTooLong {
        /// The backup.
        backup_id: BackupId,
        /// What they take.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },

    /// Other backups build on this one.
    #[error("backup {backup_id} has backups that build on it: delete {children} first")]
    HasChildren {
        /// The backup.
        backup_id: BackupId,
        /// Its children, for people.
        children: String,
    },

    /// An object is not what was stored.
    #[error("{object} is damaged: {why}")]
    Damaged {
        /// Which.
        object: String,
        /// How that shows.
        why: String,
    },

    /// An object of the backup is not there.
    #[error("{object} is missing: backup {backup_id} cannot be read as a whole")]
    MissingObject {
        /// Which.
        object: String,
        /// The backup that it belongs to.
        backup_id: BackupId,
    },

    /// An object lies between those of the backup.
    #[error(
        "{object} is not of backup {backup_id}, though its name says so, and Cinder refuses to restore beside it: move \
         it away"
    )]
    ExtraObject {
        /// Which.
        object: String,
        /// The backup that its name says.
        backup_id: BackupId,
    },

    /// The objects of a chain do not make a volume.
    #[error("backup {backup_id} is damaged")]
    BrokenChain {
        /// The backup whose objects do not fit.
        backup_id: BackupId,
        /// How that shows.
        source: Broken,
    },

    /// A record was written, and is in no listing yet.
    #[error(
        "the store does not list {object} yet, which was written just now: without that a delete of the parent would not \
         see that another backup builds on it"
    )]
    NotListedYet {
        /// The record.
        object: String,
    },

    /// A backup was looked at as a whole, and this is all that is wrong with it.
    #[error("backup {backup_id} is damaged: {faults}{shared}")]
    DamagedBackup {
        /// The backup.
        backup_id: BackupId,
        /// What was found, for people.
        faults: String,
        /// Which other backups lack the same, for people; empty if none.
        shared: String,
    },

    /// The backup was written in a version of the format that nobody here knows.
    #[error("{object} is of version {version:?}, and this version of backhaul reads 1.0.0 only")]
    UnknownVersion {
        /// Which.
        object: String,
        /// Its version.
        version: String,
    },

    /// A name out of a record or of metadata is not safe to use.
    #[error("a name in the record is not safe to use")]
    UnsafeName(#[from] InvalidObjectName),

    /// A container name is not safe to use.
    #[error("a container in the record is not safe to use")]
    UnsafeContainer(#[from] InvalidName),

    /// A backup of Cinder's is not what its record says, or not whole.
    #[error("backup {backup_id} cannot be taken in: {why}")]
    NotImportable {
        /// The backup.
        backup_id: BackupId,
        /// How that shows.
        why: String,
    },

    /// Packing failed, which it does for want of memory only.
    #[error("compress")]
    Compress(#[source] io::Error),

    /// A thread of ours went away.
    #[error("a piece of work was lost")]
    Lost(#[from] Lost),
}

/// What comes of moving a damaged file away.
fn after_moved(object: &str) -> &'static str {
    let is_in = |folder: &'static str| {
        object.strip_prefix(Folder::own(folder).as_str()).is_some_and(|name| name.starts_with('/'))
    };
    if is_in("records") {
        ", and if it is of a backup that is to be kept, take that in again with `backhaul record import` before anything \
         else is deleted"
    } else if is_in("outcomes") {
        ": it keeps only how a job ended, in case its message comes once more; that job is then done anew"
    } else if is_in("cancels") {
        ": it keeps only that a job is to be cancelled; ask for that again"
    } else if is_in("verified") {
        ": it keeps only when a backup was found whole; verify that again"
    } else {
        ""
    }
}

impl Error {
    /// Whether it tells of a backup that is not what was stored.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::MissingObject { .. }
                | Self::ExtraObject { .. }
                | Self::BrokenChain { .. }
                | Self::UnknownVersion { .. }
        )
    }

    /// Why an attempt cannot go on that makes a backup of which the store has `current` now, which is not its own.
    pub(super) fn displaced(id: BackupId, current: Option<&Record>) -> Self {
        match current {
            // By a run of the same job, which was cancelled.
            Some(Record { state: RecordState::Deleting(by), job_id, .. }) if Some(*by) == *job_id => {
                Self::TakenOver(id)
            }
            None | Some(Record { state: RecordState::Deleting(_), .. }) => Self::DeletedMeanwhile(id),
            Some(_) => Self::TakenOver(id),
        }
    }

    /// The same of a parent that was not asked for, but found to be the newest: that it is gone is no reason to fail.
    pub(super) fn of_chosen_parent(self) -> Self {
        match self {
            Self::UnknownParent(parent_id) => {
                Self::ParentUnsuitable { parent_id, why: "it was deleted meanwhile".into() }
            }
            Self::ParentNotAvailable { parent_id, state } => {
                Self::ParentUnsuitable { parent_id, why: format!("it is {state}") }
            }
            other => other,
        }
    }

    /// The same of the chain of such a parent.
    pub(super) fn of_chosen_chain(self, parent_id: BackupId) -> Self {
        match self {
            Self::UnknownBackup(_)
            | Self::NotAvailable { .. }
            | Self::ParentGone { .. }
            | Self::DamagedRecord { .. } => Self::ParentUnsuitable { parent_id, why: self.to_string() },
            other => other,
        }
    }

    /// Whether the store has no room left.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Store(error) if matches!(error.reason(), store::Reason::Full))
    }

    /// Whether what is to be restored onto is in use, perhaps by another run of the same job.
    pub(crate) fn is_target_in_use(&self) -> bool {
        match self {
            Self::Volume(volume::Error::InUse { .. }) => true,
            #[cfg(feature = "ceph")]
            Self::Volume(volume::Error::ImageInUse { .. }) => true,
            _ => false,
        }
    }

    /// What it means for the job.
    pub fn class(&self) -> Class {
        match self {
            Self::Cancelled(_) => Class::Cancelled,
            Self::Store(error) => error.class(),
            Self::Volume(error) => error.class(),
            Self::ReadVolume { source, .. }
            | Self::WriteVolume { source, .. }
            | Self::FinishVolume { source } => volume::class(source),
            #[cfg(feature = "ceph")]
            Self::Ceph(error) => volume::class_of(error.kind()),
            #[cfg(feature = "ceph")]
            Self::DiffFailed { source } => match volume::class_of(source.kind()) {
                Class::Transient => Class::Transient,
                _ => Class::Unsuitable,
            },
            Self::ImageInUse { .. } | Self::RestoredOthers { .. } | Self::NotListedYet { .. } => {
                Class::Transient
            }
            Self::ParentUnsuitable { .. } | Self::UnseenChange { .. } => Class::Unsuitable,
            #[cfg(feature = "ceph")]
            Self::GivenUp(_) => Class::Unsuitable,
            Self::NoParent(_) | Self::VolumeResized { .. } | Self::BlockSizeChanged { .. } => {
                Class::Unsuitable
            }
            // Whoever took over ends the job; if that fails as well, a later try here may do it.
            Self::TakenOver(_) | Self::Lost(_) | Self::Compress(_) => Class::Transient,
            _ => Class::Permanent,
        }
    }
}
