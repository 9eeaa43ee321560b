//! The store that `cinder.conf` names, in the words of our own configuration.

mod swift;

use std::collections::BTreeMap;
use std::iter;
use std::path::PathBuf;

use tracing::warn;
use url::Url;

use crate::cinder::conf::{self, Conf};
use crate::cinder::export_record::Form;
use crate::config::{Ceph, Chunking, Config, GOOGLE, Store, StoreKind, Worker};
use crate::engine::chunked::{Compression, ZSTD_LEVEL};
use crate::job::{Container, InvalidName, StoreName};
use crate::message::oslo::Context;
use crate::store::{GcsSettings, HttpSettings, S3Settings, Secret, SecretFrom, Share, is_bucket_name};

/// What the cluster of the backups is called here, which no cluster of volumes is: it has a space.
pub const BACKUPS: &str = "the cluster of the backups";
/// What Cinder called the driver for Google Cloud Storage before.
const OLD_GOOGLE: &str = "cinder.backup.drivers.google.GoogleBackupDriver";
/// Cinder's files hold 2 GB, which would have to be held in memory as well. Its reader takes what it finds.
const OBJECT_BYTES_MAX: u64 = 64 << 20;
/// Prefixes of the names of objects have some 110 bytes besides.
const ZONE_BYTES_MAX: usize = 64;
/// What all jobs together may hold of volumes' data.
const MEMORY_BYTES_MAX: u64 = 512 << 20;

/// Why the backups of `cinder.conf` cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver is not known here.
    #[error(
        "backup_driver = {driver}: its backups can be neither made nor read here; write one of {}",
        classes()
    )]
    Driver {
        /// What is written.
        driver: String,
    },
    /// A value cannot be used.
    #[error("{option} cannot be used")]
    Name {
        /// The option.
        option: &'static str,
        /// What is wrong.
        source: InvalidName,
    },
    /// A value cannot be used.
    #[error("{option} = {value}: {problem}")]
    Value {
        /// The option.
        option: &'static str,
        /// What is written.
        value: String,
        /// What is wrong and what to write.
        problem: &'static str,
    },
    /// A value cannot be used, and is not shown, since there may be a password in it.
    #[error("{option}: {problem}")]
    Hidden {
        /// The option.
        option: &'static str,
        /// What is wrong and what to write.
        problem: &'static str,
    },
    /// A value is needed.
    #[error("{option} is not set, and {needs}")]
    Missing {
        /// The option.
        option: &'static str,
        /// What cannot do without it.
        needs: &'static str,
    },
    /// A request does not say where its backups lie.
    #[error("the request {problem}")]
    Request {
        /// What it lacks, and what to write into `cinder.conf` instead.
        problem: String,
    },
}

/// A driver of Cinder's whose backups we make, with its name as the database has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// RBD images.
    Ceph,
    /// Files in a folder.
    Posix,
    /// Files on a share of an NFS server.
    Nfs,
    /// Objects in the buckets of a server that speaks S3.
    S3,
    /// Objects in the containers of Swift.
    Swift,
    /// Objects in the buckets of Google Cloud Storage.
    Gcs,
}

impl Driver {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Ceph, Self::Posix, Self::Nfs, Self::S3, Self::Swift, Self::Gcs];

    /// The driver of this name, of the class or of its module.
    pub fn named(name: &str) -> Result<Self, Error> {
        let is_name =
            |class: &str| class == name || class.rsplit_once('.').is_some_and(|(module, _)| module == name);
        let driver = Self::ALL.into_iter().find(|driver| driver.classes().any(is_name));
        driver.ok_or_else(|| Error::Driver { driver: name.into() })
    }

    /// The name of its class, which the rows of its backups have.
    pub fn class(self) -> &'static str {
        match self {
            Self::Ceph => "cinder.backup.drivers.ceph.CephBackupDriver",
            Self::Posix => "cinder.backup.drivers.posix.PosixBackupDriver",
            Self::Nfs => "cinder.backup.drivers.nfs.NFSBackupDriver",
            Self::S3 => "cinder.backup.drivers.s3.S3BackupDriver",
            Self::Swift => "cinder.backup.drivers.swift.SwiftBackupDriver",
            Self::Gcs => "cinder.backup.drivers.gcs.GoogleBackupDriver",
        }
    }

    /// The names that its class has, or had.
    fn classes(self) -> impl Iterator<Item = &'static str> {
        iter::once(self.class()).chain((self == Self::Gcs).then_some(OLD_GOOGLE))
    }

    /// What its store keeps backups as.
    pub fn form(self, conf: &Conf) -> Result<Form, Error> {
        Ok(match self {
            Self::Ceph => Form::Images { pool: pool(&conf.default)? },
            Self::Posix | Self::Nfs => Form::Files,
            Self::S3 | Self::Swift | Self::Gcs => Form::Buckets,
        })
    }

    /// Whether it made the backups whose rows have this: the class, the module alone, or nothing yet.
    pub fn made(self, service: Option<&str>) -> bool {
        service.is_none_or(|service| self.classes().any(|class| class.starts_with(service)))
    }

    /// Whether its backups lie where each request says: in the account of whoever sends it, or in one that a login gives
    /// at a server that only the request names.
    pub fn asks_each_request(self, conf: &Conf) -> bool {
        let default = &conf.default;
        self == Self::Swift
            && (default.backup_swift_auth == "per_user" || default.backup_swift_auth_url.is_none())
    }
}

