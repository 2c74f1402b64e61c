//! The gateway of these tests, with a world of clients and backends around it.
//!
//! ```text
//! client ── upstream router ── WAN  gateway  LAN ── target, second target
//!                                            NARROW (no XDP transmit, MTU 1400) ── narrow target
//!                                            TUNNEL (no link header) ── tunnel target
//!                              WAN_TUNNEL (no link header) ── tunnel client
//! ```

use std::net::{IpAddr, SocketAddr};

use portfwd_common::{
    abi::{
        Config, FlowEntry, FlowKey, Instant, Interface, LinkLayer, Ticks, counters::PortCounters,
    },
    datapath::{Arrival, Departure, DropReason, Event, Hook, PassReason, Route, Verdict, Way},
    model::{
        FlowMaps, Maps, Model,
        frame::{Mac, ethernet, mac_words},
        rules::{Forward, Lowered},
    },
    net::{Ipv4, Ipv6},
};

pub const WAN: u32 = 3;
pub const LAN: u32 = 4;
pub const NARROW: u32 = 5;
pub const TUNNEL: u32 = 6;
pub const WAN_TUNNEL: u32 = 7;
/// An interface that portfwd is not attached to.
pub const ELSEWHERE: u32 = 9;

pub const WAN_MAC: Mac = [2, 0, 0, 0, 0, WAN as u8];
pub const LAN_MAC: Mac = [2, 0, 0, 0, 0, LAN as u8];
pub const NARROW_MAC: Mac = [2, 0, 0, 0, 0, NARROW as u8];
pub const UPSTREAM_MAC: Mac = [2, 0xaa, 0, 0, 0, 1];
pub const BACKEND_MAC: Mac = [2, 0xbb, 0, 0, 0, 1];

pub const SECOND: u32 = 250;
pub const CONFIG: Config = Config {
    generation: 7,
    ticks_per_second: SECOND,
    validity: Ticks(SECOND),
    udp: Ticks(300 * SECOND),
    tcp_opening: Ticks(240 * SECOND),
    tcp_established: Ticks(7_440 * SECOND),
    tcp_closing: Ticks(240 * SECOND),
};

/// Who is where, in one family.
#[derive(Clone, Copy, Debug)]
pub struct World {
    pub client: IpAddr,
    pub second_client: IpAddr,
    /// Behind WAN_TUNNEL.
    pub tunnel_client: IpAddr,
    pub listen: IpAddr,
    pub second_listen: IpAddr,
    pub target: IpAddr,
    pub second_target: IpAddr,
    /// Behind NARROW.
    pub narrow_target: IpAddr,
    /// Behind TUNNEL.
    pub tunnel_target: IpAddr,
    /// On the LAN, its MAC address not known.
    pub silent_target: IpAddr,
    /// Behind ELSEWHERE.
    pub far_target: IpAddr,
    /// On the LAN, behind a route with an MTU of 1300.
    pub slow_target: IpAddr,
    /// Without route.
    pub lost_target: IpAddr,
    /// A router on the way to the target.
    pub lan_router: IpAddr,
    /// A router on the way to the client.
    pub wan_router: IpAddr,
}

pub fn v4() -> World {
    world(|network, host| format!("10.{network}.0.{host}").parse().unwrap())
}

pub fn v6() -> World {
    world(|network, host| format!("2001:db8:{network}::{host}").parse().unwrap())
}

pub fn both() -> [World; 2] {
    [v4(), v6()]
}

fn world(address: impl Fn(u8, u8) -> IpAddr) -> World {
    World {
        client: address(101, 7),
        second_client: address(101, 8),
        tunnel_client: address(107, 7),
        listen: address(3, 1),
        second_listen: address(3, 2),
        target: address(4, 10),
        second_target: address(4, 11),
        narrow_target: address(5, 10),
        tunnel_target: address(6, 10),
        silent_target: address(4, 66),
        far_target: address(9, 10),
        slow_target: address(4, 13),
        lost_target: address(99, 10),
        lan_router: address(4, 254),
        wan_router: address(102, 1),
    }
}

/// An endpoint.
pub fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

/// The model, and the hook that its frames meet.
pub struct Gateway {
    pub model: Model,
    pub hook: Hook,
}

/// What became of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub before: Vec<u8>,
    pub after: Vec<u8>,
}

