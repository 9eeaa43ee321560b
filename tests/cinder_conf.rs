//! `cinder.conf` read by us and by the real oslo.config: each option has the same value, or is refused by both.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use backhaul::cinder::conf::{Conf, NOT_OBEYED, OPTIONS, Opt, Settings, Source, Value};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;
use tempfile::TempDir;

/// The real oslo.config with Cinder's options, in a process of its own.
struct Oslo {
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Oslo {
    fn start() -> Self {
        let python =
            std::env::var_os("BACKHAUL_TEST_CINDER").expect("run `make test`, which installs Cinder");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/cinder_options.py");
        let mut process = Command::new(python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (commands, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, commands, answers: BufReader::new(answers) }
    }

    fn read(&mut self, sources: &[Source]) -> serde_json::Value {
        let argument = |source: &Source| match source {
            Source::File(path) => format!("--config-file={}", path.display()),
            Source::Dir(path) => format!("--config-dir={}", path.display()),
        };
        let arguments: Vec<String> = sources.iter().map(argument).collect();
        let options: Vec<[&str; 2]> = options().map(|option| [option.group, option.name]).collect();
        writeln!(self.commands, "{}", json!({ "arguments": arguments, "options": options })).unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }
}

impl Drop for Oslo {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn options() -> impl Iterator<Item = &'static Opt> {
    OPTIONS.iter().flat_map(|options| options.iter())
}

fn ours(sources: &[Source]) -> serde_json::Value {
    let Ok(settings) = Settings::read(sources) else { return serde_json::Value::Null };
    let value = |option: &Opt| match settings.value(option) {
        Err(_) => serde_json::Value::Null,
        Ok(Value::Nothing) => json!([null]),
        Ok(Value::Text(text)) => json!([text]),
        Ok(Value::Integer(number)) => json!([number]),
        Ok(Value::Float(number)) => json!([number]),
        Ok(Value::Bool(value)) => json!([value]),
        Ok(Value::List(items)) => json!([items]),
    };
    options().map(value).collect()
}

/// What the two make of the same files, option by option where they differ.
fn differences(oslo: &mut Oslo, sources: &[Source]) -> Vec<String> {
    let (ours, theirs) = (ours(sources), oslo.read(sources));
    let (Some(our_values), Some(their_values)) = (ours.as_array(), theirs.as_array()) else {
        return if ours == theirs { Vec::new() } else { vec![format!("ours {ours}, theirs {theirs}")] };
    };
    let numbers = |value: &serde_json::Value| value[0].as_f64();
    let same = |(ours, theirs): (&serde_json::Value, &serde_json::Value)| {
        ours == theirs || numbers(ours).is_some() && numbers(ours) == numbers(theirs)
    };
    let differ = options().zip(our_values.iter().zip(their_values)).filter(|(_, both)| !same(*both));
    differ
        .map(|(option, (a, b))| format!("[{}] {}: ours {a}, theirs {b}", option.group, option.name))
        .collect()
}

fn written(folder: &TempDir, name: &str, text: &str) -> Source {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    Source::File(path)
}

/// A file with something of everything that operators write.
const RICH: &str = r#"# Made by an installer.
[DEFAULT]
host = node7
state_path = /srv/cinder   
backup_driver = "cinder.backup.drivers.posix.PosixBackupDriver"
backup_posix_path = ${state_path}/b
backup_swift_url : http://swift:8080/v1/AUTH_
; an old name
backup_driver_status_check_interval = 15
backup_container = 'a
  b'
    c
backup_ceph_user = $$x\$y$
backup_s3_endpoint_url = ${database.max_pool_size}-$my.
backup_max_operations = 1_0
backup_s3_timeout = 1e1
backup_compression_algorithm = ZSTD
restore_discard_excess_bytes = Off
backup_gcs_retry_error_codes = 429, 500 ,503,
backup_share =
backup_swift_object_size =
transport_url = rabbit://a:b@one:5672,c:d@two:5672/v?ssl=no

[Database]
connection = mysql+pymysql://c:p%40@db/cinder?charset=utf8
max_pool_size=9
[oslo_messaging_notifications]
driver = messagingv2
driver = log
topics = notifications,other
[oslo_messaging_rabbit]
kombu_reconnect_timeout = 7
rabbit_quorum_queue = yes
"#;

#[test]
fn a_file_of_an_operator_is_read_as_oslo_config_reads_it() {
    let folder = TempDir::new().unwrap();
    let mut oslo = Oslo::start();
    let rich = written(&folder, "rich.conf", RICH);
    // A `$my.` names a group that is not there, which both refuse.
    assert_eq!(differences(&mut oslo, std::slice::from_ref(&rich)), [""; 0]);
    assert_eq!(differences(&mut oslo, &[written(&folder, "none.conf", "")]), [""; 0]);

    let conf_d = folder.path().join("conf.d");
    fs::create_dir(&conf_d).unwrap();
    for (name, text) in [
        ("20.conf", "[DEFAULT]\nbackup_driver_stats_polling_interval = 20\nhost = twenty\n"),
        (
            "10.conf",
            "[DEFAULT]\nhost = ten\nbackup_file_size = 4096\n[oslo_messaging_notifications]\ndriver = noop\n",
        ),
        ("not.config", "[DEFAULT]\nhost = not\n"),
        (".hidden.conf", "[DEFAULT]\nhost = hidden\n"),
    ] {
        fs::write(conf_d.join(name), text).unwrap();
    }
    let late = written(&folder, "late.conf", "[DEFAULT]\nbackup_driver_status_check_interval = 30\n");
    let dir = Source::Dir(conf_d);
    for sources in [vec![rich.clone(), dir.clone()], vec![dir.clone(), rich.clone()], vec![rich, dir, late]] {
        assert_eq!(differences(&mut oslo, &sources), [""; 0], "{sources:?}");
    }
}

/// Texts between which values of any kind are made up.
// Of options that are not in our list none is referred to: the peer knows no others, and Cinder does.
fn value() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "1",
            "0",
            "true",
            "No",
            "on",
            "15",
            "-3",
            "4.5",
            "1e3",
            "_",
            "1_000",
            "inf",
            "abc",
            "/srv",
            "zlib",
            "GZIP",
            "per_user",
            "shuffle",
            "PLAIN",
            "http://host:80/p",
            "rabbit://",
            ",",
            " ",
            "\t",
            "\"",
            "'",
            "$",
            "$$",
            "\\$",
            "\\",
            "{",
            "}",
            "%",
            ".",
            "#",
            ";",
            "=",
            ":",
            "[",
            "]",
            "é",
            "\u{a0}",
            "\u{b}",
        ])
        .prop_map(str::to_owned),
        prop::sample::select(vec![
            "$host",
            "${state_path}",
            "$state_path/x",
            "${database.max_pool_size}",
            "$database.connection",
            "$backup_driver",
            "${backup_driver_status_check_interval}",
            "$nothing",
            "${oslo_messaging_rabbit.ssl}",
            "${backup_share}",
            "$backup_s3_timeout",
            "${host",
            "${}",
            "$9",
        ])
        .prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat())
}

