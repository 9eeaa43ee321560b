//! Backups that Cinder 29 wrote, taken in, verified, restored, built on and deleted.
//!
//! `dev/cinder-fixtures` says how they were made.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backhaul::cinder::export_record::{self, Form};
use backhaul::engine::chunked::{Budget, Chunked, Settings};
use backhaul::engine::{Cpu, Engine, Error, Receipt, Volumes};
use backhaul::job::{
    BackupId, BackupWork, Context, Job, JobId, Method, Mode, Parent, Record, RestoreWork, Strategy, VolumeId,
    Work,
};
use backhaul::store::Posix;
use backhaul::volume::FileRoots;
use rstest::rstest;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::support::stack::Stack;

const BLOCK_BYTES: usize = 32768;

/// One backup of a chain that Cinder wrote.
#[derive(Deserialize)]
struct Point {
    record: Value,
    bytes: u64,
    sha256: String,
}

/// A copy of a chain that Cinder wrote, with an engine on it.
struct CinderChain {
    folder: TempDir,
    engine: Engine,
    points: Vec<Point>,
}

impl CinderChain {
    /// Takes the chain whose `backup_compression_algorithm` was `word`.
    fn of(word: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let points = take(word, &folder.path().join("store"));
        let store = Arc::new(Posix::open(&folder.path().join("store")).unwrap());
        let settings = Settings {
            compression: word.parse().unwrap(),
            compression_level: 3,
            object_bytes: 5 * BLOCK_BYTES,
            sha_block_bytes: BLOCK_BYTES,
            unchanged_check_per_mille: 1,
            source_snapshots_max: 1,
        };
        let chunked = Chunked::new(store, settings, Cpu::start(2).unwrap(), Budget::new(64 << 20));
        let roots = FileRoots::new(&[folder.path().canonicalize().unwrap()]);
        Self { engine: Engine::new(chunked, Volumes::files(roots)), folder, points }
    }

    /// The record of a backup as it stands in Cinder's export.
    fn exported(&self, point: usize) -> Record {
        export_record::import(self.points[point].record.to_string().as_bytes(), &Form::Files).unwrap()
    }

    /// Takes all backups of the chain in.
    async fn import(&self) -> Vec<Record> {
        let mut records = Vec::new();
        for point in 0..self.points.len() {
            records.push(self.engine.import(self.exported(point)).await.unwrap());
        }
        records
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn run(&self, work: Work, mode: Option<Mode>) -> Result<Receipt, Error> {
        let job = Job { id: JobId::random(), store: None, deadline: None, work };
        self.engine.run(&Context::default(), &job, Method { strategy: Strategy::Chunked, mode }).await
    }

    /// A backup of `source.img`.
    fn backup(&self, backup_id: BackupId, parent: Parent) -> Work {
        Work::Backup(BackupWork {
            backup_id,
            volume_id: self.exported(0).volume_id,
            source: format!("file:{}", self.path("source.img").display()).parse().unwrap(),
            parent,
            container: None,
            name: None,
            description: None,
            project_id: None,
            volume_meta: None,
        })
    }

    async fn restore(&self, backup_id: BackupId, name: &str) -> String {
        let target = format!("file:{}", self.path(name).display()).parse().unwrap();
        let work = RestoreWork { backup_id, target, volume_id: None };
        self.run(Work::Restore(work), None).await.unwrap();
        sha256(&fs::read(self.path(name)).unwrap())
    }

    async fn delete(&self, backup_id: BackupId) {
        self.run(Work::Delete(backup_id), None).await.unwrap();
        self.engine.catalog().remove(backup_id).await.unwrap();
    }

    /// Every file of the store besides our own.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![self.path("store")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true if path.ends_with(".backhaul") => {}
                    true => folders.push(path),
                    false => files.push(path),
                }
            }
        }
        files
    }
}

/// Copies the chain whose `backup_compression_algorithm` was `word` into a new folder.
fn take(word: &str, store: &Path) -> Vec<Point> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cinder").join(word);
    copy(&fixture.join("store"), store);
    serde_json::from_slice(&fs::read(fixture.join("chain.json")).unwrap()).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[rstest]
