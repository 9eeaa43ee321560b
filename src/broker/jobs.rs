//! Jobs in: each slot has a channel of its own and one delivery at a time.
//!
//! A slot per running job means that a channel which the broker closes, say because a job ran for longer than the
//! broker's patience, takes nothing with it but that one delivery.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::{AMQPValue, ShortString};
use lapin::{Channel, Consumer};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::connection::{Link, Live};
use super::error::is_access_refused;
use super::message::table;
use super::topology::{Topology, open_channel};
use super::{Delivery, Error};
use crate::error::{Causes, Class};

/// How long a slot waits before it opens a channel again.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// How long it waits when the broker refuses what we need, or may not be told of a message what is to become of it.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);
/// How often a slot that consumes no more looks whether its channel is still there.
const DRAIN_LOOK: Duration = Duration::from_millis(500);

/// The jobs that the broker hands to this worker.
pub struct Jobs {
    deliveries: mpsc::Receiver<Delivery>,
    stopping: CancellationToken,
    consuming: watch::Receiver<usize>,
}

impl Jobs {
    /// Of the slots, the last `ahead_count` are handed a message only if no other one, of any worker, is free for it.
    pub(super) fn start(
        link: &Link,
        topology: &Arc<Topology>,
        queue: &ShortString,
        slot_count: usize,
        ahead_count: usize,
    ) -> Self {
        let all_count = slot_count + ahead_count;
        let (sender, deliveries) = mpsc::channel(all_count.max(1));
        let stopping = CancellationToken::new();
        let (consuming_sender, consuming) = watch::channel(0);
        for index in 0..all_count {
            let slot = Slot {
                link: link.clone(),
                topology: Arc::clone(topology),
                queue: queue.clone(),
                sender: sender.clone(),
                stopping: stopping.clone(),
                consuming: consuming_sender.clone(),
                priority: if index < slot_count { 0 } else { -1 },
            };
            link.tasks.spawn(slot.run());
        }
        Self { deliveries, stopping, consuming }
    }

    /// Tells how many slots consume the queue, now and at every change.
    pub fn consuming(&self) -> watch::Receiver<usize> {
        self.consuming.clone()
    }

