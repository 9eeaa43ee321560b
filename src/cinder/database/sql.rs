//! What MariaDB, PostgreSQL and SQLite do not agree on, and how rows become structs.
//!
//! Statements are written once, with `?` for a value and `?time` for a point in time.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};

/// Whose SQL is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    MySql,
    Postgres,
    Sqlite,
}

/// What a column holds, and so how it is read: each database has its own idea of truth and time, and all of them turn
/// these into numbers and texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Integer,
    Bool,
    Time,
}

impl Dialect {
    /// How a transaction begins that will write.
    pub fn begin(self) -> &'static str {
        // SQLite would let two readers go on to write, and then end one of them without waiting.
        if self == Self::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" }
    }

    /// An expression that gives the column as a text or a 64-bit number, under the column's own name.
    pub fn selected(self, name: &str, kind: Kind) -> String {
        self.cast(&self.quoted(name), kind, name)
    }

    /// The same for an expression, under a name.
    pub fn cast(self, column: &str, kind: Kind, name: &str) -> String {
        let cast = match (self, kind) {
            (Self::MySql, Kind::Text | Kind::Time) => format!("CAST({column} AS CHAR)"),
            (Self::MySql, _) => format!("CAST({column} AS SIGNED)"),
            (Self::Postgres, Kind::Integer) => format!("CAST({column} AS BIGINT)"),
            (Self::Postgres, Kind::Bool) => format!("CAST(CAST({column} AS INTEGER) AS BIGINT)"),
            (Self::Sqlite, Kind::Integer | Kind::Bool) => format!("CAST({column} AS INTEGER)"),
            (Self::Postgres | Self::Sqlite, Kind::Text | Kind::Time) => format!("CAST({column} AS TEXT)"),
        };
        format!("{cast} AS {}", self.quoted(name))
    }

    /// A name that may be a word of the language, as `key` and `binary` are in MariaDB.
    pub fn quoted(self, name: &str) -> String {
        if self == Self::MySql { format!("`{name}`") } else { format!("\"{name}\"") }
    }

    /// Writes the statement in this dialect.
    fn translated(self, sql: &str) -> String {
        // SQLite locks all there is when the transaction begins.
        let sql = if self == Self::Sqlite { sql.replace(" FOR UPDATE", "") } else { sql.to_owned() };
        let mut whole = String::new();
        let mut parts = sql.split('?');
        whole.push_str(parts.next().unwrap_or_default());
        for (index, part) in parts.enumerate() {
            let place = if self == Self::Postgres { format!("${}", index + 1) } else { "?".into() };
            match (self, part.strip_prefix("time")) {
                (Self::Postgres, Some(part)) => whole.push_str(&format!("CAST({place} AS TIMESTAMP){part}")),
                (_, part_of_time) => whole.push_str(&format!("{place}{}", part_of_time.unwrap_or(part))),
            }
        }
        whole
    }

    /// Runs a statement; how many rows it was about.
    pub async fn execute(self, to: &mut AnyConnection, sql: &str, values: &[Bound]) -> sqlx::Result<u64> {
        let mut query = sqlx::query(AssertSqlSafe(self.translated(sql)));
        for value in values {
            query = value.bind(query);
        }
        Ok(query.execute(to).await?.rows_affected())
    }

    /// Runs a query.
    pub async fn rows(
        self,
        from: &mut AnyConnection,
        sql: &str,
        values: &[Bound],
    ) -> sqlx::Result<Vec<AnyRow>> {
        let mut query = sqlx::query(AssertSqlSafe(self.translated(sql)));
        for value in values {
            query = value.bind(query);
        }
        query.fetch_all(from).await
    }

    /// Reads the rows of `table` that `condition` names, what follows it included.
    pub async fn read<T: Table>(
        self,
        from: &mut AnyConnection,
        condition: &str,
        values: &[Bound],
    ) -> sqlx::Result<Vec<T>> {
        let columns: Vec<String> = T::COLUMNS.iter().map(|(name, kind)| self.selected(name, *kind)).collect();
        let sql = format!("SELECT {} FROM {} WHERE {condition}", columns.join(", "), T::NAME);
        self.rows(from, &sql, values).await?.iter().map(T::of).collect()
    }
}

/// A value of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Bound {
    Text(Option<String>),
    Integer(Option<i64>),
    Bool(bool),
    /// For `?time`.
    Time(Option<DateTime>),
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Any, sqlx::any::AnyArguments>;

