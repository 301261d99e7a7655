//! The words of Kuma's settings: lists of ports and addresses, users with ports, networks behind interfaces.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::intent::{Bridge, Ids, Interface, OwnerExclusion, ParseSpanError, Ports, Transport};

/// Kuma's `[[protocol:]ports:]uids` can't be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseUidsError {
    /// Neither TCP nor UDP.
    #[error("invalid or unsupported protocol: '{0}'. It should be tcp, udp, or both as tcp,udp")]
    Protocol(String),
    /// No list of ports.
    #[error(
        "invalid port range: validation failed for value or range '{range}': invalid uint16 value: '{value}'"
    )]
    Ports {
        /// The whole item.
        range: String,
        /// The part that is no port.
        value: String,
    },
    /// All users at once would leave everything alone.
    #[error("wildcard '*' is not allowed for UIDs")]
    Wildcard,
    /// More than one user or range.
    #[error("invalid UID entry: '{0}'. It should either be a single item or a range")]
    Uids(String),
    /// Too many parts.
    #[error("invalid value: '{0}'. It should be [[protocol:]ports:]uids, such as tcp:22,80-88:1000-1002")]
    Form(String),
}

/// The items of comma-separated texts.
pub(super) fn items(texts: &[String]) -> impl Iterator<Item = &str> {
    texts.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|item| !item.is_empty())
}

/// Ports and ranges of ports, separated by commas.
pub(super) fn ports(texts: &[String]) -> Result<Vec<Ports>, String> {
    items(texts).map(|item| item.parse().map_err(|e: ParseSpanError| e.to_string())).collect()
}

/// Addresses and networks, separated by commas.
pub fn cidrs(texts: &[String]) -> Result<Vec<IpNet>, String> {
    let one = |item: &str| {
        let address = item.parse::<IpAddr>().map(IpNet::from);
        address.or_else(|_| item.parse::<IpNet>()).map(|net| net.trunc()).map_err(|_| {
            format!("`{item}` is neither an address (10.0.0.1, fe80::1) nor a network (10.0.0.0/8, fd00::/8)")
        })
    };
    items(texts).map(one).collect()
}

/// `[[protocol:]ports:]uids`, several separated by semicolons.
pub fn owner_exclusions(texts: &[String]) -> Result<Vec<OwnerExclusion>, ParseUidsError> {
    let entries = texts.iter().flat_map(|text| text.split(';')).map(str::trim);
    entries.filter(|entry| !entry.is_empty()).map(owner_exclusion).collect()
}

fn owner_exclusion(entry: &str) -> Result<OwnerExclusion, ParseUidsError> {
    let parts: Vec<_> = entry.split(':').map(str::trim).collect();
    let (protocol, ports, uids) = match parts[..] {
        [uids] => ("", "", uids),
        [ports, uids] => ("", ports, uids),
        [protocol, ports, uids] => (protocol, ports, uids),
        _ => return Err(ParseUidsError::Form(entry.to_owned())),
    };
    // In Kuma's order, so that the same mistake gets the same answer.
    if uids.contains('*') {
        return Err(ParseUidsError::Wildcard);
    }
    let uids: Ids = uids.parse().map_err(|_| ParseUidsError::Uids(uids.to_owned()))?;
    let protocol = transport(protocol)?;
    let ports = match ports {
        "" | "*" => Vec::new(),
        list => list.split(',').map(|item| port(item.trim())).collect::<Result<_, _>>()?,
    };
    Ok(OwnerExclusion { uids: vec![uids], protocol, ports })
}

/// None means both.
fn transport(text: &str) -> Result<Option<Transport>, ParseUidsError> {
    let mut found = (false, false);
    for word in text.split(',').map(str::trim) {
        match word.to_ascii_lowercase().as_str() {
            "" | "*" => found = (true, true),
            "tcp" => found.0 = true,
            "udp" => found.1 = true,
            _ => return Err(ParseUidsError::Protocol(word.to_owned())),
        }
    }
    Ok(match found {
        (true, false) => Some(Transport::Tcp),
        (false, true) => Some(Transport::Udp),
        _ => None,
    })
}

