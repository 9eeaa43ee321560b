//! RBD images.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::future;
use tokio::runtime::Handle;

use super::{Before, Error, PARTIAL, Read, VolumeSource, VolumeTarget, class_of};
use crate::ceph::{self, Clusters, Diff, Extent, Features, Image, Mode, NewImage, Pool, Snapshot};
use crate::error::Class;
use crate::job::{RbdImage, SourceSnapshot};

/// How much of an image is looked at for data, or for changes, at once: what is found must fit in memory.
pub const WINDOW_BYTES: u64 = 16 << 30;
/// How much is made zero with one request; librbd takes less than 4 GiB.
const ZERO_BYTES_MAX: u64 = 1 << 30;
/// Changed objects that lie nearer to each other than this are looked at with one request.
const NEAR_BYTES: u64 = 128 << 20;

/// An image that is to be backed up, or a snapshot of one, before it is known under which name.
#[derive(Debug, Clone)]
pub struct RbdOrigin {
    pool: Pool,
    location: RbdImage,
    head: Arc<Image>,
    bytes: u64,
    /// The id of the snapshot that was named.
    named: Option<u64>,
}

impl RbdOrigin {
    /// Opens what the location names. Blocks.
    pub fn open(clusters: &Clusters, location: &RbdImage) -> Result<Self, Error> {
        let pool = clusters.connect(location.cluster.as_deref())?.pool(&location.pool)?;
        // Taking a snapshot counts as writing.
        let mode = if location.snapshot.is_some() { Mode::Read } else { Mode::Write };
        let head = pool.open_image(&location.image, location.snapshot.as_deref(), mode)?;
        let bytes = head.bytes()?;
        if bytes == 0 {
            return Err(Error::Empty { path: head.path().into() });
        }
        let mut location = location.clone();
        // Later there may be more clusters than one.
        location.cluster = location.cluster.or_else(|| clusters.only_name().map(ToOwned::to_owned));
        let named = match &location.snapshot {
            Some(name) => {
                head.snapshots()?.into_iter().find(|found| found.name == *name).map(|found| found.id)
            }
            None => None,
        };
        Ok(Self { pool, location, head: Arc::new(head), bytes, named })
    }

    /// Fails when the snapshot that a backup has been made of, the one `taken` for it or the one that was named, is not
    /// there any more: librbd does not tell who reads a snapshot that is gone, and gives zeros, or what was written
    /// later. Blocks.
    pub fn check_still_there(&self, taken: Option<&SourceSnapshot>) -> Result<(), Error> {
        let id = taken.and_then(|taken| taken.snapshot_id).or(self.named);
        still_there(&self.pool, &self.location.image, &self.head.id()?, id)
    }

    /// Fails when the snapshot of this id, which the volume has been compared with, is not there any more: librbd does not
    /// tell, and what was discarded since is then taken for unchanged. Blocks.
    pub fn check_compared(&self, snapshot_id: u64) -> Result<(), Error> {
        still_there(&self.pool, &self.location.image, &self.head.id()?, Some(snapshot_id))
    }

    /// Its size now.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The image as it is now, or the snapshot that was named.
    pub fn head(&self) -> &Arc<Image> {
        &self.head
    }

    /// Whether it is an image, of which a snapshot is to be taken, and not one itself.
    pub fn is_head(&self) -> bool {
        self.location.snapshot.is_none()
    }

    /// The snapshot of that name that is about to be taken; none of what is one itself. Blocks.
    pub fn snapshot_to_take(&self, name: &str) -> Result<Option<SourceSnapshot>, Error> {
        if !self.is_head() {
            return Ok(None);
        }
        let image = RbdImage { snapshot: Some(name.into()), ..self.location.clone() };
        Ok(Some(SourceSnapshot { image, image_id: self.head.id()?, snapshot_id: None }))
    }

    /// Removes snapshots that were taken of it for backups, as far as they are still there. One that is in use stays, which
    /// is an error when the others are gone. Blocks.
    pub fn trim(&self, taken: &[SourceSnapshot]) -> Result<(), ceph::Error> {
        self.head.remove_unused_snapshots(is_one_of(taken, &self.head.id()?))
    }

