//! Whole rows, whichever columns this version of Cinder has.

use jiff::civil::DateTime;
use serde_json::{Map, Value, json};
use sqlx::{AnyConnection, Row};

use super::sql::{Column, Dialect, Kind, table};
use super::{Database, Result};

table! {
    /// A key and its value.
    Pair "backup_metadata" {
        /// What it is called.
        key: String,
        /// What it is.
        value: Option<String>,
    }
}

/// How a point in time is written into JSON.
#[derive(Debug, Clone, Copy)]
enum Times {
    /// To the microsecond, as in what a backup keeps of its volume.
    Microseconds,
    /// To the second, with a Z, as in versioned objects.
    Seconds,
}

impl Database {
    /// All columns of the volume, if it is there and not deleted; times to the microsecond.
    pub async fn volume_columns(&self, volume_id: &str) -> Result<Option<Map<String, Value>>> {
        self.all_columns("volumes", volume_id, "AND deleted = false", Times::Microseconds).await
    }

    /// All columns of the snapshot, if it is there and not deleted; times to the microsecond.
    pub async fn snapshot_columns(&self, snapshot_id: &str) -> Result<Option<Map<String, Value>>> {
        self.all_columns("snapshots", snapshot_id, "AND deleted = false", Times::Microseconds).await
    }

    /// All columns of the backup, even of a deleted one, and `metadata`, as a versioned object of it has them: times to the
    /// second, and no number is nothing.
    pub async fn backup_columns(&self, id: &str) -> Result<Option<Map<String, Value>>> {
        let Some(mut columns) = self.all_columns("backups", id, "", Times::Seconds).await? else {
            return Ok(None);
        };
        for number in ["size", "object_count", "num_dependent_backups"] {
            if columns.get(number).is_some_and(Value::is_null) {
                columns.insert(number.into(), 0.into());
            }
        }
        let condition = "backup_id = ? AND deleted = false";
        let pairs = self.read(&format!("read the metadata of backup {id}"), condition, &[id.into()]).await?;
        let metadata: Map<String, Value> =
            pairs.into_iter().map(|Pair { key, value }| (key, json!(value))).collect();
        columns.insert("metadata".into(), metadata.into());
        Ok(Some(columns))
    }

    async fn all_columns(
        &self,
        table: &str,
        id: &str,
        further: &str,
        times: Times,
    ) -> Result<Option<Map<String, Value>>> {
        let attempt = || async {
            let mut connection = self.pool.acquire().await?;
            let columns = self.columns_of(&mut connection, table).await?;
            let selected: Vec<String> =
                columns.iter().map(|(name, kind)| self.dialect.selected(name, *kind)).collect();
            let sql = format!("SELECT {} FROM {table} WHERE id = ? {further}", selected.join(", "));
            let rows = self.dialect.rows(&mut connection, &sql, &[id.into()]).await?;
            let Some(row) = rows.first() else { return Ok(None) };
            let mut values = Map::new();
            for (name, kind) in columns {
                let value = match kind {
                    Kind::Text => json!(<Option<String> as Column>::of(row, &name)?),
                    Kind::Integer => json!(<Option<i64> as Column>::of(row, &name)?),
                    Kind::Bool => json!(<Option<i64> as Column>::of(row, &name)?.map(|value| value != 0)),
                    Kind::Time => {
                        json!(<Option<DateTime> as Column>::of(row, &name)?.map(|time| times.written(time)))
                    }
                };
                values.insert(name, value);
            }
            Ok(Some(values))
        };
        self.again(&format!("read all of {id} in {table}"), attempt).await
    }

    async fn columns_of(&self, from: &mut AnyConnection, table: &str) -> sqlx::Result<Vec<(String, Kind)>> {
        let rows = self.dialect.rows(from, self.dialect.columns_query(), &[table.into()]).await?;
        let column = |row: &sqlx::any::AnyRow| {
            Ok((row.try_get("name")?, Kind::of(&row.try_get::<String, _>("kind")?)))
        };
        rows.iter().map(column).collect()
    }
}

impl Times {
    fn written(self, time: DateTime) -> String {
        let format = match self {
            Self::Microseconds => "%Y-%m-%dT%H:%M:%S.%6f",
            Self::Seconds => "%Y-%m-%dT%H:%M:%SZ",
        };
        time.strftime(format).to_string()
    }
}

impl Dialect {
    /// Asks for `name` and `kind` of each column of a table.
    fn columns_query(self) -> &'static str {
        match self {
            Self::MySql => {
                "SELECT CAST(column_name AS CHAR) AS name, CAST(data_type AS CHAR) AS kind FROM information_schema.columns \
                 WHERE table_name = ? AND table_schema = DATABASE() ORDER BY ordinal_position"
            }
            Self::Postgres => {
                "SELECT CAST(column_name AS TEXT) AS name, CAST(data_type AS TEXT) AS kind FROM information_schema.columns \
                 WHERE table_name = ? AND table_schema = current_schema() ORDER BY ordinal_position"
            }
            Self::Sqlite => {
                "SELECT CAST(name AS TEXT) AS name, CAST(type AS TEXT) AS kind FROM pragma_table_info(?) ORDER BY cid"
            }
        }
    }
}

impl Kind {
    /// What the database calls the type of a column.
    fn of(name: &str) -> Self {
        let name = name.to_lowercase();
        match name.as_str() {
            // MariaDB has no other truth.
            "tinyint" | "boolean" => Self::Bool,
            _ if name.contains("int") => Self::Integer,
            _ if name.starts_with("datetime") || name.starts_with("timestamp") => Self::Time,
            _ => Self::Text,
        }
    }
}
