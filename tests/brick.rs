//! Volumes attached by the real os-brick: local ones, and shares that are mounted already. What takes a target, such as iSCSI, is not
//! there; how os-brick fails without one is.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use backhaul::cinder::volumes::OtherConnection;
use backhaul::stand_in::brick::{Brick, Error, Settings};
use md5::{Digest, Md5};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::support::device::BlockDevice;
use crate::support::stack::noise;

/// The Python that os-brick comes to with Cinder.
fn python() -> PathBuf {
    std::env::var_os("BACKHAUL_TEST_CINDER").expect("run `make test`, which installs Cinder").into()
}

fn brick(conf: &Path) -> Brick {
    Brick::new(settings(conf))
}

fn settings(conf: &Path) -> Settings {
    Settings {
        pythons: vec!["/nowhere/python3".into(), python()],
        conf_files: vec![conf.into()],
        my_ip: "192.0.2.7".into(),
        multipath: false,
        enforce_multipath: false,
        scan_attempts: 1,
        rootwrap_config: "/etc/cinder/rootwrap.conf".into(),
    }
}

/// A `cinder.conf` with as much of it as os-brick looks at.
fn conf(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("cinder.conf");
    let locks = folder.path().join("locks");
    fs::write(&path, format!("[oslo_concurrency]\nlock_path = {}\n", locks.display())).unwrap();
    path
}

fn way(kind: &str, data: Value) -> OtherConnection {
    OtherConnection::new(json!({ "driver_volume_type": kind, "data": data }))
}

#[tokio::test]
async fn a_local_file_is_attached_as_itself() {
    let (folder, content) = (TempDir::new().unwrap(), noise(1, 1 << 20));
    let file = folder.path().join("volume");
    fs::write(&file, &content).unwrap();
    assert_attaches_as_itself(&file, &content).await;
}

#[tokio::test]
async fn a_local_block_device_is_attached_as_itself() {
    let content = noise(1, 1 << 20);
    assert_attaches_as_itself(BlockDevice::holding(&content).path(), &content).await;
}

async fn assert_attaches_as_itself(path: &Path, content: &[u8]) {
    let folder = TempDir::new().unwrap();
    let brick = brick(&conf(&folder));
    let host = brick.host().await.unwrap();
    assert_eq!((&host.connector["ip"], &host.connector["multipath"]), (&json!("192.0.2.7"), &json!(false)));
    assert!(host.connector["host"].is_string(), "{}", host.connector);
    let connection = way("local", json!({ "device_path": path }));
    let attached = brick.connect(&host, &connection, true).await.unwrap();
    assert_eq!(attached.path, path);
    assert!(fs::read(path).unwrap() == content);
    brick.disconnect(&host, &connection, Some(&attached)).await.unwrap();
    // What is not attached may be let go of.
    brick.disconnect(&host, &connection, None).await.unwrap();
}

#[tokio::test]
async fn a_volume_on_a_share_is_the_file_of_its_name() {
    let folder = TempDir::new().unwrap();
    let share = "192.0.2.1:/volumes";
    let mounted = Mounted::at(share, folder.path().join(hex::encode(Md5::digest(share))));
    fs::write(mounted.0.join("volume-1"), b"on a share").unwrap();
    let brick = brick(&conf(&folder));
    let host = brick.host().await.unwrap();
    let connection = OtherConnection::new(json!({
        "driver_volume_type": "nfs", "mount_point_base": folder.path(),
        "data": { "export": share, "name": "volume-1", "format": "raw", "options": "-o vers=4" },
    }));

    let attached = brick.connect(&host, &connection, true).await.unwrap();

    assert_eq!(attached.path, mounted.0.join("volume-1"));
    brick.disconnect(&host, &connection, Some(&attached)).await.unwrap();
    assert_eq!(fs::read(mounted.0.join("volume-1")).unwrap(), b"on a share");
}

