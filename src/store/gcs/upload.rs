//! Objects that are written piece by piece: uploads that the server says the extent of, so that they go on where a connection
//! broke, and that become an object with their last chunk.

use std::io::{self, ErrorKind};

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use md5::{Digest, Md5};
use reqwest::header::{CONTENT_RANGE, HeaderMap, LOCATION, RANGE};
use reqwest::{Method, StatusCode};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use url::Url;
use uuid::Uuid;

use super::api::{Object, Request, explain, parse};
use super::{Gcs, IF_NEW, JSON, OCTETS, Place, described};
use crate::store::http::Failure;
use crate::store::{Error, ObjectName, ObjectStore, ObjectWriter, Reason, Result};

/// What every chunk but the last has a multiple of.
const CHUNK_UNIT_BYTES: u64 = 256 << 10;
/// What is sent with a request.
const CHUNK_BYTES: usize = 32 * CHUNK_UNIT_BYTES as usize;

/// Writes an object that has no size yet. One that stays small is put with one request at its end.
pub(super) struct Writer {
    store: Gcs,
    object: ObjectName,
    place: Place,
    write_id: String,
    buffer: BytesMut,
    /// What the server calls the upload, once it has begun.
    upload: Option<String>,
    /// What the server has of it.
    sent_bytes: u64,
    md5: Md5,
    /// A write that failed leaves unknown what there is, so nothing may follow.
    failed: bool,
}

/// How an upload stands.
enum Progress {
    /// The server has so many bytes, and waits for more.
    Has(u64),
    /// It has become an object.
    Done(Object),
}

impl Writer {
    pub(super) fn new(store: Gcs, object: ObjectName, place: Place) -> Self {
        Self {
            store,
            object,
            place,
            write_id: Uuid::new_v4().to_string(),
            buffer: BytesMut::new(),
            upload: None,
            sent_bytes: 0,
            md5: Md5::new(),
            failed: false,
        }
    }

    fn failure(&self, failure: Failure) -> Error {
        match failure {
            // The server keeps uploads for a week, but not for sure.
            Failure::Refused(refusal)
                if matches!(refusal.status, StatusCode::NOT_FOUND | StatusCode::GONE)
                    && self.upload.is_some() =>
            {
                let error = "the server has forgotten what was written of it";
                Error::io("write", &self.object, io::Error::new(ErrorKind::ResourceBusy, error))
            }
            failure => explain("write", &self.place, &self.place.bucket, failure),
        }
    }

    /// Sends the next bytes; with the last ones the upload becomes an object.
    async fn write_chunk(&mut self, bytes: Bytes, last: bool) -> Result<()> {
        if self.failed {
            return Err(Error::after_failure(&self.object));
        }
        self.failed = true;
        let upload = match &self.upload {
            Some(upload) => upload.clone(),
            None => {
                let upload = self.begin().await.map_err(|failure| self.failure(failure))?;
                self.upload.insert(upload).clone()
            }
        };
        let (mut md5, digested) = (std::mem::take(&mut self.md5), bytes.clone());
        let digest = spawn_blocking(move || {
            md5.update(&digested);
            md5
        });
        self.md5 = digest.await.map_err(|error| Error::io("write", &self.object, error.into()))?;

        let total = self.sent_bytes + bytes.len() as u64;
        match self.send(&upload, &bytes, last).await? {
            Progress::Has(_) => self.sent_bytes = total,
            Progress::Done(object) => {
                // There is nothing to be given up any more.
                self.upload = None;
                let md5 = BASE64_STANDARD.encode(self.md5.clone().finalize());
                self.store.check_md5(&self.object, &object, &md5)?;
            }
        }
        self.failed = false;
        Ok(())
    }

    async fn begin(&self) -> std::result::Result<String, Failure> {
        let request = Request::upload(Method::POST, &self.place)
            .query("uploadType", "resumable")
            .query(IF_NEW.0, IF_NEW.1)
            .header("x-upload-content-type", OCTETS)
            .body(JSON, described(&self.write_id, None));
        let (_, headers, _) = self
            .store
            .writing(&self.place.bucket, || {
                self.store.api.http.until_answered(|| self.store.api.call_once(&request))
            })
            .await?;
        let location = headers.get(LOCATION).and_then(|location| location.to_str().ok());
        let url: Option<Url> = location.and_then(|location| location.parse().ok());
        // The rest of it is what we have asked for, and the way there may be another one than the server thinks.
        let id = url
            .and_then(|url| url.query_pairs().find(|(name, _)| name == "upload_id").map(|(_, id)| id.into()));
        let text = "the server has begun an upload without a name for it";
        id.ok_or_else(|| Failure::unusable(ErrorKind::InvalidData, text))
    }

