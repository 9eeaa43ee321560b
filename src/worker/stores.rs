//! The stores of the configuration, and the engines on them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::join_all;
#[cfg(feature = "ceph")]
use tokio::sync::OnceCell;
use tracing::warn;

use super::Error;
#[cfg(feature = "ceph")]
use crate::ceph;
use crate::config::{self, Chunking, Config, MEMORY_BYTES_BASE, StoreKind};
use crate::engine::chunked::{self, Budget, Chunked, Naming};
#[cfg(feature = "ceph")]
use crate::engine::rbd::{self, Rbd};
use crate::engine::{Cpu, Engine, Volumes};
use crate::error::{Causes, Class, Problem};
use crate::job::{Job, StoreName};
#[cfg(feature = "ceph")]
use crate::store::Rados;
use crate::store::{Gcs, ObjectStore, Posix, S3, Swift};
use crate::volume::FileRoots;

/// The stores of the configuration, each with an engine on it. They share CPU threads and memory.
#[derive(Debug)]
pub struct Stores {
    stores: BTreeMap<StoreName, Store>,
    default: Option<StoreName>,
    shared: Shared,
}

/// What all stores of a process have in common.
#[derive(Debug)]
struct Shared {
    cpu: Cpu,
    budget: Budget,
    volumes: Volumes,
}

/// A store of the configuration.
#[derive(Debug)]
enum Store {
    Folder(Engine, Posix),
    /// It is behind a server, to which nobody connects before it is needed.
    S3(Engine, S3),
    /// The same.
    Swift(Engine, Swift),
    /// The same.
    Gcs(Engine, Gcs),
    /// It is opened when it is needed first.
    #[cfg(feature = "ceph")]
    Pool(Box<PoolStore>),
}

impl Store {
    async fn engine(&self) -> Result<&Engine, Error> {
        match self {
            Self::Folder(engine, _) | Self::S3(engine, _) | Self::Swift(engine, _) | Self::Gcs(engine, _) => {
                Ok(engine)
            }
            #[cfg(feature = "ceph")]
            Self::Pool(store) => store.engine().await,
        }
    }

    /// Finds out whether the store can be used now.
    async fn reach(&self, name: &StoreName) -> Result<(), Error> {
        let reached = match self {
            Self::Folder(_, store) => store.reach(),
            Self::S3(_, store) => store.reach().await,
            Self::Swift(_, store) => store.reach().await,
            Self::Gcs(_, store) => store.reach().await,
            #[cfg(feature = "ceph")]
            Self::Pool(_) => Ok(()),
        };
        reached.map_err(|source| Error::Store { name: name.clone(), source })?;
        self.engine().await.map(drop)
    }
}

/// A store in a cluster, which may be away.
///
/// That must not keep a worker from the jobs of its other stores, so it starts all the same, and jobs of this one are put
/// off until the cluster is back. And a command that works on a folder connects to no cluster at all.
#[cfg(feature = "ceph")]
#[derive(Debug)]
struct PoolStore {
    name: StoreName,
    settings: rbd::Settings,
    volumes: Volumes,
    cpu: Cpu,
    budget: Budget,
    engine: OnceCell<Engine>,
}

#[cfg(feature = "ceph")]
impl PoolStore {
    /// The engine, once the cluster answers.
    async fn engine(&self) -> Result<&Engine, Error> {
        let open = || async {
            let (clusters, settings) = (self.volumes.clusters.clone(), self.settings.clone());
            let connect = move || clusters.connect(settings.cluster.as_deref())?.pool(&settings.pool);
            let pool = tokio::task::spawn_blocking(connect).await?.map_err(ceph::Error::into_io)?;
            let (settings, cpu, budget) = (self.settings.clone(), self.cpu.clone(), self.budget.clone());
            let store = Arc::new(Rados::new(pool));
            let rbd = Rbd::new(store, self.volumes.clusters.clone(), settings, cpu, budget);
            Ok(Engine::new(rbd, self.volumes.clone()))
        };
        let failed = |source| Error::Pool { name: self.name.clone(), source };
        self.engine.get_or_try_init(open).await.map_err(failed)
    }
}

