//! What the kernel program and user space agree on: keys and values of every map, byte for byte.
//!
//! All values are in host order unless the type says otherwise ([`crate::net::be`], [`crate::net::address`]). No layout has
//! padding that is not a named, zeroed field. Any change of a layout, of a map's name or of the sense of a field raises
//! [`ABI_VERSION`]: pins of another version are refused, never reused.

pub mod answer;
pub mod bank;
pub mod config;
pub mod counters;
pub mod flow;
pub mod fragment;
pub mod instant;
pub mod light;
pub mod limit;
pub mod next_hop;
pub mod pool;
pub mod rule;
pub mod sources;

pub use answer::AnswerKey;
pub use bank::{Bank, Epoch};
pub use config::{Config, Interface, LinkLayer, Pressure, Role, Transmission};
pub use counters::{PortCounters, Traffic};
pub use flow::{FlowDir, FlowEntry, FlowKey, Peer, Rewrite};
pub use instant::{ClockReading, Instant, Stamp, Ticks};
pub use light::{ClientWay, Pace, RuleWay, Turns};
pub use limit::{Limits, Rate, Recount, Spender, Usage, UsageKey, UsageTask};
pub use next_hop::NextHop;
pub use pool::{Binding, BindingKey, Pool, PoolKey, PoolRange, PoolTask};
pub use rule::{EndpointKey, PortSlot, Protocol, Rule};
pub use sources::{Admission, SourceKey};

/// Version of everything in this module.
pub const ABI_VERSION: u32 = 8;

/// Names of maps and programs, at most 15 characters (`BPF_OBJ_NAME_LEN`). The statics of the kernel object have the same.
pub mod names {
    /// [`super::Config`], one element.
    pub const CONFIG: &str = "CONFIG";
    /// [`super::Pressure`], one element, written by the datapath.
    pub const PRESSURE: &str = "PRESSURE";
    /// [`super::Interface`] by [`super::config::interface_slot`].
    pub const INTERFACES: &str = "INTERFACES";
    /// Interfaces that XDP may transmit on, by [`super::config::interface_slot`]. Pinned, and made anew with the programs.
    pub const EGRESS: &str = "EGRESS";
    /// [`super::NextHop`] by the numbers in flow entries; written by the datapath.
    pub const NEXT_HOPS: &str = "NEXT_HOPS";
    /// Own addresses of the attached interfaces: listen without an address means those of the WAN. [`super::rule::AddressKey`] →
    /// [`super::config::OwnAddress`].
    pub const ADDRESSES: &str = "ADDRESSES";
    /// [`super::PortSlot`] by bank and [`super::rule::port_index`].
    pub const PORTS: &str = "PORTS";
    /// [`super::Rule`] by bank and slot; slot 0 is none.
    pub const RULES: &str = "RULES";
    /// Listens with an address: longest prefix of [`super::EndpointKey`] → rule slot.
    pub const LISTENS: &str = "LISTENS";
    /// Targets, for stateless replies: longest prefix of [`super::EndpointKey`] → rule slot, 0 if several rules share it.
    pub const TARGETS: &str = "TARGETS";
    /// Rules that take what is nobody else's, and the ports that they leave: longest prefix of [`super::EndpointKey`] → rule slot, 0 for
    /// a port that is left to the gateway. An unspecified address stands for every own address of the WAN interfaces.
    pub const RESTS: &str = "RESTS";
    /// What answers to packets that left by a WAN interface would be: [`super::AnswerKey`] → when such a packet last left. Written while
    /// there are [`RESTS`]; the one met longest ago makes room.
    pub const ANSWERS: &str = "ANSWERS";
    /// Lists of sources: longest prefix of [`super::SourceKey`] → [`super::Admission`].
    pub const SOURCES: &str = "SOURCES";
    /// IPv4 flows, one entry per direction.
    pub const FLOWS_V4: &str = "FLOWS_V4";
    /// IPv6 flows, one entry per direction.
    pub const FLOWS_V6: &str = "FLOWS_V6";
    /// IPv4 flows that have not proven themselves, likewise; the one met longest ago makes room.
    pub const OPENING_V4: &str = "OPENING_V4";
    /// IPv6 flows that have not proven themselves.
    pub const OPENING_V6: &str = "OPENING_V6";
    /// [`super::PortCounters`] per CPU, a block per rule with one element per listen port.
    pub const COUNTERS: &str = "COUNTERS";
    /// Packets per CPU by the `index` of [`crate::datapath::PassReason`], [`crate::datapath::DropReason`] and [`crate::datapath::Event`].
    pub const REASONS: &str = "REASONS";

