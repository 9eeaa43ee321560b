//! Whole passes: the real program, a real broker, real files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::link::Link;
use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, event, limit_handles, listen, noise, rest_of, settings, until};
use backhaul::broker::{Broker, Properties, Routed, Subscription};
use backhaul::job::{BackupId, BackupWork, Command, Job, JobId, Parent, VolumeId, Work};
use backhaul::message;
use rstest::rstest;
use serde_json::{Value, json};

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";
const SMALL: &str = "object_bytes = 1048576\nsha_block_bytes = 4096";
/// With one thread, slow enough that a test can do something while a backup runs, however many cores there are.
const SLOW: &str = "object_bytes = 1048576\nsha_block_bytes = 4096\ncompression = \"bz2\"";
const ONE_THREAD: &str = "cpu_threads_max = 1";
/// In which a job has ended that somebody wants the end of.
const SOON: Duration = Duration::from_secs(2);

fn backup(stack: &Stack, more: &[&str]) -> Vec<String> {
    let source = stack.location("a.img");
    let fixed = ["backup", "--volume-id", VOLUME, "--source", &source];
    fixed.iter().chain(more).map(ToString::to_string).collect()
}

fn strs(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

#[test]
fn a_volume_goes_through_the_queue_into_the_store_and_back() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let mut first = noise(1, 5_000_000);
    first[2_000_000..3_500_000].fill(0);
    fs::write(stack.volume("a.img"), &first).unwrap();
    let mut worker = stack.worker();

    let (code, full) = stack.submit(&strs(&backup(&stack, &["--name", "first"])));
    assert_eq!(
        (code, &full["mode"], &full["volume_bytes"]),
        (0, &json!("full"), &json!(5_000_000)),
        "{full}"
    );
    let mut second = first.clone();
    second[100_000..100_010].fill(7);
    fs::write(stack.volume("a.img"), &second).unwrap();
    let (code, incremental) = stack.submit(&strs(&backup(&stack, &["--incremental"])));
    assert_eq!((code, &incremental["mode"]), (0, &json!("incremental")), "{incremental}");
    assert_eq!(incremental["parent_id"], full["backup_id"]);
    assert_eq!((&incremental["object_count"], &incremental["store"]), (&json!(1), &json!("local")));

    for (point, bytes) in [(&full, &first), (&incremental, &second)] {
        let id = point["backup_id"].as_str().unwrap();
        let target = stack.location("restored.img");
        let (code, restored) = stack.submit(&["restore", "--backup-id", id, "--target", &target]);
        assert_eq!((code, &restored["digest"]), (0, &point["digest"]), "{restored}");
        assert!(fs::read(stack.volume("restored.img")).unwrap() == *bytes);
        fs::remove_file(stack.volume("restored.img")).unwrap();
        let (code, verified) = stack.submit(&["verify", "--backup-id", id]);
        assert_eq!((code, &verified["digest"]), (0, &point["digest"]), "{verified}");
    }

    assert!(stack.ok(&["list"]).contains(full["backup_id"].as_str().unwrap()));
    let id = full["backup_id"].as_str().unwrap();
    let (code, refused) = stack.submit(&["delete", "--backup-id", id]);
    assert_eq!(code, 1);
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains(incremental["backup_id"].as_str().unwrap()), "{message}");
    for point in [&incremental, &full] {
        let id = point["backup_id"].as_str().unwrap();
        assert_eq!(stack.submit(&["delete", "--backup-id", id]).0, 0);
    }

    worker.terminate();
    assert_eq!(worker.ended(), 0);
    assert_eq!(stack.objects(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_during_a_backup_leaves_the_job_to_another_one() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), ONE_THREAD, SLOW);
    let volume = noise(2, 32 << 20);
    fs::write(stack.volume("a.img"), &volume).unwrap();
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let first = stack.worker();
    let job =
        stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--backup-id", BACKUP, "--json"]))].concat());
    let job_id = serde_json::from_str::<Value>(&job).unwrap()["job_id"].clone();

    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    first.kill();
    assert!(!stack.objects().iter().any(|object| object.ends_with("_metadata")), "killed too late");
    let mut second = stack.worker();

    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!((&ended["type"], &ended["data"]["job_id"]), (&json!("backhaul.job.succeeded.v1"), &job_id));
    second.terminate();
    assert_eq!(second.ended(), 0);
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    let next = event(&mut events, &["succeeded", "failed", "cancelled", "end"]).await;
    assert_eq!(next, json!({}), "one completion event, and no other before the test's own");

    // One visible backup, and nothing of the first attempt.
    let records: Value = serde_json::from_str(&stack.ok(&["list", "--json"])).unwrap();
    assert_eq!((records.as_array().unwrap().len(), &records[0]["state"]), (1, &json!("available")));
    let prefix = records[0]["service_metadata"].as_str().unwrap();
    let outcome = format!(".backhaul/outcomes/{}.json", job_id.as_str().unwrap());
    let objects = stack.objects();
    assert!(
        objects.iter().all(|object| object.contains(prefix)
            || object.ends_with(&format!("records/{BACKUP}.json"))
            || *object == outcome),
        "{objects:?}"
    );
    assert_eq!(
        objects.len(),
        32 + 5,
        "32 data objects, metadata, sha256 file, checksums, record, and the outcome for whoever is still at the job: {objects:?}"
    );
    let target = stack.location("restored.img");
    stack.ok(&["run", "restore", "--backup-id", BACKUP, "--target", &target]);
    assert!(fs::read(stack.volume("restored.img")).unwrap() == volume);
}

/// With SIGKILL, so that nothing is tidied up or noted at the end.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_that_was_killed_had_stored_is_not_stored_again() {
    const NOTED: u64 = 256 << 20;
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), ONE_THREAD, "object_bytes = 4194304\ncompression = \"zlib\"");
    let volume = noise(4, 448 << 20);
    fs::write(stack.volume("a.img"), &volume).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let first = stack.worker();
    stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--backup-id", BACKUP, "--json"]))].concat());

    let is_note =
        |object: &String| object.starts_with(".backhaul/checkpoints/") && !object.contains("/.tmp.");
    until("something is noted", || stack.objects().iter().any(is_note));
    first.kill();
    assert!(!stack.objects().iter().any(|object| object.ends_with("_metadata")), "killed too late");
    let mut second = stack.worker();

    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.succeeded.v1", "{ended}");
    assert_eq!(ended["data"]["bytes_reused"], NOTED, "{ended}");
    assert_eq!(ended["data"]["bytes_read"], 448 << 20, "{ended}");
    second.terminate();
    assert_eq!(second.ended(), 0);
    assert!(stack.ok(&["show", BACKUP]).contains("took over         256.00 MiB"));
    // Data objects, metadata, sha256 file, checksums, record and outcome.
    assert_eq!(stack.objects().len(), 448 / 4 + 5, "{:?}", stack.objects());
    let target = stack.location("restored.img");
    stack.ok(&["run", "restore", "--backup-id", BACKUP, "--target", &target]);
    assert!(fs::read(stack.volume("restored.img")).unwrap() == volume);
    stack.ok(&["run", "delete", "--backup-id", BACKUP]);
    let left = stack.objects();
    assert!(left.iter().all(|object| object.starts_with(".backhaul/outcomes/")), "{left:?}");
}

