//! A worker: the place where the rooms are put together. Takes deliveries, has them run, and settles them.
//!
//! A delivery is settled once, and only after what it caused is safe: data, record, event confirmed by the broker,
//! then the acknowledgement. Whatever dies in between leads to the same job again, which finds how far it had come.

mod calls;
mod stores;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use rayon_core::ThreadPoolBuildError;
use sha2::{Digest as _, Sha256};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, info_span, warn};
use uuid::Uuid;

use crate::broker::{self, Broker, Delivery, Properties, Subscription, Turn};
use crate::config::{self, Config, ConfigError};
use crate::engine::{Engine, KEPT};
use crate::error::{Causes, Class, Problem};
use crate::event::{self, Native};
use crate::health::{self, Phase};
use crate::job::{Command, Context, Job, JobId, Limit, Outcome, Pace, StoreName, VolumeId, Work};
use crate::message::{self, Control, Reason, Rejection, Unkept};
use crate::runner::{self, Attempts, Ended, Every, Places, Report};
use crate::store;
#[cfg(feature = "ceph")]
use crate::volume::class_of;

#[cfg(feature = "ceph")]
pub use self::stores::access;
pub use self::stores::{Stores, store_folders};

/// How long another worker may take to say that it runs a job.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How often a worker removes what is kept of jobs for longer than it is of use.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);
/// How often stores are tried again that were not reached.
const REACH_EVERY: Duration = Duration::from_secs(60);
/// How often a worker shows that it lives.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// How long it may not do so.
const BEAT_TIME_MAX: Duration = Duration::from_secs(30);
/// How long jobs that are handed back may take to stop; what they write then is harmless, but of no use.
const HAND_BACK_TIME_MAX: Duration = Duration::from_secs(10);
/// How long jobs that are dropped may keep a worker that is to end at once.
const DROP_TIME_MAX: Duration = Duration::from_secs(2);
/// Jobs whose cancelling is remembered, in case they are delivered later.
const CANCELLED_MAX: usize = 10_000;
/// How often a job that waits for a place is looked after: somebody may have asked for its end.
const CANCEL_LOOK: Duration = Duration::from_millis(500);
/// When the jobs that are put off are looked through after a cancel: again, for one may just be put off at the first time.
const RECALLS: [Duration; 2] = [Duration::ZERO, Duration::from_secs(1)];
/// Jobs that were put off and are to end, at once.
const RECALLED_MAX: usize = 8;
/// For how long a cancel is remembered that the stores keep as well.
const CANCEL_KEPT_MAX: SignedDuration = SignedDuration::from_secs(60);
/// How long a message is kept whose rejection the broker does not take.
const UNTOLD_PAUSE: Duration = Duration::from_secs(2);
/// How many deliveries of a job that runs wait here for its end; more are put off. One that the broker handed out again is
/// always taken in.
const ADOPTED_MAX: usize = 1;
/// Jobs that wait for a place here, at most: enough to choose from.
const AHEAD_MAX: u16 = 16;
/// How long they wait until others, on other workers, may have them.
const AHEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a store may take to say whose a backup is.
const PROJECT_TIME_MAX: Duration = Duration::from_secs(2);
/// Jobs whose turn others let pass, at most.
const AWAITING_MAX: usize = 10_000;
/// How long after its wait a job may take to come for its turn.
const LATE_MAX: Duration = Duration::from_secs(30);

