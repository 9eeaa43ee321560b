//! Cinder's database as we read and write it, and as Cinder's own code does: on SQLite, MariaDB and PostgreSQL, with the
//! schema that Cinder makes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use backhaul::cinder::database::{
    Changes, Connections, Database, DatabaseUrl, Error, Finished, KeptKey, QuotaRefresh, Registration,
    Restored, UserMessage, kept_key,
};
use backhaul::error::Class;
use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use Server::{MariaDb, Postgres, Sqlite};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Sqlite,
    MariaDb,
    Postgres,
}

/// A database, and Cinder's own code at it. Tests share the servers' databases, and so have projects and hosts of their own.
struct Stage {
    database: Database,
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    project: String,
    _folder: TempDir,
}

impl Stage {
    async fn on(server: Server) -> Self {
        let folder = TempDir::new().unwrap();
        let variable =
            |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run `make test`"));
        let connection = match server {
            Sqlite => format!("sqlite:///{}/cinder.sqlite", folder.path().display()),
            MariaDb => variable("BACKHAUL_TEST_MARIADB"),
            Postgres => variable("BACKHAUL_TEST_POSTGRES"),
        };
        Self::at(&connection, folder).await
    }

    async fn at(connection: &str, folder: TempDir) -> Self {
        let python =
            std::env::var_os("BACKHAUL_TEST_CINDER").expect("run `make test`, which installs Cinder");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/cinder_database.py");
        let mut process = Command::new(python);
        process.arg(script).arg(connection).arg(folder.path());
        let mut process = process.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (commands, answers) =
            (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        let url = DatabaseUrl::parse(connection).unwrap();
        let project = Uuid::new_v4().simple().to_string();
        // It answers its first command when the schema is there.
        let (commands, answers) = asked(commands, answers);
        let database = Database::connect(&url, &Connections::default()).await.unwrap();
        Self { database, process, commands, answers, project, _folder: folder }
    }

    /// Runs a command of Cinder's that must succeed.
    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let answer = ask(&mut self.commands, &mut self.answers, command, arguments);
        assert!(answer.get("error").is_none(), "Cinder's {command}: {answer}");
        answer["ok"].clone()
    }

    fn create(&mut self, table: &str, mut values: Value) -> String {
        values["table"] = table.into();
        values["project_id"] = self.project.as_str().into();
        self.ask("create", values).as_str().unwrap().into()
    }

    /// A volume of 2 GiB that is being backed up.
    fn volume(&mut self) -> String {
        let values = json!({
            "size": 2, "status": "backing-up", "previous_status": "in-use", "display_name": "data", "host": "node1@rbd#pool",
            "bootable": false, "availability_zone": "nova",
        });
        self.create("volumes", values)
    }

    /// A backup of it that is being created.
    fn backup(&mut self, volume: &str, parent: Option<&str>) -> String {
        let values = json!({
            "volume_id": volume, "user_id": "user", "status": "creating", "size": 1, "host": format!("host-{}", self.project),
            "parent_id": parent, "display_name": "näme", "metadata": { "a": "b" }, "data_timestamp": "2026-01-02T03:04:05Z",
        });
        self.create("backups", values)
    }

    /// The row of that table with this id.
    fn row(&mut self, table: &str, id: &str) -> Value {
        self.rows(table, "id", id).as_array().unwrap()[0].clone()
    }

    fn rows(&mut self, table: &str, column: &str, value: &str) -> Value {
        self.ask("rows", json!({ "table": table, column: value }))
    }

    /// Columns of a row.
    fn columns(&mut self, table: &str, id: &str, names: &[&str]) -> Vec<Value> {
        let row = self.row(table, id);
        names.iter().map(|name| row[*name].clone()).collect()
    }

