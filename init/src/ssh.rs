//! The operator's way in: the ports that this machine's SSH server really listens on, and how they are left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::intent::{Inbound, Ports, RedirectIntent};

/// Where no server and no configuration is found.
const DEFAULT: u16 = 22;
const CONFIG: &str = "/etc/ssh/sshd_config";
/// systemd's sockets, which it holds until somebody connects.
const SOCKET_UNITS: &[&str] = &["ssh.socket", "sshd.socket"];
/// Where their files are, the first wins. The generator's are Ubuntu's, which turns sshd's configuration into them.
const UNITS: &[&str] = &[
    "etc/systemd/system",
    "run/systemd/system",
    "run/systemd/generator",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];
/// Programs that serve SSH, as the kernel names their processes (`sshd-session` holds a connection since OpenSSH 9.8).
const SERVERS: &[&str] = &["sshd", "sshd-session", "sshd-auth", "dropbear"];
/// The kernel's tables of TCP sockets.
const TABLES: &[&str] = &["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
/// States in them.
const ESTABLISHED: &str = "01";
const LISTEN: &str = "0A";

/// The ports of the SSH server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// At least one.
    pub ports: BTreeSet<u16>,
    /// How they were found, for the operator.
    pub evidence: String,
}

/// Finds the ports of the SSH server in the calling thread's network namespace: those of its sockets, else those of
/// its configuration, else 22; and always those that systemd holds for it, and that of the session in which this
/// program runs.
pub fn ports() -> Found {
    let inodes = sockets_of(SERVERS);
    let open: BTreeSet<_> = TABLES
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .flat_map(|table| table_ports(&table, &inodes))
        .collect();
    let held: BTreeSet<_> = SOCKET_UNITS.iter().flat_map(|unit| activated(Path::new("/"), unit)).collect();
    let (mut ports, mut evidence) = if open.is_empty() {
        let configured = configured(Path::new(CONFIG), 0);
        if configured.is_empty() && held.is_empty() {
            (BTreeSet::from([DEFAULT]), "no sshd found: its default port".to_owned())
        } else {
            (configured, format!("{CONFIG} and the units of its sockets"))
        }
    } else {
        (open, "sockets of sshd".to_owned())
    };
    if held.difference(&ports).next().is_some() {
        ports.extend(held);
        evidence.push_str(", its socket units");
    }
    if let Some(port) = std::env::var("SSH_CONNECTION").ok().as_deref().and_then(session_port)
        && ports.insert(port)
    {
        evidence.push_str(", SSH_CONNECTION");
    }
    Found { ports, evidence }
}

/// Which ports are listened on in the calling thread's network namespace, with the sockets' numbers: what must change
/// before [`ports`] can. Reads no more than the beginning of the kernel's tables, where it lists those that listen.
pub fn listening() -> BTreeSet<(u16, u64)> {
    let files = TABLES.iter().filter_map(|path| std::fs::File::open(path).ok());
    files.flat_map(|file| listeners(BufReader::new(file))).collect()
}

fn listeners(table: impl BufRead) -> Vec<(u16, u64)> {
    let listener = |line: String| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let port = u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()?;
        (*fields.get(3)? == LISTEN).then_some((port, fields.get(9)?.parse().ok()?))
    };
    table.lines().skip(1).map_while(Result::ok).map_while(listener).collect()
}

/// Leaves the ports alone when they arrive, in whichever way the intent chooses ports.
pub fn keep(intent: &mut RedirectIntent, ports: &BTreeSet<u16>) {
    // With several workloads nobody else's ports are captured, and nothing may be said about them.
    let alone = intent.workloads.is_empty().then_some(&mut intent.inbound);
    let inbounds = alone.into_iter().chain(intent.workloads.iter_mut().map(|w| &mut w.inbound));
    for inbound in inbounds {
        for port in ports {
            keep_one(inbound, *port);
        }
    }
}

fn keep_one(inbound: &mut Inbound, port: u16) {
    if inbound.include_ports.is_empty() {
        if inbound.enabled && !inbound.exclude_ports.iter().any(|excluded| excluded.contains(port)) {
            inbound.exclude_ports.push(Ports::one(port));
        }
        return;
    }
    let without = |ports: &Ports| {
        let below =
            (ports.first < port).then(|| Ports { first: ports.first, last: ports.last.min(port - 1) });
        let above = (ports.last > port).then(|| Ports { first: ports.first.max(port + 1), last: ports.last });
        if ports.contains(port) { [below, above] } else { [Some(*ports), None] }
    };
    inbound.include_ports = inbound.include_ports.iter().flat_map(without).flatten().collect();
    if inbound.include_ports.is_empty() {
        // An empty list would mean every port.
        inbound.enabled = false;
    }
}

