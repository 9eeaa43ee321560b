//! Remote calls between us and Cinder's services: ours to theirs, and theirs to us.
//!
//! The queues are `broker::Rpc`'s business, and what is in the messages that of `message::oslo`. Here a reply finds its call,
//! a message that comes twice is handed out once, and a caller who wants signs of life gets them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{OnceCell, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::broker::{self, Replies, Routed, RpcDeliveries, RpcDelivery, RpcSettings, State};
use crate::error::{Causes, Class};
use crate::message::oslo::{Answer, Call, Failure, Reply, Request, SeenIds};

/// How long a call waits before it looks again for a service that is not there.
const NOWHERE_PAUSE: Duration = Duration::from_millis(500);

/// Who is to do something.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    topic: String,
    host: Option<String>,
}

impl Target {
    /// Any instance of a service, such as `cinder-scheduler`.
    pub fn any(topic: impl Into<String>) -> Self {
        Self { topic: topic.into(), host: None }
    }

    /// The instance on a host.
    pub fn on(topic: impl Into<String>, host: impl Into<String>) -> Self {
        Self { topic: topic.into(), host: Some(host.into()) }
    }

    /// The volume service of that name, `host@backend`.
    pub fn volume_service(service: &str) -> Self {
        let host = service.split('@').next().unwrap_or(service);
        Self::on(format!("cinder-volume.{service}"), host)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            None => f.write_str(&self.topic),
            Some(host) => write!(f, "{}.{host}", self.topic),
        }
    }
}

/// Says why a service did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The broker did not take the request.
    #[error("cannot send {method} to {target}")]
    Broker {
        /// The method.
        method: String,
        /// The service.
        target: Target,
        /// Why.
        source: broker::Error,
    },
    /// The service has no queue.
    #[error(
        "nobody takes {method} at {target}: check that this service runs and uses the same broker and control_exchange"
    )]
    NoService {
        /// The method.
        method: String,
        /// The service.
        target: Target,
    },
    /// The service did not answer; it may do none the less what it was asked for.
    #[error(
        "{target} has not answered {method} within {seconds} seconds: look into its log; it may still be at it"
    )]
    Timeout {
        /// The method.
        method: String,
        /// The service.
        target: Target,
        /// How long we have waited.
        seconds: u64,
    },
    /// The service tried and failed.
    #[error("{target} failed to do {method}")]
    Failed {
        /// The method.
        method: String,
        /// The service.
        target: Target,
        /// The exception there.
        source: Failure,
    },
}

impl CallError {
    /// What the error means for who asked.
    pub fn class(&self) -> Class {
        match self {
            Self::Broker { source, .. } => source.class(),
            Self::NoService { .. } | Self::Timeout { .. } => Class::Transient,
            Self::Failed { .. } => Class::Permanent,
        }
    }
}

/// A connection to Cinder's other services. Clones share it; it ends with the last of them.
#[derive(Clone)]
pub struct Rpc {
    wire: broker::Rpc,
    inbox: Arc<OnceCell<Inbox>>,
}

/// The queue of our replies, and who waits for them.
struct Inbox {
    queue: String,
    waiting: Waiting,
    _reader: AbortOnDropHandle<()>,
}

type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Answer>>>>;

impl Rpc {
    /// Connects. Tries once; a connection that is lost later is made again.
    pub async fn connect(settings: RpcSettings) -> Result<Self, broker::Error> {
        Ok(Self { wire: broker::Rpc::connect(settings).await?, inbox: Arc::default() })
    }

    /// Returns at once and keeps trying to connect. Fails only if the settings cannot be used at all.
    pub fn start(settings: RpcSettings) -> Result<Self, broker::Error> {
        Ok(Self { wire: broker::Rpc::start(settings)?, inbox: Arc::default() })
    }

    /// Tells how it stands with the connection, now and at every change.
    pub fn state(&self) -> watch::Receiver<State> {
        self.wire.state()
    }

    /// Asks for something and does not wait for it to be done.
    pub async fn cast(&self, target: &Target, request: &Request) -> Result<(), CallError> {
        let sent = self.wire.send(&target.topic, target.host.as_deref(), &request.encode(), None).await;
        match sent.map_err(|source| sending(target, request, source))? {
            Routed::Queued => Ok(()),
            Routed::Nowhere => {
                Err(CallError::NoService { method: request.method.clone(), target: target.clone() })
            }
        }
    }

    /// Asks all instances of a service for something; that there may be none is no fault.
    pub async fn fanout(&self, topic: &str, request: &Request) -> Result<(), CallError> {
        let sent = self.wire.fanout(topic, &request.encode()).await;
        sent.map(drop).map_err(|source| sending(&Target::any(topic), request, source))
    }

