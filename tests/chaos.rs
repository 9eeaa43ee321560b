//! Jobs at random, while workers are killed or stopped, the broker is restarted, connections are cut, and stores fail, are full
//! or give wrong bytes: each job ends once, and the stores hold what was told.
//!
//! `make test` plays one round with a folder as the store, `make chaos SEEDS=200` as many rounds with posix, S3 and RBD stores.
//! The seed of a round decides what is done and what goes wrong, though not how far the jobs have come by then. Of many rounds
//! two are played side by side: most of a round is waiting. They have one broker and one cluster, so that a restart of these
//! is trouble for both; queues, stores, volumes and workers are each round's own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::ceph::Ceph;
use crate::support::link::Link;
use crate::support::rabbit::Rabbit;
use crate::support::s3;
use crate::support::stack::{Stack, limit_handles, settings};
use crate::support::volume::{Fill, Volume, noise};
use backhaul::broker::{Broker, Properties, Settings, State, Subscription};
use backhaul::job::{
    self, BackupId, BackupWork, Job, JobId, Location, Parent, Record, RecordState, RestoreWork, VolumeId,
    Work,
};
use backhaul::message::encode_command;
use backhaul::store::{Folder, ObjectStore, S3};
use backhaul::worker::command_properties;
use fastrand::Rng;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::RwLock;
use tokio::time::timeout;

/// How many rounds there are, with stores of all kinds; one with a folder if it is not set.
const SEEDS: &str = "BACKHAUL_CHAOS_SEEDS";
/// The seed of the first round; any if it is not set. The next round has the next one.
const FIRST_SEED: &str = "BACKHAUL_CHAOS_FIRST_SEED";

const WORKERS: usize = 3;
const VOLUMES: usize = 24;
const SHORT_JOBS: usize = 80;
const LONG_JOBS: usize = 240;
/// Jobs that nobody has told the end of.
const UNDER_WAY_MAX: usize = 16;
/// A job whose end is not told for so long, while nothing goes wrong any more, is stuck.
const PATIENCE: Duration = Duration::from_secs(150);
/// The memory that a worker has used at the end of a round.
const MEMORY_BYTES_MAX: u64 = 256 << 20;
/// Connections that workers keep for their next job.
const IDLE_CONNECTIONS_MAX: usize = 16;

#[test]
fn whatever_dies_each_job_ends_once_and_the_stores_hold_what_was_told() {
    let seeds: Option<u64> = std::env::var(SEEDS).ok().map(|count| count.parse().unwrap());
    let first =
        std::env::var(FIRST_SEED).map_or_else(|_| fastrand::u64(..1_000_000), |seed| seed.parse().unwrap());
    let services = if seeds.is_some() { Services::with_cluster() } else { Services::with_folder() };
    let (count, begun) = (seeds.unwrap_or(1), Instant::now());
    let (failed, total, next) = (Mutex::new(Vec::new()), Mutex::<Tally>::default(), AtomicU64::new(first));
    thread::scope(|scope| {
        for lane in &services.lanes {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    if let Err(folder) = play(&services, lane, seed, &total) {
                        println!("seed {seed}: FAILED, logs and stores are in {}", folder.display());
                        failed.lock().unwrap().push(seed);
                    }
                }
            });
        }
    });
    let (failed, mut total) = (failed.into_inner().unwrap(), total.into_inner().unwrap());
    total.seconds = begun.elapsed().as_secs_f64();
    println!("{} of {count} seeds passed: {total}", count - failed.len() as u64);
    assert!(failed.is_empty(), "what went wrong with the seeds {failed:?} stands above");
}

/// Plays a round; gives the folder in which it left everything if something was wrong.
fn play(services: &Services, lane: &Lane, seed: u64, total: &Mutex<Tally>) -> Result<(), PathBuf> {
    let bucket = s3::new_bucket();
    let stack = services.stack(lane, &bucket);
    let stores: Vec<&str> = services.stores().into_iter().map(Store::name).collect();
    println!("seed {seed}: begins, with the stores {}", stores.join(", "));
    let runtime = Runtime::new().unwrap();
    let wrong = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            let mut round = Round::new(services, lane, &stack, &bucket, seed).await;
            let begun = Instant::now();
            round.play().await;
            round.count();
            round.tally.seconds = begun.elapsed().as_secs_f64();
            println!("seed {seed}: {}", round.tally);
            total.lock().unwrap().add(&round.tally);
            round.wrong
        })
    }));
    let wrong = wrong.unwrap_or_else(|_| {
        services.mend(lane);
        vec!["the round broke off, as told above".into()]
    });
    for wrong in &wrong {
        println!("seed {seed}: {wrong}");
    }
    if wrong.is_empty() { Ok(()) } else { Err(stack.keep()) }
}

/// A kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Store {
    Posix,
    S3,
    Rbd,
}

impl Store {
    /// Its name in the configuration.
    fn name(self) -> &'static str {
        match self {
            Self::Posix => "local",
            Self::S3 => "s3",
            Self::Rbd => "rbd",
        }
    }
}

/// What all rounds share.
struct Services {
    rabbit: Rabbit,
    /// Held to write by who stops the broker or breaks its connections, to read by who cannot do without it.
    broker_in_use: RwLock<()>,
    cluster: Option<Cluster>,
    lanes: Vec<Lane>,
}

/// Stores for which there is a cluster.
struct Cluster {
    ceph: Ceph,
    s3_url: String,
    /// Whether a round has stopped the OSD.
    no_osd: Mutex<bool>,
}

/// What a round has of its own, and the next one after it.
struct Lane {
    /// The way of each worker to the broker.
    links: Vec<Link>,
    /// The way of the workers to the gateway of the cluster.
    s3_link: Option<Link>,
    /// The pool of backups.
    pool: &'static str,
}

impl Services {
    fn with_folder() -> Self {
        let rabbit = Rabbit::start();
        let lanes = vec![Lane::new(&rabbit, None, "")];
        Self { rabbit, broker_in_use: RwLock::new(()), cluster: None, lanes }
    }

