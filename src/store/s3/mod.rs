//! Objects in the buckets of a server that speaks S3.
//!
//! A container of Cinder's is a bucket, with the names of its objects as keys, as Cinder's S3 driver has them. Our own
//! folders lie in the store's own bucket, below `.backhaul/`.
//!
//! A new object is written on the condition that there is none of its name (`If-None-Match: *`), which S3 itself and
//! Ceph's gateway keep. An object that was uploaded in parts is completed on the same condition, which the gateway of Ceph
//! 16 does not look at. So it is looked for first, and whoever else completes one of that name within the same moment is
//! overwritten there. The names of objects that are uploaded in parts are of one attempt only, so nobody does.
//!
//! A write whose answer was lost is tried again, and is told then that there is an object of that name: its own. So each
//! write leaves an id in the object's user metadata, by which it is recognised.

mod api;
mod upload;

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};
use quick_xml::escape::escape;
use reqwest::header::{ETAG, IF_MATCH};
use rusty_s3::Method;
use url::Url;
use uuid::Uuid;

use self::api::{
    Api, Deleted, NotDeleted, ObjectsPage, Request, Upload, UploadsPage, endless, explain, parse,
};
use self::upload::Writer;
use super::http::{Failure, HttpSettings, Refusal, server_of};
use super::reading::{Reader, Rest};
use super::{
    DELETES_MAX, Error, Folder, Listed, ObjectName, ObjectStore, ObjectWriter, Partial, Pieces, Reason,
    Result, Secret, SecretFrom, TakeListed,
};

/// Says which write an object is of.
const WRITE_ID: &str = "x-amz-meta-backhaul-write-id";
/// What a request to a bucket that is not there is answered.
const NO_BUCKET: &str = "NoSuchBucket";
/// Writes only where there is no object of that name.
const IF_NEW: (&str, &str) = ("if-none-match", "*");
/// The most that S3 deletes with one request.
const DELETES_AT_ONCE: usize = 1000;
/// Where buckets are made when nobody says where.
const USUAL_REGION: &str = "us-east-1";

/// A server, and what is kept there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Settings {
    /// The server's URL, without any bucket.
    pub endpoint: Url,
    /// The region that requests are signed for.
    pub region: String,
    /// Whether the bucket stands in the path of a URL, and not before the name of the host.
    pub path_style: bool,
    /// The bucket with our own folders.
    pub bucket: String,
    /// Whether a bucket that is missing is made when something is written to it.
    pub create_buckets: bool,
    /// Who we are.
    pub access_key: Secret,
    /// What proves it.
    pub secret_key: SecretFrom,
    /// The 32 bytes that the server encrypts all objects with and then forgets (SSE-C).
    pub sse_c_key: Option<SecretFrom>,
    /// How the server is reached.
    pub http: HttpSettings,
}

/// Objects in buckets.
#[derive(Debug, Clone)]
pub struct S3 {
    api: Arc<Api>,
    bucket: String,
    create_buckets: bool,
    /// Where new buckets are to be.
    region: Option<String>,
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

impl S3 {
    /// Prepares to talk to the server, which may be away. Fails where the settings cannot be used.
    pub fn new(settings: S3Settings) -> Result<Self> {
        let region = Some(settings.region.clone()).filter(|region| region != USUAL_REGION);
        let (bucket, create_buckets) = (settings.bucket.clone(), settings.create_buckets);
        Ok(Self { api: Arc::new(Api::new(settings)?), bucket, create_buckets, region })
    }

    /// Asks the server something that it answers only if the endpoint and the keys are right, and the store's own bucket
    /// is there or may be made. Fails with [`Reason::Passing`] when there is no answer within 10 seconds; nothing is tried
    /// again.
    pub async fn reach(&self) -> Result<()> {
        let query = [("list-type", "2"), ("max-keys", "1")];
        let bucket = &self.bucket;
        let request = Request::new(Method::Get, bucket, "").query(&query);
        match self.api.http.soon(server_of(&self.api.settings.endpoint), self.api.call_once(&request)).await {
            Err(Failure::Refused(refusal)) if refusal.code == NO_BUCKET && self.create_buckets => Ok(()),
            answer => answer
                .map(drop)
                .map_err(|failure| explain("reach", format!("bucket {bucket}"), bucket, failure)),
        }
    }

