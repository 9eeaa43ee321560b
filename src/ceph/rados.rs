//! Clusters, pools, and the plain objects in them.

use std::ffi::{CStr, c_char, c_int};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use std::{fmt, io, ptr, slice};

use ::ceph::rados;
use rustix::io::Errno;

use super::{Error, c_string, check, os_error};

/// What one request for the map of an object returns, at most; the cluster may allow less.
const ENTRIES_MAX: u64 = 1000;
/// How a value is to compare with an expected one; source: `LIBRADOS_CMPXATTR_OP_EQ` in `librados.h`.
const COMPARE_EQUAL: u8 = 1;
/// How an operation is told that an object must not exist; source: `LIBRADOS_CREATE_EXCLUSIVE` in `librados.h`.
const CREATE_EXCLUSIVE: c_int = 1;

unsafe extern "C" {
    /// In `librados.h` since Ceph 15, but not in the crate.
    fn rados_set_pool_full_try(io: rados::rados_ioctx_t);
    /// The same.
    fn rados_read_op_omap_get_vals2(
        op: rados::rados_read_op_t,
        start_after: *const c_char,
        filter_prefix: *const c_char,
        max_return: u64,
        iter: *mut rados::rados_omap_iter_t,
        pmore: *mut u8,
        prval: *mut c_int,
    );
}

/// A connection to a cluster. Clones share it; it ends with the last of them and of what was made with them.
#[derive(Clone)]
pub struct Cluster(Arc<Connection>);

struct Connection {
    handle: rados::rados_t,
    name: String,
    seconds_max: u32,
}

// SAFETY: librados serialises access to a cluster handle itself; its documentation allows any number of threads.
unsafe impl Send for Connection {}
// SAFETY: as above.
unsafe impl Sync for Connection {}

impl Cluster {
    /// Connects with a configuration file and a user, whose name goes without `client.`. Gives up after
    /// `seconds_max`, and so does everything that is done with the connection then.
    pub fn connect(conf: &Path, user: &str, seconds_max: u32) -> Result<Self, Error> {
        let failed = |code| Error::Connect { conf: conf.into(), user: user.into(), error: os_error(code) };
        let (id, path) = (c_string(user)?, std::ffi::CString::new(conf.as_os_str().as_bytes())?);
        let mut handle: rados::rados_t = ptr::null_mut();
        // SAFETY: both pointers are valid for the call; librados keeps neither. After success the handle is ours, and
        // `Connection` gives it back once, when it is dropped.
        check(unsafe { rados::rados_create(&mut handle, id.as_ptr()) }).map_err(failed)?;
        let connection = Connection { handle, name: conf.display().to_string(), seconds_max };
        // SAFETY: the handle was created above and is not yet connected; the path is valid for the call.
        check(unsafe { rados::rados_conf_read_file(connection.handle, path.as_ptr()) })
            .map_err(|code| Error::Conf { conf: conf.into(), error: unread(conf, os_error(code)) })?;
        let seconds = c_string(&seconds_max.to_string())?;
        let options = [
            // Without these a cluster that is down is waited for five minutes, or for ever.
            (c"client_mount_timeout", seconds.as_c_str()),
            (c"rados_mon_op_timeout", seconds.as_c_str()),
            (c"rados_osd_op_timeout", seconds.as_c_str()),
            // Everything is read and written once, so a cache only costs memory and copies.
            (c"rbd_cache", c"false"),
            // Nor need bytes be copied to be sent: ours do not change, and a write ends after librbd has let go of them.
            (c"rbd_disable_zero_copy_writes", c"false"),
        ];
        for (option, value) in options {
            // SAFETY: the handle is valid, and both strings are for the call.
            check(unsafe { rados::rados_conf_set(connection.handle, option.as_ptr(), value.as_ptr()) })
                .map_err(failed)?;
        }
        // SAFETY: the handle is valid, configured, and connected only here.
        check(unsafe { rados::rados_connect(connection.handle) }).map_err(failed)?;
        Ok(Self(Arc::new(connection)))
    }

