//! Pods that come and go while something else happens.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context as _, ensure};

use super::{PodSpec, Runtime};
use crate::lab::machine::Machine;

/// Starts and stops pods in and outside the mesh, one of each at any moment, until it is told to stop.
#[derive(Debug, Default)]
pub struct Churn {
    over: AtomicBool,
    pods: AtomicUsize,
}

impl Churn {
    /// Runs `work` meanwhile. The first pod that doesn't start or stop is an error, however `work` ends.
    pub fn during<R: Runtime, T>(
        &self,
        machine: &Machine,
        runtime: &R,
        work: impl FnOnce(&Self) -> T,
    ) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let kinds: [fn(&str) -> PodSpec; 2] = [PodSpec::meshed, PodSpec::plain];
            let threads = kinds.map(|kind| scope.spawn(move || self.go_round(machine, runtime, kind)));
            // Also when `work` panics: the scope waits for the threads.
            let end = End(&self.over);
            let done = work(self);
            drop(end);
            for thread in threads {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok(done)
        })
    }

    /// How many pods have come and gone.
    pub fn count(&self) -> usize {
        self.pods.load(Ordering::Relaxed)
    }

    fn go_round<R: Runtime>(
        &self,
        machine: &Machine,
        runtime: &R,
        kind: fn(&str) -> PodSpec,
    ) -> anyhow::Result<()> {
        for number in 0.. {
            if self.over.load(Ordering::Relaxed) {
                break;
            }
            let spec = kind(&format!("churn-{number}")).sandbox();
            let name = format!("{}/{}", spec.namespace, spec.name);
            let pod = runtime.start(machine, &spec).with_context(|| format!("{name} doesn't start"))?;
            if !spec.meshed {
                let rules = pod.rules(machine)?;
                ensure!(rules.is_empty(), "{name} has rules: {}", rules.join("\n"));
            }
            runtime.remove(machine, &pod).with_context(|| format!("{name} doesn't end"))?;
            self.pods.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
