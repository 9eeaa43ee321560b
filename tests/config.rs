//! The configuration: what is refused and how it is told, what overrides what, and that the documents agree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use backhaul::config::{Config, Queue, SETTINGS, Store, StoreKind};
use backhaul::engine::chunked::Compression;
use backhaul::error::Causes;
use rstest::rstest;

/// A folder with a configuration file in it.
struct TempConfig(tempfile::TempDir);

impl TempConfig {
    fn of(toml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("backhaul.toml"), toml).unwrap();
        Self(folder)
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("backhaul.toml")
    }

    fn load(&self, environment: &[(&str, &str)]) -> Result<Config, String> {
        load(Some(&self.file()), environment)
    }
}

fn load(file: Option<&Path>, environment: &[(&str, &str)]) -> Result<Config, String> {
    let environment: Vec<_> =
        environment.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Config::load_from(file, &environment).map_err(|error| Causes(&error).to_string())
}

const STORE: &str = "[store.local]\nkind = \"posix\"\npath = \"/b\"\n";
const TWO_STORES: &str =
    "[store.a]\nkind = \"posix\"\npath = \"/a\"\n[store.b]\nkind = \"posix\"\npath = \"/b\"\n";

const S3: &str =
    "[store.x]\nkind = \"s3\"\nendpoint = \"http://h\"\naccess_key = \"a\"\nsecret_key = \"hush\"\n";

const SWIFT: &str = "[store.x]\nkind = \"swift\"\nauth_url = \"http://h\"\nuser = \"u\"\nproject = \"p\"\npassword = \"hush\"\n";

#[cfg(feature = "ceph")]
const RBD: &str = "[ceph.main]\n[store.x]\nkind = \"rbd\"\npool = \"p\"\n";

