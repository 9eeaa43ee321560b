//! Single requests to the JSON API of Google Cloud Storage: with a token, sent until there is an answer, and the answer read.

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use url::Url;

use super::login::{self, Token};
use super::{GcsSettings, Place};
use crate::store::http::{Failure, Http, Payload, Refusal, server_of};
use crate::store::logins::Logins;
use crate::store::{Error, Reason, Result};

/// How many tokens in a row may have expired before a request was answered.
const RENEWALS_MAX: usize = 3;
/// How much of what a server says is passed on.
const TOLD_CHARS_MAX: usize = 200;

/// A server, with a service account unless we are nobody there.
pub(super) struct Api {
    pub(super) http: Http,
    pub(super) settings: GcsSettings,
    logins: Option<Logins<Token>>,
    /// The project of new buckets, if it is known.
    pub(super) project: Option<String>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The rest holds keys and tokens.
        f.debug_struct("Api").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A request about what lies at the end of a path.
pub(super) struct Request<'a> {
    method: Method,
    path: Vec<&'a str>,
    query: Vec<(&'a str, &'a str)>,
    headers: Vec<(&'a str, String)>,
    body: Payload,
}

impl<'a> Request<'a> {
    /// About something else than a bucket or an object.
    pub(super) fn to(method: Method, path: &[&'a str]) -> Self {
        let body = Payload::Bytes(Bytes::new());
        Self { method, path: path.into(), query: Vec::new(), headers: Vec::new(), body }
    }

    /// About an object.
    pub(super) fn object(method: Method, place: &'a Place) -> Self {
        Self::to(method, &["storage", "v1", "b", &place.bucket, "o", &place.key])
    }

    /// That makes an object of another one.
    pub(super) fn copy(from: &'a Place, to: &'a Place) -> Self {
        let path =
            ["storage", "v1", "b", &from.bucket, "o", &from.key, "rewriteTo", "b", &to.bucket, "o", &to.key];
        Self::to(Method::POST, &path).query("fields", "done,rewriteToken")
    }

    /// About the objects of a bucket.
    pub(super) fn objects(method: Method, bucket: &'a str) -> Self {
        Self::to(method, &["storage", "v1", "b", bucket, "o"])
    }

    /// About an object that is to be written.
    pub(super) fn upload(method: Method, place: &'a Place) -> Self {
        Self::to(method, &["upload", "storage", "v1", "b", &place.bucket, "o"]).query("name", &place.key)
    }

    pub(super) fn query(mut self, name: &'a str, value: &'a str) -> Self {
        self.query.push((name, value));
        self
    }

    pub(super) fn header(mut self, name: &'a str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) fn body(self, kind: &str, body: impl Into<Payload>) -> Self {
        let request = self.header(CONTENT_TYPE.as_str(), kind);
        Self { body: body.into(), ..request }
    }
}

impl Api {
    pub(super) fn new(settings: GcsSettings) -> Result<Self> {
        let http = Http::new(&settings.http)?;
        let (logins, project_of_key) = match &settings.credentials_file {
            Some(path) => {
                let (logins, project) = login::logins(http.clone(), path)?;
                (Some(logins), project)
            }
            None => (None, None),
        };
        let project = settings.project.clone().or(project_of_key);
        Ok(Self { http, settings, logins, project })
    }

    /// Sends a request until there is an answer, and reads the whole of it.
    pub(super) async fn call(&self, request: &Request<'_>) -> std::result::Result<Bytes, Failure> {
        self.http.until_answered(|| self.call_once(request)).await.map(|(_, _, body)| body)
    }

    /// The same, but gives up at the first failure, and tells the status of the answer.
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
    /// failure, but for the one that an upload may go on.
    async fn send(&self, request: &Request<'_>) -> std::result::Result<Response, Failure> {
        let mut token = self.token().await?;
        let mut renewals = 0;
        loop {
            let mut builder = self.http.client().request(request.method.clone(), self.url_of(request));
            if let Some(token) = &token {
                builder = builder.header(AUTHORIZATION, token.authorization.clone());
            }
            for (name, value) in &request.headers {
                builder = builder.header(*name, value);
            }
            let answer = self.http.send(builder, request.body.clone()).await?;
            if answer.status().is_success() || answer.status() == StatusCode::PERMANENT_REDIRECT {
                return Ok(answer);
            }
            let expired = match (answer.status(), &self.logins, token) {
                (StatusCode::UNAUTHORIZED, Some(logins), Some(token)) if renewals < RENEWALS_MAX => {
                    (logins, token)
                }
                _ => return Err(refused(&self.http, answer).await),
            };
            token = Some(expired.0.current(Some(&expired.1)).await?);
            renewals += 1;
        }
    }

