//! RBD volumes in chunked stores, on real clusters: what is read of them, and that every point comes back as it was.
//!
//! `PROPTEST_CASES` sets the number of volumes that random things happen to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use backhaul::ceph::{Access, Clusters, Mode as OpenMode};
use backhaul::engine::chunked::{Budget, Chunked, Compression, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt, Volumes};
use backhaul::error::Class;
use backhaul::event::{self, EventSink};
use backhaul::job::{
    BackupId, Completion, Context, Event, Happening, Job, Location, Mode, Outcome, Parent, Record,
    RecordState, RestoreWork, VolumeId, Work,
};
use backhaul::runner::{self, Attempts, Ended, Every, Report, plan};
use backhaul::store::{Memory, ObjectStore};
use backhaul::volume::FileRoots;
use rustix::io::Errno;
use tempfile::TempDir;

use crate::support::ceph::{Ceph, Image};
use crate::support::engine::{COMPRESSIONS, MEMORY_BYTES, backup_job_of, delete, job, overwrite, verify};
use crate::support::faulty::{Fault, Faulty};
use crate::support::volume::{hashes, list_digest, noise, segments};

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
/// An image is made of objects of this size.
const IMAGE_OBJECT_BYTES: u64 = 4 * MIB;
/// Blocks that are read at least, though they should not have changed.
const CHECKED_BLOCKS: u64 = 16;

const SETTINGS: Settings = Settings {
    compression: Compression::Zstd,
    compression_level: 3,
    object_bytes: 1 << 20,
    sha_block_bytes: BLOCK_BYTES as usize,
    unchanged_check_per_mille: 1,
    source_snapshots_max: 1,
};

/// A chunked store, with both clusters to take volumes from.
struct Bench {
    main: Ceph,
    other: Ceph,
    store: Arc<dyn ObjectStore>,
    clusters: Clusters,
    folder: TempDir,
    cpu: Cpu,
}

/// Remembers what it is told.
#[derive(Default)]
struct Recorder(Mutex<Vec<Event>>);

#[async_trait]
impl EventSink for Recorder {
    async fn send(&self, event: &Event) -> Result<(), event::Error> {
        self.0.lock().unwrap().push(event.clone());
        Ok(())
    }
}

impl Bench {
    fn new() -> Self {
        let (main, other) = (Ceph::shared(), Ceph::other());
        let access = |ceph: &Ceph| Access {
            conf: ceph.conf().into(),
            user: "cinder".into(),
            operation_seconds_max: 60,
        };
        let clusters = BTreeMap::from([("main".into(), access(&main)), ("other".into(), access(&other))]);
        let clusters = Clusters::new(clusters);
        let (store, folder) = (Arc::new(Memory::default()), tempfile::tempdir().unwrap());
        Self { main, other, store, clusters, folder, cpu: Cpu::start(2).unwrap() }
    }

    fn engine(&self, settings: Settings) -> Engine {
        self.engine_on(self.store.clone(), settings)
    }

    fn engine_on(&self, store: Arc<dyn ObjectStore>, settings: Settings) -> Engine {
        let file_roots = FileRoots::new(&[self.folder.path().to_owned()]);
        let volumes = Volumes { file_roots, clusters: self.clusters.clone() };
        Engine::new(Chunked::new(store, settings, self.cpu.clone(), Budget::new(MEMORY_BYTES)), volumes)
    }

    /// Backs up by the first method of the plan.
    async fn backup(&self, settings: Settings, volume: &Volume<'_>, parent: Parent) -> Result<Record, Error> {
        let (engine, job) = (self.engine(settings), volume.job(parent));
        run(&engine, &job).await?;
        Ok(engine.catalog().record(job.backup_id()).await?.unwrap())
    }

    async fn restore(&self, backup_id: BackupId, target: &Location) -> Result<Receipt, Error> {
        let work = RestoreWork { backup_id, target: target.clone(), volume_id: None };
        run(&self.engine(SETTINGS), &job(Work::Restore(work))).await
    }

    /// Restores into a new file, and reads that.
    async fn restored(&self, id: BackupId) -> Vec<u8> {
        let file = self.folder.path().join(format!("restored-{id}"));
        self.restore(id, &Location::File(file.clone())).await.unwrap();
        let bytes = fs::read(&file).unwrap();
        fs::remove_file(file).unwrap();
        bytes
    }

    async fn record(&self, id: BackupId) -> Record {
        self.engine(SETTINGS).catalog().record(id).await.unwrap().unwrap()
    }