    fn place(&self, action: &'static str, folder: &Folder, name: &str) -> Result<Place> {
        if folder.is_own() {
            let key = format!("{}/{name}", folder.as_str());
            return Ok(Place { bucket: self.bucket.clone(), key });
        }
        let (bucket, key) = (folder.as_str().to_owned(), name.to_owned());
        if !is_bucket_name(&bucket) {
            let text = format!(
                "{bucket} is no name of a bucket: name a container of 3 to 63 of a-z, 0-9, '.' and '-' for this store"
            );
            let reason = Reason::Other(Arc::new(io::Error::new(ErrorKind::InvalidInput, text)));
            return Err(Error::new(action, format!("{bucket}/{key}"), reason));
        }
        Ok(Place { bucket, key })
    }

    fn object(&self, action: &'static str, object: &ObjectName) -> Result<Place> {
        self.place(action, &object.folder, &object.name)
    }

    /// Sends a request that writes; makes the bucket first if it is missing and may be made.
    async fn write(&self, request: &Request<'_>) -> std::result::Result<Bytes, Failure> {
        match self.api.call(request).await {
            Err(Failure::Refused(refusal)) if refusal.code == NO_BUCKET && self.create_buckets => {
                self.make_bucket(request.bucket).await?;
                self.api.call(request).await
            }
            answer => answer,
        }
        .map(|(_, body)| body)
    }

    async fn make_bucket(&self, bucket: &str) -> std::result::Result<(), Failure> {
        let mut request = Request::new(Method::Put, bucket, "");
        if let Some(region) = &self.region {
            let region = escape(region.as_str());
            let body = format!(
                "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
                 <LocationConstraint>{region}</LocationConstraint></CreateBucketConfiguration>"
            );
            request = request.body(body.into()).await;
        }
        match self.api.call(&request).await {
            // Somebody else was faster. If it is not ours to write to, the write will say so.
            Err(Failure::Refused(Refusal { code, .. }))
                if code == "BucketAlreadyOwnedByYou" || code == "BucketAlreadyExists" =>
            {
                Ok(())
            }
            answer => answer.map(drop),
        }
    }

