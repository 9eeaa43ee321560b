//! The configuration: every setting with its type, default and range, checked once when it is loaded.
//!
//! A setting is declared in one place, at its field: what exists here is valid. Where the values come from, and how
//! an error tells it, is in `layers`; `docs/configuration.md` has the whole list for people.

mod layers;
mod value;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use url::Url;

pub use layers::ConfigError;
use layers::Layers;
pub use value::Queue;

use value::{
    AuthVersion, Kind, auth_version, broker_url, bucket, ceph_user, cluster, compression, container,
    core_count, endpoint, host_name, interface, kind, name, number, path, paths, pool, prefix, proxy, queue,
    region, secret, share, some_address, some_path, some_prefix, some_whole, storage_policy, swift_url, text,
    whole,
};

use crate::broker::AmqpUrl;
use crate::engine::chunked::{Compression, USUAL_ZONE, ZSTD_LEVEL};
use crate::job::{Container, StoreName};
use crate::store::{
    Credentials, Endpoint, GcsSettings, HttpSettings, S3Settings, Secret, SecretFrom, Share, SwiftSettings,
};

/// Where Google Cloud Storage is.
pub const GOOGLE: &str = "https://storage.googleapis.com";

/// What the process needs to work besides the part that grows with `object_bytes`: connections, buffers, code.
pub const MEMORY_BYTES_BASE: u64 = 96 << 20;

/// Every setting by its full name; `NAME` stands for the name of a store or a cluster.
pub const SETTINGS: &[&str] = &[
    "broker.url",
    "broker.prefix",
    "broker.queue",
    "broker.heartbeat_seconds",
    "broker.retry_delay_seconds",
    "broker.retry_delay_seconds_max",
    "broker.reconnect_seconds_max",
    "broker.publish_seconds_max",
    "broker.message_bytes_max",
    "broker.tls.ca_file",
    "broker.tls.client_certificate_file",
    "broker.tls.client_key_file",
    "worker.name",
    "worker.jobs_max",
    "worker.memory_bytes_max",
    "worker.cpu_threads_max",
    "worker.bytes_per_second_max",
    "worker.job_bytes_per_second_max",
    "worker.file_roots",
    "worker.attempts_max",
    "worker.attempt_seconds_max",
    "worker.progress_seconds",
    "worker.drain_seconds_max",
    "worker.health_listen",
    "worker.oslo_topic",
    "ceph.NAME.conf",
    "ceph.NAME.user",
    "ceph.NAME.operation_seconds_max",
    "store.NAME.kind",
    "store.NAME.default",
    "store.NAME.path",
    "store.NAME.compression",
    "store.NAME.compression_level",
    "store.NAME.object_bytes",
    "store.NAME.sha_block_bytes",
    "store.NAME.unchanged_check_per_mille",
    "store.NAME.source_snapshots_max",
    "store.NAME.share",
    "store.NAME.mount_options",
    "store.NAME.mount_point_base",
    "store.NAME.endpoint",
    "store.NAME.region",
    "store.NAME.path_style",
    "store.NAME.bucket",
    "store.NAME.create_containers",
    "store.NAME.access_key",
    "store.NAME.secret_key",
    "store.NAME.secret_key_file",
    "store.NAME.sse_c_key_file",
    "store.NAME.ca_file",
    "store.NAME.proxy",
    "store.NAME.connect_seconds_max",
    "store.NAME.idle_seconds_max",
    "store.NAME.connections_max",
    "store.NAME.retries_max",
    "store.NAME.auth_url",
    "store.NAME.auth_version",
    "store.NAME.user",
    "store.NAME.user_domain",
    "store.NAME.project",
    "store.NAME.project_domain",
    "store.NAME.application_credential",
    "store.NAME.password",
    "store.NAME.password_file",
    "store.NAME.service_type",
    "store.NAME.interface",
    "store.NAME.storage_url",
    "store.NAME.container",
    "store.NAME.storage_policy",
    "store.NAME.credentials_file",
    "store.NAME.anonymous",
    "store.NAME.location",
    "store.NAME.storage_class",
    "store.NAME.cluster",
    "store.NAME.pool",
    "store.NAME.journaling",
    "store.NAME.stripe_unit_bytes",
    "store.NAME.stripe_count",
];

