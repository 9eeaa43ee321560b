//! The records of a store: listed, shown, exchanged with Cinder.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Serialize;

use super::{Error, FAILED, engine_of, print_json, render, say};
use crate::cinder::export_record::{self, EXPORT_BYTES_MAX, Form};
use crate::config::{Config, StoreKind};
use crate::engine;
use crate::job::{BackupId, Record, StoreName, Verified, VolumeId};
use crate::worker::Stores;

/// Lists the backups of a store, the oldest first.
pub(super) async fn list(
    config: &Config,
    store: Option<StoreName>,
    volume_id: Option<VolumeId>,
    json: bool,
) -> Result<u8, Error> {
    let stores = Stores::open(config)?;
    let engine = engine_of(config, &stores, store.as_ref()).await?;
    let engine::Listing { mut records, damaged } = engine.catalog().records().await?;
    records.retain(|record| volume_id.is_none_or(|id| record.volume_id == id));
    if json {
        print_json(&records)?;
    } else {
        say(render::table(&records).trim_end());
    }
    for error in &damaged {
        eprintln!("error: {}", render::error(error));
    }
    Ok(if damaged.is_empty() { 0 } else { FAILED })
}

/// Shows one backup.
pub(super) async fn show(
    config: &Config,
    id: BackupId,
    store: Option<StoreName>,
    json: bool,
) -> Result<u8, Error> {
    let stores = Stores::open(config)?;
    let engine = engine_of(config, &stores, store.as_ref()).await?;
    let record = engine.catalog().record(id).await?.ok_or(engine::Error::UnknownBackup(id))?;
    let (verified, unread) = match engine.catalog().verified(id).await {
        Ok(verified) => (verified, None),
        Err(error) => (None, Some(error)),
    };
    if json {
        print_json(&Shown { record: &record, verified })?;
    } else {
        say(render::show(&record, verified.as_ref()).trim_end());
    }
    // The record is not to be hidden by that.
    if let Some(error) = &unread {
        eprintln!("error: when it was found whole cannot be told: {}", render::error(error));
    }
    Ok(if unread.is_none() { 0 } else { FAILED })
}

/// All that the store keeps about a backup.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    record: &'a Record,
    verified: Option<Verified>,
}

/// Prints Cinder's export record of a backup.
pub(super) async fn export(config: &Config, id: BackupId, store: Option<StoreName>) -> Result<u8, Error> {
    let stores = Stores::open(config)?;
    let engine = engine_of(config, &stores, store.as_ref()).await?;
    say(export_record::export(&engine.catalog().available(id).await?));
    Ok(0)
}

/// Takes in a backup by Cinder's export record.
pub(super) async fn import(config: &Config, path: &Path, store: Option<StoreName>) -> Result<u8, Error> {
    let stores = Stores::open(config)?;
    let engine = engine_of(config, &stores, store.as_ref()).await?;
    let (text, name) = if path == Path::new("-") {
        let text = read(io::stdin())
            .map_err(|error| Error::Io("read the export record from standard input", error))?;
        (text, "the export record from standard input".to_owned())
    } else {
        let text = File::open(path).and_then(read);
        let text = text.map_err(|source| Error::RecordFile { path: path.into(), source })?;
        (text, format!("the export record in {}", path.display()))
    };
    let form = match &config.store(store.as_ref())?.1.kind {
        StoreKind::Posix { .. } | StoreKind::Nfs { .. } => Form::Files,
        StoreKind::S3 { .. } | StoreKind::Swift { .. } | StoreKind::Gcs { .. } => Form::Buckets,
        #[cfg(feature = "ceph")]
        StoreKind::Rbd { pool, .. } => Form::Images { pool: pool.clone() },
    };
    let record = export_record::import(&text, &form);
    let record = record.map_err(|source| Error::Record { record: name, source })?;
    let record = engine.import(record).await?;
    let (id, volume_id) = (record.backup_id, record.volume_id);
    say(format_args!(
        "backup {id} of volume {volume_id} is taken in; `backhaul run verify --backup-id {id}` checks it"
    ));
    Ok(0)
}

/// Reads an export record, and no more of what is none than shows that it is too long.
fn read(from: impl Read) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    from.take(EXPORT_BYTES_MAX as u64 + 1).read_to_end(&mut text)?;
    Ok(text)
}
