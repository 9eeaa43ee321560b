//! Names of stores and containers, checked once: what exists here is safe to build a path or a key from.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Says why a text cannot be a name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is no {kind} name: {why}")]
pub struct InvalidName {
    kind: &'static str,
    text: String,
    why: &'static str,
}

/// The name of a store in the configuration: `[store.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreName(String);

impl StoreName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for StoreName {
    type Err = InvalidName;

    /// Takes 1 to 64 of `a-z A-Z 0-9 _ -`.
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if (1..=64).contains(&text.len()) && text.chars().all(plain) {
            return Ok(Self(text.into()));
        }
        let why = "write 1 to 64 of a-z, A-Z, 0-9, _ and -";
        Err(InvalidName { kind: "store", text: text.chars().take(80).collect(), why })
    }
}

/// Where in a store the objects of a backup lie: a folder below the root, a bucket, a pool.
///
/// A relative path of plain segments: no `..`, no leading `/`, nothing hidden.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Container(String);

impl Container {
    /// The container as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Container {
    type Err = InvalidName;

    /// Takes a relative path of at most 255 bytes.
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid =
            |why| Err(InvalidName { kind: "container", text: text.chars().take(80).collect(), why });
        if text.is_empty() || text.len() > 255 {
            return invalid("write 1 to 255 bytes");
        }
        if text.chars().any(|c| c.is_control() || c == '\\') {
            return invalid("control characters and backslashes are not allowed");
        }
        for segment in text.split('/') {
            if segment.is_empty() {
                return invalid("it must be relative, without empty parts: no leading, trailing or double /");
            }
            // Hidden names hold the records; this also refuses `.` and `..`.
            if segment.starts_with('.') {
                return invalid("no part may begin with a dot");
            }
        }
        Ok(Self(text.into()))
    }
}

macro_rules! text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text!(StoreName);
text!(Container);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_cannot_leave_the_store_or_reach_the_records() {
        for text in ["", "/etc", "a//b", "a/", "..", "a/../b", ".backhaul", "a/.b", "a\0b", "a\\b", "a\nb"] {
            assert!(text.parse::<Container>().is_err(), "{text:?}");
        }
        for text in ["a", "volumebackups", "3f/2b/3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88", "two words"] {
            assert_eq!(text.parse::<Container>().map(String::from).as_deref(), Ok(text));
        }
    }
}
