//! A folder of a file system, laid out as Cinder's posix driver does it.
//!
//! An object is written under a temporary name, made durable, and then gets its name in one step, so that whatever
//! has its name is whole; temporary names begin with a dot, which Cinder's listings by prefix never match. Modes are
//! Cinder's: 0770 for folders, 0660 for files, whatever the umask.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags};
use rustix::io::Errno;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    Error, Folder, Listed, ObjectName, ObjectStore, ObjectWriter, PIECE_BYTES, Partial, Pieces, Result,
    TakeListed,
};

const FOLDER_MODE: u32 = 0o770;
const FILE_MODE: u32 = 0o660;
/// What is read of an object at once at least.
const SMALL_PIECE_BYTES: u64 = 4 << 10;
/// Objects that are listed ahead of whoever takes them.
const LISTED_AHEAD_MAX: usize = 256;
/// How long whoever changes an object waits for others who do. Each has it for as long as a small file takes to write.
const LOCK_MAX: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// How long it goes on while others, one after the other, have changed the object before it comes to its turn.
const CHANGES_MAX: Duration = Duration::from_secs(60);

/// Objects as files below a root folder.
#[derive(Debug, Clone)]
pub struct Posix {
    root: Root,
}

/// The folder that all objects are below.
#[derive(Debug, Clone)]
struct Root {
    path: PathBuf,
    /// The nearest folder above it on another file system, of which it is itself while its own one is not mounted. None where
    /// all are on one.
    outside: Option<PathBuf>,
}

impl Root {
    fn open(path: PathBuf) -> io::Result<Self> {
        let own = device(&path)?;
        for folder in path.ancestors().skip(1) {
            if device(folder)? != own {
                let outside = Some(folder.to_owned());
                return Ok(Self { path, outside });
            }
        }
        Ok(Self { path, outside: None })
    }

    /// Fails while the file system is not mounted.
    fn check(&self) -> io::Result<()> {
        match self.is_mounted() {
            Ok(true) => return Ok(()),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let text = format!(
            "the store in {} is not there any more: mount its file system again, and let it stay mounted",
            self.path.display()
        );
        Err(io::Error::new(ErrorKind::ResourceBusy, text))
    }

    fn is_mounted(&self) -> io::Result<bool> {
        let own = device(&self.path)?;
        // One that is mounted again may have another number than before.
        Ok(match &self.outside {
            Some(outside) => device(outside)? != own,
            None => true,
        })
    }

    /// Looks, where something is not there, whether that is for want of the file system.
    fn check_missing<T>(&self, result: io::Result<T>) -> io::Result<T> {
        match result {
            Err(error) if error.kind() == ErrorKind::NotFound => self.check().and(Err(error)),
            result => result,
        }
    }
}

/// The number of the file system that a folder is on.
fn device(folder: &Path) -> io::Result<u64> {
    // With the dot behind it, what is mounted on demand is mounted.
    Ok(fs::metadata(folder.join("."))?.dev())
}

impl Posix {
    /// Opens the store in `root`, which must be a folder. Does not create it: a file system that is not mounted must
    /// not be taken for an empty store.
    pub fn open(root: &Path) -> Result<Self> {
        let at = |error| Error::io("open the store", root.display(), error);
        let path = root.canonicalize().map_err(at)?;
        if !path.is_dir() {
            return Err(at(io::Error::new(ErrorKind::NotADirectory, "it is no folder")));
        }
        Ok(Self { root: Root::open(path).map_err(at)? })
    }

    /// Finds out whether the folder can be written.
    pub fn reach(&self) -> Result<()> {
        let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        rustix::fs::access(&self.root.path, access)
            .map_err(|errno| Error::io("write the store", self.root.path.display(), errno.into()))
    }

    fn folder_path(&self, folder: &Folder) -> PathBuf {
        self.root.path.join(folder.as_str())
    }

