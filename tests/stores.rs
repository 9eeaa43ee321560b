//! What every kind of store must do, case by case, on each of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::{gcs, s3, share, swift};
use backhaul::error::{Causes, Class};
use backhaul::store::{Folder, Gcs, Listed, Memory, ObjectName, ObjectStore, Posix, Reason, S3, Swift};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use rstest::rstest;
use tempfile::TempDir;
use uuid::Uuid;

const MIB: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Posix,
    Memory,
    S3,
    /// OpenStack's own.
    Swift,
    /// Ceph's gateway, spoken to as Swift.
    Gateway,
    /// The emulator that keeps the conditions of writes, and not how far an upload has come.
    Gcs,
    /// The other one.
    GcsChunks,
    #[cfg(feature = "ceph")]
    Rados,
}

#[derive(Debug, Clone, Copy)]
enum How {
    Put,
    Finish,
}

/// A store, and names in it that nobody else uses.
struct Bench {
    store: Arc<dyn ObjectStore>,
    folder: Folder,
    prefix: String,
    left: Left,
}

/// Where to look for what a store keeps out of sight.
enum Left {
    Files(TempDir),
    Nothing,
    Uploads,
    #[cfg(feature = "ceph")]
    Pool(backhaul::ceph::Pool),
}

impl Bench {
    fn new(kind: Kind) -> Self {
        let (store, left): (Arc<dyn ObjectStore>, Left) = match kind {
            Kind::Posix => {
                let root = match share::is_there() {
                    true => TempDir::new_in(share::ours(None).mount().unwrap()).unwrap(),
                    false => TempDir::new().unwrap(),
                };
                (Arc::new(Posix::open(root.path()).unwrap()), Left::Files(root))
            }
            Kind::Memory => (Arc::new(Memory::default()), Left::Nothing),
            Kind::S3 => {
                let settings = s3::settings(&s3::url(), s3::BUCKET);
                (Arc::new(S3::new(settings).unwrap()), Left::Uploads)
            }
            Kind::Swift | Kind::Gateway => {
                let url = if kind == Kind::Swift { swift::url() } else { swift::gateway_url() };
                let settings = swift::settings(&url, swift::CONTAINER);
                (Arc::new(Swift::new(settings).unwrap()), Left::Nothing)
            }
            Kind::Gcs | Kind::GcsChunks => {
                let url = if kind == Kind::Gcs { gcs::url() } else { gcs::chunks_url() };
                (Arc::new(Gcs::new(gcs::settings(&url, gcs::BUCKET)).unwrap()), Left::Nothing)
            }
            #[cfg(feature = "ceph")]
            Kind::Rados => {
                let pool = pool();
                (Arc::new(backhaul::store::Rados::new(pool.clone())), Left::Pool(pool))
            }
        };
        Self {
            store,
            folder: Folder::own("stores"),
            prefix: format!("test-{}-", Uuid::new_v4().simple()),
            left,
        }
    }

    fn name(&self, name: &str) -> ObjectName {
        self.folder.object(&format!("{}{name}", self.prefix)).unwrap()
    }

    async fn list(&self, prefix: &str) -> Vec<(String, u64)> {
        let listed = self.store.list(&self.folder, &format!("{}{prefix}", self.prefix)).await.unwrap();
        let short = |Listed { name, bytes, .. }: Listed| (name[self.prefix.len()..].to_string(), bytes);
        listed.into_iter().map(short).collect()
    }

    async fn read(&self, name: &ObjectName) -> Result<Bytes, Reason> {
        let pieces = self.store.get(name).await.map_err(|error| error.reason().clone())?;
        pieces.collect(name, 64 * MIB).await.map_err(|error| error.reason().clone())
    }

    /// What lies below the test's own prefix without being an object.
    async fn left(&self) -> BTreeSet<String> {
        match &self.left {
            Left::Files(root) => match std::fs::read_dir(root.path().join(self.folder.as_str())) {
                Ok(entries) => entries
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .filter(|name| name.starts_with('.'))
                    .collect(),
                Err(_) => BTreeSet::new(),
            },
            Left::Nothing => BTreeSet::new(),
            Left::Uploads => {
                s3::uploads(s3::BUCKET, &format!("{}/{}", self.folder.as_str(), self.prefix)).await
            }
            #[cfg(feature = "ceph")]
            Left::Pool(pool) => {
                let index = format!("{}/.index", self.folder.as_str());
                let entries = pool.map_entries(&index, &format!(".{}", self.prefix)).unwrap();
                entries.into_iter().map(|(key, _)| key).collect()
            }
        }
    }

