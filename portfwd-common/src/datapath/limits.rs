//! Whether a rule takes another flow: how many it has, and how many have begun in a time; of each source, and of all together.
//!
//! Flows that are there are never asked. A rate is kept by the generic cell rate algorithm (ITU-T I.371, a token bucket in one
//! word): the word says when everything that the rate allows will be there again. It is changed by compare-and-exchange, so no
//! CPU's flow is lost; the only error is that of the clock, which tells no less than a tick. So in no time of T seconds more
//! flows begin than the burst and `rate * (T + one tick)`.
//!
//! The number of flows is the difference of two words that are only added to. A flow takes its place before its entries are
//! made, so never more begin than are allowed, whatever the number of CPUs. A TCP connection gives its place back with the
//! packet that closes it, any flow with a packet that finds it expired or without its rule. One that ends in silence, or makes
//! room for others, does so with the next recount (the daemon counts what the tables have, and corrects the words).

use super::{
    Moment,
    proof::state_after,
    tables::Tables,
    tcp::Action,
    verdict::{DropReason, Verdict},
    workspace::{Kind, Workspace},
};
use crate::{
    abi::{
        Config, FlowDir, Instant, Limits, Protocol, Rate, Recount, Spender, Usage, UsageKey,
        limit::flows,
    },
    net::Address,
};

/// The word of a rate, which changes at once.
pub trait RateWord {
    /// When everything that the rate allows is there again, as in [`Usage::due`].
    fn due(&self) -> u64;
    /// Changes that if it is still `from`; what it is instead is the error.
    fn set_due(&self, from: u64, to: u64) -> Result<(), u64>;
}

/// The words of a [`Usage`], each changed at once; the rate's is [`Usage::due`].
pub trait UsageWords: RateWord {
    /// [`Usage::begun`].
    fn begun(&self) -> u64;
    /// [`Usage::ended`].
    fn ended(&self) -> u64;
    /// Adds to [`Usage::begun`], modulo 2^64; what was there before.
    fn add_begun(&self, flows: u64) -> u64;
    /// Adds to [`Usage::ended`].
    fn add_ended(&self, flows: u64);
    /// Adds to [`Usage::refused`].
    fn add_refused(&self, packets: u64);
}

/// What the packet at hand has taken of its rule's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// A flow of its source's.
    of_source: bool,
    /// A flow of the rule's.
    of_rule: bool,
    /// A flow of its source's rate.
    of_source_rate: bool,
    /// A flow of the rule's rate.
    of_rule_rate: bool,
    /// The packet is left to another hook, which asks the limits again.
    is_handed_on: bool,
    /// It was refused.
    is_refused: bool,
}

impl Claim {
    /// Whether there is anything to give back.
    #[inline(always)]
    pub const fn is_any(&self) -> bool {
        self.of_source || self.of_rule || self.is_refused || self.is_handed_on
    }

    /// Another hook asks the limits again: nothing may be taken twice.
    #[inline(always)]
    pub const fn hand_on(&mut self) {
        self.is_handed_on = true;
    }
}

/// A rate by the datapath's clock: lengths of time in fractions of a tick, 2^32 of which are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between two flows, rounded up.
    interval: u64,
    /// Until a whole burst is there again.
    depth: u64,
}

/// By how many ticks another CPU's clock may be ahead of this one's; in truth, it is one.
const AHEAD: u64 = 4_096;
/// How often a CPU tries to be the one that takes a flow of a rate. Only flows that the rate allows change the word, so whoever
/// fails so often is one of many at the same moment, and is refused.
const ATTEMPTS: u32 = 4;

impl Pace {
    /// `None` if there is no limit.
    #[inline(always)]
    pub const fn of(rate: &Rate, ticks_per_second: u32) -> Option<Self> {
        let flows = rate.flows as u64;
        if flows == 0 {
            return None;
        }
        // At most 3,600 seconds of 1,000 ticks: 54 bits.
        let time = (rate.seconds as u64).wrapping_mul(ticks_per_second as u64) << 32;
        let interval = time.wrapping_add(flows - 1) / flows;
        Some(Self {
            interval,
            // At most ten days: 62 bits.
            depth: interval.wrapping_mul(rate.burst as u64),
        })
    }

    /// [`Usage::due`] after a flow that begins now; `None` if it is too early for it.
    #[inline(always)]
    pub const fn next(&self, due: u64, now: Instant) -> Option<u64> {
        let now = (now.ticks() as u64) << 32;
        let ahead = due.wrapping_sub(now);
        // What lies behind, or further ahead than this rate leads, says that nothing is used: the word is old, or another
        // rate's. (Unused for 2^32 ticks, 49 days at 1,000 a second, it lies ahead again for as long as a burst takes.)
        let ahead = if ahead > self.depth.wrapping_add(AHEAD << 32) {
            0
        } else {
            ahead
        };
        let after = ahead.wrapping_add(self.interval);
        if after > self.depth {
            None
        } else {
            Some(now.wrapping_add(after))
        }
    }

