//! Our worker in the place of cinder-backup, beside the rest of a real Cinder: `cargo nextest run -E 'test(openstack::)'`.

use std::collections::{BTreeMap, BTreeSet};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use rstest::rstest;
use serde_json::{Value, json};

use crate::support::ceph::Ceph;
use crate::support::openstack::{
    Ceilometer, Openstack, assert_holds, backhaul_beside_cinder, image, run, text,
};
use crate::support::oslo::Oslo;
use crate::support::stack::{noise, until};
use crate::support::swift;

const MIB: usize = 1 << 20;

#[rstest]
fn a_volume_is_backed_up_restored_and_its_backups_deleted(
    #[values("ceph", "posix", "s3", "swift")] driver: &str,
) {
    let (ceph, mut openstack, _worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);

    image.write(&[(0, &noise(1, 3 * MIB)), (500 << 20, &noise(2, MIB))]);
    let first = ceph.content(image.spec());
    let full = openstack.backup(&volume, &[]);
    assert_eq!((&full["status"], &full["size"]), (&json!("available"), &json!(1)), "{full}");
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    image.write(&[(MIB as u64, &noise(3, MIB))]);
    image.discard(500 << 20, 1 << 20);
    let second = ceph.content(image.spec());
    let incremental = openstack.backup(&volume, &["--incremental"]);
    assert_eq!(incremental["status"], "available", "{incremental}");
    assert_eq!(incremental["parent_id"], full["id"], "{incremental}");
    let (full_id, incremental_id) = (text(&full["id"]), text(&incremental["id"]));
    assert_eq!(openstack.ok(&["show", &full_id])["num_dependent_backups"], 1);
    match driver {
        "ceph" => {
            let base = format!("{{\"base\": \"volume-{volume}.backup.{full_id}\"}}");
            for backup in [&full, &incremental] {
                assert_eq!((&backup["container"], &backup["object_count"]), (&json!("backups"), &json!(0)));
                assert_eq!(backup["service_metadata"], base);
            }
        }
        "s3" | "swift" => {
            for backup in [&full, &incremental] {
                assert_eq!(backup["container"], openstack.name());
                let (id, prefix) = (text(&backup["id"]), text(&backup["service_metadata"]));
                assert!(prefix.starts_with(&format!("volume_{volume}/")), "{prefix}");
                assert!(prefix.ends_with(&format!("/az_{}_backup_{id}", openstack.name())), "{prefix}");
                let objects = openstack.objects(driver);
                let of_backup: Vec<_> = objects.iter().filter(|name| name.starts_with(&prefix)).collect();
                assert!(objects.contains(&format!("{prefix}_metadata")), "{objects:?}");
                // Besides those with data there are its two lists.
                assert_eq!(backup["object_count"], of_backup.len() - 2, "{of_backup:?}");
            }
        }
        _ => {
            let folder = format!("{}/{}/{full_id}", &full_id[..2], &full_id[2..4]);
            assert_eq!(full["container"], folder);
            let prefix = text(&full["service_metadata"]);
            assert!(openstack.backups().join(folder).join(format!("{prefix}_metadata")).exists());
            assert!(full["object_count"].as_u64().unwrap() >= 2, "{full}");
        }
    }

    for (backup, content) in [(&full_id, &first), (&incremental_id, &second)] {
        let restored = openstack.restore(&[backup]);
        assert_holds(&ceph, &restored, content);
        // It was called restore_backup_….
        assert_eq!(restored["display_name"], "a volume");
        let metadata = openstack.ok(&["volume-metadata", &text(&restored["id"])]);
        assert_eq!(metadata["src_backup_id"], *backup);
        assert_eq!(openstack.ok(&["show", backup])["status"], "available");
        openstack.ok(&["delete-volume", &text(&restored["id"])]);
    }
    let restored = openstack.restore(&[&full_id, &volume]);
    assert_holds(&ceph, &restored, &first);

    assert_eq!(openstack.ok(&["usage"]), json!({ "backups": 2, "backup_gigabytes": 2 }));
    let export = openstack.ok(&["export", &incremental_id]);
    assert_eq!(export["backup_service"], incremental["service"]);
    for backup in [&incremental_id, &full_id] {
        let deleted = openstack.delete(backup);
        assert_eq!((&deleted["status"], &deleted["deleted"]), (&json!("deleted"), &json!(true)), "{deleted}");
    }
    assert_eq!(ceph.names_with("backups", &[&volume, &full_id, &incremental_id]), [""; 0]);
    if ["s3", "swift"].contains(&driver) {
        assert_eq!(openstack.objects(driver), [""; 0]);
    }
    assert_eq!(ceph.rbd(&["snap", "ls", image.spec()]), "", "snapshots of backups stay on the volume");
    assert_eq!(openstack.ok(&["usage"]), json!({ "backups": 0, "backup_gigabytes": 0 }));
    assert_eq!(openstack.ok(&["delete-volume", &volume])["status"], "deleted");
}

