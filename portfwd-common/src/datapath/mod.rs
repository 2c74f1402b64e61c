//! The datapath: classify → flow → decide → track → route → apply.
//!
//! One pipeline, generic over the address family, the packet's memory and the tables. Nothing of a packet is written before
//! everything about it is decided: a packet that is passed leaves bit for bit as it came.
//!
//! It runs in two parts. [`fast`] finishes packets of flows whose entry is fresh, and writes nothing otherwise. [`slow()`] does
//! everything else from the start; in the kernel it is a program of its own, reached by a tail call, so that the hot path stays
//! small and either has the whole 512 bytes of stack. So is [`fast_light`], the hot path where there are rules with light tracking:
//! where there are none, a packet pays for one question.
//!
//! - [`classify`] says what a packet is
//! - [`transport`] carries packets of known flows, [`opening`] begins flows, [`speaking`] sees to targets that speak first,
//!   [`icmp`] carries errors about flows
//! - [`binding`] and [`pool`] find a port of the gateway to stand for a client
//! - [`light`] has rules carry packets that do not look at their flow's entry
//! - [`late`] sees to what targets still send of flows that have ended with their rule
//! - [`proof`] moves flows that both sides know of to where nobody takes their place
//! - [`nat`] asks the rules, [`path`] finds the way out, [`next_hop`] numbers it, [`known`], [`conntrack`] and [`tcp`] decide on lifetimes
//! - [`options`] walks over the options of IPv4 and TCP headers
//! - [`mss`] lowers the segment size that a SYN says to what fits
//! - [`limits`] says whether a rule takes another flow, of this source or at all
//! - [`rest`] has rules take what is nobody else's
//! - [`refusal`] tells a client that there is no room for its flow
//! - [`fragments`] carries datagrams in fragments, [`cutting`] makes fragments of packets that are too big
//! - [`apply`] and [`icmp`] are the only code that writes to a packet that goes on

pub mod apply;
pub mod binding;
pub mod classify;
pub mod conntrack;
pub mod cutting;
pub mod fragments;
pub mod icmp;
pub mod known;
pub mod late;
pub mod light;
pub mod limits;
pub mod mss;
pub mod nat;
pub mod next_hop;
pub mod opening;
pub mod options;
pub mod path;
pub mod pool;
pub mod proof;
pub mod refusal;
pub mod rest;
pub mod reverse_path;
pub mod slow;
pub mod speaking;
pub mod tables;
pub mod tcp;
pub mod transport;
pub mod verdict;
pub mod workspace;

pub use classify::Arrival;
pub use fragments::fragment;
pub use limits::{RateWord, UsageWords};
pub use pool::PoolWords;
pub use rest::remember;
pub use slow::slow;
pub use tables::{Flows, Fragments, InsertError, Repeat, Repeated, Repeats, Route, Table, Tables};
pub use verdict::{Departure, DropReason, Event, Hook, PassReason, Verdict, Way};
pub use workspace::{Beginning, Context, Input, Job, Step, Workspace};

use crate::{
    abi::{Config, Instant, Interface, config::interface_slot},
    net::{Address, Family, Ipv4, Ipv6, PacketBuf},
};

/// What every step may ask: the packet's circumstances and the tables.
#[derive(Debug)]
pub struct Scene<'a, T> {
    /// How the packet came.
    pub arrival: &'a Arrival,
    /// The interface it came in by.
    pub ingress: &'a Interface,
    /// Timeouts and generation.
    pub config: &'a Config,
    /// Rules, interfaces, routes, counters.
    pub tables: &'a T,
    /// Now.
    pub now: Instant,
}

impl<T> Clone for Scene<'_, T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Scene<'_, T> {}

/// What the steps may ask that are about flows, whichever hook sees the packet. Smaller than a [`Scene`] for the verifier, which
/// goes through a step once for everything that it knows of a packet's circumstances.
#[derive(Debug)]
pub struct Moment<'a, T> {
    /// Timeouts and generation.
    pub config: &'a Config,
    /// Rules, interfaces, routes, counters.
    pub tables: &'a T,
    /// Now.
    pub now: Instant,
}

impl<T> Clone for Moment<'_, T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Moment<'_, T> {}

/// A frame whose link layer is understood.
#[derive(Clone, Copy, Debug)]
pub struct Views<P> {
    /// From the link header on.
    pub frame: P,
    /// From the IP header on.
    pub network: P,
}

/// What the hot path makes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Finished.
    Done(Verdict),
    /// Untouched; there are rules with light tracking, and [`fast_light`] takes it.
    Light,
    /// Untouched; the slow path of its family takes it.
    Slow(Family),
}