/// `FILE` in an expectation stands for the path of the file.
#[rstest]
#[case::not_toml("a = [", &[], &["FILE is not TOML: line 1: "])]
#[case::not_toml_further_down("[worker]\njobs_max = 1\nname = x\n", &[], &["FILE is not TOML: line 3: "])]
#[case::unknown_section("[stores.a]\n", &[], &["stores (FILE): ", "did you mean store?"])]
#[case::unknown_setting("[worker]\njobs_mx = 1", &[], &["worker.jobs_mx (FILE): ", "did you mean jobs_max?"])]
#[case::unlike_anything("[broker.tls]\nqqq = 1", &[], &["broker.tls.qqq (FILE): ", "known here are ca_file, client_cert"])]
#[case::unknown_in_store_of_a_kind(&format!("{STORE}colour = \"red\""), &[], &["store.local.colour (FILE): it is unknown to a store of kind \"posix\", which has kind, default, path, compression, compression_level, object_bytes, sha_block_bytes, unchanged_check_per_mille, source_snapshots_max"])]
#[case::unknown_and_near_to_one_of_another_kind(&format!("{STORE}buckett = \"b\""), &[], &["store.local.buckett (FILE): it is unknown to a store of kind \"posix\", which has kind, default, path, "])]
#[case::unknown_in_store_of_no_kind("[store.x]\ncolour = \"red\"", &[], &["store.x.colour (FILE): it is unknown; known here are kind, default, path, "])]
#[case::unknown_in_store(&format!("{STORE}compresion = \"zstd\""), &[], &["store.local.compresion (FILE): ", "did you mean compression?"])]
#[case::section_is_no_section("worker = 4", &[], &["worker (FILE): found 4; write a section: [worker]"])]
#[case::too_many("[worker]\njobs_max = 65", &[], &["worker.jobs_max (FILE): found 65; write a whole number from 1 to 64"])]
#[case::negative("[worker]\njobs_max = -1", &[], &["worker.jobs_max (FILE): found -1; write a whole number from 1 to 64"])]
#[case::a_fraction("[worker]\njobs_max = 1.5", &[], &["worker.jobs_max (FILE): found 1.5; write a whole number from 1 to 64"])]
#[case::not_a_number("[worker]\njobs_max = \"many\"", &[], &["worker.jobs_max (FILE): found \"many\"; write a whole number"])]
#[case::no_time("[worker]\nprogress_seconds = 0", &[], &["worker.progress_seconds (FILE): found 0; write a whole number from 1"])]
#[case::drain("[worker]\ndrain_seconds_max = 86401", &[], &["worker.drain_seconds_max (FILE): found 86401; write a whole number from 0 to 86400"])]
#[case::slower_than_slow("[worker]\nbytes_per_second_max = 1000", &[], &["worker.bytes_per_second_max (FILE): found 1000; write a whole number from 1048576 to 1099511627776"])]
#[case::health_without_a_port("[worker]\nhealth_listen = \"127.0.0.1\"", &[], &["worker.health_listen (FILE): found \"127.0.0.1\"; write an IP address and a port, such as \"127.0.0.1:8086\""])]
#[case::empty_name("[worker]\nname = \"\"", &[], &["worker.name (FILE): found \"\"; write 1 to 100 of a-z"])]
#[case::roots_are_a_list("[worker]\nfile_roots = \"/a\"", &[], &["worker.file_roots (FILE): found \"/a\"; write a list of paths"])]
#[case::an_empty_root("[worker]\nfile_roots = [\"/a\", \"\"]", &[], &["worker.file_roots.1 (FILE): found \"\"; write a path"])]
#[case::no_url("[broker]\nprefix = \"x\"", &[], &["broker.url (FILE): it is missing; write ", "url = \"amqp://"])]
#[case::other_scheme("[broker]\nurl = \"http://u:hush@h\"", &[], &["broker.url (FILE): ", "amqp:// or amqps://"])]
#[case::no_host("[broker]\nurl = \"amqp://\"", &[], &["broker.url (FILE): the URL has no host; write"])]
#[case::big_port("[broker]\nurl = \"amqp://u:hush@h:65536\"", &[], &["broker.url (FILE): ", "invalid port number"])]
#[case::port_zero("[broker]\nurl = \"amqp://u:hush@h:0\"", &[], &["broker.url (FILE): ", "port 0"])]
#[case::bad_prefix("[broker]\nurl = \"amqp://h\"\nprefix = \"a b\"", &[], &["broker.prefix (FILE): found \"a b\""])]
#[case::reserved_prefix("[broker]\nurl = \"amqp://h\"\nprefix = \"amq.x\"", &[], &["broker.prefix (FILE): found \"amq.x\"", "not amq"])]
#[case::bad_queue("[broker]\nurl = \"amqp://h\"\nqueue = \"lazy\"", &[], &["broker.queue (FILE): found \"lazy\"; write one of \"quorum\", \"classic\""])]
#[case::tls_without_tls("[broker]\nurl = \"amqp://h\"\n[broker.tls]\nca_file = \"ca.pem\"", &[], &["broker.url (FILE): ", "amqps://"])]
#[case::half_a_certificate("[broker]\nurl = \"amqps://h\"\n[broker.tls]\nclient_key_file = \"k\"", &[], &["broker.tls.client_key_file (FILE): ", "client_certificate_file"])]
#[case::ceph_user("[ceph.main]\nuser = \"client.x\"", &[], &["ceph.main.user (FILE): found \"client.x\"", "without \"client.\""])]
#[case::no_kind("[store.x]\npath = \"/b\"", &[], &["store.x.kind (FILE): it is missing; write kind = \"posix\""])]
#[case::no_path("[store.x]\nkind = \"posix\"", &[], &["store.x.path (FILE): it is missing; write ", "path = "])]
#[case::no_endpoint("[store.x]\nkind = \"s3\"\naccess_key = \"a\"\nsecret_key = \"b\"", &[], &["store.x.endpoint (FILE): it is missing; write ", "endpoint = \"https://"])]
#[case::no_access_key("[store.x]\nkind = \"s3\"\nendpoint = \"http://h\"\nsecret_key = \"b\"", &[], &["store.x.access_key (FILE): it is missing; write "])]
#[case::no_secret_key("[store.x]\nkind = \"s3\"\nendpoint = \"http://h\"\naccess_key = \"a\"", &[], &["store.x.secret_key (FILE): it is missing; write ", "or secret_key_file"])]
#[case::two_secret_keys(&format!("{S3}secret_key_file = \"k\""), &[], &["store.x.secret_key_file (FILE): secret_key is set, too"])]
#[case::secret_is_a_number("[store.x]\nkind = \"s3\"\nsecret_key = 1234", &[], &["store.x.secret_key (FILE): found a number; write a text, in quotes"])]
#[case::empty_secret(S3, &[("BACKHAUL_STORE__X__ACCESS_KEY", "")], &["store.x.access_key (environment variable BACKHAUL_STORE__X__ACCESS_KEY): it is empty"])]
#[case::endpoint_with_keys("[store.x]\nkind = \"s3\"\nendpoint = \"ftp://h\"", &[], &["store.x.endpoint (FILE): found \"ftp://h\"; write the URL of the server without user"])]
#[case::endpoint_with_password(&S3.replace("http://h", "http://u:hush@h"), &[], &["store.x.endpoint (FILE): there is a user in it; write the URL of the server without user"])]
#[case::no_bucket(&format!("{S3}bucket = \"a/b\""), &[], &["store.x.bucket (FILE): found \"a/b\"; write the name of a bucket"])]
#[case::no_region(&format!("{S3}region = \"\""), &[], &["store.x.region (FILE): found \"\"; write 1 to 100"])]
#[case::no_proxy(&format!("{S3}proxy = \"u:hush@h\""), &[], &["store.x.proxy (FILE): not the URL of a proxy; write"])]
#[case::no_time_to_connect(&format!("{S3}connect_seconds_max = 0"), &[], &["store.x.connect_seconds_max (FILE): found 0; write a whole number from 1"])]
#[case::no_connection(&format!("{S3}connections_max = 0"), &[], &["store.x.connections_max (FILE): found 0; write a whole number from 1 to 1000"])]
#[case::no_auth_url("[store.x]\nkind = \"swift\"\nuser = \"a\"\nproject = \"p\"\npassword = \"b\"", &[], &["store.x.auth_url (FILE): it is missing; write ", "auth_url = \"https://"])]
#[case::auth_url_with_password(&SWIFT.replace("http://h", "http://u:hush@h"), &[], &["store.x.auth_url (FILE): ", "without user and password"])]
#[case::no_user(&SWIFT.replace("user = \"u\"\n", ""), &[], &["store.x.user (FILE): it is missing; write the user"])]
#[case::no_project(&SWIFT.replace("project = \"p\"\n", ""), &[], &["store.x.project (FILE): it is missing; write the project"])]
#[case::no_password(&SWIFT.replace("password = \"hush\"\n", ""), &[], &["store.x.password (FILE): it is missing; write the password, or password_file"])]
#[case::two_passwords(&format!("{SWIFT}password_file = \"k\""), &[], &["store.x.password_file (FILE): password is set, too"])]
#[case::auth_version(&format!("{SWIFT}auth_version = 2"), &[], &["store.x.auth_version (FILE): found 2; write 1, or 3 for Keystone"])]
#[case::project_of_v1(&format!("{SWIFT}auth_version = 1"), &[], &["store.x.project (FILE): it is of no use with auth_version = 1"])]
#[case::region_of_v1(&SWIFT.replace("project = \"p\"", "auth_version = 1\nregion = \"r\""), &[], &["store.x.region (FILE): it is of no use with auth_version = 1"])]
#[case::user_of_an_application(&format!("{SWIFT}application_credential = \"i\""), &[], &["store.x.user (FILE): it is of no use with application_credential"])]
#[case::two_endpoints(&format!("{SWIFT}storage_url = \"http://h/v1/a\"\ninterface = \"internal\""), &[], &["store.x.interface (FILE): it is of no use with storage_url"])]
#[case::interface(&format!("{SWIFT}interface = \"publicURL\""), &[], &["store.x.interface (FILE): found \"publicURL\"; write one of \"public\", \"internal\", \"admin\""])]
#[case::container_with_a_slash(&format!("{SWIFT}container = \"a/b\""), &[], &["store.x.container (FILE): found \"a/b\"; write the name of a container"])]
#[case::bucket_of_swift(&format!("{SWIFT}bucket = \"bbb\""), &[], &["store.x.bucket (FILE): it is unknown to a store of kind \"swift\", which has kind, default, auth_url, "])]
#[case::odd_bucket_of_google("[store.x]\nkind = \"gcs\"\nbucket = \"a b\"\nanonymous = true", &[], &["store.x.bucket (FILE): found \"a b\"; write the name of a bucket: 3 to 63 of a-z, 0-9, '.', '-' and, for Google, '_', in quotes"])]
#[case::no_bucket_of_google("[store.x]\nkind = \"gcs\"\nanonymous = true", &[], &["store.x.bucket (FILE): it is missing; write the bucket, such as bucket = "])]
#[case::no_account("[store.x]\nkind = \"gcs\"\nbucket = \"bbb\"", &[], &["store.x.credentials_file (FILE): it is missing; write the path of the file with the key of a service account, or anonymous = true"])]
#[case::nobody_with_an_account("[store.x]\nkind = \"gcs\"\nbucket = \"bbb\"\ncredentials_file = \"k\"\nanonymous = true", &[], &["store.x.anonymous (FILE): credentials_file is set, too; write only one of them"])]
#[case::region_of_google("[store.x]\nkind = \"gcs\"\nbucket = \"bbb\"\nanonymous = true\nregion = \"r\"", &[], &["store.x.region (FILE): it is unknown to a store of kind \"gcs\", which has kind, default, endpoint, bucket, "])]
#[case::no_share("[store.x]\nkind = \"nfs\"", &[], &["store.x.share (FILE): it is missing; write the share, such as share = "])]
#[case::share_without_a_host("[store.x]\nkind = \"nfs\"\nshare = \"/backups\"", &[], &["store.x.share (FILE): found \"/backups\"; write a share, such as "])]
#[case::share_that_is_an_option("[store.x]\nkind = \"nfs\"\nshare = \"-o:/backups\"", &[], &["store.x.share (FILE): found \"-o:/backups\"; write a share, such as "])]
#[case::two_shares("[store.x]\nkind = \"nfs\"\nshare = \"h:/b\"\npath = \"/b\"", &[], &["store.x.share (FILE): it is of no use with path; remove one of them"])]
#[case::odd_object_in_a_container(&format!("{SWIFT}object_bytes = 100000"), &[], &["store.x.object_bytes (FILE): found 100000"])]
#[case::path_of_a_bucket(&format!("{S3}path = \"/b\""), &[], &["store.x.path (FILE): it is unknown to a store of kind \"s3\", which has kind, default, endpoint, "])]
#[case::bucket_of_a_folder(&format!("{STORE}bucket = \"bbb\""), &[], &["store.local.bucket (FILE): it is unknown to a store of kind \"posix\", which has kind, default, path, compression, "])]
#[case::odd_object_in_a_bucket(&format!("{S3}object_bytes = 100000"), &[], &["store.x.object_bytes (FILE): found 100000"])]
#[case::no_such_kind("[store.x]\nkind = \"tape\"\npath = \"/b\"", &[], &["store.x.kind (FILE): found \"tape\"; write \"posix\""])]
#[case::store_name("[store.\"a b\"]\nkind = \"posix\"\npath = \"/b\"", &[], &["store.a b (FILE): ", "write 1 to 64 of a-z"])]
#[case::compression(&format!("{STORE}compression = \"lz4\""), &[], &["store.local.compression (FILE): found \"lz4\"; write one of \"none\", \"zlib\", \"bz2\", \"zstd\""])]
#[case::odd_block(&format!("{STORE}sha_block_bytes = 1000"), &[], &["store.local.sha_block_bytes (FILE): found 1000; write a multiple of 512, such as 1024"])]
#[case::odd_object(&format!("{STORE}object_bytes = 100000"), &[], &["store.local.object_bytes (FILE): found 100000", "store.local.sha_block_bytes (default)", "32768, such as 98304"])]
#[case::object_below_block(&format!("{STORE}object_bytes = 512"), &[], &["store.local.object_bytes (FILE): ", "such as 32768"])]
#[case::huge_object(&format!("{STORE}object_bytes = 2147483648"), &[], &["store.local.object_bytes (FILE): found 2147483648; write a whole number from 512 to 2147483647"])]
#[case::level_of_none(&format!("{STORE}compression_level = 0"), &[], &["store.local.compression_level (FILE)", "a whole number from 1 to 9"])]
#[case::level_that_takes_too_much(&format!("{STORE}compression_level = 10"), &[], &["store.local.compression_level (FILE)", "a whole number from 1 to 9"])]
#[case::checks_of_more_than_all(&format!("{STORE}unchanged_check_per_mille = 1001"), &[], &["store.local.unchanged_check_per_mille (FILE)", "a whole number from 0 to 1000"])]
#[case::rbd_setting(&format!("{STORE}pool = \"p\""), &[], &["store.local.pool (FILE): it is unknown to a store of kind \"posix\", which has kind, default, path, compression, compression_level, object_bytes, sha_block_bytes, unchanged_check_per_mille, source_snapshots_max"])]
#[case::rbd_setting_from_environment(STORE, &[("BACKHAUL_STORE__LOCAL__STRIPE_COUNT", "4")], &["store.local.stripe_count (environment variable BACKHAUL_STORE__LOCAL__STRIPE_COUNT): it is unknown to a store of kind \"posix\""])]
#[case::no_seconds("[ceph.main]\noperation_seconds_max = 0", &[], &["ceph.main.operation_seconds_max (FILE): found 0; write a whole number from 1 to 3600"])]
#[case::memory(&format!("{STORE}object_bytes = 52428800\n[worker]\nmemory_bytes_max = 134217728"), &[], &["worker.memory_bytes_max (FILE): found 134217728", "store.local.object_bytes (FILE), 52428800", "at least 205520896", "at most 16777216"])]
#[case::memory_by_object(&format!("{STORE}object_bytes = 1073741824"), &[], &["worker.memory_bytes_max (default): ", "store.local.object_bytes (FILE)"])]
#[case::two_defaults("[store.a]\nkind=\"posix\"\npath=\"/a\"\ndefault=true\n[store.b]\nkind=\"posix\"\npath=\"/b\"\ndefault=true", &[], &["store.b.default (FILE): store.a is the default already"])]
#[case::value_from_environment(STORE, &[("BACKHAUL_STORE__LOCAL__OBJECT_BYTES", "7")], &["store.local.object_bytes (environment variable BACKHAUL_STORE__LOCAL__OBJECT_BYTES): found 7;"])]
#[case::word_from_environment(STORE, &[("BACKHAUL_WORKER__JOBS_MAX", "many")], &["worker.jobs_max (environment variable BACKHAUL_WORKER__JOBS_MAX): found \"many\"; write a whole"])]
#[case::unknown_from_environment("", &[("BACKHAUL_WORKER__JOB_MAX", "1")], &["worker.job_max (environment variable BACKHAUL_WORKER__JOB_MAX): ", "did you mean jobs_max?"])]
#[case::unknown_section_from_environment("", &[("BACKHAUL_BRKER__URL", "x")], &["brker (environment variable BACKHAUL_BRKER__URL): ", "did you mean broker?"])]
#[case::one_underscore("", &[("BACKHAUL_BROKER_URL", "x")], &["BACKHAUL_BROKER_URL (environment): ", "did you mean BACKHAUL_BROKER__URL?"])]
#[case::store_without_setting("", &[("BACKHAUL_STORE__PATH", "/x")], &["BACKHAUL_STORE__PATH (environment): ", "BACKHAUL_STORE__NAME__SETTING"])]
#[case::which_store("[store.a-b]\nkind=\"posix\"\npath=\"/a\"\n[store.A_b]\nkind=\"posix\"\npath=\"/b\"", &[("BACKHAUL_STORE__A_B__PATH", "/x")], &["BACKHAUL_STORE__A_B__PATH (environment): ", "store.A_b or store.a-b"])]
fn a_bad_setting_is_named_with_its_origin(
    #[case] toml: &str,
    #[case] environment: &[(&str, &str)],
    #[case] expected: &[&str],
) {
    let config = TempConfig::of(toml);

    let error = config.load(environment).unwrap_err();

    for part in expected {
        let part = part.replace("FILE", &config.file().display().to_string());
        assert!(error.contains(&part), "{part:?} is not in: {error}");
    }
    assert!(!error.contains("hush"), "a password is in: {error}");
}

