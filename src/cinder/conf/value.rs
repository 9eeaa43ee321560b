//! What the text of an option stands for: its type, its default, and the options that it refers to.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::path::PathBuf;

use super::file::{self, File, Source, is_space};
use super::{Error, OPTIONS};
use crate::broker::TransportUrl;

/// The section that the query of a transport URL speaks of.
const QUERIED: &str = "oslo_messaging_rabbit";
/// How many options can refer to each other in a row.
const DEPTH_MAX: usize = 16;

/// An option that Cinder knows.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    /// The section it stands in.
    pub group: &'static str,
    /// Its name there.
    pub name: &'static str,
    /// What Cinder called it before, in the same section.
    pub(super) old_name: Option<&'static str>,
    pub(super) kind: Kind,
    pub(super) default: Preset,
}

/// What a value must look like.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Text,
    Uri,
    /// An address or the name of a host.
    Host,
    Choice(&'static [&'static str]),
    /// The same in capitals.
    ChoiceInAnyCase(&'static [&'static str]),
    Integer {
        min: i64,
        max: i64,
    },
    Float {
        min: f64,
        max: f64,
    },
    Bool,
    /// Between commas.
    List,
    /// Assigned several times.
    Multi,
}

/// What an option is when nobody says.
#[derive(Debug, Clone, Copy)]
pub(super) enum Preset {
    Nothing,
    /// As one would write it in the file.
    Text(&'static str),
    HostName,
    /// The address that this host sends from.
    OwnAddress,
}

/// What an option is set to.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// To nothing.
    Nothing,
    /// To a text.
    Text(String),
    /// To a whole number.
    Integer(i64),
    /// To a number.
    Float(f64),
    /// To yes or no.
    Bool(bool),
    /// To several texts.
    List(Vec<String>),
}

impl Value {
    /// As Python writes it into a text.
    fn in_text(&self) -> String {
        match self {
            Self::Nothing => String::new(),
            Self::Text(text) => text.clone(),
            Self::Integer(number) => number.to_string(),
            Self::Float(number) => format!("{number:?}"),
            Self::Bool(true) => "True".into(),
            Self::Bool(false) => "False".into(),
            Self::List(items) => {
                let quoted: Vec<String> = items.iter().map(|item| format!("'{item}'")).collect();
                format!("[{}]", quoted.join(", "))
            }
        }
    }
}

/// All that files and environment say.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the query of a `transport_url` says of `[oslo_messaging_rabbit]`, before all others.
    query: BTreeMap<String, String>,
    /// What comes later wins.
    files: Vec<File>,
    /// Variables such as `OS_DEFAULT__HOST`, which win over files.
    environment: Vec<(String, String)>,
}

/// The text of an option, and who says so.
struct Found {
    values: Vec<String>,
    origin: String,
}