#[rstest]
fn cinders_own_service_goes_on_where_we_stopped_and_we_where_it_stopped(
    #[values("ceph", "posix", "nfs", "s3", "swift", "swift of users")] driver: &str,
) {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    match driver {
        "nfs" => openstack.mount_share(),
        "swift of users" => openstack.log_in(),
        _ => {}
    }
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    let mut points = Vec::new();
    let mut next = |openstack: &mut Openstack, options: &[&str]| {
        image.write(&[(points.len() as u64 * 8 * MIB as u64, &noise(points.len() as u64, MIB))]);
        let backup = openstack.backup(&volume, options);
        assert_eq!(backup["status"], "available", "{backup}");
        points.push((text(&backup["id"]), ceph.content(image.spec())));
    };

    let backhaul = openstack.backhaul(driver, ceph.conf());
    next(&mut openstack, &[]);
    next(&mut openstack, &["--incremental"]);
    backhaul.stop();
    let cinder = openstack.cinder_backup(driver, ceph.conf());
    next(&mut openstack, &["--incremental"]);
    cinder.stop();
    let backhaul = openstack.backhaul(driver, ceph.conf());
    next(&mut openstack, &["--incremental"]);

    for (backup, content) in &points {
        let restored = openstack.restore(&[backup]);
        assert_holds(&ceph, &restored, content);
        // It was called restore_backup_…, and whoever made the backup has kept what its volume was called.
        assert_eq!(restored["display_name"], "a volume", "{backup}");
    }
    backhaul.stop();
    let cinder = openstack.cinder_backup(driver, ceph.conf());
    for (backup, content) in &points {
        assert_holds(&ceph, &openstack.restore(&[backup]), content);
    }
    // The last one is ours, the one before it Cinder's.
    assert_eq!(openstack.delete(&points[3].0)["status"], "deleted");
    if ["ceph", "posix"].contains(&driver) {
        // As `cinder-manage db purge` does it after some time.
        for (table, column) in [("backup_metadata", "backup_id"), ("backups", "id")] {
            openstack.sql(&format!("DELETE FROM {table} WHERE {column} = '{}'", points[3].0));
        }
    }
    cinder.stop();
    let _backhaul = openstack.backhaul(driver, ceph.conf());
    for (backup, _) in points[..3].iter().rev() {
        let deleted = openstack.delete(backup);
        assert_eq!(deleted["status"], "deleted", "{deleted}");
    }
}

#[rstest]
fn a_backup_that_cinders_own_service_was_handed_in_the_middle_is_used_and_deleted(
    #[values("ceph", "posix")] driver: &str,
) {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 2 * MIB))]);
    let full = text(&openstack.backup(&volume, &[])["id"]);
    image.write(&[(MIB as u64, &noise(2, 24 * MIB))]);
    image.slow_down(2 << 20);
    let handed_on = openstack.begin_backup(&volume, &["--incremental"]);
    // Then there is a record of it.
    until("its snapshot is there", || ceph.rbd(&["snap", "ls", image.spec()]).contains(&handed_on));
    drop(worker);
    image.hurry();
    let cinder = openstack.cinder_backup(driver, ceph.conf());
    // It gives up what was left first, and is then handed the message.
    until("Cinder has made it", || openstack.ok(&["show", &handed_on])["status"] == "available");
    let content = ceph.content(image.spec());
    cinder.stop();

    let worker = openstack.backhaul(driver, ceph.conf());
    image.write(&[(40 << 20, &noise(3, MIB))]);
    let next = openstack.backup(&volume, &["--incremental"]);
    assert_eq!(next["status"], "available", "{next}\n{}", worker.log());
    assert_eq!(next["parent_id"], handed_on, "{next}\n{}", worker.log());
    assert_holds(&ceph, &openstack.restore(&[&handed_on]), &content);
    let next = text(&next["id"]);
    assert_holds(&ceph, &openstack.restore(&[&next]), &ceph.content(image.spec()));

    for backup in [&next, &handed_on, &full] {
        let deleted = openstack.delete(backup);
        assert_eq!(deleted["status"], "deleted", "{deleted}\n{}", worker.log());
        assert!(!openstack.files().iter().any(|path| path.contains(backup)), "{:?}", openstack.files());
    }
    assert_eq!(ceph.names_with("backups", &[&volume, &full, &handed_on, &next]), [""; 0]);
    assert_eq!(ceph.rbd(&["snap", "ls", image.spec()]), "", "snapshots of backups stay on the volume");
}

