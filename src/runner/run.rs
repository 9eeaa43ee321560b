//! Runs a job to its end: the one loop that walks the plan.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tracing::{info, warn};

use super::Report;
use super::plan::plan;
use crate::engine::{self, Begun, Engine, KeptOutcome, Receipt};
use crate::error::{Causes, Class, Problem};
use crate::event;
use crate::job::{
    Account, Attempt, Completion, Context, Happening, Hold, Job, Method, Operation, Outcome, VolumeId, Work,
};

/// How often a job is begun again whose worker ended before it did; one that ends its workers must not do so for ever. We
/// count ourselves: RabbitMQ closes the channels of a worker that is gone one after the other, and counts each that it hands the
/// job to meanwhile.
const RESTARTS_MAX: u32 = 20;
/// How often a running job looks into the store whether somebody asked for its end.
const CANCEL_LOOK: Duration = Duration::from_secs(5);
/// How often a claim is renewed: claims are swept after [`KEPT`](engine::KEPT).
const RENEW_EVERY: Duration = Duration::from_secs(3600);
/// Attempts that are told of; of more the first one and the latest.
const ATTEMPTS_TOLD_MAX: usize = 10;
/// How much is told of each.
const ATTEMPT_CHARS_MAX: usize = 500;

/// How often a job is tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempts {
    /// Which try this is, from 1.
    pub current: u32,
    /// How many there may be.
    pub max: u32,
    /// How long after the first one had failed there may be more.
    pub seconds_max: u32,
    /// Those before this one.
    pub earlier: Vec<Attempt>,
    /// Whether a worker was handed this try before and ended, or was cut off, before the job did.
    pub redelivered: bool,
    /// Whether the message was put off before it was begun. A copy of it may be left, if the worker that did so has died.
    pub waited: bool,
    /// How often people brought the job back after it had failed; it begins anew then.
    pub revival_count: u32,
    /// When they did so last.
    pub revived_at: Option<Timestamp>,
    /// Whether a target that was there before is known to hold only a part of what it was to hold, since one of those before.
    pub target_unfinished: bool,
}

impl Attempts {
    /// A job that is tried once.
    pub fn one() -> Self {
        Self {
            current: 1,
            max: 1,
            seconds_max: 0,
            earlier: Vec::new(),
            redelivered: false,
            waited: false,
            revival_count: 0,
            revived_at: None,
            target_unfinished: false,
        }
    }

    /// Whether who asked for the end of the job at that time meant this run of it, and not one that had ended before people
    /// brought the job back.
    pub fn are_ended_by_cancel(&self, cancelled_at: Timestamp) -> bool {
        self.revived_at.is_none_or(|revived_at| cancelled_at >= revived_at)
    }

    /// Whether another worker may have begun the job, and still be at it.
    pub fn was_out_before(&self) -> bool {
        self.is_again() || self.waited
    }

    /// Whether it is a message that was begun on before, and not one that somebody sent anew and that only had to wait.
    pub fn is_again(&self) -> bool {
        self.redelivered || self.current > 1
    }

    fn is_last(&self) -> bool {
        self.current >= self.max || self.is_out_of_time()
    }

    fn is_out_of_time(&self) -> bool {
        self.earlier.first().is_some_and(|first| {
            Timestamp::now().duration_since(first.time) >= SignedDuration::from_secs(self.seconds_max.into())
        })
    }

    /// The attempts with this one, which failed so.
    pub fn and_this(mut self, problem: &Problem) -> Vec<Attempt> {
        let error = problem.to_string().chars().take(ATTEMPT_CHARS_MAX).collect();
        self.earlier.push(Attempt { attempt: self.current, time: Timestamp::now(), error });
        if self.earlier.len() > ATTEMPTS_TOLD_MAX {
            self.earlier.remove(1);
        }
        self.earlier
    }
}

/// How often a run says something while its job runs.
#[derive(Debug, Clone, Copy)]
pub struct Every {
    /// Tells how far the job is.
    pub progress: Duration,
    /// Renews its claim, so that it is not taken for that of a worker which has died.
    pub renewal: Duration,
}

impl Every {
    /// Tells so often how far the job is, and renews its claim as often as is usual.
    pub const fn telling(progress: Duration) -> Self {
        Self { progress, renewal: RENEW_EVERY }
    }
}