#[tokio::test]
async fn a_chain_of_cinder_is_taken_in_verified_restored_built_on_and_deleted(
    #[values("none", "zlib", "bz2", "zstd", "gzip", "bzip2")] word: &str,
) {
    let chain = CinderChain::of(word);
    let records = chain.import().await;

    assert_eq!(records.len(), 3);
    for (record, point) in records.iter().zip(&chain.points) {
        assert_eq!(record.volume_bytes, point.bytes);
        chain.run(Work::Verify(record.backup_id.into()), None).await.unwrap();
        let name = format!("{}.img", record.backup_id);
        assert_eq!(chain.restore(record.backup_id, &name).await, point.sha256, "onto a new target");
        fs::write(chain.path("old.img"), vec![0xa5; point.bytes as usize]).unwrap();
        assert_eq!(chain.restore(record.backup_id, "old.img").await, point.sha256, "onto an old target");
    }

    let mut content = fs::read(chain.path("old.img")).unwrap();
    content[7 * BLOCK_BYTES..8 * BLOCK_BYTES].fill(0);
    content[10 * BLOCK_BYTES] ^= 1;
    fs::write(chain.path("source.img"), &content).unwrap();
    let own = BackupId::random();
    let parent = Parent::Given(records[2].backup_id);
    let receipt = chain.run(chain.backup(own, parent), Some(Mode::Incremental)).await.unwrap();
    assert_eq!(receipt.counts.object_count, 2, "one for the zeros, one for the last block");
    assert_eq!(receipt.counts.bytes_unchanged, 9 * BLOCK_BYTES as u64);
    chain.run(Work::Verify(own.into()), None).await.unwrap();
    assert_eq!(chain.restore(own, "own.img").await, sha256(&content));

    chain.delete(own).await;
    for record in records.iter().rev() {
        chain.delete(record.backup_id).await;
    }
    assert!(chain.files().is_empty(), "{:?}", chain.files());
}