fn line() -> impl Strategy<Value = String> {
    // Of an address oslo.config looks at more than at its beginning, and of workers it takes no more than processors.
    let odd = ["backup_swift_url", "backup_swift_auth_url", "backup_gcs_proxy_url", "backup_workers"];
    let names: Vec<&str> = options().map(|option| option.name).filter(|name| !odd.contains(name)).collect();
    let old = vec![
        "backup_driver_status_check_interval",
        "rpc_thread_pool_size",
        "kombu_reconnect_timeout",
        "Host",
        "driver",
    ];
    let name = prop_oneof![4 => prop::sample::select(names), 1 => prop::sample::select(old)];
    let sign = prop::sample::select(vec!["=", " = ", ":", " : ", "  =\t"]);
    let quote = prop::sample::select(vec!["", "", "", "\"", "'"]);
    let end = prop::sample::select(vec![
        "\n",
        "\n",
        "\n",
        "\n\n",
        "\r\n",
        "\n  more\n",
        "\n\tmore\n   and more\n",
        "\n#c\n",
        " \n",
    ]);
    let assignment = (name, sign, quote, value(), end)
        .prop_map(|(name, sign, quote, value, end)| format!("{name}{sign}{quote}{value}{quote}{end}"));
    let section = prop::sample::select(vec![
        "[DEFAULT]\n",
        "[database]\n",
        "[Database]\n",
        "[default]\n",
        "[oslo_messaging_rabbit]\n",
        "[oslo_messaging_notifications]\n",
    ]);
    let odd = prop::sample::select(vec![
        "[",
        "[]\n",
        "[x\n",
        "nothing\n",
        "= x\n",
        " x\n",
        "\u{c}\n",
        "[ DEFAULT ]\n",
        "\r",
    ]);
    prop_oneof![
        30 => assignment,
        6 => section.prop_map(str::to_owned),
        2 => Just("# comment\n".to_owned()),
        1 => odd.prop_map(str::to_owned),
    ]
}