/// The names of all drivers.
fn classes() -> String {
    Driver::ALL.map(Driver::class).join(", ")
}

/// Our configuration with the one store of `cinder.conf`, or with none if each request says where it is: then
/// [`store_for`] gives it.
pub fn config(conf: &Conf, driver: Driver) -> Result<Config, Error> {
    let default = &conf.default;
    let stores = match store(default, driver, &Context::default()) {
        // What can be wrong with `cinder.conf` itself was looked at before.
        Err(Error::Request { .. }) if driver.asks_each_request(conf) => BTreeMap::new(),
        store => BTreeMap::from([(name()?, store?)]),
    };
    let unverified = match driver {
        Driver::S3 => !default.backup_s3_verify_ssl,
        Driver::Swift => default.backup_swift_auth_insecure,
        Driver::Ceph | Driver::Posix | Driver::Nfs | Driver::Gcs => false,
    };
    if unverified {
        warn!(
            "certificates of the store are not verified, as cinder.conf says: whoever is in between can read and change backups"
        );
    }
    let ceph = Ceph {
        conf: PathBuf::from(&default.backup_ceph_conf),
        user: default.backup_ceph_user.clone(),
        operation_seconds_max: 60,
    };
    Ok(Config {
        file: None,
        broker: None,
        worker: Worker {
            name: default.host.clone(),
            jobs_max: 1,
            memory_bytes_max: MEMORY_BYTES_MAX,
            cpu_threads_max: std::thread::available_parallelism().map_or(1, Into::into),
            bytes_per_second_max: None,
            job_bytes_per_second_max: None,
            file_roots: Vec::new(),
            attempts_max: 1,
            attempt_seconds_max: 1,
            progress_seconds: 1,
            drain_seconds_max: 60,
            health_listen: None,
            oslo_topic: None,
        },
        ceph: BTreeMap::from([(BACKUPS.to_owned(), ceph)]),
        stores,
    })
}

/// The store for a request with this context, if [`Driver::asks_each_request`].
pub fn store_for(conf: &Conf, driver: Driver, context: &Context) -> Result<(StoreName, Store), Error> {
    Ok((name()?, store(&conf.default, driver, context)?))
}

fn name() -> Result<StoreName, Error> {
    "cinder".parse().map_err(|source| Error::Name { option: "backup_driver", source })
}

/// The store. What a request must say for it is looked at last.
fn store(default: &conf::Default, driver: Driver, context: &Context) -> Result<Store, Error> {
    let zone = match driver {
        Driver::Ceph | Driver::Posix | Driver::Nfs => String::new(),
        Driver::S3 | Driver::Swift | Driver::Gcs => zone(default)?,
    };
    let kind = match driver {
        Driver::Ceph => StoreKind::Rbd {
            cluster: Some(BACKUPS.into()),
            pool: pool(default)?,
            source_snapshots_max: default.backup_ceph_max_snapshots.try_into().unwrap_or(u32::MAX),
            journaling: default.backup_ceph_image_journals,
            stripes: Some((default.backup_ceph_stripe_unit, default.backup_ceph_stripe_count))
                .filter(|(unit, count)| *unit > 0 && *count > 0),
        },
        Driver::Posix => {
            StoreKind::Posix { path: PathBuf::from(&default.backup_posix_path), chunking: files(default)? }
        }
        Driver::Nfs => StoreKind::Nfs { share: share(default)?, chunking: files(default)? },
        Driver::S3 => s3(default)?,
        Driver::Swift => swift::store(default, context)?,
        Driver::Gcs => gcs(default)?,
    };
    Ok(Store { default: true, kind, zone })
}

fn pool(default: &conf::Default) -> Result<Container, Error> {
    default.backup_ceph_pool.parse().map_err(|source| Error::Name { option: "backup_ceph_pool", source })
}

fn share(default: &conf::Default) -> Result<Share, Error> {
    let option = "backup_share";
    let share = needed(option, default.backup_share.as_deref(), "the nfs driver needs it")?;
    let fits = share.split_once(":/").is_some_and(|(host, _)| !host.is_empty() && !host.starts_with('-'));
    if !fits || share.chars().any(char::is_control) {
        let problem = "write a share such as nfs.example.org:/backups or [2001:db8::1]:/backups";
        return Err(Error::Value { option, value: share.into(), problem });
    }
    Ok(Share::Ours {
        share: share.into(),
        options: default.backup_mount_options.clone().filter(|options| !options.is_empty()),
        base: PathBuf::from(&default.backup_mount_point_base),
    })
}

