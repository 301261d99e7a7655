//! What is done by the agent's program: the same command does the same, whichever of the two is typed.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io::{PipeReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;

use anyhow::Context as _;

/// How a ticket begins.
const TICKET: &str = "ursa1.";

/// The agent of the same installation, else whichever is in the path.
pub(crate) fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("ursa-agent")));
    beside.filter(|path| path.exists()).unwrap_or_else(|| "ursa-agent".into())
}

/// A standard input that holds this: an argument would be shown by a process list.
pub(crate) fn hidden(secret: &str) -> anyhow::Result<PipeReader> {
    let (read, mut write) = std::io::pipe().context("cannot make a pipe")?;
    write.write_all(secret.as_bytes()).context("cannot pass the ticket on")?;
    Ok(read)
}

/// The agent's arguments if the command line joins a service.
pub(crate) fn service_join(args: impl Iterator<Item = OsString>) -> Option<Vec<OsString>> {
    let args: Vec<OsString> = args.skip(1).collect();
    let text = |arg: &OsString| arg.to_string_lossy().into_owned();
    let joins = args.first().is_some_and(|verb| verb == "join");
    let service = args.iter().map(text).any(|arg| arg == "--unit" || arg.starts_with("--unit="));
    (joins && service).then_some(args)
}

/// A verb and what follows it.
pub(crate) fn named(verb: &str, args: Vec<OsString>) -> Vec<OsString> {
    std::iter::once(verb.into()).chain(args).collect()
}

/// The ticket among the arguments, in whose place stays `-`.
fn take_ticket(args: &mut [OsString]) -> Option<String> {
    let place = args.iter_mut().find(|arg| arg.to_string_lossy().starts_with(TICKET))?;
    Some(std::mem::replace(place, "-".into()).to_string_lossy().into_owned())
}

/// Becomes the agent's program.
pub(crate) fn exec(mut args: Vec<OsString>) -> anyhow::Result<Infallible> {
    let program = program();
    let mut command = std::process::Command::new(&program);
    if let Some(ticket) = take_ticket(&mut args) {
        command.stdin(hidden(&ticket)?);
    }
    Err(command.args(&args).exec()).with_context(|| {
        format!("cannot run {}: is the package ursa-agent installed on this machine?", program.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_services_join_is_the_agents() {
        let joins = |line: &str| service_join(words(line).into_iter());
        assert!(joins("ursa join ursa1.abc --unit web --port 8080").is_some());
        assert!(joins("ursa join --unit=web --slice ursa1.abc").is_some());
        assert!(joins("ursa join ursa1.abc").is_none());
        assert!(joins("ursa get --unit web").is_none());
    }

    #[test]
    fn no_ticket_is_an_argument() {
        let mut args = words("join --unit web ursa1.abc --port 1");
        assert_eq!(take_ticket(&mut args).as_deref(), Some("ursa1.abc"));
        assert_eq!(args, words("join --unit web - --port 1"));
        assert_eq!(take_ticket(&mut args), None);
    }
}
