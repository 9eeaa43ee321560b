//! Finds what jobs that died have left in a cluster: images, snapshots of images and of volumes, lists of digests.
//!
//! Names are Cinder's, and tell the backup and not who made it. So an image is ours if it says so in its metadata, and a
//! snapshot if its backup has a record of ours, or lists of digests, which only we write. A backup that is whole stays,
//! even if its record is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::time::SystemTime;

use jiff::Timestamp;

use super::backup::{JOB_KEY, WRITER_KEY};
use super::{Rbd, backups_on, digests, names, open};
use crate::ceph::{Cluster, Clusters, Image, Mode, Pool, Snapshot, while_busy};
use crate::engine::cpu::blocking;
use crate::engine::error::Error;
use crate::job::{BackupId, JobId, RbdImage, Record, RecordState};
use crate::store::{Listed, ObjectName, Partial};

/// An image or a snapshot that no record needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Where it is; an image if no snapshot is named.
    pub place: RbdImage,
    /// The id of the image.
    image_id: String,
    /// The id of the snapshot.
    snapshot_id: Option<u64>,
    /// The backup that it is of.
    pub backup_id: BackupId,
    /// The job that it is of, if that is known.
    pub job_id: Option<JobId>,
    /// Its size, if it is an image.
    pub bytes: u64,
    /// When it was written last, or taken.
    pub modified: SystemTime,
    /// Why nobody needs it.
    pub reason: &'static str,
}

/// A list of digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    /// The backup that it is of.
    pub backup_id: BackupId,
    /// Its name.
    pub object: ObjectName,
    /// Its size, as far as the store says it.
    pub bytes: u64,
    /// When it was last written, if the store says that.
    pub modified: Option<Timestamp>,
    /// What there is of it, if it is not finished.
    pub partial: Option<Partial>,
}

/// What is known of backups: the records, and which backups have lists of digests.
#[derive(Debug, Clone)]
pub struct Known {
    /// The records.
    pub records: BTreeMap<BackupId, Record>,
    /// The backups of which there are lists of digests, but for those that stay without a record.
    pub listed: BTreeSet<BackupId>,
}

impl Known {
    /// Why nobody needs a snapshot of a backup, if it is ours; `needed` is the one that the record names.
    fn why_orphaned(&self, id: BackupId, needed: impl Fn(&Record) -> bool) -> Option<&'static str> {
        match self.records.get(&id) {
            Some(record) if record.job_id.is_none() => None,
            Some(Record { state: RecordState::Error(_), .. }) => Some("its backup came to nothing"),
            Some(record) if needed(record) => None,
            Some(_) => Some("another attempt of its job took over"),
            None if self.listed.contains(&id) => Some("its backup has no record"),
            None => None,
        }
    }

    fn is_ours(&self, id: BackupId) -> bool {
        self.records.get(&id).is_some_and(|record| record.job_id.is_some()) || self.listed.contains(&id)
    }

    fn job_of(&self, id: BackupId) -> Option<JobId> {
        self.records.get(&id).and_then(|record| record.job_id)
    }
}

impl Rbd {
    /// The lists of digests that there are, those included that are not finished.
    pub async fn lists(&self) -> Result<Vec<List>, Error> {
        let folder = digests::folder();
        let backup_of = |name: &str| name.split_once('.').and_then(|(id, _)| id.parse().ok());
        let mut lists = Vec::new();
        for Listed { name, bytes, modified } in self.store.list(&folder, "").await? {
            if let Some(backup_id) = backup_of(&name) {
                lists.push(List { backup_id, object: folder.object(&name)?, bytes, modified, partial: None });
            }
        }
        for partial in self.store.partials(&folder, "").await? {
            if let Some(backup_id) = backup_of(&partial.object.name) {
                let Partial { object, bytes, modified, .. } = partial.clone();
                lists.push(List { backup_id, object, bytes, modified, partial: Some(partial) });
            }
        }
        Ok(lists)
    }

