//! Runs what Cinder asked for through the engine, and makes the store know what Cinder's own service has made.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Driver, StandIn, Trouble, stores};
use crate::cinder::database::BackupRow;
use crate::cinder::export_record;
use crate::engine::{self, Engine};
use crate::error::{Causes, Class, Problem};
use crate::event::{self, EventSink};
use crate::job::{BackupId, Context, Event, Job, JobId, Outcome, Record, RecordState, Work};
use crate::message::oslo::Request;
use crate::runner::{self, Attempts, Ended, Every, Report};

/// How often a job is tried.
const ATTEMPTS_MAX: u32 = 3;
/// How long it waits before it is tried again. Twice that is longer than the half minute after which Ceph lets go of an image that a
/// worker had open which has died.
const ATTEMPT_PAUSE: Duration = Duration::from_secs(20);
/// How often it is looked whether somebody wants the end of what runs.
const STATUS_LOOK: Duration = Duration::from_secs(3);
/// Chains are never longer.
const CHAIN_COUNT_MAX: usize = 10_000;

/// How a job ended.
pub(super) enum Ran {
    Succeeded,
    Failed(Problem),
    Cancelled,
}

impl From<engine::Error> for Ran {
    fn from(error: engine::Error) -> Self {
        Self::Failed(Problem::new(error.class(), &error))
    }
}

/// Takes the events of jobs that nobody wants to hear of on their way.
struct Unheard;

#[async_trait]
impl EventSink for Unheard {
    async fn send(&self, _: &Event) -> Result<(), event::Error> {
        Ok(())
    }
}

impl StandIn {
    /// The engine on the store, which some requests bring with them. The problem is one that does not pass.
    pub(super) async fn engine(&self, request: &Request) -> Result<Result<Engine, Problem>, Trouble> {
        let problem = match self.driver.asks_each_request(&self.conf) {
            false => match self.stores.engine(None).await {
                Ok(engine) => return Ok(Ok(engine.clone())),
                Err(problem) => problem,
            },
            true => match stores::store_for(&self.conf, self.driver, &request.context) {
                Ok((name, store)) => match self.stores.engine_on(&name, &store).await {
                    Ok(engine) => return Ok(Ok(engine)),
                    Err(error) => Problem::new(error.class(), &error),
                },
                Err(error) => Problem::new(Class::Permanent, &error),
            },
        };
        match problem.class {
            Class::Transient => Err(Trouble::Later(problem.to_string())),
            _ => Ok(Err(problem)),
        }
    }

    /// The record of a backup that was just made.
    pub(super) async fn made(
        &self,
        request: &Request,
        id: BackupId,
    ) -> Result<Result<Record, Problem>, Trouble> {
        let engine = match self.engine(request).await? {
            Ok(engine) => engine,
            Err(problem) => return Ok(Err(problem)),
        };
        match engine.catalog().available(id).await {
            Ok(record) => Ok(Ok(record)),
            Err(error) => Ok(Err(lasting(error)?)),
        }
    }

    /// Runs a job to its end, for as long as its backup has one of these statuses; whichever it has if these are none.
    pub(super) async fn run(
        &self,
        engine: &Engine,
        job: &Job,
        cancel: &CancellationToken,
        statuses: &[&str],
        sink: &dyn EventSink,
    ) -> Result<Ran, Trouble> {
        let hand_back = self.hand_back.clone();
        let ctx = Context { cancel: hand_back.child_token(), hand_back, ..Context::default() };
        let work = async {
            let report = Report::new(sink, job);
            let mut attempts = Attempts { max: ATTEMPTS_MAX, seconds_max: u32::MAX, ..Attempts::one() };
            loop {
                let every = Every::telling(self.progress_every());
                match runner::run(&ctx, engine, job, &attempts, every, &report).await {
                    Ended::Over(completion) | Ended::OverBefore(completion) => return Ok(completion.outcome),
                    Ended::HandedBack => return Err(Trouble::HandedBack),
                    Ended::Untold(error) => return Err(Trouble::Later(Causes(&error).to_string())),
                    Ended::Later(problem) => {
                        let attempt = attempts.current;
                        warn!(error = %problem, attempt, "not done for now, trying again later");
                        tokio::select! {
                            () = sleep(ATTEMPT_PAUSE) => {}
                            () = ctx.cancel.cancelled() => {}
                        }
                        attempts.earlier = attempts.clone().and_this(&problem);
                        attempts.current += 1;
                    }
                }
            }
        };
        let watched = async {
            self.await_other_status(job.backup_id(), cancel, statuses).await;
            info!(backup = %job.backup_id(), "cancelling");
            ctx.cancel.cancel();
            std::future::pending().await
        };
        let outcome = tokio::select! {
            outcome = work => outcome,
            never = watched => never,
        }?;
        if let Err(error) = engine.catalog().settle(job.id).await {
            warn!(error = %Causes(&error), "how the job ended stays in the store");
        }
        Ok(match outcome {
            Outcome::Succeeded => Ran::Succeeded,
            Outcome::Failed(problem) => Ran::Failed(problem),
            Outcome::Cancelled => Ran::Cancelled,
        })
    }