#[cfg(feature = "ceph")]
#[rstest]
#[case::no_pool("[ceph.main]\n[store.x]\nkind = \"rbd\"", &["store.x.pool (FILE): it is missing; write the pool for backups, such as pool = \"backups\""])]
#[case::a_path(&RBD.replace("pool =", "path ="), &["store.x.path (FILE): it is unknown to a store of kind \"rbd\", which has kind, default, cluster, pool, source_snapshots_max, journaling, stripe_unit_bytes, stripe_count"])]
#[case::compression(&format!("{RBD}compression = \"zstd\""), &["store.x.compression (FILE): it is unknown to a store of kind \"rbd\""])]
#[case::no_cluster(&RBD.replace("[ceph.main]\n", ""), &["store.x.cluster (default): there is no cluster; write a section such as [ceph.main] with conf and user"])]
#[case::no_such_cluster(&format!("{RBD}cluster = \"other\"\n[ceph.b]"), &["store.x.cluster (FILE): found \"other\", and there is no [ceph.other]; write one of: b, main"])]
#[case::which_cluster(&format!("{RBD}[ceph.b]"), &["store.x.cluster (default): it is missing, and there are several clusters; write one of: b, main"])]
#[case::a_pool_with_a_slash(&RBD.replace("\"p\"", "\"p/q\""), &["store.x.pool (FILE): found \"p/q\"; write the name of a pool, such as \"backups\""])]
#[case::a_pool_of_cephs(&RBD.replace("\"p\"", "\".mgr\""), &["store.x.pool (FILE): found \".mgr\"; write the name of a pool"])]
#[case::snapshots(&format!("{RBD}source_snapshots_max = -1"), &["store.x.source_snapshots_max (FILE): found -1; write a whole number from 0 to 65535"])]
#[case::journaling(&format!("{RBD}journaling = 7"), &["store.x.journaling (FILE): found 7; write a boolean"])]
#[case::odd_stripe(&format!("{RBD}stripe_unit_bytes = 65537\nstripe_count = 4"), &["store.x.stripe_unit_bytes (FILE): found 65537; write a power of two, such as 131072"])]
#[case::stripe_without_count(&format!("{RBD}stripe_unit_bytes = 65536"), &["store.x.stripe_unit_bytes (FILE): it is of no use alone; write stripe_count too"])]
#[case::count_without_stripe(&format!("{RBD}stripe_count = 4"), &["store.x.stripe_count (FILE): it is of no use alone; write stripe_unit_bytes too"])]
fn a_bad_setting_of_a_store_of_images_is_named(#[case] toml: &str, #[case] expected: &[&str]) {
    a_bad_setting_is_named_with_its_origin(toml, &[], expected);
}

