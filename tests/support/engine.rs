//! A store with a folder for volumes beside it, engines on that store, and jobs for them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backhaul::engine::chunked::{Budget, Chunked, Compression, Naming, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt, Updated, Volumes};
use backhaul::job::{
    Account, BackupId, BackupWork, Completion, Container, Context, Hold, Job, JobId, Location, Outcome,
    Parent, Record, RestoreWork, VolumeId, Work,
};
use backhaul::runner::plan;
use backhaul::store::{Folder, Gcs, Memory, ObjectName, ObjectStore, Posix, S3, Secret, SecretFrom, Swift};
use backhaul::volume::FileRoots;
use bytes::Bytes;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{gcs, s3, swift};

pub(crate) const COMPRESSIONS: [Compression; 4] =
    [Compression::None, Compression::Zlib, Compression::Bz2, Compression::Zstd];

/// Memory that is more than enough for what these tests move.
pub(crate) const MEMORY_BYTES: usize = 256 << 20;
/// So small that a few kilobytes make several objects of several blocks.
pub(crate) const SETTINGS: Settings = Settings {
    compression: Compression::Zstd,
    compression_level: 3,
    object_bytes: 2048,
    sha_block_bytes: 512,
    unchanged_check_per_mille: 1,
    source_snapshots_max: 1,
};

/// Volume data between two checkpoints of a backup: so little that the backups of tests have some.
const CHECKPOINT_BYTES: u64 = 4 << 10;

/// A kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Posix,
    Memory,
    S3,
    /// The same, encrypted by the gateway with [`s3::SSE_C_KEY`].
    Encrypted,
    /// OpenStack's own.
    Swift,
    /// Ceph's gateway, spoken to as Swift.
    Gateway,
    /// An emulator.
    Gcs,
}

/// A store of its own, and a folder for volumes.
pub(crate) struct Bench {
    folder: TempDir,
    /// Where the objects are files.
    root: Option<PathBuf>,
    store: Arc<dyn ObjectStore>,
    naming: Naming,
    cpu: Cpu,
}

impl Bench {
    pub(crate) fn new(kind: Kind) -> Self {
        Self::with_cpu(kind, Cpu::start(2).unwrap())
    }

    pub(crate) fn with_cpu(kind: Kind, cpu: Cpu) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("volumes")).unwrap();
        let root = folder.path().join("store");
        fs::create_dir(&root).unwrap();
        let (store, root, naming): (Arc<dyn ObjectStore>, _, _) = match kind {
            Kind::Posix => (Arc::new(Posix::open(&root).unwrap()), Some(root), Naming::Folders),
            Kind::Memory => (Arc::new(Memory::default()), None, Naming::Folders),
            Kind::S3 | Kind::Encrypted => {
                let usual = s3::new_bucket();
                let mut settings = s3::settings(&s3::url(), &usual);
                if kind == Kind::Encrypted {
                    settings.sse_c_key = Some(SecretFrom::Setting(Secret::new(s3::SSE_C_KEY.into())));
                }
                (Arc::new(S3::new(settings).unwrap()), None, Naming::Buckets { usual })
            }
            Kind::Swift | Kind::Gateway => {
                let usual = swift::new_container();
                let url = if kind == Kind::Swift { swift::url() } else { swift::gateway_url() };
                let store = Swift::new(swift::settings(&url, &usual)).unwrap();
                (Arc::new(store), None, Naming::Containers { usual })
            }
            Kind::Gcs => {
                let usual = gcs::new_bucket();
                let store = Gcs::new(gcs::settings(&gcs::url(), &usual)).unwrap();
                (Arc::new(store), None, Naming::Google { usual })
            }
        };
        Self { folder, root, store, naming, cpu }
    }

    pub(crate) fn store(&self) -> Arc<dyn ObjectStore> {
        self.store.clone()
    }

    /// Whether objects are files.
    pub(crate) fn is_files(&self) -> bool {
        self.root.is_some()
    }

    /// The folder of a Posix store.
    pub(crate) fn root(&self) -> &Path {
        self.root.as_deref().expect("this store has no folder")
    }

    /// The bucket or container of a store that has one.
    pub(crate) fn bucket(&self) -> &str {
        match &self.naming {
            Naming::Buckets { usual } | Naming::Containers { usual } | Naming::Google { usual } => usual,
            Naming::Folders | Naming::Shares => panic!("this store has no bucket"),
        }
    }

    /// The only folder below which volumes may be.
    pub(crate) fn volumes(&self) -> PathBuf {
        self.folder.path().join("volumes")
    }

    /// An engine on the store.
    pub(crate) fn engine(&self, settings: Settings) -> Engine {
        self.engine_on(self.store(), settings, MEMORY_BYTES)
    }

    /// An engine on another store, with so much memory.
    pub(crate) fn engine_on(
        &self,
        store: Arc<dyn ObjectStore>,
        settings: Settings,
        memory_bytes: usize,
    ) -> Engine {
        let chunked = Chunked::new(store, settings, self.cpu.clone(), Budget::new(memory_bytes));
        let chunked = chunked.with_naming(self.naming.clone()).with_checkpoint_bytes(CHECKPOINT_BYTES);
        Engine::new(chunked, Volumes::files(FileRoots::new(&[self.volumes()])))
    }

    /// All that lies in the store, by path: objects, and where they are files also temporary ones and, with a `/` at
    /// the end, empty folders that are not our own. Another store is looked through in these `containers`. When a backup was
    /// verified is left out, as long as the backup has a record.
    pub(crate) async fn everything(
        &self,
        containers: impl IntoIterator<Item = &Container>,
    ) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        if let Some(root) = &self.root {
            walk(root, "", &mut found);
        } else {
            let own =
                ["records", "outcomes", "checksums", "checkpoints", "cancels", "verified"].map(Folder::own);
            for folder in own.into_iter().chain(containers.into_iter().map(Folder::from)) {
                for listed in self.store.list(&folder, "").await.unwrap() {
                    found.insert(format!("{}/{}", folder.as_str(), listed.name));
                }
            }
        }
        let records = found.clone();
        found.retain(|path| {
            !path.starts_with(".backhaul/verified/")
                || !records.contains(&path.replace("verified", "records"))
        });
        found
    }

    /// The names of what is in the folder for volumes, hidden files as well.
    pub(crate) fn volume_names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.volumes()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    pub(crate) async fn read(&self, object: &ObjectName) -> Bytes {
        self.store.get(object).await.unwrap().collect(object, 64 << 20).await.unwrap()
    }
}

