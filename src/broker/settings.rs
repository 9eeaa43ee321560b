//! What the room needs to know to reach a broker; read and checked by the configuration.

use std::collections::BTreeMap;
use std::fmt;
use std::iter;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use lapin::uri::{AMQPAuthority, AMQPScheme, AMQPUri, AMQPUserInfo};
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

/// How a broker is reached.
#[derive(Debug, Clone)]
pub struct Reach {
    /// Where it is and who we are there.
    pub url: AmqpUrl,
    /// Other nodes of the same broker, which are tried in this order when the first one is away.
    pub other_urls: Vec<AmqpUrl>,
    /// The name that the broker shows for our connection.
    pub connection_name: String,
    /// How often each side lets the other know that it lives. 0 leaves it to the broker.
    pub heartbeat_seconds: u16,
    /// What `amqps` needs beyond the certificates that the system trusts.
    pub tls: Tls,
    /// The longest pause between two attempts to connect.
    pub reconnect_seconds_max: u32,
    /// How long anything that needs the broker waits for it, reconnects included, before it fails.
    pub publish_seconds_max: u32,
}

impl Settings {
    /// How it is reached, without what is of our own queues.
    pub fn reach(&self) -> Reach {
        Reach {
            url: self.url.clone(),
            other_urls: Vec::new(),
            connection_name: self.connection_name.clone(),
            heartbeat_seconds: self.heartbeat_seconds,
            tls: self.tls.clone(),
            reconnect_seconds_max: self.reconnect_seconds_max,
            publish_seconds_max: self.publish_seconds_max,
        }
    }
}

impl Reach {
    /// Host and port of each node.
    pub(super) fn addresses(&self) -> String {
        let nodes: Vec<String> =
            iter::once(&self.url).chain(&self.other_urls).map(AmqpUrl::address).collect();
        nodes.join(", ")
    }
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
    /// Replicated over a cluster. A broker older than 3.8 does not know the word and makes classic ones.
    #[default]
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

/// A `transport_url` of oslo.messaging: the nodes of one broker, who we are there, and options in its query.
#[derive(Clone, PartialEq, Eq)]
pub struct TransportUrl {
    nodes: Vec<AMQPAuthority>,
    vhost: String,
    /// What the query says, which goes before the options of the same names in `[oslo_messaging_rabbit]`.
    pub options: BTreeMap<String, String>,
}

impl TransportUrl {
    /// The nodes in their order, the first one apart; with `tls`, by `amqps`, and then 5671 is the port of those that name none.
    pub fn urls(&self, tls: bool) -> (AmqpUrl, Vec<AmqpUrl>) {
        let (scheme, usual_port) = if tls { (AMQPScheme::AMQPS, 5671) } else { (AMQPScheme::AMQP, 5672) };
        let mut urls = self.nodes.iter().map(|node| {
            let mut authority = node.clone();
            if authority.port == 0 {
                authority.port = usual_port;
            }
            AmqpUrl(AMQPUri {
                scheme: scheme.clone(),
                authority,
                vhost: self.vhost.clone(),
                ..AMQPUri::default()
            })
        });
        // There is always one: a URL without nodes is refused.
        let first = urls.next().unwrap_or_else(|| AmqpUrl(AMQPUri::default()));
        (first, urls.collect())
    }
}

impl FromStr for TransportUrl {
    type Err = InvalidTransportUrl;

