//! Our worker behind Cinder's real HTTP API, which is asked by its own client: `cargo nextest run -E 'test(openstack_http::)'`.

use rstest::rstest;
use serde_json::json;

use crate::support::openstack::{assert_holds, backhaul_beside_cinder, image, text};
use crate::support::stack::{noise, until};

const MIB: usize = 1 << 20;

#[rstest]
fn backups_are_made_restored_and_deleted_over_http(#[values("ceph", "posix")] driver: &str) {
    let (ceph, openstack, _worker) = backhaul_beside_cinder(driver);
    let mut client = openstack.client();
    let volume = text(&client.ok("volumes", "create", &json!({ "size": 1, "name": "a volume" }))["id"]);
    assert_eq!(client.settled("volumes", &volume)["status"], "available");
    let image = image(&ceph, &volume);
    let mut points = Vec::new();
    for (round, incremental) in [(0, false), (1, true), (2, true)] {
        image.write(&[(round * MIB as u64, &noise(round, 3 * MIB))]);
        let asked = json!({ "volume_id": volume, "name": format!("backup {round}"), "incremental": incremental,
            "metadata": { "key": "value" }, "availability_zone": openstack.name() });
        let id = text(&client.ok("backups", "create", &asked)["id"]);
        let backup = client.settled("backups", &id);
        assert_eq!(
            (&backup["status"], &backup["is_incremental"], &backup["size"], &backup["name"]),
            (&json!("available"), &json!(incremental), &json!(1), &asked["name"]),
            "{backup}"
        );
        assert_eq!(client.settled("volumes", &volume)["status"], "available");
        points.push((id, ceph.content(image.spec())));
    }
    let listed = client.ok("backups", "list", &json!({}));
    assert_eq!(listed.as_array().unwrap().len(), 3, "{listed}");

    for (id, content) in &points {
        let begun = client.ok("restores", "restore", &json!({ "backup_id": id, "name": "restored" }));
        let restored = text(&begun["volume_id"]);
        assert_eq!(client.settled("backups", id)["status"], "available");
        // The volume of a restore is `available`, too, before that begins.
        assert_holds(&ceph, &client.settled("volumes", &restored), content);
    }
    let (first, content) = &points[0];
    client.ok("restores", "restore", &json!({ "backup_id": first, "volume_id": volume }));
    client.settled("backups", first);
    assert_holds(&ceph, &client.settled("volumes", &volume), content);

    let export = client.ok("backups", "export_record", &json!({ "backup_id": first }));
    assert!(text(&export["backup_service"]).contains(driver), "{export}");
    assert!(!text(&export["backup_url"]).is_empty());
    client.ok("backups", "reset_state", &json!({ "backup": first, "state": "error" }));
    until("its status is reset", || client.settled("backups", first)["status"] == "error");
    client.ok("backups", "reset_state", &json!({ "backup": first, "state": "available" }));
    until("its status is reset", || client.settled("backups", first)["status"] == "available");
    let refused = client.ask("backups", "delete", &json!({ "backup": first })).unwrap_err();
    assert_eq!(refused["status"], 400, "others build on it: {refused}");
    for (id, _) in points.iter().rev() {
        client.ok("backups", "delete", &json!({ "backup": id }));
        until("it is deleted", || {
            client
                .ask("backups", "get", &json!({ "backup_id": id }))
                .is_err_and(|error| error["status"] == 404)
        });
    }
    let project = client.project().to_owned();
    let quotas = client.ok("quotas", "get", &json!({ "tenant_id": project, "usage": true }));
    assert_eq!((&quotas["backups"]["in_use"], &quotas["backup_gigabytes"]["in_use"]), (&json!(0), &json!(0)));
    let services =
        client.ok("services", "list", &json!({ "host": openstack.host(), "binary": "cinder-backup" }));
    assert_eq!(
        (&services[0]["state"], &services[0]["status"]),
        (&json!("up"), &json!("enabled")),
        "{services}"
    );
}

#[test]
fn what_the_worker_says_no_to_comes_to_the_client_as_its_own_mistake() {
    let (ceph, openstack, _worker) = backhaul_beside_cinder("posix");
    let mut client = openstack.client();
    let volume = text(&client.ok("volumes", "create", &json!({ "size": 1 }))["id"]);
    assert_eq!(client.settled("volumes", &volume)["status"], "available");
    let asked = json!({ "volume_id": volume, "availability_zone": openstack.name() });
    let backup = text(&client.ok("backups", "create", &asked)["id"]);
    assert_eq!(client.settled("backups", &backup)["status"], "available");
    let other = "cinder.backup.drivers.ceph.CephBackupDriver";
    openstack.sql(&format!("UPDATE backups SET service = '{other}' WHERE id = '{backup}'"));

    let refused = client.ask("backups", "export_record", &json!({ "backup_id": backup })).unwrap_err();

    assert_eq!(refused["status"], 400, "{refused}");
    let expected = "Export record aborted, the backup service currently configured [cinder.backup.drivers.posix.PosixBackupDriver]";
    assert!(text(&refused["message"]).contains(expected), "{refused}");

    // What fails later is told by messages.
    let spec = image(&ceph, &volume).spec().to_owned();
    ceph.rbd(&["mv", &spec, &format!("{spec}-hidden")]);
    let failed = text(&client.ok("backups", "create", &asked)["id"]);
    assert_eq!(client.settled("backups", &failed)["status"], "error");
    let mut messages = json!([]);
    until("there is a message", || {
        messages = client.ok("messages", "list", &json!({ "search_opts": { "resource_uuid": failed } }));
        messages != json!([])
    });
    assert_eq!(messages.as_array().unwrap().len(), 1, "{messages}");
    assert_eq!(messages[0]["event_id"], "VOLUME_VOLUME_BACKUP_013_020", "{messages}");
    let told = "create backup:Backup driver failed to create backup.";
    assert_eq!(messages[0]["user_message"], told, "{messages}");
}
