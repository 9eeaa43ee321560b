//! What people get to read: texts made from values. Nothing here does I/O but the progress bar.
//!
//! `--json` prints values as they are and needs nothing of this. Texts may hold what strangers wrote, so control
//! characters are taken out before they reach a terminal.

use std::error::Error;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use jiff::Timestamp;

use super::dead::Letter;
use super::gc::Swept;
use crate::error::Problem;
use crate::job::{
    Completion, Counts, Event, Happening, Operation, Outcome, Reading, Record, RecordState, Verified,
};

/// Stands where something is not known.
const UNKNOWN: &str = "-";

/// A table of backups in the order given, one a line, below a header.
pub fn table(records: &[Record]) -> String {
    let mut rows = vec![
        ["BACKUP", "VOLUME", "STATE", "KIND", "PARENT", "SIZE", "STORED", "CREATED (UTC)"].map(String::from),
    ];
    for record in records {
        rows.push([
            record.backup_id.to_string(),
            record.volume_id.to_string(),
            state(&record.state).into(),
            kind(record).into(),
            record.parent_id.map_or("-".into(), |id| id.to_string()),
            bytes(record.volume_bytes),
            if is_counted(record) { bytes(record.counts.bytes_stored) } else { UNKNOWN.into() },
            time(record.created_at),
        ]);
    }
    let [b, v, s, k, p, size, stored, _] = widths(&rows);
    let lines = rows.iter().map(|[c0, c1, c2, c3, c4, c5, c6, c7]| {
        format!("{c0:b$}  {c1:v$}  {c2:s$}  {c3:k$}  {c4:p$}  {c5:>size$}  {c6:>stored$}  {c7}\n")
    });
    lines.collect()
}

/// Messages that were given up, one a line.
pub fn letters(letters: &[Letter]) -> String {
    let mut rows = vec![["LETTER", "TIME (UTC)", "JOB", "OPERATION", "BACKUP", "REASON"].map(String::from)];
    for letter in letters {
        rows.push([
            letter.letter.clone(),
            letter.time.map_or(UNKNOWN.into(), time),
            letter.job_id.map_or(UNKNOWN.into(), |id| id.to_string()),
            letter.operation.map_or(UNKNOWN.into(), |operation| operation.to_string()),
            letter.backup_id.map_or(UNKNOWN.into(), |id| id.to_string()),
            plain(&letter.reason),
        ]);
    }
    let [l, t, j, o, b, _] = widths(&rows);
    let lines = rows
        .iter()
        .map(|[c0, c1, c2, c3, c4, c5]| format!("{c0:l$}  {c1:t$}  {c2:j$}  {c3:o$}  {c4:b$}  {c5}\n"));
    lines.collect()
}

/// How wide the columns of a table are.
fn widths<const N: usize>(rows: &[[String; N]]) -> [usize; N] {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    widths
}

/// What nobody needs in a store, one thing a line, and what became of it.
pub fn garbage(found: &[Swept]) -> String {
    let mut rows = vec![["KIND", "WRITTEN (UTC)", "SIZE", "OBJECTS", "WHAT", "WHY"].map(String::from)];
    for Swept { garbage, removed, error } in found {
        let became = match (removed, error) {
            (Some(true), _) => "removed: ".to_owned(),
            (_, Some(error)) => format!("NOT REMOVED ({error}): "),
            (Some(false), None) => "kept, because it has changed meanwhile: ".to_owned(),
            (None, None) => String::new(),
        };
        let job = garbage.job_id.map_or(String::new(), |id| format!(", job {id}"));
        rows.push([
            garbage.kind.to_string(),
            garbage.modified.map_or(UNKNOWN.into(), time),
            bytes(garbage.bytes),
            garbage.object_count.to_string(),
            plain(&garbage.name),
            plain(&format!("{became}{}{job}", garbage.reason)),
        ]);
    }
    let [k, w, s, o, n, _] = widths(&rows);
    let lines = rows
        .iter()
        .map(|[c0, c1, c2, c3, c4, c5]| format!("{c0:k$}  {c1:w$}  {c2:>s$}  {c3:>o$}  {c4:n$}  {c5}\n"));
    lines.collect()
}

