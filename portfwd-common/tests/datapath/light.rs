//! Rules with light tracking: packets fare as with full tracking, and their entries are left alone.

use portfwd_common::{
    abi::{Admission, Config, Protocol, Ticks},
    datapath::{DropReason, Event, Hook, PassReason, Route, tcp::TcpState},
    model::{
        frame::{Draft, error},
        rules::{Forward, Lowered},
        world::{LAN, WAN, World, at},
    },
};

use crate::{
    conversation::{ACK, Backend, Client, Conversation, FIN, HANDSHAKE, RST, SYN, SYN_ACK},
    gateway::{CONFIG, Gateway, SECOND},
};

/// Longer than any class waits for its turn.
pub const PERIOD: u32 = 1 << CONFIG.turn_bits;

fn light(world: &World) -> [Forward; 2] {
    [Protocol::Udp, Protocol::Tcp].map(|protocol| {
        let forward = Forward::new(protocol, 53, at(world.target, 1053)).to(60);
        forward.on(world.listen).light()
    })
}

/// A datagram to the rule, and what it is behind the gateway.
fn datagram(world: &World, client_port: u16) -> (Draft, Draft) {
    let client = at(world.client, client_port);
    let sent = Draft::udp(client, at(world.listen, 53));
    let received = sent.between(client, at(world.target, 1053)).hop();
    (sent, received)
}

/// What answers a datagram, and what that is before the gateway.
fn answer(world: &World, client_port: u16) -> (Draft, Draft) {
    let client = at(world.client, client_port);
    let sent = Draft::udp(at(world.target, 1053), client);
    let received = sent.between(at(world.listen, 53), client).hop();
    (sent, received)
}

/// A gateway that knows the rule's way out, the client's, and one flow of which several packets have been met.
fn met(world: &World) -> Gateway {
    let mut gateway = Gateway::new(&light(world));
    for _ in 0..4 {
        exchange(&mut gateway, world, 5_353);
    }
    assert_eq!((gateway.flows(), gateway.proven()), (1, 1));
    gateway
}

fn exchange(gateway: &mut Gateway, world: &World, client_port: u16) {
    let (sent, received) = datagram(world, client_port);
    gateway.wan(&sent.packet()).reached_lan(&received.packet());
    let (sent, received) = answer(world, client_port);
    gateway.lan(&sent.packet()).reached_wan(&received.packet());
}

#[test]
fn packets_are_counted_for_the_rule_and_leave_their_entries_alone() {
    for world in World::both() {
        for hook in [Hook::Xdp, Hook::Tc, Hook::TcSlow] {
            let mut gateway = met(&world).by(hook);
            let before = gateway.books();
            for _ in 0..1_000 {
                exchange(&mut gateway, &world, 5_353);
            }
            let after = gateway.books();
            assert_eq!((after.v4, after.v6), (before.v4, before.v6));
            let [(_, before)] = before.counters[..] else {
                panic!("one port is counted")
            };
            let [(_, after)] = after.counters[..] else {
                panic!("one port is counted")
            };
            for (before, after) in [
                (before.to_target, after.to_target),
                (before.to_client, after.to_client),
            ] {
                assert_eq!(after.packets, before.packets + 1_000);
                assert_eq!(after.bytes, before.bytes * after.packets / before.packets);
            }
        }
    }
}

#[test]
fn the_ways_out_do_for_flows_that_nobody_has_heard_of_when_there_is_a_crowd() {
    for world in World::both() {
        let mut gateway = Gateway::with_room(&light(&world), 10_000);
        exchange(&mut gateway, &world, 5_353);
        // Without time, no more packets go to entries than in a tick; and those that begin flows are few.
        for port in 10_000..12_000 {
            exchange(&mut gateway, &world, port);
        }
        let flows = gateway.flows();
        assert!(flows <= 1 + CONFIG.turns_per_tick as usize, "{flows}");
        // With time, all come into the books.
        for _ in 0..200 {
            gateway.model.advance(Ticks(1));
            for port in 10_000..12_000 {
                exchange(&mut gateway, &world, port);
            }
        }
        let flows = gateway.flows();
        assert!(flows > 1_990, "{flows}");
    }
}

