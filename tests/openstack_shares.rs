//! Volumes that are no images in Ceph, beside a real Cinder whose volume service has them as files on a share, attached by the real
//! os-brick.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rstest::rstest;
use serde_json::json;

use crate::support::ceph::Ceph;
use crate::support::content::Content;
use crate::support::openstack::{Openstack, assert_holds, text};
use crate::support::stack::{noise, until};

const MIB: usize = 1 << 20;

fn write(file: &Path, parts: &[(u64, &[u8])]) {
    let file = File::options().write(true).open(file).unwrap();
    for (offset, bytes) in parts {
        file.write_all_at(bytes, *offset).unwrap();
    }
}

#[rstest]
fn a_volume_on_a_share_is_backed_up_and_restored(#[values("posix", "ceph")] driver: &str) {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let (volume, file) = openstack.volume_on_share();
    let worker = openstack.backhaul_by(&openstack.python(), driver, ceph.conf());

    write(&file, &[(0, &noise(1, 3 * MIB)), (500 << 20, &noise(2, MIB))]);
    let first = Content::of_file(&file);
    let full = openstack.backup(&volume, &[]);
    assert_eq!((&full["status"], &full["size"]), (&json!("available"), &json!(1)), "{full}");
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    write(&file, &[(MIB as u64, &noise(3, MIB)), (500 << 20, &[0; MIB])]);
    let second = Content::of_file(&file);
    let next = openstack.backup(&volume, &["--incremental"]);
    assert_eq!(next["status"], "available", "{next}");
    // Of what is no image nobody knows what has changed, and images have no objects to compare with.
    assert_eq!(next["parent_id"].is_null(), driver == "ceph", "{next}");

    let (full, next) = (text(&full["id"]), text(&next["id"]));
    for (backup, content) in [(&full, &first), (&next, &second)] {
        write(&file, &[(200 << 20, &noise(4, MIB))]);
        let restored = openstack.restore(&[backup, &volume]);
        assert_eq!(restored["status"], "available", "{restored}\n{}", worker.log());
        assert!(Content::of_file(&file) == *content, "{} holds something else", file.display());
        // Volumes of all kinds take it.
        assert_holds(&ceph, &openstack.restore(&[backup]), content);
    }
    for backup in [&next, &full] {
        assert_eq!(openstack.delete(backup)["status"], "deleted");
    }
    assert_eq!(ceph.names_with("backups", &[&volume, &full, &next]), [""; 0]);
    assert!(!worker.log().contains("stays attached"), "{}", worker.log());
    // Nobody has anything of it open.
    assert_eq!(openstack.ok(&["delete-volume", &volume])["status"], "deleted");
    assert!(!file.exists());
}

#[test]
fn an_image_is_restored_to_a_share_also_with_os_brick_at_hand() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let (volume, file) = openstack.volume_on_share();
    let _worker = openstack.backhaul_by(&openstack.python(), "posix", ceph.conf());
    let from = openstack.volume();
    let image = crate::support::openstack::image(&ceph, &from);
    image.write(&[(0, &noise(1, 2 * MIB))]);

    let backup = text(&openstack.backup(&from, &[])["id"]);
    let restored = openstack.restore(&[&backup, &volume]);

    assert_eq!(restored["status"], "available", "{restored}");
    assert!(Content::of_file(&file) == ceph.content(image.spec()), "{} holds something else", file.display());
}

#[test]
fn a_worker_goes_on_with_what_one_was_attaching_that_was_killed() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let (volume, file) = openstack.volume_on_share();
    write(&file, &[(0, &noise(1, 2 * MIB))]);
    let content = Content::of_file(&file);
    let (python, asked) = stuck(&openstack);
    let worker = openstack.backhaul_by(&python, "posix", ceph.conf());
    let backup = openstack.begin_backup(&volume, &[]);
    until("the volume is to be attached", || asked.exists());

    drop(worker);
    assert_eq!(openstack.ok(&["show", &backup])["status"], "creating");
    let _worker = openstack.backhaul_by(&openstack.python(), "posix", ceph.conf());

    let made = openstack.ok(&["settled", &backup]);
    assert_eq!(made["status"], "available", "{made}");
    assert_holds(&ceph, &openstack.restore(&[&backup]), &content);
}

#[test]
fn a_backup_is_deleted_by_force_while_its_volume_is_attached() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let (volume, _) = openstack.volume_on_share();
    let (python, asked) = stuck(&openstack);
    let worker = openstack.backhaul_by(&python, "posix", ceph.conf());
    let backup = openstack.begin_backup(&volume, &[]);
    until("the volume is to be attached", || asked.exists());

    openstack.ok(&["delete", &backup, "--force"]);

    let deleted = openstack.ok(&["settled", &backup]);
    assert_eq!(deleted["status"], "deleted", "{deleted}\n{}", worker.log());
    // os-brick has a quarter of an hour, and was not waited for.
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
}

#[test]
fn without_os_brick_and_of_a_file_that_is_not_raw_it_is_told_what_to_do() {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let (volume, file) = openstack.volume_on_share();
    let worker = openstack.backhaul_by(Path::new("/nowhere/python3"), "posix", ceph.conf());
    let failed = openstack.backup(&volume, &[]);
    assert_eq!(failed["status"], "error", "{failed}");
    assert!(text(&failed["fail_reason"]).starts_with("os-brick is not installed"), "{failed}");
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    worker.stop();

    let _worker = openstack.backhaul_by(&openstack.python(), "posix", ceph.conf());
    fs::remove_file(&file).unwrap();
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2"]).arg(&file).arg("1G");
    assert!(make.status().unwrap().success(), "{make:?}");
    openstack.sql(&format!("UPDATE volume_admin_metadata SET value = 'qcow2' WHERE volume_id = '{volume}'"));
    let failed = openstack.backup(&volume, &[]);
    assert_eq!(failed["status"], "error", "{failed}");
    assert!(text(&failed["fail_reason"]).contains("\"qcow2\": only \"raw\""), "{failed}");
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
}

/// A Python that attaches no volume, and never says so; and a file that is there once it was to.
fn stuck(openstack: &Openstack) -> (PathBuf, PathBuf) {
    let (path, asked) = (openstack.work().join("python"), openstack.work().join("asked"));
    let script = format!(
        "#!/bin/sh
read -r line
case $line in *'\"do\":\"connect\"'*) touch {}; exec cat >/dev/null ;; esac
{{ printf '%s\\n' \"$line\"; cat; }} | {} \"$@\"
",
        asked.display(),
        openstack.python().display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
    (path, asked)
}
