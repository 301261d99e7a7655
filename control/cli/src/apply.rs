//! `ursa apply`: files, folders, URLs and standard input; variables; many documents.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail};
use http::StatusCode;
use serde_json::Value;
use ursa_model::{Resource, ResourceKey, Scope};

use crate::args::{ApplyArgs, Global};
use crate::config::{ApiServer, Session};
use crate::output::{self, put, say};
use crate::resources::{collection, escape};

/// Everything is read and parsed before the first write, so a typo in the last document changes nothing.
pub(crate) async fn run(global: &Global, args: ApplyArgs) -> anyhow::Result<()> {
    let Some(file) = args.file else {
        bail!("required flag(s) \"file\" not set: -f FILE, a folder, a URL, or - for standard input")
    };
    let vars = variables(&args.vars)?;
    let mut documents = Vec::new();
    for text in read(global, &file).await? {
        documents.extend(split(&substitute(&text, &vars)));
    }
    if documents.is_empty() {
        bail!("no resource(s) passed to apply: {file} holds no document");
    }
    let (mut resources, mut broken) = (Vec::new(), 0);
    let mut known: BTreeMap<ResourceKey, usize> = BTreeMap::new();
    for (index, text) in documents.iter().enumerate() {
        let parsed = parse(text).and_then(|resource| match known.insert(resource.key(), index) {
            // Of two, the later would silently win over the earlier.
            Some(first) => Err(format!(
                "{} is in resource[{first}] already; rename or remove one of them",
                resource.key()
            )),
            None => Ok(resource),
        });
        match parsed {
            Ok(resource) => resources.push(resource),
            Err(message) => {
                broken += 1;
                eprintln!("resource[{index}]: failed to parse resource: {message}{}", unresolved(text));
            }
        }
    }
    if broken > 0 {
        bail!("failed to validate some resources: {broken} of {}; nothing was applied", documents.len());
    }
    for (index, resource) in resources.iter().enumerate() {
        for field in &resource.ignored {
            eprintln!(
                "Warning: resource[{index}]: {field} is no field of {} and is ignored",
                resource.descriptor.name
            );
        }
    }
    if args.dry_run {
        let texts: Result<Vec<String>, _> =
            resources.iter().map(|resource| output::to_yaml(&written(resource))).collect();
        put!("{}", texts?.join("---\n"));
        return Ok(());
    }
    let session = Session::open(global)?;
    meshes_exist(&session, &resources).await?;
    for (index, resource) in resources.iter().enumerate() {
        let written = put(&session, resource).await;
        if resources.len() == 1 {
            return written;
        }
        written.with_context(|| {
            let (all, rest) = (resources.len(), resources.len() - index - 1);
            format!("resource[{index}]: of {all}, {index} were applied, this one was refused, {rest} were not tried")
        })?;
    }
    Ok(())
}

/// A wrong mesh is found before the first write, not after half of the writes.
async fn meshes_exist(session: &Session, resources: &[Resource]) -> anyhow::Result<()> {
    let mut known: BTreeSet<&str> = BTreeSet::new();
    for (index, resource) in resources.iter().enumerate() {
        let mesh = resource.meta.mesh.as_str();
        if resource.descriptor.name == "Mesh" {
            known.insert(&resource.meta.name);
        } else if !mesh.is_empty() && known.insert(mesh) {
            let answer = session.api.send("GET", &format!("/meshes/{}", escape(mesh)), None).await?;
            if answer.status == StatusCode::NOT_FOUND {
                bail!(
                    "resource[{index}] is in mesh {mesh:?}, which doesn't exist and isn't created before it; nothing was \
                     applied. `ursa get meshes` lists those that exist"
                );
            }
            answer.success()?;
        }
    }
    Ok(())
}

/// A hint at variables that have no value: what they leave behind makes curious errors.
fn unresolved(text: &str) -> String {
    let names: BTreeSet<&str> = text
        .split("{{")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once("}}")?.0.trim()))
        .filter(|name| !name.is_empty() && !name.starts_with('.'))
        .filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)))
        .collect();
    names.into_iter().fold(String::new(), |said, name| {
        said + "\n  {{ " + name + " }} has no value; give it with --var " + name + "=…"
    })
}

/// Writes one resource and says what became of it.
pub(crate) async fn put(session: &Session, resource: &Resource) -> anyhow::Result<()> {
    let (kind, meta) = (resource.descriptor, &resource.meta);
    let path = format!("{}/{}", collection(kind, &meta.mesh), escape(&meta.name));
    let answer = session.api.send("PUT", &path, Some(&written(resource))).await?;
    let verb = if answer.status == StatusCode::CREATED { "Created" } else { "Updated" };
    let answer = answer.success().with_context(|| format!("{} {:?}", kind.name, meta.name))?;
    for warning in answer.json()?.get("warnings").and_then(Value::as_array).into_iter().flatten() {
        eprintln!("Warning: {}", warning.as_str().unwrap_or_default());
    }
    let mesh = if kind.scope == Scope::Mesh { meta.mesh.as_str() } else { "" };
    say!("resource type={:?} mesh={mesh:?} name={:?} {verb}", kind.name, meta.name);
    Ok(())
}

