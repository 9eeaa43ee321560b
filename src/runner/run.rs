//! Runs a job to its end: the one loop that walks the plan.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::Report;
use super::plan::plan;
use crate::engine::{self, Engine, Receipt};
use crate::error::{Causes, Class, Problem};
use crate::event;
use crate::job::{Account, Completion, Context, Happening, Job, Method, Operation, Outcome};

/// How often a job is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempts {
    /// Which try this is, from 1.
    pub current: u32,
    /// How many there may be.
    pub max: u32,
}

/// Where a try has led to.
#[derive(Debug)]
pub enum Ended {
    /// The job is over, and that has been told.
    Over(Box<Completion>),
    /// It failed of something that may pass; it is to be tried again later.
    Later(Problem),
    /// It is over, but that could not be told. Run again, the job only tells it.
    Untold(event::Error),
}

/// Runs a job by the first method that can do it. Tells every `progress_every` how far it is.
///
/// When this returns [`Ended::Over`], data and record are safe and the completion event is with the broker: the
/// delivery may be acknowledged, and after it the outcome [settled](crate::engine::Catalog::settle).
pub async fn run(
    ctx: &Context,
    engine: &Engine,
    job: &Job,
    attempts: Attempts,
    progress_every: Duration,
    report: &Report<'_>,
) -> Ended {
    let started = Instant::now();
    match engine.catalog().outcome(job.id).await {
        Ok(Some(completion)) => {
            info!("job was done before, telling it again");
            return tell(report, completion).await;
        }
        Ok(None) => {}
        // The store cannot say how the job stands.
        Err(error) => return refuse(job, Problem::new(error.class(), &error), attempts, report).await,
    }
    report.tell(Happening::Accepted).await;

    let mut account = Account { attempt_count: attempts.current - 1, ..Account::default() };
    let mut methods = plan(job, &engine.strategies(&job.work)).into_iter().peekable();
    let outcome = loop {
        let Some(method) = methods.next() else {
            // Not reached: the last method's error ends the loop, and a plan is never empty.
            let message = "no method is left".into();
            break Outcome::Failed(Problem { class: Class::Permanent, message, causes: Vec::new() });
        };
        account.attempt_count += 1;
        account.method = Some(method);
        report.tell(Happening::Started { method, attempt: account.attempt_count }).await;
        info!(%method, attempt = account.attempt_count, "started");

        let ctx = &Context { fallback_reason: account.fallback_reason.clone(), ..ctx.clone() };
        let error = match attempt(ctx, engine, job, method, progress_every, report).await {
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
            (Class::Cancelled, _) => break Outcome::Cancelled,
            // Whoever took over ends the job; giving up here would take it from under them.
            _ if matches!(error, engine::Error::TakenOver(_)) => return Ended::Later(problem),
            (Class::Transient, _) if attempts.current < attempts.max => return Ended::Later(problem),
            (Class::Unsuitable | Class::Transient | Class::Permanent, _) => break Outcome::Failed(problem),
        }
    };
    account.seconds = started.elapsed().as_secs_f64();

    let left_over = match &outcome {
        Outcome::Succeeded => Ok(()),
        Outcome::Failed(problem) => engine.abandon(job, Some(problem)).await,
        Outcome::Cancelled => engine.abandon(job, None).await,
    };
    if let Err(error) = left_over {
        warn!(error = %Causes(&error), "some of what the job had written could not be removed");
    }
    let completion = completion(engine, job, outcome, account).await;
    if let Err(error) = engine.catalog().conclude(&completion).await {
        // A delete is not over while its record stands. Everything else is what it is: if this is delivered again, it
        // is found done.
        if completion.operation == Operation::Delete {
            return refuse(job, Problem::new(error.class(), &error), attempts, report).await;
        }
        warn!(error = %Causes(&error), "how the job ended could not be kept");
    }
    tell(report, completion).await
}

/// Ends a job that cannot even be begun, or puts it off where the problem may pass.
pub async fn refuse(job: &Job, problem: Problem, attempts: Attempts, report: &Report<'_>) -> Ended {
    if problem.class == Class::Transient && attempts.current < attempts.max {
        return Ended::Later(problem);
    }
    let completion = Completion {
        job_id: job.id,
        operation: job.operation(),
        backup_id: job.backup_id(),
        volume_id: job.volume_id(),
        store: job.store.clone(),
        outcome: Outcome::Failed(problem),
        account: Account::default(),
    };
    tell(report, completion).await
}

/// Does the job by one method, telling meanwhile how far it is.
async fn attempt(
    ctx: &Context,
    engine: &Engine,
    job: &Job,
    method: Method,
    progress_every: Duration,
    report: &Report<'_>,
) -> Result<Receipt, engine::Error> {
    ctx.check()?;
    let progress = async {
        loop {
            tokio::time::sleep(progress_every).await;
            report.tell(Happening::Progress(ctx.progress.read())).await;
        }
    };
    tokio::select! {
        result = engine.run(ctx, job, method) => result,
        never = progress => never,
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
    Completion {
        job_id: job.id,
        operation: job.operation(),
        backup_id: job.backup_id(),
        volume_id,
        store: job.store.clone(),
        outcome,
        account,
    }
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
