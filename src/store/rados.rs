//! Objects in a RADOS pool: the records, outcomes and lists that go with images.
//!
//! The bytes of an object lie in parts, which are RADOS objects under names that are used once, for a random id is in
//! them. The object is there when the map of its folder's index says so. That map is one RADOS object, and a change of
//! it is made whole or not at all, whoever else is at work: this is what keeps two writers of one name apart, and it
//! spares a listing the pool, which has millions of other objects. The map remembers parts that are to be removed, too,
//! before there are any: those of a writer until it finishes, and those of an object that is replaced or deleted.
//!
//! An object that is small and written at once, as nearly all records are, has no parts: it lies in the map itself, so that
//! one request writes it, and one reads it.
//!
//! ```text
//! <folder>/.index                 map: <name>        its size, the size of its parts, its id, and its time; after a line
//!                                                    feed, if it lies here, its bytes
//!                                      .<name>/.<id>  parts to remove: `writing`, `abandoned`, or what <name> had
//!                                      .newest        the id that was begun last; with nothing else, the index may go
//! <folder>/<name>/.<id>.<number>  a part
//! ```
//!
//! No part of a name begins with a dot, so none of these can be taken for another.

use std::io::{self, ErrorKind};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::{
    Error, Folder, Listed, ObjectName, ObjectStore, ObjectWriter, PIECE_BYTES, Partial, Pieces, Result,
    TakeListed,
};
use crate::ceph::{MapChange, Pool};

/// What a part has, but for the last one. RBD and the gateway for S3 cut what they store into pieces of this size, too.
const PART_BYTES: usize = 4 << 20;
/// What lies in the index at most. Whoever lists a folder reads all of these, so they must be small.
const INLINE_BYTES_MAX: usize = 16 << 10;
/// As many parts are looked for as an entry in the index says, but no more than this: it may be damaged, and say any number.
/// The list of digests of 32 TiB has so many.
const PARTS_SOUGHT_MAX: u64 = 4096;
/// How often something is tried that somebody else was faster with.
const TRIES_MAX: u32 = 20;

/// The key of the id that was begun last.
const NEWEST: &str = ".newest";
/// Parts that are still written, and may be finished.
const WRITING: &[u8] = b"writing";
/// Parts that nobody can finish any more.
const ABANDONED: &[u8] = b"abandoned";

/// Objects in a pool of a Ceph cluster.
#[derive(Debug, Clone)]
pub struct Rados {
    pool: Pool,
}

impl Rados {
    /// Keeps objects in `pool`, beside whatever else it has. The pool must be a replicated one: others have no maps.
    pub fn new(pool: Pool) -> Self {
        Self { pool }
    }

    /// Runs `work` on an object where it may block.
    async fn at<T: Send + 'static>(
        &self,
        action: &'static str,
        object: &ObjectName,
        work: impl FnOnce(Place) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let place = Place { pool: self.pool.clone(), object: object.clone() };
        blocking(action, object, move || work(place)).await
    }
}

