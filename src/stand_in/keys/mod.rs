//! What becomes of the keys of encrypted volumes, as Cinder has it: each backup has a copy of the key of its volume, made with
//! the token of whoever asked for it, and each volume that it is restored to has a copy of that. What is stored are the bytes
//! of the volume as they are.
//!
//! A copy has a name that says what it is for, and is looked for by that name before it is made. So a request that comes
//! twice, and an answer that was lost, leave one copy.

mod barbican;

use std::io;
use std::sync::Arc;

use tracing::{info, warn};

use self::barbican::Barbican;
use super::{StandIn, Trouble};
use crate::cinder::conf::Conf;
use crate::cinder::database::{BackupRow, Changes, KeptKey, VolumeRow, kept_key};
use crate::error::{Causes, Class, Problem};
use crate::job::{BackupId, JobId};
use crate::message::oslo::Context;

/// The id of the only key that Cinder's own key manager has, `fixed_key`.
const FIXED_KEY_ID: &str = "00000000-0000-0000-0000-000000000000";

/// Why something cannot be done with a key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key manager does not do it.
    #[error("{action} key {id}")]
    Server {
        /// What was wanted.
        action: &'static str,
        /// The key.
        id: String,
        /// Whether it may pass.
        class: Class,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// The key manager is none that is spoken to here.
    #[error(
        "the volume is encrypted, and of [key_manager] backend = {backend} no keys can be had here: only barbican and \
         cinder.keymgr.conf_key_mgr.ConfKeyManager are known"
    )]
    Backend {
        /// What is written.
        backend: String,
    },
    /// There is no such key.
    #[error(
        "key {id} is not in [key_manager] fixed_key, which is the only key of ConfKeyManager: is it set, and is backend right?"
    )]
    NotFixed {
        /// The key.
        id: String,
    },
}

impl Error {
    /// Whether it may pass.
    pub fn class(&self) -> Class {
        match self {
            Self::Server { class, .. } => *class,
            Self::Backend { .. } | Self::NotFixed { .. } => Class::Permanent,
        }
    }
}

/// The key manager that `cinder.conf` names.
pub struct Keys(Manager);

enum Manager {
    Barbican(Box<Barbican>),
    /// `ConfKeyManager`, and whether it has its key.
    Fixed(bool),
    Other(String),
}

impl Keys {
    /// Prepares to talk to it. One that is not known fails each time that a key is needed.
    pub fn new(conf: &Conf) -> Result<Self, super::Error> {
        let backend = conf.key_manager.backend.as_str();
        Ok(Self(match backend.rsplit('.').next().unwrap_or_default() {
            "barbican" | "BarbicanKeyManager" => Manager::Barbican(Box::new(Barbican::new(conf)?)),
            "ConfKeyManager" => Manager::Fixed(conf.key_manager.fixed_key.is_some()),
            _ => Manager::Other(backend.into()),
        }))
    }

    /// Makes a copy of a key under a name that no other key has, with the rights of a request, and gives its id. If there is
    /// one of that name already, that is it.
    pub async fn copy(&self, context: &Context, id: &str, name: &str) -> Result<String, Error> {
        self.check(id)?;
        match &self.0 {
            Manager::Barbican(barbican) => barbican.copy(context, id, name).await,
            Manager::Fixed(_) | Manager::Other(_) => Ok(id.into()),
        }
    }

    /// Deletes a key with the rights of a request, and, as Cinder does, with those of the service itself if they do not do.
    /// Deleting what is not there succeeds.
    pub async fn delete(&self, context: &Context, id: &str) -> Result<(), Error> {
        self.check(id)?;
        match &self.0 {
            Manager::Barbican(barbican) => barbican.delete(context, id).await,
            Manager::Fixed(_) | Manager::Other(_) => Ok(()),
        }
    }

    /// Fails where nothing can be done with this key, whoever asks.
    fn check(&self, id: &str) -> Result<(), Error> {
        match &self.0 {
            Manager::Barbican(_) => Ok(()),
            Manager::Fixed(true) if id == FIXED_KEY_ID => Ok(()),
            Manager::Fixed(_) => Err(Error::NotFixed { id: id.into() }),
            Manager::Other(backend) => Err(Error::Backend { backend: backend.clone() }),
        }
    }
}

/// What becomes of the key of a volume that a backup is restored to.
#[derive(Default)]
pub(super) struct Rekeyed {
    /// A copy that is the volume's once all is restored, and nobody's before.
    copy: Option<String>,
    /// The key that it has until then, and nobody needs after.
    old: Option<String>,
    /// What its row is to say then.
    pub changes: Changes,
}

impl StandIn {
    /// The key of a new backup: a copy of its volume's.
    pub(super) async fn key_for_backup(
        &self,
        context: &Context,
        id: BackupId,
        volume: &VolumeRow,
    ) -> Result<Result<Option<String>, Problem>, Trouble> {
        let Some(key) = &volume.encryption_key_id else { return Ok(Ok(None)) };
        settled(self.keys.copy(context, key, &format!("backhaul-backup-{id}")).await.map(Some))
    }

