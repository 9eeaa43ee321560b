//! Reads an object of the store on a thread that may block, and takes the measure of what it reads.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use crate::store::{self, Pieces};

/// What an object in the store was when it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// Its size in the store.
    pub bytes: u64,
    /// CRC-32 of its bytes in the store. Cinder's MD5 says what they unpack to, not that they are the same ones.
    pub crc32: u32,
}

impl Checksum {
    /// Takes the measure of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, crc32: crc32fast::hash(bytes) }
    }
}

/// Reads an object as it is in the store.
pub struct StoredReader {
    pieces: Pieces,
    current: Bytes,
    bytes: u64,
    crc32: crc32fast::Hasher,
    error: Option<store::Error>,
}

impl StoredReader {
    /// Reads and counts.
    pub fn new(pieces: Pieces) -> Self {
        let crc32 = crc32fast::Hasher::new();
        Self { pieces, current: Bytes::new(), bytes: 0, crc32, error: None }
    }

    /// The error of the store that ended the reading, where one did.
    pub fn take_error(&mut self) -> Option<store::Error> {
        self.error.take()
    }

    /// Reads to the end, and returns how many bytes that were.
    pub fn drain(&mut self) -> io::Result<u64> {
        io::copy(self, &mut io::sink())
    }

    /// The measure of what was read.
    pub fn checksum(&self) -> Checksum {
        Checksum { bytes: self.bytes, crc32: self.crc32.clone().finalize() }
    }
}

impl Read for StoredReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.next_blocking() {
                None => return Ok(0),
                Some(Ok(piece)) => {
                    self.bytes += piece.len() as u64;
                    self.crc32.update(&piece);
                    self.current = piece;
                }
                Some(Err(error)) => {
                    self.error = Some(error.clone());
                    return Err(io::Error::other(error));
                }
            }
        }
        let length = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// Reads an object as it is in the store, and takes its SHA-256.
pub struct HashedReader {
    stored: StoredReader,
    sha256: Sha256,
}

impl HashedReader {
    /// Reads and digests.
    pub fn new(pieces: Pieces) -> Self {
        Self { stored: StoredReader::new(pieces), sha256: Sha256::new() }
    }

    /// The error of the store that ended the reading, where one did.
    pub fn take_error(&mut self) -> Option<store::Error> {
        self.stored.take_error()
    }

    /// The SHA-256 of what was read.
    pub fn sha256(&self) -> Digest {
        self.sha256.clone().finalize().into()
    }
}

impl Read for HashedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stored.read(buffer)?;
        self.sha256.update(&buffer[..read]);
        Ok(read)
    }
}
