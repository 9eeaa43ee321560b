//! Objects that are read from a server: streams that go on where a connection broke.

use std::io::{self, ErrorKind};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use reqwest::header::HeaderName;
use reqwest::{Response, StatusCode};
use tokio::sync::mpsc::Sender;

use super::http::{Failure, Http, Refusal, Tries, server_of};
use super::{Error, ObjectName, PIECE_BYTES, Pieces, Result};

/// Asks for the object, or for what is left of it.
type Open =
    Box<dyn Fn(Option<Rest>) -> BoxFuture<'static, std::result::Result<Response, Failure>> + Send + Sync>;

/// What is left of an object.
pub(super) struct Rest {
    /// Where it begins.
    pub(super) offset: u64,
    /// What the server has called this version of the object, if it has.
    pub(super) version: Option<String>,
}

impl Rest {
    /// The headers that ask for it.
    pub(super) fn headers(self) -> Vec<(&'static str, String)> {
        let range = ("range", format!("bytes={}-", self.offset));
        [range].into_iter().chain(self.version.map(|etag| ("if-match", etag))).collect()
    }
}

/// Reads an object over as many connections as break while it does.
pub(super) struct Reader {
    pub(super) http: Http,
    pub(super) object: ObjectName,
    /// What a failure means.
    pub(super) explain: Box<dyn Fn(Failure) -> Error + Send + Sync>,
    pub(super) open: Open,
    /// The header by which the server names the version of an object.
    pub(super) version: HeaderName,
}

impl Reader {
    /// Opens the object, and reads it on a task of its own, which ends with the object or with whoever takes it.
    pub(super) async fn start(self) -> Result<Pieces> {
        let answer = (self.open)(None).await.map_err(&self.explain)?;
        let (sender, pieces) = Pieces::channel();
        tokio::spawn(async move {
            if let Err(error) = self.read(answer, &sender).await {
                // Nobody may be there to hear it: the reader was dropped.
                sender.send(Err(error)).await.ok();
            }
        });
        Ok(pieces)
    }

    /// Passes on what comes until the end of the object, or until nobody takes it any more.
    async fn read(&self, mut answer: Response, sender: &Sender<Result<Bytes>>) -> Result<()> {
        let bytes = answer.content_length();
        let version = answer.headers().get(&self.version).and_then(|version| version.to_str().ok());
        let version = version.map(ToOwned::to_owned);
        let (mut offset, mut piece) = (0, BytesMut::new());
        let mut tries = self.http.tries();
        loop {
            match self.http.chunk(&mut answer).await {
                Ok(Some(chunk)) => {
                    offset += chunk.len() as u64;
                    piece.extend_from_slice(&chunk);
                    tries = self.http.tries();
                    while piece.len() >= PIECE_BYTES {
                        if sender.send(Ok(piece.split_to(PIECE_BYTES).freeze())).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                Ok(None) if bytes.is_none_or(|bytes| bytes == offset) => {
                    if !piece.is_empty() {
                        sender.send(Ok(piece.freeze())).await.ok();
                    }
                    return Ok(());
                }
                Ok(None) => {
                    let text = format!("{} has ended its answer too early", server_of(answer.url()));
                    let failure = Failure::passing(io::Error::new(ErrorKind::ConnectionReset, text));
                    answer = self.go_on(offset, &version, &mut tries, failure).await?;
                }
                Err(failure) => answer = self.go_on(offset, &version, &mut tries, failure).await?,
            }
        }
    }

    /// Asks for the rest, unless the object is another one by now.
    async fn go_on(
        &self,
        offset: u64,
        version: &Option<String>,
        tries: &mut Tries,
        failure: Failure,
    ) -> Result<Response> {
        tries.pause(failure).await.map_err(&self.explain)?;
        let changed = match (self.open)(Some(Rest { offset, version: version.clone() })).await {
            Ok(answer) if answer.status() == StatusCode::PARTIAL_CONTENT => return Ok(answer),
            Ok(_) => "the server gives no part of it after the connection broke",
            Err(Failure::Refused(Refusal {
                status: StatusCode::NOT_FOUND | StatusCode::PRECONDITION_FAILED,
                ..
            })) => "it was replaced or deleted while it was read",
            Err(failure) => return Err((self.explain)(failure)),
        };
        Err(Error::io("read", &self.object, io::Error::new(ErrorKind::StaleNetworkFileHandle, changed)))
    }
}
