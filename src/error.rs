//! What an error means for the job, and how an error is told to people.
//!
//! Every room has an error type of its own; each of them knows its [`Class`]. No text is ever matched.

use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What an error means for the rest of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// It may pass: the same method is worth another try, later.
    Transient,
    /// This method cannot do it; the next one of the plan may.
    Unsuitable,
    /// Neither time nor another method helps.
    Permanent,
    /// Somebody asked for the end of the job.
    Cancelled,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transient => "transient",
            Self::Unsuitable => "unsuitable",
            Self::Permanent => "permanent",
            Self::Cancelled => "cancelled",
        })
    }
}

/// Shows an error with its whole chain of causes in one line.
pub struct Causes<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Is what is left of an error when it leaves the process: its class, what happened, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What it meant for the job.
    pub class: Class,
    /// What was tried, on what, and what to do.
    pub message: String,
    /// Each cause below the message, outermost first.
    pub causes: Vec<String>,
}

impl Problem {
    /// Takes the text of `error` and of everything that caused it.
    pub fn new(class: Class, error: &(dyn Error + 'static)) -> Self {
        let mut causes = Vec::new();
        let mut cause = error.source();
        while let Some(error) = cause {
            causes.push(error.to_string());
            cause = error.source();
        }
        Self { class, message: error.to_string(), causes }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for cause in &self.causes {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}