    /// The name of the snapshot of an earlier backup of a volume of `bytes`, if `volume`, which is of this image, can be
    /// compared with it; otherwise why not. Blocks.
    pub fn comparable(
        &self,
        volume: &RbdSource,
        earlier: Option<&SourceSnapshot>,
        bytes: u64,
    ) -> Result<String, Incomparable> {
        let image = || self.head.path().to_owned();
        let (true, Some(earlier)) = (self.is_head(), earlier) else { return Err(Incomparable::Unknown) };
        if self.head.id()? != earlier.image_id {
            return Err(Incomparable::OtherImage { image: image() });
        }
        let name = earlier.image.snapshot.as_deref();
        let found = self.head.snapshots()?.into_iter().find(|found| Some(&*found.name) == name);
        let Some(found) = found else { return Err(Incomparable::Gone { image: image() }) };
        if Some(found.id) != earlier.snapshot_id || found.bytes != bytes {
            return Err(Incomparable::OtherSnapshot { image: image() });
        }
        if self.head.maps_invalid()? || volume.image.maps_invalid()? {
            return Err(Incomparable::InvalidMap { image: image() });
        }
        Ok(found.name)
    }

    /// Takes the snapshot, if one is to be taken that is not yet, and opens it. Blocks; needs a runtime around it.
    pub fn freeze(&self, snapshot: Option<&SourceSnapshot>) -> Result<RbdSource, Error> {
        match snapshot.and_then(|snapshot| Some((snapshot.image.snapshot.as_deref()?, snapshot.snapshot_id)))
        {
            Some((name, id)) => {
                if id.is_none() {
                    self.head.create_snapshot(name)?;
                }
                let taken = self.head.snapshots()?.into_iter().find(|snapshot| snapshot.name == name);
                let mut source = RbdSource::open(&self.pool, &self.location.image, Some(name))?;
                source.snapshot_id = taken.map(|snapshot| snapshot.id);
                Ok(source)
            }
            None => RbdSource::open(&self.pool, &self.location.image, self.location.snapshot.as_deref()),
        }
    }
}

/// An image, or a snapshot of one, to back up.
#[derive(Debug)]
pub struct RbdSource {
    image: Arc<Image>,
    bytes: u64,
    snapshot_id: Option<u64>,
    /// The snapshot that it is compared with.
    earlier: Option<String>,
    runtime: Handle,
    data: Mutex<Window>,
}

/// The data of a part of an image.
#[derive(Debug, Default)]
struct Window {
    range: Range<u64>,
    data: Vec<Range<u64>>,
}

impl RbdSource {
    /// Opens an image, or a snapshot of it, to read. Blocks; needs a runtime around it.
    pub fn open(pool: &Pool, image: &str, snapshot: Option<&str>) -> Result<Self, Error> {
        let image = pool.open_image(image, snapshot, Mode::Read)?;
        let bytes = image.bytes()?;
        if bytes == 0 {
            return Err(Error::Empty { path: image.path().into() });
        }
        Ok(Self {
            image: Arc::new(image),
            bytes,
            snapshot_id: None,
            earlier: None,
            runtime: Handle::current(),
            data: Mutex::default(),
        })
    }

