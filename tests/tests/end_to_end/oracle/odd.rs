//! Packets that hosts hardly send, one by one: the two gateways agree, or the row says why not. A row that is wrong about that fails
//! either way.

use anyhow::{Context, Result, ensure};
use portfwd_common::model::frame::{Draft, Transport, error, fragments, with_options};
use portfwd_tests::Family;
use portfwd_tests::address::ROUTER_LAN;
use portfwd_tests::daemon::Mode;
use rstest::rstest;

use super::Side::{Client, Server};
use super::{Contestant, Ends, Kind, Steps, show, stay_on_one_core};

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
        verdict: Same,
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

/// The same through a rule that hides its client.
const ODD_HIDDEN: &[Row] = &[
    Row {
        what: "a question of a hidden client",
        verdict: Same,
        steps: |ends| {
            vec![
                (Client, ends.question().packet()),
                (Server, ends.answer().packet()),
            ]
        },
    },
    Row {
        what: "a hidden client's packet with its last hop",
        verdict: Differs(
            "both tell the client; the kernel quotes more of the packet, which the error is then larger than",
        ),
        steps: |ends| vec![(Client, ends.question().hop_limit(1).packet())],
    },
    Row {
        what: "an answer to a hidden client with its last hop",
        verdict: Differs("likewise, of the server"),
        steps: |ends| {
            vec![
                (Client, ends.question().packet()),
                (Server, ends.answer().hop_limit(1).packet()),
            ]
        },
    },
    Row {
        what: "an error about a hidden client's packet",
        verdict: Same,
        steps: |ends| {
            let quoted = ends.question().between(ends.seen, ends.target).hop();
            let kind = if ends.family == Family::V4 { 3 } else { 1 };
            let router = ROUTER_LAN.of(ends.family);
            let heard = error(router, ends.seen.ip(), kind, 1, [0; 4], &quoted.packet());
            vec![(Client, ends.question().packet()), (Server, heard)]
        },
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
        let plain = ODD.iter().chain(own).map(|row| (Kind::Plain, row));
        let hidden = ODD_HIDDEN.iter().map(|row| (Kind::Masquerade, row));
        for (number, (kind, row)) in (2_000..).zip(plain.chain(hidden)) {
            let ends = Ends::of_kind(kind, family, number);
            let [our, their] = [&ours, &theirs]
                .map(|gateway| gateway.play_to_whom_it_sees(number, &ends, row.steps));
            let ((mut our, _), (mut their, _)) = (our.context(row.what)?, their.context(row.what)?);
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