    fn with_cluster() -> Self {
        // It is not to take half a minute until it forgets a worker that was killed.
        let ceph = Ceph::start_with(&["osd client watch timeout = 5"]);
        let s3_url = ceph.start_gateway();
        let rabbit = Rabbit::start();
        let lanes = ["backups", "backups2"].map(|pool| Lane::new(&rabbit, Some(&s3_url), pool)).into();
        let cluster = Some(Cluster { ceph, s3_url, no_osd: Mutex::new(false) });
        Self { rabbit, broker_in_use: RwLock::new(()), cluster, lanes }
    }

    fn stores(&self) -> Vec<Store> {
        match &self.cluster {
            Some(_) => vec![Store::Posix, Store::S3, Store::Rbd],
            None => vec![Store::Posix],
        }
    }

    fn stack(&self, lane: &Lane, bucket: &str) -> Stack {
        let worker =
            "jobs_max = 3\ncpu_threads_max = 1\nattempts_max = 100\nmemory_bytes_max = 134217728\ndrain_seconds_max = 0"
                .to_owned();
        let chunking = "object_bytes = 65536\nsha_block_bytes = 4096\n";
        let cluster = self.cluster.as_ref().map(|cluster| {
            let settings = s3::settings(&cluster.s3_url, bucket);
            let keys = url::Url::parse(&cluster.s3_url).unwrap();
            let link = url::Url::parse(lane.s3_link.as_ref().unwrap().url()).unwrap();
            let port = link.port().unwrap();
            assert_eq!(settings.endpoint.host_str(), Some("127.0.0.1"));
            format!(
                "[store.s3]\nkind = \"s3\"\nendpoint = \"http://127.0.0.1:{port}\"\nbucket = \"{bucket}\"\n\
                 access_key = \"{}\"\nsecret_key = \"{}\"\nconnections_max = 8\nidle_seconds_max = 5\n{chunking}\n\
                 [ceph.main]\nconf = \"{}\"\nuser = \"cinder\"\noperation_seconds_max = 5\n\n\
                 [store.rbd]\nkind = \"rbd\"\npool = \"{}\"\n",
                keys.username(),
                keys.password().unwrap(),
                cluster.ceph.conf().display(),
                lane.pool
            )
        });
        Stack::new(self.rabbit.url(), &worker, &format!("{chunking}\n{}", cluster.unwrap_or_default()))
    }

    /// Starts again what a round may have left stopped.
    fn mend(&self, lane: &Lane) {
        let _alone = self.broker_in_use.blocking_write();
        self.rabbit.ctl(&["start_app"]);
        lane.mend();
        if let Some(cluster) = &self.cluster {
            cluster.start_osd();
        }
    }
}

impl Cluster {
    /// Whether it was there to be stopped.
    fn stop_osd(&self) -> bool {
        let mut no_osd = self.no_osd.lock().unwrap();
        if *no_osd {
            return false;
        }
        self.ceph.stop_osd();
        *no_osd = true;
        true
    }

    fn start_osd(&self) {
        let mut no_osd = self.no_osd.lock().unwrap();
        self.ceph.start_osd();
        *no_osd = false;
    }
}

impl Lane {
    fn new(rabbit: &Rabbit, s3_url: Option<&str>, pool: &'static str) -> Self {
        let links = (0..WORKERS).map(|_| Link::to(rabbit.url())).collect();
        Self { links, s3_link: s3_url.map(Link::to), pool }
    }

    fn mend(&self) {
        if let Some(link) = &self.s3_link {
            link.mend();
        }
    }
}

/// What was done, and what went wrong meanwhile, by its name.
#[derive(Default)]
struct Tally {
    jobs: BTreeMap<String, usize>,
    troubles: BTreeMap<&'static str, usize>,
    /// Events that told the end of a job again.
    told_again: usize,
    /// The most memory that a worker has used.
    memory_bytes: u64,
    seconds: f64,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        for (end, count) in &other.jobs {
            *self.jobs.entry(end.clone()).or_default() += count;
        }
        for (trouble, count) in &other.troubles {
            *self.troubles.entry(trouble).or_default() += count;
        }
        self.told_again += other.told_again;
        self.memory_bytes = self.memory_bytes.max(other.memory_bytes);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |counts: Vec<String>| counts.join(", ");
        let jobs = list(self.jobs.iter().map(|(end, count)| format!("{count} {end}")).collect());
        let troubles =
            list(self.troubles.iter().map(|(trouble, count)| format!("{count} {trouble}")).collect());
        let count: usize = self.jobs.values().sum();
        write!(
            f,
            "{count} jobs ({jobs}; {} told again), trouble: {troubles}, workers of {} MiB, {:.0} seconds",
            self.told_again,
            self.memory_bytes >> 20,
            self.seconds
        )
    }
}

/// A worker process, which may be dead, with its own way to the broker.
struct Worker {
    number: usize,
    child: Option<Child>,
    /// Whether it was told to stop, and is to end by itself.
    stopping: bool,
    log: PathBuf,
    /// Where in the log its present life begins.
    log_start: usize,
}

