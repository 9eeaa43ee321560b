//! The schemas of the commands, and what is wrong with a message in the words of those who write it.

use std::error::Error;
use std::fmt;
use std::sync::LazyLock;

use jsonschema::error::ValidationErrorKind;
use jsonschema::{PatternOptions, Registry, ValidationError, Validator};
use serde_json::Value;

/// How many faults are named; the others are counted.
const FAULTS_SHOWN_MAX: usize = 3;

/// How many characters of a wrong value are shown.
const VALUE_CHARS_MAX: usize = 64;

/// What the schemas of the commands share.
const COMMON: [&str; 9] = [
    include_str!("../../../schemas/common/container.json"),
    include_str!("../../../schemas/common/deadline.json"),
    include_str!("../../../schemas/common/id.json"),
    include_str!("../../../schemas/common/line.json"),
    include_str!("../../../schemas/common/paragraph.json"),
    include_str!("../../../schemas/common/source.json"),
    include_str!("../../../schemas/common/store.json"),
    include_str!("../../../schemas/common/target.json"),
    include_str!("../../../schemas/common/volume-meta.json"),
];

/// Operation and schema of each command, in the order in which people are told of them.
const COMMANDS: [(&str, &str); 5] = [
    ("backup", include_str!("../../../schemas/job/backup.v1.json")),
    ("restore", include_str!("../../../schemas/job/restore.v1.json")),
    ("delete", include_str!("../../../schemas/job/delete.v1.json")),
    ("verify", include_str!("../../../schemas/job/verify.v1.json")),
    ("cancel", include_str!("../../../schemas/job/cancel.v1.json")),
];

static SCHEMAS: LazyLock<Schemas> = LazyLock::new(|| {
    // The schemas are part of the program: a test builds them, and nothing that a message holds changes them.
    Schemas::build().unwrap_or_else(|error| unreachable!("the schemas of the commands: {error}"))
});

struct Schemas {
    commands: Vec<CommandSchema>,
    /// `$id` and text of each shared definition.
    common: Vec<(String, Value)>,
}

/// The schema of one command.
pub(super) struct CommandSchema {
    operation: &'static str,
    text: Value,
    validator: Validator,
}

/// Finds the schema of the command `operation`.
pub(super) fn find(operation: &str) -> Option<&'static CommandSchema> {
    SCHEMAS.commands.iter().find(|command| command.operation == operation)
}

/// Names all commands.
pub(super) fn operations() -> String {
    COMMANDS.map(|(operation, _)| operation).join(", ")
}

impl CommandSchema {
    /// Holds `message` against the schema; the error says what is wrong, field by field.
    pub(super) fn check(&self, message: &Value) -> Result<(), String> {
        let mut faults: Vec<Fault> = Vec::new();
        for error in self.validator.iter_errors(message) {
            let fault = self.fault(&error);
            // A text that is too long and has line ends, say, breaks two rules: that is one fault.
            if faults.iter().all(|known| known.field != fault.field) {
                faults.push(fault);
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        let more_count = faults.len().saturating_sub(FAULTS_SHOWN_MAX);
        let mut shown: Vec<String> = faults.iter().take(FAULTS_SHOWN_MAX).map(Fault::to_string).collect();
        if more_count > 0 {
            shown.push(format!("and {more_count} more"));
        }
        Err(shown.join("; "))
    }

    fn fault(&self, error: &ValidationError<'_>) -> Fault {
        let mut path: Vec<String> =
            error.instance_path().segments().map(|segment| segment.to_string()).collect();
        let what = match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected } => {
                let names = unexpected.iter().take(FAULTS_SHOWN_MAX);
                let field = names.map(String::as_str).map(shortened).collect::<Vec<_>>().join(", ");
                let known = self.text["properties"].as_object().into_iter().flat_map(|fields| fields.keys());
                let known = known.map(String::as_str).collect::<Vec<_>>().join(", ");
                return Fault { field, what: format!("no such field: {} has {known}", self.operation) };
            }
            ValidationErrorKind::Not { schema } => {
                let what = schema["description"].as_str().unwrap_or("the schema excludes it").to_owned();
                return Fault { field: path.join("."), what };
            }
            ValidationErrorKind::Required { property } => {
                path.push(property.as_str().unwrap_or_default().to_owned());
                "missing:".to_owned()
            }
            // There may be passwords in it, and what is told here goes to logs and events.
            _ if path.first().is_some_and(|field| field == "volume_meta") => {
                "this value is not allowed:".to_owned()
            }
            _ => match error.instance().as_ref() {
                Value::Null if self.is_optional(&path) => {
                    "null is not allowed: leave the field out, or".to_owned()
                }
                Value::Array(_) => "an array is not allowed:".to_owned(),
                Value::Object(_) => "an object is not allowed:".to_owned(),
                Value::String(text) => format!("\"{}\" is not allowed:", shortened(text)),
                value => format!("{value} is not allowed:"),
            },
        };
        let hint = SCHEMAS.hint(self, &path).unwrap_or("what the schema asks for");
        Fault { field: path.join("."), what: format!("{what} write {hint}") }
    }

