//! Back-off with jitter, so that a thousand nodes don't come back in the same millisecond.

use std::time::Duration;

use time::OffsetDateTime;

/// Grows from `base` to `cap`, and starts again after a success.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// A fresh one.
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, failures: 0 }
    }

    /// For connections to control: quick at first, because most interruptions are restarts.
    pub const fn connection() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(10))
    }

    /// The attempt succeeded.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait before the next attempt: between half and all of the current step.
    pub fn step(&mut self) -> Duration {
        let step = self.base.saturating_mul(1 << self.failures.min(16)).min(self.cap);
        self.failures = self.failures.saturating_add(1);
        step.mul_f64(0.5 + random_fraction() / 2.0)
    }

    /// Waits that long.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.step()).await;
    }
}

/// Waits until the clock on the wall says so. A long sleep would miss that the machine was suspended or that its
/// clock was set.
pub async fn until(unix: i64) {
    const LOOK: Duration = Duration::from_secs(60);
    while let Ok(seconds @ 1..) =
        u64::try_from(unix.saturating_sub(OffsetDateTime::now_utc().unix_timestamp()))
    {
        tokio::time::sleep(Duration::from_secs(seconds).min(LOOK)).await;
    }
}

/// Between 0 and 1.
pub fn random_fraction() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness everybody waits the same time, which is a worse evil than none.
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX),
        Err(_) => 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_the_cap_and_starts_again() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let steps: Vec<_> = (0..6).map(|_| backoff.step()).collect();
        assert!(steps[0] >= Duration::from_millis(50) && steps[0] <= Duration::from_millis(100));
        assert!(steps[5] >= Duration::from_millis(500) && steps[5] <= Duration::from_secs(1));
        backoff.reset();
        assert!(backoff.step() <= Duration::from_millis(100));
    }
}
