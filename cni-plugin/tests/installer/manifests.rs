//! The Kubernetes manifests: every command in them is run, on a scratch root.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::scratch::{BASE, CONFLIST, Done, Node, fake};
use crate::watch::Watch;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/kubernetes")
}

fn document(path: &str) -> Value {
    let text = fs::read_to_string(folder().join(path)).unwrap();
    serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What a node has, and what the containers see.
struct Cluster {
    node: Node,
    image: PathBuf,
    config: PathBuf,
}

impl Cluster {
    fn new() -> Self {
        let node = Node::with(CONFLIST, BASE);
        let image = node.root().join("image");
        let (bin, units) = (image.join("usr/bin"), image.join("usr/lib/systemd/system"));
        fs::create_dir_all(&bin).unwrap();
        for program in ["ursa-agent", "ursa-shim", "ursa-init", "envoy"] {
            symlink(fake("ursa-cni"), bin.join(program)).unwrap();
        }
        fs::create_dir_all(units.parent().unwrap()).unwrap();
        symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/kubernetes/units"), units).unwrap();
        let config = node.root().join("config");
        fs::create_dir(&config).unwrap();
        let map: BTreeMap<String, String> =
            serde_json::from_value(document("config.yaml")["data"].clone()).unwrap();
        for (name, text) in map {
            fs::write(config.join(name), text).unwrap();
        }
        Self { node, image, config }
    }

    /// A container's command, with its mounts' places on this machine.
    fn command(&self, command: &Value) -> Command {
        let words: Vec<_> = command.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        let (program, arguments) = words.split_first().unwrap();
        assert_eq!(*program, "/usr/bin/ursa-cni");
        let root = self.node.root().to_str().unwrap();
        let config = self.config.to_str().unwrap();
        let mut run = Command::new(env!("CARGO_BIN_EXE_ursa-cni"));
        run.env_clear();
        run.args(
            arguments
                .iter()
                .map(|word| word.replace("=/host", &format!("={root}")).replace("/etc/ursa-config", config)),
        );
        if arguments.starts_with(&["node"]) {
            run.arg("--from").arg(&self.image);
        }
        run
    }

    fn run(&self, command: &Value) -> Done {
        self.command(command).output().unwrap().into()
    }
}

fn pod(daemonset: &Value) -> &Value {
    &daemonset["spec"]["template"]["spec"]
}

fn containers<'a>(daemonset: &'a Value, kind: &str) -> impl Iterator<Item = &'a Value> {
    pod(daemonset)[kind].as_array().unwrap().iter()
}

#[test]
fn install_upgrade_uninstall() {
    let cluster = Cluster::new();
    let node = &cluster.node;
    let before = node.files();
    let install = document("daemonset.yaml");
    let main = |daemonset: &Value| containers(daemonset, "containers").next().unwrap()["command"].clone();
    let probe = &containers(&install, "containers").next().unwrap()["readinessProbe"]["exec"]["command"];
    assert_eq!(cluster.run(probe).code, Some(3), "not ready before");
    let mut seen = Vec::new();
    for round in ["install", "upgrade"] {
        for container in containers(&install, "initContainers") {
            cluster.run(&container["command"]).ok();
        }
        let unit = fs::read_to_string(node.root().join("etc/systemd/system/ursa-agent.service")).unwrap();
        assert!(unit.contains("ExecStart=/opt/ursa/bin/ursa-agent run"), "{unit}");
        assert!(node.root().join("opt/ursa/bin/ursa-shim").is_file());
        let watch = Watch::spawn(cluster.command(&main(&install)));
        watch.says("ready: ");
        cluster.run(probe).ok();
        node.serves();
        assert_eq!(node.chain(), ["bridge", "portmap", "ursa-cni"], "{round}");
        assert!(node.list().contains("\"ursa-system\""));
        watch.stop();
        cluster.run(probe).ok();
        seen.push(node.files());
    }
    assert_eq!(seen[0], seen[1], "an upgrade to the same changes nothing");
    let attached = node.attach("c1");
    let uninstall = document("uninstall/daemonset.yaml");
    for container in containers(&uninstall, "initContainers") {
        // Five minutes for pods to end are for people.
        let command = serde_json::to_string(&container["command"])
            .unwrap()
            .replace("--drain-timeout=300", "--drain-timeout=0");
        cluster.run(&serde_json::from_str(&command).unwrap()).ok();
        node.serves();
    }
    assert!(
        !node.root().join("opt/ursa").exists()
            && !node.root().join("etc/systemd/system/ursa-agent.service").exists()
    );
    let stay = Watch::spawn(cluster.command(&main(&uninstall)));
    stay.says("is now a stub");
    fs::remove_file(attached).unwrap();
    stay.says("ursa-cni is removed");
    assert_eq!(node.files(), before);
}

#[test]
fn pods_get_what_they_need_and_no_more() {
    for path in ["daemonset.yaml", "uninstall/daemonset.yaml"] {
        let daemonset = document(path);
        let pod = pod(&daemonset);
        assert_eq!(
            (&pod["hostNetwork"], &pod["priorityClassName"]),
            (&true.into(), &"system-node-critical".into())
        );
        assert_eq!(pod["tolerations"], serde_json::json!([{"operator": "Exists"}]));
        assert_eq!(pod["automountServiceAccountToken"], false);
        let volumes: Vec<_> =
            pod["volumes"].as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
        for container in containers(&daemonset, "initContainers").chain(containers(&daemonset, "containers"))
        {
            for mount in container["volumeMounts"].as_array().unwrap() {
                assert!(volumes.contains(&mount["name"].as_str().unwrap()), "{mount}");
            }
            let privileged = container["securityContext"]["privileged"] == true;
            assert_eq!(privileged, container["name"] == "node", "{}", container["name"]);
            let root = container["volumeMounts"]
                .as_array()
                .unwrap()
                .iter()
                .any(|mount| mount["mountPath"] == "/host");
            assert_eq!(root, privileged, "{}", container["name"]);
        }
    }
    let rbac = fs::read_to_string(folder().join("rbac.yaml")).unwrap();
    assert!(!rbac.contains("kind: Role") && !rbac.contains("kind: ClusterRole"));
    for path in ["kustomization.yaml", "uninstall/kustomization.yaml"] {
        for resource in document(path)["resources"].as_array().unwrap() {
            let file = Path::new(path).with_file_name(resource.as_str().unwrap());
            assert!(document(file.to_str().unwrap())["kind"].is_string());
        }
    }
}
