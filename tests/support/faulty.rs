//! A store that breaks at one of the calls to it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use backhaul::store::{
    Error, Folder, ObjectName, ObjectStore, ObjectWriter, Partial, Pieces, Result, TakeListed,
};
use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What happens at the call.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Nothing is done, and the call fails.
    Refused(Errno),
    /// All is done, and the call fails all the same.
    AnswerLost(Errno),
    /// If it is a listing, what it should have is not in it yet.
    ListsNothing,
    /// All is done, and if it is a swap or a copy it is said that it is not.
    SaidNot,
    /// No listing of a container has the newest of a backup's data objects, at whatever call.
    Late,
    /// What is read comes in small pieces, and the second half fails.
    BreaksOff(Errno),
    /// Somebody asks for the end of the job, and the call succeeds.
    Cancel(CancellationToken),
    /// The call tells the first that it is about to begin, and waits for the second.
    Pause(Arc<Notify>, Arc<Notify>),
    /// A byte of what is read or written turns into another one, and the call succeeds. What is read wrong stays so.
    WrongByte,
    /// The process is gone: no call ever returns again, and nothing is cleaned up.
    Death,
}

/// Passes all calls on to another store, but for one.
#[derive(Debug, Clone)]
pub(crate) struct Faulty {
    inner: Arc<dyn ObjectStore>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    fault: Fault,
    at: usize,
    calls: AtomicUsize,
    names: Mutex<Vec<String>>,
    dead: AtomicBool,
    died: Notify,
    under_way: TaskTracker,
}

impl Faulty {
    /// Breaks at the call of this number, from 1.
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, at: usize, fault: Fault) -> Self {
        let state = State {
            fault,
            at,
            calls: AtomicUsize::new(0),
            names: Mutex::default(),
            dead: AtomicBool::new(false),
            died: Notify::new(),
            under_way: TaskTracker::new(),
        };
        Self { inner, state: Arc::new(state) }
    }

    /// Never breaks, but its listings are late.
    pub(crate) fn late(inner: Arc<dyn ObjectStore>) -> Self {
        Self::new(inner, usize::MAX, Fault::Late)
    }

    /// Never breaks; counts only.
    pub(crate) fn counting(inner: Arc<dyn ObjectStore>) -> Self {
        Self::new(inner, usize::MAX, Fault::Death)
    }

    /// The calls so far.
    pub(crate) fn calls(&self) -> usize {
        self.state.calls.load(Ordering::SeqCst)
    }

    /// All calls so far, in order, each with what it was about.
    pub(crate) fn names(&self) -> Vec<String> {
        self.state.names.lock().unwrap().clone()
    }

    /// The call that broke, for people.
    pub(crate) fn broke_at(&self) -> String {
        let names = self.state.names.lock().unwrap();
        names.get(self.state.at - 1).cloned().unwrap_or_default()
    }

    /// Waits for the death, and until what was under way then has come to its end.
    pub(crate) async fn died(&self) {
        self.state.died.notified().await;
        self.state.under_way.close();
        self.state.under_way.wait().await;
    }
}

impl State {
    /// Does `work`, unless the fault is to happen now. Once begun it comes to its end, even if nobody waits for it.
    async fn pass<T: Send + 'static>(
        &self,
        action: &'static str,
        object: String,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        if self.dead.load(Ordering::SeqCst) {
            return never(work).await;
        }
        let number = {
            let mut names = self.names.lock().unwrap();
            names.push(format!("{action} {object}"));
            self.calls.fetch_add(1, Ordering::SeqCst) + 1
        };
        let failed = |errno: Errno| Err(Error::io(action, &object, errno.into()));
        match &self.fault {
            _ if number != self.at => {}
            Fault::Refused(errno) => return failed(*errno),
            Fault::AnswerLost(errno) => {
                drop(self.under_way.spawn(work).await.unwrap());
                return failed(*errno);
            }
            Fault::Cancel(token) => token.cancel(),
            // Whoever made the call sees to it.
            Fault::WrongByte | Fault::SaidNot | Fault::ListsNothing | Fault::BreaksOff(_) | Fault::Late => {}
            Fault::Pause(reached, go_on) => {
                reached.notify_one();
                go_on.notified().await;
            }
            Fault::Death => {
                self.dead.store(true, Ordering::SeqCst);
                self.died.notify_one();
                return never(work).await;
            }
        }
        self.under_way.spawn(work).await.unwrap()
    }
}

impl State {
    /// What is written by the next call, if that is not to be something else.
    fn written(&self, bytes: Bytes) -> Bytes {
        if self.is_wrong_next() { with_a_wrong_byte(&bytes) } else { bytes }
    }

    fn is_wrong_next(&self) -> bool {
        matches!(self.fault, Fault::WrongByte) && self.is_next()
    }

    /// Whether the next call says what was done.
    fn says_what_is(&self) -> bool {
        !(matches!(self.fault, Fault::SaidNot) && self.is_next())
    }

    fn is_next(&self) -> bool {
        self.calls.load(Ordering::SeqCst) + 1 == self.at
    }
}

