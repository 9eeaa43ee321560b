//! What people may write on the command line. What is parsed here is valid: ids, names and locations have their types.
//!
//! Doing what was asked for is left to the commands.

use std::io;
use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use jiff::{SignedDuration, Timestamp};
use tracing_subscriber::EnvFilter;

use crate::job::{
    BackupId, BackupWork, Container, Job, JobId, Location, Parent, RestoreWork, Sample, StoreName,
    VerifyWork, VolumeId, Work,
};

/// Above the options that every command has.
const GENERAL: &str = "General options";
/// Above the options that every job has.
const JOB: &str = "Job options";

/// Backs up block volumes and restores them, in OpenStack Cinder's formats, driven by an AMQP broker.
#[derive(Debug, Parser)]
#[command(
    name = "backhaul",
    version,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    after_help = "\
Examples:
  backhaul check
  backhaul worker --config /etc/backhaul/backhaul.toml
  backhaul submit backup --volume-id 3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88 \\
      --source file:/var/lib/volumes/a.img --wait
  backhaul list

Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 cancelled."
)]
pub struct Args {
    /// Read the configuration from FILE [default: $BACKHAUL_CONFIG, ./backhaul.toml, /etc/backhaul/backhaul.toml].
    #[arg(long, global = true, value_name = "FILE", help_heading = GENERAL)]
    pub config: Option<PathBuf>,

    /// Log what FILTER lets through, such as debug or backhaul=debug,lapin=warn [default: info of a worker, else warn].
    #[arg(long, global = true, value_name = "FILTER", env = "BACKHAUL_LOG", hide_env_values = true)]
    #[arg(value_parser = log_filter, help_heading = GENERAL)]
    log: Option<String>,

    /// Write the log, on standard error, as text or as json.
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    #[arg(hide_possible_values = true, help_heading = GENERAL)]
    pub log_format: LogFormat,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take jobs from the broker and do them, until told to stop.
    #[command(after_help = "\
SIGTERM or SIGINT lets running jobs come to an end first; a second one gives them back to the broker.

Examples:
  backhaul worker
  backhaul worker --config /etc/backhaul/backhaul.toml --log-format json")]
    Worker,

    /// Work in the place of OpenStack's cinder-backup, with its cinder.conf, until told to stop.
    #[cfg(feature = "ceph")]
    #[command(after_help = "\
It needs no configuration of Backhaul's own. SIGTERM or SIGINT lets what runs come to an end first; what takes longer than a
minute, or is cut short by a second signal, the next start goes on with.

Examples:
  backhaul cinder
  backhaul cinder --config-file /etc/cinder/cinder.conf --config-dir /etc/cinder/cinder.conf.d")]
    Cinder {
        /// Read these files, a later one over those before it [default: those that Cinder reads].
        #[arg(long, value_name = "FILE")]
        config_file: Vec<PathBuf>,
        /// Read all *.conf in these folders, in the order of their names, over the files.
        #[arg(long, value_name = "DIR")]
        config_dir: Vec<PathBuf>,
    },

    /// Send a job to the workers, through the broker.
    #[command(after_help = "\
The id of the job is printed; with --wait, how it ended.

Examples:
  backhaul submit backup --volume-id 3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88 \\
      --source file:/var/lib/volumes/a.img
  backhaul submit restore --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b \\
      --target file:/var/lib/volumes/b.img --wait")]
    Submit(SubmitArgs),

    /// Do a job in this process, without a broker.
    #[command(after_help = "\
Examples:
  backhaul run backup --volume-id 3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88 \\
      --source file:/var/lib/volumes/a.img
  backhaul run verify --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b")]
    Run(JobArgs),

    /// Ask for the end of a job, whether it runs, waits, or is to be tried again later.
    #[command(after_help = "\
Examples:
  backhaul cancel 51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3")]
    Cancel {
        /// The job, as submit printed it.
        job_id: JobId,
    },