    fn path(&self, object: &ObjectName) -> PathBuf {
        self.folder_path(&object.folder).join(&object.name)
    }
}

#[async_trait]
impl ObjectStore for Posix {
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        let (root, path) = (self.root.clone(), self.path(object));
        blocking("write", object, move || {
            let mut file = Unfinished::create(&root, &path)?;
            file.file.write_all(&bytes)?;
            file.publish(Publish::New)
        })
        .await
    }

    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        let (root, path) = (self.root.clone(), self.path(object));
        blocking("write", object, move || {
            let mut file = Unfinished::create(&root, &path)?;
            file.file.write_all(&bytes)?;
            file.publish(Publish::Over)
        })
        .await
    }

    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool> {
        let (root, path) = (self.root.clone(), self.path(object));
        blocking("write", object, move || {
            // Nobody else is to write between our look and our write, on this machine or on one that shares the folder.
            let Some((locked, mut file)) = Locked::find(&root, &path)? else { return Ok(false) };
            let mut there = Vec::with_capacity(was.len() + 1);
            (&locked.file).take(was.len() as u64 + 1).read_to_end(&mut there)?;
            if there != was {
                return Ok(false);
            }
            file.file.write_all(&bytes)?;
            file.publish(Publish::Over)?;
            Ok(true)
        })
        .await
    }

    async fn create(&self, object: &ObjectName) -> Result<Box<dyn ObjectWriter>> {
        let (root, path) = (self.root.clone(), self.path(object));
        let file = blocking("create", object, move || Unfinished::create(&root, &path)).await?;
        Ok(Box::new(Writer { object: object.clone(), file: Some(file) }))
    }

    async fn get(&self, object: &ObjectName) -> Result<Pieces> {
        let (root, path) = (self.root.clone(), self.path(object));
        let open = move || root.check_missing(while_stale(|| open_object(File::options().read(true), &path)));
        let mut file = blocking("read", object, open).await?;
        let (sender, pieces) = Pieces::channel();
        let object = object.clone();
        tokio::task::spawn_blocking(move || {
            // Most objects are records and lists, far smaller than a piece.
            let mut bytes_left = file.metadata().map_or(0, |metadata| metadata.len());
            loop {
                let room = bytes_left.clamp(SMALL_PIECE_BYTES, PIECE_BYTES as u64);
                let mut piece = Vec::with_capacity(room as usize);
                match (&mut file).take(room).read_to_end(&mut piece) {
                    Ok(0) => return,
                    Ok(read) => bytes_left = bytes_left.saturating_sub(read as u64),
                    Err(error) => {
                        // Nobody may be there to hear it: the reader was dropped.
                        sender.blocking_send(Err(Error::io("read", &object, error))).ok();
                        return;
                    }
                }
                if sender.blocking_send(Ok(piece.into())).is_err() {
                    return;
                }
            }
        });
        Ok(pieces)
    }

    /// As a second name of the same file: objects are never written to again.
    async fn copy(&self, from: &ObjectName, to: &ObjectName) -> Result<bool> {
        let (root, from, path) = (self.root.clone(), self.path(from), self.path(to));
        blocking("copy", to, move || link(&root, &from, &path)).await
    }

    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()> {
        let (root, path, prefix) = (self.root.clone(), self.folder_path(folder), prefix.to_owned());
        let (sender, mut listed) = mpsc::channel(LISTED_AHEAD_MAX);
        let listing = blocking("list", folder.as_str(), move || {
            for name in names(&root, &path)? {
                let name = name?;
                if !name.starts_with(&prefix) || name.starts_with('.') {
                    continue;
                }
                // It may have been deleted since its name was read.
                let object = match fs::symlink_metadata(path.join(&name)) {
                    Ok(metadata) if metadata.is_file() => {
                        Listed { name, bytes: metadata.len(), modified: modified(&metadata) }
                    }
                    Ok(_) => continue,
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                if sender.blocking_send(object).is_err() {
                    // Nobody wants to know any more.
                    break;
                }
            }
            Ok(())
        });
        let taking = async {
            while let Some(object) = listed.recv().await {
                take(object);
            }
        };
        let (listing, ()) = tokio::join!(listing, taking);
        listing
    }

    async fn delete(&self, object: &ObjectName) -> Result<()> {
        let (root, path) = (self.root.clone(), self.path(object));
        blocking("delete", object, move || match remove(&root, &path)? {
            true => sync_folder(&path),
            false => Ok(()),
        })
        .await
    }

    async fn tidy(&self, folder: &Folder, prefix: &str) -> Result<()> {
        let (root, path, prefix) = (self.root.clone(), self.folder_path(folder), unfinished_prefix(prefix));
        blocking("tidy", folder.as_str(), move || {
            // All of them first: not every file system tells of all where some are removed meanwhile.
            for name in names(&root, &path)?.collect::<io::Result<Vec<_>>>()? {
                if name.starts_with(&prefix) {
                    remove(&root, &path.join(name))?;
                }
            }
            // Only empty folders go, from the innermost outwards.
            let mut folder = path.as_path();
            while folder != root.path && folder.starts_with(&root.path) && fs::remove_dir(folder).is_ok() {
                let Some(parent) = folder.parent() else { break };
                folder = parent;
            }
            Ok(())
        })
        .await
    }

    async fn partials(&self, folder: &Folder, prefix: &str) -> Result<Vec<Partial>> {
        let (root, path) = (self.root.clone(), self.folder_path(folder));
        let (folder, prefix, listed) = (folder.clone(), prefix.to_owned(), folder.clone());
        blocking("list", listed.as_str(), move || {
            let mut found = Vec::new();
            for id in names(&root, &path)? {
                let id = id?;
                // What is not named as ours are is none of ours.
                let Some(object) = finished_name(&id).filter(|name| name.starts_with(&prefix)) else {
                    continue;
                };
                let Ok(object) = folder.object(object) else { continue };
                match fs::symlink_metadata(path.join(&id)) {
                    Ok(metadata) if metadata.is_file() => {
                        let (bytes, modified) = (metadata.len(), modified(&metadata));
                        found.push(Partial { object, id, bytes, modified });
                    }
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(found)
        })
        .await
    }

    async fn discard(&self, partial: &Partial) -> Result<()> {
        let root = self.root.clone();
        let path = self.folder_path(&partial.object.folder).join(&partial.id);
        blocking("discard", &partial.object, move || remove(&root, &path).map(drop)).await
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

/// The names in a folder, as they are read; none when it is not there.
fn names(root: &Root, folder: &Path) -> io::Result<impl Iterator<Item = io::Result<String>> + use<>> {
    root.check()?;
    let entries = match fs::read_dir(folder) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    // A name that is no text is none of ours.
    let name = |entry: io::Result<fs::DirEntry>| entry.map(|entry| entry.file_name().into_string().ok());
    Ok(entries.into_iter().flatten().filter_map(move |entry| name(entry).transpose()))
}

fn unfinished_prefix(name: &str) -> String {
    format!(".tmp.{name}")
}

/// What a file is to be called that is not finished; none if it is something else.
fn finished_name(temporary: &str) -> Option<&str> {
    let (name, id) = temporary.strip_prefix(".tmp.")?.rsplit_once('.')?;
    (id.len() == 32 && Uuid::try_parse(id).is_ok()).then_some(name)
}

fn modified(metadata: &fs::Metadata) -> Option<Timestamp> {
    metadata.modified().ok()?.try_into().ok()
}

/// Removes a file; false if it is not there, or not any more.
fn remove(root: &Root, path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => root.check().map(|()| false),
        Err(error) => Err(error),
    }
}

/// Makes durable what became of this name. If another writer has tidied its folder away since, the name went with that, and
/// the folder above it tells.
fn sync_folder(path: &Path) -> io::Result<()> {
    for folder in path.ancestors().skip(1) {
        match File::open(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            folder => return folder?.sync_all(),
        }
    }
    Ok(())
}

/// Makes the folders below `root` that are missing, durably.
fn make_folders(root: &Root, folder: &Path) -> io::Result<()> {
    if folder == root.path || folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make_folders(root, parent)?;
    }
    match fs::DirBuilder::new().mode(FOLDER_MODE).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(error),
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(FOLDER_MODE))?;
    sync_folder(folder)
}

/// Opens the file of an object. What else has its name is refused, and not waited for, as would be a pipe.
fn open_object(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::other(
        "it is damaged: what has its name is no file; move that away, and put the file back if you have it",
    ))
}