    /// How long anything that is asked of the cluster may take.
    pub(super) fn seconds_max(&self) -> u32 {
        self.0.seconds_max
    }

    /// The names of all its pools.
    pub fn pools(&self) -> Result<Vec<String>, Error> {
        let mut text: Vec<u8> = Vec::new();
        loop {
            // SAFETY: the handle is connected, and the buffer has room for as many bytes as told.
            let length =
                unsafe { rados::rados_pool_list(self.0.handle, text.as_mut_ptr().cast(), text.len()) };
            let length = check(length)
                .map_err(|code| Error::operation("list the pools of the cluster of", &self.0.name, code))?;
            if length as usize <= text.len() {
                break;
            }
            // It says how much room it needs.
            text = vec![0; length as usize];
        }
        // Each ends with a zero byte, and the last one is followed by another.
        let names = text.split(|byte| *byte == 0).take_while(|name| !name.is_empty());
        Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
    }

    /// Opens a pool.
    pub fn pool(&self, name: &str) -> Result<Pool, Error> {
        let c_name = c_string(name)?;
        let mut handle: rados::rados_ioctx_t = ptr::null_mut();
        // SAFETY: the cluster is connected, and the name is valid for the call. After success the context is ours, and
        // `Context` gives it back once.
        check(unsafe { rados::rados_ioctx_create(self.0.handle, c_name.as_ptr(), &mut handle) })
            .map_err(|code| Error::operation("open pool", name, code))?;
        // A write to a pool that is full fails then, and a delete goes on; otherwise both would wait for room.
        // SAFETY: the context was made above, and nobody else has it yet.
        unsafe { rados_set_pool_full_try(handle) };
        Ok(Pool(Arc::new(Context { handle, name: name.into(), cluster: self.clone() })))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: the handle came from rados_create, which a shutdown undoes whether it was connected or not. Every
        // pool holds the connection, so that nobody has anything of it after this.
        unsafe { rados::rados_shutdown(self.handle) }
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cluster({})", self.0.name)
    }
}

/// A pool of a cluster, in its default namespace. Clones share it.
#[derive(Clone)]
pub struct Pool(Arc<Context>);

struct Context {
    handle: rados::rados_ioctx_t,
    name: String,
    /// Must outlive the handle.
    cluster: Cluster,
}

// SAFETY: librados allows the use of one I/O context from several threads; what would not be allowed, changing its
// namespace, locator or snapshot meanwhile, is done nowhere.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the handle came from rados_ioctx_create, and every image holds its pool, so that nobody uses it.
        unsafe { rados::rados_ioctx_destroy(self.handle) }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({})", self.0.name)
    }
}

impl Pool {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The cluster that it is in.
    pub fn cluster(&self) -> &Cluster {
        &self.0.cluster
    }

    /// For librbd, and for as long as the pool lives.
    pub(super) fn handle(&self) -> rados::rados_ioctx_t {
        self.0.handle
    }

    fn failed(&self, action: &'static str, object: &str) -> impl Fn(c_int) -> Error {
        let object = format!("{}/{object}", self.0.name);
        move |code| Error::operation(action, &object, code)
    }

    /// Writes a new object, whole; fails with [`io::ErrorKind::AlreadyExists`] when there is one of that name.
    pub fn create_object(&self, object: &str, bytes: &[u8]) -> Result<(), Error> {
        let name = c_string(object)?;
        let op = WriteOp::new();
        // SAFETY: the operation is valid. The bytes live until it has been operated, which is when they are copied.
        unsafe {
            rados::rados_write_op_create(op.0, CREATE_EXCLUSIVE, ptr::null());
            rados::rados_write_op_write_full(op.0, bytes.as_ptr().cast(), bytes.len());
        }
        op.operate(self, &name).map_err(self.failed("create", object))
    }

