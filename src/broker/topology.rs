//! The names of our exchanges and queues, and their declaration.
//!
//! Declaring is repeatable: it makes what is missing and changes nothing that is there.

use lapin::options::{ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ExchangeKind};

use super::error::is_precondition;
use super::message::{short, table};
use super::{Error, QueueKind, Settings};

/// The routing key of jobs.
pub(super) const JOB: &str = "job";

/// How long a job may run before the broker takes its delivery for dead, where the broker lets us choose.
const CONSUMER_TIMEOUT_MILLISECONDS: i64 = 24 * 60 * 60 * 1000;

const PRIORITY_MAX: u8 = 9;

/// The names of our exchanges and queues.
#[derive(Debug)]
pub(super) struct Topology {
    /// The exchange and the queue of jobs.
    pub jobs: ShortString,
    /// The exchange of messages to all workers.
    pub control: ShortString,
    /// The exchange of events.
    pub events: ShortString,
    /// The exchange and the queue of messages that nobody can work on.
    pub dead: ShortString,
    /// The queue where jobs wait before they come back to the job queue.
    pub delay: ShortString,
    kind: QueueKind,
    delay_seconds: u32,
}

impl Topology {
    pub(super) fn new(settings: &Settings) -> Result<Self, Error> {
        let name =
            |what: &str| short("a name below the broker's prefix", &format!("{}.{what}", settings.prefix));
        Ok(Self {
            jobs: name("jobs")?,
            control: name("control")?,
            events: name("events")?,
            dead: name("dead")?,
            // The delay is part of the name, for a queue cannot change it.
            delay: name(&format!("delay.{}s", settings.retry_delay_seconds))?,
            kind: settings.queue_kind,
            delay_seconds: settings.retry_delay_seconds,
        })
    }

    /// Declares everything that workers and clients share.
    pub(super) async fn declare(&self, connection: &Connection) -> Result<(), Error> {
        let exchanges = [
            (&self.jobs, ExchangeKind::Direct),
            (&self.control, ExchangeKind::Fanout),
            (&self.events, ExchangeKind::Topic),
            (&self.dead, ExchangeKind::Fanout),
        ];
        let channel = open_channel(connection).await?;
        for (name, kind) in exchanges {
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            channel
                .exchange_declare(name.clone(), kind, options, FieldTable::default())
                .await
                .map_err(|error| declaring("exchange", name, &error))?;
        }
        declare_queue(connection, &self.jobs, &[self.job_arguments()]).await?;
        declare_queue(connection, &self.dead, &[self.typed(self.kind)]).await?;
        declare_queue(connection, &self.delay, &self.delay_arguments()).await?;
        for name in [&self.jobs, &self.dead] {
            channel
                .queue_bind(
                    name.clone(),
                    name.clone(),
                    JOB.into(),
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await
                .map_err(|error| Error::doing(format!("bind queue {name}"), &error))?;
        }
        Ok(())
    }

    fn typed(&self, kind: QueueKind) -> FieldTable {
        let word = match kind {
            QueueKind::Auto | QueueKind::Quorum => "quorum",
            QueueKind::Classic => "classic",
        };
        table([("x-queue-type", AMQPValue::LongString(word.into()))])
    }

    fn job_arguments(&self) -> FieldTable {
        let mut arguments = self.typed(self.kind);
        arguments.insert("x-dead-letter-exchange".into(), long_string(&self.dead));
        // Brokers before 3.12 keep it without heeding it.
        arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(CONSUMER_TIMEOUT_MILLISECONDS));
        let (name, value) = if self.kind == QueueKind::Classic {
            ("x-max-priority", AMQPValue::ShortShortUInt(PRIORITY_MAX))
        } else {
            // From 4.0 on a message is given up after 20 deliveries unless told otherwise. -1 would mean without end,
            // but older brokers take it for a limit, and give up at once.
            ("x-delivery-limit", AMQPValue::LongInt(i32::MAX))
        };
        arguments.insert(name.into(), value);
        arguments
    }

    fn delay_arguments(&self) -> Vec<FieldTable> {
        let waiting = |mut arguments: FieldTable| {
            let milliseconds = i64::from(self.delay_seconds) * 1000;
            arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(milliseconds));
            arguments.insert("x-dead-letter-exchange".into(), long_string(&self.jobs));
            arguments.insert("x-dead-letter-routing-key".into(), AMQPValue::LongString(JOB.into()));
            arguments
        };
        let classic = waiting(self.typed(QueueKind::Classic));
        if self.kind == QueueKind::Classic {
            return vec![classic];
        }
        // A quorum queue can wait for the job queue's confirm before it forgets the message, and only with this
        // overflow rule. Brokers before 3.10 have neither this nor a time to live in quorum queues.
        let mut quorum = waiting(self.typed(QueueKind::Quorum));
        quorum.insert("x-dead-letter-strategy".into(), AMQPValue::LongString("at-least-once".into()));
        quorum.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
        vec![quorum, classic]
    }
}

/// Opens a channel on which every message is confirmed.
pub(super) async fn open_channel(connection: &Connection) -> Result<Channel, Error> {
    let open = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(channel)
    };
    open.await.map_err(|error: lapin::Error| Error::doing("open a channel", &error))
}

/// Declares the queue with the first of `candidates` that the broker takes.
async fn declare_queue(
    connection: &Connection,
    name: &ShortString,
    candidates: &[FieldTable],
) -> Result<(), Error> {
    let mut refusal = None;
    for arguments in candidates {
        // A refusal closes the channel, so each try has its own.
        let channel = open_channel(connection).await?;
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        match channel.queue_declare(name.clone(), options, arguments.clone()).await {
            Ok(_) => return Ok(()),
            Err(error) if is_precondition(&error) => refusal = Some(error),
            Err(error) => return Err(declaring("queue", name, &error)),
        }
    }
    refusal.map_or(Ok(()), |error| Err(declaring("queue", name, &error)))
}

fn declaring(kind: &str, name: &ShortString, error: &lapin::Error) -> Error {
    if is_precondition(error) {
        return Error::Mismatch { name: format!("{kind} {name}"), source: super::error::cause(error) };
    }
    Error::doing(format!("declare {kind} {name}"), error)
}

fn long_string(text: &ShortString) -> AMQPValue {
    AMQPValue::LongString(text.as_str().into())
}
