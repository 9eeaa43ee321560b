//! Backhaul and OpenStack Cinder 29 on one server that speaks S3, Swift or the JSON API of Google Cloud Storage: either
//! restores, goes on from and deletes what the other made. Cinder's drivers are the real ones.

use std::collections::BTreeSet;
use std::fs::{self, File};

use crate::support::cinder::{Cinder, Of};
use crate::support::engine::{Bench, Kind, backup_job, delete, restore, run, verify};
use crate::support::gcs::{self, Tokens};
use crate::support::volume::{Fill, Volume, junk};
use crate::support::{s3, swift};
use backhaul::cinder::export_record::{self, Form};
use backhaul::engine::Engine;
use backhaul::engine::chunked::{Compression, Settings};
use backhaul::job::{BackupId, Container, Parent, Record, VolumeId, Work};
use backhaul::store::Folder;
use rstest::rstest;
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const OBJECT_BYTES: usize = MIB;

/// Who makes a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    Us,
    Cinder,
}

/// A Cinder on the same server, with this bucket or container; where that wants one, with a token.
fn cinder(kind: Kind, container: &str, tokens: &Tokens) -> Cinder {
    let url = match kind {
        Kind::Gcs => {
            let options = [
                format!("backup_gcs_bucket={container}"),
                format!("backup_gcs_credential_file={}", tokens.key_file().display()),
                "backup_gcs_project_id=backups".into(),
                format!("backup_gcs_object_size={OBJECT_BYTES}"),
            ];
            // Google's client has no setting for that.
            let variable = ("GCS_URL", gcs::url());
            return Cinder::start_with(
                "cinder.backup.drivers.gcs.GoogleBackupDriver",
                &options,
                Some(variable),
            );
        }
        Kind::Swift => swift::url(),
        Kind::Gateway => swift::gateway_url(),
        _ => {
            let (user, key) = swift::user_and_key(&s3::url());
            let mut options = vec![
                format!("backup_s3_endpoint_url={}", s3::settings(&s3::url(), container).endpoint),
                format!("backup_s3_store_bucket={container}"),
                format!("backup_s3_store_access_key={user}"),
                format!("backup_s3_store_secret_key={key}"),
                format!("backup_s3_object_size={OBJECT_BYTES}"),
            ];
            if kind == Kind::Encrypted {
                options.push("backup_s3_sse_customer_algorithm=AES256".into());
                options.push(format!("backup_s3_sse_customer_key={}", s3::SSE_C_KEY));
            }
            return Cinder::start("cinder.backup.drivers.s3.S3BackupDriver", &options);
        }
    };
    let (user, key) = swift::user_and_key(&url);
    let options = [
        "backup_swift_auth=single_user".into(),
        "backup_swift_auth_version=1".into(),
        format!("backup_swift_auth_url={}", swift::settings(&url, container).auth_url),
        format!("backup_swift_container={container}"),
        format!("backup_swift_user={user}"),
        format!("backup_swift_key={key}"),
        format!("backup_swift_object_size={OBJECT_BYTES}"),
    ];
    Cinder::start("cinder.backup.drivers.swift.SwiftBackupDriver", &options)
}

fn engine(bench: &Bench, compression: Compression, object_bytes: usize) -> Engine {
    bench.engine(Settings {
        compression,
        compression_level: 3,
        object_bytes,
        sha_block_bytes: 32 << 10,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    })
}

/// Takes in a backup that Cinder made.
async fn import(engine: &Engine, cinder: &mut Cinder, id: BackupId) -> Record {
    let export = cinder.ask("export_record", json!({ "backup_id": id }));
    let record = export_record::import(export.to_string().as_bytes(), &Form::Buckets).unwrap();
    engine.import(record).await.unwrap()
}