    /// Waits until nothing is out of sight any more: a writer that is dropped cleans up behind itself.
    async fn until_nothing_is_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.left().await.is_empty() {
            assert!(Instant::now() < deadline, "{:?}", self.left().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn clean(self) {
        for some in self.list("").await.chunks(50) {
            side_by_side(some.iter().map(|(name, _)| {
                let (store, name) = (self.store.clone(), self.name(name));
                async move { store.delete(&name).await.unwrap() }
            }))
            .await;
        }
        self.store.tidy(&self.folder, &self.prefix).await.unwrap();
        assert_eq!(self.left().await, BTreeSet::new());
    }
}

#[cfg(feature = "ceph")]
fn pool() -> backhaul::ceph::Pool {
    let ceph = crate::support::ceph::Ceph::shared();
    backhaul::ceph::Cluster::connect(ceph.conf(), "cinder", 30).unwrap().pool("backups").unwrap()
}

async fn side_by_side<T: Send + 'static>(
    work: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let work: Vec<_> = work.map(tokio::spawn).collect();
    let mut done = Vec::new();
    for one in work {
        done.push(one.await.unwrap());
    }
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_writes_and_deletes_does_not_trip_over_a_folder_that_others_tidy_away() {
    let bench = Bench::new(Kind::Posix);
    let writers = (0..8).map(|number| {
        let (store, folder) = (bench.store.clone(), bench.folder.clone());
        let name = folder.object(&format!("{number}")).unwrap();
        async move {
            for _ in 0..200 {
                store.put(&name, junk(10)).await.unwrap();
                store.delete(&name).await.unwrap();
                store.tidy(&folder, &name.name).await.unwrap();
            }
        }
    });
    side_by_side(writers).await;
}

#[test]
fn a_worker_that_is_out_of_file_handles_puts_its_jobs_off() {
    let error = || std::io::Error::from(rustix::io::Errno::MFILE);
    assert_eq!(backhaul::store::Error::io("read", "a", error()).class(), backhaul::error::Class::Transient);
    assert_eq!(backhaul::volume::class(&error()), backhaul::error::Class::Transient);
}

/// Bytes of which no two pieces are alike.
fn junk(bytes: usize) -> Bytes {
    (0..bytes.div_ceil(8) as u64)
        .flat_map(|index| (index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
        .take(bytes)
        .collect()
}

fn is_missing(result: Result<Bytes, Reason>) -> bool {
    matches!(result, Err(Reason::Missing))
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn an_object_is_put_once(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    let (store, name) = (&bench.store, bench.name("a"));
    assert!(is_missing(bench.read(&name).await));

    store.put(&name, Bytes::from_static(b"first")).await.unwrap();
    let error = store.put(&name, Bytes::from_static(b"second")).await.unwrap_err();

    assert!(matches!(error.reason(), Reason::Exists), "{error:?}");
    assert_eq!(bench.read(&name).await.unwrap(), "first");
    assert_eq!(bench.list("").await, [("a".to_string(), 5)]);
    assert_eq!(bench.left().await, BTreeSet::new());
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_whole_and_outlives_what_it_was_made_of(
    #[case] kind: Kind,
    #[values(0, 3, 9 * MIB)] bytes: usize,
) {
    let bench = Bench::new(kind);
    let (store, from) = (&bench.store, bench.name("a b+c-00001"));
    let to = bench.name(if matches!(kind, Kind::Posix) { "copy-00001" } else { "other/copy-00001" });
    assert!(!store.copy(&from, &to).await.unwrap(), "there is nothing to copy");
    assert!(is_missing(bench.read(&to).await));
    let content = Bytes::from(vec![7; bytes]);
    store.put(&from, content.clone()).await.unwrap();

    assert!(store.copy(&from, &to).await.unwrap());
    store.delete(&from).await.unwrap();

    assert!(bench.read(&to).await.unwrap() == content);
    assert!(is_missing(bench.read(&from).await));
    store.delete(&to).await.unwrap();
    assert_eq!(bench.left().await, BTreeSet::new());
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn an_object_is_replaced_whole_whether_it_is_there_or_not(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    let name = bench.name("a");
    for bytes in [junk(9 * MIB + 1), junk(4 * MIB), Bytes::new(), junk(10), junk(5 * MIB)] {
        bench.store.replace(&name, bytes.clone()).await.unwrap();
        assert!(bench.read(&name).await.unwrap() == bytes, "{} bytes", bytes.len());
        assert_eq!(bench.list("").await, [("a".to_string(), bytes.len() as u64)]);
        assert_eq!(bench.left().await, BTreeSet::new());
    }
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn an_object_is_swapped_only_for_what_it_was(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    let name = bench.name("a");
    let swap =
        async |was: &Bytes, bytes: &Bytes| bench.store.swap(&name, was.clone(), bytes.clone()).await.unwrap();
    let (first, second) = (junk(5000), junk(4 * MIB + 1));

    assert!(!swap(&first, &second).await, "it is not there");
    assert!(is_missing(bench.read(&name).await));

    bench.store.put(&name, first.clone()).await.unwrap();
    let mut other = first.to_vec();
    other[4999] ^= 1;
    let longer = [&first[..], b"x"].concat();
    let ends_alike = [&first[..], &first[4999..]].concat();
    let [twice, thrice] = [2, 3].map(|count| first.repeat(count));
    let longer = [longer, ends_alike, twice, thrice].map(Bytes::from);
    for was in [other.into(), first.slice(..4999), Bytes::new()].into_iter().chain(longer) {
        assert!(!swap(&was, &second).await, "{} bytes", was.len());
        assert!(bench.read(&name).await.unwrap() == first);
    }
    assert!(swap(&first, &second).await);
    assert!(bench.read(&name).await.unwrap() == second);
    assert!(swap(&second, &Bytes::new()).await);
    assert!(swap(&Bytes::new(), &first).await);
    assert!(bench.read(&name).await.unwrap() == first);
    assert_eq!(bench.list("").await, [("a".to_string(), 5000)]);
    assert_eq!(bench.left().await, BTreeSet::new());
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_finished_is_told_with_its_time_and_removed_alone(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    let (store, folder, prefix) = (&bench.store, &bench.folder, &bench.prefix);
    // Servers that know nothing of an object before it is whole have none to tell of.
    let tells = !matches!(bench.left, Left::Nothing);
    let partials = async || store.partials(folder, prefix).await.unwrap();
    let is_now = |at: Option<jiff::Timestamp>| {
        let age = jiff::Timestamp::now().duration_since(at.expect("a time"));
        age.abs() < jiff::SignedDuration::from_mins(5)
    };
    let mut writers = Vec::new();
    for name in ["a", "b"] {
        let mut writer = store.create(&bench.name(name)).await.unwrap();
        writer.write(junk(9 * MIB)).await.unwrap();
        writers.push(writer);
    }
    let (b, a) = (writers.pop().unwrap(), writers.pop().unwrap());

    let found = partials().await;
    let names: BTreeSet<_> = found.iter().map(|partial| partial.object.clone()).collect();
    let expected = [bench.name("a"), bench.name("b")];
    assert_eq!(names, expected.into_iter().filter(|_| tells).collect());
    assert!(found.iter().all(|partial| is_now(partial.modified)), "{found:?}");
    if let Some(partial) = found.iter().find(|partial| partial.object == bench.name("a")) {
        store.discard(partial).await.unwrap();
        store.discard(partial).await.unwrap();
        assert_eq!(partials().await.len(), 1);
        a.finish().await.unwrap_err();
    }
    b.finish().await.unwrap();

    assert_eq!(partials().await, []);
    let listed = store.list(folder, prefix).await.unwrap();
    assert!(!listed.is_empty() && listed.iter().all(|listed| is_now(listed.modified)), "{listed:?}");
    assert_eq!(bench.read(&bench.name("b")).await.unwrap().len(), 9 * MIB);
    bench.clean().await;
}

/// Each adds one to a number again and again; a number that was written by two from the same one would be too small at the
/// end.
#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::gcs(Kind::Gcs)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn of_several_that_swap_at_once_none_overwrites_another(#[case] kind: Kind) {
    const WRITERS: usize = 4;
    const EACH: usize = 10;
    let bench = Bench::new(kind);
    let name = bench.name("a");
    bench.store.put(&name, Bytes::from_static(b"0")).await.unwrap();
    let stores = vec![(bench.store.clone(), name.clone()); WRITERS];
    side_by_side(stores.into_iter().map(|(store, name)| async move {
        for _ in 0..EACH {
            loop {
                let pieces = store.get(&name).await.unwrap();
                let was = pieces.collect(&name, MIB).await.unwrap();
                let number: usize = str::from_utf8(&was).unwrap().parse().unwrap();
                if store.swap(&name, was, (number + 1).to_string().into()).await.unwrap() {
                    break;
                }
            }
        }
    }))
    .await;
    assert_eq!(bench.read(&name).await.unwrap(), (WRITERS * EACH).to_string());
    assert_eq!(bench.left().await, BTreeSet::new());
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn whoever_reads_sees_an_object_as_it_was_or_as_it_is(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    let name = bench.name("a");
    let version = |number: u8| Bytes::from(vec![number; 1000 + usize::from(number)]);
    bench.store.replace(&name, version(0)).await.unwrap();
    let stores = vec![(bench.store.clone(), name.clone()); 3];
    let writers = side_by_side((0..).zip(stores).map(move |(writer, (store, name))| async move {
        for number in (writer..30).step_by(3) {
            store.replace(&name, version(number)).await.unwrap();
        }
    }));
    let writers = tokio::spawn(writers);
    let mut seen = BTreeSet::new();
    loop {
        let written = writers.is_finished();
        let reads = vec![(bench.store.clone(), name.clone()); 8];
        let read = side_by_side(reads.into_iter().map(|(store, name)| async move {
            loop {
                let pieces = store.get(&name).await.unwrap();
                match pieces.collect(&name, MIB).await {
                    Ok(bytes) => return bytes,
                    Err(error) => {
                        // The emulator writes over the file that it is sending. That this was seen is as good.
                        let (told, changed) = (Causes(&error).to_string(), "replaced or deleted while");
                        assert!(kind == Kind::Gcs && told.contains(changed), "{told}");
                    }
                }
            }
        }));
        for bytes in read.await {
            assert_eq!(bytes, version(bytes[0]));
            seen.insert(bytes[0]);
        }
        if written {
            break;
        }
    }
    writers.await.unwrap();
    // Whoever was the last one, it had written its last version.
    assert!(seen.last() >= Some(&27), "{seen:?}");
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_written_in_pieces_becomes_visible_when_it_is_finished(
    #[case] kind: Kind,
    #[values((0, 1), (1, 1), (100, 7), (4 * MIB, 4 * MIB), (4 * MIB + 1, MIB), (8 * MIB, 3 * MIB + 5), (40 * MIB, 700_001))]
    sizes: (usize, usize),
) {
    let (bytes, write_bytes) = sizes;
    let bench = Bench::new(kind);
    let (name, bytes) = (bench.name("a"), junk(bytes));
    let mut writer = bench.store.create(&name).await.unwrap();
    let mut left = bytes.clone();
    while !left.is_empty() {
        writer.write(left.split_to(write_bytes.min(left.len()))).await.unwrap();
    }
    assert_eq!(bench.list("").await, []);
    assert!(is_missing(bench.read(&name).await));

    writer.finish().await.unwrap();

    assert!(bench.read(&name).await.unwrap() == bytes);
    assert_eq!(bench.list("").await, [("a".to_string(), bytes.len() as u64)]);
    assert_eq!(bench.left().await, BTreeSet::new());
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_may_stop_early(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    let (name, bytes) = (bench.name("a"), junk(20 * MIB));
    bench.store.put(&name, bytes.clone()).await.unwrap();
    let mut pieces = bench.store.get(&name).await.unwrap();
    let first = pieces.next().await.unwrap().unwrap();
    assert!(!first.is_empty() && first.len() <= MIB && first == bytes[..first.len()]);
    drop(pieces);
    assert!(bench.read(&name).await.unwrap() == bytes);
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_is_dropped_leaves_nothing(#[case] kind: Kind, #[values(0, 10, 9 * MIB)] bytes: usize) {
    let bench = Bench::new(kind);
    let name = bench.name("a");
    let mut writer = bench.store.create(&name).await.unwrap();
    writer.write(junk(bytes)).await.unwrap();
    drop(writer);

    bench.until_nothing_is_left().await;

    assert!(is_missing(bench.read(&name).await));
    assert_eq!(bench.list("").await, []);
    bench.store.put(&name, junk(10)).await.unwrap();
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn a_writer_does_not_finish_over_an_object(#[case] kind: Kind) {
    // The emulator forgets the condition of an upload in chunks, which the service itself does not.
    let sizes: &[usize] = if kind == Kind::Gcs { &[10] } else { &[10, 9 * MIB] };
    for &bytes in sizes {
        writer_does_not_finish_over_an_object(kind, bytes).await;
    }
}

async fn writer_does_not_finish_over_an_object(kind: Kind, bytes: usize) {
    let bench = Bench::new(kind);
    let name = bench.name("a");
    let mut late = bench.store.create(&name).await.unwrap();
    late.write(junk(bytes)).await.unwrap();
    let mut early = bench.store.create(&name).await.unwrap();
    early.write(Bytes::from_static(b"early")).await.unwrap();

    early.finish().await.unwrap();
    let error = late.finish().await.unwrap_err();

    assert!(matches!(error.reason(), Reason::Exists), "{error:?}");
    assert_eq!(bench.read(&name).await.unwrap(), "early");
    assert_eq!(bench.left().await, BTreeSet::new());
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_that_write_the_same_name_wins(
    #[case] kind: Kind,
    #[values(How::Put, How::Finish)] how: How,
) {
    let bench = Bench::new(kind);
    let name = bench.name("a");
    let bytes = |number| Bytes::from(vec![number; 4 * MIB]);
    let mut writes = Vec::new();
    for number in 0..16 {
        let (store, name, bytes) = (bench.store.clone(), name.clone(), bytes(number));
        let write: BoxFuture<_> = match how {
            How::Put => Box::pin(async move { store.put(&name, bytes).await }),
            How::Finish => {
                let mut writer = store.create(&name).await.unwrap();
                writer.write(bytes).await.unwrap();
                writer.finish()
            }
        };
        writes.push(async move { (number, write.await) });
    }
    let mut won = Vec::new();
    for (number, written) in side_by_side(writes.into_iter()).await {
        match written {
            Ok(()) => won.push(number),
            Err(error) => assert!(matches!(error.reason(), Reason::Exists), "{error:?}"),
        }
    }
    let read = bench.read(&name).await.unwrap();
    // Swift looks for an object when a request for a new one begins. What is there then is whole all the same.
    if !matches!(kind, Kind::Swift | Kind::Gateway) {
        assert_eq!(won.len(), 1, "{won:?}");
    }
    assert!(won.iter().any(|number| read == bytes(*number)), "{won:?}");
    assert_eq!(bench.left().await, BTreeSet::new());
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn objects_are_listed_by_name_and_prefix(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    for (name, bytes) in [("b-2", 2), ("a-10", 10), ("b-1", 5 * MIB), ("a-9", 0), ("b", 1), ("c", 1)] {
        bench.store.put(&bench.name(name), junk(bytes)).await.unwrap();
    }
    // Neither of these is an object.
    let mut writer = bench.store.create(&bench.name("b-3")).await.unwrap();
    writer.write(junk(5 * MIB)).await.unwrap();
    bench.store.delete(&bench.name("c")).await.unwrap();

    let with_sizes = |expected: &[(&str, usize)]| {
        expected.iter().map(|(name, bytes)| (name.to_string(), *bytes as u64)).collect::<Vec<_>>()
    };
    let (a, b) = ([("a-10", 10), ("a-9", 0)], [("b", 1), ("b-1", 5 * MIB), ("b-2", 2)]);
    assert_eq!(bench.list("").await, with_sizes(&[&a[..], &b[..]].concat()));
    assert_eq!(bench.list("b").await, with_sizes(&b));
    assert_eq!(bench.list("b-").await, with_sizes(&b[1..]));
    assert_eq!(bench.list("x").await, []);
    let mut whole = bench.store.list(&bench.folder, "").await.unwrap();
    whole.retain(|object| object.name.contains(&bench.prefix));
    assert_eq!(whole.len(), 5, "{whole:?}");
    assert_eq!(bench.store.list(&Folder::own("nothing"), "").await.unwrap(), []);
    drop(writer);
    bench.until_nothing_is_left().await;
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_with_many_objects_is_listed_whole(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    let mut expected: Vec<_> = (0..1100).map(|index| (format!("{index}"), index % 3)).collect();
    for some in expected.chunks(50) {
        side_by_side(some.iter().map(|(name, bytes)| {
            let (store, name, bytes) = (bench.store.clone(), bench.name(name), junk(*bytes as usize));
            async move { store.put(&name, bytes).await.unwrap() }
        }))
        .await;
    }
    expected.sort();
    assert_eq!(bench.list("").await, expected);

    // All but some, and one that is not there.
    let mut names: Vec<_> = expected.iter().skip(30).map(|(name, _)| bench.name(name)).collect();
    names.push(bench.name("other"));
    for _ in 0..2 {
        bench.store.delete_all(&names).await.unwrap();
        assert_eq!(bench.list("").await, expected[..30]);
    }
    bench.store.delete_all(&[]).await.unwrap();
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_may_be_repeated(#[case] kind: Kind, #[values(3, 9 * MIB)] bytes: usize) {
    let bench = Bench::new(kind);
    let (name, other) = (bench.name("a"), bench.name("a-other"));
    bench.store.delete(&name).await.unwrap();
    bench.store.put(&name, junk(bytes)).await.unwrap();
    bench.store.put(&other, junk(bytes)).await.unwrap();
    for _ in 0..2 {
        bench.store.delete(&name).await.unwrap();
        assert!(is_missing(bench.read(&name).await));
        assert_eq!(bench.list("").await, [("a-other".to_string(), bytes as u64)]);
        assert_eq!(bench.left().await, BTreeSet::new());
    }
    bench.store.put(&name, junk(1)).await.unwrap();
    assert!(bench.read(&other).await.unwrap() == junk(bytes));
    bench.clean().await;
}

#[rstest]
#[case::posix(Kind::Posix)]
#[case::memory(Kind::Memory)]
#[case::s3(Kind::S3)]
#[case::swift(Kind::Swift)]
#[case::gateway(Kind::Gateway)]
#[case::gcs(Kind::Gcs)]
#[case::gcs_chunks(Kind::GcsChunks)]
#[cfg_attr(feature = "ceph", case::rados(Kind::Rados))]
#[tokio::test(flavor = "multi_thread")]
async fn tidying_removes_what_was_never_finished_and_nothing_else(#[case] kind: Kind) {
    let bench = Bench::new(kind);
    bench.store.put(&bench.name("a-done"), junk(9 * MIB)).await.unwrap();
    let mut writers = Vec::new();
    for name in ["a-1", "a-done", "b-1"] {
        let mut writer = bench.store.create(&bench.name(name)).await.unwrap();
        writer.write(junk(9 * MIB)).await.unwrap();
        writers.push(writer);
    }

    bench.store.tidy(&bench.folder, &format!("{}a-", bench.prefix)).await.unwrap();

    assert!(bench.read(&bench.name("a-done")).await.unwrap() == junk(9 * MIB));
    let finished = writers.pop().unwrap().finish().await;
    assert!(finished.is_ok(), "{finished:?}");
    assert!(bench.read(&bench.name("b-1")).await.unwrap() == junk(9 * MIB));
    if !matches!(bench.left, Left::Nothing) {
        // Whoever is told so late that it was taken for dead must not make half an object.
        assert!(writers.remove(0).finish().await.is_err());
        assert!(is_missing(bench.read(&bench.name("a-1")).await));
    }
    drop(writers);
    // What was removed while it was open a client of NFS has under another name, until a moment after it is closed.
    let deadline = Instant::now() + Duration::from_secs(30);
    while let left = bench.left().await
        && !left.is_empty()
    {
        assert!(Instant::now() < deadline, "{left:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bench.clean().await;
}

#[cfg(feature = "ceph")]
mod rados {
    use backhaul::ceph::{Cluster, Features, MapChange, Mode, NewImage, Pool};
    use backhaul::error::Class;
    use backhaul::job::Container;
    use backhaul::store::Rados;

    use super::*;
    use crate::support::ceph::Ceph;

    const INDEX: &str = ".backhaul/stores/.index";

    fn bench() -> (Bench, Pool) {
        let bench = Bench::new(Kind::Rados);
        let Left::Pool(pool) = &bench.left else { panic!("it is no pool") };
        let pool = pool.clone();
        (bench, pool)
    }

    /// The RADOS object that a part of an object is.
    fn part(pool: &Pool, name: &ObjectName, number: usize) -> String {
        format!("{name}/.{}.{number}", id_of(&pool.map_value(INDEX, &name.name).unwrap().unwrap()))
    }

    /// The id in an entry of the index.
    fn id_of(entry: &[u8]) -> String {
        let id = entry.split(|byte| *byte == b' ').nth(2).unwrap();
        str::from_utf8(id).unwrap().to_owned()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_small_object_lies_in_the_index_and_takes_the_place_of_a_large_one_as_that_one_of_it() {
        let (bench, pool) = bench();
        let name = bench.name("a");
        let entry = || pool.map_value(INDEX, &name.name).unwrap().unwrap();
        let [small, large] = [junk(16 << 10), junk((16 << 10) + 1)];

        bench.store.put(&name, small.clone()).await.unwrap();
        assert!(entry().ends_with(&small));
        assert_eq!(pool.object_bytes(&format!("{name}/.{}.0", id_of(&entry()))).unwrap(), None);
        assert!(bench.store.put(&name, junk(3)).await.is_err());

        assert!(bench.store.swap(&name, small.clone(), large.clone()).await.unwrap());
        let parts = [part(&pool, &name, 0)];
        assert_eq!(pool.object_bytes(&parts[0]).unwrap(), Some(large.len() as u64));
        assert_eq!(bench.read(&name).await.unwrap(), large);
        assert!(!bench.store.swap(&name, small.clone(), junk(3)).await.unwrap());

        assert!(bench.store.swap(&name, large.clone(), small.clone()).await.unwrap());
        assert_eq!(pool.object_bytes(&parts[0]).unwrap(), None);
        assert_eq!(bench.read(&name).await.unwrap(), small);

        bench.store.replace(&name, large.clone()).await.unwrap();
        let parts = [part(&pool, &name, 0)];
        bench.store.replace(&name, Bytes::new()).await.unwrap();
        assert_eq!(pool.object_bytes(&parts[0]).unwrap(), None);
        assert_eq!(bench.read(&name).await.unwrap(), Bytes::new());
        assert_eq!(bench.left().await, BTreeSet::new());
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_entry_that_lacks_bytes_is_damaged_and_can_be_deleted() {
        let (bench, pool) = bench();
        let name = bench.name("a");
        bench.store.put(&name, junk(100)).await.unwrap();
        let mut entry = pool.map_value(INDEX, &name.name).unwrap().unwrap();
        entry.pop();
        assert!(pool.change_map(INDEX, &[MapChange::Set(&name.name, &entry)]).unwrap());

        let error = bench.read(&name).await.unwrap_err();

        assert!(error.to_string().contains("has 99 bytes of 100"), "{error}");
        bench.store.delete(&name).await.unwrap();
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_object_whose_entry_tells_of_parts_without_end_is_deleted_in_time() {
        let (bench, pool) = bench();
        let name = bench.name("a");
        bench.store.put(&name, junk(9 * MIB)).await.unwrap();
        let parts: Vec<_> = (0..3).map(|number| part(&pool, &name, number)).collect();
        let id = id_of(&pool.map_value(INDEX, &name.name).unwrap().unwrap());
        let entry = format!("{} {} {id}", u64::MAX, 4 * MIB);
        assert!(pool.change_map(INDEX, &[MapChange::Set(&name.name, entry.as_bytes())]).unwrap());

        bench.store.delete(&name).await.unwrap();

        assert!(parts.iter().all(|part| pool.object_bytes(part).unwrap().is_none()));
        assert_eq!(bench.left().await, BTreeSet::new());
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_part_that_is_missing_or_short_is_an_error_that_says_so() {
        let (bench, pool) = bench();
        let name = bench.name("a");
        bench.store.put(&name, junk(9 * MIB)).await.unwrap();
        let parts: Vec<_> = (0..3).map(|number| part(&pool, &name, number)).collect();
        let problem = async || bench.read(&name).await.unwrap_err().to_string();

        pool.replace_object(&parts[2], &junk(MIB - 1)).unwrap();
        assert!(problem().await.contains("part 3 of 3") && problem().await.contains("too short"));
        assert!(pool.remove_object(&parts[1]).unwrap());
        assert!(problem().await.contains("part 2 of 3") && problem().await.contains("missing"));
        assert!(pool.remove_object(&parts[0]).unwrap());
        assert!(problem().await.contains("part 1 of 3") && problem().await.contains("missing"));

        // What is left of it goes all the same.
        bench.store.delete(&name).await.unwrap();
        assert_eq!(pool.object_bytes(&parts[2]).unwrap(), None);
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_part_outlives_its_object_or_its_writer() {
        let (bench, pool) = bench();
        let name = bench.name("a");
        let mut writer = bench.store.create(&name).await.unwrap();
        writer.write(junk(9 * MIB)).await.unwrap();
        let key = bench.left().await.pop_first().unwrap();
        let id = key.rsplit_once("/.").unwrap().1;
        let written = [0, 1].map(|number| format!("{name}/.{id}.{number}"));
        let there = |part: &String| pool.object_bytes(part).unwrap().is_some();
        assert!(written.iter().all(there));
        drop(writer);
        bench.until_nothing_is_left().await;
        assert!(!written.iter().any(there));

        bench.store.put(&name, junk(9 * MIB)).await.unwrap();
        let mut parts: Vec<_> = (0..3).map(|number| part(&pool, &name, number)).collect();
        assert!(parts.iter().all(there));

        bench.store.replace(&name, junk(9 * MIB)).await.unwrap();
        assert!(!parts.iter().any(there));
        parts = (0..3).map(|number| part(&pool, &name, number)).collect();
        assert!(parts.iter().all(there));

        bench.store.delete(&name).await.unwrap();
        assert!(!parts.iter().any(there));
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_writer_or_a_delete_left_when_it_died_is_removed_by_the_next_one() {
        let (bench, pool) = bench();
        let name = bench.name("a");
        let [written, deleted] = [(); 2].map(|()| Uuid::new_v4().simple().to_string());
        let parts = |id: &str| (0..3).map(|number| format!("{name}/.{id}.{number}")).collect::<Vec<_>>();
        let there = |id: &str| parts(id).iter().any(|part| pool.object_bytes(part).unwrap().is_some());
        for part in [parts(&written), parts(&deleted)].concat() {
            pool.create_object(&part, b"part").unwrap();
        }
        let keys = [&written, &deleted].map(|id| format!(".{}/.{id}", name.name));
        let entry = format!("12 4 {deleted}");
        let died = [
            MapChange::Set(&keys[0], b"writing"),
            MapChange::Set(&keys[1], entry.as_bytes()),
            MapChange::Set(".newest", written.as_bytes()),
        ];
        assert!(pool.change_map(INDEX, &died).unwrap());

        assert_eq!(bench.list("").await, []);
        bench.store.delete(&name).await.unwrap();
        assert!(!there(&deleted));
        // It may still be at work: only who knows that it is not may remove it.
        assert!(there(&written));
        assert_eq!(bench.left().await, BTreeSet::from([keys[0].clone()]));
        bench.store.tidy(&bench.folder, &name.name).await.unwrap();
        assert!(!there(&written));
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_folder_without_objects_has_no_index_and_its_removal_takes_nothing_along() {
        let store: Arc<dyn ObjectStore> = Arc::new(Rados::new(super::pool()));
        let container: Container = format!("emptied-{}", Uuid::new_v4()).parse().unwrap();
        let folder = Folder::from(&container);
        let index = format!("{}/.index", folder.as_str());
        let writers = (0..8).map(|number| {
            let (store, folder) = (store.clone(), folder.clone());
            let name = folder.object(&format!("{number}")).unwrap();
            async move {
                for round in 0..30 {
                    let bytes = junk(10 + round);
                    store.put(&name, bytes.clone()).await.unwrap();
                    assert!(store.get(&name).await.unwrap().collect(&name, 100).await.unwrap() == bytes);
                    store.delete(&name).await.unwrap();
                    store.tidy(&folder, &name.name).await.unwrap();
                }
            }
        });
        side_by_side(writers).await;
        assert_eq!(super::pool().object_bytes(&index).unwrap(), None);
        assert!(store.list(&folder, "").await.unwrap().is_empty());
        store.tidy(&folder, "").await.unwrap();

        let kept = folder.object("kept").unwrap();
        store.put(&kept, junk(10)).await.unwrap();
        store.tidy(&folder, "").await.unwrap();
        assert_eq!(store.list(&folder, "").await.unwrap().len(), 1);
        store.delete(&kept).await.unwrap();
        store.tidy(&folder, "").await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_object_that_is_deleted_while_it_is_read_is_never_taken_for_a_shorter_one() {
        let (bench, _) = bench();
        let name = bench.name("a");
        bench.store.put(&name, junk(40 * MIB)).await.unwrap();
        let pieces = bench.store.get(&name).await.unwrap();
        bench.store.delete(&name).await.unwrap();

        let error = pieces.collect(&name, 64 * MIB).await.unwrap_err();

        assert!(matches!(error.reason(), Reason::Passing(_)), "{error:?}");
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_pool_that_is_full_is_said_to_be_and_deletes_make_room() {
        let (ceph, pool) = (Ceph::shared(), format!("full-{}", Uuid::new_v4()));
        ceph.ceph(&["osd", "pool", "create", &pool, "1"]);
        ceph.ceph(&["osd", "pool", "set-quota", &pool, "max_objects", "20"]);
        // Its own user may not use this pool.
        let cluster = Cluster::connect(ceph.conf(), "admin", 30).unwrap();
        let store = Rados::new(cluster.pool(&pool).unwrap());
        let folder = Folder::own("full");
        let name = |number: u32| folder.object(&format!("{number}")).unwrap();
        let until = Instant::now() + Duration::from_secs(120);

        // What is smaller makes no RADOS object of its own, which is what the quota counts.
        let bytes = junk(32 << 10);
        // The cluster counts now and then only, so that there is room for more than the quota until it has.
        let mut put = 0;
        let error = loop {
            match store.put(&name(put), bytes.clone()).await {
                Ok(()) => put += 1,
                Err(error) => break error,
            }
            assert!(Instant::now() < until, "{put} objects fit into the pool");
        };
        assert!(matches!(error.reason(), Reason::Full), "{error:?}");
        for number in 0..put {
            store.delete(&name(number)).await.unwrap();
        }
        assert_eq!(store.list(&folder, "").await.unwrap(), []);
        while let Err(error) = store.put(&name(0), bytes.clone()).await {
            assert!(matches!(error.reason(), Reason::Full), "{error:?}");
            assert!(Instant::now() < until, "nothing fits into the pool, which is empty");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        ceph.ceph(&["osd", "pool", "delete", &pool, &pool, "--yes-i-really-really-mean-it"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_was_shut_out_may_try_again() {
        let (bench, pool) = bench();
        let image = format!("image-{}", Uuid::new_v4());
        pool.create_image(&image, &NewImage { bytes: 1, features: Features::EXCLUSIVE_LOCK, stripes: None })
            .unwrap();
        let open = |pool: &Pool| pool.open_image(&image, None, Mode::Write).unwrap();
        let held = open(&pool);
        held.lock().unwrap();
        bench.store.put(&bench.name("a"), junk(1)).await.unwrap();

        // Who takes somebody's lock has the cluster shut out all of that client.
        let other = super::pool();
        assert!(open(&other).break_lock().unwrap());
        let error = bench.store.put(&bench.name("b"), junk(1)).await.unwrap_err();

        assert_eq!(error.class(), Class::Transient, "{error:?}");
        drop((held, pool));
        Rados::new(other.clone()).delete(&bench.name("a")).await.unwrap();
        other.remove_image(&image).unwrap();
    }
}

/// What only a store behind a network can meet.
mod network {
    use backhaul::error::Class;
    use backhaul::store::{
        Credentials, Endpoint, Error, GcsSettings, HttpSettings, S3Settings, Secret, SecretFrom,
        SwiftSettings,
    };

    use super::*;
    use crate::support::link::Link;
    use crate::support::proxy::Proxy;

    /// How a store is reached.
    #[derive(Debug, Clone)]
    enum Far {
        S3(S3Settings),
        Swift(SwiftSettings),
        Gcs(GcsSettings),
    }

    impl Far {
        /// At the server of this kind, or over a link to it.
        fn at(kind: Kind, url: &str) -> Self {
            match kind {
                Kind::S3 => Self::S3(s3::settings(url, s3::BUCKET)),
                Kind::Gcs | Kind::GcsChunks => Self::Gcs(gcs::settings(url, gcs::BUCKET)),
                _ => Self::Swift(swift::settings(url, swift::CONTAINER)),
            }
        }

        /// Over a link which can be broken, with short limits of time. A login goes another way, so that what happens on the
        /// link happens to requests.
        fn behind(kind: Kind, link: &Link) -> Self {
            let mut far = match kind {
                Kind::S3 | Kind::Gcs | Kind::GcsChunks => Self::at(kind, link.url()),
                _ => Self::at(kind, &url_of(kind)),
            };
            if let Self::Swift(settings) = &mut far {
                let mut account: url::Url = link.url().parse().unwrap();
                account.set_username("").unwrap();
                account.set_password(None).unwrap();
                account.set_path(if kind == Kind::Gateway { "/swift/v1" } else { "/v1/AUTH_backup" });
                settings.endpoint = Endpoint::At(account);
            }
            // One of them takes a large object apart in Python, on its only thread.
            far.http().idle_seconds_max = if kind == Kind::GcsChunks { 20 } else { 2 };
            far
        }

        fn http(&mut self) -> &mut HttpSettings {
            match self {
                Self::S3(settings) => &mut settings.http,
                Self::Swift(settings) => &mut settings.http,
                Self::Gcs(settings) => &mut settings.http,
            }
        }

        fn open(&self) -> Arc<dyn ObjectStore> {
            match self.clone() {
                Self::S3(settings) => Arc::new(open(settings)),
                Self::Swift(settings) => Arc::new(Swift::new(settings).unwrap()),
                Self::Gcs(settings) => Arc::new(Gcs::new(settings).unwrap()),
            }
        }

        async fn reach(&self) -> Result<(), Error> {
            match self.clone() {
                Self::S3(settings) => open(settings).reach().await,
                Self::Swift(settings) => Swift::new(settings).unwrap().reach().await,
                Self::Gcs(settings) => Gcs::new(settings).unwrap().reach().await,
            }
        }

        fn bench(&self) -> Bench {
            let left = if matches!(self, Self::S3(_)) { Left::Uploads } else { Left::Nothing };
            Bench { store: self.open(), left, ..Bench::new(Kind::Memory) }
        }
    }

    fn url_of(kind: Kind) -> String {
        match kind {
            Kind::Swift => swift::url(),
            Kind::Gateway => swift::gateway_url(),
            Kind::Gcs => gcs::url(),
            Kind::GcsChunks => gcs::chunks_url(),
            _ => s3::url(),
        }
    }

    fn open(settings: S3Settings) -> S3 {
        S3::new(settings).unwrap()
    }

    fn bench(settings: S3Settings) -> Bench {
        Far::S3(settings).bench()
    }

    fn told(error: &Error) -> String {
        Causes(error).to_string()
    }

    /// What a URL says of whom it is, without user and password.
    fn server_of(url: &str) -> String {
        url::Url::parse(url).unwrap().origin().ascii_serialization()
    }

    fn http(status: &str, headers: &str, body: &str) -> String {
        format!(
            "HTTP/1.1 {status}\r\n{headers}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    #[rstest]
    #[case::access_key("access_key")]
    #[case::secret_key("secret_key")]
    #[tokio::test(flavor = "multi_thread")]
    async fn wrong_keys_are_said_to_be_and_never_shown(#[case] wrong: &str) {
        let mut settings = s3::settings(&s3::url(), s3::BUCKET);
        match wrong {
            "access_key" => settings.access_key = Secret::new("hush".into()),
            _ => settings.secret_key = SecretFrom::Setting(Secret::new("hush".into())),
        }
        let bench = bench(settings.clone());
        let name = bench.name("a");
        let failed = [
            open(settings.clone()).reach().await.unwrap_err(),
            bench.store.put(&name, junk(MIB)).await.unwrap_err(),
            bench.store.replace(&name, junk(1)).await.unwrap_err(),
            bench.store.get(&name).await.unwrap_err(),
            bench.store.list(&bench.folder, "").await.unwrap_err(),
            bench.store.delete(&name).await.unwrap_err(),
            bench.store.tidy(&bench.folder, "").await.unwrap_err(),
        ];
        for error in &failed {
            let told = told(error);
            assert_eq!(error.class(), Class::Permanent, "{told}");
            assert!(told.contains("does not accept access_key and secret_key"), "{told}");
            assert!(
                !format!("{told}{error:?}{settings:?}{bench:?}", bench = bench.store).contains("hush"),
                "{told}"
            );
        }
    }

    #[rstest]
    #[case::user(swift::settings(&swift::url(), swift::CONTAINER), true)]
    #[case::key(swift::settings(&swift::url(), swift::CONTAINER), false)]
    #[case::key_of_gateway(swift::settings(&swift::gateway_url(), swift::CONTAINER), false)]
    #[case::user_of_gateway(swift::settings(&swift::gateway_url(), swift::CONTAINER), true)]
    #[case::user_of_keystone(swift::keystone_settings(swift::CONTAINER), true)]
    #[case::password(swift::keystone_settings(swift::CONTAINER), false)]
    #[case::application_credential(swift::application_settings(swift::CONTAINER), false)]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_wrong_login_is_said_to_be_and_no_password_is_shown(
        #[case] mut settings: SwiftSettings,
        #[case] wrong_user: bool,
    ) {
        let wrong = SecretFrom::Setting(Secret::new("hush".into()));
        match &mut settings.credentials {
            Credentials::V1 { user, .. } | Credentials::Password { user, .. } if wrong_user => {
                *user = "nobody".into();
            }
            Credentials::V1 { key, .. } => *key = wrong,
            Credentials::Password { password, .. } => *password = wrong,
            Credentials::ApplicationCredential { secret, .. } => *secret = wrong,
            Credentials::Token(_) => unreachable!(),
        }
        let bench = Far::Swift(settings.clone()).bench();
        let name = bench.name("a");
        let begun = Instant::now();
        let failed = [
            Swift::new(settings.clone()).unwrap().reach().await.unwrap_err(),
            bench.store.put(&name, junk(MIB)).await.unwrap_err(),
            bench.store.replace(&name, junk(1)).await.unwrap_err(),
            bench.store.get(&name).await.unwrap_err(),
            bench.store.list(&bench.folder, "").await.unwrap_err(),
            bench.store.delete(&name).await.unwrap_err(),
            bench.store.delete_all(&[name]).await.unwrap_err(),
        ];
        for error in &failed {
            let told = told(error);
            assert_eq!(error.class(), Class::Permanent, "{told}");
            assert!(told.contains("does not accept user and password"), "{told}");
            assert!(
                !format!("{told}{error:?}{settings:?}{bench:?}", bench = bench.store).contains("hush"),
                "{told}"
            );
        }
        // It was not tried again.
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_that_is_missing_is_made_or_said_to_be_missing(
        #[values(Kind::Swift, Kind::Gateway)] kind: Kind,
    ) {
        let mut settings = swift::settings(&url_of(kind), &swift::new_container());
        settings.create_containers = false;
        let folder = Folder::own("stores");
        let name = folder.object("a").unwrap();
        let store = Swift::new(settings.clone()).unwrap();
        let mut writer = store.create(&name).await.unwrap();
        writer.write(junk(9 * MIB)).await.unwrap();
        for error in [
            store.reach().await.unwrap_err(),
            store.put(&name, junk(1)).await.unwrap_err(),
            store.replace(&name, junk(1)).await.unwrap_err(),
            writer.finish().await.unwrap_err(),
        ] {
            let told = told(&error);
            assert_eq!(error.class(), Class::Permanent, "{told}");
            assert!(told.contains(&settings.container) && told.contains("create_containers"), "{told}");
        }
        assert!(matches!(store.get(&name).await.unwrap_err().reason(), Reason::Missing));
        assert_eq!(store.list(&folder, "").await.unwrap(), []);
        store.delete(&name).await.unwrap();
        store.delete_all(&[name]).await.unwrap();

        settings.create_containers = true;
        let makes = Swift::new(settings).unwrap();
        makes.reach().await.unwrap();
        assert_eq!(makes.list(&folder, "").await.unwrap(), []);
        let puts = (0..8).map(|number| {
            let (makes, name) = (makes.clone(), folder.object(&format!("{number}")).unwrap());
            async move { makes.put(&name, junk(1)).await.unwrap() }
        });
        side_by_side(puts).await;
        store.reach().await.unwrap();
        let names: Vec<_> = store.list(&folder, "").await.unwrap();
        assert_eq!(names.len(), 8);
        let names: Vec<_> = names.iter().map(|listed| folder.object(&listed.name).unwrap()).collect();
        store.delete_all(&names).await.unwrap();
        assert_eq!(store.list(&folder, "").await.unwrap(), []);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_of_cinders_has_nothing_of_ours_in_it() {
        let usual = swift::new_container();
        let store = Swift::new(swift::settings(&swift::url(), &usual)).unwrap();
        let container = |name: &str| Folder::from(&name.parse::<backhaul::job::Container>().unwrap());
        // Names that must be written otherwise in a URL.
        let (own, other) = (Folder::own("records"), format!("{} %41?#&+ ü", swift::new_container()));
        let odd = "a b/%41?x=1&y#z+ü\u{1f4be}";
        for (folder, name) in [(&own, "a"), (&container(&usual), "v/1/a-00001"), (&container(&other), odd)] {
            store.put(&folder.object(name).unwrap(), junk(3)).await.unwrap();
        }
        let listed = async |folder: &Folder| {
            let listed = store.list(folder, "").await.unwrap();
            listed.into_iter().map(|object| object.name).collect::<Vec<_>>()
        };
        assert_eq!(listed(&own).await, ["a"]);
        assert_eq!(listed(&container(&usual)).await, ["v/1/a-00001"]);
        assert_eq!(listed(&container(&other)).await, [odd]);
        assert_eq!(store.list(&container(&other), "a b/%41").await.unwrap().len(), 1);
        store.delete(&own.object("a").unwrap()).await.unwrap();
        store.delete_all(&[container(&usual).object("v/1/a-00001").unwrap()]).await.unwrap();
        store.delete_all(&[container(&other).object(odd).unwrap()]).await.unwrap();
        for folder in [&own, &container(&usual), &container(&other)] {
            assert_eq!(listed(folder).await, [""; 0]);
        }

        let error = store.put(&container("3f/2b/3f2b9c1e").object("a").unwrap(), junk(1)).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent);
        assert!(told(&error).contains("3f/2b/3f2b9c1e is no name of a container"), "{}", told(&error));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_bucket_that_is_missing_is_made_or_said_to_be_missing() {
        let mut settings = s3::settings(&s3::url(), &s3::new_bucket());
        settings.create_buckets = false;
        let (folder, store) = (Folder::own("stores"), open(settings.clone()));
        let name = folder.object("a").unwrap();
        let mut writer = store.create(&name).await.unwrap();
        let failed = [
            store.reach().await.unwrap_err(),
            store.put(&name, junk(1)).await.unwrap_err(),
            store.replace(&name, junk(1)).await.unwrap_err(),
            writer.write(junk(9 * MIB)).await.unwrap_err(),
            writer.finish().await.unwrap_err(),
        ];
        assert!(told(&failed[4]).contains("an earlier write to it failed"), "{}", told(&failed[4]));
        for error in &failed[..4] {
            let told = told(error);
            assert_eq!(error.class(), Class::Permanent, "{told}");
            assert!(told.contains(&settings.bucket) && told.contains("create_containers"), "{told}");
        }
        assert!(matches!(store.get(&name).await.unwrap_err().reason(), Reason::Missing));
        assert_eq!(store.list(&folder, "").await.unwrap(), []);
        store.delete(&name).await.unwrap();
        store.tidy(&folder, "").await.unwrap();

        settings.create_buckets = true;
        let makes = open(settings);
        makes.reach().await.unwrap();
        assert_eq!(makes.list(&folder, "").await.unwrap(), []);
        let puts = (0..8).map(|number| {
            let (makes, name) = (makes.clone(), folder.object(&format!("{number}")).unwrap());
            async move { makes.put(&name, junk(1)).await.unwrap() }
        });
        side_by_side(puts).await;
        store.reach().await.unwrap();
        assert_eq!(store.list(&folder, "").await.unwrap().len(), 8);
        for number in 0..8 {
            store.delete(&folder.object(&format!("{number}")).unwrap()).await.unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_is_a_bucket_and_has_nothing_of_ours_in_it() {
        let bucket = s3::new_bucket();
        let store = open(s3::settings(&s3::url(), &bucket));
        let container = |name: &str| Folder::from(&name.parse::<backhaul::job::Container>().unwrap());
        let (own, other) = (Folder::own("records"), s3::new_bucket());
        for (folder, name) in [(&own, "a"), (&container(&bucket), "v/1/a-00001"), (&container(&other), "b")] {
            store.put(&folder.object(name).unwrap(), junk(3)).await.unwrap();
        }
        let listed = async |folder: &Folder| {
            let listed = store.list(folder, "").await.unwrap();
            listed.into_iter().map(|object| object.name).collect::<Vec<_>>()
        };
        assert_eq!(listed(&own).await, ["a"]);
        assert_eq!(listed(&container(&bucket)).await, ["v/1/a-00001"]);
        assert_eq!(listed(&container(&other)).await, ["b"]);
        for (folder, name) in [(&own, "a"), (&container(&bucket), "v/1/a-00001"), (&container(&other), "b")] {
            store.delete(&folder.object(name).unwrap()).await.unwrap();
        }

        let folders = container("3f/2b/3f2b9c1e");
        let error = store.put(&folders.object("a").unwrap(), junk(1)).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent);
        assert!(told(&error).contains("3f/2b/3f2b9c1e is no name of a bucket"), "{}", told(&error));
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_that_is_away_may_come_back(#[values(Kind::S3, Kind::Swift, Kind::Gcs)] kind: Kind) {
        let mut url: url::Url = url_of(kind).parse().unwrap();
        // Nobody listens there.
        url.set_port(Some(1)).unwrap();
        let mut far = Far::at(kind, url.as_str());
        far.http().retries_max = 1;
        for proxy in [None, Some("http://somebody:hush@127.0.0.1:1")] {
            far.http().proxy = proxy.map(|proxy| Secret::new(proxy.into()));
            let bench = far.bench();
            for error in [
                far.reach().await.unwrap_err(),
                bench.store.put(&bench.name("a"), junk(1)).await.unwrap_err(),
                bench.store.get(&bench.name("a")).await.unwrap_err(),
                bench.store.list(&bench.folder, "").await.unwrap_err(),
            ] {
                let told = told(&error);
                assert!(matches!(error.reason(), Reason::Passing(_)), "{told}");
                let through = if proxy.is_some() { " through the proxy" } else { "" };
                let server = format!("no connection to {}{through} (", server_of(url.as_str()));
                let bucket = if kind == Kind::Swift { "container tests: " } else { "bucket tests: " };
                for part in [&server, bucket, "Connection refused", "is it up, and is that its URL?"] {
                    assert!(told.contains(part), "{part:?} is not in: {told}");
                }
                assert!(!told.contains("hush") && !told.contains(url.password().unwrap_or("@")), "{told}");
            }
        }
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn who_asks_whether_a_server_is_there_does_not_wait_for_long(
        #[values(Kind::S3, Kind::Swift, Kind::Gcs)] kind: Kind,
    ) {
        let link = Link::to(&url_of(kind));
        let mut far = Far::at(kind, link.url());
        far.http().idle_seconds_max = 60;
        link.stall(true);
        let begun = Instant::now();
        let error = far.reach().await.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        let (told, server) = (told(&error), format!("no answer of {}", server_of(link.url())));
        assert!(matches!(error.reason(), Reason::Passing(_)), "{told}");
        assert!(told.contains(&server) && told.contains(" within 10 seconds: is it up"), "{told}");
        assert!(told.contains(" tests: "), "{told}");
        link.stall(false);
    }

    #[rstest]
    #[case::slow_down(&[Kind::Gcs, Kind::S3, Kind::Swift], "503 Slow Down", "Retry-After: 1\r\n", "<Error><Code>SlowDown</Code></Error>")]
    #[case::busy(&[Kind::Gcs, Kind::S3, Kind::Swift], "503 Service Unavailable", "", "")]
    #[case::broken(&[Kind::Gcs, Kind::S3, Kind::Swift], "500 Internal Server Error", "", "<html>")]
    #[case::gateway(&[Kind::Gcs, Kind::S3, Kind::Swift], "502 Bad Gateway", "", "")]
    #[case::gave_up_waiting(&[Kind::S3], "408 Request Timeout", "", "")]
    #[case::too_early(&[Kind::Gcs], "425 Too Early", "", "")]
    #[case::gateway_gave_up(&[Kind::Swift], "504 Gateway Timeout", "", "")]
    #[case::rate_limit(&[Kind::Swift], "498 Rate Limited", "", "Slow down")]
    #[case::too_many(&[Kind::Gcs, Kind::S3, Kind::Swift], "429 Too Many Requests", "Retry-After: soon\r\n", "")]
    #[case::mutations(&[Kind::Gcs], "403 Forbidden", "", r#"{"error":{"code":403,"message":"x","errors":[{"reason":"rateLimitExceeded"}]}}"#)]
    #[case::too_late(&[Kind::S3], "400 Bad Request", "", "<Error><Code>RequestTimeout</Code><Message>x</Message></Error>")]
    #[case::at_once(&[Kind::S3], "409 Conflict", "", "<Error><Code>OperationAborted</Code></Error>")]
    #[case::said_too_soon(&[Kind::S3], "200 OK", "", "<?xml version=\"1.0\"?>\n<Error><Code>InternalError</Code></Error>")]
    #[tokio::test(flavor = "multi_thread")]
    async fn what_may_pass_is_tried_again_up_to_a_limit(
        #[case] kinds: &[Kind],
        #[case] status: &str,
        #[case] headers: &str,
        #[case] body: &str,
    ) {
        for kind in kinds {
            let link = Link::to(&url_of(*kind));
            let mut far = Far::behind(*kind, &link);
            far.http().retries_max = 2;
            let bench = far.bench();
            let (name, answer) = (bench.name("a"), http(status, headers, body));
            // Each time with new connections only, since what becomes of a request on an old one is another question.
            let refused = |count| {
                let store = far.open();
                link.answer(std::iter::repeat_n(answer.clone(), count));
                let (folder, prefix) = (bench.folder.clone(), bench.prefix.clone());
                Bench { store, folder, prefix, left: Left::Nothing }
            };
            let begun = Instant::now();

            refused(2).store.put(&name, junk(MIB)).await.unwrap();
            assert_eq!(link.answers_left(), 0);
            if headers == "Retry-After: 1\r\n" {
                assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
            }
            assert_eq!(refused(2).list("").await, [("a".to_string(), MIB as u64)]);
            if !status.starts_with("200") {
                assert!(refused(2).read(&name).await.unwrap() == junk(MIB));
            }

            let error = refused(3).store.delete(&name).await.unwrap_err();
            assert!(matches!(error.reason(), Reason::Passing(_)), "{}", told(&error));
            let answered = format!(" tests: {} answered {}", server_of(link.url()), &status[..3]);
            assert!(told(&error).contains(&answered), "{}", told(&error));
            assert!(told(&error).contains("its log may say why"), "{}", told(&error));
            assert_eq!(link.answers_left(), 0);
            bench.clean().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn each_pause_before_another_try_is_twice_as_long() {
        let link = Link::to(&url_of(Kind::S3));
        let mut far = Far::behind(Kind::S3, &link);
        far.http().retries_max = 4;
        let bench = far.bench();
        link.answer(vec![http("503 Service Unavailable", "", ""); 5]);
        let begun = Instant::now();
        bench.store.delete(&bench.name("a")).await.unwrap_err();
        assert_eq!(link.answers_left(), 0);
        // 0.2 seconds and 0.4 and so on; none is shorter by chance.
        assert!(begun.elapsed() >= Duration::from_secs(3), "{:?}", begun.elapsed());
    }

    #[rstest]
    #[case::quota(
        Kind::S3,
        "403 Forbidden",
        "<Error><Code>QuotaExceeded</Code></Error>",
        "the store is full"
    )]
    #[case::no_room(Kind::S3, "507 Insufficient Storage", "", "the store is full")]
    #[case::denied(
        Kind::S3,
        "403 Forbidden",
        "<Error><Code>AccessDenied</Code></Error>",
        "may not do that in bucket tests, give it the right to: "
    )]
    #[case::clock(Kind::S3, "403 Forbidden", "<Error><Code>RequestTimeTooSkewed</Code></Error>", "clocks")]
    #[case::moved(
        Kind::S3,
        "301 Moved Permanently",
        "<Error><Code>PermanentRedirect</Code></Error>",
        "PermanentRedirect"
    )]
    #[case::swift_quota(
        Kind::Swift,
        "413 Request Entity Too Large",
        "Upload exceeds quota.",
        "the store is full"
    )]
    #[case::swift_no_room(Kind::Swift, "507 Insufficient Storage", "", "the store is full")]
    #[case::swift_denied(
        Kind::Swift,
        "403 Forbidden",
        "<html>",
        "may not do that in container tests, give it the right to: "
    )]
    #[case::gcs_denied(
        Kind::Gcs,
        "403 Forbidden",
        r#"{"error":{"code":403,"message":"no storage.objects.create","errors":[{"reason":"forbidden"}]}}"#,
        "may not do that in bucket tests, give it the right to: "
    )]
    #[case::gcs_why(
        Kind::Gcs,
        "403 Forbidden",
        r#"{"error":{"code":403,"message":"no storage.objects.create","errors":[{"reason":"forbidden"}]}}"#,
        "answered 403 Forbidden forbidden no storage.objects.create"
    )]
    #[case::gcs_nobody(Kind::Gcs, "401 Unauthorized", "Anonymous caller", "wants to know who we are")]
    #[case::gcs_md5(
        Kind::Gcs,
        "200 OK",
        r#"{"md5Hash":"XrY7u+Ae7tCTyyK7j1rNww=="}"#,
        "the server keeps something with the MD5 \"XrY7u+Ae7tCTyyK7j1rNww==\""
    )]
    #[case::gcs_no_answer(Kind::Gcs, "200 OK", "<html>", "not what is answered")]
    #[case::swift_odd(Kind::Swift, "400 Bad Request", "InvalidBucketName", "400 Bad Request")]
    #[tokio::test(flavor = "multi_thread")]
    async fn what_does_not_pass_is_told_at_once(
        #[case] kind: Kind,
        #[case] status: &str,
        #[case] body: &str,
        #[case] expected: &str,
    ) {
        let link = Link::to(&url_of(kind));
        let bench = Far::behind(kind, &link).bench();
        link.answer([http(status, "", body)]);
        let error = bench.store.put(&bench.name("a"), junk(MIB)).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{}", told(&error));
        assert!(told(&error).contains(expected), "{}", told(&error));
        assert_eq!(bench.list("").await, []);
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn connections_that_are_cut_in_the_middle_cost_nothing_but_time(
        #[values(Kind::S3, Kind::Swift, Kind::Gateway, Kind::Gcs)] kind: Kind,
    ) {
        let link = Link::to(&url_of(kind));
        let bench = Far::behind(kind, &link).bench();
        let (name, bytes) = (bench.name("a"), junk(20 * MIB));

        link.cut_after([MIB, 10 * MIB, 300]);
        bench.store.put(&name, bytes.clone()).await.unwrap();
        assert_eq!(link.cuts_left(), 0);
        link.cut_after([MIB, 2 * MIB, 3 * MIB, 100, 5 * MIB]);
        assert!(bench.read(&name).await.unwrap() == bytes);
        assert_eq!(link.cuts_left(), 0);

        if kind == Kind::Gcs {
            return bench.clean().await; // It takes the question how far an upload has come for its end.
        }
        let name = bench.name("b");
        link.cut_after([MIB, 12 * MIB, 300]);
        let mut writer = bench.store.create(&name).await.unwrap();
        writer.write(bytes.clone()).await.unwrap();
        writer.finish().await.unwrap();
        assert_eq!(link.cuts_left(), 0);
        assert!(bench.read(&name).await.unwrap() == bytes);
        // A part that was sent twice is in the object once, and no upload is left.
        bench.store.tidy(&bench.folder, &bench.prefix).await.unwrap();
        bench.clean().await;
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_write_whose_answer_is_lost_is_done_once(
        #[values(Kind::S3, Kind::Swift, Kind::Gateway, Kind::Gcs)] kind: Kind,
        #[values(How::Put, How::Finish)] how: How,
        #[values(1, 2)] lost: usize,
    ) {
        // The emulator takes the question how far an upload in chunks has come for its end.
        let in_one_part = kind == Kind::Gcs && matches!(how, How::Finish);
        let sizes: &[usize] = if in_one_part { &[MIB] } else { &[MIB, 9 * MIB] };
        for &size in sizes {
            write_whose_answer_is_lost_is_done_once(kind, how, lost, size).await;
        }
    }

    async fn write_whose_answer_is_lost_is_done_once(kind: Kind, how: How, lost: usize, size: usize) {
        let link = Link::to(&url_of(kind));
        let bench = Far::behind(kind, &link).bench();
        let (name, bytes) = (bench.name("a"), junk(size));
        match how {
            How::Put => {
                link.lose_answers(lost);
                bench.store.put(&name, bytes.clone()).await.unwrap();
            }
            How::Finish => {
                let mut writer = bench.store.create(&name).await.unwrap();
                writer.write(bytes.clone()).await.unwrap();
                link.lose_answers(lost);
                writer.finish().await.unwrap();
            }
        }
        assert!(bench.read(&name).await.unwrap() == bytes);

        // That it is there is no reason to take it for another one's.
        link.lose_answers(1);
        let error = bench.store.put(&name, bytes.clone()).await.unwrap_err();
        assert!(matches!(error.reason(), Reason::Exists), "{}", told(&error));
        link.lose_answers(1);
        bench.store.delete(&name).await.unwrap();
        assert_eq!(bench.list("").await, []);
        bench.store.tidy(&bench.folder, &bench.prefix).await.unwrap();
        bench.clean().await;
    }

    /// Its MD5 goes with it: as `Content-MD5` to S3, and as `ETag` to Swift.
    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_body_that_is_spoilt_on_its_way_is_refused_and_sent_again(
        #[values(Kind::S3, Kind::Swift, Kind::Gateway)] kind: Kind,
        #[values(How::Put, How::Finish)] how: How,
    ) {
        let link = Link::to(&url_of(kind));
        let bench = Far::behind(kind, &link).bench();
        let (name, bytes) = (bench.name("a"), junk(9 * MIB));

        link.spoil_after(MIB);
        match how {
            How::Put => bench.store.put(&name, bytes.clone()).await.unwrap(),
            How::Finish => {
                let mut writer = bench.store.create(&name).await.unwrap();
                writer.write(bytes.clone()).await.unwrap();
                writer.finish().await.unwrap();
            }
        }

        assert_eq!(link.fault_count(), 1);
        assert!(bench.read(&name).await.unwrap() == bytes);
        bench.clean().await;
    }

    /// The answer to the look before the write comes first.
    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_of_swift_that_has_got_something_else_is_told_again_or_not_believed(
        #[values(Kind::Swift, Kind::Gateway)] kind: Kind,
    ) {
        let link = Link::to(&url_of(kind));
        let mut far = Far::behind(kind, &link);
        far.http().retries_max = 1;
        let bench = far.bench();
        let (name, missing) = (bench.name("a"), http("404 Not Found", "", ""));
        let unprocessable = http("422 Unprocessable Entity", "", "");

        for etag in ["", "ETag: \"d41d8cd98f00b204e9800998ecf8427e\"\r\n"] {
            link.answer([missing.clone(), http("201 Created", etag, "")]);
            let error = bench.store.put(&name, junk(100)).await.unwrap_err();
            assert_eq!(error.class(), Class::Permanent, "{}", told(&error));
            assert!(told(&error).contains("for an MD5 of"), "{}", told(&error));
            assert_eq!(link.answers_left(), 0);
        }

        link.answer([missing.clone(), unprocessable.clone(), missing.clone(), unprocessable.clone()]);
        let error = bench.store.put(&name, junk(100)).await.unwrap_err();
        assert!(matches!(error.reason(), Reason::Passing(_)), "{}", told(&error));
        assert_eq!(link.answers_left(), 0);
        assert_eq!(bench.list("").await, []);

        link.answer([missing, unprocessable]);
        bench.store.put(&name, junk(100)).await.unwrap();
        assert!(bench.read(&name).await.unwrap() == junk(100));
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_new_bucket_is_asked_for_in_the_region_that_requests_are_signed_for() {
        let link = Link::to(&s3::url());
        let name = Folder::own("stores").object("a").unwrap();
        let put = async |said: &str| {
            let mut settings = s3::settings(link.url(), &s3::new_bucket());
            settings.region = "eu-west-1".into();
            link.count(said);
            // The gateway may know no such region.
            if let Err(error) = open(settings).put(&name, junk(1)).await {
                assert!(told(&error).contains("LocationConstraint"), "{}", told(&error));
            }
            link.counted()
        };

        assert_eq!(put("<LocationConstraint>eu-west-1</LocationConstraint>").await, 1);
        assert!(put("%2Feu-west-1%2Fs3%2Faws4_request").await >= 2);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_thousand_objects_of_s3_are_deleted_with_one_request() {
        let link = Link::to(&s3::url());
        let bench = Far::behind(Kind::S3, &link).bench();
        // It takes the server as long to find out that there is none.
        let names: Vec<_> = (0..1500).map(|number| bench.name(&number.to_string())).collect();
        for name in names.iter().step_by(100) {
            bench.store.put(name, junk(1)).await.unwrap();
        }
        assert_eq!(bench.list("").await.len(), 15);

        link.count("POST /tests");
        bench.store.delete_all(&names).await.unwrap();
        assert_eq!(link.counted(), 2);
        link.count("DELETE /");
        bench.store.delete_all(&names).await.unwrap();
        assert_eq!((link.counted(), bench.list("").await.len()), (0, 0));
        bench.clean().await;
    }

    #[rstest]
    #[case::not_known("501 Not Implemented", "<Error><Code>NotImplemented</Code></Error>")]
    #[case::not_allowed("405 Method Not Allowed", "")]
    #[case::not_found("404 Not Found", "<html>")]
    #[case::of_no_key("200 OK", "<DeleteResult><Error><Code>InternalError</Code></Error></DeleteResult>")]
    #[case::of_another_key(
        "200 OK",
        "<DeleteResult><Error><Key>x</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    )]
    #[tokio::test(flavor = "multi_thread")]
    async fn objects_that_a_server_does_not_delete_at_once_are_deleted_one_by_one(
        #[case] status: &str,
        #[case] body: &str,
    ) {
        let link = Link::to(&url_of(Kind::S3));
        let bench = Far::behind(Kind::S3, &link).bench();
        let names: Vec<_> = (0..40).map(|number| bench.name(&number.to_string())).collect();
        for name in &names {
            bench.store.put(name, junk(1)).await.unwrap();
        }
        link.answer([http(status, "", body)]);

        bench.store.delete_all(&names).await.unwrap();

        assert_eq!((link.answers_left(), bench.list("").await), (0, Vec::new()));
        bench.clean().await;
    }

    /// It would have been taken for a backup that is not there, or for a delete that is done.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_404_that_is_not_the_servers_own_says_nothing_of_objects() {
        let link = Link::to(&url_of(Kind::S3));
        let bench = Far::behind(Kind::S3, &link).bench();
        let name = bench.name("a");
        let not_its_own = || link.answer([http("404 Not Found", "", "default backend - 404")]);
        bench.store.put(&name, junk(10)).await.unwrap();

        not_its_own();
        let read = bench.read(&name).await.unwrap_err();
        not_its_own();
        let deleted = bench.store.delete(&name).await.unwrap_err();
        not_its_own();
        let swapped = bench.store.swap(&name, junk(10), junk(11)).await.unwrap_err();

        assert!(matches!(read, Reason::Other(_)), "{read:?}");
        for error in [deleted, swapped] {
            assert!(told(&error).contains("404 Not Found, and not as S3 does"), "{}", told(&error));
        }
        assert!(bench.read(&name).await.unwrap() == junk(10));
        bench.clean().await;
    }

    /// Told as another one's, it would be removed by who wrote it.
    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_write_of_which_nobody_can_say_whose_it_is_may_be_its_own(
        #[values(Kind::S3, Kind::Gcs)] kind: Kind,
    ) {
        let link = Link::to(&url_of(kind));
        let mut far = Far::behind(kind, &link);
        far.http().retries_max = 1;
        let bench = far.bench();
        let refused = http("412 Precondition Failed", "", "<Error><Code>PreconditionFailed</Code></Error>");
        link.answer(std::iter::once(refused).chain(vec![http("503 Service Unavailable", "", ""); 2]));

        let error = bench.store.put(&bench.name("a"), junk(100)).await.unwrap_err();

        assert!(matches!(error.reason(), Reason::Passing(_)), "{}", told(&error));
        assert_eq!(link.answers_left(), 0);
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_list_that_goes_on_without_saying_how_is_not_taken_for_whole() {
        let link = Link::to(&url_of(Kind::S3));
        let bench = Far::behind(Kind::S3, &link).bench();
        let page = |name: &str| format!("<{name}><IsTruncated>true</IsTruncated></{name}>");

        link.answer([http("200 OK", "", &page("ListBucketResult"))]);
        let error = bench.store.list(&bench.folder, &bench.prefix).await.unwrap_err();
        assert!(told(&error).contains("there is no NextContinuationToken"), "{}", told(&error));
        assert_eq!(error.class(), Class::Permanent);

        link.answer([http("200 OK", "", &page("ListMultipartUploadsResult"))]);
        let error = bench.store.partials(&bench.folder, &bench.prefix).await.unwrap_err();
        assert!(told(&error).contains("there is no NextKeyMarker"), "{}", told(&error));
        bench.clean().await;
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_that_says_nothing_is_given_up_and_one_that_is_slow_is_not(
        #[values(Kind::S3, Kind::Swift, Kind::Gateway, Kind::Gcs)] kind: Kind,
    ) {
        let link = Link::to(&url_of(kind));
        let mut far = Far::behind(kind, &link);
        far.http().retries_max = 0;
        // Longer than a busy server takes to answer when it has all.
        far.http().idle_seconds_max = 5;
        let bench = far.bench();
        let (name, bytes) = (bench.name("a"), junk(32 * MIB));

        // What the kernel has taken counts as moved, so that this must be more than it takes.
        link.slow_down(8 << 20);
        let begun = Instant::now();
        bench.store.put(&name, bytes.clone()).await.unwrap();
        assert!(begun.elapsed() > Duration::from_secs(3), "{:?}", begun.elapsed());
        let begun = Instant::now();
        assert!(bench.read(&name).await.unwrap() == bytes);
        assert!(begun.elapsed() > Duration::from_secs(3), "{:?}", begun.elapsed());

        link.stall(true);
        let writes = [bench.name("b"), bench.name("c")].map(|name| {
            let (store, bytes) = (bench.store.clone(), bytes.clone());
            async move { store.put(&name, bytes).await }
        });
        for written in side_by_side(writes.into_iter()).await {
            let error = written.unwrap_err();
            assert!(matches!(error.reason(), Reason::Passing(_)), "{}", told(&error));
            assert!(told(&error).contains("nothing has moved for 5 seconds"), "{}", told(&error));
            assert!(told(&error).contains(&server_of(link.url())), "{}", told(&error));
            assert!(told(&error).contains(" tests: "), "{}", told(&error));
        }
        let error = bench.store.get(&name).await.unwrap_err();
        assert!(told(&error).contains("nothing has moved for 5 seconds"), "{}", told(&error));
        link.stall(false);
        link.cut();
        bench.clean().await;
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn an_object_that_is_replaced_while_it_is_read_is_never_mixed_with_the_new_one(
        #[values(Kind::S3, Kind::Swift, Kind::Gateway, Kind::Gcs)] kind: Kind,
    ) {
        let link = Link::to(&url_of(kind));
        let bench = Far::behind(kind, &link).bench();
        let name = bench.name("a");
        bench.store.put(&name, junk(64 * MIB)).await.unwrap();
        let mut pieces = bench.store.get(&name).await.unwrap();
        pieces.next().await.unwrap().unwrap();
        bench.store.replace(&name, Bytes::from(vec![7; 64 * MIB])).await.unwrap();
        link.cut();

        let error = pieces.collect(&name, 64 * MIB).await.unwrap_err();

        assert!(matches!(error.reason(), Reason::Passing(_)), "{}", told(&error));
        assert!(told(&error).contains("replaced or deleted while it was read"), "{}", told(&error));
        bench.clean().await;
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn an_upload_goes_on_where_the_server_has_it_when_answers_are_lost(
        #[values(1, 2, 3)] lost: usize,
        #[values(0, 8 * MIB, 20 * MIB + 1)] before: usize,
    ) {
        let link = Link::to(&gcs::chunks_url());
        let bench = Far::behind(Kind::GcsChunks, &link).bench();
        let (name, bytes) = (bench.name("a"), junk(30 * MIB + 5));
        let mut writer = bench.store.create(&name).await.unwrap();
        writer.write(bytes.slice(..before)).await.unwrap();
        link.lose_answers(lost);
        link.count("content-range: bytes */");
        writer.write(bytes.slice(before..)).await.unwrap();
        writer.finish().await.unwrap();
        // Otherwise it was the beginning of the upload that was tried again.
        assert!(link.counted() >= usize::from(before > 8 * MIB), "{}", link.counted());
        assert!(bench.read(&name).await.unwrap() == bytes);
        assert_eq!(bench.list("").await, [("a".to_string(), bytes.len() as u64)]);
        bench.clean().await;
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn an_upload_goes_on_where_the_server_has_it_when_it_is_cut(
        #[values(MIB, 9 * MIB, 20 * MIB)] cut_after: usize,
    ) {
        let link = Link::to(&gcs::chunks_url());
        let bench = Far::behind(Kind::GcsChunks, &link).bench();
        let (name, bytes) = (bench.name("a"), junk(30 * MIB + 5));
        link.cut_after([cut_after, 300]);
        let mut writer = bench.store.create(&name).await.unwrap();
        writer.write(bytes.clone()).await.unwrap();
        writer.finish().await.unwrap();
        assert_eq!(link.cuts_left(), 0);
        assert!(bench.read(&name).await.unwrap() == bytes);
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_bucket_of_gcs_that_is_missing_is_made_or_said_to_be_missing() {
        let mut settings = gcs::settings(&gcs::url(), &gcs::new_bucket());
        settings.create_buckets = false;
        let open = |settings: &GcsSettings| Gcs::new(settings.clone()).unwrap();
        let (folder, store) = (Folder::own("stores"), open(&settings));
        let name = folder.object("a").unwrap();
        let mut writer = store.create(&name).await.unwrap();
        let failed = [
            store.reach().await.unwrap_err(),
            store.put(&name, junk(1)).await.unwrap_err(),
            store.replace(&name, junk(1)).await.unwrap_err(),
            writer.write(junk(9 * MIB)).await.unwrap_err(),
        ];
        for error in &failed {
            let told = told(error);
            assert_eq!(error.class(), Class::Permanent, "{told}");
            assert!(told.contains(&settings.bucket) && told.contains("create_containers"), "{told}");
        }
        let error = writer.finish().await.unwrap_err();
        assert!(told(&error).contains("an earlier write to it failed"), "{}", told(&error));
        assert!(matches!(store.get(&name).await.unwrap_err().reason(), Reason::Missing));
        assert_eq!(store.list(&folder, "").await.unwrap(), []);
        store.delete(&name).await.unwrap();
        store.delete_all(std::slice::from_ref(&name)).await.unwrap();

        settings.create_buckets = true;
        settings.project = None;
        let error = open(&settings).put(&name, junk(1)).await.unwrap_err();
        assert!(told(&error).contains("no project to make it in: write project"), "{}", told(&error));

        settings.project = Some("backups".into());
        let makes = open(&settings);
        makes.reach().await.unwrap();
        let puts = (0..8).map(|number| {
            let (makes, name) = (makes.clone(), folder.object(&format!("{number}")).unwrap());
            async move { makes.put(&name, junk(1)).await.unwrap() }
        });
        side_by_side(puts).await;
        let names: Vec<_> = (0..8).map(|number| folder.object(&format!("{number}")).unwrap()).collect();
        assert_eq!(store.list(&folder, "").await.unwrap().len(), 8);
        store.delete_all(&names).await.unwrap();
        assert_eq!(store.list(&folder, "").await.unwrap(), []);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_container_of_cinders_in_gcs_has_nothing_of_ours_in_it() {
        let (usual, other) = (gcs::new_bucket(), gcs::new_bucket());
        let store = Gcs::new(gcs::settings(&gcs::url(), &usual)).unwrap();
        let container = |name: &str| Folder::from(&name.parse::<backhaul::job::Container>().unwrap());
        // Names that must be written otherwise in a URL.
        let (own, odd) = (Folder::own("records"), "a b/%41?x=1&y#z+\u{fc}\u{1f4be}");
        let places = [(&own, "a"), (&container(&usual), "v/1/a-00001"), (&container(&other), odd)];
        for (folder, name) in places {
            store.put(&folder.object(name).unwrap(), junk(3)).await.unwrap();
        }
        for (folder, name) in places {
            let listed = store.list(folder, "").await.unwrap();
            assert_eq!(listed.len(), 1);
            assert_eq!((listed[0].name.as_str(), listed[0].bytes), (name, 3));
            store.delete_all(&[folder.object(name).unwrap()]).await.unwrap();
            assert_eq!(store.list(folder, "").await.unwrap(), []);
        }

        let error = store.put(&container("3f/2b/3f2b9c1e").object("a").unwrap(), junk(1)).await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent);
        assert!(told(&error).contains("3f/2b/3f2b9c1e is no name of a bucket"), "{}", told(&error));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_encrypted_with_a_key_of_ours_is_read_with_that_key_only() {
        let folder = TempDir::new().unwrap();
        let key_file = folder.path().join("key");
        let mut settings = s3::settings(&s3::url(), s3::BUCKET);
        settings.sse_c_key = Some(SecretFrom::File(key_file.clone()));
        let plain = Bench::new(Kind::S3);

        std::fs::write(&key_file, "too short\n").unwrap();
        let error = S3::new(settings.clone()).unwrap_err();
        assert!(told(&error).contains("9 bytes: a key is 32 bytes"), "{}", told(&error));

        std::fs::write(&key_file, format!("{}\n", s3::SSE_C_KEY)).unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(open(settings));
        let bench = Bench { store, ..plain };
        let (small, large) = (bench.name("a"), bench.name("b"));
        bench.store.put(&small, junk(100)).await.unwrap();
        let mut writer = bench.store.create(&large).await.unwrap();
        writer.write(junk(9 * MIB)).await.unwrap();
        writer.finish().await.unwrap();
        assert!(bench.read(&small).await.unwrap() == junk(100));
        assert!(bench.read(&large).await.unwrap() == junk(9 * MIB));
        // Ceph's gateway copies nothing that is encrypted so. Whoever resumes a backup then stores it anew.
        let refused = bench.store.copy(&small, &bench.name("c")).await.unwrap_err();
        assert_eq!(refused.class(), Class::Permanent, "{}", told(&refused));
        let exists = bench.store.put(&small, junk(1)).await.unwrap_err();
        assert!(matches!(exists.reason(), Reason::Exists), "{}", told(&exists));

        let without = open(s3::settings(&s3::url(), s3::BUCKET));
        for name in [&small, &large] {
            assert_eq!(without.get(name).await.unwrap_err().class(), Class::Permanent);
        }
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_certificate_must_be_of_an_authority_that_is_trusted_unless_any_one_will_do() {
        let (url, ca_file) = s3::tls_url();
        let mut settings = s3::settings(&url, s3::BUCKET);
        let begun = Instant::now();
        let error = open(settings.clone()).reach().await.unwrap_err();
        assert_eq!(error.class(), Class::Permanent, "{}", told(&error));
        for part in [&server_of(&url), "certificate", "ca_file"] {
            assert!(told(&error).contains(part), "{}", told(&error));
        }
        // It was not tried again.
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());

        settings.http.ca_file = Some(ca_file.with_extension("none"));
        let error = S3::new(settings.clone()).unwrap_err();
        assert!(told(&error).contains("ca.none"), "{}", told(&error));

        for (ca_file, any_certificate) in [(Some(ca_file), false), (None, true)] {
            (settings.http.ca_file, settings.http.any_certificate) = (ca_file, any_certificate);
            let bench = bench(settings.clone());
            bench.store.put(&bench.name("a"), junk(9 * MIB)).await.unwrap();
            assert!(bench.read(&bench.name("a")).await.unwrap() == junk(9 * MIB));
            bench.clean().await;
        }
    }

    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_proxy_reaches_what_we_cannot_and_a_bucket_stands_where_it_is_told_to(
        #[values(true, false)] path_style: bool,
    ) {
        // The gateway takes what a proxy is asked, and knows this name for its own, which nobody else does.
        let link = Link::to(&s3::url());
        let mut settings = s3::settings(&s3::url(), s3::BUCKET);
        settings.endpoint = "http://s3.test".parse().unwrap();
        settings.path_style = path_style;
        settings.http.proxy = Some(Secret::new(link.url().into()));
        let bench = bench(settings);
        bench.store.put(&bench.name("a"), junk(MIB)).await.unwrap();
        let mut writer = bench.store.create(&bench.name("b")).await.unwrap();
        writer.write(junk(9 * MIB)).await.unwrap();
        writer.finish().await.unwrap();

        let direct = open(s3::settings(&s3::url(), s3::BUCKET));
        let listed = direct.list(&bench.folder, &bench.prefix).await.unwrap();
        assert_eq!(listed.len(), 2, "{listed:?}");
        assert!(bench.read(&bench.name("b")).await.unwrap() == junk(9 * MIB));
        bench.clean().await;
    }

    /// With TLS it cannot read what it passes on.
    #[rstest]
    #[tokio::test(flavor = "multi_thread")]
    async fn a_proxy_passes_on_what_it_is_asked_to_by_who_may_ask(#[values(true, false)] tls: bool) {
        let proxy = Proxy::start();
        let (url, ca_file) = if tls { s3::tls_url() } else { (s3::url(), PathBuf::new()) };
        let mut settings = s3::settings(&url, s3::BUCKET);
        settings.http.ca_file = tls.then_some(ca_file);
        settings.http.proxy = Some(Secret::new(proxy.url()));
        let bench = bench(settings.clone());
        let (name, bytes) = (bench.name("a"), junk(9 * MIB));
        let mut writer = bench.store.create(&name).await.unwrap();
        writer.write(bytes.clone()).await.unwrap();
        writer.finish().await.unwrap();
        assert!(bench.read(&name).await.unwrap() == bytes);
        let authority = server_of(&url).split_off(if tls { "https://".len() } else { "http://".len() });
        let (asked, log) = (format!("CONNECT {authority} "), proxy.log());
        assert_eq!(log.contains(&asked), tls, "{log}");
        assert_eq!(log.contains(&name.name), !tls, "{log}");

        settings.http.proxy = Some(Secret::new(proxy.url_of_nobody()));
        settings.http.retries_max = 1;
        let error = open(settings).put(&bench.name("b"), junk(1)).await.unwrap_err();
        let told = told(&error);
        match tls {
            true => assert!(told.contains("proxy authorization required"), "{told}"),
            false => {
                assert_eq!(error.class(), Class::Permanent, "{told}");
                assert!(told.contains("let proxy have a user and a password that it accepts"), "{told}");
            }
        }
        bench.clean().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_more_requests_wait_for_their_answers_than_connections_max_says() {
        let link = Link::to(&s3::url());
        let mut far = Far::behind(Kind::S3, &link);
        far.http().connections_max = 3;
        let bench = far.bench();
        // So that each takes as long as the others need to begin.
        link.slow_down(4 << 20);
        let puts = (0..12).map(|number| {
            let (store, name) = (bench.store.clone(), bench.name(&format!("{number}")));
            async move { store.put(&name, junk(MIB)).await.unwrap() }
        });
        side_by_side(puts).await;
        assert_eq!(link.waiting_max(), 3);
        bench.clean().await;
    }
}

/// The job hung, and so did the worker when it was told to stop.
#[tokio::test]
async fn what_is_no_file_in_the_place_of_an_object_is_told_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = Posix::open(folder.path()).unwrap();
    let of_store = Folder::own("records");
    let [pipe, inner] = ["pipe", "folder"].map(|name| of_store.object(name).unwrap());
    let path = |object: &ObjectName| folder.path().join(object.folder.as_str()).join(&object.name);
    fs::create_dir_all(path(&inner)).unwrap();
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mknodat(rustix::fs::CWD, path(&pipe), rustix::fs::FileType::Fifo, mode, 0).unwrap();

    for object in [&pipe, &inner] {
        let error = store.get(object).await.unwrap_err();
        let told = Causes(&error).to_string();
        assert!(told.contains(&object.name) && told.contains("is damaged"), "{told}");
        assert_eq!(error.class(), Class::Permanent);
    }
    let error = store.swap(&pipe, Bytes::from_static(b"was"), Bytes::from_static(b"is")).await.unwrap_err();
    assert!(Causes(&error).to_string().contains("is damaged"), "{error:?}");
}