impl Bound {
    fn bind<'q>(&self, query: Query<'q>) -> Query<'q> {
        match self {
            Self::Text(text) => query.bind(text.clone()),
            Self::Integer(number) => query.bind(*number),
            Self::Bool(value) => query.bind(*value),
            // As SQLAlchemy writes it into SQLite, where it is a text to be compared with others.
            Self::Time(time) => {
                query.bind(time.map(|time| time.strftime("%Y-%m-%d %H:%M:%S.%6f").to_string()))
            }
        }
    }

    /// What stands for it in a statement.
    pub fn place(&self) -> &'static str {
        if let Self::Time(_) = self { "?time" } else { "?" }
    }
}

impl From<&str> for Bound {
    fn from(text: &str) -> Self {
        Self::Text(Some(text.into()))
    }
}

impl From<&String> for Bound {
    fn from(text: &String) -> Self {
        Self::Text(Some(text.clone()))
    }
}

impl From<Option<&str>> for Bound {
    fn from(text: Option<&str>) -> Self {
        Self::Text(text.map(Into::into))
    }
}

impl From<DateTime> for Bound {
    fn from(time: DateTime) -> Self {
        Self::Time(Some(time))
    }
}

impl From<i64> for Bound {
    fn from(number: i64) -> Self {
        Self::Integer(Some(number))
    }
}

/// Now, in UTC, as Cinder's columns have it: without a zone.
pub(super) fn now() -> DateTime {
    TimeZone::UTC.to_datetime(Timestamp::now())
}

/// A struct that is read from a table.
pub(super) trait Table: Sized {
    /// The table.
    const NAME: &'static str;
    /// Its columns.
    const COLUMNS: &'static [(&'static str, Kind)];
    /// Takes the row that was selected with these columns.
    fn of(row: &AnyRow) -> sqlx::Result<Self>;
}

/// A field that is read from a column.
pub(super) trait Column: Sized {
    const KIND: Kind;
    fn of(row: &AnyRow, name: &str) -> sqlx::Result<Self>;
}

impl Column for Option<String> {
    const KIND: Kind = Kind::Text;
    fn of(row: &AnyRow, name: &str) -> sqlx::Result<Self> {
        row.try_get(name)
    }
}

impl Column for String {
    const KIND: Kind = Kind::Text;
    fn of(row: &AnyRow, name: &str) -> sqlx::Result<Self> {
        Ok(Option::of(row, name)?.unwrap_or_default())
    }
}

impl Column for Option<i64> {
    const KIND: Kind = Kind::Integer;
    fn of(row: &AnyRow, name: &str) -> sqlx::Result<Self> {
        row.try_get(name)
    }
}

impl Column for i64 {
    const KIND: Kind = Kind::Integer;
    fn of(row: &AnyRow, name: &str) -> sqlx::Result<Self> {
        Ok(row.try_get::<Option<i64>, _>(name)?.unwrap_or_default())
    }
}

impl Column for bool {
    const KIND: Kind = Kind::Bool;
    fn of(row: &AnyRow, name: &str) -> sqlx::Result<Self> {
        Ok(i64::of(row, name)? != 0)
    }
}

impl Column for Option<DateTime> {
    const KIND: Kind = Kind::Time;
    fn of(row: &AnyRow, name: &str) -> sqlx::Result<Self> {
        let text: Option<String> = row.try_get(name)?;
        let time = text.map(|text| text.parse()).transpose();
        time.map_err(|error: jiff::Error| sqlx::Error::ColumnDecode {
            index: name.into(),
            source: error.into(),
        })
    }
}

/// Makes a struct whose fields are columns of a table.
macro_rules! table {
    ($(#[$about:meta])* $table:ident $name:literal { $($(#[$doc:meta])* $column:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $table {
            $($(#[$doc])* pub $column: $type,)*
        }

        impl $crate::cinder::database::sql::Table for $table {
            const NAME: &'static str = $name;
            const COLUMNS: &'static [(&'static str, $crate::cinder::database::sql::Kind)] =
                &[$((stringify!($column), <$type as $crate::cinder::database::sql::Column>::KIND),)*];

            fn of(row: &sqlx::any::AnyRow) -> sqlx::Result<Self> {
                Ok(Self { $($column: $crate::cinder::database::sql::Column::of(row, stringify!($column))?,)* })
            }
        }
    };
}
pub(super) use table;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_written_once_for_all() {
        let sql = "UPDATE backups SET size = ?, updated_at = ?time WHERE id = ? FOR UPDATE";

        assert_eq!(
            Dialect::Postgres.translated(sql),
            "UPDATE backups SET size = $1, updated_at = CAST($2 AS TIMESTAMP) WHERE id = $3 FOR UPDATE"
        );
        assert_eq!(
            Dialect::MySql.translated(sql),
            "UPDATE backups SET size = ?, updated_at = ? WHERE id = ? FOR UPDATE"
        );
        assert_eq!(
            Dialect::Sqlite.translated(sql),
            "UPDATE backups SET size = ?, updated_at = ? WHERE id = ?"
        );
    }
}