#[test]
fn a_users_token_that_is_good_no_more_ends_the_request_and_not_the_worker() {
    let (ceph, mut openstack, _worker) = backhaul_beside_cinder("swift of users");
    let volume = openstack.volume();
    image(&ceph, &volume).write(&[(0, &noise(1, MIB))]);
    let content = ceph.content(image(&ceph, &volume).spec());
    openstack.log_in();
    let backup = text(&openstack.backup(&volume, &[])["id"]);
    let account = run(swift::token(&swift::url())).1;
    openstack.ok(&["log-in", "AUTH_tk_of_yesterday", &account]);

    let failed = openstack.backup(&volume, &[]);
    assert_eq!(failed["status"], "error", "{failed}");
    assert!(text(&failed["fail_reason"]).contains("token"), "{failed}");
    let created = json!([["ERROR", "VOLUME_VOLUME_BACKUP_013_020"]]);
    until("its user is told", || openstack.ok(&["messages", &text(&failed["id"])]) == created);
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    assert_eq!(openstack.restore(&[&backup])["status"], "error_restoring");
    let undeleted = openstack.delete(&backup);
    assert_eq!(undeleted["status"], "error", "{undeleted}");
    let told =
        ["VOLUME_VOLUME_BACKUP_014_025", "VOLUME_VOLUME_BACKUP_015_026"].map(|event| json!(["ERROR", event]));
    until("its user is told", || {
        let messages = openstack.ok(&["messages", &backup]);
        let messages = messages.as_array().unwrap();
        messages.len() == 2 && told.iter().all(|one| messages.contains(one))
    });

    openstack.log_in();
    openstack.ok(&["reset", &backup, "available"]);
    assert_holds(&ceph, &openstack.restore(&[&backup]), &content);
    for backup in [&backup, &text(&failed["id"])] {
        assert_eq!(openstack.delete(backup)["status"], "deleted");
    }
}

#[rstest]
fn a_backup_goes_on_when_its_worker_was_killed(#[values("ceph", "posix")] driver: &str) {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 24 * MIB))]);
    let content = ceph.content(image.spec());
    image.slow_down(2 << 20);

    let backup = openstack.begin_backup(&volume, &[]);
    until("the backup has begun", || worker.log().contains("started method"));
    drop(worker);
    assert_eq!(openstack.ok(&["show", &backup])["status"], "creating");
    image.hurry();
    let _worker = openstack.backhaul(driver, ceph.conf());

    let made = openstack.ok(&["settled", &backup]);
    assert_eq!(made["status"], "available", "{made}");
    assert_holds(&ceph, &openstack.restore(&[&backup]), &content);
    if driver == "ceph" {
        let snapshots = ceph.rbd(&["snap", "ls", image.spec()]);
        assert_eq!(snapshots.matches("backup.").count(), 1, "{snapshots}");
        return;
    }
    let (folder, prefix) =
        (openstack.backups().join(text(&made["container"])), text(&made["service_metadata"]));
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name.starts_with(&prefix), "{name} is left of the worker that was killed");
    }
}

#[rstest]
fn a_restore_goes_on_when_its_worker_was_killed_or_told_to_stop(#[values(true, false)] killed: bool) {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let (volume, target) = (openstack.volume(), openstack.volume());
    image(&ceph, &volume).write(&[(0, &noise(1, 24 * MIB))]);
    let content = ceph.content(image(&ceph, &volume).spec());
    let backup = text(&openstack.backup(&volume, &[])["id"]);
    // Longer than a worker that is to stop goes on with it.
    image(&ceph, &target).slow_down(1 << 18);
    openstack.ok(&["restore", &backup, &target]);
    until("the restore has begun", || worker.log().matches("started method").count() == 2);

    match killed {
        true => drop(worker),
        false => worker.stop(),
    }
    assert_eq!(openstack.ok(&["show", &backup])["status"], "restoring");
    image(&ceph, &target).hurry();
    let _worker = openstack.backhaul("posix", ceph.conf());

    until("the restore has ended", || openstack.ok(&["volume", &target])["status"] != "restoring-backup");
    assert_holds(&ceph, &openstack.ok(&["volume", &target]), &content);
    assert_eq!(openstack.ok(&["settled", &backup])["status"], "available");
}

