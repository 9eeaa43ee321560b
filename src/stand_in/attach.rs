//! How volumes are reached by what Cinder's volume service tells of them.
//!
//! Volumes in Ceph are reached as os-brick does it: by the addresses of the monitors, and the key in
//! `/etc/ceph/CLUSTER.client.USER.keyring`. All others os-brick itself attaches to this host. Whatever comes of a job, its volume is
//! let go of, and then the service is told; what a worker that died had attached is attached once more first.

use std::collections::{BTreeMap, HashMap};
use std::future::pending;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::slice;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::sync::OwnedMutexGuard;
use tracing::{error, warn};

use super::brick::{Device, Host};
use super::jobs::Ran;
use super::{StandIn, Trouble};
use crate::ceph::{Access, Clusters};
use crate::cinder::volumes::{self, Connection, Export, OtherConnection, RbdConnection, VolumeService};
use crate::engine::Volumes;
use crate::error::{Causes, Class, Problem};
use crate::job::{Location, RbdImage, VolumeId};
use crate::volume::FileRoots;

/// Where the keys of clusters are, which Cinder's volume service does not tell.
const KEYRINGS: &str = "/etc/ceph";
/// How long anything that is asked of a cluster may take.
const OPERATION_SECONDS_MAX: u32 = 60;

/// Why a volume cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no key for the cluster.
    #[error("read the key of client.{user} in {}: put a keyring there that this user may read", path.display())]
    Keyring {
        /// The user.
        user: String,
        /// Where it should be.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// No file could be made.
    #[error("write a configuration file for the cluster of the volume")]
    File(#[from] io::Error),
}

/// The clusters that volumes were in so far, besides that of the backups, and who attaches which volume.
#[derive(Debug, Default)]
pub struct Attachments {
    /// The latest word on each counts.
    seen: Mutex<BTreeMap<String, Seen>>,
    turns: Mutex<HashMap<VolumeId, Arc<tokio::sync::Mutex<()>>>>,
}

/// A cluster of volumes; the file goes with the last who uses it.
#[derive(Debug, Clone)]
struct Seen {
    conf: Arc<NamedTempFile>,
    connection: RbdConnection,
}

/// What a job needs to reach its volume.
#[derive(Debug)]
pub struct Attached {
    /// Where the volume is.
    pub location: Location,
    /// What may be named meanwhile: the volume, if it is a file or a device, and images in all clusters.
    pub volumes: Volumes,
    _files: Vec<Arc<NamedTempFile>>,
}

/// What is to be attached.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// The service that has the volume.
    pub volumes: &'a VolumeService<'a>,
    /// The volume, as it was described to us.
    pub volume: &'a Value,
    /// The snapshot of it that is wanted in its place.
    pub snapshot: Option<&'a str>,
    /// Whether its file must stay whose it is; none where the service is to be asked.
    pub secure: Option<bool>,
}

/// How far it has come with attaching a volume. Whatever it is, [`StandIn::detach`] must have it.
pub struct Attachment {
    /// What is attached, or why it is not.
    pub attached: Result<Attached, NotAttached>,
    export: Export,
    /// What the service was told of this host.
    connector: Value,
    by_brick: Option<ByBrick>,
    /// Until the volume is let go of nobody else here attaches it.
    _turn: Option<OwnedMutexGuard<()>>,
}

/// What os-brick was asked to attach.
struct ByBrick {
    host: Arc<Host>,
    connection: OtherConnection,
    /// What it is attached as, if it is.
    device: Option<Device>,
}

/// Why a volume is not attached.
#[derive(Debug)]
pub enum NotAttached {
    /// It cannot be.
    Failed(Problem),
    /// Nobody wants it any more.
    Cancelled,
    /// The worker was told to stop.
    HandedBack,
}

impl NotAttached {
    /// What it means for the job.
    pub(super) fn ended(&self) -> Result<Ran, Trouble> {
        match self {
            Self::Failed(problem) => Ok(Ran::Failed(problem.clone())),
            Self::Cancelled => Ok(Ran::Cancelled),
            Self::HandedBack => Err(Trouble::HandedBack),
        }
    }
}

impl<E: std::error::Error + 'static> From<E> for NotAttached {
    fn from(error: E) -> Self {
        Self::Failed(Problem::new(Class::Permanent, &error))
    }
}

impl Attached {
    /// Has a snapshot of the image read in the place of it.
    pub fn read_snapshot(&mut self, name: String) {
        if let Location::Rbd(image) = &mut self.location {
            image.snapshot = Some(name);
        }
    }
}

