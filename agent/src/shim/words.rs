//! What an operator reads in `systemctl status`.

use super::protocol::{EnvoyState, EnvoyStatus, XdsRole};

/// One line about a sidecar.
pub(super) fn words(envoy: &EnvoyStatus, xds: XdsRole) -> String {
    let version =
        envoy.version.as_deref().and_then(short).map(|version| format!(" {version}")).unwrap_or_default();
    match envoy.state {
        EnvoyState::Waiting | EnvoyState::Starting => match (&envoy.waiting, envoy.pid) {
            (Some(waiting), None) => format!("Waiting for {waiting}"),
            (Some(waiting), Some(_)) => format!("Envoy is starting; it waits for {waiting}"),
            (None, None) => "Starting".to_owned(),
            (None, Some(_)) => "Envoy is starting".to_owned(),
        },
        EnvoyState::Live => {
            let source = match xds {
                XdsRole::Agent => "configured by the agent",
                XdsRole::LastGood | XdsRole::Unknown => {
                    "no agent is attached, the last good configuration is served"
                }
            };
            format!("Envoy{version} is live, epoch {}; {source}", envoy.epoch)
        }
        EnvoyState::Draining if envoy.drained => match envoy.inbound {
            Some(left @ 1..) => format!("Drained; {left} inbound connections did not end in time"),
            _ => "Drained; no inbound connection is left".to_owned(),
        },
        EnvoyState::Draining => match envoy.inbound {
            Some(left) => format!("Draining; {left} inbound connections are left"),
            None => "Draining".to_owned(),
        },
        EnvoyState::Backoff => {
            let why = envoy.last_exit.as_deref().unwrap_or("it says nothing");
            format!("Envoy ended and will be started again (restart {}): {why}", envoy.restarts + 1)
        }
        EnvoyState::Dead => "Envoy is stopped".to_owned(),
        EnvoyState::Unknown => "Envoy's state is not known".to_owned(),
    }
}

/// Envoy names commit, version, state and build: `3b53…/1.40.0/Clean/RELEASE/BoringSSL`.
fn short(version: &str) -> Option<&str> {
    version.split('/').nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_has_words() {
        let mut envoy = EnvoyStatus { state: EnvoyState::Waiting, ..EnvoyStatus::default() };
        envoy.waiting = Some("the control plane".into());
        assert_eq!(words(&envoy, XdsRole::LastGood), "Waiting for the control plane");
        envoy.state = EnvoyState::Live;
        envoy.version = Some("abc/1.40.0/Clean/RELEASE/BoringSSL".into());
        assert_eq!(words(&envoy, XdsRole::Agent), "Envoy 1.40.0 is live, epoch 0; configured by the agent");
        envoy.state = EnvoyState::Backoff;
        envoy.last_exit = Some("signal: 9 (SIGKILL)".into());
        assert!(words(&envoy, XdsRole::Agent).ends_with("(restart 1): signal: 9 (SIGKILL)"));
        envoy.state = EnvoyState::Draining;
        envoy.inbound = Some(2);
        assert_eq!(words(&envoy, XdsRole::Agent), "Draining; 2 inbound connections are left");
        envoy.drained = true;
        assert!(words(&envoy, XdsRole::Agent).contains("did not end in time"));
    }
}
