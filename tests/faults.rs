//! Faults as a table: each kind of job, broken at each place of its life, in each way. A job is run as workers run it, again
//! by another worker when the first one came to no end, and looked at then: that one outcome was told, that what is stored is
//! what it says, and that there is nothing else.
//!
//! `tests/interrupted.rs` breaks jobs at every call to the store, and `tests/life_model.rs` goes through the orders in which
//! two workers may do theirs. Real workers are killed, and real connections cut, in `tests/worker.rs`,
//! `tests/worker_rbd.rs` and `make chaos`.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use backhaul::engine::Engine;
use backhaul::error::Class;
use backhaul::event::{Error, EventSink};
use backhaul::job::{
    BackupId, Context, Event, Happening, Job, Location, Outcome, Parent, RecordState, VolumeId, Work,
};
use backhaul::runner::{self, Attempts, Ended, Every, Report};
use backhaul::store::ObjectStore;
use jiff::SignedDuration;
use rstest::rstest;
use rustix::io::Errno;
use tokio::sync::Notify;

use crate::support::engine::{Bench, Kind, MEMORY_BYTES, SETTINGS, backup_job_of, job, restore_job, run};
use crate::support::faulty::{Fault, Faulty};
use crate::support::volume::{Fill, Volume};

const NEVER: Every = Every::telling(Duration::from_secs(3600));
/// How often a job is run at most, until it has ended.
const RUNS_MAX: u32 = 4;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Full,
    Incremental,
    Restore,
    Verify,
    Delete,
}

/// Where it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    BeforeTheFirstWrite,
    InTheMiddle,
    AfterTheLastObject,
    AfterTheMetadata,
    AfterTheRecord,
    AtTheEvent,
    BeforeTheAck,
}

const PLACES: [Place; 7] = [
    Place::BeforeTheFirstWrite,
    Place::InTheMiddle,
    Place::AfterTheLastObject,
    Place::AfterTheMetadata,
    Place::AfterTheRecord,
    Place::AtTheEvent,
    Place::BeforeTheAck,
];

/// How it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// The process is killed.
    Killed,
    /// The connection is cut behind what was asked for.
    ConnectionCut,
    StoreError,
    DiskFull,
    WrongByte,
    /// Nothing comes back until another worker has been handed the job and has done it.
    Hang,
}

const HOW: [How; 6] =
    [How::Killed, How::ConnectionCut, How::StoreError, How::DiskFull, How::WrongByte, How::Hang];

impl Place {
    /// The call to the store that breaks, from 1, of those that a job makes which nothing happens to; none if it makes none
    /// there.
    fn call(self, action: Action, calls: &[String]) -> Option<usize> {
        let is_change = |call: &String| {
            ["put", "replace", "swap", "create", "delete"].iter().any(|word| call.starts_with(word))
        };
        let is_object = |call: &String| {
            let is_own = call.contains(".backhaul/") && !call.contains(".backhaul/digests/");
            !is_own
                && !["list", "tidy", "partials"].iter().any(|word| call.starts_with(word))
                && !call.ends_with("_metadata")
                && !call.ends_with("_sha256file")
        };
        let at: Vec<usize> = (0..calls.len()).filter(|at| is_object(&calls[*at])).collect();
        let call = match self {
            Self::BeforeTheFirstWrite if matches!(action, Action::Restore | Action::Verify) => 1,
            Self::BeforeTheFirstWrite => calls.iter().position(is_change)? + 1,
            Self::InTheMiddle => at.get(at.len() / 2)? + 1,
            Self::AfterTheLastObject => at.last()? + 2,
            Self::AfterTheMetadata => match calls.iter().rposition(|call| call.ends_with("_metadata")) {
                Some(at) => at + 2,
                None => behind_the_snapshot(action, calls)?,
            },
            Self::AfterTheRecord => calls.iter().rposition(|call| call.contains("/records/"))? + 2,
            Self::AtTheEvent | Self::BeforeTheAck => return None,
        };
        (call <= calls.len()).then_some(call)
    }
}

