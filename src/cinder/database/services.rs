//! The row by which Cinder's API knows that a worker is there.

use jiff::civil::DateTime;
use uuid::Uuid;

use super::sql::{Bound, now, table};
use super::{Database, Error, Result};

/// What Cinder calls the program of a backup worker, and its queue.
const BINARY: &str = "cinder-backup";

table! {
    /// A service that is registered.
    ServiceRow "services" {
        /// Its number.
        id: i64,
        /// Its id.
        uuid: Option<String>,
        /// The host that it is called by.
        host: Option<String>,
        /// Where it is.
        availability_zone: Option<String>,
        /// How often it has said that it is there.
        report_count: i64,
        /// Whether the operator wants no new jobs given to it.
        disabled: bool,
        /// The version of its methods.
        rpc_current_version: Option<String>,
        /// The version of its objects.
        object_current_version: Option<String>,
        /// When it last said that it is there, in UTC.
        updated_at: Option<DateTime>,
    }
}

/// What a worker says of itself when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration<'a> {
    /// The host that it is called by.
    pub host: &'a str,
    /// Where it is.
    pub availability_zone: &'a str,
    /// The version of its methods; no one sends it what a newer version has.
    pub rpc_version: &'a str,
    /// The version of its objects.
    pub object_version: &'a str,
    /// Whether a service that was never here before may have jobs at once.
    pub enabled: bool,
}

impl Database {
    /// Registers a worker, or finds the row of one that was here before and sets its versions.
    pub async fn register_service(&self, registration: &Registration<'_>) -> Result<ServiceRow> {
        let Registration { host, availability_zone, rpc_version, object_version, enabled } = *registration;
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let condition = "host = ? AND topic = ? AND deleted = false ORDER BY id FOR UPDATE";
            let mut there: Vec<ServiceRow> =
                self.dialect.read(&mut transaction, condition, &[host.into(), BINARY.into()]).await?;
            if there.is_empty() {
                let sql = format!(
                    "INSERT INTO services (created_at, updated_at, deleted, uuid, host, {}, topic, report_count, disabled, \
                     availability_zone, rpc_current_version, object_current_version, replication_status, frozen) \
                     VALUES (?time, ?time, false, ?, ?, ?, ?, 0, ?, ?, ?, ?, 'not-capable', false)",
                    self.dialect.quoted("binary")
                );
                let uuid = Uuid::new_v4().to_string();
                let (time, disabled) = (Bound::from(now()), Bound::Bool(!enabled));
                let values = [
                    time.clone(),
                    time,
                    Bound::from(&uuid),
                    host.into(),
                    BINARY.into(),
                    BINARY.into(),
                    disabled,
                    availability_zone.into(),
                    rpc_version.into(),
                    object_version.into(),
                ];
                self.dialect.execute(&mut transaction, &sql, &values).await?;
            } else {
                // `updated_at` stays: it says that the worker is up, which it is when it reports.
                let sql = "UPDATE services SET rpc_current_version = ?, object_current_version = ? \
                           WHERE host = ? AND topic = ? AND deleted = false";
                let values = [rpc_version.into(), object_version.into(), host.into(), BINARY.into()];
                self.dialect.execute(&mut transaction, sql, &values).await?;
            }
            there = self.dialect.read(&mut transaction, condition, &[host.into(), BINARY.into()]).await?;
            transaction.commit().await?;
            Ok(there.into_iter().next())
        };
        let service = self.again(&format!("register the service of {host}"), attempt).await?;
        service.ok_or_else(|| Error::NotThere { what: "service of", id: host.into() })
    }

    /// Says that the worker is there. It is not tried again, since the next time comes soon. False if its row is gone: then
    /// it must register anew.
    pub async fn report_service(&self, id: i64, availability_zone: &str) -> Result<bool> {
        let sql = "UPDATE services SET report_count = report_count + 1, updated_at = ?time, availability_zone = ? \
                   WHERE id = ? AND deleted = false";
        let values = [now().into(), availability_zone.into(), id.into()];
        let reported = async {
            let mut connection = self.pool.acquire().await?;
            self.dialect.execute(&mut connection, sql, &values).await
        };
        let rows =
            reported.await.map_err(|source| Error::Sql { doing: format!("report service {id}"), source })?;
        Ok(rows > 0)
    }
}
