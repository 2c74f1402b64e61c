//! Rules with light tracking: most packets are translated by the rule, and do not look at their flow's entry.
//!
//! A packet that begins or ends something goes the way of every other rule's. Any other of a rule that [carries by
//! itself](Rule::carries_by_itself) leaves by what the slow path has found for the rule (RULE_WAYS) or for the client
//! (CLIENT_WAYS), which is as fresh as an entry must be ([`super::known`]). Once in a while it is a packet's turn to go to its
//! flow's entry: so that stays a record of what goes on. No packet is translated otherwise for what the record says.

use super::{
    Scene, Views,
    apply::apply,
    classify::{Classified, Segment},
    mss::Clamp,
    nat::admits,
    path::departure,
    tables::{Flows, Table, Tables},
    tcp::TcpFlags,
    transport,
    verdict::{Hook, PassReason, Verdict},
    workspace::{Kind, Side, Workspace},
};
use crate::{
    abi::{
        ClientWay, Config, FlowDir, FlowKey, Instant, NextHop, Peer, Protocol, Rewrite, Role, Rule,
        RuleWay,
        light::{Mark, turn_class},
        rule::port_index,
    },
    net::{Address, Ipv6, PacketBuf, Sum, be::Ports},
};

/// What becomes of a packet where there are rules with light tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    /// It looks at its flow's entry, as packets of other rules do.
    Ordinary,
    /// The slow path finds the way out anew.
    Slow,
    /// It is decided.
    Done(Verdict),
}

/// The hot path where there are rules with light tracking. `None` as for [`transport::carry_fast`].
#[inline(always)]
pub fn carry_fast<A, P, F, T>(
    views: Views<P>,
    flows: &mut F,
    scene: &Scene<'_, T>,
) -> Option<Verdict>
where
    A: Address,
    P: PacketBuf,
    F: Flows<A>,
    T: Tables,
{
    let classified = transport::classified::<A, P>(views)?;
    match carry(&classified, scene) {
        Course::Ordinary => transport::carry_classified(&classified, flows, scene),
        Course::Slow => None,
        Course::Done(verdict) => Some(verdict),
    }
}

/// Carries a packet of a rule with light tracking, if it is one that can do without its flow's entry. What the gateway itself sends has
/// its direction from the entry, and so has what comes in where clients and targets are on one side.
#[inline(always)]
fn carry<A, P, T>(classified: &Classified<A, P>, scene: &Scene<'_, T>) -> Course
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    if !is_steady(&classified.segment) {
        return Course::Ordinary;
    }
    match (scene.arrival.hook, scene.ingress.role()) {
        (Hook::TcOut, _) | (Hook::Xdp | Hook::Tc | Hook::TcSlow, Role::Both) => Course::Ordinary,
        (Hook::Xdp | Hook::Tc | Hook::TcSlow, Role::Wan) => to_target(classified, scene),
        (Hook::Xdp | Hook::Tc | Hook::TcSlow, Role::Lan) => to_client(classified, scene),
    }
}

/// Whether a packet neither begins nor ends a connection.
#[inline(always)]
const fn is_steady(segment: &Segment) -> bool {
    const TURNING: u8 = TcpFlags::SYN | TcpFlags::FIN | TcpFlags::RST;
    match segment.protocol {
        Protocol::Udp => true,
        Protocol::Tcp => segment.flags.0 & (TURNING | TcpFlags::ACK) == TcpFlags::ACK,
        Protocol::Echo => false,
    }
}

#[inline(always)]
fn to_target<A, P, T>(classified: &Classified<A, P>, scene: &Scene<'_, T>) -> Course
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let (key, tables) = (&classified.key, scene.tables);
    let (protocol, port) = (classified.segment.protocol, key.ports.dst());
    let covering = tables.port(port_index(protocol.class(A::FAMILY), port));
    let Some(rule) = tables.rule(covering.rule()) else {
        return Course::Ordinary;
    };
    if covering.is_scoped()
        || !rule.carries_by_itself()
        || !rule.covers(port)
        || !is_dialled(rule, key.dst, scene)
        || !admits(rule.sources, key.src, tables)
    {
        return Course::Ordinary;
    }
    let way = tables.rule_way(covering.rule());
    if !way.is_good(scene.config, scene.now) {
        return Course::Slow;
    }
    let Some(hop) = tables.next_hop(way.number()) else {
        return Course::Slow;
    };
    if !is_plausible(key, &hop, tables) {
        return Course::Ordinary;
    }
    let target: A = A::narrow(rule.target);
    let ports = Ports::new(key.ports.src(), rule.target_port(port));
    let [_, old_port] = key.ports.words();
    let [_, new_port] = ports.words();
    let rewrite = Rewrite {
        src: key.src,
        dst: target,
        ports,
        address_delta: Sum::ZERO.replace_sum(key.dst.sum(), target.sum()).delta(),
        port_delta: Sum::ZERO.replace(old_port, new_port).delta(),
    };
    let passage = Passage {
        direction: FlowDir::Original,
        client: key.src,
        client_port: key.ports.src(),
        listen_port: port,
        counter: rule.counter(port),
    };
    leave(classified, &rewrite, &hop, &passage, scene)
}