impl Worker {
    /// Starts it, if it does not run.
    fn start(&mut self, stack: &Stack, link: &Link) {
        if self.child.is_some() {
            return;
        }
        self.log_start = fs::read(&self.log).unwrap_or_default().len();
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = stack.command(&["worker"]);
        command.env("BACKHAUL_BROKER__URL", link.url()).env("BACKHAUL_BROKER__RECONNECT_SECONDS_MAX", "1");
        // What tells of a panic in full takes more memory than all else.
        command.env("BACKHAUL_WORKER__NAME", format!("worker-{}", self.number)).env("RUST_BACKTRACE", "0");
        self.child = Some(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        self.stopping = false;
    }

    /// Sends SIGTERM.
    fn terminate(&mut self) {
        let pid = self.pid().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.stopping = true;
    }

    fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What all its lives have logged.
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How often it has connected to the broker in its present life.
    fn connected_count(&self) -> usize {
        self.log()[self.log_start..].matches("broker connected").count()
    }

    /// How many handles it has open: of anything but sockets, and sockets.
    fn handles(&self) -> [usize; 2] {
        let folder = fs::read_dir(format!("/proc/{}/fd", self.pid().unwrap())).unwrap();
        let targets: Vec<PathBuf> =
            folder.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
        let is_socket = |target: &&PathBuf| target.to_string_lossy().starts_with("socket:");
        let sockets = targets.iter().filter(is_socket).count();
        [targets.len() - sockets, sockets]
    }

    /// The most memory that it has used.
    fn memory_bytes(&self) -> u64 {
        crate::support::stack::memory_bytes_most(self.pid().unwrap())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A volume, and the bytes that it has.
struct Disk {
    id: VolumeId,
    source: Location,
    place: Place,
    /// The store that most of its backups go to.
    home: Store,
}

enum Place {
    File(Volume),
    Image { spec: String, bytes: Vec<u8> },
}

impl Disk {
    fn bytes(&self) -> &[u8] {
        match &self.place {
            Place::File(volume) => &volume.bytes,
            Place::Image { bytes, .. } => bytes,
        }
    }

    /// Changes some of it.
    fn write(&mut self, rng: &mut Rng, services: &Services) {
        let mut written = Vec::new();
        for _ in 0..rng.usize(1..4) {
            let end = rng.usize(1..=self.bytes().len());
            let start = end - rng.usize(1..=end.min(1 << 19));
            match &mut self.place {
                Place::File(volume) => {
                    let fills = [Fill::Noise(rng.u64(..)), Fill::Text(rng.u8(..)), Fill::Zeros, Fill::Hole];
                    volume.fill(start..end, rng.choice(fills).unwrap());
                }
                Place::Image { bytes, .. } => {
                    if rng.bool() {
                        noise(&mut bytes[start..end], rng.u64(..));
                    } else {
                        bytes[start..end].fill(0);
                    }
                    written.push(start..end);
                }
            }
        }
        if let Place::Image { spec, bytes } = &self.place {
            let extents: Vec<_> =
                written.into_iter().map(|range| (range.start as u64, &bytes[range])).collect();
            services.cluster.as_ref().unwrap().ceph.existing(spec).write(&extents);
        }
    }
}

/// A backup that somebody asked for, and what it is to hold.
struct Point {
    id: BackupId,
    disk: usize,
    store: Store,
    bytes: Arc<[u8]>,
    made_by: JobId,
    deleted_by: Vec<JobId>,
    /// Somebody asked for its end before it was whole.
    deleted_early: bool,
}

/// What is to have become of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    UnderWay,
    There,
    Gone,
    /// It may be there, and is whole then.
    Either,
}

/// A job that was sent, and what became of it.
struct Sent {
    store: Store,
    work: Work,
    /// It cannot fail.
    sure: bool,
    cancelled: bool,
    /// Its store may have refused something because it was full: not even how it ended may have been kept.
    met_full: bool,
    ended: Option<Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Succeeded,
    Failed,
    Cancelled,
}

impl End {
    /// That which an event tells, if it tells one.
    fn of(event: &Value) -> Option<Self> {
        match event["type"].as_str() {
            Some("backhaul.job.succeeded.v1") => Some(Self::Succeeded),
            Some("backhaul.job.failed.v1") => Some(Self::Failed),
            Some("backhaul.job.cancelled.v1") => Some(Self::Cancelled),
            _ => None,
        }
    }
}

impl Sent {
    fn end(&self) -> Option<End> {
        self.ended.as_ref().and_then(End::of)
    }

    /// Whether it needs this backup.
    fn needs(&self, id: BackupId) -> bool {
        match &self.work {
            Work::Backup(work) => work.backup_id == id || work.parent == Parent::Given(id),
            Work::Restore(work) => work.backup_id == id,
            Work::Verify(work) => work.backup_id == id,
            Work::Delete(_) => false,
        }
    }

    /// Whether it reads the data of a backup.
    fn reads(&self) -> bool {
        matches!(self.work, Work::Restore(_) | Work::Verify(_))
    }
}

/// A byte of an object in the folder that was turned into another one, and what it was.
struct Spoilt {
    path: PathBuf,
    offset: u64,
    byte: u8,
}

impl Spoilt {
    fn mend(&self) {
        // The object may have been deleted meanwhile.
        if let Ok(file) = File::options().write(true).open(&self.path) {
            file.write_all_at(&[self.byte], self.offset).unwrap();
        }
    }
}

/// What ends a trouble.
enum Undo {
    Start(usize),
    /// The worker, if it is still that process.
    Handles(usize, u32),
    /// The same, by a second signal.
    Terminate(usize, u32),
    Byte(Spoilt),
    S3,
    Osd,
}

/// A round: what was done so far, and what has come of it.
struct Round<'a> {
    services: &'a Services,
    lane: &'a Lane,
    stack: &'a Stack,
    bucket: &'a str,
    rng: Rng,
    broker: Broker,
    events: Subscription,
    workers: Vec<Worker>,
    /// This one is never killed.
    spared: usize,
    /// What a worker has open that has not had a job yet.
    handles_at_first: [usize; 2],
    /// How many handles a worker may have.
    handles_limit: String,
    disks: Vec<Disk>,
    points: Vec<Point>,
    jobs: BTreeMap<JobId, Sent>,
    undo: Vec<(Instant, Undo)>,
    /// Whether the store behind S3 may be full for a request.
    is_full: bool,
    tally: Tally,
    wrong: Vec<String>,
}

impl<'a> Round<'a> {
    async fn new(
        services: &'a Services,
        lane: &'a Lane,
        stack: &'a Stack,
        bucket: &'a str,
        seed: u64,
    ) -> Self {
        let _in_use = services.broker_in_use.read().await;
        let settings = Settings { publish_seconds_max: 60, ..settings(&services.rabbit, stack) };
        let broker = Broker::connect(settings).await.unwrap();
        let events = broker.events("#").await.unwrap();
        let mut rng = Rng::with_seed(seed);
        let worker = |number| {
            let log = stack.path(&format!("worker-{number}.log"));
            let mut worker = Worker { number, child: None, stopping: false, log, log_start: 0 };
            worker.start(stack, &lane.links[number]);
            worker
        };
        let workers: Vec<_> = (0..WORKERS).map(worker).collect();
        let is_there = || workers.iter().all(|worker| worker.connected_count() > 0);
        assert!(soon(is_there).await, "the workers do not begin");
        // The first connection of all is not the one that the handles are counted with at the end.
        lane.links[0].cut();
        let is_back = || workers[0].connected_count() > 1;
        assert!(soon(is_back).await, "a worker does not connect again");
        let limits = fs::read_to_string(format!("/proc/{}/limits", workers[0].pid().unwrap())).unwrap();
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        Self {
            handles_limit: limit.split_whitespace().next().unwrap().to_owned(),
            handles_at_first: workers[0].handles(),
            spared: rng.usize(..WORKERS),
            disks: (0..VOLUMES).map(|number| disk(services, stack, &mut rng, number)).collect(),
            points: Vec::new(),
            jobs: BTreeMap::new(),
            undo: Vec::new(),
            is_full: false,
            tally: Tally::default(),
            wrong: Vec::new(),
            services,
            lane,
            stack,
            bucket,
            rng,
            broker,
            events,
            workers,
        }
    }

