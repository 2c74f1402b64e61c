//! The port by which a gateway stands for a client, in packets that come to the server.

use super::{FRAGMENT, ICMP, ICMPV6};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The protocol of a packet and where its transport header begins, unless it is a later fragment. Extension headers other than that of
/// fragments are in none of these.
fn transport(packet: &[u8]) -> Option<(u8, usize)> {
    let field = |at| word(packet, at);
    match packet.first()? >> 4 {
        4 if field(6)? & 0x1fff == 0 => Some((packet[9], usize::from(packet[0] & 0xf) * 4)),
        6 if packet[6] != FRAGMENT => Some((packet[6], 40)),
        6 if field(42)? & 0xfff8 == 0 => Some((packet[40], 48)),
        _ => None,
    }
}

fn word(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?))
}

/// The source port of the first packet that has one.
pub fn first_source_port(packets: &[Vec<u8>]) -> Option<u16> {
    packets.iter().find_map(|packet| match transport(packet)? {
        (TCP | UDP, at) => word(packet, at),
        _ => None,
    })
}

/// Puts a port in another's place: the source port of what comes to the server, and the destination port of what the server has sent
/// and an error quotes to it. Sums are corrected, not made anew: one that is wrong stays wrong.
pub fn renumber(packet: &mut [u8], from: u16, to: u16) {
    if from == to {
        return;
    }
    match transport(packet) {
        Some((protocol @ (TCP | UDP), at)) => {
            exchange(packet, at, (from, to), sum_of(protocol, at));
        }
        Some((ICMP | ICMPV6, message)) => {
            let quoted = message + 8;
            let Some((protocol @ (TCP | UDP), at)) = transport(&packet[quoted..]) else {
                return;
            };
            let at = quoted + at;
            let sum = sum_of(protocol, at);
            // What the port adds to the error's sum, that of the quoted packet takes away, if it has one.
            let sum = match word(packet, sum) {
                Some(1..) => sum,
                Some(0) | None => message + 2,
            };
            exchange(packet, at + 2, (from, to), sum);
        }
        _ => {}
    }
}

const fn sum_of(protocol: u8, at: usize) -> usize {
    if protocol == TCP { at + 16 } else { at + 6 }
}

/// RFC 1624 equation 3. A sum of zero says that there is none.
fn exchange(packet: &mut [u8], at: usize, (from, to): (u16, u16), sum: usize) {
    if word(packet, at) != Some(from) {
        return;
    }
    packet[at..at + 2].copy_from_slice(&to.to_be_bytes());
    let Some(old @ 1..) = word(packet, sum) else {
        return;
    };
    let mut total = u32::from(!old) + u32::from(!from) + u32::from(to);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    let new = match !(total as u16) {
        0 => 0xffff,
        new => new,
    };
    packet[sum..sum + 2].copy_from_slice(&new.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use portfwd_common::model::frame::{Draft, Transport, error};

    use super::*;

    #[test]
    fn a_renumbered_packet_is_the_one_that_would_have_been_sent_with_that_port() {
        for (client, server) in [("10.2.0.1", "10.2.0.2"), ("2001:db8:2::1", "2001:db8:2::2")] {
            let at = |host: &str, port| std::net::SocketAddr::new(host.parse().unwrap(), port);
            let drafts = |port| {
                let udp = Draft::udp(at(client, port), at(server, 80));
                let back = Draft::udp(at(server, 80), at(client, port));
                let bare = Draft {
                    transport: Transport::UdpWithoutSum,
                    ..back.clone()
                };
                let kind = if client.contains(':') { 1 } else { 3 };
                let quoting = |draft: &Draft| {
                    let (from, to) = (at(client, 0).ip(), at(server, 0).ip());
                    error(from, to, kind, 1, [0; 4], &draft.packet())
                };
                vec![
                    Draft::tcp(at(client, port), at(server, 80), 0x10).packet(),
                    udp.packet(),
                    quoting(&back),
                    quoting(&bare),
                ]
            };
            for (mut packet, expected) in drafts(1_234).into_iter().zip(drafts(54_321)) {
                renumber(&mut packet, 1_234, 54_321);
                assert_eq!(packet, expected);
            }
        }
    }
}