    /// A volume in the shared cluster, filled from its start.
    fn volume(&self, bytes: u64, filled: u64) -> Volume<'_> {
        Volume::new(&self.main, "main", bytes, filled)
    }
}

/// An image, and the bytes that it must have.
struct Volume<'a> {
    ceph: &'a Ceph,
    image: Image<'a>,
    id: VolumeId,
    source: Location,
    bytes: Vec<u8>,
}

impl<'a> Volume<'a> {
    fn new(ceph: &'a Ceph, cluster: &str, bytes: u64, filled: u64) -> Self {
        let image = ceph.image("volumes", bytes);
        let id = image.spec().strip_prefix("volumes/volume-").unwrap().parse().unwrap();
        let source = location(cluster, image.spec());
        let mut volume = Self { ceph, image, id, source, bytes: vec![0; bytes as usize] };
        if filled > 0 {
            volume.write(&[(0, filled, 1)]);
        }
        volume
    }

    fn job(&self, parent: Parent) -> Job {
        backup_job_of(self.id, self.source.clone(), parent)
    }

    /// Writes noise of a seed at an offset, so many bytes; zeros for the seed 0.
    fn write(&mut self, extents: &[(u64, u64, u64)]) {
        for (offset, length, seed) in extents {
            let bytes = &mut self.bytes[*offset as usize..(offset + length) as usize];
            if *seed == 0 { bytes.fill(0) } else { noise(bytes, *seed) }
        }
        let extents: Vec<_> = extents
            .iter()
            .map(|(offset, length, _)| (*offset, &self.bytes[*offset as usize..(offset + length) as usize]))
            .collect();
        self.image.write(&extents);
    }

    fn discard(&mut self, offset: u64, length: u64) {
        self.bytes[offset as usize..(offset + length) as usize].fill(0);
        self.image.discard(offset, length);
    }

    fn grow(&mut self, bytes: u64) {
        self.rbd(&["resize", "--no-progress", "--size", &format!("{bytes}B"), self.image.spec()]);
        self.bytes.resize(bytes as usize, 0);
    }

    fn rbd(&self, arguments: &[&str]) -> String {
        self.ceph.rbd(arguments)
    }

    /// The names and ids of its snapshots.
    fn snapshots(&self) -> Vec<(String, u64)> {
        let listed = self.rbd(&["snap", "ls", "--format", "json", self.image.spec()]);
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
        let snapshot = |snapshot: &serde_json::Value| {
            (snapshot["name"].as_str().unwrap().into(), snapshot["id"].as_u64().unwrap())
        };
        listed.as_array().unwrap().iter().map(snapshot).collect()
    }

    /// The backups that it has a snapshot of.
    fn backups(&self) -> BTreeSet<BackupId> {
        let backup = |(name, _): (String, u64)| {
            name.strip_prefix("backup.")?.split_once(".snap.").map(|(id, _)| id.parse().unwrap())
        };
        self.snapshots().into_iter().filter_map(backup).collect()
    }

    fn remove_snapshot(&self, name: &str) {
        self.rbd(&["snap", "rm", "--no-progress", &format!("{}@{name}", self.image.spec())]);
    }

    /// The digest of all of it.
    fn digest(&self) -> Option<String> {
        Some(list_digest(&hashes(&self.bytes, BLOCK_BYTES as usize)))
    }
}

fn location(cluster: &str, spec: &str) -> Location {
    format!("rbd:{cluster}/{spec}").parse().unwrap()
}

/// The name of the snapshot that a backup was made of.
fn snapshot_of(record: &Record) -> String {
    record.source.as_ref().unwrap().image.snapshot.clone().unwrap()
}

/// Does the job by the first method of its plan.
async fn run(engine: &Engine, job: &Job) -> Result<Receipt, Error> {
    engine.run(&Context::default(), job, plan(job, &engine.strategies(&job.work))[0]).await
}

