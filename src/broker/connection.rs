//! One task that owns the connection: it connects, declares the topology, and starts over when it is lost.
//!
//! lapin's own recovery stays off: it does not bring back a channel that the broker closed.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use futures_util::StreamExt;
use lapin::{Channel, Connection, Event};
use tokio::sync::{Mutex, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::dial::dial;
use super::error::cause;
use super::topology::Topology;
use super::{Error, Reach, State};
use crate::error::Causes;

/// How long tasks may take to give back what they have when we close.
const CLOSE_SECONDS_MAX: u64 = 5;

/// An open connection, with the topology declared if it has one.
pub(super) struct Live {
    pub connection: Connection,
    /// The channel that publishes, one message at a time: lapin gives a returned message to whichever confirm
    /// comes next. None while it is in use or after it failed.
    pub publisher: Mutex<Option<Channel>>,
}

/// What everybody who uses the connection holds.
#[derive(Clone)]
pub(super) struct Link {
    pub reach: Arc<Reach>,
    pub live: watch::Receiver<Option<Arc<Live>>>,
    pub state: watch::Receiver<State>,
    /// Fires when the broker is to be left.
    pub closing: CancellationToken,
    /// The tasks that use the connection until `closing` fires.
    pub tasks: TaskTracker,
}

impl Link {
    /// Starts the task that owns the connection, `first` or one that it makes itself, and declares `topology` on it.
    pub(super) fn start(reach: Reach, topology: Option<Arc<Topology>>, first: Option<Live>) -> Self {
        let (live_sender, live) = watch::channel(None);
        let (state_sender, state) = watch::channel(match first {
            Some(_) => State::Connected,
            None => State::Disconnected { why: "no connection was made yet".into() },
        });
        let link = Self {
            reach: Arc::new(reach),
            live,
            state,
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        tokio::spawn(supervise(link.clone(), topology, first, live_sender, state_sender));
        link
    }

    /// Waits for an open connection. Its loss may not have been noticed yet.
    pub(super) async fn live(&self) -> Result<Arc<Live>, Error> {
        let mut live = self.live.clone();
        tokio::select! {
            () = self.closing.cancelled() => Err(Error::Closed),
            open = live.wait_for(Option::is_some) => match open.as_deref() {
                Ok(Some(live)) => Ok(Arc::clone(live)),
                _ => Err(Error::Closed),
            },
        }
    }

    /// The largest frame that the broker takes, if there is a connection.
    pub(super) fn frame_bytes_max(&self) -> u32 {
        self.live.borrow().as_ref().map_or(u32::MAX, |live| live.connection.configuration().frame_max())
    }

    /// Bounds the wait for the broker.
    pub(super) async fn bounded<T>(
        &self,
        action: impl Fn() -> String,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let seconds = self.reach.publish_seconds_max;
        match timeout(Duration::from_secs(seconds.into()), work).await {
            Ok(result) => result,
            Err(_) => {
                let why = self.state.borrow().to_string();
                Err(Error::Timeout { action: action(), seconds, why })
            }
        }
    }

    /// Leaves the broker: what the tasks hold is given back first.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        let mut state = self.state.clone();
        // It fails when the supervisor is gone.
        while state.changed().await.is_ok() {}
    }
}

async fn supervise(
    link: Link,
    topology: Option<Arc<Topology>>,
    mut first: Option<Live>,
    live_sender: watch::Sender<Option<Arc<Live>>>,
    state: watch::Sender<State>,
) {
    let address = link.reach.addresses();
    let mut pauses = pauses(&link.reach);
    loop {
        let opened = match first.take() {
            Some(live) => Ok(live),
            None => tokio::select! {
                () = link.closing.cancelled() => break,
                opened = connect(&link.reach, topology.as_deref()) => opened,
            },
        };
        let why = match opened {
            Ok(live) => {
                info!(%address, "broker connected");
                pauses = self::pauses(&link.reach);
                let live = Arc::new(live);
                live_sender.send_replace(Some(Arc::clone(&live)));
                state.send_replace(State::Connected);
                let why = tokio::select! {
                    why = ended(&live.connection) => why,
                    () = link.closing.cancelled() => {
                        link.tasks.close();
                        let _ = timeout(Duration::from_secs(CLOSE_SECONDS_MAX), link.tasks.wait()).await;
                        live_sender.send_replace(None);
                        let goodbye = live.connection.close(200, "bye".into());
                        let _ = timeout(Duration::from_secs(CLOSE_SECONDS_MAX), goodbye).await;
                        break;
                    }
                };
                live_sender.send_replace(None);
                warn!(%address, why, "broker connection lost");
                why
            }
            Err(error) => {
                warn!(error = %Causes(&error), "broker not reached, trying again");
                Causes(&error).to_string()
            }
        };
        state.send_replace(State::Disconnected { why });
        let pause = pauses.next().unwrap_or_default();
        tokio::select! {
            () = link.closing.cancelled() => break,
            () = sleep(pause) => {}
        }
    }
    state.send_replace(State::Disconnected { why: "closed by this process".into() });
}

fn pauses(reach: &Reach) -> impl Iterator<Item = Duration> + use<> {
    // The jitter adds up to as much again, so that a broker that restarts is not met by all workers at once.
    let half = Duration::from_secs(reach.reconnect_seconds_max.into()) / 2;
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200).min(half))
        .with_max_delay(half)
        .without_max_times()
        .with_jitter()
        .build()
}

/// Connects once and declares the topology.
pub(super) async fn connect(reach: &Reach, topology: Option<&Topology>) -> Result<Live, Error> {
    let connection = dial(reach).await?;
    if let Some(topology) = topology {
        topology.declare(&connection).await?;
    }
    Ok(Live { connection, publisher: Mutex::new(None) })
}

/// Resolves when the connection is gone, and tells why.
async fn ended(connection: &Connection) -> String {
    let mut events = Box::pin(connection.events_listener());
    let mut why = "it was closed".to_string();
    while connection.status().connected() {
        tokio::select! {
            event = events.next() => match event {
                Some(Event::Error(error)) => why = cause(&error).to_string(),
                Some(Event::ConnectionBlocked(reason)) => warn!(reason, "broker takes no messages for now"),
                Some(Event::ConnectionUnblocked) => info!("broker takes messages again"),
                _ => {}
            },
            // Not every end is told as an event.
            () = sleep(Duration::from_secs(1)) => {}
        }
    }
    why
}
