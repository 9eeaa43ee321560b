//! Bad input, through the whole program: the event, whoever waits at a terminal and the log of the worker say the same of it,
//! and nothing is lost or half made. `damage.rs` has more of it, below the broker.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Output;

use backhaul::broker::{Broker, Subscription};
use backhaul::error::{Class, Problem};
use backhaul::job::JobId;
use serde_json::{Value, json};

use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, Worker, event, listen, noise};

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const OTHER_VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e89";
const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";
const OTHER_BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4c";
const UNKNOWN: &str = "00000000-0000-4000-8000-000000000000";
const SMALL: &str = "object_bytes = 1048576\nsha_block_bytes = 4096";

/// A worker, and somebody who hears all of its events.
struct Scene {
    stack: Stack,
    worker: Worker,
    events: Subscription,
    _broker: Broker,
}

/// What was told of a job that has ended.
struct Told {
    ended: Value,
    exit_code: Option<i32>,
    /// What whoever waited for it was shown.
    terminal: String,
    /// What the worker has logged of it, one thing a line.
    log: String,
}

impl Scene {
    /// Starts a worker that another program begins.
    async fn new(launcher: &[&str]) -> Self {
        let rabbit = Rabbit::shared();
        let stack = Stack::new(rabbit.url(), "", SMALL);
        let (broker, events) = listen(&rabbit, &stack).await;
        let worker = stack.worker_by(launcher);
        Self { stack, worker, events, _broker: broker }
    }

    /// Submits a job, and waits for its end as people do.
    async fn told(&mut self, arguments: &[&str]) -> Told {
        let job_id = JobId::random().to_string();
        let submit = [&["submit"], arguments, &["--job-id", &job_id, "--wait"]].concat();
        let Output { status, stdout, stderr } = self.stack.run(&submit);
        let ended = event(&mut self.events, &["succeeded", "failed", "cancelled"]).await;
        assert_eq!(ended["data"]["job_id"], job_id, "{ended}");
        let log = self.worker.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(&job_id)).collect();
        let terminal = String::from_utf8([stdout, stderr].concat()).unwrap();
        Told { ended, exit_code: status.code(), terminal, log: lines.join("\n") }
    }

    /// A job that is done.
    async fn done(&mut self, arguments: &[&str]) -> Told {
        let told = self.told(arguments).await;
        assert_eq!((told.exit_code, &told.ended["type"]), (Some(0), &json!("backhaul.job.succeeded.v1")));
        told
    }

    /// A job that fails for good: why, in the words of its event, which the terminal and the log have as well.
    async fn refused(&mut self, arguments: &[&str]) -> String {
        let Told { ended, exit_code, terminal, log } = self.told(arguments).await;
        assert_eq!((exit_code, &ended["type"]), (Some(1), &json!("backhaul.job.failed.v1")), "{ended}");
        let problem: Problem = serde_json::from_value(ended["data"]["error"].clone()).unwrap();
        assert_eq!(problem.class, Class::Permanent, "{ended}");
        let why = problem.to_string();
        for (place, text) in [("terminal", &terminal), ("log", &log)] {
            let is_said = |line: &str| line.contains("failed") && line.contains(&why);
            assert!(text.lines().any(is_said), "{arguments:?}: {why}\nis not told in the {place}:\n{text}");
        }
        why
    }

    /// A backup of a volume of noise.
    async fn back_up(&mut self, volume_id: &str, name: &str, backup_id: &str) {
        fs::write(self.stack.volume(name), noise(6, 1_500_000)).unwrap();
        let arguments = backup_of(volume_id, &self.stack.location(name), &["--backup-id", backup_id]);
        self.done(&strs(&arguments)).await;
    }

    /// A backup of the first volume.
    fn backup(&self, more: &[&str]) -> Vec<String> {
        backup_of(VOLUME, &self.stack.location("a.img"), more)
    }

    /// All that lies in the store, but for what goes soon after the end of a job, and among the volumes.
    fn kept(&self) -> Vec<String> {
        let mut kept = self.stack.objects();
        kept.retain(|object| !object.starts_with(".backhaul/outcomes/"));
        let volumes = fs::read_dir(self.stack.path("volumes")).unwrap();
        kept.extend(volumes.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
        kept.sort();
        kept
    }

    /// The object of the first backup whose name ends so.
    fn object(&self, end: &str) -> String {
        let objects = self.stack.objects();
        objects.into_iter().find(|object| object.contains(BACKUP) && object.ends_with(end)).unwrap()
    }
}

