//! Jobs that are broken off, at each of their calls to the store in turn: what they leave, and that another try or
//! the clean-up puts it right.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use backhaul::engine::{Engine, Error, Receipt};
use backhaul::error::{Class, Problem};
use backhaul::job::{Context, Job, Parent, Record, RecordState, VolumeId, Work};
use rstest::rstest;
use rustix::io::Errno;
use tokio::sync::Notify;

use crate::support::engine::{
    Bench, Kind, MEMORY_BYTES, SETTINGS, backup, backup_job, cancel, conclude_delete, delete, job, overwrite,
    paths_of, restore, restore_job, run, run_in, verify,
};
use crate::support::faulty::{Fault, Faulty};
use crate::support::volume::{Fill, Volume};

/// A volume, perhaps with a first backup, in a store where every object is known.
struct Scene {
    bench: Bench,
    volume: Volume,
    volume_id: VolumeId,
    parent: Option<Record>,
}

impl Scene {
    async fn new(kind: Kind, incremental: bool) -> Self {
        let bench = Bench::new(kind);
        let mut volume = Volume::create(bench.volumes().join("volume"), 9_000);
        volume.fill(0..9_000, Fill::Noise(1));
        volume.fill(4_096..6_144, Fill::Zeros);
        let mut scene = Self { bench, volume, volume_id: VolumeId::random(), parent: None };
        if incremental {
            let parent = backup(&scene.engine(), scene.volume_id, &scene.volume.path, Parent::None).await;
            scene.parent = Some(parent.unwrap());
            scene.volume.fill(500..3_000, Fill::Text(1));
            scene.volume.fill(8_000..8_001, Fill::Noise(2));
        }
        scene
    }

    fn engine(&self) -> Engine {
        self.bench.engine(SETTINGS)
    }

    fn faulty_engine(&self, at: usize, fault: Fault) -> (Faulty, Engine) {
        let faulty = Faulty::new(self.bench.store(), at, fault);
        let engine = self.bench.engine_on(Arc::new(faulty.clone()), SETTINGS, MEMORY_BYTES);
        (faulty, engine)
    }

    fn backup_job(&self) -> Job {
        let parent = if self.parent.is_some() { Parent::Latest } else { Parent::None };
        let mut job = backup_job(self.volume_id, &self.volume.path, parent);
        if let Work::Backup(work) = &mut job.work {
            work.container = Some("shared".parse().unwrap());
        }
        job
    }

    /// The calls of a job that nothing happens to.
    async fn calls(&self, job: &Job) -> usize {
        let faulty = Faulty::counting(self.bench.store());
        let engine = self.bench.engine_on(Arc::new(faulty.clone()), SETTINGS, MEMORY_BYTES);
        run(&engine, job).await.unwrap();
        faulty.calls()
    }

    async fn everything(&self) -> BTreeSet<String> {
        let containers = self.parent.as_ref().map(|parent| parent.container.clone());
        let containers: Vec<_> = containers.into_iter().chain(["shared".parse().unwrap()]).collect();
        self.bench.everything(&containers).await
    }

    /// What the store holds beside the backup that is made now.
    fn before(&self) -> BTreeSet<String> {
        self.parent.iter().flat_map(|parent| paths_of(parent, parent.counts.object_count)).collect()
    }

    async fn record(&self, job: &Job) -> Option<Record> {
        self.engine().catalog().record(job.backup_id()).await.unwrap()
    }

    /// The backup is whole, and there is nothing beside it and what was there before.
    async fn check_whole(&self, job: &Job, told: &str) {
        let record = self.record(job).await.unwrap();
        assert_eq!(record.state, RecordState::Available, "{told}");
        let mut expected = self.before();
        expected.extend(paths_of(&record, record.counts.object_count));
        assert_eq!(self.everything().await, expected, "{told}");
        let target = self.bench.volumes().join("target");
        restore(&self.engine(), record.backup_id, &target).await.unwrap();
        assert!(fs::read(&target).unwrap() == self.volume.bytes, "{told}");
        fs::remove_file(&target).unwrap();
    }

