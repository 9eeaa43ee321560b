//! Our worker in the place of cinder-backup, beside the rest of a real Cinder: `cargo nextest run -E 'test(openstack::)'`.

use rstest::rstest;
use serde_json::{Value, json};

use crate::support::ceph::{Ceph, Image};
use crate::support::openstack::{Openstack, run, text};
use crate::support::stack::{noise, until};
use crate::support::swift;

const MIB: usize = 1 << 20;

/// The image of a volume.
fn image<'a>(ceph: &'a Ceph, volume: &str) -> Image<'a> {
    ceph.existing(&format!("volumes/volume-{volume}"))
}

/// Fails unless the volume holds what it held when `content` was taken.
fn assert_holds(ceph: &Ceph, volume: &Value, content: &crate::support::content::Content) {
    assert_eq!(volume["status"], "available", "{volume}");
    let image = format!("volumes/volume-{}", text(&volume["id"]));
    assert!(ceph.content(&image) == *content, "{image} holds something else");
}

#[rstest]
fn a_volume_is_backed_up_restored_and_its_backups_deleted(
    #[values("ceph", "posix", "s3", "swift")] driver: &str,
) {
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
    let _worker = openstack.backhaul(driver, ceph.conf());
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
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
    match driver {
        // Who may make no block devices may mount nothing.
        "nfs" if std::env::var_os("BACKHAUL_TEST_NO_BLOCK_DEVICES").is_some() => return,
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
        assert_holds(&ceph, &openstack.restore(&[backup]), content);
    }
    backhaul.stop();
    let cinder = openstack.cinder_backup(driver, ceph.conf());
    for (backup, content) in &points {
        assert_holds(&ceph, &openstack.restore(&[backup]), content);
    }
    // The last one is ours, the one before it Cinder's.
    assert_eq!(openstack.delete(&points[3].0)["status"], "deleted");
    cinder.stop();
    let _backhaul = openstack.backhaul(driver, ceph.conf());
    for (backup, _) in points[..3].iter().rev() {
        let deleted = openstack.delete(backup);
        assert_eq!(deleted["status"], "deleted", "{deleted}");
    }
}

#[test]
fn a_users_token_that_is_good_no_more_ends_the_request_and_not_the_worker() {
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
    let _worker = openstack.backhaul("swift of users", ceph.conf());
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
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    assert_eq!(openstack.restore(&[&backup])["status"], "error_restoring");
    let undeleted = openstack.delete(&backup);
    assert_eq!(undeleted["status"], "error", "{undeleted}");

    openstack.log_in();
    openstack.ok(&["reset", &backup, "available"]);
    assert_holds(&ceph, &openstack.restore(&[&backup]), &content);
    for backup in [&backup, &text(&failed["id"])] {
        assert_eq!(openstack.delete(backup)["status"], "deleted");
    }
}

#[test]
fn a_backup_goes_on_when_its_worker_was_killed() {
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
    let worker = openstack.backhaul("posix", ceph.conf());
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
    let _worker = openstack.backhaul("posix", ceph.conf());

    let made = openstack.ok(&["settled", &backup]);
    assert_eq!(made["status"], "available", "{made}");
    assert_holds(&ceph, &openstack.restore(&[&backup]), &content);
    let (folder, prefix) =
        (openstack.backups().join(text(&made["container"])), text(&made["service_metadata"]));
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name.starts_with(&prefix), "{name} is left of the worker that was killed");
    }
}

#[test]
fn a_backup_that_cannot_be_made_says_why_and_gives_its_volume_back() {
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
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
}

#[test]
fn a_restore_that_nobody_wants_any_more_ends() {
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
    let worker = openstack.backhaul("posix", ceph.conf());
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
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
    let worker = openstack.backhaul("posix", ceph.conf());
    let volume = openstack.volume();
    image(&ceph, &volume).write(&[(0, &noise(1, 3 * MIB))]);
    let content = ceph.content(image(&ceph, &volume).spec());
    let backup = openstack.backup(&volume, &[]);
    let id = text(&backup["id"]);
    let export = openstack.ok(&["export", &id]);
    let import = ["import", &text(&export["backup_service"]), &text(&export["backup_url"])];
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
}

#[test]
fn a_backup_that_is_deleted_by_force_while_it_is_made_leaves_nothing() {
    let (ceph, Some(mut openstack)) = (Ceph::shared(), Openstack::shared()) else { return };
    let worker = openstack.backhaul("posix", ceph.conf());
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 32 * MIB))]);
    image.slow_down(1 << 20);

    let backup = openstack.begin_backup(&volume, &[]);
    until("the backup has begun", || worker.log().contains("started method"));
    openstack.ok(&["delete", &backup, "--force"]);

    let deleted = openstack.ok(&["settled", &backup]);
    assert_eq!(deleted["status"], "deleted", "{deleted}\n{}", worker.log());
    let volume = openstack.ok(&["volume", &volume]);
    assert_eq!(volume["status"], "available", "{volume}");
    let left: Vec<_> = std::fs::read_dir(openstack.backups()).unwrap().flatten().map(|e| e.path()).collect();
    assert!(!left.iter().any(|path| path.join(&backup[2..4]).join(&backup).exists()), "{left:?}");
}