/// Why a worker, or a command that works on a store, could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot be used.
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    /// A store cannot be opened.
    #[error("store.{name} cannot be used")]
    Store {
        /// The store.
        name: StoreName,
        /// Why.
        source: store::Error,
    },
    /// The pool of a store cannot be opened.
    #[cfg(feature = "ceph")]
    #[error("store.{name} cannot be used")]
    Pool {
        /// The store.
        name: StoreName,
        /// Why.
        source: io::Error,
    },
    /// The broker's settings cannot be used.
    #[error("the broker cannot be used")]
    Broker(#[from] broker::Error),
    /// Nobody can ask after the worker's health.
    #[error("worker.health_listen: listen at {address}")]
    Health {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Threads could not be started.
    #[error("start {0} CPU threads")]
    Threads(usize, #[source] ThreadPoolBuildError),
}

impl Error {
    /// What it means for a job.
    pub fn class(&self) -> Class {
        match self {
            #[cfg(feature = "ceph")]
            Self::Pool { source, .. } => class_of(source.kind()),
            Self::Store { source, .. } => source.class(),
            _ => Class::Permanent,
        }
    }
}

/// How to reach the broker, in the words of the broker's room. `purpose` tells this connection from others in the
/// broker's own list.
pub fn broker_settings(config: &Config, purpose: &str) -> Result<broker::Settings, Error> {
    let settings = config.broker()?;
    Ok(broker::Settings {
        url: settings.url.clone(),
        prefix: settings.prefix.clone(),
        connection_name: format!("backhaul {purpose} {}", config.worker.name),
        heartbeat_seconds: settings.heartbeat_seconds,
        tls: broker::Tls {
            ca_file: settings.tls.ca_file.clone(),
            client_certificate_file: settings.tls.client_certificate_file.clone(),
            client_key_file: settings.tls.client_key_file.clone(),
        },
        queue_kind: match settings.queue {
            config::Queue::Quorum => broker::QueueKind::Quorum,
            config::Queue::Classic => broker::QueueKind::Classic,
        },
        retry_delay_seconds: settings.retry_delay_seconds,
        retry_delay_seconds_max: settings.retry_delay_seconds_max,
        reconnect_seconds_max: settings.reconnect_seconds_max,
        publish_seconds_max: settings.publish_seconds_max,
        message_bytes_max: settings.message_bytes_max,
    })
}

/// When a worker is to end.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Take nothing more, and let what runs come to its end, for `drain_seconds_max`; what runs then goes back to the
    /// broker.
    pub drain: CancellationToken,
    /// End now; what runs goes back to the broker.
    pub now: CancellationToken,
}

/// Works until it is told to end.
pub async fn work(config: &Config, shutdown: Shutdown) -> Result<(), Error> {
    let settings = broker_settings(config, "worker")?;
    let listener = match config.worker.health_listen {
        Some(address) => {
            let failed = |source| Error::Health { address, source };
            Some(health::listen(address).await.map_err(failed)?)
        }
        None => None,
    };
    let (message_bytes_max, reach) = (settings.message_bytes_max, settings.reach());
    let jobs_max = config.worker.jobs_max;
    let ahead_max = jobs_max.min(AHEAD_MAX);
    let worker = Arc::new(Worker {
        id: Uuid::new_v4().to_string(),
        stores: Stores::open(config)?,
        broker: Broker::start(settings)?,
        source: format!("/backhaul/worker/{}", config.worker.name),
        message_bytes_max,
        attempts_max: config.worker.attempts_max,
        attempt_seconds_max: config.worker.attempt_seconds_max,
        every: Every::telling(Duration::from_secs(config.worker.progress_seconds.into())),
        job_bytes_per_second_max: config.worker.job_bytes_per_second_max,
        limit: Arc::new(Limit::new(config.worker.bytes_per_second_max)),
        hand_back: CancellationToken::new(),
        places: Places::new(jobs_max.into(), ahead_max.into(), AHEAD_TIME_MAX),
        jobs: Mutex::default(),
        life: Mutex::new(Life::new()),
    });
    // What goes on beside the jobs, until the worker ends.
    let mut beside = JoinSet::new();
    if let Some(listener) = listener {
        let of_worker = worker.clone();
        beside.spawn(async move { match health::serve(listener, move || of_worker.health()).await {} });
    }
    if let Some(topic) = &config.worker.oslo_topic {
        let (broker, name) = (worker.broker.clone(), &config.worker.name);
        let calls = Arc::new(calls::Calls::new(reach, broker, topic, name, message_bytes_max)?);
        beside.spawn(calls.take());
    }
    let drain_time_max = Duration::from_secs(config.worker.drain_seconds_max.into());
    // One more than may wait, to look whether there are others.
    let slots = (jobs_max.into(), usize::from(ahead_max) + 1);
    let result = worker.work(slots, drain_time_max, &shutdown, &mut beside).await;
    worker.broker.close().await;
    beside.shutdown().await;
    info!("worker stopped");
    result
}

fn lost_task(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a job's task broke; its delivery goes back to the broker");
    }
}

struct Worker {
    /// Tells this process from all other workers.
    id: String,
    stores: Stores,
    broker: Broker,
    source: String,
    message_bytes_max: usize,
    attempts_max: u32,
    attempt_seconds_max: u32,
    every: Every,
    job_bytes_per_second_max: Option<NonZeroU64>,
    /// How fast all jobs together may be.
    limit: Arc<Limit>,
    /// Fires when jobs are to stop where they are, for other workers to go on with.
    hand_back: CancellationToken,
    places: Arc<Places>,
    jobs: Mutex<Jobs>,
    life: Mutex<Life>,
}

/// What is known of the worker itself at this moment.
struct Life {
    stage: Stage,
    /// When it showed last that it lives.
    beat: Instant,
    broker_connected_since: Option<Timestamp>,
    /// The stores that were not reached yet, and why.
    away: BTreeMap<StoreName, String>,
}

enum Stage {
    Starting,
    /// It takes jobs if the number is not 0.
    Working(watch::Receiver<usize>),
    Draining,
}

impl Life {
    fn new() -> Self {
        Self {
            stage: Stage::Starting,
            beat: Instant::now(),
            broker_connected_since: None,
            away: BTreeMap::new(),
        }
    }
}

/// What this worker knows of jobs at this moment.
#[derive(Default)]
struct Jobs {
    running: HashMap<JobId, Running>,
    /// The latest ids that were cancelled without running here, and when that was heard.
    cancelled: VecDeque<(JobId, Timestamp)>,
    /// Who is to hear which jobs run elsewhere.
    asked: HashMap<JobId, oneshot::Sender<()>>,
    /// The jobs of all workers that were put off until others have ended.
    awaiting: HashMap<JobId, Awaiting>,
}

/// A job that waits for its turn.
struct Awaiting {
    /// What it is to have for itself.
    names: Vec<String>,
    since: Timestamp,
    /// When it must have come again, if others are to let it pass.
    until: Instant,
}

impl Jobs {
    /// When somebody asked for the end of a job that did not run here, if that was lately. It is told once.
    fn take_cancel(&mut self, id: JobId) -> Option<Timestamp> {
        let index = self.cancelled.iter().position(|(other, _)| *other == id)?;
        let (_, heard) = self.cancelled.remove(index)?;
        Some(heard).filter(|heard| Self::is_lately(*heard))
    }