    /// What the project uses of `backups` and `backup_gigabytes`.
    fn used(&mut self) -> (i64, i64) {
        let project = self.project.clone();
        let rows = self.rows("quota_usages", "project_id", &project);
        let of = |resource| {
            let row = rows.as_array().unwrap().iter().find(|row| row["resource"] == resource).unwrap();
            assert_eq!(row["reserved"], 0);
            row["in_use"].as_i64().unwrap()
        };
        (of("backups"), of("backup_gigabytes"))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn ask(
    commands: &mut ChildStdin,
    answers: &mut BufReader<ChildStdout>,
    command: &str,
    mut arguments: Value,
) -> Value {
    arguments["do"] = command.into();
    writeln!(commands, "{arguments}").unwrap();
    let mut answer = String::new();
    answers.read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("Cinder's {command}: {error}: {answer:?}"))
}

fn asked(
    mut commands: ChildStdin,
    mut answers: BufReader<ChildStdout>,
) -> (ChildStdin, BufReader<ChildStdout>) {
    ask(&mut commands, &mut answers, "rows", json!({ "table": "services", "host": "nobody" }));
    (commands, answers)
}

fn texts<const N: usize>(texts: [&str; N]) -> Vec<Value> {
    texts.into_iter().map(Value::from).collect()
}

const REFRESH: QuotaRefresh =
    QuotaRefresh { until_refresh: 0, max_age_seconds: 0, reservation_seconds: 86_400 };

#[rstest]
#[tokio::test]
async fn rows_are_read_as_cinder_reads_them(#[values(Sqlite, MariaDb, Postgres)] server: Server) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let backup = stage.backup(&volume, None);

    let row = stage.database.backup(&backup).await.unwrap().unwrap();
    assert_eq!((row.volume_id.as_str(), row.status.as_str(), row.size), (volume.as_str(), "creating", 1));
    assert_eq!(row.display_name.as_deref(), Some("näme"));
    assert_eq!(row.data_timestamp.unwrap().to_string(), "2026-01-02T03:04:05");
    assert!(row.created_at.is_some() && !row.deleted && row.parent_id.is_none() && row.deleted_at.is_none());
    let listed =
        stage.database.backups_of_host(&row.host.clone().unwrap(), &["error", "creating"]).await.unwrap();
    assert_eq!(listed, [row]);
    assert!(stage.database.backups_of_host("elsewhere", &["creating"]).await.unwrap().is_empty());
    assert!(stage.database.backup("nowhere").await.unwrap().is_none());

    let mut theirs = stage.ask("backup_object", json!({ "id": backup }));
    theirs.as_object_mut().unwrap().remove("parent");
    assert_eq!(Value::from(stage.database.backup_columns(&backup).await.unwrap().unwrap()), theirs);

    let row = stage.database.volume(&volume).await.unwrap().unwrap();
    assert_eq!(
        (row.size, row.status.as_str(), row.previous_status.as_deref()),
        (2, "backing-up", Some("in-use"))
    );
    assert_eq!(row.host.as_deref(), Some("node1@rbd#pool"));
    let snapshot =
        stage.create("snapshots", json!({ "volume_id": volume, "status": "backing-up", "volume_size": 2 }));
    let row = stage.database.snapshot(&snapshot).await.unwrap().unwrap();
    assert_eq!((row.volume_id.as_str(), row.status.as_str()), (volume.as_str(), "backing-up"));
}

#[rstest]
#[tokio::test]
async fn what_a_backup_keeps_of_its_volume_is_what_cinder_keeps(
    #[values(Sqlite, MariaDb, Postgres)] server: Server,
) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let ours = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let theirs = stage.ask("volume_meta", json!({ "volume_id": volume }));
    assert_eq!(ours(&stage.database.volume_meta(&volume).await.unwrap()), theirs);

    stage.ask("set_metadata", json!({ "volume_id": volume, "pairs": { "kéy": "value", "other": "" } }));
    stage.ask(
        "set_glance_metadata",
        json!({ "volume_id": volume, "pairs": { "image_id": "i", "min_ram": "0" } }),
    );
    let theirs = stage.ask("volume_meta", json!({ "volume_id": volume }));
    let text = stage.database.volume_meta(&volume).await.unwrap();
    assert_eq!(ours(&text), theirs);

    // A volume made for the restore gets the name, one of the user's keeps its own; both get all metadata.
    for (name, expected) in [("restore_backup_1", "data"), ("", "data"), ("mine", "mine")] {
        let by_us =
            stage.create("volumes", json!({ "size": 2, "status": "restoring-backup", "display_name": name }));
        let by_cinder =
            stage.create("volumes", json!({ "size": 2, "status": "restoring-backup", "display_name": name }));
        let mut after = Vec::new();
        for id in [&by_us, &by_cinder] {
            stage.ask("set_metadata", json!({ "volume_id": id, "pairs": { "kéy": "old", "gone": "x" } }));
            stage.ask("set_glance_metadata", json!({ "volume_id": id, "pairs": { "image_id": "old" } }));
            if *id == by_us {
                stage.database.restore_volume_meta(id, &text, &Changes::new()).await.unwrap();
            } else {
                stage.ask("restore_volume_meta", json!({ "volume_id": id, "text": text }));
            }
            after.push((
                stage.columns(
                    "volumes",
                    id,
                    &["display_name", "display_description", "bootable", "status", "encryption_key_id"],
                ),
                stage.ask("volume_metadata", json!({ "volume_id": id })),
                stage.ask("glance_metadata", json!({ "volume_id": id })),
            ));
        }
        assert_eq!(after[0], after[1], "{name}");
        assert_eq!(after[0].0[0], expected);
        assert_eq!(after[0].1, json!({ "kéy": "value", "other": "" }));
    }

    stage.ask("set", json!({ "table": "volumes", "id": volume, "provider_auth": "CHAP user hush" }));
    let kept = stage.database.volume_meta(&volume).await.unwrap();
    assert!(!kept.contains("hush"), "the secret of an iSCSI volume is kept: {kept}");
    assert!(stage.ask("volume_meta", json!({ "volume_id": volume })).to_string().contains("hush"));

