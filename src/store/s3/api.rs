//! Single requests to S3: signed, sent until there is an answer, and the answer read.

use std::fmt;
use std::io;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use jiff::Timestamp;
use md5::{Digest, Md5};
use quick_xml::de::from_str;
use reqwest::header::HeaderMap;
use reqwest::{Response, StatusCode};
use rusty_s3::signing::sign;
use rusty_s3::{Bucket, Method, UrlStyle};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::S3Settings;
use crate::store::http::{Failure, Http, Refusal, server_of};
use crate::store::{Error, Reason, Result, Secret};

/// How long a signature is good for: from the time at which a request is made until the server has looked at its head.
const SIGNED_SECONDS: u64 = 900;

/// A server with an access key.
pub(super) struct Api {
    pub(super) http: Http,
    pub(super) settings: S3Settings,
    secret_key: Secret,
    /// What goes with every request about an object's bytes, if they are encrypted by a key of ours.
    sse_c: Vec<(&'static str, String)>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The rest holds keys.
        f.debug_struct("Api").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A request to be signed.
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) bucket: &'a str,
    /// The object; empty for the bucket itself.
    pub(super) key: &'a str,
    pub(super) query: Vec<(&'a str, &'a str)>,
    pub(super) headers: Vec<(&'a str, String)>,
    pub(super) body: Bytes,
    /// Whether it is about an object's bytes, which may be encrypted.
    pub(super) bytes: bool,
}

impl<'a> Request<'a> {
    pub(super) fn new(method: Method, bucket: &'a str, key: &'a str) -> Self {
        Self { method, bucket, key, query: Vec::new(), headers: Vec::new(), body: Bytes::new(), bytes: false }
    }

    /// The same about the bytes of an object.
    pub(super) fn of_bytes(method: Method, bucket: &'a str, key: &'a str) -> Self {
        Self { bytes: true, ..Self::new(method, bucket, key) }
    }

    pub(super) fn query(mut self, query: &[(&'a str, &'a str)]) -> Self {
        self.query.extend(query);
        self
    }

    pub(super) fn header(mut self, name: &'a str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Adds a body with the digest by which the server sees whether it has arrived as it was sent.
    pub(super) async fn body(self, body: Bytes) -> Self {
        let whole = body.clone();
        // Some digests take long enough to hold up others.
        let digest = tokio::task::spawn_blocking(move || md5_of(&whole)).await;
        // Without a digest the body goes unchecked, but nothing here panics.
        let request = match digest {
            Ok(digest) => self.header("content-md5", digest),
            Err(_) => self,
        };
        Self { body, ..request }
    }
}

/// The base64 of the MD5.
fn md5_of(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(Md5::digest(bytes))
}

impl Api {
    pub(super) fn new(settings: S3Settings) -> Result<Self> {
        let mut sse_c = Vec::new();
        if let Some(from) = &settings.sse_c_key {
            let key = from.read_bytes()?;
            if key.len() != 32 {
                let text = format!("it has {} bytes: a key is 32 bytes", key.len());
                let error = io::Error::new(io::ErrorKind::InvalidData, text);
                return Err(Error::io("use the key for SSE-C of", from, error));
            }
            sse_c = vec![
                ("x-amz-server-side-encryption-customer-algorithm", "AES256".into()),
                ("x-amz-server-side-encryption-customer-key", BASE64_STANDARD.encode(&key)),
                ("x-amz-server-side-encryption-customer-key-md5", md5_of(&key)),
            ];
        }
        let (http, secret_key) = (Http::new(&settings.http)?, settings.secret_key.read()?);
        Ok(Self { http, settings, secret_key, sse_c })
    }

    /// What names an object that is to be copied.
    pub(super) fn source(&self, bucket: &str, key: &str) -> Vec<(&'static str, String)> {
        let mut url = self.settings.endpoint.clone();
        url.set_path("");
        // Only a URL such as `mailto:` has no path.
        if let Ok(mut path) = url.path_segments_mut() {
            path.push(bucket).extend(key.split('/'));
        }
        // Some servers take a plus sign for a blank there.
        let mut headers = vec![("x-amz-copy-source", url.path().replace('+', "%2B"))];
        let names = [
            "x-amz-copy-source-server-side-encryption-customer-algorithm",
            "x-amz-copy-source-server-side-encryption-customer-key",
            "x-amz-copy-source-server-side-encryption-customer-key-md5",
        ];
        headers.extend(names.into_iter().zip(self.sse_c.iter().map(|(_, value)| value.clone())));
        headers
    }