    fn is_optional(&self, path: &[String]) -> bool {
        let [name] = path else { return false };
        self.text["required"].as_array().is_none_or(|required| required.iter().all(|known| known != name))
    }
}

impl Schemas {
    fn build() -> Result<Self, Box<dyn Error>> {
        let mut common = Vec::new();
        for text in COMMON {
            let schema: Value = serde_json::from_str(text)?;
            let id = schema["$id"].as_str().ok_or("a shared definition has no $id")?;
            common.push((id.to_owned(), schema));
        }
        let registry = Registry::new().extend(common.iter().map(|(id, schema)| (id, schema)))?.prepare()?;
        let mut commands = Vec::new();
        for (operation, text) in COMMANDS {
            let text: Value = serde_json::from_str(text)?;
            // Patterns run in linear time, whatever a message holds.
            let options = jsonschema::options().offline().with_pattern_options(PatternOptions::regex());
            let validator = options.with_registry(&registry).build(&text)?;
            commands.push(CommandSchema { operation, text, validator });
        }
        drop(registry);
        Ok(Self { commands, common })
    }

    /// What to write into a field: the title of its schema.
    fn hint<'a>(&'a self, command: &'a CommandSchema, path: &[String]) -> Option<&'a str> {
        let mut schema = &command.text;
        for name in path {
            schema = self.resolved(schema)["properties"].get(name)?;
        }
        self.resolved(schema)["title"].as_str()
    }

    /// The schema itself, or the shared one that it refers to.
    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let shared = schema["$ref"].as_str().and_then(|id| self.common.iter().find(|(known, _)| known == id));
        shared.map_or(schema, |(_, shared)| shared)
    }
}

/// One thing that is wrong with a message.
struct Fault {
    /// The path of the field, its parts joined by dots; empty for the message as a whole.
    field: String,
    what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.what)
    }
}

/// As much of a text as is shown to people, with what cannot be seen escaped.
fn shortened(text: &str) -> String {
    let shown: String = text.chars().take(VALUE_CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(VALUE_CHARS_MAX).is_some() { format!("{shown}…") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_says_what_it_is_for_and_what_to_write() {
        let schemas = Schemas::build().unwrap();
        for command in &schemas.commands {
            assert_eq!(command.text["$id"], format!("urn:backhaul:job:{}:v1", command.operation));
            assert_eq!(command.text["additionalProperties"], false, "{}", command.operation);
            for (name, schema) in command.text["properties"].as_object().unwrap() {
                let place = format!("{} {name}", command.operation);
                let described =
                    [schema, schemas.resolved(schema)].iter().any(|s| s["description"].is_string());
                assert!(described, "{place} has no description");
                assert!(schemas.hint(command, std::slice::from_ref(name)).is_some(), "{place} has no title");
            }
        }
    }
}
