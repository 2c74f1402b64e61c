//! How long a look at rule and route is good, with a daemon that vouches for it and without.

use portfwd_common::{
    abi::{Config, Protocol, Ticks},
    datapath::Route,
    model::{
        effort::cases,
        frame::Draft,
        rules::Forward,
        world::{LAN, World, at},
    },
};
use proptest::prelude::*;

use crate::conversation::{ACK, Backend, Client, Conversation, HANDSHAKE, SYN, SYN_ACK};
use crate::gateway::{CONFIG, Gateway, SECOND};

/// For how long a look is good while the daemon vouches.
const VALIDITY: Ticks = Ticks(30 * SECOND);
/// For how long the daemon vouches at a time.
const LEASE: Ticks = Ticks(3 * SECOND);

fn vouch(gateway: &mut Gateway) {
    let lease_end = gateway.model.now.plus(LEASE);
    let config = gateway.model.maps.config.as_mut().unwrap();
    *config = Config {
        leased_validity: VALIDITY,
        lease_end,
        ..*config
    };
}

/// A gateway whose routes tell when they were looked at: the MAC address of the next hop counts the packets.
struct Watched {
    gateway: Gateway,
    world: World,
    packets: u16,
}

impl Watched {
    fn new(world: &World) -> Self {
        Self {
            gateway: Gateway::new(&[
                Forward::new(Protocol::Udp, 53, at(world.target, 1053)),
                Forward::new(Protocol::Tcp, 80, at(world.target, 8080)),
            ]),
            world: *world,
            packets: 0,
        }
    }

    /// Sends a packet; which packet's look at the route it left by.
    fn send(&mut self, draft: &Draft) -> u16 {
        let host = if self.world.client.is_ipv4() { 32 } else { 128 };
        let route = Route::Via {
            ifindex: LAN,
            next_hop: [2, 0, self.packets],
            mtu: 1500,
        };
        self.packets += 1;
        self.gateway
            .model
            .maps
            .set_route(self.world.target, host, route);
        let [_, _, look] = self.gateway.wan(&draft.packet()).departure().next_hop;
        look
    }

    fn ask(&mut self) -> u16 {
        let (client, listen) = (at(self.world.client, 5_353), at(self.world.listen, 53));
        self.send(&Draft::udp(client, listen))
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Wait(u32),
    Ask,
    Vouch,
    Change,
}

fn any_step() -> impl Strategy<Value = Step> {
    const L: u32 = VALIDITY.0;
    prop_oneof![
        2 => (0..3 * SECOND).prop_map(Step::Wait),
        1 => prop::sample::select(vec![
            1, SECOND - 1, SECOND, LEASE.0 - 1, LEASE.0, L - 1, L, 2 * L - 1, 2 * L,
            // Where the 16 bits of a stamp come round.
            65_535, 65_536, 65_537, 65_536 + L,
        ]).prop_map(Step::Wait),
        6 => Just(Step::Ask),
        3 => Just(Step::Vouch),
        1 => Just(Step::Change),
    ]
}

/// What a flow must remember of its last look, by a clock that does not wrap.
#[derive(Clone, Copy)]
struct Look {
    number: u16,
    at: u64,
    generation: u32,
    last_packet: u64,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(500)))]
    #[test]
    fn a_look_is_good_for_a_second_or_for_as_long_as_the_daemon_vouches(
        steps in prop::collection::vec(any_step(), 1..60), v6 in any::<bool>(),
    ) {
        let mut watched = Watched::new(&World::both()[usize::from(v6)]);
        let udp = u64::from(CONFIG.udp.0);
        // The second datagram proves the flow.
        let _ = watched.ask();
        let number = watched.ask();
        let (mut now, mut lease_end) = (0_u64, 0);
        let mut generation = 0;
        let mut look = Look { number, at: now, generation, last_packet: now };
        for step in steps {
            match step {
                Step::Wait(ticks) => {
                    now += u64::from(ticks);
                    watched.gateway.model.advance(Ticks(ticks));
                }
                Step::Vouch => {
                    lease_end = now + u64::from(LEASE.0);
                    vouch(&mut watched.gateway);
                }
                Step::Change => {
                    generation += 1;
                    watched.gateway.bump_generation();
                }
                Step::Ask => {
                    let validity = u64::from(if now < lease_end { VALIDITY.0 } else { SECOND });
                    let is_good = look.generation == generation
                        && now - look.at < validity
                        && now - look.last_packet < validity;
                    // One that has expired begins anew, and is proven by the next.
                    if now - look.last_packet > udp {
                        let _ = watched.ask();
                    }
                    let (next, found) = (watched.packets, watched.ask());
                    prop_assert_eq!(found, if is_good { look.number } else { next });
                    if !is_good {
                        look = Look { number: next, at: now, generation, last_packet: now };
                    }
                    look.last_packet = now;
                }
            }
        }
    }
}