/// The call behind the making or the removal of a snapshot, which is what makes a backup in an image visible.
fn behind_the_snapshot(action: Action, calls: &[String]) -> Option<usize> {
    match action {
        // That the backup is there is written into its record, which is read before.
        Action::Full | Action::Incremental => {
            let at = calls.iter().rposition(|call| call.starts_with("swap .backhaul/records/"))?;
            assert!(calls[at - 1].starts_with("get .backhaul/records/"), "{calls:?}");
            Some(at)
        }
        Action::Delete => Some(calls.iter().position(|call| call.starts_with("list .backhaul/digests"))? + 1),
        // What they read of the image is the last that they read: that is behind the last object.
        Action::Restore | Action::Verify => None,
    }
}

/// Where events go; breaks at the end of a job.
struct Sink {
    told: Mutex<Vec<Outcome>>,
    how: Mutex<Option<How>>,
    broke: Notify,
    go_on: Notify,
}

impl Sink {
    fn new(how: Option<How>) -> Self {
        Self { told: Mutex::default(), how: Mutex::new(how), broke: Notify::new(), go_on: Notify::new() }
    }
}

#[async_trait]
impl EventSink for Sink {
    async fn send(&self, event: &Event) -> Result<(), Error> {
        let Happening::Ended(completion) = &event.happening else { return Ok(()) };
        let how = self.how.lock().unwrap().take();
        if how != Some(How::StoreError) {
            self.told.lock().unwrap().push(completion.outcome.clone());
        }
        match how {
            Some(How::Killed) => {
                self.broke.notify_one();
                std::future::pending().await
            }
            Some(How::ConnectionCut | How::StoreError) => {
                Err(Error { what: "ended", source: "the broker is gone".into() })
            }
            Some(How::Hang) => {
                self.broke.notify_one();
                self.go_on.notified().await;
                Ok(())
            }
            Some(How::DiskFull | How::WrongByte) | None => Ok(()),
        }
    }
}

/// A volume with a backup, a job, and workers for it on one store.
struct Scene {
    action: Action,
    bench: Arc<Bench>,
    /// An engine on a store, as another worker has it.
    engine_on: Box<dyn Fn(Arc<dyn ObjectStore>) -> Engine>,
    job: Job,
    /// The backup that the job is about, and what it is to hold.
    backup_id: BackupId,
    bytes: Vec<u8>,
    target: PathBuf,
    /// The names of the snapshots on each image that has one for each backup.
    snapshots: Box<dyn Fn() -> Vec<Vec<String>>>,
}

impl Scene {
    /// On a store in a folder.
    async fn chunked(action: Action) -> Self {
        let bench = Arc::new(Bench::new(Kind::Posix));
        let mut volume = Volume::create(bench.volumes().join("volume"), 9_000);
        volume.fill(0..9_000, Fill::Noise(1));
        volume.fill(4_096..6_144, Fill::Zeros);
        let source = Location::File(volume.path.clone());
        let engines = bench.clone();
        let engine_on = Box::new(move |store| engines.engine_on(store, SETTINGS, MEMORY_BYTES));
        let first = volume.bytes.clone();
        let change = || {
            volume.fill(500..3_000, Fill::Text(1));
            volume.fill(8_000..8_001, Fill::Noise(2));
            volume.bytes.clone()
        };
        Self::with(action, bench, engine_on, VolumeId::random(), source, first, change).await
    }

    /// Makes what is there before the job. `change` changes the volume, which has these `bytes`, and gives it back.
    async fn with(
        action: Action,
        bench: Arc<Bench>,
        engine_on: Box<dyn Fn(Arc<dyn ObjectStore>) -> Engine>,
        volume_id: VolumeId,
        source: Location,
        mut bytes: Vec<u8>,
        change: impl FnOnce() -> Vec<u8>,
    ) -> Self {
        let engine = engine_on(bench.store());
        let target = bench.volumes().join("target");
        let backup_of = |parent| backup_job_of(volume_id, source.clone(), parent);
        let mut job = backup_of(Parent::None);
        if action != Action::Full {
            run(&engine, &job).await.unwrap();
            bytes = change();
            job = backup_of(Parent::Latest);
        }
        if !matches!(action, Action::Full | Action::Incremental) {
            run(&engine, &job).await.unwrap();
        }
        let backup_id = job.backup_id();
        let job = match action {
            Action::Full | Action::Incremental => job,
            Action::Restore => restore_job(backup_id, &target),
            Action::Verify => self::job(Work::Verify(backup_id.into())),
            Action::Delete => self::job(Work::Delete(backup_id)),
        };
        Self { action, bench, engine_on, job, backup_id, bytes, target, snapshots: Box::new(Vec::new) }
    }

