//! How a worker begins and ends, and what it says of itself meanwhile: the real program, a real broker, real files.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

#[cfg(feature = "ceph")]
use crate::support::ceph::Ceph;
use crate::support::link::Link;
use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, Worker, event, listen, noise, settings, until};
use backhaul::broker::{Broker, Properties};
use serde_json::{Value, json};

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";
/// With one thread, slow enough that a test can do something while a job runs, however many cores there are.
const SLOW: &str = "object_bytes = 1048576\nsha_block_bytes = 4096\ncompression = \"bz2\"";
/// What a job that is handed back would fail with, if that were an attempt.
const ONE_ATTEMPT: &str = "cpu_threads_max = 1\nattempts_max = 1\n";
const HEALTH: &str = "health_listen = \"127.0.0.1:0\"\n";
/// What stopping may take on top of `drain_seconds_max`, on a machine that is busy.
const FEW_SECONDS: Duration = Duration::from_secs(20);

fn is_begun(stack: &Stack) -> bool {
    stack.objects().iter().any(|object| object.ends_with("-00001"))
}

fn submit_backup(stack: &Stack) -> Value {
    let source = stack.location("a.img");
    let backup = ["backup", "--volume-id", VOLUME, "--source", &source, "--backup-id", BACKUP];
    submit(stack, &backup)
}

/// Sends a job, and gives its id.
fn submit(stack: &Stack, arguments: &[&str]) -> Value {
    let told = stack.ok(&[&["submit"], arguments, &["--json"]].concat());
    serde_json::from_str::<Value>(&told).unwrap()["job_id"].take()
}

/// Tells a worker to stop, and waits until it has, which must not take long.
fn stopped(mut worker: Worker) -> String {
    let since = Instant::now();
    worker.terminate();
    assert_eq!(worker.ended(), 0);
    assert!(since.elapsed() < FEW_SECONDS, "it took {:?}", since.elapsed());
    let log = worker.log();
    assert!(!log.contains("ERROR"), "{log}");
    log
}

/// The event that ends a job; there must be only one.
async fn the_end(stack: &Stack, rabbit: &Rabbit, events: &mut backhaul::broker::Subscription) -> Value {
    let ends = ["succeeded", "failed", "cancelled", "end"];
    let ended = event(events, &ends).await;
    let broker = Broker::connect(settings(rabbit, stack)).await.unwrap();
    let is_told = |object: &String| {
        let kept = fs::read_to_string(stack.path("backups").join(object)).unwrap_or_default();
        kept.contains(r#""told":true"#)
    };
    let is_outcome = |object: &&String| object.contains("outcomes");
    until("all is settled", || stack.objects().iter().filter(is_outcome).all(is_told));
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    assert_eq!(
        event(events, &ends).await,
        json!({}),
        "one completion event, and no other before the test's own"
    );
    ended
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_takes_longer_than_its_worker_may_is_handed_back_and_ended_by_another_one() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), &format!("{ONE_ATTEMPT}drain_seconds_max = 1"), SLOW);
    let volume = noise(21, 64 << 20);
    fs::write(stack.volume("a.img"), &volume).unwrap();
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let first = stack.worker();
    let job_id = submit_backup(&stack);
    until("an object is there", || is_begun(&stack));

    let log = stopped(first);

    assert!(log.contains("handed back") && !log.contains("stopping at once"), "{log}");
    assert!(is_begun(&stack), "what it had made was removed, as if the job had been cancelled");
    assert!(!stack.objects().iter().any(|object| object.ends_with("_metadata")), "the job was too short");
    let second = stack.worker();
    let ended = the_end(&stack, &rabbit, &mut events).await;
    assert_eq!((&ended["type"], &ended["data"]["job_id"]), (&json!("backhaul.job.succeeded.v1"), &job_id));
    assert!(ended["data"].get("attempts").is_none(), "nothing has failed: {ended}");
    assert_eq!(
        ended["data"]["attempt_count"], 1,
        "a worker that is stopped in good order has not died: {ended}"
    );
    assert!(!second.log().contains("parked"), "it was begun at once: {}", second.log());
    // The first worker has left nothing and written nothing late.
    let records: Value = serde_json::from_str(&stack.ok(&["list", "--json"])).unwrap();
    let prefix = records[0]["service_metadata"].as_str().unwrap();
    let objects = stack.objects();
    assert!(objects.iter().all(|object| object.contains(prefix) || object.starts_with(".backhaul/")));
    assert_eq!(objects.iter().filter(|object| !object.starts_with('.')).count(), 64 + 2, "{objects:?}");
    stopped(second);
    let target = stack.location("restored.img");
    stack.ok(&["run", "restore", "--backup-id", BACKUP, "--target", &target]);
    assert!(fs::read(stack.volume("restored.img")).unwrap() == volume);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_is_handed_back_at_once_if_a_worker_may_not_wait_for_it() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), &format!("{ONE_ATTEMPT}drain_seconds_max = 0"), SLOW);
    let volume = noise(22, 64 << 20);
    fs::write(stack.volume("a.img"), &volume).unwrap();
    let source = stack.location("a.img");
    stack.ok(&["run", "backup", "--volume-id", VOLUME, "--source", &source, "--backup-id", BACKUP]);
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let first = stack.worker();
    let job_id = submit(&stack, &["restore", "--backup-id", BACKUP, "--target", &stack.location("b.img")]);
    let partial = stack.volume(".b.img.backhaul-partial");
    until("it is begun", || partial.exists());

    let log = stopped(first);

    assert!(log.contains("handed back") && !log.contains("stopping at once"), "{log}");
    // Nobody writes to it any more, and nobody holds its lock; the next worker goes on with it.
    assert!(partial.exists() && !stack.volume("b.img").exists());
    let second = stack.worker();
    let ended = the_end(&stack, &rabbit, &mut events).await;
    assert_eq!((&ended["type"], &ended["data"]["job_id"]), (&json!("backhaul.job.succeeded.v1"), &job_id));
    assert!(fs::read(stack.volume("b.img")).unwrap() == volume && !partial.exists());
    stopped(second);
}

