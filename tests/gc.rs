//! What jobs that died leave in a store is found and removed, and nothing else.
//!
//! `PROPTEST_CASES` sets the number of cases of each test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use backhaul::engine::{Begun, Cpu, Engine, Error, Garbage, KEPT, Kind as Of, Receipt};
use backhaul::error::{Class, Problem};
use backhaul::job::{BackupId, Container, Context, Job, JobId, Parent, Record, RecordState, VolumeId, Work};
use backhaul::store::{Folder, ObjectName};
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use rstest::rstest;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use crate::support::engine::{
    Bench, Kind, MEMORY_BYTES, SETTINGS, backup, backup_job, conclude_delete, delete, job, overwrite,
    paths_of, restore, run, run_in, runtime, verify,
};
use crate::support::faulty::{Fault, Faulty};
use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, noise, until};
use crate::support::volume::{Fill, Volume};

/// Cases of a test whose number is not set from outside.
const POSIX_CASES: u32 = 60;
const MEMORY_CASES: u32 = 250;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(runtime);
static CPU: LazyLock<Cpu> = LazyLock::new(|| Cpu::start(2).unwrap());

fn config(cases: u32) -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { ProptestConfig { cases, ..config } }
}

const ANY_AGE: SignedDuration = SignedDuration::ZERO;
const DAY: SignedDuration = SignedDuration::from_hours(24);

proptest! {
    #![proptest_config(config(POSIX_CASES))]

    #[test]
    fn wherever_jobs_die_in_files_all_that_is_not_a_whole_backup_goes_and_nothing_else(steps in steps()) {
        RUNTIME.block_on(play(Kind::Posix, steps));
    }
}

proptest! {
    #![proptest_config(config(MEMORY_CASES))]

    #[test]
    fn wherever_jobs_die_in_memory_all_that_is_not_a_whole_backup_goes_and_nothing_else(steps in steps()) {
        RUNTIME.block_on(play(Kind::Memory, steps));
    }
}

/// Something that is done, and dies at one of its calls to the store if it has so many.
#[derive(Debug, Clone)]
struct Step {
    what: What,
    which: Index,
    dies_at: usize,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Write,
    Backup { incremental: bool, shared: bool },
    Again,
    GiveUp,
    Cancel,
    Delete,
    Verify,
    Gc,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let what = prop_oneof![
        1 => Just(What::Write),
        4 => (any::<bool>(), any::<bool>()).prop_map(|(incremental, shared)| What::Backup { incremental, shared }),
        4 => Just(What::Again),
        1 => Just(What::GiveUp),
        2 => Just(What::Cancel),
        3 => Just(What::Delete),
        1 => Just(What::Verify),
        1 => Just(What::Gc),
    ];
    let dies_at = prop_oneof![3 => 1..40usize, 1 => Just(usize::MAX)];
    let step =
        (what, any::<Index>(), dies_at).prop_map(|(what, which, dies_at)| Step { what, which, dies_at });
    vec(step, 1..16)
}

/// A volume, and jobs that back it up.
struct Scene {
    bench: Bench,
    volume: Volume,
    volume_id: VolumeId,
    jobs: Vec<Job>,
    /// What each backup is to hold, if it is whole.
    expected: BTreeMap<BackupId, Vec<u8>>,
    /// What others have put into the store.
    foreign: BTreeSet<String>,
}

impl Scene {
    async fn new(kind: Kind) -> Self {
        let bench = Bench::with_cpu(kind, CPU.clone());
        let mut volume = Volume::create(bench.volumes().join("volume"), 9_000);
        volume.fill(0..9_000, Fill::Noise(1));
        volume.fill(4_096..6_144, Fill::Zeros);
        let volume_id = VolumeId::random();
        let (jobs, expected) = (Vec::new(), BTreeMap::new());
        let mut scene = Self { bench, volume, volume_id, jobs, expected, foreign: BTreeSet::new() };
        scene.add_foreign().await;
        scene
    }

    /// Two backups of Cinder's of the same volume, one whole and one that is being made, and what is of nobody.
    async fn add_foreign(&mut self) {
        let cinders = |id: BackupId| format!("volume_{}_20200102030405_backup_{id}", self.volume_id);
        let (whole, begun) = (cinders(BackupId::random()), cinders(BackupId::random()));
        let names = [
            format!("{whole}-00001"),
            format!("{whole}_sha256file"),
            format!("{whole}_metadata"),
            format!("{begun}-00001"),
            format!("{begun}-00002"),
            format!("volume_{}_notes-00001", self.volume_id),
            "notes.txt".into(),
        ];
        let shared = Folder::from(&shared());
        for name in names {
            let object = shared.object(&name).unwrap();
            self.bench.store().put(&object, Bytes::from(name)).await.unwrap();
            self.foreign.insert(object.to_string());
        }
        if self.is_files() {
            for name in [".tmp.notes", ".tmp.notes.txt", ".hidden"] {
                fs::write(self.bench.root().join("shared").join(name), name).unwrap();
                self.foreign.insert(format!("shared/{name}"));
            }
        }
    }

    fn is_files(&self) -> bool {
        self.bench.is_files()
    }

    fn engine(&self) -> Engine {
        self.bench.engine(SETTINGS)
    }

    fn faulty_engine(&self, at: usize, fault: Fault) -> (Faulty, Engine) {
        let faulty = Faulty::new(self.bench.store(), at, fault);
        let engine = self.bench.engine_on(Arc::new(faulty.clone()), SETTINGS, MEMORY_BYTES);
        (faulty, engine)
    }

