//! How far a workload has come, what keeps it from going on, and who is told: the status, the log and control.

use time::OffsetDateTime;

use super::{Life, PATIENCE};
use crate::agent::identity::IdentityState;
use crate::agent::session::{ConnectionState, Registration};
use crate::agent::status::{EnvoyReport, Phase, WorkloadStatus};
use crate::agent::workload::WorkloadSpec;
use crate::launcher::{Origin as ShimOrigin, ShimState};
use crate::relay::{Kind, Source};
use crate::shim::protocol::{EnvoyState, EnvoyStatus};

pub(super) fn initial_status(spec: &WorkloadSpec) -> WorkloadStatus {
    WorkloadStatus {
        id: spec.id(),
        mesh: spec.mesh.clone(),
        name: spec.name.clone(),
        origin: spec.origin.to_string(),
        state: Phase::Appeared,
        since: OffsetDateTime::now_utc().unix_timestamp(),
        error: None,
        last_error: None,
        registration: "pending".to_owned(),
        shim_pid: None,
        shim_origin: None,
        envoy: no_envoy(),
        certificate: None,
        certificate_error: None,
        config_source: Source::None,
        rejections: Vec::new(),
        names: 0,
        disk_error: None,
        redirect: None,
    }
}

impl Life {
    pub(super) fn fail(&mut self, error: &str, identity: &IdentityState) {
        if self.facts.failure.as_deref() != Some(error) {
            tracing::warn!(workload = %self.id, %error, "trying again");
        }
        self.facts.failure = Some(error.to_owned());
        self.publish(identity);
    }

    fn phase(&self, identity: &IdentityState) -> Phase {
        let live = self.facts.envoy.as_ref().is_some_and(|envoy| envoy.state == EnvoyState::Live);
        let identified = identity.leaf.as_ref().is_some_and(|leaf| !leaf.is_expired());
        match () {
            () if !self.facts.attested => Phase::Appeared,
            () if !self.facts.redirected => Phase::Attested,
            () if !identified => Phase::Redirected,
            () if !self.cache.is_complete() => Phase::Identified,
            () if !live => Phase::Configured,
            () if !self.cache.is_settled(Kind::Listener) || self.facts.names.is_none() => Phase::Live,
            () => Phase::Ready,
        }
    }

    /// What keeps the workload from its next phase: cause and remedy.
    fn obstacle(&self, phase: Phase, identity: &IdentityState) -> Option<String> {
        if let Some(failure) = &self.facts.failure {
            return Some(failure.clone());
        }
        if let Some(ShimState::Backoff { reason, .. }) = self.shim.as_ref().map(|shim| shim.borrow().clone())
        {
            return Some(reason);
        }
        if let Registration::Refused(why) = &*self.registration.borrow() {
            return Some(format!("the Dataplane is refused: {why}"));
        }
        if let Some(envoy) = &self.facts.envoy
            && matches!(envoy.state, EnvoyState::Backoff | EnvoyState::Dead)
        {
            let exit = envoy.last_exit.as_deref().unwrap_or("it never started");
            let log = self.shared.config.load().run_dir.join("log").join(&self.id);
            return Some(format!("Envoy isn't running: {exit}; {}.log says why", log.display()));
        }
        if phase < Phase::Identified
            && let Some(error) = &identity.error
        {
            return Some(error.clone());
        }
        if phase == Phase::Ready || self.phase_since.elapsed() < PATIENCE {
            return None;
        }
        let connection = match &*self.shared.session.state().borrow() {
            ConnectionState::Connected => None,
            ConnectionState::NotJoined => {
                Some("this node hasn't joined; run `ursa-agent join TICKET`".to_owned())
            }
            ConnectionState::Disconnected(why) => Some(format!("control can't be reached: {why}")),
        };
        let upstream = self.upstream_error.borrow().clone();
        Some(match phase {
            Phase::Redirected => connection.unwrap_or_else(|| {
                "no MeshIdentity selects this Dataplane, so it gets no certificate and its traffic stays closed; see `ursa get meshidentities`".to_owned()
            }),
            Phase::Identified => connection.or(upstream).unwrap_or_else(|| {
                "control hasn't sent a complete configuration yet; see its log".to_owned()
            }),
            Phase::Configured => {
                let waiting = self.facts.envoy.as_ref().and_then(|envoy| envoy.waiting.clone());
                format!("Envoy isn't live: {}", waiting.as_deref().unwrap_or("it says nothing"))
            }
            Phase::Live => "Envoy hasn't accepted all listeners yet".to_owned(),
            _ => return None,
        })
    }

