//! The properties of a message as we know them, and how they travel.

use std::cmp::Reverse;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tracing::warn;

use super::Error;
#[cfg(any(test, fuzzing))]
use super::mend;

const ATTEMPT: &str = "x-backhaul-attempt";
const REVIVAL: &str = "x-backhaul-revival";
const REVIVED_AT: &str = "x-backhaul-revived-at";
const STORY: &str = "x-backhaul-story";
const REASON: &str = "x-backhaul-reason";
const EXCHANGE: &str = "x-backhaul-exchange";
const ROUTING_KEY: &str = "x-backhaul-routing-key";
const PARKED: &str = "x-backhaul-parked";
const WAITS_SINCE: &str = "x-backhaul-waits-since";
const UNFINISHED: &str = "x-backhaul-unfinished";
const DIED_AT: &str = "x-backhaul-died-at";
const LEFT_OUT: &str = "x-backhaul-left-out";
/// What stays of the headers for as long as it can.
const OURS: [&str; 11] = [
    ATTEMPT,
    REVIVAL,
    REVIVED_AT,
    STORY,
    REASON,
    EXCHANGE,
    ROUTING_KEY,
    PARKED,
    WAITS_SINCE,
    DIED_AT,
    LEFT_OUT,
];
/// What is in a frame beside the properties: its kind, channel, size and end, and class, weight and size of the body.
const FRAME_BYTES: usize = 7 + 1 + 2 + 2 + 8;
/// What is left free for the names of headers that are left out, and for what the broker adds when it moves the message or hands it
/// out again: lapin takes no frame that is larger, either.
const FREE_BYTES: usize = 4 << 10;
/// How many letters are noted of the names of headers that are left out.
const LEFT_OUT_MAX: usize = 500;
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
    /// What was told of those times, in words that are not ours.
    pub story: Option<String>,
    /// Counts the times that the message was brought back from the dead-letter queue.
    pub revival_count: u32,
    /// When it was brought back last.
    pub revived_at: Option<Timestamp>,
    /// The message was put off because another worker had its job.
    pub parked: bool,
    /// When the message was put off first because another job had to end, or to have its place, before.
    pub waits_since: Option<Timestamp>,
    /// Whoever had the message before has left something half done, and said so.
    pub unfinished: bool,
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
            story: None,
            revival_count: 0,
            revived_at: None,
            parked: false,
            waits_since: None,
            unfinished: false,
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
        story: header(raw, STORY),
        revival_count: count(raw, REVIVAL).unwrap_or(0),
        revived_at: time(raw, REVIVED_AT),
        parked: count(raw, PARKED).is_some(),
        waits_since: time(raw, WAITS_SINCE),
        unfinished: count(raw, UNFINISHED).is_some(),
    }
}

/// Why a message was given up, and where it came from.
pub(super) struct Death {
    pub reason: String,
    pub exchange: ShortString,
    pub routing_key: ShortString,
    /// In seconds since 1970.
    pub at: Option<u64>,
}

/// Reads what `dead` has written, or why the broker has moved the message by itself: then nothing says where it came from.
pub(super) fn death(raw: &BasicProperties) -> Death {
    let name = |key| header(raw, key).and_then(|text| ShortString::try_new(text).ok()).unwrap_or_default();
    let brokers_reason = || {
        let word = header(raw, "x-last-death-reason").or_else(|| header(raw, "x-first-death-reason"))?;
        Some(match word.as_str() {
            "expired" => {
                "the broker gave it up: its time in the queue had expired before a worker took it".into()
            }
            word => format!("the broker gave it up: {word}"),
        })
    };
    Death {
        reason: header(raw, REASON).or_else(brokers_reason).unwrap_or_default(),
        exchange: name(EXCHANGE),
        routing_key: name(ROUTING_KEY),
        at: header(raw, DIED_AT).and_then(|text| text.parse().ok()),
    }
}

