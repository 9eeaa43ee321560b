//! Cinder's metadata object, `<prefix>_metadata`: which objects a backup has, and what they hold.
//!
//! JSON with sorted keys, indented by two, of version 1.0.0. It is written and read as a stream, because a backup may
//! have millions of objects. The object that makes a backup visible.

use std::cell::Cell;
use std::fmt;
use std::io::{self, BufReader, Read};

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Error;
use super::compression::Compression;
use super::digest::Md5;
use crate::job::Record;

/// The only version of the format there is.
pub const VERSION: &str = "1.0.0";

/// What stands in a list before, between and behind its entries, at most. It is held in memory, and whoever may write to the
/// store may have written it.
pub const TEXTS_BYTES_MAX: usize = 16 << 20;
/// JSON is read byte by byte out of a buffer of this size.
const BUFFER_BYTES: usize = 128 << 10;

/// How much of a list may be read yet until the next one of its entries has come.
pub struct Allowance(Cell<usize>);

impl Allowance {
    /// Begins at the start of a list.
    pub fn new() -> Self {
        let allowance = Self(Cell::default());
        allowance.renew();
        allowance
    }

    /// Says that an entry has come.
    pub fn renew(&self) {
        // What is read ahead counts as well.
        self.0.set(TEXTS_BYTES_MAX + BUFFER_BYTES);
    }

    /// Reads a list, and fails where what stands between its entries is too long.
    pub fn bound(&self, reader: impl Read) -> BufReader<impl Read> {
        BufReader::with_capacity(BUFFER_BYTES, Bounded { reader, allowance: self })
    }
}

struct Bounded<'a, R> {
    reader: R,
    allowance: &'a Allowance,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        let left = self.allowance.0.get().checked_sub(read).ok_or_else(|| {
            let text = format!(
                "it has a text of more than {TEXTS_BYTES_MAX} bytes, which it never has: it is not ours"
            );
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        self.allowance.0.set(left);
        Ok(read)
    }
}

/// One data object of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectEntry {
    /// The number at the end of its name.
    pub number: u64,
    /// Where in the volume its bytes belong.
    pub offset: u64,
    /// How many bytes of the volume it holds.
    pub length: u64,
    /// How they are packed.
    pub compression: Compression,
    /// The MD5 of the bytes as they are in the volume.
    pub md5: Md5,
}

