//! Cinder's database, as far as a backup worker reads and writes it: MariaDB or MySQL, PostgreSQL, SQLite.
//!
//! The schema is Cinder's own, made by `cinder-manage db sync`; no table is made or changed here. What Cinder does in
//! several steps is one transaction each, so that a worker that dies leaves all of it or nothing. A status is only changed
//! from the one that is expected, so that what somebody else did in between is not overwritten, and doing the same again
//! changes nothing.

mod backups;
mod columns;
mod imports;
mod messages;
mod quotas;
mod restores;
mod services;
mod sql;
mod url;
mod volume_meta;
mod volumes;

use std::time::Duration;

use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{AnyConnection, AnyPool};
use tracing::warn;

use crate::error::{Causes, Class};

pub use backups::{BackupRow, Finished};
pub use messages::UserMessage;
pub use quotas::QuotaRefresh;
pub use restores::Restored;
pub use services::{Registration, ServiceRow};
use sql::{Bound, Dialect, Table, now};
pub use url::DatabaseUrl;
pub use volume_meta::{KeptKey, kept_key};
pub use volumes::{SnapshotRow, VolumeRow};

/// How often a transaction is begun that others or a lost connection ended.
const ATTEMPTS_MAX: u32 = 5;

/// Says what was asked of the database, and why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `connection` cannot be understood.
    #[error("[database] connection: {problem}")]
    Url {
        /// What is wrong and what to write.
        problem: &'static str,
    },
    /// The database did not do it.
    #[error("{doing} in Cinder's database")]
    Sql {
        /// Such as `read backup 1f0c…`.
        doing: String,
        /// What the database or the driver says.
        source: sqlx::Error,
    },
    /// There is no such row, or it is deleted.
    #[error("Cinder's database has no {what} {id}")]
    NotThere {
        /// Such as `volume`.
        what: &'static str,
        /// The id looked for.
        id: String,
    },
    /// An exported record does not say what a backup's row needs.
    #[error("import backup {id}: {problem}")]
    Import {
        /// The backup.
        id: String,
        /// Which field, and what is wrong with it.
        problem: String,
    },
    /// The metadata of a volume that a backup holds cannot be put back.
    #[error("put back the metadata of volume {volume_id}: {problem}")]
    VolumeMeta {
        /// The volume they were for.
        volume_id: String,
        /// What is wrong with them.
        problem: String,
    },
}

type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether it may pass.
    pub fn class(&self) -> Class {
        match self {
            Self::Sql { source, .. } if is_lost(source) || is_deadlock(source) => Class::Transient,
            _ => Class::Permanent,
        }
    }
}

/// How connections are made and kept, by the options of `[database]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connections {
    /// How many there are at a time, at most: `max_pool_size` and `max_overflow`.
    pub count_max: u32,
    /// How long one is waited for, at most: `pool_timeout`.
    pub wait_seconds_max: u64,
    /// After how long one is replaced: `connection_recycle_time`; never if none.
    pub age_seconds_max: Option<u64>,
    /// How often it is tried to make the first one: `max_retries`; without an end if none.
    pub tries_max: Option<u32>,
    /// The pause between these tries: `retry_interval`.
    pub retry_seconds: u64,
}

impl Default for Connections {
    /// What oslo.db does when nothing is set, but that it waits for ever.
    fn default() -> Self {
        Self {
            count_max: 55,
            wait_seconds_max: 30,
            age_seconds_max: Some(3600),
            tries_max: Some(10),
            retry_seconds: 10,
        }
    }
}

/// Cinder's database. Copies share their connections.
#[derive(Debug, Clone)]
pub struct Database {
    pool: AnyPool,
    dialect: Dialect,
}

