//! Messages that were given up: listed, shown, brought back, dropped.

use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::args::{DeadCommand, LettersArgs};
use super::{Error, FAILED, print_json, render, say};
use crate::broker::{Broker, DeadLetter, DeadLetters};
use crate::config::Config;
use crate::error::Causes;
use crate::job::{Attempt, BackupId, Command, JobId, Operation};
use crate::message;
use crate::worker;

/// Hexadecimal digits of the SHA-256 of the body that name a letter.
const LETTER_DIGITS: usize = 12;

/// A message that was given up, for people and programs.
#[derive(Debug, Serialize)]
pub struct Letter {
    /// Names it: the beginning of the SHA-256 of its body.
    pub letter: String,
    /// When it was given up.
    pub time: Option<Timestamp>,
    /// The job, if it is one.
    pub job_id: Option<JobId>,
    /// What the job does.
    pub operation: Option<Operation>,
    /// The backup that it works on.
    pub backup_id: Option<BackupId>,
    /// The sender's name for the message.
    pub message_id: Option<String>,
    /// Why it was given up.
    pub reason: String,
    /// The attempts before the last one.
    pub earlier_attempts: Vec<Attempt>,
    /// The body, as far as it is text.
    pub body: String,
}

impl Letter {
    fn of(letter: &DeadLetter) -> Self {
        let job = match message::parse_command(&letter.body) {
            Ok(Command::Run(job)) => Some(job),
            Ok(Command::Cancel(_)) | Err(_) => None,
        };
        let seconds = letter.died_at_seconds.and_then(|seconds| i64::try_from(seconds).ok());
        let story = letter.properties.story.as_deref();
        Self {
            letter: hex::encode(Sha256::digest(&letter.body))[..LETTER_DIGITS].into(),
            time: seconds.and_then(|seconds| Timestamp::from_second(seconds).ok()),
            job_id: job.as_ref().map(|job| job.id),
            operation: job.as_ref().map(|job| job.operation()),
            backup_id: job.as_ref().map(|job| job.backup_id()),
            message_id: letter.properties.message_id.clone(),
            reason: letter.reason.clone(),
            earlier_attempts: story.map(message::parse_attempts).unwrap_or_default(),
            body: String::from_utf8_lossy(&letter.body).into_owned(),
        }
    }

    fn is(&self, id: &str) -> bool {
        self.letter == id || self.job_id.is_some_and(|job_id| job_id.to_string() == id)
    }
}

/// Does what was asked for with the messages that were given up.
pub(super) async fn run(config: &Config, command: &DeadCommand) -> Result<u8, Error> {
    let broker = Broker::connect(worker::broker_settings(config, "dead")?).await?;
    let mut letters = broker.dead_letters().await?;
    let result = match command {
        DeadCommand::List { json } => list(&mut letters, *json).await,
        DeadCommand::Show { id } => show(&mut letters, id).await,
        DeadCommand::Retry(which) => settle(&mut letters, which, true).await,
        DeadCommand::Drop(which) => settle(&mut letters, which, false).await,
    };
    drop(letters);
    broker.close().await;
    result
}

async fn list(letters: &mut DeadLetters, json: bool) -> Result<u8, Error> {
    let mut found = Vec::new();
    while let Some(letter) = letters.next().await? {
        found.push(Letter::of(&letter));
    }
    // Those that were looked at lie behind the others by now.
    found.sort_by_key(|letter| letter.time);
    if json {
        print_json(&found)?;
    } else {
        say(render::letters(&found).trim_end());
    }
    Ok(0)
}

async fn show(letters: &mut DeadLetters, id: &str) -> Result<u8, Error> {
    while let Some(letter) = letters.next().await? {
        let letter = Letter::of(&letter);
        if letter.is(id) {
            say(render::letter(&letter).trim_end());
            return Ok(0);
        }
    }
    Err(unknown(id))
}

/// Brings the letters back, or drops them. One for which that fails is told of, and keeps no other from it.
async fn settle(letters: &mut DeadLetters, which: &LettersArgs, retry: bool) -> Result<u8, Error> {
    let mut missing: Vec<&String> = which.ids.iter().collect();
    let (mut count, mut failed) = (0, false);
    while let Some(dead) = letters.next().await? {
        let letter = Letter::of(&dead);
        if !which.all && !which.ids.iter().any(|id| letter.is(id)) {
            continue;
        }
        missing.retain(|id| !letter.is(id));
        let settled = if retry { letters.retry(dead).await } else { letters.drop(dead).await };
        match settled {
            Ok(()) => count += 1,
            Err(error) => {
                failed = true;
                let job = letter.job_id.map(|id| format!(" of job {id}")).unwrap_or_default();
                eprintln!("error: letter {}{job} stays where it is: {}", letter.letter, Causes(&error));
            }
        }
    }
    let messages = if count == 1 { "1 message".to_owned() } else { format!("{count} messages") };
    say(format_args!("{messages} {}", if retry { "brought back" } else { "dropped" }));
    for id in &missing {
        eprintln!("error: {}", unknown(id));
    }
    Ok(if missing.is_empty() && !failed { 0 } else { FAILED })
}

fn unknown(id: &str) -> Error {
    Error::Unknown(format!(
        "{id} is none of the messages that were given up: `backhaul dead list` shows them"
    ))
}
