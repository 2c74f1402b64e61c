//! Rules that not everybody may use.

use std::{collections::BTreeMap, net::IpAddr};

use portfwd_common::{
    abi::{Admission, Instant, Pressure, Protocol},
    datapath::{DropReason, PassReason},
    model::{
        frame::{Draft, Transport},
        rules::{Forward, Lowered},
        world::{World, at},
    },
};
use proptest::prelude::*;

use crate::gateway::Gateway;

use Admission::{Allowed, Denied};

const PORT: u16 = 80;

fn forward(world: &World) -> Forward {
    Forward::new(Protocol::Tcp, PORT, at(world.target, 8080))
}

/// A gateway with one rule, and a list of sources for it.
fn gateway(world: &World, rest: Admission, prefixes: &[(IpAddr, u32, Admission)]) -> Gateway {
    let mut gateway = Gateway::new(&[forward(world)]);
    restrict(&mut gateway, world, rest, prefixes);
    gateway
}

/// Gives the rule another list, as the daemon does.
fn restrict(
    gateway: &mut Gateway,
    world: &World,
    rest: Admission,
    prefixes: &[(IpAddr, u32, Admission)],
) {
    gateway.model.maps.rules = Lowered::of(&[forward(world)]).admitting(1, rest, prefixes);
    gateway.bump_generation();
}

fn syn(world: &World, source: IpAddr) -> Draft {
    Draft::tcp(at(source, 40_000), at(world.listen, PORT), 0x02)
}

#[test]
fn a_source_that_no_list_lets_in_makes_no_state_and_is_counted() {
    for world in World::both() {
        let own = (world.client, world.bits(), Allowed);
        let mut gateway = gateway(&world, Denied, &[own]);
        for flags in [0x02, 0x10, 0x04, 0x12, 0x18] {
            let draft = Draft {
                transport: Transport::Tcp(flags),
                ..syn(&world, world.second_client)
            };
            let before = gateway.books();
            gateway
                .wan(&draft.packet())
                .dropped(DropReason::SourceRefused);
            assert_eq!(gateway.books(), before);
        }
        assert_eq!(gateway.drops(DropReason::SourceRefused), 5);
        let _ = gateway.wan(&syn(&world, world.client).packet()).departure();
        assert_eq!(gateway.flows(), 1);
    }
}

#[test]
fn nobody_is_asked_where_no_rule_listens() {
    for world in World::both() {
        let mut gateway = gateway(&world, Denied, &[]);
        let elsewhere = Draft::tcp(at(world.client, 40_000), at(world.listen, 81), 0x02);
        gateway.wan(&elsewhere.packet()).passed(PassReason::NoRule);
    }
}

#[test]
fn a_flow_ends_with_its_next_packet_when_its_source_is_kept_out_and_no_other_does() {
    for world in World::both() {
        let mut gateway = gateway(&world, Allowed, &[]);
        let clients = [world.client, world.second_client];
        for client in clients {
            let _ = gateway.wan(&syn(&world, client).packet()).departure();
        }
        let kept_out = (world.second_client, world.bits(), Denied);
        restrict(&mut gateway, &world, Allowed, &[kept_out]);
        let reply = |client| Draft::tcp(at(world.target, 8080), at(client, 40_000), 0x12).packet();
        let _ = gateway.lan(&reply(world.client)).departure();
        gateway
            .lan(&reply(world.second_client))
            .dropped(DropReason::SourceRefused);
        assert_eq!(gateway.flows(), 1);
        gateway
            .wan(&syn(&world, world.second_client).packet())
            .dropped(DropReason::SourceRefused);
        // Let in again, it begins anew.
        restrict(&mut gateway, &world, Allowed, &[]);
        let again = syn(&world, world.second_client).packet();
        let _ = gateway.wan(&again).departure();
        assert_eq!(gateway.flows(), 2);
    }
}

#[test]
fn a_full_table_lets_nobody_past_a_list() {
    for world in World::both() {
        let kept_out = (world.second_client, world.bits(), Denied);
        let mut gateway = Gateway::with_room(&[forward(&world)], 0);
        restrict(&mut gateway, &world, Allowed, &[kept_out]);
        gateway.model.maps.set_pressure(Pressure {
            full_at: Instant::from_ticks(u64::from(gateway.model.now.ticks())),
            was_full: 1,
        });
        let reply = |client| Draft::tcp(at(world.target, 8080), at(client, 40_000), 0x12).packet();
        let _ = gateway.wan(&syn(&world, world.client).packet()).departure();
        let _ = gateway.lan(&reply(world.client)).departure();
        gateway
            .wan(&syn(&world, world.second_client).packet())
            .dropped(DropReason::SourceRefused);
        gateway
            .lan(&reply(world.second_client))
            .dropped(DropReason::SourceRefused);
    }
}

/// The first `length` bits of the address that is like `address` for `same` bits and then differs in every one.
fn beside(address: IpAddr, same: u32, length: u32) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let flipped = v4.to_bits() ^ u32::MAX.checked_shr(same).unwrap_or(0);
            let kept = !u32::MAX.checked_shr(length).unwrap_or(0);
            IpAddr::V4((flipped & kept).into())
        }
        IpAddr::V6(v6) => {
            let flipped = v6.to_bits() ^ u128::MAX.checked_shr(same).unwrap_or(0);
            let kept = !u128::MAX.checked_shr(length).unwrap_or(0);
            IpAddr::V6((flipped & kept).into())
        }
    }
}

proptest! {
    #[test]
    fn of_all_prefixes_that_name_a_source_the_longest_decides(
        drawn in proptest::collection::vec((0..=128_u32, 1..=128_u32, any::<bool>()), 0..20),
        rest in any::<bool>(), v6 in any::<bool>(),
    ) {
        let world = if v6 { World::v6() } else { World::v4() };
        let admission = |is_allowed| if is_allowed { Allowed } else { Denied };
        // Bits that it shares with the client, by prefix.
        let mut prefixes = BTreeMap::new();
        for (same, length, is_allowed) in drawn {
            let (same, length) = (same.min(world.bits()), length.min(world.bits()));
            let address = beside(world.client, same, length);
            prefixes.insert((length, address), (same, admission(is_allowed)));
        }
        let expected = prefixes
            .iter()
            .rev()
            .find(|((length, _), (same, _))| same >= length)
            .map_or(admission(rest), |(_, (_, admission))| *admission);
        let list: Vec<_> = prefixes
            .into_iter()
            .map(|((length, address), (_, admission))| (address, length, admission))
            .collect();
        let mut gateway = gateway(&world, admission(rest), &list);
        let outcome = gateway.wan(&syn(&world, world.client).packet());
        match expected {
            Allowed => drop(outcome.departure()),
            Denied => outcome.dropped(DropReason::SourceRefused),
        }
    }
}
