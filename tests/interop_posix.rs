//! Backhaul and OpenStack Cinder 29 on one folder: either restores, goes on from and deletes what the other made.
//!
//! Cinder's posix driver is the real one. What a volume held is known here, and is not asked of either.

use std::collections::BTreeSet;
use std::fs;

use backhaul::cinder::export_record::{self, Form};
use backhaul::engine::Engine;
use backhaul::engine::chunked::{Compression, Settings};
use backhaul::job::{BackupId, Parent, VolumeId, Work};
use rstest::rstest;
use serde_json::json;

use crate::support::chain::lies_as_cinder_has_it;
use crate::support::cinder::{Cinder, Of};
use crate::support::engine::{Bench, Kind, backup_job, delete, paths_of, restore, run, verify};
use crate::support::volume::{Fill, Volume, junk};

use Who::{Backhaul, Openstack};

const MIB: usize = 1 << 20;
/// Cinder reads a volume to its end, however long its database says it is: the last block is a short one.
const BYTES: usize = 3 * MIB + 777;
const BLOCK_BYTES: usize = 4096;

/// How objects are packed, in Cinder's words, and how large they are; each backup of a chain takes the next one.
const PACKED: [(&str, usize); 6] = [
    ("zstd", MIB),
    ("gzip", 256 << 10),
    ("none", 4 * MIB),
    ("bzip2", 64 << 10),
    ("zlib", MIB),
    ("bz2", 512 << 10),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Backhaul,
    Openstack,
}

/// A folder that both keep their backups in, and a volume that both know.
struct Stage {
    bench: Bench,
    cinder: Cinder,
    volume: Volume,
    volume_id: VolumeId,
    points: Vec<(BackupId, Vec<u8>)>,
}

fn settings((word, object_bytes): (&str, usize)) -> Settings {
    let compression = match word {
        "none" => Compression::None,
        "zlib" | "gzip" => Compression::Zlib,
        "bz2" | "bzip2" => Compression::Bz2,
        _ => Compression::Zstd,
    };
    Settings {
        compression,
        compression_level: 3,
        object_bytes,
        sha_block_bytes: BLOCK_BYTES,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    }
}

impl Stage {
    fn new() -> Self {
        let bench = Bench::new(Kind::Posix);
        let options = [
            format!("backup_posix_path={}", bench.root().display()),
            format!("backup_sha_block_size_bytes={BLOCK_BYTES}"),
        ];
        let mut cinder = Cinder::start("cinder.backup.drivers.posix.PosixBackupDriver", &options);
        let volume_id = VolumeId::random();
        cinder.add_volume(volume_id, 1);
        let mut volume = Volume::create(bench.volumes().join("volume"), BYTES);
        volume.fill(0..600_000, Fill::Noise(1));
        volume.fill(600_000..900_000, Fill::Text(1));
        volume.fill(MIB..2 * MIB, Fill::Zeros);
        volume.fill(2 * MIB + 5000..BYTES, Fill::Noise(2));
        Self { bench, cinder, volume, volume_id, points: Vec::new() }
    }

    /// An engine to read with: how it would write does not matter then.
    fn engine(&self) -> Engine {
        self.bench.engine(settings(PACKED[0]))
    }

    /// All files in the store.
    async fn found(&self) -> BTreeSet<String> {
        self.bench.everything([]).await.into_iter().filter(|path| !path.ends_with('/')).collect()
    }

    /// Writes to the volume: noise, text, and zeros where there was something, and something where there were zeros.
    fn change(&mut self, round: usize) {
        let at = round * 100_000;
        let fills = [Fill::Zeros, Fill::Noise(100 + round as u64), Fill::Text(round as u8), Fill::Hole];
        for (index, fill) in fills.into_iter().enumerate() {
            let start = at + index * 40_000;
            self.volume.fill(start..start + 30_000, fill);
        }
        self.volume.fill(MIB + at..MIB + at + 10_000, Fill::Noise(round as u64));
        self.volume.fill(BYTES - 10 * (round + 1)..BYTES, Fill::Text(round as u8));
    }