impl Settings {
    /// Reads the files, those of `Source::Dir` in the order of their names. Without a file Cinder's usual ones are read
    /// first, and without a folder its usual ones.
    pub fn read(sources: &[Source]) -> Result<Self, Error> {
        let variable = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
                .filter(|(name, _)| name.starts_with("OS_"))
        };
        Ok(Self {
            query: BTreeMap::new(),
            files: file::read_all(sources)?,
            environment: std::env::vars_os().filter_map(variable).collect(),
        })
    }

    /// The value of an option.
    pub fn value(&self, option: &Opt) -> Result<Value, Error> {
        self.value_at_depth(option, 0)
    }

    /// The same with the query of this transport URL, whose options go before those of `[oslo_messaging_rabbit]`. What is no such
    /// URL has none.
    pub(super) fn with_query_of(&self, transport_url: &str) -> Self {
        let query = transport_url.parse::<TransportUrl>().map(|url| url.options).unwrap_or_default();
        Self { query, ..self.clone() }
    }

    /// A name in the query that no option of these has.
    pub(super) fn unknown_in_query(&self, options: &[Opt]) -> Option<&str> {
        // These two are what oslo.messaging makes names of queues of, which are its own matter.
        let is_known = |name: &str| {
            ["hostname", "processname"].contains(&name) || options.iter().any(|option| option.name == name)
        };
        self.query.keys().map(String::as_str).find(|name| !is_known(name))
    }

    /// The files that were read, in their order.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| file.path.clone()).collect()
    }

    /// Whether a file or the environment sets the option.
    pub fn is_set(&self, option: &Opt) -> bool {
        self.found(option).is_some()
    }

    /// Who sets the option: a file and line, an environment variable, or nobody.
    pub(super) fn origin(&self, option: &Opt) -> String {
        self.found(option).unwrap_or_else(|| option.preset()).origin
    }

    fn value_at_depth(&self, option: &Opt, depth: usize) -> Result<Value, Error> {
        let Found { values, origin } = self.found(option).unwrap_or_else(|| option.preset());
        let wrong = |problem: String| Error::Option {
            group: option.group,
            name: option.name,
            origin: origin.clone(),
            problem,
        };
        let mut whole = Vec::new();
        for value in &values {
            whole.push(self.substitute(value, option.group, depth).map_err(wrong)?);
        }
        if let Kind::Multi = option.kind {
            return Ok(Value::List(whole));
        }
        whole.pop().map_or(Ok(Value::Nothing), |text| option.kind.value(text)).map_err(wrong)
    }

    fn found(&self, option: &Opt) -> Option<Found> {
        if option.group == QUERIED
            && let Some(value) = self.query.get(option.name)
        {
            // It stood behind an assignment already, where a `$` was looked at.
            let values = vec![value.replace('$', "$$")];
            return Some(Found { values, origin: "the query of a transport_url".into() });
        }
        let variable = format!("OS_{}__{}", option.group.to_uppercase(), option.name.to_uppercase());
        if let Some((_, value)) = self.environment.iter().find(|(name, _)| *name == variable) {
            return Some(Found {
                values: vec![value.clone()],
                origin: format!("environment variable {variable}"),
            });
        }
        let mut values = Vec::new();
        let mut origin = None;
        // An old name in a later file wins over the new one in an earlier one.
        for file in self.files.iter().rev() {
            for name in [Some(option.name), option.old_name].into_iter().flatten() {
                let lines = file.lines(option.group, name);
                let Some(last) = lines.last() else { continue };
                origin.get_or_insert_with(|| format!("{}:{}", file.path.display(), last.number));
                if !matches!(option.kind, Kind::Multi) {
                    return Some(Found {
                        values: vec![last.value.clone()],
                        origin: origin.unwrap_or_default(),
                    });
                }
                values.splice(0..0, lines.iter().map(|line| line.value.clone()));
            }
        }
        origin.map(|origin| Found { values, origin })
    }

    /// Puts the values of other options in the place of `$name`, `${name}` and `${group.name}`; `$$` and `\$` are a `$`.
    fn substitute(&self, text: &str, group: &str, depth: usize) -> Result<String, String> {
        let text = text.replace(r"\$", "$$");
        let mut whole = String::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find('$') {
            whole.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('$') {
                whole.push('$');
                rest = after;
                continue;
            }
            let braced = rest.strip_prefix('{');
            let name = name_at(braced.unwrap_or(rest));
            let after = &braced.unwrap_or(rest)[name.len()..];
            let after = if braced.is_some() { after.strip_prefix('}') } else { Some(after) };
            match after.filter(|_| !name.is_empty()) {
                Some(after) => {
                    whole.push_str(&self.referred(name, group, depth)?);
                    rest = after;
                }
                // No reference at all; what follows is looked at again.
                None => whole.push('$'),
            }
        }
        whole.push_str(rest);
        Ok(whole)
    }

    /// What `name`, or `group.name`, is set to, as a text.
    fn referred(&self, reference: &str, group: &str, depth: usize) -> Result<String, String> {
        if depth == DEPTH_MAX {
            return Err(format!("${reference} leads back to itself"));
        }
        let places = match reference.split_once('.') {
            Some((group, name)) => vec![(group, name)],
            None => vec![(group, reference), ("DEFAULT", reference)],
        };
        for (group, name) in &places {
            let known = |option: &&&Opt| {
                option.group == *group && (option.name == *name || option.old_name == Some(name))
            };
            if let Some(option) =
                OPTIONS.iter().flat_map(|options| options.iter()).find(|option| known(&option))
            {
                let value = self.value_at_depth(option, depth + 1);
                return value.map(|value| value.in_text()).map_err(|error| error.to_string());
            }
        }
        // Cinder has more options than we know: of those only what the files say is known.
        for (group, name) in &places {
            let lines = self.files.iter().rev().find_map(|file| file.lines(group, name).last());
            if let Some(line) = lines {
                return self.substitute(&line.value, group, depth + 1);
            }
        }
        Err(format!(
            "${reference} refers to an option that is not set and unknown here: write its value, or $$ for a $"
        ))
    }
}

/// The name that the text begins with, or nothing.
fn name_at(text: &str) -> &str {
    if !text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_') {
        return "";
    }
    let end = text.find(|character: char| !(character.is_ascii_alphanumeric() || "._".contains(character)));
    &text[..end.unwrap_or(text.len())]
}

impl Opt {
    fn preset(&self) -> Found {
        let value = match self.default {
            Preset::Nothing => None,
            Preset::Text(text) => Some(text.into()),
            Preset::HostName => Some(rustix::system::uname().nodename().to_string_lossy().into_owned()),
            Preset::OwnAddress => Some(own_address()),
        };
        Found { values: value.into_iter().collect(), origin: "default".into() }
    }
}