    /// Asks for something and waits for its result, for `patience` at most. A service that is not there is waited for as long.
    pub async fn call(
        &self,
        target: &Target,
        request: Request,
        patience: Duration,
    ) -> Result<Value, CallError> {
        let end = Instant::now() + patience;
        let inbox = self.inbox.get_or_try_init(|| Inbox::open(&self.wire)).await;
        let inbox = inbox.map_err(|source| sending(target, &request, source))?;
        let request = request.calling(&inbox.queue);
        let answer = inbox.expect(&request);
        let body = request.encode();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let sent = self.wire.send(&target.topic, target.host.as_deref(), &body, Some(left)).await;
            match sent.map_err(|source| sending(target, &request, source))? {
                Routed::Queued => break,
                Routed::Nowhere if left > NOWHERE_PAUSE => sleep(NOWHERE_PAUSE).await,
                Routed::Nowhere => {
                    return Err(CallError::NoService { method: request.method, target: target.clone() });
                }
            }
        }
        match timeout_at(end, answer.receiver()).await {
            Ok(Some(Answer::Result(result))) => Ok(result),
            Ok(Some(Answer::Failure(source))) => {
                Err(CallError::Failed { method: request.method, target: target.clone(), source })
            }
            Ok(Some(Answer::Heartbeat) | None) | Err(_) => Err(CallError::Timeout {
                method: request.method,
                target: target.clone(),
                seconds: patience.as_secs(),
            }),
        }
    }

    /// Waits until a service has begun all that it was asked for before, for `patience` at most; `probe` is a request that changes
    /// nothing. Requests are taken in their order: an answer to it, even that it cannot be done, comes after those before it were
    /// begun. False if none came.
    pub async fn catches_up(&self, target: &Target, probe: Request, patience: Duration) -> bool {
        matches!(self.call(target, probe, patience).await, Ok(_) | Err(CallError::Failed { .. }))
    }

    /// Sends a notification to the queue `topic.priority`.
    pub async fn notify(&self, topic: &str, priority: &str, body: &[u8]) -> Result<(), broker::Error> {
        self.wire.notify(topic, priority, body).await
    }

    /// Takes what a service is asked for, as the instance of `topic` on `host`. The broker hands out at most `prefetch_count`
    /// requests of each queue that are not settled yet; 0 means any number.
    ///
    /// A broker that is away is waited for.
    pub async fn serve(
        &self,
        topic: &str,
        host: &str,
        prefetch_count: u16,
    ) -> Result<Requests, broker::Error> {
        let deliveries = self.wire.serve(topic, host, prefetch_count).await?;
        Ok(Requests { deliveries, wire: self.wire.clone(), known: Known::default() })
    }

    /// How many take what the instance of `topic` on `host` is asked for, us included.
    pub async fn consumer_count(&self, topic: &str, host: &str) -> Result<u32, broker::Error> {
        self.wire.consumer_count(topic, host).await
    }

    /// Leaves the broker. What was handed out and not settled goes back.
    pub async fn close(&self) {
        self.wire.close().await;
    }
}

fn sending(target: &Target, request: &Request, source: broker::Error) -> CallError {
    CallError::Broker { method: request.method.clone(), target: target.clone(), source }
}

impl Inbox {
    async fn open(wire: &broker::Rpc) -> Result<Self, broker::Error> {
        let replies = wire.replies().await?;
        let waiting = Waiting::default();
        let queue = replies.queue().to_owned();
        let reader = tokio::spawn(read(replies, Arc::clone(&waiting)));
        Ok(Self { queue, waiting, _reader: AbortOnDropHandle::new(reader) })
    }

    fn expect(&self, request: &Request) -> Expected {
        let msg_id = request.call.as_ref().map(|call| call.msg_id.clone()).unwrap_or_default();
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(msg_id.clone(), sender);
        Expected { msg_id, receiver, waiting: Arc::clone(&self.waiting) }
    }
}

async fn read(mut replies: Replies, waiting: Waiting) {
    while let Some(body) = replies.next().await {
        match Reply::parse(&body) {
            Ok(Reply { answer: Answer::Heartbeat, .. }) => {}
            Ok(Reply { msg_id, answer }) => match lock(&waiting).remove(&msg_id) {
                Some(sender) => {
                    let _ = sender.send(answer);
                }
                None => debug!(msg_id, "reply that nobody waits for any more"),
            },
            Err(error) => warn!(%error, "reply passed over"),
        }
    }
}

/// An answer that is to come. Dropped, it is waited for no more.
struct Expected {
    msg_id: String,
    receiver: oneshot::Receiver<Answer>,
    waiting: Waiting,
}

impl Expected {
    async fn receiver(mut self) -> Option<Answer> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.msg_id);
    }
}

/// What we are asked for.
pub struct Requests {
    deliveries: RpcDeliveries,
    wire: broker::Rpc,
    known: Known,
}

/// The requests that were handed out, and the last ones that were done with.
#[derive(Clone, Default)]
struct Known(Arc<Mutex<Book>>);

#[derive(Default)]
struct Book {
    /// All deliveries of each request that is at work: after its channel was lost, the broker delivers it once more.
    open: HashMap<String, Vec<RpcDelivery>>,
    done: SeenIds,
}

