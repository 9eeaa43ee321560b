//! Random volumes, writes, chains, settings and deletes, against a model that keeps a copy of everything.
//!
//! `PROPTEST_CASES` sets the number of cases of each test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::sync::LazyLock;

use backhaul::engine::chunked::{Compression, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt};
use backhaul::error::Class;
use backhaul::job::{BackupId, Container, Counts, Mode, Parent, Record, RecordState, VolumeId, Work};
use backhaul::runner::plan;
use md5::{Digest as _, Md5};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::support::engine::{
    Bench, COMPRESSIONS, Kind, MEMORY_BYTES, backup_job, delete, object_at, paths_of, restore, runtime,
    verify,
};
use crate::support::volume::{Fill, Volume, hashes, junk, list_digest, segments, zero_block_bytes};

/// What an object of nothing but zeros takes in a store, at most, whatever the store is set to.
const ZEROS_BYTES_MAX: usize = 200;
/// Cases of a test whose number is not set from outside: what fits in about a minute.
const POSIX_CASES: u32 = 200;
const MEMORY_CASES: u32 = 700;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(runtime);
static CPU: LazyLock<Cpu> = LazyLock::new(|| Cpu::start(2).unwrap());

fn config(cases: u32) -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { ProptestConfig { cases, ..config } }
}

proptest! {
    #![proptest_config(config(POSIX_CASES))]

    #[test]
    fn every_point_of_every_chain_in_files_comes_back_as_it_was(case in a_case()) {
        RUNTIME.block_on(play(Kind::Posix, case));
    }
}

proptest! {
    #![proptest_config(config(MEMORY_CASES))]

    #[test]
    fn every_point_of_every_chain_in_memory_comes_back_as_it_was(case in a_case()) {
        RUNTIME.block_on(play(Kind::Memory, case));
    }
}

#[derive(Debug, Clone)]
struct Case {
    block_bytes: usize,
    volumes: Vec<NewVolume>,
    operations: Vec<Operation>,
}

#[derive(Debug, Clone)]
struct NewVolume {
    blocks: usize,
    /// Bytes beyond whole blocks, modulo the block's size.
    more: usize,
    /// Where its backups go; each to a folder of its own if absent.
    container: Option<Container>,
    edits: Vec<Edit>,
}

/// Fills a part of a volume.
#[derive(Debug, Clone)]
struct Edit {
    from: Index,
    length: Index,
    /// Up to the whole volume, not just a block or two.
    wide: bool,
    /// Whole blocks only.
    aligned: bool,
    fill: Fill,
}

#[derive(Debug, Clone)]
enum Operation {
    Write {
        volume: Index,
        edits: Vec<Edit>,
    },
    Backup {
        volume: Index,
        parent: WhichParent,
        compression: Compression,
        object_blocks: usize,
        memory: usize,
    },
    Restore {
        point: Index,
        onto: Onto,
        memory: usize,
    },
    Verify {
        point: Index,
    },
    Delete {
        point: Index,
    },
}

#[derive(Debug, Clone)]
enum WhichParent {
    None,
    Latest,
    Given(Index),
}

/// What a backup is restored onto.
#[derive(Debug, Clone)]
enum Onto {
    NewFile,
    /// A file full of noise, larger than the backup by so many bytes.
    Junk {
        larger_by: usize,
    },
}

fn a_case() -> impl Strategy<Value = Case> {
    let block_bytes =
        prop_oneof![8 => Just(512), 4 => Just(4096), 4 => Just(1000), 2 => 1usize..80, 1 => Just(128 << 10)];
    (block_bytes, vec(a_volume(), 1..3), vec(an_operation(), 1..24))
        .prop_map(|(block_bytes, volumes, operations)| Case { block_bytes, volumes, operations })
}

fn a_volume() -> impl Strategy<Value = NewVolume> {
    let blocks = prop_oneof![1 => Just(0usize), 1 => Just(1usize), 6 => 2usize..40];
    let more = prop_oneof![2 => Just(0usize), 1 => Just(1usize), 1 => Just(usize::MAX), 2 => any::<usize>()];
    let container = select(vec![None, Some("volumebackups"), Some("a/shared folder")]);
    (blocks, more, container, vec(an_edit(), 0..6)).prop_map(|(blocks, more, container, edits)| {
        let container = container.map(|name| name.parse().unwrap());
        NewVolume { blocks, more, container, edits }
    })
}

