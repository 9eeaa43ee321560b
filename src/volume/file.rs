//! Files and block devices.
//!
//! A path comes from a message, so it is followed once, without opening what it leads to; where it led is checked
//! against the roots, and then exactly that is opened.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom, XattrFlags,
};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::{Before, Error, PARTIAL, VolumeSource, VolumeTarget};

/// Zeros are written in pieces of this size where they cannot be punched.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
/// Who may read and write a file that a restore has made: its owner.
const NEW_FILE_MODE: u32 = 0o600;
/// The longest name that Linux gives a file.
const NAME_BYTES_MAX: usize = 255;
/// The extended attribute in which a file that is not whole yet says what is restored to it, and by whom, and in the next
/// line how far that is.
const RESTORE_ATTRIBUTE: &str = "user.backhaul.restore";
/// No such attribute is longer, on any file system.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;

/// The folders below which file volumes may be.
#[derive(Debug, Clone, Default)]
pub struct FileRoots {
    roots: Vec<PathBuf>,
    /// The folders of stores: nothing is restored onto what lies in one.
    stores: Vec<PathBuf>,
}

impl FileRoots {
    /// Takes folders by their absolute paths. One that does not exist (yet) has nothing below it.
    pub fn new(roots: &[PathBuf]) -> Self {
        Self { roots: roots.to_vec(), stores: Vec::new() }
    }

    /// The same, with the folders of stores, which may lie below one of these: what a message names as the target of a restore
    /// must not be somebody's backup.
    pub fn with_stores(self, stores: Vec<PathBuf>) -> Self {
        Self { stores, ..self }
    }

    /// Follows `path`, and fails when that leads out of the roots.
    fn find(&self, path: &Path) -> Result<Place, Error> {
        // O_PATH opens nothing: no device is touched, no pipe waited for, before we know where it is.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let place =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io_error("open", path, e.into()))?;
        let place = Place(place);
        let real = fs::read_link(place.path()).map_err(|e| io_error("resolve", path, e))?;
        let inside = |root: &PathBuf| root.canonicalize().is_ok_and(|root| real.starts_with(root));
        if self.roots.iter().any(inside) {
            return Ok(place);
        }
        let roots: Vec<String> = self.roots.iter().map(|root| root.display().to_string()).collect();
        let roots = if roots.is_empty() { "which is empty".into() } else { roots.join(", ") };
        Err(Error::OutsideRoots { path: path.display().to_string(), roots })
    }

    /// Fails when a place to restore onto, or into, lies in a store.
    fn keep_stores(&self, place: &Place, path: &Path) -> Result<(), Error> {
        let real = fs::read_link(place.path()).map_err(|e| io_error("resolve", path, e))?;
        // By what they are, and not only by their names: a folder may be mounted in several places.
        let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
        let above: Vec<(u64, u64)> = real.ancestors().filter_map(identity).collect();
        let holds = |store: &&PathBuf| identity(store).is_some_and(|store| above.contains(&store));
        match self.stores.iter().find(holds) {
            Some(store) => {
                Err(Error::InStore { path: path.display().to_string(), store: store.display().to_string() })
            }
            None => Ok(()),
        }
    }
}

/// What a path led to: held, but not opened for reading or writing.
#[derive(Debug)]
struct Place(OwnedFd);