    for text in ["{}", "[]", "no", r#"{"version": 3}"#] {
        let error = stage.database.restore_volume_meta(&volume, text, &Changes::new()).await.unwrap_err();
        assert!(matches!(error, Error::VolumeMeta { .. }) && error.class() == Class::Permanent, "{error}");
        let error = kept_key(&volume, text).unwrap_err();
        assert!(matches!(error, Error::VolumeMeta { .. }) && error.class() == Class::Permanent, "{error}");
    }
    let volume_type_id = stage.database.volume(&volume).await.unwrap().unwrap().volume_type_id;
    let kept = KeptKey { key_id: None, volume_type_id: volume_type_id.clone() };
    assert_eq!(kept_key(&volume, &text).unwrap(), Some(kept));
    assert!(stage.database.has_volume_type(volume_type_id.as_deref().unwrap()).await.unwrap());
    assert!(!stage.database.has_volume_type(&Uuid::new_v4().to_string()).await.unwrap());

    // The key of an encrypted volume is another matter: Cinder puts it back as it was, and then a copy in its place.
    let mut encrypted = ours(&text);
    encrypted["volume-base-metadata"]["encryption_key_id"] = json!("key");
    let kept = KeptKey { key_id: Some("key".into()), volume_type_id };
    assert_eq!(kept_key(&volume, &encrypted.to_string()).unwrap(), Some(kept));
    let mut after = Vec::new();
    for by_us in [true, false] {
        let id = stage.create("volumes", json!({ "size": 2, "status": "restoring-backup" }));
        let text = encrypted.to_string();
        match by_us {
            true => {
                let further = Changes::new().text("encryption_key_id", "key");
                stage.database.restore_volume_meta(&id, &text, &further).await.unwrap();
            }
            false => drop(stage.ask("restore_volume_meta", json!({ "volume_id": id, "text": text }))),
        }
        after.push(stage.columns("volumes", &id, &["display_name", "encryption_key_id", "volume_type_id"]));
    }
    assert_eq!(after[0], after[1]);
    assert_eq!(after[0][1], "key");
    encrypted["version"] = json!(1);
    assert_eq!(kept_key(&volume, &encrypted.to_string()).unwrap(), None);
    let error = stage.database.volume_meta("nowhere").await.unwrap_err();
    assert_eq!(error.to_string(), "Cinder's database has no volume nowhere");
}

#[rstest]
#[tokio::test]
async fn a_key_is_in_use_while_anything_has_it(#[values(Sqlite, MariaDb, Postgres)] server: Server) {
    let mut stage = Stage::on(server).await;
    let key = Uuid::new_v4().to_string();
    let volume = stage.volume();
    let backup = stage.backup(&volume, None);
    let snapshot =
        stage.create("snapshots", json!({ "volume_id": volume, "status": "available", "volume_size": 2 }));
    assert!(!stage.database.is_key_in_use(&key, "").await.unwrap());
    for (table, id) in [("volumes", &volume), ("snapshots", &snapshot), ("backups", &backup)] {
        stage.ask("set", json!({ "table": table, "id": id, "encryption_key_id": key }));
        assert!(stage.database.is_key_in_use(&key, "").await.unwrap(), "{table}");
        assert!(!stage.database.is_key_in_use(&key, id).await.unwrap(), "{table}");
        stage.ask("set", json!({ "table": table, "id": id, "deleted": true }));
        assert!(!stage.database.is_key_in_use(&key, "").await.unwrap(), "{table}");
    }
}

