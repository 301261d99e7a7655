//! The backend on the real kernel, in namespaces that vanish with the test's threads.

use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::expr::{Expr, Verdict};
use super::ruleset::RuleDef;
use super::*;
use crate::intent::RedirectIntent;

/// Runs a test in an empty network namespace.
fn isolated<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("tests in network namespaces need root");
            test()
        };
        scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn plan() -> Plan {
    let document = r#"{"proxyUids":[5678,5679],"proxyGids":[7],"proxyMark":9,
        "inbound":{"excludePorts":[22,"8000-8100"],"excludeCidrs":["10.0.0.0/9","fd00::/7"]},
        "outbound":{"excludeUids":[33],"excludeCidrs":["10.1.2.0/23"]},
        "dns":{"capture":"resolvers","resolvers":["10.0.0.2","fd00::2"],"honourExcludeCidrs":true}}"#;
    Plan::compile(&serde_json::from_str::<RedirectIntent>(document).unwrap()).unwrap()
}

/// A table as another program might have it, with instructions that aren't ours.
fn foreign() -> Ruleset {
    let mut set = encode::ruleset(&plan(), &Cgroups::default(), Layout::Inet);
    set.rules.truncate(3);
    set.chains.truncate(2);
    set.rules.retain(|r| set.chains.iter().any(|c| c.name == r.chain));
    set.rules.push(RuleDef::new(&set.chains[0].clone(), not_ours([(2, 20), (1, 1)]), "not ours"));
    set
}

/// `meta cpu` isn't among our instructions: key 20 into register 1, in the order in which the kernel dumps it.
fn not_ours(attributes: [(u16, u32); 2]) -> Vec<Expr> {
    let mut cpu = Vec::new();
    for (kind, value) in attributes {
        cpu.extend_from_slice(&8u16.to_ne_bytes());
        cpu.extend_from_slice(&kind.to_ne_bytes());
        cpu.extend_from_slice(&value.to_be_bytes());
    }
    vec![Expr::Foreign("meta".to_owned(), cpu), Expr::Verdict(Verdict::Return)]
}

fn raw(kernel: &mut Kernel) -> Vec<(Vec<u8>, Vec<u8>)> {
    kernel.read().unwrap().unwrap().rules.into_iter().filter_map(|r| r.raw).collect()
}

#[test]
fn everything_reads_back_as_written() {
    isolated(|| {
        assert!(apply(&plan()).unwrap());
        assert_eq!(diff(&plan()).unwrap(), Vec::<String>::new());
        assert_eq!(read_back().unwrap().unwrap().lines(Counters::Hide), render(&plan()));
        assert!(!apply(&plan()).unwrap());
    });
}

#[test]
fn foreign_tables_stay_byte_identical() {
    isolated(|| {
        let mut other = Kernel::open("theirs").unwrap();
        assert!(apply_ruleset(&mut other, &foreign()).unwrap());
        let before = raw(&mut other);
        assert!(apply(&plan()).unwrap());
        assert_eq!(raw(&mut other), before);
        assert!(!apply(&plan()).unwrap());
        assert!(remove().unwrap());
        assert_eq!(raw(&mut other), before);
        assert!(read_back().unwrap().is_none());
    });
}

/// What the plan says, in a table for each family.
fn split() -> Ruleset {
    encode::ruleset(&plan(), &Cgroups::default(), Layout::Split)
}

#[test]
fn a_kernel_without_a_common_table_gets_two_in_one_batch() {
    isolated(|| {
        let mut kernel = Kernel::open(TABLE).unwrap();
        assert!(apply_ruleset(&mut kernel, &split()).unwrap());
        assert!(!apply_ruleset(&mut kernel, &split()).unwrap());
        // Compared as they are, not as they would be in one table.
        assert_eq!(diff(&plan()).unwrap(), Vec::<String>::new());
        let found = read_back().unwrap().unwrap();
        assert!(found.same_as(&split()));
        assert!(found.lines(Counters::Hide).iter().any(|line| line.starts_with("chain ip6 guard_out: ")));
        // It redirects in both families.
        crate::routes::ensure(&plan()).unwrap().finish().unwrap();
        for (any, vip) in [("127.0.0.1:15001", "241.0.0.7:80"), ("[::1]:15001", "[fd75:7273:6100::7]:80")] {
            let proxy = std::net::TcpListener::bind(any).unwrap();
            let app = std::net::TcpStream::connect(vip).unwrap();
            assert_eq!(proxy.accept().unwrap().1, app.local_addr().unwrap(), "{vip}");
        }
        // Where a common table is possible, it takes their place, and all of it goes.
        assert!(apply(&plan()).unwrap());
        assert_eq!(read_back().unwrap().unwrap().lines(Counters::Hide), render(&plan()));
        assert!(apply_ruleset(&mut kernel, &split()).unwrap());
        assert!(remove().unwrap());
        assert!(read_back().unwrap().is_none());
    });
}

type Edit = fn(&mut Ruleset);

