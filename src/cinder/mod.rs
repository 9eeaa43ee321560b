//! What Cinder and Backhaul tell each other about backups, in Cinder's words.
//!
//! It must not know how engines work: it turns texts of Cinder into records of ours and back, and does no I/O.

pub mod conf;
pub mod export_record;
