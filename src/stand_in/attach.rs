//! How volumes in Ceph are reached by what Cinder's volume service tells of them, as os-brick does it: by the addresses of the
//! monitors, and the key in `/etc/ceph/CLUSTER.client.USER.keyring`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tempfile::NamedTempFile;

use crate::ceph::{Access, Clusters};
use crate::cinder::volumes::RbdConnection;
use crate::job::{Location, RbdImage};

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

/// The clusters that volumes were in so far, besides that of the backups. The latest word on each counts.
#[derive(Debug, Default)]
pub struct Attachments {
    seen: Mutex<BTreeMap<String, Seen>>,
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
    /// All clusters that may be named meanwhile.
    pub clusters: Clusters,
    _files: Vec<Arc<NamedTempFile>>,
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
        let (clusters, files) = self.clusters(others);
        Ok(Attached { location: Location::Rbd(image), clusters, _files: files })
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
