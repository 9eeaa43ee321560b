//! One limit for the memory of all the jobs of a worker.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Memory is counted in pieces of this size, because a semaphore counts in 32 bits.
const UNIT_BYTES: usize = 4096;

/// Hands out memory up to a limit; who asks for more waits.
///
/// Whoever holds some never asks for more before it has given that back, so that nobody waits for ever.
#[derive(Debug, Clone)]
pub struct Budget {
    units: Arc<Semaphore>,
    units_max: u32,
}

/// A part of the budget; dropping it gives it back.
#[derive(Debug)]
pub struct Reserved(Option<OwnedSemaphorePermit>);

impl Budget {
    /// Makes a budget of `bytes_max`.
    pub fn new(bytes_max: usize) -> Self {
        let units_max = u32::try_from(bytes_max / UNIT_BYTES).unwrap_or(u32::MAX).max(1);
        // A semaphore has at most usize::MAX >> 3 permits, more than what fits in 32 bits.
        Self { units: Arc::new(Semaphore::new(units_max as usize)), units_max }
    }

    /// Waits for `bytes`. A request for more than there is at all gets all there is: it waits until it is alone.
    pub async fn reserve(&self, bytes: usize) -> Reserved {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).min(self.units_max);
        // It fails only on a closed semaphore, and this one is never closed.
        Reserved(self.units.clone().acquire_many_owned(units).await.ok())
    }
}

impl Reserved {
    /// Splits off `bytes`, or as much as there is.
    pub fn split(&mut self, bytes: usize) -> Self {
        let units = bytes.div_ceil(UNIT_BYTES);
        Self(self.0.as_mut().and_then(|permit| permit.split(units.min(permit.num_permits()))))
    }

    /// Ties the reservation to `bytes`: it is given back when the last view of them is gone.
    pub fn hold(self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Held { bytes, _reserved: self })
    }
}

struct Held {
    bytes: Vec<u8>,
    _reserved: Reserved,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