/// A resource without what the control plane computes.
pub(crate) fn written(resource: &Resource) -> Value {
    let mut body = resource.to_json();
    if let Value::Object(fields) = &mut body {
        for computed in ["kri", "snis", "creationTime", "modificationTime"] {
            fields.remove(computed);
        }
    }
    body
}

fn parse(text: &str) -> Result<Resource, String> {
    let resource = Resource::from_yaml(text).map_err(|error| {
        let manifest = text.lines().any(|line| line.starts_with("apiVersion:"));
        let hint = if manifest {
            "; this is a Kubernetes manifest, and a resource here has type, mesh, name and spec at its top"
        } else {
            ""
        };
        format!("{error}{hint}")
    })?;
    if resource.descriptor.scope == Scope::Mesh && resource.meta.mesh.is_empty() {
        return Err("mesh: cannot be empty".to_owned());
    }
    let violations: Vec<String> = resource
        .validate()
        .iter()
        .map(|violation| format!("{}: {}", violation.field, violation.message))
        .collect();
    if !violations.is_empty() {
        return Err(violations.join("; "));
    }
    Ok(resource)
}

async fn read(global: &Global, source: &str) -> anyhow::Result<Vec<String>> {
    if source == "-" {
        let text = std::io::read_to_string(std::io::stdin()).context("cannot read standard input")?;
        return Ok(vec![text]);
    }
    if source.starts_with("http://") || source.starts_with("https://") {
        return download(global, source).await.map(|text| vec![text]);
    }
    let path = std::path::Path::new(source);
    let read = |path: &std::path::Path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    if !path.is_dir() {
        return Ok(vec![read(path)?]);
    }
    let mut files: Vec<_> = std::fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
        .with_context(|| format!("cannot read the folder {source}"))?;
    files.retain(|path| {
        path.extension().is_some_and(|kind| ["yaml", "yml", "json"].iter().any(|k| kind == *k))
    });
    if files.is_empty() {
        bail!(
            "the folder {source} holds no file that ends in .yaml, .yml or .json; folders below it aren't read"
        );
    }
    files.sort();
    files.iter().map(|path| read(path)).collect()
}

async fn download(global: &Global, url: &str) -> anyhow::Result<String> {
    let (scheme, rest) = url.split_once("://").context("invariant: the caller has seen the scheme")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let server = ApiServer { url: format!("{scheme}://{host}"), ..ApiServer::default() };
    let api = crate::client::Api::of_files(server, global);
    let answer = api.send("GET", &format!("/{path}"), None).await?;
    if !answer.status.is_success() {
        bail!("{url} answers with status {}", answer.status.as_u16());
    }
    Ok(answer.text())
}

fn variables(pairs: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut vars = BTreeMap::new();
    for pair in pairs.iter().flat_map(|pairs| pairs.split(',')) {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("--var {pair:?} must be formatted as name=value"))?;
        vars.insert(name.trim().to_owned(), value.to_owned());
    }
    Ok(vars)
}

/// Replaces `{{ name }}`. What has no value stays, and the error that follows names the place.
fn substitute(text: &str, vars: &BTreeMap<String, String>) -> String {
    if vars.is_empty() {
        return text.to_owned();
    }
    let (mut result, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(start) = rest.find("{{") {
        let Some(length) = rest[start..].find("}}") else { break };
        let end = start + length + 2;
        result.push_str(&rest[..start]);
        match vars.get(rest[start + 2..end - 2].trim()) {
            Some(value) => result.push_str(value),
            None => result.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    result.push_str(rest);
    result
}

/// Splits at `---` lines and after a byte order mark, dropping documents without content.
fn split(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for line in text.trim_start_matches('\u{feff}').lines() {
        if line == "---" || line.starts_with("--- ") {
            documents.push(String::new());
        } else if let Some(document) = documents.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    let empty = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    documents.retain(|document| !document.lines().all(empty));
    documents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_and_unknown_ones_stay() {
        let vars = variables(&["a.b=1".to_owned(), "c=2,d=3".to_owned()]).unwrap();
        assert_eq!(substitute("{{ a.b }} {{c}} {{d}} {{ e }}", &vars), "1 2 3 {{ e }}");
        assert!(variables(&["x".to_owned()]).unwrap_err().to_string().contains("name=value"));
    }

    #[test]
    fn documents_are_split_and_empty_ones_dropped() {
        assert_eq!(split("---\na: 1\n---\n# nothing\n---\nb: 2\n"), ["a: 1\n", "b: 2\n"]);
        assert!(split("\n").is_empty());
        assert_eq!(split("\u{feff}a: 1\r\n---\r\nb: 2\r\n"), ["a: 1\n", "b: 2\n"]);
    }

    #[test]
    fn a_variable_without_a_value_is_named() {
        let text =
            "name: {{ name }}\nb: {{ zone.name }}\ntemplate: \"{{ .DisplayName }}.{{ label \\\"x\\\" }}\"\n";
        assert_eq!(
            unresolved(text),
            "\n  {{ name }} has no value; give it with --var name=…\n  {{ zone.name }} has no value; give it with --var zone.name=…"
        );
    }
}
