//! Turns bytes into commands, and what happened into bytes: the only room that knows the wire.
//!
//! It knows JSON and the schemas, and nothing of where the bytes come from or go to: no AMQP client, no engine, no
//! store. What is allowed on this worker (which files, which pools) is not decided here either.

mod json;
mod native;
pub mod oslo;
mod rejection;

pub use native::{
    COMMAND_BYTES_MAX, COMMAND_CONTENT_TYPE, Control, EVENT_CONTENT_TYPE, EventError, REJECTED_ROUTING_KEY,
    Received, Unkept, encode_attempts, encode_command, encode_control, encode_event, encode_rejected,
    encode_unkept, event_id, parse_attempts, parse_command, parse_control, parse_event, parse_unkept,
    rejected_event_id, routing_key,
};
pub use rejection::{Reason, Rejection};
