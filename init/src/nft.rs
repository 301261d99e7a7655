//! The nftables backend: one netlink batch, all or nothing, read back afterwards.
//!
//! The batch carries the generation that was read before; if another program commits meanwhile, the kernel
//! refuses it and we start over. So two Ursas, or Ursa and a firewall, never mix their work.

mod compat;
mod decode;
mod encode;
pub mod expr;
mod ruleset;
mod saved;
mod script;

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use crate::cgroup::Cgroups;
use crate::error::{Error, libc_errno};
use crate::netlink::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, Socket, Writer, attribute, be32, text,
};
use crate::plan::Plan;
use encode::Layout;
use ruleset::{ChainDef, HookDef, RuleDef, TableFamily, difference};

pub(crate) use compat::{holds_chains, works};
pub(crate) use ruleset::difference as text_difference;
pub use ruleset::{Counters, Ruleset};
pub use saved::{Saved, restore, save};
pub use script::script;

/// The name of our table; everything in it is ours, nothing outside it is.
pub const TABLE: &str = "ursa";

const NETLINK_NETFILTER: isize = 12;
/// In a request: all families.
const NFPROTO_UNSPEC: u8 = 0;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// Room for the batch of a usual plan, which has some 14 kB.
const BATCH: usize = 1 << 15;
const NFNL_BATCH_GENID: u16 = 1;

const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const GETGEN: u16 = 16;

/// How long we start over when others write at the same time: by the clock and not by tries, because a try
/// costs a tenth of a millisecond and somebody who loads a thousand rule sets takes longer than any count.
const PATIENCE: Duration = Duration::from_secs(2);

/// Counts tries until the patience is over; there is always a first.
fn attempts() -> impl Iterator<Item = usize> {
    let start = Instant::now();
    (1..).take_while(move |&attempt| attempt == 1 || start.elapsed() < PATIENCE)
}

/// Puts the plan's rules in place in the calling thread's network namespace; returns whether anything changed.
pub fn apply(plan: &Plan) -> Result<bool, Error> {
    let cgroups = Cgroups::resolve(plan);
    let mut kernel = Kernel::open(TABLE)?;
    match apply_ruleset(&mut kernel, &encode::ruleset(plan, &cgroups, Layout::Inet)) {
        // Nothing was changed. Kernels before 5.2 translate addresses only in a table of one family; and if that
        // isn't the reason, the second try fails as well and says why.
        Err(error) if error.is_unsupported() => {
            apply_ruleset(&mut kernel, &encode::ruleset(plan, &cgroups, Layout::Split)).map_err(|_| error)
        }
        done => done,
    }
}

fn apply_ruleset(kernel: &mut Kernel, wanted: &Ruleset) -> Result<bool, Error> {
    let mut tried = 0;
    for attempt in attempts() {
        tried = attempt;
        let Some((generation, found)) = kernel.snapshot()? else { continue };
        if found.as_ref().is_some_and(|found| found.same_as(wanted)) {
            return Ok(false);
        }
        match kernel.replace(generation, found.as_ref(), Some(wanted))? {
            Outcome::Conflict => continue,
            Outcome::Done => {}
        }
        let (after, now) = match kernel.snapshot() {
            Ok(Some(read)) => read,
            Ok(None) => continue,
            Err(error) => {
                // What can't be read can't be vouched for; if it can't be put back either, the error says enough.
                let _ = kernel.replace(generation.wrapping_add(1), Some(wanted), found.as_ref());
                return Err(error);
            }
        };
        if now.as_ref().is_some_and(|now| now.same_as(wanted)) {
            return Ok(true);
        }
        if after != generation.wrapping_add(1) {
            // Somebody wrote after us; what we read isn't the result of our batch.
            continue;
        }
        let lines = |set: Option<&Ruleset>| set.map(|s| s.lines(Counters::Hide)).unwrap_or_default();
        let differences = difference(&lines(now.as_ref()), &lines(Some(wanted)));
        let restored = matches!(kernel.replace(after, now.as_ref(), found.as_ref()), Ok(Outcome::Done));
        return Err(Error::ReadBack { differences, restored });
    }
    Err(Error::Contended { attempts: tried })
}