impl Place {
    /// A path that leads to just this, whatever has become of the names that led here.
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    fn kind(&self, path: &Path) -> Result<Kind, Error> {
        let metadata = fs::metadata(self.path()).map_err(|e| io_error("look at", path, e))?;
        match metadata.file_type() {
            t if t.is_file() => Ok(Kind::Regular),
            t if t.is_block_device() => Ok(Kind::Device),
            _ => Err(Error::NotAVolume { path: path.display().to_string() }),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Regular,
    Device,
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io { action, path: path.display().to_string(), source }
}

/// The size of a file or a block device; both tell it by where their end is.
fn size(file: &File, path: &Path) -> Result<u64, Error> {
    rustix::fs::seek(file, SeekFrom::End(0)).map_err(|e| io_error("get the size of", path, e.into()))
}

/// A file or block device to back up.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    bytes: u64,
}

impl FileSource {
    /// Opens it. Fails when it is not below `roots`, is no volume, or is empty.
    pub fn open(path: &Path, roots: &FileRoots) -> Result<Self, Error> {
        let place = roots.find(path)?;
        place.kind(path)?;
        let file = File::open(place.path()).map_err(|e| io_error("open", path, e))?;
        let bytes = size(&file, path)?;
        if bytes == 0 {
            return Err(Error::Empty { path: path.display().to_string() });
        }
        Ok(Self { file, bytes })
    }
}

impl VolumeSource for FileSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        if offset >= end {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // No data from here on: a hole, unless the file has become shorter.
            Err(Errno::NXIO) if rustix::fs::seek(&self.file, SeekFrom::End(0))? >= end => return Ok(None),
            Err(Errno::NXIO) => return Err(ErrorKind::UnexpectedEof.into()),
            // Not every file system and no block device knows its holes: all may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..end)),
            Err(error) => return Err(error.into()),
        };
        if start >= end {
            return Ok(None);
        }
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..hole.min(end)))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// A file or block device to restore onto.
///
/// A file that is not there yet is written under a hidden name beside it, and gets its name when it is whole. What an attempt
/// that died has left of it is gone on with by the next one: all that was written there is of the same backup.
#[derive(Debug)]
pub struct FileTarget {
    file: File,
    /// Where it gets its name, if it was not there before.
    new: Option<New>,
    /// What the attempt before noted.
    note: Option<String>,
    /// Names the restore, and the file.
    restore: String,
    written: AtomicBool,
    /// Whether a new file stays that is not whole.
    stays: AtomicBool,
}

/// The place of a file that is not there yet.
#[derive(Debug)]
struct New {
    folder: Place,
    name: String,
    /// Whether an attempt before has begun it.
    begun: bool,
}

