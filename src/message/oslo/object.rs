//! Versioned objects: what Cinder puts into arguments. The whole JSON is kept, so that an object goes on as it came.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::envelope::{Malformed, cut};
use crate::job::{BackupId, VolumeId};

const NAME: &str = "versioned_object.name";
const NAMESPACE: &str = "versioned_object.namespace";
const VERSION: &str = "versioned_object.version";
const DATA: &str = "versioned_object.data";

/// A versioned object of any kind.
#[derive(Clone, PartialEq)]
pub struct Object {
    name: String,
    /// All but its fields.
    shell: Map<String, Value>,
    fields: Map<String, Value>,
}

impl Object {
    /// Makes an object of Cinder's.
    pub fn new(name: &str, version: &str, fields: Map<String, Value>) -> Self {
        let mut shell = Map::new();
        shell.insert(NAME.into(), name.into());
        shell.insert(NAMESPACE.into(), "cinder".into());
        shell.insert(VERSION.into(), version.into());
        Self { name: name.into(), shell, fields }
    }

    /// Reads an object. Its fields are looked at when they are asked for.
    pub fn read(value: &Value) -> Result<Self, Malformed> {
        let Some((shell, name)) =
            value.as_object().and_then(|shell| Some((shell, shell.get(NAME)?.as_str()?)))
        else {
            return Err(Malformed::new(format!("a versioned object was expected, not {}", cut(value))));
        };
        let name = name.to_owned();
        let mut shell = shell.clone();
        match shell.remove(DATA) {
            Some(Value::Object(fields)) => Ok(Self { name, shell, fields }),
            _ => Err(Malformed::new(format!("a versioned object {name:.64} has no fields"))),
        }
    }

    /// Reads an object of this kind and major version 1, which is the only one that there ever was.
    fn of_kind(value: &Value, kind: &str) -> Result<Self, Malformed> {
        let object = Self::read(value)?;
        if object.name != kind {
            return Err(Malformed::new(format!("an object {kind} was expected, not a {:.64}", object.name)));
        }
        if object.version().split('.').next() != Some("1") {
            return Err(Malformed::new(format!(
                "its {kind} has version {:.64}, and only those from 1.0 on and below 2.0 are known",
                object.version()
            )));
        }
        Ok(object)
    }

    /// What it is, such as `Backup`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version that its sender wrote, such as `1.7`; empty if it did not say.
    pub fn version(&self) -> &str {
        self.shell.get(VERSION).and_then(Value::as_str).unwrap_or_default()
    }

    /// A field; none if it is null or not set.
    pub fn field(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// A field that is a text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.field(name).and_then(Value::as_str)
    }

    /// A field that is an integer.
    pub fn integer(&self, name: &str) -> Option<i64> {
        self.field(name).and_then(Value::as_i64)
    }

    /// Sets a field in what goes on.
    pub fn set(&mut self, name: &str, value: Value) {
        self.fields.insert(name.to_owned(), value);
    }

    /// The object as an argument of a request.
    pub fn to_json(&self) -> Value {
        let mut object = self.shell.clone();
        object.insert(DATA.into(), Value::Object(self.fields.clone()));
        Value::Object(object)
    }

    fn id<T: FromStr<Err: fmt::Display>>(&self, name: &str) -> Result<T, Malformed> {
        let Some(text) = self.text(name) else {
            return Err(Malformed::new(format!("its {} has no {name}", self.name)));
        };
        text.parse().map_err(|error| Malformed::new(format!("{name} of its {}: {error}", self.name)))
    }
}

/// Shows which object it is, and not its fields, which may hold credentials.
impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.text("id");
        f.debug_struct("Object").field("name", &self.name).field("id", &id).finish_non_exhaustive()
    }
}

/// `Backup`, and `BackupImport`, which has the same fields.
#[derive(Debug, Clone, PartialEq)]
pub struct Backup {
    /// Its id.
    pub id: BackupId,
    /// The volume that it is of; all zeros while its record is being imported.
    pub volume_id: VolumeId,
    /// The backup that it builds on.
    pub parent_id: Option<BackupId>,
    /// All that came.
    pub object: Object,
}

impl Backup {
    /// Reads an argument.
    pub fn read(value: &Value) -> Result<Self, Malformed> {
        let object = match Object::of_kind(value, "BackupImport") {
            Ok(object) => object,
            Err(_) => Object::of_kind(value, "Backup")?,
        };
        let parent_id = object.text("parent_id").map(|_| object.id("parent_id")).transpose()?;
        Ok(Self { id: object.id("id")?, volume_id: object.id("volume_id")?, parent_id, object })
    }

    /// The state that it was in when it was sent.
    pub fn status(&self) -> &str {
        self.object.text("status").unwrap_or_default()
    }

    /// The worker that has it.
    pub fn host(&self) -> Option<&str> {
        self.object.text("host")
    }
}

/// `Volume`.
#[derive(Debug, Clone, PartialEq)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// All that came.
    pub object: Object,
}

impl Volume {
    /// Reads an argument.
    pub fn read(value: &Value) -> Result<Self, Malformed> {
        let object = Object::of_kind(value, "Volume")?;
        Ok(Self { id: object.id("id")?, object })
    }

    /// The volume service that has it, `host@backend`, or the cluster of such services.
    pub fn service(&self) -> Option<&str> {
        let named = |name| self.object.text(name).filter(|text| !text.is_empty());
        let host = named("cluster_name").or_else(|| named("host"))?;
        // The pool is not part of the service's name.
        host.split('#').next()
    }

    /// Its size in GiB.
    pub fn size_gib(&self) -> Option<u64> {
        self.object.integer("size").and_then(|size| u64::try_from(size).ok())
    }
}

/// `Snapshot`.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Its id, a UUID.
    pub id: String,
    /// The volume that it is of.
    pub volume_id: VolumeId,
    /// All that came.
    pub object: Object,
}

impl Snapshot {
    /// Reads an argument.
    pub fn read(value: &Value) -> Result<Self, Malformed> {
        let object = Object::of_kind(value, "Snapshot")?;
        let id: uuid::Uuid = object.id("id")?;
        Ok(Self { id: id.to_string(), volume_id: object.id("volume_id")?, object })
    }
}

/// `BackupDeviceInfo`: what the volume service gives us to read for a backup.
#[derive(Debug, Clone, PartialEq)]
pub struct BackupDeviceInfo {
    /// What to attach.
    pub device: BackupDevice,
    /// The file of the device belongs to root, and its owner must not be changed.
    pub secure_enabled: bool,
}

/// What is attached for a backup.
#[derive(Debug, Clone, PartialEq)]
pub enum BackupDevice {
    /// The volume, or a copy of it that was made for the backup.
    Volume(Volume),
    /// A snapshot.
    Snapshot(Snapshot),
}

impl BackupDeviceInfo {
    /// Reads an argument.
    pub fn read(value: &Value) -> Result<Self, Malformed> {
        let object = Object::of_kind(value, "BackupDeviceInfo")?;
        let secure_enabled = object.field("secure_enabled").and_then(Value::as_bool).unwrap_or(false);
        let device = match (object.field("snapshot"), object.field("volume")) {
            (Some(snapshot), _) => BackupDevice::Snapshot(Snapshot::read(snapshot)?),
            (None, Some(volume)) => BackupDevice::Volume(Volume::read(volume)?),
            (None, None) => {
                return Err(Malformed::new("its BackupDeviceInfo has neither a volume nor a snapshot"));
            }
        };
        Ok(Self { device, secure_enabled })
    }
}