    /// The same, to be compared with an earlier snapshot of the image, which [`RbdOrigin::comparable`] has found.
    pub fn compared_with(self, earlier: String) -> Self {
        Self { earlier: Some(earlier), ..self }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// The id of the snapshot that was taken for it.
    pub fn snapshot_id(&self) -> Option<u64> {
        self.snapshot_id
    }
}

impl VolumeSource for RbdSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        // Nothing panics while it holds the lock.
        let mut window: MutexGuard<'_, Window> = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = offset;
        while at < end.min(self.bytes) {
            if !window.range.contains(&at) {
                let range = at..self.bytes.min(at + WINDOW_BYTES);
                let data = match existing(&self.image, range.clone()) {
                    Ok(data) => data,
                    Err(error) if class_of(error.kind()) == Class::Transient => return Err(error.into_io()),
                    Err(error) => {
                        tracing::warn!(%error, "what an image has cannot be told: all of it is read");
                        std::iter::once(range.clone()).collect()
                    }
                };
                *window = Window { range, data };
            }
            let index = window.data.partition_point(|data| data.end <= at);
            match window.data.get(index) {
                Some(data) if data.start >= end => return Ok(None),
                Some(data) => return Ok(Some(data.start.max(at)..data.end.min(end))),
                None => at = window.range.end,
            }
        }
        Ok(None)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.runtime.block_on(self.image.read(offset, buffer.len()));
        buffer.copy_from_slice(&bytes.map_err(ceph::Error::into_io)?);
        Ok(())
    }

    fn read_all(&self, reads: Vec<Read<'_>>) -> Result<(), (u64, io::Error)> {
        let reads = reads.into_iter().map(async |read| {
            let bytes = self.image.read(read.offset, read.buffer.len()).await;
            read.buffer.copy_from_slice(&bytes.map_err(|error| (read.offset, error.into_io()))?);
            Ok(())
        });
        self.runtime.block_on(future::try_join_all(reads)).map(drop)
    }

    fn changed(&self, range: Range<u64>) -> io::Result<Option<Vec<Range<u64>>>> {
        let Some(earlier) = &self.earlier else { return Ok(None) };
        let changed = changed(&self.image, earlier, range).map_err(ceph::Error::into_io)?;
        Ok(Some(changed.into_iter().map(|extent| extent.offset..extent.end()).collect()))
    }
}

