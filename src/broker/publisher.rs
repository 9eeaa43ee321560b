//! Messages out: persistent, mandatory, and confirmed by the broker before anybody relies on them.

use std::time::Duration;

use bytes::Bytes;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::time::sleep;

use super::connection::{Link, Live};
use super::message::short;
use super::topology::open_channel;
use super::{Error, Properties};

/// A message to send.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The exchange; the default one, which knows queues by name, if empty.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// The body.
    pub body: Bytes,
    /// What goes with it.
    pub properties: Properties,
}

/// Where a message that the broker took went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routed {
    /// At least one queue has it, safely.
    Queued,
    /// No queue wanted it, and it is gone.
    Nowhere,
}

/// Publishes and waits for the confirm, over as many connections as it takes; so the message may be there twice.
pub(super) async fn publish(
    link: &Link,
    exchange: &str,
    routing_key: &str,
    body: &[u8],
    properties: BasicProperties,
) -> Result<Routed, Error> {
    let exchange = short("the name of an exchange", exchange)?;
    let routing_key = short("a routing key", routing_key)?;
    let persist = async {
        loop {
            let live = link.live().await?;
            match publish_once(&live, &exchange, &routing_key, body, properties.clone()).await {
                // The supervisor may not have noticed yet.
                Err(Error::Lost { .. }) => sleep(Duration::from_millis(100)).await,
                result => return result,
            }
        }
    };
    link.bounded(|| publishing(&exchange, &routing_key), persist).await
}

async fn publish_once(
    live: &Live,
    exchange: &ShortString,
    routing_key: &ShortString,
    body: &[u8],
    properties: BasicProperties,
) -> Result<Routed, Error> {
    // The channel is only put back after its confirm came, so nobody ever takes another's confirm for his own.
    let mut publisher = live.publisher.lock().await;
    let channel = match publisher.take() {
        Some(channel) => channel,
        None => open_channel(&live.connection).await?,
    };
    let routed = publish_on(&channel, exchange, routing_key, body, properties).await?;
    *publisher = Some(channel);
    Ok(routed)
}

/// Publishes on `channel` and waits for the confirm.
pub(super) async fn publish_on(
    channel: &Channel,
    exchange: &ShortString,
    routing_key: &ShortString,
    body: &[u8],
    properties: BasicProperties,
) -> Result<Routed, Error> {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let confirmed = async {
        channel.basic_publish(exchange.clone(), routing_key.clone(), options, body, properties).await?.await
    };
    match confirmed.await {
        Ok(Confirmation::Ack(None)) => Ok(Routed::Queued),
        Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))) => Ok(Routed::Nowhere),
        Ok(Confirmation::Nack(None) | Confirmation::NotRequested) => {
            Err(Error::NotConfirmed { destination: destination(exchange, routing_key) })
        }
        Err(error) => Err(Error::doing(publishing(exchange, routing_key), &error)),
    }
}

fn publishing(exchange: &ShortString, routing_key: &ShortString) -> String {
    format!("publish to {}", destination(exchange, routing_key))
}

/// Names a destination in errors.
pub(super) fn destination(exchange: &ShortString, routing_key: &ShortString) -> String {
    if exchange.as_str().is_empty() {
        format!("queue {routing_key}")
    } else {
        format!("exchange {exchange}, routing key {routing_key}")
    }
}
