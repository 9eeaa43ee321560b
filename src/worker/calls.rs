//! Jobs as remote calls of oslo.messaging, for programs of OpenStack's kind that have no Cinder.
//!
//! A request becomes a command in the job queue, with the id of the request for the job's if it names none, and goes the way of
//! all jobs. The request is acknowledged once the broker has the command safely, so that a restore is not begun again after
//! somebody was told that it was done. Who calls, and does not only cast, hears how the job ends from the worker that took
//! the call; if that one is stopped before, they hear no more, and the job goes on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{Instrument, info, info_span, warn};

use super::{command_properties, lost_task};
use crate::broker::{self, Broker, Properties, Reach, Routed, RpcQueues, RpcSettings, Subscription};
use crate::cinder::rpc::{Incoming, Requests, Rpc};
use crate::error::Causes;
use crate::job::{Command, Happening, JobId, Outcome};
use crate::message::oslo::{Failure, Request};
use crate::message::{self, Received};

/// The exchange of oslo.messaging's senders that say nothing else: `control_exchange`.
const EXCHANGE: &str = "openstack";
/// The version of the interface.
const VERSION: (u32, u32) = (1, 0);
/// What can be asked for.
const METHODS: [&str; 4] = ["backup", "restore", "delete", "verify"];
/// How many calls are taken at once whose commands are not in the job queue yet; more wait with the broker.
const CALLS_COUNT_MAX: u16 = 1000;
/// For how long the end of a job is waited for: it may have been told while this worker was cut off, or the job be purged.
const ANSWER_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long it takes until the broker is asked again that was not there.
const AGAIN_PAUSE: Duration = Duration::from_secs(5);

type Answer = Result<Value, Failure>;

/// Takes calls.
pub(super) struct Calls {
    rpc: Rpc,
    broker: Broker,
    topic: String,
    host: String,
    message_bytes_max: usize,
    /// Who waits for the end of which job.
    waiting: Mutex<HashMap<JobId, Vec<oneshot::Sender<Answer>>>>,
}

impl Calls {
    /// Gets ready to take the calls of `topic`, as its instance on `host`. Commands go to `broker`.
    pub fn new(
        reach: Reach,
        broker: Broker,
        topic: &str,
        host: &str,
        message_bytes_max: usize,
    ) -> Result<Self, broker::Error> {
        // What senders that say nothing else declare the exchange as.
        let queues = RpcQueues::default();
        let rpc = Rpc::start(RpcSettings { reach, exchange: EXCHANGE.into(), queues })?;
        Ok(Self {
            rpc,
            broker,
            topic: topic.into(),
            host: host.into(),
            message_bytes_max,
            waiting: Mutex::default(),
        })
    }