    fn engine(&self) -> Engine {
        (self.engine_on)(self.bench.store())
    }

    /// Runs the job once, and keeps of its end what a worker keeps.
    async fn run(&self, engine: &Engine, sink: &Sink, attempts: &Attempts) -> Ended {
        let ended = self.run_to_the_ack(engine, sink, attempts).await;
        if let Ended::Over(completion) = &ended {
            engine.catalog().keep_told(completion).await.unwrap();
        }
        ended
    }

    /// Runs the job once, until its end is told.
    async fn run_to_the_ack(&self, engine: &Engine, sink: &Sink, attempts: &Attempts) -> Ended {
        let (report, ctx) = (Report::new(sink, &self.job), Context::default());
        runner::run(&ctx, engine, &self.job, attempts, NEVER, &report).await
    }

    /// Runs the job until it has ended, each time with another worker.
    async fn run_to_the_end(&self, sink: &Sink, told: &str) -> Outcome {
        for current in 2..2 + RUNS_MAX {
            let attempts = Attempts { redelivered: true, ..attempt(current) };
            match self.run(&self.engine(), sink, &attempts).await {
                Ended::Over(completion) | Ended::OverBefore(completion) => return completion.outcome,
                Ended::Later(problem) => assert_eq!(problem.class, Class::Transient, "{told}: {problem}"),
                ended => panic!("{told}: {ended:?}"),
            }
        }
        panic!("{told}: it does not end")
    }

    /// Does as the error says: somebody makes room, and brings the job back.
    async fn run_after_it_failed(&self, told: &str) -> Outcome {
        let revived = Attempts { revival_count: 1, ..attempt(1) };
        match self.run(&self.engine(), &Sink::new(None), &revived).await {
            Ended::Over(completion) | Ended::OverBefore(completion) => completion.outcome,
            ended => panic!("{told}: {ended:?}"),
        }
    }

    /// Looks whether what is there is what was told, and nothing else.
    async fn check(&self, outcome: &Outcome, how: How, told: &str) {
        let engine = self.engine();
        let record = engine.catalog().record(self.backup_id).await;
        if how == How::WrongByte {
            return self.check_nobody_is_deceived(outcome, told).await;
        }
        assert_eq!(*outcome, Outcome::Succeeded, "{told}");
        let state = record.unwrap().map(|record| record.state);
        if self.action == Action::Delete {
            assert_eq!(state, None, "{told}");
        } else {
            assert_eq!(state, Some(RecordState::Available), "{told}");
            self.check_bytes(told).await;
        }
        self.check_nothing_else_is_there(told).await;
    }

    async fn check_nothing_else_is_there(&self, told: &str) {
        let engine = self.engine();
        if self.bench.is_files() {
            let found = engine.garbage(SignedDuration::ZERO).await.unwrap();
            assert!(found.problems.is_empty() && found.garbage.is_empty(), "{told}: {found:?}");
        }
        let records = engine.catalog().records().await.unwrap().records;
        for snapshots in (self.snapshots)() {
            assert_eq!(snapshots.len(), records.len(), "{told}: {snapshots:?}");
            for record in &records {
                let is_its = |name: &&String| name.contains(&record.backup_id.to_string());
                assert_eq!(snapshots.iter().filter(is_its).count(), 1, "{told}: {snapshots:?}");
            }
        }
        assert!(
            self.bench.volume_names().iter().all(|name| ["volume", "target"].contains(&&**name)),
            "{told}"
        );
    }

    /// The backup holds what the volume held, and so does the target, if there is one.
    async fn check_bytes(&self, told: &str) {
        if self.action != Action::Restore {
            run(&self.engine(), &restore_job(self.backup_id, &self.target)).await.expect(told);
        }
        assert!(fs::read(&self.target).unwrap() == self.bytes, "{told}: the bytes are others");
        fs::remove_file(&self.target).unwrap();
    }

