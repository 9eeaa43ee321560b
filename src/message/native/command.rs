//! Commands: what people and programs ask for, in JSON.

use std::fmt::Display;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::schema;
use crate::job::{BackupWork, Command, Job, JobId, Parent, RestoreWork, Sample, VerifyWork, Work};
use crate::message::json;
use crate::message::rejection::{Reason, Rejection};

/// The `content_type` property of a command.
pub const COMMAND_CONTENT_TYPE: &str = "application/json";

/// How long a command may be.
pub const COMMAND_BYTES_MAX: usize = 1024 * 1024;

/// The version of the commands that this program reads and writes.
const VERSION: u32 = 1;

/// A command as it is written; its schema says which fields each operation has.
#[derive(Serialize, Deserialize)]
struct Wire {
    #[serde(skip_deserializing)]
    version: u32,
    operation: String,
    job_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deadline: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backup_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    incremental: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    project_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_meta: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sample_percent: Option<Sample>,
}

/// Reads a command, and takes nothing that could be meant in another way.
///
/// The rejection says what is wrong in words that help who wrote the message.
pub fn parse_command(body: &[u8]) -> Result<Command, Rejection> {
    let without_job = |reason, message| Rejection { reason, message, job_id: None };
    if body.len() > COMMAND_BYTES_MAX {
        let message = format!("the message has {} bytes: at most {COMMAND_BYTES_MAX} are taken", body.len());
        return Err(without_job(Reason::Oversize, message));
    }
    let message = json::read(body)
        .map_err(|error| without_job(Reason::NotJson, format!("the message is not usable JSON: {error}")))?;
    if !message.is_object() {
        let text = "the message is no object: write {\"version\": 1, \"operation\": …}".to_owned();
        return Err(without_job(Reason::Schema, text));
    }
    let job_id = message["job_id"].as_str().and_then(|id| id.parse().ok());
    command(message).map_err(|Fault(reason, message)| Rejection { reason, message, job_id })
}

struct Fault(Reason, String);

fn command(message: Value) -> Result<Command, Fault> {
    match message["version"].as_f64() {
        None => return Err(Fault(Reason::Schema, format!("version: missing or no number: write {VERSION}"))),
        Some(version) if version != f64::from(VERSION) => {
            let text = format!("unknown version {version}: this worker understands {VERSION}");
            return Err(Fault(Reason::UnknownVersion, text));
        }
        Some(_) => {}
    }
    let Some(operation) = message["operation"].as_str() else {
        let text = format!("operation: missing or no text: write one of {}", schema::operations());
        return Err(Fault(Reason::Schema, text));
    };
    let Some(schema) = schema::find(operation) else {
        let operation: String = operation.chars().take(64).collect();
        let text =
            format!("unknown operation {operation:?}: this worker understands {}", schema::operations());
        return Err(Fault(Reason::UnknownOperation, text));
    };
    schema.check(&message).map_err(|faults| Fault(Reason::Schema, faults))?;
    let wire: Wire =
        serde_json::from_value(message).map_err(|error| Fault(Reason::Schema, error.to_string()))?;
    wire.into_command()
}

impl Wire {
    fn new(operation: &str, job_id: JobId) -> Self {
        Self {
            version: VERSION,
            operation: operation.into(),
            job_id: job_id.to_string(),
            store: None,
            deadline: None,
            backup_id: None,
            volume_id: None,
            source: None,
            target: None,
            parent_id: None,
            incremental: None,
            container: None,
            name: None,
            description: None,
            project_id: None,
            volume_meta: None,
            sample_percent: None,
        }
    }

