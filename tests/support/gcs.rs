//! The emulators of Google Cloud Storage that all tests share, and who gives tokens for it.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use backhaul::store::{GcsSettings, HttpSettings};
use serde_json::json;
use tempfile::TempDir;
use uuid::Uuid;

/// The bucket of tests that need none of their own; every test needs names of its own in it.
pub(crate) const BUCKET: &str = "tests";

/// The URL of the emulator that keeps the conditions of writes and lists by pages, which `make test` starts for all tests.
pub(crate) fn url() -> String {
    said("url")
}

/// The URL of the one that knows how far an upload in chunks has come.
pub(crate) fn chunks_url() -> String {
    said("chunks")
}

fn said(file: &str) -> String {
    let folder = std::env::var("BACKHAUL_TEST_GCS").unwrap_or_else(|_| {
        panic!("BACKHAUL_TEST_GCS says nothing of emulators of GCS: run `make test`, which starts them")
    });
    fs::read_to_string(Path::new(&folder).join(file)).unwrap().trim_end().into()
}

/// A name that no bucket has yet.
pub(crate) fn new_bucket() -> String {
    format!("test-{}", Uuid::new_v4())
}

/// How the server at this URL is used with that bucket, by nobody in particular.
pub(crate) fn settings(url: &str, bucket: &str) -> GcsSettings {
    GcsSettings {
        endpoint: url.parse().unwrap(),
        credentials_file: None,
        bucket: bucket.into(),
        create_buckets: true,
        project: Some("backups".into()),
        location: "US".into(),
        storage_class: "NEARLINE".into(),
        http: HttpSettings::default(),
    }
}

/// Emulators of one's own, which may be stopped.
pub(crate) struct Own(TempDir);

impl Own {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    /// Starts them, with what they had when they were stopped. Gives the URL, which stays the same.
    pub(crate) fn up(&self) -> String {
        self.run("up").trim_end().into()
    }

    pub(crate) fn down(&self) {
        self.run("down");
    }

    fn run(&self, command: &str) -> String {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/dev/gcs.sh");
        let output = Command::new(script).arg(command).arg(self.0.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.down();
    }
}

/// Gives tokens to who has the key of its only service account, as Google documents it (OAuth 2.0 for server to server
/// applications): the emulators look at no token.
pub(crate) struct Tokens {
    url: String,
    folder: TempDir,
    state: Arc<Mutex<State>>,
}

struct State {
    good_for_seconds: u64,
    refuses: bool,
    assertions: Vec<String>,
}

impl Tokens {
    /// Gives such that are good for so long. The n-th is called `token-n`.
    pub(crate) fn start(good_for_seconds: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let key = folder.path().join("key.pem");
        openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"], &key);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/token", listener.local_addr().unwrap());
        let state = State { good_for_seconds, refuses: false, assertions: Vec::new() };
        let state = Arc::new(Mutex::new(state));
        let of_connections = state.clone();
        // It ends with the process, as each test is one.
        thread::spawn(move || {
            for client in listener.incoming() {
                answer(client.unwrap(), &of_connections);
            }
        });
        let tokens = Self { url, folder, state };
        tokens.write_key(&fs::read_to_string(key).unwrap());
        tokens
    }

    /// The file of the service account.
    pub(crate) fn key_file(&self) -> PathBuf {
        self.folder.path().join("account.json")
    }

    /// Writes that file with another key.
    pub(crate) fn write_key(&self, pem: &str) {
        let account = json!({
            "type": "service_account",
            "project_id": "backups",
            "private_key_id": "0123456789abcdef",
            "private_key": pem,
            "client_email": "backup@backups.iam.gserviceaccount.com",
            "client_id": "1",
            "auth_uri": "https://accounts.google.com/o/oauth2/auth",
            "token_uri": self.url,
        });
        fs::write(self.key_file(), account.to_string()).unwrap();
    }

    /// How many it has given.
    pub(crate) fn given(&self) -> usize {
        self.state.lock().unwrap().assertions.len()
    }

    /// Gives no more from now on.
    pub(crate) fn refuse(&self) {
        self.state.lock().unwrap().refuses = true;
    }

    /// Head and claims of the last text that a token was given for, if it is signed with the key.
    pub(crate) fn last_claims(&self) -> (serde_json::Value, serde_json::Value) {
        use base64::Engine as _;
        use base64::prelude::BASE64_URL_SAFE_NO_PAD;

        let assertion = self.state.lock().unwrap().assertions.last().unwrap().clone();
        let (text, signature) = assertion.rsplit_once('.').unwrap();
        let path = |name: &str| self.folder.path().join(name);
        openssl(&["pkey", "-in", path("key.pem").to_str().unwrap(), "-pubout", "-out"], &path("public.pem"));
        fs::write(path("signature"), BASE64_URL_SAFE_NO_PAD.decode(signature).unwrap()).unwrap();
        fs::write(path("text"), text).unwrap();
        let (public, signature) = (path("public.pem"), path("signature"));
        let verify = ["-verify", public.to_str().unwrap(), "-signature", signature.to_str().unwrap()];
        openssl(&[&["dgst", "-sha256"], &verify[..]].concat(), &path("text"));
        let part =
            |part: &str| serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap();
        let (head, claims) = text.split_once('.').unwrap();
        (part(head), part(claims))
    }
}

fn openssl(arguments: &[&str], file: &Path) {
    let output = Command::new("openssl").args(arguments).arg(file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Reads one request for a token and answers it.
fn answer(client: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(client.try_clone().unwrap());
    let (mut head, mut body_bytes) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(bytes) = line.to_lowercase().strip_prefix("content-length:") {
            body_bytes = bytes.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
        head += &line;
    }
    let mut body = vec![0; body_bytes];
    reader.read_exact(&mut body).unwrap();
    let fields: HashMap<_, _> = url::form_urlencoded::parse(&body).into_owned().collect();
    assert!(head.starts_with("POST /token "), "{head}");
    assert_eq!(fields["grant_type"], "urn:ietf:params:oauth:grant-type:jwt-bearer");

    let mut state = state.lock().unwrap();
    let (status, answer) = match state.refuses {
        true => (
            "400 Bad Request",
            json!({ "error": "invalid_grant", "error_description": "Invalid JWT Signature." }),
        ),
        false => {
            state.assertions.push(fields["assertion"].clone());
            let token = format!("token-{}", state.assertions.len());
            let good_for = state.good_for_seconds;
            ("200 OK", json!({ "access_token": token, "expires_in": good_for, "token_type": "Bearer" }))
        }
    };
    let answer = answer.to_string();
    let length = answer.len();
    let _ = write!(
        &client,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{answer}"
    );
}
