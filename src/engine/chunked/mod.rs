//! Backups as objects of a store, in the format of Cinder's chunked drivers, so that either side restores what the
//! other wrote.
//!
//! A volume is cut into chunks, each of which becomes an object (of a full backup) or one for each run of changed
//! blocks (of an incremental one). The digests of all blocks lie in the sha256 file, the list of the objects in the
//! metadata object, which is written last and deleted first.

mod backup;
mod changes;
mod checkpoints;
pub(crate) mod checksums;
mod compression;
pub mod digest;
mod gc;
mod layers;
mod lists;
mod memory;
pub(crate) mod metadata;
mod read_back;
mod restored;
pub(crate) mod sha256_file;
pub(super) mod stored;

pub use backup::Unfinished;
pub use compression::{Compression, UnknownCompression, ZSTD_LEVEL};
pub use gc::Attempt;
pub use layers::Broken;
pub use memory::Budget;

use std::sync::Arc;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use uuid::Uuid;

use super::cpu::{Cpu, Lost, blocking};
use super::error::Error;
use crate::job::{
    BackupId, BackupWork, Container, Context, Counts, JobId, Method, Mode, Record, RecordState,
};
use crate::store::{self, Folder, Listed, ObjectName, ObjectStore, Reason};

use digest::ListDigest;
use metadata::object_number;

/// Requests to the store that one job has under way at once, at most.
const REQUESTS_MAX: usize = 16;
/// Objects that are deleted between two looks at whether the job shall go on. A server that takes many at once deletes
/// them one after the other.
const DELETES_AT_ONCE: usize = 250;
/// How many times as many objects are being deleted at once, at most.
const DELETES_MAX: usize = 8;
/// Characters that are shown of what an object says.
const SHOWN_CHARS_MAX: usize = 1000;

/// The availability zone of Cinder's that nobody has given another name.
pub const USUAL_ZONE: &str = "nova";

/// How the names of a backup's objects are made: each is what one of Cinder's drivers does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Naming {
    /// Each backup has a folder of its own, as of the posix driver.
    #[default]
    Folders,
    /// The same on a share, as of the NFS driver.
    Shares,
    /// All backups that name no bucket share this one, as of the S3 driver.
    Buckets {
        /// Its name.
        usual: String,
    },
    /// All backups that name no container share this one, as of the Swift driver.
    Containers {
        /// Its name.
        usual: String,
    },
    /// The same as with buckets, as of the driver for Google Cloud Storage.
    Google {
        /// Its name.
        usual: String,
    },
}

impl Naming {
    /// What Cinder calls the driver.
    fn service(&self) -> &'static str {
        match self {
            Self::Folders => "cinder.backup.drivers.posix.PosixBackupDriver",
            Self::Shares => "cinder.backup.drivers.nfs.NFSBackupDriver",
            Self::Buckets { .. } => "cinder.backup.drivers.s3.S3BackupDriver",
            Self::Containers { .. } => "cinder.backup.drivers.swift.SwiftBackupDriver",
            Self::Google { .. } => "cinder.backup.drivers.gcs.GoogleBackupDriver",
        }
    }

    /// The container of a backup whose job names none.
    fn container(&self, backup_id: BackupId) -> Result<Container, Error> {
        let id = backup_id.to_string();
        Ok(match self {
            Self::Folders | Self::Shares => format!("{}/{}/{id}", &id[..2], &id[2..4]).parse()?,
            Self::Buckets { usual } | Self::Containers { usual } | Self::Google { usual } => usual.parse()?,
        })
    }

    /// What the names of a backup's objects begin with. A zone is in it only, and nobody looks for it there.
    fn prefix(&self, record: &Record, zone: &str) -> String {
        let Record { volume_id, backup_id, .. } = record;
        let time = record.created_at.strftime("%Y%m%d%H%M%S");
        match self {
            Self::Folders | Self::Shares => format!("volume_{volume_id}_{time}_backup_{backup_id}"),
            Self::Buckets { .. } | Self::Containers { .. } | Self::Google { .. } => {
                format!("volume_{volume_id}/{time}/az_{zone}_backup_{backup_id}")
            }
        }
    }
}

