//! The command line program.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use backhaul::cli::args::{Args, LogFormat};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Threads are started when they are needed only.
const BLOCKING_THREADS_MAX: usize = 8192;

fn main() -> ExitCode {
    let args = Args::parse();
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(args.log_filter()))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // Each backup of a chain that is read back has a thread for its lists: a long chain must not wait for itself.
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(backhaul::cli::run(args))
}