    /// Undoes what [`Pace::next`] has done for a flow that is asked for again.
    #[inline(always)]
    fn give_back<W: RateWord>(&self, word: &W) {
        let mut due = word.due();
        for _ in 0..ATTEMPTS {
            match word.set_due(due, due.wrapping_sub(self.interval)) {
                Ok(()) => return,
                Err(found) => due = found,
            }
        }
    }
}

/// Takes a flow of the source's limits.
#[inline(always)]
pub fn claim_of_source<A, T>(work: &mut Workspace<A>, moment: &Moment<'_, T>) -> Result<(), Verdict>
where
    A: Address,
    T: Tables,
{
    work.claim = Claim::default();
    let Some(rule) = moment.tables.rule(work.mapping.rule) else {
        return Ok(());
    };
    let limits = &rule.limits;
    if !limits.bind_sources() {
        return Ok(());
    }
    let key = UsageKey::new(rule.id, work.key.src, limits.source_bits);
    let Some(usage) = usage_of(Spender::Source, &key, moment) else {
        return Ok(());
    };
    if !takes_flow(&usage, limits.source_flows, moment) {
        work.claim.is_refused = true;
        return Err(Verdict::Drop(DropReason::SourceFlows));
    }
    work.claim.of_source = limits.source_flows != 0;
    if !keeps_pace(&usage, &limits.source_rate, moment.config, moment.now) {
        work.claim.is_refused = true;
        return Err(Verdict::Drop(DropReason::SourceRate));
    }
    work.claim.of_source_rate = true;
    Ok(())
}

/// Takes a flow of the limits for all sources.
#[inline(always)]
pub fn claim_of_rule<A, T>(work: &mut Workspace<A>, moment: &Moment<'_, T>) -> Result<(), Verdict>
where
    A: Address,
    T: Tables,
{
    let Some(rule) = moment.tables.rule(work.mapping.rule) else {
        return Ok(());
    };
    let limits = &rule.limits;
    if !limits.bind_rule() {
        return Ok(());
    }
    let key = UsageKey::new(rule.id, work.key.src, 0);
    let Some(usage) = usage_of(Spender::Rule, &key, moment) else {
        return Ok(());
    };
    if !takes_flow(&usage, limits.flows, moment) {
        work.claim.is_refused = true;
        return Err(Verdict::Drop(DropReason::RuleFlows));
    }
    work.claim.of_rule = limits.flows != 0;
    if !keeps_pace(&usage, &limits.rate, moment.config, moment.now) {
        work.claim.is_refused = true;
        return Err(Verdict::Drop(DropReason::RuleRate));
    }
    work.claim.of_rule_rate = true;
    Ok(())
}

/// Gives back what was taken for a flow that does not begin. What it took of a rate is spent, unless another hook takes it again.
#[inline(always)]
pub fn disclaim<A: Address, T: Tables>(work: &mut Workspace<A>, tables: &T) {
    let claim = work.claim;
    work.claim = Claim::default();
    let Some(rule) = tables.rule(work.mapping.rule) else {
        return;
    };
    let key = UsageKey::new(rule.id, work.key.src, rule.limits.source_bits);
    let rate_of = |is_taken: bool, rate: &Rate| {
        let ticks = tables.config()?.ticks_per_second;
        Pace::of(rate, ticks).filter(|_| is_taken && claim.is_handed_on)
    };
    if (claim.of_source || claim.of_source_rate)
        && let Some(usage) = tables.usage(Spender::Source, &key)
    {
        if claim.of_source {
            // Not `ended`: of a source that is refused again and again, nothing must move that the recount looks at.
            usage.add_begun(ONE_LESS);
        }
        if let Some(pace) = rate_of(claim.of_source_rate, &rule.limits.source_rate) {
            pace.give_back(&usage);
        }
    }
    if (claim.of_rule || claim.of_rule_rate || claim.is_refused)
        && let Some(usage) = tables.usage(Spender::Rule, &key)
    {
        if claim.of_rule {
            usage.add_begun(ONE_LESS);
        }
        if let Some(pace) = rate_of(claim.of_rule_rate, &rule.limits.rate) {
            pace.give_back(&usage);
        }
        if claim.is_refused {
            usage.add_refused(1);
        }
    }
}

/// Added to a word, modulo 2^64.
const ONE_LESS: u64 = u64::MAX;

/// Whether the packet at hand, which has been tracked, closes its connection, or shows that it is still open.
#[inline(always)]
pub fn turns<A: Address>(work: &Workspace<A>, now: Instant) -> bool {
    match (work.subject.protocol, work.subject.kind, work.track.action) {
        (Protocol::Tcp, Kind::Segment, Action::Follow | Action::Restart) => {
            work.track.state.is_open() != state_after(work, now).is_open()
        }
        (Protocol::Tcp, Kind::Segment, Action::Unmoved | Action::Begin | Action::Refuse)
        | (Protocol::Tcp, Kind::Error | Kind::Malformed, _)
        | (Protocol::Udp | Protocol::Echo, _, _) => false,
    }
}

/// Counts the flow of the packet at hand that validation has ended: expired, or its rule's no more. A rule that is gone has left
/// its element as it was.
#[inline(always)]
pub fn lose<A: Address, T: Tables>(work: &Workspace<A>, tables: &T) {
    count(work, tables, false);
}

/// Counts a connection that its packet has closed, or has shown to be open. Two CPUs that see both ends close it at the same
/// moment may both count it, or neither; the recount puts that right.
#[inline(always)]
pub fn turn<A: Address, T: Tables>(work: &Workspace<A>, tables: &T, now: Instant) {
    count(work, tables, state_after(work, now).is_open());
}

/// Counts the flow of the packet at hand as one more, or as one less.
#[inline(always)]
fn count<A: Address, T: Tables>(work: &Workspace<A>, tables: &T, is_open: bool) {
    let Some(rule) = tables.rule(work.track.rule) else {
        return;
    };
    let limits: &Limits = &rule.limits;
    let client = match work.direction {
        FlowDir::Original => work.key.src,
        FlowDir::Reply => work.partner.src,
    };
    let key = UsageKey::new(rule.id, client, limits.source_bits);
    if limits.source_flows != 0
        && let Some(usage) = tables.usage(Spender::Source, &key)
    {
        add(&usage, is_open);
    }
    if limits.flows != 0
        && let Some(usage) = tables.usage(Spender::Rule, &key)
    {
        add(&usage, is_open);
    }
}

#[inline(always)]
fn add<U: UsageWords>(usage: &U, is_open: bool) {
    if is_open {
        usage.add_begun(1);
    } else {
        usage.add_ended(1);
    }
}

/// What has been used, be it nothing. `None` if there is no room to write it down: then the limit does not hold. Of rules there
/// is room for all; of sources, those make room that were met longest ago.
#[inline(always)]
fn usage_of<'a, T: Tables>(
    spender: Spender,
    key: &UsageKey,
    moment: &Moment<'a, T>,
) -> Option<T::Usage<'a>> {
    match moment.tables.usage(spender, key) {
        Some(usage) => Some(usage),
        None => {
            let tables = moment.tables;
            tables.begin_usage(spender, key, &Usage::unused(moment.now));
            tables.usage(spender, key)
        }
    }
}

