//! What reads bytes from outside, as functions of nothing but bytes: the targets of `fuzz/`, and of a test that replays what is
//! kept there. It is in no program: only tests and fuzzers are built with it.
//!
//! Whatever the bytes are, nothing may panic. What can be read and written must be the same when it is read again.

use std::convert::Infallible;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use crate::broker::{AmqpUrl, TransportUrl, fuzz_headers};
use crate::cinder::conf::{Conf, Settings, Source};
use crate::cinder::database::DatabaseUrl;
use crate::cinder::export_record::{self, Form};
use crate::config::Config;
use crate::engine::KeptOutcome;
use crate::engine::catalog::{seal, unseal};
use crate::engine::chunked::{checksums, metadata, sha256_file};
use crate::job::{Container, Location, Record, Sample, StoreName, Verified};
use crate::message::oslo::{Backup, BackupDeviceInfo, Object, Reply, Request, Snapshot, Volume};
use crate::message::{self, Received};
use crate::store::Folder;

/// One of the functions below.
pub type Target = fn(&[u8]);

/// All of them. Each has a folder in `fuzz/corpus` of the same name.
pub const TARGETS: [(&str, Target); 12] = [
    ("checksums", checksums),
    ("cinder_conf", cinder_conf),
    ("command", command),
    ("config", config),
    ("event", event),
    ("export_record", export_record),
    ("headers", headers),
    ("metadata", metadata),
    ("oslo", oslo),
    ("record", record),
    ("sha256_file", sha256_file),
    ("urls", urls),
];

/// The body of a message to a worker.
pub fn command(data: &[u8]) {
    if let Ok(command) = message::parse_command(data) {
        let again = message::parse_command(&message::encode_command(&command));
        assert!(again.is_ok_and(|again| again == command), "{command:?} is not read as it was written");
    }
    drop(message::parse_control(data));
}

/// The body of an event, and what is in the header of a message that was put off: attempts, or the rest of a cancel.
pub fn event(data: &[u8]) {
    if let Ok(Received::Job(event)) = message::parse_event(data) {
        let again = message::parse_event(&message::encode_event(&event, "/fuzz"));
        let same = |again| matches!(again, Received::Job(again) if again == event);
        assert!(again.is_ok_and(same), "{event:?} is not read as it was written");
    }
    let story = String::from_utf8_lossy(data);
    let attempts = message::parse_attempts(&story);
    assert!(message::parse_attempts(&message::encode_attempts(attempts.clone())) == attempts, "{attempts:?}");
    if let Some(unkept) = message::parse_unkept(&story) {
        assert!(
            message::parse_unkept(&message::encode_unkept(&unkept)).as_ref() == Some(&unkept),
            "{unkept:?}"
        );
    }
}

/// A request or a reply of OpenStack's services, and the objects in it.
pub fn oslo(data: &[u8]) {
    if let Ok(request) = Request::parse(data) {
        let again = Request::parse(&request.encode());
        assert!(again.is_ok_and(|again| again == request), "{request:?} is not read as it was written");
        request.args.values().for_each(oslo_object);
    }
    if let Ok(reply) = Reply::parse(data) {
        let again = Reply::parse(&reply.encode());
        assert!(again.is_ok_and(|again| again == reply), "{reply:?} is not read as it was written");
    }
    if let Ok(value) = serde_json::from_slice(data) {
        oslo_object(&value);
    }
}

fn oslo_object(value: &Value) {
    if let Ok(object) = Object::read(value) {
        assert!(object.to_json() == *value, "{object:?} does not go on as it came");
    }
    if let Ok(backup) = Backup::read(value) {
        let _ = (backup.status(), backup.host());
    }
    if let Ok(volume) = Volume::read(value) {
        let _ = (volume.service(), volume.size_gib());
    }
    let _ = (Snapshot::read(value), BackupDeviceInfo::read(value));
}

/// The prefix of the objects of a backup in one line, and Cinder's list of these objects behind it.
pub fn metadata(data: &[u8]) {
    let (prefix, text) = data.split_at(data.iter().position(|byte| *byte == b'\n').unwrap_or(0));
    let prefix = String::from_utf8_lossy(prefix);
    let take = |entry: metadata::ObjectEntry| {
        assert!(entry.length > 0 && entry.end() == entry.offset + entry.length, "{entry:?}");
        let name = metadata::object_name(&prefix, entry.number);
        assert!(metadata::object_number(&prefix, &name) == Some(entry.number), "{name}");
        Ok::<(), Infallible>(())
    };
    let _ = metadata::read(text, &prefix, take);
}