/// How a store's backups are written. How they are read stands in their metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How objects are packed.
    pub compression: Compression,
    /// The level at which zstd packs them.
    pub compression_level: i32,
    /// How much of a volume one object holds; a multiple of `sha_block_bytes`.
    pub object_bytes: usize,
    /// The size of the blocks that are digested and compared.
    pub sha_block_bytes: usize,
    /// How many of 1,000 blocks that have not changed, as the volume says, are read all the same to see whether that is
    /// so; there is a least number of them.
    pub unchanged_check_per_mille: u32,
    /// How many snapshots of backups a volume may keep; 0 for any number. Only that of the newest one is of use, but for
    /// a backup whose parent was named.
    pub source_snapshots_max: u32,
}

/// The chunked engine on one store.
#[derive(Debug, Clone)]
pub struct Chunked {
    store: Arc<dyn ObjectStore>,
    naming: Naming,
    zone: String,
    settings: Settings,
    cpu: Cpu,
    memory: Budget,
    /// How much of a volume is stored, or restored, before it is noted what of it is.
    checkpoint_bytes: u64,
}

impl Chunked {
    /// Puts the engine together. `cpu` and `memory` are those of the whole worker.
    pub fn new(store: Arc<dyn ObjectStore>, settings: Settings, cpu: Cpu, memory: Budget) -> Self {
        let checkpoint_bytes = checkpoints::CHECKPOINT_BYTES;
        let (naming, zone) = (Naming::default(), USUAL_ZONE.into());
        Self { store, naming, zone, settings, cpu, memory, checkpoint_bytes }
    }

    /// The same engine with other distances between checkpoints.
    pub fn with_checkpoint_bytes(self, checkpoint_bytes: u64) -> Self {
        Self { checkpoint_bytes, ..self }
    }

    /// The same engine with other names for new objects.
    pub fn with_naming(self, naming: Naming) -> Self {
        Self { naming, ..self }
    }

    /// The same engine with another availability zone in the names of new objects in buckets.
    pub fn with_zone(self, zone: String) -> Self {
        Self { zone, ..self }
    }

    /// The store.
    pub fn store(&self) -> Arc<dyn ObjectStore> {
        self.store.clone()
    }

    /// How many snapshots of backups a volume may keep; 0 for any number.
    pub fn source_snapshots_max(&self) -> u32 {
        self.settings.source_snapshots_max
    }

    /// Makes the record that a backup begins with. Fails where this parent cannot be built on.
    pub fn begin(
        &self,
        job_id: JobId,
        work: &BackupWork,
        parent: Option<&Record>,
        volume_bytes: u64,
        method: Method,
    ) -> Result<Record, Error> {
        if let Some(parent) = parent {
            check_size(parent, volume_bytes)?;
        }
        let container = match &work.container {
            Some(container) => container.clone(),
            None => self.naming.container(work.backup_id)?,
        };
        Ok(Record {
            backup_id: work.backup_id,
            volume_id: work.volume_id,
            state: RecordState::Creating(job_id),
            parent_id: parent.map(|parent| parent.backup_id),
            job_id: Some(job_id),
            writer: Uuid::new_v4().to_string(),
            displaced_writer: None,
            revival_count: 0,
            checkpoint: None,
            // Cinder gives a backup to the driver that it names, with the whole chain.
            service: parent.map_or(self.naming.service(), |parent| &parent.service).into(),
            service_metadata: String::new(),
            container,
            name: work.name.clone(),
            description: work.description.clone(),
            project_id: work.project_id.clone(),
            created_at: Timestamp::now(),
            volume_bytes,
            method: Some(Method { mode: Some(method.mode.unwrap_or(Mode::Full)), ..method }),
            counts: Counts::default(),
            digest: None,
            object_digests: Vec::new(),
            source: None,
            image_id: None,
            fallback_reason: None,
            cinder_fields: serde_json::Map::new(),
        })
    }

    /// Gives the objects of a backup their prefix, by Cinder's rule.
    pub fn name(&self, record: &mut Record) {
        record.service_metadata = self.naming.prefix(record, &self.zone);
    }

    /// Whether the object that makes the backup visible is there; it is the first one that a delete removes.
    pub async fn is_visible(&self, record: &Record) -> Result<bool, Error> {
        self.has(&Names::of(record)?.metadata).await
    }