    fn new_job(&mut self, incremental: bool, is_shared: bool) -> Job {
        let parent = if incremental { Parent::Latest } else { Parent::None };
        let mut job = backup_job(self.volume_id, &self.volume.path, parent);
        if let (Work::Backup(work), true) = (&mut job.work, is_shared) {
            work.container = Some(shared());
        }
        self.jobs.push(job.clone());
        job
    }

    async fn record(&self, id: BackupId) -> Option<Record> {
        self.engine().catalog().record(id).await.unwrap()
    }

    /// Does the step, which may die.
    async fn play(&mut self, step: &Step) {
        let (faulty, engine) = self.faulty_engine(step.dies_at, Fault::Death);
        let some_job = (!self.jobs.is_empty()).then(|| step.which.get(&self.jobs).clone());
        let job = match (step.what, some_job) {
            (What::Write, _) => {
                let at = step.which.index(8_000);
                return self.volume.fill(at..at + 900, Fill::Noise(at as u64));
            }
            (What::Backup { incremental, shared }, _) => self.new_job(incremental, shared),
            (_, None) => return,
            (_, Some(job)) => job,
        };
        let id = job.backup_id();
        let work = async {
            match step.what {
                What::Write => {}
                // It may not be possible, as without a parent.
                What::Backup { .. } => drop(run(&engine, &job).await),
                What::Again => drop(run_again(&engine, &job).await),
                What::GiveUp => drop(engine.abandon(&job, Some(&a_problem())).await.unwrap()),
                What::Cancel => drop(engine.abandon(&job, None).await.unwrap()),
                What::Delete => drop(delete(&engine, id).await),
                What::Verify => drop(verify(&engine, id).await),
                What::Gc => drop(sweep(&engine, ANY_AGE).await),
            }
        };
        let is_whole = self.record(id).await.is_some_and(|record| record.state == RecordState::Available);
        if !is_whole {
            self.expected.insert(id, self.volume.bytes.clone());
        }
        tokio::select! {
            () = work => {}
            () = faulty.died() => {}
        }
    }

    async fn everything(&self) -> BTreeSet<String> {
        let own = self.jobs.iter().map(|job| job.backup_id().to_string());
        let own = own.map(|id| format!("{}/{}/{id}", &id[..2], &id[2..4]).parse::<Container>().unwrap());
        let containers: Vec<Container> = own.chain([shared()]).collect();
        self.bench.everything(&containers).await
    }

    /// The records of backups that claimed jobs make or delete.
    async fn held(&self) -> Vec<Record> {
        let (engine, mut held) = (self.engine(), Vec::new());
        for record in engine.catalog().records().await.unwrap().records {
            if let RecordState::Creating(id) | RecordState::Deleting(id) = record.state
                && engine.catalog().is_claimed(id).await.unwrap()
            {
                held.push(record);
            }
        }
        held
    }

    /// All whole backups are what they were, what is of others is there, and there is nothing else.
    async fn check_clean(&self, told: &str) {
        let listing = self.engine().catalog().records().await.unwrap();
        let mut expected = self.foreign.clone();
        for record in &listing.records {
            match &record.state {
                RecordState::Available => {
                    expected.extend(paths_of(record, record.counts.object_count));
                    let target = self.bench.volumes().join("target");
                    restore(&self.engine(), record.backup_id, &target).await.expect(told);
                    assert!(fs::read(&target).unwrap() == self.expected[&record.backup_id], "{told}");
                    fs::remove_file(&target).unwrap();
                }
                RecordState::Error(_) => {
                    expected.insert(format!(".backhaul/records/{}.json", record.backup_id));
                }
                state => panic!("{told}: {} is {state:?}", record.backup_id),
            }
        }
        let everything = self.everything().await;
        // How a job ended that nobody was told of stays until somebody is.
        let is_untold = |path: &&String| path.starts_with(".backhaul/outcomes/");
        expected.extend(everything.iter().filter(is_untold).cloned());
        assert_eq!(everything, expected, "{told}");
        for path in self.foreign.iter().filter(|_| self.is_files()) {
            let name = path.strip_prefix("shared/").unwrap();
            assert_eq!(fs::read_to_string(self.bench.root().join(path)).unwrap(), name, "{told}");
        }
    }
}

async fn play(kind: Kind, steps: Vec<Step>) {
    let mut scene = Scene::new(kind).await;
    for step in &steps {
        scene.play(step).await;
    }
    let whole_before = whole(&scene.engine()).await;
    let (held, before) = (scene.held().await, scene.everything().await);

    let garbage = sweep(&scene.engine(), ANY_AGE).await;

    let (told, after) = (format!("{garbage:#?}"), scene.everything().await);
    assert_eq!(scene.held().await, held, "{told}");
    let is_held = |path: &&String| held.iter().any(|record| path.contains(record.service_metadata.as_str()));
    let lost: Vec<_> = before.difference(&after).filter(is_held).collect();
    assert!(lost.is_empty(), "{lost:?}: {told}");

    scene.engine().catalog().sweep(Timestamp::now()).await.unwrap();
    let garbage = sweep(&scene.engine(), ANY_AGE).await;

    let told = format!("{told}, then {garbage:#?}");
    assert_eq!(whole(&scene.engine()).await, whole_before, "{told}");
    scene.check_clean(&told).await;
    assert_eq!(found(&scene.engine(), ANY_AGE).await, [], "{told}");
}

fn shared() -> Container {
    "shared".parse().unwrap()
}

fn a_problem() -> Problem {
    Problem { class: Class::Permanent, message: "it did not work".into(), causes: Vec::new() }
}

