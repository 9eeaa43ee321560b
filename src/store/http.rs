//! Requests to stores that are reached by HTTP: connections, limits of time, and what is tried again.
//!
//! One try is [`Http::send`]; [`Tries`] says whether and when there is another one. What an answer means is known to the
//! kind of store that asked.

use std::error::Error as _;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, HeaderMap, RETRY_AFTER};
use reqwest::{Body, Certificate, Client, Proxy, RequestBuilder, Response, StatusCode};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use url::Url;

use super::{Error, Reason, Result, Secret};
use crate::error::Causes;

/// The first pause before another try; each later one is twice as long, and all are stretched by chance.
const PAUSE: Duration = Duration::from_millis(200);
/// No pause is longer before chance stretches it, nor is one that the server asks for.
const PAUSE_MAX: Duration = Duration::from_secs(20);
/// What is handed to a connection at a time: whether bytes move is seen by these pieces.
const SENT_AT_ONCE_BYTES: usize = 256 << 10;
/// No answer that is no object is longer: a page of a listing has 1,000 names of up to 1 KiB, or what Keystone says of a
/// cloud.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// How long a server may take that shall say whether it is there.
const REACH_MAX: Duration = Duration::from_secs(10);
/// What to ask oneself of a server that does not answer.
const IS_IT_UP: &str = "is it up, and is that its URL?";

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpSettings {
    /// The certificates, in PEM, of the authorities that are trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Whether any certificate will do, so that whoever is in between can read and change all that is sent.
    pub any_certificate: bool,
    /// The URL of the proxy that all requests go through. The environment's is not looked at.
    pub proxy: Option<Secret>,
    /// How long it may take to connect.
    pub connect_seconds_max: u32,
    /// How long a request may go on without a byte of it or of its answer moving.
    pub idle_seconds_max: u32,
    /// How many requests may wait for their answers at once; so many connections are kept for the next ones.
    pub connections_max: u16,
    /// How often a request that failed for a passing reason is tried again.
    pub retries_max: u16,
}

/// What a configuration that says nothing of it has.
impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            ca_file: None,
            any_certificate: false,
            proxy: None,
            connect_seconds_max: 10,
            idle_seconds_max: 60,
            connections_max: 32,
            retries_max: 8,
        }
    }
}

/// Connections to one server.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    client: Client,
    /// Says in errors whether there is a proxy, and not which one: its URL may have a password.
    through: &'static str,
    idle_max: Duration,
    retries_max: usize,
    requests: Arc<Semaphore>,
}

/// What goes with a request; it may be sent more than once.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    Bytes(Bytes),
    /// One behind the other.
    Parts(Arc<[Bytes]>),
    /// A file with so many bytes.
    File(Arc<File>, u64),
}

/// Why there is no answer that is of use.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// It may pass. The server may have said for how long to wait.
    Passing { error: Arc<io::Error>, pause: Option<Duration> },
    /// The server has answered, and the answer is no.
    Refused(Refusal),
    /// The server is not one to talk to.
    Unusable(Arc<io::Error>),
}

/// An answer that is no success.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) struct Refusal {
    /// Who says it, as [`server_of`] names it.
    pub(crate) server: String,
    pub(crate) status: StatusCode,
    /// The word of the protocol for what is wrong, if it has any.
    pub(crate) code: String,
    /// What is wrong, for people.
    pub(crate) message: String,
}

impl Http {
    /// Prepares to connect, which the first request does.
    pub(crate) fn new(settings: &HttpSettings) -> Result<Self> {
        let unusable =
            |error: reqwest::Error| Error::io("prepare to connect through", "HTTP", io::Error::other(error));
        // Whoever was first has installed the same.
        rustls::crypto::ring::default_provider().install_default().ok();
        let mut client = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .tls_danger_accept_invalid_certs(settings.any_certificate)
            .connect_timeout(Duration::from_secs(settings.connect_seconds_max.into()))
            .pool_max_idle_per_host(settings.connections_max.into());
        if let Some(proxy) = &settings.proxy {
            client = client.proxy(Proxy::all(proxy.reveal()).map_err(unusable)?);
        }
        if let Some(path) = &settings.ca_file {
            let at = |error| Error::io("read the certificates in", path.display(), error);
            let pem = std::fs::read(path).map_err(at)?;
            let certificates = Certificate::from_pem_bundle(&pem);
            let invalid = |error| at(io::Error::new(ErrorKind::InvalidData, error));
            client = client.tls_certs_merge(certificates.map_err(invalid)?);
        }
        let through = if settings.proxy.is_some() { " through the proxy" } else { "" };
        Ok(Self {
            through,
            client: client.build().map_err(unusable)?,
            idle_max: Duration::from_secs(settings.idle_seconds_max.into()),
            retries_max: settings.retries_max.into(),
            requests: Arc::new(Semaphore::new(settings.connections_max.into())),
        })
    }

    /// What requests are made with.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The tries of one request.
    pub(super) fn tries(&self) -> Tries {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(PAUSE)
            .with_max_delay(PAUSE_MAX)
            .with_max_times(self.retries_max)
            .with_jitter();
        Tries { pauses: pauses.build() }
    }

