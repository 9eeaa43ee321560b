//! Whole backups in buckets of Google Cloud Storage: what is written where, and that neither tokens that expire nor a network or
//! a server that fails change a byte.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::chain::{MIB, Trouble, lies_as_cinder_has_it, restarts_cost_nothing_but_time, settings};
use crate::support::engine::{Bench, Kind, MEMORY_BYTES, backup, restore};
use crate::support::gcs::{self, Own, Tokens};
use crate::support::link::Link;
use crate::support::stack::{Stack, until};
use crate::support::volume::{Fill, Volume};
use backhaul::engine::chunked::Compression;
use backhaul::error::{Causes, Class};
use backhaul::job::{Parent, VolumeId};
use backhaul::store::{Folder, Gcs, ObjectStore};
use bytes::Bytes;
use rstest::rstest;

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_lies_in_a_bucket_as_cinder_has_it_and_goes_without_a_trace() {
    lies_as_cinder_has_it(Kind::Gcs, "cinder.backup.drivers.gcs.GoogleBackupDriver").await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_in_the_middle_costs_nothing_but_time(
    #[values(Trouble::Cut, Trouble::AnswersLost, Trouble::Overloaded, Trouble::Expired, Trouble::Slow)]
    trouble: Trouble,
) {
    let bench = Bench::new(Kind::Gcs);
    let (link, tokens) = (Link::to(&gcs::url()), Tokens::start(3600));
    let mut behind = gcs::settings(link.url(), &gcs::new_bucket());
    behind.credentials_file = Some(tokens.key_file());
    behind.http.idle_seconds_max = 5;
    behind.http.retries_max = 30;
    let store = Gcs::new(behind).unwrap();
    store.reach().await.unwrap();
    let engine = bench.engine_on(Arc::new(store), settings(Compression::None), MEMORY_BYTES);
    trouble.costs_nothing_but_time(&bench, &engine, &link).await;
    // Each 401 has cost one renewal.
    assert_eq!(tokens.given(), if trouble == Trouble::Expired { 4 } else { 1 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_restarted_in_the_middle_costs_nothing_but_time() {
    let (bench, own) = (Bench::new(Kind::Gcs), Arc::new(Own::new()));
    let mut behind = gcs::settings(&own.up(), bench.bucket());
    behind.http.retries_max = 30;
    // A backup is over too soon otherwise.
    behind.http.connections_max = 1;
    let store = Arc::new(Gcs::new(behind).unwrap());
    let (stopped, started) = (own.clone(), own.clone());
    let (stop, start) = (move || stopped.down(), move || drop(started.up()));
    restarts_cost_nothing_but_time(&bench, store, stop, start).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_expire_in_the_middle_cost_nothing_but_a_renewal() {
    let bench = Bench::new(Kind::Gcs);
    // Half of that is the margin.
    let (link, tokens) = (Link::to(&gcs::url()), Tokens::start(2));
    let mut behind = gcs::settings(link.url(), &gcs::new_bucket());
    behind.credentials_file = Some(tokens.key_file());
    // One after the other, so that what is written takes as long as the link needs for all of it.
    behind.http.connections_max = 1;
    let store = Gcs::new(behind).unwrap();
    let engine = bench.engine_on(Arc::new(store), settings(Compression::None), MEMORY_BYTES);
    let mut volume = Volume::create(bench.volumes().join("volume"), 12 * MIB);
    volume.fill(0..12 * MIB, Fill::Noise(1));
    link.slow_down(3 << 20);

    let begun = Instant::now();
    let record = backup(&engine, VolumeId::random(), &volume.path, Parent::None).await.unwrap();
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    let given = tokens.given();
    assert!(given >= 2, "{given}");

    link.count(&format!("authorization: Bearer token-{}", given + 2));
    let begun = Instant::now();
    let target = bench.volumes().join("target");
    while link.counted() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(120), "{given}, then {}", tokens.given());
        let _ = fs::remove_file(&target);
        restore(&engine, record.backup_id, &target).await.unwrap();
        assert!(fs::read(&target).unwrap() == volume.bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_whose_token_has_expired_share_one_renewal() {
    let (link, tokens) = (Link::to(&gcs::url()), Tokens::start(3600));
    let mut behind = gcs::settings(link.url(), &gcs::new_bucket());
    behind.credentials_file = Some(tokens.key_file());
    let store = Gcs::new(behind).unwrap();
    let name = Folder::own("gcs").object("a").unwrap();
    store.put(&name, Bytes::from_static(b"first")).await.unwrap();
    assert_eq!(tokens.given(), 1);

    // None is refused before all have asked with the old token.
    link.stall(true);
    let refused = "HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    link.answer(vec![refused.to_owned(); 24]);
    let gets = (0..24).map(|_| {
        let (store, name) = (store.clone(), name.clone());
        tokio::spawn(async move { store.get(&name).await.unwrap().collect(&name, 100).await.unwrap() })
    });
    let gets: Vec<_> = gets.collect();
    until("all have asked", || link.answers_left() == 0);
    link.stall(false);
    for get in gets {
        assert_eq!(get.await.unwrap(), "first");
    }
    assert_eq!(tokens.given(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_asked_for_with_what_the_key_signs() {
    let tokens = Tokens::start(3600);
    let mut settings = gcs::settings(&gcs::url(), gcs::BUCKET);
    settings.credentials_file = Some(tokens.key_file());
    Gcs::new(settings).unwrap().reach().await.unwrap();

    let (head, claims) = tokens.last_claims();
    assert_eq!((&head["alg"], &head["kid"]), (&"RS256".into(), &"0123456789abcdef".into()));
    assert_eq!(claims["iss"], "backup@backups.iam.gserviceaccount.com");
    assert_eq!(claims["scope"], "https://www.googleapis.com/auth/devstorage.read_write");
    assert!(claims["aud"].as_str().unwrap().ends_with("/token"), "{claims}");
    let (from, until) = (claims["iat"].as_i64().unwrap(), claims["exp"].as_i64().unwrap());
    let now = jiff::Timestamp::now().as_second();
    assert!((now - 60..=now).contains(&from) && until == from + 3600, "{claims}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_account_that_cannot_be_used_is_said_to_be_and_its_key_is_not_shown() {
    let tokens = Tokens::start(3600);
    let mut settings = gcs::settings(&gcs::url(), gcs::BUCKET);
    settings.credentials_file = Some(tokens.key_file());
    let store = Gcs::new(settings.clone()).unwrap();
    tokens.refuse();
    let begun = Instant::now();
    let name = Folder::own("gcs").object("a").unwrap();
    for error in [store.reach().await.unwrap_err(), store.put(&name, Bytes::new()).await.unwrap_err()] {
        let told = Causes(&error).to_string();
        assert_eq!(error.class(), Class::Permanent, "{told}");
        assert!(told.contains("does not accept the service account"), "{told}");
        assert!(told.contains("invalid_grant Invalid JWT Signature."), "{told}");
    }
    // It was not tried again.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(!format!("{store:?}").contains("PRIVATE KEY"), "{store:?}");

    tokens.write_key("hush");
    let told = Causes(&Gcs::new(settings.clone()).unwrap_err()).to_string();
    assert!(told.contains("account.json") && told.contains("no key in PEM"), "{told}");
    assert!(!told.contains("hush"), "{told}");
    fs::write(tokens.key_file(), r#"{"private_key": "hush""#).unwrap();
    let told = Causes(&Gcs::new(settings.clone()).unwrap_err()).to_string();
    assert!(told.contains("no JSON with a key as Google makes it") && !told.contains("hush"), "{told}");
    fs::remove_file(tokens.key_file()).unwrap();
    let told = Causes(&Gcs::new(settings).unwrap_err()).to_string();
    assert!(told.contains("account.json"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_objects_are_deleted_with_one_request() {
    let link = Link::to(&gcs::url());
    let store = Gcs::new(gcs::settings(link.url(), &gcs::new_bucket())).unwrap();
    let folder = Folder::own("gcs");
    let names: Vec<_> = (0..250).map(|number| folder.object(&number.to_string()).unwrap()).collect();
    // One that is not there is as good as gone.
    for name in names.iter().step_by(10) {
        store.put(name, Bytes::from_static(b"x")).await.unwrap();
    }
    assert_eq!(store.list(&folder, "").await.unwrap().len(), 25);
    link.count("POST /batch/storage/v1 ");
    store.delete_all(&names).await.unwrap();
    assert_eq!(link.counted(), 3);
    assert_eq!(store.list(&folder, "").await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_deleted_with_others_is_deleted_alone() {
    let link = Link::to(&gcs::url());
    let store = Gcs::new(gcs::settings(link.url(), &gcs::new_bucket())).unwrap();
    let folder = Folder::own("gcs");
    let names: Vec<_> = (0..3).map(|number| folder.object(&number.to_string()).unwrap()).collect();
    let busy = "--x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n\r\n\
                --x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 404 Not Found\r\n\r\n\r\n\
                --x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 503 Service Unavailable\r\n\r\n\r\n--x--\r\n";
    let length = busy.len();
    let busy = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{busy}");
    let unknown = "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".to_owned();
    for answer in [busy, unknown] {
        for name in &names {
            store.put(name, Bytes::from_static(b"x")).await.unwrap();
        }
        link.answer([answer]);
        link.count("DELETE /storage/v1/b/");
        store.delete_all(&names).await.unwrap();
        assert_eq!(link.counted(), 3);
        assert_eq!(store.list(&folder, "").await.unwrap(), []);
    }
}

#[test]
fn the_program_checks_backs_up_and_restores() {
    let (tokens, bucket, endpoint) = (Tokens::start(3600), gcs::new_bucket(), gcs::url());
    let key_file = tokens.key_file();
    let section = format!(
        "[store.far]\nkind = \"gcs\"\ndefault = true\nendpoint = \"{endpoint}\"\nbucket = \"{bucket}\"\n\
         credentials_file = \"{}\"\nobject_bytes = 1048576\n",
        key_file.display()
    );
    // None of these commands needs a broker.
    let stack = Stack::new("amqp://127.0.0.1:1", "", &section);
    let checked = String::from_utf8(stack.run(&["check"]).stdout).unwrap();
    assert!(
        checked.contains(&format!("bucket {bucket} of {endpoint}/ can be written, read and listed")),
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
    let exported = stack.ok(&["record", "export", id[1]]);
    assert!(exported.contains("cinder.backup.drivers.gcs.GoogleBackupDriver"), "{exported}");
    stack.ok(&[&["run", "delete"], &id[..]].concat());

    tokens.refuse();
    let told = String::from_utf8(stack.run(&["check"]).stdout).unwrap();
    assert!(told.contains("does not accept the service account"), "{told}");
}
