//! A worker in the place of Cinder's backup service: the other place where rooms are put together.
//!
//! Cinder's services talk to it as they do to their own: it has a row among the services, tells the scheduler that it takes
//! backups, and takes what is asked of it from the queues of `cinder-backup`. What it makes lies where Cinder's driver would
//! have put it, and the database says what Cinder would have it say, so that either can go on where the other stopped.
//!
//! A message is acknowledged only after what it caused is safe: data, record, row, then the acknowledgement. Cinder's own
//! service acknowledges at once, and forgets what it was doing when it dies.

mod attach;
mod backups;
pub mod brick;
mod jobs;
mod keys;
mod leftovers;
mod log_levels;
mod notices;
mod stores;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, error, info, info_span, warn};

use crate::broker::{self, InvalidTransportUrl, Reach, RpcQueues, RpcSettings, Tls, TransportUrl};
use crate::ceph::{Access, Clusters};
use crate::cinder::conf::{Conf, Rabbit};
use crate::cinder::database::{self, Connections, Database, DatabaseUrl, Registration};
use crate::cinder::export_record::Form;
use crate::cinder::notifications::Notifier;
use crate::cinder::rpc::{Incoming, Rpc};
use crate::cinder::scheduler::Capabilities;
use crate::engine::Volumes;
use crate::error::{Causes, Class};
use crate::job::BackupId;
use crate::message::oslo::{Failure, Malformed};
use crate::runner::Places;
use crate::store;
use crate::volume::FileRoots;
use crate::worker::{self, Shutdown, Stores};

pub use keys::{Error as KeyError, Keys};
pub use stores::Driver;

/// The topic that Cinder's services know the backup service by.
const TOPIC: &str = "cinder-backup";
/// The version of its interface that we have.
const VERSION: (u32, u32) = (2, 4);
/// The version of its objects that we send.
const OBJECTS_VERSION: &str = "1.39";
/// How many connections to the database there are at most where `cinder.conf` sets no limit.
const CONNECTIONS_MAX: u32 = 64;
/// How long what runs may go on when the worker is told to stop, before it is left for the next one.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(60);
/// How long jobs may take to stop where they are.
const HAND_BACK_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a request waits at first that could not be dealt with for now. Each time it waits twice as long.
const LATER_PAUSE: Duration = Duration::from_secs(5);
/// How long it waits at most.
const LATER_PAUSE_MAX: Duration = Duration::from_secs(120);
const NOT_FOR_NOW: &str = "not done for now, trying again later";
const NOT_BY_ITSELF: &str = "Cinder's database refuses what has to be written, which will not pass by itself: look for what is wrong \
     there; it is tried again until it is put right or the worker is stopped";
