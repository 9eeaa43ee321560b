//! Barbican's API, as far as keys are copied and deleted by it: <https://docs.openstack.org/barbican/latest/api/reference/secrets.html>.
//!
//! A key goes through memory only: what holds it is not shown, and what a server says of a request with a key in it is not
//! passed on.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::warn;
use url::Url;
use uuid::Uuid;

use super::{Error, FIXED_KEY_ID};
use crate::cinder::conf::{self, Conf};
use crate::error::{Causes, Class};
use crate::message::oslo::Context;
use crate::stand_in;
use crate::stand_in::stores::{self, needed, url};
use crate::store::http::{Failure, Http, Refusal, server_of};
use crate::store::logins::Logins;
use crate::store::swift::login::{Session, hidden, logins};
use crate::store::{Credentials, Endpoint, HttpSettings, Secret, SecretFrom};

/// How often a request that failed for a passing reason is tried again; whoever asked does that, too.
const RETRIES_MAX: u16 = 4;
/// What Keystone's catalog calls Barbican.
const SERVICE_TYPE: &str = "key-manager";
/// The version that is spoken where nothing is said of it.
const API_VERSION: &str = "v1";
/// The first that tells who uses a key; the form that castellan speaks.
const MICROVERSION: &str = "key-manager 1.1";

/// A server, and how it is spoken to.
pub(super) struct Barbican {
    http: Http,
    /// Where it is, if not where the catalog of a request says.
    endpoint: Option<Url>,
    interface: String,
    region: Option<String>,
    version: String,
    /// What [`FIXED_KEY_ID`] stands for.
    fixed_key: Option<Secret>,
    /// Where the tokens come from that go with those of users.
    beside: Option<Logins<Session>>,
    /// The service's own right to delete what a user may not.
    own: Option<Logins<Session>>,
}

/// Where a server is, and what opens it.
struct Access {
    endpoint: Url,
    token: HeaderValue,
    service_token: Option<HeaderValue>,
}

/// A key, without a name and an id.
struct Key {
    algorithm: Option<String>,
    /// In bits.
    length: Option<u64>,
    secret_type: Option<String>,
    content_type: String,
    /// The key: in Base64, or as it is if it is a text.
    payload: Secret,
}

impl Barbican {
    /// Fails where the options cannot be used.
    pub(super) fn new(conf: &Conf) -> Result<Self, stand_in::Error> {
        let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let (options, own, beside) = (&conf.barbican, &conf.keystone_authtoken, &conf.barbican_service_user);
        let endpoint = text(&options.barbican_endpoint);
        let endpoint = endpoint.map(|text| url("[barbican] barbican_endpoint", &text)).transpose()?;
        let http = Http::new(&HttpSettings {
            ca_file: text(&options.verify_ssl_path).map(Into::into),
            retries_max: RETRIES_MAX,
            ..HttpSettings::default()
        })?;
        let interface = options.barbican_endpoint_type.clone();
        let region = text(&options.barbican_region_name);
        let in_catalog = Endpoint::Catalog {
            service_type: SERVICE_TYPE.into(),
            interface: interface.clone(),
            region: region.clone(),
        };
        let at = endpoint.clone().map_or(in_catalog, Endpoint::At);
        let own = User {
            auth_url: &own.auth_url,
            username: &own.username,
            password: &own.password,
            user_domain_name: &own.user_domain_name,
            project_name: &own.project_name,
            project_domain_name: &own.project_domain_name,
        };
        let beside = User {
            auth_url: &beside.auth_url,
            username: &beside.username,
            password: &beside.password,
            user_domain_name: &beside.user_domain_name,
            project_name: &beside.project_name,
            project_domain_name: &beside.project_domain_name,
        };
        let logins = |(auth_url, credentials)| logins(http.clone(), auth_url, &credentials, at.clone());
        // Cinder needs that section for its API, whatever kind of login it has.
        let own = own.login().ok().map(logins).transpose()?;
        let beside = match options.send_service_user_token {
            true => Some(logins(beside.login()?)?),
            false => None,
        };
        Ok(Self {
            http,
            endpoint,
            interface,
            region,
            version: text(&options.barbican_api_version).unwrap_or_else(|| API_VERSION.into()),
            fixed_key: conf.key_manager.fixed_key.as_ref().map(|key| Secret::new(key.reveal().into())),
            beside,
            own,
        })
    }

