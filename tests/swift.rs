//! Whole backups in containers: what is written where, and that neither tokens that expire nor a network or a server that
//! fails change a byte.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::chain::{
    Chain, MIB, Trouble, lies_as_cinder_has_it, restarts_cost_nothing_but_time, settings, volume,
};
use crate::support::engine::{Bench, Kind, MEMORY_BYTES, backup, backup_job, restore};
use crate::support::link::Link;
use crate::support::stack::Stack;
use crate::support::swift::{self, Own};
use crate::support::volume::{Deadly, Fill, Volume};
use backhaul::engine::chunked::{Budget, Chunked, Compression};
use backhaul::engine::{Cpu, Error};
use backhaul::error::{Causes, Class};
use backhaul::job::{Container, Context, Method, Mode, Parent, Strategy, VolumeId, Work};
use backhaul::store::{Endpoint, Folder, ObjectStore, Swift, SwiftSettings};
use bytes::Bytes;
use jiff::Timestamp;
use rstest::rstest;
use uuid::Uuid;

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_lies_in_a_container_as_cinder_has_it_and_goes_without_a_trace(
    #[values(Kind::Swift, Kind::Gateway)] kind: Kind,
) {
    lies_as_cinder_has_it(kind, "cinder.backup.drivers.swift.SwiftBackupDriver").await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_in_the_middle_costs_nothing_but_time(
    #[values(Trouble::Cut, Trouble::AnswersLost, Trouble::Overloaded, Trouble::Expired, Trouble::Slow)]
    trouble: Trouble,
) {
    let bench = Bench::new(Kind::Swift);
    let link = Link::to(&swift::url());
    let mut behind = swift::settings(link.url(), &swift::new_container());
    behind.http.idle_seconds_max = 5;
    behind.http.retries_max = 30;
    let store = Swift::new(behind).unwrap();
    store.reach().await.unwrap();
    let engine = bench.engine_on(Arc::new(store), settings(Compression::None), MEMORY_BYTES);

    trouble.costs_nothing_but_time(&bench, &engine, &link).await;
}

/// Two writers side by side, or two servers whose clocks differ: the server has then kept what is dated later, and answers the
/// other with 202.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_the_server_dates_before_another_one_is_made_again(
    #[values(false, true)] deleted: bool,
) {
    let mut settings = swift::settings(&swift::url(), swift::CONTAINER);
    settings.http.retries_max = 30;
    let store = Swift::new(settings).unwrap();
    let object = Folder::own("stores").object(&format!("later-{}", Uuid::new_v4())).unwrap();
    // The container is there then.
    store.put(&object, Bytes::from_static(b"first")).await.unwrap();
    let (token, account) = swift::token(&swift::url()).await;
    let url = format!("{account}/{}/{object}", swift::CONTAINER);
    let (client, later) = (reqwest::Client::new(), Timestamp::now() + Duration::from_secs(3));
    for (method, moment) in [("PUT", later), ("DELETE", later + Duration::from_millis(1))] {
        if method == "PUT" || deleted {
            let seconds = moment.as_millisecond() as f64 / 1e3;
            let request = client.request(method.parse().unwrap(), &url).header("x-auth-token", &token);
            let answer =
                request.header("x-timestamp", format!("{seconds:.5}")).body("later").send().await.unwrap();
            assert!(answer.status().is_success(), "{answer:?}");
        }
    }

    match deleted {
        true => store.put(&object, Bytes::from_static(b"ours")).await.unwrap(),
        false => store.replace(&object, Bytes::from_static(b"ours")).await.unwrap(),
    }

    assert!(Timestamp::now() > later, "the server has kept nothing that is later");
    let pieces = store.get(&object).await.unwrap();
    assert_eq!(pieces.collect(&object, MIB).await.unwrap(), "ours");
    store.delete(&object).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_restarted_in_the_middle_costs_nothing_but_time() {
    let (bench, own) = (Bench::new(Kind::Swift), Arc::new(Own::new()));
    let mut behind = swift::settings(&own.up(), bench.bucket());
    behind.http.retries_max = 30;
    let store = Arc::new(Swift::new(behind).unwrap());
    let (stopped, started) = (own.clone(), own.clone());
    let (stop, start) = (move || stopped.down_in_front(), move || drop(started.up()));
    restarts_cost_nothing_but_time(&bench, store, stop, start).await;
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
async fn tokens_of_keystone_that_are_refused_in_the_middle_cost_nothing_but_a_renewal() {
    let bench = Bench::new(Kind::Swift);
    let (keystone, link) = (Link::to(&swift::keystone_url()), Link::to(&swift::keystone_account().await));
    let mut behind = swift::keystone_settings(&swift::new_container());
    behind.auth_url.set_port(keystone.url().parse::<url::Url>().unwrap().port()).unwrap();
    behind.endpoint = Endpoint::At(link.url().parse().unwrap());
    behind.http.retries_max = 30;
    let engine =
        bench.engine_on(Arc::new(Swift::new(behind).unwrap()), settings(Compression::None), MEMORY_BYTES);
    keystone.count("POST /v3/auth/tokens");
    Trouble::Expired.costs_nothing_but_time(&bench, &engine, &link).await;
    // The first one, and one for each time that there was trouble.
    assert_eq!(keystone.counted(), 4);
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

/// A server that has not heard of the last write would answer with what was there before.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_over_is_asked_of_all_who_have_it() {
    let (link, container) = (Link::to(&swift::url()), swift::new_container());
    let mut settings = swift::settings(&swift::url(), &container);
    let mut account: url::Url = link.url().parse().unwrap();
    account.set_username("").unwrap();
    account.set_password(None).unwrap();
    account.set_path("/v1/AUTH_backup");
    settings.endpoint = Endpoint::At(account);
    let store = Swift::new(settings).unwrap();
    let bytes = Bytes::from_static;
    let own = Folder::own("swift").object("a").unwrap();
    let data = Folder::from(&container.parse::<Container>().unwrap()).object("a").unwrap();
    for (object, newest) in [(own, true), (data, false)] {
        link.count("x-newest: true");
        store.put(&object, bytes(b"first")).await.unwrap();
        let written = link.counted();
        assert!(store.swap(&object, bytes(b"first"), bytes(b"second")).await.unwrap());
        let swapped = link.counted() - written;
        assert_eq!(store.get(&object).await.unwrap().collect(&object, 100).await.unwrap(), "second");
        let read = link.counted() - swapped - written;
        // A put looks first, once more where it makes the container, and a swap reads and writes.
        let expected = if newest { (true, 2, 1) } else { (false, 0, 0) };
        assert_eq!((written > 0, swapped, read), expected, "{object}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_objects_are_deleted_with_a_few_requests() {
    let link = Link::to(&swift::url());
    let mut settings = swift::settings(&swift::url(), &swift::new_container());
    let mut account: url::Url = link.url().parse().unwrap();
    account.set_username("").unwrap();
    account.set_password(None).unwrap();
    account.set_path("/v1/AUTH_backup");
    settings.endpoint = Endpoint::At(account);
    let store = Swift::new(settings).unwrap();
    let folder = Folder::own("swift");
    let names: Vec<_> = (0..2500).map(|number| folder.object(&number.to_string()).unwrap()).collect();
    // It takes the server as long to find out that there is none.
    for name in names.iter().step_by(100) {
        store.put(name, Bytes::from_static(b"x")).await.unwrap();
    }
    assert_eq!(store.list(&folder, "").await.unwrap().len(), 25);

    link.count("POST /v1/AUTH_backup?bulk-delete");
    store.delete_all(&names).await.unwrap();
    assert!((1..=3).contains(&link.counted()), "{}", link.counted());
    assert_eq!(store.list(&folder, "").await.unwrap(), []);
    link.count("DELETE /v1");
    store.delete_all(&names).await.unwrap();
    assert_eq!(link.counted(), 0);
}

/// All of it was read and stored before it was told.
#[rstest]
#[case::that_fits((5 << 30) / 72 * 32_768, false)]
#[case::that_does_not((5 << 30) / 72 * 32_768 + 1, true)]
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_with_too_long_a_list_of_digests_is_refused_before_it_is_read(
    #[case] bytes: u64,
    #[case] refused: bool,
) {
    let container = swift::new_container();
    let store = Swift::new(swift::settings(&swift::url(), &container)).unwrap();
    let settings = settings(Compression::None);
    let chunked = Chunked::new(Arc::new(store), settings, Cpu::start(1).unwrap(), Budget::new(MEMORY_BYTES));
    let mut job = backup_job(VolumeId::random(), Path::new("/nowhere"), Parent::None);
    let Work::Backup(work) = &mut job.work else { unreachable!() };
    work.container = Some(container.parse().unwrap());
    let method = Method { strategy: Strategy::Chunked, mode: Some(Mode::Full) };
    let mut record = chunked.begin(job.id, work, None, bytes, method).unwrap();
    chunked.name(&mut record);

    // Whoever reads it dies; before that nobody finds the container.
    let source = Arc::new(Deadly { bytes, at: 0 });
    let error = chunked.backup(&Context::default(), &mut record, None, None, source).await.err().unwrap();

    let told = Causes(&error).to_string();
    match refused {
        true => {
            assert_eq!(error.class(), Class::Permanent, "{told}");
            assert!(told.contains("a larger sha_block_bytes"), "{told}");
        }
        // It was read.
        false => assert!(matches!(error, Error::Lost(_)), "{told}"),
    }
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
    let chain = Chain::make(&engine, &mut volume(&bench)).await;
    chain.check(&bench, &engine).await;
    chain.delete(&engine).await;
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
    let put = async |policy: Option<&str>| {
        let mut settings = swift::settings(&swift::url(), &swift::new_container());
        settings.storage_policy = policy.map(Into::into);
        let container = settings.container.clone();
        Swift::new(settings).unwrap().put(&object, Bytes::new()).await.map(|()| container)
    };
    for (asked, got) in [(Some("other"), "other"), (None, "usual")] {
        let container = put(asked).await.unwrap();
        assert_eq!(swift::policy_of(&container).await, got);
    }
    let error = put(Some("no-such-policy")).await.unwrap_err();
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
    let stack = Stack::new(crate::support::rabbit::Rabbit::shared().url(), "", &section);
    fs::write(stack.path("key"), format!("{password}\n")).unwrap();
    let checked = stack.ok(&["check"]);
    assert!(
        checked.contains("can be written, read and listed after a login at http://127.0.0.1"),
        "{checked}"
    );
    let bytes = crate::support::stack::noise(3, 3 * MIB + 512);
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