/// Cinder's list of digests.
pub fn sha256_file(data: &[u8]) {
    let mut count = 0;
    let take = |_, digests: Vec<_>| {
        assert!(digests.len() <= sha256_file::BATCH_DIGESTS, "{} at a time", digests.len());
        count += digests.len();
        Ok::<(), Infallible>(())
    };
    let _ = sha256_file::read(data, take);
    assert!(count <= data.len() / 64, "{count} digests in {} bytes", data.len());
}

/// Our own list of what the objects of a backup are in the store.
pub fn checksums(mut data: &[u8]) {
    while let Ok(Some((number, checksum))) = checksums::read(&mut data) {
        let line = checksums::line(number, checksum);
        assert!(
            matches!(checksums::read(&mut line.as_bytes()), Ok(Some(again)) if again == (number, checksum))
        );
    }
}

/// What we keep beside backups: their records, and how jobs have ended.
pub fn record(data: &[u8]) {
    let Ok(name) = Folder::own("records").object("fuzz") else { return };
    let _ = unseal::<Record>(&name, data);
    // Nobody guesses a digest, so what it would seal is read as well.
    if let Ok(record) = serde_json::from_slice::<Record>(data) {
        let again = seal(&name, &record).and_then(|sealed| unseal(&name, &sealed));
        assert!(again.is_ok_and(|again: Record| again == record), "{record:?} is not read as it was written");
    }
    if let Ok(kept) = serde_json::from_slice::<KeptOutcome>(data) {
        let again = seal(&name, &kept).and_then(|sealed| unseal(&name, &sealed));
        assert!(
            again.is_ok_and(|again: KeptOutcome| again == kept),
            "{kept:?} is not read as it was written"
        );
    }
    let _ = serde_json::from_slice::<Verified>(data);
}

/// Cinder's export record of a backup, for a store of each form.
pub fn export_record(data: &[u8]) {
    let Ok(pool) = "backups".parse() else { return };
    for form in [Form::Files, Form::Buckets, Form::Images { pool }] {
        let again = |record| export_record::import(export_record::export(record).as_bytes(), &form);
        if let Ok(record) = export_record::import(data, &form) {
            // An export has whole seconds, and fields that the first one may have lacked.
            let first = again(&record);
            let second = first.as_ref().ok().and_then(|first| again(first).ok());
            assert!(first.is_ok() && second == first.ok(), "{record:?} is not read as it was written");
        }
    }
}

/// Our configuration: a file, and behind a NUL, in lines of the form `NAME=VALUE`, the environment.
pub fn config(data: &[u8]) {
    let (file, environment) = data.split_at(data.iter().position(|byte| *byte == 0).unwrap_or(data.len()));
    let environment: Vec<(String, String)> = String::from_utf8_lossy(environment)
        .trim_start_matches('\0')
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    in_file(file, |path| drop(Config::load_from(Some(path), &environment)));
}

/// Cinder's configuration.
pub fn cinder_conf(data: &[u8]) {
    in_file(data, |path| {
        // With a folder named that has no files, those of this machine are not read.
        let Some(folder) = path.parent() else { return };
        if let Ok(settings) = Settings::read(&[Source::File(path.into()), Source::Dir(folder.join("empty"))])
        {
            settings.not_obeyed();
            drop(Conf::new(&settings));
        }
    });
}

fn in_file(data: &[u8], read: impl FnOnce(&Path)) {
    let written = TempDir::new().and_then(|folder| {
        fs::create_dir(folder.path().join("empty"))?;
        fs::write(folder.path().join("file"), data)?;
        Ok(folder)
    });
    assert!(written.is_ok(), "{written:?}");
    if let Ok(folder) = written {
        read(&folder.path().join("file"));
    }
}

/// Addresses of brokers, databases and volumes, and names.
pub fn urls(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = (text.parse::<AmqpUrl>(), DatabaseUrl::parse(&text));
    if let Ok(url) = text.parse::<TransportUrl>() {
        let _ = (url.urls(false), url.urls(true));
    }
    let _ = (text.parse::<StoreName>(), text.parse::<Container>(), text.parse::<Sample>());
    if let Ok(location) = text.parse::<Location>() {
        let again = location.to_string().parse();
        assert!(
            again.is_ok_and(|again: Location| again == location),
            "{location:?} is not read as it was written"
        );
    }
}

