//! Volumes, their snapshots and the metadata that users give them.

use std::collections::BTreeMap;

use jiff::civil::DateTime;
use sqlx::AnyConnection;

use super::sql::{Bound, now, table};
use super::{Changes, Database, Result};

table! {
    /// A volume, as far as backups look at it.
    VolumeRow "volumes" {
        /// Its id.
        id: String,
        /// Whose it is.
        project_id: Option<String>,
        /// In GiB.
        size: i64,
        /// `host@backend#pool` of the service that has it.
        host: Option<String>,
        /// The cluster of that service.
        cluster_name: Option<String>,
        /// Where it is.
        availability_zone: Option<String>,
        /// Such as `backing-up`.
        status: String,
        /// What its status was before, and becomes again.
        previous_status: Option<String>,
        /// What the user calls it.
        display_name: Option<String>,
        /// What the user says about it.
        display_description: Option<String>,
        /// Its type.
        volume_type_id: Option<String>,
        /// The key of an encrypted volume.
        encryption_key_id: Option<String>,
        /// When it was first ready, in UTC.
        launched_at: Option<DateTime>,
    }
}

table! {
    /// A snapshot of a volume, as far as backups look at it.
    SnapshotRow "snapshots" {
        /// Its id.
        id: String,
        /// The volume it is of.
        volume_id: String,
        /// Such as `backing-up`.
        status: String,
        /// What the user calls it.
        display_name: Option<String>,
    }
}

table! {
    /// A key and its value.
    Pair "volume_metadata" {
        /// What it is called.
        key: String,
        /// What it is.
        value: Option<String>,
    }
}

impl Database {
    /// The volume, if it is there and not deleted.
    pub async fn volume(&self, id: &str) -> Result<Option<VolumeRow>> {
        Ok(self.read(&format!("read volume {id}"), "id = ? AND deleted = false", &[id.into()]).await?.pop())
    }

    /// The snapshot, if it is there and not deleted.
    pub async fn snapshot(&self, id: &str) -> Result<Option<SnapshotRow>> {
        Ok(self.read(&format!("read snapshot {id}"), "id = ? AND deleted = false", &[id.into()]).await?.pop())
    }

    /// Whether the volume service is making a copy or a snapshot of the volume for a backup, or has left one that is not whole.
    pub async fn is_being_copied(&self, volume_id: &str) -> Result<bool> {
        let doing = format!("look for copies of volume {volume_id}");
        let condition = "display_name = ? AND status = 'creating' AND deleted = false";
        // As Cinder's drivers call them.
        let (volume, snapshot) = (format!("backup-vol-{volume_id}"), format!("backup-snap-{volume_id}"));
        let volumes: Vec<VolumeRow> = self.read(&doing, condition, &[Bound::from(&volume)]).await?;
        let snapshots: Vec<SnapshotRow> = self.read(&doing, condition, &[Bound::from(&snapshot)]).await?;
        Ok(!volumes.is_empty() || !snapshots.is_empty())
    }

    /// Sets columns of the volume. With `expected`, only if its status is one of these. Whether it was done.
    pub async fn change_volume(&self, id: &str, expected: &[&str], changes: &Changes) -> Result<bool> {
        let attempt = || async {
            let mut connection = self.pool.acquire().await?;
            self.change(&mut connection, "volumes", id, expected, changes).await
        };
        self.again(&format!("change volume {id}"), attempt).await
    }

    /// Sets columns of the snapshot. With `expected`, only if its status is one of these. Whether it was done.
    pub async fn change_snapshot(&self, id: &str, expected: &[&str], changes: &Changes) -> Result<bool> {
        let attempt = || async {
            let mut connection = self.pool.acquire().await?;
            self.change(&mut connection, "snapshots", id, expected, changes).await
        };
        self.again(&format!("change snapshot {id}"), attempt).await
    }

    /// What the user wrote to the volume.
    pub async fn volume_metadata(&self, volume_id: &str) -> Result<BTreeMap<String, String>> {
        let condition = "volume_id = ? AND deleted = false";
        let rows = self
            .read(&format!("read the metadata of volume {volume_id}"), condition, &[volume_id.into()])
            .await?;
        Ok(rows.into_iter().map(|Pair { key, value }| (key, value.unwrap_or_default())).collect())
    }

    /// Adds to what the user wrote to the volume: keys that are there get the new value, others stay.
    pub async fn merge_volume_metadata(
        &self,
        volume_id: &str,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let attempt = || async {
            let mut transaction = self.begin().await?;
            self.merge_pairs(&mut transaction, volume_id, metadata).await?;
            transaction.commit().await
        };
        self.again(&format!("write metadata of volume {volume_id}"), attempt).await
    }

    /// What the user, or Cinder, wrote to the volume under this key.
    pub(super) async fn pair_of(
        &self,
        from: &mut AnyConnection,
        volume_id: &str,
        key: &str,
    ) -> sqlx::Result<Option<String>> {
        let condition = "volume_id = ? AND volume_metadata.key = ? AND deleted = false";
        let pairs: Vec<Pair> = self.dialect.read(from, condition, &[volume_id.into(), key.into()]).await?;
        Ok(pairs.into_iter().next().and_then(|pair| pair.value))
    }

    pub(super) async fn merge_pairs(
        &self,
        to: &mut AnyConnection,
        volume_id: &str,
        metadata: &BTreeMap<String, String>,
    ) -> sqlx::Result<()> {
        // The volume's row is the lock: of two that add the same key at once the table would keep both.
        let sql = "SELECT 1 FROM volumes WHERE id = ? FOR UPDATE";
        self.dialect.rows(to, sql, &[volume_id.into()]).await?;
        for (key, value) in metadata {
            let sql = "UPDATE volume_metadata SET value = ?, updated_at = ?time \
                       WHERE volume_id = ? AND volume_metadata.key = ? AND deleted = false";
            let values = [Bound::from(value), now().into(), volume_id.into(), key.into()];
            if self.dialect.execute(to, sql, &values).await? == 0 {
                self.insert_pair(to, ("volume_metadata", "volume_id", volume_id), key, value).await?;
            }
        }
        Ok(())
    }

    /// Adds a pair to the metadata of what has the id `owner` in the column `of`.
    pub(super) async fn insert_pair(
        &self,
        to: &mut AnyConnection,
        (table, of, owner): (&str, &str, &str),
        key: &str,
        value: &str,
    ) -> sqlx::Result<()> {
        let columns = format!("created_at, deleted, {of}, {}, value", self.dialect.quoted("key"));
        let sql = format!("INSERT INTO {table} ({columns}) VALUES (?time, false, ?, ?, ?)");
        let values = [now().into(), owner.into(), key.into(), value.into()];
        self.dialect.execute(to, &sql, &values).await.map(|_| ())
    }
}
