//! Cinder's export records: taken in, given back, and refused where they cannot be used.

use backhaul::cinder::export_record::{self, Error, ExportRecord, Form};
use backhaul::error::Causes;
use backhaul::job::{Counts, Record, RecordState};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Map, Value, json};

const POSIX: &str = "cinder.backup.drivers.posix.PosixBackupDriver";
const S3: &str = "cinder.backup.drivers.s3.S3BackupDriver";
const SWIFT: &str = "cinder.backup.drivers.swift.SwiftBackupDriver";
const GCS: &str = "cinder.backup.drivers.gcs.GoogleBackupDriver";
const CEPH: &str = "cinder.backup.drivers.ceph.CephBackupDriver";

/// A store of the kind that the record is of, or would be.
fn form_for(service: &str) -> Form {
    match service {
        _ if service.contains("ceph") => Form::Images { pool: "backups".parse().unwrap() },
        _ if ["s3", "swift", "gcs"].iter().any(|name| service.contains(name)) => Form::Buckets,
        _ => Form::Files,
    }
}

fn import(service: &str, fields: &Value) -> Result<Record, Error> {
    export_record::import(&exported(service, fields), &form_for(service))
}

/// The fields of a backup as Cinder 29 exports them.
fn fields() -> Value {
    json!({
        "driver_info": {},
        "id": "5c214283-0223-4880-be46-c35800e47cfb",
        "user_id": "u1",
        "project_id": "p1",
        "volume_id": "f8b4904a-1d0e-404b-98d9-745e42c0b42f",
        "host": "node1",
        "availability_zone": "nova",
        "container": "5c/21/5c214283-0223-4880-be46-c35800e47cfb",
        "parent_id": null,
        "status": "available",
        "fail_reason": null,
        "size": 1,
        "display_name": "bk",
        "display_description": "bdesc",
        "service_metadata": "volume_f8b4904a-1d0e-404b-98d9-745e42c0b42f_20261121115849_backup_\
                             5c214283-0223-4880-be46-c35800e47cfb",
        "service": POSIX,
        "object_count": 7,
        "temp_volume_id": null,
        "temp_snapshot_id": null,
        "num_dependent_backups": 2,
        "snapshot_id": "60a51657-cb82-4205-a137-0846b1dad5ec",
        "data_timestamp": "2026-11-21T11:57:00Z",
        "restore_volume_id": "60a51657-cb82-4205-a137-0846b1dad5ec",
        "metadata": {"k": "v"},
        "encryption_key_id": null,
        "created_at": "2026-11-21T11:58:49Z",
        "updated_at": "2026-11-21T11:58:58Z",
        "deleted_at": null,
        "deleted": false
    })
}

fn fields_with(changes: Value) -> Value {
    let mut fields = fields();
    fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fields
}

/// The fields of a backup of an RBD volume as Cinder 29 exports them.
fn image_fields() -> Value {
    fields_with(json!({
        "service": CEPH,
        "service_metadata": "{\"base\": \"volume-f8b4904a-1d0e-404b-98d9-745e42c0b42f.backup.\
                             5c214283-0223-4880-be46-c35800e47cfb\"}",
        "container": "backups2",
        "object_count": 0,
        "snapshot_id": null,
    }))
}

fn image_fields_with(changes: Value) -> Value {
    let mut fields = image_fields();
    fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fields
}

fn exported(service: &str, fields: &Value) -> Vec<u8> {
    let url = BASE64_STANDARD.encode(fields.to_string());
    json!({ "backup_service": service, "backup_url": url }).to_string().into_bytes()
}

/// The fields in the text of an export record.
fn fields_of(text: &str) -> Map<String, Value> {
    let export: ExportRecord = serde_json::from_str(text).unwrap();
    serde_json::from_slice(&BASE64_STANDARD.decode(export.backup_url).unwrap()).unwrap()
}

