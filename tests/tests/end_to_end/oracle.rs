//! The same packets through two gateways with the same rules, portfwd and the kernel's own NAT (nftables): the same comes out, or the
//! row says why not. `PORTFWD_EFFORT=100` plays a hundred times as many conversations.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use portfwd_common::model::effort::cases;
use portfwd_common::model::frame::{Draft, Transport, error, fragments, with_options};
use portfwd_tests::address::{CLIENT, DualStack, ROUTER_LAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::link::End;
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, Lab, LabOptions, Namespace, Offloads, nftables};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

const SEED: u64 = 20_261_127;
/// Port of the datagrams that say that everything before them has come through.
const MARKER_PORT: u16 = 60_000;

/// Who sends a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

use Side::{Client, Server};

/// Packets, in turn.
type Steps = Vec<(Side, Vec<u8>)>;

/// What came out of a gateway, as it came.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    at_client: Vec<Vec<u8>>,
    at_server: Vec<Vec<u8>>,
}

/// A lab, a gateway in it, and both its wires.
struct Contestant {
    client: Wire,
    server: Wire,
    /// Goes before the lab.
    _daemon: Option<Daemon>,
    _lab: Lab,
}

impl Contestant {
    fn portfwd(mode: Mode) -> Result<Self> {
        let lab = LabOptions::for_mode(mode).offloads(Offloads::Off);
        let scene = Scene::with(lab, DaemonOptions::new(mode))?;
        scene.forward("both")?;
        Self::of(scene.lab, Some(scene.daemon))
    }

    fn kernel() -> Result<Self> {
        let lab = LabOptions::default().offloads(Offloads::Off).build()?;
        let forwards = Family::BOTH.map(|family| nftables::Forward {
            listen: listen(family),
            target: SERVER.endpoint(family, TARGET),
        });
        nftables::forward(&lab.gateway, &forwards)?;
        Self::of(lab, None)
    }

    fn of(lab: Lab, daemon: Option<Daemon>) -> Result<Self> {
        for host in [&lab.client, &lab.server] {
            keep_silent(host)?;
        }
        for (near, far, address) in [
            (lab.wan_end(), lab.client_end(), CLIENT),
            (lab.lan_end(), lab.server_end(), SERVER),
            // Errors come from it, and none goes there.
            (lab.lan_end(), lab.server_end(), ROUTER_LAN),
        ] {
            introduce(near, far, address)?;
        }
        Ok(Self {
            client: Wire::between(lab.client_end(), lab.wan_end())?,
            server: Wire::between(lab.server_end(), lab.lan_end())?,
            _daemon: daemon,
            _lab: lab,
        })
    }

    /// Sends the packets and collects what comes out until a marker has come through in either direction: all of it runs on one
    /// core, in order.
    fn play(&self, family: Family, number: u64, steps: &Steps) -> Result<Seen> {
        for (side, packet) in steps {
            match side {
                Client => self.client.send(packet)?,
                Server => self.server.send(packet)?,
            }
        }
        let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
        // Twice: what goes up the stack may be overtaken once.
        for round in [0, 1] {
            let marker = [b"all of it ", &number.to_be_bytes()[..], &[round]].concat();
            let (peer, own) = (
                CLIENT.endpoint(family, MARKER_PORT),
                SERVER.endpoint(family, TARGET),
            );
            let arrived = |packet: &[u8]| packet.ends_with(&marker);
            let there = Draft::udp(peer, listen(family)).payload(marker.clone());
            self.client.send(&there.packet())?;
            at_server.extend(self.server.receive_until(PATIENCE, arrived)?);
            self.server
                .send(&Draft::udp(own, peer).payload(marker.clone()).packet())?;
            at_client.extend(self.client.receive_until(PATIENCE, arrived)?);
        }
        let known = |packets: Vec<Vec<u8>>| packets.into_iter().filter_map(comparable).collect();
        Ok(Seen {
            at_client: known(at_client),
            at_server: known(at_server),
        })
    }
}

