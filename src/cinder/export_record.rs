//! Cinder's export record: what `cinder backup-export` prints and `cinder backup-import` takes.
//!
//! It names the driver that wrote the backup, and holds, as base64 of JSON, every field of the backup's row in
//! Cinder's database. Of the data it says where it lies; whether it is there is for the engine to find out.

use std::fmt;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::job::{BackupId, Container, Counts, InvalidId, InvalidName, Record, RecordState, VolumeId};

/// An export record is never longer. Cinder's columns allow a few kB; a record of ours must stay below 4 MiB.
pub const EXPORT_BYTES_MAX: usize = 1 << 20;
/// The names of a backup's objects are its prefix and up to 20 bytes more, and file systems allow 255.
const PREFIX_BYTES_MAX: usize = 180;
/// Cinder counts volumes in GiB.
const GIB: u64 = 1 << 30;

/// Where Cinder's drivers lie, and those of them whose backups are folders of files, objects in buckets or RBD images: module
/// and class. Old rows name the module only.
const DRIVERS: &str = "cinder.backup.drivers.";
const FILE_DRIVERS: [(&str, &str); 3] =
    [("posix", "PosixBackupDriver"), ("nfs", "NFSBackupDriver"), ("glusterfs", "GlusterfsBackupDriver")];
const BUCKET_DRIVERS: [(&str, &str); 4] = [
    ("s3", "S3BackupDriver"),
    ("swift", "SwiftBackupDriver"),
    ("gcs", "GoogleBackupDriver"),
    // As it was called before.
    ("google", "GoogleBackupDriver"),
];
const IMAGE_DRIVERS: [(&str, &str); 1] = [("ceph", "CephBackupDriver")];

/// What Cinder refuses to import a backup without. The others have a value that stands for their absence.
const NEEDED_BY_CINDER: [&str; 7] =
    ["display_name", "display_description", "container", "size", "service_metadata", "object_count", "id"];

/// A backup as Cinder exports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRecord {
    /// The driver that wrote the backup.
    pub backup_service: String,
    /// Base64 of the JSON of all fields of the backup.
    pub backup_url: String,
}

/// What the store that a backup is taken into keeps backups as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// Files in folders.
    Files,
    /// Objects in the buckets of S3 or of Google, or in the containers of Swift: the same ones where a server speaks several.
    Buckets,
    /// RBD images.
    Images {
        /// The pool of those that name no container.
        pool: Container,
    },
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Files => "files",
            Self::Buckets => "objects in buckets",
            Self::Images { .. } => "RBD images",
        })
    }
}

/// What Cinder's Ceph driver keeps of a backup of an RBD volume.
#[derive(Deserialize)]
struct Base {
    base: String,
}

/// Why a text is no record of a backup that can be taken in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Longer than any export record.
    #[error("this is no export record of Cinder: none has more than {EXPORT_BYTES_MAX} bytes")]
    TooLarge,
    /// Not the two texts that make an export record.
    #[error("this is no export record of Cinder, which is a JSON object with backup_service and backup_url")]
    NotAnExport(#[source] serde_json::Error),
    /// Written by a driver that nobody here knows.
    #[error(
        "backups of {service:?} cannot be taken in: this version reads those of {DRIVERS}posix.PosixBackupDriver, \
         {DRIVERS}nfs.NFSBackupDriver, {DRIVERS}glusterfs.GlusterfsBackupDriver, {DRIVERS}s3.S3BackupDriver, \
         {DRIVERS}swift.SwiftBackupDriver, {DRIVERS}gcs.GoogleBackupDriver and {DRIVERS}ceph.CephBackupDriver"
    )]
    ForeignDriver {
        /// What the record names.
        service: String,
    },
    /// Written by a driver for stores of another kind.
    #[error(
        "backups of {service:?} cannot be taken into this store, which keeps them as {form}: name the store that they \
         are in with --store"
    )]
    OtherStore {
        /// What the record names.
        service: String,
        /// What the store keeps backups as, for people.
        form: String,
    },
    /// `backup_url` is damaged.
    #[error("the backup_url of the export record is not base64: was all of it copied?")]
    NotBase64(#[source] base64::DecodeError),
    /// `backup_url` is base64 of something else.
    #[error("the backup_url of the export record does not hold the fields of a backup as JSON")]
    NotJson(#[source] serde_json::Error),
    /// A field is not there, or null where that says nothing.
    #[error("the export record has no {0}")]
    MissingField(&'static str),
    /// A field holds something else than a text.
    #[error("the export record's {0} is not a text")]
    NotText(&'static str),
    /// Two places of the record say different things.
    #[error("the export record has backup_service {outer:?}, but the backup in it is of {inner:?}")]
    OtherService {
        /// What stands outside.
        outer: String,
        /// What stands among the fields.
        inner: String,
    },
    /// Not a backup that is whole.
    #[error(
        "the backup was {status:?} in Cinder when it was exported: only one that was available can be taken in"
    )]
    NotAvailable {
        /// Its status.
        status: String,
    },
    /// An id is no UUID.
    #[error("an id in the export record cannot be used")]
    InvalidId(#[from] InvalidId),
    /// The container is not safe to use.
    #[error("the container in the export record cannot be used")]
    UnsafeContainer(#[from] InvalidName),
    /// The prefix of the objects is not safe to use.
    #[error(
        "the export record's service_metadata {prefix:?} cannot be the prefix of the names of objects: it must have 1 to \
         {PREFIX_BYTES_MAX} bytes, no part that is empty or begins with a dot, no backslashes and control characters, and \
         no slashes unless it is of objects in buckets"
    )]
    UnsafePrefix {
        /// What the record says.
        prefix: String,
    },
    /// The image is none of backups of this volume.
    #[error(
        "the export record's service_metadata {text:?} cannot be used: it must be null, or \
         {{\"base\": \"volume-{volume_id}.backup.ID\"}} with base or the id of a backup as ID"
    )]
    UnsafeImage {
        /// What the record says.
        text: String,
        /// The volume.
        volume_id: VolumeId,
    },
    /// No backup is as old as its time says.
    #[error("the export record's created_at {text:?} is longer ago than any backup")]
    TooOld {
        /// What it says.
        text: String,
    },
    /// The time of the backup is no time.
    #[error("the export record's created_at {text:?} is no time such as 2026-11-21T11:58:49Z")]
    InvalidTime {
        /// What the record says.
        text: String,
        /// What is wrong with it.
        source: jiff::Error,
    },
}

