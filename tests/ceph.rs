//! A real cluster, and what it takes to reach one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::ceph::Ceph;
use backhaul::ceph::Cluster;
use tempfile::TempDir;

const SECONDS_MAX: u32 = 30;

#[test]
fn both_clusters_answer_and_they_are_two() {
    let (shared, other) = (Ceph::shared(), Ceph::other());

    for ceph in [&shared, &other] {
        Cluster::connect(ceph.conf(), "cinder", SECONDS_MAX).unwrap();
    }

    assert_ne!(shared.ceph(&["fsid"]), other.ceph(&["fsid"]));
}

#[test]
fn with_a_key_of_another_cluster_the_error_says_who_was_refused_where() {
    let folder = TempDir::new().unwrap();
    let keyring = Ceph::other().conf().with_file_name("keyring");
    let conf = conf_with_keyring(&Ceph::shared(), folder.path(), &keyring);

    let error = Cluster::connect(&conf, "cinder", SECONDS_MAX).err().unwrap().to_string();

    assert!(error.contains(conf.to_str().unwrap()), "{error}");
    assert!(error.contains("client.cinder: Permission denied"), "{error}");
}

#[test]
fn without_a_keyring_or_a_key_in_it_the_error_says_who_has_none() {
    let folder = TempDir::new().unwrap();
    let conf = conf_with_keyring(&Ceph::shared(), folder.path(), &folder.path().join("no-keyring"));
    let error = Cluster::connect(&conf, "cinder", SECONDS_MAX).err().unwrap().to_string();
    assert!(error.contains("client.cinder: "), "{error}");

    let error = Cluster::connect(Ceph::shared().conf(), "nobody", SECONDS_MAX).err().unwrap().to_string();
    assert!(error.contains("client.nobody: "), "{error}");
}

#[test]
fn an_image_has_the_bytes_written_and_its_snapshot_those_before() {
    let ceph = Ceph::shared();
    let image = ceph.image("volumes", 5 << 20);
    let mut expected = vec![0; 5 << 20];

    image.write(&[(4096, b"first"), (4 << 20, b"second")]);
    expected[4096..4101].copy_from_slice(b"first");
    expected[4 << 20..][..6].copy_from_slice(b"second");
    image.snapshot("before");
    image.discard(0, 8192);

    assert!(image.read_at("before") == expected);
    expected[..8192].fill(0);
    assert!(image.read() == expected);
    assert!(ceph.rbd(&["ls", "volumes"]).lines().any(|name| image.spec().ends_with(name)));
}

/// The cluster's configuration, but with this keyring.
fn conf_with_keyring(ceph: &Ceph, folder: &Path, keyring: &Path) -> PathBuf {
    let conf = folder.join("ceph.conf");
    let of_cluster = fs::read_to_string(ceph.conf()).unwrap();
    fs::write(&conf, format!("{of_cluster}\n[client]\nkeyring = {}\n", keyring.display())).unwrap();
    conf
}