    /// Makes a copy of a key under a name that no other key has, and gives its id. If there is one of that name, that is it.
    pub(super) async fn copy(&self, context: &Context, id: &str, name: &str) -> Result<String, Error> {
        let failed = |failure| failed("copy", id, failure);
        let access = self.access(context).await.map_err(failed)?;
        let copy = || async {
            // It may have been made by an earlier request, or by this one, whose answer was lost.
            if let Some(id) = self.find(&access, name).await? {
                return Ok(id);
            }
            let key = match &self.fixed_key {
                Some(key) if id == FIXED_KEY_ID => fixed(key)?,
                _ => self.read(&access, id).await?,
            };
            self.keep(&access, &key, name).await
        };
        self.http.until_answered(copy).await.map_err(failed)
    }

    /// Deletes a key, as whoever asks or, if they may not, as the service itself. That it is not there is no failure.
    pub(super) async fn delete(&self, context: &Context, id: &str) -> Result<(), Error> {
        if self.fixed_key.is_some() && id == FIXED_KEY_ID {
            return Ok(());
        }
        let by_user = async {
            let access = self.access(context).await?;
            self.http.until_answered(|| self.remove(&access, id)).await
        };
        let failure = match (by_user.await, &self.own) {
            (Ok(()), _) => return Ok(()),
            (Err(failure @ (Failure::Refused(_) | Failure::Unusable(_))), Some(own)) => {
                match self.delete_as(own, id).await {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        let error = failed("delete", id, error);
                        warn!(key = id, error = %Causes(&error), "the service itself cannot delete the key, either");
                        failure
                    }
                }
            }
            (Err(failure), _) => failure,
        };
        Err(failed("delete", id, failure))
    }

    /// Deletes a key as a user who logs in.
    async fn delete_as(&self, user: &Logins<Session>, id: &str) -> Result<(), Failure> {
        let mut session = self.http.until_answered(|| user.current(None)).await?;
        let mut is_new = false;
        loop {
            let access = Access {
                endpoint: session.storage_url.clone(),
                token: session.token.clone(),
                service_token: None,
            };
            match self.http.until_answered(|| self.remove(&access, id)).await {
                Err(Failure::Refused(refusal)) if refusal.status == StatusCode::UNAUTHORIZED && !is_new => {
                    session = self.http.until_answered(|| user.current(Some(&session))).await?;
                    is_new = true;
                }
                done => return done,
            }
        }
    }

    /// What a request opens.
    async fn access(&self, context: &Context) -> Result<Access, Failure> {
        let denied = |text: &str| Failure::unusable(ErrorKind::PermissionDenied, text);
        let token = context.text("auth_token").filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| denied("the request has no token of its user: send it again"))?;
        let service_token = match &self.beside {
            Some(user) => Some(self.http.until_answered(|| user.current(None)).await?.token.clone()),
            None => None,
        };
        let endpoint = match &self.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => self.endpoint_in(context)?,
        };
        Ok(Access { endpoint, token: hidden(token)?, service_token })
    }

    /// Where the catalog of a request says that the server is.
    fn endpoint_in(&self, context: &Context) -> Result<Url, Failure> {
        let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
        let services = list(context.get("service_catalog"));
        let of_type = services.iter().filter(|service| service["type"] == SERVICE_TYPE);
        let name = format!("{}URL", self.interface);
        let fits = |endpoint: &&Value| {
            endpoint.get(&name).is_some()
                && self.region.as_ref().is_none_or(|region| endpoint["region"] == region.as_str())
        };
        let endpoints: Vec<Value> = of_type.flat_map(|service| list(service.get("endpoints"))).collect();
        let found = endpoints.iter().find(fits).and_then(|endpoint| endpoint[&name].as_str());
        let url = found.and_then(|text| url("the catalog", text).ok());
        url.ok_or_else(|| {
            let region = self.region.as_ref().map_or_else(String::new, |region| format!(" in region {region}"));
            let text = format!(
                "the request has no {name} of {SERVICE_TYPE}{region} in its catalog: write [barbican] barbican_endpoint"
            );
            Failure::unusable(ErrorKind::NotFound, text)
        })
    }

    /// The key of this name, by its id.
    async fn find(&self, access: &Access, name: &str) -> Result<Option<String>, Failure> {
        let found = self.ask(access, Method::GET, &[], &[("name", name)], None).await?;
        let Listing { secrets } = parse(&found)?;
        let of_name = |secret: &&Found| {
            secret.name.as_deref() == Some(name)
                && secret.status == "ACTIVE"
                && secret.content_types.is_some()
        };
        secrets.iter().find(of_name).map(|secret| id_of(&secret.secret_ref)).transpose()
    }

    /// A key, with what it is good for.
    async fn read(&self, access: &Access, id: &str) -> Result<Key, Failure> {
        let Description { algorithm, bit_length, secret_type, content_types, .. } =
            self.describe(access, id).await?;
        let content_type = content_types.and_then(|types| types.default).ok_or_else(|| {
            Failure::unusable(ErrorKind::InvalidData, "there is an entry of that id, and no key in it")
        })?;
        let path = [checked(id)?, "payload".into()];
        let payload = self.request(access, Method::GET, &path, &[], &content_type, None).await?;
        let payload = match content_type.as_str() {
            "text/plain" => String::from_utf8(payload.to_vec()).map_err(|_| {
                Failure::unusable(ErrorKind::InvalidData, "the key is said to be a text, and is none")
            })?,
            _ => BASE64_STANDARD.encode(&payload),
        };
        let payload = Secret::new(payload);
        Ok(Key { algorithm, length: bit_length, secret_type, content_type, payload })
    }

    /// Stores a key under a new id. As castellan does, it tells nothing of how and until when the key may be used.
    async fn keep(&self, access: &Access, key: &Key, name: &str) -> Result<String, Failure> {
        let mut body = json!({ "name": name, "payload": key.payload.reveal() });
        match key.content_type.as_str() {
            "text/plain" => body["payload_content_type"] = json!("text/plain"),
            _ => {
                body["payload_content_type"] = json!("application/octet-stream");
                body["payload_content_encoding"] = json!("base64");
            }
        }
        if let Some(algorithm) = &key.algorithm {
            body["algorithm"] = json!(algorithm);
        }
        if let Some(length) = key.length {
            body["bit_length"] = json!(length);
        }
        if let Some(secret_type) = &key.secret_type {
            body["secret_type"] = json!(secret_type);
        }
        let answer = self.ask(access, Method::POST, &[], &[], Some(&body)).await?;
        let Stored { secret_ref } = parse(&answer)?;
        id_of(&secret_ref)
    }

    /// Removes a key that nobody else has said to need.
    async fn remove(&self, access: &Access, id: &str) -> Result<(), Failure> {
        match self.describe(access, id).await {
            Ok(Description { consumers, .. }) if consumers.is_empty() => {}
            Ok(Description { consumers, .. }) => {
                let text = format!(
                    "{} others have said there that they use it (its consumers): remove them first",
                    consumers.len()
                );
                return Err(Failure::unusable(ErrorKind::ResourceBusy, text));
            }
            Err(failure) if failure.is_missing() => return Ok(()),
            Err(failure) => return Err(failure),
        }
        match self.ask(access, Method::DELETE, &[checked(id)?], &[], None).await {
            Err(failure) if failure.is_missing() => Ok(()),
            answer => answer.map(drop),
        }
    }

    async fn describe(&self, access: &Access, id: &str) -> Result<Description, Failure> {
        parse(&self.ask(access, Method::GET, &[checked(id)?], &[], None).await?)
    }

    /// Sends a request once that is answered by JSON, if by anything.
    async fn ask(
        &self,
        access: &Access,
        method: Method,
        path: &[String],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Bytes, Failure> {
        self.request(access, method, path, query, "application/json", body).await
    }

    async fn request(
        &self,
        access: &Access,
        method: Method,
        path: &[String],
        query: &[(&str, &str)],
        accept: &str,
        body: Option<&Value>,
    ) -> Result<Bytes, Failure> {
        let mut url = access.endpoint.clone();
        let has_version = url.path().trim_end_matches('/').ends_with(&format!("/{}", self.version));
        // Only a URL such as `mailto:` has no path.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty();
            if !has_version {
                segments.push(&self.version);
            }
            segments.push("secrets").extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request =
            self.http.client().request(method, url).header("x-auth-token", access.token.clone());
        if let Some(token) = &access.service_token {
            request = request.header("x-service-token", token.clone());
        }
        request = request.header("openstack-api-version", MICROVERSION).header(ACCEPT, accept);
        let content = match body {
            Some(body) => {
                request = request.header(CONTENT_TYPE, "application/json");
                Bytes::from(body.to_string())
            }
            None => Bytes::new(),
        };
        let answer = self.http.send(request, content.into()).await?;
        let (server, status, headers) = (server_of(answer.url()), answer.status(), answer.headers().clone());
        let said = self.http.whole(answer).await?;
        if status.is_success() {
            return Ok(said);
        }
        let message = match body {
            None => serde_json::from_slice(&said)
                .map_or_else(|_| String::new(), |Said { description }| description),
            // It may repeat what it was sent.
            Some(_) => String::new(),
        };
        Err(Failure::answer(Refusal { server, status, code: String::new(), message }, &headers))
    }
}

