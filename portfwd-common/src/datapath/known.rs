//! Entries that exist: are they still good, and what has to be looked at again.
//!
//! A *fresh* entry was validated within the last second ([`crate::abi::Config::validity`]) under the present generation: its
//! flow was alive then, and every timeout is longer than a second, so one comparison covers lifetime, rule and route. While the
//! daemon vouches that it hears of every change ([`crate::abi::Config::is_leased`]), a validation is good for longer. Any other
//! entry is validated: partner, lifetime, rule, route.

use super::{
    Moment,
    conntrack::{Half, Pair, Term},
    late,
    nat::{listening, still_holds},
    tables::{Flows, Table, Tables},
    tcp::{self, Side, TcpFlags, TcpState},
    workspace::{self, Kind, Workspace},
};
use crate::{
    abi::{Bank, Config, FlowDir, FlowEntry, FlowKey, Instant, Protocol, Rule, Stamp, Ticks},
    net::Address,
};

/// What validation found.
#[derive(Clone, Copy, Debug)]
pub enum Standing {
    /// No entry, or one that was dead and is gone now.
    Gone,
    /// Alive; its direction and the translated key are in the workspace.
    Alive,
}

/// What validation has found of a live flow, and what its packet makes of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Track {
    /// Where the flow has its entries.
    pub table: Table,
    /// Slot of its rule.
    pub rule: u16,
    /// Its element of COUNTERS.
    pub counter: u32,
    /// When it began.
    pub created: Instant,
    /// When the other side was last heard of.
    pub receiver_seen: Instant,
    /// TCP: what the sender of the packet has shown.
    pub sender: Side,
    /// The same of the other side.
    pub receiver: Side,
    /// The state before the packet.
    pub state: TcpState,
    /// What the packet does.
    pub action: tcp::Action,
    /// Whether the flow was open, and validation has ended it.
    pub is_lost: bool,
    /// How long the flow lives if nothing more comes of it.
    pub term: Term,
    /// Whether its entries are records, whose numbers may be old.
    pub is_record: bool,
    /// Whether the packet is of a flow that has ended with its rule, from its target.
    pub is_late: bool,
}

/// Whether a SYN that begins a new connection may take the place of an ended one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The packet is a SYN.
    Syn,
    /// It is anything else.
    No,
}

impl Opening {
    /// Only a SYN alone opens: with ACK it answers, with RST or FIN it is nobody's.
    #[inline(always)]
    pub const fn of(flags: TcpFlags) -> Self {
        const CONTROL: u8 = TcpFlags::SYN | TcpFlags::ACK | TcpFlags::RST | TcpFlags::FIN;
        if flags.0 & CONTROL == TcpFlags::SYN {
            Self::Syn
        } else {
            Self::No
        }
    }
}

/// Whether the entry may be used as it is: it is fresh, or the daemon vouches for it.
#[inline(always)]
pub fn is_good<A: Address>(entry: &FlowEntry<A>, config: &Config, now: Instant) -> bool {
    let validity = if config.is_leased(now) {
        config.leased_validity
    } else {
        config.validity
    };
    entry.generation == config.generation() && is_within(entry, validity, now)
}

/// Whether a good entry is fresh, also without a daemon that vouches for it.
#[inline(always)]
pub fn is_fresh<A: Address>(entry: &FlowEntry<A>, config: &Config, now: Instant) -> bool {
    is_within(entry, config.validity, now)
}

/// Whether an entry's validation is younger than `validity`. An entry was validated by its last packet, or less than a validity
/// before it: so the validation lies at most twice the longest validity back, and 16 bits tell that from every other time.
#[inline(always)]
fn is_within<A: Address>(entry: &FlowEntry<A>, validity: Ticks, now: Instant) -> bool {
    entry.validated.until(now) < validity && now.since(entry.last_seen) < validity
}

/// The table that has a key's entry, if any has.
#[inline(always)]
pub(super) fn home<A: Address, F: Flows<A>>(flows: &mut F, key: &FlowKey<A>) -> Table {
    match flows.flow(Table::Flows, key) {
        Some(_) => Table::Flows,
        None => Table::Opening,
    }
}

