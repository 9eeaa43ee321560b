//! A model of the life of a job, explored in full: what two workers, the broker and the store may do, in every order.
//!
//! A job is a row of steps ([`Step`]), each of which asks the store or the broker for one thing; they have the names of what
//! does it in `runner/run.rs`, `worker.rs` and `engine/mod.rs`. Between any two steps a worker may die, its connection may
//! be cut while it goes on, and the store may fail, with or without having done what it was asked. The explorer goes
//! through all states that come of that, and looks in each whether a [`Rule`] is broken. What decides between two workers
//! stands in [`Design`]; the tests leave out one of its rules after the other, and the explorer must find what that breaks.
//!
//! [`DESIGN`] is what the explorer found nothing wrong with, [`PLAIN`] the same with records and outcomes that are written
//! over whatever is there.
//!
//! What no order of steps can prevent is left to `backhaul gc`: objects, or a record that is still being made, of a worker
//! that died after its job had gone to another one. In the model these are the `orphans`; no outcome depends on them.
//!
//! The code differs in this: it looks at the record when it has begun, and then whether the job is still its own, which comes
//! to the same as looking at the record first; a record is read before it is removed, and not removed on a condition, which
//! stores do not know; an outcome that cannot be kept in the last attempt is told all the same, because nobody would ever hear
//! of it otherwise; a cancelled backup is marked as being deleted by its own job, which here is an error of that kind.
//!
//! Not in the model: the parking of a delivery whose job runs elsewhere (it comes back as it was, and the question may go
//! unanswered, so that here it always does), the waiting for another job of the volume (likewise: the turns may be lost),
//! deadlines, which end a job as an error does, what a restore writes to (of two runs only one has that, and the other one is
//! put off), parents and children of a backup, jobs that people bring back, the checkpoints of an RBD backup, and what a backup
//! in objects copies from the attempts before it: it has names of its own then as well, and what is gone is put anew. A message
//! that is put off comes back at any time.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt::Write;
use std::hash::{BuildHasherDefault, Hasher};

const WORKERS: usize = 2;
/// Attempts at a backup of which the store may know at the same time.
const WRITERS: Writer = 7;

// ---- The design ----

/// Who claims a job before it is worked on, by a mark where its outcome will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    Nobody,
    /// Whoever is handed a message that was out before, or a copy of one.
    Again,
    Everybody,
}

/// When the outcome of a job is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Forget {
    /// As soon as the broker has heard the ack.
    Acked,
    /// The same, by a run that had the only delivery there ever was; else when it is old.
    AckedAlone,
    /// When it is old: after whatever still runs or waits has ended.
    Old,
}

/// When what the attempts before have put is removed by who has taken a backup over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Displaced {
    Never,
    /// Before anything is put: of an RBD image there is one only.
    First,
    /// Before the backup becomes visible: until then objects are taken over from there.
    Last,
}

/// What keeps two workers that have the same job from harming each other. A rule that is false is left out.
#[derive(Debug, Clone, Copy)]
struct Design {
    /// A record is written over the one that was looked at, and over no other.
    swaps_records: bool,
    /// A record is removed if it is the one that was looked at, and no other.
    swaps_removals: bool,
    /// The outcome of a job is kept by who has claimed it last, or, if nobody has, by who is the first.
    claim: Claim,
    /// The record is looked at before the outcome is, so that what is seen of it is not from after the job had ended.
    record_first: bool,
    /// A job whose backup is in error has ended so. (Else it is begun anew, as one is that people have brought back.)
    first_end_stands: bool,
    /// Whoever has begun a backup that had no record looks whether the job is still his, before anything is removed or written.
    begin_looks_again: bool,
    /// A backup is given up in its record first, then its objects are removed.
    abandon_marks_first: bool,
    /// An outcome that could not be kept is not told; the job is put off.
    kept_or_untold: bool,
    /// Whoever finds an outcome that was not told does the last step of a delete again.
    conclude_is_repeated: bool,
    /// The outcome stays for as long as another run, or another copy of the message, may ask for it.
    forget: Forget,
    /// A delivery is acknowledged after the event was confirmed.
    told_before_ack: bool,
    /// An event is told after its outcome was kept.
    kept_before_told: bool,
    /// Success is told of a record that is available.
    record_before_told: bool,
    /// What makes a backup visible is put after its data.
    mark_goes_last: bool,
    /// Attempts have objects of their own.
    own_names: bool,
    /// Whoever takes a backup over removes what the attempts before have put.
    removes_displaced: Displaced,
    /// A record says that its backup is deleted before anything of that goes.
    delete_marks_first: bool,
    /// The outcome of a delete is kept before the record goes.
    delete_keeps_first: bool,
}

/// The design as it is to be.
const DESIGN: Design = Design {
    swaps_records: true,
    swaps_removals: true,
    claim: Claim::Again,
    record_first: true,
    first_end_stands: true,
    begin_looks_again: true,
    abandon_marks_first: true,
    kept_or_untold: true,
    conclude_is_repeated: true,
    forget: Forget::AckedAlone,
    told_before_ack: true,
    kept_before_told: true,
    record_before_told: true,
    mark_goes_last: true,
    own_names: true,
    removes_displaced: Displaced::Last,
    delete_marks_first: true,
    delete_keeps_first: true,
};

/// Records and outcomes that are written over whatever is there.
const PLAIN: Design = Design {
    swaps_records: false,
    swaps_removals: false,
    claim: Claim::Nobody,
    record_first: false,
    first_end_stands: false,
    begin_looks_again: false,
    abandon_marks_first: false,
    kept_or_untold: false,
    conclude_is_repeated: false,
    forget: Forget::Acked,
    ..DESIGN
};

// ---- What there is ----

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Job {
    Backup,
    /// A restore or a verification: it has no record of its own.
    Restore,
    /// A delete of what the backup makes, or has made.
    Delete,
}

impl Job {
    /// Where what belongs to it is found: a backup and a delete of it go on side by side.
    fn slot(self) -> usize {
        usize::from(self == Self::Delete)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Outcome {
    Succeeded,
    Failed,
    Cancelled,
}

/// `job::RecordState`; the jobs that it names are the only ones there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum State {
    Creating,
    Available,
    /// In error, of a problem that may be that somebody asked for the job's end.
    Error(Outcome),
    Deleting,
}

type Writer = u8;

/// `job::Record`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Record {
    state: State,
    writer: Writer,
    /// Only where records are written over whatever is there.
    displaced: Option<Writer>,
    /// The attempts before, of which something may be left; in the code they are known by the time in their names.
    earlier: u8,
}

/// What lies in `.backhaul/outcomes/<job>.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kept {
    /// By one of the runs, which may have ended without a word.
    Claimed,
    Outcome {
        outcome: Outcome,
        told: bool,
    },
}

/// Where a run of a job is: what it does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Step {
    // runner::run
    Outcome,
    IsCancelled,
    // Engine::backup
    Record,
    Begin,
    LookAgain,
    Withdraw,
    Copy,
    Stands,
    RemoveEarlier,
    Finish,
    Save,
    // Engine::restore, Engine::verify
    Read,
    // Engine::delete
    Mark,
    // all of them; what makes a backup visible goes first
    RemoveMark(Why),
    RemoveData(Why),
    // Engine::abandon
    Abandon,
    AbandonRecord,
    // Catalog::conclude
    Conclude,
    RemoveRecord,
    // Report::end
    Tell,
    // Delivery::ack, dead_letter, retry_later
    MoveTo,
    Ack,
    // Catalog::settle, keep_told
    Settle { acked: bool },
    Over,
}