/// A user of Keystone, by the options of a section.
struct User<'a> {
    auth_url: &'a Option<String>,
    username: &'a Option<String>,
    password: &'a Option<conf::Secret>,
    user_domain_name: &'a Option<String>,
    project_name: &'a Option<String>,
    project_domain_name: &'a Option<String>,
}

impl User<'_> {
    /// Where and how to log in. The error is about the one section that must be whole.
    fn login(&self) -> Result<(Url, Credentials), stores::Error> {
        const NEEDS: &str = "[barbican] send_service_user_token needs it";
        let domain = |name: &Option<String>| name.clone().unwrap_or_else(|| "Default".into());
        let auth_url = "[barbican_service_user] auth_url";
        let auth_url = url(auth_url, needed(auth_url, self.auth_url.as_deref(), NEEDS)?)?;
        let user = needed("[barbican_service_user] username", self.username.as_deref(), NEEDS)?;
        let password = self.password.as_ref().map(conf::Secret::reveal);
        let password = needed("[barbican_service_user] password", password, NEEDS)?;
        let project = needed("[barbican_service_user] project_name", self.project_name.as_deref(), NEEDS)?;
        let credentials = Credentials::Password {
            user: user.into(),
            user_domain: domain(self.user_domain_name),
            project: project.into(),
            project_domain: domain(self.project_domain_name),
            password: SecretFrom::Setting(Secret::new(password.into())),
        };
        Ok((auth_url, credentials))
    }
}