    async fn check_invisible(&self, job: &Job, told: &str) {
        let state = self.record(job).await.map(|record| record.state);
        assert!(matches!(state, None | Some(RecordState::Creating(_))), "{told}: {state:?}");
        let own = |path: &String| path.contains(&job.backup_id().to_string()) && path.ends_with("_metadata");
        assert_eq!(self.everything().await.iter().find(|path| own(path)), None, "{told}");
    }

    async fn check_gone(&self, told: &str) {
        assert_eq!(self.everything().await, self.before(), "{told}");
        if let Some(parent) = &self.parent {
            verify(&self.engine(), parent.backup_id).await.unwrap();
        }
    }
}

/// Runs the job until it ends, or until the process dies in the middle of it.
async fn run_until_death(faulty: &Faulty, engine: &Engine, job: &Job) -> Option<Result<Receipt, Error>> {
    tokio::select! {
        result = run(engine, job) => Some(result),
        () = faulty.died() => None,
    }
}

/// Whether the call comes when the backup is seen already, though the job does not know yet.
fn is_last_step(call: &str) -> bool {
    call.starts_with("swap .backhaul/records/")
}

/// OpenStack's Swift lists what was written later when it is busy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parent_whose_delete_would_not_see_the_child_in_a_listing_is_not_built_on_yet() {
    let scene = Scene::new(Kind::Memory, true).await;
    let job = scene.backup_job();
    let counting = Faulty::counting(scene.bench.store());
    run(&scene.bench.engine_on(Arc::new(counting.clone()), SETTINGS, MEMORY_BYTES), &job).await.unwrap();
    delete(&scene.engine(), job.backup_id()).await.unwrap();
    let calls = counting.names();
    let begun =
        calls.iter().position(|call| *call == format!("put .backhaul/records/{}.json", job.backup_id()));
    let at = begun.unwrap()
        + calls[begun.unwrap()..].iter().position(|call| call.starts_with("list ")).unwrap()
        + 1;

    let (faulty, engine) = scene.faulty_engine(at, Fault::ListsNothing);
    let error = run(&engine, &job).await.unwrap_err();

    assert_eq!(error.class(), Class::Transient, "{error} at {}", faulty.broke_at());
    assert!(error.to_string().contains("does not list .backhaul/records/"), "{error}");
    scene.check_invisible(&job, "").await;
    run(&scene.engine(), &job).await.unwrap();
    scene.check_whole(&job, "").await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_fails_at_any_call_is_unseen_and_the_next_try_makes_it_whole(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(false, true)] incremental: bool,
    #[values(Fault::Refused(Errno::IO), Fault::AnswerLost(Errno::IO), Fault::Death)] fault: Fault,
) {
    let scene = Scene::new(kind, incremental).await;
    let job = scene.backup_job();
    let calls = scene.calls(&job).await;
    delete(&scene.engine(), job.backup_id()).await.unwrap();

    for at in 1..=calls {
        let job = scene.backup_job();
        let (faulty, engine) = scene.faulty_engine(at, fault.clone());
        let ended = run_until_death(&faulty, &engine, &job).await;
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());

        assert_eq!(ended.is_none(), matches!(fault, Fault::Death), "{told}");
        if let Some(result) = ended {
            let error = result.expect_err(&told);
            assert_eq!(error.class(), Class::Transient, "{told}: {error}");
        }
        // The last two calls read and change the record; the one before them makes the metadata visible.
        let first_seen = if matches!(fault, Fault::AnswerLost(_)) { calls - 2 } else { calls - 1 };
        if at < first_seen {
            scene.check_invisible(&job, &told).await;
        }

        run(&scene.engine(), &job).await.expect(&told);
        scene.check_whole(&job, &told).await;
        delete(&scene.engine(), job.backup_id()).await.unwrap();
        scene.check_gone(&told).await;
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_given_up_leaves_nothing_but_the_reason(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(false, true)] incremental: bool,
    #[values(Fault::Refused(Errno::NOSPC), Fault::AnswerLost(Errno::NOSPC), Fault::Death)] fault: Fault,
    #[values(false, true)] cancelled: bool,
) {
    let scene = Scene::new(kind, incremental).await;
    let job = scene.backup_job();
    let calls = scene.calls(&job).await;
    delete(&scene.engine(), job.backup_id()).await.unwrap();

    for at in 1..=calls {
        let job = scene.backup_job();
        let (faulty, engine) = scene.faulty_engine(at, fault.clone());
        let ended = run_until_death(&faulty, &engine, &job).await;
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());
        let problem = match ended {
            Some(result) => {
                let error = result.expect_err(&told);
                assert_eq!(error.class(), Class::Permanent, "{told}: {error}");
                Problem::new(error.class(), &error)
            }
            None => Problem { class: Class::Permanent, message: "it died".into(), causes: Vec::new() },
        };

        match cancelled {
            true => cancel(&scene.engine(), &job).await,
            false => drop(scene.engine().abandon(&job, Some(&problem)).await.unwrap()),
        }

        let record = scene.record(&job).await;
        match &record {
            // It was whole, and only the answer was lost.
            Some(record) if record.state == RecordState::Available => {
                assert!(matches!(fault, Fault::AnswerLost(_)) && is_last_step(&faulty.broke_at()), "{told}");
                scene.check_whole(&job, &told).await;
            }
            Some(record) => {
                assert_eq!(record.state, RecordState::Error(problem), "{told}");
                let mut expected = scene.before();
                expected.insert(format!(".backhaul/records/{}.json", job.backup_id()));
                assert_eq!(scene.everything().await, expected, "{told}");
            }
            None => {}
        }
        if record.is_some() {
            delete(&scene.engine(), job.backup_id()).await.unwrap();
        }
        scene.check_gone(&told).await;
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_cancelled_at_any_call_leaves_nothing(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(false, true)] incremental: bool,
) {
    let scene = Scene::new(kind, incremental).await;
    let job = scene.backup_job();
    let calls = scene.calls(&job).await;
    delete(&scene.engine(), job.backup_id()).await.unwrap();

    for at in 1..=calls {
        let job = scene.backup_job();
        let ctx = Context::default();
        let (faulty, engine) = scene.faulty_engine(at, Fault::Cancel(ctx.cancel.clone()));
        let result = run_in(&ctx, &engine, &job).await;
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());

        match result {
            Err(error) => {
                assert_eq!(error.class(), Class::Cancelled, "{told}: {error}");
                scene.check_invisible(&job, &told).await;
                cancel(&scene.engine(), &job).await;
            }
            // All of the volume was read before: it is as well to end the job as it would have ended.
            Ok(_) => {
                let call = faulty.broke_at();
                let noted = call.contains(" .backhaul/checkpoints");
                let written = call.starts_with("write") || call.starts_with("finish") || noted;
                // Behind the last look come the notes, which go, the object that makes it visible, and the record.
                let late = written || at + 6 >= calls;
                assert!(late, "{told}");
                scene.check_whole(&job, &told).await;
                delete(&scene.engine(), job.backup_id()).await.unwrap();
            }
        }
        scene.check_gone(&told).await;
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_that_fails_at_any_call_is_finished_by_the_next_try(
    #[values(Kind::Posix, Kind::Memory)] kind: Kind,
    #[values(false, true)] incremental: bool,
    #[values(Fault::Refused(Errno::IO), Fault::AnswerLost(Errno::IO), Fault::Death)] fault: Fault,
) {
    let scene = Scene::new(kind, incremental).await;
    let made = scene.backup_job();
    run(&scene.engine(), &made).await.unwrap();
    let calls = scene.calls(&job(Work::Delete(made.backup_id()))).await;
    let remove = job(Work::Delete(made.backup_id()));
    run(&scene.engine(), &remove).await.unwrap();
    conclude_delete(&scene.engine(), &remove).await;
    scene.check_gone("to begin with").await;

    for at in 1..=calls {
        let made = scene.backup_job();
        run(&scene.engine(), &made).await.unwrap();
        let remove = job(Work::Delete(made.backup_id()));
        let (faulty, engine) = scene.faulty_engine(at, fault.clone());
        let ended = run_until_death(&faulty, &engine, &remove).await;
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());

        assert_eq!(ended.is_none(), matches!(fault, Fault::Death), "{told}");
        if let Some(result) = ended {
            let error = result.expect_err(&told);
            assert_eq!(error.class(), Class::Transient, "{told}: {error}");
        }
        match scene.record(&made).await.expect(&told).state {
            // Nothing of it was touched.
            RecordState::Available => drop(verify(&scene.engine(), made.backup_id()).await.expect(&told)),
            state => {
                assert_eq!(state, RecordState::Deleting(remove.id), "{told}");
                let error = verify(&scene.engine(), made.backup_id()).await.unwrap_err();
                assert!(matches!(error, Error::NotAvailable { .. }), "{told}: {error}");
            }
        }

        run(&scene.engine(), &remove).await.expect(&told);
        conclude_delete(&scene.engine(), &remove).await;
        scene.check_gone(&told).await;
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_fails_at_any_call_leaves_no_file(
    #[values(false, true)] incremental: bool,
    #[values(false, true)] cancelled: bool,
) {
    let scene = Scene::new(Kind::Memory, incremental).await;
    let made = scene.backup_job();
    run(&scene.engine(), &made).await.unwrap();
    let target = scene.bench.volumes().join("target");
    let calls = scene.calls(&restore_job(made.backup_id(), &target)).await;
    fs::remove_file(&target).unwrap();
    let names = scene.bench.volume_names();

    for at in 1..=calls {
        let ctx = Context::default();
        let fault = if cancelled { Fault::Cancel(ctx.cancel.clone()) } else { Fault::Refused(Errno::IO) };
        let (faulty, engine) = scene.faulty_engine(at, fault);
        let result = run_in(&ctx, &engine, &restore_job(made.backup_id(), &target)).await;
        let told = format!("call {at} of {calls}, {}", faulty.broke_at());

        let error = result.expect_err(&told);
        let class = if cancelled { Class::Cancelled } else { Class::Transient };
        assert_eq!(error.class(), class, "{told}: {error}");
        assert_eq!(scene.bench.volume_names(), names, "{told}");
    }
}

/// As by a server that answered twice, and of which the first answer was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_whose_record_is_written_and_said_not_to_be_stays_whole() {
    for incremental in [false, true] {
        let scene = Scene::new(Kind::Memory, incremental).await;
        let job = scene.backup_job();
        let calls = scene.calls(&job).await;
        delete(&scene.engine(), job.backup_id()).await.unwrap();
        let mut swap_count = 0;
        for at in 1..=calls {
            let job = scene.backup_job();
            let (faulty, engine) = scene.faulty_engine(at, Fault::SaidNot);
            let ended = run(&engine, &job).await;
            let told = format!("call {at} of {calls}, {}", faulty.broke_at());

            swap_count += usize::from(faulty.broke_at().starts_with("swap"));
            if is_last_step(&faulty.broke_at()) {
                ended.as_ref().expect(&told);
            }
            if ended.is_err() {
                run(&scene.engine(), &job).await.expect(&told);
            }
            scene.check_whole(&job, &told).await;
            delete(&scene.engine(), job.backup_id()).await.unwrap();
        }
        assert!(swap_count > 0);
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_to_its_end_is_no_damage(#[values(false, true)] verifies: bool) {
    let scene = Scene::new(Kind::Memory, true).await;
    let id = scene.parent.as_ref().unwrap().backup_id;
    let job = || {
        let target = scene.bench.volumes().join("target");
        if verifies { job(Work::Verify(id.into())) } else { restore_job(id, &target) }
    };
    let calls = scene.calls(&job()).await;
    let mut failed_count = 0;
    for at in 1..=calls {
        let (faulty, engine) = scene.faulty_engine(at, Fault::BreaksOff(Errno::IO));
        let ended = run(&engine, &job()).await;
        let told = format!("call {at} of {calls}, {}: {ended:?}", faulty.broke_at());
        if let Err(error) = ended {
            assert_eq!(error.class(), Class::Transient, "{told}");
            failed_count += 1;
        }
    }
    assert!(failed_count > 5, "{failed_count}");
}

/// Does two jobs at once: the first one stops at one of its calls, the other begins and stops at one of its own, the
/// first goes on to its end, and then the other does. Gives how each ended, and where they stopped.
async fn entangle(scene: &Scene, jobs: [(&Job, usize); 2]) -> ([Result<Receipt, Error>; 2], String) {
    let start = |(job, at): (&Job, usize)| {
        let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (faulty, engine) = scene.faulty_engine(at, Fault::Pause(reached.clone(), go_on.clone()));
        let job = job.clone();
        let running = tokio::spawn(async move {
            let ended = run(&engine, &job).await;
            if ended.is_ok() && matches!(job.work, Work::Delete(_)) {
                conclude_delete(&engine, &job).await;
            }
            ended
        });
        (faulty, running, reached, go_on)
    };
    let (first_faulty, first, first_reached, first_go_on) = start(jobs[0]);
    first_reached.notified().await;
    let (other_faulty, mut other, other_reached, other_go_on) = start(jobs[1]);
    let other_ended = tokio::select! {
        () = other_reached.notified() => None,
        ended = &mut other => Some(ended.unwrap()),
    };
    first_go_on.notify_one();
    let first_ended = first.await.unwrap();
    other_go_on.notify_one();
    let other_ended = match other_ended {
        Some(ended) => ended,
        None => other.await.unwrap(),
    };
    ([first_ended, other_ended], format!("{} and {}", first_faulty.broke_at(), other_faulty.broke_at()))
}

/// Two workers have the same job, because the broker took one of them for dead.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_with_the_same_job_leave_one_whole_backup(#[values(false, true)] incremental: bool) {
    let scene = Scene::new(Kind::Memory, incremental).await;
    let job = scene.backup_job();
    let calls = scene.calls(&job).await;
    delete(&scene.engine(), job.backup_id()).await.unwrap();

    for first_at in 1..=calls {
        for other_at in 1..=calls {
            let job = scene.backup_job();
            let (ended, told) = entangle(&scene, [(&job, first_at), (&job, other_at)]).await;

            for error in ended.iter().filter_map(|ended| ended.as_ref().err()) {
                assert_eq!(error.class(), Class::Transient, "{told}: {error}");
            }
            if ended.iter().all(Result::is_err) {
                scene.check_invisible(&job, &told).await;
            }
            run(&scene.engine(), &job).await.expect(&told);
            scene.check_whole(&job, &told).await;
            delete(&scene.engine(), job.backup_id()).await.unwrap();
            scene.check_gone(&told).await;
        }
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_deleted_gets_no_child_meanwhile(#[values(false, true)] delete_begins: bool) {
    let jobs = |scene: &Scene| {
        let (remove, make) =
            (job(Work::Delete(scene.parent.as_ref().unwrap().backup_id)), scene.backup_job());
        if delete_begins { [remove, make] } else { [make, remove] }
    };
    let mut calls = [0, 0];
    for (index, calls) in calls.iter_mut().enumerate() {
        let scene = Scene::new(Kind::Memory, true).await;
        *calls = scene.calls(&jobs(&scene)[index]).await;
    }
    let mut refused = [0, 0];

    for first_at in 1..=calls[0] {
        for other_at in 1..=calls[1] {
            let scene = Scene::new(Kind::Memory, true).await;
            let [first, other] = jobs(&scene);
            let (mut ended, told) = entangle(&scene, [(&first, first_at), (&other, other_at)]).await;
            if !delete_begins {
                ended.reverse();
            }
            let (make, [removed, made]) = (if delete_begins { other } else { first }, ended);
            let told = format!("{told}: {removed:?}, {made:?}");

            if let Err(error) = &removed {
                assert!(matches!(error, Error::HasChildren { .. }), "{told}");
                refused[0] += 1;
            }
            if let Err(error) = &made {
                // Nobody asked for just this parent: that it goes is no reason to make no backup at all.
                assert_eq!(error.class(), Class::Unsuitable, "{told}");
                refused[1] += 1;
                cancel(&scene.engine(), &make).await;
            }
            match (removed, made) {
                (Ok(_), Ok(_)) => panic!("{told}"),
                (Err(_), Ok(_)) => scene.check_whole(&make, &told).await,
                (Err(_), Err(_)) => scene.check_gone(&told).await,
                (Ok(_), Err(_)) => assert_eq!(scene.everything().await, BTreeSet::new(), "{told}"),
            }
        }
    }
    assert!(refused.iter().all(|count| *count > 20), "{refused:?}");
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_deleted_while_it_is_read_is_not_told_as_damaged(
    #[values(false, true)] verifies: bool,
) {
    let jobs = |scene: &Scene| {
        let id = scene.parent.as_ref().unwrap().backup_id;
        let target = scene.bench.volumes().join("target");
        let read = if verifies { job(Work::Verify(id.into())) } else { restore_job(id, &target) };
        [read, job(Work::Delete(id))]
    };
    let mut calls = [0, 0];
    for (index, calls) in calls.iter_mut().enumerate() {
        let scene = Scene::new(Kind::Memory, true).await;
        *calls = scene.calls(&jobs(&scene)[index]).await;
    }
    let mut refused_count = 0;

    for read_at in 1..=calls[0] {
        for delete_at in 1..=calls[1] {
            let scene = Scene::new(Kind::Memory, true).await;
            let [read, remove] = jobs(&scene);
            let ([read, removed], told) = entangle(&scene, [(&read, read_at), (&remove, delete_at)]).await;
            let told = format!("{told}: {read:?}, {removed:?}");
            removed.expect(&told);
            if let Err(error) = read {
                assert!(matches!(error, Error::NotAvailable { .. } | Error::UnknownBackup(_)), "{told}");
                refused_count += 1;
            }
        }
    }
    assert!(refused_count > 20, "{refused_count}");
}

#[tokio::test]
async fn a_backup_that_is_half_deleted_never_seems_whole_again() {
    let scene = Scene::new(Kind::Posix, true).await;
    let engine = scene.engine();
    let half_deleted = scene.parent.clone().unwrap();
    let other = backup(&engine, VolumeId::random(), &scene.volume.path, Parent::None).await.unwrap();
    let job = job(Work::Delete(half_deleted.backup_id));
    // A delete that died when it had removed the object that makes the backup visible.
    let state = RecordState::Deleting(job.id);
    overwrite(&engine, &Record { state: state.clone(), ..half_deleted.clone() }).await;
    let metadata = format!("{}/{}_metadata", half_deleted.container, half_deleted.service_metadata);
    fs::remove_file(scene.bench.root().join(metadata)).unwrap();
    // And now nobody can tell whether something builds on it.
    let record = scene.bench.root().join(format!(".backhaul/records/{}.json", other.backup_id));
    fs::write(record, "damaged").unwrap();

    let error = run(&engine, &job).await.unwrap_err();

    assert!(matches!(error, Error::DamagedRecord { .. }), "{error}");
    let record = engine.catalog().record(half_deleted.backup_id).await.unwrap().unwrap();
    assert_eq!(record.state, state);
}

#[tokio::test]
async fn a_backup_is_newer_than_the_one_that_it_builds_on_whatever_the_clocks_say() {
    let scene = Scene::new(Kind::Posix, true).await;
    let engine = scene.engine();
    let parent = scene.parent.clone().unwrap();
    // Of a worker whose clock is ahead, or of a second attempt, which puts its time off by a second.
    let created_at = parent.created_at + jiff::SignedDuration::from_mins(5);
    overwrite(&engine, &Record { created_at, ..parent }).await;

    let child = backup(&engine, scene.volume_id, &scene.volume.path, Parent::Latest).await.unwrap();

    let none = backhaul::job::BackupId::random();
    let latest = engine.catalog().latest(scene.volume_id, none).await.unwrap().unwrap();
    assert_eq!(latest.backup_id, child.backup_id);
}
