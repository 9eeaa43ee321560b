//! Two workers with one job, as real processes: the first one's connection to the broker is cut, and it goes on, while another
//! one is handed the job and does it. On each kind of store one result remains, nobody's bytes are harmed, and one end is told. So
//! it is if a worker is cut off, or killed, when all is done and told, and only the broker does not know.
//!
//! `tests/interrupted.rs` and `tests/runner.rs` do this at every call to a store, and `tests/life_model.rs` in every order.

use std::collections::BTreeSet;
use std::fs;

#[cfg(feature = "ceph")]
use crate::support::ceph::Ceph;
use crate::support::link::Link;
use crate::support::rabbit::Rabbit;
use crate::support::s3;
use crate::support::stack::{Stack, Worker, event, listen, noise, until};
use backhaul::broker::{Broker, Properties, Subscription};
use rstest::rstest;
use serde_json::Value;
use uuid::Uuid;

/// What the first worker takes some seconds for.
const VOLUME_BYTES: usize = 8 << 20;
/// With which it does, and the other one does not.
const SLOW: (&str, &str) = ("BACKHAUL_WORKER__JOB_BYTES_PER_SECOND_MAX", "1048576");
/// What `basic.ack` begins with behind its channel: the length of the frame, the class, and the method (AMQP 0-9-1, 4.2.3).
const ACK: &[u8] = &[0, 0, 0, 13, 0, 60, 0, 80];
const CHUNKS: &str = "object_bytes = 1048576\nsha_block_bytes = 4096\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Posix,
    S3,
    #[cfg(feature = "ceph")]
    Rbd,
}

/// A volume, and what it is restored to.
enum Place {
    Files,
    #[cfg(feature = "ceph")]
    Images {
        volume: String,
        restored: String,
    },
}

struct Scene {
    rabbit: Rabbit,
    link: Link,
    stack: Stack,
    store: &'static str,
    place: Place,
    volume_id: String,
    backup_id: String,
    bytes: Vec<u8>,
}

impl Scene {
    fn new(kind: Kind) -> Self {
        let rabbit = Rabbit::shared();
        let link = Link::to(rabbit.url());
        let [volume_id, backup_id] = [(); 2].map(|()| Uuid::new_v4().to_string());
        let bytes = noise(31, VOLUME_BYTES);
        let (store, section) = match kind {
            Kind::Posix => ("local", CHUNKS.to_owned()),
            Kind::S3 => ("far", far()),
            #[cfg(feature = "ceph")]
            Kind::Rbd => ("images", images()),
        };
        let stack = Stack::new(rabbit.url(), "", &section);
        let place = match kind {
            Kind::Posix | Kind::S3 => {
                fs::write(stack.volume("a.img"), &bytes).unwrap();
                Place::Files
            }
            #[cfg(feature = "ceph")]
            Kind::Rbd => {
                let ceph = Ceph::shared();
                let image = ceph.image("volumes", bytes.len() as u64);
                image.write(&[(0, &bytes)]);
                Place::Images {
                    volume: image.spec().into(),
                    restored: format!("volumes/restored-{backup_id}"),
                }
            }
        };
        Self { rabbit, link, stack, store, place, volume_id, backup_id, bytes }
    }

    /// Writes something to the volume.
    fn change(&mut self) {
        let (offset, piece) = (3 << 20, noise(32, 4096));
        self.bytes[offset..][..piece.len()].copy_from_slice(&piece);
        match &self.place {
            Place::Files => fs::write(self.stack.volume("a.img"), &self.bytes).unwrap(),
            #[cfg(feature = "ceph")]
            Place::Images { volume, .. } => {
                Ceph::shared().existing(volume).write(&[(offset as u64, &piece)]);
            }
        }
    }

    /// The same job for a backup on top of this one.
    fn incremental(&mut self) -> Vec<String> {
        self.backup_id = Uuid::new_v4().to_string();
        self.backup().into_iter().chain(["--incremental".into()]).collect()
    }

    fn of_backup(&self, operation: &str) -> Vec<String> {
        [operation, "--backup-id", &self.backup_id, "--store", self.store].map(Into::into).into()
    }

