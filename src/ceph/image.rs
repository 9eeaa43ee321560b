//! RBD images: opened, read and written with many requests under way at once, compared with their snapshots.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, SystemTime};
use std::{fmt, io, ptr};

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::librbd::*;
use super::rados::text_of;
use super::{Error, Pool, c_string, check, in_place, while_busy};

/// Snapshots, images or watchers that are asked for at first; when there are more, it is asked again.
const LIST_MAX: usize = 64;
/// How much longer than librados is waited for a request.
const SECONDS_MORE: u32 = 5;
/// An image is closed with a few requests, one after the other: its lock, its watch and its journal are given back.
const CLOSE_REQUESTS_MAX: u32 = 4;
/// Names of snapshots are never longer.
const NAME_BYTES_MAX: usize = 4096;
/// Metadata values are never longer: ours are ids.
const METADATA_BYTES_MAX: usize = 4096;

/// The features of an image; source: `rbd/features.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// Clones of snapshots.
    pub const LAYERING: Self = Self(1);
    /// Stripes of one's own choice.
    pub const STRIPING: Self = Self(2);
    /// One writer at a time.
    pub const EXCLUSIVE_LOCK: Self = Self(4);
    /// A map of the objects that are there.
    pub const OBJECT_MAP: Self = Self(8);
    /// A map of the objects that differ between snapshots.
    pub const FAST_DIFF: Self = Self(16);
    /// A journal of all writes.
    pub const JOURNALING: Self = Self(64);
    /// Those of a usual image.
    pub const USUAL: Self = Self(1 | 4 | 8 | 16);

    /// Whether all of `others` are among these.
    pub fn has(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }
}

impl std::ops::BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What an image is made with. Everything else is as the cluster is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewImage {
    /// Its size.
    pub bytes: u64,
    /// Its features.
    pub features: Features,
    /// The size and the number of its stripes; those of whole objects if absent.
    pub stripes: Option<(u64, u64)>,
}

/// How an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To be read. Others may write it.
    Read,
    /// To be written too.
    Write,
}

/// One snapshot of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id, which no other snapshot of the pool has or will have.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The size of the image when it was taken.
    pub bytes: u64,
}

/// A range of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// Whether there is anything; if not, it reads as zeros.
    pub exists: bool,
}

impl Extent {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// How finely two states of an image are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Diff {
    /// Object by object, out of the object map where the image has one.
    Objects,
    /// As finely as the cluster knows; asks for every object that may differ.
    Fine,
}

impl Pool {
    /// The names of all images of the pool.
    pub fn images(&self) -> Result<Vec<String>, Error> {
        let mut count = LIST_MAX;
        loop {
            let mut specs = Vec::with_capacity(count);
            // SAFETY: the pool is open, and the buffer has room for as many entries as told.
            let code = unsafe { rbd_list2(self.handle(), specs.as_mut_ptr(), &mut count) };
            if code == -erange() {
                continue;
            }
            check(code).map_err(|code| Error::operation("list the images of pool", self.name(), code))?;
            // SAFETY: librbd has filled that many entries with strings of its own, which are given back right here.
            return Ok(unsafe {
                specs.set_len(count);
                let names = specs.iter().map(|spec: &rbd_image_spec_t| string(spec.name)).collect();
                rbd_image_spec_list_cleanup(specs.as_mut_ptr(), count);
                names
            });
        }
    }

    /// Makes an image; fails with [`io::ErrorKind::AlreadyExists`] when there is one of that name.
    pub fn create_image(&self, name: &str, new: &NewImage) -> Result<(), Error> {
        let c_name = c_string(name)?;
        let (stripe_unit, stripe_count) = new.stripes.unwrap_or((0, 0));
        let settings = [
            (RBD_IMAGE_OPTION_FORMAT, 2),
            (RBD_IMAGE_OPTION_FEATURES, new.features.0),
            (RBD_IMAGE_OPTION_STRIPE_UNIT, stripe_unit),
            (RBD_IMAGE_OPTION_STRIPE_COUNT, stripe_count),
        ];
        let mut options = ptr::null_mut();
        // SAFETY: the options are made, filled, used and destroyed here; pool and name are valid for the calls.
        let code = unsafe {
            rbd_image_options_create(&mut options);
            let mut code = 0;
            for (option, value) in settings {
                code = code.min(rbd_image_options_set_uint64(options, option, value));
            }
            if code >= 0 {
                code = rbd_create4(self.handle(), c_name.as_ptr(), new.bytes, options);
            }
            rbd_image_options_destroy(options);
            code
        };
        check(code).map(drop).map_err(|code| Error::operation("create image", self.path(name), code))
    }

