//! How far a restore is: which objects are written, and the note of that, which its target keeps for an attempt that goes on
//! where this one stops.
//!
//! The objects of a chain come in the same order for each attempt, which is that of `layers.rs`; a version of ours with
//! another order must not go by these notes. A note tells how many of the objects, from the first one on, are checked, written
//! and flushed; with those that lie behind them the next attempt begins.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::info;

use super::Error;
use super::digest::sha256;
use crate::engine::cpu::blocking;
use crate::job::{Context, Counts, Record};
use crate::volume::VolumeTarget;

/// A note.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    /// The SHA-256 over the object prefixes of the chain.
    chain: String,
    object_count: u64,
    counts: Counts,
}

/// The objects of a restore that are written.
pub struct Restored {
    chain: String,
    /// How many there are from the first on without a gap, and what was counted of them.
    object_count: u64,
    counts: Counts,
    /// Those behind the first gap.
    ahead: BTreeMap<u64, Counts>,
    /// What was read at the last note.
    noted_bytes: u64,
}

impl Restored {
    /// What the note of an attempt before this one says; nothing if there is none of this chain.
    pub fn of(ctx: &Context, target: &dyn VolumeTarget, chain: &[Record]) -> Self {
        let prefixes: Vec<&str> = chain.iter().map(|record| record.service_metadata.as_str()).collect();
        let digest = hex::encode(sha256(prefixes.join("\n").as_bytes()));
        let note = target.note().and_then(|note| serde_json::from_str::<Note>(note).ok());
        let (mut object_count, mut counts) = (0, Counts::default());
        if let Some(note) =
            note.filter(|note| note.chain == digest && note.counts.bytes_read <= chain[0].volume_bytes)
        {
            (object_count, counts) = (note.object_count, note.counts);
            counts.bytes_reused = counts.bytes_read;
            info!(bytes = counts.bytes_read, "going on where an attempt before this one stopped");
            ctx.progress.add(&counts);
            ctx.progress.done(counts.bytes_read);
        }
        let noted_bytes = counts.bytes_read;
        Self { chain: digest, object_count, counts, ahead: BTreeMap::new(), noted_bytes }
    }

    /// How many objects there are from the first on without a gap.
    pub fn object_count(&self) -> u64 {
        self.object_count
    }

    /// How much of the volume they hold.
    pub fn bytes(&self) -> u64 {
        self.counts.bytes_read
    }

    /// Takes in that the object of this number, counted from 0, is written.
    pub fn add(&mut self, number: u64, counts: Counts) {
        self.ahead.insert(number, counts);
        while let Some(counts) = self.ahead.remove(&self.object_count) {
            self.counts.add(&counts);
            self.object_count += 1;
        }
    }

    /// Has the target keep a note if there is more than `checkpoint_bytes` of the volume to be told of.
    pub async fn keep(&mut self, target: &Arc<dyn VolumeTarget>, checkpoint_bytes: u64) -> Result<(), Error> {
        if self.counts.bytes_read - self.noted_bytes < checkpoint_bytes {
            return Ok(());
        }
        let offset = self.counts.bytes_read;
        let failed = |source| Error::WriteVolume { offset, source };
        let note = Note { chain: self.chain.clone(), object_count: self.object_count, counts: self.counts };
        let note = serde_json::to_string(&note).map_err(|error| failed(error.into()))?;
        let target = target.clone();
        blocking(move || target.keep_note(&note)).await?.map_err(failed)?;
        self.noted_bytes = self.counts.bytes_read;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_not_noted_before_all_in_front_of_it_are_written() {
        let (chain, counts) = (String::new(), Counts::default());
        let mut restored =
            Restored { chain, object_count: 0, counts, ahead: BTreeMap::new(), noted_bytes: 0 };
        let told = [2, 1, 4, 0, 3].map(|number| {
            restored.add(number, Counts { bytes_read: 10 + number, ..Counts::default() });
            (restored.object_count(), restored.bytes())
        });
        assert_eq!(told, [(0, 0), (0, 0), (0, 0), (3, 33), (5, 60)]);
    }
}
