//! Backups that are begun again: what an attempt before has stored is taken over and not stored again, if it is what the
//! volume has now, and whatever becomes of that attempt and its notes. And restores, which go on behind what was flushed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use backhaul::engine::chunked::{Compression, Settings};
use backhaul::engine::{Engine, Receipt};
use backhaul::error::{Causes, Class};
use backhaul::job::{Container, Context, Job, Parent, Record, RecordState, VolumeId, Work};
use backhaul::store::{Folder, ObjectName};
use bytes::Bytes;
use jiff::SignedDuration;
use rstest::rstest;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::support::engine::{
    Bench, Kind, MEMORY_BYTES, SETTINGS, backup_job, cancel, delete, paths_of, restore, restore_job, run,
    run_in, verify,
};
use crate::support::faulty::{Fault, Faulty};
use crate::support::volume::{Fill, Volume};

const OBJECT: usize = SETTINGS.object_bytes;
const OBJECTS: usize = 16;
/// The one that is all zeros.
const ZEROS: usize = 7;
const VOLUME_BYTES: u64 = (OBJECTS * OBJECT) as u64;
/// Where the last one begins.
const LAST: usize = (OBJECTS - 1) * OBJECT;
/// What of the volume is noted: zeros are not worth it.
const NOTED_BYTES: u64 = VOLUME_BYTES - OBJECT as u64;

struct Scene {
    bench: Bench,
    volume: Volume,
    job: Job,
    container: Container,
}

impl Scene {
    fn new(kind: Kind) -> Self {
        let bench = Bench::new(kind);
        let mut volume = Volume::create(bench.volumes().join("volume"), VOLUME_BYTES as usize);
        for index in 0..OBJECTS {
            volume.fill(index * OBJECT..(index + 1) * OBJECT, Fill::Noise(index as u64 + 1));
        }
        volume.fill(ZEROS * OBJECT..(ZEROS + 1) * OBJECT, Fill::Zeros);
        let container: Container = match kind {
            Kind::Posix | Kind::Memory => "shared".parse().unwrap(),
            _ => bench.bucket().parse().unwrap(),
        };
        let mut job = backup_job(VolumeId::random(), &volume.path, Parent::None);
        if let Work::Backup(work) = &mut job.work {
            work.container = Some(container.clone());
        }
        Self { bench, volume, job, container }
    }

    /// The same after an attempt that has died when all of the volume was stored.
    async fn after_death(kind: Kind) -> Self {
        let scene = Self::new(kind);
        let other = Self::new(Kind::Memory);
        let counting = Faulty::counting(other.bench.store());
        run(&other.engine_on(&counting), &other.job).await.unwrap();
        let calls = counting.names();
        let at = calls.iter().position(|call| call.starts_with("finish .backhaul/checksums/")).unwrap() + 1;
        let faulty = Faulty::new(scene.bench.store(), at, Fault::Death);
        let engine = scene.engine_on(&faulty);
        tokio::select! {
            ended = run(&engine, &scene.job) => panic!("it did not die: {ended:?}"),
            () = faulty.died() => {}
        }
        assert_eq!(scene.notes().await.len(), OBJECTS / 2 - 1);
        scene
    }

    fn engine(&self) -> Engine {
        self.bench.engine(SETTINGS)
    }

    fn engine_on(&self, faulty: &Faulty) -> Engine {
        self.bench.engine_on(Arc::new(faulty.clone()), SETTINGS, MEMORY_BYTES)
    }

    /// Runs the job to its end, and says what it asked the store for.
    async fn run_again(&self) -> (Receipt, Vec<String>) {
        let counting = Faulty::counting(self.bench.store());
        let receipt = run(&self.engine_on(&counting), &self.job).await.unwrap();
        (receipt, counting.names())
    }

    async fn record(&self) -> Record {
        self.engine().catalog().record(self.job.backup_id()).await.unwrap().unwrap()
    }

    async fn notes(&self) -> Vec<ObjectName> {
        let folder = Folder::own("checkpoints");
        let listed = self.bench.store().list(&folder, "").await.unwrap();
        listed.iter().map(|note| folder.object(&note.name).unwrap()).collect()
    }

    async fn everything(&self) -> BTreeSet<String> {
        self.bench.everything([&self.container]).await
    }

