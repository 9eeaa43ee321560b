//! Notifications: what has happened, for whoever listens, such as those who bill.

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::Context;
use super::envelope::{UNIQUE_ID, seal, unique_id};

/// How a notification travels: the word of `driver` in `[oslo_messaging_notifications]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotificationFormat {
    /// `messagingv2`: in an envelope.
    Messagingv2,
    /// `messaging`: without one.
    Messaging,
}

/// Something that has happened.
#[derive(Debug, Clone)]
pub struct Notification {
    /// Its id, by which whoever gets it twice knows.
    pub message_id: Uuid,
    /// Who says so, `backup.HOST`.
    pub publisher_id: String,
    /// What has happened, such as `backup.create.end`.
    pub event_type: String,
    /// `INFO` for all that Cinder's backup service sends, or `ERROR`.
    pub priority: &'static str,
    /// To whom and with what.
    pub payload: Value,
    /// Who asked for it; the token stays here.
    pub context: Context,
}

impl Notification {
    /// Writes the notification, for one queue.
    pub fn encode(&self, at: Timestamp, format: NotificationFormat) -> Vec<u8> {
        let mut message = Map::new();
        message.insert("message_id".into(), json!(self.message_id.to_string()));
        message.insert("publisher_id".into(), json!(self.publisher_id));
        message.insert("event_type".into(), json!(self.event_type));
        message.insert("priority".into(), json!(self.priority));
        message.insert("payload".into(), self.payload.clone());
        message.insert("timestamp".into(), json!(at.strftime("%Y-%m-%d %H:%M:%S.%6f").to_string()));
        message.insert(UNIQUE_ID.into(), json!(unique_id()));
        self.context.for_all().put_into(&mut message);
        match format {
            NotificationFormat::Messagingv2 => seal(message),
            NotificationFormat::Messaging => Value::Object(message).to_string().into_bytes(),
        }
    }
}
