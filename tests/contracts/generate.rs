//! Every command that can be asked for, and every event that can be told of.

use backhaul::error::{Class, Problem};
use backhaul::job::{
    Account, Attempt, BackupId, BackupWork, Command, Completion, Counts, Event, Happening, Job, JobId,
    Location, Method, Mode, Operation, Outcome, Parent, Reading, RestoreWork, StoreName, Strategy as Engine,
    VerifyWork, VolumeId, Work,
};
use jiff::Timestamp;
use proptest::collection::{btree_map, vec};
use proptest::option::of;
use proptest::prelude::*;
use serde_json::{Value, json};

fn uuid() -> impl Strategy<Value = String> {
    any::<u128>().prop_map(|bits| {
        let hex = format!("{bits:032x}");
        [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
    })
}

fn job_id() -> impl Strategy<Value = JobId> {
    uuid().prop_map(|id| id.parse().unwrap())
}

fn backup_id() -> impl Strategy<Value = BackupId> {
    uuid().prop_map(|id| id.parse().unwrap())
}

fn volume_id() -> impl Strategy<Value = VolumeId> {
    uuid().prop_map(|id| id.parse().unwrap())
}

fn store() -> impl Strategy<Value = StoreName> {
    "[a-zA-Z0-9_-]{1,64}".prop_map(|name| name.parse().unwrap())
}

fn location(pattern: &'static str) -> impl Strategy<Value = Location> {
    prop_oneof![r"file:(/[^/\pC]{1,20}){1,4}", "file:/[a-z]{1,9}( |é|@|:|\\\\)x", pattern]
        .prop_map(|text| text.parse().unwrap())
}

fn source() -> impl Strategy<Value = Location> {
    location("rbd:([a-z.+é-]{1,9}/){1,2}[ a-z]{1,9}(@[a-z.]{1,9})?")
}

fn target() -> impl Strategy<Value = Location> {
    location("rbd:([a-z.+é-]{1,9}/){1,2}[ a-z]{1,9}")
}

fn metadata() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e18..1e18).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    let tree = leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(any::<String>(), inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    });
    (1..=2_u8, btree_map(any::<String>(), tree, 0..4)).prop_map(|(version, more)| {
        let mut metadata: serde_json::Map<String, Value> = more.into_iter().collect();
        metadata.insert("version".into(), version.into());
        metadata.insert("volume-metadata".into(), json!({"a": "b"}));
        Value::from(metadata).to_string()
    })
}

fn backup() -> impl Strategy<Value = Work> {
    let ids = (backup_id(), volume_id(), source());
    let parent = prop_oneof![Just(Parent::None), Just(Parent::Latest), backup_id().prop_map(Parent::Given)];
    let container =
        "[^./\\\\\\pC][^/\\\\\\pC]{0,9}(/[^./\\\\\\pC]{1,9}){0,3}".prop_map(|name| name.parse().unwrap());
    let texts = (of(r"\PC{0,255}"), of(r"(\PC|\n|\t){0,255}"), of(r"\PC{0,40}"));
    (ids, parent, of(container), texts, of(metadata()))
        .prop_filter("a backup is not its own parent", |((id, ..), parent, ..)| *parent != Parent::Given(*id))
        .prop_map(|((backup_id, volume_id, source), parent, container, texts, volume_meta)| {
            let (name, description, project_id) = texts;
            Work::Backup(BackupWork {
                backup_id,
                volume_id,
                source,
                parent,
                container,
                name,
                description,
                project_id,
                volume_meta,
            })
        })
}

/// Every command that can be asked for.
pub(crate) fn command() -> impl Strategy<Value = Command> {
    let restore = (backup_id(), target(), of(volume_id())).prop_map(|(backup_id, target, volume_id)| {
        Work::Restore(RestoreWork { backup_id, target, volume_id })
    });
    let verify = (backup_id(), of(1..=100u8)).prop_map(|(backup_id, percent)| {
        Work::Verify(VerifyWork { backup_id, sample: percent.map(|percent| percent.try_into().unwrap()) })
    });
    let work = prop_oneof![
        4 => backup(),
        2 => restore,
        1 => backup_id().prop_map(Work::Delete),
        1 => verify,
    ];
    let deadline = (0..4_000_000_000_i64, 0..1_000_000_000_i32)
        .prop_map(|(second, nanosecond)| Timestamp::new(second, nanosecond).unwrap());
    let job = (job_id(), of(store()), of(deadline), work)
        .prop_map(|(id, store, deadline, work)| Command::Run(Box::new(Job { id, store, deadline, work })));
    prop_oneof![8 => job, 1 => job_id().prop_map(Command::Cancel)]
}

