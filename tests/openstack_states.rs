//! What our worker in the place of cinder-backup says of what it was asked for: the rows, the messages to users, the answers.
//! `cargo nextest run -E 'test(openstack_states::)'`.

use std::time::{Duration, Instant};

use rstest::rstest;
use serde_json::{Value, json};

use crate::support::ceph::Ceph;
use crate::support::openstack::{Openstack, assert_holds, backhaul_beside_cinder, image, text};
use crate::support::oslo::Oslo;
use crate::support::stack::{noise, until};

const MIB: usize = 1 << 20;
const CEPH: &str = "cinder.backup.drivers.ceph.CephBackupDriver";
const POSIX: &str = "cinder.backup.drivers.posix.PosixBackupDriver";

/// A volume that holds something, and a backup of it.
fn volume_and_backup(ceph: &Ceph, openstack: &mut Openstack) -> (String, String) {
    let volume = openstack.volume();
    image(ceph, &volume).write(&[(0, &noise(1, 2 * MIB))]);
    let backup = openstack.backup(&volume, &[]);
    assert_eq!(backup["status"], "available", "{backup}");
    (volume, text(&backup["id"]))
}

/// The status that a volume has once nobody restores to it.
fn status_after_restore(openstack: &mut Openstack, volume: &str) -> String {
    until("the restore has ended", || openstack.ok(&["volume", volume])["status"] != "restoring-backup");
    text(&openstack.ok(&["volume", volume])["status"])
}

/// The events of which a listener is told up to this one.
fn events_up_to(listener: &mut Oslo, last: &str) -> Vec<String> {
    let mut events = Vec::new();
    while events.last().is_none_or(|event| event != last) {
        events.push(text(&listener.told()["event_type"]));
    }
    events.retain(|event| !event.ends_with("progress"));
    events
}

#[test]
fn a_backup_of_another_driver_is_left_alone_and_the_volume_says_that_nothing_was_restored() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let mut listener = openstack.listen();
    let worker = openstack.backhaul("posix", ceph.conf());
    let (_, backup) = volume_and_backup(&ceph, &mut openstack);
    let target = openstack.volume();
    openstack.sql(&format!("UPDATE backups SET service = '{CEPH}' WHERE id = '{backup}'"));

    openstack.ok(&["restore", &backup, &target]);
    assert_eq!(status_after_restore(&mut openstack, &target), "error", "{}", worker.log());
    assert_eq!(openstack.ok(&["settled", &backup])["status"], "available");
    let deleted = openstack.delete(&backup);

    let reason = format!(
        "Delete backup aborted, the backup service currently configured [{POSIX}] is not the backup service that was used to \
         create this backup [{CEPH}]."
    );
    assert_eq!((&deleted["status"], &deleted["fail_reason"]), (&json!("error"), &json!(reason)));
    let told = events_up_to(&mut listener, "backup.delete.error");
    let expected =
        ["create.start", "create.end", "restore.start", "restore.error", "delete.start", "delete.error"];
    assert_eq!(told, expected.map(|event| format!("backup.{event}")));

    openstack.sql(&format!("UPDATE backups SET service = '{POSIX}' WHERE id = '{backup}'"));
    assert_eq!(openstack.delete(&backup)["status"], "deleted");
}

#[test]
fn a_restore_of_a_backup_that_is_damaged_fails_and_says_so() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let (_, backup) = volume_and_backup(&ceph, &mut openstack);
    let target = openstack.volume();
    let object = openstack.files().into_iter().find(|path| path.ends_with("-00001")).unwrap();
    let mut bytes = std::fs::read(&object).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&object, bytes).unwrap();

    openstack.ok(&["restore", &backup, &target]);

    assert_eq!(status_after_restore(&mut openstack, &target), "error_restoring", "{}", worker.log());
    assert_eq!(openstack.ok(&["settled", &backup])["status"], "available");
    let mut messages = json!([]);
    until("the user is told", || {
        messages = openstack.ok(&["messages", &backup]);
        messages != json!([])
    });
    assert_eq!(messages, json!([["ERROR", "VOLUME_VOLUME_BACKUP_015_026"]]));
}

#[test]
fn an_incremental_backup_that_becomes_a_full_one_warns_the_user() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("ceph");
    let (volume, full) = volume_and_backup(&ceph, &mut openstack);
    let image = image(&ceph, &volume);
    ceph.rbd(&["snap", "purge", "--no-progress", image.spec()]);
    image.write(&[(MIB as u64, &noise(2, MIB))]);

    let forced = openstack.backup(&volume, &["--incremental"]);

    assert_eq!((&forced["status"], &forced["parent_id"]), (&json!("available"), &Value::Null), "{forced}");
    assert_eq!(openstack.ok(&["show", &full])["num_dependent_backups"], 0);
    let mut messages = json!([]);
    until("the user is told", || {
        messages = openstack.ok(&["messages", &volume]);
        messages != json!([])
    });
    assert_eq!(messages, json!([["WARNING", "VOLUME_VOLUME_013_030"]]), "{}", worker.log());
    assert_holds(&ceph, &openstack.restore(&[&text(&forced["id"])]), &ceph.content(image.spec()));
}

