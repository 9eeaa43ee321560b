//! Objects in the buckets of Google Cloud Storage, by its JSON API.
//!
//! A container of Cinder's is a bucket, with the names of its objects as Cinder's GCS driver has them. Our own folders lie in
//! the store's own bucket, below `.backhaul/`.
//!
//! A new object is written on the condition that there is none of its name (`ifGenerationMatch=0`), which the server keeps
//! for whole objects and for uploads in chunks. A write whose answer was lost is tried again, and is told then that there is an
//! object of that name: its own. So each write leaves an id in the object's metadata, by which it is recognised.

mod api;
mod login;
mod upload;

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};
use md5::{Digest, Md5};
use reqwest::header::HeaderName;
use reqwest::{Method, StatusCode};
use serde_json::json;
use url::Url;
use uuid::Uuid;

use self::api::{Api, Copied, Object, Page, Request, explain, parse};
use self::upload::Writer;
use super::http::{Failure, HttpSettings, Payload, server_of};
use super::reading::{Reader, Rest};
use super::{
    DELETES_MAX, Error, Folder, Listed, ObjectName, ObjectStore, ObjectWriter, Pieces, Reason, Result,
    TakeListed, is_bucket_name,
};

/// Writes only over an object of this generation.
const IF_GENERATION: &str = "ifGenerationMatch";
/// Writes only where there is no object of that name.
const IF_NEW: (&str, &str) = (IF_GENERATION, "0");
/// Says the generation of what is read.
const GENERATION: &str = "x-goog-generation";
/// The most requests that are taken as one.
const DELETES_AT_ONCE: usize = 100;
/// What all objects and documents are.
const OCTETS: &str = "application/octet-stream";
const JSON: &str = "application/json";
/// Stands between requests that are sent as one; no path has it.
const BETWEEN: &str = "backhaul-between-requests";

/// A server, and what is kept there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcsSettings {
    /// The server's URL.
    pub endpoint: Url,
    /// The file with the key of a service account, as Google makes it; without one we say not who we are.
    pub credentials_file: Option<PathBuf>,
    /// The bucket with our own folders.
    pub bucket: String,
    /// Whether a bucket that is missing is made when something is written to it.
    pub create_buckets: bool,
    /// The project of new buckets; that of the service account if absent.
    pub project: Option<String>,
    /// Where new buckets are to be.
    pub location: String,
    /// The storage class of new buckets.
    pub storage_class: String,
    /// How the server is reached.
    pub http: HttpSettings,
}

/// Objects in buckets.
#[derive(Debug, Clone)]
pub struct Gcs {
    api: Arc<Api>,
}

/// Where an object or a folder lies. The names of all that is in a folder begin with its key.
#[derive(Debug, Clone)]
struct Place {
    bucket: String,
    key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "bucket {}", self.bucket),
            key => write!(f, "{key} in bucket {}", self.bucket),
        }
    }
}

impl Gcs {
    /// Prepares to talk to the server, which may be away. Fails where the settings cannot be used.
    pub fn new(settings: GcsSettings) -> Result<Self> {
        Ok(Self { api: Arc::new(Api::new(settings)?) })
    }

    /// Asks the server something that it answers only if the service account may use the store's own bucket, and that is
    /// there or may be made. Fails with [`Reason::Passing`] when there is no answer within 10 seconds; nothing is tried again.
    pub async fn reach(&self) -> Result<()> {
        let bucket = &self.api.settings.bucket;
        let request = Request::objects(Method::GET, bucket).query("maxResults", "1");
        match self.api.http.soon(server_of(&self.api.settings.endpoint), self.api.call_once(&request)).await {
            Err(failure) if failure.is_missing() && self.api.settings.create_buckets => Ok(()),
            Err(failure) if failure.is_missing() => Err(self.no_bucket(bucket)),
            answer => answer.map(drop),
        }
        .map_err(|failure| explain("reach", format!("bucket {bucket}"), bucket, failure))
    }