    /// Removes an image without snapshots; fails with [`io::ErrorKind::ResourceBusy`] while somebody has it open, and
    /// says whether it was there.
    pub fn remove_image(&self, name: &str) -> Result<bool, Error> {
        let c_name = c_string(name)?;
        // SAFETY: the pool is open, and the name is valid for the call.
        let code = unsafe { rbd_remove(self.handle(), c_name.as_ptr()) };
        match check(code).map_err(|code| Error::operation("remove image", self.path(name), code)) {
            Ok(_) => Ok(true),
            // librbd says so, too, of one in a pool that is full.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if !self.images()?.iter().any(|image| image == name) {
                    return Ok(false);
                }
                let why = "Ceph calls it missing, and still lists it: if the pool is full, make room, and try again";
                let error = io::Error::new(io::ErrorKind::StorageFull, why);
                Err(Error::Operation { action: "remove image", object: self.path(name), error })
            }
            Err(error) => Err(error),
        }
    }

    /// Gives an image another name; fails with [`io::ErrorKind::AlreadyExists`] when that is taken.
    pub fn rename_image(&self, from: &str, to: &str) -> Result<(), Error> {
        let (c_from, c_to) = (c_string(from)?, c_string(to)?);
        // SAFETY: the pool is open, and the names are valid for the call.
        let code = unsafe { rbd_rename(self.handle(), c_from.as_ptr(), c_to.as_ptr()) };
        check(code).map(drop).map_err(|code| Error::operation("rename image", self.path(from), code))
    }

    /// Opens an image, or one of its snapshots.
    pub fn open_image(&self, name: &str, snapshot: Option<&str>, mode: Mode) -> Result<Image, Error> {
        let c_name = c_string(name)?;
        let c_snapshot = snapshot.map(c_string).transpose()?;
        let snapshot_ptr = c_snapshot.as_ref().map_or(ptr::null(), |name| name.as_ptr());
        let open = match mode {
            Mode::Read => rbd_open_read_only,
            Mode::Write => rbd_open,
        };
        let mut handle = ptr::null_mut();
        let path = match snapshot {
            Some(snapshot) => format!("{}@{snapshot}", self.path(name)),
            None => self.path(name),
        };
        // SAFETY: the pool is open, and the names are valid for the call. After success the handle is ours, and
        // `Image` gives it back once.
        check(unsafe { open(self.handle(), c_name.as_ptr(), &mut handle, snapshot_ptr) })
            .map_err(|code| Error::operation("open image", &path, code))?;
        // Whoever waits must outlive librados, which ends what takes too long itself.
        let seconds = self.cluster().seconds_max().saturating_add(SECONDS_MORE);
        let request_time_max = Duration::from_secs(seconds.into());
        let (gave_up, in_flight) = (AtomicBool::new(false), Arc::default());
        Ok(Image { handle, path, request_time_max, gave_up, in_flight, pool: self.clone() })
    }

    fn path(&self, image: &str) -> String {
        format!("{}/{image}", self.name())
    }
}

/// An open image, or an open snapshot of one. Dropping it waits for what is under way, and blocks; other tasks of the thread
/// go on meanwhile.
///
/// librados gives up what takes longer than [`super::Access::operation_seconds_max`]. librbd does not: a client that the
/// cluster has shut out may wait for the image's lock for ever, and one that is to close an image whose cluster is away for
/// its watch. So a request is waited for a little longer than that and is then an error, and an image that still has one
/// under way then, or is not closed in time, is left to a thread that closes it when librbd has an answer after all.
pub struct Image {
    handle: rbd_image_t,
    path: String,
    request_time_max: Duration,
    /// Whether a request has had no answer in time.
    gave_up: AtomicBool,
    in_flight: Arc<InFlight>,
    /// Must outlive the handle.
    pool: Pool,
}

