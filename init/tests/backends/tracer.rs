//! Ends a program, and what it started, at the n-th system call that any of its threads makes.
//!
//! `strace` counts per thread, and the threads that write rules make fewer calls than the one that waits for them; so
//! the tests count themselves.

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;

/// What a run was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It ended by itself, with that exit code, after so many stops.
    Itself { code: i32, stops: usize },
    /// It was killed.
    Killed,
}

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    /// The program alone; what it started goes on.
    Program,
    /// The program and what it started.
    Everybody,
}

/// Runs the program until the `at`-th stop. Every system call stops twice: before the kernel does it, and after.
pub(crate) fn run(mut command: Command, at: usize, victim: Victim) -> Ended {
    trace_me(&mut command);
    let child = command.spawn().unwrap();
    let pid = pid(child.id());
    // From here on the tracer reaps, and no handle may.
    drop(child);
    let mut alive = BTreeSet::from([pid]);
    let mut stops = 0;
    let mut end = None;
    let mut prepared = false;
    while !alive.is_empty() {
        let mut status = 0;
        let tid = wait(&mut status);
        if tid < 0 {
            break;
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            alive.remove(&tid);
            if tid == pid {
                let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -1 };
                end.get_or_insert(Ended::Itself { code, stops });
            }
            continue;
        }
        alive.insert(tid);
        let signal = libc::WSTOPSIG(status);
        let is_call = signal == libc::SIGTRAP | 0x80;
        if !prepared && tid == pid {
            prepared = true;
            let options = libc::PTRACE_O_TRACESYSGOOD
                | libc::PTRACE_O_TRACECLONE
                | libc::PTRACE_O_TRACEFORK
                | libc::PTRACE_O_TRACEVFORK
                | libc::PTRACE_O_EXITKILL;
            trace(libc::PTRACE_SETOPTIONS, tid, options);
        }
        if is_call && end.is_none() {
            stops += 1;
            if stops == at {
                end = Some(Ended::Killed);
                let victims: Vec<_> =
                    alive.iter().filter(|p| **p == pid || victim == Victim::Everybody).copied().collect();
                for victim in victims {
                    // A thread's id ends its whole process; one that is gone already doesn't matter.
                    let _ = nix::sys::signal::kill(
                        nix::unistd::Pid::from_raw(victim),
                        nix::sys::signal::Signal::SIGKILL,
                    );
                }
            }
        }
        // The stops of tracing itself are no signals for the program.
        let deliver = if is_call || matches!(signal, libc::SIGTRAP | libc::SIGSTOP) { 0 } else { signal };
        let on = if end.is_some() { libc::PTRACE_CONT } else { libc::PTRACE_SYSCALL };
        trace(on, tid, deliver);
    }
    end.unwrap_or(Ended::Itself { code: -1, stops })
}

fn pid(id: u32) -> i32 {
    i32::try_from(id).unwrap()
}

#[expect(unsafe_code, reason = "std has no other way to be traced from the first instruction on")]
fn trace_me(command: &mut Command) {
    // SAFETY: between fork and exec only one system call is made, which allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

#[expect(unsafe_code, reason = "nix's ptrace is a feature that nothing else needs")]
fn trace(request: libc::c_uint, tid: i32, data: c_int) {
    // SAFETY: none of these requests lets the kernel write into our memory. A thread that is gone is an error that
    // doesn't matter.
    let _ = unsafe { libc::ptrace(request, tid, 0, libc::c_long::from(data)) };
}

#[expect(unsafe_code, reason = "nix hides the flag that leaves the children of other tests alone")]
fn wait(status: &mut c_int) -> i32 {
    // SAFETY: the status is ours, and valid for the call.
    unsafe { libc::waitpid(-1, status, libc::__WALL | libc::__WNOTHREAD) }
}
