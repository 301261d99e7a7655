//! From files, annotations, variables and flags to one redirect.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use serde_json::Value;

use super::Usage;
use super::fields::{FIELDS, Field, Kind};
use super::layers::{Layers, Source};
use super::parts::Parts;
use crate::intent::{Dns, DnsCapture, RedirectIntent, Workload, kuma};

const CONFIG: &str = "config";
const CONFIG_DIR: &str = "config-dir";
const ANNOTATIONS: &str = "annotations";
const RESOLV_CONF: &str = "resolv-conf";

/// The intent's sources. Precedence, lowest first: defaults, documents in the order given, annotations, variables,
/// flags. Lists that are given replace.
#[derive(Debug, Clone)]
pub(super) struct Options {
    configs: Vec<PathBuf>,
    /// Workloads, a file each, that are added to those of the document.
    config_dir: Option<PathBuf>,
    annotations: Option<PathBuf>,
    resolv_conf: PathBuf,
    given: Vec<Given>,
}

/// A field that a variable or a flag gives.
#[derive(Debug, Clone)]
struct Given {
    path: &'static str,
    source: Source,
    value: Value,
}

impl Args for Options {
    fn augment_args(command: Command) -> Command {
        let command = command
            .arg(
                Arg::new(CONFIG)
                    .long(CONFIG)
                    .short('c')
                    .env("URSA_REDIRECT")
                    .value_name("FILE")
                    .value_delimiter(',')
                    .action(ArgAction::Append)
                    .value_parser(value_parser!(PathBuf))
                    .help("The redirect's document, YAML or JSON, `-` for standard input; of several the later win"),
            )
            .arg(
                Arg::new(CONFIG_DIR)
                    .long(CONFIG_DIR)
                    .env("URSA_REDIRECT_DIR")
                    .value_name("DIR")
                    .value_parser(value_parser!(PathBuf))
                    .help(
                        "Workloads that share the namespace, one in each *.yaml there, beside those of the document (which \
                         needn't exist then)",
                    ),
            )
            .arg(
                Arg::new(ANNOTATIONS)
                    .long(ANNOTATIONS)
                    .env("URSA_ANNOTATIONS")
                    .value_name("FILE")
                    .value_parser(value_parser!(PathBuf))
                    .help("A pod's annotations as the downward API writes them, or its manifest: traffic.kuma.io/…"),
            )
            .arg(
                Arg::new(RESOLV_CONF)
                    .long(RESOLV_CONF)
                    .env("URSA_RESOLV_CONF")
                    .value_name("FILE")
                    .default_value("/etc/resolv.conf")
                    .value_parser(value_parser!(PathBuf))
                    .help("Where the resolvers of `--dns resolvers` are found"),
            );
        FIELDS.iter().fold(command, |command, field| command.arg(argument(field)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn argument(field: &'static Field) -> Arg {
    let kind = field.kind;
    let argument = Arg::new(field.flag)
        .long(field.flag)
        .env(field.variable)
        .value_name(field.value)
        .help(field.help)
        .help_heading(field.heading)
        .value_parser(move |text: &str| kind.parse(text));
    match field.kind {
        Kind::One(_) => argument.action(ArgAction::Set),
        Kind::Many(_) => argument.action(ArgAction::Append),
    }
}

impl FromArgMatches for Options {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for field in FIELDS {
            let Some(texts) = matches.get_many::<Vec<Value>>(field.flag) else { continue };
            let source = match matches.value_source(field.flag) {
                Some(ValueSource::EnvVariable) => Source::Variable(field.variable.to_owned()),
                _ => Source::Flag(field.flag.to_owned()),
            };
            let value = field.value(texts.flatten().cloned().collect());
            given.push(Given { path: field.path, source, value });
        }
        // `--dns` says two fields at once, so that a flag may stand beside a variable that says more.
        given.sort_by_key(|given| matches!(given.source, Source::Flag(_)));
        Ok(Self {
            configs: matches.get_many(CONFIG).into_iter().flatten().cloned().collect(),
            config_dir: matches.get_one(CONFIG_DIR).cloned(),
            annotations: matches.get_one(ANNOTATIONS).cloned(),
            resolv_conf: matches.get_one(RESOLV_CONF).cloned().unwrap_or_default(),
            given,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Options {
    /// Whether nothing at all was given.
    pub(super) fn is_empty(&self) -> bool {
        self.configs.is_empty()
            && self.config_dir.is_none()
            && self.annotations.is_none()
            && self.given.is_empty()
    }

    /// Whether a document comes from standard input, which can be read only once.
    pub(super) fn reads_stdin(&self) -> bool {
        self.configs.iter().any(|path| path.as_os_str() == "-")
    }

    /// The redirect, and where each of its fields comes from.
    pub(super) fn resolve(&self) -> anyhow::Result<(RedirectIntent, Layers)> {
        let (mut layers, parts) = self.read()?;
        let mut intent = layers.intent().context("the layers make no redirect document together")?;
        if let (Some(dir), Some(parts)) = (&self.config_dir, parts) {
            parts.add_to(&mut intent)?;
            layers.change(&intent, &Source::File(dir.display().to_string()));
        }
        self.complete(&mut intent)?;
        layers.change(&intent, &Source::Machine(self.resolv_conf.display().to_string()));
        Ok((intent, layers))
    }

    /// The redirect with those workloads of the directory that are right, and what is wrong with the others.
    /// `former` is what was in place.
    pub(super) fn resolve_what_fits(
        &self,
        former: &[Workload],
    ) -> anyhow::Result<(RedirectIntent, Vec<String>)> {
        let (layers, parts) = self.read()?;
        let mut intent = layers.intent().context("the layers make no redirect document together")?;
        let left_out = parts.map_or_else(Vec::new, |parts| parts.add_what_fits(&mut intent, former));
        self.complete(&mut intent)?;
        Ok((intent, left_out))
    }

    /// Whether workloads come from a directory.
    pub(super) const fn has_parts(&self) -> bool {
        self.config_dir.is_some()
    }

    /// Whether nobody is to be redirected: no workload is in the directory yet, and the document names no proxy.
    pub(super) fn is_idle(&self, intent: &RedirectIntent) -> bool {
        self.config_dir.is_some()
            && intent.workloads.is_empty()
            && intent.proxy_uids.is_empty()
            && intent.proxy_mark.is_none()
            && intent.proxy_gids.is_empty()
    }

    /// Everything but the directory's workloads, which come on top.
    fn read(&self) -> anyhow::Result<(Layers, Option<Parts>)> {
        let mut layers = Layers::default();
        for path in &self.configs {
            if self.config_dir.is_some() && matches!(path.try_exists(), Ok(false)) {
                continue;
            }
            let text = read(path)?;
            if text.lines().all(|line| line.trim().is_empty() || line.starts_with('#')) {
                continue;
            }
            // Typed first: its errors name line and column.
            let source = Source::File(path.display().to_string());
            let what = || format!("{source} is no redirect document (see --help)");
            let _: RedirectIntent = crate::yaml::from_str(&text).with_context(what)?;
            let document = crate::yaml::from_str(&text).with_context(what)?;
            layers.lay("", document, &source);
        }
        if let Some(path) = &self.annotations {
            let annotations = annotations(&read(path)?)
                .with_context(|| format!("{} holds no annotations", path.display()))?;
            let intent =
                kuma::from_annotations(&layers.intent()?, &annotations).map_err(crate::InvalidIntent)?;
            layers.change(&intent, &Source::Annotations(path.display().to_string()));
        }
        for given in &self.given {
            layers.lay(given.path, given.value.clone(), &given.source);
        }
        let parts = self.config_dir.as_deref().map(Parts::read).transpose()?;
        Ok((layers, parts))
    }

    fn complete(&self, intent: &mut RedirectIntent) -> anyhow::Result<()> {
        for dns in std::iter::once(&mut intent.dns).chain(intent.workloads.iter_mut().map(|w| &mut w.dns)) {
            self.find_resolvers(dns)?;
        }
        Ok(())
    }

    fn find_resolvers(&self, dns: &mut Dns) -> anyhow::Result<()> {
        if dns.enabled && dns.capture == DnsCapture::Resolvers && dns.resolvers.is_empty() {
            dns.resolvers = resolvers_in(&self.resolv_conf)?;
        }
        Ok(())
    }
}

/// A file, or standard input for `-`.
pub(super) fn read(path: &Path) -> anyhow::Result<String> {
    if path.as_os_str() == "-" {
        return std::io::read_to_string(std::io::stdin()).context("can't read standard input");
    }
    std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))
}

/// The resolvers that a `resolv.conf` names; without any there is nothing that could be captured.
pub(super) fn resolvers_in(path: &Path) -> anyhow::Result<Vec<IpAddr>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("can't read the resolvers in {}", path.display()))?;
    let found = resolvers(&text);
    if found.is_empty() {
        return Err(Usage(format!(
            "{} names no resolver: list them with --dns-resolvers, or redirect every lookup with --dns all",
            path.display()
        ))
        .into());
    }
    Ok(found)
}

fn resolvers(text: &str) -> Vec<IpAddr> {
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    // A zone (fe80::1%eth0) can't be matched by address alone.
    names.filter_map(|rest| rest.trim().parse().ok()).collect()
}

/// A pod's annotations: its manifest, a mapping, or the lines `key="value"` of the downward API.
fn annotations(text: &str) -> anyhow::Result<BTreeMap<String, String>> {
    if let Ok(Value::Object(document)) = crate::yaml::from_str::<Value>(text) {
        let annotations = match document.get("metadata") {
            Some(metadata) => metadata.get("annotations").cloned().unwrap_or_default(),
            None => Value::Object(document),
        };
        let Value::Object(annotations) = annotations else { return Ok(BTreeMap::new()) };
        let text = |value: Value| match value {
            Value::String(text) => text,
            other => other.to_string(),
        };
        return Ok(annotations.into_iter().map(|(key, value)| (key, text(value))).collect());
    }
    let line = |line: &str| {
        let (key, value) = line.split_once('=').with_context(|| format!("`{line}` isn't key=\"value\""))?;
        // The downward API quotes as Go does; for what annotations hold, that is JSON's quoting.
        let value: String = serde_json::from_str(value).with_context(|| format!("the value of {key}"))?;
        Ok((key.to_owned(), value))
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(line).collect()
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
