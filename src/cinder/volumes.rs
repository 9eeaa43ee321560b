//! What is asked of Cinder's volume service, which owns the volumes, and what it answers.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::rpc::{CallError, Rpc, Target};
use crate::job::VolumeId;
use crate::message::oslo::{Context, Object, Request};

/// The version of its interface that knows most of the methods here.
const VERSION: &str = "3.0";
/// The version that knows `get_backup_device` with the answer as a message of its own.
const VERSION_OF_DEVICES: &str = "3.17";
/// The version that knows how snapshots are attached.
const VERSION_OF_SNAPSHOTS: &str = "3.13";
/// Attached this way a volume is a copy in a format of its own, which is written back when it is detached.
const COPIED_KIND: &str = "vmdk";

/// The fields of a volume that are columns of its row.
const VOLUME_FIELDS: [&str; 40] = [
    "id",
    "_name_id",
    "ec2_id",
    "user_id",
    "project_id",
    "use_quota",
    "snapshot_id",
    "cluster_name",
    "host",
    "size",
    "availability_zone",
    "status",
    "attach_status",
    "migration_status",
    "scheduled_at",
    "launched_at",
    "terminated_at",
    "display_name",
    "display_description",
    "provider_id",
    "provider_location",
    "provider_auth",
    "provider_geometry",
    "volume_type_id",
    "source_volid",
    "encryption_key_id",
    "consistencygroup_id",
    "group_id",
    "deleted",
    "bootable",
    "multiattach",
    "replication_status",
    "replication_extended_status",
    "replication_driver_data",
    "previous_status",
    "service_uuid",
    "shared_targets",
    "created_at",
    "updated_at",
    "deleted_at",
];

/// The fields of a snapshot that are columns of its row.
const SNAPSHOT_FIELDS: [&str; 21] = [
    "id",
    "user_id",
    "project_id",
    "use_quota",
    "volume_id",
    "cgsnapshot_id",
    "group_snapshot_id",
    "status",
    "progress",
    "volume_size",
    "display_name",
    "display_description",
    "encryption_key_id",
    "volume_type_id",
    "provider_location",
    "provider_id",
    "provider_auth",
    "deleted",
    "created_at",
    "updated_at",
    "deleted_at",
];

/// Why a volume could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The volume names no service that has it.
    #[error("volume {0} is on no host: its service cannot be asked for it")]
    Homeless(VolumeId),
    /// The service does not answer, or says no.
    #[error("the service of volume {volume_id} was asked in vain")]
    Call {
        /// The volume.
        volume_id: VolumeId,
        /// What happened.
        source: Box<CallError>,
    },
    /// The volume is attached in a way that is no use.
    #[error(
        "volume {volume_id} is attached by {kind:?}, as a file that is not what the volume holds: this cannot be read or written"
    )]
    Copied {
        /// The volume.
        volume_id: VolumeId,
        /// What the service calls the way.
        kind: String,
    },
    /// The volume is a file with more in it than what the volume holds.
    #[error(
        "volume {volume_id} is a file in the format {format:?}: only \"raw\" can be read and written; have its service make raw \
         files (nfs_qcow2_volumes = false), and convert this one, or retype the volume to another backend"
    )]
    NotRaw {
        /// The volume.
        volume_id: VolumeId,
        /// What the service calls the format.
        format: String,
    },
    /// The service says something that makes no sense.
    #[error("the way to volume {volume_id} that {service} tells cannot be used: {why}")]
    Nonsense {
        /// The volume.
        volume_id: VolumeId,
        /// The service.
        service: String,
        /// What is wrong.
        why: String,
    },
}

impl Error {
    /// Whether the service has tried, and failed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Call { source, .. } if matches!(**source, CallError::Failed { .. }))
    }
}

/// What a service makes reachable for us.
#[derive(Clone)]
pub enum Export {
    /// The volume, as it was described to us.
    Volume(Value),
    /// The same, when somebody else may go on using it.
    SharedVolume(Value),
    /// A snapshot of it, by its id.
    Snapshot(String),
}

/// The service that has a volume.
#[derive(Clone, Copy)]
pub struct VolumeService<'a> {
    rpc: &'a Rpc,
    /// `host@backend`, or the name of a cluster of such services.
    service: &'a str,
    context: &'a Context,
    volume_id: VolumeId,
    reply_time_max: Duration,
}

impl<'a> VolumeService<'a> {
    /// `service` is the volume's `cluster_name`, or else its `host`, without the pool behind `#`.
    pub fn new(
        rpc: &'a Rpc,
        service: &'a str,
        context: &'a Context,
        volume_id: VolumeId,
        reply_time_max: Duration,
    ) -> Self {
        Self { rpc, service, context, volume_id, reply_time_max }
    }

