//! How many flows a rule takes, of each source and of all.

use std::net::{IpAddr, SocketAddr};

use portfwd_common::{
    abi::{Instant, Limits, PoolRange, Protocol, Rate, Recount, Spender, Ticks, Usage, UsageKey},
    datapath::{DropReason, Event, Tables as _, Verdict, limits::Pace},
    model::{
        frame::Draft,
        rules::{Forward, Source},
        world::{World, at},
    },
    net::{Ipv4, Ipv6},
};
use proptest::prelude::*;

use crate::{
    conversation::{
        ACK, Backend, Client, Conversation, FIN, HANDSHAKE, RST, RST_ACK, SYN, SYN_ACK,
    },
    gateway::{Gateway, Outcome, SECOND},
};

const PORT: u16 = 53;

fn rate(flows: u32, seconds: u32, burst: u32) -> Rate {
    Rate {
        flows,
        seconds,
        burst,
    }
}

fn most(flows: u32, source_flows: u32) -> Limits {
    Limits {
        flows,
        source_flows,
        source_bits: 128,
        ..Limits::NONE
    }
}

fn forward(world: &World, limits: Limits) -> Forward {
    Forward::new(Protocol::Udp, PORT, at(world.target, 1053)).limited(limits)
}

fn gateway(world: &World, limits: Limits) -> Gateway {
    Gateway::new(&[forward(world, limits)])
}

/// A datagram of a client's port to the rule.
fn dial(gateway: &mut Gateway, world: &World, source: IpAddr, port: u16) -> Outcome {
    gateway.wan(&Draft::udp(at(source, port), at(world.listen, PORT)).packet())
}

/// How many of so many flows of a source begin; the others must be refused for one reason.
#[track_caller]
fn begin(
    gateway: &mut Gateway,
    world: &World,
    source: IpAddr,
    ports: std::ops::Range<u16>,
    reason: DropReason,
) -> usize {
    let mut begun = 0;
    for port in ports {
        let outcome = dial(gateway, world, source, port);
        match outcome.verdict {
            Verdict::Forward(_) => begun += 1,
            Verdict::Drop(found) | Verdict::Refuse(found) => assert_eq!(found, reason),
            Verdict::Pass(found) => panic!("passed: {}", found.name()),
        }
    }
    begun
}

fn rule_usage(gateway: &Gateway) -> Usage {
    let rules = gateway.model.maps.usages.rules();
    rules.get(&1).copied().unwrap_or_default()
}

/// Flows of all sources together, as the datapath has counted them.
fn source_flows(gateway: &Gateway) -> u64 {
    let sources = gateway.model.maps.usages.sources();
    sources.values().map(Usage::flows).sum()
}

#[test]
fn a_source_that_has_its_flows_gets_no_more_and_others_do_not_notice() {
    for world in World::both() {
        let mut gateway = gateway(&world, most(5, 3));
        let begun = begin(
            &mut gateway,
            &world,
            world.client,
            1..11,
            DropReason::SourceFlows,
        );
        assert_eq!((begun, gateway.flows()), (3, 3));
        let before = gateway.books();
        dial(&mut gateway, &world, world.client, 99).dropped(DropReason::SourceFlows);
        assert_eq!(gateway.books(), before);
        // The flows that it has go on.
        for port in 1..4 {
            let _ = dial(&mut gateway, &world, world.client, port).departure();
        }
        let begun = begin(
            &mut gateway,
            &world,
            world.second_client,
            1..6,
            DropReason::RuleFlows,
        );
        assert_eq!((begun, gateway.flows()), (2, 5));
        assert_eq!(rule_usage(&gateway).flows(), 5);
        // What the rule refused is not the source's.
        assert_eq!(source_flows(&gateway), 5);
        assert_eq!(gateway.drops(DropReason::SourceFlows), 8);
        assert_eq!(gateway.drops(DropReason::RuleFlows), 3);
        assert_eq!(rule_usage(&gateway).refused, 11);
    }
}

