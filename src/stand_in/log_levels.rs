//! How much is logged, which Cinder's API can ask for and change while the worker runs (`cinder service-set-log`).
//!
//! It speaks of Python's loggers. Those named here are the ones of `cinder-backup` that have a like in this program. What the
//! libraries for the broker and for HTTP log is not among them: it would show messages and headers with passwords.

use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value, json};
use tracing::{Level, info};
use tracing_subscriber::filter::Targets;

use super::{StandIn, Trouble};
use crate::log;
use crate::message::oslo::{Failure, Object, Request};

/// Names of loggers, and whose lines here are in their place.
const LOGGERS: [(&str, &str); 9] = [
    ("cinder.backup", "backhaul"),
    ("cinder.backup.chunkeddriver", "backhaul::engine::chunked"),
    ("cinder.backup.drivers", "backhaul::store"),
    ("cinder.backup.drivers.ceph", "backhaul::engine::rbd"),
    ("cinder.backup.manager", "backhaul::stand_in"),
    ("cinder.db", "backhaul::cinder::database"),
    ("cinder.rpc", "backhaul::cinder::rpc"),
    ("oslo_messaging", "backhaul::broker"),
    ("sqlalchemy", "sqlx"),
];

/// Levels as Python names them, the most talkative first.
const LEVELS: [(&str, Level); 4] =
    [("DEBUG", Level::DEBUG), ("INFO", Level::INFO), ("WARNING", Level::WARN), ("ERROR", Level::ERROR)];
/// What Python calls the level at which hardly anything is logged.
const SILENT: &str = "CRITICAL";

/// One change after the other.
static CHANGING: Mutex<()> = Mutex::new(());

impl StandIn {
    /// Tells how much the loggers log whose names begin with a prefix.
    pub(super) fn get_log_levels(&self, request: &Request) -> Result<Value, Trouble> {
        let asked = Object::read(request.arg("log_request")?)?;
        let filter = log::filter();
        let levels: Vec<Value> = loggers(asked.text("prefix"))
            .map(|(name, target)| {
                object("LogLevel", vec![("prefix", json!(name)), ("level", json!(level_of(&filter, target)))])
            })
            .collect();
        Ok(object("LogLevelList", vec![("objects", json!(levels))]))
    }

    /// Has them log as much as a level says.
    pub(super) fn set_log_levels(&self, request: &Request) -> Result<Value, Trouble> {
        let asked = Object::read(request.arg("log_request")?)?;
        let (prefix, name) = (asked.text("prefix"), asked.text("level").unwrap_or_default());
        let level = LEVELS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, level)| level);
        let Some(level) = level else {
            let reason = format!("{name:.64} is not a valid log level.");
            return Err(Trouble::Failure(Failure::invalid_input(&reason)));
        };
        // Nothing panics while it holds the lock.
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        let targets: Vec<&str> = loggers(prefix).map(|(_, target)| target).collect();
        log::show(&changed(&log::filter(), &targets, *level));
        info!(prefix, %level, "log level changed");
        Ok(Value::Null)
    }
}

fn loggers(prefix: Option<&str>) -> impl Iterator<Item = (&'static str, &'static str)> {
    let prefix = prefix.unwrap_or_default().to_owned();
    LOGGERS.into_iter().filter(move |(name, _)| name.starts_with(&prefix))
}

fn object(name: &str, fields: Vec<(&str, Value)>) -> Value {
    let fields: Map<String, Value> =
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Object::new(name, "1.0", fields).to_json()
}

/// How much is logged with a filter of what has this target.
fn level_of(filter: &str, target: &str) -> &'static str {
    // A filter may say more than which targets log what, and then it says nothing here.
    let parts: Vec<&str> = filter.split(',').filter(|part| part.parse::<Targets>().is_ok()).collect();
    let filter: Targets = parts.join(",").parse().unwrap_or_default();
    let shown = LEVELS.iter().find(|(_, level)| filter.would_enable(target, level));
    shown.map_or(SILENT, |(name, _)| name)
}

/// The filter with another level for some targets.
fn changed(filter: &str, targets: &[&str], level: Level) -> String {
    let of_target = |part: &&str| targets.iter().any(|target| part.split('=').next() == Some(target));
    let mut parts: Vec<String> =
        filter.split(',').filter(|part| !part.is_empty() && !of_target(part)).map(str::to_owned).collect();
    parts.extend(targets.iter().map(|target| format!("{target}={level}").to_lowercase()));
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_counts_for_what_begins_with_its_prefix() {
        let targets = |prefix| loggers(prefix).map(|(_, target)| target).collect::<Vec<_>>();
        assert_eq!(targets(None).len(), LOGGERS.len());
        assert_eq!(targets(Some("cinder.d")), ["backhaul::cinder::database"]);
        assert_eq!(targets(Some("nova")), [""; 0]);

        let filter = changed("info,lapin=off", &targets(Some("cinder.backup.drivers")), Level::DEBUG);
        assert_eq!(filter, "info,lapin=off,backhaul::store=debug,backhaul::engine::rbd=debug");
        let filter = changed(&filter, &["backhaul::store"], Level::WARN);
        assert_eq!(filter, "info,lapin=off,backhaul::engine::rbd=debug,backhaul::store=warn");

        for (target, level) in [
            ("backhaul", "INFO"),
            ("backhaul::store", "WARNING"),
            ("backhaul::engine::rbd", "DEBUG"),
            ("lapin", "CRITICAL"),
        ] {
            assert_eq!(level_of(&filter, target), level, "{target}");
        }
    }
}