#[rstest]
#[tokio::test]
async fn a_backup_ends_once_and_gives_its_volume_back(#[values(Sqlite, MariaDb, Postgres)] server: Server) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let parent = stage.backup(&volume, None);
    let child = stage.backup(&volume, Some(&parent));
    let state = ["status", "previous_status"];

    let changes = Changes::new()
        .text("service_metadata", "{}")
        .integer("object_count", 3)
        .text("fail_reason", &"é".repeat(300));
    // Twice, as after a lost connection.
    for _ in 0..2 {
        assert_eq!(stage.database.finish_backup(&child, &changes).await.unwrap(), Finished::Available);
        let row = stage.database.backup(&child).await.unwrap().unwrap();
        assert_eq!((row.status.as_str(), row.size, row.object_count), ("available", 2, 3));
        assert_eq!(row.service_metadata.as_deref(), Some("{}"));
        assert_eq!(row.fail_reason.unwrap().chars().count(), 255);
        assert!(row.updated_at.is_some());
        assert_eq!(stage.columns("volumes", &volume, &state), texts(["in-use", "backing-up"]));
        assert_eq!(stage.database.backup(&parent).await.unwrap().unwrap().num_dependent_backups, 1);
    }

    // A full one after all has no parent to count it.
    let second = stage.backup(&volume, Some(&parent));
    let full = Changes::new().text_or_null("parent_id", None);
    stage.database.finish_backup(&second, &full).await.unwrap();
    assert_eq!(stage.database.backup(&parent).await.unwrap().unwrap().num_dependent_backups, 1);

    // One that a person set to `available` before it was made is made, and fails, all the same; once.
    for status in ["available", "restoring"] {
        for (made, expected) in [(true, status), (false, "error")] {
            let given_out = stage.backup(&volume, None);
            stage.ask("set", json!({ "table": "backups", "id": given_out, "status": status }));
            match made {
                true => {
                    for _ in 0..2 {
                        let finished = stage.database.finish_backup(&given_out, &changes).await.unwrap();
                        assert_eq!(finished, Finished::Available);
                    }
                    assert!(!stage.database.fail_backup(&given_out, "late").await.unwrap());
                }
                false => assert!(stage.database.fail_backup(&given_out, "reason").await.unwrap()),
            }
            let row = stage.database.backup(&given_out).await.unwrap().unwrap();
            assert_eq!((row.status.as_str(), row.object_count), (expected, if made { 3 } else { 0 }));
        }
    }

    // What somebody else did in between stays.
    let aborted = stage.backup(&volume, Some(&parent));
    assert!(
        stage
            .database
            .change_backup(&aborted, &["creating"], &Changes::new().text("status", "deleting"))
            .await
            .unwrap()
    );
    let finished = stage.database.finish_backup(&aborted, &changes).await.unwrap();
    assert_eq!(finished, Finished::Aborted("deleting".into()));
    assert!(!stage.database.fail_backup(&aborted, "reason").await.unwrap());
    assert!(!stage.database.change_backup(&aborted, &["creating"], &changes).await.unwrap());
    let row = stage.database.backup(&aborted).await.unwrap().unwrap();
    assert_eq!((row.status.as_str(), row.object_count, row.fail_reason), ("deleting", 0, None));
    assert_eq!(stage.database.backup(&parent).await.unwrap().unwrap().num_dependent_backups, 1);

    // A failure.
    let volume = stage.volume();
    let failed = stage.backup(&volume, None);
    assert!(stage.database.fail_backup(&failed, "the store is full").await.unwrap());
    assert!(!stage.database.fail_backup(&failed, "another").await.unwrap());
    let state_of = |row: Value| [row["status"].clone(), row["fail_reason"].clone()];
    assert_eq!(state_of(stage.row("backups", &failed)).to_vec(), texts(["error", "the store is full"]));
    assert_eq!(stage.columns("volumes", &volume, &state), texts(["in-use", "error_backing-up"]));

    // Of a snapshot: the volume is left alone.
    let volume = stage.volume();
    let snapshot =
        stage.create("snapshots", json!({ "volume_id": volume, "status": "backing-up", "volume_size": 2 }));
    let of_snapshot = stage.backup(&volume, None);
    stage.ask("set", json!({ "table": "backups", "id": of_snapshot, "snapshot_id": snapshot }));
    stage.database.finish_backup(&of_snapshot, &Changes::new()).await.unwrap();
    assert_eq!(stage.columns("snapshots", &snapshot, &["status"]), texts(["available"]));
    assert_eq!(stage.columns("volumes", &volume, &state), texts(["backing-up", "in-use"]));

    let error = stage.database.finish_backup("nowhere", &Changes::new()).await.unwrap_err();
    assert!(matches!(error, Error::NotThere { what: "backup", .. }), "{error}");
}

/// A message of a backup that is over may come late, and the answer to what ended it may have been lost.
#[rstest]
#[tokio::test]
async fn the_end_of_a_backup_does_not_free_the_volume_that_another_one_is_made_of(
    #[values(Sqlite, MariaDb, Postgres)] server: Server,
) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let snapshot =
        stage.create("snapshots", json!({ "volume_id": volume, "status": "backing-up", "volume_size": 2 }));
    for (table, source) in [("volumes", &volume), ("snapshots", &snapshot)] {
        let (over, at_work) = (stage.backup(&volume, None), stage.backup(&volume, None));
        for id in [&over, &at_work] {
            let of = if table == "snapshots" { json!(snapshot) } else { Value::Null };
            stage.ask("set", json!({ "table": "backups", "id": id, "snapshot_id": of }));
        }
        stage.database.finish_backup(&over, &Changes::new().text("service_metadata", "{}")).await.unwrap();
        let mut begun = json!({ "table": table, "id": source, "status": "backing-up" });
        if table == "volumes" {
            begun["previous_status"] = "in-use".into();
        }
        stage.ask("set", begun);

        stage.database.finish_backup(&over, &Changes::new()).await.unwrap();
        assert_eq!(stage.columns(table, source, &["status"]), texts(["backing-up"]), "{table}");
        assert!(!stage.database.fail_backup(&over, "late").await.unwrap());
        stage.database.give_source_back(&over).await.unwrap();
        assert_eq!(stage.columns(table, source, &["status"]), texts(["backing-up"]), "{table}");

        // Somebody deletes that one, too.
        stage.ask("set", json!({ "table": "backups", "id": at_work, "status": "deleting" }));
        stage.database.give_source_back(&at_work).await.unwrap();
        let free = if table == "volumes" { "in-use" } else { "available" };
        assert_eq!(stage.columns(table, source, &["status"]), texts([free]), "{table}");
        assert_eq!(stage.columns("backups", &at_work, &["status"]), texts(["deleting"]));
        stage.ask("set", json!({ "table": "volumes", "id": volume, "status": "in-use" }));
    }
}