/// Looks at everything that the entry of the workspace's key depends on, but its route. If it is not good any more, both halves
/// are removed; of a flow that has ended with its rule the reply half stays, as a late one.
#[inline(always)]
pub fn validate<A, F, T>(work: &mut Workspace<A>, flows: &mut F, moment: &Moment<'_, T>) -> Standing
where
    A: Address,
    F: Flows<A>,
    T: Tables,
{
    work.track.is_lost = false;
    work.track.is_late = false;
    work.track.is_record = false;
    work.light = 0;
    let table = home(flows, &work.key);
    work.track.table = table;
    let Some(entry) = flows.flow(table, &work.key) else {
        return Standing::Gone;
    };
    if entry.is_late() {
        late::meet(work, flows, moment.now);
        return Standing::Gone;
    }
    work.partner
        .reverse_of_rewrite(&entry.rewrite, work.key.protocol);
    work.to.reverse_of(&work.partner);
    // For an error about the flow; its packets take theirs from the entry.
    work.entry.rewrite = entry.rewrite;
    let half = Half::from(&*entry);
    let (rule, counter, peer) = (entry.rule, entry.counter, entry.peer());
    (work.mapping.rule, work.mapping.counter) = (rule, counter);
    (work.track.rule, work.track.counter) = (rule, counter);
    work.track.created = half.created;
    work.direction = half.direction;
    work.track.term = half.term(work.subject.protocol, moment.config);
    let life = match flows.flow(table, &work.partner) {
        Some(other) => {
            let other = Half::from(&*other);
            work.track.receiver_seen = other.last_seen;
            work.track.sender = half.side;
            work.track.receiver = other.side;
            lives(half, other, work, moment)
        }
        None => Life::Halved,
    };
    let holds = life != Life::Over && {
        // The original key has the listen endpoint as destination, the reply key the target as source.
        let (original, reply) = match half.direction {
            FlowDir::Original => (&work.key, &work.partner),
            FlowDir::Reply => (&work.partner, &work.key),
        };
        still_holds(rule, counter, original, reply, peer, moment.tables)
            && !is_taken_over(rule, original, work.subject.protocol, moment)
    };
    match life {
        Life::Alive if holds => {
            work.peer = peer;
            if let Some(held) = moment.tables.rule(rule) {
                work.track.is_record = held.is_light();
                work.light = light_slot(held, rule);
            }
            return Standing::Alive;
        }
        Life::Alive => late::end(work, peer, flows),
        Life::Over => {
            flows.remove(table, &work.key);
            flows.remove(table, &work.partner);
        }
        // Somebody else has taken the other half out, and the rule is why.
        Life::Halved if !holds => {
            late::end(work, peer, flows);
            return Standing::Gone;
        }
        Life::Halved => {
            flows.remove(table, &work.key);
            return Standing::Gone;
        }
    }
    work.track.is_lost = work.track.state.is_open();
    Standing::Gone
}

/// Whether another rule, which carries by itself, listens where a rule's flow was dialled: its packets do not look at the entry, so the
/// flow is that rule's.
#[inline(always)]
fn is_taken_over<A: Address, T: Tables>(
    rule: u16,
    original: &FlowKey<A>,
    protocol: Protocol,
    moment: &Moment<'_, T>,
) -> bool {
    if !moment.config.has_lights() {
        return false;
    }
    let slot = listening(original, protocol, moment.tables);
    slot != rule
        && moment
            .tables
            .rule(slot)
            .is_some_and(Rule::carries_by_itself)
}

/// The slot of a rule that carries by itself; 0 for any other.
#[inline(always)]
pub(super) const fn light_slot(rule: &Rule, slot: u16) -> u16 {
    if rule.carries_by_itself() { slot } else { 0 }
}

/// Stores a way out in an entry, as fresh as can be; an entry whose way out is not known or has no number stays stale, and so does
/// one whose packet has looked at a `bank` of the rule tables that packets no longer look at.
#[inline(always)]
pub fn remember<A: Address>(
    entry: &mut FlowEntry<A>,
    way: Option<u16>,
    bank: Bank,
    config: &Config,
    now: Instant,
) {
    // One read: both change at one instant.
    let epoch = config.epoch;
    match way.filter(|_| epoch.bank() == bank) {
        Some(slot) => {
            entry.next_hop = slot;
            entry.validated = Stamp::of(now);
            entry.generation = epoch.generation();
        }
        None => entry.generation = stale(config),
    }
}

/// A generation that is not the present one.
#[inline(always)]
pub const fn stale(config: &Config) -> u16 {
    config.generation().wrapping_sub(1)
}

/// What two halves say of their flow. Without fields: an `Option` of both halves that is asked twice has LLVM carry values that
/// were never written from one question to the other ("R2 !read_ok", kernel 6.18, LLVM 22).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// It goes on.
    Alive,
    /// It has ended: expired, or closed and opened anew.
    Over,
    /// The other half is not there, or of another life.
    Halved,
}

