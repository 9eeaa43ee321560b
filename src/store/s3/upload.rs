//! Objects that are written piece by piece: uploads in parts, which become an object when they are completed.

use std::fmt::Write as _;
use std::io::{self, ErrorKind};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use quick_xml::escape::escape;
use reqwest::header::ETAG;
use rusty_s3::Method;
use tokio::runtime::Handle;
use uuid::Uuid;

use super::api::{Request, Upload, explain, parse};
use super::{IF_NEW, Place, S3, WRITE_ID};
use crate::store::http::Failure;
use crate::store::{Error, ObjectName, ObjectStore, ObjectWriter, Reason, Result};

/// The size of the first parts; S3 wants 5 MiB at least.
const PART_BYTES: usize = 8 << 20;
/// After so many parts they become twice as large, so that the 10,000 that S3 takes hold 292 GiB.
const PARTS_OF_A_SIZE: usize = 2500;

/// Writes an object that has no size yet. One that stays small is put with one request at its end.
pub(super) struct Writer {
    store: S3,
    object: ObjectName,
    place: Place,
    write_id: String,
    buffer: BytesMut,
    /// What the server calls the upload, once it has begun.
    upload: Option<String>,
    /// What it calls its parts.
    etags: Vec<String>,
    /// A write that failed leaves unknown what there is, so nothing may follow.
    failed: bool,
}

impl Writer {
    pub(super) fn new(store: S3, object: ObjectName, place: Place) -> Self {
        let write_id = Uuid::new_v4().to_string();
        let buffer = BytesMut::new();
        Self { store, object, place, write_id, buffer, upload: None, etags: Vec::new(), failed: false }
    }

    fn failure(&self, failure: Failure) -> Error {
        match failure {
            Failure::Refused(refusal) if refusal.code == "NoSuchUpload" => {
                let error = "what was written of it was tidied away by somebody else";
                Error::io("write", &self.object, io::Error::new(ErrorKind::ResourceBusy, error))
            }
            failure => explain("write", &self.place, &self.place.bucket, failure),
        }
    }

    fn part_bytes(&self) -> usize {
        PART_BYTES << (self.etags.len() / PARTS_OF_A_SIZE).min(3)
    }

    /// Uploads the next part, and begins the upload with the first one.
    async fn write_part(&mut self, bytes: Bytes) -> Result<()> {
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
        let number = (self.etags.len() + 1).to_string();
        let request = Request::of_bytes(Method::Put, &self.place.bucket, &self.place.key)
            .query(&[("partNumber", &number), ("uploadId", &upload)])
            .body(bytes)
            .await;
        let (headers, _) = self.store.api.call(&request).await.map_err(|failure| self.failure(failure))?;
        let etag = headers.get(ETAG).and_then(|etag| etag.to_str().ok()).unwrap_or_default();
        self.etags.push(etag.to_owned());
        self.failed = false;
        Ok(())
    }

    async fn begin(&self) -> std::result::Result<String, Failure> {
        let request = Request::of_bytes(Method::Post, &self.place.bucket, &self.place.key)
            .query(&[("uploads", "")])
            .header(WRITE_ID, &self.write_id);
        let body = self.store.write(&request).await?;
        Ok(parse::<Upload>(&body)?.upload_id)
    }

    /// Makes an object of the parts, unless there is one of its name.
    async fn complete(&self, upload: &str) -> Result<()> {
        let failed = |failure| self.failure(failure);
        if self.store.write_id(&self.place).await.map_err(failed)?.is_some() {
            return Err(Error::new("write", &self.object, Reason::Exists));
        }
        let mut parts = String::new();
        for (number, etag) in (1..).zip(&self.etags) {
            let etag = escape(etag.as_str());
            // Writing to a text does not fail.
            let _ = write!(parts, "<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>");
        }
        let request = Request::new(Method::Post, &self.place.bucket, &self.place.key)
            .query(&[("uploadId", upload)])
            .header(IF_NEW.0, IF_NEW.1)
            .body(format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>").into())
            .await;
        match self.store.api.call(&request).await {
            Ok(_) => Ok(()),
            // It may have been completed, and only the answer was lost.
            Err(failure @ Failure::Refused(_)) => {
                match self.store.is_of_write(&self.place, &self.write_id).await.map_err(failed)? {
                    true => Ok(()),
                    false => Err(failed(failure)),
                }
            }
            Err(failure) => Err(failed(failure)),
        }
    }
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.buffer.extend_from_slice(&bytes);
        while self.buffer.len() >= self.part_bytes() {
            let part = self.buffer.split_to(self.part_bytes()).freeze();
            self.write_part(part).await?;
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<()> {
        let rest = self.buffer.split().freeze();
        if self.upload.is_none() && !self.failed {
            return self.store.put(&self.object, rest).await;
        }
        if !rest.is_empty() || self.failed {
            self.write_part(rest).await?;
        }
        let Some(upload) = self.upload.clone() else { return Ok(()) };
        let completed = self.complete(&upload).await;
        if completed.is_err() {
            // What is left of it is removed by `tidy` if it cannot be now.
            self.store.abort(&self.place, &upload).await.ok();
        }
        self.upload = None;
        completed
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let (Some(upload), Ok(runtime)) = (self.upload.take(), Handle::try_current()) {
            let (store, place) = (self.store.clone(), self.place.clone());
            runtime.spawn(async move { store.abort(&place, &upload).await.ok() });
        }
    }
}
