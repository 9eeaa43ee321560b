//! Removes a backup: its snapshot, the image when that was the last one, and the objects beside it.

use std::io::ErrorKind;

use tracing::warn;

use super::backup::{WRITER_KEY, shut_out};
use super::digests;
use super::{Rbd, backups_on, is_made_by, names};
use crate::ceph::{Image, Mode, Pool, while_busy};
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

    /// Removes what an attempt has left that came to nothing. It has the same names as an attempt that went on with its
    /// job, of which the record is `current`; so nothing goes but what says that this one wrote it.
    pub async fn remove_attempt(&self, record: &Record, current: Option<&Record>) -> Result<(), Error> {
        // An attempt that goes on where this one stopped has the same image.
        let is_same = |current: &Record| current.image_id.is_some() && current.image_id == record.image_id;
        if !current.is_some_and(is_same) {
            let (engine, wanted) = (self.clone(), record.clone());
            let is_alone = current.is_none();
            blocking(move || engine.remove_attempt_from_pool(&wanted, is_alone)).await??;
        }
        let kept = current.map_or(&[][..], |current| &current.object_digests);
        let (folder, own) = (digests::folder(), format!(".{}", record.writer));
        for list in self.store.list(&folder, &digests::prefix(record.backup_id)).await? {
            let named = |lists: &[(String, String)]| lists.iter().any(|(name, _)| *name == list.name);
            if (list.name.ends_with(&own) || named(&record.object_digests)) && !named(kept) {
                self.store.delete(&folder.object(&list.name)?).await?;
            }
        }
        Ok(())
    }

    /// Unless the attempt `is_alone`, the metadata of the volume may be that of another one.
    fn remove_attempt_from_pool(&self, record: &Record, is_alone: bool) -> Result<(), Error> {
        let Some(pool) = self.pool_if_there(record)? else { return Ok(()) };
        if is_alone {
            pool.remove_object(&names::metadata_object(record.backup_id))?;
        }
        let name = names::image(record);
        let Some(image) = open_to_remove(&pool, &name, record)? else { return Ok(()) };
        match image.metadata(WRITER_KEY)? {
            Some(writer) if writer != record.writer => return Ok(()),
            // It may still be writing.
            Some(_) => drop(image.break_lock()?),
            // It died before it had said so much.
            None if is_made_by(&name, record) && image.snapshots()?.is_empty() => {}
            None => return Ok(()),
        }
        // With the lock nobody else can go on with the image while this looks at it again.
        match image.lock() {
            Err(error)
                if [ErrorKind::ReadOnlyFilesystem, ErrorKind::ResourceBusy].contains(&error.kind()) =>
            {
                return Ok(());
            }
            locked => locked?,
        }
        if image.metadata(WRITER_KEY)?.is_some_and(|writer| writer != record.writer) {
            return Ok(());
        }
        image.remove_snapshots(|found| found.name == names::snapshot(record))?;
        let unused = is_made_by(&name, record) && image.snapshots()?.is_empty();
        drop(image);
        if unused {
            match pool.remove_image(&name) {
                // Another attempt has begun to use it.
                Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
                removed => drop(removed?),
            }
        }
        Ok(())
    }

    /// Whether all lists of digests are there that a record names.
    pub(super) async fn has_lists(&self, record: &Record) -> Result<bool, Error> {
        let listed = self.store.list(&digests::folder(), &digests::prefix(record.backup_id)).await?;
        let is_there = |(name, _): &(String, String)| listed.iter().any(|list| list.name == *name);
        Ok(record.object_digests.iter().all(is_there))
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
        let Some(pool) = self.pool_if_there(record)? else { return Ok(()) };
        self.remove_from_backup_image(&pool, record, shared)?;
        pool.remove_object(&names::metadata_object(record.backup_id))?;
        Ok(())
    }

    fn remove_from_backup_image(&self, pool: &Pool, record: &Record, shared: bool) -> Result<(), Error> {
        let name = names::image(record);
        let Some(image) = open_to_remove(pool, &name, record)? else { return Ok(()) };
        if matches!(record.state, RecordState::Creating(_)) {
            shut_out(&image, record)?;
        }
        image.remove_snapshots(|found| names::backup_of(&found.name) == Some(record.backup_id))?;
        let (left, held) = (image.snapshots()?, image.trashed_snapshots()?);
        // An image goes with its last backup. One that another backup made is only ours to remove when that backup has
        // no record any more, and ours was in it; so it is with one that Cinder made.
        let ours = is_made_by(&name, record) || record.image_id == Some(image.id()?);
        drop(image);
        if !ours || !left.is_empty() || shared {
            if left.is_empty() || !backups_on(&left).is_empty() {
                return Ok(());
            }
            warn!(image = name, "the image stays: it has snapshots that are of no backup");
            return Ok(());
        }
        if !held.is_empty() {
            return Err(Error::ImageInUse { image: format!("{}/{name}", pool.name()) });
        }
        while_busy(|| pool.remove_image(&name)).map(drop).map_err(|error| match error.kind() {
            ErrorKind::ResourceBusy => Error::ImageInUse { image: format!("{}/{name}", pool.name()) },
            _ => error.into(),
        })
    }
}

/// Opens the image that has a backup, if it is there.
fn open_to_remove(pool: &Pool, name: &str, record: &Record) -> Result<Option<Image>, Error> {
    match pool.open_image(name, None, Mode::Write) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // A removal that was broken off may have left the name, which nobody could give to an image again.
            if is_made_by(name, record) {
                pool.remove_image(name)?;
            }
            Ok(None)
        }
        image => Ok(Some(image?)),
    }
}