    pub(super) fn publish(&mut self, identity: &IdentityState) {
        let phase = self.phase(identity);
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if self.status.borrow().state != phase {
            self.phase_since = tokio::time::Instant::now();
            tracing::info!(workload = %self.id, state = phase.as_str(), "workload");
        }
        let error = self.obstacle(phase, identity);
        let (shim_pid, shim_origin) = match self.shim.as_ref().map(|shim| shim.borrow().clone()) {
            Some(ShimState::Running { pid, origin, .. }) => {
                let origin = match origin {
                    ShimOrigin::Started => "started",
                    ShimOrigin::Adopted => "adopted",
                };
                (Some(pid), Some(origin.to_owned()))
            }
            _ => (None, None),
        };
        let registration = match &*self.registration.borrow() {
            Registration::Pending => "pending".to_owned(),
            Registration::Registered => "registered".to_owned(),
            Registration::Refused(why) => format!("refused: {why}"),
        };
        self.status.send_if_modified(|status| {
            let former = status.clone();
            if status.state != phase {
                status.state = phase;
                status.since = now;
            }
            if error.is_none() && status.error.is_some() {
                status.last_error = status.error.take();
            }
            status.error = error;
            status.origin = self.spec.origin.to_string();
            status.registration = registration;
            status.shim_pid = shim_pid;
            status.shim_origin = shim_origin;
            status.envoy = self.facts.envoy.as_ref().map_or_else(no_envoy, envoy_report);
            status.certificate.clone_from(&identity.leaf);
            status.certificate_error.clone_from(&identity.error);
            status.config_source = self.cache.source();
            status.rejections = self.cache.rejections();
            status.names = self.facts.names.as_ref().map_or(0, |table| table.names.len());
            status.disk_error.clone_from(&self.disk_error.borrow());
            *status != former
        });
        self.report();
    }

    /// Tells control what belongs into the Dataplane's insight.
    fn report(&mut self) {
        let envoy = self.facts.envoy.as_ref().and_then(|envoy| envoy.version.clone());
        let json = serde_json::json!({
            "version": {
                "kumaDp": { "version": env!("CARGO_PKG_VERSION") },
                "envoy": { "version": envoy },
            },
        })
        .to_string();
        if json != self.reported {
            self.shared.session.report(&self.spec.mesh, &self.spec.name, json.clone());
            self.reported = json;
        }
    }

    pub(super) fn set_phase(&mut self, phase: Phase) {
        self.status.send_modify(|status| {
            status.state = phase;
            status.since = OffsetDateTime::now_utc().unix_timestamp();
        });
    }
}

fn no_envoy() -> EnvoyReport {
    EnvoyReport { state: "not started".to_owned(), ..EnvoyReport::default() }
}

fn envoy_report(envoy: &EnvoyStatus) -> EnvoyReport {
    let state = match envoy.state {
        EnvoyState::Starting => "starting",
        EnvoyState::Live => "live",
        EnvoyState::Draining => "draining",
        EnvoyState::Dead => "dead",
        EnvoyState::Backoff => "backoff",
        EnvoyState::Waiting => "waiting",
        EnvoyState::Unknown => "unknown",
    };
    EnvoyReport {
        pid: envoy.pid,
        state: state.to_owned(),
        epoch: envoy.epoch,
        restarts: envoy.restarts,
        last_exit: envoy.last_exit.clone(),
    }
}
