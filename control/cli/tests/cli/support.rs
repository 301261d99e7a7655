//! Running the program, and a server of canned answers.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// What a command did.
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs `ursa` in an empty home with this standard input.
pub(crate) fn ursa_with(args: &[&str], input: &str) -> Outcome {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ursa"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("URSA_") {
            command.env_remove(name);
        }
    }
    let mut child = command
        .args(args)
        .env("HOME", home.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that fails early doesn't read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Outcome { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

pub(crate) fn ursa(args: &[&str]) -> Outcome {
    ursa_with(args, "")
}

/// A server that answers each request by its line, and remembers the lines.
pub(crate) struct Server {
    pub(crate) config: tempfile::NamedTempFile,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// `answer` gets the request line (`GET /meshes`) and returns status, extra headers and body.
    pub(crate) fn start(
        answer: impl Fn(&str) -> (u16, &'static str, &'static str) + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&seen);
        // Ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let mut reader = BufReader::new(stream);
                let (mut line, mut length) = (String::new(), 0);
                reader.read_line(&mut line).unwrap();
                let line = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
                loop {
                    let mut header = String::new();
                    reader.read_line(&mut header).unwrap();
                    if header.trim().is_empty() {
                        break;
                    }
                    if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let (status, headers, body) = answer(&line);
                lines.lock().unwrap().push(line);
                let reply = format!(
                    "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{body}",
                    body.len()
                );
                let _ = reader.get_mut().write_all(reply.as_bytes());
            }
        });
        let config = tempfile::NamedTempFile::new().unwrap();
        let text = format!(
            "controlPlanes:\n- name: a\n  coordinates: {{apiServer: {{url: 'http://{address}'}}}}\n\
             contexts:\n- {{name: a, controlPlane: a}}\ncurrentContext: a\n"
        );
        std::fs::write(config.path(), text).unwrap();
        Self { config, seen }
    }

    /// Runs a command against it.
    pub(crate) fn ursa(&self, args: &[&str], input: &str) -> Outcome {
        let file = self.config.path().to_str().unwrap();
        ursa_with(&[&["--config-file", file], args].concat(), input)
    }

    /// The requests so far, without those for the server's version.
    pub(crate) fn seen(&self) -> Vec<String> {
        let mut seen = self.seen.lock().unwrap().clone();
        seen.retain(|line| line != "GET /");
        seen
    }
}

/// The body of an error.
pub(crate) const NOT_FOUND: &str =
    r#"{"status":404,"title":"Could not retrieve a resource","detail":"Not found: what was asked for"}"#;
