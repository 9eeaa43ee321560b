//! Turns: names that one connection has to itself, by which workers keep out of each other's way.
//!
//! A turn is a queue that never has a message and is exclusive: the broker lets no other connection declare it, and removes
//! it with the connection that did. So a worker that dies holds nobody up. One that is cut off loses its turns as well, though
//! what it does may go on: a turn orders work, and must not be what keeps data safe.

use lapin::Channel;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, ShortString};

use super::Error;
use super::connection::Link;
use super::error::is_locked;
use super::message::{short, table};

/// A name that is ours until we end it, or our connection ends. Dropped, it is ended as well, a moment later.
pub struct Turn {
    link: Link,
    /// None once it is ended.
    channel: Option<Channel>,
    queue: ShortString,
}

impl Turn {
    /// Takes the name; none if another connection has it. Our own connection may take it twice.
    pub(super) async fn take(link: &Link, prefix: &str, name: &str) -> Result<Option<Self>, Error> {
        let queue = short("the name of a turn", &format!("{prefix}.turn.{name}"))?;
        let action = || format!("declare queue {queue}");
        let taken = async {
            let live = link.live().await?;
            let declared = async {
                // A refusal closes the channel.
                let channel = live.connection.create_channel().await?;
                let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
                let arguments = table([("x-queue-type", AMQPValue::LongString("classic".into()))]);
                channel.queue_declare(queue.clone(), options, arguments).await?;
                Ok(channel)
            };
            match declared.await {
                Ok(channel) => Ok(Some(channel)),
                Err(error) if is_locked(&error) => Ok(None),
                Err(error) => Err(Error::doing(action(), &error)),
            }
        };
        let channel = link.bounded(action, taken).await?;
        Ok(channel.map(|channel| Self { link: link.clone(), channel: Some(channel), queue: queue.clone() }))
    }

    /// Leaves the name to whoever asks for it next.
    pub async fn end(mut self) {
        if let Some(channel) = self.channel.take() {
            leave(&self.link, &channel, &self.queue).await;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Without a runtime the process ends, and with its connection the queue goes.
        if let Ok(runtime) = tokio::runtime::Handle::try_current()
            && let Some(channel) = self.channel.take()
        {
            let (link, queue) = (self.link.clone(), self.queue.clone());
            let left = async move { leave(&link, &channel, &queue).await };
            self.link.tasks.spawn_on(left, &runtime);
        }
    }
}

async fn leave(link: &Link, channel: &Channel, queue: &ShortString) {
    let left = async {
        // That fails only with the channel, and that one goes with the connection, as the queue does.
        let _ = channel.queue_delete(queue.clone(), QueueDeleteOptions::default()).await;
        let _ = channel.close(200, "bye".into()).await;
        Ok(())
    };
    let _ = link.bounded(|| format!("delete queue {queue}"), left).await;
}
