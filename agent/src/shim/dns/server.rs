//! The sockets' tasks.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Dns;
use super::packet::{self, Outcome, Transport};
use crate::shim::handover::{DnsSockets, Passed};

/// Forwarded queries under way; more are answered with SERVFAIL at once.
const MAX_FORWARDS: usize = 512;
/// TCP clients at a time; more are closed.
const MAX_CLIENTS: usize = 128;
/// How long a TCP client may be silent, or slow to read.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);
/// Queries answered in a row before other tasks get their turn.
const BATCH: usize = 64;

/// How long forwarded queries may take to be answered when the sockets go to another program.
const HAND_OVER: Duration = Duration::from_secs(1);

/// Bound sockets. They are bound before privileges are dropped, though their port needs none: a port in use must
/// stop the shim before Envoy starts.
#[derive(Debug)]
pub struct Sockets {
    port: u16,
    udp: Vec<std::net::UdpSocket>,
    tcp: Vec<std::net::TcpListener>,
}

impl Sockets {
    /// Binds UDP and TCP on both loopback addresses. Without IPv6 in this namespace there is only one.
    pub fn bind(port: u16) -> io::Result<Self> {
        let mut sockets = Self { port, udp: Vec::new(), tcp: Vec::new() };
        for address in
            [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))]
        {
            let both = std::net::UdpSocket::bind(address)
                .and_then(|udp| std::net::TcpListener::bind(address).map(|tcp| (udp, tcp)));
            match both {
                Ok((udp, tcp)) => {
                    udp.set_nonblocking(true)?;
                    tcp.set_nonblocking(true)?;
                    sockets.udp.push(udp);
                    sockets.tcp.push(tcp);
                }
                Err(error)
                    if address.is_ipv6()
                        && matches!(
                            error.raw_os_error().map(nix::errno::Errno::from_raw),
                            Some(nix::errno::Errno::EADDRNOTAVAIL | nix::errno::Errno::EAFNOSUPPORT)
                        ) =>
                {
                    warn!(%error, "no IPv6 in this network namespace; DNS is served over IPv4 only");
                }
                Err(error) => {
                    return Err(io::Error::new(
                        error.kind(),
                        format!(
                            "the name server cannot bind {address}: {error}; another shim or program may have that \
                             port in this network namespace, or `lo` is down"
                        ),
                    ));
                }
            }
        }
        Ok(sockets)
    }

    /// The address of the first UDP socket.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp[0].local_addr()
    }

    /// For another program in this process.
    pub(in crate::shim) fn hand_over(&self) -> io::Result<DnsSockets> {
        Ok(DnsSockets {
            port: self.port,
            udp: self.udp.iter().map(Passed::copy).collect::<io::Result<_>>()?,
            tcp: self.tcp.iter().map(Passed::copy).collect::<io::Result<_>>()?,
        })
    }

    /// Bound by an earlier program of this process.
    pub(in crate::shim) fn take_over(from: DnsSockets) -> io::Result<Self> {
        let claim =
            |passed: Vec<Passed>| passed.into_iter().map(Passed::claim).collect::<io::Result<Vec<_>>>();
        Ok(Self {
            port: from.port,
            udp: claim(from.udp)?.into_iter().map(Into::into).collect(),
            tcp: claim(from.tcp)?.into_iter().map(Into::into).collect(),
        })
    }
}

/// The name server on whatever port it has now.
#[derive(Debug)]
pub struct NameServer {
    dns: Arc<Dns>,
    sockets: watch::Sender<Option<Arc<Sockets>>>,
    stop: CancellationToken,
}

impl NameServer {
    /// One that answers on `sockets`, or nowhere yet.
    pub fn new(dns: Arc<Dns>, sockets: Option<Sockets>) -> Self {
        Self { dns, sockets: watch::Sender::new(sockets.map(Arc::new)), stop: CancellationToken::new() }
    }

