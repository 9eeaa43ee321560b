//! The names that Cinder's Ceph driver gives to images, snapshots and objects, so that each side finds the other's.

use serde::{Deserialize, Serialize};

use crate::job::{BackupId, Record, VolumeId};

/// What Cinder calls its Ceph driver.
pub const SERVICE: &str = "cinder.backup.drivers.ceph.CephBackupDriver";

/// What Cinder keeps of a backup in its own database: the image that holds it.
#[derive(Serialize, Deserialize)]
struct ServiceMetadata {
    base: String,
}

/// The image of the chain that this full backup begins.
pub fn base(volume_id: VolumeId, backup_id: BackupId) -> String {
    format!("volume-{volume_id}.backup.{backup_id}")
}

/// The backup that begins the chain in this image, if it is one of backups.
pub fn first_backup(image: &str) -> Option<BackupId> {
    let (volume_id, backup_id) = image.strip_prefix("volume-")?.split_once(".backup.")?;
    volume_id.parse::<VolumeId>().ok()?;
    backup_id.parse().ok()
}

/// Whether an image is one of backups, by its name, whoever made it.
pub fn is_of_backups(image: &str) -> bool {
    let parts = image.strip_prefix("volume-").and_then(|rest| rest.split_once(".backup."));
    parts.is_some_and(|(volume_id, _)| volume_id.parse::<VolumeId>().is_ok())
}

/// The image of a volume, as Cinder calls it if it is not set to another name.
pub fn source_image(volume_id: VolumeId) -> String {
    format!("volume-{volume_id}")
}

/// The image of backups that Cinder made of snapshots, or long ago.
fn legacy_base(volume_id: VolumeId) -> String {
    format!("volume-{volume_id}.backup.base")
}

/// The service metadata of a backup in this image, to the byte as Cinder writes it.
pub fn service_metadata(base: &str) -> String {
    // Nothing that these names are made of needs an escape.
    format!("{{\"base\": \"{base}\"}}")
}

/// The image that holds a backup.
pub fn image(record: &Record) -> String {
    match serde_json::from_str::<ServiceMetadata>(&record.service_metadata) {
        Ok(metadata) => metadata.base,
        Err(_) => base(record.volume_id, record.backup_id),
    }
}

/// The images that may hold a backup that Cinder made; the first one that is there does. Cinder keeps no service
/// metadata of what it copied as a whole.
pub fn images(record: &Record) -> Vec<String> {
    let mut images = vec![image(record)];
    if record.service_metadata.is_empty() {
        images.push(legacy_base(record.volume_id));
    }
    images
}

/// The snapshot of a backup, of the same name on the source and on the image that holds it. Cinder's time has a
/// fraction of any length.
pub fn snapshot(record: &Record) -> String {
    let time = record.created_at;
    format!("backup.{}.snap.{}.{:06}", record.backup_id, time.as_second(), time.subsec_nanosecond() / 1000)
}

/// The backup that a snapshot belongs to, if it is one of a backup. Cinder's rule is the regular expression
/// `^backup\.([a-z0-9\-]+?)\.snap\.(.+)$`.
pub fn backup_of(snapshot: &str) -> Option<BackupId> {
    let (id, time) = snapshot.strip_prefix("backup.")?.split_once(".snap.")?;
    if time.is_empty() {
        return None;
    }
    id.parse().ok()
}

/// The RADOS object with the metadata of the volume.
pub fn metadata_object(backup_id: BackupId) -> String {
    format!("backup.{backup_id}.meta")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";

    #[test]
    fn names_are_those_of_cinder() {
        let (volume_id, backup_id) = (ID.parse().unwrap(), ID.parse().unwrap());
        assert_eq!(base(volume_id, backup_id), format!("volume-{ID}.backup.{ID}"));
        assert_eq!(first_backup(&base(volume_id, backup_id)), Some(backup_id));
        assert_eq!(first_backup(&legacy_base(volume_id)), None);
        assert!(is_of_backups(&base(volume_id, backup_id)) && is_of_backups(&legacy_base(volume_id)));
        assert!(!is_of_backups(&source_image(volume_id)) && !is_of_backups("volume-a.backup.base"));
        assert_eq!(service_metadata("a"), r#"{"base": "a"}"#);
        assert_eq!(metadata_object(backup_id), format!("backup.{ID}.meta"));
    }

    #[test]
    fn a_snapshot_of_a_backup_is_told_from_any_other() {
        assert_eq!(backup_of(&format!("backup.{ID}.snap.1795262136.62")), ID.parse().ok());
        assert_eq!(backup_of(&format!("backup.{ID}.snap.1795262136")), ID.parse().ok());
        for name in
            ["", "snap", "backup.x.snap.1", &format!("backup.{ID}.snap."), &format!("a.backup.{ID}.snap.1")]
        {
            assert_eq!(backup_of(name), None, "{name}");
        }
    }
}