    /// Look at the jobs that failed and the messages that could be no jobs, bring them back or drop them.
    #[command(
        subcommand,
        after_help = "\
Examples:
  backhaul dead list
  backhaul dead retry 51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3"
    )]
    Dead(DeadCommand),

    /// List the backups in a store.
    #[command(after_help = "\
Examples:
  backhaul list
  backhaul list --volume-id 3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88 --json")]
    List {
        /// Look in this store [default: the default store].
        #[arg(long, value_name = "NAME")]
        store: Option<StoreName>,
        /// List backups of this volume only.
        #[arg(long, value_name = "ID")]
        volume_id: Option<VolumeId>,
        /// Print the records as a JSON array.
        #[arg(long)]
        json: bool,
    },

    /// Show all that is known of a backup.
    #[command(after_help = "\
Examples:
  backhaul show 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b
  backhaul show 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b --store archive --json")]
    Show {
        /// The backup.
        backup_id: BackupId,
        /// Look in this store [default: the default store].
        #[arg(long, value_name = "NAME")]
        store: Option<StoreName>,
        /// Print the record as JSON.
        #[arg(long)]
        json: bool,
    },

    /// Exchange backup records with Cinder.
    #[command(
        subcommand,
        after_help = "\
Examples:
  backhaul record export 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b
  backhaul record import record.json"
    )]
    Record(RecordCommand),

    /// Find what jobs that died have left in a store, and remove it.
    #[command(after_help = "\
Nothing is removed without --yes. Workers are asked which jobs they run, and what is of these stays, as does what is of a
job that came back less than 7 days ago and has not ended.

Examples:
  backhaul gc
  backhaul gc --store archive --yes
  backhaul gc --older-than 1h --json")]
    Gc {
        /// Look in this store [default: the default store].
        #[arg(long, value_name = "NAME")]
        store: Option<StoreName>,
        /// Remove what is found.
        #[arg(long)]
        yes: bool,
        /// Find what was last written longer ago than this.
        #[arg(long, value_name = "TIME", value_parser = age, default_value = "24h")]
        older_than: SignedDuration,
        /// Print what is found as a JSON array.
        #[arg(long)]
        json: bool,
    },

    /// Show live what happens to every job, until interrupted.
    #[command(after_help = "\
Examples:
  backhaul watch")]
    Watch,

    /// Check the configuration, and that all it names is reachable and usable.
    #[command(after_help = "\
Examples:
  backhaul check
  backhaul check --config ./backhaul.toml")]
    Check,
}

/// What to do with a record.
#[derive(Debug, Subcommand)]
pub enum RecordCommand {
    /// Print a backup's record as Cinder's export record: `cinder backup-import` takes it.
    #[command(after_help = "\
Examples:
  backhaul record export 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b")]
    Export {
        /// The backup.
        backup_id: BackupId,
        /// Look in this store [default: the default store].
        #[arg(long, value_name = "NAME")]
        store: Option<StoreName>,
    },
    /// Take in a backup that lies in the store already, by an export record of Cinder's.
    #[command(after_help = "\
Examples:
  backhaul record import record.json
  backhaul record import - --store archive")]
    Import {
        /// A file with {"backup_service": …, "backup_url": …}, or - for standard input.
        record: PathBuf,
        /// The store that holds the data [default: the default store].
        #[arg(long, value_name = "NAME")]
        store: Option<StoreName>,
    },
}

/// A job for the workers.
#[derive(Debug, clap::Args)]
pub struct SubmitArgs {
    /// The job.
    #[command(flatten)]
    pub job: JobArgs,

    /// Wait for the end of the job, showing its progress, and exit by how it ended.
    #[arg(long, global = true, help_heading = JOB)]
    pub wait: bool,

    /// Overtake waiting jobs of a lower priority, 0 to 9; of quorum queues only from RabbitMQ 4.0 on [default: 0].
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=9))]
    #[arg(help_heading = JOB)]
    pub priority: Option<u8>,
}

