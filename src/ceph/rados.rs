//! Clusters, pools, and the plain objects in them.

use std::ffi::{CStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::{fmt, io, ptr};

use ::ceph::rados;

use super::{Error, c_string, check, os_error};

/// Names that one request for the keys of an object's map returns, at most; the cluster may allow fewer.
const KEYS_MAX: u64 = 1000;
/// How an operation is told that an object must not exist; source: `LIBRADOS_CREATE_EXCLUSIVE` in `librados.h`.
const CREATE_EXCLUSIVE: c_int = 1;

/// A connection to a cluster. Clones share it; it ends with the last of them and of what was made with them.
#[derive(Clone)]
pub struct Cluster(Arc<Connection>);

struct Connection {
    handle: rados::rados_t,
    name: String,
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
        let connection = Connection { handle, name: conf.display().to_string() };
        // SAFETY: the handle was created above and is not yet connected; the path is valid for the call.
        check(unsafe { rados::rados_conf_read_file(connection.handle, path.as_ptr()) })
            .map_err(|code| Error::Conf { conf: conf.into(), error: os_error(code) })?;
        let seconds = c_string(&seconds_max.to_string())?;
        let options = [
            // Without these a cluster that is down is waited for five minutes, or for ever.
            (c"client_mount_timeout", seconds.as_c_str()),
            (c"rados_mon_op_timeout", seconds.as_c_str()),
            (c"rados_osd_op_timeout", seconds.as_c_str()),
            // Everything is read and written once, so a cache only costs memory and copies.
            (c"rbd_cache", c"false"),
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

    /// The cluster's own id, which tells it from every other one.
    pub fn fsid(&self) -> Result<String, Error> {
        let mut text = [0; 64];
        // SAFETY: the handle is connected, and the buffer has the length that is told.
        check(unsafe { rados::rados_cluster_fsid(self.0.handle, text.as_mut_ptr(), text.len()) })
            .map_err(|code| Error::operation("get the id of the cluster of", &self.0.name, code))?;
        Ok(text_of(&text))
    }

    /// Opens a pool.
    pub fn pool(&self, name: &str) -> Result<Pool, Error> {
        let c_name = c_string(name)?;
        let mut handle: rados::rados_ioctx_t = ptr::null_mut();
        // SAFETY: the cluster is connected, and the name is valid for the call. After success the context is ours, and
        // `Context` gives it back once.
        check(unsafe { rados::rados_ioctx_create(self.0.handle, c_name.as_ptr(), &mut handle) })
            .map_err(|code| Error::operation("open pool", name, code))?;
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
        let name = c_string(object)?;
        let (mut bytes, mut modified) = (0, 0);
        // SAFETY: the context is open, and all pointers are valid for the call.
        let code = unsafe { rados::rados_stat(self.0.handle, name.as_ptr(), &mut bytes, &mut modified) };
        match check(code).map_err(self.failed("look at", object)) {
            Ok(_) => Ok(Some(bytes)),
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

    /// Adds a key without a value to the map of an object, which is made if it is not there.
    pub fn set_key(&self, object: &str, key: &str) -> Result<(), Error> {
        let (name, key) = (c_string(object)?, c_string(key)?);
        let op = WriteOp::new();
        let (keys, values, lengths) = ([key.as_ptr()], [c"".as_ptr()], [0]);
        // SAFETY: the operation is valid, and copies keys and values; the three arrays have the one entry that is told.
        unsafe {
            rados::rados_write_op_omap_set(op.0, keys.as_ptr(), values.as_ptr(), lengths.as_ptr(), 1);
        }
        op.operate(self, &name).map_err(self.failed("add a key to", object))
    }

    /// Removes a key from the map of an object, if both are there.
    pub fn remove_key(&self, object: &str, key: &str) -> Result<(), Error> {
        let (name, key) = (c_string(object)?, c_string(key)?);
        let op = WriteOp::new();
        let keys = [key.as_ptr()];
        // SAFETY: the operation is valid, and copies the key; the array has the one entry that is told.
        unsafe { rados::rados_write_op_omap_rm_keys(op.0, keys.as_ptr(), 1) };
        match op.operate(self, &name).map_err(self.failed("remove a key from", object)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// The keys of an object's map that begin with `prefix`, in order; none where there is no such object.
    pub fn keys(&self, object: &str, prefix: &str) -> Result<Vec<String>, Error> {
        let (name, c_prefix) = (c_string(object)?, c_string(prefix)?);
        let mut keys: Vec<String> = Vec::new();
        loop {
            let after = c_string(keys.last().map_or("", String::as_str))?;
            let count = keys.len();
            let mut found: rados::rados_omap_iter_t = ptr::null_mut();
            let mut told = 0;
            // SAFETY: the operation is made, filled, operated and released here; all that it points to outlives it.
            let code = unsafe {
                let op = rados::rados_create_read_op();
                rados::rados_read_op_omap_get_vals(
                    op,
                    after.as_ptr(),
                    c_prefix.as_ptr(),
                    KEYS_MAX,
                    &mut found,
                    &mut told,
                );
                let code = rados::rados_read_op_operate(op, self.0.handle, name.as_ptr(), 0);
                rados::rados_release_read_op(op);
                code
            };
            // SAFETY: the operation above made the iterator, and filled it if it succeeded; it is ended here, once.
            let next = unsafe { if code < 0 { end_keys(found, code) } else { take_keys(found, &mut keys) } };
            match next.and(check(told)).map_err(self.failed("read the keys of", object)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
                Err(error) => return Err(error),
                // The cluster may return fewer than asked for, and only none means that there are none.
                Ok(_) if keys.len() == count => return Ok(keys),
                Ok(_) => {}
            }
        }
    }
}

/// Moves the keys out of an iterator and ends it.
///
/// # Safety
/// The iterator must come from a read operation that succeeded, and must not be used after this.
unsafe fn take_keys(found: rados::rados_omap_iter_t, keys: &mut Vec<String>) -> Result<c_int, c_int> {
    loop {
        let (mut key, mut value, mut length): (*mut c_char, *mut c_char, usize) =
            (ptr::null_mut(), ptr::null_mut(), 0);
        // SAFETY: the iterator is valid, says the caller; the pointers are to locals.
        let code = unsafe { rados::rados_omap_get_next(found, &mut key, &mut value, &mut length) };
        if code < 0 || key.is_null() {
            // SAFETY: as above, and for the last time.
            return unsafe { end_keys(found, code) };
        }
        // SAFETY: the key is a string that lives until the iterator is ended.
        keys.push(unsafe { CStr::from_ptr(key) }.to_string_lossy().into_owned());
    }
}

/// Ends an iterator over keys.
///
/// # Safety
/// The iterator must come from a read operation, and must not be used after this.
unsafe fn end_keys(found: rados::rados_omap_iter_t, code: c_int) -> Result<c_int, c_int> {
    // SAFETY: the iterator is valid, says the caller.
    unsafe { rados::rados_omap_get_end(found) };
    check(code)
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

/// The text in a buffer that C code has filled.
pub(super) fn text_of(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

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
