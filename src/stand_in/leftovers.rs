//! Puts right at the start what an earlier `cinder-backup` has left that died: it acknowledges a message when it takes it, and
//! so nobody does what it was at.
//!
//! What has a message that is still to come must not be touched. Deletes are done in any case: whichever comes second finds
//! nothing to do. A restore has its message in our own queue, all of which is handed to us when we consume it and whoever had
//! it before is gone, or has none. A backup that is being made may have it at the scheduler, which has chosen us, or at the
//! volume service, which we were asked to wait for. Both take their messages in order. So one that answers has begun all that
//! it was asked for before, and what it begins it sends on at once; but for a copy of the volume, which stands in the database
//! while it is made. What a service has left of which nothing has come then, nobody is at.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Map, Value};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::backups::{CREATE, RESTORE, service_of};
use super::{
    DRAIN_TIME_MAX, HAND_BACK_TIME_MAX, LATER_PAUSE, NOT_BY_ITSELF, NOT_FOR_NOW, StandIn, TOPIC, Trouble,
    longer,
};
use crate::broker::State;
use crate::cinder::database::{self, BackupRow, Changes, Restored};
use crate::cinder::rpc::Target;
use crate::cinder::scheduler;
use crate::error::Causes;
use crate::job::BackupId;
use crate::message::oslo::{self, Context, Request};

/// How many heartbeats of the broker it takes until the messages of a host that is gone are handed to the next one.
const HEARTBEATS_MAX: u32 = 3;
/// Why a restore has failed that nobody is at.
const INTERRUPTED: &str = "The service that restored it has died, and its message is gone.";
/// Why a backup has failed that nobody is at, as Cinder says it.
const INCOMPLETE: &str = "incomplete backup reset on manager restart";
/// How long a service may take to answer that a message of ours may be with.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(600);

/// The backups of which requests have come since the start; none once nobody asks any more.
pub(super) type Heard = Mutex<Option<HashSet<BackupId>>>;

impl StandIn {
    /// Notes which backup a request is about.
    pub(super) fn note_heard(&self, request: &Request) {
        // Nothing panics while it holds the lock.
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(heard) = heard.as_mut()
            && let Some(Ok(backup)) = request.args.get("backup").map(oslo::Backup::read)
        {
            heard.insert(backup.id);
        }
    }

    /// Puts right what is left of earlier services, while requests are taken.
    pub(super) async fn clean_up(&self) {
        let mut groups: HashMap<Option<Target>, Vec<BackupRow>> = HashMap::new();
        for row in self.left("creating").await {
            groups.entry(self.who_has(&row).await).or_default().push(row);
        }
        let mut rest = self.left("restoring").await;
        let failed = self.left("error").await.into_iter();
        rest.extend(failed.filter(|row| row.temp_volume_id.is_some() || row.temp_snapshot_id.is_some()));
        if !rest.is_empty() {
            groups.entry(None).or_default().append(&mut rest);
        }
        let deletes = async {
            for row in self.left("deleting").await {
                self.go_on_deleting(&row).await;
            }
        };
        let ends = async {
            join_all(groups.into_iter().map(|(from, rows)| self.end_all(from, rows))).await;
            self.heard.lock().unwrap_or_else(PoisonError::into_inner).take();
        };
        tokio::join!(deletes, ends);
    }

    /// The service that may have a message that brings us the backup; none if only we can.
    async fn who_has(&self, row: &BackupRow) -> Option<Target> {
        if row.service.is_none() {
            return Some(Target::any(scheduler::TOPIC));
        }
        match self.database.volume(&row.volume_id).await {
            Ok(volume) => volume.as_ref().and_then(service_of).map(Target::volume_service),
            // Nobody answers to that name, and so it is left alone.
            Err(_) => Some(Target::volume_service("")),
        }
    }

    /// Ends what nobody is at any more, of backups whose messages can only be with `from` or in our own queue.
    async fn end_all(&self, from: Option<Target>, rows: Vec<BackupRow>) {
        if let Some(service) = from {
            // Neither needs to know of anything for these.
            let (method, argument) = match service == Target::any(scheduler::TOPIC) {
                true => ("get_pools", "filters"),
                false => ("secure_file_operations_enabled", "volume"),
            };
            let args = Map::from_iter([(argument.to_owned(), Value::Null)]);
            let probe = Request::new(own_request(method).context, method, "3.0", args);
            if !self.rpc.catches_up(&service, probe, ANSWER_TIME_MAX).await {
                let count = rows.len();
                warn!(%service, count, "the service does not answer: backups that it may be about to pass on stay as they are");
                return;
            }
        }
        if !self.await_all_messages().await {
            return;
        }
        for row in rows {
            let Ok(id) = row.id.parse() else { continue };
            if !self.has_heard(id)
                && let Err(error) = self.end(id, &row).await
            {
                warn!(backup = %id, status = row.status, error = %Causes(&error), "what nobody is at is not ended");
            }
        }
    }

