//! `ursa version`, and the warning where this program and the control plane are of different versions.

use serde_json::Value;

use crate::args::{Global, VersionArgs};
use crate::config::Session;
use crate::output::{self, say};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `ursa version`
pub(crate) async fn run(global: &Global, args: &VersionArgs) -> anyhow::Result<()> {
    say!("Client: Ursa {VERSION}");
    if args.detailed {
        // Whoever packages it says these when building; a plain build knows none of them.
        let known = |value: Option<&'static str>| value.unwrap_or("unknown");
        say!("  git tag: {}", known(option_env!("URSA_GIT_TAG")));
        say!("  git commit: {}", known(option_env!("URSA_GIT_COMMIT")));
        say!("  build date: {}", known(option_env!("URSA_BUILD_DATE")));
        say!("  target: {} {}", std::env::consts::ARCH, std::env::consts::OS);
    }
    let session = Session::open(global)?;
    match session.api.get("/").await {
        Ok(index) => {
            say!("Server: {} {}", output::text(&index, "/product"), output::text(&index, "/version"));
            if args.detailed {
                say!("  based on Kuma: {}", output::text(&index, "/basedOnKuma"));
                say!("  instance: {}", output::text(&index, "/instanceId"));
                say!("  cluster: {}", output::text(&index, "/clusterId"));
            }
        }
        Err(error) => {
            say!("Server: unavailable");
            eprintln!("Warning: {error:#}");
        }
    }
    Ok(())
}

/// Warns where the control plane is another program or version, as kumactl does. One that doesn't say is left to
/// the command, whose error tells more.
pub(crate) async fn check(global: &Global) {
    let Ok(session) = Session::open(global) else { return };
    if let Some(warning) = session.api.index().await.and_then(|index| differs(&index)) {
        eprintln!("WARNING: {warning}");
    }
}

fn differs(index: &Value) -> Option<String> {
    let (product, version) = (output::text(index, "/product"), output::text(index, "/version"));
    let differs = !version.is_empty() && (product != "Ursa" || version != VERSION);
    differs.then(|| format!("You are using ursa version {VERSION}, but the server is {product} {version}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_known_to_differ_is_warned_of() {
        assert_eq!(differs(&json!({"product": "Ursa", "version": VERSION})), None);
        assert_eq!(differs(&json!({"title": "Not found"})), None);
        for (product, version) in [("Ursa", "9.8.7"), ("Kuma", VERSION)] {
            let warning = differs(&json!({"product": product, "version": version})).unwrap();
            assert!(warning.contains(&format!("{product} {version}")), "{warning}");
        }
    }
}