#[cfg(feature = "ceph")]
#[test]
fn a_store_of_images_has_its_settings() {
    let kind = |toml: &str| TempConfig::of(toml).load(&[]).unwrap().stores.into_values().next().unwrap().kind;

    let StoreKind::Rbd { cluster, pool, source_snapshots_max, journaling, stripes } = kind(RBD) else {
        panic!("another kind");
    };
    assert_eq!(
        (cluster, pool.as_str(), source_snapshots_max, journaling, stripes),
        (None, "p", 0, false, None)
    );

    let more = "cluster = \"main\"\nsource_snapshots_max = 3\njournaling = true\nstripe_unit_bytes = 65536\n\
                stripe_count = 4\n";
    let StoreKind::Rbd { cluster, source_snapshots_max, journaling, stripes, .. } =
        kind(&format!("{RBD}{more}[ceph.b]\n"))
    else {
        panic!("another kind");
    };
    assert_eq!((cluster.as_deref(), source_snapshots_max), (Some("main"), 3));
    assert_eq!((journaling, stripes), (true, Some((65536, 4))));
}

#[rstest]
#[case::password(
    "",
    "{ user: \"u\", user_domain: \"Default\", project: \"p\", project_domain: \"Default\", password: Setting(Secret) }",
    "Catalog { service_type: \"object-store\", interface: \"public\", region: None }"
)]
#[case::domains(
    "user_domain = \"a\"\nproject_domain = \"b\"\nregion = \"r\"\ninterface = \"internal\"\nservice_type = \"s\"",
    "user_domain: \"a\", project: \"p\", project_domain: \"b\"",
    "Catalog { service_type: \"s\", interface: \"internal\", region: Some(\"r\") }"
)]
#[case::url("storage_url = \"http://s/v1/a\"", "password: Setting(Secret) }", "At(")]
fn a_store_behind_keystone_has_its_settings(
    #[case] more: &str,
    #[case] credentials: &str,
    #[case] endpoint: &str,
) {
    let config = TempConfig::of(&format!("{SWIFT}{more}\n")).load(&[]).unwrap();
    let StoreKind::Swift { settings, .. } = &config.store(None).unwrap().1.kind else {
        panic!("another kind")
    };
    assert!(format!("{:?}", settings.credentials).contains(credentials), "{settings:?}");
    assert!(format!("{:?}", settings.endpoint).contains(endpoint), "{settings:?}");
    assert_eq!((settings.container.as_str(), settings.create_containers), ("volumebackups", true));
}