    /// What has a wrong byte somewhere is right all the same, or it is said that it is not.
    async fn check_nobody_is_deceived(&self, outcome: &Outcome, told: &str) {
        let restored = self.target.exists();
        let is_right = || fs::read(&self.target).unwrap() == self.bytes;
        match (self.action, outcome) {
            (Action::Restore, Outcome::Succeeded) => assert!(is_right(), "{told}: restored wrong"),
            (Action::Restore, _) => assert!(!restored, "{told}: a file that is not whole is there"),
            _ => {}
        }
        if restored {
            fs::remove_file(&self.target).unwrap();
        }
        match run(&self.engine(), &restore_job(self.backup_id, &self.target)).await {
            Ok(_) => assert!(is_right(), "{told}: restored wrong later"),
            Err(error) => {
                let is_told = matches!(error.class(), Class::Permanent) && !error.to_string().is_empty();
                assert!(is_told, "{told}: {error:?}");
                assert!(!self.target.exists(), "{told}: a file that is not whole is there");
            }
        }
    }
}

fn attempt(current: u32) -> Attempts {
    Attempts { current, max: 2 + RUNS_MAX, seconds_max: 3600, ..Attempts::one() }
}

/// A row of the table: one action, broken at every place in every way. Returns how many fields it has.
async fn row<S: Future<Output = Scene>>(action: Action, scene: impl Fn(Action) -> S) -> usize {
    let calls = {
        let scene = scene(action).await;
        let counting = Faulty::counting(scene.bench.store());
        let engine = (scene.engine_on)(Arc::new(counting.clone()));
        let ended = scene.run(&engine, &Sink::new(None), &attempt(1)).await;
        assert!(matches!(ended, Ended::Over(_)), "{ended:?}");
        counting.names()
    };
    let mut fields = 0;
    for (place, how) in PLACES.into_iter().flat_map(|place| HOW.map(|how| (place, how))) {
        let told = format!("{action:?} {place:?} {how:?}");
        let scene = scene(action).await;
        let outcome = match (place, place.call(action, &calls)) {
            (_, Some(at)) => broken_at_a_call(&scene, at, how, &told).await,
            // The broker's room has no disk, and what it is told is not looked at.
            (Place::AtTheEvent, None) if !matches!(how, How::DiskFull | How::WrongByte) => {
                broken_at_the_event(&scene, how, &told).await
            }
            // Nor has an ack bytes.
            (Place::BeforeTheAck, None) if how != How::WrongByte => {
                broken_before_the_ack(&scene, how, &told).await
            }
            (_, None) => continue,
        };
        let outcome = match outcome {
            Outcome::Failed(problem) if how == How::DiskFull => {
                assert!(
                    problem.to_string().contains("free some space, then run the job again"),
                    "{told}: {problem}"
                );
                scene.run_after_it_failed(&told).await
            }
            outcome => outcome,
        };
        scene.check(&outcome, how, &told).await;
        fields += 1;
    }
    fields
}

async fn broken_at_a_call(scene: &Scene, at: usize, how: How, told: &str) -> Outcome {
    let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let fault = match how {
        How::Killed => Fault::Death,
        How::ConnectionCut => Fault::AnswerLost(Errno::CONNRESET),
        How::StoreError => Fault::Refused(Errno::IO),
        How::DiskFull => Fault::Refused(Errno::NOSPC),
        How::WrongByte => Fault::WrongByte,
        How::Hang => Fault::Pause(reached.clone(), go_on.clone()),
    };
    let faulty = Faulty::new(scene.bench.store(), at, fault);
    let engine = (scene.engine_on)(Arc::new(faulty.clone()));
    let (sink, first) = (Sink::new(None), attempt(1));
    let outcome = match how {
        How::Killed => {
            tokio::select! {
                ended = scene.run(&engine, &sink, &first) => panic!("{told}: {ended:?}"),
                () = faulty.died() => {}
            }
            drop(engine);
            scene.run_to_the_end(&sink, told).await
        }
        How::Hang => {
            let other = async {
                reached.notified().await;
                let again = Attempts { redelivered: true, ..attempt(2) };
                let ended = scene.run(&scene.engine(), &sink, &again).await;
                go_on.notify_one();
                ended
            };
            let (first, second) = tokio::join!(scene.run(&engine, &sink, &first), other);
            for ended in [first, second] {
                assert!(!matches!(ended, Ended::HandedBack | Ended::Untold(_)), "{told}: {ended:?}");
            }
            scene.run_to_the_end(&sink, told).await
        }
        _ => match scene.run(&engine, &sink, &first).await {
            Ended::Over(completion) | Ended::OverBefore(completion) => completion.outcome,
            Ended::Later(problem) => {
                assert_eq!(problem.class, Class::Transient, "{told}: {problem}");
                scene.run_to_the_end(&sink, told).await
            }
            ended => panic!("{told}: {ended:?}"),
        },
    };
    check_one_outcome(&sink, &outcome, told);
    outcome
}

