//! What workers tell each other.

use serde::{Deserialize, Serialize};

use super::command::{encode_command, parse_command};
use crate::job::{Command, JobId};
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
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "kebab-case")]
enum Wire {
    WhoRuns { job_id: JobId, worker: String },
    Runs { job_id: JobId, worker: String },
}

/// Writes a message to all workers.
pub fn encode_control(control: Control) -> Vec<u8> {
    let wire = match control {
        Control::Cancel(id) => return encode_command(&Command::Cancel(id)),
        Control::WhoRuns { job_id, worker } => Wire::WhoRuns { job_id, worker },
        Control::Runs { job_id, worker } => Wire::Runs { job_id, worker },
    };
    // Texts: they cannot fail to be written.
    serde_json::to_vec(&wire).unwrap_or_default()
}

/// Reads a message to all workers.
pub fn parse_control(body: &[u8]) -> Result<Control, Rejection> {
    match serde_json::from_slice(body) {
        Ok(Wire::WhoRuns { job_id, worker }) => return Ok(Control::WhoRuns { job_id, worker }),
        Ok(Wire::Runs { job_id, worker }) => return Ok(Control::Runs { job_id, worker }),
        Err(_) => {}
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
