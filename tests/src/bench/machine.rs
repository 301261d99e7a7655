//! What a machine of the mesh pays: the shim's DNS, and the memory of agent and shim. Needs root and
//! namespaces, all its own.

use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use ursa_init::in_netns;

use super::process;
use crate::lab::pair::Pair;
use crate::lab::wait;

/// How long names are asked for.
const ASKING: Duration = Duration::from_secs(2);
/// Queries under way.
const WINDOW: usize = 64;

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Answers of the shim each second, its one thread on one processor and the client on another.
    pub dns: u64,
    /// Answers for each second of the shim's processor time.
    pub dns_per_cpu: u64,
    /// An agent with one workload, in KiB.
    pub agent: u64,
    /// A shim, in KiB, without its Envoy.
    pub shim: u64,
}

/// Measures all of it.
pub fn measure(say: fn(&str)) -> anyhow::Result<Machine> {
    say("two workloads with agent, shim and Envoy; their names are asked for");
    let pair = Pair::allowed()?;
    let shim = *pair.web.host.running("ursa-shim").first().context("web has no shim")?;
    let mut first = CpuSet::new();
    first.set(0)?;
    sched_setaffinity(Pid::from_raw(shim), &first)?;
    let shim = shim.unsigned_abs();
    let before = process::cpu(shim)?;
    let path = pair.web.host.path();
    let (answers, took) = thread::scope(|scope| {
        let ask = || in_netns(&path, ask).map_err(anyhow::Error::from).flatten();
        scope.spawn(ask).join().map_err(|_| anyhow::anyhow!("the DNS client panicked"))?
    })?;
    let cpu = process::cpu_since(shim, before)?;
    let agent = pair.node_a.agent.pid().context("the agent has ended")?.unsigned_abs();
    let (agent, shim) = (process::memory(agent)?, process::memory(shim)?);
    let dns_per_cpu = per_second(answers, cpu);
    let dns = per_second(answers, took);
    Ok(Machine { dns, dns_per_cpu, agent, shim })
}

fn per_second(count: u64, time: Duration) -> u64 {
    count * 1_000_000 / u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1)
}

/// Asks for one name as fast as answers come; returns how many came in what time.
fn ask() -> anyhow::Result<(u64, Duration)> {
    process::pin_load();
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect("127.0.0.1:15053")?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let query = query("backend.svc.mesh.local");
    let mut answer = [0; 512];
    wait::until("the shim to know backend", Duration::from_secs(10), || {
        socket.send(&query).map_err(|error| error.to_string())?;
        match socket.recv(&mut answer) {
            Ok(length) if length > query.len() && answer[7] > 0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;
    let (start, mut answers, mut lost) = (Instant::now(), 0_u64, 0);
    for _ in 0..WINDOW {
        socket.send(&query)?;
    }
    while start.elapsed() < ASKING {
        // The clock is looked at once for so many.
        for _ in 0..WINDOW {
            if socket.recv(&mut answer).is_ok() {
                answers += 1;
            } else {
                lost += 1;
            }
            socket.send(&query)?;
        }
    }
    if lost > 10 {
        bail!("{lost} of {answers} answers were lost on loopback");
    }
    Ok((answers, start.elapsed()))
}

/// A query for the IPv4 addresses of a name (RFC 1035, section 4.1).
fn query(name: &str) -> Vec<u8> {
    let mut packet = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        packet.push(u8::try_from(label.len()).unwrap_or_default());
        packet.extend_from_slice(label.as_bytes());
    }
    packet.extend_from_slice(&[0, 0, 1, 0, 1]);
    packet
}
