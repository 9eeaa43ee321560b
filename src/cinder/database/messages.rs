//! What users read about their failed jobs: `openstack volume message list`.

use uuid::Uuid;

use super::sql::{Bound, now};
use super::{Database, Result};

/// A message to a user, in Cinder's numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserMessage<'a> {
    /// Whose it is.
    pub project_id: &'a str,
    /// The request that it is about.
    pub request_id: Option<&'a str>,
    /// `ERROR` or `WARNING`.
    pub level: &'a str,
    /// `VOLUME_BACKUP` or `VOLUME`.
    pub resource_type: &'a str,
    /// The id of the backup or volume.
    pub resource_id: &'a str,
    /// What was done: `013` is creating a backup, `014` deleting one, `015` restoring one.
    pub action_id: &'a str,
    /// What went wrong.
    pub detail_id: &'a str,
    /// When it is to be forgotten.
    pub ttl_seconds: u64,
}

impl Database {
    /// Leaves a message.
    pub async fn add_message(&self, message: &UserMessage<'_>) -> Result<()> {
        let UserMessage {
            project_id,
            request_id,
            level,
            resource_type,
            resource_id,
            action_id,
            detail_id,
            ttl_seconds,
        } = *message;
        let created = now();
        let ttl = jiff::SignedDuration::from_secs(i64::try_from(ttl_seconds).unwrap_or(i64::MAX));
        let sql = "INSERT INTO messages (id, created_at, deleted, project_id, request_id, message_level, resource_type, \
                   resource_uuid, action_id, detail_id, event_id, expires_at) \
                   VALUES (?, ?time, false, ?, ?, ?, ?, ?, ?, ?, ?, ?time)";
        let values = [
            Bound::from(&Uuid::new_v4().to_string()),
            created.into(),
            project_id.into(),
            request_id.into(),
            level.into(),
            resource_type.into(),
            resource_id.into(),
            action_id.into(),
            detail_id.into(),
            Bound::from(&format!("VOLUME_{resource_type}_{action_id}_{detail_id}")),
            created.saturating_add(ttl).into(),
        ];
        self.execute(&format!("leave a message about {resource_id}"), sql, &values).await.map(|_| ())
    }
}
