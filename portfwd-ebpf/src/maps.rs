//! The maps, private behind functions with names of the domain. User space replaces the sizes of FLOWS, OPENING, BINDINGS
//! and COUNTERS before loading. POOLS are in [`crate::pools`], what rules with light tracking ask in [`crate::ways`], what has been used of limits in [`crate::usages`].

use core::{ffi::c_void, ops::Deref};

use aya_ebpf::{
    Global,
    bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_NOEXIST},
    btf_maps::{
        Array, DevMap, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, lpm_trie::Key,
    },
    helpers::generated::{bpf_get_smp_processor_id, bpf_loop},
    macros::btf_map,
};
use portfwd_common::{
    abi::{
        Admission, AnswerKey, Bank, Binding, BindingKey, ClientWay, ClockReading, Config,
        DEFAULT_MAX_FLOWS, DEFAULT_MAX_HALF_OPEN, DEFAULT_MAX_PORTS, EndpointKey, FlowDir,
        FlowEntry, FlowKey, Instant, Interface, MAX_ADDRESSES, MAX_ANSWERS, MAX_PREFIXES,
        MAX_RESTS, MAX_RULES, MAX_SOURCES, NextHop, PoolKey, PortCounters, PortSlot, Pressure,
        Protocol, Recount, Rule, RuleWay, SourceKey, Spender, Traffic, Usage, UsageKey,
        config::{INTERFACE_SLOTS, OwnAddress},
        counters::element,
        fragment::{Datagram, DatagramKey, Held, HeldKey, MAX_DATAGRAMS, MAX_HELD},
        light::Mark,
        next_hop::{Hold, NEXT_HOP_SLOTS},
        rule::{AddressKey, PORT_SLOTS},
    },
    datapath::{
        Event, Flows, Fragments, InsertError, Repeat, Repeated, Repeats, Route, Table, Tables,
        Verdict, Workspace,
        cutting::Cut,
        refusal::Quotation,
        verdict::{Hook, REASON_SLOTS},
    },
    net::{Address, Family, Ipv4, Ipv6},
};

use crate::{
    atomic,
    pools::{self, PoolInMap},
    usages::{self, BudgetInMap, UsageInMap},
    ways,
};

/// Of arrays that user space reads and writes as memory of its own.
const MAPPED: usize = BPF_F_MMAPABLE as usize;
/// What the rule tables hold everything as often as.
const BANKS: usize = Bank::ALL.len();

#[btf_map]
static CONFIG: Array<Config, 1> = Array::new();
#[btf_map]
static PRESSURE: Array<Pressure, 1> = Array::new();
#[btf_map]
static INTERFACES: Array<Interface, { INTERFACE_SLOTS as usize }, MAPPED> = Array::new();
#[btf_map]
static EGRESS: DevMap<{ INTERFACE_SLOTS as usize }> = DevMap::new();
#[btf_map]
static NEXT_HOPS: Array<NextHop, { NEXT_HOP_SLOTS as usize }> = Array::new();
#[btf_map]
static ADDRESSES: HashMap<AddressKey, OwnAddress, { MAX_ADDRESSES as usize }> = HashMap::new();
#[btf_map]
static PORTS: Array<PortSlot, { BANKS * PORT_SLOTS as usize }, MAPPED> = Array::new();
#[btf_map]
static RULES: Array<Rule, { BANKS * MAX_RULES as usize }, MAPPED> = Array::new();
#[btf_map]
static LISTENS: LpmTrie<EndpointKey, u32, { BANKS * MAX_PREFIXES as usize }> = LpmTrie::new();
#[btf_map]
static TARGETS: LpmTrie<EndpointKey, u32, { BANKS * MAX_PREFIXES as usize }> = LpmTrie::new();
#[btf_map]
static RESTS: LpmTrie<EndpointKey, u32, { BANKS * MAX_RESTS as usize }> = LpmTrie::new();
#[btf_map]
static ANSWERS: LruHashMap<AnswerKey, Instant, { MAX_ANSWERS as usize }> = LruHashMap::new();
#[btf_map]
static SOURCES: LpmTrie<SourceKey, u32, { MAX_SOURCES as usize }> = LpmTrie::new();
#[btf_map]
static FLOWS_V4: HashMap<FlowKey<Ipv4>, FlowEntry<Ipv4>, { 2 * DEFAULT_MAX_FLOWS as usize }> =
    HashMap::new();
