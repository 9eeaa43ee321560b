//! What must not be seen.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use super::{Error, Result};

/// A key or a password: it is not shown by `Debug`, and cannot be serialised.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides the text from now on.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for whoever sends it where it belongs.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Where a secret is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretFrom {
    /// In the configuration itself.
    Setting(Secret),
    /// In a file, which has nothing else in it but for the end of the line.
    File(PathBuf),
}

impl fmt::Display for SecretFrom {
    /// Says where it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting(_) => f.write_str("the configuration"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl SecretFrom {
    /// Reads a secret that need not be a text. The file is read each time.
    pub(super) fn read_bytes(&self) -> Result<Vec<u8>> {
        match self {
            Self::Setting(secret) => Ok(secret.0.clone().into_bytes()),
            Self::File(path) => {
                let bytes = fs::read(path);
                let mut bytes =
                    bytes.map_err(|error| Error::io("read the secret in", path.display(), error))?;
                if bytes.last() == Some(&b'\n') {
                    bytes.pop();
                }
                Ok(bytes)
            }
        }
    }

    /// Reads the secret. The file is read each time.
    pub fn read(&self) -> Result<Secret> {
        match self {
            Self::Setting(secret) => Ok(secret.clone()),
            Self::File(path) => {
                let text = fs::read_to_string(path);
                let text = text.map_err(|error| Error::io("read the secret in", path.display(), error))?;
                let line = text.strip_suffix('\n').unwrap_or(&text);
                Ok(Secret::new(line.strip_suffix('\r').unwrap_or(line).into()))
            }
        }
    }
}