    fn place(&self, action: &'static str, folder: &Folder, name: &str) -> Result<Place> {
        if folder.is_own() {
            let key = format!("{}/{name}", folder.as_str());
            return Ok(Place { bucket: self.api.settings.bucket.clone(), key });
        }
        let (bucket, key) = (folder.as_str().to_owned(), name.to_owned());
        if !is_bucket_name(&bucket) {
            let text = format!(
                "{bucket} is no name of a bucket: name a container of 3 to 63 of a-z, 0-9, '.', '_' and '-' for this store"
            );
            let reason = Reason::Other(Arc::new(io::Error::new(ErrorKind::InvalidInput, text)));
            return Err(Error::new(action, format!("{bucket}/{key}"), reason));
        }
        Ok(Place { bucket, key })
    }

    fn object(&self, action: &'static str, object: &ObjectName) -> Result<Place> {
        self.place(action, &object.folder, &object.name)
    }

    /// Makes a request that writes; makes the bucket first if it is missing and may be made.
    async fn writing<T, F>(&self, bucket: &str, request: impl Fn() -> F) -> std::result::Result<T, Failure>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        match request().await {
            Err(failure) if failure.is_missing() && self.api.settings.create_buckets => {
                self.make_bucket(bucket).await?;
                request().await
            }
            Err(failure) if failure.is_missing() => Err(self.no_bucket(bucket)),
            answer => answer,
        }
    }

    fn no_bucket(&self, bucket: &str) -> Failure {
        let server = server_of(&self.api.settings.endpoint);
        let text = format!("{server} has no bucket {bucket}: make it, or let create_containers do so");
        Failure::unusable(ErrorKind::NotFound, text)
    }

    async fn make_bucket(&self, bucket: &str) -> std::result::Result<(), Failure> {
        let Some(project) = &self.api.project else {
            let server = server_of(&self.api.settings.endpoint);
            let text = format!(
                "{server} has no bucket {bucket}, and there is no project to make it in: write project"
            );
            return Err(Failure::unusable(ErrorKind::NotFound, text));
        };
        let GcsSettings { location, storage_class, .. } = &self.api.settings;
        let body = json!({ "name": bucket, "location": location, "storageClass": storage_class });
        let request = Request::to(Method::POST, &["storage", "v1", "b"])
            .query("project", project)
            .body(JSON, Bytes::from(body.to_string()));
        match self.api.call(&request).await {
            // Somebody else was faster. If it is not ours to write to, the write will say so.
            Err(Failure::Refused(refusal)) if refusal.status == StatusCode::CONFLICT => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Writes an object with one request, if what is there is of this generation. [`Reason::Exists`] says that it is not.
    async fn put_whole(&self, object: &ObjectName, bytes: Bytes, generation: Option<&str>) -> Result<()> {
        let place = self.object("write", object)?;
        let failed = |failure| explain("write", &place, &place.bucket, failure);
        let digested = bytes.clone();
        let md5 = tokio::task::spawn_blocking(move || BASE64_STANDARD.encode(Md5::digest(&digested))).await;
        let md5 = md5.map_err(|error| Error::io("write", object, error.into()))?;
        let id = Uuid::new_v4().to_string();
        let mut request = Request::upload(Method::POST, &place)
            .query("uploadType", "multipart")
            // What nobody knows beforehand is in no volume.
            .body(&format!("multipart/related; boundary={id}"), both(&id, described(&id, Some(&md5)), bytes));
        if let Some(generation) = generation {
            request = request.query(IF_GENERATION, generation);
        }
        let written = match self.writing(&place.bucket, || self.api.call(&request)).await {
            Ok(body) => parse(&body).map_err(failed)?,
            // It may be our own, and only the answer was lost.
            Err(Failure::Refused(refusal)) if refusal.status == StatusCode::PRECONDITION_FAILED => {
                match self.object_at(&place).await.map_err(failed)? {
                    Some(there) if there.metadata.backhaul_write_id == id => there,
                    _ => return Err(Error::new("write", object, Reason::Exists)),
                }
            }
            Err(failure) => return Err(failed(failure)),
        };
        self.check_md5(object, &written, &md5)
    }

    /// Fails if the server keeps something else than what was sent.
    fn check_md5(&self, name: &ObjectName, object: &Object, md5: &str) -> Result<()> {
        if object.md5_hash == md5 {
            return Ok(());
        }
        let text =
            format!("the server keeps something with the MD5 {:?} for what has {md5:?}", object.md5_hash);
        Err(Error::new("write", name, Reason::Other(Arc::new(io::Error::new(ErrorKind::InvalidData, text)))))
    }

    /// What there is at a place.
    async fn object_at(&self, place: &Place) -> std::result::Result<Option<Object>, Failure> {
        let request = Request::object(Method::GET, place).query("fields", "md5Hash,metadata");
        match self.api.call(&request).await {
            Ok(body) => parse(&body).map(Some),
            Err(failure) if failure.is_missing() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Deletes these objects with one request. Says whether all are known to be gone.
    async fn delete_batch(&self, places: &[Place]) -> std::result::Result<bool, Failure> {
        let mut body = String::new();
        for place in places {
            let path = self.api.path_of(place);
            body += &format!(
                "--{BETWEEN}\r\nContent-Type: application/http\r\n\r\nDELETE {path} HTTP/1.1\r\n\r\n\r\n"
            );
        }
        body += &format!("--{BETWEEN}--\r\n");
        let request = Request::to(Method::POST, &["batch", "storage", "v1"])
            .body(&format!("multipart/mixed; boundary={BETWEEN}"), Bytes::from(body));
        let answer = match self.api.call(&request).await {
            Err(Failure::Refused(_)) => return Ok(false),
            answer => answer?,
        };
        // The answers need not come in the order of the questions: either all are the same, or each object is asked for alone.
        let answer = String::from_utf8_lossy(&answer);
        let statuses = answer.lines().filter_map(|line| line.strip_prefix("HTTP/1.1 ")?.split(' ').next());
        let gone = statuses.filter(|status| status.starts_with('2') || *status == "404").count();
        Ok(gone == places.len())
    }
}

/// What is said of an object that is written.
fn described(write_id: &str, md5: Option<&str>) -> Bytes {
    let mut description = json!({ "contentType": OCTETS, "metadata": { "backhaul-write-id": write_id } });
    if let Some(md5) = md5 {
        description["md5Hash"] = md5.into();
    }
    Bytes::from(description.to_string())
}

/// What is said of an object, and the object.
fn both(boundary: &str, description: Bytes, bytes: Bytes) -> Payload {
    let part = |end: &str, kind| Bytes::from(format!("{end}--{boundary}\r\nContent-Type: {kind}\r\n\r\n"));
    let end = Bytes::from(format!("\r\n--{boundary}--\r\n"));
    Payload::Parts(Arc::new([part("", JSON), description, part("\r\n", OCTETS), bytes, end]))
}

#[async_trait]
impl ObjectStore for Gcs {
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        self.put_whole(object, bytes, Some(IF_NEW.1)).await
    }

    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        self.put_whole(object, bytes, None).await
    }

    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool> {
        let place = self.object("read", object)?;
        let failed = |failure| explain("read", &place, &place.bucket, failure);
        let request = Request::object(Method::GET, &place).query("alt", "media");
        let (_, headers, there) = match self.api.http.until_answered(|| self.api.call_once(&request)).await {
            Err(failure) if failure.is_missing() => return Ok(false),
            answer => answer.map_err(failed)?,
        };
        let Some(generation) = headers.get(GENERATION).and_then(|generation| generation.to_str().ok()) else {
            let text = "the server does not say its generation";
            return Err(failed(Failure::unusable(ErrorKind::InvalidData, text)));
        };
        if there != was {
            return Ok(false);
        }
        match self.put_whole(object, bytes, Some(generation)).await {
            Err(error) if matches!(error.reason(), Reason::Exists) => Ok(false),
            written => written.map(|()| true),
        }
    }

    async fn create(&self, object: &ObjectName) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(Writer::new(self.clone(), object.clone(), self.object("create", object)?)))
    }

    async fn get(&self, object: &ObjectName) -> Result<Pieces> {
        let place = self.object("read", object)?;
        let (api, of) = (self.api.clone(), place.clone());
        let reader = Reader {
            http: api.http.clone(),
            object: object.clone(),
            explain: Box::new(move |failure| explain("read", &of, &of.bucket, failure)),
            open: Box::new(move |rest| {
                let (api, place) = (api.clone(), place.clone());
                Box::pin(async move {
                    let mut request = Request::object(Method::GET, &place).query("alt", "media");
                    let Some(Rest { offset, version }) = rest else { return api.open(&request).await };
                    request = request.header("range", format!("bytes={offset}-"));
                    if let Some(generation) = &version {
                        request = request.query("generation", generation);
                    }
                    api.open(&request).await
                })
            }),
            version: HeaderName::from_static(GENERATION),
        };
        reader.start().await
    }

    async fn copy(&self, from: &ObjectName, to: &ObjectName) -> Result<bool> {
        let (from, to) = (self.object("copy", from)?, self.object("copy", to)?);
        let mut token: Option<String> = None;
        loop {
            let mut request = Request::copy(&from, &to);
            if let Some(token) = &token {
                request = request.query("rewriteToken", token);
            }
            let failed = |failure| explain("copy", &from, &from.bucket, failure);
            let answer = match self.api.call(&request).await {
                Err(failure) if failure.is_missing() => return Ok(false),
                answer => answer.map_err(failed)?,
            };
            let Copied { done, rewrite_token } = parse(&answer).map_err(failed)?;
            if done {
                return Ok(true);
            }
            // What is large, or goes far, is not copied at once.
            token = rewrite_token;
            if token.is_none() {
                let text = "the server has not copied it, and does not say how to go on";
                return Err(failed(Failure::unusable(ErrorKind::InvalidData, text)));
            }
        }
    }

    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()> {
        let place = self.place("list", folder, "")?;
        let failed = |failure| explain("list", &place, &place.bucket, failure);
        let key_prefix = format!("{}{prefix}", place.key);
        let mut token: Option<String> = None;
        loop {
            let mut request = Request::objects(Method::GET, &place.bucket)
                .query("prefix", &key_prefix)
                .query("fields", "items(name,size,updated),nextPageToken");
            if let Some(token) = &token {
                request = request.query("pageToken", token);
            }
            let page = match self.api.call(&request).await {
                Err(failure) if failure.is_missing() => return Ok(()),
                page => page.map_err(failed)?,
            };
            let page: Page = parse(&page).map_err(failed)?;
            for entry in page.items {
                match entry.name.strip_prefix(&place.key) {
                    // Our own folders are in no container of Cinder's.
                    Some(name) if !name.starts_with('.') => {
                        let unusable = |error| Failure::unusable(ErrorKind::InvalidData, error);
                        let bytes =
                            entry.size.as_deref().unwrap_or("0").parse().map_err(unusable).map_err(failed)?;
                        let modified = entry.updated.as_deref().and_then(|at| at.parse().ok());
                        take(Listed { name: name.to_owned(), bytes, modified });
                    }
                    _ => {}
                }
            }
            token = page.next_page_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(());
            }
        }
    }

    async fn delete(&self, object: &ObjectName) -> Result<()> {
        let place = self.object("delete", object)?;
        match self.api.call(&Request::object(Method::DELETE, &place)).await {
            Err(failure) if failure.is_missing() => Ok(()),
            answer => answer.map(drop).map_err(|failure| explain("delete", &place, &place.bucket, failure)),
        }
    }

    async fn delete_all(&self, objects: &[ObjectName]) -> Result<()> {
        let Some(first) = objects.first() else { return Ok(()) };
        let bucket = self.place("delete", &first.folder, "")?.bucket;
        let failed = |failure| explain("delete", format!("objects in bucket {bucket}"), &bucket, failure);
        stream::iter(objects.chunks(DELETES_AT_ONCE).map(Ok))
            .try_for_each_concurrent(DELETES_MAX, |objects| async move {
                let places: Result<Vec<_>> =
                    objects.iter().map(|object| self.object("delete", object)).collect();
                if self.delete_batch(&places?).await.map_err(failed)? {
                    return Ok(());
                }
                // Each is tried again, or says why it cannot be deleted.
                for object in objects {
                    self.delete(object).await?;
                }
                Ok(())
            })
            .await
    }

    /// What was never finished cannot be asked for, and the server forgets it after a week.
    async fn tidy(&self, _: &Folder, _: &str) -> Result<()> {
        Ok(())
    }
}
