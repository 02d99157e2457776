//! Which hosts and addresses pictures may come from: public ones, and what the operator names.
//!
//! The check of addresses sits in the resolver, so that every connection of every redirect goes to an address
//! that has been checked: a name that answers differently the next time gains nothing.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ureq::{
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::NextTimeout,
    },
};
use url::Host;

use super::Rule;

/// IPv4 networks that are not for the public (IANA's special-purpose registry, multicast).
const NOT_PUBLIC_V4: [([u8; 4], u8); 15] = [
    ([0, 0, 0, 0], 8),
    ([10, 0, 0, 0], 8),
    ([100, 64, 0, 0], 10),
    ([127, 0, 0, 0], 8),
    ([169, 254, 0, 0], 16),
    ([172, 16, 0, 0], 12),
    ([192, 0, 0, 0], 24),
    ([192, 0, 2, 0], 24),
    ([192, 88, 99, 0], 24),
    ([192, 168, 0, 0], 16),
    ([198, 18, 0, 0], 15),
    ([198, 51, 100, 0], 24),
    ([203, 0, 113, 0], 24),
    ([224, 0, 0, 0], 4),
    ([240, 0, 0, 0], 4),
];

/// Global unicast; all else of IPv6 is not public.
const GLOBAL_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Parts of it that are not: protocol assignments with Teredo, documentation, 6to4.
const NOT_PUBLIC_V6: [(Ipv6Addr, u8); 4] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// What the operator allows and denies; a denial counts before an allowance.
#[derive(Debug, Clone, Default)]
pub struct AccessRules {
    /// Allowed besides the public networks.
    pub allow_networks: Networks,
    /// Denied although public.
    pub deny_networks: Networks,
    /// If any are named, only these.
    pub allow_hosts: Hosts,
    /// Not these.
    pub deny_hosts: Hosts,
}

impl AccessRules {
    /// The rule by which a URL's host may not be asked for pictures, as far as its name tells.
    pub(super) fn rule_against(&self, host: &str) -> Option<Rule> {
        let is_allowed = self.allow_hosts.0.is_empty() || self.allow_hosts.contains(host);
        let is_denied = self.deny_hosts.contains(host);
        is_denied.then_some(Rule::DenyHosts).or((!is_allowed).then_some(Rule::AllowHosts))
    }

    fn rule_against_address(&self, address: IpAddr) -> Option<Rule> {
        let address = address.to_canonical();
        let is_allowed = self.allow_networks.contains(address) || is_public(address);
        let is_denied = self.deny_networks.contains(address);
        is_denied.then_some(Rule::DenyNetworks).or((!is_allowed).then_some(Rule::AllowNetworks))
    }
}

/// Networks or addresses, separated by spaces: `10.1.0.0/16 ::1`.
#[derive(Debug, Clone, Default)]
pub struct Networks(Vec<IpNet>);

impl FromStr for Networks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network = |word: &str| {
            let parsed = word.parse().or_else(|_| word.parse::<IpAddr>().map(IpNet::from));
            parsed.map_err(|_error| format!("'{word}' is no network"))
        };
        text.split_whitespace().map(network).collect::<Result<_, _>>().map(Self)
    }
}

impl Networks {
    fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// A URL's host in the one spelling that it has: an IPv4 address that is written as IPv6
/// (`[::ffff:127.0.0.1]`) as IPv4.
pub fn canonical_host(host: &str) -> Cow<'_, str> {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let address = address.and_then(|address| address.parse::<Ipv6Addr>().ok());
    match address.and_then(|address| address.to_ipv4_mapped()) {
        Some(address) => address.to_string().into(),
        None => host.into(),
    }
}

/// Names of hosts, separated by spaces; `*.example.com` stands for all below `example.com`.
#[derive(Debug, Clone, Default)]
pub struct Hosts(Vec<String>);

impl FromStr for Hosts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let host = |word: &str| {
            let bare = word.strip_prefix("*.").unwrap_or(word);
            let parsed = Host::parse(bare).map_err(|_error| format!("'{word}' is no host"))?;
            let parsed = parsed.to_string();
            let parsed = canonical_host(&parsed);
            Ok(if bare == word { parsed.into_owned() } else { format!(".{parsed}") })
        };
        text.split_whitespace().map(host).collect::<Result<_, _>>().map(Self)
    }
}

impl Hosts {
    fn contains(&self, host: &str) -> bool {
        let host = canonical_host(host.strip_suffix('.').unwrap_or(host));
        self.0.iter().any(|known| match known.strip_prefix('.') {
            Some(_) => host.ends_with(known),
            None => host == *known,
        })
    }
}