#[test]
fn a_flow_that_goes_on_stays_in_the_books_and_one_that_ends_goes() {
    for world in World::both() {
        let mut gateway = met(&world);
        let config = gateway.model.maps.config.unwrap();
        let created = gateway.books();
        let created = created.v4.iter().map(|(_, e)| e.created);
        let created: Vec<_> = created.collect();
        for _ in 0..100 {
            gateway.model.advance(Ticks(config.udp.0 / 20));
            exchange(&mut gateway, &world, 5_353);
        }
        let books = gateway.books();
        assert!(books.v4.iter().map(|(_, e)| e.created).eq(created));
        let now = gateway.model.now;
        assert!(books.v4.iter().all(|(_, e)| e.last_seen == now));
        assert!(books.v6.iter().all(|(_, e)| e.last_seen == now));
        assert_eq!(gateway.events(Event::FlowCreated), 1);
        gateway.model.advance(Ticks(config.udp.0 + 1));
        exchange(&mut gateway, &world, 5_353);
        assert_eq!(gateway.events(Event::FlowCreated), 2);
    }
}

#[test]
fn a_flow_has_its_turn_once_in_a_period() {
    for world in World::both() {
        let mut gateway = met(&world);
        let mut met = 0;
        let mut before = gateway.books();
        for _ in 0..10 * PERIOD / 8 {
            gateway.model.advance(Ticks(8));
            vouch(&mut gateway);
            let (sent, received) = datagram(&world, 5_353);
            gateway.wan(&sent.packet()).reached_lan(&received.packet());
            let after = gateway.books();
            met += u32::from((&after.v4, &after.v6) != (&before.v4, &before.v6));
            before = after;
        }
        // And where the way out is looked at again.
        assert!((10..=14).contains(&met), "{met}");
    }
}

#[test]
fn a_way_out_is_as_fresh_as_an_entry_is() {
    for world in World::both() {
        let mut gateway = met(&world);
        let bits = world.bits();
        let moved = Route::Via {
            ifindex: LAN,
            next_hop: [7, 7, 7],
            mtu: 1_500,
        };
        let (sent, _) = datagram(&world, 5_353);
        let [client, target] = [world.client, world.target];
        let old = gateway.wan(&sent.packet()).departure().next_hop;
        for (address, route) in [(target, moved), (client, via_wan([8, 8, 8]))] {
            gateway.model.maps.set_route(address, bits, route);
        }
        let looks = |gateway: &mut Gateway| {
            let (sent, _) = datagram(&world, 5_353);
            let (back, _) = answer(&world, 5_353);
            [
                gateway.wan(&sent.packet()).departure().next_hop,
                gateway.lan(&back.packet()).departure().next_hop,
            ]
        };
        assert_eq!(looks(&mut gateway)[0], old);
        gateway.model.advance(Ticks(SECOND));
        assert_eq!(looks(&mut gateway), [[7; 3], [8; 3]]);
        // Or at once, if the daemon hears of it. Anybody's packet brings it back.
        for (address, route) in [(target, via(LAN, [9; 3])), (client, via_wan([6; 3]))] {
            gateway.model.maps.set_route(address, bits, route);
        }
        assert_eq!(looks(&mut gateway), [[7; 3], [8; 3]]);
        gateway.bump_generation();
        assert_eq!(looks(&mut gateway), [[9; 3], [6; 3]]);
        let other = at(world.client, 999);
        let sent = Draft::udp(other, at(world.listen, 60));
        let out = gateway.wan(&sent.packet()).departure();
        assert_eq!(out.next_hop, [9; 3]);
    }
}

pub fn via(ifindex: u32, next_hop: [u16; 3]) -> Route {
    Route::Via {
        ifindex,
        next_hop,
        mtu: 1_500,
    }
}

