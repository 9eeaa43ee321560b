//! What the broker sends, with names that are no text made readable.
//!
//! The short strings of AMQP (properties, the names of headers, routing keys) are to be UTF-8, but RabbitMQ takes and hands out
//! whatever bytes a client has put there. lapin gives the whole connection up over one that it cannot read. The message then
//! goes back to its queue, and takes the next connection with it, of every worker. So such a string is mended before
//! lapin sees it, byte by byte, which leaves all lengths as they are.

use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_compat::Compat;
use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::tcp::AsyncTcpStream;
use tokio::net::TcpStream;

/// What a name has in the place of each byte that is none of a text.
const UNREADABLE: u8 = b'?';

/// The kinds of frames that have names in them.
const METHOD: u8 = 1;
pub(super) const HEADER: u8 = 2;
/// A frame begins with its kind, its channel and its size, and ends with one byte.
const FRAME_BEGIN_BYTES: usize = 7;
const FRAME_END_BYTES: usize = 1;
/// Larger ones pass as they are. They are not usual: 128 KiB is what RabbitMQ allows, unless it is told otherwise.
const FRAME_BYTES_MAX: usize = 1 << 20;
/// What is read from the connection at once.
const READ_BYTES: usize = 16 << 10;

/// The class of all that is about messages, and its methods that hand one out.
const BASIC: usize = 60;
const DELIVER: usize = 60;
const GET_OK: usize = 71;

/// How deep the values of headers are read. lapin reads a value inside a value by calling itself.
const DEPTH_MAX: usize = 32;

/// A connection with TLS or without.
type Socket = AsyncTcpStream<Compat<TcpStream>>;

/// The runtime of a connection whose bytes are mended.
pub(super) fn runtime() -> Runtime<RuntimeParts<Tokio, Mending>> {
    Runtime::new(RuntimeParts::new(Tokio::current(), Mending(Tokio::current())))
}

/// Says to lapin's types that the connection is a [`Mended`] one; all else is as tokio does it.
#[derive(Debug, Clone)]
pub(super) struct Mending(Tokio);

impl Reactor for Mending {
    type TcpStream = Mended<Socket>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, time: Duration) -> Self::Sleep {
        self.0.sleep(time)
    }

    fn interval(&self, time: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(time)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Mended::new(AsyncTcpStream::Plain(connecting.await?))) }
    }
}

/// A connection to a broker. What comes from there is mended, frame by frame.
pub(super) struct Mended<S> {
    stream: S,
    /// What was read and not handed on yet.
    held: Vec<u8>,
    /// How much of that was looked through.
    ready: usize,
    /// How much is to come of a frame that passes as it is.
    passing: usize,
}

impl<S> Mended<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, held: Vec::new(), ready: 0, passing: 0 }
    }

    /// Looks through what has come, as far as its frames are whole.
    fn look(&mut self) {
        loop {
            let rest = &mut self.held[self.ready..];
            if self.passing > 0 {
                let count = self.passing.min(rest.len());
                if count == 0 {
                    return;
                }
                (self.ready, self.passing) = (self.ready + count, self.passing - count);
                continue;
            }
            let [kind, _, _, a, b, c, d, ..] = *rest else { return };
            let bytes = FRAME_BEGIN_BYTES + u32::from_be_bytes([a, b, c, d]) as usize + FRAME_END_BYTES;
            if !matches!(kind, METHOD | HEADER) || bytes > FRAME_BYTES_MAX {
                self.passing = bytes;
                continue;
            }
            let Some(frame) = rest.get_mut(..bytes) else { return };
            mend(kind, &mut frame[FRAME_BEGIN_BYTES..bytes - FRAME_END_BYTES]);
            self.ready += bytes;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Mended<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.ready == 0 {
            let begin = this.held.len();
            this.held.resize(begin + READ_BYTES, 0);
            let read = Pin::new(&mut this.stream).poll_read(context, &mut this.held[begin..]);
            let count = match &read {
                Poll::Ready(Ok(count)) => *count,
                _ => 0,
            };
            this.held.truncate(begin + count);
            if ready!(read)? == 0 {
                // The end, perhaps in the middle of a frame.
                this.ready = this.held.len();
                break;
            }
            this.look();
        }
        let count = this.ready.min(buffer.len());
        buffer[..count].copy_from_slice(&this.held[..count]);
        this.held.drain(..count);
        this.ready -= count;
        Poll::Ready(Ok(count))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Mended<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_close(context)
    }
}