#[test]
fn a_backup_that_cannot_be_made_says_why_and_gives_its_volume_back() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let mut listener = openstack.listen();
    let _worker = openstack.backhaul("ceph", ceph.conf());
    let volume = openstack.volume();
    let spec = format!("volumes/volume-{volume}");
    ceph.rbd(&["mv", &spec, &format!("{spec}-hidden")]);

    let failed = openstack.backup(&volume, &[]);

    assert_eq!(failed["status"], "error", "{failed}");
    assert!(text(&failed["fail_reason"]).contains(&volume), "{failed}");
    let released = openstack.ok(&["volume", &volume]);
    assert_eq!(
        (&released["status"], &released["previous_status"]),
        (&json!("available"), &json!("error_backing-up"))
    );
    assert_eq!(openstack.delete(&text(&failed["id"]))["status"], "deleted");
    let told = listener_hears(&mut listener, "backup.delete.end");
    let events: Vec<String> = told.iter().map(|told| text(&told["event_type"])).collect();
    let (start, error) = ("backup.create.start", "backup.create.error");
    assert_eq!(events, [start, error, "backup.delete.start", "backup.delete.end"]);
    assert_eq!(told[1]["priority"], "error");
    assert_eq!(told[1]["payload"]["status"], "error");
    assert_eq!(told[1]["payload"]["fail_reason"], failed["fail_reason"]);
    assert!(text(&told[1]["payload"]["message"]).contains(&volume), "{}", told[1]);
}

#[test]
fn a_restore_that_nobody_wants_any_more_ends() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let (volume, target) = (openstack.volume(), openstack.volume());
    image(&ceph, &volume).write(&[(0, &noise(1, 32 * MIB))]);
    let backup = text(&openstack.backup(&volume, &[])["id"]);
    image(&ceph, &target).slow_down(1 << 20);

    openstack.ok(&["restore", &backup, &target]);
    until("the restore has begun", || worker.log().matches("started method").count() == 2);
    openstack.ok(&["reset", &backup, "available"]);

    until("the restore has ended", || openstack.ok(&["volume", &target])["status"] != "restoring-backup");
    assert_eq!(openstack.ok(&["volume", &target])["status"], "error");
    assert_eq!(openstack.ok(&["show", &backup])["status"], "available");
}

#[test]
fn an_exported_backup_is_taken_in_again_and_restored() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let volume = openstack.volume();
    image(&ceph, &volume).write(&[(0, &noise(1, 3 * MIB))]);
    let content = ceph.content(image(&ceph, &volume).spec());
    let backup = openstack.backup(&volume, &[]);
    let id = text(&backup["id"]);
    let export = openstack.ok(&["export", &id]);
    // The first one that is asked has another driver, and passes it on.
    let another = Openstack::shared();
    let _another_worker = another.backhaul("ceph", ceph.conf());
    let host = openstack.host().to_owned();
    let (service, record) = (text(&export["backup_service"]), text(&export["backup_url"]));
    let import = ["import", &service, &record, &host, another.host()];
    assert_eq!(openstack.ask(&import).unwrap_err()["error"], "InvalidBackup", "its row is there");

    // Cinder has no way to lose a row alone: the objects are put aside meanwhile.
    let (folder, aside) =
        (openstack.backups().join(text(&backup["container"])), openstack.backups().join("aside"));
    assert!(std::process::Command::new("cp").arg("-r").args([&folder, &aside]).status().unwrap().success());
    assert_eq!(openstack.delete(&id)["status"], "deleted");
    assert!(!folder.exists());
    std::fs::create_dir_all(folder.parent().unwrap()).unwrap();
    std::fs::rename(aside, folder).unwrap();
    openstack.ok(&import);

    let imported = openstack.ok(&["settled", &id]);
    assert_eq!(imported["status"], "available", "{imported}\n{}", worker.log());
    for column in ["volume_id", "container", "size", "object_count", "service", "service_metadata"] {
        assert_eq!(imported[column], backup[column], "{column}");
    }
    assert_holds(&ceph, &openstack.restore(&[&id]), &content);

    // What cannot be taken in is told in Cinder's words.
    let mut fields: Value = serde_json::from_slice(&BASE64_STANDARD.decode(&record).unwrap()).unwrap();
    for missing in ["display_name", "object_count"] {
        fields.as_object_mut().unwrap().remove(missing);
    }
    let incomplete = uuid::Uuid::new_v4().to_string();
    fields["id"] = incomplete.as_str().into();
    openstack.ok(&["import", &service, &BASE64_STANDARD.encode(fields.to_string()), &host]);
    let other = text(&openstack.ok(&["abandon", &volume, &host])["id"]);
    let object = json!({ "versioned_object.name": "Backup", "versioned_object.version": "1.7",
        "versioned_object.namespace": "cinder", "versioned_object.data": { "id": other, "volume_id": volume } });
    openstack.oslo().must(&json!({ "do": "cast", "topic": "cinder-backup", "server": host, "version": "2.0",
        "method": "import_record", "context": {},
        "args": { "backup": object, "backup_service": service, "backup_url": record, "backup_hosts": [] } }));
    for (backup, reason) in [
        (
            &incomplete,
            "Driver successfully decoded imported backup data, but there are missing fields (display_name, object_count)."
                .to_owned(),
        ),
        (&other, format!("Trying to import backup metadata from id {id} into backup {other}.")),
    ] {
        let refused = openstack.ok(&["settled", backup]);
        assert_eq!((&refused["status"], &refused["fail_reason"]), (&json!("error"), &json!(reason)));
    }
}