/// What all stores have.
const OF_ALL: [&str; 2] = ["kind", "default"];
/// What stores have besides that whose objects are in the form of Cinder's chunked drivers.
const OF_CHUNKED: [&str; 6] = [
    "compression",
    "compression_level",
    "object_bytes",
    "sha_block_bytes",
    "unchanged_check_per_mille",
    "source_snapshots_max",
];
/// What only stores that are folders have.
const OF_POSIX: [&str; 1] = ["path"];
/// What only stores on shares of NFS servers have.
const OF_NFS: [&str; 4] = ["path", "share", "mount_options", "mount_point_base"];
/// What all stores have that are reached by HTTP.
const OF_HTTP: [&str; 7] = [
    "create_containers",
    "ca_file",
    "proxy",
    "connect_seconds_max",
    "idle_seconds_max",
    "connections_max",
    "retries_max",
];
/// What stores behind S3 have.
const OF_S3: [&str; 8] = [
    "endpoint",
    "region",
    "path_style",
    "bucket",
    "access_key",
    "secret_key",
    "secret_key_file",
    "sse_c_key_file",
];
/// What stores behind Swift have.
const OF_SWIFT: [&str; 15] = [
    "auth_url",
    "auth_version",
    "user",
    "user_domain",
    "project",
    "project_domain",
    "application_credential",
    "password",
    "password_file",
    "region",
    "service_type",
    "interface",
    "storage_url",
    "container",
    "storage_policy",
];
/// What stores in Google Cloud Storage have.
const OF_GCS: [&str; 7] =
    ["endpoint", "bucket", "credentials_file", "anonymous", "project", "location", "storage_class"];
/// What says of a user of Keystone's who that is; an application credential says it itself.
const OF_USERS: [&str; 4] = ["user", "user_domain", "project", "project_domain"];
/// What says which endpoint of Keystone's catalog is meant.
const OF_CATALOG: [&str; 3] = ["region", "service_type", "interface"];
/// What stores of RBD images have.
#[cfg(feature = "ceph")]
const OF_RBD: [&str; 6] =
    ["cluster", "pool", "source_snapshots_max", "journaling", "stripe_unit_bytes", "stripe_count"];

/// The whole configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The file it was read from; none if everything comes from the environment.
    pub file: Option<PathBuf>,
    /// `[broker]`; commands that need no broker work without it.
    pub broker: Option<Broker>,
    /// `[worker]`.
    pub worker: Worker,
    /// `[ceph.NAME]`: the Ceph clusters by name.
    pub ceph: BTreeMap<String, Ceph>,
    /// `[store.NAME]`: the stores by name.
    pub stores: BTreeMap<StoreName, Store>,
}

/// `[broker]`: how the AMQP broker is reached and used.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section: [broker]")]
pub struct Broker {
    /// `amqp://` or `amqps://`, with user and password.
    #[serde(deserialize_with = "broker_url")]
    pub url: AmqpUrl,
    /// The first part of the names of all exchanges and queues.
    #[serde(default = "broker_prefix", deserialize_with = "prefix")]
    pub prefix: String,
    /// The kind of the job queues.
    #[serde(default, deserialize_with = "queue")]
    pub queue: Queue,
    /// How often both ends show that they live.
    #[serde(default = "number::<_, 60>", deserialize_with = "whole::<_, _, 1, 3600>")]
    pub heartbeat_seconds: u16,
    /// How long a job that is to be tried again waits at most the first time; twice as long each time.
    #[serde(default = "number::<_, 30>", deserialize_with = "whole::<_, _, 1, 86400>")]
    pub retry_delay_seconds: u32,
    /// How long it waits at most, however often it was tried.
    #[serde(default = "number::<_, 1800>", deserialize_with = "whole::<_, _, 1, 86400>")]
    pub retry_delay_seconds_max: u32,
    /// The longest pause between two attempts to reach a lost broker.
    #[serde(default = "number::<_, 30>", deserialize_with = "whole::<_, _, 1, 3600>")]
    pub reconnect_seconds_max: u32,
    /// How long to try to publish one message before its job is taken to have failed to.
    #[serde(default = "number::<_, 60>", deserialize_with = "whole::<_, _, 1, 3600>")]
    pub publish_seconds_max: u32,
    /// A longer message is refused.
    #[serde(default = "message_bytes_max", deserialize_with = "whole::<_, _, 1024, 134_217_728>")]
    pub message_bytes_max: usize,
    /// `[broker.tls]`.
    #[serde(default)]
    pub tls: Tls,
}

/// `[broker.tls]`: what an `amqps` connection checks and shows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section: [broker.tls]")]
pub struct Tls {
    /// The certificates, in PEM, of the authorities that are trusted besides the system's.
    #[serde(default, deserialize_with = "some_path")]
    pub ca_file: Option<PathBuf>,
    /// Our own certificate, in PEM.
    #[serde(default, deserialize_with = "some_path")]
    pub client_certificate_file: Option<PathBuf>,
    /// The key to it, in PEM.
    #[serde(default, deserialize_with = "some_path")]
    pub client_key_file: Option<PathBuf>,
}