    /// Makes a request until it is answered, as often as its failures pass.
    pub(crate) async fn until_answered<T, F>(
        &self,
        request: impl Fn() -> F,
    ) -> std::result::Result<T, Failure>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        let mut tries = self.tries();
        loop {
            match request().await {
                Ok(answer) => return Ok(answer),
                Err(failure) => tries.pause(failure).await?,
            }
        }
    }

    /// Waits for an answer of `server`, but not for long: somebody asks whether it is there.
    pub(super) async fn soon<T>(
        &self,
        server: impl fmt::Display,
        answer: impl Future<Output = std::result::Result<T, Failure>>,
    ) -> std::result::Result<T, Failure> {
        timeout(REACH_MAX, answer).await.unwrap_or_else(|_| {
            let (seconds, through) = (REACH_MAX.as_secs(), self.through);
            let error = format!("no answer of {server}{through} within {seconds} seconds: {IS_IT_UP}");
            Err(Failure::passing(io::Error::new(ErrorKind::TimedOut, error)))
        })
    }

    /// Sends a request once and waits for the head of its answer, whatever that says.
    pub(crate) async fn send(
        &self,
        request: RequestBuilder,
        body: Payload,
    ) -> std::result::Result<Response, Failure> {
        // It is never closed, so there is always a permit, if late.
        let _permit = self.requests.acquire().await;
        let (moved, mut moves) = watch::channel(());
        let length = body.len();
        let pieces = stream::try_unfold((body, 0, moved), |(body, offset, moved)| async move {
            moved.send_replace(());
            let piece = body.piece(offset).await?;
            let offset = offset + piece.len() as u64;
            Ok::<_, io::Error>((!piece.is_empty()).then_some((piece, (body, offset, moved))))
        });
        let request = match length {
            0 => request.body(Bytes::new()),
            _ => request.body(Body::wrap_stream(pieces)),
        };
        let (client, request) = request.header(CONTENT_LENGTH, length).build_split();
        let request = request.map_err(|error| Failure::unusable(ErrorKind::Other, error.without_url()))?;
        let server = server_of(request.url());
        let answer = client.execute(request);
        tokio::pin!(answer);
        let answer = loop {
            let moving = tokio::select! {
                answer = &mut answer => break answer,
                moving = timeout(self.idle_max, moves.changed()) => moving,
            };
            match moving {
                Ok(Ok(())) => {}
                // All has been sent.
                Ok(Err(_)) => {
                    let answer = timeout(self.idle_max, &mut answer).await;
                    break answer.map_err(|_| self.silent(&server))?;
                }
                Err(_) => return Err(self.silent(&server)),
            }
        };
        let answer = answer.map_err(|error| self.lost(&server, error))?;
        // Before the rest is read: a proxy that has heard enough may cut the connection.
        if answer.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            let text = format!(
                "the proxy on the way to {server} does not let us through ({}): let proxy have a user and a password that it \
                 accepts",
                answer.status()
            );
            return Err(Failure::unusable(ErrorKind::PermissionDenied, text));
        }
        Ok(answer)
    }

    /// The next bytes of an answer; none at its end.
    pub(super) async fn chunk(&self, answer: &mut Response) -> std::result::Result<Option<Bytes>, Failure> {
        match timeout(self.idle_max, answer.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(self.lost(&server_of(answer.url()), error)),
            Err(_) => Err(self.silent(&server_of(answer.url()))),
        }
    }

    /// All bytes of an answer that is no object.
    pub(crate) async fn whole(&self, mut answer: Response) -> std::result::Result<Bytes, Failure> {
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk(&mut answer).await? {
            if whole.len() + chunk.len() > ANSWER_BYTES_MAX {
                let server = server_of(answer.url());
                let error =
                    format!("{server} answers with more than {ANSWER_BYTES_MAX} bytes: is that the URL?");
                return Err(Failure::unusable(ErrorKind::InvalidData, error));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    fn silent(&self, server: &str) -> Failure {
        let (seconds, through) = (self.idle_max.as_secs(), self.through);
        let error = format!(
            "nothing has moved for {seconds} seconds (idle_seconds_max) between us and {server}{through}: is it overloaded, \
             or the network broken?"
        );
        Failure::passing(io::Error::new(ErrorKind::TimedOut, error))
    }

    /// Why there was no answer. The rest of the URL is left out, since a signature is in it.
    fn lost(&self, server: &str, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        if error.is_builder() {
            return Failure::unusable(ErrorKind::Other, error);
        }
        // A certificate that is not trusted now is not trusted later, either.
        if let Some(error @ rustls::Error::InvalidCertificate(_)) = tls_error(&error) {
            let text = format!(
                "{server} is not believed to be that ({error}): let ca_file name who has signed its certificate, or \
                 use a name that the certificate is for"
            );
            return Failure::unusable(ErrorKind::InvalidData, text);
        }
        // What is around it says only that there was a request.
        let cause = match error.source() {
            Some(cause) => Causes(cause).to_string(),
            None => error.to_string(),
        };
        let through = self.through;
        let no_connection = || format!("no connection to {server}{through} ({cause}): {IS_IT_UP}");
        let (kind, text) = match (error.is_timeout(), error.is_connect()) {
            (true, _) => (ErrorKind::TimedOut, no_connection()),
            (false, true) => (ErrorKind::ConnectionRefused, no_connection()),
            (false, false) => {
                let text =
                    format!("the connection to {server}{through} broke ({cause}): its log may say why");
                (ErrorKind::ConnectionReset, text)
            }
        };
        Failure::passing(io::Error::new(kind, text))
    }
}

/// Whom a URL is of: scheme, host and port. What else is in it may be secret.
pub(crate) fn server_of(url: &Url) -> String {
    url.origin().ascii_serialization()
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl Payload {
    /// How many bytes it has.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Parts(parts) => parts.iter().map(|part| part.len() as u64).sum(),
            Self::File(_, bytes) => *bytes,
        }
    }

    /// What is sent next after `offset` bytes; nothing at the end.
    async fn piece(&self, mut offset: u64) -> io::Result<Bytes> {
        let length = (self.len() - offset).min(SENT_AT_ONCE_BYTES as u64) as usize;
        let of = |bytes: &Bytes, offset: u64| {
            let offset = offset as usize;
            bytes.slice(offset..bytes.len().min(offset + length))
        };
        match self {
            Self::Bytes(bytes) => Ok(of(bytes, offset)),
            Self::Parts(parts) => {
                for part in parts.iter() {
                    match offset.checked_sub(part.len() as u64) {
                        Some(behind) => offset = behind,
                        None => return Ok(of(part, offset)),
                    }
                }
                Ok(Bytes::new())
            }
            Self::File(file, _) => {
                let file = file.clone();
                let read = move || {
                    let mut piece = vec![0; length];
                    file.read_exact_at(&mut piece, offset).map(|()| piece.into())
                };
                spawn_blocking(read).await?
            }
        }
    }
}

impl Failure {
    /// Whether the server says that what is asked for is not there: no such object, or no such container or bucket.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.status == StatusCode::NOT_FOUND)
    }

    pub(super) fn passing(error: io::Error) -> Self {
        Self::Passing { error: Arc::new(error), pause: None }
    }

    pub(crate) fn unusable(
        kind: ErrorKind,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Unusable(Arc::new(io::Error::new(kind, error)))
    }

    /// An answer that is no success: some of them pass.
    pub(crate) fn answer(refusal: Refusal, headers: &HeaderMap) -> Self {
        if !refusal.may_pass() {
            return Self::Refused(refusal);
        }
        // The other form, a date, is of no use to a clock that may be wrong.
        let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let text = format!(
            "{refusal}: its log may say why; if it has too much to do, a smaller connections_max asks less of it"
        );
        let error = Arc::new(io::Error::other(text));
        Self::Passing { error, pause: seconds.map(Duration::from_secs) }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered {}", self.server, self.status)?;
        let mut said = [&self.code, &self.message].into_iter().filter(|said| !said.is_empty());
        said.try_for_each(|said| write!(f, " {said}"))
    }
}

