//! Is everything reachable and usable? One line for each thing, and what to do where the answer is no.

use std::error::Error as _;

use bytes::Bytes;
use uuid::Uuid;

use super::{Error, FAILED, render, say};
use crate::broker::Broker;
#[cfg(feature = "ceph")]
use crate::ceph::Cluster;
use crate::config::{self, Config, StoreKind};
use crate::store::{self, Folder, ObjectStore, Posix};
use crate::worker;

/// Checks all that the configuration names. Leaves nothing behind.
pub(super) async fn check(config: &Config) -> Result<u8, Error> {
    let mut report = Checks { failed: false };
    let origin = config.file.as_ref().map_or("the environment".into(), |file| file.display().to_string());
    report.line("configuration", Ok(origin));
    report.line("broker", broker(config).await);
    for (name, store) in &config.stores {
        let StoreKind::Posix { path, .. } = &store.kind;
        let checked =
            posix(path).await.map(|()| format!("{} can be written, read and listed", path.display()));
        report.line(&format!("store {name}"), checked.map_err(|error| render::error(&error)));
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
}

async fn broker(config: &Config) -> Result<String, String> {
    let settings = worker::broker_settings(config, "check").map_err(|error| match error.source() {
        // The configuration's own words say it all.
        Some(source) => render::error(source),
        None => error.to_string(),
    })?;
    let url = settings.url.to_string();
    let broker = Broker::connect(settings).await.map_err(|error| render::error(&error))?;
    broker.close().await;
    Ok(format!("{url} is reachable; its exchanges and queues are there"))
}

#[cfg(feature = "ceph")]
async fn ceph(settings: &config::Ceph) -> Result<String, String> {
    const SECONDS_MAX: u32 = 10;
    let config::Ceph { conf, user } = settings.clone();
    let reached = format!("the cluster of {} answers client.{user}", conf.display());
    let connected =
        tokio::task::spawn_blocking(move || Cluster::connect(&conf, &user, SECONDS_MAX).map(drop)).await;
    match connected {
        Ok(Ok(())) => Ok(reached),
        Ok(Err(error)) => Err(render::error(&error)),
        Err(error) => Err(render::error(&error)),
    }
}

#[cfg(not(feature = "ceph"))]
async fn ceph(_: &config::Ceph) -> Result<String, String> {
    Err("this program was built without Ceph: build it with the feature ceph, or remove the section".into())
}

async fn posix(path: &std::path::Path) -> store::Result<()> {
    let store = Posix::open(path)?;
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
