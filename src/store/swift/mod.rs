//! Objects in the containers of a server that speaks Swift.
//!
//! A container of Cinder's is a container, with the names that Cinder's Swift driver gives its objects. Our own folders lie
//! in the store's own container, below `.backhaul/`.
//!
//! Each object is written with one request, as Cinder does: its data objects and lists are smaller than the 5 GiB that
//! Swift takes at once.
//!
//! Before an object is written it is asked for. So a body that nobody needs is not sent, a token that has expired is found
//! out by a request that has no body, and a write whose answer was lost recognises its own object, by the id that each write
//! leaves in the metadata. A new object is then written on the condition that there is still none of its name
//! (`If-None-Match: *`). Swift looks at that when a request begins, and Ceph's gateway does not at all: of several that write
//! one name within the same moment the last one may win where the first was told that it did.

mod api;
pub(crate) mod login;
mod spool;

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};
use md5::{Digest, Md5};
use reqwest::header::{CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use reqwest::{Method, StatusCode};
use url::Url;
use uuid::Uuid;

use self::api::{Api, BulkAnswer, Entry, Request, explain, parse, too_large};
use self::spool::Writer;
use super::http::{Failure, HttpSettings, Payload, Refusal};
use super::reading::{Reader, Rest};
use super::{
    DELETES_MAX, Error, Folder, Listed, ObjectName, ObjectStore, ObjectWriter, Pieces, Reason, Result,
    Secret, SecretFrom, TakeListed,
};

/// Says which write an object is of.
const WRITE_ID: &str = "x-object-meta-backhaul-write-id";
/// The most that Swift takes for one object.
const OBJECT_BYTES_MAX: u64 = 5 << 30;
/// The names of a page of a listing, unless the server gives fewer.
const PAGE_NAMES_MAX: u64 = 1000;

/// A server, and what is kept there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwiftSettings {
    /// Where to log in: for Keystone its URL with or without `/v3`, else the whole URL. Nobody asks there who has a token.
    pub auth_url: Url,
    /// Who we are, and what proves it.
    pub credentials: Credentials,
    /// Where the account is.
    pub endpoint: Endpoint,
    /// The container with our own folders.
    pub container: String,
    /// Whether a container that is missing is made when something is written to it.
    pub create_containers: bool,
    /// The storage policy of containers that are made; the server's own choice if absent.
    pub storage_policy: Option<String>,
    /// How the server is reached.
    pub http: HttpSettings,
}

/// Who we are, and what proves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user of Swift's own way to log in, version 1.
    V1 {
        /// The user, often `account:user`.
        user: String,
        /// The user's key.
        key: SecretFrom,
    },
    /// A user of Keystone, version 3.
    Password {
        /// The user's name.
        user: String,
        /// The name of the domain that the user is of.
        user_domain: String,
        /// The name of the project whose account is used.
        project: String,
        /// The name of the domain that the project is of.
        project_domain: String,
        /// The user's password.
        password: SecretFrom,
    },
    /// An application credential of Keystone, which is of one user and one project.
    ApplicationCredential {
        /// Its id.
        id: String,
        /// Its secret.
        secret: SecretFrom,
    },
    /// A token that somebody else was given, for an account that is [`Endpoint::At`] a URL. It is used until it expires.
    Token(Secret),
}

/// Where the account is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Where the server says at the login.
    Told,
    /// At this URL, whatever is said.
    At(Url),
    /// Where Keystone's catalog says that such an endpoint is.
    Catalog {
        /// The type of the service.
        service_type: String,
        /// `public`, `internal` or `admin`.
        interface: String,
        /// The region; the first one if absent.
        region: Option<String>,
    },
}

/// Objects in containers.
#[derive(Debug, Clone)]
pub struct Swift {
    api: Arc<Api>,
    container: String,
    create_containers: bool,
    storage_policy: Option<String>,
}

/// Where an object or a folder lies. The names of all that is in a folder begin with its key.
#[derive(Debug, Clone)]
struct Place {
    container: String,
    key: String,
    /// Whether it is in a folder of our own.
    is_own: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "container {}", self.container),
            key => write!(f, "{key} in container {}", self.container),
        }
    }
}

impl Place {
    /// A request that reads an object. Those of our own folders are written over, and the first server that answers may not have
    /// heard of the last write: with that header all that have the object are asked, and the newest is answered.
    fn reading(&self, method: Method) -> Request<'_> {
        let request = Request::new(method, &self.container, &self.key);
        if self.is_own { request.header("x-newest", "true") } else { request }
    }
}