async fn whole(engine: &Engine) -> Vec<Record> {
    let records = engine.catalog().records().await.unwrap().records;
    records.into_iter().filter(|record| record.state == RecordState::Available).collect()
}

async fn found(engine: &Engine, older_than: SignedDuration) -> Vec<Garbage> {
    let found = engine.garbage(older_than).await.unwrap();
    assert!(found.problems.is_empty(), "{:?}", found.problems);
    found.garbage
}

/// Removes all that is found, and says what it was.
async fn sweep(engine: &Engine, older_than: SignedDuration) -> Vec<Garbage> {
    let garbage = found(engine, older_than).await;
    for garbage in &garbage {
        // One may have gone with another.
        engine.remove_garbage(garbage).await.unwrap();
    }
    garbage
}

fn kinds(garbage: &[Garbage]) -> Vec<Of> {
    garbage.iter().map(|garbage| garbage.kind).collect()
}

/// Runs a job as a worker that is handed its message once more.
async fn run_again(engine: &Engine, job: &Job) -> Result<Option<Receipt>, Error> {
    match engine.catalog().begin(job.id, 0, true, true).await? {
        Begun::Held { hold, .. } => {
            run_in(&Context { hold, ..Context::default() }, engine, job).await.map(Some)
        }
        Begun::Over(_) => Ok(None),
        Begun::Claimed => panic!("it is this run's to claim"),
    }
}

/// Runs the job until it dies, which it must.
async fn die(faulty: &Faulty, engine: &Engine, job: &Job) {
    tokio::select! {
        result = run(engine, job) => panic!("it did not die: {result:?}"),
        () = faulty.died() => {}
    }
}

async fn calls(scene: &Scene, job: &Job) -> usize {
    let (faulty, engine) = scene.faulty_engine(usize::MAX, Fault::Death);
    run(&engine, job).await.unwrap();
    delete(&scene.engine(), job.backup_id()).await.unwrap();
    faulty.calls()
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_call_a_backup_dies_at_it_leaves_nothing_and_its_job_may_come_again(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(false, true)] is_second_attempt: bool,
) {
    let mut scene = Scene::new(kind).await;
    let first = scene.new_job(false, true);
    let calls = calls(&scene, &first).await;

    for at in 1..=calls {
        let job = scene.new_job(false, true);
        scene.expected.insert(job.backup_id(), scene.volume.bytes.clone());
        if is_second_attempt {
            let (faulty, engine) = scene.faulty_engine(at.max(4), Fault::Death);
            die(&faulty, &engine, &job).await;
        }
        let (faulty, engine) = scene.faulty_engine(at, Fault::Death);
        die(&faulty, &engine, &job).await;
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());

        let garbage = sweep(&scene.engine(), ANY_AGE).await;
        scene.check_clean(&format!("{told}: {garbage:?}")).await;

        run(&scene.engine(), &job).await.expect(&told);
        scene.check_clean(&told).await;
        delete(&scene.engine(), job.backup_id()).await.unwrap();
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_call_a_delete_dies_at_its_backup_is_gone_or_whole(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(false, true)] has_child: bool,
) {
    let mut scene = Scene::new(kind).await;
    for at in 1.. {
        let make = scene.new_job(false, true);
        scene.expected.insert(make.backup_id(), scene.volume.bytes.clone());
        run(&scene.engine(), &make).await.unwrap();
        let child = scene.new_job(true, true);
        if has_child {
            scene.expected.insert(child.backup_id(), scene.volume.bytes.clone());
            run(&scene.engine(), &child).await.unwrap();
        }
        let (faulty, engine) = scene.faulty_engine(at, Fault::Death);
        let remove = job(Work::Delete(make.backup_id()));
        let work = async {
            let removed = run(&engine, &remove).await;
            if removed.is_ok() {
                conclude_delete(&engine, &remove).await;
            }
        };
        let died = tokio::select! {
            () = work => false,
            () = faulty.died() => true,
        };
        let told = format!("call {at}, {}", faulty.broke_at());

        sweep(&scene.engine(), ANY_AGE).await;

        scene.check_clean(&told).await;
        if has_child {
            assert!(scene.record(make.backup_id()).await.is_some(), "{told}");
            delete(&scene.engine(), child.backup_id()).await.unwrap();
            delete(&scene.engine(), make.backup_id()).await.unwrap();
        } else if scene.record(make.backup_id()).await.is_some() {
            delete(&scene.engine(), make.backup_id()).await.unwrap();
        }
        if !died {
            assert!(at > 3, "{told}");
            return;
        }
    }
}

/// A backup that has died somewhere in the middle.
async fn with_dead_backup(kind: Kind) -> (Scene, Job) {
    let mut scene = Scene::new(kind).await;
    let first = scene.new_job(false, true);
    let calls = calls(&scene, &first).await;
    let job = scene.new_job(false, true);
    scene.expected.insert(job.backup_id(), scene.volume.bytes.clone());
    let (faulty, engine) = scene.faulty_engine(calls - 4, Fault::Death);
    die(&faulty, &engine, &job).await;
    (scene, job)
}

