//! What a backup keeps of its volume besides the data: all columns of its row, and the metadata of user and image.
//!
//! It is the JSON text that Cinder's drivers store beside a backup, in version 2, but for a secret that they put there.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use sqlx::AnyConnection;

use super::sql::{now, table};
use super::{BackupRow, Changes, Database, Error, Result, SnapshotRow, VolumeRow};

/// Cinder's mark of a volume that was made to be restored to; such a name may be replaced.
const RESTORED_NAME: &str = "restore_backup_";
/// The part with the columns of the volume.
const BASE: &str = "volume-base-metadata";

table! {
    /// What the image was called that the volume was made from, and more of that kind.
    GlancePair "volume_glance_metadata" {
        /// What it is called.
        key: String,
        /// What it is.
        value: Option<String>,
    }
}

table! {
    /// A type of volumes.
    TypeRow "volume_types" {
        /// Its id.
        id: String,
    }
}

/// What a backup has kept of the encryption of its volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptKey {
    /// The key that the volume had; none if it was not encrypted.
    pub key_id: Option<String>,
    /// The type that it had.
    pub volume_type_id: Option<String>,
}

/// What a backup has kept of the key of its volume; nothing if it says nothing of keys, as in version 1. `volume_id` is the
/// volume that it is for, which only errors name.
pub fn kept_key(volume_id: &str, text: &str) -> Result<Option<KeptKey>> {
    let kept = read(volume_id, text)?;
    let base = kept.get(BASE).filter(|base| is_second(&kept) && base.get("encryption_key_id").is_some());
    let text_of = |base: &Value, name: &str| base.get(name).and_then(Value::as_str).map(Into::into);
    Ok(base.map(|base| KeptKey {
        key_id: text_of(base, "encryption_key_id"),
        volume_type_id: text_of(base, "volume_type_id"),
    }))
}

/// Reads what a backup has kept, in version 1 or 2.
fn read(volume_id: &str, text: &str) -> Result<Value> {
    let wrong = |problem: &str| Error::VolumeMeta { volume_id: volume_id.into(), problem: problem.into() };
    let kept: Value = serde_json::from_str(text).map_err(|_| wrong("they are no JSON"))?;
    match kept.get("version").and_then(Value::as_i64) {
        Some(1 | 2) => Ok(kept),
        _ => Err(wrong("their version is neither 1 nor 2")),
    }
}

fn is_second(kept: &Value) -> bool {
    kept.get("version").and_then(Value::as_i64) == Some(2)
}

impl Database {
    /// What a backup of the volume is to keep of it. That leaves out the secret by which an iSCSI volume is attached, of which
    /// no restore makes use.
    pub async fn volume_meta(&self, volume_id: &str) -> Result<String> {
        let base = self.volume_columns(volume_id).await?;
        let mut base = base.ok_or_else(|| Error::NotThere { what: "volume", id: volume_id.into() })?;
        base.insert("provider_auth".into(), Value::Null);
        let mut whole = json!({ "version": 2, BASE: base });
        let metadata = self.volume_metadata(volume_id).await?;
        if !metadata.is_empty() {
            whole["volume-metadata"] = json!(metadata);
        }
        let doing = format!("read the image metadata of volume {volume_id}");
        let rows = self.read(&doing, "volume_id = ? AND deleted = false", &[volume_id.into()]).await?;
        let glance: Map<String, Value> =
            rows.into_iter().map(|GlancePair { key, value }| (key, json!(value))).collect();
        if !glance.is_empty() {
            whole["volume-glance-metadata"] = json!(glance);
        }
        Ok(whole.to_string())
    }

    /// Whether a volume, a snapshot or a backup that is not deleted has this key, but for the one with the id `but`.
    pub async fn is_key_in_use(&self, key_id: &str, but: &str) -> Result<bool> {
        let doing = format!("look for who has key {key_id}");
        let condition = "encryption_key_id = ? AND id <> ? AND deleted = false";
        let values = [key_id.into(), but.into()];
        let volumes: Vec<VolumeRow> = self.read(&doing, condition, &values).await?;
        let snapshots: Vec<SnapshotRow> = self.read(&doing, condition, &values).await?;
        let backups: Vec<BackupRow> = self.read(&doing, condition, &values).await?;
        Ok(!volumes.is_empty() || !snapshots.is_empty() || !backups.is_empty())
    }