#[async_trait]
impl ObjectStore for Rados {
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        self.at("write", object, move |place| place.write_new(&bytes)).await
    }

    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        self.at("write", object, move |place| place.write(&bytes, Publish::Over).map(drop)).await
    }

    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool> {
        self.at("write", object, move |place| {
            let (place, contents, mut piece) = match place.read() {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                read => read?,
            };
            if was.len() as u64 != contents.bytes {
                return Ok(false);
            }
            let mut rest = was;
            while let Some(there) = piece {
                if !rest.starts_with(&there) {
                    return Ok(false);
                }
                rest = rest.slice(there.len()..);
                piece = place.piece(&contents, contents.bytes - rest.len() as u64)?;
            }
            place.write(&bytes, Publish::Instead(contents))
        })
        .await
    }

    async fn create(&self, object: &ObjectName) -> Result<Box<dyn ObjectWriter>> {
        let stage = Stage::Buffered(Place { pool: self.pool.clone(), object: object.clone() });
        Ok(Box::new(Writer { object: object.clone(), buffer: BytesMut::new(), stage }))
    }

    async fn get(&self, object: &ObjectName) -> Result<Pieces> {
        let (place, contents, first) = self.at("read", object, Place::read).await?;
        let (sender, pieces) = Pieces::channel();
        tokio::task::spawn_blocking(move || {
            let mut next = first.map(Ok);
            let mut offset = 0;
            while let Some(piece) = next {
                let piece = piece.map_err(|error| Error::io("read", &place.object, error));
                let length = piece.as_ref().map_or(0, Bytes::len) as u64;
                // Nobody may be there to take it: the reader was dropped.
                if sender.blocking_send(piece).is_err() || length == 0 {
                    return;
                }
                offset += length;
                next = place.piece(&contents, offset).transpose();
            }
        });
        Ok(pieces)
    }

    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()> {
        let (pool, index, prefix) = (self.pool.clone(), index(folder), prefix.to_owned());
        let listed: Vec<_> = blocking("list", folder.as_str(), move || {
            let entries = pool.map_entries(&index, &prefix)?;
            let objects = entries.into_iter().filter(|(key, _)| !key.starts_with('.'));
            objects
                .map(|(name, entry)| {
                    let contents = Contents::parse(&entry)?;
                    Ok(Listed { name, bytes: contents.bytes, modified: contents.modified() })
                })
                .collect()
        })
        .await?;
        listed.into_iter().for_each(take);
        Ok(())
    }

    async fn delete(&self, object: &ObjectName) -> Result<()> {
        self.at("delete", object, Place::delete).await
    }

    async fn tidy(&self, folder: &Folder, prefix: &str) -> Result<()> {
        let (pool, owned, key_prefix) = (self.pool.clone(), folder.clone(), format!(".{prefix}"));
        blocking("tidy", folder.as_str(), move || {
            remove_leftovers(&pool, &owned, &key_prefix, Writers::Stop)?;
            remove_empty_index(&pool, &owned)
        })
        .await
    }

    async fn partials(&self, folder: &Folder, prefix: &str) -> Result<Vec<Partial>> {
        let (pool, owned, key_prefix) = (self.pool.clone(), folder.clone(), format!(".{prefix}"));
        blocking("list", folder.as_str(), move || {
            let mut partials = Vec::new();
            for (key, _) in pool.map_entries(&index(&owned), &key_prefix)? {
                let Some((object, id)) = leftover(&owned, &key) else { continue };
                let place = Place { pool: pool.clone(), object };
                // One that has no part yet has no time, either.
                let modified = pool.object_modified(&place.part(id, 0))?.and_then(|at| at.try_into().ok());
                partials.push(Partial { object: place.object, id: id.to_string(), bytes: 0, modified });
            }
            Ok(partials)
        })
        .await
    }

    async fn discard(&self, partial: &Partial) -> Result<()> {
        let key_prefix = format!(".{}/.", partial.object.name);
        let id: std::result::Result<Uuid, _> = partial.id.parse();
        self.at("discard", &partial.object, move |place| {
            let id = id.map_err(|_| ErrorKind::InvalidInput)?;
            let key = format!("{key_prefix}{}", id.simple());
            remove_leftovers(&place.pool, &place.object.folder, &key, Writers::Stop)
        })
        .await
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    action: &'static str,
    object: impl ToString,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    let result = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)));
    result.map_err(|error| Error::io(action, object.to_string(), error))
}

fn index(folder: &Folder) -> String {
    format!("{}/.index", folder.as_str())
}

/// What the index says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Contents {
    bytes: u64,
    part_bytes: u64,
    id: Uuid,
    /// When it was written, by the clock of who did so; older entries do not say it.
    written_seconds: Option<i64>,
    /// All of it, if it has no parts.
    inline: Option<Bytes>,
}

impl Contents {
    /// Those of an object that is finished now.
    fn new(bytes: u64, id: Uuid, inline: Option<Bytes>) -> Self {
        let written_seconds = Some(Timestamp::now().as_second());
        Self { bytes, part_bytes: PART_BYTES as u64, id, written_seconds, inline }
    }