    /// Remembers that somebody asked for the end of a job.
    fn keep_cancel(&mut self, id: JobId) {
        self.cancelled.retain(|(other, _)| *other != id);
        if self.cancelled.len() == CANCELLED_MAX {
            self.cancelled.pop_front();
        }
        self.cancelled.push_back((id, Timestamp::now()));
    }

    /// Whether somebody asked for the end of a job lately that has not ended for that yet.
    fn is_cancelled(&self, id: JobId) -> bool {
        self.cancelled.iter().any(|(other, heard)| *other == id && Self::is_lately(*heard))
    }

    /// Whether a cancel that was heard then still counts here.
    fn is_lately(heard: Timestamp) -> bool {
        Timestamp::now().duration_since(heard) < CANCEL_KEPT_MAX
    }

    /// Whether another job waits for one of these names for longer.
    fn is_behind(&self, id: JobId, names: &[String], since: Timestamp) -> bool {
        let now = Instant::now();
        self.awaiting.iter().any(|(other, awaiting)| {
            (awaiting.since, *other) < (since, id)
                && awaiting.until > now
                && awaiting.names.iter().any(|name| names.contains(name))
        })
    }

    fn awaits(&mut self, id: JobId, names: Vec<String>, since: Timestamp, wait: Duration) {
        if self.awaiting.len() >= AWAITING_MAX {
            let now = Instant::now();
            self.awaiting.retain(|_, awaiting| awaiting.until > now);
        }
        if self.awaiting.len() < AWAITING_MAX || self.awaiting.contains_key(&id) {
            let until = Instant::now() + wait + LATE_MAX;
            self.awaiting.insert(id, Awaiting { names, since, until });
        }
    }
}

struct Running {
    job: Job,
    /// What no other job is to work on meanwhile.
    alone: Vec<String>,
    cancel: CancellationToken,
    /// Deliveries of the same job that came while it ran: the broker had given the first one up, or it was sent once more.
    adopted: Vec<Delivery>,
    /// Whether the job was sent once more and waits until this run of it has ended.
    has_copy_elsewhere: bool,
}

/// What is done with a delivery at first.
enum Now {
    Begin,
    /// Another job must end before.
    Wait,
    /// It runs here already, and enough wait here for its end.
    PutOff,
    /// It has the id of another job.
    Reject,
}

/// That a job runs here. Dropped before that was ended, as when the job's task breaks, it is ended all the same, and the
/// deliveries that came meanwhile go back to the broker.
struct Here<'a> {
    jobs: &'a Mutex<Jobs>,
    id: JobId,
    is_over: bool,
}

impl Here<'_> {
    /// Says of the job that it runs here no more. Gives the deliveries of it that came meanwhile.
    fn end(&mut self) -> Vec<Delivery> {
        if self.is_over {
            // What has the id by now is another run.
            return Vec::new();
        }
        self.is_over = true;
        locked(self.jobs).running.remove(&self.id).map_or_else(Vec::new, |running| running.adopted)
    }
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        drop(self.end());
    }
}