/// Where a try has led to.
#[derive(Debug)]
pub enum Ended {
    /// The job is over, and that has been told.
    Over(Box<Completion>),
    /// The same of a job that was not begun, because of what its store keeps of it or of another job of its id. That stays.
    OverBefore(Box<Completion>),
    /// It failed of something that may pass; it is to be tried again later.
    Later(Problem),
    /// It was stopped where it was, for another worker to go on from there. Nothing was removed, and nothing told.
    HandedBack,
    /// It is over, but that could not be told. Run again, the job only tells it.
    Untold(event::Error),
}

/// Runs a job by the first method that can do it. Fire `ctx.hand_back` before `ctx.cancel` to have it stop as for a cancel, but
/// without being ended.
///
/// When this returns [`Ended::Over`], data and record are safe and the completion event is with the broker: the
/// delivery may be acknowledged, and after it the outcome [settled](crate::engine::Catalog::settle). `ctx.cancel` has fired by
/// then if somebody asked for the end of the job, which may be [forgotten](crate::engine::Catalog::forget_cancel), too.
pub async fn run(
    ctx: &Context,
    engine: &Engine,
    job: &Job,
    attempts: &Attempts,
    every: Every,
    report: &Report<'_>,
) -> Ended {
    let started = Instant::now();
    let (was_out_before, revival_count) = (attempts.was_out_before(), attempts.revival_count);
    let begun = engine.catalog().begin(job.id, revival_count, was_out_before, attempts.redelivered).await;
    // Also of one that is over: whoever ended it may have died before the mark was forgotten.
    let asked = look_for_cancel(ctx, engine, job, attempts).await;
    let (hold, restart_count) = match begun {
        Ok(Begun::Held { hold, restart_count }) => (hold, restart_count),
        Ok(Begun::Over(kept)) if is_end_of(&kept.completion, job, attempts.is_again()) => {
            return tell_kept(engine, report, *kept, attempts.is_again()).await;
        }
        Ok(Begun::Over(kept)) => {
            return untouched(refuse(job, used_before(&kept.completion), attempts, report).await);
        }
        Ok(Begun::Claimed) => return Ended::Later(taken_over(job)),
        // For people to look at.
        Err(error @ engine::Error::DamagedRecord { .. }) => {
            return untouched(refuse(job, Problem::new(error.class(), &error), attempts, report).await);
        }
        // What an attempt before this one has stored is not to be left behind by a job that is over: there may be room later.
        Err(error) if error.is_full() && attempts.was_out_before() && !attempts.is_last() => {
            return Ended::Later(Problem { class: Class::Transient, ..Problem::new(error.class(), &error) });
        }
        // The store cannot say how the job stands.
        Err(error) => return refuse(job, Problem::new(error.class(), &error), attempts, report).await,
    };
    if let Err(error) = asked {
        return refuse(job, Problem::new(error.class(), &error), attempts, report).await;
    }
    report.tell(Happening::Accepted).await;

    let mut account = account(attempts);
    account.attempt_count = account.attempt_count.saturating_add(restart_count);
    let mut methods = plan(job, &engine.strategies(&job.work)).into_iter().peekable();
    let mut outcome = loop {
        if let Some(problem) = late(job).filter(|_| !ctx.cancel.is_cancelled()) {
            break Outcome::Failed(problem);
        }
        if restart_count > RESTARTS_MAX {
            let message = format!(
                "{restart_count} times the job was begun by a worker that ended before the job did: look into the logs for \
                 what ends them, such as too little memory, then bring the job back"
            );
            break Outcome::Failed(Problem { class: Class::Permanent, message, causes: Vec::new() });
        }
        let Some(method) = methods.next() else {
            // Not reached: the last method's error ends the loop, and a plan is never empty.
            let message = "no method is left".into();
            break Outcome::Failed(Problem { class: Class::Permanent, message, causes: Vec::new() });
        };
        account.attempt_count += 1;
        account.method = Some(method);
        report.tell(Happening::Started { method, attempt: account.attempt_count }).await;
        info!(%method, attempt = account.attempt_count, "started");

        let (fallback_reason, hold) = (account.fallback_reason.clone(), hold.clone());
        // The deadline fires this one, so that it is known from a cancel.
        let stop = ctx.cancel.child_token();
        let attempt_ctx = Context { cancel: stop, fallback_reason, hold, ..ctx.clone() };
        let result = tokio::select! {
            result = attempt(&attempt_ctx, engine, job, method, every.progress, report) => result,
            never = heed_cancels(ctx, engine, job, attempts) => match never {},
            never = keep_claim(engine, job, &attempt_ctx.hold, every.renewal) => match never {},
        };
        let error = match result {
            Ok(receipt) => {
                take_in(&mut account, receipt);
                break Outcome::Succeeded;
            }
            Err(error) => error,
        };
        let reading = ctx.progress.read();
        account.counts = reading.counts;
        account.volume_bytes = Some(reading.bytes_total).filter(|bytes| *bytes > 0);
        let problem = Problem::new(error.class(), &error);
        match (error.class(), methods.peek()) {
            (Class::Unsuitable, Some(next)) => {
                warn!(%method, %next, error = %Causes(&error), "method not usable, trying the next");
                let (reason, to) = (problem.clone(), *next);
                report.tell(Happening::FellBack { from: method, to, reason }).await;
                // Why the second one was not usable either is told, too; what counts is why it is not the first one.
                account.fallback_reason.get_or_insert(problem);
            }
            // If somebody asked for its end as well, the next worker finds that out.
            (Class::Cancelled, _) if ctx.hand_back.is_cancelled() => return Ended::HandedBack,
            (Class::Cancelled, _) => {
                let late = late(job).filter(|_| !ctx.cancel.is_cancelled());
                break late.map_or(Outcome::Cancelled, Outcome::Failed);
            }
            // Whoever took over ends the job; giving up here would take it from under them.
            _ if matches!(error, engine::Error::TakenOver(_)) => return Ended::Later(problem),
            // Whoever asked for its end is not to wait for another try. What was written all the same, and could not be told, is
            // found below.
            (Class::Transient, _) if ctx.cancel.is_cancelled() && !ctx.hand_back.is_cancelled() => {
                info!(%method, error = %Causes(&error), "cancelled when it was to be tried again later");
                break Outcome::Cancelled;
            }
            // A worker that had the job is gone, or cut off and still at it: however few tries there may be, its hold on the
            // target ends by itself.
            _ if error.is_target_in_use() && restart_count > 0 && !attempts.is_out_of_time() => {
                return Ended::Later(problem);
            }
            (Class::Transient, _) if !attempts.is_last() => return Ended::Later(problem),
            (Class::Unsuitable | Class::Transient | Class::Permanent, _) => break Outcome::Failed(problem),
        }
    };
    account.seconds = started.elapsed().as_secs_f64();

    if outcome != Outcome::Succeeded {
        // Else it is for whoever has the job now to say what becomes of it.
        if let Err(engine::Error::TakenOver(_)) =
            engine.catalog().check_held(job.id, job.backup_id(), &hold).await
        {
            return Ended::Later(taken_over(job));
        }
    }
    let abandoned = match &outcome {
        Outcome::Succeeded => Ok(None),
        Outcome::Failed(problem) => engine.abandon(job, Some(problem)).await,
        Outcome::Cancelled => engine.abandon(job, None).await,
    };
    match abandoned {
        Ok(None) => {}
        Ok(Some(receipt)) => {
            info!("another worker that was handed the job has done it");
            take_in(&mut account, receipt);
            outcome = Outcome::Succeeded;
        }
        Err(error) => {
            warn!(error = %Causes(&error), "some of what the job had written could not be removed");
        }
    }
    if let Work::Restore(work) = &job.work
        && outcome != Outcome::Succeeded
    {
        // What a worker has written that has died, nobody knows.
        account.target_unfinished |=
            ctx.progress.is_target_unfinished() || restart_count > 0 && engine.target_is_there(work).await;
    } else {
        account.target_unfinished = false;
    }
    let completion = completion(engine, job, outcome, account).await;
    match engine.catalog().conclude(&completion, &hold).await {
        Ok(()) => tell(report, completion).await,
        Err(engine::Error::TakenOver(_)) => Ended::Later(taken_over(job)),
        // A delete is not over while its record stands.
        Err(error) if completion.operation == Operation::Delete => {
            let problem = Problem::new(error.class(), &error);
            refuse_with(job, problem, attempts, completion.account, report).await
        }
        // Run again, a backup is found done. A restore is done anew: better now than after it was told. There may be room later.
        Err(error) if (error.class() == Class::Transient || error.is_full()) && !attempts.is_last() => {
            Ended::Later(Problem { class: Class::Transient, ..Problem::new(error.class(), &error) })
        }
        // Better told and not kept than not told at all.
        Err(error) => {
            warn!(error = %Causes(&error), "how the job ended could not be kept");
            tell(report, completion).await
        }
    }
}

