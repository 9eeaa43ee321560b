//! What a single setting may be: each function here reads one value and says what to write instead of a bad one.
//!
//! Where the value came from is added by `layers`.

use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Unexpected, Visitor};
use url::Url;

use crate::broker::AmqpUrl;
use crate::engine::chunked::Compression;
use crate::job::Container;
use crate::store::{Secret, is_bucket_name};

/// The kind of the job queues.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Queue {
    /// Replicated; survives the loss of a node.
    #[default]
    Quorum,
    /// On one node, with priorities.
    Classic,
}

pub(super) fn number<T: From<u16>, const NUMBER: u16>() -> T {
    NUMBER.into()
}

pub(super) fn core_count() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Reads a whole number from `MIN` to `MAX`.
pub(super) fn whole<'de, D, T, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    struct Whole<T>(PhantomData<T>, u64, u64);

    impl<T: TryFrom<u64>> Visitor<'_> for Whole<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a whole number from {} to {}", self.1, self.2)
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
            let in_range = (self.1..=self.2).contains(&number);
            let number_or_none = if in_range { T::try_from(number).ok() } else { None };
            number_or_none.ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
        }

        fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
            match u64::try_from(number) {
                Ok(number) => self.visit_u64(number),
                Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &self)),
            }
        }
    }

    deserializer.deserialize_u64(Whole(PhantomData, MIN, MAX))
}

/// The same for a setting whose default is not told here.
pub(super) fn some_whole<'de, D, T, const MIN: u64, const MAX: u64>(
    deserializer: D,
) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    whole::<_, T, MIN, MAX>(deserializer).map(Some)
}

/// Reads a text that `take` accepts; `expected` says which texts those are.
fn text_that<'de, D, T>(
    deserializer: D,
    expected: &'static str,
    take: fn(&str) -> Option<T>,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
{
    struct Text<T>(&'static str, fn(&str) -> Option<T>);

    impl<T> Visitor<'_> for Text<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            (self.1)(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
        }
    }

    deserializer.deserialize_str(Text(expected, take))
}

/// Reads what the names of exchanges and queues begin with; brokers keep `amq.` for themselves.
pub(super) fn prefix<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let expected = "1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-', in quotes, but not amq";
    text_that(deserializer, expected, |text| {
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        let reserved = text.split('.').next() == Some("amq");
        ((1..=100).contains(&text.len()) && text.chars().all(plain) && !reserved).then(|| text.into())
    })
}

/// Reads the same, where it may be left out.
pub(super) fn some_prefix<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    prefix(deserializer).map(Some)
}

/// Reads the name of a worker.
pub(super) fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    text_that(deserializer, "1 to 100 of a-z, A-Z, 0-9, '.', '_', '-' and '@', in quotes", |text| {
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-_@".contains(c);
        ((1..=100).contains(&text.len()) && text.chars().all(plain)).then(|| text.into())
    })
}

/// Reads an address to listen at.
pub(super) fn some_address<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let expected = "an IP address and a port, such as \"127.0.0.1:8086\"";
    text_that(deserializer, expected, |text| text.parse().ok()).map(Some)
}

/// Reads a Ceph user.
pub(super) fn ceph_user<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    text_that(deserializer, "the name of a Ceph user without \"client.\", such as \"cinder\"", |text| {
        let plain = |c: char| c.is_ascii_graphic();
        (!text.is_empty() && !text.starts_with("client.") && text.chars().all(plain)).then(|| text.into())
    })
}

/// Reads a compression.
pub(super) fn compression<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Compression, D::Error> {
    let expected = "one of \"none\", \"zlib\", \"bz2\", \"zstd\"";
    text_that(deserializer, expected, |text| text.parse().ok())
}

/// Reads the kind of the job queues.
pub(super) fn queue<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Queue, D::Error> {
    text_that(deserializer, "one of \"quorum\", \"classic\"", |text| match text {
        "quorum" => Some(Queue::Quorum),
        "classic" => Some(Queue::Classic),
        _ => None,
    })
}

/// The kinds of stores, as an error tells what may be written.
pub(super) const KINDS: &str = if cfg!(feature = "ceph") {
    "\"posix\", \"nfs\", \"s3\", \"swift\", \"gcs\" or \"rbd\""
} else {
    "\"posix\", \"nfs\", \"s3\", \"swift\" or \"gcs\""
};