#[rstest]
fn an_exported_chain_is_taken_in_again_and_restored_when_its_rows_are_gone(
    #[values("ceph", "posix")] driver: &str,
) {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    let mut points = Vec::new();
    for (round, options) in [(0, &[][..]), (1, &["--incremental"])] {
        image.write(&[(round * MIB as u64, &noise(round, 2 * MIB))]);
        let backup = openstack.backup(&volume, options);
        assert_eq!(backup["status"], "available", "{backup}");
        let export = openstack.ok(&["export", &text(&backup["id"])]);
        points.push((backup, export, ceph.content(image.spec())));
    }
    for (backup, ..) in &points {
        let id = text(&backup["id"]);
        openstack.sql(&format!("DELETE FROM backup_metadata WHERE backup_id = '{id}'"));
        openstack.sql(&format!("DELETE FROM backups WHERE id = '{id}'"));
        assert_eq!(openstack.ask(&["show", &id]).unwrap_err()["error"], "BackupNotFound");
    }

    let host = openstack.host().to_owned();
    for (backup, export, _) in &points {
        openstack.ok(&["import", &text(&export["backup_service"]), &text(&export["backup_url"]), &host]);
        let imported = openstack.ok(&["settled", &text(&backup["id"])]);
        assert_eq!(imported["status"], "available", "{imported}\n{}", worker.log());
        for column in ["volume_id", "parent_id", "container", "size", "service", "service_metadata"] {
            assert_eq!(imported[column], backup[column], "{column}");
        }
    }

    for (backup, _, content) in points.iter().rev() {
        let id = text(&backup["id"]);
        assert_holds(&ceph, &openstack.restore(&[&id]), content);
        assert_eq!(openstack.delete(&id)["status"], "deleted");
    }
}

/// Cinder's own driver for Ceph refuses that.
#[rstest]
fn a_backup_that_is_deleted_by_force_while_it_is_made_leaves_nothing(
    #[values("ceph", "posix")] driver: &str,
) {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 32 * MIB))]);
    image.slow_down(1 << 20);

    let backup = openstack.begin_backup(&volume, &[]);
    until("the backup has begun", || worker.log().contains("started method"));
    openstack.ok(&["delete", &backup, "--force"]);

    let deleted = openstack.ok(&["settled", &backup]);
    assert_eq!(deleted["status"], "deleted", "{deleted}\n{}", worker.log());
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    assert_eq!(ceph.names_with("backups", &[&volume, &backup]), [""; 0]);
    assert_eq!(ceph.rbd(&["snap", "ls", image.spec()]), "", "a snapshot of the backup stays on the volume");
    assert!(!openstack.files().iter().any(|path| path.contains(&backup)), "{:?}", openstack.files());
}

/// Hears notifications up to the first one with this `event_type`.
fn listener_hears(listener: &mut Oslo, last: &str) -> Vec<Value> {
    let mut heard = Vec::new();
    while heard.last().is_none_or(|told: &Value| told["event_type"] != last) {
        heard.push(listener.told());
    }
    heard
}

/// What the values of an object are, by their names.
fn shape(object: &Value) -> BTreeMap<String, &'static str> {
    let kind = |value: &Value| match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    };
    object.as_object().unwrap().iter().map(|(name, value)| (name.clone(), kind(value))).collect()
}

/// Whether it says that a status was reset, for which Ceilometer has no meter.
fn is_reset(told: &Value) -> bool {
    told["event_type"] == "backup.reset_status.end"
}

/// What Ceilometer has made of a notification, but for what is in it.
fn kinds(made: &Value) -> Value {
    let samples = made["samples"].as_array().unwrap().iter();
    let samples: Vec<_> = samples.map(|sample| [&sample["name"], &sample["type"], &sample["unit"]]).collect();
    let traits = made["event"]["traits"].as_array().unwrap().iter();
    json!([samples, traits.map(|one| &one[0]).collect::<Vec<_>>()])
}

