//! The smallest TCP proxy that a redirect can lead to: what is measured through it is the kernel's part, and a floor
//! for a proxy's.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::str::FromStr;

use anyhow::{Context as _, bail};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Deliveries come from here, so that they aren't redirected again.
const PASSTHROUGH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

/// How the relay learns where a connection was meant to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It was addressed to the relay; the application has this port on this machine's address.
    Direct(u16),
    /// The kernel remembers what it rewrote.
    Redirect,
    /// Nothing was rewritten; the application sees the client's address.
    Tproxy,
}

impl FromStr for Way {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "redirect" => Ok(Self::Redirect),
            "tproxy" => Ok(Self::Tproxy),
            port => Ok(Self::Direct(port.parse().with_context(|| format!("{text} is no way"))?)),
        }
    }
}

/// Relays what arrives at the ports, each its way (`PORT=WAY`), until it is killed. `mark` is that of transparent
/// deliveries.
pub async fn serve(ports: &[String], mark: u32) -> anyhow::Result<()> {
    let mut listening = Vec::new();
    for port in ports {
        let (port, way) = port.split_once('=').context("PORT=WAY is wanted")?;
        let (port, way) = (port.parse()?, way.parse()?);
        listening.push(tokio::spawn(listen(port, way, mark)));
    }
    for one in listening {
        one.await??;
    }
    bail!("nothing to relay")
}

async fn listen(port: u16, way: Way, mark: u32) -> anyhow::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    if way == Way::Tproxy {
        setsockopt(&socket, sockopt::IpTransparent, &true).context("a transparent socket needs NET_ADMIN")?;
    }
    socket.bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
    let listener: TcpListener = socket.listen(1024)?;
    loop {
        let (stream, client) = listener.accept().await?;
        tokio::spawn(async move {
            if let Err(error) = relay(stream, client, way, mark).await {
                eprintln!("relay: {error:#}");
            }
        });
    }
}

async fn relay(mut downstream: TcpStream, client: SocketAddr, way: Way, mark: u32) -> anyhow::Result<()> {
    let local = downstream.local_addr()?;
    let socket = TcpSocket::new_v4()?;
    let target = match way {
        Way::Direct(port) => SocketAddr::new(local.ip(), port),
        Way::Redirect => {
            let original = getsockopt(&downstream, sockopt::OriginalDst)?;
            let port = u16::from_be(original.sin_port);
            SocketAddr::new(Ipv4Addr::from(u32::from_be(original.sin_addr.s_addr)).into(), port)
        }
        Way::Tproxy => local,
    };
    if way == Way::Tproxy {
        setsockopt(&socket, sockopt::IpTransparent, &true)?;
        setsockopt(&socket, sockopt::Mark, &mark)?;
        socket.bind(SocketAddr::new(client.ip(), 0))?;
    } else {
        socket.bind(SocketAddrV4::new(PASSTHROUGH, 0).into())?;
    }
    let mut upstream = socket.connect(target).await.with_context(|| format!("cannot connect to {target}"))?;
    downstream.set_nodelay(true)?;
    upstream.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut downstream, &mut upstream).await?;
    Ok(())
}
