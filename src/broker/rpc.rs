//! Remote calls as OpenStack's services make them over RabbitMQ: the queues of a service, and messages to those of others.
//!
//! The names and properties of exchanges and queues are those of oslo.messaging, for each side declares what both use, and the
//! broker refuses a declaration that differs. A service has a queue that its instances share, one of its own, and one for
//! messages to all of them. What is delivered is acknowledged when whoever got it says so, and not before, as oslo does it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer, ExchangeKind};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tracing::warn;
use uuid::Uuid;

use super::connection::{self, Link, Live};
use super::error::{cause, is_precondition};
use super::message::short;
use super::publisher::{self, Routed};
use super::topology::open_channel;
use super::{Error, Reach, State};
use crate::error::{Causes, Class};

const PERSISTENT: u8 = 2;
/// How many deliveries may wait here for whoever takes them, beyond those that were taken.
const WAITING_COUNT_MAX: usize = 64;
/// How many replies the broker sends before we have acknowledged the first of them.
const REPLY_PREFETCH_COUNT: u16 = 100;
/// How long a reply is tried whose queue is not there: its caller may be about to declare it again. As long as oslo tries.
const REPLY_SECONDS_MAX: u64 = 60;
const REPLY_PAUSE: Duration = Duration::from_millis(250);
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
const REFUSED_PAUSE: Duration = Duration::from_secs(10);
/// How often a queue that is consumed no more is looked at, whether its channel is still there.
const DRAIN_LOOK: Duration = Duration::from_millis(500);

/// What calls between services need to know.
#[derive(Debug, Clone)]
pub struct RpcSettings {
    /// How the broker is reached.
    pub reach: Reach,
    /// The exchange that all services share: `control_exchange`.
    pub exchange: String,
    /// The properties that all services give their queues.
    pub queues: RpcQueues,
}

/// The properties of exchanges and queues, by the options of `[oslo_messaging_rabbit]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RpcQueues {
    /// `amqp_durable_queues`: they are there again after a restart of the broker.
    pub durable: bool,
    /// `amqp_auto_delete`: they go with their last user.
    pub auto_delete: bool,
    /// `rabbit_quorum_queue`: they are replicated, and durable in any case.
    pub quorum: bool,
    /// `rabbit_transient_quorum_queue`: so are those for replies and for messages to all.
    pub transient_quorum: bool,
    /// `rabbit_quorum_delivery_limit`; 0 for none.
    pub quorum_delivery_limit: u32,
    /// `rabbit_quorum_max_memory_length`; 0 for none.
    pub quorum_memory_messages_max: u32,
    /// `rabbit_quorum_max_memory_bytes`; 0 for none.
    pub quorum_memory_bytes_max: u32,
    /// `rabbit_ha_queues`: they are mirrored, by brokers that still know that.
    pub mirrored: bool,
    /// `enable_cancel_on_failover`: the broker says when the queue moves to another mirror; then it is consumed anew.
    pub cancel_on_failover: bool,
    /// `rabbit_transient_queues_ttl`: how long those for replies and for messages to all stay when nobody uses them; 0
    /// for ever.
    pub transient_seconds_max: u32,
}

impl Default for RpcQueues {
    /// What oslo.messaging does when nothing is set.
    fn default() -> Self {
        Self {
            durable: false,
            auto_delete: false,
            quorum: false,
            transient_quorum: false,
            quorum_delivery_limit: 0,
            quorum_memory_messages_max: 0,
            quorum_memory_bytes_max: 0,
            mirrored: false,
            cancel_on_failover: false,
            transient_seconds_max: 1800,
        }
    }
}

