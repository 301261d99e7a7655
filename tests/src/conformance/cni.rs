//! Group 05: what the installer makes of a runtime's configuration files.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use ursa_cni::install::conflist::{self, Conf, Conflist, Plugin};
use ursa_cni::install::directory::{ConfFile, Directory, Kind, is_conf, is_conflist};
use ursa_cni::install::kubeconfig::Kubeconfig;
use ursa_cni::install::plugin;

use super::deviations::{Does, arranged};
use super::{GroupReport, read_list};

const GROUP: &str = "05-cni";
/// The peer's plugin; the rules don't depend on its name.
const PEER: &str = "kuma-cni";

/// Judges all cases of the group; `corpus` is the root of the corpus.
pub fn run(corpus: &Path) -> GroupReport {
    let mut report = GroupReport::new(GROUP);
    let root = corpus.join(GROUP);
    let content = read_list(&root.join("cases.yaml"), &mut report);
    let cases = content.as_array().map_or(&[][..], Vec::as_slice);
    if cases.is_empty() && !content.is_null() {
        report.judged("cases.yaml", Some("expected a list of cases; found none".to_owned()));
    }
    for case in cases {
        let id = text(case, "id").to_owned();
        match text(case, "op") {
            "inject" => report.judged(&id, judge(inject(&root, case, &id))),
            "revert" => report.judged(&id, judge(revert(&root, case))),
            "install" => report.judged(&id, judge(install(&root, case))),
            "kubeconfig" => report.judged(&id, judge(kubeconfig(&root, case))),
            "find-conf" => {
                let found = Directory::read(&root.join(text(case, "dir"))).unwrap_or_default();
                let found = found.chosen(PEER).map(|file| file.name.clone()).unwrap_or_default();
                report.judged(&id, differs(&text(case, "expectedName").to_owned(), &found));
            }
            "check-install" => {
                let chained = case["chained"].as_bool().unwrap_or_default();
                let found = ConfFile::read(&root.join(text(case, "file"))).holds(PEER, chained);
                report.judged(&id, differs(&case["ok"], &json!(found)));
            }
            "is-conf" => report.judged(&id, is(case, is_conf(&root.join(text(case, "file"))))),
            "is-conflist" => report.judged(&id, is(case, is_conflist(&root.join(text(case, "file"))))),
            other => report.unsupported(&id, format!("op {other:?}")),
        }
    }
    report
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn judge(judged: Result<Option<String>, String>) -> Option<String> {
    judged.unwrap_or_else(Some)
}

fn is(case: &Value, found: bool) -> Option<String> {
    differs(&case["ok"], &json!(found))
}

fn differs<T: PartialEq + std::fmt::Debug>(expected: &T, found: &T) -> Option<String> {
    (expected != found).then(|| format!("expected {expected:?}\nfound    {found:?}"))
}

fn read(root: &Path, case: &Value, field: &str) -> Result<String, String> {
    let file = root.join(text(case, field));
    fs::read_to_string(&file).map_err(|error| format!("{field} {}: {error}", file.display()))
}

fn same_json(root: &Path, case: &Value, found: &str) -> Result<Option<String>, String> {
    let parse = |text: &str| serde_json::from_str::<Value>(text).map_err(|error| error.to_string());
    Ok(differs(&parse(&read(root, case, "expected")?)?, &parse(found)?))
}

/// The text with the plugin in it, as `ursa-cni install` writes it.
fn chain(input: &str, name: &str, plugin: &Plugin, network: Option<&str>) -> Result<String, String> {
    if Kind::of(name) == Some(Kind::Single) && Conf::parse(input).is_ok() {
        let conf = Conf::parse(input).map_err(|error| error.to_string())?;
        return conf.with(plugin, network).map_err(|error| error.to_string());
    }
    Ok(Conflist::parse(input).map_err(|error| error.to_string())?.with(plugin))
}

fn object(value: &Value, field: &str) -> Result<Plugin, String> {
    value[field].as_object().cloned().ok_or_else(|| format!("expected an object under {field:?}"))
}

fn inject(root: &Path, case: &Value, id: &str) -> Result<Option<String>, String> {
    let network = arranged(GROUP, id).find_map(|does| match does {
        Does::Flag("--network-name", name) => Some(name),
        _ => None,
    });
    let with = chain(&read(root, case, "input")?, text(case, "input"), &object(case, "plugin")?, network)?;
    same_json(root, case, &with)
}

fn revert(root: &Path, case: &Value) -> Result<Option<String>, String> {
    let input = read(root, case, "input")?;
    let list = Conflist::parse(&input).map_err(|error| error.to_string())?;
    let without = list.without(PEER).ok_or("nothing is left")?;
    same_json(root, case, &without)
}

fn install(root: &Path, case: &Value) -> Result<Option<String>, String> {
    let config = &case["config"];
    let entry = plugin::fill(&object(config, "template")?, &|mark| match mark {
        "KUBECONFIG_FILEPATH" => {
            Some(format!("{}/{}", text(config, "hostCniNetDir"), text(config, "kubeconfigName")))
        }
        other => {
            // `__LOG_LEVEL__` is `logLevel`.
            let flat = other.replace('_', "").to_lowercase();
            let value = config.as_object()?.iter().find(|(key, _)| key.to_lowercase() == flat)?.1;
            value.as_str().map(str::to_owned).or_else(|| Some(value.to_string()))
        }
    })?;
    let found = if config["chained"].as_bool().unwrap_or_default() {
        chain(&read(root, case, "input")?, text(config, "confName"), &entry, None)?
    } else {
        conflist::standalone(&entry, None, None)
    };
    same_json(root, case, &found)
}

fn kubeconfig(root: &Path, case: &Value) -> Result<Option<String>, String> {
    let config = &case["config"];
    let port = config["port"].as_u64().map(|port| port.to_string());
    let found = Kubeconfig {
        name: PEER,
        protocol: text(config, "protocol"),
        host: text(config, "host"),
        port: port.as_deref().unwrap_or(text(config, "port")),
        ca: text(config, "ca").as_bytes(),
        token: text(config, "token"),
    }
    .render();
    if let Some(wanted) = case["expectedContains"].as_str() {
        return Ok((!found.contains(wanted)).then(|| format!("expected {wanted}\nfound    {found}")));
    }
    let parse = |text: &str| ursa_model::yaml::from_str::<Value>(text).map_err(|error| error.to_string());
    Ok(differs(&parse(&read(root, case, "expected")?)?, &parse(&found)?))
}
