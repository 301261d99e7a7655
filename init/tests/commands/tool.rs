//! Running programs.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use crate::lab::Namespace;

/// `ursa-init` with none of the variables of whoever runs the tests.
pub(crate) fn init() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ursa-init"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("URSA_") || name.starts_with("KUMA_") || name == "SSH_CONNECTION" {
            command.env_remove(name);
        }
    }
    command
}

/// `ursa-init` with these arguments, and the namespace.
pub(crate) fn init_in(ns: &Namespace, args: &[&str]) -> Command {
    let mut command = init();
    command.args(args).arg("--netns").arg(ns.path());
    command
}

/// What a program did.
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) fn run(command: &mut Command) -> Done {
    done(command.output().unwrap())
}

/// Runs with a text as standard input.
pub(crate) fn run_with(command: &mut Command, input: &str) -> Done {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    done(child.wait_with_output().unwrap())
}

fn done(output: Output) -> Done {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Done { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
}

/// Must succeed; the standard output.
pub(crate) fn ok(command: &mut Command) -> String {
    let done = run(command);
    assert_eq!(done.code, 0, "{command:?}: {}{}", done.out, done.err);
    done.out
}

/// A program of the system, inside the namespace.
pub(crate) fn inside(ns: &Namespace, program: &str, args: &[&str], input: &str) -> Done {
    ns.run(|| run_with(Command::new(program).args(args), input))
}