#[rstest]
fn who_listens_hears_of_us_what_they_hear_of_cinders_own_service(#[values("ceph", "posix")] driver: &str) {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let mut listener = openstack.listen();
    let volume = openstack.volume();
    image(&ceph, &volume).write(&[(0, &noise(1, 3 * MIB))]);
    let mut heard_of = |openstack: &mut Openstack| {
        let backup = openstack.backup(&volume, &[]);
        assert_eq!(backup["status"], "available", "{backup}");
        let id = text(&backup["id"]);
        let restored = openstack.restore(&[&id]);
        assert_eq!(restored["status"], "available", "{restored}");
        let mut told = listener_hears(&mut listener, "backup.restore.end");
        openstack.ok(&["reset", &id, "available"]);
        told.extend(listener_hears(&mut listener, "backup.reset_status.end"));
        openstack.delete(&id);
        told.extend(listener_hears(&mut listener, "backup.delete.end"));
        for told in &told {
            assert_eq!(told["payload"]["backup_id"], backup["id"], "{told}");
            assert_eq!(told["payload"]["tenant_id"], backup["project_id"], "{told}");
            assert_eq!(told["context"]["auth_token"], Value::Null);
        }
        told
    };

    let backhaul = openstack.backhaul(driver, ceph.conf());
    let ours = heard_of(&mut openstack);
    backhaul.stop();
    let cinder = openstack.cinder_backup(driver, ceph.conf());
    let theirs = heard_of(&mut openstack);
    cinder.stop();

    let mut ceilometer = Ceilometer::start();
    for told in &ours {
        let made = ceilometer.makes_of(told);
        let size = &made["samples"][0];
        assert_eq!(made["samples"].as_array().unwrap().len(), usize::from(!is_reset(told)), "{told}: {made}");
        if !is_reset(told) {
            let payload = &told["payload"];
            assert_eq!((&size["name"], &size["volume"]), (&json!("backup.size"), &json!(1)), "{made}");
            assert_eq!(size["resource_id"], payload["backup_id"], "{made}");
            assert_eq!(size["project_id"], payload["tenant_id"], "{made}");
            assert_eq!(size["resource_metadata"]["display_name"], "a backup", "{made}");
        }
        let theirs = theirs.iter().find(|theirs| theirs["event_type"] == told["event_type"]);
        if let Some(theirs) = theirs {
            let theirs = ceilometer.makes_of(theirs);
            assert_eq!(kinds(&made), kinds(&theirs), "{told}");
        }
    }

    // How far it is both tell as often as the clock says.
    let is_progress = |told: &&Value| text(&told["event_type"]).ends_with("progress");
    let events = |all: &[Value]| -> Vec<String> {
        all.iter().filter(|told| !is_progress(told)).map(|told| text(&told["event_type"])).collect()
    };
    assert_eq!(events(&ours), events(&theirs));
    assert_eq!(events(&ours).len(), 7, "{:?}", events(&ours));
    for (ours, theirs) in
        ours.iter().filter(|told| !is_progress(told)).zip(theirs.iter().filter(|told| !is_progress(told)))
    {
        let event = &ours["event_type"];
        assert_eq!(shape(&ours["payload"]), shape(&theirs["payload"]), "{event}");
        assert_eq!(shape(&ours["metadata"]), shape(&theirs["metadata"]), "{event}");
        let names =
            |told: &Value| told["context"].as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(ours), names(theirs), "{event}");
        for same in ["publisher_id", "priority"] {
            assert_eq!(ours[same], theirs[same], "{event}");
        }
        for same in
            ["host", "availability_zone", "status", "size", "service", "volume_id", "num_dependent_backups"]
        {
            assert_eq!(ours["payload"][same], theirs["payload"][same], "{same} of {event}");
        }
    }
    let last =
        |all: &[Value]| all.iter().rfind(|told| told["event_type"] == "backup.createprogress").cloned();
    let ours = last(&ours).unwrap();
    assert_eq!(ours["payload"]["backup_percent"], 100);
    if driver == "posix" {
        let (ours, mut theirs) = (shape(&ours["payload"]), shape(&last(&theirs).unwrap()["payload"]));
        for of_the_driver in ["id", "list", "prefix", "volume_meta"] {
            assert!(theirs.remove(of_the_driver).is_some(), "{of_the_driver}");
        }
        assert!(ours.keys().eq(theirs.keys()), "{ours:?}\n{theirs:?}");
    }
}

#[test]
fn how_far_a_backup_and_a_restore_are_is_told_meanwhile() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let mut listener = openstack.listen();
    let _worker = openstack.backhaul("posix", ceph.conf());
    let (volume, target) = (openstack.volume(), openstack.volume());
    for place in 0..8 {
        image(&ceph, &volume).write(&[(place << 27, &noise(place, 3 * MIB))]);
    }
    for slow in [&volume, &target] {
        image(&ceph, slow).slow_down(4 << 20);
    }

    let backup = text(&openstack.backup(&volume, &[])["id"]);
    openstack.restore(&[&backup, &target]);

    for (event, name, end) in [
        ("backup.createprogress", "backup_percent", "backup.create.end"),
        ("backup.restoreprogress", "restore_percent", "backup.restore.end"),
    ] {
        let told = listener_hears(&mut listener, end);
        let of_progress = told.iter().filter(|told| told["event_type"] == event);
        let percent: Vec<u64> = of_progress.map(|told| told["payload"][name].as_u64().unwrap()).collect();
        assert!(percent.is_sorted() && percent.last() == Some(&100), "{percent:?}");
        assert!(percent.iter().any(|percent| (1..100).contains(percent)), "{percent:?}");
    }
}

