//! Our own messages: commands in JSON, events as CloudEvents in structured JSON.
//!
//! `docs/messages.md` describes them for those who write and read them, `schemas/` exactly.

mod command;
mod control;
mod event;
mod schema;

pub use command::{COMMAND_BYTES_MAX, COMMAND_CONTENT_TYPE, encode_command, parse_command};
pub use control::{Control, Unkept, encode_control, encode_unkept, parse_control, parse_unkept};
pub use event::{
    EVENT_CONTENT_TYPE, EventError, REJECTED_ROUTING_KEY, Received, encode_attempts, encode_event,
    encode_rejected, event_id, parse_attempts, parse_event, rejected_event_id, routing_key,
};