    /// Writes an object with one request, if the condition holds. [`Reason::Exists`] says that it does not.
    async fn put_whole(
        &self,
        object: &ObjectName,
        bytes: Bytes,
        condition: Option<(&'static str, &str)>,
    ) -> Result<()> {
        let place = self.object("write", object)?;
        let id = Uuid::new_v4().to_string();
        let mut request = Request::of_bytes(Method::Put, &place.bucket, &place.key).header(WRITE_ID, &id);
        if let Some((name, value)) = condition {
            request = request.header(name, value);
        }
        match self.write(&request.body(bytes).await).await {
            Ok(_) => Ok(()),
            Err(failure) => {
                let explained = |failure| explain("write", &place, &place.bucket, failure);
                let error = explained(failure);
                match error.reason() {
                    // An answer may have been lost. Whoever cannot know whose it is must not take it for another one's.
                    Reason::Exists if self.is_of_write(&place, &id).await.map_err(explained)? => Ok(()),
                    _ => Err(error),
                }
            }
        }
    }

    /// Whether an object is there and of this write.
    async fn is_of_write(&self, place: &Place, id: &str) -> std::result::Result<bool, Failure> {
        let there = self.write_id(place).await?;
        Ok(there.is_some_and(|there| there == id))
    }

    /// The id of the write that an object is of, empty if somebody else wrote it; none if it is not there.
    async fn write_id(&self, place: &Place) -> std::result::Result<Option<String>, Failure> {
        let request = Request::of_bytes(Method::Head, &place.bucket, &place.key);
        match self.api.call(&request).await {
            Ok((headers, _)) => {
                let id = headers.get(WRITE_ID).and_then(|id| id.to_str().ok());
                Ok(Some(id.unwrap_or_default().to_owned()))
            }
            Err(failure) if failure.is_missing() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Ends an upload that nobody shall complete. One that has ended already is none to end.
    async fn abort(&self, place: &Place, upload_id: &str) -> std::result::Result<(), Failure> {
        let request =
            Request::new(Method::Delete, &place.bucket, &place.key).query(&[("uploadId", upload_id)]);
        match self.api.call(&request).await {
            Err(failure) if failure.is_missing() => Ok(()),
            answer => answer.map(drop),
        }
    }
}

/// Whether a bucket may have that name. Servers differ; the strictest want 3 to 63 of `a-z`, `0-9`, `.` and `-`.
pub fn is_bucket_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    (3..=255).contains(&name.len())
        && name.chars().all(plain)
        && !name.starts_with('.')
        && !name.contains("..")
}

#[async_trait]
impl ObjectStore for S3 {
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        self.put_whole(object, bytes, Some(IF_NEW)).await
    }

    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        self.put_whole(object, bytes, None).await
    }

    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool> {
        let place = self.object("read", object)?;
        let (headers, there) =
            match self.api.call(&Request::of_bytes(Method::Get, &place.bucket, &place.key)).await {
                Err(failure) if failure.is_missing() => {
                    return Ok(false);
                }
                answer => answer.map_err(|failure| explain("read", &place, &place.bucket, failure))?,
            };
        let Some(etag) = headers.get(ETAG).and_then(|etag| etag.to_str().ok()) else {
            let error = io::Error::new(ErrorKind::InvalidData, "the server does not say its ETag");
            return Err(Error::io("read", object, error));
        };
        if there != was {
            return Ok(false);
        }
        // Ceph's gateway takes quotes for a part of it where it writes, and all others do without.
        match self.put_whole(object, bytes, Some((IF_MATCH.as_str(), etag.trim_matches('"')))).await {
            Err(error) if matches!(error.reason(), Reason::Exists | Reason::Missing) => Ok(false),
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
            explain: Box::new(move |failure| match failure {
                Failure::Refused(refusal) if refusal.code == NO_BUCKET => {
                    Error::new("read", &of, Reason::Missing)
                }
                failure => explain("read", &of, &of.bucket, failure),
            }),
            open: Box::new(move |rest| {
                let (api, place) = (api.clone(), place.clone());
                Box::pin(async move {
                    let mut request = Request::of_bytes(Method::Get, &place.bucket, &place.key);
                    request.headers.extend(rest.map(Rest::headers).unwrap_or_default());
                    api.open(&request).await
                })
            }),
            version: ETAG,
        };
        reader.start().await
    }

    async fn copy(&self, from: &ObjectName, to: &ObjectName) -> Result<bool> {
        let (from, to) = (self.object("copy", from)?, self.object("copy", to)?);
        let mut request = Request::of_bytes(Method::Put, &to.bucket, &to.key);
        request.headers.extend(self.api.source(&from.bucket, &from.key));
        match self.api.call(&request).await {
            Err(failure) if failure.is_missing() => Ok(false),
            answer => answer.map(|_| true).map_err(|failure| explain("copy", &from, &from.bucket, failure)),
        }
    }

    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()> {
        let place = self.place("list", folder, "")?;
        let key_prefix = format!("{}{prefix}", place.key);
        let mut token = None;
        loop {
            let mut query = vec![("list-type", "2"), ("prefix", key_prefix.as_str())];
            query.extend(token.as_deref().map(|token| ("continuation-token", token)));
            let request = Request::new(Method::Get, &place.bucket, "").query(&query);
            let failed = |failure| explain("list", &place, &place.bucket, failure);
            let (_, page) = match self.api.call(&request).await {
                Err(Failure::Refused(refusal)) if refusal.code == NO_BUCKET => return Ok(()),
                page => page.map_err(failed)?,
            };
            let page: ObjectsPage = parse(&page).map_err(failed)?;
            for entry in page.contents {
                match entry.key.strip_prefix(&place.key) {
                    // Our own folders are in no container.
                    Some(name) if !name.starts_with('.') => {
                        let (name, modified) =
                            (name.to_owned(), entry.last_modified.and_then(|at| at.parse().ok()));
                        take(Listed { name, bytes: entry.size, modified });
                    }
                    _ => {}
                }
            }
            token = page.next_continuation_token;
            if token.is_none() {
                return match page.is_truncated {
                    false => Ok(()),
                    true => Err(failed(endless("NextContinuationToken"))),
                };
            }
        }
    }