    /// Which of these backups, whose records are gone, are whole all the same: an image of backups has the snapshot that
    /// makes one visible. It may be in any pool; where we may not look we have made none.
    pub async fn whole(&self, lost: BTreeSet<BackupId>) -> Result<BTreeSet<BackupId>, Error> {
        if lost.is_empty() {
            return Ok(lost);
        }
        let engine = self.clone();
        blocking(move || {
            let cluster = engine.connect()?;
            let mut whole = BTreeSet::new();
            for pool in cluster.pools()? {
                match visible(&cluster, &pool) {
                    // It is gone, not ours to look into, or one that can have no images.
                    Err(Error::Ceph(error))
                        if [ErrorKind::NotFound, ErrorKind::PermissionDenied, ErrorKind::Unsupported]
                            .contains(&error.kind()) => {}
                    visible => whole.extend(visible?.into_iter().filter(|id| lost.contains(id))),
                }
            }
            Ok(whole)
        })
        .await?
    }

    /// Finds the images of backups, and the snapshots of such images, that no record needs.
    pub async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>, Error> {
        let (engine, known) = (self.clone(), known.clone());
        blocking(move || {
            let cluster = engine.connect()?;
            let mut pools: BTreeSet<&str> = known.records.values().map(|r| r.container.as_str()).collect();
            pools.insert(&engine.settings.pool);
            let mut found = Vec::new();
            for pool in pools {
                let pool = match cluster.pool(pool) {
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    pool => pool?,
                };
                for name in pool.images()? {
                    if let Some(id) = names::first_backup(&name) {
                        engine.look_at(&pool, &name, id, &known, &mut found)?;
                    }
                }
            }
            Ok(found)
        })
        .await?
    }

    fn look_at(
        &self,
        pool: &Pool,
        name: &str,
        first: BackupId,
        known: &Known,
        found: &mut Vec<Leftover>,
    ) -> Result<(), Error> {
        let Some(image) = open(pool, name, None)? else { return Ok(()) };
        let place = RbdImage {
            cluster: self.settings.cluster.clone(),
            pool: pool.name().into(),
            image: name.into(),
            snapshot: None,
        };
        let is_in =
            |record: &Record| record.container.as_str() == pool.name() && names::image(record) == name;
        look_at_snapshots(&image, &place, known, is_in, found)?;
        let needed = |record: &Record| is_in(record) && !matches!(record.state, RecordState::Error(_));
        // Whoever writes it has it open.
        let in_use = || Ok::<_, Error>(image.watcher_count()? > 0);
        let job = image.metadata(JOB_KEY)?;
        // There may be other stores with images in this pool.
        let is_ours = job.is_some() && image.metadata(WRITER_KEY)?.is_some() && known.is_ours(first);
        let is_empty = image.snapshots()?.is_empty() && image.trashed_snapshots()?.is_empty();
        if is_ours && is_empty && !known.records.values().any(needed) && !in_use()? {
            found.push(Leftover {
                place,
                image_id: image.id()?,
                snapshot_id: None,
                backup_id: first,
                job_id: job.and_then(|id| id.parse().ok()),
                bytes: image.bytes()?,
                modified: image.modified()?,
                reason: "no backup is in it",
            });
        }
        Ok(())
    }
}

/// The backups that are whole in a pool.
fn visible(cluster: &Cluster, pool: &str) -> Result<Vec<BackupId>, Error> {
    let pool = cluster.pool(pool)?;
    let mut visible = Vec::new();
    for name in pool.images()?.iter().filter(|name| names::is_of_backups(name)) {
        if let Some(image) = open(&pool, name, None)? {
            visible.extend(backups_on(&image.snapshots()?));
        }
    }
    Ok(visible)
}