fn port(item: &str) -> Result<Ports, ParseUidsError> {
    item.parse().map_err(|_| {
        let number = |word: &&str| word.trim().parse::<u16>().is_err();
        let value = item.split('-').find(number).unwrap_or(item);
        ParseUidsError::Ports { range: item.to_owned(), value: value.to_owned() }
    })
}

/// Kuma's `vnet`: `interface:network`; networks behind the same interface come together.
pub fn bridges(texts: &[String]) -> Result<Vec<Bridge>, String> {
    let mut bridges: Vec<Bridge> = Vec::new();
    for item in items(texts) {
        let (name, net) = match item.split_once(':') {
            Some((name, net)) => (name, Some(net)),
            None => (item, None),
        };
        let interface: Interface = name.parse().map_err(|e| format!("in `{item}`: {e}"))?;
        let net = net.map(|net| {
            net.parse::<IpNet>()
                .map(|net| net.trunc())
                .map_err(|_| format!("in `{item}`: `{net}` is no network, such as 172.17.0.0/16 or fd00::/8"))
        });
        let nets = net.transpose()?;
        match bridges.iter_mut().find(|bridge| bridge.interface == interface) {
            Some(bridge) => bridge.local_cidrs.extend(nets),
            None => bridges.push(Bridge { interface, local_cidrs: nets.into_iter().collect() }),
        }
    }
    Ok(bridges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(all: &[&str]) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn users_with_ports() {
        let read = |text: &str| owner_exclusions(&texts(&[text]));
        let [one] = &read("tcp:22,80-88:1000-1002").unwrap()[..] else { panic!("one") };
        assert_eq!(one.protocol, Some(Transport::Tcp));
        assert_eq!(one.ports.iter().map(ToString::to_string).collect::<Vec<_>>(), ["22", "80-88"]);
        assert_eq!(one.uids, ["1000-1002".parse().unwrap()]);
        let [both, udp] = &read("1000-1100;udp:*:2000").unwrap()[..] else { panic!("two") };
        assert_eq!((both.protocol, both.ports.len()), (None, 0));
        assert_eq!((udp.protocol, udp.ports.len()), (Some(Transport::Udp), 0));
        assert_eq!(read("53,3000-5000:106-108").unwrap()[0].protocol, None);
        for (wrong, why) in [
            (
                "a3000-5000:1",
                "validation failed for value or range 'a3000-5000': invalid uint16 value: 'a3000'",
            ),
            ("tcp,http:1:1", "invalid or unsupported protocol: 'http'"),
            ("3000-5000:1:*", "wildcard '*' is not allowed"),
            ("3000-5000:*", "wildcard '*' is not allowed"),
            ("1,2,3", "invalid UID entry: '1,2,3'"),
            ("1:2:3:4", "invalid value"),
        ] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn networks_behind_interfaces() {
        let read =
            bridges(&texts(&["docker0:172.17.0.1/16,br+:172.18.0.0/16", "docker0:fd00:17::/64"])).unwrap();
        let [docker, br] = &read[..] else { panic!("two") };
        assert_eq!(
            docker.local_cidrs,
            ["172.17.0.0/16".parse().unwrap(), "fd00:17::/64".parse::<IpNet>().unwrap()]
        );
        assert!(br.interface.matches("br7"));
        assert!(bridges(&texts(&["docker0:172.17"])).unwrap_err().contains("`172.17` is no network"));
        assert!(bridges(&texts(&["a/b:10.0.0.0/8"])).unwrap_err().contains("a/b"));
    }

    #[test]
    fn addresses_and_networks() {
        let read = cidrs(&texts(&["10.0.0.1, 172.32.16.8/16,fe80::/10"])).unwrap();
        assert_eq!(
            read.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.1/32", "172.32.0.0/16", "fe80::/10"]
        );
        assert!(cidrs(&texts(&["example.org"])).is_err());
    }
}