    /// Whether a request about a backup has come.
    fn has_heard(&self, id: BackupId) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.as_ref().is_some_and(|heard| heard.contains(&id))
    }

    /// Ends what was done with a backup that nobody is at, as Cinder's own service does, unless its row has changed since it
    /// was read.
    async fn end(&self, id: BackupId, row: &BackupRow) -> Result<(), database::Error> {
        let used = self.use_of(id);
        let _turn = used.turn.lock().await;
        if self.database.backup(&row.id).await?.as_ref() != Some(row) {
            return Ok(());
        }
        match row.status.as_str() {
            "restoring" => return self.end_restore(id, row).await,
            "creating" => {
                if row.temp_volume_id.is_none()
                    && row.temp_snapshot_id.is_none()
                    && self.database.is_being_copied(&row.volume_id).await?
                {
                    let volume = &row.volume_id;
                    info!(backup = %id, volume, "a copy is being made for the backup: it is waited for");
                    return Ok(());
                }
                if !self.database.fail_backup(&row.id, INCOMPLETE).await? {
                    return Ok(());
                }
                info!(backup = %id, volume = row.volume_id, "a backup that nobody was at has ended as failed");
                self.tell_error(&own_request("create_backup"), id, CREATE, INCOMPLETE).await;
            }
            _ => {}
        }
        self.remove_temporary(&own_request("create_backup").context, row).await
    }

    /// The backups of this host with a status.
    async fn left(&self, status: &str) -> Vec<BackupRow> {
        match self.database.backups_of_host(&self.host, &[status]).await {
            Ok(rows) => rows,
            Err(error) => {
                warn!(error = %Causes(&error), status, "what an earlier service has left is not looked at");
                Vec::new()
            }
        }
    }

    async fn go_on_deleting(&self, row: &BackupRow) {
        let Ok(id) = row.id.parse() else { return };
        if row.encryption_key_id.is_some() {
            // As Cinder: whoever deletes the key needs the rights of its owner.
            let changes = Changes::new().text("status", "error_deleting");
            if let Err(error) = self.database.change_backup(&row.id, &["deleting"], &changes).await {
                warn!(backup = %id, error = %Causes(&error), "a delete that was begun is not ended");
            }
            return;
        }
        info!(backup = %id, "a delete that was begun is gone on with");
        let request = own_request("delete_backup");
        let mut pause = LATER_PAUSE;
        loop {
            match self.delete(&request, id, false).await {
                Ok(_) => break,
                Err(Trouble::Failure(failure)) => {
                    warn!(backup = %id, error = failure.message, "a delete that was begun has failed");
                    break;
                }
                Err(Trouble::HandedBack) => break,
                Err(Trouble::Later(why)) => warn!(backup = %id, error = why, "{NOT_FOR_NOW}"),
                Err(Trouble::Stuck(why)) => error!(backup = %id, error = why, "{NOT_BY_ITSELF}"),
            }
            sleep(pause).await;
            pause = longer(pause);
        }
        self.forget_start(&request);
    }

    async fn end_restore(&self, id: BackupId, row: &BackupRow) -> Result<(), database::Error> {
        let volume = row.restore_volume_id.as_deref().unwrap_or_default();
        match self.database.finish_restore(&row.id, volume, Restored::Failed).await {
            // The volume was deleted meanwhile.
            Err(database::Error::NotThere { .. }) | Ok(()) => {}
            Err(error) => return Err(error),
        }
        info!(backup = %id, volume, "a restore that nobody was at has ended as failed");
        self.tell_error(&own_request("restore_backup"), id, RESTORE, INTERRUPTED).await;
        Ok(())
    }

    /// Waits until all messages were handed to us that an earlier service may have had. False if that cannot be told.
    async fn await_all_messages(&self) -> bool {
        let seconds = self.conf.rabbit.heartbeat_timeout_threshold;
        if seconds == 0 {
            return false;
        }
        // Another one of ours may be about to stop; and a host that is gone the broker notices by its heartbeats.
        let time =
            DRAIN_TIME_MAX + HAND_BACK_TIME_MAX + Duration::from_secs(seconds).saturating_mul(HEARTBEATS_MAX);
        let mut state = self.rpc.state();
        loop {
            if state.wait_for(|state| *state == State::Connected).await.is_err() {
                return false;
            }
            match timeout(time, state.changed()).await {
                Err(_) => break,
                Ok(Ok(())) => {}
                Ok(Err(_)) => return false,
            }
        }
        match self.rpc.consumer_count(TOPIC, &self.host).await {
            Ok(1) => true,
            Ok(_) => {
                warn!(host = %self.host, "another service takes messages of this host: what is left there stays as it is");
                false
            }
            Err(error) => {
                warn!(error = %Causes(&error), "it is not known who else takes messages of this host");
                false
            }
        }
    }
}

/// A request of our own, for what nobody is known to have asked for.
fn own_request(method: &str) -> Request {
    Request::new(Context::admin(&format!("req-{}", Uuid::new_v4())), method, "2.0", Map::new())
}