/// Lets a host's own stack send nothing.
fn keep_silent(host: &Namespace) -> Result<()> {
    let rules = "table inet silence {\n chain output {\n  type filter hook output priority 0; policy drop;\n }\n}\n";
    nftables::load(host, rules)
}

/// Tells the gateway who is at an address, so that it never has to ask.
fn introduce(near: End<'_>, far: End<'_>, address: DualStack) -> Result<()> {
    let mac = far.mac()?.map(|byte| format!("{byte:02x}")).join(":");
    let interface = near.interface;
    near.namespace.ip(&format!(
        "neigh replace {} lladdr {mac} dev {interface} nud permanent\n\
         neigh replace {} lladdr {mac} dev {interface} nud permanent\n",
        address.v4, address.v6
    ))
}

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const FRAGMENT: u8 = 44;

/// A packet without what the kernel picks at random; `None` if it is none of this conversation.
fn comparable(mut packet: Vec<u8>) -> Option<Vec<u8>> {
    match (packet[0] >> 4, packet[9], packet[6]) {
        // The identification of an error, and with it the header's sum.
        (4, ICMP, _) => {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        }
        (4, _, _) => {}
        // Hop-by-hop options of listener reports, neighbour and router discovery.
        (6, _, 0) if packet.get(40) == Some(&ICMPV6) => return None,
        (6, _, ICMPV6) if matches!(packet[40], 130..=143) => return None,
        // The flow label of an error.
        (6, _, ICMPV6) => packet[1..4].fill(0),
        // The kernel puts datagrams together and takes them apart again, under another identification.
        (6, _, FRAGMENT) => packet[44..48].fill(0),
        (6, _, _) => {}
        _ => return None,
    }
    Some(packet)
}

/// Where everybody is.
#[derive(Clone, Copy)]
struct Ends {
    family: Family,
    client: SocketAddr,
    listen: SocketAddr,
    target: SocketAddr,
}

impl Ends {
    fn of(family: Family, port: u16) -> Self {
        Self {
            family,
            client: CLIENT.endpoint(family, port),
            listen: listen(family),
            target: SERVER.endpoint(family, TARGET),
        }
    }

    fn syn(&self) -> Draft {
        Draft {
            tcp_options: vec![2, 4, 5, 0, 1, 3, 3, 7],
            ..Draft::tcp(self.client, self.listen, 0x02).numbers(1_000, 0)
        }
    }

    fn syn_ack(&self) -> Draft {
        Draft {
            tcp_options: vec![2, 4, 5, 0, 1, 3, 3, 7],
            ..Draft::tcp(self.target, self.client, 0x12).numbers(5_000, 1_001)
        }
    }

    fn segment(&self, side: Side, flags: u8, numbers: (u32, u32)) -> Draft {
        let (source, destination) = match side {
            Client => (self.client, self.listen),
            Server => (self.target, self.client),
        };
        Draft::tcp(source, destination, flags).numbers(numbers.0, numbers.1)
    }

    /// A handshake, and 100 bytes each way, all of it acknowledged: the client goes on at 1,101, the server at 5,101.
    fn established(&self) -> Steps {
        let data = |side, numbers| self.segment(side, 0x18, numbers).payload([7; 100]).packet();
        vec![
            (Client, self.syn().packet()),
            (Server, self.syn_ack().packet()),
            (Client, self.segment(Client, 0x10, (1_001, 5_001)).packet()),
            (Client, data(Client, (1_001, 5_001))),
            (Server, data(Server, (5_001, 1_101))),
            (Client, self.segment(Client, 0x10, (1_101, 5_101)).packet()),
        ]
    }

    /// An established connection and then this.
    fn then(&self, rest: impl IntoIterator<Item = (Side, Draft)>) -> Steps {
        let rest = rest.into_iter().map(|(side, draft)| (side, draft.packet()));
        self.established().into_iter().chain(rest).collect()
    }

    fn question(&self) -> Draft {
        Draft::udp(self.client, self.listen)
    }

    fn answer(&self) -> Draft {
        Draft::udp(self.target, self.client)
    }
}

/// A conversation as hosts have them: nothing in it may differ.
fn any_conversation(rng: &mut Rng, ends: &Ends) -> Steps {
    if rng.bool() {
        any_connection(rng, ends)
    } else {
        any_datagrams(rng, ends)
    }
}