    /// The backup is whole, it is what the volume is, and nothing else is in the store.
    async fn check_whole(&self, told: &str) {
        let record = self.record().await;
        assert_eq!(record.state, RecordState::Available, "{told}");
        let found = self.everything().await;
        assert_eq!(found, paths_of(&record, OBJECTS as u64), "{told}");
        verify(&self.engine(), record.backup_id).await.expect(told);
        let target = self.bench.volumes().join("target");
        restore(&self.engine(), record.backup_id, &target).await.expect(told);
        assert!(fs::read(&target).unwrap() == self.volume.bytes, "{told}");
        fs::remove_file(&target).unwrap();
        let garbage = self.engine().garbage(SignedDuration::ZERO).await.unwrap();
        assert!(garbage.garbage.is_empty() && garbage.problems.is_empty(), "{told}: {garbage:?}");
    }
}

/// The calls of this kind about a data object.
fn of_data(calls: &[String], action: &str) -> usize {
    let prefix = format!("{action} .backhaul/");
    calls.iter().filter(|call| call.starts_with(&format!("{action} ")) && !call.starts_with(&prefix)).count()
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_attempt_that_died_has_stored_is_not_stored_again(#[case] kind: Kind) {
    let scene = Scene::after_death(kind).await;

    let (receipt, calls) = scene.run_again().await;

    // There is a note for each two objects, so that there is none of the last one; zeros are not noted.
    let copies = of_data(&calls, "copy");
    assert_eq!(receipt.counts.bytes_reused, (copies * OBJECT) as u64, "{:?}", receipt.counts);
    assert_eq!((copies, of_data(&calls, "put")), (OBJECTS - 2, 2), "{calls:?}");
    assert_eq!(receipt.counts.bytes_reused, NOTED_BYTES - OBJECT as u64);
    assert_eq!((receipt.counts.object_count, receipt.counts.bytes_read), (OBJECTS as u64, VOLUME_BYTES));
    scene.check_whole("").await;
    delete(&scene.engine(), scene.job.backup_id()).await.unwrap();
    assert_eq!(scene.everything().await, BTreeSet::new());
}

/// As by a store that was asked twice, since its first answer was lost, and had lost what it was to copy in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_is_copied_and_said_not_to_be_puts_the_job_off() {
    let (_, calls) = Scene::after_death(Kind::Posix).await.run_again().await;
    let at = calls.iter().position(|call| call.starts_with("copy ")).unwrap() + 1;
    let scene = Scene::after_death(Kind::Posix).await;
    let faulty = Faulty::new(scene.bench.store(), at, Fault::SaidNot);

    let error = run(&scene.engine_on(&faulty), &scene.job).await.unwrap_err();

    assert!(faulty.broke_at().starts_with("copy "), "{}", faulty.broke_at());
    assert_eq!(error.class(), Class::Transient, "{}", Causes(&error));
    scene.run_again().await;
    scene.check_whole("after the next attempt").await;
}

#[tokio::test]
async fn what_the_volume_has_no_more_is_stored_anew() {
    let mut scene = Scene::after_death(Kind::Posix).await;
    // A block of one object, and all of another one, which is zeros now.
    scene.volume.fill(3 * OBJECT + 512..3 * OBJECT + 513, Fill::Noise(99));
    scene.volume.fill(5 * OBJECT..6 * OBJECT, Fill::Zeros);

    let (receipt, calls) = scene.run_again().await;

    assert_eq!(receipt.counts.bytes_reused, NOTED_BYTES - 3 * OBJECT as u64);
    assert_eq!((of_data(&calls, "copy"), of_data(&calls, "put")), (OBJECTS - 4, 4));
    scene.check_whole("").await;
}

#[tokio::test]
async fn with_other_chunks_or_blocks_all_is_stored_anew() {
    for settings in [
        Settings { object_bytes: 4096, ..SETTINGS },
        Settings { object_bytes: 4096, sha_block_bytes: 1024, ..SETTINGS },
    ] {
        let scene = Scene::after_death(Kind::Posix).await;
        let receipt = run(&scene.bench.engine(settings), &scene.job).await.unwrap();
        assert_eq!((receipt.counts.bytes_reused, receipt.counts.object_count), (0, OBJECTS as u64 / 2));
        let target = scene.bench.volumes().join("target");
        restore(&scene.engine(), scene.job.backup_id(), &target).await.unwrap();
        assert!(fs::read(&target).unwrap() == scene.volume.bytes);
    }
}

