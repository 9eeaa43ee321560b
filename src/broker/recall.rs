//! Messages that are put off, taken back before their time is over.

use std::sync::Arc;

use lapin::options::{BasicGetOptions, BasicRejectOptions};
use lapin::types::ShortString;
use tokio_util::sync::CancellationToken;

use super::connection::Link;
use super::topology::{JOB, Topology, open_channel};
use super::{Delivery, Error};

/// How many messages are looked at in a queue.
const LOOKED_AT_MAX: usize = 10_000;

/// Takes the messages out of the delay queues whose body `is_wanted`. The others stay where they are.
pub(super) async fn recall(
    link: &Link,
    topology: &Arc<Topology>,
    is_wanted: impl Fn(&[u8]) -> bool,
) -> Result<Vec<Delivery>, Error> {
    let mut recalled = Vec::new();
    for queue in topology.delay_queues() {
        let taken = take(link, topology, queue, &is_wanted);
        recalled.extend(link.bounded(|| looking_through(queue), taken).await?);
    }
    Ok(recalled)
}

async fn take(
    link: &Link,
    topology: &Arc<Topology>,
    queue: &ShortString,
    is_wanted: impl Fn(&[u8]) -> bool,
) -> Result<Vec<Delivery>, Error> {
    let live = link.live().await?;
    let mut channel = open_channel(&live.connection).await?;
    let (mut taken, mut others) = (Vec::new(), Vec::new());
    while others.len() < LOOKED_AT_MAX {
        let got = channel.basic_get(queue.clone(), BasicGetOptions::default()).await;
        let Some(got) = got.map_err(|error| Error::doing(looking_through(queue), &error))? else { break };
        let mut delivery = got.delivery;
        if !is_wanted(&delivery.data) {
            // Given back at once, it would come again at once.
            others.push(delivery.acker);
            continue;
        }
        // As if its time were over. Who had it before only looked at it.
        (delivery.exchange, delivery.routing_key) = (topology.jobs.clone(), JOB.into());
        delivery.redelivered = false;
        // Each has a channel to itself, as those have that come by themselves.
        let own = std::mem::replace(&mut channel, open_channel(&live.connection).await?);
        let (lost, held) = (CancellationToken::new(), CancellationToken::new().drop_guard());
        taken.push(Delivery::new(delivery, own, link.clone(), Arc::clone(topology), lost, held));
    }
    for other in others {
        // With its channel it goes back as well.
        let _ = other.reject(BasicRejectOptions { requeue: true }).await;
    }
    Ok(taken)
}

fn looking_through(queue: &ShortString) -> String {
    format!("look through queue {queue}")
}
