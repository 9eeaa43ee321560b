//! Is everything reachable and usable? One line for each thing, and what to do where the answer is no.

use std::error::Error as _;
use std::path::PathBuf;

use bytes::Bytes;
use uuid::Uuid;

use super::{Error, FAILED, render, say};
use crate::broker::{Broker, Properties};
#[cfg(feature = "ceph")]
use crate::ceph::{self, Cluster, Features, NewImage};
use crate::config::{self, Config, StoreKind};
#[cfg(feature = "ceph")]
use crate::job::Container;
#[cfg(feature = "ceph")]
use crate::store::Rados;
use crate::store::{
    self, Folder, Gcs, GcsSettings, HttpSettings, Mount, ObjectStore, Posix, S3, S3Settings, Share, Swift,
    SwiftSettings,
};
use crate::worker;

/// Nobody who runs a check waits longer for a cluster or a server.
const SECONDS_MAX: u32 = 10;

/// Checks all that the configuration names. Leaves nothing behind.
pub(super) async fn check(config: &Config) -> Result<u8, Error> {
    let mut report = Checks { failed: false };
    let origin = config.file.as_ref().map_or("the environment".into(), |file| file.display().to_string());
    report.line("configuration", Ok(origin));
    report.line("broker", broker(config).await);
    for (name, store) in &config.stores {
        let checked = match &store.kind {
            StoreKind::Posix { path, .. } => posix(path).await,
            StoreKind::Nfs { share, .. } => mounted(share).await,
            StoreKind::S3 { settings, .. } => buckets(settings).await,
            StoreKind::Swift { settings, .. } => containers(settings).await,
            StoreKind::Gcs { settings, .. } => google(settings).await,
            #[cfg(feature = "ceph")]
            StoreKind::Rbd { cluster, pool, journaling, stripes, .. } => {
                let mut cluster_settings = config.ceph.iter();
                let named = |(name, _): &(&String, _)| cluster.as_ref().is_none_or(|wanted| wanted == *name);
                match cluster_settings.find(named) {
                    Some((_, settings)) => images(settings, pool, *journaling, *stripes).await,
                    // Not reached: the configuration was refused for it.
                    None => Err("its cluster is not in the configuration".into()),
                }
            }
        };
        report.line(&format!("store {name}"), checked);
        if let StoreKind::Nfs { share: Share::Mounted(path), .. } = &store.kind {
            report.warn(&format!("store {name}"), no_share(path));
        }
    }
    if let Err(error) = config.store(None) {
        report.line("default store", Err(render::error(&error)));
    }
    for (name, settings) in &config.ceph {
        report.line(&format!("ceph {name}"), ceph(settings).await);
    }
    for root in &config.worker.file_roots {
        let listed = std::fs::read_dir(root).map(|_| format!("{} is a folder", root.display()));
        let failed = |error| format!("{} is no folder that can be read: {error}", root.display());
        report.line("file root", listed.map_err(failed));
        let real = root.canonicalize().ok();
        let holds = |folder: &PathBuf| {
            folder
                .canonicalize()
                .is_ok_and(|folder| real.as_ref().is_some_and(|real| real.starts_with(folder)))
        };
        report.warn(
            "file root",
            worker::store_folders(config).into_iter().find(holds).map(|folder| {
                let (root, folder) = (root.display(), folder.display());
                format!("{root} lies in the folder of a store, {folder}: nothing can be restored there")
            }),
        );
    }
    if config.worker.file_roots.is_empty() {
        report.line("file roots", Ok("none: no file volumes can be backed up or restored".into()));
    }
    Ok(if report.failed { FAILED } else { 0 })
}

struct Checks {
    failed: bool,
}

impl Checks {
    fn line(&mut self, what: &str, result: Result<String, String>) {
        match result {
            Ok(text) => say(format_args!("ok      {what}: {text}")),
            Err(text) => {
                self.failed = true;
                say(format_args!("FAILED  {what}: {text}"));
            }
        }
    }

    /// Tells what may be wrong and may be meant, which fails nothing.
    fn warn(&self, what: &str, text: Option<String>) {
        if let Some(text) = text {
            say(format_args!("warning {what}: {text}"));
        }
    }
}

async fn broker(config: &Config) -> Result<String, String> {
    let settings = worker::broker_settings(config, "check").map_err(|error| match error.source() {
        // The configuration's own words say it all.
        Some(source) => render::error(source),
        None => error.to_string(),
    })?;
    let url = settings.url.to_string();
    let nobody = format!("{}.check.{}", settings.prefix, Uuid::new_v4());
    let broker = Broker::connect(settings).await.map_err(|error| render::error(&error))?;
    // By the default exchange jobs are put off and replies sent. No queue has this name, so the message is gone at once.
    let published = broker.publish_reply(nobody, Bytes::new(), Properties::default()).await;
    broker.close().await;
    published.map_err(|error| render::error(&error))?;
    Ok(format!("{url} is reachable; its exchanges and queues are there"))
}

#[cfg(feature = "ceph")]
async fn ceph(settings: &config::Ceph) -> Result<String, String> {
    let reached = format!("the cluster of {} answers client.{}", settings.conf.display(), settings.user);
    let settings = settings.clone();
    blocking(move || connect(&settings)).await?;
    Ok(reached)
}

