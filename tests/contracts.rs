//! The messages on the wire: what is taken, what is refused and why, what is sent, and that the documentation is true.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "contracts/generate.rs"]
mod generate;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use backhaul::job::{Command, Happening, JobId};
use backhaul::message::{
    COMMAND_BYTES_MAX, Reason, Received, Rejection, encode_command, encode_event, encode_rejected, event_id,
    parse_command, parse_event, routing_key,
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
fn validate_event(body: &[u8]) {
    let event: Value = serde_json::from_slice(body).unwrap();
    let state = event["type"].as_str().unwrap().strip_prefix("backhaul.job.").unwrap();
    let schema = &EVENT_SCHEMAS[state.strip_suffix(".v1").unwrap()];
    let faults: Vec<String> =
        schema.iter_errors(&event).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(faults.is_empty(), "{faults:#?} in {event:#}");
}

proptest! {
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
}
