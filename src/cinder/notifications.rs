//! Notifications of what becomes of backups, with the payload that Cinder's own service gives them.

use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::DateTime;
use serde_json::{Map, Value, json};
use tokio::time::timeout;
use tracing::warn;
use uuid::Uuid;

use super::database::BackupRow;
use super::rpc::Rpc;
use crate::error::Causes;
use crate::message::oslo::{Context, Notification, NotificationFormat};

/// How long a notification is tried. What it tells of must not wait for ever for a broker.
const TELL_TIME_MAX: Duration = Duration::from_secs(10);

/// How a notification is meant: the word in it, and the last one of the name of its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// `INFO`, to `notifications.info`: all that Cinder's backup service sends.
    Info,
    /// `ERROR`, to `notifications.error`: that something has failed.
    Error,
}

impl Priority {
    fn word(self) -> &'static str {
        match self {
            Self::Info => "INFO",
            Self::Error => "ERROR",
        }
    }
}

/// Sends notifications.
pub struct Notifier {
    /// The broker that they go to.
    pub rpc: Rpc,
    /// One for each driver that is set.
    pub formats: Vec<NotificationFormat>,
    /// `topics`: the first words of the names of the queues.
    pub topics: Vec<String>,
    /// Who sends them, `backup.HOST`.
    pub publisher_id: String,
}

impl Notifier {
    /// Tells all who listen, or who will: the broker keeps it for them. One that cannot be sent in ten seconds is given up.
    pub async fn tell(
        &self,
        context: &Context,
        event_type: &str,
        priority: Priority,
        payload: Map<String, Value>,
    ) {
        let notification = Notification {
            message_id: Uuid::new_v4(),
            publisher_id: self.publisher_id.clone(),
            event_type: event_type.into(),
            priority: priority.word(),
            payload: payload.into(),
            context: context.clone(),
        };
        let at = Timestamp::now();
        let told = async {
            for format in &self.formats {
                for topic in &self.topics {
                    let body = notification.encode(at, *format);
                    if let Err(error) = self.rpc.notify(topic, &priority.word().to_lowercase(), &body).await {
                        warn!(event_type, topic, error = %Causes(&error), "notification not sent");
                    }
                }
            }
        };
        if timeout(TELL_TIME_MAX, told).await.is_err() {
            warn!(
                event_type,
                seconds = TELL_TIME_MAX.as_secs(),
                "notification given up: the broker does not take it"
            );
        }
    }
}

/// What is told of a backup.
pub fn payload(backup: &BackupRow) -> Map<String, Value> {
    let payload = json!({
        "tenant_id": backup.project_id,
        "user_id": backup.user_id,
        "availability_zone": backup.availability_zone,
        "backup_id": backup.id,
        "host": backup.host,
        "display_name": backup.display_name,
        "created_at": backup.created_at.map(iso_format),
        "status": backup.status,
        "volume_id": backup.volume_id,
        "size": backup.size,
        "service_metadata": backup.service_metadata,
        "service": backup.service,
        "fail_reason": backup.fail_reason,
        "parent_id": backup.parent_id,
        "num_dependent_backups": backup.num_dependent_backups,
        "snapshot_id": backup.snapshot_id,
    });
    match payload {
        Value::Object(payload) => payload,
        // Not reached.
        _ => Map::new(),
    }
}

/// As Python's `isoformat` writes a time in UTC: without a fraction of a second if there is none.
fn iso_format(time: DateTime) -> String {
    let format = match time.subsec_nanosecond() {
        0 => "%Y-%m-%dT%H:%M:%S+00:00",
        _ => "%Y-%m-%dT%H:%M:%S.%6f+00:00",
    };
    time.strftime(format).to_string()
}