    /// Waits until somebody wants the end of what is done with a backup, for which it may have these statuses, or any.
    pub(super) async fn await_other_status(
        &self,
        id: BackupId,
        cancel: &CancellationToken,
        statuses: &[&str],
    ) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = sleep(STATUS_LOOK) => {}
            }
            if !statuses.is_empty()
                && let Ok(row) = self.database.backup_even_if_deleted(&id.to_string()).await
                && row.is_none_or(|row| !statuses.contains(&row.status.as_str()))
            {
                return;
            }
        }
    }

    /// Removes a backup from the store, whoever made it, and whatever there is of it.
    pub(super) async fn remove(&self, engine: &Engine, id: BackupId, job_id: JobId) -> Result<Ran, Trouble> {
        let engine = engine.with_volumes(self.volumes(self.attachments.known(&self.own_clusters)));
        let record = match engine.catalog().record(id).await {
            Ok(record) => record,
            Err(error) => return Ok(Ran::Failed(lasting(error)?)),
        };
        if record.as_ref().is_none_or(|record| matches!(record.state, RecordState::Creating(_)))
            && let Err(problem) = self.take_in(&engine, id).await?
        {
            // Cinder has left less than a backup, or nothing at all.
            match self.record_of(id).await? {
                Ok(left) => match engine.import_to_delete(record.as_ref(), left, problem).await {
                    Ok(()) | Err(engine::Error::BackupExists(_)) => {}
                    Err(error) => return Ok(Ran::Failed(lasting(error)?)),
                },
                // Of ours there is something.
                Err(_) if record.is_some() => {}
                Err(why) => {
                    info!(backup = %id, %why, "there is nothing of the backup in the store");
                    return Ok(Ran::Succeeded);
                }
            }
        }
        let children = match engine.catalog().children(id).await {
            Ok(children) => children,
            Err(error) => return Ok(Ran::Failed(lasting(error)?)),
        };
        for child in children {
            // Cinder's own service knows nothing of our records. One without a row is none of Cinder's, and stays; or Cinder has
            // forgotten it since, with what makes it a backup gone.
            let is_deleted = match self.database.backup_even_if_deleted(&child.to_string()).await? {
                Some(row) => row.deleted,
                None => match engine.has_lost(child).await {
                    Ok(lost) => lost,
                    Err(error) => return Ok(Ran::Failed(lasting(error)?)),
                },
            };
            if is_deleted {
                info!(backup = %child, "a backup that Cinder has deleted is removed from the records");
                Box::pin(self.remove(&engine, child, JobId::random())).await?;
            }
        }
        let job = Job { id: job_id, store: None, deadline: None, work: Work::Delete(id) };
        self.run(&engine, &job, &CancellationToken::new(), &[], &Unheard).await
    }

    /// Makes a backup known to the store that Cinder's own service made, and those that it builds on.
    pub(super) async fn take_in(
        &self,
        engine: &Engine,
        id: BackupId,
    ) -> Result<Result<(), Problem>, Trouble> {
        let mut unknown = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            let earlier = match engine.catalog().record(id).await {
                Ok(earlier) => earlier,
                Err(error) => return Ok(Err(lasting(error)?)),
            };
            let row =
                self.database.backup(&id.to_string()).await?.filter(|_| unknown.len() < CHAIN_COUNT_MAX);
            if let Some(earlier) = &earlier
                && !row.as_ref().is_some_and(|row| self.is_made_over(row, earlier))
            {
                break;
            }
            let Some(row) = row else {
                let message = format!("backup {id} is unknown to Cinder and to the store");
                return Ok(Err(Problem { class: Class::Permanent, message, causes: Vec::new() }));
            };
            unknown.push((id, earlier));
            next = row.parent_id.and_then(|id| id.parse().ok());
        }
        for (id, earlier) in unknown.into_iter().rev() {
            let record = match self.record_of(id).await? {
                Ok(record) => record,
                Err(problem) => return Ok(Err(problem)),
            };
            let taken = match &earlier {
                Some(earlier) => engine.import_over(earlier, record).await,
                None => engine.import(record).await.map(drop),
            };
            match taken {
                Ok(()) => info!(backup = %id, "a backup that Cinder made was taken in"),
                Err(error) => return Ok(Err(lasting(error)?)),
            }
        }
        Ok(Ok(()))
    }

    /// Whether Cinder's own service was handed the message of a backup that we had begun, by what its row says: ours says
    /// where a backup is once its record is that of a whole one.
    fn is_made_over(&self, row: &BackupRow, earlier: &Record) -> bool {
        let is_given_out = ["available", "restoring", "deleting"].contains(&row.status.as_str());
        let is_elsewhere = match self.driver {
            // Its names are the same, and an attempt says in the image that it is its own.
            Driver::Ceph => true,
            _ => row.service_metadata.as_ref() != Some(&earlier.service_metadata),
        };
        matches!(earlier.state, RecordState::Creating(_))
            && is_given_out
            && row.service_metadata.is_some()
            && is_elsewhere
    }

    /// The record of a backup, made of its row.
    async fn record_of(&self, id: BackupId) -> Result<Result<Record, Problem>, Trouble> {
        let Some(mut fields) = self.database.backup_columns(&id.to_string()).await? else {
            let message = format!("backup {id} is unknown to Cinder");
            return Ok(Err(Problem { class: Class::Permanent, message, causes: Vec::new() }));
        };
        // What is done with it at the moment does not matter.
        fields.insert("status".into(), json!("available"));
        let service = fields.get("service").and_then(Value::as_str).unwrap_or_default().to_owned();
        let record = export_record::of_fields(service, fields, &self.form);
        Ok(record.map_err(|error| Problem::new(Class::Permanent, &error)))
    }
}

/// What is wrong for good; what may pass is tried later.
pub(super) fn lasting(error: engine::Error) -> Result<Problem, Trouble> {
    match error.class() {
        Class::Transient => Err(Trouble::Later(Causes(&error).to_string())),
        class => Ok(Problem::new(class, &error)),
    }
}