/// A removal that stops at each of its calls, while the job is done by somebody else.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_comes_while_what_it_has_left_is_removed_loses_nothing(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(false, true)] claims: bool,
) {
    let come = async |scene: &Scene, job: &Job| match claims {
        true => run_again(&scene.engine(), job).await.map(drop),
        false => run(&scene.engine(), job).await.map(drop),
    };
    let mut put_off = 0;
    for at in 1.. {
        let (scene, job) = with_dead_backup(kind).await;
        let garbage = found(&scene.engine(), ANY_AGE).await;
        assert_eq!(kinds(&garbage), [Of::Backup]);
        let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (faulty, engine) = scene.faulty_engine(at, Fault::Pause(reached.clone(), go_on.clone()));
        let remove = tokio::spawn(async move { engine.remove_garbage(&garbage[0]).await });
        tokio::pin!(remove);
        let removed = tokio::select! {
            removed = &mut remove => Some(removed),
            () = reached.notified() => None,
        };
        if let Some(removed) = removed {
            assert!(removed.unwrap().unwrap());
            assert!(put_off > 0 && at > 8, "{at}");
            return scene.check_clean("nobody came").await;
        }
        let told = format!("call {at}, {}", faulty.broke_at());

        let done = come(&scene, &job).await;
        go_on.notify_one();
        remove.await.unwrap().expect(&told);

        match done {
            Ok(()) => {
                let record = scene.record(job.backup_id()).await.expect(&told);
                assert_eq!(record.state, RecordState::Available, "{told}");
                scene.check_clean(&told).await;
            }
            // It was too late to go on, and is not lost.
            Err(Error::BackupExists(_)) => {
                put_off += 1;
                scene.check_clean(&told).await;
                come(&scene, &job).await.expect(&told);
                scene.check_clean(&told).await;
            }
            Err(error) => panic!("{told}: {error}"),
        }
    }
}

/// A whole backup.
async fn with_backup(kind: Kind) -> (Scene, Record) {
    let mut scene = Scene::new(kind).await;
    let job = scene.new_job(false, true);
    scene.expected.insert(job.backup_id(), scene.volume.bytes.clone());
    run(&scene.engine(), &job).await.unwrap();
    let record = scene.record(job.backup_id()).await.unwrap();
    (scene, record)
}

async fn mark_as_deleted_by(job_id: JobId, engine: &Engine, record: &Record) {
    overwrite(engine, &Record { state: RecordState::Deleting(job_id), ..record.clone() }).await;
}

/// The same, of a delete.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_that_comes_while_it_is_done_to_its_end_removes_the_backup_or_finds_it_gone(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
) {
    for at in 1.. {
        let (scene, record) = with_backup(kind).await;
        let remove = job(Work::Delete(record.backup_id));
        mark_as_deleted_by(remove.id, &scene.engine(), &record).await;
        let garbage = found(&scene.engine(), ANY_AGE).await;
        assert_eq!(kinds(&garbage), [Of::Delete]);
        let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (faulty, engine) = scene.faulty_engine(at, Fault::Pause(reached.clone(), go_on.clone()));
        let removal = tokio::spawn(async move { engine.remove_garbage(&garbage[0]).await });
        tokio::pin!(removal);
        let removed = tokio::select! {
            removed = &mut removal => Some(removed),
            () = reached.notified() => None,
        };
        if let Some(removed) = removed {
            assert!(removed.unwrap().unwrap());
            assert!(at > 8, "{at}");
            return scene.check_clean("nobody came").await;
        }
        let told = format!("call {at}, {}", faulty.broke_at());

        match run(&scene.engine(), &remove).await {
            Ok(_) => conclude_delete(&scene.engine(), &remove).await,
            Err(error) => assert!(matches!(error, Error::UnknownBackup(_)), "{told}: {error}"),
        }
        go_on.notify_one();
        removal.await.unwrap().expect(&told);

        assert_eq!(scene.record(record.backup_id).await, None, "{told}");
        scene.check_clean(&told).await;
    }
}

/// Two workers that were at it may have ended at any moment.
#[tokio::test]
async fn a_backup_that_another_builds_on_stays_and_is_whole_again_though_its_delete_was_begun() {
    let (mut scene, record) = with_backup(Kind::Posix).await;
    let child = scene.new_job(true, true);
    scene.expected.insert(child.backup_id(), scene.volume.bytes.clone());
    run(&scene.engine(), &child).await.unwrap();
    let engine = scene.engine();
    mark_as_deleted_by(JobId::random(), &engine, &record).await;
    let garbage = found(&engine, ANY_AGE).await;
    assert_eq!(kinds(&garbage), [Of::Delete]);

    let error = engine.remove_garbage(&garbage[0]).await.unwrap_err();

    assert!(matches!(error, Error::HasChildren { .. }), "{error}");
    assert_eq!(scene.record(record.backup_id).await, Some(record));
    scene.check_clean("it has a child").await;
}

#[tokio::test]
async fn a_backup_that_has_become_whole_since_its_delete_was_begun_stays() {
    let (scene, record) = with_backup(Kind::Posix).await;
    let engine = scene.engine();
    mark_as_deleted_by(JobId::random(), &engine, &record).await;
    let garbage = found(&engine, ANY_AGE).await;
    assert_eq!(kinds(&garbage), [Of::Delete]);

    overwrite(&engine, &record).await;

    assert!(!engine.remove_garbage(&garbage[0]).await.unwrap());
    scene.check_clean("it is whole").await;
}

fn claim_of(job_id: JobId) -> ObjectName {
    Folder::own("outcomes").object(&format!("{job_id}.json")).unwrap()
}

/// Has the claim of a job be so old.
async fn make_claim_older(scene: &Scene, job_id: JobId, by: SignedDuration) {
    let store = scene.bench.store();
    let mut claim: Value = serde_json::from_slice(&scene.bench.read(&claim_of(job_id)).await).unwrap();
    claim["content"]["claimed"]["at"] = json!(Timestamp::now() - by);
    claim["sha256"] = json!(hex::encode(Sha256::digest(claim["content"].to_string())));
    store.replace(&claim_of(job_id), claim.to_string().into()).await.unwrap();
}