fn header(raw: &BasicProperties, key: &str) -> Option<String> {
    match raw.headers().as_ref()?.inner().get(key)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        _ => None,
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

/// Makes the properties of a copy that is put off for `wait`: all that the sender set, the attempt counted, and the story
/// of those so far.
pub(super) fn next_attempt(raw: &BasicProperties, story: &str, wait: Duration) -> BasicProperties {
    let ours = [
        (ATTEMPT, AMQPValue::LongUInt(attempt(raw).saturating_add(1))),
        (STORY, AMQPValue::LongString(story.into())),
    ];
    // Whoever had it before this attempt is no concern of the next one.
    copied(&without(raw, &[PARKED]), ours).with_expiration(milliseconds(wait))
}

/// Makes the properties of a copy that is put off for `wait` because another worker has its job: nothing is counted.
pub(super) fn parked(raw: &BasicProperties, wait: Duration) -> BasicProperties {
    copied(raw, [(PARKED, AMQPValue::LongUInt(1))]).with_expiration(milliseconds(wait))
}

/// Makes the properties of a copy that is put off for `wait` and waits since then for other jobs.
pub(super) fn waiting(raw: &BasicProperties, since: Timestamp, wait: Duration) -> BasicProperties {
    let since = AMQPValue::LongLongInt(since.as_millisecond());
    copied(raw, [(WAITS_SINCE, since)]).with_expiration(milliseconds(wait))
}

/// Makes the properties of a copy that comes back after `wait`, whose job was begun and stopped in good order: what was counted
/// when the job was begun is not to be counted again.
pub(super) fn handed_back(raw: &BasicProperties, since: Timestamp, wait: Duration) -> BasicProperties {
    waiting(&without(raw, &[PARKED]), since, wait)
}

/// Makes the properties of a message that says that something was left half done.
pub(super) fn unfinished(raw: &BasicProperties) -> BasicProperties {
    let mut headers = raw.headers().clone().unwrap_or_default();
    headers.insert(UNFINISHED.into(), AMQPValue::LongUInt(1));
    raw.clone().with_headers(headers)
}

fn milliseconds(wait: Duration) -> ShortString {
    wait.as_millis().to_string().as_str().into()
}

/// Makes the properties of a copy that begins anew: all that the sender set.
pub(super) fn revived(raw: &BasicProperties) -> BasicProperties {
    let ours = [ATTEMPT, STORY, PARKED, WAITS_SINCE, REASON, EXCHANGE, ROUTING_KEY, DIED_AT];
    let revival_count = count(raw, REVIVAL).unwrap_or(0).saturating_add(1);
    let revived = [
        (REVIVAL, AMQPValue::LongUInt(revival_count)),
        (REVIVED_AT, AMQPValue::LongLongInt(Timestamp::now().as_millisecond())),
    ];
    copied(&without(raw, &ours), revived)
}

/// The same properties without these headers.
fn without(raw: &BasicProperties, names: &[&str]) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in raw.headers().iter().flat_map(FieldTable::inner) {
        if !names.contains(&name.as_str()) {
            headers.insert(name.clone(), value.clone());
        }
    }
    raw.clone().with_headers(headers)
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
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    copied(
        raw,
        [
            (REASON, value(&reason)),
            (EXCHANGE, value(exchange)),
            (ROUTING_KEY, value(routing_key)),
            (DIED_AT, value(&now.to_string())),
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

/// Leaves headers out if the properties do not fit into one frame, for which the broker would end the connection: the sender's own
/// first, the largest before the others. Their names are noted.
pub(super) fn fitting(raw: BasicProperties, frame_bytes_max: u32) -> BasicProperties {
    let bytes_max = (frame_bytes_max as usize).saturating_sub(FRAME_BYTES + FREE_BYTES);
    let bytes = encoded_bytes(&raw);
    let Some(headers) = raw.headers().as_ref().filter(|_| bytes > bytes_max) else { return raw };
    let alone = |table| encoded_bytes(&BasicProperties::default().with_headers(table));
    let none = alone(FieldTable::default());
    let size = |name: &ShortString, value: &AMQPValue| {
        let mut table = FieldTable::default();
        table.insert(name.clone(), value.clone());
        alone(table) - none
    };
    let mut by_size: Vec<_> =
        headers.inner().iter().map(|(name, value)| (size(name, value), name, value)).collect();
    by_size.sort_by_key(|(bytes, name, _)| (OURS.contains(&name.as_str()), Reverse(*bytes)));
    let (mut excess, mut count) = (bytes - bytes_max, 0);
    for (bytes, ..) in &by_size {
        if excess == 0 {
            break;
        }
        (excess, count) = (excess.saturating_sub(*bytes), count + 1);
    }
    let (left_out, kept) = by_size.split_at(count);
    let before = header(&raw, LEFT_OUT);
    let names: Vec<&str> =
        before.as_deref().into_iter().chain(left_out.iter().map(|(_, name, _)| name.as_str())).collect();
    let names: String = names.join(", ").chars().take(LEFT_OUT_MAX).collect();
    warn!(
        headers = names,
        "headers left out of a message: with what is noted there it would not fit into a frame"
    );
    let mut headers = FieldTable::default();
    for (_, name, value) in kept {
        headers.insert((*name).clone(), (*value).clone());
    }
    headers.insert(LEFT_OUT.into(), AMQPValue::LongString(names.into()));
    raw.clone().with_headers(headers)
}

/// How much room the properties take in a frame.
fn encoded_bytes(raw: &BasicProperties) -> usize {
    let encoded = lapin::protocol::basic::gen_properties(raw)(Vec::new().into());
    // Memory takes all that is written to it.
    encoded.map_or(usize::MAX, |encoded| encoded.into_inner().0.len())
}

fn time(raw: &BasicProperties, key: &str) -> Option<Timestamp> {
    Timestamp::from_millisecond(number(raw, key)?).ok()
}

fn attempt(raw: &BasicProperties) -> u32 {
    count(raw, ATTEMPT).unwrap_or(1).max(1)
}

fn count(raw: &BasicProperties, key: &str) -> Option<u32> {
    u32::try_from(number(raw, key)?).ok()
}

fn number(raw: &BasicProperties, key: &str) -> Option<i64> {
    // Other clients choose the width of an integer as they like.
    Some(match raw.headers().as_ref()?.inner().get(key)? {
        AMQPValue::ShortShortInt(n) => i64::from(*n),
        AMQPValue::ShortShortUInt(n) => i64::from(*n),
        AMQPValue::ShortInt(n) => i64::from(*n),
        AMQPValue::ShortUInt(n) => i64::from(*n),
        AMQPValue::LongInt(n) => i64::from(*n),
        AMQPValue::LongUInt(n) => i64::from(*n),
        AMQPValue::LongLongInt(n) => *n,
        _ => return None,
    })
}

/// Reads and copies the properties that these bytes are on the wire.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_headers(data: &[u8]) {
    // Behind the class, the weight and the size of the body.
    let mut mended = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], data].concat();
    mend::mend(mend::HEADER, &mut mended);
    let Ok((_, raw)) = lapin::protocol::basic::parse_properties(&mended[12..]) else { return };
    let properties = read(&raw);
    drop(death(&raw));
    let wait = Duration::from_secs(1);
    let copies = [
        next_attempt(&raw, "[]", wait),
        parked(&raw, wait),
        waiting(&raw, Timestamp::UNIX_EPOCH, wait),
        dead(&raw, "", "", ""),
        unfinished(&raw),
    ];
    for copy in copies {
        let (copy, small) = (read(&copy), fitting(copy, 8 << 10));
        assert!(encoded_bytes(&small) <= (8 << 10) - FRAME_BYTES || small.headers().is_none(), "{small:?}");
        assert!(
            copy.attempt >= properties.attempt && copy.revival_count == properties.revival_count,
            "{copy:?}"
        );
        assert!(copy.message_id == properties.message_id && copy.reply_to == properties.reply_to, "{copy:?}");
    }
    assert!(
        !read(&next_attempt(&parked(&raw, wait), "[]", wait)).parked,
        "an attempt counts who had the one before it"
    );
    assert!(read(&revived(&raw)).attempt == 1, "{properties:?}");
    drop(write(&properties));
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