impl FileTarget {
    /// Opens it to hold `bytes`. Fails, and changes nothing, when it is not below `roots`, is no volume, is mounted,
    /// or is smaller than that. `restore`, in one line, names the job and the backup: a new file that an attempt of the same
    /// restore has left is gone on with.
    pub fn open(path: &Path, bytes: u64, roots: &FileRoots, restore: &str) -> Result<Self, Error> {
        if path.as_os_str().as_encoded_bytes().ends_with(PARTIAL.as_bytes()) {
            return Err(Error::ReservedName { path: path.display().to_string() });
        }
        let place = match roots.find(path) {
            Err(Error::Io { source, .. })
                if source.kind() == ErrorKind::NotFound && fs::symlink_metadata(path).is_err() =>
            {
                return Self::create(path, bytes, roots, restore);
            }
            place => place?,
        };
        roots.keep_stores(&place, path)?;
        let mut options = File::options();
        options.write(true);
        if place.kind(path)? == Kind::Device {
            // Exclusive: the kernel refuses a device that is mounted.
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        let file = options.open(place.path()).map_err(|source| match source.kind() {
            ErrorKind::ResourceBusy => Error::InUse { path: path.display().to_string() },
            _ => io_error("open", path, source),
        })?;
        lock(&file, path)?;
        let target_bytes = size(&file, path)?;
        if target_bytes < bytes {
            let path = path.display().to_string();
            return Err(Error::TooSmall { path, target_bytes, backup_bytes: bytes });
        }
        let [written, stays] = [(); 2].map(|()| AtomicBool::new(false));
        Ok(Self { file, new: None, note: None, restore: restore.into(), written, stays })
    }

    fn create(path: &Path, bytes: u64, roots: &FileRoots, restore: &str) -> Result<Self, Error> {
        let (folder, name) = place_of(path, roots)?;
        let create = |error: io::Error| io_error("create", path, error);
        let (file, restore, note) = loop {
            let file = open_partial(&folder, name, path, true)?;
            lock(&file, path)?;
            // The one that ran may have given it its name, or removed it, just before it let go of the lock.
            if !is_at(&file, &folder, name).map_err(create)? {
                continue;
            }
            let metadata = file.metadata().map_err(create)?;
            let restore = of_file(restore, &metadata);
            match restore_of(&file) {
                // With a second name it is, or may become, something else to somebody.
                Some((of, note)) if of == restore && metadata.len() == bytes && metadata.nlink() == 1 => {
                    break (file, restore, Some(note));
                }
                None if metadata.len() == 0 => break (file, restore, None),
                // What another restore had written must not show through where nothing is written now.
                _ => rustix::fs::unlinkat(&folder.0, partial(name), AtFlags::empty())
                    .map_err(|error| create(error.into()))?,
            }
        };
        if fs::symlink_metadata(path).is_ok() {
            rustix::fs::unlinkat(&folder.0, partial(name), AtFlags::empty()).ok();
            return Err(Error::InUse { path: path.display().to_string() });
        }
        let new = New { folder, name: name.into(), begun: note.is_some() };
        let note = note.filter(|note| !note.is_empty());
        let [written, stays] = [(); 2].map(|()| AtomicBool::new(false));
        let target = Self { file, new: Some(new), note, restore, written, stays };
        target.file.set_len(bytes).map_err(create)?;
        if target.note.is_none() {
            target.set_note("").map_err(create)?;
        }
        Ok(target)
    }

    /// Whether there is anything of that name, as far as one can see.
    pub fn is_there(path: &Path, roots: &FileRoots) -> bool {
        let found = roots.find(path);
        !matches!(found, Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound)
    }

    /// Removes the new file that an attempt of this restore has left, if there is one.
    pub fn discard(path: &Path, roots: &FileRoots, restore: &str) -> Result<(), Error> {
        let left = place_of(path, roots)
            .and_then(|(folder, name)| Ok((open_partial(&folder, name, path, false)?, folder, name)));
        let (file, folder, name) = match left {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
            // No attempt has begun anything there.
            Err(Error::OutsideRoots { .. } | Error::InStore { .. }) => return Ok(()),
            left => left?,
        };
        lock(&file, path)?;
        let failed = |error| io_error("remove what was restored of", path, error);
        let restore = of_file(restore, &file.metadata().map_err(failed)?);
        if restore_of(&file).is_none_or(|(of, _)| of != restore)
            || !is_at(&file, &folder, name).map_err(failed)?
        {
            return Ok(());
        }
        rustix::fs::unlinkat(&folder.0, partial(name), AtFlags::empty()).map_err(|error| failed(error.into()))
    }

    /// Keeps a note with the file where the file system can do so.
    fn set_note(&self, note: &str) -> io::Result<()> {
        let value = format!("{}\n{note}", self.restore);
        match rustix::fs::fsetxattr(&self.file, RESTORE_ATTRIBUTE, value.as_bytes(), XattrFlags::empty()) {
            // Then the next attempt begins anew.
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS | Errno::NOSPC | Errno::DQUOT) => Ok(()),
            set => Ok(set?),
        }
    }
}

/// The folder and the name of a file that is not there yet.
fn place_of<'a>(path: &'a Path, roots: &FileRoots) -> Result<(Place, &'a str), Error> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(Error::NotAVolume { path: path.display().to_string() });
    };
    let folder = roots.find(folder).map_err(|error| match error {
        Error::OutsideRoots { roots, .. } => Error::OutsideRoots { path: path.display().to_string(), roots },
        error => error,
    })?;
    roots.keep_stores(&folder, path)?;
    Ok((folder, name))
}

