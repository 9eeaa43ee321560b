//! The clusters of the configuration, by name.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Cluster, Error};

/// How a cluster is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Ceph's own configuration file.
    pub conf: PathBuf,
    /// The user, without `client.`.
    pub user: String,
    /// How long anything that is asked of the cluster may take.
    pub operation_seconds_max: u32,
}

/// The clusters that jobs may name.
#[derive(Debug, Clone, Default)]
pub struct Clusters(Arc<BTreeMap<String, Access>>);

impl Clusters {
    /// Takes the clusters by their names.
    pub fn new(clusters: BTreeMap<String, Access>) -> Self {
        Self(Arc::new(clusters))
    }

    /// The name of the cluster that is meant by none, if that is clear: of the only one there is.
    pub fn only_name(&self) -> Option<&str> {
        match self.0.len() {
            1 => self.0.keys().next().map(String::as_str),
            _ => None,
        }
    }

    /// The names of all.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Connects to the cluster of this name; without one, to the only one there is.
    ///
    /// Each call makes a connection of its own. A job has its own, so that a worker that takes a job over can have the
    /// cluster shut out the one that had it before, and nothing else.
    pub fn connect(&self, name: Option<&str>) -> Result<Cluster, Error> {
        let access = name.or_else(|| self.only_name()).and_then(|name| self.0.get(name));
        let Some(Access { conf, user, operation_seconds_max }) = access else {
            let known = self.names().collect::<Vec<_>>().join(", ");
            return Err(match name {
                _ if known.is_empty() => Error::NoCluster,
                Some(name) => Error::UnknownCluster { name: name.to_owned(), known },
                None => Error::UnnamedCluster { known },
            });
        };
        Cluster::connect(conf, user, *operation_seconds_max)
    }
}
