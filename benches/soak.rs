//! Many tiny jobs, one after the other, through one worker and through four: how many a second, what each costs the worker,
//! and whether anything grows meanwhile.
//!
//! `soak URL JOBS` takes a broker and how many jobs each of the two rounds has. Half of them are backups of a volume of 1 MiB
//! into a folder, the other half delete these again. Fails if a job ends in another way than it should or twice, if a worker
//! has more memory or open files at the end than after the first tenth, or if anything is left in the store.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use backhaul::broker::{Broker, QueueKind, Settings, Subscription, Tls};
use backhaul::job::{BackupId, BackupWork, Job, JobId, Parent, VolumeId, Work};
use backhaul::message::encode_command;
use backhaul::worker::command_properties;
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::timeout;
use uuid::Uuid;

const VOLUME_BYTES: usize = 1 << 20;
/// Jobs that lie in the queue or run at the same time.
const UNDER_WAY: usize = 64;
/// No job takes this long.
const PATIENCE: Duration = Duration::from_secs(60);
/// In which `/proc/PID/stat` counts: `USER_HZ`, the same on every machine that we build for.
const TICKS_PER_SECOND: f64 = 100.0;
/// What a worker may take more at the end: the allocator's share for each thread fills up over some thousand jobs.
const MEMORY_GROWTH_KIB_MAX: u64 = 32 << 10;
/// The same of files and connections, because it keeps some for its next job.
const FILES_GROWTH_MAX: usize = 8;

fn main() {
    let mut arguments = env::args().skip(1).filter(|argument| argument != "--bench");
    let (Some(url), Some(jobs)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: soak URL JOBS");
        return;
    };
    let jobs = jobs.parse::<usize>().unwrap().next_multiple_of(2);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for workers in [1, 4] {
        runtime.block_on(soak(&url, jobs, workers));
    }
}

/// A worker that runs; dropping it kills it.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// What workers have taken up to now, all together.
struct Usage {
    seconds: f64,
    /// Of the one that has most.
    memory_kib: u64,
    files: usize,
}

impl Usage {
    fn of(workers: &[Worker]) -> Self {
        let (mut seconds, mut memory_kib, mut files) = (0.0, 0, 0);
        for Worker(child) in workers {
            let process = Path::new("/proc").join(child.id().to_string());
            let stat = fs::read_to_string(process.join("stat")).unwrap();
            // Behind the name, which may hold anything, utime and stime are the 12th and 13th.
            let ticks = stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2);
            seconds += ticks.map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / TICKS_PER_SECOND;
            let status = fs::read_to_string(process.join("status")).unwrap();
            let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            memory_kib = memory_kib.max(resident.trim().trim_end_matches(" kB").parse().unwrap());
            files = files.max(fs::read_dir(process.join("fd")).unwrap().count());
        }
        Self { seconds, memory_kib, files }
    }
}

/// One round.
async fn soak(url: &str, jobs: usize, worker_count: usize) {
    let folder = TempDir::new().unwrap();
    let prefix = format!("soak-{}", Uuid::new_v4().simple());
    prepare(folder.path(), url, &prefix);
    let broker = Broker::connect(settings(url, &prefix)).await.unwrap();
    let mut events = broker.events("#").await.unwrap();
    let workers: Vec<Worker> = (0..worker_count).map(|number| start(folder.path(), number)).collect();

    let (mut under_way, mut ended, mut backups_left) = (HashMap::new(), HashSet::new(), jobs / 2);
    while under_way.len() < UNDER_WAY && backups_left > 0 {
        send(&broker, backup(folder.path()), &mut under_way).await;
        backups_left -= 1;
    }
    let mut first = None;
    while ended.len() < jobs {
        let (id, event_type) = next_end(&mut events).await;
        assert_eq!(event_type, "backhaul.job.succeeded.v1", "{id}");
        assert!(ended.insert(id), "{id} has ended twice");
        match under_way.remove(&id).expect("a job of this round") {
            Work::Backup(work) => send(&broker, Work::Delete(work.backup_id), &mut under_way).await,
            _ if backups_left > 0 => {
                send(&broker, backup(folder.path()), &mut under_way).await;
                backups_left -= 1;
            }
            _ => {}
        }
        if first.is_none() && ended.len() >= jobs / 10 {
            first = Some((Instant::now(), ended.len(), Usage::of(&workers)));
        }
    }
    let (since, before, first) = first.unwrap();
    let (seconds, last) = (since.elapsed().as_secs_f64(), Usage::of(&workers));
    let counted = (jobs - before) as f64;
    println!(
        "| {worker_count} | {jobs} | {:.0} | {:.1} | {} → {} | {} → {} |",
        counted / seconds,
        (last.seconds - first.seconds) / counted * 1000.0,
        first.memory_kib >> 10,
        last.memory_kib >> 10,
        first.files,
        last.files,
    );
    assert!(last.memory_kib < first.memory_kib + MEMORY_GROWTH_KIB_MAX, "a worker's memory grows");
    assert!(last.files < first.files + FILES_GROWTH_MAX, "a worker's open files grow");
    // The last jobs are settled right behind their events.
    let deadline = Instant::now() + PATIENCE;
    while files_below(&folder.path().join("backups")) > 0 {
        assert!(Instant::now() < deadline, "something is left in the store");
        thread::sleep(Duration::from_millis(50));
    }
}

