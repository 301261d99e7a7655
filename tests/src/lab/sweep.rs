//! Removes a lab whose test could not: one that was killed, or interrupted from the keyboard.

use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;

use super::{Lab, machine, wait};

/// What the sweeper is told when there is nothing to remove.
const KEEP: &str = "keep";

/// A process that outlives the test for as long as removing takes.
#[derive(Debug)]
pub(super) struct Sweeper {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Sweeper {
    /// Starts it for the lab of this prefix.
    pub(super) fn start(app: &Path, prefix: &str) -> anyhow::Result<Self> {
        let mut child = Command::new(app)
            .args(["sweep", "--prefix", prefix])
            // The keyboard's signals are for the test.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {}", app.display()))?;
        Ok(Self { stdin: child.stdin.take(), child })
    }

    /// Lets the lab be.
    pub(super) fn dismiss(&mut self) {
        if let Some(stdin) = &mut self.stdin {
            let _ = stdin.write_all(KEEP.as_bytes());
        }
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.wait();
    }
}

/// What `lab-app sweep` does: waits for the end of its input, and removes what is left of the lab.
pub fn run(prefix: &str) -> anyhow::Result<()> {
    let mut told = String::new();
    std::io::stdin().read_to_string(&mut told)?;
    if told == KEEP {
        return Ok(());
    }
    // The lab's processes are ending, too.
    wait::until_every(Duration::from_millis(50), "a lab to be gone", Duration::from_secs(20), || {
        let mut problems = Lab::remove(prefix);
        problems.extend(machine::cgroups(prefix).iter().map(|dir| format!("{} is in use", dir.display())));
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    })
    .map(drop)
}
