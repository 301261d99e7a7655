//! Rules come back, whoever takes them away.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use ursa_init::nft;

use crate::lab::{APP, Namespace, PATIENCE};
use crate::tool::{init, init_in, inside, ok, run};

/// The redirect must be back within this time: the promise.
const BACK: Duration = Duration::from_secs(1);

struct Watcher {
    child: Child,
    lines: Receiver<String>,
    folder: tempfile::TempDir,
}

impl Watcher {
    /// Started, and the redirect in place.
    fn start(ns: &Namespace, document: &str) -> Self {
        Self::start_with(ns, document, "auto")
    }

    fn start_with(ns: &Namespace, document: &str, backend: &str) -> Self {
        let mut command = init_in(ns, &["watch"]);
        command.args(["--backend", backend]);
        Self::launch(ns, command, document)
    }

    /// On a machine whose own namespace this is: there, the program is the first process.
    fn start_on_host(host: &Namespace, document: &str) -> Self {
        let mut command = as_first_process();
        command.args(["watch", "--host"]);
        Self::launch(host, command, document)
    }

    fn launch(ns: &Namespace, command: Command, document: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("redirect.yaml"), document).unwrap();
        let (child, lines) = Self::spawn(ns, command, folder.path());
        Self { child, lines, folder }
    }

    fn spawn(ns: &Namespace, mut command: Command, folder: &std::path::Path) -> (Child, Receiver<String>) {
        let _ = std::fs::remove_file(folder.join("notify"));
        let manager = UnixDatagram::bind(folder.join("notify")).unwrap();
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        command
            .arg("--config")
            .arg(folder.join("redirect.yaml"))
            .arg("--status")
            .arg(folder.join("status.json"))
            .arg("--run-dir")
            .arg(folder)
            .env("NOTIFY_SOCKET", folder.join("notify"))
            .stderr(Stdio::piped());
        let mut child = ns.run(|| command.spawn()).unwrap();
        let (tell, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let mut told = [0; 256];
        let length = manager.recv(&mut told).expect("READY within the deadline");
        assert!(told[..length].starts_with(b"READY=1\n"));
        (child, lines)
    }

    /// Killed, and another one with the same folders.
    fn restart(&mut self, ns: &Namespace, parts: &std::path::Path) {
        let mut command = init_in(ns, &["watch", "--config", "/nonexistent/redirect.yaml"]);
        command.arg("--config-dir").arg(parts);
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        (self.child, self.lines) = Self::spawn(ns, command, self.folder.path());
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.folder.path().join("status.json")).unwrap()).unwrap()
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("redirect.yaml")
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Waits for a message that holds the words.
    fn says(&self, words: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("never said `{words}`"));
            if line.contains(words) {
                return line;
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `ursa-init` as the first process of a machine: the namespace that it runs in is that machine's own.
fn as_first_process() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    let init = init();
    command.arg(init.get_program());
    for (name, _) in init.get_envs() {
        command.env_remove(name);
    }
    command
}

/// How long it takes until nothing differs any more.
fn until_back(ns: &Namespace, config: &PathBuf) -> Duration {
    let start = Instant::now();
    let intent: ursa_init::RedirectIntent =
        ursa_init::yaml::from_str(&std::fs::read_to_string(config).unwrap()).unwrap();
    let plan = ursa_init::Plan::compile(&intent).unwrap();
    ns.run(|| {
        while start.elapsed() < 4 * PATIENCE {
            if ursa_init::diff(&plan).is_ok_and(|differences| differences.is_empty()) {
                return start.elapsed();
            }
        }
        panic!("the redirect never came back: {:?}", ursa_init::diff(&plan));
    })
}

