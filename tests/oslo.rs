//! Messages of oslo.messaging: samples, any bytes at all, and OpenStack's own oslo.messaging at the other end of a real broker.

use std::fs;
use std::path::Path;
use std::time::Duration;

use backhaul::broker::{Reach, RpcQueues, RpcSettings, Tls, TransportUrl};
use backhaul::cinder::database::BackupRow;
use backhaul::cinder::notifications::{Notifier, Priority, payload};
use backhaul::cinder::rpc::{CallError, Incoming, Requests, Rpc, Target};
use backhaul::message::oslo::{
    Answer, Backup, BackupDevice, BackupDeviceInfo, Context, Failure, Notification, NotificationFormat,
    Object, Reply, Request, Snapshot, Volume,
};
use jiff::Timestamp;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Map, Value, json};
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::oslo::Oslo;
use crate::support::rabbit::Rabbit;

/// Longer than anything here takes when it works.
const PATIENCE: Duration = Duration::from_secs(60);
/// For what is not to come: long enough for it to come if it is on its way.
const MOMENT: Duration = Duration::from_millis(700);

const BACKUP: &str = "5d0c1a52-7b7e-4a58-9a53-2f1f0d1c9e01";
const PARENT: &str = "0b7f5a9d-6a52-4f1e-b1c7-3e2d4c5b6a77";
const VOLUME: &str = "9a6b2f4e-0c33-4a1d-8a0e-6f5a3c2b7d11";

fn sample(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/contracts/oslo").join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn samples() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/contracts/oslo");
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn request(name: &str) -> Request {
    Request::parse(&sample(name)).unwrap()
}

#[test]
fn a_cast_is_read_with_its_backup_and_who_asked() {
    let request = request("create_backup.json");

    assert_eq!((request.method.as_str(), request.version.as_str()), ("create_backup", "2.0"));
    assert_eq!(request.unique_id.as_deref(), Some("c0ffee00c0ffee00c0ffee00c0ffee0d"));
    assert_eq!(request.call, None);
    assert_eq!(request.context.request_id(), Some("req-7b1f2c3d-0000-4000-8000-00000000abcd"));
    assert_eq!(request.context.project_id(), Some("project-3"));
    assert_eq!(request.context.text("auth_token"), Some("hush"));
    let backup = Backup::read(request.arg("backup").unwrap()).unwrap();
    assert_eq!((backup.id.to_string(), backup.volume_id.to_string()), (BACKUP.into(), VOLUME.into()));
    assert_eq!((backup.status(), backup.host(), backup.parent_id), ("creating", Some("store-1"), None));
    assert_eq!(backup.object.text("display_name"), Some("Sonntag ä中"));
    assert_eq!(&backup.object.to_json(), request.arg("backup").unwrap());
}

#[test]
fn a_request_without_an_envelope_says_the_same() {
    assert_eq!(request("create_backup_without_envelope.json"), request("create_backup.json"));
}

#[test]
fn an_incremental_backup_names_its_parent() {
    let request = request("create_backup_incremental.json");
    let backup = Backup::read(request.arg("backup").unwrap()).unwrap();

    assert_eq!(backup.parent_id.unwrap().to_string(), PARENT);
    let parent = Backup::read(backup.object.field("parent").unwrap()).unwrap();
    assert_eq!((parent.id.to_string(), parent.status()), (PARENT.into(), "available"));
}

#[test]
fn a_volume_goes_on_as_it_came_with_fields_that_nobody_knows() {
    let request = request("continue_backup.json");
    let info = BackupDeviceInfo::read(request.arg("backup_device").unwrap()).unwrap();
    let BackupDevice::Volume(volume) = info.device else { panic!("no volume") };

    assert_eq!(volume.service(), Some("store-1@rbd-a"));
    assert_eq!(volume.size_gib(), Some(1));
    let sent = &request.args["backup_device"]["versioned_object.data"]["volume"];
    assert_eq!(&volume.object.to_json(), sent);
    assert!(sent["versioned_object.data"]["a_field_of_tomorrow"].is_array());
}