    /// Takes calls until it is dropped.
    pub async fn take(self: Arc<Self>) {
        let (mut events, mut requests) = loop {
            match self.open().await {
                Ok(opened) => break opened,
                Err(error) => warn!(error = %Causes(&error), "no calls are taken yet, trying again"),
            }
            sleep(AGAIN_PAUSE).await;
        };
        info!(topic = self.topic, "calls of oslo.messaging are taken");
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                Some(notice) = events.next() => self.hear(&notice.body),
                Some(incoming) = requests.next() => {
                    let calls = self.clone();
                    let span = info_span!("call", method = incoming.request.method);
                    running.spawn(async move { calls.handle(incoming).await }.instrument(span));
                }
                Some(ended) = running.join_next() => lost_task(ended),
                // The worker ends.
                else => return,
            }
        }
    }

    async fn open(&self) -> Result<(Subscription, Requests), broker::Error> {
        // Before the first command is sent, so that no end is missed.
        let events = self.broker.events("#").await?;
        Ok((events, self.rpc.serve(&self.topic, &self.host, CALLS_COUNT_MAX).await?))
    }

    async fn handle(&self, mut incoming: Incoming) {
        let (job_id, body) = match self.command_of(&incoming.request) {
            Ok(command) => command,
            Err(failure) => {
                warn!(error = failure.message, "not a job");
                return settled(incoming.reply(Err(failure)).await);
            }
        };
        // Before the command is sent: its job may be done at once.
        let answer = incoming.request.call.is_some().then(|| self.expect(job_id));
        let properties = Properties { message_id: Some(job_id.to_string()), ..command_properties() };
        match self.broker.publish_job(body.into(), properties).await {
            Ok(Routed::Queued) => info!(job = %job_id, "job submitted"),
            Ok(Routed::Nowhere) => {
                let failure = Failure::new("builtins", "RuntimeError", "the job queue is gone");
                return settled(incoming.reply(Err(failure)).await);
            }
            Err(error) => {
                warn!(error = %Causes(&error), "job not submitted, trying again later");
                sleep(AGAIN_PAUSE).await;
                return settled(incoming.requeue().await);
            }
        }
        settled(incoming.accept().await);
        if let Some(answer) = answer
            && let Some(answer) = heard(job_id, answer, ANSWER_MAX).await
        {
            settled(incoming.reply(answer).await);
        }
    }

    /// The job that is asked for, and its command.
    fn command_of(&self, request: &Request) -> Result<(JobId, Vec<u8>), Failure> {
        if !request.fits(VERSION.0, VERSION.1) {
            return Err(Failure::unsupported_version(request));
        }
        if !METHODS.contains(&request.method.as_str()) {
            return Err(Failure::no_such_method(&request.method));
        }
        // Python's None is nothing.
        let mut command = request.args.clone();
        command.retain(|_, value| !value.is_null());
        command.insert("version".into(), json!(1));
        command.insert("operation".into(), json!(request.method));
        let id = request.unique_id.as_deref().and_then(|id| uuid::Uuid::try_parse(id).ok());
        let id = id.unwrap_or_else(uuid::Uuid::new_v4);
        command.entry("job_id").or_insert_with(|| json!(id));
        let body = Value::Object(command).to_string().into_bytes();
        let refused = |why: String| Failure::new("builtins", "ValueError", why);
        if body.len() > self.message_bytes_max {
            return Err(refused(format!("the arguments are longer than {} bytes", self.message_bytes_max)));
        }
        match message::parse_command(&body) {
            Ok(Command::Run(job)) => Ok((job.id, body)),
            Ok(Command::Cancel(_)) => Err(Failure::no_such_method(&request.method)),
            Err(rejection) => Err(refused(rejection.to_string())),
        }
    }

    fn expect(&self, job_id: JobId) -> oneshot::Receiver<Answer> {
        let (sender, answer) = oneshot::channel();
        let mut waiting = self.waiting();
        // Those whose command was not sent wait no more.
        waiting.retain(|_, senders| {
            senders.retain(|sender| !sender.is_closed());
            !senders.is_empty()
        });
        waiting.entry(job_id).or_default().push(sender);
        answer
    }

    /// Answers those who wait for the end of the job that an event tells of.
    fn hear(&self, body: &[u8]) {
        let failed = |message: String| Err(Failure::new("builtins", "RuntimeError", message));
        let (job_id, answer) = match message::parse_event(body) {
            Ok(Received::Job(event)) => {
                let Happening::Ended(completion) = event.happening else { return };
                let answer = match completion.outcome {
                    Outcome::Succeeded => Ok(serde_json::from_slice(body).unwrap_or_default()),
                    Outcome::Failed(problem) => failed(problem.to_string()),
                    Outcome::Cancelled => failed("the job was cancelled".into()),
                };
                (event.job_id, answer)
            }
            Ok(Received::Rejected { job_id: Some(job_id), message, .. }) => (job_id, failed(message)),
            // Events of versions to come, and of messages that name no job.
            Ok(Received::Rejected { .. }) | Err(_) => return,
        };
        for sender in self.waiting().remove(&job_id).unwrap_or_default() {
            // Nobody may wait any more.
            let _ = sender.send(answer.clone());
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<JobId, Vec<oneshot::Sender<Answer>>>> {
        // Nothing panics while it holds the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is heard of the end of a job, or that nothing was. None if nobody is to hear of it any more.
async fn heard(job_id: JobId, answer: oneshot::Receiver<Answer>, longest: Duration) -> Option<Answer> {
    match timeout(longest, answer).await {
        Ok(answer) => answer.ok(),
        Err(_) => {
            warn!(job = %job_id, "nothing was heard of the end of the job, and who called is told so");
            let message = format!(
                "nothing was heard of the end of job {job_id}: `backhaul list` shows which backups there are"
            );
            Some(Err(Failure::new("builtins", "RuntimeError", message)))
        }
    }
}

fn settled(settled: Result<(), broker::Error>) {
    if let Err(error) = settled {
        warn!(error = %Causes(&error), "a call was not settled");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_whose_jobs_end_was_missed_is_not_waited_for_for_ever() {
        let (_sender, answer) = oneshot::channel();
        let told = heard(JobId::random(), answer, Duration::ZERO).await;
        assert!(
            matches!(&told, Some(Err(failure)) if failure.message.contains("nothing was heard")),
            "{told:?}"
        );
    }
}
