//! What Cinder's own backup service gets wrong, done by our worker in its place beside the rest of a real Cinder: the outcome
//! that its users would expect. `cargo nextest run -E 'test(openstack_bugs::)'`.

use rstest::rstest;
use serde_json::json;

use crate::support::ceph::Ceph;
use crate::support::content::Content;
use crate::support::openstack::{Openstack, assert_holds, backhaul_beside_cinder, image, text};
use crate::support::stack::{noise, until};

const MIB: usize = 1 << 20;
const GIB: u64 = 1 << 30;

/// Restores a backup onto a volume of its own, which is deleted again, and fails unless that holds `content`.
fn assert_restores(openstack: &mut Openstack, ceph: &Ceph, backup: &str, content: &Content) {
    let restored = openstack.restore(&[backup]);
    assert_holds(ceph, &restored, content);
    let volume = text(&restored["id"]);
    let snapshots = ceph.rbd(&["snap", "ls", image(ceph, &volume).spec()]);
    assert_eq!(snapshots, "", "a snapshot of the backup stays on the restored volume");
    openstack.ok(&["delete-volume", &volume]);
}

/// Cinder has one name for the images of all backups of snapshots of a volume: the second one fails, its delete takes the data
/// of the first, and so does the clean-up after an incremental backup on it.
#[rstest]
fn backups_of_snapshots_of_one_volume_do_not_take_each_others_data(#[values("ceph", "posix")] driver: &str) {
    let (ceph, mut openstack, _worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    let mut points = Vec::new();
    for round in 0..2 {
        image.write(&[(round * MIB as u64, &noise(round, 2 * MIB))]);
        let content = ceph.content(image.spec());
        let snapshot = text(&openstack.ok(&["snapshot", &volume])["id"]);
        let backup = openstack.backup(&volume, &["--snapshot", &snapshot, "--force"]);
        assert_eq!(
            (&backup["status"], &backup["snapshot_id"]),
            (&json!("available"), &json!(snapshot)),
            "{backup}"
        );
        points.push((text(&backup["id"]), content));
    }

    let spec = image.spec();
    let hidden = format!("{spec}-hidden");
    ceph.rbd(&["mv", spec, &hidden]);
    let failed = openstack.backup(&volume, &["--incremental"]);
    assert_eq!((&failed["status"], &failed["parent_id"]), (&json!("error"), &json!(points[1].0)), "{failed}");
    ceph.rbd(&["mv", &hidden, spec]);
    assert_eq!(openstack.delete(&text(&failed["id"]))["status"], "deleted");
    image.write(&[(5 * MIB as u64, &noise(5, MIB))]);
    let next = openstack.backup(&volume, &["--incremental"]);
    assert_eq!(next["status"], "available", "{next}");
    points.push((text(&next["id"]), ceph.content(spec)));

    for (backup, content) in &points {
        assert_restores(&mut openstack, &ceph, backup, content);
    }
    let (first, others) = points.split_first().unwrap();
    for (backup, _) in others.iter().rev() {
        assert_eq!(openstack.delete(backup)["status"], "deleted");
    }
    assert_restores(&mut openstack, &ceph, &first.0, &first.1);
    assert_eq!(openstack.delete(&first.0)["status"], "deleted");
    let ids: Vec<&str> = points.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(ceph.names_with("backups", &ids), [""; 0]);
}

/// Cinder looks for snapshot and metadata of a backup in the pool of its configuration only.
#[test]
fn a_backup_in_another_pool_is_restored_with_what_describes_its_volume() {
    let (ceph, mut openstack, _worker) = backhaul_beside_cinder("ceph");
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 2 * MIB))]);
    let first = ceph.content(image.spec());
    let full = openstack.backup(&volume, &["--container", "backups2"]);
    assert_eq!((&full["status"], &full["container"]), (&json!("available"), &json!("backups2")), "{full}");
    image.write(&[(MIB as u64, &noise(2, MIB))]);
    let incremental = openstack.backup(&volume, &["--container", "backups2", "--incremental"]);
    assert_eq!(incremental["parent_id"], full["id"], "{incremental}");
    let (full, incremental) = (text(&full["id"]), text(&incremental["id"]));

    assert_eq!(openstack.restore(&[&full])["display_name"], "a volume");
    assert_restores(&mut openstack, &ceph, &full, &first);
    assert_restores(&mut openstack, &ceph, &incremental, &ceph.content(image.spec()));

    for backup in [&incremental, &full] {
        assert_eq!(openstack.delete(backup)["status"], "deleted");
    }
    for pool in ["backups", "backups2"] {
        assert_eq!(ceph.names_with(pool, &[&volume, &full, &incremental]), [""; 0]);
    }
}