fn method() -> impl Strategy<Value = Method> {
    of(prop_oneof![Just(Mode::Full), Just(Mode::Incremental)])
        .prop_map(|mode| Method { strategy: Engine::Chunked, mode })
}

fn counts() -> impl Strategy<Value = Counts> {
    any::<[u64; 8]>().prop_map(|[a, b, c, d, e, f, g, h]| Counts {
        bytes_read: a,
        bytes_zero: b,
        bytes_hole: c,
        bytes_unchanged: d,
        bytes_reused: e,
        bytes_stored: f,
        bytes_written: g,
        object_count: h,
    })
}

fn problem() -> impl Strategy<Value = Problem> {
    let class = prop_oneof![
        Just(Class::Transient),
        Just(Class::Unsuitable),
        Just(Class::Permanent),
        Just(Class::Cancelled)
    ];
    (class, any::<String>(), vec(any::<String>(), 0..3)).prop_map(|(class, message, causes)| Problem {
        class,
        message,
        causes,
    })
}

/// Years 1677 to 2262: more than any clock shows.
fn time() -> impl Strategy<Value = Timestamp> {
    any::<i64>().prop_map(|nanos| Timestamp::from_nanosecond(nanos.into()).unwrap())
}

fn attempt() -> impl Strategy<Value = Attempt> {
    (1..=u32::MAX, time(), any::<String>()).prop_map(|(attempt, time, error)| Attempt {
        attempt,
        time,
        error,
    })
}

fn account() -> impl Strategy<Value = Account> {
    let attempts = (any::<u32>(), vec(attempt(), 0..3), any::<u32>());
    let head = (of(method()), attempts, of(problem()), of(backup_id()), any::<bool>());
    let digest = "[0-9a-f]{64}".prop_map(|hex| format!("sha256-list:{hex}"));
    (head, of(any::<u64>()), counts(), 0.0..1e9, of(digest)).prop_map(
        |(head, volume_bytes, counts, seconds, digest)| {
            let (method, attempts, fallback_reason, parent_id, target_unfinished) = head;
            let (attempt_count, earlier_attempts, revival_count) = attempts;
            Account {
                method,
                attempt_count,
                earlier_attempts,
                revival_count,
                fallback_reason,
                parent_id,
                volume_bytes,
                target_unfinished,
                counts,
                seconds,
                digest,
            }
        },
    )
}

/// What happens, as long as the job it happens to is not known.
#[derive(Debug, Clone)]
enum Change {
    Going(Happening),
    Ended(Outcome, Box<Account>),
}

fn change() -> impl Strategy<Value = Change> {
    let started =
        (method(), 1..=u32::MAX).prop_map(|(method, attempt)| Happening::Started { method, attempt });
    let progress = (any::<u64>(), any::<u64>(), counts()).prop_map(|(bytes_total, bytes_done, counts)| {
        Happening::Progress(Reading { bytes_total, bytes_done, counts })
    });
    let unknown =
        counts().prop_map(|counts| Happening::Progress(Reading { bytes_total: 0, bytes_done: 0, counts }));
    let fell_back = (method(), method(), problem()).prop_map(|(from, to, reason)| Happening::FellBack {
        from,
        to,
        reason,
    });
    let outcome =
        prop_oneof![Just(Outcome::Succeeded), problem().prop_map(Outcome::Failed), Just(Outcome::Cancelled)];
    prop_oneof![
        1 => Just(Change::Going(Happening::Accepted)),
        1 => started.prop_map(Change::Going),
        1 => progress.prop_map(Change::Going),
        1 => unknown.prop_map(Change::Going),
        1 => fell_back.prop_map(Change::Going),
        3 => (outcome, account()).prop_map(|(outcome, account)| Change::Ended(outcome, Box::new(account))),
    ]
}

/// Every event that can be told of.
pub(crate) fn event() -> impl Strategy<Value = Event> {
    let operation = prop_oneof![
        Just(Operation::Backup),
        Just(Operation::Restore),
        Just(Operation::Delete),
        Just(Operation::Verify)
    ];
    let job = (job_id(), operation, backup_id(), of(volume_id()), of(store()));
    (job, time(), any::<u64>(), change()).prop_map(|(job, time, sequence, change)| {
        let (job_id, operation, backup_id, volume_id, store) = job;
        let happening = match change {
            Change::Going(happening) => happening,
            Change::Ended(outcome, account) => Happening::Ended(Box::new(Completion {
                target: None,
                job_id,
                operation,
                backup_id,
                volume_id,
                store: store.clone(),
                outcome,
                account: *account,
            })),
        };
        Event { job_id, operation, backup_id, volume_id, store, time, sequence, happening }
    })
}
