//! The names of our exchanges and queues, and their declaration.
//!
//! Declaring is repeatable: it makes what is missing and changes nothing that is there.

use std::iter;
use std::time::Duration;

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
/// How many times as long as in the one before it a message waits in a delay queue.
const DELAY_STEP: u32 = 4;

/// The names of our exchanges and queues, and how they are used.
#[derive(Debug)]
pub(super) struct Topology {
    pub settings: Settings,
    /// The exchange and the queue of jobs.
    pub jobs: ShortString,
    /// The exchange of messages to all workers.
    pub control: ShortString,
    /// The queue that has each of them once, for one of the workers to keep.
    pub cancels: ShortString,
    /// The exchange of events.
    pub events: ShortString,
    /// The exchange and the queue of messages that nobody can work on.
    pub dead: ShortString,
    /// The queues where jobs wait before they come back to the job queue, by the seconds that nobody waits longer than.
    delays: Vec<(u32, ShortString)>,
    kind: QueueKind,
}

impl Topology {
    pub(super) fn new(settings: Settings) -> Result<Self, Error> {
        let name =
            |what: &str| short("a name below the broker's prefix", &format!("{}.{what}", settings.prefix));
        Ok(Self {
            jobs: name("jobs")?,
            control: name("control")?,
            cancels: name("cancels")?,
            events: name("events")?,
            dead: name("dead")?,
            delays: delay_seconds(&settings)
                // The delay is part of the name, for a queue cannot change it.
                .map(|seconds| Ok((seconds, name(&format!("delay.{seconds}s"))?)))
                .collect::<Result<_, Error>>()?,
            kind: settings.queue_kind,
            settings,
        })
    }

    /// The queue for a message that is to wait for so long.
    pub(super) fn delay(&self, wait: Duration) -> Option<&ShortString> {
        let fits = |(seconds, _): &&(u32, ShortString)| wait <= Duration::from_secs((*seconds).into());
        self.delays.iter().find(fits).or(self.delays.last()).map(|(_, name)| name)
    }

    /// The queues where messages wait that were put off.
    pub(super) fn delay_queues(&self) -> impl Iterator<Item = &ShortString> {
        self.delays.iter().map(|(_, name)| name)
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
        declare_queue(connection, &self.jobs, &self.job_arguments()).await?;
        declare_queue(connection, &self.cancels, &[self.limitless(self.typed(self.kind))]).await?;
        declare_queue(connection, &self.dead, &[self.limitless(self.typed(self.kind))]).await?;
        for (seconds, name) in &self.delays {
            declare_queue(connection, name, &self.delay_arguments(*seconds)).await?;
        }
        for (name, exchange) in
            [(&self.jobs, &self.jobs), (&self.dead, &self.dead), (&self.cancels, &self.control)]
        {
            channel
                .queue_bind(
                    name.clone(),
                    exchange.clone(),
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
            QueueKind::Quorum => "quorum",
            QueueKind::Classic => "classic",
        };
        table([("x-queue-type", AMQPValue::LongString(word.into()))])
    }

    fn job_arguments(&self) -> Vec<FieldTable> {
        let mut arguments = self.typed(self.kind);
        arguments.insert("x-dead-letter-exchange".into(), long_string(&self.dead));
        let patient = |mut arguments: FieldTable| {
            let milliseconds = AMQPValue::LongLongInt(CONSUMER_TIMEOUT_MILLISECONDS);
            // Brokers before 3.12 keep it without heeding it.
            arguments.insert("x-consumer-timeout".into(), milliseconds);
            arguments
        };
        if self.kind == QueueKind::Classic {
            arguments.insert("x-max-priority".into(), AMQPValue::ShortShortUInt(PRIORITY_MAX));
            // From 4.3 on classic queues have no such timeout, and from 4.3.2 on none is declared with one
            // (rabbitmq-server #16557).
            return vec![patient(arguments.clone()), arguments];
        }
        vec![self.limitless(patient(arguments))]
    }

    /// A message is delivered as often as need be.
    fn limitless(&self, mut arguments: FieldTable) -> FieldTable {
        if self.kind != QueueKind::Classic {
            // From 4.0 on a message is given up after 20 deliveries unless told otherwise. -1 would mean without end,
            // but older brokers take it for a limit, and give up at once.
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(i32::MAX));
        }
        arguments
    }

    fn delay_arguments(&self, seconds: u32) -> Vec<FieldTable> {
        let waiting = |mut arguments: FieldTable| {
            let milliseconds = i64::from(seconds) * 1000;
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
        // Whoever looks for jobs that are to end gives all others back. A queue that is there without this is used as it is.
        vec![self.limitless(quorum.clone()), quorum, classic]
    }
}

/// The longest waits of the delay queues. A message that is to come back soon waits behind those before it in its queue,
/// so those that wait for long have queues of their own, and those that wait for their turn only as well.
fn delay_seconds(settings: &Settings) -> impl Iterator<Item = u32> {
    let first = settings.retry_delay_seconds;
    let longest = settings.retry_delay_seconds_max.max(first);
    let short = iter::successors(Some(1), |seconds: &u32| seconds.checked_mul(DELAY_STEP));
    let long = iter::successors(Some(first), move |seconds| {
        (*seconds < longest).then(|| seconds.saturating_mul(DELAY_STEP).min(longest))
    });
    short.take_while(move |seconds| *seconds < first).chain(long)
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
