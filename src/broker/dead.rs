//! Messages that were given up: looked at, brought back, dropped.

use std::sync::Arc;

use bytes::Bytes;
use lapin::options::{BasicAckOptions, BasicGetOptions, ExchangeDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, ExchangeKind};

use super::connection::Link;
use super::message::Death;
use super::publisher::{self, Routed};
use super::topology::{JOB, Topology, open_channel};
use super::{Error, Properties, message};

/// The messages in the dead-letter queue, one after the other. Those that are neither brought back nor dropped go back
/// when this is dropped.
pub struct DeadLetters {
    channel: Channel,
    link: Link,
    topology: Arc<Topology>,
    /// How many of those are to come that were there when the first one was read.
    left: Option<u32>,
}

/// A message that was given up.
pub struct DeadLetter {
    /// The body.
    pub body: Bytes,
    /// What came with it.
    pub properties: Properties,
    /// Why it was given up.
    pub reason: String,
    /// When, in seconds since 1970, if that is known.
    pub died_at_seconds: Option<u64>,
    raw: BasicProperties,
    death: Death,
    acker: lapin::Acker,
}

impl DeadLetters {
    pub(super) async fn open(link: &Link, topology: &Arc<Topology>) -> Result<Self, Error> {
        let open = async {
            let live = link.live().await?;
            open_channel(&live.connection).await
        };
        let channel = link.bounded(|| "open the dead-letter queue".into(), open).await?;
        Ok(Self { channel, link: link.clone(), topology: Arc::clone(topology), left: None })
    }

    /// The next one; none when all were seen that were there at the first. One that is brought back, and is given up again,
    /// comes as another one, and so must not be met again.
    pub async fn next(&mut self) -> Result<Option<DeadLetter>, Error> {
        if self.left == Some(0) {
            return Ok(None);
        }
        let queue = self.topology.dead.clone();
        let got = self.channel.basic_get(queue.clone(), BasicGetOptions::default()).await;
        let got = got.map_err(|error| Error::doing(format!("read queue {queue}"), &error))?;
        if let Some(got) = &got {
            self.left = Some(self.left.map_or(got.message_count, |left| left - 1));
        }
        Ok(got.map(|got| {
            let delivery = got.delivery;
            let death = message::death(&delivery.properties);
            DeadLetter {
                body: delivery.data.into(),
                properties: message::read(&delivery.properties),
                reason: death.reason.clone(),
                died_at_seconds: death.at,
                raw: delivery.properties,
                death,
                acker: delivery.acker,
            }
        }))
    }

    /// Publishes the message again where it came from, as if it were new; once the broker has that safely, the dead
    /// letter is gone. What the broker has given up by itself goes to the job queue: from no other does that come here.
    pub async fn retry(&self, letter: DeadLetter) -> Result<(), Error> {
        let (jobs, job) = (&self.topology.jobs, ShortString::from(JOB));
        let (exchange, routing_key) = match &letter.death {
            Death { exchange, routing_key, .. }
                if exchange.as_str().is_empty() && routing_key.as_str().is_empty() =>
            {
                (jobs, &job)
            }
            Death { exchange, routing_key, .. } => (exchange, routing_key),
        };
        self.find(exchange).await?;
        let destination = || publisher::destination(exchange, routing_key);
        let properties = message::fitting(message::revived(&letter.raw), self.link.frame_bytes_max());
        let copy = publisher::publish_on(&self.channel, exchange, routing_key, &letter.body, properties);
        match self.link.bounded(|| format!("move a message to {}", destination()), copy).await? {
            Routed::Queued => self.drop(letter).await,
            Routed::Nowhere => Err(Error::NoRoute { destination: destination() }),
        }
    }

    /// Fails if the exchange is not there: to publish to it would end the channel, and with it the way to the other letters.
    async fn find(&self, exchange: &ShortString) -> Result<(), Error> {
        if exchange.as_str().is_empty() {
            return Ok(());
        }
        let action = || format!("find exchange {exchange}");
        let found = async {
            let live = self.link.live().await?;
            let channel = open_channel(&live.connection).await?;
            let options = ExchangeDeclareOptions { passive: true, ..Default::default() };
            let found = channel.exchange_declare(
                exchange.clone(),
                ExchangeKind::Direct,
                options,
                FieldTable::default(),
            );
            found.await.map_err(|error| Error::doing(action(), &error))?;
            // What comes of that is of no concern: it is asked nothing more.
            let _ = channel.close(200, "bye".into()).await;
            Ok(())
        };
        self.link.bounded(action, found).await
    }

    /// Removes the message for good.
    pub async fn drop(&self, letter: DeadLetter) -> Result<(), Error> {
        match letter.acker.ack(BasicAckOptions::default()).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(Error::DeliveryLost),
        }
    }
}