#[inline(always)]
fn to_client<A, P, T>(classified: &Classified<A, P>, scene: &Scene<'_, T>) -> Course
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let (key, tables) = (&classified.key, scene.tables);
    let Some(way) = tables.client_way(ClientWay::slot(key)) else {
        return Course::Ordinary;
    };
    if !way.is_of(key, classified.segment.protocol) {
        return miss(key, scene);
    }
    if !way.is_good(scene.config, scene.now) {
        // An old one says nothing: its rule may have gone, or may not carry by itself any more, and the slow path would find nothing
        // to put in its place.
        return if way.is_recent(scene.config, scene.now) {
            Course::Slow
        } else {
            miss(key, scene)
        };
    }
    let Some(hop) = tables.next_hop(way.number) else {
        return Course::Slow;
    };
    let rewrite = Rewrite {
        src: A::narrow(way.listen),
        dst: key.dst,
        ports: Ports::new(way.listen_port, key.ports.dst()),
        address_delta: way.address_delta,
        port_delta: way.port_delta,
    };
    let passage = Passage {
        direction: FlowDir::Reply,
        client: key.dst,
        client_port: key.ports.dst(),
        listen_port: way.listen_port,
        counter: way.counter,
    };
    leave(classified, &rewrite, &hop, &passage, scene)
}

/// What becomes of a packet from the LAN whose way this CPU does not know. Now and then it is looked up, whatever its entry says: that
/// may be good for long, because packets on other CPUs keep it so.
#[inline(always)]
fn miss<A: Address, T: Tables>(key: &FlowKey<A>, scene: &Scene<'_, T>) -> Course {
    let period = period(scene.config, scene.now);
    let ports = (key.ports.dst(), key.ports.src());
    let class = turn_class(key.dst, ports.0, ports.1, FlowDir::Reply, period);
    // Of each CPU's own.
    let class = class ^ (scene.tables.cpu() as u16).wrapping_add(1).rotate_left(8);
    if has_turn(class, period, scene) {
        Course::Slow
    } else {
        Course::Ordinary
    }
}

/// Whose packet it is, and where it counts.
struct Passage<A> {
    direction: FlowDir,
    client: A,
    client_port: u16,
    listen_port: u16,
    counter: u32,
}

/// Sends a packet on its way, unless something is in it or the flow's entry is to hear of it.
#[inline(always)]
fn leave<A, P, T>(
    classified: &Classified<A, P>,
    rewrite: &Rewrite<A>,
    hop: &NextHop,
    passage: &Passage<A>,
    scene: &Scene<'_, T>,
) -> Course
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    // Known without another look: TC will send it.
    if scene.arrival.hook == Hook::Xdp && !hop.takes_xdp() {
        return Course::Done(Verdict::Pass(PassReason::SlowPath));
    }
    if !classified
        .load(scene.arrival)
        .may_leave_by(hop, scene.arrival)
    {
        return Course::Slow;
    }
    if takes_turn(passage, scene) {
        return Course::Ordinary;
    }
    let traffic = classified.traffic(scene.arrival);
    scene
        .tables
        .count(passage.counter, passage.direction, traffic);
    Course::Done(apply(
        &classified.packet,
        classified.segment.protocol,
        rewrite,
        Clamp::NONE,
        &departure(hop, scene.arrival),
    ))
}

/// Whether a client has dialled this address of a rule's. A rule without one that carries by itself has only one address to
/// listen on, and where that is not the interface's first one, the entry is asked.
#[inline(always)]
fn is_dialled<A: Address, T>(rule: &Rule, address: A, scene: &Scene<'_, T>) -> bool {
    if rule.is_any_address() {
        scene.ingress.address::<A>() == Some(address)
    } else {
        let listen: Ipv6 = rule.listen;
        listen == address.widen()
    }
}

/// Whether a client can be where a packet came from, as far as can be told without its route: no packet from the WAN has a source
/// in the network that its target is reached by. The ordinary way asks more.
#[inline(always)]
fn is_plausible<A: Address, T: Tables>(key: &FlowKey<A>, hop: &NextHop, tables: &T) -> bool {
    let is_near = tables
        .interface(hop.slot)
        .is_some_and(|egress| egress.is_near(key.src));
    key.src.is_unicast() && key.src != key.dst && !is_near
}