/// How much that is, in a sentence.
pub fn garbage_total(found: &[Swept]) -> String {
    let things = match found.len() {
        1 => "1 thing".to_owned(),
        count => format!("{count} things"),
    };
    format!("{things}, {}", bytes(found.iter().map(|swept| swept.garbage.bytes).sum()))
}

/// All that is known of a message that was given up.
pub fn letter(letter: &Letter) -> String {
    let mut text = String::new();
    let mut line = |what: &str, value: &str| text += &format!("{what:<17} {}\n", plain(value));
    line("letter", &letter.letter);
    let mut known = |what, value: Option<String>| line(what, value.as_deref().unwrap_or(UNKNOWN));
    known("given up", letter.time.map(|at| format!("{} UTC", time(at))));
    known("job", letter.job_id.map(|id| id.to_string()));
    known("operation", letter.operation.map(|operation| operation.to_string()));
    known("backup", letter.backup_id.map(|id| id.to_string()));
    known("message id", letter.message_id.clone());
    for attempt in &letter.earlier_attempts {
        let what = format!("attempt {}", attempt.attempt);
        line(&what, &format!("{} UTC: {}", time(attempt.time), attempt.error));
    }
    line("reason", &letter.reason);
    line("message", &letter.body);
    text
}

/// All that is known of a backup, one thing a line.
pub fn show(record: &Record, verified: Option<&Verified>) -> String {
    let mut text = String::new();
    let mut line = |what: &str, value: &str| text += &format!("{what:<17} {}\n", plain(value));
    line("backup", &record.backup_id.to_string());
    line("volume", &record.volume_id.to_string());
    match &record.state {
        RecordState::Creating(job) => line("state", &format!("creating, by job {job}")),
        RecordState::Available => line("state", "available"),
        RecordState::Error(problem) => line("state", &format!("error: {problem}")),
        RecordState::Deleting(job) => line("state", &format!("deleting, by job {job}")),
    }
    line("kind", kind(record));
    if let Some(parent) = record.parent_id {
        line("parent", &parent.to_string());
    }
    let texts =
        [("name", &record.name), ("description", &record.description), ("project", &record.project_id)];
    for (what, value) in texts {
        if let Some(value) = value {
            line(what, value);
        }
    }
    line("created", &format!("{} UTC", time(record.created_at)));
    line("size", &format!("{} ({} bytes)", bytes(record.volume_bytes), record.volume_bytes));
    match &record.method {
        Some(method) => {
            let job = record.job_id.map_or(String::new(), |id| format!(", job {id}"));
            line("made by", &format!("{method}{job}"));
        }
        None => line("made by", "not known: taken in by its export record"),
    }
    if let Some(reason) = &record.fallback_reason {
        line("fell back", &reason.to_string());
    }
    let verified = match verified {
        None => "never".to_owned(),
        Some(Verified { at, sample_percent: None }) => format!("{} UTC", time(*at)),
        Some(Verified { at, sample_percent: Some(sample) }) => {
            format!("{} UTC, a sample of {sample}", time(*at))
        }
    };
    line("verified", &verified);
    let Counts { bytes_read, bytes_zero, bytes_hole, bytes_unchanged, bytes_reused, .. } = record.counts;
    let Counts { bytes_stored, object_count, .. } = record.counts;
    if is_counted(record) {
        // What was neither read nor a hole was known to be as in the parent.
        let unread = record.volume_bytes.saturating_sub(bytes_read + bytes_hole);
        let (read, zero) = (bytes(bytes_read), bytes(bytes_zero));
        let (holes, same) = (format!("{} holes", bytes(bytes_hole)), bytes_unchanged.saturating_sub(unread));
        if record.parent_id.is_some() {
            line("read", &format!("{read}, of that {zero} zeros, {} as in the parent", bytes(same)));
            line("skipped", &holes);
            line("skipped", &format!("{} as in the parent", bytes(unread)));
        } else {
            line("read", &format!("{read}, of that {zero} zeros"));
            line("skipped", &holes);
        }
        line("stored", &format!("{}{}", bytes(bytes_stored), in_objects(object_count)));
        if bytes_reused > 0 {
            line(
                "took over",
                &format!("{} of the volume, which an earlier attempt had stored", bytes(bytes_reused)),
            );
        }
    } else {
        ["read", "skipped", "stored"].into_iter().for_each(|what| line(what, UNKNOWN));
    }
    line("container", record.container.as_str());
    // Cinder's form for a backup in an RBD image.
    let metadata = serde_json::from_str::<serde_json::Value>(&record.service_metadata);
    match metadata.as_ref().ok().and_then(|metadata| metadata["base"].as_str()) {
        Some(image) => line("image", image),
        None => line("object prefix", &record.service_metadata),
    }
    line("driver", &record.service);
    if let Some(digest) = &record.digest {
        line("digest", digest);
    }
    text
}

