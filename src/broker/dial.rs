//! One try to connect: TCP, TLS, AMQP's handshake, and what it means when one of them fails.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread;
use std::time::Duration;

use async_rs::Tokio;
use lapin::tcp::{AsyncTcpStream, OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, ErrorKind};
use tokio::time::timeout;
use tracing::warn;

use super::error::{cause, is_access_refused, is_not_allowed};
use super::mend::{self, Mended};
use super::{AmqpUrl, Error, Reach, Tls};

/// How long the broker may take from the first packet to an open connection.
const CONNECT_SECONDS_MAX: u64 = 20;

/// Connects once, to the first broker that lets us.
pub(super) async fn dial(reach: &Reach) -> Result<Connection, Error> {
    let mut dialled = dial_one(reach, &reach.url).await;
    for url in &reach.other_urls {
        if dialled.is_ok() {
            break;
        }
        dialled = dial_one(reach, url).await;
    }
    dialled
}

/// lapin lets go of a connection that is lost on a thread of its own. There async-compat makes a runtime for it, the first time,
/// and panics if no file handles are left for that: so it is made here, before there is any connection.
fn prepare_for_loss() {
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| {
        let made =
            thread::Builder::new().spawn(|| drop(async_compat::Compat::new(()))).map(|thread| thread.join());
        if !matches!(made, Ok(Ok(()))) {
            warn!("no file handles or threads are left: raise their limits (LimitNOFILE, TasksMax)");
        }
    });
}

async fn dial_one(reach: &Reach, url: &AmqpUrl) -> Result<Connection, Error> {
    prepare_for_loss();
    let mut uri = url.uri().clone();
    if reach.heartbeat_seconds > 0 {
        uri.query.heartbeat = Some(reach.heartbeat_seconds);
    }
    let tls = match uri.scheme {
        AMQPScheme::AMQP => None,
        AMQPScheme::AMQPS => Some(tls(&reach.tls)?),
    };
    let properties = ConnectionProperties::default()
        .with_connection_name(reach.connection_name.as_str().into())
        .with_client_property("product".into(), env!("CARGO_PKG_NAME").into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    let socket = Arc::new(Mutex::new(None));
    let patience = Duration::from_secs(CONNECT_SECONDS_MAX);
    let result = timeout(patience, handshake(uri, tls, properties, Arc::clone(&socket))).await;
    // Taken out in any case, for the connection ends only with the last handle on its socket.
    let socket: Option<TcpStream> = socket.lock().unwrap_or_else(PoisonError::into_inner).take();
    match result {
        Ok(result) => result.map_err(|error| refused(url, &error)),
        Err(_) => {
            // Without this lapin's thread would wait as long as the other side is silent.
            if let Some(socket) = socket {
                let _ = socket.shutdown(Shutdown::Both);
            }
            let why = format!("no answer within {CONNECT_SECONDS_MAX} seconds");
            Err(Error::Unreachable { address: url.address(), source: why.into() })
        }
    }
}

/// Leaves a second handle on its socket in `socket`.
async fn handshake(
    uri: AMQPUri,
    tls: Option<OwnedTLSConfig>,
    properties: ConnectionProperties,
    socket: Arc<Mutex<Option<TcpStream>>>,
) -> lapin::Result<Connection> {
    let reactor = Tokio::current();
    let connect = async move |uri: AMQPUri, _| {
        let address = (uri.authority.host.clone(), uri.authority.port);
        let connecting = async {
            let addresses: Vec<_> = tokio::net::lookup_host(address).await?.collect();
            let stream = AsyncTcpStream::connect(&reactor, addresses).await?;
            if let AsyncTcpStream::Plain(stream) = &stream {
                let second = stream.get_ref().as_fd().try_clone_to_owned()?;
                *socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(second.into());
            }
            let stream = match &tls {
                None => stream,
                Some(tls) => stream.into_tls(&uri.authority.host, tls.as_ref()).await?,
            };
            Ok::<_, io::Error>(AsyncTcpStream::Plain(Mended::new(stream)))
        };
        let patience = Duration::from_secs(CONNECT_SECONDS_MAX);
        Ok(timeout(patience, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?)
    };
    Connection::connector(uri, mend::runtime(), connect, properties).await
}

fn refused(url: &AmqpUrl, error: &lapin::Error) -> Error {
    let (address, source) = (url.address(), cause(error));
    if is_access_refused(error) {
        let user = url.uri().authority.userinfo.username.clone();
        return Error::Credentials { address, user, source };
    }
    if is_not_allowed(error) {
        return Error::VirtualHost { address, vhost: url.uri().vhost.clone(), source };
    }
    match error.kind() {
        ErrorKind::IOError(error) if is_tls(error.kind(), url) => Error::Tls { address, source },
        ErrorKind::ParsingError(_) | ErrorKind::InvalidProtocolVersion(_) => {
            Error::Protocol { address, source }
        }
        _ => Error::Unreachable { address, source },
    }
}

fn is_tls(kind: io::ErrorKind, url: &AmqpUrl) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof};
    match kind {
        // So rustls calls everything that it finds wrong.
        InvalidData => true,
        // So a broker that wants another client certificate may end it before its alert arrives.
        ConnectionAborted | ConnectionReset | UnexpectedEof => url.uri().scheme == AMQPScheme::AMQPS,
        _ => false,
    }
}

fn tls(tls: &Tls) -> Result<OwnedTLSConfig, Error> {
    let read = |path: &Path| fs::read(path).map_err(|source| Error::TlsFile { path: path.into(), source });
    let text =
        |path: &Path| fs::read_to_string(path).map_err(|source| Error::TlsFile { path: path.into(), source });
    let identity = match (&tls.client_certificate_file, &tls.client_key_file) {
        (None, None) => None,
        (Some(certificate), Some(key)) => {
            Some(OwnedIdentity::PKCS8 { pem: read(certificate)?, key: read(key)? })
        }
        _ => return Err(Error::TlsPair),
    };
    Ok(OwnedTLSConfig { identity, cert_chain: tls.ca_file.as_deref().map(text).transpose()? })
}