#[test]
fn a_connection_that_was_met_in_its_middle_is_looked_at_every_second() {
    for world in World::both() {
        for (is_met_at_its_start, looks_again) in [(true, false), (false, true)] {
            let mut tcp = Conversation::new(&world);
            if is_met_at_its_start {
                tcp.send_all(HANDSHAKE);
            }
            tcp.send_all(&[(Client, ACK), (Backend, ACK), (Client, ACK), (Client, ACK)]);
            let segment = tcp.segment(Client, ACK);
            let mut watched = Watched {
                gateway: tcp.gateway,
                world,
                packets: 1,
            };
            vouch(&mut watched.gateway);
            assert_ne!(watched.send(&segment), 1, "fresh");
            watched.gateway.wait(2);
            assert_eq!(watched.send(&segment) == 2, looks_again);
        }
    }
}

/// Segments went another way for a time. What both sides have shown meanwhile is caught up with within a second, not when the
/// daemon's word runs out: until then a RST would be judged by old numbers.
#[test]
fn a_connection_whose_numbers_have_run_ahead_is_caught_up_with_within_a_second() {
    const PAST_THEM: u32 = 3 << 20;
    for world in World::both() {
        let mut tcp = Conversation::established(&world);
        vouch(&mut tcp.gateway);
        tcp.gateway.wait(2);
        // Of the client's data, only the backend's acknowledgement came through here.
        let mut acknowledgement = tcp.segment(Backend, ACK);
        acknowledgement.acknowledgement = acknowledgement.acknowledgement.wrapping_add(1 << 15);
        tcp.forge(Backend, &acknowledgement);
        let [client, _] = tcp.sides();
        let mut data = tcp.segment(Client, ACK).payload([7; 100]);
        data.sequence = data.sequence.wrapping_add(PAST_THEM);
        tcp.forge(Client, &data);
        let [caught_up, _] = tcp.sides();
        assert_eq!(client.sent.wrapping_add(1 << 15), caught_up.sent);
    }
}

#[test]
fn what_is_carried_under_the_daemons_word_is_followed_and_counted() {
    for world in World::both() {
        let mut tcp = Conversation::established(&world);
        let before = tcp.pair().unwrap();
        vouch(&mut tcp.gateway);
        tcp.gateway.wait(2);
        let [client, backend] = tcp.sides();
        for sender in [Client, Backend] {
            let data = tcp.segment(sender, ACK).payload([7; 100]);
            tcp.carry(sender, &data);
        }
        let after = tcp.pair().unwrap();
        assert_eq!(after.original.side.sent, client.sent.wrapping_add(100));
        assert_eq!(after.reply.side.sent, backend.sent.wrapping_add(100));
        assert_eq!(after.reply.side.acked, client.sent.wrapping_add(100));
        for (before, after) in [
            (before.original, after.original),
            (before.reply, after.reply),
        ] {
            assert_eq!(after.last_seen, before.last_seen.plus(Ticks(2 * SECOND)));
        }
        // What changes the state is judged, as ever.
        tcp.send_all(&[(Client, SYN), (Backend, SYN_ACK)]);
    }
}

/// A segment that others have overtaken says nothing new: it acknowledges less than its side has by now, and was taken for one that
/// does not join. Every one of them went through the slow path, fresh or not.
#[test]
fn a_segment_that_was_overtaken_needs_no_look() {
    for world in World::both() {
        for leased in [false, true] {
            let mut tcp = Conversation::established(&world);
            let late = tcp.segment(Client, ACK).payload([7; 100]);
            tcp.carry(Client, &late);
            let data = tcp.segment(Backend, ACK).payload([7; 100]);
            tcp.carry(Backend, &data);
            tcp.send(Client, ACK);
            let before = tcp.pair().unwrap().original;
            let mut watched = Watched {
                gateway: tcp.gateway,
                world,
                packets: 1,
            };
            if leased {
                // Not fresh without the daemon's word.
                vouch(&mut watched.gateway);
                watched.gateway.wait(2);
            }
            assert_ne!(watched.send(&late), 1, "leased: {leased}");
            tcp.gateway = watched.gateway;
            let after = tcp.pair().unwrap().original;
            assert_eq!(after.side, before.side);
        }
    }
}
