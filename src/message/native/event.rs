//! Events: what became of commands, as CloudEvents 1.0 in structured JSON.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::error::{Class, Problem};
use crate::job::{
    Account, Attempt, BackupId, Completion, Counts, Event, Happening, JobId, Method, Mode, Operation,
    Outcome, Reading, StoreName, Strategy, VolumeId,
};
use crate::message::rejection::Rejection;

/// The `content_type` property of an event.
pub const EVENT_CONTENT_TYPE: &str = "application/cloudevents+json";

/// The routing key of the events that tell of messages which cannot be jobs.
pub const REJECTED_ROUTING_KEY: &str = "job.rejected.-";

/// The routing key of an event: `<operation>.<state>.<volume id>`, with `-` for a volume that is not known.
pub fn routing_key(event: &Event) -> String {
    let state = state(&event.happening);
    match &event.volume_id {
        Some(volume_id) => format!("{}.{state}.{volume_id}", event.operation),
        None => format!("{}.{state}.-", event.operation),
    }
}

/// The id of an event: the same for the same event, however often and by whom it is published.
pub fn event_id(event: &Event) -> String {
    let (job_id, state) = (event.job_id, state(&event.happening));
    match event.happening {
        // A job ends once: whoever tells of it again tells of the same event.
        Happening::Ended(ref completion) => match completion.account.revival_count {
            0 => format!("{job_id}.{state}"),
            // It ends once more each time that it is brought back.
            count => format!("{job_id}.{state}.revival-{count}"),
        },
        // A job that is delivered again counts its events from 1 again, so the time is part of their names.
        _ => format!("{job_id}.{state}.{}.{}", event.sequence, event.time.as_microsecond()),
    }
}

/// The id of the event that tells of a message which cannot be a job: the same each time that the message is delivered,
/// if it has the `message_id` property.
pub fn rejected_event_id(message_id: Option<&str>) -> String {
    let name = match message_id {
        // It is a property of the event's own message, too, which has room for 255 bytes.
        Some(message_id) if message_id.len() + ".rejected".len() > 255 => {
            hex::encode(Sha256::digest(message_id))
        }
        Some(message_id) => message_id.into(),
        None => Uuid::new_v4().to_string(),
    };
    format!("{name}.rejected")
}

fn state(happening: &Happening) -> &'static str {
    match happening {
        Happening::Accepted => "accepted",
        Happening::Started { .. } => "started",
        Happening::Progress(_) => "progress",
        Happening::FellBack { .. } => "fell-back",
        Happening::Ended(completion) => match completion.outcome {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed(_) => "failed",
            Outcome::Cancelled => "cancelled",
        },
    }
}

/// Writes an event of a job. `source` names the worker, as a URI reference such as `/backhaul/worker/host-1`.
///
/// A completion is told of with the ids of its event.
pub fn encode_event(event: &Event, source: &str) -> Vec<u8> {
    let more = match &event.happening {
        Happening::Accepted => MoreWire::Accepted {},
        Happening::Started { method, attempt } => {
            MoreWire::Started(StartedWire { attempt: *attempt, method: (*method).into() })
        }
        Happening::Progress(reading) => MoreWire::Progress(ProgressWire {
            bytes_total: (reading.bytes_total > 0).then_some(reading.bytes_total),
            bytes_done: reading.bytes_done,
            percent: percent(reading),
            counts: reading.counts,
        }),
        Happening::FellBack { from, to, reason } => MoreWire::FellBack(FellBackWire {
            from: (*from).into(),
            to: (*to).into(),
            reason: reason.clone(),
        }),
        Happening::Ended(completion) => {
            let account = AccountWire::from(completion.account.clone());
            match &completion.outcome {
                Outcome::Succeeded | Outcome::Cancelled => MoreWire::Ended(Box::new(account)),
                Outcome::Failed(error) => {
                    MoreWire::Failed(Box::new(FailedWire { error: error.clone(), account }))
                }
            }
        }
    };
    let job = JobWire {
        job_id: event.job_id,
        operation: event.operation,
        backup_id: event.backup_id,
        volume_id: event.volume_id,
        store: event.store.clone(),
    };
    let data = DataWire { job, more };
    let envelope = Envelope::new(state(&event.happening), event_id(event), source, event.time, data);
    envelope.about(event.backup_id, event.sequence).write()
}