#[test]
fn a_snapshot_is_taken_before_its_volume() {
    let request = request("continue_backup_snapshot.json");
    let info = BackupDeviceInfo::read(request.arg("backup_device").unwrap()).unwrap();

    assert!(info.secure_enabled);
    let BackupDevice::Snapshot(snapshot) = info.device else { panic!("no snapshot") };
    assert_eq!(snapshot.volume_id.to_string(), VOLUME);
}

#[test]
fn a_call_says_where_its_reply_goes_and_how_often_it_wants_to_hear() {
    let call = request("check_support_to_force_delete.json").call.unwrap();
    assert_eq!(call.msg_id, "0123456789abcdef0123456789abcdef");
    assert_eq!(call.reply_queue, "reply_fedcba9876543210fedcba9876543210");
    assert_eq!(call.heartbeat, None);
    let call = request("export_record_monitored.json").call.unwrap();
    assert_eq!(call.heartbeat, Some(Duration::from_secs(10)));
}

#[test]
fn nothing_that_shows_itself_shows_a_credential() {
    let request = request("continue_backup.json");
    let info = BackupDeviceInfo::read(request.arg("backup_device").unwrap()).unwrap();
    for shown in [format!("{request:?}"), format!("{info:?}"), format!("{:?}", request.context)] {
        assert!(!shown.contains("hush"), "{shown}");
    }
}

#[test]
fn replies_are_read() {
    let answer = |name| Reply::parse(&sample(name)).unwrap().answer;

    let Answer::Result(result) = answer("reply_result.json") else { panic!("no result") };
    assert_eq!(result["driver_volume_type"], "rbd");
    assert_eq!(answer("reply_void.json"), Answer::Result(Value::Null));
    assert_eq!(answer("reply_heartbeat.json"), Answer::Heartbeat);
    let Answer::Failure(failure) = answer("reply_failure.json") else { panic!("no failure") };
    assert_eq!((failure.module.as_str(), failure.class.as_str()), ("cinder.exception", "VolumeNotFound"));
    assert_eq!(failure.kwargs["code"], 404);
}

#[test]
fn a_request_fits_an_interface_that_is_not_older() {
    let fits = |version: &str| Request::new(Context::default(), "m", version, Map::new()).fits(2, 4);
    for version in ["2.0", "2.4", "2.4.0", "2.3.9"] {
        assert!(fits(version), "{version}");
    }
    for version in ["2.5", "1.0", "3.0", "2", "", "2.x", "2.4.1", "99999999999.0", "-2.0"] {
        assert!(!fits(version), "{version}");
    }
}

#[test]
fn what_is_no_message_is_refused_with_a_short_reason() {
    let long = format!("[{}]", "1,".repeat(100_000) + "1");
    for body in [
        "",
        "null",
        "[]",
        "{}",
        r#"{"method": 7}"#,
        r#"{"method": "m", "args": [1]}"#,
        r#"{"oslo.version": "3.0", "oslo.message": "{}"}"#,
        r#"{"oslo.version": 2, "oslo.message": "{}"}"#,
        r#"{"oslo.version": "2.0", "oslo.message": {}}"#,
        r#"{"oslo.version": "2.0", "oslo.message": "[]"}"#,
        r#"{"oslo.version": "2.0", "oslo.message": "{"}"#,
        &long,
        &"[".repeat(100_000),
    ] {
        let error = Request::parse(body.as_bytes()).unwrap_err().to_string();
        assert!(error.len() < 300, "{error}");
        Reply::parse(body.as_bytes()).unwrap_err();
    }
    for value in [json!(null), json!({}), json!({ "versioned_object.name": "Backup" }), json!(long)] {
        assert!(Backup::read(&value).unwrap_err().to_string().len() < 300);
    }
}

