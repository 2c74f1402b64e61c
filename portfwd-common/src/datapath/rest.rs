//! Rules that take what is nobody else's, as a DMZ host does, and what tells them who else there is.
//!
//! They are asked last: when neither PORTS nor LISTENS has a rule for a first packet. Then three things say that the packet is
//! somebody's all the same, and it is passed:
//!
//! - TCP that begins nothing. Such a rule never takes a connection up in its middle: it may be anybody's.
//! - A packet that answers what left by a WAN interface before. [`remember`] keeps that, behind the kernel's own NAT: the gateway's
//!   own connections and those of the machines that it masquerades are the same there.
//! - A socket of the gateway.

use super::{
    Scene, Views,
    classify::{self, Arrival, Packet},
    known::Opening,
    speaking::leaves_by_wan,
    tables::{Flows, Table, Tables},
    tcp::{SegmentKind, TcpFlags},
    verdict::{DropReason, PassReason, Verdict},
    workspace::{Kind, Subject, Workspace},
};
use crate::{
    abi::{AnswerKey, Config, EndpointKey, FlowKey, Instant, Interface, Protocol, Ticks},
    net::{Address, Family, Ipv4, Ipv6, PacketBuf},
};

/// Whether a first packet that no other rule is for is one for a rule that takes everything else. Leaves that rule in the workspace,
/// for [`super::opening::decide`] to be asked again; an error is the verdict.
#[inline(always)]
pub fn decide<A, T>(work: &mut Workspace<A>, scene: &Scene<'_, T>) -> Result<(), Verdict>
where
    A: Address,
    T: Tables,
{
    let Subject {
        protocol,
        flags,
        is_answer,
        ..
    } = work.subject;
    let no_rule = Verdict::Pass(PassReason::NoRule);
    let begins = match protocol {
        Protocol::Tcp => Opening::of(flags) == Opening::Syn,
        Protocol::Udp => true,
        Protocol::Echo => !is_answer,
    };
    if !begins {
        return Err(no_rule);
    }
    let slot = slot(&work.key, protocol, scene.tables);
    if slot == 0 {
        return Err(no_rule);
    }
    match protocol {
        Protocol::Tcp | Protocol::Udp => others(&work.key, protocol, scene)?,
        // What answers echo says so itself, and no socket waits for a request.
        Protocol::Echo => {}
    }
    work.subject.rest = slot;
    Ok(())
}

/// The rule that takes what is nobody else's, 0 if there is none: one with the address before one without.
#[inline(always)]
fn slot<A: Address, T: Tables>(key: &FlowKey<A>, protocol: Protocol, tables: &T) -> u16 {
    let port = key.ports.dst();
    match tables.rest(&EndpointKey::new(key.dst, protocol, port)) {
        Some(slot) => slot,
        // Most packets that come here go through the gateway, not to it: that is found out at once.
        None if tables.is_own(key.dst) => tables
            .rest(&EndpointKey::new(A::default(), protocol, port))
            .unwrap_or(0),
        None => 0,
    }
}

/// Whether a packet is somebody's that no rule tells of; an error is the verdict.
#[inline(always)]
fn others<A: Address, T: Tables>(
    key: &FlowKey<A>,
    protocol: Protocol,
    scene: &Scene<'_, T>,
) -> Result<(), Verdict> {
    let (tables, now) = (scene.tables, scene.now);
    let answer = AnswerKey::new(key, protocol);
    if let Some(at) = tables.answered(&answer) {
        let ago = now.since_any_cpu(at);
        if ago < lifetime(protocol, scene.config) {
            // The kernel's own memory of it is refreshed by either side, too.
            if ago >= second(scene.config) {
                tables.await_answer(&answer, now);
            }
            return Err(Verdict::Pass(PassReason::Answer));
        }
    }
    if tables.has_socket(key, protocol) {
        return Err(Verdict::Pass(PassReason::OwnSocket));
    }
    Ok(())
}

/// What becomes of a packet from the LAN that belongs to no flow and whose source is no other rule's target: it is the kernel's, which
/// masquerades what the target of a rule for everything else begins itself. But a SYN-ACK begins nothing. It answers a SYN whose flow
/// has made room for others meanwhile, as it does in a flood; the kernel has never heard of the connection, and would let it leave
/// with an address of the LAN.
#[inline(always)]
pub(super) fn unasked<A, T>(work: &Workspace<A>, scene: &Scene<'_, T>) -> Verdict
where
    A: Address,
    T: Tables,
{
    let Subject {
        kind,
        protocol,
        flags,
        ..
    } = work.subject;
    let others = Verdict::Pass(kind.not_ours());
    let is_late = scene.config.has_rests()
        && kind == Kind::Segment
        && protocol == Protocol::Tcp
        && flags.kind() == SegmentKind::SynAck;
    if !is_late {
        return others;
    }
    let egress = leaves_by_wan(&work.key, scene);
    let Some(address) = egress.and_then(Interface::address) else {
        return others;
    };
    let dialled = FlowKey {
        src: work.key.dst,
        dst: address,
        ports: work.key.ports.reversed(),
        protocol: work.key.protocol,
    };
    let slot = slot(&dialled, protocol, scene.tables);
    let is_target = slot != 0
        && scene
            .tables
            .rule(slot)
            .is_some_and(|rule| rule.target == work.key.src.widen());
    if is_target {
        Verdict::Drop(DropReason::PrivateSource)
    } else {
        others
    }
}

/// How long an answer is waited for. No shorter than what portfwd itself gives a flow.
#[inline(always)]
const fn lifetime(protocol: Protocol, config: &Config) -> Ticks {
    match protocol {
        Protocol::Tcp => config.tcp_established,
        Protocol::Udp | Protocol::Echo => config.udp,
    }
}

/// How old what is remembered must be to be written again.
#[inline(always)]
const fn second(config: &Config) -> Ticks {
    Ticks(config.ticks_per_second)
}

/// Remembers the answer to a packet that leaves by a WAN interface, whoever sent it, if there are rules that would take that. A
/// packet with IPv4 options or IPv6 extension headers and a fragment leave nothing: whoever sends such a thing sends others too.
#[inline(always)]
pub fn remember<P, F, T>(frame: P, arrival: &Arrival, flows: &mut F, tables: &T, now: Instant)
where
    P: PacketBuf,
    F: Flows<Ipv4> + Flows<Ipv6>,
    T: Tables,
{
    let Some(scene) = Scene::of(arrival, tables, now) else {
        return;
    };
    let _ = match scene.link(frame) {
        Ok(Family::V4) => {
            remember_of::<Ipv4, P, F, T>(Views::of(frame, arrival.link), flows, &scene)
        }
        Ok(Family::V6) => {
            remember_of::<Ipv6, P, F, T>(Views::of(frame, arrival.link), flows, &scene)
        }
        Err(_) => None,
    };
}

#[inline(always)]
fn remember_of<A, P, F, T>(views: Views<P>, flows: &mut F, scene: &Scene<'_, T>) -> Option<()>
where
    A: Address,
    P: PacketBuf,
    F: Flows<A>,
    T: Tables,
{
    let Scene {
        config,
        tables,
        now,
        ..
    } = *scene;
    let packet = Packet::of(views, classify::network::<A, P>(views.network)?);
    let protocol = Protocol::with_ports(packet.header.protocol)?;
    let segment = packet.segment(protocol).ok()?;
    // Nothing answers a RST. The kernel sends one for a connection that it does not know, and the client may begin it anew.
    if segment.flags.any(TcpFlags::RST) {
        return None;
    }
    let key = packet.with(segment).key.reversed();
    let answer = AnswerKey::new(&key, protocol);
    let is_recent = |at| now.since_any_cpu(at) < second(config);
    if tables.answered(&answer).is_some_and(is_recent) {
        return None;
    }
    // What TC redirects here is portfwd's own: the answer has a flow. It is not to be left to the kernel once the flow is over.
    if flows.flow(Table::Flows, &key).is_some() || flows.flow(Table::Opening, &key).is_some() {
        return None;
    }
    // Routed through, as IPv6 mostly is: no rule listens on that address.
    let endpoint = EndpointKey::new(key.dst, protocol, key.ports.dst());
    if tables.is_own(key.dst) || tables.rest(&endpoint).is_some() {
        tables.await_answer(&answer, now);
    }
    None
}
