//! A proxy of one's own that wants to know who asks: tinyproxy.

use std::fs::{self, File};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::stack::until;

/// Who may use it, and what proves that.
const USER: &str = "somebody";
const PASSWORD: &str = "hush";

/// Stops when it is dropped.
pub(crate) struct Proxy {
    process: Child,
    folder: TempDir,
    port: u16,
}

impl Proxy {
    /// Starts one, which passes on what it is asked to, to wherever.
    pub(crate) fn start() -> Self {
        let folder = TempDir::new().unwrap();
        // Nobody else is given the port so soon again.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (file, log) = (folder.path().join("conf"), folder.path().join("log"));
        let conf = format!(
            "Listen 127.0.0.1\nPort {port}\nAllow 127.0.0.1\nBasicAuth {USER} {PASSWORD}\nLogFile \"{}\"\nLogLevel Info\n\
             Timeout 60\n",
            log.display()
        );
        fs::write(&file, conf).unwrap();
        let said = File::create(folder.path().join("said")).unwrap();
        let process = Command::new("tinyproxy")
            .args(["-d", "-c"])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .spawn()
            .unwrap_or_else(|error| panic!("tinyproxy: {error}: run `make test`, which installs it"));
        let mut proxy = Self { process, folder, port };
        until("the proxy listens", || {
            let said = fs::read_to_string(proxy.folder.path().join("said")).unwrap();
            assert!(proxy.process.try_wait().unwrap().is_none(), "{said}{}", proxy.log());
            proxy.log().contains("Accepting connections")
        });
        proxy
    }

    /// The URL by which whoever may use it does.
    pub(crate) fn url(&self) -> String {
        format!("http://{USER}:{PASSWORD}@127.0.0.1:{}", self.port)
    }

    /// The same without saying who asks.
    pub(crate) fn url_of_nobody(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What it has logged, each request with its first line.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
