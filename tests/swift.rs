//! Whole backups in containers: what is written where, and that neither tokens that expire nor a network or a server that
//! fails change a byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul::engine::Engine;
use backhaul::engine::chunked::{Compression, Settings};
use backhaul::error::{Causes, Class};
use backhaul::job::{Container, Parent, Record, VolumeId};
use backhaul::store::{Endpoint, Folder, ObjectStore, Swift, SwiftSettings};
use bytes::Bytes;
use rstest::rstest;
use support::engine::{Bench, Kind, MEMORY_BYTES, backup, delete, paths_of, restore, verify};
use support::link::Link;
use support::stack::Stack;
use support::swift;
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

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_lies_in_a_container_as_cinder_has_it_and_goes_without_a_trace(
    #[values(Kind::Swift, Kind::Gateway)] kind: Kind,
) {
    let bench = Bench::new(kind);
    let engine = bench.engine(settings(Compression::Zstd));
    let chain = chain(&engine, &mut volume(&bench)).await;

    let mut expected = BTreeSet::new();
    for (record, _) in &chain {
        let time = record.created_at.strftime("%Y%m%d%H%M%S");
        let (volume_id, backup_id) = (record.volume_id, record.backup_id);
        assert_eq!(record.service_metadata, format!("volume_{volume_id}/{time}/az_nova_backup_{backup_id}"));
        assert_eq!(record.service, "cinder.backup.drivers.swift.SwiftBackupDriver");
        expected.extend(paths_of(record, record.counts.object_count));
    }
    let container: Container = chain[0].0.container.clone();
    assert_eq!(container.as_str(), bench.bucket());
    assert_eq!(bench.everything([&container]).await, expected);
    check(&bench, &engine, &chain).await;

    for (record, _) in chain.iter().rev() {
        delete(&engine, record.backup_id).await.unwrap();
    }
    assert_eq!(bench.everything([&container]).await, BTreeSet::new());
}

