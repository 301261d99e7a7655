//! `get` and `delete`, and how types are named on the command line.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use serde_json::Value;
use ursa_model::{Descriptor, Scope};

use crate::args::{DeleteArgs, Format, GetArgs, Global};
use crate::config::Session;
use crate::output::{self, say};

/// A type and whether it was named in the plural.
pub(crate) struct Kind {
    pub(crate) descriptor: &'static Descriptor,
    pub(crate) plural: bool,
}

/// The names of a type: its path is the plural (`meshservices`), its own name in lower case the singular;
/// hyphenated aliases (`global-secrets`, `global-secret`) as kumactl has them.
pub(crate) fn find(word: &str) -> anyhow::Result<Kind> {
    let word = word.to_lowercase();
    let plain = word.replace('-', "");
    for &descriptor in ursa_model::registry() {
        let path = descriptor.path.replace('-', "");
        if plain == path || word == descriptor.path {
            return Ok(Kind { descriptor, plural: true });
        }
        if plain == descriptor.name.to_lowercase() {
            return Ok(Kind { descriptor, plural: false });
        }
        // A short name is both: with a name one, without one all.
        if word == descriptor.short_name {
            return Ok(Kind { descriptor, plural: true });
        }
    }
    let mut known: Vec<&str> = ursa_model::registry().iter().map(|descriptor| descriptor.path).collect();
    known.sort_unstable();
    // Alike but for their last two letters.
    let alike = |path: &&&str| {
        let common = path.bytes().zip(plain.bytes()).take_while(|(a, b)| a == b).count();
        path.len() - common <= 2 && plain.len() - common <= 2
    };
    let near = known.iter().find(alike);
    let hint = near.map(|path| format!(" Did you mean {path:?}?")).unwrap_or_default();
    bail!("unknown TYPE {word:?}.{hint} Allowed values: {}", known.join(", "))
}

/// The path of a type's collection, in its mesh where it has one.
pub(crate) fn collection(descriptor: &Descriptor, mesh: &str) -> String {
    match descriptor.scope {
        Scope::Global => format!("/{}", descriptor.path),
        Scope::Mesh => format!("/meshes/{}/{}", escape(mesh), descriptor.path),
    }
}

/// Escapes a path segment or a query value.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// Adds `size` and `offset`.
pub(crate) fn paged(path: &str, size: Option<u32>, offset: Option<&str>) -> String {
    let mut query = Vec::new();
    if let Some(offset) = offset {
        query.push(format!("offset={}", escape(offset)));
    }
    if let Some(size) = size {
        query.push(format!("size={size}"));
    }
    if query.is_empty() { path.to_owned() } else { format!("{path}?{}", query.join("&")) }
}

/// Says how to go on where a list has a next page.
pub(crate) fn footer(list: &Value) {
    let next = list.get("next").and_then(Value::as_str).unwrap_or_default();
    let offset = next.split(['?', '&']).find_map(|part| part.strip_prefix("offset="));
    if let Some(offset) = offset {
        say!("\nRerun command with --offset={offset} argument to retrieve more resources");
    }
}

/// `ursa get`
pub(crate) async fn get(global: &Global, args: GetArgs) -> anyhow::Result<()> {
    let kind = find(&args.kind)?;
    let session = Session::open(global)?;
    let mesh = session.mesh(args.mesh.as_deref());
    let path = collection(kind.descriptor, &mesh);
    if kind.plural && args.names.is_empty() {
        let list = session.api.get(&paged(&path, args.size, args.offset.as_deref())).await?;
        if args.output != Format::Table {
            return output::document(args.output, &list);
        }
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        print_table(kind.descriptor, &items);
        footer(&list);
        return Ok(());
    }
    let plural = kind.descriptor.path;
    let [name] = args.names.as_slice() else {
        bail!(
            "accepts 1 arg(s), received {}: one {} is shown by `ursa get {} NAME`, all by `ursa get {plural}`",
            args.names.len(),
            kind.descriptor.name,
            kind.descriptor.name.to_lowercase(),
        );
    };
    let answer = session.api.send("GET", &format!("{path}/{}", escape(name)), None).await?;
    if answer.status == http::StatusCode::NOT_FOUND {
        // Whether it is the resource or its mesh that is missing, the server says.
        match kind.descriptor.scope {
            Scope::Mesh => {
                bail!("No resources found in {mesh} mesh ({}); see: ursa get {plural}", answer.detail())
            }
            Scope::Global => bail!("No resources found ({}); see: ursa get {plural}", answer.detail()),
        }
    }
    let resource = answer.success()?.json()?;
    if args.output == Format::Table {
        print_table(kind.descriptor, &[resource]);
        return Ok(());
    }
    output::document(args.output, &resource)
}

fn print_table(descriptor: &Descriptor, items: &[Value]) {
    let age = |item: &Value| output::ago(item.get("modificationTime"));
    let mesh = |item: &Value| output::text(item, "/mesh");
    let name = |item: &Value| output::text(item, "/name");
    match (descriptor.name, descriptor.scope) {
        ("Dataplane", _) => output::table(
            &["MESH", "NAME", "TAGS", "ADDRESS", "AGE"],
            items.iter().map(|item| {
                let address = output::text(item, "/networking/address");
                vec![mesh(item), name(item), output::labels(item), address, age(item)]
            }),
        ),
        (_, Scope::Mesh) => output::table(
            &["MESH", "NAME", "AGE"],
            items.iter().map(|item| vec![mesh(item), name(item), age(item)]),
        ),
        (_, Scope::Global) => {
            output::table(&["NAME", "AGE"], items.iter().map(|item| vec![name(item), age(item)]));
        }
    }
}

/// `ursa delete`
pub(crate) async fn delete(global: &Global, args: DeleteArgs) -> anyhow::Result<()> {
    let kind = find(&args.kind)?;
    let session = Session::open(global)?;
    let path = collection(kind.descriptor, &session.mesh(args.mesh.as_deref()));
    let answer = session.api.send("DELETE", &format!("{path}/{}", escape(&args.name)), None).await?;
    if answer.status == http::StatusCode::NOT_FOUND {
        let (what, plural) = (kind.descriptor.name, kind.descriptor.path);
        bail!("there is no {what} with name {:?} ({}); see: ursa get {plural}", args.name, answer.detail());
    }
    answer.success().with_context(|| format!("failed to delete {} {:?}", kind.descriptor.name, args.name))?;
    say!("deleted {} {:?}", kind.descriptor.name, args.name);
    Ok(())
}