fn walk(folder: &Path, path: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{path}{}", entry.file_name().to_str().unwrap());
        if !entry.file_type().unwrap().is_dir() {
            found.insert(path);
            continue;
        }
        if fs::read_dir(entry.path()).unwrap().next().is_none() && !path.starts_with(".backhaul") {
            found.insert(format!("{path}/"));
        }
        walk(&entry.path(), &format!("{path}/"), found);
    }
}

/// The paths of all that a store holds of a backup with so many data objects.
pub(crate) fn paths_of(record: &Record, object_count: u64) -> BTreeSet<String> {
    let (container, prefix) = (&record.container, &record.service_metadata);
    let data = (1..=object_count).map(|number| format!("{container}/{prefix}-{number:05}"));
    let lists = [
        format!("{container}/{prefix}_sha256file"),
        format!("{container}/{prefix}_metadata"),
        format!(".backhaul/checksums/{prefix}"),
        format!(".backhaul/records/{}.json", record.backup_id),
    ];
    data.chain(lists).collect()
}

/// The object of that path in a store.
pub(crate) fn object_at(path: &str) -> ObjectName {
    for own in ["records", "checksums"] {
        if let Some(name) = path.strip_prefix(&format!(".backhaul/{own}/")) {
            return Folder::own(own).object(name).unwrap();
        }
    }
    let (container, name) = path.rsplit_once('/').unwrap();
    Folder::from(&container.parse::<Container>().unwrap()).object(name).unwrap()
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub(crate) fn job(work: Work) -> Job {
    Job { id: JobId::random(), store: None, deadline: None, work }
}

/// A job that backs the file up under a new id.
pub(crate) fn backup_job(volume_id: VolumeId, source: &Path, parent: Parent) -> Job {
    backup_job_of(volume_id, Location::File(source.into()), parent)
}

/// The same of a volume of any kind.
pub(crate) fn backup_job_of(volume_id: VolumeId, source: Location, parent: Parent) -> Job {
    job(Work::Backup(BackupWork {
        backup_id: BackupId::random(),
        volume_id,
        source,
        parent,
        container: None,
        name: Some("nightly".into()),
        description: None,
        project_id: None,
        volume_meta: None,
    }))
}

pub(crate) fn restore_job(backup_id: BackupId, target: &Path) -> Job {
    job(Work::Restore(RestoreWork { backup_id, target: Location::File(target.into()), volume_id: None }))
}

/// Does the job by the first method of its plan.
pub(crate) async fn run(engine: &Engine, job: &Job) -> Result<Receipt, Error> {
    run_in(&Context::default(), engine, job).await
}

pub(crate) async fn run_in(ctx: &Context, engine: &Engine, job: &Job) -> Result<Receipt, Error> {
    engine.run(ctx, job, plan(job, &engine.strategies(&job.work))[0]).await
}

pub(crate) async fn backup(
    engine: &Engine,
    volume_id: VolumeId,
    source: &Path,
    parent: Parent,
) -> Result<Record, Error> {
    let job = backup_job(volume_id, source, parent);
    run(engine, &job).await?;
    Ok(engine.catalog().record(job.backup_id()).await?.unwrap())
}

pub(crate) async fn restore(engine: &Engine, id: BackupId, target: &Path) -> Result<Receipt, Error> {
    run(engine, &restore_job(id, target)).await
}

pub(crate) async fn verify(engine: &Engine, id: BackupId) -> Result<Receipt, Error> {
    run(engine, &job(Work::Verify(id.into()))).await
}

/// Writes over the record of a backup, whatever it is.
pub(crate) async fn overwrite(engine: &Engine, record: &Record) {
    let updated = engine.catalog().update(record.backup_id, |_| Some(record.clone())).await.unwrap();
    assert!(matches!(updated, Updated::To(_)), "{updated:?}");
}

/// Deletes the backup, and its record as the runner does.
pub(crate) async fn delete(engine: &Engine, id: BackupId) -> Result<Receipt, Error> {
    let job = job(Work::Delete(id));
    let receipt = run(engine, &job).await?;
    conclude_delete(engine, &job).await;
    Ok(receipt)
}

/// What the runner does when the data of a backup is deleted.
pub(crate) async fn conclude_delete(engine: &Engine, job: &Job) {
    conclude(engine, job, Outcome::Succeeded).await;
}

/// What the runner does when a backup is cancelled.
pub(crate) async fn cancel(engine: &Engine, job: &Job) {
    engine.abandon(job, None).await.unwrap();
    conclude(engine, job, Outcome::Cancelled).await;
}

async fn conclude(engine: &Engine, job: &Job, outcome: Outcome) {
    let completion = Completion {
        job_id: job.id,
        operation: job.operation(),
        backup_id: job.backup_id(),
        volume_id: job.volume_id(),
        store: None,
        target: None,
        outcome,
        account: Account::default(),
    };
    engine.catalog().conclude(&completion, &Hold::default()).await.unwrap();
    engine.catalog().settle(job.id).await.unwrap();
}