/// The key of `fixed_key`, as castellan has it.
fn fixed(key: &Secret) -> Result<Key, Failure> {
    let bytes = hex::decode(key.reveal()).map_err(|_| {
        Failure::unusable(
            ErrorKind::InvalidInput,
            "[key_manager] fixed_key is not written in hexadecimal digits",
        )
    })?;
    Ok(Key {
        algorithm: Some("AES".into()),
        length: Some(bytes.len() as u64 * 8),
        secret_type: Some("symmetric".into()),
        content_type: "application/octet-stream".into(),
        payload: Secret::new(BASE64_STANDARD.encode(&bytes)),
    })
}

/// An id that can stand in a URL.
fn checked(id: &str) -> Result<String, Failure> {
    let id = Uuid::try_parse(id);
    let id = id
        .map_err(|_| Failure::unusable(ErrorKind::InvalidInput, "that is no id of a key, which is a UUID"))?;
    Ok(id.to_string())
}

/// The id in the reference that an answer has to a key.
fn id_of(secret_ref: &str) -> Result<String, Failure> {
    checked(secret_ref.trim_end_matches('/').rsplit('/').next().unwrap_or_default())
}

fn parse<T: serde::de::DeserializeOwned>(answer: &[u8]) -> Result<T, Failure> {
    // The error of the parser may show what is there.
    serde_json::from_slice(answer).map_err(|_| {
        let text = "the answer is not what Barbican answers: is that its URL?";
        Failure::unusable(ErrorKind::InvalidData, text)
    })
}

/// What a failure means to whoever wanted that done with a key.
fn failed(action: &'static str, id: &str, failure: Failure) -> Error {
    let (class, source) = match failure {
        Failure::Passing { error, .. } => (Class::Transient, error),
        Failure::Unusable(error) => (Class::Permanent, error),
        Failure::Refused(refusal) => {
            let (kind, text) = match refusal.status {
                StatusCode::UNAUTHORIZED => (
                    ErrorKind::PermissionDenied,
                    format!(
                        "the key manager does not accept the token, which may have expired: ask again with a new one: {refusal}"
                    ),
                ),
                StatusCode::FORBIDDEN => (
                    ErrorKind::PermissionDenied,
                    format!("who asks may not do that with this key, or with keys at all: {refusal}"),
                ),
                StatusCode::NOT_FOUND => {
                    (ErrorKind::NotFound, format!("the key manager has no such key: {refusal}"))
                }
                _ => (ErrorKind::Other, format!("the key manager refuses it: {refusal}")),
            };
            (Class::Permanent, Arc::new(io::Error::new(kind, text)))
        }
    };
    Error::Server { action, id: id.into(), class, source }
}

/// The page of a listing.
#[derive(Deserialize)]
struct Listing {
    secrets: Vec<Found>,
}

#[derive(Deserialize)]
struct Found {
    secret_ref: String,
    name: Option<String>,
    status: String,
    /// Not there without a key.
    content_types: Option<ContentTypes>,
}

#[derive(Deserialize)]
struct Stored {
    secret_ref: String,
}

#[derive(Deserialize)]
struct Description {
    algorithm: Option<String>,
    bit_length: Option<u64>,
    secret_type: Option<String>,
    content_types: Option<ContentTypes>,
    #[serde(default)]
    consumers: Vec<Value>,
}

#[derive(Deserialize)]
struct ContentTypes {
    default: Option<String>,
}

/// What is said where the answer is no.
#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    description: String,
}