#[test]
fn a_restore_that_comes_when_nobody_waits_for_it_changes_no_volume_that_is_in_use() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let worker = openstack.backhaul("posix", ceph.conf());
    let (volume, first) = volume_and_backup(&ceph, &mut openstack);
    let second = text(&openstack.backup(&volume, &[])["id"]);
    let (reset, used) = (openstack.volume(), openstack.volume());
    worker.stop();
    openstack.ok(&["restore", &first, &reset]);
    openstack.ok(&["restore", &second, &used]);
    // Before anybody takes these, a person has given one up, and has put the other one's volume to use.
    openstack.ok(&["strand", &first, "available"]);
    openstack.ok(&["set", &used, "status=available"]);

    let worker = openstack.backhaul("posix", ceph.conf());

    assert_eq!(status_after_restore(&mut openstack, &reset), "error", "{}", worker.log());
    assert_eq!(openstack.ok(&["settled", &second])["status"], "available");
    assert_eq!(openstack.ok(&["volume", &used])["status"], "available");
    for (about, event) in [(&first, "VOLUME_VOLUME_BACKUP_015_017"), (&used, "VOLUME_VOLUME_BACKUP_015_027")]
    {
        let mut messages = json!([]);
        until("the user is told", || {
            messages = openstack.ok(&["messages", about]);
            messages != json!([])
        });
        assert_eq!(messages, json!([["ERROR", event]]), "{}", worker.log());
    }
}

/// Cinder's own service ends such a backup as any other, and its volume with it.
#[test]
fn the_volume_of_a_backup_that_was_given_up_before_its_message_came_is_free_again() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let host = openstack.host().to_owned();
    let volumes = [openstack.volume(), openstack.volume(), openstack.volume()];
    let [copied, deleted, failed] = &volumes;
    // The volume service is still at its copy of this one.
    let early = text(&openstack.ok(&["abandon", copied, &host])["id"]);
    openstack.ok(&["delete", &early, "--force"]);
    assert_eq!(openstack.ok(&["settled", &early])["status"], "deleted");
    assert_eq!(openstack.ok(&["volume", copied])["status"], "backing-up");
    openstack.ok(&["pass-on", &early]);
    until("the first volume is free", || openstack.ok(&["volume", copied])["status"] == "available");
    // And of these the worker dies.
    let mut ids = Vec::new();
    for volume in [deleted, failed] {
        image(&ceph, volume).write(&[(0, &noise(1, 16 * MIB))]);
        image(&ceph, volume).slow_down(1 << 18);
        ids.push(openstack.begin_backup(volume, &[]));
    }
    until("both are begun", || worker.log().matches("started method").count() == 2);
    drop(worker);
    openstack.ok(&["strand", &ids[0], "deleting"]);
    openstack.ok(&["strand", &ids[1], "error"]);

    let worker = openstack.backhaul("posix", ceph.conf());

    for volume in [deleted, failed] {
        until("the volume is free", || openstack.ok(&["volume", volume])["status"] == "available");
    }
    assert_eq!(openstack.ok(&["settled", &ids[0]])["status"], "deleted", "{}", worker.log());
    assert_eq!(openstack.ok(&["show", &ids[1]])["status"], "error");
}

/// `cinder backup-reset-state` does that if nothing else is said, and Cinder's own service goes on with the backup.
#[test]
fn a_backup_that_is_set_to_available_before_it_is_made_is_made() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let host = openstack.host().to_owned();
    let (at_work, copied) = (openstack.volume(), openstack.volume());
    image(&ceph, &at_work).write(&[(0, &noise(1, 8 * MIB))]);
    image(&ceph, &at_work).slow_down(1 << 20);
    let first = openstack.begin_backup(&at_work, &[]);
    until("it is begun", || worker.log().contains("started method"));
    let second = text(&openstack.ok(&["abandon", &copied, &host])["id"]);
    for backup in [&first, &second] {
        openstack.ok(&["reset", backup, "available"]);
    }
    openstack.ok(&["pass-on", &second]);

    for (backup, volume) in [(&first, &at_work), (&second, &copied)] {
        until("its volume is free", || openstack.ok(&["volume", volume])["status"] == "available");
        let made = openstack.ok(&["show", backup]);
        assert_eq!(made["status"], "available", "{made}\n{}", worker.log());
        assert!(made["service_metadata"].is_string(), "{made}\n{}", worker.log());
        let content = ceph.content(image(&ceph, volume).spec());
        assert_holds(&ceph, &openstack.restore(&[backup]), &content);
    }
}

