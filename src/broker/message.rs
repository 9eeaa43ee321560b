//! The properties of a message as we know them, and how they travel.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::Error;

const ATTEMPT: &str = "x-backhaul-attempt";
const PERSISTENT: u8 = 2;

/// What a message carries beside its body, as far as we use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// The MIME type of the body.
    pub content_type: Option<String>,
    /// What the message belongs to, in the sender's words.
    pub correlation_id: Option<String>,
    /// The queue that waits for the reply.
    pub reply_to: Option<String>,
    /// The sender's name for the message.
    pub message_id: Option<String>,
    /// 0 to 9; higher goes first, where the queue knows priorities.
    pub priority: Option<u8>,
    /// Counts the times that the message was put off with `retry_later`, from 1.
    pub attempt: u32,
}

impl Default for Properties {
    fn default() -> Self {
        Self {
            content_type: None,
            correlation_id: None,
            reply_to: None,
            message_id: None,
            priority: None,
            attempt: 1,
        }
    }
}

/// Reads what we use of the properties.
pub(super) fn read(raw: &BasicProperties) -> Properties {
    let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
    Properties {
        content_type: text(raw.content_type()),
        correlation_id: text(raw.correlation_id()),
        reply_to: text(raw.reply_to()),
        message_id: text(raw.message_id()),
        priority: *raw.priority(),
        attempt: attempt(raw),
    }
}

/// Makes the properties of a message of our own.
pub(super) fn write(properties: &Properties) -> Result<BasicProperties, Error> {
    let mut raw = BasicProperties::default().with_delivery_mode(PERSISTENT);
    if let Some(value) = &properties.content_type {
        raw = raw.with_content_type(short("the content type", value)?);
    }
    if let Some(value) = &properties.correlation_id {
        raw = raw.with_correlation_id(short("the correlation id", value)?);
    }
    if let Some(value) = &properties.reply_to {
        raw = raw.with_reply_to(short("the reply queue", value)?);
    }
    if let Some(value) = &properties.message_id {
        raw = raw.with_message_id(short("the message id", value)?);
    }
    if let Some(value) = properties.priority {
        raw = raw.with_priority(value);
    }
    if properties.attempt > 1 {
        raw = raw.with_headers(table([(ATTEMPT, AMQPValue::LongUInt(properties.attempt))]));
    }
    Ok(raw)
}

/// Makes the properties of a copy that is put off: all that the sender set, and the attempt counted.
pub(super) fn next_attempt(raw: &BasicProperties) -> BasicProperties {
    copied(raw, [(ATTEMPT, AMQPValue::LongUInt(attempt(raw).saturating_add(1)))])
}

/// Makes the properties of a copy that is given up: all that the sender set, and why and where from.
pub(super) fn dead(
    raw: &BasicProperties,
    reason: &str,
    exchange: &str,
    routing_key: &str,
) -> BasicProperties {
    // The broker refuses headers that do not fit into a frame, and the reason may quote what the sender wrote.
    let reason: String = reason.chars().take(1000).collect();
    let value = |text: &str| AMQPValue::LongString(text.into());
    copied(
        raw,
        [
            ("x-backhaul-reason", value(&reason)),
            ("x-backhaul-exchange", value(exchange)),
            ("x-backhaul-routing-key", value(routing_key)),
        ],
    )
}

fn copied<const N: usize>(raw: &BasicProperties, ours: [(&'static str, AMQPValue); N]) -> BasicProperties {
    // What the broker added is its own to add again: x-death could make it see a loop and drop the message.
    // CC and BCC would send the copy to other queues, too.
    let foreign = |name: &str| {
        matches!(name, "CC" | "BCC" | "x-delivery-count" | "x-acquired-count")
            || ["x-death", "x-first-death-", "x-last-death-"].iter().any(|begin| name.starts_with(begin))
    };
    let mut headers = FieldTable::default();
    for (name, value) in raw.headers().iter().flat_map(FieldTable::inner) {
        if !foreign(name.as_str()) {
            headers.insert(name.clone(), value.clone());
        }
    }
    for (name, value) in ours {
        headers.insert(name.into(), value);
    }
    // Left out: expiration, which is about the sender's own queue, and user_id, which the broker only takes from
    // the user it names.
    let mut copy = BasicProperties::default().with_delivery_mode(PERSISTENT).with_headers(headers);
    let set = [
        (raw.content_type(), BasicProperties::with_content_type as fn(BasicProperties, ShortString) -> _),
        (raw.content_encoding(), BasicProperties::with_content_encoding),
        (raw.correlation_id(), BasicProperties::with_correlation_id),
        (raw.reply_to(), BasicProperties::with_reply_to),
        (raw.message_id(), BasicProperties::with_message_id),
        (raw.kind(), BasicProperties::with_type),
        (raw.app_id(), BasicProperties::with_app_id),
    ];
    for (value, with) in set {
        if let Some(value) = value {
            copy = with(copy, value.clone());
        }
    }
    if let Some(priority) = raw.priority() {
        copy = copy.with_priority(*priority);
    }
    if let Some(timestamp) = raw.timestamp() {
        copy = copy.with_timestamp(*timestamp);
    }
    copy
}

fn attempt(raw: &BasicProperties) -> u32 {
    let value = raw.headers().as_ref().and_then(|headers| headers.inner().get(ATTEMPT));
    // Other clients choose the width of an integer as they like.
    let number = match value {
        Some(AMQPValue::ShortShortInt(n)) => i64::from(*n),
        Some(AMQPValue::ShortShortUInt(n)) => i64::from(*n),
        Some(AMQPValue::ShortInt(n)) => i64::from(*n),
        Some(AMQPValue::ShortUInt(n)) => i64::from(*n),
        Some(AMQPValue::LongInt(n)) => i64::from(*n),
        Some(AMQPValue::LongUInt(n)) => i64::from(*n),
        Some(AMQPValue::LongLongInt(n)) => *n,
        _ => 1,
    };
    u32::try_from(number).unwrap_or(1).max(1)
}

/// Takes a text into AMQP's short string, which has at most 255 bytes.
pub(super) fn short(what: &'static str, text: &str) -> Result<ShortString, Error> {
    ShortString::try_new(text).map_err(|_| Error::TooLong { what, bytes: text.len() })
}

/// Makes a table of arguments or headers.
pub(super) fn table<const N: usize>(entries: [(&'static str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert(name.into(), value);
    }
    table
}