#[rstest]
#[tokio::test]
async fn a_restore_ends_in_the_status_that_cinder_gives(#[values(Sqlite, MariaDb, Postgres)] server: Server) {
    let mut stage = Stage::on(server).await;
    let original = stage.volume();
    let backup = stage.backup(&original, None);
    for (restored, before, after, launched, marked) in [
        (Restored::Done, "creating", "available", true, true),
        (Restored::Done, "restoring-backup", "available", false, true),
        (Restored::Cancelled, "restoring-backup", "error", false, true),
        (Restored::Failed, "restoring-backup", "error_restoring", false, false),
        (Restored::Refused, "restoring-backup", "error", false, false),
        (Restored::Done, "deleting", "deleting", false, false),
    ] {
        let target = stage.create("volumes", json!({ "size": 2, "status": before }));
        stage.ask("set", json!({ "table": "backups", "id": backup, "status": "restoring" }));
        for _ in 0..2 {
            stage.database.finish_restore(&backup, &target, restored).await.unwrap();
            let row = stage.database.volume(&target).await.unwrap().unwrap();
            assert_eq!(
                (row.status.as_str(), row.launched_at.is_some()),
                (after, launched),
                "{restored:?} {before}"
            );
            let metadata = stage.database.volume_metadata(&target).await.unwrap();
            let expected = BTreeMap::from([("src_backup_id".to_owned(), backup.clone())]);
            assert_eq!(metadata, if marked { expected } else { BTreeMap::new() }, "{restored:?} {before}");
            assert_eq!(stage.database.backup(&backup).await.unwrap().unwrap().status, "available");
        }
    }
    // A message of a restore that is over says nothing of one to another volume.
    let other = stage.create("volumes", json!({ "size": 2, "status": "restoring-backup" }));
    for (of, expected) in
        [(json!(other), "restoring"), (json!(original), "available"), (json!(null), "available")]
    {
        for refused in [true, false] {
            let target =
                json!({ "table": "backups", "id": backup, "status": "restoring", "restore_volume_id": of });
            stage.ask("set", target);
            match refused {
                true => {
                    let was_done = stage.database.refuse_restore(&backup, &original).await.unwrap();
                    assert_eq!(was_done, expected == "available");
                }
                false => stage.database.finish_restore(&backup, &original, Restored::Done).await.unwrap(),
            }
            assert_eq!(stage.columns("backups", &backup, &["status"]), texts([expected]), "{of} {refused}");
        }
    }
    stage.ask(
        "set",
        json!({ "table": "backups", "id": backup, "status": "restoring", "restore_volume_id": null }),
    );

    // In its own place it is marked only if it held another backup.
    for (mark, expected) in [(None, None), (Some("other"), Some(backup.clone()))] {
        stage.ask("set", json!({ "table": "volumes", "id": original, "status": "restoring-backup" }));
        if let Some(mark) = mark {
            stage.ask("set_metadata", json!({ "volume_id": original, "pairs": { "src_backup_id": mark } }));
        }
        stage.database.finish_restore(&backup, &original, Restored::Done).await.unwrap();
        assert_eq!(
            stage.database.volume_metadata(&original).await.unwrap().get("src_backup_id").cloned(),
            expected
        );
    }
}

#[rstest]
#[tokio::test]
async fn a_deleted_backup_leaves_quotas_and_its_parent_once(
    #[values(Sqlite, MariaDb, Postgres)] server: Server,
) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let parent = stage.backup(&volume, None);
    let children: Vec<String> = (0..12).map(|_| stage.backup(&volume, Some(&parent))).collect();
    stage.ask("set", json!({ "table": "backups", "id": parent, "num_dependent_backups": 12 }));
    // The first use counts what is there, thirteen, and adds to it.
    let project = stage.project.clone();
    stage.ask("use", json!({ "project": project, "backups": 1, "backup_gigabytes": 10 }));
    assert_eq!(stage.used(), (14, 23));

    // All at once, and each twice: deadlocks are tried again, and nothing is counted twice.
    let mut deletes = tokio::task::JoinSet::new();
    for id in children.iter().chain(&children) {
        let (database, id) = (stage.database.clone(), id.clone());
        deletes.spawn(async move { database.delete_backup(&id, &REFRESH).await.unwrap() });
    }
    let done = deletes.join_all().await;
    assert_eq!(done.iter().filter(|done| **done).count(), 12);
    assert_eq!(stage.used(), (2, 11));
    assert_eq!(stage.database.backup(&parent).await.unwrap().unwrap().num_dependent_backups, 0);
    assert!(stage.database.backup(&children[0]).await.unwrap().is_none());
    let row = stage.database.backup_even_if_deleted(&children[0]).await.unwrap().unwrap();
    assert!(row.deleted && row.status == "deleted" && row.deleted_at.is_some());
    assert_eq!(row.updated_at, None);
    for row in stage.rows("backup_metadata", "backup_id", &children[0]).as_array().unwrap() {
        assert_eq!(row["deleted"], true);
    }
    let reservations = stage.rows("reservations", "project_id", &project);
    assert!(
        reservations
            .as_array()
            .unwrap()
            .iter()
            .all(|row| row["deleted"] == true && row["expire"].is_string())
    );
    assert_eq!(reservations.as_array().unwrap().len(), 2 + 24);

    // Never below nothing, as when the counts were wrong before; and counted anew where the operator wants that.
    let usages = stage.rows("quota_usages", "project_id", &project);
    let ids: Vec<i64> = usages.as_array().unwrap().iter().map(|row| row["id"].as_i64().unwrap()).collect();
    for (in_use, until, refresh, expected) in [
        (0, None, REFRESH, (0, 0, Value::Null)),
        (9, Some(1), QuotaRefresh { until_refresh: 5, ..REFRESH }, (1, 1, json!(5))),
        (9, Some(4), QuotaRefresh { until_refresh: 5, ..REFRESH }, (8, 8, json!(3))),
        (9, Some(9), QuotaRefresh { until_refresh: 5, ..REFRESH }, (8, 8, json!(5))),
        (9, None, QuotaRefresh { until_refresh: 5, ..REFRESH }, (8, 8, json!(5))),
        (9, Some(4), REFRESH, (8, 8, Value::Null)),
        (-3, None, REFRESH, (1, 1, Value::Null)),
        (9, None, QuotaRefresh { max_age_seconds: 1_000_000, ..REFRESH }, (8, 8, Value::Null)),
    ] {
        for id in &ids {
            let values =
                json!({ "table": "quota_usages", "id": id, "in_use": in_use, "until_refresh": until });
            stage.ask("set", values);
        }
        let backup = stage.backup(&volume, None);
        assert!(stage.database.delete_backup(&backup, &refresh).await.unwrap());
        let usage = stage.rows("quota_usages", "project_id", &project)[0].clone();
        let (backups, gigabytes) = stage.used();
        assert_eq!(
            (backups, gigabytes, usage["until_refresh"].clone()),
            expected,
            "{in_use} {until:?} {refresh:?}"
        );
    }
    assert!(!stage.database.delete_backup("nowhere", &REFRESH).await.unwrap());
}