/// Why nobody knows what has changed in an image since an earlier backup.
#[derive(Debug, thiserror::Error)]
pub enum Incomparable {
    /// The earlier backup was not made of a snapshot that is known, or the new one is of a snapshot that was named.
    #[error("one of the two was not made of a snapshot that was taken for it")]
    Unknown,
    /// There is another image of that name now.
    #[error("{image} is another image than the one that it was made of")]
    OtherImage {
        /// Which.
        image: String,
    },
    /// The snapshot of the earlier backup is gone.
    #[error("its snapshot on {image} is gone")]
    Gone {
        /// The image.
        image: String,
    },
    /// There is another snapshot of that name now.
    #[error("its snapshot on {image} is another one of that name")]
    OtherSnapshot {
        /// The image.
        image: String,
    },
    /// Ceph itself does not trust what it knows of the image.
    #[error("Ceph says that the object map of {image} is invalid: `rbd object-map rebuild` makes a new one")]
    InvalidMap {
        /// Which.
        image: String,
    },
    /// A Ceph cluster failed.
    #[error("the cluster failed: {0}")]
    Ceph(#[from] ceph::Error),
}

/// Fails unless an image, opened anew, still has this id, and a snapshot of that id if one is given. Blocks.
pub fn still_there(pool: &Pool, name: &str, image_id: &str, snapshot_id: Option<u64>) -> Result<(), Error> {
    let removed = || Error::RemovedMeanwhile { path: format!("{}/{name}", pool.name()) };
    let image = match pool.open_image(name, None, Mode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(removed()),
        image => image?,
    };
    let has = |id| Ok::<_, Error>(image.snapshots()?.iter().any(|snapshot| snapshot.id == id));
    if image.id()? != image_id || !snapshot_id.map_or(Ok(true), has)? {
        return Err(removed());
    }
    Ok(())
}

/// Removes snapshots that were taken of an image for backups, as far as they and the image are still there.
pub fn remove_snapshots(
    clusters: &Clusters,
    image: &RbdImage,
    taken: &[SourceSnapshot],
) -> Result<(), ceph::Error> {
    if taken.is_empty() {
        return Ok(());
    }
    let pool = match clusters.connect(image.cluster.as_deref())?.pool(&image.pool) {
        Err(error) if error.is_missing() => return Ok(()),
        pool => pool?,
    };
    let image = match pool.open_image(&image.image, None, Mode::Write) {
        Err(error) if error.is_missing() => return Ok(()),
        image => image?,
    };
    image.remove_snapshots(is_one_of(taken, &image.id()?))
}

/// Tells the snapshots that were taken from those of the image of this id.
fn is_one_of(taken: &[SourceSnapshot], image_id: &str) -> impl Fn(&Snapshot) -> bool {
    // Images and snapshots of the same name that were made later are other ones.
    move |found: &Snapshot| {
        taken.iter().any(|taken| {
            taken.image_id == image_id
                && taken.image.snapshot.as_ref() == Some(&found.name)
                && taken.snapshot_id.is_none_or(|id| id == found.id)
        })
    }
}

/// Removes the snapshots that are `wanted` from the first image of this name that has any, whatever cluster and pool it
/// is in. Says whether there was one.
pub fn remove_snapshots_somewhere(
    clusters: &Clusters,
    name: &str,
    wanted: impl Fn(&str) -> bool,
) -> Result<bool, ceph::Error> {
    let mut not_looked_at = None;
    for cluster in clusters.names() {
        let pools = clusters.connect(Some(cluster)).and_then(|cluster| Ok((cluster.pools()?, cluster)));
        let (pools, cluster) = match pools {
            Ok(found) => found,
            Err(error) => {
                not_looked_at.get_or_insert(error);
                continue;
            }
        };
        for pool in pools {
            let removed = cluster.pool(&pool).and_then(|pool| {
                let image = pool.open_image(name, None, Mode::Read)?;
                let mut found = image.snapshots()?.into_iter().chain(image.trashed_snapshots()?);
                if !found.any(|snapshot| wanted(&snapshot.name)) {
                    return Ok(false);
                }
                let image = pool.open_image(name, None, Mode::Write)?;
                image.remove_snapshots(|snapshot| wanted(&snapshot.name)).map(|()| true)
            });
            match removed {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                // The image is in another pool, and not every pool is ours to look into.
                Err(error)
                    if [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied].contains(&error.kind()) => {
                }
                Err(error) => drop(not_looked_at.get_or_insert(error)),
            }
        }
    }
    not_looked_at.map_or(Ok(false), Err)
}

/// What there is of a range of an image, in order, by whole objects where it has no finer knowledge.
pub fn existing(image: &Image, range: Range<u64>) -> Result<Vec<Range<u64>>, ceph::Error> {
    let extents = image.diff(None, range.clone(), Diff::Objects)?;
    let existing = joined(extents.into_iter().filter(|extent| extent.exists), &range, 0);
    Ok(existing.into_iter().map(|extent| extent.offset..extent.end()).collect())
}

/// What of a range of an image is not as it was in its snapshot `from`, in order.
pub fn changed(image: &Image, from: &str, range: Range<u64>) -> Result<Vec<Extent>, ceph::Error> {
    let objects = if image.features()?.has(Features::FAST_DIFF) {
        // The map of objects is read as a whole, and then only objects that have changed are asked for more.
        let objects = image.diff(Some(from), range.clone(), Diff::Objects)?;
        joined(objects.into_iter().map(|extent| Extent { exists: true, ..extent }), &range, NEAR_BYTES)
    } else {
        vec![Extent { offset: range.start, length: range.end - range.start, exists: true }]
    };
    let mut changed = Vec::new();
    for objects in objects {
        let range = objects.offset..objects.end();
        changed.extend(joined(image.diff(Some(from), range.clone(), Diff::Fine)?, &range, 0));
    }
    Ok(changed)
}

/// The extents within `range`, in order; those of one kind that lie nearer to each other than `near_bytes` as one.
fn joined(extents: impl IntoIterator<Item = Extent>, range: &Range<u64>, near_bytes: u64) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for extent in extents {
        let (start, end) = (extent.offset.max(range.start), extent.end().min(range.end));
        match joined.last_mut() {
            _ if start >= end => {}
            Some(last) if start <= last.end() + near_bytes && last.exists == extent.exists => {
                last.length = last.end().max(end) - last.offset;
            }
            _ => joined.push(Extent { offset: start, length: end - start, exists: extent.exists }),
        }
    }
    joined
}

/// The key under which an image that is not whole yet says what is restored onto it, and by whom.
const RESTORE_KEY: &str = "backhaul.restore";
/// The key under which it says how far that is.
const NOTE_KEY: &str = "backhaul.restored";

