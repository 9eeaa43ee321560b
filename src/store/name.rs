//! Names that are safe in every kind of store: nothing that exists here can leave its folder.

use std::fmt;

use crate::job::Container;

/// Says why a text cannot name an object.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} cannot be the name of an object")]
pub struct InvalidObjectName(String);

/// A folder of a store: the container of a backup, or one of our own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Folder(String);

impl Folder {
    /// One of our own, out of the way of everything that Cinder lists. No [`Container`] can name it.
    pub fn own(name: &'static str) -> Self {
        Self(format!(".backhaul/{name}"))
    }

    /// Whether it is one of our own.
    pub fn is_own(&self) -> bool {
        self.0.starts_with('.')
    }

    /// The folder's path below the root of the store.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Names an object in this folder. `name` may have parts, as Cinder's names for Swift do, but nothing that leads
    /// out of the folder or is hidden, which names of unfinished objects are.
    pub fn object(&self, name: &str) -> Result<ObjectName, InvalidObjectName> {
        let invalid = || InvalidObjectName(name.chars().take(300).collect());
        if name.len() > 1024 || name.chars().any(|c| c.is_control() || c == '\\') {
            return Err(invalid());
        }
        if name.split('/').any(|part| part.is_empty() || part.starts_with('.') || part.len() > 200) {
            return Err(invalid());
        }
        Ok(ObjectName { folder: self.clone(), name: name.into() })
    }
}

impl From<&Container> for Folder {
    fn from(container: &Container) -> Self {
        Self(container.as_str().into())
    }
}

/// Names an object of a store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Where it lies.
    pub folder: Folder,
    /// Its name there.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.folder.0, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_name_cannot_leave_its_folder() {
        let folder = Folder::own("test");
        for name in ["", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", ".tmp.a", "a\0", "a\\b"] {
            assert!(folder.object(name).is_err(), "{name:?}");
        }
        assert_eq!(
            folder.object("volume_x/2026/az_y-00001").unwrap().to_string(),
            ".backhaul/test/volume_x/2026/az_y-00001"
        );
    }
}
