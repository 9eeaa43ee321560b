//! What workers tell each other.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::command::{encode_command, parse_command};
use crate::job::{Command, JobId, StoreName};
use crate::message::rejection::{Reason, Rejection};

/// A message to all workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Somebody asks for the end of a job.
    Cancel(JobId),
    /// A worker was handed a job that another one may still run.
    WhoRuns {
        /// The job.
        job_id: JobId,
        /// Who asks.
        worker: String,
    },
    /// The answer of the one that does.
    Runs {
        /// The job.
        job_id: JobId,
        /// Who runs it.
        worker: String,
    },
    /// A worker has put a job off that waits for others to end.
    Waits {
        /// The job.
        job_id: JobId,
        /// What it is to have for itself.
        names: Vec<String>,
        /// Since when it waits.
        since: Timestamp,
        /// For how long it was put off.
        seconds: u32,
    },
    /// A job that has waited for others does so no more.
    WaitsNoMore {
        /// The job.
        job_id: JobId,
    },
}

/// What is left of a cancel that is put off because some stores could not keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unkept {
    /// When a worker took the cancel first.
    pub since: Timestamp,
    /// The stores that are to keep it yet.
    pub stores: Vec<StoreName>,
}

/// Writes what is left of a cancel, for its message to carry.
pub fn encode_unkept(unkept: &Unkept) -> String {
    // Texts: none of them can fail to be written.
    serde_json::to_string(unkept).unwrap_or_default()
}

/// Reads what `encode_unkept` wrote; nothing from what it did not write.
pub fn parse_unkept(text: &str) -> Option<Unkept> {
    serde_json::from_str(text).ok()
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "kebab-case")]
enum Wire {
    WhoRuns { job_id: JobId, worker: String },
    Runs { job_id: JobId, worker: String },
    Waits { job_id: JobId, names: Vec<String>, since: Timestamp, seconds: u32 },
    WaitsNoMore { job_id: JobId },
}

impl From<Wire> for Control {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::WhoRuns { job_id, worker } => Self::WhoRuns { job_id, worker },
            Wire::Runs { job_id, worker } => Self::Runs { job_id, worker },
            Wire::Waits { job_id, names, since, seconds } => Self::Waits { job_id, names, since, seconds },
            Wire::WaitsNoMore { job_id } => Self::WaitsNoMore { job_id },
        }
    }
}

/// Writes a message to all workers.
pub fn encode_control(control: Control) -> Vec<u8> {
    let wire = match control {
        Control::Cancel(id) => return encode_command(&Command::Cancel(id)),
        Control::WhoRuns { job_id, worker } => Wire::WhoRuns { job_id, worker },
        Control::Runs { job_id, worker } => Wire::Runs { job_id, worker },
        Control::Waits { job_id, names, since, seconds } => Wire::Waits { job_id, names, since, seconds },
        Control::WaitsNoMore { job_id } => Wire::WaitsNoMore { job_id },
    };
    // Texts and numbers: they cannot fail to be written.
    serde_json::to_vec(&wire).unwrap_or_default()
}

/// Reads a message to all workers.
pub fn parse_control(body: &[u8]) -> Result<Control, Rejection> {
    if let Ok(wire) = serde_json::from_slice::<Wire>(body) {
        return Ok(wire.into());
    }
    match parse_command(body)? {
        Command::Cancel(id) => Ok(Control::Cancel(id)),
        Command::Run(job) => Err(Rejection {
            reason: Reason::UnknownOperation,
            message: "a job came where only cancels belong".into(),
            job_id: Some(job.id),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_workers_tell_each_other_is_read_as_it_was_written() {
        let (job_id, worker) = (JobId::random(), "one".to_owned());
        for control in [
            Control::Cancel(job_id),
            Control::WhoRuns { job_id, worker: worker.clone() },
            Control::Runs { job_id, worker },
        ] {
            assert_eq!(parse_control(&encode_control(control.clone())).unwrap(), control);
        }
        for body in [&b"{"[..], b"{}", br#"{"operation": "runs", "job_id": "7", "worker": "one"}"#] {
            assert!(parse_control(body).is_err(), "{}", String::from_utf8_lossy(body));
        }
    }
}