/// `[worker]`: what a worker takes on, and what it may use for it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section: [worker]")]
pub struct Worker {
    /// Names the worker in events and at the broker; the host's name by default.
    #[serde(default = "host_name", deserialize_with = "name")]
    pub name: String,
    /// How many jobs run at the same time.
    #[serde(default = "number::<_, 4>", deserialize_with = "whole::<_, _, 1, 64>")]
    pub jobs_max: u16,
    /// What all jobs together may hold of volumes' data.
    #[serde(
        default = "memory_bytes_max",
        deserialize_with = "whole::<_, _, 134_217_728, 70_368_744_177_664>"
    )]
    pub memory_bytes_max: u64,
    /// How many threads hash and compress; one a core by default.
    #[serde(default = "core_count", deserialize_with = "whole::<_, _, 1, 1024>")]
    pub cpu_threads_max: usize,
    /// How much of their volumes all jobs together read or restore in a second; as much as they can if absent.
    #[serde(default, deserialize_with = "some_whole::<_, _, 1_048_576, 1_099_511_627_776>")]
    pub bytes_per_second_max: Option<NonZeroU64>,
    /// The same for each job.
    #[serde(default, deserialize_with = "some_whole::<_, _, 1_048_576, 1_099_511_627_776>")]
    pub job_bytes_per_second_max: Option<NonZeroU64>,
    /// File sources and targets must lie below one of these absolute paths; with none there are no file jobs.
    #[serde(default, deserialize_with = "paths")]
    pub file_roots: Vec<PathBuf>,
    /// How often a job is tried before it has failed.
    #[serde(default = "number::<_, 3>", deserialize_with = "whole::<_, _, 1, 100>")]
    pub attempts_max: u32,
    /// How long after its first attempt a job is tried again.
    #[serde(default = "attempt_seconds_max", deserialize_with = "whole::<_, _, 1, 2_592_000>")]
    pub attempt_seconds_max: u32,
    /// How often the progress of a job is published.
    #[serde(default = "number::<_, 1>", deserialize_with = "whole::<_, _, 1, 3600>")]
    pub progress_seconds: u32,
    /// How long jobs may go on when the worker is told to stop, before they are handed back.
    #[serde(default = "number::<_, 60>", deserialize_with = "whole::<_, _, 0, 86400>")]
    pub drain_seconds_max: u32,
    /// Where it is told over HTTP how it stands with the worker; nowhere if absent.
    #[serde(default, deserialize_with = "some_address")]
    pub health_listen: Option<SocketAddr>,
    /// The topic of oslo.messaging whose calls are taken as jobs; none are if absent.
    #[serde(default, deserialize_with = "some_prefix")]
    pub oslo_topic: Option<String>,
}

/// `[ceph.NAME]`: how a Ceph cluster is reached.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section: [ceph.NAME]")]
pub struct Ceph {
    /// Ceph's own configuration file.
    #[serde(default = "ceph_conf", deserialize_with = "path")]
    pub conf: PathBuf,
    /// The Ceph user, without the leading `client.`.
    #[serde(default = "admin", deserialize_with = "ceph_user")]
    pub user: String,
    /// How long anything that is asked of the cluster may take.
    #[serde(default = "number::<_, 60>", deserialize_with = "whole::<_, _, 1, 3600>")]
    pub operation_seconds_max: u32,
}

/// `[store.NAME]`: a place for backups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// Takes the jobs that name no store.
    pub default: bool,
    /// What it is, with the settings of that kind.
    pub kind: StoreKind,
    /// The availability zone of Cinder's in the names of objects in buckets, which nobody looks for there.
    pub zone: String,
}

/// What a store is, with the settings of its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreKind {
    /// A folder.
    Posix {
        /// The folder.
        path: PathBuf,
        /// How volumes are cut up for it.
        chunking: Chunking,
    },
    /// A folder on a share of an NFS server.
    Nfs {
        /// Where it is.
        share: Share,
        /// How volumes are cut up for it.
        chunking: Chunking,
    },
    /// Buckets of a server that speaks S3.
    S3 {
        /// The server, and what is kept there.
        settings: Box<S3Settings>,
        /// How volumes are cut up for it.
        chunking: Chunking,
    },
    /// Containers of a server that speaks Swift.
    Swift {
        /// The server, and what is kept there.
        settings: Box<SwiftSettings>,
        /// How volumes are cut up for it.
        chunking: Chunking,
    },
    /// Buckets of Google Cloud Storage.
    Gcs {
        /// The server, and what is kept there.
        settings: Box<GcsSettings>,
        /// How volumes are cut up for it.
        chunking: Chunking,
    },
    /// RBD images in a pool.
    #[cfg(feature = "ceph")]
    Rbd {
        /// The cluster's name, of which there is a `[ceph.NAME]`; the only one if absent.
        cluster: Option<String>,
        /// The pool for backups that name no other.
        pool: Container,
        /// How many snapshots of backups a volume may keep; 0 for any number.
        source_snapshots_max: u32,
        /// Whether images keep a journal of all writes.
        journaling: bool,
        /// The size and the number of stripes; those of whole objects if absent.
        stripes: Option<(u64, u64)>,
    },
}