#[test]
fn another_rule_of_the_same_target_is_not_limited() {
    for world in World::both() {
        let other = Forward::new(Protocol::Udp, 54, at(world.target, 1053));
        let mut gateway = Gateway::new(&[forward(&world, most(1, 0)), other]);
        let begun = begin(
            &mut gateway,
            &world,
            world.client,
            1..4,
            DropReason::RuleFlows,
        );
        assert_eq!(begun, 1);
        for port in 10..20 {
            let draft = Draft::udp(at(world.client, port), at(world.listen, 54));
            let _ = gateway.wan(&draft.packet()).departure();
        }
    }
}

#[test]
fn a_rate_lets_its_burst_in_at_once_and_then_one_in_a_time() {
    for world in World::both() {
        let limits = Limits {
            rate: rate(2, 1, 4),
            ..Limits::NONE
        };
        let mut gateway = gateway(&world, limits);
        let mut ports = 1..u16::MAX;
        let mut next = |gateway: &mut Gateway, flows: u16| {
            let first = ports.next().unwrap();
            ports = first + flows..u16::MAX;
            begin(
                gateway,
                &world,
                world.client,
                first..first + flows,
                DropReason::RuleRate,
            )
        };
        assert_eq!(next(&mut gateway, 10), 4);
        // The clock wraps meanwhile.
        for _ in 0..4 {
            gateway.model.advance(Ticks(SECOND / 2 - 1));
            assert_eq!(next(&mut gateway, 3), 0);
            gateway.model.advance(Ticks(1));
            assert_eq!(next(&mut gateway, 3), 1);
        }
        gateway.wait(1);
        assert_eq!(next(&mut gateway, 10), 2);
        // However long nobody comes, there are no more at once than the burst.
        gateway.wait(3_600);
        assert_eq!(next(&mut gateway, 10), 4);
        gateway.wait(1);
        assert_eq!(next(&mut gateway, 10), 2);
    }
}

#[test]
fn one_source_cannot_use_up_the_rate_of_all() {
    for world in World::both() {
        let limits = Limits {
            rate: rate(10, 1, 10),
            source_rate: rate(1, 60, 2),
            source_bits: 128,
            ..Limits::NONE
        };
        let mut gateway = gateway(&world, limits);
        let begun = begin(
            &mut gateway,
            &world,
            world.client,
            1..200,
            DropReason::SourceRate,
        );
        assert_eq!(begun, 2);
        for host in 0..8 {
            let other = beside(world.second_client, host);
            let _ = dial(&mut gateway, &world, other, 7).departure();
        }
        dial(&mut gateway, &world, beside(world.second_client, 9), 7).dropped(DropReason::RuleRate);
    }
}

/// Another address of the same network.
fn beside(address: IpAddr, host: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            IpAddr::from([a, b, c, 100 + host])
        }
        IpAddr::V6(v6) => {
            let network = v6.to_bits() >> 8 << 8;
            IpAddr::V6((network | u128::from(100 + host)).into())
        }
    }
}

#[test]
fn addresses_that_begin_alike_are_one_source() {
    for world in World::both() {
        let bits = world.network_bits();
        for (source_bits, expected) in [(bits, 3), (bits + 1, 6), (world.bits(), 10)] {
            let limits = Limits {
                source_bits,
                ..most(0, 3)
            };
            let mut gateway = gateway(&world, limits);
            let mut begun = 0;
            for host in 0..10 {
                let source = if host < 5 {
                    beside(world.client, host)
                } else {
                    in_the_other_half(beside(world.client, host))
                };
                begun += begin(&mut gateway, &world, source, 1..2, DropReason::SourceFlows);
            }
            assert_eq!(begun, expected, "{source_bits} bits");
        }
    }
}

/// The same with the first bit behind the network's prefix turned.
fn in_the_other_half(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() ^ 0x80).into()),
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() ^ 1 << 63).into()),
    }
}