/// One line on something that happened to a job.
pub fn event(event: &Event) -> String {
    let what = match &event.happening {
        Happening::Accepted => "accepted".into(),
        Happening::Started { method, attempt } => format!("started: {method}, attempt {attempt}"),
        Happening::Progress(reading) => progress(event.operation, reading),
        Happening::FellBack { from, to, reason } => format!("fell back from {from} to {to}: {reason}"),
        Happening::Ended(end) => completion(end),
    };
    let Event { operation, backup_id, job_id, .. } = event;
    plain(&format!("{} {operation} {backup_id} job {job_id}: {what}", time(event.time)))
}

/// One line on a message that could not be a job.
pub fn rejected(at: Timestamp, reason: &str, message: &str) -> String {
    plain(&format!("{} message rejected: {reason}: {message}", time(at)))
}

/// One line on how a job ended.
pub fn completion(completion: &Completion) -> String {
    let account = &completion.account;
    let seconds = account.seconds;
    let attempts = match account.attempt_count {
        1 => "1 attempt".into(),
        count => format!("{count} attempts"),
    };
    let text = match &completion.outcome {
        Outcome::Succeeded => {
            let by = account.method.map_or(String::new(), |method| format!(" by {method}"));
            let moved =
                moved(completion.operation, &account.counts, account.volume_bytes.unwrap_or_default());
            format!("succeeded in {seconds:.1} s{by}: {moved}")
        }
        Outcome::Failed(problem) => format!("failed after {seconds:.1} s and {attempts}: {problem}"),
        Outcome::Cancelled => format!("cancelled after {seconds:.1} s"),
    };
    plain(&text)
}

/// An error with each of its causes on a line of its own.
pub fn error(error: &(dyn Error + 'static)) -> String {
    let mut text = plain(&error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!("\n  because: {}", plain(&error.to_string()));
        cause = error.source();
    }
    text
}

/// A problem with each of its causes on a line of its own.
pub fn problem(problem: &Problem) -> String {
    let causes = problem.causes.iter().map(|cause| format!("\n  because: {}", plain(cause)));
    plain(&problem.message) + &causes.collect::<String>()
}

/// Shows how far a job is, on standard error; shows nothing if that is no terminal.
pub struct Bar {
    bar: ProgressBar,
}

const BAR: &str = "{prefix} {bar:24} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  \
                   {binary_bytes_per_sec}  ETA {eta}  {msg}";

impl Bar {
    /// Begins to show a job.
    pub fn new(operation: Operation) -> Self {
        let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { bar: ProgressBar::no_length().with_style(style).with_prefix(operation.as_str()) }
    }

    /// Shows how far the job is now.
    pub fn show(&self, operation: Operation, reading: &Reading) {
        if reading.bytes_total > 0 {
            self.bar.set_length(reading.bytes_total);
        }
        self.bar.set_position(reading.bytes_done);
        let skipped = skipped(operation, &reading.counts, reading.bytes_done);
        self.bar.set_message(format!("skipped {}", bytes(skipped)));
    }

    /// Says something that stays, above the bar.
    pub fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{}", plain(text)));
    }

    /// Takes the bar off the terminal.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn progress(operation: Operation, reading: &Reading) -> String {
    let Reading { bytes_total, bytes_done, counts } = reading;
    let moved = moved(operation, counts, *bytes_done);
    if *bytes_total == 0 {
        return format!("{} done: {moved}", bytes(*bytes_done));
    }
    let percent = 100.0 * *bytes_done as f64 / *bytes_total as f64;
    format!("{percent:.0} % of {} done: {moved}", bytes(*bytes_total))
}

