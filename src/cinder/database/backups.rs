//! Backups: reading and changing them, and the ends of creating and deleting one.

use jiff::civil::DateTime;
use sqlx::AnyConnection;

use super::sql::{Bound, now, table};
use super::{Changes, Database, Error, QuotaRefresh, Result, VolumeRow};

table! {
    /// A backup. What is NULL is nothing, or zero for a number.
    BackupRow "backups" {
        /// Its id.
        id: String,
        /// Who asked for it.
        user_id: Option<String>,
        /// Whose it is.
        project_id: Option<String>,
        /// The volume it is of.
        volume_id: String,
        /// The snapshot it was made from, if not from the volume itself.
        snapshot_id: Option<String>,
        /// The worker that made it.
        host: Option<String>,
        /// Where that worker is.
        availability_zone: Option<String>,
        /// What the user calls it.
        display_name: Option<String>,
        /// What the user says about it.
        display_description: Option<String>,
        /// The pool, bucket or folder that it lies in.
        container: Option<String>,
        /// The backup that it is an increment of.
        parent_id: Option<String>,
        /// Such as `available`.
        status: String,
        /// Why it failed, up to 255 characters.
        fail_reason: Option<String>,
        /// What its driver needs to find it again.
        service_metadata: Option<String>,
        /// Cinder's name of its driver.
        service: Option<String>,
        /// In GiB.
        size: i64,
        /// How many objects it has.
        object_count: i64,
        /// The volume that was made for the time of the backup.
        temp_volume_id: Option<String>,
        /// The snapshot that was made for the time of the backup.
        temp_snapshot_id: Option<String>,
        /// How many increments it has.
        num_dependent_backups: i64,
        /// When the data were as they are in it, in UTC as all times.
        data_timestamp: Option<DateTime>,
        /// The volume that it is being restored to, or was last.
        restore_volume_id: Option<String>,
        /// The key of an encrypted volume.
        encryption_key_id: Option<String>,
        /// When its row was made.
        created_at: Option<DateTime>,
        /// When its row was last changed.
        updated_at: Option<DateTime>,
        /// When it was deleted.
        deleted_at: Option<DateTime>,
        /// Whether it is deleted; its row stays.
        deleted: bool,
    }
}

impl BackupRow {
    /// Whether it is still to be made, as far as its row says: a person may have set it to `available` meanwhile, which makes
    /// nobody end what is at work. What its driver needs to find it is written at its end.
    pub fn awaits_end(&self) -> bool {
        let is_unwritten = || GIVEN_OUT.contains(&self.status.as_str()) && self.service_metadata.is_none();
        !self.deleted && (self.status == "creating" || is_unwritten())
    }
}

/// What the status is of a backup that is given out as whole.
const GIVEN_OUT: [&str; 2] = ["available", "restoring"];

/// The incremental backups on another one of which nobody doubts that they are there.
const WHOLE_CHILDREN: &str = "parent_id = ? AND status IN ('available', 'restoring') AND deleted = false";

/// What became of a backup whose data are complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finished {
    /// It is available now, or was already.
    Available,
    /// Somebody else had changed its status to this, which it keeps: mostly `deleting`.
    Aborted(String),
}

impl Database {
    /// The backup, if it is there and not deleted.
    pub async fn backup(&self, id: &str) -> Result<Option<BackupRow>> {
        Ok(self.backup_even_if_deleted(id).await?.filter(|backup| !backup.deleted))
    }

    /// The backup, if it ever was there.
    pub async fn backup_even_if_deleted(&self, id: &str) -> Result<Option<BackupRow>> {
        Ok(self.read(&format!("read backup {id}"), "id = ?", &[id.into()]).await?.pop())
    }

    /// The backups of a worker that have one of these statuses.
    pub async fn backups_of_host(&self, host: &str, statuses: &[&str]) -> Result<Vec<BackupRow>> {
        if statuses.is_empty() {
            return Ok(Vec::new());
        }
        let places = vec!["?"; statuses.len()].join(", ");
        let condition =
            format!("host = ? AND deleted = false AND status IN ({places}) ORDER BY created_at, id");
        let values: Vec<Bound> = [&host].into_iter().chain(statuses).map(|text| Bound::from(*text)).collect();
        self.read(&format!("list the backups of {host}"), &condition, &values).await
    }