#[cfg(feature = "ceph")]
#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_backup_is_handed_back_is_free_for_the_next_worker() {
    let (rabbit, ceph) = (Rabbit::shared(), Ceph::shared());
    let stores = format!(
        "[ceph.main]\nconf = \"{}\"\nuser = \"cinder\"\noperation_seconds_max = 30\n\n\
         [store.images]\nkind = \"rbd\"\npool = \"backups\"\ndefault = true\n",
        ceph.conf().display()
    );
    let stack = Stack::new(rabbit.url(), &format!("{ONE_ATTEMPT}drain_seconds_max = 0"), &stores);
    let image = ceph.image("volumes", 128 << 20);
    image.write(&[(0, &noise(24, 128 << 20))]);
    image.slow_down(16 << 20);
    let [volume_id, backup_id] = [(); 2].map(|()| uuid::Uuid::new_v4().to_string());
    let source = format!("rbd:{}", image.spec());
    let (_broker, mut events) = listen(&rabbit, &stack).await;
    let first = stack.worker();
    let backup = ["backup", "--volume-id", &volume_id, "--source", &source, "--backup-id", &backup_id];
    let job_id = submit(&stack, &backup);
    loop {
        let progress = event(&mut events, &["progress", "succeeded", "failed"]).await;
        assert_eq!(progress["type"], "backhaul.job.progress.v1", "it was too quick");
        if progress["data"]["bytes_done"] != 0 {
            break;
        }
    }

    let log = stopped(first);

    assert!(log.contains("handed back") && !log.contains("stopping at once"), "{log}");
    let records: Value =
        serde_json::from_str(&stack.ok(&["list", "--volume-id", &volume_id, "--json"])).unwrap();
    assert_eq!(records[0]["state"], json!({"creating": job_id}), "{records}");
    let chain = format!("backups/volume-{volume_id}.backup.{backup_id}");
    assert_eq!(ceph.rbd(&["lock", "ls", "--format", "json", &chain]).trim(), "[]", "its lock is held");
    image.hurry();
    let second = stack.worker();
    // With one attempt, an image that is in use would be the end of it.
    let ended = the_end(&stack, &rabbit, &mut events).await;
    assert_eq!((&ended["type"], &ended["data"]["job_id"]), (&json!("backhaul.job.succeeded.v1"), &job_id));
    stopped(second);
    stack.ok(&["run", "verify", "--backup-id", &backup_id]);
    stack.ok(&["run", "delete", "--backup-id", &backup_id]);
}