impl Attachments {
    /// Makes a volume known that the service has told the way to. `others` are clusters besides those of volumes.
    pub fn attach(
        &self,
        connection: &RbdConnection,
        others: &BTreeMap<String, Access>,
    ) -> Result<Attached, Error> {
        let known = self.seen().get(&connection.cluster).cloned();
        let is_same = |seen: &Seen| {
            (&seen.connection.monitors, &seen.connection.user) == (&connection.monitors, &connection.user)
        };
        if !known.is_some_and(|seen| is_same(&seen)) {
            let conf = Arc::new(write_conf(connection)?);
            let seen = Seen { conf, connection: connection.clone() };
            self.seen().insert(connection.cluster.clone(), seen);
        }
        let image = RbdImage {
            cluster: Some(connection.cluster.clone()),
            pool: connection.pool.clone(),
            image: connection.image.clone(),
            snapshot: None,
        };
        Ok(self.attached(Location::Rbd(image), &FileRoots::new(&[]), others))
    }

    fn attached(
        &self,
        location: Location,
        file_roots: &FileRoots,
        others: &BTreeMap<String, Access>,
    ) -> Attached {
        let (clusters, files) = self.clusters(others);
        let volumes = Volumes { file_roots: file_roots.clone(), clusters };
        Attached { location, volumes, _files: files }
    }

    /// Waits until nobody here is at the volume.
    async fn turn(&self, id: VolumeId) -> OwnedMutexGuard<()> {
        let turn = {
            // Nothing panics while it holds the lock.
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            turns.entry(id).or_default().clone()
        };
        turn.lock_owned().await
    }

    /// The clusters that are known, for jobs that need no volume.
    pub fn known(&self, others: &BTreeMap<String, Access>) -> Clusters {
        self.clusters(others).0
    }