    /// Asks for the object itself: a listing may not have it yet.
    async fn has(&self, object: &ObjectName) -> Result<bool, Error> {
        match self.store.get(object).await {
            Err(error) if matches!(error.reason(), Reason::Missing) => Ok(false),
            found => Ok(found.map(|_| true)?),
        }
    }

    /// Removes all objects of a backup, the one that makes it visible first, and counts what that frees.
    pub async fn remove(&self, record: &Record, ctx: &Context) -> Result<(), Error> {
        self.remove_objects(&Names::of(record)?, record.counts.object_count, ctx).await
    }

    /// Removes what the listing has of an attempt, and so many objects by their numbers where it has not.
    async fn remove_objects(&self, names: &Names, object_count: u64, ctx: &Context) -> Result<(), Error> {
        self.store.delete(&names.metadata).await?;
        self.store.delete(&names.sha256_file).await?;
        let objects = self.data_objects(names, |_| {}).await?;
        stream::iter(objects.chunks(DELETES_AT_ONCE).map(Ok::<_, Error>))
            .try_for_each_concurrent(DELETES_MAX, |objects| async move {
                ctx.check()?;
                let some: Result<Vec<_>, _> =
                    objects.iter().map(|object| names.data(object.number)).collect();
                self.store.delete_all(&some?).await?;
                ctx.progress.add(&Counts {
                    bytes_stored: objects.iter().map(|object| object.bytes).sum(),
                    object_count: objects.len() as u64,
                    ..Counts::default()
                });
                Ok(())
            })
            .await?;
        let is_unlisted =
            |number: &u64| objects.binary_search_by_key(number, |object| object.number).is_err();
        stream::iter((1..=object_count).filter(is_unlisted))
            .chunks(DELETES_AT_ONCE)
            .map(Ok::<_, Error>)
            .try_for_each_concurrent(DELETES_MAX, |numbers| async move {
                ctx.check()?;
                let some: Result<Vec<_>, _> = numbers.into_iter().map(|number| names.data(number)).collect();
                Ok(self.store.delete_all(&some?).await?)
            })
            .await?;
        self.store.tidy(&names.folder, names.prefix()).await?;
        // They show that the others are ours, so they go last.
        self.remove_notes(names).await?;
        self.store.delete(&names.checksums).await?;
        Ok(self.store.tidy(&names.checksums.folder, names.prefix()).await?)
    }

    /// The data objects that the store has of an attempt, by number. What has a name that begins alike is not one of them,
    /// and goes to `other`.
    async fn data_objects(
        &self,
        names: &Names,
        mut other: impl FnMut(Listed) + Send,
    ) -> Result<Vec<DataObject>, Error> {
        let mut objects = Vec::new();
        let mut take = |listed: Listed| match object_number(names.prefix(), &listed.name) {
            Some(number) => objects.push(DataObject { number, bytes: listed.bytes }),
            None => other(listed),
        };
        self.store.list_each(&names.folder, names.prefix(), &mut take).await?;
        objects.sort_unstable_by_key(|object| object.number);
        // A store that is written to while it is listed may tell of one twice.
        objects.dedup_by_key(|object| object.number);
        Ok(objects)
    }

    /// The metadata of the volume that was kept with a backup.
    pub async fn volume_meta(&self, record: &Record) -> Result<Option<String>, Error> {
        let lists = self.object_lists(record).await?;
        let head = blocking(move || lists.read(|_| Ok(()))).await??;
        Ok(head.volume_meta)
    }

