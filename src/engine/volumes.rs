//! The volumes that jobs name: where they may be, and how they are opened.

use std::sync::Arc;

use super::cpu::blocking;
use super::error::Error;
#[cfg(feature = "ceph")]
use super::rbd::{To, is_of_backups};
use super::source::Source;
#[cfg(feature = "ceph")]
use crate::ceph::Clusters;
use crate::job::Location;
#[cfg(feature = "ceph")]
use crate::job::{RbdImage, SourceSnapshot};
#[cfg(feature = "ceph")]
use crate::volume::{self, RbdTarget, rbd};
use crate::volume::{FileRoots, FileSource, FileTarget, VolumeTarget};

/// Where the volumes of jobs may be.
#[derive(Debug, Clone)]
pub struct Volumes {
    /// The folders that files must be below.
    pub file_roots: FileRoots,
    /// The clusters that images may be in.
    #[cfg(feature = "ceph")]
    pub clusters: Clusters,
}

/// A volume that is to be restored onto.
#[derive(Debug, Clone)]
pub enum Target {
    /// A file or block device.
    File(Arc<FileTarget>),
    /// An RBD image.
    #[cfg(feature = "ceph")]
    Rbd(Arc<RbdTarget>),
}

impl Target {
    /// The same for those who need not know what it is.
    pub fn into_volume(self) -> Arc<dyn VolumeTarget> {
        match self {
            Self::File(file) => file,
            #[cfg(feature = "ceph")]
            Self::Rbd(image) => image,
        }
    }
}

impl Volumes {
    /// Files below these folders, and nothing else.
    pub fn files(file_roots: FileRoots) -> Self {
        Self {
            file_roots,
            #[cfg(feature = "ceph")]
            clusters: Clusters::default(),
        }
    }

    /// Opens what is to be backed up.
    pub async fn source(&self, location: &Location) -> Result<Source, Error> {
        let (volumes, location) = (self.clone(), location.clone());
        blocking(move || match &location {
            Location::File(path) => Ok(Source::File(Arc::new(FileSource::open(path, &volumes.file_roots)?))),
            #[cfg(feature = "ceph")]
            Location::Rbd(image) => Ok(Source::Rbd(rbd::RbdOrigin::open(&volumes.clusters, image)?)),
            #[cfg(not(feature = "ceph"))]
            Location::Rbd(_) => Err(Error::UnsupportedVolume { location: location.to_string() }),
        })
        .await?
    }

    /// Opens what is to be restored onto, which must not be what backups are in. `restore` names the job and the backup, the
    /// same for each attempt.
    pub async fn target(&self, location: &Location, bytes: u64, restore: String) -> Result<Target, Error> {
        let (volumes, location) = (self.clone(), location.clone());
        blocking(move || match &location {
            Location::File(path) => {
                Ok(Target::File(Arc::new(FileTarget::open(path, bytes, &volumes.file_roots, &restore)?)))
            }
            #[cfg(feature = "ceph")]
            Location::Rbd(image) => {
                // Of whatever store: all that Cinder copied as a whole lies in the head of its image.
                if is_of_backups(&image.image) {
                    return Err(volume::Error::BackupImage { path: image.to_string() }.into());
                }
                Ok(Target::Rbd(Arc::new(RbdTarget::open(&volumes.clusters, image, bytes, &restore)?)))
            }
            #[cfg(not(feature = "ceph"))]
            Location::Rbd(_) => Err(Error::UnsupportedVolume { location: location.to_string() }),
        })
        .await?
    }

    /// Whether there is anything at the place that was to be restored onto, as far as one can see.
    pub async fn is_there(&self, location: &Location) -> bool {
        let (volumes, location) = (self.clone(), location.clone());
        let looked = blocking(move || match &location {
            Location::File(path) => FileTarget::is_there(path, &volumes.file_roots),
            #[cfg(feature = "ceph")]
            Location::Rbd(image) => RbdTarget::is_there(&volumes.clusters, image),
            #[cfg(not(feature = "ceph"))]
            Location::Rbd(_) => false,
        });
        looked.await.unwrap_or(true)
    }

    /// Removes what an attempt of a restore, of the same name as in [`Volumes::target`], has left for the next one.
    #[cfg_attr(not(feature = "ceph"), allow(unused_variables))]
    pub async fn discard(&self, location: &Location, bytes: u64, restore: String) -> Result<(), Error> {
        let (volumes, location) = (self.clone(), location.clone());
        blocking(move || match &location {
            Location::File(path) => Ok(FileTarget::discard(path, &volumes.file_roots, &restore)?),
            #[cfg(feature = "ceph")]
            Location::Rbd(image) => Ok(RbdTarget::discard(&volumes.clusters, image, bytes, &restore)?),
            #[cfg(not(feature = "ceph"))]
            Location::Rbd(_) => Ok(()),
        })
        .await?
    }

    /// Removes snapshots that were taken of an image for backups, as far as they are there.
    #[cfg(feature = "ceph")]
    pub async fn remove_snapshots(&self, image: &RbdImage, taken: Vec<SourceSnapshot>) -> Result<(), Error> {
        let (clusters, image) = (self.clusters.clone(), image.clone());
        Ok(blocking(move || rbd::remove_snapshots(&clusters, &image, &taken)).await??)
    }

    /// Removes the snapshots that are `wanted` from an image of which nobody knows more than its name.
    #[cfg(feature = "ceph")]
    pub async fn remove_snapshots_somewhere(
        &self,
        image: String,
        wanted: impl Fn(&str) -> bool + Send + 'static,
    ) -> Result<bool, Error> {
        let clusters = self.clusters.clone();
        Ok(blocking(move || rbd::remove_snapshots_somewhere(&clusters, &image, wanted)).await??)
    }
}

#[cfg(feature = "ceph")]
impl From<Target> for To {
    fn from(target: Target) -> Self {
        match target {
            Target::File(file) => Self::Volume(file),
            Target::Rbd(image) => Self::Rbd(image),
        }
    }
}