    /// Prepares a volume for the key of a backup that is to be restored to it, by what that keeps of its own volume. Nothing
    /// of the volume is changed yet.
    pub(super) async fn rekey(
        &self,
        context: &Context,
        job_id: JobId,
        backup: &BackupRow,
        volume: &VolumeRow,
        meta: Option<&str>,
    ) -> Result<Result<Rekeyed, Problem>, Trouble> {
        let kept = meta.map(|meta| kept_key(&volume.id, meta)).transpose();
        let KeptKey { key_id, volume_type_id } = match kept {
            Ok(kept) => match kept.flatten() {
                Some(kept) => kept,
                None => return Ok(Ok(Rekeyed::default())),
            },
            Err(error) => return Ok(Err(Problem::new(error.class(), &error))),
        };
        let mut rekeyed = Rekeyed::default();
        if key_id.is_some() && volume.volume_type_id != volume_type_id {
            let source = volume_type_id.unwrap_or_default();
            let problem = match &volume.volume_type_id {
                None if self.database.has_volume_type(&source).await? => None,
                None => Some(format!("The source volume type '{source}' is not available.")),
                Some(own) => Some(format!(
                    "The source volume type '{source}' is different than the destination volume type '{own}'."
                )),
            };
            if let Some(message) = problem {
                return Ok(Err(Problem { class: Class::Permanent, message, causes: Vec::new() }));
            }
            rekeyed.changes = Changes::new().text("volume_type_id", &source);
        }
        // What was made of this very volume, since when its key has not changed.
        if key_id == volume.encryption_key_id {
            return Ok(Ok(rekeyed));
        }
        let new = match backup.encryption_key_id.as_ref().or(key_id.as_ref()) {
            Some(key) => {
                let copied = self.keys.copy(context, key, &format!("backhaul-restore-{job_id}")).await;
                match settled(copied)? {
                    Ok(copy) => Some(copy),
                    Err(problem) => return Ok(Err(problem)),
                }
            }
            None => None,
        };
        rekeyed.changes = rekeyed.changes.text_or_null("encryption_key_id", new.as_deref());
        // An earlier delivery may have come to the end.
        if new != volume.encryption_key_id {
            rekeyed.copy = new;
            rekeyed.old = volume.encryption_key_id.clone();
        }
        Ok(Ok(rekeyed))
    }

    /// Removes the key that a volume had before a backup was restored to it, or, if it was not, the copy that was made for that.
    pub(super) async fn drop_key(
        &self,
        context: &Context,
        rekeyed: Rekeyed,
        is_restored: bool,
    ) -> Result<(), Trouble> {
        let key = if is_restored { rekeyed.old } else { rekeyed.copy };
        if let Some(key) = key
            && !self.is_needed(&key, "").await?
        {
            self.drop_copy(context, &key).await;
        }
        Ok(())
    }

    /// Whether a key stays because somebody else has it than whoever has this id: snapshots have that of their volume, which
    /// Cinder deletes all the same.
    async fn is_needed(&self, key: &str, but: &str) -> Result<bool, Trouble> {
        let is_needed = self.database.is_key_in_use(key, but).await?;
        if is_needed {
            info!(key, "a key stays, since a volume, a snapshot or another backup has it");
        }
        Ok(is_needed)
    }

    /// Removes a key that nobody needs. That it stays is no reason for anything to fail.
    pub(super) async fn drop_copy(&self, context: &Context, key: &str) {
        if let Err(error) = self.keys.delete(context, key).await {
            warn!(key, error = %Causes(&error), "a key that nobody needs any more stays in the key manager");
        }
    }

    /// Fails where the key of a backup could not be deleted, whoever asks.
    pub(super) fn check_key(&self, backup: &BackupRow) -> Result<(), Problem> {
        let checked = backup.encryption_key_id.as_ref().map_or(Ok(()), |key| self.keys.check(key));
        checked.map_err(|error| Problem::new(error.class(), &error))
    }

    /// Deletes the key of a backup.
    pub(super) async fn delete_key(
        &self,
        context: &Context,
        backup: &BackupRow,
    ) -> Result<Result<(), Problem>, Trouble> {
        let Some(key) = &backup.encryption_key_id else { return Ok(Ok(())) };
        if !self.is_needed(key, &backup.id).await?
            && let Err(problem) = settled(self.keys.delete(context, key).await)?
        {
            return Ok(Err(problem));
        }
        let gone = Changes::new().text_or_null("encryption_key_id", None);
        self.database.change_backup(&backup.id, &[], &gone).await?;
        Ok(Ok(()))
    }
}

/// What may pass is tried later.
fn settled<T>(result: Result<T, Error>) -> Result<Result<T, Problem>, Trouble> {
    match result {
        Ok(done) => Ok(Ok(done)),
        Err(error) if error.class() == Class::Transient => Err(Trouble::Later(Causes(&error).to_string())),
        Err(error) => Ok(Err(Problem::new(error.class(), &error))),
    }
}
