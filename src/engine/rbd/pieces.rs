//! Cuts what is to be copied into pieces that can be read, digested and written side by side.

use std::ops::Range;

use crate::ceph::Extent;

/// The size of the blocks that have a digest each.
pub const BLOCK_BYTES: u64 = 64 << 10;
/// A piece is read at once, and never longer; it is what an object of an image usually has.
const PIECE_BYTES_MAX: u64 = 4 << 20;
/// A piece that is known to be zeros is not read, and may be longer.
const ZERO_PIECE_BYTES_MAX: u64 = 1 << 30;
/// Zeros are found in pieces of this size, which is what Ceph itself has no finer.
const GRAIN_BYTES: u64 = 4 << 10;
/// Fewer zeros than this between data are written with it: one write is quicker than two.
const GAP_BYTES_MAX: u64 = 32 << 10;

/// A range of whole blocks (but for the volume's last one), with what of it is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// What is read and digested.
    pub range: Range<u64>,
    /// What of it is to be written, in order.
    pub wanted: Vec<Range<u64>>,
    /// Whether all of it is known to be zeros, so that it need not be read.
    pub zero: bool,
}

/// A run of bytes that are all zeros, or that are not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Which bytes of the volume.
    pub range: Range<u64>,
    /// Whether all of them are zero.
    pub zero: bool,
}

/// Cuts the extents, which must be in order and apart from each other, of a volume of `volume_bytes`. A block that is
/// touched belongs to one piece only.
pub fn pieces(extents: &[Extent], volume_bytes: u64) -> Vec<Piece> {
    let floor = |at: u64| at / BLOCK_BYTES * BLOCK_BYTES;
    let ceil = |at: u64| at.next_multiple_of(BLOCK_BYTES).min(volume_bytes);
    let mut groups: Vec<Piece> = Vec::new();
    let mut add = |range: Range<u64>, zero: bool| {
        if range.is_empty() {
            return;
        }
        let blocks = floor(range.start)..ceil(range.end);
        match groups.last_mut() {
            // Blocks of zeros are whole, so only pieces that are read share a block.
            Some(last) if blocks.start < last.range.end => {
                last.range.end = last.range.end.max(blocks.end);
                last.wanted.push(range);
            }
            _ => groups.push(Piece { range: blocks, wanted: vec![range], zero }),
        }
    };
    for extent in extents {
        let end = extent.end().min(volume_bytes);
        let whole = match extent.exists {
            true => end..end,
            false => ceil(extent.offset).min(end)..if end == volume_bytes { end } else { floor(end) },
        };
        if whole.is_empty() {
            add(extent.offset..end, false);
        } else {
            add(extent.offset..whole.start, false);
            add(whole.clone(), true);
            add(whole.end..end, false);
        }
    }
    groups.into_iter().flat_map(cut).collect()
}

fn cut(group: Piece) -> Vec<Piece> {
    let step = if group.zero { ZERO_PIECE_BYTES_MAX } else { PIECE_BYTES_MAX };
    let mut pieces = Vec::new();
    let mut start = group.range.start;
    while start < group.range.end {
        let end = (start / step * step + step).min(group.range.end);
        let clip = |range: &Range<u64>| range.start.max(start)..range.end.min(end);
        let wanted = group.wanted.iter().map(clip).filter(|range| !range.is_empty()).collect();
        pieces.push(Piece { range: start..end, wanted, zero: group.zero });
        start = end;
    }
    pieces
}

/// Finds the runs of data and of zeros in `bytes`, which are those of the volume from `start` on, within `wanted`.
pub fn runs(bytes: &[u8], start: u64, wanted: &[Range<u64>]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for range in wanted {
        let first = runs.len();
        let mut at = range.start;
        while at < range.end {
            let end = (at / GRAIN_BYTES * GRAIN_BYTES + GRAIN_BYTES).min(range.end);
            let zero = crate::engine::chunked::digest::is_zero(
                &bytes[(at - start) as usize..(end - start) as usize],
            );
            match runs[first..].last_mut() {
                Some(last) if last.zero == zero => last.range.end = end,
                _ => runs.push(Run { range: at..end, zero }),
            }
            at = end;
        }
        join_over_small_gaps(&mut runs, first);
    }
    runs
}