/// What was moved for `bytes_done` of a volume.
fn moved(operation: Operation, counts: &Counts, bytes_done: u64) -> String {
    let Counts { bytes_read, bytes_reused, bytes_stored, bytes_written, object_count, .. } = *counts;
    let reused = match bytes_reused {
        0 => String::new(),
        reused => format!(", took over {}", bytes(reused)),
    };
    let skipped = bytes(skipped(operation, counts, bytes_done));
    let (read, stored) = (bytes(bytes_read), bytes(bytes_stored));
    let objects = in_objects(object_count);
    match operation {
        Operation::Backup => format!("read {read}, skipped {skipped}, stored {stored}{objects}{reused}"),
        Operation::Restore => {
            format!("read {stored}{objects}, skipped {skipped}, wrote {}{reused}", bytes(bytes_written))
        }
        Operation::Verify => format!("checked {read}, stored as {stored}{objects}"),
        // Of an image nobody knows how much of it no other backup needs.
        Operation::Delete if object_count == 0 => "removed".into(),
        Operation::Delete => format!("freed {stored}{objects}"),
    }
}

/// What of `bytes_done` was not touched: not read by a backup or a verification, not written by a restore.
fn skipped(operation: Operation, counts: &Counts, bytes_done: u64) -> u64 {
    bytes_done.saturating_sub(match operation {
        Operation::Restore => counts.bytes_written,
        _ => counts.bytes_read,
    })
}

fn state(state: &RecordState) -> &'static str {
    match state {
        RecordState::Creating(_) => "creating",
        RecordState::Available => "available",
        RecordState::Error(_) => "error",
        RecordState::Deleting(_) => "deleting",
    }
}

fn kind(record: &Record) -> &'static str {
    if record.parent_id.is_some() { "incremental" } else { "full" }
}

/// Whether it is known what was moved to make the backup; nobody told us of one that was taken in from Cinder.
fn is_counted(record: &Record) -> bool {
    record.method.is_some()
}

/// Says nothing of an image, which has objects of Ceph's only.
fn in_objects(count: u64) -> String {
    match count {
        0 => String::new(),
        1 => " in 1 object".into(),
        count => format!(" in {count} objects"),
    }
}

fn bytes(count: u64) -> String {
    HumanBytes(count).to_string()
}

