//! The messages on the wire: what is taken, what is refused and why, what is sent, and that the documentation is true.

mod generate;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use backhaul::job::{Command, Event};
use backhaul::message::{
    COMMAND_BYTES_MAX, REJECTED_ROUTING_KEY, Reason, Received, Rejection, encode_command, encode_event,
    encode_rejected, event_id, parse_command, parse_event, rejected_event_id, routing_key,
};
use jiff::Timestamp;
use jsonschema::{Registry, Validator};
use proptest::prelude::*;
use serde_json::{Value, json};

/// The files in a folder of the project: name and content.
fn files(folder: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let file =
        |path: &Path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap());
    entries.map(|entry| file(&entry.unwrap().path())).collect()
}

/// The published schemas of the events, by state.
///
/// Readers must bear fields that they do not know, so the schemas allow them; what we send ourselves is held to what
/// the schemas describe.
static EVENT_SCHEMAS: LazyLock<BTreeMap<String, Validator>> = LazyLock::new(|| {
    let common: Vec<Value> =
        files("schemas/common").values().map(|text| serde_json::from_slice(text).unwrap()).collect();
    let common = common.iter().map(|schema| (schema["$id"].as_str().unwrap(), schema));
    let registry = Registry::new().extend(common).unwrap().prepare().unwrap();
    let event = |(name, text): (String, Vec<u8>)| {
        let state = name.strip_suffix(".v1.json").unwrap().to_owned();
        let mut schema: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(schema["$id"], format!("urn:backhaul:event:{state}:v1"));
        schema["unevaluatedProperties"] = json!(false);
        schema["properties"]["data"]["unevaluatedProperties"] = json!(false);
        let options = jsonschema::options()
            .offline()
            .should_validate_formats(true)
            .should_ignore_unknown_formats(false);
        (state, options.with_registry(&registry).build(&schema).unwrap())
    };
    files("schemas/event").into_iter().map(event).collect()
});

/// Holds an event against its schema.
pub(crate) fn validate_event(body: &[u8]) {
    let event: Value = serde_json::from_slice(body).unwrap();
    let state = event["type"].as_str().unwrap().strip_prefix("backhaul.job.").unwrap();
    let schema = &EVENT_SCHEMAS[state.strip_suffix(".v1").unwrap()];
    let faults: Vec<String> =
        schema.iter_errors(&event).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(faults.is_empty(), "{faults:#?} in {event:#}");
}

/// Reads an event, which must keep to its schema, and writes it again: it must come out as it went in.
fn round_trip_event(body: &[u8]) {
    validate_event(body);
    let mut before: Value = serde_json::from_slice(body).unwrap();
    let source = before["source"].as_str().unwrap().to_owned();
    let after = match parse_event(body).unwrap() {
        Received::Job(event) => encode_event(&event, &source),
        Received::Rejected { time, reason, message, job_id, message_id } => {
            let reason = REASONS.into_iter().find(|known| known.as_str() == reason).unwrap();
            if message_id.is_none() {
                // There is nothing to make a stable id from.
                before["id"] = Value::Null;
            }
            let rejection = Rejection { reason, message, job_id };
            let id = rejected_event_id(message_id.as_deref());
            encode_rejected(&rejection, id, time, &source, message_id.as_deref())
        }
    };
    let mut after: Value = serde_json::from_slice(&after).unwrap();
    if before["id"].is_null() {
        after["id"] = Value::Null;
    }
    assert_eq!(after, before);
}

/// Reads a command, writes it and reads it again.
fn round_trip_command(body: &[u8]) -> Command {
    let command = parse_command(body).unwrap_or_else(|rejection| panic!("{rejection}"));
    assert_eq!(parse_command(&encode_command(&command)).as_ref(), Ok(&command));
    command
}

#[test]
fn every_valid_sample_is_taken() {
    let samples = files("tests/contracts/valid");
    for (name, body) in &samples {
        println!("{name}");
        if name.starts_with("event-") {
            round_trip_event(body);
        } else {
            round_trip_command(body);
        }
    }
    for schema in files("schemas/event")
        .keys()
        .map(|name| format!("event-{name}"))
        .chain(files("schemas/job").into_keys())
    {
        let kind = schema.strip_suffix(".v1.json").unwrap();
        assert!(samples.keys().any(|name| name.starts_with(kind)), "{kind} has no sample");
    }
}

const REASONS: [Reason; 6] = [
    Reason::NotJson,
    Reason::UnknownVersion,
    Reason::UnknownOperation,
    Reason::Schema,
    Reason::ImpossibleValue,
    Reason::Oversize,
];

