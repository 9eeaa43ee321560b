//! RBD images.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::future;
use tokio::runtime::Handle;

use super::{Before, Error, VolumeSource, VolumeTarget};
use crate::ceph::{self, Diff, Extent, Features, Image, Mode, NewImage, Pool};

/// How much of an image is looked at for data, or for changes, at once: what is found must fit in memory.
pub const WINDOW_BYTES: u64 = 16 << 30;
/// How much is made zero with one request; librbd takes less than 4 GiB.
const ZERO_BYTES_MAX: u64 = 1 << 30;
/// Changed objects that lie nearer to each other than this are looked at with one request.
const NEAR_BYTES: u64 = 128 << 20;

/// An image, or a snapshot of one, to back up.
#[derive(Debug)]
pub struct RbdSource {
    image: Arc<Image>,
    bytes: u64,
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
        Ok(Self { image: Arc::new(image), bytes, runtime: Handle::current(), data: Mutex::default() })
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
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
                let data = existing(&self.image, range.clone()).map_err(ceph::Error::into_io)?;
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
}

/// What there is of a range of an image, in order, by whole objects where it has no finer knowledge.
pub fn existing(image: &Image, range: Range<u64>) -> Result<Vec<Range<u64>>, ceph::Error> {
    let extents = image.diff(None, range.clone(), Diff::Objects)?;
    Ok(joined(extents.into_iter().filter(|extent| extent.exists), &range, 0))
}

/// What of a range of an image is not as it was in its snapshot `from`, in order.
pub fn changed(image: &Image, from: &str, range: Range<u64>) -> Result<Vec<Range<u64>>, ceph::Error> {
    let objects = if image.features()?.has(Features::FAST_DIFF) {
        // The map of objects is read as a whole, and then only objects that have changed are asked for more.
        joined(image.diff(Some(from), range.clone(), Diff::Objects)?, &range, NEAR_BYTES)
    } else {
        vec![range.clone()]
    };
    let mut changed = Vec::new();
    for objects in objects {
        changed.extend(joined(image.diff(Some(from), objects.clone(), Diff::Fine)?, &objects, 0));
    }
    Ok(changed)
}

/// The extents within `range`, those that lie nearer to each other than `near_bytes` as one.
fn joined(extents: impl IntoIterator<Item = Extent>, range: &Range<u64>, near_bytes: u64) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for extent in extents {
        let (start, end) = (extent.offset.max(range.start), extent.end().min(range.end));
        match joined.last_mut() {
            _ if start >= end => {}
            Some(last) if start <= last.end + near_bytes => last.end = last.end.max(end),
            _ => joined.push(start..end),
        }
    }
    joined
}

/// An image to restore onto.
///
/// One that is not there yet is written under another name beside it, and gets its name when it is whole.
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
}

impl RbdTarget {
    /// Opens an image to hold `bytes`, or makes one of that size. Fails, and changes nothing, when it is smaller, or
    /// when anybody else has it open to write. Blocks; needs a runtime around it.
    pub fn open(pool: &Pool, name: &str, bytes: u64) -> Result<Self, Error> {
        let found = pool.open_image(name, None, Mode::Write);
        let (image, before, new) = match found {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                (Self::create(pool, name, bytes)?, Before::Zeros, Some(name.to_owned()))
            }
            image => {
                let image = image?;
                if image.watcher_count()? > 1 {
                    return Err(Error::InUse { path: image.path().into() });
                }
                image.lock().map_err(|error| in_use(&image, error))?;
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
        let image = Mutex::new(Some(Arc::new(image)));
        Ok(Self { pool: pool.clone(), image, bytes, before, runtime: Handle::current(), new })
    }

    fn create(pool: &Pool, name: &str, bytes: u64) -> Result<Image, Error> {
        let hidden = partial(name);
        // One that is there is left of a restore that was killed, or belongs to one that runs: that one has it open.
        match pool.remove_image(&hidden) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Err(Error::InUse { path: format!("{}/{name}", pool.name()) });
            }
            removed => removed?,
        };
        pool.create_image(&hidden, &NewImage { bytes, features: Features::USUAL, stripes: None })?;
        let image = pool.open_image(&hidden, None, Mode::Write)?;
        image.lock().map_err(|error| in_use(&image, error))?;
        Ok(image)
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The image, until it is finished.
    pub fn image(&self) -> io::Result<Arc<Image>> {
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
    format!("{name}.backhaul-partial")
}

fn in_use(image: &Image, error: ceph::Error) -> Error {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::ResourceBusy => {
            Error::InUse { path: image.path().into() }
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

    fn finish(&self) -> io::Result<()> {
        self.runtime.block_on(self.image()?.flush()).map_err(ceph::Error::into_io)?;
        self.close();
        let Some(name) = &self.new else { return Ok(()) };
        self.pool.rename_image(&partial(name), name).map_err(ceph::Error::into_io)
    }
}

impl Drop for RbdTarget {
    fn drop(&mut self) {
        self.close();
        if let Some(name) = &self.new
            && let Err(error) = self.pool.remove_image(&partial(name))
        {
            // It is gone already when the restore succeeded, which is no error.
            tracing::warn!(%error, "an image that was not restored to its end is left behind");
        }
    }
}
