//! Jobs that are to be slow: how long they take at least.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backhaul::engine::chunked::{Compression, Settings};
use backhaul::error::Class;
use backhaul::job::{Context, Limit, Pace, Parent, VolumeId, Work};
use tokio_util::sync::CancellationToken;

use crate::support::engine::{Bench, Kind, backup_job, job, restore_job, run_in};
use crate::support::volume::{Fill, Volume};

const MIB: u64 = 1 << 20;
const SETTINGS: Settings = Settings {
    compression: Compression::Zstd,
    compression_level: 3,
    object_bytes: MIB as usize,
    sha_block_bytes: 4096,
    unchanged_check_per_mille: 1,
    source_snapshots_max: 1,
};

fn limit(bytes_per_second: u64) -> Limit {
    Limit::new(NonZeroU64::new(bytes_per_second))
}

fn paced(of_job: Limit, of_all: &Arc<Limit>) -> Context {
    Context { pace: Pace::new(of_job, of_all.clone()), ..Context::default() }
}

fn volume(bench: &Bench, name: &str, seed: u64) -> Volume {
    let mut volume = Volume::create(bench.volumes().join(name), 8 << 20);
    volume.fill(0..8 << 20, Fill::Noise(seed));
    volume
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_takes_at_least_as_long_as_its_limit_says() {
    let bench = Bench::new(Kind::Memory);
    let (engine, volume) = (bench.engine(SETTINGS), volume(&bench, "a", 1));
    let backup = backup_job(VolumeId::random(), &volume.path, Parent::None);
    let id = backup.backup_id();
    for job in [backup, restore_job(id, &bench.volumes().join("b")), job(Work::Verify(id.into()))] {
        let (ctx, began) = (paced(limit(4 * MIB), &Arc::default()), Instant::now());

        run_in(&ctx, &engine, &job).await.unwrap();

        // All but the first step, which is no larger than an object.
        assert!(began.elapsed() >= Duration::from_millis(1750), "{job:?}: {:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_share_the_limit_of_their_worker() {
    let bench = Bench::new(Kind::Memory);
    let (engine, all) = (bench.engine(SETTINGS), Arc::new(limit(8 * MIB)));
    let volumes = [volume(&bench, "a", 1), volume(&bench, "b", 2)];
    let jobs = volumes.each_ref().map(|it| backup_job(VolumeId::random(), &it.path, Parent::None));
    let contexts = [(); 2].map(|()| paced(Limit::default(), &all));
    let began = Instant::now();

    let ended =
        tokio::join!(run_in(&contexts[0], &engine, &jobs[0]), run_in(&contexts[1], &engine, &jobs[1]));

    assert!(ended.0.is_ok() && ended.1.is_ok(), "{ended:?}");
    assert!(began.elapsed() >= Duration::from_millis(1875), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_job_with_many_pieces_under_way_leaves_another_one_its_part() {
    let all = Arc::new(limit(1000));
    let (wide, narrow) = (paced(Limit::default(), &all), paced(Limit::default(), &all));
    let order = Mutex::new(String::new());
    let pass = |ctx: Context, name| {
        let order = &order;
        async move {
            ctx.pace(10).await.unwrap();
            order.lock().unwrap().push(name);
        }
    };
    let many = futures_util::future::join_all((0..20).map(|_| pass(wide.clone(), 'w')));
    let few = async {
        for _ in 0..5 {
            pass(narrow.clone(), 'n').await;
        }
    };

    tokio::join!(many, few);

    let order = order.into_inner().unwrap();
    assert!(order.rfind('n') <= Some(11), "they take turns: {order}");
}

#[tokio::test]
async fn a_job_that_waits_for_its_limit_ends_at_once_when_it_is_to_end_and_takes_nothing() {
    let all = Arc::new(limit(1000));
    let (cancel, other) = (CancellationToken::new(), paced(Limit::default(), &all));
    let ctx = Context { cancel: cancel.clone(), ..paced(limit(1), &all) };
    ctx.pace(500).await.unwrap();

    let (ended, ()) = tokio::join!(ctx.pace(1_000_000), async { cancel.cancel() });

    assert!(ended.is_err());
    let began = Instant::now();
    other.pace(1).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(60), "half a second, and no quarter of an hour");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_backup_can_be_cancelled() {
    let bench = Bench::new(Kind::Memory);
    let (engine, volume) = (bench.engine(SETTINGS), volume(&bench, "a", 1));
    let backup = backup_job(VolumeId::random(), &volume.path, Parent::None);
    // A byte in a second: without the cancel it would take months.
    let ctx = paced(limit(1), &Arc::default());
    let cancel = async {
        while ctx.progress.read().counts.bytes_read == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        ctx.cancel.cancel();
    };

    let (ended, ()) = tokio::join!(run_in(&ctx, &engine, &backup), cancel);

    assert_eq!(ended.unwrap_err().class(), Class::Cancelled);
}
