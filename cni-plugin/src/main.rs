//! `ursa-cni`: the runtime's calls, which have `CNI_COMMAND`, and people's commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    // A runtime passes no arguments; a call without either gets the specification's error.
    let by_runtime = std::env::var_os("CNI_COMMAND").is_some() || std::env::args_os().len() < 2;
    if by_runtime { ursa_cni::runtime::main() } else { ursa_cni::cli::main() }
}