    fn encode(&self) -> Vec<u8> {
        let written = self.written_seconds.map_or(String::new(), |seconds| format!(" {seconds}"));
        let mut entry =
            format!("{} {} {}{written}", self.bytes, self.part_bytes, self.id.simple()).into_bytes();
        if let Some(inline) = &self.inline {
            entry.push(b'\n');
            entry.extend_from_slice(inline);
        }
        entry
    }

    fn parse(entry: &[u8]) -> io::Result<Self> {
        let end = entry.iter().position(|byte| *byte == b'\n');
        let (line, inline) = match end {
            Some(end) => (&entry[..end], Some(Bytes::copy_from_slice(&entry[end + 1..]))),
            None => (entry, None),
        };
        let fields = || {
            let mut fields = std::str::from_utf8(line).ok()?.split(' ');
            let bytes = fields.next()?.parse().ok()?;
            let part_bytes = fields.next()?.parse().ok().filter(|bytes| *bytes > 0)?;
            let id = fields.next()?.parse().ok()?;
            let written_seconds = fields.next().and_then(|seconds| seconds.parse().ok());
            Some(Self { bytes, part_bytes, id, written_seconds, inline: inline.clone() })
        };
        let contents = fields().ok_or_else(|| {
            damaged(format!("its entry in the index is {:?}", String::from_utf8_lossy(line)))
        })?;
        match inline.map(|inline| inline.len() as u64) {
            Some(found) if found != contents.bytes => {
                Err(damaged(format!("its entry in the index has {found} bytes of {}", contents.bytes)))
            }
            _ => Ok(contents),
        }
    }

    fn modified(&self) -> Option<Timestamp> {
        Timestamp::from_second(self.written_seconds?).ok()
    }

    fn part_count(&self) -> u64 {
        if self.inline.is_some() { 0 } else { self.bytes.div_ceil(self.part_bytes) }
    }
}

fn damaged(problem: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, problem)
}

/// An object's name in a pool. All that it does blocks.
struct Place {
    pool: Pool,
    object: ObjectName,
}

impl Place {
    fn index(&self) -> String {
        index(&self.object.folder)
    }

    /// Its key in the index when it is there.
    fn key(&self) -> &str {
        &self.object.name
    }

    /// The key in the index of parts that are to be removed.
    fn leftover_key(&self, id: Uuid) -> String {
        format!("{}{}", self.leftover_prefix(), id.simple())
    }

    fn leftover_prefix(&self) -> String {
        format!(".{}/.", self.object.name)
    }

    fn part(&self, id: Uuid, number: u64) -> String {
        format!("{}/.{}.{number}", self.object, id.simple())
    }

    /// Makes changes to the index, unless it is not as they expect it to be.
    fn change(&self, changes: &[MapChange<'_>]) -> io::Result<bool> {
        match self.pool.change_map(&self.index(), changes) {
            // It was removed because nothing was in it.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            changed => Ok(changed?),
        }
    }

    /// What the index has for the object. Nothing says that it is not there.
    fn entry(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.pool.map_value(&self.index(), self.key())?)
    }

    /// Reads the first piece of the object, if it has any.
    fn read(self) -> io::Result<(Self, Contents, Option<Bytes>)> {
        let mut tries_left = TRIES_MAX;
        loop {
            let entry = self.entry()?.ok_or(ErrorKind::NotFound)?;
            let contents = Contents::parse(&entry)?;
            tries_left -= 1;
            match self.piece(&contents, 0) {
                // It was replaced between the two, which is no reason to bother anybody yet.
                Err(error) if error.kind() == ErrorKind::StaleNetworkFileHandle && tries_left > 0 => {}
                piece => return Ok((self, contents, piece?)),
            }
        }
    }