/// Cinder counts one less for it all the same, and then lets the parent of another one be deleted.
#[rstest]
#[tokio::test]
async fn a_failed_backup_that_is_deleted_leaves_its_parents_count_of_others(
    #[values(Sqlite, MariaDb, Postgres)] server: Server,
) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let parent = stage.backup(&volume, None);
    let failed: Vec<String> = (0..2).map(|_| stage.backup(&volume, Some(&parent))).collect();
    for id in &failed {
        assert!(stage.database.fail_backup(id, "the store is full").await.unwrap());
    }
    let made = stage.backup(&volume, Some(&parent));
    let changes = Changes::new().text("service_metadata", "{}");
    stage.database.finish_backup(&made, &changes).await.unwrap();
    let project = stage.project.clone();
    stage.ask("use", json!({ "project": project, "backups": 1, "backup_gigabytes": 10 }));

    for (id, expected) in [(&failed[0], 1), (&made, 0), (&failed[1], 0)] {
        assert!(stage.database.delete_backup(id, &REFRESH).await.unwrap());
        let row = stage.database.backup(&parent).await.unwrap().unwrap();
        assert_eq!(row.num_dependent_backups, expected);
    }
}

#[rstest]
#[tokio::test]
async fn the_service_is_up_while_it_reports(#[values(Sqlite, MariaDb, Postgres)] server: Server) {
    let mut stage = Stage::on(server).await;
    let host = format!("host-{}", stage.project);
    let registration = |rpc_version, enabled| Registration {
        host: &host,
        availability_zone: "zone",
        rpc_version,
        object_version: "1.39",
        enabled,
    };

    let service = stage.database.register_service(&registration("2.3", true)).await.unwrap();
    assert_eq!((service.report_count, service.disabled), (0, false));
    let again = stage.database.register_service(&registration("2.4", true)).await.unwrap();
    assert_eq!((again.id, again.uuid, again.updated_at), (service.id, service.uuid, service.updated_at));
    assert!(stage.database.report_service(service.id, "other").await.unwrap());
    assert!(stage.database.report_service(service.id, "nova").await.unwrap());
    let theirs = stage.ask("service", json!({ "host": host }));
    let expected = json!({
        "is_up": true, "id": service.id, "disabled": false, "availability_zone": "nova", "report_count": 2,
        "rpc_current_version": "2.4", "object_current_version": "1.39",
    });
    assert_eq!(theirs, expected);

    stage.ask("set", json!({ "table": "services", "id": service.id, "disabled": true }));
    assert!(stage.database.register_service(&registration("2.4", true)).await.unwrap().disabled);
    stage.ask("remove_service", json!({ "id": service.id }));
    assert!(!stage.database.report_service(service.id, "nova").await.unwrap());
    let anew = stage.database.register_service(&registration("2.4", false)).await.unwrap();
    assert!(anew.id != service.id && anew.disabled);

    // A message as Cinder's.
    let project = stage.project.clone();
    stage.ask("message", json!({ "project": project, "resource_id": "theirs" }));
    let message = UserMessage {
        project_id: &project,
        request_id: Some("req-1"),
        level: "ERROR",
        resource_type: "VOLUME_BACKUP",
        resource_id: "ours",
        action_id: "013",
        detail_id: "020",
        ttl_seconds: 2_592_000,
    };
    stage.database.add_message(&message).await.unwrap();
    let rows = stage.rows("messages", "project_id", &project);
    let comparable = |id: &str| {
        let row = rows.as_array().unwrap().iter().find(|row| row["resource_uuid"] == id).unwrap();
        let mut row = row.as_object().unwrap().clone();
        let days = (
            row["expires_at"].as_str().unwrap()[..10].to_owned(),
            row["created_at"].as_str().unwrap()[..10].to_owned(),
        );
        row.retain(|name, _| !["id", "resource_uuid", "created_at", "expires_at"].contains(&name.as_str()));
        (row, days)
    };
    assert_eq!(comparable("ours"), comparable("theirs"));
    assert_eq!(rows.as_array().unwrap().len(), 2);
}

