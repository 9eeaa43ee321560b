//! Where the news of a job goes.
//!
//! A sink knows how news is told; it must not know engines, or what the news means.

mod native;

pub use native::{Native, reply};

use async_trait::async_trait;

use crate::job::Event;

/// Why an event could not be told.
#[derive(Debug, thiserror::Error)]
#[error("tell that the job {what}")]
pub struct Error {
    /// What happened to the job.
    pub what: &'static str,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Takes the events of one job.
#[async_trait]
pub trait EventSink: Send + Sync {
    /// Tells an event. When this returns, it is safe with whoever passes it on; after an error it may be told or not.
    async fn send(&self, event: &Event) -> Result<(), Error>;
}