fn any_markings(rng: &mut Rng, mut draft: Draft) -> Draft {
    draft.hop_limit = if rng.u8(..) < 8 { 1 } else { rng.u8(2..) };
    draft.dont_fragment = rng.bool();
    if draft.source.is_ipv4() && rng.u8(..) < 32 {
        draft.ip_options = vec![1; 4 * rng.usize(1..=10)];
    }
    draft
}

fn any_connection(rng: &mut Rng, ends: &Ends) -> Steps {
    let mut steps = vec![
        (Client, ends.syn().packet()),
        (Server, ends.syn_ack().packet()),
    ];
    let mut next = [1_001_u32, 5_001];
    let mut closed = [false; 2];
    for number in 0..rng.usize(1..16) {
        let side = if number == 0 || rng.bool() {
            Client
        } else {
            Server
        };
        let (own, other) = match side {
            Client => (0, 1),
            Server => (1, 0),
        };
        let ends_now = !closed[own] && number > 2 && rng.u8(..) < 40;
        let length = if closed[own] { 0 } else { rng.usize(0..600) };
        let flags = 0x10 | u8::from(length > 0) << 3 | u8::from(ends_now);
        let segment = ends
            .segment(side, flags, (next[own], next[other]))
            .payload(vec![rng.u8(..); length]);
        let segment = any_markings(rng, segment).packet();
        next[own] += length as u32 + u32::from(ends_now);
        closed[own] |= ends_now;
        if rng.u8(..) < 25 {
            steps.push((side, segment.clone()));
        }
        steps.push((side, segment));
    }
    if rng.u8(..) < 64 {
        let reset = ends.segment(Client, 0x14, (next[0], next[1]));
        steps.push((Client, reset.packet()));
    }
    steps
}

fn any_datagrams(rng: &mut Rng, ends: &Ends) -> Steps {
    let mut steps = Steps::new();
    for number in 0..rng.usize(1..10) {
        let (side, draft) = if number == 0 || rng.bool() {
            (Client, ends.question())
        } else {
            (Server, ends.answer())
        };
        let payload = vec![rng.u8(..); rng.usize(0..1_300)];
        let mut draft = any_markings(rng, draft.payload(payload));
        // What the server says without having been asked leaves from the listen endpoint here, and as it is there.
        draft.hop_limit = draft.hop_limit.max(if number == 0 { 2 } else { 1 });
        if rng.u8(..) < 32 && ends.family == Family::V4 {
            draft.transport = Transport::UdpWithoutSum;
        }
        if rng.u8(..) < 32 && draft.hop_limit > 1 && draft.ip_options.is_empty() {
            let whole = draft.payload(vec![rng.u8(..); rng.usize(600..3_000)]);
            let id = rng.u32(1..0xffff);
            for piece in fragments(&whole.packet(), id, 512, 0) {
                steps.push((side, piece));
            }
            continue;
        }
        steps.push((side, draft.packet()));
        if rng.u8(..) < 32 && draft.hop_limit > 1 {
            steps.push(any_error(rng, ends, side, &draft));
        }
    }
    steps
}

/// An error about a datagram that somebody sent, of a router behind the gateway.
fn any_error(rng: &mut Rng, ends: &Ends, about: Side, sent: &Draft) -> (Side, Vec<u8>) {
    let (quoted, from, router) = match about {
        Client => (
            sent.between(ends.client, ends.target),
            Server,
            ROUTER_LAN.of(ends.family),
        ),
        Server => (
            sent.between(ends.listen, ends.client),
            Client,
            CLIENT.of(ends.family),
        ),
    };
    let quoted = quoted.hop().packet();
    let least = quoted.len() - sent.payload.len();
    let quoted = &quoted[..rng.usize(least..=quoted.len())];
    let to = match about {
        Client => ends.client.ip(),
        Server => ends.listen.ip(),
    };
    let kind = if ends.family == Family::V4 { 3 } else { 1 };
    (from, error(router, to, kind, rng.u8(0..4), [0; 4], quoted))
}

