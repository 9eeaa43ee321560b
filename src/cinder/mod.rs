//! What Cinder and Backhaul tell each other about backups, in Cinder's words: its configuration, its database, its records, and
//! the calls between its services.
//!
//! It must not know how engines work.

pub mod conf;
pub mod database;
pub mod export_record;
pub mod notifications;
pub mod rpc;
pub mod scheduler;
pub mod volumes;