/// How the chunked engine cuts up a volume and packs the pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// How objects are compressed.
    pub compression: Compression,
    /// The level of zstd.
    pub compression_level: i32,
    /// How much of a volume an object holds, before compression. A multiple of `sha_block_bytes`.
    pub object_bytes: u64,
    /// How much of a volume has one digest; an incremental backup stores multiples of it.
    pub sha_block_bytes: u64,
    /// How many of 1,000 blocks of an RBD volume that Ceph calls unchanged are read all the same.
    pub unchanged_check_per_mille: u32,
    /// How many snapshots of backups an RBD volume may keep; 0 for any number.
    pub source_snapshots_max: u32,
}

impl Config {
    /// Loads the configuration: from `path`, else the file that `BACKHAUL_CONFIG` names, else `./backhaul.toml`, else
    /// `/etc/backhaul/backhaul.toml`, with the environment on top.
    ///
    /// Fails if a file that was named cannot be read, and if any setting is unknown, missing or not valid.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let environment = layers::environment()?;
        let file = layers::find(path, &environment);
        Self::load_from(file.as_deref(), &environment)
    }

    /// Loads the configuration from `file`, with the `BACKHAUL_…` variables of `environment` on top.
    ///
    /// Relative paths in either are relative to the folder of the file, or to the current one if there is no file.
    pub fn load_from(file: Option<&Path>, environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let layers = Layers::read(file, environment)?;
        let sections = layers.sections()?;
        check(&sections, &layers)?;
        let Sections { mut broker, mut worker, mut ceph, store } = sections;

        let folder = layers.folder();
        if let Some(Broker { tls, .. }) = &mut broker {
            for file in [&mut tls.ca_file, &mut tls.client_certificate_file, &mut tls.client_key_file] {
                *file = file.take().map(|file| folder.join(file));
            }
        }
        worker.file_roots = worker.file_roots.iter().map(|root| folder.join(root)).collect();
        for cluster in ceph.values_mut() {
            cluster.conf = folder.join(&cluster.conf);
        }
        let mut stores = BTreeMap::new();
        for (name, section) in store {
            let store = section.store(&name, folder, &layers)?;
            stores.insert(name, store);
        }
        Ok(Self { file: layers.file().map(Into::into), broker, worker, ceph, stores })
    }

    /// The broker; fails if none is configured.
    pub fn broker(&self) -> Result<&Broker, ConfigError> {
        let problem = "a broker is needed; write [broker] with url = \"amqp://user:password@host:5672/%2f\"";
        self.broker.as_ref().ok_or_else(|| self.lacks("broker.url".into(), problem.into()))
    }

    /// The store `name`, or the one for jobs that name none; fails if there is no such store.
    pub fn store(&self, name: Option<&StoreName>) -> Result<(&StoreName, &Store), ConfigError> {
        if self.stores.is_empty() {
            let problem = "a store is needed; write a section such as [store.local] \
                           with kind = \"posix\" and path = \"/var/backups/backhaul\"";
            return Err(self.lacks("store".into(), problem.into()));
        }
        let names = || self.stores.keys().map(StoreName::as_str).collect::<Vec<_>>().join(", ");
        match name {
            Some(name) => self.stores.get_key_value(name).ok_or_else(|| {
                self.lacks(format!("store.{name}"), format!("there is no such store; there are: {}", names()))
            }),
            None => self.stores.iter().find(|(_, s)| s.default || self.stores.len() == 1).ok_or_else(|| {
                let problem = format!(
                    "no store is the default: name one of {}, or write default = true at one",
                    names()
                );
                self.lacks("store".into(), problem)
            }),
        }
    }

    fn lacks(&self, setting: String, problem: String) -> ConfigError {
        let origin = self.file.as_ref().map_or(layers::NO_FILE.into(), |file| file.display().to_string());
        ConfigError::Setting { setting, origin, problem }
    }
}

/// The sections as they are written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sections {
    broker: Option<Broker>,
    worker: Worker,
    #[serde(default)]
    ceph: BTreeMap<String, Ceph>,
    #[serde(default)]
    store: BTreeMap<StoreName, StoreSection>,
}

