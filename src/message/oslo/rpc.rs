//! Requests and replies.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::Context;
use super::envelope::{Malformed, UNIQUE_ID, cut, open, seal, unique_id};

/// How many ids of messages oslo remembers.
const SEEN_COUNT_MAX: usize = 16;

/// A method that somebody asks for.
#[derive(Clone, PartialEq)]
pub struct Request {
    /// Its name.
    pub method: String,
    /// Its arguments, by name.
    pub args: Map<String, Value>,
    /// The version of the interface that knows the method and these arguments, such as `2.0`.
    pub version: String,
    /// The part of the interface, where it has parts.
    pub namespace: Option<String>,
    /// Who asked.
    pub context: Context,
    /// The id of the message; the same one again means the same message again.
    pub unique_id: Option<String>,
    /// Where the reply goes to; none if none is wanted.
    pub call: Option<Call>,
}

/// What the reply to a call needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The id of the call.
    pub msg_id: String,
    /// The queue that waits for the reply.
    pub reply_queue: String,
    /// How often the caller wants to hear that the method still runs.
    pub heartbeat: Option<Duration>,
}

impl Request {
    /// Makes a request with an id of its own that wants no reply.
    pub fn new(
        context: Context,
        method: impl Into<String>,
        version: impl Into<String>,
        args: Map<String, Value>,
    ) -> Self {
        Self {
            method: method.into(),
            args,
            version: version.into(),
            namespace: None,
            context,
            unique_id: Some(unique_id()),
            call: None,
        }
    }

    /// The same request, with the reply wanted in `reply_queue` under a new id.
    pub fn calling(mut self, reply_queue: impl Into<String>) -> Self {
        self.call = Some(Call { msg_id: unique_id(), reply_queue: reply_queue.into(), heartbeat: None });
        self
    }

    /// Reads a request, in an envelope or without one.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut message = open(body)?;
        let context = Context::take_from(&mut message);
        let mut text = |name: &str| match message.remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let method = text("method").ok_or_else(|| Malformed::new("it names no method"))?;
        // What oslo takes a request without a version for.
        let version = text("version").unwrap_or_else(|| "1.0".into());
        let (namespace, unique_id) = (text("namespace"), text(UNIQUE_ID));
        let (msg_id, reply_queue) = (text("_msg_id"), text("_reply_q"));
        let heartbeat = message.get("_timeout").and_then(heartbeat);
        let call =
            msg_id.zip(reply_queue).map(|(msg_id, reply_queue)| Call { msg_id, reply_queue, heartbeat });
        let args = match message.remove("args") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(args)) => args,
            Some(other) => {
                return Err(Malformed::new(format!(
                    "the arguments of {method} are no object: {}",
                    cut(&other)
                )));
            }
        };
        Ok(Self { method, args, version, namespace, context, unique_id, call })
    }

    /// Writes the request.
    pub fn encode(&self) -> Vec<u8> {
        let mut message = Map::new();
        message.insert("method".into(), json!(self.method));
        message.insert("args".into(), Value::Object(self.args.clone()));
        message.insert("version".into(), json!(self.version));
        if let Some(namespace) = &self.namespace {
            message.insert("namespace".into(), json!(namespace));
        }
        if let Some(unique_id) = &self.unique_id {
            message.insert(UNIQUE_ID.into(), json!(unique_id));
        }
        if let Some(call) = &self.call {
            message.insert("_msg_id".into(), json!(call.msg_id));
            message.insert("_reply_q".into(), json!(call.reply_queue));
            message.insert("_timeout".into(), json!(call.heartbeat.map(|pause| (pause * 2).as_secs())));
        }
        self.context.put_into(&mut message);
        seal(message)
    }

    /// An argument that the method cannot do without.
    pub fn arg(&self, name: &str) -> Result<&Value, Malformed> {
        let missing = || Malformed::new(format!("{} has no argument {name}", self.method));
        self.args.get(name).ok_or_else(missing)
    }

    /// An argument that is a text.
    pub fn text(&self, name: &str) -> Result<&str, Malformed> {
        let value = self.arg(name)?;
        let other =
            || Malformed::new(format!("argument {name} of {} is no text: {}", self.method, cut(value)));
        value.as_str().ok_or_else(other)
    }

    /// Whether an interface of this version has what the request needs: the same major version, and no later minor one.
    pub fn fits(&self, major: u32, minor: u32) -> bool {
        let mut parts = self.version.split('.').map(str::parse::<u32>);
        let asked_major = parts.next().and_then(Result::ok);
        let asked_minor = parts.next().and_then(Result::ok);
        // Our versions have no third part, so one above zero is later.
        let revision = parts.next().map_or(Some(0), Result::ok);
        match (asked_major, asked_minor, revision) {
            (Some(asked_major), Some(asked_minor), Some(revision)) => {
                asked_major == major && (asked_minor < minor || asked_minor == minor && revision == 0)
            }
            _ => false,
        }
    }
}