#[test]
fn rules_come_back_within_a_second() {
    let (web, _stranger) = Namespace::pair();
    web.listen(&[15001]);
    let watcher = Watcher::start(&web, "proxyUids: [5678]");
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    let mut times = Vec::new();
    let mut gone = |what: &str, program: &str, args: &[&str], input: &str| {
        let done = inside(&web, program, args, input);
        assert_eq!(done.code, 0, "{what}: {}", done.err);
        let start = Instant::now();
        watcher.says("back after");
        until_back(&web, &watcher.config());
        times.push((start.elapsed(), what.to_owned()));
    };
    gone("flush", "nft", &["flush", "ruleset"], "");
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    // As a firewall's reload does: everything away and its own rules in, in one transaction.
    let reload = "flush ruleset\ntable inet firewalld { chain x { type filter hook input priority 10; }; }\n";
    gone("reload", "nft", &["-f", "-"], reload);
    gone("one rule", "nft", &["flush", "chain", "inet", "ursa", "output"], "");
    gone("a foreign rule", "nft", &["insert", "rule", "inet", "ursa", "output", "return"], "");
    gone("a route", "ip", &["route", "del", "local", "241.0.0.0/8", "dev", "lo", "table", "local"], "");
    gone("an address", "ip", &["addr", "del", "::6/128", "dev", "lo"], "");
    // Many run on this machine; who looked only every now and then would miss it even at best.
    times.sort();
    eprintln!("the redirect was back after, from when the other program had ended: {times:?}");
    assert!(times[times.len() / 2].0 < BACK, "{times:?}");
    assert!(inside(&web, "nft", &["list", "tables"], "").out.contains("firewalld"), "others' rules stay");
    let last = watcher.status();
    assert_eq!(last["state"], "inPlace");
    assert!(last["repairs"].as_u64().unwrap() >= 5, "{last}");
}

/// What programs do to a host's rules, as they do it: what it is, the program, its arguments, its input.
type Harm = (&'static str, &'static str, &'static [&'static str], &'static str);

const HARMS: [Harm; 7] = [
    ("flush", "nft", &["flush", "ruleset"], ""),
    (
        "reload",
        "nft",
        &["-f", "-"],
        "flush ruleset\ntable inet firewalld { chain x { type filter hook input priority 10; }; }\n",
    ),
    ("flush again", "nft", &["flush", "ruleset"], ""),
    ("table", "nft", &["delete", "table", "inet", "ursa"], ""),
    ("chain", "nft", &["flush", "chain", "inet", "ursa", "output"], ""),
    ("route", "ip", &["route", "del", "local", "241.0.0.0/8", "dev", "lo", "table", "local"], ""),
    ("address", "ip", &["addr", "del", "::6/128", "dev", "lo"], ""),
];

#[test]
fn a_hosts_redirect_comes_back_within_a_second_each_time() {
    // As many hosts as keep each below what counts as a fight.
    let documents = [
        "proxyUids: [5678]",
        "proxyUids: [5678]\ninbound: {includePorts: ['20-9000']}\n",
        "workloads:\n- {name: web, uids: [1000], proxyUids: [5678], inbound: {includePorts: [22, 8080]}}\n",
    ];
    let mut times = Vec::new();
    for document in documents {
        let (host, stranger) = Namespace::pair();
        host.listen(&[22, 15001, 15006]);
        let mut refused = as_first_process();
        refused.args(["watch", "--config", "/dev/null"]);
        let refused = host.run(|| run(&mut refused));
        assert!(refused.code == 1 && refused.err.contains("the machine's own"), "{}", refused.err);

        let watcher = Watcher::start_on_host(&host, document);
        // The sshd's port is not in the document, but in what is in place.
        let wanted = host.run(nft::read_back).unwrap().unwrap();
        for (what, program, args, input) in HARMS {
            let done = inside(&host, program, args, input);
            let start = Instant::now();
            assert_eq!(done.code, 0, "{what}: {}", done.err);
            watcher.says("back after");
            let took = start.elapsed();
            assert!(took < BACK, "{what}: back after {took:?}, {document}");
            assert!(host.run(nft::read_back).unwrap().unwrap().same_as(&wanted), "{what}");
            assert!(
                host.network().contains("local 241.0.0.0/8") && host.network().contains("::6/128"),
                "{what}"
            );
            times.push((took, what));
        }
        assert_eq!(host.tcp(APP, "10.77.0.2:80"), Ok(15001));
        assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(15006));
        assert_eq!(stranger.tcp(APP, "10.77.0.1:22"), Ok(22), "the way in, {document}");
        let status = watcher.status();
        assert_eq!(
            (&status["state"], &status["repairs"]),
            (&"inPlace".into(), &HARMS.len().into()),
            "{status}"
        );
    }
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    eprintln!("{} repairs of a host: p50 {:?}, p90 {:?}, longest {:?}", times.len(), at(50), at(90), at(100));
}

