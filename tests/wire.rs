//! What others see who share no code with us: events as they lie in a queue, the Python programs of the documentation, and the
//! names, kinds and permissions at the broker.

use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

use crate::contracts::validate_event;
use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, noise, settings, until};
use backhaul::broker::{Broker, Properties};
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::ShortString;
use lapin::{Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use serde_json::{Value, json};
use tokio::time::timeout;

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const OTHER_VOLUME: &str = "4f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";
const JOB: &str = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";

/// Binds a queue to the events, and consumes it.
async fn bound(channel: &Channel, exchange: &str, binding_key: &str) -> Consumer {
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let queue = channel.queue_declare("".into(), exclusive, Default::default()).await.unwrap().name().clone();
    let (key, options) = (binding_key.into(), Default::default());
    channel.queue_bind(queue.clone(), exchange.into(), key, options, Default::default()).await.unwrap();
    let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
    channel.basic_consume(queue, "".into(), no_ack, Default::default()).await.unwrap()
}

/// The next event and its routing key. It must keep to its schema, and have the properties that are documented.
async fn next(consumer: &mut Consumer, correlation_id: &str) -> (String, Value) {
    let delivery = timeout(Duration::from_secs(60), consumer.next()).await.expect("an event in time");
    let delivery = delivery.unwrap().unwrap();
    validate_event(&delivery.data);
    let event: Value = serde_json::from_slice(&delivery.data).unwrap();
    let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
    let properties = &delivery.properties;
    assert_eq!(text(properties.content_type()).as_deref(), Some("application/cloudevents+json"));
    assert_eq!(text(properties.correlation_id()).as_deref(), Some(correlation_id), "{event}");
    assert_eq!(json!(text(properties.message_id())), event["id"]);
    assert_eq!(*properties.delivery_mode(), Some(2), "it is persistent: {event}");
    (delivery.routing_key.to_string(), event)
}

/// The first backup of a volume, and one after it has grown.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_on_the_wire_is_as_documented_and_picked_by_its_state_or_its_volume() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", "object_bytes = 1048576\nsha_block_bytes = 4096");
    fs::write(stack.volume("a.img"), noise(5, 100_000)).unwrap();
    let _worker = stack.worker();
    let source = stack.location("a.img");
    let submit = |volume_id: &str| {
        let (code, ended) = stack.submit(&["backup", "--volume-id", volume_id, "--source", &source]);
        assert_eq!(code, 0, "{ended}");
    };
    submit(VOLUME);
    let mut grown = noise(5, 200_000);
    grown[40_960..81_920].fill(0);
    fs::write(stack.volume("a.img"), grown).unwrap();
    let connection = Connection::connect(rabbit.url(), ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let events = format!("{}.events", stack.prefix());
    // That is an error unless it is a durable topic exchange.
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let declared =
        channel.exchange_declare(events.as_str().into(), ExchangeKind::Topic, durable, Default::default());
    declared.await.unwrap();
    let mut of_state = bound(&channel, &events, "*.fell-back.*").await;
    let mut of_volume = bound(&channel, &events, &format!("*.*.{VOLUME}")).await;
    let mut of_operation = bound(&channel, &events, "delete.#").await;

    submit(OTHER_VOLUME);
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let of_ticket = || Properties { correlation_id: Some("ticket-7".into()), ..Properties::default() };
    let backup = json!({ "version": 1, "operation": "backup", "job_id": JOB, "backup_id": BACKUP, "volume_id": VOLUME,
                         "source": source, "incremental": true });
    broker.publish_job(backup.to_string().into_bytes().into(), of_ticket()).await.unwrap();

    let mut seen = Vec::new();
    while !seen.last().is_some_and(|(key, _): &(String, _)| key.starts_with("backup.succeeded.")) {
        seen.push(next(&mut of_volume, "ticket-7").await);
    }
    seen.retain(|(key, _)| !key.starts_with("backup.progress."));
    let keys: Vec<&str> = seen.iter().map(|(key, _)| key.as_str()).collect();
    let states = ["accepted", "started", "fell-back", "started", "succeeded"];
    assert_eq!(keys, states.map(|state| format!("backup.{state}.{VOLUME}")));
    for ((_, event), state) in seen.iter().zip(states) {
        assert_eq!(event["type"], format!("backhaul.job.{state}.v1"));
        assert_eq!((&event["data"]["job_id"], &event["subject"]), (&json!(JOB), &json!(BACKUP)));
    }
    let (_, fell_back) = &seen[2];
    assert_eq!(next(&mut of_state, "ticket-7").await.1, *fell_back);
    let data = &fell_back["data"];
    assert_eq!(
        (&data["from"]["method"], &data["to"]["method"], &data["reason"]["class"]),
        (&json!("chunked incremental"), &json!("chunked full"), &json!("unsuitable"))
    );
    let (_, succeeded) = &seen[4];
    let data = &succeeded["data"];
    let account = json!({ "store": "local", "method": "chunked full", "strategy": "chunked", "mode": "full",
                          "attempt_count": 2, "parent_id": null, "volume_bytes": 200_000, "bytes_read": 200_000,
                          "bytes_zero": 40_960, "bytes_hole": 0, "bytes_unchanged": 0, "bytes_reused": 0,
                          "bytes_written": 0, "object_count": 1 });
    for (field, value) in account.as_object().unwrap() {
        assert_eq!(data[field], *value, "{field}: {data}");
    }
    let reason = data["fallback_reason"]["message"].as_str().unwrap();
    assert!(reason.contains("200000 bytes now") && reason.contains("100000"), "{reason}");
    // The rest of it cannot be compressed.
    let stored = data["bytes_stored"].as_u64().unwrap();
    assert!((159_040..170_000).contains(&stored) && data["seconds"].as_f64().unwrap() > 0.0, "{data}");
    assert!(data["digest"].as_str().unwrap().starts_with("sha256-list:"), "{data}");

    let delete = json!({ "version": 1, "operation": "delete", "job_id": OTHER_VOLUME, "backup_id": BACKUP });
    broker.publish_job(delete.to_string().into_bytes().into(), of_ticket()).await.unwrap();
    let (key, deleted) = next(&mut of_operation, "ticket-7").await;
    assert!(key.starts_with("delete.accepted."), "nothing of the backups came before it: {key} {deleted}");
}

/// The first Python program of a page, as it stands there but for the broker, the names below its prefix, and the volume.
fn documented(page: &str, url: &str, stack: &Stack) -> String {
    let mut program = page.split_once("```python\n").unwrap().1.split_once("```").unwrap().0.to_owned();
    for (written, ours) in [
        ("amqp://guest:guest@127.0.0.1:5672/%2f", url),
        ("\"backhaul.", &format!("\"{}.", stack.prefix())),
        ("file:/var/lib/volumes/a.img", &stack.location("a.img")),
    ] {
        assert!(program.contains(written), "{written} is not in {program}");
        program = program.replace(written, ours);
    }
    program
}

fn python(stack: &Stack, program: &str) -> Output {
    let script = stack.path("producer.py");
    fs::write(&script, program).unwrap();
    let python = std::env::var_os("BACKHAUL_TEST_CINDER").expect("run `make test`, which installs pika");
    Command::new(python).arg(script).output().unwrap()
}

#[test]
fn the_program_of_the_readme_has_a_backup_made_also_before_there_is_a_worker() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", "");
    fs::write(stack.volume("a.img"), noise(33, 1 << 20)).unwrap();
    stack.ok(&["check"]);

    let sent = python(&stack, &documented(include_str!("../README.md"), rabbit.url(), &stack));

    assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    let _worker = stack.worker();
    let records = || serde_json::from_str::<Value>(&stack.ok(&["list", "--json"])).unwrap();
    until("the backup is made", || records()[0]["state"] == "available");
    assert_eq!(records()[0]["volume_id"], VOLUME);
}

