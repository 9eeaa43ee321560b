//! RBD images through librbd, on a real cluster, against a naive model: a vector of bytes and copies of it.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul::ceph::{self, Cluster, Diff, Features, Image, MapChange, Mode, NewImage, Pool};
use bytes::Bytes;
use futures_util::FutureExt;
use rustix::io::Errno;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::support::ceph::Ceph;

const MIB: u64 = 1 << 20;

fn pool() -> Pool {
    pool_with_answers_within(30)
}

fn pool_with_answers_within(seconds: u32) -> Pool {
    let conf: PathBuf = std::env::var_os("BACKHAUL_TEST_CEPH_CONF")
        .expect("BACKHAUL_TEST_CEPH_CONF names no cluster: run `make test`, which starts one")
        .into();
    Cluster::connect(&conf, "cinder", seconds).unwrap().pool("volumes").unwrap()
}

fn features() -> Features {
    Features::LAYERING | Features::EXCLUSIVE_LOCK | Features::OBJECT_MAP | Features::FAST_DIFF
}

fn new_image(pool: &Pool, bytes: u64) -> (String, Arc<Image>) {
    let name = format!("image-{}", Uuid::new_v4());
    pool.create_image(&name, &NewImage { bytes, features: features(), stripes: None }).unwrap();
    let image = pool.open_image(&name, None, Mode::Write).unwrap();
    (name, Arc::new(image))
}