#[tokio::test]
async fn what_is_of_a_job_that_was_claimed_stays_until_it_has_ended_or_its_claim_is_seven_days_old() {
    let (scene, job) = with_dead_backup(Kind::Posix).await;
    let engine = scene.engine();
    let garbage = found(&engine, ANY_AGE).await;
    assert_eq!(kinds(&garbage), [Of::Backup]);
    let half = format!(".tmp.{}.json.{}", job.id, "0123456789abcdef0123456789abcdef");
    let claimed = engine.catalog().begin(job.id, 0, true, true).await.unwrap();
    assert!(matches!(claimed, Begun::Held { .. }));
    fs::write(scene.bench.root().join(".backhaul/outcomes").join(half), "half").unwrap();
    let before = scene.everything().await;

    assert_eq!(found(&engine, ANY_AGE).await, []);
    assert!(!engine.remove_garbage(&garbage[0]).await.unwrap(), "it was found before it was claimed");
    make_claim_older(&scene, job.id, KEPT - DAY).await;
    assert_eq!(found(&engine, ANY_AGE).await, []);
    assert_eq!(scene.everything().await, before);

    make_claim_older(&scene, job.id, KEPT + DAY).await;
    let garbage = sweep(&engine, ANY_AGE).await;
    assert_eq!(kinds(&garbage), [Of::Backup, Of::Partial]);
    assert_eq!(garbage[1].job_id, Some(job.id));
    // The claim itself is for workers to remove.
    assert!(scene.everything().await.contains(&format!(".backhaul/outcomes/{}.json", job.id)));
    scene.check_clean("the claim was old").await;
}

#[tokio::test]
async fn of_a_job_whose_claim_is_damaged_nothing_goes() {
    let (scene, job) = with_dead_backup(Kind::Posix).await;
    let before = scene.record(job.backup_id()).await;
    scene.bench.store().replace(&claim_of(job.id), Bytes::from_static(b"damaged")).await.unwrap();

    let found = scene.engine().garbage(ANY_AGE).await.unwrap();

    assert_eq!(found.garbage, []);
    assert!(matches!(found.problems[..], [Error::DamagedRecord { .. }]), "{:?}", found.problems);
    assert_eq!(scene.record(job.backup_id()).await, before);
}

/// Makes all files in a folder so old.
fn make_older(folder: &Path, by: Duration) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            make_older(&path, by);
        } else {
            File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now() - by).unwrap();
        }
    }
}

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn what_was_written_lately_is_left_alone_and_so_is_all_that_is_of_the_same_backup() {
    let (scene, job) = with_dead_backup(Kind::Posix).await;
    let engine = scene.engine();
    let record = scene.record(job.backup_id()).await.unwrap();
    // What workers remove is not for us.
    let cancelled = JobId::random();
    engine.catalog().cancel(cancelled, Timestamp::now()).await.unwrap();
    let temporary = format!(".tmp.{}.json.{}", BackupId::random(), "0123456789abcdef0123456789abcdef");
    fs::write(scene.bench.root().join(".backhaul/records").join(temporary), "half").unwrap();

    assert_eq!(found(&engine, DAY).await, []);
    make_older(scene.bench.root(), 23 * HOUR);
    assert_eq!(found(&engine, DAY).await, []);

    make_older(scene.bench.root(), 25 * HOUR);
    assert_eq!(kinds(&found(&engine, DAY).await), [Of::Backup, Of::Partial]);
    // The worker is slow, and not dead.
    let last = scene.bench.root().join(format!("shared/{}-00002", record.service_metadata));
    File::options().write(true).open(&last).unwrap().set_modified(SystemTime::now() - HOUR).unwrap();
    assert_eq!(kinds(&found(&engine, DAY).await), [Of::Partial]);
    let temporary =
        fs::read_dir(scene.bench.root().join("shared")).unwrap().map(|entry| entry.unwrap().path());
    let temporary = temporary.filter(|path| path.to_str().unwrap().contains("/.tmp.volume_")).last().unwrap();
    make_older(scene.bench.root(), 25 * HOUR);
    File::options().append(true).open(&temporary).unwrap().set_modified(SystemTime::now()).unwrap();
    assert_eq!(kinds(&found(&engine, DAY).await), [Of::Partial]);

    make_older(scene.bench.root(), 8 * 24 * HOUR);
    assert_eq!(kinds(&sweep(&engine, DAY).await), [Of::Backup, Of::Partial]);
    assert!(engine.catalog().cancelled_at(cancelled).await.unwrap().is_some());
    engine.catalog().forget_cancel(cancelled).await.unwrap();
    scene.check_clean("all is old").await;
}

#[tokio::test]
async fn a_backup_whose_record_is_lost_or_damaged_is_left_alone() {
    for damaged in [false, true] {
        let mut scene = Scene::new(Kind::Posix).await;
        let engine = scene.engine();
        let record = backup(&engine, scene.volume_id, &scene.volume.path, Parent::None).await.unwrap();
        verify(&engine, record.backup_id).await.unwrap();
        let file = scene.bench.root().join(format!(".backhaul/records/{}.json", record.backup_id));
        if damaged {
            fs::write(&file, "damaged").unwrap()
        } else {
            fs::remove_file(&file).unwrap()
        }
        scene.foreign.extend(paths_of(&record, record.counts.object_count));

        let found = engine.garbage(ANY_AGE).await.unwrap();
        for garbage in &found.garbage {
            engine.remove_garbage(garbage).await.unwrap();
        }

        assert_eq!(found.problems.len(), usize::from(damaged));
        // That nobody can say of what it was verified is of no use.
        assert_eq!(kinds(&found.garbage), if damaged { vec![] } else { vec![Of::Mark] });
        if !damaged {
            scene.foreign.remove(&format!(".backhaul/records/{}.json", record.backup_id));
        }
        assert_eq!(scene.everything().await, scene.foreign);
    }
}

