//! Backhaul and OpenStack Cinder 29 on one real cluster: either restores, goes on from and deletes what the other made.
//!
//! Cinder's driver is the real one. What a volume held is known here, and is not asked of either.
#![cfg(feature = "ceph")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use backhaul::ceph::{Access, Clusters};
use backhaul::cinder::export_record::ExportRecord;
use backhaul::engine::chunked::Budget;
use backhaul::engine::rbd::{Rbd, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt, Volumes};
use backhaul::job::{
    BackupId, Context, Counts, Job, Location, Method, Mode, Parent, Record, RecordState, RestoreWork,
    Strategy, VolumeId, Work,
};
use backhaul::runner::plan;
use backhaul::store::Memory;
use backhaul::volume::FileRoots;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use rstest::rstest;
use serde_json::{Value, json};
use support::ceph::{Ceph, Image};
use support::cinder::{Cinder, Of};
use support::content::Content;
use support::engine::{MEMORY_BYTES, backup_job_of, delete, job, verify};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Cinder knows whole GiB only.
const GIB: u64 = 1 << 30;
/// Where both keep their backups.
const POOL: &str = "backups";

/// An engine of ours on the shared cluster, and Cinder beside it.
struct Stage {
    ceph: Ceph,
    engine: Engine,
    folder: TempDir,
}

impl Stage {
    fn new() -> (Self, Cinder) {
        let ceph = Ceph::shared();
        let access =
            Access { conf: ceph.conf().into(), user: "cinder".into(), operation_seconds_max: 60 };
        let clusters = Clusters::new(BTreeMap::from([("main".into(), access)]));
        let folder = tempfile::tempdir().unwrap();
        let rbd = Rbd::new(
            Arc::new(Memory::default()),
            clusters.clone(),
            Settings {
                cluster: Some("main".into()),
                pool: POOL.into(),
                source_snapshots_max: 0,
                journaling: false,
                stripes: None,
            },
            Cpu::start(2).unwrap(),
            Budget::new(MEMORY_BYTES),
        );
        let file_roots = FileRoots::new(&[folder.path().to_owned()]);
        let cinder = Cinder::start(&ceph, POOL);
        (Self { engine: Engine::new(rbd, Volumes { file_roots, clusters }), ceph, folder }, cinder)
    }

    /// A volume of 1 GiB that both know, with some data.
    fn volume(&self, cinder: &mut Cinder) -> Volume<'_> {
        let image = self.ceph.image("volumes", GIB);
        let id = image.spec().strip_prefix("volumes/volume-").unwrap().parse().unwrap();
        cinder.add_volume(id, 1);
        let mut volume = Volume { ceph: &self.ceph, id, image, content: Content::zeros(GIB) };
        volume.write(&[(0, &noise(1, 5 << 20)), (GIB - 100_000, &noise(2, 100_000))]);
        volume.write(&[(300 * MIB + 4096, &noise(3, 70_000))]);
        volume
    }

    async fn back_up(&self, volume_id: VolumeId, source: Location, parent: Parent) -> Record {
        self.try_back_up(volume_id, source, parent).await.unwrap()
    }

    /// Backs up by the first method of the plan; what a backup that came to nothing left is removed.
    async fn try_back_up(
        &self,
        volume_id: VolumeId,
        source: Location,
        parent: Parent,
    ) -> Result<Record, Error> {
        let job = backup_job_of(volume_id, source, parent);
        match self.run(&job).await {
            Ok(_) => Ok(self.engine.catalog().record(job.backup_id()).await.unwrap().unwrap()),
            Err(error) => {
                self.engine.abandon(&job, None).await.unwrap();
                Err(error)
            }
        }
    }

    async fn run(&self, job: &Job) -> Result<Receipt, Error> {
        let plan: Vec<Method> = plan(job, &self.engine.strategies(&job.work));
        self.engine.run(&Context::default(), job, plan[0]).await
    }

    /// Takes in a backup that Cinder made.
    async fn import(&self, cinder: &mut Cinder, id: BackupId) -> Record {
        self.engine.import(exported(cinder, id)).await.unwrap()
    }

    /// What an image or file holds after we have restored the backup onto it.
    async fn restored(&self, backup_id: BackupId, target: Location) -> Content {
        let work = RestoreWork { backup_id, target: target.clone(), volume_id: None };
        self.run(&job(Work::Restore(work))).await.unwrap();
        match target {
            Location::File(path) => Content::of_file(&path),
            Location::Rbd(image) => self.ceph.content(&format!("{}/{}", image.pool, image.image)),
        }
    }

    /// What a new image of that size holds after we have restored the backup onto it.
    async fn restored_by_us(&self, backup_id: BackupId, bytes: u64) -> Content {
        let image = self.ceph.image("volumes", bytes);
        let content = self.restored(backup_id, location(image.spec())).await;
        assert_eq!(self.snapshots(image.spec()), Vec::<String>::new());
        self.remove(image.spec());
        content
    }

    /// The same after Cinder has.
    fn restored_by_cinder(&self, cinder: &mut Cinder, backup_id: BackupId, bytes: u64) -> Content {
        let image = self.ceph.image("volumes", bytes);
        let id = image.spec().strip_prefix("volumes/volume-").unwrap().parse().unwrap();
        cinder.add_volume(id, bytes / GIB);
        cinder.restore(backup_id, id, image.spec(), true);
        let content = self.ceph.content(image.spec());
        self.remove(image.spec());
        content
    }

    fn remove(&self, spec: &str) {
        self.ceph.rbd(&["snap", "purge", "--no-progress", spec]);
        self.ceph.rbd(&["rm", "--no-progress", spec]);
    }

    fn snapshots(&self, spec: &str) -> Vec<String> {
        let listed = self.ceph.rbd(&["snap", "ls", "--format", "json", spec]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        listed.as_array().unwrap().iter().map(|snap| snap["name"].as_str().unwrap().into()).collect()
    }

    /// All that lies in the pool of the backups and has to do with the volume or these backups: images with the names
    /// of their snapshots, and objects.
    fn in_pool(&self, volume_id: VolumeId, backups: &[BackupId]) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut signs: Vec<String> = backups.iter().map(ToString::to_string).collect();
        signs.push(volume_id.to_string());
        for image in self.ceph.rbd(&["ls", POOL]).lines() {
            if !signs.iter().any(|sign| image.contains(sign)) {
                continue;
            }
            let spec = format!("{POOL}/{image}");
            let info: Value =
                serde_json::from_str(&self.ceph.rbd(&["info", "--format", "json", &spec])).unwrap();
            signs.push(info["id"].as_str().unwrap().into());
            found.extend(self.snapshots(&spec).into_iter().map(|snapshot| format!("{image}@{snapshot}")));
            found.insert(image.into());
        }
        let objects = self.ceph.objects(POOL).into_iter();
        found.extend(objects.filter(|object| signs.iter().any(|sign| object.contains(sign))));
        found
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
}