/// A job.
#[derive(Debug, clap::Args)]
pub struct JobArgs {
    #[command(subcommand)]
    work: WorkArgs,

    /// Work on this store [default: the default store].
    #[arg(long, global = true, value_name = "NAME", help_heading = JOB)]
    store: Option<StoreName>,

    /// Give the job this id; the same id again is the same job, not another one [default: a new id].
    #[arg(long, global = true, value_name = "ID", help_heading = JOB)]
    job_id: Option<JobId>,

    /// Let the job end as failed if it is not done by TIME, as 2026-11-22T06:00:00Z, or 12h or 90m from now [default: never].
    #[arg(long, global = true, value_name = "TIME", value_parser = deadline, help_heading = JOB)]
    deadline: Option<Timestamp>,

    /// Print the completion event as JSON, and nothing else, on standard output; of submit without --wait, the command.
    #[arg(long, global = true, help_heading = JOB)]
    pub json: bool,
}

#[derive(Debug, Clone, Subcommand)]
enum WorkArgs {
    /// Copy a volume into the store.
    #[command(after_help = "\
Examples:
  backhaul submit backup --volume-id 3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88 \\
      --source file:/var/lib/volumes/a.img
  backhaul run backup --volume-id 3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88 \\
      --source rbd:volumes/a@monday --incremental")]
    Backup(BackupArgs),

    /// Copy a backup onto a volume.
    #[command(after_help = "\
Examples:
  backhaul submit restore --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b \\
      --target file:/var/lib/volumes/b.img
  backhaul run restore --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b \\
      --target rbd:volumes/b")]
    Restore {
        /// Restore this backup.
        #[arg(long, value_name = "ID")]
        backup_id: BackupId,
        /// Write to this place: file:/path or rbd:[cluster/]pool/image.
        #[arg(long, value_name = "PLACE", value_parser = target)]
        target: Location,
        /// The volume that the target belongs to.
        #[arg(long, value_name = "ID")]
        volume_id: Option<VolumeId>,
    },

    /// Remove a backup from the store; one that others build on is kept.
    #[command(after_help = "\
Examples:
  backhaul submit delete --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b --wait
  backhaul run delete --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b")]
    Delete {
        /// Remove this backup.
        #[arg(long, value_name = "ID")]
        backup_id: BackupId,
    },

    /// Read a whole backup, or a sample of it, and compare it with its digests.
    #[command(after_help = "\
Examples:
  backhaul submit verify --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b --wait --json
  backhaul run verify --backup-id 8c1d7e5a-2f4b-4b7e-9a36-5d0c1e2f3a4b --sample 5%")]
    Verify {
        /// Check this backup.
        #[arg(long, value_name = "ID")]
        backup_id: BackupId,

        /// Read so much of the data, another part each time, such as 5% [default: all of it].
        #[arg(long, value_name = "PERCENT")]
        sample: Option<Sample>,
    },
}

/// What to do with the messages that were given up.
#[derive(Debug, Subcommand)]
pub enum DeadCommand {
    /// List them, the oldest first.
    #[command(after_help = "\
Examples:
  backhaul dead list
  backhaul dead list --json")]
    List {
        /// Print them as a JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Show one: why it was given up, the attempts before the last one, and the message itself.
    #[command(after_help = "\
Examples:
  backhaul dead show 51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3")]
    Show {
        /// The letter or the job, as `dead list` prints them.
        #[arg(value_name = "LETTER|JOB")]
        id: String,
    },
    /// Bring them back to where they came from, as if they were new.
    #[command(after_help = "\
Examples:
  backhaul dead retry 51f0c2d4-0b7e-4f0e-8f1c-6a4be1f9d7c3
  backhaul dead retry --all")]
    Retry(LettersArgs),
    /// Remove them for good.
    #[command(after_help = "\
Examples:
  backhaul dead drop 8e1f0c2d40b7
  backhaul dead drop --all")]
    Drop(LettersArgs),
}

/// Which of the messages that were given up.
#[derive(Debug, clap::Args)]
pub struct LettersArgs {
    /// The letters or jobs, as `dead list` prints them.
    #[arg(value_name = "LETTER|JOB", required_unless_present = "all")]
    pub ids: Vec<String>,