    async fn play(&mut self) {
        let jobs_max = if self.services.cluster.is_some() { LONG_JOBS } else { SHORT_JOBS };
        let mut next_trouble = Instant::now();
        let mut restarts_left = 1;
        while self.jobs.len() < jobs_max {
            let pause = Duration::from_millis(self.rng.u64(1..50));
            self.listen(pause).await;
            self.look_after_workers();
            self.undo_what_is_due(Instant::now());
            if restarts_left > 0 && self.jobs.len() >= jobs_max / 2 {
                restarts_left -= 1;
                self.restart_broker().await;
            }
            if Instant::now() >= next_trouble {
                self.make_trouble().await;
                next_trouble = Instant::now() + Duration::from_millis(self.rng.u64(100..900));
            }
            if self.under_way().count() < UNDER_WAY_MAX {
                self.do_something().await;
            }
        }
        while let Some(last) = self.undo.iter().map(|(at, _)| *at).max() {
            self.undo_what_is_due(last);
        }
        if !self.all_run().await || !self.all_end().await {
            return;
        }
        self.check_backups().await;
        self.remove_backups().await;
        self.check_handles_and_memory().await;
        self.end_workers().await;
        self.check_dead_letters().await;
        self.check_garbage().await;
        if let Some(cluster) = &self.services.cluster {
            for disk in &self.disks {
                if let Place::Image { spec, .. } = &disk.place {
                    // Snapshots of backups that nobody deleted are on it.
                    cluster.ceph.rbd(&["snap", "purge", "--no-progress", spec]);
                    cluster.ceph.rbd(&["rm", "--no-progress", spec]);
                }
            }
        }
    }

    fn wrong(&mut self, what: impl Into<String>) {
        self.wrong.push(what.into());
    }

    fn under_way(&self) -> impl Iterator<Item = (&JobId, &Sent)> {
        self.jobs.iter().filter(|(_, job)| job.ended.is_none())
    }

    fn count_trouble(&mut self, name: &'static str) {
        *self.tally.troubles.entry(name).or_default() += 1;
    }

    /// Counts how the jobs have ended.
    fn count(&mut self) {
        for job in self.jobs.values() {
            let operation =
                Job { id: JobId::random(), store: None, deadline: None, work: job.work.clone() }.operation();
            let end = match job.end() {
                Some(End::Succeeded) => "succeeded",
                Some(End::Failed) => "failed",
                Some(End::Cancelled) => "cancelled",
                None => "never ended",
            };
            *self.tally.jobs.entry(format!("{operation} {end}")).or_default() += 1;
        }
    }
}

/// What is asked of the workers.
impl Round<'_> {
    async fn do_something(&mut self) {
        match self.rng.usize(..20) {
            0..=3 => self.write(),
            4..=9 => self.back_up().await,
            10..=12 => self.restore().await,
            13..=14 => self.verify().await,
            15..=17 => self.delete().await,
            _ => self.cancel().await,
        }
    }

    /// Writes to a volume of which no backup is being made.
    fn write(&mut self) {
        let is_busy = |disk: &usize| {
            self.points.iter().any(|point| point.disk == *disk && self.fate(point) == Fate::UnderWay)
        };
        // Who writes to an image while there is no OSD waits for it.
        let no_osd = self.services.cluster.as_ref().is_some_and(|cluster| *cluster.no_osd.lock().unwrap());
        let is_away = |disk: &usize| no_osd && matches!(self.disks[*disk].place, Place::Image { .. });
        let idle = (0..self.disks.len()).filter(|disk| !is_busy(disk) && !is_away(disk));
        let idle: Vec<usize> = idle.collect();
        if let Some(disk) = self.rng.choice(idle) {
            self.disks[disk].write(&mut self.rng, self.services);
        }
    }

    async fn back_up(&mut self) {
        let number = self.rng.usize(..self.disks.len());
        let disk = &self.disks[number];
        let store = match self.rng.u8(..5) {
            0 => self.rng.choice(self.services.stores()).unwrap(),
            _ => disk.home,
        };
        let of_disk = |point: &&Point| point.disk == number && point.store == store;
        let parents: Vec<_> =
            self.points.iter().filter(of_disk).filter(|point| self.fate(point) == Fate::There).collect();
        let parent = match (self.rng.u8(..8), self.rng.choice(parents)) {
            (0..=1, _) => Parent::None,
            (2..=3, Some(point)) => Parent::Given(point.id),
            _ => Parent::Latest,
        };
        let (id, bytes) = (BackupId::random(), disk.bytes().into());
        let work = Work::Backup(BackupWork {
            backup_id: id,
            volume_id: disk.id,
            source: disk.source.clone(),
            parent,
            container: None,
            name: None,
            description: None,
            project_id: None,
            volume_meta: None,
        });
        let made_by = self.send(store, work, true).await;
        self.points.push(Point {
            id,
            disk: number,
            store,
            bytes,
            made_by,
            deleted_by: Vec::new(),
            deleted_early: false,
        });
    }

    /// A backup that is there; sometimes any.
    fn a_point(&mut self) -> Option<usize> {
        let any = self.rng.u8(..20) == 0;
        let there = |number: &usize| any || self.fate(&self.points[*number]) == Fate::There;
        let there: Vec<usize> = (0..self.points.len()).filter(there).collect();
        self.rng.choice(there)
    }

    async fn restore(&mut self) {
        let Some(number) = self.a_point() else { return };
        let sure = self.fate(&self.points[number]) == Fate::There;
        self.restore_of(number, sure).await;
    }

    async fn restore_of(&mut self, number: usize, sure: bool) {
        let point = &self.points[number];
        let target = self.stack.location(&format!("restored-{}.img", self.jobs.len())).parse().unwrap();
        let work = Work::Restore(RestoreWork { backup_id: point.id, target, volume_id: None });
        self.send(point.store, work, sure).await;
    }

