//! Events as CloudEvents on the broker's exchange, and in the reply queue of whoever asked for one.

use async_trait::async_trait;
use bytes::Bytes;
use tracing::warn;

use super::{Error, EventSink};
use crate::broker::{self, Broker, Properties, Routed};
use crate::error::{Causes, Class};
use crate::job::{Event, Happening, Outcome};
use crate::message;

/// Publishes the events of one job.
pub struct Native {
    broker: Broker,
    source: String,
    request: Properties,
}

impl Native {
    /// Publishes as `source`, a URI of the worker, in answer to a message with these properties.
    pub fn new(broker: Broker, source: String, request: Properties) -> Self {
        Self { broker, source, request }
    }
}

#[async_trait]
impl EventSink for Native {
    async fn send(&self, event: &Event) -> Result<(), Error> {
        let body = Bytes::from(message::encode_event(event, &self.source));
        let properties = Properties {
            content_type: Some(message::EVENT_CONTENT_TYPE.into()),
            correlation_id: self.request.correlation_id.clone(),
            message_id: Some(message::event_id(event)),
            ..Properties::default()
        };
        let failed = |source| Error { what: what(&event.happening), source: Box::new(source) };
        // That nobody listens is no fault: the broker was asked, and knows of no queue that wants it.
        let routing_key = message::routing_key(event);
        self.broker.publish_event(routing_key, body.clone(), properties.clone()).await.map_err(failed)?;
        let (Some(queue), Happening::Ended(_)) = (&self.request.reply_to, &event.happening) else {
            return Ok(());
        };
        reply(&self.broker, queue.clone(), body, properties).await.map_err(failed)
    }
}

/// Puts a reply into the queue that waits for it. One that is gone, or full, or that we may not write to, is its owner's concern,
/// and no error.
pub async fn reply(
    broker: &Broker,
    queue: String,
    body: Bytes,
    properties: Properties,
) -> Result<(), broker::Error> {
    match broker.publish_reply(queue.clone(), body, properties).await {
        Ok(Routed::Queued) => {}
        Ok(Routed::Nowhere) => warn!(queue, "the reply queue is gone"),
        // What is for good would be so the next time, too, and the job be done again for it.
        Err(error)
            if matches!(error, broker::Error::NotConfirmed { .. }) || error.class() == Class::Permanent =>
        {
            warn!(queue, error = %Causes(&error), "the reply queue takes no message");
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

fn what(happening: &Happening) -> &'static str {
    match happening {
        Happening::Accepted => "was accepted",
        Happening::Started { .. } => "was started",
        Happening::Progress(_) => "goes on",
        Happening::FellBack { .. } => "fell back",
        Happening::Ended(completion) => match completion.outcome {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed(_) => "failed",
            Outcome::Cancelled => "was cancelled",
        },
    }
}