    /// Asks for what is to be read for a backup; the answer comes as a `continue_backup`.
    pub async fn get_backup_device(&self, backup: Value) -> Result<(), Error> {
        let mut args = Map::new();
        args.insert("backup".into(), backup);
        args.insert("want_objects".into(), json!(true));
        args.insert("async_call".into(), json!(true));
        self.cast("get_backup_device", VERSION_OF_DEVICES, args).await
    }

    /// The volume.
    pub fn volume_id(&self) -> VolumeId {
        self.volume_id
    }

    /// Asks for the way to what it exports.
    pub async fn initialize_connection(
        &self,
        connector: &Value,
        export: &Export,
    ) -> Result<Connection, Error> {
        let connector = ("connector", connector.clone());
        let told = match export {
            Export::Volume(volume) | Export::SharedVolume(volume) => {
                self.call("initialize_connection", [connector, ("volume", volume.clone())]).await?
            }
            Export::Snapshot(id) => {
                let method = "initialize_connection_snapshot";
                self.call(method, [connector, ("snapshot_id", json!(id))]).await?
            }
        };
        read_way(self.volume_id, self.service, told)
    }

    /// Says that we do not use what it exports any more.
    pub async fn terminate_connection(&self, connector: &Value, export: &Export) -> Result<(), Error> {
        let (method, force) = match export {
            Export::Volume(_) => ("terminate_connection", true),
            Export::SharedVolume(_) => ("terminate_connection", false),
            Export::Snapshot(_) => ("terminate_connection_snapshot", true),
        };
        let args = [("connector", connector.clone()), ("force", json!(force)), self.id_of(export)];
        self.call(method, args).await.map(drop)
    }

    /// Says that nobody uses what it exports any more, unless somebody may.
    pub async fn remove_export(&self, export: &Export) -> Result<(), Error> {
        let method = match export {
            Export::Volume(_) => "remove_export",
            Export::SharedVolume(_) => return Ok(()),
            Export::Snapshot(_) => "remove_export_snapshot",
        };
        self.call(method, [self.id_of(export)]).await.map(drop)
    }

    fn id_of(&self, export: &Export) -> (&'static str, Value) {
        match export {
            Export::Volume(_) | Export::SharedVolume(_) => ("volume_id", json!(self.volume_id)),
            Export::Snapshot(id) => ("snapshot_id", json!(id)),
        }
    }

    /// Whether the files of its volumes belong to a user who must go on to have them.
    pub async fn secure_file_operations_enabled(&self, volume: &Value) -> Result<bool, Error> {
        let told = self.call("secure_file_operations_enabled", [("volume", volume.clone())]).await?;
        Ok(told.as_bool().unwrap_or(false))
    }

    /// Asks for the end of a volume that was made for a backup alone.
    pub async fn delete_volume(&self, volume: &Object) -> Result<(), Error> {
        let mut args = Map::new();
        args.insert("volume".into(), volume.to_json());
        args.insert("unmanage_only".into(), json!(false));
        args.insert("cascade".into(), json!(false));
        self.cast("delete_volume", VERSION, args).await
    }

    /// Asks for the end of a snapshot that was made for a backup alone.
    pub async fn delete_snapshot(&self, snapshot: &Object) -> Result<(), Error> {
        let mut args = Map::new();
        args.insert("snapshot".into(), snapshot.to_json());
        args.insert("unmanage_only".into(), json!(false));
        self.cast("delete_snapshot", VERSION, args).await
    }

    async fn cast(&self, method: &'static str, version: &str, args: Map<String, Value>) -> Result<(), Error> {
        let request = Request::new(self.context.clone(), method, version, args);
        self.rpc
            .cast(&Target::volume_service(self.service), &request)
            .await
            .map_err(|source| self.failed(source))
    }

    async fn call<const COUNT: usize>(
        &self,
        method: &'static str,
        args: [(&str, Value); COUNT],
    ) -> Result<Value, Error> {
        let version = if method.ends_with("_snapshot") { VERSION_OF_SNAPSHOTS } else { VERSION };
        let args = args.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let request = Request::new(self.context.clone(), method, version, args);
        let called = self.rpc.call(&Target::volume_service(self.service), request, self.reply_time_max).await;
        called.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: CallError) -> Error {
        Error::Call { volume_id: self.volume_id, source: source.into() }
    }
}