impl ObjectEntry {
    /// The first byte behind it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// The name of a data object.
pub fn object_name(prefix: &str, number: u64) -> String {
    format!("{prefix}-{number:05}")
}

/// The number in the name of a data object; none where it is the name of anything else.
pub fn object_number(prefix: &str, name: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?.strip_prefix('-')?;
    let number = digits.parse().ok()?;
    (digits.bytes().all(|b| b.is_ascii_digit()) && object_name(prefix, number) == name).then_some(number)
}

/// A moment as Python prints an aware datetime, which is how Cinder keeps it.
pub fn python_time(time: Timestamp) -> String {
    let format = if time.subsec_microsecond() == 0 && time.subsec_millisecond() == 0 {
        "%Y-%m-%d %H:%M:%S+00:00"
    } else {
        "%Y-%m-%d %H:%M:%S.%6f+00:00"
    };
    time.strftime(format).to_string()
}

/// A text as a JSON string, or null. As Cinder writes it: all but printable ASCII is escaped.
pub fn json_text(text: Option<&str>) -> String {
    let json = serde_json::Value::from(text).to_string();
    let mut ascii = String::with_capacity(json.len());
    for c in json.chars() {
        if matches!(c, ' '..='~') {
            ascii.push(c);
        } else {
            ascii.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    ascii
}

/// What stands before the objects.
pub fn head(record: &Record) -> String {
    format!(
        "{{\n  \"backup_description\": {},\n  \"backup_id\": \"{}\",\n  \"backup_name\": {},\n  \"created_at\": \
         \"{}\",\n  \"objects\": [",
        json_text(record.description.as_deref()),
        record.backup_id,
        json_text(record.name.as_deref()),
        python_time(record.created_at),
    )
}

/// One object, with the comma before it where it is not the first one.
pub fn object(prefix: &str, entry: &ObjectEntry, first: bool) -> String {
    format!(
        "{}\n    {{\n      {}: {{\n        \"compression\": \"{}\",\n        \"length\": {},\n        \"md5\": \
         \"{}\",\n        \"offset\": {}\n      }}\n    }}",
        if first { "" } else { "," },
        json_text(Some(&object_name(prefix, entry.number))),
        entry.compression,
        entry.length,
        hex::encode(entry.md5),
        entry.offset,
    )
}

/// What stands behind the objects.
pub fn tail(record: &Record, volume_meta: Option<&str>, any_objects: bool) -> String {
    format!(
        "{}],\n  \"parent_id\": {},\n  \"version\": \"{VERSION}\",\n  \"volume_id\": \"{}\",\n  \"volume_meta\": {}\n}}",
        if any_objects { "\n  " } else { "" },
        json_text(record.parent_id.map(|id| id.to_string()).as_deref()),
        record.volume_id,
        json_text(volume_meta),
    )
}

/// Makes sure that what is kept with a backup is not more than what is read back.
pub fn check_texts(record: &Record, volume_meta: Option<&str>) -> Result<(), Error> {
    let bytes = head(record).len() + tail(record, volume_meta, true).len();
    if bytes <= TEXTS_BYTES_MAX {
        return Ok(());
    }
    Err(Error::TextsTooLong { backup_id: record.backup_id, bytes, bytes_max: TEXTS_BYTES_MAX })
}

/// What a metadata object says besides its objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// The version of the format.
    pub version: String,
    /// The backup, as text.
    pub backup_id: String,
    /// The volume, as text.
    pub volume_id: String,
    /// The parent, as text.
    pub parent_id: Option<String>,
    /// Metadata of the volume: a string that holds JSON.
    pub volume_meta: Option<String>,
}

/// Reads a metadata object, and hands over its objects one by one. Whatever `take` returns as an error ends the
/// reading, as an error with the same text.
pub fn read<E: fmt::Display>(
    reader: impl Read,
    prefix: &str,
    take: impl FnMut(ObjectEntry) -> Result<(), E>,
) -> Result<Head, serde_json::Error> {
    let allowance = Allowance::new();
    let mut json = serde_json::Deserializer::from_reader(allowance.bound(reader));
    let head =
        json.deserialize_map(HeadVisitor { objects: Objects { prefix, take, allowance: &allowance } })?;
    json.end()?;
    Ok(head)
}

struct HeadVisitor<'a, F> {
    objects: Objects<'a, F>,
}

impl<'de, E: fmt::Display, F: FnMut(ObjectEntry) -> Result<(), E>> Visitor<'de> for HeadVisitor<'_, F> {
    type Value = Head;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the metadata of a backup")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Head, A::Error> {
        let mut head = Head::default();
        let mut has_objects = false;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "version" => head.version = map.next_value()?,
                "backup_id" => head.backup_id = map.next_value()?,
                "volume_id" => head.volume_id = map.next_value()?,
                "parent_id" => head.parent_id = map.next_value()?,
                "volume_meta" => head.volume_meta = map.next_value()?,
                "objects" => {
                    map.next_value_seed(&mut self.objects)?;
                    has_objects = true;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        if !has_objects {
            return Err(serde::de::Error::missing_field("objects"));
        }
        Ok(head)
    }
}

struct Objects<'a, F> {
    prefix: &'a str,
    take: F,
    allowance: &'a Allowance,
}

impl<'de, E: fmt::Display, F: FnMut(ObjectEntry) -> Result<(), E>> DeserializeSeed<'de>
    for &mut Objects<'_, F>
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, E: fmt::Display, F: FnMut(ObjectEntry) -> Result<(), E>> Visitor<'de> for &mut Objects<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the list of the objects of a backup")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(NamedObject { name, object }) = list.next_element()? {
            self.allowance.renew();
            let entry = object.entry(self.prefix, &name).map_err(serde::de::Error::custom)?;
            (self.take)(entry).map_err(serde::de::Error::custom)?;
        }
        Ok(())
    }
}

/// An object of one key: the object's name.
struct NamedObject {
    name: String,
    object: StoredObject,
}

#[derive(Deserialize)]
struct StoredObject {
    offset: u64,
    length: u64,
    compression: String,
    md5: String,
}

impl StoredObject {
    fn entry(self, prefix: &str, name: &str) -> Result<ObjectEntry, String> {
        let number =
            object_number(prefix, name).ok_or_else(|| format!("{name:?} is no object of {prefix}"))?;
        let compression = self.compression.parse().map_err(|error| format!("{name}: {error}"))?;
        let mut md5 = Md5::default();
        hex::decode_to_slice(&self.md5, &mut md5).map_err(|_| format!("{name}: {:?} is no MD5", self.md5))?;
        if self.length == 0 || self.offset.checked_add(self.length).is_none() {
            return Err(format!("{name}: it cannot hold {} bytes from {} on", self.length, self.offset));
        }
        Ok(ObjectEntry { number, offset: self.offset, length: self.length, compression, md5 })
    }
}

