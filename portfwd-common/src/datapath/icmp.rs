//! ICMP and ICMPv6 errors about packets of forwarded flows (RFC 5508 section 4).
//!
//! An error travels against the packet it quotes. That packet, reversed, is a packet of the flow in the error's own direction:
//! its entry says where the error goes and what the quoted addresses were before translation. What the entry changes in a
//! packet of that direction, it changes here with source and destination exchanged. An error never ends or refreshes a flow
//! (RFC 5508 REQ-6).

use super::{
    Views,
    classify::{Packet, Quoted, pseudo_header, sum_kind, write_ports},
    path::write_link,
    tables::Tables,
    verdict::{Departure, DropReason, Event, Verdict},
    workspace::Workspace,
};
use crate::{
    abi::{FlowKey, Rewrite},
    net::{
        Address, Delta, Family, PacketBuf, Sum,
        headers::{Hop, address_delta},
        packet::{SumChange, SumKind},
    },
};

/// Carries an error about a flow, or about what a rule alone translates: key, rewrite and way out are in the workspace.
#[inline(always)]
pub fn carry<A, P, T>(views: &Views<P>, work: &Workspace<A>, tables: &T) -> Verdict
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let packet = match Packet::<A, P>::unfolded(views, &work.unfolded) {
        Ok(packet) => packet,
        Err(reason) => return Verdict::Pass(reason),
    };
    let quoted = match packet.quoted() {
        Ok(quoted) => quoted,
        Err(reason) => return Verdict::Pass(reason),
    };
    tables.note(Event::IcmpTranslated);
    match translate(
        &packet,
        &quoted,
        &work.key,
        &work.entry.rewrite,
        &work.departure,
    ) {
        Some(()) => Verdict::Forward(work.departure),
        None => Verdict::Drop(DropReason::RewriteFailed),
    }
}

#[inline(always)]
fn translate<A, P>(
    packet: &Packet<A, P>,
    quoted: &Quoted<A>,
    key: &FlowKey<A>,
    rewrite: &Rewrite<A>,
    departure: &Departure,
) -> Option<()>
where
    A: Address,
    P: PacketBuf,
{
    // The sender of the error stays visible, unless the flow hides that side of the gateway: then it becomes the address that
    // stands for that side (RFC 5508 REQ-5).
    let outer_src = if rewrite.src == key.src {
        packet.header.src
    } else {
        rewrite.src
    };
    let outer_delta = address_delta([packet.header.src, key.dst], [outer_src, rewrite.dst]);

    write_link(packet.frame, departure)?;
    let whole = A::rewrite(
        packet.network,
        outer_src,
        rewrite.dst,
        outer_delta,
        departure.hop(),
    )?;
    // The quoted packet flowed the other way: its source is this direction's destination.
    let network = packet.quoted_network();
    let transport = network.after(quoted.header_len);
    A::rewrite(
        network,
        rewrite.dst,
        rewrite.src,
        rewrite.address_delta,
        Hop::LeftToStack,
    )?;
    write_ports(transport, quoted.protocol, rewrite.ports.reversed())?;
    let quoted_sum = update_quoted_sum(transport, quoted, rewrite)?;
    // A quoted IPv4 header's own sum makes up for its addresses; ICMPv6 also covers the outer addresses (RFC 4443 section 2.3).
    let (pseudo, addresses) = match A::FAMILY {
        Family::V4 => (Delta::ZERO, Delta::ZERO),
        Family::V6 => (outer_delta, rewrite.address_delta),
    };
    let body = addresses.and(rewrite.port_delta).and(quoted_sum);
    packet.transport.update_sum(SumChange {
        kind: SumKind::Icmp,
        pseudo,
        body,
        packet: whole,
    })
}

/// Updates the quoted transport's header sum, if enough was quoted. Returns what that adds to the error's own sum.
#[inline(always)]
fn update_quoted_sum<A, P>(transport: P, quoted: &Quoted<A>, rewrite: &Rewrite<A>) -> Option<Delta>
where
    A: Address,
    P: PacketBuf,
{
    let kind = sum_kind(quoted.protocol);
    let at = kind.offset();
    if quoted.transport_len < at as u32 + 2 {
        return Some(Delta::ZERO);
    }
    let old: u16 = transport.read(at)?;
    let addresses = pseudo_header(A::FAMILY, quoted.protocol, rewrite.address_delta);
    let new = kind.updated(old, addresses.sum().plus(rewrite.port_delta.word()));
    transport.write(at, new)?;
    Some(Sum::ZERO.replace(old, new).delta())
}