fn own_record() -> Record {
    Record {
        backup_id: "5c214283-0223-4880-be46-c35800e47cfb".parse().unwrap(),
        volume_id: "f8b4904a-1d0e-404b-98d9-745e42c0b42f".parse().unwrap(),
        state: RecordState::Available,
        parent_id: Some("60a51657-cb82-4205-a137-0846b1dad5ec".parse().unwrap()),
        writer: String::new(),
        displaced_writer: None,
        revival_count: 0,
        checkpoint: None,
        job_id: Some("0d9ec0a5-2e4f-4f0c-8a0e-3f4d9f0f2b11".parse().unwrap()),
        service: POSIX.into(),
        service_metadata: "prefix".into(),
        container: "a/b".parse().unwrap(),
        name: Some("Größe \u{1f600}".into()),
        description: None,
        project_id: Some("p1".into()),
        created_at: "2026-11-21T11:58:49.987654Z".parse().unwrap(),
        volume_bytes: (3 << 30) + 1,
        method: None,
        counts: Counts { object_count: 12, ..Counts::default() },
        digest: Some("sha256-list:00".into()),
        object_digests: vec![("prefix_metadata".into(), "00".into())],
        source: None,
        image_id: None,
        fallback_reason: None,
        cinder_fields: Map::new(),
    }
}

#[test]
fn an_export_gives_back_what_an_import_took() {
    let unknown = json!({"a_field_of_a_later_cinder": [1, {"x": null}], "driver_info": {"y": 1}});
    let without_base =
        json!({"service_metadata": null, "snapshot_id": "60a51657-cb82-4205-a137-0846b1dad5ec"});
    let of_posix = [fields(), fields_with(unknown.clone())].map(|fields| (POSIX, fields));
    let of_ceph = [image_fields(), image_fields_with(unknown), image_fields_with(without_base)];
    for (service, fields) in of_posix.into_iter().chain(of_ceph.map(|fields| (CEPH, fields))) {
        let record = import(service, &fields).unwrap();

        assert_eq!(Value::Object(fields_of(&export_record::export(&record))), fields);
    }
}

#[test]
fn the_export_of_a_backup_of_a_year_before_our_era_can_be_read_again() {
    let record = import(POSIX, &fields_with(json!({"created_at": "-000044-03-15T12:00:00Z"}))).unwrap();

    let again = export_record::import(export_record::export(&record).as_bytes(), &form_for(POSIX)).unwrap();

    assert_eq!(again.created_at, record.created_at);
}

#[test]
fn a_record_of_cinder_becomes_one_of_ours() {
    let record = import(POSIX, &fields()).unwrap();

    assert_eq!(record.backup_id.to_string(), "5c214283-0223-4880-be46-c35800e47cfb");
    assert_eq!(record.volume_id.to_string(), "f8b4904a-1d0e-404b-98d9-745e42c0b42f");
    assert_eq!(record.parent_id, None);
    assert_eq!(record.state, RecordState::Available);
    assert_eq!(record.service, POSIX);
    assert_eq!(record.name.as_deref(), Some("bk"));
    assert_eq!(record.description.as_deref(), Some("bdesc"));
    assert_eq!(record.project_id.as_deref(), Some("p1"));
    assert_eq!(record.created_at.to_string(), "2026-11-21T11:58:49Z");
    assert_eq!(record.container.as_str(), "5c/21/5c214283-0223-4880-be46-c35800e47cfb");
}

#[test]
fn our_export_has_every_field_that_cinders_has() {
    let export = fields_of(&export_record::export(&own_record()));

    let names = |fields: &Map<String, Value>| fields.keys().cloned().collect::<Vec<_>>();
    let mut expected = names(fields().as_object().unwrap());
    expected.sort();
    let mut actual = names(&export);
    actual.sort();
    assert_eq!(actual, expected);
    assert_eq!(export["size"], 4, "whole GiB, rounded up");
    assert_eq!(export["object_count"], 12);
    assert_eq!(export["created_at"], "2026-11-21T11:58:49Z");
    assert_eq!(export["data_timestamp"], export["created_at"]);
    assert_eq!(export["parent_id"], "60a51657-cb82-4205-a137-0846b1dad5ec");
    assert_eq!(export["display_name"], "Größe \u{1f600}");
    assert_eq!(export["status"], "available");
}