    /// Reads the lists of a backup that Cinder wrote, and checks them against its record and its parent. Completes the
    /// record with their digests, and with the exact size of the volume, which Cinder writes down nowhere: where the
    /// last object of the full backup ends.
    pub async fn inspect(&self, record: &mut Record, parent: Option<&Record>) -> Result<(), Error> {
        let backup_id = record.backup_id;
        let refused = |why: String| Error::NotImportable { backup_id, why: beginning(&why) };
        let lists = self.object_lists(record).await?;
        let (head, end) = blocking(move || {
            let mut end = 0;
            let head = lists.read(|object| {
                end = end.max(object.entry.end());
                Ok(())
            })?;
            Ok::<_, Error>((head, end))
        })
        .await??;
        if head.volume_id != record.volume_id.to_string() {
            return Err(refused(format!("its metadata is of volume {}", head.volume_id)));
        }
        if head.parent_id != record.parent_id.map(|id| id.to_string()) {
            let parent_id = head.parent_id.as_deref().unwrap_or("nothing");
            return Err(refused(format!(
                "it builds on {parent_id}, as its metadata says, and its record differs"
            )));
        }
        let volume_bytes = parent.map_or(end, |parent| parent.volume_bytes);
        let mut digests = self.digest_list(record).await?;
        let block_bytes = digests.block_bytes().await?;
        let (mut digest_count, mut list_digest) = (0, ListDigest::default());
        loop {
            let batch = digests.take(sha256_file::BATCH_DIGESTS).await?;
            if batch.is_empty() {
                break;
            }
            digest_count += batch.len() as u64;
            list_digest.update(&batch);
        }
        if volume_bytes == 0 || digest_count != volume_bytes.div_ceil(block_bytes) {
            return Err(refused(format!(
                "its sha256 file has digests of {digest_count} blocks of {block_bytes} bytes, which does not fit a \
                 volume of {volume_bytes} bytes"
            )));
        }
        let names = Names::of(record)?;
        for object in [&names.metadata, &names.sha256_file] {
            let sha256 = self.check_list(record, object).await?;
            record.object_digests.push((object.name.clone(), hex::encode(sha256)));
        }
        record.volume_bytes = volume_bytes;
        record.digest = Some(list_digest.finish());
        Ok(())
    }

    /// Reads an object that the backup must have.
    async fn get(&self, record: &Record, object: &ObjectName) -> Result<store::Pieces, Error> {
        match self.store.get(object).await {
            Err(error) if matches!(error.reason(), Reason::Missing) => {
                Err(Error::MissingObject { object: object.to_string(), backup_id: record.backup_id })
            }
            pieces => Ok(pieces?),
        }
    }
}

/// A data object as the store has it. There may be millions of them.
struct DataObject {
    /// The number at the end of its name.
    number: u64,
    /// Its size.
    bytes: u64,
}

/// The names of a backup's objects.
#[derive(Debug, Clone)]
struct Names {
    folder: Folder,
    prefix: String,
    metadata: ObjectName,
    sha256_file: ObjectName,
    checksums: ObjectName,
}

impl Names {
    fn of(record: &Record) -> Result<Self, Error> {
        Self::new(&record.container, &record.service_metadata)
    }

    fn new(container: &Container, prefix: &str) -> Result<Self, Error> {
        let folder = Folder::from(container);
        Ok(Self {
            metadata: folder.object(&format!("{prefix}_metadata"))?,
            sha256_file: folder.object(&format!("{prefix}_sha256file"))?,
            // An attempt that died has a list of its own, as it has a prefix of its own.
            checksums: Folder::own("checksums").object(prefix)?,
            folder,
            prefix: prefix.to_owned(),
        })
    }

    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn data(&self, number: u64) -> Result<ObjectName, Error> {
        Ok(self.folder.object(&metadata::object_name(&self.prefix, number))?)
    }

    /// A note of what an attempt has stored; they are numbered from 1.
    fn checkpoint(&self, number: u64) -> Result<ObjectName, Error> {
        Ok(Folder::own(checkpoints::FOLDER).object(&metadata::object_name(&self.prefix, number))?)
    }
}

fn damaged(object: &ObjectName, why: impl ToString) -> Error {
    Error::Damaged { object: object.to_string(), why: beginning(&why.to_string()) }
}

/// As much of a text as is shown. What is damaged may say anything, and at any length.
fn beginning(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).collect()
}

/// Makes sure that the volume has the size that it had at the time of the parent.
fn check_size(parent: &Record, volume_bytes: u64) -> Result<(), Error> {
    if parent.volume_bytes == volume_bytes {
        return Ok(());
    }
    let (parent_id, parent_bytes) = (parent.backup_id, parent.volume_bytes);
    Err(Error::VolumeResized { parent_id, parent_bytes, volume_bytes })
}

fn check_version(object: &ObjectName, version: &str) -> Result<(), Error> {
    if version == metadata::VERSION {
        return Ok(());
    }
    Err(Error::UnknownVersion { object: object.to_string(), version: beginning(version) })
}