/// Writes the export record of a backup, as a text for `cinder backup-import`. The backup must be whole: Cinder takes
/// it as available.
pub fn export(record: &Record) -> String {
    let ExportRecord { backup_service, backup_url } = encode(record);
    format!("{:#}", json!({ "backup_service": backup_service, "backup_url": backup_url }))
}

/// Reads an export record of a backup that lies in a store of this form. The volume's exact size, which Cinder does not
/// keep there, is left 0: the engine finds it where the data is.
pub fn import(text: &[u8], form: &Form) -> Result<Record, Error> {
    if text.len() > EXPORT_BYTES_MAX {
        return Err(Error::TooLarge);
    }
    decode(serde_json::from_slice(text).map_err(Error::NotAnExport)?, form)
}

/// Makes the export record of a backup that is whole.
pub fn encode(record: &Record) -> ExportRecord {
    let created_at =
        Timestamp::from_second(record.created_at.as_second()).unwrap_or(record.created_at).to_string();
    let own = json!({
        "id": record.backup_id,
        "volume_id": record.volume_id,
        "parent_id": record.parent_id,
        "service": record.service,
        // Cinder keeps none of some images.
        "service_metadata": Some(&record.service_metadata).filter(|text| !text.is_empty()),
        "container": record.container,
        "display_name": record.name,
        "display_description": record.description,
        "project_id": record.project_id,
        "created_at": created_at,
        "status": "available",
    });
    // What we know nothing of, unless Cinder told us.
    let others = json!({
        "driver_info": {},
        "user_id": null,
        "host": null,
        "availability_zone": null,
        "fail_reason": null,
        "size": record.volume_bytes.div_ceil(GIB),
        "object_count": record.counts.object_count,
        "temp_volume_id": null,
        "temp_snapshot_id": null,
        "num_dependent_backups": 0,
        "snapshot_id": null,
        "data_timestamp": created_at,
        "restore_volume_id": null,
        "metadata": {},
        "encryption_key_id": null,
        "updated_at": null,
        "deleted_at": null,
        "deleted": false,
    });
    let mut fields = Map::new();
    for part in [others, Value::Object(record.cinder_fields.clone()), own] {
        if let Value::Object(part) = part {
            fields.extend(part);
        }
    }
    ExportRecord {
        backup_service: record.service.clone(),
        backup_url: BASE64_STANDARD.encode(Value::Object(fields).to_string()),
    }
}

/// Makes the export record of a backup out of all its fields.
pub fn of_row(service: String, mut fields: Map<String, Value>) -> ExportRecord {
    fields.insert("driver_info".into(), json!({}));
    ExportRecord {
        backup_service: service,
        backup_url: BASE64_STANDARD.encode(Value::Object(fields).to_string()),
    }
}

/// Makes the record of a backup out of its export record, as [`import`] does.
pub fn decode(export: ExportRecord, form: &Form) -> Result<Record, Error> {
    let ExportRecord { backup_service: service, backup_url } = export;
    check_driver(&service, form)?;
    let fields = fields_of(&backup_url)?;
    match missing_in(&fields).first() {
        Some(missing) => Err(Error::MissingField(missing)),
        None => of_fields(service, fields, form),
    }
}

/// Takes the fields of a backup out of the `backup_url` of its export record.
pub fn fields_of(backup_url: &str) -> Result<Map<String, Value>, Error> {
    let json = BASE64_STANDARD.decode(backup_url).map_err(Error::NotBase64)?;
    serde_json::from_slice(&json).map_err(Error::NotJson)
}

/// The fields that are not there and without which Cinder refuses to import a backup.
pub fn missing_in(fields: &Map<String, Value>) -> Vec<&'static str> {
    NEEDED_BY_CINDER.into_iter().filter(|field| !fields.contains_key(*field)).collect()
}