/// What two halves of one flow say of its life. Leaves the state in the workspace.
#[inline(always)]
fn lives<A: Address, T>(
    half: Half,
    other: Half,
    work: &mut Workspace<A>,
    moment: &Moment<'_, T>,
) -> Life {
    let Some(pair) = Pair::of(half, other) else {
        return Life::Halved;
    };
    work.track.state = pair.tcp_state();
    work.track.term = pair.term(work.subject.protocol, moment.config);
    if work.track.term.is_over(moment.now) {
        Life::Over
    } else {
        Life::Alive
    }
}

/// What a TCP segment, or an error about one, makes of its connection, which validation has found alive. If that is over, both
/// halves are removed.
#[inline(always)]
pub fn judge<A, F>(work: &mut Workspace<A>, flows: &mut F) -> Judged
where
    A: Address,
    F: Flows<A>,
{
    let Track {
        mut sender,
        mut receiver,
        state,
        ..
    } = work.track;
    match (work.subject.protocol, work.subject.kind) {
        (Protocol::Udp | Protocol::Echo, _) => {
            work.track.action = tcp::Action::Follow;
            Judged::GoesOn
        }
        // The gateway's own errors are about what it has just been given. Others are about a segment of the other side.
        (Protocol::Tcp, Kind::Error) => {
            if work.subject.side == workspace::Side::Out
                || work.track.is_record
                || tcp::is_on_its_way(&receiver, &sender, work.numbers.sequence)
            {
                Judged::GoesOn
            } else {
                Judged::Forged
            }
        }
        (Protocol::Tcp, Kind::Segment | Kind::Malformed) => {
            let kind = work.subject.flags.kind();
            if work.track.is_record {
                tcp::believe(&mut sender, &mut receiver, state, kind, &work.numbers);
            }
            let action = tcp::judge(
                &mut sender,
                &mut receiver,
                work.direction,
                state,
                kind,
                &work.numbers,
            );
            work.track.sender = sender;
            work.track.receiver = receiver;
            work.track.action = action;
            match action {
                tcp::Action::Follow | tcp::Action::Unmoved | tcp::Action::Restart => Judged::GoesOn,
                tcp::Action::Refuse => Judged::Forged,
                tcp::Action::Begin => {
                    flows.remove(work.track.table, &work.key);
                    flows.remove(work.track.table, &work.partner);
                    Judged::Over
                }
            }
        }
    }
}

/// What [`judge`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    /// The flow goes on, and the packet is carried.
    GoesOn,
    /// The connection is over, and the segment begins another.
    Over,
    /// Nothing that the other side would look at.
    Forged,
}

/// What becomes of the flow that an entry of a table is one half of, given the key of the other.
#[inline(always)]
pub(super) fn life<A, F, T>(
    half: Half,
    table: Table,
    partner: &FlowKey<A>,
    protocol: Protocol,
    opening: Opening,
    flows: &mut F,
    moment: &Moment<'_, T>,
) -> Life
where
    A: Address,
    F: Flows<A>,
{
    let Some(other) = flows.flow(table, partner) else {
        return Life::Halved;
    };
    let Some(pair) = Pair::of(half, Half::from(&*other)) else {
        return Life::Halved;
    };
    let reopened = match (protocol, opening) {
        (Protocol::Tcp, Opening::Syn) => pair.tcp_state().is_over(),
        (Protocol::Tcp, Opening::No)
        | (Protocol::Udp | Protocol::Echo, Opening::Syn | Opening::No) => false,
    };
    if reopened || pair.is_expired(protocol, moment.config, moment.now) {
        Life::Over
    } else {
        Life::Alive
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{abi::Epoch, net::Ipv4};

    /// Seen by reading: a packet that was under way while rules changed left an entry behind that was good under the new rules.
    #[test]
    fn what_a_packet_of_the_other_bank_leaves_behind_is_looked_at_again() {
        let config = Config {
            epoch: Epoch::new(7, Bank::B),
            validity: Ticks(250),
            ..Config::default()
        };
        let now = Instant::from_ticks(1_000);
        for (bank, is_fresh) in [(Bank::B, true), (Bank::A, false)] {
            let mut entry = FlowEntry::<Ipv4> {
                last_seen: now,
                ..FlowEntry::default()
            };
            remember(&mut entry, Some(3), bank, &config, now);
            assert_eq!(is_good(&entry, &config, now), is_fresh, "{bank:?}");
        }
    }
}