async fn broken_at_the_event(scene: &Scene, how: How, told: &str) -> Outcome {
    let (sink, engine, first) = (Sink::new(Some(how)), scene.engine(), attempt(1));
    let outcome = match how {
        How::Hang => {
            let other = async {
                sink.broke.notified().await;
                let outcome = scene.run_to_the_end(&sink, told).await;
                sink.go_on.notify_one();
                outcome
            };
            let (first, outcome) = tokio::join!(scene.run(&engine, &sink, &first), other);
            assert!(matches!(first, Ended::Over(_)), "{told}: {first:?}");
            outcome
        }
        _ => {
            tokio::select! {
                ended = scene.run(&engine, &sink, &first) => {
                    assert!(matches!(ended, Ended::Untold(_)), "{told}: {ended:?}");
                }
                () = sink.broke.notified() => {}
            }
            scene.run_to_the_end(&sink, told).await
        }
    };
    check_one_outcome(&sink, &outcome, told);
    outcome
}

/// All is told, and only the broker does not know that. What a worker keeps of the end is written behind the ack, or behind what
/// it does not know to have failed.
async fn broken_before_the_ack(scene: &Scene, how: How, told: &str) -> Outcome {
    let (sink, engine) = (Sink::new(None), scene.engine());
    let ended = scene.run_to_the_ack(&engine, &sink, &attempt(1)).await;
    let Ended::Over(completion) = ended else { panic!("{told}: {ended:?}") };
    let keep_refused = async |errno| {
        let faulty = Faulty::new(scene.bench.store(), 2, Fault::Refused(errno));
        let engine = (scene.engine_on)(Arc::new(faulty.clone()));
        engine.catalog().keep_told(&completion).await.expect_err(told);
        assert!(faulty.broke_at().contains("outcomes/"), "{told}: {}", faulty.broke_at());
    };
    match how {
        How::Killed | How::Hang | How::WrongByte => {}
        How::ConnectionCut => engine.catalog().keep_told(&completion).await.unwrap(),
        How::StoreError => keep_refused(Errno::IO).await,
        How::DiskFull => keep_refused(Errno::NOSPC).await,
    }
    let outcome = scene.run_to_the_end(&sink, told).await;
    if how == How::Hang {
        // Now the first one hears that its ack has come to nothing.
        engine.catalog().keep_told(&completion).await.unwrap();
        assert_eq!(scene.run_to_the_end(&sink, told).await, outcome, "{told}");
    }
    // Unless that is kept, nobody knows that it was told.
    let told_again = usize::from(how != How::ConnectionCut);
    assert_eq!(sink.told.lock().unwrap().len(), 1 + told_again, "{told}");
    check_one_outcome(&sink, &outcome, told);
    outcome
}

/// The end may be told more than once, but not two ends.
fn check_one_outcome(sink: &Sink, outcome: &Outcome, told: &str) {
    let outcomes = sink.told.lock().unwrap();
    assert!(!outcomes.is_empty() && outcomes.iter().all(|it| it == outcome), "{told}: {outcomes:?}");
}

