//! What Cinder's scheduler is told, without which it gives no worker a backup to make.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::rpc::{CallError, Rpc, Target};
use crate::message::oslo::{Context, Request};

/// The topic that the schedulers listen on.
pub const TOPIC: &str = "cinder-scheduler";

/// What the scheduler knows of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Our name, which is that of our queue as well.
    pub host: String,
    /// Where we are.
    pub availability_zone: String,
    /// The driver that our backups look as if they were made by.
    pub driver: String,
}

impl Capabilities {
    /// Tells all schedulers whether we take backups; they believe the last word for ever.
    pub async fn publish(&self, rpc: &Rpc, takes_backups: bool) -> Result<(), CallError> {
        let capabilities = json!({
            "backend_state": takes_backups,
            "driver_name": self.driver,
            "availability_zone": self.availability_zone,
        });
        let timestamp = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6f").to_string();
        let mut args = Map::new();
        args.insert("service_name".into(), json!("backup"));
        args.insert("host".into(), json!(self.host));
        args.insert("capabilities".into(), capabilities.clone());
        args.insert("cluster_name".into(), Value::Null);
        args.insert("timestamp".into(), json!(timestamp));
        let context = Context::admin(&request_id());
        let request = Request::new(context.clone(), "update_service_capabilities", "3.3", args);
        rpc.fanout(TOPIC, &request).await?;
        let mut args = Map::new();
        args.insert("service_name".into(), json!("backup"));
        args.insert("capabilities".into(), capabilities);
        args.insert("backend".into(), json!(self.host));
        args.insert("timestamp".into(), json!(timestamp));
        let request = Request::new(context, "notify_service_capabilities", "3.5", args);
        rpc.cast(&Target::any(TOPIC), &request).await
    }
}

fn request_id() -> String {
    format!("req-{}", uuid::Uuid::new_v4())
}