#[rstest]
#[case::cut(|link: &Link| link.cut_after((1..30).map(|number| number * 700_001 % 2_000_000 + 100_000)))]
#[case::answers_lost(|link: &Link| link.lose_answers(3))]
#[case::overloaded(|link: &Link| {
    let answer = "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    link.answer((0..3).map(|_| answer.to_string()));
})]
#[case::expired(|link: &Link| {
    let answer = "HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    link.answer((0..1).map(|_| answer.to_string()));
    link.lose_answers(2);
})]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_in_the_middle_costs_nothing_but_time(#[case] fail: fn(&Link)) {
    let bench = Bench::new(Kind::Swift);
    let link = Link::to(&swift::url());
    let mut behind = swift::settings(link.url(), &swift::new_container());
    behind.http.idle_seconds_max = 5;
    behind.http.retries_max = 30;
    let store = Swift::new(behind).unwrap();
    store.reach().await.unwrap();
    let engine = bench.engine_on(Arc::new(store), settings(Compression::None), MEMORY_BYTES);

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

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_expire_in_the_middle_cost_nothing_but_a_renewal() {
    let bench = Bench::new(Kind::Swift);
    let link = Link::to(&swift::hasty_url());
    let mut behind = swift::settings(link.url(), &swift::new_container());
    // One after the other, so that what is written takes as long as the link needs for all of it.
    behind.http.connections_max = 1;
    let store = Swift::new(behind).unwrap();
    let engine = bench.engine_on(Arc::new(store), settings(Compression::None), MEMORY_BYTES);
    let mut volume = Volume::create(bench.volumes().join("volume"), 12 * MIB);
    volume.fill(0..12 * MIB, Fill::Noise(1));
    link.count("GET /auth/v1.0");
    link.slow_down(2 << 20);
    let enough = Duration::from_secs(2 * swift::HASTY_SECONDS);

    let begun = Instant::now();
    let record = backup(&engine, VolumeId::random(), &volume.path, Parent::None).await.unwrap();
    assert!(begun.elapsed() > enough, "{:?}", begun.elapsed());
    let logins = link.counted();
    assert!(logins >= 3, "{logins}");

    let begun = Instant::now();
    let target = bench.volumes().join("target");
    // A restore asks for its objects one after the other, and how many tokens that takes depends on the machine.
    while link.counted() < logins + 2 {
        assert!(begun.elapsed() < Duration::from_secs(120), "{logins}, then {}", link.counted());
        let _ = fs::remove_file(&target);
        restore(&engine, record.backup_id, &target).await.unwrap();
        assert!(fs::read(&target).unwrap() == volume.bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_whose_token_has_expired_share_one_renewal() {
    let link = Link::to(&swift::hasty_url());
    let store = Swift::new(swift::settings(link.url(), &swift::new_container())).unwrap();
    let folder = Folder::own("swift");
    let name = |number: usize| folder.object(&number.to_string()).unwrap();
    store.put(&name(0), Bytes::from_static(b"first")).await.unwrap();
    swift::until_a_token_has_expired(&swift::hasty_url()).await;

    link.count("GET /auth/v1.0");
    let gets = (0..24).map(|_| {
        let (store, name) = (store.clone(), name(0));
        tokio::spawn(async move { store.get(&name).await.unwrap().collect(&name, 100).await.unwrap() })
    });
    for get in gets.collect::<Vec<_>>() {
        assert_eq!(get.await.unwrap(), "first");
    }
    assert_eq!(link.counted(), 1);
    assert_eq!(store.list(&folder, "").await.unwrap().len(), 1);
}

#[rstest]
#[case::password(swift::keystone_settings)]
#[case::application_credential(swift::application_settings)]
#[tokio::test(flavor = "multi_thread")]
async fn keystone_tells_who_we_are_and_where_the_account_is(#[case] of: fn(&str) -> SwiftSettings) {
    let bench = Bench::new(Kind::Swift);
    let store = Swift::new(of(&swift::new_container())).unwrap();
    store.reach().await.unwrap();
    let engine = bench.engine_on(Arc::new(store), settings(Compression::Zstd), MEMORY_BYTES);
    let chain = chain(&engine, &mut volume(&bench)).await;
    check(&bench, &engine, &chain).await;
    for (record, _) in chain.iter().rev() {
        delete(&engine, record.backup_id).await.unwrap();
    }
}

#[rstest]
#[case::interface("object-store", "admin", None, "has no admin endpoint for object-store: it has ")]
#[case::region(
    "object-store",
    "public",
    Some("nowhere"),
    "no public endpoint in region nowhere for object-store"
)]
#[case::service("tape", "public", None, "no public endpoint for tape: it has no endpoint at all")]
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_not_in_the_catalog_is_told_with_those_that_are(
    #[case] service_type: &str,
    #[case] interface: &str,
    #[case] region: Option<&str>,
    #[case] expected: &str,
) {
    let mut settings = swift::keystone_settings(swift::CONTAINER);
    settings.endpoint = Endpoint::Catalog {
        service_type: service_type.into(),
        interface: interface.into(),
        region: region.map(Into::into),
    };
    let error = Swift::new(settings).unwrap().reach().await.unwrap_err();
    let told = Causes(&error).to_string();
    assert_eq!(error.class(), Class::Permanent, "{told}");
    assert!(told.contains(expected), "{told}");
    assert!(service_type == "tape" || told.contains("public in here"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_is_given_goes_before_what_the_catalog_says() {
    let mut settings = swift::keystone_settings(&swift::new_container());
    // Nobody listens there.
    settings.endpoint = Endpoint::At("http://127.0.0.1:1/v1/KEY_x".parse().unwrap());
    settings.http.retries_max = 0;
    let error = Swift::new(settings).unwrap().reach().await.unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{}", Causes(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn new_containers_get_the_storage_policy_that_is_asked_for() {
    let object = Folder::own("swift").object("a").unwrap();
    let with_policy = |policy: &str| {
        let mut settings = swift::settings(&swift::url(), &swift::new_container());
        settings.storage_policy = Some(policy.into());
        Swift::new(settings).unwrap()
    };
    with_policy("Policy-0").put(&object, Bytes::new()).await.unwrap();
    let error = with_policy("no-such-policy").put(&object, Bytes::new()).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{}", Causes(&error));
    assert!(Causes(&error).to_string().contains("400 Bad Request"), "{}", Causes(&error));
}

#[test]
fn the_program_checks_backs_up_and_restores() {
    let (url, container) = (swift::keystone_url(), swift::new_container());
    let (user, password) = swift::user_and_key(&url);
    let auth_url = swift::keystone_settings(&container).auth_url;
    let section = format!(
        "[store.far]\nkind = \"swift\"\ndefault = true\nauth_url = \"{auth_url}\"\nuser = \"{user}\"\n\
         project = \"backups\"\npassword_file = \"key\"\nregion = \"here\"\ncontainer = \"{container}\"\n\
         object_bytes = 1048576\n"
    );
    let stack = Stack::new(support::rabbit::Rabbit::shared().url(), "", &section);
    fs::write(stack.path("key"), format!("{password}\n")).unwrap();
    let checked = stack.ok(&["check"]);
    assert!(
        checked.contains("can be written, read and listed after a login at http://127.0.0.1"),
        "{checked}"
    );
    let bytes = support::stack::noise(3, 3 * MIB + 512);
    fs::write(stack.volume("a"), &bytes).unwrap();

    let volume_id = ["--volume-id", "00000000-0000-4000-8000-000000000001"];
    let id = ["--backup-id", "00000000-0000-4000-8000-000000000002"];
    let (source, target) = (stack.location("a"), stack.location("b"));
    stack.ok(&[&["run", "backup", "--source", &source], &volume_id[..], &id[..]].concat());
    stack.ok(&[&["run", "restore", "--target", &target], &id[..]].concat());
    assert!(fs::read(stack.volume("b")).unwrap() == bytes);
    let exported = stack.ok(&[&["record", "export"], &id[1..]].concat());
    assert!(exported.contains("cinder.backup.drivers.swift.SwiftBackupDriver"), "{exported}");
    stack.ok(&[&["run", "delete"], &id[..]].concat());

    fs::write(stack.path("key"), "wrong").unwrap();
    let checked = stack.run(&["check"]);
    let told = String::from_utf8(checked.stdout).unwrap();
    assert!(!checked.status.success() && told.contains("does not accept user and password"), "{told}");
    let worker = stack.run(&["worker"]);
    let told = String::from_utf8(worker.stderr).unwrap();
    assert!(!worker.status.success() && told.contains("store.far cannot be used"), "{told}");
    assert!(!told.contains("wrong"), "{told}");
}