/// Why objects are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Why {
    Displaced,
    GaveWay,
    Abandoned,
    Deleted,
}

/// Where a run has led to: `runner::Ended`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Ended {
    Over(Outcome),
    Later,
}

/// Whether a run has claimed its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Claimed {
    Not,
    /// Nobody else has since.
    Held,
    Lost,
}

/// How a message is handed out.
const FIRST: usize = 0;
/// It was out before, or is a copy. How many attempts there may be is left open: any may be the last.
const AGAIN: usize = 1;
type Messages = [u8; 2];

/// What a worker does with a job: `Worker::run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Run {
    step: Step,
    /// The deliveries that it would settle; none once the connection was cut.
    held: Messages,
    /// Those that came too late for that.
    late: Messages,
    message: usize,
    /// No other delivery was adopted.
    alone: bool,
    claim: Claimed,
    cancelled: bool,
    /// The record as it was looked at.
    saw: Option<Record>,
    writer: Option<Writer>,
    displaced: Option<Writer>,
    /// Whose objects are being removed.
    victim: Option<Writer>,
    /// The attempts before that one, or before its own, of which something may be left.
    earlier: u8,
    ended: Option<Ended>,
}

impl Run {
    fn was_out_before(&self) -> bool {
        self.message != FIRST
    }

    fn later(&mut self) {
        self.forget_the_store();
        self.ended = Some(Ended::Later);
        self.step = Step::MoveTo;
    }

    /// What no later step looks at.
    fn forget_the_store(&mut self) {
        self.claim = Claimed::Not;
        (self.saw, self.writer, self.displaced, self.victim, self.earlier) = (None, None, None, None, 0);
    }

    /// The attempts that it knows of.
    fn known(&self) -> u8 {
        let saw = self.saw.map(|record| record.writer);
        [self.writer, self.displaced, self.victim, saw]
            .into_iter()
            .flatten()
            .fold(self.earlier | self.saw.map_or(0, |record| record.earlier), |all, writer| all | bit(writer))
    }

    fn is_held(&self) -> bool {
        self.held != [0; 2]
    }
}

/// What the rules must remember.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Past {
    acked: [bool; 2],
    kept: [bool; 2],
    was_available: bool,
    was_deleted: bool,
    /// A whole backup went without a delete.
    harmed: bool,
    /// Attempts whose objects somebody else has removed.
    removed: u8,
    /// Attempts whose worker died, or was failed by the store, when nobody else knew of their objects any more.
    orphans: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    // The store.
    record: Option<Record>,
    data: u8,
    marks: u8,
    kept: [Option<Kept>; 2],
    cancel_mark: bool,
    // The broker.
    ready: [Messages; 2],
    dead: [bool; 2],
    told: [u8; 2],
    cancel_unkept: bool,
    // The workers.
    runs: [[Option<Run>; 2]; WORKERS],
    faults_left: u8,
    past: Past,
}

impl World {
    /// The attempts that anybody knows of, or that have left objects.
    fn known(&self) -> u8 {
        let of_record = self
            .record
            .map_or(0, |record| bit(record.writer) | record.displaced.map_or(0, bit) | record.earlier);
        let of_runs = self.runs.iter().flatten().flatten().fold(0, |all, run| all | run.known());
        self.data | self.marks | of_record | of_runs
    }
}

// ---- What may happen ----

/// What is explored.
#[derive(Debug, Clone, Copy)]
struct Scene {
    design: Design,
    jobs: &'static [Job],
    /// Somebody asks for the end of the backup or restore.
    cancel: bool,
    /// Messages of each job at the beginning; two if whoever sent it did not know that it had arrived.
    messages: u8,
    /// How often a worker may die or be cut off, or the store fail.
    faults: u8,
    store_fails: bool,
    /// The copy of a backup may fail by itself.
    copy_fails: bool,
}

/// Who did what.
type Said = (Option<usize>, Option<Job>, &'static str);

/// What may come of a step.
#[derive(Debug, Clone, Copy)]
enum Way {
    Does,
    FailsForNow,
    FailsForGood,
    Cancelled,
    SeesMark,
    Untold,
    /// The store says nothing, and may have done what it was asked.
    NoStore {
        does: bool,
        last: bool,
    },
}

/// All that may happen next: who did what, whether the workers changed places, and what comes of it.
struct Moves<'a> {
    from: &'a World,
    all: Vec<(Said, bool, World)>,
}

impl Moves<'_> {
    fn add(&mut self, said: Said, change: impl FnOnce(&mut World)) {
        let mut next = self.from.clone();
        change(&mut next);
        let is_whole = |record: Option<Record>| record.is_some_and(|record| record.state == State::Available);
        if is_whole(next.record) {
            next.past.was_available = true;
        }
        if is_whole(self.from.record)
            && !next.record.is_some_and(|record| {
                record.writer == self.from.record.unwrap().writer
                    && matches!(record.state, State::Available | State::Deleting)
            })
        {
            next.past.harmed = true;
        }
        let known = next.known();
        next.past.removed &= known;
        next.past.orphans &= known;
        // Workers are alike: which of them is the first does not matter.
        let swapped = next.runs[0] < next.runs[1];
        if swapped {
            next.runs.swap(0, 1);
        }
        self.all.push((said, swapped, next));
    }
}

fn bit(index: u8) -> u8 {
    1 << index
}

impl Scene {
    fn beginning(&self) -> World {
        let has_backup = !self.jobs.contains(&Job::Backup);
        let mut world = World {
            record: has_backup.then_some(Record {
                state: State::Available,
                writer: 0,
                displaced: None,
                earlier: 0,
            }),
            data: u8::from(has_backup),
            marks: u8::from(has_backup),
            kept: [None; 2],
            cancel_mark: false,
            ready: [[0; 2]; 2],
            dead: [false; 2],
            told: [0; 2],
            cancel_unkept: self.cancel,
            runs: [[None; 2]; WORKERS],
            faults_left: self.faults,
            past: Past { was_available: has_backup, ..Past::default() },
        };
        for job in self.jobs {
            world.ready[job.slot()][FIRST] = self.messages;
        }
        world
    }

    fn moves(&self, from: &World) -> Vec<(Said, bool, World)> {
        let mut moves = Moves { from, all: Vec::new() };
        for worker in 0..WORKERS {
            for job in self.jobs {
                self.deliver(&mut moves, worker, *job);
                self.step(&mut moves, worker, *job);
            }
            self.cancel(&mut moves, worker);
            if from.faults_left > 0 {
                self.crash(&mut moves, worker);
                self.cut(&mut moves, worker);
            }
        }
        if from.cancel_unkept {
            // `Worker::keep_cancel`
            moves.add((None, None, "the cancel is kept in the store"), |world| {
                world.cancel_unkept = false;
                world.cancel_mark = true;
            });
        }
        moves.all
    }