/// All that the datapath can change besides the frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Books {
    pub v4: Vec<(FlowKey<Ipv4>, FlowEntry<Ipv4>)>,
    pub v6: Vec<(FlowKey<Ipv6>, FlowEntry<Ipv6>)>,
    pub counters: Vec<(u32, PortCounters)>,
}

impl Gateway {
    /// A gateway with rules and room for 16 flows, a moment before its clock wraps.
    pub fn new(forwards: &[Forward]) -> Self {
        Self::with_room(forwards, 16)
    }

    /// A gateway with rules and room for some flows.
    pub fn with_room(forwards: &[Forward], max_flows: usize) -> Self {
        let mut model = Model::new(CONFIG, max_flows);
        model.now = Instant::from_ticks(0xffff_ff00);
        for world in both() {
            furnish(&mut model.maps, &world);
        }
        for interface in interfaces() {
            model.maps.set_interface(interface);
        }
        let mut gateway = Self {
            model,
            hook: Hook::Tc,
        };
        gateway.set_rules(forwards);
        gateway
    }

    /// The same by another hook.
    pub fn by(self, hook: Hook) -> Self {
        Self { hook, ..self }
    }

    /// Puts other rules in place, as the daemon does: the generation goes up.
    pub fn set_rules(&mut self, forwards: &[Forward]) {
        self.model.maps.rules = Lowered::of(forwards);
        self.bump_generation();
    }

    pub fn bump_generation(&mut self) {
        let config = self.model.maps.config.as_mut().unwrap();
        config.generation = config.generation.wrapping_add(1);
    }

    pub fn wait(&mut self, seconds: u32) {
        self.model.advance(Ticks(seconds * SECOND));
    }

    /// A packet in a frame of the upstream router.
    pub fn from_wan(&mut self, packet: &[u8]) -> Outcome {
        self.frame(WAN, ethernet(WAN_MAC, UPSTREAM_MAC, packet))
    }

    /// A packet in a frame of a backend.
    pub fn from_lan(&mut self, packet: &[u8]) -> Outcome {
        self.frame(LAN, ethernet(LAN_MAC, BACKEND_MAC, packet))
    }

    /// A packet that comes in by an interface without link header.
    pub fn from_tunnel(&mut self, ifindex: u32, packet: &[u8]) -> Outcome {
        let arrival = Arrival {
            link: LinkLayer::Raw,
            ..self.arrival(ifindex)
        };
        self.arrive(&arrival, packet.to_vec())
    }

    /// A packet that the gateway itself sends by the WAN.
    pub fn sends(&mut self, packet: &[u8]) -> Outcome {
        let arrival = Arrival {
            hook: Hook::TcOut,
            ..self.arrival(WAN)
        };
        self.arrive(&arrival, ethernet(UPSTREAM_MAC, WAN_MAC, packet))
    }

    /// A frame that comes in by an interface with link header.
    pub fn frame(&mut self, ifindex: u32, frame: Vec<u8>) -> Outcome {
        self.arrive(&self.arrival(ifindex), frame)
    }

    pub fn arrival(&self, ifindex: u32) -> Arrival {
        Arrival {
            hook: self.hook,
            link: LinkLayer::Ethernet,
            ifindex,
            segments: 1,
            segment_size: 0,
        }
    }

    pub fn arrive(&mut self, arrival: &Arrival, before: Vec<u8>) -> Outcome {
        let mut after = before.clone();
        let verdict = self.model.run(&mut after, arrival);
        Outcome {
            verdict,
            before,
            after,
        }
    }

    pub fn books(&self) -> Books {
        let FlowMaps { v4, v6, .. } = &self.model.flows;
        let mut books = Books {
            v4: v4.iter().map(|(key, entry)| (*key, *entry)).collect(),
            v6: v6.iter().map(|(key, entry)| (*key, *entry)).collect(),
            counters: self.model.maps.counters().into_iter().collect(),
        };
        books
            .v4
            .sort_by_key(|(key, _)| bytemuck::bytes_of(key).to_vec());
        books
            .v6
            .sort_by_key(|(key, _)| bytemuck::bytes_of(key).to_vec());
        books
    }

    /// Flows in the table, two entries each.
    pub fn flows(&self) -> usize {
        let entries = self.model.flows.len();
        assert!(
            entries.is_multiple_of(2),
            "{entries} entries: a flow has two"
        );
        entries / 2
    }

    pub fn events(&self, event: Event) -> u64 {
        self.model.maps.reason(event.index())
    }

    pub fn drops(&self, reason: DropReason) -> u64 {
        self.model.maps.reason(reason.index())
    }