    /// All of them.
    #[arg(long, conflicts_with = "ids")]
    pub all: bool,
}

#[derive(Debug, Clone, clap::Args)]
struct BackupArgs {
    /// The volume that the bytes belong to.
    #[arg(long, value_name = "ID")]
    volume_id: VolumeId,

    /// Read from this place: file:/path or rbd:[cluster/]pool/image[@snapshot].
    #[arg(long, value_name = "PLACE")]
    source: Location,

    /// Give the backup this id [default: a new id].
    #[arg(long, value_name = "ID")]
    backup_id: Option<BackupId>,

    /// Store what differs from this backup [default: store everything].
    #[arg(long, value_name = "ID")]
    parent: Option<BackupId>,

    /// Store what differs from the newest backup of the volume.
    #[arg(long, conflicts_with = "parent", action = ArgAction::SetTrue)]
    incremental: bool,

    /// Put the objects there in the store [default: where Cinder would].
    #[arg(long, value_name = "NAME")]
    container: Option<Container>,

    /// A name for people.
    #[arg(long)]
    name: Option<String>,

    /// A description for people.
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,

    /// The project (tenant) that the backup belongs to.
    #[arg(long, value_name = "ID")]
    project_id: Option<String>,

    /// Keep the volume's metadata, JSON as in Cinder, with the backup.
    #[arg(long, value_name = "FILE")]
    metadata_file: Option<PathBuf>,
}

/// Says why a `--metadata-file` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetadataFileError {
    /// It is not there, or not readable as text.
    #[error("read the metadata file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not JSON.
    #[error("the metadata file {} is not JSON", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// What the parser found.
        source: serde_json::Error,
    },
}

impl Args {
    /// What of the log is shown: `--log`, else `BACKHAUL_LOG`, else what fits the command.
    pub fn log_filter(&self) -> &str {
        self.log.as_deref().unwrap_or(match self.command {
            // What lapin has to tell is told by the broker's room; its own lines show messages.
            Command::Worker => "info,lapin=off",
            #[cfg(feature = "ceph")]
            Command::Cinder { .. } => "info,lapin=off",
            // How the job ends is told anyway.
            Command::Run(_) => "error,lapin=off",
            _ => "warn,lapin=off",
        })
    }
}

impl JobArgs {
    /// The job as asked for, with new ids where none are given. Reads the metadata file.
    pub fn job(&self) -> Result<Job, MetadataFileError> {
        let work = match self.work.clone() {
            WorkArgs::Backup(args) => Work::Backup(args.work()?),
            WorkArgs::Restore { backup_id, target, volume_id } => {
                Work::Restore(RestoreWork { backup_id, target, volume_id })
            }
            WorkArgs::Delete { backup_id } => Work::Delete(backup_id),
            WorkArgs::Verify { backup_id, sample } => Work::Verify(VerifyWork { backup_id, sample }),
        };
        let id = self.job_id.unwrap_or_else(JobId::random);
        Ok(Job { id, store: self.store.clone(), deadline: self.deadline, work })
    }
}

impl BackupArgs {
    fn work(self) -> Result<BackupWork, MetadataFileError> {
        let parent = match self.parent {
            Some(id) => Parent::Given(id),
            None if self.incremental => Parent::Latest,
            None => Parent::None,
        };
        Ok(BackupWork {
            backup_id: self.backup_id.unwrap_or_else(BackupId::random),
            volume_id: self.volume_id,
            source: self.source,
            parent,
            container: self.container,
            name: self.name,
            description: self.description,
            project_id: self.project_id,
            volume_meta: self.metadata_file.map(metadata).transpose()?,
        })
    }
}

