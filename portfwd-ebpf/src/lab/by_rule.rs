//! A trial: packets to the target of a rule that says all about them, without an entry of their flow. Two arrays, by port and by
//! rule, in the place of the floor's hash table, and the rule's counters: the least that stateless translation costs.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, xdp_action},
    btf_maps::Array,
    helpers::generated::bpf_get_smp_processor_id,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use portfwd_common::{
    abi::{FlowDir, PortCounters, Traffic, counters::element},
    net::Ipv4,
};

use crate::packet::{Deltas, Packet, Way};

/// Of rules; slot 0 is none.
const SLOTS: u32 = 256;

/// A rule with all that its packets need; written by the benchmark.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rule {
    listen: Ipv4,
    target: Ipv4,
    /// In wire order.
    port: u16,
    deltas: Deltas,
    padding: u16,
    way: Way,
}

const _: () = assert!(size_of::<Rule>() == 32);

/// Slots of rules by destination port; written by the benchmark.
#[btf_map]
static LISTEN_PORTS: Array<u32, 65_536> = Array::new();
#[btf_map]
static LISTEN_RULES: Array<Rule, { SLOTS as usize }> = Array::new();
/// A block of [`SLOTS`] for each CPU; the benchmark settles how many.
#[btf_map]
static RULE_COUNTERS: Array<PortCounters, { SLOTS as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// Forwards.
#[xdp]
pub fn lab_by_rule(ctx: XdpContext) -> u32 {
    forward(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn forward(ctx: &XdpContext) -> Option<u32> {
    let (packet, key) = Packet::read(ctx)?;
    let slot = *LISTEN_PORTS.get(u32::from(key.ports.dst()))?;
    let rule = LISTEN_RULES.get(slot)?;
    if rule.listen != key.dst {
        return None;
    }
    let sum = packet.transport_sum(ctx)?;
    // SAFETY: the helper takes nothing.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let counters = RULE_COUNTERS.get_ptr_mut(element(slot, cpu, SLOTS))?;
    let traffic = Traffic {
        packets: 1,
        bytes: u64::from(packet.length()),
    };
    // SAFETY: the element is this CPU's own, because the array of rules has given one out for the slot; and nothing else runs on
    // the CPU meanwhile.
    unsafe { (*counters).direction(FlowDir::Original).add(traffic) };
    Some(packet.send_to(sum, (rule.target, rule.port), rule.deltas, &rule.way))
}