    async fn verify(&mut self) {
        let Some(number) = self.a_point() else { return };
        let point = &self.points[number];
        let sure = self.fate(point) == Fate::There;
        self.send(point.store, Work::Verify(point.id.into()), sure).await;
    }

    async fn delete(&mut self) {
        let Some(number) = self.a_point() else { return };
        let point = &self.points[number];
        let (id, is_early) = (point.id, self.fate(point) == Fate::UnderWay);
        // Who needs it may find it gone.
        for job in self.jobs.values_mut().filter(|job| job.ended.is_none() && job.needs(id)) {
            job.sure = false;
        }
        let job = self.send(point.store, Work::Delete(id), false).await;
        let point = &mut self.points[number];
        point.deleted_by.push(job);
        point.deleted_early |= is_early;
    }

    async fn cancel(&mut self) {
        let under_way: Vec<JobId> = self.under_way().map(|(id, _)| *id).collect();
        let Some(id) = self.rng.choice(under_way) else { return };
        self.jobs.get_mut(&id).unwrap().cancelled = true;
        let body = encode_command(&job::Command::Cancel(id));
        self.broker.publish_control(body.into(), command_properties()).await.unwrap();
    }

    async fn send(&mut self, store: Store, work: Work, sure: bool) -> JobId {
        let id = JobId::random();
        let store_name = Some(store.name().to_owned().try_into().unwrap());
        let job = Job { id, store: store_name, deadline: None, work: work.clone() };
        let met_full = self.is_full && store == Store::S3;
        let is_spoilt = self.undo.iter().any(|(_, undo)| matches!(undo, Undo::Byte(_)));
        let mut sent = Sent { store, work, sure, cancelled: false, met_full, ended: None };
        sent.sure &= !(met_full || is_spoilt && store == Store::Posix && sent.reads());
        self.jobs.insert(id, sent);
        let body = encode_command(&job::Command::Run(Box::new(job)));
        self.broker.publish_job(body.into(), command_properties()).await.unwrap();
        id
    }
}

/// What goes wrong.
impl Round<'_> {
    async fn make_trouble(&mut self) {
        let number = self.rng.usize(..WORKERS);
        let soon = Duration::from_millis(self.rng.u64(100..2000));
        match (self.rng.u8(..20), &self.services.cluster) {
            (0..=3, _) if number != self.spared && self.workers[number].child.is_some() => {
                self.workers[number].kill();
                self.count_trouble("workers killed");
                self.undo_in(soon, Undo::Start(number));
            }
            (4..=6, _) => {
                self.lane.links[number].cut();
                self.count_trouble("workers cut off");
            }
            (7, _) => {
                let _alone = self.services.broker_in_use.write().await;
                self.services.rabbit.ctl(&["close_all_connections", "chaos"]);
                self.count_trouble("times all connections closed");
            }
            (8..=9, _) => {
                let worker = &self.workers[number];
                let is_ready = |_: &u32| worker.connected_count() > 0 && !worker.stopping;
                if let Some(pid) = worker.pid().filter(is_ready) {
                    limit_handles(pid, "3");
                    self.count_trouble("times no file handles");
                    self.undo_in(soon, Undo::Handles(number, pid));
                }
            }
            (10..=12, Some(_)) => {
                let link = self.lane.s3_link.as_ref().unwrap();
                match self.rng.u8(..6) {
                    0 => link.cut(),
                    1 => link.lose_answers(self.rng.usize(1..4)),
                    2 => {
                        let answer = "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
                        link.answer(vec![answer.to_owned(); 3]);
                    }
                    3 => link.spoil_body(),
                    4 => {
                        let answer = "HTTP/1.1 507 Insufficient Storage\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
                        link.answer([answer.to_owned()]);
                        self.is_full = true;
                        let under_way = self.jobs.values_mut().filter(|job| job.ended.is_none());
                        for job in under_way.filter(|job| job.store == Store::S3) {
                            (job.sure, job.met_full) = (false, true);
                        }
                        self.count_trouble("times S3 full");
                    }
                    _ => link.stall(true),
                }
                self.count_trouble("times trouble with S3");
                self.undo_in(soon, Undo::S3);
            }
            (13, Some(cluster)) if cluster.stop_osd() => {
                self.count_trouble("times no OSD");
                self.undo_in(soon * 3, Undo::Osd);
            }
            (14..=16, _) if number != self.spared => self.stop_worker(number, soon),
            (17..=19, _) => {
                if let Some(spoilt) = self.spoil_an_object() {
                    let under_way = self.jobs.values_mut().filter(|job| job.ended.is_none());
                    for job in under_way.filter(|job| job.store == Store::Posix && job.reads()) {
                        job.sure = false;
                    }
                    self.count_trouble("bytes wrong");
                    self.undo_in(soon, Undo::Byte(spoilt));
                }
            }
            _ => {}
        }
    }

    /// Tells a worker to stop, sometimes twice.
    fn stop_worker(&mut self, number: usize, soon: Duration) {
        let Some(pid) = self.workers[number].pid() else { return };
        // One that has just begun does not heed signals yet.
        if self.workers[number].connected_count() == 0 {
            return;
        }
        // One without handles would have to be given them back, when it may have ended.
        let has_none = |undo: &Undo| matches!(undo, Undo::Handles(_, other) if *other == pid);
        if self.workers[number].stopping || self.undo.iter().any(|(_, undo)| has_none(undo)) {
            return;
        }
        self.workers[number].terminate();
        self.count_trouble("workers told to stop");
        if self.rng.u8(..3) == 0 {
            self.undo_in(soon / 4, Undo::Terminate(number, pid));
        }
    }

    /// Turns a byte of the data of a backup that is there into another one.
    fn spoil_an_object(&mut self) -> Option<Spoilt> {
        let there =
            self.points.iter().filter(|point| point.store == Store::Posix && self.fate(point) == Fate::There);
        let there: Vec<BackupId> = there.map(|point| point.id).collect();
        let data = format!("_backup_{}-", self.rng.choice(there)?);
        let objects = self.stack.objects();
        let object =
            self.rng.choice(objects.iter().filter(|object| object.contains(&data)).collect::<Vec<_>>())?;
        let path = self.stack.path("backups").join(object);
        let file = File::options().read(true).write(true).open(&path).ok()?;
        let bytes = file.metadata().unwrap().len();
        let (offset, mut byte) = (self.rng.u64(..bytes.max(1)), [0]);
        file.read_exact_at(&mut byte, offset).ok()?;
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
        Some(Spoilt { path, offset, byte: byte[0] })
    }

    async fn restart_broker(&mut self) {
        let _alone = self.services.broker_in_use.write().await;
        self.services.rabbit.ctl(&["stop_app"]);
        let mut state = self.broker.state();
        state.wait_for(|state| *state != State::Connected).await.unwrap();
        // A worker ends while nobody can be told.
        let number = (self.spared + 1) % WORKERS;
        if self.rng.bool() {
            self.workers[number].kill();
            self.count_trouble("workers killed");
            self.undo_in(Duration::ZERO, Undo::Start(number));
        }
        self.services.rabbit.ctl(&["start_app"]);
        state.wait_for(|state| *state == State::Connected).await.unwrap();
        self.count_trouble("times the broker restarted");
    }

    fn undo_in(&mut self, time: Duration, undo: Undo) {
        self.undo.push((Instant::now() + time, undo));
    }

    fn undo_what_is_due(&mut self, now: Instant) {
        let (due, later) = std::mem::take(&mut self.undo).into_iter().partition(|(at, _)| *at <= now);
        self.undo = later;
        let due: Vec<(Instant, Undo)> = due;
        for (_, undo) in due {
            match (undo, &self.services.cluster) {
                (Undo::Start(number), _) => self.workers[number].start(self.stack, &self.lane.links[number]),
                (Undo::Handles(number, pid), _) => {
                    if self.workers[number].pid() == Some(pid) {
                        limit_handles(pid, &self.handles_limit);
                    }
                }
                (Undo::Terminate(number, pid), _) => {
                    let worker = &mut self.workers[number];
                    if worker.pid() == Some(pid) && worker.stopping {
                        worker.terminate();
                    }
                }
                (Undo::Byte(spoilt), _) => spoilt.mend(),
                (Undo::S3, _) => {
                    self.lane.mend();
                    self.is_full = false;
                }
                (Undo::Osd, Some(cluster)) => cluster.start_osd(),
                (Undo::Osd, None) => {}
            }
        }
    }

    /// A worker ends only if it is killed, or told to stop.
    fn look_after_workers(&mut self) {
        for number in 0..WORKERS {
            let worker = &mut self.workers[number];
            let ended = worker.child.as_mut().and_then(|child| child.try_wait().unwrap());
            if let Some(status) = ended {
                worker.child = None;
                match std::mem::take(&mut worker.stopping) {
                    true if status.success() => {}
                    true => self.wrong(format!("worker {number} was told to stop, and ended with {status}")),
                    false => self.wrong(format!("worker {number} ended by itself: {status}")),
                }
                self.undo_in(Duration::ZERO, Undo::Start(number));
            }
        }
    }

    /// Waits until all workers run, also those that were told to stop.
    async fn all_run(&mut self) -> bool {
        let since = Instant::now();
        while self.workers.iter().any(|worker| worker.stopping || worker.child.is_none()) {
            if since.elapsed() > PATIENCE {
                self.wrong("a worker that was told to stop does not end");
                return false;
            }
            self.look_after_workers();
            self.undo_what_is_due(Instant::now());
            self.listen(Duration::from_millis(100)).await;
        }
        true
    }
}