fn metadata(path: PathBuf) -> Result<String, MetadataFileError> {
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) => return Err(MetadataFileError::Read { path, source }),
    };
    match serde_json::from_str::<serde::de::IgnoredAny>(&text) {
        Ok(_) => Ok(text),
        Err(source) => Err(MetadataFileError::NotJson { path, source }),
    }
}

fn target(text: &str) -> Result<Location, String> {
    match text.parse() {
        Ok(Location::Rbd(image)) if image.snapshot.is_some() => {
            Err("a snapshot cannot be written to: write rbd:[cluster/]pool/image".into())
        }
        Ok(location) => Ok(location),
        Err(error) => Err(error.to_string()),
    }
}

fn age(text: &str) -> Result<SignedDuration, String> {
    match text.parse::<SignedDuration>() {
        Ok(age) if !age.is_negative() => Ok(age),
        _ => Err("write hours, minutes or seconds, such as 12h, 90m or 0s".into()),
    }
}

fn deadline(text: &str) -> Result<Timestamp, String> {
    let wrong = "write a time, such as 2026-11-22T06:00:00Z, or how long from now, such as 12h, 90m or 30s";
    match text.parse() {
        Ok(time) => Ok(time),
        Err(_) => Timestamp::now().checked_add(age(text).map_err(|_| wrong)?).map_err(|_| wrong.into()),
    }
}