impl Swift {
    /// Prepares to talk to the server, which may be away. Fails where the settings cannot be used.
    pub fn new(settings: SwiftSettings) -> Result<Self> {
        let SwiftSettings { container, create_containers, storage_policy, .. } = settings.clone();
        Ok(Self { api: Arc::new(Api::new(settings)?), container, create_containers, storage_policy })
    }

    /// Logs in, and asks the server something that it answers only if the store's own container is there or may be made.
    /// Fails with [`Reason::Passing`] when there is no answer within 10 seconds; nothing is tried again.
    pub async fn reach(&self) -> Result<()> {
        let container = &self.container;
        let request = Request::new(Method::GET, container, "").query(&[("limit", "1")]);
        let servers = format!("{} or the server that it names", self.api.settings.auth_url);
        let answer = self.api.http.soon(servers, self.api.call_once(&request)).await;
        let object = format!("container {container}");
        match answer {
            Err(failure) if failure.is_missing() && self.create_containers => Ok(()),
            Err(Failure::Refused(refusal)) if refusal.status == StatusCode::NOT_FOUND => {
                Err(no_container("reach", object, container, &refusal))
            }
            answer => answer.map(drop).map_err(|failure| explain("reach", object, container, failure)),
        }
    }

    fn place(&self, action: &'static str, folder: &Folder, name: &str) -> Result<Place> {
        let is_own = folder.is_own();
        if is_own {
            let key = format!("{}/{name}", folder.as_str());
            return Ok(Place { container: self.container.clone(), key, is_own });
        }
        let (container, key) = (folder.as_str().to_owned(), name.to_owned());
        if container.contains('/') {
            let text = format!("{container} is no name of a container for this store: name one without '/'");
            let reason = Reason::Other(Arc::new(io::Error::new(ErrorKind::InvalidInput, text)));
            return Err(Error::new(action, format!("{container}/{key}"), reason));
        }
        Ok(Place { container, key, is_own })
    }

    fn object(&self, action: &'static str, object: &ObjectName) -> Result<Place> {
        self.place(action, &object.folder, &object.name)
    }

    /// Writes an object with one request.
    async fn put_whole(&self, object: &ObjectName, body: Payload, md5: &str, new: bool) -> Result<()> {
        let place = self.object("write", object)?;
        let failed = |failure| explain("write", &place, &place.container, failure);
        let id = Uuid::new_v4().to_string();
        let mut request = Request::new(Method::PUT, &place.container, &place.key)
            .header(WRITE_ID, &id)
            .header(ETAG.as_str(), md5)
            .header(CONTENT_TYPE.as_str(), "application/octet-stream")
            .body(body);
        if new {
            request = request.header(IF_NONE_MATCH.as_str(), "*");
        }
        let mut made = false;
        let mut tries = self.api.http.tries();
        loop {
            match self.write_id(&place).await.map_err(failed)? {
                Some(there) if there == id => return Ok(()),
                Some(_) if new => return Err(Error::new("write", object, Reason::Exists)),
                _ => {}
            }
            let failure = match self.api.call_once(&request).await {
                Ok((_, headers, _)) if headers.get(ETAG).is_some_and(|etag| is_md5(etag.as_bytes(), md5)) => {
                    return Ok(());
                }
                // The object has a write or a delete that the server dates later than ours, which it has not kept.
                Ok((StatusCode::ACCEPTED, ..)) => {
                    Failure::passing(io::Error::other("the server has a write or a delete of a later moment"))
                }
                Ok((_, headers, _)) => {
                    // The server has looked at what we say it is; so it must be something else that it keeps.
                    let text = format!("the server keeps {:?} for an MD5 of {md5}", headers.get(ETAG));
                    Failure::unusable(ErrorKind::InvalidData, text)
                }
                Err(failure) => failure,
            };
            let Failure::Refused(refusal) = &failure else {
                tries.pause(failure).await.map_err(failed)?;
                continue;
            };
            match refusal.status {
                StatusCode::NOT_FOUND if !made && self.create_containers => {
                    self.make_container(&place.container).await.map_err(failed)?;
                    made = true;
                }
                StatusCode::NOT_FOUND if !self.create_containers => {
                    return Err(no_container("write", &place, &place.container, refusal));
                }
                // Somebody else has written it since we looked, or it was ourselves.
                StatusCode::PRECONDITION_FAILED => {
                    return match self.write_id(&place).await.map_err(failed)? {
                        Some(there) if there == id => Ok(()),
                        _ => Err(Error::new("write", object, Reason::Exists)),
                    };
                }
                // Somebody else writes it at the same time. What has arrived is not what was sent. A container that was just
                // made is not known everywhere.
                StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY | StatusCode::NOT_FOUND => {
                    let failure = Failure::passing(io::Error::other(refusal.clone()));
                    tries.pause(failure).await.map_err(failed)?;
                }
                _ => return Err(failed(failure)),
            }
        }
    }

