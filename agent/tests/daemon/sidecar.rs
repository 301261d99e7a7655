//! A shim as systemd would start it, with a service manager that only listens.

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;
use tokio::time::timeout;
use ursa_agent::shim::client::ShimClient;
use ursa_agent::shim::protocol::Settings;

use crate::lab::{Lab, PATIENCE, UID};

/// The agent's user.
pub(crate) const AGENT: u32 = 64_322;

pub(crate) struct Sidecar {
    pub(crate) lab: Lab,
    pub(crate) child: Option<Child>,
    /// Each datagram that the service manager got.
    pub(crate) heard: watch::Receiver<Vec<String>>,
}

impl Sidecar {
    pub(crate) fn new(test: &str) -> Self {
        let lab = Lab::new(test);
        let root = lab.dir.path();
        for (dir, owner) in [("ursa-sidecar/web", UID), ("state/w/web", AGENT), ("libexec", UID)] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).unwrap();
            chown(&dir, Some(owner), Some(owner)).unwrap();
        }
        fs::copy(lab.shim_dir().join("dns.json"), root.join("state/w/web/dns.json")).unwrap();
        // As a package installs it: a later version takes its place.
        fs::copy(env!("CARGO_BIN_EXE_ursa-shim"), root.join("libexec/ursa-shim")).unwrap();
        let path = root.join("notify");
        let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        let (hear, heard) = watch::channel(Vec::new());
        tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            while let Ok(length) = socket.recv(&mut buffer).await {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                hear.send_modify(|heard| heard.push(text));
            }
        });
        Self { lab, child: None, heard }
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.lab.dir.path().join("ursa-sidecar/web")
    }

    pub(crate) fn binary(&self) -> PathBuf {
        self.lab.dir.path().join("libexec/ursa-shim")
    }

    /// Puts another program where the shim is installed, as a package does.
    pub(crate) fn install(&self, script: &str) {
        let new = self.binary().with_extension("dpkg-new");
        fs::write(&new, script).unwrap();
        fs::set_permissions(&new, Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, self.binary()).unwrap();
    }

    pub(crate) fn settings(&self) -> Settings {
        let private = self.dir().join("private");
        let bootstrap = serde_json::json!({
            "node": { "id": "default.web", "cluster": "web" },
            "admin": { "address": { "pipe": { "path": private.join("admin.sock"), "mode": 0o600 } } },
            "static_resources": { "listeners": [{
                "name": "self_inbound_dp_8080",
                "stat_prefix": "self_inbound_dp_8080",
                "traffic_direction": "INBOUND",
                "address": { "socket_address": { "address": "127.0.0.1", "port_value": 8080 } },
                "filter_chains": [{ "filters": [{
                    "name": "http",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        "stat_prefix": "inbound",
                        "route_config": { "virtual_hosts": [{ "name": "any", "domains": ["*"], "routes": [{
                            "match": { "prefix": "/" },
                            "direct_response": { "status": 200, "body": { "inline_string": "pong" } }
                        }] }] },
                        "http_filters": [{ "name": "router", "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                        } }]
                    }
                }] }]
            }] }
        });
        let state = self.lab.dir.path().join("state/w/web");
        Settings {
            workload: "default.web-1".into(),
            envoy: self.lab.envoy.clone(),
            bootstrap,
            last_good: state.clone(),
            dns_table: state.join("dns.json"),
            redirect: None,
            dns_port: 15053,
            resolv_conf: "/nonexistent/resolv.conf".into(),
            concurrency: 1,
            drain_time_s: 2,
            log_level: "info".into(),
        }
    }

    /// What an agent left on disk.
    pub(crate) fn leave_settings(&self) {
        let path = self.lab.dir.path().join("state/w/web/shim.json");
        fs::write(path, serde_json::to_vec(&self.settings()).unwrap()).unwrap();
    }

    /// Starts it as `ExecStart=` would, in the namespace and as the user of the unit.
    pub(crate) fn start(&mut self, environment: &[(&str, &str)]) {
        let log = fs::File::create(self.lab.dir.path().join("sidecar.log")).unwrap();
        let child = self
            .command(UID)
            .args(["--service", "web", "--state-dir"])
            .arg(self.lab.dir.path().join("state"))
            .args(["--agent-uid", &AGENT.to_string()])
            .env("RUNTIME_DIRECTORY", self.dir())
            .env("NOTIFY_SOCKET", self.lab.dir.path().join("notify"))
            .env("WATCHDOG_USEC", "400000")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// The installed binary as a user in the namespace.
    pub(crate) fn command(&self, uid: u32) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.lab.name))
            .args(["setpriv", &format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"])
            .arg(self.binary())
            .env_remove("RUST_BACKTRACE");
        command
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().unwrap().id()).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits until the service manager has heard enough.
    pub(crate) async fn hears(&mut self, what: &str, enough: impl Fn(&[String]) -> bool) {
        let heard = timeout(PATIENCE, self.heard.wait_for(|heard| enough(heard))).await.is_ok();
        assert!(heard, "never heard {what}: {:#?}", self.heard.borrow());
    }

    pub(crate) async fn hears_line(&mut self, line: &str) {
        self.hears(line, |heard| heard.iter().any(|text| text.lines().any(|found| found == line))).await;
    }

    pub(crate) async fn hears_status(&mut self, words: &str) {
        let has = |heard: &[String]| {
            heard
                .iter()
                .any(|text| text.lines().any(|line| line.starts_with("STATUS=") && line.contains(words)))
        };
        self.hears(words, has).await;
    }

    /// Connects once somebody listens.
    pub(crate) async fn client(&self) -> ShimClient {
        let connect = async {
            loop {
                match ShimClient::connect(&self.dir()).await {
                    Ok(client) => return client,
                    Err(error) if error.is_nobody() => {
                        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        };
        timeout(PATIENCE, connect).await.expect("nobody listens on control.sock")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.lab.dir.path().join("sidecar.log")).unwrap_or_default()
    }

    /// What `control.sock` answers a user who says `line`: its greeting and one more line.
    pub(crate) fn ask_as(&self, uid: u32, line: &str) -> String {
        let script = "import socket,sys\n\
                      s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); f=s.makefile('rw')\n\
                      print(f.readline()); f.write(sys.argv[2]+'\\n'); f.flush(); print(f.readline())";
        let output = Command::new("setpriv")
            .args([
                &format!("--reuid={uid}"),
                &format!("--regid={uid}"),
                "--clear-groups",
                "/usr/bin/python3",
                "-c",
                script,
            ])
            .arg(self.dir().join("control.sock"))
            .arg(line)
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the sidecar's log\n{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Requests from within a namespace until stopped: on one connection, and each second one on a new connection.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64, String>>,
}

impl Load {
    pub(crate) fn start(lab: &Lab) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let namespace = fs::File::open(Path::new("/run/netns").join(&lab.name)).unwrap();
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let mut kept = Http::connect().map_err(|error| error.to_string())?;
            let mut served = 0;
            while !stopped.load(Ordering::Relaxed) {
                kept.get().map_err(|error| format!("request {served} on the kept connection: {error}"))?;
                Http::connect()
                    .and_then(|mut new| new.get())
                    .map_err(|error| format!("request {served} on a new connection: {error}"))?;
                served += 2;
            }
            Ok(served)
        });
        Self { stop, thread }
    }

    /// How many requests were served; the first that wasn't ends the test.
    pub(crate) fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap()
    }
}

/// One connection to the inbound listener.
pub(crate) struct Http(std::net::TcpStream);

impl Http {
    pub(crate) fn connect() -> std::io::Result<Self> {
        let stream = std::net::TcpStream::connect("127.0.0.1:8080")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    /// The head of the answer.
    pub(crate) fn get(&mut self) -> std::io::Result<String> {
        self.0.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")?;
        let mut answer = Vec::new();
        let mut chunk = [0; 1024];
        while !answer.ends_with(b"\r\n\r\npong") {
            match self.0.read(&mut chunk)? {
                0 => return Err(std::io::Error::other("closed before the answer was complete")),
                length => answer.extend_from_slice(&chunk[..length]),
            }
        }
        let answer = String::from_utf8_lossy(&answer).into_owned();
        if answer.starts_with("HTTP/1.1 200") { Ok(answer) } else { Err(std::io::Error::other(answer)) }
    }
}