/// An image to restore onto.
///
/// One that is not there yet is written under another name beside it, and gets its name when it is whole. What an attempt
/// that died has left of it is gone on with by the next one: all that was written there is of the same backup.
#[derive(Debug)]
pub struct RbdTarget {
    pool: Pool,
    /// None once it is closed.
    image: Mutex<Option<Arc<Image>>>,
    bytes: u64,
    before: Before,
    runtime: Handle,
    /// The name of an image that was not there before.
    new: Option<String>,
    /// What the attempt before noted.
    note: Option<String>,
    written: AtomicBool,
    /// Whether what is there under the name of one that is not whole stays: for the next attempt, or because this one is
    /// whole and has another name.
    stays: AtomicBool,
}

impl RbdTarget {
    /// Opens an image to hold `bytes`, or makes one of that size. Fails, and changes nothing, when it is smaller, or
    /// when anybody else has it open to write. `restore` names the job and the backup: a new image that an attempt of the
    /// same restore has left is taken away from it. Blocks; needs a runtime around it.
    pub fn open(clusters: &Clusters, location: &RbdImage, bytes: u64, restore: &str) -> Result<Self, Error> {
        if location.snapshot.is_some() {
            return Err(Error::NotAVolume { path: location.to_string() });
        }
        if location.image.ends_with(PARTIAL) {
            return Err(Error::ReservedName { path: location.to_string() });
        }
        let pool = &clusters.connect(location.cluster.as_deref())?.pool(&location.pool)?;
        let name = location.image.as_str();
        let found = pool.open_image(name, None, Mode::Write);
        let (image, before, new) = match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let image = match Self::take_over(pool, name, bytes, restore)? {
                    Some(begun) => begun,
                    None => Self::create(pool, name, bytes, restore)?,
                };
                (image, Before::Zeros, Some(name.to_owned()))
            }
            image => {
                let image = image?;
                if image.watcher_count()? > 1 {
                    return Err(Error::ImageInUse { path: image.path().into() });
                }
                // One without that feature cannot be locked, as those of a kernel client.
                if image.features()?.has(Features::EXCLUSIVE_LOCK) {
                    image.lock().map_err(|error| in_use(&image, error))?;
                }
                let target_bytes = image.bytes()?;
                if target_bytes < bytes {
                    let path = image.path().into();
                    return Err(Error::TooSmall { path, target_bytes, backup_bytes: bytes });
                }
                let before = if is_empty(&image, target_bytes)? { Before::Zeros } else { Before::Anything };
                (image, before, None)
            }
        };
        let bytes = image.bytes()?;
        let note = if new.is_some() { image.metadata(NOTE_KEY)? } else { None };
        let image = Mutex::new(Some(Arc::new(image)));
        let (pool, runtime) = (pool.clone(), Handle::current());
        let [written, stays] = [(); 2].map(|()| AtomicBool::new(false));
        Ok(Self { pool, image, bytes, before, runtime, new, note, written, stays })
    }

    /// Whether there is an image of that name, as far as one can see. Blocks.
    pub fn is_there(clusters: &Clusters, location: &RbdImage) -> bool {
        let opened = clusters
            .connect(location.cluster.as_deref())
            .and_then(|cluster| cluster.pool(&location.pool))
            .and_then(|pool| pool.open_image(&location.image, None, Mode::Read));
        opened.err().is_none_or(|error| error.kind() != io::ErrorKind::NotFound)
    }

    /// Removes the new image that an attempt of this restore has left, if there is one. Blocks.
    pub fn discard(clusters: &Clusters, location: &RbdImage, bytes: u64, restore: &str) -> Result<(), Error> {
        let pool = &clusters.connect(location.cluster.as_deref())?.pool(&location.pool)?;
        if let Some(image) = Self::take_over(pool, &location.image, bytes, restore)? {
            drop(image);
            pool.remove_image(&partial(&location.image))?;
        }
        Ok(())
    }

    /// Opens the new image that an attempt of the same restore has left, and has the cluster refuse all that this one, if
    /// it still lives, writes.
    fn take_over(pool: &Pool, name: &str, bytes: u64, restore: &str) -> Result<Option<Image>, Error> {
        let image = match pool.open_image(&partial(name), None, Mode::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            image => image?,
        };
        if image.metadata(RESTORE_KEY)?.as_deref() != Some(restore) || image.bytes()? != bytes {
            return Ok(None);
        }
        image.break_lock()?;
        image.lock().map_err(|error| in_use(&image, error))?;
        Ok(Some(image))
    }

    fn create(pool: &Pool, name: &str, bytes: u64, restore: &str) -> Result<Image, Error> {
        let hidden = partial(name);
        // One that is there is left of a restore that was killed, or belongs to one that runs: that one has it open.
        match pool.remove_image(&hidden) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Err(Error::ImageInUse { path: format!("{}/{name}", pool.name()) });
            }
            removed => removed?,
        };
        pool.create_image(&hidden, &NewImage { bytes, features: Features::USUAL, stripes: None })?;
        let image = pool.open_image(&hidden, None, Mode::Write)?;
        image.lock().map_err(|error| in_use(&image, error))?;
        image.set_metadata(RESTORE_KEY, restore)?;
        Ok(image)
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The image, to write to, until it is finished.
    pub fn image(&self) -> io::Result<Arc<Image>> {
        self.written.store(true, Ordering::Relaxed);
        // Nothing panics while it holds the lock.
        let image = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        image.clone().ok_or_else(|| io::Error::other("the target is finished"))
    }

    /// Lets go of the image.
    fn close(&self) {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// The name of a new image until it is whole.
fn partial(name: &str) -> String {
    format!("{name}{PARTIAL}")
}

fn in_use(image: &Image, error: ceph::Error) -> Error {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::ResourceBusy => {
            Error::ImageInUse { path: image.path().into() }
        }
        _ => error.into(),
    }
}