fn s3(default: &conf::Default) -> Result<StoreKind, Error> {
    const NEEDS: &str = "the s3 driver needs it";
    let option = "backup_s3_endpoint_url";
    let endpoint = url(option, needed(option, default.backup_s3_endpoint_url.as_deref(), NEEDS)?)?;
    let secret = |option, secret: &Option<conf::Secret>| {
        needed(option, secret.as_ref().map(conf::Secret::reveal), NEEDS).map(|text| Secret::new(text.into()))
    };
    let (option, seconds) = ("backup_s3_timeout", default.backup_s3_timeout);
    if !(seconds > 0.0 && seconds <= 3600.0) {
        let problem = "write a number of seconds above 0 and up to 3600";
        return Err(Error::Value { option, value: seconds.to_string(), problem });
    }
    let seconds = seconds.ceil() as u32;
    let proxy = match endpoint.scheme() {
        "https" => proxy("backup_s3_https_proxy", &default.backup_s3_https_proxy)?,
        _ => proxy("backup_s3_http_proxy", &default.backup_s3_http_proxy)?,
    };
    let option = "backup_s3_max_pool_connections";
    let connections_max = match default.backup_s3_max_pool_connections {
        0 => return Err(Error::Value { option, value: "0".into(), problem: "write at least 1" }),
        count => some(count),
    };
    let settings = S3Settings {
        region: region(&endpoint),
        endpoint,
        // As Cinder's client does it wherever it is given a URL.
        path_style: true,
        bucket: bucket("backup_s3_store_bucket", &default.backup_s3_store_bucket)?,
        create_buckets: default.backup_create_containers,
        access_key: secret("backup_s3_store_access_key", &default.backup_s3_store_access_key)?,
        secret_key: SecretFrom::Setting(secret(
            "backup_s3_store_secret_key",
            &default.backup_s3_store_secret_key,
        )?),
        sse_c_key: sse_c_key(default)?,
        http: HttpSettings {
            ca_file: file(&default.backup_s3_ca_cert_file),
            any_certificate: !default.backup_s3_verify_ssl,
            proxy,
            connect_seconds_max: seconds,
            idle_seconds_max: seconds,
            connections_max,
            retries_max: some(default.backup_s3_retry_max_attempts),
        },
    };
    let chunking = chunking(
        default,
        ("backup_s3_object_size", default.backup_s3_object_size),
        ("backup_s3_block_size", default.backup_s3_block_size),
    )?;
    Ok(StoreKind::S3 { settings: Box::new(settings), chunking })
}

/// The region that a server of Amazon's has in its name; the usual one of others, which do not look at it.
fn region(endpoint: &Url) -> String {
    let of_amazon = endpoint.host_str().and_then(|host| host.strip_suffix(".amazonaws.com"));
    let region = of_amazon.and_then(|host| host.strip_prefix("s3."));
    let region = region.map(|region| region.strip_prefix("dualstack.").unwrap_or(region));
    region.filter(|region| !region.contains('.')).unwrap_or("us-east-1").into()
}

/// The key that all objects are encrypted with, if Cinder's driver would encrypt any.
fn sse_c_key(default: &conf::Default) -> Result<Option<SecretFrom>, Error> {
    let key = default.backup_s3_sse_customer_key.as_ref().map(conf::Secret::reveal);
    let option = "backup_s3_sse_customer_algorithm";
    let algorithm = default.backup_s3_sse_customer_algorithm.as_deref();
    match (algorithm.filter(|text| !text.is_empty()), key.filter(|text| !text.is_empty())) {
        (None, None) => Ok(None),
        (Some("AES256"), Some(key)) => Ok(Some(SecretFrom::Setting(Secret::new(key.into())))),
        (Some(other), Some(_)) => {
            let problem = "write AES256, which is the only one that there is";
            Err(Error::Value { option, value: other.into(), problem })
        }
        _ => {
            warn!(
                "objects are not encrypted: write both backup_s3_sse_customer_algorithm and backup_s3_sse_customer_key"
            );
            Ok(None)
        }
    }
}

fn gcs(default: &conf::Default) -> Result<StoreKind, Error> {
    const NEEDS: &str = "the gcs driver needs it";
    let option = "backup_gcs_bucket";
    let bucket = bucket(option, needed(option, default.backup_gcs_bucket.as_deref(), NEEDS)?)?;
    let credentials_file =
        needed("backup_gcs_credential_file", default.backup_gcs_credential_file.as_deref(), NEEDS)?;
    let project = needed("backup_gcs_project_id", default.backup_gcs_project_id.as_deref(), NEEDS)?;
    let proxy_url = default.backup_gcs_proxy_url.as_ref().map_or("", conf::Secret::reveal);
    let settings = GcsSettings {
        endpoint: url(option, GOOGLE)?,
        credentials_file: Some(credentials_file.into()),
        bucket,
        create_buckets: default.backup_create_containers,
        project: Some(project.into()),
        location: default.backup_gcs_bucket_location.clone(),
        storage_class: default.backup_gcs_storage_class.clone(),
        http: HttpSettings {
            proxy: proxy("backup_gcs_proxy_url", proxy_url)?,
            ..usual_http(default.backup_gcs_num_retries)
        },
    };
    let chunking = chunking(
        default,
        ("backup_gcs_object_size", default.backup_gcs_object_size),
        ("backup_gcs_block_size", default.backup_gcs_block_size),
    )?;
    Ok(StoreKind::Gcs { settings: Box::new(settings), chunking })
}

/// An option that must be set.
pub(super) fn needed<'a>(
    option: &'static str,
    value: Option<&'a str>,
    needs: &'static str,
) -> Result<&'a str, Error> {
    value.filter(|value| !value.is_empty()).ok_or(Error::Missing { option, needs })
}

