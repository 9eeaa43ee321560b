//! What an engine gets besides its work: a way to be stopped, and a place to count.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Counts, Pace};
use crate::error::Problem;

/// Says that somebody asked for the end of the job.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the job was cancelled")]
pub struct Cancelled;

/// What an engine gets besides its work.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// Fires when the job is to end; engines look at it between chunks.
    pub cancel: CancellationToken,
    /// Fires before `cancel` when the job is only to stop, for another worker to go on with.
    pub hand_back: CancellationToken,
    /// How fast the job may be.
    pub pace: Pace,
    /// Where engines count what they do.
    pub progress: Arc<Progress>,
    /// Why the job is not done by the method that was planned first.
    pub fallback_reason: Option<Problem>,
    /// What tells this run of the job from others.
    pub hold: Hold,
}

/// What tells a run of a job from others that workers may be at: each was handed the same message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hold {
    /// The claim that it has left in the store; none if its message was never out before.
    pub claim: Option<Uuid>,
    /// How often people had brought the job back before.
    pub revival_count: u32,
}

impl Context {
    /// Fails when the job is to end.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.cancel.is_cancelled() { Err(Cancelled) } else { Ok(()) }
    }

    /// Waits until `bytes` of a volume may be moved; fails when the job is to end.
    pub async fn pace(&self, bytes: u64) -> Result<(), Cancelled> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(Cancelled),
            () = self.pace.pass(bytes) => Ok(()),
        }
    }
}

/// Counts of a running attempt, which may be read at any time.
#[derive(Debug, Default)]
pub struct Progress {
    bytes_total: AtomicU64,
    bytes_done: AtomicU64,
    bytes_read: AtomicU64,
    bytes_zero: AtomicU64,
    bytes_hole: AtomicU64,
    bytes_unchanged: AtomicU64,
    bytes_reused: AtomicU64,
    bytes_stored: AtomicU64,
    bytes_written: AtomicU64,
    object_count: AtomicU64,
    target_unfinished: AtomicBool,
}

/// How far an attempt is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// What there is to do; 0 while it is not known.
    pub bytes_total: u64,
    /// What is done of it.
    pub bytes_done: u64,
    /// What was moved for it.
    pub counts: Counts,
}

impl Progress {
    /// Begins an attempt over `bytes_total`; counts of an earlier attempt are forgotten.
    pub fn begin(&self, bytes_total: u64) {
        self.bytes_done.store(0, Ordering::Relaxed);
        for counter in [
            &self.bytes_read,
            &self.bytes_zero,
            &self.bytes_hole,
            &self.bytes_unchanged,
            &self.bytes_reused,
            &self.bytes_stored,
            &self.bytes_written,
            &self.object_count,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
        self.bytes_total.store(bytes_total, Ordering::Relaxed);
    }

    /// Notes that a volume which was there before was written to, and holds only a part of what it was to hold. No later attempt
    /// changes that, unless it succeeds.
    pub fn leave_target_unfinished(&self) {
        self.target_unfinished.store(true, Ordering::Relaxed);
    }

    /// Whether that was noted.
    pub fn is_target_unfinished(&self) -> bool {
        self.target_unfinished.load(Ordering::Relaxed)
    }

    /// Counts `bytes` of the total as done.
    pub fn done(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds to the counts.
    pub fn add(&self, counts: &Counts) {
        self.bytes_read.fetch_add(counts.bytes_read, Ordering::Relaxed);
        self.bytes_zero.fetch_add(counts.bytes_zero, Ordering::Relaxed);
        self.bytes_hole.fetch_add(counts.bytes_hole, Ordering::Relaxed);
        self.bytes_unchanged.fetch_add(counts.bytes_unchanged, Ordering::Relaxed);
        self.bytes_reused.fetch_add(counts.bytes_reused, Ordering::Relaxed);
        self.bytes_stored.fetch_add(counts.bytes_stored, Ordering::Relaxed);
        self.bytes_written.fetch_add(counts.bytes_written, Ordering::Relaxed);
        self.object_count.fetch_add(counts.object_count, Ordering::Relaxed);
    }

    /// How far it is now.
    pub fn read(&self) -> Reading {
        Reading {
            bytes_total: self.bytes_total.load(Ordering::Relaxed),
            bytes_done: self.bytes_done.load(Ordering::Relaxed),
            counts: Counts {
                bytes_read: self.bytes_read.load(Ordering::Relaxed),
                bytes_zero: self.bytes_zero.load(Ordering::Relaxed),
                bytes_hole: self.bytes_hole.load(Ordering::Relaxed),
                bytes_unchanged: self.bytes_unchanged.load(Ordering::Relaxed),
                bytes_reused: self.bytes_reused.load(Ordering::Relaxed),
                bytes_stored: self.bytes_stored.load(Ordering::Relaxed),
                bytes_written: self.bytes_written.load(Ordering::Relaxed),
                object_count: self.object_count.load(Ordering::Relaxed),
            },
        }
    }
}