/// How long the schedulers may take to be told that we take no more.
const FAREWELL_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a request waits for its turn, at most: nobody else would take it.
const PLACE_TIME_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why the worker could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store cannot be what `cinder.conf` says.
    #[error("cinder.conf cannot be used")]
    Conf(#[from] stores::Error),
    /// The key manager cannot be what `cinder.conf` says.
    #[error("the key manager of cinder.conf cannot be used")]
    KeyManager(#[from] store::Error),
    /// The rooms could not be put together.
    #[error(transparent)]
    Worker(#[from] worker::Error),
    /// The database cannot be used.
    #[error("Cinder's database cannot be used")]
    Database(#[from] database::Error),
    /// The broker cannot be found by its URL.
    #[error("a transport_url of cinder.conf cannot be used")]
    TransportUrl(#[from] InvalidTransportUrl),
    /// The broker's settings cannot be used.
    #[error("the broker of a transport_url of cinder.conf cannot be used")]
    Broker(#[from] broker::Error),
}

/// What is done with a backup, one thing at a time.
#[derive(Clone, Default)]
struct Use {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Fires when whatever is done with it is to end.
    cancel: CancellationToken,
}

struct StandIn {
    conf: Conf,
    driver: Driver,
    host: String,
    stores: Stores,
    attachments: attach::Attachments,
    brick: brick::Brick,
    own_clusters: BTreeMap<String, Access>,
    keys: Keys,
    database: Database,
    rpc: Rpc,
    /// None where nobody wants to hear of anything.
    notifier: Option<Notifier>,
    capabilities: Capabilities,
    /// What the schedulers are told, one word after the other.
    reports: tokio::sync::Mutex<()>,
    /// What the store keeps backups as.
    form: Form,
    /// How many backups and restores run at the same time.
    places: Arc<Places>,
    /// Fires when what only waits is to end, for the next worker to go on with.
    stopping: CancellationToken,
    /// Fires when jobs are to stop where they are, for the next worker to go on with.
    hand_back: CancellationToken,
    uses: Mutex<HashMap<BackupId, Use>>,
    /// The ids of the requests whose begin was told, and that are not dealt with yet.
    begun: Mutex<HashSet<String>>,
    heard: leftovers::Heard,
}

/// Works until it is told to end.
pub async fn work(conf: Conf, shutdown: Shutdown) -> Result<(), Error> {
    let driver = Driver::named(&conf.default.backup_driver)?;
    let config = stores::config(&conf, driver)?;
    let stores = match driver.asks_each_request(&conf) {
        true => Stores::none(&config)?,
        false => Stores::open(&config)?,
    };
    let keys = Keys::new(&conf)?;
    let (url, connections) = (database_url(&conf)?, connections(&conf));
    let database = tokio::select! {
        database = Database::connect(&url, &connections) => database?,
        () = shutdown.drain.cancelled() => return Ok(()),
        () = shutdown.now.cancelled() => return Ok(()),
    };
    let rpc = Rpc::start(settings(&conf, &conf.rabbit, conf.default.transport_url.reveal())?)?;
    let slot_count = match conf.default.backup_max_operations {
        0 => usize::MAX,
        count => usize::try_from(count).unwrap_or(usize::MAX),
    };
    let stand_in = Arc::new(StandIn {
        form: driver.form(&conf)?,
        driver,
        host: conf.default.host.clone(),
        stores,
        attachments: attach::Attachments::default(),
        brick: brick::Brick::new(brick::Settings::new(&conf)),
        own_clusters: worker::access(&config),
        keys,
        database,
        capabilities: Capabilities {
            host: conf.default.host.clone(),
            availability_zone: conf.default.storage_availability_zone.clone(),
            driver: driver.class().into(),
        },
        notifier: notices::notifier(&conf, &rpc)?,
        reports: tokio::sync::Mutex::default(),
        rpc,
        places: Places::new(slot_count, usize::MAX, PLACE_TIME_MAX),
        stopping: CancellationToken::new(),
        hand_back: CancellationToken::new(),
        uses: Mutex::default(),
        begun: Mutex::default(),
        heard: Mutex::new(Some(HashSet::new())),
        conf,
    });
    let result = stand_in.work(&shutdown).await;
    stand_in.rpc.close().await;
    if let Some(notifier) = &stand_in.notifier {
        notifier.rpc.close().await;
    }
    info!("worker stopped");
    result
}

impl StandIn {
    async fn work(self: &Arc<Self>, shutdown: &Shutdown) -> Result<(), Error> {
        let started = async {
            self.reach_store().await;
            let service = Arc::new(tokio::sync::Mutex::new(self.register().await?));
            let requests = self.rpc.serve(TOPIC, &self.host, 0).await?;
            Ok::<_, Error>((service, requests))
        };
        let (service, mut requests) = tokio::select! {
            started = started => started?,
            () = shutdown.drain.cancelled() => return Ok(()),
            () = shutdown.now.cancelled() => return Ok(()),
        };
        let default = &self.conf.default;
        let mut beats = interval(Duration::from_secs(default.report_interval.max(1)));
        let mut reports = interval(Duration::from_secs(default.backup_driver_stats_polling_interval));
        for ticks in [&mut beats, &mut reports] {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut running = JoinSet::new();
        info!(host = %self.host, driver = self.driver.class(), "worker started in the place of cinder-backup");
        let cleaning = self.clone();
        let _cleaning = AbortOnDropHandle::new(tokio::spawn(async move { cleaning.clean_up().await }));
        let looking = self.clone();
        // Now, so that the first request need not wait for it.
        let _looking = AbortOnDropHandle::new(tokio::spawn(async move { drop(looking.brick.host().await) }));
        loop {
            tokio::select! {
                Some(incoming) = requests.next() => self.begin(incoming, &mut running),
                _ = beats.tick() => {
                    let (worker, service) = (self.clone(), service.clone());
                    running.spawn(async move { worker.beat(&service).await });
                }
                _ = reports.tick() => {
                    let worker = self.clone();
                    running.spawn(async move { worker.report(true).await });
                }
                Some(ended) = running.join_next() => lost_task(ended),
                () = shutdown.drain.cancelled() => break,
                () = shutdown.now.cancelled() => break,
            }
        }
        self.stopping.cancel();
        // Otherwise the scheduler would go on giving us backups.
        if timeout(FAREWELL_TIME_MAX, self.report(false)).await.is_err() {
            warn!("the schedulers could not be told that this worker stops");
        }
        requests.stop();
        info!("stopping: no more is taken");
        if !wind_down(&mut running, DRAIN_TIME_MAX, &shutdown.now).await {
            warn!("stopping: what runs is left for the next worker to go on with");
            self.hand_back.cancel();
            if !wind_down(&mut running, HAND_BACK_TIME_MAX, &shutdown.now).await {
                running.abort_all();
            }
        }
        Ok(())
    }

    /// Waits until the store can be used.
    async fn reach_store(&self) {
        let pause = Duration::from_secs(self.conf.default.backup_driver_init_check_interval);
        while let Err(error) = self.stores.reach_all().await {
            error!(error = %Causes(&error), "the store of the backups cannot be used: trying again");
            sleep(pause).await;
        }
    }

    /// Enters this worker among Cinder's services.
    async fn register(&self) -> Result<i64, database::Error> {
        let registration = Registration {
            host: &self.host,
            availability_zone: &self.capabilities.availability_zone,
            rpc_version: &format!("{}.{}", VERSION.0, VERSION.1),
            object_version: OBJECTS_VERSION,
            enabled: self.conf.default.enable_new_services,
        };
        Ok(self.database.register_service(&registration).await?.id)
    }

    /// Shows that the worker lives, in a row of its own, which is made again if somebody has removed it.
    async fn beat(&self, service: &tokio::sync::Mutex<i64>) {
        // Else the one before is still at it.
        let Ok(mut service) = service.try_lock() else { return };
        if let Err(error) = self.report_life(&mut service).await {
            warn!(error = %Causes(&error), "the database could not be told that this worker lives");
        }
    }

    async fn report_life(&self, service: &mut i64) -> Result<(), database::Error> {
        let zone = &self.capabilities.availability_zone;
        if !self.database.report_service(*service, zone).await? {
            warn!("the row of this worker among Cinder's services was gone: it is entered anew");
            *service = self.register().await?;
            self.database.report_service(*service, zone).await?;
        }
        Ok(())
    }

    /// Tells the schedulers whether backups are taken; they believe the last word.
    async fn report(&self, takes_backups: bool) {
        let _turn = self.reports.lock().await;
        // It was asked for before the end was told.
        if takes_backups && self.stopping.is_cancelled() {
            return;
        }
        if let Err(error) = self.capabilities.publish(&self.rpc, takes_backups).await {
            warn!(error = %Causes(&error), "the schedulers could not be told of this worker");
        }
    }

    fn begin(self: &Arc<Self>, incoming: Incoming, running: &mut JoinSet<()>) {
        self.note_heard(&incoming.request);
        let worker = self.clone();
        let span = info_span!(
            "request",
            method = incoming.request.method,
            request = incoming.request.context.request_id().unwrap_or_default()
        );
        running.spawn(async move { worker.handle(incoming).await }.instrument(span));
    }

    /// Does what is asked for, as often as it takes. The message stays ours meanwhile: a queue may have a limit to how often a
    /// message comes back.
    async fn handle(&self, mut incoming: Incoming) {
        let mut pause = LATER_PAUSE;
        let answer = loop {
            match self.answer(&incoming).await {
                Err(Trouble::Later(why)) => warn!(error = why, "{NOT_FOR_NOW}"),
                Err(Trouble::Stuck(why)) => error!(error = why, "{NOT_BY_ITSELF}"),
                answer => break answer,
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.stopping.cancelled() => break Err(Trouble::HandedBack),
            }
            pause = longer(pause);
            // Some of it may have been done.
            incoming.redelivered = true;
        };
        let request = &incoming.request;
        if !matches!(answer, Err(Trouble::HandedBack)) {
            self.forget_start(request);
        }
        let settled = match answer {
            Ok(result) => incoming.reply(Ok(result)).await,
            Err(Trouble::Failure(failure)) => {
                warn!(error = failure.message, "the request has failed");
                incoming.reply(Err(failure)).await
            }
            Err(Trouble::HandedBack | Trouble::Later(_) | Trouble::Stuck(_)) => {
                info!("handed back, for the next worker to go on with");
                incoming.requeue().await
            }
        };
        if let Err(error) = settled {
            // It will be delivered again, and then found to be done.
            warn!(error = %Causes(&error), "the message was not settled");
        }
    }

    async fn answer(&self, incoming: &Incoming) -> Result<Value, Trouble> {
        let request = &incoming.request;
        if !request.fits(VERSION.0, VERSION.1) {
            return Err(Trouble::Failure(Failure::unsupported_version(request)));
        }
        match request.method.as_str() {
            "create_backup" => self.create_backup(request).await,
            "continue_backup" => self.continue_backup(incoming).await,
            "restore_backup" => self.restore_backup(incoming).await,
            "delete_backup" => self.delete_backup(incoming).await,
            "export_record" => self.export_record(request).await,
            "import_record" => self.import_record(request).await,
            "reset_status" => self.reset_status(request).await,
            // Cinder's driver for Ceph cannot end what it is at. Here all can.
            "check_support_to_force_delete" => Ok(Value::Bool(true)),
            "publish_service_capabilities" => {
                self.report(true).await;
                Ok(Value::Null)
            }
            "get_log_levels" => self.get_log_levels(request),
            "set_log_levels" => self.set_log_levels(request),
            other => Err(Trouble::Failure(Failure::no_such_method(other))),
        }
    }

    /// What is done with a backup at the moment; to be held for as long as something is.
    fn use_of(&self, id: BackupId) -> Use {
        // Nothing panics while it holds the lock.
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        uses.retain(|_, used| Arc::strong_count(&used.turn) > 1);
        uses.entry(id).or_default().clone()
    }

    /// The volumes in Ceph that jobs may name.
    fn volumes(&self, clusters: Clusters) -> Volumes {
        Volumes { file_roots: FileRoots::new(&[]), clusters }
    }
}

fn database_url(conf: &Conf) -> Result<DatabaseUrl, database::Error> {
    DatabaseUrl::parse(conf.database.connection.reveal()).map_err(|problem| database::Error::Url { problem })
}

/// How many connections there are to the database, and how they are made.
fn connections(conf: &Conf) -> Connections {
    let options = &conf.database;
    let count_max = match (options.max_pool_size, u32::try_from(options.max_overflow)) {
        (0, _) | (_, Err(_)) => CONNECTIONS_MAX,
        (size, Ok(more)) => size.saturating_add(more),
    };
    let usual = Connections::default();
    let wait = options.pool_timeout.and_then(|seconds| u64::try_from(seconds).ok());
    Connections {
        count_max,
        wait_seconds_max: wait.unwrap_or(usual.wait_seconds_max),
        age_seconds_max: u64::try_from(options.connection_recycle_time).ok(),
        tries_max: u32::try_from(options.max_retries).ok(),
        retry_seconds: options.retry_interval,
    }
}

/// The next pause.
fn longer(pause: Duration) -> Duration {
    pause.saturating_mul(2).min(LATER_PAUSE_MAX)
}

/// How a broker of Cinder's services is reached, and what its queues are like.
fn settings(conf: &Conf, rabbit: &Rabbit, transport_url: &str) -> Result<RpcSettings, Error> {
    let default = &conf.default;
    let (url, other_urls) = transport_url.parse::<TransportUrl>()?.urls(rabbit.ssl);
    let file = |path: &String| (!path.is_empty()).then(|| path.into());
    let count = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    Ok(RpcSettings {
        reach: Reach {
            url,
            other_urls,
            connection_name: format!("backhaul cinder {}", default.host),
            heartbeat_seconds: rabbit.heartbeat_timeout_threshold.try_into().unwrap_or(u16::MAX),
            tls: Tls {
                ca_file: file(&rabbit.ssl_ca_file),
                client_certificate_file: file(&rabbit.ssl_cert_file),
                client_key_file: file(&rabbit.ssl_key_file),
            },
            reconnect_seconds_max: count(rabbit.rabbit_interval_max),
            publish_seconds_max: count(default.rpc_response_timeout),
        },
        exchange: default.control_exchange.clone(),
        queues: RpcQueues {
            durable: rabbit.amqp_durable_queues,
            auto_delete: rabbit.amqp_auto_delete,
            quorum: rabbit.rabbit_quorum_queue,
            transient_quorum: rabbit.rabbit_transient_quorum_queue,
            quorum_delivery_limit: count(rabbit.rabbit_quorum_delivery_limit),
            quorum_memory_messages_max: count(rabbit.rabbit_quorum_max_memory_length),
            quorum_memory_bytes_max: count(rabbit.rabbit_quorum_max_memory_bytes),
            mirrored: rabbit.rabbit_ha_queues,
            cancel_on_failover: rabbit.enable_cancel_on_failover,
            transient_seconds_max: count(rabbit.rabbit_transient_queues_ttl),
        },
    })
}

/// Why a request is not done.
enum Trouble {
    /// It cannot be; whoever asked is told, if they wait for an answer.
    Failure(Failure),
    /// Something that it needs is away.
    Later(String),
    /// The database refuses what has to be written there. The request is the only one that still knows of it.
    Stuck(String),
    /// The worker was told to stop.
    HandedBack,
}

impl From<database::Error> for Trouble {
    fn from(error: database::Error) -> Self {
        let why = Causes(&error).to_string();
        match (error.class(), error) {
            (Class::Transient, _) => Self::Later(why),
            (_, database::Error::Sql { .. } | database::Error::Url { .. }) => Self::Stuck(why),
            // What was to be changed is gone.
            (_, database::Error::NotThere { .. }) => Self::Failure(Failure::cinder("NotFound", why, 404)),
            (_, database::Error::Import { .. } | database::Error::VolumeMeta { .. }) => {
                Self::Failure(Failure::invalid_input(&why))
            }
        }
    }
}

impl From<Malformed> for Trouble {
    fn from(malformed: Malformed) -> Self {
        Self::Failure(malformed.into())
    }
}

fn lost_task(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a request's task broke; its message goes back to the broker");
    }
}

/// Waits until nothing runs any more. False when that takes too long, or all is to end `now`.
async fn wind_down(running: &mut JoinSet<()>, time_max: Duration, now: &CancellationToken) -> bool {
    let all = async {
        while let Some(ended) = running.join_next().await {
            lost_task(ended);
        }
    };
    tokio::select! {
        ended = timeout(time_max, all) => ended.is_ok(),
        () = now.cancelled() => false,
    }
}