/// Whether a canonical address is reachable by everyone. IPv6 forms that carry an IPv4 address
/// (NAT64, 6to4, Teredo, the old compatible form) never are.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !NOT_PUBLIC_V4.iter().any(|(network, prefix)| {
            Ipv4Net::new_assert(Ipv4Addr::from(*network), *prefix).contains(&address)
        }),
        IpAddr::V6(address) => {
            let is_in = |(network, prefix): &(Ipv6Addr, u8)| {
                Ipv6Net::new_assert(*network, *prefix).contains(&address)
            };
            is_in(&GLOBAL_V6) && !NOT_PUBLIC_V6.iter().any(is_in)
        }
    }
}

/// A resolver behind the check.
#[derive(Debug)]
pub(super) struct GuardedResolver<R> {
    pub(super) system: R,
    pub(super) rules: Arc<AccessRules>,
}

/// An address that pictures may not come from.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Forbidden(pub(super) Rule);

impl<R: Resolver> Resolver for GuardedResolver<R> {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let addresses = self.system.resolve(uri, config, timeout)?;
        // One inner address among public ones is a trap as well.
        let mut ips = addresses.iter().map(SocketAddr::ip);
        match ips.find_map(|address| self.rules.rule_against_address(address)) {
            Some(rule) => Err(ureq::Error::Other(Box::new(Forbidden(rule)))),
            None => Ok(addresses),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_and_allowed_addresses_are_permitted() {
        let public = "1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 \
            126.255.255.255 128.0.0.0 169.253.255.255 172.15.255.255 172.32.0.0 192.0.1.0 \
            192.167.255.255 198.17.255.255 198.20.0.0 223.255.255.255 2606:4700::1111 \
            2a00:1450::1 2001:4860:4860::8888 ::ffff:8.8.8.8";
        let inner = "0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 \
            127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 \
            192.88.99.1 192.168.0.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 \
            224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 \
            ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 \
            64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:7f00:1:: \
            2002:a9fe:a9fe::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1";
        let none = AccessRules::default();
        for address in public.split_whitespace() {
            assert_eq!(none.rule_against_address(address.parse().unwrap()), None, "{address}");
        }
        for address in inner.split_whitespace() {
            let rule = none.rule_against_address(address.parse().unwrap());
            assert_eq!(rule, Some(Rule::AllowNetworks), "{address}");
        }
        let some = AccessRules {
            allow_networks: "10.1.0.0/16 ::1".parse().unwrap(),
            deny_networks: "10.1.9.0/24 8.8.8.8".parse().unwrap(),
            ..AccessRules::default()
        };
        for (address, rule) in [
            ("10.1.2.3", None),
            ("::ffff:10.1.2.3", None),
            ("10.1.9.1", Some(Rule::DenyNetworks)),
            ("::ffff:8.8.8.8", Some(Rule::DenyNetworks)),
            ("8.8.4.4", None),
            ("10.2.0.1", Some(Rule::AllowNetworks)),
            ("::1", None),
        ] {
            assert_eq!(some.rule_against_address(address.parse().unwrap()), rule, "{address}");
        }
        assert!("10.0.0.0/33".parse::<Networks>().is_err());
        assert!("localhost".parse::<Networks>().is_err());
    }

    #[test]
    fn hosts_are_allowed_and_denied_by_name() {
        let rules = |allow: &str, deny: &str| AccessRules {
            allow_hosts: allow.parse().unwrap(),
            deny_hosts: deny.parse().unwrap(),
            ..AccessRules::default()
        };
        for (allow, deny, host, permitted) in [
            ("", "", "example.com", true),
            ("example.com", "", "example.com", true),
            ("example.com", "", "example.com.", true),
            ("Example.COM", "", "example.com", true),
            ("example.com", "", "a.example.com", false),
            ("example.com", "", "example.com.evil.net", false),
            ("*.example.com", "", "a.b.example.com", true),
            ("*.example.com", "", "example.com", false),
            ("*.example.com", "", "notexample.com", false),
            ("*.example.com", "bad.example.com", "bad.example.com", false),
            ("", "example.com", "example.com.", false),
            ("", "127.0.0.1 [::1]", "127.0.0.1", false),
            ("", "127.0.0.1 [::1]", "[::1]", false),
            ("", "127.0.0.1", "[::ffff:7f00:1]", false),
            ("", "[::ffff:127.0.0.1]", "127.0.0.1", false),
            ("bücher.example", "", "xn--bcher-kva.example", true),
        ] {
            let rule = rules(allow, deny).rule_against(host);
            assert_eq!(rule.is_none(), permitted, "{allow} | {deny} | {host}");
            let expected = if deny.is_empty() { Rule::AllowHosts } else { Rule::DenyHosts };
            assert!(rule.is_none_or(|rule| rule == expected), "{rule:?}");
        }
        assert!("a b/c".parse::<Hosts>().is_err());
    }
}
