//! Notes of what an attempt has stored, written while it goes on, and what a later attempt of the same backup takes over
//! by them: the objects whose blocks have the digests that those of the volume have now.
//!
//! An attempt stores under names of its own, so that what it takes over is copied there by the store, and no attempt can
//! harm what another one uses. A note is only a hint. If it is damaged, or what it tells of is gone, the volume is stored
//! from there on as if there were none.

use std::collections::{BTreeMap, HashMap, VecDeque};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::digest::{Digest, Md5};
use super::gc::prefix_of;
use super::metadata::{ObjectEntry, object_number};
use super::stored::Checksum;
use super::{Chunked, Error, Names, damaged};
use crate::engine::catalog::{seal, unseal};
use crate::error::{Causes, Class};
use crate::job::Record;
use crate::store::{Folder, ObjectName, ObjectStore};

/// Where the notes lie, below `.backhaul/`.
pub const FOLDER: &str = "checkpoints";
/// How much of the volume is stored between two notes: little enough to be lost, and enough for a note to cost nothing
/// beside it.
pub const CHECKPOINT_BYTES: u64 = 256 << 20;
/// Objects of one note, at most.
const OBJECTS_MAX: usize = 4096;
/// No note is larger: an object takes some 300 bytes of it.
const NOTE_BYTES_MAX: usize = 4 << 20;
/// A larger object is stored anew: a server may take longer to copy it than a request may take.
const COPY_BYTES_MAX: u64 = 1 << 30;

/// A data object that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredObject {
    /// What the metadata says of it.
    pub entry: ObjectEntry,
    /// What it is in the store.
    pub checksum: Checksum,
    /// The SHA-256 over the digests of its blocks; none of an object of zeros, which is made in no time.
    pub blocks: Option<Digest>,
}

/// One note: some of the objects of an attempt, in the volume's order.
#[derive(Serialize, Deserialize)]
struct Note {
    prefix: String,
    objects: Vec<Noted>,
}

/// The same as a [`StoredObject`], in text.
#[derive(Serialize, Deserialize)]
struct Noted {
    number: u64,
    offset: u64,
    length: u64,
    compression: String,
    md5: String,
    blocks: String,
    bytes: u64,
    crc32: u32,
}

impl Noted {
    fn of(object: &StoredObject) -> Option<Self> {
        let StoredObject { entry, checksum, blocks } = object;
        Some(Self {
            number: entry.number,
            offset: entry.offset,
            length: entry.length,
            compression: entry.compression.to_string(),
            md5: hex::encode(entry.md5),
            blocks: hex::encode((*blocks)?),
            bytes: checksum.bytes,
            crc32: checksum.crc32,
        })
    }

    fn read(&self) -> Option<StoredObject> {
        let mut md5 = Md5::default();
        hex::decode_to_slice(&self.md5, &mut md5).ok()?;
        let mut blocks = Digest::default();
        hex::decode_to_slice(&self.blocks, &mut blocks).ok()?;
        Some(StoredObject {
            entry: ObjectEntry {
                number: self.number,
                offset: self.offset,
                length: self.length,
                compression: self.compression.parse().ok()?,
                md5,
            },
            checksum: Checksum { bytes: self.bytes, crc32: self.crc32 },
            blocks: Some(blocks),
        })
    }
}

/// Writes the notes of an attempt.
pub struct Notes<'a> {
    store: &'a dyn ObjectStore,
    names: &'a Names,
    checkpoint_bytes: u64,
    unwritten: Vec<Noted>,
    unwritten_bytes: u64,
    count: u64,
}

impl<'a> Notes<'a> {
    /// Begins with none.
    pub fn new(store: &'a dyn ObjectStore, names: &'a Names, checkpoint_bytes: u64) -> Self {
        Self { store, names, checkpoint_bytes, unwritten: Vec::new(), unwritten_bytes: 0, count: 0 }
    }

    /// Whether any was written.
    pub fn any(&self) -> bool {
        self.count > 0
    }

    /// Takes in objects that are in the store for good, in the volume's order, and writes a note when there is enough for
    /// one.
    pub async fn add(&mut self, objects: &[StoredObject]) -> Result<(), Error> {
        for object in objects {
            if let Some(noted) = Noted::of(object) {
                self.unwritten_bytes += noted.length;
                self.unwritten.push(noted);
            }
        }
        if self.unwritten_bytes < self.checkpoint_bytes && self.unwritten.len() < OBJECTS_MAX {
            return Ok(());
        }
        self.unwritten_bytes = 0;
        let mut unwritten = std::mem::take(&mut self.unwritten).into_iter().peekable();
        while unwritten.peek().is_some() {
            self.count += 1;
            let name = self.names.checkpoint(self.count)?;
            let objects = unwritten.by_ref().take(OBJECTS_MAX).collect();
            let note = Note { prefix: self.names.prefix().to_owned(), objects };
            self.store.put(&name, seal(&name, &note)?).await?;
        }
        Ok(())
    }
}

