//! What a project's quotas hold of backups.

use jiff::SignedDuration;
use jiff::civil::DateTime;
use sqlx::{AnyConnection, Row};
use uuid::Uuid;

use super::Database;
use super::backups::BackupRow;
use super::sql::{Bound, Kind, now, table};

/// When what is used is counted anew and not only added up, and how long a reservation would hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuotaRefresh {
    /// After so many reservations; 0 is never.
    pub until_refresh: u32,
    /// After so many seconds; 0 is never.
    pub max_age_seconds: u64,
    /// How long a reservation holds that is never completed.
    pub reservation_seconds: u64,
}

table! {
    /// How much of something a project uses.
    Usage "quota_usages" {
        /// Its number.
        id: i64,
        /// `backups` or `backup_gigabytes`.
        resource: String,
        /// How much.
        in_use: i64,
        /// How many reservations are left until it is counted anew.
        until_refresh: Option<i64>,
        /// When it was last changed, in UTC.
        updated_at: Option<DateTime>,
    }
}

impl Database {
    /// Takes a backup, whose row is marked as deleted in the same transaction, out of its project's quotas: a reservation of
    /// less than nothing, completed at once.
    pub(super) async fn give_back_quota(
        &self,
        to: &mut AnyConnection,
        backup: &BackupRow,
        refresh: &QuotaRefresh,
    ) -> sqlx::Result<()> {
        let Some(project) = &backup.project_id else { return Ok(()) };
        // In the order in which Cinder locks them, so that the two do not wait for each other.
        let condition = "project_id = ? AND resource IN ('backups', 'backup_gigabytes') AND deleted = false ORDER BY id FOR UPDATE";
        let usages: Vec<Usage> = self.dialect.read(to, condition, &[project.into()]).await?;
        let until_refresh =
            Bound::Integer((refresh.until_refresh > 0).then_some(refresh.until_refresh.into()));
        for (resource, delta) in [("backups", -1), ("backup_gigabytes", -backup.size)] {
            let Some(usage) = usages.iter().find(|usage| usage.resource == resource) else {
                // A project without the row has it made when it next makes a backup; the count is made then.
                continue;
            };
            let left = usage.until_refresh.map(|left| left - 1);
            let in_use = if usage.is_stale(left, refresh) {
                self.counted(to, project, resource).await?
            } else {
                (usage.in_use + delta).max(0)
            };
            let turned_on = left.is_none() && refresh.until_refresh > 0;
            let further =
                left.filter(|left| !turned_on && *left > 0 && *left <= refresh.until_refresh.into());
            let until_refresh = further.map_or(until_refresh.clone(), Bound::from);
            let sql =
                "UPDATE quota_usages SET in_use = ?, until_refresh = ?, updated_at = ?time WHERE id = ?";
            let values = [in_use.into(), until_refresh, now().into(), usage.id.into()];
            self.dialect.execute(to, sql, &values).await?;
            let held =
                SignedDuration::from_secs(i64::try_from(refresh.reservation_seconds).unwrap_or(i64::MAX));
            let sql = "INSERT INTO reservations (created_at, deleted, deleted_at, uuid, usage_id, project_id, resource, delta, \
                       expire) VALUES (?time, true, ?time, ?, ?, ?, ?, ?, ?time)";
            let values = [
                now().into(),
                now().into(),
                Bound::from(&Uuid::new_v4().to_string()),
                usage.id.into(),
                project.into(),
                resource.into(),
                delta.into(),
                now().saturating_add(held).into(),
            ];
            self.dialect.execute(to, sql, &values).await?;
        }
        Ok(())
    }

    /// How much of it the project's backups use that are not deleted.
    async fn counted(&self, from: &mut AnyConnection, project: &str, resource: &str) -> sqlx::Result<i64> {
        let what = if resource == "backups" { "COUNT(*)" } else { "COALESCE(SUM(size), 0)" };
        let counted = self.dialect.cast(what, Kind::Integer, "counted");
        let sql = format!("SELECT {counted} FROM backups WHERE project_id = ? AND deleted = false");
        let rows = self.dialect.rows(from, &sql, &[project.into()]).await?;
        rows.first().map_or(Ok(0), |row| row.try_get("counted"))
    }
}

impl Usage {
    /// Whether it is to be counted anew. `left` is how many reservations are left until then, this one taken off.
    fn is_stale(&self, left: Option<i64>, refresh: &QuotaRefresh) -> bool {
        let age = SignedDuration::from_secs(i64::try_from(refresh.max_age_seconds).unwrap_or(i64::MAX));
        let is_old = || self.updated_at.is_some_and(|updated| updated.saturating_add(age) <= now());
        self.in_use < 0 || left.map_or_else(|| refresh.max_age_seconds > 0 && is_old(), |left| left <= 0)
    }
}
