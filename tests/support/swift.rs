//! The servers for Swift that all tests share: OpenStack's own with a Keystone, and Ceph's gateway.

use std::fs;
use std::path::Path;
use std::process::Command;

use backhaul::store::{Credentials, Endpoint, HttpSettings, Secret, SecretFrom, SwiftSettings};
use serde_json::{Value, json};
use tempfile::TempDir;
use url::Url;
use uuid::Uuid;

/// The container of tests that need none of their own; every test needs names of its own in it.
pub(crate) const CONTAINER: &str = "tests";

/// How long a token of [`hasty_url`] is good for.
pub(crate) const HASTY_SECONDS: u64 = 2;

/// Where to log in to OpenStack's Swift, which `make test` starts for all tests, with a user and a key.
pub(crate) fn url() -> String {
    said_by_swift("url")
}

/// The same where tokens expire soon.
pub(crate) fn hasty_url() -> String {
    said_by_swift("hasty")
}

/// The Keystone beside it, with a user who has the project `backups`, and a password.
pub(crate) fn keystone_url() -> String {
    said_by_swift("keystone")
}

/// The same with an application credential and its secret.
pub(crate) fn application_url() -> String {
    said_by_swift("application")
}

/// Where to log in to the gateway.
pub(crate) fn gateway_url() -> String {
    read(Path::new(&variable("BACKHAUL_TEST_SWIFT_GATEWAY")))
}

fn said_by_swift(file: &str) -> String {
    read(&Path::new(&variable("BACKHAUL_TEST_SWIFT")).join(file))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap().trim_end().into()
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} says nothing of a server for Swift: run `make test`, which starts one")
    })
}

/// A name that no container has yet.
pub(crate) fn new_container() -> String {
    format!("test-{}", Uuid::new_v4())
}

/// The user and the key that a URL has.
pub(crate) fn user_and_key(url: &str) -> (String, String) {
    let url = Url::parse(url).unwrap();
    // A colon in it is written as %3A.
    let plain = |text: &str| url::form_urlencoded::parse(text.as_bytes()).next().unwrap().0.into_owned();
    (plain(url.username()), plain(url.password().unwrap()))
}

/// How the server at this URL is used with that container, by Swift's own way to log in.
pub(crate) fn settings(url: &str, container: &str) -> SwiftSettings {
    let (user, key) = user_and_key(url);
    let credentials = Credentials::V1 { user, key: SecretFrom::Setting(Secret::new(key)) };
    settings_with(url, credentials, Endpoint::Told, container)
}

/// The same through Keystone.
pub(crate) fn keystone_settings(container: &str) -> SwiftSettings {
    let url = keystone_url();
    let (user, password) = user_and_key(&url);
    let credentials = Credentials::Password {
        user,
        user_domain: "Default".into(),
        project: "backups".into(),
        project_domain: "Default".into(),
        password: SecretFrom::Setting(Secret::new(password)),
    };
    settings_with(&url, credentials, of_catalog(), container)
}

/// The same with an application credential.
pub(crate) fn application_settings(container: &str) -> SwiftSettings {
    let url = application_url();
    let (id, secret) = user_and_key(&url);
    let credentials =
        Credentials::ApplicationCredential { id, secret: SecretFrom::Setting(Secret::new(secret)) };
    settings_with(&url, credentials, of_catalog(), container)
}

fn of_catalog() -> Endpoint {
    Endpoint::Catalog {
        service_type: "object-store".into(),
        interface: "public".into(),
        region: Some("here".into()),
    }
}

fn settings_with(url: &str, credentials: Credentials, endpoint: Endpoint, container: &str) -> SwiftSettings {
    let mut auth_url = Url::parse(url).unwrap();
    auth_url.set_username("").unwrap();
    auth_url.set_password(None).unwrap();
    SwiftSettings {
        auth_url,
        credentials,
        endpoint,
        container: container.into(),
        create_containers: true,
        storage_policy: None,
        http: HttpSettings::default(),
    }
}

/// A token, and the account that it is for, of Swift's own way to log in.
pub(crate) async fn token(url: &str) -> (String, String) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (user, key) = user_and_key(url);
    let login = reqwest::Client::new().get(settings(url, CONTAINER).auth_url);
    let answer = login.header("x-auth-user", user).header("x-auth-key", key).send().await.unwrap();
    let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    (header("x-auth-token"), header("x-storage-url"))
}

/// The storage policy of a container of OpenStack's Swift.
pub(crate) async fn policy_of(container: &str) -> String {
    let (token, account) = token(&url()).await;
    let request = reqwest::Client::new().head(format!("{account}/{container}"));
    let answer = request.header("x-auth-token", token).send().await.unwrap();
    answer.headers()["x-storage-policy"].to_str().unwrap().into()
}

/// The account of the project `backups`, as Keystone has it in its catalog.
pub(crate) async fn keystone_account() -> String {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (user, password) = user_and_key(&keystone_url());
    let domain = json!({ "name": "Default" });
    let login = json!({ "auth": {
        "identity": {
            "methods": ["password"],
            "password": { "user": { "name": user, "domain": domain, "password": password } },
        },
        "scope": { "project": { "name": "backups", "domain": domain } },
    } });
    let tokens = format!("{}/auth/tokens", keystone_settings(CONTAINER).auth_url);
    let request = reqwest::Client::new().post(tokens).header("content-type", "application/json");
    let answer = request.body(login.to_string()).send().await.unwrap().text().await.unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let services = answer["token"]["catalog"].as_array().unwrap();
    let swift = services.iter().find(|service| service["type"] == "object-store").unwrap();
    let endpoints = swift["endpoints"].as_array().unwrap();
    let is_ours = |endpoint: &&Value| endpoint["interface"] == "public" && endpoint["region"] == "here";
    endpoints.iter().find(is_ours).unwrap()["url"].as_str().unwrap().into()
}

/// Logs in as `settings` say by Swift's own way, and asks for the account with that token again and again; ends when
/// the server does not take it any more.
pub(crate) async fn until_a_token_has_expired(url: &str) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let settings = settings(url, CONTAINER);
    let (user, key) = user_and_key(url);
    let client = reqwest::Client::new();
    let login = client.get(settings.auth_url).header("x-auth-user", user).header("x-auth-key", key);
    let login = login.send().await.unwrap();
    let header = |name: &str| login.headers()[name].to_str().unwrap().to_owned();
    let (token, account) = (header("x-auth-token"), header("x-storage-url"));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while client.head(&account).header("x-auth-token", &token).send().await.unwrap().status() != 401 {
        assert!(std::time::Instant::now() < deadline, "the token does not expire");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// An OpenStack Swift of one's own, which may be stopped.
pub(crate) struct Own(TempDir);

impl Own {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    /// Starts what of it does not run, with what it had. Gives where to log in, which stays the same.
    pub(crate) fn up(&self) -> String {
        self.run("up", &[]).trim_end().into()
    }

    /// Stops who speaks to clients. Those behind it stay, so that listings have what was written when it died.
    pub(crate) fn down_in_front(&self) {
        self.run("down", &["proxy"]);
    }

    fn run(&self, command: &str, servers: &[&str]) -> String {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/dev/swift.sh");
        let output = Command::new(script).arg(command).arg(self.0.path()).args(servers).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.run("down", &[]);
    }
}
