//! Puts right at the start what an earlier `cinder-backup` has left that died: it acknowledges a message when it takes it, and
//! so nobody does what it was at.
//!
//! What has a message that is still to come must not be touched. Deletes are done in any case: whichever comes second finds
//! nothing to do. A restore has its message in our own queue, all of which is handed to us when we consume it and whoever had
//! it before is gone, or has none. A backup that is being made may wait for the volume service, which sends its message when it
//! is ready, however long that takes; nothing tells it from one whose message is gone, so that it is left alone.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Map;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use uuid::Uuid;

use super::backups::RESTORE;
use super::{DRAIN_TIME_MAX, HAND_BACK_TIME_MAX, LATER_PAUSE, StandIn, TOPIC, Trouble};
use crate::broker::State;
use crate::cinder::database::{self, BackupRow, Changes, Restored};
use crate::error::Causes;
use crate::job::BackupId;
use crate::message::oslo::{self, Context, Request};

/// How many heartbeats of the broker it takes until the messages of a host that is gone are handed to the next one.
const HEARTBEATS_MAX: u32 = 3;
/// Why a restore has failed that nobody is at.
const INTERRUPTED: &str = "The service that restored it has died, and its message is gone.";

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
        let restoring = self.left("restoring").await;
        for row in self.left("deleting").await {
            self.go_on_deleting(&row).await;
        }
        let all_heard = !restoring.is_empty() && self.await_all_messages().await;
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        for row in restoring.into_iter().filter(|_| all_heard) {
            if let Ok(id) = row.id.parse::<BackupId>()
                && !heard.contains(&id)
                && let Err(error) = self.end_restore(id, &row).await
            {
                warn!(backup = %id, error = %Causes(&error), "a restore that nobody is at is not ended");
            }
        }
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
        loop {
            match self.delete(&request, id, false).await {
                Ok(_) => break,
                Err(Trouble::Failure(failure)) => {
                    warn!(backup = %id, error = failure.message, "a delete that was begun has failed");
                    break;
                }
                Err(Trouble::HandedBack) => break,
                Err(Trouble::Later(why)) => {
                    warn!(backup = %id, error = why, "not deleted for now, trying again later");
                    sleep(LATER_PAUSE).await;
                }
            }
        }
        self.forget_start(&request);
    }

    /// Ends a restore whose message is gone, as Cinder's own service does, unless its row has changed since it was read.
    async fn end_restore(&self, id: BackupId, row: &BackupRow) -> Result<(), database::Error> {
        let used = self.use_of(id);
        let _turn = used.turn.lock().await;
        let now = self.database.backup(&row.id).await?;
        if now.as_ref() != Some(row) {
            return Ok(());
        }
        let volume = row.restore_volume_id.as_deref().unwrap_or_default();
        match self.database.finish_restore(&row.id, volume, Restored::Failed).await {
            Err(database::Error::NotThere { .. }) => {
                let changes = Changes::new().text("status", "available");
                self.database.change_backup(&row.id, &["restoring"], &changes).await?;
            }
            result => result?,
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
                warn!(host = %self.host, "another service takes messages of this host: its restores are left alone");
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
