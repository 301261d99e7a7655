//! Network namespaces for tests. They live as long as a thread in them, so nothing remains, however a test ends.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use ursa_init::in_netns;

/// Long enough for any packet in one machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// The user that applications run as.
pub(crate) const APP: u32 = 1000;
/// The user that the proxy runs as.
pub(crate) const PROXY: u32 = 5678;

/// A namespace of its own, gone when dropped.
pub(crate) struct Namespace {
    path: PathBuf,
    tid: i32,
    _end: mpsc::Sender<()>,
}

impl Namespace {
    /// Makes an empty one; `lo` is down as in every new namespace.
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "tests in network namespaces need root");
        let (end, wait) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs CAP_SYS_ADMIN");
            tell.send(nix::unistd::gettid().as_raw()).expect("the test waits");
            // Ends when the owner drops its side.
            let _ = wait.recv();
        });
        let tid = told.recv().expect("the thread tells its id");
        let path = PathBuf::from(format!("/proc/{}/task/{tid}/ns/net", std::process::id()));
        Self { path, tid, _end: end }
    }

    /// Two namespaces joined by a link: 10.77.0.1 and fd77::1 here, 10.77.0.2 and fd77::2 there.
    pub(crate) fn pair() -> (Self, Self) {
        let (here, there) = (Self::new(), Self::new());
        for ns in [&here, &there] {
            ns.ip("link set lo up");
        }
        here.ip(&format!("link add eth0 type veth peer name eth0 netns {}", there.tid));
        for (ns, last) in [(&here, 1), (&there, 2)] {
            ns.ip(&format!("addr add 10.77.0.{last}/24 dev eth0"));
            ns.ip(&format!("addr add fd77::{last}/64 dev eth0 nodad"));
            ns.ip("link set eth0 up");
        }
        let (gateway, far) = ("10.77.0.2", "fd77::2");
        here.ip(&format!("route add default via {gateway}"));
        here.ip(&format!("-6 route add default via {far}"));
        (here, there)
    }

    /// Its path, as a runtime would give it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `f` inside.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        in_netns(&self.path, f).expect("the namespace lives")
    }

    /// Runs `ip` inside.
    pub(crate) fn ip(&self, args: &str) -> String {
        self.run(|| {
            let output = Command::new("ip").args(args.split(' ')).output().expect("iproute2 is installed");
            assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).expect("ip writes text")
        })
    }

    /// Everything about routes and addresses that a leftover would show in.
    pub(crate) fn network(&self) -> String {
        let v4 = self.ip("route show table all");
        let v6 = self.ip("-6 route show table all");
        format!("{v4}{v6}{}", self.ip("-o addr"))
    }

    /// Accepts connections on the ports, on every address, and answers each with its port.
    pub(crate) fn listen(&self, ports: &[u16]) {
        for port in ports {
            let address: SocketAddr = (std::net::Ipv6Addr::UNSPECIFIED, *port).into();
            let listener = self.run(|| TcpListener::bind(address)).expect("the port is free");
            thread::spawn(move || answer(&listener));
        }
    }

    /// Answers datagrams and connections on loopback or an address with the port.
    pub(crate) fn serve_dns(&self, addresses: &[IpAddr], port: u16) {
        for address in addresses {
            let at = SocketAddr::new(*address, port);
            let (tcp, udp) = self.run(|| (TcpListener::bind(at), UdpSocket::bind(at)));
            let (tcp, udp) = (tcp.expect("the port is free"), udp.expect("the port is free"));
            thread::spawn(move || answer(&tcp));
            thread::spawn(move || {
                let mut buffer = [0; 512];
                while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                    let port = udp.local_addr().map(|a| a.port()).unwrap_or_default();
                    let _ = udp.send_to(&port.to_be_bytes(), from);
                }
            });
        }
    }

    /// Connects as a user; the port that answered, or what failed.
    pub(crate) fn tcp(&self, uid: u32, to: &str) -> Result<u16, std::io::ErrorKind> {
        self.tcp_as(uid, uid, to)
    }

    /// Connects as a user in a group.
    pub(crate) fn tcp_as(&self, uid: u32, gid: u32, to: &str) -> Result<u16, std::io::ErrorKind> {
        let to: SocketAddr = to.parse().expect("an address and a port");
        self.run(|| {
            // Only this thread's: the kernel matches the user that opened the socket.
            nix::unistd::setfsgid(gid.into());
            nix::unistd::setfsuid(uid.into());
            landed(TcpStream::connect_timeout(&to, PATIENCE))
        })
    }

    /// Asks by datagram as a user, from a given local port (0 for any).
    pub(crate) fn udp(&self, uid: u32, from_port: u16, to: &str) -> Result<u16, std::io::ErrorKind> {
        let to: SocketAddr = to.parse().expect("an address and a port");
        self.run(|| {
            nix::unistd::setfsuid(uid.into());
            let any: IpAddr = if to.is_ipv4() {
                std::net::Ipv4Addr::UNSPECIFIED.into()
            } else {
                std::net::Ipv6Addr::UNSPECIFIED.into()
            };
            let socket = bound((any, from_port).into());
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            let ask = || {
                socket.connect(to)?;
                socket.send(b"?")?;
                let mut port = [0; 2];
                socket.recv(&mut port)?;
                Ok(u16::from_be_bytes(port))
            };
            ask().map_err(|e: std::io::Error| e.kind())
        })
    }
}

/// A socket on a port that an earlier one has left. A program that another test of this process starts holds a copy
/// of the earlier one between its fork and its exec, and with it the port.
fn bound(at: SocketAddr) -> UdpSocket {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UdpSocket::bind(at) {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                thread::yield_now();
            }
            bound => return bound.expect("the port is free"),
        }
    }
}

fn answer(listener: &TcpListener) {
    while let Ok((mut stream, _)) = listener.accept() {
        let port = stream.local_addr().map(|a| a.port()).unwrap_or_default();
        let _ = stream.write_all(&port.to_be_bytes());
    }
}

/// Which port answered on a connection.
pub(crate) fn landed(connected: std::io::Result<TcpStream>) -> Result<u16, std::io::ErrorKind> {
    let read = |mut stream: TcpStream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut port = [0; 2];
        stream.read_exact(&mut port)?;
        Ok(u16::from_be_bytes(port))
    };
    connected.and_then(read).map_err(|e| e.kind())
}
