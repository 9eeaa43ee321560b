//! The store that `cinder.conf` names, in the words of our own configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::cinder::conf::Conf;
use crate::cinder::export_record::Form;
use crate::config::{Ceph, Chunking, Config, Store, StoreKind, Worker};
use crate::engine::chunked::Compression;
use crate::job::{Container, InvalidName, StoreName};

/// What the cluster of the backups is called here, which no cluster of volumes is: it has a space.
pub const BACKUPS: &str = "the cluster of the backups";
/// Cinder's files hold 2 GB, which would have to be held in memory as well. Its reader takes what it finds.
const OBJECT_BYTES_MAX: u64 = 64 << 20;
/// What all jobs together may hold of volumes' data.
const MEMORY_BYTES_MAX: u64 = 512 << 20;

/// Why the backups of `cinder.conf` cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver is not known here.
    #[error(
        "backup_driver = {driver}: its backups can be neither made nor read here; write \
         cinder.backup.drivers.ceph.CephBackupDriver or cinder.backup.drivers.posix.PosixBackupDriver"
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
}

/// A driver of Cinder's whose backups we make, with its name as the database has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// RBD images.
    Ceph,
    /// Files in a folder.
    Posix,
}

impl Driver {
    /// The driver of this name, of the class or of its module.
    pub fn named(name: &str) -> Result<Self, Error> {
        match name {
            "cinder.backup.drivers.ceph.CephBackupDriver" | "cinder.backup.drivers.ceph" => Ok(Self::Ceph),
            "cinder.backup.drivers.posix.PosixBackupDriver" | "cinder.backup.drivers.posix" => {
                Ok(Self::Posix)
            }
            other => Err(Error::Driver { driver: other.into() }),
        }
    }

    /// The name of its class, which the rows of its backups have.
    pub fn class(self) -> &'static str {
        match self {
            Self::Ceph => "cinder.backup.drivers.ceph.CephBackupDriver",
            Self::Posix => "cinder.backup.drivers.posix.PosixBackupDriver",
        }
    }

    /// What its store keeps backups as.
    pub fn form(self, conf: &Conf) -> Result<Form, Error> {
        Ok(match self {
            Self::Ceph => Form::Images { pool: pool(conf)? },
            Self::Posix => Form::Files,
        })
    }

    /// Whether it made the backups whose rows have this: the class, the module alone, or nothing yet.
    pub fn made(self, service: Option<&str>) -> bool {
        service.is_none_or(|service| self.class().starts_with(service))
    }
}

/// Our configuration with the one store of `cinder.conf`.
pub fn config(conf: &Conf, driver: Driver) -> Result<Config, Error> {
    let default = &conf.default;
    let kind = match driver {
        Driver::Ceph => StoreKind::Rbd {
            cluster: Some(BACKUPS.into()),
            pool: pool(conf)?,
            source_snapshots_max: default.backup_ceph_max_snapshots.try_into().unwrap_or(u32::MAX),
            journaling: default.backup_ceph_image_journals,
            stripes: Some((default.backup_ceph_stripe_unit, default.backup_ceph_stripe_count))
                .filter(|(unit, count)| *unit > 0 && *count > 0),
        },
        Driver::Posix => {
            StoreKind::Posix { path: PathBuf::from(&default.backup_posix_path), chunking: chunking(conf)? }
        }
    };
    let name: StoreName =
        "cinder".parse().map_err(|source| Error::Name { option: "backup_driver", source })?;
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
        },
        ceph: BTreeMap::from([(BACKUPS.to_owned(), ceph)]),
        stores: BTreeMap::from([(name, Store { default: true, kind })]),
    })
}

fn pool(conf: &Conf) -> Result<Container, Error> {
    conf.default.backup_ceph_pool.parse().map_err(|source| Error::Name { option: "backup_ceph_pool", source })
}

fn chunking(conf: &Conf) -> Result<Chunking, Error> {
    let default = &conf.default;
    let (file, block) = (default.backup_file_size, default.backup_sha_block_size_bytes);
    if !(512..=OBJECT_BYTES_MAX).contains(&block) || block % 512 != 0 {
        let problem = "write a multiple of 512 up to 67108864, such as 32768";
        return Err(Error::Value {
            option: "backup_sha_block_size_bytes",
            value: block.to_string(),
            problem,
        });
    }
    if file < block || file % block != 0 {
        let problem = "write a multiple of backup_sha_block_size_bytes, such as 1999994880";
        return Err(Error::Value { option: "backup_file_size", value: file.to_string(), problem });
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
        object_bytes: file.min(OBJECT_BYTES_MAX / block * block),
        sha_block_bytes: block,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    })
}
