//! A TCP connection to a server that can be broken in the ways of a network, and of a server that is overloaded.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use url::Url;

/// How much is passed on at once, at most.
const BUFFER_BYTES: usize = 16 << 10;
/// What the head of a request has in it.
const HTTP: &[u8] = b" HTTP/1.1\r\n";

/// Passes bytes between its clients and a server.
pub(crate) struct Link {
    url: Url,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Faults {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    streams: Vec<TcpStream>,
    /// After how many bytes, in both directions of all connections, each of the next cuts comes.
    cuts: VecDeque<usize>,
    lost_answers: usize,
    /// What the next requests are answered instead of being passed on.
    answers: VecDeque<String>,
    /// Behind how many bytes that clients say one is to turn into another one.
    spoilt_after: Option<usize>,
    /// Whether a byte in the body of a request of clients is to turn into another one.
    spoils_body: bool,
    stalled: bool,
    /// What clients say, one after the other; at the last of it nothing is passed on any more.
    stalls_at: VecDeque<Vec<u8>>,
    bytes_per_second: Option<u64>,
    fault_count: usize,
    /// What is counted in what clients say, and how often it was there.
    counted: Option<(String, usize)>,
    /// Over how many connections something was said that the server has not begun to answer, and how many that were at most.
    waiting: (usize, usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Client,
    Server,
}

impl Link {
    /// Makes one to the server at this URL.
    pub(crate) fn to(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut url = Url::parse(server).unwrap();
        let address = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
        url.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        let faults = Arc::new(Faults::default());
        let of_connections = faults.clone();
        // It ends with the process, as each test is one.
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                match of_connections.next_answer() {
                    Some(answer) => {
                        let faults = of_connections.clone();
                        thread::spawn(move || {
                            drop(faults.wait_while_stalled());
                            refuse(client, &answer);
                        });
                    }
                    // A server that is away is away for whoever connects.
                    None => match TcpStream::connect(&address) {
                        Ok(server) => of_connections.connect(client, server),
                        Err(_) => drop(client),
                    },
                }
            }
        });
        Self { url, faults }
    }

    /// The URL by which the server is reached through it.
    pub(crate) fn url(&self) -> &str {
        self.url.as_str()
    }

    /// Cuts all connections. New ones are passed on as before.
    pub(crate) fn cut(&self) {
        self.faults.cut();
    }

    /// Cuts a connection each time that so many bytes more have passed over all of them.
    pub(crate) fn cut_after(&self, bytes: impl IntoIterator<Item = usize>) {
        self.faults.state.lock().unwrap().cuts.extend(bytes);
    }

    /// How many of these cuts are still to come.
    pub(crate) fn cuts_left(&self) -> usize {
        self.faults.state.lock().unwrap().cuts.len()
    }

    /// Cuts the connection over which the server says something next, so often.
    pub(crate) fn lose_answers(&self, count: usize) {
        self.faults.state.lock().unwrap().lost_answers = count;
    }

    /// Turns the byte into another one that clients say behind so many.
    pub(crate) fn spoil_after(&self, bytes: usize) {
        self.faults.state.lock().unwrap().spoilt_after = Some(bytes);
    }

    /// Turns a byte in the body of the next long HTTP request into another one.
    pub(crate) fn spoil_body(&self) {
        self.faults.state.lock().unwrap().spoils_body = true;
    }

    /// Spoils nothing any more, and passes all requests on.
    pub(crate) fn mend(&self) {
        let mut state = self.faults.state.lock().unwrap();
        (state.lost_answers, state.spoils_body) = (0, false);
        state.answers.clear();
        drop(state);
        self.stall(false);
    }

    /// Answers the next HTTP requests with these instead of asking the server.
    pub(crate) fn answer(&self, answers: impl IntoIterator<Item = String>) {
        self.faults.state.lock().unwrap().answers.extend(answers);
        // A connection that is there already goes on to the server.
        self.faults.cut();
    }

    /// How many of these answers nobody has got yet.
    pub(crate) fn answers_left(&self) -> usize {
        self.faults.state.lock().unwrap().answers.len()
    }

    /// How many answers were lost or replaced, bytes spoilt, and connections cut after some bytes, so far.
    pub(crate) fn fault_count(&self) -> usize {
        self.faults.state.lock().unwrap().fault_count
    }

    /// Counts from now on how often clients say this.
    pub(crate) fn count(&self, text: &str) {
        self.faults.state.lock().unwrap().counted = Some((text.into(), 0));
    }

    /// How often they have.
    pub(crate) fn counted(&self) -> usize {
        self.faults.state.lock().unwrap().counted.as_ref().map_or(0, |(_, count)| *count)
    }

    /// Over how many connections at once, at most, a client has waited for an answer.
    pub(crate) fn waiting_max(&self) -> usize {
        self.faults.state.lock().unwrap().waiting.1
    }

    /// Passes nothing on and answers nothing, until told otherwise.
    pub(crate) fn stall(&self, stalled: bool) {
        self.faults.state.lock().unwrap().stalled = stalled;
        self.faults.changed.notify_all();
    }

    /// Passes nothing on as soon as clients have said all of this, one after the other; the last of it is not passed on either.
    pub(crate) fn stall_at(&self, said: impl IntoIterator<Item = Vec<u8>>) {
        self.faults.state.lock().unwrap().stalls_at.extend(said);
    }

    /// Whether nothing is passed on.
    pub(crate) fn is_stalled(&self) -> bool {
        self.faults.state.lock().unwrap().stalled
    }

    /// Passes on no more bytes a second, in each direction of a connection.
    pub(crate) fn slow_down(&self, bytes_per_second: u64) {
        self.faults.state.lock().unwrap().bytes_per_second = Some(bytes_per_second);
    }
}

