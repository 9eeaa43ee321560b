//! Encrypted volumes: what becomes of their keys, in a real Barbican that believes a real Keystone, beside a real Castellan, and
//! beside the rest of a real Cinder. `cargo nextest run -E 'test(encrypted::)'`.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use backhaul::error::{Causes, Class};
use backhaul::message::oslo::Context;
use backhaul::stand_in::{KeyError, Keys};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::barbican::{self, Barbican, conf, context};
use crate::support::ceph::Ceph;
use crate::support::link::Link;
use crate::support::openstack::{Openstack, assert_holds, image, run, text};
use crate::support::stack::noise;

const KEY: &[u8] = b"\0the key of a volume, 32 bytes.\xff";
const MIB: usize = 1 << 20;

/// Nobody listens there.
const NOBODY: &str = "http://127.0.0.1:1";

/// Keys in the Barbican at this URL.
fn keys_at(url: &str) -> Keys {
    Keys::new(&conf(&format!("[barbican]\nbarbican_endpoint = {url}\n"))).unwrap()
}

fn keys() -> Keys {
    keys_at(&barbican::url())
}

/// A name that no key has yet.
fn new_name() -> String {
    format!("backhaul-test-{}", Uuid::new_v4())
}

/// Fails unless it says this, is of this class, and shows neither key nor token.
fn assert_says(error: &KeyError, class: Class, expected: &str, token: &str) {
    let told = format!("{} {error:?}", Causes(error));
    assert!(told.contains(expected), "{told}");
    assert_eq!(error.class(), class, "{told}");
    assert!(token.is_empty() || !told.contains(token), "{told}");
    assert!(!told.contains("the key of a volume"), "{told}");
}

