//! Whole backups in buckets: what is written where, and that neither a network nor a server that fails changes a byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use backhaul::engine::Engine;
use backhaul::engine::chunked::{Compression, Settings};
use backhaul::job::{Container, Parent, Record, VolumeId};
use backhaul::store::S3;
use rstest::rstest;
use support::engine::{Bench, Kind, MEMORY_BYTES, backup, delete, paths_of, restore, verify};
use support::link::Link;
use support::s3;
use support::stack::{Stack, until};
use support::volume::{Fill, Volume};

const MIB: usize = 1 << 20;

fn settings(compression: Compression) -> Settings {
    Settings {
        compression,
        object_bytes: MIB,
        sha_block_bytes: 32 << 10,
        unchanged_check_per_mille: 1,
        source_snapshots_max: 1,
    }
}

/// A volume of text, noise, zeros and a hole, whose last block is short.
fn volume(bench: &Bench) -> Volume {
    let mut volume = Volume::create(bench.volumes().join("volume"), 12 * MIB + 5000);
    volume.fill(0..3 * MIB, Fill::Noise(1));
    volume.fill(3 * MIB..5 * MIB, Fill::Text(1));
    volume.fill(5 * MIB..6 * MIB, Fill::Zeros);
    volume.fill(9 * MIB + 77..12 * MIB + 5000, Fill::Noise(2));
    volume
}

/// Makes a full backup and two incremental ones, with what the volume held at the time of each.
async fn chain(engine: &Engine, volume: &mut Volume) -> Vec<(Record, Vec<u8>)> {
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
    chain
}

async fn check(bench: &Bench, engine: &Engine, chain: &[(Record, Vec<u8>)]) {
    for (record, bytes) in chain {
        let target = bench.volumes().join(format!("target-{}", record.backup_id));
        restore(engine, record.backup_id, &target).await.unwrap();
        assert!(fs::read(&target).unwrap() == *bytes, "{}", record.backup_id);
        verify(engine, record.backup_id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_lies_in_a_bucket_as_cinder_has_it_and_goes_without_a_trace() {
    let bench = Bench::new(Kind::S3);
    let engine = bench.engine(settings(Compression::Zstd));
    let chain = chain(&engine, &mut volume(&bench)).await;

    let mut expected = BTreeSet::new();
    for (record, _) in &chain {
        let time = record.created_at.strftime("%Y%m%d%H%M%S");
        let (volume_id, backup_id) = (record.volume_id, record.backup_id);
        assert_eq!(record.service_metadata, format!("volume_{volume_id}/{time}/az_nova_backup_{backup_id}"));
        assert_eq!(record.service, "cinder.backup.drivers.s3.S3BackupDriver");
        expected.extend(paths_of(record, record.counts.object_count));
    }
    let container: Container = chain[0].0.container.clone();
    assert_eq!(bench.everything([&container]).await, expected);
    check(&bench, &engine, &chain).await;

    for (record, _) in chain.iter().rev() {
        delete(&engine, record.backup_id).await.unwrap();
    }
    assert_eq!(bench.everything([&container]).await, BTreeSet::new());
    assert_eq!(s3::uploads(container.as_str(), "").await, BTreeSet::new());
}

#[rstest]
#[case::cut(|link: &Link| link.cut_after((1..30).map(|number| number * 700_001 % 2_000_000 + 100_000)))]
#[case::answers_lost(|link: &Link| link.lose_answers(3))]
#[case::overloaded(|link: &Link| {
    let answer = "HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    link.answer((0..3).map(|_| answer.to_string()));
})]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_in_the_middle_costs_nothing_but_time(#[case] fail: fn(&Link)) {
    let bench = Bench::new(Kind::S3);
    let link = Link::to(&s3::url());
    let mut behind = s3::settings(link.url(), &s3::new_bucket());
    behind.http.idle_seconds_max = 5;
    behind.http.retries_max = 30;
    let store = Arc::new(S3::new(behind).unwrap());
    let engine = bench.engine_on(store, settings(Compression::None), MEMORY_BYTES);

    fail(&link);
    let chain = chain(&engine, &mut volume(&bench)).await;
    let while_written = link.fault_count();
    assert!(while_written >= 3, "{while_written}");
    fail(&link);
    check(&bench, &engine, &chain).await;
    assert!(link.fault_count() >= while_written + 3, "{}", link.fault_count());
    fail(&link);
    for (record, _) in chain.iter().rev() {
        delete(&engine, record.backup_id).await.unwrap();
    }
}

/// The program's configuration for a store in a bucket of its own, behind a link.
fn stack(link: &Link, retries_max: u16) -> Stack {
    let url = url::Url::parse(link.url()).unwrap();
    let (key, secret) = (url.username(), url.password().unwrap());
    let bucket = s3::new_bucket();
    let section = format!(
        "[store.far]\nkind = \"s3\"\ndefault = true\nendpoint = \"http://127.0.0.1:{}\"\naccess_key = \"{key}\"\n\
         secret_key_file = \"key\"\nbucket = \"{bucket}\"\nobject_bytes = 1048576\nretries_max = {retries_max}\n\
         idle_seconds_max = 1\n",
        url.port().unwrap()
    );
    let stack = Stack::new(support::rabbit::Rabbit::shared().url(), "", &section);
    fs::write(stack.path("key"), format!("{secret}\n")).unwrap();
    stack
}