    /// Waits for the next job, over reconnects. None after `stop` and after the broker was closed.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// Takes no more jobs. Those that were handed out can still be settled; those that were not go back.
    pub fn stop(&mut self) {
        self.stopping.cancel();
        self.deliveries.close();
        while self.deliveries.try_recv().is_ok() {}
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Slot {
    link: Link,
    topology: Arc<Topology>,
    queue: ShortString,
    sender: mpsc::Sender<Delivery>,
    stopping: CancellationToken,
    consuming: watch::Sender<usize>,
    /// Of its consumer: the broker serves those with a higher one first, as long as one of them has nothing to do.
    priority: i32,
}

impl Slot {
    async fn run(self) {
        loop {
            let live = tokio::select! {
                () = self.stopping.cancelled() => return,
                live = self.link.live() => live,
            };
            let Ok(live) = live else { return };
            let pause = match self.consume(&live).await {
                Err(error) if error.class() == Class::Permanent => self.redeclare(&live, &error).await,
                // The end of the connection is told by the supervisor, that of a channel by `Delivery::lost`.
                Err(_) => REOPEN_PAUSE,
                Ok(pause) => pause,
            };
            drop(live);
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.link.closing.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// Declares everything again, for somebody may have deleted the queue. Says how long to wait then.
    async fn redeclare(&self, live: &Live, error: &Error) -> Duration {
        warn!(error = %Causes(error), "job queue not consumed, trying again");
        match self.topology.declare(&live.connection).await {
            Ok(()) => REOPEN_PAUSE,
            Err(error) => {
                warn!(error = %Causes(&error), "topology not declared, trying again");
                REFUSED_PAUSE
            }
        }
    }

    /// Consumes until the channel ends or we are to stop; then the channel is closed, and the broker has back what
    /// was not settled. Says how long to wait then.
    async fn consume(&self, live: &Live) -> Result<Duration, Error> {
        let (channel, mut consumer) = self.open(live).await?;
        self.consuming.send_modify(|count| *count += 1);
        let end = self.hand_all_out(&channel, &mut consumer).await;
        self.consuming.send_modify(|count| *count -= 1);
        Ok(match end {
            // What we did with a message may not be done there, and the message comes again at once.
            Some(error) if is_access_refused(&error) => REFUSED_PAUSE,
            _ => REOPEN_PAUSE,
        })
    }

    /// Ends with the channel, and with its error if it has one.
    async fn hand_all_out(&self, channel: &Channel, consumer: &mut Consumer) -> Option<lapin::Error> {
        let mut early = None;
        loop {
            let delivery = match early.take() {
                Some(delivery) => delivery,
                None => {
                    let next = tokio::select! {
                        () = self.stopping.cancelled() => return None,
                        () = self.link.closing.cancelled() => return None,
                        next = consumer.next() => next,
                    };
                    match next? {
                        Ok(delivery) => delivery,
                        Err(error) => return Some(error),
                    }
                }
            };
            if let Err(error) = self.hand_out(delivery, channel, consumer, &mut early).await {
                return error;
            }
        }
    }

    async fn open(&self, live: &Live) -> Result<(Channel, Consumer), Error> {
        let channel = open_channel(&live.connection).await?;
        let queue = self.queue.clone();
        let consume = async {
            channel.basic_qos(1, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let arguments = table([("x-priority", AMQPValue::LongInt(self.priority))]);
            channel.basic_consume(queue.clone(), "".into(), options, arguments).await
        };
        let consumer =
            consume.await.map_err(|error| Error::doing(format!("consume queue {queue}"), &error))?;
        Ok((channel, consumer))
    }

    /// Hands the delivery out and waits for its end. Fails if the channel is of no more use, with its error if it has one. The
    /// broker sends the next one as soon as it has heard an ack, which may be before we know that it has: then it is in `early`.
    async fn hand_out(
        &self,
        delivery: lapin::message::Delivery,
        channel: &Channel,
        consumer: &mut Consumer,
        early: &mut Option<lapin::message::Delivery>,
    ) -> Result<(), Option<lapin::Error>> {
        let (lost, settled) = (CancellationToken::new(), CancellationToken::new());
        let acker = delivery.acker.clone();
        let handed = Delivery::new(
            delivery,
            channel.clone(),
            self.link.clone(),
            Arc::clone(&self.topology),
            lost.clone(),
            settled.clone().drop_guard(),
        );
        // Each slot has one delivery at most and the queue has room for all slots, so this never waits.
        let _ = self.sender.send(handed).await;
        let end = loop {
            tokio::select! {
                () = settled.cancelled() => break Ok(()),
                () = self.stopping.cancelled() => {
                    self.drain(channel, consumer, &settled).await;
                    break Err(None);
                }
                () = self.link.closing.cancelled() => break Err(None),
                // With a prefetch of one, that is the next one or the end.
                next = consumer.next(), if early.is_none() => match next {
                    Some(Ok(delivery)) => *early = Some(delivery),
                    end => break Err(end.and_then(Result::err)),
                },
            }
        };
        if !settled.is_cancelled() {
            lost.cancel();
        }
        if acker.usable() {
            let _ = acker.reject(BasicRejectOptions { requeue: true }).await;
        }
        end
    }

    /// Stops consuming and waits until the last delivery is settled or lost.
    async fn drain(&self, channel: &Channel, consumer: &Consumer, settled: &CancellationToken) {
        let _ = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await;
        while channel.status().connected() {
            tokio::select! {
                () = settled.cancelled() => return,
                () = self.link.closing.cancelled() => return,
                () = sleep(DRAIN_LOOK) => {}
            }
        }
    }
}