/// Sample, kind of fault, and what the message says among other things.
#[rustfmt::skip]
const INVALID: &[(&str, Reason, &str)] = &[
    ("array-instead-of-object", Reason::Schema, "no object"),
    ("backup-backup-id-in-braces", Reason::Schema, "backup_id:"),
    ("backup-backup-id-is-no-uuid", Reason::Schema, "backup_id: \"abc\" is not allowed: write a UUID such as"),
    ("backup-backup-id-missing", Reason::Schema, "backup_id: missing"),
    ("backup-backup-id-with-line-end", Reason::Schema, "backup_id:"),
    ("backup-backup-id-without-dashes", Reason::Schema, "backup_id:"),
    ("backup-description-too-long", Reason::Schema, "description:"),
    ("backup-description-with-escape", Reason::Schema, "description:"),
    ("backup-incremental-as-text", Reason::Schema, "incremental: \"true\" is not allowed: write true or false"),
    ("backup-is-its-own-parent", Reason::ImpossibleValue, "parent_id: "),
    ("backup-name-of-two-lines", Reason::Schema, "name:"),
    ("backup-name-too-long", Reason::Schema, "name:"),
    ("backup-parent-and-incremental", Reason::Schema, "parent_id and incremental exclude each other"),
    ("backup-parent-and-not-incremental", Reason::Schema, "parent_id and incremental exclude each other"),
    ("backup-project-id-too-long", Reason::Schema, "project_id:"),
    ("backup-relative-source", Reason::Schema, "source: \"file:volumes/a.img\" is not allowed: write file: and an absolute path"),
    ("backup-source-empty", Reason::Schema, "source:"),
    ("backup-source-missing", Reason::Schema, "source: missing: write file:"),
    ("backup-source-rbd-with-empty-snapshot", Reason::Schema, "source:"),
    ("backup-source-rbd-with-four-parts", Reason::Schema, "source:"),
    ("backup-source-rbd-without-image", Reason::Schema, "source:"),
    ("backup-source-too-long", Reason::Schema, "source:"),
    ("backup-source-with-nul", Reason::Schema, "source:"),
    ("backup-source-with-unknown-scheme", Reason::Schema, "source:"),
    ("backup-source-without-scheme", Reason::Schema, "source:"),
    ("backup-store-as-object", Reason::Schema, "store: an object is not allowed"),
    ("backup-store-is-a-path", Reason::Schema, "store:"),
    ("backup-three-faults-and-more", Reason::Schema, "and 1 more"),
    ("backup-volume-id-missing", Reason::Schema, "volume_id: missing: write a UUID"),
    ("backup-volume-meta-as-text", Reason::Schema, "volume_meta: this value is not allowed: write"),
    ("backup-volume-meta-of-unknown-version", Reason::Schema, "volume_meta.version: this value is not allowed: write 1 or 2"),
    ("backup-volume-meta-without-version", Reason::Schema, "volume_meta.version: missing: write 1 or 2"),
    ("backup-with-target", Reason::Schema, "target: no such field: backup has"),
    ("byte-order-mark", Reason::NotJson, "byte order mark"),
    ("cancel-job-id-missing", Reason::Schema, "job_id: missing"),
    ("cancel-with-backup-id", Reason::Schema, "backup_id: no such field: cancel has"),
    ("cancel-with-deadline", Reason::Schema, "deadline: no such field: cancel has"),
    ("comment", Reason::NotJson, "line 1"),
    ("container-absolute", Reason::Schema, "container:"),
    ("container-climbs-out", Reason::Schema, "container:"),
    ("container-climbs-out-at-once", Reason::Schema, "container:"),
    ("container-empty", Reason::Schema, "container:"),
    ("container-hidden", Reason::Schema, "container:"),
    ("container-of-too-many-bytes", Reason::ImpossibleValue, "container: "),
    ("container-with-backslash", Reason::Schema, "container:"),
    ("container-with-empty-part", Reason::Schema, "container:"),
    ("container-with-line-end", Reason::Schema, "container:"),
    ("container-with-next-line", Reason::Schema, "container:"),
    ("deadline-as-number", Reason::Schema, "deadline: 1795327200 is not allowed: write a time with its offset from UTC, such as"),
    ("deadline-of-no-day", Reason::ImpossibleValue, "deadline: "),
    ("deadline-without-offset", Reason::Schema, "deadline: \"2026-11-22T06:00:00\" is not allowed: write a time"),
    ("deep-nesting", Reason::NotJson, "more than 32"),
    ("delete-backup-id-missing", Reason::Schema, "backup_id: missing"),
    ("delete-list-of-backups", Reason::Schema, "backup_id: an array is not allowed"),
    ("duplicate-key", Reason::NotJson, "the name \"backup_id\" is there twice"),
    ("duplicate-key-escaped", Reason::NotJson, "the name \"source\" is there twice"),
    ("duplicate-key-in-volume-meta", Reason::NotJson, "the name \"size\" is there twice"),
    ("empty", Reason::NotJson, "it is empty"),
    ("event-instead-of-command", Reason::Schema, "version: missing"),
    ("extra-field", Reason::Schema, "compression: no such field: backup has"),
    ("extra-field-in-capitals", Reason::Schema, "Name: no such field"),
    ("job-id-missing", Reason::Schema, "job_id: missing: write a UUID"),
    ("latin-1", Reason::NotJson, "not UTF-8: byte"),
    ("lone-surrogate", Reason::NotJson, "line"),
    ("not-a-number", Reason::NotJson, "line"),
    ("not-json", Reason::NotJson, "it breaks the rules of JSON in line 1, column "),
    ("null", Reason::Schema, "no object"),
    ("null-for-parent", Reason::Schema, "parent_id: null is not allowed: leave the field out, or write a UUID"),
    ("null-for-source", Reason::Schema, "source: null is not allowed: write file:"),
    ("number-for-id", Reason::Schema, "backup_id: 7 is not allowed: write a UUID such as"),
    ("number-too-large-to-be-kept", Reason::NotJson, "too large to be kept exactly"),
    ("operation-is-a-list", Reason::Schema, "operation: missing or no text: write one of backup, restore, delete, verify, cancel"),
    ("operation-missing", Reason::Schema, "operation: missing"),
    ("oslo-envelope", Reason::Schema, "version: missing"),
    ("raw-line-end-in-text", Reason::NotJson, "control character"),
    ("restore-backup-id-missing", Reason::Schema, "backup_id: missing"),
    ("restore-relative-target", Reason::Schema, "target:"),
    ("restore-target-is-a-snapshot", Reason::Schema, "without @snapshot"),
    ("restore-target-missing", Reason::Schema, "target: missing"),
    ("single-quotes", Reason::NotJson, "line 1"),
    ("text-instead-of-object", Reason::Schema, "no object"),
    ("trailing-comma", Reason::NotJson, "trailing comma"),
    ("trailing-garbage", Reason::NotJson, "more follows after its end, in line "),
    ("truncated", Reason::NotJson, "it ends in the middle, in line 5, column "),
    ("two-commands", Reason::NotJson, "send one object a message"),
    ("unknown-operation", Reason::UnknownOperation, "unknown operation \"snapshot\": this worker understands backup, restore, delete, verify, cancel"),
    ("unknown-operation-in-capitals", Reason::UnknownOperation, "unknown operation \"Backup\""),
    ("unknown-version", Reason::UnknownVersion, "unknown version 2: this worker understands 1"),
    ("unknown-version-with-fraction", Reason::UnknownVersion, "unknown version 1.5"),
    ("unknown-version-zero", Reason::UnknownVersion, "unknown version 0"),
    ("utf-16", Reason::NotJson, "not UTF-8"),
    ("verify-backup-id-missing", Reason::Schema, "backup_id: missing"),
    ("verify-sample-of-nothing", Reason::Schema, "sample_percent: 0 is not allowed: write a whole number from 1 to 100"),
    ("verify-sample-with-fraction", Reason::Schema, "sample_percent: 2.5 is not allowed: write a whole number from 1 to 100"),
    ("version-as-text", Reason::Schema, "version: missing or no number: write 1"),
    ("version-missing", Reason::Schema, "version: missing"),
];

