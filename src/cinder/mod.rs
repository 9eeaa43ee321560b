//! What Cinder and Backhaul tell each other about backups, in Cinder's words.
//!
//! It must not know how engines work.

pub mod export_record;
pub mod rpc;