fn is_empty(image: &Image, bytes: u64) -> Result<bool, ceph::Error> {
    let mut offset = 0;
    while offset < bytes {
        let end = bytes.min(offset + WINDOW_BYTES);
        if !existing(image, offset..end)?.is_empty() {
            return Ok(false);
        }
        offset = end;
    }
    Ok(true)
}

impl VolumeTarget for RbdTarget {
    fn before(&self) -> Before {
        self.before
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let image = self.image()?;
        self.runtime
            .block_on(image.write(offset, Bytes::copy_from_slice(bytes)))
            .map_err(ceph::Error::into_io)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let image = self.image()?;
        let pieces = range.clone().step_by(ZERO_BYTES_MAX as usize);
        let zeroed =
            pieces.map(|start| image.write_zeroes(start, ZERO_BYTES_MAX.min(range.end - start) as usize));
        self.runtime.block_on(future::try_join_all(zeroed)).map(drop).map_err(ceph::Error::into_io)
    }

    fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    fn keep_note(&self, note: &str) -> io::Result<()> {
        if self.new.is_none() {
            return Ok(());
        }
        let image = self.image()?;
        self.runtime.block_on(image.flush()).map_err(ceph::Error::into_io)?;
        image.set_metadata(NOTE_KEY, note).map_err(ceph::Error::into_io)
    }

    fn is_changed(&self) -> bool {
        self.new.is_none() && self.written.load(Ordering::Relaxed)
    }

    fn leave(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    fn finish(&self) -> io::Result<()> {
        let image = self.image()?;
        self.runtime.block_on(image.flush()).map_err(ceph::Error::into_io)?;
        if self.new.is_some() {
            for key in [NOTE_KEY, RESTORE_KEY] {
                image.remove_metadata(key).map_err(ceph::Error::into_io)?;
            }
        }
        drop(image);
        self.close();
        let Some(name) = &self.new else { return Ok(()) };
        self.pool.rename_image(&partial(name), name).map_err(ceph::Error::into_io)?;
        self.leave();
        Ok(())
    }
}

impl Drop for RbdTarget {
    fn drop(&mut self) {
        ceph::in_place(|| {
            self.close();
            if let Some(name) = &self.new
                && !self.stays.load(Ordering::Relaxed)
                && let Err(error) = self.pool.remove_image(&partial(name))
            {
                tracing::warn!(%error, "an image that was not restored to its end is left behind");
            }
        });
    }
}