/// Cinder may leave the image of a volume smaller than the volume, because it looks at the size of the latest point.
#[rstest]
fn an_older_point_of_a_volume_that_has_grown_is_restored_in_its_own_size_and_onto_the_larger_volume(
    #[values("ceph", "posix")] driver: &str,
) {
    let (ceph, mut openstack, _worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 2 * MIB)), (GIB - MIB as u64, &noise(2, MIB))]);
    let first = ceph.content(image.spec());
    let full = text(&openstack.backup(&volume, &[])["id"]);
    openstack.ok(&["extend", &volume, "2"]);
    image.write(&[(GIB + GIB / 2, &noise(3, MIB))]);
    let second = ceph.content(image.spec());
    let incremental = openstack.backup(&volume, &["--incremental"]);
    assert_eq!(
        (&incremental["status"], &incremental["size"]),
        (&json!("available"), &json!(2)),
        "{incremental}"
    );

    assert_restores(&mut openstack, &ceph, &full, &first);
    assert_restores(&mut openstack, &ceph, &text(&incremental["id"]), &second);
    let larger = text(&openstack.ok(&["create-volume", "2"])["id"]);
    assert_eq!(openstack.restore(&[&full, &larger])["status"], "available");
    let content = ceph.content(&format!("volumes/volume-{larger}"));
    assert!(content == first.in_bytes(2 * GIB), "the volume of 2 GiB holds something else");
}

/// Cinder writes the zeros of a backup, too, when it restores one onto its own volume.
#[rstest]
fn a_backup_that_is_restored_onto_its_own_volume_takes_no_more_space_than_before(
    #[values("ceph", "posix")] driver: &str,
) {
    let (ceph, mut openstack, _worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 4 * MIB)), (300 << 20, &noise(2, 4 * MIB))]);
    let content = ceph.content(image.spec());
    let backup = text(&openstack.backup(&volume, &[])["id"]);
    image.write(&[(700 << 20, &noise(3, 4 * MIB))]);

    assert_eq!(openstack.restore(&[&backup, &volume])["status"], "available");

    assert!(ceph.content(image.spec()) == content, "the volume holds something else");
    let extents: serde_json::Value =
        serde_json::from_str(&ceph.rbd(&["diff", "--format", "json", image.spec()])).unwrap();
    let used: u64 = extents.as_array().unwrap().iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert!(used <= 8 << 20, "{used} bytes are in use");
}

/// Cinder's first report says that its driver is not ready: for up to a minute after a start there is no service for backups.
/// When it ends it says nothing.
#[test]
fn the_scheduler_hears_at_once_that_backups_are_taken_and_at_the_end_that_they_are_not() {
    let (_ceph, openstack, worker) = backhaul_beside_cinder("posix");
    assert_eq!(openstack.reports().first(), Some(&true));

    worker.stop();

    until("the scheduler has heard of the end", || openstack.reports().last() == Some(&false));
}

#[rstest]
fn a_volume_that_is_in_use_is_backed_up_by_force_and_stays_in_use(#[values("ceph", "posix")] driver: &str) {
    let (ceph, mut openstack, _worker) = backhaul_beside_cinder(driver);
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    let mut points = Vec::new();
    openstack.ok(&["in-use", &volume]);
    for (round, options) in [(0, &["--force"][..]), (1, &["--force", "--incremental"])] {
        image.write(&[(round * MIB as u64, &noise(round, 2 * MIB))]);
        let backup = openstack.backup(&volume, options);
        assert_eq!(backup["status"], "available", "{backup}");
        let id = text(&backup["id"]);
        until("it needs no volume any more", || openstack.ok(&["show", &id])["temp_volume_id"].is_null());
        assert_eq!(openstack.ok(&["volume", &volume])["status"], "in-use");
        points.push((text(&backup["id"]), ceph.content(image.spec())));
    }

    for (backup, content) in &points {
        assert_restores(&mut openstack, &ceph, backup, content);
    }
}

/// Cinder leaves what it has written so far, until somebody deletes the backup.
#[rstest]
fn a_backup_that_fails_in_the_middle_leaves_nothing_behind(#[values("ceph", "posix")] driver: &str) {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    if driver == "posix" {
        openstack.limit_backups(80);
    }
    let _worker = openstack.backhaul(driver, ceph.conf());
    let volume = openstack.volume();
    let image = image(&ceph, &volume);
    for place in 0..12 {
        image.write(&[(place << 24, &noise(place, 16 * MIB))]);
    }
    if driver == "ceph" {
        image.slow_down(16 << 20);
    }

    let backup = openstack.begin_backup(&volume, &[]);
    if driver == "ceph" {
        // Somebody takes away what it is read from, each time that it is begun.
        until("it is given up", || {
            ceph.rbd(&["snap", "purge", "--no-progress", image.spec()]);
            openstack.ok(&["show", &backup])["status"] != "creating"
        });
    }

    let failed = openstack.ok(&["settled", &backup]);
    assert_eq!(failed["status"], "error", "{failed}");
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    assert_eq!(ceph.names_with("backups", &[&volume, &backup]), [""; 0], "{failed}");
    assert_eq!(ceph.rbd(&["snap", "ls", image.spec()]), "", "a snapshot of the backup stays on the volume");
    // There is a record of it, so that whoever deletes it knows that there is nothing to delete.
    let of_backup = |path: &String| path.contains(&backup);
    assert!(!openstack.files().iter().any(|path| of_backup(path) && !path.contains("/.backhaul/")));
    assert_eq!(openstack.delete(&backup)["status"], "deleted");
    assert!(!openstack.files().iter().any(of_backup), "{:?}", openstack.files());
}
