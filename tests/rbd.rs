//! The RBD engine on real clusters: what it makes of a volume, restored, is the volume.
#![cfg(feature = "ceph")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use backhaul::ceph::{Access, Clusters};
use backhaul::engine::chunked::Budget;
use backhaul::engine::rbd::{Rbd, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt, Volumes};
use backhaul::error::Class;
use backhaul::job::{
    BackupId, Context, Job, Location, Method, Parent, Record, RestoreWork, Strategy, VolumeId, Work,
};
use backhaul::runner::plan;
use backhaul::store::Memory;
use backhaul::volume::FileRoots;
use support::ceph::{Ceph, Image};
use support::engine::{MEMORY_BYTES, backup_job_of, delete, job, verify};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// An engine on a pool of the shared cluster, with both clusters to take volumes from.
struct Bench {
    main: Ceph,
    other: Ceph,
    engine: Engine,
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with(Settings {
            cluster: Some("main".into()),
            pool: "backups".into(),
            source_snapshots_max: 0,
            journaling: false,
            stripes: None,
        })
    }

    fn with(settings: Settings) -> Self {
        let (main, other) = (Ceph::shared(), Ceph::other());
        let access = |ceph: &Ceph| Access {
            conf: ceph.conf().into(),
            user: "cinder".into(),
            operation_seconds_max: 60,
        };
        let clusters = BTreeMap::from([("main".into(), access(&main)), ("other".into(), access(&other))]);
        let clusters = Clusters::new(clusters);
        let folder = tempfile::tempdir().unwrap();
        let file_roots = FileRoots::new(&[folder.path().to_owned()]);
        let rbd = Rbd::new(
            Arc::new(Memory::default()),
            clusters.clone(),
            settings,
            Cpu::start(2).unwrap(),
            Budget::new(MEMORY_BYTES),
        );
        Self { engine: Engine::new(rbd, Volumes { file_roots, clusters }), main, other, folder }
    }

    /// A volume in the shared cluster, under the name that Cinder gives it.
    fn volume(&self, bytes: u64) -> (VolumeId, Image<'_>) {
        volume(&self.main, bytes)
    }

    /// Backs up by the first method of the plan.
    async fn backup(&self, volume_id: VolumeId, source: &Location, parent: Parent) -> Result<Record, Error> {
        let job = backup_job_of(volume_id, source.clone(), parent);
        self.run(&job).await?;
        Ok(self.record(job.backup_id()).await)
    }

    async fn run(&self, job: &Job) -> Result<Receipt, Error> {
        self.engine.run(&Context::default(), job, self.methods(job)[0]).await
    }

    fn methods(&self, job: &Job) -> Vec<Method> {
        plan(job, &self.engine.strategies(&job.work))
    }

    async fn record(&self, id: BackupId) -> Record {
        self.engine.catalog().record(id).await.unwrap().unwrap()
    }

    async fn restore(&self, backup_id: BackupId, target: &Location) -> Result<Receipt, Error> {
        self.run(&job(Work::Restore(RestoreWork { backup_id, target: target.clone(), volume_id: None })))
            .await
    }

    /// The names of the snapshots of an image.
    fn snapshots(&self, spec: &str) -> Vec<String> {
        let listed: serde_json::Value =
            serde_json::from_str(&self.main.rbd(&["snap", "ls", "--format", "json", spec])).unwrap();
        listed.as_array().unwrap().iter().map(|snap| snap["name"].as_str().unwrap().into()).collect()
    }

    fn images(&self, pool: &str) -> Vec<String> {
        self.main.rbd(&["ls", pool]).lines().map(ToOwned::to_owned).collect()
    }
}

fn volume(ceph: &Ceph, bytes: u64) -> (VolumeId, Image<'_>) {
    let image = ceph.image("volumes", bytes);
    let id = image.spec().strip_prefix("volumes/volume-").unwrap().parse().unwrap();
    (id, image)
}

fn location(cluster: &str, spec: &str) -> Location {
    format!("rbd:{cluster}/{spec}").parse().unwrap()
}

/// Bytes that do not repeat, other ones for another seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

fn base(record: &Record) -> String {
    let metadata: serde_json::Value = serde_json::from_str(&record.service_metadata).unwrap();
    format!("{}/{}", record.container, metadata["base"].as_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_an_rbd_volume_is_made_restored_verified_and_deleted() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 5 << 20)), (33 * MIB + 4096, &noise(2, 70_000))]);
    let first = volume.read();
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    assert_eq!(base(&full), format!("backups/volume-{volume_id}.backup.{}", full.backup_id));
    assert_eq!(full.volume_bytes, 64 * MIB);
    assert!(full.counts.bytes_read <= 12 * MIB, "{:?}", full.counts);
    assert!(full.counts.bytes_stored <= (5 << 20) + 80_000, "{:?}", full.counts);

    volume.write(&[(MIB + 12345, &noise(3, 100_000)), (50 * MIB, &noise(4, 4096))]);
    volume.discard(2 * MIB, MIB);
    volume.discard(32 * MIB, 4 * MIB);
    let second = volume.read();
    let incremental = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    assert_eq!(incremental.parent_id, Some(full.backup_id));
    assert_eq!(base(&incremental), base(&full));
    assert!(incremental.counts.bytes_stored < 120_000, "{:?}", incremental.counts);

    // The same names on both sides, as Cinder has them.
    let snapshots = bench.snapshots(volume.spec());
    assert_eq!(snapshots, bench.snapshots(&base(&full)));
    for (name, record) in snapshots.iter().zip([&full, &incremental]) {
        assert!(name.starts_with(&format!("backup.{}.snap.", record.backup_id)), "{name}");
    }

    for (record, expected) in [(&full, &first), (&incremental, &second)] {
        verify(&bench.engine, record.backup_id).await.unwrap();
        let target = format!("volumes/restored-{}", record.backup_id);
        let receipt = bench.restore(record.backup_id, &location("main", &target)).await.unwrap();
        assert!(receipt.counts.bytes_written <= 6 * MIB, "{:?}", receipt.counts);
        let exported = bench.main.rbd(&["snap", "ls", &target]);
        assert_eq!(exported, "", "a restore leaves no snapshot");
        let file = bench.folder.path().join(record.backup_id.to_string());
        bench.main.rbd(&["export", "--no-progress", &target, file.to_str().unwrap()]);
        assert!(std::fs::read(&file).unwrap() == *expected);
        std::fs::remove_file(&file).unwrap();
        bench.restore(record.backup_id, &Location::File(file.clone())).await.unwrap();
        assert!(std::fs::read(&file).unwrap() == *expected);
    }

    let error = delete(&bench.engine, full.backup_id).await.unwrap_err();
    assert!(matches!(error, Error::HasChildren { .. }), "{error}");
    delete(&bench.engine, incremental.backup_id).await.unwrap();
    assert_eq!(bench.snapshots(&base(&full)).len(), 1);
    verify(&bench.engine, full.backup_id).await.unwrap();
    delete(&bench.engine, full.backup_id).await.unwrap();
    assert_eq!(bench.snapshots(volume.spec()), Vec::<String>::new());
    assert!(!bench.images("backups").iter().any(|image| image.contains(&volume_id.to_string())));
    assert!(bench.engine.catalog().records().await.unwrap().records.is_empty());
}
