//! A network's configuration file, edited without touching a byte that isn't ours.
//!
//! Pure: text in, text out. What counts as a valid file is libcni's rule.

mod scan;

use std::ops::Range;

use serde_json::{Map, Value, json};

/// A plugin's configuration; its `type` says whose it is.
pub type Plugin = Map<String, Value>;

/// The version of a `.conf` that names none: the first that knows lists.
const FIRST_WITH_LISTS: &str = "0.3.0";

/// Why a file can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfError {
    /// No JSON at all.
    #[error("it is no JSON ({0}); comments aren't allowed in it")]
    Syntax(String),
    /// JSON, but no configuration.
    #[error("{0}")]
    Shape(String),
    /// A single plugin of a version without lists.
    #[error("its cniVersion {0} is older than lists of plugins (0.3.0), so nothing can be chained after it")]
    TooOld(String),
}

fn shape<T>(text: impl Into<String>) -> Result<T, ConfError> {
    Err(ConfError::Shape(text.into()))
}

fn document(text: &str) -> Result<Plugin, ConfError> {
    match serde_json::from_str(text) {
        Ok(Value::Object(document)) => Ok(document),
        Ok(_) => shape("it is JSON, but no object"),
        Err(error) => Err(ConfError::Syntax(error.to_string())),
    }
}

fn text_of<'a>(object: &'a Plugin, key: &str) -> Option<&'a str> {
    object.get(key)?.as_str().filter(|text| !text.is_empty())
}

/// A valid list of plugins (`.conflist`), and where its parts are.
#[derive(Debug, Clone)]
pub struct Conflist<'a> {
    text: &'a str,
    document: Plugin,
    elements: Vec<Range<usize>>,
}

impl<'a> Conflist<'a> {
    /// Reads a list as libcni does: a name, and at least one plugin, each with a type.
    pub fn parse(text: &'a str) -> Result<Self, ConfError> {
        let document = document(text)?;
        if text_of(&document, "name").is_none() {
            return shape("it has no `name`");
        }
        let Some(Value::Array(plugins)) = document.get("plugins") else {
            return shape("it has no list `plugins`");
        };
        if plugins.is_empty() {
            return shape("its list `plugins` is empty");
        }
        if let Some(i) = plugins.iter().position(|p| p.as_object().and_then(|p| text_of(p, "type")).is_none())
        {
            return shape(format!("plugin {} of its list `plugins` has no `type`", i + 1));
        }
        // Of a key that stands there twice, every parser takes the last.
        let members = scan::members(text, scan::start(text));
        let is_plugins = |key: &Range<usize>| {
            serde_json::from_str::<String>(&text[key.clone()]).is_ok_and(|key| key == "plugins")
        };
        let list = members.iter().rev().find(|member| is_plugins(&member.key));
        let elements = list.map(|list| scan::elements(text, list.value.start)).unwrap_or_default();
        if elements.len() != plugins.len() {
            return shape("its list `plugins` can't be located");
        }
        Ok(Self { text, document, elements })
    }

    /// The network's name.
    pub fn name(&self) -> &str {
        text_of(&self.document, "name").unwrap_or_default()
    }

    /// Its plugins, in order.
    pub fn plugins(&self) -> impl DoubleEndedIterator<Item = &Plugin> + ExactSizeIterator {
        let plugins = self.document.get("plugins").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        plugins.iter().map(|plugin| plugin.as_object().unwrap_or(&self.document))
    }

    /// The types of its plugins, in order.
    pub fn types(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.plugins().map(|plugin| text_of(plugin, "type").unwrap_or_default())
    }

    /// Every version that a runtime may choose: `cniVersion` and `cniVersions`. Empty when it names none.
    pub fn versions(&self) -> Vec<String> {
        let list = self.document.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
        let one = self.document.get("cniVersion").into_iter();
        let mut versions: Vec<_> =
            one.chain(list).filter_map(Value::as_str).filter(|v| !v.is_empty()).map(str::to_owned).collect();
        versions.sort();
        versions.dedup();
        versions
    }

    /// Whether a runtime that knows drop-in directories would read this network's.
    pub fn reads_drop_ins(&self) -> bool {
        match self.document.get("loadOnlyInlinedPlugins") {
            Some(Value::Bool(only)) => !only,
            Some(Value::String(only)) => only.eq_ignore_ascii_case("false"),
            _ => true,
        }
    }

    /// Our entries' places in the list.
    fn own(&self, own_type: &str) -> Vec<usize> {
        self.types().enumerate().filter(|(_, t)| *t == own_type).map(|(i, _)| i).collect()
    }

    /// Whether a plugin of this type is in the list.
    pub fn has(&self, own_type: &str) -> bool {
        self.types().any(|t| t == own_type)
    }

    /// Whether nothing but plugins of this type is in the list: it gives no pod an address.
    pub fn is_only(&self, own_type: &str) -> bool {
        self.types().all(|t| t == own_type)
    }