/// A `[store.NAME]` section as it is written, with the settings of all kinds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section: [store.NAME]")]
// Without Ceph the settings of such stores are known, but nobody needs them.
#[cfg_attr(not(feature = "ceph"), expect(dead_code))]
struct StoreSection {
    #[serde(deserialize_with = "kind")]
    kind: Kind,
    #[serde(default)]
    default: bool,
    #[serde(default, deserialize_with = "some_path")]
    path: Option<PathBuf>,
    #[serde(default, deserialize_with = "compression")]
    compression: Compression,
    #[serde(default = "compression_level", deserialize_with = "whole::<_, _, 1, 9>")]
    compression_level: i32,
    #[serde(default = "object_bytes", deserialize_with = "whole::<_, _, 512, 2_147_483_647>")]
    object_bytes: u64,
    #[serde(default = "sha_block_bytes", deserialize_with = "whole::<_, _, 512, 67_108_864>")]
    sha_block_bytes: u64,
    #[serde(default, deserialize_with = "endpoint")]
    endpoint: Option<Url>,
    /// What it is by default depends on the kind.
    #[serde(default, deserialize_with = "region")]
    region: Option<String>,
    #[serde(default = "yes")]
    path_style: bool,
    /// What it is by default depends on the kind.
    #[serde(default, deserialize_with = "bucket")]
    bucket: Option<String>,
    #[serde(default = "yes")]
    create_containers: bool,
    #[serde(default, deserialize_with = "secret")]
    access_key: Option<Secret>,
    #[serde(default, deserialize_with = "secret")]
    secret_key: Option<Secret>,
    #[serde(default, deserialize_with = "some_path")]
    secret_key_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "some_path")]
    sse_c_key_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "some_path")]
    ca_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "proxy")]
    proxy: Option<Secret>,
    #[serde(default = "number::<_, 10>", deserialize_with = "whole::<_, _, 1, 3600>")]
    connect_seconds_max: u32,
    #[serde(default = "number::<_, 60>", deserialize_with = "whole::<_, _, 1, 3600>")]
    idle_seconds_max: u32,
    #[serde(default = "number::<_, 32>", deserialize_with = "whole::<_, _, 1, 1000>")]
    connections_max: u16,
    #[serde(default = "number::<_, 8>", deserialize_with = "whole::<_, _, 0, 100>")]
    retries_max: u16,
    #[serde(default, deserialize_with = "swift_url")]
    auth_url: Option<Url>,
    #[serde(default, deserialize_with = "auth_version")]
    auth_version: AuthVersion,
    #[serde(default, deserialize_with = "text")]
    user: Option<String>,
    #[serde(default, deserialize_with = "text")]
    user_domain: Option<String>,
    #[serde(default, deserialize_with = "text")]
    project: Option<String>,
    #[serde(default, deserialize_with = "text")]
    project_domain: Option<String>,
    #[serde(default, deserialize_with = "text")]
    application_credential: Option<String>,
    #[serde(default, deserialize_with = "secret")]
    password: Option<Secret>,
    #[serde(default, deserialize_with = "some_path")]
    password_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "text")]
    service_type: Option<String>,
    #[serde(default = "public", deserialize_with = "interface")]
    interface: String,
    #[serde(default, deserialize_with = "swift_url")]
    storage_url: Option<Url>,
    #[serde(default = "usual_container", deserialize_with = "container")]
    container: String,
    #[serde(default, deserialize_with = "storage_policy")]
    storage_policy: Option<String>,
    #[serde(default, deserialize_with = "some_path")]
    credentials_file: Option<PathBuf>,
    #[serde(default)]
    anonymous: bool,
    #[serde(default, deserialize_with = "text")]
    location: Option<String>,
    #[serde(default, deserialize_with = "text")]
    storage_class: Option<String>,
    #[serde(default, deserialize_with = "share")]
    share: Option<String>,
    #[serde(default, deserialize_with = "text")]
    mount_options: Option<String>,
    #[serde(default = "mount_point_base", deserialize_with = "path")]
    mount_point_base: PathBuf,
    #[serde(default, deserialize_with = "cluster")]
    cluster: Option<String>,
    #[serde(default, deserialize_with = "pool")]
    pool: Option<Container>,
    #[serde(default = "unchanged_check_per_mille", deserialize_with = "whole::<_, _, 0, 1_000>")]
    unchanged_check_per_mille: u32,
    /// What it is by default depends on the kind.
    #[serde(default, deserialize_with = "some_whole::<_, _, 0, 65_535>")]
    source_snapshots_max: Option<u32>,
    #[serde(default)]
    journaling: bool,
    #[serde(default, deserialize_with = "whole::<_, _, 0, 33_554_432>")]
    stripe_unit_bytes: u64,
    #[serde(default, deserialize_with = "whole::<_, _, 0, 65_535>")]
    stripe_count: u64,
}

