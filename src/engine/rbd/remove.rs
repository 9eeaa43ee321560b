//! Removes a backup: its snapshot, the image when that was the last one, and the objects beside it.

use std::io::ErrorKind;

use tracing::warn;

use super::backup::shut_out;
use super::digests;
use super::{Rbd, backups_on, is_made_by, names, snapshot_of};
use crate::ceph::{Mode, Pool, while_busy};
use crate::engine::cpu::blocking;
use crate::engine::error::Error;
use crate::job::{Context, Record, RecordState};

impl Rbd {
    /// Removes all of a backup but its record, what makes it visible first. What another backup needs stays, and what
    /// is gone already is no error. `others` are the other backups in the same image.
    pub async fn remove(&self, record: &Record, ctx: &Context, others: &[Record]) -> Result<(), Error> {
        ctx.check()?;
        let (engine, wanted) = (self.clone(), record.clone());
        let shared = others
            .iter()
            .any(|other| other.container == record.container && names::image(other) == names::image(record));
        blocking(move || engine.remove_images(&wanted, shared)).await??;
        self.remove_lists(record, &[]).await
    }

    /// Removes the lists of digests of a backup, but for those `kept`.
    pub(super) async fn remove_lists(&self, record: &Record, kept: &[(String, String)]) -> Result<(), Error> {
        let (folder, prefix) = (digests::folder(), digests::prefix(record.backup_id));
        for list in self.store.list(&folder, &prefix).await? {
            if !kept.iter().any(|(name, _)| *name == list.name) {
                self.store.delete(&folder.object(&list.name)?).await?;
            }
        }
        Ok(self.store.tidy(&folder, &prefix).await?)
    }

    fn remove_images(&self, record: &Record, shared: bool) -> Result<(), Error> {
        let pool = self.pool(&self.connect()?, record)?;
        self.remove_from_backup_image(&pool, record, shared)?;
        pool.remove_object(&names::metadata_object(record.backup_id))?;
        Ok(())
    }

    fn remove_from_backup_image(&self, pool: &Pool, record: &Record, shared: bool) -> Result<(), Error> {
        let name = names::image(record);
        let image = match pool.open_image(&name, None, Mode::Write) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            image => image?,
        };
        if matches!(record.state, RecordState::Creating(_)) {
            shut_out(&image, record)?;
        }
        let snapshot = snapshot_of(&image, record)?;
        if let Some(snapshot) = &snapshot {
            while_busy(|| image.remove_snapshot(&snapshot.name))?;
        }
        let left = image.snapshots()?;
        // An image goes with its last backup. One that another backup made is only ours to remove when that backup has
        // no record any more, and ours was in it. What Cinder copied as a whole has no snapshot, and may be in an image
        // of another name.
        let taken_in = record.job_id.is_none() && record.image_id == Some(image.id()?);
        let ours = is_made_by(&name, record) || taken_in || (snapshot.is_some() && !shared);
        drop(image);
        if !ours || !left.is_empty() || shared {
            if left.is_empty() || !backups_on(&left).is_empty() {
                return Ok(());
            }
            warn!(image = name, "the image stays: it has snapshots that are of no backup");
            return Ok(());
        }
        while_busy(|| pool.remove_image(&name)).map(drop).map_err(|error| match error.kind() {
            ErrorKind::ResourceBusy => Error::ImageInUse { image: format!("{}/{name}", pool.name()) },
            _ => error.into(),
        })
    }
}