/// Looks anew for as long as what has a name is another file by the time it is looked at.
fn while_stale<T>(look: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let begun = Instant::now();
    loop {
        match look() {
            Err(error)
                if error.kind() == ErrorKind::StaleNetworkFileHandle && begun.elapsed() < CHANGES_MAX =>
            {
                thread::sleep(LOCK_PAUSE);
            }
            looked => return looked,
        }
    }
}

/// A file that is locked against all others who lock it, by whatever name. Dropping it lets it go.
struct Locked {
    file: File,
    /// Behind the file, which is closed first: what is removed while it is open stays on NFS until it is closed.
    _link: Option<Link>,
}

impl Locked {
    /// Locks the file that has this name, and begins what may take its place; none if there is none.
    fn find(root: &Root, path: &Path) -> io::Result<Option<(Self, Unfinished)>> {
        match while_stale(|| Self::try_find(root, path)) {
            Err(error) if error.kind() == ErrorKind::NotFound => root.check().map(|()| None),
            found => found.map(Some),
        }
    }

    /// Fails with [`ErrorKind::StaleNetworkFileHandle`] if the name was given to another file meanwhile, by whoever held the lock:
    /// ours is then on one that nobody finds any more.
    fn try_find(root: &Root, path: &Path) -> io::Result<(Self, Unfinished)> {
        let (begun, locked) = (Instant::now(), Self::open(path)?);
        while let Err(errno) = rustix::fs::flock(&locked.file, FlockOperation::NonBlockingLockExclusive) {
            if errno != Errno::WOULDBLOCK {
                return Err(errno.into());
            }
            // A lock that is not given back, of a process that is stopped, must not hold a thread for ever.
            if begun.elapsed() >= LOCK_MAX {
                let text = format!("another process has kept it locked for {} seconds", LOCK_MAX.as_secs());
                return Err(io::Error::new(ErrorKind::ResourceBusy, text));
            }
            thread::sleep(LOCK_PAUSE);
        }
        // What a client of NFS remembers of a folder may be old. That another machine has changed it is seen by who changes it as
        // well, so this comes before the look at the name.
        let unfinished = Unfinished::create(root, path)?;
        let (ours, there) = (locked.file.metadata()?, fs::symlink_metadata(path)?);
        if (there.dev(), there.ino()) != (ours.dev(), ours.ino()) {
            return Err(Errno::STALE.into());
        }
        Ok((locked, unfinished))
    }

