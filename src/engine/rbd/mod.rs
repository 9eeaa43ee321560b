//! Backups as snapshots of RBD images, in the form of Cinder's Ceph driver, so that either side restores what the
//! other wrote.
//!
//! A chain of backups of a volume is one image; each backup is a snapshot of it, of the same name as one that is kept
//! on the volume. Only what differs between two snapshots of the volume is read, and of that only what is not zeros is
//! written. Beside Cinder's objects there is a list of the digests of all blocks that were copied.

mod backup;
mod digests;
mod gc;
mod names;
mod pieces;
mod read_back;
mod remove;
mod transfer;

use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use super::chunked::Budget;
use super::chunked::digest::{BlockDigester, sha256};
use super::cpu::{Cpu, blocking};
use super::error::Error;
use super::source::Source;
use crate::ceph::{Cluster, Clusters, Image, Mode, Pool, Snapshot};
use crate::job::{BackupId, BackupWork, Counts, JobId, Method, Mode as Share, Record, RecordState, Strategy};
use crate::store::ObjectStore;

pub use backup::{Unfinished, given_up, trim};
pub use gc::{Known, Leftover, List, source_leftovers, why_list_orphaned};
pub use names::{SERVICE, backup_of, is_of_backups, source_image};
pub use transfer::To;

/// How a store's images are made. Everything else is as Cinder has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The cluster's name in the configuration; the only one if absent.
    pub cluster: Option<String>,
    /// The pool for backups that name no container.
    pub pool: String,
    /// How many snapshots of backups a volume may keep; 0 for any number.
    pub source_snapshots_max: u32,
    /// Whether images keep a journal of all writes, for mirroring.
    pub journaling: bool,
    /// The size and the number of stripes; those of whole objects if absent.
    pub stripes: Option<(u64, u64)>,
    /// How much of a volume is read before it is noted how far the backup is; more of a very large one.
    pub checkpoint_bytes: u64,
}

/// How far apart checkpoints are: far enough to cost little beside the work that they save.
pub const CHECKPOINT_BYTES: u64 = 1 << 30;

/// The metadata of a volume has a few kB.
const METADATA_BYTES_MAX: usize = 1 << 20;

/// The RBD engine on one store.
#[derive(Debug, Clone)]
pub struct Rbd {
    store: Arc<dyn ObjectStore>,
    clusters: Clusters,
    settings: Settings,
    cpu: Cpu,
    memory: Budget,
    digester: Arc<BlockDigester>,
}