/// Runs the rest of the test on one core.
fn stay_on_one_core() -> Result<()> {
    let mut cores = CpuSet::new();
    cores.set(0)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cores)?)
}

fn hex(packets: &[Vec<u8>]) -> String {
    let line = |packet: &Vec<u8>| -> String {
        let bytes: Vec<_> = packet.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("  {}", bytes.join(" "))
    };
    packets.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn show(seen: &Seen) -> String {
    format!(
        " at the client:\n{}\n at the server:\n{}",
        hex(&seen.at_client),
        hex(&seen.at_server)
    )
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn conversations_come_out_as_through_the_kernels_own_nat(#[case] mode: Mode) -> Result<()> {
    stay_on_one_core()?;
    let (ours, theirs) = (Contestant::portfwd(mode)?, Contestant::kernel()?);
    let mut rng = Rng::with_seed(SEED);
    let mut packets = 0;
    for number in 0..u64::from(cases(300)) {
        for family in Family::BOTH {
            // A port of its own for as long as there are any.
            let ends = Ends::of(family, 1_024 + (number % 50_000) as u16);
            let steps = any_conversation(&mut rng, &ends);
            packets += steps.len();
            let [our, their] = [&ours, &theirs].map(|gateway| gateway.play(family, number, &steps));
            let (our, their) = (our.context("portfwd")?, their.context("nftables")?);
            ensure!(
                our == their,
                "conversation {number} over {family}:\nsent:\n{}\nportfwd:\n{}\nnftables:\n{}",
                hex(&steps
                    .iter()
                    .map(|(_, packet)| packet.clone())
                    .collect::<Vec<_>>()),
                show(&our),
                show(&their)
            );
        }
    }
    println!("{packets} packets, and what came of them, are the same");
    Ok(())
}

/// Whether the two agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    /// Why not.
    Differs(&'static str),
}

use Verdict::{Differs, Same};

struct Row {
    what: &'static str,
    verdict: Verdict,
    steps: fn(&Ends) -> Steps,
}

/// Turns a bit of the payload, so that no sum fits any more.
fn damaged(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if let Some(last) = packet.last_mut() {
        *last ^= 1;
    }
    packet
}

fn first_of(ends: &Ends, flags: u8) -> Steps {
    vec![(
        Client,
        Draft::tcp(ends.client, ends.listen, flags)
            .numbers(1_000, 77)
            .packet(),
    )]
}

fn pieces(ends: &Ends, order: &[usize]) -> Steps {
    let draft = Draft {
        dont_fragment: false,
        ..ends
            .question()
            .payload((0..1_400).map(|n| n as u8).collect::<Vec<_>>())
    };
    let pieces = fragments(&draft.packet(), 0x77, 512, 0);
    order
        .iter()
        .map(|at| (Client, pieces[*at].clone()))
        .collect()
}

const ODD: &[Row] = &[
    Row {
        what: "a SYN to a port of no rule",
        verdict: Same,
        steps: |ends| {
            let mut elsewhere = ends.listen;
            elsewhere.set_port(8_999);
            vec![(Client, ends.syn().between(ends.client, elsewhere).packet())]
        },
    },
    Row {
        what: "a datagram to a port of no rule",
        verdict: Same,
        steps: |ends| {
            let mut elsewhere = ends.listen;
            elsewhere.set_port(8_999);
            vec![(
                Client,
                ends.question().between(ends.client, elsewhere).packet(),
            )]
        },
    },
    Row {
        what: "a SYN with data and ECN",
        verdict: Same,
        steps: |ends| {
            let syn = Draft {
                transport: Transport::Tcp(0xc2),
                ..ends.syn().payload(*b"early")
            };
            vec![(Client, syn.packet())]
        },
    },
    Row {
        what: "a segment of no connection",
        verdict: Same,
        steps: |ends| first_of(ends, 0x10),
    },
    Row {
        what: "a reset of no connection",
        verdict: Differs(
            "the kernel keeps it; here it comes to the target, which may know the connection, and begins no flow",
        ),
        steps: |ends| first_of(ends, 0x04),
    },
    Row {
        what: "a FIN of no connection",
        verdict: Differs(
            "the kernel does not pick up connections by their FIN, and its own stack answers; here the end of a connection that was forgotten comes through",
        ),
        steps: |ends| first_of(ends, 0x11),
    },
    Row {
        what: "a SYN-ACK of no connection",
        verdict: Differs("the kernel's own stack answers with a RST; here the target does"),
        steps: |ends| first_of(ends, 0x12),
    },
    Row {
        what: "no flags",
        verdict: Differs("as with SYN and FIN"),
        steps: |ends| first_of(ends, 0x00),
    },
    Row {
        what: "SYN and FIN",
        verdict: Differs(
            "the kernel's own stack answers what its NAT finds invalid; here it is dropped",
        ),
        steps: |ends| first_of(ends, 0x03),
    },
    Row {
        what: "SYN and RST",
        verdict: Same,
        steps: |ends| first_of(ends, 0x06),
    },
    Row {
        what: "all flags",
        verdict: Same,
        steps: |ends| first_of(ends, 0xff),
    },
    Row {
        what: "a reset far out of the window",
        verdict: Same,
        steps: |ends| ends.then([(Client, ends.segment(Client, 0x04, (900_000_000, 0)))]),
    },
    Row {
        what: "a reset within the window",
        verdict: Same,
        steps: |ends| ends.then([(Client, ends.segment(Client, 0x04, (1_201, 0)))]),
    },
    Row {
        what: "a SYN within a connection",
        verdict: Same,
        steps: |ends| ends.then([(Client, ends.syn())]),
    },
    Row {
        what: "data far out of the window",
        verdict: Differs(
            "the kernel leaves it to its own stack, which ends the connection with a RST; here it is translated and counts for nothing (RFC 7857 section 2.2)",
        ),
        steps: |ends| {
            let data = ends.segment(Client, 0x18, (900_000_000, 5_101));
            ends.then([(Client, data.payload(*b"far away"))])
        },
    },
    Row {
        what: "a segment with a wrong sum",
        verdict: Differs(
            "the kernel leaves it to its own stack, which drops it; here it is translated as wrong as it came, for its receiver to drop",
        ),
        steps: |ends| {
            let data = ends.segment(Client, 0x18, (1_101, 5_101)).payload(*b"data");
            let mut steps = ends.established();
            steps.push((Client, damaged(&data.packet())));
            steps
        },
    },
    Row {
        what: "a datagram with a wrong sum",
        verdict: Differs("likewise"),
        steps: |ends| vec![(Client, damaged(&ends.question().packet()))],
    },
    Row {
        what: "a datagram without payload",
        verdict: Same,
        steps: |ends| vec![(Client, ends.question().payload([]).packet())],
    },
    Row {
        what: "a datagram that says to be longer than its packet",
        verdict: Same,
        steps: |ends| {
            let mut packet = ends.question().packet();
            let at = packet.len() - 8 - 4;
            packet[at..at + 2].copy_from_slice(&[0xff, 0xff]);
            vec![(Client, packet)]
        },
    },
    Row {
        what: "a packet with its last hop",
        verdict: Same,
        steps: |ends| vec![(Client, ends.question().hop_limit(1).packet())],
    },
    Row {
        what: "fragments in order",
        verdict: Same,
        steps: |ends| pieces(ends, &[0, 1, 2]),
    },
    Row {
        what: "fragments, the last first",
        verdict: Same,
        steps: |ends| pieces(ends, &[2, 1, 0]),
    },
    Row {
        what: "fragments, one of them twice",
        verdict: Same,
        steps: |ends| pieces(ends, &[0, 1, 1, 2]),
    },
    Row {
        what: "fragments, the second missing",
        verdict: Differs(
            "the kernel holds what it has until it gives up; here the first has left, and the third waits in vain",
        ),
        steps: |ends| pieces(ends, &[0, 2]),
    },
    Row {
        what: "an error about nothing that was sent",
        verdict: Same,
        steps: |ends| {
            let quoted = ends.question().between(ends.client, ends.target).hop();
            let kind = if ends.family == Family::V4 { 3 } else { 1 };
            let router = ROUTER_LAN.of(ends.family);
            let unheard = error(router, ends.listen.ip(), kind, 1, [0; 4], &quoted.packet());
            vec![(Server, unheard)]
        },
    },
    Row {
        what: "an error with a wrong sum",
        verdict: Differs("the kernel drops it; here it is translated as wrong as it came"),
        steps: |ends| {
            let quoted = ends.question().between(ends.client, ends.target).hop();
            let kind = if ends.family == Family::V4 { 3 } else { 1 };
            let router = ROUTER_LAN.of(ends.family);
            let sound = error(router, ends.client.ip(), kind, 1, [0; 4], &quoted.packet());
            vec![
                (Client, ends.question().packet()),
                (Server, damaged(&sound)),
            ]
        },
    },
];

/// The same for one family.
const ODD_V4: &[Row] = &[
    Row {
        what: "a source that is the destination",
        verdict: Same,
        steps: |ends| {
            vec![(
                Client,
                ends.syn().between(ends.listen, ends.listen).packet(),
            )]
        },
    },
    Row {
        what: "a header with a wrong sum",
        verdict: Differs(
            "the kernel drops it; here it is translated as wrong as it came, for the next router to drop",
        ),
        steps: |ends| {
            let mut packet = ends.question().packet();
            packet[10] ^= 1;
            vec![(Client, packet)]
        },
    },
    Row {
        what: "a datagram without sum",
        verdict: Same,
        steps: |ends| {
            let draft = Draft {
                transport: Transport::UdpWithoutSum,
                ..ends.question()
            };
            vec![(Client, draft.packet())]
        },
    },
    Row {
        what: "options that mean nothing",
        verdict: Same,
        steps: |ends| {
            let draft = Draft {
                ip_options: vec![1; 12],
                ..ends.question()
            };
            vec![(Client, draft.packet())]
        },
    },
    Row {
        what: "a source route",
        verdict: Differs(
            "the kernel drops it (accept_source_route); here it is translated like any other",
        ),
        steps: |ends| {
            let draft = Draft {
                ip_options: vec![131, 7, 4, 10, 1, 0, 1, 0],
                ..ends.question()
            };
            vec![(Client, draft.packet())]
        },
    },
];

const ODD_V6: &[Row] = &[
    Row {
        what: "a source that is the destination",
        verdict: Differs(
            "the kernel's own NAT takes it for a connection and forwards it; here it ends",
        ),
        steps: |ends| {
            vec![(
                Client,
                ends.syn().between(ends.listen, ends.listen).packet(),
            )]
        },
    },
    Row {
        what: "destination options",
        verdict: Same,
        steps: |ends| vec![(Client, with_options(&ends.question().packet(), 60))],
    },
    Row {
        what: "hop-by-hop options",
        verdict: Same,
        steps: |ends| vec![(Client, with_options(&ends.question().packet(), 0))],
    },
];

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn where_we_differ_from_the_kernels_own_nat_is_known(#[case] mode: Mode) -> Result<()> {
    stay_on_one_core()?;
    let (ours, theirs) = (Contestant::portfwd(mode)?, Contestant::kernel()?);
    let mut wrong = Vec::new();
    for (family, own) in [(Family::V4, ODD_V4), (Family::V6, ODD_V6)] {
        for (number, row) in (0_u16..).zip(ODD.iter().chain(own)) {
            let ends = Ends::of(family, 2_000 + number);
            let steps = (row.steps)(&ends);
            let [our, their] =
                [&ours, &theirs].map(|gateway| gateway.play(family, number.into(), &steps));
            let (mut our, mut their) = (our.context(row.what)?, their.context(row.what)?);
            for seen in [&mut our, &mut their] {
                // Fragments leave in the order in which they can.
                seen.at_server.sort();
            }
            if (our == their) != (row.verdict == Same) {
                wrong.push(format!(
                    "{} over {family} is expected to be {:?}\nportfwd:\n{}\nnftables:\n{}",
                    row.what,
                    row.verdict,
                    show(&our),
                    show(&their)
                ));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}
