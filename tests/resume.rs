//! Backups that are begun again: what an attempt before has stored is taken over and not stored again, if it is what the
//! volume has now, and whatever becomes of that attempt and its notes.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use backhaul::engine::chunked::{Compression, Settings};
use backhaul::engine::{Engine, Receipt};
use backhaul::error::Class;
use backhaul::job::{Container, Job, Parent, Record, RecordState, VolumeId, Work};
use backhaul::store::{Folder, ObjectName};
use bytes::Bytes;
use jiff::SignedDuration;
use rstest::rstest;
use rustix::io::Errno;
use tokio::sync::Notify;

use crate::support::engine::{
    Bench, Kind, MEMORY_BYTES, SETTINGS, backup_job, cancel, delete, paths_of, restore, run, verify,
};
use crate::support::faulty::{Fault, Faulty};
use crate::support::volume::{Fill, Volume};

const OBJECT: usize = SETTINGS.object_bytes;
const OBJECTS: usize = 16;
/// The one that is all zeros.
const ZEROS: usize = 7;
const VOLUME_BYTES: u64 = (OBJECTS * OBJECT) as u64;
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
