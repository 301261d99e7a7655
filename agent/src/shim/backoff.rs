//! How long to wait before something that ended is started again: Envoy by its shim, a shim by its launcher.

use std::time::Duration;

/// What served for this long has forgotten its earlier ends.
const HEALED: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(100);
/// For what had been live: its end has a cause outside, and each second is an outage.
const MAX_AFTER_LIVE: Duration = Duration::from_secs(1);
/// For what never was: it will most likely fail again.
const MAX_NEVER_LIVE: Duration = Duration::from_secs(10);

/// Counts ends in a row.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// After that many ends in a row.
    pub(crate) fn after(failures: u32) -> Self {
        Self { failures }
    }

    /// How many ends there were in a row.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// The delay before the next start; `live_for` is how long the last one had been live, if ever.
    pub(crate) fn next(&mut self, live_for: Option<Duration>) -> Duration {
        if live_for.is_some_and(|lived| lived >= HEALED) {
            self.failures = 0;
        }
        let max = if live_for.is_some() { MAX_AFTER_LIVE } else { MAX_NEVER_LIVE };
        let delay = match self.failures {
            // The first death of a live one costs nothing but its start.
            0 if live_for.is_some() => Duration::ZERO,
            failures => STEP.saturating_mul(1 << failures.min(10)).min(max),
        };
        self.failures += 1;
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_envoy_is_back_at_once_and_a_broken_one_is_left_alone_longer() {
        let mut backoff = Backoff::default();
        let short = Some(Duration::from_millis(50));
        let delays: Vec<_> = (0..6).map(|_| backoff.next(short).as_millis()).collect();
        assert_eq!(delays, [0, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.next(Some(HEALED)), Duration::ZERO);
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..9).map(|_| backoff.next(None).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    }
}
