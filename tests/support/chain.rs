//! Whole chains of backups in a store, and what may happen to a server meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use backhaul::engine::Engine;
use backhaul::engine::chunked::{Compression, Settings};
use backhaul::job::{Container, Parent, Record, VolumeId};
use backhaul::store::{Folder, ObjectStore};

use super::engine::{Bench, Kind, MEMORY_BYTES, backup, delete, paths_of, restore, verify};
use super::link::Link;
use super::volume::{Fill, Volume, junk};

pub(crate) const MIB: usize = 1 << 20;

/// Small objects, so that a small volume has many.
pub(crate) fn settings(compression: Compression) -> Settings {
    Settings {
        compression,
        compression_level: 3,
        object_bytes: MIB,
        sha_block_bytes: 32 << 10,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    }
}

/// A volume of text, noise, zeros and a hole, whose last block is short.
pub(crate) fn volume(bench: &Bench) -> Volume {
    let mut volume = Volume::create(bench.volumes().join("volume"), 12 * MIB + 5000);
    volume.fill(0..3 * MIB, Fill::Noise(1));
    volume.fill(3 * MIB..5 * MIB, Fill::Text(1));
    volume.fill(5 * MIB..6 * MIB, Fill::Zeros);
    volume.fill(9 * MIB + 77..12 * MIB + 5000, Fill::Noise(2));
    volume
}

/// A full backup and two incremental ones, with what the volume held at the time of each.
pub(crate) struct Chain(pub(crate) Vec<(Record, Vec<u8>)>);

impl Chain {
    /// Makes one, and changes the volume between its backups.
    pub(crate) async fn make(engine: &Engine, volume: &mut Volume) -> Self {
        let volume_id = VolumeId::random();
        let mut chain: Vec<(Record, Vec<u8>)> = Vec::new();
        for step in 0..3 {
            if step > 0 {
                let at = step as usize * 2 * MIB + 1000;
                volume.fill(at..at + 200_000, Fill::Noise(10 + step));
                volume.fill(at + 200_000..at + 300_000, Fill::Zeros);
            }
            let parent = chain.last().map_or(Parent::None, |(record, _)| Parent::Given(record.backup_id));
            let record = backup(engine, volume_id, &volume.path, parent).await.unwrap();
            chain.push((record, volume.bytes.clone()));
        }
        Self(chain)
    }

    /// Restores and verifies all of them.
    pub(crate) async fn check(&self, bench: &Bench, engine: &Engine) {
        for (record, bytes) in &self.0 {
            let target = bench.volumes().join(format!("target-{}", record.backup_id));
            restore(engine, record.backup_id, &target).await.unwrap();
            assert!(fs::read(&target).unwrap() == *bytes, "{}", record.backup_id);
            verify(engine, record.backup_id).await.unwrap();
        }
    }

    /// Deletes them, the newest first.
    pub(crate) async fn delete(&self, engine: &Engine) {
        for (record, _) in self.0.iter().rev() {
            delete(engine, record.backup_id).await.unwrap();
        }
    }
}

/// Makes a chain in folders, in a bucket or in a container, looks whether it lies there as Cinder's driver, a `service`, has it,
/// and deletes it without a trace.
pub(crate) async fn lies_as_cinder_has_it(kind: Kind, service: &str) -> Bench {
    let bench = Bench::new(kind);
    let engine = bench.engine(settings(Compression::Zstd));
    let chain = Chain::make(&engine, &mut volume(&bench)).await;

    let mut expected = BTreeSet::new();
    for (record, _) in &chain.0 {
        let time = record.created_at.strftime("%Y%m%d%H%M%S");
        let (volume_id, id) = (record.volume_id, record.backup_id.to_string());
        let (container, prefix) = if bench.is_files() {
            (format!("{}/{}/{id}", &id[..2], &id[2..4]), format!("volume_{volume_id}_{time}_backup_{id}"))
        } else {
            (bench.bucket().to_owned(), format!("volume_{volume_id}/{time}/az_nova_backup_{id}"))
        };
        assert_eq!((record.container.as_str(), &record.service_metadata), (&*container, &prefix));
        assert_eq!(record.service, service);
        expected.extend(paths_of(record, record.counts.object_count));
    }
    let container: Container = chain.0[0].0.container.clone();
    assert_eq!(bench.everything([&container]).await, expected);
    chain.check(&bench, &engine).await;

    chain.delete(&engine).await;
    assert_eq!(bench.everything([&container]).await, BTreeSet::new());
    bench
}

