//! What concerns everybody: control messages for all workers, and events for all who listen.
//!
//! Each subscription has a queue of its own. It is not exclusive, so that it goes on collecting while we are away, but
//! the broker removes it when nobody has come back for it.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tracing::warn;
use uuid::Uuid;

use super::Error;
use super::connection::{Link, Live};
use super::message::table;
use super::topology::open_channel;
use crate::error::{Causes, Class};

/// How long the broker keeps a queue that nobody consumes; longer than a reconnect takes.
const UNUSED_MILLISECONDS_MAX: i32 = 5 * 60 * 1000;
/// How many messages wait for a slow reader; beyond that the oldest go.
const WAITING_COUNT_MAX: i32 = 10_000;
const PREFETCH_COUNT: u16 = 100;
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
const REFUSED_PAUSE: Duration = Duration::from_secs(10);

/// A message of a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The routing key that it was published with.
    pub routing_key: String,
    /// The body.
    pub body: Bytes,
}

/// The messages of one exchange that a pattern chose, from the moment on that it was bound.
pub struct Subscription {
    notices: mpsc::Receiver<Notice>,
}

impl Subscription {
    /// Starts to listen. `ready` is told once: the first time that the queue is bound and consumed, or why it will never
    /// be.
    pub(super) fn start(
        link: &Link,
        exchange: ShortString,
        pattern: ShortString,
        ready: oneshot::Sender<Result<(), Error>>,
    ) -> Self {
        let (sender, notices) = mpsc::channel(PREFETCH_COUNT.into());
        let listener = Listener { link: link.clone(), exchange, pattern, sender };
        link.tasks.spawn(listener.run(ready));
        Self { notices }
    }

    /// Waits for the next message, over reconnects. None after the broker was closed.
    pub async fn next(&mut self) -> Option<Notice> {
        self.notices.recv().await
    }
}

struct Listener {
    link: Link,
    exchange: ShortString,
    pattern: ShortString,
    sender: mpsc::Sender<Notice>,
}

impl Listener {
    async fn run(self, ready: oneshot::Sender<Result<(), Error>>) {
        let mut ready = Some(ready);
        let mut queue = self.new_name();
        loop {
            let live = tokio::select! {
                () = self.sender.closed() => return,
                live = self.link.live() => live,
            };
            let Ok(live) = live else { return };
            let pause = match self.open(&live, &queue).await {
                Ok((channel, consumer)) => {
                    if let Some(ready) = ready.take() {
                        let _ = ready.send(Ok(()));
                    }
                    let name = consumer.queue();
                    if self.forward(consumer).await {
                        let _ = channel.queue_delete(name, QueueDeleteOptions::default()).await;
                        return;
                    }
                    REOPEN_PAUSE
                }
                Err(error) if error.class() == Class::Permanent => {
                    if let Some(ready) = ready.take_if(|ready| !ready.is_closed()) {
                        let _ = ready.send(Err(error));
                        return;
                    }
                    warn!(error = %Causes(&error), "subscription not opened, trying again");
                    // The old queue may be on a node that is down.
                    queue = self.new_name();
                    REFUSED_PAUSE
                }
                Err(_) => REOPEN_PAUSE,
            };
            drop(live);
            tokio::select! {
                () = self.sender.closed() => {}
                () = self.link.closing.cancelled() => {}
                () = sleep(pause) => {}
            }
        }
    }

    fn new_name(&self) -> String {
        format!("{}.{}", self.exchange, Uuid::new_v4())
    }

    async fn open(&self, live: &Live, queue: &str) -> Result<(Channel, Consumer), Error> {
        let queue = super::message::short("the name of a queue", queue)?;
        let channel = open_channel(&live.connection).await?;
        let arguments = table([
            ("x-queue-type", AMQPValue::LongString("classic".into())),
            ("x-expires", AMQPValue::LongInt(UNUSED_MILLISECONDS_MAX)),
            ("x-max-length", AMQPValue::LongInt(WAITING_COUNT_MAX)),
        ]);
        let consume = async {
            let options = QueueDeclareOptions { durable: true, ..Default::default() };
            channel.queue_declare(queue.clone(), options, arguments).await?;
            channel
                .queue_bind(
                    queue.clone(),
                    self.exchange.clone(),
                    self.pattern.clone(),
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await?;
            channel.basic_qos(PREFETCH_COUNT, BasicQosOptions::default()).await?;
            let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
            channel.basic_consume(queue.clone(), "".into(), options, arguments).await
        };
        let consumer = consume
            .await
            .map_err(|error| Error::doing(format!("listen to exchange {}", self.exchange), &error))?;
        Ok((channel, consumer))
    }

    /// Passes messages on until the channel ends. True if nobody wants them any more.
    async fn forward(&self, mut consumer: Consumer) -> bool {
        loop {
            let next = tokio::select! {
                () = self.sender.closed() => return true,
                () = self.link.closing.cancelled() => return true,
                next = consumer.next() => next,
            };
            let Some(Ok(delivery)) = next else { return false };
            let acker = delivery.acker;
            let notice = Notice { routing_key: delivery.routing_key.to_string(), body: delivery.data.into() };
            tokio::select! {
                () = self.link.closing.cancelled() => return true,
                sent = self.sender.send(notice) => if sent.is_err() { return true },
            }
            if !acker.ack(BasicAckOptions::default()).await.unwrap_or(false) {
                return false;
            }
        }
    }
}