    fn deliver(&self, moves: &mut Moves, worker: usize, job: Job) {
        let slot = job.slot();
        for message in [FIRST, AGAIN] {
            if moves.from.ready[slot][message] == 0 {
                continue;
            }
            moves.add((Some(worker), Some(job), "is handed the message"), |world| {
                world.ready[slot][message] -= 1;
                if let Some(run) = &mut world.runs[worker][slot] {
                    run.alone = false;
                    let is_late =
                        matches!(run.step, Step::MoveTo | Step::Ack | Step::Settle { .. } | Step::Over);
                    let adopted = if is_late { &mut run.late } else { &mut run.held };
                    adopted[message] += 1;
                    return;
                }
                let mut held = [0; 2];
                held[message] = 1;
                world.runs[worker][slot] = Some(Run {
                    step: if self.design.record_first { Step::Record } else { Step::Outcome },
                    held,
                    late: [0; 2],
                    message,
                    alone: true,
                    claim: Claimed::Not,
                    cancelled: false,
                    saw: None,
                    writer: None,
                    displaced: None,
                    victim: None,
                    earlier: 0,
                    ended: None,
                });
            });
        }
    }

    /// `Worker::take_control`: a run hears of the cancel, or the worker had heard of it before.
    fn cancel(&self, moves: &mut Moves, worker: usize) {
        let Some(run) = &moves.from.runs[worker][Job::Backup.slot()] else { return };
        let matters = matches!(run.step, Step::IsCancelled | Step::Record | Step::Copy | Step::Read);
        if self.cancel && matters && !run.cancelled {
            moves.add((Some(worker), Some(self.jobs[0]), "hears of the cancel"), |world| {
                world.runs[worker][Job::Backup.slot()].as_mut().unwrap().cancelled = true;
            });
        }
    }

    fn crash(&self, moves: &mut Moves, worker: usize) {
        if moves.from.runs[worker].iter().all(Option::is_none) {
            return;
        }
        moves.add((Some(worker), None, "dies"), |world| {
            world.faults_left -= 1;
            for slot in 0..2 {
                let Some(run) = world.runs[worker][slot].take() else { continue };
                give_back(&mut world.ready[slot], run.held);
                give_back(&mut world.ready[slot], run.late);
                let job = if slot == 1 { Job::Delete } else { self.jobs[0] };
                self.forsake(world, &run, job);
            }
        });
    }

    fn cut(&self, moves: &mut Moves, worker: usize) {
        let holds = |run: &Run| run.is_held() || run.late != [0; 2];
        if !moves.from.runs[worker].iter().flatten().any(holds) {
            return;
        }
        moves.add((Some(worker), None, "is cut off, and goes on"), |world| {
            world.faults_left -= 1;
            for slot in 0..2 {
                let Some(run) = &mut world.runs[worker][slot] else { continue };
                give_back(&mut world.ready[slot], std::mem::take(&mut run.held));
                give_back(&mut world.ready[slot], std::mem::take(&mut run.late));
            }
        });
    }

    /// Whose name the objects of an attempt have.
    fn names(&self, writer: Writer) -> Writer {
        if self.design.own_names { writer } else { 0 }
    }

    /// A run does what it does next; all that can come of it.
    fn step(&self, moves: &mut Moves, worker: usize, job: Job) {
        let slot = job.slot();
        let Some(run) = moves.from.runs[worker][slot] else { return };
        let may_fail = self.store_fails && moves.from.faults_left > 0;
        let mut ways = vec![Way::Does];
        match run.step {
            Step::Copy | Step::Read => {
                if self.copy_fails {
                    ways.extend([Way::FailsForNow, Way::FailsForGood]);
                }
                if run.cancelled {
                    ways.push(Way::Cancelled);
                } else if moves.from.cancel_mark {
                    ways.push(Way::SeesMark);
                }
            }
            Step::Tell if may_fail => ways.push(Way::Untold),
            Step::MoveTo | Step::Ack | Step::Over => {}
            _ if may_fail => {
                for heard in [false, true] {
                    ways.extend([
                        Way::NoStore { does: heard, last: false },
                        Way::NoStore { does: heard, last: true },
                    ]);
                }
            }
            _ => {}
        }
        for way in ways {
            let says = match way {
                Way::Does => says(run.step),
                Way::FailsForNow => "fails for now",
                Way::FailsForGood => "fails for good",
                Way::Cancelled => "stops, being cancelled",
                Way::SeesMark => "sees the mark of the cancel",
                Way::Untold => "cannot publish the event",
                Way::NoStore { does: false, last: false } => "does not reach the store",
                Way::NoStore { does: false, last: true } => "does not reach the store in the last attempt",
                Way::NoStore { does: true, last: false } => "does not hear that the store did it",
                Way::NoStore { does: true, last: true } => {
                    "does not hear that the store did it in the last attempt"
                }
            };
            moves.add((Some(worker), Some(job), says), |world| {
                let mut run = run;
                match way {
                    Way::Does => self.does(world, &mut run, job),
                    Way::FailsForNow => self.does_not(&mut run, Ended::Later),
                    Way::FailsForGood => self.does_not(&mut run, Ended::Over(Outcome::Failed)),
                    Way::Cancelled => self.does_not(&mut run, Ended::Over(Outcome::Cancelled)),
                    Way::SeesMark => run.cancelled = true,
                    Way::Untold => {
                        world.faults_left -= 1;
                        give_back(&mut world.ready[slot], std::mem::take(&mut run.held));
                        run.step = Step::Over;
                    }
                    Way::NoStore { does, last } => {
                        world.faults_left -= 1;
                        if does {
                            let before = run;
                            self.does(world, &mut run, job);
                            // What the store said is lost, but not the name that the run had given itself.
                            run = Run { writer: run.writer, saw: run.saw.or(before.saw), ..before };
                        }
                        self.store_failed(world, &mut run, job, last);
                    }
                }
                while self.is_no_step(&run) {
                    self.does(world, &mut run, job);
                }
                if run.step == Step::Over {
                    give_back(&mut world.ready[slot], run.held);
                    give_back(&mut world.ready[slot], run.late);
                    world.runs[worker][slot] = None;
                } else {
                    world.runs[worker][slot] = Some(run);
                }
            });
        }
    }

    /// What neither the store nor the broker is asked for.
    fn is_no_step(&self, run: &Run) -> bool {
        match run.step {
            Step::IsCancelled => !self.cancel && !self.store_fails,
            Step::MoveTo | Step::Ack => !run.is_held(),
            Step::Settle { .. } => run.ended == Some(Ended::Later),
            _ => false,
        }
    }

    /// The copy of a backup, or a restore, ends so.
    fn does_not(&self, run: &mut Run, ended: Ended) {
        run.ended = Some(ended);
        run.step = match (run.step, ended) {
            (Step::Copy | Step::RemoveEarlier | Step::Finish, _) => Step::Stands,
            (_, Ended::Later) => Step::MoveTo,
            _ => Step::Conclude,
        };
    }