/// Whether it was this job that ended so, and not another one to which somebody gave the same id. A message that was begun on
/// before is that of the job, though what it restores to may have another name by now.
fn is_end_of(completion: &Completion, job: &Job, is_again: bool) -> bool {
    let is_same_target = || match (&completion.target, &job.work) {
        (Some(ended), Work::Restore(work)) => *ended == work.target.to_string(),
        _ => true,
    };
    completion.operation == job.operation()
        && completion.backup_id == job.backup_id()
        && job.volume_id().is_none_or(|id| completion.volume_id.is_none_or(|ended| ended == id))
        && (is_again || is_same_target())
}

/// What is kept of the job is for those who come after it.
fn untouched(ended: Ended) -> Ended {
    match ended {
        Ended::Over(completion) => Ended::OverBefore(completion),
        ended => ended,
    }
}

fn used_before(completion: &Completion) -> Problem {
    let Completion { job_id, operation, backup_id, .. } = completion;
    let volume = completion.volume_id.map(|id| format!(" of volume {id}")).unwrap_or_default();
    let message = format!(
        "job {job_id} has ended already, and it was another one, the {operation} of backup {backup_id}{volume}: give each job \
         an id of its own"
    );
    Problem { class: Class::Permanent, message, causes: Vec::new() }
}