/// Writes the event that tells of a message which cannot be a job. `id` is its [id](rejected_event_id), `message_id` the
/// property of the message.
pub fn encode_rejected(
    rejection: &Rejection,
    id: String,
    time: Timestamp,
    source: &str,
    message_id: Option<&str>,
) -> Vec<u8> {
    let data = RejectedWire {
        reason: rejection.reason.as_str().into(),
        message: rejection.message.clone(),
        job_id: rejection.job_id,
        message_id: message_id.map(Into::into),
    };
    Envelope::new("rejected", id, source, time, data).write()
}

/// How much is done, rounded down so that 100 means all of it.
fn percent(reading: &Reading) -> Option<u8> {
    let done = u128::from(reading.bytes_done.min(reading.bytes_total)) * 100;
    done.checked_div(reading.bytes_total.into()).and_then(|percent| percent.try_into().ok())
}

/// What an event says.
#[derive(Debug, Clone, PartialEq)]
pub enum Received {
    /// Something happened to a job.
    Job(Event),
    /// A message could not be a job.
    Rejected {
        /// When it was found out.
        time: Timestamp,
        /// The word for the kind of fault; one of [`Reason`](crate::message::Reason), or of a later version.
        reason: String,
        /// For people: what is wrong with the message.
        message: String,
        /// The job that the message names, where that could be read.
        job_id: Option<JobId>,
        /// The `message_id` property of the message.
        message_id: Option<String>,
    },
}