impl<'de> Deserialize<'de> for NamedObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneKey;

        impl<'de> Visitor<'de> for OneKey {
            type Value = NamedObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object under its name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<NamedObject, A::Error> {
                let Some((name, object)) = map.next_entry()? else {
                    return Err(serde::de::Error::custom("an object without a name"));
                };
                if map.next_key::<IgnoredAny>()?.is_some() {
                    return Err(serde::de::Error::custom("an object with two names"));
                }
                Ok(NamedObject { name, object })
            }
        }

        deserializer.deserialize_map(OneKey)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_objects_are_told_from_others() {
        assert_eq!(object_name("p", 1), "p-00001");
        assert_eq!(object_number("p", "p-00001"), Some(1));
        assert_eq!(object_number("p", "p-123456"), Some(123_456));
        for name in ["p-1", "p-000001", "p-+0001", "p_metadata", "q-00001", "p-0000x", "p"] {
            assert_eq!(object_number("p", name), None, "{name}");
        }
    }

    #[test]
    fn time_is_written_as_python_does() {
        assert_eq!(
            python_time("2026-11-21T11:47:51.558550Z".parse().unwrap()),
            "2026-11-21 11:47:51.558550+00:00"
        );
        assert_eq!(python_time("2026-11-21T11:47:51Z".parse().unwrap()), "2026-11-21 11:47:51+00:00");
    }

    #[test]
    fn text_is_written_as_python_does() {
        assert_eq!(
            json_text(Some("a\"\n\u{1f}\u{7f}ö\u{1f600}")),
            r#""a\"\n\u001f\u007f\u00f6\ud83d\ude00""#
        );
        assert_eq!(json_text(None), "null");
    }

    /// Endless, and counts what is taken of it.
    struct Endless<'a> {
        begins: &'a [u8],
        goes_on: u8,
        taken: usize,
    }

    impl Read for Endless<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            assert!(self.taken < 4 * TEXTS_BYTES_MAX, "all of it is taken");
            let read = match self.begins.read(buffer)? {
                0 => {
                    buffer.fill(self.goes_on);
                    buffer.len()
                }
                read => read,
            };
            self.taken += read;
            Ok(read)
        }
    }

    #[test]
    fn a_text_without_an_end_does_not_fill_the_memory() {
        let entry = r#"{"p-00001":{"offset":0,"length":5,"compression":"zlib","md5":"7e7fe5b4627115d762777a18981d0cf9"}}"#;
        for (begins, goes_on) in [
            ("", b' '),
            (r#"{"backup_id":""#, b'a'),
            (&format!(r#"{{"objects":[{entry},{{"p-00002":{{"md5":""#), b'a'),
            (&format!(r#"{{"objects":[{entry}],"volume_meta":""#), b'a'),
        ] {
            let list = Endless { begins: begins.as_bytes(), goes_on, taken: 0 };
            let error = read(list, "p", |_| Ok::<_, String>(())).unwrap_err();
            assert!(error.is_io(), "{begins}: {error}");
        }
    }

    #[test]
    fn a_list_may_be_longer_than_its_texts() {
        let digits = "7e7fe5b4627115d762777a18981d0cf9";
        let count = TEXTS_BYTES_MAX as u64 * 5 / 4 / 90;
        let entries = (1..=count).map(|number| {
            let name = object_name("p", number);
            let comma = if number == 1 { "" } else { "," };
            format!(r#"{comma}{{"{name}":{{"offset":0,"length":5,"compression":"zlib","md5":"{digits}"}}}}"#)
        });
        let meta = "m".repeat(TEXTS_BYTES_MAX - 1000);
        let text = format!(r#"{{"objects":[{}],"volume_meta":"{meta}"}}"#, entries.collect::<String>());
        let mut taken = 0;

        let head = read(text.as_bytes(), "p", |_| {
            taken += 1;
            Ok::<_, String>(())
        });

        assert_eq!(taken, count);
        assert!(head.unwrap().volume_meta == Some(meta));
    }

    #[test]
    fn damaged_metadata_is_refused() {
        let object = r#"{"p-00001":{"offset":0,"length":5,"compression":"zlib","md5":"7e7fe5b4627115d762777a18981d0cf9"}}"#;
        let read = |text: &str| read(text.as_bytes(), "p", |_| Ok::<_, String>(()));

        assert!(read(&format!(r#"{{"version":"1.0.0","objects":[{object}],"new":[1]}}"#)).is_ok());
        for text in [
            "",
            "{}",
            "[]",
            &format!(r#"{{"objects":[{object}]"#),
            &format!(r#"{{"objects":[{object}]}}x"#),
            r#"{"objects":[{}]}"#,
            r#"{"objects":[1]}"#,
            &format!(r#"{{"objects":[{}]}}"#, object.replace("p-00001", "../p-00001")),
            &format!(r#"{{"objects":[{}]}}"#, object.replace("zlib", "lz4")),
            &format!(r#"{{"objects":[{}]}}"#, object.replace(":5", ":0")),
            &format!(
                r#"{{"objects":[{}]}}"#,
                object.replace(":5", ":18446744073709551615").replace(":0", ":1")
            ),
            &format!(r#"{{"objects":[{}]}}"#, object.replace("7e7f", "7e7")),
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
