//! The life of a job in the runner: put off, told once, fallen back, told again.

use std::fs;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use backhaul::engine::{Begun, Engine, KEPT};
use backhaul::error::Class;
use backhaul::event::{Error, EventSink};
use backhaul::job::{
    BackupId, Completion, Context, Event, Happening, Hold, Job, JobId, Limit, Mode, Outcome, Pace, Parent,
    RecordState, VolumeId, Work,
};
use backhaul::runner::{self, Attempts, Ended, Every, Report};
use jiff::{SignedDuration, Timestamp};
use rstest::rstest;
use rustix::io::Errno;
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::support::engine::{Bench, Kind, MEMORY_BYTES, SETTINGS, backup_job, job, restore_job, verify};
use crate::support::faulty::{Fault, Faulty};
use crate::support::volume::{Fill, Volume};

const NEVER: Every = Every::telling(Duration::from_secs(3600));

/// Remembers what it is told; refuses the end of a job while it is deaf.
#[derive(Default)]
struct Recorder {
    events: Mutex<Vec<Event>>,
    deaf: AtomicBool,
}

#[async_trait]
impl EventSink for Recorder {
    async fn send(&self, event: &Event) -> Result<(), Error> {
        if self.deaf.load(Ordering::SeqCst) && matches!(event.happening, Happening::Ended(_)) {
            return Err(Error { what: "ended", source: "nobody listens".into() });
        }
        self.events.lock().unwrap().push(event.clone());
        Ok(())
    }
}

impl Recorder {
    fn told(&self) -> Vec<String> {
        let word = |event: &Event| match &event.happening {
            Happening::Accepted => "accepted".into(),
            Happening::Started { method, attempt } => format!("started {method} {attempt}"),
            Happening::Progress(_) => "progress".into(),
            Happening::FellBack { from, to, .. } => format!("fell back from {from} to {to}"),
            Happening::Ended(_) => "ended".into(),
        };
        self.events.lock().unwrap().iter().map(word).collect()
    }

    fn outcomes(&self) -> Vec<Outcome> {
        let ends = self.events.lock().unwrap();
        let ends = ends.iter().filter_map(|event| match &event.happening {
            Happening::Ended(completion) => Some(completion.outcome.clone()),
            _ => None,
        });
        ends.collect()
    }

    fn ends(&self) -> usize {
        self.told().iter().filter(|word| *word == "ended").count()
    }
}

struct Scene {
    bench: Bench,
    job: Job,
}

impl Scene {
    fn new(parent: Parent) -> Self {
        let bench = Bench::new(Kind::Posix);
        let mut volume = Volume::create(bench.volumes().join("volume"), 5_000);
        volume.fill(0..5_000, Fill::Noise(1));
        let job = backup_job(VolumeId::random(), &volume.path, parent);
        Self { bench, job }
    }

    /// An engine whose store fails once, at the call of this number.
    fn faulty(&self, at: usize) -> (Faulty, Engine) {
        self.faulty_by(at, Fault::Refused(Errno::IO))
    }

    fn faulty_by(&self, at: usize, fault: Fault) -> (Faulty, Engine) {
        let faulty = Faulty::new(self.bench.store(), at, fault);
        let engine = self.bench.engine_on(Arc::new(faulty.clone()), SETTINGS, MEMORY_BYTES);
        (faulty, engine)
    }

    async fn run(&self, engine: &Engine, sink: &Recorder, current: u32, max: u32) -> Ended {
        let attempts = Attempts { current, max, seconds_max: 3600, ..Attempts::one() };
        self.run_as(engine, sink, &attempts).await
    }

    async fn run_as(&self, engine: &Engine, sink: &Recorder, attempts: &Attempts) -> Ended {
        let report = Report::new(sink, &self.job);
        runner::run(&Context::default(), engine, &self.job, attempts, NEVER, &report).await
    }

    /// The number of the call after which the job has been told to be begun.
    async fn calls_to_begin(&self, attempts: &Attempts) -> usize {
        let scene = Self::new(Parent::None);
        let (faulty, engine) = scene.faulty(usize::MAX);
        scene.run_as(&engine, &Recorder::default(), attempts).await;
        let is_first_of_backup = |name: &String| name.contains("records/");
        faulty.names().iter().position(is_first_of_backup).unwrap() + 1
    }