/// Runs the job to its end, as a worker does.
async fn complete(ctx: &Context, engine: &Engine, job: &Job) -> (Completion, Vec<Event>) {
    let (sink, attempts) = (Recorder::default(), Attempts::one());
    let report = Report::new(&sink, job);
    match runner::run(ctx, engine, job, &attempts, Every::telling(Duration::from_secs(60)), &report).await {
        Ended::Over(completion) => (*completion, sink.0.into_inner().unwrap()),
        ended => panic!("{ended:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_has_changed_is_read_and_some_of_the_rest() {
    let bench = Bench::new();
    let mut volume = bench.volume(64 * MIB + 512, 40 * MIB);
    volume.write(&[(64 * MIB - 100, 612, 2)]);
    let full = bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
    assert_eq!(full.counts.bytes_read, 44 * MIB + 512);
    assert_eq!(full.counts.bytes_hole, 20 * MIB);

    // Three blocks in places that held something, one of them the volume's last; an object that is given back.
    volume.write(&[(MIB + 5000, 10, 3), (33 * MIB - 1, 2, 4), (64 * MIB + 511, 1, 5)]);
    volume.discard(8 * MIB, IMAGE_OBJECT_BYTES);
    let changed = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
    let read = changed.counts.bytes_read - CHECKED_BLOCKS * BLOCK_BYTES;
    assert!((3 * BLOCK_BYTES + 512..=8 * BLOCK_BYTES).contains(&read), "{:?}", changed.counts);
    let unchanged = volume.bytes.len() as u64 - IMAGE_OBJECT_BYTES - 3 * BLOCK_BYTES - 512;
    // The object that was given back is a hole now, and was data before.
    let holes = changed.counts.bytes_hole;
    assert_eq!(
        changed.counts.bytes_unchanged,
        unchanged - (holes - IMAGE_OBJECT_BYTES),
        "{:?}",
        changed.counts
    );

    let same = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
    assert!(same.counts.bytes_read <= CHECKED_BLOCKS * BLOCK_BYTES, "{:?}", same.counts);
    assert!(same.counts.bytes_read > (CHECKED_BLOCKS - 1) * BLOCK_BYTES, "{:?}", same.counts);
    let not_new = same.counts.bytes_unchanged + same.counts.bytes_hole;
    assert_eq!((not_new, same.counts.object_count), (volume.bytes.len() as u64, 0));

    let half = Settings { unchanged_check_per_mille: 500, ..SETTINGS };
    let half = bench.backup(half, &volume, Parent::Latest).await.unwrap();
    assert!(half.counts.bytes_read.abs_diff(20 * MIB) <= BLOCK_BYTES, "{:?}", half.counts);
    let all = Settings { unchanged_check_per_mille: 1000, ..SETTINGS };
    let all = bench.backup(all, &volume, Parent::Latest).await.unwrap();
    assert_eq!(all.counts.bytes_read, 40 * MIB + 512);

    for record in [&changed, &same, &half, &all] {
        assert_eq!(record.digest, volume.digest());
        assert!(bench.restored(record.backup_id).await == volume.bytes);
    }
    assert_eq!(volume.backups(), BTreeSet::from([all.backup_id]));
}

/// Why all of the volume is read.
#[derive(Debug, Clone, Copy)]
enum Unusable {
    SnapshotGone,
    OtherSnapshot,
    OtherImage,
    InvalidMap,
    ParentOfAFile,
    SnapshotNamed,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_cannot_be_compared_with_leads_to_reading_everything() {
    for case in [
        Unusable::SnapshotGone,
        Unusable::OtherSnapshot,
        Unusable::OtherImage,
        Unusable::InvalidMap,
        Unusable::ParentOfAFile,
        Unusable::SnapshotNamed,
    ] {
        let bench = Bench::new();
        let mut volume = bench.volume(12 * MIB, 9 * MIB);
        let first = volume.bytes.clone();
        let mut parent = bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
        let (spec, snapshot) = (volume.image.spec().to_owned(), snapshot_of(&parent));
        let mut written = 9 * MIB;
        match case {
            Unusable::SnapshotGone => volume.remove_snapshot(&snapshot),
            Unusable::OtherSnapshot => {
                volume.remove_snapshot(&snapshot);
                volume.write(&[(5 * MIB, 100, 2)]);
                volume.image.snapshot(&snapshot);
            }
            Unusable::OtherImage => {
                volume.remove_snapshot(&snapshot);
                volume.rbd(&["rm", "--no-progress", &spec]);
                volume.rbd(&["create", "--size", &format!("{}B", 12 * MIB), &spec]);
                volume.bytes.fill(0);
                volume.write(&[(3 * MIB, 5 * MIB, 3)]);
                volume.image.snapshot(&snapshot);
                written = 5 * MIB;
            }
            Unusable::InvalidMap => {
                volume.rbd(&["feature", "disable", &spec, "fast-diff", "object-map"]);
                volume.rbd(&["feature", "enable", &spec, "object-map", "fast-diff"]);
            }
            Unusable::ParentOfAFile => {
                let file = bench.folder.path().join("volume");
                fs::write(&file, &volume.bytes).unwrap();
                let (engine, job) = (bench.engine(SETTINGS), volume.job(Parent::None));
                let Job { work: Work::Backup(mut work), .. } = job else { panic!() };
                work.source = Location::File(file);
                run(&engine, &crate::support::engine::job(Work::Backup(work.clone()))).await.unwrap();
                parent = bench.record(work.backup_id).await;
            }
            Unusable::SnapshotNamed => {
                volume.image.snapshot("by hand");
                volume.source = location("main", &format!("{spec}@by hand"));
            }
        }
        if !matches!(case, Unusable::SnapshotNamed) {
            volume.write(&[(7 * MIB, 10_000, 4)]);
        }

        let made = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();

        assert_eq!(made.parent_id, Some(parent.backup_id), "{case:?}");
        assert_eq!(made.method.unwrap().mode, Some(Mode::Incremental), "{case:?}");
        assert!(made.counts.bytes_read >= written, "{case:?}: {:?}", made.counts);
        assert_eq!(made.digest, volume.digest(), "{case:?}");
        assert!(bench.restored(made.backup_id).await == volume.bytes, "{case:?}");
        assert!(bench.restored(parent.backup_id).await == first, "{case:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_has_grown_is_backed_up_in_full_and_then_by_its_changes() {
    let bench = Bench::new();
    let mut volume = bench.volume(9 * MIB, 9 * MIB);
    bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
    volume.grow(13 * MIB + 100);
    volume.write(&[(12 * MIB, MIB, 2)]);

    let (engine, job) = (bench.engine(SETTINGS), volume.job(Parent::Latest));
    let (completion, _) = complete(&Context::default(), &engine, &job).await;

    assert_eq!(completion.outcome, Outcome::Succeeded);
    let reason = completion.account.fallback_reason.unwrap().to_string();
    assert!(reason.contains(&(9 * MIB).to_string()), "{reason}");
    assert!(bench.restored(job.backup_id()).await == volume.bytes);
    volume.write(&[(13 * MIB + 50, 10, 3)]);
    let next = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
    assert!(next.counts.bytes_read <= (CHECKED_BLOCKS + 2) * BLOCK_BYTES, "{:?}", next.counts);
    assert!(bench.restored(next.backup_id).await == volume.bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_compared_through_what_it_was_cloned_from() {
    let bench = Bench::new();
    let original = bench.volume(16 * MIB, 10 * MIB);
    original.image.snapshot("golden");
    original.rbd(&["snap", "protect", &format!("{}@golden", original.image.spec())]);
    let mut volume = bench.volume(16 * MIB, 0);
    let spec = volume.image.spec().to_owned();
    volume.rbd(&["rm", "--no-progress", &spec]);
    volume.rbd(&["clone", &format!("{}@golden", original.image.spec()), &spec]);
    volume.bytes = original.bytes.clone();

    let full = bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
    assert!(bench.restored(full.backup_id).await == volume.bytes);
    volume.write(&[(MIB, 5000, 2), (13 * MIB, 5000, 3)]);
    volume.discard(4 * MIB, IMAGE_OBJECT_BYTES);
    let changed = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
    assert!(changed.counts.bytes_read < 9 * MIB, "{:?}", changed.counts);
    assert!(bench.restored(changed.backup_id).await == volume.bytes);
    volume.rbd(&["flatten", "--no-progress", &spec]);
    volume.write(&[(9 * MIB, 10, 4)]);
    let flat = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
    assert!(bench.restored(flat.backup_id).await == volume.bytes);
}

/// What the diff does not tell.
#[derive(Debug, Clone, Copy)]
enum Unseen {
    Write,
    Discard,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diff_that_leaves_something_out_is_found_out_and_the_backup_is_a_full_one() {
    for (unseen, unchanged_check_per_mille) in [(Unseen::Write, 1000), (Unseen::Discard, 0)] {
        let bench = Bench::new();
        let settings = Settings { unchanged_check_per_mille, ..SETTINGS };
        let mut volume = bench.volume(16 * MIB, 16 * MIB);
        let parent = bench.backup(settings, &volume, Parent::None).await.unwrap();
        let at = match unseen {
            Unseen::Write => {
                volume.write(&[(5 * MIB + 17, 1, 2)]);
                5 * MIB
            }
            Unseen::Discard => {
                volume.discard(8 * MIB, IMAGE_OBJECT_BYTES);
                8 * MIB
            }
        };
        // The record says that the parent was made of a later snapshot than it was: what lies between is left out.
        volume.image.snapshot("later");
        let id = volume.snapshots().into_iter().find(|(name, _)| name == "later").unwrap().1;
        let mut lying = parent.clone();
        let source = lying.source.as_mut().unwrap();
        (source.image.snapshot, source.snapshot_id) = (Some("later".into()), Some(id));
        let engine = bench.engine(settings);
        overwrite(&engine, &lying).await;
        volume.write(&[(MIB, 10_000, 3)]);

        let job = volume.job(Parent::Latest);
        let error = run(&engine, &job).await.unwrap_err();
        assert_eq!(error.class(), Class::Unsuitable);
        assert!(
            matches!(&error, Error::UnseenChange { parent_id, image, offset }
                if *parent_id == parent.backup_id && *offset == at
                    && *image == format!("main/{}", volume.image.spec())),
            "{unseen:?}: {error:?}"
        );
        let (completion, events) = complete(&Context::default(), &engine, &job).await;

        assert_eq!(completion.outcome, Outcome::Succeeded);
        let told = events.iter().find_map(|event| match &event.happening {
            Happening::FellBack { from, to, reason } => Some((from.mode, to.mode, reason.to_string())),
            _ => None,
        });
        let (from, to, reason) = told.unwrap();
        assert_eq!((from, to), (Some(Mode::Incremental), Some(Mode::Full)));
        for part in [volume.image.spec(), &at.to_string(), &parent.backup_id.to_string()] {
            assert!(reason.contains(part), "{reason}");
        }
        let made = bench.record(job.backup_id()).await;
        assert_eq!((made.parent_id, &made.digest), (None, &volume.digest()));
        assert_eq!(completion.account.fallback_reason.unwrap().to_string(), reason);
        verify(&engine, made.backup_id).await.unwrap();
        assert!(bench.restored(made.backup_id).await == volume.bytes);
        // Of the attempt that was given up there is nothing left.
        assert!(volume.backups().contains(&made.backup_id));
        assert!(volume.backups().len() <= 2, "{:?}", volume.snapshots());
        let objects = bench.store.list(&(&made.container).into(), "").await.unwrap().len() as u64;
        assert_eq!(objects, made.counts.object_count + 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_digests_of_the_parent_are_not_taken_for_an_unseen_change() {
    let bench = Bench::new();
    let settings = Settings { unchanged_check_per_mille: 1000, ..SETTINGS };
    let volume = bench.volume(8 * MIB, 8 * MIB);
    let parent = bench.backup(settings, &volume, Parent::None).await.unwrap();
    let path = format!("{}/{}_sha256file", parent.container, parent.service_metadata);
    let object = crate::support::engine::object_at(&path);
    let text = bench.store.get(&object).await.unwrap().collect(&object, 1 << 20).await.unwrap();
    let digest = hex::encode(hashes(&volume.bytes, BLOCK_BYTES as usize)[700]);
    let text = String::from_utf8(text.to_vec()).unwrap().replace(&digest, &"5a".repeat(32));
    bench.store.replace(&object, text.into()).await.unwrap();

    let error = bench.backup(settings, &volume, Parent::Latest).await.unwrap_err();

    assert!(matches!(&error, Error::Damaged { object, .. } if object.contains("sha256file")), "{error:?}");
    assert_eq!(error.class(), Class::Permanent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_keeps_no_more_snapshots_than_it_may_and_only_those_of_its_backups_go() {
    let bench = Bench::new();
    let mut volume = bench.volume(8 * MIB, 5 * MIB);
    volume.image.snapshot("by hand");
    // Of a backup in another store, and of one that is still being made.
    let elsewhere = bench.engine_on(Arc::new(Memory::default()), SETTINGS);
    let other = volume.job(Parent::None);
    run(&elsewhere, &other).await.unwrap();
    let making = bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
    let state = RecordState::Creating(backhaul::job::JobId::random());
    overwrite(&bench.engine(SETTINGS), &Record { state, ..making.clone() }).await;
    let mut kept = BTreeSet::from([other.backup_id(), making.backup_id]);
    assert_eq!(volume.backups(), kept);

    let mut made = Vec::new();
    for (source_snapshots_max, expected) in [(0, 1), (0, 2), (2, 2), (2, 2), (0, 3), (1, 1)] {
        volume.write(&[(MIB, 100, 2 + made.len() as u64)]);
        let settings = Settings { source_snapshots_max, ..SETTINGS };
        let parent = if made.is_empty() { Parent::None } else { Parent::Latest };
        made.push(bench.backup(settings, &volume, parent).await.unwrap().backup_id);
        let newest = made[made.len() - expected..].iter().copied();
        assert_eq!(volume.backups(), kept.iter().copied().chain(newest).collect(), "{}", made.len());
    }
    let engine = bench.engine(SETTINGS);
    for id in made.into_iter().rev() {
        delete(&engine, id).await.unwrap();
    }
    delete(&engine, making.backup_id).await.unwrap();
    kept.remove(&making.backup_id);
    assert_eq!(volume.backups(), kept);
    delete(&elsewhere, other.backup_id()).await.unwrap();
    assert_eq!(volume.snapshots().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_does_not_wait_for_an_older_snapshot_that_cannot_go() {
    let bench = Bench::new();
    let mut volume = bench.volume(6 * MIB, MIB);
    let first = bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
    let protected = format!("{}@{}", volume.image.spec(), snapshot_of(&first));
    volume.rbd(&["snap", "protect", &protected]);
    for seed in 2..4 {
        volume.write(&[(MIB, 10_000, seed)]);
        let began = Instant::now();
        let newest = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
        // A delete waits for 40 s.
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        assert_eq!(volume.backups(), BTreeSet::from([first.backup_id, newest.backup_id]));
    }
    volume.rbd(&["snap", "unprotect", &protected]);
    let last = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
    assert_eq!(volume.backups(), BTreeSet::from([last.backup_id]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_comes_to_nothing_leaves_no_snapshot_and_one_that_is_run_again_leaves_one() {
    let mut at = 1;
    loop {
        let token = Context::default().cancel;
        let mut broke = false;
        for fault in [Fault::Cancel(token.clone()), Fault::Refused(Errno::IO), Fault::Death] {
            // A store and a volume of its own: the calls must not become more with each backup that is there.
            let bench = Bench::new();
            let healthy = bench.engine(SETTINGS);
            let mut volume = bench.volume(6 * MIB, 3 * MIB);
            bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
            volume.write(&[(MIB, 10_000, 2), (5 * MIB, 10_000, 3)]);
            let told = format!("{fault:?} at call {at}");
            let (dies, cancels) = (matches!(fault, Fault::Death), matches!(fault, Fault::Cancel(_)));
            let cancel = if matches!(fault, Fault::Cancel(_)) { token.clone() } else { Default::default() };
            let ctx = Context { cancel, ..Context::default() };
            let faulty = Faulty::new(bench.store.clone(), at, fault);
            let engine = bench.engine_on(Arc::new(faulty.clone()), SETTINGS);
            let job = volume.job(Parent::Latest);
            let completion = tokio::select! {
                (completion, _) = complete(&ctx, &engine, &job) => Some(completion),
                () = faulty.died() => None,
            };
            broke |= faulty.calls() >= at;
            let record = healthy.catalog().record(job.backup_id()).await.unwrap();
            let done = record.is_some_and(|record| record.state == RecordState::Available);
            let completion = match completion {
                Some(completion) => completion,
                // The message is handed out again, to a worker that lives.
                None => complete(&Context::default(), &healthy, &job).await.0,
            };
            assert!(!dies || completion.outcome == Outcome::Succeeded, "{told}: {completion:?}");
            if completion.outcome == Outcome::Succeeded {
                assert!(bench.restored(job.backup_id()).await == volume.bytes, "{told}");
            }
            let newest = healthy.catalog().latest(volume.id, BackupId::random()).await.unwrap().unwrap();
            let left = volume.backups();
            let exactly = left == BTreeSet::from([newest.backup_id]);
            // What a backup that is done could not clear away is left to the next one.
            assert!(exactly || done && !cancels, "{told}, {}: {left:?}, {completion:?}", faulty.broke_at());
            let next = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();
            assert_eq!(volume.backups(), BTreeSet::from([next.backup_id]), "{told}");
        }
        if !broke {
            break;
        }
        at += 1;
    }
    assert!(at > 10, "{at}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_restored_onto_images_of_any_kind() {
    let bench = Bench::new();
    let mut volume = bench.volume(10 * MIB + 512, 3 * MIB);
    volume.write(&[(10 * MIB - 7, 519, 2)]);
    bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
    volume.write(&[(MIB, 100_000, 3), (2 * MIB, 100_000, 0)]);
    let newest = bench.backup(SETTINGS, &volume, Parent::Latest).await.unwrap();

    for (ceph, cluster) in [(&bench.main, "main"), (&bench.other, "other")] {
        let new = format!("volumes/restored-{}", newest.backup_id);
        let receipt = bench.restore(newest.backup_id, &location(cluster, &new)).await.unwrap();
        assert!(ceph.existing(&new).read() == volume.bytes);
        assert!(receipt.counts.bytes_written < 4 * MIB, "{:?}", receipt.counts);
        assert_eq!(ceph.rbd(&["snap", "ls", &new]), "");

        let mut larger = Volume::new(ceph, cluster, 14 * MIB, 14 * MIB);
        bench.restore(newest.backup_id, &larger.source).await.unwrap();
        larger.bytes[..volume.bytes.len()].copy_from_slice(&volume.bytes);
        assert!(larger.image.read() == larger.bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_in_use_or_too_small_or_a_snapshot_is_refused_and_left_as_it_was() {
    let bench = Bench::new();
    let volume = bench.volume(8 * MIB, 3 * MIB);
    let backup = bench.backup(SETTINGS, &volume, Parent::None).await.unwrap();
    let small = bench.volume(7 * MIB, 7 * MIB);
    let used = bench.volume(8 * MIB, 8 * MIB);
    let name = used.image.spec().strip_prefix("volumes/").unwrap();
    let pool = bench.clusters.connect(Some("main")).unwrap().pool("volumes").unwrap();
    let user = pool.open_image(name, None, OpenMode::Write).unwrap();

    for (target, part) in [(&small, "smaller"), (&used, "in use")] {
        let error = bench.restore(backup.backup_id, &target.source).await.unwrap_err();
        let told = format!("{}", backhaul::error::Causes(&error));
        assert!(told.contains(part) && told.contains(target.image.spec()), "{told}");
        assert!(target.image.read() == target.bytes, "{part}");
    }
    drop(user);
    bench.restore(backup.backup_id, &used.source).await.unwrap();
    assert!(used.image.read() == volume.bytes);
}

/// Numbers that look random, the same ones for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    fn of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

struct Point {
    record: Record,
    bytes: Vec<u8>,
}

/// A volume that things happen to, and what its backups must be.
struct Model<'a> {
    bench: &'a Bench,
    volume: Volume<'a>,
    random: Random,
    points: Vec<Point>,
    /// What the volume was when somebody took a snapshot of it.
    snapshots: Vec<Vec<u8>>,
    /// The objects of the image that may have changed since the newest backup.
    dirty: BTreeSet<u64>,
}

impl Model<'_> {
    fn range(&mut self) -> (u64, u64) {
        let size = self.volume.bytes.len() as u64;
        let offset = self.random.below(size);
        let length = match self.random.below(8) {
            0 => 1 + self.random.below(6 * MIB),
            1 => IMAGE_OBJECT_BYTES,
            _ => 1 + self.random.below(3 * BLOCK_BYTES),
        };
        let offset = match self.random.below(3) {
            0 => offset / BLOCK_BYTES * BLOCK_BYTES,
            1 => offset / IMAGE_OBJECT_BYTES * IMAGE_OBJECT_BYTES,
            _ => offset,
        };
        let length = length.min(size - offset);
        self.dirty.extend(offset / IMAGE_OBJECT_BYTES..=(offset + length - 1) / IMAGE_OBJECT_BYTES);
        (offset, length)
    }

    fn write(&mut self) {
        let extents: Vec<_> = (0..1 + self.random.below(4))
            .map(|_| {
                let (offset, length) = self.range();
                (offset, length, self.random.below(4) * self.random.below(1000))
            })
            .collect();
        // One by one, because they may lie over each other.
        for extent in extents {
            self.volume.write(&[extent]);
        }
    }

    fn discard(&mut self) {
        let (offset, length) = self.range();
        self.volume.discard(offset, length);
    }

    fn grow(&mut self) {
        let bytes = self.volume.bytes.len() as u64 + 1 + self.random.below(5 * MIB);
        self.volume.grow(bytes);
    }

    fn snapshot(&mut self) {
        self.volume.image.snapshot(&format!("by-hand-{}", self.snapshots.len()));
        self.snapshots.push(self.volume.bytes.clone());
    }

    fn roll_back(&mut self) {
        if self.snapshots.is_empty() {
            return;
        }
        let index = self.random.below(self.snapshots.len() as u64) as usize;
        let snapshot = format!("{}@by-hand-{index}", self.volume.image.spec());
        self.volume.rbd(&["snap", "rollback", "--no-progress", &snapshot]);
        self.volume.bytes = self.snapshots[index].clone();
        self.dirty.extend(0..100);
    }

    async fn back_up(&mut self) {
        let random = &mut self.random;
        let settings = Settings {
            compression: random.of(&COMPRESSIONS),
            compression_level: 3,
            object_bytes: random.of(&[16, 256, 1280]) * BLOCK_BYTES as usize,
            unchanged_check_per_mille: random.of(&[0, 1, 300, 1000]),
            source_snapshots_max: random.of(&[0, 1, 1, 2]),
            ..SETTINGS
        };
        let parent = match random.below(6) {
            0 => Parent::None,
            1 if !self.points.is_empty() => {
                let index = random.below(self.points.len() as u64) as usize;
                Parent::Given(self.points[index].record.backup_id)
            }
            _ => Parent::Latest,
        };
        let (engine, job) = (self.bench.engine(settings), self.volume.job(parent));
        let (completion, _) = complete(&Context::default(), &engine, &job).await;
        assert_eq!(completion.outcome, Outcome::Succeeded);

        let record = self.bench.record(job.backup_id()).await;
        let counts = record.counts;
        assert_eq!(record.digest, self.volume.digest());
        let parent =
            record.parent_id.map(|id| self.points.iter().find(|p| p.record.backup_id == id).unwrap());
        let parent_hashes = parent.map(|point| hashes(&point.bytes, BLOCK_BYTES as usize));
        let segments = segments(
            &self.volume.bytes,
            BLOCK_BYTES as usize,
            settings.object_bytes,
            parent_hashes.as_deref(),
        );
        assert_eq!(counts.object_count, segments.len() as u64);
        let stored: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let unchanged = self.volume.bytes.len() as u64 - stored;
        // Of what is as in the parent, holes are counted as such only.
        let unchanged = if parent.is_some() { unchanged } else { 0 };
        assert!(counts.bytes_unchanged <= unchanged, "{counts:?}");
        assert!(counts.bytes_unchanged + counts.bytes_hole >= unchanged, "{counts:?}");
        let (read, hole, size) = (counts.bytes_read, counts.bytes_hole, self.volume.bytes.len() as u64);
        assert!(read + hole <= size && read + hole + counts.bytes_unchanged >= size, "{counts:?}");
        let backups = self.volume.backups();
        let newest = self.points.last().map(|point| point.record.backup_id);
        if parent.is_some_and(|parent| newest == Some(parent.record.backup_id))
            && settings.unchanged_check_per_mille <= 1
        {
            let read_max = self.dirty.len() as u64 * IMAGE_OBJECT_BYTES + CHECKED_BLOCKS * BLOCK_BYTES;
            assert!(counts.bytes_read <= read_max, "{counts:?} {:?}", self.dirty);
        }
        assert!(backups.contains(&record.backup_id));
        if settings.source_snapshots_max > 0 {
            assert!(backups.len() <= settings.source_snapshots_max as usize, "{backups:?}");
        }
        self.dirty.clear();
        self.points.push(Point { record, bytes: self.volume.bytes.clone() });
    }

    async fn restore(&mut self) {
        if self.points.is_empty() {
            return;
        }
        let index = self.random.below(self.points.len() as u64) as usize;
        let Point { record, bytes } = &self.points[index];
        assert!(self.bench.restored(record.backup_id).await == *bytes, "the restored volume differs");
    }

    async fn delete(&mut self) {
        let Some(point) = self.points.last() else { return };
        delete(&self.bench.engine(SETTINGS), point.record.backup_id).await.unwrap();
        // Its snapshot went with it, and an older backup may have none any more: all is read then.
        self.dirty.extend(0..100);
        self.points.pop();
    }

    async fn end(mut self) {
        for Point { record, bytes } in &self.points {
            verify(&self.bench.engine(SETTINGS), record.backup_id).await.unwrap();
            assert!(self.bench.restored(record.backup_id).await == *bytes, "the restored volume differs");
        }
        while let Some(point) = self.points.pop() {
            delete(&self.bench.engine(SETTINGS), point.record.backup_id).await.unwrap();
        }
        assert_eq!(self.volume.backups(), BTreeSet::new());
        assert!(self.bench.engine(SETTINGS).catalog().records().await.unwrap().records.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_a_volume_every_point_comes_back_as_it_was() {
    let cases = std::env::var("PROPTEST_CASES").map_or(2, |cases| cases.parse().unwrap());
    for seed in 1..=cases {
        let bench = Bench::new();
        let mut random = Random(seed);
        let bytes = 1 + random.below(20 * MIB);
        let filled = random.below(bytes);
        let (ceph, cluster) = random.of(&[(&bench.main, "main"), (&bench.other, "other")]);
        let volume = Volume::new(ceph, cluster, bytes, filled);
        let (points, snapshots, dirty) = (Vec::new(), Vec::new(), BTreeSet::new());
        let mut model = Model { bench: &bench, volume, random, points, snapshots, dirty };
        eprintln!("seed {seed}");
        for _ in 0..30 {
            match model.random.below(20) {
                0..6 => model.write(),
                6..8 => model.discard(),
                8 => model.grow(),
                9 => model.snapshot(),
                10 => model.roll_back(),
                11..18 => model.back_up().await,
                18 => model.restore().await,
                _ => model.delete().await,
            }
        }
        model.end().await;
    }
}