#[test]
fn the_program_checks_backs_up_and_restores() {
    let link = Link::to(&s3::url());
    let stack = stack(&link, 8);
    let checked = stack.ok(&["check"]);
    assert!(checked.contains("can be written, read and listed"), "{checked}");
    let bytes = support::stack::noise(3, 3 * MIB + 512);
    fs::write(stack.volume("a"), &bytes).unwrap();

    stack.ok(&[
        "run",
        "backup",
        "--volume-id",
        "00000000-0000-4000-8000-000000000001",
        "--backup-id",
        "00000000-0000-4000-8000-000000000002",
        "--source",
        &stack.location("a"),
    ]);
    let target = stack.location("b");
    let id = ["--backup-id", "00000000-0000-4000-8000-000000000002"];
    stack.ok(&[&["run", "restore", "--target", &target], &id[..]].concat());
    assert!(fs::read(stack.volume("b")).unwrap() == bytes);
    stack.ok(&[&["run", "delete"], &id[..]].concat());

    fs::write(stack.path("key"), "wrong").unwrap();
    let checked = stack.run(&["check"]);
    let told = String::from_utf8(checked.stdout).unwrap();
    assert!(
        !checked.status.success() && told.contains("does not accept access_key and secret_key"),
        "{told}"
    );
    let worker = stack.run(&["worker"]);
    let told = String::from_utf8(worker.stderr).unwrap();
    assert!(!worker.status.success() && told.contains("store.far cannot be used"), "{told}");
    assert!(!told.contains("wrong"), "{told}");
}

#[test]
fn a_server_that_is_away_puts_jobs_off_until_it_is_back() {
    let link = Link::to(&s3::url());
    let stack = stack(&link, 0);
    let bytes = support::stack::noise(4, MIB);
    fs::write(stack.volume("a"), &bytes).unwrap();
    link.stall(true);
    let worker = stack.worker();
    until("the worker has said that it does not reach the store", || {
        worker.log().contains("store not reached; its jobs are put off")
    });
    let source = stack.location("a");
    let volume_id = "00000000-0000-4000-8000-000000000001";
    let submit = ["submit", "backup", "--volume-id", volume_id, "--source", &source, "--wait", "--json"];
    let child = stack.command(&submit).stdout(std::process::Stdio::piped()).spawn().unwrap();
    until("the job was put off", || worker.log().contains("failed for now, trying again later"));
    link.stall(false);
    link.cut();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// With a gateway of one's own, which may be stopped.
#[cfg(feature = "ceph")]
mod restarted {
    use std::os::unix::fs::MetadataExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    use backhaul::engine::chunked::{Budget, Chunked, Naming};
    use backhaul::engine::{Cpu, Volumes};
    use backhaul::store::{Folder, ObjectStore};
    use backhaul::volume::FileRoots;

    use super::*;
    use crate::support::ceph::Ceph;
    use crate::support::volume::junk;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_gateway_that_is_restarted_in_the_middle_costs_nothing_but_time() {
        let (bench, ceph) = (Bench::new(Kind::S3), Arc::new(Ceph::start_with(&[])));
        let usual = s3::new_bucket();
        let mut behind = s3::settings(&ceph.start_gateway(), &usual);
        behind.http.retries_max = 30;
        let store = Arc::new(S3::new(behind).unwrap());
        let (cpu, memory) = (Cpu::start(2).unwrap(), Budget::new(MEMORY_BYTES));
        let chunked = Chunked::new(store.clone(), settings(Compression::None), cpu, memory);
        let naming = Naming::Buckets { usual: usual.clone() };
        let volumes = Volumes::files(FileRoots::new(&[bench.volumes()]));
        let engine = Engine::new(chunked.with_naming(naming), volumes);
        let path = bench.volumes().join("volume");
        let bytes = junk(&path, 96 * MIB, 5);

        let container = Folder::from(&usual.parse::<Container>().unwrap());
        let begun = async || !store.list(&container, "").await.unwrap_or_default().is_empty();
        let backup = backup(&engine, VolumeId::random(), &path, Parent::None);
        let record = restarting(&ceph, begun, backup).await.unwrap();

        let target = bench.volumes().join("target");
        // It gets its name when it is whole.
        let has_data = |name: &String| {
            let data = fs::metadata(bench.volumes().join(name)).map_or(0, |file| file.blocks());
            name != "volume" && data > 0
        };
        let begun = async || bench.volume_names().iter().any(has_data);
        restarting(&ceph, begun, restore(&engine, record.backup_id, &target)).await.unwrap();
        assert!(fs::read(&target).unwrap() == bytes);
    }

    /// Does `work`, while the gateway is stopped as soon as that has `begun`, and started again.
    async fn restarting<T>(
        ceph: &Arc<Ceph>,
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
            let (stopped, started) = (ceph.clone(), ceph.clone());
            tokio::task::spawn_blocking(move || stopped.stop_gateway()).await.unwrap();
            assert!(!over.load(Ordering::SeqCst), "it was over before the gateway was stopped");
            tokio::task::spawn_blocking(move || started.start_gateway()).await.unwrap();
        };
        tokio::join!(work, restart).0
    }
}
