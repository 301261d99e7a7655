//! `ursa-cni explain`: the plugin's decision about a pod, from its manifest and before it starts.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use ursa_init::RedirectIntent;
use ursa_model::injection::{
    Decision, Injection, Membership, NamespaceFacts, Pod, Verdict, decide, membership,
};
use ursa_model::labels::Labels;

use crate::config::{NetConf, Silent};
use crate::verbs::compile;

const EXAMPLES: &str = "\
Examples:
  ursa-cni explain pod.yaml
  ursa-cni explain deployment.yaml --namespace namespace.yaml
  kubectl get pod web-0 -o yaml | ursa-cni explain - --conf /etc/cni/net.d/10-pods.conflist --json

Exit codes: 0 decided (either way), 1 the manifest or what it says can't be used, 2 wrong usage.";

/// What to look at.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Manifest of a Pod, or of what makes pods (Deployment, StatefulSet, …); YAML or JSON, `-` for standard input
    #[arg(value_name = "POD.yaml")]
    pod: PathBuf,
    /// Manifest of its Namespace; without it the namespace is taken to say nothing
    #[arg(long, value_name = "NS.yaml")]
    namespace: Option<PathBuf>,
    /// The runtime's conflist with ursa-cni in it, or ursa-cni's part alone; without it every setting has its default
    #[arg(long, value_name = "CONFLIST")]
    conf: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A Kubernetes object, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Manifest {
    kind: String,
    metadata: Metadata,
    spec: Spec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    generate_name: Option<String>,
    namespace: Option<String>,
    annotations: Option<Labels>,
    labels: Option<Labels>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    host_network: bool,
    template: Option<Box<Manifest>>,
}

/// All that the manifest and the configuration lead to.
#[derive(Debug)]
struct Explanation {
    verdict: Verdict,
    notes: Vec<String>,
    who: Option<Membership>,
    redirect: Option<(RedirectIntent, Vec<String>)>,
}

/// Prints the decision.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let pod = manifest(&arguments.pod)?;
    let namespace = arguments.namespace.as_deref().map(manifest).transpose()?;
    let conf = arguments.conf.as_deref().map_or_else(|| Ok(NetConf::default()), network)?;
    let explanation = explain(pod, namespace, &conf)?;
    if arguments.json {
        println!("{:#}", explanation.to_json());
    } else {
        print!("{}", explanation.to_text());
    }
    Ok(())
}

fn explain(pod: Manifest, namespace: Option<Manifest>, conf: &NetConf) -> anyhow::Result<Explanation> {
    let mut notes = Vec::new();
    if let Some(namespace) = &namespace
        && namespace.kind != "Namespace"
    {
        bail!(
            "--namespace wants a Namespace and got `{}`; pass the pod's as the first argument",
            namespace.kind
        );
    }
    let (name, spec, metadata, outer) = template(pod)?;
    let of_namespace = namespace.as_ref().and_then(|namespace| namespace.metadata.name.clone());
    let said = metadata.namespace.clone().or(outer);
    if let (Some(said), Some(other)) = (&said, &of_namespace)
        && said != other
    {
        bail!(
            "the pod is in namespace {said}, and --namespace is the manifest of {other}; pass that of {said}"
        );
    }
    let in_namespace = said.or(of_namespace).unwrap_or_else(|| "default".to_owned());
    if namespace.is_none() {
        notes.push(format!(
            "namespace {in_namespace} is taken to say nothing; --namespace NS.yaml tells what it says"
        ));
    }
    let facts = namespace.map_or_else(NamespaceFacts::default, |namespace| NamespaceFacts {
        labels: namespace.metadata.labels.unwrap_or_default(),
        annotations: namespace.metadata.annotations.unwrap_or_default(),
    });
    let (annotations, labels) =
        (metadata.annotations.unwrap_or_default(), metadata.labels.unwrap_or_default());
    let described = Pod {
        name: Some(&name),
        namespace: Some(&in_namespace),
        host_network: spec.host_network,
        annotations: Some(&annotations),
        labels: Some(&labels),
        namespace_facts: Some(&facts),
    };
    let workload = conf.workload()?;
    let mut rules = conf.rules(Some(&workload));
    if conf.default == Some(Silent::Ask) {
        notes.push(
            "the plugin's default is `ask`: the agent decides about a pod that says nothing".to_owned(),
        );
    } else {
        rules.default = rules.default.or(Some(Injection::Disabled));
    }
    let verdict = decide(&described, &rules)?;
    if verdict.decision != Decision::Meshed {
        return Ok(Explanation { verdict, notes, who: None, redirect: None });
    }
    let who = membership(&described, &rules)?;
    let intent = conf.intent(Some(&annotations))?;
    let plan = compile(Some(&intent))?;
    let rendered = ursa_init::nft::render(&plan);
    Ok(Explanation { verdict, notes, who: Some(who), redirect: Some((intent, rendered)) })
}

/// The pod that an object is, or makes: its name, specification and metadata, and the namespace of its maker.
fn template(object: Manifest) -> anyhow::Result<(String, Spec, Metadata, Option<String>)> {
    let made = |metadata: &Metadata| {
        let made = metadata.generate_name.as_ref().map(|prefix| format!("{prefix}xxxxx"));
        metadata.name.clone().or(made)
    };
    if object.kind == "Pod" {
        let name = made(&object.metadata)
            .ok_or_else(|| anyhow!("the Pod has no metadata.name; give it one, or a generateName"))?;
        return Ok((name, object.spec, object.metadata, None));
    }
    match object.spec.template {
        Some(template) => {
            let maker = made(&object.metadata).unwrap_or_default();
            Ok((format!("{maker}-xxxxx"), template.spec, template.metadata, object.metadata.namespace))
        }
        None => bail!(
            "expected a Pod, or something with a pod template such as a Deployment, and got {}; pass one document \
             with `kind: Pod`",
            if object.kind.is_empty() {
                "an object without `kind`".to_owned()
            } else {
                format!("a {}", object.kind)
            }
        ),
    }
}