#[test]
fn prefixes_of_every_length_are_cut_off_as_by_arithmetic() {
    let v4 = std::net::Ipv4Addr::from_bits(0xdead_beef);
    let v6 = std::net::Ipv6Addr::from_bits(0x0123_4567_89ab_cdef_fedc_ba98_7654_3211);
    for bits in 0..=128_u32 {
        let mask = |of: u32| u128::MAX.checked_shl(of - bits.min(of)).unwrap_or(0);
        let key = UsageKey::new(7, Ipv6::from(v6), bits);
        assert_eq!(
            key.source,
            Ipv6::from(std::net::Ipv6Addr::from_bits(v6.to_bits() & mask(128)))
        );
        let key = UsageKey::new(7, Ipv4::from(v4), bits);
        let expected = std::net::Ipv4Addr::from_bits(v4.to_bits() & mask(32) as u32);
        assert_eq!(key.source, Ipv6::from(IpAddr::V4(expected)));
    }
}

/// A TCP conversation through a rule that counts.
fn counted(world: &World, segments: &[(crate::conversation::Sender, u8)]) -> Conversation {
    let mut conversation = Conversation::new(world);
    let rule = Forward::new(Protocol::Tcp, 80, at(world.target, 8080)).limited(most(1, 1));
    conversation.gateway.set_rules(&[rule]);
    conversation.send_all(segments);
    conversation
}

#[test]
fn a_connection_counts_until_both_ends_have_closed_it_or_one_has_reset_it() {
    const OPEN: (u64, u64) = (1, 1);
    const CLOSED: (u64, u64) = (0, 0);
    let flows = |conversation: &Conversation| {
        let gateway = &conversation.gateway;
        (rule_usage(gateway).flows(), source_flows(gateway))
    };
    for world in World::both() {
        for (segments, expected) in [
            (&[(Client, SYN)][..], OPEN),
            (&[(Client, SYN), (Backend, SYN_ACK)], OPEN),
            (&[(Client, SYN), (Backend, RST_ACK)], CLOSED),
            (HANDSHAKE, OPEN),
        ] {
            assert_eq!(flows(&counted(&world, segments)), expected, "{segments:?}");
        }
        for (segments, expected) in [
            (&[(Client, FIN)][..], OPEN),
            (&[(Backend, FIN), (Client, ACK)], OPEN),
            (&[(Client, FIN), (Backend, FIN)], CLOSED),
            (
                &[(Client, FIN), (Backend, FIN), (Client, ACK), (Backend, ACK)],
                CLOSED,
            ),
            (&[(Client, RST)], CLOSED),
            (&[(Backend, RST), (Backend, RST)], CLOSED),
        ] {
            let mut conversation = counted(&world, HANDSHAKE);
            conversation.send_all(segments);
            assert_eq!(flows(&conversation), expected, "{segments:?}");
        }
    }
}

#[test]
fn a_closed_connection_makes_room_at_once_and_its_successor_on_the_same_ports_counts_again() {
    for world in World::both() {
        let mut conversation = counted(&world, HANDSHAKE);
        let other = Draft::tcp(at(world.client, 40_001), at(world.listen, 80), SYN);
        let dial = |conversation: &mut Conversation| conversation.gateway.wan(&other.packet());
        dial(&mut conversation).dropped(DropReason::SourceFlows);
        conversation.send_all(&[(Client, FIN), (Backend, FIN), (Client, ACK)]);
        conversation.send_all(HANDSHAKE);
        assert_eq!(rule_usage(&conversation.gateway).flows(), 1);
        dial(&mut conversation).dropped(DropReason::SourceFlows);
        conversation.send(Client, RST);
        let _ = dial(&mut conversation).departure();
        assert_eq!(rule_usage(&conversation.gateway).flows(), 1);
    }
}

/// After a RST the other side goes on: it has not taken it (RFC 7857 section 2.2).
#[test]
fn a_connection_that_a_reset_has_not_ended_counts_again() {
    for world in World::both() {
        let mut conversation = counted(&world, HANDSHAKE);
        conversation.send(Backend, RST);
        assert_eq!(rule_usage(&conversation.gateway).flows(), 0);
        // Behind the time in which its entry needs no second look.
        conversation.gateway.wait(2);
        conversation.send(Client, ACK);
        assert_eq!(rule_usage(&conversation.gateway).flows(), 1);
        assert_eq!(source_flows(&conversation.gateway), 1);
    }
}

