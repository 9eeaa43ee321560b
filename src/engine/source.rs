//! The sources that jobs name, opened.

use std::sync::Arc;

#[cfg(feature = "ceph")]
use tracing::warn;

#[cfg(feature = "ceph")]
use crate::engine::cpu::blocking;
use crate::engine::error::Error;
use crate::job::Record;
#[cfg(feature = "ceph")]
use crate::volume::rbd::RbdOrigin;
use crate::volume::{FileSource, VolumeSource};

/// A volume that is to be backed up.
#[derive(Debug, Clone)]
pub enum Source {
    /// A file or block device.
    File(Arc<FileSource>),
    /// An RBD image, or a snapshot of one.
    #[cfg(feature = "ceph")]
    Rbd(RbdOrigin),
}

impl Source {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::File(file) => file.bytes(),
            #[cfg(feature = "ceph")]
            Self::Rbd(origin) => origin.bytes(),
        }
    }

    /// The image, if it is one.
    #[cfg(feature = "ceph")]
    pub fn origin(&self) -> Option<RbdOrigin> {
        match self {
            Self::File(_) => None,
            Self::Rbd(origin) => Some(origin.clone()),
        }
    }

    /// Opens what is read for a backup: of an RBD image the snapshot that its record names, which is taken now. It is
    /// compared with the snapshot of the parent, where that can be done.
    #[cfg_attr(not(feature = "ceph"), allow(unused_variables))]
    pub async fn open(
        self,
        record: &mut Record,
        parent: Option<&Record>,
    ) -> Result<Arc<dyn VolumeSource>, Error> {
        match self {
            Self::File(file) => Ok(file),
            #[cfg(feature = "ceph")]
            Self::Rbd(origin) => {
                let (snapshot, parent) = (record.source.clone(), parent.cloned());
                let volume = blocking(move || {
                    let volume = origin.freeze(snapshot.as_ref())?;
                    let Some(parent) = parent else { return Ok(volume) };
                    match origin.comparable(&volume, parent.source.as_ref(), parent.volume_bytes) {
                        Ok(earlier) => Ok(volume.compared_with(earlier)),
                        Err(why) => {
                            warn!(
                                parent_id = %parent.backup_id, %why,
                                "all of the volume is read: what has changed since the parent is not known"
                            );
                            Ok::<_, Error>(volume)
                        }
                    }
                })
                .await??;
                record.volume_bytes = volume.bytes();
                if let Some(source) = &mut record.source {
                    source.snapshot_id = volume.snapshot_id();
                }
                Ok(Arc::new(volume))
            }
        }
    }
}
