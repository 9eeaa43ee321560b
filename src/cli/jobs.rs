//! Jobs: sent to the workers, done in this process, cancelled, watched.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use tokio::signal::unix::SignalKind;
use tokio::time::sleep;

use super::args::{JobArgs, SubmitArgs};
use super::render::{self, Bar};
use super::{CANCELLED, Error, FAILED, engine_of, listen, say};
use crate::broker::{Broker, Properties, Routed};
use crate::config::Config;
use crate::event::{self, EventSink};
use crate::job::{
    Command, Completion, Context, Event, Happening, Job, JobId, Limit, Operation, Outcome, Pace, Work,
};
use crate::message::{self, Received};
use crate::runner::{self, Attempts, Ended, Every, Report};
use crate::worker::{self, Stores};

/// How often the bar of a job in this process moves.
const BAR_EVERY: Duration = Duration::from_millis(200);
/// How long a job may lie in the queue before that is said.
const TAKEN_UP_SOON: Duration = Duration::from_secs(5);
const NOT_TAKEN_UP: &str = "no worker has taken the job up yet, and it waits: the workers are busy, another job works on the volume, or none runs";
/// Who tells the events of a job that is done in this process.
const SOURCE: &str = "/backhaul/run";

/// The job that was typed, if a message can carry it.
fn job(args: &JobArgs) -> Result<(Job, Vec<u8>), Error> {
    let command = Command::Run(Box::new(args.job()?));
    let body = message::encode_command(&command);
    match message::parse_command(&body) {
        Ok(Command::Run(job)) => Ok((*job, body)),
        Ok(Command::Cancel(_)) => Err(Error::Usage("this is no job".into())),
        Err(rejection) => Err(Error::Usage(rejection.to_string())),
    }
}

/// Sends a job to the workers; waits for its end where that was asked for.
pub(super) async fn submit(config: &Config, args: &SubmitArgs) -> Result<u8, Error> {
    let (job, body) = job(&args.job)?;
    let broker = Broker::connect(worker::broker_settings(config, "submit")?).await?;
    let result = submit_through(&broker, args, &job, body).await;
    // Its queue for events goes with it; one that is left would fill for minutes.
    broker.close().await;
    result
}

async fn submit_through(broker: &Broker, args: &SubmitArgs, job: &Job, body: Vec<u8>) -> Result<u8, Error> {
    // Before the job is sent, so that none of its events is missed.
    let events = if args.wait { Some(broker.events("#").await?) } else { None };
    let properties = Properties {
        message_id: Some(job.id.to_string()),
        priority: args.priority,
        ..worker::command_properties()
    };
    if broker.publish_job(body.clone().into(), properties).await? == Routed::Nowhere {
        return Err(Error::Nowhere("the job queue is gone: start a worker, or run `backhaul check`"));
    }
    let Some(mut events) = events else {
        if args.job.json {
            say(String::from_utf8_lossy(&body));
        } else {
            say(submitted(job));
        }
        return Ok(0);
    };
    if !args.job.json {
        eprintln!("{}", submitted(job));
    }
    let bar = Bar::new(job.operation());
    let mut taken_up = false;
    let mut late = std::pin::pin!(sleep(TAKEN_UP_SOON));
    loop {
        let notice = tokio::select! {
            notice = events.next() => notice,
            () = &mut late, if !taken_up => {
                taken_up = true;
                bar.say(NOT_TAKEN_UP);
                continue;
            }
        };
        let Some(notice) = notice else { break };
        match message::parse_event(&notice.body) {
            Ok(Received::Job(event)) if event.job_id == job.id => {
                taken_up = true;
                match &event.happening {
                    Happening::Ended(completion) => {
                        bar.end();
                        return Ok(ended(completion, args.job.json.then_some(&notice.body[..])));
                    }
                    happening => show(&bar, job.operation(), happening),
                }
            }
            Ok(Received::Rejected { job_id, message, .. }) if job_id == Some(job.id) => {
                bar.end();
                return Err(Error::Usage(message));
            }
            // Events of other jobs, and of versions to come.
            Ok(_) | Err(_) => {}
        }
    }
    Err(Error::Nowhere(
        "the broker is gone; the job goes on: `backhaul watch` shows it, once the broker is back",
    ))
}

fn submitted(job: &Job) -> String {
    match &job.work {
        Work::Backup(work) => format!("job {} makes backup {}", job.id, work.backup_id),
        _ => format!("job {}", job.id),
    }
}