#[test]
fn a_flow_that_has_expired_or_lost_its_rule_makes_room_for_its_own_next_packet() {
    for world in World::both() {
        let mut gateway = gateway(&world, most(1, 1));
        for port in [1, 1] {
            let _ = dial(&mut gateway, &world, world.client, port).departure();
        }
        gateway.wait(301);
        let _ = dial(&mut gateway, &world, world.client, 1).departure();
        assert_eq!(
            (rule_usage(&gateway).flows(), source_flows(&gateway)),
            (1, 1)
        );
        // The rule goes elsewhere from here on.
        let moved = Forward::new(Protocol::Udp, PORT, at(world.target, 7)).limited(most(1, 1));
        gateway.set_rules(&[moved]);
        let _ = dial(&mut gateway, &world, world.client, 1).departure();
        assert_eq!(
            (rule_usage(&gateway).flows(), source_flows(&gateway)),
            (1, 1)
        );
        assert_eq!(gateway.flows(), 1);
    }
}

#[test]
fn what_makes_no_entry_takes_no_place() {
    for world in World::both() {
        let rule = Forward::new(Protocol::Tcp, 80, at(world.target, 8080)).limited(most(1, 1));
        let mut gateway = Gateway::new(&[rule]);
        let rst = Draft::tcp(at(world.client, 1), at(world.listen, 80), RST);
        for _ in 0..3 {
            let _ = gateway.wan(&rst.packet()).departure();
        }
        assert_eq!(
            (
                gateway.flows(),
                rule_usage(&gateway).flows(),
                source_flows(&gateway)
            ),
            (0, 0, 0)
        );
        // A RST asks like any other first packet.
        let syn = |port| Draft::tcp(at(world.client, port), at(world.listen, 80), SYN).packet();
        let _ = gateway.wan(&syn(2)).departure();
        gateway.wan(&rst.packet()).dropped(DropReason::SourceFlows);

        // Without a port to stand for the client, there is no flow.
        let none = PoolRange { first: 7, last: 7 };
        let rule = forward(&world, most(5, 5)).from(Source::Snat(world.lan_address, none));
        let mut gateway = Gateway::new(&[rule]);
        let begun = begin(&mut gateway, &world, world.client, 1..5, DropReason::NoPort);
        assert_eq!(
            (begun as u64, begun as u64),
            (rule_usage(&gateway).flows(), source_flows(&gateway))
        );
        assert_eq!(gateway.flows(), begun);
        assert_eq!(rule_usage(&gateway).refused, 0);
    }
}

#[test]
fn a_full_table_is_no_way_round_a_limit() {
    for world in World::both() {
        let mut gateway = Gateway::with_room(&[forward(&world, most(9, 0))], 0);
        let _ = dial(&mut gateway, &world, world.client, 1).departure();
        // There is no room for a flow that has proven itself, and its rule carries nothing without.
        dial(&mut gateway, &world, world.client, 1).refused(DropReason::TableFull);
        assert_eq!(gateway.events(Event::Stateless), 0);
    }
}

#[test]
fn flows_that_are_there_do_not_feel_a_limit_that_comes_later() {
    for world in World::both() {
        let mut gateway = gateway(&world, Limits::NONE);
        for port in 1..9 {
            let _ = dial(&mut gateway, &world, world.client, port).departure();
        }
        let limits = Limits {
            rate: rate(1, 3_600, 1),
            ..most(2, 2)
        };
        gateway.set_rules(&[forward(&world, limits)]);
        gateway.wait(2);
        for port in 1..9 {
            let _ = dial(&mut gateway, &world, world.client, port).departure();
        }
        assert_eq!(gateway.flows(), 8);
    }
}

