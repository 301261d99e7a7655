//! MeshFaultInjection: faults on purpose, to see what they do.

use crate::{
    GoDuration, Path,
    meta::Meta,
    policy::{Rule, TargetRef, To},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, EmptyMatch},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshFaultInjection>(
        PolicyTraits::TO_AND_RULES,
        "MeshFaultInjection",
        "meshfaultinjections",
        "mfi",
        "Mesh Fault Injection",
        "Mesh Fault Injections",
    )
};

spec_struct! {
    /// Faults of what comes in.
    pub struct MeshFaultInjection {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To<Conf>>,
        pub rules: Vec<Rule<Conf>>,
    }
    /// Faults of requests.
    pub struct Conf {
        pub http: Vec<Fault>,
    }
    /// One of them; its parts happen independently.
    pub struct Fault {
        pub abort: Option<Abort>,
        pub delay: Option<Delay>,
        pub response_bandwidth: Option<ResponseBandwidth>,
    }
    /// An answer instead of the workload's.
    pub struct Abort {
        pub http_status: u32,
        pub percentage: Option<serde_json::Value>,
    }
    /// A wait before the request goes on.
    pub struct Delay {
        pub value: GoDuration,
        pub percentage: Option<serde_json::Value>,
    }
    /// A slow answer.
    pub struct ResponseBandwidth {
        /// Text such as `100Mbps`; a number is refused by validation.
        pub limit: Option<serde_json::Value>,
        pub percentage: Option<serde_json::Value>,
    }
}

impl ResourceSpec for MeshFaultInjection {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), !self.rules.is_empty(), out);
        validate::to_or_rules(&self.to, &self.rules, out);
        validate::each_to(&self.to, &["Mesh"], out, |to, path, out| to.default.validate(path, out));
        validate::each_rule(&self.rules, EmptyMatch::Everybody, out, |rule, path, out| {
            rule.default.validate(path, out);
        });
    }
}

impl Conf {
    /// Paths have the fault's number behind its kind, as clients know them.
    fn validate(&self, path: &Path, out: &mut Violations) {
        let path = path.field("http");
        for (i, fault) in self.http.iter().enumerate() {
            if let Some(abort) = &fault.abort {
                let path = path.field("abort").index(i);
                validate::status_code(&path.field("httpStatus"), abort.http_status, out);
                optional_percentage(&path, abort.percentage.as_ref(), out);
            }
            if let Some(delay) = &fault.delay {
                let path = path.field("delay").index(i);
                validate::duration_not_negative(&path.field("value"), Some(delay.value), out);
                optional_percentage(&path, delay.percentage.as_ref(), out);
            }
            if let Some(bandwidth) = &fault.response_bandwidth {
                let path = path.field("responseBandwidth").index(i);
                let limit = match &bandwidth.limit {
                    Some(serde_json::Value::String(text)) => text.clone(),
                    Some(other) => other.to_string(),
                    None => String::new(),
                };
                if let Some(fault) = validate::bandwidth(&limit) {
                    out.add(path.field("limit"), fault);
                }
                optional_percentage(&path, bandwidth.percentage.as_ref(), out);
            }
        }
    }
}

fn optional_percentage(path: &Path, percentage: Option<&serde_json::Value>, out: &mut Violations) {
    if let Some(percentage) = percentage {
        validate::percentage(&path.field("percentage"), percentage, out);
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::no_faults("rules: [{default: {}}]", &[])]
    #[case::delay(
        "rules: [{default: {http: [{abort: {httpStatus: 500}}, {delay: {value: -1s, percentage: '101'}}]}}]",
        &[
            "spec.rules[0].default.http.delay[1].value: must not be negative when defined",
            "spec.rules[0].default.http.delay[1].percentage: must be in inclusive range [0.0, 100.0]",
        ]
    )]
    #[case::bandwidth(
        "rules: [{default: {http: [{responseBandwidth: {}}]}}]",
        &["spec.rules[0].default.http.responseBandwidth[0].limit: must be defined"]
    )]
    fn injections(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshFaultInjection", spec), expected);
    }
}
