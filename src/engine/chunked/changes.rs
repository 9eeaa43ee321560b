//! Which blocks of a volume need not be read, because its source knows that they are as in the parent; and which of
//! these are read all the same, to see whether that is so.

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::ops::Range;

use tracing::warn;

use super::Settings;
use crate::volume::VolumeSource;

/// A source is asked for the changes of so much at once, at most: what it answers must fit in memory.
const WINDOW_BYTES_MAX: usize = 16 << 30;
/// Blocks of a window, at most.
const WINDOW_BLOCKS_MAX: usize = 1 << 20;
/// Blocks that are read all the same in each window, at least, if it has as many.
const CHECKED_BLOCKS_MIN: u64 = 16;

/// What is known of a block before it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Nothing.
    Nothing,
    /// It is as in the parent, and not read.
    Unchanged,
    /// It should be as in the parent. It is looked at, and must have the digest that it has there.
    Checked,
}

/// Finds out, window by window, what is known of a volume's blocks.
pub struct Survey<'a> {
    source: &'a dyn VolumeSource,
    block_bytes: usize,
    check_per_mille: u64,
    /// Whole chunks, so that each lies in one window.
    window_bytes: u64,
    window: Range<u64>,
    blocks: Vec<Known>,
}

impl<'a> Survey<'a> {
    /// Begins at the start of the volume.
    pub fn new(source: &'a dyn VolumeSource, settings: &Settings) -> Self {
        let Settings { object_bytes, sha_block_bytes, unchanged_check_per_mille, .. } = *settings;
        let bytes_max = WINDOW_BYTES_MAX.min(WINDOW_BLOCKS_MAX.saturating_mul(sha_block_bytes));
        Self {
            source,
            block_bytes: sha_block_bytes,
            check_per_mille: unchanged_check_per_mille.into(),
            window_bytes: ((bytes_max / object_bytes).max(1) * object_bytes) as u64,
            window: 0..0,
            blocks: Vec::new(),
        }
    }

    /// What is known of the blocks of the chunk at `offset`; nothing if it is empty. Chunks must be asked for in order.
    pub fn known(&mut self, offset: u64, length: usize) -> Vec<Known> {
        if !self.window.contains(&offset) {
            self.window = offset..self.source.bytes().min(offset + self.window_bytes);
            self.blocks = self.look().unwrap_or_else(|error| {
                warn!(%error, offset, "what has changed cannot be told: everything is read");
                Vec::new()
            });
        }
        if self.blocks.is_empty() {
            return Vec::new();
        }
        let first = self.block(offset);
        self.blocks[first..first + length.div_ceil(self.block_bytes)].to_vec()
    }

    /// The block of the window in which `offset` lies.
    fn block(&self, offset: u64) -> usize {
        (offset - self.window.start) as usize / self.block_bytes
    }

    /// The blocks of the window that a range touches.
    fn touched(&self, range: &Range<u64>) -> Range<usize> {
        self.block(range.start)..self.block(range.end - 1) + 1
    }

    fn look(&self) -> io::Result<Vec<Known>> {
        let Some(changed) = self.source.changed(self.window.clone())? else { return Ok(Vec::new()) };
        let block_count = self.touched(&self.window).len();
        // What is a hole now costs nothing to be compared.
        let mut blocks = vec![Known::Checked; block_count];
        let mut at = self.window.start;
        while let Some(data) = self.source.next_data(at, self.window.end)? {
            blocks[self.touched(&data)].fill(Known::Unchanged);
            at = data.end;
        }
        for range in changed {
            blocks[self.touched(&range)].fill(Known::Nothing);
        }
        check_some(&mut blocks, self.check_per_mille);
        Ok(blocks)
    }
}

/// Chooses blocks at random that are read though they should be unchanged.
fn check_some(blocks: &mut [Known], per_mille: u64) {
    let unchanged = blocks.iter_mut().filter(|block| **block == Known::Unchanged).collect::<Vec<_>>();
    let mut left = unchanged.len() as u64;
    let mut wanted = (left * per_mille).div_ceil(1000).max(CHECKED_BLOCKS_MIN);
    let random = RandomState::new();
    for block in unchanged {
        if random.hash_one(left) % left < wanted {
            *block = Known::Checked;
            wanted -= 1;
        }
        left -= 1;
    }
}

/// The parts of a chunk that are to be read, as far as they are no holes.
pub fn to_read(known: &[Known], length: usize, block_bytes: usize) -> Vec<Range<usize>> {
    if known.is_empty() {
        return std::iter::once(0..length).collect();
    }
    let mut first = 0;
    let runs = known.chunk_by(|a, b| (*a == Known::Unchanged) == (*b == Known::Unchanged)).map(|run| {
        let blocks = first..first + run.len();
        first = blocks.end;
        (run[0] != Known::Unchanged).then(|| blocks.start * block_bytes..length.min(blocks.end * block_bytes))
    });
    runs.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_unchanged_blocks_is_checked_and_never_less_than_the_least_number() {
        for (count, per_mille, expected) in
            [(0, 1, 0), (3, 1000, 3), (16, 0, 16), (1000, 0, 16), (20_000, 1, 20), (100_001, 10, 1001)]
        {
            let mut blocks = vec![Known::Nothing, Known::Checked];
            blocks.resize(2 + count, Known::Unchanged);
            check_some(&mut blocks, per_mille);
            assert_eq!(blocks[..2], [Known::Nothing, Known::Checked]);
            let checked = blocks[2..].iter().filter(|block| **block == Known::Checked).count();
            assert_eq!(checked, expected, "{count} {per_mille}");
        }
    }

    #[test]
    fn every_block_is_checked_as_often_as_any_other() {
        let mut often = [0_u32; 100];
        for _ in 0..2000 {
            let mut blocks = [Known::Unchanged; 100];
            check_some(&mut blocks, 0);
            for (often, block) in often.iter_mut().zip(blocks) {
                *often += u32::from(block == Known::Checked);
            }
        }
        // 320 is what is expected, with a standard deviation of 16.
        assert!(often.iter().all(|often| (200..440).contains(often)), "{often:?}");
    }

    #[test]
    fn only_what_is_not_known_to_be_unchanged_is_read() {
        use Known::{Checked, Nothing, Unchanged};
        let bounds = |known: &[Known]| -> Vec<(usize, usize)> {
            to_read(known, 25, 10).into_iter().map(|range| (range.start, range.end)).collect()
        };
        assert_eq!(bounds(&[]), [(0, 25)]);
        assert_eq!(bounds(&[Unchanged, Unchanged, Unchanged]), []);
        assert_eq!(bounds(&[Unchanged, Checked, Nothing]), [(10, 25)]);
        assert_eq!(bounds(&[Nothing, Unchanged, Nothing]), [(0, 10), (20, 25)]);
    }
}