    fn clusters(&self, others: &BTreeMap<String, Access>) -> (Clusters, Vec<Arc<NamedTempFile>>) {
        let seen = self.seen();
        let access = |seen: &Seen| Access {
            conf: seen.conf.path().into(),
            user: seen.connection.user.clone(),
            operation_seconds_max: OPERATION_SECONDS_MAX,
        };
        let mut clusters: BTreeMap<String, Access> =
            seen.iter().map(|(name, seen)| (name.clone(), access(seen))).collect();
        clusters.extend(others.clone());
        (Clusters::new(clusters), seen.values().map(|seen| seen.conf.clone()).collect())
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Seen>> {
        // Nothing panics while it holds the lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StandIn {
    /// Attaches a volume, unless it is `unwanted` first.
    pub(super) async fn attach(&self, wanted: Wanted<'_>, unwanted: impl Future<Output = ()>) -> Attachment {
        let export = match wanted.snapshot {
            Some(id) => Export::Snapshot(id.to_owned()),
            None => Export::Volume(wanted.volume.clone()),
        };
        let mut attachment = Attachment {
            attached: Err(NotAttached::HandedBack),
            export,
            connector: self.connector(),
            by_brick: None,
            _turn: None,
        };
        let attached = self.reach(wanted, &mut attachment, pin!(unwanted)).await;
        attachment.attached = attached;
        attachment
    }

    async fn reach(
        &self,
        wanted: Wanted<'_>,
        attachment: &mut Attachment,
        mut unwanted: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Attached, NotAttached> {
        let volumes = wanted.volumes;
        let turn = self.attachments.turn(volumes.volume_id());
        attachment._turn = Some(self.unless(unwanted.as_mut(), turn).await?);
        let mut found = self.unless(unwanted.as_mut(), self.brick.host()).await?;
        if let Ok(host) = &found {
            attachment.connector = host.connector.clone();
        }
        let mut connection = self.way(wanted, attachment).await?;
        if let (Connection::Other(_), Err(_)) = (&connection, &found) {
            // It may have been installed, or what it needs been started, since somebody looked.
            self.brick.look_again().await;
            found = self.unless(unwanted.as_mut(), self.brick.host()).await?;
            if let Ok(host) = &found {
                self.terminate(volumes, attachment).await;
                attachment.connector = host.connector.clone();
                connection = self.way(wanted, attachment).await?;
            }
        }
        let connection = match connection {
            Connection::Other(connection) => connection,
            Connection::Rbd(connection) => {
                // Nobody is in the way of others who read an image.
                attachment._turn = None;
                let mut attached = self.attachments.attach(&connection, &self.own_clusters)?;
                if let Some(id) = wanted.snapshot {
                    attached.read_snapshot(self.conf.default.snapshot_name_template.replace("%s", id));
                }
                return Ok(attached);
            }
        };
        let host =
            found.map_err(|error| Problem::new(Class::Permanent, &*error)).map_err(NotAttached::Failed)?;
        let secure = match wanted.secure {
            Some(secure) => secure,
            None => volumes.secure_file_operations_enabled(wanted.volume).await?,
        };
        let by_brick = attachment.by_brick.insert(ByBrick { host, connection, device: None });
        let connected = self.brick.connect(&by_brick.host, &by_brick.connection, !secure);
        let device = match self.unless(unwanted, connected).await? {
            Ok(device) => device,
            Err(error) => {
                // What the service was told of this host may not be so any more.
                self.brick.look_again().await;
                return Err(error.into());
            }
        };
        let location = Location::File(device.path.clone());
        let roots = FileRoots::new(slice::from_ref(&device.path));
        by_brick.device = Some(device);
        Ok(self.attachments.attached(location, &roots, &self.own_clusters))
    }

    /// The way to what is wanted.
    async fn way(
        &self,
        wanted: Wanted<'_>,
        attachment: &mut Attachment,
    ) -> Result<Connection, volumes::Error> {
        let told = wanted.volumes.initialize_connection(&attachment.connector, &attachment.export).await;
        let refused = match told {
            Err(error) if error.is_refusal() && wanted.snapshot.is_some() => error,
            told => return told,
        };
        // Cinder's driver for Ceph attaches no snapshots. What leads to the image leads to them, too.
        attachment.export = Export::SharedVolume(wanted.volume.clone());
        match wanted.volumes.initialize_connection(&attachment.connector, &attachment.export).await {
            Ok(image @ Connection::Rbd(_)) => Ok(image),
            _ => Err(refused),
        }
    }

    /// Waits for something unless its volume is unwanted, or the worker is to stop, before it is there.
    async fn unless<T>(
        &self,
        unwanted: Pin<&mut impl Future<Output = ()>>,
        work: impl Future<Output = T>,
    ) -> Result<T, NotAttached> {
        tokio::select! {
            done = work => Ok(done),
            () = unwanted => Err(NotAttached::Cancelled),
            () = self.hand_back.cancelled() => Err(NotAttached::HandedBack),
        }
    }

    /// Lets go of a volume, and tells the service. False if it stays attached to this host.
    pub(super) async fn detach(&self, volumes: &VolumeService<'_>, attachment: Attachment) -> bool {
        if let Some(ByBrick { host, connection, device }) = &attachment.by_brick {
            match (self.brick.disconnect(host, connection, device.as_ref()).await, device) {
                (Ok(()), _) => {}
                (Err(error), None) => {
                    warn!(error = %Causes(&error), "what was begun of attaching the volume may not be cleaned up");
                }
                // The service is not told: a device that has lost its volume could become that of the next one.
                (Err(error), Some(device)) => {
                    error!(
                        volume = %volumes.volume_id(), device = %device.path.display(), error = %Causes(&error),
                        "the volume stays attached to this host, and exported to it: look for who has its device open, and detach \
                         it by hand"
                    );
                    return false;
                }
            }
        }
        if self.terminate(volumes, &attachment).await
            && let Err(error) = volumes.remove_export(&attachment.export).await
        {
            warn!(error = %Causes(&error), "the volume service could not be told that nobody uses the volume any more");
        }
        true
    }

    /// Lets go of what a worker that died may have attached for a job that is not to be done any more.
    pub(super) async fn detach_left(&self, wanted: Wanted<'_>) {
        if self.brick.host().await.is_err() {
            return;
        }
        let mut attachment = self.attach(wanted, pending()).await;
        if wanted.snapshot.is_none() {
            // Somebody may use it by now.
            attachment.export = Export::SharedVolume(wanted.volume.clone());
        }
        self.detach(wanted.volumes, attachment).await;
    }

    /// Says that we do not use a volume any more. Whether the service knows.
    async fn terminate(&self, volumes: &VolumeService<'_>, attachment: &Attachment) -> bool {
        let told = volumes.terminate_connection(&attachment.connector, &attachment.export).await;
        if let Err(error) = &told {
            warn!(error = %Causes(error), "the volume service could not be told that the volume is used no more");
        }
        told.is_ok()
    }

    /// What the volume service is told of this host where there is no os-brick, which would tell more.
    fn connector(&self) -> Value {
        json!({
            "platform": std::env::consts::ARCH,
            "os_type": "linux",
            "ip": self.conf.default.my_ip,
            "host": self.host,
            "multipath": false,
            "enforce_multipath": false,
            "do_local_attach": false,
        })
    }
}

fn write_conf(connection: &RbdConnection) -> Result<NamedTempFile, Error> {
    let RbdConnection { cluster, user, monitors, .. } = connection;
    let path = Path::new(KEYRINGS).join(format!("{cluster}.client.{user}.keyring"));
    if let Err(source) = std::fs::File::open(&path) {
        return Err(Error::Keyring { user: user.clone(), path, source });
    }
    let mut file = NamedTempFile::new()?;
    writeln!(file, "[global]\nmon_host = {}\nkeyring = {}", monitors.join(","), path.display())?;
    file.flush()?;
    Ok(file)
}
