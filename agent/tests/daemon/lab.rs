//! A network namespace with a shim in it.

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;
use tokio::time::timeout;
use ursa_agent::launcher::fork::{ForkConfig, ForkLauncher};
use ursa_agent::launcher::{Origin, ShimSpec, ShimState};
use ursa_agent::shim::client::ShimClient;
use ursa_agent::shim::protocol::{EnvoyState, EnvoyStatus};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const UID: u32 = 64_321;

/// A network namespace and directories that go away with it.
pub(crate) struct Lab {
    pub(crate) name: String,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) envoy: PathBuf,
}

impl Lab {
    pub(crate) fn new(test: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "namespaces need root");
        let envoy =
            std::env::var_os("URSA_ENVOY").expect("URSA_ENVOY names no Envoy; `make envoy` fetches it");
        let name = format!("ursa-{test}-{}", std::process::id());
        run("ip", &["netns", "add", &name]);
        run("ip", &["-n", &name, "link", "set", "lo", "up"]);
        // The sidecar's user must be able to reach its directory.
        let dir = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir().unwrap();
        let lab = Self { name, dir, envoy: envoy.into() };
        let w = lab.shim_dir();
        fs::create_dir_all(&w).unwrap();
        fs::create_dir_all(lab.dir.path().join("last-good")).unwrap();
        let bootstrap = serde_json::json!({
            "node": { "id": "default.web", "cluster": "web" },
            "admin": { "address": { "pipe": { "path": w.join("admin.sock") } } },
        });
        fs::write(w.join("bootstrap.json"), bootstrap.to_string()).unwrap();
        lab.write_table(
            r#"{"names":{"backend.svc.mesh.local.":["241.0.0.1"]},"domains":["mesh.local"],"ttl":30}"#,
        );
        lab
    }

    pub(crate) fn shim_dir(&self) -> PathBuf {
        self.dir.path().join("run/w/web")
    }

    pub(crate) fn launcher(&self) -> ForkLauncher {
        ForkLauncher::new(ForkConfig {
            run_dir: self.dir.path().join("run"),
            shim: env!("CARGO_BIN_EXE_ursa-shim").into(),
            log_dir: Some(self.dir.path().join("log")),
        })
    }

    pub(crate) fn spec(&self) -> ShimSpec {
        ShimSpec {
            unit: None,
            id: "web".into(),
            workload: "default.web".into(),
            envoy: self.envoy.clone(),
            uid: UID,
            gid: UID,
            netns: Some(Path::new("/run/netns").join(&self.name)),
            dns_port: 15053,
            transparent: false,
            concurrency: 1,
            last_good: self.dir.path().join("last-good"),
            resolv_conf: self.dir.path().join("resolv.conf"),
            log_level: "info".into(),
        }
    }

    pub(crate) fn write_table(&self, json: &str) {
        let new = self.shim_dir().join("dns.json.new");
        fs::write(&new, json).unwrap();
        fs::rename(new, self.shim_dir().join("dns.json")).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log/web.log")).unwrap_or_default()
    }

    /// Runs `work` within the namespace.
    pub(crate) fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = fs::File::open(Path::new("/run/netns").join(&self.name)).unwrap();
        std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    /// Asks the shim's name server.
    pub(crate) fn resolve(&self, name: &str, kind: RecordType) -> (ResponseCode, Vec<Ipv4Addr>) {
        let mut query = Message::new(7, MessageType::Query, OpCode::Query);
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let query = query.to_vec().unwrap();
        let response = self.inside(move || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send_to(&query, "127.0.0.1:15053").unwrap();
            let mut response = [0; 512];
            let length = socket.recv(&mut response).unwrap();
            response[..length].to_vec()
        });
        let response = Message::from_vec(&response).unwrap();
        let addresses = response.answers.iter().filter_map(|record| match &record.data {
            RData::A(a) => Some(a.0),
            _ => None,
        });
        (response.metadata.response_code, addresses.collect())
    }
}

impl Lab {
    /// The same over TCP and IPv6, twice on one connection.
    pub(crate) fn resolve_over_tcp(&self, name: &str) -> Vec<Ipv4Addr> {
        let mut query = Message::new(8, MessageType::Query, OpCode::Query);
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        let query = query.to_vec().unwrap();
        let response = self.inside(move || {
            let mut stream = std::net::TcpStream::connect("[::1]:15053").unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut response = Vec::new();
            for _ in 0..2 {
                stream.write_all(&u16::try_from(query.len()).unwrap().to_be_bytes()).unwrap();
                stream.write_all(&query).unwrap();
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                response.resize(usize::from(u16::from_be_bytes(length)), 0);
                stream.read_exact(&mut response).unwrap();
            }
            response
        });
        let response = Message::from_vec(&response).unwrap();
        response
            .answers
            .iter()
            .filter_map(|record| match &record.data {
                RData::A(a) => Some(a.0),
                _ => None,
            })
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the shim's log\n{}", self.log());
        }
        // What a failed test left behind.
        let pids = Command::new("ip").args(["netns", "pids", &self.name]).output().unwrap();
        for pid in String::from_utf8_lossy(&pids.stdout).split_whitespace() {
            let _ = kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL);
        }
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

pub(crate) fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

pub(crate) async fn live(client: &ShimClient, not: Option<i32>) -> EnvoyStatus {
    let mut envoy = client.envoy();
    let live = envoy.wait_for(|envoy| envoy.state == EnvoyState::Live && envoy.pid != not);
    timeout(PATIENCE, live).await.expect("Envoy never became live").unwrap().clone()
}

pub(crate) async fn running(state: &mut watch::Receiver<ShimState>, not: i32) -> (i32, Origin) {
    let other = |state: &ShimState| matches!(state, ShimState::Running { pid, .. } if *pid != not);
    match timeout(PATIENCE, state.wait_for(other)).await.unwrap().unwrap().clone() {
        ShimState::Running { pid, origin, .. } => (pid, origin),
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn gone(pid: i32) {
    timeout(PATIENCE, async {
        while fs::exists(format!("/proc/{pid}")).unwrap() && !is_zombie(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("pid {pid} is still there"));
}

pub(crate) fn is_zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

pub(crate) fn status_line(pid: i32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned()
}