    /// Makes a backup, and tells the other one of it.
    async fn back_up(&mut self, who: Who, packed: (&str, usize), parent: Option<BackupId>) -> BackupId {
        let id = match who {
            Backhaul => {
                let parent = parent.map_or(Parent::None, Parent::Given);
                let mut job = backup_job(self.volume_id, &self.volume.path, parent);
                let Work::Backup(work) = &mut job.work else { unreachable!() };
                let volume_meta = self.cinder.ask("volume_meta", json!({ "volume_id": self.volume_id }));
                work.volume_meta = Some(volume_meta.as_str().unwrap().into());
                let engine = self.bench.engine(settings(packed));
                run(&engine, &job).await.unwrap();
                let record = engine.catalog().record(job.backup_id()).await.unwrap().unwrap();
                self.cinder.import(&record);
                job.backup_id()
            }
            Openstack => {
                let (word, object_bytes) = packed;
                let options =
                    json!({ "backup_compression_algorithm": word, "backup_file_size": object_bytes });
                self.cinder.ask("set", options);
                let path = self.volume.path.to_str().unwrap();
                let id = self.cinder.backup(self.volume_id, Of::File(path), parent).unwrap();
                let export = self.cinder.ask("export_record", json!({ "backup_id": id }));
                let record = export_record::import(export.to_string().as_bytes(), &Form::Files).unwrap();
                self.engine().import(record).await.unwrap();
                id
            }
        };
        self.points.push((id, self.volume.bytes.clone()));
        id
    }

    /// Either restores every point, onto a new volume and over an old one, and every point is found whole.
    async fn check_all(&mut self, told: &str) {
        let target = self.bench.volumes().join("target");
        for (index, (id, bytes)) in self.points.clone().into_iter().enumerate() {
            for (who, new) in [(Backhaul, true), (Backhaul, false), (Openstack, true), (Openstack, false)] {
                let told = format!("{told}, point {index}, restored by {who:?}, new: {new}");
                match (who, new) {
                    (_, false) => drop(junk(&target, BYTES, 9)),
                    (Backhaul, true) => {}
                    (Openstack, true) => fs::File::create(&target).unwrap().set_len(BYTES as u64).unwrap(),
                }
                match who {
                    Backhaul => drop(restore(&self.engine(), id, &target).await.unwrap()),
                    Openstack => {
                        let new_volume = VolumeId::random();
                        self.cinder.add_volume(new_volume, 1);
                        self.cinder.restore_file(id, new_volume, &target, new);
                    }
                }
                assert!(fs::read(&target).unwrap() == bytes, "{told}");
                fs::remove_file(&target).unwrap();
            }
            verify(&self.engine(), id).await.unwrap();
        }
    }
}