/// What earlier attempts of a backup have stored, by their notes.
pub struct Earlier {
    /// The newest first.
    attempts: Vec<EarlierAttempt>,
}

/// An object of an earlier attempt.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its name.
    pub name: ObjectName,
    /// What it is; its number is that of the earlier attempt.
    pub object: StoredObject,
}

struct EarlierAttempt {
    names: Names,
    /// The sizes of the objects that are there, by number.
    sizes: HashMap<u64, u64>,
    /// Those that were not read yet, in order.
    notes: std::vec::IntoIter<ObjectName>,
    ahead: VecDeque<StoredObject>,
}

impl Chunked {
    /// Looks for what attempts before this one have stored of the same backup.
    pub async fn earlier(&self, record: &Record) -> Result<Earlier, Error> {
        let mut attempts = Vec::new();
        if record.displaced_writer.is_some() {
            let folder = Folder::own(FOLDER);
            let mut notes: BTreeMap<String, BTreeMap<u64, ObjectName>> = BTreeMap::new();
            for listed in self.store.list(&folder, &self.naming.volume_prefix(record.volume_id)).await? {
                let Some(prefix) = prefix_of(&listed.name).filter(|text| self.is_earlier(text, record))
                else {
                    continue;
                };
                if let Some(number) = object_number(prefix, &listed.name) {
                    let name = folder.object(&listed.name)?;
                    notes.entry(prefix.to_owned()).or_default().insert(number, name);
                }
            }
            // Prefixes differ in the time only.
            for (prefix, notes) in notes.into_iter().rev() {
                let names = Names::new(&record.container, &prefix)?;
                let objects = self.data_objects(&names, |_| {}).await?;
                let sizes = objects.into_iter().map(|object| (object.number, object.bytes)).collect();
                let notes = notes.into_values().collect::<Vec<_>>().into_iter();
                attempts.push(EarlierAttempt { names, sizes, notes, ahead: VecDeque::new() });
            }
        }
        Ok(Earlier { attempts })
    }

    /// Removes the notes of an attempt.
    pub(super) async fn remove_notes(&self, names: &Names) -> Result<(), Error> {
        let folder = Folder::own(FOLDER);
        let listed = self.store.list(&folder, names.prefix()).await?;
        let own = listed.iter().filter(|note| object_number(names.prefix(), &note.name).is_some());
        let notes: Vec<_> = own.map(|note| folder.object(&note.name)).collect::<Result<_, _>>()?;
        self.store.delete_all(&notes).await?;
        Ok(self.store.tidy(&folder, names.prefix()).await?)
    }
}

impl Earlier {
    /// Finds an object of `length` bytes from `offset` on, the digests of whose blocks have this SHA-256. Must be asked in
    /// the volume's order.
    pub async fn find(
        &mut self,
        store: &dyn ObjectStore,
        offset: u64,
        length: u64,
        blocks: &Digest,
    ) -> Result<Option<Found>, Error> {
        for attempt in &mut self.attempts {
            let Some(object) = attempt.at(store, offset).await? else { continue };
            let is_there = attempt.sizes.get(&object.entry.number) == Some(&object.checksum.bytes);
            let is_same = object.entry.length == length && object.blocks.as_ref() == Some(blocks);
            if is_there && is_same && object.checksum.bytes <= COPY_BYTES_MAX {
                return Ok(Some(Found { name: attempt.names.data(object.entry.number)?, object }));
            }
        }
        Ok(None)
    }
}

impl EarlierAttempt {
    /// The object that begins at `offset`.
    async fn at(&mut self, store: &dyn ObjectStore, offset: u64) -> Result<Option<StoredObject>, Error> {
        loop {
            match self.ahead.front() {
                Some(object) if object.entry.offset < offset => drop(self.ahead.pop_front()),
                Some(object) => return Ok((object.entry.offset == offset).then(|| object.clone())),
                None => {
                    let Some(name) = self.notes.next() else { return Ok(None) };
                    match self.read(store, &name).await {
                        Ok(objects) => self.ahead = objects,
                        Err(error) if error.class() == Class::Transient => return Err(error),
                        Err(error) => {
                            warn!(error = %Causes(&error), "what an earlier attempt has stored is not used from here on");
                            self.notes = Vec::new().into_iter();
                        }
                    }
                }
            }
        }
    }

    async fn read(
        &self,
        store: &dyn ObjectStore,
        name: &ObjectName,
    ) -> Result<VecDeque<StoredObject>, Error> {
        let bytes = store.get(name).await?.collect(name, NOTE_BYTES_MAX).await?;
        let note: Note = unseal(name, &bytes).map_err(|error| match error {
            Error::DamagedRecord { why, .. } => damaged(name, why),
            error => error,
        })?;
        if note.prefix != self.names.prefix() {
            return Err(damaged(name, format!("it is of {}", note.prefix)));
        }
        let objects: Option<VecDeque<_>> = note.objects.iter().map(Noted::read).collect();
        objects.ok_or_else(|| damaged(name, "an object in it has no digest, or is packed in an unknown way"))
    }
}
