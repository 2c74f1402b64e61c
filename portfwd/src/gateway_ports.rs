//! Ports of the gateway that must not stand for clients, because the gateway uses them itself.
//!
//! - what its kernel gives to its own connections: `net.ipv4.ip_local_port_range`, less `ip_local_reserved_ports`, which it
//!   never gives away
//! - what its sockets are bound to
//! - what its rules listen on, on the addresses of the WAN interfaces: a target may dial from the port that it is dialled at
//!
//! A client's answers would reach the client rather than the gateway's socket, or the other way round (port shadowing,
//! CVE-2021-3773). The kernel is asked when rules or addresses have changed or clients have ports, and once a minute;
//! of a port that a pool gives out meanwhile the datapath asks whether a socket has it.

use std::{fs, net::IpAddr};

use anyhow::{Context, Result};
use portfwd_common::{
    abi::{Pool, Protocol, Rule},
    net::{Address, Family, Ipv4},
};

use crate::{bpf::Tables, control::listeners::bound_ports, transport::Transport};

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// A rule keeps its listen ports to itself only if they leave this many unprivileged ports to clients: a rule for all ports
/// would leave none.
const ENOUGH: usize = 8_192;

/// The ports that the gateway uses.
#[derive(Debug)]
pub struct GatewayPorts {
    tcp: Pool,
    udp: Pool,
    listens: Vec<Listens>,
    wan: Vec<IpAddr>,
}

/// What a rule listens on in one protocol.
#[derive(Clone, Copy, Debug)]
struct Listens {
    protocol: Protocol,
    family: Family,
    address: Option<IpAddr>,
    first: u16,
    last: u16,
}

impl GatewayPorts {
    /// As they are now, in the thread's network namespace, beside the rules of all slots that are in use.
    pub fn of(tables: &Tables, rules: &[(u16, Rule)]) -> Result<Self> {
        let own = local_ports()?;
        let (mut tcp, mut udp) = (own, own);
        for (transport, pool) in [(Transport::Tcp, &mut tcp), (Transport::Udp, &mut udp)] {
            for port in bound_ports(transport)? {
                pool.take(port);
            }
        }
        let mut listens: Vec<_> = rules.iter().map(|(_, rule)| listens(rule)).collect();
        // The shortest ranges first: they are the most likely to be dialled from.
        listens.sort_by_key(|listens| listens.last - listens.first);
        let wan = tables.addresses()?.into_iter().map(|(ip, _)| ip).collect();
        Ok(Self {
            tcp,
            udp,
            listens,
            wan,
        })
    }

    /// Those that must not stand for clients on an address, in a protocol.
    pub fn of_address(&self, address: IpAddr, protocol: Protocol) -> Pool {
        let mut pool = match protocol {
            Protocol::Tcp => self.tcp,
            Protocol::Udp => self.udp,
            // A `ping` of the gateway's own is told from a client's by whom it asks, unless that is the rule's own target: what
            // identifier a raw socket takes, nobody can know.
            Protocol::Echo => Pool::FREE,
        };
        let family = if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        };
        let listens_there = |listens: &&Listens| {
            listens.protocol == protocol
                && listens.family == family
                && match listens.address {
                    Some(listen) => listen == address,
                    None => self.wan.contains(&address),
                }
        };
        let mut listens = self.listens.iter().filter(listens_there).peekable();
        if listens.peek().is_none() {
            return pool;
        }
        let mut left = (1_024..=u16::MAX)
            .filter(|port| !pool.is_taken(*port))
            .count();
        for listens in listens {
            let count = usize::from(listens.last - listens.first) + 1;
            if left < ENOUGH + count {
                break;
            }
            left -= count;
            (listens.first..=listens.last).for_each(|port| pool.take(port));
        }
        pool
    }
}

fn listens(rule: &Rule) -> Listens {
    let (family, listen) = if rule.flags & Rule::V6 == 0 {
        (Family::V4, Ipv4::narrow(rule.listen).ip())
    } else {
        (Family::V6, rule.listen.ip())
    };
    Listens {
        protocol: rule.protocol(),
        family,
        address: (!rule.is_any_address()).then_some(listen),
        first: rule.first,
        last: rule.last,
    }
}

/// Ports that the kernel gives to connections that ask for none.
fn local_ports() -> Result<Pool> {
    let read = |path| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    parse_local_ports(&read(RANGE)?, &read(RESERVED)?)
}

fn parse_local_ports(range: &str, reserved: &str) -> Result<Pool> {
    let port = |text: &str| {
        text.parse::<u16>()
            .with_context(|| format!("{text:?} is no port"))
    };
    let mut words = range.split_whitespace();
    let (first, last) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let given = port(first)?..=port(last)?;
    let items = reserved.trim().split(',').filter(|item| !item.is_empty());
    let reserved = items
        .map(|item| {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            Ok(port(first)?..=port(last)?)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut ports = Pool::FREE;
    given
        .filter(|port| !reserved.iter().any(|range| range.contains(port)))
        .for_each(|port| ports.take(port));
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_range_is_read_less_what_it_never_gives() {
        let count = |pool: &Pool| (1..=u16::MAX).filter(|port| pool.is_taken(*port)).count();
        let ports = parse_local_ports("32768\t60999\n", "40000-40009,50000\n").unwrap();
        assert_eq!(count(&ports), 60_999 - 32_768 + 1 - 11);
        assert!(ports.is_taken(32_768) && ports.is_taken(60_999));
        assert!(!ports.is_taken(40_005) && !ports.is_taken(50_000));
        assert_eq!(count(&parse_local_ports("1024 1024", "").unwrap()), 1);
        assert!(parse_local_ports("", "").is_err());
        assert!(parse_local_ports("1 2", "x").is_err());
        assert_ne!(count(&local_ports().unwrap()), 0);
    }

    #[test]
    fn rules_keep_their_ports_to_themselves_while_enough_are_left() {
        let listens = |address: Option<&str>, first, last| Listens {
            protocol: Protocol::Tcp,
            family: Family::V4,
            address: address.map(|address| address.parse().unwrap()),
            first,
            last,
        };
        let (wan, lan) = ("203.0.113.5".parse().unwrap(), "10.0.0.1".parse().unwrap());
        let ports = GatewayPorts {
            tcp: Pool::FREE,
            udp: Pool::FREE,
            listens: vec![
                listens(None, 80, 80),
                listens(Some("203.0.113.6"), 443, 443),
                listens(None, 5_000, 5_999),
                listens(None, 1, 65_535),
            ],
            wan: vec![wan],
        };
        let pool = ports.of_address(wan, Protocol::Tcp);
        let taken = |port| pool.is_taken(port);
        assert!(taken(80) && taken(5_000) && taken(5_999));
        assert!(!taken(443) && !taken(6_000) && !taken(81));
        assert_eq!(ports.of_address(wan, Protocol::Udp), Pool::FREE);
        assert_eq!(ports.of_address(lan, Protocol::Tcp), Pool::FREE);
    }
}