    fn backup(&self) -> Vec<String> {
        let source = match &self.place {
            Place::Files => self.stack.location("a.img"),
            #[cfg(feature = "ceph")]
            Place::Images { volume, .. } => format!("rbd:{volume}"),
        };
        let (volume_id, backup_id) = (&self.volume_id, &self.backup_id);
        let backup = ["backup", "--volume-id", volume_id, "--source", &source, "--backup-id", backup_id];
        backup.iter().copied().chain(["--store", self.store]).map(Into::into).collect()
    }

    fn restore(&self) -> Vec<String> {
        let target = match &self.place {
            Place::Files => self.stack.location("restored.img"),
            #[cfg(feature = "ceph")]
            Place::Images { restored, .. } => format!("rbd:{restored}"),
        };
        let restore = ["restore", "--backup-id", &self.backup_id, "--target", &target, "--store", self.store];
        restore.map(Into::into).into()
    }

    fn submit(&self, job: &[String]) {
        self.do_as("submit", job);
    }

    fn run_here(&self, job: &[String]) {
        self.do_as("run", job);
    }

    fn do_as(&self, command: &str, job: &[String]) {
        let arguments: Vec<&str> = [command].into_iter().chain(job.iter().map(String::as_str)).collect();
        self.stack.ok(&arguments);
    }

    /// Has the first worker begin with the job, cuts it off, and has another one do it. Waits until both are through.
    async fn split(&self, job: &[String]) {
        let (broker, mut events) = listen(&self.rabbit, &self.stack).await;
        let first = self.stack.worker_with(&[SLOW, ("BACKHAUL_BROKER__URL", self.link.url())]);
        self.submit(job);
        loop {
            let progress = event(&mut events, &["progress", "succeeded", "failed"]).await;
            assert_eq!(progress["type"], "backhaul.job.progress.v1", "it was too quick");
            if progress["data"]["bytes_done"] != 0 {
                break;
            }
        }
        self.link.stall(true);
        self.link.cut();

        let second = self.stack.worker();
        let is_overtaken = || first.log().contains("not done here");
        until("the first one has found out that the job is not its own", is_overtaken);
        self.link.stall(false);

        check_one_end(&broker, &mut events, [first, second]).await;
    }

