//! The envelope: the message as a text of JSON inside JSON, beside the envelope's version.

use serde_json::{Map, Value, json};
use uuid::Uuid;

const VERSION_KEY: &str = "oslo.version";
const MESSAGE_KEY: &str = "oslo.message";
const VERSION: &str = "2.0";

/// The name under which a message carries its own id.
pub(super) const UNIQUE_ID: &str = "_unique_id";

/// Says why bytes are no message of oslo.messaging that we can read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this message cannot be read: {0}")]
pub struct Malformed(String);

impl Malformed {
    pub(super) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// Takes the message out of its envelope; one that has none is taken as it is.
pub(super) fn open(body: &[u8]) -> Result<Map<String, Value>, Malformed> {
    let outer: Value = serde_json::from_slice(body)
        .map_err(|error| Malformed::new(format!("its body is no JSON: {error}")))?;
    let Value::Object(mut outer) = outer else {
        return Err(Malformed::new("its body is JSON, but no object"));
    };
    let (Some(version), Some(inner)) = (outer.get(VERSION_KEY), outer.get(MESSAGE_KEY)) else {
        return Ok(outer);
    };
    if version.as_str().and_then(|version| version.split('.').next()) != Some("2") {
        return Err(Malformed::new(format!(
            "its envelope has version {}, and only 2.0 is known",
            cut(version)
        )));
    }
    let inner = match inner {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| Malformed::new(format!("its envelope holds no JSON: {error}")))?,
        _ => return Err(Malformed::new("its envelope holds no text")),
    };
    outer.clear();
    match inner {
        Value::Object(message) => Ok(message),
        _ => Err(Malformed::new("its envelope holds JSON, but no object")),
    }
}

/// Puts a message into its envelope.
pub(super) fn seal(message: Map<String, Value>) -> Vec<u8> {
    json!({ VERSION_KEY: VERSION, MESSAGE_KEY: Value::Object(message).to_string() }).to_string().into_bytes()
}

/// Makes an id that no other message has.
pub(super) fn unique_id() -> String {
    Uuid::new_v4().simple().to_string()
}

/// A value for an error text, which must not grow with what somebody sent.
pub(super) fn cut(value: &Value) -> String {
    value.to_string().chars().take(64).collect()
}
