//! Every packet in a namespace, in memory and as a pcap file.

use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Packets>>,
}

/// What was captured.
#[derive(Debug, Default)]
pub struct Packets {
    packets: Vec<(std::time::Duration, Vec<u8>)>,
}

impl Capture {
    /// Starts to capture in a namespace; the socket is open when this returns.
    pub fn start(netns: &Path) -> anyhow::Result<Self> {
        let netns = netns.to_owned();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (ready, opened) = std::sync::mpsc::channel();
        // A thread of its own, because it enters the namespace and never comes back.
        let thread = std::thread::spawn(move || match open(&netns) {
            Ok(socket) => {
                let _ = ready.send(Ok(()));
                run(&socket, &stopped)
            }
            Err(error) => {
                let _ = ready.send(Err(anyhow!("{error:#}")));
                Err(error)
            }
        });
        opened.recv().context("the capture ended before it began")??;
        Ok(Self { stop, thread })
    }

    /// Ends it and hands out what passed.
    pub fn finish(self) -> anyhow::Result<Packets> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture panicked"))?
    }
}

fn open(netns: &PathBuf) -> anyhow::Result<OwnedFd> {
    let file = std::fs::File::open(netns).with_context(|| format!("no namespace {}", netns.display()))?;
    setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("cannot open a packet socket")?;
    setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20))?;
    Ok(socket)
}

fn run(socket: &OwnedFd, stop: &AtomicBool) -> anyhow::Result<Packets> {
    let mut packets = Packets::default();
    let mut buffer = vec![0; 1 << 17];
    loop {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::from(20u8))? == 0 {
            if stop.load(Ordering::Relaxed) {
                return Ok(packets);
            }
            continue;
        }
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        packets.packets.push((now, buffer[..length].to_vec()));
        if stop.load(Ordering::Relaxed) && packets.packets.len() > 1_000_000 {
            return Ok(packets);
        }
    }
}

impl Packets {
    /// How many.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether nothing passed.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.packets.iter().map(|(_, packet)| packet.len()).sum()
    }

    /// How many packets contain this text.
    pub fn containing(&self, needle: &str) -> usize {
        let needle = needle.as_bytes();
        let holds = |packet: &[u8]| packet.windows(needle.len()).any(|window| window == needle);
        self.packets.iter().filter(|(_, packet)| holds(packet)).count()
    }

    /// How many packets carry TCP between these addresses, in either direction.
    pub fn between(&self, a: std::net::Ipv4Addr, b: std::net::Ipv4Addr) -> usize {
        let (a, b) = (a.octets(), b.octets());
        let carries = |packet: &[u8]| {
            // Ethernet, IPv4, TCP.
            packet.len() > 34
                && packet[12..14] == [8, 0]
                && packet[23] == 6
                && ((packet[26..30] == a && packet[30..34] == b)
                    || (packet[26..30] == b && packet[30..34] == a))
        };
        self.packets.iter().filter(|(_, packet)| carries(packet)).count()
    }

    /// How many IPv4 packets go to an address whose first `bits` (whole bytes) are those of `network`.
    pub fn to_network(&self, network: [u8; 4], bits: usize) -> usize {
        let bytes = bits / 8;
        let goes = |packet: &[u8]| {
            packet.len() > 34 && packet[12..14] == [8, 0] && packet[30..30 + bytes] == network[..bytes]
        };
        self.packets.iter().filter(|(_, packet)| goes(packet)).count()
    }

    /// How many IPv6 packets go to an address of this network, whose prefix has whole bytes.
    pub fn to_network6(&self, network: std::net::Ipv6Addr, bits: usize) -> usize {
        let prefix = &network.octets()[..bits / 8];
        let goes = |packet: &[u8]| {
            // Ethernet, then IPv6 with its destination at byte 24.
            packet.len() > 54 && packet[12..14] == [0x86, 0xdd] && packet[38..54].starts_with(prefix)
        };
        self.packets.iter().filter(|(_, packet)| goes(packet)).count()
    }

    /// Writes a file that Wireshark reads.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let mut file = std::io::BufWriter::new(
            std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
        );
        for field in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 0x0004_0000, 1] {
            file.write_all(&field.to_le_bytes())?;
        }
        for (time, packet) in &self.packets {
            let length = u32::try_from(packet.len())?;
            let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
            for field in [seconds, time.subsec_micros(), length, length] {
                file.write_all(&field.to_le_bytes())?;
            }
            file.write_all(packet)?;
        }
        Ok(file.flush()?)
    }
}