fn via_wan(next_hop: [u16; 3]) -> Route {
    via(WAN, next_hop)
}

#[test]
fn while_the_daemon_vouches_a_way_out_is_good_for_as_long_as_an_entry() {
    for world in World::both() {
        let mut gateway = met(&world);
        // No packet has its turn.
        gateway.model.maps.config.as_mut().unwrap().turns_per_tick = 0;
        let (sent, _) = datagram(&world, 5_353);
        let looks_after = |gateway: &mut Gateway, seconds| {
            gateway.model.advance(Ticks(seconds * SECOND));
            vouch(gateway);
            gateway.wan(&sent.packet()).departure().next_hop
        };
        gateway.bump_generation();
        let old = looks_after(&mut gateway, 1);
        let bits = world.bits();
        let maps = &mut gateway.model.maps;
        maps.set_route(world.target, bits, via(LAN, [9; 3]));
        assert_eq!(looks_after(&mut gateway, 2), old);
        assert_eq!(looks_after(&mut gateway, 27), old);
        assert_eq!(looks_after(&mut gateway, 1), [9; 3]);
    }
}

/// Has the daemon vouch for some seconds.
fn vouch(gateway: &mut Gateway) {
    let lease_end = gateway.model.now.plus(Ticks(3 * SECOND));
    let config = gateway.model.maps.config.as_mut().unwrap();
    *config = Config {
        leased_validity: Ticks(30 * SECOND),
        lease_end,
        ..*config
    };
}

#[test]
fn what_is_removed_or_closed_stops_at_once() {
    for world in World::both() {
        let (sent, _) = datagram(&world, 5_353);
        let (back, _) = answer(&world, 5_353);
        let mut gateway = met(&world);
        // PORTS is what packets look at first: no generation is waited for.
        gateway.model.maps.rules.ports.clear();
        gateway.model.maps.rules.rules.clear();
        gateway.bump_generation();
        gateway.wan(&sent.packet()).passed(PassReason::NoRule);
        gateway
            .lan(&back.packet())
            .dropped(DropReason::PrivateSource);
    }
}

#[test]
fn a_rule_that_leads_elsewhere_does_so_for_every_packet_at_once() {
    for world in World::both() {
        let mut gateway = met(&world);
        let (sent, _) = datagram(&world, 5_353);
        let moved = Forward::new(Protocol::Udp, 53, at(world.second_target, 9)).on(world.listen);
        gateway.set_rules(&[moved.light()]);
        let client = at(world.client, 5_353);
        let received = sent.between(client, at(world.second_target, 9)).hop();
        gateway.wan(&sent.packet()).reached_lan(&received.packet());
        gateway.wan(&sent.packet()).reached_lan(&received.packet());
    }
}

/// Seen by reading: packets of a flow that a range had when a port of it got a rule with light tracking went to the new target, and
/// those that had their turn to the old one, for ever.
#[test]
fn a_rule_takes_over_the_flows_that_a_range_had_at_its_port() {
    for world in World::both() {
        let range = Forward::new(Protocol::Udp, 50, at(world.second_target, 50));
        let range = range.to(60).on(world.listen);
        let mut gateway = Gateway::new(&[range]);
        let (sent, received) = datagram(&world, 5_353);
        let before = sent.between(at(world.client, 5_353), at(world.second_target, 53));
        for _ in 0..4 {
            gateway
                .wan(&sent.packet())
                .reached_lan(&before.clone().hop().packet());
        }
        let [udp, _] = light(&world);
        let port = Forward { last: 53, ..udp };
        gateway.set_rules(&[range, port]);
        let received = received.between(at(world.client, 5_353), at(world.target, 1053));
        for _ in 0..20 {
            gateway.wan(&sent.packet()).reached_lan(&received.packet());
            gateway.model.advance(Ticks(PERIOD / 3));
        }
    }
}