impl StoreSection {
    /// Takes the settings of the store's kind.
    fn store(self, name: &StoreName, folder: &Path, layers: &Layers) -> Result<Store, ConfigError> {
        let missing = |key: &str| layers.missing(&format!("store.{name}.{key}"));
        let chunking = Chunking {
            compression: self.compression,
            compression_level: self.compression_level,
            object_bytes: self.object_bytes,
            sha_block_bytes: self.sha_block_bytes,
            unchanged_check_per_mille: self.unchanged_check_per_mille,
            // Only the newest one is of use to the next backup.
            source_snapshots_max: self.source_snapshots_max.unwrap_or(1),
        };
        let secret_from = |secret: Option<Secret>, file: Option<PathBuf>, key: &str| match (secret, file) {
            (Some(secret), _) => Ok(SecretFrom::Setting(secret)),
            (None, Some(file)) => Ok(SecretFrom::File(folder.join(file))),
            (None, None) => Err(missing(key)),
        };
        let http = HttpSettings {
            ca_file: self.ca_file.map(|file| folder.join(file)),
            // Only an operator of Cinder's drivers may be used to that.
            any_certificate: false,
            proxy: self.proxy,
            connect_seconds_max: self.connect_seconds_max,
            idle_seconds_max: self.idle_seconds_max,
            connections_max: self.connections_max,
            retries_max: self.retries_max,
        };
        let kind = match self.kind {
            Kind::Posix => {
                StoreKind::Posix { path: folder.join(self.path.ok_or_else(|| missing("path"))?), chunking }
            }
            Kind::Nfs => {
                let share = match (self.path, self.share) {
                    (Some(path), _) => Share::Mounted(folder.join(path)),
                    (None, Some(share)) => Share::Ours {
                        share,
                        options: self.mount_options,
                        base: folder.join(self.mount_point_base),
                    },
                    (None, None) => return Err(missing("share")),
                };
                StoreKind::Nfs { share, chunking }
            }
            Kind::S3 => {
                let settings = S3Settings {
                    endpoint: self.endpoint.ok_or_else(|| missing("endpoint"))?,
                    region: self.region.unwrap_or_else(usual_region),
                    path_style: self.path_style,
                    bucket: self.bucket.unwrap_or_else(usual_container),
                    create_buckets: self.create_containers,
                    access_key: self.access_key.ok_or_else(|| missing("access_key"))?,
                    secret_key: secret_from(self.secret_key, self.secret_key_file, "secret_key")?,
                    sse_c_key: self.sse_c_key_file.map(|file| SecretFrom::File(folder.join(file))),
                    http,
                };
                StoreKind::S3 { settings: Box::new(settings), chunking }
            }
            Kind::Swift => {
                let auth_url = self.auth_url.ok_or_else(|| missing("auth_url"))?;
                let password = secret_from(self.password, self.password_file, "password")?;
                let user = || self.user.clone().ok_or_else(|| missing("user"));
                let domain = |given: Option<String>| given.unwrap_or_else(|| "Default".into());
                let credentials = match (self.auth_version, self.application_credential) {
                    (AuthVersion::V1, _) => Credentials::V1 { user: user()?, key: password },
                    (AuthVersion::V3, Some(id)) => {
                        Credentials::ApplicationCredential { id, secret: password }
                    }
                    (AuthVersion::V3, None) => Credentials::Password {
                        user: user()?,
                        user_domain: domain(self.user_domain),
                        project: self.project.ok_or_else(|| missing("project"))?,
                        project_domain: domain(self.project_domain),
                        password,
                    },
                };
                let endpoint = match (self.storage_url, self.auth_version) {
                    (Some(url), _) => Endpoint::At(url),
                    (None, AuthVersion::V1) => Endpoint::Told,
                    (None, AuthVersion::V3) => Endpoint::Catalog {
                        service_type: self.service_type.unwrap_or_else(|| "object-store".into()),
                        interface: self.interface,
                        region: self.region,
                    },
                };
                let settings = SwiftSettings {
                    auth_url,
                    credentials,
                    endpoint,
                    container: self.container,
                    create_containers: self.create_containers,
                    storage_policy: self.storage_policy,
                    http,
                };
                StoreKind::Swift { settings: Box::new(settings), chunking }
            }
            Kind::Gcs => {
                let endpoint = self.endpoint.or_else(|| Url::parse(GOOGLE).ok());
                let settings = GcsSettings {
                    endpoint: endpoint.ok_or_else(|| missing("endpoint"))?,
                    credentials_file: self.credentials_file.map(|file| folder.join(file)),
                    bucket: self.bucket.ok_or_else(|| missing("bucket"))?,
                    create_buckets: self.create_containers,
                    project: self.project,
                    location: self.location.unwrap_or_else(|| "US".into()),
                    storage_class: self.storage_class.unwrap_or_else(|| "NEARLINE".into()),
                    http,
                };
                if settings.credentials_file.is_none() && !self.anonymous {
                    return Err(missing("credentials_file"));
                }
                StoreKind::Gcs { settings: Box::new(settings), chunking }
            }
            #[cfg(feature = "ceph")]
            Kind::Rbd => StoreKind::Rbd {
                cluster: self.cluster,
                pool: self.pool.ok_or_else(|| missing("pool"))?,
                source_snapshots_max: self.source_snapshots_max.unwrap_or(0),
                journaling: self.journaling,
                stripes: match (self.stripe_unit_bytes, self.stripe_count) {
                    (0, 0) => None,
                    stripes => Some(stripes),
                },
            },
        };
        Ok(Store { default: self.default, kind, zone: USUAL_ZONE.into() })
    }
}