#[btf_map]
static FLOWS_V6: HashMap<FlowKey<Ipv6>, FlowEntry<Ipv6>, { 2 * DEFAULT_MAX_FLOWS as usize }> =
    HashMap::new();
#[btf_map]
static BINDINGS: HashMap<BindingKey, Binding, { DEFAULT_MAX_FLOWS as usize }> = HashMap::new();
#[btf_map]
static OPENING_V4: LruHashMap<
    FlowKey<Ipv4>,
    FlowEntry<Ipv4>,
    { 2 * DEFAULT_MAX_HALF_OPEN as usize },
> = LruHashMap::new();
#[btf_map]
static OPENING_V6: LruHashMap<
    FlowKey<Ipv6>,
    FlowEntry<Ipv6>,
    { 2 * DEFAULT_MAX_HALF_OPEN as usize },
> = LruHashMap::new();
#[btf_map]
static WORK_V4: PerCpuArray<Workspace<Ipv4>, 1> = PerCpuArray::new();
#[btf_map]
static WORK_V6: PerCpuArray<Workspace<Ipv6>, 1> = PerCpuArray::new();
#[btf_map]
static FRAGMENTS: LruHashMap<DatagramKey, Datagram, { MAX_DATAGRAMS as usize }> = LruHashMap::new();
#[btf_map]
static HELD: LruHashMap<HeldKey, Held, { MAX_HELD as usize }> = LruHashMap::new();
/// A fragment on its way into HELD: it would not fit into the stack.
#[btf_map]
static HOLDING: PerCpuArray<Held, 1> = PerCpuArray::new();
/// What a packet that is cut carries.
#[btf_map]
static CUTTING: PerCpuArray<Cutting, 1> = PerCpuArray::new();
/// What an ICMP error quotes.
#[btf_map]
static QUOTING: PerCpuArray<Quotation, 1> = PerCpuArray::new();
/// A block of [`COUNTED_PORTS`] elements for each CPU. A per-CPU array would be slower to make, by an allocation for every element,
/// and to read, by the pointer that each has.
#[btf_map]
static COUNTERS: Array<PortCounters, { DEFAULT_MAX_PORTS as usize }, MAPPED> = Array::new();
/// Listen ports that are counted; the loader settles how many.
#[unsafe(no_mangle)]
static COUNTED_PORTS: Global<u32> = Global::new(DEFAULT_MAX_PORTS);
#[btf_map]
static REASONS: PerCpuArray<u64, { REASON_SLOTS as usize }> = PerCpuArray::new();
/// The slow paths behind XDP, by [`slow_index`]; then the hot path of rules with light tracking, at [`LIGHT_XDP_INDEX`].
#[btf_map]
pub static XDP_SLOW: ProgramArray<3> = ProgramArray::new();
/// The slow paths behind TC, by [`slow_index`]; then the programs for fragments, by [`fragment_index`]; then [`CUT_INDEX`],
/// [`REFUSE_INDEX`] and [`LIGHT_INDEX`].
#[btf_map]
pub static TC_SLOW: ProgramArray<7> = ProgramArray::new();
#[btf_map]
pub static CLOCK: Array<ClockReading, 1> = Array::new();

/// The connection table.
pub struct FlowMaps;

/// Rules, interfaces, routes and counters, for a hook whose context the route helper needs.
pub struct Maps {
    ctx: *mut c_void,
    /// `None` for the bank that packets look at right now.
    bank: Option<Bank>,
}

/// What inserting with NOEXIST returns if the key is there (-EEXIST). Without room it is -E2BIG.
const ERROR_EXISTS: i32 = -17;

#[inline(always)]
const fn insert_error(error: i32) -> InsertError {
    match error {
        ERROR_EXISTS => InsertError::Exists,
        _ => InsertError::Full,
    }
}

