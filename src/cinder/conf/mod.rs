//! `cinder.conf`: the options of Cinder that a backup worker obeys, read as Cinder's own worker reads them.
//!
//! `file` takes files apart, `value` says what their texts stand for, and here stand the options themselves. The options'
//! names, types and defaults are those of Cinder 29 (2026.2); what they mean stands in Cinder's documentation.

mod file;
mod value;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use file::Source;
use value::{Kind, Preset};
pub use value::{Opt, Settings, Value};

/// Says which file, line and option is wrong, why, and what to write. It never shows a value, which may be a password.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or a folder is not there or not readable, or a file is not UTF-8.
    #[error("read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line that is neither section, option, comment nor continuation.
    #[error("{}:{line}: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counts from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The value of an option is not valid.
    #[error("[{group}] {name} ({origin}): {problem}")]
    Option {
        /// Its section.
        group: &'static str,
        /// Its name there.
        name: &'static str,
        /// The file and line, or the environment variable, that sets it.
        origin: String,
        /// What is wrong and what to write.
        problem: String,
    },
}

/// A text with a password in it: it is not shown by `Debug`, and cannot be serialised.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for whoever sends it where it belongs.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A field that an option's value can be put into.
trait Field: Sized {
    /// Fails with what is wrong and what to write.
    fn of(value: Value) -> Result<Self, &'static str>;
}

const MUST_BE_SET: &str = "must be set";

impl Field for String {
    fn of(value: Value) -> Result<Self, &'static str> {
        Option::of(value)?.ok_or(MUST_BE_SET)
    }
}

impl Field for Option<String> {
    fn of(value: Value) -> Result<Self, &'static str> {
        match value {
            Value::Text(text) => Ok(Some(text)),
            _ => Ok(None),
        }
    }
}

impl Field for Secret {
    fn of(value: Value) -> Result<Self, &'static str> {
        String::of(value).map(Self)
    }
}

impl Field for Option<Secret> {
    fn of(value: Value) -> Result<Self, &'static str> {
        Ok(Option::of(value)?.map(Secret))
    }
}

impl Field for bool {
    fn of(value: Value) -> Result<Self, &'static str> {
        if let Value::Bool(value) = value { Ok(value) } else { Err(MUST_BE_SET) }
    }
}

impl Field for i64 {
    fn of(value: Value) -> Result<Self, &'static str> {
        if let Value::Integer(value) = value { Ok(value) } else { Err(MUST_BE_SET) }
    }
}

impl Field for Option<i64> {
    fn of(value: Value) -> Result<Self, &'static str> {
        if let Value::Integer(value) = value { Ok(Some(value)) } else { Ok(None) }
    }
}

impl Field for u64 {
    fn of(value: Value) -> Result<Self, &'static str> {
        i64::of(value)?.try_into().map_err(|_| "must not be negative")
    }
}

impl Field for u32 {
    fn of(value: Value) -> Result<Self, &'static str> {
        i64::of(value)?.try_into().map_err(|_| "must be from 0 to 4294967295")
    }
}

impl Field for f64 {
    fn of(value: Value) -> Result<Self, &'static str> {
        if let Value::Float(value) = value { Ok(value) } else { Err(MUST_BE_SET) }
    }
}

impl Field for Vec<String> {
    fn of(value: Value) -> Result<Self, &'static str> {
        if let Value::List(items) = value { Ok(items) } else { Ok(Vec::new()) }
    }
}

const TEXT: Kind = Kind::Text;
const URI: Kind = Kind::Uri;
const HOST: Kind = Kind::Host;
const BOOL: Kind = Kind::Bool;
const LIST: Kind = Kind::List;
const MULTI: Kind = Kind::Multi;
const INTEGER: Kind = Kind::Integer { min: i64::MIN, max: i64::MAX };
const FLOAT: Kind = Kind::Float { min: f64::NEG_INFINITY, max: f64::INFINITY };