/// What the workers tell.
impl Round<'_> {
    /// Takes in all events that come within this time.
    async fn listen(&mut self, time: Duration) {
        let until = tokio::time::Instant::now() + time;
        while let Ok(notice) = tokio::time::timeout_at(until, self.events.next()).await {
            self.take_in(&serde_json::from_slice(&notice.unwrap().body).unwrap());
        }
    }

    fn take_in(&mut self, event: &Value) {
        let Some(end) = End::of(event) else { return };
        let id: JobId = event["data"]["job_id"].as_str().unwrap().parse().unwrap();
        let Some(job) = self.jobs.get_mut(&id) else {
            return self.wrong(format!("nobody sent this job: {event}"));
        };
        if let Some(first) = &job.ended {
            self.tally.told_again += 1;
            if (first["id"] != event["id"] || first["data"] != event["data"]) && !job.met_full {
                let wrong = format!("job {id} ended twice:\n    {first}\n    {event}");
                self.wrong(wrong);
            }
            return;
        }
        job.ended = Some(event.clone());
        match end {
            End::Failed if job.sure => self.wrong(format!("job {id} failed: {event}")),
            End::Cancelled if !job.cancelled => self.wrong(format!("nobody cancelled job {id}: {event}")),
            End::Succeeded => self.check_restored(id),
            End::Failed | End::Cancelled => {}
        }
    }

    /// Compares what a restore that succeeded has written with what was backed up.
    fn check_restored(&mut self, id: JobId) {
        let Work::Restore(work) = &self.jobs[&id].work else { return };
        let Location::File(path) = &work.target else { return };
        let point = self.points.iter().find(|point| point.id == work.backup_id).unwrap();
        let wrong = match fs::read(path) {
            Ok(bytes) if *bytes == *point.bytes => None,
            Ok(bytes) => {
                let same =
                    bytes.iter().zip(point.bytes.iter()).take_while(|(one, other)| one == other).count();
                Some(format!("has other bytes than backup {} from {same} on", point.id))
            }
            Err(error) => Some(format!("cannot be read: {error}")),
        };
        match wrong {
            Some(wrong) => self.wrong(format!("job {id}: {} {wrong}", path.display())),
            None => fs::remove_file(path).unwrap(),
        }
    }

    /// Waits until the end of all jobs was told.
    async fn all_end(&mut self) -> bool {
        let (mut left, mut since) = (usize::MAX, Instant::now());
        while self.under_way().next().is_some() {
            let now_left = self.under_way().count();
            if now_left < left {
                (left, since) = (now_left, Instant::now());
            }
            if since.elapsed() > PATIENCE {
                let stuck: Vec<_> =
                    self.under_way().map(|(id, job)| format!("{id}, {:?}", job.work)).collect();
                self.wrong(format!("nobody tells the end of these jobs:\n    {}", stuck.join("\n    ")));
                return false;
            }
            self.look_after_workers();
            self.undo_what_is_due(Instant::now());
            self.listen(Duration::from_millis(100)).await;
        }
        true
    }
}