/// With SIGKILL as well.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_that_was_killed_had_restored_and_flushed_is_not_restored_again() {
    let rabbit = Rabbit::shared();
    // After some seconds there is a note; as many later it would be done.
    let stack = Stack::new(rabbit.url(), "job_bytes_per_second_max = 67108864", "object_bytes = 4194304");
    let volume = noise(14, 448 << 20);
    fs::write(stack.volume("a.img"), &volume).unwrap();
    stack.ok(&[&["run"][..], &strs(&backup(&stack, &["--backup-id", BACKUP]))].concat());
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let mut events = broker.events("#").await.unwrap();
    let first = stack.worker();
    let (target, partial) = (stack.location("b.img"), stack.volume(".b.img.backhaul-partial"));
    stack.ok(&["submit", "restore", "--backup-id", BACKUP, "--target", &target]);

    let is_noted = || {
        let mut note = vec![0; 4096];
        let length = rustix::fs::getxattr(&partial, "user.backhaul.restore", &mut note[..]).unwrap_or(0);
        String::from_utf8_lossy(&note[..length]).contains("object_count")
    };
    until("something is noted", is_noted);
    first.kill();
    assert!(partial.exists() && !stack.volume("b.img").exists(), "killed too late");
    let mut second = stack.worker();

    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.succeeded.v1", "{ended}");
    let reused = ended["data"]["bytes_reused"].as_u64().unwrap();
    assert!((256 << 20..448 << 20).contains(&reused), "{ended}");
    assert_eq!(
        (&ended["data"]["bytes_read"], &ended["data"]["object_count"]),
        (&json!(448 << 20), &json!(112))
    );
    second.terminate();
    assert_eq!(second.ended(), 0);
    assert!(fs::read(stack.volume("b.img")).unwrap() == volume && !partial.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_a_job_is_told_and_put_with_the_dead_letters() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let mut events = broker.events("job.rejected.#").await.unwrap();
    let worker = stack.worker();
    let delete = json!({"version": 1, "operation": "delete", "job_id": BACKUP, "backup_id": BACKUP});
    let with = |name: &str, value: Value| {
        let mut message = delete.clone();
        message[name] = value;
        message.to_string().into_bytes()
    };
    let cases = [
        ("not-json", b"{".to_vec()),
        ("not-json", vec![0xff, 0xfe, 0]),
        ("schema", with("backup_id", json!("7"))),
        ("schema", with("surprise", json!(true))),
        ("unknown-version", with("version", json!(99))),
        ("unknown-operation", with("operation", json!("format"))),
        ("oversize", vec![b' '; (1 << 20) + 1]),
    ];

    let mut expected = BTreeMap::new();
    for (index, (reason, body)) in cases.into_iter().enumerate() {
        let message_id = format!("m{index}");
        let properties = Properties { message_id: Some(message_id.clone()), ..Properties::default() };
        broker.publish_job(body.into(), properties).await.unwrap();
        let rejected = event(&mut events, &["rejected"]).await;
        assert_eq!(rejected["data"]["reason"], reason, "{rejected}");
        assert_eq!(rejected["data"]["message_id"], json!(message_id));
        let (log, why) = (worker.log(), rejected["data"]["message"].as_str().unwrap());
        let is_said = |line: &str| [reason, &message_id, why].iter().all(|words| line.contains(words));
        assert!(log.lines().any(is_said), "{rejected} is not in the log");
        expected.insert(message_id, reason.to_string());
    }

    // The worker is well, and the dead letters say why they are there.
    assert_eq!(stack.submit(&["delete", "--backup-id", BACKUP]).0, 1);
    let dead = dead_letters(&rabbit, &stack, expected.len()).await;
    let words: BTreeMap<_, _> =
        dead.into_iter().map(|(id, reason)| (id, reason.split(": ").next().unwrap().to_string())).collect();
    assert_eq!(words, expected);
}

/// The reasons of so many dead letters, by message id. They come in any order.
async fn dead_letters(rabbit: &Rabbit, stack: &Stack, count: usize) -> BTreeMap<String, String> {
    use lapin::options::BasicGetOptions;
    let connection =
        lapin::Connection::connect(rabbit.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let queue = format!("{}.dead", stack.prefix());
    let mut reasons = BTreeMap::new();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while reasons.len() < count {
        assert!(std::time::Instant::now() < deadline, "only {reasons:?}");
        let Some(message) =
            channel.basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true }).await.unwrap()
        else {
            continue;
        };
        let message_id = message.delivery.properties.message_id().as_ref().unwrap().to_string();
        let headers = message.delivery.properties.headers().clone().unwrap();
        let reason =
            headers.inner().get("x-backhaul-reason").and_then(|value| value.as_long_string()).unwrap();
        reasons.insert(message_id, String::from_utf8(reason.as_bytes().to_vec()).unwrap());
    }
    reasons
}

