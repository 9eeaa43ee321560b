//! Stores on shares of NFS servers: what holds in a folder holds there, too.

use std::fs;
use std::process::Command;

use crate::support::share::{is_there, ours, passes_there, run_there};
use crate::support::stack::{Stack, noise};
use backhaul::error::Causes;
use backhaul::store::{Folder, ObjectName, ObjectStore, Posix, Share};
use bytes::Bytes;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// Each of the cases of a folder.
#[test]
fn a_share_keeps_objects_as_a_folder_does() {
    let output = run_there(&["case_1_posix", "--skip", "resume::", "--test-threads", "2"]);
    let told = String::from_utf8_lossy(&output.stdout);
    let passed = told.rsplit_once(" passed").and_then(|(before, _)| before.rsplit(' ').next()?.parse().ok());
    let warned = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && passed >= Some(25), "{passed:?}: {told}{warned}");
}

/// A client of NFS answers from what it remembers of a folder, and a file that it has open it moves away before its name becomes
/// another one's.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_machines_that_swap_at_once_none_overwrites_the_other_and_both_find_what_is_there() {
    const EACH: usize = 50;
    if !is_there() {
        return passes_there(
            "nfs::of_two_machines_that_swap_at_once_none_overwrites_the_other_and_both_find_what_is_there",
        );
    }
    // Neither knows more of the other than another machine would.
    let machines = [None, Some("nosharecache")].map(|options| {
        let folder = ours(options).mount().unwrap();
        Posix::open(&folder).unwrap()
    });
    let name = Folder::own("swaps").object("a").unwrap();
    machines[0].put(&name, "0".into()).await.unwrap();
    let writers = machines.clone().map(|store| {
        let name = name.clone();
        tokio::spawn(async move {
            for _ in 0..EACH {
                loop {
                    let (number, was) = number_in(&store, &name).await;
                    if store.swap(&name, was, (number + 1).to_string().into()).await.unwrap() {
                        break;
                    }
                }
            }
        })
    });
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(number_in(&machines[0], &name).await.0, 2 * EACH);
}

/// The number that an object is, and its bytes.
async fn number_in(store: &Posix, name: &ObjectName) -> (usize, Bytes) {
    let read = store.get(name).await.unwrap().collect(name, MIB).await.unwrap();
    (str::from_utf8(&read).unwrap().parse().unwrap(), read)
}

#[test]
fn a_share_is_mounted_where_it_is_not_yet_and_nothing_else_is_taken_for_it() {
    if !is_there() {
        return passes_there("nfs::a_share_is_mounted_where_it_is_not_yet_and_nothing_else_is_taken_for_it");
    }
    let Share::Ours { share, base, .. } = ours(None) else { unreachable!() };
    let section = format!(
        "[store.share]\nkind = \"nfs\"\ndefault = true\nshare = \"{share}\"\nmount_point_base = \"{}\"\n\
         object_bytes = 1048576\n",
        base.display()
    );
    let (stack, folder) = (Stack::new("amqp://127.0.0.1:1", "", &section), ours(None).folder());
    let told = String::from_utf8(stack.run(&["check"]).stdout).unwrap();
    let well = format!("ok      store share: {} can be written, read and listed", folder.display());
    assert!(told.contains(&well), "{told}");

    let volume_id = ["--volume-id", "00000000-0000-4000-8000-000000000001"];
    let ids = ["00000000-0000-4000-8000-000000000002", "00000000-0000-4000-8000-000000000003"];
    let source = stack.location("a");
    let mut bytes = noise(3, 3 * MIB + 512);
    for (byte, (id, more)) in (1..).zip(ids.into_iter().zip([None, Some("--incremental")])) {
        bytes[MIB..MIB + 100].fill(byte);
        fs::write(stack.volume("a"), &bytes).unwrap();
        let backup = ["run", "backup", "--source", &source, "--backup-id", id];
        stack.ok(&[&backup[..], &volume_id[..], more.as_slice()].concat());
    }
    stack.ok(&["run", "restore", "--target", &stack.location("b"), "--backup-id", ids[1]]);
    assert!(fs::read(stack.volume("b")).unwrap() == bytes);
    stack.ok(&["run", "verify", "--backup-id", ids[1]]);
    // It is on the server.
    let seen_anew = ours(Some("nosharecache")).mount().unwrap();
    assert!(seen_anew.join("00/00").join(ids[1]).is_dir());
    for id in [ids[1], ids[0]] {
        stack.ok(&["run", "delete", "--backup-id", id]);
    }
    assert!(!folder.join("00/00").join(ids[1]).exists());

    let other = ours(Some("vers=4.1"));
    fs::create_dir_all(other.folder()).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "nfs.example.org:/others"]).arg(other.folder());
    assert!(mount.status().unwrap().success());
    let told = Causes(&other.mount().unwrap_err()).to_string();
    assert!(told.starts_with(&format!("mount {share} on ")), "{told}");
    assert!(told.contains("nfs.example.org:/others is mounted there: unmount it"), "{told}");
}

/// A folder is as good as a share for what is written there.
#[test]
fn a_store_on_a_share_has_cinders_word_for_it_and_a_mount_that_fails_is_told() {
    let share = TempDir::new().unwrap();
    let mounted = format!("[store.share]\nkind = \"nfs\"\npath = \"{}\"\n", share.path().display());
    let stack = Stack::new("amqp://127.0.0.1:1", "", &format!("{mounted}default = true\n"));
    fs::write(stack.volume("a"), noise(3, MIB)).unwrap();
    let source = stack.location("a");
    let id = "00000000-0000-4000-8000-000000000002";
    let volume_id = "00000000-0000-4000-8000-000000000001";
    stack.ok(&["run", "backup", "--source", &source, "--volume-id", volume_id, "--backup-id", id]);
    let told = String::from_utf8(stack.run(&["check"]).stdout).unwrap();
    let (well, not_mounted) =
        (format!("ok      store share: {path}", path = share.path().display()), "warning store share: ");
    assert!(told.contains(&well) && told.contains(not_mounted), "{told}");
    assert!(told.contains("which is no share of an NFS server: mount the share there"), "{told}");
    let exported = stack.ok(&["record", "export", id]);
    assert!(exported.contains("cinder.backup.drivers.nfs.NFSBackupDriver"), "{exported}");
    assert!(share.path().join("00/00").join(id).is_dir());

    // The record is taken in by another store where the same share is.
    fs::remove_dir_all(share.path().join(".backhaul")).unwrap();
    let record = stack.path("record");
    fs::write(&record, exported).unwrap();
    stack.ok(&["record", "import", record.to_str().unwrap()]);
    stack.ok(&["run", "verify", "--backup-id", id]);

    let ours = "[store.share]\nkind = \"nfs\"\ndefault = true\nshare = \"127.0.0.1:/no-such-share\"\n\
                mount_options = \"retry=0\"\nmount_point_base = \"mounts\"\n";
    let stack = Stack::new("amqp://127.0.0.1:1", "", ours);
    let told = String::from_utf8(stack.run(&["check"]).stdout).unwrap();
    assert!(told.contains("FAILED  store share: mount 127.0.0.1:/no-such-share on /"), "{told}");
    let told = String::from_utf8(stack.run(&["list"]).stderr).unwrap();
    assert!(told.contains("mount 127.0.0.1:/no-such-share on /"), "{told}");
}
