//! Whole passes with a store of RBD images: the real program, a real broker, a real cluster.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::support::ceph::{Ceph, Image};
use crate::support::content::Content;
use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, event, listen, noise, rest_of, until};
use backhaul::broker::Properties;
use serde_json::{Value, json};
use uuid::Uuid;

const MIB: usize = 1 << 20;

/// A broker that nobody needs.
const NO_BROKER: &str = "amqp://guest:guest@127.0.0.1:1/%2f";

/// The default store in a pool, beside the one that is a folder.
fn stores(conf: &Path, more: &str) -> String {
    format!(
        "[ceph.main]\nconf = \"{}\"\nuser = \"cinder\"\noperation_seconds_max = 30\n\n\
         [store.images]\nkind = \"rbd\"\npool = \"backups\"\ndefault = true\n{more}",
        conf.display()
    )
}

/// The names of the images of a pool that have `part` in them.
fn images(ceph: &Ceph, pool: &str, part: &str) -> Vec<String> {
    ceph.rbd(&["ls", pool]).lines().filter(|name| name.contains(part)).map(Into::into).collect()
}

fn snapshots(ceph: &Ceph, image: &str) -> Value {
    serde_json::from_str(&ceph.rbd(&["snap", "ls", "--format", "json", image])).unwrap()
}

/// A job that is under way, and somebody who waits for its end.
fn submitted(stack: &Stack, arguments: &[&str]) -> Child {
    let mut command = stack.command(&[&["submit"], arguments, &["--wait", "--json"]].concat());
    command.stdout(Stdio::piped()).spawn().unwrap()
}

/// The `data` of the event that ends the job, which succeeds.
fn succeeded(mut job: Child) -> Value {
    let told = rest_of(&mut job);
    assert_eq!(job.wait().unwrap().code(), Some(0), "{told}");
    serde_json::from_str::<Value>(&told).unwrap()["data"].take()
}

/// Some data, and a lot of nothing.
fn filled(ceph: &Ceph) -> Image<'_> {
    let image = ceph.image("volumes", 64 << 20);
    image.write(&[(0, &noise(1, 3 * MIB)), (20 << 20, &noise(2, 5 * MIB)), ((64 << 20) - 512, &[7; 512])]);
    image
}

#[test]
fn an_rbd_volume_goes_through_the_queue_into_a_pool_and_back() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let stack = Stack::new(rabbit.url(), "", &stores(ceph.conf(), ""));
    let mut worker = stack.worker();
    let image = filled(&ceph);
    let (volume_id, source) = (Uuid::new_v4().to_string(), format!("rbd:{}", image.spec()));
    let backup = ["backup", "--volume-id", &volume_id, "--source", &source];

    let first = image.read();
    let (code, full) = stack.submit(&backup);
    assert_eq!((code, &full["method"], &full["store"]), (0, &json!("rbd full"), &json!("images")), "{full}");
    image.write(&[(21 << 20, &noise(3, 8192))]);
    image.discard(22 << 20, 4 << 20);
    let second = image.read();
    let (code, incremental) = stack.submit(&[&backup[..], &["--incremental"]].concat());
    assert_eq!((code, &incremental["method"]), (0, &json!("rbd incremental")), "{incremental}");
    assert_eq!(incremental["parent_id"], full["backup_id"]);
    let read = incremental["bytes_read"].as_u64().unwrap();
    assert!(read < 16 << 20, "{read} bytes were read of what hardly changed");
    assert_eq!(images(&ceph, "backups", &volume_id).len(), 1, "a chain is one image");

    for (point, bytes) in [(&full, &first), (&incremental, &second)] {
        let id = point["backup_id"].as_str().unwrap();
        let restored = format!("volumes/restored-{id}");
        let target = format!("rbd:main/{restored}");
        let (code, ended) = stack.submit(&["restore", "--backup-id", id, "--target", &target]);
        assert_eq!((code, &ended["digest"]), (0, &point["digest"]), "{ended}");
        assert!(ceph.existing(&restored).read() == *bytes);
        assert_eq!(snapshots(&ceph, &restored), json!([]));
        let (code, ended) = stack.submit(&["verify", "--backup-id", id]);
        assert_eq!((code, &ended["digest"]), (0, &point["digest"]), "{ended}");
    }
    assert!(image.read() == second);

    let list = stack.ok(&["list", "--volume-id", &volume_id]);
    assert!(list.contains(full["backup_id"].as_str().unwrap()), "{list}");
    for point in [&incremental, &full] {
        let id = point["backup_id"].as_str().unwrap();
        assert_eq!(stack.submit(&["delete", "--backup-id", id]).0, 0);
        assert!(!stack.ok(&["list", "--volume-id", &volume_id]).contains(id));
    }
    assert_eq!(images(&ceph, "backups", &volume_id), [""; 0]);
    assert_eq!(snapshots(&ceph, image.spec()), json!([]));

    worker.terminate();
    assert_eq!(worker.ended(), 0);
}

