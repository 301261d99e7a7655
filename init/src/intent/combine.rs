//! Several workloads' redirects as the one of the namespace that they share.

use super::{Cgroup, Ids, InvalidIntent, RedirectIntent, Violation, Workload};

/// One workload's own redirect, and who the workload is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The workload's name.
    pub name: String,
    /// The users that it runs as.
    pub uids: Vec<Ids>,
    /// The slices that it runs in.
    pub slices: Vec<Cgroup>,
    /// Its redirect, as if it were alone.
    pub intent: RedirectIntent,
}

impl RedirectIntent {
    /// The redirect of a namespace that these workloads share. What concerns the namespace as a whole (families,
    /// interfaces, mesh addresses, …) must be the same for all of them; groups and mark of the proxies add up.
    pub fn combine(parts: &[Part]) -> Result<Self, InvalidIntent> {
        let mut found = Vec::new();
        let mut whole = Self::default();
        for (i, part) in parts.iter().enumerate() {
            if i == 0 {
                whole = common(&part.intent);
            } else if let Some(field) = first_difference(&whole, &common(&part.intent)) {
                let message = format!(
                    "`{}` and `{}` share a network namespace and differ in it",
                    parts[0].name, part.name
                );
                found.push(Violation { field: field.to_owned(), message });
            }
            if !part.intent.workloads.is_empty() {
                let message =
                    format!("`{}` is one of several workloads and can't have some itself", part.name);
                found.push(Violation { field: "workloads".to_owned(), message });
            }
        }
        if !found.is_empty() {
            return Err(InvalidIntent(found));
        }
        for part in parts {
            let intent = &part.intent;
            for gid in &intent.proxy_gids {
                if !whole.proxy_gids.contains(gid) {
                    whole.proxy_gids.push(*gid);
                }
            }
            whole.workloads.push(Workload {
                name: part.name.clone(),
                uids: part.uids.clone(),
                slices: part.slices.clone(),
                proxy_uids: intent.proxy_uids.clone(),
                inbound: intent.inbound.clone(),
                outbound: intent.outbound.clone(),
                dns: intent.dns.clone(),
            });
        }
        whole.validate()?;
        Ok(whole)
    }
}

/// What concerns the namespace as a whole.
fn common(intent: &RedirectIntent) -> RedirectIntent {
    let default = RedirectIntent::default();
    RedirectIntent {
        proxy_uids: Vec::new(),
        proxy_gids: Vec::new(),
        inbound: default.inbound,
        outbound: default.outbound,
        dns: default.dns,
        workloads: Vec::new(),
        ..intent.clone()
    }
}

fn first_difference(one: &RedirectIntent, other: &RedirectIntent) -> Option<&'static str> {
    [
        ("proxyMark", one.proxy_mark == other.proxy_mark),
        ("interfaces", one.interfaces == other.interfaces),
        ("bridges", one.bridges == other.bridges),
        ("ipv4", one.ipv4 == other.ipv4),
        ("ipv6", one.ipv6 == other.ipv6),
        ("vipRanges", one.vip_ranges == other.vip_ranges),
        ("tproxy", one.tproxy == other.tproxy),
        ("dropInvalid", one.drop_invalid == other.drop_invalid),
        ("trace", one.trace == other.trace),
        ("position", one.position == other.position),
    ]
    .into_iter()
    .find_map(|(field, same)| (!same).then_some(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str, uid: u32, base: u16) -> Part {
        let intent = format!(
            r#"{{"proxyUids":[{}],"proxyGids":[5678],"inbound":{{"port":{},"includePorts":[{}]}},
            "outbound":{{"port":{}}},"dns":{{"port":{}}}}}"#,
            uid + 1000,
            base + 6,
            base - 7000,
            base + 1,
            base + 53
        );
        let intent = serde_json::from_str(&intent).unwrap();
        Part { name: name.to_owned(), uids: vec![Ids::one(uid)], slices: Vec::new(), intent }
    }

    #[test]
    fn each_keeps_its_own_and_the_rest_is_shared() {
        let whole = RedirectIntent::combine(&[part("web", 2001, 15100), part("shop", 2002, 15200)]).unwrap();
        assert_eq!(whole.proxy_gids, [5678]);
        let proxies: Vec<_> = whole.workloads.iter().map(|w| (w.name.as_str(), w.proxy_uids[0])).collect();
        assert_eq!(proxies, [("web", 3001), ("shop", 3002)]);
    }

    #[test]
    fn what_differs_or_collides_is_named() {
        let mut other = part("shop", 2002, 15200);
        other.intent.ipv6 = false;
        let error = RedirectIntent::combine(&[part("web", 2001, 15100), other]).unwrap_err();
        assert_eq!(error.0[0].field, "ipv6");
        assert!(error.0[0].message.contains("`web` and `shop`"), "{error}");
        let error =
            RedirectIntent::combine(&[part("web", 2001, 15100), part("shop", 2001, 15200)]).unwrap_err();
        assert_eq!(error.0[0].field, "workloads[1].uids");
    }
}
