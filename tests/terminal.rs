//! What people see of jobs that go on: a bar on a terminal, and what `backhaul watch` prints.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, noise, settings};
use backhaul::broker::{Broker, Properties, Routed};
use tokio::time::timeout;

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";

#[test]
fn who_waits_at_a_terminal_sees_a_bar_that_moves_and_goes_when_the_job_has_ended() {
    let rabbit = Rabbit::shared();
    // It takes some seconds, and tells of itself each second.
    let stack = Stack::new(rabbit.url(), "job_bytes_per_second_max = 1048576", "object_bytes = 1048576");
    fs::write(stack.volume("a.img"), noise(31, 5 << 20)).unwrap();
    let _worker = stack.worker();
    let source = stack.location("a.img");
    let submit = stack.command(&["submit", "backup", "--wait", "--volume-id", VOLUME, "--source", &source]);
    let words = [submit.get_program()].into_iter().chain(submit.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();

    // script(1) runs it on a terminal of its own, and gives what it has written there.
    let on_terminal = format!("stty cols 120 rows 24; exec {}", words.join(" "));
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &on_terminal, "/dev/null"]).stdin(Stdio::null());
    script.current_dir(stack.path("")).env("TERM", "xterm").env_remove("BACKHAUL_CONFIG");
    let output = script.env_remove("BACKHAUL_LOG").output().unwrap();

    let seen = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{seen}");
    let (begun, rest) = seen.split_once(" makes backup ").unwrap_or_else(|| panic!("{seen:?}"));
    let (bar, end) = rest.split_once("backup succeeded in ").unwrap_or_else(|| panic!("{seen:?}"));
    assert!(begun.contains("job "), "{seen:?}");
    for part in ["backup █", " of 5.00 MiB ", "/s  ETA ", "skipped 0 B"] {
        assert!(bar.contains(part), "{part:?} is not in {bar:?}");
    }
    let percents = bar.split(" %").filter_map(|before| before.rsplit(' ').next()?.parse().ok());
    let percents: BTreeSet<u64> = percents.filter(|percent| (1..100).contains(percent)).collect();
    assert!(percents.len() > 1, "it does not move: {percents:?} {bar:?}");
    assert!(!end.contains(" %") && end.contains("read 5.00 MiB"), "{end:?}");
}

/// Goes on until somebody ends it, so dropping it does.
struct Watch(Child);

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_says_in_a_line_each_what_becomes_of_every_message() {
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), "", "");
    fs::write(stack.volume("a.img"), noise(32, 1 << 20)).unwrap();
    let broker = Broker::connect(settings(&rabbit, &stack)).await.unwrap();
    let publish = || broker.publish_event("some.thing.else", "{}".into(), Properties::default());
    let mut watch = stack.command(&["watch"]);
    let mut watch = Watch(watch.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let listens = async { while publish().await.unwrap() == Routed::Nowhere {} };
    timeout(Duration::from_secs(60), listens).await.expect("watch listens to events");
    let _worker = stack.worker();

    let source = stack.location("a.img");
    let submit = ["submit", "backup", "--volume-id", VOLUME, "--source", &source, "--backup-id", BACKUP];
    stack.ok(&submit);
    broker.publish_job("{".into(), Properties::default()).await.unwrap();

    let mut lines = BufReader::new(watch.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    let (mut job, mut rejected) = (Vec::new(), Vec::new());
    while rejected.is_empty() || !job.last().is_some_and(|line: &String| line.contains("succeeded")) {
        let line = lines.next().expect("watch goes on");
        match line.contains(" message rejected: ") {
            true => rejected.push(line),
            false => job.push(line),
        }
    }
    assert!(job.iter().all(|line| line.contains(&format!(" backup {BACKUP} job "))), "{job:?}");
    assert!(job[0].ends_with(": accepted"), "{job:?}");
    assert!(job[1].ends_with(": started: chunked full, attempt 1"), "{job:?}");
    let last = job.last().unwrap();
    assert!(last.contains(" s by chunked full: read 1.00 MiB, skipped 0 B, stored 1.00 MiB"), "{last}");
    assert!(rejected.len() == 1 && rejected[0].contains("rejected: not-json: "), "{rejected:?}");

    let pid = watch.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert_eq!(watch.0.wait().unwrap().code(), Some(0));
    let mut told = String::new();
    watch.0.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert!(told.contains("an event could not be read"), "{told}");
    assert_eq!(publish().await.unwrap(), Routed::Nowhere, "it leaves no queue behind");
}
