//! A workload's namespace in which every packet is answered, whatever the rules do with it.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::thread;

use nix::unistd::{setfsgid, setfsuid};
use ursa_init::backend::Backend;
use ursa_init::{Plan, RedirectIntent};

use super::namespace::Namespace;
use super::probe::{Landed, Layer4, Origin, Place, Probe};
use super::servers::Servers;

/// The workload's addresses towards the world.
pub(crate) const OWN4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
/// The IPv6 counterpart of [`OWN4`].
pub(crate) const OWN6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 1));
/// A link-local address of the workload; `fe80::2` is across the link.
pub(crate) const LINK_LOCAL: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// An interface behind which guests live: one address of the workload's and one of a guest's. For every other address
/// of their networks the world answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guests {
    pub(crate) interface: &'static str,
    v4: [u8; 2],
    v6: u16,
}

/// The names that peers' own examples and test data use.
pub(crate) const GUESTS: [Guests; 5] = [
    Guests { interface: "docker0", v4: [172, 17], v6: 0xfd17 },
    Guests { interface: "docker2", v4: [10, 99], v6: 0xfd99 },
    Guests { interface: "br-x", v4: [172, 18], v6: 0xfd18 },
    Guests { interface: "iface", v4: [198, 18], v6: 0xfd31 },
    Guests { interface: "docker", v4: [1, 2], v6: 0xfd12 },
];

impl Guests {
    fn at4(self, third: u8, last: u8) -> IpAddr {
        Ipv4Addr::new(self.v4[0], self.v4[1], third, last).into()
    }

    fn at6(self, last: u16) -> IpAddr {
        Ipv6Addr::new(self.v6, 0, 0, 0, 0, 0, 0, last).into()
    }

    /// The workload's own addresses there.
    pub(crate) fn own(self) -> [IpAddr; 2] {
        [self.at4(3, 1), self.at6(1)]
    }

    /// The guests' addresses.
    pub(crate) fn guest(self) -> [IpAddr; 2] {
        [self.at4(3, 2), self.at6(2)]
    }

    /// Other addresses of their networks: only forwarded to.
    pub(crate) fn behind(self) -> [IpAddr; 2] {
        [self.at4(3, 99), self.at6(0x99)]
    }

    /// The commands that give `here` to an interface across which `there` is.
    fn link(self, here: [IpAddr; 2], there: [IpAddr; 2]) -> [String; 2] {
        let dev = self.interface;
        let v4 = format!("link set {dev} up\naddr add {} peer {} dev {dev}\n", here[0], there[0]);
        [v4, format!("addr add {} peer {} dev {dev} nodad\n", here[1], there[1])]
    }
}

/// Whether an address is the workload's own.
pub(crate) fn is_own(address: IpAddr) -> bool {
    address.is_loopback()
        || [OWN4, OWN6, LINK_LOCAL].contains(&address)
        || GUESTS.iter().any(|guests| guests.own().contains(&address))
}

/// Which program loads rules in the form of `iptables-restore`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restore {
    /// The one that speaks nftables.
    Nft,
    /// The one for the old tables.
    Legacy,
}

