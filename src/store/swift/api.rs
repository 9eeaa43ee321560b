//! Single requests to Swift: with a token, sent until there is an answer, and the answer read.

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use reqwest::header::HeaderMap;
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::OnceCell;
use url::Url;

use super::login::{self, Session};
use super::{OBJECT_BYTES_MAX, SwiftSettings};
use crate::store::http::{Failure, Http, Payload, Refusal, server_of};
use crate::store::logins::Logins;
use crate::store::{Error, Reason, Result};

/// How many tokens in a row may have expired before a request was answered.
const RENEWALS_MAX: usize = 3;
/// How much of what a server says is passed on.
const TOLD_CHARS_MAX: usize = 200;

/// A server, with an account that we log in to when it is needed.
pub(super) struct Api {
    pub(super) http: Http,
    pub(super) settings: SwiftSettings,
    logins: Logins<Session>,
    abilities: OnceCell<Abilities>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The rest holds passwords and tokens.
        f.debug_struct("Api").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A request about an object, about a container if `key` is empty, or about the account if both are.
pub(super) struct Request<'a> {
    method: Method,
    container: &'a str,
    key: &'a str,
    query: Vec<(&'a str, &'a str)>,
    pub(super) headers: Vec<(&'a str, String)>,
    body: Payload,
}

impl<'a> Request<'a> {
    pub(super) fn new(method: Method, container: &'a str, key: &'a str) -> Self {
        let body = Payload::Bytes(Bytes::new());
        Self { method, container, key, query: Vec::new(), headers: Vec::new(), body }
    }

    pub(super) fn query(mut self, query: &[(&'a str, &'a str)]) -> Self {
        self.query.extend(query);
        self
    }

    pub(super) fn header(mut self, name: &'a str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) fn body(self, body: Payload) -> Self {
        Self { body, ..self }
    }
}

impl Api {
    pub(super) fn new(settings: SwiftSettings) -> Result<Self> {
        let http = Http::new(&settings.http)?;
        let logins = login::logins(
            http.clone(),
            settings.auth_url.clone(),
            &settings.credentials,
            settings.endpoint.clone(),
        )?;
        Ok(Self { http, settings, logins, abilities: OnceCell::new() })
    }

    /// Sends a request until there is an answer, and reads the whole of it.
    pub(super) async fn call(
        &self,
        request: &Request<'_>,
    ) -> std::result::Result<(HeaderMap, Bytes), Failure> {
        let (_, headers, body) = self.http.until_answered(|| self.call_once(request)).await?;
        Ok((headers, body))
    }

    /// The same, with the status, but gives up at the first failure.
    pub(super) async fn call_once(
        &self,
        request: &Request<'_>,
    ) -> std::result::Result<(StatusCode, HeaderMap, Bytes), Failure> {
        let mut answer = self.send(request).await?;
        let (status, headers) = (answer.status(), std::mem::take(answer.headers_mut()));
        Ok((status, headers, self.http.whole(answer).await?))
    }

    /// Sends a request until there is an answer, and leaves its body to be read.
    pub(super) async fn open(&self, request: &Request<'_>) -> std::result::Result<Response, Failure> {
        self.http.until_answered(|| self.send(request)).await
    }

    /// Sends a request once, and again with a new token where the old one has expired. An answer that is no success is a
    /// failure.
    async fn send(&self, request: &Request<'_>) -> std::result::Result<Response, Failure> {
        let mut session = self.logins.current(None).await?;
        let mut renewals = 0;
        loop {
            let mut url = url_of(&session.storage_url, request.container, request.key);
            for (name, value) in &request.query {
                match *value {
                    "" => url.query_pairs_mut().append_key_only(name),
                    value => url.query_pairs_mut().append_pair(name, value),
                };
            }
            let mut builder = self.http.client().request(request.method.clone(), url);
            builder = builder.header("x-auth-token", session.token.clone());
            for (name, value) in &request.headers {
                builder = builder.header(*name, value);
            }
            let answer = self.http.send(builder, request.body.clone()).await?;
            if answer.status().is_success() {
                return Ok(answer);
            }
            if answer.status() != StatusCode::UNAUTHORIZED || renewals == RENEWALS_MAX {
                return Err(refused(&self.http, answer).await);
            }
            session = self.logins.current(Some(&session)).await?;
            renewals += 1;
        }
    }

    /// What the server can do, which it is asked once.
    pub(super) async fn abilities(&self) -> std::result::Result<&Abilities, Failure> {
        self.abilities.get_or_try_init(|| self.ask_abilities()).await
    }

    async fn ask_abilities(&self) -> std::result::Result<Abilities, Failure> {
        let ask = || async {
            let session = self.logins.current(None).await?;
            let request = self.http.client().get(info_url(&session.storage_url));
            let answer = self.http.send(request, Bytes::new().into()).await?;
            match answer.status().is_success() {
                true => Ok(serde_json::from_slice(&self.http.whole(answer).await?).unwrap_or_default()),
                false => Err(refused(&self.http, answer).await),
            }
        };
        match self.http.until_answered(ask).await {
            // Who does not say what it can do gets by with what all can.
            Err(Failure::Refused(_)) => Ok(Abilities::default()),
            answer => answer,
        }
    }
}

/// What a server says of itself.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Abilities {
    swift: Option<OfListings>,
    bulk_delete: Option<OfDeletes>,
}

