//! How fast jobs may move bytes: a limit for each job, and one for all jobs of a worker together.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

/// How much of a pause is made up for that was longer than it should have been. What is not used for longer is lost, so that
/// nothing comes in bursts.
const LATE_MAX: Duration = Duration::from_millis(100);

/// Lets so many bytes a second pass, without a limit any number of them.
#[derive(Debug, Default)]
pub struct Limit {
    bytes_per_second: Option<NonZeroU64>,
    /// When as much time has gone by as what has passed needs.
    due: Mutex<Option<Instant>>,
}

impl Limit {
    /// Makes a limit; none lets everything pass.
    pub fn new(bytes_per_second_max: Option<NonZeroU64>) -> Self {
        Self { bytes_per_second: bytes_per_second_max, due: Mutex::default() }
    }

    /// Waits until `bytes` may pass. They may do so at once if what has passed before is due: what comes after them waits.
    /// Who stops waiting has taken nothing.
    async fn pass(&self, bytes: u64) {
        let Some(bytes_per_second) = self.bytes_per_second else { return };
        let mut due = self.due.lock().await;
        if let Some(due) = *due {
            sleep_until(due).await;
        }
        let now = Instant::now();
        let earliest = now.checked_sub(LATE_MAX).unwrap_or(now);
        let from = due.map_or(now, |due| due.max(earliest));
        *due = Some(from + Duration::from_secs_f64(bytes as f64 / bytes_per_second.get() as f64));
    }
}

/// The limits that a job keeps to.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    of_job: Arc<Limit>,
    of_all: Arc<Limit>,
    /// One of a job waits at a time, so that a job that moves many pieces side by side has no more of what all share.
    one: Arc<Mutex<()>>,
}

impl Pace {
    /// A pace for one job, with the limit that all share.
    pub fn new(of_job: Limit, of_all: Arc<Limit>) -> Self {
        Self { of_job: Arc::new(of_job), of_all, one: Arc::default() }
    }

    /// Whether there is any limit.
    pub fn is_limited(&self) -> bool {
        self.of_job.bytes_per_second.is_some() || self.of_all.bytes_per_second.is_some()
    }

    /// Waits until `bytes` may be moved.
    pub(super) async fn pass(&self, bytes: u64) {
        if self.is_limited() {
            let _one = self.one.lock().await;
            self.of_job.pass(bytes).await;
            self.of_all.pass(bytes).await;
        }
    }
}