/// The address that this host would send from to one elsewhere; nothing is sent.
fn own_address() -> String {
    let address = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.0:80")?;
        socket.local_addr()
    });
    address.map_or_else(|_| "127.0.0.1".into(), |address| address.ip().to_string())
}

impl Kind {
    /// Reads a text that is whole. What is wrong with it is said without showing it, since it may hold a password.
    fn value(&self, text: String) -> Result<Value, String> {
        match *self {
            Self::Text | Self::Multi => Ok(Value::Text(text)),
            Self::Uri => {
                let (scheme, rest) = text.split_once("://").ok_or("write scheme://host")?;
                if scheme.is_empty() || rest.is_empty() || rest.starts_with('/') {
                    return Err("write scheme://host".into());
                }
                Ok(Value::Text(text))
            }
            Self::Host if text.parse::<IpAddr>().is_ok() => Ok(Value::Text(text)),
            Self::Host => {
                let name = text.strip_suffix('.').unwrap_or(&text);
                let is_part = |part: &str| {
                    (1..=63).contains(&part.len())
                        && part.chars().all(|character| character.is_ascii_alphanumeric() || character == '-')
                        && !part.starts_with('-')
                        && !part.ends_with('-')
                };
                let is_number = name
                    .rsplit('.')
                    .next()
                    .is_none_or(|last| last.chars().all(|digit| digit.is_ascii_digit()));
                if text.len() > 253 || is_number || !name.split('.').all(is_part) {
                    return Err("write an address or the name of a host".into());
                }
                Ok(Value::Text(name.into()))
            }
            Self::Choice(choices) if choices.contains(&text.as_str()) => Ok(Value::Text(text)),
            Self::ChoiceInAnyCase(choices) if choices.contains(&text.to_lowercase().as_str()) => {
                Ok(Value::Text(text))
            }
            Self::Choice(choices) | Self::ChoiceInAnyCase(choices) => {
                Err(format!("write one of {}", choices.join(", ")))
            }
            Self::Integer { min, max } => {
                let Some(digits) = number(&text) else { return Ok(Value::Nothing) };
                let value = digits.parse().map_err(|_| "write a whole number")?;
                if !(min..=max).contains(&value) {
                    return Err(between(min, max, i64::MIN, i64::MAX));
                }
                Ok(Value::Integer(value))
            }
            Self::Float { min, max } => {
                let Some(digits) = number(&text) else { return Ok(Value::Nothing) };
                let value = digits.parse().map_err(|_| "write a number")?;
                if value < min || value > max {
                    return Err(between(min, max, f64::NEG_INFINITY, f64::INFINITY));
                }
                Ok(Value::Float(value))
            }
            Self::Bool => match text.to_lowercase().as_str() {
                "true" | "1" | "on" | "yes" => Ok(Value::Bool(true)),
                "false" | "0" | "off" | "no" => Ok(Value::Bool(false)),
                _ => Err("write true or false".into()),
            },
            Self::List => {
                let items = text.trim_matches(is_space).trim_end_matches(',');
                let items = (!items.is_empty())
                    .then(|| items.split(',').map(|item| item.trim_matches(is_space).to_owned()));
                Ok(Value::List(items.into_iter().flatten().collect()))
            }
        }
    }
}

fn between<T: PartialEq + std::fmt::Display>(min: T, max: T, lowest: T, highest: T) -> String {
    match (min == lowest, max == highest) {
        (false, true) => format!("must be at least {min}"),
        (true, false) => format!("must be at most {max}"),
        _ => format!("must be from {min} to {max}"),
    }
}

/// The digits of a number as Python would read it, or nothing if there are none. A wrong text stays wrong.
fn number(text: &str) -> Option<String> {
    let text = text.trim_matches(is_space);
    let characters: Vec<char> = text.chars().collect();
    let is_digit = |at: Option<usize>| at.and_then(|at| characters.get(at)).is_some_and(char::is_ascii_digit);
    let kept = characters.iter().enumerate();
    // A single underscore between two digits groups them.
    let kept = kept.filter(|(at, character)| {
        !(**character == '_' && is_digit(at.checked_sub(1)) && is_digit(Some(at + 1)))
    });
    (!text.is_empty()).then(|| kept.map(|(_, character)| *character).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_wins_over_files() {
        let file = file::parse("a.conf".as_ref(), "[DEFAULT]\nhost = a\nbackup_ceph_user = $host").unwrap();
        let environment = vec![("OS_DEFAULT__HOST".to_owned(), "b".to_owned())];
        let settings = Settings { query: BTreeMap::new(), files: vec![file], environment };

        let value = |name| {
            let option = OPTIONS[0].iter().find(|option| option.name == name).unwrap();
            settings.value(option).unwrap()
        };

        assert_eq!(value("host"), Value::Text("b".into()));
        assert_eq!(value("backup_ceph_user"), Value::Text("b".into()));
    }
}