/// A volume, and what it holds.
struct Volume<'a> {
    ceph: &'a Ceph,
    id: VolumeId,
    image: Image<'a>,
    content: Content,
}

impl Volume<'_> {
    fn location(&self) -> Location {
        location(self.image.spec())
    }

    fn write(&mut self, extents: &[(u64, &[u8])]) {
        self.image.write(extents);
        for (offset, bytes) in extents {
            self.content.write(*offset, bytes);
        }
    }

    fn discard(&mut self, offset: u64, bytes: u64) {
        self.image.discard(offset, bytes);
        self.content.write(offset, &vec![0; bytes as usize]);
    }

    /// Something of every kind that can happen to a volume between two backups, other bytes for another seed.
    fn change(&mut self, seed: u64) {
        let at = seed * 16 * MIB;
        self.write(&[
            (MIB + 12345, &noise(10 * seed, 100_000)),
            (at + 400 * MIB, &noise(10 * seed + 1, 4096)),
            (2 * MIB, &[0; 50_000]),
        ]);
        self.discard(3 * MIB, MIB);
        self.discard(300 * MIB, 4 * MIB);
        self.write(&[(at + 300 * MIB, &noise(10 * seed + 2, 9000))]);
    }

    fn grow(&mut self, cinder: &mut Cinder, gib: u64) {
        self.ceph.rbd(&["resize", "--no-progress", "--size", &format!("{gib}G"), self.image.spec()]);
        cinder.ask("extend_volume", json!({ "volume_id": self.id, "gib": gib }));
        self.content = self.content.in_bytes(gib * GIB);
        self.write(&[(gib * GIB - 5000, &noise(gib, 5000))]);
    }
}

/// The record of a backup that Cinder made, from its export.
fn exported(cinder: &mut Cinder, id: BackupId) -> Record {
    let export = cinder.ask("export_record", json!({ "backup_id": id }));
    let ExportRecord { backup_service, backup_url } = serde_json::from_value(export).unwrap();
    let fields: Value = serde_json::from_slice(&BASE64_STANDARD.decode(backup_url).unwrap()).unwrap();
    let text = |field: &str| fields[field].as_str().map(ToOwned::to_owned);
    Record {
        backup_id: id,
        volume_id: text("volume_id").unwrap().parse().unwrap(),
        state: RecordState::Available,
        parent_id: text("parent_id").map(|id| id.parse().unwrap()),
        job_id: None,
        service: backup_service,
        service_metadata: text("service_metadata").unwrap_or_default(),
        container: text("container").unwrap().parse().unwrap(),
        name: text("display_name"),
        description: None,
        project_id: text("project_id"),
        created_at: text("created_at").unwrap().parse().unwrap(),
        volume_bytes: 0,
        method: None,
        counts: Counts::default(),
        digest: None,
        object_digests: Vec::new(),
        source: None,
        image_id: None,
        cinder_fields: fields.as_object().unwrap().clone(),
    }
}