/// Shows what is asked for, and not the arguments, which may hold credentials.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("method", &self.method)
            .field("version", &self.version)
            .field("context", &self.context)
            .field("unique_id", &self.unique_id)
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}

/// Half of the time that the caller waits for a sign of life, as oslo has it: whole seconds, two at least.
fn heartbeat(timeout: &Value) -> Option<Duration> {
    let seconds = match timeout {
        Value::Number(number) => number.as_u64().or_else(|| number.as_f64().map(|seconds| seconds as u64))?,
        Value::String(text) => text.trim().parse().ok()?,
        _ => return None,
    };
    // No caller waits for longer, and no timer can.
    let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
    (seconds >= 2).then(|| Duration::from_secs(seconds.into()) / 2)
}

/// What comes back for a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The id of the call.
    pub msg_id: String,
    /// What it says.
    pub answer: Answer,
}

/// What a reply says.
#[derive(Clone, PartialEq)]
pub enum Answer {
    /// The method has ended with this; null if it gives nothing.
    Result(Value),
    /// The method has failed.
    Failure(Failure),
    /// The method still runs.
    Heartbeat,
}

/// Shows no results, for they may hold credentials.
impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Result(_) => f.write_str("Result"),
            Self::Failure(failure) => f.debug_tuple("Failure").field(failure).finish(),
            Self::Heartbeat => f.write_str("Heartbeat"),
        }
    }
}

impl Reply {
    /// Reads a reply, in an envelope or without one.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let mut message = open(body)?;
        let Some(Value::String(msg_id)) = message.remove("_msg_id") else {
            return Err(Malformed::new("it is no reply: it names no call"));
        };
        let failure = match message.remove("failure") {
            None | Some(Value::Null) => None,
            Some(failure) => Some(Failure::read(&failure)),
        };
        let answer = match (failure, message.remove("ending"), message.remove("result")) {
            (Some(failure), _, _) => Answer::Failure(failure),
            // One that does not say is the last one.
            (None, Some(Value::Bool(false)), None | Some(Value::Null)) => Answer::Heartbeat,
            (None, _, result) => Answer::Result(result.unwrap_or(Value::Null)),
        };
        Ok(Self { msg_id, answer })
    }

    /// Writes the reply, with an id of its own.
    pub fn encode(&self) -> Vec<u8> {
        let (result, failure, ending) = match &self.answer {
            Answer::Result(result) => (result.clone(), Value::Null, true),
            Answer::Failure(failure) => (Value::Null, Value::String(failure.text()), true),
            Answer::Heartbeat => (Value::Null, Value::Null, false),
        };
        let mut message = Map::new();
        message.insert("result".into(), result);
        message.insert("failure".into(), failure);
        message.insert("ending".into(), json!(ending));
        message.insert("_msg_id".into(), json!(self.msg_id));
        message.insert(UNIQUE_ID.into(), json!(unique_id()));
        seal(message)
    }
}

/// A Python exception that travels: its class by name, and what it takes to make one like it.
///
/// The caller makes one of the same class if it trusts the module, which is `cinder.exception` for Cinder, and a
/// `RemoteError` otherwise.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{module}.{class}: {message}")]
pub struct Failure {
    /// The module of the class.
    pub module: String,
    /// The class.
    pub class: String,
    /// What it says.
    pub message: String,
    /// The arguments of its constructor.
    pub args: Vec<Value>,
    /// Those by name.
    pub kwargs: Map<String, Value>,
}