    /// Opens the file by a name of our own, where it can have one more. What is open by the name that is to be another file's is
    /// first renamed by a client of NFS, and for a moment other machines find nothing under that name.
    fn open(path: &Path) -> io::Result<Self> {
        let name = temporary(path)?;
        let link = match fs::hard_link(path, &name) {
            Ok(()) => Some(Link { name, is_there: true }),
            Err(error) if error.kind() == ErrorKind::StaleNetworkFileHandle => return Err(error),
            Err(_) => None,
        };
        let name = link.as_ref().map_or(path, |link| link.name.as_path());
        // NFS locks only what is open for writing.
        Ok(Self { file: open_object(File::options().read(true).write(true), name)?, _link: link })
    }
}

/// A name of a file that is no object's. Dropping it removes the name.
struct Link {
    name: PathBuf,
    is_there: bool,
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.is_there {
            // What stays behind is hidden, and `tidy` removes it.
            fs::remove_file(&self.name).ok();
        }
    }
}

/// A name beside this one that is no object's.
fn temporary(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "it has no name"))?;
    Ok(path.with_file_name(format!("{}.{}", unfinished_prefix(name), Uuid::new_v4().simple())))
}

/// Whether an object may take the place of another one.
#[derive(Clone, Copy)]
enum Publish {
    New,
    Over,
}

