//! What large volumes hold, without their zeros.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

const PAGE_BYTES: usize = 4096;

/// The bytes of a volume. Two that hold the same are equal, however zeros came about.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) bytes: u64,
    /// Pages that are not all zeros, by their number.
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Content {
    /// Nothing but zeros.
    pub(crate) fn zeros(bytes: u64) -> Self {
        Self { bytes, pages: BTreeMap::new() }
    }

    pub(crate) fn write(&mut self, offset: u64, mut bytes: &[u8]) {
        let mut at = offset;
        while !bytes.is_empty() {
            let (number, start) = (at / PAGE_BYTES as u64, at as usize % PAGE_BYTES);
            let (now, rest) = bytes.split_at(bytes.len().min(PAGE_BYTES - start));
            if now != &[0; PAGE_BYTES][..now.len()] || self.pages.contains_key(&number) {
                let page = self.pages.entry(number).or_insert_with(|| [0; PAGE_BYTES].into());
                page[start..start + now.len()].copy_from_slice(now);
                if **page == [0; PAGE_BYTES] {
                    self.pages.remove(&number);
                }
            }
            at += now.len() as u64;
            bytes = rest;
        }
        assert!(at <= self.bytes, "written behind the end");
    }

    /// The same in a volume of another size.
    pub(crate) fn in_bytes(&self, bytes: u64) -> Self {
        Self { bytes, ..self.clone() }
    }

    /// What a file holds.
    pub(crate) fn of_file(path: &Path) -> Self {
        let mut file = std::fs::File::open(path).unwrap();
        let mut content = Self::zeros(file.metadata().unwrap().len());
        let mut buffer = vec![0; 4 << 20];
        let mut at = 0;
        while at < content.bytes {
            let length = file.read(&mut buffer).unwrap();
            content.write(at, &buffer[..length]);
            at += length as u64;
        }
        content
    }

    /// What an image holds that was exported in rbd's format `rbd diff v1`, from its beginning on.
    pub(crate) fn of_diff(diff: impl Read) -> Self {
        let mut diff = BufReader::with_capacity(1 << 20, diff);
        let mut header = Vec::new();
        diff.read_until(b'\n', &mut header).unwrap();
        assert_eq!(header, b"rbd diff v1\n");
        let mut content = Self::zeros(0);
        loop {
            match &read(&mut diff, 1)[..] {
                b"t" => {
                    let length = read(&mut diff, 4);
                    read(&mut diff, u32::from_le_bytes(length.try_into().unwrap()) as usize);
                }
                b"s" => content.bytes = number(&mut diff),
                b"w" => {
                    let (offset, length) = (number(&mut diff), number(&mut diff));
                    content.write(offset, &read(&mut diff, length as usize));
                }
                b"z" => {
                    number(&mut diff);
                    number(&mut diff);
                }
                b"e" => return content,
                other => panic!("{other:?} in an exported diff"),
            }
        }
    }
}

fn read(from: &mut impl Read, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

fn number(from: &mut impl Read) -> u64 {
    u64::from_le_bytes(read(from, 8).try_into().unwrap())
}

impl fmt::Debug for Content {
    /// Tells where there is data, and a sum of it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, pages", self.bytes)?;
        let mut pages = self.pages.iter().peekable();
        while let Some((first, bytes)) = pages.next() {
            let mut sum = crc32fast::hash(bytes);
            let mut last = *first;
            while let Some((number, bytes)) = pages.next_if(|(number, _)| **number == last + 1) {
                sum = sum.rotate_left(1) ^ crc32fast::hash(bytes);
                last = *number;
            }
            write!(f, " {first}-{last}:{sum:08x}")?;
        }
        Ok(())
    }
}
