//! The Barbican that all tests share, and users of the Keystone that it believes.

use std::fs;
use std::path::{Path, PathBuf};

use backhaul::cinder::conf::{Conf, Settings, Source};
use backhaul::message::oslo::Context;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use url::Url;
use uuid::Uuid;

use super::openstack::text;
use super::swift::{keystone_url, user_and_key};

/// Somebody who asks Barbican for something.
pub(crate) struct Barbican {
    client: reqwest::Client,
    token: String,
}

impl Barbican {
    /// A user with the role `member` in the project `backups`.
    pub(crate) async fn as_member() -> Self {
        Self::of("member", "backups").await
    }

    /// The same in another project.
    pub(crate) async fn as_stranger() -> Self {
        Self::of("stranger", "strangers").await
    }

    /// The user of [`as_member`](Self::as_member) in a project that nobody else has.
    pub(crate) async fn in_a_new_project() -> Self {
        let (client, auth_url) = (client(), login(&said("member")).0);
        let token = log_in(&client, &keystone_url(), "backups").await;
        let ask = async |method: Method, path: &str, body: Value| {
            let request = client.request(method, format!("{auth_url}/{path}")).header("x-auth-token", &token);
            let request = request.header("content-type", "application/json").body(body.to_string());
            of_success(request.send().await.unwrap()).await
        };
        let name = format!("project-{}", Uuid::new_v4());
        let project = json!({ "project": { "name": name, "domain_id": "default" } });
        let project = text(&ask(Method::POST, "projects", project).await["project"]["id"]);
        let user = text(&ask(Method::GET, "users?name=member", json!({})).await["users"][0]["id"]);
        let role = text(&ask(Method::GET, "roles?name=member", json!({})).await["roles"][0]["id"]);
        let path = format!("projects/{project}/users/{user}/roles/{role}");
        ask(Method::PUT, &path, json!({})).await;
        Self::of("member", &name).await
    }

    async fn of(user: &str, project: &str) -> Self {
        let client = client();
        let token = log_in(&client, &said(user), project).await;
        Self { client, token }
    }

    /// What opens it.
    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// The context of a request of this user, with a catalog in which Barbican is at this URL, as Cinder's API passes it on.
    pub(crate) fn context_at(&self, url: &str) -> Context {
        context(&self.token, json!([{ "region": "here", "publicURL": url }]))
    }

    /// The same with the real one.
    pub(crate) fn context(&self) -> Context {
        self.context_at(&url())
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}/v1/{path}", url()));
        request.header("x-auth-token", &self.token).header("openstack-api-version", "key-manager 1.1")
    }

    async fn send(&self, method: Method, path: &str, body: &Value) -> Value {
        let request = self.request(method, path).header("content-type", "application/json");
        of_success(request.body(body.to_string()).send().await.unwrap()).await
    }

    /// A new key for volumes, by its id.
    pub(crate) async fn new_key(&self, key: &[u8]) -> String {
        let made = json!({
            "algorithm": "aes", "bit_length": key.len() * 8, "secret_type": "symmetric",
            "payload": BASE64_STANDARD.encode(key),
            "payload_content_type": "application/octet-stream", "payload_content_encoding": "base64",
        });
        id(&self.send(Method::POST, "secrets", &made).await["secret_ref"])
    }

    /// All keys that are called so.
    pub(crate) async fn named(&self, name: &str) -> Vec<String> {
        let answer = self.request(Method::GET, &format!("secrets?name={name}")).send().await.unwrap();
        let found = of_success(answer).await;
        found["secrets"].as_array().unwrap().iter().map(|secret| id(&secret["secret_ref"])).collect()
    }

    /// How many keys the project has.
    pub(crate) async fn count(&self) -> u64 {
        let answer = self.request(Method::GET, "secrets").send().await.unwrap();
        of_success(answer).await["total"].as_u64().unwrap()
    }

    /// What is known of a key; nothing if it is not there.
    pub(crate) async fn describe(&self, id: &str) -> Option<Value> {
        let answer = self.request(Method::GET, &format!("secrets/{id}")).send().await.unwrap();
        match answer.status() {
            StatusCode::NOT_FOUND => None,
            _ => Some(of_success(answer).await),
        }
    }

    /// The key itself.
    pub(crate) async fn key(&self, id: &str) -> Vec<u8> {
        let request = self.request(Method::GET, &format!("secrets/{id}/payload"));
        let answer = request.header("accept", "application/octet-stream").send().await.unwrap();
        assert!(answer.status().is_success(), "{id}: {}", answer.status());
        answer.bytes().await.unwrap().to_vec()
    }

    /// Says that somebody uses a key.
    pub(crate) async fn add_consumer(&self, id: &str) {
        let consumer = json!({ "service": "image", "resource_type": "image", "resource_id": id });
        self.send(Method::POST, &format!("secrets/{id}/consumers"), &consumer).await;
    }
}

/// The context of a request with this token, and these endpoints of Barbican in its catalog.
pub(crate) fn context(token: &str, endpoints: Value) -> Context {
    let mut context = Context::default();
    context.set("auth_token", json!(token));
    let swift = json!({ "type": "object-store", "name": "swift", "endpoints": [{ "publicURL": "http://127.0.0.1:1" }] });
    let barbican = json!({ "type": "key-manager", "name": "barbican", "endpoints": endpoints });
    context.set("service_catalog", json!([swift, barbican]));
    context
}

/// What a `cinder.conf` says.
pub(crate) fn conf(text: &str) -> Conf {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cinder.conf");
    fs::write(&path, text).unwrap();
    Conf::new(&Settings::read(&[Source::File(path)]).unwrap()).unwrap()
}

/// Where it is.
pub(crate) fn url() -> String {
    said("url")
}

fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// A token of the user in a URL, for a project.
async fn log_in(client: &reqwest::Client, url: &str, project: &str) -> String {
    let (auth_url, user, password) = login(url);
    let domain = json!({ "name": "Default" });
    let user = json!({ "name": user, "domain": domain, "password": password });
    let body = json!({ "auth": {
        "identity": { "methods": ["password"], "password": { "user": user } },
        "scope": { "project": { "name": project, "domain": domain } },
    }});
    let request = client.post(format!("{auth_url}/auth/tokens")).header("content-type", "application/json");
    let answer = request.body(body.to_string()).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::CREATED);
    answer.headers()["x-subject-token"].to_str().unwrap().into()
}

/// Where and how `member`, `stranger` or `service` logs in: the URL of Keystone, the user and the password.
pub(crate) fn login_of(user: &str) -> (String, String, String) {
    login(&said(user))
}

/// The URL without the user and the password in it, and those.
fn login(said: &str) -> (String, String, String) {
    let (user, password) = user_and_key(said);
    let mut url = Url::parse(said).unwrap();
    url.set_username("").unwrap();
    url.set_password(None).unwrap();
    (url.into(), user, password)
}

fn said(file: &str) -> String {
    let folder = std::env::var_os("BACKHAUL_TEST_BARBICAN")
        .expect("BACKHAUL_TEST_BARBICAN names no Barbican: run `make test`, which starts one");
    let path = PathBuf::from(folder).join(file);
    fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", Path::display(&path)))
        .trim_end()
        .into()
}

/// The id in a reference to a key.
fn id(reference: &Value) -> String {
    reference.as_str().unwrap().rsplit('/').next().unwrap().into()
}

async fn of_success(answer: Response) -> Value {
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert!(status.is_success(), "{status}: {text}");
    // Some of them say nothing.
    serde_json::from_str(&text).unwrap_or_default()
}