/// The kind of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Posix,
    Nfs,
    S3,
    Swift,
    Gcs,
    #[cfg(feature = "ceph")]
    Rbd,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Posix => "posix",
            Self::Nfs => "nfs",
            Self::S3 => "s3",
            Self::Swift => "swift",
            Self::Gcs => "gcs",
            #[cfg(feature = "ceph")]
            Self::Rbd => "rbd",
        })
    }
}

impl Kind {
    /// The kind of this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "posix" => Some(Self::Posix),
            "nfs" => Some(Self::Nfs),
            "s3" => Some(Self::S3),
            "swift" => Some(Self::Swift),
            "gcs" => Some(Self::Gcs),
            #[cfg(feature = "ceph")]
            "rbd" => Some(Self::Rbd),
            _ => None,
        }
    }
}

/// Reads the kind of a store.
pub(super) fn kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Kind, D::Error> {
    text_that(deserializer, KINDS, Kind::named)
}

/// Reads the name of a cluster that may be absent.
pub(super) fn cluster<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text_that(deserializer, "the NAME of a section [ceph.NAME], in quotes", |text| Some(Some(text.into())))
}

/// Reads the name of a pool that may be absent.
pub(super) fn pool<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Container>, D::Error> {
    let expected = "the name of a pool, such as \"backups\": without '/', and no leading '.'";
    text_that(deserializer, expected, |text| {
        let container = text.parse().ok().filter(|_| !text.contains('/'));
        container.map(Some)
    })
}

/// Reads a path.
pub(super) fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    text_that(deserializer, "a path, in quotes", |text| {
        (!text.is_empty() && !text.contains('\0')).then(|| text.into())
    })
}

/// Reads a path that may be absent.
pub(super) fn some_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    path(deserializer).map(Some)
}

/// Reads a list of paths.
pub(super) fn paths<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    struct Paths;

    #[derive(Deserialize)]
    struct Item(#[serde(deserialize_with = "path")] PathBuf);

    impl<'de> Visitor<'de> for Paths {
        type Value = Vec<PathBuf>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of paths, such as [\"/var/lib/volumes\"]")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut paths = Vec::new();
            while let Some(Item(path)) = seq.next_element()? {
                paths.push(path);
            }
            Ok(paths)
        }
    }

    deserializer.deserialize_seq(Paths)
}

/// Reads the URL of the broker. No error repeats any of it, since it may hold a password.
pub(super) fn broker_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AmqpUrl, D::Error> {
    const EXPECTED: &str = "the URL of the broker, such as \"amqp://user:password@host:5672/%2f\"";
    let text = text_that(deserializer, EXPECTED, |text| Some(text.to_owned()))?;
    let invalid = |why: &str| Err(D::Error::custom(format!("{why}; write {EXPECTED}")));
    let url = match Url::parse(&text) {
        Ok(url) => url,
        Err(error) => return invalid(&format!("not a URL ({error})")),
    };
    if !["amqp", "amqps"].contains(&url.scheme()) {
        return invalid("the URL does not begin with amqp:// or amqps://");
    }
    if url.host_str().is_none_or(str::is_empty) {
        return invalid("the URL has no host");
    }
    if url.port() == Some(0) {
        return invalid("the URL has the port 0");
    }
    text.parse().map_err(D::Error::custom)
}

/// Reads the URL of a server that is spoken to by HTTP.
pub(super) fn endpoint<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    bare_url(
        deserializer,
        "the URL of the server without user, password and bucket, such as \"https://s3.example.org\"",
    )
}

/// Reads the URL of a login to Swift, or of an account there.
pub(super) fn swift_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    bare_url(
        deserializer,
        "a URL without user and password, such as \"https://keystone.example.org:5000/v3\"",
    )
}

/// Reads a URL with nothing before its host and behind its path.
fn bare_url<'de, D>(deserializer: D, expected: &'static str) -> Result<Option<Url>, D::Error>
where
    D: Deserializer<'de>,
{
    let text = text_that(deserializer, expected, |text| Some(text.to_owned()))?;
    // What stands there may be a password, so that it is not repeated.
    if text.contains('@') {
        return Err(D::Error::custom(format!("there is a user in it; write {expected}")));
    }
    let bare = |url: &Url| {
        ["http", "https"].contains(&url.scheme()) && url.query().is_none() && url.fragment().is_none()
    };
    let url = Url::parse(&text).ok().filter(bare);
    url.map(Some).ok_or_else(|| D::Error::invalid_value(Unexpected::Str(&text), &expected))
}

