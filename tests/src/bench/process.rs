//! What the kernel says about a process, and on which processor it runs.

use std::time::Duration;

use anyhow::Context as _;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Processor time that a process has used, user and system, in the kernel's ticks of 10 ms.
pub fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The second field is the program's name in parentheses, and may hold anything.
    let rest = text.rsplit_once(')').map(|(_, rest)| rest).with_context(|| format!("{path}: {text:?}"))?;
    let ticks: Vec<u64> = rest.split_whitespace().skip(11).take(2).flat_map(str::parse).collect();
    let [user, system] = ticks[..] else { anyhow::bail!("{path} has no times: {text:?}") };
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100).unsigned_abs();
    Ok(Duration::from_nanos((user + system) * (1_000_000_000 / hertz)))
}

/// What it has used since it had used `before`.
pub fn cpu_since(pid: u32, before: Duration) -> anyhow::Result<Duration> {
    Ok(cpu(pid)?.saturating_sub(before))
}

/// A process's proportional share of memory, in KiB.
pub fn memory(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.and_then(|rest| rest.split_whitespace().next()).and_then(|n| n.parse().ok());
    number.with_context(|| format!("{path} has no Pss"))
}

/// Puts the calling thread, and every thread that it starts, on the second processor. The servers get the first
/// one ([`pinned`]), so that load and server don't take each other's time. Without a second one nothing is moved.
pub fn pin_load() -> bool {
    let two = sched_getaffinity(Pid::from_raw(0))
        .is_ok_and(|set| set.is_set(0).unwrap_or(false) && set.is_set(1).unwrap_or(false));
    let mut second = CpuSet::new();
    two && second.set(1).is_ok() && sched_setaffinity(Pid::from_raw(0), &second).is_ok()
}

/// A command that runs `program` on the first processor; `taskset` is part of util-linux, which every Debian has.
pub fn pinned(program: &std::path::Path, pin: bool) -> tokio::process::Command {
    let mut command = if pin {
        let mut command = tokio::process::Command::new("taskset");
        command.args(["-c", "0"]).arg(program);
        command
    } else {
        tokio::process::Command::new(program)
    };
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("URSA_") {
            command.env_remove(name);
        }
    }
    command.kill_on_drop(true);
    command
}

/// What machine this is, and how busy others keep it, in one line.
pub fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let models: Vec<&str> = cpuinfo
        .lines()
        .filter_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map(|(_, model)| model.trim())
        .collect();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "{} × {}, Linux {}, load average before the run {}",
        models.len(),
        models.first().unwrap_or(&"unknown processor"),
        kernel.trim(),
        load.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_time_and_memory() {
        let pid = std::process::id();
        let before = cpu(pid).unwrap();
        let start = std::time::Instant::now();
        while cpu(pid).unwrap() < before + Duration::from_millis(20) {
            assert!(start.elapsed() < Duration::from_secs(20), "a busy loop uses no time");
        }
        assert!(memory(pid).unwrap() > 100);
    }
}