    /// A step does what it is to do.
    fn does(&self, world: &mut World, run: &mut Run, job: Job) {
        let slot = job.slot();
        let design = &self.design;
        match run.step {
            Step::Outcome => match world.kept[slot] {
                Some(Kept::Outcome { outcome, told }) => {
                    run.ended = Some(Ended::Over(outcome));
                    run.step = match (told, outcome) {
                        (true, _) => self.settled_by(Ended::Over(outcome)),
                        _ if design.conclude_is_repeated => self.concluded(job, outcome),
                        _ => Step::Tell,
                    };
                }
                claimed => {
                    let claims = match design.claim {
                        Claim::Nobody => false,
                        Claim::Again => run.was_out_before(),
                        Claim::Everybody => true,
                    };
                    if claims {
                        for other in world.runs.iter_mut().filter_map(|runs| runs[slot].as_mut()) {
                            if other.claim == Claimed::Held {
                                other.claim = Claimed::Lost;
                            }
                        }
                        world.kept[slot] = Some(Kept::Claimed);
                        run.claim = Claimed::Held;
                    } else if claimed.is_some() {
                        return run.later();
                    }
                    run.step = Step::IsCancelled;
                }
            },
            Step::IsCancelled => {
                run.cancelled |= job != Job::Delete && world.cancel_mark;
                if design.record_first { self.decide(run, job) } else { run.step = Step::Record }
            }
            Step::Record => {
                run.saw = world.record;
                if design.record_first { run.step = Step::Outcome } else { self.decide(run, job) }
            }
            Step::Begin => {
                let may = match run.saw {
                    Some(_) => !design.swaps_records || world.record == run.saw,
                    None => world.record.is_none(),
                };
                if !may {
                    return run.later();
                }
                let writer = self.new_writer(world, run);
                let displaced = if design.swaps_records { None } else { run.saw.map(|record| record.writer) };
                let earlier = match design.removes_displaced {
                    Displaced::Last => run.saw.map_or(0, |saw| self.left_of(world, saw)),
                    Displaced::Never | Displaced::First => 0,
                };
                world.record = Some(Record { state: State::Creating, writer, displaced, earlier });
                run.writer = Some(writer);
                run.displaced = displaced;
                run.earlier = earlier;
                run.step = Step::LookAgain;
                if !design.begin_looks_again || run.saw.is_some() {
                    self.begun(run);
                }
            }
            Step::LookAgain => {
                if self.has_claim(world, run, job) {
                    self.begun(run)
                } else {
                    run.step = Step::Withdraw
                }
            }
            Step::Withdraw => {
                if world.record.is_some_and(|record| {
                    Some(record.writer) == run.writer && record.state == State::Creating
                }) {
                    world.record = None;
                }
                run.later();
            }
            Step::Copy => {
                world.data |= bit(self.names(run.writer.unwrap()));
                run.step = if design.mark_goes_last { Step::Stands } else { Step::Save };
                run.ended = None;
            }
            Step::Stands => {
                if self.stands(world, run) {
                    run.step = match run.ended {
                        Some(Ended::Over(_)) => Step::Abandon,
                        Some(Ended::Later) => Step::MoveTo,
                        None if run.earlier != 0 => Step::RemoveEarlier,
                        None => Step::Finish,
                    };
                } else {
                    self.give_way(world, run);
                }
            }
            Step::RemoveEarlier => {
                Self::remove_earlier(world, run);
                run.step = Step::Finish;
            }
            Step::Finish => {
                world.marks |= bit(self.names(run.writer.unwrap()));
                run.step = if design.mark_goes_last { Step::Save } else { Step::Copy };
                if !design.record_before_told {
                    run.ended = Some(Ended::Over(Outcome::Succeeded));
                    run.step = Step::Conclude;
                }
            }
            Step::Save => {
                let is_own =
                    |record: Record| Some(record.writer) == run.writer && record.state == State::Creating;
                if design.swaps_records && !world.record.is_some_and(is_own) {
                    return self.give_way(world, run);
                }
                let writer = run.writer.unwrap();
                world.record = Some(Record { state: State::Available, writer, displaced: None, earlier: 0 });
                let ended = Ended::Over(Outcome::Succeeded);
                run.ended = Some(ended);
                run.step = if design.record_before_told { Step::Conclude } else { self.settled_by(ended) };
            }
            Step::Read => {
                run.ended = Some(Ended::Over(Outcome::Succeeded));
                run.step = Step::Conclude;
            }
            Step::Mark => {
                if design.swaps_records && world.record != run.saw {
                    return run.later();
                }
                let current = run.saw.take().unwrap();
                if design.delete_marks_first {
                    world.record = Some(Record { state: State::Deleting, ..current });
                }
                (run.victim, run.earlier) = (Some(current.writer), current.earlier);
                run.step = Step::RemoveMark(Why::Deleted);
            }
            Step::RemoveMark(why) => {
                world.marks &= !bit(self.names(run.victim.unwrap()));
                if why != Why::GaveWay {
                    world.past.removed |= bit(self.names(run.victim.unwrap()));
                }
                run.step = Step::RemoveData(why);
                if matches!(why, Why::Displaced | Why::GaveWay) {
                    // Nobody looks for these: one step is enough.
                    self.does(world, run, job);
                }
            }
            Step::RemoveData(why) => {
                world.data &= !bit(self.names(run.victim.unwrap()));
                if matches!(why, Why::Abandoned | Why::Deleted) {
                    Self::remove_earlier(world, run);
                }
                self.removed(run, why);
            }
            Step::Abandon => self.abandon(world, run, job),
            Step::AbandonRecord => {
                let Some(Ended::Over(outcome)) = run.ended else { unreachable!() };
                world.record = match outcome {
                    Outcome::Cancelled => None,
                    _ => run.saw.map(|saw| Record { state: State::Error(outcome), ..saw }),
                };
                run.saw = None;
                run.step = Step::Conclude;
            }
            Step::Conclude if !design.kept_before_told => {
                self.tell(world, run, job);
                run.step = Step::Tell;
            }
            Step::Tell if !design.kept_before_told => {
                self.conclude(world, run, job);
                run.step = run.ended.map_or(Step::Over, |ended| self.settled_by(ended));
            }
            Step::Conclude => self.conclude(world, run, job),
            Step::RemoveRecord => {
                let mark =
                    if job == Job::Delete { State::Deleting } else { State::Error(Outcome::Cancelled) };
                let is_marked = world.record.is_some_and(|record| record.state == mark);
                if is_marked || !design.swaps_removals {
                    world.past.was_deleted |= world.record.is_some() && job == Job::Delete;
                    world.record = None;
                }
                run.step = match job == Job::Backup || design.delete_keeps_first {
                    true => Step::Tell,
                    false => Step::Conclude,
                };
            }
            Step::Tell => {
                let outcome = self.tell(world, run, job);
                let saves = !design.record_before_told
                    && outcome == Outcome::Succeeded
                    && world.record.is_some_and(|record| {
                        Some(record.writer) == run.writer && record.state == State::Creating
                    });
                run.step = match (saves, design.told_before_ack) {
                    (true, _) => Step::Save,
                    (_, false) => Step::Settle { acked: true },
                    _ => self.settled_by(Ended::Over(outcome)),
                };
            }
            Step::MoveTo => {
                if !run.is_held() {
                    run.step = Step::Settle { acked: false };
                    return;
                }
                self.move_to(world, run, slot);
                run.step = Step::Ack;
            }
            Step::Ack => {
                if !run.is_held() {
                    run.step = Step::Settle { acked: false };
                    return;
                }
                run.held = [0; 2];
                world.past.acked[slot] |= run.ended != Some(Ended::Later);
                run.step = match (design.told_before_ack, run.ended) {
                    (false, Some(Ended::Over(_))) => Step::Tell,
                    _ => Step::Settle { acked: true },
                };
            }
            Step::Settle { acked } => {
                if let Some(Ended::Over(outcome)) = run.ended {
                    let forgets = match design.forget {
                        Forget::Acked => acked,
                        Forget::AckedAlone => acked && run.alone && !run.was_out_before(),
                        Forget::Old => false,
                    };
                    world.kept[slot] = (!forgets).then_some(Kept::Outcome { outcome, told: true });
                    if acked && run.cancelled {
                        world.cancel_mark = false;
                    }
                }
                run.step = Step::Over;
            }
            Step::Over => unreachable!(),
        }
    }