#[rstest]
#[case::backhaul_alone([Backhaul; 4])]
#[case::cinder_alone([Openstack; 4])]
#[case::backhaul_first([Backhaul, Openstack, Backhaul, Openstack])]
#[case::cinder_first([Openstack, Backhaul, Openstack, Backhaul])]
#[tokio::test(flavor = "multi_thread")]
async fn either_restores_every_point_of_a_chain(#[case] who: [Who; 4]) {
    let mut stage = Stage::new();
    let mut packed = PACKED.into_iter().cycle();
    // A new chain each time, which begins with another way of packing.
    for round in 0..3 {
        let mut parent = None;
        stage.points.clear();
        let mut told = String::new();
        for (index, who) in who.into_iter().enumerate() {
            let packed = packed.next().unwrap();
            stage.change(round * 4 + index);
            parent = Some(stage.back_up(who, packed, parent).await);
            told += &format!("{who:?} {packed:?}, ");
        }
        stage.check_all(&told).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_lies_in_folders_as_cinder_has_it_and_goes_without_a_trace() {
    lies_as_cinder_has_it(Kind::Posix, "cinder.backup.drivers.posix.PosixBackupDriver").await;
}

/// Cinder up to 28 leaves out the zeros of every backup of a chain on a new volume, not only those of the first one.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn what_became_zeros_is_zeros_where_cinder_28_leaves_what_was_there(
    #[values([Backhaul; 3], [Openstack; 3], [Openstack, Backhaul, Openstack])] who: [Who; 3],
) {
    let mut stage = Stage::new();
    let (mut parent, mut told) = (None, String::new());
    for (index, who) in who.into_iter().enumerate() {
        match index {
            0 => stage.volume.fill(0..BYTES, Fill::Noise(7)),
            1 => stage.volume.fill(MIB / 2..5 * MIB / 2, Fill::Zeros),
            _ => stage.volume.fill(MIB..MIB + 100, Fill::Noise(8)),
        }
        // What became zeros is four whole objects, of a store in which nothing else is packed.
        let packed = if index == 1 { ("none", MIB / 2) } else { ("zstd", 4 * MIB) };
        let id = stage.back_up(who, packed, parent).await;
        if index == 1 && who == Backhaul {
            let record = stage.engine().catalog().record(id).await.unwrap().unwrap();
            let path = |number| format!("{}/{}-{number:05}", record.container, record.service_metadata);
            let bytes = |number| fs::metadata(stage.bench.root().join(path(number))).unwrap().len();
            assert_eq!(record.counts.object_count, 4);
            assert!((1..=4).all(|number| bytes(number) < 100), "{told}");
        }
        parent = Some(id);
        told += &format!("{who:?}, ");
    }
    stage.check_all(&told).await;

    // So it is a chain by which that shows.
    let target = stage.bench.volumes().join("target");
    fs::File::create(&target).unwrap().set_len(BYTES as u64).unwrap();
    let (id, bytes) = stage.points[2].clone();
    let new_volume = VolumeId::random();
    stage.cinder.add_volume(new_volume, 1);
    let to = json!({ "file": target });
    stage.cinder.ask("restore_as_28", json!({ "backup_id": id, "volume_id": new_volume, "target": to }));
    assert!(fs::read(&target).unwrap() != bytes);
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_what_has_not_changed_has_no_objects_and_is_restored_by_either(
    #[values(Backhaul, Openstack)] first: Who,
    #[values(Backhaul, Openstack)] second: Who,
) {
    let mut stage = Stage::new();
    let parent = stage.back_up(first, PACKED[0], None).await;
    let id = stage.back_up(second, PACKED[1], Some(parent)).await;

    let record = stage.engine().catalog().record(id).await.unwrap().unwrap();
    let metadata = format!("{}/{}_metadata", record.container, record.service_metadata);
    let metadata: serde_json::Value =
        serde_json::from_slice(&fs::read(stage.bench.root().join(metadata)).unwrap()).unwrap();
    assert_eq!(metadata["objects"], json!([]));
    stage.check_all(&format!("{first:?} {second:?}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cinder_puts_back_what_we_kept_about_a_volume() {
    let mut stage = Stage::new();
    let id = stage.back_up(Backhaul, PACKED[0], None).await;
    let target = stage.bench.volumes().join("target");
    fs::File::create(&target).unwrap().set_len(BYTES as u64).unwrap();
    let new = VolumeId::random();
    stage.cinder.add_volume(new, 1);
    stage.cinder.ask("change_volume", json!({ "volume_id": new, "display_name": "", "metadata": {} }));

    stage.cinder.restore_file(id, new, &target, true);

    let shown = stage.cinder.ask("show_volume", json!({ "volume_id": new }));
    assert_eq!(shown, json!({ "display_name": "data", "metadata": { "color": "blue" } }));
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn either_deletes_what_the_other_made_and_nothing_else(
    #[values(Backhaul, Openstack)] maker: Who,
    #[values(Backhaul, Openstack)] remover: Who,
) {
    let mut stage = Stage::new();
    let parent = stage.back_up(maker, PACKED[0], None).await;
    stage.change(1);
    let child = stage.back_up(maker, PACKED[1], Some(parent)).await;
    let other = stage.back_up(maker, PACKED[2], None).await;
    let engine = stage.engine();
    let mut expected = BTreeSet::new();
    for id in [parent, child, other] {
        let record = engine.catalog().record(id).await.unwrap().unwrap();
        let object_count = match maker {
            Backhaul => record.counts.object_count,
            Openstack => objects_of(&stage.bench, &record.container.to_string()),
        };
        let mut paths = paths_of(&record, object_count);
        if maker == Openstack {
            paths.retain(|path| !path.contains("/checksums/"));
        }
        expected.extend(paths);
    }
    assert_eq!(stage.found().await, expected);

    for id in [child, other, parent] {
        if remover == Openstack {
            // What we keep beside it goes with our own delete, which finds nothing else.
            stage.cinder.delete(id);
            let of_this = |path: &&String| path.contains(&id.to_string()) && !path.starts_with(".backhaul/");
            assert_eq!(stage.found().await.iter().find(of_this), None);
        }
        delete(&engine, id).await.unwrap();
        expected.retain(|path| !path.contains(&id.to_string()));
        assert_eq!(stage.found().await, expected);
    }
    assert_eq!(expected, BTreeSet::new());
}

/// How many data objects lie in a container that has one backup.
fn objects_of(bench: &Bench, container: &str) -> u64 {
    let names = fs::read_dir(bench.root().join(container)).unwrap();
    let data = |name: &str| !name.ends_with("_metadata") && !name.ends_with("_sha256file");
    names.filter(|entry| data(entry.as_ref().unwrap().file_name().to_str().unwrap())).count() as u64
}