    /// The calls of a run that nothing happens to.
    async fn calls(&self) -> usize {
        let scene = Self::new(Parent::None);
        let (faulty, engine) = scene.faulty(usize::MAX);
        assert!(matches!(scene.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
        faulty.calls()
    }
}

#[tokio::test]
async fn a_store_error_that_may_pass_puts_the_job_off_and_the_next_try_ends_it_once() {
    let calls = Scene::new(Parent::None).calls().await;
    for at in 1..=calls {
        let scene = Scene::new(Parent::None);
        let (faulty, engine) = scene.faulty(at);
        let sink = Recorder::default();

        let first = scene.run(&engine, &sink, 1, 2).await;
        let last = match first {
            Ended::Later(problem) => {
                assert_eq!((problem.class, sink.ends()), (Class::Transient, 0), "{}", faulty.broke_at());
                scene.run(&scene.bench.engine(SETTINGS), &sink, 2, 2).await
            }
            over => over,
        };

        let Ended::Over(completion) = last else { panic!("{}: {last:?}", faulty.broke_at()) };
        assert_eq!(completion.outcome, Outcome::Succeeded, "{}", faulty.broke_at());
        assert_eq!(sink.ends(), 1, "{}", faulty.broke_at());
        let record =
            scene.bench.engine(SETTINGS).catalog().record(scene.job.backup_id()).await.unwrap().unwrap();
        assert_eq!(record.state, RecordState::Available, "{}", faulty.broke_at());
    }
}

#[tokio::test]
async fn the_last_try_ends_the_job_as_failed_and_keeps_nothing_but_the_record_of_it() {
    let calls = Scene::new(Parent::None).calls().await;
    let mut failed = 0;
    for at in 1..=calls {
        let scene = Scene::new(Parent::None);
        let (faulty, engine) = scene.faulty(at);
        let sink = Recorder::default();

        let Ended::Over(completion) = scene.run(&engine, &sink, 2, 2).await else {
            panic!("{}: the last try ends the job", faulty.broke_at())
        };

        assert_eq!(sink.ends(), 1, "{}", faulty.broke_at());
        let Outcome::Failed(problem) = &completion.outcome else { continue };
        failed += 1;
        assert_eq!(problem.class, Class::Transient, "{}", faulty.broke_at());
        let objects = scene.bench.everything([]).await;
        assert!(
            !objects.iter().any(|object| object.ends_with("_metadata")),
            "{}: {objects:?}",
            faulty.broke_at()
        );
    }
    assert!(failed > 5, "only {failed} of {calls} faults failed the job");
}

#[tokio::test]
async fn the_last_try_of_a_job_that_another_worker_took_over_leaves_it_to_that_one() {
    let calls = Scene::new(Parent::None).calls().await;
    let mut left = 0;
    for at in 1..=calls {
        let scene = Scene::new(Parent::None);
        let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (faulty, engine) = scene.faulty_by(at, Fault::Pause(reached.clone(), go_on.clone()));
        let (sink, other_engine, other_sink) =
            (Recorder::default(), scene.bench.engine(SETTINGS), Recorder::default());
        let other = async {
            reached.notified().await;
            let ended = scene.run(&other_engine, &other_sink, 2, 2).await;
            go_on.notify_one();
            ended
        };
        let (ended, other_ended) = tokio::join!(scene.run(&engine, &sink, 2, 2), other);
        let told = faulty.broke_at();
        match ended {
            Ended::Later(problem) => {
                left += 1;
                assert_eq!((problem.class, sink.ends()), (Class::Transient, 0), "{told}: {problem}");
            }
            // It had not begun yet, and found the job done; or it had done it, and the other one found that.
            Ended::Over(completion) => {
                assert_eq!(completion.outcome, Outcome::Succeeded, "{told}")
            }
            ended => panic!("{told}: {ended:?}"),
        }
        let Ended::Over(completion) = other_ended else { panic!("{told}: {other_ended:?}") };
        assert_eq!((completion.outcome, other_sink.ends()), (Outcome::Succeeded, 1), "{told}");
        verify(&other_engine, scene.job.backup_id()).await.expect(&told);
    }
    assert!(left > 5, "only {left} of {calls}");
}

/// A job of one kind, ready to be run.
async fn ready(is_delete: bool) -> Scene {
    let mut scene = Scene::new(Parent::None);
    if is_delete {
        let ended = scene.run(&scene.bench.engine(SETTINGS), &Recorder::default(), 1, 1).await;
        assert!(matches!(ended, Ended::Over(_)), "{ended:?}");
        scene.job = job(Work::Delete(scene.job.backup_id()));
    }
    scene
}

#[rstest]
#[case::backup(false)]
#[case::delete(true)]
#[tokio::test]
async fn a_job_that_is_taken_up_after_its_deadline_fails_and_is_not_begun(#[case] is_delete: bool) {
    let mut scene = ready(is_delete).await;
    let before = scene.bench.everything([]).await;
    scene.job.deadline = Some(Timestamp::now() - SignedDuration::from_secs(1));
    let (sink, engine) = (Recorder::default(), scene.bench.engine(SETTINGS));

    // There could be more attempts.
    let ended = scene.run(&engine, &sink, 1, 3).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    let Outcome::Failed(problem) = &completion.outcome else { panic!("{completion:?}") };
    assert!(problem.message.contains("deadline"), "{problem}");
    assert_eq!((problem.class, completion.account.attempt_count), (Class::Permanent, 0));
    assert_eq!(sink.told(), ["accepted", "ended"]);
    engine.catalog().settle(scene.job.id).await.unwrap();
    assert_eq!(scene.bench.everything([]).await, before);
}

#[rstest]
#[case::nobody_else_wants_its_end(false)]
#[case::cancelled(true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_runs_at_its_deadline_is_stopped_as_for_a_cancel(#[case] is_cancelled: bool) {
    let mut scene = Scene::new(Parent::None);
    // It would take more than an hour.
    let pace = Pace::new(Limit::new(NonZeroU64::new(1)), Arc::default());
    let ctx = Context { pace, ..Context::default() };
    scene.job.deadline = Some(Timestamp::now() + SignedDuration::from_millis(500));
    if is_cancelled {
        ctx.cancel.cancel();
        scene.job.deadline = Some(Timestamp::now());
    }
    let (sink, engine) = (Recorder::default(), scene.bench.engine(SETTINGS));
    let (report, attempts) = (Report::new(&sink, &scene.job), Attempts { max: 3, ..Attempts::one() });

    let ended = runner::run(&ctx, &engine, &scene.job, &attempts, NEVER, &report).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    engine.catalog().settle(scene.job.id).await.unwrap();
    let left: Vec<String> = scene.bench.everything([]).await.into_iter().collect();
    match completion.outcome {
        Outcome::Cancelled => assert!(is_cancelled && left.is_empty(), "{left:?}"),
        Outcome::Failed(problem) => {
            assert!(!is_cancelled && problem.message.contains("deadline"), "{problem}");
            assert_eq!(completion.account.attempt_count, 1);
            assert_eq!(left, [format!(".backhaul/records/{}.json", scene.job.backup_id())]);
        }
        Outcome::Succeeded => panic!("too fast"),
    }
}

#[tokio::test]
async fn a_job_that_was_done_in_time_is_told_so_also_after_its_deadline() {
    let mut scene = Scene::new(Parent::None);
    let (engine, again) = (scene.bench.engine(SETTINGS), Attempts { redelivered: true, ..Attempts::one() });
    assert!(matches!(scene.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    // With what is kept of its end, and without.
    for _ in 0..2 {
        scene.job.deadline = Some(Timestamp::now());
        let Ended::Over(completion) = scene.run_as(&engine, &Recorder::default(), &again).await else {
            panic!("it is over")
        };
        assert_eq!(completion.outcome, Outcome::Succeeded);
        engine.catalog().settle(scene.job.id).await.unwrap();
    }
}

/// The worker that did the job had died, so that its end is kept for some days.
#[tokio::test]
async fn a_job_that_is_sent_once_more_after_its_end_is_not_left_without_an_answer() {
    let mut scene = Scene::new(Parent::None);
    let engine = scene.bench.engine(SETTINGS);
    assert!(matches!(scene.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let (backup_id, target) = (scene.job.backup_id(), scene.bench.volumes().join("target"));
    for job in [scene.job.clone(), restore_job(backup_id, &target), job(Work::Verify(backup_id.into()))] {
        scene.job = job;
        let again = Attempts { redelivered: true, ..Attempts::one() };
        let Ended::Over(first) = scene.run_as(&engine, &Recorder::default(), &again).await else {
            panic!("it is over")
        };
        engine.catalog().keep_told(&first).await.unwrap();
        let before = scene.bench.everything([]).await;

        // It may have had to wait for a place, or for its volume.
        for waited in [false, true] {
            let sink = Recorder::default();
            let sent = Attempts { waited, ..Attempts::one() };
            let Ended::OverBefore(completion) = scene.run_as(&engine, &sink, &sent).await else {
                panic!("it is over")
            };
            assert_eq!((&completion, sink.outcomes()), (&first, vec![Outcome::Succeeded]));
        }
        // The message that the broker hands out once more is no other one.
        let sink = Recorder::default();
        assert!(matches!(scene.run_as(&engine, &sink, &again).await, Ended::Over(_)));
        assert_eq!(sink.ends(), 0);
        assert_eq!(scene.bench.everything([]).await, before);
    }
}

#[tokio::test]
async fn a_restore_to_another_target_under_the_id_of_one_that_has_ended_is_not_told_as_done() {
    let mut scene = Scene::new(Parent::None);
    let engine = scene.bench.engine(SETTINGS);
    assert!(matches!(scene.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let [first, other] = ["first", "other"].map(|name| scene.bench.volumes().join(name));
    scene.job = restore_job(scene.job.backup_id(), &first);
    let Ended::Over(told) = scene.run(&engine, &Recorder::default(), 1, 1).await else {
        panic!("it is over")
    };
    engine.catalog().keep_told(&told).await.unwrap();

    scene.job = Job { id: scene.job.id, ..restore_job(scene.job.backup_id(), &other) };
    let Ended::OverBefore(completion) = scene.run(&engine, &Recorder::default(), 1, 1).await else {
        panic!("it is over")
    };

    let Outcome::Failed(problem) = &completion.outcome else { panic!("{completion:?}") };
    assert!(problem.to_string().contains("another one"), "{problem}");
    assert!(first.exists() && !other.exists());
}

#[tokio::test]
async fn what_is_damaged_of_a_jobs_end_stays_for_people_to_look_at() {
    let scene = Scene::new(Parent::None);
    let outcomes = scene.bench.root().join(".backhaul/outcomes");
    std::fs::create_dir_all(&outcomes).unwrap();
    let damaged = outcomes.join(format!("{}.json", scene.job.id));
    std::fs::write(&damaged, "{").unwrap();

    let ended = scene.run(&scene.bench.engine(SETTINGS), &Recorder::default(), 1, 1).await;

    let Ended::OverBefore(completion) = ended else { panic!("{ended:?}") };
    let Outcome::Failed(problem) = &completion.outcome else { panic!("{completion:?}") };
    assert!(problem.to_string().contains("move that file away"), "{problem}");
    assert!(damaged.exists());
}

#[tokio::test]
async fn a_delete_whose_record_cannot_be_removed_is_told_with_its_attempt() {
    let scene = ready(true).await;
    let marks = scene.bench.root().join(".backhaul/verified");
    std::fs::remove_dir_all(&marks).ok();
    std::fs::write(&marks, "no folder").unwrap();

    let ended = scene.run(&scene.bench.engine(SETTINGS), &Recorder::default(), 1, 1).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    assert!(matches!(completion.outcome, Outcome::Failed(_)), "{completion:?}");
    assert_eq!(completion.account.attempt_count, 1);
    assert!(completion.account.method.is_some());
}

/// A producer that counts its jobs, and has begun to count anew.
#[rstest]
#[case::another_volume_under_the_same_backup_id(true, false)]
#[case::another_backup(false, false)]
#[case::another_volume_when_nothing_is_kept_of_the_first_jobs_end(true, true)]
#[tokio::test]
async fn a_job_under_the_id_of_another_one_that_has_ended_is_not_told_as_done(
    #[case] same_backup_id: bool,
    #[case] is_settled: bool,
) {
    let mut scene = Scene::new(Parent::None);
    let engine = scene.bench.engine(SETTINGS);
    assert!(matches!(scene.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let first_id = scene.job.backup_id();
    if is_settled {
        engine.catalog().settle(scene.job.id).await.unwrap();
    }
    let before = scene.bench.everything([]).await;
    if let Work::Backup(work) = &mut scene.job.work {
        work.volume_id = VolumeId::random();
        work.backup_id = if same_backup_id { first_id } else { BackupId::random() };
    }

    let sink = Recorder::default();
    let completion = match scene.run(&engine, &sink, 1, 1).await {
        Ended::Over(completion) if is_settled => completion,
        // What is kept of the first job's end stays.
        Ended::OverBefore(completion) if !is_settled => completion,
        ended => panic!("{ended:?}"),
    };

    let Outcome::Failed(problem) = &completion.outcome else { panic!("{completion:?}") };
    assert_eq!((problem.class, sink.ends()), (Class::Permanent, 1), "{problem}");
    assert!(problem.to_string().contains(&first_id.to_string()), "{problem}");
    let left = scene.bench.everything([]).await;
    assert!(left.is_superset(&before), "{before:?} {left:?}");
    verify(&engine, first_id).await.unwrap();
}

#[tokio::test]
async fn a_job_whose_store_is_away_is_not_put_off_beyond_its_deadline() {
    let mut scene = Scene::new(Parent::None);
    scene.job.deadline = Some(Timestamp::now());
    let (_, engine) = scene.faulty(1);

    let ended = scene.run(&engine, &Recorder::default(), 1, 3).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    let Outcome::Failed(problem) = &completion.outcome else { panic!("{completion:?}") };
    assert!(problem.message.contains("deadline") && problem.causes.len() == 1, "{problem}");
}

/// A restore of a backup, and the scene that it is in.
async fn ready_to_restore() -> Scene {
    let mut scene = ready(false).await;
    let ended = scene.run(&scene.bench.engine(SETTINGS), &Recorder::default(), 1, 1).await;
    assert!(matches!(ended, Ended::Over(_)), "{ended:?}");
    scene.job = restore_job(scene.job.backup_id(), &scene.bench.volumes().join("target"));
    scene
}

/// A worker that stands still at the first data object of a restore.
async fn paused_in_a_restore(scene: &Scene) -> (Engine, Arc<Notify>, Arc<Notify>) {
    let other = ready_to_restore().await;
    let (counting, engine) = other.faulty(usize::MAX);
    assert!(matches!(other.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let is_data = |name: &String| name.starts_with("get") && name.ends_with("-00001");
    let at = counting.names().iter().rposition(is_data).unwrap() + 1;
    let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (_, engine) = scene.faulty_by(at, Fault::Pause(reached.clone(), go_on.clone()));
    (engine, reached, go_on)
}

/// What a job does when something happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Backup,
    Restore,
    Delete,
}

/// What was under way at the store when the cancel came failed, and might have succeeded later: the job was put off, for as long as
/// the next attempt has to wait.
#[rstest]
#[case::backup(Doing::Backup)]
#[case::restore(Doing::Restore)]
#[case::delete(Doing::Delete)]
#[tokio::test]
async fn a_cancel_while_a_request_fails_that_may_be_tried_again_ends_the_job_now(#[case] doing: Doing) {
    let ready = async || match doing {
        Doing::Backup => ready(false).await,
        Doing::Restore => ready_to_restore().await,
        Doing::Delete => ready(true).await,
    };
    let other = ready().await;
    let (counting, engine) = other.faulty(usize::MAX);
    assert!(matches!(other.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let action = match doing {
        Doing::Backup => "put",
        Doing::Restore => "get",
        Doing::Delete => "delete",
    };
    let is_of_data = |name: &String| name.starts_with(action) && name.ends_with("-00001");
    let at = counting.names().iter().rposition(is_of_data).unwrap() + 1;
    let scene = ready().await;
    let (ctx, sink) = (Context::default(), Recorder::default());
    let failing = Faulty::new(scene.bench.store(), at, Fault::Refused(Errno::IO));
    let cancelling = Faulty::new(Arc::new(failing.clone()), at, Fault::Cancel(ctx.cancel.clone()));
    let engine = scene.bench.engine_on(Arc::new(cancelling), SETTINGS, MEMORY_BYTES);
    let (report, attempts) = (Report::new(&sink, &scene.job), Attempts { max: 3, ..Attempts::one() });

    let ended = runner::run(&ctx, &engine, &scene.job, &attempts, NEVER, &report).await;

    let Ended::Over(completion) = ended else { panic!("{}: {ended:?}", failing.broke_at()) };
    assert_eq!((completion.outcome, sink.ends()), (Outcome::Cancelled, 1), "{}", failing.broke_at());
    assert_eq!(scene.bench.volume_names(), ["volume".to_owned()].into());
    if doing == Doing::Backup {
        engine.catalog().settle(scene.job.id).await.unwrap();
        assert_eq!(scene.bench.everything([]).await, [].into());
    }
}

/// Its worker died right behind its end, and the sender, who did not know that the message had arrived, had sent it once more.
#[tokio::test]
async fn how_a_job_ended_is_not_forgotten_when_a_copy_is_told_it_before_its_own_message_comes_again() {
    let scene = ready_to_restore().await;
    let engine = scene.bench.engine(SETTINGS);
    let deaf = Recorder { deaf: true.into(), ..Recorder::default() };
    assert!(matches!(scene.run(&engine, &deaf, 1, 3).await, Ended::Untold(_)));
    let sink = Recorder::default();

    let copy = scene.run(&engine, &sink, 1, 3).await;

    // What is kept is left alone by whoever settles its message.
    assert!(matches!(copy, Ended::OverBefore(_)), "{copy:?}");
    fs::remove_file(scene.bench.volumes().join("target")).unwrap();
    let again = Attempts { redelivered: true, ..Attempts::one() };
    let Ended::Over(completion) = scene.run_as(&engine, &sink, &again).await else { panic!("it is over") };
    assert_eq!((completion.outcome, sink.ends()), (Outcome::Succeeded, 1));
    assert!(!scene.bench.volumes().join("target").exists(), "it was written again");
    engine.catalog().sweep(Timestamp::now()).await.unwrap();
    assert_eq!(engine.catalog().outcome(scene.job.id).await.unwrap(), None, "it would stay for ever");
}

/// It was told all the same: had the ack been lost, the restore would have been written again, over what somebody used by then.
#[tokio::test]
async fn a_job_whose_end_a_full_store_cannot_keep_is_not_told_while_it_may_be_tried_again() {
    for (current, is_last) in [(1, false), (3, true)] {
        let other = ready_to_restore().await;
        let (counting, engine) = other.faulty(usize::MAX);
        assert!(matches!(other.run(&engine, &Recorder::default(), current, 3).await, Ended::Over(_)));
        let is_written = |name: &String| name.contains(" .backhaul/outcomes/") && !name.starts_with("get");
        let at = counting.names().iter().rposition(is_written).unwrap() + 1;
        let (scene, sink) = (ready_to_restore().await, Recorder::default());
        let (faulty, engine) = scene.faulty_by(at, Fault::Refused(Errno::NOSPC));

        let ended = scene.run(&engine, &sink, current, 3).await;

        let told = faulty.broke_at();
        assert!(told.contains(" .backhaul/outcomes/"), "{told}");
        match ended {
            Ended::Later(problem) => {
                assert_eq!((is_last, problem.class, sink.ends()), (false, Class::Transient, 0), "{problem}");
            }
            Ended::Over(completion) => {
                assert_eq!(
                    (is_last, completion.outcome, sink.ends()),
                    (true, Outcome::Succeeded, 1),
                    "{told}"
                );
            }
            ended => panic!("{ended:?}"),
        }
    }
}

/// The first one was cut off from the broker, and goes on for longer than all tries of the second one take.
#[tokio::test]
async fn a_restore_that_another_run_still_does_waits_for_its_end_and_is_not_told_as_failed() {
    let scene = ready_to_restore().await;
    let (engine, reached, go_on) = paused_in_a_restore(&scene).await;
    let (sink, other_engine) = (Recorder::default(), scene.bench.engine(SETTINGS));
    let mut attempts = Attempts { redelivered: true, max: 3, seconds_max: 3600, ..Attempts::one() };
    let others = async {
        reached.notified().await;
        for current in 1..=4 {
            let ended = scene.run_as(&other_engine, &sink, &attempts).await;
            let Ended::Later(problem) = ended else { panic!("{current}: {ended:?}") };
            assert!(problem.to_string().contains("in use"), "{problem}");
            let earlier = attempts.clone().and_this(&problem);
            attempts = Attempts { current: current + 1, earlier, redelivered: false, ..attempts.clone() };
        }
        go_on.notify_one();
    };
    let (first, ()) = tokio::join!(scene.run(&engine, &sink, 1, 3), others);

    // It leaves what there is to whoever has the job now.
    assert!(matches!(&first, Ended::Later(problem) if problem.message.contains("taken over")), "{first:?}");
    assert!(!scene.bench.volumes().join("target").exists());
    assert!(scene.bench.volume_names().iter().any(|name| name.starts_with(".target")));
    let Ended::Over(completion) = scene.run_as(&other_engine, &sink, &attempts).await else {
        panic!("it ends")
    };
    assert_eq!((completion.outcome, sink.ends()), (Outcome::Succeeded, 1));
    let [restored, volume] = ["target", "volume"].map(|name| fs::read(scene.bench.volumes().join(name)));
    assert_eq!(restored.unwrap(), volume.unwrap());
}

#[tokio::test]
async fn a_restore_that_was_told_as_failed_meanwhile_makes_nothing_visible() {
    let scene = ready_to_restore().await;
    let (engine, reached, go_on) = paused_in_a_restore(&scene).await;
    let (sink, other_engine) = (Recorder::default(), scene.bench.engine(SETTINGS));
    let again = Attempts { redelivered: true, max: 3, seconds_max: 3600, ..Attempts::one() };
    let other = async {
        reached.notified().await;
        let ended = scene.run_as(&other_engine, &sink, &again).await;
        let Ended::Later(problem) = ended else { panic!("{ended:?}") };
        // No time is left.
        let attempts =
            Attempts { current: 2, seconds_max: 0, earlier: again.and_this(&problem), ..Attempts::one() };
        let ended = scene.run_as(&other_engine, &sink, &attempts).await;
        go_on.notify_one();
        ended
    };
    let (first, other) = tokio::join!(scene.run(&engine, &sink, 1, 3), other);

    let Ended::Over(completion) = other else { panic!("{other:?}") };
    assert!(matches!(completion.outcome, Outcome::Failed(_)), "{completion:?}");
    assert!(matches!(first, Ended::Later(_)) && sink.ends() == 1, "{first:?}");
    assert_eq!(scene.bench.volume_names(), ["volume".to_owned()].into());
}

#[tokio::test]
async fn a_restore_onto_what_somebody_uses_who_is_no_run_of_the_job_fails_after_all_tries() {
    let scene = ready_to_restore().await;
    let target = fs::File::create(scene.bench.volumes().join("target")).unwrap();
    target.lock().unwrap();

    let ended = scene.run(&scene.bench.engine(SETTINGS), &Recorder::default(), 3, 3).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    let Outcome::Failed(problem) = completion.outcome else { panic!("{:?}", completion.outcome) };
    assert!(problem.to_string().contains("in use"), "{problem}");
}

#[tokio::test]
async fn a_restore_that_left_a_part_of_the_backup_on_what_was_there_says_so_and_no_other_does() {
    let other = ready_to_restore().await;
    let (counting, engine) = other.faulty(usize::MAX);
    assert!(matches!(other.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let is_last_object = |name: &String| name.starts_with("get") && name.ends_with("-00003");
    let at = counting.names().iter().rposition(is_last_object).unwrap() + 1;
    let (one, more) = (Attempts::one(), Attempts { max: 3, seconds_max: 3600, ..Attempts::one() });
    let again = Attempts { redelivered: true, ..Attempts::one() };
    let before_that = Attempts { current: 2, target_unfinished: true, ..more.clone() };
    for (was_there, is_cancelled, attempts, expected) in [
        (true, false, &one, Some(true)),
        (false, false, &one, Some(false)),
        (true, true, &one, Some(false)),
        // It may be told later.
        (true, false, &more, None),
        (true, true, &before_that, Some(true)),
        // Nobody knows what the worker had done by then that died.
        (true, true, &again, Some(true)),
        (false, true, &again, Some(false)),
    ] {
        let told = format!("{was_there} {is_cancelled} {attempts:?}");
        let scene = ready_to_restore().await;
        if was_there {
            fs::write(scene.bench.volumes().join("target"), [7; 5_000]).unwrap();
        }
        let ctx = Context::default();
        if is_cancelled {
            ctx.cancel.cancel();
        }
        let (_, engine) = scene.faulty(at);
        let sink = Recorder::default();
        let report = Report::new(&sink, &scene.job);

        let ended = runner::run(&ctx, &engine, &scene.job, attempts, NEVER, &report).await;

        match (ended, expected) {
            (Ended::Over(completion), Some(expected)) => {
                assert_ne!(completion.outcome, Outcome::Succeeded, "{told}");
                assert_eq!(completion.account.target_unfinished, expected, "{told}");
            }
            (Ended::Later(_), None) => assert!(ctx.progress.is_target_unfinished(), "{told}"),
            (ended, _) => panic!("{told}: {ended:?}"),
        }
    }
}

/// A worker stands still at each of its calls, is cut off, and goes on when another one, which was handed its job, has done
/// that; then the message comes once more. One of the two may be asked to end the job.
#[rstest]
#[case::backup(false, [false, false])]
#[case::backup_whose_first_run_is_cancelled(false, [true, false])]
#[case::backup_whose_second_run_is_cancelled(false, [false, true])]
#[case::delete(true, [false, false])]
#[tokio::test]
async fn two_workers_with_the_same_job_do_not_say_two_things(
    #[case] is_delete: bool,
    #[case] cancelled: [bool; 2],
) {
    let scene = ready(is_delete).await;
    let (counting, engine) = scene.faulty(usize::MAX);
    assert!(matches!(scene.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let calls = counting.calls();
    let (first_try, again) = (Attempts::one(), Attempts { redelivered: true, ..Attempts::one() });
    for at in 1..=calls {
        let scene = ready(is_delete).await;
        let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (faulty, engine) = scene.faulty_by(at, Fault::Pause(reached.clone(), go_on.clone()));
        let (sink, other_engine) = (Recorder::default(), scene.bench.engine(SETTINGS));
        let contexts = [Context::default(), Context::default()];
        let report = Report::new(&sink, &scene.job);
        let first = runner::run(&contexts[0], &engine, &scene.job, &first_try, NEVER, &report);
        let second = async {
            reached.notified().await;
            if cancelled[1] {
                contexts[1].cancel.cancel();
            }
            let ended = runner::run(&contexts[1], &other_engine, &scene.job, &again, NEVER, &report).await;
            if let Ended::Over(completion) = &ended {
                other_engine.catalog().keep_told(completion).await.unwrap();
            }
            if cancelled[0] {
                contexts[0].cancel.cancel();
            }
            go_on.notify_one();
            ended
        };
        let (first, second) = tokio::join!(first, second);
        let told = faulty.broke_at();
        let third = scene.run_as(&other_engine, &sink, &again).await;

        let Ended::Over(third) = third else { panic!("{told}: {third:?}") };
        for ended in [first, second] {
            match ended {
                Ended::Over(completion) | Ended::OverBefore(completion) => {
                    assert_eq!(completion.outcome, third.outcome, "{told}");
                }
                Ended::Later(problem) => assert_eq!(problem.class, Class::Transient, "{told}: {problem}"),
                ended => panic!("{told}: {ended:?}"),
            }
        }
        let outcomes = sink.outcomes();
        assert!(
            !outcomes.is_empty() && outcomes.iter().all(|it| *it == third.outcome),
            "{told}: {outcomes:?}"
        );
        let record = other_engine.catalog().record(scene.job.backup_id()).await.unwrap();
        match third.outcome {
            Outcome::Succeeded if !is_delete => {
                assert_eq!(record.unwrap().state, RecordState::Available, "{told}");
                verify(&other_engine, scene.job.backup_id()).await.expect(&told);
            }
            _ => {
                let left = scene.bench.everything([]).await;
                assert!(left.iter().all(|object| object.contains("outcomes")), "{told}: {left:?}");
            }
        }
    }
}

/// A worker is told to hand its jobs back at each call of one; then the message comes again.
#[rstest]
#[case::backup(false)]
#[case::delete(true)]
#[tokio::test]
async fn a_job_that_is_handed_back_has_not_ended_and_the_next_worker_ends_it(#[case] is_delete: bool) {
    let scene = ready(is_delete).await;
    let (counting, engine) = scene.faulty(usize::MAX);
    assert!(matches!(scene.run(&engine, &Recorder::default(), 1, 1).await, Ended::Over(_)));
    let mut handed_back = 0;
    for at in 1..=counting.calls() {
        let scene = ready(is_delete).await;
        let hand_back = CancellationToken::new();
        let (faulty, engine) = scene.faulty_by(at, Fault::Cancel(hand_back.clone()));
        let (sink, attempts) = (Recorder::default(), Attempts::one());
        let (report, other_engine) = (Report::new(&sink, &scene.job), scene.bench.engine(SETTINGS));
        let cancel = hand_back.child_token();
        let ctx = Context { cancel, hand_back, ..Context::default() };

        let first = runner::run(&ctx, &engine, &scene.job, &attempts, NEVER, &report).await;
        let told = faulty.broke_at();
        match first {
            Ended::HandedBack => {
                handed_back += 1;
                assert_eq!(sink.ends(), 0, "{told}");
            }
            // It had come too far to be stopped.
            Ended::Over(completion) => assert_eq!(completion.outcome, Outcome::Succeeded, "{told}"),
            ended => panic!("{told}: {ended:?}"),
        }

        let again = Attempts { redelivered: true, ..Attempts::one() };
        let second = scene.run_as(&other_engine, &sink, &again).await;
        let Ended::Over(completion) = second else { panic!("{told}: {second:?}") };
        assert_eq!(completion.outcome, Outcome::Succeeded, "{told}");
        if !is_delete {
            verify(&other_engine, scene.job.backup_id()).await.expect(&told);
        }
    }
    assert!(handed_back > 1, "it was never handed back");
}

#[tokio::test]
async fn an_end_that_could_not_be_told_is_told_later_without_doing_the_job_again() {
    let scene = Scene::new(Parent::None);
    let engine = scene.bench.engine(SETTINGS);
    let sink = Recorder::default();
    sink.deaf.store(true, Ordering::SeqCst);
    assert!(matches!(scene.run(&engine, &sink, 1, 3).await, Ended::Untold(_)));
    let before = scene.bench.everything([]).await;

    sink.deaf.store(false, Ordering::SeqCst);
    let again = Attempts { redelivered: true, ..Attempts::one() };
    let Ended::Over(completion) = scene.run_as(&engine, &sink, &again).await else { panic!("told now") };

    assert_eq!(completion.outcome, Outcome::Succeeded);
    assert_eq!(completion.account.counts.bytes_read, 5_000);
    assert_eq!(sink.told(), ["accepted", "started chunked full 1", "ended"]);
    assert_eq!(scene.bench.everything([]).await, before);
    engine.catalog().settle(scene.job.id).await.unwrap();
    assert_eq!(engine.catalog().outcome(scene.job.id).await.unwrap(), None);
}

#[tokio::test]
async fn an_incremental_backup_without_anything_to_build_on_falls_back_and_says_why() {
    let scene = Scene::new(Parent::Latest);
    let sink = Recorder::default();

    let Ended::Over(completion) = scene.run(&scene.bench.engine(SETTINGS), &sink, 1, 1).await else {
        panic!("it ends")
    };

    let steps = [
        "accepted",
        "started chunked incremental 1",
        "fell back from chunked incremental to chunked full",
        "started chunked full 2",
        "ended",
    ];
    assert_eq!(sink.told(), steps);
    assert_eq!(completion.account.method.unwrap().mode, Some(Mode::Full));
    let reason = completion.account.fallback_reason.unwrap();
    assert!(reason.message.contains("no earlier backup"), "{reason}");
}

#[tokio::test]
async fn the_last_attempt_tells_of_those_before_it_and_is_the_last_when_the_time_is_over() {
    let scene = Scene::new(Parent::None);
    let sink = Recorder::default();
    let mut attempts = Attempts { current: 1, max: 100, seconds_max: 3600, ..Attempts::one() };
    for current in 1..=20 {
        let (_, engine) = scene.faulty(2);
        let Ended::Later(problem) = scene.run_as(&engine, &sink, &attempts).await else {
            panic!("{current}")
        };
        let earlier = attempts.and_this(&problem);
        attempts = Attempts { current: current + 1, max: 100, seconds_max: 3600, earlier, ..Attempts::one() };
    }
    // It was put off for the first time a moment ago, and that is too long.
    attempts.seconds_max = 0;
    let (_, engine) = scene.faulty(2);
    let Ended::Over(completion) = scene.run_as(&engine, &sink, &attempts).await else {
        panic!("no time is left")
    };
    assert!(matches!(completion.outcome, Outcome::Failed(_)), "{:?}", completion.outcome);
    let told = completion.account.earlier_attempts;
    let numbers: Vec<u32> = told.iter().map(|attempt| attempt.attempt).collect();
    assert_eq!(numbers, [1, 12, 13, 14, 15, 16, 17, 18, 19, 20], "the first one and the latest");
    assert!(told[0].error.contains(".backhaul/"), "{told:?}");
}

#[tokio::test]
async fn a_job_that_is_brought_back_is_done_anew_and_not_told_again() {
    let scene = Scene::new(Parent::None);
    let sink = Recorder::default();
    let path = scene.bench.volumes().join("volume");
    let away = scene.bench.volumes().join("away");
    std::fs::rename(&path, &away).unwrap();
    let engine = scene.bench.engine(SETTINGS);
    let Ended::Over(failed) = scene.run(&engine, &sink, 1, 1).await else { panic!("it ends") };
    assert!(matches!(failed.outcome, Outcome::Failed(_)), "{failed:?}");
    // How it ended is not forgotten yet: a delivery of before only tells it again.
    let redelivered = Attempts { redelivered: true, ..Attempts::one() };
    let Ended::Over(again) = scene.run_as(&engine, &sink, &redelivered).await else { panic!("it ends") };
    assert_eq!(again, failed);

    std::fs::rename(&away, &path).unwrap();
    let attempts = Attempts { revival_count: 1, ..Attempts::one() };
    let Ended::Over(done) = scene.run_as(&engine, &sink, &attempts).await else { panic!("it ends") };
    assert_eq!((done.outcome, done.account.revival_count), (Outcome::Succeeded, 1));
    verify(&engine, scene.job.backup_id()).await.unwrap();
}

#[tokio::test]
async fn a_job_that_was_cancelled_before_it_was_taken_up_ends_as_cancelled() {
    let scene = Scene::new(Parent::None);
    let (engine, sink) = (scene.bench.engine(SETTINGS), Recorder::default());
    engine.catalog().cancel(scene.job.id, Timestamp::now()).await.unwrap();
    let Ended::Over(completion) = scene.run(&engine, &sink, 1, 1).await else { panic!("it ends") };
    assert_eq!(completion.outcome, Outcome::Cancelled);
    engine.catalog().settle(scene.job.id).await.unwrap();
    engine.catalog().forget_cancel(scene.job.id).await.unwrap();
    assert!(scene.bench.everything([]).await.is_empty(), "{:?}", scene.bench.everything([]).await);
}

/// Somebody asked for the end of a job that had failed already.
#[tokio::test]
async fn a_job_that_is_brought_back_is_not_ended_by_a_cancel_from_before_that() {
    let scene = Scene::new(Parent::None);
    let (engine, sink) = (scene.bench.engine(SETTINGS), Recorder::default());
    engine.catalog().cancel(scene.job.id, Timestamp::now()).await.unwrap();
    let revived_at = Some(Timestamp::now());
    let attempts = Attempts { revival_count: 1, revived_at, ..Attempts::one() };
    // It takes longer than until the store is asked once more.
    let pace = Pace::new(Limit::new(NonZeroU64::new(600)), Arc::default());
    let ctx = Context { pace, ..Context::default() };
    let report = Report::new(&sink, &scene.job);

    let ended = runner::run(&ctx, &engine, &scene.job, &attempts, NEVER, &report).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    assert_eq!(completion.outcome, Outcome::Succeeded);
    assert!(completion.account.seconds > 5.0, "it was over too soon: {}", completion.account.seconds);
}

#[tokio::test]
async fn a_job_that_is_brought_back_and_cancelled_after_that_ends_as_cancelled() {
    let scene = Scene::new(Parent::None);
    let (engine, sink) = (scene.bench.engine(SETTINGS), Recorder::default());
    let revived_at = Timestamp::now();
    engine.catalog().cancel(scene.job.id, Timestamp::now()).await.unwrap();
    // Another one, from before that, could not be kept at once.
    engine.catalog().cancel(scene.job.id, revived_at - SignedDuration::from_secs(1)).await.unwrap();
    let attempts = Attempts { revival_count: 1, revived_at: Some(revived_at), ..Attempts::one() };

    let ended = scene.run_as(&engine, &sink, &attempts).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    assert_eq!(completion.outcome, Outcome::Cancelled);
}

#[tokio::test]
async fn that_a_job_was_cancelled_is_also_seen_by_a_run_that_finds_it_ended() {
    let scene = Scene::new(Parent::None);
    let (engine, sink) = (scene.bench.engine(SETTINGS), Recorder::default());
    engine.catalog().cancel(scene.job.id, Timestamp::now()).await.unwrap();
    let Ended::Over(ended) = scene.run(&engine, &sink, 1, 1).await else { panic!("it ends") };
    assert_eq!(ended.outcome, Outcome::Cancelled);
    // Whoever ended it could not settle its delivery, and so has forgotten nothing.
    let (ctx, attempts) = (Context::default(), Attempts { redelivered: true, ..Attempts::one() });
    let report = Report::new(&sink, &scene.job);
    let Ended::Over(again) = runner::run(&ctx, &engine, &scene.job, &attempts, NEVER, &report).await else {
        panic!("it is over")
    };
    assert_eq!(again, ended);
    assert!(ctx.cancel.is_cancelled());
}

#[tokio::test]
async fn a_job_that_ends_its_workers_is_begun_so_often_and_no_more() {
    let scene = Scene::new(Parent::None);
    let (engine, sink) = (scene.bench.engine(SETTINGS), Recorder::default());
    let attempts = Attempts { max: 3, seconds_max: 60, ..Attempts::one() };
    let again = Attempts { redelivered: true, ..attempts.clone() };
    // Before it writes anything of the backup, so that each run costs little.
    let begin_and_die = async |attempts: &Attempts| {
        let (faulty, engine) = scene.faulty_by(scene.calls_to_begin(attempts).await, Fault::Death);
        tokio::select! {
            ended = scene.run_as(&engine, &sink, attempts) => panic!("{}: {ended:?}", faulty.broke_at()),
            () = faulty.died() => {}
        }
    };
    begin_and_die(&attempts).await;
    for _ in 1..=20 {
        begin_and_die(&again).await;
    }
    let told = sink.told();
    assert_eq!(told.last().unwrap(), "started chunked full 21", "{told:?}");

    let Ended::Over(completion) = scene.run_as(&engine, &sink, &again).await else { panic!("it ends") };
    let Outcome::Failed(problem) = &completion.outcome else { panic!("{:?}", completion.outcome) };
    assert!(problem.message.contains("21 times"), "{problem}");
    assert_eq!(sink.told().len(), told.len() + 2, "accepted and ended");

    // Brought back it begins anew, though how it ended before is still there.
    let revived = Attempts { revival_count: 1, ..again };
    let Ended::Over(completion) = scene.run_as(&engine, &sink, &revived).await else { panic!("it ends") };
    let account = completion.account;
    assert_eq!(
        (completion.outcome, account.attempt_count, account.revival_count),
        (Outcome::Succeeded, 2, 1)
    );
}

#[tokio::test]
async fn what_is_kept_of_old_jobs_is_swept_but_never_an_end_that_was_not_told() {
    let scene = Scene::new(Parent::None);
    let (engine, sink) = (scene.bench.engine(SETTINGS), Recorder::default());
    let catalog = engine.catalog();
    assert!(matches!(scene.run(&engine, &sink, 1, 1).await, Ended::Over(_)));
    let Some(untold) = catalog.outcome(scene.job.id).await.unwrap() else { panic!("it is kept") };
    let told = Completion { job_id: JobId::random(), ..untold.completion };
    catalog.keep_told(&told).await.unwrap();
    catalog.cancel(told.job_id, Timestamp::now()).await.unwrap();
    let claimed = JobId::random();
    catalog.begin(claimed, 0, true, false).await.unwrap();
    let all = scene.bench.everything([]).await;

    catalog.sweep(Timestamp::now() - KEPT).await.unwrap();
    assert_eq!(scene.bench.everything([]).await, all, "all of it is new");
    catalog.sweep(Timestamp::now()).await.unwrap();

    let gone = [("outcomes", told.job_id), ("cancels", told.job_id), ("outcomes", claimed)].into_iter();
    let gone: Vec<_> = gone.map(|(folder, id)| format!(".backhaul/{folder}/{id}.json")).collect();
    let left: Vec<_> = all.into_iter().filter(|object| !gone.contains(object)).collect();
    assert_eq!(scene.bench.everything([]).await.into_iter().collect::<Vec<_>>(), left);
    assert!(left.iter().any(|object| object.contains("outcomes")), "{left:?}");
}

#[tokio::test]
async fn a_sweep_does_not_read_how_each_of_the_latest_jobs_ended() {
    let scene = Scene::new(Parent::None);
    assert!(matches!(
        scene.run(&scene.bench.engine(SETTINGS), &Recorder::default(), 1, 1).await,
        Ended::Over(_)
    ));
    let (counting, engine) = scene.faulty(usize::MAX);

    engine.catalog().sweep(Timestamp::now() - KEPT).await.unwrap();

    assert_eq!(counting.names(), ["list .backhaul/outcomes", "list .backhaul/cancels"]);
}

#[tokio::test]
async fn the_claim_of_a_run_that_goes_on_is_not_swept_and_no_other_one_is_renewed() {
    let scene = Scene::new(Parent::None);
    let (engine, id, backup_id) = (scene.bench.engine(SETTINGS), scene.job.id, scene.job.backup_id());
    let catalog = engine.catalog();
    let claim = async || match catalog.begin(id, 0, true, false).await.unwrap() {
        Begun::Held { hold, .. } => hold,
        begun => panic!("{begun:?}"),
    };
    let hold = claim().await;
    let week_later = Timestamp::now();

    catalog.renew(id, &hold).await.unwrap();
    catalog.sweep(week_later).await.unwrap();

    catalog.check_held(id, backup_id, &hold).await.unwrap();
    let other = claim().await;
    let week_later = Timestamp::now();
    catalog.renew(id, &hold).await.unwrap();
    catalog.check_held(id, backup_id, &other).await.unwrap();
    catalog.sweep(week_later).await.unwrap();
    assert!(!catalog.is_claimed(id).await.unwrap(), "who was displaced has renewed it");
    catalog.renew(id, &other).await.unwrap();
    assert!(!catalog.is_claimed(id).await.unwrap());
}

/// It failed at once, and left the record as of a backup that is being made, and all that was stored of it.
#[tokio::test]
async fn a_job_whose_worker_died_is_not_over_because_the_store_is_full_when_it_comes_again() {
    let again = Attempts { redelivered: true, max: 3, seconds_max: 3600, ..Attempts::one() };
    let (scene, sink) = (Scene::new(Parent::None), Recorder::default());
    let (faulty, engine) = scene.faulty_by(scene.calls().await / 2, Fault::Death);
    tokio::select! {
        ended = scene.run(&engine, &sink, 1, 3) => panic!("{}: {ended:?}", faulty.broke_at()),
        () = faulty.died() => {}
    }
    let (faulty, engine) = scene.faulty_by(2, Fault::Refused(Errno::NOSPC));

    let ended = scene.run_as(&engine, &sink, &again).await;

    assert!(faulty.broke_at().starts_with("put .backhaul/outcomes/"), "{}", faulty.broke_at());
    assert!(matches!(ended, Ended::Later(_)) && sink.ends() == 0, "{ended:?}");
    let engine = scene.bench.engine(SETTINGS);
    let Ended::Over(completion) = scene.run_as(&engine, &sink, &again).await else { panic!("it ends") };
    assert_eq!(completion.outcome, Outcome::Succeeded);
}

#[tokio::test]
async fn a_run_that_takes_long_renews_its_claim() {
    let again = Attempts { redelivered: true, ..Attempts::one() };
    let scene = Scene::new(Parent::None);
    let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let at = scene.calls_to_begin(&again).await;
    let (faulty, engine) = scene.faulty_by(at, Fault::Pause(reached.clone(), go_on.clone()));
    let (sink, every) = (Recorder::default(), Every { renewal: Duration::from_millis(5), ..NEVER });
    let kept = scene.bench.root().join(format!(".backhaul/outcomes/{}.json", scene.job.id));
    let claim = || {
        let kept: Value = serde_json::from_slice(&fs::read(&kept).unwrap()).unwrap();
        kept["content"]["claimed"].clone()
    };
    let renewed = async {
        reached.notified().await;
        let first = claim();
        assert!(first.is_object());
        for _ in 0..2 {
            let before = claim();
            while claim() == before {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(claim()["run"], first["run"]);
        go_on.notify_one();
    };
    let (report, ctx) = (Report::new(&sink, &scene.job), Context::default());
    let ended = runner::run(&ctx, &engine, &scene.job, &again, every, &report);

    let ended = tokio::time::timeout(Duration::from_secs(60), async { tokio::join!(ended, renewed).0 }).await;

    let Ended::Over(completion) = ended.expect("a renewal in time") else { panic!("{}", faulty.broke_at()) };
    assert_eq!((completion.outcome, sink.ends()), (Outcome::Succeeded, 1));
}

#[tokio::test]
async fn a_claim_that_is_renewed_while_its_run_ends_the_job_does_not_keep_it_from_that() {
    let again = Attempts { redelivered: true, ..Attempts::one() };
    let scene = Scene::new(Parent::None);
    let (counting, engine) = scene.faulty(usize::MAX);
    assert!(matches!(scene.run_as(&engine, &Recorder::default(), &again).await, Ended::Over(_)));
    let is_outcome = |name: &String| name.starts_with("swap") && name.contains("outcomes/");
    let at = counting.names().iter().rposition(is_outcome).unwrap() + 1;
    let scene = Scene::new(Parent::None);
    let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (faulty, engine) = scene.faulty_by(at, Fault::Pause(reached.clone(), go_on.clone()));
    let (sink, other_engine) = (Recorder::default(), scene.bench.engine(SETTINGS));
    let kept = scene.bench.root().join(format!(".backhaul/outcomes/{}.json", scene.job.id));
    let renewed = async {
        reached.notified().await;
        let claim: Value = serde_json::from_slice(&fs::read(&kept).unwrap()).unwrap();
        let run = claim["content"]["claimed"]["run"].as_str().unwrap().parse().unwrap();
        let hold = Hold { claim: Some(run), revival_count: 0 };
        other_engine.catalog().renew(scene.job.id, &hold).await.unwrap();
        assert_ne!(serde_json::from_slice::<Value>(&fs::read(&kept).unwrap()).unwrap(), claim);
        go_on.notify_one();
    };

    let (ended, ()) = tokio::join!(scene.run_as(&engine, &sink, &again), renewed);

    let Ended::Over(completion) = ended else { panic!("{}: {ended:?}", faulty.broke_at()) };
    assert_eq!((completion.outcome, sink.ends()), (Outcome::Succeeded, 1));
}

#[tokio::test]
async fn a_job_that_is_done_is_found_done_whoever_wanted_its_end_later() {
    let scene = Scene::new(Parent::None);
    let (engine, sink) = (scene.bench.engine(SETTINGS), Recorder::default());
    assert!(matches!(scene.run(&engine, &sink, 1, 1).await, Ended::Over(_)));
    engine.catalog().settle(scene.job.id).await.unwrap();
    engine.catalog().cancel(scene.job.id, Timestamp::now()).await.unwrap();
    let Ended::Over(completion) = scene.run(&engine, &sink, 1, 1).await else { panic!("it ends") };
    assert_eq!(completion.outcome, Outcome::Succeeded);
    verify(&engine, scene.job.backup_id()).await.unwrap();
}