#[tokio::test]
async fn an_object_that_was_packed_in_another_way_is_taken_over_as_it_is() {
    let scene = Scene::after_death(Kind::Posix).await;
    let settings = Settings { compression: Compression::Zlib, ..SETTINGS };
    let receipt = run(&scene.bench.engine(settings), &scene.job).await.unwrap();
    assert_eq!(receipt.counts.bytes_reused, NOTED_BYTES - OBJECT as u64);
    scene.check_whole("").await;
}

#[derive(Debug, Clone, Copy)]
enum Damage {
    Empty,
    Garbage,
    Shorter,
    OtherByte,
    Foreign,
    Gone,
}

#[rstest]
#[tokio::test]
async fn a_note_that_is_damaged_costs_time_and_nothing_else(
    #[values(
        Damage::Empty,
        Damage::Garbage,
        Damage::Shorter,
        Damage::OtherByte,
        Damage::Foreign,
        Damage::Gone
    )]
    damage: Damage,
) {
    let scene = Scene::after_death(Kind::Memory).await;
    let (store, notes) = (scene.bench.store(), scene.notes().await);
    let note = &notes[2];
    let bytes = scene.bench.read(note).await;
    let damaged = match damage {
        Damage::Empty => Bytes::new(),
        Damage::Garbage => Bytes::from_static(b"{\"format\":1,\"sha256\":\"\",\"content\":[\xff"),
        Damage::Shorter => bytes.slice(..bytes.len() - 1),
        Damage::OtherByte => {
            let mut bytes = bytes.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            bytes.into()
        }
        // Whole, and of the same volume, but of another backup.
        Damage::Foreign => {
            let other = Scene::after_death(Kind::Memory).await;
            other.bench.read(&other.notes().await[2]).await
        }
        Damage::Gone => bytes.clone(),
    };
    store.replace(note, damaged).await.unwrap();
    if let Damage::Gone = damage {
        store.delete(note).await.unwrap();
    }

    let (receipt, _) = scene.run_again().await;

    // Two objects a note. Behind one that is damaged none is read; one that is gone is not missed.
    let lost = if let Damage::Gone = damage { 2 } else { OBJECTS - 2 - 4 };
    let reused = (OBJECTS - 2 - lost) * OBJECT;
    assert_eq!(receipt.counts.bytes_reused, reused as u64, "{:?}", receipt.counts);
    scene.check_whole("").await;
}

#[tokio::test]
async fn an_object_that_is_gone_or_has_another_size_is_stored_anew() {
    let scene = Scene::after_death(Kind::Posix).await;
    let record = scene.record().await;
    let path = |number: u64| {
        let name = format!("{}/{}-{number:05}", record.container, record.service_metadata);
        scene.bench.root().join(name)
    };
    fs::remove_file(path(2)).unwrap();
    fs::write(path(3), "short").unwrap();

    let (receipt, _) = scene.run_again().await;

    assert_eq!(receipt.counts.bytes_reused, NOTED_BYTES - 3 * OBJECT as u64);
    scene.check_whole("").await;
}

/// Whoever takes over may fail as well, at any of its calls. The next one makes the backup whole, or nothing is left.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_takes_over_may_fail_at_any_call(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(Fault::Refused(Errno::IO), Fault::AnswerLost(Errno::IO), Fault::Death)] fault: Fault,
    #[values(false, true)] is_given_up: bool,
) {
    let calls = Scene::after_death(kind).await.run_again().await.1.len();
    for at in 1..=calls {
        let scene = Scene::after_death(kind).await;
        let faulty = Faulty::new(scene.bench.store(), at, fault.clone());
        let engine = scene.engine_on(&faulty);
        let ended = tokio::select! {
            ended = run(&engine, &scene.job) => Some(ended),
            () = faulty.died() => None,
        };
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());
        if let Some(Err(error)) = &ended {
            assert_eq!(error.class(), Class::Transient, "{told}: {error}");
        }

        if is_given_up {
            cancel(&scene.engine(), &scene.job).await;
            let found = scene.everything().await;
            let record = scene.engine().catalog().record(scene.job.backup_id()).await.unwrap();
            match record {
                // Only the answer to the last call was lost.
                Some(record) => assert_eq!(found, paths_of(&record, OBJECTS as u64), "{told}"),
                None => assert_eq!(found, BTreeSet::new(), "{told}"),
            }
            continue;
        }
        run(&scene.engine(), &scene.job).await.expect(&told);
        scene.check_whole(&told).await;
    }
}

