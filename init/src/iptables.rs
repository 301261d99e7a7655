//! The iptables backend, for kernels or policies without nf_tables: `iptables-restore`, one commit per table.
//!
//! A table is taken whole or not at all, but four tables and two families are as many commits. So the order is what
//! protects: what guards is committed before what redirects, and taken away after it; between two plans the guards
//! of both stand together. Every table that differs is written, and only those, and then read back.
//!
//! What differs from nftables: before the table `filter` iptables can't refuse, only discard, so the proxy's own
//! ports are silent towards the outside; a transparent proxy that isn't there discards instead of letting pass.

mod compile;
mod decode;
mod rule;
mod save;
mod snapshot;
mod text;
mod tools;

use std::fs::File;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::cgroup::{self, Cgroups};
use crate::error::{Error, Hint};
use crate::nft::text_difference;
use crate::plan::{Family, Plan};

pub use compile::Table;
use compile::{Rules, Tables};
pub(crate) use decode::held;
use save::Saved;
pub use snapshot::{Snapshot, restore, snapshot};
use tools::Tools;
pub use tools::Variant;

/// How long we wait for another Ursa in the same namespace, and start over when others write at the same time.
const PATIENCE: Duration = Duration::from_secs(10);

/// The name of the jumps' targets, one per built-in chain that we hook into.
pub(crate) const DISPATCHERS: [&str; 2] = ["URSA_IN", "URSA_OUT"];

/// A chain that stands for a moment; what is left of it goes with the next change.
const PROBE: &str = "URSA_PROBE";

/// The tables in which something guards.
const GUARDS: [Table; 3] = [Table::Raw, Table::Mangle, Table::Filter];
const REDIRECTS: [Table; 1] = [Table::Nat];

/// The plan as what `iptables-restore --noflush` takes in a namespace without rules of ours, per family and table, in
/// the order of their commits. Touches no kernel.
pub fn render(plan: &Plan) -> Result<Vec<(Family, Table, String)>, Error> {
    let mut out = Vec::new();
    for family in [Family::V4, Family::V6] {
        for (table, rules) in compile::tables(plan, family, &Cgroups::default())? {
            out.push((family, table, text::table(table, &Saved::default(), &rules)));
        }
    }
    out.sort_by_key(|(_, table, _)| *table == Table::Nat);
    Ok(out)
}

/// Puts the plan's rules in place in the calling thread's network namespace; returns whether anything changed.
pub fn apply(plan: &Plan, variant: Variant) -> Result<bool, Error> {
    let cgroups = Cgroups::resolve(plan);
    let kernel = Kernel::open(variant)?;
    let wanted = kernel.compile(plan, &cgroups)?;
    kernel.exclusively(|kernel| kernel.reach(&wanted))
}

/// Removes everything of ours; returns whether there was anything.
pub fn remove(variant: Variant) -> Result<bool, Error> {
    Kernel::open(variant)?.exclusively(|kernel| {
        let nothing = kernel.tools.families().map(|family| (family, Tables::new())).collect();
        kernel.reach(&Wanted { families: nothing })
    })
}

/// What is in place, one line per chain and rule.
pub fn show(variant: Variant) -> Result<Vec<String>, Error> {
    let kernel = Kernel::open(variant)?;
    Ok(kernel.read()?.iter().flat_map(|(family, saved)| save::lines(word(*family), &found(saved))).collect())
}

/// The differences between the kernel (`-`) and the plan (`+`).
pub fn diff(plan: &Plan, variant: Variant) -> Result<Vec<String>, Error> {
    let cgroups = Cgroups::resolve(plan);
    let kernel = Kernel::open(variant)?;
    let wanted = kernel.compile(plan, &cgroups)?;
    Ok(wanted.differences(&kernel.read()?, true))
}

/// Whether the programs of a kind are there, and hold rules: of ours, of others.
pub(crate) fn in_use(variant: Variant) -> Result<(bool, bool), Error> {
    let saved = Kernel::open(variant)?.read()?;
    Ok((saved.iter().any(|(_, s)| s.has_ours()), saved.iter().any(|(_, s)| s.has_foreign())))
}

const fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// The rules of every family of a namespace.
type State = Vec<(Family, Saved)>;

/// What a namespace is to hold.
struct Wanted {
    families: Vec<(Family, Tables)>,
}

