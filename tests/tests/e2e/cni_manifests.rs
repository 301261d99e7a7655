//! The commands of `packaging/kubernetes` in real containers on a real node: install, pods, upgrade, uninstall; at every
//! step pods come and go.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::runtime::churn::Churn;
use ursa_tests::lab::runtime::containerd::Containerd;
use ursa_tests::lab::runtime::daemonset::{self, Kubelet, NodeImage};
use ursa_tests::lab::runtime::ground::Ground;
use ursa_tests::lab::runtime::{PodSpec, Runtime as _};
use ursa_tests::lab::wait;

use crate::cni_runtimes::assert_nothing_left;

/// How long a step may take: the installer drains what is meshed.
const STEP: Duration = Duration::from_secs(60);

#[test]
fn at_every_step_of_an_installation_pods_come_and_go() {
    let ground = Ground::bare(&["web"], Containerd::start).unwrap();
    let (machine, runtime, networks) = (&ground.machine, &ground.runtime, &ground.networks);
    let config = ground.lab.dir().join("config-map");
    std::fs::create_dir(&config).unwrap();
    let mut plugin = networks.ursa();
    plugin["workload"]["labels"] = json!({"kuma.io/workload": "web"});
    plugin.as_object_mut().unwrap().remove("type");
    std::fs::write(config.join("plugin.json"), plugin.to_string()).unwrap();
    std::fs::write(config.join("agent.yaml"), "envoy: /opt/ursa/bin/envoy\n").unwrap();
    // Nobody runs an Envoy from there, and it is large.
    let image = NodeImage::new(&ground.lab, &ground.lab.programs.path("lab-app")).unwrap();
    let kubelet = Kubelet {
        runtime,
        machine,
        image: &image,
        root: networks.root.clone(),
        elsewhere: BTreeMap::from([
            (PathBuf::from("/var/lib/cni"), PathBuf::from("/var/lib/cni")),
            (PathBuf::from("/run/ursa"), ground.node.run_dir()),
        ]),
        config,
        logs: ground.lab.dir().join("log"),
    };
    let manifest = daemonset::document("packaging/kubernetes/daemonset.yaml", "DaemonSet").unwrap();
    let removal = daemonset::document("packaging/kubernetes/uninstall/daemonset.yaml", "DaemonSet").unwrap();
    let (list, program) = (networks.conf_dir.join("10-pods.conflist"), networks.bin_dir.join("ursa-cni"));
    let before = std::fs::read(&list).unwrap();
    let knows_plugin = |wanted: bool| {
        wait::until("containerd to read the list", SOON, || match runtime.conflists() {
            Ok(read) if read.contains("ursa-cni") == wanted => Ok(()),
            Ok(read) => Err(read),
            Err(error) => Err(format!("{error:#}")),
        })
        .unwrap();
    };
    let churned = |churn: &Churn| {
        let enough = churn.count() + 2;
        let count = || if churn.count() >= enough { Ok(()) } else { Err(churn.count().to_string()) };
        wait::until("pods to come and go", STEP, count).unwrap();
    };

    let churn = Churn::default();
    let steps = churn.during(machine, runtime, |churn| {
        // Install.
        let installer = kubelet.run(&manifest, 0, STEP).unwrap();
        let ready = || kubelet.probe(&installer, &manifest).map_err(|error| format!("{error:#}"));
        wait::until("the installer to be ready", STEP, ready).unwrap();
        knows_plugin(true);
        let pod = ground.run(&PodSpec::meshed("web").sandbox()).unwrap();
        assert!(!pod.rules(machine).unwrap().is_empty(), "the pod is redirected");
        let envoys = pod.envoys(machine);
        assert_eq!(envoys.len(), 1);
        churned(churn);

        // Upgrade.
        let installed = std::fs::read(&list).unwrap();
        let renewed = image.renew().unwrap();
        kubelet.stop(installer).unwrap();
        let installer = kubelet.run(&manifest, 1, STEP).unwrap();
        let ready = || kubelet.probe(&installer, &manifest).map_err(|error| format!("{error:#}"));
        wait::until("the new installer to be ready", STEP, ready).unwrap();
        // The probe answers for the list; an old program is as good as a new one.
        wait::until("the new plugin to be in place", STEP, || match std::fs::read(&program) {
            Ok(found) if found == renewed => Ok(()),
            _ => Err("the old one".to_owned()),
        })
        .unwrap();
        assert!(std::fs::read(&list).unwrap() == installed, "the list needs no change");
        assert_eq!(pod.envoys(machine), envoys, "no sidecar was touched");
        churned(churn);

        // Uninstall: it waits for the pod that still has a sidecar.
        kubelet.stop(installer).unwrap();
        std::thread::scope(|scope| {
            let uninstaller = scope.spawn(|| kubelet.run(&removal, 0, STEP).unwrap());
            knows_plugin(false);
            let open = ground.run(&PodSpec::meshed("open").sandbox()).unwrap();
            assert!(open.rules(machine).unwrap().is_empty(), "nobody is meshed any more");
            assert!(!pod.rules(machine).unwrap().is_empty(), "who is, stays so");
            runtime.remove(machine, &open).unwrap();
            churned(churn);
            runtime.remove(machine, &pod).unwrap();
            let uninstaller = uninstaller.join().unwrap();
            churned(churn);
            kubelet.stop(uninstaller).unwrap();
        });
        churned(churn);
    });
    steps.unwrap();
    assert!(std::fs::read(&list).unwrap() == before, "the list is as it was, to the byte");
    assert!(!program.exists(), "the plugin is gone");
    assert_nothing_left(&ground);
}
