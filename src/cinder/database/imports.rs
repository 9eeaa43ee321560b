//! Filling the row of a backup from an exported record.

use jiff::civil::DateTime;
use serde_json::{Map, Value};

use super::backups::BackupRow;
use super::sql::{Bound, Kind, Table, now};
use super::{Changes, Database, Error, Result};

/// What the importing user's own row has, and keeps.
const KEPT: [&str; 8] =
    ["id", "user_id", "project_id", "status", "fail_reason", "deleted", "deleted_at", "updated_at"];

impl Database {
    /// Writes the fields of an exported record, those of a versioned object, to the row that waits for them with the status
    /// `creating`, then `changes`, and makes it `available`. Fields that are no columns are left out. Whether it was done.
    pub async fn import_backup(
        &self,
        id: &str,
        fields: &Map<String, Value>,
        changes: &Changes,
    ) -> Result<bool> {
        let wrong = |problem: String| Error::Import { id: id.into(), problem };
        if fields.get("id").and_then(Value::as_str) != Some(id) {
            return Err(wrong("the record has another id".into()));
        }
        let mut columns = Vec::new();
        for (name, kind) in BackupRow::COLUMNS.iter().filter(|(name, _)| !KEPT.contains(name)) {
            let Some(value) = fields.get(*name) else { continue };
            let bound = bound(*kind, value).ok_or_else(|| wrong(format!("{name} is of another type")))?;
            columns.push((*name, bound));
        }
        let all = Changes(columns).and(changes.clone()).text("status", "available");
        let metadata = fields.get("metadata").and_then(Value::as_object);
        let attempt = || async {
            let mut transaction = self.begin().await?;
            if !self.change(&mut transaction, "backups", id, &["creating"], &all).await? {
                return Ok(false);
            }
            if let Some(metadata) = metadata {
                let sql = "UPDATE backup_metadata SET deleted = true, deleted_at = ?time WHERE backup_id = ? AND deleted = false";
                self.dialect.execute(&mut transaction, sql, &[now().into(), id.into()]).await?;
                for (key, value) in metadata {
                    let value = value.as_str().unwrap_or_default();
                    self.insert_pair(&mut transaction, ("backup_metadata", "backup_id", id), key, value)
                        .await?;
                }
            }
            transaction.commit().await?;
            Ok(true)
        };
        self.again(&format!("import backup {id}"), attempt).await
    }
}

/// The value for a column, if it is of its type.
fn bound(kind: Kind, value: &Value) -> Option<Bound> {
    let text = value.as_str();
    Some(match kind {
        Kind::Text if value.is_null() => Bound::Text(None),
        Kind::Text => text?.into(),
        Kind::Integer if value.is_null() => Bound::Integer(None),
        Kind::Integer => value.as_i64()?.into(),
        Kind::Bool => Bound::Bool(value.as_bool()?),
        Kind::Time if value.is_null() => Bound::Time(None),
        Kind::Time => text?.trim_end_matches('Z').parse::<DateTime>().ok()?.into(),
    })
}