#[test]
fn the_program_of_the_page_on_messages_has_a_backup_made_and_hears_of_it() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", "");
    let _worker = stack.worker();
    let program = documented(include_str!("../docs/messages.md"), rabbit.url(), &stack);
    let run = || {
        let ran = python(&stack, &program);
        let told = String::from_utf8(ran.stdout).unwrap();
        assert!(ran.status.success(), "{told}{}", String::from_utf8_lossy(&ran.stderr));
        let (kind, data) = told.split_once(' ').unwrap();
        (kind.to_owned(), serde_json::from_str::<Value>(data).unwrap())
    };

    let (kind, data) = run();
    assert_eq!(kind, "backhaul.job.failed.v1", "there is no such volume: {data}");
    fs::write(stack.volume("a.img"), noise(34, 1 << 20)).unwrap();
    let (kind, data) = run();
    assert_eq!(
        (kind.as_str(), &data["bytes_read"]),
        ("backhaul.job.succeeded.v1", &json!(1 << 20)),
        "{data}"
    );
    assert!(stack.ok(&["list"]).contains(data["backup_id"].as_str().unwrap()));
}

#[test]
fn the_documented_permissions_are_enough_and_the_broker_shows_our_names_and_the_kinds_of_our_queues() {
    let rabbit = Rabbit::start();
    let url_of = |user: &str| rabbit.url().replace("guest:guest", &format!("{user}:hush"));
    let stack = Stack::new(&url_of("backhaul"), "name = \"host-7\"", "");
    let page = include_str!("../docs/messages.md");
    for line in page.lines().filter_map(|line| line.strip_prefix("rabbitmqctl set_permissions -p / ")) {
        let (user, patterns) = line.split_once(' ').unwrap();
        let patterns = patterns.replace("backhaul", stack.prefix());
        let [configure, write, read] = patterns.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let [configure, write, read] = [configure, write, read].map(|pattern| pattern.trim_matches('\''));
        rabbit.ctl(&["add_user", user, "hush"]);
        rabbit.ctl(&["set_permissions", "-p", "/", user, configure, write, read]);
    }
    fs::write(stack.volume("a.img"), noise(35, 1 << 20)).unwrap();
    let worker = stack.worker();

    // Done; given up, brought back and given up again; put off until somebody else has let go of its target; cancelled.
    let source = stack.location("a.img");
    let backup = ["backup", "--volume-id", VOLUME, "--source", &source, "--backup-id", BACKUP];
    assert_eq!(stack.submit(&backup).0, 0);
    assert_eq!(stack.submit(&["verify", "--backup-id", JOB]).0, 1);
    until("it is given up", || stack.ok(&["dead", "list"]).contains(JOB));
    stack.ok(&["dead", "retry", "--all"]);
    until("it is given up again", || stack.run(&["dead", "drop", "--all"]).stdout.starts_with(b"1 "));
    fs::write(stack.volume("b.img"), vec![0; 1 << 20]).unwrap();
    let held = fs::File::open(stack.volume("b.img")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let target = stack.location("b.img");
    stack.ok(&["submit", "restore", "--backup-id", BACKUP, "--target", &target]);
    until("it is put off", || worker.log().contains("trying again later"));
    drop(held);
    until("it is done", || fs::read(stack.volume("b.img")).unwrap() == noise(35, 1 << 20));
    stack.ok(&["cancel", JOB]);
    let mark = stack.path(&format!("backups/.backhaul/cancels/{JOB}.json"));
    until("the cancel is kept", || mark.exists());
    let nightly = python(&stack, &documented(page, &url_of("nightly"), &stack));
    assert!(nightly.status.success(), "{}", String::from_utf8_lossy(&nightly.stderr));
    let refused = |line: &&str| line.contains("the broker refused") || line.contains("not settled");
    assert_eq!(worker.log().lines().find(refused), None);

    let connections = rabbit.ctl(&["list_connections", "client_properties"]);
    assert!(connections.contains("{\"connection_name\",\"backhaul worker host-7\"}"), "{connections}");
    let mut check = stack.command(&["check"]);
    let classic = format!("{}.classic", stack.prefix());
    check.env("BACKHAUL_BROKER__PREFIX", &classic).env("BACKHAUL_BROKER__QUEUE", "classic");
    assert!(check.output().unwrap().status.success());
    let queues = rabbit.ctl(&["list_queues", "name", "type"]);
    for (prefix, kind) in [(stack.prefix(), "quorum"), (&classic, "classic")] {
        for queue in ["jobs", "cancels", "dead", "delay.1s"] {
            let line = format!("{prefix}.{queue}\t{kind}");
            assert!(queues.lines().any(|found| found == line), "{line:?} is not in {queues}");
        }
    }
}
