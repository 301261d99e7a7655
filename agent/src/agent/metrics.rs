//! The agent's status as metrics, in the text format that Prometheus and node_exporter's textfile collector read.

use std::fmt::Write as _;

use ursa_init::watch::State;

use super::status::{AgentStatus, Phase, RedirectReport};

/// Metrics of `status`: what an alert wants to know, first of all when certificates end.
pub fn render(status: &AgentStatus) -> String {
    let mut text = String::new();
    family(
        &mut text,
        "connected",
        "Whether the session with the control plane is open",
        [(String::new(), i64::from(status.connected))],
    );
    family(
        &mut text,
        "node_certificate_not_after_seconds",
        "When the node's certificate ends, Unix time",
        status.node_certificate_until.map(|until| (String::new(), until)),
    );
    let leaves = || {
        status
            .workloads
            .iter()
            .filter_map(|workload| Some((labels(workload), workload.certificate.as_ref()?)))
    };
    family(
        &mut text,
        "certificate_not_after_seconds",
        "When a workload's certificate ends, Unix time",
        leaves().map(|(labels, leaf)| (labels, leaf.not_after)),
    );
    family(
        &mut text,
        "certificate_renew_at_seconds",
        "When a workload's certificate is to be renewed, Unix time",
        leaves().map(|(labels, leaf)| (labels, leaf.renew_at)),
    );
    family(
        &mut text,
        "certificate_error",
        "Whether a workload's certificate is missing or can't be renewed",
        status
            .workloads
            .iter()
            .map(|workload| (labels(workload), i64::from(workload.certificate_error.is_some()))),
    );
    family(
        &mut text,
        "workload_ready",
        "Whether a workload is ready",
        status.workloads.iter().map(|workload| (labels(workload), i64::from(workload.state == Phase::Ready))),
    );
    let redirects = || {
        let kept = status.workloads.iter().filter_map(|one| Some((one, one.redirect.as_ref()?)));
        kept.map(|(workload, redirect)| (labels(workload), redirect))
    };
    family(
        &mut text,
        "redirect_in_place",
        "Whether a workload's redirect is as it should be, as far as this agent keeps it",
        redirects().map(|(labels, redirect)| (labels, i64::from(redirect.state == State::InPlace))),
    );
    let repairs = |redirect: &RedirectReport| i64::try_from(redirect.repairs).unwrap_or(i64::MAX);
    typed_family(
        &mut text,
        "redirect_repairs_total",
        "counter",
        "How often a workload's redirect was put back after somebody had changed it",
        redirects().map(|(labels, redirect)| (labels, repairs(redirect))),
    );
    text
}

fn family(text: &mut String, name: &str, help: &str, samples: impl IntoIterator<Item = (String, i64)>) {
    typed_family(text, name, "gauge", help, samples);
}

fn typed_family(
    text: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    samples: impl IntoIterator<Item = (String, i64)>,
) {
    // Writing to a String can't fail.
    let _ = writeln!(text, "# HELP ursa_agent_{name} {help}\n# TYPE ursa_agent_{name} {kind}");
    for (labels, value) in samples {
        let _ = writeln!(text, "ursa_agent_{name}{labels} {value}");
    }
}

/// Names of meshes and Dataplanes hold nothing that would need escaping.
fn labels(workload: &super::status::WorkloadStatus) -> String {
    format!("{{mesh=\"{}\",dataplane=\"{}\"}}", workload.mesh, workload.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_says_what_it_is() {
        let status = AgentStatus { node_certificate_until: Some(7), ..AgentStatus::default() };
        let text = render(&status);
        assert!(text.contains("ursa_agent_connected 0\n"), "{text}");
        assert!(text.contains("ursa_agent_node_certificate_not_after_seconds 7\n"), "{text}");
        assert_eq!(text.matches("# HELP").count(), text.matches("# TYPE").count());
    }
}