#[rstest]
fn backups_that_are_files_are_taken_in(
    #[values("posix.PosixBackupDriver", "nfs.NFSBackupDriver", "glusterfs.GlusterfsBackupDriver")]
    class: &str,
    #[values(true, false)] with_class: bool,
) {
    let driver = if with_class { class } else { class.split('.').next().unwrap() };
    let service = format!("cinder.backup.drivers.{driver}");

    let record = import(&service, &fields_with(json!({ "service": service }))).unwrap();

    assert_eq!(record.service, service);
}

/// The fields of a backup in a bucket as Cinder 29 exports them.
fn bucket_fields_with(changes: Value) -> Value {
    let mut fields = fields_with(json!({
        "service": S3,
        "service_metadata": "volume_f8b4904a-1d0e-404b-98d9-745e42c0b42f/20261121115849/az_nova_backup_\
                             5c214283-0223-4880-be46-c35800e47cfb",
        "container": "volumebackups",
    }));
    fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    fields
}

#[rstest]
#[case::with_class(S3)]
#[case::module_only("cinder.backup.drivers.s3")]
#[case::swift(SWIFT)]
#[case::gcs(GCS)]
#[case::swift_module_only("cinder.backup.drivers.swift")]
fn backups_in_buckets_are_taken_in(#[case] service: &str) {
    let fields = bucket_fields_with(json!({ "service": service }));
    let record = import(service, &fields).unwrap();

    assert_eq!(record.service, service);
    assert_eq!(record.service_metadata, fields["service_metadata"].as_str().unwrap());
    assert_eq!(record.container.as_str(), "volumebackups");
}

#[rstest]
fn a_prefix_of_keys_that_leads_elsewhere_is_refused(
    #[values("../x", "a/../b", "/a", "a/", "a//b", ".backhaul/records", "a/.b", "a\\b", "")] prefix: &str,
) {
    let error = import(S3, &bucket_fields_with(json!({ "service_metadata": prefix }))).unwrap_err();
    assert!(error.to_string().contains("cannot be the prefix"), "{error}");
}

#[rstest]
#[case::with_class(CEPH)]
#[case::module_only("cinder.backup.drivers.ceph")]
fn backups_that_are_images_are_taken_in(#[case] service: &str) {
    let fields = image_fields_with(json!({ "service": service }));
    let record = import(service, &fields).unwrap();

    assert_eq!(record.service, service);
    assert_eq!(record.service_metadata, fields["service_metadata"].as_str().unwrap());
    assert_eq!(record.container.as_str(), "backups2");

    let nothing =
        image_fields_with(json!({ "service": service, "service_metadata": null, "container": null }));
    let record = import(service, &nothing).unwrap();

    assert_eq!((record.service_metadata.as_str(), record.container.as_str()), ("", "backups"));
}