    /// [`super::Pool`] by [`super::PoolKey`]: ports that stand for clients.
    pub const POOLS: &str = "POOLS";
    /// [`super::Binding`] by [`super::BindingKey`]: which client a port stands for.
    pub const BINDINGS: &str = "BINDINGS";
    /// [`super::PoolTask`], one element, carried out by a test run of [`PROGRAM_POOL`].
    pub const POOL_TASK: &str = "POOL_TASK";

    /// [`super::Usage`] by the rule's number, of rules that have limits.
    pub const RULE_USAGE: &str = "RULE_USAGE";
    /// [`super::Usage`] by [`super::UsageKey`]; the source met longest ago makes room.
    pub const SOURCE_USAGE: &str = "SOURCE_USAGE";
    /// [`super::UsageTask`], one element, carried out by a test run of [`PROGRAM_USAGE`].
    pub const USAGE_TASK: &str = "USAGE_TASK";
    /// [`super::Recount`], one element.
    pub const RECOUNT: &str = "RECOUNT";

    /// When clients may be told of another refusal: a word by slot, of the sense of [`super::Usage::due`].
    pub const ERROR_BUDGET: &str = "ERROR_BUDGET";

    /// [`super::ClockReading`], one element, written by a test run of [`PROGRAM_CLOCK`].
    pub const CLOCK: &str = "CLOCK";

    /// What is known of datagrams in fragments: [`super::fragment::DatagramKey`] → [`super::fragment::Datagram`].
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Fragments that came before the one in front of them: [`super::fragment::HeldKey`] → [`super::fragment::Held`].
    pub const HELD: &str = "HELD";

    /// Programs that XDP hands packets to: [`SLOW_XDP`], by family. Pinned, and made anew with the programs.
    pub const XDP_SLOW: &str = "XDP_SLOW";
    /// Programs that TC hands packets to: [`SLOW_TC`], by family.
    pub const TC_SLOW: &str = "TC_SLOW";
    /// The slow paths behind XDP, in the order of their elements of [`XDP_SLOW`]; behind them the hot path of rules with light tracking.
    pub const SLOW_XDP: [&str; 3] = ["portfwd_xdp4", "portfwd_xdp6", LIGHT_XDP];
    /// The slow paths behind TC, in the order of their elements of [`TC_SLOW`]; behind them those for fragments, the one that
    /// cuts packets into fragments, the one that tells clients of a refusal, and the hot path of rules with light tracking.
    pub const SLOW_TC: [&str; 7] = [
        "portfwd_tc4",
        "portfwd_tc6",
        "portfwd_frag4",
        "portfwd_frag6",
        "portfwd_cut",
        PROGRAM_REFUSE,
        LIGHT_TC,
    ];
    /// The hot path of rules with light tracking, behind XDP.
    pub const LIGHT_XDP: &str = "portfwd_xdp_lt";
    /// The same behind TC.
    pub const LIGHT_TC: &str = "portfwd_tc_lt";