/// Mends the names in what a frame holds. What is not as AMQP has it is left to lapin from there on.
pub(super) fn mend(kind: u8, payload: &mut [u8]) {
    let _ = Names { bytes: payload, at: 0 }.mend(kind);
}

/// The names in a frame, from the one at `at` on. What walks over them ends with none where the frame is not as it should be.
struct Names<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Names<'_> {
    fn mend(&mut self, kind: u8) -> Option<()> {
        let (class, method) = (self.number(2)?, self.number(2)?);
        match (kind, class, method) {
            (METHOD, BASIC, DELIVER) => {
                self.name()?;
                self.where_from()
            }
            (METHOD, BASIC, GET_OK) => self.where_from(),
            (HEADER, BASIC, _) => self.properties(),
            _ => Some(()),
        }
    }

    /// The number of the delivery and whether it comes again; exchange and routing key.
    fn where_from(&mut self) -> Option<()> {
        self.skip(8 + 1)?;
        self.name()?;
        self.name()
    }

    /// The size of the body, a bit for each property, and those that are there.
    fn properties(&mut self) -> Option<()> {
        self.skip(8)?;
        let flags = self.number(2)?;
        for index in 0..14 {
            if flags & (1 << (15 - index)) == 0 {
                continue;
            }
            match index {
                2 => self.table(0)?,
                // How it is kept, and its priority.
                3 | 4 => self.skip(1)?,
                // When it was sent.
                9 => self.skip(8)?,
                _ => self.name()?,
            }
        }
        Some(())
    }

    fn name(&mut self) -> Option<()> {
        let length = self.number(1)?;
        let begin = self.at;
        self.skip(length)?;
        let name = &mut self.bytes[begin..self.at];
        if std::str::from_utf8(name).is_err() {
            name.iter_mut().filter(|byte| !byte.is_ascii()).for_each(|byte| *byte = UNREADABLE);
        }
        Some(())
    }

    fn table(&mut self, depth: usize) -> Option<()> {
        let end = self.number(4)?.checked_add(self.at)?;
        while self.at < end {
            self.name()?;
            self.value(depth)?;
        }
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        let kind = self.bytes.get_mut(self.at)?;
        if depth == DEPTH_MAX && matches!(kind, b'A' | b'F') {
            // Bytes, which begin with their length as a list or a table does.
            *kind = b'x';
        }
        let kind = *kind;
        self.skip(1)?;
        match kind {
            b'V' => Some(()),
            b't' | b'b' | b'B' => self.skip(1),
            b's' | b'U' | b'u' => self.skip(2),
            b'I' | b'i' | b'f' => self.skip(4),
            b'D' => self.skip(5),
            b'L' | b'l' | b'd' | b'T' => self.skip(8),
            b'S' | b'x' => {
                let length = self.number(4)?;
                self.skip(length)
            }
            b'F' => self.table(depth + 1),
            b'A' => {
                let end = self.number(4)?.checked_add(self.at)?;
                while self.at < end {
                    self.value(depth + 1)?;
                }
                Some(())
            }
            _ => None,
        }
    }

    fn number(&mut self, length: usize) -> Option<usize> {
        let begin = self.at;
        self.skip(length)?;
        Some(self.bytes[begin..self.at].iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    fn skip(&mut self, count: usize) -> Option<()> {
        self.at = self.at.checked_add(count).filter(|at| *at <= self.bytes.len())?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::future::poll_fn;
    use lapin::BasicProperties;
    use lapin::protocol::basic::{gen_properties, parse_properties};
    use lapin::types::{AMQPValue, FieldTable};

    use super::*;

    /// A broker that has sent these pieces, and then nothing more.
    struct Sent(VecDeque<Vec<u8>>);

    impl AsyncRead for Sent {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            let Some(mut piece) = self.0.pop_front() else { return Poll::Ready(Ok(0)) };
            let rest = piece.split_off(piece.len().min(buffer.len()));
            if !rest.is_empty() {
                self.0.push_front(rest);
            }
            buffer[..piece.len()].copy_from_slice(&piece);
            Poll::Ready(Ok(piece.len()))
        }
    }

    /// What is read through a mended connection, by a reader with so much room.
    async fn read(pieces: &[&[u8]], room: usize) -> Vec<u8> {
        let mut mended = Mended::new(Sent(pieces.iter().map(|piece| piece.to_vec()).collect()));
        let (mut all, mut buffer) = (Vec::new(), vec![0; room]);
        loop {
            let count =
                poll_fn(|context| Pin::new(&mut mended).poll_read(context, &mut buffer)).await.unwrap();
            if count == 0 {
                return all;
            }
            all.extend_from_slice(&buffer[..count]);
        }
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = (payload.len() as u32).to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[0xce]].concat()
    }

    /// As the broker sends it, with each "~" in the properties a byte that no text has.
    fn header(properties: &BasicProperties) -> Vec<u8> {
        let written = gen_properties(properties)(Vec::new().into()).unwrap();
        let (mut properties, _) = written.into_inner();
        properties.iter_mut().filter(|byte| **byte == b'~').for_each(|byte| *byte = 0xff);
        frame(HEADER, &[&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9], &properties[..]].concat())
    }

    fn all_properties(mark: &str) -> BasicProperties {
        let name = |text: &str| format!("{text}{mark}").as_str().into();
        let mut inner = FieldTable::default();
        inner.insert(name("inner"), AMQPValue::LongLongInt(-1));
        let values = vec![
            AMQPValue::Boolean(true),
            AMQPValue::ShortShortInt(1),
            AMQPValue::ShortInt(2),
            AMQPValue::ShortUInt(3),
            AMQPValue::LongInt(4),
            AMQPValue::LongUInt(5),
            AMQPValue::Float(6.0),
            AMQPValue::Double(7.0),
            AMQPValue::DecimalValue(lapin::types::DecimalValue { scale: 1, value: 8 }),
            AMQPValue::LongString("é".into()),
            AMQPValue::Timestamp(9),
            AMQPValue::ByteArray(vec![0xfe].into()),
            AMQPValue::Void,
            AMQPValue::FieldTable(inner),
        ];
        let mut headers = FieldTable::default();
        headers.insert(name("values"), AMQPValue::FieldArray(values.into()));
        headers.insert(name("é"), AMQPValue::Void);
        BasicProperties::default()
            .with_content_type(name("content type"))
            .with_content_encoding(name("content encoding"))
            .with_headers(headers)
            .with_delivery_mode(2)
            .with_priority(9)
            .with_correlation_id(name("correlation id"))
            .with_reply_to(name("reply to"))
            .with_expiration(name("expiration"))
            .with_message_id(name("message id"))
            .with_timestamp(u64::MAX)
            .with_type(name("type"))
            .with_user_id(name("user id"))
            .with_app_id(name("app id"))
            .with_cluster_id(name("cluster id"))
    }

    /// What of a frame is properties: all behind the class, the weight and the size of the body.
    fn properties_in(frame: &[u8]) -> &[u8] {
        &frame[FRAME_BEGIN_BYTES + 12..frame.len() - FRAME_END_BYTES]
    }

    fn properties_of(frame: &[u8]) -> BasicProperties {
        let (rest, properties) = parse_properties(properties_in(frame)).unwrap();
        assert!(rest.is_empty());
        properties
    }

    #[tokio::test]
    async fn each_name_that_is_no_text_is_mended_and_nothing_else_changes() {
        let whole = header(&all_properties("ü"));
        assert_eq!(read(&[&whole], 10_000).await, whole);

        let mended = properties_of(&read(&[&header(&all_properties("~"))], 10_000).await);

        let mut expected = all_properties("?");
        // Of a name of which one byte is none of a text, no byte is kept but those of ASCII.
        let mut headers = expected.headers().clone().unwrap().inner().clone();
        let void = headers.remove("é?").unwrap();
        headers.insert("???".into(), void);
        expected = expected.with_headers(headers.into());
        assert_eq!(mended, expected);
    }

    #[tokio::test]
    async fn the_routing_key_of_a_message_is_mended_as_well() {
        let deliver = |key: &[u8]| {
            let payload = [b"\0\x3c\0\x3c\x03tag\0\0\0\0\0\0\0\x01\0\x02ex\x03", key].concat();
            frame(METHOD, &payload)
        };
        let got = |key: &[u8]| {
            let payload = [b"\0\x3c\0\x47\0\0\0\0\0\0\0\x01\0\x02ex\x03", key, b"\0\0\0\x01"].concat();
            frame(METHOD, &payload)
        };
        assert_eq!(read(&[&deliver(b"a\xffb")], 100).await, deliver(b"a?b"));
        assert_eq!(read(&[&got(b"\xff\xfe\xfd")], 100).await, got(b"???"));
        assert_eq!(read(&[&got("é!".as_bytes())], 100).await, got("é!".as_bytes()));
    }

    #[tokio::test]
    async fn what_is_mended_does_not_depend_on_how_it_comes() {
        let body = frame(3, &[0xff; 300]);
        let large = frame(HEADER, &vec![0xff; FRAME_BYTES_MAX]);
        let (bad, beat) = (header(&all_properties("~")), frame(8, b""));
        let all = [&bad[..], &body, &beat, &bad, &body[..7]].concat();
        let mended = read(&[&all], 10_000).await;
        assert_eq!(mended.len(), all.len());
        assert_eq!(mended[bad.len()..][..body.len()], body);
        for at in 1..all.len() {
            assert!(read(&[&all[..at], &all[at..]], 10_000).await == mended, "{at}");
        }
        let bytes: Vec<&[u8]> = all.chunks(1).collect();
        assert!(read(&bytes, 1).await == mended);
        // One that is too large for it, or of something else than a broker, passes as it is.
        for all in
            [[&large[..], &beat].concat(), b"AMQP\0\0\x09\x01".to_vec(), b"SSH-2.0-OpenSSH\r\n".to_vec()]
        {
            let pieces: Vec<&[u8]> = all.chunks(5000).collect();
            assert!(read(&pieces, 700).await == all);
        }
    }

    /// A header with a list in a list in a list, as deep as fits.
    fn deep() -> Vec<u8> {
        let mut value = vec![b'V'];
        while value.len() < 120_000 {
            // Backwards, as what is inside comes behind.
            let length = (value.len() as u32).to_be_bytes();
            value.extend(length.iter().rev());
            value.push(b'A');
        }
        value.reverse();
        let headers = [b"\x04deep", &value[..]].concat();
        let length = (headers.len() as u32).to_be_bytes();
        let begin = b"\0\x3c\0\0\0\0\0\0\0\0\0\x09\x20\0";
        frame(HEADER, &[begin, &length[..], &headers].concat())
    }

    /// lapin's thread ran out of its stack, and with it went the process.
    #[tokio::test]
    async fn values_inside_each_other_beyond_all_use_become_bytes() {
        let deep = deep();

        let mended = properties_of(&read(&[&deep], 200_000).await);

        let mut value = &mended.headers().as_ref().unwrap().inner()["deep"];
        for _ in 0..DEPTH_MAX {
            let AMQPValue::FieldArray(values) = value else { panic!("{value:?}") };
            value = &values.as_slice()[0];
        }
        assert!(matches!(value, AMQPValue::ByteArray(_)));
    }

    #[test]
    fn no_bytes_break_it_and_what_could_be_read_is_left_as_it_is() {
        let mut random = fastrand::Rng::with_seed(11);
        let whole = header(&all_properties("ü"));
        for _ in 0..20_000 {
            let mut frame = whole.clone();
            for _ in 0..random.usize(1..6) {
                let at = random.usize(FRAME_BEGIN_BYTES..frame.len() - FRAME_END_BYTES);
                frame[at] = random.u8(..);
            }
            let before = frame.clone();
            let end = frame.len() - FRAME_END_BYTES;
            mend(HEADER, &mut frame[FRAME_BEGIN_BYTES..end]);
            if parse_properties(properties_in(&before)).is_ok() {
                assert_eq!(frame, before);
            }
            for kind in [METHOD, HEADER] {
                mend(kind, &mut frame[random.usize(..end)..]);
            }
        }
    }
}