/// Cinder's volume object with the fields that its row has; what else belongs to it the volume service looks up itself.
pub fn object_of(columns: Map<String, Value>) -> Object {
    Object::new("Volume", "1.9", fields_of(columns, &VOLUME_FIELDS))
}

/// The same of a snapshot.
pub fn snapshot_object_of(columns: Map<String, Value>) -> Object {
    Object::new("Snapshot", "1.6", fields_of(columns, &SNAPSHOT_FIELDS))
}

fn fields_of(columns: Map<String, Value>, names: &[&str]) -> Map<String, Value> {
    let mut fields = Map::new();
    for (name, value) in columns {
        if !names.contains(&name.as_str()) {
            continue;
        }
        let value = match value {
            // Whole seconds, as its objects have them.
            Value::String(text) if name.ends_with("_at") => json!(format!("{:.19}Z", text.replace(' ', "T"))),
            other => other,
        };
        fields.insert(name, value);
    }
    fields
}

/// The way to a volume, or to a snapshot of one.
#[derive(Debug)]
pub enum Connection {
    /// By librbd.
    Rbd(RbdConnection),
    /// By os-brick.
    Other(OtherConnection),
}

/// Reads the way to a volume that its service tells.
fn read_way(volume_id: VolumeId, service: &str, told: Value) -> Result<Connection, Error> {
    let nonsense = |why| Error::Nonsense { volume_id, service: service.to_owned(), why };
    let way = OtherConnection::new(told);
    match (way.kind(), way.format()) {
        ("rbd", _) => RbdConnection::parse(way.data()).map(Connection::Rbd).map_err(nonsense),
        ("", _) => Err(nonsense("it does not say what kind it is".into())),
        (COPIED_KIND, _) => Err(Error::Copied { volume_id, kind: COPIED_KIND.into() }),
        (_, Some("raw") | None) => Ok(Connection::Other(way)),
        (_, Some(format)) => Err(Error::NotRaw { volume_id, format: format.chars().take(64).collect() }),
    }
}

/// A way that os-brick knows, as the service tells it. There may be passwords in it: it is not shown by `Debug`.
#[derive(Clone)]
pub struct OtherConnection(Value);

impl OtherConnection {
    /// Takes what a service tells.
    pub fn new(told: Value) -> Self {
        Self(told)
    }

    /// All of it, for whoever attaches the volume.
    pub fn reveal(&self) -> &Value {
        &self.0
    }

    /// What the service calls it, such as `iscsi`.
    pub fn kind(&self) -> &str {
        self.0.get("driver_volume_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// What a file that is the volume is to be read as, where the service says so.
    fn format(&self) -> Option<&str> {
        self.data().get("format").and_then(Value::as_str)
    }

    fn data(&self) -> &Value {
        self.0.get("data").unwrap_or(&Value::Null)
    }
}

impl fmt::Debug for OtherConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OtherConnection({:?})", self.kind())
    }
}

/// The way to a volume that is an RBD image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RbdConnection {
    /// The pool.
    pub pool: String,
    /// The image.
    pub image: String,
    /// The monitors, each `address:port`.
    pub monitors: Vec<String>,
    /// The cluster's name, by which the file with the key is called.
    pub cluster: String,
    /// The user, without `client.`.
    pub user: String,
}