    /// The token for a request; none if we are nobody.
    async fn token(&self) -> std::result::Result<Option<Arc<Token>>, Failure> {
        let Some(logins) = &self.logins else { return Ok(None) };
        let token = logins.current(None).await?;
        match token.is_old() {
            true => logins.current(Some(&token)).await.map(Some),
            false => Ok(Some(token)),
        }
    }

    fn url_of(&self, request: &Request<'_>) -> Url {
        let mut url = self.settings.endpoint.clone();
        // Only a URL such as `mailto:` has no path.
        if let Ok(mut path) = url.path_segments_mut() {
            // The slashes of a name are a part of it.
            path.pop_if_empty().extend(&request.path);
        }
        if !request.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.query);
        }
        url
    }

    /// The path of an object, as it stands in a request that has others in it.
    pub(super) fn path_of(&self, place: &Place) -> String {
        self.url_of(&Request::object(Method::DELETE, place)).path().to_owned()
    }
}

/// What a failure means to whoever asked for this `action` on an object of `bucket`.
pub(super) fn explain(action: &'static str, object: impl ToString, bucket: &str, failure: Failure) -> Error {
    let told = |text: String| Reason::Other(Arc::new(io::Error::new(ErrorKind::PermissionDenied, text)));
    let reason = match failure {
        Failure::Refused(refusal) => match refusal.status {
            StatusCode::NOT_FOUND => Reason::Missing,
            StatusCode::PRECONDITION_FAILED => Reason::Exists,
            StatusCode::UNAUTHORIZED => told(format!(
                "the server wants to know who we are, or does not believe it, see credentials_file: {refusal}"
            )),
            StatusCode::FORBIDDEN => told(format!(
                "the service account may not do that in bucket {bucket}, give it the right to: {refusal}"
            )),
            StatusCode::INSUFFICIENT_STORAGE => Reason::Full,
            _ => Failure::Refused(refusal).into(),
        },
        failure => failure.into(),
    };
    Error::new(action, object, reason)
}

/// Reads the document that an answer is.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> std::result::Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        let error = format!(
            "the answer is not what is answered to such a request ({error}): is the URL of the server right?"
        );
        Failure::unusable(ErrorKind::InvalidData, error)
    })
}

/// Reads an answer that says no, which need not say why.
pub(super) async fn refused(http: &Http, answer: Response) -> Failure {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Answer {
        /// Of the JSON API.
        Api { error: ApiError },
        /// Of who gives tokens.
        Login { error: String, error_description: Option<String> },
    }

    #[derive(Deserialize)]
    struct ApiError {
        #[serde(default)]
        message: String,
        #[serde(default)]
        errors: Vec<Detail>,
    }

    #[derive(Deserialize)]
    struct Detail {
        #[serde(default)]
        reason: String,
    }

    let (server, status, headers) = (server_of(answer.url()), answer.status(), answer.headers().clone());
    let body = match http.whole(answer).await {
        Ok(body) => body,
        Err(failure) => return failure,
    };
    let (code, message) = match serde_json::from_slice(&body) {
        Ok(Answer::Api { error }) => {
            (error.errors.into_iter().next().map(|detail| detail.reason), error.message)
        }
        Ok(Answer::Login { error, error_description }) => {
            (Some(error), error_description.unwrap_or_default())
        }
        // It may be of whoever stands before the server.
        Err(_) => {
            let text = String::from_utf8_lossy(&body);
            let said = if text.trim_start().starts_with('<') { "" } else { text.trim() };
            (None, said.to_owned())
        }
    };
    let message = message.chars().take(TOLD_CHARS_MAX).collect();
    Failure::answer(Refusal { server, status, code: code.unwrap_or_default(), message }, &headers)
}

/// What is said of an object.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Object {
    /// In base64.
    #[serde(default)]
    pub(super) md5_hash: String,
    #[serde(default)]
    pub(super) metadata: Metadata,
}

/// What we say of an object.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Metadata {
    /// Which write it is of; empty if it is none of ours.
    #[serde(default)]
    pub(super) backhaul_write_id: String,
}

/// How far a copy is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Copied {
    pub(super) done: bool,
    /// What to go on with.
    pub(super) rewrite_token: Option<String>,
}

/// A page of the objects of a bucket.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Page {
    #[serde(default)]
    pub(super) items: Vec<Entry>,
    pub(super) next_page_token: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Numbers of 64 bits are texts, and that of nothing need not be there.
    pub(super) size: Option<String>,
    /// When it was written.
    pub(super) updated: Option<String>,
}