/// Removes our table from the calling thread's network namespace; returns whether there was one.
pub fn remove() -> Result<bool, Error> {
    let mut kernel = Kernel::open(TABLE)?;
    let mut tried = 0;
    for attempt in attempts() {
        tried = attempt;
        let Some((generation, found)) = kernel.snapshot()? else { continue };
        if found.is_none() {
            return Ok(false);
        }
        if let Outcome::Done = kernel.replace(generation, found.as_ref(), None)? {
            return Ok(true);
        }
    }
    Err(Error::Contended { attempts: tried })
}

/// Reads our table; `None` when there is none.
pub fn read_back() -> Result<Option<Ruleset>, Error> {
    Kernel::open(TABLE)?.read()
}

/// The differences between the kernel (`-`) and the plan (`+`).
pub fn diff(plan: &Plan) -> Result<Vec<String>, Error> {
    let found = read_back()?.unwrap_or_default();
    let wanted = encode::ruleset(plan, &Cgroups::resolve(plan), Layout::of(&found));
    let lines = difference(&found.lines(Counters::Hide), &wanted.lines(Counters::Hide));
    // The text could hide what the bytes show.
    if lines.is_empty() && !found.same_as(&wanted) && !wanted.chains.is_empty() {
        return Ok(vec!["- rules that read the same but have other bytes".to_owned()]);
    }
    Ok(lines)
}

/// The plan as the text of nftables rules, without touching any kernel.
pub fn render(plan: &Plan) -> Vec<String> {
    encode::ruleset(plan, &Cgroups::default(), Layout::Inet).lines(Counters::Hide)
}

/// What became of a batch.
enum Outcome {
    Done,
    /// Another program committed meanwhile; nothing was changed.
    Conflict,
}

struct Kernel {
    socket: Socket,
    table: &'static str,
}

/// A read of the kernel's state: its generation, and our table if there is one.
type Snapshot = (u32, Option<Ruleset>);

impl Kernel {
    fn open(table: &'static str) -> Result<Self, Error> {
        let socket =
            Socket::open(NETLINK_NETFILTER).map_err(|e| Error::nf_tables("open a netfilter socket", e))?;
        Ok(Self { socket, table })
    }

    fn read(&mut self) -> Result<Option<Ruleset>, Error> {
        let mut tried = 0;
        for attempt in attempts() {
            tried = attempt;
            if let Some((_, found)) = self.snapshot()? {
                return Ok(found);
            }
        }
        Err(Error::Contended { attempts: tried })
    }

    /// Reads our table at one generation; `None` when it changed during the read.
    fn snapshot(&mut self) -> Result<Option<Snapshot>, Error> {
        let before = self.generation()?;
        let Some(tables) =
            self.dump("read the tables", GETTABLE, NFPROTO_UNSPEC, |family, _| Some(family))?
        else {
            return Ok(None);
        };
        let tables: BTreeSet<_> = tables.into_iter().collect();
        if tables.is_empty() {
            return Ok(Some((before, None)));
        }
        let Some(chains) = self.dump("read the chains", GETCHAIN, NFPROTO_UNSPEC, chain)? else {
            return Ok(None);
        };
        let mut rules = Vec::new();
        // For a table by name the kernel stops at the first, of whatever family.
        for family in &tables {
            let Some(more) = self.dump("read the rules", GETRULE, *family as u8, rule)? else {
                return Ok(None);
            };
            rules.extend(more);
        }
        let found = Ruleset { tables, chains, rules };
        Ok((self.generation()? == before).then_some((before, Some(found))))
    }

    fn generation(&mut self) -> Result<u32, Error> {
        let mut get = Writer::default();
        get.message(nf(GETGEN), 0, &nfgen(NFPROTO_UNSPEC, 0), |_| {});
        let answer = self.ask("read nf_tables' generation", &get)?;
        if let Some(refusal) = answer.refusals.into_iter().next() {
            return Err(Error::nf_tables("speak nf_tables", refusal.error));
        }
        let generation =
            answer.messages.first().and_then(|m| attribute(m.payload.get(4..)?, 1)).and_then(be32);
        generation.ok_or_else(|| Error::Answer {
            what: "read nf_tables' generation".to_owned(),
            detail: "it holds no generation".to_owned(),
        })
    }