/// Makes a backup of ours and gives it to Cinder.
async fn back_up(
    engine: &Engine,
    cinder: &mut Cinder,
    volume_id: VolumeId,
    volume: &Volume,
    parent: Parent,
) -> Record {
    let mut job = backup_job(volume_id, &volume.path, parent);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    let volume_meta = cinder.ask("volume_meta", json!({ "volume_id": volume_id }));
    work.volume_meta = Some(volume_meta.as_str().unwrap().into());
    run(engine, &job).await.unwrap();
    let record = engine.catalog().record(job.backup_id()).await.unwrap().unwrap();
    cinder.import(&record);
    record
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_made_by_turns_is_restored_and_deleted_by_both(
    #[values(
        (Kind::S3, "none"),
        (Kind::S3, "zlib"),
        (Kind::S3, "gzip"),
        (Kind::S3, "bz2"),
        (Kind::S3, "bzip2"),
        (Kind::S3, "zstd"),
        (Kind::Encrypted, "zstd"),
        (Kind::Swift, "none"),
        (Kind::Swift, "zlib"),
        (Kind::Swift, "gzip"),
        (Kind::Swift, "bz2"),
        (Kind::Swift, "bzip2"),
        (Kind::Swift, "zstd"),
        (Kind::Gateway, "zstd"),
        (Kind::Gcs, "none"),
        (Kind::Gcs, "zlib"),
        (Kind::Gcs, "bz2"),
        (Kind::Gcs, "zstd")
    )]
    on: (Kind, &str),
    #[values([Maker::Us, Maker::Cinder, Maker::Us], [Maker::Cinder, Maker::Us, Maker::Cinder])] makers: [Maker;
        3],
) {
    let (kind, word) = on;
    let bench = Bench::new(kind);
    // Objects of another size than Cinder's.
    let engine = engine(&bench, word.parse().unwrap(), 2 * OBJECT_BYTES);
    let container: Container = bench.bucket().parse().unwrap();
    let tokens = Tokens::start(3600);
    let mut cinder = cinder(kind, bench.bucket(), &tokens);
    cinder.ask("set", json!({ "backup_compression_algorithm": word }));
    let volume_id = VolumeId::random();
    cinder.add_volume(volume_id, 1);
    let mut volume = Volume::create(bench.volumes().join("volume"), 5 * MIB + 5000);
    volume.fill(0..MIB, Fill::Noise(1));
    volume.fill(MIB..2 * MIB, Fill::Text(2));
    volume.fill(2 * MIB..3 * MIB, Fill::Zeros);
    volume.fill(4 * MIB..5 * MIB + 5000, Fill::Text(3));

    let mut chain: Vec<(BackupId, Vec<u8>)> = Vec::new();
    for (step, maker) in makers.into_iter().enumerate() {
        if step > 0 {
            let at = step * 1_500_000;
            volume.fill(at..at + 100_000, Fill::Noise(20 + step as u64));
            volume.fill(at + 100_000..at + 200_000, Fill::Zeros);
            volume.fill(5 * MIB + 4000..5 * MIB + 5000, Fill::Noise(step as u64));
        }
        let parent = chain.last().map(|(id, _)| *id);
        let id = match maker {
            Maker::Us => {
                let parent = parent.map_or(Parent::None, Parent::Given);
                back_up(&engine, &mut cinder, volume_id, &volume, parent).await.backup_id
            }
            Maker::Cinder => {
                let path = volume.path.to_str().unwrap();
                let id = cinder.backup(volume_id, Of::File(path), parent).unwrap();
                import(&engine, &mut cinder, id).await;
                id
            }
        };
        let record = engine.catalog().record(id).await.unwrap().unwrap();
        assert_eq!(record.parent_id, parent, "{step}");
        chain.push((id, volume.bytes.clone()));
    }

    for (step, (id, bytes)) in chain.iter().enumerate() {
        let target = bench.volumes().join(format!("by-us-{step}"));
        // To a new file, and then over what another volume has left there.
        for seed in [None, Some(7)] {
            if let Some(seed) = seed {
                junk(&target, bytes.len(), seed);
            }
            restore(&engine, *id, &target).await.unwrap();
            assert!(fs::read(&target).unwrap() == *bytes, "{step} restored by us, over: {seed:?}");
        }
        verify(&engine, *id).await.unwrap();
        let kept: Value = serde_json::from_str(&engine.volume_meta(*id).await.unwrap().unwrap()).unwrap();
        assert_eq!(kept["volume-base-metadata"]["display_name"], "data", "{step}: {kept}");
        assert_eq!(kept["volume-metadata"], json!({ "color": "blue" }), "{step}: {kept}");
        for new in [true, false] {
            let target = bench.volumes().join(format!("by-cinder-{step}-{new}"));
            let file = File::create(&target).unwrap();
            file.set_len(bytes.len() as u64).unwrap();
            if !new {
                fs::write(&target, vec![0xaa; bytes.len()]).unwrap();
            }
            cinder.restore_file(*id, volume_id, &target, new);
            assert!(fs::read(&target).unwrap() == *bytes, "{step} restored by Cinder, new: {new}");
        }
    }
    let (newest, bytes) = chain.last().unwrap();
    let (target, new_volume) = (bench.volumes().join("by-cinder-with-its-name"), VolumeId::random());
    File::create(&target).unwrap().set_len(bytes.len() as u64).unwrap();
    cinder.add_volume(new_volume, 1);
    cinder.ask("change_volume", json!({ "volume_id": new_volume, "display_name": "", "metadata": {} }));
    cinder.restore_file(*newest, new_volume, &target, true);
    let shown = cinder.ask("show_volume", json!({ "volume_id": new_volume }));
    assert_eq!(shown, json!({ "display_name": "data", "metadata": { "color": "blue" } }));

    // Each is deleted by who did not make it, the newest first.
    for ((id, _), maker) in chain.iter().zip(makers).rev() {
        match maker {
            Maker::Us => {
                cinder.delete(*id);
                let listed = bench.store().list(&Folder::from(&container), "").await.unwrap();
                let left = listed.iter().find(|object| object.name.contains(&id.to_string()));
                assert_eq!(left, None, "Cinder has left this");
                delete(&engine, *id).await.unwrap();
            }
            Maker::Cinder => drop(delete(&engine, *id).await.unwrap()),
        }
    }
    assert_eq!(bench.everything([&container]).await, BTreeSet::new());
}
