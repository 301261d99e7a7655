//! A kubeconfig for plugins of others that need one. Ours needs none.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

/// Where an API server is, and who asks it.
#[derive(Debug, Clone, Copy)]
pub struct Kubeconfig<'a> {
    /// Name of the user.
    pub name: &'a str,
    /// `https`, unless there is a reason.
    pub protocol: &'a str,
    /// A name or an address; IPv6 without brackets.
    pub host: &'a str,
    /// Its port.
    pub port: &'a str,
    /// Its CA, as PEM.
    pub ca: &'a [u8],
    /// The user's token.
    pub token: &'a str,
}

impl Kubeconfig<'_> {
    /// As YAML.
    pub fn render(&self) -> String {
        let host = if self.host.contains(':') && !self.host.starts_with('[') {
            format!("[{}]", self.host)
        } else {
            self.host.to_owned()
        };
        // JSON's quotes are YAML's; what needs none stays readable.
        let quoted = |text: &str| {
            let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:/[]".contains(c))
                && !text.ends_with(':')
                && !matches!(
                    text.to_ascii_lowercase().as_str(),
                    "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n"
                );
            if plain { text.to_owned() } else { json!(text).to_string() }
        };
        let (name, context) = (quoted(self.name), quoted(&format!("{}-context", self.name)));
        let server = quoted(&format!("{}://{host}:{}", self.protocol, self.port));
        let mut out = String::from("apiVersion: v1\nkind: Config\nclusters:\n- name: local\n  cluster:\n");
        let _ = writeln!(out, "    server: {server}");
        let _ = writeln!(out, "    certificate-authority-data: {}", json!(STANDARD.encode(self.ca)));
        let _ = writeln!(out, "users:\n- name: {name}\n  user:\n    token: {}", json!(self.token));
        let _ =
            writeln!(out, "contexts:\n- name: {context}\n  context:\n    cluster: local\n    user: {name}");
        let _ = write!(out, "current-context: {context}");
        out
    }
}
