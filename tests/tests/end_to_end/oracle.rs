//! The same packets through two gateways with the same rules, portfwd and the kernel's own NAT (nftables): the same comes out, or the
//! row says why not. `PORTFWD_EFFORT=100` plays a hundred times as many conversations.

mod odd;
mod renumber;

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use portfwd_common::model::effort::cases;
use portfwd_common::model::frame::{Draft, Transport, error, fragments};
use portfwd_tests::address::{CLIENT, GATEWAY_LAN, GATEWAY_WAN, ROUTER_LAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::deadline::PATIENCE;
use portfwd_tests::wire::Wire;
use portfwd_tests::{Family, Lab, LabOptions, Namespace, Offloads, nftables};
use rstest::rstest;

use crate::scene::{LISTEN, Scene, TARGET, listen};

use renumber::{first_source_port, renumber};

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

/// A packet, and who sends it.
type Step = (Side, Vec<u8>);

/// Packets, in turn.
type Steps = Vec<Step>;

/// What a rule does beside leading to the server. Each gateway has one of each kind in either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing.
    Plain,
    /// The server takes the gateway for its client.
    Masquerade,
    /// It has many ports, each of which leads to one of its own.
    Range,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Plain, Self::Masquerade, Self::Range];

    /// Its first listen port, the target's, and how many there are.
    const fn ports(self) -> (u16, u16, u16) {
        match self {
            Self::Plain => (LISTEN, TARGET, 1),
            Self::Masquerade => (8_090, 90, 1),
            Self::Range => (9_000, 10_000, 100),
        }
    }

    fn kernel_rule(self, family: Family) -> nftables::Rule {
        let (listen, target, ports) = self.ports();
        nftables::Rule {
            forward: nftables::Forward {
                listen: GATEWAY_WAN.endpoint(family, listen),
                target: SERVER.endpoint(family, target),
            },
            ports,
            masquerade: self == Self::Masquerade,
        }
    }

    fn add_to(self, daemon: &Daemon, family: Family) -> Result<()> {
        let (listen, target, ports) = self.ports();
        let (last_listen, last_target) = (listen + ports - 1, target + ports - 1);
        let first = SERVER.endpoint(family, target);
        let rule = match ports {
            1 => (listen.to_string(), first.to_string()),
            _ => (
                format!("{listen}-{last_listen}"),
                format!("{first}-{last_target}"),
            ),
        };
        let options: &[&str] = match self {
            Self::Plain | Self::Range => &[],
            Self::Masquerade => &["--masquerade"],
        };
        let name = format!("{self:?}-{family}").to_lowercase();
        daemon.add_with(&name, ["both", &rule.0, &rule.1], options)
    }
}

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
        for family in Family::BOTH {
            for kind in Kind::ALL {
                kind.add_to(&scene.daemon, family)?;
            }
        }
        Self::of(scene.lab, Some(scene.daemon))
    }

    fn kernel() -> Result<Self> {
        let lab = LabOptions::default().offloads(Offloads::Off).build()?;
        let rules = Family::BOTH.map(|family| Kind::ALL.map(|kind| kind.kernel_rule(family)));
        nftables::load_rules(&lab.gateway, rules.as_flattened())?;
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
            near.introduce(far, address)?;
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
    fn play(&self, family: Family, number: u64, steps: &[Step]) -> Result<Seen> {
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

    /// Plays a conversation in which the gateway may stand for the client, and says by which port it did.
    ///
    /// Which port that is, is the gateway's choice: both keep the client's if they can, but portfwd leaves alone what the gateway's
    /// own connections use, and the kernel does not. So the client's first packets go ahead, the server answers to where they came
    /// from, and in what comes to the server the client's own port is put in that one's place, whichever it was. All else must be
    /// the same.
    fn play_to_whom_it_sees(
        &self,
        number: u64,
        ends: &Ends,
        conversation: impl Fn(&Ends) -> Steps,
    ) -> Result<(Seen, u16)> {
        let steps = conversation(ends);
        let first = steps.iter().take_while(|(side, _)| *side == Client).count();
        let mut seen = self.play(ends.family, number, &steps[..first])?;
        let own = ends.client.port();
        let port = first_source_port(&seen.at_server).unwrap_or(own);
        let steps = conversation(&Ends {
            seen: SocketAddr::new(ends.seen.ip(), port),
            ..*ends
        });
        let rest = self.play(ends.family, number, &steps[first..])?;
        seen.at_client.extend(rest.at_client);
        seen.at_server.extend(rest.at_server);
        for packet in &mut seen.at_server {
            renumber(packet, port, own);
        }
        Ok((seen, port))
    }
}

/// Lets a host's own stack send nothing.
fn keep_silent(host: &Namespace) -> Result<()> {
    let rules = "table inet silence {\n chain output {\n  type filter hook output priority 0; policy drop;\n }\n}\n";
    nftables::load(host, rules)
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
    /// Whom the server takes for its client.
    seen: SocketAddr,
}

impl Ends {
    /// Of a conversation with this number.
    fn of_kind(kind: Kind, family: Family, number: u64) -> Self {
        // A port of its own for as long as there are any.
        let port = match (kind, number % 2) {
            (Kind::Plain | Kind::Range, _) => 1_024 + (number % 50_000) as u16,
            // One that stays, and one that the gateway's own connections use (net.ipv4.ip_local_port_range).
            (Kind::Masquerade, 0) => 1_024 + (number / 2 % 25_000) as u16,
            (Kind::Masquerade, _) => 35_000 + (number / 2 % 25_000) as u16,
        };
        let (listen, target, ports) = kind.ports();
        let at = (number % u64::from(ports)) as u16;
        let client = CLIENT.endpoint(family, port);
        Self {
            family,
            client,
            listen: GATEWAY_WAN.endpoint(family, listen + at),
            target: SERVER.endpoint(family, target + at),
            seen: match kind {
                Kind::Plain | Kind::Range => client,
                Kind::Masquerade => GATEWAY_LAN.endpoint(family, port),
            },
        }
    }

    fn is_client_hidden(&self) -> bool {
        self.seen.ip() != self.client.ip()
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
            ..Draft::tcp(self.target, self.seen, 0x12).numbers(5_000, 1_001)
        }
    }

    fn segment(&self, side: Side, flags: u8, numbers: (u32, u32)) -> Draft {
        let (source, destination) = match side {
            Client => (self.client, self.listen),
            Server => (self.target, self.seen),
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
        Draft::udp(self.target, self.seen)
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

fn any_markings(rng: &mut Rng, ends: &Ends, mut draft: Draft) -> Draft {
    draft.hop_limit = if rng.u8(..) < 8 { 1 } else { rng.u8(2..) };
    if ends.is_client_hidden() {
        // The kernel quotes more of a packet with its last hop; the odd rows have it.
        draft.hop_limit = draft.hop_limit.max(2);
    }
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
        let segment = any_markings(rng, ends, segment).packet();
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
        let mut draft = any_markings(rng, ends, draft.payload(payload));
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
            sent.between(ends.seen, ends.target),
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
        Client => ends.seen.ip(),
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
fn conversations_come_out_as_through_the_kernels_own_nat(
    #[case] mode: Mode,
    #[values(Kind::Plain, Kind::Masquerade, Kind::Range)] kind: Kind,
) -> Result<()> {
    stay_on_one_core()?;
    let (ours, theirs) = (Contestant::portfwd(mode)?, Contestant::kernel()?);
    let (mut packets, mut kept, mut chosen) = (0, 0, 0);
    for number in 0..u64::from(cases(300)) {
        for family in Family::BOTH {
            let ends = Ends::of_kind(kind, family, number);
            let v6 = u64::from(family == Family::V6);
            let conversation =
                |ends: &Ends| any_conversation(&mut Rng::with_seed(SEED + 2 * number + v6), ends);
            let [our, their] = [&ours, &theirs]
                .map(|gateway| gateway.play_to_whom_it_sees(number, &ends, conversation));
            let ((our, port), (their, _)) = (our.context("portfwd")?, their.context("nftables")?);
            let steps = conversation(&ends);
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
            packets += steps.len();
            if port == ends.client.port() {
                kept += 1;
            } else {
                chosen += 1;
            }
        }
    }
    println!(
        "{packets} packets, and what came of them, are the same; {kept} clients kept their port"
    );
    ensure!(
        kept > 0 && (chosen > 0) == (kind == Kind::Masquerade),
        "{kept} clients kept their port, {chosen} did not"
    );
    Ok(())
}