/// Takes a place among at most so many flows; 0 is any number.
#[inline(always)]
fn takes_flow<U: UsageWords, T: Tables>(usage: &U, most: u32, moment: &Moment<'_, T>) -> bool {
    let most = u64::from(most);
    if most == 0 {
        return true;
    }
    let is_trusted = is_trusted(&moment.tables.recount(), moment.now);
    // Without touching the word: it is the refused that come in floods.
    if is_trusted && flows(usage.begun(), usage.ended()) >= most {
        return false;
    }
    let before = usage.add_begun(1);
    if is_trusted && flows(before, usage.ended()) >= most {
        usage.add_begun(ONE_LESS);
        return false;
    }
    true
}

/// Whether numbers of flows mean anything: without a daemon nobody counts the flows that end in silence, and in the end there
/// would be room for none.
#[inline(always)]
fn is_trusted(recount: &Recount, now: Instant) -> bool {
    recount.trust.0 == 0 || now.since_any_cpu(recount.at) <= recount.trust
}

/// Whether a rate allows a flow now.
#[inline(always)]
pub(super) fn has_pace<W: RateWord>(word: &W, rate: &Rate, config: &Config, now: Instant) -> bool {
    Pace::of(rate, config.ticks_per_second).is_none_or(|pace| pace.next(word.due(), now).is_some())
}

/// Takes a flow of a rate, if that allows one now.
#[inline(always)]
pub(super) fn keeps_pace<W: RateWord>(
    word: &W,
    rate: &Rate,
    config: &Config,
    now: Instant,
) -> bool {
    let Some(pace) = Pace::of(rate, config.ticks_per_second) else {
        return true;
    };
    let mut due = word.due();
    for _ in 0..ATTEMPTS {
        let Some(next) = pace.next(due, now) else {
            return false;
        };
        match word.set_due(due, next) {
            Ok(()) => return true,
            Err(found) => due = found,
        }
    }
    false
}
