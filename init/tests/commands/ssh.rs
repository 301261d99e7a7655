//! The operator's way in is never captured, wherever sshd listens.

use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::{APP, Namespace, PROXY};
use crate::tool::{init_in, ok};

/// Which port the stand-in of sshd listens on.
const PORT: &str = "STAND_IN_PORT";

/// A process that ends with the test.
struct Sshd(Child);

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process of root that the kernel calls `sshd`, listening: a copy of this program.
fn sshd(ns: &Namespace, port: u16) -> Sshd {
    sshd_of(ns, port, 0)
}

fn sshd_of(ns: &Namespace, port: u16, uid: u32) -> Sshd {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("sshd");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", "ssh::stand_in", "--nocapture"]).env(PORT, port.to_string()).uid(uid).gid(uid);
    let mut child = ns.run(|| command.stdout(Stdio::piped()).spawn()).unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("listening") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut out, &mut line).unwrap(), 0, "it ended");
    }
    child.stdout = Some(out.into_inner());
    // It runs without its file.
    Sshd(child)
}

/// No test: what [`sshd`] runs.
#[test]
fn stand_in() {
    let Ok(port) = std::env::var(PORT) else { return };
    let port: u16 = port.parse().unwrap();
    let listener = TcpListener::bind(("::", port)).unwrap();
    println!("listening");
    while let Ok((mut stream, _)) = listener.accept() {
        let _ = stream.write_all(&port.to_be_bytes());
    }
}

#[test]
fn sshds_real_port_stays_open_on_a_host() {
    let (web, stranger) = Namespace::pair();
    web.listen(&[15001, 15006]);
    let _sshd = sshd(&web, 2222);
    // Another one of the same name, in another namespace, is none of ours.
    let _other = sshd(&stranger, 8022);
    let uid = PROXY.to_string();
    let shown = ok(&mut init_in(&web, &["config", "--host", "--proxy-uid", &uid]));
    assert!(shown.contains("excludePorts: [2222]  # sockets of sshd"), "{shown}");

    ok(&mut init_in(&web, &["apply", "--host", "--proxy-uid", &uid]));
    for (to, port) in [
        ("10.77.0.1:2222", 2222),
        ("[fd77::1]:2222", 2222),
        ("10.77.0.1:8080", 15006),
        ("10.77.0.1:8022", 15006),
    ] {
        assert_eq!(stranger.tcp(APP, to), Ok(port), "{to}");
    }
    let include = ["apply", "--host", "--proxy-uid", &uid, "--include-inbound-ports", "2000-3000"];
    ok(&mut init_in(&web, &include));
    for (to, port) in [("10.77.0.1:2222", 2222), ("10.77.0.1:2221", 15006), ("10.77.0.1:2223", 15006)] {
        assert_eq!(stranger.tcp(APP, to), Ok(port), "{to}");
    }
    // Kuma's words keep it open too; and the session says its port where no process can be found.
    let mut kuma = init_in(&web, &["transparent-proxy", "--host", "--kuma-dp-user", &uid]);
    ok(kuma.env("SSH_CONNECTION", "10.77.0.2 50000 10.77.0.1 2022"));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:2222"), Ok(2222));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:2022"), Err(std::io::ErrorKind::ConnectionRefused));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:2023"), Ok(15006));
    // Without --host nothing is special about sshd.
    ok(&mut init_in(&web, &["apply", "--proxy-uid", &uid]));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:2222"), Ok(15006));
}

#[test]
fn a_port_that_a_session_opens_is_no_way_in() {
    let (web, stranger) = Namespace::pair();
    web.listen(&[15006]);
    let _sshd = sshd(&web, 2222);
    // As `ssh -R` makes one: the process has sshd's name, and is its user's.
    let _session = sshd_of(&web, 8022, APP);
    ok(&mut init_in(&web, &["apply", "--host", "--proxy-uid", &PROXY.to_string()]));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:2222"), Ok(2222));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8022"), Ok(15006));
}

#[test]
fn watch_follows_sshd_to_another_port() {
    let (web, stranger) = Namespace::pair();
    web.listen(&[15006]);
    let folder = tempfile::tempdir().unwrap();
    let first = sshd(&web, 2222);
    let mut watch = init_in(&web, &["watch", "--host", "--interval", "1", "--proxy-uid", &PROXY.to_string()]);
    watch.arg("--run-dir").arg(folder.path()).arg("--status").arg(folder.path().join("status.json"));
    let _watch = Sshd(watch.stderr(Stdio::null()).spawn().unwrap());
    let until = |what: &str, to: &str, lands: u16| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while stranger.tcp(APP, to) != Ok(lands) {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::yield_now();
        }
    };
    until("the redirect is in place", "10.77.0.1:9", 15006);
    assert_eq!(stranger.tcp(APP, "10.77.0.1:2222"), Ok(2222));
    drop(first);
    let _second = sshd(&web, 2322);
    until("the new port is open", "10.77.0.1:2322", 2322);
    assert_eq!(stranger.tcp(APP, "10.77.0.1:2222"), Ok(15006), "and the old one is as any");
}