impl RbdConnection {
    fn parse(data: &Value) -> Result<Self, String> {
        let text = |name: &str| match data.get(name).and_then(Value::as_str) {
            Some(text) if !text.is_empty() && !text.chars().any(|c| c.is_control() || "#;\"".contains(c)) => {
                Ok(text)
            }
            _ => Err(format!("its {name} is {}", data.get(name).unwrap_or(&Value::Null))),
        };
        let list = |name: &str| {
            let values = data.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
            values
                .iter()
                .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
                .collect::<Vec<_>>()
        };
        let (pool, image) = text("name")?.split_once('/').ok_or("its name is not pool/image")?;
        if pool.is_empty() || image.is_empty() || image.contains(['/', '@']) {
            return Err("its name is not pool/image".into());
        }
        let (hosts, ports) = (list("hosts"), list("ports"));
        if hosts.is_empty() || hosts.len() != ports.len() {
            return Err(format!("it has {} hosts and {} ports", hosts.len(), ports.len()));
        }
        // They come to stand in a configuration file.
        let is_plain =
            |text: &String| text.chars().all(|c| c.is_ascii_alphanumeric() || "[]:.-_%".contains(c));
        if !hosts.iter().chain(&ports).all(is_plain) {
            return Err("its hosts or ports are no addresses".into());
        }
        let (cluster, user) = (text("cluster_name")?, text("auth_username")?);
        if [cluster, user].iter().any(|name| name.contains('/')) {
            return Err("its cluster_name or auth_username has a slash".into());
        }
        Ok(Self {
            pool: pool.into(),
            image: image.into(),
            monitors: hosts.iter().zip(&ports).map(|(host, port)| format!("{host}:{port}")).collect(),
            cluster: cluster.into(),
            user: user.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Value {
        json!({
            "name": "volumes/volume-0b2f6f0e-2f5e-4a3c-8a54-0f8f6d8e2c11", "hosts": ["192.0.2.1", "[2001:db8::1]"],
            "ports": ["6789", 3300], "cluster_name": "ceph", "auth_username": "cinder", "secret_uuid": null,
        })
    }

    #[test]
    fn the_way_to_an_image_is_read() {
        let connection = RbdConnection::parse(&data()).unwrap();
        assert_eq!(connection.pool, "volumes");
        assert_eq!(connection.image, "volume-0b2f6f0e-2f5e-4a3c-8a54-0f8f6d8e2c11");
        assert_eq!(connection.monitors, ["192.0.2.1:6789", "[2001:db8::1]:3300"]);
    }

    #[test]
    fn a_row_becomes_the_object_that_the_volume_service_takes() {
        let Value::Object(columns) = json!({
            "id": "0b2f6f0e-2f5e-4a3c-8a54-0f8f6d8e2c11", "size": 1, "created_at": "2026-03-01T10:00:00.123456",
            "deleted_at": null, "something_new": 1,
        }) else {
            panic!("an object is an object");
        };

        let object = object_of(columns).to_json();

        let data = json!({
            "id": "0b2f6f0e-2f5e-4a3c-8a54-0f8f6d8e2c11", "size": 1, "created_at": "2026-03-01T10:00:00Z",
            "deleted_at": null,
        });
        assert_eq!(
            (&object["versioned_object.name"], &object["versioned_object.data"]),
            (&json!("Volume"), &data)
        );
    }

    #[test]
    fn a_way_that_makes_no_sense_is_refused() {
        for (name, value) in [
            ("name", json!("volumes")),
            ("name", json!("a/b/c")),
            ("name", json!("a/b@c")),
            ("name", json!(null)),
            ("hosts", json!([])),
            ("hosts", json!(["192.0.2.1\nkeyring = /x", "b"])),
            ("ports", json!(["6789"])),
            ("cluster_name", json!("../../tmp/x")),
            ("auth_username", json!("a\n[global]")),
            ("auth_username", json!(null)),
        ] {
            let mut data = data();
            data[name] = value.clone();
            assert!(RbdConnection::parse(&data).is_err(), "{name}: {value}");
        }
    }

    #[test]
    fn a_way_with_a_password_does_not_show_it() {
        let told = json!({ "driver_volume_type": "iscsi", "data": { "auth_password": "sesame open" } });
        let shown = format!("{:?}", Connection::Other(OtherConnection::new(told)));
        assert_eq!(shown, "Other(OtherConnection(\"iscsi\"))");
    }

    #[test]
    fn only_what_holds_the_bytes_of_the_volume_is_a_way_to_it() {
        let read = |told| read_way(VolumeId::random(), "node1@nfs1", told);
        let of_kind = |kind: &str, data: Value| read(json!({ "driver_volume_type": kind, "data": data }));
        assert!(matches!(of_kind("rbd", data()), Ok(Connection::Rbd(_))));
        for (kind, data) in [
            ("iscsi", json!({ "target_iqn": "iqn.2010-10.org.openstack:a" })),
            ("nfs", json!({ "export": "192.0.2.1:/a", "name": "volume-a", "format": "raw" })),
            ("local", json!({ "device_path": "/dev/vg/a" })),
        ] {
            let Ok(Connection::Other(way)) = of_kind(kind, data) else { panic!("{kind}") };
            assert_eq!(way.kind(), kind);
        }
        let qcow2 =
            of_kind("nfs", json!({ "export": "192.0.2.1:/a", "name": "volume-a", "format": "qcow2" }));
        assert!(matches!(&qcow2, Err(Error::NotRaw { format, .. }) if format == "qcow2"), "{qcow2:?}");
        assert!(matches!(of_kind("vmdk", json!({})), Err(Error::Copied { .. })));
        for told in [json!({}), json!({ "driver_volume_type": 7 }), json!(null)] {
            let read = read(told);
            assert!(matches!(read, Err(Error::Nonsense { .. })), "{read:?}");
        }
    }
}