/// What is so in the end.
impl Round<'_> {
    fn fate(&self, point: &Point) -> Fate {
        let ends: Vec<_> = point.deleted_by.iter().map(|job| self.jobs[job].end()).collect();
        match self.jobs.get(&point.made_by).and_then(Sent::end) {
            None => Fate::UnderWay,
            Some(_) if self.met_full(point) => Fate::Either,
            Some(End::Failed | End::Cancelled) => Fate::Gone,
            Some(End::Succeeded) if ends.iter().all(|end| *end == Some(End::Failed)) => Fate::There,
            Some(End::Succeeded) if ends.contains(&Some(End::Succeeded)) && !point.deleted_early => {
                Fate::Gone
            }
            Some(End::Succeeded) => Fate::Either,
        }
    }

    /// Whether a job that made it, or was to remove it, may have been broken off because the store was full.
    fn met_full(&self, point: &Point) -> bool {
        let jobs = point.deleted_by.iter().chain([&point.made_by]);
        jobs.filter_map(|job| self.jobs.get(job)).any(|job| job.met_full)
    }

    fn records(&self, store: Store) -> Vec<Record> {
        serde_json::from_str(&self.stack.ok(&["list", "--json", "--store", store.name()])).unwrap()
    }

    /// Those backups are there that are to be, whole, and nothing else is to be seen.
    async fn check_backups(&mut self) {
        let mut whole = BTreeSet::new();
        for store in self.services.stores() {
            let records = self.records(store);
            let available: Vec<_> =
                records.iter().filter(|record| record.state == RecordState::Available).collect();
            whole.extend(available.iter().map(|record| record.backup_id));
            let mut known: BTreeSet<_> = available.iter().map(|record| seen_as(store, record)).collect();
            let mut seen = self.seen(store).await;
            for point in self.points.iter().filter(|point| self.met_full(point)) {
                let is_other = |name: &String| !name.contains(&point.id.to_string());
                known.retain(is_other);
                seen.retain(is_other);
            }
            if seen != known {
                self.wrong(format!(
                    "store {} shows {seen:?}\n    and has the records {known:?}",
                    store.name()
                ));
            }
            for record in &records {
                if let RecordState::Creating(job) = record.state
                    && !self.jobs[&job].met_full
                {
                    let wrong =
                        format!("job {job} is over, and backup {} is still being made", record.backup_id);
                    self.wrong(wrong);
                }
            }
        }
        for number in 0..self.points.len() {
            let point = &self.points[number];
            let (fate, is_there) = (self.fate(point), whole.contains(&point.id));
            if (fate, is_there) == (Fate::There, false) || (fate, is_there) == (Fate::Gone, true) {
                let is = if is_there { "there" } else { "not there" };
                let (id, jobs) = (point.id, &point.deleted_by);
                self.wrong(format!("backup {id} of job {} is {is}; deletes: {jobs:?}", point.made_by));
            }
            if is_there {
                self.restore_of(number, true).await;
            }
        }
        self.all_end().await;
    }

    /// Deletes all backups, after which none is to be seen.
    async fn remove_backups(&mut self) {
        loop {
            let mut sent = false;
            for store in self.services.stores() {
                let records = self.records(store);
                let parents: BTreeSet<_> = records
                    .iter()
                    .filter(|record| !matches!(record.state, RecordState::Error(_)))
                    .filter_map(|record| record.parent_id)
                    .collect();
                for record in records.iter().filter(|record| !parents.contains(&record.backup_id)) {
                    self.send(store, Work::Delete(record.backup_id), true).await;
                    sent = true;
                }
            }
            if !sent {
                break;
            }
            if !self.all_end().await || !self.wrong.is_empty() {
                return;
            }
        }
        for store in self.services.stores() {
            let seen = self.seen(store).await;
            if !seen.is_empty() {
                self.wrong(format!("store {} shows {seen:?} after all backups were deleted", store.name()));
            }
        }
    }

    /// By what Cinder sees that there are backups.
    async fn seen(&self, store: Store) -> BTreeSet<String> {
        let is_visible = |name: &String| name.ends_with("_metadata");
        match (store, &self.services.cluster) {
            (Store::S3, Some(cluster)) => {
                let store = S3::new(s3::settings(&cluster.s3_url, self.bucket)).unwrap();
                let bucket: job::Container = self.bucket.parse().unwrap();
                let listed = store.list(&Folder::from(&bucket), "volume_").await.unwrap();
                listed.into_iter().map(|listed| listed.name).filter(is_visible).collect()
            }
            (Store::Rbd, Some(cluster)) => {
                let ours = |image: &&str| self.disks.iter().any(|disk| image.contains(&disk.id.to_string()));
                let told = cluster.ceph.rbd(&["ls", "--long", "--format", "json", self.lane.pool]);
                let listed: Vec<Value> = serde_json::from_str(&told).unwrap();
                let ours = listed.iter().filter(|listed| ours(&listed["image"].as_str().unwrap()));
                let snapshots = ours.filter_map(|listed| listed["snapshot"].as_str());
                snapshots.map(|name| name.split(".snap.").next().unwrap().to_owned()).collect()
            }
            _ => self.stack.objects().into_iter().filter(is_visible).collect(),
        }
    }

    /// Workers that have nothing to do hold nothing, and have used no more memory than they may.
    async fn check_handles_and_memory(&mut self) {
        let [others_max, sockets_max] = self.handles_at_first;
        for number in 0..WORKERS {
            let worker = &self.workers[number];
            let is_idle = || {
                let [others, sockets] = worker.handles();
                let connections_max = if self.services.cluster.is_some() { IDLE_CONNECTIONS_MAX } else { 0 };
                others <= others_max && sockets <= sockets_max + connections_max
            };
            let (is_idle, handles) = (soon(is_idle).await, worker.handles());
            let memory_bytes = worker.memory_bytes();
            self.tally.memory_bytes = self.tally.memory_bytes.max(memory_bytes);
            if !is_idle {
                let first = self.handles_at_first;
                self.wrong(format!("worker {number} has handles open: {handles:?} now, {first:?} at first"));
            }
            if memory_bytes > MEMORY_BYTES_MAX {
                self.wrong(format!("worker {number} used {} MiB", memory_bytes >> 20));
            }
        }
    }

    /// Ends the workers. Nothing is left in the queues, and nobody tells anything new.
    async fn end_workers(&mut self) {
        let queues = ["jobs", "cancels", "delay.1s"].map(|name| format!("{}.{name}", self.stack.prefix()));
        let are_empty = || {
            let told = self.services.rabbit.ctl(&["list_queues", "--silent", "name", "messages"]);
            queues.iter().all(|queue| told.lines().any(|line| line == format!("{queue}\t0")))
        };
        let in_use = self.services.broker_in_use.read().await;
        if !soon(are_empty).await {
            let told = self.services.rabbit.ctl(&["list_queues", "--silent", "name", "messages"]);
            self.wrong(format!("there is something left in the queues:\n{told}"));
        }
        drop(in_use);
        for worker in &self.workers {
            let pid = worker.pid().unwrap().to_string();
            assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        }
        for number in 0..WORKERS {
            let mut child = self.workers[number].child.take().unwrap();
            if !soon(|| child.try_wait().unwrap().is_some()).await {
                self.wrong(format!("worker {number} does not end"));
                child.kill().unwrap();
            }
            let status = child.wait().unwrap();
            if !status.success() {
                self.wrong(format!("worker {number} was to end, and did so with {status}"));
            }
            if self.workers[number].log().contains("panicked at") {
                self.wrong(format!("worker {number} panicked"));
            }
        }
        self.broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
        loop {
            let notice = timeout(PATIENCE, self.events.next()).await.unwrap().unwrap();
            if notice.routing_key == "end.end.-" {
                break;
            }
            self.take_in(&serde_json::from_slice(&notice.body).unwrap());
        }
    }

    /// The messages of the jobs that failed lie with the dead letters, and no others.
    async fn check_dead_letters(&mut self) {
        let _in_use = self.services.broker_in_use.read().await;
        let letters: Vec<Value> = serde_json::from_str(&self.stack.ok(&["dead", "list", "--json"])).unwrap();
        let dead: BTreeSet<JobId> =
            letters.iter().map(|letter| letter["job_id"].as_str().unwrap().parse().unwrap()).collect();
        let dead: BTreeSet<JobId> = dead.into_iter().filter(|id| !self.jobs[id].met_full).collect();
        let failed = self.jobs.iter().filter(|(_, job)| job.end() == Some(End::Failed) && !job.met_full);
        let failed: BTreeSet<JobId> = failed.map(|(id, _)| *id).collect();
        if dead != failed {
            self.wrong(format!(
                "with the dead letters lie the jobs {dead:?}\n    and these failed: {failed:?}"
            ));
        }
    }
}