impl Faults {
    fn next_answer(&self) -> Option<String> {
        let mut state = self.state.lock().unwrap();
        let answer = state.answers.pop_front();
        state.fault_count += usize::from(answer.is_some());
        answer
    }

    fn wait_while_stalled(&self) -> MutexGuard<'_, State> {
        self.changed.wait_while(self.state.lock().unwrap(), |state| state.stalled).unwrap()
    }

    fn connect(self: &Arc<Self>, client: TcpStream, server: TcpStream) {
        let held = [client.try_clone().unwrap(), server.try_clone().unwrap()];
        self.state.lock().unwrap().streams.extend(held);
        let waits = Arc::new(AtomicBool::new(false));
        self.pass(client.try_clone().unwrap(), server.try_clone().unwrap(), From::Client, waits.clone());
        self.pass(server, client, From::Server, waits);
    }

    fn cut(&self) {
        for stream in self.state.lock().unwrap().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Passes on what comes from one side until that ends, and then its end.
    fn pass(self: &Arc<Self>, mut from: TcpStream, mut to: TcpStream, side: From, waits: Arc<AtomicBool>) {
        let faults = self.clone();
        thread::spawn(move || {
            let mut buffer = [0; BUFFER_BYTES];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                faults.note_who_waits(side, &waits);
                if side == From::Client {
                    faults.count(&buffer[..read]);
                    faults.stall_at(&buffer[..read]);
                    faults.spoil(&mut buffer[..read]);
                }
                if faults.breaks_at(read, side) {
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                    return;
                }
                if to.write_all(&buffer[..read]).is_err() {
                    return;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }

    fn note_who_waits(&self, side: From, waits: &AtomicBool) {
        let waiting = &mut self.state.lock().unwrap().waiting;
        match (waits.swap(side == From::Client, Ordering::Relaxed), side) {
            (false, From::Client) => waiting.0 += 1,
            (true, From::Server) => waiting.0 -= 1,
            _ => {}
        }
        waiting.1 = waiting.1.max(waiting.0);
    }

    fn count(&self, said: &[u8]) {
        if let Some((text, count)) = &mut self.state.lock().unwrap().counted {
            *count += said.windows(text.len()).filter(|part| *part == text.as_bytes()).count();
        }
    }

    fn stall_at(&self, said: &[u8]) {
        let mut state = self.state.lock().unwrap();
        if state.stalls_at.front().is_some_and(|at| said.windows(at.len()).any(|part| part == at)) {
            state.stalls_at.pop_front();
            state.stalled = state.stalls_at.is_empty();
        }
    }

    fn spoil(&self, said: &mut [u8]) {
        let mut state = self.state.lock().unwrap();
        // A head does not fill the buffer, and the end of a body need not.
        let is_body = said.len() == BUFFER_BYTES && !said.windows(HTTP.len()).any(|part| part == HTTP);
        if is_body && std::mem::take(&mut state.spoils_body) {
            said[BUFFER_BYTES / 2] ^= 0x10;
            state.fault_count += 1;
        }
        let Some(before) = state.spoilt_after.take() else { return };
        match said.get_mut(before) {
            Some(byte) => {
                *byte ^= 0x10;
                state.fault_count += 1;
            }
            None => state.spoilt_after = Some(before - said.len()),
        }
    }

    /// Holds these bytes up for as long as is due, and says whether they come to nothing.
    fn breaks_at(&self, bytes: usize, side: From) -> bool {
        let mut state = self.wait_while_stalled();
        if side == From::Server && state.lost_answers > 0 {
            state.lost_answers -= 1;
            state.fault_count += 1;
            return true;
        }
        if let Some(left) = state.cuts.front_mut() {
            *left = left.saturating_sub(bytes);
            if *left == 0 {
                state.cuts.pop_front();
                state.fault_count += 1;
                return true;
            }
        }
        let rate = state.bytes_per_second;
        drop(state);
        if let Some(rate) = rate {
            thread::sleep(Duration::from_micros(bytes as u64 * 1_000_000 / rate));
        }
        false
    }
}

/// Reads one HTTP request to its end, and gives it this answer.
fn refuse(client: TcpStream, answer: &str) {
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let mut body_bytes = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(bytes) = line.to_lowercase().strip_prefix("content-length:") {
            body_bytes = bytes.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    std::io::copy(&mut reader.take(body_bytes), &mut std::io::sink()).unwrap();
    let _ = (&client).write_all(answer.as_bytes());
}