#[test]
fn a_rate_that_is_changed_begins_with_a_full_burst_or_less_and_holds() {
    for world in World::both() {
        let limits = |rate| Limits {
            rate,
            ..Limits::NONE
        };
        let mut gateway = gateway(&world, limits(rate(1, 3_600, 100)));
        let begun = begin(
            &mut gateway,
            &world,
            world.client,
            1..200,
            DropReason::RuleRate,
        );
        assert_eq!(begun, 100);
        gateway.set_rules(&[forward(&world, limits(rate(1, 1, 3)))]);
        let begun = begin(
            &mut gateway,
            &world,
            world.client,
            200..300,
            DropReason::RuleRate,
        );
        assert_eq!(begun, 3);
    }
}

#[test]
fn without_a_recount_for_long_numbers_of_flows_let_everybody_in_and_rates_hold() {
    for world in World::both() {
        let limits = Limits {
            source_rate: rate(6, 60, 6),
            ..most(2, 0)
        };
        let mut gateway = gateway(&world, limits);
        gateway.model.maps.recount = Recount {
            at: gateway.model.now,
            trust: Ticks(600 * SECOND),
        };
        gateway.wait(600);
        let begun = begin(
            &mut gateway,
            &world,
            world.client,
            1..4,
            DropReason::RuleFlows,
        );
        assert_eq!(begun, 2);
        gateway.wait(1);
        let begun = begin(
            &mut gateway,
            &world,
            world.client,
            4..20,
            DropReason::SourceRate,
        );
        assert!((3..=4).contains(&begun), "{begun}");
        // And they are counted, for when somebody looks again.
        assert_eq!(rule_usage(&gateway).flows(), 2 + begun as u64);
        gateway.model.maps.recount.at = gateway.model.now;
        gateway.wait(60);
        dial(&mut gateway, &world, world.client, 99).dropped(DropReason::RuleFlows);
    }
}

#[test]
fn lan_clients_are_sources_like_any_other() {
    for world in World::both() {
        let mut gateway = gateway(&world, most(0, 2));
        let dial = |gateway: &mut Gateway, port| {
            let source: SocketAddr = at(world.second_target, port);
            gateway.lan(&Draft::udp(source, at(world.listen, PORT)).packet())
        };
        for port in 1..3 {
            let _ = dial(&mut gateway, port).departure();
        }
        dial(&mut gateway, 3).dropped(DropReason::SourceFlows);
        let key = match world.second_target {
            IpAddr::V4(v4) => UsageKey::new(1, Ipv4::from(v4), 128),
            IpAddr::V6(v6) => UsageKey::new(1, Ipv6::from(v6), 128),
        };
        assert!(gateway.model.maps.usage(Spender::Source, &key).is_some());
    }
}

/// A token bucket in plain numbers: tokens in parts, of which `parts` are one.
struct Bucket {
    level: u64,
    parts: u64,
    burst: u64,
}

impl Bucket {
    fn tick(&mut self, gain: u64) {
        self.level = (self.level + gain).min(self.burst * self.parts);
    }

    fn take(&mut self) -> bool {
        let is_there = self.level >= self.parts;
        self.level -= if is_there { self.parts } else { 0 };
        is_there
    }
}

/// All arrivals of up to three flows in each of six ticks, at rates that ticks divide.
#[test]
fn a_pace_agrees_with_a_bucket_of_tokens() {
    const TICKS_PER_SECOND: u32 = 4;
    const ARRIVALS: u32 = 4_u32.pow(6);
    for flows in [1, 2, 4, 8] {
        for burst in 1..=4 {
            let pace = Pace::of(&rate(flows, 1, burst), TICKS_PER_SECOND).unwrap();
            for arrivals in 0..ARRIVALS {
                let mut bucket = Bucket {
                    level: u64::from(burst * TICKS_PER_SECOND),
                    parts: u64::from(TICKS_PER_SECOND),
                    burst: u64::from(burst),
                };
                // Over the end of the clock.
                let start = Instant::from_ticks(0xffff_fffd);
                let mut due = Usage::unused(start).due;
                for tick in 0..6 {
                    let now = start.plus(Ticks(tick));
                    for _ in 0..arrivals >> (2 * tick) & 3 {
                        let next = pace.next(due, now);
                        assert_eq!(
                            next.is_some(),
                            bucket.take(),
                            "{flows}/s:{burst} {arrivals:012b}"
                        );
                        due = next.unwrap_or(due);
                    }
                    bucket.tick(u64::from(flows));
                }
            }
        }
    }
}