impl Wanted {
    fn rules(&self, family: Family, table: Table) -> Rules {
        let tables = self.families.iter().find(|(f, _)| *f == family).map(|(_, tables)| tables);
        tables.and_then(|t| t.iter().find(|(t, _)| *t == table)).map(|(_, r)| r.clone()).unwrap_or_default()
    }

    fn differences(&self, state: &State, placed: bool) -> Vec<String> {
        let mut out = Vec::new();
        for (family, saved) in state {
            for table in Table::ALL {
                let wanted = self.rules(*family, table);
                if saved.holds(table, &wanted, placed) {
                    continue;
                }
                let lines = |rules: Rules| save::lines(word(*family), &vec![(table, rules)]);
                let text = |lines: Vec<String>| -> Vec<String> { lines.iter().map(|l| plain(l)).collect() };
                let lines = text_difference(&text(lines(saved.ours(table))), &text(lines(wanted)));
                if lines.is_empty() {
                    out.push(format!("- {} -t {table}: our jump isn't where it belongs", word(*family)));
                }
                out.extend(lines);
            }
        }
        out
    }

    fn without_comments(&self) -> Self {
        let strip = |(table, rules): &(Table, Rules)| (*table, text::without_comments(rules));
        let families = self.families.iter().map(|(f, tables)| (*f, tables.iter().map(strip).collect()));
        Self { families: families.collect() }
    }
}

/// A line that reads the same whoever printed it.
fn plain(line: &str) -> String {
    match line.split_once(" -A ").and_then(|(head, rest)| Some((head, rest.split_once(' ')?))) {
        Some((head, (chain, rule))) => {
            format!("{head} -A {chain} {}", save::canonical(rule, save::Comments::Compare).join(" "))
        }
        None => line.to_owned(),
    }
}

/// What is ours, as it is.
fn found(saved: &Saved) -> Tables {
    let ours = Table::ALL.into_iter().map(|table| (table, saved.ours(table)));
    ours.filter(|(_, rules)| !rules.is_empty()).collect()
}

/// What was there, as far as it can be written again: iptables takes no path of a cgroup that is gone, and nothing
/// matches it any more.
fn old_rules(state: &State) -> Wanted {
    let possible = |(table, rules)| (table, possible(rules));
    let of = |saved| found(saved).into_iter().map(possible).collect();
    Wanted { families: state.iter().map(|(family, saved)| (*family, of(saved))).collect() }
}

fn possible(rules: Rules) -> Rules {
    let root = cgroup::root().ok();
    rules
        .without_cgroups(|path| !root.as_ref().is_some_and(|root| root.join(path.trim_matches('/')).is_dir()))
}

struct Kernel {
    tools: Tools,
}

impl Kernel {
    fn open(variant: Variant) -> Result<Self, Error> {
        Ok(Self { tools: Tools::find(variant)? })
    }

    fn compile(&self, plan: &Plan, cgroups: &Cgroups) -> Result<Wanted, Error> {
        let one = |family| Ok((family, compile::tables(plan, family, cgroups)?));
        Ok(Wanted { families: self.tools.families().map(one).collect::<Result<_, Error>>()? })
    }

    fn read(&self) -> Result<State, Error> {
        self.tools.families().map(|family| Ok((family, Saved::parse(&self.tools.save(family)?)))).collect()
    }