#[test]
fn a_handshake_is_met_whole_and_so_is_the_end() {
    for world in World::both() {
        let mut talk = conversation(&world);
        // Others take the turns of the tick.
        talk.send_all(HANDSHAKE);
        assert_eq!(talk.state(), Some(TcpState::Established));
        let before = talk.gateway.books();
        for _ in 0..2_000 {
            for sender in [Client, Backend] {
                let data = talk.segment(sender, ACK).payload([7; 1_000]);
                talk.carry(sender, &data);
            }
        }
        // Two megabytes either way, of which the entries know little.
        let sides = talk.sides();
        let after = talk.gateway.books();
        let changed = |(old, new): (&u64, &u64)| new - old;
        let seen = |books: &crate::gateway::Books| {
            let v4 = books.v4.iter().map(|(_, e)| e.traffic.packets);
            v4.chain(books.v6.iter().map(|(_, e)| e.traffic.packets))
                .collect::<Vec<_>>()
        };
        for pair in seen(&before).iter().zip(&seen(&after)) {
            assert!(changed(pair) <= 3, "{sides:?}");
        }
        talk.send(Client, FIN);
        assert_eq!(talk.state(), Some(TcpState::HalfClosed));
        talk.send_all(&[(Backend, ACK), (Backend, FIN), (Client, ACK)]);
        assert_eq!(talk.state(), Some(TcpState::Closing));
        talk.send_all(HANDSHAKE);
        assert_eq!(talk.state(), Some(TcpState::Established));
    }
}

fn conversation(world: &World) -> Conversation {
    let mut talk = Conversation::new(world);
    let forward = Forward::new(Protocol::Tcp, 80, at(world.target, 8080));
    let forward = forward.on(world.listen).light();
    talk.gateway.set_rules(&[forward]);
    talk
}

#[test]
fn a_reset_is_believed_and_carried_however_old_the_entry_is() {
    for world in World::both() {
        for sender in [Client, Backend] {
            let mut talk = conversation(&world);
            talk.send_all(HANDSHAKE);
            for _ in 0..2_000 {
                let data = talk.segment(Client, ACK).payload([7; 1_000]);
                talk.carry(Client, &data);
                let data = talk.segment(Backend, ACK).payload([7; 1_000]);
                talk.carry(Backend, &data);
            }
            talk.send(sender, RST);
            assert_eq!(talk.state(), Some(TcpState::Reset), "{sender:?}");
            talk.send_all(HANDSHAKE);
            assert_eq!(talk.state(), Some(TcpState::Established));
        }
    }
}

#[test]
fn an_answer_and_a_third_segment_must_be_right_before_an_entry_is_kept_for_long() {
    for world in World::both() {
        let mut talk = conversation(&world);
        talk.send_all(&[(Client, SYN), (Backend, SYN_ACK)]);
        let blind = talk.segment(Client, ACK).numbers(1, 2);
        for _ in 0..3 {
            talk.forge(Client, &blind);
            talk.gateway.model.advance(Ticks(PERIOD));
        }
        assert_eq!(talk.state(), Some(TcpState::SynReceived));
        assert_eq!(talk.gateway.proven(), 0);
    }
}

#[test]
fn an_error_about_a_packet_that_the_entry_has_not_met_comes_through() {
    for world in World::both() {
        let mut talk = conversation(&world);
        talk.send_all(HANDSHAKE);
        for _ in 0..2_000 {
            let data = talk.segment(Backend, ACK).payload([7; 1_000]);
            talk.carry(Backend, &data);
            talk.send(Client, ACK);
        }
        // What it quotes is what the client would have got.
        let quoted = talk
            .segment(Backend, ACK)
            .between(at(world.listen, 80), talk.client());
        let (kind, code) = if world.is_v4() { (3, 4) } else { (2, 0) };
        let told = error(
            world.wan_router,
            world.listen,
            kind,
            code,
            [0, 0, 5, 0],
            &quoted.packet(),
        );
        let _ = talk.gateway.wan(&told).departure();
        assert_eq!(talk.gateway.events(Event::IcmpTranslated), 1);
    }
}