    /// Makes the command of a message that keeps to its schema.
    fn into_command(self) -> Result<Command, Fault> {
        let id = read("job_id", &self.job_id)?;
        let work = match self.operation.as_str() {
            "cancel" => return Ok(Command::Cancel(id)),
            "backup" => Work::Backup(BackupWork {
                backup_id: required("backup_id", self.backup_id.as_deref())?,
                volume_id: required("volume_id", self.volume_id.as_deref())?,
                source: required("source", self.source.as_deref())?,
                parent: match optional("parent_id", self.parent_id.as_deref())? {
                    Some(parent_id) => Parent::Given(parent_id),
                    None if self.incremental == Some(true) => Parent::Latest,
                    None => Parent::None,
                },
                container: optional("container", self.container.as_deref())?,
                name: self.name,
                description: self.description,
                project_id: self.project_id,
                volume_meta: self.volume_meta.map(|meta| meta.to_string()),
            }),
            "restore" => Work::Restore(RestoreWork {
                backup_id: required("backup_id", self.backup_id.as_deref())?,
                target: required("target", self.target.as_deref())?,
                volume_id: optional("volume_id", self.volume_id.as_deref())?,
            }),
            "delete" => Work::Delete(required("backup_id", self.backup_id.as_deref())?),
            "verify" => Work::Verify(VerifyWork {
                backup_id: required("backup_id", self.backup_id.as_deref())?,
                sample: self.sample_percent,
            }),
            other => return Err(Fault(Reason::UnknownOperation, format!("unknown operation {other:?}"))),
        };
        if let Work::Backup(BackupWork { backup_id, parent: Parent::Given(parent_id), .. }) = &work
            && backup_id == parent_id
        {
            let text = format!("parent_id: {parent_id} is the backup itself: write the id of an earlier one");
            return Err(Fault(Reason::ImpossibleValue, text));
        }
        let store = optional("store", self.store.as_deref())?;
        let deadline = optional("deadline", self.deadline.as_deref())?;
        Ok(Command::Run(Box::new(Job { id, store, deadline, work })))
    }
}

fn read<T: FromStr<Err: Display>>(field: &str, text: &str) -> Result<T, Fault> {
    text.parse().map_err(|error| Fault(Reason::ImpossibleValue, format!("{field}: {error}")))
}

fn optional<T: FromStr<Err: Display>>(field: &str, text: Option<&str>) -> Result<Option<T>, Fault> {
    text.map(|text| read(field, text)).transpose()
}

fn required<T: FromStr<Err: Display>>(field: &str, text: Option<&str>) -> Result<T, Fault> {
    optional(field, text)?.ok_or_else(|| Fault(Reason::Schema, format!("{field}: missing")))
}

/// Writes a command.
///
/// What a `Command` can hold and a message cannot (a name of two lines, metadata that is no JSON object) is written
/// as it is: who wants to know before sending reads the result with [`parse_command`].
pub fn encode_command(command: &Command) -> Vec<u8> {
    let wire = match command {
        Command::Cancel(job_id) => Wire::new("cancel", *job_id),
        Command::Run(job) => {
            let mut wire = Wire::new(job.operation().as_str(), job.id);
            wire.store = job.store.as_ref().map(ToString::to_string);
            wire.deadline = job.deadline.map(|time| time.to_string());
            wire.backup_id = Some(job.backup_id().to_string());
            wire.volume_id = job.volume_id().map(|id| id.to_string());
            match &job.work {
                Work::Backup(work) => {
                    wire.source = Some(work.source.to_string());
                    match work.parent {
                        Parent::None => {}
                        Parent::Latest => wire.incremental = Some(true),
                        Parent::Given(parent_id) => wire.parent_id = Some(parent_id.to_string()),
                    }
                    wire.container = work.container.as_ref().map(ToString::to_string);
                    wire.name = work.name.clone();
                    wire.description = work.description.clone();
                    wire.project_id = work.project_id.clone();
                    wire.volume_meta = work.volume_meta.as_deref().map(metadata);
                }
                Work::Restore(work) => wire.target = Some(work.target.to_string()),
                Work::Verify(work) => wire.sample_percent = work.sample,
                Work::Delete(_) => {}
            }
            wire
        }
    };
    // Texts, a number, a bool and a JSON value: none of them can fail to be written.
    serde_json::to_vec(&wire).unwrap_or_default()
}

fn metadata(text: &str) -> Value {
    json::read(text.as_bytes()).unwrap_or_else(|_| text.into())
}