/// Another run of the job, by a worker that was handed its message, too, is to end it.
fn taken_over(job: &Job) -> Problem {
    let error = engine::Error::TakenOver(job.backup_id());
    Problem::new(error.class(), &error)
}

/// Ends a job that cannot even be begun, or puts it off where the problem may pass.
pub async fn refuse(job: &Job, problem: Problem, attempts: &Attempts, report: &Report<'_>) -> Ended {
    refuse_with(job, problem, attempts, account(attempts), report).await
}

async fn refuse_with(
    job: &Job,
    problem: Problem,
    attempts: &Attempts,
    account: Account,
    report: &Report<'_>,
) -> Ended {
    let problem = match late(job) {
        Some(late) if problem.class == Class::Transient => {
            Problem { causes: vec![problem.to_string()], ..late }
        }
        None if problem.class == Class::Transient && !attempts.is_last() => return Ended::Later(problem),
        _ => problem,
    };
    tell(report, completion_of(job, job.volume_id(), Outcome::Failed(problem), account)).await
}

/// What an account begins with.
fn account(attempts: &Attempts) -> Account {
    Account {
        attempt_count: attempts.current.saturating_sub(1),
        earlier_attempts: attempts.earlier.clone(),
        revival_count: attempts.revival_count,
        target_unfinished: attempts.target_unfinished,
        ..Account::default()
    }
}

/// Why a job has failed that is not done by its deadline.
fn late(job: &Job) -> Option<Problem> {
    let deadline = job.deadline.filter(|_| job.is_late(Timestamp::now()))?;
    let message = format!(
        "the job was not done by its deadline, {deadline}: if it is still wanted, send it anew, with a later deadline or none"
    );
    Some(Problem { class: Class::Permanent, message, causes: Vec::new() })
}

/// Fires the token of the context if the store knows that somebody has asked for the end of this run of the job.
async fn look_for_cancel(
    ctx: &Context,
    engine: &Engine,
    job: &Job,
    attempts: &Attempts,
) -> Result<(), engine::Error> {
    if let Some(at) = engine.catalog().cancelled_at(job.id).await?
        && attempts.are_ended_by_cancel(at)
    {
        ctx.cancel.cancel();
    }
    Ok(())
}

/// Looks for a cancel again and again: it may not have reached this worker.
async fn heed_cancels(ctx: &Context, engine: &Engine, job: &Job, attempts: &Attempts) -> Infallible {
    loop {
        tokio::time::sleep(CANCEL_LOOK).await;
        // A store that cannot say is asked again.
        look_for_cancel(ctx, engine, job, attempts).await.ok();
    }
}

