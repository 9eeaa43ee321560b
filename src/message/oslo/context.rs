//! Who asked, on whose behalf, and with which rights: it travels with every message and on to those that follow from it.

use std::fmt;

use serde_json::{Map, Value, json};

const PREFIX: &str = "_context_";

/// The context of a request. All that came in it goes out again with the messages that follow from the request.
#[derive(Clone, Default, PartialEq)]
pub struct Context(Map<String, Value>);

impl Context {
    /// A context of the service itself, for what nobody asked for, with all rights.
    pub fn admin(request_id: &str) -> Self {
        let mut context = Self::default();
        for unset in [
            "user",
            "project_id",
            "system_scope",
            "project",
            "domain",
            "user_domain",
            "project_domain",
            "auth_token",
            "global_request_id",
            "resource_uuid",
            "user_id",
            "project_name",
            "domain_id",
            "remote_address",
            "quota_class",
            "message_resource_id",
            "message_resource_type",
            "message_action",
        ] {
            context.set(unset, Value::Null);
        }
        for (name, value) in [
            ("is_admin", json!(true)),
            ("read_only", json!(false)),
            ("show_deleted", json!(false)),
            ("request_id", json!(request_id)),
            ("roles", json!(["admin"])),
            ("user_identity", json!("- - - - -")),
            ("is_admin_project", json!(true)),
            ("read_deleted", json!("no")),
            ("timestamp", json!(jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6f").to_string())),
            ("service_catalog", json!([])),
        ] {
            context.set(name, value);
        }
        context
    }

    /// Takes the context out of a message.
    pub(super) fn take_from(message: &mut Map<String, Value>) -> Self {
        let names: Vec<String> = message.keys().filter(|name| name.starts_with(PREFIX)).cloned().collect();
        let mut context = Map::new();
        for name in names {
            if let Some(value) = message.remove(&name) {
                context.insert(name[PREFIX.len()..].to_owned(), value);
            }
        }
        Self(context)
    }

    /// Puts the context into a message.
    pub(super) fn put_into(&self, message: &mut Map<String, Value>) {
        for (name, value) in &self.0 {
            message.insert(format!("{PREFIX}{name}"), value.clone());
        }
    }

    /// A value, in Cinder's name for it; none if it is null as well.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A text, in Cinder's name for it.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Value::as_str)
    }

    /// The id of the request that all began with, `req-…`.
    pub fn request_id(&self) -> Option<&str> {
        self.text("request_id")
    }

    /// The project that asked.
    pub fn project_id(&self) -> Option<&str> {
        self.text("project_id")
    }

    /// The user who asked.
    pub fn user_id(&self) -> Option<&str> {
        self.text("user_id")
    }

    /// Sets a value for the messages that follow.
    pub fn set(&mut self, name: &str, value: Value) {
        self.0.insert(name.to_owned(), value);
    }

    /// The same context for messages to all who listen: without the user's token, and the services that it opens.
    pub(super) fn for_all(&self) -> Self {
        let mut context = self.clone();
        context.set("auth_token", Value::Null);
        context.set("service_catalog", json!([]));
        context
    }
}

/// Shows who asked, and not the token, which would let its reader act for the user.
impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("request_id", &self.request_id())
            .field("project_id", &self.project_id())
            .field("user_id", &self.user_id())
            .finish_non_exhaustive()
    }
}