#[rstest]
#[case::full(Action::Full, 39)]
#[case::incremental(Action::Incremental, 39)]
#[case::restore(Action::Restore, 39)]
#[case::verify(Action::Verify, 39)]
#[case::delete(Action::Delete, 39)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_and_however_a_job_of_objects_breaks_it_ends_once_as_it_was_told(
    #[case] action: Action,
    #[case] fields: usize,
) {
    assert_eq!(row(action, Scene::chunked).await, fields);
}

#[cfg(feature = "ceph")]
mod clusters {
    use backhaul::ceph::{Access, Clusters};
    use backhaul::engine::chunked::Budget;
    use backhaul::engine::rbd::{self, Rbd};
    use backhaul::engine::{Cpu, Volumes};
    use backhaul::volume::FileRoots;

    use super::*;
    use crate::support::ceph::Ceph;
    use crate::support::stack::noise;

    const MIB: usize = 1 << 20;

    impl Scene {
        /// Of an image, in a pool of the shared cluster.
        async fn rbd(action: Action) -> Self {
            let (ceph, bench) = (Ceph::shared(), Arc::new(Bench::new(Kind::Memory)));
            // Little of it is data: each field of the table leaves its images in the cluster.
            let mut bytes = vec![0; 9 * MIB];
            bytes[..MIB].copy_from_slice(&noise(1, MIB));
            bytes[8 * MIB..8 * MIB + MIB / 2].copy_from_slice(&noise(2, MIB / 2));
            let image = ceph.image("volumes", bytes.len() as u64);
            image.write(&[(0, &bytes[..MIB]), (8 * MIB as u64, &bytes[8 * MIB..8 * MIB + MIB / 2])]);
            let volume_id = image.spec().strip_prefix("volumes/volume-").unwrap().parse().unwrap();
            let source = format!("rbd:{}", image.spec()).parse().unwrap();
            let access =
                Access { conf: ceph.conf().into(), user: "cinder".into(), operation_seconds_max: 30 };
            let file_roots = FileRoots::new(&[bench.volumes()]);
            let engine_on = Box::new(move |store| {
                // Each worker is a client of its own.
                let clusters = Clusters::new([("main".into(), access.clone())].into());
                let settings = rbd::Settings {
                    cluster: Some("main".into()),
                    pool: "backups".into(),
                    source_snapshots_max: 0,
                    journaling: false,
                    stripes: None,
                    checkpoint_bytes: MIB as u64,
                };
                let (cpu, memory) = (Cpu::start(2).unwrap(), Budget::new(MEMORY_BYTES));
                let rbd = Rbd::new(store, clusters.clone(), settings, cpu, memory);
                Engine::new(rbd, Volumes { file_roots: file_roots.clone(), clusters })
            });
            let first = bytes.clone();
            let change = || {
                let piece = noise(3, MIB / 4);
                image.write(&[(3 * MIB as u64, &piece)]);
                bytes[3 * MIB..3 * MIB + MIB / 4].copy_from_slice(&piece);
                bytes
            };
            let mut scene = Self::with(action, bench, engine_on, volume_id, source, first, change).await;
            let volume = image.spec().to_owned();
            scene.snapshots = Box::new(move || {
                let ceph = Ceph::shared();
                let backups = ceph.rbd(&["ls", "backups"]);
                let of_volume = |name: &&str| name.contains(volume.trim_start_matches("volumes/"));
                let backups = backups.lines().filter(of_volume).map(|name| format!("backups/{name}"));
                let names = |spec: String| {
                    let listed = ceph.rbd(&["snap", "ls", "--all", "--format", "json", &spec]);
                    let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
                    listed.iter().map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect()
                };
                [volume.clone()].into_iter().chain(backups).map(names).collect()
            });
            scene
        }
    }

    #[rstest]
    #[case::full(Action::Full, 39)]
    #[case::incremental(Action::Incremental, 39)]
    #[case::restore(Action::Restore, 33)]
    #[case::verify(Action::Verify, 33)]
    #[case::delete(Action::Delete, 39)]
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn wherever_and_however_a_job_of_images_breaks_it_ends_once_as_it_was_told(
        #[case] action: Action,
        #[case] fields: usize,
    ) {
        assert_eq!(row(action, Scene::rbd).await, fields);
    }
}
