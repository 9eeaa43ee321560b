//! A message that was handed to us, and the ways to settle it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use lapin::options::{BasicAckOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};

use super::connection::Link;
use super::publisher::{self, Routed};
use super::topology::Topology;
use super::{Error, Properties, message};

/// How long a message waits at least.
const SHORT_WAIT: Duration = Duration::from_secs(1);
/// How long a message is kept that could not be moved.
const UNMOVED_PAUSE: Duration = Duration::from_secs(2);

/// A message that is ours until we settle it. Dropped unsettled, it goes back to its queue.
pub struct Delivery {
    /// The body.
    pub body: Bytes,
    /// What came with it.
    pub properties: Properties,
    /// Somebody, perhaps we, was handed this message before and did not settle it.
    pub redelivered: bool,
    /// Since when the message waits: since it was put off first, or else has come.
    pub since: Timestamp,
    /// The body is larger than `message_bytes_max`.
    pub oversize: bool,
    raw: BasicProperties,
    exchange: ShortString,
    routing_key: ShortString,
    acker: lapin::Acker,
    channel: Channel,
    link: Link,
    topology: Arc<Topology>,
    lost: CancellationToken,
    /// Tells the slot that it may go on.
    _held: DropGuard,
}

impl Delivery {
    pub(super) fn new(
        delivery: lapin::message::Delivery,
        channel: Channel,
        link: Link,
        topology: Arc<Topology>,
        lost: CancellationToken,
        held: DropGuard,
    ) -> Self {
        let properties = message::read(&delivery.properties);
        Self {
            oversize: delivery.data.len() > topology.settings.message_bytes_max,
            body: delivery.data.into(),
            since: properties.waits_since.unwrap_or_else(Timestamp::now),
            properties,
            redelivered: delivery.redelivered,
            raw: delivery.properties,
            exchange: delivery.exchange,
            routing_key: delivery.routing_key,
            acker: delivery.acker,
            channel,
            link,
            topology,
            lost,
            _held: held,
        }
    }

    /// Resolves when the channel of this delivery is gone: whatever we do, the broker hands the message out again.
    pub fn lost(&self) -> WaitForCancellationFutureOwned {
        self.lost.clone().cancelled_owned()
    }

    /// Has every copy of the message, wherever it goes from here, say that something of its job was left half done.
    pub fn note_unfinished(&mut self) {
        self.raw = message::unfinished(&self.raw);
    }

    /// Says that all is done, and waits until the broker has heard it. After an error the message comes again, or it does
    /// not.
    pub async fn ack(self) -> Result<(), Error> {
        let heard = async {
            let acked = self.acker.ack(BasicAckOptions::default()).await?;
            // An ack is not answered. What is asked after it on its channel is, and only once the ack was read.
            self.channel.basic_qos(1, BasicQosOptions::default()).await?;
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

    /// Puts the message off, with its attempt counted and the story of the attempts so far: a copy of it goes to a delay
    /// queue, and once the broker has that safely, the message itself is gone. It waits for a time by chance, up to a
    /// limit that doubles with each attempt, so that those that failed together do not come back together.
    pub async fn retry_later(self, story: &str) -> Result<(), Error> {
        let settings = &self.topology.settings;
        let doubled = 1_u64 << self.properties.attempt.saturating_sub(1).min(32);
        let longest = settings.retry_delay_seconds_max.max(settings.retry_delay_seconds);
        let limit = (u64::from(settings.retry_delay_seconds) * doubled).min(longest.into());
        let wait = Duration::from_millis(fastrand::u64(1..=limit * 1000));
        let properties = message::next_attempt(&self.raw, story, wait);
        self.put_off(wait, properties).await
    }

    /// Puts the message off for `retry_delay_seconds`, because another worker has its job; that is no attempt.
    pub async fn park(self) -> Result<(), Error> {
        let wait = Duration::from_secs(self.topology.settings.retry_delay_seconds.into());
        let properties = message::parked(&self.raw, wait);
        self.put_off(wait, properties).await
    }

    /// Gives a message whose job was begun back in good order: nothing of the job runs here any more. The copy that comes back
    /// after a second is not taken for one whose worker has died.
    pub async fn hand_back(self) -> Result<(), Error> {
        let properties = message::handed_back(&self.raw, self.since, SHORT_WAIT);
        self.put_off(SHORT_WAIT, properties).await
    }

    /// Puts the message off for a second because there is no place for its job; that is no attempt.
    pub async fn await_place(self) -> Result<(), Error> {
        self.wait(SHORT_WAIT).await
    }

    /// Puts the message off because another job must end first; that is no attempt.
    pub async fn await_turn(self) -> Result<(), Error> {
        let wait = self.turn_wait();
        self.wait(wait).await
    }

    /// For how long `await_turn` puts the message off: a second at first, and then about as long as it has waited so far, up to
    /// `retry_delay_seconds`.
    pub fn turn_wait(&self) -> Duration {
        let so_far = Duration::try_from(Timestamp::now().duration_since(self.since)).unwrap_or_default();
        let longest = Duration::from_secs(self.topology.settings.retry_delay_seconds.into());
        so_far.max(SHORT_WAIT).min(longest)
    }

    async fn wait(self, wait: Duration) -> Result<(), Error> {
        let properties = match self.redelivered {
            // The copy would be taken for one that nobody was handed before.
            true => message::waiting(&message::parked(&self.raw, wait), self.since, wait),
            false => message::waiting(&self.raw, self.since, wait),
        };
        self.put_off(wait, properties).await
    }

    async fn put_off(self, wait: Duration, properties: BasicProperties) -> Result<(), Error> {
        let delay = self.topology.delay(wait).cloned().unwrap_or_default();
        self.move_to(ShortString::default(), delay, properties).await
    }

    /// Gives the message up, for a human to look at: a copy that says why goes to the dead-letter exchange, and
    /// once the broker has that safely, the message itself is gone.
    pub async fn dead_letter(self, reason: &str) -> Result<(), Error> {
        let properties = message::dead(&self.raw, reason, self.exchange.as_str(), self.routing_key.as_str());
        let dead = self.topology.dead.clone();
        let routing_key = self.routing_key.clone();
        self.move_to(dead, routing_key, properties).await
    }

    async fn move_to(
        self,
        exchange: ShortString,
        routing_key: ShortString,
        properties: BasicProperties,
    ) -> Result<(), Error> {
        if !self.acker.usable() {
            return Err(Error::DeliveryLost);
        }
        let properties = message::fitting(properties, self.link.frame_bytes_max());
        // On the delivery's own channel: if that goes, so does our right to the message, and there is no copy to make.
        let copy = publisher::publish_on(&self.channel, &exchange, &routing_key, &self.body, properties);
        let destination = || publisher::destination(&exchange, &routing_key);
        let error = match self.link.bounded(|| format!("move a message to {}", destination()), copy).await {
            Ok(Routed::Queued) => return self.ack().await,
            Ok(Routed::Nowhere) => Error::NoRoute { destination: destination() },
            Err(Error::Lost { .. }) => return Err(Error::DeliveryLost),
            Err(error) => error,
        };
        // Given back at once, it would come again at once, and all that it causes would be done again.
        sleep(UNMOVED_PAUSE).await;
        Err(error)
    }
}

impl std::fmt::Debug for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery")
            .field("body_bytes", &self.body.len())
            .field("properties", &self.properties)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}