#[rstest]
#[case::v1("auth_version = 1\nuser = \"a:b\"", "V1 { user: \"a:b\", key: File(")]
#[case::application("application_credential = \"i\"", "ApplicationCredential { id: \"i\", secret: File(")]
fn other_logins_need_neither_a_project_nor_a_domain(#[case] more: &str, #[case] credentials: &str) {
    let swift = "[store.x]\nkind = \"swift\"\nauth_url = \"http://h\"\npassword_file = \"k\"\n";
    let config = TempConfig::of(&format!("{swift}{more}\n")).load(&[]).unwrap();
    let StoreKind::Swift { settings, .. } = &config.store(None).unwrap().1.kind else {
        panic!("another kind")
    };
    assert!(format!("{:?}", settings.credentials).contains(credentials), "{settings:?}");
}

#[test]
fn a_store_in_google_cloud_storage_has_its_settings() {
    let text = "[store.x]\nkind = \"gcs\"\nbucket = \"bbb\"\ncredentials_file = \"google.json\"\n";
    let file = TempConfig::of(text);
    let config = file.load(&[("BACKHAUL_STORE__X__LOCATION", "EU")]).unwrap();
    let StoreKind::Gcs { settings, .. } = &config.store(None).unwrap().1.kind else { panic!("another kind") };
    assert_eq!(settings.endpoint.as_str(), "https://storage.googleapis.com/");
    assert!(settings.credentials_file.as_ref().unwrap().is_absolute(), "{settings:?}");
    assert_eq!((settings.location.as_str(), settings.storage_class.as_str()), ("EU", "NEARLINE"));
    assert_eq!((settings.project.as_deref(), settings.create_buckets), (None, true));
}