/// Checks what no setting can tell alone.
fn check(sections: &Sections, layers: &Layers) -> Result<(), ConfigError> {
    if let Some(Broker { url, tls, .. }) = &sections.broker {
        if *tls != Tls::default() && !url.to_string().starts_with("amqps:") {
            let problem =
                "[broker.tls] is set, but the URL is not one of TLS; write amqps:// or remove [broker.tls]";
            return Err(layers.refuse("broker.url", problem.into()));
        }
        let half = match (&tls.client_certificate_file, &tls.client_key_file) {
            (Some(_), None) => Some(("client_certificate_file", "client_key_file")),
            (None, Some(_)) => Some(("client_key_file", "client_certificate_file")),
            _ => None,
        };
        if let Some((alone, other)) = half {
            let problem = format!("it is of no use alone; write {other} too");
            return Err(layers.refuse(&format!("broker.tls.{alone}"), problem));
        }
    }

    for (name, section) in &sections.store {
        check_store(name, section, sections, layers)?;
    }

    let mut defaults = sections.store.iter().filter(|(_, section)| section.default).map(|(name, _)| name);
    if let (Some(one), Some(two)) = (defaults.next(), defaults.next()) {
        let problem = format!("store.{one} is the default already; write default = true at one store only");
        return Err(layers.refuse(&format!("store.{two}.default"), problem));
    }
    Ok(())
}

/// The settings of stores of this kind.
fn settings_of(kind: Kind) -> Vec<&'static str> {
    let settings: &[&[&str]] = match kind {
        Kind::Posix => &[&OF_ALL, &OF_POSIX, &OF_CHUNKED],
        Kind::Nfs => &[&OF_ALL, &OF_NFS, &OF_CHUNKED],
        Kind::S3 => &[&OF_ALL, &OF_S3, &OF_HTTP, &OF_CHUNKED],
        Kind::Swift => &[&OF_ALL, &OF_SWIFT, &OF_HTTP, &OF_CHUNKED],
        Kind::Gcs => &[&OF_ALL, &OF_GCS, &OF_HTTP, &OF_CHUNKED],
        #[cfg(feature = "ceph")]
        Kind::Rbd => &[&OF_ALL, &OF_RBD],
    };
    settings.concat()
}

/// What to say of a setting that stores of this kind have not.
fn unknown_to(kind: Kind) -> String {
    let known = settings_of(kind).join(", ");
    format!("it is unknown to a store of kind \"{kind}\", which has {known}")
}

/// Checks what no setting of a store can tell alone.
fn check_store(
    name: &StoreName,
    section: &StoreSection,
    sections: &Sections,
    layers: &Layers,
) -> Result<(), ConfigError> {
    let setting = |key: &str| format!("store.{name}.{key}");
    let known = settings_of(section.kind);
    let of_stores = SETTINGS.iter().filter_map(|setting| setting.strip_prefix("store.NAME."));
    let mut foreign = of_stores.filter(|key| !known.contains(key));
    if let Some(key) = foreign.find(|key| layers.has(&setting(key))) {
        return Err(layers.refuse(&setting(key), unknown_to(section.kind)));
    }
    match section.kind {
        Kind::Posix => check_chunking(section, setting, sections.worker.memory_bytes_max, layers),
        Kind::Nfs => {
            if section.path.is_some()
                && let Some(key) = OF_NFS[1..].iter().find(|key| layers.has(&setting(key)))
            {
                let problem = "it is of no use with path; remove one of them".into();
                return Err(layers.refuse(&setting(key), problem));
            }
            check_chunking(section, setting, sections.worker.memory_bytes_max, layers)
        }
        Kind::Gcs => {
            if section.anonymous && section.credentials_file.is_some() {
                let problem = "credentials_file is set, too; write only one of them".into();
                return Err(layers.refuse(&setting("anonymous"), problem));
            }
            check_chunking(section, setting, sections.worker.memory_bytes_max, layers)
        }
        Kind::S3 => {
            if section.secret_key.is_some() && section.secret_key_file.is_some() {
                let problem = "secret_key is set, too; write only one of them".into();
                return Err(layers.refuse(&setting("secret_key_file"), problem));
            }
            check_chunking(section, setting, sections.worker.memory_bytes_max, layers)
        }
        Kind::Swift => {
            check_login(section, setting, layers)?;
            check_chunking(section, setting, sections.worker.memory_bytes_max, layers)
        }
        #[cfg(feature = "ceph")]
        Kind::Rbd => check_images(section, setting, &sections.ceph, layers),
    }
}