/// The version of a login to Swift.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum AuthVersion {
    V1,
    #[default]
    V3,
}

/// Reads the version of a login.
pub(super) fn auth_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AuthVersion, D::Error> {
    match whole::<_, u64, 1, 3>(deserializer)? {
        1 => Ok(AuthVersion::V1),
        3 => Ok(AuthVersion::V3),
        other => Err(D::Error::custom(format!("found {other}; write 1, or 3 for Keystone"))),
    }
}

/// Reads a text that may be absent.
pub(super) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text_that(deserializer, "1 to 255 characters, in quotes", |text| {
        let fits = (1..=255).contains(&text.len()) && !text.chars().any(char::is_control);
        fits.then(|| Some(text.into()))
    })
}

/// Reads which of several endpoints is used.
pub(super) fn interface<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let expected = "one of \"public\", \"internal\", \"admin\"";
    text_that(deserializer, expected, |text| {
        ["public", "internal", "admin"].contains(&text).then(|| text.into())
    })
}

/// Reads the name of a container of Swift.
pub(super) fn container<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let expected = "the name of a container, such as \"volumebackups\": without '/', and no leading '.'";
    text_that(deserializer, expected, |text| {
        (!text.contains('/') && text.parse::<Container>().is_ok()).then(|| text.into())
    })
}

/// Reads the name of a storage policy that may be absent.
pub(super) fn storage_policy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text_that(deserializer, "the name of a storage policy: 1 to 255 letters, digits and '-'", |text| {
        let plain = |c: char| c.is_ascii_graphic();
        ((1..=255).contains(&text.len()) && text.chars().all(plain)).then(|| Some(text.into()))
    })
}

/// Reads the name of a region that may be absent.
pub(super) fn region<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    text_that(deserializer, "1 to 100 of a-z, A-Z, 0-9, '-' and '_', in quotes", |text| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        ((1..=100).contains(&text.len()) && text.chars().all(plain)).then(|| Some(text.into()))
    })
}

/// Reads the name of a bucket that may be absent.
pub(super) fn bucket<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let expected = "the name of a bucket: 3 to 63 of a-z, 0-9, '.', '-' and, for Google, '_', in quotes";
    text_that(deserializer, expected, |text| is_bucket_name(text).then(|| Some(text.into())))
}

/// Reads the name of a share that may be absent.
pub(super) fn share<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let expected =
        "a share, such as \"nfs.example.org:/backups\", \"192.0.2.1:/backups\" or \"[2001:db8::1]:/backups\"";
    text_that(deserializer, expected, |text| {
        let fits = text.split_once(":/").is_some_and(|(host, _)| !host.is_empty() && !host.starts_with('-'));
        (fits && !text.chars().any(char::is_control)).then(|| Some(text.into()))
    })
}

/// Reads a text that must not be seen, so that no error repeats any of it either.
pub(super) fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Secret>, D::Error> {
    struct Hidden;

    const EXPECTED: &str = "a text, in quotes";

    impl Visitor<'_> for Hidden {
        type Value = Option<Secret>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(EXPECTED)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
            match text {
                "" => Err(E::custom(format!("it is empty; write {EXPECTED}"))),
                text => Ok(Some(Secret::new(text.into()))),
            }
        }

        fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
            Err(E::custom(format!("found a number; write {EXPECTED}")))
        }

        fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
            self.visit_i64(0)
        }

        fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
            self.visit_i64(0)
        }
    }

    deserializer.deserialize_str(Hidden)
}

/// Reads the URL of a proxy. No error repeats any of it, since it may hold a password.
pub(super) fn proxy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Secret>, D::Error> {
    let secret = secret(deserializer)?;
    match secret.as_ref().map(|secret| Url::parse(secret.reveal())) {
        Some(Ok(url)) if ["http", "https"].contains(&url.scheme()) && url.has_host() => Ok(secret),
        _ => Err(D::Error::custom("not the URL of a proxy; write one such as \"http://proxy:3128\"")),
    }
}