#[test]
fn a_file_is_copied_into_a_pool_and_an_image_into_a_folder() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let stack = Stack::new(rabbit.url(), "", &stores(ceph.conf(), ""));
    let _worker = stack.worker();
    let bytes = [noise(4, 3 * MIB + 1000), vec![0; 9 * MIB], noise(5, 1000)].concat();
    fs::write(stack.volume("a.img"), &bytes).unwrap();
    let image = filled(&ceph);
    let (of_file, of_image) = (stack.location("a.img"), format!("rbd:{}", image.spec()));

    for (source, store, method) in [(&of_file, "images", "copy full"), (&of_image, "local", "chunked full")] {
        let volume_id = Uuid::new_v4().to_string();
        let backup = ["backup", "--volume-id", &volume_id, "--source", source, "--store", store];
        let (code, full) = stack.submit(&backup);
        assert_eq!((code, &full["method"]), (0, &json!(method)), "{full}");

        let (id, target) = (full["backup_id"].as_str().unwrap(), stack.location(&volume_id));
        let (code, ended) =
            stack.submit(&["restore", "--backup-id", id, "--store", store, "--target", &target]);

        assert_eq!((code, &ended["digest"]), (0, &full["digest"]), "{ended}");
        let expected = if store == "images" { bytes.clone() } else { image.read() };
        assert!(fs::read(stack.volume(&volume_id)).unwrap() == expected);
    }
}

#[test]
fn a_cluster_that_is_away_keeps_only_its_own_jobs_waiting() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let conf = tempfile::NamedTempFile::new().unwrap();
    fs::write(&conf, "[global]\nmon_host = 127.0.0.1:1\nauth_client_required = none\n").unwrap();
    let stores = stores(conf.path(), "").replace("_max = 30", "_max = 1");
    let stack = Stack::new(rabbit.url(), "attempts_max = 100", &stores);
    fs::write(stack.volume("a.img"), noise(6, MIB)).unwrap();
    let worker = stack.worker();
    assert!(worker.log().contains("store not reached; its jobs are put off"), "{}", worker.log());
    let (volume_id, backup_id) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
    let source = stack.location("a.img");
    let backup = ["backup", "--volume-id", &volume_id, "--source", &source];

    stack.ok(&[&["submit"], &backup[..], &["--backup-id", &backup_id]].concat());
    until("the job is put off", || worker.log().contains("not done for now, trying again later"));
    let (code, ended) = stack.submit(&[&backup[..], &["--store", "local"]].concat());
    assert_eq!(code, 0, "{ended}");
    assert!(!stack.run(&["list"]).status.success());
    stack.ok(&["list", "--store", "local"]);

    let whole = stack.path("ceph.conf");
    fs::copy(ceph.conf(), &whole).unwrap();
    fs::rename(&whole, conf.path()).unwrap();
    until("the job is done", || {
        let output = stack.run(&["list", "--volume-id", &volume_id]);
        String::from_utf8(output.stdout).unwrap().contains("available")
    });
}

