//! A TCP connection to the broker that can be cut, as a broken network would.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use url::Url;

/// Passes bytes between its clients and a broker.
pub(crate) struct Link {
    url: String,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Link {
    /// Makes one to the broker at this AMQP URL.
    pub(crate) fn to(broker: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut url = Url::parse(broker).unwrap();
        let address = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
        url.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        let streams = Arc::new(Mutex::new(Vec::new()));
        let held = streams.clone();
        // It ends with the process, as each test is one.
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, broker) = (client.unwrap(), TcpStream::connect(&address).unwrap());
                held.lock().unwrap().extend([client.try_clone().unwrap(), broker.try_clone().unwrap()]);
                pass(client.try_clone().unwrap(), broker.try_clone().unwrap());
                pass(broker, client);
            }
        });
        Self { url: url.into(), streams }
    }

    /// The AMQP URL by which the broker is reached through it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Cuts all connections. New ones are passed on as before.
    pub(crate) fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Passes on what comes from one side until that ends, and then its end.
fn pass(mut from: TcpStream, mut to: TcpStream) {
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
}
