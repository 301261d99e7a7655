//! What iptables on nf_tables left in the kernel, asked without starting a program.

use super::{GETCHAIN, GETGEN, GETTABLE, NETLINK_NETFILTER, NFPROTO_UNSPEC, nf, nfgen};
use crate::error::{Error, libc_errno};
use crate::netlink::{NLM_F_DUMP, Socket, Writer, attribute, text};

/// The families in which iptables and ip6tables keep their tables.
const FAMILIES: [u8; 2] = [2, 10];

/// Whether this kernel has nf_tables. Without the rights to ask it counts as there: then its own error is the one
/// to show.
pub(crate) fn works() -> Result<bool, Error> {
    let mut socket = match Socket::open(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(e) if is_absent(&e) => return Ok(false),
        Err(e) => return Err(Error::nf_tables("open a netfilter socket", e)),
    };
    let mut get = Writer::default();
    get.message(nf(GETGEN), 0, &nfgen(NFPROTO_UNSPEC, 0), |_| {});
    match socket.ask(&get) {
        Ok(answer) => Ok(!answer.refusals.iter().any(|refusal| is_absent(&refusal.error))),
        Err(e) if is_absent(&e) => Ok(false),
        // Whoever had no room to say more is there.
        Err(e) if e.raw_os_error() == Some(libc_errno::ENOBUFS) => Ok(true),
        Err(e) => Err(Error::nf_tables("read nf_tables' generation", e)),
    }
}

/// Whether an error says that nf_tables, or a part of it, isn't in this kernel; netfilter answers `EINVAL` to a part
/// of it that it doesn't know.
fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc_errno::EPROTONOSUPPORT
                | libc_errno::EOPNOTSUPP
                | libc_errno::EAFNOSUPPORT
                | libc_errno::ENOENT
                | libc_errno::EINVAL
        )
    )
}

/// Whether one of the chains is in one of the tables, in iptables' families.
pub(crate) fn holds_chains(tables: &[&str], chains: &[&str]) -> Result<bool, Error> {
    let mut socket =
        Socket::open(NETLINK_NETFILTER).map_err(|e| Error::nf_tables("open a netfilter socket", e))?;
    // Where iptables never was, which is usual, there are no tables of its families, and one answer says so.
    let mut all = Writer::default();
    all.message(nf(GETTABLE), NLM_F_DUMP, &nfgen(NFPROTO_UNSPEC, 0), |_| {});
    let answer = socket.ask(&all).map_err(|e| Error::nf_tables("look for iptables' tables", e))?;
    let is_theirs = |payload: &[u8]| {
        let name = payload.get(4..).and_then(|object| attribute(object, 1)).map(text);
        payload.first().is_some_and(|family| FAMILIES.contains(family))
            && name.is_some_and(|name| tables.contains(&name.as_str()))
    };
    let complete = !answer.interrupted && answer.refusals.is_empty();
    if complete && !answer.messages.iter().any(|message| is_theirs(&message.payload)) {
        return Ok(false);
    }
    let mut get = Writer::default();
    for family in FAMILIES {
        for table in tables {
            for chain in chains {
                get.message(nf(GETCHAIN), 0, &nfgen(family, 0), |a| {
                    a.text(1, table);
                    a.text(3, chain);
                });
            }
        }
    }
    let what = "look for iptables' chains";
    let answer = match socket.ask(&get) {
        // A part of the answer was lost for want of room.
        Err(e) if e.raw_os_error() == Some(libc_errno::ENOBUFS) => {
            Socket::open(NETLINK_NETFILTER).and_then(|mut socket| socket.ask(&get))
        }
        answer => answer,
    };
    let answer = answer.map_err(|e| Error::nf_tables(what, e))?;
    let refused = answer.refusals.into_iter().find(|r| r.error.raw_os_error() != Some(libc_errno::ENOENT));
    match refused {
        Some(refusal) => Err(Error::nf_tables(what, refusal.error)),
        None => Ok(!answer.messages.is_empty()),
    }
}