/// By its commands, with the records in a file and on standard input.
#[test]
fn the_program_takes_a_chain_of_cinder_in_and_restores_it() {
    let stack = Stack::new("amqp://guest:guest@127.0.0.1:1/%2f", "", "");
    fs::remove_dir(stack.path("backups")).unwrap();
    let points = take("zlib", &stack.path("backups"));
    for (point, path) in points.iter().zip(["record.json", "-", "record.json"]) {
        fs::write(stack.path("record.json"), point.record.to_string()).unwrap();
        let mut import = stack.command(&["record", "import", path]);
        let output = import.stdin(fs::File::open(stack.path("record.json")).unwrap()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    for point in &points {
        let record = export_record::import(point.record.to_string().as_bytes(), &Form::Files).unwrap();
        let id = record.backup_id.to_string();
        stack.ok(&["run", "verify", "--backup-id", &id]);
        stack.ok(&["run", "restore", "--backup-id", &id, "--target", &stack.location(&id)]);
        assert_eq!(sha256(&fs::read(stack.volume(&id)).unwrap()), point.sha256, "{id}");
    }
}

fn flipped(mut bytes: Vec<u8>) -> Vec<u8> {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    bytes
}

fn cut(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.pop();
    bytes
}

/// What is packed may unpack to the same bytes with another bit in it, and Cinder keeps no digest of what is stored:
/// only of objects that are not packed is each byte known.
#[rstest]
#[case::flipped("none", flipped)]
#[case::cut("none", cut)]
#[case::cut_zlib("zlib", cut)]
#[case::cut_bz2("bz2", cut)]
#[case::cut_zstd("zstd", cut)]
#[tokio::test]
async fn a_damaged_object_anywhere_in_a_chain_of_cinder_is_found(
    #[case] word: &str,
    #[case] damage: fn(Vec<u8>) -> Vec<u8>,
) {
    let chain = CinderChain::of(word);
    let newest = chain.import().await[2].backup_id;
    let is_data = |path: &PathBuf| {
        !["_metadata", "_sha256file"].iter().any(|end| path.to_str().unwrap().ends_with(end))
    };
    let objects: Vec<_> = chain.files().into_iter().filter(is_data).collect();
    assert!(objects.len() >= 10, "{objects:?}");

    for path in objects {
        let whole = fs::read(&path).unwrap();
        fs::write(&path, damage(whole.clone())).unwrap();

        let error = chain.run(Work::Verify(newest.into()), None).await.unwrap_err();

        let name = path.file_name().unwrap().to_str().unwrap();
        let is_damage = matches!(&error, Error::Damaged { .. } | Error::DamagedBackup { .. });
        assert!(is_damage && error.to_string().contains(name), "{name}: {error}");
        fs::write(path, whole).unwrap();
    }
    chain.run(Work::Verify(newest.into()), None).await.unwrap();
}

#[tokio::test]
async fn an_export_of_an_imported_backup_is_what_cinder_exported() {
    let chain = CinderChain::of("zlib");
    for (record, point) in chain.import().await.iter().zip(&chain.points) {
        let text = export_record::export(record);

        let again: export_record::ExportRecord = serde_json::from_str(&text).unwrap();
        let before: export_record::ExportRecord = serde_json::from_value(point.record.clone()).unwrap();
        assert_eq!(fields(&again.backup_url), fields(&before.backup_url));
    }
}

fn fields(backup_url: &str) -> Value {
    use base64::prelude::{BASE64_STANDARD, Engine as _};
    serde_json::from_slice(&BASE64_STANDARD.decode(backup_url).unwrap()).unwrap()
}

#[tokio::test]
async fn a_backup_is_not_taken_in_before_its_parent_nor_twice() {
    let chain = CinderChain::of("zlib");

    let error = chain.engine.import(chain.exported(1)).await.unwrap_err();
    let parent_id = chain.exported(0).backup_id.to_string();
    assert!(
        error.to_string().contains(&format!("it builds on {parent_id}, which is not in this store")),
        "{error}"
    );

    chain.import().await;
    let before = chain.engine.catalog().record(chain.exported(2).backup_id).await.unwrap();
    let error = chain.engine.import(chain.exported(2)).await.unwrap_err();
    assert!(error.to_string().ends_with("it is in this store already"), "{error}");
    assert_eq!(chain.engine.catalog().record(chain.exported(2).backup_id).await.unwrap(), before);
}

#[tokio::test]
async fn a_backup_that_is_not_what_its_record_says_is_not_taken_in() {
    let chain = CinderChain::of("zlib");
    let full = chain.engine.import(chain.exported(0)).await.unwrap();
    let first = chain.exported(1);

    for (what, record) in [
        ("another volume", Record { volume_id: VolumeId::random(), parent_id: None, ..first.clone() }),
        ("no parent", Record { parent_id: None, ..first.clone() }),
        (
            "another backup's objects",
            Record { service_metadata: full.service_metadata, container: full.container, ..first.clone() },
        ),
        ("no objects", Record { service_metadata: "elsewhere".into(), ..first.clone() }),
    ] {
        chain.engine.import(record).await.expect_err(what);
        assert_eq!(chain.engine.catalog().record(first.backup_id).await.unwrap(), None, "{what}");
    }
    chain.engine.import(first).await.unwrap();
}

#[tokio::test]
async fn a_backup_whose_list_of_digests_is_of_another_volume_size_is_not_taken_in() {
    let chain = CinderChain::of("zlib");
    let path = chain.files().into_iter().find(|path| {
        let name = path.to_str().unwrap();
        name.contains(&chain.exported(0).backup_id.to_string()) && name.ends_with("_sha256file")
    });
    let path = path.unwrap();
    let mut list: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    list["sha256s"].as_array_mut().unwrap().pop();
    fs::write(path, list.to_string()).unwrap();

    let error = chain.engine.import(chain.exported(0)).await.unwrap_err();

    assert!(error.to_string().contains("10 blocks of 32768 bytes"), "{error}");
}

#[tokio::test]
async fn a_backup_on_one_of_cinders_nfs_driver_is_left_to_that_driver() {
    let chain = CinderChain::of("zlib");
    let nfs = "cinder.backup.drivers.nfs.NFSBackupDriver";
    let full = chain.engine.import(Record { service: nfs.into(), ..chain.exported(0) }).await.unwrap();
    fs::write(chain.path("source.img"), vec![0; full.volume_bytes as usize]).unwrap();
    let own = BackupId::random();

    chain.run(chain.backup(own, Parent::Latest), Some(Mode::Incremental)).await.unwrap();

    let record = chain.engine.catalog().available(own).await.unwrap();
    assert_eq!(record.parent_id, Some(full.backup_id));
    assert_eq!(record.service, nfs);
}