async fn all(image: &Image) -> Vec<u8> {
    image.read(0, image.bytes().unwrap() as usize).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_reads_as_it_was_written_with_many_requests_under_way() {
    let pool = pool();
    let bytes = 10 * MIB + 1234;
    let (name, image) = new_image(&pool, bytes);
    let mut model = vec![0; bytes as usize];
    let mut seed = 1_u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for round in 0..4 {
        // Ranges that do not touch each other, so that their order does not matter.
        let mut requests = Vec::new();
        let mut offset = random(100_000);
        while offset < bytes {
            let length = (1 + random(300_000)).min(bytes - offset) as usize;
            let range = offset as usize..offset as usize + length;
            let (image, zeroes) = (image.clone(), random(3) == 0);
            let data: Vec<u8> = (0..length).map(|_| if zeroes { 0 } else { random(256) as u8 }).collect();
            model[range].copy_from_slice(&data);
            requests.push(tokio::spawn(async move {
                match zeroes {
                    true => image.write_zeroes(offset, length).await,
                    false => image.write(offset, data.into()).await,
                }
            }));
            offset += length as u64 + random(100_000);
        }
        for request in requests {
            request.await.unwrap().unwrap();
        }
        image.flush().await.unwrap();
        assert!(all(&image).await == model, "round {round}");
    }
    let error = image.read(bytes - 10, 11).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{error}");
    drop(image);
    assert!(pool.remove_image(&name).unwrap());
    assert!(!pool.remove_image(&name).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diff_has_all_that_changed_and_a_snapshot_stays_as_it_was() {
    let pool = pool();
    let (name, image) = new_image(&pool, 64 * MIB);
    image.write(5 * MIB, Bytes::from(vec![1; MIB as usize])).await.unwrap();
    image.create_snapshot("a").unwrap();
    assert_eq!(image.create_snapshot("a").unwrap_err().kind(), ErrorKind::AlreadyExists);
    image.write(5 * MIB + 4096, Bytes::from(vec![2; 4096])).await.unwrap();
    image.write(40 * MIB, Bytes::from(vec![3; 4096])).await.unwrap();
    image.write_zeroes(5 * MIB + 16384, 4096).await.unwrap();
    image.create_snapshot("b").unwrap();

    let range = 0..64 * MIB;
    let all_of_it = image.diff(None, range.clone(), Diff::Objects).unwrap();
    assert_eq!(
        all_of_it.iter().map(|e| (e.offset, e.length)).collect::<Vec<_>>(),
        [(4 * MIB, 4 * MIB), (40 * MIB, 4 * MIB)]
    );
    let b = pool.open_image(&name, Some("b"), Mode::Read).unwrap();
    let changed = b.diff(Some("a"), range.clone(), Diff::Fine).unwrap();
    for at in [5 * MIB + 4096, 5 * MIB + 16384, 40 * MIB] {
        assert!(changed.iter().any(|e| e.offset <= at && at + 4096 <= e.end()), "{at}: {changed:?}");
    }
    assert!(changed.iter().map(|e| e.length).sum::<u64>() < MIB, "{changed:?}");
    assert_eq!(b.diff(Some("b"), range, Diff::Fine).unwrap(), []);

    let a = pool.open_image(&name, Some("a"), Mode::Read).unwrap();
    assert!(a.read(5 * MIB, MIB as usize).await.unwrap().iter().all(|byte| *byte == 1));
    let names: Vec<_> = image.snapshots().unwrap().into_iter().map(|s| (s.name, s.bytes)).collect();
    assert_eq!(names, [("a".to_string(), 64 * MIB), ("b".to_string(), 64 * MIB)]);
    drop((a, b));
    assert!(image.remove_snapshot("a").unwrap());
    assert!(!image.remove_snapshot("a").unwrap());
    assert!(image.remove_snapshot("b").unwrap());
    assert_eq!(image.snapshots().unwrap(), []);
    drop(image);
    pool.remove_image(&name).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_objects_that_are_given_back_read_as_zeros_and_are_gone() {
    let pool = pool();
    let (name, image) = new_image(&pool, 12 * MIB);
    image.write(0, Bytes::from(vec![1; 12 << 20])).await.unwrap();

    image.discard(4 * MIB, 4 * MIB).await.unwrap();

    let mut expected = vec![1; 12 << 20];
    expected[4 << 20..8 << 20].fill(0);
    assert!(all(&image).await == expected);
    let left = image.diff(None, 0..12 * MIB, Diff::Objects).unwrap();
    let left: Vec<_> = left.iter().map(|extent| (extent.offset, extent.length)).collect();
    assert_eq!(left, [(0, 4 * MIB), (8 * MIB, 4 * MIB)]);
    drop(image);
    pool.remove_image(&name).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_tells_what_it_is() {
    let pool = pool();
    let (name, image) = new_image(&pool, 6 * MIB);
    assert_eq!((image.bytes().unwrap(), image.object_bytes().unwrap()), (6 * MIB, 4 * MIB));
    assert!(
        image.features().unwrap().has(features()) && !image.features().unwrap().has(Features::JOURNALING)
    );
    assert!(!image.maps_invalid().unwrap());
    assert_eq!(image.stripes().unwrap(), (4 * MIB, 1));
    assert_eq!(image.watcher_count().unwrap(), 1);
    assert_eq!(image.metadata("who").unwrap(), None);
    image.set_metadata("who", "it is").unwrap();
    assert_eq!(image.metadata("who").unwrap().as_deref(), Some("it is"));
    image.resize(20 * MIB).unwrap();
    assert_eq!(image.bytes().unwrap(), 20 * MIB);
    let id = image.id().unwrap();
    assert_eq!(pool.remove_image(&name).unwrap_err().kind(), ErrorKind::ResourceBusy);
    drop(image);
    assert!(pool.images().unwrap().contains(&name));
    let other = format!("{name}-renamed");
    pool.rename_image(&name, &other).unwrap();
    assert_eq!(pool.open_image(&name, None, Mode::Read).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(pool.open_image(&other, None, Mode::Read).unwrap().id().unwrap(), id);
    let error =
        pool.create_image(&other, &NewImage { bytes: 1, features: features(), stripes: None }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    pool.remove_image(&other).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_lost_the_lock_cannot_write_any_more() {
    let (name, first) = new_image(&pool_with_answers_within(10), 8 * MIB);
    first.lock().unwrap();
    first.write(0, Bytes::from_static(b"first")).await.unwrap();

    // A client of its own: the cluster shuts out clients, not images.
    let pool = pool();
    let second = pool.open_image(&name, None, Mode::Write).unwrap();
    assert_eq!(second.watcher_count().unwrap(), 2);
    assert!(second.lock().is_err());
    assert!(second.break_lock().unwrap());
    second.lock().unwrap();
    second.write(0, Bytes::from_static(b"other")).await.unwrap();
    // librbd refuses the write, or, if it has not heard of it yet, waits for a lock that it will never get again.
    let refused = first.write(0, Bytes::from_static(b"first")).await.unwrap_err();
    let ceph::Error::Operation { error, .. } = &refused else { panic!("{refused}") };
    let shut_out = Some(Errno::SHUTDOWN.raw_os_error());
    assert!(error.kind() == ErrorKind::TimedOut || error.raw_os_error() == shut_out, "{refused}");
    drop(first);
    assert_eq!(second.read(0, 5).await.unwrap(), b"other");
    drop(second);
    assert!(ceph::while_busy(|| pool.remove_image(&name)).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_nobody_waits_for_comes_to_its_end_before_the_image_is_closed() {
    let pool = pool();
    let (name, image) = new_image(&pool, 64 * MIB);
    for index in 0..32 {
        // Begun, and then dropped.
        assert!(image.write(index * MIB, Bytes::from(vec![7; MIB as usize])).now_or_never().is_none());
    }
    drop(image);
    let image = pool.open_image(&name, None, Mode::Read).unwrap();
    let bytes = image.read(0, 32 * MIB as usize).await.unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
    drop(image);
    pool.remove_image(&name).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_closed_when_what_was_given_up_is_answered_after_all() {
    let (name, image) = new_image(&pool(), 8 * MIB);
    drop(image);
    Ceph::shared().existing(&format!("volumes/{name}")).slow_down(MIB / 8);
    // An answer is waited for 5 seconds longer, and this one takes three times as long.
    let image = pool_with_answers_within(3).open_image(&name, None, Mode::Write).unwrap();
    image.lock().unwrap();
    let error = image.write(0, Bytes::from(vec![7; 3 * MIB as usize])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    drop(image);

    let pool = pool();
    let image = pool.open_image(&name, None, Mode::Write).unwrap();
    let begun = Instant::now();
    while image.watcher_count().unwrap() > 1 {
        assert!(begun.elapsed() < Duration::from_secs(90), "it is still open");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    image.lock().unwrap();
    drop(image);
    pool.remove_image(&name).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_image_that_takes_long_to_close_keeps_no_other_task_waiting() {
    let pool = pool();
    let (name, image) = new_image(&pool, 8 * MIB);
    drop(image);
    Ceph::shared().existing(&format!("volumes/{name}")).slow_down(MIB);
    let image = pool.open_image(&name, None, Mode::Write).unwrap();
    let (sender, closes) = oneshot::channel();
    let closed = tokio::spawn(async move {
        for index in 0..6 {
            assert!(image.write(index * MIB, Bytes::from(vec![7; MIB as usize])).now_or_never().is_none());
        }
        sender.send(()).unwrap();
        drop(image);
    });
    closes.await.unwrap();

    // There is one thread for tasks.
    tokio::spawn(async {}).await.unwrap();

    assert!(!closed.is_finished());
    closed.await.unwrap();
    pool.remove_image(&name).unwrap();
}

#[test]
fn an_object_is_made_once_and_replaced_whole() {
    let pool = pool();
    let name = format!("object-{}", Uuid::new_v4());
    assert_eq!(pool.object_bytes(&name).unwrap(), None);
    assert_eq!(pool.read_object(&name, 0, 10).unwrap_err().kind(), ErrorKind::NotFound);
    pool.create_object(&name, b"one").unwrap();
    assert_eq!(pool.create_object(&name, b"two").unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(pool.read_object(&name, 0, 10).unwrap(), b"one");
    assert_eq!(pool.read_object(&name, 1, 1).unwrap(), b"n");
    pool.replace_object(&name, b"other").unwrap();
    assert_eq!(pool.object_bytes(&name).unwrap(), Some(5));
    assert!(pool.remove_object(&name).unwrap());
    assert!(!pool.remove_object(&name).unwrap());
}

#[test]
fn a_map_is_listed_in_order_however_much_it_has() {
    let pool = pool();
    let name = format!("map-{}", Uuid::new_v4());
    assert_eq!(pool.map_entries(&name, "").unwrap(), []);
    assert_eq!(pool.map_value(&name, "a").unwrap(), None);
    let mut expected: Vec<(String, Vec<u8>)> =
        (0..1100).map(|index| (format!("a{index}"), format!("{index}").into_bytes())).collect();
    let mut changes: Vec<_> = expected.iter().map(|(key, value)| MapChange::Set(key, value)).collect();
    changes.push(MapChange::Set("b", b""));
    for some in changes.chunks(500) {
        assert!(pool.change_map(&name, some).unwrap());
    }
    expected.sort();
    assert_eq!(pool.map_entries(&name, "a").unwrap(), expected);
    assert_eq!(pool.map_entries(&name, "b").unwrap(), [("b".to_string(), vec![])]);
    assert_eq!(pool.map_value(&name, "a7").unwrap().as_deref(), Some(&b"7"[..]));
    assert_eq!(pool.map_value(&name, "b").unwrap().as_deref(), Some(&b""[..]));
    assert_eq!(pool.map_value(&name, "a").unwrap(), None);
    pool.remove_object(&name).unwrap();
}

#[test]
fn a_map_is_changed_if_it_is_as_expected_or_not_at_all() {
    use MapChange::{Expect, Remove, Set};
    let pool = pool();
    let name = format!("map-{}", Uuid::new_v4());
    for first in [Expect("a", b""), Remove("a")] {
        let error = pool.change_map(&name, &[first, Set("a", b"1")]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }

    assert!(pool.change_map(&name, &[Set("a", b"1"), Set("b", b"2"), Remove("c")]).unwrap());
    assert!(!pool.change_map(&name, &[Set("b", b"3"), Expect("a", b""), Set("a", b"4")]).unwrap());
    assert!(!pool.change_map(&name, &[Expect("b", b"2"), Expect("a", b"2"), Remove("b")]).unwrap());
    let entries = || pool.map_entries(&name, "").unwrap();
    assert_eq!(entries(), [("a".to_string(), b"1".to_vec()), ("b".to_string(), b"2".to_vec())]);

    let moved = [Expect("a", b"1"), Expect("c", b""), Remove("a"), Set("c", b"1")];
    assert!(pool.change_map(&name, &moved).unwrap());
    assert!(!pool.change_map(&name, &moved).unwrap());
    assert_eq!(entries(), [("b".to_string(), b"2".to_vec()), ("c".to_string(), b"1".to_vec())]);
    pool.remove_object(&name).unwrap();
}

#[test]
fn a_pool_that_is_not_there_is_a_clear_error() {
    let error = pool().cluster().pool("no-such-pool").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("no-such-pool"), "{error}");
}
