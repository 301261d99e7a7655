//! The installer that stays.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::scratch::{BASE, CONFLIST, Node, fake};

/// More than any step takes.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Watch {
    child: Child,
    lines: Receiver<String>,
}

impl Watch {
    pub(crate) fn start(node: &Node, more: &[&str]) -> Self {
        let program = fake("ursa-cni");
        let mut command = node.command(&["install", "--watch", "--binary", program.to_str().unwrap()]);
        command.args(more);
        Self::spawn(command)
    }

    pub(crate) fn spawn(mut command: std::process::Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = channel();
        thread::spawn(move || out.lines().map_while(Result::ok).all(|line| tell.send(line).is_ok()));
        Self { child, lines }
    }

    /// Waits until it says so.
    #[track_caller]
    pub(crate) fn says(&self, words: &str) -> String {
        let start = Instant::now();
        let mut said = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(DEADLINE.saturating_sub(start.elapsed())) {
            if line.contains(words) {
                return line;
            }
            said.push(line);
        }
        panic!("never said {words:?}, but {said:#?}");
    }

    /// Ends as a container does.
    #[track_caller]
    pub(crate) fn stop(mut self) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        self.says("the watch ends");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something is so. What is waited for is the work of another process on files that come and go.
#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < DEADLINE, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn ready(file: &Path) -> bool {
    file.exists()
}

#[test]
fn waits_for_the_base_and_repairs() {
    let node = Node::bare();
    let file = node.root().join("ready");
    let watch = Watch::start(&node, &["--ready-file", file.to_str().unwrap()]);
    watch.says("waiting for the base CNI");
    assert!(!ready(&file));
    // Half of it first, as careless writers do; the other network is none of ours.
    fs::write(
        node.net().join("99-loopback.conf"),
        "{\"type\":\"loopback\",\"cniVersion\":\"1.0.0\",\"name\":\"lo\"}",
    )
    .unwrap();
    fs::write(node.net().join(CONFLIST), &BASE[..BASE.len() / 2]).unwrap();
    fs::write(node.net().join(CONFLIST), BASE).unwrap();
    watch.says("ready: ursa-cni is in");
    assert!(ready(&file));
    node.run(&["status"]).ok();
    let start = Instant::now();
    fs::write(node.net().join(CONFLIST), BASE).unwrap();
    watch.says("repaired");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(node.chain(), ["bridge", "portmap", "ursa-cni"]);
    // The program, too.
    fs::remove_file(node.program()).unwrap();
    watch.says("was removed");
    until("the program is back", || node.program().exists() && ready(&file));
    // It would be put back.
    node.uninstall().refused(&["--watch", "delete daemonset"]);
    watch.stop();
    assert!(!ready(&file));
    assert_eq!(node.chain(), ["bridge", "portmap", "ursa-cni"], "the end of the watch changes nothing");
}

#[test]
fn gives_way_in_a_fight_and_says_so() {
    let node = Node::with(CONFLIST, BASE);
    let watch = Watch::start(&node, &[]);
    watch.says("ready");
    for _ in 0..3 {
        fs::write(node.net().join(CONFLIST), BASE).unwrap();
        watch.says("repaired");
    }
    fs::write(node.net().join(CONFLIST), BASE).unwrap();
    let said = watch.says("FIGHT");
    assert!(
        said.contains(CONFLIST) && said.contains("NOT in the mesh") && said.contains("cni.exclusive"),
        "{said}"
    );
    assert_eq!(node.list(), BASE);
    let status = node.run(&["status"]);
    assert_eq!(status.code, Some(3));
    assert!(status.stdout.contains("another program took it out"), "{status:?}");
    watch.stop();
}

#[test]
fn a_file_in_front_is_the_new_network() {
    let node = Node::with(CONFLIST, BASE);
    let watch = Watch::start(&node, &[]);
    watch.says("ready");
    let new = BASE.replace("k8s-p\\u006fd-network", "new");
    let half = node.net().join(".half");
    fs::write(&half, new).unwrap();
    fs::rename(half, node.net().join("05-new.conflist")).unwrap();
    watch.says("05-new.conflist no longer holds");
    until("it is in the new network", || node.chain().contains(&"ursa-cni".to_owned()));
    watch.stop();
    node.uninstall().ok();
    assert_eq!(node.list(), BASE);
}

#[test]
fn two_watches_are_one() {
    let node = Node::with(CONFLIST, BASE);
    let old = Watch::start(&node, &[]);
    old.says("ready");
    let new = Watch::start(&node, &["--exclude-namespace", "new"]);
    new.says("another `ursa-cni install --watch` runs");
    old.stop();
    new.says("ready");
    assert!(node.list().contains("\"new\""));
    new.stop();
}

#[test]
fn the_stub_goes_with_the_last_pod_while_uninstall_stays() {
    let node = Node::with(CONFLIST, BASE);
    node.install(&[]).ok();
    let attached = node.attach("c1");
    let stay = Watch::spawn(node.command(&["uninstall", "--stay"]));
    stay.says("is now a stub");
    fs::remove_file(attached).unwrap();
    stay.says("ursa-cni is removed");
    assert!(!node.program().exists());
}
