//! What the program asks of the machine under it: in which order it makes files durable, what it reads and writes of files
//! with holes, how much memory it takes.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Child;

use serde_json::Value;

use crate::support::rabbit::Rabbit;
use crate::support::stack::{Stack, memory_bytes_most, noise};

const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";
const NO_BROKER: &str = "amqp://guest:guest@127.0.0.1:1/%2f";
const MIB: usize = 1 << 20;

/// A call of the kernel that succeeded.
struct Call {
    name: String,
    /// As strace writes them; behind the number of a file is its path.
    arguments: String,
    /// The line of the log at which it began, and that at which it was over.
    begun: usize,
    ended: usize,
}

impl Call {
    /// The file of its first argument.
    fn file(&self) -> &Path {
        let path = self.arguments.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        Path::new(path.map_or("", |(path, _)| path))
    }

    /// The paths that it was given.
    fn paths(&self) -> Vec<&Path> {
        self.arguments.split('"').skip(1).step_by(2).map(Path::new).collect()
    }
}

/// All that a run of the program did to files, in the order in which it began.
struct Trace(Vec<Call>);

impl Trace {
    /// Runs the program to its end, which must succeed.
    fn of(stack: &Stack, arguments: &[&str]) -> Self {
        // Not every architecture has those with a question mark.
        let calls = "--trace=write,pwrite64,fsync,?rename,?renameat,?renameat2,linkat,?unlink,unlinkat,?mkdir,mkdirat";
        let strace = ["strace", "-f", "--seccomp-bpf", "-y", "-s0", "-o", "trace.log", calls];
        let output = stack.command_by(&strace, arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Self::parse(&fs::read_to_string(stack.path("trace.log")).unwrap())
    }

    /// Reads lines such as `812 fsync(3</a/b>) = 0`, of which other threads may have split one in two: `812 fsync(3</a/b>
    /// <unfinished ...>` and `812 <... fsync resumed>) = 0`.
    fn parse(log: &str) -> Self {
        let (mut calls, mut under_way) = (Vec::new(), HashMap::new());
        for (number, line) in log.lines().enumerate() {
            let Some((thread, text)) = line.split_once(' ') else { continue };
            let text = text.trim_start();
            let mut call = if text.starts_with("<...") {
                let Some(call) = under_way.remove(thread) else { continue };
                call
            } else {
                let Some((name, arguments)) = text.split_once('(') else { continue };
                Call { name: name.into(), arguments: arguments.into(), begun: number, ended: number }
            };
            if text.ends_with("<unfinished ...>") {
                under_way.insert(thread, call);
                continue;
            }
            call.ended = number;
            if text.rsplit_once(" = ").is_some_and(|(_, result)| !result.starts_with(['-', '?'])) {
                calls.push(call);
            }
        }
        calls.sort_by_key(|call| call.begun);
        Self(calls)
    }

    fn named<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a Call> {
        self.0.iter().filter(move |call| call.name.starts_with(prefix))
    }

    /// Where it was known that what had become of this file or folder until `line` is durable.
    fn durable(&self, path: &Path, line: usize) -> usize {
        let synced = self.named("fsync").find(|call| call.begun > line && call.file() == path);
        synced.unwrap_or_else(|| panic!("{path:?} is not made durable after line {line}")).ended
    }

    /// Where the last write to this file was over; there is at least one.
    fn last_write(&self, path: &Path) -> usize {
        let writes = self.named("write").chain(self.named("pwrite"));
        let last = writes.filter(|call| call.file() == path).map(|call| call.ended).max();
        last.unwrap_or_else(|| panic!("nothing is written to {path:?}"))
    }

    /// The files of a store that got their names, each of which must have been durable before.
    fn published(&self, root: &Path) -> Vec<Published> {
        let mut published = Vec::new();
        for call in self.named("rename") {
            let [from, to] = call.paths()[..] else { panic!("{}", call.arguments) };
            assert!(from.file_name().unwrap().to_str().unwrap().starts_with(".tmp."), "{from:?}");
            assert!(from.parent() == to.parent() && to.starts_with(root), "{from:?} {to:?}");
            let written = self.durable(from, self.last_write(from));
            assert!(written < call.begun, "{to:?} has its name before its content is durable");
            let durable = self.durable(to.parent().unwrap(), call.ended);
            published.push(Published { path: to.to_owned(), begun: call.begun, durable });
        }
        published
    }
}

/// A file that got its name.
struct Published {
    path: PathBuf,
    /// Where in the trace that began, and where it was known to be durable.
    begun: usize,
    durable: usize,
}

impl Published {
    fn ends_with(&self, end: &str) -> bool {
        self.path.to_str().unwrap().ends_with(end)
    }
}

#[test]
fn what_a_job_has_written_or_removed_is_durable_before_what_tells_of_it() {
    let stack = Stack::new(NO_BROKER, "", "object_bytes = 1048576");
    fs::write(stack.volume("a.img"), noise(1, 3 * MIB)).unwrap();
    let root = stack.path("backups").canonicalize().unwrap();
    let (source, record) = (stack.location("a.img"), root.join(format!(".backhaul/records/{BACKUP}.json")));

    // A backup: its objects, then the one that makes it visible, then its record.
    let arguments = ["run", "backup", "--volume-id", VOLUME, "--source", &source, "--backup-id", BACKUP];
    let trace = Trace::of(&stack, &arguments);
    let published = trace.published(&root);
    let metadata = published.iter().find(|file| file.ends_with("_metadata")).unwrap();
    let is_of_backup = |file: &&Published| {
        file.path.parent() == metadata.path.parent()
            || file.path.starts_with(root.join(".backhaul/checksums"))
    };
    let objects: Vec<_> = published.iter().filter(is_of_backup).collect();
    assert_eq!(objects.len(), 3 + 3, "data, digests, checksums, metadata");
    for object in objects.iter().filter(|object| object.path != metadata.path) {
        assert!(object.durable < metadata.begun, "{:?} is not durable before the metadata", object.path);
    }
    for folder in trace.named("mkdir").filter(|call| call.begun < metadata.begun) {
        let path = folder.paths()[0];
        let durable = trace.durable(path.parent().unwrap(), folder.ended);
        assert!(durable < metadata.begun, "{path:?} is not durable before the metadata");
    }
    let last = published.iter().rfind(|file| file.path == record).unwrap();
    assert!(metadata.durable < last.begun, "the metadata is not durable before the record");

    // A restore to a new file, which gets its name when it is whole, and one onto that.
    let target = stack.path("volumes").canonicalize().unwrap().join("restored.img");
    let restore = ["run", "restore", "--backup-id", BACKUP, "--target", &stack.location("restored.img")];
    let trace = Trace::of(&stack, &restore);
    let partial = target.with_file_name(".restored.img.backhaul-partial");
    let named = trace.named("linkat").find(|call| call.paths().contains(&Path::new("restored.img"))).unwrap();
    assert!(trace.durable(&partial, trace.last_write(&partial)) < named.begun);
    trace.durable(target.parent().unwrap(), named.ended);
    let trace = Trace::of(&stack, &restore);
    trace.durable(&target, trace.last_write(&target));

    // A delete: what makes the backup visible goes first.
    let trace = Trace::of(&stack, &["run", "delete", "--backup-id", BACKUP]);
    let mut removed = HashMap::new();
    for call in trace.named("unlink") {
        let path = call.paths()[0];
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.starts_with(&root) && !name.starts_with(".tmp.") {
            removed.insert(path, (call.begun, trace.durable(path.parent().unwrap(), call.ended)));
        }
    }
    let (_, invisible) = removed[metadata.path.as_path()];
    for object in objects.iter().filter(|object| object.path != metadata.path) {
        let (begun, _) = removed[object.path.as_path()];
        assert!(invisible < begun, "{:?} goes before the metadata has", object.path);
    }
    assert!(removed.contains_key(record.as_path()));
}

/// As FAT, and not every file system in user space, is; the last step of a long restore then failed.
#[test]
fn a_restore_to_a_new_file_ends_also_on_a_file_system_without_hard_links() {
    let stack = Stack::new(NO_BROKER, "", "");
    let volume = noise(9, 1_000_000);
    fs::write(stack.volume("a.img"), &volume).unwrap();
    let source = stack.location("a.img");
    stack.ok(&["run", "backup", "--volume-id", VOLUME, "--source", &source, "--backup-id", BACKUP]);
    for refusal in ["EPERM", "EOPNOTSUPP"] {
        let inject = format!("--inject=linkat:error={refusal}");
        let strace = ["strace", "-f", "-o", "trace.log", "--trace=linkat", &inject];
        let target = stack.location("restored.img");
        let restore = ["run", "restore", "--backup-id", BACKUP, "--target", &target];
        let restored = stack.command_by(&strace, &restore).output().unwrap();
        assert!(restored.status.success(), "{restored:?}");
        assert!(fs::read(stack.volume("restored.img")).unwrap() == volume);
        fs::remove_file(stack.volume("restored.img")).unwrap();
        assert_eq!(fs::read_dir(stack.path("volumes")).unwrap().count(), 1);
    }
    let log = fs::read_to_string(stack.path("trace.log")).unwrap();
    assert!(log.contains("INJECTED"), "{log}");
}

/// A hole of the source is not read, and neither a hole nor zeros that were written take room in what is restored.
#[test]
fn holes_are_not_read_and_zeros_are_not_written() {
    let stack = Stack::new(NO_BROKER, "", "object_bytes = 1048576\nsha_block_bytes = 4096");
    let source = fs::File::create_new(stack.volume("a.img")).unwrap();
    source.set_len(16 << 20).unwrap();
    // Noise, a hole, zeros, noise, a hole.
    source.write_all_at(&noise(1, 2 * MIB), 0).unwrap();
    source.write_all_at(&vec![0; 3 * MIB], 9 << 20).unwrap();
    source.write_all_at(&noise(2, MIB / 2), 12 << 20).unwrap();
    let location = stack.location("a.img");
    let (read, zero, data) = (5 * MIB + MIB / 2, 3 * MIB, 2 * MIB + MIB / 2);

    let backup = ["backup", "--volume-id", VOLUME, "--source", &location, "--backup-id", BACKUP];
    let told = stack.ok(&[&["run"], &backup[..], &["--json"]].concat());
    let counts = &serde_json::from_str::<Value>(&told).unwrap()["data"];
    assert_eq!(counts["bytes_read"], read, "{counts}");
    assert_eq!(counts["bytes_hole"], 16 * MIB - read, "{counts}");
    assert_eq!(counts["bytes_zero"], zero, "{counts}");

    fs::write(stack.volume("old.img"), noise(3, 16 * MIB)).unwrap();
    for name in ["new.img", "old.img"] {
        stack.ok(&["run", "restore", "--backup-id", BACKUP, "--target", &stack.location(name)]);
        assert!(fs::read(stack.volume(name)).unwrap() == fs::read(stack.volume("a.img")).unwrap(), "{name}");
        // A file system may count what it needs itself to find the data again.
        let used = fs::metadata(stack.volume(name)).unwrap().blocks() as usize * 512;
        assert!((data..data + (64 << 10)).contains(&used), "{name} takes {used} bytes, and has {data}");
    }
}

/// With the least that a worker can be given, and a multiple of that in two jobs at a time.
#[test]
fn a_worker_takes_no_more_memory_than_it_may() {
    const MEMORY_BYTES_MAX: u64 = 128 << 20;
    let rabbit = Rabbit::shared();
    let stack = Stack::new(rabbit.url(), &format!("memory_bytes_max = {MEMORY_BYTES_MAX}"), "");
    let volumes = ["a", "b"].map(|name| (name, VOLUME.replace('8', name), BACKUP.replace('8', name)));
    for (seed, (name, ..)) in (1..).zip(&volumes) {
        fs::write(stack.volume(name), noise(seed, 16 * MIB).repeat(12)).unwrap();
    }
    let worker = stack.worker();
    let at_first = memory_bytes_most(worker.pid());

    for operation in ["backup", "restore", "verify"] {
        let jobs: Vec<Child> = volumes
            .iter()
            .map(|(name, volume_id, backup_id)| {
                let (source, target) = (stack.location(name), stack.location(&format!("{name}-restored")));
                let more = match operation {
                    "backup" => &["--volume-id", volume_id, "--source", &source][..],
                    "restore" => &["--target", &target],
                    _ => &[],
                };
                let fixed = ["submit", operation, "--backup-id", backup_id, "--wait"];
                stack.command(&[&fixed[..], more].concat()).spawn().unwrap()
            })
            .collect();
        for mut job in jobs {
            assert_eq!(job.wait().unwrap().code(), Some(0), "{operation}");
        }
        let most = memory_bytes_most(worker.pid());
        println!("{operation}: {} MiB, {} at first", most >> 20, at_first >> 20);
        assert!(most <= MEMORY_BYTES_MAX, "{operation} took {} MiB, {} at first", most >> 20, at_first >> 20);
    }
}