/// What `gc` leaves.
impl Round<'_> {
    /// When what nobody needs was removed, there is nothing more in the stores but how jobs have ended, and which cancels may have
    /// come too late for theirs. Workers remove both when they are old.
    async fn check_garbage(&mut self) {
        let in_use = self.services.broker_in_use.read().await;
        for store in self.services.stores() {
            self.stack.ok(&["gc", "--yes", "--older-than", "0s", "--store", store.name()]);
        }
        drop(in_use);
        for store in self.services.stores() {
            let mut left = self.everything(store).await;
            let late = |name: &str| {
                let name =
                    name.strip_prefix(".backhaul/cancels/").and_then(|name| name.strip_suffix(".json"));
                name.is_some_and(|id| self.jobs.get(&id.parse().unwrap()).is_some_and(|job| job.cancelled))
            };
            left.retain(|name| !name.starts_with(".backhaul/outcomes") && !late(name));
            if !left.is_empty() {
                self.wrong(format!("store {} has {left:?} after all was removed", store.name()));
            }
        }
    }

    /// All that is in a store.
    async fn everything(&self, store: Store) -> Vec<String> {
        match (store, &self.services.cluster) {
            (Store::S3, Some(cluster)) => {
                let store = S3::new(s3::settings(&cluster.s3_url, self.bucket)).unwrap();
                let bucket: job::Container = self.bucket.parse().unwrap();
                let own =
                    ["records", "outcomes", "checksums", "checkpoints", "cancels", "verified", "claims"];
                let mut found = Vec::new();
                for folder in own.map(Folder::own).into_iter().chain([Folder::from(&bucket)]) {
                    let listed = store.list(&folder, "").await.unwrap();
                    found.extend(
                        listed.into_iter().map(|listed| format!("{}/{}", folder.as_str(), listed.name)),
                    );
                }
                found
            }
            (Store::Rbd, Some(cluster)) => {
                let (images, objects) = (
                    cluster.ceph.rbd(&["ls", self.lane.pool]),
                    cluster.ceph.rados(&["-p", self.lane.pool, "ls"]),
                );
                let own = |name: &&str| name.starts_with(".backhaul/") || name.starts_with("backup.");
                images.lines().chain(objects.lines().filter(own)).map(Into::into).collect()
            }
            _ => self.stack.objects(),
        }
    }
}

/// By what Cinder sees that this backup is there.
fn seen_as(store: Store, record: &Record) -> String {
    match store {
        Store::Posix => format!("{}/{}_metadata", record.container.as_str(), record.service_metadata),
        Store::S3 => format!("{}_metadata", record.service_metadata),
        Store::Rbd => format!("backup.{}", record.backup_id),
    }
}

/// A new volume with something in it.
fn disk(services: &Services, stack: &Stack, rng: &mut Rng, number: usize) -> Disk {
    let bytes = rng.usize(1..512) * 4096;
    let (source, place) = match &services.cluster {
        Some(cluster) if number.is_multiple_of(3) => {
            let spec = cluster.ceph.image("volumes", 3 * bytes as u64).spec().to_owned();
            (format!("rbd:{spec}"), Place::Image { spec, bytes: vec![0; 3 * bytes] })
        }
        _ => {
            let name = format!("{number}.img");
            (
                stack.location(&name),
                Place::File(Volume::create(stack.volume(&name), bytes + rng.usize(..4096))),
            )
        }
    };
    let home = rng.choice(services.stores()).unwrap();
    let mut disk = Disk { id: VolumeId::random(), source: source.parse().unwrap(), place, home };
    disk.write(rng, services);
    disk
}

/// Waits until `is_so`; false if that takes too long.
async fn soon(mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}