/// Whether it is a packet's turn to go to its flow's entry; then it has had it.
#[inline(always)]
fn takes_turn<A: Address, T: Tables>(passage: &Passage<A>, scene: &Scene<'_, T>) -> bool {
    let period = period(scene.config, scene.now);
    let class = turn_class(
        passage.client,
        passage.client_port,
        passage.listen_port,
        passage.direction,
        period,
    );
    has_turn(class, period, scene)
}

/// Whether a class has its turn; then it has had it.
#[inline(always)]
fn has_turn<T: Tables>(class: u16, period: u32, scene: &Scene<'_, T>) -> bool {
    let Scene {
        config,
        tables,
        now,
        ..
    } = *scene;
    let (mark, taken) = (tables.turn(class), Mark::taken(period));
    if mark == taken {
        return false;
    }
    if mark != Mark::OWED {
        // Several CPUs may spend the same one. It is only that there be no crowd.
        let spent = tables.turns_spent();
        let in_tick = if (spent >> 32) as u32 == now.ticks() {
            spent as u32
        } else {
            0
        };
        if in_tick >= config.turns_per_tick {
            return false;
        }
        let spent = (u64::from(now.ticks()) << 32) | u64::from(in_tick + 1);
        tables.spend_turns(spent);
    }
    tables.set_turn(class, taken);
    true
}

#[inline(always)]
const fn period(config: &Config, now: Instant) -> u32 {
    now.ticks() >> (config.turn_bits & 31)
}

/// Keeps the way out that the slow path has found for a packet of a rule with light tracking. What begins a flow is followed by
/// another turn: the segment that completes a handshake, and the datagram that proves that there is more than one, are met.
#[inline(always)]
pub fn keep<A: Address, T: Tables>(work: &Workspace<A>, scene: &Scene<'_, T>) {
    if work.subject.kind != Kind::Segment || work.peer != Peer::Client {
        return;
    }
    let is_new = work.subject.protocol == Protocol::Udp && work.track.table == Table::Opening;
    match (work.direction, work.subject.side) {
        (FlowDir::Original, Side::Wan) => {
            if let Some(number) = work.way() {
                let way = RuleWay::new(number, scene.config, scene.now);
                scene.tables.set_rule_way(work.light, way);
            }
            if is_new {
                owe(&work.key, FlowDir::Original, Mark::DUE, scene);
            }
        }
        (FlowDir::Reply, Side::Lan) => {
            keep_client_way(work, scene);
            let dialled = work.to.reversed();
            if work.subject.flags.any(TcpFlags::SYN) {
                owe(&dialled, FlowDir::Original, Mark::OWED, scene);
            }
            if is_new {
                owe(&dialled, FlowDir::Reply, Mark::DUE, scene);
            }
        }
        (FlowDir::Original, Side::Lan | Side::Both | Side::Out)
        | (FlowDir::Reply, Side::Wan | Side::Both | Side::Out) => {}
    }
}

/// Keeps how what a target endpoint answers to a client leaves, if that is by the WAN.
#[inline(always)]
fn keep_client_way<A: Address, T: Tables>(work: &Workspace<A>, scene: &Scene<'_, T>) {
    let (Some(number), hop) = (work.way(), &work.path.hop) else {
        return;
    };
    let leaves_by_wan = scene
        .tables
        .interface(hop.slot)
        .is_some_and(|egress| egress.ifindex == hop.ifindex && egress.role().is_wan());
    // One read: who takes its carriage from a rule has packets go over to the other bank and raises the generation at one instant.
    let epoch = scene.config.epoch;
    if epoch.bank() != work.bank {
        return;
    }
    let still_carries = scene
        .tables
        .rule(work.light)
        .is_some_and(Rule::carries_by_itself);
    if !leaves_by_wan || !still_carries {
        return;
    }
    let way = ClientWay {
        target: work.key.src.widen(),
        client: work.key.dst.widen(),
        listen: work.to.src.widen(),
        target_port: work.key.ports.src(),
        listen_port: work.to.ports.src(),
        class: work.subject.protocol.class(A::FAMILY),
        number,
        counter: work.mapping.counter,
        found: scene.now,
        generation: epoch.generation(),
        address_delta: work.entry.rewrite.address_delta,
        port_delta: work.entry.rewrite.port_delta,
        padding: 0,
    };
    scene
        .tables
        .set_client_way(ClientWay::slot(&work.key), &way);
}

/// Gives the class of a client's packets, or of what answers them, another turn. `dialled` is what the client's carry.
#[inline(always)]
fn owe<A: Address, T: Tables>(
    dialled: &FlowKey<A>,
    direction: FlowDir,
    mark: Mark,
    scene: &Scene<'_, T>,
) {
    let class = turn_class(
        dialled.src,
        dialled.ports.src(),
        dialled.ports.dst(),
        direction,
        period(scene.config, scene.now),
    );
    scene.tables.set_turn(class, mark);
}
