//! The command line program.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};
use std::time::Duration;

use backhaul::cli::args::{Args, Command, LogFormat};
use backhaul::log;
use clap::Parser;
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

/// Threads are started when they are needed only.
const BLOCKING_THREADS_MAX: usize = 8192;
/// How long threads that block may take to come to an end when all is done.
const BLOCKED_TIME_MAX: Duration = Duration::from_secs(5);

/// With fewer file handles, jobs side by side may not have enough.
const HANDLES_MIN: u64 = 1024;

fn main() -> ExitCode {
    let args = Args::parse();
    log::start(args.log_filter(), args.log_format == LogFormat::Json);
    let moves_volumes = match args.command {
        Command::Worker | Command::Run(_) => true,
        #[cfg(feature = "ceph")]
        Command::Cinder { .. } => true,
        _ => false,
    };
    if moves_volumes {
        share_one_heap();
    }
    leave_no_core_dump();
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

/// Turns core dumps off, which would have keys and passwords in them. A limit of 0 keeps Linux from writing a file, but not from
/// giving the dump to a program that `core_pattern` names. At 1 it does neither: no file is that small, and for a program this one
/// value says that there is to be none (`coredump_pipe` in its fs/coredump.c).
fn leave_no_core_dump() {
    let least = Rlimit { current: Some(1), maximum: Some(1) };
    if setrlimit(Resource::Core, least).is_ok() {
        return;
    }
    // The limit is 0 for good. Not used otherwise, because it also hides from its own user what /proc tells of the process.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "core dumps could not be turned off");
    }
}

/// Begins the program anew with one heap for all threads, unless somebody has said how many there shall be. glibc has several for
/// each core, each of which keeps tens of MiB of what is freed: more than what `memory_bytes_max` allows, the longer the more.
fn share_one_heap() {
    const HEAPS: &str = "MALLOC_ARENA_MAX";
    // Linux takes the other variable from a program that gets more rights than who begins it.
    const BEGUN_ANEW: &str = "BACKHAUL_BEGUN_ANEW";
    if env::var_os(HEAPS).is_some() || env::var_os(BEGUN_ANEW).is_some() {
        return;
    }
    let mut args = env::args_os();
    let began = env::current_exe().map(|program| {
        let mut program = process::Command::new(program);
        program.arg0(args.next().unwrap_or_default()).args(args).env(HEAPS, "1").env(BEGUN_ANEW, "1");
        program.exec()
    });
    let (Ok(error) | Err(error)) = began;
    tracing::warn!(%error, "more memory than memory_bytes_max may be taken: set MALLOC_ARENA_MAX=1 in the environment");
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