#[test]
fn a_share_is_mounted_by_somebody_else_or_by_us() {
    let share = |more: &str| {
        let config = TempConfig::of(&format!("[store.x]\nkind = \"nfs\"\n{more}")).load(&[]).unwrap();
        let StoreKind::Nfs { share, .. } = config.store(None).unwrap().1.kind.clone() else {
            panic!("another kind")
        };
        share.folder()
    };
    assert_eq!(share("path = \"/b\"").to_str().unwrap(), "/b");
    let ours = share("share = \"h:/b\"\nmount_point_base = \"/m\"\nmount_options = \"ro\"");
    assert_eq!(ours.to_str().unwrap(), "/m/924f05d00f00ab5c4b7825628e77b63a");
}

#[cfg(not(feature = "ceph"))]
#[test]
fn a_store_of_images_is_refused_by_a_program_without_ceph() {
    let error = TempConfig::of("[store.x]\nkind = \"rbd\"\npool = \"p\"").load(&[]).unwrap_err();
    assert!(error.contains("store.x.kind (") && error.contains("built without Ceph"), "{error}");
}

#[test]
fn what_is_not_set_has_its_default() {
    let config =
        TempConfig::of(&format!("[broker]\nurl = \"amqp://h\"\n{STORE}[ceph.main]\n")).load(&[]).unwrap();

    let broker = config.broker().unwrap();
    assert_eq!((broker.prefix.as_str(), broker.queue), ("backhaul", Queue::Quorum));
    assert_eq!((broker.heartbeat_seconds, broker.retry_delay_seconds), (60, 30));
    assert_eq!((broker.reconnect_seconds_max, broker.publish_seconds_max), (30, 60));
    assert_eq!(broker.message_bytes_max, 1 << 20);
    let worker = &config.worker;
    assert_eq!((worker.jobs_max, worker.memory_bytes_max), (4, 512 << 20));
    assert_eq!((worker.attempts_max, worker.progress_seconds), (3, 1));
    assert_eq!((worker.drain_seconds_max, worker.health_listen), (60, None));
    assert_eq!(worker.cpu_threads_max, std::thread::available_parallelism().unwrap().get());
    assert_eq!(worker.file_roots, Vec::<PathBuf>::new());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(worker.name, host.trim());
    assert_eq!(config.ceph["main"].conf, Path::new("/etc/ceph/ceph.conf"));
    assert_eq!((config.ceph["main"].user.as_str(), config.ceph["main"].operation_seconds_max), ("admin", 60));
    let chunking = match &config.store(None).unwrap().1.kind {
        StoreKind::Posix { chunking, .. } => chunking,
        other => panic!("{other:?}"),
    };
    assert_eq!((chunking.compression, chunking.compression_level), (Compression::Zstd, 3));
    assert_eq!((chunking.object_bytes, chunking.sha_block_bytes), (16_777_216, 32_768));
    assert_eq!((chunking.unchanged_check_per_mille, chunking.source_snapshots_max), (1, 1));
}