fn an_edit() -> impl Strategy<Value = Edit> {
    let fill = prop_oneof![
        any::<u8>().prop_map(Fill::Text),
        any::<u64>().prop_map(Fill::Noise),
        Just(Fill::Zeros),
        Just(Fill::Hole),
    ];
    (any::<Index>(), any::<Index>(), any::<bool>(), any::<bool>(), fill)
        .prop_map(|(from, length, wide, aligned, fill)| Edit { from, length, wide, aligned, fill })
}

fn an_operation() -> impl Strategy<Value = Operation> {
    let parent = prop_oneof![
        1 => Just(WhichParent::None),
        3 => Just(WhichParent::Latest),
        2 => any::<Index>().prop_map(WhichParent::Given),
    ];
    let onto = prop_oneof![
        Just(Onto::NewFile),
        Just(Onto::Junk { larger_by: 0 }),
        (1usize..20_000).prop_map(|larger_by| Onto::Junk { larger_by }),
    ];
    // Next to nothing, something, and plenty.
    let memory = || select(vec![1usize, 100_000, MEMORY_BYTES]);
    prop_oneof![
        4 => (any::<Index>(), vec(an_edit(), 1..4)).prop_map(|(volume, edits)| Operation::Write { volume, edits }),
        5 => (any::<Index>(), parent, select(COMPRESSIONS.to_vec()), 1usize..17, memory()).prop_map(
            |(volume, parent, compression, object_blocks, memory)| Operation::Backup {
                volume, parent, compression, object_blocks, memory
            }
        ),
        3 => (any::<Index>(), onto, memory())
            .prop_map(|(point, onto, memory)| Operation::Restore { point, onto, memory }),
        1 => any::<Index>().prop_map(|point| Operation::Verify { point }),
        2 => any::<Index>().prop_map(|point| Operation::Delete { point }),
    ]
}

async fn play(kind: Kind, case: Case) {
    let mut model = Model::new(kind, &case);
    for operation in case.operations {
        match operation {
            Operation::Write { volume, edits } => model.write(volume, edits),
            Operation::Backup { volume, parent, compression, object_blocks, memory } => {
                model.back_up(volume, parent, compression, object_blocks, memory).await;
            }
            Operation::Restore { point, onto, memory } => model.restore(point, onto, memory).await,
            Operation::Verify { point } => model.verify(point).await,
            Operation::Delete { point } => model.delete(point).await,
        }
        model.check_store().await;
    }
    model.end().await;
}

/// A backup that was made, and all that should be known of it.
struct Point {
    record: Record,
    volume: usize,
    parent: Option<BackupId>,
    bytes: Vec<u8>,
    hashes: Vec<[u8; 32]>,
    object_count: u64,
    /// The size of its data objects in the store.
    bytes_stored: u64,
}

struct ModelVolume {
    id: VolumeId,
    volume: Volume,
    container: Option<Container>,
}

struct Model {
    bench: Bench,
    block_bytes: usize,
    volumes: Vec<ModelVolume>,
    /// The backups that there are, the oldest first.
    points: Vec<Point>,
    containers: BTreeSet<Container>,
}

impl Model {
    fn new(kind: Kind, case: &Case) -> Self {
        let bench = Bench::with_cpu(kind, CPU.clone());
        let block_bytes = case.block_bytes;
        let volumes = case.volumes.iter().enumerate().map(|(index, new)| {
            let bytes = (new.blocks * block_bytes + new.more % block_bytes).max(1);
            let mut volume = Volume::create(bench.volumes().join(index.to_string()), bytes);
            edit(&mut volume, &new.edits, block_bytes);
            ModelVolume { id: VolumeId::random(), volume, container: new.container.clone() }
        });
        let volumes = volumes.collect();
        Self { bench, block_bytes, volumes, points: Vec::new(), containers: BTreeSet::new() }
    }