#[test]
fn who_changes_rules_is_named_and_a_fight_has_pauses() {
    let web = Namespace::new();
    let watcher = Watcher::start(&web, "proxyUids: [5678]");
    let flush = || inside(&web, "nft", &["flush", "ruleset"], "");
    flush();
    let line = watcher.says("changed");
    assert!(line.contains("nft (pid "), "{line}");
    let deadline = Instant::now() + Duration::from_secs(20);
    while watcher.status()["state"] != "fighting" {
        assert!(Instant::now() < deadline, "{}", watcher.status());
        until_back(&web, &watcher.config());
        flush();
    }
    let status = watcher.status();
    assert!(status["message"].as_str().unwrap().contains("nft (pid "), "{status}");
    // The fight goes on, but no longer at full speed.
    let (start, before) = (Instant::now(), status["repairs"].as_u64().unwrap());
    while start.elapsed() < Duration::from_secs(2) {
        flush();
    }
    let repairs = watcher.status()["repairs"].as_u64().unwrap() - before;
    assert!(repairs <= 3, "{repairs} repairs in 2 s");
}

#[test]
fn sighup_reads_again_and_sigterm_leaves_the_rules() {
    let web = Namespace::new();
    let mut watcher = Watcher::start(&web, "proxyUids: [5678]");
    std::fs::write(watcher.config(), "proxyUids: [5678]\noutbound: {port: 15101}\n").unwrap();
    watcher.signal(Signal::SIGHUP);
    watcher.says("read again");
    assert!(ok(&mut init_in(&web, &["show"])).contains("15101"));
    // A mistake changes nothing.
    let mut file = std::fs::OpenOptions::new().append(true).open(watcher.config()).unwrap();
    file.write_all(b"outbond: {}\n").unwrap();
    watcher.signal(Signal::SIGHUP);
    assert!(watcher.says("isn't taken").contains("outbond"));
    watcher.signal(Signal::SIGTERM);
    assert!(watcher.child.wait().unwrap().success());
    assert_eq!(watcher.status()["state"], "stopped");
    assert!(web.run(nft::read_back).unwrap().is_some());
    assert!(ok(&mut init_in(&web, &["show"])).contains("15101"));
}

#[test]
fn what_cannot_be_repaired_is_said_and_repaired_when_it_can() {
    let web = Namespace::new();
    let watcher = Watcher::start(&web, "proxyUids: [5678]");
    // Without any address on lo the kernel takes no local routes.
    web.ip("addr flush dev lo");
    assert!(watcher.says("can't be put back").contains("route local 241.0.0.0/8"));
    assert_eq!(watcher.status()["state"], "failing");
    web.ip("addr add 127.0.0.1/8 dev lo");
    web.ip("addr add ::1/128 dev lo");
    until_back(&web, &watcher.config());
    let deadline = Instant::now() + PATIENCE;
    while watcher.status()["state"] != "inPlace" {
        assert!(Instant::now() < deadline, "{}", watcher.status());
    }
}

#[test]
fn rules_of_iptables_come_back_too() {
    let cases: [(&str, &[&str], Duration); 2] = [
        ("iptables-nft", &["iptables-nft", "ip6tables-nft"], BACK),
        ("iptables-legacy", &["iptables-legacy"], 2 * BACK),
    ];
    for (backend, programs, promise) in cases {
        let (web, _stranger) = Namespace::pair();
        web.listen(&[15001]);
        let watcher = Watcher::start_with(&web, "proxyUids: [5678]", backend);
        for program in programs {
            assert_eq!(inside(&web, program, &["-t", "nat", "-F"], "").code, 0);
            let start = Instant::now();
            watcher.says("back after");
            until_back(&web, &watcher.config());
            let back = start.elapsed();
            // Programs do the work here, beside other tests.
            assert!(back < 10 * promise, "{program}: back after {back:?}");
            eprintln!("rules of {program} were back after {back:?}");
        }
        assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    }
}

