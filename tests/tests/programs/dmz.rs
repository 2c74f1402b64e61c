//! Rules for everything else among real sockets: what has one is the gateway's, by every hook, and so is what answers the gateway.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context, Result};
use portfwd_common::{
    abi::Protocol,
    datapath::{PassReason, Verdict},
    model::{
        frame::{Draft, ethernet},
        rules::{Forward, Lowered},
        world::{UPSTREAM_MAC, WAN, WAN_MAC, World, at},
    },
};

use crate::kernel::Entry;
use crate::surroundings::Surroundings;
use crate::test_run::Sums;
use crate::twins::{Crossing, Twins};

const SYN: u8 = 0x02;

/// The programs and the model, with a rule for all that is nobody else's.
fn twins(world: &World) -> Result<Twins> {
    let mut twins = Twins::new(256, Sums::Unknown)?;
    let rules = Protocol::ALL.map(|protocol| Forward::rest(protocol, world.target));
    twins.set_rules(&Lowered::of(&rules))?;
    Ok(twins)
}

fn incoming(entry: Entry, draft: &Draft) -> Crossing {
    Crossing::new(entry, WAN, ethernet(WAN_MAC, UPSTREAM_MAC, &draft.packet()))
}

fn outgoing(draft: &Draft) -> Crossing {
    let frame = ethernet(UPSTREAM_MAC, WAN_MAC, &draft.packet());
    Crossing::new(Entry::TcOut, WAN, frame)
}

fn syn(source: SocketAddr, destination: SocketAddr) -> Draft {
    Draft::tcp(source, destination, SYN)
}

/// A connection of the gateway with itself, of which the end that is returned goes into TIME-WAIT when it is dropped.
fn connection(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let stream = TcpStream::connect(listener.local_addr()?).context("connect to a listener")?;
    let (accepted, _) = listener.accept()?;
    Ok((stream, accepted))
}

#[test]
fn what_has_a_socket_is_the_gateways_and_all_else_is_the_rules() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            for entry in [Entry::Xdp, Entry::Tc] {
                one_of_each(&world, entry)?;
            }
        }
        Ok(())
    })?
}

fn one_of_each(world: &World, entry: Entry) -> Result<()> {
    let mut twins = twins(world)?;
    let (client, stranger) = (at(world.client, 40_000), at(world.second_client, 40_000));
    let own = |port| at(world.listen, port);
    let bound = UdpSocket::bind(own(2_000))?;
    let connected = UdpSocket::bind(own(2_001))?;
    connected.connect(client)?;
    let _everywhere = UdpSocket::bind(SocketAddr::new(unspecified(world), 2_002))?;
    let listener = TcpListener::bind(own(3_000))?;
    let (stream, accepted) = connection(&listener)?;
    let dialled_from = stream.local_addr()?;
    twins.know_socket(Protocol::Udp, bound.local_addr()?, None);
    twins.know_socket(Protocol::Udp, own(2_001), Some(client));
    for address in [world.listen, world.second_listen] {
        twins.know_socket(Protocol::Udp, at(address, 2_002), None);
    }
    twins.know_socket(Protocol::Tcp, own(3_000), None);
    twins.know_socket(Protocol::Tcp, dialled_from, Some(own(3_000)));
    for (draft, is_own) in [
        (Draft::udp(client, own(2_000)), true),
        (Draft::udp(stranger, own(2_000)), true),
        (Draft::udp(client, own(2_001)), true),
        (Draft::udp(stranger, own(2_001)), false),
        (Draft::udp(client, own(2_002)), true),
        (Draft::udp(client, at(world.second_listen, 2_002)), true),
        (Draft::udp(client, at(world.second_listen, 2_000)), false),
        (Draft::udp(client, own(2_003)), false),
        (syn(client, own(3_000)), true),
        (syn(client, own(3_001)), false),
        (syn(client, at(world.second_listen, 3_000)), false),
        // A connection of its own, from either end.
        (syn(own(3_000), dialled_from), true),
        (syn(stranger, dialled_from), false),
        // The protocols have sockets of their own.
        (syn(client, own(2_000)), false),
        (Draft::udp(client, own(3_000)), false),
    ] {
        let verdict = twins.cross(&incoming(entry, &draft))?;
        let passed = verdict == Verdict::Pass(PassReason::OwnSocket);
        assert_eq!(passed, is_own, "{entry:?} {draft:?}: {verdict:?}");
        if !is_own {
            assert!(matches!(verdict, Verdict::Forward(_)), "{verdict:?}");
        }
    }
    // The end that closes first waits in TIME-WAIT, of which there is a socket of a kind.
    drop(stream);
    drop(accepted);
    let verdict = twins.cross(&incoming(entry, &syn(own(3_000), dialled_from)))?;
    assert_eq!(verdict, Verdict::Pass(PassReason::OwnSocket));
    twins.compare_books()
}

fn unspecified(world: &World) -> std::net::IpAddr {
    if world.is_v4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    }
}

#[test]
fn what_answers_a_packet_that_the_gateway_has_sent_is_its_own() -> Result<()> {
    Surroundings::new()?.enter(|| -> Result<()> {
        for world in World::both() {
            let mut twins = twins(&world)?;
            let (server, own) = (at(world.client, 53), at(world.listen, 5_000));
            for (sent, answer) in [
                (syn(own, server), syn(server, own)),
                (Draft::udp(own, server), Draft::udp(server, own)),
            ] {
                let passed = Verdict::Pass(PassReason::NoFlow);
                assert_eq!(twins.cross(&outgoing(&sent))?, passed);
                for entry in [Entry::Xdp, Entry::Tc, Entry::Xdp] {
                    let verdict = twins.cross(&incoming(entry, &answer))?;
                    assert_eq!(verdict, Verdict::Pass(PassReason::Answer), "{entry:?}");
                }
                let other = answer.between(at(world.client, 54), own);
                let verdict = twins.cross(&incoming(Entry::Tc, &other))?;
                assert!(matches!(verdict, Verdict::Forward(_)), "{verdict:?}");
            }
            twins.compare_books()?;
        }
        Ok(())
    })?
}