#[test]
fn a_worker_does_not_begin_with_a_pool_or_a_user_that_it_cannot_use() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let of_cluster = stores(ceph.conf(), "");
    let cases = [
        (of_cluster.replace("\"backups\"", "\"nowhere\""), "because: open pool nowhere: No such file"),
        (of_cluster.replace("\"cinder\"", "\"nobody\""), "client.nobody"),
    ];

    for (stores, words) in cases {
        let stack = Stack::new(rabbit.url(), "", &stores);
        let output = stack.run(&["worker"]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(told.contains(words), "{told}");

        let output = stack.run(&["check"]);
        let told = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(told.contains("FAILED  store images: ") && told.contains("ok      store local"), "{told}");
    }
}

/// What a worker is doing when it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Full,
    Incremental,
    Restore,
    /// To an image that was there before.
    RestoreOnto,
}

// One test, because most of it is waiting: Ceph forgets who died, and had an image open, only half a minute later.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_worker_that_is_killed_in_the_middle_leaves_the_job_to_another_one() {
    let all = [Doing::Full, Doing::Incremental, Doing::Restore, Doing::RestoreOnto];
    for one in all.map(|doing| tokio::spawn(kill_while(doing))) {
        one.await.unwrap();
    }
}

async fn kill_while(doing: Doing) {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let stack = Stack::new(rabbit.url(), "", &stores(ceph.conf(), ""));
    let image = filled(&ceph);
    let [volume_id, full_id, incremental_id] = [(); 3].map(|()| Uuid::new_v4().to_string());
    let (source, chain) =
        (format!("rbd:{}", image.spec()), format!("backups/volume-{volume_id}.backup.{full_id}"));
    let backup = ["backup", "--volume-id", &volume_id, "--source", &source, "--backup-id"];
    let (full, incremental) =
        ([&backup[..], &[&full_id]].concat(), [&backup[..], &[&incremental_id, "--incremental"]].concat());
    let restored = format!("volumes/restored-{full_id}");
    let target = format!("rbd:{restored}");
    let restore = ["restore", "--backup-id", &full_id, "--target", &target].to_vec();
    let (job, slow) = match doing {
        Doing::Full => (full, image.spec()),
        Doing::Incremental | Doing::Restore | Doing::RestoreOnto => {
            stack.ok(&[&["run"], &full[..]].concat());
            if doing == Doing::Incremental { (incremental, image.spec()) } else { (restore.clone(), &*chain) }
        }
    };
    if doing == Doing::Incremental {
        image.write(&[(8 << 20, &noise(3, 48 * MIB))]);
    }
    if doing == Doing::RestoreOnto {
        ceph.rbd(&["create", "--size", "64M", &restored]);
        ceph.existing(&restored).write(&[(30 << 20, &noise(4, MIB))]);
    }
    ceph.existing(slow).slow_down(MIB as u64);
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let first = stack.worker();

    let told = stack.ok(&[&["submit"], &job[..], &["--json"]].concat());
    let job_id = serde_json::from_str::<Value>(&told).unwrap()["job_id"].clone();
    let mut bytes_done = 0;
    while bytes_done < 2 * MIB as u64 {
        let progress = event(&mut events, &["progress", "succeeded", "failed"]).await;
        assert_eq!(progress["type"], "backhaul.job.progress.v1", "it was too quick");
        let now = progress["data"]["bytes_done"].as_u64().unwrap();
        // At first it is not known how much there is to do.
        assert!(now == 0 || progress["data"]["bytes_total"] == 64 << 20, "{progress}");
        assert!(bytes_done <= now && now < 64 << 20, "{progress}");
        bytes_done = now;
    }
    first.kill();
    let written = match doing {
        Doing::Restore => format!("{restored}.backhaul-partial"),
        Doing::RestoreOnto => restored.clone(),
        Doing::Full | Doing::Incremental => chain.clone(),
    };
    let ids = [volume_id.clone(), full_id.clone(), incremental_id.clone(), ceph.existing(&written).id()];
    ceph.existing(slow).hurry();
    let mut second = stack.worker();

    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!((&ended["type"], &ended["data"]["job_id"]), (&json!("backhaul.job.succeeded.v1"), &job_id));
    second.terminate();
    assert_eq!(second.ended(), 0);
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    let next = event(&mut events, &["succeeded", "failed", "cancelled", "end"]).await;
    assert_eq!(next, json!({}), "one completion event, and no other before the test's own");

    // Whole backups, and nothing beside them.
    let list: Value =
        serde_json::from_str(&stack.ok(&["list", "--volume-id", &volume_id, "--json"])).unwrap();
    let made = if doing == Doing::Incremental { vec![&full_id, &incremental_id] } else { vec![&full_id] };
    let listed: Vec<_> =
        list.as_array().unwrap().iter().map(|b| json!([b["backup_id"], b["state"]])).collect();
    assert_eq!(listed, made.iter().map(|id| json!([id, "available"])).collect::<Vec<_>>());
    let names = |image: &str| -> Vec<Value> {
        snapshots(&ceph, image).as_array().unwrap().iter().map(|snapshot| snapshot["name"].clone()).collect()
    };
    assert_eq!(names(image.spec()).len(), made.len());
    assert_eq!(names(image.spec()), names(&chain));
    for id in &made {
        stack.ok(&["run", "verify", "--backup-id", id]);
        assert_eq!(digest_lists(&ceph, id).len(), 1, "{:?}", digest_lists(&ceph, id));
    }
    if !matches!(doing, Doing::Restore | Doing::RestoreOnto) {
        stack.ok(&["run", "restore", "--backup-id", made[made.len() - 1], "--target", &target]);
    }
    assert!(ceph.existing(&restored).read() == image.read());
    assert_eq!(snapshots(&ceph, &restored), json!([]));
    ceph.rbd(&["rm", "--no-progress", &restored]);
    for id in made.into_iter().rev() {
        stack.ok(&["run", "delete", "--backup-id", id]);
    }
    assert_eq!(snapshots(&ceph, image.spec()), json!([]));
    for id in [&full_id, &incremental_id] {
        assert_eq!(digest_lists(&ceph, id), Vec::<String>::new());
    }
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    // What only a snapshot held goes some time after it.
    until("nothing is left", || {
        ["backups", "volumes"].iter().all(|pool| ceph.names_with(pool, &ids).is_empty())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_behind_a_checkpoint_leaves_only_the_rest_to_another_one() {
    const CHECKPOINT_BYTES: u64 = 1 << 30;
    const OBJECT_BYTES: u64 = 4 << 20;
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    // There is to be time to kill it between the checkpoint and the end.
    let limits = "attempts_max = 100\njob_bytes_per_second_max = 150994944";
    let stack = Stack::new(rabbit.url(), limits, &stores(ceph.conf(), ""));
    let volume_bytes = CHECKPOINT_BYTES + 96 * OBJECT_BYTES;
    let image = ceph.image("volumes", volume_bytes);
    let [volume_id, full_id, id] = [(); 3].map(|()| Uuid::new_v4().to_string());
    let source = format!("rbd:{}", image.spec());
    let backup = ["backup", "--volume-id", &volume_id, "--source", &source, "--backup-id"];
    stack.ok(&[&["run"], &backup[..], &[&full_id]].concat());
    // Ceph tells each object as changed from its beginning, so that much is read and little written.
    let ends: Vec<(u64, Vec<u8>)> = (1..=volume_bytes / OBJECT_BYTES)
        .map(|number| (number * OBJECT_BYTES - 512, noise(number, 512)))
        .collect();
    image.write(&ends.iter().map(|(offset, bytes)| (*offset, &**bytes)).collect::<Vec<_>>());
    let mut expected = Content::zeros(volume_bytes);
    ends.iter().for_each(|(offset, bytes)| expected.write(*offset, bytes));
    let restored = format!("volumes/restored-{id}");
    let target = format!("rbd:{restored}");
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let mut worker = stack.worker();

    for job in [
        [&backup[..], &[&id, "--incremental"]].concat(),
        ["restore", "--backup-id", &id, "--target", &target].to_vec(),
    ] {
        let told = stack.ok(&[&["submit"], &job[..], &["--json"]].concat());
        let job_id = serde_json::from_str::<Value>(&told).unwrap()["job_id"].clone();
        let mut bytes_done = 0;
        while bytes_done <= CHECKPOINT_BYTES + OBJECT_BYTES {
            let progress = event(&mut events, &["progress", "succeeded", "failed"]).await;
            assert_eq!(progress["type"], "backhaul.job.progress.v1", "it was too quick: {progress}");
            assert_eq!(progress["data"]["job_id"], job_id);
            bytes_done = progress["data"]["bytes_done"].as_u64().unwrap();
        }
        worker.kill();
        worker = stack.worker();

        let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
        assert_eq!(
            (&ended["type"], &ended["data"]["job_id"]),
            (&json!("backhaul.job.succeeded.v1"), &job_id)
        );
        let reused = ended["data"]["bytes_reused"].as_u64().unwrap();
        assert!((CHECKPOINT_BYTES..volume_bytes).contains(&reused), "{ended}");
        assert!(worker.log().contains("going on where an attempt before this one stopped"));
    }

    worker.terminate();
    assert_eq!(worker.ended(), 0);
    assert!(ceph.content(&restored) == expected);
    assert_eq!(images(&ceph, "volumes", &id), [format!("restored-{id}")]);
    assert_eq!(snapshots(&ceph, image.spec()).as_array().unwrap().len(), 2);
    ceph.rbd(&["rm", "--no-progress", &restored]);
}

/// The names of the lists of digests of a backup, as the index of their folder has them; it may be gone with the last one.
fn digest_lists(ceph: &Ceph, backup_id: &str) -> Vec<String> {
    let index = ".backhaul/digests/.index";
    if ceph.names_with("backups", &[index]).is_empty() {
        return Vec::new();
    }
    let keys = ceph.rados(&["-p", "backups", "listomapkeys", index]);
    keys.lines().filter(|key| key.starts_with(backup_id)).map(ToOwned::to_owned).collect()
}

#[test]
fn an_osd_that_stops_in_the_middle_puts_a_restore_and_a_delete_off_and_costs_nothing() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::start_with(&[]));
    let stores = stores(ceph.conf(), "").replace("_max = 30", "_max = 3");
    let stack = Stack::new(rabbit.url(), "attempts_max = 100", &stores);
    let worker = stack.worker();
    let image = filled(&ceph);
    let [volume_id, id, other_id] = [(); 3].map(|()| Uuid::new_v4().to_string());
    let source = format!("rbd:{}", image.spec());
    for id in [&id, &other_id] {
        let backup = ["backup", "--volume-id", &volume_id, "--source", &source, "--backup-id", id];
        assert_eq!(stack.submit(&backup).0, 0);
    }
    let chain = ceph.existing(&format!("backups/volume-{volume_id}.backup.{id}"));
    // Stops the OSD, until the job that is under way is put off.
    let interrupt = || {
        let put_off_count = || worker.log().matches("trying again later").count();
        let before = put_off_count();
        ceph.stop_osd();
        until("the job is put off", || put_off_count() > before);
        ceph.start_osd();
    };

    chain.slow_down(MIB as u64);
    let job = submitted(&stack, &["restore", "--backup-id", &id, "--target", "rbd:volumes/restored"]);
    until("it has begun", || images(&ceph, "volumes", "restored") == ["restored.backhaul-partial"]);
    interrupt();
    chain.hurry();
    succeeded(job);
    assert_eq!(images(&ceph, "volumes", "restored"), ["restored"]);
    assert!(ceph.existing("volumes/restored").read() == image.read());

    let ids = [&*id, &chain.id()];
    let user = chain.watch();
    let job = submitted(&stack, &["delete", "--backup-id", &id]);
    until("it has begun", || snapshots(&ceph, chain.spec()) == json!([]));
    interrupt();
    drop(user);
    succeeded(job);
    until("nothing is left", || ceph.names_with("backups", &ids).is_empty());

    assert!(worker.log().contains("timed out"), "{}", worker.log());
    assert_eq!(stack.submit(&["verify", "--backup-id", &other_id]).0, 0);
    assert_eq!(snapshots(&ceph, image.spec()).as_array().unwrap().len(), 1);
}

#[test]
fn what_cannot_be_reached_is_told_in_the_event_that_ends_the_job_and_nothing_is_left_of_it() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    // The cluster of the store, with a key of another one.
    let keyring = Ceph::other().conf().with_file_name("keyring");
    let conf = tempfile::NamedTempFile::new().unwrap();
    let of_cluster = fs::read_to_string(ceph.conf()).unwrap();
    fs::write(&conf, format!("{of_cluster}\n[client]\nkeyring = {}\n", keyring.display())).unwrap();
    let more = format!(
        "cluster = \"main\"\n\n[ceph.closed]\nconf = \"{}\"\nuser = \"cinder\"\n",
        conf.path().display()
    );
    let stack = Stack::new(rabbit.url(), "attempts_max = 1", &stores(ceph.conf(), &more));
    let _worker = stack.worker();
    let image = filled(&ceph);
    let [volume_id, id] = [(); 2].map(|()| Uuid::new_v4().to_string());
    let source = format!("rbd:main/{}", image.spec());
    let backup = ["backup", "--volume-id", &volume_id, "--backup-id", &id, "--source", &source];
    assert_eq!(stack.submit(&backup).0, 0);
    let in_use = ceph.image("volumes", 64 << 20);
    in_use.write(&[(0, b"old")]);
    let user = in_use.watch();
    let fails = |job: &[&str], expected: &str| {
        let (code, ended) = stack.submit(job);
        let told = format!("{} {}", ended["error"]["message"], ended["error"]["causes"]);
        assert_eq!(code, 1, "{job:?}: {ended}");
        assert!(told.contains(expected), "{job:?}: {told}");
    };

    let [no_image, no_pool, closed, nowhere] =
        ["main/volumes/no-such-image", "main/no-such-pool/image", "closed/volumes/image", "nowhere/a/b"]
            .map(|place| format!("rbd:{place}"));
    let used = format!("rbd:main/{}", in_use.spec());
    let [failed_volume_id, failed_id] = [(); 2].map(|()| Uuid::new_v4().to_string());
    let failing = ["backup", "--volume-id", &failed_volume_id, "--backup-id", &failed_id, "--source"];
    for (source, expected) in [
        (&no_image, "no-such-image: No such file"),
        (&no_pool, "no-such-pool: No such file"),
        (&closed, "client.cinder: Permission denied"),
        (&nowhere, "nowhere"),
    ] {
        fails(&[&failing[..], &[source.as_str()]].concat(), expected);
    }
    for (target, expected) in [
        (&no_pool, "no-such-pool: No such file"),
        (&closed, "client.cinder: Permission denied"),
        (&nowhere, "nowhere"),
        (&used, "in use"),
    ] {
        fails(&["restore", "--backup-id", &id, "--target", target], expected);
    }
    fails(&[&failing[..], &[source.as_str(), "--container", "no-such-pool"]].concat(), "no-such-pool");

    drop(user);
    assert!(in_use.read().starts_with(b"old"));
    assert_eq!(snapshots(&ceph, image.spec()).as_array().unwrap().len(), 1);
    assert_eq!(ceph.names_with("backups", &[&failed_volume_id, &failed_id]), [""; 0]);
    assert_eq!(stack.submit(&["restore", "--backup-id", &id, "--target", &used]).0, 0);
    assert!(in_use.read() == image.read());
}