#[test]
fn one_watch_at_a_time_and_a_killed_one_is_no_hindrance() {
    let web = Namespace::new();
    let mut first = Watcher::start(&web, "proxyUids: [5678]");
    let again = |run_dir: &std::path::Path| {
        let arguments = ["--proxy-uid", "5678", "--run-dir", run_dir.to_str().unwrap()];
        let mut command = init_in(&web, &["watch"]);
        command.args(arguments).stderr(Stdio::piped()).spawn().unwrap()
    };
    let refused = again(first.folder.path()).wait_with_output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success(), "{said}");
    assert!(said.contains(&format!("(pid {})", first.child.id())), "{said}");
    first.signal(Signal::SIGKILL);
    first.child.wait().unwrap();
    let mut second = again(first.folder.path());
    let first_line = BufReader::new(second.stderr.take().unwrap()).lines().next().unwrap().unwrap();
    second.kill().unwrap();
    second.wait().unwrap();
    assert!(first_line.contains("in place and watched"), "{first_line}");
}

/// As on a machine whose services join and leave, one file each.
#[test]
fn workloads_come_and_go_as_files() {
    let (web, _stranger) = Namespace::pair();
    let parts = tempfile::tempdir().unwrap();
    let part = |uid: u32, port: u16| {
        format!(
            "uids: [{uid}]\nproxyUids: [{}]\ninbound: {{port: {port}, includePorts: [{}]}}\noutbound: {{port: {}}}\n\
             dns: {{port: {}}}\n",
            uid + 1000,
            port - 7000,
            port + 1,
            port + 2
        )
    };
    let put = |name: &str, text: &str| std::fs::write(parts.path().join(name), text).unwrap();
    let rules = || inside(&web, "nft", &["list", "ruleset"], "").out;
    let launch = || {
        let mut command = init_in(&web, &["watch", "--config", "/nonexistent/redirect.yaml"]);
        command.arg("--config-dir").arg(parts.path());
        Watcher::launch(&web, command, "# nothing for everybody\n")
    };

    // Nobody has joined: it waits, and nothing is redirected.
    let watcher = launch();
    watcher.says("nothing here is redirected yet");
    assert_eq!(rules(), "");

    web.listen(&[15101]);
    put("web.yaml", &part(APP, 15100));
    watcher.signal(Signal::SIGHUP);
    watcher.says("read again; the redirect is in place");
    assert_eq!(watcher.status()["workloads"], serde_json::json!(["web"]));
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15101));

    // Mistakes while it runs cost nobody but who is new.
    let before = rules();
    put("bad.yaml", "uids: 7\n");
    watcher.signal(Signal::SIGHUP);
    let said = watcher.says("it isn't redirected");
    assert!(said.contains("bad.yaml"), "{said}");
    assert_eq!(rules(), before);
    put("web.yaml", "uids: [\n");
    watcher.signal(Signal::SIGHUP);
    let said = watcher.says("stays redirected");
    assert!(said.contains("web.yaml"), "{said}");
    assert_eq!(rules(), before);

    // Nor over a restart: who was redirected stays so.
    let mut watcher = watcher;
    watcher.restart(&web, parts.path());
    watcher.says("stays redirected");
    let status = watcher.status();
    assert_eq!(status["workloads"], serde_json::json!(["web"]));
    assert!(status["leftOut"].to_string().contains("bad.yaml"), "{status}");
    assert_eq!(rules(), before);
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15101));

    // The last one leaves.
    for name in ["bad.yaml", "web.yaml"] {
        std::fs::remove_file(parts.path().join(name)).unwrap();
    }
    watcher.signal(Signal::SIGHUP);
    watcher.says("read again; nothing here is redirected yet");
    assert_eq!(rules(), "");
    // What is put there by others is none of its business.
    let foreign = inside(
        &web,
        "nft",
        &["-f", "-"],
        "table inet theirs { chain x { type filter hook input priority 10; }; }\n",
    );
    assert_eq!(foreign.code, 0, "{}", foreign.err);
    watcher.signal(Signal::SIGHUP);
    watcher.says("read again");
    assert!(rules().contains("theirs"));
}