    /// What is to be done, by what was seen of the record.
    fn decide(&self, run: &mut Run, job: Job) {
        let over = |run: &mut Run, outcome, step| {
            run.ended = Some(Ended::Over(outcome));
            run.step = step;
        };
        match (job, run.saw.map(|record| record.state)) {
            (Job::Restore, _) if run.cancelled => over(run, Outcome::Cancelled, Step::Conclude),
            (Job::Restore, _) => run.step = Step::Read,
            (Job::Delete, None) => over(run, Outcome::Failed, Step::Conclude),
            (Job::Delete, Some(_)) => run.step = Step::Mark,
            (Job::Backup, Some(State::Available)) => over(run, Outcome::Succeeded, Step::Conclude),
            (Job::Backup, Some(State::Error(outcome))) if self.design.first_end_stands => {
                run.victim = run.saw.map(|record| record.writer);
                run.earlier = run.saw.map_or(0, |record| record.earlier);
                over(run, outcome, Step::RemoveMark(Why::Abandoned));
            }
            (Job::Backup, Some(State::Deleting)) => over(run, Outcome::Failed, Step::Abandon),
            (Job::Backup, _) if run.cancelled => over(run, Outcome::Cancelled, Step::Abandon),
            (Job::Backup, _) => run.step = Step::Begin,
        }
    }

    /// A run ends without a word: notes whose objects, or record, nobody else knows of.
    fn forsake(&self, world: &mut World, run: &Run, job: Job) {
        let is_lost = self.design.claim != Claim::Nobody && !self.has_claim(world, run, job);
        let names = |writer: Writer| world.record.filter(|record| !is_lost && record.writer == writer);
        let is_own = |record: Record| match record.state {
            State::Creating | State::Available => true,
            State::Error(_) => {
                matches!(
                    run.step,
                    Step::RemoveMark(Why::Abandoned) | Step::RemoveData(Why::Abandoned) | Step::AbandonRecord
                )
            }
            State::Deleting => false,
        };
        let own = run.writer.filter(|writer| !names(*writer).is_some_and(is_own));
        let victim = run.victim.filter(|writer| {
            !names(*writer).is_some_and(|record| record.state != State::Deleting || job == Job::Delete)
        });
        // The record that it has written over was the only one that named them.
        let replaced = run.writer.and(run.saw).map(|record| record.writer);
        for writer in [own, victim, replaced].into_iter().flatten() {
            world.past.orphans |= bit(self.names(writer));
        }
        if own.or(victim).is_some() {
            world.past.orphans |= run.earlier;
        }
    }

    /// Whether nobody else has claimed the job since, or ended it.
    fn has_claim(&self, world: &World, run: &Run, job: Job) -> bool {
        match run.claim {
            Claimed::Not => world.kept[job.slot()].is_none(),
            Claimed::Held => true,
            Claimed::Lost => false,
        }
    }

    fn new_writer(&self, world: &World, run: &Run) -> Writer {
        let known = world.known() | run.known();
        (0..WRITERS).find(|writer| known & bit(*writer) == 0).expect("too few names for attempts")
    }

    /// The attempts up to the one that a record names of which there is something, or may be.
    fn left_of(&self, world: &World, record: Record) -> u8 {
        let at_work = world.runs.iter().flatten().flatten().filter_map(|run| run.writer).map(bit);
        let there = world.data | world.marks | at_work.fold(0, |all, writer| all | writer);
        (record.earlier | bit(self.names(record.writer))) & there
    }

    /// `Chunked::remove_earlier_attempts`
    fn remove_earlier(world: &mut World, run: &mut Run) {
        let earlier = std::mem::take(&mut run.earlier);
        world.marks &= !earlier;
        world.data &= !earlier;
        world.past.removed |= earlier;
    }

    /// What is done once a backup is begun.
    fn begun(&self, run: &mut Run) {
        run.victim = run.saw.take().map(|record| record.writer);
        if self.design.removes_displaced != Displaced::First {
            run.victim = None;
        }
        run.step = match run.victim {
            Some(_) => Step::RemoveMark(Why::Displaced),
            _ if self.design.mark_goes_last => Step::Copy,
            _ => Step::Finish,
        };
    }

    /// `Record::stands`
    fn stands(&self, world: &World, run: &Run) -> bool {
        world.record.is_some_and(|current| {
            let is_own = Some(current.writer) == run.writer && current.state == State::Creating;
            let is_displaced = run.displaced == Some(current.writer)
                && matches!(current.state, State::Creating | State::Available);
            is_own || is_displaced
        })
    }

    /// `Engine::give_way`
    fn give_way(&self, world: &World, run: &mut Run) {
        run.ended = match world.record.map(|record| record.state) {
            None | Some(State::Deleting) => Some(Ended::Over(Outcome::Failed)),
            Some(_) => Some(Ended::Later),
        };
        run.victim = run.writer;
        run.step = Step::RemoveMark(Why::GaveWay);
    }

    /// What is done once objects are removed.
    fn removed(&self, run: &mut Run, why: Why) {
        run.victim = None;
        run.step = match (why, run.ended) {
            (Why::Displaced, _) if self.design.mark_goes_last => Step::Copy,
            (Why::Displaced, _) => Step::Finish,
            (Why::GaveWay, Some(Ended::Later)) => Step::MoveTo,
            (Why::GaveWay, _) => Step::Abandon,
            (Why::Abandoned, _) if self.design.abandon_marks_first => Step::Conclude,
            (Why::Abandoned, _) => Step::AbandonRecord,
            (Why::Deleted, _) => {
                run.ended = Some(Ended::Over(Outcome::Succeeded));
                if self.design.delete_keeps_first { Step::Conclude } else { Step::RemoveRecord }
            }
        };
    }

    /// `Engine::abandon`
    fn abandon(&self, world: &mut World, run: &mut Run, job: Job) {
        let Some(Ended::Over(outcome)) = run.ended else { unreachable!() };
        let current = world.record.filter(|_| job == Job::Backup);
        let known = [run.writer, run.saw.map(|record| record.writer)];
        match current {
            Some(current) if current.state == State::Creating && !self.design.abandon_marks_first => {
                run.saw = Some(current);
                (run.victim, run.earlier) = (Some(current.writer), current.earlier);
                run.step = Step::RemoveMark(Why::Abandoned);
            }
            Some(current) if current.state != State::Deleting && self.design.abandon_marks_first => {
                // Somebody else has ended the job, or is at it.
                let has_ended = match current.state {
                    State::Error(_) => self.design.first_end_stands,
                    state => state == State::Available,
                };
                if has_ended || !known.contains(&Some(current.writer)) {
                    return run.later();
                }
                world.record = Some(Record { state: State::Error(outcome), ..current });
                run.saw = None;
                (run.victim, run.earlier) = (Some(current.writer), current.earlier);
                run.step = Step::RemoveMark(Why::Abandoned);
            }
            _ => {
                run.saw = None;
                run.step = Step::Conclude;
            }
        }
    }

    /// `Report::end`
    fn tell(&self, world: &mut World, run: &Run, job: Job) -> Outcome {
        let Some(Ended::Over(outcome)) = run.ended else { unreachable!() };
        world.told[job.slot()] |= bit(outcome as u8);
        outcome
    }