impl Requests {
    /// Waits for the next request. One that is at work already is not handed out again when it is delivered again, nor one of
    /// the last that were done. What cannot be read is dropped, as nobody will ever be able to. None after `stop` and after
    /// the connection was closed.
    pub async fn next(&mut self) -> Option<Incoming> {
        loop {
            let delivery = self.deliveries.next().await?;
            let request = match Request::parse(&delivery.body) {
                Ok(request) => request,
                Err(error) => {
                    warn!(%error, "request dropped");
                    let _ = delivery.ack().await;
                    continue;
                }
            };
            let redelivered = delivery.redelivered;
            // One without an id is never taken for another one.
            let id = request.unique_id.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
            match self.known.enter(&id, delivery) {
                Entered::New => {}
                Entered::AtWork => {
                    debug!(method = request.method, unique_id = id, "request that is at work came again");
                    continue;
                }
                Entered::Done(delivery) => {
                    debug!(method = request.method, unique_id = id, "request that was done came again");
                    let _ = delivery.ack().await;
                    continue;
                }
            }
            let heartbeat = request.call.as_ref().and_then(|call| heartbeats(&self.wire, call));
            let (wire, known) = (self.wire.clone(), self.known.clone());
            return Some(Incoming { request, redelivered, id, known, wire, heartbeat, accepted: false });
        }
    }

    /// Takes no more requests. Those that were handed out can still be settled; those that were not go back.
    pub fn stop(&mut self) {
        self.deliveries.stop();
    }
}

enum Entered {
    New,
    AtWork,
    Done(Box<RpcDelivery>),
}

impl Known {
    fn enter(&self, id: &str, delivery: RpcDelivery) -> Entered {
        let mut book = lock(&self.0);
        if let Some(deliveries) = book.open.get_mut(id) {
            deliveries.retain(|delivery| !delivery.is_lost());
            deliveries.push(delivery);
            return Entered::AtWork;
        }
        if book.done.has(id) {
            return Entered::Done(Box::new(delivery));
        }
        book.open.insert(id.to_owned(), vec![delivery]);
        Entered::New
    }

    fn leave(&self, id: &str, done: bool) -> Vec<RpcDelivery> {
        let mut book = lock(&self.0);
        if done {
            book.done.add(id);
        }
        book.open.remove(id).unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the caller that we are at it, as often as he wants to hear it.
fn heartbeats(wire: &broker::Rpc, call: &Call) -> Option<AbortOnDropHandle<()>> {
    let (wire, queue, pause) = (wire.clone(), call.reply_queue.clone(), call.heartbeat?);
    let reply = Reply { msg_id: call.msg_id.clone(), answer: Answer::Heartbeat };
    Some(AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            sleep(pause).await;
            if let Err(error) = wire.reply_once(&queue, &reply.encode()).await {
                debug!(error = %Causes(&error), "heartbeat of a call not sent");
            }
        }
    })))
}

/// A request that is ours until we settle it. Dropped unsettled, it goes back to its queue.
pub struct Incoming {
    /// What is asked for.
    pub request: Request,
    /// Somebody, perhaps we before a restart, was handed this request before and did not settle it.
    pub redelivered: bool,
    id: String,
    known: Known,
    wire: broker::Rpc,
    heartbeat: Option<AbortOnDropHandle<()>>,
    accepted: bool,
}

impl Incoming {
    /// Says that the request is not needed any more, and that its answer comes later. It is not taken up again by this process
    /// in any case; after an error another one may.
    pub async fn accept(&mut self) -> Result<(), broker::Error> {
        self.accepted = true;
        self.leave_done().await
    }

    /// Answers, if an answer is wanted, and says that the request is not needed any more. An error means that the caller may
    /// not have heard, or that the request may come again after a restart.
    pub async fn reply(mut self, answer: Result<Value, Failure>) -> Result<(), broker::Error> {
        self.heartbeat = None;
        let mut replied = Ok(());
        if let Some(call) = &self.request.call {
            let answer = answer.map_or_else(Answer::Failure, Answer::Result);
            let reply = Reply { msg_id: call.msg_id.clone(), answer };
            replied = match self.wire.reply(&call.reply_queue, &reply.encode()).await {
                Ok(Routed::Queued) => Ok(()),
                Ok(Routed::Nowhere) => {
                    Err(broker::Error::NoRoute { destination: format!("reply queue {}", call.reply_queue) })
                }
                Err(error) => Err(error),
            };
        }
        // A caller who cannot be told does not want it done once more.
        if self.accepted { replied } else { self.leave_done().await.and(replied) }
    }

    /// Says that the request is not needed any more. This process does not take it up again in any case; after an error
    /// another one may.
    pub async fn ack(self) -> Result<(), broker::Error> {
        self.leave_done().await
    }

    async fn leave_done(&self) -> Result<(), broker::Error> {
        let mut acked = Err(broker::Error::DeliveryLost);
        for delivery in self.known.leave(&self.id, true) {
            let heard = delivery.ack().await;
            if acked.is_err() {
                acked = heard;
            }
        }
        acked
    }

    /// Gives the request back, for whoever takes it next.
    pub async fn requeue(self) -> Result<(), broker::Error> {
        for delivery in self.known.leave(&self.id, false) {
            delivery.requeue().await?;
        }
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // What was not settled goes back with its deliveries.
        drop(self.known.leave(&self.id, false));
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("request", &self.request)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}