/// Opens the file that a new target is until it is whole. One that is there is left of a restore that was killed or handed
/// back, or belongs to one that runs: that one holds a lock.
fn open_partial(folder: &Place, name: &str, path: &Path, create: bool) -> Result<File, Error> {
    let failed = |error| io_error(if create { "create" } else { "open" }, path, error);
    // Somebody may have put a pipe there, which must not be waited for.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut options = File::options();
    options.write(true).create(create).truncate(false).custom_flags(flags.bits() as i32);
    // What a volume holds is for those only who are let in later.
    options.mode(NEW_FILE_MODE);
    let file = options.open(folder.path().join(partial(name))).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() {
        return Ok(file);
    }
    Err(Error::NotAVolume { path: path.with_file_name(partial(name)).display().to_string() })
}

/// Whether this file still has the name of one that is not whole yet.
fn is_at(file: &File, folder: &Place, name: &str) -> io::Result<bool> {
    match fs::symlink_metadata(folder.path().join(partial(name))) {
        Ok(named) => {
            let metadata = file.metadata()?;
            Ok((metadata.dev(), metadata.ino()) == (named.dev(), named.ino()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Names a restore to this file and no other: a copy of the file, with its attributes, may be older than its note.
fn of_file(restore: &str, metadata: &fs::Metadata) -> String {
    format!("{restore} {}", metadata.ino())
}

/// Which restore a file that is not whole belongs to, and how far that is. None where nobody knows.
fn restore_of(file: &File) -> Option<(String, String)> {
    let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
    let length = rustix::fs::fgetxattr(file, RESTORE_ATTRIBUTE, &mut value[..]).ok()?;
    value.truncate(length);
    let value = String::from_utf8(value).ok()?;
    let (restore, note) = value.split_once('\n')?;
    Some((restore.into(), note.into()))
}

/// Makes sure that no other restore writes to the same file or device.
fn lock(file: &File, path: &Path) -> Result<(), Error> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Error::InUse { path: path.display().to_string() }),
        Err(error) => Err(io_error("lock", path, error.into())),
    }
}

/// The name of a new file until it is whole. It fits wherever the file's own name does.
fn partial(name: &str) -> String {
    let partial = format!(".{name}{PARTIAL}");
    if partial.len() <= NAME_BYTES_MAX {
        return partial;
    }
    format!(".{}{PARTIAL}", hex::encode(Sha256::digest(name)))
}

impl VolumeTarget for FileTarget {
    fn before(&self) -> Before {
        match &self.new {
            Some(new) if !new.begun => Before::Zeros,
            _ => Before::Anything,
        }
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.written.store(true, Ordering::Relaxed);
        self.file.write_all_at(bytes, offset)?;
        // The kernel begins to write them now, and not only when `finish` waits for that. It is advice, which may be refused.
        let _ =
            rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(bytes.len() as u64), Advice::DontNeed);
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.written.store(true, Ordering::Relaxed);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, range.start, range.end - range.start) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        let mut offset = range.start;
        while offset < range.end {
            let length = (range.end - offset).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..length as usize], offset)?;
            offset += length;
        }
        Ok(())
    }

    fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    fn keep_note(&self, note: &str) -> io::Result<()> {
        if self.new.is_none() {
            return Ok(());
        }
        // First: a note must tell of nothing that a crash can take away.
        self.file.sync_data()?;
        self.set_note(note)
    }

    fn is_changed(&self) -> bool {
        self.new.is_none() && self.written.load(Ordering::Relaxed)
    }

    fn leave(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }

    fn finish(&self) -> io::Result<()> {
        let Some(New { folder, name, .. }) = &self.new else { return self.file.sync_all() };
        match rustix::fs::fremovexattr(&self.file, RESTORE_ATTRIBUTE) {
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => {}
            removed => removed?,
        }
        self.file.sync_all()?;
        // A link, because unlike a rename it fails when the name was taken meanwhile; and to the file itself, because
        // somebody may have removed its name, and another restore then has a file of that name.
        let written = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        match rustix::fs::linkat(CWD, written, &folder.0, name, AtFlags::SYMLINK_FOLLOW) {
            // Not every file system has hard links, FAT for one.
            Err(error @ (Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS)) => {
                if !is_at(&self.file, folder, name)? {
                    return Err(error.into());
                }
                rustix::fs::renameat_with(&folder.0, partial(name), &folder.0, name, RenameFlags::NOREPLACE)?;
            }
            linked => {
                linked?;
                if is_at(&self.file, folder, name)? {
                    rustix::fs::unlinkat(&folder.0, partial(name), AtFlags::empty())?;
                }
            }
        }
        File::open(folder.path())?.sync_all()
    }
}

