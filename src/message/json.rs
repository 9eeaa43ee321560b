//! Reads JSON that can be read in one way only.
//!
//! What two readers could take for different values is refused (as I-JSON, RFC 7493, asks): a name that is there
//! twice in an object, a byte order mark, a number that would lose digits. Nesting is limited.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::{Map, Number, Value};

/// How deep arrays and objects may be nested.
const DEPTH_MAX: usize = 32;

/// Integers beyond are rounded to a float when they are read: 2^64 above zero, -2^63 below.
const FLOAT_MAX: f64 = 18_446_744_073_709_551_616.0;
const FLOAT_MIN: f64 = -9_223_372_036_854_775_808.0;

/// Reads the one value in `text`. The error says what is wrong, and where.
pub(super) fn read(text: &[u8]) -> Result<Value, String> {
    if text.starts_with(b"\xef\xbb\xbf") {
        return Err("it begins with a byte order mark: leave that out".into());
    }
    let text = std::str::from_utf8(text)
        .map_err(|error| format!("it is not UTF-8: byte {} is wrong", error.valid_up_to() + 1))?;
    if text.trim_ascii().is_empty() {
        return Err("it is empty".into());
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict { depth: 0 }.deserialize(&mut deserializer).map_err(|error| told(&error))?;
    deserializer.end().map_err(|error| {
        format!("more follows after its end, in {}: send one object a message", place(&error))
    })?;
    Ok(value)
}

/// What is wrong, for whoever wrote the text.
fn told(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let at = format!(" at line {} column {}", error.line(), error.column());
    let (what, place) = (text.strip_suffix(&at).unwrap_or(&text), place(error));
    match error.classify() {
        Category::Eof => format!("it ends in the middle, in {place}: was all of it sent?"),
        // What the parser calls it is of help to some.
        Category::Syntax => {
            format!(
                "it breaks the rules of JSON in {place} ({what}): write {{\"version\": 1, \"operation\": …}}"
            )
        }
        Category::Data | Category::Io => format!("{what}, in {place}"),
    }
}

fn place(error: &serde_json::Error) -> String {
    format!("line {}, column {}", error.line(), error.column())
}

/// Builds a value that lies inside `depth` arrays and objects.
struct Strict {
    depth: usize,
}

impl Strict {
    fn inner<E: Error>(&self) -> Result<Self, E> {
        if self.depth == DEPTH_MAX {
            return Err(E::custom(format_args!(
                "more than {DEPTH_MAX} arrays and objects inside one another"
            )));
        }
        Ok(Self { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        if !(FLOAT_MIN < value && value < FLOAT_MAX) {
            return Err(E::custom("a number that is too large to be kept exactly"));
        }
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is none"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self.inner()?)? {
            array.push(item);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            if object.contains_key(&name) {
                let name: String = name.chars().take(64).collect();
                return Err(A::Error::custom(format_args!("the name {name:?} is there twice in one object")));
            }
            object.insert(name, entries.next_value_seed(self.inner()?)?);
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        let deep = |depth| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        for text in [
            "",
            " ",
            "{}{}",
            "{} x",
            r#"{"a":1,"a":1}"#,
            r#"{"a":{"b":1,"c":2,"b":3}}"#,
            r#"{"a":1,"\u0061":2}"#,
            "\u{feff}{}",
            "[1,]",
            "NaN",
            "1e400",
            "18446744073709551616",
            "-9223372036854775809",
            r#""\ud800""#,
            "\"a\tb\"",
            "// {}",
            &deep(DEPTH_MAX + 1),
            &deep(100_000),
        ] {
            let error = read(text.as_bytes()).expect_err(text);
            assert!(error.len() < 200, "{error}");
        }
        for body in [&b"\xff\xfe{\0}\0"[..], b"\"\xc3\"", b"\"\xed\xa0\x80\""] {
            read(body).unwrap_err();
        }
        for text in
            ["{}", " [1, 2.5, -3, 18446744073709551615] ", "1e18", r#"{"a":{"a":{}}}"#, &deep(DEPTH_MAX)]
        {
            assert_eq!(read(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        }
    }
}