#[test]
fn a_pool_that_becomes_full_is_told_in_the_event_that_ends_the_job_and_costs_nothing() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::start_with(&[]));
    let stack = Stack::new(rabbit.url(), "attempts_max = 1", &stores(ceph.conf(), ""));
    let _worker = stack.worker();
    let image = filled(&ceph);
    let [volume_id, full_id, failed_id, next_id] = [(); 4].map(|()| Uuid::new_v4().to_string());
    let source = format!("rbd:{}", image.spec());
    let backup = ["backup", "--volume-id", &volume_id, "--source", &source, "--backup-id"];
    assert_eq!(stack.submit(&[&backup[..], &[&full_id]].concat()).0, 0);
    let at_full = image.read();
    image.write(&[(10 << 20, &noise(3, 48 * MIB))]);
    let quota = |bytes: &str| ceph.ceph(&["osd", "pool", "set-quota", "backups", "max_bytes", bytes]);
    let restored_is = |id: &str, bytes: &[u8]| {
        let target = format!("volumes/restored-{id}");
        let (code, ended) =
            stack.submit(&["restore", "--backup-id", id, "--target", &format!("rbd:{target}")]);
        assert_eq!(code, 0, "{ended}");
        ceph.existing(&target).read() == bytes
    };
    // The records and lists of digests lie in that pool, too. Ceph sees that it is full some seconds after it is.
    quota("20000000");
    image.slow_down(3 << 20);

    let incremental = [&backup[..], &[&failed_id, "--incremental"]].concat();
    let (code, ended) = stack.submit(&incremental);

    assert_eq!(code, 1, "{ended}");
    let told = ended["error"].to_string();
    assert!(told.contains("uota") || told.contains("full"), "{told}");
    assert_eq!(stack.submit(&["verify", "--backup-id", &full_id]).0, 0);
    assert!(restored_is(&full_id, &at_full));
    assert_eq!(snapshots(&ceph, image.spec()).as_array().unwrap().len(), 1);
    quota("0");
    image.hurry();
    until("there is room", || !ceph.ceph(&["osd", "pool", "ls", "detail"]).contains("full_quota"));
    let (code, ended) = stack.submit(&[&backup[..], &[&next_id, "--incremental"]].concat());
    assert_eq!((code, &ended["parent_id"]), (0, &json!(full_id)), "{ended}");
    assert!(restored_is(&next_id, &image.read()));
    for id in [&failed_id, &next_id, &full_id] {
        let (code, ended) = stack.submit(&["delete", "--backup-id", id]);
        assert_eq!(code, 0, "{ended}");
    }
    assert_eq!(images(&ceph, "backups", &volume_id), [""; 0]);
    assert_eq!(snapshots(&ceph, image.spec()), json!([]));
}

