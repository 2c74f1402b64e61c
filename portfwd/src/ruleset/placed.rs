//! A rule of one protocol in its slot, and what its element says that other rules and the WAN's addresses decide.

use std::net::IpAddr;

use portfwd_common::{abi, net::Family};

use super::{FlowPolicy, element, standing::Standing};

/// The own addresses of the WAN interfaces, as far as lowering cares: with exactly one of a family,
/// a listen without address is a certain address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WanAddresses {
    v4: usize,
    v6: usize,
}

/// A rule of one protocol in its slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub(super) rule: abi::Rule,
    pub(super) standing: Standing,
    /// Another rule has one of its target endpoints too.
    pub(super) is_shared: bool,
    /// Flows of another rule go on at its ports, or may have its target's answers.
    pub(super) is_shaded: bool,
}

/// What is in the slots, by slot, in pages: slots are given out one after the other, and come round again.
#[derive(Debug, Default)]
pub(super) struct Places(Vec<Vec<Option<Placed>>>);

/// Slots of a page.
const PAGE: usize = 256;

impl Places {
    pub(super) fn get(&self, slot: u16) -> Option<&Placed> {
        let (page, place) = page_of(slot);
        self.0.get(page)?.get(place)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: u16) -> Option<&mut Placed> {
        let (page, place) = page_of(slot);
        self.0.get_mut(page)?.get_mut(place)?.as_mut()
    }

    pub(super) fn insert(&mut self, slot: u16, placed: Placed) {
        let (page, place) = page_of(slot);
        if self.0.len() <= page {
            self.0.resize_with(page + 1, Vec::new);
        }
        let page = &mut self.0[page];
        if page.len() <= place {
            page.resize(place + 1, None);
        }
        page[place] = Some(placed);
    }

    pub(super) fn remove(&mut self, slot: u16) {
        let (page, place) = page_of(slot);
        let Some(page) = self.0.get_mut(page) else {
            return;
        };
        if let Some(place) = page.get_mut(place) {
            *place = None;
        }
        if page.iter().all(Option::is_none) {
            *page = Vec::new();
        }
    }

    /// By slot.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, &Placed)> {
        let pages = (0..).step_by(PAGE).zip(&self.0);
        let places = pages.flat_map(|(first, page)| (first..).zip(page));
        places.filter_map(|(slot, placed)| Some((slot, placed.as_ref()?)))
    }
}

/// The page of a slot, and its place there.
fn page_of(slot: u16) -> (usize, usize) {
    (usize::from(slot) / PAGE, usize::from(slot) % PAGE)
}

impl WanAddresses {
    pub(super) fn of(addresses: &[IpAddr]) -> Self {
        let v4 = addresses.iter().filter(|address| address.is_ipv4()).count();
        Self {
            v4,
            v6: addresses.len() - v4,
        }
    }

    pub(super) fn count(self, family: Family) -> usize {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

impl Placed {
    /// Whether it may shade rules with light tracking: flows go on where packets do not find it, or of a rule for everything else.
    pub(super) fn may_shade(&self) -> bool {
        self.standing.holds_flows() && (!self.standing.listens() || self.rule.is_rest())
    }

    /// Whether packets of a rule with light tracking may be those of its flows: they come to the same port, or answer for the same
    /// target.
    pub(super) fn shades(&self, light: &abi::Rule) -> bool {
        let meets = self.rule.first <= light.last && light.first <= self.rule.last;
        element::class(&self.rule) == element::class(light)
            && if self.standing.listens() {
                self.rule.is_rest() && self.rule.target == light.target
            } else {
                meets || self.rule.target == light.target
            }
    }

    /// The element of RULES, with the flags that depend on other rules and on the WAN's addresses.
    pub(super) fn element(&self, wan: WanAddresses) -> abi::Rule {
        let one_listen = !self.rule.is_any_address() || wan.count(element::family(&self.rule)) == 1;
        let rule = element::standing(&self.rule, self.standing);
        let is_alone = !self.is_shared && !rule.hides_clients() && !rule.is_rest();
        let mut flags = rule.flags;
        if one_listen && is_alone && self.standing.listens() {
            flags |= abi::Rule::STATELESS;
        }
        if self.rule.is_light() && self.is_shaded && self.standing.listens() {
            flags |= abi::Rule::SHADED;
        }
        abi::Rule { flags, ..rule }
    }

    /// Where its slot stands once it takes no more flows.
    pub(super) fn closed(&self, flows: FlowPolicy) -> Standing {
        // Packets of a rule with light tracking do not know which flow they are of.
        let spared = flows.spares(self.rule.protocol()) && !self.rule.is_light();
        if spared && self.standing.holds_flows() {
            Standing::Draining
        } else {
            Standing::Parked
        }
    }
}