// SAFETY: librbd serialises access to an open image itself, and allows any number of threads. What would not be safe,
// setting another snapshot while others read, is done nowhere.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

impl Drop for Image {
    fn drop(&mut self) {
        in_place(|| {
            // What was given up once is not waited for again.
            let time_max = match self.gave_up.load(Ordering::Relaxed) {
                true => Duration::ZERO,
                false => self.request_time_max,
            };
            let (handle, pool, in_flight) = (Handle(self.handle), self.pool.clone(), self.in_flight.clone());
            let (sender, closed) = mpsc::channel();
            let thread = thread::Builder::new().name("close".into()).spawn(move || {
                // However long that takes: until it is closed, nobody else gets its lock.
                in_flight.wait();
                // SAFETY: the handle came from an open, no request is under way, and nobody has it after this.
                let code = unsafe { rbd_close(handle.into_inner()) };
                drop(pool);
                // Nobody may be waiting any more.
                sender.send(code).ok();
            });
            if let Err(error) = thread {
                tracing::warn!(image = self.path, %error, "an image stays open: there is no thread to close it");
                std::mem::forget(self.pool.clone());
                return;
            }
            if !self.in_flight.wait_for_none(time_max) {
                tracing::warn!(
                    image = self.path,
                    "an image stays open until librbd ends what was asked of it"
                );
                return;
            }
            match closed.recv_timeout(self.request_time_max * CLOSE_REQUESTS_MAX) {
                Ok(code) if code >= 0 => {}
                Ok(code) => {
                    tracing::warn!(image = self.path, error = %super::os_error(code), "an image could not be closed cleanly");
                }
                Err(_) => {
                    tracing::warn!(image = self.path, "an image stays open: librbd does not close it");
                }
            }
        });
    }
}

/// An image's handle on its way to the thread that closes it.
struct Handle(rbd_image_t);

// SAFETY: librbd lets any thread close an image.
unsafe impl Send for Handle {}

impl Handle {
    fn into_inner(self) -> rbd_image_t {
        self.0
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({})", self.path)
    }
}

impl Image {
    /// Its pool and name, and its snapshot if it is one.
    pub fn path(&self) -> &str {
        &self.path
    }

    fn failed(&self, action: &'static str) -> impl Fn(c_int) -> Error {
        move |code| Error::operation(action, &self.path, code)
    }

    fn stat(&self) -> Result<rbd_image_info_t, Error> {
        let mut info = rbd_image_info_t {
            size: 0,
            obj_size: 0,
            num_objs: 0,
            order: 0,
            block_name_prefix: [0; 24],
            parent_pool: 0,
            parent_name: [0; 96],
        };
        // SAFETY: the image is open, and librbd fills at most the size that is told.
        check(unsafe { rbd_stat(self.handle, &mut info, size_of::<rbd_image_info_t>()) })
            .map_err(self.failed("look at image"))?;
        Ok(info)
    }

    /// Its size, now or when the snapshot was taken.
    pub fn bytes(&self) -> Result<u64, Error> {
        Ok(self.stat()?.size)
    }

    /// The size of its objects.
    pub fn object_bytes(&self) -> Result<u64, Error> {
        Ok(self.stat()?.obj_size)
    }

    /// Its id, which another image of the same name has not.
    pub fn id(&self) -> Result<String, Error> {
        let mut text = [0; 256];
        // SAFETY: the image is open, and the buffer has the length that is told.
        check(unsafe { rbd_get_id(self.handle, text.as_mut_ptr(), text.len()) })
            .map_err(self.failed("get the id of image"))?;
        Ok(text_of(&text))
    }

    /// When it was last written to, or made, by the cluster's clock; Ceph writes that down once a minute.
    pub fn modified(&self) -> Result<SystemTime, Error> {
        let mut time = timespec::default();
        // SAFETY: the image is open, and the pointer is to a local of the type that librbd fills.
        check(unsafe { rbd_get_modify_timestamp(self.handle, &mut time) })
            .map_err(self.failed("get the time of image"))?;
        Ok(time.into())
    }

    /// When a snapshot of it was taken, by the cluster's clock.
    pub fn taken(&self, snapshot: &Snapshot) -> Result<SystemTime, Error> {
        let mut time = timespec::default();
        // SAFETY: the image is open, and the pointer is to a local of the type that librbd fills.
        check(unsafe { rbd_snap_get_timestamp(self.handle, snapshot.id, &mut time) })
            .map_err(self.failed("get the time of a snapshot of image"))?;
        Ok(time.into())
    }