    /// Sends bytes until the server has all of them.
    async fn send(&self, upload: &str, bytes: &Bytes, last: bool) -> Result<Progress> {
        let begin = self.sent_bytes;
        let end = begin + bytes.len() as u64;
        let total = if last { end.to_string() } else { "*".into() };
        let mut from = begin;
        let mut tries = self.store.api.http.tries();
        loop {
            let rest = bytes.slice((from - begin) as usize..);
            let progress = match rest.is_empty() {
                true => self.tell(upload, &format!("bytes */{total}"), rest).await,
                false => self.tell(upload, &format!("bytes {from}-{}/{total}", end - 1), rest).await,
            };
            let failure = match progress {
                Ok(Progress::Done(object)) => return Ok(Progress::Done(object)),
                Ok(Progress::Has(has)) if has == end && !last => return Ok(Progress::Has(has)),
                Ok(Progress::Has(has)) if has > from && has <= end => {
                    from = has;
                    tries = self.store.api.http.tries();
                    continue;
                }
                Ok(Progress::Has(has)) => {
                    let error = format!("the server has {has} bytes of an object of which {end} were sent");
                    Failure::passing(io::Error::other(error))
                }
                Err(failure) => failure,
            };
            if let Failure::Refused(_) = &failure {
                return self.refused(failure, last).await;
            }
            tries.pause(failure).await.map_err(|failure| self.failure(failure))?;
            // Some of it may have arrived, and even become an object.
            let asked = format!("bytes */{total}");
            let ask = || self.tell(upload, &asked, Bytes::new());
            match self.store.api.http.until_answered(ask).await {
                Ok(Progress::Has(has)) if has >= begin && has <= end => from = has,
                Ok(Progress::Has(_)) => {
                    let error = "the server has forgotten a part of what was written of it";
                    return Err(Error::io(
                        "write",
                        &self.object,
                        io::Error::new(ErrorKind::ResourceBusy, error),
                    ));
                }
                Ok(Progress::Done(object)) => return Ok(Progress::Done(object)),
                Err(failure) => return self.refused(failure, last).await,
            }
        }
    }

    /// What it means that an upload does not go on: the last answer may have been lost, and the object be there.
    async fn refused(&self, failure: Failure, last: bool) -> Result<Progress> {
        if last && let Failure::Refused(_) = &failure {
            let there = self.store.object_at(&self.place).await.map_err(|failure| self.failure(failure))?;
            match there {
                Some(object) if object.metadata.backhaul_write_id == self.write_id => {
                    return Ok(Progress::Done(object));
                }
                Some(_) => return Err(Error::new("write", &self.object, Reason::Exists)),
                None => {}
            }
        }
        Err(self.failure(failure))
    }

    /// Sends bytes of an upload, or none to hear how it stands.
    async fn tell(&self, upload: &str, range: &str, bytes: Bytes) -> std::result::Result<Progress, Failure> {
        let request =
            self.request(Method::PUT, upload).header(CONTENT_RANGE.as_str(), range).body(OCTETS, bytes);
        let (status, headers, body) = self.store.api.call_once(&request).await?;
        match status {
            StatusCode::PERMANENT_REDIRECT => Ok(Progress::Has(stored(&headers))),
            _ => parse(&body).map(Progress::Done),
        }
    }

    fn request<'a>(&'a self, method: Method, upload: &'a str) -> Request<'a> {
        Request::upload(method, &self.place)
            .query("uploadType", "resumable")
            .query(IF_NEW.0, IF_NEW.1)
            .query("upload_id", upload)
    }
}

/// How many bytes of an upload the server says that it has. It keeps no part of a first unit: what is said to be one is none.
fn stored(headers: &HeaderMap) -> u64 {
    let range =
        headers.get(RANGE).and_then(|range| range.to_str().ok()?.strip_prefix("bytes=0-")?.parse().ok());
    let bytes = range.map_or(0, |last: u64| last.saturating_add(1));
    if bytes < CHUNK_UNIT_BYTES { 0 } else { bytes }
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.buffer.extend_from_slice(&bytes);
        // Something must be left to be the last.
        while self.buffer.len() > CHUNK_BYTES {
            let chunk = self.buffer.split_to(CHUNK_BYTES).freeze();
            self.write_chunk(chunk, false).await?;
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<()> {
        let rest = self.buffer.split().freeze();
        if self.upload.is_none() && !self.failed {
            return self.store.put(&self.object, rest).await;
        }
        self.write_chunk(rest, true).await
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let (Some(upload), Ok(runtime)) = (self.upload.take(), Handle::try_current()) {
            let (store, place) = (self.store.clone(), self.place.clone());
            runtime.spawn(async move {
                let request = Request::upload(Method::DELETE, &place)
                    .query("uploadType", "resumable")
                    .query("upload_id", &upload);
                // What is not given up is forgotten after a week.
                store.api.call_once(&request).await.ok()
            });
        }
    }
}