/// The address at which a worker tells of its health.
fn address(worker: &Worker) -> String {
    let mut found = None;
    until("it listens", || {
        let log = worker.log();
        let line = log.lines().find(|line| line.contains("health is told over HTTP"));
        found = line.and_then(|line| line.split("address=").nth(1)).map(|address| address.trim().to_owned());
        found.is_some()
    });
    found.unwrap()
}

/// What a worker answers: the status, and the body.
fn ask(address: &str, path: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

/// Waits until a worker is in this phase, which both answers tell alike, and gives the report.
fn in_phase(address: &str, phase: &str) -> Value {
    let mut report = Value::Null;
    until(phase, || {
        let (status, body) = ask(address, "/readyz");
        assert_eq!(status == 200, body["phase"] == "ready", "{status}: {body}");
        assert_eq!(body.get("why").is_none(), status == 200, "{body}");
        report = body;
        report["phase"] == phase
    });
    let (status, body) = ask(address, "/healthz");
    assert_eq!((status, &body["phase"]), (200, &json!(phase)));
    report
}

/// A store behind a server that takes connections and says nothing.
fn silent_store(server: &TcpListener, idle_seconds_max: u32) -> String {
    format!(
        "default = true\n[store.away]\nkind = \"s3\"\nendpoint = \"http://{}\"\naccess_key = \"a\"\n\
         secret_key = \"b\"\nretries_max = 0\nidle_seconds_max = {idle_seconds_max}\n",
        server.local_addr().unwrap()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_tells_in_each_phase_whether_it_takes_jobs() {
    let rabbit = Rabbit::shared();
    let link = Link::to(rabbit.url());
    link.stall(true);
    let away = TcpListener::bind("127.0.0.1:0").unwrap();
    let store = format!("{SLOW}\n{}", silent_store(&away, 1));
    let worker = format!("{HEALTH}cpu_threads_max = 1\ndrain_seconds_max = 3600");
    let stack = Stack::new(link.url(), &worker, &store);
    let mut worker = stack.start_worker();
    let address = address(&worker);

    let report = in_phase(&address, "no-broker");
    assert!(report["why"].as_str().unwrap().contains("not connected"), "{report}");
    assert_eq!(report["broker_connected_since"], Value::Null, "{report}");

    link.stall(false);
    let report = in_phase(&address, "ready");
    assert!(report["broker_connected_since"].is_string(), "{report}");
    let not_reached = report["stores_not_reached"].as_object().unwrap();
    assert!(not_reached.keys().eq(["away"]) && not_reached["away"].is_string(), "{report}");

    link.stall(true);
    link.cut();
    let report = in_phase(&address, "no-broker");
    assert_eq!(report["broker_connected_since"], Value::Null, "{report}");
    link.stall(false);
    in_phase(&address, "ready");

    fs::write(stack.volume("a.img"), noise(23, 256 << 20)).unwrap();
    submit_backup(&stack);
    until("an object is there", || is_begun(&stack));
    assert_eq!(in_phase(&address, "ready")["running_count"], 1);
    worker.terminate();
    let report = in_phase(&address, "draining");
    assert_eq!(report["running_count"], 1, "{report}");

    // The second signal: the job is there for anybody at once.
    let since = Instant::now();
    worker.terminate();
    assert_eq!(worker.ended(), 0);
    assert!(since.elapsed() < FEW_SECONDS, "it took {:?}", since.elapsed());
    assert!(worker.log().contains("stopping at once"), "{}", worker.log());
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let delivery = broker.jobs(1, 0).next().await.unwrap();
    assert!(delivery.redelivered && delivery.properties.attempt == 1, "{delivery:?}");
    assert!(is_begun(&stack), "what it had made was removed, as if the job had been cancelled");
}

#[test]
fn a_worker_that_waits_for_a_store_at_its_start_says_so_and_can_be_stopped() {
    let rabbit = Rabbit::shared();
    let away = TcpListener::bind("127.0.0.1:0").unwrap();
    let stack = Stack::new(rabbit.url(), HEALTH, &silent_store(&away, 3600));
    let worker = stack.start_worker();

    let report = in_phase(&address(&worker), "starting");

    assert_eq!((&report["running_count"], report["why"].is_string()), (&json!(0), true), "{report}");
    stopped(worker);
}

#[test]
fn a_worker_whose_address_is_taken_does_not_begin() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap();
    let health = format!("health_listen = \"{taken}\"");
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", &health, "");

    let output = stack.run(&["worker"]);

    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("worker.health_listen") && told.contains(&taken.to_string()), "{told}");
}
