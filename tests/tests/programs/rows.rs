//! What frames become, as rows with a sentence each. What must come out is built by etherparse, not by the model.

use portfwd_common::{
    abi::{Limits, Protocol, Rate},
    datapath::{DropReason, PassReason},
    model::{
        frame::{Draft, Mac, Transport, after_hop, error, ethernet},
        rules::Forward,
        world::{BACKEND_MAC, LAN, LAN_MAC, NARROW_MAC, UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::{fragments, speaking};

const SYN: u8 = 0x02;
/// The client's port.
pub const CLIENT: u16 = 40_000;

/// What a program makes of a frame.
#[derive(Clone, Debug)]
pub enum Becomes {
    /// Sent on as this frame.
    Redirected(Vec<u8>),
    /// Up the stack as this frame.
    Up(Vec<u8>),
    /// Up the stack bit for bit as it came.
    Untouched(PassReason),
    /// Refused.
    Dropped(DropReason),
}

use Becomes::{Dropped, Redirected, Untouched, Up};

/// A row.
pub struct Row {
    /// What happens.
    pub sentence: &'static str,
    /// Frames that came before.
    pub earlier: Vec<(u32, Vec<u8>)>,
    /// The frame, and the interface it comes in by.
    pub frame: (u32, Vec<u8>),
    /// Behind XDP there is TC.
    pub by_xdp: Becomes,
    /// Alone, or behind XDP.
    pub by_tc: Becomes,
}

impl Row {
    /// XDP and TC make the same of it.
    pub fn new(sentence: &'static str, frame: (u32, Vec<u8>), becomes: Becomes) -> Self {
        Self {
            sentence,
            earlier: Vec::new(),
            frame,
            by_xdp: becomes.clone(),
            by_tc: becomes,
        }
    }

    /// XDP leaves it to TC.
    pub fn slow(sentence: &'static str, frame: (u32, Vec<u8>), by_tc: Becomes) -> Self {
        Self {
            by_xdp: Untouched(PassReason::SlowPath),
            ..Self::new(sentence, frame, by_tc)
        }
    }

    /// The same after other frames.
    pub fn after(self, earlier: &[(u32, Vec<u8>)]) -> Self {
        Self {
            earlier: earlier.to_vec(),
            ..self
        }
    }
}

const ONE_AN_HOUR: Rate = Rate {
    flows: 1,
    seconds: 3_600,
    burst: 1,
};
const TWO_AN_HOUR: Rate = Rate {
    flows: 2,
    seconds: 3_600,
    burst: 2,
};

/// Rules that reach every kind of backend.
pub fn rules(world: &World) -> Vec<Forward> {
    let udp = |port, target| Forward::new(Protocol::Udp, port, target);
    vec![
        Forward::new(Protocol::Tcp, 80, at(world.target, 8080)),
        Forward::new(Protocol::Tcp, 81, at(world.target, 8080)),
        udp(53, at(world.target, 1053)),
        udp(100, at(world.second_target, 200)).to(109),
        udp(105, at(world.target, 5)),
        udp(53, at(world.second_target, 53)).on(world.second_listen),
        udp(441, at(world.silent_target, 1)),
        udp(442, at(world.narrow_target, 2)),
        udp(443, at(world.tunnel_target, 3)),
        udp(444, at(world.far_target, 4)),
        udp(445, at(world.lost_target, 5)),
        udp(446, at(world.slow_target, 6)),
        udp(447, at(world.target, 7)).limited(Limits {
            flows: 2,
            source_flows: 1,
            source_bits: world.bits(),
            ..Limits::NONE
        }),
        udp(448, at(world.target, 8)).limited(Limits {
            rate: TWO_AN_HOUR,
            source_rate: ONE_AN_HOUR,
            source_bits: world.bits(),
            ..Limits::NONE
        }),
    ]
}

/// A packet in a frame of the upstream router.
pub fn by_wan(draft: &Draft) -> (u32, Vec<u8>) {
    (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &draft.packet()))
}

/// A packet in a frame of a backend.
pub fn by_lan(draft: &Draft) -> (u32, Vec<u8>) {
    (LAN, ethernet(LAN_MAC, BACKEND_MAC, &draft.packet()))
}

/// The packet after the gateway, to a backend.
pub fn to_lan(draft: Draft) -> Becomes {
    Redirected(ethernet(BACKEND_MAC, LAN_MAC, &draft.hop().packet()))
}

/// The packet after the gateway, to the upstream router.
pub fn to_wan(draft: Draft) -> Becomes {
    Redirected(ethernet(UPSTREAM_MAC, WAN_MAC, &draft.hop().packet()))
}

/// All rows.
pub fn rows(world: &World) -> Vec<Row> {
    let mut rows = carried(world);
    rows.extend(errors(world));
    rows.extend(departures(world));
    rows.extend(left_alone(world));
    rows.extend(refused(world));
    rows.extend(limited(world));
    rows.extend(speaking::rows(world));
    rows.extend(fragments::rows(world));
    rows
}

fn carried(world: &World) -> Vec<Row> {
    let client = at(world.client, CLIENT);
    let listen = |port| at(world.listen, port);
    let syn = Draft::tcp(client, listen(80), SYN);
    let web = at(world.target, 8080);
    let question = Draft::udp(client, listen(53));
    let dns = at(world.target, 1053);
    let unsummed = Draft {
        transport: Transport::UdpWithoutSum,
        ..question.clone()
    };
    let zero = with_sum_zero(&question.between(client, dns));
    let mut rows = vec![
        Row::new(
            "a SYN to a listen port reaches the target's port",
            by_wan(&syn),
            to_lan(syn.between(client, web)),
        ),
        Row::new(
            "so does what follows it",
            by_wan(&syn),
            to_lan(syn.between(client, web)),
        )
        .after(&[by_wan(&syn)]),
        Row::new(
            "the answer comes from the listen endpoint",
            by_lan(&syn.between(web, client)),
            to_wan(syn.between(listen(80), client)),
        )
        .after(&[by_wan(&syn)]),
        Row::new(
            "a datagram reaches the target's port",
            by_wan(&question),
            to_lan(question.between(client, dns)),
        ),
        Row::new(
            "its answer comes from the listen endpoint",
            by_lan(&question.between(dns, client)),
            to_wan(question.between(listen(53), client)),
        )
        .after(&[by_wan(&question)]),
        Row::new(
            "a datagram without header sum stays without",
            by_wan(&unsummed),
            to_lan(unsummed.between(client, dns)),
        ),
        Row::new(
            "a header sum that becomes zero is sent as all ones",
            by_wan(&zero.between(client, listen(53))),
            to_lan(zero),
        ),
        Row::new(
            "the first port of a range",
            by_wan(&question.between(client, listen(100))),
            to_lan(question.between(client, at(world.second_target, 200))),
        ),
        Row::new(
            "the last port of a range",
            by_wan(&question.between(client, listen(109))),
            to_lan(question.between(client, at(world.second_target, 209))),
        ),
        Row::new(
            "an exact port goes before the range around it",
            by_wan(&question.between(client, listen(105))),
            to_lan(question.between(client, at(world.target, 5))),
        ),
        Row::new(
            "a listen address goes before any",
            by_wan(&question.between(client, at(world.second_listen, 53))),
            to_lan(question.between(client, at(world.second_target, 53))),
        ),
    ];
    if world.is_v4() {
        let optioned = Draft {
            ip_options: vec![1; 40],
            ..question
        };
        rows.push(Row::new(
            "IPv4 options stay as they are",
            by_wan(&optioned),
            to_lan(optioned.between(client, dns)),
        ));
    }
    rows
}

/// The datagram with two more bytes, chosen so that its sum comes out as zero.
fn with_sum_zero(draft: &Draft) -> Draft {
    let at = draft.headers_len() - 2;
    (0..=u16::MAX)
        .map(|word| {
            draft
                .clone()
                .payload([&draft.payload[..], &word.to_be_bytes()].concat())
        })
        .find(|draft| draft.packet()[at..at + 2] == [0xff, 0xff])
        .unwrap()
}

fn errors(world: &World) -> Vec<Row> {
    let (client, listen) = (at(world.client, CLIENT), at(world.listen, 80));
    let target = at(world.target, 8080);
    let syn = Draft::tcp(client, listen, SYN).payload([7; 100]);
    let delivered = syn.between(client, target).packet();
    let answered = syn.between(target, client).packet();
    let received = syn.between(listen, client).packet();
    let answer = Draft::tcp(target, client, SYN | 0x10).numbers(syn.sequence, syn.sequence + 1);
    let shortest = if world.is_v4() { 28 } else { 48 };
    let (unreachable, too_big) = if world.is_v4() {
        ((3, 3), (3, 4))
    } else {
        ((1, 4), (2, 0))
    };
    let rest = [0, 0, 5, 0x14];
    let lan = |packet: &[u8]| (LAN, ethernet(LAN_MAC, BACKEND_MAC, packet));
    let wan = |packet: &[u8]| (WAN, ethernet(WAN_MAC, UPSTREAM_MAC, packet));
    let mut rows = Vec::new();
    for (sentence, len) in [
        (
            "an error reaches the client with its own packet quoted",
            delivered.len(),
        ),
        (
            "an error reaches the client though it quotes eight bytes of TCP",
            shortest,
        ),
    ] {
        let arriving = error(
            world.lan_router,
            world.client,
            unreachable.0,
            unreachable.1,
            rest,
            &delivered[..len],
        );
        let leaving = error(
            world.listen,
            world.client,
            unreachable.0,
            unreachable.1,
            rest,
            &syn.packet()[..len],
        );
        let becomes = Redirected(ethernet(UPSTREAM_MAC, WAN_MAC, &after_hop(leaving)));
        rows.push(Row::new(sentence, lan(&arriving), becomes).after(&[by_wan(&syn)]));
    }
    for (sentence, len) in [
        (
            "an MTU reaches the backend with its own packet quoted",
            received.len(),
        ),
        (
            "an MTU reaches the backend though the error quotes eight bytes of TCP",
            shortest,
        ),
    ] {
        let arriving = error(
            world.wan_router,
            world.listen,
            too_big.0,
            too_big.1,
            rest,
            &received[..len],
        );
        let leaving = error(
            world.wan_router,
            world.target,
            too_big.0,
            too_big.1,
            rest,
            &answered[..len],
        );
        let becomes = Redirected(ethernet(BACKEND_MAC, LAN_MAC, &after_hop(leaving)));
        rows.push(
            Row::new(sentence, wan(&arriving), becomes).after(&[by_wan(&syn), by_lan(&answer)]),
        );
    }
    let cut = error(
        world.lan_router,
        world.client,
        unreachable.0,
        unreachable.1,
        rest,
        &delivered[..shortest - 1],
    );
    rows.push(
        Row::new(
            "an error that quotes less than eight bytes is nobody's",
            lan(&cut),
            Untouched(PassReason::Malformed),
        )
        .after(&[by_wan(&syn)]),
    );
    let stranger = error(
        world.lan_router,
        world.client,
        unreachable.0,
        unreachable.1,
        rest,
        &delivered,
    );
    rows.push(Row::new(
        "an error about a flow that is not there does not leave if two rules have the target",
        lan(&stranger),
        Dropped(DropReason::PrivateSource),
    ));
    rows
}

fn departures(world: &World) -> Vec<Row> {
    let client = at(world.client, CLIENT);
    let to = |port| Draft::udp(client, at(world.listen, port));
    let frame = |dst: Mac, src: Mac, draft: Draft| ethernet(dst, src, &draft.packet());
    let up = |draft: Draft| frame(WAN_MAC, UPSTREAM_MAC, draft);
    let sized = |draft: Draft, len: usize| {
        let headers = draft.headers_len();
        draft.payload(vec![0x5a; len - headers])
    };
    let (silent, narrow, tunnel, far, lost, slow) = (
        at(world.silent_target, 1),
        at(world.narrow_target, 2),
        at(world.tunnel_target, 3),
        at(world.far_target, 4),
        at(world.lost_target, 5),
        at(world.slow_target, 6),
    );
    let dns = at(world.target, 1053);
    let last_hop = to(53).hop_limit(1);
    let large = sized(to(446), 1301);
    let small = sized(to(446), 1300);
    let answer = to(53).between(dns, client).hop_limit(1);
    vec![
        Row::slow(
            "a neighbour that is not known is asked for by the kernel",
            by_wan(&to(441)),
            Redirected(up(to(441).between(client, silent).hop())),
        ),
        Row::slow(
            "an interface that takes nothing from XDP",
            by_wan(&to(442)),
            Redirected(frame(
                BACKEND_MAC,
                NARROW_MAC,
                to(442).between(client, narrow).hop(),
            )),
        ),
        Row::slow(
            "an interface without link header",
            by_wan(&to(443)),
            Redirected(up(to(443).between(client, tunnel).hop())),
        ),
        Row::slow(
            "an interface of no program",
            by_wan(&to(444)),
            Redirected(up(to(444).between(client, far).hop())),
        ),
        Row::slow(
            "no route: the kernel answers about the translated packet",
            by_wan(&to(445)),
            Up(up(to(445).between(client, lost))),
        ),
        Row::slow(
            "the last hop: the kernel answers about the translated packet",
            by_wan(&last_hop),
            Up(up(last_hop.between(client, dns))),
        ),
        Row::new(
            "as large as the route takes",
            by_wan(&small),
            to_lan(small.between(client, slow)),
        ),
        Row::slow(
            "larger than the route takes: the kernel answers",
            by_wan(&large),
            Up(up(large.between(client, slow))),
        ),
        Row::slow(
            "an answer with its last hop stays as it came",
            by_lan(&answer),
            Untouched(PassReason::HopLimit),
        )
        .after(&[by_wan(&to(53))]),
    ]
}

fn left_alone(world: &World) -> Vec<Row> {
    let client = at(world.client, CLIENT);
    let to = |listen| Draft::tcp(client, listen, SYN);
    let frame = by_wan(&to(at(world.listen, 80))).1;
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = frame.clone();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        (WAN, frame)
    };
    let untouched = |sentence, frame, reason| Row::new(sentence, frame, Untouched(reason));
    let protocol = if world.is_v4() { 14 + 9 } else { 14 + 6 };
    let mut rows = vec![
        untouched("an ARP frame", with(12, &[8, 6]), PassReason::NotIp),
        untouched(
            "a frame with a VLAN tag",
            (WAN, [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat()),
            PassReason::NotIp,
        ),
        untouched(
            "a frame to another station",
            with(0, &[2, 9, 9, 9, 9, 9]),
            PassReason::NotForUs,
        ),
        untouched(
            "a frame to a group",
            with(0, &[1, 0, 0x5e, 0, 0, 1]),
            PassReason::NotForUs,
        ),
        untouched(
            "a broadcast frame",
            with(0, &[0xff; 6]),
            PassReason::NotForUs,
        ),
        untouched(
            "a packet of a protocol without ports",
            with(protocol, &[47]),
            PassReason::Protocol,
        ),
        untouched(
            "a packet to a port without rule",
            by_wan(&to(at(world.listen, 82))),
            PassReason::NoRule,
        ),
        untouched(
            "a packet to an address that nothing listens on",
            by_wan(&to(at(world.lan_address, 80))),
            PassReason::NoRule,
        ),
        untouched(
            "a packet from an address of the gateway",
            by_wan(&to(at(world.listen, 80)).between(at(world.listen, 80), at(world.listen, 80))),
            PassReason::NotUnicast,
        ),
        untouched(
            "a backend that speaks from a port of its own",
            by_lan(&Draft::tcp(at(world.target, 8079), client, SYN)),
            PassReason::NoFlow,
        ),
    ];
    if world.is_v4() {
        rows.push(untouched(
            "a header of 16 bytes",
            with(14, &[0x44]),
            PassReason::Malformed,
        ));
        rows.push(untouched(
            "a packet longer than its frame",
            with(14 + 2, &[0xff, 0xff]),
            PassReason::Malformed,
        ));
    } else {
        rows.push(untouched(
            "a packet longer than its frame",
            with(14 + 4, &[0xff, 0xff]),
            PassReason::Malformed,
        ));
    }
    rows
}

/// Rules with limits.
fn limited(world: &World) -> Vec<Row> {
    let dial = |source, client_port, port| {
        by_wan(&Draft::udp(at(source, client_port), at(world.listen, port)))
    };
    let (client, second, third) = (world.client, world.second_client, world.tunnel_client);
    let answer = Draft::udp(at(world.target, 7), at(client, 1));
    vec![
        Row::new(
            "the flow of a source that has as many as it may",
            dial(client, 2, 447),
            Dropped(DropReason::SourceFlows),
        )
        .after(&[dial(client, 1, 447)]),
        Row::new(
            "the flow of another source",
            dial(second, 2, 447),
            to_lan(Draft::udp(at(second, 2), at(world.target, 7))),
        )
        .after(&[dial(client, 1, 447)]),
        Row::new(
            "the flow of a rule that has as many as it may",
            dial(third, 3, 447),
            Dropped(DropReason::RuleFlows),
        )
        .after(&[dial(client, 1, 447), dial(second, 2, 447)]),
        Row::new(
            "an answer of a flow of a rule that has as many as it may",
            by_lan(&answer),
            to_wan(answer.between(at(world.listen, 447), at(client, 1))),
        )
        .after(&[dial(client, 1, 447), dial(second, 2, 447)]),
        Row::new(
            "a flow that its source begins too soon",
            dial(client, 2, 448),
            Dropped(DropReason::SourceRate),
        )
        .after(&[dial(client, 1, 448)]),
        Row::new(
            "a flow that another source begins",
            dial(second, 2, 448),
            to_lan(Draft::udp(at(second, 2), at(world.target, 8))),
        )
        .after(&[dial(client, 1, 448)]),
        Row::new(
            "a flow that begins too soon for the rule",
            dial(third, 3, 448),
            Dropped(DropReason::RuleRate),
        )
        .after(&[dial(client, 1, 448), dial(second, 2, 448)]),
    ]
}

fn refused(world: &World) -> Vec<Row> {
    let client = at(world.client, CLIENT);
    let (web, other) = (at(world.listen, 80), at(world.listen, 81));
    let flags = |flags| by_wan(&Draft::tcp(client, web, flags));
    let forged = |source| by_wan(&Draft::tcp(at(source, CLIENT), web, SYN));
    vec![
        Row::new("no flags", flags(0), Dropped(DropReason::BadTcpFlags)),
        Row::new("SYN and FIN", flags(0x03), Dropped(DropReason::BadTcpFlags)),
        Row::new("all flags", flags(0xff), Dropped(DropReason::BadTcpFlags)),
        Row::new(
            "a connection that its target could not tell from another",
            by_wan(&Draft::tcp(client, other, SYN)),
            Dropped(DropReason::TupleClash),
        )
        .after(&[flags(SYN)]),
        Row::new(
            "a client with the gateway's own address",
            forged(world.lan_address),
            Dropped(DropReason::MartianSource),
        ),
        Row::new(
            "a client on the WAN with an address of the LAN",
            forged(world.second_target),
            Dropped(DropReason::MartianSource),
        ),
        Row::new(
            "a client to which no route leads",
            forged(world.lost_target),
            Dropped(DropReason::MartianSource),
        ),
        Row::new(
            "a client on the LAN with an address of the WAN",
            by_lan(&Draft::tcp(client, web, SYN)),
            Dropped(DropReason::MartianSource),
        ),
    ]
}