/// A file that has no name of its own yet. Dropping it removes it.
struct Unfinished {
    file: File,
    /// Behind the file, as with [`Locked`].
    temporary: Link,
    path: PathBuf,
}

impl Unfinished {
    fn create(root: &Root, path: &Path) -> io::Result<Self> {
        root.check()?;
        let temporary = temporary(path)?;
        let open = || File::options().write(true).create_new(true).open(&temporary);
        // The folder is nearly always there. It may be tidied away by another writer even while and after it is made.
        let mut tries_left = 10;
        let file = loop {
            match open() {
                Err(error) if error.kind() == ErrorKind::NotFound && tries_left > 0 => {
                    tries_left -= 1;
                    match temporary.parent().map(|folder| make_folders(root, folder)) {
                        Some(Err(error)) if error.kind() != ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                file => break file?,
            }
        };
        let temporary = Link { name: temporary, is_there: true };
        let unfinished = Self { file, temporary, path: path.to_owned() };
        unfinished.file.set_permissions(fs::Permissions::from_mode(FILE_MODE))?;
        Ok(unfinished)
    }

    fn publish(self, publish: Publish) -> io::Result<()> {
        let Self { file, mut temporary, path } = self;
        file.sync_all()?;
        drop(file);
        match publish {
            Publish::Over => fs::rename(&temporary.name, &path)?,
            Publish::New => rename_new(&temporary.name, &path)?,
        }
        temporary.is_there = false;
        sync_folder(&path)
    }
}

/// Renames, unless the new name is taken.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system can, NFS among them; a hard link is as atomic.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        result => Ok(result?),
    }
}

/// Gives a file another name. Says whether it did, which it does not if the file is not there, or the file system cannot.
fn link(root: &Root, from: &Path, to: &Path) -> io::Result<bool> {
    // A folder may be tidied away by another writer even while and after it is made.
    let mut tries_left = 10;
    loop {
        let error = match fs::hard_link(from, to) {
            Ok(()) => return sync_folder(to).map(|()| true),
            Err(error) => error,
        };
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT) if !from.try_exists()? => return root.check().map(|()| false),
            Some(Errno::NOENT) if tries_left > 0 => {
                tries_left -= 1;
                match to.parent().map(|folder| make_folders(root, folder)) {
                    Some(Err(error)) if error.kind() != ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            // No hard links here, not of other people's files, or not that many of one file.
            Some(
                Errno::PERM
                | Errno::ACCESS
                | Errno::MLINK
                | Errno::XDEV
                | Errno::INVAL
                | Errno::NOSYS
                | Errno::OPNOTSUPP,
            ) => return Ok(false),
            _ => return Err(error),
        }
    }
}

struct Writer {
    object: ObjectName,
    file: Option<Unfinished>,
}

impl Writer {
    async fn with_file<T: Send + 'static>(
        &mut self,
        action: &'static str,
        work: impl FnOnce(Unfinished) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        // A write that failed took the file with it: what it left is unknown, so nothing may follow.
        let file = self.file.take();
        blocking(action, &self.object, move || match file {
            Some(file) => work(file),
            None => Err(io::Error::other("an earlier write to it failed")),
        })
        .await
    }
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let file = self
            .with_file("write", move |mut unfinished| {
                unfinished.file.write_all(&bytes)?;
                Ok(unfinished)
            })
            .await?;
        self.file = Some(file);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<()> {
        self.with_file("write", |unfinished| unfinished.publish(Publish::New)).await
    }
}
