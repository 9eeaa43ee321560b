//! Tells whoever listens what is done with backups, by notifications: when something is begun, how far it is, how it has ended.
//!
//! That nobody can be told is no reason for anything to fail. What has ended is told before its message is acknowledged, and
//! once more if the worker dies between the two.

use std::collections::HashSet;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tracing::warn;

use super::backups::Action;
use super::{Error, StandIn, settings};
use crate::cinder::conf::Conf;
use crate::cinder::notifications::{self, Notifier, Priority};
use crate::cinder::rpc::Rpc;
use crate::error::Causes;
use crate::event::{self, EventSink};
use crate::job::{BackupId, Event, Happening, Outcome};
use crate::message::oslo::{NotificationFormat, Request};

/// How often it is told how far a job is, if the clock is not to be looked at: never.
const NEVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What sends notifications, if `cinder.conf` asks for any.
pub(super) fn notifier(conf: &Conf, rpc: &Rpc) -> Result<Option<Notifier>, Error> {
    let mut formats = Vec::new();
    for driver in &conf.notifications.driver {
        let format = match driver.as_str() {
            "messagingv2" => NotificationFormat::Messagingv2,
            "messaging" => NotificationFormat::Messaging,
            "noop" | "" => continue,
            _ => {
                let why = "only messaging, messagingv2 and noop are known";
                warn!(driver, why, "a driver of [oslo_messaging_notifications] is not obeyed");
                continue;
            }
        };
        if !formats.contains(&format) {
            formats.push(format);
        }
    }
    if formats.is_empty() {
        return Ok(None);
    }
    let rpc = match conf.notifications.transport_url.as_ref().map(|url| url.reveal()) {
        None | Some("") => rpc.clone(),
        Some(url) => Rpc::start(settings(conf, &conf.notifications_rabbit, url)?)?,
    };
    let publisher_id = format!("backup.{}", conf.default.host);
    Ok(Some(Notifier { rpc, formats, topics: conf.notifications.topics.clone(), publisher_id }))
}

impl StandIn {
    /// Tells that something is begun, once for each request, however often it is put off.
    pub(super) async fn tell_start(&self, request: &Request, id: BackupId, action: Action) {
        let is_first = request.unique_id.as_ref().is_none_or(|id| self.begun().insert(id.clone()));
        if is_first {
            self.tell(request, id, &format!("{}.start", action.event)).await;
        }
    }

    /// Tells that a request was dealt with: if it comes once more, it is begun anew.
    pub(super) fn forget_start(&self, request: &Request) {
        if let Some(id) = &request.unique_id {
            self.begun().remove(id);
        }
    }

    fn begun(&self) -> MutexGuard<'_, HashSet<String>> {
        // Nothing panics while it holds the lock.
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that something has ended.
    pub(super) async fn tell_end(&self, request: &Request, id: BackupId, action: Action) {
        self.tell(request, id, &format!("{}.end", action.event)).await;
    }

    /// Tells that something has failed, which Cinder's own service does not.
    pub(super) async fn tell_error(&self, request: &Request, id: BackupId, action: Action, reason: &str) {
        let event = format!("{}.error", action.event);
        self.tell_more(request, id, &event, Priority::Error, [("message", json!(reason))]).await;
    }

    /// Tells something of a backup as its row has it now.
    pub(super) async fn tell(&self, request: &Request, id: BackupId, event: &str) {
        self.tell_more(request, id, event, Priority::Info, None).await;
    }

    async fn tell_more(
        &self,
        request: &Request,
        id: BackupId,
        event: &str,
        priority: Priority,
        more: impl IntoIterator<Item = (&'static str, Value)>,
    ) {
        let Some(notifier) = &self.notifier else { return };
        let mut payload = match self.database.backup_even_if_deleted(&id.to_string()).await {
            Ok(Some(row)) => notifications::payload(&row),
            Ok(None) => return,
            Err(error) => {
                warn!(event, error = %Causes(&error), "notification not sent");
                return;
            }
        };
        payload.extend(more.into_iter().map(|(name, value)| (name.to_owned(), value)));
        notifier.tell(&request.context, &format!("backup.{event}"), priority, payload).await;
    }

    /// How often it is told how far a job is.
    pub(super) fn progress_every(&self) -> Duration {
        let default = &self.conf.default;
        let is_timed = match default.backup_driver.split('.').nth(3) {
            Some("swift") => default.backup_swift_enable_progress_timer,
            Some("s3") => default.backup_s3_enable_progress_timer,
            Some("gcs" | "google") => default.backup_gcs_enable_progress_timer,
            _ => default.backup_enable_progress_timer,
        };
        let seconds = u64::try_from(default.backup_timer_interval).unwrap_or_default().max(1);
        if is_timed { Duration::from_secs(seconds) } else { NEVER }
    }
}

/// Tells how far a backup or a restore is.
pub(super) struct Progress<'a> {
    pub worker: &'a StandIn,
    pub request: &'a Request,
    pub id: BackupId,
    /// What is done.
    pub action: Action,
}

impl Progress<'_> {
    async fn tell(&self, percent: u64) {
        let event = format!("{}progress", self.action.event);
        let more = [(self.action.percent, json!(percent))];
        self.worker.tell_more(self.request, self.id, &event, Priority::Info, more).await;
    }
}

#[async_trait]
impl EventSink for Progress<'_> {
    async fn send(&self, event: &Event) -> Result<(), event::Error> {
        match &event.happening {
            Happening::Progress(reading) => {
                // Rounded down, so that 100 means all of it.
                let done = u128::from(reading.bytes_done.min(reading.bytes_total)) * 100;
                if let Some(percent) = done.checked_div(reading.bytes_total.into()) {
                    self.tell(percent.try_into().unwrap_or(100)).await;
                }
            }
            Happening::Ended(completion) if completion.outcome == Outcome::Succeeded => self.tell(100).await,
            Happening::Accepted
            | Happening::Started { .. }
            | Happening::FellBack { .. }
            | Happening::Ended(_) => {}
        }
        Ok(())
    }
}