impl RpcQueues {
    fn arguments(&self, quorum: bool) -> FieldTable {
        let mut arguments = FieldTable::default();
        let mut limit = |name: &'static str, value: u32| {
            if value > 0 {
                arguments.insert(name.into(), AMQPValue::LongLongInt(value.into()));
            }
        };
        if quorum {
            limit("x-delivery-limit", self.quorum_delivery_limit);
            limit("x-max-in-memory-length", self.quorum_memory_messages_max);
            limit("x-max-in-memory-bytes", self.quorum_memory_bytes_max);
            arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        }
        if self.mirrored {
            arguments.insert("x-ha-policy".into(), AMQPValue::LongString("all".into()));
        }
        arguments
    }

    /// The arguments of a queue that lasts.
    fn lasting(&self) -> FieldTable {
        self.arguments(self.quorum)
    }

    /// The arguments of a queue that goes when nobody uses it.
    fn transient(&self) -> FieldTable {
        let mut arguments = self.arguments(self.transient_quorum);
        if self.transient_seconds_max > 0 {
            let milliseconds = i64::from(self.transient_seconds_max) * 1000;
            arguments.insert("x-expires".into(), AMQPValue::LongLongInt(milliseconds));
        }
        arguments
    }
}

/// An exchange of oslo.messaging.
#[derive(Debug, Clone)]
struct Exchange {
    name: ShortString,
    kind: ExchangeKind,
    durable: bool,
    auto_delete: bool,
}

/// A queue of oslo.messaging, and how it is consumed.
#[derive(Debug, Clone)]
struct Queue {
    name: ShortString,
    durable: bool,
    auto_delete: bool,
    arguments: FieldTable,
    /// Where its messages come from; the default exchange, which knows it by name, if none.
    binding: Option<(Exchange, ShortString)>,
    /// How many of its messages the broker hands out before the first of them is settled; 0 for no limit.
    prefetch_count: u16,
    /// The broker is to say when it moves to another mirror; of a quorum queue it refuses to.
    cancel_on_failover: bool,
    /// It is ours alone, and of no use without us.
    own: bool,
}

/// A connection for calls between services. Clones share it; it ends with the last of them.
#[derive(Clone)]
pub struct Rpc {
    link: Link,
    exchange: ShortString,
    queues: RpcQueues,
    _guard: Arc<DropGuard>,
}

impl Rpc {
    /// Connects. Tries once; a connection that is lost later is made again.
    pub async fn connect(settings: RpcSettings) -> Result<Self, Error> {
        let live = connection::connect(&settings.reach, None).await?;
        Self::with(settings, Some(live))
    }

    /// Returns at once and keeps trying to connect. Fails only if the settings cannot be used at all.
    pub fn start(settings: RpcSettings) -> Result<Self, Error> {
        Self::with(settings, None)
    }

    fn with(settings: RpcSettings, live: Option<Live>) -> Result<Self, Error> {
        let exchange = short("the name of the exchange of all services", &settings.exchange)?;
        let link = Link::start(settings.reach, None, live);
        let guard = Arc::new(link.closing.clone().drop_guard());
        Ok(Self { link, exchange, queues: settings.queues, _guard: guard })
    }

    /// Tells how it stands with the connection, now and at every change.
    pub fn state(&self) -> watch::Receiver<State> {
        self.link.state.clone()
    }

    /// Consumes the queues of a service: the one of its `topic`, that of this instance of it, `topic.host`, and one for what
    /// is sent to all instances. What is sent there after this returned is not missed. Of each queue the broker hands out at
    /// most `prefetch_count` messages that are not settled yet; 0 means any number.
    ///
    /// A broker that is away is waited for, and one that refuses is asked again, if need be for ever; then why is logged.
    pub async fn serve(&self, topic: &str, host: &str, prefetch_count: u16) -> Result<RpcDeliveries, Error> {
        let name = |text: String| short("the name of a queue of the service", &text);
        let topic_name = name(topic.to_owned())?;
        let own_name = name(format!("{topic}.{host}"))?;
        let fanout = self.fanout_exchange(topic)?;
        let lasting = |queue: ShortString| Queue {
            binding: Some((self.shared_exchange(), queue.clone())),
            name: queue,
            durable: self.durable(),
            auto_delete: self.queues.auto_delete,
            arguments: self.queues.lasting(),
            prefetch_count,
            cancel_on_failover: self.queues.cancel_on_failover && !self.queues.quorum,
            own: false,
        };
        let for_all = Queue {
            name: name(format!("{topic}_fanout_{}", Uuid::new_v4().simple()))?,
            durable: self.queues.transient_quorum,
            auto_delete: false,
            arguments: self.queues.transient(),
            binding: Some((fanout, topic_name.clone())),
            prefetch_count,
            cancel_on_failover: self.queues.cancel_on_failover && !self.queues.transient_quorum,
            own: true,
        };
        let (sender, receiver) = mpsc::channel(WAITING_COUNT_MAX);
        let stopping = CancellationToken::new();
        let mut opened = Vec::new();
        for queue in [lasting(topic_name), lasting(own_name), for_all] {
            opened.push(self.consume(queue, sender.clone(), stopping.clone()));
        }
        let deliveries = RpcDeliveries { receiver, stopping };
        for opened in opened {
            opened.await.map_err(|_| Error::Closed)?;
        }
        Ok(deliveries)
    }