/// What an attempt leaves that was cut off, if its job is cancelled and then it dies: nothing tells of it but its own lists.
#[tokio::test]
async fn an_attempt_of_which_no_record_is_left_is_known_by_its_own_list() {
    let (scene, job) = with_dead_backup(Kind::Posix).await;
    let record = scene.bench.root().join(format!(".backhaul/records/{}.json", job.backup_id()));
    fs::remove_file(record).unwrap();
    let in_shared = found(&scene.engine(), ANY_AGE).await;
    // Where its data is nobody knows, so only the list of checksums and a note of what was stored are found.
    assert_eq!((kinds(&in_shared), in_shared[0].object_count), (vec![Of::Attempt], 2));

    let mut scene = Scene::new(Kind::Posix).await;
    let job = scene.new_job(false, false);
    let (faulty, engine) = scene.faulty_engine(12, Fault::Death);
    die(&faulty, &engine, &job).await;
    let record = scene.bench.root().join(format!(".backhaul/records/{}.json", job.backup_id()));
    fs::remove_file(record).unwrap();

    let garbage = sweep(&scene.engine(), ANY_AGE).await;

    assert_eq!(kinds(&garbage), [Of::Attempt]);
    assert!(garbage[0].object_count > 3, "{garbage:?}");
    scene.check_clean("it had no record").await;
}

/// The same on servers: names, times and uploads are as each of them tells them.
#[rstest]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_backup_has_left_behind_a_server_is_found_and_removed(#[case] kind: Kind) {
    let bench = Bench::with_cpu(kind, CPU.clone());
    let engine = bench.engine(SETTINGS);
    let mut volume = Volume::create(bench.volumes().join("volume"), 9_000);
    volume.fill(0..9_000, Fill::Noise(1));
    let volume_id = VolumeId::random();
    let container: Container = bench.bucket().parse().unwrap();
    let kept = backup(&engine, volume_id, &volume.path, Parent::None).await.unwrap();
    let begun = format!("volume_{volume_id}/20200102030405/az_nova_backup_{}-00001", BackupId::random());
    let foreign = Folder::from(&container).object(&begun).unwrap();
    bench.store().put(&foreign, Bytes::from_static(b"Cinder's")).await.unwrap();
    let before = bench.everything([&container]).await;
    let calls = {
        let faulty = Faulty::counting(bench.store());
        let counted = bench.engine_on(Arc::new(faulty.clone()), SETTINGS, MEMORY_BYTES);
        let job = backup_job(volume_id, &volume.path, Parent::None);
        run(&counted, &job).await.unwrap();
        delete(&engine, job.backup_id()).await.unwrap();
        faulty.calls()
    };
    let job = backup_job(volume_id, &volume.path, Parent::None);
    // The second one has another attempt to take over from, and dies before it has removed what that left.
    for at in [calls - 4, 5] {
        let faulty = Faulty::new(bench.store(), at, Fault::Death);
        let dying = bench.engine_on(Arc::new(faulty.clone()), SETTINGS, MEMORY_BYTES);
        die(&faulty, &dying, &job).await;
    }

    assert_eq!(found(&engine, SignedDuration::from_hours(1)).await, []);
    let garbage = sweep(&engine, ANY_AGE).await;

    assert_eq!(kinds(&garbage), [Of::Attempt, Of::Backup], "{garbage:?}");
    assert!(garbage[0].object_count >= 3 && garbage[0].modified.is_some(), "{garbage:?}");
    assert_eq!(bench.everything([&container]).await, before);
    assert_eq!(found(&engine, ANY_AGE).await, []);
    verify(&engine, kept.backup_id).await.unwrap();
}

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";
/// Slow enough that a test can do something while a backup runs.
const SLOW: &str = "object_bytes = 1048576\nsha_block_bytes = 4096\ncompression = \"bz2\"";
const ONE_THREAD: &str = "cpu_threads_max = 1";

#[test]
fn the_backup_of_a_job_that_a_worker_runs_stays_and_that_of_one_that_died_goes() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), ONE_THREAD, SLOW);
    fs::write(stack.volume("a.img"), noise(1, 96 << 20)).unwrap();
    let worker = stack.worker();
    let source = stack.location("a.img");
    stack.ok(&["submit", "backup", "--volume-id", VOLUME, "--backup-id", BACKUP, "--source", &source]);
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    let gc = |more: &[&str]| stack.ok(&[&["gc", "--older-than", "0s"], more].concat());

    assert_eq!(gc(&["--yes"]), "nothing is left over\n");
    assert!(stack.ok(&["list"]).contains("creating"), "the job was over before it was looked at");
    worker.kill();

    assert_eq!(stack.ok(&["gc"]), "nothing is left over\n", "it is not old enough");
    let told = gc(&[]);
    assert!(told.contains("it was begun and never ended, job "), "{told}");
    assert!(told.contains("`backhaul gc --yes` removes them"), "{told}");
    let found: Value = serde_json::from_str(&gc(&["--json"])).unwrap();
    assert_eq!((&found[0]["kind"], &found[0]["backup_id"]), (&"backup".into(), &BACKUP.into()), "{found}");
    assert!(found[0]["object_count"].as_u64() > Some(0) && found[0].get("removed").is_none(), "{found}");
    assert!(!stack.objects().is_empty());

    let removed: Value = serde_json::from_str(&gc(&["--store", "local", "--yes", "--json"])).unwrap();

    assert_eq!(removed[0]["removed"], true, "{removed}");
    assert_eq!(stack.objects(), [""; 0]);
    // The broker still has the job, and hands it out again, and then once more.
    let worker = stack.worker();
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    worker.kill();
    assert_eq!(gc(&["--yes"]), "nothing is left over\n", "it was claimed");
    assert!(!stack.objects().is_empty());
    let mut worker = stack.worker();
    until("the backup is whole", || stack.ok(&["list"]).contains("available"));
    worker.terminate();
    assert_eq!(worker.ended(), 0);
    stack.ok(&["run", "verify", "--backup-id", BACKUP]);
}