/// The broker took a worker for dead that still lives: it goes on when the other one has finished.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_goes_on_after_the_other_has_finished_harms_nothing() {
    let calls = {
        let scene = Scene::new(Kind::Memory);
        scene.run_again().await.1.len()
    };
    for at in 1..=calls {
        let scene = Scene::new(Kind::Memory);
        let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let faulty = Faulty::new(scene.bench.store(), at, Fault::Pause(reached.clone(), go_on.clone()));
        let (engine, job) = (scene.engine_on(&faulty), scene.job.clone());
        let first = tokio::spawn(async move { run(&engine, &job).await });
        reached.notified().await;
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());

        run(&scene.engine(), &scene.job).await.expect(&told);
        go_on.notify_one();
        if let Err(error) = first.await.unwrap() {
            assert_eq!(error.class(), Class::Transient, "{told}: {error}");
        }

        run(&scene.engine(), &scene.job).await.expect(&told);
        scene.check_whole(&told).await;
    }
}

/// Each attempt dies a little later than the one before it. Nothing that any of them has stored is stored again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_several_attempts_have_stored_is_taken_over_from_all_of_them() {
    let scene = Scene::after_death(Kind::Posix).await;
    let faulty = Faulty::new(scene.bench.store(), 12, Fault::Death);
    let engine = scene.engine_on(&faulty);
    tokio::select! {
        ended = run(&engine, &scene.job) => panic!("it did not die: {ended:?}"),
        () = faulty.died() => {}
    }

    let (receipt, _) = scene.run_again().await;

    assert_eq!(receipt.counts.bytes_reused, NOTED_BYTES - OBJECT as u64);
    scene.check_whole("").await;
}

/// A backup with a parent, and a restore of it to a new file.
struct Restoring {
    scene: Scene,
    job: Job,
    target: PathBuf,
    partial: PathBuf,
}

impl Restoring {
    async fn new() -> Self {
        let mut scene = Scene::new(Kind::Posix);
        run(&scene.engine(), &scene.job).await.unwrap();
        for index in [1, 6, 12] {
            scene.volume.fill(index * OBJECT..index * OBJECT + 700, Fill::Noise(100 + index as u64));
        }
        scene.volume.fill(LAST + OBJECT / 2..LAST + OBJECT, Fill::Zeros);
        let volume_id = scene.job.volume_id().unwrap();
        scene.job = backup_job(volume_id, &scene.volume.path, Parent::Latest);
        run(&scene.engine(), &scene.job).await.unwrap();
        let target = scene.bench.volumes().join("target");
        let partial = target.with_file_name(".target.backhaul-partial");
        let job = restore_job(scene.job.backup_id(), &target);
        Self { scene, job, target, partial }
    }

    /// Runs the job until it has to be handed back at this call to the store. Gives all calls.
    async fn stopped_at(&self, at: usize) -> Vec<String> {
        let hand_back = CancellationToken::new();
        let faulty = Faulty::new(self.scene.bench.store(), at, Fault::Cancel(hand_back.clone()));
        let ctx = Context { cancel: hand_back.child_token(), hand_back, ..Context::default() };
        if let Err(error) = run_in(&ctx, &self.scene.engine_on(&faulty), &self.job).await {
            assert_eq!(error.class(), Class::Cancelled, "{error}");
        }
        faulty.names()
    }

    /// At which call it asks for the last object, if nothing stops it; then it has flushed some of the others.
    async fn last_call() -> usize {
        let calls = Self::new().await.stopped_at(usize::MAX).await;
        calls
            .iter()
            .rposition(|call| call.starts_with("get ") && !call.starts_with("get .backhaul/"))
            .unwrap()
            + 1
    }

    /// The same after it was handed back near its end.
    async fn handed_back() -> Self {
        let restoring = Self::new().await;
        restoring.stopped_at(Self::last_call().await).await;
        assert!(restoring.partial.exists() && !restoring.target.exists());
        restoring
    }

    /// Spoils what is not whole yet: its beginning, which shows whether that is written again, and its end, which was not
    /// flushed, so that nobody knows what is there.
    fn spoil(&self) {
        let partial = File::options().write(true).open(&self.partial).unwrap();
        partial.write_all_at(b"spoilt", 0).unwrap();
        partial.write_all_at(&[0xa5; OBJECT], LAST as u64).unwrap();
    }