impl Database {
    /// Connects to the database, and tries again if it does not answer.
    pub async fn connect(url: &DatabaseUrl, connections: &Connections) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let failed = |source| Error::Sql { doing: "connect".into(), source };
        let options: AnyConnectOptions = url.url.parse().map_err(failed)?;
        let rules = AnyPoolOptions::new()
            .max_connections(connections.count_max.max(1))
            .acquire_timeout(Duration::from_secs(connections.wait_seconds_max.max(1)))
            .max_lifetime(connections.age_seconds_max.map(Duration::from_secs));
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match rules.clone().connect_with(options.clone()).await {
                Ok(pool) => return Ok(Self { pool, dialect: url.dialect }),
                Err(source) => failed(source),
            };
            if error.class() == Class::Permanent || connections.tries_max.is_some_and(|max| tries >= max) {
                return Err(error);
            }
            warn!(error = %Causes(&error), tries, "Cinder's database cannot be used: trying again");
            tokio::time::sleep(Duration::from_secs(connections.retry_seconds)).await;
        }
    }

    /// Reads rows outside of a transaction.
    async fn read<T: Table>(&self, doing: &str, condition: &str, values: &[Bound]) -> Result<Vec<T>> {
        let attempt = || async {
            let mut connection = self.pool.acquire().await?;
            self.dialect.read(&mut connection, condition, values).await
        };
        self.again(doing, attempt).await
    }

    /// Runs a statement; how many rows it was about.
    async fn execute(&self, doing: &str, sql: &str, values: &[Bound]) -> Result<u64> {
        let attempt = || async {
            let mut connection = self.pool.acquire().await?;
            self.dialect.execute(&mut connection, sql, values).await
        };
        self.again(doing, attempt).await
    }

    /// Runs a transaction, or anything that can be done twice, until it is not ended by others or a lost connection.
    async fn again<T, F: Future<Output = sqlx::Result<T>>>(
        &self,
        doing: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let source = match attempt().await {
                Ok(done) => return Ok(done),
                Err(source) => source,
            };
            let passes = is_lost(&source) || is_deadlock(&source);
            let error = Error::Sql { doing: doing.into(), source };
            if !passes || attempts == ATTEMPTS_MAX {
                return Err(error);
            }
            warn!(error = %Causes(&error), attempts, "the database ended what was begun, beginning again");
            // Two that ended each other should not meet again.
            let pause = Duration::from_millis((50 << attempts) + fastrand::u64(..50));
            tokio::time::sleep(pause).await;
        }
    }

    async fn begin(&self) -> sqlx::Result<sqlx::Transaction<'static, sqlx::Any>> {
        self.pool.begin_with(self.dialect.begin()).await
    }

    /// Sets columns of the row with this id, of any row even if deleted. With `expected`, only if its status is one of these.
    /// Whether it was done.
    async fn change(
        &self,
        to: &mut AnyConnection,
        table: &str,
        id: &str,
        expected: &[&str],
        changes: &Changes,
    ) -> sqlx::Result<bool> {
        let mut sql = format!("UPDATE {table} SET updated_at = ?time");
        let mut values = vec![now().into()];
        for (column, value) in &changes.0 {
            sql.push_str(&format!(", {column} = {}", value.place()));
            values.push(value.clone());
        }
        sql.push_str(" WHERE id = ?");
        values.push(id.into());
        if !expected.is_empty() {
            sql.push_str(&format!(" AND status IN ({})", vec!["?"; expected.len()].join(", ")));
            values.extend(expected.iter().map(|status| Bound::from(*status)));
        }
        Ok(self.dialect.execute(to, &sql, &values).await? > 0)
    }
}

/// What columns of a row are to become.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes(Vec<(&'static str, Bound)>);

/// How many characters most of Cinder's columns hold.
const TEXT_CHARACTERS_MAX: usize = 255;

impl Changes {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a text, cut at the 255 characters that a column holds.
    #[must_use]
    pub fn text(self, column: &'static str, text: &str) -> Self {
        self.text_or_null(column, Some(text))
    }

    /// Sets a text, or nothing.
    #[must_use]
    pub fn text_or_null(mut self, column: &'static str, text: Option<&str>) -> Self {
        let text = text.map(|text| text.chars().take(TEXT_CHARACTERS_MAX).collect());
        self.set(column, Bound::Text(text));
        self
    }

    /// Sets a number.
    #[must_use]
    pub fn integer(mut self, column: &'static str, number: i64) -> Self {
        self.set(column, number.into());
        self
    }

    /// Sets yes or no.
    #[must_use]
    pub fn bool(mut self, column: &'static str, value: bool) -> Self {
        self.set(column, Bound::Bool(value));
        self
    }

    /// Sets a point in time to now.
    #[must_use]
    pub fn now(self, column: &'static str) -> Self {
        self.time(column, now())
    }

    /// Sets a point in time, in UTC.
    #[must_use]
    pub fn time(mut self, column: &'static str, time: jiff::civil::DateTime) -> Self {
        self.set(column, time.into());
        self
    }

    /// These, and those, which win.
    #[must_use]
    pub fn and(mut self, others: Self) -> Self {
        for (column, value) in others.0 {
            self.set(column, value);
        }
        self
    }

    // PostgreSQL refuses a statement that sets a column twice.
    fn set(&mut self, column: &'static str, value: Bound) {
        self.0.retain(|(name, _)| *name != column);
        self.0.push((column, value));
    }
}

/// Whether another transaction was in the way; the database has undone ours.
fn is_deadlock(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else { return false };
    let code = error.code().unwrap_or_default();
    if let Some(error) = error.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>() {
        // MariaDB, of a row that another one has changed since this one began to read, where innodb_snapshot_isolation is on,
        // as it is from 11.6.2; waited too long for a lock; deadlock, which is also what Galera says of a lost race.
        return matches!(error.number(), 1020 | 1205 | 1213);
    }
    if error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>().is_some() {
        // Could not be serialised; deadlock.
        return matches!(code.as_ref(), "40001" | "40P01");
    }
    // SQLITE_BUSY and SQLITE_LOCKED, whose further bits say more.
    code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6))
}

/// Whether the connection is gone, or the server is just stopping, starting, full, or not the one that writes at the moment.
fn is_lost(error: &sqlx::Error) -> bool {
    let error = match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::Protocol(_) => return true,
        sqlx::Error::Database(error) => error,
        _ => return false,
    };
    if let Some(error) = error.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>() {
        return matches!(
            error.number(),
            // Too many connections; Galera's node is not ready; shutting down; read-only, as a node that hands over.
            1040 | 1047 | 1053 | 1290 | 1836
            // What came over the network was cut off, or the connection was ended by somebody.
            | 1158..=1161 | 1184 | 1927 | 4031
        );
    }
    let code = error.code().unwrap_or_default();
    error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>().is_some()
        // Connections that broke; too many; read-only, as a server that hands over; ended by the administrator, and starting up.
        && (code.starts_with("08") || matches!(code.as_ref(), "53300" | "25006" | "57P01" | "57P02" | "57P03"))
}