#[rstest]
#[case::not_json("volume-f8b4904a-1d0e-404b-98d9-745e42c0b42f.backup.base")]
#[case::nothing("")]
#[case::no_base("{}")]
#[case::no_text(r#"{"base": null}"#)]
#[case::the_volume(r#"{"base": "volume-f8b4904a-1d0e-404b-98d9-745e42c0b42f"}"#)]
#[case::another_volume(r#"{"base": "volume-5c214283-0223-4880-be46-c35800e47cfb.backup.base"}"#)]
#[case::no_id(r#"{"base": "volume-f8b4904a-1d0e-404b-98d9-745e42c0b42f.backup.x"}"#)]
#[case::snapshot(r#"{"base": "volume-f8b4904a-1d0e-404b-98d9-745e42c0b42f.backup.base@a"}"#)]
#[case::another_pool(r#"{"base": "p/volume-f8b4904a-1d0e-404b-98d9-745e42c0b42f.backup.base"}"#)]
fn an_image_that_is_none_of_the_volumes_backups_is_refused(#[case] service_metadata: &str) {
    let fields = image_fields_with(json!({ "service_metadata": service_metadata }));

    let error = import(CEPH, &fields).unwrap_err();

    let text = error.to_string();
    assert!(text.contains(&format!("{service_metadata:?} cannot be used")), "{text}");
    assert!(text.contains(r#"{"base": "volume-f8b4904a-1d0e-404b-98d9-745e42c0b42f.backup.ID"}"#), "{text}");
}

#[rstest]
#[case::up("..")]
#[case::of_ceph(".mgr")]
#[case::nothing("")]
fn a_pool_that_cannot_be_one_is_refused(#[case] container: &str) {
    let error = import(CEPH, &image_fields_with(json!({ "container": container }))).unwrap_err();

    assert!(Causes(&error).to_string().contains("is no container name"), "{error}");
}

#[rstest]
#[case::images_into_files(CEPH, image_fields(), POSIX, "as files")]
#[case::files_into_images(POSIX, fields(), CEPH, "as RBD images")]
#[case::files_into_buckets(POSIX, fields(), S3, "as objects in buckets")]
#[case::containers_into_files(SWIFT, bucket_fields_with(json!({})), POSIX, "as files")]
#[case::objects_into_files(S3, bucket_fields_with(json!({})), POSIX, "as files")]
fn a_backup_is_not_taken_into_a_store_of_another_kind(
    #[case] service: &str,
    #[case] fields: Value,
    #[case] into: &str,
    #[case] says: &str,
) {
    let error = export_record::import(&exported(service, &fields), &form_for(into)).unwrap_err();

    let text = error.to_string();
    assert!(text.contains(&format!("{service:?} cannot be taken into this store")), "{text}");
    assert!(text.contains(says) && text.contains("--store"), "{text}");
}

#[rstest]
#[case::another_name("cinder.backup.drivers.gcs.GCSBackupDriver")]
#[case::another_class("cinder.backup.drivers.ceph.PosixBackupDriver")]
#[case::mixed("cinder.backup.drivers.posix.NFSBackupDriver")]
#[case::longer("cinder.backup.drivers.posix.PosixBackupDriver.x")]
#[case::elsewhere("posix")]
#[case::nothing("")]
fn backups_of_other_drivers_are_refused_with_the_names_of_those_that_are_not(#[case] service: &str) {
    let error = import(service, &fields_with(json!({ "service": service }))).unwrap_err();

    let text = error.to_string();
    assert!(text.contains(&format!("{service:?}")), "{text}");
    assert!([POSIX, S3, SWIFT, GCS, CEPH].iter().all(|known| text.contains(known)), "{text}");
}

#[rstest]
#[case::id("id", json!("../../etc"), "is no backup id")]
#[case::id_null("id", Value::Null, "has no id")]
#[case::id_number("id", json!(7), "id is not a text")]
#[case::volume("volume_id", json!("f8b4904a1d0e404b98d9745e42c0b42f"), "is no volume id")]
#[case::volume_null("volume_id", Value::Null, "has no volume_id")]
#[case::parent("parent_id", json!("none"), "is no backup id")]
#[case::container_up("container", json!("a/../../b"), "is no container name")]
#[case::container_root("container", json!("/etc"), "is no container name")]
#[case::container_records("container", json!(".backhaul/records"), "is no container name")]
#[case::container_null("container", Value::Null, "has no container")]
#[case::prefix_up("service_metadata", json!("../x"), "cannot be the prefix")]
#[case::prefix_folder("service_metadata", json!("a/b"), "cannot be the prefix")]
#[case::prefix_hidden("service_metadata", json!(".tmp"), "cannot be the prefix")]
#[case::prefix_zero("service_metadata", json!("a\u{0}b"), "cannot be the prefix")]
#[case::prefix_empty("service_metadata", json!(""), "cannot be the prefix")]
#[case::prefix_long("service_metadata", json!("x".repeat(181)), "cannot be the prefix")]
#[case::prefix_null("service_metadata", Value::Null, "has no service_metadata")]
#[case::time("created_at", json!("yesterday"), "is no time")]
#[case::time_before_all("created_at", json!("-009999-01-02T01:59:58.999999Z"), "longer ago")]
#[case::time_null("created_at", Value::Null, "has no created_at")]
#[case::status("status", json!("error"), "only one that was available")]
#[case::service("service", json!("cinder.backup.drivers.nfs"), "but the backup in it is of")]
fn a_field_that_cannot_be_used_is_named(#[case] field: &str, #[case] value: Value, #[case] says: &str) {
    let error = import(POSIX, &fields_with(json!({ field: value }))).unwrap_err();

    let text = Causes(&error).to_string();
    assert!(text.contains(says), "{text}");
}

#[rstest]
fn a_field_that_cinder_needs_must_be_there(
    #[values(
        "display_name",
        "display_description",
        "container",
        "size",
        "service_metadata",
        "object_count",
        "id",
        "volume_id",
        "created_at"
    )]
    field: &str,
) {
    let mut fields = fields();
    fields.as_object_mut().unwrap().remove(field);

    let error = import(POSIX, &fields).unwrap_err();

    assert_eq!(error.to_string(), format!("the export record has no {field}"));
}