    fn change_note(&self, change: impl FnOnce(&str) -> String) {
        let attribute = "user.backhaul.restore";
        let mut value = vec![0; 4096];
        let length = rustix::fs::getxattr(&self.partial, attribute, &mut value[..]).unwrap();
        let value = String::from_utf8_lossy(&value[..length]).into_owned();
        let (restore, note) = value.split_once('\n').unwrap();
        assert!(note.contains("object_count"), "{note}");
        let value = format!("{restore}\n{}", change(note));
        rustix::fs::setxattr(&self.partial, attribute, value.as_bytes(), XattrFlags::REPLACE).unwrap();
    }

    fn is_whole(&self) -> bool {
        assert!(!self.partial.exists());
        fs::read(&self.target).unwrap() == self.scene.volume.bytes
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_to_a_new_file_goes_on_behind_what_was_flushed() {
    let restoring = Restoring::handed_back().await;
    restoring.spoil();

    let (receipt, calls) = {
        let counting = Faulty::counting(restoring.scene.bench.store());
        let receipt = run(&restoring.scene.engine_on(&counting), &restoring.job).await.unwrap();
        (receipt, counting.names())
    };

    let counts = receipt.counts;
    assert!(counts.bytes_reused >= VOLUME_BYTES / 2 && counts.bytes_reused < VOLUME_BYTES, "{counts:?}");
    assert_eq!((counts.bytes_read, counts.object_count), (VOLUME_BYTES, OBJECTS as u64 + 4), "{counts:?}");
    let is_data = |call: &&String| call.starts_with("get ") && call[..call.len() - 2].ends_with("-000");
    let read_again = calls.iter().filter(is_data).count();
    assert!(read_again > 0 && read_again <= OBJECTS / 2, "{calls:?}");
    let mut restored = fs::read(&restoring.target).unwrap();
    assert_eq!(restored[..6], *b"spoilt", "it was written again");
    restored[..6].copy_from_slice(&restoring.scene.volume.bytes[..6]);
    assert!(restored == restoring.scene.volume.bytes);
    assert!(!restoring.partial.exists());
}

#[rstest]
#[case::of_another_job(None)]
#[case::damaged(Some("{\"chain\":\"a\""))]
#[case::of_another_chain(Some(r#"{"chain":"a","object_count":9,"counts":{"bytes_read":9,"bytes_zero":0,"bytes_hole":0,"bytes_unchanged":0,"bytes_stored":0,"bytes_written":0,"object_count":9}}"#))]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_goes_by_no_note_that_is_not_its_own(#[case] note: Option<&str>) {
    let mut restoring = Restoring::handed_back().await;
    restoring.spoil();
    match note {
        None => restoring.job = restore_job(restoring.scene.job.backup_id(), &restoring.target),
        Some(note) => restoring.change_note(|_| note.into()),
    }

    let receipt = run(&restoring.scene.engine(), &restoring.job).await.unwrap();

    assert_eq!(receipt.counts.bytes_reused, 0, "{:?}", receipt.counts);
    assert!(restoring.is_whole());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_whose_note_names_other_objects_than_were_counted_fails_and_then_begins_anew() {
    let restoring = Restoring::handed_back().await;
    restoring.change_note(|note| {
        let mut note: Value = serde_json::from_str(note).unwrap();
        note["object_count"] = (note["object_count"].as_u64().unwrap() + 2).into();
        note.to_string()
    });

    let error = run(&restoring.scene.engine(), &restoring.job).await.unwrap_err();

    assert_eq!(error.class(), Class::Transient, "{error}");
    assert!(!restoring.target.exists() && !restoring.partial.exists());
    run(&restoring.scene.engine(), &restoring.job).await.unwrap();
    assert!(restoring.is_whole());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_is_handed_back_at_any_call_is_ended_by_the_next_worker() {
    let calls = Restoring::new().await.stopped_at(usize::MAX).await.len();
    for at in 1..=calls {
        let restoring = Restoring::new().await;
        let told = &restoring.stopped_at(at).await[at - 1];
        if !restoring.target.exists() {
            run(&restoring.scene.engine(), &restoring.job).await.expect(told);
        }
        assert!(restoring.is_whole(), "call {at} of {calls}, {told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_is_cancelled_after_it_was_handed_back_leaves_no_file() {
    let restoring = Restoring::handed_back().await;
    let ctx = Context::default();
    ctx.cancel.cancel();

    let error = run_in(&ctx, &restoring.scene.engine(), &restoring.job).await.unwrap_err();

    assert_eq!(error.class(), Class::Cancelled);
    assert!(!restoring.partial.exists() && !restoring.target.exists());
}