/// Makes the record of a backup out of all its fields.
pub fn of_fields(service: String, fields: Map<String, Value>, form: &Form) -> Result<Record, Error> {
    check_driver(&service, form)?;
    let mut fields = Fields(fields);
    match fields.take("service")? {
        Some(inner) if inner != service => return Err(Error::OtherService { outer: service, inner }),
        _ => {}
    }
    match fields.take("status")? {
        Some(status) if status != "available" => return Err(Error::NotAvailable { status }),
        _ => {}
    }
    let created_at = fields.needed("created_at")?;
    // In its first year jiff takes for a time what lies up to a second before its first moment.
    if created_at.starts_with("-009999") {
        return Err(Error::TooOld { text: created_at });
    }
    let volume_id = fields.needed("volume_id")?.parse()?;
    let (service_metadata, container) = match form {
        Form::Files | Form::Buckets => {
            let prefix = safe_prefix(fields.needed("service_metadata")?, form)?;
            (prefix, fields.needed("container")?.parse()?)
        }
        Form::Images { pool } => (
            safe_base(fields.take("service_metadata")?, volume_id)?,
            fields.take("container")?.map_or_else(|| Ok(pool.clone()), |container| container.parse())?,
        ),
    };
    Ok(Record {
        backup_id: fields.needed("id")?.parse()?,
        volume_id,
        state: RecordState::Available,
        parent_id: fields.take("parent_id")?.map(|id| id.parse()).transpose()?,
        job_id: None,
        writer: String::new(),
        displaced_writer: None,
        revival_count: 0,
        checkpoint: None,
        service,
        service_metadata,
        container,
        name: fields.take("display_name")?,
        description: fields.take("display_description")?,
        project_id: fields.take("project_id")?,
        created_at: created_at
            .parse::<Timestamp>()
            .map_err(|source| Error::InvalidTime { text: created_at, source })?,
        volume_bytes: 0,
        method: None,
        counts: Counts::default(),
        digest: None,
        object_digests: Vec::new(),
        source: None,
        image_id: None,
        fallback_reason: None,
        cinder_fields: fields.0,
    })
}

/// Refuses backups that this form of store does not keep.
fn check_driver(service: &str, form: &Form) -> Result<(), Error> {
    let own: &[_] = match form {
        Form::Files => &FILE_DRIVERS,
        Form::Buckets => &BUCKET_DRIVERS,
        Form::Images { .. } => &IMAGE_DRIVERS,
    };
    if is_of(own, service) {
        return Ok(());
    }
    let known = [&FILE_DRIVERS[..], &BUCKET_DRIVERS, &IMAGE_DRIVERS].concat();
    let service = service.to_owned();
    Err(match is_of(&known, &service) {
        true => Error::OtherStore { service, form: form.to_string() },
        false => Error::ForeignDriver { service },
    })
}

fn is_of(drivers: &[(&str, &str)], service: &str) -> bool {
    service.strip_prefix(DRIVERS).is_some_and(|driver| {
        drivers.iter().any(|(module, class)| match driver.split_once('.') {
            Some(parts) => parts == (*module, *class),
            None => driver == *module,
        })
    })
}

/// Takes a prefix of the names of objects. In a bucket it has parts.
fn safe_prefix(prefix: String, form: &Form) -> Result<String, Error> {
    let unsafe_character = |c: char| c.is_control() || c == '\\' || (c == '/' && *form != Form::Buckets);
    let fits = (1..=PREFIX_BYTES_MAX).contains(&prefix.len());
    let unsafe_part = |part: &str| part.is_empty() || part.starts_with('.');
    if !fits || prefix.contains(unsafe_character) || prefix.split('/').any(unsafe_part) {
        return Err(Error::UnsafePrefix { prefix: prefix.chars().take(PREFIX_BYTES_MAX).collect() });
    }
    Ok(prefix)
}

/// Takes what says which image a backup is in; nothing, which an empty text stands for, where Cinder has kept nothing.
/// An image that is none of this volume's backups is refused, since a delete may remove it.
fn safe_base(text: Option<String>, volume_id: VolumeId) -> Result<String, Error> {
    let Some(text) = text else { return Ok(String::new()) };
    let prefix = format!("volume-{volume_id}.backup.");
    let safe = serde_json::from_str::<Base>(&text).is_ok_and(|Base { base }| {
        let first = base.strip_prefix(&prefix);
        first.is_some_and(|first| first == "base" || first.parse::<BackupId>().is_ok())
    });
    if safe {
        Ok(text)
    } else {
        Err(Error::UnsafeImage { text: text.chars().take(200).collect(), volume_id })
    }
}

/// The fields of a backup that have not been looked at yet.
struct Fields(Map<String, Value>);

impl Fields {
    /// Takes a text out; none where it is null or not there.
    fn take(&mut self, field: &'static str) -> Result<Option<String>, Error> {
        match self.0.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(Error::NotText(field)),
        }
    }

    fn needed(&mut self, field: &'static str) -> Result<String, Error> {
        self.take(field)?.ok_or(Error::MissingField(field))
    }
}