    /// Sends a request until there is an answer, and reads the whole of it.
    pub(super) async fn call(
        &self,
        request: &Request<'_>,
    ) -> std::result::Result<(HeaderMap, Bytes), Failure> {
        self.http.until_answered(|| self.call_once(request)).await
    }

    /// The same, but gives up at the first failure.
    pub(super) async fn call_once(
        &self,
        request: &Request<'_>,
    ) -> std::result::Result<(HeaderMap, Bytes), Failure> {
        let mut answer = self.send(request).await?;
        let (server, status) = (server_of(answer.url()), answer.status());
        let headers = std::mem::take(answer.headers_mut());
        let body = self.http.whole(answer).await?;
        // What takes long is answered before it is known whether it can be done.
        match String::from_utf8_lossy(&body) {
            text if is_error(&text) => Err(refused(server, status, &headers, &text)),
            _ => Ok((headers, body)),
        }
    }

    /// Sends a request until there is an answer, and leaves its body to be read.
    pub(super) async fn open(&self, request: &Request<'_>) -> std::result::Result<Response, Failure> {
        self.http.until_answered(|| self.send(request)).await
    }

    /// Sends a request once. An answer that is no success is a failure.
    async fn send(&self, request: &Request<'_>) -> std::result::Result<Response, Failure> {
        let settings = &self.settings;
        let unusable = |error: String| Failure::unusable(io::ErrorKind::InvalidInput, error);
        let style = if settings.path_style { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let bucket =
            Bucket::new(settings.endpoint.clone(), style, request.bucket.to_owned(), settings.region.clone())
                .map_err(|error| unusable(format!("bucket {} has no URL: {error:?}", request.bucket)))?;
        let url = match request.key {
            "" => bucket.base_url().clone(),
            key => bucket.object_url(key),
        };
        let (mut query, mut headers) = (request.query.clone(), request.headers.clone());
        if request.bytes {
            headers.extend(self.sse_c.iter().cloned());
        }
        query.sort_unstable();
        headers.sort_unstable();
        let url = sign(
            &Timestamp::now(),
            request.method,
            url,
            settings.access_key.reveal(),
            self.secret_key.reveal(),
            None,
            &settings.region,
            SIGNED_SECONDS,
            query.iter().copied(),
            headers.iter().map(|(name, value)| (*name, value.as_str())),
        );
        let method = match request.method {
            Method::Head => reqwest::Method::HEAD,
            Method::Get => reqwest::Method::GET,
            Method::Post => reqwest::Method::POST,
            Method::Put => reqwest::Method::PUT,
            Method::Delete => reqwest::Method::DELETE,
        };
        let mut builder = self.http.client().request(method, url);
        for (name, value) in headers {
            builder = builder.header(name, value);
        }
        let answer = self.http.send(builder, request.body.clone().into()).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let (server, status, headers) = (server_of(answer.url()), answer.status(), answer.headers().clone());
        let body = self.http.whole(answer).await?;
        let failure = refused(server, status, &headers, &String::from_utf8_lossy(&body));
        match failure {
            // Whoever stands in front of the server may say that, too, and knows nothing of objects. An answer to HEAD has no body.
            Failure::Refused(refusal)
                if status == StatusCode::NOT_FOUND
                    && refusal.code.is_empty()
                    && request.method != Method::Head =>
            {
                let text =
                    format!("{refusal}, and not as S3 does: is endpoint the URL of a server that speaks S3?");
                Err(Failure::unusable(io::ErrorKind::InvalidData, text))
            }
            failure => Err(failure),
        }
    }
}

/// What a failure means to whoever asked for this `action` on an object of `bucket`.
pub(super) fn explain(action: &'static str, object: impl ToString, bucket: &str, failure: Failure) -> Error {
    let told = |kind, text: String| Reason::Other(std::sync::Arc::new(io::Error::new(kind, text)));
    let reason = match failure {
        Failure::Refused(refusal) => match (refusal.code.as_str(), refusal.status) {
            ("NoSuchKey", _) => Reason::Missing,
            ("PreconditionFailed", _) | (_, StatusCode::PRECONDITION_FAILED) => Reason::Exists,
            ("NoSuchBucket", _) => {
                let server = refusal.server;
                let text =
                    format!("{server} has no bucket {bucket}: make it, or let create_containers do so");
                told(io::ErrorKind::NotFound, text)
            }
            ("InvalidAccessKeyId" | "SignatureDoesNotMatch", _) => {
                let text =
                    format!("the server does not accept access_key and secret_key, correct them: {refusal}");
                told(io::ErrorKind::PermissionDenied, text)
            }
            ("RequestTimeTooSkewed", _) => {
                let text = format!(
                    "the clocks of this machine and the server are too far apart, set them: {refusal}"
                );
                told(io::ErrorKind::PermissionDenied, text)
            }
            ("QuotaExceeded", _) | (_, StatusCode::INSUFFICIENT_STORAGE) => Reason::Full,
            (_, StatusCode::FORBIDDEN) => {
                let text =
                    format!("access_key may not do that in bucket {bucket}, give it the right to: {refusal}");
                told(io::ErrorKind::PermissionDenied, text)
            }
            // An answer to HEAD has no body, so no code.
            ("", StatusCode::NOT_FOUND) => Reason::Missing,
            _ => Failure::Refused(refusal).into(),
        },
        failure => failure.into(),
    };
    Error::new(action, object, reason)
}

/// Reads the document that an answer is.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> std::result::Result<T, Failure> {
    from_str(&String::from_utf8_lossy(body)).map_err(|error| {
        let error = format!(
            "the answer is not what S3's is ({error}): is endpoint the URL of a server that speaks S3?"
        );
        Failure::unusable(io::ErrorKind::InvalidData, error)
    })
}

/// A page that says that there are more, and not how to ask for them.
pub(super) fn endless(what: &str) -> Failure {
    let error = format!(
        "the list goes on, and there is no {what} to ask for the rest: this server cannot be used, it has not what S3 has had \
         since version 2 of its listings"
    );
    Failure::unusable(io::ErrorKind::InvalidData, error)
}

/// Whether a document says nothing but what went wrong.
fn is_error(document: &str) -> bool {
    let head = document.trim_start();
    let root = match head.strip_prefix("<?xml").and_then(|head| head.split_once("?>")) {
        Some((_, root)) => root.trim_start(),
        None => head,
    };
    root.starts_with("<Error>")
}

/// Reads an answer that says no, which need not say why.
fn refused(server: String, status: StatusCode, headers: &HeaderMap, body: &str) -> Failure {
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Answer {
        code: String,
        message: String,
    }

    let Answer { code, message } = from_str(body).unwrap_or_default();
    Failure::answer(Refusal { server, status, code, message }, headers)
}

/// A page of the objects of a bucket.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ObjectsPage {
    #[serde(default)]
    pub(super) contents: Vec<ObjectEntry>,
    #[serde(default)]
    pub(super) is_truncated: bool,
    pub(super) next_continuation_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ObjectEntry {
    pub(super) key: String,
    pub(super) size: u64,
    pub(super) last_modified: Option<String>,
}

/// A page of the uploads of a bucket that nobody has completed.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct UploadsPage {
    #[serde(default)]
    pub(super) upload: Vec<Upload>,
    #[serde(default)]
    pub(super) is_truncated: bool,
    #[serde(default)]
    pub(super) next_key_marker: String,
    #[serde(default)]
    pub(super) next_upload_id_marker: String,
}

/// An upload, as its beginning and a listing of uploads have it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Upload {
    pub(super) key: String,
    pub(super) upload_id: String,
    /// A listing says when it was begun.
    pub(super) initiated: Option<String>,
}

/// What became of many objects that were to be deleted at once: those that were not.
#[derive(Deserialize)]
pub(super) struct Deleted {
    #[serde(rename = "Error", default)]
    pub(super) errors: Vec<NotDeleted>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct NotDeleted {
    #[serde(default)]
    pub(super) key: String,
}