#[test]
fn what_waits_for_its_turn_and_is_not_wanted_any_more_ends_at_once() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let worker = openstack.backhaul_with("posix", ceph.conf(), "backup_max_operations = 1");
    let (_, restored) = volume_and_backup(&ceph, &mut openstack);
    let (at_work, waiting, target) = (openstack.volume(), openstack.volume(), openstack.volume());
    image(&ceph, &at_work).write(&[(0, &noise(1, 32 * MIB))]);
    image(&ceph, &at_work).slow_down(1 << 18);
    let first = openstack.begin_backup(&at_work, &[]);
    until("it is begun", || worker.log().matches("started method").count() == 2);
    let second = openstack.begin_backup(&waiting, &[]);
    until("it is taken on", || openstack.ok(&["show", &second])["service"].is_string());
    openstack.ok(&["restore", &restored, &target]);

    openstack.ok(&["delete", &second, "--force"]);
    openstack.ok(&["reset", &restored, "available"]);

    assert_eq!(openstack.ok(&["settled", &second])["status"], "deleted", "{}", worker.log());
    until("the volume is free", || openstack.ok(&["volume", &waiting])["status"] == "available");
    assert_eq!(status_after_restore(&mut openstack, &target), "error", "{}", worker.log());
    assert_eq!(openstack.ok(&["show", &first])["status"], "creating", "too late");
}

#[test]
fn the_worker_answers_what_it_does_not_know_as_oslo_does_and_the_scheduler_when_it_asks() {
    let (ceph, openstack) = (Ceph::shared(), Openstack::shared());
    // Otherwise it would tell the scheduler without being asked.
    let _worker = openstack.backhaul_with("ceph", ceph.conf(), "backup_driver_stats_polling_interval = 3600");
    let mut oslo = openstack.oslo();
    let ask = |oslo: &mut Oslo, method: &str, version: &str| {
        oslo.ask(
            &json!({ "do": "call", "topic": "cinder-backup", "server": openstack.host(), "version": version,
            "method": method, "args": {}, "context": {} }),
        )
    };

    assert_eq!(ask(&mut oslo, "no_such", "2.0").unwrap_err()["class"], "NoSuchMethod_Remote");
    for version in ["2.5", "1.0", "3.0"] {
        let refused = ask(&mut oslo, "check_support_to_force_delete", version).unwrap_err();
        assert_eq!(refused["class"], "UnsupportedVersion_Remote", "{version}: {refused}");
    }
    assert_eq!(ask(&mut oslo, "check_support_to_force_delete", "2.4"), Ok(json!(true)));

    assert_eq!(openstack.reports(), [true]);
    oslo.must(&json!({ "do": "cast", "topic": "cinder-backup", "fanout": true, "version": "2.2",
        "method": "publish_service_capabilities", "args": {}, "context": {} }));
    until("the scheduler is told once more", || openstack.reports() == [true, true]);
}

#[test]
fn the_scheduler_knows_of_a_worker_within_a_second_of_its_start() {
    let (ceph, openstack) = (Ceph::shared(), Openstack::shared());
    let worker = openstack.start_backhaul("posix", ceph.conf());
    until("it has started", || worker.log().contains("worker started"));
    let began = Instant::now();

    until("the scheduler has heard of it", || openstack.reports().first() == Some(&true));

    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[test]
fn a_worker_whose_row_was_removed_is_among_the_services_again() {
    let (_ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let host = openstack.host().to_owned();
    let is_up = |openstack: &mut Openstack| {
        let services = openstack.ok(&["services"]);
        services.as_array().unwrap().iter().any(|service| service["host"] == host && service["up"] == true)
    };
    until("it is among the services", || is_up(&mut openstack));

    // As `cinder-manage service remove` does it.
    openstack.sql(&format!("UPDATE services SET deleted = true WHERE host = '{host}'"));

    until("its row is found to be gone", || worker.log().contains("entered anew"));
    until("it is among the services again", || is_up(&mut openstack));
}

#[test]
fn the_volume_service_is_told_of_each_volume_that_it_is_used_no_more() {
    let (ceph, mut openstack, worker) = backhaul_beside_cinder("posix");
    let (_, backup) = volume_and_backup(&ceph, &mut openstack);
    let target = openstack.volume();
    openstack.ok(&["restore", &backup, &target]);
    assert_eq!(status_after_restore(&mut openstack, &target), "available");

    // All that this test asks for is one request.
    let log = worker.log();
    let line = log.lines().find(|line| line.contains("backup taken on")).unwrap();
    let request = &line[line.find("req-").unwrap()..][.."req-00000000-0000-0000-0000-000000000000".len()];
    let count = |what: &str| {
        let log = openstack.log_of_volumes();
        log.lines().filter(|line| line.contains(what) && line.contains(request)).count()
    };
    for what in [
        "Initialize volume connection completed",
        "Terminate volume connection completed",
        "Remove volume export completed",
    ] {
        until(what, || count(what) == 2);
    }
}

#[rstest]
#[case("backup_workers = 4", "backup_workers")]
#[case("quota_backups = 3", "quota_backups")]
fn an_option_that_is_not_obeyed_is_told_of_once_at_the_start(#[case] line: &str, #[case] option: &str) {
    let (ceph, openstack) = (Ceph::shared(), Openstack::shared());
    let worker = openstack.backhaul_with("posix", ceph.conf(), line);
    let log = worker.log();
    let told: Vec<_> =
        log.lines().filter(|line| line.contains("an option of cinder.conf is not obeyed")).collect();
    assert_eq!(told.iter().filter(|line| line.contains(option)).count(), 1, "{told:?}");
}
