//! Whole chains of backups in a store, and what may happen to a server meanwhile.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use backhaul::engine::Engine;
use backhaul::engine::chunked::{Compression, Settings};
use backhaul::job::{Parent, Record, VolumeId};

use super::engine::{Bench, backup, delete, restore, verify};
use super::link::Link;
use super::volume::{Fill, Volume};

pub(crate) const MIB: usize = 1 << 20;

/// Small objects, so that a small volume has many.
pub(crate) fn settings(compression: Compression) -> Settings {
    Settings {
        compression,
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

/// Does `work`, while a server is stopped as soon as that has `begun`, and started again.
pub(crate) async fn restarting<T>(
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