fn time(timestamp: Timestamp) -> String {
    timestamp.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;
    use crate::job::{Account, Method, Mode, Strategy};

    const BACKUP: &str = "8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b";
    const VOLUME: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";
    const JOB: &str = "51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3";
    const FULL: Method = Method { strategy: Strategy::Chunked, mode: Some(Mode::Full) };

    fn record() -> Record {
        Record {
            backup_id: BACKUP.parse().unwrap(),
            volume_id: VOLUME.parse().unwrap(),
            state: RecordState::Available,
            parent_id: None,
            writer: String::new(),
            displaced_writer: None,
            revival_count: 0,
            checkpoint: None,
            job_id: Some(JOB.parse().unwrap()),
            service: "cinder.backup.drivers.posix.PosixBackupDriver".into(),
            service_metadata: "volume_3f2b_20260102140322_backup_8c1d".into(),
            container: "8c/1d/8c1d".parse().unwrap(),
            name: Some("monday \u{1b}[31m".into()),
            description: None,
            project_id: None,
            created_at: "2026-01-02T14:03:22.5Z".parse().unwrap(),
            volume_bytes: 1 << 30,
            method: Some(FULL),
            counts: counts(),
            digest: None,
            object_digests: Vec::new(),
            source: None,
            image_id: None,
            fallback_reason: None,
            cinder_fields: serde_json::Map::new(),
        }
    }

    fn counts() -> Counts {
        Counts {
            bytes_read: 768 << 20,
            bytes_zero: 1 << 20,
            bytes_hole: 256 << 20,
            bytes_stored: 300 << 20,
            object_count: 21,
            ..Counts::default()
        }
    }

    fn ended(operation: Operation, outcome: Outcome) -> Completion {
        let account = Account {
            method: Some(FULL),
            attempt_count: 2,
            volume_bytes: Some(1 << 30),
            counts: counts(),
            seconds: 12.34,
            ..Account::default()
        };
        Completion {
            target: None,
            job_id: JOB.parse().unwrap(),
            operation,
            backup_id: BACKUP.parse().unwrap(),
            volume_id: None,
            store: None,
            outcome,
            account,
        }
    }

    fn a_problem() -> Problem {
        Problem {
            class: Class::Permanent,
            message: "open the source".into(),
            causes: vec!["no\nsuch file".into(), "gone".into()],
        }
    }

    #[test]
    fn a_table_has_a_line_a_backup_in_columns() {
        let mut incremental = record();
        incremental.parent_id = Some(BACKUP.parse().unwrap());
        incremental.state = RecordState::Creating(JOB.parse().unwrap());
        incremental.volume_bytes = 1;

        let blank = " ".repeat(30);
        let expected = format!(
            "BACKUP{blank}  VOLUME{blank}  STATE      KIND         PARENT{blank}      SIZE      STORED  CREATED (UTC)\n\
             {BACKUP}  {VOLUME}  available  full         -{blank}       1.00 GiB  300.00 MiB  2026-01-02 14:03:22\n\
             {BACKUP}  {VOLUME}  creating   incremental  {BACKUP}       1 B  300.00 MiB  2026-01-02 14:03:22\n",
        );
        assert_eq!(table(&[record(), incremental]), expected);
    }

    #[test]
    fn a_record_is_shown_line_by_line_without_control_characters() {
        let text = show(&record(), None);
        for line in [
            "state             available",
            "kind              full",
            "name              monday  [31m",
            "created           2026-01-02 14:03:22 UTC",
            "size              1.00 GiB (1073741824 bytes)",
            "made by           chunked full, job 51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3",
            "read              768.00 MiB, of that 1.00 MiB zeros",
            "skipped           256.00 MiB holes",
            "stored            300.00 MiB in 21 objects",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in:\n{text}");
        }
        assert!(!text.contains('\u{1b}'));
        let image = Record { service_metadata: r#"{"base": "volume-1.backup.2"}"#.into(), ..record() };
        let text = show(&image, None);
        assert!(text.lines().any(|l| l == "image             volume-1.backup.2"), "{text}");
    }

    #[test]
    fn what_is_shown_of_an_incremental_backup_adds_up_to_its_size() {
        let counts = Counts {
            bytes_read: 700 << 20,
            bytes_zero: 20 << 20,
            bytes_hole: 300 << 20,
            // 24 MiB were not read, the rest was.
            bytes_unchanged: 600 << 20,
            ..counts()
        };
        let text = show(&Record { counts, parent_id: Some(BACKUP.parse().unwrap()), ..record() }, None);
        for line in [
            "read              700.00 MiB, of that 20.00 MiB zeros, 576.00 MiB as in the parent",
            "skipped           300.00 MiB holes",
            "skipped           24.00 MiB as in the parent",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in:\n{text}");
        }
        assert!(
            moved(Operation::Backup, &counts, 1 << 30).starts_with("read 700.00 MiB, skipped 324.00 MiB, ")
        );
    }

    #[test]
    fn what_is_not_known_of_a_backup_that_was_taken_in_is_not_shown_as_zero() {
        let taken_in = Record { method: None, job_id: None, counts: Counts::default(), ..record() };
        let text = show(&taken_in, None);
        for line in [
            "made by           not known: taken in by its export record",
            "read              -",
            "stored            -",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} is not in:\n{text}");
        }
        assert!(!text.contains("0 B"), "{text}");
        let row = table(&[taken_in]).lines().nth(1).unwrap().to_string();
        assert!(row.ends_with("  1.00 GiB       -  2026-01-02 14:03:22"), "{row}");
    }

    #[test]
    fn the_end_of_a_job_is_one_line() {
        let succeeded = |operation| completion(&ended(operation, Outcome::Succeeded));
        assert_eq!(
            succeeded(Operation::Backup),
            "succeeded in 12.3 s by chunked full: read 768.00 MiB, skipped 256.00 MiB, stored 300.00 MiB in 21 objects"
        );
        assert!(
            succeeded(Operation::Restore)
                .ends_with("read 300.00 MiB in 21 objects, skipped 1.00 GiB, wrote 0 B")
        );
        assert!(
            succeeded(Operation::Verify).ends_with("checked 768.00 MiB, stored as 300.00 MiB in 21 objects")
        );
        assert!(succeeded(Operation::Delete).ends_with("freed 300.00 MiB in 21 objects"));
        assert_eq!(
            completion(&ended(Operation::Backup, Outcome::Failed(a_problem()))),
            "failed after 12.3 s and 2 attempts: open the source: no such file: gone"
        );
        assert_eq!(completion(&ended(Operation::Backup, Outcome::Cancelled)), "cancelled after 12.3 s");
    }

    #[test]
    fn what_was_taken_over_from_an_earlier_attempt_is_said() {
        let counts = Counts { bytes_reused: 512 << 20, ..counts() };
        let text = show(&Record { counts, ..record() }, None);
        let line = "took over         512.00 MiB of the volume, which an earlier attempt had stored";
        assert!(text.lines().any(|l| l == line), "{text}");
        assert!(
            moved(Operation::Backup, &counts, 1 << 30)
                .ends_with("300.00 MiB in 21 objects, took over 512.00 MiB")
        );
    }

    #[test]
    fn what_is_kept_as_an_image_is_not_said_to_be_in_0_objects() {
        let counts = Counts { object_count: 0, bytes_written: 1 << 20, ..counts() };
        let texts = [
            (Operation::Backup, "read 768.00 MiB, skipped 256.00 MiB, stored 300.00 MiB"),
            (Operation::Restore, "read 300.00 MiB, skipped 1023.00 MiB, wrote 1.00 MiB"),
            (Operation::Verify, "checked 768.00 MiB, stored as 300.00 MiB"),
            (Operation::Delete, "removed"),
        ];
        for (operation, text) in texts {
            assert_eq!(moved(operation, &counts, 1 << 30), text);
        }
        let shown = show(&Record { counts, ..record() }, None);
        assert!(shown.lines().any(|line| line == "stored            300.00 MiB"), "{shown}");
    }

    #[test]
    fn an_event_is_one_line_with_its_ids() {
        let reading = Reading { bytes_total: 2 << 30, bytes_done: 1 << 30, counts: counts() };
        let cases = [
            (Happening::Accepted, "accepted"),
            (Happening::Started { method: FULL, attempt: 2 }, "started: chunked full, attempt 2"),
            (
                Happening::Progress(reading),
                "50 % of 2.00 GiB done: read 768.00 MiB, skipped 256.00 MiB, stored 300.00 MiB in 21 objects",
            ),
            (
                Happening::FellBack { from: FULL, to: FULL, reason: a_problem() },
                "fell back from chunked full to chunked full: open the source: no such file: gone",
            ),
            (
                Happening::Ended(Box::new(ended(Operation::Backup, Outcome::Cancelled))),
                "cancelled after 12.3 s",
            ),
        ];
        for (happening, expected) in cases {
            let line = event(&Event {
                job_id: JOB.parse().unwrap(),
                operation: Operation::Backup,
                backup_id: BACKUP.parse().unwrap(),
                volume_id: None,
                store: None,
                time: "2026-01-02T14:03:22Z".parse().unwrap(),
                sequence: 1,
                happening,
            });
            assert_eq!(line, format!("2026-01-02 14:03:22 backup {BACKUP} job {JOB}: {expected}"));
        }
    }

    #[test]
    fn causes_stand_below_their_error() {
        let expected = "open the source\n  because: no such file\n  because: gone";
        assert_eq!(problem(&a_problem()), expected);

        let io = std::io::Error::other(std::fmt::Error);
        let nested = crate::cli::args::MetadataFileError::Read { path: "/m".into(), source: io };
        let text = error(&nested);
        assert!(text.starts_with("read the metadata file /m\n  because: "), "{text}");
    }

    #[test]
    fn the_bar_can_be_drawn() {
        assert!(ProgressStyle::with_template(BAR).is_ok());
    }
}
