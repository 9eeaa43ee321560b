//! What Cinder and Backhaul tell each other about backups, in Cinder's words.
//!
//! It must not know how engines work: it turns texts of Cinder into records of ours and back, reads its configuration
//! and is at home in its database.

pub mod conf;
pub mod database;
pub mod export_record;
