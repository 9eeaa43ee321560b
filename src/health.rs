//! Answers over HTTP how it stands with a worker, for whatever starts workers, stops them, and sends people to look.
//!
//! `/healthz` says whether the worker lives, `/readyz` whether it takes jobs: 200 if so, 503 if not, and in either case a
//! [`Report`] as JSON. It must not know jobs or the broker: what there is to say, it is told.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

/// Connections that are answered at once. Whoever comes after them waits until one has ended.
const CONNECTIONS_MAX: usize = 16;
/// How long a connection may take, with its one request and the answer.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(3);
/// How long a request may be.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// How long to wait when no connection can be taken, as without a free file handle.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// What a worker is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It looks whether its stores can be used, and takes no jobs yet.
    Starting,
    /// It has no connection to the broker.
    NoBroker,
    /// It is connected, and does not consume the job queue, or not yet.
    NoQueue,
    /// It takes jobs.
    Ready,
    /// It was told to stop: it takes no more jobs, and lets those that run come to their end.
    Draining,
    /// It does nothing any more, and should be killed.
    Stuck,
}

/// How it stands with a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What it is at.
    pub phase: Phase,
    /// Why it takes no jobs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// How many jobs run.
    pub running_count: usize,
    /// Since when it has been connected to the broker; null without a connection.
    pub broker_connected_since: Option<Timestamp>,
    /// The stores that it could not reach yet, and why; jobs of the others are done.
    pub stores_not_reached: BTreeMap<String, String>,
}

/// Takes the address. Fails if it cannot be had.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).await?;
    info!(address = %listener.local_addr()?, "health is told over HTTP");
    Ok(listener)
}

/// Answers whoever asks, with what `report` says at that moment. Never ends.
pub async fn serve(
    listener: TcpListener,
    report: impl Fn() -> Report + Clone + Send + 'static,
) -> Infallible {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => drop(connections.spawn(answer(stream, report.clone()))),
                Err(error) => {
                    warn!(%error, "whoever asks after health cannot be answered");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(stream: TcpStream, report: impl Fn() -> Report) {
    let respond = service_fn(move |request: Request<Incoming>| {
        let response = respond(request.method(), request.uri().path(), &report);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(REQUEST_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), respond);
    // What goes wrong concerns nobody but whoever has asked.
    let _ = timeout(CONNECTION_TIME_MAX, connection).await;
}

fn respond(method: &Method, path: &str, report: &impl Fn() -> Report) -> Response<Full<Bytes>> {
    let is_well: fn(Phase) -> bool = match path {
        "/healthz" => |phase| phase != Phase::Stuck,
        "/readyz" => |phase| phase == Phase::Ready,
        _ => return told(StatusCode::NOT_FOUND, "here are /healthz and /readyz\n".into(), "text/plain"),
    };
    if ![Method::GET, Method::HEAD].contains(method) {
        return told(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".into(), "text/plain");
    }
    let report = report();
    let status = if is_well(report.phase) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    match serde_json::to_vec(&report) {
        Ok(body) => told(status, body.into(), "application/json"),
        Err(_) => told(StatusCode::INTERNAL_SERVER_ERROR, Bytes::new(), "text/plain"),
    }
}

fn told(status: StatusCode, body: Bytes, content_type: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn report(phase: Phase) -> Report {
        let why = (phase != Phase::Ready).then(|| "because".into());
        let stores_not_reached = BTreeMap::new();
        Report { phase, why, running_count: 2, broker_connected_since: None, stores_not_reached }
    }

    /// Serves that report, and gives the address.
    async fn serving(phase: Phase) -> SocketAddr {
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, move || report(phase)));
        address
    }

    /// Sends this, and gives all that is answered.
    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn status(address: SocketAddr, method: &str, path: &str) -> String {
        let answer = ask(address, &format!("{method} {path} HTTP/1.1\r\nhost: h\r\n\r\n")).await;
        answer.split(' ').nth(1).unwrap().into()
    }

    #[tokio::test]
    async fn each_phase_is_told_by_status_and_body() {
        use Phase::*;
        let cases = [
            (Starting, "starting", "200", "503"),
            (NoBroker, "no-broker", "200", "503"),
            (NoQueue, "no-queue", "200", "503"),
            (Ready, "ready", "200", "200"),
            (Draining, "draining", "200", "503"),
            (Stuck, "stuck", "503", "503"),
        ];
        for (phase, word, healthy, ready) in cases {
            let address = serving(phase).await;
            assert_eq!(status(address, "GET", "/healthz").await, healthy, "{word}");
            assert_eq!(status(address, "HEAD", "/readyz").await, ready, "{word}");
            let answer = ask(address, "GET /readyz?verbose HTTP/1.0\r\n\r\n").await;
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(ready) && head.contains("application/json"), "{head}");
            let why = if phase == Ready { "" } else { r#""why":"because","# };
            let rest = r#""running_count":2,"broker_connected_since":null,"stores_not_reached":{}}"#;
            assert_eq!(body, format!(r#"{{"phase":"{word}",{why}{rest}"#));
        }
    }

    #[tokio::test]
    async fn what_is_not_there_and_what_may_not_be_done_is_said() {
        let address = serving(Phase::Ready).await;
        assert_eq!(status(address, "GET", "/").await, "404");
        assert_eq!(status(address, "POST", "/readyz").await, "405");
        let endless = format!("GET /{}", "x".repeat(REQUEST_BYTES_MAX - 5));
        let answer = ask(address, &endless).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        // It lives on.
        assert_eq!(status(address, "GET", "/readyz").await, "200");
    }

    #[tokio::test]
    async fn whoever_says_nothing_keeps_nobody_from_being_answered() {
        let address = serving(Phase::Ready).await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert_eq!(status(address, "GET", "/healthz").await, "200");
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "it was left open");
        }
    }
}
