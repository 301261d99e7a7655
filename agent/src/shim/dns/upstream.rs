//! Forwarding to the resolver that the workload would have used.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use super::packet::{Transport, answers};

/// How long one name server may take before the next is asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long all of them may take: clients give up after 5 s.
const DEADLINE: Duration = Duration::from_millis(4500);
/// How long the list of name servers is believed before its file is looked at.
const FRESH: Duration = Duration::from_secs(1);
/// As many name servers as the C library uses.
const MAX_SERVERS: usize = 3;

/// The name servers of a `resolv.conf`, read again when it changes.
#[derive(Debug)]
pub(super) struct Upstreams {
    path: PathBuf,
    cached: Mutex<Cached>,
    /// Keyed by the system's entropy: ids that nobody can guess, without a system call each.
    ids: RandomState,
    counter: AtomicU64,
}

#[derive(Debug, Default)]
struct Cached {
    checked: Option<Instant>,
    modified: Option<SystemTime>,
    servers: Arc<[SocketAddr]>,
}

impl Upstreams {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            cached: Mutex::new(Cached::default()),
            ids: RandomState::new(),
            counter: AtomicU64::new(0),
        }
    }

    /// Asks the name servers in turn, and returns the response under the query's own id.
    pub(super) async fn ask(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let servers = self.servers();
        let deadline = Instant::now() + DEADLINE;
        for server in servers.iter().chain(servers.iter()) {
            let patience = deadline.min(Instant::now() + PATIENCE);
            if Instant::now() >= deadline {
                break;
            }
            let mut asked = query.to_vec();
            asked[..2].copy_from_slice(&self.id());
            let exchange = async {
                match transport {
                    Transport::Udp => over_udp(*server, &asked).await,
                    Transport::Tcp => over_tcp(*server, &asked).await,
                }
            };
            match timeout_at(patience, exchange).await {
                Ok(Ok(mut response)) => {
                    response[..2].copy_from_slice(&query[..2]);
                    return Some(response);
                }
                Ok(Err(error)) => debug!(%server, %error, "a name server could not be asked"),
                Err(_) => debug!(%server, "a name server gave no answer"),
            }
        }
        None
    }

    fn id(&self) -> [u8; 2] {
        let mut hasher = self.ids.build_hasher();
        hasher.write_u64(self.counter.fetch_add(1, Ordering::Relaxed));
        let random = hasher.finish().to_be_bytes();
        [random[0], random[1]]
    }

    fn servers(&self) -> Arc<[SocketAddr]> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.checked.is_some_and(|at| at.elapsed() < FRESH) {
            return Arc::clone(&cached.servers);
        }
        let modified = std::fs::metadata(&self.path).and_then(|data| data.modified()).ok();
        if cached.checked.is_none() || modified != cached.modified {
            match std::fs::read_to_string(&self.path) {
                Ok(text) => cached.servers = parse(&text),
                // The last known name servers are better than none.
                Err(error) => {
                    warn!(path = %self.path.display(), %error, "cannot read the resolver configuration");
                }
            }
            if cached.servers.is_empty() {
                warn!(path = %self.path.display(), "no name servers to forward to; names outside the mesh won't resolve");
            }
        }
        cached.modified = modified;
        cached.checked = Some(Instant::now());
        Arc::clone(&cached.servers)
    }
}

fn parse(text: &str) -> Arc<[SocketAddr]> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next()).flatten()
        })
        .filter_map(|address| {
            let parsed = address.parse::<IpAddr>();
            if parsed.is_err() {
                warn!(address, "a name server's address is not understood and left out");
            }
            parsed.ok().map(|address| SocketAddr::new(address, 53))
        })
        .take(MAX_SERVERS)
        .collect()
}

async fn over_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    // A socket of its own for each query: its random port is half of what a forger would have to guess.
    let local: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(local, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    // As long as a datagram can be: what the client may take is between it and the server.
    let mut response = Vec::with_capacity(usize::from(u16::MAX));
    loop {
        response.clear();
        socket.recv_buf(&mut response).await?;
        if response.len() >= 2 && response[..2] == query[..2] && answers(query, &response) {
            return Ok(response);
        }
    }
}

async fn over_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = timeout(PATIENCE, TcpStream::connect(server)).await??;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + query.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(query);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut response = vec![0; usize::from(length)];
    stream.read_exact(&mut response).await?;
    if response.len() >= 2 && response[..2] == query[..2] && answers(query, &response) {
        return Ok(response);
    }
    Err(io::Error::other("its response answers another question"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_name_servers_as_the_c_library_does() {
        let servers = parse(
            "# comment\nsearch example.com\nnameserver 10.0.0.1\n nameserver\tfd00::1 # x\nnameserver nonsense\n\
             nameserver\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n",
        );
        assert_eq!(
            servers.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.1:53", "[fd00::1]:53", "10.0.0.2:53"]
        );
    }

    #[test]
    fn ids_do_not_repeat_in_order() {
        let upstreams = Upstreams::new(Path::new("/nonexistent"));
        let ids: Vec<_> = (0..64).map(|_| upstreams.id()).collect();
        assert!(ids.windows(2).any(|pair| pair[0] > pair[1]) && ids.windows(2).any(|pair| pair[0] < pair[1]));
    }
}