    /// Opens a queue for the replies to our calls. What is sent there after this returned is not missed.
    pub async fn replies(&self) -> Result<Replies, Error> {
        let queue = format!("reply_{}", Uuid::new_v4().simple());
        let name = short("the name of a reply queue", &queue)?;
        let (sender, receiver) = mpsc::channel(WAITING_COUNT_MAX);
        let stopping = CancellationToken::new();
        let opened = self.consume(
            Queue {
                name,
                durable: self.queues.transient_quorum,
                auto_delete: false,
                arguments: self.queues.transient(),
                binding: None,
                prefetch_count: REPLY_PREFETCH_COUNT,
                cancel_on_failover: self.queues.cancel_on_failover && !self.queues.transient_quorum,
                own: true,
            },
            sender,
            stopping.clone(),
        );
        let replies = Replies { queue, deliveries: RpcDeliveries { receiver, stopping } };
        let opened = async { opened.await.map_err(|_| Error::Closed) };
        self.link.bounded(|| format!("open reply queue {}", replies.queue), opened).await?;
        Ok(replies)
    }

    fn consume(
        &self,
        queue: Queue,
        sender: mpsc::Sender<RpcDelivery>,
        stopping: CancellationToken,
    ) -> oneshot::Receiver<()> {
        let (ready, opened) = oneshot::channel();
        let listener = Listener { link: self.link.clone(), queue, sender, stopping };
        self.link.tasks.spawn(listener.run(ready));
        opened
    }

    /// Sends a message to one instance of a service, whichever takes it first, or to the one on `host`. It is given up where no
    /// queue takes it, and after `lifetime` in its queue.
    pub async fn send(
        &self,
        topic: &str,
        host: Option<&str>,
        body: &[u8],
        lifetime: Option<Duration>,
    ) -> Result<Routed, Error> {
        let routing_key = match host {
            None => topic.to_owned(),
            Some(host) => format!("{topic}.{host}"),
        };
        self.publish(&self.shared_exchange(), &routing_key, body, lifetime).await
    }

    /// Sends a message to all instances of a service.
    pub async fn fanout(&self, topic: &str, body: &[u8]) -> Result<Routed, Error> {
        self.publish(&self.fanout_exchange(topic)?, "", body, None).await
    }

    /// Sends a reply, for a minute if its queue is not there. `Routed::Nowhere` means that it has not come back.
    pub async fn reply(&self, queue: &str, body: &[u8]) -> Result<Routed, Error> {
        let end = Instant::now() + Duration::from_secs(REPLY_SECONDS_MAX);
        loop {
            let routed = self.reply_once(queue, body).await?;
            if routed == Routed::Queued || Instant::now() >= end {
                return Ok(routed);
            }
            tokio::select! {
                () = self.link.closing.cancelled() => return Err(Error::Closed),
                () = sleep(REPLY_PAUSE) => {}
            }
        }
    }

    /// Sends a reply, if its queue is there.
    pub async fn reply_once(&self, queue: &str, body: &[u8]) -> Result<Routed, Error> {
        publisher::publish(&self.link, "", queue, body, properties(None)).await
    }