fn any_rate() -> impl Strategy<Value = Rate> {
    let seconds = prop::sample::select(vec![1_u32, 60, 3_600]);
    let flows = prop_oneof![1..20_u32, 1..=Rate::MOST];
    (flows, seconds, prop_oneof![1..20_u32, 1..=Rate::MOST])
        .prop_map(|(flows, seconds, burst)| rate(flows, seconds, burst))
        .prop_filter("comes back too late", |rate| {
            u64::from(rate.burst) * u64::from(rate.seconds) <= Rate::LONGEST * u64::from(rate.flows)
        })
}

proptest! {
    /// The bound that the documents promise, over every window between two flows.
    #[test]
    fn no_window_has_more_flows_than_burst_and_rate(
        rate in any_rate(),
        ticks_per_second in prop::sample::select(vec![100_u32, 250, 300, 1_000]),
        start in any::<u32>(),
        waits in prop::collection::vec(prop_oneof![Just(0_u32), 0..5_u32, 0..2_000_u32], 1..200),
    ) {
        let pace = Pace::of(&rate, ticks_per_second).unwrap();
        let mut now = Instant::from_ticks(u64::from(start));
        let mut due = Usage::unused(now).due;
        let (mut elapsed, mut taken) = (0_u64, Vec::new());
        for wait in waits {
            now = now.plus(Ticks(wait));
            elapsed += u64::from(wait);
            if let Some(next) = pace.next(due, now) {
                due = next;
                taken.push(elapsed);
            }
        }
        for (first, from) in taken.iter().enumerate() {
            for (last, to) in taken.iter().enumerate().skip(first) {
                let flows = (last - first + 1) as u64;
                let ticks = u128::from(to - from);
                let came_back = ticks * u128::from(rate.flows) / (u128::from(rate.seconds) * u128::from(ticks_per_second));
                prop_assert!(u128::from(flows) <= u128::from(rate.burst) + came_back);
            }
        }
    }

    /// Nobody who keeps to the rate is ever refused, if the burst has what comes in one tick: the clock does not tell those apart.
    #[test]
    fn who_keeps_to_the_rate_is_let_in(
        rate in any_rate(), start in any::<u32>(), used in 0..20_u32, flows in 1..100_u32,
    ) {
        const TICKS_PER_SECOND: u32 = 250;
        let pace = Pace::of(&rate, TICKS_PER_SECOND).unwrap();
        let start = Instant::from_ticks(u64::from(start));
        let mut due = Usage::unused(start).due;
        let period = u64::from(rate.seconds * TICKS_PER_SECOND);
        let in_a_tick = u64::from(rate.flows).div_ceil(period) as u32;
        prop_assume!(rate.burst > in_a_tick);
        for _ in 0..used.min(rate.burst - 1 - in_a_tick) {
            due = pace.next(due, start).unwrap();
        }
        for flow in 0..u64::from(flows) {
            let ticks = (flow * period).div_ceil(u64::from(rate.flows)) + 1;
            let now = start.plus(Ticks(ticks as u32));
            due = pace.next(due, now).unwrap();
        }
    }

    /// Another CPU may have read its clock a moment later.
    #[test]
    fn a_clock_that_lags_gives_nothing_away(rate in any_rate(), start in any::<u32>(), lag in 0..10_u32) {
        let pace = Pace::of(&rate, 1_000).unwrap();
        let now = Instant::from_ticks(u64::from(start));
        let mut due = Usage::unused(now).due;
        for _ in 0..rate.burst.min(50) {
            due = pace.next(due, now).unwrap();
        }
        if rate.burst <= 50 {
            prop_assert_eq!(pace.next(due, now.minus(Ticks(lag))), None);
        }
    }
}