#[tokio::test]
async fn what_os_brick_cannot_do_it_says_without_the_password() {
    let folder = TempDir::new().unwrap();
    let brick = brick(&conf(&folder));
    let host = brick.host().await.unwrap();
    let iscsi = json!({
        "target_portal": "127.0.0.1:1", "target_iqn": "iqn.2010-10.org.openstack:volume-1", "target_lun": 1,
        "auth_method": "CHAP", "auth_username": "someone", "auth_password": "sesame-open",
    });
    for (kind, data, wanted) in [
        ("carrier pigeon", json!({}), "InvalidConnectorProtocol"),
        ("local", json!({ "volume_id": "1" }), "ValueError"),
        ("iscsi", iscsi, ""),
        ("fibre_channel", json!({ "target_wwn": "5006016008601eff", "target_lun": 1 }), ""),
        ("nvmeof", json!({ "target_nqn": "nqn.2010-10.org.openstack:1", "portals": [] }), ""),
    ] {
        let error = brick.connect(&host, &way(kind, data), true).await.unwrap_err();
        let Error::Failed { exception, .. } = &error else { panic!("{kind}: {error}") };
        assert!(exception.starts_with(wanted), "{kind}: {error}");
        assert!(!error.to_string().contains("sesame-open"), "{kind}: {error}");
    }
}

#[tokio::test]
async fn multipath_that_is_enforced_and_not_there_is_an_error() {
    let folder = TempDir::new().unwrap();
    let brick = Brick::new(Settings { multipath: true, enforce_multipath: true, ..settings(&conf(&folder)) });
    let host = brick.host().await.unwrap();
    let of_host = ["multipath", "enforce_multipath"].map(|name| &host.connector[name]);
    assert_eq!(of_host, [&json!(true), &json!(true)], "what the volume service must know");
    // As the service gives it back.
    let data = json!({ "target_portal": "127.0.0.1:1", "target_iqn": "iqn.2010-10.org.openstack:volume-1",
        "target_lun": 1, "enforce_multipath": true });

    let error = brick.connect(&host, &way("iscsi", data), true).await.unwrap_err();

    assert!(error.to_string().contains("ultipath"), "{error}");
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_ended_wherever_it_is() {
    let folder = TempDir::new().unwrap();
    let stuck = pipe(&folder);
    let brick = brick(&stuck);

    let opened = tokio::task::spawn_blocking(move || File::options().write(true).open(stuck).unwrap());
    let mut writer = tokio::select! {
        host = brick.host() => panic!("{host:?}"),
        writer = opened => writer.unwrap(),
    };

    // It reads its configuration, which does not end, and is gone when nobody reads any more.
    let gone = tokio::task::spawn_blocking(move || while writeln!(writer, "#").is_ok() {});
    timeout(Duration::from_secs(30), gone).await.unwrap().unwrap();
}

#[test]
fn it_ends_with_the_worker_that_asks() {
    let folder = TempDir::new().unwrap();
    let stuck = pipe(&folder);
    let mut process = Command::new(python())
        .args(["-W", "ignore", "-c", include_str!("../src/stand_in/brick.py")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut asked = process.stdin.take().unwrap();
    writeln!(asked, "{}", json!({ "do": "properties", "conf_files": [stuck] })).unwrap();
    let _writer = File::options().write(true).open(&stuck).unwrap();
    assert!(process.try_wait().unwrap().is_none());

    drop(asked);

    assert_eq!(process.wait().unwrap().signal(), Some(9));
}

/// A file that whoever reads it waits for.
fn pipe(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("cinder.conf");
    mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    path
}

/// A file system in memory under the name of a share.
struct Mounted(PathBuf);

impl Mounted {
    fn at(share: &str, folder: PathBuf) -> Self {
        fs::create_dir(&folder).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", share]).arg(&folder);
        assert!(mount.status().unwrap().success(), "{mount:?}");
        Self(folder)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