    /// Reads `rabbit://USER:PASSWORD@HOST:PORT,USER:PASSWORD@HOST:PORT/VHOST?OPTION=VALUE`.
    fn from_str(text: &str) -> Result<Self, InvalidTransportUrl> {
        let invalid = |why: &str| InvalidTransportUrl(why.into());
        let (driver, rest) = text.trim().split_once("://").ok_or_else(|| invalid("it names no driver"))?;
        if !matches!(driver, "rabbit" | "kombu" | "amqp" | "kombu+rabbit" | "kombu+amqp") {
            return Err(invalid("its driver is not rabbit, and no other one is known"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, vhost) = rest.split_once('/').unwrap_or((rest, ""));
        let node = |text: &str| {
            let (login, host) = text.rsplit_once('@').unwrap_or(("", text));
            let (user, password) = login.split_once(':').unwrap_or((login, ""));
            // An IPv6 address has colons, too, and stands in brackets where a port may follow.
            let (host, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
                Some((host, port)) => (host, port.strip_prefix(':').unwrap_or(port)),
                None => match host.split_once(':') {
                    Some((name, port)) if !port.contains(':') => (name, port),
                    _ => (host, ""),
                },
            };
            let port = match port {
                "" => 0,
                port => port.parse().map_err(|_| invalid("the port of a host is no number"))?,
            };
            if host.is_empty() {
                return Err(invalid("a host of it has no name"));
            }
            // RabbitMQ's own, where the URL names nobody.
            let named = |text: &str| if text.is_empty() { "guest".into() } else { unquoted(text) };
            let userinfo = AMQPUserInfo { username: named(user), password: named(password) };
            Ok(AMQPAuthority { userinfo, host: host.into(), port })
        };
        let nodes: Vec<_> =
            hosts.split(',').filter(|host| !host.is_empty()).map(node).collect::<Result<_, _>>()?;
        if nodes.is_empty() {
            return Err(invalid("it names no host"));
        }
        let vhost = if vhost.is_empty() { "/".into() } else { unquoted(vhost) };
        if vhost.len() > 255 {
            return Err(invalid("its virtual host is longer than 255 bytes"));
        }
        let options = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        Ok(Self { nodes, vhost, options })
    }
}

/// Says why a text is no transport URL, without repeating it, for it may hold a password.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("this is no transport URL: {0}; write rabbit://USER:PASSWORD@HOST:5672/VHOST")]
pub struct InvalidTransportUrl(String);

/// Shows where it leads, and no password.
impl fmt::Debug for TransportUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, others) = self.urls(false);
        f.debug_list().entry(&first).entries(&others).finish()
    }
}

/// Takes `%2f` and the like for what they stand for, and leaves what stands for nothing, as Python does.
fn unquoted(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits
            .filter(|digits| *byte == b'%' && !digits.starts_with('+'))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        plain.push(escaped.unwrap_or(*byte));
        at += if escaped.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&plain).into_owned()
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
    fn a_transport_url_names_the_nodes_of_a_broker() {
        let shown = |text: &str, tls| {
            let (first, others) = text.parse::<TransportUrl>().unwrap().urls(tls);
            iter::once(first).chain(others).map(|url| url.to_string()).collect::<Vec<_>>().join(" ")
        };
        for (text, plain, tls) in [
            ("rabbit://u:p@a", "amqp://u:***@a:5672/%2f", "amqps://u:***@a:5671/%2f"),
            ("rabbit://u:p@a//", "amqp://u:***@a:5672/%2f", "amqps://u:***@a:5671/%2f"),
            ("rabbit://u:p@a:1/", "amqp://u:***@a:1/%2f", "amqps://u:***@a:1/%2f"),
            (
                "rabbit://u:p@a:1,v:q@[::1]:2,w:r@c/cinder?ssl=0",
                "amqp://u:***@a:1/cinder amqp://v:***@[::1]:2/cinder amqp://w:***@c:5672/cinder",
                "amqps://u:***@a:1/cinder amqps://v:***@[::1]:2/cinder amqps://w:***@c:5671/cinder",
            ),
            ("kombu+rabbit://u%40x:@a/%2Fv", "amqp://u@x:***@a:5672/%2fv", "amqps://u@x:***@a:5671/%2fv"),
        ] {
            assert_eq!(shown(text, false), plain);
            assert_eq!(shown(text, true), tls);
        }
        let url: TransportUrl = "rabbit://u:h%40%zzush@a/?ssl=1&heartbeat_rate=3".parse().unwrap();
        assert_eq!(url.nodes[0].userinfo.password, "h@%zzush");
        assert_eq!(url.options["heartbeat_rate"], "3");
        assert!(!format!("{url:?}").contains("ush"), "{url:?}");
    }

    #[test]
    fn what_is_no_transport_url_is_refused_without_repeating_it() {
        for text in ["", "hush", "fake://hush", "rabbit://", "rabbit:///hush", "rabbit://u:hush@a:b/"] {
            let error = text.parse::<TransportUrl>().unwrap_err();
            assert!(!error.to_string().contains("hush"), "{error}");
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
