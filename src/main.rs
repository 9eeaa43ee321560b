//! The command line program.

use std::process::ExitCode;
use std::time::Duration;

use backhaul::cli::args::{Args, LogFormat};
use backhaul::log;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Threads are started when they are needed only.
const BLOCKING_THREADS_MAX: usize = 8192;
/// How long threads that block may take to come to an end when all is done.
const BLOCKED_TIME_MAX: Duration = Duration::from_secs(5);

/// With fewer file handles, jobs side by side may not have enough.
const HANDLES_MIN: u64 = 1024;

fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.log_filter(), args.log_format == LogFormat::Json);
    // The process holds keys and passwords, which are not for a core dump. systemd-coredump heeds this limit, too.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::warn!(%error, "core dumps could not be turned off");
    }
    raise_handles_max();
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
    let code = runtime.block_on(backhaul::cli::run(args));
    // A thread that waits for a disk or a server which does not answer must not keep a process that was told to stop.
    runtime.shutdown_timeout(BLOCKED_TIME_MAX);
    code
}

/// Lets the process have as many file handles as it may: what most systems give unasked is little for connections to many OSDs.
fn raise_handles_max() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    let handles_max = getrlimit(Resource::Nofile).current;
    if let Some(handles_max) = handles_max.filter(|handles_max| *handles_max < HANDLES_MIN) {
        tracing::warn!(
            handles_max,
            "few files can be open at once, and jobs may fail for it: raise LimitNOFILE or `ulimit -n`"
        );
    }
}
