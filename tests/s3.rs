//! Whole backups in buckets: what is written where, and that neither a network nor a server that fails changes a byte.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use crate::support::chain::{MIB, Trouble, lies_as_cinder_has_it, settings};
use crate::support::engine::{Bench, Kind, MEMORY_BYTES};
use crate::support::link::Link;
use crate::support::s3;
use crate::support::stack::{Stack, until};
use backhaul::engine::chunked::Compression;
use backhaul::store::S3;
use rstest::rstest;

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_lies_in_a_bucket_as_cinder_has_it_and_goes_without_a_trace() {
    let bench = lies_as_cinder_has_it(Kind::S3, "cinder.backup.drivers.s3.S3BackupDriver").await;
    assert_eq!(s3::uploads(bench.bucket(), "").await, BTreeSet::new());
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_in_the_middle_costs_nothing_but_time(
    #[values(Trouble::Cut, Trouble::AnswersLost, Trouble::Overloaded, Trouble::Slow)] trouble: Trouble,
) {
    let bench = Bench::new(Kind::S3);
    let link = Link::to(&s3::url());
    let mut behind = s3::settings(link.url(), &s3::new_bucket());
    behind.http.idle_seconds_max = 5;
    behind.http.retries_max = 30;
    let store = Arc::new(S3::new(behind).unwrap());
    let engine = bench.engine_on(store, settings(Compression::None), MEMORY_BYTES);

    trouble.costs_nothing_but_time(&bench, &engine, &link).await;
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
    let stack = Stack::new(crate::support::rabbit::Rabbit::shared().url(), "", &section);
    fs::write(stack.path("key"), format!("{secret}\n")).unwrap();
    stack
}

#[test]
fn the_program_checks_backs_up_and_restores() {
    let link = Link::to(&s3::url());
    let stack = stack(&link, 8);
    let checked = stack.ok(&["check"]);
    assert!(checked.contains("can be written, read and listed"), "{checked}");
    let bytes = crate::support::stack::noise(3, 3 * MIB + 512);
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
    let bytes = crate::support::stack::noise(4, MIB);
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
    until("the job was put off", || worker.log().contains("not done for now, trying again later"));
    link.stall(false);
    link.cut();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// With a gateway of one's own, which may be stopped.
#[cfg(feature = "ceph")]
mod restarted {
    use super::*;
    use crate::support::ceph::Ceph;
    use crate::support::chain::restarts_cost_nothing_but_time;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_gateway_that_is_restarted_in_the_middle_costs_nothing_but_time() {
        let (bench, ceph) = (Bench::new(Kind::S3), Arc::new(Ceph::start_with(&[])));
        let mut behind = s3::settings(&ceph.start_gateway(), bench.bucket());
        behind.http.retries_max = 30;
        let store = Arc::new(S3::new(behind).unwrap());
        let (stopped, started) = (ceph.clone(), ceph.clone());
        let (stop, start) = (move || stopped.stop_gateway(), move || drop(started.start_gateway()));
        restarts_cost_nothing_but_time(&bench, store, stop, start).await;
    }
}