    /// The id of the write that an object is of, empty if somebody else wrote it; none if it is not there.
    async fn write_id(&self, place: &Place) -> std::result::Result<Option<String>, Failure> {
        match self.api.call(&place.reading(Method::HEAD)).await {
            Ok((headers, _)) => {
                let id = headers.get(WRITE_ID).and_then(|id| id.to_str().ok());
                Ok(Some(id.unwrap_or_default().to_owned()))
            }
            Err(failure) if failure.is_missing() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    async fn make_container(&self, container: &str) -> std::result::Result<(), Failure> {
        let mut request = Request::new(Method::PUT, container, "");
        if let Some(policy) = &self.storage_policy {
            request = request.header("x-storage-policy", policy);
        }
        match self.api.call(&request).await {
            // Somebody else was faster, with another policy.
            Err(Failure::Refused(Refusal { status: StatusCode::CONFLICT, .. })) => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Deletes these objects with one request. Says whether all are known to be gone.
    async fn delete_bulk(&self, places: &[Place]) -> std::result::Result<bool, Failure> {
        let request = Request::new(Method::POST, "", "")
            .query(&[("bulk-delete", "")])
            .header(CONTENT_TYPE.as_str(), "text/plain")
            .header("accept", "application/json")
            .body(
                Bytes::from(api::lines(places.iter().map(|place| (&*place.container, &*place.key)))).into(),
            );
        let answer: BulkAnswer = match self.api.call(&request).await {
            Err(Failure::Refused(_)) => return Ok(false),
            answer => parse(&answer?.1)?,
        };
        Ok(answer.response_status.starts_with("200") && answer.errors.is_empty())
    }
}

fn no_container(action: &'static str, object: impl ToString, container: &str, refusal: &Refusal) -> Error {
    let server = &refusal.server;
    let text = format!("{server} has no container {container}: make it, or let create_containers do so");
    Error::new(action, object, Reason::Other(Arc::new(io::Error::new(ErrorKind::NotFound, text))))
}

/// Whether the server has this MD5 for an object; some write it in quotes.
fn is_md5(etag: &[u8], md5: &str) -> bool {
    let etag = etag.strip_prefix(b"\"").and_then(|etag| etag.strip_suffix(b"\"")).unwrap_or(etag);
    etag.eq_ignore_ascii_case(md5.as_bytes())
}

/// The MD5 as Swift writes it, made where it holds nobody up.
async fn md5_of(action: &'static str, object: &ObjectName, bytes: &Bytes) -> Result<String> {
    let bytes = bytes.clone();
    let digest = tokio::task::spawn_blocking(move || hex::encode(Md5::digest(&bytes))).await;
    digest.map_err(|error| Error::io(action, object, error.into()))
}

#[async_trait]
impl ObjectStore for Swift {
    async fn put(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        let md5 = md5_of("write", object, &bytes).await?;
        self.put_whole(object, bytes.into(), &md5, true).await
    }

    async fn replace(&self, object: &ObjectName, bytes: Bytes) -> Result<()> {
        let md5 = md5_of("write", object, &bytes).await?;
        self.put_whole(object, bytes.into(), &md5, false).await
    }

    /// Swift writes on no condition but that there is nothing, so somebody else may write between the look and the write.
    async fn swap(&self, object: &ObjectName, was: Bytes, bytes: Bytes) -> Result<bool> {
        let place = self.object("read", object)?;
        let there = match self.api.call(&place.reading(Method::GET)).await {
            Err(failure) if failure.is_missing() => return Ok(false),
            answer => answer.map_err(|failure| explain("read", &place, &place.container, failure))?.1,
        };
        if there != was {
            return Ok(false);
        }
        self.replace(object, bytes).await.map(|()| true)
    }

    async fn create(&self, object: &ObjectName) -> Result<Box<dyn ObjectWriter>> {
        self.object("create", object)?;
        Ok(Box::new(Writer::new(self.clone(), object.clone())))
    }

    fn check_size(&self, object: &ObjectName, bytes: u64) -> Result<()> {
        if bytes > OBJECT_BYTES_MAX { Err(too_large(object)) } else { Ok(()) }
    }

    async fn copy(&self, from: &ObjectName, to: &ObjectName) -> Result<bool> {
        let (from, to) = (self.object("copy", from)?, self.object("copy", to)?);
        // Whoever knows no copies refuses the method; the header of a PUT would be passed over.
        let Ok(method) = Method::from_bytes(b"COPY") else { return Ok(false) };
        let target = api::lines([(&*to.container, &*to.key)].into_iter());
        let request =
            Request::new(method, &from.container, &from.key).header("destination", target.trim_end());
        match self.api.call(&request).await {
            Err(failure) if failure.is_missing() => Ok(false),
            answer => {
                answer.map(|_| true).map_err(|failure| explain("copy", &from, &from.container, failure))
            }
        }
    }

    async fn get(&self, object: &ObjectName) -> Result<Pieces> {
        let place = self.object("read", object)?;
        let (api, of) = (self.api.clone(), place.clone());
        let reader = Reader {
            http: api.http.clone(),
            object: object.clone(),
            explain: Box::new(move |failure| explain("read", &of, &of.container, failure)),
            open: Box::new(move |rest| {
                let (api, place) = (api.clone(), place.clone());
                Box::pin(async move {
                    let mut request = place.reading(Method::GET);
                    request.headers.extend(rest.map(Rest::headers).unwrap_or_default());
                    api.open(&request).await
                })
            }),
            version: ETAG,
        };
        reader.start().await
    }

    async fn list_each(&self, folder: &Folder, prefix: &str, take: &mut TakeListed<'_>) -> Result<()> {
        let place = self.place("list", folder, "")?;
        let failed = |failure| explain("list", &place, &place.container, failure);
        let key_prefix = format!("{}{prefix}", place.key);
        let limit =
            self.api.abilities().await.map_err(failed)?.page_names_max().min(PAGE_NAMES_MAX).to_string();
        let mut marker = String::new();
        // A page that is short need not be the last one.
        loop {
            let mut request = Request::new(Method::GET, &place.container, "").query(&[
                ("format", "json"),
                ("limit", &limit),
                ("prefix", &key_prefix),
            ]);
            if !marker.is_empty() {
                request = request.query(&[("marker", &marker)]);
            }
            let page = match self.api.call(&request).await {
                Err(failure) if failure.is_missing() => return Ok(()),
                page => page.map_err(failed)?.1,
            };
            // An answer without a body says the same as an empty list.
            let page: Vec<Entry> = if page.is_empty() { Vec::new() } else { parse(&page).map_err(failed)? };
            let Some(last) = page.last() else { return Ok(()) };
            marker.clone_from(&last.name);
            for entry in page {
                match entry.name.strip_prefix(&place.key) {
                    // Our own folders are in no container of Cinder's.
                    Some(name) if !name.starts_with('.') => {
                        let modified = entry.modified();
                        take(Listed { name: name.to_owned(), bytes: entry.bytes, modified });
                    }
                    _ => {}
                }
            }
        }
    }

    async fn delete(&self, object: &ObjectName) -> Result<()> {
        let place = self.object("delete", object)?;
        let mut tries = self.api.http.tries();
        loop {
            let failure =
                match self.api.call(&Request::new(Method::DELETE, &place.container, &place.key)).await {
                    Err(failure) if failure.is_missing() => return Ok(()),
                    Ok(_) => return Ok(()),
                    // Somebody writes it at the same time.
                    Err(Failure::Refused(refusal)) if refusal.status == StatusCode::CONFLICT => {
                        Failure::passing(io::Error::other(refusal))
                    }
                    Err(failure) => return Err(explain("delete", &place, &place.container, failure)),
                };
            let paused = tries.pause(failure).await;
            paused.map_err(|failure| explain("delete", &place, &place.container, failure))?;
        }
    }

    async fn delete_all(&self, objects: &[ObjectName]) -> Result<()> {
        let Some(first) = objects.first() else { return Ok(()) };
        let container = self.place("delete", &first.folder, "")?.container;
        let object = format!("objects in container {container}");
        let failed = |failure| explain("delete", &object, &container, failure);
        let at_once = self.api.abilities().await.map_err(failed)?.deletes_max();
        let mut alone = Vec::new();
        for some in objects.chunks(at_once.unwrap_or(objects.len())) {
            let places: Result<Vec<_>> = some.iter().map(|object| self.object("delete", object)).collect();
            if at_once.is_none() || !self.delete_bulk(&places?).await.map_err(failed)? {
                alone.extend(some);
            }
        }
        // Each is tried again, or says why it cannot be deleted.
        stream::iter(alone.into_iter().map(Ok))
            .try_for_each_concurrent(DELETES_MAX, |object| self.delete(object))
            .await
    }

    /// What was never finished is not at the server.
    async fn tidy(&self, _: &Folder, _: &str) -> Result<()> {
        Ok(())
    }
}