    fn engine(&self, compression: Compression, object_blocks: usize, memory: usize) -> Engine {
        let (object_bytes, sha_block_bytes) = (object_blocks * self.block_bytes, self.block_bytes);
        let settings = Settings {
            compression,
            compression_level: 3,
            object_bytes,
            sha_block_bytes,
            unchanged_check_per_mille: 1,
            source_snapshots_max: 1,
        };
        self.bench.engine_on(self.bench.store(), settings, memory)
    }

    /// An engine whose settings are none of those that anything was written with.
    fn reader(&self, memory: usize) -> Engine {
        let settings = Settings {
            compression: Compression::None,
            compression_level: 3,
            object_bytes: 1 << 20,
            sha_block_bytes: 1 << 10,
            unchanged_check_per_mille: 1,
            source_snapshots_max: 1,
        };
        self.bench.engine_on(self.bench.store(), settings, memory)
    }

    fn point(&self, id: BackupId) -> &Point {
        self.points.iter().find(|point| point.record.backup_id == id).unwrap()
    }

    /// The point and those that it builds on.
    fn chain(&self, point: &Point) -> Vec<&Point> {
        let mut chain = vec![self.point(point.record.backup_id)];
        while let Some(parent) = chain.last().unwrap().parent {
            chain.push(self.point(parent));
        }
        chain
    }

    fn write(&mut self, volume: Index, edits: Vec<Edit>) {
        let index = volume.index(self.volumes.len());
        edit(&mut self.volumes[index].volume, &edits, self.block_bytes);
    }