/// Finds the snapshots of volumes that were taken for backups and that no record needs; those of volumes that a record
/// names.
pub async fn source_leftovers(clusters: &Clusters, known: &Known) -> Result<Vec<Leftover>, Error> {
    let (clusters, known) = (clusters.clone(), known.clone());
    blocking(move || {
        let sources = known.records.values().filter_map(|record| record.source.as_ref());
        let places: Vec<RbdImage> =
            sources.map(|taken| RbdImage { snapshot: None, ..taken.image.clone() }).collect();
        let mut found = Vec::new();
        for (index, place) in places.iter().enumerate() {
            if places[..index].contains(place) {
                continue;
            }
            let image = clusters
                .connect(place.cluster.as_deref())
                .and_then(|cluster| cluster.pool(&place.pool)?.open_image(&place.image, None, Mode::Read));
            let image = match image {
                // The volume is gone, or its cluster is known no more.
                Err(error) if [ErrorKind::NotFound, ErrorKind::InvalidInput].contains(&error.kind()) => {
                    continue;
                }
                image => image?,
            };
            look_at_snapshots(&image, place, &known, |record| record.source.is_some(), &mut found)?;
        }
        Ok(found)
    })
    .await?
}

/// Finds the snapshots of an image that were taken for backups and that no record needs. What is not known to be ours,
/// or is of a backup that is elsewhere, is not for us to judge.
fn look_at_snapshots(
    image: &Image,
    place: &RbdImage,
    known: &Known,
    is_here: impl Fn(&Record) -> bool,
    found: &mut Vec<Leftover>,
) -> Result<(), Error> {
    let mut add = |snapshot: Snapshot, id: BackupId, reason| {
        found.push(Leftover {
            place: RbdImage { snapshot: Some(snapshot.name.clone()), ..place.clone() },
            image_id: image.id()?,
            snapshot_id: Some(snapshot.id),
            backup_id: id,
            job_id: known.job_of(id),
            bytes: 0,
            modified: image.taken(&snapshot)?,
            reason,
        });
        Ok::<_, Error>(())
    };
    for snapshot in image.snapshots()? {
        let Some(id) = names::backup_of(&snapshot.name) else { continue };
        let needed = |record: &Record| !is_here(record) || names::snapshot(record) == snapshot.name;
        if let Some(reason) = known.why_orphaned(id, needed) {
            add(snapshot, id, reason)?;
        }
    }
    for snapshot in image.trashed_snapshots()? {
        let Some(id) = names::backup_of(&snapshot.name) else { continue };
        if known.is_ours(id) {
            add(snapshot, id, "its removal was broken off")?;
        }
    }
    Ok(())
}

impl Leftover {
    /// Removes it, if it is still there. Says whether it was removed: a snapshot that has clones stays in the trash.
    pub async fn remove(&self, clusters: &Clusters) -> Result<bool, Error> {
        let (leftover, clusters) = (self.clone(), clusters.clone());
        blocking(move || {
            let place = &leftover.place;
            let pool = clusters.connect(place.cluster.as_deref())?.pool(&place.pool)?;
            let image = match pool.open_image(&place.image, None, Mode::Write) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                image => image?,
            };
            if image.id()? != leftover.image_id {
                return Ok(false);
            }
            let Some(id) = leftover.snapshot_id else {
                // Ours is the only one that may have it open.
                if image.watcher_count()? > 1 || !image.snapshots()?.is_empty() {
                    return Ok(false);
                }
                drop(image);
                return Ok(while_busy(|| pool.remove_image(&place.image))?);
            };
            image.remove_snapshots(|snapshot| snapshot.id == id)?;
            Ok(!image.trashed_snapshots()?.iter().any(|snapshot| snapshot.id == id))
        })
        .await?
    }
}

/// Why nobody needs a list of digests, by the `record` that its backup has now.
pub fn why_list_orphaned(list: &str, record: Option<&Record>) -> Option<&'static str> {
    let Some(record) = record else { return Some("its backup has no record") };
    let is_named = record.object_digests.iter().any(|(name, _)| name == list);
    match &record.state {
        RecordState::Error(_) => Some("its backup came to nothing"),
        // They go with the backup.
        RecordState::Deleting(_) => None,
        _ if is_named => None,
        RecordState::Creating(_) if list.ends_with(&format!(".{}", record.writer)) => None,
        RecordState::Creating(_) | RecordState::Available => Some("another attempt of its job took over"),
    }
}
