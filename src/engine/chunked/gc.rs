//! Finds what attempts to make backups have stored, by the names of their objects.
//!
//! Names tell which attempt of which backup an object is of, and not whether Cinder or we wrote it: that only records and
//! our own lists of checksums tell.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::metadata::object_number;
use super::{Chunked, Error, Names, Naming, checkpoints};
use crate::job::{BackupId, Container, Context, Record, VolumeId};
use crate::store::{Folder, Listed, Partial};

/// What the name of the object ends with that makes a backup visible.
const METADATA: &str = "_metadata";
/// What that of the one with the digests of all blocks ends with.
const SHA256_FILE: &str = "_sha256file";

/// What one attempt to make a backup has stored, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The backup.
    pub backup_id: BackupId,
    /// The volume.
    pub volume_id: VolumeId,
    /// Where its objects lie.
    pub container: Container,
    /// What the names of its objects begin with.
    pub prefix: String,
    /// When it was begun, by its name.
    pub begun: Timestamp,
    /// Whether the object is there that makes a backup visible.
    pub visible: bool,
    /// Whether there is a list of checksums, finished or not, or a note of what was stored: only we write these.
    pub is_ours: bool,
    /// The size of all its objects.
    pub bytes: u64,
    /// How many there are, those included that are not finished.
    pub object_count: u64,
    /// When the last of them was written; none if the store does not say that.
    pub modified: Option<Timestamp>,
}

/// What a prefix tells.
struct Prefix {
    volume_id: VolumeId,
    backup_id: BackupId,
    begun: Timestamp,
}

impl Naming {
    /// What the prefixes of all backups of a volume begin with.
    pub(super) fn volume_prefix(&self, volume_id: VolumeId) -> String {
        let end = if self.has_folders() { '_' } else { '/' };
        format!("volume_{volume_id}{end}")
    }

    fn has_folders(&self) -> bool {
        matches!(self, Self::Folders | Self::Shares)
    }

    /// Reads a prefix; none where it is not one that we give.
    fn parse(&self, prefix: &str) -> Option<Prefix> {
        let (before, backup_id) = prefix.strip_prefix("volume_")?.rsplit_once("_backup_")?;
        let (volume_id, time) = if self.has_folders() {
            before.split_once('_')?
        } else {
            // Of any zone: a worker in Cinder's place has one with a name of its own.
            let (before, _) = before.rsplit_once("/az_")?;
            before.split_once('/')?
        };
        let time = DateTime::strptime("%Y%m%d%H%M%S", time).ok().filter(|_| time.len() == 14)?;
        let begun = time.to_zoned(TimeZone::UTC).ok()?.timestamp();
        Some(Prefix { volume_id: volume_id.parse().ok()?, backup_id: backup_id.parse().ok()?, begun })
    }

    /// The prefix that a name is, or begins with. The last group of an id may be all digits, as the number of an object is.
    fn prefix_in<'a>(&self, name: &'a str) -> &'a str {
        if self.parse(name).is_some() { name } else { prefix_of(name).unwrap_or(name) }
    }
}

/// What is under one name in a store, whether it is finished or not.
struct Name {
    name: String,
    finished: bool,
    bytes: u64,
    modified: Option<Timestamp>,
}

impl Chunked {
    /// Finds the attempts that can be found: those whose objects lie where backups of Backhaul's own lie, as these records
    /// say, and those that have a list of checksums or notes of what they have stored.
    pub async fn attempts(&self, records: &BTreeMap<BackupId, Record>) -> Result<Vec<Attempt>, Error> {
        let own = records.values().filter(|record| record.job_id.is_some());
        let mut places: BTreeSet<_> =
            own.map(|record| (record.container.clone(), record.volume_id)).collect();
        let mut found = BTreeMap::new();
        for folder in ["checksums", checkpoints::FOLDER].map(Folder::own) {
            let mut names = Vec::new();
            self.each_name(&folder, "", &mut |name| names.push(name)).await?;
            for name in names {
                let text = self.naming.prefix_in(&name.name);
                let Some(prefix) = self.naming.parse(text) else { continue };
                let container = match records.get(&prefix.backup_id) {
                    Some(record) => record.container.clone(),
                    None => self.naming.container(prefix.backup_id)?,
                };
                places.insert((container.clone(), prefix.volume_id));
                let attempt = attempt_of(&mut found, &container, text, &prefix);
                attempt.add(&name);
                attempt.is_ours = true;
            }
        }
        for (container, volume_id) in places {
            let mut take = |name: Name| {
                let Some(text) = prefix_of(&name.name) else { return };
                let Some(prefix) = self.naming.parse(text) else { return };
                let attempt = attempt_of(&mut found, &container, text, &prefix);
                attempt.add(&name);
                attempt.visible |= name.finished && name.name.ends_with(METADATA);
            };
            self.each_name(&Folder::from(&container), &self.naming.volume_prefix(volume_id), &mut take)
                .await?;
        }
        Ok(found.into_values().collect())
    }

    /// Removes what attempts before the one that a record names have stored of the same backup: each was taken over by the
    /// next one, which may have died before it had removed all. One after it may be at work.
    pub async fn remove_earlier_attempts(&self, record: &Record, ctx: &Context) -> Result<(), Error> {
        let start = self.naming.volume_prefix(record.volume_id);
        let mut prefixes = BTreeSet::new();
        let own = ["checksums", checkpoints::FOLDER].map(Folder::own);
        for folder in own.into_iter().chain([Folder::from(&record.container)]) {
            let mut take = |name: Name| {
                let text = self.naming.prefix_in(&name.name);
                if self.is_earlier(text, record) && !prefixes.contains(text) {
                    prefixes.insert(text.to_owned());
                }
            };
            self.each_name(&folder, &start, &mut take).await?;
        }
        for prefix in prefixes {
            self.remove_objects(&Names::new(&record.container, &prefix)?, 0, ctx).await?;
        }
        Ok(())
    }

