//! The peer's command line, answered by `ursa-init transparent-proxy`.

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::Value;
use ursa_init::intent::RedirectIntent;

/// The number of the proxy's user wherever the peer's data were made.
const PROXY: u32 = 5678;

/// One call.
#[derive(Debug, Default)]
pub(super) struct Kumactl {
    arguments: Vec<String>,
    stdin: String,
    /// Path in the arguments, and content.
    files: Vec<(String, String)>,
}

impl Kumactl {
    /// A call with these arguments, with or without `install transparent-proxy`.
    pub(super) fn of_arguments(arguments: &[String]) -> Self {
        let words = ["install", "transparent-proxy"];
        let arguments = arguments.iter().filter(|word| !words.contains(&word.as_str())).cloned();
        let mut call = Self { arguments: arguments.collect(), ..Self::default() };
        if !call.arguments.iter().any(|word| word == "--kuma-dp-user") {
            call.arguments.splice(0..0, ["--kuma-dp-user".to_owned(), PROXY.to_string()]);
        }
        call
    }

    /// A call as the corpus describes it.
    pub(super) fn of_input(input: &Value) -> Self {
        let arguments: Vec<String> = input["args"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        let file = |(path, content): (&String, &Value)| {
            (path.clone(), content.as_str().unwrap_or_default().to_owned())
        };
        Self {
            stdin: input["stdin"].as_str().unwrap_or_default().to_owned(),
            files: input["files"].as_object().into_iter().flatten().map(file).collect(),
            ..Self::of_arguments(&arguments)
        }
    }

    /// Lets the proxy be another user than the arguments say.
    pub(super) fn run_proxy_as(&mut self, user: &str) {
        let at = self.arguments.iter().position(|word| word == "--kuma-dp-user");
        if let Some(value) = at.and_then(|at| self.arguments.get_mut(at + 1)) {
            user.clone_into(value);
        }
    }

    /// The redirect that it asks for, or what it is told.
    pub(super) fn intent(&self) -> Result<RedirectIntent, String> {
        let text = |error: std::io::Error| error.to_string();
        let folder = tempfile::tempdir().map_err(text)?;
        let mut arguments = self.arguments.clone();
        for (i, (path, content)) in self.files.iter().enumerate() {
            // The corpus' own paths are the machine's.
            let own = folder.path().join(i.to_string());
            std::fs::write(&own, content).map_err(text)?;
            for argument in arguments.iter_mut().filter(|argument| *argument == path) {
                *argument = own.display().to_string();
            }
        }
        let program = std::env::current_exe().map_err(text)?.with_file_name("ursa-init");
        let mut command = Command::new(&program);
        command.arg("transparent-proxy").args(arguments).arg("--print-config").env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            format!("{}: {error}; `cargo build --workspace --bins` builds it", program.display())
        })?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that doesn't read its input closes it.
            let _ = stdin.write_all(self.stdin.as_bytes());
        }
        let output = child.wait_with_output().map_err(text)?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let document = String::from_utf8_lossy(&output.stdout);
        ursa_init::yaml::from_str(&document).map_err(|error| format!("{error}\n{document}"))
    }
}