/// Says why an event cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// It is not a CloudEvent in JSON.
    #[error("read an event")]
    NotAnEvent(#[source] serde_json::Error),
    /// It is of a kind, or of a version, that this program does not know.
    #[error("unknown event type {0:?}")]
    UnknownType(String),
    /// It lacks something that its kind has.
    #[error("read the data of a {kind} event")]
    Data {
        /// The type of the event.
        kind: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Reads an event. What a later version may have added to it is passed over.
pub fn parse_event(body: &[u8]) -> Result<Received, EventError> {
    let envelope: Envelope<Value> = serde_json::from_slice(body).map_err(EventError::NotAnEvent)?;
    let Some(state) = envelope.kind.strip_prefix("backhaul.job.").and_then(|kind| kind.strip_suffix(".v1"))
    else {
        return Err(EventError::UnknownType(envelope.kind));
    };
    let (time, sequence, data) = (envelope.time, envelope.sequence.as_deref(), &envelope.data);
    let received = match state {
        "rejected" => RejectedWire::deserialize(data).map(|data| Received::Rejected {
            time,
            reason: data.reason,
            message: data.message,
            job_id: data.job_id,
            message_id: data.message_id,
        }),
        "accepted" => job_event(time, sequence, data, |_| Ok(Happening::Accepted)),
        "started" => job_event(time, sequence, data, |_| StartedWire::deserialize(data).map(Into::into)),
        "progress" => job_event(time, sequence, data, |_| ProgressWire::deserialize(data).map(Into::into)),
        "fell-back" => job_event(time, sequence, data, |_| FellBackWire::deserialize(data).map(Into::into)),
        "succeeded" => job_event(time, sequence, data, |job| {
            AccountWire::deserialize(data).map(|account| job.ended(Outcome::Succeeded, account))
        }),
        "cancelled" => job_event(time, sequence, data, |job| {
            AccountWire::deserialize(data).map(|account| job.ended(Outcome::Cancelled, account))
        }),
        "failed" => job_event(time, sequence, data, |job| {
            FailedWire::deserialize(data).map(|data| job.ended(Outcome::Failed(data.error), data.account))
        }),
        _ => return Err(EventError::UnknownType(envelope.kind)),
    };
    received.map_err(|source| EventError::Data { kind: envelope.kind, source })
}

fn job_event(
    time: Timestamp,
    sequence: Option<&str>,
    data: &Value,
    happening: impl FnOnce(&JobWire) -> Result<Happening, serde_json::Error>,
) -> Result<Received, serde_json::Error> {
    let job = JobWire::deserialize(data)?;
    let happening = happening(&job)?;
    Ok(Received::Job(Event {
        job_id: job.job_id,
        operation: job.operation,
        backup_id: job.backup_id,
        volume_id: job.volume_id,
        store: job.store,
        time,
        sequence: sequence.and_then(|sequence| sequence.parse().ok()).unwrap_or(0),
        happening,
    }))
}

/// What every event has: the attributes of a CloudEvent.
#[derive(Serialize, Deserialize)]
struct Envelope<D> {
    specversion: String,
    id: String,
    source: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    time: Timestamp,
    datacontenttype: Option<String>,
    dataschema: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<String>,
    data: D,
}

impl<D: Serialize> Envelope<D> {
    fn new(state: &str, id: String, source: &str, time: Timestamp, data: D) -> Self {
        Self {
            specversion: "1.0".into(),
            id,
            source: source.into(),
            kind: format!("backhaul.job.{state}.v1"),
            subject: None,
            time,
            datacontenttype: Some("application/json".into()),
            dataschema: Some(format!("urn:backhaul:event:{state}:v1")),
            sequence: None,
            data,
        }
    }

    fn about(self, backup_id: BackupId, sequence: u64) -> Self {
        // Sequences of CloudEvents are compared as text.
        Self { subject: Some(backup_id.to_string()), sequence: Some(format!("{sequence:020}")), ..self }
    }

    fn write(&self) -> Vec<u8> {
        // Texts, numbers and lists of them: none of them can fail to be written.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

#[derive(Serialize)]
struct DataWire {
    #[serde(flatten)]
    job: JobWire,
    #[serde(flatten)]
    more: MoreWire,
}

/// What the data of every event of a job has.
#[derive(Serialize, Deserialize)]
struct JobWire {
    job_id: JobId,
    #[serde(with = "OperationWord")]
    operation: Operation,
    backup_id: BackupId,
    volume_id: Option<VolumeId>,
    store: Option<StoreName>,
}

impl JobWire {
    fn ended(&self, outcome: Outcome, account: AccountWire) -> Happening {
        Happening::Ended(Box::new(Completion {
            target: None,
            job_id: self.job_id,
            operation: self.operation,
            backup_id: self.backup_id,
            volume_id: self.volume_id,
            store: self.store.clone(),
            outcome,
            account: account.into(),
        }))
    }
}

/// What the data of an event has besides, depending on what happened.
#[derive(Serialize)]
#[serde(untagged)]
enum MoreWire {
    Accepted {},
    Started(StartedWire),
    Progress(ProgressWire),
    FellBack(FellBackWire),
    Ended(Box<AccountWire>),
    Failed(Box<FailedWire>),
}

#[derive(Serialize, Deserialize)]
struct StartedWire {
    attempt: u32,
    #[serde(flatten)]
    method: MethodWire,
}

impl From<StartedWire> for Happening {
    fn from(wire: StartedWire) -> Self {
        Self::Started { method: wire.method.into(), attempt: wire.attempt }
    }
}

#[derive(Serialize, Deserialize)]
struct ProgressWire {
    bytes_total: Option<u64>,
    bytes_done: u64,
    percent: Option<u8>,
    #[serde(flatten, with = "CountsWire")]
    counts: Counts,
}

impl From<ProgressWire> for Happening {
    fn from(wire: ProgressWire) -> Self {
        Self::Progress(Reading {
            bytes_total: wire.bytes_total.unwrap_or(0),
            bytes_done: wire.bytes_done,
            counts: wire.counts,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct FellBackWire {
    from: MethodWire,
    to: MethodWire,
    #[serde(with = "ProblemWire")]
    reason: Problem,
}

impl From<FellBackWire> for Happening {
    fn from(wire: FellBackWire) -> Self {
        Self::FellBack { from: wire.from.into(), to: wire.to.into(), reason: wire.reason }
    }
}

#[derive(Serialize, Deserialize)]
struct FailedWire {
    #[serde(with = "ProblemWire")]
    error: Problem,
    #[serde(flatten)]
    account: AccountWire,
}

#[derive(Serialize, Deserialize)]
struct AccountWire {
    method: Option<String>,
    strategy: Option<StrategyText>,
    mode: Option<ModeText>,
    attempt_count: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    revival_count: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier_attempts: Vec<AttemptWire>,
    fallback_reason: Option<ProblemText>,
    parent_id: Option<BackupId>,
    volume_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "is_not_so")]
    target_unfinished: bool,
    #[serde(flatten, with = "CountsWire")]
    counts: Counts,
    seconds: f64,
    digest: Option<String>,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

fn is_not_so(what: &bool) -> bool {
    !what
}

/// An attempt as it is told of, and as it travels with a job that is put off.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Attempt")]
struct AttemptFields {
    attempt: u32,
    time: Timestamp,
    error: String,
}

#[derive(Serialize, Deserialize)]
struct AttemptWire(#[serde(with = "AttemptFields")] Attempt);

/// Writes the attempts of a job so far, for the message that comes back for the next one.
pub fn encode_attempts(attempts: Vec<Attempt>) -> String {
    let wire: Vec<AttemptWire> = attempts.into_iter().map(AttemptWire).collect();
    // Texts and numbers: none of them can fail to be written.
    serde_json::to_string(&wire).unwrap_or_default()
}

/// Reads what `encode_attempts` wrote; nothing from what it did not write.
pub fn parse_attempts(text: &str) -> Vec<Attempt> {
    let wire: Vec<AttemptWire> = serde_json::from_str(text).unwrap_or_default();
    wire.into_iter().map(|attempt| attempt.0).collect()
}

impl From<Account> for AccountWire {
    fn from(account: Account) -> Self {
        Self {
            method: account.method.map(|method| method.to_string()),
            strategy: account.method.map(|method| StrategyText(method.strategy)),
            mode: account.method.and_then(|method| method.mode).map(ModeText),
            attempt_count: account.attempt_count,
            revival_count: account.revival_count,
            earlier_attempts: account.earlier_attempts.into_iter().map(AttemptWire).collect(),
            fallback_reason: account.fallback_reason.map(ProblemText),
            parent_id: account.parent_id,
            volume_bytes: account.volume_bytes,
            target_unfinished: account.target_unfinished,
            counts: account.counts,
            seconds: account.seconds,
            digest: account.digest,
        }
    }
}

impl From<AccountWire> for Account {
    fn from(wire: AccountWire) -> Self {
        let mode = wire.mode.map(|mode| mode.0);
        Self {
            method: wire.strategy.map(|strategy| Method { strategy: strategy.0, mode }),
            attempt_count: wire.attempt_count,
            revival_count: wire.revival_count,
            earlier_attempts: wire.earlier_attempts.into_iter().map(|attempt| attempt.0).collect(),
            fallback_reason: wire.fallback_reason.map(|problem| problem.0),
            parent_id: wire.parent_id,
            volume_bytes: wire.volume_bytes,
            target_unfinished: wire.target_unfinished,
            counts: wire.counts,
            seconds: wire.seconds,
            digest: wire.digest,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct RejectedWire {
    reason: String,
    message: String,
    job_id: Option<JobId>,
    message_id: Option<String>,
}

/// A method in words, and in its parts for programs.
#[derive(Serialize, Deserialize)]
struct MethodWire {
    method: String,
    strategy: StrategyText,
    mode: Option<ModeText>,
}

impl From<Method> for MethodWire {
    fn from(method: Method) -> Self {
        Self {
            method: method.to_string(),
            strategy: StrategyText(method.strategy),
            mode: method.mode.map(ModeText),
        }
    }
}

impl From<MethodWire> for Method {
    fn from(wire: MethodWire) -> Self {
        Self { strategy: wire.strategy.0, mode: wire.mode.map(|mode| mode.0) }
    }
}

// The nouns as they are on the wire. A noun that changes does not build until it is decided here, and in the schemas,
// what that means for messages.

#[derive(Serialize, Deserialize)]
struct StrategyText(#[serde(with = "StrategyWord")] Strategy);

#[derive(Serialize, Deserialize)]
struct ModeText(#[serde(with = "ModeWord")] Mode);

#[derive(Serialize, Deserialize)]
struct ProblemText(#[serde(with = "ProblemWire")] Problem);

#[derive(Serialize, Deserialize)]
#[serde(remote = "Operation", rename_all = "kebab-case")]
enum OperationWord {
    Backup,
    Restore,
    Delete,
    Verify,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Strategy", rename_all = "kebab-case")]
enum StrategyWord {
    Chunked,
    Rbd,
    Copy,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Mode", rename_all = "kebab-case")]
enum ModeWord {
    Full,
    Incremental,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Class", rename_all = "kebab-case")]
enum ClassWord {
    Transient,
    Unsuitable,
    Permanent,
    Cancelled,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Problem")]
struct ProblemWire {
    #[serde(with = "ClassWord")]
    class: Class,
    message: String,
    causes: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Counts")]
struct CountsWire {
    bytes_read: u64,
    bytes_zero: u64,
    bytes_hole: u64,
    bytes_unchanged: u64,
    #[serde(default)]
    bytes_reused: u64,
    bytes_stored: u64,
    bytes_written: u64,
    object_count: u64,
}