    async fn back_up(
        &mut self,
        volume: Index,
        parent: WhichParent,
        compression: Compression,
        object_blocks: usize,
        memory: usize,
    ) {
        let index = volume.index(self.volumes.len());
        let ModelVolume { id, volume, container } = &self.volumes[index];
        let own: Vec<&Point> = self.points.iter().filter(|point| point.volume == index).collect();
        let (parent, parent_point) = match parent {
            WhichParent::None => (Parent::None, None),
            WhichParent::Latest => (Parent::Latest, own.last()),
            WhichParent::Given(index) if !own.is_empty() => {
                let point = index.get(&own);
                (Parent::Given(point.record.backup_id), Some(point))
            }
            WhichParent::Given(_) => (Parent::None, None),
        };
        let mut job = backup_job(*id, &volume.path, parent);
        if let Work::Backup(work) = &mut job.work {
            work.container = container.clone();
        }
        let engine = self.engine(compression, object_blocks, memory);

        let mut methods = plan(&job, &engine.strategies(&job.work)).into_iter();
        let mut method = methods.next().unwrap();
        let mut result = engine.run(&Default::default(), &job, method).await;
        if parent == Parent::Latest && own.is_empty() {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::NoParent(_)) && error.class() == Class::Unsuitable, "{error}");
            method = methods.next().unwrap();
            result = engine.run(&Default::default(), &job, method).await;
        }
        let receipt = result.unwrap();

        let (bytes, hashes) = (volume.bytes.clone(), hashes(&volume.bytes, self.block_bytes));
        let object_bytes = object_blocks * self.block_bytes;
        let parent_hashes = parent_point.map(|point| &point.hashes[..]);
        let segments = segments(&bytes, self.block_bytes, object_bytes, parent_hashes);
        let record = engine.catalog().record(job.backup_id()).await.unwrap().unwrap();
        let mode = if parent_point.is_some() { Mode::Incremental } else { Mode::Full };
        assert_eq!(record.state, RecordState::Available);
        assert_eq!(record.method.unwrap().mode, Some(mode));
        assert_eq!(method.mode, Some(mode));
        self.check_lists(&record, compression, &bytes, &hashes, &segments).await;
        check_backup_counts(&receipt, &bytes, &hashes, &segments, parent_hashes, self.block_bytes);

        self.containers.insert(record.container.clone());
        let point = Point {
            parent: parent_point.map(|point| point.record.backup_id),
            record,
            volume: index,
            bytes,
            hashes,
            object_count: segments.len() as u64,
            bytes_stored: receipt.counts.bytes_stored,
        };
        assert_eq!(receipt.parent_id, point.parent);
        self.points.push(point);
    }

    /// The two lists that Cinder reads say what Cinder's driver would have written.
    async fn check_lists(
        &self,
        record: &Record,
        compression: Compression,
        bytes: &[u8],
        hashes: &[[u8; 32]],
        segments: &[Range<usize>],
    ) {
        let prefix = &record.service_metadata;
        let read = async |kind: &str| {
            let path = format!("{}/{prefix}_{kind}", record.container);
            serde_json::from_slice::<Value>(&self.bench.read(&object_at(&path)).await).unwrap()
        };
        let metadata = read("metadata").await;
        assert_eq!(metadata["version"], "1.0.0");
        assert_eq!(metadata["backup_id"], record.backup_id.to_string());
        assert_eq!(metadata["volume_id"], record.volume_id.to_string());
        assert_eq!(metadata["parent_id"], json!(record.parent_id));
        let objects = metadata["objects"].as_array().unwrap();
        assert_eq!(objects.len(), segments.len());
        for ((number, segment), object) in (1..).zip(segments).zip(objects) {
            let data = &bytes[segment.clone()];
            let name = format!("{prefix}-{number:05}");
            let mut object = object[&name].clone();
            let word = object.as_object_mut().unwrap().remove("compression").unwrap();
            let is_zero = data.iter().all(|byte| *byte == 0);
            if is_zero && data.len() > ZEROS_BYTES_MAX {
                let word_of_zeros = if compression == Compression::Zstd { "zstd" } else { "bz2" };
                assert_eq!(word, word_of_zeros);
                let stored = self.bench.read(&object_at(&format!("{}/{name}", record.container))).await;
                assert!(stored.len() <= ZEROS_BYTES_MAX, "{} for {} zeros", stored.len(), data.len());
            } else {
                assert!(word == compression.as_str() || word == "none" || is_zero, "{word}");
            }
            let md5 = hex::encode(Md5::digest(data));
            assert_eq!(object, json!({ "offset": segment.start, "length": segment.len(), "md5": md5 }));
        }
        let sha256_file = read("sha256file").await;
        assert_eq!(sha256_file["version"], "1.0.0");
        assert_eq!(sha256_file["backup_id"], record.backup_id.to_string());
        assert_eq!(sha256_file["volume_id"], record.volume_id.to_string());
        assert_eq!(sha256_file["chunk_size"], self.block_bytes);
        assert_eq!(sha256_file["sha256s"], hashes.iter().map(hex::encode).collect::<Value>());
    }

    async fn restore(&self, point: Index, onto: Onto, memory: usize) {
        if self.points.is_empty() {
            return;
        }
        let point = point.get(&self.points);
        let target = self.bench.volumes().join("target");
        let mut expected = point.bytes.clone();
        if let Onto::Junk { larger_by } = onto {
            let junk = junk(&target, point.bytes.len() + larger_by, 7);
            expected.extend_from_slice(&junk[point.bytes.len()..]);
        }

        let receipt = restore(&self.reader(memory), point.record.backup_id, &target).await.unwrap();

        assert!(fs::read(&target).unwrap() == expected, "the restored volume differs");
        fs::remove_file(&target).unwrap();
        self.check_read_back(point, &receipt, true);
    }

    async fn verify(&self, point: Index) {
        if self.points.is_empty() {
            return;
        }
        let point = point.get(&self.points);
        let receipt = verify(&self.reader(MEMORY_BYTES), point.record.backup_id).await.unwrap();
        self.check_read_back(point, &receipt, false);
    }

    fn check_read_back(&self, point: &Point, receipt: &Receipt, written: bool) {
        let chain = self.chain(point);
        let volume_bytes = point.bytes.len() as u64;
        let bytes_zero = zero_block_bytes(&point.bytes, self.block_bytes);
        let expected = Receipt {
            parent_id: point.parent,
            volume_bytes,
            counts: Counts {
                bytes_read: volume_bytes,
                bytes_zero,
                bytes_hole: 0,
                bytes_unchanged: 0,
                bytes_reused: 0,
                bytes_stored: chain.iter().map(|point| point.bytes_stored).sum(),
                bytes_written: if written { volume_bytes - bytes_zero } else { 0 },
                object_count: chain.iter().map(|point| point.object_count).sum(),
            },
            digest: Some(list_digest(&point.hashes)),
        };
        assert_eq!(*receipt, expected);
    }

    async fn delete(&mut self, point: Index) {
        if self.points.is_empty() {
            return;
        }
        let index = point.index(self.points.len());
        let id = self.points[index].record.backup_id;
        let children: Vec<_> =
            self.points.iter().filter(|p| p.parent == Some(id)).map(|p| p.record.backup_id).collect();

        let result = delete(&self.reader(MEMORY_BYTES), id).await;

        if children.is_empty() {
            let counts = result.unwrap().counts;
            let point = self.points.remove(index);
            assert_eq!((counts.object_count, counts.bytes_stored), (point.object_count, point.bytes_stored));
            return;
        }
        let error = result.unwrap_err();
        assert!(matches!(error, Error::HasChildren { .. }), "{error}");
        for child in children {
            assert!(error.to_string().contains(&child.to_string()), "{error}");
        }
    }

    /// The store holds the objects of all backups, and nothing else.
    async fn check_store(&self) {
        let expected: BTreeSet<String> =
            self.points.iter().flat_map(|point| paths_of(&point.record, point.object_count)).collect();
        assert_eq!(self.bench.everything(&self.containers).await, expected);
        let listing = self.reader(MEMORY_BYTES).catalog().records().await.unwrap();
        assert!(listing.damaged.is_empty());
        let listed: BTreeMap<_, _> = listing.records.into_iter().map(|r| (r.backup_id, r)).collect();
        let known: BTreeMap<_, _> =
            self.points.iter().map(|p| (p.record.backup_id, p.record.clone())).collect();
        assert_eq!(listed, known);
    }

    /// Restores what is left, then deletes it, children first.
    async fn end(mut self) {
        for index in 0..self.points.len() {
            let point = &self.points[index];
            let target = self.bench.volumes().join("target");
            let receipt = restore(&self.reader(MEMORY_BYTES), point.record.backup_id, &target).await.unwrap();
            assert!(fs::read(&target).unwrap() == point.bytes, "the restored volume differs");
            fs::remove_file(&target).unwrap();
            self.check_read_back(point, &receipt, true);
        }
        while let Some(point) = self.points.pop() {
            delete(&self.reader(MEMORY_BYTES), point.record.backup_id).await.unwrap();
        }
        self.check_store().await;
    }
}