    /// `Catalog::conclude`
    fn conclude(&self, world: &mut World, run: &mut Run, job: Job) {
        let slot = job.slot();
        let Some(Ended::Over(outcome)) = run.ended else { unreachable!() };
        run.saw = None;
        if self.design.claim != Claim::Nobody && !self.has_claim(world, run, job) {
            return run.later();
        }
        world.kept[slot] = Some(Kept::Outcome { outcome, told: false });
        world.past.kept[slot] = true;
        if self.design.record_before_told {
            run.forget_the_store();
        }
        run.step = self.concluded(job, outcome);
        if !self.design.told_before_ack {
            run.step = self.settled_by(Ended::Over(outcome));
        }
    }

    /// What is done once the outcome is kept: the record goes of what is to leave nothing.
    fn concluded(&self, job: Job, outcome: Outcome) -> Step {
        match (job, outcome) {
            (Job::Delete, Outcome::Succeeded) if self.design.delete_keeps_first => Step::RemoveRecord,
            (Job::Backup, Outcome::Cancelled) if self.design.abandon_marks_first => Step::RemoveRecord,
            _ => Step::Tell,
        }
    }

    /// How the deliveries of a run are settled.
    fn settled_by(&self, ended: Ended) -> Step {
        match ended {
            Ended::Over(Outcome::Failed) | Ended::Later => Step::MoveTo,
            Ended::Over(_) => Step::Ack,
        }
    }

    /// `Delivery::move_to`: the copy, to the dead letters or to a delay queue.
    fn move_to(&self, world: &mut World, run: &Run, slot: usize) {
        match run.ended {
            Some(Ended::Later) => world.ready[slot][AGAIN] += run.held.iter().sum::<u8>(),
            _ => world.dead[slot] = true,
        }
    }

    /// What a run does when the store did not answer.
    fn store_failed(&self, world: &mut World, run: &mut Run, job: Job, last: bool) {
        let design = &self.design;
        self.forsake(world, run, job);
        let failed = if last { Ended::Over(Outcome::Failed) } else { Ended::Later };
        match run.step {
            // `runner::refuse`
            Step::Record if design.record_first => run.later(),
            Step::Outcome | Step::IsCancelled | Step::Withdraw | Step::RemoveRecord => {
                if last && !design.kept_or_untold {
                    run.ended = Some(failed);
                    run.step = Step::Tell;
                } else {
                    run.later();
                }
            }
            Step::Conclude if design.kept_or_untold => run.later(),
            Step::Conclude if job == Job::Delete && failed == Ended::Later => run.later(),
            Step::Conclude if job == Job::Delete => {
                run.ended = Some(failed);
                run.step = Step::Tell;
            }
            Step::Conclude => run.step = Step::Tell,
            Step::Abandon | Step::AbandonRecord if design.kept_or_untold => run.later(),
            Step::Abandon | Step::AbandonRecord => run.step = Step::Conclude,
            Step::RemoveMark(why @ (Why::Abandoned | Why::GaveWay))
            | Step::RemoveData(why @ (Why::Abandoned | Why::GaveWay)) => {
                world.past.orphans |= bit(self.names(run.victim.unwrap()));
                if why == Why::Abandoned {
                    world.past.orphans |= std::mem::take(&mut run.earlier);
                }
                self.removed(run, why);
                if !design.abandon_marks_first && why == Why::Abandoned {
                    run.step = Step::Conclude;
                }
            }
            Step::Settle { .. } => run.step = Step::Over,
            Step::RemoveEarlier | Step::Finish | Step::Copy => self.does_not(run, failed),
            _ => {
                run.ended = Some(failed);
                match (failed, job) {
                    (Ended::Later, _) => run.later(),
                    (_, Job::Backup) => run.step = Step::Abandon,
                    _ => run.step = Step::Conclude,
                }
            }
        }
    }
}

/// Gives messages back to their queue; those that were handed out for the first time are not any more.
fn give_back(ready: &mut Messages, held: Messages) {
    ready[AGAIN] += held[FIRST] + held[AGAIN];
}

fn says(step: Step) -> &'static str {
    match step {
        Step::Outcome => "looks whether the job has ended",
        Step::IsCancelled => "looks whether it is cancelled",
        Step::Record => "looks at the record",
        Step::Begin => "begins: writes the record",
        Step::LookAgain => "looks whether the job is still its own",
        Step::Withdraw => "withdraws: removes the record",
        Step::Copy => "puts the data",
        Step::Stands => "looks whether the record stands",
        Step::Finish => "makes the backup visible",
        Step::Save => "saves the record as available",
        Step::Read => "reads the backup",
        Step::Mark => "marks the record as deleting",
        Step::RemoveEarlier => "removes what the attempts before have left",
        Step::RemoveMark(Why::Displaced) => "makes what the attempt before had made invisible",
        Step::RemoveMark(_) => "makes the backup invisible",
        Step::RemoveData(Why::Displaced) => "removes the data of the attempt before",
        Step::RemoveData(Why::GaveWay) => "gives way: removes its own data",
        Step::RemoveData(_) => "removes the data",
        Step::Abandon => "gives the backup up",
        Step::AbandonRecord => "gives the backup up: is done with the record",
        Step::Conclude => "keeps the outcome",
        Step::RemoveRecord => "removes the record",
        Step::Tell => "publishes the event, which is confirmed",
        Step::MoveTo => "publishes a copy of the message",
        Step::Ack => "acknowledges",
        Step::Settle { .. } => "is done with the outcome",
        Step::Over => "",
    }
}

// ---- The rules ----

/// What must hold. The first three are invariant 1, the others invariant 2 of `ARCHITECTURE.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Rule {
    /// An event is told of an outcome that is kept, and of a record that says the same.
    EventAfterRecord,
    /// A delivery is acknowledged after the event was confirmed.
    AckAfterEvent,
    /// Every job ends.
    Ends,
    /// A job has one outcome, whoever tells it and how often.
    OneOutcome,
    /// An available backup is visible and whole.
    AvailableIsWhole,
    /// What is visible has its data.
    VisibleIsWhole,
    /// A whole backup goes by a delete only.
    NoHarm,
    /// In the end the store is as the outcomes say.
    StateMatches,
    /// In the end nothing is left that no record names, but of workers that died.
    NothingLeft,
}

impl Scene {
    /// The rule that is broken in a state, if one is.
    fn broken(&self, world: &World) -> Option<Rule> {
        for job in self.jobs {
            let slot = job.slot();
            let told = world.told[slot];
            if world.past.acked[slot] && told == 0 {
                return Some(Rule::AckAfterEvent);
            }
            let is_safe = match job {
                Job::Backup => world.past.was_available,
                Job::Restore => true,
                Job::Delete => world.past.was_deleted,
            };
            let success = told & bit(Outcome::Succeeded as u8) != 0;
            if told != 0 && !world.past.kept[slot] && self.design.kept_or_untold || success && !is_safe {
                return Some(Rule::EventAfterRecord);
            }
            if told.count_ones() > 1 {
                return Some(Rule::OneOutcome);
            }
        }
        if let Some(Record { state: State::Available, writer, .. }) = world.record
            && world.data & world.marks & bit(self.names(writer)) == 0
        {
            return Some(Rule::AvailableIsWhole);
        }
        if world.marks & !world.data & !world.past.removed != 0 {
            return Some(Rule::VisibleIsWhole);
        }
        if world.past.harmed {
            return Some(Rule::NoHarm);
        }
        if self.is_end(world) { self.broken_at_end(world) } else { None }
    }