#[test]
fn how_much_is_logged_is_asked_for_and_changed_while_we_work() {
    let (_ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let host = openstack.host().to_owned();
    let levels = openstack.ok(&["get-log", &host]);
    assert_eq!((&levels["cinder.backup.manager"], &levels["sqlalchemy"]), (&json!("INFO"), &json!("INFO")));
    assert!(!worker.log().contains("DEBUG"));

    openstack.ok(&["set-log", &host, "debug", "cinder.backup"]);

    let levels = openstack.ok(&["get-log", &host, "cinder"]);
    let expected = ["cinder.backup.manager", "cinder.backup.drivers", "cinder.db"];
    assert!(expected.iter().all(|name| levels[name] == "DEBUG"), "{levels}");
    assert_eq!(levels.get("sqlalchemy"), None);
    assert_eq!(openstack.ok(&["get-log", &host, "sql"]), json!({ "sqlalchemy": "INFO" }));
    openstack.ok(&["set-log", &host, "ERROR"]);
    assert_eq!(openstack.ok(&["get-log", &host, "cinder.rpc"]), json!({ "cinder.rpc": "ERROR" }));
    let log = worker.log();
    openstack.volume();
    openstack.ok(&["set-log", &host, "Info"]);
    let refused = openstack.ask(&["set-log", &host, "loud"]).unwrap_err();
    assert_eq!(refused["error"], "InvalidInput_Remote");
    assert!(text(&refused["message"]).contains("loud is not a valid log level."), "{refused}");
    assert!(worker.log()[log.len()..].contains("log level changed"), "{}", worker.log());
}

#[test]
fn what_a_worker_has_left_that_died_is_put_right_unless_its_message_comes_again() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let (volume, first, second) = (openstack.volume(), openstack.volume(), openstack.volume());
    image(&ceph, &volume).write(&[(0, &noise(1, 64 * MIB))]);
    let ids: Vec<String> = (0..3).map(|_| text(&openstack.backup(&volume, &[])["id"])).collect();
    let [deleting, restoring, at_work] = &ids[..] else { panic!() };
    image(&ceph, &first).slow_down(1 << 18);
    openstack.ok(&["restore", at_work, &first]);
    until("the restore has begun", || worker.log().matches("started method").count() == 4);
    drop(worker);
    openstack.ok(&["strand", deleting, "deleting"]);
    openstack.ok(&["strand", restoring, "restoring", &second]);

    let worker = openstack.backhaul("posix", ceph.conf());

    assert_eq!(openstack.ok(&["settled", deleting])["status"], "deleted");
    assert!(!worker.log().contains("nobody was at"), "too early: {}", worker.log());
    assert_eq!(openstack.ok(&["settled", restoring])["status"], "available");
    assert_eq!(openstack.ok(&["volume", &second])["status"], "error_restoring");
    // Its message came again.
    assert_eq!(openstack.ok(&["show", at_work])["status"], "restoring");
    assert_eq!(openstack.ok(&["volume", &first])["status"], "restoring-backup");
}