#[rstest]
#[tokio::test]
async fn an_imported_backup_has_all_that_was_exported(#[values(Sqlite, MariaDb, Postgres)] server: Server) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let exported = stage.backup(&volume, None);
    let changes =
        Changes::new().text("service_metadata", "{}").integer("object_count", 3).text("container", "pool");
    stage.database.finish_backup(&exported, &changes).await.unwrap();
    stage.ask(
        "set",
        json!({ "table": "backups", "id": exported, "parent_id": volume, "user_id": "somebody" }),
    );
    let mut fields = stage.database.backup_columns(&exported).await.unwrap().unwrap();

    let target = stage.backup("00000000-0000-0000-0000-000000000000", None);
    fields["id"] = target.as_str().into();
    fields["deleted"] = true.into();
    fields["metadata"] = json!({ "a": "c", "new": "d" });
    fields.insert("unknown".into(), 1.into());
    let ours = Changes::new().text("host", "importer").text("service", "driver");
    for (name, wrong) in [
        ("size", json!("2")),
        ("container", json!(1)),
        ("created_at", json!("yesterday")),
        ("id", json!(exported)),
    ] {
        let mut fields = fields.clone();
        fields[name] = wrong;
        let error = stage.database.import_backup(&target, &fields, &ours).await.unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    assert!(stage.database.import_backup(&target, &fields, &ours).await.unwrap());
    assert!(!stage.database.import_backup(&target, &fields, &ours).await.unwrap());

    let theirs = stage.ask("backup_object", json!({ "id": target }));
    for (name, expected) in [
        ("host", json!("importer")),
        ("service", json!("driver")),
        ("status", json!("available")),
        ("user_id", json!("user")),
        ("project_id", json!(stage.project)),
        ("deleted", json!(false)),
        ("metadata", fields["metadata"].clone()),
    ] {
        assert_eq!(theirs[name], expected, "{name}");
    }
    for name in [
        "volume_id",
        "parent_id",
        "size",
        "object_count",
        "container",
        "service_metadata",
        "data_timestamp",
        "created_at",
    ] {
        assert_eq!(theirs[name], fields[name], "{name}");
    }
}

#[rstest]
#[tokio::test]
async fn two_transactions_that_end_each_other_are_both_done(
    #[values(Sqlite, MariaDb, Postgres)] server: Server,
) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    // Each wants, in the other order, the rows that the other has.
    let one = stage.backup(&volume, None);
    let two = stage.backup(&volume, Some(&one));
    stage.ask("set", json!({ "table": "backups", "id": one, "parent_id": two }));
    for round in 1..=10 {
        for id in [&one, &two] {
            stage.ask("set", json!({ "table": "backups", "id": id, "status": "creating" }));
        }
        let finish = |id: &str| {
            let (database, id) = (stage.database.clone(), id.to_owned());
            tokio::spawn(async move { database.finish_backup(&id, &Changes::new()).await.unwrap() })
        };
        let (first, second) = tokio::join!(finish(&one), finish(&two));
        assert_eq!((first.unwrap(), second.unwrap()), (Finished::Available, Finished::Available));
        for id in [&one, &two] {
            assert_eq!(stage.database.backup(id).await.unwrap().unwrap().num_dependent_backups, round);
        }
    }
}

#[rstest]
#[tokio::test]
async fn a_restore_whose_volume_is_gone_gives_its_backup_back(
    #[values(Sqlite, MariaDb, Postgres)] server: Server,
) {
    let mut stage = Stage::on(server).await;
    let volume = stage.volume();
    let backup = stage.backup(&volume, None);
    stage.ask("set", json!({ "table": "backups", "id": backup, "status": "restoring" }));

    let error = stage.database.finish_restore(&backup, "nowhere", Restored::Failed).await.unwrap_err();

    assert!(matches!(error, Error::NotThere { what: "volume", .. }), "{error}");
    assert_eq!(stage.columns("backups", &backup, &["status"]), texts(["available"]));
}

/// A MariaDB of a test's own, which it may stop.
struct OwnServer(TempDir);

impl OwnServer {
    /// Starts it, and gives its address.
    fn start() -> (Self, String) {
        let server = Self(TempDir::new_in("/tmp").unwrap());
        let url = server.run("up", &[]);
        (server, url)
    }

    fn run(&self, command: &str, arguments: &[&str]) -> String {
        let output = self.command(command, arguments).stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success(), "{command} {arguments:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn command(&self, command: &str, arguments: &[&str]) -> Command {
        let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/mariadb.sh"));
        script.arg(command).arg(self.path()).args(arguments);
        script
    }

    fn path(&self) -> std::path::PathBuf {
        Path::join(self.0.path(), "server")
    }