/// The properties of a message with its headers, as they come from the broker.
pub fn headers(data: &[u8]) {
    fuzz_headers(data);
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use base64::prelude::{BASE64_STANDARD, Engine as _};
    use fastrand::Rng;

    use super::*;

    /// How often each target is given changed bytes; the slowest takes about three seconds for that.
    const CHANGES: u32 = 5_000;
    /// As of `make fuzz`.
    const BYTES_MAX: usize = 64 << 10;

    /// What is kept for a target.
    fn kept_for(name: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let kept: Vec<_> = paths.into_iter().map(|path| fs::read(path).unwrap()).collect();
        assert!(!kept.is_empty(), "nothing is kept for {name}");
        kept
    }

    /// Something of what is kept, with some parts of it removed, doubled, exchanged or written over.
    fn changed_by_chance(rng: &mut Rng, kept: &[Vec<u8>]) -> Vec<u8> {
        let mut data = rng.choice(kept).unwrap().clone();
        for _ in 0..rng.usize(1..5) {
            let start = rng.usize(..=data.len());
            let bytes_max = 1 << rng.u32(..8);
            let end = data.len().min(start + rng.usize(1..=bytes_max));
            let part = match rng.u8(..7) {
                0 => Vec::new(),
                1 => data[start..end].repeat(2),
                2 => (start..end).map(|_| rng.u8(..)).collect(),
                3 => vec![*rng.choice(br#"{}[]":,\%=/@-+.eE09"#).unwrap()],
                4 => {
                    rng.choice(["-1", "1e999", "18446744073709551616", "null", "\"\"", "\0"]).unwrap().into()
                }
                5 => data[start..end].iter().map(|byte| byte ^ (1 << rng.u8(..8))).collect(),
                _ => {
                    let other = rng.choice(kept).unwrap();
                    let from = rng.usize(..=other.len());
                    other[from..other.len().min(from + end - start)].to_vec()
                }
            };
            data.splice(start..end, part);
        }
        data.truncate(BYTES_MAX);
        data
    }

    #[test]
    fn all_that_is_kept_for_fuzzing_is_read_without_a_panic() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let mut known: Vec<String> = fs::read_dir(folder.join("corpus"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        known.sort();
        assert_eq!(
            known,
            TARGETS.map(|(name, _)| name),
            "a folder of the corpus has no target, or the other way"
        );
        for (name, target) in TARGETS {
            kept_for(name).iter().for_each(|data| target(data));
        }
    }

    /// A little of what `make fuzz` does, though nothing guides it, each time that the tests run.
    #[test]
    fn what_is_kept_for_fuzzing_is_read_without_a_panic_when_it_is_changed_by_chance() {
        for (name, target) in TARGETS {
            // The same ones each time, so that whoever changes something else does not have to look into what chance has found.
            let (kept, mut rng) = (kept_for(name), Rng::with_seed(1));
            for _ in 0..CHANGES {
                let data = changed_by_chance(&mut rng, &kept);
                if catch_unwind(|| target(&data)).is_err() {
                    let data = BASE64_STANDARD.encode(&data);
                    panic!("{name} panics as told above; for fuzz/corpus/{name}, in base64: {data}");
                }
            }
        }
    }

    #[test]
    fn what_is_kept_for_fuzzing_is_not_all_refused_at_its_beginning() {
        let read = |path: &str| {
            fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(path)).unwrap()
        };

        assert!(message::parse_command(&read("command/backup-full.json")).is_ok());
        assert!(message::parse_event(&read("event/event-succeeded.json")).is_ok());
        assert!(Request::parse(&read("oslo/create_backup.json")).is_ok());
        assert!(Reply::parse(&read("oslo/reply_failure.json")).is_ok());
        assert!(serde_json::from_slice::<Record>(&read("record/record.json")).is_ok());
        assert!(serde_json::from_slice::<KeptOutcome>(&read("record/outcome.json")).is_ok());
        assert!(export_record::import(&read("export_record/files.json"), &Form::Files).is_ok());
        assert!(Config::load_from(Some(Path::new("fuzz/corpus/config/example.toml")), &[]).is_ok());
        let listed = read("metadata/none");
        let (prefix, text) = listed.split_at(listed.iter().position(|byte| *byte == b'\n').unwrap());
        assert!(
            metadata::read(text, std::str::from_utf8(prefix).unwrap(), |_| Ok::<_, Infallible>(())).is_ok()
        );
        let digests = read("sha256_file/none");
        assert!(sha256_file::read(digests.as_slice(), |_, _| Ok::<_, Infallible>(())).is_ok());
    }
}