impl Refusal {
    /// Whether the same request may succeed later.
    fn may_pass(&self) -> bool {
        const CODES: [&str; 10] = [
            "SlowDown",
            "rateLimitExceeded",
            "userRateLimitExceeded",
            "InternalError",
            "ServiceUnavailable",
            "RequestTimeout",
            // Of two requests on one name that were made at the same time.
            "OperationAborted",
            "ConditionalRequestConflict",
            // What arrived was not what was sent.
            "BadDigest",
            "IncompleteBody",
        ];
        // Swift has 498 for too many requests.
        matches!(self.status.as_u16(), 408 | 425 | 429 | 498 | 500 | 502 | 503 | 504)
            || CODES.contains(&self.code.as_str())
    }
}

/// What is left of the tries of a request.
#[derive(Debug)]
pub(super) struct Tries {
    pauses: ExponentialBackoff,
}

impl Tries {
    /// Waits until it is time to try again, or gives the failure back when it does not pass or has not for too long.
    pub(super) async fn pause(&mut self, failure: Failure) -> std::result::Result<(), Failure> {
        let Failure::Passing { pause, .. } = &failure else { return Err(failure) };
        let Some(own) = self.pauses.next() else { return Err(failure) };
        sleep(pause.map_or(own, |asked| asked.min(PAUSE_MAX).max(own))).await;
        Ok(())
    }
}

/// What TLS has to say about an error, which may lie deep in it.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        cause = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            // It is not its own source.
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

impl From<Failure> for Reason {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Passing { error, .. } => Self::Passing(error),
            Failure::Refused(refusal) => {
                let text = format!("{refusal}: is that the URL of such a server? Its log may say more");
                Self::Other(Arc::new(io::Error::other(text)))
            }
            Failure::Unusable(error) => Self::Other(error),
        }
    }
}
