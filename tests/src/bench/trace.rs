//! What a program asks of the kernel, counted by strace. Unlike times these numbers are the same on every machine.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use anyhow::{Context as _, bail};

use super::space::Call;

/// What a program and its children did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// System calls.
    pub syscalls: u64,
    /// Programs started, itself not counted.
    pub execs: u64,
    /// Netlink messages sent.
    pub messages: u64,
    /// Their bytes.
    pub sent: u64,
    /// Bytes received by netlink.
    pub received: u64,
    /// Sockets for IPv4 or IPv6: an API server would be called through one.
    pub internet: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.syscalls += more.syscalls;
        self.execs += more.execs;
        self.messages += more.messages;
        self.sent += more.sent;
        self.received += more.received;
        self.internet += more.internet;
    }
}

/// Runs a program under strace in the calling thread's namespace; it must succeed. `scratch` is a folder for the
/// trace.
pub fn count(call: &Call, scratch: &Path) -> anyhow::Result<Counts> {
    let file = scratch.join("trace");
    let path = file.to_str().context("the scratch folder's name is no text")?;
    let mut args = ["-f", "-qq", "-v", "-s", "1", "-o", path].map(str::to_owned).to_vec();
    args.push(call.program.to_string_lossy().into_owned());
    args.extend(call.args.iter().cloned());
    let traced = Call { program: "strace".into(), args, ..call.clone() };
    traced.run().context("strace counts system calls: scripts/need-tools.sh installs it")?;
    let mut counts = Counts::default();
    for line in BufReader::new(File::open(&file)?).lines() {
        counts.take(&line?);
    }
    // The first one is strace's start of the program.
    if counts.execs == 0 {
        bail!("strace saw no program start");
    }
    counts.execs -= 1;
    Ok(counts)
}

impl Counts {
    /// Takes one line: `PID NAME(ARGUMENTS) = RESULT`, or its two halves when threads ran at the same time.
    fn take(&mut self, line: &str) {
        let Some((_, call)) = line.trim_start().split_once(' ') else { return };
        let call = call.trim_start();
        if call.starts_with("---") || call.starts_with("+++") {
            return;
        }
        let resumed = call.starts_with("<...");
        let name =
            if resumed { call.trim_start_matches("<... ").split(' ').next() } else { call.split('(').next() };
        let Some(name) = name else { return };
        self.syscalls += u64::from(!resumed);
        let result = call.rsplit_once(" = ").and_then(|(_, result)| result.split(' ').next()?.parse().ok());
        let bytes: u64 = result.unwrap_or_default();
        match name {
            "execve" | "execveat" => self.execs += u64::from(!resumed),
            "socket" => self.internet += u64::from(call.contains("AF_INET")),
            "sendto" | "sendmsg" if call.contains("{nlmsg_len=") => {
                self.messages += u64::try_from(call.matches("{nlmsg_len=").count()).unwrap_or_default();
                self.sent += bytes;
            }
            "recvfrom" | "recvmsg" if call.contains("{nlmsg_len=") => self.received += bytes,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_counted() {
        let mut counts = Counts::default();
        for line in [
            r#"12 execve("/x", ["x"], 0x7f /* 1 var */) = 0"#,
            "12 socket(AF_NETLINK, SOCK_DGRAM|SOCK_CLOEXEC, NETLINK_ROUTE) = 11",
            "12 sendto(4, [{nlmsg_len=20, nlmsg_type=0x1}, {nlmsg_len=12, nlmsg_type=0x2}], 32, 0, NULL, 0) = 32",
            "12 recvfrom(4, [{nlmsg_len=36, nlmsg_type=NLMSG_ERROR}, {error=0, msg={nlmsg_len=360}}], 65536, 0, NULL, NULL) = 36",
            "12 recvfrom(4, 0x7f406400ad60, 65536, MSG_DONTWAIT, NULL, NULL) = -1 EAGAIN (Resource temporarily unavailable)",
            "12 futex(0x7f, FUTEX_WAIT, 13, NULL <unfinished ...>",
            "13 socket(AF_INET6, SOCK_STREAM, IPPROTO_TCP) = 5",
            "12 <... futex resumed>) = 0",
            "13 +++ exited with 0 +++",
        ] {
            counts.take(line);
        }
        let expected = Counts { syscalls: 7, execs: 1, messages: 2, sent: 32, received: 36, internet: 1 };
        assert_eq!(counts, expected);
    }
}
