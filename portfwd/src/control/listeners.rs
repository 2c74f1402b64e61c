//! Sockets of the gateway's own services: a rule on one of their ports takes the port from them,
//! which deserves a warning.
//!
//! The kernel is asked by netlink: `/proc/net/tcp` walks every bucket of the table of connections,
//! milliseconds per rule.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv6Addr},
    path::Path,
};

use anyhow::{Context, Result};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use portfwd_common::net::Family;

use crate::{
    netlink::Requester,
    ruleset::{RuleProtocol, RuleSpec},
    transport::Transport,
};

/// A socket, mostly one that waits for packets or connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Listener {
    protocol: Transport,
    address: IpAddr,
    port: u16,
    inode: u32,
}

/// A line for every own service that a rule takes packets from. `wan` are the own addresses of the
/// WAN interfaces.
pub fn shadowed_by(spec: &RuleSpec, wan: &[IpAddr]) -> Result<Vec<String>> {
    // The gateway's own sockets go before such a rule.
    if spec.protocol() == RuleProtocol::Dmz {
        return Ok(Vec::new());
    }
    let mut shadowed = Vec::new();
    let protocols = spec.protocol().protocols();
    for transport in protocols.iter().copied().filter_map(Transport::of) {
        shadowed.extend(
            listeners(transport)?
                .into_iter()
                .filter(|listener| is_shadowed(listener, spec, wan)),
        );
    }
    if shadowed.is_empty() {
        return Ok(Vec::new());
    }
    let processes = processes_by_socket();
    let mut lines: Vec<_> = shadowed
        .iter()
        .map(|listener| warning(listener, processes.get(&listener.inode)))
        .collect();
    lines.sort();
    lines.dedup();
    Ok(lines)
}

fn warning(listener: &Listener, process: Option<&String>) -> String {
    let protocol = RuleProtocol::from(listener.protocol);
    let process = process.map_or_else(
        || "a process (`ss -lntup` names it)".to_owned(),
        Clone::clone,
    );
    format!(
        "{process} on this gateway listens on {protocol} {}: from the WAN, this rule now goes before it",
        listener.port
    )
}

/// Whether packets from the WAN that the listener would get now match the rule.
fn is_shadowed(listener: &Listener, spec: &RuleSpec, wan: &[IpAddr]) -> bool {
    let ports = spec.listen().ports;
    if !(ports.first()..=ports.last()).contains(&listener.port) {
        return false;
    }
    if listener.address.is_unspecified() {
        // An IPv6 socket that listens on every address gets IPv4 too, unless it was told not to.
        return listener.address == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
            || spec.family() == Family::V4;
    }
    let address = listener.address.to_canonical();
    match spec.listen().address {
        Some(listen) => listen == address,
        None => address.is_ipv4() == (spec.family() == Family::V4) && wan.contains(&address),
    }
}

fn listeners(protocol: Transport) -> Result<Vec<Listener>> {
    // A UDP socket without peer is in state CLOSE.
    let states = match protocol {
        Transport::Tcp => StateFlags::LISTEN,
        Transport::Udp => StateFlags::CLOSE,
    };
    sockets(protocol, states)
}

/// The ports of all sockets of the calling thread's network namespace.
pub fn bound_ports(protocol: Transport) -> Result<BTreeSet<u16>> {
    let sockets = sockets(protocol, StateFlags::all())?;
    Ok(sockets.into_iter().map(|socket| socket.port).collect())
}

fn sockets(protocol: Transport, states: StateFlags) -> Result<Vec<Listener>> {
    let mut all = dump(protocol, AF_INET, states.clone())?;
    all.extend(dump(protocol, AF_INET6, states)?);
    Ok(all)
}