fn log_filter(text: &str) -> Result<String, String> {
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.into()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory};
    use rstest::rstest;

    use super::*;

    const ID: &str = "3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88";

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split_whitespace())
    }

    fn job(line: &str) -> Job {
        match parse(line).unwrap().command {
            super::Command::Submit(SubmitArgs { job, .. }) | super::Command::Run(job) => job.job().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_arguments_are_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_and_they_can_be_written() {
        fn visit(command: &Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let help = help.replace("\\\n", "");
            let examples: Vec<&str> = help.lines().filter(|line| line.starts_with("  backhaul ")).collect();
            assert!(!examples.is_empty(), "{} has no example", command.get_name());
            for example in examples {
                parse(example).unwrap_or_else(|error| panic!("{example}: {error}"));
            }
            command.get_subcommands().for_each(visit);
        }
        visit(&Args::command());
    }

    #[test]
    fn a_backup_job_is_what_was_written() {
        let line = format!(
            "backhaul submit --job-id {ID} backup --volume-id {ID} --backup-id {ID} --source rbd:main/p/i@s --parent {ID} \
             --store local --container a/b --name n --description d --project-id p --wait --json --priority 9 \
             --deadline 2026-11-22T06:00:00+01:00"
        );
        let work = BackupWork {
            backup_id: ID.parse().unwrap(),
            volume_id: ID.parse().unwrap(),
            source: "rbd:main/p/i@s".parse().unwrap(),
            parent: Parent::Given(ID.parse().unwrap()),
            container: Some("a/b".parse().unwrap()),
            name: Some("n".into()),
            description: Some("d".into()),
            project_id: Some("p".into()),
            volume_meta: None,
        };
        let expected = Job {
            id: ID.parse().unwrap(),
            store: Some("local".parse().unwrap()),
            deadline: Some("2026-11-22T05:00:00Z".parse().unwrap()),
            work: Work::Backup(work),
        };
        assert_eq!(job(&line), expected);
        let super::Command::Submit(submit) = parse(&line).unwrap().command else { panic!("no submit") };
        assert_eq!((submit.wait, submit.job.json, submit.priority), (true, true, Some(9)));
    }

    #[test]
    fn the_other_jobs_are_what_was_written() {
        let id = ID.parse().unwrap();
        let target = "file:/b".parse().unwrap();
        let restore = RestoreWork { backup_id: id, target, volume_id: Some(ID.parse().unwrap()) };
        let line = format!("backhaul run restore --backup-id {ID} --target file:/b --volume-id {ID}");
        assert_eq!(job(&line).work, Work::Restore(restore));
        assert_eq!(job(&format!("backhaul run delete --backup-id {ID}")).work, Work::Delete(id));
        assert_eq!(job(&format!("backhaul submit verify --backup-id {ID}")).work, Work::Verify(id.into()));
    }

    #[test]
    fn a_deadline_is_a_time_or_how_long_from_now() {
        let line = |deadline: &str| format!("backhaul submit delete --backup-id {ID} --deadline {deadline}");
        let (before, deadline) = (Timestamp::now(), job(&line("90m")).deadline.unwrap());
        let wait = SignedDuration::from_mins(90);
        assert!((before + wait..=Timestamp::now() + wait).contains(&deadline), "{deadline}");
        for wrong in ["tomorrow", "2026-11-22", "90", "9999999999h"] {
            let error = parse(&line(wrong)).unwrap_err().to_string();
            assert!(error.contains("write a time, such as "), "{wrong}: {error}");
        }
    }

    #[test]
    fn ids_are_made_where_none_are_given_and_incremental_is_to_the_latest() {
        let line = format!("backhaul submit backup --volume-id {ID} --source file:/a --incremental");
        let (one, two) = (job(&line), job(&line));
        assert_ne!(one.id, two.id);
        assert_ne!(one.backup_id(), two.backup_id());
        assert!(matches!(one.work, Work::Backup(BackupWork { parent: Parent::Latest, .. })));
    }

    #[test]
    fn a_metadata_file_must_be_json() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metadata.json");
        let line = format!(
            "backhaul run backup --volume-id {ID} --source file:/a --metadata-file {}",
            file.display()
        );
        let meta = || match parse(&line).unwrap().command {
            super::Command::Run(args) => args.job().map_err(|error| error.to_string()),
            other => panic!("{other:?}"),
        };
        let file = file.display();

        assert_eq!(meta().unwrap_err(), format!("read the metadata file {file}"));
        std::fs::write(file.to_string(), "{version: 2}").unwrap();
        assert_eq!(meta().unwrap_err(), format!("the metadata file {file} is not JSON"));
        std::fs::write(file.to_string(), "{\"version\": 2}\n").unwrap();
        let Work::Backup(work) = meta().unwrap().work else { panic!("no backup") };
        assert_eq!(work.volume_meta.as_deref(), Some("{\"version\": 2}\n"));
    }

    #[rstest]
    #[case::bad_id("backhaul show 7", "write a UUID")]
    #[case::no_location("backhaul submit backup --volume-id ID --source /a", "write file:/path or rbd:")]
    #[case::two_parents(
        "backhaul run backup --volume-id ID --source file:/a --parent ID --incremental",
        "cannot be used with"
    )]
    #[case::snapshot(
        "backhaul run restore --backup-id ID --target rbd:p/i@s",
        "a snapshot cannot be written to"
    )]
    #[case::container(
        "backhaul run backup --volume-id ID --source file:/a --container ../x",
        "no part may begin with a dot"
    )]
    #[case::store("backhaul list --store a/b", "write 1 to 64 of")]
    #[case::priority("backhaul submit delete --backup-id ID --priority 10", "10 is not in 0..=9")]
    #[case::wait_here("backhaul run delete --backup-id ID --wait", "unexpected argument '--wait'")]
    #[case::missing("backhaul submit restore --backup-id ID", "--target <PLACE>")]
    #[case::age("backhaul gc --older-than=-1h", "such as 12h, 90m or 0s")]
    #[case::log("backhaul check --log a=b=c", "invalid value 'a=b=c' for '--log <FILTER>'")]
    fn what_makes_no_sense_is_a_usage_error(#[case] line: &str, #[case] expected: &str) {
        let error = parse(&line.replace("ID", ID)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error}");
    }
}