    /// Reads what an object has from `offset` on, up to the end of a part; nothing at its end.
    fn piece(&self, contents: &Contents, offset: u64) -> io::Result<Option<Bytes>> {
        if let Some(inline) = &contents.inline {
            return Ok(
                Some(inline.slice(offset.min(contents.bytes) as usize..)).filter(|piece| !piece.is_empty())
            );
        }
        let within = offset % contents.part_bytes;
        let left = contents.bytes.saturating_sub(offset).min(contents.part_bytes - within);
        let length = left.min(PIECE_BYTES as u64) as usize;
        if length == 0 {
            return Ok(None);
        }
        let number = offset / contents.part_bytes;
        let part = self.part(contents.id, number);
        let problem = match self.pool.read_object(&part, within, length) {
            Ok(bytes) if bytes.len() == length => return Ok(Some(bytes.into())),
            Ok(_) => "too short",
            Err(error) if error.kind() == ErrorKind::NotFound => "missing",
            Err(error) => return Err(error.into()),
        };
        if self.entry()?.as_deref() != Some(&contents.encode()) {
            let error = "it was replaced or deleted while it was read";
            return Err(io::Error::new(ErrorKind::StaleNetworkFileHandle, error));
        }
        Err(damaged(format!("part {} of {}, {part}, is {problem}", number + 1, contents.part_count())))
    }

    fn write_new(self, bytes: &[u8]) -> io::Result<()> {
        as_new(self.write(bytes, Publish::New)?)
    }

    /// Writes a whole object, and says whether it could: whether there was nothing else of its name than there may be.
    fn write(self, bytes: &[u8], publish: Publish) -> io::Result<bool> {
        if bytes.len() > INLINE_BYTES_MAX {
            return Unfinished::begin(self)?.write_all(bytes)?.publish(publish);
        }
        let id = Uuid::new_v4();
        let newest = MapChange::Set(NEWEST, id.as_bytes());
        let contents = Contents::new(bytes.len() as u64, id, Some(Bytes::copy_from_slice(bytes))).encode();
        // Mostly it is known what there is, and need not be asked for.
        let mut old = match &publish {
            Publish::New => Vec::new(),
            Publish::Instead(contents) => contents.encode(),
            Publish::Over => self.entry()?.unwrap_or_default(),
        };
        for _ in 0..TRIES_MAX {
            let old_leftover = self.leftover_of(&old);
            let mut changes =
                vec![MapChange::Expect(self.key(), &old), MapChange::Set(self.key(), &contents), newest];
            changes.extend(old_leftover.iter().map(|key| MapChange::Set(key, &old)));
            if self.change(&changes)? {
                if old_leftover.is_some() {
                    self.remove_leftovers()?;
                }
                return Ok(true);
            }
            let found = self.entry()?;
            if !publish.may_replace(found.as_deref()) {
                return Ok(false);
            }
            if found.is_none() {
                // There may be no index to compare with.
                self.change(&[newest])?;
            }
            old = found.unwrap_or_default();
        }
        Err(overtaken())
    }

    /// The key under which the parts that an entry tells of are to be removed; none if it has none. What cannot be read
    /// has nothing that could be removed, either.
    fn leftover_of(&self, entry: &[u8]) -> Option<String> {
        let contents = Contents::parse(entry).ok().filter(|contents| contents.inline.is_none())?;
        Some(self.leftover_key(contents.id))
    }

    fn delete(self) -> io::Result<()> {
        let mut tries_left = TRIES_MAX;
        while let Some(entry) = self.entry()? {
            let leftover = self.leftover_of(&entry);
            let mut changes = vec![MapChange::Expect(self.key(), &entry), MapChange::Remove(self.key())];
            changes.extend(leftover.iter().map(|key| MapChange::Set(key, &entry)));
            if self.change(&changes)? {
                break;
            }
            tries_left -= 1;
            if tries_left == 0 {
                return Err(overtaken());
            }
        }
        self.remove_leftovers()
    }

    /// Removes what the object had before it was replaced or deleted, now or by somebody who did not come to this.
    fn remove_leftovers(&self) -> io::Result<()> {
        remove_leftovers(&self.pool, &self.object.folder, &self.leftover_prefix(), Writers::Leave)
    }

