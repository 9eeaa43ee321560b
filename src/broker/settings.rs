//! What the room needs to know to reach a broker; read and checked by the configuration.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use lapin::uri::AMQPUri;
use url::{Host, Url};

/// Where the broker is and how to treat it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where it is and who we are there.
    pub url: AmqpUrl,
    /// What the names of all our exchanges and queues begin with; `backhaul` unless two installations share a
    /// virtual host.
    pub prefix: String,
    /// The name that the broker shows for our connection.
    pub connection_name: String,
    /// How often each side lets the other know that it lives. 0 leaves it to the broker.
    pub heartbeat_seconds: u16,
    /// What `amqps` needs beyond the certificates that the system trusts.
    pub tls: Tls,
    /// The kind of the queues that hold jobs.
    pub queue_kind: QueueKind,
    /// How long a message that is to be retried later waits at most the first time; the limit doubles each time.
    pub retry_delay_seconds: u32,
    /// What that limit grows to.
    pub retry_delay_seconds_max: u32,
    /// The longest pause between two attempts to connect.
    pub reconnect_seconds_max: u32,
    /// How long anything that needs the broker waits for it, reconnects included, before it fails.
    pub publish_seconds_max: u32,
    /// Larger bodies are handed out marked as oversize.
    pub message_bytes_max: usize,
}

/// What `amqps` needs beyond the certificates that the system trusts. All files are PEM.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// Certificates of authorities that are trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Our own certificate, with its chain.
    pub client_certificate_file: Option<PathBuf>,
    /// The key of our certificate: PKCS#8, PKCS#1 or SEC1, without a passphrase.
    pub client_key_file: Option<PathBuf>,
}

/// The kind of the queues that hold jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QueueKind {
    /// Quorum. A broker older than 3.8 does not know the word and makes classic ones.
    #[default]
    Auto,
    /// Replicated over a cluster.
    Quorum,
    /// On one node; priorities 0 to 9 count.
    Classic,
}

/// An `amqp://` or `amqps://` URL. Neither Debug nor Display shows its password.
#[derive(Clone, PartialEq, Eq)]
pub struct AmqpUrl(AMQPUri);

/// Says why a text is no AMQP URL, without repeating it, for it may hold a password.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("this is no AMQP URL: {0}; write amqp://USER:PASSWORD@HOST:5672/%2f or amqps://…:5671/…")]
pub struct InvalidUrl(String);

impl AmqpUrl {
    pub(super) fn uri(&self) -> &AMQPUri {
        &self.0
    }

    /// Host and port.
    pub fn address(&self) -> String {
        let authority = &self.0.authority;
        if authority.host.contains(':') {
            format!("[{}]:{}", authority.host, authority.port)
        } else {
            format!("{}:{}", authority.host, authority.port)
        }
    }
}

impl FromStr for AmqpUrl {
    type Err = InvalidUrl;

    fn from_str(text: &str) -> Result<Self, InvalidUrl> {
        let invalid = |why: &str| InvalidUrl(why.into());
        let url = Url::parse(text).map_err(|error| InvalidUrl(error.to_string()))?;
        if !matches!(url.scheme(), "amqp" | "amqps") {
            return Err(invalid("it begins with neither amqp:// nor amqps://"));
        }
        let Some(host) = url.host().filter(|host| !host.to_string().is_empty()) else {
            return Err(invalid("it names no host"));
        };
        let mut uri: AMQPUri =
            text.parse().map_err(|_| invalid("its escapes or its query cannot be read"))?;
        // lapin takes an IPv6 address for a missing host.
        if let Host::Ipv6(address) = host {
            uri.authority.host = IpAddr::V6(address).to_string();
        }
        // Strictly this is the virtual host with the empty name; nobody has that, and many write it for `/`.
        if uri.vhost.is_empty() {
            uri.vhost = "/".into();
        }
        if uri.vhost.len() > 255 {
            return Err(invalid("its virtual host is longer than 255 bytes"));
        }
        Ok(Self(uri))
    }
}

impl fmt::Display for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = &self.0.authority.userinfo.username;
        let vhost = self.0.vhost.replace('/', "%2f");
        write!(f, "{}://{user}:***@{}/{vhost}", self.0.scheme, self.address())
    }
}

impl fmt::Debug for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_shows_everything_but_its_password() {
        for (text, shown) in [
            ("amqp://guest:hush@127.0.0.1:5672/%2f", "amqp://guest:***@127.0.0.1:5672/%2f"),
            ("amqp://guest:hush@broker", "amqp://guest:***@broker:5672/%2f"),
            ("amqp://guest:hush@broker/", "amqp://guest:***@broker:5672/%2f"),
            ("amqps://u:hush@[::1]/v", "amqps://u:***@[::1]:5671/v"),
            ("amqp://u:hu%40sh@broker/a%2fb", "amqp://u:***@broker:5672/a%2fb"),
        ] {
            let url: AmqpUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), shown);
        }
    }

    #[test]
    fn what_is_no_url_is_refused_without_repeating_it() {
        for text in
            ["", "hush", "http://u:hush@broker/", "amqp:hush", "amqp:///hush", "amqp://u:hush@b/?heartbeat=x"]
        {
            let error = text.parse::<AmqpUrl>().unwrap_err();
            assert!(!error.to_string().contains("hush"), "{error}");
        }
    }
}
