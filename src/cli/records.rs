//! The records of a store: listed, shown, exchanged with Cinder.

use std::path::Path;

use super::{Error, FAILED, print_json, render};
use crate::config::Config;
use crate::engine;
use crate::job::{BackupId, StoreName, VolumeId};
use crate::worker::Stores;

/// Lists the backups of a store, the oldest first.
pub(super) async fn list(
    config: &Config,
    store: Option<StoreName>,
    volume_id: Option<VolumeId>,
    json: bool,
) -> Result<u8, Error> {
    let stores = Stores::open(config)?;
    let engine = stores.engine(store.as_ref()).map_err(Error::Problem)?;
    let engine::Listing { mut records, damaged } = engine.catalog().records().await?;
    records.retain(|record| volume_id.is_none_or(|id| record.volume_id == id));
    if json {
        print_json(&records)?;
    } else {
        print!("{}", render::table(&records));
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
    let engine = stores.engine(store.as_ref()).map_err(Error::Problem)?;
    let record = engine.catalog().record(id).await?.ok_or(engine::Error::UnknownBackup(id))?;
    if json {
        print_json(&record)?;
    } else {
        print!("{}", render::show(&record));
    }
    Ok(0)
}

/// Prints Cinder's export record of a backup.
pub(super) async fn export(_: &Config, _: BackupId, _: Option<StoreName>) -> Result<u8, Error> {
    Err(Error::Usage("record export comes with the next commit".into()))
}

/// Takes in a backup by Cinder's export record.
pub(super) async fn import(_: &Config, _: &Path, _: Option<StoreName>) -> Result<u8, Error> {
    Err(Error::Usage("record import comes with the next commit".into()))
}
