//! Backhaul hauls block volumes to a backup store and back, driven by messages of an AMQP broker.
//!
//! `ARCHITECTURE.md` has the plan of the house: each module here is one of its rooms.

pub mod broker;
#[cfg(feature = "ceph")]
pub mod ceph;
pub mod cinder;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod event;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod health;
pub mod job;
pub mod log;
pub mod message;
pub mod runner;
#[cfg(feature = "ceph")]
pub mod stand_in;
pub mod store;
pub mod volume;
pub mod worker;