const fn at_least(min: i64) -> Kind {
    Kind::Integer { min, max: i64::MAX }
}

const fn is(text: &'static str) -> Preset {
    Preset::Text(text)
}

const NOTHING: Preset = Preset::Nothing;

const COMPRESSIONS: Kind =
    Kind::ChoiceInAnyCase(&["none", "off", "no", "zlib", "gzip", "bz2", "bzip2", "zstd"]);
const FAILOVERS: Kind = Kind::Choice(&["round-robin", "shuffle"]);
const LOGINS: Kind = Kind::Choice(&["PLAIN", "AMQPLAIN", "EXTERNAL", "RABBIT-CR-DEMO"]);
const SWIFT_AUTHS: Kind = Kind::Choice(&["per_user", "single_user"]);
const ENDPOINT_TYPES: Kind = Kind::Choice(&["public", "internal", "admin"]);

/// Makes of the options of a section a struct with a field for each and the list of them.
macro_rules! section {
    ($(#[$about:meta])* $section:ident $group:literal { $($name:ident: $type:ty = $kind:expr, $default:expr $(, was $old:literal)?;)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone)]
        #[allow(missing_docs, reason = "Cinder's documentation has them, with these names")]
        pub struct $section {
            $(pub $name: $type,)*
        }

        impl $section {
            const OPTIONS: &[Opt] = &[$(Opt {
                group: $group,
                name: stringify!($name),
                old_name: { let old: &[&str] = &[$($old)?]; if old.is_empty() { None } else { Some(old[0]) } },
                kind: $kind,
                default: $default,
            },)*];

            fn read(settings: &Settings) -> Result<Self, Error> {
                let mut options = Self::OPTIONS.iter();
                Ok(Self { $($name: field(settings, options.next(), stringify!($name))?,)* })
            }
        }
    };
}

/// Reads the value of an option into its field.
fn field<T: Field>(settings: &Settings, option: Option<&Opt>, name: &'static str) -> Result<T, Error> {
    let value = option.map_or(Ok(Value::Nothing), |option| settings.value(option))?;
    let group = option.map_or("DEFAULT", |option| option.group);
    let origin = || option.map_or_else(String::new, |option| settings.origin(option));
    T::of(value).map_err(|problem| Error::Option { group, name, origin: origin(), problem: problem.into() })
}

section! {
    /// The section `[DEFAULT]`.
    Default "DEFAULT" {
        host: String = TEXT, Preset::HostName;
        my_ip: String = HOST, Preset::OwnAddress;
        storage_availability_zone: String = TEXT, is("nova");
        state_path: String = TEXT, is("/var/lib/cinder");
        transport_url: Secret = TEXT, is("rabbit://");
        control_exchange: String = TEXT, is("openstack");
        rpc_response_timeout: u64 = INTEGER, is("60");
        rpc_ping_enabled: bool = BOOL, is("false");
        executor_thread_pool_size: u64 = INTEGER, is("64"), was "rpc_thread_pool_size";
        report_interval: u64 = INTEGER, is("10");
        periodic_interval: u64 = INTEGER, is("60");
        periodic_fuzzy_delay: u64 = INTEGER, is("60");
        service_down_time: u64 = INTEGER, is("60");
        enable_new_services: bool = BOOL, is("true");
        message_ttl: u64 = INTEGER, is("2592000");
        volume_name_template: String = TEXT, is("volume-%s");
        snapshot_name_template: String = TEXT, is("snapshot-%s");
        backup_name_template: String = TEXT, is("backup-%s");
        use_multipath_for_image_xfer: bool = BOOL, is("false");
        enforce_multipath_for_image_xfer: bool = BOOL, is("false");
        num_volume_device_scan_tries: u64 = INTEGER, is("3");
        quota_backups: i64 = INTEGER, is("10");
        quota_backup_gigabytes: i64 = INTEGER, is("1000");
        reservation_expire: u64 = INTEGER, is("86400");
        until_refresh: u32 = INTEGER, is("0");
        max_age: u64 = INTEGER, is("0");
        rootwrap_config: String = TEXT, is("/etc/cinder/rootwrap.conf");
        debug: bool = BOOL, is("false");

        backup_driver: String = TEXT, is("cinder.backup.drivers.swift.SwiftBackupDriver");
        backup_driver_init_check_interval: u64 = at_least(5), is("60");
        backup_driver_stats_polling_interval: u64 = at_least(10), is("60"), was "backup_driver_status_check_interval";
        backup_service_inithost_offload: bool = BOOL, is("true");
        backup_native_threads_pool_size: u64 = at_least(20), is("60");
        backup_use_same_host: bool = BOOL, is("false");
        backup_workers: u64 = at_least(1), is("1");
        backup_max_operations: u64 = at_least(0), is("15");
        backup_metadata_version: i64 = INTEGER, is("2");
        backup_object_number_per_notification: i64 = INTEGER, is("10");
        backup_timer_interval: i64 = INTEGER, is("120");
        backup_compression_algorithm: String = COMPRESSIONS, is("zlib");
        backup_create_containers: bool = BOOL, is("true");

        backup_file_size: u64 = INTEGER, is("1999994880");
        backup_sha_block_size_bytes: u64 = INTEGER, is("32768");
        backup_enable_progress_timer: bool = BOOL, is("true");
        backup_posix_path: String = TEXT, is("$state_path/backup");
        backup_container: Option<String> = TEXT, NOTHING;
        backup_mount_point_base: String = TEXT, is("$state_path/backup_mount");
        backup_share: Option<String> = TEXT, NOTHING;
        backup_mount_options: Option<String> = TEXT, NOTHING;
        backup_mount_attempts: u64 = at_least(1), is("3");
        glusterfs_backup_mount_point: String = TEXT, is("$state_path/backup_mount");
        glusterfs_backup_share: Option<String> = TEXT, NOTHING;

        backup_ceph_conf: String = TEXT, is("/etc/ceph/ceph.conf");
        backup_ceph_user: String = TEXT, is("cinder");
        backup_ceph_chunk_size: u64 = INTEGER, is("134217728");
        backup_ceph_pool: String = TEXT, is("backups");
        backup_ceph_stripe_unit: u64 = INTEGER, is("0");
        backup_ceph_stripe_count: u64 = INTEGER, is("0");
        backup_ceph_image_journals: bool = BOOL, is("false");
        backup_ceph_max_snapshots: u64 = INTEGER, is("0");
        restore_discard_excess_bytes: bool = BOOL, is("true");

        backup_swift_url: Option<String> = URI, NOTHING;
        backup_swift_auth_url: Option<String> = URI, NOTHING;
        swift_catalog_info: String = TEXT, is("object-store:swift:publicURL");
        keystone_catalog_info: String = TEXT, is("identity:Identity Service:publicURL");
        backup_swift_auth: String = SWIFT_AUTHS, is("per_user");
        backup_swift_auth_version: String = TEXT, is("1");
        backup_swift_tenant: Option<String> = TEXT, NOTHING;
        backup_swift_user_domain: Option<String> = TEXT, NOTHING;
        backup_swift_project_domain: Option<String> = TEXT, NOTHING;
        backup_swift_project: Option<String> = TEXT, NOTHING;
        backup_swift_user: Option<String> = TEXT, NOTHING;
        backup_swift_key: Option<Secret> = TEXT, NOTHING;
        backup_swift_container: String = TEXT, is("volumebackups");
        backup_swift_create_storage_policy: Option<String> = TEXT, NOTHING;
        backup_swift_object_size: u64 = INTEGER, is("52428800");
        backup_swift_block_size: u64 = INTEGER, is("32768");
        backup_swift_retry_attempts: u64 = INTEGER, is("3");
        backup_swift_retry_backoff: u64 = INTEGER, is("2");
        backup_swift_enable_progress_timer: bool = BOOL, is("true");
        backup_swift_ca_cert_file: Option<String> = TEXT, NOTHING;
        backup_swift_auth_insecure: bool = BOOL, is("false");
        backup_swift_service_auth: bool = BOOL, is("false");
        backup_swift_region_name: Option<String> = TEXT, NOTHING;

        backup_s3_endpoint_url: Option<String> = TEXT, NOTHING;
        backup_s3_store_access_key: Option<Secret> = TEXT, NOTHING;
        backup_s3_store_secret_key: Option<Secret> = TEXT, NOTHING;
        backup_s3_store_bucket: String = TEXT, is("volumebackups");
        backup_s3_object_size: u64 = INTEGER, is("52428800");
        backup_s3_block_size: u64 = INTEGER, is("32768");
        backup_s3_enable_progress_timer: bool = BOOL, is("true");
        backup_s3_http_proxy: String = TEXT, is("");
        backup_s3_https_proxy: String = TEXT, is("");
        backup_s3_timeout: f64 = FLOAT, is("60");
        backup_s3_max_pool_connections: u64 = INTEGER, is("10");
        backup_s3_retry_max_attempts: u64 = INTEGER, is("4");
        backup_s3_retry_mode: String = TEXT, is("legacy");
        backup_s3_verify_ssl: bool = BOOL, is("true");
        backup_s3_ca_cert_file: Option<String> = TEXT, NOTHING;
        backup_s3_md5_validation: bool = BOOL, is("true");
        backup_s3_sse_customer_key: Option<Secret> = TEXT, NOTHING;
        backup_s3_sse_customer_algorithm: Option<String> = TEXT, NOTHING;

        backup_gcs_bucket: Option<String> = TEXT, NOTHING;
        backup_gcs_object_size: u64 = INTEGER, is("52428800");
        backup_gcs_block_size: u64 = INTEGER, is("32768");
        backup_gcs_reader_chunk_size: u64 = INTEGER, is("2097152");
        backup_gcs_writer_chunk_size: u64 = INTEGER, is("2097152");
        backup_gcs_num_retries: u64 = INTEGER, is("3");
        backup_gcs_retry_error_codes: Vec<String> = LIST, is("429");
        backup_gcs_bucket_location: String = TEXT, is("US");
        backup_gcs_storage_class: String = TEXT, is("NEARLINE");
        backup_gcs_credential_file: Option<String> = TEXT, NOTHING;
        backup_gcs_project_id: Option<String> = TEXT, NOTHING;
        backup_gcs_user_agent: String = TEXT, is("gcscinder");
        backup_gcs_enable_progress_timer: bool = BOOL, is("true");
        backup_gcs_proxy_url: Option<Secret> = URI, NOTHING;
    }
}

section! {
    /// The section `[database]`.
    Database "database" {
        // What Cinder sets in the place of oslo.db's default, which is nothing.
        connection: Secret = TEXT, is("sqlite:///$state_path/cinder.sqlite");
        slave_connection: Option<Secret> = TEXT, NOTHING;
        connection_parameters: String = TEXT, is("");
        connection_recycle_time: i64 = INTEGER, is("3600");
        max_pool_size: u32 = INTEGER, is("5");
        max_overflow: i64 = INTEGER, is("50");
        pool_timeout: Option<i64> = INTEGER, NOTHING;
        max_retries: i64 = INTEGER, is("10");
        retry_interval: u64 = INTEGER, is("10");
        connection_debug: i64 = Kind::Integer { min: 0, max: 100 }, is("0");
        connection_trace: bool = BOOL, is("false");
        mysql_sql_mode: Option<String> = TEXT, is("TRADITIONAL");
        mysql_wsrep_sync_wait: Option<i64> = INTEGER, NOTHING;
        sqlite_synchronous: bool = BOOL, is("true");
        synchronous_reader: bool = BOOL, is("true");
        use_db_reconnect: bool = BOOL, is("false");
        db_retry_interval: i64 = INTEGER, is("1");
        db_inc_retry_interval: bool = BOOL, is("true");
        db_max_retry_interval: i64 = INTEGER, is("10");
        db_max_retries: i64 = INTEGER, is("20");
    }
}

section! {
    /// The section `[oslo_messaging_rabbit]`.
    Rabbit "oslo_messaging_rabbit" {
        amqp_durable_queues: bool = BOOL, is("false");
        amqp_auto_delete: bool = BOOL, is("false");
        ssl: bool = BOOL, is("false");
        ssl_version: String = TEXT, is("");
        ssl_key_file: String = TEXT, is("");
        ssl_cert_file: String = TEXT, is("");
        ssl_ca_file: String = TEXT, is("");
        ssl_enforce_hostname_verification: bool = BOOL, is("true");
        ssl_enforce_fips_mode: bool = BOOL, is("false");
        rpc_conn_pool_size: u64 = at_least(1), is("30");
        conn_pool_min_size: u64 = INTEGER, is("2");
        conn_pool_ttl: u64 = INTEGER, is("1200");
        kombu_reconnect_delay: f64 = Kind::Float { min: 0.0, max: 4.5 }, is("1.0");
        kombu_reconnect_splay: f64 = Kind::Float { min: 0.0, max: f64::INFINITY }, is("0.0");
        kombu_compression: Option<String> = TEXT, NOTHING;
        kombu_missing_consumer_retry_timeout: u64 = INTEGER, is("60"), was "kombu_reconnect_timeout";
        kombu_failover_strategy: String = FAILOVERS, is("round-robin");
        rabbit_login_method: String = LOGINS, is("AMQPLAIN");
        rabbit_retry_interval: u64 = at_least(1), is("1");
        rabbit_retry_backoff: u64 = at_least(0), is("2");
        rabbit_interval_max: u64 = at_least(1), is("30");
        rabbit_ha_queues: bool = BOOL, is("false");
        rabbit_quorum_queue: bool = BOOL, is("false");
        rabbit_transient_quorum_queue: bool = BOOL, is("false");
        rabbit_quorum_delivery_limit: u64 = INTEGER, is("0");
        rabbit_quorum_max_memory_length: u64 = INTEGER, is("0");
        rabbit_quorum_max_memory_bytes: u64 = INTEGER, is("0");
        rabbit_transient_queues_ttl: u64 = at_least(0), is("1800");
        rabbit_qos_prefetch_count: u64 = INTEGER, is("0");
        heartbeat_timeout_threshold: u64 = INTEGER, is("60");
        heartbeat_rate: u64 = INTEGER, is("3");
        direct_mandatory_flag: bool = BOOL, is("true");
        enable_cancel_on_failover: bool = BOOL, is("false");
        use_queue_manager: bool = BOOL, is("false");
        rabbit_stream_fanout: bool = BOOL, is("false");
    }
}

section! {
    /// The section `[oslo_messaging_notifications]`.
    Notifications "oslo_messaging_notifications" {
        driver: Vec<String> = MULTI, NOTHING;
        transport_url: Option<Secret> = TEXT, NOTHING;
        topics: Vec<String> = LIST, is("notifications");
        retry: i64 = INTEGER, is("-1");
    }
}

section! {
    /// The section `[key_manager]`.
    KeyManager "key_manager" {
        backend: String = TEXT, is("barbican"), was "api_class";
        fixed_key: Option<Secret> = TEXT, NOTHING;
    }
}

section! {
    /// The section `[barbican]`.
    Barbican "barbican" {
        barbican_endpoint: Option<String> = URI, NOTHING;
        barbican_api_version: Option<String> = TEXT, NOTHING;
        barbican_endpoint_type: String = ENDPOINT_TYPES, is("public");
        barbican_region_name: Option<String> = TEXT, NOTHING;
        auth_endpoint: String = URI, is("http://localhost/identity/v3");
        verify_ssl: bool = BOOL, is("true");
        verify_ssl_path: Option<String> = TEXT, NOTHING;
        send_service_user_token: bool = BOOL, is("false");
        number_of_retries: i64 = INTEGER, is("60");
        retry_delay: i64 = INTEGER, is("1");
    }
}

section! {
    /// The section `[barbican_service_user]`.
    BarbicanServiceUser "barbican_service_user" {
        auth_url: Option<String> = TEXT, NOTHING;
        username: Option<String> = TEXT, NOTHING;
        password: Option<Secret> = TEXT, NOTHING;
        user_domain_name: Option<String> = TEXT, NOTHING;
        project_name: Option<String> = TEXT, NOTHING;
        project_domain_name: Option<String> = TEXT, NOTHING;
    }
}

section! {
    /// The section `[keystone_authtoken]`.
    KeystoneAuthtoken "keystone_authtoken" {
        auth_url: Option<String> = TEXT, NOTHING;
        username: Option<String> = TEXT, NOTHING;
        password: Option<Secret> = TEXT, NOTHING;
        user_domain_name: Option<String> = TEXT, NOTHING;
        project_name: Option<String> = TEXT, NOTHING;
        project_domain_name: Option<String> = TEXT, NOTHING;
    }
}

/// All options that are known here, by section.
pub const OPTIONS: [&[Opt]; 8] = [
    Default::OPTIONS,
    Database::OPTIONS,
    Rabbit::OPTIONS,
    Notifications::OPTIONS,
    KeyManager::OPTIONS,
    Barbican::OPTIONS,
    BarbicanServiceUser::OPTIONS,
    KeystoneAuthtoken::OPTIONS,
];

/// What Cinder's worker does not need either, and other services may have in the same file.
const OF_OTHERS: &str = "Cinder's API, scheduler and volume services look at it";

/// Why there is no pool.
const ONE_CONNECTION: &str = "all goes over one connection to the broker";
/// Why there is no second database.
const ALL_FROM_ONE: &str = "all is read from connection";
/// How statements are logged.
const LOGGERS: &str = "the logger sqlalchemy of `cinder service-set-log` has the statements logged";
/// Why nothing is asked for again and again until it is there.
const NO_ORDERS: &str = "no key is ordered from Barbican, so none is waited for";
/// What is done about lost connections.
const TRIED_AGAIN: &str = "what a lost connection has ended is begun again in any case";

/// What Cinder's worker obeys and this one does not, and why.
pub const NOT_OBEYED: &[(&str, &str)] = &[
    (
        "backup_object_number_per_notification",
        "how far a backup is, is told by the clock: backup_timer_interval",
    ),
    ("backup_workers", "one process uses all processors"),
    ("backup_native_threads_pool_size", "deletes run beside backups, with no threads of their own"),
    ("backup_service_inithost_offload", "nothing is done in the way of the start"),
    ("backup_metadata_version", "metadata are written in version 2"),
    ("backup_use_same_host", OF_OTHERS),
    (
        "backup_container",
        "Cinder's driver does not come to look at it either: a request may name a container",
    ),
    ("backup_name_template", "nothing that is stored is called by it"),
    ("debug", "how much is logged says --log, and `cinder service-set-log` while it works"),
    ("executor_thread_pool_size", "requests need no threads of their own"),
    (
        "glusterfs_backup_mount_point",
        "there is no driver for GlusterFS: mount it and write its folder into backup_posix_path",
    ),
    (
        "glusterfs_backup_share",
        "there is no driver for GlusterFS: mount it and write its folder into backup_posix_path",
    ),
    ("periodic_interval", "what is done again and again has options of its own"),
    ("periodic_fuzzy_delay", "reports begin at once"),
    ("quota_backups", OF_OTHERS),
    ("quota_backup_gigabytes", OF_OTHERS),
    ("service_down_time", OF_OTHERS),
    ("volume_name_template", "the volume service says what the image of a volume is called"),
    ("retry", "a notification is tried for ten seconds, and then given up"),
    ("rpc_ping_enabled", "the table of the services says whether the worker lives"),
    ("ssl_version", "the newest version of TLS is spoken that the broker has, 1.2 at least"),
    ("ssl_enforce_hostname_verification", "certificates are always verified, and the name in them"),
    ("ssl_enforce_fips_mode", "oslo.messaging does not obey it either"),
    ("rpc_conn_pool_size", ONE_CONNECTION),
    ("conn_pool_min_size", ONE_CONNECTION),
    ("conn_pool_ttl", ONE_CONNECTION),
    ("kombu_reconnect_delay", "a queue whose consumer was cancelled is consumed again after half a second"),
    ("kombu_reconnect_splay", "a queue whose consumer was cancelled is consumed again after half a second"),
    ("kombu_missing_consumer_retry_timeout", "a reply is tried for a minute"),
    ("kombu_failover_strategy", "the nodes of transport_url are tried in their order"),
    ("rabbit_login_method", "the login is PLAIN"),
    ("rabbit_retry_interval", "pauses between two tries to connect grow up to rabbit_interval_max"),
    ("rabbit_retry_backoff", "pauses between two tries to connect grow up to rabbit_interval_max"),
    (
        "rabbit_qos_prefetch_count",
        "a message is acknowledged when its job is done, and others do not wait for that",
    ),
    ("heartbeat_rate", "heartbeats go as often as the broker asks for"),
    ("direct_mandatory_flag", "whether a reply has reached its queue is always asked for"),
    ("use_queue_manager", "the queues of replies and for all are new at each start, and go at its end"),
    (
        "rabbit_stream_fanout",
        "what is sent to all comes by a queue of the worker's own, at the same exchange",
    ),
    ("slave_connection", ALL_FROM_ONE),
    ("synchronous_reader", ALL_FROM_ONE),
    ("connection_parameters", "write them into connection, behind a ?"),
    ("connection_debug", LOGGERS),
    ("connection_trace", LOGGERS),
    ("mysql_sql_mode", "no statement needs one"),
    ("mysql_wsrep_sync_wait", "set wsrep_sync_wait in the configuration of the servers"),
    ("sqlite_synchronous", "what is written is on disk"),
    ("use_db_reconnect", TRIED_AGAIN),
    ("db_retry_interval", TRIED_AGAIN),
    ("db_inc_retry_interval", TRIED_AGAIN),
    ("db_max_retry_interval", TRIED_AGAIN),
    ("db_max_retries", TRIED_AGAIN),
    ("backup_ceph_chunk_size", "how much is read at once is no setting"),
    ("restore_discard_excess_bytes", "what an image has behind the end of a backup is always discarded"),
    ("backup_mount_attempts", "mount itself tries for two minutes, and a worker without its share ends"),
    ("backup_swift_retry_backoff", "pauses begin at 0.2 seconds and double"),
    ("backup_swift_service_auth", "no token of the service goes with that of the user"),
    ("backup_s3_retry_mode", "there is one way of trying again"),
    ("backup_s3_md5_validation", "all that is written goes with its MD5"),
    ("backup_gcs_reader_chunk_size", "an object is read as one stream"),
    ("backup_gcs_writer_chunk_size", "data objects are sent whole"),
    ("backup_gcs_retry_error_codes", "what may pass is tried again, and docs/stores.md says what that is"),
    ("backup_gcs_user_agent", "requests have none"),
    (
        "auth_endpoint",
        "the token of a request is used as it is, and the service's own login is at auth_url of [keystone_authtoken]",
    ),
    ("verify_ssl", "certificates are always verified: name the file of their authority in verify_ssl_path"),
    ("number_of_retries", NO_ORDERS),
    ("retry_delay", NO_ORDERS),
];

/// All that `cinder.conf` says to a backup worker. The fields are called as the options are.
#[derive(Debug, Clone)]
pub struct Conf {
    /// The files that say it, in their order.
    pub files: Vec<PathBuf>,
    /// `[DEFAULT]`.
    pub default: Default,
    /// `[database]`.
    pub database: Database,
    /// `[oslo_messaging_rabbit]`, and what `transport_url` says besides.
    pub rabbit: Rabbit,
    /// `[oslo_messaging_notifications]`.
    pub notifications: Notifications,
    /// `[oslo_messaging_rabbit]` for the broker of the notifications.
    pub notifications_rabbit: Rabbit,
    /// `[key_manager]`.
    pub key_manager: KeyManager,
    /// `[barbican]`.
    pub barbican: Barbican,
    /// `[barbican_service_user]`.
    pub barbican_service_user: BarbicanServiceUser,
    /// `[keystone_authtoken]`.
    pub keystone_authtoken: KeystoneAuthtoken,
}

impl Conf {
    /// Reads every option. The error names the file, the line and the option.
    pub fn new(settings: &Settings) -> Result<Self, Error> {
        let default = Default::read(settings)?;
        let notifications = Notifications::read(settings)?;
        let rabbit = Rabbit::at(settings, default.transport_url.reveal())?;
        let notifications_rabbit = match notifications.transport_url.as_ref().map(Secret::reveal) {
            None | Some("") => rabbit.clone(),
            Some(url) => Rabbit::at(settings, url)?,
        };
        Ok(Self {
            files: settings.files(),
            default,
            database: Database::read(settings)?,
            rabbit,
            notifications,
            notifications_rabbit,
            key_manager: KeyManager::read(settings)?,
            barbican: Barbican::read(settings)?,
            barbican_service_user: BarbicanServiceUser::read(settings)?,
            keystone_authtoken: KeystoneAuthtoken::read(settings)?,
        })
    }
}

impl Rabbit {
    /// The section, and what the query of a transport URL has in the place of it.
    fn at(settings: &Settings, transport_url: &str) -> Result<Self, Error> {
        let settings = settings.with_query_of(transport_url);
        if let Some(name) = settings.unknown_in_query(Self::OPTIONS) {
            let problem = format!("there is no option {name:.64}: look for what is wrong behind its ?");
            let origin = "the query of a transport_url".into();
            return Err(Error::Option { group: "DEFAULT", name: "transport_url", origin, problem });
        }
        let rabbit = Self::read(&settings)?;
        let compression = Self::OPTIONS.iter().find(|option| option.name == "kombu_compression");
        if let Some(option) = compression
            && rabbit.kombu_compression.as_ref().is_some_and(|name| !name.is_empty())
        {
            let problem =
                "compressed messages cannot be read: leave it out, for all of Cinder's services".into();
            let origin = settings.origin(option);
            return Err(Error::Option { group: option.group, name: option.name, origin, problem });
        }
        Ok(rabbit)
    }
}

impl Settings {
    /// Those of [`NOT_OBEYED`] that are set, for one line of the log.
    pub fn not_obeyed(&self) -> Vec<(&'static str, &'static str)> {
        let options = || OPTIONS.iter().copied().flatten();
        let with_query = |option| match self.value(option) {
            Ok(Value::Text(url)) => Some(self.with_query_of(&url)),
            _ => None,
        };
        let all: Vec<Self> =
            options().filter(|option| option.name == "transport_url").filter_map(with_query).collect();
        let set = |name: &str| {
            options().any(|option| option.name == name && all.iter().any(|settings| settings.is_set(option)))
        };
        NOT_OBEYED.iter().filter(|(name, _)| set(name)).copied().collect()
    }
}