fn edit(volume: &mut Volume, edits: &[Edit], block_bytes: usize) {
    let size = volume.bytes.len();
    for Edit { from, length, wide, aligned, fill } in edits {
        let mut start = from.index(size);
        let span = 1 + length.index(if *wide { size } else { 2 * block_bytes });
        let mut end = size.min(start + span);
        if *aligned {
            start -= start % block_bytes;
            end = size.min(end.next_multiple_of(block_bytes));
        }
        volume.fill(start..end, *fill);
    }
}

fn check_backup_counts(
    receipt: &Receipt,
    bytes: &[u8],
    hashes: &[[u8; 32]],
    segments: &[Range<usize>],
    parent: Option<&[[u8; 32]]>,
    block_bytes: usize,
) {
    let volume_bytes = bytes.len() as u64;
    assert_eq!(receipt.volume_bytes, volume_bytes);
    assert_eq!(receipt.digest, Some(list_digest(hashes)));
    let counts = receipt.counts;
    assert_eq!(counts.bytes_read + counts.bytes_hole, volume_bytes);
    // What of the zeros is a hole is for the file system to say.
    let zeros = bytes.iter().filter(|byte| **byte == 0).count() as u64;
    let in_zero_blocks = zero_block_bytes(bytes, block_bytes);
    assert!(counts.bytes_hole <= zeros, "{counts:?}");
    assert!(counts.bytes_zero <= in_zero_blocks, "{counts:?}");
    assert!(counts.bytes_zero + counts.bytes_hole >= in_zero_blocks, "{counts:?}");
    let stored: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
    // Of what is as in the parent, holes are counted as such only.
    let unchanged = if parent.is_some() { volume_bytes - stored } else { 0 };
    assert!(counts.bytes_unchanged <= unchanged.min(counts.bytes_read), "{counts:?}");
    assert!(counts.bytes_unchanged + counts.bytes_hole >= unchanged, "{counts:?}");
    assert_eq!(counts.bytes_written, 0);
    assert_eq!(counts.object_count, segments.len() as u64);
    assert!(counts.bytes_stored <= stored, "{counts:?}");
}