#[test]
fn a_broker_that_is_away_cannot_tell_what_runs_so_nothing_is_removed() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", "");
    fs::create_dir_all(stack.path("backups/.backhaul/check")).unwrap();
    let left = stack.path("backups/.backhaul/check/5d0c1e2f-7a64-4d0b-9c53-0d1f5a2b6e88");
    fs::write(&left, "").unwrap();

    let output = stack.run(&["gc", "--older-than", "0s", "--yes"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(left.exists());

    // Without a broker no worker has jobs.
    let config = fs::read_to_string(stack.path("backhaul.toml")).unwrap();
    let (_, rest) = config.split_once("[worker]").unwrap();
    fs::write(stack.path("backhaul.toml"), format!("[worker]{rest}")).unwrap();
    let told = stack.ok(&["gc", "--older-than", "0s", "--yes"]);
    assert!(told.contains("removed: it was to show what the store can do"), "{told}");
    assert!(!left.exists());
    assert_eq!(stack.run(&["gc", "--store", "other"]).status.code(), Some(2));
}

/// What is left in clusters.
#[cfg(feature = "ceph")]
mod clusters {
    use backhaul::ceph::{Access, Clusters};
    use backhaul::engine::Volumes;
    use backhaul::engine::chunked::Budget;
    use backhaul::engine::rbd::{Rbd, Settings};
    use backhaul::job::Context;
    use backhaul::runner::plan;
    use backhaul::store::{ObjectStore, Rados};
    use backhaul::volume::FileRoots;

    use super::*;
    use crate::support::ceph::{Ceph, Image};
    use crate::support::engine::backup_job_of;

    const MIB: u64 = 1 << 20;

    /// An engine on a cluster of its own, because all that is in its pools is looked at.
    struct Bench {
        ceph: Ceph,
        store: Arc<dyn ObjectStore>,
        engine: Engine,
    }

    impl Bench {
        fn new() -> Self {
            let ceph = Ceph::start_with(&[]);
            let access =
                Access { conf: ceph.conf().into(), user: "cinder".into(), operation_seconds_max: 30 };
            let clusters = Clusters::new([("main".into(), access)].into());
            let pool = clusters.connect(None).unwrap().pool("backups").unwrap();
            let store = Arc::new(Rados::new(pool));
            let settings = Settings {
                cluster: Some("main".into()),
                pool: "backups".into(),
                source_snapshots_max: 0,
                journaling: false,
                stripes: None,
                checkpoint_bytes: 8 * MIB,
            };
            let memory = Budget::new(MEMORY_BYTES);
            let rbd = Rbd::new(store.clone(), clusters.clone(), settings, CPU.clone(), memory);
            let volumes = Volumes { file_roots: FileRoots::new(&[]), clusters };
            let engine = Engine::new(rbd, volumes);
            Self { ceph, store, engine }
        }

        fn volume(&self) -> (VolumeId, Image<'_>) {
            let image = self.ceph.image("volumes", 64 * MIB);
            image.write(&[(0, &noise(1, 64 << 20))]);
            (image.spec().strip_prefix("volumes/volume-").unwrap().parse().unwrap(), image)
        }

        async fn run(&self, job: &Job) {
            let method = plan(job, &self.engine.strategies(&job.work))[0];
            self.engine.run(&Context::default(), job, method).await.unwrap();
        }

        /// Begins the job, and goes no further when it has moved so much, as a worker that is killed: dropped in the middle,
        /// nothing is cleaned up.
        async fn die(&self, job: &Job, bytes: u64) {
            let (ctx, method) = (Context::default(), plan(job, &self.engine.strategies(&job.work))[0]);
            tokio::select! {
                result = self.engine.run(&ctx, job, method) => panic!("{result:?}"),
                () = async {
                    while ctx.progress.read().counts.bytes_stored < bytes {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                } => {}
            }
        }

        /// Images, snapshots, those in the trash as well, and objects, but for the data of images.
        fn everything(&self) -> BTreeSet<String> {
            let mut found = BTreeSet::new();
            for pool in ["volumes", "backups"] {
                for image in self.ceph.rbd(&["ls", pool]).lines() {
                    let spec = format!("{pool}/{image}");
                    let listed = self.ceph.rbd(&["snap", "ls", "--all", "--format", "json", &spec]);
                    let listed: Value = serde_json::from_str(&listed).unwrap();
                    for snapshot in listed.as_array().unwrap() {
                        found.insert(format!("{spec}@{}", snapshot["name"].as_str().unwrap()));
                    }
                    found.insert(spec);
                }
                let objects = self.ceph.rados(&["-p", pool, "ls"]);
                let own = |name: &&str| name.starts_with(".backhaul/") || name.starts_with("backup.");
                found.extend(objects.lines().filter(own).map(|name| format!("{pool}/{name}")));
            }
            found
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_no_record_owns_in_a_cluster_goes_and_what_is_cinders_stays() {
        let bench = Bench::new();
        let (volume_id, volume) = bench.volume();
        let source = format!("rbd:main/{}", volume.spec()).parse().unwrap();
        let backup = |parent| backup_job_of(volume_id, Clone::clone(&source), parent);
        let kept = backup(Parent::None);
        bench.run(&kept).await;
        let id = kept.backup_id();
        let image = format!("backups/volume-{volume_id}.backup.{id}");
        // What Cinder's driver has made, and what it is making.
        let (cinders, theirs) = (BackupId::random(), BackupId::random());
        bench.ceph.rbd(&["create", "--size", "1M", &format!("backups/volume-{volume_id}.backup.{cinders}")]);
        for spec in [volume.spec(), &image] {
            bench.ceph.rbd(&["snap", "create", &format!("{spec}@backup.{theirs}.snap.1795262136.62")]);
            bench.ceph.rbd(&["snap", "create", &format!("{spec}@mine")]);
        }
        let before = bench.everything();
        assert_eq!(found(&bench.engine, ANY_AGE).await, []);

        // Backups that died: a full one, and an incremental one in the image of the first.
        let died = [backup(Parent::None), backup(Parent::Given(id))];
        for (number, job) in (2..).zip(&died) {
            volume.write(&[(0, &noise(number, 64 << 20))]);
            bench.die(job, 20 * MIB).await;
        }
        // An attempt that was taken over left its snapshot; a list, and a snapshot, are of a backup that never was whole.
        let (earlier, lost) = (format!("backup.{id}.snap.1.000001"), BackupId::random());
        bench.ceph.rbd(&["snap", "create", &format!("{}@{earlier}", volume.spec())]);
        bench.ceph.rbd(&["snap", "create", &format!("{}@backup.{lost}.snap.1.000001", volume.spec())]);
        let list = Folder::own("digests").object(&format!("{lost}.0.{}", JobId::random())).unwrap();
        bench.store.put(&list, Bytes::from_static(b"digests")).await.unwrap();
        // A removal that was broken off half way.
        let trashed = format!("backup.{id}.snap.2.000002");
        bench.ceph.rbd(&["snap", "create", &format!("{}@{trashed}", volume.spec())]);
        let with_clone = format!("{}@{trashed}", volume.spec());
        bench.ceph.rbd(&["clone", "--rbd-default-clone-format", "2", &with_clone, "volumes/clone"]);
        bench.ceph.rbd(&["snap", "rm", &with_clone]);

        assert_eq!(found(&bench.engine, DAY).await, []);
        let garbage = found(&bench.engine, ANY_AGE).await;
        let mut kinds = kinds(&garbage);
        // The list that the dead full backup was writing goes with its record.
        kinds.sort_by_key(ToString::to_string);
        let expected = [Of::Backup, Of::Backup, Of::Digests, Of::Snapshot, Of::Snapshot, Of::Snapshot];
        assert_eq!(kinds, expected, "{garbage:#?}");

        let removed = async || {
            let mut kept = Vec::new();
            for garbage in found(&bench.engine, ANY_AGE).await {
                if !bench.engine.remove_garbage(&garbage).await.unwrap() {
                    kept.push(garbage.kind);
                }
            }
            kept
        };
        assert_eq!(removed().await, [Of::Snapshot], "the one that has a clone");
        bench.ceph.rbd(&["rm", "--no-progress", "volumes/clone"]);
        removed().await;

        assert_eq!(bench.everything(), before);
        assert_eq!(found(&bench.engine, ANY_AGE).await, []);
        verify(&bench.engine, id).await.unwrap();
        // Their jobs may come again.
        for job in &died {
            bench.run(job).await;
            verify(&bench.engine, job.backup_id()).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_whole_backup_whose_record_is_lost_stays_and_so_does_what_another_one_builds_on() {
        let bench = Bench::new();
        let (volume_id, volume) = bench.volume();
        let source = format!("rbd:main/{}", volume.spec()).parse().unwrap();
        let backup = |parent| backup_job_of(volume_id, Clone::clone(&source), parent);
        let full = backup(Parent::None);
        let id = full.backup_id();
        // One alone in a pool that no record names.
        let mut alone = backup(Parent::None);
        let Work::Backup(work) = &mut alone.work else { unreachable!() };
        work.container = Some("backups2".parse().unwrap());
        for job in [&full, &alone] {
            bench.run(job).await;
        }
        volume.write(&[(MIB, &noise(2, 1 << 20))]);
        let child = backup(Parent::Given(id));
        bench.run(&child).await;
        let before = bench.everything();
        let record = bench.engine.catalog().record(id).await.unwrap().unwrap();
        let lose = async |id: BackupId| {
            let object = Folder::own("records").object(&format!("{id}.json")).unwrap();
            bench.store.delete(&object).await.unwrap();
        };
        lose(id).await;
        lose(alone.backup_id()).await;

        assert_eq!(found(&bench.engine, ANY_AGE).await, []);

        bench.engine.import(record).await.unwrap();
        assert_eq!(bench.everything(), before);
        verify(&bench.engine, child.backup_id()).await.unwrap();
        // Of one that is not whole any more the list stays by which its child is checked.
        lose(id).await;
        let image = format!("backups/volume-{volume_id}.backup.{id}");
        let listed = bench.ceph.rbd(&["snap", "ls", "--format", "json", &image]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        let snapshot = listed[0]["name"].as_str().unwrap();
        assert!(snapshot.contains(&id.to_string()), "{snapshot}");
        bench.ceph.rbd(&["snap", "rm", "--no-progress", &format!("{image}@{snapshot}")]);
        assert_eq!(found(&bench.engine, ANY_AGE).await, []);
    }
}
