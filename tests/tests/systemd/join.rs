//! `ursa up`, `ursa join`, `ursa leave` and `ursa doctor` on machines with nothing but the packages: a control plane, and a
//! machine with services of each kind.

use std::time::{Duration, Instant};

use ursa_tests::lab::packages::{Format, Packages};
use ursa_tests::lab::program::Client;
use ursa_tests::lab::vm::exec::Output;
use ursa_tests::lab::vm::{APP, ENVOY, Vm};
use ursa_tests::lab::{Lab, Programs, wait};

const SOON: Duration = Duration::from_secs(60);
const NAMES: [&str; 3] = ["ursa", "ursa-agent", "ursa-control"];

/// A control plane that `ursa up` has started, its first ticket, and a machine with services.
struct Town {
    control: Vm,
    vm: Vm,
    ticket: String,
    _lab: Lab,
}

/// A server that needs no rights. Whoever says nothing keeps it waiting.
const SERVER: &str = "#!/usr/bin/python3
import socket, sys
server = socket.create_server((\"\", int(sys.argv[1])))
while True:
    client, _ = server.accept()
    try:
        client.recv(4096)
        client.sendall(b\"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\nconnection: close\\r\\n\\r\\nok\")
    except OSError:
        pass
    client.close()
";

fn unit(port: u16, user: &str) -> String {
    format!(
        "[Service]\nExecStart=/usr/local/bin/server {port}\n{user}[Install]\nWantedBy=multi-user.target\n"
    )
}

impl Town {
    fn new() -> Self {
        let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
        let packages = Packages::build(&lab, Format::Deb, "0.1.0", &NAMES).unwrap();
        let mut control = Vm::new(&mut lab, "control").unwrap();
        let mut vm = Vm::new(&mut lab, "town").unwrap();
        for one in [&control, &vm] {
            packages.install(one).unwrap();
        }
        // As the package ursa-envoy has it, without its 100 MB.
        vm.sh(&format!("mkdir -p /usr/lib/ursa; ln -s {ENVOY} /usr/lib/ursa/envoy")).unwrap();
        vm.sh(&format!("echo '{} control' >>/etc/hosts", control.host.v4)).unwrap();
        vm.write_as("/usr/local/bin/server", "root", 0o755, SERVER.as_bytes()).unwrap();
        vm.write("/etc/sysusers.d/services.conf", "u web 2001\nu api 2002\n").unwrap();
        for (name, port, user) in
            [("web", 8080, "User=web\n"), ("api", 9090, "User=api\n"), ("top", 7070, "")]
        {
            vm.write(&format!("/etc/systemd/system/{name}.service"), &unit(port, user)).unwrap();
        }
        std::thread::scope(|scope| {
            scope.spawn(|| control.boot().unwrap());
            scope.spawn(|| vm.boot().unwrap());
        });
        vm.sh("systemctl enable --now web.service api.service top.service").unwrap();
        for port in [8080, 9090, 7070] {
            let target = format!("127.0.0.1:{port}");
            wait::until("a service to serve", SOON, || {
                match vm.run(&["ursa-agent", "self-test-call", "--http", &target]).unwrap() {
                    done if done.ok() => Ok(()),
                    done => Err(done.brief()),
                }
            })
            .unwrap();
        }
        let up = control.run(&["ursa", "up"]).unwrap();
        assert!(up.ok(), "{}", up.brief());
        println!("# ursa up\n{}", up.stdout);
        let words: Vec<_> = up.stdout.split_whitespace().collect();
        let ticket = words.iter().find(|word| word.starts_with("ursa1.")).unwrap();
        assert!(
            up.stdout.contains(&format!("ursa join {ticket} --unit NAME.service --port PORT")),
            "{}",
            up.stdout
        );
        Self { ticket: (*ticket).to_owned(), control, vm, _lab: lab }
    }

    fn ursa(&self, args: &[&str]) -> Output {
        let output = self.vm.run(&[&["ursa"], args].concat()).unwrap();
        println!(
            "# ursa {}\n{}{}",
            args.join(" ").replace(&self.ticket, "TICKET"),
            output.stdout,
            output.stderr
        );
        output
    }

    fn join(&self, unit: &str, port: &str, more: &[&str]) -> Output {
        let output = self.ursa(&[&["join", &self.ticket, "--unit", unit, "--port", port], more].concat());
        assert!(output.ok(), "{}\n{}", output.brief(), self.trouble());
        output
    }

    fn trouble(&self) -> String {
        let said =
            self.vm.run(&["sh", "-c", "ursa-agent status; systemctl --no-pager status 'ursa-*' | tail -80"]);
        said.map(|said| said.stdout).unwrap_or_default()
    }

    /// Everything that join could leave: files with their content, users, what systemd knows, rules.
    fn traces(&self) -> String {
        self.vm
            .sh(r"cd /; find etc var/lib/ursa/join usr/lib/systemd -xdev \( -path 'etc/*-' -o -name .pwd.lock \) -prune -o -print | sort
                find etc -xdev -type f ! -path 'etc/*-' ! -name .pwd.lock ! -name ld.so.cache -exec sha256sum {} + | sort -k2
                getent passwd; getent group
                systemctl list-unit-files --plain --no-legend 'ursa*'
                systemctl show web.service api.service top.service -p DropInPaths,Wants,Slice,NeedDaemonReload
                nft list ruleset; ip rule; ip route show table all | sort; ip -6 route show table all | sort")
            .unwrap()
    }

    fn pid(&self, unit: &str) -> i32 {
        self.vm.unit(unit).state().unwrap().main_pid
    }

    /// Whether somebody on another machine is served in plaintext.
    fn open_to_strangers(&self, port: u16) -> bool {
        let mut stranger = Client::spawn(self.control.command(APP).arg("client")).unwrap();
        stranger.get(&format!("http://{}:{port}/", self.vm.host.v4)).unwrap().ok()
    }
}

fn differences(before: &str, after: &str) -> Vec<String> {
    let lacks = |text: &str, sign: char, other: &str| {
        let known: std::collections::HashSet<_> = other.lines().collect();
        let all = text.lines().filter(|line| !known.contains(line));
        all.map(|line| format!("{sign} {line}")).collect::<Vec<_>>()
    };
    [lacks(before, '-', after), lacks(after, '+', before)].concat()
}

#[test]
#[ignore = "hasn't passed as a whole yet: run it with --ignored"]
fn two_commands_bring_services_of_each_kind_into_a_mesh_and_one_takes_all_back() {
    let town = Town::new();
    let before = town.traces();
    let pids = ["web.service", "api.service", "top.service"].map(|unit| town.pid(unit));

    // What would change, and nothing does.
    let dry = town.join("web.service", "8080", &["--protocol", "http", "--dry-run"]);
    for part in ["plan  redirect", "would change: /etc/ursa/redirect.d/web.yaml", "nothing was changed"] {
        assert!(dry.stdout.contains(part), "{part}: {}", dry.stdout);
    }
    assert_eq!(differences(&before, &town.traces()), Vec::<String>::new());

    // What can't be told apart is refused, and changes nothing.
    let refused = town.ursa(&["join", &town.ticket, "--unit", "top.service", "--port", "7070"]);
    assert!(!refused.ok() && refused.stderr.contains("--port 7070 --slice`"), "{}", refused.brief());
    let refused = town.ursa(&["join", "ursa1.nonsense", "--unit", "web.service", "--port", "8080"]);
    assert!(!refused.ok() && refused.stderr.contains("damaged"), "{}", refused.brief());
    assert_eq!(differences(&before, &town.traces()), Vec::<String>::new());

    let start = Instant::now();
    let joined = town.join("web.service", "8080", &["--protocol", "http"]);
    eprintln!("joined in {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(120));
    for part in [
        "ok    self-test",
        "mutual TLS both ways",
        "/workload/web",
        "is refused",
        "ursa leave --unit web.service",
    ] {
        assert!(joined.stdout.contains(part), "{part}: {}", joined.stdout);
    }
    assert!(!town.open_to_strangers(8080));
    assert!(town.open_to_strangers(9090), "a neighbour is left alone");

    let again = town.join("web.service", "8080", &["--protocol", "http"]);
    assert!(
        again.stdout.contains("nothing changed") && !again.stdout.contains("(changed"),
        "{}",
        again.stdout
    );
    let other = town.ursa(&["join", "--unit", "web.service", "--port", "8081"]);
    assert!(!other.ok() && other.stderr.contains("--port (it was 8080)"), "{}", other.brief());

    // Neighbours, without a ticket: one by its user, one by a slice, for which it is restarted.
    let joined = town.ursa(&["join", "--unit", "api", "--port", "9090", "--protocol", "http"]);
    assert!(joined.ok() && joined.stdout.contains("/workload/api"), "{}\n{}", joined.brief(), town.trouble());
    let joined = town.ursa(&["join", "--unit", "top", "--port", "7070", "--slice"]);
    assert!(joined.ok() && joined.stdout.contains("/workload/top"), "{}\n{}", joined.brief(), town.trouble());
    assert_eq!([town.pid("web.service"), town.pid("api.service")], pids[..2], "who needn't wasn't restarted");

    // By mesh name, from one service to the other, once that is allowed.
    let call = |town: &Town| {
        let done = town
            .vm
            .run_as("api", &["ursa-agent", "self-test-call", "--http", "web.svc.mesh.local:8080"])
            .unwrap();
        format!("{}{}", done.stdout, done.stderr)
    };
    assert!(call(&town).contains("403"), "{}", call(&town));
    town.control.sh("ursa allow api web").unwrap();
    wait::until("api to be served", SOON, || match call(&town) {
        answer if answer.contains("200") => Ok(()),
        answer => Err(answer),
    })
    .unwrap();
    for port in [8080, 9090, 7070] {
        assert!(!town.open_to_strangers(port), "{port}");
    }

    let fine = town.ursa(&["doctor"]);
    assert!(fine.ok(), "{}", fine.brief());
    let json = town.ursa(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["ok"], true);
    town.vm.sh("rm /etc/ursa/redirect.d/api.yaml; systemctl reload ursa-redirect.service").unwrap();
    let ill = wait::until("the doctor to see it", SOON, || match town.vm.run(&["ursa", "doctor"]).unwrap() {
        ill if ill.status == 1 && ill.stdout.contains("NOT in place") => Ok(ill),
        fine => Err(fine.brief()),
    });
    println!("{}", ill.unwrap().0.stdout);
    assert_eq!(town.ursa(&["doctor", "--nonsense"]).status, 2);
    town.ursa(&["join", "--unit", "api"]);

    // All of it goes, and the services run on.
    let now = ["web.service", "api.service", "top.service"].map(|unit| town.pid(unit));
    let dry = town.ursa(&["leave", "--all", "--dry-run"]);
    assert!(dry.ok() && dry.stdout.contains("would change"), "{}", dry.brief());
    let left = town.ursa(&["leave", "--unit", "web"]);
    assert!(left.ok(), "{}", left.brief());
    assert!(town.open_to_strangers(8080) && !town.open_to_strangers(9090));
    let left = town.ursa(&["leave", "--all"]);
    assert!(left.ok(), "{}", left.brief());
    assert_eq!(["web.service", "api.service", "top.service"].map(|unit| town.pid(unit)), now);
    let mut rest = differences(&before, &town.traces());
    // The one that runs in its slice until it is restarted.
    rest.retain(|line| !line.ends_with(" Slice=ursa-top.slice") && !line.ends_with(" Slice=system.slice"));
    assert_eq!(rest, Vec::<String>::new());
    assert!(town.vm.running("envoy").is_empty());
    let again = town.ursa(&["leave", "--all"]);
    assert!(again.ok() && again.stdout.contains("nothing changed"), "{}", again.brief());
    assert!(town.ursa(&["leave", "--all", "--node"]).ok());
    assert!(!town.vm.exists("/var/lib/ursa/agent/node").unwrap());
}

#[test]
#[ignore = "hasn't passed as a whole yet: run it with --ignored"]
fn a_join_that_is_killed_is_gone_on_with_or_undone() {
    let town = Town::new();
    let before = town.traces();
    let web = town.pid("web.service");
    // As long as a whole one takes, cut at many places.
    for after in ["0.05", "0.2", "0.4", "0.7", "1.1", "1.6", "2.5", "4"] {
        let killed = town
            .vm
            .run(&[
                "timeout",
                "-s",
                "KILL",
                after,
                "ursa",
                "join",
                &town.ticket,
                "--unit",
                "web",
                "--port",
                "8080",
            ])
            .unwrap();
        println!("# killed after {after} s\n{}", killed.stdout);
        let left = town.ursa(&["leave", "--unit", "web"]);
        assert!(left.ok(), "{after}: {}", left.brief());
        assert_eq!(differences(&before, &town.traces()), Vec::<String>::new(), "{after}");
    }
    for after in ["0.4", "1", "2"] {
        let args =
            ["timeout", "-s", "KILL", after, "ursa", "join", &town.ticket, "--unit", "web", "--port", "8080"];
        town.vm.run(&args).unwrap();
    }
    let joined = town.join("web", "8080", &[]);
    assert!(joined.stdout.contains("ok    self-test"), "{}", joined.stdout);
    // A leave likewise.
    for after in ["0.1", "0.5", "1.5"] {
        town.vm.run(&["timeout", "-s", "KILL", after, "ursa", "leave", "--unit", "web"]).unwrap();
    }
    assert!(town.ursa(&["leave", "--unit", "web"]).ok());
    assert_eq!(differences(&before, &town.traces()), Vec::<String>::new());
    assert_eq!(town.pid("web.service"), web);
}
