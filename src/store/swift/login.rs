//! Logging in: by Swift's own way, or to Keystone.

use std::future;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::FutureExt;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

use super::api::{parse, refused};
use super::{Credentials, Endpoint};
use crate::store::http::{Failure, Http, server_of};
use crate::store::logins::Logins;
use crate::store::{Result, Secret};

/// What a login gives: until the token expires, which the server tells by refusing it.
#[derive(Debug)]
pub(crate) struct Session {
    /// Not shown by `Debug`.
    pub(crate) token: HeaderValue,
    /// The account, or whatever else the [`Endpoint`] stands for.
    pub(crate) storage_url: Url,
}

/// Where and how to log in.
struct How {
    http: Http,
    auth_url: Url,
    proof: Proof,
    endpoint: Endpoint,
}

enum Proof {
    V1 {
        user: String,
        key: Secret,
    },
    /// What Keystone is told, as JSON.
    V3(Secret),
}

/// The logins at one server: `auth_url` is as in [`SwiftSettings`](super::SwiftSettings).
pub(crate) fn logins(
    http: Http,
    mut auth_url: Url,
    credentials: &Credentials,
    endpoint: Endpoint,
) -> Result<Logins<Session>> {
    let proof = match credentials {
        Credentials::V1 { user, key } => Proof::V1 { user: user.clone(), key: key.read()? },
        Credentials::Password { user, user_domain, project, project_domain, password } => {
            let user = json!({
                "name": user,
                "domain": { "name": user_domain },
                "password": password.read()?.reveal(),
            });
            let project = json!({ "name": project, "domain": { "name": project_domain } });
            v3(&json!({
                "identity": { "methods": ["password"], "password": { "user": user } },
                "scope": { "project": project },
            }))
        }
        Credentials::ApplicationCredential { id, secret } => v3(&json!({ "identity": {
            "methods": ["application_credential"],
            "application_credential": { "id": id, "secret": secret.read()?.reveal() },
        }})),
        Credentials::Token(token) => {
            let given = Given { token: token.clone(), endpoint, is_used: AtomicBool::new(false) };
            return Ok(Logins::new(move || future::ready(given.log_in()).boxed()));
        }
    };
    if matches!(proof, Proof::V3(_)) {
        let path = auth_url.path().trim_end_matches('/');
        let path = format!("{}/v3/auth/tokens", path.strip_suffix("/v3").unwrap_or(path));
        auth_url.set_path(&path);
    }
    let how = Arc::new(How { http, auth_url, proof, endpoint });
    Ok(Logins::new(move || {
        let how = how.clone();
        async move { how.log_in().await }.boxed()
    }))
}

fn v3(auth: &Value) -> Proof {
    Proof::V3(Secret::new(json!({ "auth": auth }).to_string()))
}

/// A token of somebody else's.
struct Given {
    token: Secret,
    endpoint: Endpoint,
    is_used: AtomicBool,
}

impl Given {
    /// Gives the token, once: whoever asks again was refused with it.
    fn log_in(&self) -> std::result::Result<Session, Failure> {
        let Endpoint::At(storage_url) = self.endpoint.clone() else { return Err(nowhere()) };
        if self.is_used.swap(true, Ordering::Relaxed) {
            let text = format!(
                "{} does not accept the user's token, which may have expired: ask again with a new one",
                server_of(&storage_url)
            );
            return Err(Failure::unusable(ErrorKind::PermissionDenied, text));
        }
        Ok(Session { token: hidden(self.token.reveal())?, storage_url })
    }
}

/// That nobody says where the account is.
fn nowhere() -> Failure {
    let text = "the server has not said where the account is: write storage_url";
    Failure::unusable(ErrorKind::InvalidData, text)
}

