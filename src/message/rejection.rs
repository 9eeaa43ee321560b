//! Why a message cannot be a job.

use std::fmt;

use crate::job::JobId;

/// What kind of fault a message has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It is not JSON, or JSON that can be read in two ways.
    NotJson,
    /// It has a version that this worker does not understand.
    UnknownVersion,
    /// It asks for something that this worker cannot do.
    UnknownOperation,
    /// It breaks the schema of its operation.
    Schema,
    /// It keeps to the schema, and yet no job can be made of it.
    ImpossibleValue,
    /// It is longer than a message may be.
    Oversize,
}

impl Reason {
    /// The word of the `rejected` event and of the header on the dead letter.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotJson => "not-json",
            Self::UnknownVersion => "unknown-version",
            Self::UnknownOperation => "unknown-operation",
            Self::Schema => "schema",
            Self::ImpossibleValue => "impossible-value",
            Self::Oversize => "oversize",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Says why a message cannot be a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// What kind of fault it is.
    pub reason: Reason,
    /// For people: which field, what is wrong with it, and what to write instead.
    pub message: String,
    /// The job that the message names, where that could be read.
    pub job_id: Option<JobId>,
}