    /// Sends a notification to the queue `topic.priority`, which is made if it is not there: whoever listens later finds it.
    pub async fn notify(&self, topic: &str, priority: &str, body: &[u8]) -> Result<(), Error> {
        let routing_key = format!("{topic}.{priority}");
        let exchange = self.shared_exchange();
        // It is there, except for the first time or after somebody deleted it.
        if self.publish(&exchange, &routing_key, body, None).await? == Routed::Queued {
            return Ok(());
        }
        let name = short("the name of a queue of notifications", &routing_key)?;
        let queue = Queue {
            binding: Some((exchange.clone(), name.clone())),
            name,
            durable: self.durable(),
            auto_delete: self.queues.auto_delete,
            arguments: self.queues.lasting(),
            prefetch_count: 0,
            cancel_on_failover: false,
            own: false,
        };
        let declared = async {
            let live = self.link.live().await?;
            queue.declare(&live).await
        };
        self.link.bounded(|| format!("declare queue {routing_key}"), declared).await?;
        match self.publish(&exchange, &routing_key, body, None).await? {
            Routed::Queued => Ok(()),
            Routed::Nowhere => Err(Error::NoRoute { destination: format!("queue {routing_key}") }),
        }
    }

    /// How many consume the queue of a service's instance on a host, us included.
    pub async fn consumer_count(&self, topic: &str, host: &str) -> Result<u32, Error> {
        let queue = format!("{topic}.{host}");
        let name = short("the name of a queue of the service", &queue)?;
        let looking = || format!("look at queue {queue}");
        let looked = async {
            let live = self.link.live().await?;
            let channel = open_channel(&live.connection).await?;
            let options = QueueDeclareOptions { passive: true, ..Default::default() };
            let found = channel.queue_declare(name, options, FieldTable::default()).await;
            Ok(found.map_err(|error| Error::doing(looking(), &error))?.consumer_count())
        };
        self.link.bounded(&looking, looked).await
    }

    /// Leaves the broker. What was handed out and not settled goes back.
    pub async fn close(&self) {
        self.link.close().await;
    }

    async fn publish(
        &self,
        exchange: &Exchange,
        routing_key: &str,
        body: &[u8],
        lifetime: Option<Duration>,
    ) -> Result<Routed, Error> {
        let publish = || {
            publisher::publish(&self.link, exchange.name.as_str(), routing_key, body, properties(lifetime))
        };
        match publish().await {
            // Mostly because the exchange is not there.
            Err(Error::Refused { .. }) => {
                let declared = async {
                    let live = self.link.live().await?;
                    exchange.declare(&live).await
                };
                self.link.bounded(|| format!("declare exchange {}", exchange.name), declared).await?;
                publish().await
            }
            result => result,
        }
    }

    fn durable(&self) -> bool {
        self.queues.durable || self.queues.quorum
    }

    fn shared_exchange(&self) -> Exchange {
        Exchange {
            name: self.exchange.clone(),
            kind: ExchangeKind::Topic,
            durable: self.durable(),
            auto_delete: self.queues.auto_delete,
        }
    }

    fn fanout_exchange(&self, topic: &str) -> Result<Exchange, Error> {
        Ok(Exchange {
            name: short("the name of an exchange to all", &format!("{topic}_fanout"))?,
            kind: ExchangeKind::Fanout,
            durable: self.queues.transient_quorum,
            auto_delete: true,
        })
    }
}

fn properties(lifetime: Option<Duration>) -> BasicProperties {
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("utf-8".into())
        .with_delivery_mode(PERSISTENT)
        .with_priority(0)
        .with_headers(FieldTable::default());
    match lifetime {
        None => properties,
        Some(lifetime) => properties.with_expiration(lifetime.as_millis().to_string().as_str().into()),
    }
}

impl Exchange {
    /// Declares it; without durability if it is there without, as oslo does it.
    async fn declare(&self, live: &Live) -> Result<(), Error> {
        let declare = async |durable| {
            // A refusal closes the channel, so each try has its own.
            let channel = open_channel(&live.connection).await?;
            let options =
                ExchangeDeclareOptions { durable, auto_delete: self.auto_delete, ..Default::default() };
            let (name, kind) = (self.name.clone(), self.kind.clone());
            channel
                .exchange_declare(name, kind, options, FieldTable::default())
                .await
                .map_err(|error| declaring(format!("exchange {}", self.name), &error))
        };
        match declare(self.durable).await {
            Err(Error::Flavour { .. }) if self.durable => declare(false).await,
            result => result,
        }
    }
}

