//! The broker: moves bytes with properties to and from RabbitMQ, and keeps at it when the connection goes.
//!
//! The only room that names lapin. It knows exchanges, queues, confirms and how a delivery is settled. It must not
//! know jobs or JSON: what a body means is the business of `message`, and when a delivery is settled that of
//! `worker`.
//!
//! One connection serves all. RabbitMQ stops reading from a connection that publishes while it is short of memory
//! or disk, so then nothing is settled either; that is right for us, for nothing is settled before its event is out.

mod connection;
mod dead;
mod delivery;
mod dial;
mod error;
mod jobs;
mod mend;
mod message;
mod publisher;
mod recall;
mod rpc;
mod settings;
mod subscription;
mod topology;
mod turn;

pub use dead::{DeadLetter, DeadLetters};
pub use delivery::Delivery;
pub use error::{Cause, Error};
pub use jobs::Jobs;
pub use message::Properties;
#[cfg(any(test, fuzzing))]
pub(crate) use message::fuzz_headers;
pub use publisher::{Outgoing, Routed};
pub use rpc::{Replies, Rpc, RpcDeliveries, RpcDelivery, RpcQueues, RpcSettings};
pub use settings::{AmqpUrl, InvalidTransportUrl, InvalidUrl, QueueKind, Reach, Settings, Tls, TransportUrl};
pub use subscription::{Notice, Subscription};
pub use turn::Turn;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::DropGuard;

use lapin::types::ShortString;

use connection::{Link, Live};
use message::short;
use topology::{JOB, Topology};

/// How it stands with the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It is open, and the topology is declared.
    Connected,
    /// It is not; it is being tried again unless we closed it.
    Disconnected {
        /// What happened last.
        why: String,
    },
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connected => f.write_str("connected"),
            Self::Disconnected { why } => write!(f, "not connected: {why}"),
        }
    }
}

/// A broker that is connected, or tries to be. Clones share the connection; it ends with the last of them.
#[derive(Clone)]
pub struct Broker {
    link: Link,
    topology: Arc<Topology>,
    _guard: Arc<DropGuard>,
}

impl Broker {
    /// Connects and declares the topology. Tries once; a connection that is lost later is made again.
    pub async fn connect(settings: Settings) -> Result<Self, Error> {
        let reach = settings.reach();
        let topology = Topology::new(settings)?;
        let live = connection::connect(&reach, Some(&topology)).await?;
        Ok(Self::with(reach, topology, Some(live)))
    }

    /// Returns at once and keeps trying to connect. Fails only if the settings cannot be used at all.
    pub fn start(settings: Settings) -> Result<Self, Error> {
        let reach = settings.reach();
        Ok(Self::with(reach, Topology::new(settings)?, None))
    }

    fn with(reach: Reach, topology: Topology, live: Option<Live>) -> Self {
        let topology = Arc::new(topology);
        let link = Link::start(reach, Some(Arc::clone(&topology)), live);
        let guard = Arc::new(link.closing.clone().drop_guard());
        Self { link, topology, _guard: guard }
    }

    /// Tells how it stands with the connection, now and at every change.
    pub fn state(&self) -> watch::Receiver<State> {
        self.link.state.clone()
    }

    /// Publishes a message and waits until the broker has it safely, over reconnects, for `publish_seconds_max`.
    /// After an error, and after a reconnect, the broker may have it none the less, or twice.
    pub async fn publish(&self, outgoing: Outgoing) -> Result<Routed, Error> {
        let properties = message::write(&outgoing.properties)?;
        publisher::publish(&self.link, &outgoing.exchange, &outgoing.routing_key, &outgoing.body, properties)
            .await
    }

    /// Publishes a job.
    pub async fn publish_job(&self, body: Bytes, properties: Properties) -> Result<Routed, Error> {
        let exchange = self.topology.jobs.to_string();
        self.publish(Outgoing { exchange, routing_key: JOB.into(), body, properties }).await
    }

    /// Publishes a message to all workers, and to a queue for one of them to keep.
    pub async fn publish_control(&self, body: Bytes, properties: Properties) -> Result<Routed, Error> {
        let exchange = self.topology.control.to_string();
        self.publish(Outgoing { exchange, routing_key: String::new(), body, properties }).await
    }

    /// Publishes an event. `Routed::Nowhere` means that nobody listens.
    pub async fn publish_event(
        &self,
        routing_key: impl Into<String>,
        body: Bytes,
        properties: Properties,
    ) -> Result<Routed, Error> {
        let exchange = self.topology.events.to_string();
        self.publish(Outgoing { exchange, routing_key: routing_key.into(), body, properties }).await
    }

    /// Publishes a reply to the queue that waits for it. `Routed::Nowhere` means that it does not exist any more.
    pub async fn publish_reply(
        &self,
        queue: impl Into<String>,
        body: Bytes,
        properties: Properties,
    ) -> Result<Routed, Error> {
        self.publish(Outgoing { exchange: String::new(), routing_key: queue.into(), body, properties }).await
    }

    /// Takes jobs, at most `slot_count` at a time: the next one comes when one of those was settled or dropped. And
    /// `ahead_count` more, while nobody else who takes jobs has a slot for them.
    pub fn jobs(&self, slot_count: usize, ahead_count: usize) -> Jobs {
        Jobs::start(&self.link, &self.topology, &self.topology.jobs, slot_count, ahead_count)
    }

    /// Takes what is published to all workers once for all of them, one at a time, so that one of them keeps it.
    pub fn cancels(&self) -> Jobs {
        Jobs::start(&self.link, &self.topology, &self.topology.cancels, 1, 0)
    }

    /// Listens to what is published to all workers, from the moment on that there is a connection.
    pub fn control(&self) -> Subscription {
        let exchange = self.topology.control.clone();
        // Nobody waits for the first time.
        let (ready, _) = oneshot::channel();
        Subscription::start(&self.link, exchange, ShortString::default(), ready)
    }

    /// Listens to the events whose routing key matches `pattern` (`*` is one word, `#` any number of them). What is
    /// published after this returned is not missed.
    pub async fn events(&self, pattern: &str) -> Result<Subscription, Error> {
        let pattern = short("the pattern of events", pattern)?;
        let exchange = self.topology.events.clone();
        let (ready, opened) = oneshot::channel();
        let subscription = Subscription::start(&self.link, exchange, pattern, ready);
        let opened = async { opened.await.unwrap_or(Err(Error::Closed)) };
        self.link.bounded(|| "listen to events".into(), opened).await?;
        Ok(subscription)
    }

    /// Takes a name for this connection alone; none if another one has it.
    pub async fn turn(&self, name: &str) -> Result<Option<Turn>, Error> {
        Turn::take(&self.link, &self.topology.settings.prefix, name).await
    }

    /// Takes those messages back that were put off and whose body `is_wanted`, before their time is over. Nobody who looks at
    /// the same moment sees them, nor the others.
    pub async fn recall(&self, is_wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Delivery>, Error> {
        recall::recall(&self.link, &self.topology, is_wanted).await
    }

    /// Opens the queue of messages that were given up.
    pub async fn dead_letters(&self) -> Result<DeadLetters, Error> {
        DeadLetters::open(&self.link, &self.topology).await
    }

    /// Leaves the broker. What was handed out and not settled goes back.
    pub async fn close(&self) {
        self.link.close().await;
    }
}