    async fn delete(&self, object: &ObjectName) -> Result<()> {
        let place = self.object("delete", object)?;
        match self.api.call(&Request::new(Method::Delete, &place.bucket, &place.key)).await {
            Err(failure) if failure.is_missing() => Ok(()),
            answer => answer.map(drop).map_err(|failure| explain("delete", &place, &place.bucket, failure)),
        }
    }

    async fn delete_all(&self, objects: &[ObjectName]) -> Result<()> {
        for objects in objects.chunks(DELETES_AT_ONCE) {
            let mut places = Vec::new();
            for object in objects {
                places.push((object, self.object("delete", object)?));
            }
            let Some((_, Place { bucket, .. })) = places.first() else { return Ok(()) };
            let mut keys = String::new();
            for (_, place) in &places {
                keys += &format!("<Object><Key>{}</Key></Object>", escape(place.key.as_str()));
            }
            let request = Request::new(Method::Post, bucket, "")
                .query(&[("delete", "")])
                .body(format!("<Delete>{keys}<Quiet>true</Quiet></Delete>").into())
                .await;
            let failed = |failure| explain("delete", format!("objects in bucket {bucket}"), bucket, failure);
            let deleted =
                match self.api.call(&request).await.and_then(|(_, answer)| parse::<Deleted>(&answer)) {
                    Err(Failure::Refused(refusal)) if refusal.code == NO_BUCKET => continue,
                    Err(failure @ Failure::Passing { .. }) => return Err(failed(failure)),
                    // Not every server can do that, or lets us.
                    Err(_) => None,
                    Ok(deleted) => Some(deleted),
                };
            let ours = |error: &NotDeleted| {
                places.iter().find(|(_, place)| place.key == error.key).map(|(object, _)| *object)
            };
            // An error that is about none of ours is about any of them.
            let alone = deleted.and_then(|deleted| deleted.errors.iter().map(ours).collect());
            let alone: Vec<_> = alone.unwrap_or_else(|| objects.iter().collect());
            // Alone each is tried again, or says why it cannot be deleted.
            stream::iter(alone.into_iter().map(Ok))
                .try_for_each_concurrent(DELETES_MAX, |object| self.delete(object))
                .await?;
        }
        Ok(())
    }

    async fn tidy(&self, folder: &Folder, prefix: &str) -> Result<()> {
        for upload in self.partials(folder, prefix).await? {
            self.discard(&upload).await?;
        }
        Ok(())
    }

    async fn partials(&self, folder: &Folder, prefix: &str) -> Result<Vec<Partial>> {
        let place = self.place("tidy", folder, "")?;
        let failed = |failure| explain("tidy", &place, &place.bucket, failure);
        let key_prefix = format!("{}{prefix}", place.key);
        let (mut key_marker, mut id_marker) = (String::new(), String::new());
        let mut found = Vec::new();
        loop {
            let mut query = vec![("uploads", ""), ("prefix", key_prefix.as_str())];
            if !key_marker.is_empty() {
                query.extend([("key-marker", key_marker.as_str()), ("upload-id-marker", id_marker.as_str())]);
            }
            let request = Request::new(Method::Get, &place.bucket, "").query(&query);
            let (_, page) = match self.api.call(&request).await {
                Err(Failure::Refused(refusal)) if refusal.code == NO_BUCKET => return Ok(found),
                page => page.map_err(failed)?,
            };
            let page: UploadsPage = parse(&page).map_err(failed)?;
            for Upload { key, upload_id, initiated } in page.upload {
                // Some servers take the prefix for the whole name of an object. What is named as nothing of ours is not ours.
                let name = key.strip_prefix(&place.key).filter(|name| name.starts_with(prefix));
                if let Some(Ok(object)) = name.map(|name| folder.object(name)) {
                    let modified = initiated.and_then(|at| at.parse().ok());
                    found.push(Partial { object, id: upload_id, bytes: 0, modified });
                }
            }
            if !page.is_truncated {
                return Ok(found);
            }
            if page.next_key_marker.is_empty() {
                return Err(failed(endless("NextKeyMarker")));
            }
            (key_marker, id_marker) = (page.next_key_marker, page.next_upload_id_marker);
        }
    }

    async fn discard(&self, partial: &Partial) -> Result<()> {
        let place = self.object("tidy", &partial.object)?;
        let failed = |failure| explain("tidy", &place, &place.bucket, failure);
        self.abort(&place, &partial.id).await.map_err(failed)
    }
}
