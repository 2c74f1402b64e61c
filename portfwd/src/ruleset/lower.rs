//! Rules to map entries. Pure: a change comes out as the writes that carry it out ([`Writes`]).
//!
//! - A rule becomes visible with a write of PORTS, when all that PORTS leads to is there. A port
//!   whose rule is replaced goes from the old one to the new one with that write.
//! - A rule that goes while flows of its are spared leaves PORTS and LISTENS; its slot stays until
//!   the last of them is gone.
//! - LISTENS holds every rule with a listen address, its ports cut into aligned blocks; the longest
//!   prefix is the exact port. Where a range's block is a single port that an exact rule has too,
//!   the exact rule owns the key.
//! - PORTS names the winner where one scope covers a port, and sends the datapath to LISTENS where
//!   several do.
//! - SOURCES has a rule's list before the rule names it, and until no packet asks for it any more.
//! - TARGETS names a rule where it alone has that target, so that its replies can be translated
//!   without a flow entry.
//! - RESTS holds rules for everything else, which are in none of PORTS, LISTENS and TARGETS: other rules
//!   go before them, and what their target sends unasked is its own affair.

use std::{collections::BTreeSet, net::IpAddr};

use portfwd_common::abi::{
    self, MAX_PREFIXES, MAX_RULES, Protocol,
    rule::{CLASSES, port_index, ports_of_class},
};

use super::{
    Refusal, RuleSpec,
    allocate::{Blocks, Slots},
    edits::{Anys, Edits, Ports},
    element,
    lists::{List, Lists},
    movement::{Coming, Going, Opening, Relisted, Staying},
    placed::{Placed, Places, WanAddresses},
    ports::PortTable,
    prefix::Entry,
    rests::Rests,
    shift::{Guard, Shift},
    standing::Standing,
    targets::Targets,
    write::{Lighting, Remembering, RuleWrite, Write, Writes},
};

/// What packets are told to do, whatever their rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Manners {
    remembering: Remembering,
    lighting: Lighting,
}

/// A change that has its places, and the writes that carry it out.
#[derive(Debug, Default)]
pub struct Change {
    shifts: Vec<Shift>,
    /// Lists of sources that it brings, and that nobody names afterwards.
    new_lists: Vec<List>,
    old_lists: Vec<List>,
    /// What carries it out.
    pub writes: Writes,
}

/// What the maps hold on behalf of the rules.
#[derive(Debug)]
pub struct Lowering {
    /// By [`Protocol::class`].
    ports: [PortTable; CLASSES as usize],
    targets: Targets,
    lists: Lists,
    rests: Rests,
    placed: Places,
    /// Slots of rules with light tracking, and slots that may shade them.
    lights: BTreeSet<u16>,
    shades: BTreeSet<u16>,
    /// Rule id and slot of everything that a rule of the ruleset has.
    by_id: BTreeSet<(u32, u16)>,
    /// The same of what flows alone hold.
    retired: BTreeSet<(u32, u16)>,
    slots: Slots,
    cursor: u16,
    blocks: Blocks,
    max_ports: u32,
    /// Upper bound of the keys in LISTENS, and of those in TARGETS.
    prefixes: u32,
    wan: WanAddresses,
}

impl Lowering {
    /// No rules; `cursor` is the slot that was given out last by whoever used the maps before,
    /// `lists` are those that are in the maps.
    pub(super) fn new(
        max_ports: u32,
        cursor: u16,
        wan: &[IpAddr],
        lists: Lists,
        taken: impl Fn(u16) -> bool,
    ) -> Self {
        Self {
            ports: std::array::from_fn(|class| PortTable::new(class as u16)),
            targets: Targets::default(),
            lists,
            rests: Rests::default(),
            placed: Places::default(),
            lights: BTreeSet::new(),
            shades: BTreeSet::new(),
            by_id: BTreeSet::new(),
            retired: BTreeSet::new(),
            slots: Slots::new(MAX_RULES as u16, cursor, taken),
            cursor,
            blocks: Blocks::new(max_ports),
            max_ports,
            prefixes: 0,
            wan: WanAddresses::of(wan),
        }
    }