fn location(spec: &str) -> Location {
    format!("rbd:main/{spec}").parse().unwrap()
}

/// Bytes that do not repeat, other ones for another seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Makes a file of 1 GiB, most of it a hole.
fn write_file(path: &Path) -> Content {
    let mut content = Content::zeros(GIB);
    let file = std::fs::File::create(path).unwrap();
    file.set_len(GIB).unwrap();
    for (offset, bytes) in [(0, noise(7, 300_000)), (700 * MIB + 1, noise(8, 100_000))] {
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, offset).unwrap();
        content.write(offset, &bytes);
    }
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn cinder_restores_what_backhaul_made() {
    let (stage, mut cinder) = Stage::new();
    let mut volume = stage.volume(&mut cinder);
    let mut points = Vec::new();
    for step in ["full", "incremental", "grown"] {
        match step {
            "incremental" => volume.change(1),
            "grown" => volume.grow(&mut cinder, 2),
            _ => {}
        }
        let parent = if step == "full" { Parent::None } else { Parent::Latest };
        let record = stage.back_up(volume.id, volume.location(), parent).await;
        assert_eq!(record.parent_id.is_some(), step != "full");
        points.push((step, record, volume.content.clone()));
    }
    volume.image.snapshot("noon");
    let noon = location(&format!("{}@noon", volume.image.spec()));
    points.push((
        "of a snapshot",
        stage.back_up(volume.id, noon, Parent::None).await,
        volume.content.clone(),
    ));
    let other_id = VolumeId::random();
    let content = write_file(&stage.file("volume"));
    let source = Location::File(stage.file("volume"));
    points.push(("of a file", stage.back_up(other_id, source, Parent::None).await, content));

    for (what, record, content) in &points {
        cinder.import(record);
        let restored = stage.restored_by_cinder(&mut cinder, record.backup_id, content.bytes);
        assert_eq!(restored, *content, "{what}");
    }
    // A grown chain's older points, too, and behind the end there are zeros.
    for (what, record, content) in &points[..2] {
        let restored = stage.restored_by_cinder(&mut cinder, record.backup_id, 3 * GIB);
        assert_eq!(restored, content.in_bytes(3 * GIB), "{what}");
    }
    // Onto the volume itself, which has been written since.
    let (_, record, content) = &points[1];
    cinder.restore(record.backup_id, volume.id, volume.image.spec(), false);
    assert_eq!(stage.ceph.content(volume.image.spec()), content.in_bytes(2 * GIB));
    stage.remove(volume.image.spec());
}

#[tokio::test(flavor = "multi_thread")]
async fn backhaul_restores_what_cinder_made() {
    let (stage, mut cinder) = Stage::new();
    let mut volume = stage.volume(&mut cinder);
    let mut points = Vec::new();
    let mut parent = None;
    for step in ["full", "incremental", "grown"] {
        match step {
            "incremental" => volume.change(1),
            "grown" => volume.grow(&mut cinder, 2),
            _ => {}
        }
        let id = cinder.backup(volume.id, Of::Image(volume.image.spec()), parent).unwrap();
        parent = Some(id);
        points.push((step, id, volume.content.clone()));
    }
    let other_id = VolumeId::random();
    cinder.add_volume(other_id, 1);
    let content = write_file(&stage.file("volume"));
    let file = stage.file("volume");
    points.push(("of a file", cinder.backup(other_id, Of::File(file.to_str().unwrap()), None).unwrap(), content));
    // Cinder makes a volume of the snapshot first.
    let mut frozen = stage.volume(&mut cinder);
    frozen.write(&[(9 * MIB, b"later")]);
    let of_snapshot = cinder.backup(frozen.id, Of::Snapshot(frozen.image.spec()), None).unwrap();
    points.push(("of a snapshot", of_snapshot, frozen.content.clone()));

    for (what, id, content) in &points {
        let record = stage.import(&mut cinder, *id).await;
        assert_eq!(record.volume_bytes, content.bytes, "{what}");
        // There is nothing to check it with.
        assert_eq!(verify(&stage.engine, *id).await.unwrap().digest, None, "{what}");
        let new = format!("volumes/restored-{id}");
        assert_eq!(stage.restored(*id, location(&new)).await, *content, "{what}");
        stage.remove(&new);
    }
    let (_, first, content) = &points[0];
    let larger = stage.restored_by_us(*first, 3 * GIB).await;
    assert_eq!(larger, content.in_bytes(3 * GIB));
    let (_, second, content) = &points[1];
    let file = Location::File(stage.file("restored"));
    assert_eq!(stage.restored(*second, file).await, *content);
    let onto_itself = stage.restored(*second, volume.location()).await;
    assert_eq!(onto_itself, content.in_bytes(2 * GIB));
}