impl Queue {
    /// Declares it and what it is bound to.
    async fn declare(&self, live: &Live) -> Result<(), Error> {
        if let Some((exchange, _)) = &self.binding {
            exchange.declare(live).await?;
        }
        let declare = async |durable| {
            let channel = open_channel(&live.connection).await?;
            let options =
                QueueDeclareOptions { durable, auto_delete: self.auto_delete, ..Default::default() };
            channel
                .queue_declare(self.name.clone(), options, self.arguments.clone())
                .await
                .map_err(|error| declaring(format!("queue {}", self.name), &error))?;
            Ok(channel)
        };
        let channel = match declare(self.durable).await {
            Err(Error::Flavour { .. }) if self.durable => declare(false).await?,
            result => result?,
        };
        let Some((exchange, routing_key)) = &self.binding else { return Ok(()) };
        let options = QueueBindOptions::default();
        channel
            .queue_bind(
                self.name.clone(),
                exchange.name.clone(),
                routing_key.clone(),
                options,
                FieldTable::default(),
            )
            .await
            .map_err(|error| Error::doing(format!("bind queue {} to {}", self.name, exchange.name), &error))
    }

    async fn open(&self, live: &Live) -> Result<(Channel, Consumer), Error> {
        self.declare(live).await?;
        let channel = open_channel(&live.connection).await?;
        let consume = async {
            channel.basic_qos(self.prefetch_count, BasicQosOptions::default()).await?;
            let (options, mut arguments) = (BasicConsumeOptions::default(), FieldTable::default());
            if self.cancel_on_failover {
                arguments.insert("x-cancel-on-ha-failover".into(), AMQPValue::Boolean(true));
            }
            channel.basic_consume(self.name.clone(), "".into(), options, arguments).await
        };
        let consumer =
            consume.await.map_err(|error| Error::doing(format!("consume queue {}", self.name), &error))?;
        Ok((channel, consumer))
    }
}

fn declaring(name: String, error: &lapin::Error) -> Error {
    if is_precondition(error) {
        return Error::Flavour { name, source: cause(error) };
    }
    Error::doing(format!("declare {name}"), error)
}

/// What the broker hands to us of some queues.
pub struct RpcDeliveries {
    receiver: mpsc::Receiver<RpcDelivery>,
    stopping: CancellationToken,
}

impl RpcDeliveries {
    /// Waits for the next message, over reconnects. None after `stop` and after the connection was closed.
    pub async fn next(&mut self) -> Option<RpcDelivery> {
        self.receiver.recv().await
    }

    /// Takes no more messages. Those that were handed out can still be settled; those that were not go back.
    pub fn stop(&mut self) {
        self.stopping.cancel();
        self.receiver.close();
        while self.receiver.try_recv().is_ok() {}
    }
}

impl Drop for RpcDeliveries {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The replies to our calls. Their queue goes when this is dropped.
pub struct Replies {
    queue: String,
    deliveries: RpcDeliveries,
}

impl Replies {
    /// The name of the queue, which the calls have to give.
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// Waits for the next reply, over reconnects. None after the connection was closed.
    pub async fn next(&mut self) -> Option<Bytes> {
        let delivery = self.deliveries.next().await?;
        let body = delivery.body.clone();
        // One that comes again after the connection was lost is for nobody then.
        let _ = delivery.ack().await;
        Some(body)
    }
}

/// A message that is ours until we settle it. Dropped unsettled, it goes back to its queue.
pub struct RpcDelivery {
    /// The body.
    pub body: Bytes,
    /// Somebody, perhaps we, was handed this message before and did not settle it.
    pub redelivered: bool,
    acker: lapin::Acker,
    channel: Channel,
    prefetch_count: u16,
    link: Link,
    lost: CancellationToken,
    /// Tells the listener, which waits for the last of them, that this one is settled.
    _held: mpsc::Sender<()>,
}

impl RpcDelivery {
    /// Resolves when the channel of this delivery is gone: whatever we do, the broker hands the message out again.
    pub fn lost(&self) -> WaitForCancellationFutureOwned {
        self.lost.clone().cancelled_owned()
    }

    /// Whether the channel of this delivery is gone.
    pub fn is_lost(&self) -> bool {
        self.lost.is_cancelled()
    }