    pub fn passes(&self, reason: PassReason) -> u64 {
        self.model.maps.reason(reason.index())
    }
}

impl Outcome {
    /// It left, translated, as `packet`, to the backend on the LAN.
    #[track_caller]
    pub fn reached_lan(&self, packet: &[u8]) {
        self.left(LAN, &ethernet(BACKEND_MAC, LAN_MAC, packet));
    }

    /// It left, translated, as `packet`, to the upstream router.
    #[track_caller]
    pub fn reached_wan(&self, packet: &[u8]) {
        self.left(WAN, &ethernet(UPSTREAM_MAC, WAN_MAC, packet));
    }

    #[track_caller]
    fn left(&self, ifindex: u32, frame: &[u8]) {
        assert_eq!(hex(&self.after), hex(frame));
        assert_eq!(self.departure().way, Way::Frame);
        assert_eq!(self.departure().ifindex, ifindex);
    }

    #[track_caller]
    pub fn departure(&self) -> Departure {
        match self.verdict {
            Verdict::Forward(departure) => departure,
            Verdict::Pass(reason) => panic!("passed: {}", reason.name()),
            Verdict::Drop(reason) => panic!("dropped: {}", reason.name()),
        }
    }

    /// It was left to the kernel, bit for bit.
    #[track_caller]
    pub fn passed(&self, reason: PassReason) {
        assert_eq!(self.verdict, Verdict::Pass(reason));
        assert_eq!(hex(&self.after), hex(&self.before));
    }

    #[track_caller]
    pub fn dropped(&self, reason: DropReason) {
        assert_eq!(self.verdict, Verdict::Drop(reason));
    }
}

/// Bytes for messages, sixteen to a line.
pub fn hex(bytes: &[u8]) -> Vec<String> {
    bytes
        .chunks(16)
        .map(|line| {
            line.iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect()
}

fn interfaces() -> [Interface; 5] {
    let wan = Interface {
        ifindex: WAN,
        mtu: 1500,
        mac: mac_words(WAN_MAC),
        flags: Interface::ROLE_WAN | Interface::XDP_TRANSMIT,
        ipv4: v4_address(v4().listen),
        ipv6: v6().listen.into(),
    };
    [
        wan,
        Interface {
            ifindex: LAN,
            mac: mac_words(LAN_MAC),
            flags: Interface::XDP_TRANSMIT,
            ipv4: v4_address(v4().lan_router),
            ..wan
        },
        Interface {
            ifindex: NARROW,
            mac: mac_words(NARROW_MAC),
            mtu: 1400,
            flags: 0,
            ..wan
        },
        Interface {
            ifindex: TUNNEL,
            mac: [0; 3],
            flags: Interface::RAW,
            mtu: 1400,
            ..wan
        },
        Interface {
            ifindex: WAN_TUNNEL,
            mac: [0; 3],
            flags: Interface::RAW | Interface::ROLE_WAN,
            mtu: 1400,
            ..wan
        },
    ]
}

fn v4_address(address: IpAddr) -> Ipv4 {
    match address {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => panic!("{address} is not an IPv4 address"),
    }
}

fn furnish(maps: &mut Maps, world: &World) {
    let via = |ifindex, next_hop, mtu| Route::Via {
        ifindex,
        next_hop: mac_words(next_hop),
        mtu,
    };
    let host = if world.client.is_ipv4() { 32 } else { 128 };
    for client in [world.client, world.second_client, world.wan_router] {
        maps.set_route(client, host, via(WAN, UPSTREAM_MAC, 1500));
    }
    for target in [world.target, world.second_target] {
        maps.set_route(target, host, via(LAN, BACKEND_MAC, 1500));
    }
    let unresolved = |ifindex| Route::Unresolved { ifindex };
    maps.set_route(world.tunnel_client, host, unresolved(WAN_TUNNEL));
    maps.set_route(world.narrow_target, host, via(NARROW, BACKEND_MAC, 1400));
    maps.set_route(world.slow_target, host, via(LAN, BACKEND_MAC, 1300));
    maps.set_route(world.tunnel_target, host, unresolved(TUNNEL));
    maps.set_route(world.silent_target, host, unresolved(LAN));
    maps.set_route(world.far_target, host, via(ELSEWHERE, BACKEND_MAC, 1500));
    for address in [world.listen, world.second_listen] {
        maps.add_address(address);
    }
}