impl Rbd {
    /// Puts the engine together. `store` keeps the records and digests; `cpu` and `memory` are those of the whole
    /// worker.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        clusters: Clusters,
        settings: Settings,
        cpu: Cpu,
        memory: Budget,
    ) -> Self {
        let digester = Arc::new(BlockDigester::new(pieces::BLOCK_BYTES as usize));
        Self { store, clusters, settings, cpu, memory, digester }
    }

    /// The store of the records.
    pub fn store(&self) -> Arc<dyn ObjectStore> {
        self.store.clone()
    }

    /// How many snapshots of backups a volume may keep; 0 for any number.
    pub fn source_snapshots_max(&self) -> u32 {
        self.settings.source_snapshots_max
    }

    /// Makes the record that a backup begins with.
    pub fn begin(
        &self,
        job_id: JobId,
        work: &BackupWork,
        parent: Option<&Record>,
        volume_bytes: u64,
        method: Method,
    ) -> Result<Record, Error> {
        let container = match (parent, &work.container) {
            // A chain is one image, which is where it is.
            (Some(parent), _) => parent.container.clone(),
            (None, Some(container)) => container.clone(),
            (None, None) => self.settings.pool.parse()?,
        };
        let base = match parent {
            Some(parent) => names::image(parent),
            None => names::base(work.volume_id, work.backup_id),
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
            service: SERVICE.into(),
            service_metadata: names::service_metadata(&base),
            container,
            name: work.name.clone(),
            description: work.description.clone(),
            project_id: work.project_id.clone(),
            created_at: Timestamp::now(),
            volume_bytes,
            method: Some(Method { mode: Some(method.mode.unwrap_or(Share::Full)), ..method }),
            counts: Counts::default(),
            digest: None,
            object_digests: Vec::new(),
            source: None,
            image_id: None,
            fallback_reason: None,
            cinder_fields: serde_json::Map::new(),
        })
    }

    /// Makes sure that the pool has nothing of the id of a backup that is to be made: it would be one of Cinder's, or of
    /// another store.
    pub async fn check_unused(&self, record: &Record) -> Result<(), Error> {
        let (engine, record) = (self.clone(), record.clone());
        blocking(move || {
            let Some(pool) = engine.pool_if_there(&record)? else { return Ok(()) };
            let (name, metadata) = (names::image(&record), names::metadata_object(record.backup_id));
            let found = match open(&pool, &name, None)? {
                Some(image) if is_made_by(&name, &record) => Some(image.path().to_owned()),
                Some(image) => {
                    let snapshot = snapshot_of(&image, &record)?;
                    snapshot.map(|snapshot| format!("{}@{}", image.path(), snapshot.name))
                }
                None => None,
            };
            let metadata = pool.object_bytes(&metadata)?.map(|_| format!("{}/{metadata}", pool.name()));
            match found.or(metadata) {
                Some(found) => Err(Error::NotRecorded { backup_id: record.backup_id, found }),
                None => Ok(()),
            }
        })
        .await?
    }

    /// Looks at a backup that Cinder made, and completes its record with the exact size of the volume and with the image
    /// that holds it.
    pub async fn inspect(&self, record: &mut Record) -> Result<(), Error> {
        let (engine, wanted) = (self.clone(), record.clone());
        let (name, image_id, bytes) = blocking(move || engine.find(&wanted)).await??;
        record.service_metadata = names::service_metadata(&name);
        (record.image_id, record.volume_bytes) = (Some(image_id), bytes);
        Ok(())
    }

    /// The metadata of the volume that was kept with a backup.
    pub async fn volume_meta(&self, record: &Record) -> Result<Option<String>, Error> {
        let (engine, record) = (self.clone(), record.clone());
        blocking(move || {
            let pool = engine.pool(&engine.connect()?, &record)?;
            let name = names::metadata_object(record.backup_id);
            if pool.object_bytes(&name)?.is_none() {
                return Ok(None);
            }
            let bytes = pool.read_object(&name, 0, METADATA_BYTES_MAX)?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        })
        .await?
    }

    /// Finds what holds a backup that Cinder made: name and id of the image, and the size of the volume.
    fn find(&self, record: &Record) -> Result<(String, String, u64), Error> {
        let not_importable = |why| Error::NotImportable { backup_id: record.backup_id, why };
        let pool = self.pool(&self.connect()?, record)?;
        let names = names::images(record);
        for name in &names {
            let Some(image) = open(&pool, name, None)? else { continue };
            let bytes = match snapshot_of(&image, record)? {
                Some(snapshot) => snapshot.bytes,
                None if image.snapshots()?.is_empty() => image.bytes()?,
                None => return Err(not_importable(format!("{} has no snapshot of it", image.path()))),
            };
            return Ok((name.clone(), image.id()?, bytes));
        }
        Err(not_importable(format!("there is no image {} in pool {}", names.join(" or "), pool.name())))
    }

    /// Whether the snapshot is there that makes the backup visible; it is the first thing that a delete removes.
    pub async fn is_visible(&self, record: &Record) -> Result<bool, Error> {
        let (engine, record) = (self.clone(), record.clone());
        blocking(move || {
            let Some(pool) = engine.pool_if_there(&record)? else { return Ok(false) };
            let image = open(&pool, &names::image(&record), None)?;
            Ok(match image {
                Some(image) => snapshot_of(&image, &record)?.is_some(),
                None => false,
            })
        })
        .await?
    }

    /// Connects to the cluster of the backups.
    fn connect(&self) -> Result<Cluster, Error> {
        Ok(self.clusters.connect(self.settings.cluster.as_deref())?)
    }

    /// The pool that a backup lies in.
    fn pool(&self, cluster: &Cluster, record: &Record) -> Result<Pool, Error> {
        Ok(cluster.pool(record.container.as_str())?)
    }

    /// The same of a backup that is to be removed. Its record was read from this cluster, so that a pool which is not there
    /// is gone, or never was.
    fn pool_if_there(&self, record: &Record) -> Result<Option<Pool>, Error> {
        match self.pool(&self.connect()?, record) {
            Err(Error::Ceph(error)) if error.is_missing() => Ok(None),
            pool => pool.map(Some),
        }
    }
}

/// Opens an image to read, if it is there.
fn open(pool: &Pool, image: &str, snapshot: Option<&str>) -> Result<Option<Image>, Error> {
    match pool.open_image(image, snapshot, Mode::Read) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        image => Ok(Some(image?)),
    }
}

/// The snapshot of a backup on an image; Cinder's name has a time that nobody else knows.
fn snapshot_of(image: &Image, record: &Record) -> Result<Option<Snapshot>, Error> {
    let name = names::snapshot(record);
    let mut snapshots = image.snapshots()?;
    if let Some(index) = snapshots.iter().position(|snapshot| snapshot.name == name) {
        return Ok(Some(snapshots.swap_remove(index)));
    }
    let mut of_backup = snapshots.into_iter().filter(|s| names::backup_of(&s.name) == Some(record.backup_id));
    match (of_backup.next(), of_backup.next()) {
        (Some(_), Some(_)) => {
            Err(Error::TwoSnapshots { image: image.path().into(), backup_id: record.backup_id })
        }
        (snapshot, _) => Ok(snapshot),
    }
}

/// Names in the record the snapshot that is to be taken of the source, if it is an image.
pub async fn with_source_snapshot(mut record: Record, source: &Source) -> Result<Record, Error> {
    if let Source::Rbd(origin) = source {
        let (origin, name) = (origin.clone(), names::snapshot(&record));
        record.source = blocking(move || origin.snapshot_to_take(&name)).await??;
    }
    Ok(record)
}

/// The strategy that copies only what differs between snapshots of the volume.
pub fn is_differential(method: Method) -> bool {
    method.strategy == Strategy::Rbd
}

/// The digest of a backup, as records and events show it: over the digests of its lists, of which there is mostly one.
fn digest(lists: &[(String, String)]) -> String {
    let all: String = lists.iter().map(|(_, sha256)| sha256.as_str()).collect();
    format!("sha256-blocks:{}", hex::encode(sha256(all.as_bytes())))
}

/// All images of backups begin alike, whoever made them.
fn is_made_by(image: &str, record: &Record) -> bool {
    image == names::base(record.volume_id, record.backup_id)
}

/// For people: the snapshots of which backups an image has.
fn backups_on(snapshots: &[Snapshot]) -> Vec<BackupId> {
    snapshots.iter().filter_map(|snapshot| names::backup_of(&snapshot.name)).collect()
}