    /// Dumps objects of our table; `None` when they changed meanwhile.
    fn dump<T>(
        &mut self,
        what: &str,
        get: u16,
        family: u8,
        decode: impl Fn(TableFamily, &[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let mut writer = Writer::default();
        writer.message(nf(get), NLM_F_DUMP, &nfgen(family, 0), |a| a.text(1, self.table));
        let answer = self.ask(what, &writer)?;
        if answer.interrupted {
            return Ok(None);
        }
        if let Some(refusal) = answer.refusals.into_iter().next() {
            return match refusal.error.raw_os_error() {
                Some(libc_errno::ENOENT | libc_errno::EINTR) => Ok(None),
                _ => Err(Error::nf_tables(what, refusal.error)),
            };
        }
        let found = answer.messages.iter().filter_map(|m| {
            let family = TableFamily::from_number(*m.payload.first()?)?;
            let object = m.payload.get(4..)?;
            let name = attribute(object, 1).and_then(|name| name.split(|byte| *byte == 0).next());
            let ours = name == Some(self.table.as_bytes());
            ours.then(|| decode(family, object))?
        });
        Ok(Some(found.collect()))
    }

    /// Replaces our tables by `wanted` (removes them for `None`) in one batch. `found` is what was read at the
    /// generation: deleting what isn't there would fail, and would cost milliseconds of the kernel's time even
    /// where it is made to succeed.
    fn replace(
        &mut self,
        generation: u32,
        found: Option<&Ruleset>,
        wanted: Option<&Ruleset>,
    ) -> Result<Outcome, Error> {
        let tables = |set: Option<&Ruleset>| set.map_or(0, |set| set.tables.len());
        let before_chains = u32::try_from(2 + tables(found) + tables(wanted)).unwrap_or(u32::MAX);
        let batch = batch(self.table, generation, found, wanted);
        let answer = match self.socket.ask(&batch) {
            Ok(answer) => answer,
            // The kernel's answers didn't fit; the next read-back tells what became of the batch.
            Err(e) if e.raw_os_error() == Some(libc_errno::ENOBUFS) => return Ok(Outcome::Conflict),
            Err(e) => return Err(Error::nf_tables("send the rules", e)),
        };
        if let Some(refusal) = answer.refusals.into_iter().next() {
            if matches!(refusal.error.raw_os_error(), Some(libc_errno::ERESTART | libc_errno::EAGAIN)) {
                return Ok(Outcome::Conflict);
            }
            let what = match (wanted, refusal.message.checked_sub(before_chains)) {
                (None, _) => "remove table inet ursa".to_owned(),
                (Some(set), Some(index)) => {
                    let at = usize::try_from(index).unwrap_or(usize::MAX).checked_sub(set.chains.len());
                    match at.and_then(|i| set.rules.get(i)) {
                        Some(rule) => {
                            let modules: Vec<_> = rule.exprs.iter().filter_map(expr::Expr::module).collect();
                            let needs = match modules.as_slice() {
                                [] => String::new(),
                                modules => format!(", which needs {}", modules.join(" and ")),
                            };
                            format!("add the rule '{}' to table inet ursa{needs}", expr::line(&rule.exprs))
                        }
                        None => {
                            "add the chains of table inet ursa, which need nft_chain_nat and nf_tables_inet"
                                .to_owned()
                        }
                    }
                }
                (Some(_), None) => "write table inet ursa".to_owned(),
            };
            return Err(Error::nf_tables(what, refusal.error));
        }
        if !answer.acknowledged {
            return Err(Error::Answer {
                what: "write table inet ursa".to_owned(),
                detail: "it doesn't say whether the rules were taken".to_owned(),
            });
        }
        Ok(Outcome::Done)
    }

    /// Asks for what changes nothing.
    fn ask(&mut self, what: &str, writer: &Writer) -> Result<crate::netlink::Answer, Error> {
        let answer = match self.socket.ask(writer) {
            // A part of the answer was lost for want of room. A new socket holds none of it.
            Err(e) if e.raw_os_error() == Some(libc_errno::ENOBUFS) => {
                *self = Self::open(self.table)?;
                self.socket.ask(writer)
            }
            answer => answer,
        };
        answer.map_err(|e: io::Error| Error::nf_tables(what, e))
    }
}

/// Everything in one datagram; the last message that does something asks for the kernel's word.
fn batch(table: &str, generation: u32, found: Option<&Ruleset>, wanted: Option<&Ruleset>) -> Writer {
    let mut batch = Writer::with_capacity(BATCH);
    let subsystem = nfgen(NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES);
    let messages = |set: &Ruleset| set.tables.len() + set.chains.len() + set.rules.len();
    let mut left = found.map_or(0, |set| set.tables.len()) + wanted.map_or(0, messages);
    let mut ack = || {
        left -= 1;
        if left == 0 { NLM_F_ACK } else { 0 }
    };
    batch.message(BATCH_BEGIN, 0, &subsystem, |a| a.be32(NFNL_BATCH_GENID, generation));
    for family in found.iter().flat_map(|set| &set.tables) {
        batch.message(nf(DELTABLE), ack(), &nfgen(*family as u8, 0), |a| a.text(1, table));
    }
    if let Some(set) = wanted {
        for family in &set.tables {
            batch.message(nf(NEWTABLE), NLM_F_CREATE | ack(), &nfgen(*family as u8, 0), |a| {
                a.text(1, table);
            });
        }
        for chain in &set.chains {
            batch.message(nf(NEWCHAIN), NLM_F_CREATE | ack(), &nfgen(chain.family as u8, 0), |a| {
                a.text(1, table);
                a.text(3, &chain.name);
                if let Some(hook) = &chain.hook {
                    a.nested(4, |a| {
                        a.be32(1, hook.number);
                        a.bytes(2, &hook.priority.to_be_bytes());
                    });
                    a.be32(5, hook.policy);
                    a.text(7, &hook.kind);
                }
            });
        }
        for rule in &set.rules {
            let flags = NLM_F_CREATE | NLM_F_APPEND | ack();
            batch.message(nf(NEWRULE), flags, &nfgen(rule.family as u8, 0), |a| {
                a.text(1, table);
                a.text(2, &rule.chain);
                if let Some((exprs, user_data)) = &rule.raw {
                    a.nested_raw(4, exprs);
                    if !user_data.is_empty() {
                        a.bytes(7, user_data);
                    }
                } else {
                    a.nested(4, |list| rule.exprs.iter().for_each(|e| e.encode(list)));
                    a.bytes(7, &comment(&rule.comment));
                }
            });
        }
    }
    batch.message(BATCH_END, 0, &subsystem, |_| {});
    batch
}

/// A rule's comment as nft stores it: type 0, length, text with its zero.
fn comment(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(ruleset::COMMENT)];
    let mut bytes = vec![0, u8::try_from(text.len() + 1).unwrap_or(u8::MAX)];
    bytes.extend_from_slice(text);
    bytes.push(0);
    bytes
}

fn chain(family: TableFamily, payload: &[u8]) -> Option<ChainDef> {
    let hook = attribute(payload, 4).and_then(|hook| {
        Some(HookDef {
            kind: attribute(payload, 7).map(text)?,
            number: attribute(hook, 1).and_then(be32)?,
            priority: attribute(hook, 2).and_then(be32)?.cast_signed(),
            policy: attribute(payload, 5).and_then(be32)?,
        })
    });
    Some(ChainDef { family, name: attribute(payload, 3).map(text)?, hook })
}

fn rule(family: TableFamily, payload: &[u8]) -> Option<RuleDef> {
    let list = attribute(payload, 4).unwrap_or_default();
    let user_data = attribute(payload, 7).unwrap_or_default();
    RuleDef::dumped(family, attribute(payload, 2).map(text)?, list, user_data)
}

const fn nf(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

fn nfgen(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

#[cfg(test)]
mod tests;