    /// Sees to it that parts cannot be finished any more; says whether that was not so already.
    fn abandon(&self, id: Uuid) -> io::Result<bool> {
        let key = self.leftover_key(id);
        self.change(&[MapChange::Expect(&key, WRITING), MapChange::Set(&key, ABANDONED)])
    }

    /// Removes parts that nobody can read or finish, and then forgets them: `count_told` of them if some are missing, and all
    /// that follow each other behind these.
    fn remove_parts(&self, id: Uuid, count_told: u64) -> io::Result<()> {
        let mut count = count_told.min(PARTS_SOUGHT_MAX);
        while self.pool.object_bytes(&self.part(id, count))?.is_some() {
            count += 1;
        }
        // The first one last: should this end half way, the rest is found by counting from it.
        for number in (0..count).rev() {
            self.pool.remove_object(&self.part(id, number))?;
        }
        self.change(&[MapChange::Remove(&self.leftover_key(id))])?;
        Ok(())
    }
}

/// What a new object is that could not be made visible.
fn as_new(published: bool) -> io::Result<()> {
    if published { Ok(()) } else { Err(ErrorKind::AlreadyExists.into()) }
}

/// Somebody else is at work on the same object, again and again.
fn overtaken() -> io::Error {
    io::Error::new(ErrorKind::ResourceBusy, "others change it all the time")
}

/// What parts a key of an index remembers that are to be removed; none if it is another key.
fn leftover(folder: &Folder, key: &str) -> Option<(ObjectName, Uuid)> {
    let (name, id) = key.strip_prefix('.')?.rsplit_once("/.")?;
    Some((folder.object(name).ok()?, id.parse().ok()?))
}

/// What is done about parts that may still be finished.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writers {
    Leave,
    Stop,
}

/// Removes the parts that the index of `folder` remembers under keys that begin with `key_prefix`.
fn remove_leftovers(pool: &Pool, folder: &Folder, key_prefix: &str, writers: Writers) -> io::Result<()> {
    for (key, entry) in pool.map_entries(&index(folder), key_prefix)? {
        let Some((object, id)) = leftover(folder, &key) else { continue };
        let place = Place { pool: pool.clone(), object };
        // It may be finished just now.
        if entry == WRITING && (writers == Writers::Leave || !place.abandon(id)?) {
            continue;
        }
        place.remove_parts(id, Contents::parse(&entry).map_or(0, |contents| contents.part_count()))?;
    }
    Ok(())
}

/// Removes the index of a folder that has nothing, unless somebody has begun to write there since it was looked at.
fn remove_empty_index(pool: &Pool, folder: &Folder) -> io::Result<()> {
    let index = index(folder);
    match pool.only_map_entry(&index)? {
        Some((key, id)) if key == NEWEST => {
            match pool.change_map(&index, &[MapChange::Expect(NEWEST, &id), MapChange::RemoveAll]) {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                changed => Ok(changed.map(drop)?),
            }
        }
        _ => Ok(()),
    }
}

/// Whether an object may take the place of another one.
#[derive(Clone, PartialEq, Eq)]
enum Publish {
    New,
    Over,
    Instead(Contents),
}

impl Publish {
    /// Whether it may take the place of what the index has for its name.
    fn may_replace(&self, entry: Option<&[u8]>) -> bool {
        match self {
            Self::New => entry.is_none(),
            Self::Over => true,
            Self::Instead(contents) => entry == Some(&contents.encode()[..]),
        }
    }
}

/// Parts that make no object yet. Dropping them removes them, and blocks.
struct Unfinished {
    place: Place,
    id: Uuid,
    bytes: u64,
    part_count: u64,
    /// Whether there is nothing to remove, or it is not known what there is.
    left_alone: bool,
}

impl Unfinished {
    fn begin(place: Place) -> io::Result<Self> {
        let id = Uuid::new_v4();
        let changes =
            [MapChange::Set(&place.leftover_key(id), WRITING), MapChange::Set(NEWEST, &id.into_bytes())];
        place.change(&changes)?;
        Ok(Self { place, id, bytes: 0, part_count: 0, left_alone: false })
    }

