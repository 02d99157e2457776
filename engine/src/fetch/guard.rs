//! Which addresses pictures may come from: public ones, and networks that the operator names.
//!
//! The check sits in the resolver, so that every connection of every redirect goes to an address
//! that has been checked: a name that answers differently the next time gains nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ureq::{
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver},
        transport::NextTimeout,
    },
};

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

/// The networks that are allowed besides the public ones.
#[derive(Debug, Clone, Default)]
pub struct AllowedNetworks(Vec<IpNet>);

impl std::str::FromStr for AllowedNetworks {
    type Err = String;

    /// Networks or addresses, separated by spaces: `10.1.0.0/16 ::1`.
    fn from_str(text: &str) -> Result<Self, String> {
        let network = |word: &str| {
            let parsed = word.parse().or_else(|_| word.parse::<IpAddr>().map(IpNet::from));
            parsed.map_err(|_error| format!("'{word}' is no network"))
        };
        text.split_whitespace().map(network).collect::<Result<_, _>>().map(Self)
    }
}

impl AllowedNetworks {
    pub(super) fn permit(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address)) || is_public(address)
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

/// The system's resolver behind the check.
#[derive(Debug)]
pub(super) struct GuardedResolver {
    pub(super) system: DefaultResolver,
    pub(super) allowed: AllowedNetworks,
}

/// An address that pictures may not come from.
#[derive(Debug, thiserror::Error)]
#[error("the address is not public")]
pub(super) struct NotPublic;

impl Resolver for GuardedResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let addresses = self.system.resolve(uri, config, timeout)?;
        // One inner address among public ones is a trap as well.
        if addresses.iter().map(SocketAddr::ip).all(|address| self.allowed.permit(address)) {
            Ok(addresses)
        } else {
            Err(ureq::Error::Other(Box::new(NotPublic)))
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
        let none = AllowedNetworks::default();
        for address in public.split(' ') {
            assert!(none.permit(address.parse().unwrap()), "{address}");
        }
        for address in inner.split(' ') {
            assert!(!none.permit(address.parse().unwrap()), "{address}");
        }
        let some: AllowedNetworks = "10.1.0.0/16 ::1".parse().unwrap();
        for (address, permitted) in
            [("10.1.2.3", true), ("::ffff:10.1.2.3", true), ("10.2.0.1", false), ("::1", true)]
        {
            assert_eq!(some.permit(address.parse().unwrap()), permitted, "{address}");
        }
        assert!("10.0.0.0/33".parse::<AllowedNetworks>().is_err());
        assert!("localhost".parse::<AllowedNetworks>().is_err());
    }
}