/// A URL of HTTP with nothing before its host and behind its path.
pub(super) fn url(option: &'static str, text: &str) -> Result<Url, Error> {
    let problem = "write a URL without a user, such as https://storage.example.org:8080";
    // What stands there may be a password.
    if text.contains('@') {
        return Err(Error::Hidden { option, problem });
    }
    let bare = |url: &Url| {
        ["http", "https"].contains(&url.scheme()) && url.query().is_none() && url.fragment().is_none()
    };
    let url = Url::parse(text).ok().filter(bare);
    url.ok_or_else(|| Error::Value { option, value: text.into(), problem })
}

/// The URL of a proxy, or nothing. As with Cinder's client it may be a host and a port alone.
fn proxy(option: &'static str, text: &str) -> Result<Option<Secret>, Error> {
    let whole = match text {
        "" => return Ok(None),
        text if text.contains("://") => text.to_owned(),
        text => format!("http://{}", text.trim_start_matches('/')),
    };
    match Url::parse(&whole) {
        Ok(url) if ["http", "https"].contains(&url.scheme()) && url.has_host() => {
            Ok(Some(Secret::new(whole)))
        }
        _ => Err(Error::Hidden { option, problem: "write the URL of a proxy, such as http://proxy:3128" }),
    }
}

fn bucket(option: &'static str, name: &str) -> Result<String, Error> {
    if is_bucket_name(name) {
        return Ok(name.into());
    }
    let problem = "write the name of a bucket: 3 to 63 of a-z, 0-9, '.', '-' and, for Google, '_'";
    Err(Error::Value { option, value: name.into(), problem })
}

/// The zone in the names of objects.
fn zone(default: &conf::Default) -> Result<String, Error> {
    let zone = &default.storage_availability_zone;
    let odd = |c: char| c.is_control() || "/\\".contains(c);
    if zone.is_empty() || zone.len() > ZONE_BYTES_MAX || zone.contains(odd) {
        let problem = "write 1 to 64 bytes, without slashes and backslashes";
        return Err(Error::Value { option: "storage_availability_zone", value: zone.clone(), problem });
    }
    Ok(zone.clone())
}