    /// No message is left, and nobody works.
    fn is_end(&self, world: &World) -> bool {
        world.ready == [[0; 2]; 2] && world.runs.iter().flatten().all(Option::is_none)
    }

    fn outcome(world: &World, job: Job) -> Option<Outcome> {
        [Outcome::Succeeded, Outcome::Failed, Outcome::Cancelled]
            .into_iter()
            .find(|outcome| world.told[job.slot()] & bit(*outcome as u8) != 0)
    }

    fn broken_at_end(&self, world: &World) -> Option<Rule> {
        let state = world.record.map(|record| record.state);
        let is_orphan =
            world.record.is_some_and(|record| world.past.orphans & bit(self.names(record.writer)) != 0);
        let has_delete = self.jobs.contains(&Job::Delete);
        let delete = Self::outcome(world, Job::Delete);
        for job in self.jobs {
            let outcome = Self::outcome(world, *job);
            let matches = match (job, outcome) {
                (_, None) => return Some(Rule::Ends),
                (Job::Backup, Some(Outcome::Succeeded)) => match state {
                    Some(State::Available) => true,
                    None => delete == Some(Outcome::Succeeded),
                    Some(State::Deleting) => delete == Some(Outcome::Failed),
                    Some(_) => false,
                },
                (Job::Backup, Some(Outcome::Failed)) => match state {
                    None | Some(State::Error(Outcome::Failed)) => true,
                    Some(State::Deleting) => delete == Some(Outcome::Failed),
                    Some(State::Creating) => is_orphan,
                    Some(_) => false,
                },
                (Job::Backup, Some(Outcome::Cancelled)) => match state {
                    None => true,
                    Some(State::Deleting) => delete == Some(Outcome::Failed),
                    Some(State::Creating) => is_orphan,
                    Some(_) => false,
                },
                (Job::Delete, Some(Outcome::Succeeded)) => {
                    state.is_none() || self.jobs.len() > 1 && state != Some(State::Deleting)
                }
                (Job::Delete, Some(_)) => !world.past.was_deleted,
                (Job::Restore, Some(_)) => true,
            };
            if !matches || world.dead[job.slot()] != (outcome == Some(Outcome::Failed)) {
                return Some(Rule::StateMatches);
            }
        }
        let named = match world.record {
            Some(Record { state: State::Available, writer, .. }) => bit(self.names(writer)),
            // A delete that failed may have left it half gone, and can be done again.
            Some(Record { state: State::Deleting, writer, earlier, .. }) if has_delete => {
                bit(self.names(writer)) | earlier
            }
            _ => 0,
        };
        let left = (world.data | world.marks) & !named & !world.past.orphans;
        (left != 0).then_some(Rule::NothingLeft)
    }
}

// ---- The explorer ----

/// What the explorer has found.
struct Explored {
    states: usize,
    moves: usize,
    ends: usize,
    /// What the jobs came to, in all ends.
    outcomes: BTreeSet<Vec<Outcome>>,
    /// The first rule that is broken, and the shortest way to that.
    broken: Option<(Rule, String)>,
}

/// Goes through all states, those with the shortest way first.
fn explore(scene: &Scene) -> Explored {
    explore_for(scene, |_| true)
}

fn explore_for(scene: &Scene, looks_for: impl Fn(Rule) -> bool) -> Explored {
    let mut numbers: HashMap<World, u32, BuildHasherDefault<Mixer>> = HashMap::default();
    let mut ways: Vec<(u32, Said, bool)> = Vec::new();
    let mut next = VecDeque::new();
    // Which states come before which, to see from where an end is reached.
    let mut before: Vec<(u32, u32)> = Vec::new();
    let mut ended = Vec::new();
    let mut explored = Explored { states: 0, moves: 0, ends: 0, outcomes: BTreeSet::new(), broken: None };

    let beginning = scene.beginning();
    numbers.insert(beginning.clone(), 0);
    ways.push((0, (None, None, ""), false));
    next.push_back((0, beginning));
    while let Some((number, world)) = next.pop_front() {
        if let Some(rule) = scene.broken(&world).filter(|rule| looks_for(*rule)) {
            explored.broken = Some((rule, way_to(&ways, number, &world)));
            break;
        }
        let is_end = scene.is_end(&world);
        if is_end {
            explored.ends += 1;
            explored
                .outcomes
                .insert(scene.jobs.iter().filter_map(|job| Scene::outcome(&world, *job)).collect());
            ended.push(number);
        }
        for (said, swapped, world) in scene.moves(&world) {
            explored.moves += 1;
            let count = ways.len() as u32;
            let reached = match numbers.entry(world) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    next.push_back((count, new.key().clone()));
                    ways.push((number, said, swapped));
                    *new.insert(count)
                }
            };
            before.push((reached, number));
        }
    }
    explored.states = ways.len();
    if explored.broken.is_none()
        && let Some(stuck) = stuck(ways.len(), before, ended)
    {
        let world = numbers.iter().find(|(_, number)| **number == stuck).unwrap().0;
        explored.broken = Some((Rule::Ends, way_to(&ways, stuck, world)));
    }
    explored
}

/// A state from which no end is reached, whatever happens.
fn stuck(states: usize, mut before: Vec<(u32, u32)>, mut ended: Vec<u32>) -> Option<u32> {
    before.sort_unstable();
    let mut ends = vec![false; states];
    for number in &ended {
        ends[*number as usize] = true;
    }
    while let Some(number) = ended.pop() {
        let first = before.partition_point(|(reached, _)| *reached < number);
        for (_, from) in before[first..].iter().take_while(|(reached, _)| *reached == number) {
            if !std::mem::replace(&mut ends[*from as usize], true) {
                ended.push(*from);
            }
        }
    }
    ends.iter().position(|ends| !ends).map(|number| number as u32)
}

fn way_to(ways: &[(u32, Said, bool)], mut number: u32, world: &World) -> String {
    let mut steps = Vec::new();
    while number > 0 {
        let (from, said, swapped) = ways[number as usize];
        steps.push((said, swapped));
        number = from;
    }
    let mut text = String::new();
    let mut is_swapped = false;
    for ((worker, job, what), swapped) in steps.into_iter().rev() {
        let who = worker
            .map_or(String::new(), |worker| format!("worker {}: ", (worker ^ usize::from(is_swapped)) + 1));
        let job = job.map_or(String::new(), |job| format!("{job:?}: "));
        writeln!(text, "  {who}{job}{what}").unwrap();
        is_swapped ^= swapped;
    }
    writeln!(text, "  => {:?} data {:b} visible {:b}", world.record, world.data, world.marks).unwrap();
    text
}

/// A hash that is quick with many small fields.
#[derive(Default)]
struct Mixer(u64);

