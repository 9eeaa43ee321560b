//! Backhaul and OpenStack Cinder 29 on one real cluster: either restores, goes on from and deletes what the other made.
//!
//! Cinder's driver is the real one. What a volume held is known here, and is not asked of either.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::ceph::{Ceph, Image};
use crate::support::cinder::{Cinder, Of};
use crate::support::content::Content;
use crate::support::engine::{MEMORY_BYTES, backup_job_of, cancel, delete, job, verify};
use backhaul::ceph::{Access, Clusters};
use backhaul::cinder::export_record::{self, Form};
use backhaul::engine::chunked::Budget;
use backhaul::engine::rbd::{CHECKPOINT_BYTES, Rbd, SERVICE, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt, Volumes};
use backhaul::job::{BackupId, Context, Job, Location, Parent, Record, RestoreWork, VolumeId, Work};
use backhaul::runner::plan;
use backhaul::store::Memory;
use backhaul::volume::FileRoots;
use rstest::rstest;
use serde_json::{Value, json};
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
    memory: Budget,
    folder: TempDir,
}

impl Stage {
    fn new() -> (Self, Cinder) {
        let ceph = Ceph::shared();
        let access = Access { conf: ceph.conf().into(), user: "cinder".into(), operation_seconds_max: 60 };
        let clusters = Clusters::new(BTreeMap::from([("main".into(), access)]));
        let folder = tempfile::tempdir().unwrap();
        let memory = Budget::new(MEMORY_BYTES);
        let rbd = Rbd::new(
            Arc::new(Memory::default()),
            clusters.clone(),
            Settings {
                cluster: Some("main".into()),
                pool: POOL.into(),
                source_snapshots_max: 0,
                journaling: false,
                stripes: None,
                checkpoint_bytes: CHECKPOINT_BYTES,
            },
            Cpu::start(2).unwrap(),
            memory.clone(),
        );
        let file_roots = FileRoots::new(&[folder.path().to_owned()]);
        let options = [
            format!("backup_ceph_conf={}", ceph.conf().display()),
            "backup_ceph_user=cinder".into(),
            format!("backup_ceph_pool={POOL}"),
        ];
        let cinder = Cinder::start(SERVICE, &options);
        (Self { engine: Engine::new(rbd, Volumes { file_roots, clusters }), ceph, memory, folder }, cinder)
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

    /// Makes a backup by the first method of the plan, with what Cinder would keep about the volume, and tells Cinder.
    async fn back_up(
        &self,
        cinder: &mut Cinder,
        volume_id: VolumeId,
        source: Location,
        parent: Parent,
    ) -> Record {
        let mut job = backup_job_of(volume_id, source, parent);
        let Work::Backup(work) = &mut job.work else { unreachable!() };
        let volume_meta = cinder.ask("volume_meta", json!({ "volume_id": volume_id }));
        work.volume_meta = Some(volume_meta.as_str().unwrap().into());
        self.run(&job).await.unwrap();
        let record = self.record(job.backup_id()).await;
        cinder.import(&record);
        record
    }

    /// Makes a backup to the end, where it fails; what it left is removed.
    async fn fail_to_back_up(&self, volume_id: VolumeId, source: Location, parent: Parent) -> Error {
        let mut job = backup_job_of(volume_id, source, parent);
        let Work::Backup(work) = &mut job.work else { unreachable!() };
        work.volume_meta = Some("{}".into());
        let held = self.memory.reserve(MEMORY_BYTES).await;
        let (result, ()) = tokio::join!(self.run(&job), async {
            // Sooner, the backup would not be begun.
            while self.engine.catalog().record(job.backup_id()).await.unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // What is there already is not written again.
            self.ceph.rados(&["-p", POOL, "create", &format!("backup.{}.meta", job.backup_id())]);
            drop(held);
        });
        cancel(&self.engine, &job).await;
        result.unwrap_err()
    }

    async fn record(&self, id: BackupId) -> Record {
        self.engine.catalog().record(id).await.unwrap().unwrap()
    }

    async fn run(&self, job: &Job) -> Result<Receipt, Error> {
        let methods = plan(job, &self.engine.strategies(&job.work));
        self.engine.run(&Context::default(), job, methods[0]).await
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

    /// All that lies in the pool of the backups and has one of these ids in its name, of a volume, of a backup or of an
    /// image: images, their snapshots, and objects. The ids of images are added, so that what is left of them is seen
    /// later, too.
    fn in_pool(&self, ids: &mut BTreeSet<String>) -> BTreeSet<String> {
        let of_these = |ids: &BTreeSet<String>, name: &str| ids.iter().any(|id| name.contains(id));
        let mut found = BTreeSet::new();
        for image in self.ceph.rbd(&["ls", POOL]).lines() {
            if !of_these(ids, image) {
                continue;
            }
            let spec = format!("{POOL}/{image}");
            let info: Value =
                serde_json::from_str(&self.ceph.rbd(&["info", "--format", "json", &spec])).unwrap();
            ids.insert(info["id"].as_str().unwrap().into());
            found.extend(self.snapshots(&spec).into_iter().map(|snapshot| format!("{image}@{snapshot}")));
            found.insert(image.into());
        }
        let objects = self.ceph.rados(&["-p", POOL, "ls"]);
        found.extend(objects.lines().filter(|object| of_these(ids, object)).map(ToOwned::to_owned));
        found
    }

    /// Waits until the pool holds just this with these ids; what only a snapshot held goes some time after it.
    async fn settles(&self, ids: &mut BTreeSet<String>, expected: &BTreeSet<String>) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.in_pool(ids) != *expected && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(self.in_pool(ids), *expected);
    }

    fn file(&self, name: &str) -> PathBuf {
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
        cinder.ask("change_volume", json!({ "volume_id": self.id, "size": gib }));
        self.content = self.content.in_bytes(gib * GIB);
        self.write(&[(gib * GIB - 5000, &noise(gib, 5000))]);
    }
}

/// The record of a backup that Cinder made, from its export.
fn exported(cinder: &mut Cinder, id: BackupId) -> Record {
    let export = cinder.ask("export_record", json!({ "backup_id": id }));
    let form = Form::Images { pool: POOL.parse().unwrap() };
    export_record::import(export.to_string().as_bytes(), &form).unwrap()
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

/// Makes a file, most of it a hole, whose size is none that Cinder could say.
fn write_file(path: &Path) -> Content {
    let mut content = Content::zeros(200 * MIB + 512);
    let file = File::create(path).unwrap();
    file.set_len(content.bytes).unwrap();
    for (offset, bytes) in [(0, noise(7, 300_000)), (150 * MIB + 1, noise(8, 100_000))] {
        file.write_all_at(&bytes, offset).unwrap();
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
        let record = stage.back_up(&mut cinder, volume.id, volume.location(), parent).await;
        assert_eq!(record.parent_id.is_some(), step != "full");
        points.push((step, record, volume.content.clone()));
    }
    volume.image.snapshot("noon");
    let noon = location(&format!("{}@noon", volume.image.spec()));
    points.push((
        "of a snapshot",
        stage.back_up(&mut cinder, volume.id, noon, Parent::None).await,
        volume.content.clone(),
    ));
    let other_id = VolumeId::random();
    cinder.add_volume(other_id, 1);
    let content = write_file(&stage.file("volume"));
    let source = Location::File(stage.file("volume"));
    points.push(("of a file", stage.back_up(&mut cinder, other_id, source, Parent::None).await, content));

    for (what, record, content) in &points {
        assert_eq!(record.volume_bytes, content.bytes, "{what}");
        let bytes = content.bytes.next_multiple_of(GIB);
        let restored = stage.restored_by_cinder(&mut cinder, record.backup_id, bytes);
        assert_eq!(restored, content.in_bytes(bytes), "{what}");
    }
    // A grown chain's older points, too, and behind the end there are zeros.
    for (what, record, content) in &points[..2] {
        let restored = stage.restored_by_cinder(&mut cinder, record.backup_id, 3 * GIB);
        assert_eq!(restored, content.in_bytes(3 * GIB), "{what}");
    }
    // Onto the volume itself, which has been written since, with what it was called.
    let this = json!({ "volume_id": volume.id });
    let before = cinder.ask("show_volume", this.clone());
    assert_eq!(before, json!({ "display_name": "data", "metadata": { "color": "blue" } }));
    let changes = json!({ "volume_id": volume.id, "display_name": "", "metadata": { "size": "large" } });
    cinder.ask("change_volume", changes);
    let (_, record, content) = &points[1];
    cinder.restore(record.backup_id, volume.id, volume.image.spec(), false);
    assert_eq!(stage.ceph.content(volume.image.spec()), content.in_bytes(2 * GIB));
    assert_eq!(cinder.ask("show_volume", this), before);
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
    let file = stage.file("volume");
    let content = write_file(&file).in_bytes(GIB);
    let of_file = cinder.backup(other_id, Of::File(file.to_str().unwrap()), None).unwrap();
    points.push(("of a file", of_file, content));
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

/// Who makes a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    Us,
    Cinder,
}

#[rstest]
#[case::begun_by_us([Maker::Us, Maker::Cinder, Maker::Us, Maker::Cinder])]
#[case::begun_by_cinder([Maker::Cinder, Maker::Us, Maker::Cinder, Maker::Us])]
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_made_by_turns_is_restored_and_deleted_by_both(#[case] makers: [Maker; 4]) {
    let (stage, mut cinder) = Stage::new();
    let mut volume = stage.volume(&mut cinder);
    let mut chain: Vec<(BackupId, Content)> = Vec::new();
    for (step, maker) in makers.into_iter().enumerate() {
        match step {
            0 => {}
            2 => volume.grow(&mut cinder, 2),
            step => volume.change(step as u64),
        }
        let parent = chain.last().map(|(id, _)| *id);
        let id = match maker {
            Maker::Us => {
                let parent = parent.map_or(Parent::None, Parent::Given);
                let record = stage.back_up(&mut cinder, volume.id, volume.location(), parent).await;
                record.backup_id
            }
            Maker::Cinder => {
                let id = cinder.backup(volume.id, Of::Image(volume.image.spec()), parent).unwrap();
                stage.import(&mut cinder, id).await;
                id
            }
        };
        assert_eq!(stage.record(id).await.parent_id, parent);
        chain.push((id, volume.content.clone()));
    }
    for (step, (id, content)) in chain.iter().enumerate() {
        let by_us = stage.restored_by_us(*id, content.bytes).await;
        assert_eq!(by_us, *content, "{step} restored by us");
        // Where the chain has grown, Cinder makes a new volume for an older point too small, whoever made it.
        let by_cinder = stage.restored_by_cinder(&mut cinder, *id, 3 * GIB);
        assert_eq!(by_cinder, content.in_bytes(3 * GIB), "{step} restored by Cinder");
    }

    // Each is deleted by who did not make it, the newest first; then by who did, which finds nothing to harm.
    let mut signs = BTreeSet::from([volume.id.to_string()]);
    signs.extend(chain.iter().map(|(id, _)| id.to_string()));
    assert_eq!(stage.in_pool(&mut signs).iter().filter(|name| name.contains('@')).count(), 4);
    while let Some((id, _)) = chain.pop() {
        match makers[chain.len()] {
            Maker::Us => {
                cinder.delete(id);
                delete(&stage.engine, id).await.unwrap();
            }
            Maker::Cinder => {
                delete(&stage.engine, id).await.unwrap();
                cinder.delete(id);
            }
        }
        let left = stage.in_pool(&mut signs);
        assert!(!left.iter().any(|name| name.contains(&format!("backup.{id}."))), "{left:?}");
        if let Some((id, content)) = chain.last() {
            assert_eq!(stage.restored_by_us(*id, content.bytes).await, *content);
            assert_eq!(stage.restored_by_cinder(&mut cinder, *id, 3 * GIB), content.in_bytes(3 * GIB));
        }
    }
    stage.settles(&mut signs, &BTreeSet::new()).await;
    // Cinder never removes any from the volume; we do.
    assert_eq!(stage.snapshots(volume.image.spec()), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_snapshot_that_cinder_took_of_a_volume_goes_with_its_backup_and_no_other_does() {
    let (stage, mut cinder) = Stage::new();
    let mut volume = stage.volume(&mut cinder);
    let full = cinder.backup(volume.id, Of::Image(volume.image.spec()), None).unwrap();
    volume.change(1);
    let second = cinder.backup(volume.id, Of::Image(volume.image.spec()), Some(full)).unwrap();
    volume.change(2);
    let ours = stage.back_up(&mut cinder, volume.id, volume.location(), Parent::None).await.backup_id;
    volume.image.snapshot("noon");
    // One of the same name in another pool, and one that has been looked through when the right one is.
    let name = volume.image.spec().strip_prefix("volumes/").unwrap();
    stage.ceph.rbd(&["create", "--size", "1M", &format!("backups2/{name}")]);
    stage.ceph.existing(&format!("backups2/{name}")).snapshot("noon");
    for id in [full, second] {
        stage.import(&mut cinder, id).await;
    }
    let starts = |of: &[BackupId]| {
        let starts = of.iter().map(|id| format!("backup.{id}.snap.")).chain(["noon".into()]);
        starts.collect::<Vec<String>>()
    };
    let mut left = vec![full, second, ours];
    while left.len() > 1 {
        let names = stage.snapshots(volume.image.spec());
        let pairs = names.iter().zip(starts(&left));
        assert!(pairs.clone().count() == left.len() + 1 && names.len() == left.len() + 1, "{names:?}");
        assert!(pairs.into_iter().all(|(name, start)| name.starts_with(&start)), "{names:?}");
        delete(&stage.engine, left.remove(left.len() - 2)).await.unwrap();
    }
    assert_eq!(stage.snapshots(volume.image.spec()).len(), 2);
    assert_eq!(stage.snapshots(&format!("backups2/{name}")), ["noon"]);
    verify(&stage.engine, ours).await.unwrap();
    stage.remove(&format!("backups2/{name}"));

    // A volume that is gone is no reason to keep its backup.
    let gone = stage.volume(&mut cinder);
    let id = cinder.backup(gone.id, Of::Image(gone.image.spec()), None).unwrap();
    stage.import(&mut cinder, id).await;
    stage.remove(gone.image.spec());
    delete(&stage.engine, id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_copied_as_a_whole_is_deleted_by_the_other() {
    let (stage, mut cinder) = Stage::new();
    let volume = stage.volume(&mut cinder);
    volume.image.snapshot("noon");
    let noon = location(&format!("{}@noon", volume.image.spec()));
    let file = stage.file("volume");
    write_file(&file);
    // Beside each there is another backup of the same volume, which stays.
    let kept = stage.back_up(&mut cinder, volume.id, noon.clone(), Parent::None).await.backup_id;
    let mut signs = BTreeSet::from([volume.id.to_string()]);
    let before = stage.in_pool(&mut signs);

    for of in [Of::File(file.to_str().unwrap()), Of::Snapshot(volume.image.spec())] {
        let id = cinder.backup(volume.id, of, None).unwrap();
        stage.import(&mut cinder, id).await;
        assert_ne!(stage.in_pool(&mut signs), before);
        delete(&stage.engine, id).await.unwrap();
        stage.settles(&mut signs, &before).await;
        cinder.delete(id);
        stage.settles(&mut signs, &before).await;
    }
    for source in [Location::File(file.clone()), noon] {
        let record = stage.back_up(&mut cinder, volume.id, source.clone(), Parent::None).await;
        assert_ne!(stage.in_pool(&mut signs), before);
        cinder.delete(record.backup_id);
        stage.settles(&mut signs, &before).await;
        // It is gone, and told so; then nobody remembers it.
        let error = verify(&stage.engine, record.backup_id).await.unwrap_err();
        assert!(matches!(error, Error::MissingObject { .. }), "{error}");
        delete(&stage.engine, record.backup_id).await.unwrap();
        stage.settles(&mut signs, &before).await;
    }
    verify(&stage.engine, kept).await.unwrap();
    delete(&stage.engine, kept).await.unwrap();
    stage.settles(&mut signs, &BTreeSet::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_backup_of_either_harms_none_of_the_other() {
    let (stage, mut cinder) = Stage::new();
    let mut volume = stage.volume(&mut cinder);
    volume.image.snapshot("noon");
    let noon = location(&format!("{}@noon", volume.image.spec()));
    let at_noon = volume.content.clone();

    // What Cinder loses the data of: a copy of a snapshot, when there is a second one or an incremental one on it.
    let by_cinder = cinder.backup(volume.id, Of::Snapshot(volume.image.spec()), None).unwrap();
    stage.import(&mut cinder, by_cinder).await;
    let by_us = stage.back_up(&mut cinder, volume.id, noon.clone(), Parent::None).await.backup_id;
    for copy in [by_cinder, by_us] {
        let error = stage.fail_to_back_up(volume.id, volume.location(), Parent::Given(copy)).await;
        assert!(matches!(error, Error::ParentUnsuitable { .. }), "{error}");
        let error = stage.fail_to_back_up(volume.id, noon.clone(), Parent::None).await;
        assert!(matches!(error, Error::Ceph(_)), "{error}");
    }
    let error = cinder.backup(volume.id, Of::Image(volume.image.spec()), Some(by_us)).unwrap_err();
    assert!(error.contains("RBD diff op failed"), "{error}");
    for copy in [by_cinder, by_us] {
        assert_eq!(stage.restored_by_us(copy, GIB).await, at_noon);
        assert_eq!(stage.restored_by_cinder(&mut cinder, copy, GIB), at_noon);
    }

    // A failed backup has written to the image of the chain.
    let full = stage.back_up(&mut cinder, volume.id, volume.location(), Parent::None).await;
    volume.change(1);
    let parent = Parent::Given(full.backup_id);
    let error = stage.fail_to_back_up(volume.id, volume.location(), parent).await;
    assert!(matches!(error, Error::Ceph(_)), "{error}");
    volume.change(2);
    let next = cinder.backup(volume.id, Of::Image(volume.image.spec()), Some(full.backup_id)).unwrap();
    assert_eq!(stage.restored_by_cinder(&mut cinder, next, GIB), volume.content);
    stage.import(&mut cinder, next).await;
    assert_eq!(stage.restored_by_us(next, GIB).await, volume.content);
    assert_eq!(stage.restored_by_us(full.backup_id, GIB).await, at_noon);

    // What is gone is not taken in for what is left of the chain.
    let gone = exported(&mut cinder, next);
    delete(&stage.engine, next).await.unwrap();
    let error = stage.engine.import(gone).await.unwrap_err();
    assert!(error.to_string().contains("has no snapshot of it"), "{error}");
}
