//! How an object's bytes are packed, in ways that Cinder's reader takes.
//!
//! What it takes is narrower than what the formats allow: one zlib stream and not several, zstd frames that say their
//! content's size, whole objects in one call.

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::str::FromStr;

/// The level of Cinder's writer, which has python-zstd's default.
pub const ZSTD_LEVEL: i32 = 3;
/// Cinder's writer has zlib's default level.
const ZLIB_LEVEL: i32 = 6;

/// How an object's bytes are packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// One zlib stream (RFC 1950).
    Zlib,
    /// bzip2 at level 9.
    Bz2,
    /// A zstd frame with its content's size.
    #[default]
    Zstd,
}

impl Compression {
    /// The word of the configuration and of the metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Bz2 => "bz2",
            Self::Zstd => "zstd",
        }
    }

    /// What runs of zeros are packed with: always something, so that an empty chunk takes next to no space. bzip2
    /// makes 81 bytes of 50 MiB of zeros, zlib 51 kB; and Cinder reads it without any module from outside.
    pub fn of_zeros(self) -> Self {
        match self {
            Self::Zstd => Self::Zstd,
            Self::None | Self::Zlib | Self::Bz2 => Self::Bz2,
        }
    }

    /// Packs `bytes`, with zstd at this level; none when that does not make them fewer, in which case they are stored as
    /// they are.
    pub fn compress(self, bytes: &[u8], level: i32) -> io::Result<Option<Vec<u8>>> {
        let packed = match self {
            Self::None => return Ok(None),
            Self::Zlib => {
                let level = libdeflater::CompressionLvl::new(ZLIB_LEVEL)
                    .map_err(|_| io::Error::other("zlib refuses its own default level"))?;
                let mut compressor = libdeflater::Compressor::new(level);
                let mut packed = vec![0; compressor.zlib_compress_bound(bytes.len())];
                let length = compressor.zlib_compress(bytes, &mut packed).map_err(io::Error::other)?;
                packed.truncate(length);
                packed
            }
            Self::Bz2 => {
                let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
                encoder.write_all(bytes)?;
                encoder.finish()?
            }
            Self::Zstd => zstd::bulk::compress(bytes, level)?,
        };
        Ok(Some(packed).filter(|packed| packed.len() < bytes.len()))
    }

    /// Unpacks what `stored` gives. What follows the packed bytes is left unread.
    pub fn decompress<'a>(self, stored: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(stored),
            Self::Zlib => {
                Box::new(flate2::bufread::ZlibDecoder::new(BufReader::with_capacity(1 << 17, stored)))
            }
            Self::Bz2 => Box::new(bzip2::read::MultiBzDecoder::new(stored)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::new(stored)?),
        })
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Says that a word names no compression.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no compression: write none, zlib, bz2 or zstd")]
pub struct UnknownCompression(String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    /// Takes every word that Cinder's configuration allows, since it stores the word as it was configured. Its
    /// `gzip` is zlib all the same.
    fn from_str(word: &str) -> Result<Self, UnknownCompression> {
        match word.to_ascii_lowercase().as_str() {
            "none" | "off" | "no" => Ok(Self::None),
            "zlib" | "gzip" => Ok(Self::Zlib),
            "bz2" | "bzip2" => Ok(Self::Bz2),
            "zstd" => Ok(Self::Zstd),
            _ => Err(UnknownCompression(word.chars().take(40).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Compression; 4] = [Compression::None, Compression::Zlib, Compression::Bz2, Compression::Zstd];

    #[test]
    fn what_is_packed_is_unpacked() {
        let text: Vec<u8> = (0..200_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for compression in ALL {
            let packed = compression.compress(&text, ZSTD_LEVEL).unwrap().unwrap_or_else(|| text.clone());
            let mut unpacked = Vec::new();
            compression.decompress(&packed[..]).unwrap().read_to_end(&mut unpacked).unwrap();
            assert!(unpacked == text, "{compression}");
            assert_eq!(packed.len() < text.len(), compression != Compression::None);
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_not_packed() {
        for compression in ALL {
            assert_eq!(compression.compress(b"abc", ZSTD_LEVEL).unwrap(), None, "{compression}");
        }
    }

    #[test]
    fn a_zstd_frame_says_its_size_or_cinder_could_not_read_it() {
        for level in 1..=9 {
            let packed = Compression::Zstd.compress(&[0; 100_000], level).unwrap().unwrap();
            assert_eq!(zstd::zstd_safe::get_frame_content_size(&packed).unwrap(), Some(100_000), "{level}");
        }
    }

    #[test]
    fn an_empty_chunk_is_tiny_in_every_store() {
        for compression in ALL {
            let packed = compression.of_zeros().compress(&vec![0; 52_428_800], ZSTD_LEVEL).unwrap().unwrap();
            assert!(packed.len() < 8192, "{compression}: {}", packed.len());
        }
    }
}
