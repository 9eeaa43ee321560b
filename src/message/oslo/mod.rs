//! The messages of OpenStack's services among themselves, as oslo.messaging 2.0 writes them over AMQP.
//!
//! A request names a method and carries its arguments and who asked; a call wants a reply as well. What Cinder puts into the
//! arguments are versioned objects. All of it is read as leniently as oslo reads it: unknown fields are kept or passed over,
//! and what is missing and not needed is no fault. No bytes from outside make it panic.

mod context;
mod envelope;
mod notification;
mod object;
mod rpc;

pub use context::Context;
pub use envelope::Malformed;
pub use notification::{Notification, NotificationFormat};
pub use object::{Backup, BackupDevice, BackupDeviceInfo, Object, Snapshot, Volume};
pub use rpc::{Answer, Call, Failure, Reply, Request, SeenIds};
