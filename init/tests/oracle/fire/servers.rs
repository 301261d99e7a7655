//! Listeners on every port that a packet may land on; each answers with where it is.

use std::collections::HashMap;
use std::io::{IoSliceMut, Write as _};
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn6,
    bind, listen, recvmsg, sendmsg, setsockopt, socket, sockopt,
};

use super::probe::{Place, encode};

/// Answers until it is dropped.
pub(super) struct Servers {
    _end: UnixStream,
}

impl Servers {
    /// Listens in the calling thread's namespace, on every address of both families.
    pub(super) fn start(place: Place, tcp: &[u16], udp: &[u16]) -> Self {
        let (end, ended) = UnixStream::pair().expect("a pair of sockets");
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
        epoll.add(&ended, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX)).expect("epoll takes a socket");
        let mut ports = HashMap::new();
        for (listener, port) in tcp.iter().map(|port| (open(SockType::Stream, *port), *port)) {
            listen(&listener, Backlog::new(512).expect("a backlog")).expect("listens");
            let listener = TcpListener::from(listener);
            let token = u64::try_from(listener.as_raw_fd()).expect("a descriptor");
            epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, token)).expect("epoll takes a socket");
            ports.insert(token, (Socket::Tcp(listener), port));
        }
        for (socket, port) in udp.iter().map(|port| (open(SockType::Datagram, *port), *port)) {
            let token = u64::try_from(socket.as_raw_fd()).expect("a descriptor");
            epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token)).expect("epoll takes a socket");
            ports.insert(token, (Socket::Udp(socket), port));
        }
        thread::spawn(move || {
            let _ended = ended;
            let mut events = [EpollEvent::empty(); 64];
            loop {
                let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
                    Ok(ready) => ready,
                    Err(Errno::EINTR) => continue,
                    Err(_) => return,
                };
                for event in &events[..ready] {
                    match ports.get(&event.data()) {
                        Some((Socket::Tcp(listener), port)) => answer_tcp(listener, place, *port),
                        Some((Socket::Udp(socket), port)) => answer_udp(socket, place, *port),
                        None => return,
                    }
                }
            }
        });
        Self { _end: end }
    }
}

enum Socket {
    Tcp(TcpListener),
    Udp(OwnedFd),
}

/// A socket for both families that also takes what TPROXY hands over.
fn open(kind: SockType, port: u16) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet6, kind, flags, None).expect("a socket");
    setsockopt(&fd, sockopt::ReuseAddr, &true).expect("SO_REUSEADDR");
    setsockopt(&fd, sockopt::IpTransparent, &true).expect("IP_TRANSPARENT wants CAP_NET_ADMIN");
    if kind == SockType::Datagram {
        setsockopt(&fd, sockopt::Ipv6RecvPacketInfo, &true).expect("IPV6_RECVPKTINFO");
    }
    let at = SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0));
    bind(fd.as_raw_fd(), &at).unwrap_or_else(|e| panic!("port {port} in a namespace of the test's own: {e}"));
    fd
}

fn answer_tcp(listener: &TcpListener, place: Place, port: u16) {
    while let Ok((mut stream, _)) = listener.accept() {
        let _ = stream.write_all(&encode(place, port));
    }
}

/// Answers from the address that was asked, which only the packet's control message tells.
fn answer_udp(socket: &OwnedFd, place: Place, port: u16) {
    loop {
        let mut data = [0; 64];
        let mut iov = [IoSliceMut::new(&mut data)];
        let mut space = nix::cmsg_space!(nix::libc::in6_pktinfo);
        let fd = socket.as_fd().as_raw_fd();
        let Ok(got) = recvmsg::<SockaddrIn6>(fd, &mut iov, Some(&mut space), MsgFlags::empty()) else {
            return;
        };
        let asked = got.cmsgs().ok().and_then(|mut all| {
            all.find_map(|one| match one {
                ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
                _ => None,
            })
        });
        let (Some(mut info), Some(from)) = (asked, got.address) else { continue };
        // A link-local address needs the interface; any other finds its own way back.
        if !Ipv6Addr::from(info.ipi6_addr.s6_addr).is_unicast_link_local() {
            info.ipi6_ifindex = 0;
        }
        let answer = encode(place, port);
        let iov = [std::io::IoSlice::new(&answer)];
        let _ = sendmsg(fd, &iov, &[ControlMessage::Ipv6PacketInfo(&info)], MsgFlags::empty(), Some(&from));
    }
}
