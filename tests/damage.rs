//! Bad input, below the broker: what is said, that nothing is half made, and that other backups stay whole.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use backhaul::engine::chunked::{Budget, Chunked, Compression, Settings};
use backhaul::engine::{Cpu, Engine, Error, Volumes};
use backhaul::error::{Causes, Class, Problem};
use backhaul::job::{
    BackupId, Context, JobId, Method, Parent, Record, RecordState, Strategy, VerifyWork, VolumeId, Work,
};
use backhaul::store::{Folder, ObjectStore as _, Posix, Reason, Swift};
use backhaul::volume::{self, FileRoots, FileTarget, VolumeSource as _};
use bytes::Bytes;
use jiff::SignedDuration;
use rstest::rstest;
use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;

use crate::support::engine::{
    Bench, Kind, MEMORY_BYTES, backup, backup_job, cancel, delete, job, object_at, overwrite, paths_of,
    restore, run, run_in, verify,
};
use crate::support::faulty::{Fault, Faulty};
use crate::support::swift;
use crate::support::volume::{Deadly, Fill, Volume, junk};

const BLOCK_BYTES: usize = 512;

fn settings(compression: Compression) -> Settings {
    Settings {
        compression,
        compression_level: 3,
        object_bytes: 4 * BLOCK_BYTES,
        sha_block_bytes: BLOCK_BYTES,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    }
}

/// One backup of a chain, and the bytes that it must give back.
struct Point {
    record: Record,
    bytes: Vec<u8>,
}

impl Point {
    fn id(&self) -> BackupId {
        self.record.backup_id
    }