impl How {
    /// Logs in, and tries that once.
    async fn log_in(&self) -> std::result::Result<Session, Failure> {
        let (token, told) = match &self.proof {
            Proof::V1 { user, key } => {
                let request = self.http.client().request(Method::GET, self.auth_url.clone());
                let request = request.header("x-auth-user", user).header("x-auth-key", hidden(key.reveal())?);
                let answer = self.send(request, Bytes::new()).await?;
                let token = header(answer.headers(), "x-auth-token")?;
                (token, answer.headers().get("x-storage-url").and_then(|url| url.to_str().ok()?.parse().ok()))
            }
            Proof::V3(proof) => {
                let request = self.http.client().request(Method::POST, self.auth_url.clone());
                let request = request.header(CONTENT_TYPE, "application/json");
                let answer = self.send(request, proof.reveal().to_owned().into()).await?;
                let token = header(answer.headers(), "x-subject-token")?;
                let Catalog { token: of_token } = parse(&self.http.whole(answer).await?)?;
                (token, self.find(&of_token.catalog)?)
            }
        };
        let storage_url = match &self.endpoint {
            Endpoint::At(url) => Some(url.clone()),
            _ => told,
        };
        Ok(Session { token, storage_url: storage_url.ok_or_else(nowhere)? })
    }

    async fn send(&self, request: RequestBuilder, body: Bytes) -> std::result::Result<Response, Failure> {
        let answer = self.http.send(request, body.into()).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        Err(match refused(&self.http, answer).await {
            Failure::Refused(refusal)
                if matches!(refusal.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) =>
            {
                let text =
                    format!("{} does not accept user and password, correct them: {refusal}", self.auth_url);
                Failure::unusable(ErrorKind::PermissionDenied, text)
            }
            Failure::Refused(refusal) => {
                let text = format!("{} is no URL to log in at: {refusal}", self.auth_url);
                Failure::unusable(ErrorKind::InvalidInput, text)
            }
            failure => failure,
        })
    }

    /// The endpoint that is asked for, if one is.
    fn find(&self, catalog: &[Service]) -> std::result::Result<Option<Url>, Failure> {
        let Endpoint::Catalog { service_type, interface, region } = &self.endpoint else { return Ok(None) };
        let of_type = catalog.iter().filter(|service| service.service_type == *service_type);
        let endpoints: Vec<&CatalogEndpoint> = of_type.flat_map(|service| &service.endpoints).collect();
        let fits = |endpoint: &&&CatalogEndpoint| {
            let region_fits = region.as_ref().is_none_or(|region| endpoint.region.as_ref() == Some(region));
            endpoint.interface == *interface && region_fits
        };
        if let Some(endpoint) = endpoints.iter().find(fits) {
            let text = format!("the catalog has {:?}, which is no URL", endpoint.url);
            return endpoint
                .url
                .parse()
                .map(Some)
                .map_err(|_| Failure::unusable(ErrorKind::InvalidData, text));
        }
        let wanted = match region {
            Some(region) => format!("{interface} endpoint in region {region}"),
            None => format!("{interface} endpoint"),
        };
        let there = |endpoint: &&CatalogEndpoint| {
            format!("{} in {}", endpoint.interface, endpoint.region.as_deref().unwrap_or("no region"))
        };
        let there: Vec<String> = endpoints.iter().map(there).collect();
        let there = if there.is_empty() { "no endpoint at all".into() } else { there.join(", ") };
        let text = format!("Keystone's catalog has no {wanted} for {service_type}: it has {there}");
        Err(Failure::unusable(ErrorKind::NotFound, text))
    }
}

/// What Keystone answers besides the token itself.
#[derive(Deserialize)]
struct Catalog {
    token: OfToken,
}

#[derive(Deserialize)]
struct OfToken {
    #[serde(default)]
    catalog: Vec<Service>,
}

#[derive(Deserialize)]
struct Service {
    #[serde(rename = "type")]
    service_type: String,
    endpoints: Vec<CatalogEndpoint>,
}

#[derive(Deserialize)]
struct CatalogEndpoint {
    interface: String,
    region: Option<String>,
    url: String,
}

fn header(headers: &HeaderMap, name: &str) -> std::result::Result<HeaderValue, Failure> {
    let text = "the server has answered a login without a token: is auth_url right?";
    let mut value =
        headers.get(name).cloned().ok_or_else(|| Failure::unusable(ErrorKind::InvalidData, text))?;
    value.set_sensitive(true);
    Ok(value)
}

/// A header that is not shown.
pub(crate) fn hidden(text: &str) -> std::result::Result<HeaderValue, Failure> {
    let unusable = |_| {
        Failure::unusable(
            ErrorKind::InvalidInput,
            "the password or token has characters that no header can have",
        )
    };
    let mut value = HeaderValue::from_bytes(text.as_bytes()).map_err(unusable)?;
    value.set_sensitive(true);
    Ok(value)
}