impl Hasher for Mixer {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u8(*byte);
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = (product as u64) ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

// ---- The tests ----

const BACKUP: Scene = Scene {
    design: DESIGN,
    jobs: &[Job::Backup],
    cancel: false,
    messages: 1,
    faults: 2,
    store_fails: false,
    copy_fails: true,
};
const BACKUP_IN_A_BAD_STORE: Scene = Scene { faults: 1, store_fails: true, ..BACKUP };
const BACKUP_AND_CANCEL: Scene = Scene { cancel: true, faults: 1, store_fails: true, ..BACKUP };
const BACKUP_AND_DELETE: Scene =
    Scene { jobs: &[Job::Backup, Job::Delete], faults: 1, copy_fails: false, ..BACKUP };
const DELETE: Scene = Scene { jobs: &[Job::Delete], store_fails: true, ..BACKUP };
const RESTORE: Scene = Scene { jobs: &[Job::Restore], cancel: true, faults: 1, store_fails: true, ..BACKUP };

/// Explores a scene in which no rule is broken, and says what its jobs come to.
fn explore_whole(scene: &Scene) -> BTreeSet<Vec<Outcome>> {
    let found = explore(scene);
    println!("{:?}: {} states, {} moves, {} ends", scene.jobs, found.states, found.moves, found.ends);
    if let Some((rule, way)) = found.broken {
        panic!("{rule:?} is broken:\n{way}");
    }
    found.outcomes
}

fn each(outcomes: &[Outcome]) -> BTreeSet<Vec<Outcome>> {
    outcomes.iter().map(|outcome| vec![*outcome]).collect()
}

#[test]
fn a_backup_keeps_all_rules() {
    let outcomes = each(&[Outcome::Succeeded, Outcome::Failed]);
    assert_eq!(explore_whole(&Scene { store_fails: true, ..BACKUP }), outcomes);
}

#[test]
fn a_backup_in_an_image_keeps_all_rules() {
    let design = Design { removes_displaced: Displaced::First, ..DESIGN };
    let outcomes = each(&[Outcome::Succeeded, Outcome::Failed]);
    assert_eq!(explore_whole(&Scene { design, ..BACKUP_IN_A_BAD_STORE }), outcomes);
}

#[test]
fn a_backup_that_is_cancelled_keeps_all_rules() {
    let outcomes = each(&[Outcome::Succeeded, Outcome::Failed, Outcome::Cancelled]);
    assert_eq!(explore_whole(&BACKUP_AND_CANCEL), outcomes);
}

#[test]
fn a_backup_that_is_deleted_meanwhile_keeps_all_rules() {
    let mut outcomes = BTreeSet::new();
    for backup in [Outcome::Succeeded, Outcome::Failed] {
        outcomes.extend([vec![backup, Outcome::Succeeded], vec![backup, Outcome::Failed]]);
    }
    assert_eq!(explore_whole(&BACKUP_AND_DELETE), outcomes);
}

#[test]
fn a_delete_keeps_all_rules() {
    assert_eq!(explore_whole(&DELETE), each(&[Outcome::Succeeded, Outcome::Failed]));
}

#[test]
fn a_restore_keeps_all_rules() {
    let outcomes = each(&[Outcome::Succeeded, Outcome::Failed, Outcome::Cancelled]);
    assert_eq!(explore_whole(&RESTORE), outcomes);
}

/// Two messages that are both handed out for the first time look alike: here everybody must claim the job, and its outcome
/// stay until it is old.
#[test]
fn a_job_that_was_sent_twice_keeps_all_rules_if_everybody_claims_it() {
    let design = Design { claim: Claim::Everybody, forget: Forget::Old, ..DESIGN };
    for scene in [BACKUP_IN_A_BAD_STORE, BACKUP_AND_CANCEL, DELETE, RESTORE] {
        explore_whole(&Scene { design, messages: 2, faults: 0, ..scene });
    }
    let alone = Design { forget: Forget::AckedAlone, ..design };
    assert_broken(
        "the outcome goes with the ack",
        &Scene { design: alone, messages: 2, ..RESTORE },
        Rule::OneOutcome,
    );
    let again = Design { claim: Claim::Again, ..design };
    let scene = Scene { design: again, messages: 2, faults: 0, ..BACKUP_AND_CANCEL };
    assert_broken("the first ones do not claim it", &scene, Rule::StateMatches);
}

/// The explorer must find that this breaks the rule.
fn assert_broken(what: &str, scene: &Scene, rule: Rule) {
    let found = explore_for(scene, |broken| broken == rule);
    let (_, way) = found.broken.unwrap_or_else(|| panic!("{what}: {rule:?} is not broken"));
    println!("{what}: {rule:?} is broken\n{way}");
}

/// What is left out, in which scene that shows, and what it breaks.
type LeftOut = (&'static str, fn(&mut Design), Scene, Rule);

#[test]
fn no_rule_of_the_design_can_be_left_out() {
    let left_out: &[LeftOut] = &[
        ("records are written over any", |d| d.swaps_records = false, BACKUP, Rule::NoHarm),
        ("any record is removed", |d| d.swaps_removals = false, BACKUP_AND_DELETE, Rule::NoHarm),
        ("nobody claims", |d| d.claim = Claim::Nobody, RESTORE, Rule::OneOutcome),
        ("the outcome is looked at first", |d| d.record_first = false, BACKUP_AND_DELETE, Rule::StateMatches),
        ("an error is no end", |d| d.first_end_stands = false, BACKUP_AND_CANCEL, Rule::StateMatches),
        ("no second look", |d| d.begin_looks_again = false, BACKUP_AND_CANCEL, Rule::StateMatches),
        ("objects go before the mark", |d| d.abandon_marks_first = false, BACKUP, Rule::AvailableIsWhole),
        ("told but not kept", |d| d.kept_or_untold = false, BACKUP_IN_A_BAD_STORE, Rule::StateMatches),
        ("the end is not repeated", |d| d.conclude_is_repeated = false, DELETE, Rule::EventAfterRecord),
        ("forgotten at the ack", |d| d.forget = Forget::Acked, DELETE, Rule::OneOutcome),
        ("ack before event", |d| d.told_before_ack = false, BACKUP, Rule::AckAfterEvent),
        ("event before outcome", |d| d.kept_before_told = false, BACKUP, Rule::EventAfterRecord),
        ("event before record", |d| d.record_before_told = false, BACKUP, Rule::EventAfterRecord),
        ("visible before its data", |d| d.mark_goes_last = false, BACKUP, Rule::VisibleIsWhole),
        ("attempts share names", |d| d.own_names = false, BACKUP, Rule::AvailableIsWhole),
        ("what was displaced stays", |d| d.removes_displaced = Displaced::Never, BACKUP, Rule::NothingLeft),
        ("delete does not mark", |d| d.delete_marks_first = false, DELETE, Rule::AvailableIsWhole),
        ("record goes before outcome", |d| d.delete_keeps_first = false, DELETE, Rule::StateMatches),
    ];
    for (what, leave_out, scene, rule) in left_out {
        let mut design = DESIGN;
        leave_out(&mut design);
        assert_broken(what, &Scene { design, ..*scene }, *rule);
    }
}

/// Two workers need no more than one cut connection to break these.
#[test]
fn plain_writes_of_records_and_outcomes_break_the_rules() {
    let backup = Scene { design: PLAIN, faults: 1, ..BACKUP };
    assert_broken("backup", &backup, Rule::AvailableIsWhole);
    assert_broken("backup", &backup, Rule::NoHarm);
    assert_broken("backup", &backup, Rule::OneOutcome);
    assert_broken("delete", &Scene { design: PLAIN, faults: 1, ..DELETE }, Rule::OneOutcome);
    assert_broken("restore", &Scene { design: PLAIN, ..RESTORE }, Rule::OneOutcome);
    let meanwhile = Scene { design: PLAIN, faults: 0, ..BACKUP_AND_DELETE };
    assert_broken("backup and delete", &meanwhile, Rule::AvailableIsWhole);
}