fn file(path: &Option<String>) -> Option<PathBuf> {
    path.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// A number that is of no more use than the largest one.
fn some(number: u64) -> u16 {
    number.try_into().unwrap_or(u16::MAX)
}

/// How servers are reached of which Cinder says no more than how often to try.
fn usual_http(retries: u64) -> HttpSettings {
    HttpSettings { retries_max: some(retries), ..HttpSettings::default() }
}

/// How volumes are cut up into files.
fn files(default: &conf::Default) -> Result<Chunking, Error> {
    chunking(
        default,
        ("backup_file_size", default.backup_file_size),
        ("backup_sha_block_size_bytes", default.backup_sha_block_size_bytes),
    )
}

/// How volumes are cut up, by the options for objects and for blocks.
fn chunking(
    default: &conf::Default,
    object: (&'static str, u64),
    block: (&'static str, u64),
) -> Result<Chunking, Error> {
    let wrong = |(option, bytes): (&'static str, u64), problem| {
        Err(Error::Value { option, value: bytes.to_string(), problem })
    };
    let (object_bytes, block_bytes) = (object.1, block.1);
    if !(512..=OBJECT_BYTES_MAX).contains(&block_bytes) || block_bytes % 512 != 0 {
        return wrong(block, "write a multiple of 512 up to 67108864, such as 32768");
    }
    if object_bytes < block_bytes || object_bytes % block_bytes != 0 {
        return wrong(object, "write a multiple of the size of blocks, such as 52428800");
    }
    let compression = match default.backup_compression_algorithm.to_lowercase().as_str() {
        "none" | "off" | "no" => Compression::None,
        "zlib" | "gzip" => Compression::Zlib,
        "bz2" | "bzip2" => Compression::Bz2,
        "zstd" => Compression::Zstd,
        other => {
            let problem = "write one of none, off, no, zlib, gzip, bz2, bzip2 and zstd";
            return Err(Error::Value {
                option: "backup_compression_algorithm",
                value: other.into(),
                problem,
            });
        }
    };
    Ok(Chunking {
        compression,
        compression_level: ZSTD_LEVEL,
        object_bytes: object_bytes.min(OBJECT_BYTES_MAX / block_bytes * block_bytes),
        sha_block_bytes: block_bytes,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::cinder::conf::{Settings, Source};
    use crate::store::{Credentials, Endpoint, SwiftSettings};

    /// What a file says of these options, each on a line of `text`.
    fn conf(text: &str) -> Conf {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cinder.conf");
        let lines: String = text.lines().map(|line| format!("{}\n", line.trim())).collect();
        std::fs::write(&path, format!("[DEFAULT]\n{lines}")).unwrap();
        Conf::new(&Settings::read(&[Source::File(path)]).unwrap()).unwrap()
    }

    fn of(driver: &str, text: &str) -> (Conf, Driver) {
        let conf = conf(&format!("backup_driver = cinder.backup.drivers.{driver}\n{text}"));
        let driver = Driver::named(&conf.default.backup_driver).unwrap();
        (conf, driver)
    }

    /// The store that a worker has from its start on.
    fn store_at_start(driver: &str, text: &str) -> Store {
        let (conf, driver) = of(driver, text);
        assert!(!driver.asks_each_request(&conf));
        config(&conf, driver).unwrap().stores.into_values().next().unwrap()
    }

    /// A context of a user, with the catalog as the API passes it on.
    fn user() -> Context {
        let mut context = Context::default();
        let endpoint = |region: &str, host: &str, path: &str| {
            json!({
                "region": region,
                "publicURL": format!("http://{host}{path}"),
                "internalURL": format!("http://internal-{host}{path}"),
            })
        };
        let catalog = json!([
            { "type": "identity", "name": "keystone", "endpoints": [endpoint("one", "keystone:5000", "/v3")] },
            { "type": "object-store", "name": "swift", "endpoints": [
                endpoint("one", "swift-1", "/v1/AUTH_p1"),
                endpoint("two", "swift-2", "/v1/AUTH_p1"),
            ]},
        ]);
        context.set("service_catalog", catalog);
        context.set("auth_token", json!("a token"));
        context.set("project_id", json!("p1"));
        context
    }

    fn secret(text: &str) -> Secret {
        Secret::new(text.into())
    }

    fn http(url: &str) -> Url {
        Url::parse(url).unwrap()
    }

    /// What Cinder does with volumes where nothing is said.
    const USUAL: Chunking = Chunking {
        compression: Compression::Zlib,
        compression_level: 3,
        object_bytes: 52_428_800,
        sha_block_bytes: 32_768,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    };

    #[test]
    fn what_is_said_of_s3_is_obeyed_and_the_rest_is_as_in_cinder() {
        const NEEDED: &str = "backup_s3_endpoint_url = http://s3:7480
                              backup_s3_store_access_key = me
                              backup_s3_store_secret_key = hush";
        let settings = S3Settings {
            endpoint: http("http://s3:7480"),
            region: "us-east-1".into(),
            path_style: true,
            bucket: "volumebackups".into(),
            create_buckets: true,
            access_key: secret("me"),
            secret_key: SecretFrom::Setting(secret("hush")),
            sse_c_key: None,
            http: HttpSettings {
                ca_file: None,
                any_certificate: false,
                proxy: None,
                connect_seconds_max: 60,
                idle_seconds_max: 60,
                connections_max: 10,
                retries_max: 4,
            },
        };
        let (class, usual) = ("s3.S3BackupDriver", settings.clone());
        let expected = StoreKind::S3 { settings: Box::new(settings), chunking: USUAL };
        let store = store_at_start(class, NEEDED);
        assert_eq!((store.kind, store.zone.as_str()), (expected, "nova"));

        let all = "backup_s3_endpoint_url = https://s3.eu-west-1.amazonaws.com
                   backup_s3_store_bucket = ours
                   backup_create_containers = false
                   backup_s3_object_size = 1048576
                   backup_s3_block_size = 65536
                   backup_compression_algorithm = ZSTD
                   backup_s3_http_proxy = http://not-this:1
                   backup_s3_https_proxy = proxy:3128
                   backup_s3_timeout = 2.5
                   backup_s3_max_pool_connections = 100000
                   backup_s3_retry_max_attempts = 0
                   backup_s3_ca_cert_file = /etc/ca.pem
                   backup_s3_verify_ssl = false
                   backup_s3_sse_customer_algorithm = AES256
                   backup_s3_sse_customer_key = 0123456789abcdef0123456789abcdef
                   storage_availability_zone = west";
        let settings = S3Settings {
            endpoint: http("https://s3.eu-west-1.amazonaws.com"),
            region: "eu-west-1".into(),
            bucket: "ours".into(),
            create_buckets: false,
            sse_c_key: Some(SecretFrom::Setting(secret("0123456789abcdef0123456789abcdef"))),
            http: HttpSettings {
                ca_file: Some("/etc/ca.pem".into()),
                any_certificate: true,
                proxy: Some(secret("http://proxy:3128")),
                connect_seconds_max: 3,
                idle_seconds_max: 3,
                connections_max: u16::MAX,
                retries_max: 0,
            },
            ..usual
        };
        let chunking = Chunking {
            compression: Compression::Zstd,
            object_bytes: 1 << 20,
            sha_block_bytes: 64 << 10,
            ..USUAL
        };
        let store = store_at_start(class, &format!("{NEEDED}\n{all}"));
        let expected = StoreKind::S3 { settings: Box::new(settings), chunking };
        assert_eq!((store.kind, store.zone.as_str()), (expected, "west"));
    }

    #[test]
    fn what_is_said_of_google_is_obeyed_and_the_rest_is_as_in_cinder() {
        const NEEDED: &str = "backup_gcs_bucket = ours
                              backup_gcs_credential_file = /etc/cinder/key.json
                              backup_gcs_project_id = p1";
        let settings = GcsSettings {
            endpoint: http(GOOGLE),
            credentials_file: Some("/etc/cinder/key.json".into()),
            bucket: "ours".into(),
            create_buckets: true,
            project: Some("p1".into()),
            location: "US".into(),
            storage_class: "NEARLINE".into(),
            http: usual_http(3),
        };
        let (class, usual) = ("gcs.GoogleBackupDriver", settings.clone());
        let expected = StoreKind::Gcs { settings: Box::new(settings), chunking: USUAL };
        assert_eq!(store_at_start(class, NEEDED).kind, expected);

        let all = "backup_gcs_object_size = 1048576
                   backup_gcs_block_size = 512
                   backup_gcs_num_retries = 7
                   backup_gcs_bucket_location = EU
                   backup_gcs_storage_class = STANDARD
                   backup_gcs_proxy_url = http://a:b@proxy:3128
                   backup_compression_algorithm = off";
        let settings = GcsSettings {
            location: "EU".into(),
            storage_class: "STANDARD".into(),
            http: HttpSettings { proxy: Some(secret("http://a:b@proxy:3128")), ..usual_http(7) },
            ..usual
        };
        let chunking =
            Chunking { compression: Compression::None, object_bytes: 1 << 20, sha_block_bytes: 512, ..USUAL };
        let expected = StoreKind::Gcs { settings: Box::new(settings), chunking };
        // The module that it was in before.
        let store = store_at_start("google.GoogleBackupDriver", &format!("{NEEDED}\n{all}"));
        assert_eq!(store.kind, expected);
    }

    #[test]
    fn what_is_said_of_a_share_is_obeyed_and_the_rest_is_as_in_cinder() {
        let class = "nfs.NFSBackupDriver";
        // Cinder's files of 2 GB, as far as they are made.
        let chunking = Chunking { object_bytes: 64 << 20, ..USUAL };
        let share = Share::Ours {
            share: "nfs:/backups".into(),
            options: None,
            base: "/var/lib/cinder/backup_mount".into(),
        };
        let expected = StoreKind::Nfs { share, chunking };
        assert_eq!(store_at_start(class, "backup_share = nfs:/backups").kind, expected);

        let share = Share::Ours {
            share: "[2001:db8::1]:/backups".into(),
            options: Some("vers=4.1,soft".into()),
            base: "/mnt".into(),
        };
        let chunking = Chunking { object_bytes: 1 << 20, sha_block_bytes: 1024, ..USUAL };
        let all = "backup_share = [2001:db8::1]:/backups
                   backup_mount_options = vers=4.1,soft
                   backup_mount_point_base = /mnt
                   backup_file_size = 1048576
                   backup_sha_block_size_bytes = 1024";
        assert_eq!(store_at_start(class, all).kind, StoreKind::Nfs { share, chunking });
    }

    fn swift_settings(
        auth_url: &str,
        credentials: Credentials,
        endpoint: Endpoint,
        http: HttpSettings,
    ) -> SwiftSettings {
        SwiftSettings {
            auth_url: Url::parse(auth_url).unwrap(),
            credentials,
            endpoint,
            container: "volumebackups".into(),
            create_containers: true,
            storage_policy: None,
            http,
        }
    }

    fn keystone(user: &str, project: &str, domains: [&str; 2]) -> (Credentials, Endpoint) {
        let credentials = Credentials::Password {
            user: user.into(),
            user_domain: domains[0].into(),
            project: project.into(),
            project_domain: domains[1].into(),
            password: SecretFrom::Setting(secret("hush")),
        };
        let (service_type, interface) = ("object-store".into(), "public".into());
        (credentials, Endpoint::Catalog { service_type, interface, region: None })
    }

    #[test]
    fn the_one_user_of_swift_logs_in_as_cinders_does() {
        const NEEDED: &str = "backup_swift_auth = single_user
                              backup_swift_auth_url = http://swift/auth/v1.0
                              backup_swift_user = ops:me
                              backup_swift_key = hush";
        let swift = |text: &str| {
            let text = format!("{NEEDED}\n{text}");
            match store_at_start("swift.SwiftBackupDriver", &text).kind {
                StoreKind::Swift { settings, chunking } => (*settings, chunking),
                other => panic!("{other:?}"),
            }
        };
        let v1 = Credentials::V1 { user: "ops:me".into(), key: SecretFrom::Setting(secret("hush")) };
        let expected = swift_settings("http://swift/auth/v1.0", v1.clone(), Endpoint::Told, usual_http(3));
        assert_eq!(swift(""), (expected, USUAL));

        let all = "backup_swift_auth_version = 1.0
                   backup_swift_container = ours
                   backup_create_containers = no
                   backup_swift_create_storage_policy = gold
                   backup_swift_object_size = 1048576
                   backup_swift_block_size = 4096
                   backup_swift_retry_attempts = 5
                   backup_swift_ca_cert_file = /etc/ca.pem
                   backup_swift_auth_insecure = true
                   backup_swift_url = http://elsewhere/v1/AUTH_
                   backup_swift_region_name = here";
        let expected = SwiftSettings {
            container: "ours".into(),
            create_containers: false,
            storage_policy: Some("gold".into()),
            http: HttpSettings {
                ca_file: Some("/etc/ca.pem".into()),
                any_certificate: true,
                ..usual_http(5)
            },
            ..swift_settings("http://swift/auth/v1.0", v1, Endpoint::Told, usual_http(5))
        };
        let chunking = Chunking { object_bytes: 1 << 20, sha_block_bytes: 4096, ..USUAL };
        assert_eq!(swift(all), (expected, chunking));

        for (text, expected) in [
            ("", keystone("me", "ops", ["Default"; 2])),
            ("backup_swift_tenant = backups", keystone("ops:me", "backups", ["Default"; 2])),
            (
                "backup_swift_user = me
                 backup_swift_project = backups
                 backup_swift_tenant = not-this
                 backup_swift_user_domain = people
                 backup_swift_project_domain = projects",
                keystone("me", "backups", ["people", "projects"]),
            ),
        ] {
            let (credentials, endpoint) = expected;
            let auth_url = "http://keystone:5000/v3";
            let text = format!("backup_swift_auth_version = 3\nbackup_swift_auth_url = {auth_url}\n{text}");
            let expected = swift_settings(auth_url, credentials, endpoint, usual_http(3));
            assert_eq!(swift(&text).0, expected, "{text}");
        }
    }

    #[rstest]
    #[case("", "http://swift-1/v1/AUTH_p1")]
    #[case("backup_swift_region_name = two", "http://swift-2/v1/AUTH_p1")]
    // As Cinder has it.
    #[case("backup_swift_region_name = three", "http://swift-1/v1/AUTH_p1")]
    #[case("swift_catalog_info = object-store:any:internalURL", "http://internal-swift-1/v1/AUTH_p1")]
    #[case("backup_swift_url = https://swift.example.org/v1/AUTH_", "https://swift.example.org/v1/AUTH_p1")]
    fn the_account_of_a_user_is_found_as_cinder_finds_it(#[case] text: &str, #[case] account: &str) {
        let (conf, driver) = of("swift.SwiftBackupDriver", text);
        assert!(driver.asks_each_request(&conf));
        assert_eq!(config(&conf, driver).unwrap().stores, BTreeMap::new());

        let (_, store) = store_for(&conf, driver, &user()).unwrap();

        let token = Credentials::Token(secret("a token"));
        let expected = swift_settings(account, token, Endpoint::At(http(account)), usual_http(3));
        assert_eq!(store.kind, StoreKind::Swift { settings: Box::new(expected), chunking: USUAL });
    }

    #[test]
    fn where_to_log_in_is_found_in_the_catalog_of_a_request() {
        let text = "backup_swift_auth = single_user
                    backup_swift_auth_version = 3
                    backup_swift_user = me
                    backup_swift_key = hush
                    backup_swift_project = backups";
        let (conf, driver) = of("swift.SwiftBackupDriver", text);
        assert_eq!(config(&conf, driver).unwrap().stores, BTreeMap::new());

        let (_, store) = store_for(&conf, driver, &user()).unwrap();

        let (credentials, endpoint) = keystone("me", "backups", ["Default"; 2]);
        let expected = swift_settings("http://keystone:5000/v3", credentials, endpoint, usual_http(3));
        assert_eq!(store.kind, StoreKind::Swift { settings: Box::new(expected), chunking: USUAL });
    }

    #[rstest]
    #[case("service_catalog", json!([]), "the request has no publicURL of object-store (swift_catalog_info) in its catalog: \
        write backup_swift_url")]
    #[case("service_catalog", json!("odd"), "the request has no publicURL of object-store (swift_catalog_info) in its \
        catalog: write backup_swift_url")]
    #[case("auth_token", json!(null), "the request has no token of its user, who must send it again; or write \
        backup_swift_auth = single_user")]
    fn a_request_that_does_not_say_where_its_account_is_is_told_what_it_lacks(
        #[case] lacks: &str,
        #[case] value: Value,
        #[case] expected: &str,
    ) {
        let (conf, driver) = of("swift.SwiftBackupDriver", "");
        let mut context = user();
        context.set(lacks, value);
        assert_eq!(store_for(&conf, driver, &context).unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_project_cannot_lead_to_another_account() {
        let (conf, driver) = of("swift.SwiftBackupDriver", "backup_swift_url = http://swift/v1/AUTH_");
        for id in ["", "p1/../AUTH_p2", "p1?x", "p1#x", "p1%2f"] {
            let mut context = user();
            context.set("project_id", json!(id));
            let error = store_for(&conf, driver, &context).unwrap_err();
            assert_eq!(error.to_string(), "the request has no id of its project", "{id}");
        }
    }

    #[rstest]
    #[case("nfs", "", "backup_share is not set, and the nfs driver needs it")]
    #[case(
        "nfs",
        "backup_share = /folder",
        "backup_share = /folder: write a share such as nfs.example.org:/backups or \
        [2001:db8::1]:/backups"
    )]
    #[case(
        "nfs",
        "backup_share = a:/b\nbackup_file_size = 1000",
        "backup_file_size = 1000: write a multiple of the size of \
        blocks, such as 52428800"
    )]
    #[case("s3", "", "backup_s3_endpoint_url is not set, and the s3 driver needs it")]
    #[case(
        "s3",
        "backup_s3_endpoint_url = s3.example.org",
        "backup_s3_endpoint_url = s3.example.org: write a URL without a \
        user, such as https://storage.example.org:8080"
    )]
    #[case(
        "s3",
        "backup_s3_endpoint_url = http://me:hush@s3",
        "backup_s3_endpoint_url: write a URL without a user, such as \
        https://storage.example.org:8080"
    )]
    #[case(
        "s3",
        "backup_s3_endpoint_url = http://s3",
        "backup_s3_store_access_key is not set, and the s3 driver needs it"
    )]
    #[case("s3", "!", "backup_s3_store_secret_key is not set, and the s3 driver needs it")]
    #[case(
        "s3",
        "!\nbackup_s3_store_bucket = No",
        "backup_s3_store_bucket = No: write the name of a bucket: 3 to 63 of a-z, \
        0-9, '.', '-' and, for Google, '_'"
    )]
    #[case(
        "s3",
        "!\nbackup_s3_timeout = 0",
        "backup_s3_timeout = 0: write a number of seconds above 0 and up to 3600"
    )]
    #[case(
        "s3",
        "!\nbackup_s3_timeout = nan",
        "backup_s3_timeout = NaN: write a number of seconds above 0 and up to 3600"
    )]
    #[case(
        "s3",
        "!\nbackup_s3_max_pool_connections = 0",
        "backup_s3_max_pool_connections = 0: write at least 1"
    )]
    #[case(
        "s3",
        "!\nbackup_s3_http_proxy = socks://me:hush@proxy",
        "backup_s3_http_proxy: write the URL of a proxy, such as \
        http://proxy:3128"
    )]
    #[case(
        "s3",
        "!\nbackup_s3_store_secret_key = hush\nbackup_s3_block_size = 100",
        "backup_s3_block_size = 100: write a \
        multiple of 512 up to 67108864, such as 32768"
    )]
    #[case(
        "s3",
        "!\nbackup_s3_store_secret_key = hush\nbackup_s3_sse_customer_key = x\n\
        backup_s3_sse_customer_algorithm = DES",
        "backup_s3_sse_customer_algorithm = DES: write AES256, which is the only one \
        that there is"
    )]
    #[case(
        "s3",
        "!\nstorage_availability_zone = a/b",
        "storage_availability_zone = a/b: write 1 to 64 bytes, without slashes \
        and backslashes"
    )]
    #[case("gcs", "", "backup_gcs_bucket is not set, and the gcs driver needs it")]
    #[case(
        "gcs",
        "backup_gcs_bucket = ours",
        "backup_gcs_credential_file is not set, and the gcs driver needs it"
    )]
    #[case(
        "gcs",
        "backup_gcs_bucket = ours\nbackup_gcs_credential_file = /key",
        "backup_gcs_project_id is not set, and the \
        gcs driver needs it"
    )]
    #[case(
        "swift",
        "backup_swift_auth = single_user",
        "backup_swift_user is not set, and backup_swift_auth = single_user \
        needs it"
    )]
    #[case(
        "swift",
        "backup_swift_auth = single_user\nbackup_swift_user = me",
        "backup_swift_key is not set, and \
        backup_swift_auth = single_user needs it"
    )]
    #[case(
        "swift",
        "?\nbackup_swift_auth_version = 2",
        "backup_swift_auth_version = 2: write 1, or 3 for Keystone, whose \
        version 2 is gone since 2018"
    )]
    #[case(
        "swift",
        "?\nbackup_swift_auth_version = 3",
        "backup_swift_project is not set, and backup_swift_auth_version = 3 \
        needs it"
    )]
    #[case(
        "swift",
        "backup_swift_container = a/b",
        "backup_swift_container = a/b: write the name of a container, without \
        '/'"
    )]
    #[case("swift", "backup_swift_container = .a", "backup_swift_container cannot be used")]
    #[case(
        "swift",
        "swift_catalog_info = object-store",
        "swift_catalog_info = object-store: write TYPE:NAME:ENDPOINT, such \
        as object-store:swift:publicURL"
    )]
    #[case(
        "swift",
        "backup_swift_url = ftp://swift/AUTH_",
        "backup_swift_url = ftp://swift/AUTH_: write a URL without a \
        user, such as https://storage.example.org:8080"
    )]
    #[case(
        "swift",
        "backup_swift_block_size = 0",
        "backup_swift_block_size = 0: write a multiple of 512 up to 67108864, such \
        as 32768"
    )]
    fn what_cannot_be_used_is_said_at_the_start(
        #[case] module: &str,
        #[case] text: &str,
        #[case] expected: &str,
    ) {
        let text = text
            .replace('!', "backup_s3_endpoint_url = http://s3\nbackup_s3_store_access_key = me")
            .replace('?', "backup_swift_auth = single_user\nbackup_swift_user = me\nbackup_swift_key = hush");
        let (conf, driver) = of(module, &text);
        assert_eq!(config(&conf, driver).unwrap_err().to_string(), expected);
    }

    #[test]
    fn half_of_what_encryption_needs_is_none_as_with_cinder() {
        let text = "backup_s3_endpoint_url = http://s3
                    backup_s3_store_access_key = me
                    backup_s3_store_secret_key = hush
                    backup_s3_sse_customer_key = 0123456789abcdef0123456789abcdef";
        let StoreKind::S3 { settings, .. } = store_at_start("s3", text).kind else { panic!() };
        assert_eq!(settings.sse_c_key, None);
    }

    #[test]
    fn a_driver_knows_its_backups_by_all_names_that_it_had() {
        for driver in Driver::ALL {
            let class = driver.class();
            let (module, _) = class.rsplit_once('.').unwrap();
            for name in [class, module] {
                assert_eq!(Driver::named(name).unwrap(), driver);
                assert!(driver.made(Some(name)), "{name}");
                let others = Driver::ALL.into_iter().filter(|other| *other != driver);
                assert!(others.into_iter().all(|other| !other.made(Some(name))), "{name}");
            }
            assert!(driver.made(None));
        }
        for name in [OLD_GOOGLE, "cinder.backup.drivers.google"] {
            assert_eq!(Driver::named(name).unwrap(), Driver::Gcs);
            assert!(Driver::Gcs.made(Some(name)));
        }
        let error = Driver::named("cinder.backup.drivers.glusterfs.GlusterfsBackupDriver").unwrap_err();
        assert!(error.to_string().contains("cinder.backup.drivers.nfs.NFSBackupDriver"), "{error}");
    }
}