/// Makes one run of two runs of data with few zeros between them.
fn join_over_small_gaps(runs: &mut Vec<Run>, first: usize) {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs.drain(first..) {
        let length = |run: &Run| run.range.end - run.range.start;
        match &mut joined[..] {
            [.., before, gap] if !run.zero && gap.zero && length(gap) <= GAP_BYTES_MAX => {
                before.range.end = run.range.end;
                joined.pop();
            }
            _ => joined.push(run),
        }
    }
    runs.append(&mut joined);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = BLOCK_BYTES;

    fn extent(range: Range<u64>, exists: bool) -> Extent {
        Extent { offset: range.start, length: range.end - range.start, exists }
    }

    #[test]
    fn a_piece_has_whole_blocks_and_no_block_is_in_two() {
        let extents = [
            extent(10..20, true),
            extent(BLOCK - 5..BLOCK + 5, true),
            extent(3 * BLOCK..3 * BLOCK + 1, true),
        ];
        let last = 3 * BLOCK..3 * BLOCK + 1;
        assert_eq!(
            pieces(&extents, 3 * BLOCK + 7),
            [
                Piece { range: 0..2 * BLOCK, wanted: vec![10..20, BLOCK - 5..BLOCK + 5], zero: false },
                Piece { range: 3 * BLOCK..3 * BLOCK + 7, wanted: Vec::from([last]), zero: false },
            ]
        );
    }

    #[test]
    fn what_is_gone_is_not_read_but_at_its_ends() {
        let pieces = pieces(&[extent(10..4 * BLOCK + 10, false)], 100 * BLOCK);
        assert_eq!(
            pieces.iter().map(|piece| (piece.range.clone(), piece.zero)).collect::<Vec<_>>(),
            [(0..BLOCK, false), (BLOCK..4 * BLOCK, true), (4 * BLOCK..5 * BLOCK, false)]
        );
    }

    #[test]
    fn runs_of_data_are_written_together_over_few_zeros() {
        let mut bytes = vec![0; 256 << 10];
        for at in [0, 8 << 10, 100 << 10] {
            bytes[at] = 1;
        }
        let end = 256 << 10;
        let run = |range, zero| Run { range, zero };
        let (data, rest) = (run(0..12 << 10, false), 12 << 10..100 << 10);
        let wanted = 0..end;
        assert_eq!(
            runs(&bytes, 0, std::slice::from_ref(&wanted)),
            [data, run(rest, true), run(100 << 10..104 << 10, false), run(104 << 10..end, true)]
        );
    }

    proptest! {
        #[test]
        fn pieces_cover_what_is_wanted_exactly(
            gaps in prop::collection::vec((1_u64..400_000, 1_u64..400_000, any::<bool>()), 0..40),
            cut_bytes in 0_u64..300_000,
        ) {
            let mut extents = Vec::new();
            let mut at = 0;
            for (gap, length, exists) in gaps {
                extents.push(extent(at + gap..at + gap + length, exists));
                at += gap + length;
            }
            let volume_bytes = (at + 1).saturating_sub(cut_bytes).max(1);
            let extents: Vec<Extent> = extents.into_iter().filter(|e| e.offset < volume_bytes).collect();
            let pieces = pieces(&extents, volume_bytes);
            let mut covered = vec![0_u8; volume_bytes as usize];
            let mut end = 0;
            for piece in &pieces {
                prop_assert!(piece.range.start >= end, "{:?}", piece);
                end = piece.range.end;
                prop_assert!(piece.range.start.is_multiple_of(BLOCK));
                prop_assert!(end.is_multiple_of(BLOCK) || end == volume_bytes);
                prop_assert!(!piece.wanted.is_empty());
                for wanted in &piece.wanted {
                    prop_assert!(piece.range.start <= wanted.start && wanted.end <= end);
                    for byte in &mut covered[wanted.start as usize..wanted.end as usize] { *byte += 1; }
                }
            }
            let mut expected = vec![0_u8; volume_bytes as usize];
            for extent in &extents {
                for byte in &mut expected[extent.offset as usize..extent.end().min(volume_bytes) as usize] { *byte = 1; }
            }
            prop_assert!(covered == expected);
            // What is taken to be zeros lies in extents that are gone.
            for piece in pieces.iter().filter(|piece| piece.zero) {
                prop_assert!(extents.iter().any(|e| !e.exists && e.offset <= piece.range.start && piece.range.end <= e.end()));
            }
        }

        #[test]
        fn runs_cover_what_is_wanted_and_no_data_is_taken_for_zeros(
            data in prop::collection::vec((0_usize..300_000, 1_usize..9000), 0..20),
            wanted in prop::collection::vec((0_u64..100_000, 1_u64..100_000), 1..4),
            start in 0_u64..10,
        ) {
            let start = start * GRAIN_BYTES;
            let mut bytes = vec![0_u8; 600_000];
            for (at, length) in data { bytes[at..at + length].fill(1); }
            let mut at = start;
            let wanted: Vec<Range<u64>> = wanted.into_iter().map(|(gap, length)| {
                let range = at + gap..at + gap + length;
                at = range.end;
                range
            }).collect();
            let runs = runs(&bytes, start, &wanted);
            let mut covered = vec![false; bytes.len()];
            for run in &runs {
                let range = (run.range.start - start) as usize..(run.range.end - start) as usize;
                prop_assert!(!run.zero || bytes[range.clone()].iter().all(|byte| *byte == 0));
                for byte in &mut covered[range] { prop_assert!(!*byte); *byte = true; }
            }
            let mut expected = vec![false; bytes.len()];
            for range in &wanted { expected[(range.start - start) as usize..(range.end - start) as usize].fill(true); }
            prop_assert!(covered == expected);
        }
    }
}