fn cancel(stack: &Stack, job_id: &str) {
    stack.ok(&["cancel", job_id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_no_worker_heard_ends_the_job_when_one_is_there() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), ONE_THREAD, SLOW);
    fs::write(stack.volume("a.img"), noise(3, 64 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let job_id = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--job-id", job_id]))].concat());
    cancel(&stack, job_id);

    let _worker = stack.worker();
    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.cancelled.v1", "{ended}");
    until("nothing is left", || stack.objects().is_empty());
}

/// One of its two stores is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_one_store_cannot_keep_is_not_kept_anew_by_the_other_nor_told_to_all_workers_again() {
    let rabbit = Rabbit::shared();
    let away = "default = true\n[store.away]\nkind = \"s3\"\nendpoint = \"http://127.0.0.1:1\"\naccess_key = \"a\"\n\
                secret_key = \"b\"\nretries_max = 0";
    let stack = Stack::new(rabbit.url(), "", away);
    let worker = stack.worker();
    let connection =
        lapin::Connection::connect(rabbit.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = lapin::options::QueueDeclareOptions { exclusive: true, ..Default::default() };
    let heard = channel.queue_declare("".into(), options, Default::default()).await.unwrap().name().clone();
    let control = format!("{}.control", stack.prefix()).as_str().into();
    let bound = channel.queue_bind(heard.clone(), control, "".into(), Default::default(), Default::default());
    bound.await.unwrap();
    let job_id = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    let mark = stack.path(&format!("backups/.backhaul/cancels/{job_id}.json"));

    cancel(&stack, job_id);

    until("the cancel is kept", || mark.exists());
    // As when the job has ended there.
    fs::remove_file(&mark).unwrap();
    let tried = || worker.log().matches("could not be kept").count();
    until("the other store is tried again, and again", || tried() > 3);
    assert!(!mark.exists());
    let options = lapin::options::BasicGetOptions { no_ack: true };
    let mut heard_count = 0;
    while channel.basic_get(heard.clone(), options).await.unwrap().is_some() {
        heard_count += 1;
    }
    assert_eq!(heard_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_failed_is_brought_back_and_done() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let _worker = stack.worker();
    let job_id = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--job-id", job_id]))].concat());
    let failed = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(failed["type"], "backhaul.job.failed.v1", "there is no such file: {failed}");

    let mut letters = Value::Null;
    until("the letter is there", || {
        letters = serde_json::from_str(&stack.ok(&["dead", "list", "--json"])).unwrap();
        letters[0].is_object()
    });
    assert_eq!(
        (&letters[0]["job_id"], &letters[0]["operation"]),
        (&json!(job_id), &json!("backup")),
        "{letters}"
    );
    let table = stack.ok(&["dead", "list"]);
    assert!(table.contains(job_id) && table.contains("a.img"), "{table}");
    let shown = stack.ok(&["dead", "show", letters[0]["letter"].as_str().unwrap()]);
    assert!(shown.contains(job_id) && shown.contains("\"operation\":\"backup\""), "{shown}");
    for what in ["show", "retry", "drop"] {
        let unknown = stack.run(&["dead", what, BACKUP]);
        assert_eq!(unknown.status.code(), Some(1), "{what}");
        assert!(String::from_utf8_lossy(&unknown.stderr).contains("dead list"), "{unknown:?}");
    }

    // It has ended already: that is not for the time after somebody has brought it back.
    cancel(&stack, job_id);
    let mark = format!(".backhaul/cancels/{job_id}.json");
    until("the cancel is kept", || stack.objects().contains(&mark));
    fs::write(stack.volume("a.img"), noise(3, 3_000_000)).unwrap();
    assert_eq!(stack.ok(&["dead", "retry", job_id]), "1 message brought back\n");
    let done = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(done["type"], "backhaul.job.succeeded.v1", "{done}");
    assert_eq!(done["data"]["revival_count"], 1);
    assert_ne!(done["id"], failed["id"]);
    assert_eq!(stack.ok(&["dead", "list", "--json"]), "[]\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_brought_back_keeps_no_other_from_that() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let connection =
        lapin::Connection::connect(rabbit.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let dead = format!("{}.dead", stack.prefix());
    let verify = json!({"version": 1, "operation": "verify", "job_id": BACKUP, "backup_id": BACKUP});
    // The queue that the first one came from is there no more, nor the exchange of the second one; the third one was given up by
    // the broker itself.
    let lost = [("lost", ["", "no-such-queue"]), ("gone", ["no-such-exchange", "job"])];
    let verify = verify.to_string();
    for (body, [exchange, routing_key]) in lost.into_iter().chain([(verify.as_str(), ["", ""])]) {
        let mut headers = lapin::types::FieldTable::default();
        let value = |text: &str| lapin::types::AMQPValue::LongString(text.into());
        headers.insert("x-backhaul-exchange".into(), value(exchange));
        headers.insert("x-backhaul-routing-key".into(), value(routing_key));
        let (options, properties) =
            (Default::default(), lapin::BasicProperties::default().with_headers(headers));
        let published =
            channel.basic_publish("".into(), dead.as_str().into(), options, body.as_bytes(), properties);
        published.await.unwrap().await.unwrap();
    }
    let mut letters = Value::Null;
    until("all letters are there", || {
        letters = serde_json::from_str(&stack.ok(&["dead", "list", "--json"])).unwrap();
        letters.as_array().unwrap().len() == 3
    });
    let name = |body: &str| {
        let letter = letters.as_array().unwrap().iter().find(|letter| letter["body"] == body).unwrap();
        letter["letter"].as_str().unwrap()
    };

    let retry = stack.run(&["dead", "retry", "--all"]);

    let (out, told) = (String::from_utf8_lossy(&retry.stdout), String::from_utf8_lossy(&retry.stderr));
    assert_eq!((retry.status.code(), &*out), (Some(1), "1 message brought back\n"), "{told}");
    let names = [name("lost"), "no-such-queue", name("gone"), "no-such-exchange"];
    assert!(names.iter().all(|name| told.contains(name)), "{told}");
    let _worker = stack.worker();
    let ended = event(&mut events, &["succeeded", "failed", "cancelled", "rejected"]).await;
    assert_eq!(ended["data"]["job_id"], BACKUP, "there is no such backup: {ended}");
    // Who drops it is not asked where it came from.
    for letter in [name("lost"), name("gone")] {
        until("it is back and dropped", || stack.run(&["dead", "drop", letter]).status.success());
    }
}

#[test]
fn a_job_that_is_cancelled_while_it_runs_ends_as_cancelled_and_leaves_nothing() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), ONE_THREAD, SLOW);
    fs::write(stack.volume("a.img"), noise(3, 64 << 20)).unwrap();
    let _worker = stack.worker();
    let job_id = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    let arguments = backup(&stack, &["--job-id", job_id, "--wait", "--json"]);
    let mut submit =
        stack.command(&[&["submit"][..], &strs(&arguments)].concat()).stdout(Stdio::piped()).spawn().unwrap();

    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    cancel(&stack, job_id);

    assert_eq!(submit.wait().unwrap().code(), Some(3));
    let ended: Value = serde_json::from_str(&rest_of(&mut submit)).unwrap();
    assert_eq!(ended["type"], "backhaul.job.cancelled.v1");
    until("the outcome is settled", || stack.objects().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_runs_hears_of_its_cancel_at_once() {
    let rabbit = Rabbit::shared();
    // It takes a minute.
    let stack = Stack::new(rabbit.url(), "job_bytes_per_second_max = 1048576", SMALL);
    fs::write(stack.volume("a.img"), noise(3, 64 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let _worker = stack.worker();
    let job_id = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--job-id", job_id]))].concat());
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));

    cancel(&stack, job_id);

    let since = Instant::now();
    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.cancelled.v1", "{ended}");
    // It looks into the store after 5 seconds.
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_for_its_next_try_does_not_wait_for_that_to_be_cancelled() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let config = fs::read_to_string(stack.path("backhaul.toml")).unwrap();
    let config = config.replace("retry_delay_seconds = 1\n", "retry_delay_seconds = 86400\n");
    fs::write(stack.path("backhaul.toml"), config).unwrap();
    fs::write(stack.volume("a.img"), noise(17, 1 << 20)).unwrap();
    stack.ok(&[&["run"][..], &strs(&backup(&stack, &["--backup-id", BACKUP]))].concat());
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    // The one that keeps the cancel is not always the one that put the job off.
    let workers = [stack.worker(), stack.worker()];
    let put_off =
        || workers.iter().map(|worker| worker.log().matches("trying again later").count()).sum::<usize>();
    // Somebody else writes there.
    fs::write(stack.volume("b.img"), vec![0; 1 << 20]).unwrap();
    let held = fs::File::open(stack.volume("b.img")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let submit = |job_id: &str| {
        let target = stack.location("b.img");
        stack.ok(&["submit", "restore", "--backup-id", BACKUP, "--target", &target, "--job-id", job_id]);
    };
    submit(VOLUME);
    until("it is put off", || put_off() == 1);
    for number in 0..3 {
        let job_id = format!("51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c{number}");
        submit(&job_id);
        until("it is put off", || put_off() == number + 2);

        cancel(&stack, &job_id);

        let since = Instant::now();
        let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
        assert_eq!(ended["type"], "backhaul.job.cancelled.v1", "{ended}");
        assert_eq!(ended["data"]["job_id"], json!(job_id));
        assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
    }
    assert_eq!(put_off(), 4, "the first one was left where it was");
}

/// The worker that had heard of it was killed.
#[tokio::test(flavor = "multi_thread")]
async fn that_a_job_was_cancelled_is_known_to_a_worker_that_begins_later() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    fs::write(stack.volume("a.img"), noise(3, 1 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let job_id = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    let (first, mark) = (stack.worker(), format!(".backhaul/cancels/{job_id}.json"));
    cancel(&stack, job_id);
    until("the cancel is kept", || stack.objects().contains(&mark));
    first.kill();
    // Should it not have acknowledged the message yet, that is not what tells the next one.
    let connection =
        lapin::Connection::connect(rabbit.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let cancels = format!("{}.cancels", stack.prefix()).as_str().into();
    channel.queue_delete(cancels, Default::default()).await.unwrap();

    let _second = stack.worker();
    stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--job-id", job_id]))].concat());

    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.cancelled.v1", "{ended}");
    until("nothing is left", || stack.objects().is_empty());
}

#[test]
fn a_job_that_is_cancelled_while_it_waits_is_not_begun() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "cpu_threads_max = 1\njobs_max = 1", SLOW);
    fs::write(stack.volume("a.img"), noise(4, 96 << 20)).unwrap();
    let _worker = stack.worker();
    let (running, waiting) = ("51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3", "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c4");
    let submit = |job_id, more: &[&str]| {
        let arguments = backup(&stack, &[&["--job-id", job_id][..], more].concat());
        stack.command(&[&["submit"][..], &strs(&arguments)].concat()).stdout(Stdio::piped()).spawn().unwrap()
    };
    assert!(submit(running, &[]).wait().unwrap().success());
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    let mut second = submit(waiting, &["--wait", "--json"]);

    cancel(&stack, waiting);
    cancel(&stack, running);

    assert_eq!(second.wait().unwrap().code(), Some(3));
    until("all is settled", || stack.objects().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_to_end_does_not_wait_until_others_have_left_their_places() {
    let rabbit = Rabbit::shared();
    // It takes a minute.
    let stack = Stack::new(
        rabbit.url(),
        "jobs_max = 1
job_bytes_per_second_max = 1048576",
        SMALL,
    );
    fs::write(stack.volume("a.img"), noise(4, 64 << 20)).unwrap();
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let _worker = stack.worker();
    publish_backup(&broker, &stack, VolumeId::random(), "p").await;
    event(&mut events, &["started"]).await;
    let ends = ["succeeded", "failed", "cancelled"];

    let id = publish_backup(&broker, &stack, VolumeId::random(), "p").await;
    cancel(&stack, &id);
    let since = Instant::now();
    let ended = event(&mut events, &ends).await;
    assert_eq!((&ended["type"], &ended["data"]["job_id"]), (&json!("backhaul.job.cancelled.v1"), &json!(id)));
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());

    let late = backup(&stack, &["--job-id", BACKUP, "--deadline", "2s"]);
    stack.ok(&[&["submit"][..], &strs(&late)].concat());
    let ended = event(&mut events, &ends).await;
    assert_eq!(
        (&ended["type"], &ended["data"]["job_id"]),
        (&json!("backhaul.job.failed.v1"), &json!(BACKUP)),
        "{ended}"
    );
}

#[test]
fn who_waits_for_a_job_that_no_worker_takes_up_is_told_so() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", "");
    fs::write(stack.volume("a.img"), noise(3, 1 << 20)).unwrap();
    stack.ok(&["check"]); // makes the queues
    let arguments = backup(&stack, &["--wait"]);
    let arguments = [&["submit"][..], &strs(&arguments)].concat();
    let mut submit = stack.command(&arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(submit.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(told.any(|line| line.contains("no worker has taken the job up yet")));
    let _worker = stack.worker();
    assert_eq!(submit.wait().unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_job_of_a_volume_waits_for_the_first_one_and_holds_no_other_up() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "cpu_threads_max = 1\njobs_max = 2", SLOW);
    fs::write(stack.volume("a.img"), noise(5, 64 << 20)).unwrap();
    fs::write(stack.volume("b.img"), noise(6, 1 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let worker = stack.worker();
    let submit = |more: &[&str]| {
        let printed = stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--json"])), more].concat());
        serde_json::from_str::<Value>(&printed).unwrap()["job_id"].clone()
    };
    let first = submit(&[]);
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    let second = submit(&["--incremental"]);
    until("the second one waits", || worker.log().contains("another job works on the same volume"));
    let (source, volume) = (stack.location("b.img"), "4f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88");
    let (code, other) = stack.submit(&["backup", "--volume-id", volume, "--source", &source]);
    assert_eq!(code, 0, "{other}");

    let mut told = Vec::new();
    while told.len() < 6 {
        let event = event(&mut events, &["accepted", "succeeded", "failed", "cancelled"]).await;
        let job_id = event["data"]["job_id"].clone();
        assert_eq!(event["data"]["attempt_count"].as_u64().unwrap_or(1), 1, "waiting is no attempt: {event}");
        told.push((job_id, event["type"].as_str().unwrap().to_owned()));
    }
    let (accepted, succeeded) = ("backhaul.job.accepted.v1", "backhaul.job.succeeded.v1");
    let expected = [
        (&first, accepted),
        (&other["job_id"], accepted),
        (&other["job_id"], succeeded),
        (&first, succeeded),
        (&second, accepted),
        (&second, succeeded),
    ];
    assert_eq!(told, expected.map(|(job_id, kind)| (job_id.clone(), kind.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_another_workers_job_on_its_volume_and_not_for_a_worker_that_is_dead() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "cpu_threads_max = 1\njobs_max = 1", SLOW);
    fs::write(stack.volume("a.img"), noise(7, 32 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let first = stack.worker();
    let submit = || stack.ok(&[&["submit"][..], &strs(&backup(&stack, &[]))].concat());
    submit();
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    let second = stack.worker();
    submit();
    until("the second one waits", || second.log().contains("another worker's job works on the same volume"));

    first.kill();

    for _ in 0..2 {
        let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
        assert_eq!(ended["type"], "backhaul.job.succeeded.v1", "{ended}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_a_job_are_numbered_from_1_each_time_that_it_is_taken_up() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    fs::write(stack.volume("a.img"), noise(15, 1 << 20)).unwrap();
    stack.ok(&[&["run"][..], &strs(&backup(&stack, &["--backup-id", BACKUP]))].concat());
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let mut events = broker.events("#").await.unwrap();
    let worker = stack.worker();
    // Somebody else writes there, so that the first attempt is put off.
    fs::write(stack.volume("b.img"), vec![0; 1 << 20]).unwrap();
    let held = fs::File::open(stack.volume("b.img")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    stack.ok(&["submit", "restore", "--backup-id", BACKUP, "--target", &stack.location("b.img")]);
    until("it is put off", || worker.log().contains("trying again later"));
    drop(held);

    let mut runs: Vec<Vec<String>> = Vec::new();
    loop {
        let states = ["accepted", "started", "progress", "succeeded", "failed", "cancelled"];
        let event = event(&mut events, &states).await;
        if event["type"] == "backhaul.job.accepted.v1" {
            runs.push(Vec::new());
        }
        runs.last_mut().unwrap().push(event["sequence"].as_str().unwrap().to_owned());
        match event["type"].as_str().unwrap() {
            "backhaul.job.succeeded.v1" => break,
            kind => assert!(!kind.contains("failed") && !kind.contains("cancelled"), "{event}"),
        }
    }
    assert!(runs.len() > 1, "{runs:?}");
    for run in &runs {
        let numbers: Vec<String> = (1..=run.len()).map(|number| format!("{number:020}")).collect();
        assert_eq!(*run, numbers, "{runs:?}");
    }
}

/// Publishes a backup of `a.img` as this volume, for this project.
async fn publish_backup(broker: &Broker, stack: &Stack, volume_id: VolumeId, project: &str) -> String {
    let work = BackupWork {
        backup_id: BackupId::random(),
        volume_id,
        source: stack.location("a.img").parse().unwrap(),
        parent: Parent::None,
        container: None,
        name: None,
        description: None,
        project_id: Some(project.into()),
        volume_meta: None,
    };
    let job = Job { id: JobId::random(), store: None, deadline: None, work: Work::Backup(work) };
    let id = job.id.to_string();
    let body = message::encode_command(&Command::Run(Box::new(job)));
    broker.publish_job(body.into(), Properties::default()).await.unwrap();
    id
}

/// The ids of the next so many jobs that succeed.
async fn succeeded(events: &mut Subscription, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    while ids.len() < count {
        let ended = event(events, &["succeeded", "failed", "cancelled"]).await;
        assert_eq!(ended["type"], "backhaul.job.succeeded.v1", "{ended}");
        ids.push(ended["data"]["job_id"].as_str().unwrap().to_owned());
    }
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn the_few_jobs_of_one_project_do_not_wait_for_the_many_of_another() {
    let rabbit = Rabbit::shared();
    // Each takes a second or so.
    let stack = Stack::new(rabbit.url(), "jobs_max = 2\njob_bytes_per_second_max = 1048576", SMALL);
    fs::write(stack.volume("a.img"), noise(11, 2 << 20)).unwrap();
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let mut few = Vec::new();
    for (project, count) in [("many", 120), ("few", 3)] {
        for _ in 0..count {
            let id = publish_backup(&broker, &stack, VolumeId::random(), project).await;
            if project == "few" {
                few.push(id);
            }
        }
    }

    let _worker = stack.worker();

    let begun = Instant::now();
    let mut done = 0;
    while !few.is_empty() {
        let ended = succeeded(&mut events, 1).await;
        few.retain(|id| !ended.contains(id));
        done += 1;
    }
    println!(
        "3 jobs behind 120 of another project were the last of {done}, {:.1} s after the worker began",
        begun.elapsed().as_secs_f64()
    );
    assert!(done < 60, "the last of the few was number {done}");
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_wait_for_one_volume_are_begun_in_the_order_in_which_they_came() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "jobs_max = 2\njob_bytes_per_second_max = 1048576", SMALL);
    fs::write(stack.volume("a.img"), noise(12, 3 << 20)).unwrap();
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let (workers, volume_id) = ([stack.worker(), stack.worker()], VolumeId::random());
    let put_off = |id: &str| {
        let is_put_off = |line: &str| line.contains(id) && line.contains("delivery put off");
        workers.iter().any(|worker| worker.log().lines().any(is_put_off))
    };
    let mut ids = vec![publish_backup(&broker, &stack, volume_id, "p").await];
    event(&mut events, &["started"]).await;
    for _ in 0..5 {
        let id = publish_backup(&broker, &stack, volume_id, "p").await;
        until("it is put off", || put_off(&id));
        ids.push(id);
    }

    assert_eq!(succeeded(&mut events, 6).await, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_loses_its_first_connection_without_file_handles_connects_again() {
    let rabbit = Rabbit::shared();
    let link = Link::to(rabbit.url());
    let stack = Stack::new(link.url(), "", SMALL);
    fs::write(stack.volume("a.img"), noise(13, 1 << 20)).unwrap();
    let worker = stack.worker();
    limit_handles(worker.pid(), "3");

    link.cut();

    until("it has noticed", || worker.log().contains("broker not reached"));
    limit_handles(worker.pid(), "1024");
    let (code, ended) = stack.submit(&strs(&backup(&stack, &[])));
    assert_eq!(code, 0, "{ended}");
    assert!(!worker.log().contains("panicked"), "{}", worker.log());
}

#[test]
fn a_job_that_waits_for_its_turn_ends_at_its_deadline_and_one_that_runs_as_well() {
    let rabbit = Rabbit::shared();
    // It takes minutes.
    let stack = Stack::new(rabbit.url(), "jobs_max = 2\njob_bytes_per_second_max = 1048576", SMALL);
    fs::write(stack.volume("a.img"), noise(8, 128 << 20)).unwrap();
    let _worker = stack.worker();
    let arguments = backup(&stack, &["--deadline", "30s", "--wait", "--json"]);
    let mut running =
        stack.command(&[&["submit"][..], &strs(&arguments)].concat()).stdout(Stdio::piped()).spawn().unwrap();
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));

    let (code, waited) = stack.submit(&strs(&backup(&stack, &["--deadline", "3s"])));

    let deadline = |event: &Value| event["error"]["message"].as_str().unwrap().contains("by its deadline");
    assert!(running.try_wait().unwrap().is_none(), "the first one goes on");
    assert_eq!((code, &waited["attempt_count"], deadline(&waited)), (1, &json!(0), true), "{waited}");
    assert_eq!(running.wait().unwrap().code(), Some(1));
    let stopped: Value = serde_json::from_str(&rest_of(&mut running)).unwrap();
    assert_eq!(
        (&stopped["data"]["attempt_count"], deadline(&stopped["data"])),
        (&json!(1), true),
        "{stopped}"
    );
    until("nothing of the data is left", || {
        stack.objects().iter().all(|object| object.contains(".backhaul/"))
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn another_job_with_the_id_of_one_that_runs_is_rejected_and_not_taken_for_it() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), ONE_THREAD, SLOW);
    fs::write(stack.volume("a.img"), noise(9, 64 << 20)).unwrap();
    let _worker = stack.worker();
    let job_id = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    stack.ok(&[&["submit"][..], &strs(&backup(&stack, &["--job-id", job_id]))].concat());
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    let target = stack.location("never.img");
    let output = stack.run(&[
        "submit",
        "restore",
        "--backup-id",
        BACKUP,
        "--target",
        &target,
        "--job-id",
        job_id,
        "--wait",
    ]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("give each job an id of its own"), "{told}");
    cancel(&stack, job_id);
    until("the first one is gone", || stack.objects().is_empty());
}

/// What is kept of jobs that were handed out more than once says that they are over and that this was told.
fn check_all_told(stack: &Stack) {
    for object in stack.objects().iter().filter(|object| object.contains("outcomes")) {
        let kept = fs::read_to_string(stack.path("backups").join(object)).unwrap();
        assert!(kept.contains(r#""told":true"#), "{object}: {kept}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_take_longer_than_the_broker_allows_end_once() {
    // It takes back what was not acknowledged for this long, and hands it out again.
    let rabbit = Rabbit::start_with(&["consumer_timeout = 2000"]);
    rabbit.ctl(&["eval", "application:set_env(rabbit, channel_tick_interval, 500)."]);
    let stack = Stack::new(rabbit.url(), "cpu_threads_max = 1\njobs_max = 2", SLOW);
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let mut workers = [stack.worker(), stack.worker()];
    for (index, megabytes) in [(1, 48), (2, 48), (3, 48)] {
        fs::write(stack.volume(&format!("{index}.img")), noise(index, megabytes << 20)).unwrap();
        let (volume_id, source) =
            (format!("3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e8{index}"), stack.location(&format!("{index}.img")));
        stack.ok(&["submit", "backup", "--volume-id", &volume_id, "--source", &source]);
    }

    let (mut started, mut ended) = (BTreeSet::new(), BTreeSet::new());
    while ended.len() < 3 {
        let event = event(&mut events, &["started", "succeeded", "failed", "cancelled"]).await;
        let job_id = event["data"]["job_id"].to_string();
        if event["type"] == "backhaul.job.started.v1" {
            assert!(started.insert(job_id), "nobody begins it again: {event}");
            continue;
        }
        assert_eq!(event["type"], "backhaul.job.succeeded.v1", "{event}");
        assert!(ended.insert(job_id), "it has ended before: {event}");
    }
    assert_eq!(started, ended);
    let queues = ["jobs", "delay.1s"];
    until("no message comes again", || {
        let told = rabbit.ctl(&["list_queues", "--silent", "name", "messages"]);
        let waits = |name: &str| {
            told.lines().any(|line| {
                line.starts_with(&format!("{}.{name}\t", stack.prefix())) && !line.ends_with("\t0")
            })
        };
        !queues.iter().any(|name| waits(name))
    });
    let logs: Vec<String> = workers.iter().map(|worker| worker.log()).collect();
    assert!(
        logs.iter().any(|log| log.contains("delivery adopted") || log.contains("delivery parked")),
        "{logs:?}"
    );
    for worker in &mut workers {
        worker.terminate();
        assert_eq!(worker.ended(), 0);
    }
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    let next = event(&mut events, &["succeeded", "failed", "cancelled", "end"]).await;
    assert_eq!(next, json!({}), "one completion event of each");
    check_all_told(&stack);
}

/// The broker takes it from a worker that takes nothing more, and goes on with it. A verification waits for no other job of its
/// volume.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_delivered_to_another_worker_while_it_runs_is_parked_and_told_once() {
    let rabbit = Rabbit::start_with(&["consumer_timeout = 2000"]);
    rabbit.ctl(&["eval", "application:set_env(rabbit, channel_tick_interval, 500)."]);
    let stack = Stack::new(rabbit.url(), "cpu_threads_max = 1\ndrain_seconds_max = 600", SLOW);
    fs::write(stack.volume("a.img"), noise(9, 64 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    stack.ok(&[&["run"][..], &strs(&backup(&stack, &["--backup-id", BACKUP]))].concat());
    let mut first = stack.worker_with(&[("BACKHAUL_WORKER__JOB_BYTES_PER_SECOND_MAX", "6291456")]);
    stack.ok(&["submit", "verify", "--backup-id", BACKUP]);
    event(&mut events, &["started"]).await;
    first.terminate();
    until("it takes nothing more", || first.log().contains("no more jobs are taken"));

    let mut second = stack.worker();

    until("the delivery is parked", || second.log().contains("delivery parked"));
    let ended = event(&mut events, &["started", "succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.succeeded.v1", "{ended}");
    assert_eq!(first.ended(), 0, "{}", first.log());
    until("the other one finds it done", || second.log().contains("job was done before"));
    second.terminate();
    assert_eq!(second.ended(), 0, "{}", second.log());
    check_all_told(&stack);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_delivered_again_while_it_runs_is_adopted_and_told_once() {
    let rabbit = Rabbit::shared();
    let link = Link::to(rabbit.url());
    let stack = Stack::new(link.url(), ONE_THREAD, SLOW);
    // It takes longer than to connect again.
    fs::write(stack.volume("a.img"), noise(9, 64 << 20)).unwrap();
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let mut worker = stack.worker();
    stack.ok(&[&["submit"][..], &strs(&backup(&stack, &[]))].concat());
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));

    link.cut();

    until("the delivery is adopted", || worker.log().contains("delivery adopted"));
    let ended = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.succeeded.v1");
    worker.terminate();
    assert_eq!(worker.ended(), 0);
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    let next = event(&mut events, &["succeeded", "failed", "cancelled", "end"]).await;
    assert_eq!(next, json!({}), "one completion event, and no other before the test's own");
    check_all_told(&stack);
    assert!(!worker.log().contains("not settled"), "{}", worker.log());
    // It does not come again: what is sent now comes first.
    broker.publish_job("next".into(), Properties::default()).await.unwrap();
    let next = broker.jobs(1, 0).next().await.unwrap();
    assert_eq!(next.body, "next");
}

/// The copies wait where the job runs, in the queue of those that are put off, or at the other worker.
#[rstest]
#[case::one_worker(1, 3)]
#[case::two_workers_of_which_one_is_full(2, 1)]
#[tokio::test(flavor = "multi_thread")]
async fn who_sends_a_job_again_while_it_runs_is_answered_and_it_is_not_done_again(
    #[case] worker_count: usize,
    #[case] jobs_max: usize,
) {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), &format!("cpu_threads_max = 1\njobs_max = {jobs_max}"), SLOW);
    fs::write(stack.volume("a.img"), noise(9, 64 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let _workers: Vec<_> = (0..worker_count).map(|_| stack.worker()).collect();
    stack.ok(&[&["run"][..], &strs(&backup(&stack, &["--backup-id", BACKUP]))].concat());
    // A backup would be found done, whatever is kept of its job.
    let target = stack.location("restored.img");
    let submit = ["submit", "restore", "--backup-id", BACKUP, "--job-id", BACKUP, "--target", &target];

    stack.ok(&submit);
    event(&mut events, &["started"]).await;
    for _ in 0..3 {
        stack.ok(&submit);
    }

    for told in 1..=4 {
        let event = event(&mut events, &["started", "succeeded", "failed", "cancelled"]).await;
        assert_eq!(event["type"], "backhaul.job.succeeded.v1", "{told}: {event}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_copies_of_a_job_that_runs_keep_no_other_job_waiting() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "cpu_threads_max = 1\njobs_max = 2", SLOW);
    fs::write(stack.volume("a.img"), noise(9, 64 << 20)).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let _worker = stack.worker();
    let args = backup(&stack, &["--backup-id", BACKUP, "--job-id", BACKUP]);
    let submit = [&["submit"][..], &strs(&args)].concat();

    stack.ok(&submit);
    event(&mut events, &["started"]).await;
    for _ in 0..8 {
        stack.ok(&submit);
    }
    let other = "00000000-2f4b-4b7e-9a36-5d0c1e2f3a4b";
    stack.ok(&["submit", "verify", "--backup-id", other]);

    let first = event(&mut events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(first["data"]["backup_id"], other, "{first}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_queue_that_is_full_keeps_no_job_from_its_end() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let _worker = stack.worker();
    let connection =
        lapin::Connection::connect(rabbit.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = lapin::options::QueueDeclareOptions { exclusive: true, ..Default::default() };
    let mut limits = lapin::types::FieldTable::default();
    limits.insert("x-max-length".into(), lapin::types::AMQPValue::LongInt(0));
    limits.insert("x-overflow".into(), lapin::types::AMQPValue::LongString("reject-publish".into()));
    let full = channel.queue_declare("".into(), options, limits).await.unwrap();
    let verify = json!({"version": 1, "operation": "verify", "job_id": BACKUP, "backup_id": BACKUP});

    for body in [verify.to_string(), "{".into()] {
        let properties = Properties {
            message_id: Some(body.len().to_string()),
            reply_to: Some(full.name().to_string()),
            ..Properties::default()
        };
        broker.publish_job(body.into_bytes().into(), properties).await.unwrap();
    }

    assert_eq!(dead_letters(&rabbit, &stack, 2).await.len(), 2);
    for _ in 0..2 {
        event(&mut events, &["failed", "rejected"]).await;
    }
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    let next = event(&mut events, &["failed", "rejected", "end"]).await;
    assert_eq!(next, json!({}), "each is told once");
}

/// It told the end of the job again and again, and what could not be a job came again at full speed.
#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_the_broker_refuses_keeps_no_job_from_its_end_and_a_check_tells_why() {
    let rabbit = Rabbit::start();
    let stack = Stack::new(&rabbit.url().replace("guest:guest", "narrow:hush"), "", SMALL);
    let own = format!("^{}\\..*", stack.prefix());
    rabbit.ctl(&["add_user", "narrow", "hush"]);
    rabbit.ctl(&["set_permissions", "-p", "/", "narrow", &own, &own, &own]);
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let worker = stack.worker();
    let verify = json!({"version": 1, "operation": "verify", "job_id": BACKUP, "backup_id": BACKUP});

    for body in [verify.to_string(), "{".into()] {
        let properties = Properties {
            message_id: Some(body.len().to_string()),
            reply_to: Some("theirs".into()),
            ..Properties::default()
        };
        broker.publish_job(body.into_bytes().into(), properties).await.unwrap();
    }

    assert_eq!(dead_letters(&rabbit, &stack, 2).await.len(), 2);
    for _ in 0..2 {
        event(&mut events, &["failed", "rejected"]).await;
    }
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    let next = event(&mut events, &["failed", "rejected", "end"]).await;
    assert_eq!(next, json!({}), "each is told once");
    let is_told = |line: &str| line.contains("theirs") && line.contains("amq.default");
    assert!(worker.log().lines().any(is_told), "{}", worker.log());

    let checked = stack.run(&["check"]);
    let told = String::from_utf8(checked.stdout).unwrap();
    assert_eq!(checked.status.code(), Some(1));
    assert!(told.contains("FAILED  broker: ") && told.contains("'amq.default'"), "{told}");
}

/// It came between the event and the acknowledgement, and went with that.
#[tokio::test(flavor = "multi_thread")]
async fn who_sends_a_job_once_more_as_soon_as_its_end_is_told_is_answered() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let (broker, mut events) = listen(&rabbit, &stack).await;
    let _worker = stack.worker();
    let verify =
        json!({"version": 1, "operation": "verify", "job_id": BACKUP, "backup_id": BACKUP}).to_string();
    // So often that the stack of a thread would not do for one inside the other.
    for _ in 0..100 {
        broker.publish_job(verify.clone().into_bytes().into(), Properties::default()).await.unwrap();
        event(&mut events, &["failed"]).await;
    }
}

/// The modes of all that is in the folder, with the paths.
fn modes(folder: &Path) -> Vec<(PathBuf, bool, u32)> {
    let mut modes = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::metadata(&path).unwrap();
        if metadata.is_dir() {
            modes.extend(self::modes(&path));
        }
        modes.push((path, metadata.is_dir(), metadata.permissions().mode() & 0o7777));
    }
    modes
}

#[rstest]
#[case::that_would_hide_all("077")]
#[case::that_would_show_all("000")]
fn who_may_read_a_backup_does_not_depend_on_the_umask(#[case] umask: &str) {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", SMALL);
    fs::write(stack.volume("a.img"), noise(16, 3 << 20)).unwrap();
    let run = stack.command(&[&["run"][..], &strs(&backup(&stack, &["--container", "of/mine"]))].concat());
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")]).arg(run.get_program());
    shell
        .args(run.get_args())
        .current_dir(stack.path(""))
        .env_remove("BACKHAUL_CONFIG")
        .env_remove("BACKHAUL_LOG");

    let output = shell.output().unwrap();

    assert!(output.status.success(), "{output:?}");
    let modes = modes(&stack.path("backups"));
    let is_as_promised = |(_, is_folder, mode): &(PathBuf, bool, u32)| match is_folder {
        true => *mode == 0o770,
        false => *mode == 0o660,
    };
    assert!(modes.iter().all(is_as_promised), "{modes:?}");
    assert!(modes.len() > 8, "data, metadata, sha256 file, checksums, record, and folders: {modes:?}");
}

#[test]
fn a_backup_whose_job_is_lost_can_be_deleted() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", ONE_THREAD, SLOW);
    fs::write(stack.volume("a.img"), noise(10, 48 << 20)).unwrap();
    let arguments = backup(&stack, &["--backup-id", BACKUP]);
    let mut run = stack.command(&[&["run"][..], &strs(&arguments)].concat()).spawn().unwrap();
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));
    run.kill().unwrap();
    run.wait().unwrap();

    stack.ok(&["run", "delete", "--backup-id", BACKUP]);

    assert_eq!(stack.objects(), [""; 0]);
}

#[test]
fn a_job_in_this_process_that_is_terminated_cleans_up_and_ends_as_cancelled() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", ONE_THREAD, SLOW);
    fs::write(stack.volume("a.img"), noise(11, 48 << 20)).unwrap();
    let arguments = backup(&stack, &["--backup-id", BACKUP]);
    let mut run = stack.command(&[&["run"][..], &strs(&arguments)].concat()).spawn().unwrap();
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));

    let pid = run.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());

    assert_eq!(run.wait().unwrap().code(), Some(3));
    assert_eq!(stack.objects(), [""; 0]);
}

#[test]
fn a_record_is_shown_also_where_it_cannot_be_told_when_the_backup_was_found_whole() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", SMALL);
    fs::write(stack.volume("a.img"), noise(13, 1 << 20)).unwrap();
    stack.ok(&[&["run"][..], &strs(&backup(&stack, &["--backup-id", BACKUP]))].concat());
    stack.ok(&["run", "verify", "--backup-id", BACKUP]);
    fs::write(stack.path(&format!("backups/.backhaul/verified/{BACKUP}.json")), "{").unwrap();

    let shown = stack.run(&["show", BACKUP]);

    let (out, told) = (String::from_utf8_lossy(&shown.stdout), String::from_utf8_lossy(&shown.stderr));
    assert_eq!(shown.status.code(), Some(1), "{told}");
    assert!(out.contains(BACKUP) && told.contains("found whole"), "{out} {told}");
    stack.ok(&["run", "verify", "--backup-id", BACKUP]);
    stack.ok(&["show", BACKUP]);
}

#[test]
fn why_a_job_in_this_process_failed_is_said_also_on_a_store_that_takes_nothing() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", SMALL);
    fs::write(stack.volume("a.img"), noise(12, 1 << 20)).unwrap();
    let arguments = backup(&stack, &["--backup-id", BACKUP, "--json"]);
    // What is below it cannot be written, whoever runs this.
    fs::write(stack.path("backups").join(".backhaul"), "no folder").unwrap();

    let run = stack.command(&[&["run"][..], &strs(&arguments)].concat()).output().unwrap();

    assert_eq!(run.status.code(), Some(1), "{run:?}");
    let event: Value = serde_json::from_slice(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"));
    assert_eq!(event["type"], "backhaul.job.failed.v1", "{event}");
    assert!(event["data"]["error"].to_string().contains(".backhaul/"), "{event}");
}

#[test]
fn a_list_that_nobody_reads_to_its_end_is_no_fault() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", SMALL);
    let mut list = stack.command(&["list", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(list.stdout.take());
    assert_eq!(list.wait().unwrap().code(), Some(0));
}

#[test]
fn a_sample_of_a_backup_is_verified_and_shown_as_one() {
    const OBJECT_COUNT: u64 = 24;
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    fs::write(stack.volume("a.img"), noise(22, (OBJECT_COUNT as usize) << 20)).unwrap();
    let _worker = stack.worker();
    let (code, full) = stack.submit(&strs(&backup(&stack, &["--backup-id", BACKUP])));
    assert_eq!((code, &full["object_count"]), (0, &json!(OBJECT_COUNT)), "{full}");

    let (code, ended) = stack.submit(&["verify", "--backup-id", BACKUP, "--sample", "10%"]);
    let read = ended["object_count"].as_u64().unwrap();
    assert!(code == 0 && (1..OBJECT_COUNT).contains(&read), "{ended}");
    assert!(stack.ok(&["show", BACKUP]).contains("a sample of 10%"));
    let (code, ended) = stack.submit(&["verify", "--backup-id", BACKUP]);
    assert_eq!((code, &ended["object_count"]), (0, &json!(OBJECT_COUNT)), "{ended}");
    // A sample proves less than that.
    stack.ok(&["run", "verify", "--backup-id", BACKUP, "--sample", "1"]);
    assert!(!stack.ok(&["show", BACKUP]).contains("a sample"));
    let refused = stack.run(&["run", "verify", "--backup-id", BACKUP, "--sample", "101"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

#[test]
fn what_a_verification_finds_damaged_is_named_with_who_shares_it() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let mut volume = noise(23, 3 << 20);
    fs::write(stack.volume("a.img"), &volume).unwrap();
    let _worker = stack.worker();
    assert_eq!(stack.submit(&strs(&backup(&stack, &["--backup-id", BACKUP]))).0, 0);
    volume[1_500_000] ^= 1;
    fs::write(stack.volume("a.img"), &volume).unwrap();
    let (code, child) = stack.submit(&strs(&backup(&stack, &["--incremental"])));
    assert_eq!((code, &child["mode"]), (0, &json!("incremental")), "{child}");
    let objects = stack.objects();
    let is_first = |object: &&String| object.contains(BACKUP) && object.ends_with("-00001");
    let object = objects.iter().find(is_first).unwrap();
    let path = stack.path("backups").join(object);
    let mut bytes = fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    fs::write(&path, bytes).unwrap();

    // The first object is a part of every sample.
    for sample in [&[][..], &["--sample", "5%"]] {
        let arguments = [&["verify", "--backup-id", BACKUP], sample].concat();
        let (code, ended) = stack.submit(&arguments);
        let error = ended["error"].to_string();
        assert_eq!((code, &ended["error"]["class"]), (1, &json!("permanent")), "{error}");
        let told = stack.run(&[&["run"], &arguments[..]].concat());
        assert_eq!(told.status.code(), Some(1), "{told:?}");
        let told = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
        for text in [&error, &told] {
            assert!(text.contains(object.as_str()), "{object} is not in: {text}");
            assert!(text.contains(child["backup_id"].as_str().unwrap()), "{text}");
        }
    }
    assert!(!stack.ok(&["show", BACKUP]).contains("a sample"));
    assert_eq!(stack.submit(&["verify", "--backup-id", child["backup_id"].as_str().unwrap()]).0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_became_of_a_message_is_told_to_the_reply_queue_with_the_correlation_id() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let _worker = stack.worker();
    let connection =
        lapin::Connection::connect(rabbit.url(), lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = lapin::options::QueueDeclareOptions { exclusive: true, ..Default::default() };
    let queue = channel.queue_declare("".into(), options, Default::default()).await.unwrap();
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let verify = json!({"version": 1, "operation": "verify", "job_id": BACKUP, "backup_id": BACKUP});
    // With the longest message id that there can be.
    let cases = [(verify.to_string(), "failed"), ("{".into(), "rejected")];

    for (body, state) in cases {
        let properties = Properties {
            correlation_id: Some("ticket-7".into()),
            message_id: Some("m".repeat(255)),
            reply_to: Some(queue.name().to_string()),
            ..Properties::default()
        };
        broker.publish_job(body.into_bytes().into(), properties).await.unwrap();

        let mut reply = None;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while reply.is_none() {
            assert!(std::time::Instant::now() < deadline, "no reply");
            let options = lapin::options::BasicGetOptions { no_ack: true };
            reply = channel.basic_get(queue.name().clone(), options).await.unwrap();
        }
        let reply = reply.unwrap().delivery;
        let event: Value = serde_json::from_slice(&reply.data).unwrap();
        assert_eq!(event["type"], format!("backhaul.job.{state}.v1"));
        let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(ToString::to_string);
        assert_eq!(text(reply.properties.correlation_id()).as_deref(), Some("ticket-7"));
        assert_eq!(json!(text(reply.properties.message_id())), event["id"]);
    }
    assert_eq!(dead_letters(&rabbit, &stack, 1).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waited_for_the_end_of_a_job_leaves_no_queue_behind() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let _worker = stack.worker();
    assert_eq!(stack.submit(&["verify", "--backup-id", BACKUP]).0, 1);
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let routed = broker.publish_event("verify.failed.-", "{}".into(), Properties::default()).await;
    assert_eq!(routed.unwrap(), Routed::Nowhere);
}

#[test]
fn a_worker_that_is_told_to_stop_lets_its_job_come_to_an_end() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), ONE_THREAD, SLOW);
    fs::write(stack.volume("a.img"), noise(7, 16 << 20)).unwrap();
    let mut worker = stack.worker();
    let arguments = backup(&stack, &["--wait", "--json"]);
    let mut submit =
        stack.command(&[&["submit"][..], &strs(&arguments)].concat()).stdout(Stdio::piped()).spawn().unwrap();
    until("an object is there", || stack.objects().iter().any(|object| object.ends_with("-00001")));

    worker.terminate();

    assert_eq!(submit.wait().unwrap().code(), Some(0));
    assert_eq!(worker.ended(), 0);
}

/// lapin shows all that it sends, as numbers: the login, too.
#[test]
fn a_log_that_shows_everything_does_not_show_the_login_at_the_broker() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", "");
    let mut worker = stack.worker_with(&[("BACKHAUL_LOG", "trace,lapin::io_loop=trace")]);
    worker.terminate();
    assert_eq!(worker.ended(), 0);
    let log = worker.log();
    assert!(log.contains("DEBUG lapin"), "the log does not show what it may: {log}");
    let shown = log
        .lines()
        .find(|line| line.contains("TRACE") && (line.contains("lapin") || line.contains("amq_protocol")));
    assert_eq!(shown, None);
}

#[test]
fn a_worker_leaves_no_core_dump_which_would_have_its_keys() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", "");
    let worker = stack.worker();
    let limits = fs::read_to_string(format!("/proc/{}/limits", worker.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    // With 0, Linux would still give it to a program that `core_pattern` names.
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["1", "1"], "{limits}");
}

#[test]
fn a_broker_that_is_not_there_is_a_clear_error_and_not_a_usage_error() {
    let stack = Stack::new("amqp://guest:secret@127.0.0.1:1/%2f", "", SMALL);
    let output = stack.run(&["submit", "verify", "--backup-id", BACKUP, "--wait"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("127.0.0.1:1") && !told.contains("secret"), "{told}");

    let worker = stack.start_worker();
    let is_told = |line: &str| line.contains("broker not reached") && line.contains("127.0.0.1:1");
    until("the worker has told so", || worker.log().lines().any(is_told));
    assert!(!worker.log().contains("secret"), "{}", worker.log());

    let output = stack.run(&["check"]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("FAILED  broker") && told.contains("ok      store local"), "{told}");
}

#[test]
fn check_finds_all_well_and_leaves_nothing_behind() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", SMALL);
    let told = stack.ok(&["check"]);
    assert!(!told.contains("FAILED"), "{told}");
    assert_eq!(fs::read_dir(stack.path("backups")).unwrap().count(), 0);
}

/// It read on until there was no memory left.
#[test]
fn an_export_record_that_does_not_end_is_refused_once_it_is_longer_than_any() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", SMALL);
    let mut import = stack.command(&["record", "import", "-"]);
    let mut import = import.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It stays open.
    let mut input = import.stdin.take().unwrap();
    input.write_all(&vec![b' '; (1 << 20) + 1]).unwrap();

    until("it is refused", || import.try_wait().unwrap().is_some());

    let output = import.wait_with_output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("more than 1048576 bytes"), "{told}");
    let told = String::from_utf8(stack.run(&["record", "import", "/dev/zero"]).stderr).unwrap();
    assert!(told.contains("more than 1048576 bytes"), "{told}");
}

#[test]
fn a_job_can_be_done_without_a_broker() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", SMALL);
    fs::write(stack.volume("a.img"), noise(8, 3_000_000)).unwrap();
    let arguments = backup(&stack, &["--backup-id", BACKUP, "--json"]);
    let ended: Value = serde_json::from_str(&stack.ok(&[&["run"][..], &strs(&arguments)].concat())).unwrap();
    assert_eq!(ended["data"]["bytes_read"], 3_000_000);

    let output = stack.run(&["run", "verify", "--backup-id", "00000000-0000-4000-8000-000000000000"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stack.run(&["run", "verify", "--backup-id", "7"]).status.code(), Some(2));
    for command in [&["list"][..], &["run", "verify", "--backup-id", BACKUP]] {
        let output = stack.run(&[command, &["--store", "other"]].concat());
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(2) && told.contains("there are: local"),
            "{command:?}: {output:?}"
        );
    }

    fs::write(stack.path("no-record.json"), "{}").unwrap();
    for (file, code) in [("nope.json", 2), ("no-record.json", 1)] {
        let output = stack.run(&["record", "import", file]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(file), "{output:?}");
    }
}