macro_rules! impl_flows {
    ($($address:ty => $map:ident, $opening:ident, $workspace:ident;)+) => {$(
        impl Flows<$address> for FlowMaps {
            #[inline(always)]
            fn flow(&mut self, table: Table, key: &FlowKey<$address>) -> Option<&mut FlowEntry<$address>> {
                let entry = match table {
                    Table::Flows => $map.get_ptr_mut(key),
                    Table::Opening => $opening.get_ptr_mut(key),
                };
                // SAFETY: elements of a preallocated map stay in place for the run of a program. Another CPU may write to the
                // same entry or reuse it; every field is a plain integer for which any value is valid, and an entry that
                // is reused under us sends one packet of a flow that has just ended to its old place.
                entry.map(|entry| unsafe { &mut *entry })
            }

            #[inline(always)]
            fn insert(&mut self, table: Table, key: &FlowKey<$address>, entry: &FlowEntry<$address>) -> Result<(), InsertError> {
                let flags = u64::from(BPF_NOEXIST);
                match table {
                    Table::Flows => $map.insert(key, entry, flags),
                    Table::Opening => $opening.insert(key, entry, flags),
                }
                .map_err(insert_error)
            }

            #[inline(always)]
            fn remove(&mut self, table: Table, key: &FlowKey<$address>) {
                // Not there is as good as removed.
                let _ = match table {
                    Table::Flows => $map.remove(key),
                    Table::Opening => $opening.remove(key),
                };
            }
        }

        impl SlowPath for $address {
            #[inline(always)]
            fn workspace() -> Option<&'static mut Workspace<Self>> {
                // SAFETY: the element is this CPU's own; a run of a slow-path program asks for it once, and nothing else
                // runs on the CPU meanwhile.
                $workspace.get_ptr_mut(0).map(|workspace| unsafe { &mut *workspace })
            }
        }
    )+};
}

/// What the slow path of a family needs besides the tables.
pub trait SlowPath: Address {
    /// This CPU's workspace.
    fn workspace() -> Option<&'static mut Workspace<Self>>;
}

