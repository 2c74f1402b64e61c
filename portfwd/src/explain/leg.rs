//! One packet through the gateway: in by an interface, through its programs, and what becomes of it.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use portfwd_common::{
    abi::{LinkLayer, names},
    datapath::verdict::{DropReason, Event, PassReason},
};
use serde::Serialize;

use super::{
    packet::{Departed, Packet},
    words,
};
use crate::{
    bpf::rehearsal::{Outcome, Rehearsal},
    diagnose::Facts,
    netlink::{
        device::Device,
        neighbour::Resolution,
        route::{Route, Routes},
    },
};

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Translated and sent.
    Forwarded,
    /// Translated and given to the kernel, which decides.
    Stack,
    /// Left to the kernel as it came.
    Passed,
    /// Refused.
    Dropped,
    /// No program of portfwd sees it.
    Unseen,
}

/// A packet's way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Leg {
    /// The interface it comes in by.
    pub ingress: String,
    /// The programs that saw it.
    pub programs: Vec<&'static str>,
    /// Where it comes from, as it comes.
    pub source: SocketAddr,
    /// Where it goes, as it comes.
    pub destination: SocketAddr,
    /// What becomes of it.
    pub fate: Fate,
    /// Names of the counters that say why, as `counters` has them.
    pub reasons: Vec<&'static str>,
    /// The same in words.
    pub because: Vec<String>,
    /// Where it comes from once translated.
    pub translated_source: Option<SocketAddr>,
    /// Where it goes once translated.
    pub translated_destination: Option<SocketAddr>,
    /// Bytes of data in a segment that its receiver is told of, if that is less than what it said.
    pub segment_size: Option<u16>,
    /// The interface it leaves by.
    pub egress: Option<String>,
    /// Whom the frame goes to.
    pub next_hop: Option<NextHop>,
    #[serde(skip)]
    pub(super) counter: Option<u32>,
    #[serde(skip)]
    pub(super) egress_index: Option<u32>,
}

/// Whom a frame goes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NextHop {
    /// Address of the router, or of the destination itself.
    pub ip: std::net::IpAddr,
    /// Its MAC address, if it is known.
    pub mac: Option<String>,
}

/// The modes' programs for what comes in, in the order in which they see it.
fn programs(mode: &str, layer: LinkLayer) -> &'static [&'static str] {
    match (mode, layer) {
        ("xdp" | "xdp-generic", _) => &[names::PROGRAM_XDP, names::PROGRAM_TC_SLOW],
        (_, LinkLayer::Ethernet) => &[names::PROGRAM_TC],
        (_, LinkLayer::Raw) => &[names::PROGRAM_TC_RAW],
    }
}

/// Every program that a packet of an interface may meet, with the slow path of its family behind it. Those for fragments and
/// the cutter are most of what the kernel would have to verify, and no packet that is tried is a fragment or needs cutting.
pub(super) fn all_programs(mode: &str, layer: LinkLayer, listen: IpAddr) -> Vec<&'static str> {
    // In both lists the families come first, in this order.
    let place = match listen {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => 1,
    };
    let mut all = programs(mode, layer).to_vec();
    all.extend([
        names::SLOW_TC[place],
        names::PROGRAM_REFUSE,
        names::LIGHT_TC,
    ]);
    if all.contains(&names::PROGRAM_XDP) {
        all.extend([names::SLOW_XDP[place], names::LIGHT_XDP]);
    }
    all
}

impl Leg {
    /// A packet that no program sees.
    pub(super) fn unseen(ingress: &str, packet: &Packet, because: String) -> Self {
        Self {
            ingress: ingress.to_owned(),
            programs: Vec::new(),
            source: packet.source,
            destination: packet.destination,
            fate: Fate::Unseen,
            reasons: Vec::new(),
            because: vec![because],
            translated_source: None,
            translated_destination: None,
            segment_size: None,
            egress: None,
            next_hop: None,
            counter: None,
            egress_index: None,
        }
    }

    /// Tries a packet that comes in by an interface in this mode.
    pub(super) fn run(
        rehearsal: &mut Rehearsal,
        facts: &Facts,
        device: &Device,
        mode: &str,
        packet: &Packet,
    ) -> Result<Self> {
        let link = &device.link;
        let mut leg = Self::unseen(&link.name, packet, String::new());
        leg.because.clear();
        let bytes = packet.bytes(link.layer, link.mac)?;
        for program in programs(mode, link.layer) {
            leg.programs.push(program);
            let outcome = rehearsal.run(program, link.ifindex, &bytes)?;
            if !leg.take(program, &outcome) {
                leg.depart(&outcome, link.layer, bytes.len());
                break;
            }
        }
        if leg.translated_destination.is_some() {
            leg.find_way(facts, link.ifindex)?;
        }
        Ok(leg)
    }