#[test]
fn a_delete_of_what_is_in_use_waits_then_says_so_and_is_tried_again() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let stack = Stack::new(rabbit.url(), "attempts_max = 100", &stores(ceph.conf(), ""));
    let worker = stack.worker();
    let image = filled(&ceph);
    let source = format!("rbd:{}", image.spec());
    let made = [(); 2].map(|()| {
        let [volume_id, id] = [(); 2].map(|()| Uuid::new_v4().to_string());
        let backup = ["backup", "--volume-id", &volume_id, "--source", &source, "--backup-id", &id];
        assert_eq!(stack.submit(&backup).0, 0);
        (id.clone(), format!("backups/volume-{volume_id}.backup.{id}"))
    });
    let [(watched_id, watched), (cloned_id, cloned)] = &made;
    let user = ceph.existing(watched).watch();
    // As whoever looks into a backup does.
    let snapshot = format!("{cloned}@{}", snapshots(&ceph, cloned)[0]["name"].as_str().unwrap());
    ceph.rbd(&["snap", "protect", &snapshot]);
    let ids = [watched_id, cloned_id, &ceph.existing(watched).id(), &ceph.existing(cloned).id()];

    let mut jobs = [watched_id, cloned_id].map(|id| submitted(&stack, &["delete", "--backup-id", id]));
    until("both are put off", || {
        let log = worker.log();
        ["is in use by somebody else", "it is protected"].iter().all(|why| log.contains(why))
    });
    assert!(jobs.iter_mut().all(|job| job.try_wait().unwrap().is_none()));
    drop(user);
    ceph.rbd(&["snap", "unprotect", &snapshot]);
    jobs.into_iter().for_each(|job| drop(succeeded(job)));

    assert_eq!(snapshots(&ceph, image.spec()), json!([]));
    until("nothing is left", || ceph.names_with("backups", &ids.map(|id| &**id)).is_empty());
}