impl Restore {
    const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

/// The namespaces; gone when dropped.
pub(crate) struct Lab {
    web: Namespace,
    far: Namespace,
    guest: Namespace,
    _servers: Vec<Servers>,
    next_port: AtomicU16,
}

impl Lab {
    /// A lab in which the probes' ports answer, everywhere. In the workload's namespace the proxy's are the proxy's:
    /// rules look at who sends answers.
    pub(crate) fn new(probes: &[Probe], intent: &RedirectIntent) -> Self {
        let proxy_ports = [intent.inbound.port, intent.outbound.port, intent.dns.port];
        let (web, far, guest) = (Namespace::new(), Namespace::new(), Namespace::new());
        thread::scope(|scope| {
            for ns in [&web, &far, &guest] {
                scope.spawn(|| ns.run(prepare));
            }
        });
        let path = |ns: &Namespace| ns.path().display().to_string();
        let mut links = format!("link add eth0 type veth peer name eth0 netns {}\n", path(&far));
        for Guests { interface, .. } in GUESTS {
            links.extend([format!(
                "link add {interface} type veth peer name {interface} netns {}\n",
                path(&guest)
            )]);
        }
        batch(&web, &[], &(links + "link set lo up\n"));
        thread::scope(|scope| {
            scope.spawn(|| configure_web(&web));
            scope.spawn(|| configure_far(&far));
            scope.spawn(|| configure_guest(&guest));
        });
        let ports = |layer4: Layer4| {
            let of = probes.iter().filter(|probe| probe.layer4 == layer4).map(|probe| probe.to.port());
            let mut ports: Vec<u16> = of.filter(|port| !proxy_ports.contains(port)).collect();
            ports.sort_unstable();
            ports.dedup();
            ports
        };
        let (tcp, udp) = (ports(Layer4::Tcp), ports(Layer4::Udp));
        let places = [(&web, Place::Web), (&far, Place::Far), (&guest, Place::Guest)];
        let mut servers = Vec::from(places.map(|(ns, place)| ns.run(|| Servers::start(place, &tcp, &udp))));
        let proxy = || {
            setfsgid(intent.proxy_gids.first().copied().unwrap_or_default().into());
            setfsuid(intent.proxy_uids.first().copied().unwrap_or_default().into());
            Servers::start(Place::Web, &proxy_ports, &proxy_ports)
        };
        servers.push(web.run(proxy));
        // The others have no proxy, but the same ports.
        for (ns, place) in &places[1..] {
            servers.push(ns.run(|| Servers::start(*place, &proxy_ports, &proxy_ports)));
        }
        Self { web, far, guest, _servers: servers, next_port: AtomicU16::new(20000) }
    }

    /// Loads a peer's rules, IPv4 and IPv6, and gives it what peers set up beside their rules.
    pub(crate) fn load(&self, restore: Restore, v4: &str, v6: &str) {
        batch(&self.web, &["-6"], "addr add ::6/128 dev lo nodad\n");
        for (family, rules) in [("", v4), ("6", v6)] {
            let program = format!("ip{family}tables-{}-restore", restore.name());
            self.web.run(|| feed(&mut Command::new(&program), rules));
        }
    }

    /// The peers' policy route for TPROXY: what has this mark is local.
    pub(crate) fn route_mark(&self, mark: u32, table: u32) {
        for family in ["-4", "-6"] {
            let any = if family == "-4" { "0.0.0.0/0" } else { "::/0" };
            let commands = format!(
                "rule add fwmark {mark} lookup {table}\nroute add local {any} dev lo table {table}\n"
            );
            batch(&self.web, &[family], &commands);
        }
    }

    /// Puts Ursa's redirect in place.
    pub(crate) fn apply(&self, plan: &Plan, backend: Backend) -> Result<(), ursa_init::Error> {
        self.web.run(|| ursa_init::apply_with(plan, backend)).map(|_| ())
    }

    /// Runs `f` in the workload's namespace.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.web.run(f)
    }

    /// Fires all probes; where each landed, in the same order.
    pub(crate) fn fire(&self, probes: &[Probe]) -> Vec<Landed> {
        const THREADS: usize = 4;
        let mut landed = vec![Landed::Lost; probes.len()];
        for (place, ns) in [(Place::Web, &self.web), (Place::Far, &self.far), (Place::Guest, &self.guest)] {
            let from = |probe: &Probe| match probe.origin {
                Origin::Web { .. } => Place::Web,
                Origin::Far => Place::Far,
                Origin::Guest(_) => Place::Guest,
            };
            let mine: Vec<usize> = (0..probes.len()).filter(|i| from(&probes[*i]) == place).collect();
            let next = AtomicUsize::new(0);
            let results: Vec<(usize, Landed)> = thread::scope(|scope| {
                let work = || ns.run(|| self.work(probes, &mine, &next));
                let threads: Vec<_> = (0..THREADS.min(mine.len())).map(|_| scope.spawn(work)).collect();
                threads.into_iter().flat_map(|thread| thread.join().expect("a probe doesn't panic")).collect()
            });
            for (i, result) in results {
                landed[i] = result;
            }
        }
        landed
    }