    /// Writes an object over the one that may be there; readers see the old one or the new one, whole.
    pub fn replace_object(&self, object: &str, bytes: &[u8]) -> Result<(), Error> {
        let name = c_string(object)?;
        // SAFETY: the context is open, and name and bytes are valid for the call, which blocks until it is done.
        let code = unsafe {
            rados::rados_write_full(self.0.handle, name.as_ptr(), bytes.as_ptr().cast(), bytes.len())
        };
        check(code).map(drop).map_err(self.failed("write", object))
    }

    /// Reads up to `bytes_max` from `offset` on; fewer where the object ends.
    pub fn read_object(&self, object: &str, offset: u64, bytes_max: usize) -> Result<Vec<u8>, Error> {
        let name = c_string(object)?;
        let mut bytes: Vec<u8> = Vec::with_capacity(bytes_max);
        // SAFETY: the context is open, the name valid for the call, and the buffer has room for what is asked for.
        let code = unsafe {
            rados::rados_read(self.0.handle, name.as_ptr(), bytes.as_mut_ptr().cast(), bytes_max, offset)
        };
        let read = check(code).map_err(self.failed("read", object))? as usize;
        // SAFETY: librados has written that many bytes from the beginning of the buffer, and never more than asked.
        unsafe { bytes.set_len(read.min(bytes_max)) };
        Ok(bytes)
    }

    /// The size of an object, if it is there.
    pub fn object_bytes(&self, object: &str) -> Result<Option<u64>, Error> {
        Ok(self.stat(object)?.map(|(bytes, _)| bytes))
    }

    /// When an object was last written, if it is there, by the clock of who wrote it.
    pub fn object_modified(&self, object: &str) -> Result<Option<SystemTime>, Error> {
        let modified = |seconds: i64| seconds.try_into().map(Duration::from_secs).unwrap_or_default();
        Ok(self.stat(object)?.map(|(_, seconds)| SystemTime::UNIX_EPOCH + modified(seconds)))
    }