    /// Says that the message is not needed any more, and waits until the broker has heard it. After an error the message comes
    /// again, or it does not.
    pub async fn ack(self) -> Result<(), Error> {
        let heard = async {
            let acked = self.acker.ack(BasicAckOptions::default()).await?;
            // An ack is not answered. What is asked after it on its channel is, and only once the ack was read.
            self.channel.basic_qos(self.prefetch_count, BasicQosOptions::default()).await?;
            Ok::<_, lapin::Error>(acked)
        };
        match self.link.bounded(|| "acknowledge a message".into(), async { Ok(heard.await) }).await? {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(Error::DeliveryLost),
        }
    }

    /// Gives the message back at once, for anybody.
    pub async fn requeue(self) -> Result<(), Error> {
        match self.acker.reject(BasicRejectOptions { requeue: true }).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(Error::DeliveryLost),
        }
    }
}

impl Drop for RpcDelivery {
    fn drop(&mut self) {
        // Without a runtime the process ends, and with its connection the message goes back.
        if let Ok(runtime) = tokio::runtime::Handle::try_current()
            && self.acker.usable()
        {
            let (acker, held) = (self.acker.clone(), self._held.clone());
            let returned = async move {
                let _ = acker.reject(BasicRejectOptions { requeue: true }).await;
                drop(held);
            };
            self.link.tasks.spawn_on(returned, &runtime);
        }
    }
}

impl std::fmt::Debug for RpcDelivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RpcDelivery")
            .field("body_bytes", &self.body.len())
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}

/// Consumes one queue for as long as somebody wants its messages.
struct Listener {
    link: Link,
    queue: Queue,
    sender: mpsc::Sender<RpcDelivery>,
    stopping: CancellationToken,
}

impl Listener {
    async fn run(self, ready: oneshot::Sender<()>) {
        let mut ready = Some(ready);
        loop {
            let live = tokio::select! {
                () = self.stopping.cancelled() => return,
                live = self.link.live() => live,
            };
            let Ok(live) = live else { return };
            let pause = match self.queue.open(&live).await {
                Ok((channel, consumer)) => {
                    if let Some(ready) = ready.take() {
                        // Nobody may wait any more.
                        let _ = ready.send(());
                    }
                    self.hand_all_out(&channel, consumer).await;
                    if self.stopping.is_cancelled() || self.link.closing.is_cancelled() {
                        if self.queue.own {
                            let _ = channel
                                .queue_delete(self.queue.name.clone(), QueueDeleteOptions::default())
                                .await;
                        }
                        return;
                    }
                    REOPEN_PAUSE
                }
                Err(error) if error.class() == Class::Permanent => {
                    warn!(queue = %self.queue.name, error = %Causes(&error), "queue not consumed, trying again");
                    REFUSED_PAUSE
                }
                Err(_) => REOPEN_PAUSE,
            };
            drop(live);
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.link.closing.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// Hands messages out until the channel ends or we are to stop; then it waits until the last of them is settled or lost.
    async fn hand_all_out(&self, channel: &Channel, mut consumer: Consumer) {
        let lost = CancellationToken::new();
        let (held, mut all_settled) = mpsc::channel(1);
        loop {
            let next = tokio::select! {
                () = self.stopping.cancelled() => break,
                () = self.link.closing.cancelled() => break,
                next = consumer.next() => next,
            };
            let Some(Ok(delivery)) = next else {
                lost.cancel();
                return;
            };
            let delivery = RpcDelivery {
                body: delivery.data.into(),
                redelivered: delivery.redelivered,
                acker: delivery.acker,
                channel: channel.clone(),
                prefetch_count: self.queue.prefetch_count,
                link: self.link.clone(),
                lost: lost.clone(),
                _held: held.clone(),
            };
            tokio::select! {
                () = self.stopping.cancelled() => break,
                () = self.link.closing.cancelled() => break,
                // It fails when nobody takes messages any more, and then the message goes back.
                _ = self.sender.send(delivery) => {}
            }
        }
        drop(held);
        let _ = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await;
        while channel.status().connected() {
            tokio::select! {
                _ = all_settled.recv() => return,
                () = self.link.closing.cancelled() => return,
                () = sleep(DRAIN_LOOK) => {}
            }
        }
        lost.cancel();
    }
}