/// The sockets of the calling thread's network namespace.
fn dump(protocol: Transport, family: u8, states: StateFlags) -> Result<Vec<Listener>> {
    let number = match protocol {
        Transport::Tcp => IPPROTO_TCP,
        Transport::Udp => IPPROTO_UDP,
    };
    let socket_id = if family == AF_INET {
        SocketId::new_v4()
    } else {
        SocketId::new_v6()
    };
    let request = InetRequest {
        family,
        protocol: number,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    };
    let answer = Requester::open(NETLINK_SOCK_DIAG)?
        .dump(SockDiagMessage::InetRequest(request))
        .context("list own sockets")?;
    let mut listeners = Vec::new();
    for message in answer {
        if let SockDiagMessage::InetResponse(socket) = message {
            let InetResponseHeader {
                socket_id, inode, ..
            } = socket.header;
            listeners.push(Listener {
                protocol,
                address: socket_id.source_address,
                port: socket_id.source_port,
                inode,
            });
        }
    }
    Ok(listeners)
}

/// `name (pid)` by inode, of every socket that any process holds. Processes that end meanwhile are
/// left out.
fn processes_by_socket() -> BTreeMap<u32, String> {
    let mut processes = BTreeMap::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let name = || {
            fs::read_to_string(process.path().join("comm"))
                .map(|comm| format!("{} (pid {pid})", comm.trim()))
                .ok()
        };
        for descriptor in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Some(inode) = socket_inode(&descriptor.path())
                && let Some(name) = name()
            {
                processes.entry(inode).or_insert(name);
            }
        }
    }
    processes
}

fn socket_inode(descriptor: &Path) -> Option<u32> {
    let link = fs::read_link(descriptor).ok()?;
    link.to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;
    use crate::ruleset::RuleWords;

    fn spec(words: &str) -> RuleSpec {
        RuleSpec::parse(&RuleWords::line(words)).unwrap()
    }

    #[test]
    fn the_process_that_listens_is_named() {
        let tcp = TcpListener::bind("0.0.0.0:0").unwrap();
        let udp = UdpSocket::bind("[::]:0").unwrap();
        let own = format!("(pid {})", std::process::id());
        let port = tcp.local_addr().unwrap().port();
        let lines = shadowed_by(&spec(&format!("tcp {port} 10.0.0.2")), &[]).unwrap();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].contains(&own) && lines[0].contains(&format!("tcp {port}")),
            "{lines:?}"
        );
        let port = udp.local_addr().unwrap().port();
        for target in ["10.0.0.2", "2001:db8::2"] {
            let lines = shadowed_by(&spec(&format!("udp {port} {target}")), &[]).unwrap();
            assert!(lines.iter().any(|line| line.contains(&own)), "{lines:?}");
        }
    }

    #[test]
    fn only_services_that_the_wan_reaches_count() {
        let listener = |address: &str| Listener {
            protocol: Transport::Tcp,
            address: address.parse().unwrap(),
            port: 80,
            inode: 1,
        };
        let wan = [
            "203.0.113.5".parse().unwrap(),
            "2001:db8::1".parse().unwrap(),
        ];
        for (address, rule, expected) in [
            ("0.0.0.0", "tcp 80 10.0.0.2", true),
            ("0.0.0.0", "tcp 1-100 10.0.0.2", true),
            ("0.0.0.0", "tcp 81 10.0.0.2", false),
            ("0.0.0.0", "tcp 80 2001:db8::2", false),
            ("::", "tcp 80 10.0.0.2", true),
            ("::", "tcp 80 2001:db8::2", true),
            ("127.0.0.1", "tcp 80 10.0.0.2", false),
            ("192.168.1.1", "tcp 80 10.0.0.2", false),
            ("203.0.113.5", "tcp 80 10.0.0.2", true),
            ("::ffff:203.0.113.5", "tcp 80 10.0.0.2", true),
            ("203.0.113.5", "tcp 80 2001:db8::2", false),
            ("203.0.113.5", "tcp 203.0.113.5:80 10.0.0.2", true),
            ("203.0.113.5", "tcp 203.0.113.6:80 10.0.0.2", false),
            ("2001:db8::1", "tcp 80 2001:db8::2", true),
        ] {
            assert_eq!(
                is_shadowed(&listener(address), &spec(rule), &wan),
                expected,
                "{address} {rule}"
            );
        }
    }
}