fn locked(jobs: &Mutex<Jobs>) -> MutexGuard<'_, Jobs> {
    // Nothing panics while it holds the lock.
    jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        locked(&self.jobs)
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        // The same.
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes jobs until it is told to end, and then brings to an end what runs.
    async fn work(
        self: &Arc<Self>,
        (jobs_max, ahead_count): (usize, usize),
        drain_time_max: Duration,
        shutdown: &Shutdown,
        beside: &mut JoinSet<()>,
    ) -> Result<(), Error> {
        let away = tokio::select! {
            away = self.stores.reach() => away?,
            () = shutdown.drain.cancelled() => return Ok(()),
            () = shutdown.now.cancelled() => return Ok(()),
        };
        let mut deliveries = self.broker.jobs(jobs_max, ahead_count);
        let (mut control, mut cancels) = (self.broker.control(), self.broker.cancels());
        let mut running = JoinSet::new();
        let mut beats = interval(BEAT_EVERY);
        self.begin(Stage::Working(deliveries.consuming()));
        self.life().away = away;
        let (watching, sweeping, reaching) = (self.clone(), self.clone(), self.clone());
        beside.spawn(async move { watching.watch_broker().await });
        beside.spawn(async move { sweeping.sweep_on().await });
        beside.spawn(async move { reaching.reach_rest().await });
        info!(jobs_max, stores = self.stores.names().count(), "worker started");

        loop {
            tokio::select! {
                Some(delivery) = deliveries.next() => {
                    let worker = self.clone();
                    running.spawn(async move { worker.handle(delivery).await });
                }
                Some(notice) = control.next() => self.take_control(&notice.body),
                Some(delivery) = cancels.next() => {
                    let worker = self.clone();
                    running.spawn(async move { worker.keep_cancel(delivery).await });
                }
                Some(ended) = running.join_next() => lost_task(ended),
                _ = beats.tick() => self.life().beat = Instant::now(),
                () = shutdown.drain.cancelled() => break,
                () = shutdown.now.cancelled() => break,
            }
        }

        self.begin(Stage::Draining);
        let running_count = || self.jobs().running.len();
        info!(running = running_count(), "stopping: no more jobs are taken");
        deliveries.stop();
        cancels.stop();
        self.places.close();
        if !self.wind_down(&mut running, &mut control, drain_time_max, &shutdown.now).await {
            warn!(
                running = running_count(),
                "stopping: what runs is handed back, for other workers to go on with"
            );
            self.hand_back.cancel();
            if !self.wind_down(&mut running, &mut control, HAND_BACK_TIME_MAX, &shutdown.now).await {
                warn!(running = running_count(), "stopping at once: what runs goes back to the broker");
                // Closing what one has open may wait for a cluster that does not answer.
                let _ = timeout(DROP_TIME_MAX, running.shutdown()).await;
            }
        }
        Ok(())
    }

    /// Waits until nothing runs any more. False when that takes too long, or all is to end `now`.
    async fn wind_down(
        self: &Arc<Self>,
        running: &mut JoinSet<()>,
        control: &mut Subscription,
        time_max: Duration,
        now: &CancellationToken,
    ) -> bool {
        let mut beats = interval(BEAT_EVERY);
        let mut late = std::pin::pin!(sleep(time_max));
        loop {
            tokio::select! {
                ended = running.join_next() => match ended {
                    Some(ended) => lost_task(ended),
                    None => return true,
                },
                Some(notice) = control.next() => self.take_control(&notice.body),
                _ = beats.tick() => self.life().beat = Instant::now(),
                () = &mut late => return false,
                () = now.cancelled() => return false,
            }
        }
    }

    fn begin(&self, stage: Stage) {
        let mut life = self.life();
        (life.stage, life.beat) = (stage, Instant::now());
    }

    /// How it stands with the worker, for whoever asks after its health.
    fn health(&self) -> health::Report {
        let running_count = self.jobs().running.len();
        let life = self.life();
        let beat_age = life.beat.elapsed();
        let (phase, why) = match &life.stage {
            // Reaching the stores has limits of its own.
            Stage::Starting => (Phase::Starting, Some("the stores are not looked at yet".into())),
            _ if beat_age > BEAT_TIME_MAX => {
                (Phase::Stuck, Some(format!("for {} seconds it has done nothing", beat_age.as_secs())))
            }
            Stage::Draining => (Phase::Draining, Some("it was told to stop".into())),
            Stage::Working(consuming) => match &*self.broker.state().borrow() {
                state @ broker::State::Disconnected { .. } => (Phase::NoBroker, Some(state.to_string())),
                broker::State::Connected if *consuming.borrow() == 0 => {
                    (Phase::NoQueue, Some("the job queue is not consumed".into()))
                }
                broker::State::Connected => (Phase::Ready, None),
            },
        };
        health::Report {
            phase,
            why,
            running_count,
            broker_connected_since: life.broker_connected_since,
            stores_not_reached: life.away.iter().map(|(name, why)| (name.to_string(), why.clone())).collect(),
        }
    }

    /// Notes since when there is a connection to the broker, until that is closed.
    async fn watch_broker(&self) {
        let mut state = self.broker.state();
        loop {
            let connected = *state.borrow_and_update() == broker::State::Connected;
            self.life().broker_connected_since = connected.then(Timestamp::now);
            if state.changed().await.is_err() {
                return;
            }
        }
    }

    /// Tries the stores again that were not reached, until all of them were.
    async fn reach_rest(&self) {
        loop {
            let away: Vec<StoreName> = self.life().away.keys().cloned().collect();
            if away.is_empty() {
                return;
            }
            sleep(REACH_EVERY).await;
            for name in away {
                match self.stores.reach_one(&name).await {
                    Ok(()) => {
                        info!(store = %name, "store reached");
                        self.life().away.remove(&name);
                    }
                    Err(error) => drop(self.life().away.insert(name, Causes(&error).to_string())),
                }
            }
        }
    }

    async fn handle(&self, delivery: Delivery) {
        let mut deliveries = vec![delivery];
        while let Some(delivery) = deliveries.pop() {
            let command = if delivery.oversize {
                let (bytes, bytes_max) = (delivery.body.len(), self.message_bytes_max);
                let message = format!("the message has {bytes} bytes: at most {bytes_max} are taken");
                Err(Rejection { reason: Reason::Oversize, message, job_id: None })
            } else {
                message::parse_command(&delivery.body)
            };
            let settled = match command {
                Ok(Command::Run(mut job)) => {
                    self.stores.name_default(&mut job);
                    let span = info_span!("job", job = %job.id, operation = %job.operation(), backup = %job.backup_id());
                    self.run(delivery, &job, &mut deliveries).instrument(span).await
                }
                // It was put off, and all workers have heard of it.
                Ok(Command::Cancel(id)) if delivery.properties.attempt > 1 => {
                    self.keep_in_stores(delivery, id).await
                }
                Ok(Command::Cancel(id)) => self.pass_on_cancel(delivery, id).await,
                Err(rejection) => self.reject(delivery, &rejection).await,
            };
            if let Err(error) = settled {
                // It will be delivered again, and then found to be done.
                warn!(error = %Causes(&error), "delivery not settled");
            }
        }
    }

    /// Runs a job, unless it runs here already or has to wait. Adds to `late` the deliveries of the job that its end does
    /// not settle.
    async fn run(
        &self,
        delivery: Delivery,
        job: &Job,
        late: &mut Vec<Delivery>,
    ) -> Result<(), broker::Error> {
        let pace = Pace::new(Limit::new(self.job_bytes_per_second_max), self.limit.clone());
        let (cancel, hand_back) = (self.hand_back.child_token(), self.hand_back.clone());
        let ctx = Context { cancel, hand_back, pace, ..Context::default() };
        let (attempts, alone, mut is_to_end) = (self.attempts(&delivery), needs_alone(job), false);
        // One that runs here already has a place.
        let runs_here = self.jobs().running.contains_key(&job.id);
        let _place = if runs_here {
            None
        } else {
            let place = async { self.places.take(self.project_of(job).await, delivery.since).await };
            tokio::select! {
                place = place => match place {
                    Some(place) => Some(place),
                    None => return delivery.await_place().await,
                },
                // It needs none, for there is nothing to be done but to say so.
                () = self.until_it_is_to_end(&ctx, job, &attempts) => None,
                // The broker hands it out again.
                () = delivery.lost() => return Ok(()),
            }
        };
        let now = 'now: {
            let mut jobs = self.jobs();
            if let Some(running) = jobs.running.get_mut(&job.id) {
                // Sent again with another deadline, it is the same job all the same.
                if (&running.job.store, &running.job.work) != (&job.store, &job.work) {
                    break 'now Now::Reject;
                }
                // Each that is kept here takes the room of one that could be worked on.
                if running.adopted.len() >= ADOPTED_MAX && !attempts.redelivered {
                    running.has_copy_elsewhere = true;
                    break 'now Now::PutOff;
                }
                info!("job runs here already, delivery adopted");
                running.adopted.push(delivery);
                return Ok(());
            }
            if jobs.take_cancel(job.id).is_some_and(|at| attempts.are_ended_by_cancel(at)) {
                ctx.cancel.cancel();
            }
            let is_taken = |running: &Running| running.alone.iter().any(|name| alone.contains(name));
            // One that is to end does nothing that others must wait for.
            is_to_end = ctx.cancel.is_cancelled() || job.is_late(Timestamp::now());
            let is_behind = || jobs.is_behind(job.id, &alone, delivery.since);
            if !is_to_end && (jobs.running.values().any(is_taken) || is_behind()) {
                break 'now Now::Wait;
            }
            let running = Running {
                job: job.clone(),
                alone: alone.clone(),
                cancel: ctx.cancel.clone(),
                adopted: Vec::new(),
                has_copy_elsewhere: false,
            };
            jobs.running.insert(job.id, running);
            Now::Begin
        };
        let mut here = match now {
            Now::Begin => Here { jobs: &self.jobs, id: job.id, is_over: false },
            Now::Wait => {
                info!("another job works on the same volume, delivery put off");
                self.tell_wait(&delivery, job.id, alone).await;
                return delivery.await_turn().await;
            }
            Now::PutOff => return delivery.await_turn().await,
            Now::Reject => {
                let message =
                    format!("job_id: another job {} runs here: give each job an id of its own", job.id);
                let reason = Reason::ImpossibleValue;
                return self.reject(delivery, &Rejection { reason, message, job_id: Some(job.id) }).await;
            }
        };
        let turns = if is_to_end { Some(Vec::new()) } else { self.take_turns(&alone).await };
        let Some(turns) = turns else {
            info!("another worker's job works on the same volume, delivery put off");
            self.tell_wait(&delivery, job.id, alone).await;
            let mut settled = Ok(());
            for delivery in std::iter::once(delivery).chain(here.end()) {
                settled = delivery.await_turn().await;
            }
            return settled;
        };
        if self.jobs().awaiting.remove(&job.id).is_some() {
            self.tell(Control::WaitsNoMore { job_id: job.id }).await;
        }
        self.run_in_turn(delivery, &ctx, job, turns, &mut here, late).await
    }

    /// Waits until a job that does not run yet is to end: its deadline has passed, or somebody has asked for that, in which case
    /// its token has fired.
    async fn until_it_is_to_end(&self, ctx: &Context, job: &Job, attempts: &Attempts) {
        while !job.is_late(Timestamp::now()) {
            let cancelled_at = self.jobs().take_cancel(job.id);
            if cancelled_at.is_some_and(|at| attempts.are_ended_by_cancel(at)) {
                ctx.cancel.cancel();
                return;
            }
            sleep(CANCEL_LOOK).await;
        }
    }

    /// Whose a job is: of its backup, where it names no project itself. None if that is not known, or not soon.
    async fn project_of(&self, job: &Job) -> Option<String> {
        if let Work::Backup(work) = &job.work {
            return work.project_id.clone();
        }
        let record = async {
            let engine = self.stores.engine(job.store.as_ref()).await.ok()?;
            engine.catalog().record(job.backup_id()).await.ok()?
        };
        timeout(PROJECT_TIME_MAX, record).await.ok()??.project_id
    }

    /// Lets all workers know that a job is about to be put off, so that none that came later goes first.
    async fn tell_wait(&self, delivery: &Delivery, job_id: JobId, names: Vec<String>) {
        let (since, wait) = (delivery.since, delivery.turn_wait());
        self.jobs().awaits(job_id, names.clone(), since, wait);
        let seconds = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX);
        self.tell(Control::Waits { job_id, names, since, seconds }).await;
    }

    /// Tells all workers something that they can do without.
    async fn tell(&self, what: Control) {
        let body = message::encode_control(what).into();
        if let Err(error) = self.broker.publish_control(body, command_properties()).await {
            warn!(error = %Causes(&error), "the other workers could not be told of a job");
        }
    }

    fn attempts(&self, delivery: &Delivery) -> Attempts {
        Attempts {
            current: delivery.properties.attempt,
            max: self.attempts_max,
            seconds_max: self.attempt_seconds_max,
            earlier: delivery.properties.story.as_deref().map(message::parse_attempts).unwrap_or_default(),
            redelivered: delivery.redelivered || delivery.properties.parked,
            waited: delivery.properties.waits_since.is_some(),
            revival_count: delivery.properties.revival_count,
            revived_at: delivery.properties.revived_at,
            target_unfinished: delivery.properties.unfinished,
        }
    }

    /// Runs a job while no other one works on the same volume, as far as the broker can see to that.
    async fn run_in_turn(
        &self,
        delivery: Delivery,
        ctx: &Context,
        job: &Job,
        turns: Vec<Turn>,
        here: &mut Here<'_>,
        late: &mut Vec<Delivery>,
    ) -> Result<(), broker::Error> {
        let attempts = self.attempts(&delivery);
        // Somebody was handed the message before, and may still be at it; not so of one that only had to wait. Of one that is to
        // end, whose last try has ended, nobody is waited for.
        let may_run = if ctx.cancel.is_cancelled() { attempts.redelivered } else { attempts.is_again() };
        if may_run && self.runs_elsewhere(job.id).await {
            info!("job runs on another worker, delivery parked");
            end_all(turns).await;
            let mut settled = Ok(());
            for delivery in std::iter::once(delivery).chain(here.end()) {
                settled = delivery.park().await;
            }
            return settled;
        }
        let sink = Native::new(self.broker.clone(), self.source.clone(), delivery.properties.clone());
        let report = Report::new(&sink, job);
        let engine = self.stores.engine(job.store.as_ref()).await;
        let ended = match &engine {
            Ok(engine) => runner::run(ctx, engine, job, &attempts, self.every, &report).await,
            Err(problem) => runner::refuse(job, problem.clone(), &attempts, &report).await,
        };
        // Whoever is handed the message next, or waits, is not to find them taken.
        end_all(turns).await;
        let settled = self.settle(delivery, ctx, attempts, ended, engine.ok(), here).await;
        // Only now: until all is written down, nobody is to begin the job.
        late.extend(here.end());
        settled
    }

    /// Takes all these names for this worker alone. None if another worker has one of them.
    async fn take_turns(&self, names: &[String]) -> Option<Vec<Turn>> {
        let mut turns = Vec::new();
        for name in names {
            match self.broker.turn(name).await {
                Ok(Some(turn)) => turns.push(turn),
                Ok(None) => {
                    end_all(turns).await;
                    return None;
                }
                // Two jobs on one volume are more load, and do no harm.
                Err(error) => {
                    warn!(error = %Causes(&error), "the broker could not be asked who works on the volume")
                }
            }
        }
        Some(turns)
    }

    /// Settles the deliveries of a job as it has ended, and sees to what its store keeps of it.
    async fn settle(
        &self,
        delivery: Delivery,
        ctx: &Context,
        attempts: Attempts,
        ended: Ended,
        engine: Option<&Engine>,
        here: &mut Here<'_>,
    ) -> Result<(), broker::Error> {
        let id = here.id;
        let (adopted, is_alone) = if let Ended::HandedBack = ended {
            // Nothing is written down any more, and whoever is handed the job next asks whether it still runs here.
            (here.end(), false)
        } else {
            let is_over = matches!(ended, Ended::Over(_) | Ended::OverBefore(_));
            let mut jobs = self.jobs();
            // One that was sent once more may be from somebody who had heard of the end already, and waits for an answer.
            let is_same = |delivery: &mut Delivery| !is_over || self.attempts(delivery).is_again();
            jobs.running.get_mut(&id).map_or((Vec::new(), true), |running| {
                let is_alone = running.adopted.is_empty() && !running.has_copy_elsewhere;
                (running.adopted.extract_if(.., is_same).collect(), is_alone)
            })
        };
        // Of several, all but the last are lost: the broker took each back before it handed out the next. So it is how
        // the last one is settled that counts.
        let (attempt, was_out_before) = (attempts.current, attempts.was_out_before());
        let story = match &ended {
            Ended::Later(problem) => message::encode_attempts(attempts.and_this(problem)),
            _ => String::new(),
        };
        let mut settled = Ok(());
        for mut delivery in std::iter::once(delivery).chain(adopted) {
            if ctx.progress.is_target_unfinished() {
                delivery.note_unfinished();
            }
            settled = match &ended {
                Ended::Over(completion) | Ended::OverBefore(completion) => match &completion.outcome {
                    // For people to look at, and to bring back when they have mended what was wrong.
                    Outcome::Failed(problem) => delivery.dead_letter(&format!("failed: {problem}")).await,
                    Outcome::Succeeded | Outcome::Cancelled => delivery.ack().await,
                },
                Ended::Later(_) => delivery.retry_later(&story).await,
                Ended::HandedBack => delivery.hand_back().await,
                Ended::Untold(_) => delivery.requeue().await,
            };
        }
        // It may come again, or whoever was handed it, too, may still be at it: then it is not to be told once more.
        let is_last = settled.is_ok() && is_alone && !was_out_before;
        match ended {
            Ended::Over(completion) => {
                if let Some(engine) = engine {
                    let kept = match is_last {
                        true => engine.catalog().settle(id).await,
                        false => engine.catalog().keep_told(&completion).await,
                    };
                    if let Err(error) = kept {
                        warn!(error = %Causes(&error), "the outcome of the job in the store is not what it should be");
                    }
                }
                if settled.is_ok() && ctx.cancel.is_cancelled() {
                    self.forget_cancel(id).await;
                }
            }
            Ended::OverBefore(_) => info!("what the store keeps of the job stays"),
            Ended::Later(problem) if settled.is_ok() => {
                warn!(error = %problem, attempt, "not done for now, trying again later");
                // It came too late for this try, and is not to wait for the next one.
                if ctx.cancel.is_cancelled() && !ctx.hand_back.is_cancelled() {
                    self.jobs().keep_cancel(id);
                }
            }
            // Whoever has the message by now goes on, or finds how the job has ended.
            Ended::Later(problem) => warn!(error = %problem, attempt, "not done here"),
            Ended::HandedBack => info!("handed back, for another worker to go on with"),
            Ended::Untold(error) => warn!(error = %Causes(&error), "the end of the job could not be told"),
        }
        settled
    }

    /// Keeps in every store that somebody asked for the end of a job, so that it is known whenever the job is taken up, and
    /// by whom.
    async fn keep_cancel(self: &Arc<Self>, delivery: Delivery) {
        let Ok(Control::Cancel(id)) = message::parse_control(&delivery.body) else {
            // What workers ask each other lies here too, and is of no use later; all else `take_control` has told of.
            return if let Err(error) = delivery.ack().await {
                warn!(error = %Causes(&error), "a control message was not settled");
            };
        };
        // It may be from before this worker listened.
        self.take_control(&delivery.body);
        let end_what_waits = async {
            for pause in RECALLS {
                sleep(pause).await;
                self.end_what_waits().await;
            }
        };
        // A store that is away holds no job of the others up.
        let (kept, ()) = tokio::join!(self.keep_in_stores(delivery, id), end_what_waits);
        if let Err(error) = kept {
            warn!(error = %Causes(&error), "a cancel was not settled");
        }
    }

    /// Takes up the jobs that were put off and that somebody wants the end of, so that they do not wait for their time.
    async fn end_what_waits(&self) {
        if self.jobs().cancelled.is_empty() {
            return;
        }
        let is_to_end = |body: &[u8]| match message::parse_command(body) {
            Ok(Command::Run(job)) => self.jobs().is_cancelled(job.id),
            _ => false,
        };
        match self.broker.recall(is_to_end).await {
            Ok(deliveries) => {
                stream::iter(deliveries)
                    .for_each_concurrent(RECALLED_MAX, |delivery| self.handle(delivery))
                    .await;
            }
            Err(error) => {
                warn!(error = %Causes(&error), "the jobs that are put off were not looked through for those to end");
            }
        }
    }

    /// Keeps a cancel in the stores that do not have it yet, and puts it off while one of them cannot. It comes back through the
    /// job queue.
    async fn keep_in_stores(&self, delivery: Delivery, id: JobId) -> Result<(), broker::Error> {
        let story = delivery.properties.story.as_deref();
        let Unkept { since, stores } = story.and_then(message::parse_unkept).unwrap_or_else(|| Unkept {
            since: Timestamp::now(),
            stores: self.stores.names().cloned().collect(),
        });
        let mut left = Vec::new();
        // Not those that have it: there the job may have ended since, and the cancel been forgotten.
        for name in self.stores.names().filter(|name| stores.contains(name)) {
            let kept = match self.stores.engine(Some(name)).await {
                Ok(engine) => {
                    let kept = engine.catalog().cancel(id, since).await;
                    kept.map_err(|error| Problem::new(error.class(), &error))
                }
                Err(problem) => Err(problem),
            };
            if let Err(problem) = kept {
                warn!(job = %id, store = %name, error = %problem, "that a job was cancelled could not be kept");
                if problem.class == Class::Transient {
                    left.push(name.clone());
                }
            }
        }
        // No store keeps it for longer.
        if left.is_empty() || Timestamp::now().duration_since(since) >= KEPT {
            return delivery.ack().await;
        }
        delivery.retry_later(&message::encode_unkept(&Unkept { since, stores: left })).await
    }

    /// Forgets in every store that somebody asked for the end of a job, because it has ended.
    async fn forget_cancel(&self, id: JobId) {
        for name in self.stores.names() {
            let Ok(engine) = self.stores.engine(Some(name)).await else { continue };
            if let Err(error) = engine.catalog().forget_cancel(id).await {
                warn!(store = %name, error = %Causes(&error), "that a job was cancelled stays in the store");
            }
        }
    }

    /// Sweeps now, and again and again.
    async fn sweep_on(&self) {
        let mut sweeps = interval(SWEEP_EVERY);
        loop {
            sweeps.tick().await;
            self.sweep().await;
        }
    }

    /// Removes from every store what is kept of jobs that nobody asks for any more.
    async fn sweep(&self) {
        for name in self.stores.names() {
            // One that is away is swept when it is back.
            let Ok(engine) = self.stores.engine(Some(name)).await else { continue };
            if let Err(error) = engine.catalog().sweep(Timestamp::now() - KEPT).await {
                warn!(store = %name, error = %Causes(&error), "what is kept of old jobs could not be removed");
            }
        }
    }

    /// A cancel that came through the job queue goes to all workers.
    async fn pass_on_cancel(&self, delivery: Delivery, id: JobId) -> Result<(), broker::Error> {
        let body = message::encode_command(&Command::Cancel(id));
        self.broker.publish_control(body.into(), command_properties()).await?;
        delivery.ack().await
    }

    async fn reject(&self, delivery: Delivery, rejection: &Rejection) -> Result<(), broker::Error> {
        let message_id = delivery.properties.message_id.as_deref();
        let job = rejection.job_id.map(|id| id.to_string());
        warn!(reason = %rejection.reason, job, message_id, error = %rejection, "message rejected");
        let id = message::rejected_event_id(message_id);
        let properties = Properties {
            content_type: Some(message::EVENT_CONTENT_TYPE.into()),
            correlation_id: delivery.properties.correlation_id.clone(),
            message_id: Some(id.clone()),
            ..Properties::default()
        };
        let body = message::encode_rejected(rejection, id, Timestamp::now(), &self.source, message_id);
        let body = bytes::Bytes::from(body);
        let told =
            self.broker.publish_event(message::REJECTED_ROUTING_KEY, body.clone(), properties.clone()).await;
        if let Err(error) = told {
            // It comes again at once, and so do others that cannot be told of.
            sleep(UNTOLD_PAUSE).await;
            return Err(error);
        }
        if let Some(queue) = delivery.properties.reply_to.clone() {
            event::reply(&self.broker, queue, body, properties).await?;
        }
        delivery.dead_letter(&format!("{}: {rejection}", rejection.reason)).await
    }

    /// Whether another worker that lives runs the job.
    async fn runs_elsewhere(&self, id: JobId) -> bool {
        let (sender, answer) = oneshot::channel();
        self.jobs().asked.insert(id, sender);
        let question = Control::WhoRuns { job_id: id, worker: self.id.clone() };
        let asked =
            self.broker.publish_control(message::encode_control(question).into(), command_properties()).await;
        let answered = match asked {
            Ok(_) => timeout(ANSWER_MAX, answer).await.is_ok_and(|answer| answer.is_ok()),
            Err(error) => {
                warn!(error = %Causes(&error), "the other workers could not be asked who runs the job");
                false
            }
        };
        self.jobs().asked.remove(&id);
        answered
    }

    fn take_control(self: &Arc<Self>, body: &[u8]) {
        match message::parse_control(body) {
            Ok(Control::WhoRuns { job_id, worker }) => {
                if worker == self.id || !self.jobs().running.contains_key(&job_id) {
                    return;
                }
                let worker = self.clone();
                tokio::spawn(async move {
                    worker.tell(Control::Runs { job_id, worker: worker.id.clone() }).await;
                });
            }
            Ok(Control::Runs { job_id, worker }) => {
                if worker != self.id
                    && let Some(asked) = self.jobs().asked.remove(&job_id)
                {
                    // Who asked may have waited for long enough.
                    asked.send(()).ok();
                }
            }
            Ok(Control::Waits { job_id, names, since, seconds }) => {
                let mut jobs = self.jobs();
                match jobs.running.get_mut(&job_id) {
                    // Either it has come again before this was heard here, or it was sent more than once.
                    Some(running) => running.has_copy_elsewhere = true,
                    None => jobs.awaits(job_id, names, since, Duration::from_secs(seconds.into())),
                }
            }
            Ok(Control::WaitsNoMore { job_id }) => drop(self.jobs().awaiting.remove(&job_id)),
            Ok(Control::Cancel(id)) => {
                let mut jobs = self.jobs();
                if let Some(running) = jobs.running.get(&id) {
                    // It is heard twice: at once, and from the queue that keeps it.
                    if !running.cancel.is_cancelled() {
                        info!(job = %id, "cancelling");
                    }
                    running.cancel.cancel();
                } else {
                    jobs.keep_cancel(id);
                }
            }
            Err(rejection) => warn!(error = %rejection, "a control message could not be read"),
        }
    }
}

