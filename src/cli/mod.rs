//! The commands of the program: what people type, and what they get to read.
//!
//! `args` says what may be typed, `render` how things look, and each of the others does what was asked for.

pub mod args;
mod check;
#[cfg(feature = "ceph")]
mod cinder;
mod dead;
mod gc;
mod jobs;
mod records;
pub mod render;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use args::{Args, Command, RecordCommand};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::warn;

use crate::broker;
use crate::cinder::{conf, export_record};
use crate::config::{Config, ConfigError};
use crate::engine::{self, Engine};
use crate::error::Problem;
use crate::event;
use crate::job::StoreName;
#[cfg(feature = "ceph")]
use crate::stand_in;
use crate::worker::{self, Shutdown, Stores};

/// A job failed, or something that is not the caller's fault.
const FAILED: u8 = 1;
/// What was typed, or the configuration, cannot be used.
const USAGE: u8 = 2;
/// A job was cancelled.
const CANCELLED: u8 = 3;

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// What was typed cannot be used, though every part of it can.
    #[error("{0}")]
    Usage(String),
    /// A file that was named cannot be used.
    #[error(transparent)]
    MetadataFile(#[from] args::MetadataFileError),
    /// The file with an export record cannot be read.
    #[error("read the export record in {}", path.display())]
    RecordFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is nothing of the name that was typed.
    #[error("{0}")]
    Unknown(String),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// `cinder.conf` cannot be used.
    #[error(transparent)]
    CinderConf(#[from] conf::Error),
    /// The worker in the place of Cinder's could not begin.
    #[cfg(feature = "ceph")]
    #[error(transparent)]
    StandIn(#[from] stand_in::Error),
    /// The rooms could not be put together.
    #[error(transparent)]
    Worker(#[from] worker::Error),
    /// The broker failed.
    #[error(transparent)]
    Broker(#[from] broker::Error),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// Anything that was made ready for people already.
    #[error("{0}")]
    Problem(Problem),
    /// What was to be taken in is no export record.
    #[error("take in {record}")]
    Record {
        /// The file, or where else it was read.
        record: String,
        /// Why.
        source: export_record::Error,
    },
    /// The end of the job could not be told.
    #[error(transparent)]
    Event(#[from] event::Error),
    /// A message went where nobody is.
    #[error("{0}")]
    Nowhere(&'static str),
    /// The operating system said no.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    /// Something could not be written as JSON.
    #[error("write JSON")]
    Json(#[from] serde_json::Error),
}

impl Error {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_)
            | Self::MetadataFile(_)
            | Self::RecordFile { .. }
            | Self::Config(_)
            | Self::CinderConf(_) => USAGE,
            #[cfg(feature = "ceph")]
            Self::StandIn(stand_in::Error::Conf(_) | stand_in::Error::TransportUrl(_)) => USAGE,
            Self::Worker(worker::Error::Config(_)) => USAGE,
            _ => FAILED,
        }
    }
}

/// Does what was asked for; the exit code is 0 when it was done, 1 when it failed, 2 when it cannot be asked for, and 3
/// when the job was cancelled.
pub async fn run(args: Args) -> ExitCode {
    match dispatch(args).await {
        Ok(code) => code.into(),
        Err(error) => {
            match &error {
                Error::Problem(problem) => eprintln!("error: {}", render::problem(problem)),
                error => eprintln!("error: {}", render::error(error)),
            }
            error.exit_code().into()
        }
    }
}

async fn dispatch(args: Args) -> Result<u8, Error> {
    #[cfg(feature = "ceph")]
    if let Command::Cinder { config_file, config_dir } = args.command {
        return cinder::work(config_file, config_dir).await;
    }
    let config = Config::load(args.config.as_deref())?;
    match args.command {
        Command::Worker => until_stopped(|shutdown| worker::work(&config, shutdown)).await,
        // It has a configuration of its own.
        #[cfg(feature = "ceph")]
        Command::Cinder { .. } => Ok(USAGE),
        Command::Submit(args) => jobs::submit(&config, &args).await,
        Command::Run(args) => jobs::run(&config, &args).await,
        Command::Dead(command) => dead::run(&config, &command).await,
        Command::Cancel { job_id } => jobs::cancel(&config, job_id).await,
        Command::List { store, volume_id, json } => records::list(&config, store, volume_id, json).await,
        Command::Show { backup_id, store, json } => records::show(&config, backup_id, store, json).await,
        Command::Record(RecordCommand::Export { backup_id, store }) => {
            records::export(&config, backup_id, store).await
        }
        Command::Record(RecordCommand::Import { record, store }) => {
            records::import(&config, &record, store).await
        }
        Command::Gc { store, yes, older_than, json } => gc::run(&config, store, older_than, yes, json).await,
        Command::Watch => jobs::watch(&config).await,
        Command::Check => check::check(&config).await,
    }
}

/// Runs a worker until it is told to stop.
async fn until_stopped<W, E>(work: impl FnOnce(Shutdown) -> W) -> Result<u8, Error>
where
    W: Future<Output = Result<(), E>>,
    Error: From<E>,
{
    let shutdown = Shutdown::default();
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let signals = async {
        for token in [&shutdown.drain, &shutdown.now] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            warn!("asked to stop");
            token.cancel();
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = work(shutdown.clone()) => result?,
        () = signals => {}
    }
    Ok(0)
}

/// The engine of the store `name`, or of the default one. To name one that is not in the configuration is a mistake of usage.
async fn engine_of<'a>(
    config: &Config,
    stores: &'a Stores,
    name: Option<&StoreName>,
) -> Result<&'a Engine, Error> {
    config.store(name)?;
    stores.engine(name).await.map_err(Error::Problem)
}

fn listen(kind: SignalKind) -> Result<Signal, Error> {
    signal(kind).map_err(|error| Error::Io("listen to signals", error))
}

fn print_json(value: &impl Serialize) -> Result<(), Error> {
    say(serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints a line. That nobody reads on, as in `backhaul list | head`, is no fault.
fn say(line: impl std::fmt::Display) {
    writeln!(io::stdout(), "{line}").ok();
}