/// The numbers of the sockets that root's processes of these names hold open. Those of a session run as its user, who
/// may listen on any port with `ssh -R`, and must not open it so.
fn sockets_of(names: &[&str]) -> BTreeSet<u64> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return BTreeSet::new() };
    let named = |process: &std::fs::DirEntry| {
        let comm = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        names.contains(&comm.trim_end()) && process.metadata().is_ok_and(|process| process.uid() == 0)
    };
    let files = processes.flatten().filter(named).filter_map(|p| std::fs::read_dir(p.path().join("fd")).ok());
    let links = files.flatten().flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
    links
        .filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok())
        .collect()
}

/// The local ports of sockets with these numbers that listen or are connected.
fn table_ports(table: &str, inodes: &BTreeSet<u64>) -> BTreeSet<u16> {
    let port = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let inode: u64 = fields.get(9)?.parse().ok()?;
        let state = *fields.get(3)?;
        if !inodes.contains(&inode) || ![ESTABLISHED, LISTEN].contains(&state) {
            return None;
        }
        u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()
    };
    table.lines().skip(1).filter_map(port).collect()
}

/// The local port in `SSH_CONNECTION` (client address and port, server address and port).
fn session_port(connection: &str) -> Option<u16> {
    connection.split_whitespace().nth(3)?.parse().ok()
}

/// The ports of a socket unit that is switched on, in its file and what is dropped in beside it, below a root folder.
fn activated(root: &Path, unit: &str) -> Vec<u16> {
    let enabled = root.join("etc/systemd/system/sockets.target.wants").join(unit);
    if std::fs::symlink_metadata(enabled).is_err() {
        return Vec::new();
    }
    let folders = UNITS.iter().map(|folder| root.join(folder));
    let file = folders.clone().map(|folder| folder.join(unit)).find(|file| file.is_file());
    // By name, wherever they are; of two with one name the first wins.
    let mut dropped = BTreeMap::new();
    for folder in folders {
        let files = std::fs::read_dir(folder.join(format!("{unit}.d"))).into_iter().flatten().flatten();
        for file in files.filter(|file| file.path().extension().is_some_and(|end| end == "conf")) {
            dropped.entry(file.file_name()).or_insert_with(|| file.path());
        }
    }
    let mut ports = Vec::new();
    for file in file.into_iter().chain(dropped.into_values()) {
        listen_streams(&std::fs::read_to_string(file).unwrap_or_default(), &mut ports);
    }
    ports
}

/// The ports of `ListenStream=`: a port, or an address with one. Without a value it takes back what was said before.
fn listen_streams(text: &str, ports: &mut Vec<u16>) {
    for value in text.lines().filter_map(|line| line.trim().strip_prefix("ListenStream=")) {
        match value.trim() {
            "" => ports.clear(),
            value => ports.extend(value.rsplit(':').next().and_then(|port| port.parse::<u16>().ok())),
        }
    }
}

/// The ports of `Port` and `ListenAddress`, in the file and in what it includes.
fn configured(path: &Path, depth: usize) -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    let Ok(text) = std::fs::read_to_string(path) else { return ports };
    for line in text.lines() {
        let mut words = line.split(|c: char| c.is_whitespace() || c == '=').filter(|w| !w.is_empty());
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        match key.to_ascii_lowercase().as_str() {
            "port" => ports.extend(value.parse::<u16>()),
            "listenaddress" => ports.extend(address_port(value)),
            // sshd's own limit is 16.
            "include" if depth < 4 => {
                for file in included(path, value) {
                    ports.extend(configured(&file, depth + 1));
                }
            }
            _ => {}
        }
    }
    ports
}

/// Files that an `Include` names; of patterns only `*` in the last part, as every distribution writes it.
fn included(from: &Path, pattern: &str) -> Vec<std::path::PathBuf> {
    let pattern = from.parent().unwrap_or(Path::new("/")).join(pattern);
    let (Some(folder), Some(name)) = (pattern.parent(), pattern.file_name().and_then(|n| n.to_str())) else {
        return Vec::new();
    };
    let Some((before, after)) = name.split_once('*') else { return vec![pattern] };
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let matches = |path: &std::path::PathBuf| {
        path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(before) && n.ends_with(after))
    };
    entries.flatten().map(|entry| entry.path()).filter(matches).collect()
}