    fn stat(&self, object: &str) -> Result<Option<(u64, i64)>, Error> {
        let name = c_string(object)?;
        let (mut bytes, mut modified) = (0, 0);
        // SAFETY: the context is open, and all pointers are valid for the call.
        let code = unsafe { rados::rados_stat(self.0.handle, name.as_ptr(), &mut bytes, &mut modified) };
        match check(code).map_err(self.failed("look at", object)) {
            Ok(_) => Ok(Some((bytes, modified))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes an object; says whether it was there.
    pub fn remove_object(&self, object: &str) -> Result<bool, Error> {
        let name = c_string(object)?;
        // SAFETY: the context is open, and the name is valid for the call.
        let code = unsafe { rados::rados_remove(self.0.handle, name.as_ptr()) };
        match check(code).map_err(self.failed("remove", object)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Changes the map of an object, all at once or not at all; says whether it did, which is so unless one of the
    /// expectations did not hold. An object that is not there is made by the first change, if that sets a key; otherwise
    /// it fails with [`io::ErrorKind::NotFound`].
    pub fn change_map(&self, object: &str, changes: &[MapChange<'_>]) -> Result<bool, Error> {
        let name = c_string(object)?;
        let op = WriteOp::new();
        for change in changes {
            let key = match change {
                MapChange::Expect(key, _) | MapChange::Set(key, _) | MapChange::Remove(key) => c_string(key)?,
                MapChange::RemoveAll => {
                    // SAFETY: the operation is valid.
                    unsafe { rados::rados_write_op_remove(op.0) };
                    continue;
                }
            };
            let keys = [key.as_ptr()];
            // SAFETY: the operation is valid, and copies keys and values. The arrays have the one entry that is told,
            // and the lengths are those of the values.
            unsafe {
                match change {
                    MapChange::Expect(_, value) => rados::rados_write_op_omap_cmp(
                        op.0,
                        key.as_ptr(),
                        COMPARE_EQUAL,
                        value.as_ptr().cast(),
                        value.len(),
                        ptr::null_mut(),
                    ),
                    MapChange::Set(_, value) => rados::rados_write_op_omap_set(
                        op.0,
                        keys.as_ptr(),
                        [value.as_ptr().cast()].as_ptr(),
                        [value.len()].as_ptr(),
                        1,
                    ),
                    MapChange::Remove(_) => rados::rados_write_op_omap_rm_keys(op.0, keys.as_ptr(), 1),
                    // Done above.
                    MapChange::RemoveAll => {}
                }
            }
        }
        match op.operate(self, &name) {
            Err(code) if code == -Errno::CANCELED.raw_os_error() => Ok(false),
            result => result.map(|()| true).map_err(self.failed("change the map of", object)),
        }
    }

    /// The value of a key of an object's map, if both are there.
    pub fn map_value(&self, object: &str, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let key = c_string(key)?;
        let keys = [key.as_ptr()];
        // SAFETY: the operation is valid, and copies the key; the array has the one entry that is told.
        let mut found = self.read_map(object, |op, found, told| unsafe {
            rados::rados_read_op_omap_get_vals_by_keys(op, keys.as_ptr(), 1, found, told);
        })?;
        Ok(found.pop().map(|(_, value)| value))
    }

    /// The only entry of an object's map; none where there are more, or none.
    pub fn only_map_entry(&self, object: &str) -> Result<Option<(String, Vec<u8>)>, Error> {
        let mut more = 0;
        // SAFETY: the operation is valid, and copies both strings; `more` outlives it.
        let mut found = self.read_map(object, |op, found, told| unsafe {
            rados_read_op_omap_get_vals2(op, c"".as_ptr(), c"".as_ptr(), 2, found, &mut more, told);
        })?;
        Ok(found.pop().filter(|_| found.is_empty() && more == 0))
    }

    /// What an object's map has under keys that begin with `prefix`, in order; nothing where there is no such object.
    pub fn map_entries(&self, object: &str, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let prefix = c_string(prefix)?;
        let mut entries: Vec<(String, Vec<u8>)> = Vec::new();
        loop {
            let after = c_string(entries.last().map_or("", |(key, _)| key))?;
            // SAFETY: the operation is valid, and copies both strings.
            let mut found = self.read_map(object, |op, found, told| unsafe {
                rados::rados_read_op_omap_get_vals(
                    op,
                    after.as_ptr(),
                    prefix.as_ptr(),
                    ENTRIES_MAX,
                    found,
                    told,
                );
            })?;
            // The cluster may return fewer than asked for, and only none means that there are none.
            if found.is_empty() {
                return Ok(entries);
            }
            entries.append(&mut found);
        }
    }

    /// Reads from an object's map what `ask` puts into the operation; nothing where there is no such object.
    fn read_map(
        &self,
        object: &str,
        ask: impl FnOnce(rados::rados_read_op_t, &mut rados::rados_omap_iter_t, &mut c_int),
    ) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let name = c_string(object)?;
        let mut found: rados::rados_omap_iter_t = ptr::null_mut();
        let mut told = 0;
        // SAFETY: the operation is made, filled, operated and released here; all that it points to outlives it.
        let code = unsafe {
            let op = rados::rados_create_read_op();
            ask(op, &mut found, &mut told);
            let code = rados::rados_read_op_operate(op, self.0.handle, name.as_ptr(), 0);
            rados::rados_release_read_op(op);
            code
        };
        // SAFETY: the operation has made the iterator, and filled it if it succeeded. It is ended here, once.
        let entries = unsafe {
            let entries = if code < 0 { Err(code) } else { take_entries(found) };
            rados::rados_omap_get_end(found);
            entries
        };
        match entries
            .and_then(|entries| check(told).map(|_| entries))
            .map_err(self.failed("read the map of", object))
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            result => result,
        }
    }
}

/// One of the changes to an object's map that are made together.
#[derive(Debug, Clone, Copy)]
pub enum MapChange<'a> {
    /// Changes nothing unless the key has this value before; an empty one stands for a key that is not there as well.
    Expect(&'a str, &'a [u8]),
    /// Gives a key a value, whether it is there or not.
    Set(&'a str, &'a [u8]),
    /// Removes a key, if it is there.
    Remove(&'a str),
    /// Removes the object with its map.
    RemoveAll,
}

/// Copies the entries out of an iterator.
///
/// # Safety
/// The iterator must come from a read operation that succeeded.
unsafe fn take_entries(found: rados::rados_omap_iter_t) -> Result<Vec<(String, Vec<u8>)>, c_int> {
    let mut entries = Vec::new();
    loop {
        let (mut key, mut value, mut length): (*mut c_char, *mut c_char, usize) =
            (ptr::null_mut(), ptr::null_mut(), 0);
        // SAFETY: the iterator is valid, says the caller; the pointers are to locals.
        check(unsafe { rados::rados_omap_get_next(found, &mut key, &mut value, &mut length) })?;
        if key.is_null() {
            return Ok(entries);
        }
        // SAFETY: the key is a string that lives until the iterator is ended.
        let key = unsafe { CStr::from_ptr(key) }.to_string_lossy().into_owned();
        // SAFETY: so does the value, which has this length; one without bytes may have no place either.
        let value =
            if length == 0 { &[] } else { unsafe { slice::from_raw_parts(value.cast::<u8>(), length) } };
        entries.push((key, value.to_vec()));
    }
}

/// Writes that are done together or not at all.
struct WriteOp(rados::rados_write_op_t);

impl WriteOp {
    fn new() -> Self {
        // SAFETY: it has no conditions; `Drop` gives back what it returns.
        Self(unsafe { rados::rados_create_write_op() })
    }

    fn operate(self, pool: &Pool, object: &CStr) -> Result<(), c_int> {
        // SAFETY: operation and context are valid, the name is for the call, and no time is given.
        check(unsafe {
            rados::rados_write_op_operate(self.0, pool.0.handle, object.as_ptr(), ptr::null_mut(), 0)
        })
        .map(drop)
    }
}

impl Drop for WriteOp {
    fn drop(&mut self) {
        // SAFETY: it came from rados_create_write_op and is released once.
        unsafe { rados::rados_release_write_op(self.0) }
    }
}

/// Why a file was not read of which librados says that it is not there: it says so whatever keeps it from opening it.
fn unread(conf: &Path, said: io::Error) -> io::Error {
    if said.kind() != io::ErrorKind::NotFound {
        return said;
    }
    match File::open(conf) {
        // There was no handle left a moment ago.
        Ok(_) => Errno::MFILE.into(),
        Err(error) => error,
    }
}

/// The text in a buffer that C code has filled.
pub(super) fn text_of(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A delete that was half done failed for good, and left a backup that was neither there nor gone.
    #[test]
    fn a_configuration_that_cannot_be_read_for_want_of_handles_is_not_taken_for_missing() {
        let folder = tempfile::tempdir().unwrap();
        let conf = folder.path().join("ceph.conf");
        std::fs::write(&conf, "[global]\n").unwrap();
        let said = || io::Error::from(io::ErrorKind::NotFound);
        let error = |error| Error::Conf { conf: conf.clone(), error };

        assert_eq!(error(unread(&conf, said())).kind(), io::ErrorKind::ConnectionAborted);
        std::fs::remove_file(&conf).unwrap();
        assert_eq!(error(unread(&conf, said())).kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_cluster_without_a_configuration_or_monitors_is_a_clear_error() {
        let folder = tempfile::tempdir().unwrap();
        let conf = folder.path().join("ceph.conf");

        let error = Cluster::connect(&conf, "cinder", 1).err().unwrap();
        assert!(matches!(error, Error::Conf { .. }), "{error}");
        assert!(error.to_string().contains("ceph.conf: No such file"), "{error}");

        std::fs::write(&conf, "[global]\nmon_host = 127.0.0.1:1\nauth_client_required = none\n").unwrap();
        let error = Cluster::connect(&conf, "cinder", 1).err().unwrap();
        assert!(error.to_string().contains("client.cinder"), "{error}");
    }
}