#[cfg(not(feature = "ceph"))]
async fn ceph(_: &config::Ceph) -> Result<String, String> {
    Err("this program was built without Ceph: build it with the feature ceph, or remove the section".into())
}

#[cfg(feature = "ceph")]
fn connect(settings: &config::Ceph) -> Result<Cluster, ceph::Error> {
    let seconds_max = settings.operation_seconds_max.min(SECONDS_MAX);
    Cluster::connect(&settings.conf, &settings.user, seconds_max)
}

/// Checks a store of RBD images: its records are objects, its backups images.
#[cfg(feature = "ceph")]
async fn images(
    settings: &config::Ceph,
    pool: &Container,
    journaling: bool,
    stripes: Option<(u64, u64)>,
) -> Result<String, String> {
    let (settings, pool_name) = (settings.clone(), pool.to_string());
    let pool = blocking(move || connect(&settings)?.pool(&pool_name)).await?;
    objects(&Rados::new(pool.clone())).await?;
    let usable = format!("pool {} can be written, read and listed, and images be made in it", pool.name());
    let mut features = Features::USUAL;
    if journaling {
        features = features | Features::JOURNALING;
    }
    if stripes.is_some() {
        features = features | Features::STRIPING;
    }
    let new = NewImage { bytes: 1 << 20, features, stripes };
    blocking(move || {
        let name = format!("backhaul-check-{}", Uuid::new_v4());
        pool.create_image(&name, &new)?;
        pool.remove_image(&name)
    })
    .await?;
    Ok(usable)
}

/// Runs what blocks where it may.
#[cfg(feature = "ceph")]
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ceph::Error> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(render::error(&error)),
        Err(error) => Err(render::error(&error)),
    }
}

async fn posix(path: &std::path::Path) -> Result<String, String> {
    let store = Posix::open(path).map_err(|error| render::error(&error))?;
    objects(&store).await?;
    Ok(format!("{} can be written, read and listed", path.display()))
}

/// What to think of the folder of a store on a share that somebody else mounts, if that is not mounted there. It is no error:
/// what lies there may be a share all the same, of a system that brings it in by a name of its own.
fn no_share(path: &std::path::Path) -> Option<String> {
    // One that is not there has been told already.
    let mount = Mount::of(path).ok().filter(|mount| !mount.is_nfs())?;
    Some(format!(
        "{} lies on {mount}, which is no share of an NFS server: mount the share there, or what is written goes to this machine",
        path.display()
    ))
}

/// Checks a store on a share; mounts it first if that is ours to do.
async fn mounted(share: &Share) -> Result<String, String> {
    let share = share.clone();
    match tokio::task::spawn_blocking(move || share.mount()).await {
        Ok(Ok(folder)) => posix(&folder).await,
        Ok(Err(error)) => Err(render::error(&error)),
        Err(error) => Err(render::error(&error)),
    }
}

/// Checks a store of buckets; makes its own one if it is missing and may be made.
async fn buckets(settings: &S3Settings) -> Result<String, String> {
    let settings = S3Settings { http: at_once(&settings.http), ..settings.clone() };
    let usable =
        format!("bucket {} of {} can be written, read and listed", settings.bucket, settings.endpoint);
    let store = S3::new(settings).map_err(|error| render::error(&error))?;
    objects(&store).await?;
    Ok(usable)
}

/// Checks a store of containers; makes its own one if it is missing and may be made.
async fn containers(settings: &SwiftSettings) -> Result<String, String> {
    let settings = SwiftSettings { http: at_once(&settings.http), ..settings.clone() };
    let usable = format!(
        "container {} can be written, read and listed after a login at {}",
        settings.container, settings.auth_url
    );
    let store = Swift::new(settings).map_err(|error| render::error(&error))?;
    objects(&store).await?;
    Ok(usable)
}

/// Checks a store of buckets of Google Cloud Storage; makes its own one if it is missing and may be made.
async fn google(settings: &GcsSettings) -> Result<String, String> {
    let settings = GcsSettings { http: at_once(&settings.http), ..settings.clone() };
    let usable =
        format!("bucket {} of {} can be written, read and listed", settings.bucket, settings.endpoint);
    let store = Gcs::new(settings).map_err(|error| render::error(&error))?;
    objects(&store).await?;
    Ok(usable)
}

/// The same limits, but for somebody who waits for the answer.
fn at_once(http: &HttpSettings) -> HttpSettings {
    HttpSettings {
        retries_max: 0,
        connect_seconds_max: http.connect_seconds_max.min(SECONDS_MAX),
        idle_seconds_max: http.idle_seconds_max.min(SECONDS_MAX),
        ..http.clone()
    }
}

/// Writes an object, reads, lists and removes it.
async fn objects(store: &impl ObjectStore) -> Result<(), String> {
    let tried = async {
        let folder = Folder::own("check");
        let unsafe_name = |_| store::Error::new("name", "the object of a check", store::Reason::Missing);
        let object = folder.object(&Uuid::new_v4().to_string()).map_err(unsafe_name)?;
        store.put(&object, Bytes::from_static(b"backhaul")).await?;
        let read = async {
            store.get(&object).await?.collect(&object, 8).await?;
            store.list(&folder, &object.name).await
        }
        .await;
        store.delete(&object).await?;
        store.tidy(&folder, &object.name).await?;
        read.map(drop)
    }
    .await;
    tried.map_err(|error: store::Error| render::error(&error))
}