fn backup_of(volume_id: &str, source: &str, more: &[&str]) -> Vec<String> {
    let fixed = ["backup", "--volume-id", volume_id, "--source", source];
    fixed.iter().chain(more).map(ToString::to_string).collect()
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

fn strs(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_done_fails_with_what_to_do_about_it() {
    // Root may read everything, unless it has given that up.
    let ordinary = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"];
    let mut scene = Scene::new(if is_root() { &ordinary } else { &[] }).await;
    scene.back_up(VOLUME, "a.img", BACKUP).await;
    let volume = |name: &str| scene.stack.volume(name);
    fs::write(volume("empty.img"), b"").unwrap();
    symlink(scene.stack.path("backhaul.toml"), volume("link.img")).unwrap();
    fs::write(volume("unreadable.img"), b"a volume").unwrap();
    fs::set_permissions(volume("unreadable.img"), fs::Permissions::from_mode(0o000)).unwrap();
    let without_cluster = match cfg!(feature = "ceph") {
        true => "no cluster is in the configuration",
        false => "built without Ceph",
    };
    let source = |name: &str| backup_of(VOLUME, &scene.stack.location(name), &[]);
    let of_another = backup_of(OTHER_VOLUME, &scene.stack.location("a.img"), &["--parent", BACKUP]);
    let cases = [
        (source("missing.img"), "missing.img: No such file"),
        (source("unreadable.img"), "unreadable.img: Permission denied"),
        (source("../backhaul.toml"), "backhaul.toml is not below one of worker.file_roots"),
        (source("link.img"), "link.img is not below one of worker.file_roots"),
        (source("empty.img"), "empty.img is empty"),
        (
            scene.backup(&["--backup-id", BACKUP]),
            "there is a backup 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b already",
        ),
        (scene.backup(&["--parent", UNKNOWN]), "is not in this store"),
        (of_another, "is a backup of volume 3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88"),
        (scene.backup(&["--store", "other"]), "this worker has no store other: it has local"),
        (owned(&["backup", "--volume-id", VOLUME, "--source", "rbd:pool/image"]), without_cluster),
        (owned(&["verify", "--backup-id", UNKNOWN]), "`backhaul list` shows what is"),
        (
            owned(&["restore", "--backup-id", BACKUP, "--target", "file:/etc/backhaul-test"]),
            "/etc/backhaul-test is not below one of worker.file_roots",
        ),
    ];
    let kept = scene.kept();

    for (arguments, words) in cases {
        let why = scene.refused(&strs(&arguments)).await;
        assert!(why.contains(words), "{arguments:?}: {why}");
        assert_eq!(scene.kept(), kept, "{arguments:?}");
    }

    // And what was there is whole.
    scene.done(&["verify", "--backup-id", BACKUP]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_not_as_it_was_stored_is_named_and_harms_no_other_backup() {
    let mut scene = Scene::new(&[]).await;
    scene.back_up(VOLUME, "a.img", BACKUP).await;
    scene.back_up(OTHER_VOLUME, "b.img", OTHER_BACKUP).await;
    let [data, digests, metadata] = ["-00001", "_sha256file", "_metadata"].map(|end| scene.object(end));
    let (extra, record) = (data.replace("-00001", "-00009"), format!(".backhaul/records/{BACKUP}.json"));
    let target = scene.stack.location("restored.img");
    let [verify, restore] =
        [&["verify", "--backup-id", BACKUP][..], &["restore", "--backup-id", BACKUP, "--target", &target]];
    type Harm = fn(Vec<u8>) -> Option<Vec<u8>>;
    let cases: [(&str, Harm, &str); 7] = [
        (&data, |_| None, "is missing"),
        (&data, |whole| Some(whole[..whole.len() - 1].to_vec()), "is damaged"),
        (&data, |whole| Some([&whole[..1000], b"xyz", &whole[1003..]].concat()), "is damaged"),
        (&extra, |_| Some(b"what is this".to_vec()), "move it away"),
        (&digests, with_another_digest, "is damaged"),
        (&metadata, |_| Some(b"{".to_vec()), "is damaged"),
        (&record, |_| Some(b"{".to_vec()), "is damaged"),
    ];

    for (object, harm, words) in cases {
        let path = scene.stack.path("backups").join(object);
        let whole = fs::read(&path).ok();
        match harm(whole.clone().unwrap_or_default()) {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let kept = scene.kept();

        for arguments in [verify, restore] {
            let why = scene.refused(arguments).await;
            assert!(why.contains(object) && why.contains(words), "{arguments:?}: {why}");
        }
        assert_eq!(scene.kept(), kept);
        scene.done(&["verify", "--backup-id", OTHER_BACKUP]).await;
        match whole {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
    }
    scene.done(verify).await;
}

/// The list of digests with one digit of the first digest changed.
fn with_another_digest(mut list: Vec<u8>) -> Option<Vec<u8>> {
    let key = b"\"sha256s\"";
    let at = list.windows(key.len()).position(|window| window == key)? + key.len();
    let digit = at + list[at..].iter().position(u8::is_ascii_hexdigit)?;
    list[digit] = if list[digit] == b'0' { b'1' } else { b'0' };
    Some(list)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_came_to_nothing_is_not_built_on() {
    let mut scene = Scene::new(&[]).await;
    scene.back_up(VOLUME, "a.img", BACKUP).await;
    let digests = scene.object("_sha256file");
    let path = scene.stack.path("backups").join(&digests);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, with_another_digest(whole.clone()).unwrap()).unwrap();
    let mut kept = scene.kept();

    let why = scene.refused(&strs(&scene.backup(&["--incremental", "--backup-id", OTHER_BACKUP]))).await;

    assert!(why.contains(&digests), "{why}");
    // Of which there is nothing but the record, which says why.
    kept.push(format!(".backhaul/records/{OTHER_BACKUP}.json"));
    kept.sort();
    assert_eq!(scene.kept(), kept);
    assert!(scene.stack.ok(&["show", OTHER_BACKUP]).contains(&format!("error: {why}")));
    fs::write(&path, whole).unwrap();
    let because = scene.refused(&strs(&scene.backup(&["--parent", OTHER_BACKUP]))).await;
    assert!(because.contains(&format!("the parent {OTHER_BACKUP} cannot be built on")), "{because}");
    assert!(because.contains(&why), "{because}");
    assert_eq!(scene.kept(), kept);
    let next = scene.done(&strs(&scene.backup(&["--incremental"]))).await;
    assert_eq!(next.ended["data"]["parent_id"], BACKUP);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_compared_with_its_parent_is_backed_up_in_full_and_all_say_so() {
    let mut scene = Scene::new(&[]).await;
    fs::write(scene.stack.volume("a.img"), noise(5, 100_000)).unwrap();
    let first = scene.backup(&["--backup-id", BACKUP]);
    let mut first = scene.stack.command(&[&["run"][..], &strs(&first)].concat());
    let first = first.env("BACKHAUL_STORE__LOCAL__SHA_BLOCK_BYTES", "8192").output().unwrap();
    assert!(first.status.success(), "{first:?}");

    for (volume_bytes, words) in [
        (100_000, "blocks of 8192 bytes, and sha_block_bytes is set to 4096 now"),
        (200_000, "200000 bytes now and had 100000"),
    ] {
        fs::write(scene.stack.volume("a.img"), noise(5, volume_bytes)).unwrap();
        let told = scene.done(&strs(&scene.backup(&["--incremental"]))).await;

        let ended = &told.ended["data"];
        assert_eq!((&ended["mode"], &ended["parent_id"]), (&json!("full"), &Value::Null), "{ended}");
        let reason: Problem = serde_json::from_value(ended["fallback_reason"].clone()).unwrap();
        let why = reason.to_string();
        assert!(why.contains(words), "{why}");
        assert!(told.terminal.lines().any(|line| line.ends_with(&why)), "{}", told.terminal);
        assert!(told.log.lines().any(|line| line.ends_with(&format!("error={why}"))), "{}", told.log);
    }
}

/// Its store lies on a file system of 1 MiB.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_does_not_fit_says_so_and_what_is_there_stays_whole() {
    let own_mounts: &[&str] = if is_root() {
        &["unshare", "--mount"]
    } else {
        &["unshare", "--user", "--map-root-user", "--mount"]
    };
    let small = ["sh", "-c", "mount -t tmpfs -o size=1m none backups && exec \"$@\"", "sh"];
    let mut scene = Scene::new(&[own_mounts, &small].concat()).await;
    fs::write(scene.stack.volume("a.img"), noise(7, 200_000)).unwrap();
    fs::write(scene.stack.volume("large.img"), noise(8, 1_500_000)).unwrap();
    scene.done(&strs(&scene.backup(&["--backup-id", BACKUP]))).await;

    let large = backup_of(OTHER_VOLUME, &scene.stack.location("large.img"), &["--backup-id", OTHER_BACKUP]);
    let why = scene.refused(&strs(&large)).await;

    assert!(why.contains("the store is full: free some space"), "{why}");
    scene.done(&["verify", "--backup-id", BACKUP]).await;
    let target = scene.stack.location("restored.img");
    scene.done(&["restore", "--backup-id", BACKUP, "--target", &target]).await;
    assert!(fs::read(scene.stack.volume("restored.img")).unwrap() == noise(7, 200_000));
}