impl Explanation {
    fn to_text(&self) -> String {
        let mut out = String::new();
        let word = match self.verdict.decision {
            Decision::Meshed => "yes",
            Decision::Unmeshed => "no",
            Decision::Undecided => "undecided",
        };
        let _ = writeln!(out, "meshed: {word}\nbecause: {}", self.verdict.reason);
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        if let Some(who) = &self.who {
            let _ = writeln!(
                out,
                "mesh: {}\nidentity: workload {}\ndataplane: {}",
                who.mesh, who.workload, who.dataplane
            );
        }
        if let Some((_, rules)) = &self.redirect {
            let _ = writeln!(out, "redirect, in the pod's network namespace:");
            for rule in rules {
                let _ = writeln!(out, "  {rule}");
            }
        }
        out
    }

    fn to_json(&self) -> Value {
        json!({
            "decision": self.verdict.decision,
            "source": self.verdict.source,
            "reason": self.verdict.reason,
            "notes": self.notes,
            "membership": self.who,
            "redirect": self.redirect.as_ref().map(|(intent, _)| intent),
            "rules": self.redirect.as_ref().map(|(_, rules)| rules),
        })
    }
}

fn text_of(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).context("can't read standard input")
    } else {
        std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))
    }
}

fn manifest(path: &Path) -> anyhow::Result<Manifest> {
    ursa_model::yaml::from_str(&text_of(path)?)
        .with_context(|| format!("{} is no manifest of one Kubernetes object", path.display()))
}

/// ursa-cni's part of a conflist.
fn network(path: &Path) -> anyhow::Result<NetConf> {
    let what = || format!("{} is no CNI configuration", path.display());
    let list: Value = serde_json::from_str(&text_of(path)?).with_context(what)?;
    let mut own = match list.get("plugins").and_then(Value::as_array) {
        None => list.clone(),
        Some(plugins) => {
            let is_ours = |plugin: &&Value| plugin.get("type").and_then(Value::as_str) == Some("ursa-cni");
            plugins.iter().find(is_ours).cloned().ok_or_else(|| {
                let types: Vec<_> = plugins.iter().filter_map(|plugin| plugin.get("type")?.as_str()).collect();
                anyhow!(
                    "{} chains {} and no ursa-cni: no pod of this network is meshed; `ursa-cni install` adds it",
                    path.display(),
                    types.join(", ")
                )
            })?
        }
    };
    for key in ["name", "cniVersion"] {
        if let (Some(value), Some(own)) = (list.get(key), own.as_object_mut()) {
            own.insert(key.to_owned(), value.clone());
        }
    }
    NetConf::read(&own.to_string()).with_context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Manifest {
        ursa_model::yaml::from_str(text).unwrap()
    }

    const WEB: &str = "kind: Pod\nmetadata: {name: web-0, namespace: shop, annotations: {kuma.io/sidecar-injection: \
                       \"true\", traffic.kuma.io/exclude-outbound-ports: \"5432\"}}\n";

    #[test]
    fn a_meshed_pod_is_explained_whole() {
        let found = explain(read(WEB), None, &NetConf::default()).unwrap();
        let text = found.to_text();
        for part in [
            "meshed: yes",
            "the pod's annotation",
            "mesh: default",
            "workload web-0-shop",
            "5432",
            "--namespace",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(found.to_json()["source"], "pod-annotation");
    }

    #[test]
    fn a_deployment_speaks_by_its_template_and_a_namespace_for_both() {
        let deployment = "kind: Deployment\nmetadata: {name: web, namespace: shop}\n\
                          spec: {template: {metadata: {labels: {app: web}}, spec: {hostNetwork: false}}}\n";
        let namespace =
            "kind: Namespace\nmetadata: {name: shop, labels: {kuma.io/sidecar-injection: enabled}}\n";
        let found = explain(read(deployment), Some(read(namespace)), &NetConf::default()).unwrap();
        assert_eq!(found.who.unwrap().dataplane, "web-xxxxx.shop");
        assert!(found.verdict.reason.contains("the namespace's label"));
        let host = deployment.replace("hostNetwork: false", "hostNetwork: true");
        let found = explain(read(&host), Some(read(namespace)), &NetConf::default()).unwrap();
        assert!(found.to_text().contains("meshed: no") && found.redirect.is_none());
    }

    #[test]
    fn mistakes_are_named() {
        let error = |pod: &str, namespace: Option<&str>| {
            explain(read(pod), namespace.map(read), &NetConf::default()).unwrap_err().to_string()
        };
        assert!(error("kind: Service\nmetadata: {name: a}\n", None).contains("a Service"));
        assert!(error(&WEB.replace("\"true\"", "\"yes\""), None).contains("`yes`"));
        assert!(error(WEB, Some("kind: Namespace\nmetadata: {name: other}\n")).contains("other"));
        assert!(error(WEB, Some(WEB)).contains("wants a Namespace"));
        assert!(error(&WEB.replace("5432", "http"), None).contains("exclude-outbound-ports"));
    }
}