    fn work(&self, probes: &[Probe], mine: &[usize], next: &AtomicUsize) -> Vec<(usize, Landed)> {
        let mut results = Vec::new();
        while let Some(i) = mine.get(next.fetch_add(1, Ordering::Relaxed)) {
            let probe = &probes[*i];
            if let Origin::Web { uid, gid } = probe.origin {
                // Only this thread's: the kernel matches who made the socket. The group first: it needs the right.
                setfsgid(gid.into());
                setfsuid(uid.into());
            }
            results.push((*i, probe.fire(|| self.next_port.fetch_add(1, Ordering::Relaxed))));
        }
        results
    }
}

/// Before there are links: addresses are usable at once, and nobody is called a martian.
fn prepare() {
    for (key, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/ip_nonlocal_bind", "1"),
        ("ipv6/ip_nonlocal_bind", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv4/icmp_ratelimit", "0"),
        ("ipv6/icmp/ratelimit", "0"),
    ] {
        let path = format!("/proc/sys/net/{key}");
        std::fs::write(&path, value).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

fn configure_web(web: &Namespace) {
    let mut v4 =
        "link set eth0 up\naddr add 10.77.0.1/24 dev eth0\nroute add default via 10.77.0.2\n".to_owned();
    let mut v6 = "addr add 2001:db8:77::1/64 dev eth0 nodad\naddr add fe80::1/64 dev eth0 nodad\n\
                  route add default via 2001:db8:77::2\n"
        .to_owned();
    for guests in GUESTS {
        let [link4, link6] = guests.link(guests.own(), guests.guest());
        v4 += &link4;
        v6 += &link6;
    }
    batch(web, &[], &v4);
    batch(web, &["-6"], &v6);
}

/// Whatever arrives here is meant for here, and whatever is sent from here goes to the workload.
fn configure_far(far: &Namespace) {
    batch(
        far,
        &[],
        "link set lo up\nlink set eth0 up\naddr add 10.77.0.2/24 dev eth0\nroute add default via 10.77.0.1\n\
         rule add pref 10 iif eth0 lookup local\nrule add pref 20 lookup main\nrule add pref 30 lookup local\n\
         rule del pref 0\nroute add local 0.0.0.0/0 dev lo table local\n",
    );
    batch(
        far,
        &["-6"],
        "addr add 2001:db8:77::2/64 dev eth0 nodad\naddr add fe80::2/64 dev eth0 nodad\n\
         route add default via 2001:db8:77::1\nrule add pref 10 iif eth0 lookup 100\n\
         route add local default dev lo table 100\n",
    );
}

/// Each interface has a way of its own to the workload.
fn configure_guest(guest: &Namespace) {
    let (mut v4, mut v6) = ("link set lo up\n".to_owned(), String::new());
    for (i, guests) in GUESTS.into_iter().enumerate() {
        let Guests { interface, .. } = guests;
        let [link4, link6] = guests.link(guests.guest(), guests.own());
        let table = 100 + i;
        for (commands, link, own) in [(&mut v4, link4, guests.own()[0]), (&mut v6, link6, guests.own()[1])] {
            *commands += &link;
            commands.extend([format!("rule add oif {interface} lookup {table}\n")]);
            commands.extend([format!("route add {own} dev {interface} table {table}\n")]);
            commands.extend([format!("route add default via {own} dev {interface} table {table}\n")]);
            if i == 0 {
                commands.extend([format!("route add default via {own} dev {interface}\n")]);
            }
        }
    }
    batch(guest, &[], &v4);
    batch(guest, &["-6"], &v6);
}

/// Many `ip` commands in one process.
fn batch(ns: &Namespace, args: &[&str], commands: &str) {
    ns.run(|| feed(Command::new("ip").args(args).args(["-batch", "-"]), commands));
}

fn feed(command: &mut Command, text: &str) {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        piped.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}; scripts/need-tools.sh installs it"));
    // Dropped when written, so that the program sees the end.
    let written = child.stdin.take().expect("stdin is piped").write_all(text.as_bytes());
    let output = child.wait_with_output().expect("the program ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && written.is_ok(), "{command:?}: {said}\n{text}");
}