    /// Runs `f` while no other Ursa writes into this namespace; the programs themselves lock one table at a time.
    fn exclusively<T: Send>(&self, f: impl FnOnce(&Self) -> Result<T, Error> + Send) -> Result<T, Error> {
        const LOCK: &str = "/proc/thread-self/ns/net";
        let failed = |e: std::io::Error| Error::kernel(format!("lock the network namespace by {LOCK}"), e);
        let mut file = File::open(LOCK).map_err(failed)?;
        let start = Instant::now();
        // Held until the end of this function; the namespace's file serves as nobody's but our lock, and leaves
        // nothing behind.
        let _lock = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((back, Errno::EWOULDBLOCK)) if start.elapsed() < PATIENCE => {
                    file = back;
                    // There is no event for a lock with a deadline.
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err((_, errno)) => {
                    let hint = Hint("another program holds it; `lslocks` names it");
                    let what = format!("lock the network namespace by {LOCK}");
                    return Err(Error::Kernel { what, hint, source: errno.into() });
                }
            }
        };
        tools::without_name_lookups(|| f(self))
    }

    /// From whatever is there to what is wanted. Returns whether anything changed.
    fn reach(&self, wanted: &Wanted) -> Result<bool, Error> {
        match self.reach_one(wanted) {
            Err(error @ Error::Iptables { .. }) if !self.takes_comments() => {
                self.reach_one(&wanted.without_comments()).map_err(|_| error)
            }
            done => done,
        }
    }

    /// Whether rules may have comments, tried with a chain that nothing leads to.
    fn takes_comments(&self) -> bool {
        let chain = format!("*raw\n:{PROBE} - [0:0]\n");
        let probe = format!("{chain}-A {PROBE} -m comment --comment probe -j RETURN\nCOMMIT\n");
        let taken = self.tools.restore(Family::V4, &probe).is_ok();
        taken && self.tools.restore(Family::V4, &format!("{chain}-X {PROBE}\nCOMMIT\n")).is_ok()
    }

    fn reach_one(&self, wanted: &Wanted) -> Result<bool, Error> {
        let start = Instant::now();
        loop {
            let before = self.read()?;
            if wanted.differences(&before, true).is_empty() {
                return Ok(false);
            }
            let Err(error) = self.write(&before, wanted) else {
                return self.read_back(&before, wanted).map(|()| true);
            };
            let now = match self.put_back(&before) {
                Ok(now) => now,
                Err(undo) => {
                    // The first error is the one to report.
                    tracing::warn!(undo = undo.with_causes(), "the previous rules could not be put back");
                    return Err(error);
                }
            };
            let changed = now.iter().zip(&before).any(|((_, now), (_, before))| now != before);
            if !changed || start.elapsed() > PATIENCE {
                return Err(error);
            }
            // Somebody wrote at the same time; what is read now may be written.
        }
    }

    /// Writes every table that differs, in the order that leaves no redirect without its guards.
    fn write(&self, before: &State, wanted: &Wanted) -> Result<(), Error> {
        // Guards of both plans while the old redirects are still there.
        let transition = |family, saved: &Saved, table| {
            let new = wanted.rules(family, table);
            if saved.ours(Table::Nat).is_empty() || saved.holds(table, &new, true) {
                return new;
            }
            save::union(&new, &possible(saved.ours(table)))
        };
        self.stage(before, &GUARDS, transition)?;
        self.stage(before, &REDIRECTS, |family, _, table| wanted.rules(family, table))?;
        let redirected = before.iter().any(|(_, saved)| !saved.ours(Table::Nat).is_empty());
        if redirected {
            let now = self.read()?;
            let backwards = [Table::Filter, Table::Mangle, Table::Raw];
            self.stage(&now, &backwards, |family, _, table| wanted.rules(family, table))?;
        }
        Ok(())
    }

    fn stage(
        &self,
        state: &State,
        tables: &[Table],
        wanted: impl Fn(Family, &Saved, Table) -> Rules,
    ) -> Result<(), Error> {
        for (family, saved) in state {
            let mut commits = String::new();
            for table in tables {
                let rules = wanted(*family, saved, *table);
                if !saved.holds(*table, &rules, true) {
                    commits.push_str(&text::table(*table, saved, &rules));
                }
            }
            if !commits.is_empty() {
                self.tools.restore(*family, &commits)?;
            }
        }
        Ok(())
    }

    /// Compares the kernel with what was written; what differs puts the old rules back.
    fn read_back(&self, before: &State, wanted: &Wanted) -> Result<(), Error> {
        // Others may have put theirs before ours meanwhile.
        let differences = wanted.differences(&self.read()?, false);
        if differences.is_empty() {
            return Ok(());
        }
        let restored = match self.put_back(before) {
            Ok(now) => old_rules(before).differences(&now, false).is_empty(),
            Err(error) => {
                tracing::warn!(error = error.with_causes(), "the previous rules could not be put back");
                false
            }
        };
        Err(Error::ReadBack { differences, restored })
    }

    /// Puts what was ours in place again, redirects that are new taken away first. Returns what is there then.
    fn put_back(&self, before: &State) -> Result<State, Error> {
        let old = old_rules(before);
        let now = self.read()?;
        if old.differences(&now, false).is_empty() {
            return Ok(now);
        }
        self.write(&now, &old)?;
        self.read()
    }
}

#[cfg(test)]
mod tests;
