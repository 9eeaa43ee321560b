//! Whole passes with a store of RBD images: the real program, a real broker, a real cluster.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::support::ceph::{Ceph, Image};
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
}

// One test, because most of it is waiting: Ceph forgets who died, and had an image open, only half a minute later.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_worker_that_is_killed_in_the_middle_leaves_the_job_to_another_one() {
    let all = [Doing::Full, Doing::Incremental, Doing::Restore];
    for one in all.map(|doing| tokio::spawn(kill_while(doing))) {
        one.await.unwrap();
    }
}

async fn kill_while(doing: Doing) {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let stack = Stack::new(rabbit.url(), "attempts_max = 100", &stores(ceph.conf(), ""));
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
        Doing::Incremental | Doing::Restore => {
            stack.ok(&[&["run"], &full[..]].concat());
            if doing == Doing::Restore { (restore.clone(), &*chain) } else { (incremental, image.spec()) }
        }
    };
    if doing == Doing::Incremental {
        image.write(&[(8 << 20, &noise(3, 48 * MIB))]);
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
    let written =
        if doing == Doing::Restore { format!("{restored}.backhaul-partial") } else { chain.clone() };
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
    if doing != Doing::Restore {
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
        stack.ok(&["run", "verify", "--backup-id", id, "--store", "imported"]);
        assert_eq!(stack.ok(&["record", "export", id, "--store", "imported"]), exported);
    }
    let shown = stack.ok(&["show", &ids[1], "--store", "imported"]);
    assert!(
        shown.contains("taken in by its export record")
            && shown.contains(&format!("volume-{volume_id}.backup.{}", ids[0])),
        "{shown}"
    );
}