#[rstest]
#[case::nothing("", "a JSON object with backup_service and backup_url")]
#[case::a_list("[]", "a JSON object with backup_service and backup_url")]
#[case::half(r#"{"backup_service": "cinder.backup.drivers.posix"}"#, "missing field `backup_url`")]
#[case::no_base64(r#"{"backup_service": "cinder.backup.drivers.posix", "backup_url": "e30"}"#, "not base64")]
#[case::no_json(r#"{"backup_service": "cinder.backup.drivers.posix", "backup_url": "e30x"}"#, "as JSON")]
#[case::no_text(r#"{"backup_service": "cinder.backup.drivers.posix", "backup_url": "/////w=="}"#, "as JSON")]
#[case::no_object(r#"{"backup_service": "cinder.backup.drivers.posix", "backup_url": "W10="}"#, "as JSON")]
fn a_text_that_is_no_export_record_is_refused(#[case] text: &str, #[case] says: &str) {
    let error = export_record::import(text.as_bytes(), &Form::Files).unwrap_err();

    let text = Causes(&error).to_string();
    assert!(text.contains(says), "{text}");
}

#[test]
fn a_text_longer_than_any_record_is_refused_before_it_is_looked_at() {
    let fields = fields_with(json!({ "metadata": {"k": "v".repeat(1 << 20)} }));

    let error = import(POSIX, &fields).unwrap_err();

    assert!(error.to_string().contains("none has more than 1048576"), "{error}");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map(".{0,5}", inner, 0..3).prop_map(|map| json!(map)),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_make_an_import_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        export_record::import(&bytes, &Form::Files).ok();
        let export =
            ExportRecord { backup_service: POSIX.into(), backup_url: BASE64_STANDARD.encode(&bytes) };
        export_record::decode(export, &Form::Files).ok();
    }

    /// Whatever stands in a field: it is refused, or comes back as it was.
    #[test]
    fn no_field_is_lost_or_makes_an_import_panic(which in 0usize..29, value in any_json(), of_image: bool) {
        let name = fields().as_object().unwrap().keys().nth(which).unwrap().clone();
        let change = json!({ name.as_str(): value });
        let (service, fields) =
            if of_image { (CEPH, image_fields_with(change)) } else { (POSIX, fields_with(change)) };

        if let Ok(record) = import(service, &fields) {
            let mut expected = fields;
            // Null says the same as the value that is written for it.
            for (name, value) in [("service", service), ("status", "available")] {
                expected[name] = json!(value);
            }
            if expected["container"].is_null() {
                expected["container"] = json!("backups");
            }
            prop_assert_eq!(Value::Object(fields_of(&export_record::export(&record))), expected);
        }
    }
}