#[test]
fn any_files_are_read_as_oslo_config_reads_them() {
    let folder = TempDir::new().unwrap();
    let oslo = std::cell::RefCell::new(Oslo::start());
    let text =
        prop::collection::vec(line(), 0..12).prop_map(|lines| format!("[DEFAULT]\n{}", lines.concat()));
    let config = Config { cases: 400, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&prop::collection::vec(text, 1..4), |texts| {
        let name = |at: usize| format!("{at}.conf");
        let sources: Vec<Source> =
            texts.iter().enumerate().map(|(at, text)| written(&folder, &name(at), text)).collect();
        prop_assert_eq!(differences(&mut oslo.borrow_mut(), &sources), Vec::<String>::new());
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn every_option_has_its_field() {
    let folder = TempDir::new().unwrap();
    let settings = Settings::read(&[written(&folder, "rich.conf", &RICH.replace("-$my.", ""))]);

    // An empty number is nothing to Python, which then fails with it; here it is refused at once.
    let error = Conf::new(settings.as_ref().unwrap()).unwrap_err().to_string();
    assert!(
        error.contains("[DEFAULT] backup_swift_object_size (")
            && error.ends_with("rich.conf:21): must be set"),
        "{error}"
    );

    let text = RICH.replace("-$my.", "").replace("backup_swift_object_size =", "backup_workers = 4");
    let settings = Settings::read(&[written(&folder, "rich.conf", &text)]).unwrap();
    let conf = Conf::new(&settings).unwrap();
    assert_eq!(conf.default.host, "node7");
    assert_eq!(conf.default.backup_posix_path, "/srv/cinder/b");
    assert_eq!(conf.default.backup_container.as_deref(), Some("'a\nb'\nc"));
    assert_eq!(conf.default.backup_driver_stats_polling_interval, 15);
    assert_eq!(conf.default.backup_ceph_pool, "backups");
    assert_eq!(conf.database.connection.reveal(), "mysql+pymysql://c:p%40@db/cinder?charset=utf8");
    assert_eq!(conf.notifications.driver, ["messagingv2", "log"]);
    assert!(conf.rabbit.rabbit_quorum_queue);
    let not_obeyed: Vec<_> = settings.not_obeyed().into_iter().map(|(option, _)| option).collect();
    assert_eq!(
        not_obeyed,
        [
            "backup_workers",
            "backup_container",
            "kombu_missing_consumer_retry_timeout",
            "restore_discard_excess_bytes",
            "backup_gcs_retry_error_codes"
        ]
    );
    assert!(!format!("{conf:?}").contains("p%40"));
}

#[test]
fn an_error_names_file_line_and_option_but_no_value() {
    let folder = TempDir::new().unwrap();
    for (text, expected) in [
        (
            "[DEFAULT]\n\nbackup_workers = hidden\n",
            "[DEFAULT] backup_workers (a.conf:3): write a whole number",
        ),
        (
            "[DEFAULT]\nbackup_mount_attempts = 0\n",
            "[DEFAULT] backup_mount_attempts (a.conf:2): must be at least 1",
        ),
        ("[DEFAULT]\nbackup_file_size = -1\n", "[DEFAULT] backup_file_size (a.conf:2): must not be negative"),
        ("[DEFAULT]\nhost = $host\n", "$host leads back to itself"),
        ("host = a\n", "a.conf:1: an option stands above all sections: write [DEFAULT] before it"),
        ("[DEFAULT]\nhidden\n", "a.conf:2: neither a section nor `name = value`"),
    ] {
        let source = written(&folder, "a.conf", text);
        let error =
            Settings::read(&[source]).and_then(|settings| Conf::new(&settings)).unwrap_err().to_string();
        let error = error.replace(&format!("{}/", folder.path().display()), "");
        assert!(error.ends_with(expected), "{error}");
        assert!(!error.contains("hidden"), "{error}");
    }
    let missing: PathBuf = Path::new("/nowhere/cinder.conf").into();
    let error = Settings::read(&[Source::File(missing)]).unwrap_err().to_string();
    assert_eq!(error, "read /nowhere/cinder.conf");
}

#[test]
fn the_query_of_a_transport_url_goes_before_the_options_of_the_same_names() {
    let folder = TempDir::new().unwrap();
    let conf = |text: &str| {
        let settings = Settings::read(&[written(&folder, "query.conf", text)]).unwrap();
        Conf::new(&settings).map(|conf| (conf, settings))
    };
    let text = "[DEFAULT]\ntransport_url = rabbit://a:hush@b/?heartbeat_timeout_threshold=7&ssl=1&ssl_ca_file=%2fa%24$$b\n\
                [oslo_messaging_rabbit]\nheartbeat_timeout_threshold = 3\nrabbit_interval_max = 4\n\
                [oslo_messaging_notifications]\n\
                transport_url = rabbit://c/?rabbit_quorum_queue=true&use_queue_manager=true\n";

    let (read, settings) = conf(text).unwrap();

    let (rabbit, others) = (&read.rabbit, &read.notifications_rabbit);
    assert_eq!((rabbit.heartbeat_timeout_threshold, rabbit.rabbit_interval_max), (7, 4));
    assert_eq!((rabbit.ssl, rabbit.ssl_ca_file.as_str()), (true, "/a$$b"));
    assert!(!rabbit.rabbit_quorum_queue);
    assert_eq!((others.heartbeat_timeout_threshold, others.rabbit_interval_max, others.ssl), (3, 4, false));
    assert!(others.rabbit_quorum_queue);
    let not_obeyed: Vec<_> = settings.not_obeyed().into_iter().map(|(option, _)| option).collect();
    assert_eq!(not_obeyed, ["use_queue_manager"]);

    for (query, named) in [
        ("colour=red", "colour"),
        ("heartbeat_timeout_threshold=soon", "heartbeat_timeout_threshold"),
        ("kombu_compression=gzip", "kombu_compression"),
    ] {
        let error = conf(&text.replace("ssl=1", query)).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("the query of a transport_url"), "{error}");
        assert!(!error.contains("hush"), "{error}");
    }
}

#[test]
fn every_option_has_its_row_with_its_status_in_the_document() {
    let page = include_str!("../docs/openstack.md");
    let mut statuses: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in page.lines() {
        if let [_, name, status, _, _] = line.split('|').map(str::trim).collect::<Vec<_>>()[..]
            && let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'))
            && ["obeyed", "not obeyed", "refused"].contains(&status)
        {
            statuses.entry(name).or_default().push(status);
        }
    }
    assert!(options().count() > 150);
    for option in options() {
        let rows = statuses.get_mut(option.name).and_then(Vec::pop);
        let status = rows.unwrap_or_else(|| panic!("[{}] {} has no row", option.group, option.name));
        let is_told = NOT_OBEYED.iter().any(|(name, _)| *name == option.name);
        assert_eq!(status == "not obeyed", is_told, "[{}] {}: {status}", option.group, option.name);
    }
    statuses.retain(|_, rows| !rows.is_empty());
    assert!(statuses.is_empty(), "there are no such options: {statuses:?}");
}
