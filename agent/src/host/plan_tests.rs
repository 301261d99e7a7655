#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use super::*;
use crate::host::options::Protocol;

/// A machine with one service, `web`.
struct Machine {
    app: Service,
    services: Vec<Service>,
    uid: Option<u32>,
    taken: BTreeSet<u16>,
    records: Vec<Record>,
    options: JoinOptions,
    config: AgentConfig,
}

impl Machine {
    fn new() -> Self {
        let service = |name: &str, user: &str| Service {
            id: format!("{name}.service"),
            load_state: "loaded".into(),
            active_state: "active".into(),
            user: user.into(),
            ..Service::default()
        };
        Self {
            app: service("web", "web"),
            services: vec![service("web", "web"), service("db", "db")],
            uid: Some(2001),
            taken: BTreeSet::new(),
            records: Vec::new(),
            options: JoinOptions {
                unit: Some("web.service".into()),
                port: Some(8080),
                ..JoinOptions::default()
            },
            config: AgentConfig::default(),
        }
    }

    fn plan(&self) -> Result<Record> {
        plan(
            &self.options,
            &Facts {
                app: &self.app,
                services: &self.services,
                uid: self.uid,
                taken: &self.taken,
                records: &self.records,
                host: "vm1",
                address: Some("10.0.0.7".parse().unwrap()),
                has_user: false,
                config: &self.config,
            },
        )
    }

    fn refused(edit: impl FnOnce(&mut Self)) -> String {
        let mut machine = Self::new();
        edit(&mut machine);
        machine.plan().unwrap_err().to_string()
    }
}

fn texts(machine: &Machine) -> Vec<(String, String)> {
    let record = machine.plan().unwrap();
    let files = files(&record, Ids { uid: 997, gid: 990 }, &machine.config);
    files.all().map(|file| (file.path.display().to_string(), file.text.clone())).collect()
}

fn body<'a>(files: &'a [(String, String)], path: &str) -> &'a str {
    let (_, text) =
        files.iter().find(|(found, _)| found == path).unwrap_or_else(|| panic!("no {path} in {files:#?}"));
    let (head, body) = text.split_once('\n').unwrap();
    assert_eq!(head, "# Made by `ursa join --unit web.service`; `ursa leave --unit web.service` removes it.");
    body
}

#[test]
fn a_service_with_a_user_of_its_own_is_told_apart_by_it() {
    let files = texts(&Machine::new());
    assert_eq!(files.len(), 5);
    assert_eq!(
        body(&files, "/etc/sysusers.d/ursa-web.conf"),
        "u ursa-web -:ursa-proxy \"Sidecar of web.service\" / -\n"
    );
    assert_eq!(
        body(&files, "/etc/systemd/system/ursa-sidecar@web.service.d/10-ursa.conf"),
        "[Service]\nUser=ursa-web\n"
    );
    assert_eq!(
        body(&files, "/etc/ursa/redirect.d/web.yaml"),
        "name: web\nuids: [2001]\nproxyUids: [997]\ninbound: {port: 15006, includePorts: [8080]}\noutbound: {port: \
         15001}\ndns: {port: 15053}\n"
    );
    assert_eq!(
        body(&files, "/etc/systemd/system/web.service.d/50-ursa.conf"),
        "[Unit]\nWants=ursa-sidecar@web.service\nAfter=ursa-sidecar@web.service\n\n[Service]\nExecStartPre=+-\
         /usr/libexec/ursa/ursa-shim resume --service web\nExecStop=+-/usr/libexec/ursa/ursa-shim drain --service \
         web\n"
    );
    let workload = body(&files, "/etc/ursa/workloads.d/web.yaml");
    let spec = WorkloadSpec::from_yaml(workload, Origin::File("f".into()), &AgentConfig::default()).unwrap();
    assert_eq!(
        (spec.id().as_str(), spec.node_id().as_str(), spec.uid, spec.gid),
        ("web", "default.web-vm1", 997, 990)
    );
    assert_eq!((spec.cluster().as_str(), spec.unit.as_deref()), ("web", Some("web.service")));
    assert!(spec.is_told_apart() && spec.netns.is_none());
}

#[test]
fn what_ursa_init_reads_is_what_the_agent_says() {
    let machine = Machine::new();
    let files = texts(&machine);
    let part: ursa_init::intent::Workload =
        ursa_model::yaml::from_str(body(&files, "/etc/ursa/redirect.d/web.yaml")).unwrap();
    let workload = body(&files, "/etc/ursa/workloads.d/web.yaml");
    let spec = WorkloadSpec::from_yaml(workload, Origin::File("f".into()), &AgentConfig::default()).unwrap();
    let intent = spec.redirect.unwrap();
    assert_eq!((part.uids, part.slices, part.proxy_uids), (spec.uids, spec.slices, intent.proxy_uids));
    assert_eq!((part.inbound, part.outbound, part.dns), (intent.inbound, intent.outbound, intent.dns));
}

