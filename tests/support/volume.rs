//! Volumes whose bytes are known, and what Cinder's driver would make of them.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use backhaul::volume::VolumeSource;
use rustix::fs::FallocateFlags;
use sha2::{Digest, Sha256};

/// What a part of a volume is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Something that packs well.
    Text(u8),
    /// Something that does not.
    Noise(u64),
    Zeros,
    Hole,
}

/// A file, and the bytes that it must have.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
    file: File,
}

impl Volume {
    /// A new volume that is one hole.
    pub(crate) fn create(path: PathBuf, bytes: usize) -> Self {
        let file = OpenOptions::new().write(true).create_new(true).open(&path).unwrap();
        file.set_len(bytes as u64).unwrap();
        Self { path, bytes: vec![0; bytes], file }
    }

    pub(crate) fn fill(&mut self, range: Range<usize>, fill: Fill) {
        let bytes = &mut self.bytes[range.clone()];
        match fill {
            Fill::Text(kind) => {
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = b"the quick brown fox "[index % 20].wrapping_add(kind % 5);
                }
            }
            Fill::Noise(seed) => noise(bytes, seed),
            Fill::Zeros | Fill::Hole => bytes.fill(0),
        }
        if fill == Fill::Hole {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, flags, range.start as u64, range.len() as u64).unwrap();
        } else {
            self.file.write_all_at(&self.bytes[range.clone()], range.start as u64).unwrap();
        }
    }
}

/// A volume of so many bytes whose reader dies at one of them.
pub(crate) struct Deadly {
    pub(crate) bytes: u64,
    pub(crate) at: u64,
}

impl VolumeSource for Deadly {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < end).then_some(offset..end))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(!(offset..offset + buffer.len() as u64).contains(&self.at), "as the test wants it");
        buffer.fill(7);
        Ok(())
    }
}

/// A file of noise that has just these bytes.
pub(crate) fn junk(path: &Path, bytes: usize, seed: u64) -> Vec<u8> {
    let mut content = vec![0; bytes];
    noise(&mut content, seed);
    std::fs::write(path, &content).unwrap();
    content
}

/// Fills with bytes that do not pack, by xorshift.
pub(crate) fn noise(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for byte in bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The SHA-256 of each block.
pub(crate) fn hashes(bytes: &[u8], block_bytes: usize) -> Vec<[u8; 32]> {
    bytes.chunks(block_bytes).map(sha256).collect()
}

/// The digest of a volume, from those of its blocks.
pub(crate) fn list_digest(hashes: &[[u8; 32]]) -> String {
    format!("sha256-list:{}", hex::encode(sha256(&hashes.concat())))
}

/// The bytes in blocks of nothing but zeros.
pub(crate) fn zero_block_bytes(bytes: &[u8], block_bytes: usize) -> u64 {
    let zero = |block: &&[u8]| block.iter().all(|byte| *byte == 0);
    bytes.chunks(block_bytes).filter(zero).map(|block| block.len() as u64).sum()
}

/// The parts of the volume that Cinder's driver would store as an object each: all that one read takes, or, with a
/// parent, each run of blocks that differ from its within one read.
pub(crate) fn segments(
    bytes: &[u8],
    block_bytes: usize,
    object_bytes: usize,
    parent: Option<&[[u8; 32]]>,
) -> Vec<Range<usize>> {
    let mut segments = Vec::new();
    for (read_index, read) in bytes.chunks(object_bytes).enumerate() {
        let start = read_index * object_bytes;
        let Some(parent) = parent else {
            segments.push(start..start + read.len());
            continue;
        };
        let mut run: Option<Range<usize>> = None;
        for (index, block) in read.chunks(block_bytes).enumerate() {
            let at = start + index * block_bytes;
            if parent[at / block_bytes] == sha256(block) {
                segments.extend(run.take());
            } else {
                run = Some(run.map_or(at, |run| run.start)..at + block.len());
            }
        }
        segments.extend(run);
    }
    segments
}
