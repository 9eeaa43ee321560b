//! Threads for work that keeps a core busy, away from the async executor.

use std::sync::Arc;

use rayon_core::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use tokio::sync::oneshot;

/// A fixed number of threads, shared by all jobs.
#[derive(Debug, Clone)]
pub struct Cpu {
    pool: Arc<ThreadPool>,
}

/// Says that a piece of work panicked.
#[derive(Debug, thiserror::Error)]
#[error("a CPU thread gave no answer: this is a bug in backhaul, please report it with the log")]
pub struct Lost;

impl Cpu {
    /// Starts `threads` threads.
    pub fn start(threads: usize) -> Result<Self, ThreadPoolBuildError> {
        let name = |index| format!("cpu-{index}");
        // A panic is told to whoever waits for the answer; the others' work goes on.
        let pool =
            ThreadPoolBuilder::new().num_threads(threads).thread_name(name).panic_handler(drop).build()?;
        Ok(Self { pool: Arc::new(pool) })
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` on one of the threads, when one is free.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Lost> {
        let (sender, answer) = oneshot::channel();
        self.pool.spawn(move || {
            // Nobody listens any more when the job was cancelled meanwhile.
            sender.send(work()).ok();
        });
        answer.await.map_err(|_| Lost)
    }
}

/// Runs `work` on a thread that may block.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Lost> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Lost)
}