fn prepare(folder: &Path, url: &str, prefix: &str) {
    for name in ["volumes", "backups"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    let mut volume = vec![0; VOLUME_BYTES];
    fastrand::Rng::with_seed(1).fill(&mut volume);
    fs::write(folder.join("volumes/volume.img"), volume).unwrap();
    let config = format!(
        "[broker]\nurl = \"{url}\"\nprefix = \"{prefix}\"\n[worker]\nfile_roots = [\"volumes\"]\n\
         [store.local]\nkind = \"posix\"\npath = \"backups\"\n"
    );
    fs::write(folder.join("backhaul.toml"), config).unwrap();
}

fn start(folder: &Path, number: usize) -> Worker {
    let mut command = Command::new(env!("CARGO_BIN_EXE_backhaul"));
    let log = File::create(folder.join(format!("worker-{number}.log"))).unwrap();
    command.current_dir(folder).arg("worker").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    Worker(command.spawn().unwrap())
}

fn settings(url: &str, prefix: &str) -> Settings {
    Settings {
        url: url.parse().unwrap(),
        prefix: prefix.into(),
        connection_name: "soak".into(),
        heartbeat_seconds: 60,
        tls: Tls::default(),
        queue_kind: QueueKind::Quorum,
        retry_delay_seconds: 1,
        retry_delay_seconds_max: 1,
        reconnect_seconds_max: 1,
        publish_seconds_max: 60,
        message_bytes_max: 1 << 20,
    }
}

/// A full backup of the volume, as if it were one of its own: jobs on one volume wait for each other.
fn backup(folder: &Path) -> Work {
    Work::Backup(BackupWork {
        backup_id: BackupId::random(),
        volume_id: VolumeId::random(),
        source: format!("file:{}", folder.join("volumes/volume.img").display()).parse().unwrap(),
        parent: Parent::None,
        container: None,
        name: None,
        description: None,
        project_id: None,
        volume_meta: None,
    })
}

async fn send(broker: &Broker, work: Work, under_way: &mut HashMap<JobId, Work>) {
    let job = Job { id: JobId::random(), store: None, deadline: None, work };
    let body = encode_command(&backhaul::job::Command::Run(Box::new(job.clone())));
    broker.publish_job(body.into(), command_properties()).await.unwrap();
    under_way.insert(job.id, job.work);
}

/// The next job that ends, and how.
async fn next_end(events: &mut Subscription) -> (JobId, String) {
    loop {
        let notice = timeout(PATIENCE, events.next()).await.expect("an event in time").expect("a broker");
        let event: Value = serde_json::from_slice(&notice.body).unwrap();
        let event_type = event["type"].as_str().unwrap();
        if ["succeeded", "failed", "cancelled", "rejected"].iter().any(|end| event_type.contains(end)) {
            return (event["data"]["job_id"].as_str().unwrap().parse().unwrap(), event_type.into());
        }
    }
}

fn files_below(folder: &Path) -> usize {
    let entries =
        fs::read_dir(folder).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let count = |path: &Path| if path.is_dir() { files_below(path) } else { 1 };
    entries.iter().map(|entry| count(&entry.path())).sum()
}
