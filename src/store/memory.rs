//! A store in memory, for tests: the contract of [`ObjectStore`] in its plainest form.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

use super::{
    Error, Folder, Listed, ObjectName, ObjectStore, ObjectWriter, PIECE_BYTES, Pieces, Reason, Result,
    TakeListed,
};

/// Objects in memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    objects: Arc<Mutex<BTreeMap<ObjectName, Object>>>,
}

#[derive(Debug)]
struct Object {
    bytes: Bytes,
    modified: Timestamp,
}

impl Object {
    /// A copy of `bytes`, because they may be a part of something larger, or hold a reservation of memory.
    fn new(bytes: &[u8]) -> Self {
        Self { bytes: Bytes::copy_from_slice(bytes), modified: Timestamp::now() }
    }
}

impl Memory {
    fn objects(&self) -> MutexGuard<'_, BTreeMap<ObjectName, Object>> {
        // Nothing panics while it holds the lock, and a map is whole between two calls.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl ObjectStore for Memory {
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        let mut objects = self.objects();
        if objects.contains_key(object) {
            return Err(Error::new("write", object, Reason::Exists));
        }
        objects.insert(object.clone(), Object::new(&bytes));
        Ok(())
    }

    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        self.objects().insert(object.clone(), Object::new(&bytes));
        Ok(())
    }

    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool> {
        match self.objects().get_mut(object) {
            Some(there) if there.bytes == was => {
                *there = Object::new(&bytes);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    async fn create(&self, object: &ObjectName) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(Writer { store: self.clone(), object: object.clone(), bytes: BytesMut::new() }))
    }

    async fn get(&self, object: &ObjectName) -> Result<Pieces> {
        let found = self.objects().get(object).map(|found| found.bytes.clone());
        let mut bytes = found.ok_or_else(|| Error::new("read", object, Reason::Missing))?;
        let (sender, pieces) = Pieces::channel();
        tokio::spawn(async move {
            while !bytes.is_empty() {
                let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
                if sender.send(Ok(piece)).await.is_err() {
                    return;
                }
            }
        });
        Ok(pieces)
    }

    async fn copy(&self, from: &ObjectName, to: &ObjectName) -> Result<bool> {
        let there = self.objects().get(from).map(|found| found.bytes.clone());
        let Some(bytes) = there else { return Ok(false) };
        self.put(to, bytes).await.map(|()| true)
    }

    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()> {
        let objects = self.objects();
        let found = objects.iter().filter(|(o, _)| o.folder == *folder && o.name.starts_with(prefix));
        let listed = found.map(|(o, Object { bytes, modified })| Listed {
            name: o.name.clone(),
            bytes: bytes.len() as u64,
            modified: Some(*modified),
        });
        listed.for_each(take);
        Ok(())
    }

    async fn delete(&self, object: &ObjectName) -> Result<()> {
        self.objects().remove(object);
        Ok(())
    }

    async fn tidy(&self, _folder: &Folder, _prefix: &str) -> Result<()> {
        Ok(())
    }
}

struct Writer {
    store: Memory,
    object: ObjectName,
    bytes: BytesMut,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<()> {
        self.store.put(&self.object, self.bytes.freeze()).await
    }
}