    /// Sets columns of the backup, even of a deleted one. With `expected`, only if its status is one of these. Whether it was
    /// done.
    pub async fn change_backup(&self, id: &str, expected: &[&str], changes: &Changes) -> Result<bool> {
        let attempt = || async {
            let mut connection = self.pool.acquire().await?;
            self.change(&mut connection, "backups", id, expected, changes).await
        };
        self.again(&format!("change backup {id}"), attempt).await
    }

    /// Ends a backup whose data are complete: it becomes `available`, as large as its volume and with `changes`, unless it does
    /// not [await that](BackupRow::awaits_end) any more; its parent counts it; its volume gets back the status it had, or its
    /// snapshot is `available`. Doing it again changes nothing.
    pub async fn finish_backup(&self, id: &str, changes: &Changes) -> Result<Finished> {
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let Some(backup) = self.locked_backup(&mut transaction, id).await? else { return Ok(None) };
            self.release_source(&mut transaction, &backup, "backing-up").await?;
            let finished = if backup.awaits_end() {
                let mut all = Changes::new();
                if backup.status == "creating" {
                    all = all.text("status", "available");
                }
                let volume =
                    self.dialect.read(&mut transaction, "id = ?", &[Bound::from(&backup.volume_id)]).await?;
                if let Some(VolumeRow { size, .. }) = volume.into_iter().next() {
                    all = all.integer("size", size);
                }
                let changes = all.and(changes.clone());
                self.change(&mut transaction, "backups", id, &[], &changes).await?;
                // The changes can have made it a full one.
                let parent =
                    "id = (SELECT parent_id FROM (SELECT parent_id FROM backups WHERE id = ?) AS child)";
                let count = "num_dependent_backups = COALESCE(num_dependent_backups, 0) + 1";
                let sql = format!("UPDATE backups SET {count}, updated_at = ?time WHERE {parent}");
                self.dialect.execute(&mut transaction, &sql, &[now().into(), id.into()]).await?;
                Finished::Available
            } else if GIVEN_OUT.contains(&backup.status.as_str()) {
                Finished::Available
            } else {
                Finished::Aborted(backup.status)
            };
            transaction.commit().await?;
            Ok(Some(finished))
        };
        let finished = self.again(&format!("finish backup {id}"), attempt).await?;
        finished.ok_or_else(|| Error::NotThere { what: "backup", id: id.into() })
    }

    /// Ends a backup that failed: it becomes `error` with the reason, unless it does not [await an end](BackupRow::awaits_end)
    /// any more; its volume gets back the status it had, or its snapshot is `available`. Whether it became `error`.
    pub async fn fail_backup(&self, id: &str, reason: &str) -> Result<bool> {
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let Some(backup) = self.locked_backup(&mut transaction, id).await? else { return Ok(false) };
            self.release_source(&mut transaction, &backup, "error_backing-up").await?;
            let changes = Changes::new().text("status", "error").text("fail_reason", reason);
            let failed =
                backup.awaits_end() && self.change(&mut transaction, "backups", id, &[], &changes).await?;
            transaction.commit().await?;
            Ok(failed)
        };
        self.again(&format!("set backup {id} to error"), attempt).await
    }

    /// Gives the volume or the snapshot of a backup back that nobody makes any more, as [`Database::fail_backup`] does, and
    /// leaves the backup as it is.
    pub async fn give_source_back(&self, id: &str) -> Result<()> {
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let Some(backup) = self.locked_backup(&mut transaction, id).await? else { return Ok(()) };
            self.release_source(&mut transaction, &backup, "error_backing-up").await?;
            transaction.commit().await
        };
        self.again(&format!("give back what backup {id} was made of"), attempt).await
    }

    /// Ends the delete of a backup whose data are gone: its row stays, marked as deleted; its parent no longer counts it, if it
    /// did, and the project's quotas no longer hold it. Doing it again changes nothing. Whether it was done now.
    pub async fn delete_backup(&self, id: &str, refresh: &QuotaRefresh) -> Result<bool> {
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let Some(backup) = self.locked_backup(&mut transaction, id).await? else { return Ok(false) };
            if backup.deleted {
                return Ok(false);
            }
            // Cinder leaves `updated_at` as it is.
            let sql =
                "UPDATE backups SET status = 'deleted', deleted = true, deleted_at = ?time WHERE id = ?";
            self.dialect.execute(&mut transaction, sql, &[now().into(), id.into()]).await?;
            let sql = "UPDATE backup_metadata SET deleted = true, deleted_at = ?time WHERE backup_id = ? AND deleted = false";
            self.dialect.execute(&mut transaction, sql, &[now().into(), id.into()]).await?;
            if let Some(parent) = &backup.parent_id {
                // One that has failed was never counted, which its row does not say: those that are whole stay counted.
                let whole: Vec<BackupRow> =
                    self.dialect.read(&mut transaction, WHOLE_CHILDREN, &[parent.into()]).await?;
                let whole_count = i64::try_from(whole.len()).unwrap_or(i64::MAX);
                let sql = "UPDATE backups SET num_dependent_backups = num_dependent_backups - 1, updated_at = ?time \
                           WHERE id = ? AND deleted = false AND num_dependent_backups > ?";
                let values = [now().into(), parent.into(), whole_count.into()];
                self.dialect.execute(&mut transaction, sql, &values).await?;
            }
            self.give_back_quota(&mut transaction, &backup, refresh).await?;
            transaction.commit().await?;
            Ok(true)
        };
        self.again(&format!("mark backup {id} as deleted"), attempt).await
    }

    /// The backup, even if deleted, which nobody else changes until the transaction ends.
    pub(super) async fn locked_backup(
        &self,
        from: &mut AnyConnection,
        id: &str,
    ) -> sqlx::Result<Option<BackupRow>> {
        Ok(self.dialect.read(from, "id = ? FOR UPDATE", &[id.into()]).await?.pop())
    }

    /// Gives what was backed up its status back, if it still waits for that, and not for another backup.
    async fn release_source(
        &self,
        to: &mut AnyConnection,
        backup: &BackupRow,
        previous: &str,
    ) -> sqlx::Result<()> {
        // A late word of one that is over must not free what is another one's by now.
        if backup.status != "creating" && self.is_backed_up_by_another(to, backup).await? {
            return Ok(());
        }
        match &backup.snapshot_id {
            Some(snapshot) => {
                let available = Changes::new().text("status", "available");
                self.change(to, "snapshots", snapshot, &["backing-up"], &available).await?;
            }
            None => {
                // In this order, since MariaDB goes from left to right.
                let sql = "UPDATE volumes SET status = COALESCE(previous_status, 'available'), previous_status = ?, \
                           updated_at = ?time WHERE id = ? AND status = 'backing-up' AND deleted = false";
                let values = [previous.into(), now().into(), Bound::from(&backup.volume_id)];
                self.dialect.execute(to, sql, &values).await?;
            }
        }
        Ok(())
    }

    /// Whether another backup is being made of the same.
    async fn is_backed_up_by_another(
        &self,
        from: &mut AnyConnection,
        backup: &BackupRow,
    ) -> sqlx::Result<bool> {
        let (of, source) = match &backup.snapshot_id {
            Some(snapshot) => ("snapshot_id = ?", snapshot),
            None => ("volume_id = ? AND snapshot_id IS NULL", &backup.volume_id),
        };
        let condition = format!("{of} AND id <> ? AND status = 'creating' AND deleted = false");
        let others: Vec<BackupRow> =
            self.dialect.read(from, &condition, &[source.into(), Bound::from(&backup.id)]).await?;
        Ok(!others.is_empty())
    }
}