#[test]
fn a_backup_that_a_service_was_making_that_died_is_ended_unless_its_message_comes() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let host = openstack.host().to_owned();
    let worker = openstack.backhaul("posix", ceph.conf());
    let volumes: Vec<String> = (0..8).map(|_| openstack.volume()).collect();
    let [at_work, asked, unasked, copied, copying, elsewhere, copy, old_copy] = &volumes[..] else {
        panic!()
    };
    image(&ceph, at_work).write(&[(0, &noise(1, 64 * MIB))]);
    image(&ceph, at_work).slow_down(1 << 18);
    let at_work = openstack.begin_backup(at_work, &[]);
    until("the backup has begun", || worker.log().contains("started method"));
    drop(worker);
    let mut left = |volume: &str, columns: &[&str]| {
        text(&openstack.ok(&[&["abandon", volume, &host], columns].concat())["id"])
    };
    let (asked_id, unasked_id) = (left(asked, &[]), left(unasked, &["service="]));
    let (copying_id, elsewhere_id) = (left(copying, &[]), left(elsewhere, &[]));
    let failed = left(asked, &["status=error", &format!("temp_volume_id={old_copy}")]);
    openstack.ok(&["set", asked, "previous_status=available"]);
    openstack.ok(&["in-use", copied]);
    let snapshot = text(&openstack.ok(&["snapshot", copied])["id"]);
    let (volume, of) = (format!("temp_volume_id={copy}"), format!("temp_snapshot_id={snapshot}"));
    let copied_id = text(&openstack.ok(&["abandon", copied, &host, &volume, &of])["id"]);
    // The volume service is at this one, and that of this one is away.
    let unfinished = openstack.volume();
    openstack.ok(&["set", &unfinished, "status=creating", &format!("display_name=backup-vol-{copying}")]);
    openstack.ok(&["set", elsewhere, "host=nowhere@rbd1#rbd1"]);

    let worker = openstack.backhaul("posix", ceph.conf());

    assert!(!worker.log().contains("nobody was at"), "too early: {}", worker.log());
    for (backup, volume, status) in
        [(&asked_id, asked, "available"), (&unasked_id, unasked, "available"), (&copied_id, copied, "in-use")]
    {
        let ended = openstack.ok(&["settled", backup]);
        assert_eq!(ended["status"], "error", "{ended}\n{}", worker.log());
        assert_eq!(ended["fail_reason"], "incomplete backup reset on manager restart");
        assert_eq!(openstack.ok(&["volume", volume])["status"], status);
    }
    for (backup, volume) in [(&copied_id, copy), (&failed, old_copy)] {
        until("the copy is gone", || openstack.ok(&["volume", volume])["status"] == "deleted");
        let is_free = |row: Value| row["temp_volume_id"].is_null() && row["temp_snapshot_id"].is_null();
        until("it needs no copy any more", || is_free(openstack.ok(&["show", backup])));
    }
    until("the snapshot is gone", || ceph.rbd(&["snap", "ls", image(&ceph, copied).spec()]).is_empty());
    assert!(worker.log().contains("it is waited for"), "{}", worker.log());
    // The message of the last one came again.
    for backup in [&copying_id, &elsewhere_id, &at_work] {
        assert_eq!(openstack.ok(&["show", backup])["status"], "creating");
    }
    // What the volume service was at may still come.
    openstack.ok(&["pass-on", &copying_id]);
    assert_eq!(openstack.ok(&["settled", &copying_id])["status"], "available");
}

#[test]
fn a_backup_whose_end_the_database_refuses_is_not_lost() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let worker = openstack.backhaul("posix", ceph.conf());
    let volume = openstack.volume();
    image(&ceph, &volume).write(&[(0, &noise(1, 16 * MIB))]);
    image(&ceph, &volume).slow_down(1 << 20);
    let backup = openstack.begin_backup(&volume, &[]);
    let name = format!("refuse_{}", backup.replace('-', ""));
    openstack.sql(&format!(
        "CREATE TRIGGER {name} BEFORE UPDATE ON backups FOR EACH ROW \
         IF NEW.id = '{backup}' AND NEW.status = 'available' THEN SIGNAL SQLSTATE '45000'; END IF"
    ));

    until("it was refused twice", || worker.log().matches("will not pass by itself").count() == 2);
    assert_eq!(openstack.ok(&["show", &backup])["status"], "creating");
    openstack.sql(&format!("DROP TRIGGER {name}"));

    let made = openstack.ok(&["settled", &backup]);
    assert_eq!(made["status"], "available", "{made}");
    assert!(!worker.log().contains("handed back"), "{}", worker.log());
}

#[rstest]
fn a_snapshot_that_the_volume_service_made_for_a_backup_is_read_and_removed(
    #[values("ceph", "posix")] driver: &str,
) {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let _worker = openstack.backhaul(driver, ceph.conf());
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 2 * MIB))]);
    let content = ceph.content(image.spec());
    openstack.ok(&["in-use", &volume]);
    let snapshot = text(&openstack.ok(&["snapshot", &volume])["id"]);
    image.write(&[(MIB as u64, &noise(2, MIB))]);
    let class = match driver {
        "ceph" => "service=cinder.backup.drivers.ceph.CephBackupDriver",
        _ => "service=cinder.backup.drivers.posix.PosixBackupDriver",
    };
    let (host, of) = (openstack.host().to_owned(), format!("temp_snapshot_id={snapshot}"));

    let backup = text(&openstack.ok(&["abandon", &volume, &host, class, &of])["id"]);
    openstack.ok(&["pass-on", &backup]);

    let made = openstack.ok(&["settled", &backup]);
    assert_eq!(made["status"], "available", "{made}");
    until("it needs no snapshot any more", || openstack.ok(&["show", &backup])["temp_snapshot_id"].is_null());
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "in-use");
    assert_holds(&ceph, &openstack.restore(&[&backup]), &content);
    until("the snapshot is gone", || !ceph.rbd(&["snap", "ls", image.spec()]).contains(&snapshot));
}
