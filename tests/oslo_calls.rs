//! Jobs as remote calls of oslo.messaging: `cargo nextest run -E 'test(oslo_calls::)'`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::oslo::Oslo;
use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, Worker, noise, until};

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";

/// A worker that takes calls, on a topic that nobody else has.
fn worker(rabbit: &Rabbit) -> (String, Stack, Worker) {
    let topic = format!("calls-{}", Uuid::new_v4());
    let stack = Stack::new(rabbit.url(), &format!("oslo_topic = \"{topic}\""), "");
    fs::write(stack.volume("a.img"), noise(1, 3_000_000)).unwrap();
    let worker = stack.worker();
    until("calls are taken", || worker.log().contains("calls of oslo.messaging are taken"));
    (topic, stack, worker)
}

fn transport_url(rabbit: &Rabbit) -> String {
    rabbit.url().replacen("amqp://", "rabbit://", 1)
}

fn call(topic: &str, method: &str, args: Value) -> Value {
    json!({ "do": "call", "topic": topic, "version": "1.0", "context": {}, "method": method, "args": args,
            "call_monitor_timeout": 10 })
}

/// The program of the documentation, as it stands there but for its topic.
fn documented(topic: &str) -> String {
    let page = include_str!("../docs/openstack.md");
    let program = page.split_once("```python\n").unwrap().1.split_once("```").unwrap().0;
    assert!(program.lines().count() <= 20, "it has become long");
    let with_topic = program.replace("topic=\"backhaul\"", &format!("topic=\"{topic}\""));
    assert_ne!(with_topic, program);
    with_topic
}

#[test]
fn the_program_of_the_documentation_has_a_backup_made_and_hears_of_it() {
    let rabbit = Rabbit::shared();
    let (topic, stack, _worker) = worker(&rabbit);
    let script: PathBuf = stack.path("producer.py");
    fs::write(&script, documented(&topic)).unwrap();
    let python =
        std::env::var_os("BACKHAUL_TEST_CINDER").expect("run `make test`, which installs oslo.messaging");
    let run = |source: &str| {
        let mut command = Command::new(&python);
        command.args(["-W", "ignore"]).arg(&script).args([&transport_url(&rabbit), VOLUME, source]);
        command.output().unwrap()
    };

    let made = run(&stack.location("a.img"));
    let told = String::from_utf8(made.stdout).unwrap();
    assert!(made.status.success(), "{told}{}", String::from_utf8_lossy(&made.stderr));
    let [backup, "full", "3000000"] = told.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{told}")
    };
    assert!(stack.ok(&["list"]).contains(backup));

    let failed = run(&stack.location("nothing.img"));
    let told = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(failed.status.code(), Some(1), "{told}");
    assert!(told.contains("was not made") && told.contains("nothing.img"), "{told}");
}

#[test]
fn who_calls_hears_how_the_job_ended_and_who_casts_need_not_wait() {
    let rabbit = Rabbit::shared();
    let (topic, stack, _worker) = worker(&rabbit);
    let mut oslo = Oslo::start(&transport_url(&rabbit), "openstack", &[]);
    let (backup, job) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
    let args = json!({ "backup_id": backup, "job_id": job, "volume_id": VOLUME, "source": stack.location("a.img"),
                       "parent_id": null, "name": "by a call" });

    let made = oslo.must(&call(&topic, "backup", args.clone()));
    assert_eq!((&made["type"], &made["data"]["job_id"]), (&json!("backhaul.job.succeeded.v1"), &json!(job)));
    // The same once more is found done.
    assert_eq!(oslo.must(&call(&topic, "backup", args.clone()))["data"]["digest"], made["data"]["digest"]);
    let verified = oslo.must(&call(&topic, "verify", json!({ "backup_id": backup })));
    assert_eq!(verified["data"]["digest"], made["data"]["digest"]);
    let target = json!({ "backup_id": backup, "target": stack.location("b.img") });
    oslo.must(&call(&topic, "restore", target));
    assert!(fs::read(stack.volume("a.img")).unwrap() == fs::read(stack.volume("b.img")).unwrap());

    let other = Uuid::new_v4().to_string();
    for (method, args, class, text) in [
        ("verify", json!({ "backup_id": other }), "RuntimeError", other.as_str()),
        ("verify", json!({ "backup_id": "x" }), "ValueError", "backup_id"),
        ("backup", json!({ "backup_id": other, "colour": "red" }), "ValueError", "colour"),
        ("paint", json!({}), "NoSuchMethod", "paint"),
    ] {
        let error = oslo.ask(&call(&topic, method, args)).unwrap_err();
        assert!(error["class"].as_str().unwrap().starts_with(class), "{method}: {error}");
        assert!(error["text"].as_str().unwrap().contains(text), "{method}: {error}");
    }

    let mut cast = call(&topic, "delete", json!({ "backup_id": backup }));
    cast["do"] = json!("cast");
    oslo.must(&cast);
    until("the backup is deleted", || !stack.ok(&["list"]).contains(&backup));
}
