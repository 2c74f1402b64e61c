//! The gateway of these tests, and what they look at afterwards.

use portfwd_common::{
    abi::{
        Bank, Config, Epoch, FlowEntry, FlowKey, Instant, LinkLayer, Ticks, Usage,
        counters::PortCounters,
    },
    datapath::{Arrival, Departure, DropReason, Event, Hook, PassReason, Verdict, Way},
    model::{
        FlowMaps, Model,
        frame::ethernet,
        rules::{Forward, Lowered},
        world::{ARM, ARM_MAC, BACKEND_MAC, LAN, LAN_MAC, UPSTREAM_MAC, WAN, WAN_MAC, furnish},
    },
    net::{Ipv4, Ipv6},
};

pub const SECOND: u32 = 250;
pub const CONFIG: Config = Config {
    epoch: Epoch::new(7, Bank::A),
    ticks_per_second: SECOND,
    validity: Ticks(SECOND),
    leased_validity: Ticks(0),
    lease_end: Instant::from_ticks(0),
    udp: Ticks(300 * SECOND),
    tcp_opening: Ticks(240 * SECOND),
    tcp_established: Ticks(7_440 * SECOND),
    tcp_closing: Ticks(240 * SECOND),
    seed: [0x5eed, 0xcafe],
    flags: 0,
    turn_bits: 11,
    turns_per_tick: 33,
};

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
        furnish(&mut model.maps);
        let mut gateway = Self {
            model,
            hook: Hook::Tc,
        };
        gateway.refill_error_budgets();
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
        if forwards.iter().any(|forward| forward.is_light) {
            let config = self.model.maps.config.as_mut().unwrap();
            config.flags |= Config::HAS_LIGHTS;
        }
        self.bump_generation();
    }

    /// As if no client had been told of anything for long.
    pub fn refill_error_budgets(&mut self) {
        let unused = Usage::unused(self.model.now);
        self.model.maps.error_budgets.fill(unused.due);
    }

    pub fn bump_generation(&mut self) {
        let config = self.model.maps.config.as_mut().unwrap();
        config.epoch = config.epoch.next();
    }

    pub fn wait(&mut self, seconds: u32) {
        self.model.advance(Ticks(seconds * SECOND));
    }

    /// A packet in a frame of the upstream router.
    pub fn wan(&mut self, packet: &[u8]) -> Outcome {
        self.frame(WAN, ethernet(WAN_MAC, UPSTREAM_MAC, packet))
    }

    /// A packet in a frame of a backend.
    pub fn lan(&mut self, packet: &[u8]) -> Outcome {
        self.frame(LAN, ethernet(LAN_MAC, BACKEND_MAC, packet))
    }

    /// A packet in a frame of a host, or of the router, of the only arm.
    pub fn arm(&mut self, packet: &[u8]) -> Outcome {
        self.frame(ARM, ethernet(ARM_MAC, BACKEND_MAC, packet))
    }

    /// A packet that comes in by an interface without link header.
    pub fn tunnel(&mut self, ifindex: u32, packet: &[u8]) -> Outcome {
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

    /// Lets everything come in again that waits for it, and says what became of it.
    pub fn settle(&mut self) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        while let Some((frame, arrival)) = self.model.backlog.pop_front() {
            outcomes.push(self.arrive(&arrival, frame));
        }
        outcomes
    }

    pub fn books(&self) -> Books {
        let FlowMaps {
            v4,
            v6,
            opening_v4,
            opening_v6,
            ..
        } = &self.model.flows;
        let (v4, v6) = (v4.iter().chain(opening_v4), v6.iter().chain(opening_v6));
        let mut books = Books {
            v4: v4.map(|(key, entry)| (*key, *entry)).collect(),
            v6: v6.map(|(key, entry)| (*key, *entry)).collect(),
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

    /// Flows in the table, two entries each, but for those of which only the half is left that is late.
    pub fn flows(&self) -> usize {
        let entries = self.model.flows.len() - self.model.flows.late();
        assert!(
            entries.is_multiple_of(2),
            "{entries} entries: a flow has two"
        );
        entries / 2
    }

    /// Flows in the connection table.
    pub fn proven(&self) -> usize {
        self.model.flows.proven() / 2
    }

    pub fn events(&self, event: Event) -> u64 {
        self.model.maps.reason(event.index())
    }

    pub fn drops(&self, reason: DropReason) -> u64 {
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

    /// It left, translated, as `packet`, to a host of the only arm.
    #[track_caller]
    pub fn reached_arm(&self, packet: &[u8]) {
        self.left(ARM, &ethernet(BACKEND_MAC, ARM_MAC, packet));
    }

    /// It left, translated, as `packet`, to the router of the only arm.
    #[track_caller]
    pub fn reached_arm_router(&self, packet: &[u8]) {
        self.left(ARM, &ethernet(UPSTREAM_MAC, ARM_MAC, packet));
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
            Verdict::Refuse(reason) => panic!("refused: {}", reason.name()),
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

    /// It was dropped, and its sender is told.
    #[track_caller]
    pub fn refused(&self, reason: DropReason) {
        assert_eq!(self.verdict, Verdict::Refuse(reason));
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