    /// Its features.
    pub fn features(&self) -> Result<Features, Error> {
        self.number(rbd_get_features, "get the features of image").map(Features)
    }

    /// Whether its maps of objects may be wrong, as Ceph says itself.
    pub fn maps_invalid(&self) -> Result<bool, Error> {
        Ok(self.number(rbd_get_flags, "get the flags of image")? != 0)
    }

    /// The size and the number of its stripes.
    pub fn stripes(&self) -> Result<(u64, u64), Error> {
        let action = "get the stripes of image";
        Ok((self.number(rbd_get_stripe_unit, action)?, self.number(rbd_get_stripe_count, action)?))
    }

    fn number(
        &self,
        get: unsafe extern "C" fn(rbd_image_t, *mut u64) -> c_int,
        action: &'static str,
    ) -> Result<u64, Error> {
        let mut number = 0;
        // SAFETY: every function given here takes an open image and a pointer to fill.
        check(unsafe { get(self.handle, &mut number) }).map_err(self.failed(action))?;
        Ok(number)
    }

    /// Gives it another size.
    pub fn resize(&self, bytes: u64) -> Result<(), Error> {
        extern "C" fn ignore(_: u64, _: u64, _: *mut c_void) -> c_int {
            0
        }
        // SAFETY: the image is open; the callback takes any argument, so none is given.
        check(unsafe { rbd_resize2(self.handle, bytes, true, ignore, ptr::null_mut()) })
            .map(drop)
            .map_err(self.failed("resize image"))
    }

