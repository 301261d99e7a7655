//! The lab itself: what the other suites rely on.

use std::time::{Duration, Instant};

use ursa_tests::lab::capture::Capture;
use ursa_tests::lab::program::{self, Client, Load};
use ursa_tests::lab::{Lab, Programs, wait};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_lab_carries_traffic_sees_it_and_leaves_nothing() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let (server, client) = (lab.net.host("server").unwrap(), lab.net.host("client").unwrap());
    let mut daemon = program::serve(&lab, &server, "server", 8080).unwrap();
    let mut asking = Client::start(&lab, &client).unwrap();
    let urls = [format!("http://{}:8080/x", server.v4), format!("http://[{}]:8080/x", server.v6)];
    for url in &urls {
        wait::until("an answer", SOON, || match asking.get(url).unwrap() {
            answer if answer.ok() => Ok(()),
            answer => Err(answer.brief()),
        })
        .unwrap();
    }

    let capture = Capture::start(&lab.net.bridge()).unwrap();
    assert!(asking.get_kept(&urls[0]).unwrap().ok());
    assert!(asking.get_kept(&urls[0]).unwrap().kept);
    let packets = capture.finish().unwrap();
    // Without a mesh the plaintext is there: the capture would see it.
    assert!(packets.containing("which nobody on the way may read") >= 2);
    assert!(packets.between(server.v4.parse().unwrap(), client.v4.parse().unwrap()) > 4);

    let load = Load::start(&lab, &client, &urls[0], Duration::from_millis(1)).unwrap();
    let since = Instant::now();
    let many = || if load.count() > 100 { Ok(()) } else { Err(format!("{}", load.count())) };
    wait::until("100 answers", SOON, many).unwrap();
    assert!(load.tally(since).bad.is_empty());
    daemon.kill();
    wait::until("the load to notice", SOON, || match load.tally(since) {
        tally if tally.drops > 0 && tally.bad.iter().any(|answer| answer.failed == "connect") => Ok(()),
        tally => Err(format!("{tally:?}")),
    })
    .unwrap();
    drop(load);

    let answer = asking.get("http://nobody.svc.mesh.local:8080/").unwrap();
    assert_eq!(answer.failed, "name", "{}", answer.brief());

    let (prefix, dir, netns) = (lab.prefix.clone(), lab.dir().to_owned(), server.path());
    drop((asking, daemon));
    drop(lab);
    assert!(!dir.exists() && !netns.exists(), "{prefix} left something");
}

#[test]
fn two_labs_at_once_do_not_meet() {
    let programs = Programs::discover().unwrap();
    let (mut one, mut two) = (Lab::new(&programs).unwrap(), Lab::new(&programs).unwrap());
    let (server, client) = (one.net.host("a").unwrap(), two.net.host("a").unwrap());
    assert_eq!(server.v4, client.v4);
    let _daemon = program::serve(&one, &server, "one", 8080).unwrap();
    let answer = Client::start(&two, &client).unwrap().get(&format!("http://{}:8080/", server.v4)).unwrap();
    assert_eq!(answer.failed, "connect", "{}", answer.brief());
}
