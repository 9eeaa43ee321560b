//! What can go wrong with a broker, told so that an operator knows what to do.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use lapin::ErrorKind;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};

use crate::error::Class;

/// What lies below an error.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Says what went wrong with the broker.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file for TLS cannot be used.
    #[error("cannot read {path}, which the broker's TLS settings name: make it readable for this user")]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A client certificate without a key, or the other way round.
    #[error(
        "the broker's TLS settings name only one of client certificate and client key: give both or none"
    )]
    TlsPair,
    /// The broker did not answer.
    #[error("cannot reach the broker at {address}: check that it runs there and that nothing is in the way")]
    Unreachable {
        /// Host and port.
        address: String,
        /// Why.
        source: Cause,
    },
    /// There is no trust between us and the broker.
    #[error(
        "no TLS with the broker at {address}: check that it speaks TLS on this port, that ca_file holds the \
         authority that signed its certificate, and that it accepts our client certificate"
    )]
    Tls {
        /// Host and port.
        address: String,
        /// Why.
        source: Cause,
    },
    /// The broker does not know the user or the password is wrong.
    #[error(
        "the broker at {address} refuses user {user:?}: check the user and the password in the broker's URL"
    )]
    Credentials {
        /// Host and port.
        address: String,
        /// Who we said we are.
        user: String,
        /// What the broker said.
        source: Cause,
    },
    /// The virtual host does not exist or is not ours to use.
    #[error(
        "the broker at {address} does not let us into virtual host {vhost:?}: create it, give the user \
         permissions on it, or name another one at the end of the broker's URL"
    )]
    VirtualHost {
        /// Host and port.
        address: String,
        /// The virtual host.
        vhost: String,
        /// What the broker said.
        source: Cause,
    },
    /// What listens there is no AMQP 0-9-1 broker.
    #[error("what listens at {address} does not speak AMQP 0-9-1: check host and port of the broker's URL")]
    Protocol {
        /// Host and port.
        address: String,
        /// Why.
        source: Cause,
    },
    /// A queue or an exchange exists, but is not as we need it.
    #[error(
        "{name} exists on the broker with other properties than ours: set broker.queue to the kind it has, choose \
         another prefix, or delete it once it is empty"
    )]
    Mismatch {
        /// The queue or exchange.
        name: String,
        /// What the broker said.
        source: Cause,
    },
    /// A queue or an exchange that services of OpenStack share exists, but is not as their options here say.
    #[error(
        "{name} exists on the broker with other properties than the options here ask for: set those of \
         [oslo_messaging_rabbit] (amqp_durable_queues, rabbit_quorum_queue, amqp_auto_delete, …) as the other services \
         have them, or delete it once it is empty"
    )]
    Flavour {
        /// The queue or exchange.
        name: String,
        /// What the broker said.
        source: Cause,
    },
    /// The broker refused what we asked for.
    #[error("the broker refused to {action}: check that the user may configure, write and read there")]
    Refused {
        /// What we asked for.
        action: String,
        /// What the broker said.
        source: Cause,
    },
    /// A name or a property is longer than AMQP allows.
    #[error("{what} has {bytes} bytes and AMQP allows 255: use a shorter one")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// The connection or the channel died under what we did.
    #[error("the connection to the broker was lost while we wanted to {action}")]
    Lost {
        /// What we did.
        action: String,
        /// Why.
        source: Cause,
    },
    /// The broker could not take the message.
    #[error("the broker did not accept a message for {destination}: look for alarms and full queues on it")]
    NotConfirmed {
        /// Exchange and routing key.
        destination: String,
    },
    /// Nothing takes messages there, though it must.
    #[error(
        "no queue takes messages for {destination}: somebody deleted it; restart a worker to have it again"
    )]
    NoRoute {
        /// Exchange and routing key.
        destination: String,
    },
    /// The broker was away, or kept us waiting, for too long.
    #[error("gave up after {seconds} seconds to {action}: {why}")]
    Timeout {
        /// What we did.
        action: String,
        /// How long we waited.
        seconds: u32,
        /// The state of the connection at the end.
        why: String,
    },
    /// The channel of the delivery is gone; the broker hands the message out again.
    #[error("the channel of this delivery is gone, and the broker hands the message out again")]
    DeliveryLost,
    /// We closed the connection ourselves.
    #[error("the connection to the broker is closed, because this process is stopping")]
    Closed,
}

impl Error {
    /// What the error means for who asked.
    pub fn class(&self) -> Class {
        match self {
            Self::Unreachable { .. }
            | Self::Lost { .. }
            | Self::NotConfirmed { .. }
            | Self::Timeout { .. }
            | Self::DeliveryLost
            | Self::Closed => Class::Transient,
            Self::TlsFile { .. }
            | Self::TlsPair
            | Self::Tls { .. }
            | Self::Credentials { .. }
            | Self::VirtualHost { .. }
            | Self::Protocol { .. }
            | Self::Mismatch { .. }
            | Self::Flavour { .. }
            | Self::Refused { .. }
            | Self::TooLong { .. }
            | Self::NoRoute { .. } => Class::Permanent,
        }
    }

    /// Tells why something on an open connection failed.
    pub(super) fn doing(action: impl Into<String>, error: &lapin::Error) -> Self {
        let (action, source) = (action.into(), cause(error));
        if error.is_amqp_soft_error() {
            Self::Refused { action, source }
        } else {
            Self::Lost { action, source }
        }
    }
}

/// Whether the broker says that a queue or exchange exists with other properties, or cannot have these.
pub(super) fn is_precondition(error: &lapin::Error) -> bool {
    soft(error) == Some(&AMQPSoftError::PRECONDITIONFAILED)
}

/// Whether the queue is another connection's own.
pub(super) fn is_locked(error: &lapin::Error) -> bool {
    soft(error) == Some(&AMQPSoftError::RESOURCELOCKED)
}

/// Whether the broker refuses the user.
pub(super) fn is_access_refused(error: &lapin::Error) -> bool {
    soft(error) == Some(&AMQPSoftError::ACCESSREFUSED)
}

/// Whether the broker refuses the virtual host.
pub(super) fn is_not_allowed(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(error) => {
            matches!(error.kind(), AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED))
        }
        _ => false,
    }
}

fn soft(error: &lapin::Error) -> Option<&AMQPSoftError> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(soft) => Some(soft),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

/// What lapin's error holds, without lapin's own words around it, which only say the same once more.
pub(super) fn cause(error: &lapin::Error) -> Cause {
    match error.kind() {
        ErrorKind::IOError(error) => Box::new(Arc::clone(error)),
        ErrorKind::ProtocolError(error) => Box::new(error.clone()),
        _ => Box::new(error.clone()),
    }
}