#[test]
fn the_environment_overrides_the_file_and_can_stand_alone() {
    let file = TempConfig::of("[worker]\njobs_max = 2\n[store.Fast-one]\nkind = \"posix\"\npath = \"/a\"\n");
    let config = file
        .load(&[
            ("BACKHAUL_WORKER__JOBS_MAX", "8"),
            ("BACKHAUL_WORKER__NAME", "007"),
            ("BACKHAUL_WORKER__FILE_ROOTS", r#"["/a,b", "/c"]"#),
            ("BACKHAUL_STORE__FAST_ONE__PATH", "/b"),
            ("BACKHAUL_WORKER_SERVICE_HOST", "set by somebody else"),
            ("BACKHAUL_LOG", "debug"),
            ("PATH", "/bin"),
        ])
        .unwrap();
    assert_eq!((config.worker.jobs_max, config.worker.name.as_str()), (8, "007"));
    assert_eq!(config.worker.file_roots, [Path::new("/a,b"), Path::new("/c")]);
    assert_eq!(store_path(config.store(None).unwrap().1), Path::new("/b"));

    let config = load(
        None,
        &[
            ("BACKHAUL_BROKER__URL", "amqps://u:p@h:5671/v"),
            ("BACKHAUL_BROKER__TLS__CA_FILE", "/ca.pem"),
            ("BACKHAUL_STORE__LOCAL__KIND", "posix"),
            ("BACKHAUL_STORE__LOCAL__PATH", "b"),
            ("BACKHAUL_STORE__LOCAL__DEFAULT", "true"),
        ],
    )
    .unwrap();
    assert_eq!(config.broker().unwrap().url.to_string(), "amqps://u:***@h:5671/v");
    assert_eq!(config.broker().unwrap().tls.ca_file.as_deref(), Some(Path::new("/ca.pem")));
    let here = std::env::current_dir().unwrap();
    assert_eq!(store_path(config.store(None).unwrap().1), here.join("b"));
}

#[test]
fn a_relative_path_is_relative_to_the_file() {
    let file = TempConfig::of(
        "[broker]\nurl = \"amqps://h\"\n\
         [broker.tls]\nca_file = \"ca.pem\"\nclient_certificate_file = \"/c.pem\"\nclient_key_file = \"tls/k.pem\"\n\
         [worker]\nfile_roots = [\"volumes\", \"/v\"]\n\
         [ceph.main]\nconf = \"ceph.conf\"\n[store.local]\nkind = \"posix\"\npath = \"../b\"\n",
    );
    let folder = file.0.path();

    let config = file.load(&[]).unwrap();

    let tls = &config.broker().unwrap().tls;
    assert_eq!(tls.ca_file, Some(folder.join("ca.pem")));
    assert_eq!(tls.client_certificate_file, Some("/c.pem".into()));
    assert_eq!(tls.client_key_file, Some(folder.join("tls/k.pem")));
    assert_eq!(config.worker.file_roots, [folder.join("volumes"), "/v".into()]);
    assert_eq!(config.ceph["main"].conf, folder.join("ceph.conf"));
    assert_eq!(store_path(config.store(None).unwrap().1), folder.join("../b"));
    assert_eq!(config.file, Some(file.file()));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = load(Some(Path::new("/no/such/backhaul.toml")), &[]).unwrap_err();
    assert_eq!(
        error,
        "read the configuration file /no/such/backhaul.toml: No such file or directory (os error 2)"
    );
}

#[test]
fn the_default_store_is_the_only_one_or_the_one_that_says_so() {
    let name = |text: &str| text.parse().unwrap();

    let none = TempConfig::of("").load(&[]).unwrap();
    assert!(
        none.store(None)
            .unwrap_err()
            .to_string()
            .contains("a store is needed; write a section such as [store.local]")
    );
    assert!(none.broker().unwrap_err().to_string().starts_with("broker.url ("));

    let two = TempConfig::of(TWO_STORES).load(&[]).unwrap();
    assert!(two.store(None).unwrap_err().to_string().contains("name one of a, b, or write default = true"));
    assert!(two.store(Some(&name("c"))).unwrap_err().to_string().contains("there are: a, b"));
    assert_eq!(two.store(Some(&name("b"))).unwrap().0.as_str(), "b");

    let one_default = TempConfig::of(&format!("{TWO_STORES}default = true")).load(&[]).unwrap();
    assert_eq!(one_default.store(None).unwrap().0.as_str(), "b");
}

#[test]
fn a_password_is_not_shown() {
    let config = TempConfig::of("[broker]\nurl = \"amqp://u:hush@h\"\n").load(&[]).unwrap();
    assert!(!format!("{config:?}").contains("hush"));
    let proxy = format!("{S3}proxy = \"http://u:hush@h\"\n");
    let config = TempConfig::of(&proxy).load(&[("BACKHAUL_STORE__X__ACCESS_KEY", "hush")]).unwrap();
    assert!(!format!("{config:?}").contains("hush"));

    let not_toml = TempConfig::of("[broker]\nurl = amqp://u:hush@h\n").load(&[]).unwrap_err();
    assert!(!not_toml.contains("hush"), "{not_toml}");
}

fn store_path(store: &Store) -> &Path {
    match &store.kind {
        StoreKind::Posix { path, .. } => path,
        other => panic!("{other:?}"),
    }
}

/// A row of the tables in the documents.
struct Row {
    /// The kind of the stores that have it; none of what is no store's or every store's.
    kind: Option<&'static str>,
    setting: String,
    variable: String,
    default: &'static str,
}

fn documented() -> Vec<Row> {
    let (mut kind, mut rows) = (None, Vec::new());
    for line in include_str!("../docs/configuration.md").lines() {
        if line.starts_with('#') {
            kind = line.strip_prefix("### `kind = \"").and_then(|line| line.strip_suffix("\"`"));
        } else if line.starts_with("| `") {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let (setting, variable) = (cells[1].replace('`', ""), cells[2].replace('`', ""));
            rows.push(Row { kind, setting, variable, default: cells[4] });
        }
    }
    rows
}

#[test]
fn every_setting_is_documented_with_its_variable() {
    let mut names: Vec<String> = Vec::new();
    for Row { setting, variable, .. } in documented() {
        assert_eq!(variable, format!("BACKHAUL_{}", setting.to_uppercase().replace('.', "__")));
        // Stores of several kinds may have a setting in common.
        if !names.contains(&setting) {
            names.push(setting);
        }
    }
    assert_eq!(names, SETTINGS);
}

#[test]
fn every_setting_is_listed_and_every_listed_one_exists() {
    for setting in SETTINGS {
        let (section, key) = setting.rsplit_once('.').unwrap();
        let error = TempConfig::of(&format!("[{section}]\n{key}.x = 1\n")).load(&[]).unwrap_err();
        assert!(error.starts_with(setting) && error.contains("found a section; write "), "{error}");

        let error = TempConfig::of(&format!("[{section}]\nqqq = 1\n")).load(&[]).unwrap_err();
        let (_, known) = error.split_once("known here are ").unwrap();
        let listed = |key: &str| SETTINGS.iter().any(|s| s.starts_with(&format!("{section}.{key}")));
        assert!(known.split(", ").all(listed), "{error}");
    }
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let required = "broker.url = \"amqps://h\"\nstore.NAME.kind = \"posix\"\nstore.NAME.path = \"/b\"\n\
                    store.far.kind = \"s3\"\nstore.far.endpoint = \"http://h\"\n\
                    store.far.access_key = \"a\"\nstore.far.secret_key = \"b\"\n\
                    store.there.kind = \"swift\"\nstore.there.auth_url = \"http://h\"\n\
                    store.there.user = \"u\"\nstore.there.project = \"p\"\nstore.there.password = \"b\"\n\
                    store.google.kind = \"gcs\"\nstore.google.bucket = \"bbb\"\n\
                    store.google.credentials_file = \"/k\"\n\
                    store.share.kind = \"nfs\"\nstore.share.share = \"h:/b\"\n";
    let of_ceph = "store.images.kind = \"rbd\"\nstore.images.pool = \"p\"\n";
    let required = if cfg!(feature = "ceph") { format!("{required}{of_ceph}") } else { required.into() };
    let mut explicit = required.clone();
    for Row { kind, setting, default, .. } in documented() {
        if let Some(value) = default.strip_prefix('`').and_then(|text| text.strip_suffix('`')) {
            let store = match kind {
                Some("rbd") if cfg!(not(feature = "ceph")) => continue,
                Some("rbd") => "store.images",
                Some("s3") => "store.far",
                Some("swift") => "store.there",
                Some("gcs") => "store.google",
                Some("nfs") => "store.share",
                _ => "store.NAME",
            };
            explicit += &format!("{} = {value}\n", setting.replace("store.NAME", store));
        }
    }
    assert!(explicit.lines().count() > 15, "{explicit}");
    let (implicit, explicit) =
        (TempConfig::of(&format!("{required}ceph.NAME = {{}}\n")), TempConfig::of(&explicit));

    let explicit = Config { file: None, ..explicit.load(&[]).unwrap() };
    assert_eq!(explicit, Config { file: None, ..implicit.load(&[]).unwrap() });
}

/// The text with the settings in it that are commented out.
fn with_all(text: &str) -> String {
    let is_setting = |line: &str| {
        line.starts_with('[') || line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '))
    };
    let line = |line| match str::strip_prefix(line, "# ").filter(|line| is_setting(line)) {
        Some(line) => format!("{line}\n"),
        None => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

#[test]
fn the_configuration_of_the_containers_fits_to_what_they_are() {
    let (text, compose) = (include_str!("../dev/compose.toml"), include_str!("../docker-compose.yml"));
    let config = TempConfig::of(text).load(&[]).unwrap();

    let url = config.broker().unwrap().url.to_string();
    assert_eq!(url, "amqp://backhaul:***@rabbitmq:5672/%2f");
    let (name, store) = config.store(None).unwrap();
    assert_eq!(name.as_str(), "local");
    for path in [&config.worker.file_roots[0], store_path(store)] {
        assert!(compose.contains(&format!(":{}\n", path.display())), "{} is no volume", path.display());
    }
    let port = config.worker.health_listen.unwrap().port();
    for part in
        ["\n  rabbitmq:\n", "RABBITMQ_DEFAULT_USER: backhaul\n", &format!("/dev/tcp/127.0.0.1/{port} ")]
    {
        assert!(compose.contains(part), "{part:?} is not in docker-compose.yml");
    }

    if cfg!(feature = "ceph") {
        let config = TempConfig::of(&with_all(text)).load(&[]).unwrap();
        assert_eq!((config.stores.len(), config.store(None).unwrap().0.as_str()), (2, "local"));
        // Where docker-compose.yml puts it.
        assert_eq!(config.ceph["demo"].conf, Path::new("/etc/ceph/ceph.conf"));
        assert!(compose.contains("- ceph-conf:/etc/ceph:ro\n"));
    }
}

#[test]
fn the_example_loads_also_with_all_that_is_commented_out() {
    let example = include_str!("../dev/backhaul.example.toml");
    let config = TempConfig::of(example).load(&[]).unwrap();
    assert_eq!(config.store(None).unwrap().0.as_str(), "local");

    let all = with_all(example);
    let mut section = "";
    let mut settings = BTreeSet::new();
    for line in all.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        } else if let Some((key, _)) = line.split_once(" = ") {
            let section = match section.split_once('.') {
                Some((kind @ ("store" | "ceph"), _)) => format!("{kind}.NAME"),
                _ => section.into(),
            };
            settings.insert(format!("{section}.{key}"));
        }
    }
    assert_eq!(settings, SETTINGS.iter().map(ToString::to_string).collect());
    if cfg!(feature = "ceph") {
        TempConfig::of(&all.replace("amqp://", "amqps://")).load(&[]).unwrap();
    }
}