    /// Moves it to a port. When that can't be had, nothing changes.
    pub fn listen(&self, port: u16) -> io::Result<()> {
        if self.sockets.borrow().as_ref().is_none_or(|sockets| sockets.port != port) {
            self.sockets.send_replace(Some(Arc::new(Sockets::bind(port)?)));
        }
        Ok(())
    }

    /// The sockets that it answers on.
    pub fn sockets(&self) -> Option<Arc<Sockets>> {
        self.sockets.borrow().clone()
    }

    /// Makes [`run`](Self::run) return, once what is forwarded was answered. Later queries wait in the sockets.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Serves until stopped.
    pub async fn run(&self) -> io::Result<()> {
        let mut changes = self.sockets.subscribe();
        loop {
            let sockets = changes.borrow_and_update().clone();
            let serving = async {
                match &sockets {
                    Some(sockets) => serve(&self.dns, sockets, &self.stop).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                served = serving => return served,
                _ = changes.changed() => {}
                () = self.stop.cancelled(), if sockets.is_none() => return Ok(()),
            }
        }
    }
}

async fn serve(dns: &Arc<Dns>, sockets: &Sockets, stop: &CancellationToken) -> io::Result<()> {
    let forwards = Arc::new(Semaphore::new(MAX_FORWARDS));
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut tasks = JoinSet::new();
    for socket in &sockets.udp {
        let socket = Arc::new(UdpSocket::from_std(socket.try_clone()?)?);
        let (dns, forwards, stop) = (Arc::clone(dns), Arc::clone(&forwards), stop.clone());
        tasks.spawn(async move {
            let mut forwarded = JoinSet::new();
            tokio::select! {
                served = datagrams(&dns, &socket, &forwards, &mut forwarded) => served?,
                () = stop.cancelled() => {
                    let answered = async { while forwarded.join_next().await.is_some() {} };
                    // Who isn't answered by then asks again.
                    let _ = timeout(HAND_OVER, answered).await;
                }
            }
            Ok::<_, io::Error>(())
        });
    }
    for listener in &sockets.tcp {
        let listener = TcpListener::from_std(listener.try_clone()?)?;
        let (dns, clients, forwards) = (Arc::clone(dns), Arc::clone(&clients), Arc::clone(&forwards));
        let stop = stop.clone();
        tasks.spawn(async move {
            tokio::select! {
                served = streams(dns, listener, clients, forwards) => served,
                () = stop.cancelled() => Ok(()),
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(io::Error::other)??;
    }
    Ok(())
}

async fn datagrams(
    dns: &Arc<Dns>,
    socket: &Arc<UdpSocket>,
    forwards: &Arc<Semaphore>,
    forwarded: &mut JoinSet<()>,
) -> io::Result<()> {
    let mut query = vec![0; 4096];
    let mut out = Vec::with_capacity(4096);
    loop {
        socket.readable().await?;
        // Loading the table once per batch is enough: a batch takes microseconds.
        let table = dns.table.load_full();
        for _ in 0..BATCH {
            let (length, client) = match socket.try_recv_from(&mut query) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error for an earlier answer: the client is gone.
                Err(error) => {
                    debug!(%error, "a DNS client went away");
                    continue;
                }
            };
            let packet = &query[..length];
            match packet::answer(&table, packet, Transport::Udp, &mut out) {
                Outcome::Answer => count(&dns.counters.answered),
                Outcome::Refusal => count(&dns.counters.refused),
                Outcome::Drop => {
                    count(&dns.counters.refused);
                    continue;
                }
                Outcome::Forward => {
                    if let Ok(permit) = Arc::clone(forwards).try_acquire_owned() {
                        count(&dns.counters.forwarded);
                        let (dns, socket, packet) = (Arc::clone(dns), Arc::clone(socket), packet.to_vec());
                        forwarded.spawn(async move {
                            let response = forward(&dns, &packet, Transport::Udp).await;
                            drop(permit);
                            if let Err(error) = socket.send_to(&response, client).await {
                                debug!(%error, %client, "a forwarded answer could not be sent");
                            }
                        });
                        continue;
                    }
                    count(&dns.counters.refused);
                    packet::server_failure(packet, &mut out);
                }
            }
            // A full send buffer loses the answer, as the network might; the client asks again.
            if let Err(error) = socket.try_send_to(&out, client) {
                debug!(%error, %client, "an answer could not be sent");
            }
        }
        while forwarded.try_join_next().is_some() {}
        tokio::task::yield_now().await;
    }
}

async fn streams(
    dns: Arc<Dns>,
    listener: TcpListener,
    clients: Arc<Semaphore>,
    forwards: Arc<Semaphore>,
) -> io::Result<()> {
    let mut open = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, or a client that left: neither ends the server. Waiting keeps the loop from
                // spinning while descriptors are short.
                warn!(%error, "cannot accept a DNS client");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        while open.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&clients).try_acquire_owned() else {
            count(&dns.counters.refused);
            continue;
        };
        let (dns, forwards) = (Arc::clone(&dns), Arc::clone(&forwards));
        open.spawn(async move {
            if let Err(error) = client(&dns, stream, &forwards).await {
                debug!(%error, "a DNS client over TCP ended");
            }
            drop(permit);
        });
    }
}

async fn client(dns: &Dns, stream: TcpStream, forwards: &Semaphore) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut query = Vec::new();
    let mut out = Vec::new();
    let mut framed = Vec::new();
    loop {
        let length = match timeout(CLIENT_PATIENCE, stream.read_u16()).await? {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        query.resize(usize::from(length), 0);
        timeout(CLIENT_PATIENCE, stream.read_exact(&mut query)).await??;
        let outcome = packet::answer(&dns.table.load(), &query, Transport::Tcp, &mut out);
        match outcome {
            Outcome::Answer => count(&dns.counters.answered),
            Outcome::Refusal => count(&dns.counters.refused),
            Outcome::Drop => {
                count(&dns.counters.refused);
                return Ok(());
            }
            Outcome::Forward => {
                if let Ok(_permit) = forwards.try_acquire() {
                    count(&dns.counters.forwarded);
                    out = forward(dns, &query, Transport::Tcp).await;
                } else {
                    count(&dns.counters.refused);
                    packet::server_failure(&query, &mut out);
                }
            }
        }
        framed.clear();
        framed.extend_from_slice(&u16::try_from(out.len()).map_err(io::Error::other)?.to_be_bytes());
        framed.extend_from_slice(&out);
        timeout(CLIENT_PATIENCE, stream.write_all(&framed)).await??;
    }
}

async fn forward(dns: &Dns, query: &[u8], transport: Transport) -> Vec<u8> {
    if let Some(response) = dns.upstreams.load_full().ask(query, transport).await {
        return response;
    }
    let mut out = Vec::new();
    packet::server_failure(query, &mut out);
    out
}

fn count(counter: &std::sync::atomic::AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tcp_clients_are_limited_and_those_within_the_limit_are_served() {
        let sockets = Sockets::bind(0).unwrap();
        let address = sockets.tcp[0].local_addr().unwrap();
        let dns = Dns::new();
        let server = NameServer::new(Arc::clone(&dns), Some(sockets));
        let server = tokio::spawn(async move { server.run().await });
        let query = b"\0\x1c\0\x07\x01\0\0\x01\0\0\0\0\0\0\x04mesh\x05local\0\0\x01\0\x01";
        let mut clients = Vec::new();
        for _ in 0..MAX_CLIENTS {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(query).await.unwrap();
            assert_eq!(client.read_u16().await.unwrap(), 0x1c, "the question and SERVFAIL");
            clients.push(client);
        }
        let mut surplus = TcpStream::connect(address).await.unwrap();
        assert!(matches!(surplus.read(&mut [0; 1]).await, Ok(0) | Err(_)), "closed at once");
        assert_eq!(dns.status().refused, 1);
        server.abort();
    }
}