    /// The text with `plugin` as the last of the list, in place of every other of its type.
    pub fn with(&self, plugin: &Plugin) -> String {
        let own_type = text_of(plugin, "type").unwrap_or_default();
        let own = self.own(own_type);
        let count = self.elements.len();
        if own == [count - 1] {
            if self.plugins().next_back() == Some(plugin) {
                return self.text.to_owned();
            }
            let place = self.elements[count - 1].clone();
            let rendered = render(plugin, self.lead(count - 1));
            return [&self.text[..place.start], &rendered, &self.text[place.end..]].concat();
        }
        let cleaned = self.without(own_type).unwrap_or_else(|| self.text.to_owned());
        let Ok(list) = Conflist::parse(&cleaned) else { return self.text.to_owned() };
        let last = list.elements.len() - 1;
        let (lead, end) = (list.lead(last), list.elements[last].end);
        [&list.text[..end], ",", lead, &render(plugin, lead), &list.text[end..]].concat()
    }

    /// The text without plugins of this type; none when no other is left.
    ///
    /// What [`with`](Self::with) appended is gone to the byte.
    pub fn without(&self, own_type: &str) -> Option<String> {
        if self.is_only(own_type) {
            return None;
        }
        let own = self.own(own_type);
        let mut out = String::with_capacity(self.text.len());
        let mut from = 0;
        let first_kept = (0..self.elements.len()).find(|i| !own.contains(i))?;
        for i in own {
            // An entry goes with the comma before it; those at the front with the one behind them.
            let cut = if i < first_kept {
                self.elements[i].start..self.elements[i + 1].start
            } else {
                self.elements[i - 1].end..self.elements[i].end
            };
            out.push_str(&self.text[from..cut.start.max(from)]);
            from = cut.end;
        }
        out.push_str(&self.text[from..]);
        Some(out)
    }

    /// The white space before a plugin.
    fn lead(&self, i: usize) -> &'a str {
        let end = self.elements[i].start;
        let before = self.text[..end].trim_end_matches([' ', '\t', '\n', '\r']);
        &self.text[before.len()..end]
    }
}

/// A plugin as text that fits where `lead` precedes it.
fn render(plugin: &Plugin, lead: &str) -> String {
    let Some(newline) = lead.rfind('\n') else {
        return json!(plugin).to_string();
    };
    let indent = &lead[newline + 1..];
    let unit = match indent.len() {
        _ if indent.contains('\t') => "\t",
        0 => "  ",
        // Plugins stand two levels deep.
        n => &indent[..n.div_ceil(2)],
    };
    let line = if lead.contains("\r\n") { "\r\n" } else { "\n" };
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(unit.as_bytes());
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    if serde::Serialize::serialize(plugin, &mut serializer).is_err() {
        return json!(plugin).to_string();
    }
    // Line ends within strings are escaped, so each one here is the formatter's.
    String::from_utf8_lossy(&bytes).replace('\n', &format!("{line}{indent}"))
}

/// A valid single plugin (`.conf`).
#[derive(Debug, Clone)]
pub struct Conf<'a> {
    text: &'a str,
    document: Plugin,
}

impl<'a> Conf<'a> {
    /// Reads a single plugin as libcni does: it has a type.
    pub fn parse(text: &'a str) -> Result<Self, ConfError> {
        let document = document(text)?;
        if text_of(&document, "type").is_none() {
            let hint = if document.contains_key("plugins") {
                "; a list belongs into a file named .conflist"
            } else {
                ""
            };
            return shape(format!("it has no `type`{hint}"));
        }
        Ok(Self { text, document })
    }

    /// Its plugin's type.
    pub fn plugin_type(&self) -> &str {
        text_of(&self.document, "type").unwrap_or_default()
    }

    /// A list of it and `plugin`; `name` is the network's, by default its own.
    ///
    /// # Errors
    /// It is older than lists.
    pub fn with(&self, plugin: &Plugin, name: Option<&str>) -> Result<String, ConfError> {
        let version = text_of(&self.document, "cniVersion").unwrap_or(FIRST_WITH_LISTS);
        if matches!(version, "0.1.0" | "0.2.0") {
            return Err(ConfError::TooOld(version.to_owned()));
        }
        let Some(name) = name.or(text_of(&self.document, "name")) else {
            return shape("it has no `name`");
        };
        Ok(format!(
            "{{\n  \"cniVersion\": {},\n  \"name\": {},\n  \"plugins\": [\n    {},\n    {}\n  ]\n}}\n",
            json!(version),
            json!(name),
            self.text.trim(),
            render(plugin, "\n    "),
        ))
    }
}

/// A file of its own for `plugin` alone, which gives pods no address: only for those who attach it by name, as
/// Multus does.
pub fn standalone(plugin: &Plugin, name: Option<&str>, version: Option<&str>) -> String {
    let mut document = Map::new();
    if let Some(version) = version {
        document.insert("cniVersion".to_owned(), json!(version));
    }
    if let Some(name) = name {
        document.insert("name".to_owned(), json!(name));
    }
    document.extend(plugin.clone());
    format!("{:#}\n", Value::Object(document))
}

#[cfg(test)]
mod tests;