impl Drop for FileTarget {
    fn drop(&mut self) {
        if let Some(New { folder, name, .. }) = &self.new
            && !self.stays.load(Ordering::Relaxed)
            // It is gone already when the restore succeeded.
            && is_at(&self.file, folder, name).is_ok_and(|is_there| is_there)
        {
            rustix::fs::unlinkat(&folder.0, partial(name), AtFlags::empty()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;
    use crate::error::Class;

    const RESTORE: &str = "of a job";

    fn rooted() -> (tempfile::TempDir, PathBuf, FileRoots) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir(&root).unwrap();
        fs::write(folder.path().join("outside"), b"secret").unwrap();
        fs::write(root.join("inside"), b"volume").unwrap();
        let roots = FileRoots::new(std::slice::from_ref(&root));
        (folder, root, roots)
    }

    #[test]
    fn what_a_file_has_lost_since_the_backup_began_is_no_hole() {
        let folder = tempfile::tempdir().unwrap();
        let (path, roots) = (folder.path().join("a.img"), FileRoots::new(&[folder.path().to_owned()]));
        fs::write(&path, [7; 3 << 12]).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(4 << 12).unwrap();
        let source = FileSource::open(&path, &roots).unwrap();
        assert_eq!(source.next_data(3 << 12, 4 << 12).unwrap(), None);

        file.set_len(2 << 12).unwrap();

        assert_eq!(source.next_data(1 << 12, 2 << 12).unwrap(), Some(1 << 12..2 << 12));
        let lost = source.next_data(2 << 12, 4 << 12).unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_source_outside_the_roots_is_refused_however_the_path_leads_there() {
        let (folder, root, roots) = rooted();
        symlink(folder.path().join("outside"), root.join("link")).unwrap();
        symlink(folder.path(), root.join("folder-link")).unwrap();

        for path in [
            folder.path().join("outside"),
            root.join("../outside"),
            root.join("link"),
            root.join("folder-link/outside"),
        ] {
            let error = FileSource::open(&path, &roots).unwrap_err();
            assert!(matches!(error, Error::OutsideRoots { .. }), "{path:?}: {error}");
            let error = FileTarget::open(&path, 1, &roots, RESTORE).unwrap_err();
            assert!(matches!(error, Error::OutsideRoots { .. }), "{path:?}: {error}");
        }
        let new = root.join("folder-link/new");
        let error = FileTarget::open(&new, 1, &roots, RESTORE).unwrap_err();
        let told = format!("{} is not below one of worker.file_roots ({})", new.display(), root.display());
        assert!(error.to_string().starts_with(&told), "{error}");
        assert_eq!(FileSource::open(&root.join("inside"), &roots).unwrap().bytes(), 6);
    }

    #[test]
    fn a_restore_onto_the_objects_of_a_store_or_among_them_is_refused_however_the_path_leads_there() {
        let (_folder, root, roots) = rooted();
        let store = root.join("store");
        fs::create_dir(&store).unwrap();
        fs::write(store.join("object"), b"backup").unwrap();
        symlink(&store, root.join("link")).unwrap();
        symlink(store.join("object"), root.join("volume")).unwrap();
        for named in [&store, &root.join("link")] {
            let roots = roots.clone().with_stores(vec![named.clone()]);
            for path in ["store/object", "link/object", "volume", "store/new", "link/new"] {
                let error = FileTarget::open(&root.join(path), 6, &roots, RESTORE).unwrap_err();
                assert!(matches!(error, Error::InStore { .. }), "{path}: {error}");
                assert_eq!(error.class(), Class::Permanent);
            }
            FileTarget::open(&root.join("inside"), 6, &roots, RESTORE).unwrap();
            FileTarget::open(&root.join("store-of-volumes"), 6, &roots, RESTORE).unwrap();
        }
        assert_eq!(fs::read(store.join("object")).unwrap(), b"backup");
        assert_eq!(fs::read_dir(&store).unwrap().count(), 1);
    }

    /// The next restore to the name without the ending would have removed it.
    #[test]
    fn a_target_with_the_name_of_a_restore_that_is_not_whole_is_refused() {
        let (_folder, root, roots) = rooted();
        let left = root.join(".new.backhaul-partial");
        fs::write(&left, b"whole").unwrap();
        for path in [left, root.join("other.backhaul-partial")] {
            let error = FileTarget::open(&path, 5, &roots, RESTORE).unwrap_err();
            assert!(matches!(error, Error::ReservedName { .. }), "{error}");
            assert_eq!(error.class(), Class::Permanent);
        }
        assert_eq!(fs::read(root.join(".new.backhaul-partial")).unwrap(), b"whole");
    }

    #[test]
    fn a_new_target_is_for_its_owner_only() {
        let (_folder, root, roots) = rooted();
        FileTarget::open(&root.join("new"), 6, &roots, RESTORE).unwrap().finish().unwrap();
        assert_eq!(fs::metadata(root.join("new")).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_no_volume_is_refused() {
        let (_folder, root, roots) = rooted();
        fs::write(root.join("empty"), b"").unwrap();
        rustix::fs::mknodat(CWD, root.join("pipe"), rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();

        assert!(matches!(FileSource::open(&root.join("empty"), &roots), Err(Error::Empty { .. })));
        assert!(matches!(FileSource::open(&root, &roots), Err(Error::NotAVolume { .. })));
        assert!(matches!(FileSource::open(&root.join("pipe"), &roots), Err(Error::NotAVolume { .. })));
        assert!(matches!(FileSource::open(&root.join("missing"), &roots), Err(Error::Io { .. })));
    }

    #[test]
    fn a_pipe_in_the_place_of_what_a_killed_restore_left_is_not_waited_for() {
        let (_folder, root, roots) = rooted();
        let pipe = root.join(".new.backhaul-partial");
        rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        // Nobody reads it.
        assert!(matches!(FileTarget::open(&root.join("new"), 1, &roots, RESTORE), Err(Error::Io { .. })));
        let _reader =
            File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&pipe).unwrap();
        let error = FileTarget::open(&root.join("new"), 1, &roots, RESTORE).unwrap_err();
        assert!(matches!(&error, Error::NotAVolume { path } if path.ends_with("partial")), "{error}");
        assert!(!root.join("new").exists());
    }

    #[test]
    fn a_new_target_appears_only_when_it_is_finished() {
        let (_folder, root, roots) = rooted();
        let names = || {
            let mut names: Vec<_> = fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };

        let target = FileTarget::open(&root.join("new"), 1 << 20, &roots, RESTORE).unwrap();
        target.write_at(b"x", 5).unwrap();
        assert_eq!(target.before(), Before::Zeros);
        drop(target);
        assert_eq!(names(), ["inside"]);

        let target = FileTarget::open(&root.join("new"), 1 << 20, &roots, RESTORE).unwrap();
        target.write_at(b"x", 5).unwrap();
        target.finish().unwrap();
        drop(target);
        assert_eq!(names(), ["inside", "new"]);
        assert_eq!(fs::read(root.join("new")).unwrap()[..7], *b"\0\0\0\0\0x\0");
    }

    #[test]
    fn a_new_target_may_have_the_longest_name_that_there_is() {
        let (_folder, root, roots) = rooted();
        for bytes in [1, 237, 238, 255] {
            let path = root.join("n".repeat(bytes));
            let target = FileTarget::open(&path, 4, &roots, RESTORE).unwrap();
            assert!(fs::symlink_metadata(&path).is_err(), "{bytes}");
            // Another one of so long a name has another place.
            let other = FileTarget::open(&root.join("m".repeat(bytes)), 4, &roots, RESTORE).unwrap();
            target.finish().unwrap();
            drop((target, other));
            assert_eq!(fs::read(&path).unwrap(), [0; 4], "{bytes}");
            fs::remove_file(path).unwrap();
            assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "{bytes}");
        }
        let error = FileTarget::open(&root.join("n".repeat(256)), 4, &roots, RESTORE).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }

    #[test]
    fn a_target_that_is_too_small_is_refused_and_left_as_it_was() {
        let (_folder, root, roots) = rooted();

        let error = FileTarget::open(&root.join("inside"), 7, &roots, RESTORE).unwrap_err();

        assert!(matches!(error, Error::TooSmall { target_bytes: 6, backup_bytes: 7, .. }), "{error}");
        assert_eq!(fs::read(root.join("inside")).unwrap(), b"volume");
    }

    #[test]
    fn two_restores_to_one_target_do_not_write_into_each_other() {
        let (_folder, root, roots) = rooted();
        for name in ["new", "inside"] {
            let first = FileTarget::open(&root.join(name), 5, &roots, RESTORE).unwrap();
            first.write_at(b"first", 0).unwrap();

            let error = FileTarget::open(&root.join(name), 3, &roots, RESTORE).unwrap_err();

            assert!(matches!(error, Error::InUse { .. }), "{name}: {error}");
            assert_eq!(error.class(), Class::Transient, "{name}");
            first.finish().unwrap();
            assert_eq!(fs::read(root.join(name)).unwrap()[..5], *b"first", "{name}");
        }
    }

    #[test]
    fn what_a_killed_restore_left_does_not_show_through() {
        let (_folder, root, roots) = rooted();
        fs::write(root.join(partial("new")), b"of a killed one").unwrap();
        let target = FileTarget::open(&root.join("new"), 4, &roots, RESTORE).unwrap();
        target.finish().unwrap();
        assert_eq!(fs::read(root.join("new")).unwrap(), [0; 4]);
    }

    #[test]
    fn what_was_noted_of_a_restore_that_stopped_is_gone_on_with_by_the_same_restore_alone() {
        let (_folder, root, roots) = rooted();
        let begin = || {
            let target = FileTarget::open(&root.join("new"), 9, &roots, RESTORE).unwrap();
            target.write_at(b"first", 0).unwrap();
            target.keep_note("5 bytes").unwrap();
            target.leave();
        };
        begin();
        let target = FileTarget::open(&root.join("new"), 9, &roots, RESTORE).unwrap();
        assert_eq!((target.note(), target.before()), (Some("5 bytes"), Before::Anything));
        target.write_at(b"last", 5).unwrap();
        target.finish().unwrap();
        drop(target);
        assert_eq!(fs::read(root.join("new")).unwrap(), b"firstlast");
        let file = File::open(root.join("new")).unwrap();
        assert_eq!(restore_of(&file), None);
        fs::remove_file(root.join("new")).unwrap();

        for (bytes, restore) in [(9, "of another job"), (8, RESTORE)] {
            begin();
            let target = FileTarget::open(&root.join("new"), bytes, &roots, restore).unwrap();
            assert_eq!((target.note(), target.before()), (None, Before::Zeros), "{restore}");
            target.finish().unwrap();
            assert_eq!(fs::read(root.join("new")).unwrap(), vec![0; bytes as usize], "{restore}");
            fs::remove_file(root.join("new")).unwrap();
        }
    }

    #[test]
    fn a_restore_does_not_go_on_with_a_file_that_was_replaced_or_has_another_name() {
        let (_folder, root, roots) = rooted();
        let (hidden, other) = (root.join(partial("new")), root.join("other"));
        let copy = || {
            let status = Command::new("cp").arg("-a").args([&hidden, &other]).status().unwrap();
            assert!(status.success());
            assert!(restore_of(&File::open(&other).unwrap()).is_some());
            fs::rename(&other, &hidden).unwrap();
        };
        let link = || fs::hard_link(&hidden, &other).unwrap();
        let empty = || {
            File::options().write(true).open(&hidden).unwrap().set_len(0).unwrap();
        };
        for happen in [&copy as &dyn Fn(), &link, &empty] {
            let target = FileTarget::open(&root.join("new"), 9, &roots, RESTORE).unwrap();
            target.write_at(b"first", 0).unwrap();
            target.keep_note("5 bytes").unwrap();
            target.leave();
            drop(target);
            let inode = fs::metadata(&hidden).unwrap().ino();

            happen();

            let target = FileTarget::open(&root.join("new"), 9, &roots, RESTORE).unwrap();
            assert_eq!((target.note(), target.before()), (None, Before::Zeros));
            target.write_at(b"last", 5).unwrap();
            target.finish().unwrap();
            assert_eq!(fs::read(root.join("new")).unwrap(), b"\0\0\0\0\0last");
            if other.exists() {
                assert_eq!(fs::metadata(&other).unwrap().ino(), inode);
                assert_eq!(fs::read(&other).unwrap(), b"first\0\0\0\0");
                fs::remove_file(&other).unwrap();
            }
            fs::remove_file(root.join("new")).unwrap();
        }
    }

    #[test]
    fn a_restore_whose_file_was_removed_takes_nothing_of_the_one_that_began_then() {
        let (_folder, root, roots) = rooted();
        let first = FileTarget::open(&root.join("new"), 5, &roots, RESTORE).unwrap();
        fs::remove_file(root.join(partial("new"))).unwrap();
        let second = FileTarget::open(&root.join("new"), 6, &roots, "of another job").unwrap();
        second.write_at(b"se", 0).unwrap();

        first.finish().unwrap_err();
        drop(first);

        assert!(!root.join("new").exists());
        second.write_at(b"cond", 2).unwrap();
        second.finish().unwrap();
        drop(second);
        assert_eq!(fs::read(root.join("new")).unwrap(), b"second");
        assert!(!root.join(partial("new")).exists());
    }

    #[test]
    fn what_a_restore_has_left_is_removed_for_the_same_restore_alone() {
        let (_folder, root, roots) = rooted();
        let left = || root.join(partial("new")).exists();
        let discard = |restore| FileTarget::discard(&root.join("new"), &roots, restore);
        discard(RESTORE).unwrap();

        let target = FileTarget::open(&root.join("new"), 9, &roots, RESTORE).unwrap();
        assert!(matches!(discard(RESTORE), Err(Error::InUse { .. })));
        target.leave();
        drop(target);
        discard("of another job").unwrap();
        // Where no restore can have begun anything there is nothing to remove.
        for path in [root.join("missing/new"), root.with_file_name("outside")] {
            FileTarget::discard(&path, &roots, RESTORE).unwrap();
        }
        assert!(left());
        discard(RESTORE).unwrap();
        assert!(!left());
        fs::write(root.join(partial("new")), b"of nobody").unwrap();
        discard(RESTORE).unwrap();
        assert!(left());
    }

    #[test]
    fn zeroing_an_old_target_clears_just_the_range() {
        let (_folder, root, roots) = rooted();
        fs::write(root.join("old"), vec![7; 300_000]).unwrap();

        let target = FileTarget::open(&root.join("old"), 200_000, &roots, RESTORE).unwrap();
        target.zero(10_000..150_000).unwrap();
        target.finish().unwrap();

        let bytes = fs::read(root.join("old")).unwrap();
        assert_eq!(bytes.len(), 300_000);
        for (offset, byte) in bytes.into_iter().enumerate() {
            assert_eq!(byte == 0, (10_000..150_000).contains(&offset), "{offset}");
        }
    }
}