    /// The path of one of its objects.
    fn path(&self, of: Part) -> String {
        let (container, prefix) = (&self.record.container, &self.record.service_metadata);
        match of {
            Part::Data => format!("{container}/{prefix}-00001"),
            Part::Metadata => format!("{container}/{prefix}_metadata"),
            Part::Sha256File => format!("{container}/{prefix}_sha256file"),
            Part::Checksums => format!(".backhaul/checksums/{prefix}"),
            Part::Record => format!(".backhaul/records/{}.json", self.id()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Data,
    Metadata,
    Sha256File,
    Checksums,
    Record,
}

/// A store with a chain of three backups of one volume, and one of two of another.
struct Shelf {
    bench: Bench,
    engine: Engine,
    chain: Vec<Point>,
    other: Vec<Point>,
}

impl Shelf {
    async fn new(kind: Kind, compression: Compression) -> Self {
        let bench = Bench::new(kind);
        let engine = bench.engine(settings(compression));
        let first = chain(&bench, &engine, "volume", 3, 0).await;
        let other = chain(&bench, &engine, "other", 2, 100).await;
        Self { bench, engine, chain: first, other }
    }

    fn newest(&self) -> &Point {
        self.chain.last().unwrap()
    }

    /// Fails as it should by `verify` and by `restore`, which leaves no file; returns what both said.
    async fn refused(&self, point: &Point, told: &str) -> [Error; 2] {
        let verified = verify(&self.engine, point.id()).await;
        let names = self.bench.volume_names();
        let target = self.bench.volumes().join("refused");
        let restored = restore(&self.engine, point.id(), &target).await;
        assert_eq!(self.bench.volume_names(), names, "{told}: a file is left");
        [verified.expect_err(&format!("verify, {told}")), restored.expect_err(&format!("restore, {told}"))]
    }

    async fn whole(&self, point: &Point, told: &str) {
        verify(&self.engine, point.id()).await.unwrap_or_else(|e| panic!("{told}: {}", Causes(&e)));
        let target = self.bench.volumes().join("restored");
        restore(&self.engine, point.id(), &target).await.unwrap_or_else(|e| panic!("{told}: {}", Causes(&e)));
        assert!(fs::read(&target).unwrap() == point.bytes, "{told}");
        fs::remove_file(&target).unwrap();
    }

    async fn all_whole(&self, points: &[Point], told: &str) {
        for point in points {
            self.whole(point, told).await;
        }
    }
}

async fn chain(bench: &Bench, engine: &Engine, name: &str, length: usize, seed: u8) -> Vec<Point> {
    let volume_id = VolumeId::random();
    let mut volume = Volume::create(bench.volumes().join(name), 9 * BLOCK_BYTES + 100);
    volume.fill(0..2_000, Fill::Text(seed));
    volume.fill(1_200..1_300, Fill::Noise(seed.into()));
    volume.fill(4_100..4_400, Fill::Noise(3));
    let mut points = Vec::new();
    for index in 0..length {
        let parent = if index == 0 { Parent::None } else { Parent::Latest };
        volume.fill(700 + 300 * index..1_100 + 400 * index, Fill::Noise(index as u64));
        if index == 1 {
            volume.fill(1..400, Fill::Zeros);
        }
        let record = backup(engine, volume_id, &volume.path, parent).await.unwrap();
        points.push(Point { record, bytes: volume.bytes.clone() });
    }
    points
}

/// The path of one of a backup's data objects.
fn data_path(record: &Record, number: u64) -> String {
    format!("{}/{}-{number:05}", record.container, record.service_metadata)
}

/// What the error says, with all its causes.
fn text(error: &Error) -> String {
    Causes(error).to_string()
}

// ---- objects ----

/// Each byte of small objects, and some of larger ones.
fn positions(length: usize) -> BTreeSet<usize> {
    let step = length.div_ceil(64).max(1);
    (0..length).step_by(step).chain([length / 2, length - 1]).collect()
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_in_any_object_of_a_chain_is_found_by_verify_and_by_restore(
    #[values(Compression::None, Compression::Zlib, Compression::Bz2, Compression::Zstd)]
    compression: Compression,
) {
    let shelf = Shelf::new(Kind::Memory, compression).await;
    let store = shelf.bench.store();
    let mut flips = 0;
    for (age, point) in shelf.chain.iter().enumerate() {
        for path in paths_of(&point.record, point.record.counts.object_count) {
            let object = object_at(&path);
            let whole = shelf.bench.read(&object).await;
            for position in positions(whole.len()) {
                for mask in [0xFF, 0x01, 0x20] {
                    let told = format!("{path} byte {position} of {} ^ {mask:#x}", whole.len());
                    let mut flipped = whole.to_vec();
                    flipped[position] ^= mask;
                    store.replace(&object, flipped.into()).await.unwrap();
                    for error in shelf.refused(shelf.newest(), &told).await {
                        let text = text(&error);
                        assert_eq!(error.class(), Class::Permanent, "{told}: {text}");
                        assert!(text.contains(&path), "{told}: {text}");
                        assert!(text.contains(&point.id().to_string()), "{told}: {text}");
                    }
                    flips += 1;
                }
            }
            let told = format!("{path} last byte flipped");
            shelf.all_whole(&shelf.other, &told).await;
            shelf.all_whole(&shelf.chain[..age], &told).await;
            store.replace(&object, whole).await.unwrap();
            shelf.whole(shelf.newest(), &format!("{path} put back")).await;
        }
    }
    assert!(flips > 2_000, "{flips} flips are too few to mean anything");
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Missing,
    Emptied,
    Truncated,
    Longer,
    NotJson,
    OfAnother,
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_harmed_object_is_named_and_harms_no_other_backup(
    #[values(Part::Data, Part::Metadata, Part::Sha256File, Part::Checksums, Part::Record)] part: Part,
    #[values(Harm::Missing, Harm::Emptied, Harm::Truncated, Harm::Longer, Harm::NotJson, Harm::OfAnother)]
    harm: Harm,
    #[values(0, 1, 2)] age: usize,
) {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let point = &shelf.chain[age];
    let name = point.path(part);
    let path = shelf.bench.root().join(&name);
    let whole = fs::read(&path).unwrap();
    let told = format!("{name} {harm:?}");
    match harm {
        Harm::Missing => fs::remove_file(&path).unwrap(),
        Harm::Emptied => fs::write(&path, b"").unwrap(),
        Harm::Truncated => fs::write(&path, &whole[..whole.len() - 1]).unwrap(),
        Harm::Longer => fs::write(&path, [&whole[..], b"\n"].concat()).unwrap(),
        Harm::NotJson => fs::write(&path, b"<html>504 Gateway Timeout</html>").unwrap(),
        Harm::OfAnother => {
            fs::copy(shelf.bench.root().join(shelf.other[0].path(part)), &path).map(drop).unwrap();
        }
    }

    // A line end after a record changes nothing that it says.
    if (part, harm) == (Part::Record, Harm::Longer) {
        return shelf.all_whole(&shelf.chain, &told).await;
    }
    let refused = shelf.refused(shelf.newest(), &told).await;
    for (told_by, error) in ["verify", "restore"].into_iter().zip(refused) {
        let text = text(&error);
        assert_eq!(error.class(), Class::Permanent, "{told}: {text}");
        assert!(text.contains(&point.id().to_string()), "{told}: {text}");
        match (part, harm) {
            (Part::Record, Harm::Missing) if point.id() == shelf.newest().id() => {
                assert!(matches!(error, Error::UnknownBackup(_)), "{told}: {text}")
            }
            (Part::Record, Harm::Missing) => {
                assert!(matches!(error, Error::ParentGone { .. }), "{told}: {text}");
                assert!(text.contains(&shelf.newest().id().to_string()), "{told}: {text}");
            }
            (Part::Record, _) => assert!(matches!(error, Error::DamagedRecord { .. }), "{told}: {text}"),
            _ if told_by == "verify" && matches!(error, Error::DamagedBackup { .. }) => {
                for point in &shelf.chain[age..shelf.chain.len() - 1] {
                    assert!(text.contains(&point.id().to_string()), "{told}: {text}");
                }
            }
            (_, Harm::Missing) => assert!(matches!(error, Error::MissingObject { .. }), "{told}: {text}"),
            _ => assert!(matches!(error, Error::Damaged { .. }), "{told}: {text}"),
        }
        if (part, harm) != (Part::Record, Harm::Missing) {
            assert!(text.contains(&name), "{told}: {text}");
        }
    }
    shelf.all_whole(&shelf.other, &told).await;
    shelf.all_whole(&shelf.chain[..age], &told).await;
    let listing = shelf.engine.catalog().records().await.unwrap();
    assert_eq!(listing.records.len(), if part == Part::Record { 4 } else { 5 }, "{told}");
    assert_eq!(listing.damaged.len(), usize::from(part == Part::Record && harm != Harm::Missing), "{told}");

    fs::write(&path, whole).unwrap();
    shelf.all_whole(&shelf.chain, &told).await;
}

/// An editor's copy, and what cannot be the name of an object at all.
#[rstest]
#[case::a_copy_beside_it("json.bak")]
#[case::no_name_of_an_object(r"a\b")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stray_file_among_the_records_is_named_and_hides_no_backup(#[case] end: &str) {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let newest = shelf.newest();
    let record = shelf.bench.root().join(newest.path(Part::Record));
    let stray = record.with_extension(end);
    fs::copy(&record, &stray).unwrap();

    let listing = shelf.engine.catalog().records().await.unwrap();

    let name = stray.file_name().unwrap().to_str().unwrap().escape_debug().to_string();
    assert_eq!(listing.records.len(), 5);
    let [error] = listing.damaged.as_slice() else { panic!("{:?}", listing.damaged) };
    assert!(
        error.to_string().contains(&name) && error.to_string().contains("move that file away"),
        "{error}"
    );
    shelf.all_whole(&shelf.chain, &name).await;
    // Who builds on a backup is not known for sure while one may be put aside.
    let refused = delete(&shelf.engine, shelf.other[0].id()).await.unwrap_err();
    assert!(refused.to_string().contains(&name), "{refused}");
    // Nor is what may go.
    fs::remove_file(&record).unwrap();
    let found = shelf.engine.garbage(SignedDuration::ZERO).await.unwrap();
    assert_eq!((found.garbage, found.problems.len()), (vec![], 1));
    fs::rename(&stray, &record).unwrap();
    shelf.all_whole(&shelf.chain, "put back").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_damaged_of_a_jobs_end_is_not_told_as_a_backups_record() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let id = JobId::random();
    for folder in ["outcomes", "cancels"] {
        let path = shelf.bench.root().join(format!(".backhaul/{folder}"));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join(format!("{id}.json")), "{").unwrap();
    }
    let catalog = shelf.engine.catalog();
    for error in [catalog.outcome(id).await.unwrap_err(), catalog.cancelled_at(id).await.unwrap_err()] {
        let text = error.to_string();
        assert!(text.contains(&id.to_string()) && text.contains("keeps only"), "{text}");
        assert!(!text.contains("import"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_backup_is_found_whole_also_where_that_cannot_be_kept() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let marks = shelf.bench.root().join(".backhaul/verified");
    fs::remove_dir_all(&marks).ok();
    fs::write(&marks, "no folder").unwrap();

    verify(&shelf.engine, shelf.newest().id()).await.unwrap();
}

#[rstest]
#[case::not_a_number("-0000x")]
#[case::too_high_a_number("-00099")]
#[case::something_else("_sha256file.bak")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extra_object_is_named_since_cinder_would_not_restore_beside_it(#[case] suffix: &str) {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    for (age, point) in shelf.chain.iter().enumerate() {
        let name = format!("{}/{}{suffix}", point.record.container, point.record.service_metadata);
        let path = shelf.bench.root().join(&name);
        fs::write(&path, b"what is this").unwrap();
        let [verified, restored] = shelf.refused(shelf.newest(), &name).await;
        assert!(matches!(restored, Error::ExtraObject { .. }), "{restored}");
        assert!(matches!(verified, Error::ExtraObject { .. } | Error::DamagedBackup { .. }), "{verified}");
        for error in [verified, restored] {
            assert_eq!(error.class(), Class::Permanent);
            assert!(error.to_string().contains(&name), "{error}");
        }
        shelf.all_whole(&shelf.other, &name).await;
        shelf.all_whole(&shelf.chain[..age], &name).await;
        fs::remove_file(&path).unwrap();
    }
    shelf.all_whole(&shelf.chain, suffix).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_list_is_found_before_an_old_target_is_touched() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let target = shelf.bench.volumes().join("old");
    for (point, part) in shelf
        .chain
        .iter()
        .flat_map(|point| [Part::Metadata, Part::Sha256File, Part::Checksums].map(|part| (point, part)))
    {
        let path = shelf.bench.root().join(point.path(part));
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        let last_digit = whole.iter().rposition(u8::is_ascii_hexdigit).unwrap();
        flipped[last_digit] = if whole[last_digit] == b'0' { b'1' } else { b'0' };
        fs::write(&path, &flipped).unwrap();
        let before = junk(&target, 20_000, 5);

        let error = restore(&shelf.engine, shelf.newest().id(), &target).await.unwrap_err();

        assert!(text(&error).contains(&point.path(part)), "{}", text(&error));
        assert!(fs::read(&target).unwrap() == before, "{part:?}: {}", text(&error));
        fs::write(&path, &whole).unwrap();
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_backup_can_be_deleted(
    #[values(Part::Data, Part::Metadata, Part::Sha256File, Part::Checksums)] part: Part,
    #[values(false, true)] missing: bool,
) {
    let mut shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let point = shelf.chain.pop().unwrap();
    let path = shelf.bench.root().join(point.path(part));
    if missing {
        fs::remove_file(&path).unwrap()
    } else {
        fs::write(&path, b"rubbish").unwrap()
    }

    delete(&shelf.engine, point.id()).await.unwrap();

    let left = shelf.chain.iter().chain(&shelf.other);
    let expected: BTreeSet<String> =
        left.flat_map(|point| paths_of(&point.record, point.record.counts.object_count)).collect();
    assert_eq!(shelf.bench.everything([]).await, expected);
    shelf.all_whole(&shelf.chain, "after the delete").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_a_listing_does_not_have_yet_is_neither_missing_nor_left_behind() {
    let mut shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let late = Arc::new(Faulty::late(shelf.bench.store()));
    shelf.engine = shelf.bench.engine_on(late, settings(Compression::Zstd), MEMORY_BYTES);
    shelf.all_whole(&shelf.chain, "listings are late").await;

    let first = &shelf.chain[0];
    fs::remove_file(shelf.bench.root().join(first.path(Part::Data))).unwrap();
    for error in shelf.refused(first, "an object is gone").await {
        assert!(text(&error).contains(&first.path(Part::Data)), "{}", text(&error));
    }
    for point in shelf.chain.iter().rev().chain(shelf.other.iter().rev()) {
        delete(&shelf.engine, point.id()).await.unwrap();
    }
    assert_eq!(shelf.bench.everything([]).await, BTreeSet::new());
}

/// A backup by Cinder has no record of ours whose digests would tell: its lists are read as they are. What they say
/// wrong may stop a restore, but never makes it give back other bytes.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_in_a_backup_taken_in_from_cinder_never_restores_other_bytes(
    #[values(Compression::None, Compression::Zlib, Compression::Bz2, Compression::Zstd)]
    compression: Compression,
) {
    let mut shelf = Shelf::new(Kind::Memory, compression).await;
    let store = shelf.bench.store();
    for point in &mut shelf.chain {
        for part in [Part::Record, Part::Checksums] {
            store.delete(&object_at(&point.path(part))).await.unwrap();
        }
        let exported =
            Record { job_id: None, digest: None, object_digests: Vec::new(), ..point.record.clone() };
        point.record = shelf.engine.import(exported).await.unwrap();
    }
    let target = shelf.bench.volumes().join("target");
    let (mut found, mut flips) = (0, 0);
    for point in &shelf.chain {
        for path in paths_of(&point.record, point.record.counts.object_count) {
            if path.starts_with('.') {
                continue;
            }
            let object = object_at(&path);
            let whole = shelf.bench.read(&object).await;
            for position in positions(whole.len()) {
                let mut flipped = whole.to_vec();
                flipped[position] ^= 0x01;
                store.replace(&object, flipped.into()).await.unwrap();
                flips += 1;
                match restore(&shelf.engine, shelf.newest().id(), &target).await {
                    Err(_) => found += 1,
                    Ok(_) => {
                        let same = fs::read(&target).unwrap() == shelf.newest().bytes;
                        assert!(same, "{path} byte {position}");
                        fs::remove_file(&target).unwrap();
                    }
                }
                assert!(!target.exists());
            }
            store.replace(&object, whole).await.unwrap();
        }
    }
    assert!(found * 2 > flips, "{found} of {flips} found");
    shelf.whole(shelf.newest(), "as it was taken in").await;
}

// ---- sources and targets ----

/// What the folder for volumes holds beside good volumes.
fn bad_places(bench: &Bench) {
    let at = |name: &str| bench.volumes().join(name);
    let outside = bench.volumes().parent().unwrap().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), b"secret").unwrap();
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("file"), b"a file").unwrap();
    fs::write(at("empty"), b"").unwrap();
    symlink("nothing", at("dangling")).unwrap();
    symlink("loop", at("loop")).unwrap();
    symlink(outside.join("secret"), at("link-out")).unwrap();
    symlink(&outside, at("folder-out")).unwrap();
    rustix::fs::mknodat(CWD, at("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
}

#[rstest]
#[case::missing("missing", "No such file")]
#[case::below_a_file("file/volume", "Not a directory")]
#[case::dangling_link("dangling", "No such file")]
#[case::link_to_itself("loop", "symbolic links")]
#[case::folder("folder", "neither a regular file nor a block device")]
#[case::pipe("pipe", "neither a regular file nor a block device")]
#[case::empty("empty", "is empty: there is nothing to back up")]
#[case::outside("../outside/secret", "not below one of worker.file_roots")]
#[case::link_to_the_outside("link-out", "not below one of worker.file_roots")]
#[case::folder_link_to_the_outside("folder-out/secret", "not below one of worker.file_roots")]
#[case::missing_in_the_outside("folder-out/missing", "No such file")]
#[tokio::test]
async fn a_source_that_cannot_be_used_is_named_and_leaves_nothing(#[case] path: &str, #[case] why: &str) {
    let bench = Bench::new(Kind::Posix);
    bad_places(&bench);
    let source = bench.volumes().join(path);
    let engine = bench.engine(settings(Compression::Zstd));

    let error = backup(&engine, VolumeId::random(), &source, Parent::None).await.unwrap_err();

    assert_eq!(error.class(), Class::Permanent);
    let text = text(&error);
    assert!(text.contains(why) && text.contains(&source.display().to_string()), "{text}");
    assert!(bench.everything([]).await.is_empty());
}

#[rstest]
#[case::in_no_folder("nowhere/target", "No such file")]
#[case::below_a_file("file/target", "Not a directory")]
#[case::dangling_link("dangling", "No such file")]
#[case::folder("folder", "neither a regular file nor a block device")]
#[case::pipe("pipe", "neither a regular file nor a block device")]
#[case::outside("../outside/secret", "not below one of worker.file_roots")]
#[case::new_and_outside("../outside/target", "not below one of worker.file_roots")]
#[case::link_to_the_outside("link-out", "not below one of worker.file_roots")]
#[case::new_and_outside_by_a_link("folder-out/target", "not below one of worker.file_roots")]
#[case::too_small("file", "smaller than the backup")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_cannot_be_used_is_named_and_left_as_it_was(#[case] path: &str, #[case] why: &str) {
    let shelf = Shelf::new(Kind::Memory, Compression::Zstd).await;
    bad_places(&shelf.bench);
    let target = shelf.bench.volumes().join(path);
    let names = shelf.bench.volume_names();

    let error = restore(&shelf.engine, shelf.newest().id(), &target).await.unwrap_err();

    assert_eq!(error.class(), Class::Permanent);
    let text = text(&error);
    // Of a new file, what cannot be used is its folder.
    let folder = target.parent().unwrap().display().to_string();
    assert!(text.contains(why) && text.contains(&folder), "{text}");
    assert_eq!(shelf.bench.volume_names(), names);
    let outside = shelf.bench.volumes().join("../outside");
    assert_eq!(fs::read(shelf.bench.volumes().join("file")).unwrap(), b"a file");
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(outside).unwrap().count(), 1);
}

/// What was read until then looked like all of the volume.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_whose_reading_thread_dies_is_not_told_as_whole(
    #[values(None, Some(0), Some(3), Some(8))] in_block: Option<usize>,
) {
    let bench = Bench::new(Kind::Memory);
    let (settings, cpu) = (settings(Compression::Zstd), Cpu::start(1).unwrap());
    let chunked = Chunked::new(bench.store(), settings, cpu, Budget::new(MEMORY_BYTES));
    let job = backup_job(VolumeId::random(), Path::new("/nowhere"), Parent::None);
    let method = Method { strategy: Strategy::Chunked, mode: None };
    let Work::Backup(work) = &job.work else { unreachable!() };
    let at = in_block.map_or(u64::MAX, |block| (block * BLOCK_BYTES) as u64);
    let source = Deadly { bytes: 10 * BLOCK_BYTES as u64, at };
    let mut record = chunked.begin(job.id, work, None, source.bytes(), method).unwrap();
    chunked.name(&mut record);

    let made = chunked.backup(&Context::default(), &mut record, None, None, Arc::new(source)).await;

    assert_eq!(matches!(made, Err(Error::Lost(_))), in_block.is_some(), "{:?}", made.err());
}

/// Nobody would read it back.
#[tokio::test]
async fn more_volume_meta_than_is_read_back_is_refused_before_the_volume_is_read() {
    let bench = Bench::new(Kind::Memory);
    let engine = bench.engine(settings(Compression::Zstd));
    let volume = Volume::create(bench.volumes().join("volume"), BLOCK_BYTES);
    let mut job = backup_job(VolumeId::random(), &volume.path, Parent::None);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    // Each of them takes six bytes.
    work.volume_meta = Some("\u{fc}".repeat((16 << 20) / 6 + 1));
    let ctx = Context::default();

    let error = run_in(&ctx, &engine, &job).await.unwrap_err();

    assert!(matches!(error, Error::TextsTooLong { .. }), "{error}");
    assert_eq!(error.class(), Class::Permanent);
    assert_eq!(ctx.progress.read().counts.bytes_read, 0);
    cancel(&engine, &job).await;
    assert!(bench.everything([]).await.is_empty());
}

// ---- parents and ids ----

fn refused_parent(error: &Error, class: Class, words: &[&str]) {
    let text = text(error);
    assert_eq!(error.class(), class, "{text}");
    for word in words {
        assert!(text.contains(word), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parent_that_cannot_be_built_on_is_refused_and_says_why() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let everything = shelf.bench.everything([]).await;
    let (bench, engine) = (&shelf.bench, &shelf.engine);
    let (parent, source) = (&shelf.newest().record, bench.volumes().join("volume"));
    let id = parent.backup_id.to_string();

    let unknown = BackupId::random();
    let error = backup(engine, parent.volume_id, &source, Parent::Given(unknown)).await.unwrap_err();
    refused_parent(&error, Class::Permanent, &[&unknown.to_string(), "is not in this store"]);

    let another = VolumeId::random();
    let error = backup(engine, another, &source, Parent::Given(parent.backup_id)).await.unwrap_err();
    refused_parent(&error, Class::Permanent, &[&id, &parent.volume_id.to_string(), &another.to_string()]);

    let error = backup(engine, another, &source, Parent::Latest).await.unwrap_err();
    refused_parent(&error, Class::Unsuitable, &[&another.to_string(), "no earlier backup"]);

    let mut grown = Volume::create(bench.volumes().join("grown"), 20 * BLOCK_BYTES);
    grown.fill(0..100, Fill::Noise(1));
    for which in [Parent::Latest, Parent::Given(parent.backup_id)] {
        let error = backup(engine, parent.volume_id, &grown.path, which).await.unwrap_err();
        refused_parent(&error, Class::Unsuitable, &[&id, "10240", &parent.volume_bytes.to_string()]);
    }
    assert_eq!(bench.everything([]).await, everything);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_that_lacks_a_backup_is_not_built_on() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let (gone, newest) = (shelf.chain[0].id(), shelf.newest().record.clone());
    let source = shelf.bench.volumes().join("volume");
    shelf.engine.catalog().remove(gone).await.unwrap();
    let lacks = format!("backup {} builds on {gone}, which is not in", newest.backup_id);

    let given = Parent::Given(newest.backup_id);
    let error = backup(&shelf.engine, newest.volume_id, &source, given).await.unwrap_err();
    refused_parent(&error, Class::Permanent, &[&lacks]);
    // One that nobody named is a reason for a full backup.
    let error = backup(&shelf.engine, newest.volume_id, &source, Parent::Latest).await.unwrap_err();
    refused_parent(&error, Class::Unsuitable, &[&lacks]);
}

#[rstest]
#[case::in_error(RecordState::Error(Problem { class: Class::Permanent, message: "the disk is full".into(), causes: vec![] }), "the disk is full")]
#[case::being_made(RecordState::Creating(backhaul::job::JobId::random()), "still being made by job")]
#[case::being_deleted(RecordState::Deleting(backhaul::job::JobId::random()), "being deleted by job")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_not_whole_cannot_be_used(#[case] state: RecordState, #[case] why: &str) {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let mut record = shelf.newest().record.clone();
    record.state = state;
    overwrite(&shelf.engine, &record).await;
    let source = shelf.bench.volumes().join("volume");
    let id = record.backup_id;

    let error = backup(&shelf.engine, record.volume_id, &source, Parent::Given(id)).await.unwrap_err();
    refused_parent(&error, Class::Permanent, &[&id.to_string(), why]);
    for error in shelf.refused(shelf.newest(), why).await {
        assert!(matches!(error, Error::NotAvailable { .. }));
        refused_parent(&error, Class::Permanent, &[&id.to_string(), why]);
    }
    // The newest one that is whole is found all the same.
    let made = backup(&shelf.engine, record.volume_id, &source, Parent::Latest).await.unwrap();
    assert_eq!(made.parent_id, Some(shelf.chain[1].id()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_sha_block_size_than_the_parents_falls_back_to_a_full_backup_by_the_same_job() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let engine = shelf.bench.engine(Settings { sha_block_bytes: 256, ..settings(Compression::Zstd) });
    let newest = shelf.newest();
    let job = backup_job(newest.record.volume_id, &shelf.bench.volumes().join("volume"), Parent::Latest);
    let mut methods = backhaul::runner::plan(&job, &engine.strategies(&job.work)).into_iter();

    let error = engine.run(&Default::default(), &job, methods.next().unwrap()).await.unwrap_err();
    refused_parent(&error, Class::Unsuitable, &[&newest.id().to_string(), "512", "256"]);
    let receipt = engine.run(&Default::default(), &job, methods.next().unwrap()).await.unwrap();

    assert_eq!(receipt.parent_id, None);
    let record = engine.catalog().available(job.backup_id()).await.unwrap();
    shelf.whole(&Point { record: record.clone(), bytes: newest.bytes.clone() }, "the full backup").await;
    let points = shelf.chain.iter().chain(&shelf.other).map(|point| &point.record).chain([&record]);
    let expected: BTreeSet<String> =
        points.flat_map(|record| paths_of(record, record.counts.object_count)).collect();
    assert_eq!(shelf.bench.everything([]).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_parent_is_not_built_on() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let newest = shelf.newest();
    let path = shelf.bench.root().join(newest.path(Part::Sha256File));
    let whole = fs::read_to_string(&path).unwrap();
    let source = shelf.bench.volumes().join("volume");
    for damaged in
        [whole.replacen("\"chunk_size\": 512", "\"chunk_size\": 0", 1), whole.replacen('a', "b", 1)]
    {
        fs::write(&path, damaged).unwrap();
        let job = backup_job(newest.record.volume_id, &source, Parent::Latest);
        let error = run(&shelf.engine, &job).await.unwrap_err();
        refused_parent(&error, Class::Permanent, &[&newest.path(Part::Sha256File)]);
        cancel(&shelf.engine, &job).await;
    }
    fs::write(&path, whole).unwrap();
    shelf.all_whole(&shelf.chain, "the parent put back").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_backup_under_an_id_that_is_taken_is_refused_and_the_first_stays_whole() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let everything = shelf.bench.everything([]).await;
    let newest = shelf.newest();
    for volume_id in [newest.record.volume_id, VolumeId::random()] {
        let mut job = backup_job(volume_id, &shelf.bench.volumes().join("volume"), Parent::None);
        if let Work::Backup(work) = &mut job.work {
            work.backup_id = newest.id();
        }
        let error = run(&shelf.engine, &job).await.unwrap_err();
        assert!(matches!(error, Error::BackupExists(id) if id == newest.id()), "{error}");
        refused_parent(&error, Class::Permanent, &[&newest.id().to_string()]);
        let problem = Problem::new(error.class(), &error);
        shelf.engine.abandon(&job, Some(&problem)).await.unwrap();
    }
    assert_eq!(shelf.bench.everything([]).await, everything);
    shelf.all_whole(&shelf.chain, "after the refusal").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_names_all_that_is_damaged_and_who_shares_it() {
    let shelf = Shelf::new(Kind::Posix, Compression::None).await;
    let [oldest, middle, newest] = shelf.chain.as_slice() else { panic!("three") };
    let at = |path: &str| shelf.bench.root().join(path);
    let (flipped, missing, longer) =
        (data_path(&oldest.record, 1), data_path(&oldest.record, 3), data_path(&newest.record, 1));
    let mut bytes = fs::read(at(&flipped)).unwrap();
    bytes[7] ^= 1;
    fs::write(at(&flipped), bytes).unwrap();
    fs::remove_file(at(&missing)).unwrap();
    fs::write(at(&longer), [fs::read(at(&longer)).unwrap(), b"x".to_vec()].concat()).unwrap();

    let error = verify(&shelf.engine, newest.id()).await.unwrap_err();
    let told = text(&error);
    assert_eq!(error.class(), Class::Permanent);
    for path in [&flipped, &missing, &longer] {
        assert_eq!(told.matches(path.as_str()).count(), 1, "{path}: {told}");
    }
    let sharing = format!("the backups {}, {} share what is damaged", oldest.id(), middle.id());
    assert!(told.ends_with(&sharing), "{told}");
    assert!(!told.contains(&shelf.other[0].id().to_string()), "{told}");
    assert_eq!(shelf.engine.catalog().verified(newest.id()).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sample_reads_a_part_and_still_sees_what_is_missing() {
    let bench = Bench::new(Kind::Posix);
    let engine = bench.engine(settings(Compression::None));
    let bytes = 400 * 4 * BLOCK_BYTES;
    let mut volume = Volume::create(bench.volumes().join("volume"), bytes);
    volume.fill(0..bytes, Fill::Noise(1));
    let record = backup(&engine, VolumeId::random(), &volume.path, Parent::None).await.unwrap();
    let sample = |percent: u8| {
        let sample = Some(percent.try_into().unwrap());
        job(Work::Verify(VerifyWork { backup_id: record.backup_id, sample }))
    };

    let receipt = run(&engine, &sample(10)).await.unwrap();
    assert!((10..100).contains(&receipt.counts.object_count), "{:?}", receipt.counts);
    assert_eq!(receipt.digest, None, "not all of it was read");
    let verified = engine.catalog().verified(record.backup_id).await.unwrap().unwrap();
    assert_eq!(verified.sample_percent.map(|sample| sample.percent()), Some(10));
    assert_eq!(run(&engine, &sample(100)).await.unwrap().counts.object_count, 400);
    verify(&engine, record.backup_id).await.unwrap();
    let whole = engine.catalog().verified(record.backup_id).await.unwrap();
    run(&engine, &sample(10)).await.unwrap();
    let kept = engine.catalog().verified(record.backup_id).await.unwrap();
    assert!(kept == whole && kept.unwrap().sample_percent.is_none(), "a sample took the place of the whole");

    // Ten objects of 400 are harmed in a way that only reading tells; samples find them sooner or later.
    for number in (1..=10).map(|n| n * 37) {
        let path = bench.root().join(data_path(&record, number));
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    let mut found = 0;
    for _ in 0..20 {
        found += usize::from(run(&engine, &sample(30)).await.is_err());
    }
    assert!(found > 10, "each has a chance of 97 %: {found} of 20");
    fs::remove_file(bench.root().join(data_path(&record, 400))).unwrap();
    let error = run(&engine, &sample(1)).await.unwrap_err();
    assert!(text(&error).contains("-00400"), "{}", text(&error));
}

#[tokio::test]
async fn a_delete_that_is_refused_disturbs_nobody_who_uses_the_chain() {
    let shelf = Shelf::new(Kind::Memory, Compression::Zstd).await;
    let faulty = Faulty::counting(shelf.bench.store());
    let engine = shelf.bench.engine_on(Arc::new(faulty.clone()), settings(Compression::Zstd), MEMORY_BYTES);
    let error = delete(&engine, shelf.chain[0].id()).await.unwrap_err();
    assert!(matches!(error, Error::HasChildren { .. }), "{error}");
    // Were it marked as being deleted, even for a moment, whoever reads its child then would take it for lost.
    let writes: Vec<String> = faulty
        .names()
        .into_iter()
        .filter(|call| !call.starts_with("get") && !call.starts_with("list"))
        .collect();
    assert_eq!(writes, [""; 0]);
}

#[tokio::test]
async fn a_store_that_is_completely_full_can_be_made_room_in() {
    let shelf = Shelf::new(Kind::Posix, Compression::Zstd).await;
    let last = shelf.other.last().unwrap();
    let faulty = Faulty::counting(shelf.bench.store());
    let counting = shelf.bench.engine_on(Arc::new(faulty.clone()), settings(Compression::Zstd), MEMORY_BYTES);
    delete(&counting, last.id()).await.unwrap();
    let mark = 1 + faulty.names().iter().position(|call| call.starts_with("swap")).unwrap();

    // There is a record less to look at now.
    let faulty = Faulty::new(shelf.bench.store(), mark - 1, Fault::Refused(Errno::NOSPC));
    let engine = shelf.bench.engine_on(Arc::new(faulty.clone()), settings(Compression::Zstd), MEMORY_BYTES);
    let first = &shelf.other[0];
    delete(&engine, first.id()).await.unwrap();
    assert!(faulty.broke_at().starts_with("swap .backhaul/records"), "{}", faulty.broke_at());
    assert_eq!(engine.catalog().record(first.id()).await.unwrap(), None);
    shelf.all_whole(&shelf.chain, "after the delete").await;
}

#[tokio::test]
async fn when_a_backup_was_verified_goes_with_it() {
    let bench = Bench::new(Kind::Posix);
    let engine = bench.engine(settings(Compression::Zstd));
    let volume = Volume::create(bench.volumes().join("volume"), 5000);
    let record = backup(&engine, VolumeId::random(), &volume.path, Parent::None).await.unwrap();
    assert_eq!(engine.catalog().verified(record.backup_id).await.unwrap(), None);
    let before = jiff::Timestamp::now();
    verify(&engine, record.backup_id).await.unwrap();
    let verified = engine.catalog().verified(record.backup_id).await.unwrap().unwrap();
    assert!(verified.at >= before && verified.sample_percent.is_none(), "{verified:?}");
    delete(&engine, record.backup_id).await.unwrap();
    assert_eq!(bench.everything([]).await.len(), 0, "{:?}", bench.everything([]).await);
}

#[tokio::test]
async fn what_is_not_in_the_store_is_named() {
    let bench = Bench::new(Kind::Posix);
    let engine = bench.engine(settings(Compression::Zstd));
    let id = BackupId::random();
    let errors = [
        verify(&engine, id).await.unwrap_err(),
        restore(&engine, id, &bench.volumes().join("target")).await.unwrap_err(),
        delete(&engine, id).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::UnknownBackup(unknown) if unknown == id), "{error}");
        assert!(error.to_string().contains("backhaul list"), "{error}");
    }
    assert!(bench.volume_names().is_empty());
}

// ---- a full disk, and what is not allowed ----

/// Says to a test that was started again which part of it to do, and in which folder.
const FOLDER_VARIABLE: &str = "BACKHAUL_TEST_FOLDER";

/// Starts this test again, by its whole name, in `command`, which must begin another program with the arguments that it is
/// given. The test finds `folder` in its environment.
fn again(mut command: Command, test: &str, folder: &Path) {
    let output =
        command.args([test, "--exact", "--nocapture"]).env(FOLDER_VARIABLE, folder).output().unwrap();
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    assert!(output.status.success() && told.contains("1 passed"), "{command:?}: {told}");
}

fn folder_of_again() -> Option<PathBuf> {
    std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from)
}

fn engine_in(folder: &Path) -> Engine {
    let store = Arc::new(Posix::open(&folder.join("store")).unwrap());
    let cpu = Cpu::start(1).unwrap();
    let settings = Settings {
        compression: Compression::None,
        compression_level: 3,
        object_bytes: 64 << 10,
        sha_block_bytes: 4 << 10,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    };
    let chunked = Chunked::new(store, settings, cpu, Budget::new(MEMORY_BYTES));
    Engine::new(chunked, Volumes::files(FileRoots::new(&[folder.to_owned()])))
}

/// This program, with mounts of its own, which the script makes in the folder.
fn in_own_mounts(script: &str, folder: &Path) -> Command {
    let mut command = Command::new("unshare");
    // Root may mount without being root of a user namespace of its own, which not every place allows.
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "sh", "-c", script]);
    command.arg(folder).arg("--").arg(std::env::current_exe().unwrap());
    command
}

/// On a real file system of 1 MiB, mounted in a namespace of its own; whoever is not root becomes root of one for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_told_and_what_was_there_stays_whole() {
    let Some(folder) = folder_of_again() else {
        let folder = tempfile::tempdir().unwrap();
        let script = "mount -t tmpfs -o size=1m,mode=0777 none \"$0\" || exit 77; shift; exec \"$@\"";
        let command = in_own_mounts(script, folder.path());
        return again(command, "damage::a_full_disk_is_told_and_what_was_there_stays_whole", folder.path());
    };
    fs::create_dir(folder.join("store")).unwrap();
    let engine = engine_in(&folder);
    let volume_id = VolumeId::random();
    let mut volume = Volume::create(folder.join("volume"), 200 * 1024);
    volume.fill(0..200 * 1024, Fill::Noise(1));
    let small = backup(&engine, volume_id, &volume.path, Parent::None).await.unwrap();
    let mut large = Volume::create(folder.join("large"), 450 * 1024);
    large.fill(0..450 * 1024, Fill::Noise(2));

    let job = backup_job(VolumeId::random(), &large.path, Parent::None);
    let error = run(&engine, &job).await.unwrap_err();
    let Error::Store(store_error) = &error else { panic!("{error}") };
    assert!(matches!(store_error.reason(), Reason::Full), "{error}");
    assert_eq!(error.class(), Class::Permanent);
    assert!(text(&error).contains("the store is full: free some space"), "{}", text(&error));
    engine.abandon(&job, Some(&Problem::new(error.class(), &error))).await.unwrap();
    let record = engine.catalog().record(job.backup_id()).await.unwrap().unwrap();
    assert!(matches!(record.state, RecordState::Error(_)));

    // A target on a full disk: what could not be written whole is not there.
    let target = folder.join("target");
    let ballast = folder.join("ballast");
    // What fits of it is written.
    fs::write(&ballast, vec![1; 2 << 20]).unwrap_err();
    let error = restore(&engine, small.backup_id, &target).await.unwrap_err();
    assert!(matches!(error, Error::WriteVolume { .. }), "{error}");
    assert_eq!(error.class(), Class::Permanent);
    assert!(text(&error).contains("No space left on device"), "{}", text(&error));
    let left: BTreeSet<_> =
        fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(left, ["ballast", "large", "store", "volume"].map(String::from).into());

    fs::remove_file(&large.path).unwrap();
    drop(large);
    fs::remove_file(&ballast).unwrap();
    restore(&engine, small.backup_id, &target).await.unwrap();
    assert!(fs::read(&target).unwrap() == volume.bytes);
}

#[test]
fn a_restore_into_another_mount_of_a_store_is_refused() {
    let Some(folder) = folder_of_again() else {
        let folder = tempfile::tempdir().unwrap();
        let script = "mkdir \"$0/store\" \"$0/mounted\" && mount --bind \"$0/store\" \"$0/mounted\" || exit 77; shift; exec \"$@\"";
        let command = in_own_mounts(script, folder.path());
        return again(command, "damage::a_restore_into_another_mount_of_a_store_is_refused", folder.path());
    };
    let roots = FileRoots::new(std::slice::from_ref(&folder)).with_stores(vec![folder.join("store")]);
    for target in ["mounted/new", "store/new"] {
        let error = FileTarget::open(&folder.join(target), 6, &roots, "of a job").unwrap_err();
        assert!(matches!(error, volume::Error::InStore { .. }), "{target}: {error}");
    }
    FileTarget::open(&folder.join("new"), 6, &roots, "of a job").unwrap();
}

/// It is a folder of the machine itself then, where backups would be written and none are found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_whose_file_system_was_unmounted_is_not_taken_for_the_store() {
    let Some(folder) = folder_of_again() else {
        let folder = tempfile::tempdir().unwrap();
        let script = "mount -t tmpfs none \"$0\" || exit 77; shift; exec \"$@\"";
        let command = in_own_mounts(script, folder.path());
        let test = "damage::a_folder_whose_file_system_was_unmounted_is_not_taken_for_the_store";
        return again(command, test, folder.path());
    };
    let bytes = Bytes::from_static;
    let run = |program: &mut Command| assert!(program.status().unwrap().success(), "{program:?}");
    for below in ["", "deep"] {
        let share = folder.join(format!("share{below}"));
        let mount = || {
            run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&share));
            fs::create_dir_all(share.join(below)).unwrap();
        };
        fs::create_dir(&share).unwrap();
        mount();
        let store = Posix::open(&share.join(below)).unwrap();
        let own = Folder::own("records");
        let (there, new) = (own.object("there").unwrap(), own.object("new").unwrap());
        store.put(&there, bytes(b"old")).await.unwrap();
        run(Command::new("umount").arg(&share));

        for error in [
            store.get(&there).await.err().unwrap(),
            store.list(&own, "").await.err().unwrap(),
            store.partials(&own, "").await.err().unwrap(),
            store.tidy(&own, "").await.unwrap_err(),
            store.put(&new, bytes(b"new")).await.unwrap_err(),
            store.replace(&there, bytes(b"new")).await.unwrap_err(),
            store.swap(&there, bytes(b"old"), bytes(b"new")).await.unwrap_err(),
            store.create(&new).await.err().unwrap(),
            store.copy(&there, &new).await.unwrap_err(),
            store.delete(&there).await.unwrap_err(),
        ] {
            let told = Causes(&error).to_string();
            assert_eq!(error.class(), Class::Transient, "{told}");
            assert!(
                told.contains(share.to_str().unwrap()) && told.contains("mount its file system again"),
                "{told}"
            );
        }
        assert_eq!(fs::read_dir(&share).unwrap().count(), 0);

        mount();
        store.put(&new, bytes(b"new")).await.unwrap();
        assert_eq!(store.list(&own, "").await.unwrap().len(), 1);
    }
}

/// Other jobs gather there as well, and end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_put_off_while_there_is_no_room_to_gather_its_lists_for_swift() {
    let Some(folder) = folder_of_again() else {
        let folder = tempfile::tempdir().unwrap();
        let script = "mount -t tmpfs -o size=1m,mode=0777 none \"$0\" || exit 77; export TMPDIR=\"$0\"; shift; exec \"$@\"";
        let command = in_own_mounts(script, folder.path());
        let test = "damage::a_job_is_put_off_while_there_is_no_room_to_gather_its_lists_for_swift";
        return again(command, test, folder.path());
    };
    // Nobody listens there, and nobody is asked before all is gathered.
    let store = Swift::new(swift::settings("http://user:key@127.0.0.1:1/auth/v1.0", "tests")).unwrap();
    let mut writer = store.create(&Folder::own("tests").object("list").unwrap()).await.unwrap();