#[test]
fn check_finds_a_pool_well_and_leaves_nothing_behind() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let more = "journaling = true\nstripe_unit_bytes = 65536\nstripe_count = 4\n";
    let stack = Stack::new(rabbit.url(), "", &stores(ceph.conf(), more));

    let told = stack.ok(&["check"]);

    let ok = "ok      store images: pool backups can be written, read and listed, and images be made in it";
    assert!(told.contains(ok) && !told.contains("FAILED"), "{told}");
    assert_eq!(ceph.names_with("backups", &["check"]), [""; 0]);
    // Stripes must fit into an object.
    let stack = Stack::new(rabbit.url(), "", &stores(ceph.conf(), &more.replace("65536", "8388608")));
    let output = stack.run(&["check"]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("FAILED  store images: create image backups/backhaul-check-"), "{told}");
}

#[test]
fn a_backup_goes_from_one_store_to_another_as_cinders_record() {
    let ceph = Ceph::shared();
    let stack = Stack::new(
        NO_BROKER,
        "",
        &stores(ceph.conf(), "[store.imported]\nkind = \"rbd\"\npool = \"backups2\"\n"),
    );
    let image = filled(&ceph);
    let (volume_id, source) = (Uuid::new_v4().to_string(), format!("rbd:{}", image.spec()));
    let backup = ["run", "backup", "--volume-id", &volume_id, "--source", &source, "--json"];
    let mut ids = Vec::new();
    for more in [&[][..], &["--incremental"]] {
        let ended: Value = serde_json::from_str(&stack.ok(&[&backup[..], more].concat())).unwrap();
        ids.push(ended["data"]["backup_id"].as_str().unwrap().to_owned());
        image.write(&[(9 << 20, &noise(7, 4096))]);
    }

    for id in &ids {
        let exported = stack.ok(&["record", "export", id]);
        assert!(exported.contains("cinder.backup.drivers.ceph.CephBackupDriver"), "{exported}");
        fs::write(stack.path("record.json"), &exported).unwrap();

        let output = stack.run(&["record", "import", "record.json", "--store", "local"]);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(told.contains("cannot be taken into this store, which keeps them as files"), "{told}");

        let taken_in = stack.ok(&["record", "import", "record.json", "--store", "imported"]);
        assert!(taken_in.contains(id.as_str()), "{taken_in}");
        let verified =
            stack.run(&["run", "verify", "--backup-id", id, "--store", "imported", "--log", "warn"]);
        let told = String::from_utf8(verified.stderr).unwrap();
        assert!(verified.status.success() && told.contains("without digests"), "{told}");
        assert_eq!(stack.ok(&["record", "export", id, "--store", "imported"]), exported);
    }
    let shown = stack.ok(&["show", &ids[1], "--store", "imported"]);
    assert!(
        shown.contains("taken in by its export record")
            && shown.contains(&format!("volume-{volume_id}.backup.{}", ids[0])),
        "{shown}"
    );
}
