//! Frames of which XDP finds the beginning in the first of several buffers.

use portfwd_common::{
    abi::{Interface, Protocol},
    datapath::{Hook, PassReason, Verdict},
    model::{
        frame::Draft,
        rules::Forward,
        world::{LAN, WAN, World, at, interfaces},
    },
};

use crate::gateway::Gateway;

/// Bytes of the first buffer.
const BUFFER: usize = 200;

/// A gateway whose interfaces have these flags more or less.
fn gateway(world: &World, hook: Hook, takes_scattered: bool) -> Gateway {
    let rule = Forward::new(Protocol::Udp, 80, at(world.target, 8080));
    let mut gateway = Gateway::new(&[rule]).by(hook);
    gateway.model.buffer = BUFFER;
    for interface in interfaces() {
        if [WAN, LAN].contains(&interface.ifindex) && !takes_scattered {
            let flags = interface.flags & !Interface::XDP_SCATTER;
            let interface = Interface { flags, ..interface };
            gateway.model.maps.set_interface(interface);
        }
    }
    gateway
}

/// A datagram that begins in the first buffer, what the target gets of it, the answer, and what the client gets of that.
fn talk(world: &World, bytes: usize) -> [Draft; 4] {
    let (client, listen, target) = (
        at(world.client, 40_000),
        at(world.listen, 80),
        at(world.target, 8080),
    );
    let sent = Draft::udp(client, listen).payload(vec![7; bytes]);
    let answer = sent.between(target, client);
    [
        sent.clone(),
        sent.between(client, target).hop(),
        answer.clone(),
        answer.between(listen, client).hop(),
    ]
}

#[test]
fn they_leave_by_an_interface_that_takes_them() {
    for world in World::both() {
        let mut gateway = gateway(&world, Hook::Xdp, true);
        for _ in 0..3 {
            for bytes in [1_000, 10] {
                let [sent, delivered, answer, heard] = talk(&world, bytes);
                gateway.wan(&sent.packet()).reached_lan(&delivered.packet());
                gateway.lan(&answer.packet()).reached_wan(&heard.packet());
            }
        }
        assert_eq!(gateway.flows(), 1);
    }
}

/// The kernel would drop them (`dev_map_enqueue`): TC sends them, and whole frames still leave by XDP.
#[test]
fn they_are_left_to_tc_where_the_interface_takes_whole_frames_only() {
    for world in World::both() {
        let mut gateway = gateway(&world, Hook::Xdp, false);
        let [large, ..] = talk(&world, 1_000);
        for bytes in [10, 10] {
            gateway.wan(&large.packet()).passed(PassReason::SlowPath);
            let [sent, delivered, answer, heard] = talk(&world, bytes);
            gateway.wan(&sent.packet()).reached_lan(&delivered.packet());
            gateway.lan(&answer.packet()).reached_wan(&heard.packet());
        }
        let mut gateway = gateway.by(Hook::TcSlow);
        let [_, delivered, ..] = talk(&world, 1_000);
        gateway
            .wan(&large.packet())
            .reached_lan(&delivered.packet());
    }
}

/// What its own length says is there, or the packet is malformed, in however many buffers.
#[test]
fn a_frame_that_ends_too_early_is_passed() {
    for world in World::both() {
        let mut gateway = gateway(&world, Hook::Xdp, true);
        let [sent, ..] = talk(&world, 1_000);
        let whole = sent.packet();
        for len in [BUFFER, BUFFER + 1, whole.len() - 1] {
            let outcome = gateway.wan(&whole[..len]);
            assert_eq!(
                outcome.verdict,
                Verdict::Pass(PassReason::Malformed),
                "{len}"
            );
        }
        // Padding, however, is no part of it.
        let padded = [&whole[..], &[0; 300]].concat();
        let _ = gateway.wan(&padded).departure();
    }
}