#[tokio::test]
async fn a_copy_is_the_same_key_under_another_id_and_is_made_once() {
    let member = Barbican::as_member().await;
    let (original, name, keys) = (member.new_key(KEY).await, new_name(), keys());

    let copy = keys.copy(&member.context(), &original, &name).await.unwrap();

    assert_ne!(copy, original);
    let (described, copied) =
        (member.describe(&original).await.unwrap(), member.describe(&copy).await.unwrap());
    for same in ["algorithm", "bit_length", "secret_type", "content_types", "status"] {
        assert_eq!(copied[same], described[same], "{same}");
    }
    assert_eq!((&copied["name"], &copied["bit_length"]), (&json!(name), &json!(256)));
    assert!(member.key(&copy).await == KEY);
    // As when a message comes again.
    assert_eq!(keys.copy(&member.context(), &original, &name).await.unwrap(), copy);
    assert_eq!(member.named(&name).await, [copy.as_str()]);
    let other = keys.copy(&member.context(), &original, &new_name()).await.unwrap();
    assert!(other != copy && other != original);

    for _ in 0..2 {
        keys.delete(&member.context(), &copy).await.unwrap();
        assert_eq!(member.describe(&copy).await, None);
    }
    for left in [&original, &other] {
        assert!(member.key(left).await == KEY);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_lost_on_its_way_leaves_one_copy() {
    let member = Barbican::as_member().await;
    let (original, link) = (member.new_key(KEY).await, Link::to(&barbican::url()));
    let keys = keys_at(link.url());
    let mut fault_count = 0;
    // Everything that is said for a copy is some 3,000 bytes.
    for cut_after in (100..4000).step_by(150) {
        let name = new_name();
        link.cut_after([cut_after]);
        let copy = keys.copy(&member.context(), &original, &name).await.unwrap();
        assert_eq!(member.named(&name).await, [copy.as_str()], "cut after {cut_after}");
        assert!(member.key(&copy).await == KEY, "cut after {cut_after}");
        keys.delete(&member.context(), &copy).await.unwrap();
        assert_eq!(member.describe(&copy).await, None);
        assert!(link.fault_count() > fault_count, "no connection was cut after {cut_after}");
        fault_count = link.fault_count();
    }
}

#[rstest]
#[case::token_that_is_none("not a token", None, "does not accept the token")]
#[case::no_token("", None, "has no token of its user")]
#[case::key_that_is_not_there("", Some("11111111-1111-4111-8111-111111111111"), "has no such key")]
#[case::no_id("", Some("../../orders"), "no id of a key")]
#[tokio::test]
async fn what_cannot_be_copied_is_told_and_leaves_nothing(
    #[case] token: &str,
    #[case] id: Option<&str>,
    #[case] expected: &str,
) {
    let member = Barbican::as_member().await;
    let (original, name) = (member.new_key(KEY).await, new_name());
    let asks = if id.is_some() { member.context() } else { context(token, json!([])) };

    let error = keys().copy(&asks, id.unwrap_or(&original), &name).await.unwrap_err();

    assert_says(&error, Class::Permanent, expected, token);
    assert_says(&error, Class::Permanent, "copy key", member.token());
    assert_eq!(member.named(&name).await, [""; 0]);
}

#[tokio::test]
async fn the_key_of_another_project_is_neither_copied_nor_deleted() {
    let (member, stranger) = (Barbican::as_member().await, Barbican::as_stranger().await);
    let (original, name, keys) = (member.new_key(KEY).await, new_name(), keys());

    let error = keys.copy(&stranger.context(), &original, &name).await.unwrap_err();
    assert_says(&error, Class::Permanent, "may not do that", stranger.token());
    let error = keys.delete(&stranger.context(), &original).await.unwrap_err();
    assert_says(&error, Class::Permanent, "may not do that", stranger.token());

    assert_eq!(stranger.named(&name).await, [""; 0]);
    assert!(member.key(&original).await == KEY);
}

#[tokio::test]
async fn a_server_that_is_away_or_fails_may_come_back() {
    let member = Barbican::as_member().await;
    let original = member.new_key(KEY).await;
    let error = keys_at(NOBODY).copy(&member.context(), &original, &new_name()).await.unwrap_err();
    assert_says(&error, Class::Transient, "no connection to http://127.0.0.1:1", member.token());
    let error = keys_at(NOBODY).delete(&member.context(), &original).await.unwrap_err();
    assert_says(&error, Class::Transient, "delete key", member.token());

    let link = Link::to(&barbican::url());
    link.answer(std::iter::repeat_n(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".into(),
        2,
    ));
    let copy = keys_at(link.url()).copy(&member.context(), &original, &new_name()).await.unwrap();
    assert_eq!(link.answers_left(), 0);
    assert!(member.key(&copy).await == KEY);
}

#[rstest]
#[case::the_first("", None)]
#[case::of_the_region("barbican_region_name = here", None)]
#[case::with_a_version("barbican_region_name = versioned\nbarbican_api_version = v1", None)]
#[case::internal("barbican_endpoint_type = internal", None)]
#[case::of_no_region("barbican_region_name = nowhere", Some("no publicURL of key-manager in region nowhere"))]
#[case::of_no_type("barbican_endpoint_type = admin", Some("no adminURL of key-manager"))]
#[tokio::test]
async fn the_catalog_of_a_request_says_where_barbican_is(
    #[case] options: &str,
    #[case] expected: Option<&str>,
) {
    let member = Barbican::as_member().await;
    let (original, url) = (member.new_key(KEY).await, barbican::url());
    let first = if options.is_empty() { &url } else { NOBODY };
    let endpoints = json!([
        { "region": "first", "publicURL": first },
        { "region": "here", "publicURL": format!("{url}/"), "internalURL": url },
        { "region": "versioned", "publicURL": format!("{url}/v1/") },
    ]);
    let keys = Keys::new(&conf(&format!("[barbican]\n{options}\n"))).unwrap();

    let copied = keys.copy(&context(member.token(), endpoints), &original, &new_name()).await;

    match expected {
        None => assert!(member.key(&copied.unwrap()).await == KEY),
        Some(expected) => assert_says(&copied.unwrap_err(), Class::Permanent, expected, member.token()),
    }
}

/// A section with how a user logs in.
fn login_in(section: &str, user: &str) -> String {
    let (url, user, password) = barbican::login_of(user);
    format!(
        "[{section}]\nauth_url = {url}\nusername = {user}\npassword = {password}\nproject_name = backups\n\
         user_domain_name = Default\nproject_domain_name = Default\n"
    )
}

#[rstest]
#[case::by_its_url(true)]
#[case::where_the_catalog_of_keystone_says(false)]
#[tokio::test]
async fn a_key_that_its_user_may_not_delete_the_service_deletes_itself(#[case] by_url: bool) {
    let (member, stranger) = (Barbican::as_member().await, Barbican::as_stranger().await);
    let endpoint = match by_url {
        true => format!("barbican_endpoint = {}", barbican::url()),
        false => "barbican_region_name = here".into(),
    };
    let login = login_in("keystone_authtoken", "member");
    let keys = Keys::new(&conf(&format!("[barbican]\n{endpoint}\n{login}"))).unwrap();
    for asks in [stranger.context(), context("expired", json!([])), Context::default()] {
        let original = member.new_key(KEY).await;
        keys.delete(&asks, &original).await.unwrap();
        assert_eq!(member.describe(&original).await, None);
        // To copy one the rights of the service are no help, as with Cinder.
        let original = member.new_key(KEY).await;
        keys.copy(&asks, &original, &new_name()).await.unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_of_the_service_goes_with_that_of_the_user_where_that_is_asked_for() {
    let (member, link) = (Barbican::as_member().await, Link::to(&barbican::url()));
    let original = member.new_key(KEY).await;
    let options = format!("[barbican]\nbarbican_endpoint = {}\n", link.url());
    let keys = |further: &str| Keys::new(&conf(&format!("{options}{further}")));

    link.count("x-service-token");
    keys("").unwrap().copy(&member.context(), &original, &new_name()).await.unwrap();
    assert_eq!(link.counted(), 0);
    let with =
        keys(&format!("send_service_user_token = true\n{}", login_in("barbican_service_user", "service")))
            .unwrap();
    with.copy(&member.context(), &original, &new_name()).await.unwrap();
    // It is looked for, described, read and stored.
    assert_eq!(link.counted(), 4);

    let error = keys("send_service_user_token = true\n").err().unwrap();
    assert!(Causes(&error).to_string().contains("[barbican_service_user] auth_url is not set"), "{error}");
}

#[tokio::test]
async fn a_key_that_somebody_says_to_use_is_not_deleted() {
    let member = Barbican::as_member().await;
    let original = member.new_key(KEY).await;
    member.add_consumer(&original).await;
    let error = keys().delete(&member.context(), &original).await.unwrap_err();
    assert_says(&error, Class::Permanent, "1 others have said there that they use it", member.token());
    assert!(member.key(&original).await == KEY);
}

#[tokio::test]
async fn the_fixed_key_of_earlier_days_becomes_one_of_barbicans() {
    const FIXED: &str = "00000000-0000-0000-0000-000000000000";
    let member = Barbican::as_member().await;
    let options = format!("[barbican]\nbarbican_endpoint = {}\n[key_manager]\n", barbican::url());
    let keys = |further: &str| Keys::new(&conf(&format!("{options}{further}"))).unwrap();
    let hex = hex::encode(KEY);

    let copy = keys(&format!("fixed_key = {hex}"));
    let copy = copy.copy(&member.context(), FIXED, &new_name()).await.unwrap();

    let described = member.describe(&copy).await.unwrap();
    assert_eq!((&described["algorithm"], &described["bit_length"]), (&json!("AES"), &json!(256)));
    assert_eq!(described["secret_type"], "symmetric");
    assert!(member.key(&copy).await == KEY);
    keys(&format!("fixed_key = {hex}")).delete(&member.context(), FIXED).await.unwrap();
    let error = keys("fixed_key = hush").copy(&member.context(), FIXED, &new_name()).await.unwrap_err();
    assert_says(&error, Class::Permanent, "not written in hexadecimal digits", "hush");
    let error = keys("").copy(&member.context(), FIXED, &new_name()).await.unwrap_err();
    assert_says(&error, Class::Permanent, "has no such key", "");
}

#[tokio::test]
async fn other_key_managers_need_no_server_or_are_refused() {
    const FIXED: &str = "00000000-0000-0000-0000-000000000000";
    let other = Uuid::new_v4().to_string();
    let keys = |options: &str| Keys::new(&conf(&format!("[key_manager]\n{options}\n"))).unwrap();
    let context = Context::default();

    let own = "backend = cinder.keymgr.conf_key_mgr.ConfKeyManager\nfixed_key = 00ff";
    assert_eq!(keys(own).copy(&context, FIXED, "name").await.unwrap(), FIXED);
    keys(own).delete(&context, FIXED).await.unwrap();
    for (options, key, expected) in [
        (own, other.as_str(), "is not in [key_manager] fixed_key"),
        ("api_class = cinder.keymgr.conf_key_mgr.ConfKeyManager", FIXED, "is not in [key_manager] fixed_key"),
        ("backend = vault", &other, "backend = vault no keys can be had here"),
    ] {
        let error = keys(options).copy(&context, key, "name").await.unwrap_err();
        assert_says(&error, Class::Permanent, expected, "00ff");
        let error = keys(options).delete(&context, key).await.unwrap_err();
        assert_says(&error, Class::Permanent, expected, "00ff");
    }
}

/// What Castellan does with the keys of that Barbican, for Cinder.
fn castellan(member: &Barbican, words: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cinder.conf");
    fs::write(&path, format!("[barbican]\nbarbican_endpoint = {}\n", barbican::url())).unwrap();
    let python = std::env::var_os("BACKHAUL_TEST_CINDER").expect("run `make test`, which installs Cinder");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/castellan_keys.py");
    let output =
        Command::new(python).arg(script).arg(&path).arg(member.token()).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn our_copy_of_a_key_is_what_cinder_would_make_of_it() {
    let member = Barbican::as_member().await;
    let original = text(&castellan(&member, &["create"]));

    let ours = keys().copy(&member.context(), &original, &new_name()).await.unwrap();
    let theirs = text(&castellan(&member, &["clone", &original]));

    let key = castellan(&member, &["get", &original]);
    assert_eq!((&key[0], &key[2]), (&json!("SymmetricKey"), &json!(256)), "{key}");
    assert_eq!(castellan(&member, &["get", &ours]), key);
    let described = async |id: &str| {
        let mut described = member.describe(id).await.unwrap();
        for own in ["name", "secret_ref", "created", "updated"] {
            assert!(described.as_object_mut().unwrap().remove(own).is_some(), "{own}");
        }
        described
    };
    assert_eq!(described(&ours).await, described(&theirs).await);
    // Theirs can be copied and deleted, too.
    let again = keys().copy(&member.context(), &theirs, &new_name()).await.unwrap();
    assert_eq!(castellan(&member, &["get", &again]), key);
    keys().delete(&member.context(), &theirs).await.unwrap();
    assert_eq!(member.describe(&theirs).await, None);
}

/// The control plane, where all that is asked comes with the token of a user in a project of Barbican's that nobody else has.
fn openstack() -> (Ceph, Openstack, Barbican) {
    let (ceph, mut openstack) = (Ceph::shared(), Openstack::shared());
    let member = run(Barbican::in_a_new_project());
    openstack.ok(&["keys", member.token(), &barbican::url()]);
    openstack.configure(&format!("[barbican]\nbarbican_endpoint = {}\n", barbican::url()));
    (ceph, openstack, member)
}

/// A new volume with a new key, as one of an encrypted type has it. Cinder reads and writes it as it is.
fn encrypted_volume(openstack: &mut Openstack, member: &Barbican) -> (String, String) {
    let (volume, key) = (openstack.volume(), run(member.new_key(KEY)));
    openstack.ok(&["set", &volume, &format!("encryption_key_id={key}")]);
    (volume, key)
}

fn key_of(row: &Value) -> String {
    text(&row["encryption_key_id"])
}

#[rstest]
fn each_backup_and_each_restored_volume_of_an_encrypted_volume_has_a_key_of_its_own(
    #[values("ceph", "posix")] driver: &str,
) {
    let (ceph, mut openstack, member) = openstack();
    let _worker = openstack.backhaul(driver, ceph.conf());
    let (volume, key) = encrypted_volume(&mut openstack, &member);
    let (other, others_key) = encrypted_volume(&mut openstack, &member);
    let (with_snapshot, snapshots_key) = encrypted_volume(&mut openstack, &member);
    openstack.ok(&["snapshot", &with_snapshot]);
    let image = image(&ceph, &volume);
    image.write(&[(0, &noise(1, 2 * MIB))]);
    let first = ceph.content(image.spec());

    let full = openstack.backup(&volume, &[]);
    image.write(&[(MIB as u64, &noise(2, MIB))]);
    let incremental = openstack.backup(&volume, &["--incremental"]);

    for backup in [&full, &incremental] {
        assert_eq!(backup["status"], "available", "{backup}");
    }
    assert_eq!(incremental["parent_id"], full["id"]);
    assert_eq!(key_of(&openstack.ok(&["volume", &volume])), key);
    let (full_id, incremental_id) = (text(&full["id"]), text(&incremental["id"]));
    let (full_key, incremental_key) = (key_of(&full), key_of(&incremental));
    let second = ceph.content(image.spec());

    let restored = openstack.restore(&[&full_id]);
    assert_holds(&ceph, &restored, &first);
    let onto_other = openstack.restore(&[&incremental_id, &other]);
    assert_holds(&ceph, &onto_other, &second);
    let onto_snapshots_own = openstack.restore(&[&full_id, &with_snapshot]);
    assert_holds(&ceph, &onto_snapshots_own, &first);
    let onto_itself = openstack.restore(&[&incremental_id, &volume]);
    assert_holds(&ceph, &onto_itself, &second);

    assert_eq!(key_of(&onto_itself), key);
    let all = [
        key.clone(),
        full_key.clone(),
        incremental_key.clone(),
        key_of(&restored),
        key_of(&onto_other),
        key_of(&onto_snapshots_own),
        // Of the snapshot.
        snapshots_key,
    ];
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 7, "{all:?}");
    for id in &all {
        assert!(run(member.key(id)) == KEY, "{id}");
    }
    // The volume has another one now.
    assert!(!all.contains(&others_key));
    assert_eq!(run(member.describe(&others_key)), None);
    for (backup, key) in [(&full_id, &full_key), (&incremental_id, &incremental_key)] {
        assert_eq!(key_of(&openstack.ok(&["show", backup])), *key);
    }

    for (backup, key) in [(&incremental_id, &incremental_key), (&full_id, &full_key)] {
        let deleted = openstack.delete(backup);
        assert_eq!((&deleted["status"], &deleted["encryption_key_id"]), (&json!("deleted"), &Value::Null));
        assert_eq!(run(member.describe(key)), None);
    }
    for id in [&key, &key_of(&restored), &key_of(&onto_other)] {
        assert!(run(member.key(id)) == KEY, "{id}");
    }
}

#[test]
fn a_volume_that_was_not_encrypted_has_no_key_once_it_is_restored() {
    let (ceph, mut openstack, member) = openstack();
    let _worker = openstack.backhaul("posix", ceph.conf());
    let plain = openstack.volume();
    image(&ceph, &plain).write(&[(0, &noise(1, MIB))]);
    let (target, key) = encrypted_volume(&mut openstack, &member);
    let backup = text(&openstack.backup(&plain, &[])["id"]);

    let restored = openstack.restore(&[&backup, &target]);

    assert_holds(&ceph, &restored, &ceph.content(&format!("volumes/volume-{plain}")));
    assert_eq!(restored["encryption_key_id"], Value::Null);
    assert_eq!(run(member.describe(&key)), None);
}

#[test]
fn what_cannot_be_done_with_keys_ends_before_any_data_are_touched() {
    let (ceph, mut openstack, member) = openstack();
    let worker = openstack.backhaul("posix", ceph.conf());
    let (volume, _) = encrypted_volume(&mut openstack, &member);
    image(&ceph, &volume).write(&[(0, &noise(1, MIB))]);
    let backup = openstack.backup(&volume, &[]);
    let (id, key) = (text(&backup["id"]), key_of(&backup));
    let files = openstack.files().len();
    let log_in = |openstack: &mut Openstack, token: &str| openstack.ok(&["keys", token, &barbican::url()]);

    // A token that is none.
    log_in(&mut openstack, "expired");
    let failed = openstack.backup(&volume, &[]);
    assert_eq!(
        (&failed["status"], &failed["encryption_key_id"]),
        (&json!("error"), &Value::Null),
        "{failed}"
    );
    assert!(text(&failed["fail_reason"]).contains("does not accept the token"), "{failed}");
    assert_eq!(openstack.ok(&["volume", &volume])["status"], "available");
    let target = openstack.volume();
    let before = ceph.content(&format!("volumes/volume-{target}"));
    let refused = openstack.restore(&[&id, &target]);
    assert_eq!(
        (&refused["status"], &refused["encryption_key_id"]),
        (&json!("error_restoring"), &Value::Null)
    );
    assert!(ceph.content(&format!("volumes/volume-{target}")) == before, "something was restored");
    let left = openstack.delete(&id);
    assert_eq!((&left["status"], &left["encryption_key_id"]), (&json!("error"), &json!(key)), "{left}");

    // Another type of volumes.
    log_in(&mut openstack, member.token());
    let type_id = Uuid::new_v4();
    openstack.sql(&format!(
        "INSERT INTO volume_types (id, name, created_at, deleted, is_public) VALUES ('{type_id}', '{type_id}', NOW(), 0, 1)"
    ));
    assert_eq!(openstack.delete(&id)["status"], "deleted");
    assert_eq!(run(member.describe(&key)), None);
    assert!(openstack.files().len() < files, "{:?}", openstack.files());
    let id = text(&openstack.backup(&volume, &[])["id"]);
    let (target, targets_key) = encrypted_volume(&mut openstack, &member);
    openstack.ok(&["set", &target, &format!("volume_type_id={type_id}")]);
    let keys = run(member.count());
    let refused = openstack.restore(&[&id, &target]);
    assert_eq!((refused["status"].clone(), key_of(&refused)), (json!("error_restoring"), targets_key));
    assert!(ceph.content(&format!("volumes/volume-{target}")) == before, "something was restored");
    assert!(worker.log().contains("is different than the destination volume type"), "{}", worker.log());
    assert_eq!(run(member.count()), keys);
}

#[test]
fn a_restore_that_fails_leaves_the_volume_its_key_and_no_copy() {
    let (ceph, mut openstack, member) = openstack();
    let _worker = openstack.backhaul("posix", ceph.conf());
    let (volume, _) = encrypted_volume(&mut openstack, &member);
    image(&ceph, &volume).write(&[(0, &noise(1, MIB))]);
    let backup = text(&openstack.backup(&volume, &[])["id"]);
    let object = openstack.files().into_iter().find(|path| path.ends_with("-00001")).unwrap();
    fs::write(object, "damaged").unwrap();
    let (target, key) = encrypted_volume(&mut openstack, &member);
    let keys = run(member.count());

    let failed = openstack.restore(&[&backup, &target]);

    assert_eq!((failed["status"].clone(), key_of(&failed)), (json!("error_restoring"), key.clone()));
    assert!(run(member.key(&key)) == KEY);
    assert_eq!(run(member.count()), keys);
}

#[test]
fn a_chain_of_an_encrypted_volume_is_gone_on_with_by_cinders_own_service_and_by_ours() {
    let (ceph, mut openstack, member) = openstack();
    let (volume, key) = encrypted_volume(&mut openstack, &member);
    let image = image(&ceph, &volume);
    let mut points = Vec::new();
    let mut next = |openstack: &mut Openstack, options: &[&str]| {
        image.write(&[(points.len() as u64 * 8 * MIB as u64, &noise(points.len() as u64, MIB))]);
        let backup = openstack.backup(&volume, options);
        assert_eq!(backup["status"], "available", "{backup}");
        points.push((text(&backup["id"]), key_of(&backup), ceph.content(image.spec())));
    };
    let backhaul = openstack.backhaul("posix", ceph.conf());
    next(&mut openstack, &[]);
    backhaul.stop();
    let cinder = openstack.cinder_backup("posix", ceph.conf());
    next(&mut openstack, &["--incremental"]);

    let mut keys = BTreeSet::from([key]);
    keys.extend(points.iter().map(|(_, key, _)| key.clone()));
    let mut restored = |openstack: &mut Openstack| {
        for (backup, _, content) in &points {
            let volume = openstack.restore(&[backup]);
            assert_holds(&ceph, &volume, content);
            assert!(run(member.key(&key_of(&volume))) == KEY);
            assert!(keys.insert(key_of(&volume)), "{volume} shares its key");
        }
    };
    restored(&mut openstack);
    cinder.stop();
    let _backhaul = openstack.backhaul("posix", ceph.conf());
    restored(&mut openstack);

    assert_eq!(keys.len(), 7);
    for (backup, key, _) in points.iter().rev() {
        assert_eq!(openstack.delete(backup)["status"], "deleted");
        assert_eq!(run(member.describe(key)), None);
    }
}