#[test]
fn a_source_in_the_network_of_the_target_is_refused() {
    for world in World::both() {
        let mut gateway = met(&world);
        let listen = at(world.listen, 53);
        for source in [world.target, world.second_target, world.lan_address] {
            let forged = Draft::udp(at(source, 53), listen);
            gateway
                .wan(&forged.packet())
                .dropped(DropReason::MartianSource);
        }
        let itself = Draft::udp(listen, listen);
        gateway.wan(&itself.packet()).passed(PassReason::NotUnicast);
    }
}

#[test]
fn a_source_that_no_list_lets_in_is_refused_with_every_packet() {
    for world in World::both() {
        let mut gateway = met(&world);
        let own = (world.client, world.bits(), Admission::Allowed);
        let admit = |prefixes: &[_]| {
            let rules = Lowered::of(&light(&world));
            rules.admitting(1, Admission::Denied, prefixes)
        };
        gateway.model.maps.rules = admit(&[own]);
        gateway.bump_generation();
        let other = Draft::udp(at(world.second_client, 5), at(world.listen, 53));
        for _ in 0..3 {
            exchange(&mut gateway, &world, 5_353);
            gateway
                .wan(&other.packet())
                .dropped(DropReason::SourceRefused);
        }
        gateway.model.maps.rules = admit(&[]);
        gateway.bump_generation();
        let (sent, _) = datagram(&world, 5_353);
        gateway
            .wan(&sent.packet())
            .dropped(DropReason::SourceRefused);
    }
}

#[test]
fn with_a_rule_for_everything_else_that_has_the_same_target_entries_say_what_an_answer_is() {
    for world in World::both() {
        let [udp, _] = light(&world);
        let mut gateway = Gateway::new(&[udp, Forward::rest(Protocol::Udp, world.target)]);
        let config = gateway.model.maps.config.as_mut().unwrap();
        config.flags |= Config::HAS_RESTS;
        for _ in 0..3 {
            exchange(&mut gateway, &world, 5_353);
        }
        // The same target endpoint, dialled as it is.
        let (client, listen) = (at(world.client, 7_000), at(world.listen, 1053));
        let target = at(world.target, 1053);
        let sent = Draft::udp(client, listen);
        let received = sent.between(client, target).hop();
        gateway.wan(&sent.packet()).reached_lan(&received.packet());
        let back = Draft::udp(target, client);
        let told = back.between(listen, client).hop();
        gateway.lan(&back.packet()).reached_wan(&told.packet());
    }
}

#[test]
fn clients_of_the_lan_and_of_the_only_arm_have_their_entries() {
    for world in World::both() {
        let rules = [
            Forward::new(Protocol::Udp, 53, at(world.target, 1053)).light(),
            Forward::new(Protocol::Udp, 54, at(world.arm_target, 1054))
                .on(world.arm_listen)
                .light(),
        ];
        let mut gateway = Gateway::new(&rules);
        let (neighbour, target) = (at(world.second_target, 9), at(world.target, 1053));
        for _ in 0..4 {
            let sent = Draft::udp(neighbour, at(world.listen, 53));
            let out = gateway.lan(&sent.packet());
            assert_eq!(out.departure().ifindex, LAN);
            // The gateway stands for it.
            let seen = etherparse::SlicedPacket::from_ethernet(&out.after).unwrap();
            let Some(etherparse::TransportSlice::Udp(udp)) = seen.transport else {
                panic!("a datagram")
            };
            let back = Draft::udp(target, at(world.listen, udp.source_port()));
            let told = back.between(at(world.listen, 53), neighbour).hop();
            gateway.lan(&back.packet()).reached_lan(&told.packet());
        }
        let (client, target) = (at(world.arm_client, 9), at(world.arm_target, 1054));
        for _ in 0..4 {
            let before = gateway.books();
            let sent = Draft::udp(client, at(world.arm_listen, 54));
            let received = sent.between(client, target).hop();
            gateway.arm(&sent.packet()).reached_arm(&received.packet());
            assert_ne!(gateway.books(), before);
        }
    }
}