fn read_everything(body: &[u8]) {
    let _ = Reply::parse(body);
    if let Ok(request) = Request::parse(body) {
        for value in request.args.values() {
            let _ = (Backup::read(value), Volume::read(value), Snapshot::read(value));
            let _ = BackupDeviceInfo::read(value);
            if let Ok(object) = Object::read(value) {
                assert_eq!(&object.to_json(), value);
            }
        }
        assert_eq!(Request::parse(&request.encode()).unwrap(), request);
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_filter("JSON has no others", |n| n.is_finite()).prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(".*", inner, 0..6).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..300)) {
        read_everything(&body);
    }

    #[test]
    fn no_damaged_sample_makes_it_panic(which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(),
                                        byte in any::<u8>(), cut in any::<bool>()) {
        let samples = samples();
        let mut body = samples[which.index(samples.len())].clone();
        let at = at.index(body.len());
        if cut { body.truncate(at) } else { body[at] = byte }
        read_everything(&body);
    }

    #[test]
    fn what_is_written_is_read_the_same(value in any_json(), method in ".*", project in ".*", heartbeat in 0..100u64) {
        let mut context = Context::default();
        context.set("project_id", json!(project));
        context.set("more", value.clone());
        let args = Map::from_iter([("value".to_owned(), value.clone())]);
        let mut request = Request::new(context, method, "1.0", args).calling("reply_x");
        let pause = Duration::from_secs(heartbeat) / 2;
        request.call.as_mut().unwrap().heartbeat = (heartbeat >= 2).then_some(pause);
        prop_assert_eq!(Request::parse(&request.encode()).unwrap(), request);

        let reply = Reply { msg_id: "m".into(), answer: Answer::Result(value.clone()) };
        prop_assert_eq!(Reply::parse(&reply.encode()).unwrap(), reply);
        let failure = Failure { kwargs: Map::from_iter([("k".to_owned(), value)]), ..Failure::invalid_backup("r") };
        let reply = Reply { msg_id: "m".into(), answer: Answer::Failure(failure) };
        prop_assert_eq!(Reply::parse(&reply.encode()).unwrap(), reply);
    }
}

/// What the options of an installation make of the queues, for us and for oslo.
fn flavour(name: &str) -> (RpcQueues, &'static [&'static str]) {
    let plain = RpcQueues::default();
    match name {
        "transient" => (plain, &[]),
        "durable" => (
            RpcQueues { durable: true, cancel_on_failover: true, ..plain },
            &["amqp_durable_queues = true", "enable_cancel_on_failover = true"],
        ),
        "auto-delete" => (RpcQueues { auto_delete: true, ..plain }, &["amqp_auto_delete = true"]),
        "quorum" => (
            RpcQueues { quorum: true, transient_quorum: true, quorum_delivery_limit: 7, ..plain },
            &[
                "rabbit_quorum_queue = true",
                "rabbit_transient_quorum_queue = true",
                "rabbit_quorum_delivery_limit = 7",
            ],
        ),
        // Its queues for replies and for all have names that are told from each other by these.
        "queue manager" => {
            (plain, &["use_queue_manager = true", "hostname = host-of-oslo", "processname = oslo"])
        }
        // All that is sent to all goes through one queue of theirs. Ours is at the same exchange.
        "stream" => (
            RpcQueues { transient_quorum: true, ..plain },
            &[
                "rabbit_stream_fanout = true",
                "rabbit_transient_quorum_queue = true",
                "rabbit_qos_prefetch_count = 10",
            ],
        ),
        _ => panic!("{name}"),
    }
}

/// Names that no other test has.
struct Names {
    url: String,
    exchange: String,
    topic: String,
}

impl Names {
    fn new() -> Self {
        let url = Rabbit::shared().url().replacen("amqp://", "rabbit://", 1);
        let unique = uuid::Uuid::new_v4();
        Self { url, exchange: format!("exchange-{unique}"), topic: format!("topic-{unique}") }
    }

    fn settings(&self, queues: RpcQueues) -> RpcSettings {
        let (url, other_urls) = self.url.parse::<TransportUrl>().unwrap().urls(false);
        let reach = Reach {
            url,
            other_urls,
            connection_name: "oslo test".into(),
            heartbeat_seconds: 10,
            tls: Tls::default(),
            reconnect_seconds_max: 1,
            publish_seconds_max: 60,
        };
        RpcSettings { reach, exchange: self.exchange.clone(), queues }
    }

    async fn rpc(&self, queues: RpcQueues) -> Rpc {
        Rpc::connect(self.settings(queues)).await.unwrap()
    }

    fn oslo(&self, options: &[&str]) -> Oslo {
        Oslo::start(&self.url, &self.exchange, options)
    }

    fn on(&self, host: &str) -> Target {
        Target::on(&self.topic, host)
    }