    /// Every map that is pinned and shared by all that is loaded. The others are made anew, or scratch space of one run.
    pub const MAPS: [&str; 30] = [
        CONFIG,
        PRESSURE,
        INTERFACES,
        ADDRESSES,
        PORTS,
        RULES,
        LISTENS,
        TARGETS,
        FLOWS_V4,
        FLOWS_V6,
        FRAGMENTS,
        HELD,
        POOLS,
        BINDINGS,
        POOL_TASK,
        COUNTERS,
        REASONS,
        CLOCK,
        TC_SLOW,
        NEXT_HOPS,
        SOURCES,
        OPENING_V4,
        OPENING_V6,
        RULE_USAGE,
        SOURCE_USAGE,
        USAGE_TASK,
        RECOUNT,
        ERROR_BUDGET,
        RESTS,
        ANSWERS,
    ];

    /// XDP, native and generic.
    pub const PROGRAM_XDP: &str = "portfwd_xdp";
    /// TC ingress of an interface with Ethernet header.
    pub const PROGRAM_TC: &str = "portfwd_tc";
    /// TC ingress of an interface without link header (tun, WireGuard).
    pub const PROGRAM_TC_RAW: &str = "portfwd_tc_raw";
    /// TC ingress behind XDP on the same interface: what XDP left to it.
    pub const PROGRAM_TC_SLOW: &str = "portfwd_tc_slow";
    /// TC egress of a WAN interface with Ethernet header: what the gateway itself sends about or for forwarded flows.
    pub const PROGRAM_TC_OUT: &str = "portfwd_tc_out";
    /// TC egress of a WAN interface without link header.
    pub const PROGRAM_TC_OUT_RAW: &str = "portfwd_out_raw";
    /// Puts an ICMP error in the place of a packet that is refused; reached by tail call.
    pub const PROGRAM_REFUSE: &str = "portfwd_refuse";
    /// Reads both clocks into [`CLOCK`]; never attached.
    pub const PROGRAM_CLOCK: &str = "portfwd_clock";
    /// Carries [`POOL_TASK`] out; never attached.
    pub const PROGRAM_POOL: &str = "portfwd_pool";
    /// Carries [`USAGE_TASK`] out; never attached.
    pub const PROGRAM_USAGE: &str = "portfwd_usage";
}

/// Rules (one per protocol of a rule) that fit into a bank, slot 0 being none.
pub const MAX_RULES: u32 = 32_768;
/// Own addresses of attached interfaces that fit.
pub const MAX_ADDRESSES: u32 = 1_024;
/// Prefixes that fit into a bank of LISTENS and TARGETS: a range of ports takes at most 30. Memory is taken as they come.
pub const MAX_PREFIXES: u32 = 262_144;
/// Prefixes that fit into a bank of RESTS: an exception takes at most 30. Memory is taken as they come.
pub const MAX_RESTS: u32 = 16_384;
/// Answers that are remembered for rules that take what is nobody else's.
pub const MAX_ANSWERS: u32 = 65_536;
/// Pools that fit: two of every address that stands for clients.
pub const MAX_POOLS: u32 = 1_024;
/// Prefixes that fit into SOURCES, those of all rules together. Memory is taken as they come.
pub const MAX_SOURCES: u32 = 1 << 20;
/// Sources whose use of limits is remembered, those of all rules together.
pub const MAX_SOURCE_USAGE: u32 = 65_536;
/// Words of ERROR_BUDGET: clients share them, by a secret.
pub const ERROR_BUDGETS: u32 = 256;
/// Connections by default; every connection takes two entries.
pub const DEFAULT_MAX_FLOWS: u32 = 262_144;
/// Half-open flows by default; every one takes two entries.
pub const DEFAULT_MAX_HALF_OPEN: u32 = 65_536;
/// Fewer make no sense: every CPU keeps some hundred entries at hand.
pub const MIN_MAX_HALF_OPEN: u32 = 1_024;
/// Counted ports by default, the sum over all rules: a full range of both protocols, and as many again.
pub const DEFAULT_MAX_PORTS: u32 = 262_144;