    let error = writer.write(vec![1; 9 << 20].into()).await.unwrap_err();

    let told = Causes(&error).to_string();
    assert_eq!(error.class(), Class::Transient, "{told}");
    assert!(told.contains(&format!("{}, where it is gathered first", folder.display())), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_is_told_whatever_kind_it_is() {
    let bench = Bench::new(Kind::Memory);
    let volume = Volume::create(bench.volumes().join("volume"), 5_000);
    let faulty = Faulty::new(bench.store(), 6, Fault::Refused(Errno::NOSPC));
    let engine = bench.engine_on(Arc::new(faulty), settings(Compression::Zstd), MEMORY_BYTES);

    let error = backup(&engine, VolumeId::random(), &volume.path, Parent::None).await.unwrap_err();

    assert_eq!(error.class(), Class::Permanent);
    assert!(text(&error).contains("the store is full"), "{}", text(&error));
}

/// As an ordinary user, because root may read anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_not_be_read_or_written_is_named() {
    let Some(folder) = folder_of_again() else {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["volume", "unreadable", "unwritable"] {
            fs::write(at(name), b"a volume").unwrap();
        }
        // The test itself may lie where others cannot go.
        fs::copy(std::env::current_exe().unwrap(), at("test")).unwrap();
        for (name, mode) in [("", 0o777), ("volume", 0o666), ("unreadable", 0), ("unwritable", 0o444)] {
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let mut command = Command::new(at("test"));
        command.current_dir(folder.path());
        if fs::metadata(folder.path()).unwrap().uid() == 0 {
            command.uid(65_534).gid(65_534);
        }
        return again(command, "damage::what_may_not_be_read_or_written_is_named", folder.path());
    };
    fs::create_dir(folder.join("store")).unwrap();
    let engine = engine_in(&folder);

    let unreadable = folder.join("unreadable");
    let error = backup(&engine, VolumeId::random(), &unreadable, Parent::None).await.unwrap_err();
    assert!(matches!(&error, Error::Volume(volume::Error::Io { .. })), "{error}");
    assert!(text(&error).contains("ermission denied"), "{}", text(&error));
    assert!(text(&error).contains(&unreadable.display().to_string()), "{}", text(&error));
    assert_eq!(error.class(), Class::Permanent);

    let record = backup(&engine, VolumeId::random(), &folder.join("volume"), Parent::None).await.unwrap();
    let unwritable = folder.join("unwritable");
    let error = restore(&engine, record.backup_id, &unwritable).await.unwrap_err();
    assert!(text(&error).contains("ermission denied"), "{}", text(&error));
    assert!(text(&error).contains(&unwritable.display().to_string()), "{}", text(&error));
    assert_eq!(fs::read(&unwritable).unwrap(), b"a volume");

    fs::set_permissions(folder.join("store"), fs::Permissions::from_mode(0o555)).unwrap();
    let mut job = backup_job(VolumeId::random(), &folder.join("volume"), Parent::None);
    if let Work::Backup(work) = &mut job.work {
        work.container = Some("new".parse().unwrap());
    }
    let result = run(&engine, &job).await;
    fs::set_permissions(folder.join("store"), fs::Permissions::from_mode(0o777)).unwrap();
    let error = result.unwrap_err();
    assert!(text(&error).contains("permission denied: let the user that runs backhaul"), "{}", text(&error));
    cancel(&engine, &job).await;
    assert!(verify(&engine, record.backup_id).await.is_ok());
}
