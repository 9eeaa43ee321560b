//! Numbers the events of one job and hands them on.

use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use tracing::warn;

use crate::error::Causes;
use crate::event::{Error, EventSink};
use crate::job::{Completion, Event, Happening, Job};

/// Tells of one job.
pub struct Report<'a> {
    sink: &'a dyn EventSink,
    job: &'a Job,
    sequence: AtomicU64,
}

impl<'a> Report<'a> {
    /// Begins to tell of a job.
    pub fn new(sink: &'a dyn EventSink, job: &'a Job) -> Self {
        Self { sink, job, sequence: AtomicU64::new(0) }
    }

    /// Tells what happens on the way. A job does not fail because nobody could be told how far it is.
    pub(super) async fn tell(&self, happening: Happening) {
        let event = Event {
            job_id: self.job.id,
            operation: self.job.operation(),
            backup_id: self.job.backup_id(),
            volume_id: self.job.volume_id(),
            store: self.job.store.clone(),
            time: Timestamp::now(),
            sequence: self.next(),
            happening,
        };
        if let Err(error) = self.sink.send(&event).await {
            warn!(error = %Causes(&error), "event not told");
        }
    }

    /// Tells how the job ended; that must be known to have been told.
    pub(super) async fn end(&self, completion: &Completion) -> Result<(), Error> {
        let event = Event {
            job_id: completion.job_id,
            operation: completion.operation,
            backup_id: completion.backup_id,
            volume_id: completion.volume_id,
            store: completion.store.clone(),
            time: Timestamp::now(),
            sequence: self.next(),
            happening: Happening::Ended(Box::new(completion.clone())),
        };
        self.sink.send(&event).await
    }

    fn next(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }
}