/// What happens on the way to a server, several times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    Cut,
    AnswersLost,
    Overloaded,
    /// A token has expired, and then some answers are lost.
    Expired,
    /// It goes on, but slowly.
    Slow,
}

impl Trouble {
    fn begin(self, link: &Link) {
        let answer =
            |status: &str| format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        match self {
            Self::Cut => link.cut_after((1..30).map(|number| number * 700_001 % 2_000_000 + 100_000)),
            Self::AnswersLost => link.lose_answers(3),
            Self::Overloaded => link.answer(vec![answer("503 Service Unavailable"); 3]),
            Self::Expired => {
                link.answer([answer("401 Unauthorized")]);
                link.lose_answers(2);
            }
            Self::Slow => link.slow_down(4 << 20),
        }
    }

    /// Makes a chain, restores and deletes it over a link that has this trouble at every step.
    pub(crate) async fn costs_nothing_but_time(self, bench: &Bench, engine: &Engine, link: &Link) {
        let least = if self == Self::Slow { 0 } else { 3 };
        self.begin(link);
        let chain = Chain::make(engine, &mut volume(bench)).await;
        let while_written = link.fault_count();
        assert!(while_written >= least, "{while_written}");
        self.begin(link);
        chain.check(bench, engine).await;
        assert!(link.fault_count() >= while_written + least, "{}", link.fault_count());
        self.begin(link);
        chain.delete(engine).await;
    }
}

/// Backs a volume up to a store with the bucket of the bench and restores it, while its server is stopped in the middle of each,
/// and started again.
pub(crate) async fn restarts_cost_nothing_but_time(
    bench: &Bench,
    store: Arc<dyn ObjectStore>,
    stop: impl FnOnce() + Clone + Send + 'static,
    start: impl FnOnce() + Clone + Send + 'static,
) {
    let engine = bench.engine_on(store.clone(), settings(Compression::None), MEMORY_BYTES);
    let path = bench.volumes().join("volume");
    let bytes = junk(&path, 96 * MIB, 5);

    let container = Folder::from(&bench.bucket().parse::<Container>().unwrap());
    let begun = async || !store.list(&container, "").await.unwrap_or_default().is_empty();
    let backup = backup(&engine, VolumeId::random(), &path, Parent::None);
    let record = restarting(stop.clone(), start.clone(), begun, backup).await.unwrap();

    let target = bench.volumes().join("target");
    // It gets its name when it is whole.
    let has_data = |name: &String| {
        let data = fs::metadata(bench.volumes().join(name)).map_or(0, |file| file.blocks());
        name != "volume" && data > 0
    };
    let begun = async || bench.volume_names().iter().any(has_data);
    restarting(stop, start, begun, restore(&engine, record.backup_id, &target)).await.unwrap();
    assert!(fs::read(&target).unwrap() == bytes);
}

/// Does `work`, while a server is stopped as soon as that has `begun`, and started again.
async fn restarting<T>(
    stop: impl FnOnce() + Send + 'static,
    start: impl FnOnce() + Send + 'static,
    begun: impl AsyncFn() -> bool,
    work: impl Future<Output = T>,
) -> T {
    let over = AtomicBool::new(false);
    let work = async {
        let done = work.await;
        over.store(true, Ordering::SeqCst);
        done
    };
    let restart = async {
        while !begun().await {
            assert!(!over.load(Ordering::SeqCst), "it was over before it was seen to have begun");
            tokio::task::yield_now().await;
        }
        tokio::task::spawn_blocking(stop).await.unwrap();
        assert!(!over.load(Ordering::SeqCst), "it was over before the server was stopped");
        tokio::task::spawn_blocking(start).await.unwrap();
    };
    tokio::join!(work, restart).0
}
