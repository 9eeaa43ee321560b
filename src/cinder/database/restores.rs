//! The end of restoring a backup.

use std::collections::BTreeMap;

use sqlx::AnyConnection;

use super::{BackupRow, Changes, Database, Error, Result, VolumeRow};

/// How a restore ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restored {
    /// The volume is what was backed up.
    Done,
    /// Somebody set the backup to another status in between.
    Cancelled,
    /// The volume is neither what it was nor what was backed up.
    Failed,
    /// It was not begun.
    Refused,
}

/// What Cinder writes to a volume that a backup of another one was restored to.
const SOURCE: &str = "src_backup_id";

impl Database {
    /// Ends a restore: the volume becomes `available`, `error` if it was cancelled or refused, or `error_restoring`, if it still
    /// waits for that; the backup becomes `available`, if it is still `restoring`, and not to another volume since. A volume that
    /// holds another one's backup now says so. Doing it again changes nothing. If the volume is gone, that is told after the
    /// backup was changed.
    pub async fn finish_restore(&self, id: &str, volume_id: &str, restored: Restored) -> Result<()> {
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let Some(backup) = self.locked_backup(&mut transaction, id).await? else {
                return Ok(Some("backup"));
            };
            let condition = "id = ? AND deleted = false FOR UPDATE";
            let volumes: Vec<VolumeRow> =
                self.dialect.read(&mut transaction, condition, &[volume_id.into()]).await?;
            self.give_restored_back(&mut transaction, &backup, volume_id).await?;
            let Some(volume) = volumes.into_iter().next() else {
                transaction.commit().await?;
                return Ok(Some("volume"));
            };
            let status = match restored {
                Restored::Done => "available",
                Restored::Cancelled | Restored::Refused => "error",
                Restored::Failed => "error_restoring",
            };
            let mut changes = Changes::new().text("status", status);
            if restored == Restored::Done && volume.status == "creating" {
                changes = changes.now("launched_at");
            }
            let waiting = ["restoring-backup", "creating"];
            let changed = self.change(&mut transaction, "volumes", volume_id, &waiting, &changes).await?;
            if changed && matches!(restored, Restored::Done | Restored::Cancelled) {
                let before = self.pair_of(&mut transaction, volume_id, SOURCE).await?;
                if backup.volume_id != volume_id
                    || before.is_some_and(|before| !before.is_empty() && before != id)
                {
                    let source = BTreeMap::from([(SOURCE.to_owned(), id.to_owned())]);
                    self.merge_pairs(&mut transaction, volume_id, &source).await?;
                }
            }
            transaction.commit().await?;
            Ok(None)
        };
        let missing =
            self.again(&format!("finish the restore of backup {id} to volume {volume_id}"), attempt).await?;
        let id = |what| if what == "volume" { volume_id } else { id };
        missing.map_or(Ok(()), |what| Err(Error::NotThere { what, id: id(what).into() }))
    }

    /// Makes a backup `available` that was to be restored to a volume which does not wait for that, if it is still `restoring`,
    /// and not to another volume since. Whether that was done.
    pub async fn refuse_restore(&self, id: &str, volume_id: &str) -> Result<bool> {
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let Some(backup) = self.locked_backup(&mut transaction, id).await? else { return Ok(false) };
            let changed = self.give_restored_back(&mut transaction, &backup, volume_id).await?;
            transaction.commit().await?;
            Ok(changed)
        };
        self.again(&format!("end the restore of backup {id} to volume {volume_id}"), attempt).await
    }

    async fn give_restored_back(
        &self,
        to: &mut AnyConnection,
        backup: &BackupRow,
        volume_id: &str,
    ) -> sqlx::Result<bool> {
        let is_of_this = backup.restore_volume_id.as_deref().is_none_or(|id| id == volume_id);
        let available = Changes::new().text("status", "available");
        Ok(is_of_this && self.change(to, "backups", &backup.id, &["restoring"], &available).await?)
    }
}