#[test]
fn any_edit_is_a_difference_and_is_repaired() {
    let wanted = encode::ruleset(&plan(), &Cgroups::default(), Layout::Inet);
    let edits: [(&str, Edit); 5] = [
        ("a rule deleted", |set| drop(set.rules.remove(3))),
        ("two rules swapped", |set| set.rules.swap(1, 2)),
        ("a rule added", |set| set.rules.insert(0, foreign().rules.pop().unwrap())),
        ("a policy changed", |set| {
            let hook = set.chains.iter_mut().find_map(|c| c.hook.as_mut().filter(|h| h.kind == "filter"));
            hook.unwrap().policy = 0;
        }),
        ("everything deleted", |set| set.rules.clear()),
    ];
    for (what, edit) in edits {
        isolated(|| {
            apply(&plan()).unwrap();
            let mut kernel = Kernel::open(TABLE).unwrap();
            let mut edited = wanted.clone();
            edit(&mut edited);
            // The foreign rule belongs to the first chain of the plan.
            let first = edited.chains[0].name.clone();
            edited.rules.iter_mut().filter(|r| r.comment == "not ours").for_each(|r| r.chain = first.clone());
            let generation = kernel.generation().unwrap();
            assert!(
                matches!(kernel.replace(generation, Some(&wanted), Some(&edited)).unwrap(), Outcome::Done),
                "{what}"
            );
            assert!(!diff(&plan()).unwrap().is_empty(), "{what} must be seen");
            assert!(apply(&plan()).unwrap(), "{what} must be repaired");
            assert_eq!(diff(&plan()).unwrap(), Vec::<String>::new());
        });
    }
}

#[test]
fn an_edited_table_can_be_put_back_exactly() {
    isolated(|| {
        let mut kernel = Kernel::open(TABLE).unwrap();
        apply_ruleset(&mut kernel, &foreign()).unwrap();
        let (generation, old) = kernel.snapshot().unwrap().unwrap();
        let before = raw(&mut kernel);
        assert!(matches!(kernel.replace(generation, old.as_ref(), None).unwrap(), Outcome::Done));
        let generation = kernel.generation().unwrap();
        assert!(matches!(kernel.replace(generation, None, old.as_ref()).unwrap(), Outcome::Done));
        assert_eq!(raw(&mut kernel), before);
    });
}

#[test]
fn a_stale_generation_changes_nothing() {
    isolated(|| {
        let mut kernel = Kernel::open(TABLE).unwrap();
        let stale = kernel.generation().unwrap();
        apply(&plan()).unwrap();
        let before = raw(&mut kernel);
        assert!(matches!(kernel.replace(stale, None, Some(&foreign())).unwrap(), Outcome::Conflict));
        assert_eq!(raw(&mut kernel), before);
    });
}

#[test]
fn a_rule_that_the_kernel_refuses_changes_nothing() {
    isolated(|| {
        apply(&plan()).unwrap();
        let mut kernel = Kernel::open(TABLE).unwrap();
        let before = raw(&mut kernel);
        let mut wrong = encode::ruleset(&plan(), &Cgroups::default(), Layout::Inet);
        let chain = wrong.chains[0].clone();
        wrong.rules.push(RuleDef::new(&chain, vec![Expr::Verdict(Verdict::Goto("nowhere".to_owned()))], ""));
        let error = apply_ruleset(&mut kernel, &wrong).unwrap_err().to_string();
        assert!(error.contains("goto nowhere"), "{error}");
        assert_eq!(raw(&mut kernel), before);
    });
}

#[test]
fn what_reads_back_differently_is_an_error_and_the_old_rules_return() {
    isolated(|| {
        apply(&plan()).unwrap();
        let mut kernel = Kernel::open(TABLE).unwrap();
        let before = raw(&mut kernel);
        // The kernel takes this, but dumps its attributes in another order.
        let mut odd = encode::ruleset(&plan(), &Cgroups::default(), Layout::Inet);
        let chain = odd.chains[0].clone();
        odd.rules.push(RuleDef::new(&chain, not_ours([(1, 1), (2, 20)]), ""));
        match apply_ruleset(&mut kernel, &odd) {
            Err(Error::ReadBack { restored: true, differences }) => assert_eq!(differences.len(), 2),
            other => unreachable!("{other:?}"),
        }
        assert_eq!(raw(&mut kernel), before);
        assert_eq!(diff(&plan()).unwrap(), Vec::<String>::new());
    });
}

#[test]
fn a_program_that_writes_all_the_time_disturbs_nobody() {
    const WRITES: usize = 150;
    isolated(|| {
        let here = crate::netns::Netns::current().unwrap();
        thread::scope(|scope| {
            let theirs = scope.spawn(|| {
                here.run(|| {
                    let mut other = Kernel::open("theirs").unwrap();
                    let mut set = foreign();
                    for i in 0..WRITES {
                        set.rules[0].comment = format!("edition {i}");
                        // It starts over as often as it must, as any program does.
                        while apply_ruleset(&mut other, &set).is_err() {}
                    }
                    set
                })
            });
            let mut port = 15100;
            while !theirs.is_finished() {
                port = if port == 15100 { 15101 } else { 15100 };
                let document = format!(r#"{{"proxyUids":[1],"outbound":{{"port":{port}}}}}"#);
                let plan =
                    Plan::compile(&serde_json::from_str::<RedirectIntent>(&document).unwrap()).unwrap();
                apply(&plan).unwrap();
                assert_eq!(diff(&plan).unwrap(), Vec::<String>::new());
            }
            let last = theirs.join().unwrap().unwrap();
            assert!(Kernel::open("theirs").unwrap().read().unwrap().unwrap().same_as(&last));
        });
    });
}