#[test]
fn every_invalid_sample_is_refused_with_its_reason() {
    let mut samples = files("tests/contracts/invalid");
    for (name, reason, words) in INVALID {
        let body = samples.remove(&format!("{name}.json")).unwrap_or_else(|| panic!("no sample {name}"));
        let rejection = parse_command(&body).expect_err(name);
        println!("{name}: {reason}: {rejection}");
        assert_eq!(rejection.reason, *reason, "{name}: {rejection}");
        assert!(rejection.message.contains(words), "{name}: {rejection}");
        assert!(rejection.message.chars().count() < 1000, "{name}: {rejection}");
        assert!(!rejection.message.chars().any(char::is_control), "{name}: {rejection}");

        let id = rejected_event_id(Some(name));
        let event = encode_rejected(&rejection, id, Timestamp::UNIX_EPOCH, "/backhaul/test", Some(name));
        round_trip_event(&event);
    }
    assert!(samples.is_empty(), "samples without a row: {:?}", samples.keys());
}

#[test]
fn a_rejection_names_the_job_where_it_can_be_read() {
    let job_id = "0d9c4f6e-58a1-4b7e-9a35-7f1c2d8e4b60";
    for (body, known) in [
        (json!({"job_id": job_id}), true),
        (json!({"version": 7, "job_id": job_id, "operation": []}), true),
        (json!({"version": 1, "job_id": job_id, "operation": "snapshot"}), true),
        (json!({"version": 1, "job_id": job_id, "operation": "backup"}), true),
        (json!({"version": 1, "job_id": 7, "operation": "cancel"}), false),
        (json!([job_id]), false),
    ] {
        let rejection = parse_command(body.to_string().as_bytes()).unwrap_err();
        assert_eq!(rejection.job_id, known.then(|| job_id.parse().unwrap()), "{body}");
    }
    let twice = format!(r#"{{"job_id":"{job_id}","job_id":"{job_id}"}}"#);
    assert_eq!(parse_command(twice.as_bytes()).unwrap_err().job_id, None);
}

#[test]
fn a_command_that_is_too_long_is_refused_before_it_is_read() {
    let mut body = files("tests/contracts/valid").remove("cancel.json").unwrap();
    body.resize(COMMAND_BYTES_MAX, b' ');
    parse_command(&body).unwrap();
    body.push(b' ');
    assert_eq!(parse_command(&body).unwrap_err().reason, Reason::Oversize);
}

fn sample_event(name: &str) -> Event {
    match parse_event(&files("tests/contracts/valid")[name]).unwrap() {
        Received::Job(event) => event,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_password_in_volume_meta_is_not_told_when_the_message_is_rejected() {
    let mut command: Value =
        serde_json::from_slice(&files("tests/contracts/valid")["backup-full.json"]).unwrap();
    for wrong in [
        json!("hush"),
        json!({ "version": "hush" }),
        json!({ "version": 1, "volume-metadata": "hush" }),
        json!({ "version": 1, "volume-metadata": { "password": "hush" }, "volume-base-metadata": "hush" }),
    ] {
        command["volume_meta"] = wrong;
        let rejection = parse_command(command.to_string().as_bytes()).unwrap_err();
        assert!(rejection.message.starts_with("volume_meta"), "{rejection}");
        assert!(!rejection.to_string().contains("hush"), "{rejection}");
    }
}

#[test]
fn a_routing_key_has_operation_state_and_volume() {
    let volume = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
    for (name, key) in [
        ("event-accepted.json", format!("backup.accepted.{volume}")),
        ("event-started.json", format!("backup.started.{volume}")),
        ("event-progress.json", format!("backup.progress.{volume}")),
        ("event-progress-of-unknown-size.json", "verify.progress.-".into()),
        ("event-fell-back.json", format!("backup.fell-back.{volume}")),
        ("event-succeeded.json", format!("backup.succeeded.{volume}")),
        ("event-failed.json", format!("backup.failed.{volume}")),
        ("event-cancelled.json", format!("restore.cancelled.{volume}")),
    ] {
        assert_eq!(routing_key(&sample_event(name)), key);
    }
    assert_eq!(REJECTED_ROUTING_KEY, "job.rejected.-");
}

#[test]
fn a_completion_has_the_same_id_whoever_tells_of_it_and_when() {
    for name in ["event-succeeded.json", "event-failed.json", "event-cancelled.json"] {
        let event = sample_event(name);
        let again = Event { time: Timestamp::UNIX_EPOCH, sequence: 1, ..event.clone() };
        assert_eq!(event_id(&again), event_id(&event));
    }
    // Another start of the same job is another event.
    let event = sample_event("event-started.json");
    let again = Event { time: Timestamp::UNIX_EPOCH, ..event.clone() };
    assert_ne!(event_id(&again), event_id(&event));
}

#[test]
fn the_id_of_a_rejection_fits_into_a_property_however_long_that_of_the_message_is() {
    let long = "é".repeat(127);
    assert_eq!(rejected_event_id(Some("order-4711")), "order-4711.rejected");
    assert!(rejected_event_id(Some(&long)).len() <= 255);
    assert_eq!(rejected_event_id(Some(&long)), rejected_event_id(Some(&long)));
    assert_ne!(rejected_event_id(Some(&long)), rejected_event_id(Some(&long[2..])));
    assert_ne!(rejected_event_id(None), rejected_event_id(None));
}

#[test]
fn what_a_later_version_adds_to_an_event_is_passed_over() {
    let mut event: Value =
        serde_json::from_slice(&files("tests/contracts/valid")["event-succeeded.json"]).unwrap();
    event["traceparent"] = json!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    event["data"]["bytes_deduplicated"] = json!(7);
    let received = parse_event(event.to_string().as_bytes()).unwrap();
    assert_eq!(received, Received::Job(sample_event("event-succeeded.json")));

    event["type"] = json!("backhaul.job.succeeded.v2");
    let error = parse_event(event.to_string().as_bytes()).unwrap_err();
    assert_eq!(error.to_string(), "unknown event type \"backhaul.job.succeeded.v2\"");
}

#[test]
fn the_documentation_is_true_and_names_every_field() {
    let documentation = include_str!("../docs/messages.md");
    let mut samples = documentation.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let mut kinds: Vec<String> = Vec::new();
    for sample in &mut samples {
        let value: Value = serde_json::from_str(sample).unwrap_or_else(|error| panic!("{error} in {sample}"));
        match value["type"].as_str() {
            Some(kind) => {
                round_trip_event(sample.as_bytes());
                kinds.push(kind.strip_prefix("backhaul.job.").unwrap().replace(".v1", ""));
            }
            None => {
                round_trip_command(sample.as_bytes());
                kinds.push(value["operation"].as_str().unwrap().to_owned());
            }
        }
    }
    for (name, text) in files("schemas/job").into_iter().chain(files("schemas/event")) {
        let kind = name.strip_suffix(".v1.json").unwrap().to_owned();
        assert!(kinds.contains(&kind), "{kind} has no example");
        let schema: Value = serde_json::from_slice(&text).unwrap();
        for field in schema["properties"].as_object().unwrap().keys() {
            assert!(documentation.contains(&format!("`{field}`")), "{field} of {kind} is not described");
        }
    }
    for (name, text) in files("schemas/common").into_iter().chain(files("schemas/event")) {
        let schema: Value = serde_json::from_slice(&text).unwrap();
        for place in [&schema, &schema["properties"]["data"]] {
            for field in place["properties"].as_object().into_iter().flat_map(|fields| fields.keys()) {
                assert!(documentation.contains(&format!("`{field}`")), "{field} of {name} is not described");
            }
        }
    }
}

proptest! {
    // What was found once is kept as a sample, not as a seed.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_command_is_read_as_it_was_written(command in generate::command()) {
        let body = encode_command(&command);
        let text = String::from_utf8_lossy(&body);
        prop_assert_eq!(parse_command(&body), Ok(command), "{}", text);
    }

    #[test]
    fn an_event_keeps_to_its_schema_and_is_read_as_it_was_written(event in generate::event()) {
        let body = encode_event(&event, "/backhaul/test");
        validate_event(&body);
        prop_assert_eq!(parse_event(&body).unwrap(), Received::Job(event));
    }

    #[test]
    fn no_bytes_are_too_odd_to_be_refused(body in any::<Vec<u8>>()) {
        prop_assert!(parse_command(&body).is_err());
        prop_assert!(parse_event(&body).is_err());
    }

    #[test]
    fn a_damaged_command_is_refused_or_still_means_something(
        sample in 0..files("tests/contracts/valid").len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4), 1..6),
    ) {
        let mut body = files("tests/contracts/valid").into_values().nth(sample).unwrap();
        for (place, byte, edit) in edits {
            if body.is_empty() {
                break;
            }
            let place = place.index(body.len());
            match edit {
                0 => body[place] = byte,
                1 => body.insert(place, byte),
                2 => { body.remove(place); }
                _ => body.truncate(place),
            }
        }
        let _ = parse_event(&body);
        if let Ok(command) = parse_command(&body) {
            prop_assert_eq!(parse_command(&encode_command(&command)), Ok(command));
        }
    }

    #[test]
    fn a_field_with_a_wrong_value_is_named(
        command in generate::command(),
        field in any::<prop::sample::Index>(),
        wrong in prop_oneof![
            Just(json!(null)), Just(json!([])), Just(json!(-7.5)), Just(json!({})), Just(json!("\u{7f}")),
        ],
    ) {
        let mut message: Value = serde_json::from_slice(&encode_command(&command)).unwrap();
        let fields: Vec<String> = message.as_object().unwrap().keys().cloned().collect();
        let field = field.get(&fields);
        message[field] = wrong;
        let rejection = parse_command(message.to_string().as_bytes()).unwrap_err();
        let field = field.replace("operation", "unknown operation").replace("version", "");
        prop_assert!(
            rejection.message.contains(&field) || rejection.message.starts_with("operation: "),
            "{}: {}", field, rejection
        );
    }
}