    /// Whether there is such a type of volumes, and it is not deleted.
    pub async fn has_volume_type(&self, id: &str) -> Result<bool> {
        let types: Vec<TypeRow> =
            self.read(&format!("read volume type {id}"), "id = ? AND deleted = false", &[id.into()]).await?;
        Ok(!types.is_empty())
    }

    /// Puts back what a backup kept of its volume, in version 1 or 2, as Cinder does: the name only to a volume that has none
    /// or was made to be restored to, the user's metadata and those of the image in the place of what is there. What is kept
    /// of its key is not looked at, see [`kept_key`]: `further` is what is changed of the volume besides.
    pub async fn restore_volume_meta(&self, volume_id: &str, text: &str, further: &Changes) -> Result<()> {
        let kept = read(volume_id, text)?;
        let part = |name: &str| kept.get(name).and_then(Value::as_object);
        let base = part(BASE);
        let text_of = |name: &str| base.and_then(|base| base.get(name)).and_then(Value::as_str);
        let texts = |part: &Map<String, Value>| -> BTreeMap<String, String> {
            part.iter()
                .map(|(key, value)| {
                    (key.clone(), value.as_str().map_or_else(|| value.to_string(), Into::into))
                })
                .collect()
        };
        let metadata = part("volume-metadata").map(texts);
        let glance = part("volume-glance-metadata").map(texts);
        let attempt = || async {
            let mut transaction = self.begin().await?;
            let there = self
                .dialect
                .read(&mut transaction, "id = ? AND deleted = false FOR UPDATE", &[volume_id.into()])
                .await?;
            let Some(VolumeRow { display_name, .. }) = there.into_iter().next() else { return Ok(false) };
            let mut changes = further.clone();
            let replaceable =
                display_name.is_none_or(|name| name.is_empty() || name.starts_with(RESTORED_NAME));
            if let Some(name) = text_of("display_name").filter(|name| replaceable && !name.is_empty()) {
                changes = changes.text("display_name", name);
                if base.is_some_and(|base| base.contains_key("display_description")) {
                    changes = changes.text_or_null("display_description", text_of("display_description"));
                }
            }
            if let Some(metadata) = &metadata {
                self.remove_pairs(&mut transaction, "volume_metadata", volume_id, metadata.keys()).await?;
                self.merge_pairs(&mut transaction, volume_id, metadata).await?;
            }
            if let Some(glance) = &glance {
                self.remove_pairs(&mut transaction, "volume_glance_metadata", volume_id, [].iter()).await?;
                for (key, value) in glance {
                    let place = ("volume_glance_metadata", "volume_id", volume_id);
                    self.insert_pair(&mut transaction, place, key, value).await?;
                }
                changes = changes.bool("bootable", true);
            }
            if changes != Changes::new() {
                self.change(&mut transaction, "volumes", volume_id, &[], &changes).await?;
            }
            transaction.commit().await?;
            Ok(true)
        };
        let there = self.again(&format!("put back the metadata of volume {volume_id}"), attempt).await?;
        there.then_some(()).ok_or_else(|| Error::NotThere { what: "volume", id: volume_id.into() })
    }

    /// Marks the pairs of a volume as deleted, but for those with one of these keys.
    async fn remove_pairs<'a>(
        &self,
        to: &mut AnyConnection,
        table: &str,
        volume_id: &str,
        but: impl Iterator<Item = &'a String>,
    ) -> sqlx::Result<()> {
        let mut sql = format!(
            "UPDATE {table} SET deleted = true, deleted_at = ?time WHERE volume_id = ? AND deleted = false"
        );
        let mut values = vec![now().into(), volume_id.into()];
        for key in but {
            sql.push_str(&format!(" AND {table}.key <> ?"));
            values.push(key.into());
        }
        self.dialect.execute(to, &sql, &values).await.map(|_| ())
    }
}