    /// Takes over what a program decided. True if the next program sees the packet.
    fn take(&mut self, program: &str, outcome: &Outcome) -> bool {
        let grew = |index: u32| outcome.reasons.contains(&index);
        let pass = PassReason::ALL.iter().find(|reason| grew(reason.index()));
        let drop = DropReason::ALL.iter().find(|reason| grew(reason.index()));
        let events: Vec<_> = Event::ALL
            .iter()
            .filter(|event| grew(event.index()))
            .collect();
        self.fate = match drop {
            // What leaves then is an ICMP error in its place.
            Some(_) => Fate::Dropped,
            None => fate(program, outcome.code),
        };
        if self.fate == Fate::Passed && events.contains(&&Event::Stack) {
            self.fate = Fate::Stack;
        }
        self.counter = self.counter.or(outcome.counter);
        if let Some(reason) = pass {
            self.tell(reason.name(), words::pass(*reason));
        }
        if let Some(reason) = drop {
            self.tell(reason.name(), words::drop(*reason));
        }
        for event in events {
            self.tell(event.name(), words::event(*event));
        }
        self.fate == Fate::Passed && pass == Some(&PassReason::SlowPath)
    }

    fn tell(&mut self, name: &'static str, words: &str) {
        self.reasons.push(name);
        self.because.push(words.to_owned());
    }

    fn depart(&mut self, outcome: &Outcome, layer: LinkLayer, length: usize) {
        match self.fate {
            Fate::Forwarded | Fate::Stack => {}
            Fate::Passed | Fate::Dropped | Fate::Unseen => return,
        }
        let Some(departed) = Departed::read(&outcome.frame, layer, length) else {
            return;
        };
        if self.reasons.contains(&Event::MssClamped.name()) {
            self.segment_size = departed.segment_size;
            self.because.extend(
                self.segment_size
                    .map(|size| format!("it says {size} bytes from here on")),
            );
        }
        self.translated_source = Some(departed.source);
        self.translated_destination = Some(departed.destination);
        self.next_hop = Some(NextHop {
            ip: departed.destination.ip(),
            mac: departed
                .mac
                .filter(|_| self.fate == Fate::Forwarded)
                .map(mac_text),
        });
    }

    /// Asks the kernel for the way of the translated packet.
    fn find_way(&mut self, facts: &Facts, ingress: u32) -> Result<()> {
        let (Some(source), Some(destination)) =
            (self.translated_source, self.translated_destination)
        else {
            return Ok(());
        };
        if self.fate == Fate::Stack {
            self.because.extend(forwarding_off(facts, source.is_ipv4()));
        }
        let mut routes = Routes::open()?;
        let own = facts.addresses.iter().any(|of| of.ip == source.ip());
        // From an own address the kernel would take it for spoofed; the datapath asks without that check.
        let route = if own {
            routes.to(destination.ip())?
        } else {
            routes.forwarded(source.ip(), destination.ip(), ingress)?
        };
        let hop = match route {
            Route::Out(hop) => hop,
            Route::Local => {
                self.because
                    .push(format!("{} is this gateway itself", destination.ip()));
                return Ok(());
            }
            Route::None(why) => {
                self.because.push(format!(
                    "the kernel has no way to {}: {why}",
                    destination.ip()
                ));
                return Ok(());
            }
        };
        let ip = hop.neighbour(destination.ip());
        let known = facts
            .neighbours
            .iter()
            .find(|neighbour| neighbour.ip == ip && neighbour.ifindex == hop.ifindex);
        if known.is_some_and(|neighbour| neighbour.state == Resolution::Failed) {
            self.because.push(format!(
                "{ip} has not answered when it was asked for its MAC address"
            ));
        }
        let is_resolved = !self.reasons.contains(&Event::Resolved.name());
        let found = self.next_hop.take().and_then(|hop| hop.mac);
        self.next_hop = Some(NextHop {
            ip,
            mac: found
                .filter(|_| is_resolved)
                .or_else(|| known.and_then(|of| of.mac).map(mac_text)),
        });
        self.egress = Some(facts.interface_name(hop.ifindex));
        self.egress_index = Some(hop.ifindex);
        Ok(())
    }
}

/// What the kernel does not say of itself when it is asked for a route.
fn forwarding_off(facts: &Facts, ipv4: bool) -> Option<String> {
    let (family, setting) = if ipv4 {
        ("IPv4", "net/ipv4/ip_forward")
    } else {
        ("IPv6", "net/ipv6/conf/all/forwarding")
    };
    let is_off = facts.sysctl(setting) == Some("0");
    is_off.then(|| format!("the kernel forwards no {family}"))
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What a program's return value says.
fn fate(program: &str, code: u32) -> Fate {
    /// `XDP_REDIRECT` and `XDP_PASS` of the kernel.
    const XDP: [u32; 2] = [4, 2];
    /// `TC_ACT_REDIRECT` and `TC_ACT_UNSPEC` (-1) of the kernel.
    const TC: [u32; 2] = [7, u32::MAX];
    let [redirect, pass] = if program == names::PROGRAM_XDP {
        XDP
    } else {
        TC
    };
    if code == redirect {
        Fate::Forwarded
    } else if code == pass {
        Fate::Passed
    } else {
        Fate::Dropped
    }
}
