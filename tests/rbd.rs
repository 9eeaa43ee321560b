//! The RBD engine on real clusters: what it makes of a volume, restored, is the volume.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::ceph::{Ceph, Image};
use crate::support::device::BlockDevice;
use crate::support::engine::{MEMORY_BYTES, backup_job_of, delete, job, overwrite, run, verify};
use async_trait::async_trait;
use backhaul::ceph::{Access, Cluster, Clusters, Mode as OpenMode};
use backhaul::engine::chunked::{self, Budget, Chunked, Compression};
use backhaul::engine::rbd::{Rbd, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt, Volumes};
use backhaul::error::{Class, Problem};
use backhaul::event::{self, EventSink};
use backhaul::job::{
    BackupId, Checkpoint, Completion, Context, Counts, Event, Happening, Job, JobId, Limit, Location, Method,
    Outcome, Pace, Parent, Reading, Record, RecordState, RestoreWork, VolumeId, Work,
};
use backhaul::runner::{self, Attempts, Ended, Every, Report, plan};
use backhaul::store::{Folder, Memory, ObjectStore, Rados};
use backhaul::volume::FileRoots;
use rstest::rstest;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;

/// An engine on a pool of the shared cluster, with both clusters to take volumes from.
struct Bench {
    main: Ceph,
    other: Ceph,
    engine: Engine,
    /// Has the records and lists of digests.
    store: Arc<dyn ObjectStore>,
    clusters: Clusters,
    /// Whoever holds all of it keeps the engine from reading anything.
    memory: Budget,
    folder: TempDir,
}

fn settings() -> Settings {
    Settings {
        cluster: Some("main".into()),
        pool: "backups".into(),
        source_snapshots_max: 0,
        journaling: false,
        stripes: None,
        checkpoint_bytes: 8 * MIB,
    }
}

/// Remembers what it is told.
#[derive(Default)]
struct Recorder(Mutex<Vec<Happening>>);

impl Recorder {
    /// How far the job was, each time that it told so.
    fn readings(&self) -> Vec<Reading> {
        let reading = |happening: &Happening| match happening {
            Happening::Progress(reading) => Some(*reading),
            _ => None,
        };
        self.0.lock().unwrap().iter().filter_map(reading).collect()
    }
}

#[async_trait]
impl EventSink for Recorder {
    async fn send(&self, event: &Event) -> Result<(), event::Error> {
        self.0.lock().unwrap().push(event.happening.clone());
        Ok(())
    }
}

impl Bench {
    fn new() -> Self {
        Self::with(settings())
    }

    fn with(settings: Settings) -> Self {
        Self::on(Ceph::shared(), settings)
    }

    fn on(main: Ceph, settings: Settings) -> Self {
        let seconds_max = if main.is_own() { 3 } else { 60 };
        Self::beside(Arc::new(Memory::default()), main, settings, seconds_max)
    }

    /// The same with the records in the pool beside the images, as workers have them; the pool has those of others, too.
    fn in_the_pool(settings: Settings) -> Self {
        let main = Ceph::shared();
        let cluster = Cluster::connect(main.conf(), "cinder", 60).unwrap();
        Self::beside(Arc::new(Rados::new(cluster.pool("backups").unwrap())), main, settings, 60)
    }