/// The first half of an object in small pieces, and then an error.
async fn half_of(pieces: Pieces, object: &ObjectName, errno: Errno) -> Result<Pieces> {
    let bytes = pieces.collect(object, 64 << 20).await?;
    let (sender, half) = Pieces::channel();
    let error = Error::io("read", object, errno.into());
    tokio::spawn(async move {
        for piece in bytes[..bytes.len() / 2].chunks(16) {
            if sender.send(Ok(Bytes::copy_from_slice(piece))).await.is_err() {
                return;
            }
        }
        let _ = sender.send(Err(error)).await;
    });
    Ok(half)
}

fn with_a_wrong_byte(bytes: &Bytes) -> Bytes {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 0x10;
    }
    bytes.into()
}

/// Whoever is dead does nothing, and removes no temporary files either.
async fn never<T>(work: impl Future) -> T {
    std::mem::forget(work);
    std::future::pending().await
}

macro_rules! pass {
    ($self:ident, $action:ident, $object:ident $(, $more:ident)*) => {{
        let (inner, object) = ($self.inner.clone(), $object.clone());
        $self.state.pass(stringify!($action), object.to_string(), async move {
            inner.$action(&object $(, $more)*).await
        })
        .await
    }};
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        let bytes = self.state.written(bytes);
        pass!(self, put, object, bytes)
    }

    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        let bytes = self.state.written(bytes);
        pass!(self, replace, object, bytes)
    }

    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool> {
        let bytes = self.state.written(bytes);
        let is_said = self.state.says_what_is();
        pass!(self, swap, object, was, bytes).map(|done: bool| done && is_said)
    }

    async fn create(&self, object: &ObjectName) -> Result<Box<dyn ObjectWriter>> {
        let inner: Box<dyn ObjectWriter> = pass!(self, create, object)?;
        Ok(Box::new(Writer { inner: Some(inner), object: object.clone(), state: self.state.clone() }))
    }

    async fn get(&self, object: &ObjectName) -> Result<Pieces> {
        if self.state.is_wrong_next()
            && let Ok(pieces) = self.inner.get(object).await
        {
            let bytes = pieces.collect(object, 64 << 20).await?;
            self.inner.replace(object, with_a_wrong_byte(&bytes)).await?;
        }
        let breaks_off = match self.state.fault {
            Fault::BreaksOff(errno) if self.state.is_next() => Some(errno),
            _ => None,
        };
        let pieces = pass!(self, get, object)?;
        match breaks_off {
            Some(errno) => half_of(pieces, object, errno).await,
            None => Ok(pieces),
        }
    }

    async fn copy(&self, from: &ObjectName, to: &ObjectName) -> Result<bool> {
        let (inner, from, to) = (self.inner.clone(), from.clone(), to.clone());
        let is_said = self.state.says_what_is();
        let copied =
            self.state.pass("copy", to.to_string(), async move { inner.copy(&from, &to).await }).await;
        copied.map(|copied| copied && is_said)
    }

    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()> {
        let (inner, folder, prefix) = (self.inner.clone(), folder.clone(), prefix.to_owned());
        let path = folder.as_str().to_owned();
        let lists_nothing = matches!(self.state.fault, Fault::ListsNothing) && self.state.is_next();
        let is_late = matches!(self.state.fault, Fault::Late) && !path.starts_with(".backhaul");
        let list = async move { inner.list(&folder, &prefix).await };
        let mut listed = self.state.pass("list", path, list).await?;
        let newest = listed.iter().rposition(|object| object.name.ends_with(|c: char| c.is_ascii_digit()));
        if let Some(newest) = newest.filter(|_| is_late) {
            listed.remove(newest);
        }
        if !lists_nothing {
            listed.into_iter().for_each(take);
        }
        Ok(())
    }

    async fn delete(&self, object: &ObjectName) -> Result<()> {
        pass!(self, delete, object)
    }

    async fn tidy(&self, folder: &Folder, prefix: &str) -> Result<()> {
        let (inner, folder, prefix) = (self.inner.clone(), folder.clone(), prefix.to_owned());
        let path = folder.as_str().to_owned();
        self.state.pass("tidy", path, async move { inner.tidy(&folder, &prefix).await }).await
    }

    async fn partials(&self, folder: &Folder, prefix: &str) -> Result<Vec<Partial>> {
        let (inner, folder, prefix) = (self.inner.clone(), folder.clone(), prefix.to_owned());
        let path = folder.as_str().to_owned();
        self.state.pass("partials", path, async move { inner.partials(&folder, &prefix).await }).await
    }

    async fn discard(&self, partial: &Partial) -> Result<()> {
        let (inner, partial) = (self.inner.clone(), partial.clone());
        let path = partial.object.to_string();
        self.state.pass("discard", path, async move { inner.discard(&partial).await }).await
    }
}

struct Writer {
    inner: Option<Box<dyn ObjectWriter>>,
    object: ObjectName,
    state: Arc<State>,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let mut inner = self.inner.take().unwrap();
        let bytes = self.state.written(bytes);
        let work = async move {
            inner.write(bytes).await?;
            Ok(inner)
        };
        self.inner = Some(self.state.pass("write", self.object.to_string(), work).await?);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<()> {
        let inner = self.inner.take().unwrap();
        self.state.pass("finish", self.object.to_string(), async move { inner.finish().await }).await
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.state.dead.load(Ordering::SeqCst) {
            std::mem::forget(self.inner.take());
        }
    }
}