    /// Takes rules away, opens and closes others, brings new ones, and gives those that stay their
    /// lists of sources, as one change: all of it has a place, or nothing is changed. Places of what goes stay reserved until [`Self::finish`], so
    /// that [`Self::undo`] can undo it, counters and all.
    pub fn change(
        &mut self,
        going: &[Going],
        staying: &[Staying],
        coming: &[Coming<'_>],
        relisted: &[Relisted<'_>],
    ) -> Result<Change, Refusal> {
        let mut shifts: Vec<Shift> = going
            .iter()
            .flat_map(|going| self.farewell(going))
            .collect();
        shifts.extend(self.turn(staying, Opening::Closed));
        let kept = shifts.len();
        let mut lists = Vec::new();
        let mut arrived = self.arrive(coming, &mut shifts, &mut lists);
        if arrived.is_ok() {
            shifts.extend(self.turn(staying, Opening::Open));
            arrived = self.relist(relisted, &mut shifts, &mut lists);
        }
        if let Err(refusal) = arrived {
            self.give_back(&shifts[kept..]);
            lists.iter().for_each(|list| self.lists.give(list));
            return Err(refusal);
        }
        Ok(self.carry(shifts, lists))
    }

    /// Places and lists for rules that come; what was found before one of them was refused is there
    /// too.
    fn arrive(
        &mut self,
        coming: &[Coming<'_>],
        shifts: &mut Vec<Shift>,
        lists: &mut Vec<List>,
    ) -> Result<(), Refusal> {
        for rule in coming {
            let list = self.lists.take(rule.spec)?;
            lists.push(list.clone());
            for protocol in rule.spec.protocol().protocols() {
                shifts.push(self.welcome(rule, *protocol, &list)?);
            }
        }
        Ok(())
    }

    /// Lists and limits for rules that stay, beside whatever else happens to their slots.
    fn relist(
        &mut self,
        relisted: &[Relisted<'_>],
        shifts: &mut Vec<Shift>,
        lists: &mut Vec<List>,
    ) -> Result<(), Refusal> {
        for rule in relisted {
            let list = self.lists.take(rule.spec)?;
            let limits = rule.spec.limits().lowered(rule.spec.family());
            let places = self.places(rule.id);
            let has_list = |(_, placed): &(u16, Placed)| {
                self.lists.list(placed.rule.sources).says_the_same(&list)
            };
            let keeps_list = places.iter().all(has_list);
            let has_limits = |(_, placed): &(u16, Placed)| placed.rule.limits == limits;
            if keeps_list {
                self.lists.give(&list);
                if places.iter().all(has_limits) {
                    continue;
                }
            }
            for (slot, placed) in places {
                let sources = if keeps_list {
                    placed.rule.sources
                } else {
                    list.number()
                };
                let guard = Guard { sources, limits };
                if let Some(shift) = shifts.iter_mut().find(|shift| shift.slot == slot) {
                    shift.rule = guard.put(shift.rule);
                    continue;
                }
                shifts.push(Shift {
                    slot,
                    rule: guard.put(placed.rule),
                    before: placed.standing,
                    after: placed.standing,
                    guard: Guard::of(&placed.rule),
                });
            }
            if !keeps_list {
                lists.push(list);
            }
        }
        Ok(())
    }

    /// Whether packets find a rule.
    pub fn opening(&self, id: u32) -> Opening {
        let is_linked = |(_, placed): &(u16, Placed)| placed.standing.listens();
        if self.places(id).iter().any(is_linked) {
            Opening::Open
        } else {
            Opening::Closed
        }
    }

    /// The slots of rules that are to be opened, or closed, and are not.
    fn turn(&self, staying: &[Staying], opening: Opening) -> Vec<Shift> {
        let mut shifts = Vec::new();
        for Staying { id, flows, .. } in staying.iter().filter(|rule| rule.opening == opening) {
            for (slot, placed) in self.places(*id) {
                let after = match opening {
                    Opening::Open => Standing::Linked,
                    Opening::Closed if placed.standing == Standing::Linked => placed.closed(*flows),
                    Opening::Closed => placed.standing,
                };
                shifts.extend(Shift::of(slot, &placed, after));
            }
        }
        shifts
    }

    /// Frees the places of rules that are gone, once no flow names their slots any more.
    pub fn release(&mut self, is_in_use: impl Fn(u16) -> bool) -> Change {
        let ended = |(slot, placed): (u16, &Placed)| {
            let after = match placed.standing {
                Standing::Retired => Standing::Free,
                Standing::Draining => Standing::Parked,
                Standing::Free | Standing::Parked | Standing::Linked => return None,
            };
            if is_in_use(slot) {
                return None;
            }
            Shift::of(slot, placed, after)
        };
        let shifts = self.placed.iter().filter_map(ended).collect();
        self.carry(shifts, Vec::new())
    }

    /// Slots whose rules are gone or closed while flows of theirs go on.
    pub fn draining(&self) -> impl Iterator<Item = u16> {
        let drains = |placed: &Placed| placed.standing.holds_flows() && !placed.standing.listens();
        self.placed
            .iter()
            .filter(move |(_, placed)| drains(placed))
            .map(|(slot, _)| slot)
    }

    /// Undoes a change that is not finished.
    pub fn undo(&mut self, change: &Change) -> Writes {
        let mut edits = Shift::edits(&change.shifts);
        let before = self.manners();
        for shift in change.shifts.iter().rev() {
            self.shift(&shift.reversed(), &mut edits);
        }
        self.give_back(&change.shifts);
        let mut writes = self.writes(edits, before);
        writes.ahead.extend(made(&change.old_lists));
        writes.behind.extend(unmade(&change.new_lists));
        let lists = &mut self.lists;
        change.new_lists.iter().for_each(|list| lists.give(list));
        writes
    }

    /// Frees the places that a change has left.
    pub fn finish(&mut self, change: &Change) {
        let lists = &mut self.lists;
        change.old_lists.iter().for_each(|list| lists.give(list));
        for shift in &change.shifts {
            if shift.after == Standing::Free {
                self.slots.give(shift.slot);
                self.rests.forget(shift.slot);
                self.blocks
                    .give(shift.rule.counter_base, element::ports(&shift.rule));
                self.prefixes -= element::prefixes(&shift.rule);
            }
        }
    }

    fn carry(&mut self, shifts: Vec<Shift>, new_lists: Vec<List>) -> Change {
        let mut edits = Shift::edits(&shifts);
        let before = self.manners();
        for shift in &shifts {
            if shift.before == Standing::Free {
                edits.clear(shift.rule.counter_base, element::ports(&shift.rule));
            }
            self.shift(shift, &mut edits);
        }
        let old_lists = self.unnamed(&shifts);
        let mut writes = self.writes(edits, before);
        writes.ahead.extend(made(&new_lists));
        writes.behind.extend(unmade(&old_lists));
        Change {
            shifts,
            new_lists,
            old_lists,
            writes,
        }
    }

    /// Lists that slots named before they were shifted, and that no slot names now.
    fn unnamed(&self, shifts: &[Shift]) -> Vec<List> {
        let mut numbers: BTreeSet<u32> = shifts.iter().map(|shift| shift.guard.sources).collect();
        numbers.remove(&0);
        if !numbers.is_empty() {
            for (_, placed) in self.placed.iter() {
                numbers.remove(&placed.rule.sources);
            }
        }
        numbers
            .into_iter()
            .map(|number| self.lists.list(number))
            .collect()
    }

    /// The writes of edits; `before` is what packets were told before them.
    fn writes(&self, edits: Edits, before: Manners) -> Writes {
        let mut writes = edits.into_writes(
            |slot| self.element(slot),
            |ports, anys| self.ports_write(ports, anys),
        );
        let after = self.manners();
        // Packets that ask in vain fare as those that do not ask. They ask before there is anything to find.
        match (before.lighting, after.lighting) {
            (Lighting::Off, Lighting::On) => writes.ahead.push(Write::Light(Lighting::On)),
            (Lighting::On, Lighting::Off) => writes.behind.push(Write::Light(Lighting::Off)),
            (Lighting::On, Lighting::On) | (Lighting::Off, Lighting::Off) => {}
        }
        match (before.remembering, after.remembering) {
            (Remembering::Off, Remembering::On) => {
                writes.ahead.push(Write::Remember(Remembering::On));
            }
            (Remembering::On, Remembering::Off) => {
                writes.behind.push(Write::Remember(Remembering::Off));
            }
            (Remembering::On, Remembering::On) | (Remembering::Off, Remembering::Off) => {}
        }
        writes
    }

    fn manners(&self) -> Manners {
        Manners {
            remembering: self.remembering(),
            lighting: self.lighting(),
        }
    }

    /// Whether packets must ask for rules with light tracking: they find some.
    pub(super) fn lighting(&self) -> Lighting {
        let is_found = |slot: &u16| self.placed.get(*slot).is_some_and(|p| p.standing.listens());
        if self.lights.iter().any(is_found) {
            Lighting::On
        } else {
            Lighting::Off
        }
    }

    /// Whether it must be remembered what leaves: packets find a rule for everything else.
    pub(super) fn remembering(&self) -> Remembering {
        // Not all rules: every change asks.
        if self.taking_rest().next().is_some() {
            Remembering::On
        } else {
            Remembering::Off
        }
    }

    /// The rules for everything else that packets find.
    fn taking_rest(&self) -> impl Iterator<Item = (u16, &Placed)> {
        let placed = |slot| Some((slot, self.placed.get(slot)?));
        let rests = self.rests.slots().filter_map(placed);
        rests.filter(|(_, placed)| placed.rule.is_rest() && placed.standing.listens())
    }

    /// What becomes of the slots of a rule that goes.
    fn farewell(&self, going: &Going) -> Vec<Shift> {
        let leave = |(slot, placed): (u16, Placed)| {
            let after = match placed.closed(going.flows) {
                Standing::Draining => Standing::Retired,
                Standing::Free | Standing::Parked | Standing::Linked | Standing::Retired => {
                    Standing::Free
                }
            };
            Shift::of(slot, &placed, after)
        };
        self.places(going.id)
            .into_iter()
            .filter_map(leave)
            .collect()
    }

    /// A place for a rule that comes: the one it had, if flows of the same rule still hold it.
    fn welcome(
        &mut self,
        coming: &Coming<'_>,
        protocol: Protocol,
        list: &List,
    ) -> Result<Shift, Refusal> {
        let sources = list.number();
        let rule = abi::Rule {
            sources,
            ..element::element(coming.id, protocol, coming.spec)
        };
        let had = self.retired.range((coming.id, 0)..=(coming.id, u16::MAX));
        let mut had = had.filter_map(|(_, slot)| Some((*slot, self.placed.get(*slot)?)));
        if let Some((slot, placed)) = had.find(|(_, had)| element::is_same(&had.rule, &rule)) {
            let placed = *placed;
            self.rests.set(slot, &rule, coming.spec);
            return Ok(Shift {
                slot,
                rule: Guard::of(&rule).put(placed.rule),
                before: placed.standing,
                after: match coming.opening {
                    Opening::Open => Standing::Linked,
                    Opening::Closed => Standing::Draining,
                },
                guard: Guard::of(&placed.rule),
            });
        }
        let (slot, rule) = self.place(rule)?;
        self.rests.set(slot, &rule, coming.spec);
        Ok(Shift {
            slot,
            rule,
            before: Standing::Free,
            after: match coming.opening {
                Opening::Open => Standing::Linked,
                Opening::Closed => Standing::Parked,
            },
            guard: Guard::of(&rule),
        })
    }

    /// Gives places back that were found for rules that do not come after all.
    fn give_back(&mut self, shifts: &[Shift]) {
        for shift in shifts.iter().rev() {
            if shift.before == Standing::Free {
                self.unplace(shift.slot, &shift.rule);
            }
        }
    }

    /// The WAN's own addresses are these now.
    pub fn set_wan_addresses(&mut self, addresses: &[IpAddr]) -> Writes {
        let (before, after) = (self.wan, WanAddresses::of(addresses));
        self.wan = after;
        let changed = self
            .placed
            .iter()
            .map(|(slot, placed)| (slot, placed.element(before), placed.element(after)));
        let changed = changed.filter(|(_, old, new)| old != new);
        Writes {
            rules: changed
                .map(|(slot, _, rule)| RuleWrite::Rule { slot, rule })
                .collect(),
            ..Writes::default()
        }
    }

    /// What a rule has in RULES, by slot.
    fn places(&self, id: u32) -> Vec<(u16, Placed)> {
        let slots = self
            .by_id
            .range((id, 0)..=(id, u16::MAX))
            .map(|(_, slot)| slot);
        slots
            .filter_map(|slot| Some((*slot, *self.placed.get(*slot)?)))
            .collect()
    }

    /// Everything in RULES, by slot.
    pub fn rules(&self) -> impl Iterator<Item = (u16, abi::Rule)> {
        self.placed
            .iter()
            .map(|(slot, placed)| (slot, placed.element(self.wan)))
    }

    /// The slot that was given out last, for the next [`Self::adopt`].
    pub fn cursor(&self) -> u16 {
        self.cursor
    }

    fn place(&mut self, rule: abi::Rule) -> Result<(u16, abi::Rule), Refusal> {
        let more = element::prefixes(&rule);
        if self.prefixes + more > MAX_PREFIXES {
            return Err(Refusal::TooManyPrefixes {
                capacity: MAX_PREFIXES,
            });
        }
        let slot = self.slots.take().ok_or(Refusal::TooManyRules {
            capacity: MAX_RULES - 1,
        })?;
        let Some(counter_base) = self.blocks.take(element::ports(&rule)) else {
            self.slots.untake(slot);
            return Err(Refusal::TooManyPorts {
                count: element::ports(&rule),
                capacity: self.max_ports,
            });
        };
        self.prefixes += more;
        self.cursor = slot;
        Ok((
            slot,
            abi::Rule {
                counter_base,
                ..rule
            },
        ))
    }

    fn unplace(&mut self, slot: u16, rule: &abi::Rule) {
        self.slots.untake(slot);
        self.rests.forget(slot);
        self.blocks.give(rule.counter_base, element::ports(rule));
        self.prefixes -= element::prefixes(rule);
    }

    /// Keeps a rule in the slot and the counters that it has in the maps; `false` if another rule
    /// counts there. Without `spec` it is one that has flows alone.
    pub(super) fn keep(
        &mut self,
        slot: u16,
        rule: abi::Rule,
        counter_base: u32,
        standing: Standing,
        spec: Option<&RuleSpec>,
    ) -> bool {
        let is_free = self.blocks.reserve(counter_base, element::ports(&rule));
        if is_free {
            self.prefixes += element::prefixes(&rule);
            let rule = abi::Rule {
                counter_base,
                ..rule
            };
            if let Some(spec) = spec {
                self.rests.set(slot, &rule, spec);
            }
            self.index(slot, rule, standing);
        }
        is_free
    }

    /// Gives a rule a place that is not in the maps yet. The write clears its counters; the others
    /// are the caller's.
    pub(super) fn settle(
        &mut self,
        rule: abi::Rule,
        opening: Opening,
        spec: &RuleSpec,
    ) -> Result<Write, Refusal> {
        let (slot, rule) = self.place(rule)?;
        self.rests.set(slot, &rule, spec);
        let standing = match opening {
            Opening::Open => Standing::Linked,
            Opening::Closed => Standing::Parked,
        };
        self.index(slot, rule, standing);
        Ok(Write::ClearCounters {
            first: rule.counter_base,
            count: element::ports(&rule),
        })
    }

    /// Whether a slot is in use.
    pub(super) fn has(&self, slot: u16) -> bool {
        self.placed.get(slot).is_some()
    }

    /// Slots that others had can be used from here on.
    pub(super) fn give_slots(&mut self, slots: impl Iterator<Item = u16>) {
        slots.for_each(|slot| self.slots.give(slot));
    }

    /// The list of sources that a rule has in the maps.
    pub(super) fn take_list(&mut self, spec: &RuleSpec) -> Result<u32, Refusal> {
        Ok(self.lists.take(spec)?.number())
    }

    /// Lists that rules name, and lists that none does, which are given back.
    pub(super) fn sort_lists(&mut self) -> (Vec<List>, Vec<List>) {
        let named: BTreeSet<u32> = self.placed.iter().map(|(_, p)| p.rule.sources).collect();
        let (named, unnamed): (Vec<_>, Vec<_>) = self
            .lists
            .iter()
            .cloned()
            .partition(|list| named.contains(&list.number()));
        unnamed.iter().for_each(|list| self.lists.give(list));
        (named, unnamed)
    }

    /// Everything LISTENS must hold.
    pub(super) fn listens(&self) -> impl Iterator<Item = Entry> {
        self.ports.iter().flat_map(PortTable::all)
    }

    /// Everything RESTS must hold.
    pub(super) fn rest_entries(&self) -> impl Iterator<Item = Entry> {
        self.taking_rest()
            .flat_map(|(slot, placed)| self.rests.entries(slot, &placed.rule))
    }

    /// Everything TARGETS must hold.
    pub(super) fn targets(&self) -> impl Iterator<Item = Entry> {
        self.targets.all()
    }

    /// All of PORTS.
    pub(super) fn all_ports(&self) -> impl Iterator<Item = RuleWrite> {
        (0..).zip(&self.ports).map(|(class, table)| {
            let ports = Ports {
                class,
                first: 0,
                last: (ports_of_class(class) - 1) as u16,
            };
            ports_write(ports, table)
        })
    }

    /// Enters a rule that has its place, without writes.
    fn index(&mut self, slot: u16, rule: abi::Rule, standing: Standing) {
        let shift = Shift {
            slot,
            rule,
            before: Standing::Free,
            after: standing,
            guard: Guard::of(&rule),
        };
        self.shift(&shift, &mut Edits::default());
    }

    /// Brings a slot from where it stands to where it is to stand.
    fn shift(&mut self, shift: &Shift, edits: &mut Edits) {
        let Shift {
            slot,
            rule,
            before,
            after,
            guard,
        } = shift;
        edits.element(*slot, self.element(*slot).unwrap_or_default());
        // Flows look at their rule's list again, too; limits are nothing to them.
        let stays = after.holds_flows() && guard.sources == rule.sources;
        if before.holds_flows() && !stays {
            edits.ends_flows();
        }
        self.enlist(*slot, rule, *before, *after);
        self.shift_target(shift, edits);
        self.shift_shade(shift, edits);
        if before.listens() != after.listens() && rule.is_rest() {
            let mut entries = self.rests.entries(*slot, rule);
            if !after.listens() {
                entries.iter_mut().for_each(|entry| entry.slot = None);
            }
            edits.rest(entries);
        } else if before.listens() != after.listens() {
            let ports = Ports {
                class: element::class(rule),
                first: rule.first,
                last: rule.last,
            };
            let table = &mut self.ports[usize::from(ports.class)];
            edits.before(ports, table.anys(ports.first, ports.last));
            let scope = element::listen_scope(rule);
            let entries = if after.listens() {
                table.insert(scope, *slot)
            } else {
                table.remove(scope, *slot)
            };
            edits.listen(entries, ports);
        }
    }

    /// Who has the slot.
    fn enlist(&mut self, slot: u16, rule: &abi::Rule, before: Standing, after: Standing) {
        let key = (rule.id, slot);
        if before.is_owned() {
            self.by_id.remove(&key);
        }
        if before == Standing::Retired {
            self.retired.remove(&key);
        }
        if after.is_owned() {
            self.by_id.insert(key);
        }
        if after == Standing::Retired {
            self.retired.insert(key);
        }
        if after == Standing::Free {
            self.placed.remove(slot);
        } else {
            let placed = Placed {
                rule: *rule,
                standing: after,
                is_shared: self.targets.is_shared(slot),
                is_shaded: self.is_shaded(rule),
            };
            self.placed.insert(slot, placed);
        }
    }

    /// Whether any slot shades a rule with light tracking.
    fn is_shaded(&self, rule: &abi::Rule) -> bool {
        let shades = |slot: &u16| self.placed.get(*slot).is_some_and(|p| p.shades(rule));
        rule.is_light() && self.shades.iter().any(shades)
    }

    /// Rules with light tracking begin or cease to be shaded by a slot.
    fn shift_shade(&mut self, shift: &Shift, edits: &mut Edits) {
        let slot = shift.slot;
        let now = self.placed.get(slot).copied();
        if now.is_some_and(|placed| placed.rule.is_light()) {
            self.lights.insert(slot);
        } else {
            self.lights.remove(&slot);
        }
        let was_there = if now.is_some_and(|placed| placed.may_shade()) {
            !self.shades.insert(slot)
        } else {
            self.shades.remove(&slot)
        };
        let is_there = self.shades.contains(&slot);
        if !was_there && !is_there {
            return;
        }
        for light in self.lights.clone() {
            let (Some(placed), Some(element)) = (self.placed.get(light), self.element(light))
            else {
                continue;
            };
            let is_shaded = self.is_shaded(&placed.rule);
            if is_shaded != placed.is_shaded {
                edits.element(light, element);
                if let Some(placed) = self.placed.get_mut(light) {
                    placed.is_shaded = is_shaded;
                }
            }
        }
    }

    /// Replies of flows that go on are still the rule's, so it keeps its target while it has flows.
    fn shift_target(&mut self, shift: &Shift, edits: &mut Edits) {
        if shift.rule.is_rest() || shift.before.holds_flows() == shift.after.holds_flows() {
            return;
        }
        let scope = element::target_scope(&shift.rule);
        let targets = if shift.after.holds_flows() {
            self.targets.insert(scope, shift.slot)
        } else {
            self.targets.remove(scope, shift.slot)
        };
        edits.target(targets.entries);
        // Rules that began or ceased to share targets with others.
        for slot in targets.changed.into_iter().chain([shift.slot]) {
            let is_shared = self.targets.is_shared(slot);
            let Some(element) = self.element(slot) else {
                continue;
            };
            edits.element(slot, element);
            if let Some(placed) = self.placed.get_mut(slot) {
                placed.is_shared = is_shared;
            }
        }
    }

    fn element(&self, slot: u16) -> Option<abi::Rule> {
        Some(self.placed.get(slot)?.element(self.wan))
    }

    fn ports_write(&self, ports: Ports, anys: Option<&Anys>) -> RuleWrite {
        let table = &self.ports[usize::from(ports.class)];
        let Some(anys) = anys else {
            return ports_write(ports, table);
        };
        let now = table.anys(ports.first, ports.last);
        let now = (ports.first..=ports.last).zip(now);
        RuleWrite::Ports {
            first_index: port_index(ports.class, ports.first),
            words: now
                .map(|(port, any)| anys.union(ports.class, port, any))
                .collect(),
        }
    }
}

/// What writes lists.
pub(super) fn made(lists: &[List]) -> impl Iterator<Item = Write> {
    lists.iter().flat_map(List::entries).map(Write::Source)
}

/// What takes lists away.
pub(super) fn unmade(lists: &[List]) -> impl Iterator<Item = Write> {
    lists.iter().flat_map(List::removal).map(Write::Source)
}

fn ports_write(ports: Ports, table: &PortTable) -> RuleWrite {
    RuleWrite::Ports {
        first_index: port_index(ports.class, ports.first),
        words: table.words(ports.first, ports.last),
    }
}

#[cfg(test)]
#[path = "lower_tests.rs"]
mod tests;
