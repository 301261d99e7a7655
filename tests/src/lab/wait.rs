//! Waiting for a condition.

use std::time::{Duration, Instant};

use anyhow::bail;

/// Asks again and again until `probe` has a value, and says how long that took. `probe` explains what it sees
/// meanwhile; the last explanation is in the error when `deadline` passes.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    probe: impl FnMut() -> Result<T, String>,
) -> anyhow::Result<(T, Duration)> {
    until_every(Duration::from_millis(2), what, deadline, probe)
}

/// As [`until`], for questions that cost something: with this long between an answer and the next question.
pub fn until_every<T>(
    interval: Duration,
    what: &str,
    deadline: Duration,
    mut probe: impl FnMut() -> Result<T, String>,
) -> anyhow::Result<(T, Duration)> {
    let start = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok((value, start.elapsed())),
            Err(seen) if start.elapsed() >= deadline => {
                bail!("expected {what} within {deadline:?}; seen: {seen}")
            }
            // What is waited for happens in other processes, which have no other way to tell.
            Err(_) => std::thread::sleep(interval),
        }
    }
}