/// The hot path: decides on packets of flows whose entry is fresh, and on what is not IP.
#[inline(always)]
pub fn fast<P, F, T>(
    frame: P,
    arrival: &Arrival,
    flows: &mut F,
    tables: &T,
    now: Instant,
) -> Progress
where
    P: PacketBuf,
    F: Flows<Ipv4> + Flows<Ipv6>,
    T: Tables,
{
    let Some(scene) = Scene::of(arrival, tables, now) else {
        return Progress::Done(Verdict::Pass(PassReason::NotForUs));
    };
    // What the gateway itself sends looks at its flow's entry.
    if arrival.hook != Hook::TcOut && scene.config.has_lights() {
        return Progress::Light;
    }
    carry(HotPath::Ordinary, frame, flows, &scene)
}

/// The hot path where there are rules with light tracking: the same, for packets that are not one of theirs that can do without its
/// flow's entry.
#[inline(always)]
pub fn fast_light<P, F, T>(
    frame: P,
    arrival: &Arrival,
    flows: &mut F,
    tables: &T,
    now: Instant,
) -> Progress
where
    P: PacketBuf,
    F: Flows<Ipv4> + Flows<Ipv6>,
    T: Tables,
{
    let Some(scene) = Scene::of(arrival, tables, now) else {
        return Progress::Done(Verdict::Pass(PassReason::NotForUs));
    };
    carry(HotPath::Light, frame, flows, &scene)
}

/// Whose entries a hot path looks at.
#[derive(Clone, Copy, Debug)]
enum HotPath {
    /// Those of every flow.
    Ordinary,
    /// Not those of rules with light tracking, mostly.
    Light,
}

#[inline(always)]
fn carry<P, F, T>(path: HotPath, frame: P, flows: &mut F, scene: &Scene<'_, T>) -> Progress
where
    P: PacketBuf,
    F: Flows<Ipv4> + Flows<Ipv6>,
    T: Tables,
{
    match scene.link(frame) {
        Ok(Family::V4) => carry_of::<Ipv4, P, F, T>(path, frame, flows, scene),
        Ok(Family::V6) => carry_of::<Ipv6, P, F, T>(path, frame, flows, scene),
        Err(reason) => Progress::Done(Verdict::Pass(reason)),
    }
}

/// Carries a packet of a family.
#[inline(always)]
fn carry_of<A, P, F, T>(path: HotPath, frame: P, flows: &mut F, scene: &Scene<'_, T>) -> Progress
where
    A: Address,
    P: PacketBuf,
    F: Flows<A>,
    T: Tables,
{
    let views = Views::of(frame, scene.arrival.link);
    let verdict = match path {
        HotPath::Ordinary => transport::carry_fast::<A, P, F, T>(views, flows, scene),
        HotPath::Light => light::carry_fast::<A, P, F, T>(views, flows, scene),
    };
    match verdict {
        Some(verdict) => Progress::Done(verdict),
        None => Progress::Slow(A::FAMILY),
    }
}

impl<'a, T: Tables> Scene<'a, T> {
    /// The circumstances of a packet; `None` if its interface is not attached or nothing is configured yet.
    #[inline(always)]
    pub fn of(arrival: &'a Arrival, tables: &'a T, now: Instant) -> Option<Self> {
        let config = tables.config()?;
        let ingress = tables.interface(interface_slot(arrival.ifindex))?;
        (ingress.ifindex == arrival.ifindex).then_some(Self {
            arrival,
            ingress,
            config,
            tables,
            now,
        })
    }

    /// The family of a frame.
    #[inline(always)]
    pub fn link<P: PacketBuf>(&self, frame: P) -> Result<Family, PassReason> {
        let own = match self.arrival.hook {
            Hook::Xdp | Hook::Tc | Hook::TcSlow => Some(self.ingress.mac),
            Hook::TcOut => None,
        };
        classify::link(frame, self.arrival.link, own)
    }
}

impl Hook {
    /// Whether this hook counts a reason for which it passes packets: [`Hook::TcSlow`] counts what XDP could not find out, the rest
    /// has been counted by then; and what the gateway itself sends is nobody's business.
    #[inline(always)]
    pub const fn counts(self, reason: PassReason) -> bool {
        match self {
            Self::Xdp | Self::Tc => true,
            Self::TcSlow => matches!(
                reason,
                PassReason::HopLimit | PassReason::PacketTooBig | PassReason::NoRoute
            ),
            Self::TcOut => false,
        }
    }
}