/// Renews the claim of a run that takes long.
async fn keep_claim(engine: &Engine, job: &Job, hold: &Hold, every: Duration) -> Infallible {
    loop {
        tokio::time::sleep(every).await;
        if let Err(error) = engine.catalog().renew(job.id, hold).await {
            warn!(error = %Causes(&error), "the claim on the job was not renewed, trying again later");
        }
    }
}

/// Does the job by one method, telling meanwhile how far it is. Fires the token of the context at the deadline.
async fn attempt(
    ctx: &Context,
    engine: &Engine,
    job: &Job,
    method: Method,
    progress_every: Duration,
    report: &Report<'_>,
) -> Result<Receipt, engine::Error> {
    let progress = async {
        loop {
            tokio::time::sleep(progress_every).await;
            report.tell(Happening::Progress(ctx.progress.read())).await;
        }
    };
    let late = async {
        while !job.is_late(Timestamp::now()) {
            let left = job.deadline.map(|deadline| deadline.duration_since(Timestamp::now()));
            let left = left.and_then(|left| Duration::try_from(left).ok()).unwrap_or(CANCEL_LOOK);
            // Not all of it at once, for the clock may be set.
            tokio::time::sleep(left.min(CANCEL_LOOK)).await;
        }
        ctx.cancel.cancel();
        std::future::pending().await
    };
    tokio::select! {
        result = engine.run(ctx, job, method) => result,
        never = progress => never,
        never = late => never,
    }
}

fn take_in(account: &mut Account, receipt: Receipt) {
    account.parent_id = receipt.parent_id;
    account.volume_bytes = Some(receipt.volume_bytes);
    account.counts = receipt.counts;
    account.digest = receipt.digest;
}

async fn completion(engine: &Engine, job: &Job, outcome: Outcome, account: Account) -> Completion {
    // Not every job names its volume, but whoever follows a volume wants to see them all.
    let volume_id = match job.volume_id() {
        Some(id) => Some(id),
        None => engine.catalog().record(job.backup_id()).await.ok().flatten().map(|record| record.volume_id),
    };
    completion_of(job, volume_id, outcome, account)
}

fn completion_of(job: &Job, volume_id: Option<VolumeId>, outcome: Outcome, account: Account) -> Completion {
    Completion {
        job_id: job.id,
        operation: job.operation(),
        backup_id: job.backup_id(),
        volume_id,
        store: job.store.clone(),
        target: match &job.work {
            Work::Restore(work) => Some(work.target.to_string()),
            Work::Backup(_) | Work::Delete(_) | Work::Verify(_) => None,
        },
        outcome,
        account,
    }
}

/// Tells how a job ended before, unless that is known to have been told to who sent this message.
async fn tell_kept(engine: &Engine, report: &Report<'_>, kept: KeptOutcome, is_again: bool) -> Ended {
    if kept.told && is_again {
        info!("job was done before, and that was told");
        return Ended::Over(Box::new(kept.completion));
    }
    info!("job was done before, telling it again");
    if kept.told {
        // Somebody sent it once more, and waits for its end.
        return untouched(tell(report, kept.completion).await);
    }
    // Whoever kept that may have died right behind it.
    if let Err(error) = engine.catalog().finish(&kept.completion).await {
        return Ended::Later(Problem::new(error.class(), &error));
    }
    let ended = tell(report, kept.completion).await;
    if is_again {
        return ended;
    }
    // It was sent twice, and the other message, of which this is the end, may still come: it is to find that.
    if let Ended::Over(completion) = &ended
        && let Err(error) = engine.catalog().keep_told(completion).await
    {
        warn!(error = %Causes(&error), "that the end of the job was told could not be kept");
    }
    untouched(ended)
}

async fn tell(report: &Report<'_>, completion: Completion) -> Ended {
    match &completion.outcome {
        Outcome::Succeeded => info!(seconds = completion.account.seconds, "succeeded"),
        Outcome::Cancelled => info!("cancelled"),
        Outcome::Failed(problem) => warn!(class = %problem.class, error = %problem, "failed"),
    }
    match report.end(&completion).await {
        Ok(()) => Ended::Over(Box::new(completion)),
        Err(error) => Ended::Untold(error),
    }
}