impl Failure {
    /// An exception of the class that takes its message as the only argument.
    pub fn new(module: &str, class: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        let args = vec![json!(message)];
        Self { module: module.into(), class: class.into(), message, args, kwargs: Map::new() }
    }

    /// An exception of `cinder.exception`, with the HTTP status that Cinder's API gives for it.
    pub fn cinder(class: &str, message: impl Into<String>, http_status: u16) -> Self {
        let mut failure = Self::new("cinder.exception", class, message);
        failure.kwargs.insert("code".into(), json!(http_status));
        failure
    }

    /// `cinder.exception.InvalidBackup`: the backup is not in a state in which this can be done.
    pub fn invalid_backup(reason: &str) -> Self {
        let mut failure = Self::cinder("InvalidBackup", format!("Invalid backup: {reason}"), 400);
        failure.kwargs.insert("reason".into(), json!(reason));
        failure
    }

    /// `cinder.exception.InvalidInput`: an argument is not valid.
    pub fn invalid_input(reason: &str) -> Self {
        let mut failure = Self::cinder("InvalidInput", format!("Invalid input received: {reason}"), 400);
        failure.kwargs.insert("reason".into(), json!(reason));
        failure
    }

    /// We have no such method.
    pub fn no_such_method(method: &str) -> Self {
        let message = format!("Endpoint does not support RPC method {method}");
        Self::new("oslo_messaging.rpc.dispatcher", "NoSuchMethod", message)
    }

    /// We do not have the version of the interface that was asked for.
    pub fn unsupported_version(request: &Request) -> Self {
        let (version, method) = (&request.version, &request.method);
        let message = format!("Endpoint does not support RPC version {version}. Attempted method: {method}");
        Self::new("oslo_messaging.rpc.dispatcher", "UnsupportedVersion", message)
    }

    /// Reads what a reply calls its failure; what cannot be understood is its message.
    fn read(failure: &Value) -> Self {
        let parsed: Option<Value> = match failure {
            Value::String(text) => serde_json::from_str(text).ok(),
            other => Some(other.clone()),
        };
        let Some(Value::Object(mut fields)) = parsed else {
            let message = failure.as_str().map_or_else(|| failure.to_string(), str::to_owned);
            return Self::new("builtins", "Exception", message);
        };
        let mut text = |name: &str, otherwise: &str| match fields.remove(name) {
            Some(Value::String(text)) => text,
            _ => otherwise.to_owned(),
        };
        let (module, class, message) =
            (text("module", "builtins"), text("class", "Exception"), text("message", ""));
        let args = match fields.remove("args") {
            Some(Value::Array(args)) => args,
            _ => Vec::new(),
        };
        let kwargs = match fields.remove("kwargs") {
            Some(Value::Object(kwargs)) => kwargs,
            _ => Map::new(),
        };
        Self { module, class, message, args, kwargs }
    }

    fn text(&self) -> String {
        let Self { module, class, message, args, kwargs } = self;
        json!({
            "class": class,
            "module": module,
            "message": message,
            "tb": [],
            "args": args,
            "kwargs": kwargs,
        })
        .to_string()
    }
}

/// Whoever sends arguments that cannot be read hears so.
impl From<Malformed> for Failure {
    fn from(error: Malformed) -> Self {
        Self::new("builtins", "ValueError", error.to_string())
    }
}

/// The ids of the last messages, by which one that comes twice is known.
#[derive(Debug, Default)]
pub struct SeenIds(VecDeque<String>);

impl SeenIds {
    /// Whether the message is one of those.
    pub fn has(&self, unique_id: &str) -> bool {
        self.0.iter().any(|seen| seen == unique_id)
    }

    /// Remembers a message, and forgets the oldest one where there are too many.
    pub fn add(&mut self, unique_id: &str) {
        if self.0.len() == SEEN_COUNT_MAX {
            self.0.pop_front();
        }
        self.0.push_back(unique_id.to_owned());
    }
}