/// What a job must have for itself while it runs. What only reads a backup, or removes it, need not wait for anybody: the
/// records see to that.
fn needs_alone(job: &Job) -> Vec<String> {
    let volume = |id: VolumeId| format!("volume.{id}");
    match &job.work {
        Work::Backup(work) => vec![volume(work.volume_id)],
        Work::Restore(work) => {
            // A location is longer than what a queue may be called.
            let target = format!("target.{}", hex::encode(Sha256::digest(work.target.to_string())));
            work.volume_id.map(volume).into_iter().chain([target]).collect()
        }
        Work::Delete(_) | Work::Verify(_) => Vec::new(),
    }
}

async fn end_all(turns: Vec<Turn>) {
    for turn in turns {
        turn.end().await;
    }
}

/// The properties that a command of ours is published with.
pub fn command_properties() -> Properties {
    Properties { content_type: Some(message::COMMAND_CONTENT_TYPE.into()), ..Properties::default() }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::job::BackupId;

    fn begin<'a>(jobs: &'a Mutex<Jobs>, job: &Job) -> Here<'a> {
        let running = Running {
            job: job.clone(),
            alone: needs_alone(job),
            cancel: CancellationToken::new(),
            adopted: Vec::new(),
            has_copy_elsewhere: false,
        };
        locked(jobs).running.insert(job.id, running);
        Here { jobs, id: job.id, is_over: false }
    }

    #[test]
    fn a_job_whose_task_breaks_is_not_taken_for_one_that_runs_here_for_ever() {
        let work = Work::Delete(BackupId::random());
        let job = Job { id: JobId::random(), store: None, deadline: None, work };
        let jobs = Mutex::default();

        let broken = catch_unwind(AssertUnwindSafe(|| {
            let _here = begin(&jobs, &job);
            panic!("the job's task breaks");
        }));

        assert!(broken.is_err() && locked(&jobs).running.is_empty());
        // Once it has ended, the id is for whoever is handed the job next.
        let mut ended = begin(&jobs, &job);
        assert!(ended.end().is_empty());
        let _again = begin(&jobs, &job);
        drop(ended);
        assert!(locked(&jobs).running.contains_key(&job.id));
    }
}