#[test]
fn a_slice_is_asked_for_where_a_user_says_nothing() {
    for (edit, why) in [
        ((|m: &mut Machine| m.app.user.clear()) as fn(&mut Machine), "runs as root"),
        (|m| m.app.dynamic_user = true, "DynamicUser=yes"),
        (|m| m.services[1].user = "web".into(), "so does db.service"),
        (|m| m.services[1].user = "2001".into(), "so does db.service"),
        (|m| m.uid = Some(0), "runs as root"),
    ] {
        let error = Machine::refused(edit);
        let offer = "`ursa join TICKET --unit web.service --port 8080 --slice`";
        assert!(
            error.contains(why) && error.contains(offer) && error.contains("restarts web.service"),
            "{error}"
        );
        let mut machine = Machine::new();
        edit(&mut machine);
        machine.options.slice = true;
        let files = texts(&machine);
        assert!(
            body(&files, "/etc/ursa/redirect.d/web.yaml").contains("slices: [ursa.slice/ursa-web.slice]\n")
        );
        assert!(
            body(&files, "/etc/systemd/system/web.service.d/50-ursa.conf")
                .ends_with("--service web\nSlice=ursa-web.slice\n")
        );
    }
    assert!(Machine::refused(|m| m.uid = None).contains("no such user"));
}

#[test]
fn a_namespace_of_its_own_needs_nothing_else() {
    let mut machine = Machine::new();
    machine.app.user.clear();
    machine.app.netns = "/run/netns/web".into();
    machine.options.memory_max = Some("256M".into());
    let files = texts(&machine);
    assert_eq!(files.len(), 6);
    assert_eq!(
        body(&files, "/etc/systemd/system/ursa-sidecar@web.service.d/10-ursa.conf"),
        "[Unit]\nWants=ursa-redirect@web.service\nAfter=ursa-redirect@web.service\n\n[Service]\nUser=ursa-web\n\
         NetworkNamespacePath=/run/netns/web\nMemoryMax=256M\n"
    );
    assert_eq!(
        body(&files, "/etc/systemd/system/ursa-redirect@web.service.d/10-ursa.conf"),
        "[Service]\nNetworkNamespacePath=/run/netns/web\n"
    );
    let redirect = body(&files, "/etc/ursa/redirect.netns.d/web.yaml");
    let intent: ursa_init::RedirectIntent = ursa_model::yaml::from_str(redirect).unwrap();
    assert!(ursa_init::Plan::compile(&intent).is_ok() && intent.proxy_uids == [997]);
}

#[test]
fn bad_input_is_refused_with_cause_and_remedy() {
    for (edit, parts) in [
        (
            (|m: &mut Machine| m.app.load_state = "not-found".into()) as fn(&mut Machine),
            &["systemd knows no", "list-units"][..],
        ),
        (|m| m.app.load_state = "masked".into(), &["masked", "unmask"]),
        (|m| m.app.id = "nginx.service".into(), &["alias", "--unit nginx.service"]),
        (|m| m.app.private_network = true, &["PrivateNetwork", "NetworkNamespacePath"]),
        (|m| m.options.port = None, &["which port", "ss -lntp"]),
        (|m| m.options.unit = Some("ursa-agent.service".into()), &["Ursa itself"]),
        (|m| m.options.memory_max = Some("much".into()), &["--memory-max", "256M"]),
        (|m| m.options.memory_max = Some("1MM".into()), &["--memory-max"]),
        (|m| m.options.workload = Some("Web_1".into()), &["workload would be wrong"]),
        (|m| m.options.mesh = Some("a b".into()), &["workload would be wrong"]),
    ] {
        let error = Machine::refused(edit);
        assert!(parts.iter().all(|part| error.contains(part)), "{parts:?}: {error}");
    }
}

#[test]
fn neighbours_have_ports_and_names_of_their_own() {
    let mut machine = Machine::new();
    machine.records.push(machine.plan().unwrap());
    machine.app.id = "api.service".into();
    machine.app.user = "api".into();
    machine.uid = Some(2002);
    machine.options.unit = Some("api".into());
    let same_port = machine.plan().unwrap_err().to_string();
    assert!(same_port.contains("8080 is web.service's"), "{same_port}");
    machine.options.port = Some(9090);
    let api = machine.plan().unwrap();
    assert_eq!(api.ports.all(), [15_106, 15_101, 15_153]);
    machine.options.dataplane = Some("web-vm1".into());
    let same_name = machine.plan().unwrap_err().to_string();
    assert!(same_name.contains("--dataplane"), "{same_name}");
}

#[test]
fn a_second_join_says_the_same_or_is_refused() {
    let mut machine = Machine::new();
    let first = machine.plan().unwrap();
    machine.records.push(first.clone());
    assert_eq!(machine.plan().unwrap(), first);
    machine.options.port = None;
    assert_eq!(machine.plan().unwrap(), first, "what isn't said is what was said before");
    machine.options.port = Some(8081);
    machine.options.protocol = Some(Protocol::Http);
    let error = machine.plan().unwrap_err().to_string();
    for part in ["--port (it was 8080)", "--protocol (it was tcp)", "ursa leave --unit web.service"] {
        assert!(error.contains(part), "{error}");
    }
}