    /// What a query gives, in one line.
    fn query(&self, sql: &str) -> String {
        self.run("sql", &["--batch", "--skip-column-names", "--execute", sql])
    }

    /// Waits until a query gives this.
    async fn until(&self, sql: &str, expected: impl Fn(&str) -> bool) {
        for _ in 0..600 {
            if expected(&self.query(sql)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{sql} gives {}", self.query(sql));
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let _ = self.command("down", &[]).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_change_by_another_one_nor_a_restart_of_the_server_ends_anything_for_good() {
    let (server, url) = OwnServer::start();
    // As newer ones have it: a row that was changed since is told as an error, also where it is only waited for.
    server.query("SET GLOBAL innodb_snapshot_isolation = ON");
    let mut stage = Stage::at(&url, TempDir::new().unwrap()).await;
    let volume = stage.volume();
    let backup = stage.backup(&volume, None);
    let in_state = |what: &str, state: &str| {
        format!("SELECT {what} FROM information_schema.processlist WHERE state = '{state}'")
    };
    let sleeping = in_state("COUNT(*)", "User sleep");
    let waiting = "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'";

    let child = stage.backup(&volume, Some(&backup));
    let run = |sql: &str| {
        let mut client = server.command("sql", &["--execute", sql]);
        client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let holder = run("SELECT GET_LOCK('go', 600); SELECT SLEEP(600)");
    server.until(&sleeping, |count| count == "1").await;
    let other = run(&format!(
        "BEGIN; UPDATE backups SET num_dependent_backups = 5 WHERE id = '{backup}'; SELECT GET_LOCK('go', 600); COMMIT"
    ));
    server.until(&in_state("COUNT(*)", "User lock"), |count| count == "1").await;
    let (database, id) = (stage.database.clone(), child.clone());
    let finishing = tokio::spawn(async move { database.finish_backup(&id, &Changes::new()).await });
    server.until(waiting, |count| count == "1").await;
    // Then the other one is done.
    server.query(&format!("KILL {}", server.query(&in_state("id", "User sleep"))));
    assert_eq!(finishing.await.unwrap().unwrap(), Finished::Available);
    for mut client in [holder, other] {
        client.wait().unwrap();
    }
    assert_eq!(stage.database.backup(&backup).await.unwrap().unwrap().num_dependent_backups, 6);
    let waits =
        json!({ "table": "volumes", "id": volume, "status": "backing-up", "previous_status": "in-use" });
    stage.ask("set", waits);

    let lock = format!("BEGIN; SELECT id FROM backups WHERE id = '{backup}' FOR UPDATE; SELECT SLEEP(600)");
    let mut other = server.command("sql", &["--execute", &lock]).stdout(Stdio::null()).spawn().unwrap();
    server.until(&sleeping, |count| count == "1").await;
    let (database, id) = (stage.database.clone(), backup.clone());
    let failing = tokio::spawn(async move { database.fail_backup(&id, "the store is full").await });
    server.until(waiting, |count| count == "1").await;

    server.run("restart", &[]);

    assert!(failing.await.unwrap().unwrap());
    other.wait().unwrap();
    assert_eq!(stage.columns("volumes", &volume, &["status"]), texts(["in-use"]));
    let row = stage.database.backup(&backup).await.unwrap().unwrap();
    assert_eq!((row.status.as_str(), row.fail_reason.as_deref()), ("error", Some("the store is full")));

    // One that is away at the start is waited for; and the number and the age of connections are what was said.
    server.query("CREATE USER few@'%' IDENTIFIED BY 'few'; GRANT ALL ON *.* TO few@'%'");
    server.run("down", &[]);
    let url = DatabaseUrl::parse(&url.replace("cinder:cinder@", "few:few@")).unwrap();
    let connections = Connections {
        count_max: 2,
        wait_seconds_max: 20,
        age_seconds_max: Some(1),
        tries_max: Some(1000),
        retry_seconds: 0,
    };
    let first = Connections { wait_seconds_max: 1, tries_max: Some(2), ..connections.clone() };
    let error = Database::connect(&url, &first).await.unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error}");
    let connecting = tokio::spawn(async move {
        let connections = Connections { wait_seconds_max: 1, ..connections };
        Database::connect(&url, &connections).await
    });
    server.run("restart", &[]);
    let database = connecting.await.unwrap().unwrap();
    let all = "SELECT GROUP_CONCAT(id ORDER BY id) FROM information_schema.processlist WHERE user = 'few'";
    let mut seen = Vec::new();
    let mut rounds = 0;
    // Until all that were there at first were replaced.
    while rounds < 200 && seen.len() < 4 {
        rounds += 1;
        let reads = (0..10).map(|_| database.backup(&backup));
        for read in futures_util::future::join_all(reads).await {
            assert!(read.unwrap().is_some());
        }
        let now = server.query(all);
        let now: Vec<String> = now.split(',').map(str::to_owned).collect();
        assert!(now.len() <= 2, "{now:?}");
        seen.extend(now.into_iter().filter(|id| !seen.contains(id)).collect::<Vec<_>>());
    }
    assert!(seen.len() >= 4, "the same connections all the time: {seen:?}");
}
