//! Digests of blocks, objects and whole volumes.

use sha2::{Digest as _, Sha256};

/// A SHA-256.
pub type Digest = [u8; 32];
/// An MD5, which Cinder's format wants for each object.
pub type Md5 = [u8; 16];

/// The SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes).into()
}

/// The MD5 of `bytes`.
pub fn md5(bytes: &[u8]) -> Md5 {
    md5::Md5::digest(bytes).into()
}

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Comparing with itself, one byte on, lets memcmp do the work: it is as fast as memory, and ends at the first
    // byte that differs.
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && bytes[..rest.len()] == *rest,
    }
}

/// Digests blocks of a volume, and knows what zeros digest to.
#[derive(Debug, Clone)]
pub struct BlockDigester {
    block_bytes: usize,
    zero: Digest,
}

impl BlockDigester {
    /// Makes one for blocks of `block_bytes`.
    pub fn new(block_bytes: usize) -> Self {
        Self { block_bytes, zero: sha256(&vec![0; block_bytes]) }
    }

    /// The size of all blocks but a volume's last one, which may be shorter.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// The digest of a block, and whether it is all zeros. Blocks of zeros are not hashed.
    pub fn digest(&self, block: &[u8]) -> (Digest, bool) {
        if is_zero(block) { (self.digest_of_zeros(block.len()), true) } else { (sha256(block), false) }
    }

    /// The digest of a block of so many zeros.
    pub fn digest_of_zeros(&self, bytes: usize) -> Digest {
        if bytes == self.block_bytes { self.zero } else { sha256(&vec![0; bytes]) }
    }
}

/// The digest over a volume's block digests, in order.
#[derive(Debug, Clone, Default)]
pub struct ListDigest(Sha256);

impl ListDigest {
    /// Takes the next digests in.
    pub fn update(&mut self, digests: &[Digest]) {
        self.0.update(digests.as_flattened());
    }

    /// The digest as records and events show it.
    pub fn finish(self) -> String {
        format!("sha256-list:{}", hex::encode(self.0.finalize()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_told_from_anything_else() {
        assert!(is_zero(&[]));
        for length in [1, 2, 3, 512, 32768] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for position in [0, length / 2, length - 1] {
                bytes[position] = 1;
                assert!(!is_zero(&bytes), "{length} {position}");
                bytes[position] = 0;
            }
            assert!(!is_zero(&vec![1; length]));
        }
    }

    #[test]
    fn zeros_digest_to_the_constant_that_cinder_stores() {
        let digester = BlockDigester::new(32768);
        assert_eq!(
            hex::encode(digester.digest(&[0; 32768]).0),
            "c35020473aed1b4642cd726cad727b63fff2824ad68cedd7ffb73c7cbd890479"
        );
        assert_eq!(digester.digest(&[0; 100]), (sha256(&[0; 100]), true));
        assert_eq!(digester.digest(&[1; 100]), (sha256(&[1; 100]), false));
    }
}