/// `host:port` or `[address]:port`; an address alone listens on `Port`.
fn address_port(value: &str) -> Option<u16> {
    if let Some(rest) = value.strip_prefix('[') {
        return rest.split_once("]:")?.1.parse().ok();
    }
    let (host, port) = value.rsplit_once(':')?;
    if host.contains(':') { None } else { port.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(texts: &[&str]) -> Vec<Ports> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn systemd_may_hold_the_socket() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("usr/lib/systemd/system/ssh.socket", "[Socket]\nListenStream=22\nAccept=no\n");
        assert!(activated(root.path(), "ssh.socket").is_empty(), "it isn't switched on");
        put("etc/systemd/system/sockets.target.wants/ssh.socket", "");
        assert_eq!(activated(root.path(), "ssh.socket"), [22]);
        // What sshd's configuration says, as Ubuntu writes it; and somebody's own.
        let generated = "[Socket]\nListenStream=\nListenStream=0.0.0.0:2222\n ListenStream=[::]:2222\n";
        put("run/systemd/generator/ssh.socket.d/addresses.conf", generated);
        put("etc/systemd/system/ssh.socket.d/more.conf", "[Socket]\nListenStream=2223\n");
        put("etc/systemd/system/ssh.socket.d/more.conf.old", "[Socket]\nListenStream=9\n");
        assert_eq!(activated(root.path(), "ssh.socket"), [2222, 2222, 2223]);
        // A whole unit of somebody's own takes the place of the distribution's, and what is dropped in counts.
        put("etc/systemd/system/ssh.socket", "[Socket]\nListenStream=2224\n");
        put("etc/systemd/system/ssh.socket.d/addresses.conf", "");
        assert_eq!(activated(root.path(), "ssh.socket"), [2224, 2223]);
    }

    #[test]
    fn the_kernel_lists_those_that_listen_first() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let _connection = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert!(listening().iter().any(|(listens, _)| *listens == port));
        let whole = std::fs::read_to_string(TABLES[0]).unwrap();
        let states: Vec<_> = whole.lines().skip(1).filter_map(|l| l.split_whitespace().nth(3)).collect();
        assert!(states.is_sorted_by_key(|state| *state != LISTEN), "{whole}");
    }

    #[test]
    fn included_ports_are_split_around_the_way_in() {
        for (include, left, enabled) in [
            (&["22"][..], &[][..], false),
            (&["22", "80"], &["80"], true),
            (&["20-30"], &["20-21", "23-30"], true),
            (&["22-30"], &["23-30"], true),
            (&["1-22"], &["1-21"], true),
            (&["1-65535"], &["1-21", "23-65535"], true),
        ] {
            let mut intent = RedirectIntent::default();
            intent.inbound.include_ports = ports(include);
            keep(&mut intent, &BTreeSet::from([22]));
            assert_eq!(
                (intent.inbound.include_ports, intent.inbound.enabled),
                (ports(left), enabled),
                "{include:?}"
            );
        }
        let mut intent = RedirectIntent::default();
        intent.inbound.exclude_ports = ports(&["20-25"]);
        keep(&mut intent, &BTreeSet::from([22, 2222]));
        assert_eq!(intent.inbound.exclude_ports, ports(&["20-25", "2222"]));

        // Several workloads have ports of their own, and nothing is said for all.
        let web = Inbound { include_ports: ports(&["22", "80"]), ..Inbound::default() };
        let web = crate::intent::Workload { inbound: web, ..Default::default() };
        let mut intent = RedirectIntent { workloads: vec![web], ..RedirectIntent::default() };
        keep(&mut intent, &BTreeSet::from([22]));
        assert_eq!(intent.workloads[0].inbound.include_ports, ports(&["80"]));
        assert_eq!(intent.inbound, Inbound::default());
    }

    #[test]
    fn the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             0: 00000000:08AE 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 x\n\
             1: 0100007F:0016 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 112 1 x\n\
             2: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 113 1 x\n\
             3: 0100007F:0051 0100007F:9999 06 00000000:00000000 00:00000000 00000000     0        0 114 1 x\n";
        assert_eq!(table_ports(table, &BTreeSet::from([111, 112, 114])), BTreeSet::from([2222, 22]));
    }

    #[test]
    fn sshds_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("sshd_config");
        std::fs::create_dir(folder.path().join("d")).unwrap();
        std::fs::write(
            folder.path().join("d/10.conf"),
            "ListenAddress [fd00::1]:2022\nListenAddress 10.0.0.1:2023\n",
        )
        .unwrap();
        std::fs::write(
            &main,
            "# Port 1\nInclude d/*.conf\nPort=2222\nListenAddress fd00::1\nListenAddress 0.0.0.0\n",
        )
        .unwrap();
        assert_eq!(configured(&main, 0), BTreeSet::from([2022, 2023, 2222]));
        assert!(configured(Path::new("/nowhere"), 0).is_empty());
        assert_eq!(session_port("10.0.0.9 50000 10.0.0.1 2222"), Some(2222));
    }
}