impl Shared {
    /// Opens a store, unless it is in a cluster. Connects to nothing but the server of a share that is mounted for it.
    fn open(&self, name: &StoreName, store: &config::Store) -> Result<Store, Error> {
        let (cpu, budget, volumes) = (self.cpu.clone(), self.budget.clone(), self.volumes.clone());
        let failed = |source| Error::Store { name: name.clone(), source };
        let chunked = |opened: Arc<dyn ObjectStore>, chunking: &Chunking, naming| {
            let chunked = Chunked::new(opened, chunked_settings(chunking), cpu.clone(), budget.clone());
            Engine::new(chunked.with_naming(naming).with_zone(store.zone.clone()), volumes.clone())
        };
        Ok(match &store.kind {
            StoreKind::Posix { path, chunking } => {
                let opened = Posix::open(path).map_err(failed)?;
                Store::Folder(chunked(Arc::new(opened.clone()), chunking, Naming::Folders), opened)
            }
            StoreKind::Nfs { share, chunking } => {
                let opened = share.mount().and_then(|folder| Posix::open(&folder)).map_err(failed)?;
                Store::Folder(chunked(Arc::new(opened.clone()), chunking, Naming::Shares), opened)
            }
            StoreKind::S3 { settings, chunking } => {
                let opened = S3::new((**settings).clone()).map_err(failed)?;
                let naming = Naming::Buckets { usual: settings.bucket.clone() };
                Store::S3(chunked(Arc::new(opened.clone()), chunking, naming), opened)
            }
            StoreKind::Swift { settings, chunking } => {
                let opened = Swift::new((**settings).clone()).map_err(failed)?;
                let naming = Naming::Containers { usual: settings.container.clone() };
                Store::Swift(chunked(Arc::new(opened.clone()), chunking, naming), opened)
            }
            StoreKind::Gcs { settings, chunking } => {
                let opened = Gcs::new((**settings).clone()).map_err(failed)?;
                let naming = Naming::Google { usual: settings.bucket.clone() };
                Store::Gcs(chunked(Arc::new(opened.clone()), chunking, naming), opened)
            }
            #[cfg(feature = "ceph")]
            StoreKind::Rbd { cluster, pool, source_snapshots_max, journaling, stripes } => {
                let settings = rbd::Settings {
                    cluster: cluster.clone(),
                    pool: pool.to_string(),
                    source_snapshots_max: *source_snapshots_max,
                    journaling: *journaling,
                    stripes: *stripes,
                    checkpoint_bytes: rbd::CHECKPOINT_BYTES,
                };
                let (name, engine) = (name.clone(), OnceCell::new());
                Store::Pool(Box::new(PoolStore { name, settings, volumes, cpu, budget, engine }))
            }
        })
    }
}