#[derive(Debug, Deserialize)]
struct OfListings {
    container_listing_limit: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct OfDeletes {
    max_deletes_per_request: Option<usize>,
}

impl Abilities {
    /// The most names that it lets one ask for.
    pub(super) fn page_names_max(&self) -> u64 {
        self.swift.as_ref().and_then(|swift| swift.container_listing_limit).unwrap_or(u64::MAX)
    }

    /// The most objects that it deletes with one request, if it does that at all.
    pub(super) fn deletes_max(&self) -> Option<usize> {
        // Everybody takes that many.
        const USUAL: usize = 1000;
        self.bulk_delete.as_ref().map(|bulk| bulk.max_deletes_per_request.unwrap_or(USUAL).max(1))
    }
}

/// The URL of an object, a container or the account itself.
fn url_of(account: &Url, container: &str, key: &str) -> Url {
    let mut url = account.clone();
    // Only a URL such as `mailto:` has no path.
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty();
        if !container.is_empty() {
            path.push(container);
        }
        if !key.is_empty() {
            path.extend(key.split('/'));
        }
    }
    url
}

/// Where a server says what it can do: where its versions begin.
fn info_url(account: &Url) -> Url {
    let mut url = account.clone();
    let path = account.path().split_once("/v1").map_or("", |(before, _)| before);
    url.set_path(&format!("{path}/info"));
    url
}

/// The paths of these objects, as the body of a request that deletes them all.
pub(super) fn lines<'a>(objects: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut lines = String::new();
    let mut root = Url::parse("http://localhost").ok();
    for (container, key) in objects {
        if let Some(root) = &mut root {
            lines += url_of(root, container, key).path();
            lines.push('\n');
        }
    }
    lines
}

/// What a failure means to whoever asked for this `action` on an object of `container`.
pub(super) fn explain(
    action: &'static str,
    object: impl ToString,
    container: &str,
    failure: Failure,
) -> Error {
    let told = |kind, text: String| Reason::Other(Arc::new(io::Error::new(kind, text)));
    let reason = match failure {
        Failure::Refused(refusal) => match refusal.status {
            StatusCode::NOT_FOUND => Reason::Missing,
            StatusCode::UNAUTHORIZED => {
                let text = format!(
                    "the server does not accept its own token: is auth_url the right one for it? {refusal}"
                );
                told(ErrorKind::PermissionDenied, text)
            }
            StatusCode::FORBIDDEN => {
                let text = format!(
                    "the user may not do that in container {container}, give it the right to: {refusal}"
                );
                told(ErrorKind::PermissionDenied, text)
            }
            // Nothing of ours is too large: a quota is used up.
            StatusCode::INSUFFICIENT_STORAGE | StatusCode::PAYLOAD_TOO_LARGE => Reason::Full,
            _ => Failure::Refused(refusal).into(),
        },
        failure => failure.into(),
    };
    Error::new(action, object, reason)
}

/// That an object is larger than what Swift takes at once.
pub(super) fn too_large(object: impl ToString) -> Error {
    let text = format!(
        "it has more than {OBJECT_BYTES_MAX} bytes, which Swift does not take at once: a larger sha_block_bytes makes a \
         shorter list of digests"
    );
    Error::new("write", object, Reason::Other(Arc::new(io::Error::new(ErrorKind::FileTooLarge, text))))
}

/// Reads the document that an answer is.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> std::result::Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        let error = format!(
            "the answer is not what is answered to such a request ({error}): are auth_url and storage_url right?"
        );
        Failure::unusable(ErrorKind::InvalidData, error)
    })
}

/// Reads an answer that says no, which need not say why.
pub(super) async fn refused(http: &Http, answer: Response) -> Failure {
    let (server, status, headers) = (server_of(answer.url()), answer.status(), answer.headers().clone());
    let body = match http.whole(answer).await {
        Ok(body) => body,
        Err(failure) => return failure,
    };
    let text = String::from_utf8_lossy(&body);
    // The pages of Swift say no more than the status does.
    let said = if text.trim_start().starts_with('<') { "" } else { text.trim() };
    let message = said.chars().take(TOLD_CHARS_MAX).collect();
    Failure::answer(Refusal { server, status, code: String::new(), message }, &headers)
}

/// An object of a listing.
#[derive(Deserialize)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) bytes: u64,
    #[serde(default)]
    last_modified: String,
}

impl Entry {
    /// When it was written. Swift leaves out that this is UTC, Ceph's gateway does not.
    pub(super) fn modified(&self) -> Option<Timestamp> {
        self.last_modified.parse().or_else(|_| format!("{}Z", self.last_modified).parse()).ok()
    }
}

/// What became of many objects that were to be deleted at once.
#[derive(Deserialize)]
pub(super) struct BulkAnswer {
    #[serde(rename = "Response Status")]
    pub(super) response_status: String,
    #[serde(rename = "Errors", default)]
    pub(super) errors: Vec<serde_json::Value>,
}