    /// Whether that is the prefix of an attempt at the same backup that was begun before the one that a record names.
    pub(super) fn is_earlier(&self, prefix: &str, record: &Record) -> bool {
        let parsed = self.naming.parse(prefix);
        prefix != record.service_metadata
            && parsed.is_some_and(|Prefix { backup_id, begun, .. }| {
                backup_id == record.backup_id && begun < record.created_at
            })
    }

    /// Whether the object is there that makes what an attempt has stored a backup.
    pub async fn is_attempt_visible(&self, attempt: &Attempt) -> Result<bool, Error> {
        self.has(&Names::new(&attempt.container, &attempt.prefix)?.metadata).await
    }

    /// Removes what an attempt has stored.
    pub async fn remove_attempt(&self, attempt: &Attempt) -> Result<(), Error> {
        self.remove_objects(&Names::new(&attempt.container, &attempt.prefix)?, 0, &Context::default()).await
    }

    /// Hands over all names of a folder that begin with `prefix`.
    async fn each_name(
        &self,
        folder: &Folder,
        prefix: &str,
        take: &mut (dyn FnMut(Name) + Send),
    ) -> Result<(), Error> {
        let mut take_listed = |Listed { name, bytes, modified }: Listed| {
            take(Name { name, finished: true, bytes, modified });
        };
        self.store.list_each(folder, prefix, &mut take_listed).await?;
        for Partial { object, bytes, modified, .. } in self.store.partials(folder, prefix).await? {
            take(Name { name: object.name, finished: false, bytes, modified });
        }
        Ok(())
    }
}

/// The attempt of that prefix, which is begun with nothing if it is not known yet.
fn attempt_of<'a>(
    found: &'a mut BTreeMap<(Container, String), Attempt>,
    container: &Container,
    text: &str,
    prefix: &Prefix,
) -> &'a mut Attempt {
    found.entry((container.clone(), text.to_owned())).or_insert_with(|| Attempt {
        backup_id: prefix.backup_id,
        volume_id: prefix.volume_id,
        container: container.clone(),
        prefix: text.to_owned(),
        begun: prefix.begun,
        visible: false,
        is_ours: false,
        bytes: 0,
        object_count: 0,
        modified: None,
    })
}

impl Attempt {
    /// Whether it is the one that this record is of.
    pub fn is_of(&self, record: &Record) -> bool {
        self.container == record.container && self.prefix == record.service_metadata
    }

    fn add(&mut self, name: &Name) {
        self.bytes += name.bytes;
        self.object_count += 1;
        self.modified = self.modified.max(name.modified);
    }
}

/// The prefix of an object of a backup.
pub(super) fn prefix_of(name: &str) -> Option<&str> {
    if let Some(prefix) = name.strip_suffix(METADATA).or_else(|| name.strip_suffix(SHA256_FILE)) {
        return Some(prefix);
    }
    let (prefix, _) = name.rsplit_once('-')?;
    object_number(prefix, name).map(|_| prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
    const OTHER: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";

    #[test]
    fn an_id_that_ends_in_digits_is_not_taken_for_the_number_of_an_object() {
        let prefix = format!("volume_{ID}_20260102140322_backup_2fd5885e-9835-4863-8fab-747060130069");
        for name in [prefix.clone(), format!("{prefix}-00005"), format!("{prefix}_metadata")] {
            assert_eq!(Naming::Folders.prefix_in(&name), prefix);
        }
    }

    #[test]
    fn a_prefix_tells_its_backup_and_its_time_and_nothing_else_is_one() {
        let usual = "bucket".to_owned();
        let folders = format!("volume_{ID}_20260102140322_backup_{OTHER}");
        let buckets = format!("volume_{ID}/20260102140322/az_nova_backup_{OTHER}");
        for (naming, text, other) in [
            (Naming::Folders, &folders, &buckets),
            (Naming::Shares, &folders, &buckets),
            (Naming::Buckets { usual: usual.clone() }, &buckets, &folders),
            (Naming::Containers { usual: usual.clone() }, &buckets, &folders),
            (Naming::Google { usual }, &buckets, &folders),
        ] {
            let prefix = naming.parse(text).unwrap();
            assert_eq!(prefix.volume_id.to_string(), ID);
            assert_eq!(prefix.backup_id.to_string(), OTHER);
            assert_eq!(prefix.begun, "2026-01-02T14:03:22Z".parse().unwrap());
            assert!(text.starts_with(&naming.volume_prefix(prefix.volume_id)));
            assert!(naming.parse(&text.replace("nova", "of_ours")).is_some(), "{naming:?}");
            for text in [
                other.clone(),
                format!("{text}-00001"),
                format!("x{text}"),
                text.replace("2026", "202"),
                text.replace("20260102", "20261302"),
                text.replace("nova", "other").replace("_backup_", "_copy_"),
            ] {
                assert!(naming.parse(&text).is_none(), "{naming:?}: {text}");
            }
        }
    }

    #[test]
    fn an_object_is_of_the_attempt_whose_prefix_it_has() {
        for name in ["p-00001", "p-123456", "p_metadata", "p_sha256file"] {
            assert_eq!(prefix_of(name), Some("p"), "{name}");
        }
        for name in ["p", "p-1", "p-00001x", "p_other"] {
            assert_eq!(prefix_of(name), None, "{name}");
        }
    }
}