impl Stores {
    /// Opens all stores but those in clusters, which are opened when they are needed. Connects to nothing but the servers of
    /// shares that are mounted for it.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let default = match config.store(None) {
            Ok((name, _)) => Some(name.clone()),
            // Several stores may do without a default one; none at all is of no use.
            Err(_) if !config.stores.is_empty() => None,
            Err(error) => return Err(error.into()),
        };
        let none = Self::none(config)?;
        let mut stores = BTreeMap::new();
        for (name, store) in &config.stores {
            stores.insert(name.clone(), none.shared.open(name, store)?);
        }
        Ok(Self { stores, default, ..none })
    }

    /// The threads and the memory for stores that are opened by [`Stores::engine_on`].
    pub fn none(config: &Config) -> Result<Self, Error> {
        let threads = config.worker.cpu_threads_max;
        let cpu = Cpu::start(threads).map_err(|source| Error::Threads(threads, source))?;
        let budget = Budget::new(config.worker.memory_bytes_max.saturating_sub(MEMORY_BYTES_BASE) as usize);
        let volumes = Volumes {
            file_roots: FileRoots::new(&config.worker.file_roots).with_stores(store_folders(config)),
            #[cfg(feature = "ceph")]
            clusters: ceph::Clusters::new(access(config)),
        };
        Ok(Self { stores: BTreeMap::new(), default: None, shared: Shared { cpu, budget, volumes } })
    }

    /// An engine on a store that is not in the configuration, for as long as the engine is used.
    pub async fn engine_on(&self, name: &StoreName, store: &config::Store) -> Result<Engine, Error> {
        Ok(self.shared.open(name, store)?.engine().await?.clone())
    }

    /// Reaches what is not open yet, so that a worker whose keys, bucket or pool are wrong does not begin. That a cluster or
    /// a server is away is no error: these stores are given, and why.
    pub(super) async fn reach(&self) -> Result<BTreeMap<StoreName, String>, Error> {
        let reached = self.stores.iter().map(|(name, store)| async move { (name, store.reach(name).await) });
        let mut away = BTreeMap::new();
        for (name, reached) in join_all(reached).await {
            match reached {
                Ok(()) => {}
                Err(error) if error.class() == Class::Transient => {
                    warn!(error = %Causes(&error), "store not reached; its jobs are put off");
                    away.insert(name.clone(), Causes(&error).to_string());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(away)
    }

    /// Finds out whether all stores can be used now.
    pub async fn reach_all(&self) -> Result<(), Error> {
        for (name, store) in &self.stores {
            store.reach(name).await?;
        }
        Ok(())
    }

    pub(super) async fn reach_one(&self, name: &StoreName) -> Result<(), Error> {
        match self.stores.get(name) {
            Some(store) => store.reach(name).await,
            None => Ok(()),
        }
    }

    /// The names of all stores.
    pub(super) fn names(&self) -> impl Iterator<Item = &StoreName> {
        self.stores.keys()
    }

    /// Names the default store in a job that names none, so that all who hear of the job know where it works.
    pub fn name_default(&self, job: &mut Job) {
        job.store = job.store.take().or_else(|| self.default.clone());
    }

    /// The engine on the store of that name, or on the default one. The problem says what there is instead, or why the
    /// store cannot be used now.
    pub async fn engine(&self, name: Option<&StoreName>) -> Result<&Engine, Problem> {
        if let Some(store) = name.or(self.default.as_ref()).and_then(|name| self.stores.get(name)) {
            return store.engine().await.map_err(|error| Problem::new(error.class(), &error));
        }
        let known: Vec<&str> = self.stores.keys().map(StoreName::as_str).collect();
        let message = match name {
            Some(name) => format!("this worker has no store {name}: it has {}", known.join(", ")),
            None => format!("no store is the default: name one of {}", known.join(", ")),
        };
        Err(Problem { class: Class::Permanent, message, causes: Vec::new() })
    }
}

/// The folders of the stores that are folders.
pub fn store_folders(config: &Config) -> Vec<PathBuf> {
    let folder = |store: &config::Store| match &store.kind {
        StoreKind::Posix { path, .. } => Some(path.clone()),
        StoreKind::Nfs { share, .. } => Some(share.folder()),
        _ => None,
    };
    config.stores.values().filter_map(folder).collect()
}

/// How volumes are cut up, in the words of the chunked engine.
fn chunked_settings(chunking: &Chunking) -> chunked::Settings {
    chunked::Settings {
        compression: chunking.compression,
        compression_level: chunking.compression_level,
        object_bytes: chunking.object_bytes as usize,
        sha_block_bytes: chunking.sha_block_bytes as usize,
        unchanged_check_per_mille: chunking.unchanged_check_per_mille,
        source_snapshots_max: chunking.source_snapshots_max,
    }
}

/// The clusters of the configuration, in the words of the Ceph room.
#[cfg(feature = "ceph")]
pub fn access(config: &Config) -> BTreeMap<String, ceph::Access> {
    let access = |cluster: &config::Ceph| ceph::Access {
        conf: cluster.conf.clone(),
        user: cluster.user.clone(),
        operation_seconds_max: cluster.operation_seconds_max,
    };
    config.ceph.iter().map(|(name, cluster)| (name.clone(), access(cluster))).collect()
}