/// Elements of XDP_SLOW and TC_SLOW.
#[inline(always)]
pub const fn slow_index(family: Family) -> u32 {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

/// The element of TC_SLOW with the program for fragments.
#[inline(always)]
pub const fn fragment_index(family: Family) -> u32 {
    2 + slow_index(family)
}

/// The element of TC_SLOW with the program that cuts packets into fragments.
pub const CUT_INDEX: u32 = 4;

/// The element of TC_SLOW with the program that tells clients of a refusal.
pub const REFUSE_INDEX: u32 = 5;

/// The element of TC_SLOW with the hot path of rules with light tracking.
pub const LIGHT_INDEX: u32 = 6;

/// The element of XDP_SLOW with the same.
pub const LIGHT_XDP_INDEX: u32 = 2;

/// Bytes of CUTTING: an offset and a length that are masked lie in it.
pub const CUT_ROOM: usize = 0x3fff + 0x1fff;

impl Fragments for FlowMaps {
    #[inline(always)]
    fn datagram(&mut self, key: &DatagramKey) -> Option<&mut Datagram> {
        // SAFETY: elements of an LRU map stay in memory for the run of a program. Another CPU may write to the same element or
        // reuse it; every field is a plain integer for which any value is valid.
        FRAGMENTS
            .get_ptr_mut(key)
            .map(|datagram| unsafe { &mut *datagram })
    }

    #[inline(always)]
    fn remember(&mut self, key: &DatagramKey, datagram: &Datagram) {
        // If it fails, the fragments that follow are held and then forgotten.
        let _ = FRAGMENTS.insert(key, datagram, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn forget(&mut self, key: &DatagramKey) {
        // Not there is as good as removed.
        let _ = FRAGMENTS.remove(key);
    }

    #[inline(always)]
    fn held_since(&self, key: &HeldKey) -> Option<Instant> {
        // SAFETY: as above.
        HELD.get_ptr(key).map(|held| unsafe { (*held).since })
    }
}

/// A fragment that is held; it may be reused for another under the reader's eyes if the table is full.
#[inline(always)]
pub fn held(key: &HeldKey) -> Option<*const Held> {
    HELD.get_ptr(key)
}

/// This CPU's memory for a fragment on its way into HELD.
#[inline(always)]
pub fn holding() -> Option<*mut Held> {
    HOLDING.get_ptr_mut(0)
}

/// Keeps a fragment.
#[inline(always)]
pub fn hold(key: &HeldKey, fragment: &Held) -> Result<(), i32> {
    HELD.insert(key, fragment, u64::from(BPF_ANY))
}

/// Takes a fragment out; only one CPU succeeds.
#[inline(always)]
pub fn release(key: &HeldKey) -> Result<(), i32> {
    HELD.remove(key)
}

/// A packet that is being cut.
#[repr(C)]
pub struct Cutting {
    /// How.
    pub cut: Cut,
    /// What it carries.
    pub bytes: [u8; CUT_ROOM],
}

/// This CPU's memory for a packet that is being cut.
#[inline(always)]
pub fn cutting() -> Option<*mut Cutting> {
    CUTTING.get_ptr_mut(0)
}

/// This CPU's memory for what an ICMP error quotes.
#[inline(always)]
pub fn quoting() -> Option<*mut Quotation> {
    QUOTING.get_ptr_mut(0)
}

impl_flows!(Ipv4 => FLOWS_V4, OPENING_V4, WORK_V4; Ipv6 => FLOWS_V6, OPENING_V6, WORK_V6;);

/// What `bpf_loop` calls: 0 to go on, 1 to end. The kernel takes only static functions here.
extern "C" fn once<R: Repeated>(_index: u64, work: *mut c_void) -> i64 {
    // SAFETY: the pointer that `repeat` hands to the helper, which hands it on.
    match unsafe { (*work.cast::<R>()).step() } {
        Repeat::GoOn => 0,
        Repeat::Enough => 1,
    }
}

impl Maps {
    /// For a packet of which every lookup may be in the bank that packets look at right then: it makes one, or goes on by others if
    /// two do not fit together.
    #[inline(always)]
    pub const fn new(ctx: *mut c_void) -> Self {
        Self { ctx, bank: None }
    }

    /// For a packet that keeps to a bank.
    #[inline(always)]
    pub const fn in_bank(ctx: *mut c_void, bank: Bank) -> Self {
        Self {
            ctx,
            bank: Some(bank),
        }
    }

    #[inline(always)]
    fn bank(&self) -> Bank {
        self.bank.unwrap_or_else(bank)
    }

    /// The key of an endpoint in the tries of rules.
    #[inline(always)]
    fn endpoint(&self, endpoint: &EndpointKey) -> Key<EndpointKey> {
        Key::new(EndpointKey::BITS, endpoint.in_bank(self.bank()))
    }
}

/// The bank of the rule tables that packets look at now.
#[inline(always)]
pub fn bank() -> Bank {
    CONFIG.get(0).map_or(Bank::A, Config::bank)
}

impl Repeats for Maps {
    #[inline(always)]
    fn repeat<R: Repeated>(&self, times: u32, work: &mut R) {
        let callback = once::<R> as *mut c_void;
        // SAFETY: the function has the signature that the helper calls, with the pointer that it is given here.
        let _steps = unsafe { bpf_loop(times, callback, (&raw mut *work).cast(), 0) };
    }
}

impl Tables for Maps {
    type Pool<'a> = PoolInMap;
    type Usage<'a> = UsageInMap;
    type ErrorBudget<'a> = BudgetInMap;

    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0).filter(|config| config.ticks_per_second != 0)
    }

    #[inline(always)]
    fn interface(&self, slot: u16) -> Option<&Interface> {
        INTERFACES.get(u32::from(slot))
    }

    #[inline(always)]
    fn next_hop(&self, slot: u16) -> Option<impl Deref<Target = NextHop>> {
        NEXT_HOPS.get(u32::from(slot))
    }

    #[inline(always)]
    fn hold_next_hop(&self, slot: u16, from: Hold, to: Hold) -> bool {
        match NEXT_HOPS.get_ptr_mut(u32::from(slot)) {
            // SAFETY: the map gave out the element, whose first word this is.
            Some(hop) => unsafe { exchange(&raw mut (*hop).hold, from, to) },
            None => false,
        }
    }

    #[inline(always)]
    fn write_next_hop(&self, slot: u16, hop: &NextHop) {
        if let Some(there) = NEXT_HOPS.get_ptr_mut(u32::from(slot)) {
            // SAFETY: the map gave out the element, and the caller holds it: nobody else writes to it.
            unsafe {
                *there = NextHop {
                    hold: Hold::WRITING,
                    ..*hop
                };
                // A full barrier: whoever sees the new word sees the rest, too.
                exchange(&raw mut (*there).hold, Hold::WRITING, hop.hold);
            }
        }
    }

    #[inline(always)]
    fn rule_way(&self, slot: u16) -> RuleWay {
        ways::rule_way(slot)
    }

    #[inline(always)]
    fn set_rule_way(&self, slot: u16, way: RuleWay) {
        ways::set_rule_way(slot, way);
    }

    #[inline(always)]
    fn client_way(&self, slot: u16) -> Option<impl Deref<Target = ClientWay>> {
        ways::client_way(slot)
    }

    #[inline(always)]
    fn set_client_way(&self, slot: u16, way: &ClientWay) {
        ways::set_client_way(slot, way);
    }

    #[inline(always)]
    fn cpu(&self) -> u32 {
        // SAFETY: the helper takes nothing.
        unsafe { bpf_get_smp_processor_id() }
    }

    #[inline(always)]
    fn turn(&self, class: u16) -> Mark {
        ways::turn(class)
    }

    #[inline(always)]
    fn set_turn(&self, class: u16, mark: Mark) {
        ways::set_turn(class, mark);
    }

    #[inline(always)]
    fn turns_spent(&self) -> u64 {
        ways::turns_spent()
    }

    #[inline(always)]
    fn spend_turns(&self, spent: u64) {
        ways::spend_turns(spent);
    }

    #[inline(always)]
    fn port(&self, index: u32) -> PortSlot {
        let index = self.bank().port(index);
        PORTS.get(index).copied().unwrap_or(PortSlot::EMPTY)
    }

    #[inline(always)]
    fn listen(&self, endpoint: &EndpointKey) -> u16 {
        LISTENS
            .get(&self.endpoint(endpoint))
            .map_or(0, |slot| *slot as u16)
    }

    #[inline(always)]
    fn target(&self, endpoint: &EndpointKey) -> Option<u16> {
        TARGETS
            .get(&self.endpoint(endpoint))
            .map(|slot| *slot as u16)
    }

    #[inline(always)]
    fn rest(&self, endpoint: &EndpointKey) -> Option<u16> {
        RESTS.get(&self.endpoint(endpoint)).map(|slot| *slot as u16)
    }

    #[inline(always)]
    fn answered(&self, key: &AnswerKey) -> Option<Instant> {
        // SAFETY: as for flows: elements of an LRU map stay in memory for the run of a program, and any bits are valid.
        ANSWERS.get_ptr(key).map(|at| unsafe { *at })
    }

    #[inline(always)]
    fn await_answer(&self, key: &AnswerKey, now: Instant) {
        // If it fails, the next packet that leaves is remembered.
        let _ = ANSWERS.insert(key, now, u64::from(BPF_ANY));
    }

    #[inline(always)]
    fn has_socket<A: Address>(&self, key: &FlowKey<A>, protocol: Protocol) -> bool {
        crate::sockets::has_socket(self.ctx, key, protocol)
    }

    #[inline(always)]
    fn rule(&self, slot: u16) -> Option<&Rule> {
        RULES.get(self.bank().rule(slot)?)
    }

    #[inline(always)]
    fn admission(&self, source: &SourceKey) -> Admission {
        SOURCES
            .get(&Key::new(SourceKey::BITS, *source))
            .map_or(Admission::Denied, |word| Admission::from_word(*word))
    }

    #[inline(always)]
    fn is_own<A: Address>(&self, address: A) -> bool {
        // SAFETY: a plain value, for which any bits are valid; only the daemon writes it.
        ADDRESSES
            .get_ptr(AddressKey::new(address))
            .is_some_and(|own| unsafe { (*own).is_wan } != 0)
    }

    #[inline(always)]
    fn is_local<A: Address>(&self, address: A) -> bool {
        ADDRESSES.get_ptr(AddressKey::new(address)).is_some()
    }

    #[inline(always)]
    fn pool(&self, key: &PoolKey) -> Option<PoolInMap> {
        pools::pool(key)
    }

    #[inline(always)]
    fn bound(&self, key: &BindingKey, now: Instant) -> Option<u16> {
        let binding = BINDINGS.get_ptr_mut(key)?;
        // SAFETY: as for flows: elements of a preallocated map stay in place, and any bits are valid.
        unsafe {
            (*binding).used = now;
            Some((*binding).port)
        }
    }

    #[inline(always)]
    fn bind(&self, key: &BindingKey, binding: &Binding) -> Result<(), InsertError> {
        BINDINGS
            .insert(key, binding, u64::from(BPF_NOEXIST))
            .map_err(insert_error)
    }

    #[inline(always)]
    fn usage(&self, spender: Spender, key: &UsageKey) -> Option<UsageInMap> {
        usages::usage(spender, key)
    }

    #[inline(always)]
    fn begin_usage(&self, spender: Spender, key: &UsageKey, usage: &Usage) {
        usages::begin(spender, key, usage);
    }

    #[inline(always)]
    fn recount(&self) -> Recount {
        usages::recount()
    }

    #[inline(always)]
    fn error_budget(&self, slot: u32) -> Option<BudgetInMap> {
        usages::error_budget(slot)
    }

    #[inline(always)]
    fn route<A: Address>(&self, translated: &FlowKey<A>, ingress: u32) -> Route {
        crate::fib::route(self.ctx, translated, ingress)
    }

    #[inline(always)]
    fn count(&self, counter: u32, direction: FlowDir, traffic: Traffic) {
        // SAFETY: the helper takes nothing.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        if let Some(counters) = COUNTERS.get_ptr_mut(element(counter, cpu, COUNTED_PORTS.load())) {
            // SAFETY: the element is this CPU's own, because a rule's counters are less than COUNTED_PORTS; and nothing else runs
            // on it meanwhile.
            unsafe { (*counters).direction(direction).add(traffic) };
        }
    }

    #[inline(always)]
    fn note(&self, event: Event) {
        count_reason(event.index());
    }

    #[inline(always)]
    fn pressure(&self) -> Pressure {
        PRESSURE.get(0).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn under_pressure(&self, now: Instant) {
        if let Some(pressure) = PRESSURE.get_ptr_mut(0) {
            // SAFETY: the map gave out the element; CPUs that race write the same.
            unsafe {
                *pressure = Pressure {
                    full_at: now,
                    was_full: 1,
                }
            };
        }
    }
}

/// Compare-and-exchange; whether the word was `from`.
///
/// # Safety
/// `word` must be in a map's element.
#[inline(always)]
unsafe fn exchange(word: *mut Hold, from: Hold, to: Hold) -> bool {
    // SAFETY: the caller's.
    unsafe { atomic::exchange(word.cast(), from.0, to.0) == from.0 }
}

/// Counts a verdict by its reason.
#[inline(always)]
pub fn count_verdict(hook: Hook, verdict: &Verdict) {
    match verdict {
        Verdict::Pass(reason) => {
            if hook.counts(*reason) {
                count_reason(reason.index());
            }
        }
        Verdict::Drop(reason) | Verdict::Refuse(reason) => count_reason(reason.index()),
        Verdict::Forward(_) => {}
    }
}

/// Counts a reason or an event.
#[inline(always)]
pub fn count_reason(index: u32) {
    if let Some(count) = REASONS.get_ptr_mut(index) {
        // SAFETY: the element is this CPU's own, and nothing else runs on it meanwhile.
        unsafe { *count = (*count).wrapping_add(1) };
    }
}

/// Redirects an XDP frame to an attached interface.
#[inline(always)]
pub fn redirect(slot: u16) -> u32 {
    use aya_ebpf::bindings::xdp_action::XDP_DROP;
    // The frame is translated: should the interface have gone meanwhile, it cannot be passed any more.
    match EGRESS.redirect(u32::from(slot), u64::from(XDP_DROP)) {
        Ok(action) | Err(action) => action,
    }
}