    /// Its snapshots, the oldest first, but for those in the trash.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let all = self.snapshots_and_trash()?;
        Ok(all.into_iter().filter(|(_, trashed)| !trashed).map(|(snapshot, _)| snapshot).collect())
    }

    /// The snapshots in its trash, with the names that they had: each goes there first that is removed, and stays there
    /// when that is broken off, or for as long as it has clones.
    pub fn trashed_snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let mut trashed: Vec<Snapshot> = Vec::new();
        for (snapshot, _) in self.snapshots_and_trash()?.into_iter().filter(|(_, trashed)| *trashed) {
            let mut name = [0; NAME_BYTES_MAX];
            // SAFETY: the image is open, and the buffer has the length that is told.
            let code = unsafe {
                rbd_snap_get_trash_namespace(self.handle, snapshot.id, name.as_mut_ptr(), name.len())
            };
            match check(code).map_err(self.failed("look into the trash of image")) {
                Ok(_) => trashed.push(Snapshot { name: text_of(&name), ..snapshot }),
                // It has gone since.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(trashed)
    }

    /// All its snapshots, and whether each is in the trash, where it has a name of Ceph's own.
    fn snapshots_and_trash(&self) -> Result<Vec<(Snapshot, bool)>, Error> {
        let mut count = LIST_MAX as c_int;
        loop {
            // One more than told: librbd ends the list with an entry without a name.
            let mut infos: Vec<rbd_snap_info_t> = Vec::with_capacity(count as usize + 1);
            // SAFETY: the image is open, and the buffer has room for as many entries as told.
            let code = unsafe { rbd_snap_list(self.handle, infos.as_mut_ptr(), &mut count) };
            if code == -erange() {
                continue;
            }
            let found = check(code).map_err(self.failed("list the snapshots of image"))? as usize;
            let mut snapshots: Vec<(Snapshot, bool)> = Vec::with_capacity(found);
            if found > 0 {
                // SAFETY: librbd has filled that many entries, and one that ends the list, with strings of its own,
                // which are given back right here.
                unsafe {
                    infos.set_len(found);
                    for info in &infos {
                        let snapshot = Snapshot { id: info.id, name: string(info.name), bytes: info.size };
                        let mut kind = 0;
                        // One that has gone since it was listed is in no trash.
                        let code = rbd_snap_get_namespace_type(self.handle, info.id, &mut kind);
                        snapshots.push((snapshot, code == 0 && kind == RBD_SNAP_NAMESPACE_TYPE_TRASH));
                    }
                    rbd_snap_list_end(infos.as_mut_ptr());
                }
            }
            snapshots.sort_by_key(|(snapshot, _)| snapshot.id);
            return Ok(snapshots);
        }
    }

    /// Takes a snapshot; fails with [`io::ErrorKind::AlreadyExists`] when there is one of that name.
    pub fn create_snapshot(&self, name: &str) -> Result<(), Error> {
        let c_name = c_string(name)?;
        // SAFETY: the image is open, and the name is valid for the call.
        check(unsafe { rbd_snap_create(self.handle, c_name.as_ptr()) }).map(drop).map_err(|code| {
            Error::operation("take snapshot", format!("{}@{name}", self.path), unanswered(code))
        })
    }

    /// Removes a snapshot; says whether it was there. Fails with [`io::ErrorKind::ResourceBusy`] while it is protected.
    pub fn remove_snapshot(&self, name: &str) -> Result<bool, Error> {
        let c_name = c_string(name)?;
        // SAFETY: the image is open, and the name is valid for the call.
        let code = unsafe { rbd_snap_remove(self.handle, c_name.as_ptr()) };
        let (action, snapshot) = ("remove snapshot", format!("{}@{name}", self.path));
        match check(code).map_err(|code| Error::operation(action, &snapshot, unanswered(code))) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let why = "it is protected, or in use: `rbd children` tells which clones there are of it, and \
                           `rbd snap unprotect` lets go of one that has none";
                let error = io::Error::new(io::ErrorKind::ResourceBusy, why);
                Err(Error::Operation { action, object: snapshot, error })
            }
            Err(error) => Err(error),
        }
    }

    /// Removes those of its snapshots that are `wanted`, also those whose removal was broken off before; waits for a while
    /// for one that is in use. One that has clones stays in the trash, until Ceph removes it with the last of them.
    pub fn remove_snapshots(&self, wanted: impl Fn(&Snapshot) -> bool) -> Result<(), Error> {
        for snapshot in self.snapshots()?.iter().filter(|snapshot| wanted(snapshot)) {
            while_busy(|| self.remove_snapshot(&snapshot.name))?;
        }
        self.remove_trashed(wanted)
    }

    /// The same, but without waiting: one that is in use stays, which is an error when the others are gone.
    pub fn remove_unused_snapshots(&self, wanted: impl Fn(&Snapshot) -> bool) -> Result<(), Error> {
        let mut removed = Ok(());
        for snapshot in self.snapshots()?.iter().filter(|snapshot| wanted(snapshot)) {
            match self.remove_snapshot(&snapshot.name) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    removed = removed.and(Err(error))
                }
                gone => drop(gone?),
            }
        }
        self.remove_trashed(wanted)?;
        removed
    }

    /// Removes what is left of `wanted` snapshots whose removal was broken off, unless it has clones.
    fn remove_trashed(&self, wanted: impl Fn(&Snapshot) -> bool) -> Result<(), Error> {
        for snapshot in self.trashed_snapshots()?.iter().filter(|snapshot| wanted(snapshot)) {
            // SAFETY: the image is open.
            let code = unsafe { rbd_snap_remove_by_id(self.handle, snapshot.id) };
            match check(code).map_err(|code| {
                let path = format!("{}@{}", self.path, snapshot.name);
                Error::operation("remove snapshot", path, unanswered(code))
            }) {
                Ok(_) => {}
                Err(error)
                    if [io::ErrorKind::NotFound, io::ErrorKind::ResourceBusy].contains(&error.kind()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes sure that nobody else writes to it while it is open. Who held its lock and still lives keeps it, and this
    /// fails with [`io::ErrorKind::ReadOnlyFilesystem`] or [`io::ErrorKind::ResourceBusy`].
    pub fn lock(&self) -> Result<(), Error> {
        // SAFETY: the image is open.
        check(unsafe { rbd_lock_acquire(self.handle, RBD_LOCK_MODE_EXCLUSIVE) })
            .map(drop)
            .map_err(self.failed("lock image"))
    }

    /// Takes its lock away from whoever holds it, and has the cluster refuse all that they still write. Says whether
    /// somebody held it.
    pub fn break_lock(&self) -> Result<bool, Error> {
        let (mut mode, mut owners, mut count) = (0, [ptr::null_mut(); 8], 8);
        // SAFETY: the image is open, and the array has room for as many owners as told.
        let code = unsafe { rbd_lock_get_owners(self.handle, &mut mode, owners.as_mut_ptr(), &mut count) };
        match check(code).map_err(self.failed("find who has locked image")) {
            Ok(_) if count == 0 => return Ok(false),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
        let mut broken = Ok(());
        for owner in &owners[..count] {
            // SAFETY: librbd has filled that many entries with strings of its own.
            let code = unsafe { rbd_lock_break(self.handle, mode, *owner) };
            broken = broken.and(check(code).map(drop));
        }
        // SAFETY: as above; they are given back once.
        unsafe { rbd_lock_get_owners_cleanup(owners.as_mut_ptr(), count) };
        match broken.map_err(self.failed("break the lock of image")) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// How many have it open to write, this one included.
    pub fn watcher_count(&self) -> Result<usize, Error> {
        let mut count = LIST_MAX;
        loop {
            let mut watchers: Vec<rbd_image_watcher_t> = Vec::with_capacity(count);
            // SAFETY: the image is open, and the buffer has room for as many entries as told.
            let code = unsafe { rbd_watchers_list(self.handle, watchers.as_mut_ptr(), &mut count) };
            if code == -erange() {
                continue;
            }
            check(code).map_err(self.failed("find who has image open:"))?;
            // SAFETY: librbd has filled that many entries with strings of its own, which are given back right here.
            unsafe { rbd_watchers_list_cleanup(watchers.as_mut_ptr(), count) };
            return Ok(count);
        }
    }

    /// A value that was kept with the image.
    pub fn metadata(&self, key: &str) -> Result<Option<String>, Error> {
        let c_key = c_string(key)?;
        let (mut text, mut length) = (vec![0; METADATA_BYTES_MAX], METADATA_BYTES_MAX);
        // SAFETY: the image is open, the key is valid for the call, and the buffer has the length that is told.
        let code = unsafe { rbd_metadata_get(self.handle, c_key.as_ptr(), text.as_mut_ptr(), &mut length) };
        match check(code).map_err(self.failed("read the metadata of image")) {
            Ok(_) => Ok(Some(text_of(&text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps a value with the image.
    pub fn set_metadata(&self, key: &str, value: &str) -> Result<(), Error> {
        let (c_key, c_value) = (c_string(key)?, c_string(value)?);
        // SAFETY: the image is open, and both strings are valid for the call.
        check(unsafe { rbd_metadata_set(self.handle, c_key.as_ptr(), c_value.as_ptr()) })
            .map(drop)
            .map_err(self.failed("write the metadata of image"))
    }

    /// Removes a value that was kept with the image, if it is there.
    pub fn remove_metadata(&self, key: &str) -> Result<(), Error> {
        let c_key = c_string(key)?;
        // SAFETY: the image is open, and the key is valid for the call.
        let code = unsafe { rbd_metadata_remove(self.handle, c_key.as_ptr()) };
        match check(code).map_err(self.failed("remove metadata of image")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// What of `range` differs from the snapshot `from`, or, without one, what there is of it; in order. Goes through
    /// the parents of a clone. Memory grows with the number of extents: ask for one range after the other.
    pub fn diff(&self, from: Option<&str>, range: Range<u64>, diff: Diff) -> Result<Vec<Extent>, Error> {
        extern "C" fn collect(offset: u64, length: usize, exists: c_int, arg: *mut c_void) -> c_int {
            // SAFETY: the argument is the vector below, which nobody else touches until the diff has returned: librbd
            // calls back from one thread at a time.
            let extents = unsafe { &mut *arg.cast::<Vec<Extent>>() };
            extents.push(Extent { offset, length: length as u64, exists: exists != 0 });
            0
        }
        let c_from = from.map(c_string).transpose()?;
        let from_ptr = c_from.as_ref().map_or(ptr::null(), |name| name.as_ptr());
        let mut extents: Vec<Extent> = Vec::new();
        // SAFETY: the image is open, the name is valid for the call, and so is the vector that the callback is given.
        let code = unsafe {
            rbd_diff_iterate2(
                self.handle,
                from_ptr,
                range.start,
                range.end - range.start,
                1,
                (diff == Diff::Objects).into(),
                collect,
                ptr::from_mut(&mut extents).cast(),
            )
        };
        check(code).map_err(self.failed("find what has changed in image"))?;
        extents.sort_by_key(|extent| extent.offset);
        Ok(extents)
    }

    /// Reads `length` bytes from `offset` on; fails with [`io::ErrorKind::UnexpectedEof`] where the image ends before.
    pub async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        let buffer = Buffer::Read(Vec::with_capacity(length));
        let (read, buffer) = self
            .submit("read image", buffer, |handle, bytes, completion| {
                // SAFETY: see `submit`; the buffer has room for the length that is told.
                unsafe { rbd_aio_read(handle, offset, length, bytes, completion) }
            })
            .await?;
        match buffer {
            Buffer::Read(mut bytes) if read as usize == length => {
                // SAFETY: there is room for it, and librbd says that it has filled so much from the beginning.
                unsafe { bytes.set_len(length) };
                Ok(bytes)
            }
            _ => Err(Error::Operation {
                action: "read image",
                object: self.path.clone(),
                error: io::ErrorKind::UnexpectedEof.into(),
            }),
        }
    }

    /// Writes `bytes` from `offset` on. When this is given up before its end, it may still be done.
    pub async fn write(&self, offset: u64, bytes: Bytes) -> Result<(), Error> {
        let length = bytes.len();
        self.submit("write image", Buffer::Write(bytes), |handle, bytes, completion| {
            // SAFETY: see `submit`; the buffer has the length that is told.
            unsafe { rbd_aio_write(handle, offset, length, bytes, completion) }
        })
        .await
        .map(drop)
    }

    /// Makes a range read as zeros, and frees what of it is whole objects.
    pub async fn write_zeroes(&self, offset: u64, length: usize) -> Result<(), Error> {
        self.submit("write zeros to image", Buffer::None, |handle, _, completion| {
            // SAFETY: see `submit`.
            unsafe { rbd_aio_write_zeroes(handle, offset, length, completion, 0, 0) }
        })
        .await
        .map(drop)
    }

    /// Gives a range back. What it reads as then is not certain at its ends: librbd skips what is no whole object.
    pub async fn discard(&self, offset: u64, length: u64) -> Result<(), Error> {
        self.submit("discard a range of image", Buffer::None, |handle, _, completion| {
            // SAFETY: see `submit`.
            unsafe { rbd_aio_discard(handle, offset, length, completion) }
        })
        .await
        .map(drop)
    }

    /// Makes everything durable that was written before.
    pub async fn flush(&self) -> Result<(), Error> {
        self.submit("flush image", Buffer::None, |handle, _, completion| {
            // SAFETY: see `submit`.
            unsafe { rbd_aio_flush(handle, completion) }
        })
        .await
        .map(drop)
    }

    /// Starts a request and waits for its end. The buffer belongs to the request until then, whether somebody still
    /// waits or not, and the image is not closed before: so `start` may hand librbd the pointer to its bytes.
    fn submit(
        &self,
        action: &'static str,
        buffer: Buffer,
        start: impl FnOnce(rbd_image_t, *mut c_char, rbd_completion_t) -> c_int,
    ) -> impl Future<Output = Result<(isize, Buffer), Error>> + Send {
        let (sender, receiver) = oneshot::channel();
        let answer = self.answer(action, receiver);
        let mut request = Box::new(Request { buffer, sender, in_flight: self.in_flight.clone() });
        // A pointer, because the request may be at its end, and freed, before `start` returns.
        let bytes = request.buffer.bytes();
        let mut completion = ptr::null_mut();
        let request = Box::into_raw(request);
        // SAFETY: `finished` takes exactly this argument, once. Fails only for want of memory.
        let code = unsafe { rbd_aio_create_completion(request.cast(), finished, &mut completion) };
        if let Err(code) = check(code) {
            // SAFETY: without a completion nobody else has the request.
            unsafe { Box::from_raw(request) }.sender.send((code as isize, Buffer::None)).ok();
            return answer;
        }
        self.in_flight.begin();
        let code = start(self.handle, bytes, completion);
        if code < 0 {
            // SAFETY: a request that was refused is not called back for: request and completion are still ours.
            unsafe {
                rbd_aio_release(completion);
                Box::from_raw(request).finish(code as isize);
            }
        }
        answer
    }

    /// Waits for the end of a request.
    async fn answer(
        &self,
        action: &'static str,
        receiver: oneshot::Receiver<(isize, Buffer)>,
    ) -> Result<(isize, Buffer), Error> {
        match timeout(self.request_time_max, receiver).await {
            Ok(Ok((result, buffer))) if result >= 0 => Ok((result, buffer)),
            Ok(Ok((code, _))) => Err(Error::operation(action, &self.path, code as c_int)),
            // Not reached: a request always answers.
            Ok(Err(_)) => Err(Error::operation(action, &self.path, -einval())),
            Err(_) => {
                self.gave_up.store(true, Ordering::Relaxed);
                let why = format!(
                    "timed out: no answer within {} s; has another client taken the image over, or is the cluster away?",
                    self.request_time_max.as_secs()
                );
                let error = io::Error::new(io::ErrorKind::TimedOut, why);
                Err(Error::Operation { action, object: self.path.clone(), error })
            }
        }
    }
}

/// Is called by librbd, on a thread of its own, when a request has come to its end.
extern "C" fn finished(completion: rbd_completion_t, arg: *mut c_void) {
    // SAFETY: the argument is the request that `submit` made for this completion, and nobody else has it any more. The
    // completion may be released from its own callback, and is released once.
    let (result, request) = unsafe {
        let result = rbd_aio_get_return_value(completion);
        rbd_aio_release(completion);
        (result, Box::from_raw(arg.cast::<Request>()))
    };
    request.finish(result);
}

/// Bytes that a request reads into or writes from.
enum Buffer {
    None,
    Read(Vec<u8>),
    Write(Bytes),
}

impl Buffer {
    /// Where its bytes are, or come to; librbd only reads those that it is to write.
    fn bytes(&mut self) -> *mut c_char {
        match self {
            Self::None => ptr::null_mut(),
            Self::Read(bytes) => bytes.as_mut_ptr().cast(),
            Self::Write(bytes) => bytes.as_ptr().cast_mut().cast(),
        }
    }
}

/// A request that is under way.
struct Request {
    buffer: Buffer,
    sender: oneshot::Sender<(isize, Buffer)>,
    in_flight: Arc<InFlight>,
}

impl Request {
    fn finish(self, result: isize) {
        let Self { buffer, sender, in_flight } = self;
        // Nobody may be waiting any more.
        sender.send((result, buffer)).ok();
        in_flight.end();
    }
}

/// Counts the requests that are under way.
#[derive(Default)]
struct InFlight {
    count: Mutex<usize>,
    changed: Condvar,
}

impl InFlight {
    fn count(&self) -> MutexGuard<'_, usize> {
        // Nothing panics while it holds the lock.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) {
        *self.count() += 1;
    }

    fn end(&self) {
        *self.count() -= 1;
        self.changed.notify_all();
    }

    /// Waits for as long as there is one.
    fn wait(&self) {
        drop(self.changed.wait_while(self.count(), |count| *count > 0));
    }

    /// Waits at most so long; says whether none is left.
    fn wait_for_none(&self, time_max: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.count(), time_max, |count| *count > 0);
        let (count, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *count == 0
    }
}

impl From<timespec> for SystemTime {
    fn from(time: timespec) -> Self {
        Self::UNIX_EPOCH
            + Duration::new(
                time.tv_sec.try_into().unwrap_or_default(),
                time.tv_nsec.try_into().unwrap_or_default(),
            )
    }
}

/// A string of librbd's.
///
/// # Safety
/// The pointer must be to a string that ends with a zero byte.
unsafe fn string(text: *const c_char) -> String {
    // SAFETY: says the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The code of a change that librbd asks whoever holds the image's lock to make. When nobody answers, it says that the
/// answer cannot be read.
fn unanswered(code: c_int) -> c_int {
    let (unreadable, timed_out) = (rustix::io::Errno::BADMSG, rustix::io::Errno::TIMEDOUT);
    if code == -unreadable.raw_os_error() { -timed_out.raw_os_error() } else { code }
}

/// The list is longer than the room that was given for it.
fn erange() -> c_int {
    rustix::io::Errno::RANGE.raw_os_error()
}

fn einval() -> c_int {
    rustix::io::Errno::INVAL.raw_os_error()
}