fn show(bar: &Bar, operation: Operation, happening: &Happening) {
    match happening {
        Happening::Progress(reading) => bar.show(operation, reading),
        Happening::FellBack { from, to, reason } => {
            bar.say(&format!("{from} is not possible, now {to}: {reason}"))
        }
        Happening::Accepted | Happening::Started { .. } | Happening::Ended(_) => {}
    }
}

/// Says how a job ended, as JSON or for people, and by which code to exit.
fn ended(completion: &Completion, json: Option<&[u8]>) -> u8 {
    match json {
        Some(body) => say(String::from_utf8_lossy(body)),
        None => say(format_args!("{} {}", completion.operation, render::completion(completion))),
    }
    match completion.outcome {
        Outcome::Succeeded => 0,
        Outcome::Failed(_) => FAILED,
        Outcome::Cancelled => CANCELLED,
    }
}

/// Does a job in this process.
pub(super) async fn run(config: &Config, args: &JobArgs) -> Result<u8, Error> {
    let (mut job, _) = job(args)?;
    let stores = Stores::open(config)?;
    stores.name_default(&mut job);
    let engine = engine_of(config, &stores, job.store.as_ref()).await?;
    let terminal = Terminal { bar: Bar::new(job.operation()), last: Mutex::default() };
    let report = Report::new(&terminal, &job);
    let limit = Arc::new(Limit::new(config.worker.bytes_per_second_max));
    let pace = Pace::new(Limit::new(config.worker.job_bytes_per_second_max), limit);
    let ctx = Context { pace, ..Context::default() };
    let attempts = Attempts::one();
    let work = runner::run(&ctx, engine, &job, &attempts, Every::telling(BAR_EVERY), &report);
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let interrupted = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        ctx.cancel.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let ended_as = tokio::select! {
        ended = work => ended,
        // Asked once, the job cleans up; asked twice, it is left as it is.
        () = interrupted => return Ok(CANCELLED),
    };
    terminal.bar.end();
    let (completion, is_kept) = match ended_as {
        Ended::Over(completion) => (completion, false),
        Ended::OverBefore(completion) => (completion, true),
        Ended::Later(problem) => return Err(Error::Problem(problem)),
        // Not reached: there is nobody to hand it back to.
        Ended::HandedBack => return Ok(CANCELLED),
        Ended::Untold(error) => return Err(error.into()),
    };
    // How the job ended counts more than what is left of it: a store that takes nothing is no reason to hide why.
    if !is_kept && let Err(error) = engine.catalog().settle(job.id).await {
        eprintln!("what the store keeps of the job could not be removed: {}", render::error(&error));
    }
    let last = terminal.last.into_inner().unwrap_or_else(PoisonError::into_inner);
    let body = last.map(|event| message::encode_event(&event, SOURCE));
    Ok(ended(&completion, body.as_deref().filter(|_| args.json)))
}

/// Shows the events of a job that is done in this process.
struct Terminal {
    bar: Bar,
    last: Mutex<Option<Event>>,
}

#[async_trait]
impl EventSink for Terminal {
    async fn send(&self, event: &Event) -> Result<(), event::Error> {
        show(&self.bar, event.operation, &event.happening);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(event.clone());
        Ok(())
    }
}

/// Asks all workers to end a job.
pub(super) async fn cancel(config: &Config, job_id: JobId) -> Result<u8, Error> {
    let broker = Broker::connect(worker::broker_settings(config, "cancel")?).await?;
    let body = message::encode_command(&Command::Cancel(job_id));
    match broker.publish_control(body.into(), worker::command_properties()).await? {
        Routed::Queued => {
            say(format_args!("job {job_id} is to end: at once if it runs, otherwise when it is taken up"));
            Ok(0)
        }
        Routed::Nowhere => Err(Error::Nowhere("the queue of cancels is gone: run `backhaul check`")),
    }
}

/// Shows what happens to every job.
pub(super) async fn watch(config: &Config) -> Result<u8, Error> {
    let broker = Broker::connect(worker::broker_settings(config, "watch")?).await?;
    let mut events = broker.events("#").await?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    loop {
        let notice = tokio::select! {
            notice = events.next() => notice,
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
        };
        let Some(notice) = notice else { break };
        match message::parse_event(&notice.body) {
            Ok(Received::Job(event)) => say(render::event(&event)),
            Ok(Received::Rejected { time, reason, message, .. }) => {
                say(render::rejected(time, &reason, &message));
            }
            Err(error) => eprintln!("an event could not be read: {}", render::error(&error)),
        }
    }
    drop(events);
    broker.close().await;
    Ok(0)
}
