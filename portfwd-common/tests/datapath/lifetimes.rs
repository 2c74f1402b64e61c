//! Flows end at the lookup after their time, not when the sweep comes by.

use portfwd_common::{
    abi::Protocol,
    datapath::Event,
    model::{
        frame::{Draft, error},
        rules::Forward,
    },
};

use crate::gateway::{Gateway, SECOND};
use portfwd_common::model::world::{World, at};

fn gateway(world: &World) -> Gateway {
    Gateway::new(&[Forward::new(Protocol::Udp, 53, at(world.target, 1053))])
}

fn question(world: &World) -> Draft {
    Draft::udp(at(world.client, 5_353), at(world.listen, 53))
}

fn answer(world: &World) -> Draft {
    Draft::udp(at(world.target, 1053), at(world.client, 5_353))
}

#[test]
fn a_datagram_flow_lives_for_five_minutes_of_silence() {
    for world in World::both() {
        for (seconds, lives) in [
            (0, true),
            (1, true),
            (2, true),
            (119, true),
            (299, true),
            (300, true),
            (301, false),
            (100_000, false),
        ] {
            println!("after {seconds} s");
            let mut gateway = gateway(&world);
            let _ = gateway.wan(&question(&world).packet()).departure();
            gateway.wait(seconds);
            // Without flow it begins one.
            let _ = gateway.lan(&answer(&world).packet()).departure();
            let created = if lives { 1 } else { 2 };
            assert_eq!(gateway.events(Event::FlowCreated), created);
            assert_eq!(gateway.flows(), 1);
        }
    }
}

#[test]
fn a_single_tick_decides() {
    for world in World::both() {
        for (ticks, created) in [(300 * SECOND, 1), (300 * SECOND + 1, 2)] {
            let mut gateway = gateway(&world);
            let _ = gateway.wan(&question(&world).packet()).departure();
            gateway.model.advance(portfwd_common::abi::Ticks(ticks));
            let _ = gateway.wan(&question(&world).packet()).departure();
            assert_eq!(gateway.events(Event::FlowCreated), created);
        }
    }
}

#[test]
fn either_side_keeps_a_flow_alive() {
    for world in World::both() {
        for from_client in [true, false] {
            let mut gateway = gateway(&world);
            let _ = gateway.wan(&question(&world).packet()).departure();
            let _ = gateway.lan(&answer(&world).packet()).departure();
            for _ in 0..10 {
                gateway.wait(290);
                let outcome = if from_client {
                    gateway.wan(&question(&world).packet())
                } else {
                    gateway.lan(&answer(&world).packet())
                };
                let _ = outcome.departure();
            }
            // The other side was silent for 2,900 s.
            let outcome = if from_client {
                gateway.lan(&answer(&world).packet())
            } else {
                gateway.wan(&question(&world).packet())
            };
            let _ = outcome.departure();
            assert_eq!(gateway.events(Event::FlowCreated), 1);
        }
    }
}

#[test]
fn an_error_about_a_flow_does_not_keep_it_alive_and_does_not_end_it() {
    for world in World::both() {
        let kind = if world.client.is_ipv4() { 3 } else { 1 };
        let delivered = question(&world)
            .between(at(world.client, 5_353), at(world.target, 1053))
            .hop();
        let unreachable = error(
            world.target,
            world.client,
            kind,
            3,
            [0; 4],
            &delivered.packet(),
        );
        let mut gateway = gateway(&world);
        let _ = gateway.wan(&question(&world).packet()).departure();
        gateway.wait(200);
        let _ = gateway.lan(&unreachable).departure();
        assert_eq!(gateway.flows(), 1);
        gateway.wait(100);
        let _ = gateway.lan(&unreachable).departure();
        gateway.wait(1);
        // Translated by the rule alone, which enters nothing.
        let _ = gateway.lan(&unreachable).departure();
        assert_eq!(gateway.flows(), 0);
    }
}

#[test]
fn flows_live_across_the_wrap_of_the_clock() {
    for world in World::both() {
        let mut gateway = gateway(&world);
        assert!(gateway.model.now.ticks() > u32::MAX - 300 * SECOND);
        let _ = gateway.wan(&question(&world).packet()).departure();
        gateway.wait(299);
        assert!(
            gateway.model.now.ticks() < 300 * SECOND,
            "the clock has wrapped"
        );
        let _ = gateway.lan(&answer(&world).packet()).departure();
        assert_eq!(gateway.events(Event::FlowCreated), 1);
        gateway.wait(301);
        let _ = gateway.lan(&answer(&world).packet()).departure();
        assert_eq!(gateway.events(Event::FlowCreated), 2);
    }
}
