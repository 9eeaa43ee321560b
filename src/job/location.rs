//! Where a volume's bytes are: `file:/path` or `rbd:[cluster/]pool/image[@snap]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Says why a text names no place.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is no source or target: {why}")]
pub struct InvalidLocation {
    text: String,
    why: &'static str,
}

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file or a block device, by its absolute path.
    File(PathBuf),
    /// An RBD image.
    Rbd(RbdImage),
}

/// Names an RBD image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RbdImage {
    /// The cluster's name in the configuration; the only one if absent.
    pub cluster: Option<String>,
    /// The pool.
    pub pool: String,
    /// The image.
    pub image: String,
    /// A snapshot of the image; its head if absent.
    pub snapshot: Option<String>,
}

impl FromStr for Location {
    type Err = InvalidLocation;

    fn from_str(text: &str) -> Result<Self, InvalidLocation> {
        let invalid = |why| Err(InvalidLocation { text: text.chars().take(200).collect(), why });
        if text.chars().any(char::is_control) {
            return invalid("control characters are not allowed");
        }
        if let Some(path) = text.strip_prefix("file:") {
            if !path.starts_with('/') {
                return invalid("the path must be absolute, such as file:/var/lib/volumes/a.img");
            }
            return Ok(Self::File(path.into()));
        }
        let Some(spec) = text.strip_prefix("rbd:") else {
            return invalid("write file:/path or rbd:[cluster/]pool/image[@snapshot]");
        };
        let (image_spec, snapshot) = match spec.split_once('@') {
            Some((image, snapshot)) => (image, Some(snapshot)),
            None => (spec, None),
        };
        let parts: Vec<&str> = image_spec.split('/').collect();
        if parts.iter().any(|part| part.is_empty())
            || snapshot.is_some_and(|s| s.is_empty() || s.contains(['@', '/']))
        {
            return invalid("write rbd:[cluster/]pool/image[@snapshot], with no part empty");
        }
        let (cluster, pool, image) = match parts[..] {
            [pool, image] => (None, pool, image),
            [cluster, pool, image] => (Some(cluster), pool, image),
            _ => return invalid("write rbd:[cluster/]pool/image[@snapshot]"),
        };
        Ok(Self::Rbd(RbdImage {
            cluster: cluster.map(Into::into),
            pool: pool.into(),
            image: image.into(),
            snapshot: snapshot.map(Into::into),
        }))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Rbd(image) => write!(f, "rbd:{image}"),
        }
    }
}

impl fmt::Display for RbdImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(cluster) = &self.cluster {
            write!(f, "{cluster}/")?;
        }
        write!(f, "{}/{}", self.pool, self.image)?;
        if let Some(snapshot) = &self.snapshot {
            write!(f, "@{snapshot}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_read_as_it_is_written() {
        for text in ["file:/a b/c", "rbd:pool/image", "rbd:pool/image@snap", "rbd:main/pool/image@a.b"] {
            assert_eq!(text.parse::<Location>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "/a",
            "file:",
            "file:a",
            "file:/a\0",
            "rbd:",
            "rbd:p",
            "rbd:p/",
            "rbd:p/i@",
            "rbd:a/b/c/d",
            "nbd:x",
        ] {
            assert!(text.parse::<Location>().is_err(), "{text:?}");
        }
    }
}