    /// Writes the next part. None but the last may have less than [`PART_BYTES`].
    fn write_part(&mut self, bytes: &[u8]) -> io::Result<()> {
        let part = self.place.part(self.id, self.part_count);
        if let Err(error) = self.place.pool.create_object(&part, bytes) {
            // It may come to be long after this, so it must not be forgotten now.
            self.left_alone = error.kind() == ErrorKind::TimedOut;
            return Err(error.into());
        }
        self.part_count += 1;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Writes the whole of an object, or the end of it.
    fn write_all(mut self, bytes: &[u8]) -> io::Result<Self> {
        for part in bytes.chunks(PART_BYTES) {
            self.write_part(part)?;
        }
        Ok(self)
    }

    fn publish_new(self) -> io::Result<()> {
        as_new(self.publish(Publish::New)?)
    }

    /// Makes the object visible, and says whether it could: whether there was nothing else of its name than there may be.
    fn publish(mut self, publish: Publish) -> io::Result<bool> {
        let leftover = self.place.leftover_key(self.id);
        let contents = Contents::new(self.bytes, self.id, None).encode();
        for _ in 0..TRIES_MAX {
            let old = self.place.entry()?;
            if !publish.may_replace(old.as_deref()) {
                return Ok(false);
            }
            let old = old.unwrap_or_default();
            let old_leftover = self.place.leftover_of(&old);
            let mut changes = vec![
                MapChange::Expect(&leftover, WRITING),
                MapChange::Expect(self.place.key(), &old),
                MapChange::Set(self.place.key(), &contents),
                MapChange::Remove(&leftover),
            ];
            changes.extend(old_leftover.iter().map(|key| MapChange::Set(key, &old)));
            if self.place.change(&changes)? {
                self.left_alone = true;
                if !old.is_empty() {
                    self.place.remove_leftovers()?;
                }
                return Ok(true);
            }
            if self.place.pool.map_value(&self.place.index(), &leftover)?.as_deref() != Some(WRITING) {
                let error = "what was written of it was tidied away by somebody else";
                return Err(io::Error::new(ErrorKind::ResourceBusy, error));
            }
        }
        Err(overtaken())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // What stays behind is not visible, and `tidy` removes it.
        if !self.left_alone && self.place.abandon(self.id).is_ok_and(|abandoned| abandoned) {
            self.place.remove_parts(self.id, self.part_count).ok();
        }
    }
}

struct Writer {
    object: ObjectName,
    buffer: BytesMut,
    stage: Stage,
}

enum Stage {
    /// All of it is in the buffer still.
    Buffered(Place),
    Begun(Unfinished),
    /// What a write that failed has left is unknown, so nothing may follow.
    Failed,
}

impl Stage {
    fn begin(self) -> io::Result<Unfinished> {
        match self {
            Self::Buffered(place) => Unfinished::begin(place),
            Self::Begun(unfinished) => Ok(unfinished),
            Self::Failed => Err(io::Error::other("an earlier write to it failed")),
        }
    }
}

impl Writer {
    async fn advance<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(Stage) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let stage = std::mem::replace(&mut self.stage, Stage::Failed);
        blocking("write", &self.object, move || work(stage)).await
    }
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.buffer.extend_from_slice(&bytes);
        let whole_parts_bytes = self.buffer.len() / PART_BYTES * PART_BYTES;
        if whole_parts_bytes > 0 {
            let parts = self.buffer.split_to(whole_parts_bytes);
            self.stage = Stage::Begun(self.advance(move |stage| stage.begin()?.write_all(&parts)).await?);
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<()> {
        let rest = self.buffer.split();
        let finish = move |stage: Stage| match stage {
            Stage::Buffered(place) => place.write_new(&rest),
            begun => begun.begin()?.write_all(&rest)?.publish_new(),
        };
        self.advance(finish).await
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let stage = std::mem::replace(&mut self.stage, Stage::Failed);
        if let (Stage::Begun(unfinished), Ok(runtime)) = (stage, Handle::try_current()) {
            runtime.spawn_blocking(move || drop(unfinished));
        }
    }
}
