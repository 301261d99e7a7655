//! An operator shuts a node out, and lets it in again.

use ursa_tests::lab::pair::{Pair, SOON};
use ursa_tests::lab::wait;

#[test]
fn a_revoked_node_is_out_and_a_restored_one_is_back() {
    let mut pair = Pair::allowed().unwrap();
    let node = pair.node_b.name.clone();
    pair.control.ursa(&["node", "revoke", &node]).unwrap();
    let told = || {
        let status = pair.node_b.status().map_err(|error| format!("{error:#}"))?;
        let error = status["connectionError"].as_str().unwrap_or_default();
        if error.contains("revoked") { Ok(()) } else { Err(status.to_string()) }
    };
    wait::until("the agent to say that it was revoked", SOON, told).unwrap();
    let offline = || match pair.control.ursa(&["inspect", "nodes", &node]) {
        Ok(text) if text.contains("Revoked") => match pair.control.ursa(&["inspect", "dataplanes"]) {
            Ok(table) if table.lines().any(|row| row.contains("backend") && row.contains("Offline")) => {
                Ok(())
            }
            other => Err(format!("{other:?}")),
        },
        other => Err(format!("{other:?}")),
    };
    wait::until("its dataplane to be offline", SOON, offline).unwrap();
    pair.until_status(503).unwrap();
    let logged = || {
        let log = std::fs::read_to_string(pair.control.daemon.log()).unwrap_or_default();
        if log.contains("refused: this node was revoked") { Ok(()) } else { Err("not yet".to_owned()) }
    };
    wait::until("the refusal of its next connection in the log", SOON, logged).unwrap();

    pair.control.ursa(&["node", "restore", &node]).unwrap();
    pair.until_served().unwrap();
}
