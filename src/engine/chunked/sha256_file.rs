//! Cinder's list of block digests, `<prefix>_sha256file`: one SHA-256 for each block of the whole volume.
//!
//! JSON with sorted keys, indented by two. 1 TiB has 33.5 million digests, which make 2.4 GB of text, so it is written
//! and read as a stream.

use std::fmt;
use std::io::Read;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::digest::Digest;
use super::metadata::{Allowance, VERSION, json_text, python_time};
use crate::job::Record;

/// Digests that are handed over at a time, at most.
pub const BATCH_DIGESTS: usize = 4096;
/// Text that a digest takes, with what separates it from the next one.
pub const DIGEST_LINE_BYTES: usize = 72;

/// What stands before the digests.
pub fn head(record: &Record, block_bytes: usize) -> String {
    format!(
        "{{\n  \"backup_description\": {},\n  \"backup_id\": \"{}\",\n  \"backup_name\": {},\n  \"chunk_size\": \
         {block_bytes},\n  \"created_at\": \"{}\",\n  \"sha256s\": [",
        json_text(record.description.as_deref()),
        record.backup_id,
        json_text(record.name.as_deref()),
        python_time(record.created_at),
    )
}

/// Some digests, with the comma before them where they are not the first ones.
pub fn digests(digests: &[Digest], first: bool) -> Vec<u8> {
    let mut text = Vec::with_capacity(digests.len() * DIGEST_LINE_BYTES);
    for (index, digest) in digests.iter().enumerate() {
        text.extend_from_slice(if first && index == 0 { b"\n    \"" } else { b",\n    \"" });
        let mut line = [0; 64];
        // 32 bytes always fit 64 digits.
        hex::encode_to_slice(digest, &mut line).ok();
        text.extend_from_slice(&line);
        text.push(b'"');
    }
    text
}

/// What stands behind the digests.
pub fn tail(record: &Record, any_digests: bool) -> String {
    format!(
        "{}],\n  \"version\": \"{VERSION}\",\n  \"volume_id\": \"{}\"\n}}",
        if any_digests { "\n  " } else { "" },
        record.volume_id
    )
}

/// What a sha256 file says besides its digests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// The version of the format.
    pub version: String,
    /// The backup, as text.
    pub backup_id: String,
}

/// Reads a sha256 file, and hands over its digests in batches together with the size of their blocks. Whatever
/// `take` returns as an error ends the reading, as an error with the same text.
pub fn read<E: fmt::Display>(
    reader: impl Read,
    take: impl FnMut(u64, Vec<Digest>) -> Result<(), E>,
) -> Result<Head, serde_json::Error> {
    let allowance = Allowance::new();
    let mut json = serde_json::Deserializer::from_reader(allowance.bound(reader));
    let head = json.deserialize_map(HeadVisitor { take, allowance: &allowance })?;
    json.end()?;
    Ok(head)
}

struct HeadVisitor<'a, F> {
    take: F,
    allowance: &'a Allowance,
}

impl<'de, E: fmt::Display, F: FnMut(u64, Vec<Digest>) -> Result<(), E>> Visitor<'de> for HeadVisitor<'_, F> {
    type Value = Head;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the digests of a backup")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Head, A::Error> {
        let mut head = Head::default();
        let mut block_bytes = None;
        let mut has_digests = false;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "version" => head.version = map.next_value()?,
                "backup_id" => head.backup_id = map.next_value()?,
                "chunk_size" => block_bytes = Some(map.next_value()?),
                "sha256s" => {
                    // Keys are sorted wherever this is written, so the size comes first.
                    let block_bytes =
                        block_bytes.ok_or_else(|| serde::de::Error::missing_field("chunk_size"))?;
                    let (take, allowance) = (&mut self.take, self.allowance);
                    map.next_value_seed(Digests { block_bytes, take, allowance })?;
                    has_digests = true;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        if !has_digests {
            return Err(serde::de::Error::missing_field("sha256s"));
        }
        Ok(head)
    }
}

struct Digests<'a, F> {
    block_bytes: u64,
    take: &'a mut F,
    allowance: &'a Allowance,
}

impl<'de, E: fmt::Display, F: FnMut(u64, Vec<Digest>) -> Result<(), E>> DeserializeSeed<'de>
    for Digests<'_, F>
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, E: fmt::Display, F: FnMut(u64, Vec<Digest>) -> Result<(), E>> Visitor<'de> for Digests<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of digests")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut batch = Vec::with_capacity(BATCH_DIGESTS);
        while let Some(HexDigest(digest)) = list.next_element()? {
            batch.push(digest);
            self.allowance.renew();
            if batch.len() == BATCH_DIGESTS {
                let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH_DIGESTS));
                (self.take)(self.block_bytes, full).map_err(serde::de::Error::custom)?;
            }
        }
        // The last batch goes over even when it is empty: it tells the size of the blocks.
        (self.take)(self.block_bytes, batch).map_err(serde::de::Error::custom)
    }
}

struct HexDigest(Digest);

impl<'de> serde::Deserialize<'de> for HexDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hex;

        impl Visitor<'_> for Hex {
            type Value = HexDigest;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a SHA-256 of 64 hexadecimal digits")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<HexDigest, E> {
                let mut digest = Digest::default();
                hex::decode_to_slice(text, &mut digest)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Str(text), &self))?;
                Ok(HexDigest(digest))
            }
        }

        deserializer.deserialize_str(Hex)
    }
}