/// Checks that what is said of a login to Swift goes together.
fn check_login(
    section: &StoreSection,
    setting: impl Fn(&str) -> String,
    layers: &Layers,
) -> Result<(), ConfigError> {
    if section.password.is_some() && section.password_file.is_some() {
        let problem = "password is set, too; write only one of them".into();
        return Err(layers.refuse(&setting("password_file"), problem));
    }
    let of_no_use = |keys: &[&str], with: &str| match keys.iter().find(|key| layers.has(&setting(key))) {
        Some(key) => {
            Err(layers.refuse(&setting(key), format!("it is of no use with {with}; remove one of them")))
        }
        None => Ok(()),
    };
    if section.auth_version == AuthVersion::V1 {
        of_no_use(&OF_USERS[1..], "auth_version = 1")?;
        of_no_use(&["application_credential"], "auth_version = 1")?;
        of_no_use(&OF_CATALOG, "auth_version = 1")?;
    }
    if section.application_credential.is_some() {
        of_no_use(&OF_USERS, "application_credential")?;
    }
    if section.storage_url.is_some() {
        of_no_use(&OF_CATALOG, "storage_url")?;
    }
    Ok(())
}

/// Checks how volumes are to be cut up.
fn check_chunking(
    section: &StoreSection,
    setting: impl Fn(&str) -> String,
    memory: u64,
    layers: &Layers,
) -> Result<(), ConfigError> {
    let (object, block) = (section.object_bytes, section.sha_block_bytes);
    if block % 512 != 0 {
        let problem =
            format!("found {block}; write a multiple of 512, such as {}", block.next_multiple_of(512));
        return Err(layers.refuse(&setting("sha_block_bytes"), problem));
    }
    if object % block != 0 {
        let (key, origin) = (setting("sha_block_bytes"), layers.origin(&setting("sha_block_bytes")));
        let near = (object / block * block).max(block);
        let problem =
            format!("found {object}; write a multiple of {key} ({origin}), which is {block}, such as {near}");
        return Err(layers.refuse(&setting("object_bytes"), problem));
    }
    let needed = 2 * object + MEMORY_BYTES_BASE;
    if memory < needed {
        let (key, origin) = (setting("object_bytes"), layers.origin(&setting("object_bytes")));
        let mut problem = format!(
            "found {memory}; two objects of {key} ({origin}), {object} each, must fit in it beside {MEMORY_BYTES_BASE} \
             bytes for the rest; write at least {needed}"
        );
        let fits = (memory - MEMORY_BYTES_BASE) / 2 / block * block;
        if fits > 0 {
            problem += &format!(", or an object_bytes of at most {fits}");
        }
        return Err(layers.refuse("worker.memory_bytes_max", problem));
    }
    Ok(())
}

/// Checks where images are to be, and how they are to be made.
#[cfg(feature = "ceph")]
fn check_images(
    section: &StoreSection,
    setting: impl Fn(&str) -> String,
    clusters: &BTreeMap<String, Ceph>,
    layers: &Layers,
) -> Result<(), ConfigError> {
    let names = || clusters.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let problem = match &section.cluster {
        _ if clusters.is_empty() => {
            Some("there is no cluster; write a section such as [ceph.main] with conf and user".into())
        }
        Some(name) if !clusters.contains_key(name) => {
            Some(format!("found {name:?}, and there is no [ceph.{name}]; write one of: {}", names()))
        }
        None if clusters.len() > 1 => {
            Some(format!("it is missing, and there are several clusters; write one of: {}", names()))
        }
        _ => None,
    };
    if let Some(problem) = problem {
        return Err(layers.refuse(&setting("cluster"), problem));
    }
    let unit = section.stripe_unit_bytes;
    if unit != 0 && !unit.is_power_of_two() {
        let problem = format!("found {unit}; write a power of two, such as {}", unit.next_power_of_two());
        return Err(layers.refuse(&setting("stripe_unit_bytes"), problem));
    }
    let half = match (unit, section.stripe_count) {
        (1.., 0) => Some(("stripe_unit_bytes", "stripe_count")),
        (0, 1..) => Some(("stripe_count", "stripe_unit_bytes")),
        _ => None,
    };
    match half {
        Some((alone, other)) => {
            let problem = format!("it is of no use alone; write {other} too");
            Err(layers.refuse(&setting(alone), problem))
        }
        None => Ok(()),
    }
}

fn broker_prefix() -> String {
    "backhaul".into()
}

fn attempt_seconds_max() -> u32 {
    24 * 60 * 60
}

fn message_bytes_max() -> usize {
    1 << 20
}

fn memory_bytes_max() -> u64 {
    512 << 20
}

fn compression_level() -> i32 {
    ZSTD_LEVEL
}

fn object_bytes() -> u64 {
    16_777_216
}

fn sha_block_bytes() -> u64 {
    32_768
}

fn yes() -> bool {
    true
}

fn usual_region() -> String {
    "us-east-1".into()
}

fn usual_container() -> String {
    "volumebackups".into()
}

fn mount_point_base() -> PathBuf {
    "/var/lib/backhaul/mounts".into()
}

fn public() -> String {
    "public".into()
}

fn unchanged_check_per_mille() -> u32 {
    1
}

fn ceph_conf() -> PathBuf {
    "/etc/ceph/ceph.conf".into()
}

fn admin() -> String {
    "admin".into()
}