    /// Another one on the same records, as another worker has it.
    fn beside(
        store: Arc<dyn ObjectStore>,
        main: Ceph,
        settings: Settings,
        operation_seconds_max: u32,
    ) -> Self {
        let other = Ceph::other();
        let access =
            |ceph: &Ceph| Access { conf: ceph.conf().into(), user: "cinder".into(), operation_seconds_max };
        let folder = tempfile::tempdir().unwrap();
        // The first one, with a key of the other one.
        let (conf, keyring) = (folder.path().join("ceph.conf"), other.conf().with_file_name("keyring"));
        let of_main = fs::read_to_string(main.conf()).unwrap();
        fs::write(&conf, format!("{of_main}\n[client]\nkeyring = {}\n", keyring.display())).unwrap();
        let clusters = BTreeMap::from([
            ("main".into(), access(&main)),
            ("other".into(), access(&other)),
            ("closed".into(), Access { conf, ..access(&main) }),
        ]);
        let clusters = Clusters::new(clusters);
        let memory = Budget::new(MEMORY_BYTES);
        let cpu = Cpu::start(2).unwrap();
        let rbd = Rbd::new(store.clone(), clusters.clone(), settings, cpu, memory.clone());
        let file_roots = FileRoots::new(&[folder.path().to_owned(), "/dev".into()]);
        let engine = Engine::new(rbd, Volumes { file_roots, clusters: clusters.clone() });
        Self { engine, store, clusters, memory, main, other, folder }
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

    /// Runs the job to its end, as a worker does.
    async fn complete(&self, job: &Job) -> Completion {
        match self.end(job, 1).await {
            Ended::Over(completion) => *completion,
            ended => panic!("{ended:?}"),
        }
    }

    /// Runs the job as a worker does that may have `tries` more.
    async fn end(&self, job: &Job, tries: u32) -> Ended {
        self.end_in(&Context::default(), job, tries, &Recorder::default()).await
    }

    /// The same, and tells often how far it is.
    async fn end_in(&self, ctx: &Context, job: &Job, tries: u32, sink: &Recorder) -> Ended {
        let (report, attempts) =
            (Report::new(sink, job), Attempts { max: tries, seconds_max: 3600, ..Attempts::one() });
        runner::run(ctx, &self.engine, job, &attempts, Every::telling(Duration::from_millis(20)), &report)
            .await
    }

    /// Runs the job until it has written something, and no further, as a worker that is killed: dropped in the middle,
    /// nothing is cleaned up.
    async fn die_in_the_middle_of(&self, job: &Job) {
        let ctx = Context::default();
        tokio::select! {
            result = self.engine.run(&ctx, job, self.methods(job)[0]) => panic!("{result:?}"),
            () = async {
                while ctx.progress.read().counts.bytes_stored == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            } => {}
        }
    }

    /// Waits until a backup has noted in its record how far it is.
    async fn checkpoint_of(&self, id: BackupId) -> Checkpoint {
        loop {
            let record = self.engine.catalog().record(id).await.unwrap();
            if let Some(checkpoint) = record.and_then(|record| record.checkpoint) {
                return checkpoint;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Does the job on an engine, stops the OSD when some of it is done, and gives the error in which that ends.
    async fn stop_osd_in_the_middle_of(&self, engine: &Engine, job: &Job) -> Error {
        let ctx = Context::default();
        let method = plan(job, &engine.strategies(&job.work))[0];
        let (engine, task_ctx, task_job) = (engine.clone(), ctx.clone(), job.clone());
        let running = tokio::spawn(async move { engine.run(&task_ctx, &task_job, method).await });
        while ctx.progress.read().counts.bytes_read == 0 {
            assert!(!running.is_finished());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.main.stop_osd();
        let error = running.await.unwrap().unwrap_err();
        self.main.start_osd();
        error
    }

    /// Waits until a restore has noted on the image that it writes how far it is.
    async fn wait_for_checkpoint<T>(&self, image: &str, restore: &JoinHandle<T>) {
        let pool = self.clusters.connect(Some("main")).unwrap().pool("volumes").unwrap();
        let is_noted = || match pool.open_image(image, None, OpenMode::Read) {
            Ok(image) => image.metadata("backhaul.restored").unwrap().is_some(),
            Err(_) => false,
        };
        while !is_noted() {
            assert!(!restore.is_finished());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Runs the job, and asks for its end when it has moved so much.
    async fn cancel_after(&self, job: &Job, bytes: u64) -> Outcome {
        let (ctx, sink) = (Context::default(), Recorder::default());
        let cancel = async {
            let moved = || ctx.progress.read().counts;
            while moved().bytes_stored + moved().bytes_written < bytes {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            ctx.cancel.cancel();
        };
        let mut end = std::pin::pin!(self.end_in(&ctx, job, 1, &sink));
        tokio::select! {
            ended = &mut end => panic!("it was over before its end was asked for: {ended:?}"),
            () = cancel => {}
        }
        match end.await {
            Ended::Over(completion) => completion.outcome,
            ended => panic!("{ended:?}"),
        }
    }

    /// Backs up as a worker does; returns the record, by which method it was made, and why not by the first one.
    async fn backup_somehow(
        &self,
        volume_id: VolumeId,
        source: &Location,
        parent: Parent,
    ) -> (Record, String, Option<Problem>) {
        let job = backup_job_of(volume_id, source.clone(), parent);
        let completion = self.complete(&job).await;
        assert_eq!(completion.outcome, Outcome::Succeeded);
        let method = completion.account.method.unwrap().to_string();
        (self.record(job.backup_id()).await, method, completion.account.fallback_reason)
    }

    /// Runs the job as a worker does, and tells why it failed.
    async fn failure_of(&self, job: &Job) -> String {
        match self.complete(job).await.outcome {
            Outcome::Failed(problem) => problem.to_string(),
            outcome => panic!("{outcome:?}"),
        }
    }

    /// Restores into a new file, and reads that.
    async fn restored(&self, id: BackupId) -> Vec<u8> {
        let file = self.folder.path().join(format!("restored-{id}"));
        self.restore(id, &Location::File(file.clone())).await.unwrap();
        let bytes = fs::read(&file).unwrap();
        fs::remove_file(file).unwrap();
        bytes
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Reads an image of the shared cluster.
    fn export(&self, spec: &str) -> Vec<u8> {
        export(&self.main, spec, self.folder.path())
    }

    async fn record(&self, id: BackupId) -> Record {
        self.engine.catalog().record(id).await.unwrap().unwrap()
    }

    async fn restore(&self, backup_id: BackupId, target: &Location) -> Result<Receipt, Error> {
        self.run(&restore_job(backup_id, target)).await
    }

    /// All that there is of the backups of a volume, but for their data: records, lists of digests, images, snapshots.
    async fn traces(&self, volume_id: VolumeId, volume: &Image<'_>) -> BTreeSet<String> {
        let mut traces: BTreeSet<String> = self.snapshots(volume.spec()).into_iter().collect();
        for image in self.images("backups").into_iter().filter(|name| name.contains(&volume_id.to_string())) {
            let snapshots = self.snapshots(&format!("backups/{image}"));
            traces.extend(snapshots.into_iter().map(|snapshot| format!("{image}@{snapshot}")));
            traces.insert(image);
        }
        for folder in ["records", "digests"] {
            let listed = self.store.list(&Folder::own(folder), "").await.unwrap();
            traces.extend(listed.into_iter().map(|object| format!("{folder}/{}", object.name)));
        }
        traces
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

fn restore_job(backup_id: BackupId, target: &Location) -> Job {
    job(Work::Restore(RestoreWork { backup_id, target: target.clone(), volume_id: None }))
}

fn export(ceph: &Ceph, spec: &str, folder: &Path) -> Vec<u8> {
    let file = folder.join("exported");
    ceph.rbd(&["export", "--no-progress", spec, file.to_str().unwrap()]);
    let bytes = fs::read(&file).unwrap();
    fs::remove_file(file).unwrap();
    bytes
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
async fn jobs_on_images_take_at_least_as_long_as_their_limit_says() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(24 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 24 << 20))]);
    let backup = backup_job_of(volume_id, source, Parent::None);
    let id = backup.backup_id();
    let target = bench.folder.path().join("target");
    let restore = restore_job(id, &Location::File(target));
    for job in [backup, restore, job(Work::Verify(id.into()))] {
        let pace = Pace::new(Limit::new(NonZeroU64::new(16 * MIB)), Arc::default());
        let (ctx, began) = (Context { pace, ..Context::default() }, Instant::now());

        bench.engine.run(&ctx, &job, bench.methods(&job)[0]).await.unwrap();

        // All but the first step, which has no more than 4 MiB.
        assert!(began.elapsed() >= Duration::from_millis(1250), "{job:?}: {:?}", began.elapsed());
    }
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
        assert!(bench.export(&target) == *expected);
        assert!(bench.restored(record.backup_id).await == *expected);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_has_grown_is_backed_up_incrementally_and_restored_to_each_point() {
    let bench = Bench::new();
    // Neither size is one of whole objects, or of whole blocks.
    let (volume_id, volume) = bench.volume(10 * MIB + 512);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 100_000)), (10 * MIB - 4096, &noise(2, 4096 + 512))]);
    let first = volume.read();
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();

    bench.main.rbd(&["resize", "--no-progress", "--size", &format!("{}B", 21 * MIB + 1024), volume.spec()]);
    volume.write(&[(20 * MIB, &noise(3, 1 << 20))]);
    let second = volume.read();
    let (grown, method, reason) = bench.backup_somehow(volume_id, &source, Parent::Latest).await;
    assert_eq!((method.as_str(), reason), ("rbd incremental", None));

    for (record, expected) in [(&full, &first), (&grown, &second)] {
        verify(&bench.engine, record.backup_id).await.unwrap();
        assert!(bench.restored(record.backup_id).await == *expected);
        // A target as large as the volume is now: nothing of what it held shows through, and its size stays.
        let target = bench.main.image("volumes", 30 * MIB);
        target.write(&[(0, &noise(9, 30 << 20))]);
        bench.restore(record.backup_id, &location("main", target.spec())).await.unwrap();
        let mut expected = expected.clone();
        expected.resize(30 << 20, 0);
        assert!(bench.export(target.spec()) == expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_cannot_be_compared_with_leads_to_a_full_backup_that_says_why() {
    for case in [
        "source snapshot",
        "backup snapshot",
        "other image",
        "backup image",
        "other backup image",
        "other snapshot",
        "map",
        "map of the backup image",
        "lock",
        "two snapshots",
        "two snapshots on the volume",
        "size",
        "smaller",
    ] {
        let bench = Bench::new();
        let (volume_id, volume) = bench.volume(16 * MIB);
        let source = location("main", volume.spec());
        volume.write(&[(MIB, &noise(1, 1 << 20))]);
        let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
        let first = volume.read();
        let snapshot = bench.snapshots(volume.spec()).remove(0);
        volume.write(&[(9 * MIB, &noise(2, 1 << 20))]);
        let remove =
            |spec: &str| bench.main.rbd(&["snap", "rm", "--no-progress", &format!("{spec}@{snapshot}")]);
        let expected = match case {
            "source snapshot" => {
                remove(volume.spec());
                "is gone"
            }
            "backup snapshot" => {
                remove(&base(&full));
                "is gone"
            }
            "backup image" => {
                remove(&base(&full));
                bench.main.rbd(&["rm", "--no-progress", &base(&full)]);
                "is gone"
            }
            "other backup image" => {
                remove(&base(&full));
                bench.main.rbd(&["rm", "--no-progress", &base(&full)]);
                bench.main.rbd(&["create", "--size", "16M", &base(&full)]);
                bench.main.existing(&base(&full)).snapshot(&snapshot);
                "another image than the one it was stored in"
            }
            "other image" => {
                remove(volume.spec());
                bench.main.rbd(&["rm", "--no-progress", volume.spec()]);
                bench.main.rbd(&["create", "--size", "16M", volume.spec()]);
                volume.write(&[(3 * MIB, &noise(3, 1 << 20))]);
                volume.snapshot(&snapshot);
                "another image"
            }
            "other snapshot" => {
                remove(volume.spec());
                volume.snapshot(&snapshot);
                "another one of that name"
            }
            "map" | "map of the backup image" => {
                let of_backup = base(&full);
                let (pool, spec) =
                    if case == "map" { ("volumes", volume.spec()) } else { ("backups", &*of_backup) };
                let image = bench.main.existing(spec);
                // Ceph itself finds out, when it opens the image, that its map is no map.
                let map = format!("rbd_object_map.{}", image.id());
                let garbage = bench.file("garbage", b"garbage");
                bench.main.rados(&["-p", pool, "put", &map, garbage.to_str().unwrap()]);
                image.write(&[(12 * MIB, &noise(4, 4096))]);
                "object map"
            }
            "lock" => {
                let features = ["fast-diff", "object-map", "exclusive-lock"];
                let image = base(&full);
                bench.main.rbd(&[["feature", "disable", &image].as_slice(), &features].concat());
                "exclusive lock"
            }
            "two snapshots" | "two snapshots on the volume" => {
                let image = if case == "two snapshots" { base(&full) } else { volume.spec().into() };
                let again = format!("{image}@backup.{}.snap.1.5", full.backup_id);
                bench.main.rbd(&["snap", "rename", &format!("{image}@{snapshot}"), &again]);
                let other = format!("{image}@backup.{}.snap.2.5", full.backup_id);
                bench.main.rbd(&["snap", "create", "--no-progress", &other]);
                "more than one"
            }
            "size" => {
                let image = base(&full);
                remove(&image);
                bench.main.rbd(&["resize", "--no-progress", "--size", "17M", &image]);
                bench.main.rbd(&["snap", "create", "--no-progress", &format!("{image}@{snapshot}")]);
                "differ in size"
            }
            "smaller" => {
                let spec = volume.spec();
                bench.main.rbd(&["resize", "--no-progress", "--allow-shrink", "--size", "15M", spec]);
                "smaller now"
            }
            _ => unreachable!(),
        };
        let second = volume.read();
        let (again, method, reason) = bench.backup_somehow(volume_id, &source, Parent::Latest).await;
        let reason = reason.unwrap_or_else(|| panic!("{case}: no reason for {method}"));
        assert_eq!(method, "rbd full", "{case}");
        assert!(reason.to_string().contains(expected), "{case}: {reason}");
        assert_eq!(again.parent_id, None, "{case}");
        assert_eq!(again.fallback_reason, Some(reason), "{case}");
        assert!(bench.restored(again.backup_id).await == second, "{case}");
        // It has not harmed the one before.
        if !case.contains("backup") && !["two snapshots", "size"].contains(&case) {
            assert!(bench.restored(full.backup_id).await == first, "{case}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_snapshots_are_copied_any_number_of_times_and_stay_sparse() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(40 * MIB);
    volume.write(&[(20 * MIB, &noise(1, 1 << 20))]);
    volume.snapshot("one");
    let first = volume.read();
    volume.write(&[(30 * MIB, &noise(2, 1 << 20))]);
    volume.snapshot("two");
    let second = volume.read();
    let file = bench.file("volume", &second);
    let sources = [
        (location("main", &format!("{}@one", volume.spec())), &first),
        (location("main", &format!("{}@two", volume.spec())), &second),
        (Location::File(file.clone()), &second),
        (Location::File(file), &second),
    ];
    let mut made = Vec::new();
    for (source, expected) in &sources {
        let (record, method, reason) = bench.backup_somehow(volume_id, source, Parent::None).await;
        assert_eq!((method.as_str(), reason), ("copy full", None));
        assert!(record.counts.bytes_stored <= 2 * MIB, "{:?}", record.counts);
        made.push((record, expected));
    }
    let (record, method, reason) = bench.backup_somehow(volume_id, &sources[3].0, Parent::Latest).await;
    assert_eq!(method, "copy full");
    assert!(reason.unwrap().to_string().contains("nobody knows what has changed"));
    made.push((record, &sources[3].1));
    // None of them took a snapshot of its own.
    assert_eq!(bench.snapshots(volume.spec()), ["one", "two"]);
    while let Some((record, _)) = made.pop() {
        verify(&bench.engine, record.backup_id).await.unwrap();
        delete(&bench.engine, record.backup_id).await.unwrap();
        for (record, expected) in &made {
            assert!(bench.restored(record.backup_id).await == ***expected);
        }
    }
    assert!(!bench.images("backups").iter().any(|image| image.contains(&volume_id.to_string())));
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_and_clusters_may_be_any() {
    let bench = Bench::new();
    let (volume_id, volume) = volume(&bench.other, 16 * MIB);
    let source = location("other", volume.spec());
    volume.write(&[(MIB, &noise(1, 1 << 20))]);
    let first = volume.read();
    let mut job = backup_job_of(volume_id, source.clone(), Parent::None);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    work.container = Some("backups2".parse().unwrap());
    assert_eq!(bench.complete(&job).await.outcome, Outcome::Succeeded);
    let full = bench.record(job.backup_id()).await;
    assert!(base(&full).starts_with("backups2/"));
    volume.write(&[(2 * MIB - 100, &noise(2, 200))]);
    let second = volume.read();
    let (incremental, method, reason) = bench.backup_somehow(volume_id, &source, Parent::Latest).await;
    assert_eq!((method.as_str(), reason), ("rbd incremental", None));
    // A chain stays where it was begun.
    assert_eq!(base(&incremental), base(&full));

    let target = format!("volumes/restored-{}", incremental.backup_id);
    for (cluster, ceph) in [("main", &bench.main), ("other", &bench.other)] {
        bench.restore(incremental.backup_id, &location(cluster, &target)).await.unwrap();
        assert!(export(ceph, &target, bench.folder.path()) == second);
    }
    assert!(bench.restored(full.backup_id).await == first);

    // A volume in the pool of the backups themselves.
    let own = bench.main.image("backups", 8 * MIB);
    own.write(&[(0, &noise(3, 70_000))]);
    let (record, method, _) =
        bench.backup_somehow(volume_id, &location("main", own.spec()), Parent::None).await;
    assert_eq!(method, "rbd full");
    assert!(bench.restored(record.backup_id).await == own.read());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_to_the_original_gives_it_back_and_keeps_it_sparse() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(4 * MIB, &noise(1, 2 << 20))]);
    let first = volume.read();
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    volume.write(&[(5 * MIB, &noise(2, 2 << 20)), (40 * MIB, &noise(3, 10 << 20))]);
    bench.restore(full.backup_id, &source).await.unwrap();
    assert!(volume.read() == first);
    let used: serde_json::Value =
        serde_json::from_str(&bench.main.rbd(&["du", "--format", "json", volume.spec()])).unwrap();
    let head = used["images"].as_array().unwrap().last().unwrap().clone();
    assert!(head["used_size"].as_u64().unwrap() <= 4 * MIB, "{used}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_in_use_or_too_small_is_refused_and_left_as_it_was() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(MIB, &noise(1, 1 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();

    let target = bench.main.image("volumes", 8 * MIB);
    target.write(&[(0, b"old")]);
    let pool = bench.clusters.connect(Some("main")).unwrap().pool("volumes").unwrap();
    let name = target.spec().strip_prefix("volumes/").unwrap();
    let user = pool.open_image(name, None, OpenMode::Write).unwrap();
    let error = bench.restore(full.backup_id, &location("main", target.spec())).await.unwrap_err();
    assert!(Problem::new(error.class(), &error).to_string().contains("in use"), "{error:?}");
    // It may be a restore that was killed, which the cluster has not forgotten yet.
    assert_eq!(error.class(), Class::Transient);
    drop(user);
    assert!(target.read().starts_with(b"old"));

    let small = bench.main.image("volumes", 8 * MIB - 512);
    let error = bench.restore(full.backup_id, &location("main", small.spec())).await.unwrap_err();
    assert!(Problem::new(error.class(), &error).to_string().contains("smaller than the backup"), "{error:?}");

    let error = bench.restore(full.backup_id, &location("main", "no-such-pool/image")).await.unwrap_err();
    assert!(Problem::new(error.class(), &error).to_string().contains("no-such-pool"), "{error:?}");
    let error = bench.restore(full.backup_id, &location("nowhere", "volumes/image")).await.unwrap_err();
    let text = Problem::new(error.class(), &error).to_string();
    assert!(text.contains("\"nowhere\"") && text.contains("main, other"), "{text}");
    let error = bench.restore(full.backup_id, &location("closed", target.spec())).await.unwrap_err();
    let text = Problem::new(error.class(), &error).to_string();
    assert!(text.contains("client.cinder: Permission denied"), "{text}");
    assert!(target.read().starts_with(b"old"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_to_a_new_image_that_is_whole_removes_nothing_of_the_next_one() {
    let bench = Bench::new();
    let name = format!("new-{}", JobId::random());
    let volumes = Volumes { file_roots: FileRoots::new(&[]), clusters: bench.clusters.clone() };
    let place = location("main", &format!("volumes/{name}"));
    let target = volumes.target(&place, MIB, "a restore".into()).await.unwrap().into_volume();
    let ending = target.clone();
    tokio::task::spawn_blocking(move || ending.finish()).await.unwrap().unwrap();
    // Another one has begun.
    let partial = format!("{name}.backhaul-partial");
    bench.main.rbd(&["create", "--size", "1M", &format!("volumes/{partial}")]);

    drop(target);

    let images = bench.images("volumes");
    assert!(images.contains(&name) && images.contains(&partial), "{images:?}");
    for image in [name, partial] {
        bench.main.rbd(&["rm", "--no-progress", &format!("volumes/{image}")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_over_other_backups_is_refused() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(MIB, &noise(1, 1 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let image_of = |backup: &str| format!("backups/volume-{volume_id}.backup.{backup}");
    // As Cinder's copy of a snapshot, which no snapshot of the image protects.
    let copy = image_of("base");
    bench.main.rbd(&["create", "--size", "8M", &copy]);
    let copy = bench.main.existing(&copy);
    copy.write(&[(0, &noise(2, 1 << 20))]);
    let (held, new) = (copy.read(), image_of(&BackupId::random().to_string()));
    for target in [copy.spec(), &base(&full), &new] {
        let error = bench.restore(full.backup_id, &location("main", target)).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{target}: {error:?}");
        assert!(error.to_string().contains("has the name of an image that backups are in"), "{error}");
    }
    assert!(copy.read() == held);
    assert!(!bench.images("backups").iter().any(|image| new.ends_with(image.as_str())));
    verify(&bench.engine, full.backup_id).await.unwrap();
    bench.main.rbd(&["rm", "--no-progress", copy.spec()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_read_is_told_and_leaves_nothing_behind() {
    let bench = Bench::new();
    for (source, expected) in [
        ("volumes/no-such-image", "no-such-image"),
        ("no-such-pool/image", "no-such-pool"),
        ("volumes/no-such-image@snapshot", "no-such-image@snapshot"),
        ("closed/volumes/image", "client.cinder: Permission denied"),
    ] {
        let volume_id = VolumeId::random();
        let source_location = match source.matches('/').count() {
            1 => location("main", source),
            _ => format!("rbd:{source}").parse().unwrap(),
        };
        let job = backup_job_of(volume_id, source_location, Parent::None);
        let Outcome::Failed(problem) = bench.complete(&job).await.outcome else { panic!("{source}") };
        assert!(problem.to_string().contains(expected), "{problem}");
        assert!(!bench.images("backups").iter().any(|image| image.contains(&volume_id.to_string())));
    }
    assert!(bench.store.list(&Folder::own("digests"), "").await.unwrap().is_empty());
    let (volume_id, volume) = bench.volume(MIB);
    let mut job = backup_job_of(volume_id, location("main", volume.spec()), Parent::None);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    work.container = Some("no-such-pool".parse().unwrap());
    let Outcome::Failed(problem) = bench.complete(&job).await.outcome else { panic!() };
    assert!(problem.to_string().contains("no-such-pool"), "{problem}");
    assert_eq!(bench.snapshots(volume.spec()), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_made_as_they_are_set_and_a_volume_keeps_no_more_snapshots_than_it_may() {
    let bench = Bench::with(Settings {
        source_snapshots_max: 2,
        journaling: true,
        stripes: Some((65536, 4)),
        ..settings()
    });
    let (volume_id, volume) = bench.volume(16 * MIB);
    let source = location("main", volume.spec());
    volume.snapshot("somebody-elses");
    let mut made = Vec::new();
    for seed in 0..4 {
        volume.write(&[(seed * MIB + 1000, &noise(seed, 100_000))]);
        let parent = if seed == 0 { Parent::None } else { Parent::Latest };
        let (record, _, reason) = bench.backup_somehow(volume_id, &source, parent).await;
        assert_eq!(reason, None);
        made.push((record, volume.read()));
    }
    let info = bench.main.rbd(&["info", &base(&made[0].0)]);
    for part in ["journaling", "striping", "exclusive-lock", "object-map", "fast-diff", "stripe unit: 64 KiB"]
    {
        assert!(info.contains(part), "{part}: {info}");
    }
    assert_eq!(bench.snapshots(volume.spec()).len(), 3);
    assert_eq!(bench.snapshots(&base(&made[0].0)).len(), 4);
    // The parent that was asked for has no snapshot on the volume any more.
    let (forced, method, reason) =
        bench.backup_somehow(volume_id, &source, Parent::Given(made[0].0.backup_id)).await;
    assert_eq!(method, "rbd full");
    assert!(reason.unwrap().to_string().contains("is gone"));
    for (record, expected) in made.iter().chain([&(forced, volume.read())]) {
        assert!(bench.restored(record.backup_id).await == *expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_backup_of_an_older_point_is_right_whatever_came_after_it() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(16 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 8 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    volume.write(&[(MIB, &noise(2, 1 << 20)), (12 * MIB, &noise(3, 1 << 20))]);
    let second = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    let at_second = volume.read();
    // As at the first point again, but for a little.
    bench.restore(full.backup_id, &source).await.unwrap();
    volume.write(&[(3 * MIB, &noise(4, 5000))]);
    let third = bench.backup(volume_id, &source, Parent::Given(full.backup_id)).await.unwrap();
    assert_eq!(third.parent_id, Some(full.backup_id));
    assert!(bench.restored(third.backup_id).await == volume.read());
    assert!(bench.restored(second.backup_id).await == at_second);
    verify(&bench.engine, third.backup_id).await.unwrap();
    delete(&bench.engine, second.backup_id).await.unwrap();
    assert!(bench.restored(third.backup_id).await == volume.read());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_backup_wrote_into_the_image_does_not_show_in_the_next_one() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(16 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 8 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    // A failed run has written to the head of the image what the volume never held there.
    let image = bench.main.existing(&base(&full));
    image.write(&[(5 * MIB + 777, &noise(8, 3 << 20)), (14 * MIB, &noise(9, 4096))]);
    volume.write(&[(MIB, &noise(2, 4096))]);
    let second = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    assert!(bench.restored(second.backup_id).await == volume.read());
    verify(&bench.engine, second.backup_id).await.unwrap();
    verify(&bench.engine, full.backup_id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_delete_of_a_failed_backup_harms_no_other() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(16 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 1 << 20))]);
    // A copy of a snapshot, as the parent of an incremental backup: where Cinder loses the parent's data.
    volume.snapshot("point");
    let at_point = location("main", &format!("{}@point", volume.spec()));
    let copy = bench.backup(volume_id, &at_point, Parent::None).await.unwrap();
    let job = backup_job_of(volume_id, source.clone(), Parent::Given(copy.backup_id));
    let error = bench.run(&job).await.unwrap_err();
    bench.engine.abandon(&job, Some(&Problem::new(error.class(), &error))).await.unwrap();
    let failed = bench.record(job.backup_id()).await;
    assert!(matches!(failed.state, RecordState::Error(_)), "{:?}", failed.state);
    assert_eq!(bench.snapshots(volume.spec()), ["point"]);
    assert!(bench.restored(copy.backup_id).await == volume.read());
    delete(&bench.engine, failed.backup_id).await.unwrap();
    assert!(bench.restored(copy.backup_id).await == volume.read());
    verify(&bench.engine, copy.backup_id).await.unwrap();
    delete(&bench.engine, copy.backup_id).await.unwrap();
    assert!(!bench.images("backups").iter().any(|image| image.contains(&volume_id.to_string())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_waits_for_an_image_that_is_in_use() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(0, &noise(1, 1 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let pool = bench.clusters.connect(Some("main")).unwrap().pool("backups").unwrap();
    let name = base(&full).strip_prefix("backups/").unwrap().to_owned();
    let user = pool.open_image(&name, None, OpenMode::Write).unwrap();
    let engine = bench.engine.clone();
    let deleted = tokio::spawn(async move { delete(&engine, full.backup_id).await.map(drop) });
    // It has come as far as it can when the snapshot is gone.
    while !user.snapshots().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!deleted.is_finished());
    drop(user);
    deleted.await.unwrap().unwrap();
    assert!(!bench.images("backups").contains(&name));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_that_cannot_remove_the_snapshot_of_the_volume_fails_and_can_be_sent_again() {
    let bench = Bench::new();
    let (volume_id, volume) = volume(&bench.other, 8 * MIB);
    volume.write(&[(0, &noise(1, 1 << 20))]);
    let source = location("other", volume.spec());
    let on_volume = || bench.other.rbd(&["snap", "ls", volume.spec()]);
    let access = |conf: &Path| Access { conf: conf.into(), user: "cinder".into(), operation_seconds_max: 60 };
    let engine_with = |other: Option<&Path>| {
        let main = ("main".to_owned(), access(bench.main.conf()));
        let other = other.map(|conf| ("other".to_owned(), access(conf)));
        let clusters = Clusters::new([main].into_iter().chain(other).collect());
        let cpu = Cpu::start(1).unwrap();
        let rbd = Rbd::new(bench.store.clone(), clusters.clone(), settings(), cpu, bench.memory.clone());
        Engine::new(rbd, Volumes { file_roots: FileRoots::new(&[]), clusters })
    };
    // One with the key of another cluster, and one that is not there.
    for conf in ["ceph.conf", "none.conf"] {
        let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
        let id = full.backup_id;

        let error =
            delete(&engine_with(Some(bench.folder.path().join(conf).as_path())), id).await.unwrap_err();

        assert_eq!(error.class(), Class::Permanent, "{error:?}");
        let snapshot = full.source.unwrap().image.to_string();
        assert!(error.to_string().contains(&snapshot), "{error}");
        assert!(matches!(bench.record(id).await.state, RecordState::Deleting(_)), "{conf}");
        assert!(on_volume().contains(&id.to_string()), "{conf}");
        delete(&bench.engine, id).await.unwrap();
        assert_eq!(bench.engine.catalog().record(id).await.unwrap(), None, "{conf}");
        assert_eq!(on_volume(), "", "{conf}");
    }
    // Where nobody says any more how the cluster is reached, the backup goes all the same.
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    delete(&engine_with(None), full.backup_id).await.unwrap();
    assert_eq!(bench.engine.catalog().record(full.backup_id).await.unwrap(), None);
    assert!(on_volume().contains(&full.backup_id.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_goes_on_where_one_before_was_broken_off() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(0, &noise(1, 1 << 20))]);
    let source = location("main", volume.spec());
    for what in ["snapshot of the backup", "snapshot of the volume", "image"] {
        let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
        let image = bench.main.existing(&base(&full));
        let snapshot = bench.snapshots(volume.spec()).remove(0);
        match what {
            "snapshot of the backup" => image.half_remove_snapshot(&snapshot),
            "snapshot of the volume" => volume.half_remove_snapshot(&snapshot),
            _ => {
                let header = format!("rbd_header.{}", image.id());
                bench.main.rbd(&["snap", "purge", "--no-progress", image.spec()]);
                bench.main.rados(&["-p", "backups", "rm", &header]);
            }
        }

        delete(&bench.engine, full.backup_id).await.unwrap();

        assert_eq!(bench.traces(volume_id, &volume).await, BTreeSet::new(), "{what}");
        assert_eq!(bench.main.rbd(&["snap", "ls", "--all", volume.spec()]), "", "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_has_a_snapshot_of_something_else_stays_when_its_last_backup_is_deleted() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(0, &noise(1, 1 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let image = base(&full);
    bench.main.existing(&image).snapshot("mine");

    delete(&bench.engine, full.backup_id).await.unwrap();

    assert_eq!(bench.engine.catalog().record(full.backup_id).await.unwrap(), None);
    assert_eq!(bench.snapshots(&image), ["mine"]);
    assert_eq!(bench.snapshots(volume.spec()), Vec::<String>::new());
    bench.main.rbd(&["snap", "purge", "--no-progress", &image]);
    bench.main.rbd(&["rm", "--no-progress", &image]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_backups_in_one_chain_are_not_made_at_the_same_time() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(32 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 4 << 20)), (16 * MIB, &noise(2, 1 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    volume.discard(0, 4 * MIB);
    volume.write(&[(17 * MIB, &noise(3, 1 << 20))]);
    let at_first = volume.read();
    let slow = Bench::beside(bench.store.clone(), Ceph::shared(), settings(), 60);
    let [first, second] =
        [(); 2].map(|()| backup_job_of(volume_id, source.clone(), Parent::Given(full.backup_id)));
    let ctx = Context::default();
    let held = slow.memory.reserve(MEMORY_BYTES).await;
    let (result, error) = tokio::join!(slow.engine.run(&ctx, &first, slow.methods(&first)[0]), async {
        // What was discarded needs no memory: once that is done, it writes to the image.
        while ctx.progress.read().bytes_done == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        volume.write(&[(20 * MIB, &noise(4, 1 << 20))]);
        let error = bench.run(&second).await.unwrap_err();
        drop(held);
        error
    });
    assert!(matches!(error, Error::ImageInUse { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Transient);
    result.unwrap();
    let completion = bench.complete(&second).await;
    assert_eq!((completion.outcome, completion.account.fallback_reason), (Outcome::Succeeded, None));
    for (job, expected) in [(&first, at_first), (&second, volume.read())] {
        verify(&bench.engine, job.backup_id()).await.unwrap();
        assert!(bench.restored(job.backup_id()).await == expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_of_what_was_cloned_waits_for_clones_of_the_backup_and_for_no_others() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(0, &noise(1, 1 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let image = bench.main.existing(&base(&full));
    let snapshot = bench.snapshots(volume.spec()).remove(0);
    let (of_backup, of_volume) = (image.clone_of(&snapshot), volume.clone_of(&snapshot));

    let error = delete(&bench.engine, full.backup_id).await.unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error:?}");
    assert!(error.to_string().contains("`rbd children` what clones there are"), "{error}");
    assert!(of_backup.read() == volume.read());

    bench.main.rbd(&["rm", "--no-progress", of_backup.spec()]);
    delete(&bench.engine, full.backup_id).await.unwrap();
    assert_eq!(bench.traces(volume_id, &volume).await, BTreeSet::new());
    assert!(of_volume.read() == volume.read());
    // Ceph removes the snapshot with the last of its clones.
    assert!(bench.main.rbd(&["snap", "ls", "--all", volume.spec()]).contains(&snapshot));
    bench.main.rbd(&["rm", "--no-progress", of_volume.spec()]);
    assert_eq!(bench.main.rbd(&["snap", "ls", "--all", volume.spec()]), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metadata_of_a_volume_is_kept_beside_its_backup_as_cinder_keeps_it() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(0, &noise(1, 4096))]);
    let mut job = backup_job_of(volume_id, location("main", volume.spec()), Parent::None);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    work.volume_meta = Some(r#"{"version": 2}"#.into());
    assert_eq!(bench.complete(&job).await.outcome, Outcome::Succeeded);
    let object = format!("backup.{}.meta", job.backup_id());
    assert_eq!(bench.main.rados(&["-p", "backups", "get", &object, "-"]), r#"{"version": 2}"#);
    delete(&bench.engine, job.backup_id()).await.unwrap();
    assert!(!bench.main.rados(&["-p", "backups", "ls"]).contains(&object));
    // It is written once: what is there and is something else is no other attempt's.
    let other = bench.file("other", b"{}");
    bench.main.rados(&["-p", "backups", "put", &object, other.to_str().unwrap()]);
    let again = Job { id: JobId::random(), ..job };
    let told = bench.failure_of(&again).await;
    assert!(told.contains(&format!("there is backups/{object} already")), "{told}");
    assert_eq!(bench.main.rados(&["-p", "backups", "get", &object, "-"]), "{}");
}

/// It is one of Cinder's, or of another store. The job would have removed it when it failed.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_in_the_pool_without_a_record_is_not_harmed_by_a_job_with_its_id() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(16 * MIB);
    let source = location("main", volume.spec());
    let mut made = Vec::new();
    for (seed, parent) in [(1, Parent::None), (2, Parent::Latest)] {
        volume.write(&[(seed * MIB, &noise(seed, 1 << 20))]);
        made.push((bench.backup(volume_id, &source, parent).await.unwrap(), volume.read(), parent));
    }
    let catalog = bench.engine.catalog();
    for (record, _, parent) in made.iter().rev() {
        catalog.remove(record.backup_id).await.unwrap();
        let traces = bench.traces(volume_id, &volume).await;
        let mut job = backup_job_of(volume_id, source.clone(), *parent);
        let Work::Backup(work) = &mut job.work else { unreachable!() };
        work.backup_id = record.backup_id;

        let told = bench.failure_of(&job).await;

        assert!(told.contains(&format!("there is {}", base(&made[0].0))), "{told}");
        assert!(told.contains("is not in this store"), "{told}");
        assert_eq!(bench.traces(volume_id, &volume).await, traces);
    }
    for (record, expected, _) in made {
        catalog.create(&record).await.unwrap();
        assert!(bench.restored(record.backup_id).await == expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_damage_is_found_by_verify_and_by_restore_and_harms_no_other_point() {
    for case in
        ["byte", "hole", "added", "snapshot", "image", "digests cut", "digests flipped", "digests gone"]
    {
        let bench = Bench::new();
        let (volume_id, volume) = bench.volume(16 * MIB);
        let source = location("main", volume.spec());
        volume.write(&[(0, &noise(1, 3 << 20)), (8 * MIB, &noise(2, 1 << 20))]);
        let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
        let at_full = volume.read();
        volume.write(&[(9 * MIB, &noise(3, 100_000))]);
        let second = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
        let image = base(&second);
        let object = |number| bench.main.existing(&image).object(number);
        // Past Ceph's back: the object of the newest snapshot itself.
        let put = |number: u64, bytes: &[u8]| {
            let file = bench.file("object", bytes);
            bench.main.rados(&["-p", "backups", "put", &object(number), file.to_str().unwrap()]);
        };
        let list = Folder::own("digests").object(&second.object_digests[0].0).unwrap();
        let bytes = bench.store.get(&list).await.unwrap().collect(&list, 1 << 20).await.unwrap().to_vec();
        let mut others_whole = true;
        let expected = match case {
            "byte" => {
                let mut bytes = noise(3, 100_000);
                bytes.splice(..0, noise(2, 1 << 20));
                bytes[(1 << 20) + 70_000] ^= 1;
                put(2, &bytes);
                "is not the one that was backed up"
            }
            "hole" => {
                bench.main.rados(&["-p", "backups", "rm", &object(2)]);
                "is not the one that was backed up"
            }
            "added" => {
                // Where there was nothing; librbd's own way, so that the object map knows it.
                bench.main.rbd(&[
                    "snap",
                    "rm",
                    "--no-progress",
                    &format!("{image}@{}", bench.snapshots(&image)[1]),
                ]);
                bench.main.existing(&image).write(&[(15 * MIB, &noise(7, 4096))]);
                let name = &bench.snapshots(volume.spec())[1];
                bench.main.rbd(&["snap", "create", "--no-progress", &format!("{image}@{name}")]);
                "is not the one that was backed up"
            }
            "snapshot" => {
                bench.main.rbd(&[
                    "snap",
                    "rm",
                    "--no-progress",
                    &format!("{image}@{}", bench.snapshots(&image)[1]),
                ]);
                "is missing"
            }
            "image" => {
                bench.main.rbd(&["snap", "purge", "--no-progress", &image]);
                bench.main.rbd(&["rm", "--no-progress", &image]);
                others_whole = false;
                "is missing"
            }
            "digests cut" => {
                bench.store.replace(&list, bytes[..bytes.len() - 20].to_vec().into()).await.unwrap();
                "is cut short"
            }
            "digests flipped" => {
                let mut bytes = bytes.clone();
                bytes[60] ^= 4;
                bench.store.replace(&list, bytes.into()).await.unwrap();
                "digests"
            }
            "digests gone" => {
                bench.store.delete(&list).await.unwrap();
                "is missing"
            }
            _ => unreachable!(),
        };
        let target = bench.folder.path().join("damaged");
        for error in [
            verify(&bench.engine, second.backup_id).await.map(drop).unwrap_err(),
            bench.restore(second.backup_id, &Location::File(target.clone())).await.map(drop).unwrap_err(),
        ] {
            let text = Problem::new(error.class(), &error).to_string();
            assert!(text.contains(expected), "{case}: {text}");
        }
        assert!(!target.exists(), "{case}");
        if others_whole {
            verify(&bench.engine, full.backup_id).await.unwrap();
            assert!(bench.restored(full.backup_id).await == at_full, "{case}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_damage_of_a_list_of_digests_in_the_pool_is_found_and_all_is_whole_when_it_is_mended() {
    let bench = Bench::in_the_pool(Settings { checkpoint_bytes: u64::MAX, ..settings() });
    let (volume_id, volume) = bench.volume(40 * MIB);
    volume.write(&[(0, &noise(1, 40 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let [(list, _)] = &full.object_digests[..] else { panic!("{:?}", full.object_digests) };
    let rados = |arguments: &[&str]| bench.main.rados(&[&["-p", "backups"], arguments].concat());
    // It has more than fits into the index of its folder.
    let parts = bench.main.names_with("backups", &[&format!(".backhaul/digests/{list}/.")]);
    let ([part], index) = (&parts[..], ".backhaul/digests/.index") else { panic!("{parts:?}") };
    let [whole, entry_file, flipped] =
        ["whole", "entry", "flipped"].map(|name| bench.folder.path().join(name).display().to_string());
    rados(&["get", part, &whole]);
    rados(&["getomapval", index, list, &entry_file]);
    let (entry, mut bytes) = (fs::read_to_string(&entry_file).unwrap(), fs::read(&whole).unwrap());
    bytes[10_000] ^= 1;
    fs::write(&flipped, &bytes).unwrap();
    let shorter = entry.replacen(&bytes.len().to_string(), "10000", 1);

    for (damage, expected) in [
        (&["truncate", part, "10000"][..], "is too short"),
        (&["put", part, &flipped][..], "its SHA-256 is not the one in the record"),
        (&["rm", part][..], "is missing"),
        (&["setomapval", index, list, &shorter][..], "it is cut short"),
        (&["rmomapkey", index, list][..], "is missing"),
    ] {
        rados(damage);

        let target = bench.folder.path().join("damaged");
        for error in [
            verify(&bench.engine, full.backup_id).await.map(drop).unwrap_err(),
            bench.restore(full.backup_id, &Location::File(target.clone())).await.map(drop).unwrap_err(),
        ] {
            let text = Problem::new(error.class(), &error).to_string();
            assert!(text.contains(expected) && text.contains(list.as_str()), "{damage:?}: {text}");
            assert_eq!(error.class(), Class::Permanent, "{text}");
        }
        assert!(!target.exists(), "{damage:?}");

        rados(&["put", part, &whole]);
        rados(&["setomapval", index, list, &entry]);
        verify(&bench.engine, full.backup_id).await.unwrap();
    }
    assert!(bench.restored(full.backup_id).await == volume.read());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_leaves_no_image_no_snapshot_and_no_object() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(128 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(MIB, &noise(1, 1 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let at_full = volume.read();
    // More than is read at once: of a job all of whose reads are under way nobody sees how far it is.
    volume.write(&[(0, &noise(2, 128 << 20))]);
    volume.snapshot("named");
    volume.slow_down(24 * MIB);
    let named = location("main", &format!("{}@named", volume.spec()));
    let before = bench.traces(volume_id, &volume).await;

    for (source, parent) in [(&source, Parent::None), (&source, Parent::Latest), (&named, Parent::None)] {
        let job = backup_job_of(volume_id, source.clone(), parent);
        // There is a checkpoint by then.
        assert_eq!(bench.cancel_after(&job, 12 * MIB).await, Outcome::Cancelled);
        assert_eq!(bench.traces(volume_id, &volume).await, before, "{source} {parent:?}");
    }
    volume.hurry();
    verify(&bench.engine, full.backup_id).await.unwrap();
    assert!(bench.restored(full.backup_id).await == at_full);
    let next = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    assert!(bench.restored(next.backup_id).await == volume.read());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_restore_leaves_nothing_new_and_can_be_done_again() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(64 * MIB);
    volume.write(&[(0, &noise(1, 64 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let before = bench.traces(volume_id, &volume).await;
    let old = bench.main.image("volumes", 64 * MIB);
    old.write(&[(0, &noise(2, 4096))]);
    let new = format!("restored-{}", full.backup_id);
    let file = bench.folder.path().join(&new);
    let names =
        || fs::read_dir(bench.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    let files = names();
    let images =
        || bench.images("volumes").into_iter().filter(|name| name.contains(&new)).collect::<Vec<_>>();
    let base = bench.main.existing(&base(&full));

    for target in [
        location("main", &format!("volumes/{new}")),
        location("main", old.spec()),
        Location::File(file.clone()),
    ] {
        base.slow_down(12 * MIB);
        let job = restore_job(full.backup_id, &target);
        assert_eq!(bench.cancel_after(&job, 12 * MIB).await, Outcome::Cancelled);
        assert_eq!((images(), names()), (Vec::<String>::new(), files.clone()), "{target}");
        assert_eq!(bench.snapshots(old.spec()), Vec::<String>::new());
        assert_eq!(bench.traces(volume_id, &volume).await, before);

        base.hurry();
        assert_eq!(bench.complete(&restore_job(full.backup_id, &target)).await.outcome, Outcome::Succeeded);
        let restored = match &target {
            Location::File(path) => fs::read(path).unwrap(),
            Location::Rbd(image) => bench.export(&format!("{}/{}", image.pool, image.image)),
        };
        assert!(restored == volume.read(), "{target}");
        if images() == [new.clone()] {
            bench.main.rbd(&["rm", "--no-progress", &format!("volumes/{new}")]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_grows_and_ends_with_the_whole_volume() {
    let bench = Bench::new();
    // More than is read side by side several times over, which may all be there at the same moment.
    let volume_bytes = 176 * MIB + 512;
    let (volume_id, volume) = bench.volume(volume_bytes);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 128 << 20)), (150 * MIB, &noise(2, 4 << 20))]);
    let full = backup_job_of(volume_id, source.clone(), Parent::None);
    let incremental = backup_job_of(volume_id, source, Parent::Latest);
    let target = location("main", &format!("volumes/restored-{}", full.backup_id()));
    let restore = restore_job(full.backup_id(), &target);
    let check = job(Work::Verify(incremental.backup_id().into()));

    for job in [&full, &incremental, &restore, &check] {
        volume.slow_down(64 * MIB);
        if matches!(job.work, Work::Restore(_)) {
            bench.main.existing(&base(&bench.record(full.backup_id()).await)).slow_down(64 * MIB);
        }
        let (ctx, sink) = (Context::default(), Recorder::default());
        let ended = bench.end_in(&ctx, job, 1, &sink).await;

        let Ended::Over(completion) = ended else { panic!("{ended:?}") };
        assert_eq!(completion.outcome, Outcome::Succeeded);
        // Before that it is not known how much there is to do.
        let known = |reading: &Reading| reading.bytes_total > 0;
        let readings: Vec<Reading> =
            sink.readings().into_iter().filter(known).chain([ctx.progress.read()]).collect();
        let told = format!("{} {readings:?}", job.operation());
        assert!(readings.iter().all(|reading| reading.bytes_total == volume_bytes), "{told}");
        assert!(readings.is_sorted_by_key(|reading| reading.bytes_done), "{told}");
        assert!(readings.is_sorted_by_key(|reading| reading.counts.bytes_read), "{told}");
        let steps: BTreeSet<u64> = readings.iter().map(|reading| reading.bytes_done).collect();
        assert!(steps.len() > 3, "{told}");
        assert_eq!(steps.last(), Some(&volume_bytes), "{told}");
        let counts = completion.account.counts;
        assert_eq!(
            counts.bytes_read + counts.bytes_hole + counts.bytes_unchanged,
            volume_bytes,
            "{counts:?}"
        );
        volume.hurry();
        volume.write(&[(MIB, &noise(3, 128 << 20))]);
    }
    bench.main.rbd(&["rm", "--no-progress", &format!("volumes/restored-{}", full.backup_id())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn zeros_that_were_written_are_neither_stored_nor_restored() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(32 * MIB);
    let source = location("main", volume.spec());
    // Half of each object, and 4 KiB in each 64 KiB.
    let pages: Vec<u64> = (0..64).map(|number| 16 * MIB + number * 65536).collect();
    // As a client does that does not look at what it writes; `rbd` does.
    let write_zeros = async |offset: u64, length: usize| {
        let pool = bench.clusters.connect(Some("main")).unwrap().pool("volumes").unwrap();
        let name = volume.spec().strip_prefix("volumes/").unwrap();
        let image = pool.open_image(name, None, OpenMode::Write).unwrap();
        image.write(offset, vec![0; length].into()).await.unwrap();
    };
    write_zeros(0, 32 << 20).await;
    for number in 0..4 {
        volume.write(&[(number * 4 * MIB, &noise(number + 1, 2 << 20))]);
    }
    let write_pages = |page: &[u8]| {
        volume.write(&pages.iter().map(|offset| (*offset, page)).collect::<Vec<_>>());
    };
    write_pages(&noise(9, 4096));
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let at_full = volume.read();
    assert_eq!(full.counts.bytes_stored, (8 << 20) + 64 * 4096, "{:?}", full.counts);
    assert_eq!(full.counts.bytes_read, 32 << 20);
    assert_eq!(full.counts.bytes_zero, full.counts.bytes_read - full.counts.bytes_stored);

    // Zeros over data: they must be seen, and take no room.
    write_zeros(MIB, 1 << 20).await;
    write_pages(&noise(10, 4096));
    let next = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    assert_eq!(next.counts.bytes_stored, 64 * 4096, "{:?}", next.counts);
    assert_eq!(next.counts.bytes_zero, 1 << 20, "{:?}", next.counts);
    for (record, bytes) in [(&full, &at_full), (&next, &volume.read())] {
        verify(&bench.engine, record.backup_id).await.unwrap();
        let file = bench.folder.path().join("sparse");
        bench.restore(record.backup_id, &Location::File(file.clone())).await.unwrap();
        assert!(fs::read(&file).unwrap() == *bytes);
        let used_bytes = fs::metadata(&file).unwrap().blocks() * 512;
        assert!(used_bytes <= 9 << 20, "{used_bytes}");
        fs::remove_file(file).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn small_writes_to_holes_are_stored_as_small_as_they_are() {
    const PAGE_BYTES: u64 = 4096;
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(128 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 1 << 20))]);
    bench.backup(volume_id, &source, Parent::None).await.unwrap();
    // One in each object but the first.
    let pages: Vec<_> =
        (1..32).map(|number| (number * 4 * MIB + number * 31 * PAGE_BYTES, noise(number, 4096))).collect();
    volume.write(&pages.iter().map(|(offset, page)| (*offset, &**page)).collect::<Vec<_>>());
    let pages_bytes = pages.len() as u64 * PAGE_BYTES;

    let incremental = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();

    // Ceph tells more than that: all from the beginning of each object.
    assert!(incremental.counts.bytes_read > 16 * pages_bytes, "{:?}", incremental.counts);
    assert_eq!(incremental.counts.bytes_stored, pages_bytes, "{:?}", incremental.counts);
    assert_eq!(full.counts.bytes_stored, MIB + pages_bytes, "{:?}", full.counts);
    let bytes = volume.read();
    for record in [&incremental, &full] {
        verify(&bench.engine, record.backup_id).await.unwrap();
        let target = format!("volumes/restored-{}", record.backup_id);
        let receipt = bench.restore(record.backup_id, &location("main", &target)).await.unwrap();
        assert_eq!(receipt.counts.bytes_written, MIB + pages_bytes, "{:?}", receipt.counts);
        assert!(bench.export(&target) == bytes);
        bench.main.rbd(&["rm", "--no-progress", &target]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_point_of_a_chain_takes_no_more_room_in_the_pool_or_on_a_target_than_on_the_volume() {
    let bench = Bench::new();
    // What Ceph has objects for.
    let used = |spec: &str| -> u64 {
        let extents = bench.main.rbd(&["diff", "--whole-object", "--format", "json", spec]);
        let extents: serde_json::Value = serde_json::from_str(&extents).unwrap();
        extents.as_array().unwrap().iter().map(|extent| extent["length"].as_u64().unwrap()).sum()
    };
    let (volume_id, volume) = bench.volume(48 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 8 << 20)), (21 * MIB, &noise(2, 1 << 20))]);
    let mut points = Vec::new();
    for (number, expected) in [12 * MIB, 12 * MIB, 8 * MIB].into_iter().enumerate() {
        match number {
            1 => {
                volume.discard(0, 4 * MIB);
                volume.write(&[(36 * MIB, &noise(3, 4 << 20))]);
            }
            2 => volume.discard(36 * MIB, 4 * MIB),
            _ => {}
        }
        let parent = if number == 0 { Parent::None } else { Parent::Latest };
        points.push((bench.backup(volume_id, &source, parent).await.unwrap(), volume.read(), expected));
    }

    let junk = noise(9, 52 << 20);
    for (record, bytes, expected) in &points {
        let snapshot = record.source.as_ref().unwrap().image.snapshot.as_ref().unwrap();
        assert_eq!(used(&format!("{}@{snapshot}", volume.spec())), *expected);
        assert_eq!(used(&format!("{}@{snapshot}", base(record))), *expected, "in the pool");
        let new = format!("volumes/restored-{}", record.backup_id);
        bench.restore(record.backup_id, &location("main", &new)).await.unwrap();
        assert_eq!(used(&new), *expected, "a new image");
        assert!(bench.export(&new) == *bytes);
        bench.main.rbd(&["rm", "--no-progress", &new]);
        let full = bench.main.image("volumes", 52 * MIB);
        full.write(&[(0, &junk)]);
        bench.restore(record.backup_id, &location("main", full.spec())).await.unwrap();
        assert_eq!(used(full.spec()), *expected, "an image that was full");
        let file = bench.folder.path().join("sparse");
        bench.restore(record.backup_id, &Location::File(file.clone())).await.unwrap();
        assert!(fs::metadata(&file).unwrap().blocks() * 512 <= *expected, "a file");
        fs::remove_file(file).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_backed_up_with_what_it_has_of_its_parent() {
    let bench = Bench::new();
    let (_, original) = bench.volume(24 * MIB);
    original.write(&[(0, &noise(1, 10 << 20)), (20 * MIB, &noise(2, 100_000))]);
    let (_, between) = bench.volume(24 * MIB);
    let (volume_id, volume) = bench.volume(24 * MIB);
    for (from, to) in [(&original, &between), (&between, &volume)] {
        let snapshot = format!("{}@golden", from.spec());
        from.snapshot("golden");
        bench.main.rbd(&["snap", "protect", &snapshot]);
        bench.main.rbd(&["rm", "--no-progress", to.spec()]);
        bench.main.rbd(&["clone", &snapshot, to.spec()]);
        // Something of its own, over what it has of the one before, and behind that.
        to.write(&[(MIB, &noise(3, 4096)), (15 * MIB, &noise(4, 70_000))]);
    }
    let source = location("main", volume.spec());
    let mut points = Vec::new();
    for change in ["none", "written", "flattened"] {
        match change {
            "written" => {
                volume.write(&[(2 * MIB - 100, &noise(5, 5000)), (13 * MIB, &noise(6, 5000))]);
                volume.discard(4 * MIB, 4 * MIB);
            }
            "flattened" => {
                bench.main.rbd(&["flatten", "--no-progress", volume.spec()]);
                volume.write(&[(9 * MIB, &noise(7, 10))]);
            }
            _ => {}
        }
        let parent = if change == "none" { Parent::None } else { Parent::Latest };
        let (record, method, reason) = bench.backup_somehow(volume_id, &source, parent).await;
        let expected = if change == "none" { "rbd full" } else { "rbd incremental" };
        assert_eq!((method.as_str(), reason), (expected, None), "{change}");
        points.push((record, volume.read()));
    }
    assert!(points[0].1[..1 << 20] == noise(1, 1 << 20)[..], "it has its bytes of the first one");
    volume.snapshot("named");
    let named = location("main", &format!("{}@named", volume.spec()));
    let (copy, method, _) = bench.backup_somehow(volume_id, &named, Parent::None).await;
    assert_eq!(method, "copy full");
    points.push((copy, volume.read()));
    for (record, bytes) in &points {
        verify(&bench.engine, record.backup_id).await.unwrap();
        assert!(bench.restored(record.backup_id).await == *bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diff_that_librbd_refuses_leads_to_a_full_one_and_then_to_a_full_copy() {
    let bench = Bench::on(Ceph::start_with(&[]), settings());
    let (volume_id, volume) = bench.volume(16 * MIB);
    // Without a map of its objects each of them is asked for what differs.
    let features = ["fast-diff", "object-map"];
    bench.main.rbd(&[["feature", "disable", volume.spec()].as_slice(), &features].concat());
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 9 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let at_full = volume.read();
    volume.write(&[(5 * MIB, &noise(2, 100_000))]);
    bench.main.forget_clone_sizes(&volume.object(1));

    let job = backup_job_of(volume_id, source.clone(), Parent::Latest);
    let sink = Recorder::default();
    let ended = bench.end_in(&Context::default(), &job, 1, &sink).await;

    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    assert_eq!(completion.outcome, Outcome::Succeeded);
    let fell_back = |happening: &Happening| match happening {
        Happening::FellBack { from, to, reason } => Some((format!("{from} to {to}"), reason.clone())),
        _ => None,
    };
    let told: Vec<_> = sink.0.lock().unwrap().iter().filter_map(fell_back).collect();
    let [(first, first_reason), (second, second_reason)] = &told[..] else { panic!("{told:?}") };
    assert_eq!((&**first, &**second), ("rbd incremental to rbd full", "rbd full to copy full"));
    for reason in [first_reason, second_reason] {
        assert!(reason.to_string().contains("find what has changed in image"), "{reason}");
    }
    let record = bench.record(job.backup_id()).await;
    assert_eq!(record.method.unwrap().to_string(), "copy full");
    assert_eq!(record.parent_id, None);
    // Why it is not an incremental one, which it was to be.
    assert_eq!(completion.account.fallback_reason.as_ref(), Some(first_reason));
    assert_eq!(record.fallback_reason.as_ref(), Some(first_reason));
    verify(&bench.engine, record.backup_id).await.unwrap();
    assert!(bench.restored(record.backup_id).await == volume.read());
    assert!(bench.restored(full.backup_id).await == at_full);
    assert_eq!(bench.snapshots(volume.spec()).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_device_is_copied_and_restored_onto() {
    let mut bytes = vec![0; 24 << 20];
    bytes[5 << 20..8 << 20].copy_from_slice(&noise(1, 3 << 20));
    let old = noise(2, 32 << 20);
    let (source, target) = (BlockDevice::holding(&bytes), BlockDevice::holding(&old));
    let small = BlockDevice::holding(&[1; 8 << 20]);
    let bench = Bench::new();
    let from_device = Location::File(source.path().into());
    let (copy, method, reason) = bench.backup_somehow(VolumeId::random(), &from_device, Parent::None).await;
    assert_eq!((method.as_str(), reason), ("copy full", None));
    assert_eq!((copy.volume_bytes, copy.counts.bytes_stored), (24 << 20, 3 << 20));
    assert!(bench.restored(copy.backup_id).await == bytes);
    let (volume_id, volume) = bench.volume(20 * MIB + 512);
    volume.write(&[(MIB, &noise(3, 70_000))]);
    let image = location("main", volume.spec());
    bench.backup(volume_id, &image, Parent::None).await.unwrap();
    volume.write(&[(20 * MIB - 100, &noise(4, 612))]);
    let incremental = bench.backup(volume_id, &image, Parent::Latest).await.unwrap();

    let onto = |device: &BlockDevice| Location::File(device.path().into());
    // As somebody does who has it mounted.
    let exclusively = rustix::fs::OFlags::EXCL.bits() as i32;
    let user = fs::OpenOptions::new().read(true).custom_flags(exclusively).open(target.path()).unwrap();
    for (device, expected) in [(&target, "in use"), (&small, "smaller than the backup")] {
        let error = bench.restore(copy.backup_id, &onto(device)).await.unwrap_err();
        let told = Problem::new(error.class(), &error).to_string();
        assert!(told.contains(expected), "{told}");
    }
    assert!(fs::read(target.path()).unwrap() == old);
    assert!(fs::read(small.path()).unwrap() == [1; 8 << 20]);
    drop(user);
    for (record, bytes) in [(&copy, bytes), (&incremental, volume.read())] {
        bench.restore(record.backup_id, &onto(&target)).await.unwrap();
        // What is behind the end of the backup stays.
        let restored = fs::read(target.path()).unwrap();
        assert!(restored[..bytes.len()] == bytes);
        assert!(restored[24 << 20..] == old[24 << 20..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_run_again_takes_over_what_the_dead_one_left() {
    let bench = Bench::with(Settings { checkpoint_bytes: u64::MAX, ..settings() });
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 64 << 20))]);
    for parent in [Parent::None, Parent::Latest] {
        let job = backup_job_of(volume_id, source.clone(), parent);
        bench.die_in_the_middle_of(&job).await;
        volume.write(&[(7 * MIB, &noise(2, 20 << 20))]);
        let completion = bench.complete(&job).await;
        assert_eq!(completion.outcome, Outcome::Succeeded);
        assert_eq!(completion.account.fallback_reason, None);
        assert!(bench.restored(job.backup_id()).await == volume.read());
        volume.write(&[(30 * MIB, &noise(3, 30 << 20))]);
    }
    assert_eq!(bench.snapshots(volume.spec()).len(), 2);
    let image = base(&bench.engine.catalog().records().await.unwrap().records[0]);
    assert_eq!(bench.snapshots(&image), bench.snapshots(volume.spec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metadata_that_a_dead_attempt_left_does_not_stop_the_next_one() {
    let bench = Bench::with(Settings { checkpoint_bytes: u64::MAX, ..settings() });
    let (volume_id, volume) = bench.volume(64 * MIB);
    volume.write(&[(0, &noise(1, 64 << 20))]);
    let mut job = backup_job_of(volume_id, location("main", volume.spec()), Parent::None);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    work.volume_meta = Some("{}".into());
    bench.die_in_the_middle_of(&job).await;
    // It may have died after it had written this, and the volume may have been renamed since.
    let metadata = bench.file("metadata", b"{\"name\": \"old\"}");
    let object = format!("backup.{}.meta", job.backup_id());
    bench.main.rados(&["-p", "backups", "put", &object, metadata.to_str().unwrap()]);
    assert_eq!(bench.complete(&job).await.outcome, Outcome::Succeeded);
    assert_eq!(bench.main.rados(&["-p", "backups", "get", &object, "-"]), "{}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_for_want_of_its_pool_can_be_deleted() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(0, &noise(1, 4096))]);
    let mut job = backup_job_of(volume_id, location("main", volume.spec()), Parent::None);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    work.container = Some("no-such-pool".parse().unwrap());
    let Outcome::Failed(problem) = bench.complete(&job).await.outcome else { panic!("it has no pool") };
    assert!(problem.to_string().contains("no-such-pool"), "{problem}");
    delete(&bench.engine, job.backup_id()).await.unwrap();
    assert!(bench.engine.catalog().record(job.backup_id()).await.unwrap().is_none());
    assert!(bench.snapshots(volume.spec()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_job_never_comes_back_is_deleted_and_harms_no_other() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 64 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let images = || {
        let own = |image: &String| image.contains(&volume_id.to_string());
        bench.images("backups").into_iter().filter(own).collect::<Vec<_>>()
    };
    let (before, snapshots) = (images(), bench.snapshots(volume.spec()));
    let point = volume.read();
    volume.write(&[(7 * MIB, &noise(2, 48 << 20))]);
    for parent in [Parent::None, Parent::Latest] {
        let job = backup_job_of(volume_id, source.clone(), parent);
        // Its worker is killed, and its message is lost.
        bench.die_in_the_middle_of(&job).await;
        delete(&bench.engine, job.backup_id()).await.unwrap();
        assert!(bench.engine.catalog().record(job.backup_id()).await.unwrap().is_none());
        assert_eq!(images(), before);
        assert_eq!(bench.snapshots(volume.spec()), snapshots);
        assert_eq!(bench.snapshots(&base(&full)), snapshots);
        let objects = bench.main.rados(&["-p", "backups", "ls"]);
        assert!(!objects.contains(&job.backup_id().to_string()), "{objects}");
    }
    verify(&bench.engine, full.backup_id).await.unwrap();
    assert!(bench.restored(full.backup_id).await == point);
}

#[rstest]
#[case::begins_anew(u64::MAX)]
#[case::goes_on_where_the_other_one_stopped(8 * MIB)]
#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_was_taken_over_harms_nothing_of_the_one_that(#[case] checkpoint_bytes: u64) {
    let bench = Bench::with(Settings { checkpoint_bytes, ..settings() });
    // More than is under way at once.
    let (volume_id, volume) = bench.volume(96 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 96 << 20))]);
    for parent in [Parent::None, Parent::Latest] {
        let first = Bench::beside(
            bench.store.clone(),
            Ceph::shared(),
            Settings { checkpoint_bytes, ..settings() },
            2,
        );
        let job = backup_job_of(volume_id, source.clone(), parent);
        let ctx = Context::default();
        let engine = first.engine.clone();
        let (task_ctx, task_job, method) = (ctx.clone(), job.clone(), first.methods(&job)[0]);
        // With room for two pieces at a time it is in no hurry.
        let little = 8 << 20;
        let most = first.memory.reserve(MEMORY_BYTES - little).await;
        let overtaken = tokio::spawn(async move { engine.run(&task_ctx, &task_job, method).await });
        while ctx.progress.read().counts.bytes_stored < 9 * MIB {
            assert!(!overtaken.is_finished());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // It stands still in the middle, with the image's lock, and believes in itself.
        let held = (first.memory.reserve(little).await, most);
        assert!(!overtaken.is_finished());
        let completion = loop {
            match bench.end(&job, 2).await {
                Ended::Over(completion) => break completion,
                // The other one was just about to note how far it is.
                Ended::Later(problem) => assert!(problem.message.contains("taken over"), "{problem}"),
                ended => panic!("{ended:?}"),
            }
        };
        assert_eq!(completion.outcome, Outcome::Succeeded);
        let (snapshots, expected) = (bench.snapshots(volume.spec()), bench.restored(job.backup_id()).await);
        assert!(expected == volume.read());

        drop(held);
        let error = overtaken.await.unwrap().unwrap_err();

        assert_eq!(error.class(), Class::Transient, "{error:?}");
        verify(&bench.engine, job.backup_id()).await.unwrap();
        assert!(bench.restored(job.backup_id()).await == expected);
        assert_eq!(bench.snapshots(volume.spec()), snapshots);
        volume.write(&[(0, &noise(3, 96 << 20))]);
    }
    // Nothing is left of the ones that were taken over.
    for record in bench.engine.catalog().records().await.unwrap().records.into_iter().rev() {
        delete(&bench.engine, record.backup_id).await.unwrap();
    }
    assert!(bench.store.list(&Folder::own("digests"), "").await.unwrap().is_empty());
    assert_eq!(bench.snapshots(volume.spec()), Vec::<String>::new());
    assert!(!bench.images("backups").iter().any(|image| image.contains(&volume_id.to_string())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_removed_while_it_is_read_makes_no_backup() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(32 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 32 << 20))]);
    volume.snapshot("named");
    let named = location("main", &format!("{}@named", volume.spec()));
    for source in [&named, &source] {
        let job = backup_job_of(volume_id, source.clone(), Parent::None);
        let held = bench.memory.reserve(MEMORY_BYTES).await;
        let is_named = source == &named;
        let (result, ()) = tokio::join!(bench.run(&job), async {
            // The engine has begun when the snapshot of the backup, or the image that it goes to, is there.
            let begun = || match is_named {
                true => bench.images("backups").iter().any(|i| i.contains(&job.backup_id().to_string())),
                false => bench.snapshots(volume.spec()).len() == 1,
            };
            while !begun() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            bench.main.rbd(&["snap", "purge", "--no-progress", volume.spec()]);
            volume.write(&[(MIB, &noise(2, 20 << 20))]);
            drop(held);
        });
        let error = result.unwrap_err();
        assert_eq!(error.class(), Class::Transient, "{error:?}");
        let told = Problem::new(error.class(), &error).to_string();
        assert!(told.contains("removed while it was read"), "{told}");
        let record = bench.record(job.backup_id()).await;
        assert!(matches!(record.state, RecordState::Creating(_)), "{:?}", record.state);
        if !is_named {
            assert_eq!(bench.complete(&job).await.outcome, Outcome::Succeeded);
            assert!(bench.restored(job.backup_id()).await == volume.read());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_whose_snapshot_is_removed_while_it_is_compared_with_is_not_built_on() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(32 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 4 << 20)), (16 * MIB, &noise(2, 1 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let at_full = volume.read();
    let of_parent = format!("{}@{}", volume.spec(), bench.snapshots(volume.spec()).remove(0));
    volume.discard(0, 4 * MIB);
    volume.write(&[(17 * MIB, &noise(3, 1 << 20))]);
    let job = backup_job_of(volume_id, source, Parent::Given(full.backup_id));
    let (ctx, sink) = (Context::default(), Recorder::default());
    let held = bench.memory.reserve(MEMORY_BYTES).await;
    let (ended, ()) = tokio::join!(bench.end_in(&ctx, &job, 1, &sink), async {
        // What was discarded needs no memory: once that is done, the two have been compared.
        while ctx.progress.read().bytes_done == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        bench.main.rbd(&["snap", "rm", "--no-progress", &of_parent]);
        drop(held);
    });
    let Ended::Over(completion) = ended else { panic!("{ended:?}") };
    assert_eq!(completion.outcome, Outcome::Succeeded);
    assert_eq!(completion.account.method.unwrap().to_string(), "rbd full");
    let reason = completion.account.fallback_reason.unwrap().to_string();
    assert!(reason.contains("was removed while the volume was compared with it"), "{reason}");
    for (id, expected) in [(full.backup_id, at_full), (job.backup_id(), volume.read())] {
        verify(&bench.engine, id).await.unwrap();
        assert!(bench.restored(id).await == expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_removed_while_it_is_restored_is_an_error() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(32 * MIB);
    volume.write(&[(8 * MIB, &noise(1, 24 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    // As one of Cinder's, without digests, which would tell.
    let record = Record { object_digests: Vec::new(), digest: None, ..full.clone() };
    overwrite(&bench.engine, &record).await;
    let target = bench.folder.path().join("target");
    let work =
        RestoreWork { backup_id: full.backup_id, target: Location::File(target.clone()), volume_id: None };
    let (ctx, job) = (Context::default(), job(Work::Restore(work)));
    let held = bench.memory.reserve(MEMORY_BYTES).await;
    let (result, ()) = tokio::join!(bench.engine.run(&ctx, &job, bench.methods(&job)[0]), async {
        // The hole at the beginning needs no memory.
        while ctx.progress.read().bytes_done == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        bench.main.rbd(&["snap", "purge", "--no-progress", &base(&full)]);
        drop(held);
    });
    let error = result.unwrap_err();
    let told = Problem::new(error.class(), &error).to_string();
    assert!(told.contains("removed while it was read"), "{told}");
    assert!(!target.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_snapshots_of_backups_that_are_being_made_are_not_trimmed() {
    let bench = Bench::with(Settings { source_snapshots_max: 1, ..settings() });
    let (volume_id, volume) = bench.volume(16 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 16 << 20))]);
    let at_first = volume.read();
    let slow = Bench::beside(
        bench.store.clone(),
        Ceph::shared(),
        Settings { source_snapshots_max: 1, ..settings() },
        60,
    );
    let job = backup_job_of(volume_id, source.clone(), Parent::None);
    let held = slow.memory.reserve(MEMORY_BYTES).await;
    let (result, ()) = tokio::join!(slow.run(&job), async {
        while bench.snapshots(volume.spec()).is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for seed in 2..4 {
            volume.write(&[(MIB, &noise(seed, 1 << 20))]);
            bench.backup(volume_id, &source, Parent::None).await.unwrap();
        }
        assert_eq!(bench.snapshots(volume.spec()).len(), 2);
        drop(held);
    });
    result.unwrap();
    assert!(bench.restored(job.backup_id()).await == at_first);
    assert_eq!(bench.snapshots(volume.spec()).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_cannot_go_keeps_no_other_from_being_trimmed() {
    let bench = Bench::with(Settings { source_snapshots_max: 1, ..settings() });
    let (volume_id, volume) = bench.volume(8 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 1 << 20))]);
    bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let oldest = bench.snapshots(volume.spec()).remove(0);
    bench.main.rbd(&["snap", "protect", &format!("{}@{oldest}", volume.spec())]);
    for _ in 0..2 {
        let newest = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
        let snapshots = bench.snapshots(volume.spec());
        assert_eq!(snapshots, [oldest.clone(), newest.source.unwrap().image.snapshot.unwrap()]);
    }
    bench.main.rbd(&["snap", "unprotect", &format!("{}@{oldest}", volume.spec())]);
    bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    assert_eq!(bench.snapshots(volume.spec()).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_a_lock_is_backed_up_and_restored_onto() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(MIB, &noise(1, 1 << 20))]);
    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let name = format!("volumes/plain-{}", full.backup_id);
    bench.main.rbd(&["create", "--size", "8M", "--image-feature", "layering", &name]);
    let plain = bench.main.existing(&name);
    plain.write(&[(3 * MIB, &noise(2, 1 << 20))]);
    bench.restore(full.backup_id, &location("main", &name)).await.unwrap();
    assert!(plain.read() == volume.read());

    let plain_id = VolumeId::random();
    for parent in [Parent::None, Parent::Latest] {
        let (record, _, reason) = bench.backup_somehow(plain_id, &location("main", &name), parent).await;
        assert_eq!(reason, None, "{parent:?}");
        assert!(bench.restored(record.backup_id).await == volume.read());
    }
    bench.main.rbd(&["snap", "purge", "--no-progress", &name]);
    bench.main.rbd(&["rm", "--no-progress", &name]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_of_a_backup_is_found_again_when_there_are_more_clusters() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB);
    volume.write(&[(MIB, &noise(1, 1 << 20))]);
    let access = Access { conf: bench.main.conf().into(), user: "cinder".into(), operation_seconds_max: 60 };
    let clusters = Clusters::new(BTreeMap::from([("main".into(), access)]));
    let cpu = Cpu::start(1).unwrap();
    let rbd = Rbd::new(bench.store.clone(), clusters.clone(), settings(), cpu, bench.memory.clone());
    let engine = Engine::new(rbd, Volumes { file_roots: FileRoots::new(&[]), clusters });
    let source = format!("rbd:{}", volume.spec()).parse().unwrap();
    let job = backup_job_of(volume_id, source, Parent::None);
    engine.run(&Context::default(), &job, bench.methods(&job)[0]).await.unwrap();
    assert_eq!(bench.snapshots(volume.spec()).len(), 1);

    delete(&bench.engine, job.backup_id()).await.unwrap();

    assert_eq!(bench.snapshots(volume.spec()), Vec::<String>::new());
}

#[rstest]
#[case::with_records_elsewhere(Bench::new())]
#[case::with_records_in_the_pool(Bench::in_the_pool(settings()))]
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_run_again_goes_on_from_its_last_checkpoint(#[case] bench: Bench) {
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 64 << 20))]);
    for parent in [Parent::None, Parent::Latest] {
        let at_first = volume.read();
        let mut job = backup_job_of(volume_id, source.clone(), parent);
        let Work::Backup(work) = &mut job.work else { unreachable!() };
        work.volume_meta = Some("{}".into());
        let ctx = Context::default();
        let checkpoint = tokio::select! {
            result = bench.engine.run(&ctx, &job, bench.methods(&job)[0]) => panic!("{result:?}"),
            checkpoint = bench.checkpoint_of(job.backup_id()) => checkpoint,
        };
        assert!(checkpoint.bytes_done >= 8 * MIB, "{checkpoint:?}");
        // It may have died after it had written this, and the volume may have been renamed since.
        let metadata = bench.file("metadata", b"{\"name\": \"old\"}");
        let object = format!("backup.{}.meta", job.backup_id());
        bench.main.rados(&["-p", "backups", "put", &object, metadata.to_str().unwrap()]);
        // What is written now is not of the backup: the snapshot is that of the first attempt.
        volume.write(&[(7 * MIB, &noise(2, 40 << 20))]);
        let completion = bench.complete(&job).await;
        assert_eq!(completion.outcome, Outcome::Succeeded);
        let counts = completion.account.counts;
        assert!(
            (checkpoint.bytes_done..=64 * MIB).contains(&counts.bytes_reused),
            "{checkpoint:?} {counts:?}"
        );
        assert!(bench.restored(job.backup_id()).await == at_first);
        assert_eq!(bench.main.rados(&["-p", "backups", "get", &object, "-"]), "{}");
        let record = bench.record(job.backup_id()).await;
        assert!(record.object_digests.len() > 1 && record.checkpoint.is_none());
        verify(&bench.engine, job.backup_id()).await.unwrap();
    }
    assert_eq!(bench.snapshots(volume.spec()).len(), 2);
    let records = bench.engine.catalog().records().await.unwrap().records.into_iter().rev();
    for record in records.filter(|record| record.volume_id == volume_id) {
        delete(&bench.engine, record.backup_id).await.unwrap();
        let lists = bench.store.list(&Folder::own("digests"), &record.backup_id.to_string()).await.unwrap();
        assert_eq!(lists, []);
    }
}

/// What the other one wrote below the checkpoint would show in this one, whose digests say otherwise, or none at all where
/// the parent is one of Cinder's.
#[rstest]
#[case::with_digests(false)]
#[case::on_one_of_cinders(true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_not_gone_on_with_when_another_one_wrote_into_its_chain_meanwhile(
    #[case] of_cinder: bool,
) {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 64 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    if of_cinder {
        overwrite(&bench.engine, &Record { object_digests: Vec::new(), digest: None, ..full.clone() }).await;
    }
    let given = Parent::Given(full.backup_id);
    volume.write(&[(4 * MIB, &noise(2, 60 << 20))]);
    let first = backup_job_of(volume_id, source.clone(), given);
    let ctx = Context::default();
    tokio::select! {
        result = bench.engine.run(&ctx, &first, bench.methods(&first)[0]) => panic!("{result:?}"),
        _ = bench.checkpoint_of(first.backup_id()) => {}
    }
    volume.write(&[(0, &noise(3, 6 << 20))]);
    let at_second = volume.read();
    let second = backup_job_of(volume_id, source, given);
    assert_eq!(bench.complete(&second).await.outcome, Outcome::Succeeded);
    volume.write(&[(2 * MIB, &noise(4, 1 << 20))]);

    let completion = bench.complete(&first).await;

    assert_eq!(completion.outcome, Outcome::Succeeded);
    assert_eq!(completion.account.counts.bytes_reused, 0);
    // It is of a new snapshot, as it was begun anew.
    for (id, expected) in [(first.backup_id(), volume.read()), (second.backup_id(), at_second)] {
        verify(&bench.engine, id).await.unwrap();
        assert!(bench.restored(id).await == expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_had_become_a_full_one_is_gone_on_with_as_such() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 64 << 20))]);
    bench.backup(volume_id, &source, Parent::None).await.unwrap();
    bench.main.rbd(&["snap", "purge", "--no-progress", volume.spec()]);
    let at_first = volume.read();
    let job = backup_job_of(volume_id, source, Parent::Latest);
    let [incremental, full, _] = bench.methods(&job)[..] else { panic!("{:?}", bench.methods(&job)) };
    let error = bench.engine.run(&Context::default(), &job, incremental).await.unwrap_err();
    let reason = Problem::new(error.class(), &error);
    let ctx = Context { fallback_reason: Some(reason.clone()), ..Context::default() };
    let checkpoint = tokio::select! {
        result = bench.engine.run(&ctx, &job, full) => panic!("{result:?}"),
        checkpoint = bench.checkpoint_of(job.backup_id()) => checkpoint,
    };
    volume.write(&[(0, &noise(2, 64 << 20))]);

    let completion = bench.complete(&job).await;

    assert_eq!(completion.outcome, Outcome::Succeeded);
    assert_eq!(completion.account.method, Some(full));
    let counts = completion.account.counts;
    assert!((checkpoint.bytes_done..=64 * MIB).contains(&counts.bytes_reused), "{checkpoint:?} {counts:?}");
    assert!(bench.restored(job.backup_id()).await == at_first);
    assert!(reason.to_string().contains("is gone"), "{reason}");
    assert_eq!(completion.account.fallback_reason.as_ref(), Some(&reason));
    assert_eq!(bench.record(job.backup_id()).await.fallback_reason, Some(reason));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_very_large_volume_has_no_more_checkpoints_than_its_record_can_name() {
    let bench = Bench::with(Settings { checkpoint_bytes: MIB, ..settings() });
    let (volume_id, volume) = bench.volume(32 << 30);
    volume.write(&[(0, &noise(1, 20 << 20))]);

    let full = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();

    // One for each 8 MiB, which is a 4,096th, and the rest.
    assert_eq!(full.object_digests.len(), 3, "{:?}", full.object_digests);
    verify(&bench.engine, full.backup_id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_died_at_the_end_of_a_volume_of_no_whole_blocks_is_not_taken_for_damage() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(8 * MIB + 512);
    volume.write(&[(MIB, &noise(1, 1 << 20)), (8 * MIB, &noise(2, 512))]);
    let point = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let target = format!("volumes/restored-{}", point.backup_id);
    let job = restore_job(point.backup_id, &location("main", &target));
    bench.run(&job).await.unwrap();
    // As it was after the last checkpoint: all is there but the name.
    let hidden = format!("{target}.backhaul-partial");
    bench.main.rbd(&["rename", &target, &hidden]);
    let restore = format!("{} {} {}", job.id, point.backup_id, point.writer);
    let checkpoint = Checkpoint { bytes_done: point.volume_bytes, counts: Counts::default() };
    for (key, value) in [("restore", restore), ("restored", serde_json::to_string(&checkpoint).unwrap())] {
        bench.main.rbd(&["image-meta", "set", &hidden, &format!("backhaul.{key}"), &value]);
    }

    let completion = bench.complete(&job).await;

    assert_eq!(completion.outcome, Outcome::Succeeded);
    assert_eq!(completion.account.counts.bytes_reused, point.volume_bytes);
    assert!(bench.export(&target) == volume.read());
    bench.main.rbd(&["rm", "--no-progress", &target]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_taken_over_goes_on_from_its_last_checkpoint() {
    let bench = Bench::new();
    // More than is under way at once.
    let (volume_id, volume) = bench.volume(112 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 80 << 20)), (100 * MIB, &noise(2, 12 << 20))]);
    bench.backup(volume_id, &source, Parent::None).await.unwrap();
    volume.write(&[(3 * MIB, &noise(3, 8 << 20)), (90 * MIB, &noise(4, 12 << 20))]);
    let point = bench.backup(volume_id, &source, Parent::Latest).await.unwrap();
    let name = format!("restored-{}", point.backup_id);
    let (target, hidden) = (format!("volumes/{name}"), format!("{name}.backhaul-partial"));
    let job = restore_job(point.backup_id, &location("main", &target));
    let first = Bench::beside(bench.store.clone(), Ceph::shared(), settings(), 2);
    // With room for two pieces at a time it is in no hurry.
    let little = 8 << 20;
    let most = first.memory.reserve(MEMORY_BYTES - little).await;
    let (engine, task_job, method) = (first.engine.clone(), job.clone(), first.methods(&job)[0]);
    let overtaken = tokio::spawn(async move { engine.run(&Context::default(), &task_job, method).await });
    bench.wait_for_checkpoint(&hidden, &overtaken).await;
    // It stands still in the middle, with the image's lock, and believes in itself.
    let held = (first.memory.reserve(little).await, most);
    assert!(!overtaken.is_finished());
    // What is there already is not written again.
    let (marker, object) = (noise(9, 4 << 20), bench.main.existing(&format!("volumes/{hidden}")).object(0));
    let file = bench.file("object", &marker);
    bench.main.rados(&["-p", "volumes", "put", &object, file.to_str().unwrap()]);

    let completion = bench.complete(&job).await;

    assert_eq!(completion.outcome, Outcome::Succeeded);
    let counts = completion.account.counts;
    assert_eq!(counts.bytes_read + counts.bytes_hole, point.volume_bytes, "{counts:?}");
    drop(held);
    let error = overtaken.await.unwrap().unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error:?}");
    let restored = bench.export(&target);
    assert!(restored[..4 << 20] == marker && restored[4 << 20..] == volume.read()[4 << 20..]);
    assert!(!bench.images("volumes").contains(&hidden));
    assert!(!bench.main.rbd(&["image-meta", "list", &target]).contains("backhaul"));
    bench.main.rbd(&["rm", "--no-progress", &target]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_handed_back_goes_on_and_one_that_is_cancelled_then_leaves_no_image() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(112 * MIB);
    volume.write(&[(0, &noise(1, 112 << 20))]);
    let source = location("main", volume.spec());
    let point = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    for is_cancelled in [false, true] {
        let name = format!("restored-{}", point.backup_id);
        let (target, hidden) = (format!("volumes/{name}"), format!("{name}.backhaul-partial"));
        let job = restore_job(point.backup_id, &location("main", &target));
        let hand_back = CancellationToken::new();
        let ctx =
            Context { cancel: hand_back.child_token(), hand_back: hand_back.clone(), ..Context::default() };
        // With room for two pieces at a time it is in no hurry.
        let little = 8 << 20;
        let most = bench.memory.reserve(MEMORY_BYTES - little).await;
        let (engine, task_job, method) = (bench.engine.clone(), job.clone(), bench.methods(&job)[0]);
        let running = tokio::spawn(async move { engine.run(&ctx, &task_job, method).await });
        bench.wait_for_checkpoint(&hidden, &running).await;

        hand_back.cancel();

        assert_eq!(running.await.unwrap().unwrap_err().class(), Class::Cancelled);
        assert!(bench.images("volumes").contains(&hidden), "it is left for the next worker");
        drop(most);
        if is_cancelled {
            let ctx = Context::default();
            ctx.cancel.cancel();
            assert_eq!(bench.engine.run(&ctx, &job, method).await.unwrap_err().class(), Class::Cancelled);
        } else {
            let completion = bench.complete(&job).await;
            assert_eq!(completion.outcome, Outcome::Succeeded);
            assert!(completion.account.counts.bytes_reused > 0, "{completion:?}");
            assert!(bench.export(&target) == volume.read());
            bench.main.rbd(&["rm", "--no-progress", &target]);
        }
        assert!(!bench.images("volumes").iter().any(|image| image.starts_with(&name)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_of_an_image_to_a_new_file_that_is_handed_back_goes_on() {
    let bench = Bench::new();
    let (volume_id, volume) = bench.volume(112 * MIB);
    volume.write(&[(0, &noise(1, 80 << 20)), (96 * MIB, &noise(2, 12 << 20))]);
    let point = bench.backup(volume_id, &location("main", volume.spec()), Parent::None).await.unwrap();
    let (target, partial) =
        (bench.folder.path().join("new"), bench.folder.path().join(".new.backhaul-partial"));
    let job = restore_job(point.backup_id, &Location::File(target.clone()));
    let is_noted = || {
        let mut note = vec![0; 4096];
        let length = rustix::fs::getxattr(&partial, "user.backhaul.restore", &mut note[..]).unwrap_or(0);
        String::from_utf8_lossy(&note[..length]).contains("bytes_done")
    };
    let hand_back = CancellationToken::new();
    let ctx = Context { cancel: hand_back.child_token(), hand_back: hand_back.clone(), ..Context::default() };
    // With room for two pieces at a time it is in no hurry.
    let most = bench.memory.reserve(MEMORY_BYTES - (8 << 20)).await;
    let (engine, task_job, method) = (bench.engine.clone(), job.clone(), bench.methods(&job)[0]);
    let running = tokio::spawn(async move { engine.run(&ctx, &task_job, method).await });
    while !is_noted() {
        assert!(!running.is_finished());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    hand_back.cancel();
    assert_eq!(running.await.unwrap().unwrap_err().class(), Class::Cancelled);
    drop(most);
    // What is there already is not written again.
    fs::File::options().write(true).open(&partial).unwrap().write_all_at(b"spoilt", 0).unwrap();

    let completion = bench.complete(&job).await;

    assert_eq!(completion.outcome, Outcome::Succeeded);
    let counts = completion.account.counts;
    assert_eq!(counts.bytes_read + counts.bytes_hole, point.volume_bytes, "{counts:?}");
    let restored = fs::read(&target).unwrap();
    assert!(restored[..6] == *b"spoilt" && restored[6..] == volume.read()[6..]);
    assert!(!partial.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_osd_that_stops_in_the_middle_puts_the_job_off_and_costs_nothing() {
    let bench = Bench::on(Ceph::start_with(&[]), settings());
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 64 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let at_full = volume.read();
    volume.write(&[(0, &noise(2, 64 << 20))]);
    let incremental = backup_job_of(volume_id, source.clone(), Parent::Latest);
    let check = job(Work::Verify(full.backup_id.into()));
    let of_objects = backup_job_of(volume_id, source, Parent::None);
    let objects = {
        let settings = chunked::Settings {
            compression: Compression::None,
            compression_level: 3,
            object_bytes: 4 << 20,
            sha_block_bytes: 32 << 10,
            unchanged_check_per_mille: 1,
            source_snapshots_max: 1,
        };
        let (cpu, memory) = (Cpu::start(2).unwrap(), Budget::new(MEMORY_BYTES));
        let file_roots = FileRoots::new(&[bench.folder.path().to_owned()]);
        let volumes = Volumes { file_roots, clusters: bench.clusters.clone() };
        Engine::new(Chunked::new(Arc::new(Memory::default()), settings, cpu, memory), volumes)
    };
    for image in [&volume, &bench.main.existing(&base(&full))] {
        // What is read at once must not be all that there is.
        image.slow_down(32 * MIB);
    }
    for (engine, job) in [(&bench.engine, &incremental), (&bench.engine, &check), (&objects, &of_objects)] {
        let error = bench.stop_osd_in_the_middle_of(engine, job).await;
        assert_eq!(error.class(), Class::Transient, "{error:?}");
        assert!(Problem::new(error.class(), &error).to_string().contains("timed out"), "{error:?}");
        run(engine, job).await.unwrap();
    }
    let file = bench.folder.path().join("of-objects");
    run(&objects, &restore_job(of_objects.backup_id(), &Location::File(file.clone()))).await.unwrap();
    assert!(fs::read(file).unwrap() == volume.read());
    assert!(bench.restored(incremental.backup_id()).await == volume.read());
    assert!(bench.restored(full.backup_id).await == at_full);
    // Of each backup one, and none of an attempt that was put off.
    assert_eq!(bench.snapshots(volume.spec()).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_is_a_clear_error_and_costs_nothing() {
    let bench = Bench::on(Ceph::start_with(&[]), settings());
    let (volume_id, volume) = bench.volume(64 * MIB);
    let source = location("main", volume.spec());
    volume.write(&[(0, &noise(1, 8 << 20))]);
    let full = bench.backup(volume_id, &source, Parent::None).await.unwrap();
    let target = bench.main.image("volumes", 64 * MIB);
    let quota = async |pool: &str, bytes: u64| {
        bench.main.ceph(&["osd", "pool", "set-quota", pool, "max_bytes", &bytes.to_string()]);
        while bench.main.ceph(&["osd", "pool", "ls", "detail"]).contains("full_quota") != (bytes > 0) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    quota("volumes", 1_000_000).await;
    let restore = bench.complete(&restore_job(full.backup_id, &location("main", target.spec()))).await;
    let Outcome::Failed(problem) = &restore.outcome else { panic!("{restore:?}") };
    assert!(problem.to_string().contains("uota"), "{problem}");
    verify(&bench.engine, full.backup_id).await.unwrap();
    quota("volumes", 0).await;
    quota("backups", 1_000_000).await;
    // Ceph refuses what needs more room, not what is written over something.
    volume.write(&[(8 * MIB, &noise(2, 50 << 20))]);
    let job = backup_job_of(volume_id, source.clone(), Parent::Latest);
    let completion = bench.complete(&job).await;
    let Outcome::Failed(problem) = &completion.outcome else { panic!("{completion:?}") };
    assert!(problem.to_string().contains("uota"), "{problem}");
    assert!(matches!(bench.record(job.backup_id()).await.state, RecordState::Error(_)));
    assert_eq!(bench.snapshots(volume.spec()).len(), 1);
    verify(&bench.engine, full.backup_id).await.unwrap();
    let error = delete(&bench.engine, full.backup_id).await.unwrap_err();
    assert!(Problem::new(error.class(), &error).to_string().contains("make room"), "{error:?}");
    quota("backups", 0).await;
    delete(&bench.engine, full.backup_id).await.unwrap();
    assert_eq!(bench.images("backups"), Vec::<String>::new());
}