    /// The backup is whole, and the only one; nothing else is left of it but that.
    fn check_backup(&self) {
        let listed =
            self.stack.ok(&["list", "--volume-id", &self.volume_id, "--store", self.store, "--json"]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
        assert_eq!(listed[0]["state"], "available", "{listed}");
        self.stack.ok(&["run", "verify", "--backup-id", &self.backup_id, "--store", self.store]);
        match &self.place {
            Place::Files => {
                let gc = ["gc", "--older-than", "0s", "--store", self.store];
                assert_eq!(self.stack.ok(&gc), "nothing is left over\n");
            }
            // Other tests have their backups in the same pool.
            #[cfg(feature = "ceph")]
            Place::Images { volume, .. } => {
                let ceph = Ceph::shared();
                let images = ceph.rbd(&["ls", "backups"]);
                let of_volume: Vec<_> =
                    images.lines().filter(|name| name.contains(&self.volume_id)).collect();
                assert_eq!(of_volume.len(), 1, "{of_volume:?}");
                for image in [format!("backups/{}", of_volume[0]), volume.clone()] {
                    let snapshots = ceph.rbd(&["snap", "ls", "--all", "--format", "json", &image]);
                    let snapshots: Value = serde_json::from_str(&snapshots).unwrap();
                    assert_eq!(snapshots.as_array().unwrap().len(), 1, "{image}: {snapshots}");
                }
                let index = ["-p", "backups", "listomapkeys", ".backhaul/digests/.index"];
                let lists = ceph.rados(&index);
                let own: Vec<_> = lists.lines().filter(|list| list.starts_with(&self.backup_id)).collect();
                assert_eq!(own.len(), 1, "{own:?}");
            }
        }
    }

    fn check_restored(&self) {
        let restored = match &self.place {
            Place::Files => {
                let names = fs::read_dir(self.stack.volume("")).unwrap();
                let names: BTreeSet<_> = names.map(|entry| entry.unwrap().file_name()).collect();
                assert_eq!(names, ["a.img", "restored.img"].map(Into::into).into());
                fs::read(self.stack.volume("restored.img")).unwrap()
            }
            #[cfg(feature = "ceph")]
            Place::Images { restored, .. } => Ceph::shared().existing(restored).read(),
        };
        assert!(restored == self.bytes, "other bytes than were backed up");
    }

    fn clean_up(&self) {
        self.stack.ok(&["run", "delete", "--backup-id", &self.backup_id, "--store", self.store]);
        #[cfg(feature = "ceph")]
        if let Place::Images { volume, restored } = &self.place {
            for image in [volume, restored] {
                Ceph::shared().rbd(&["rm", "--no-progress", image]);
            }
        }
    }
}

/// Whoever told of it, and how often: the job has ended once.
async fn check_one_end(broker: &Broker, events: &mut Subscription, workers: [Worker; 2]) {
    let ended = event(events, &["succeeded", "failed", "cancelled"]).await;
    assert_eq!(ended["type"], "backhaul.job.succeeded.v1", "{ended}");
    for mut worker in workers {
        worker.terminate();
        assert_eq!(worker.ended(), 0, "{}", worker.log());
    }
    broker.publish_event("end.end.-", b"{}".as_slice().into(), Properties::default()).await.unwrap();
    let mut ids = BTreeSet::from([ended["id"].to_string()]);
    loop {
        let more = event(events, &["succeeded", "failed", "cancelled", "end"]).await;
        if more == serde_json::json!({}) {
            break;
        }
        ids.insert(more["id"].to_string());
    }
    assert_eq!(ids.len(), 1, "two ends were told: {ids:?}");
}

/// A store in a bucket of its own.
fn far() -> String {
    let (url, bucket) = (url::Url::parse(&s3::url()).unwrap(), s3::new_bucket());
    format!(
        "[store.far]\nkind = \"s3\"\ndefault = true\nendpoint = \"http://{}:{}\"\naccess_key = \"{}\"\n\
         secret_key = \"{}\"\nbucket = \"{bucket}\"\n{CHUNKS}",
        url.host_str().unwrap(),
        url.port().unwrap(),
        url.username(),
        url.password().unwrap()
    )
}

/// A store in the pool that all tests share.
#[cfg(feature = "ceph")]
fn images() -> String {
    let conf = Ceph::shared().conf().display().to_string();
    format!(
        "[ceph.main]\nconf = \"{conf}\"\nuser = \"cinder\"\noperation_seconds_max = 30\n\n\
         [store.images]\nkind = \"rbd\"\npool = \"backups\"\ndefault = true\n"
    )
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_goes_on_after_another_worker_was_handed_it_leaves_one(
    #[values(Kind::Posix, Kind::S3)] kind: Kind,
) {
    split_a_backup(kind).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_goes_on_after_another_worker_was_handed_it_leaves_the_right_bytes(
    #[values(Kind::Posix, Kind::S3)] kind: Kind,
) {
    split_a_restore(kind).await;
}

#[cfg(feature = "ceph")]
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_an_image_that_goes_on_after_another_worker_was_handed_it_leaves_one() {
    split_a_backup(Kind::Rbd).await;
}

#[cfg(feature = "ceph")]
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_of_an_image_that_goes_on_after_another_worker_was_handed_it_leaves_the_right_bytes() {
    split_a_restore(Kind::Rbd).await;
}

async fn split_a_backup(kind: Kind) {
    let scene = Scene::new(kind);

    scene.split(&scene.backup()).await;

    scene.check_backup();
    scene.run_here(&scene.restore());
    scene.check_restored();
    scene.clean_up();
}

async fn split_a_restore(kind: Kind) {
    let scene = Scene::new(kind);
    scene.run_here(&scene.backup());

    scene.split(&scene.restore()).await;

    scene.check_restored();
    scene.check_backup();
    scene.clean_up();
}

/// What becomes of a worker when the broker is about to hear that a job is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Killed,
    CutOff,
}

/// A scene of which the acks do not come through, and the worker in it.
struct BeforeTheAck {
    scene: Scene,
    events: Subscription,
    _broker: Broker,
    worker: Option<Worker>,
}

impl BeforeTheAck {
    async fn new(kind: Kind) -> Self {
        let scene = Scene::new(kind);
        let (broker, events) = listen(&scene.rabbit, &scene.stack).await;
        Self { scene, events, _broker: broker, worker: None }
    }

    /// Sends the job. When its end is told, and only the ack is missing, its worker is killed or cut off. The message comes
    /// again, and the job has ended as it was told.
    async fn end(&mut self, how: How, job: &[String]) {
        let (scene, ends) = (&self.scene, ["succeeded", "failed", "cancelled"]);
        let start = || scene.stack.worker_with(&[("BACKHAUL_BROKER__URL", scene.link.url())]);
        let worker = self.worker.take().unwrap_or_else(start);
        let before = worker.log().len();
        let job_id = Uuid::new_v4().to_string();
        scene.link.stall_at([format!("{job_id}.succeeded").into(), ACK.into()]);
        scene.submit(&[job, &["--job-id".into(), job_id]].concat());
        let told = event(&mut self.events, &ends).await;
        assert_eq!(told["type"], "backhaul.job.succeeded.v1", "{how:?} {job:?}: {told}");
        until("all but the ack is done", || scene.link.is_stalled());
        let lost = || {
            scene.link.cut();
            scene.link.stall(false);
        };
        let (worker, log_start) = match how {
            How::Killed => {
                worker.kill();
                lost();
                (start(), 0)
            }
            How::CutOff => {
                lost();
                (worker, before)
            }
        };
        let found = match how {
            // It had not kept that it was told.
            How::Killed => "job was done before, telling it again",
            How::CutOff => "job was done before, and that was told",
        };
        until("the message has come again", || worker.log()[log_start..].contains(found));
        if how == How::Killed {
            let again = event(&mut self.events, &ends).await;
            assert_eq!((&again["id"], &again["data"]), (&told["id"], &told["data"]));
        }
        self.worker = Some(worker);
    }
}

/// A full backup, an incremental one, its restore, its verification, and its delete.
async fn end_all_before_the_ack(kind: Kind, hows: [How; 5]) {
    let mut lost = BeforeTheAck::new(kind).await;
    let full = lost.scene.backup();
    lost.end(hows[0], &full).await;
    lost.scene.change();
    let full_id = lost.scene.backup_id.clone();
    let incremental = lost.scene.incremental();
    lost.end(hows[1], &incremental).await;
    let restore = lost.scene.restore();
    lost.end(hows[2], &restore).await;
    lost.scene.check_restored();
    let verify = lost.scene.of_backup("verify");
    lost.end(hows[3], &verify).await;
    let delete = lost.scene.of_backup("delete");
    lost.end(hows[4], &delete).await;

    // Each end that is told is one that was told before: nothing comes now.
    let Some(mut worker) = lost.worker.take() else { unreachable!() };
    worker.terminate();
    assert_eq!(worker.ended(), 0, "{}", worker.log());
    lost.scene.backup_id = full_id;
    lost.scene.check_backup();
    lost.scene.clean_up();
}

#[rstest]
#[case::cut_off_first([How::CutOff, How::Killed, How::CutOff, How::Killed, How::CutOff])]
#[case::killed_first([How::Killed, How::CutOff, How::Killed, How::CutOff, How::Killed])]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_right_before_the_ack_has_ended_as_it_was_told(#[case] hows: [How; 5]) {
    end_all_before_the_ack(Kind::Posix, hows).await;
}

#[cfg(feature = "ceph")]
#[rstest]
#[case::cut_off_first([How::CutOff, How::Killed, How::CutOff, How::Killed, How::CutOff])]
#[case::killed_first([How::Killed, How::CutOff, How::Killed, How::CutOff, How::Killed])]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_of_images_right_before_the_ack_has_ended_as_it_was_told(#[case] hows: [How; 5]) {
    end_all_before_the_ack(Kind::Rbd, hows).await;
}