    /// Waits until two servers consume the queues that servers of the topic share.
    async fn await_second_consumer(&self, host: &str) {
        let rabbit = Rabbit::shared();
        let connection = Connection::connect(rabbit.url(), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        for queue in [self.topic.clone(), format!("{}.{host}", self.topic)] {
            let consumers = async || {
                let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
                let found =
                    channel.queue_declare(queue.as_str().into(), passive, FieldTable::default()).await;
                found.unwrap().consumer_count()
            };
            let second = async {
                while consumers().await < 2 {
                    tokio::time::sleep(MOMENT).await;
                }
            };
            timeout(PATIENCE, second).await.expect("waited in vain for a second consumer");
        }
    }
}

fn asking(method: &str, args: Value) -> Request {
    let mut context = Context::admin("req-1");
    context.set("project_id", json!("project-1"));
    let Value::Object(args) = args else { panic!("{args}") };
    Request::new(context, method, "1.0", args)
}

async fn next(requests: &mut Requests) -> Incoming {
    timeout(PATIENCE, requests.next()).await.expect("waited in vain for a request").expect("no more requests")
}

/// Answers as a service with version 1.3 of an interface would.
async fn answer(incoming: Incoming) {
    let request = &incoming.request;
    let answer = match request.method.as_str() {
        _ if !request.fits(1, 3) => Err(Failure::unsupported_version(request)),
        "echo" => Ok(json!({ "value": request.args["value"], "project_id": request.context.project_id() })),
        "nothing" => Ok(Value::Null),
        "refuse" => Err(Failure::invalid_backup(request.text("reason").unwrap())),
        "slow" => {
            tokio::time::sleep(Duration::from_secs(request.args["seconds"].as_u64().unwrap())).await;
            Ok(json!("at last"))
        }
        other => Err(Failure::no_such_method(other)),
    };
    incoming.reply(answer).await.unwrap();
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_oslo_is_served(
    #[values("transient", "durable", "auto-delete", "quorum", "stream", "queue manager")] queues: &str,
) {
    let names = Names::new();
    let (queues, options) = flavour(queues);
    let rpc = names.rpc(queues).await;
    let mut requests = rpc.serve(&names.topic, "host-1", 0).await.unwrap();
    let serving = tokio::spawn(async move {
        let mut told = Vec::new();
        while told.len() < 3 {
            let incoming = next(&mut requests).await;
            if incoming.request.method == "tell" {
                told.push(incoming.request.args["value"].clone());
                incoming.ack().await.unwrap();
            } else {
                tokio::spawn(answer(incoming));
            }
        }
        told
    });
    let topic = names.topic.clone();
    let mut client = names.oslo(options);

    let asked = tokio::task::spawn_blocking(move || {
        let mut call = |method: &str, args: Value, version: &str, more: Value| {
            let mut command = json!({ "do": "call", "topic": topic, "server": "host-1", "method": method,
                "args": args, "version": version, "context": { "project_id": "project-9" } });
            command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            client.ask(&command)
        };
        let none = || json!({});
        let odd = json!([null, 1, -2.5, "ä中\u{1f980}", { "a": [] }]);
        let echoed = json!({ "value": odd, "project_id": "project-9" });
        assert_eq!(call("echo", json!({ "value": odd }), "1.3", none()), Ok(echoed));
        assert_eq!(call("nothing", none(), "1.0", none()), Ok(Value::Null));
        let failed = call("refuse", json!({ "reason": "because" }), "1.0", none()).unwrap_err();
        assert_eq!(failed["class"], "InvalidBackup_Remote");
        assert_eq!(failed["module"], "cinder.exception_Remote");
        assert!(failed["text"].as_str().unwrap().starts_with("Invalid backup: because"), "{failed}");
        let failed = call("no_such", none(), "1.0", none()).unwrap_err();
        assert_eq!(failed["class"], "NoSuchMethod_Remote", "{failed}");
        let failed = call("echo", json!({ "value": 1 }), "1.4", none()).unwrap_err();
        assert_eq!(failed["class"], "UnsupportedVersion_Remote", "{failed}");
        // Without signs of life it would give up after two seconds.
        let monitored = json!({ "timeout": 60, "call_monitor_timeout": 2 });
        assert_eq!(call("slow", json!({ "seconds": 5 }), "1.0", monitored), Ok(json!("at last")));
        let failed = call("slow", json!({ "seconds": 5 }), "1.0", json!({ "timeout": 1 })).unwrap_err();
        assert_eq!(failed["class"], "MessagingTimeout", "{failed}");
        for to in [json!({ "server": "host-1" }), json!({}), json!({ "fanout": true })] {
            let mut command = json!({ "do": "cast", "topic": topic, "method": "tell", "version": "1.0",
                "args": { "value": to }, "context": {} });
            command.as_object_mut().unwrap().extend(to.as_object().unwrap().clone());
            client.must(&command);
        }
    });
    asked.await.unwrap();

    let mut told: Vec<String> =
        timeout(PATIENCE, serving).await.unwrap().unwrap().iter().map(Value::to_string).collect();
    told.sort();
    assert_eq!(told, [r#"{"fanout":true}"#, r#"{"server":"host-1"}"#, "{}"]);
    rpc.close().await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_service_of_oslo_is_called(
    #[values("transient", "durable", "auto-delete", "quorum", "stream", "queue manager")] queues: &str,
) {
    let names = Names::new();
    let (queues, options) = flavour(queues);
    let mut server = names.oslo(options);
    server.must(&json!({ "do": "serve", "topic": names.topic, "server": "host-2" }));
    let rpc = names.rpc(queues).await;
    let target = names.on("host-2");
    let call = async |request: Request| rpc.call(&target, request, PATIENCE).await;
    let failure = async |request: Request| match call(request).await.unwrap_err() {
        CallError::Failed { source, .. } => (source.module, source.class, source.message),
        other => panic!("{other:?}"),
    };

    let odd = json!([null, 1, -2.5, "ä中\u{1f980}", { "a": [] }]);
    let echoed = call(asking("echo", json!({ "value": odd }))).await.unwrap();
    assert_eq!(echoed, json!({ "value": odd, "project_id": "project-1" }));
    assert_eq!(call(asking("nothing", json!({}))).await.unwrap(), Value::Null);
    let (module, class, message) = failure(asking("refuse", json!({ "reason": "because" }))).await;
    assert_eq!((module.as_str(), class.as_str()), ("cinder.exception", "InvalidBackup"));
    assert_eq!(message, "Invalid backup: because");
    assert_eq!(failure(asking("no_such", json!({}))).await.1, "NoSuchMethod");
    let later = Request { version: "1.4".into(), ..asking("nothing", json!({})) };
    assert_eq!(failure(later).await.1, "UnsupportedVersion");

    let slow = rpc.call(&target, asking("slow", json!({ "seconds": 3 })), Duration::from_secs(1)).await;
    assert!(matches!(slow, Err(CallError::Timeout { seconds: 1, .. })), "{slow:?}");
    let nobody = rpc.call(&names.on("host-3"), asking("nothing", json!({})), Duration::from_secs(1)).await;
    assert!(matches!(nobody, Err(CallError::NoService { .. })), "{nobody:?}");
    let nobody = rpc.cast(&names.on("host-3"), &asking("nothing", json!({}))).await;
    assert!(matches!(nobody, Err(CallError::NoService { .. })), "{nobody:?}");

    rpc.cast(&target, &asking("tell", json!({ "value": "on host" }))).await.unwrap();
    assert_eq!(server.told(), "on host");
    rpc.cast(&Target::any(&names.topic), &asking("tell", json!({ "value": "any" }))).await.unwrap();
    assert_eq!(server.told(), "any");
    rpc.fanout(&names.topic, &asking("tell", json!({ "value": "all" }))).await.unwrap();
    assert_eq!(server.told(), "all");
    // Nobody is there, and even the exchange is not.
    rpc.fanout(&format!("{}-of-nobody", names.topic), &asking("tell", json!({}))).await.unwrap();
    rpc.close().await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn either_may_take_over_the_queues_of_the_other(
    #[values("transient", "durable", "auto-delete", "quorum")] queues: &str,
) {
    let names = Names::new();
    let (queues, options) = flavour(queues);
    let rpc = names.rpc(queues.clone()).await;
    let mut requests = timeout(PATIENCE, rpc.serve(&names.topic, "host-1", 0)).await.unwrap().unwrap();
    let serve = json!({ "do": "serve", "topic": names.topic, "server": "host-1" });
    let mut oslo = names.oslo(options);

    // It declares the same queues.
    oslo.must(&serve);
    // It says that it is there before it consumes. A queue that goes with its last consumer must not go before that.
    names.await_second_consumer("host-1").await;
    requests.stop();
    // What comes before the broker has heard that we stop is handed to us, and then to it.
    let (again, target) = (rpc.clone(), names.on("host-1"));
    let casting = tokio::spawn(async move {
        loop {
            let _ = again.cast(&target, &asking("tell", json!({ "value": "taken over" }))).await;
            tokio::time::sleep(MOMENT).await;
        }
    });
    assert_eq!(tokio::task::block_in_place(|| oslo.told()), "taken over");
    casting.abort();
    // So do we once more, while it is there.
    let mut requests = timeout(PATIENCE, rpc.serve(&names.topic, "host-1", 0)).await.unwrap().unwrap();
    drop(oslo);
    // Which of both gets the first ones depends on when the broker sees its end.
    let taken_back = asking("tell", json!({ "value": "taken back" }));
    let incoming = loop {
        rpc.cast(&names.on("host-1"), &taken_back).await.unwrap();
        match timeout(MOMENT, requests.next()).await {
            Ok(Some(incoming)) if incoming.request.text("value").unwrap() == "taken back" => break incoming,
            Ok(Some(late)) => late.ack().await.unwrap(),
            Ok(None) => panic!("no more requests"),
            Err(_) => {}
        }
    };
    incoming.ack().await.unwrap();
    rpc.close().await;
}

/// A notification as Cinder's own service has sent it.
fn notification_of_cinder(event: &str) -> Value {
    let path = format!("{}/tests/contracts/notifications/{event}.json", env!("CARGO_MANIFEST_DIR"));
    opened(&fs::read(path).unwrap())
}

fn opened(body: &[u8]) -> Value {
    let envelope: Value = serde_json::from_slice(body).unwrap();
    assert_eq!(envelope["oslo.version"], "2.0");
    serde_json::from_str(envelope["oslo.message"].as_str().unwrap()).unwrap()
}

/// The row that Cinder has made a payload of.
fn row_of(payload: &Value) -> BackupRow {
    let text = |name: &str| payload[name].as_str().map(str::to_owned);
    let created_at = payload["created_at"].as_str().unwrap().strip_suffix("+00:00").unwrap();
    BackupRow {
        id: text("backup_id").unwrap(),
        user_id: text("user_id"),
        project_id: text("tenant_id"),
        volume_id: text("volume_id").unwrap(),
        snapshot_id: text("snapshot_id"),
        host: text("host"),
        availability_zone: text("availability_zone"),
        display_name: text("display_name"),
        display_description: Some("not told".into()),
        container: Some("not-told".into()),
        parent_id: text("parent_id"),
        status: text("status").unwrap(),
        fail_reason: text("fail_reason"),
        service_metadata: text("service_metadata"),
        service: text("service"),
        size: payload["size"].as_i64().unwrap(),
        object_count: 7,
        temp_volume_id: None,
        temp_snapshot_id: None,
        num_dependent_backups: payload["num_dependent_backups"].as_i64().unwrap(),
        data_timestamp: None,
        restore_volume_id: None,
        encryption_key_id: None,
        created_at: Some(created_at.parse().unwrap()),
        updated_at: None,
        deleted_at: None,
        deleted: payload["status"] == "deleted",
    }
}

#[rstest]
fn a_notification_is_what_cinders_own_service_sends(
    #[values("create.start", "create.end", "restore.end", "delete.end")] event: &str,
) {
    let theirs = notification_of_cinder(event);
    // The context comes with the request that the notification is about.
    let mut request = theirs.clone();
    request["method"] = json!("create_backup");
    request["_context_auth_token"] = json!("hush");
    request["_context_service_catalog"] = json!([{ "type": "identity", "endpoints": [] }]);
    let request = Request::parse(request.to_string().as_bytes()).unwrap();
    let ours = Notification {
        message_id: theirs["message_id"].as_str().unwrap().parse().unwrap(),
        publisher_id: "backup.node1".into(),
        event_type: format!("backup.{event}"),
        priority: "INFO",
        payload: payload(&row_of(&theirs["payload"])).into(),
        context: request.context,
    };
    let (day, time) = theirs["timestamp"].as_str().unwrap().split_once(' ').unwrap();
    let at: Timestamp = format!("{day}T{time}Z").parse().unwrap();

    let mut told = opened(&ours.encode(at, NotificationFormat::Messagingv2));
    let unenveloped: Value = serde_json::from_slice(&ours.encode(at, NotificationFormat::Messaging)).unwrap();

    assert_ne!(told["_unique_id"], unenveloped["_unique_id"]);
    told["_unique_id"] = unenveloped["_unique_id"].clone();
    assert_eq!(told, unenveloped, "the driver decides about the envelope alone");
    told["_unique_id"] = theirs["_unique_id"].clone();
    assert_eq!(told, theirs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_that_nobody_takes_holds_nothing_up_for_long() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let names = Names { url: format!("rabbit://guest:guest@{closed}/"), ..Names::new() };
    let notifier = Notifier {
        rpc: Rpc::start(names.settings(RpcQueues::default())).unwrap(),
        formats: vec![NotificationFormat::Messagingv2, NotificationFormat::Messaging],
        topics: vec![names.topic.clone(), format!("{}-other", names.topic)],
        publisher_id: "backup.host-1".into(),
    };

    let context = Context::admin("req-1");
    let told = notifier.tell(&context, "backup.create.end", Priority::Info, Map::new());

    timeout(PATIENCE, told).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_goes_to_every_topic_once_for_each_driver() {
    let names = Names::new();
    let rpc = names.rpc(RpcQueues::default()).await;
    let other = format!("{}-other", names.topic);
    let notifier = Notifier {
        rpc,
        formats: vec![NotificationFormat::Messagingv2, NotificationFormat::Messaging],
        topics: vec![names.topic.clone(), other.clone()],
        publisher_id: "backup.host-1".into(),
    };
    let payload = Map::from_iter([("message".to_owned(), json!("no space left"))]);

    notifier.tell(&Context::admin("req-1"), "backup.create.error", Priority::Error, payload).await;

    let mut ids = Vec::new();
    for topic in [&names.topic, &other] {
        let mut listener = names.oslo(&[]);
        listener.must(&json!({ "do": "listen", "topic": topic }));
        for _ in 0..2 {
            let told = listener.told();
            assert_eq!(
                (&told["priority"], &told["event_type"]),
                (&json!("error"), &json!("backup.create.error"))
            );
            assert_eq!(told["payload"], json!({ "message": "no space left" }));
            ids.push(told["metadata"]["message_id"].clone());
        }
    }
    ids.dedup();
    assert_eq!(ids.len(), 1, "it is one notification");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_reaches_whoever_listens_later_and_has_no_token() {
    let names = Names::new();
    let rpc = names.rpc(RpcQueues::default()).await;
    let mut context = Context::admin("req-1");
    context.set("auth_token", json!("hush"));
    let notification = Notification {
        message_id: Uuid::new_v4(),
        publisher_id: "backup.host-1".into(),
        event_type: "backup.create.end".into(),
        priority: "INFO",
        payload: json!({ "backup_id": BACKUP, "size": 3 }),
        context,
    };

    for format in [NotificationFormat::Messagingv2, NotificationFormat::Messaging] {
        let body = notification.encode("2031-05-04T03:02:01.5Z".parse::<Timestamp>().unwrap(), format);
        rpc.notify(&names.topic, "info", &body).await.unwrap();
    }

    let mut listener = names.oslo(&[]);
    listener.must(&json!({ "do": "listen", "topic": names.topic }));
    for _ in 0..2 {
        let told = listener.told();
        assert_eq!(told["publisher_id"], "backup.host-1");
        assert_eq!(told["event_type"], "backup.create.end");
        assert_eq!(told["payload"], notification.payload);
        assert_eq!(told["metadata"]["timestamp"], "2031-05-04 03:02:01.500000");
        assert_eq!(told["context"]["request_id"], "req-1");
        assert_eq!(told["context"]["auth_token"], Value::Null);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_not_settled_goes_to_another_worker() {
    let names = Names::new();
    let (first, second) = (names.rpc(RpcQueues::default()).await, names.rpc(RpcQueues::default()).await);
    let mut requests = first.serve(&names.topic, "host-1", 0).await.unwrap();
    for value in ["done", "dropped", "given back"] {
        second.cast(&names.on("host-1"), &asking("tell", json!({ "value": value }))).await.unwrap();
    }
    next(&mut requests).await.ack().await.unwrap();
    let (dropped, given_back) = (next(&mut requests).await, next(&mut requests).await);
    requests.stop();
    drop(dropped);
    given_back.requeue().await.unwrap();

    let mut requests = second.serve(&names.topic, "host-1", 0).await.unwrap();
    let mut values = Vec::new();
    for _ in 0..2 {
        let incoming = next(&mut requests).await;
        assert!(incoming.redelivered);
        values.push(incoming.request.text("value").unwrap().to_owned());
        incoming.ack().await.unwrap();
    }
    values.sort();
    assert_eq!(values, ["dropped", "given back"]);
    assert!(timeout(MOMENT, requests.next()).await.is_err());
    // Nor does anything come after the end of the one who acknowledged.
    drop(requests);
    second.close().await;
    let mut requests = first.serve(&names.topic, "host-1", 0).await.unwrap();
    assert!(timeout(MOMENT, requests.next()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_comes_twice_is_handed_out_once() {
    let names = Names::new();
    let rpc = names.rpc(RpcQueues::default()).await;
    let mut requests = rpc.serve(&names.topic, "host-1", 0).await.unwrap();
    let twice = asking("tell", json!({ "value": "twice" }));
    let marker = |value: &str| asking("tell", json!({ "value": value }));

    // While it is at work, and after it is done.
    rpc.cast(&names.on("host-1"), &twice).await.unwrap();
    let at_work = next(&mut requests).await;
    rpc.cast(&names.on("host-1"), &twice).await.unwrap();
    rpc.cast(&names.on("host-1"), &marker("first")).await.unwrap();
    let first = next(&mut requests).await;
    assert_eq!(first.request.text("value").unwrap(), "first");
    first.ack().await.unwrap();
    at_work.ack().await.unwrap();
    rpc.cast(&names.on("host-1"), &twice).await.unwrap();
    rpc.cast(&names.on("host-1"), &marker("second")).await.unwrap();
    let second = next(&mut requests).await;
    assert_eq!(second.request.text("value").unwrap(), "second");
    second.ack().await.unwrap();

    // All of them are settled.
    drop(requests);
    rpc.close().await;
    let rpc = names.rpc(RpcQueues::default()).await;
    let mut requests = rpc.serve(&names.topic, "host-1", 0).await.unwrap();
    assert!(timeout(MOMENT, requests.next()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_broker_was_away_a_request_at_work_is_not_begun_again_and_calls_go_through() {
    let rabbit = Rabbit::start();
    let queues = RpcQueues { durable: true, ..RpcQueues::default() };
    let url = rabbit.url().replacen("amqp://", "rabbit://", 1);
    let names = Names { url, ..Names::new() };
    let rpc = names.rpc(queues.clone()).await;
    let mut requests = rpc.serve(&names.topic, "host-1", 0).await.unwrap();
    rpc.cast(&names.on("host-1"), &asking("tell", json!({ "value": "at work" }))).await.unwrap();
    let at_work = next(&mut requests).await;

    rabbit.ctl(&["close_all_connections", "for the test"]);
    let caller = names.rpc(queues.clone()).await;
    let serving = tokio::spawn(async move {
        let incoming = next(&mut requests).await;
        assert_eq!(incoming.request.method, "echo");
        answer(incoming).await;
        requests
    });
    let echoed =
        caller.call(&names.on("host-1"), asking("echo", json!({ "value": 1 })), PATIENCE).await.unwrap();
    assert_eq!(echoed["value"], 1);
    let mut requests = serving.await.unwrap();
    // Our own inbox is there again as well.
    at_work.ack().await.unwrap();
    assert!(timeout(MOMENT, requests.next()).await.is_err());

    drop(requests);
    rpc.close().await;
    let mut requests = caller.serve(&names.topic, "host-1", 0).await.unwrap();
    assert!(timeout(MOMENT, requests.next()).await.is_err(), "it was acknowledged");
}
