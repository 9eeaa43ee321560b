//! Our own list of what the data objects are in the store, kept beside the record: a line an object, its number, its
//! size, and its CRC-32. Lines are in the order of the metadata.

use std::io::{self, BufRead};

use super::stored::Checksum;

/// One line.
pub fn line(number: u64, checksum: Checksum) -> String {
    format!("{number} {} {:08x}\n", checksum.bytes, checksum.crc32)
}

/// Reads the next line; none at the end.
pub fn read(reader: &mut impl BufRead) -> io::Result<Option<(u64, Checksum)>> {
    let mut line = String::new();
    // No line is longer than this; a damaged list must not fill the memory.
    if io::Read::take(&mut *reader, 80).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.trim_end_matches('\n').split(' ');
    let parsed = (|| {
        let number = words.next()?.parse().ok()?;
        let bytes = words.next()?.parse().ok()?;
        let crc32 = u32::from_str_radix(words.next()?, 16).ok()?;
        (words.next().is_none() && line.ends_with('\n')).then_some((number, Checksum { bytes, crc32 }))
    })();
    parsed
        .map(Some)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{line:?} is no checksum")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_are_written() {
        let checksum = Checksum::of(b"abc");
        let text = line(1, checksum) + &line(100_000, checksum);
        let mut reader = text.as_bytes();
        assert_eq!(read(&mut reader).unwrap(), Some((1, checksum)));
        assert_eq!(read(&mut reader).unwrap(), Some((100_000, checksum)));
        assert_eq!(read(&mut reader).unwrap(), None);
        for text in ["1 2\n", "1 2 3", "a 2 3\n", "1 2 3 4\n", "\n", "1 2 123456789\n"] {
            assert!(read(&mut text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
