//! The log of the program, on standard error; what of it is shown can be changed while the program runs.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::{Level, Metadata};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, registry, reload};

/// The log of this process, once it is started.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    filter: Mutex<String>,
    handle: reload::Handle<EnvFilter, Registry>,
}

/// What these have to say at `trace` is never shown: lapin prints all that it sends, the login among it, and amq-protocol the URL.
const SECRETIVE: [&str; 2] = ["lapin", "amq_protocol"];

/// Starts the log, with what `filter` lets through, such as `info,lapin=off`, as text or, with `json`, as JSON.
pub fn start(filter: &str, json: bool) {
    let (layer, handle) = reload::Layer::new(EnvFilter::new(filter));
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    let lines = if json { lines.json().boxed() } else { lines.boxed() };
    registry().with(layer).with(filter_fn(|metadata| !shows_a_login(metadata))).with(lines).init();
    // It is started once.
    let _ = LOG.set(Log { filter: Mutex::new(filter.into()), handle });
}

fn shows_a_login(metadata: &Metadata<'_>) -> bool {
    *metadata.level() == Level::TRACE
        && SECRETIVE.iter().any(|library| metadata.target().starts_with(library))
}

/// What of the log is shown; nothing before it is started.
pub fn filter() -> String {
    LOG.get().map(|log| log.filter.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
}

/// Shows what `filter` lets through from now on; without a log nothing happens.
pub fn show(filter: &str) {
    let Some(log) = LOG.get() else { return };
    // It fails only for a log that is gone.
    if log.handle.reload(EnvFilter::new(filter)).is_ok() {
        *log.filter.lock().unwrap_or_else(PoisonError::into_inner) = filter.into();
    }
}
