//! Tokens of a service account: a text that is signed by its key is exchanged for one that is good for an hour or so.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::FutureExt;
use jiff::Timestamp;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_TYPE, HeaderValue};
use rustls::SignatureScheme;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::SigningKey;
use serde::Deserialize;
use serde_json::json;
use url::form_urlencoded::Serializer;

use super::api::{parse, refused};
use crate::store::http::{Failure, Http};
use crate::store::logins::Logins;
use crate::store::{Error, Reason, Result};

/// What a token is for: objects and buckets.
const SCOPE: &str = "https://www.googleapis.com/auth/devstorage.read_write";
/// How long the text that is exchanged for a token is good for; Google takes an hour at most.
const ASSERTION_SECONDS: i64 = 3600;
/// How long before it expires a token is not used any more, unless it is good for less than twice that.
const MARGIN: Duration = Duration::from_secs(60);

/// A token.
pub(super) struct Token {
    /// What requests carry; not shown by `Debug`.
    pub(super) authorization: HeaderValue,
    renew_at: Instant,
}

impl Token {
    /// Whether it is time for another one.
    pub(super) fn is_old(&self) -> bool {
        Instant::now() >= self.renew_at
    }
}

/// Where and how a token is to be had.
struct How {
    http: Http,
    account: Account,
    key: Arc<dyn SigningKey>,
}

/// What Google keeps in the file of a service account's key.
#[derive(Deserialize)]
struct Account {
    client_email: String,
    private_key_id: Option<String>,
    private_key: String,
    token_uri: String,
    project_id: Option<String>,
}

/// Reads the file of a service account. Gives its logins, and the project that it is of.
pub(super) fn logins(http: Http, path: &Path) -> Result<(Logins<Token>, Option<String>)> {
    let at = |error| Error::io("read the key of the service account in", path.display(), error);
    let unusable = |text: String| {
        let error = Arc::new(io::Error::new(ErrorKind::InvalidData, text));
        Error::new("read the key of the service account in", path.display(), Reason::Other(error))
    };
    let text = std::fs::read(path).map_err(at)?;
    // What is wrong may stand beside the key itself, so that it is not repeated.
    let mut account: Account = serde_json::from_slice(&text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        unusable(format!("it is no JSON with a key as Google makes it (line {line}, column {column})"))
    })?;
    let pem = std::mem::take(&mut account.private_key);
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| unusable("its private_key is no key in PEM".into()))?;
    let key = rustls::crypto::ring::default_provider()
        .key_provider
        .load_private_key(key)
        .map_err(|error| unusable(format!("its private_key cannot be used: {error}")))?;
    let project = account.project_id.clone();
    let how = Arc::new(How { http, account, key });
    let logins = Logins::new(move || {
        let how = how.clone();
        async move { how.log_in().await }.boxed()
    });
    Ok((logins, project))
}

impl How {
    /// Asks for a token, and tries that once.
    async fn log_in(&self) -> std::result::Result<Token, Failure> {
        let assertion = self.assertion()?;
        let body = Serializer::new(String::new())
            .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer")
            .append_pair("assertion", &assertion)
            .finish();
        let asked_at = Instant::now();
        let request = self.http.client().post(&self.account.token_uri);
        let request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        let answer = self.http.send(request, Bytes::from(body).into()).await?;
        if !answer.status().is_success() {
            return Err(match refused(&self.http, answer).await {
                Failure::Refused(refusal)
                    if matches!(
                        refusal.status,
                        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
                    ) =>
                {
                    let text =
                        format!("{} does not accept the service account: {refusal}", self.account.token_uri);
                    Failure::unusable(ErrorKind::PermissionDenied, text)
                }
                Failure::Refused(refusal) => {
                    let text = format!("{} gives no tokens: {refusal}", self.account.token_uri);
                    Failure::unusable(ErrorKind::InvalidInput, text)
                }
                failure => failure,
            });
        }
        let Answer { access_token, expires_in } = parse(&self.http.whole(answer).await?)?;
        let mut authorization = HeaderValue::try_from(format!("Bearer {access_token}")).map_err(|_| {
            let text = format!("{} has given a token that no header can have", self.account.token_uri);
            Failure::unusable(ErrorKind::InvalidData, text)
        })?;
        authorization.set_sensitive(true);
        let good_for = Duration::from_secs(expires_in);
        Ok(Token { authorization, renew_at: asked_at + good_for.saturating_sub(MARGIN).max(good_for / 2) })
    }

    /// The text that proves who we are: a JWT, signed with RS256.
    fn assertion(&self) -> std::result::Result<String, Failure> {
        let now = Timestamp::now().as_second();
        let mut head = json!({ "alg": "RS256", "typ": "JWT" });
        if let Some(id) = &self.account.private_key_id {
            head["kid"] = id.as_str().into();
        }
        let claims = json!({
            "iss": self.account.client_email,
            "scope": SCOPE,
            "aud": self.account.token_uri,
            "iat": now,
            "exp": now + ASSERTION_SECONDS,
        });
        let base64 = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        let text =
            format!("{}.{}", base64(head.to_string().as_bytes()), base64(claims.to_string().as_bytes()));
        let unusable = |text: String| Failure::unusable(ErrorKind::InvalidData, text);
        let signer = self
            .key
            .choose_scheme(&[SignatureScheme::RSA_PKCS1_SHA256])
            .ok_or_else(|| unusable("the key of the service account is none of RSA".into()))?;
        let signature = signer
            .sign(text.as_bytes())
            .map_err(|error| unusable(format!("the key does not sign: {error}")))?;
        Ok(format!("{text}.{}", base64(&signature)))
    }
}

/// What is answered to who may have a token.
#[derive(Deserialize)]
struct Answer {
    access_token: String,
    /// In seconds.
    expires_in: u64,
}
