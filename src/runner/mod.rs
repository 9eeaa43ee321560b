//! The control flow of a job: which methods, how often, what of it is told, and how it ends.
//!
//! It must not know AMQP, JSON, or any kind of store or volume.

mod places;
mod plan;
mod report;
mod run;

pub use places::{Place, Places};
pub use plan::plan;
pub use report::Report;
pub use run::{Attempts, Ended, Every, refuse, run};
