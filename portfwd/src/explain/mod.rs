//! `portfwd explain`: what would happen to a packet and to the answer to it, and why.
//!
//! The packet is put before a private copy of the programs and tables ([`crate::bpf::rehearsal`]); the answer that its target
//! would give is put before the copy after it. What the programs cannot know, the kernel is asked: routes, neighbours,
//! nftables.

mod leg;
mod packet;
mod words;

use std::net::{IpAddr, SocketAddr};

use anyhow::Context;
use portfwd_common::abi::{Protocol, Role};
use serde::Serialize;

pub use self::leg::{Fate, Leg, NextHop};
use self::packet::{Packet, Part};
use crate::{
    bpf::{Flow, Pins, Tables, rehearsal::Rehearsal},
    control::protocol::Traffic,
    diagnose::{Facts, Finding, RuleFacts, Severity, Side, diagnose},
    failure::{Failure, Kind, Result},
    instance::Instance,
    netlink::{
        device::Device,
        route::{Route, Routes},
    },
    ruleset::RuleProtocol,
};

/// A packet to explain.
#[derive(Clone, Debug)]
pub struct Question {
    /// TCP, UDP or echo.
    pub protocol: Protocol,
    /// Who dials; of echo, with the identifier in the place of the port.
    pub client: SocketAddr,
    /// What is dialled; of echo, with [`portfwd_common::abi::rule::ECHO_PORT`].
    pub listen: SocketAddr,
    /// The interface it comes in by; otherwise the one on the way to the client.
    pub ingress: Option<String>,
}

/// Answer to `explain`.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// `tcp`, `udp` or `icmp`.
    pub proto: RuleProtocol,
    /// Who dials; of echo, with the identifier in the place of the port.
    pub client: SocketAddr,
    /// What is dialled; the port of echo is 0.
    pub listen: SocketAddr,
    /// The rule that takes the packet.
    pub rule: Option<RuleSummary>,
    /// The flow that the packet belongs to; `None` if it would be the first of one.
    pub flow: Option<FlowSummary>,
    /// The packet.
    pub there: Leg,
    /// The answer to it; `None` if the packet does not reach a target.
    pub back: Option<Leg>,
    /// What the gateway does with it, put together.
    pub conclusion: Conclusion,
    /// What is in the way, the most telling first.
    pub problems: Vec<String>,
    /// What `doctor` calls an error.
    pub findings: Vec<Finding>,
    /// Whether the programs that are attached are those that were tried.
    pub same_build: bool,
}

/// The whole in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Conclusion {
    /// Both ways are open, and the target has answered before.
    Works,
    /// Both ways are open; no packet of the target was ever seen.
    Unproven,
    /// Something is in the way.
    Fails,
}

/// The rule that takes a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleSummary {
    /// Its number.
    pub id: u32,
    /// Number and name.
    pub label: String,
    /// What it listens on.
    pub listen: String,
    /// Where it forwards to.
    pub target: String,
    /// What has gone to the target.
    pub to_target: Traffic,
    /// What has come back.
    pub to_client: Traffic,
}

/// A flow that is there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FlowSummary {
    /// What it is doing.
    pub state: &'static str,
    /// Seconds since its first packet.
    pub age_s: f64,
    /// Seconds since its last.
    pub idle_s: f64,
    /// From the client.
    pub to_target: Traffic,
    /// To the client.
    pub to_client: Traffic,
}

/// Explains a packet. The thread must be in the instance's network namespace.
pub fn explain(instance: &Instance, facts: &Facts, question: &Question) -> Result<Explanation> {
    let pins = Pins::new(&instance.pins());
    if !pins.exist() {
        let failure = format!("nothing of instance {} is attached", instance.name());
        return Err(Failure::new(Kind::NotRunning, failure)
            .hint("`portfwd run --wan IF --lan IF` starts it"));
    }
    let tables = Tables::open_pinned(&instance.pins())?;
    let rules = tables.rules()?;
    let flow = find_flow(&tables, question)?;
    let packet = Packet {
        protocol: question.protocol,
        source: question.client,
        destination: question.listen,
        part: if flow.is_some() {
            Part::Belongs
        } else {
            Part::Opens
        },
    };
    let ways = facts.sides.iter().filter_map(|side| {
        let device = facts.device(&side.name)?;
        Some(leg::all_programs(
            side.mode.as_deref()?,
            device.link.layer,
            question.listen.ip(),
        ))
    });
    let mut programs: Vec<_> = ways.flatten().collect();
    programs.sort_unstable();
    programs.dedup();
    let mut rehearsal = Rehearsal::of(&pins, &rules, &programs)?;
    let there = there(&mut rehearsal, facts, question, &packet)?;
    let back = back(&mut rehearsal, facts, &packet, &there)?;
    let rule_id = there.counter.and_then(|counter| {
        let holds = |rule: &portfwd_common::abi::Rule| {
            let end = rule.counter_base + rule.counters();
            (rule.counter_base..end).contains(&counter)
        };
        rules
            .iter()
            .find(|(_, rule)| holds(rule))
            .map(|(_, rule)| rule.id)
    });
    let rule = rule_id.and_then(|id| facts.rules.iter().find(|rule| rule.id == id));
    let findings: Vec<_> = diagnose(facts)
        .findings
        .into_iter()
        .filter(|finding| finding.severity == Severity::Error)
        .collect();
    let mut explanation = Explanation {
        proto: question.protocol.into(),
        client: question.client,
        listen: question.listen,
        rule: rule.map(RuleSummary::of),
        flow: flow.as_ref().map(FlowSummary::of),
        there,
        back,
        conclusion: Conclusion::Fails,
        problems: Vec::new(),
        findings,
        same_build: rehearsal.is_same_build(&pins)?,
    };
    explanation.conclude(facts);
    Ok(explanation)
}

fn find_flow(tables: &Tables, question: &Question) -> Result<Option<Flow>> {
    let is_it = |flow: &Flow| {
        flow.protocol == question.protocol
            && flow.client == question.client
            && flow.listen == question.listen
    };
    Ok(tables.flows()?.into_iter().find(is_it))
}

/// An interface and, if it is attached, how.
fn attached<'a>(facts: &'a Facts, device: &Device) -> Option<(&'a Side, &'a str)> {
    let side = facts.side(device.link.ifindex)?;
    Some((side, side.mode.as_deref()?))
}

/// The packet of the client.
fn there(
    rehearsal: &mut Rehearsal,
    facts: &Facts,
    question: &Question,
    packet: &Packet,
) -> Result<Leg> {
    let (device, how) = match &question.ingress {
        Some(name) => {
            let device = facts.device(name).ok_or_else(|| {
                Failure::new(Kind::NotFound, format!("interface {name} does not exist"))
                    .hint("`ip -brief link` lists those that do")
            })?;
            (device, "it comes in there")
        }
        None => match Routes::open()?.to(question.client.ip())? {
            Route::Out(hop) => {
                let device = facts
                    .device_at(hop.ifindex)
                    .context("the interface is gone")?;
                (device, "the gateway's way to the client")
            }
            Route::Local => {
                let why = format!(
                    "{} is the gateway itself: what it dials never comes in by an interface",
                    question.client.ip()
                );
                return Ok(Leg::unseen("lo", packet, why));
            }
            Route::None(why) => {
                let client = question.client.ip();
                let why = format!("the gateway has no way to the client {client}: {why}");
                return Ok(Leg::unseen("none", packet, why));
            }
        },
    };
    let Some((_, mode)) = attached(facts, device) else {
        let name = &device.link.name;
        let why = format!("portfwd is not attached to {name} ({how}): it never sees the packet");
        return Ok(Leg::unseen(name, packet, why));
    };
    Ok(Leg::run(rehearsal, facts, device, mode, packet)?)
}

/// The target's answer.
fn back(
    rehearsal: &mut Rehearsal,
    facts: &Facts,
    packet: &Packet,
    there: &Leg,
) -> Result<Option<Leg>> {
    let (Some(source), Some(destination), Some(egress)) = (
        there.translated_source,
        there.translated_destination,
        there.egress_index,
    ) else {
        return Ok(None);
    };
    let answer = Packet {
        protocol: packet.protocol,
        source: destination,
        destination: source,
        part: match packet.part {
            Part::Opens => Part::Accepts,
            Part::Accepts | Part::Belongs => Part::Belongs,
        },
    };
    let device = facts.device_at(egress).context("the interface is gone")?;
    let Some((_, mode)) = attached(facts, device) else {
        let name = &device.link.name;
        let why = format!(
            "portfwd is not attached to {name}, by which the answers of {} come in: they leave untranslated",
            destination.ip()
        );
        return Ok(Some(Leg::unseen(name, &answer, why)));
    };
    Ok(Some(Leg::run(rehearsal, facts, device, mode, &answer)?))
}

impl Explanation {
    /// Puts what was found together.
    fn conclude(&mut self, facts: &Facts) {
        let mut problems = Vec::new();
        if self.there.fate != Fate::Forwarded {
            problems.push(sentence("the packet", &self.there));
            if self.rule.is_none() {
                problems.extend(self.near_misses(facts));
            }
        }
        if let Some(back) = &self.back
            && back.fate != Fate::Forwarded
        {
            problems.push(sentence("the answer", back));
        }
        if let Some(back) = &self.back
            && back.fate == Fate::Forwarded
            && back.translated_source != Some(self.listen)
        {
            problems.push(format!(
                "the answer leaves with another source than {}, which the client does not expect",
                self.listen
            ));
        }
        let asked = self
            .there
            .because
            .iter()
            .chain(self.back.iter().flat_map(|back| &back.because));
        problems.extend(
            asked
                .filter(|words| words.contains("has not answered when it was asked"))
                .cloned(),
        );
        problems.extend(self.firewall());
        problems.extend(self.interfaces());
        let answered = self
            .rule
            .as_ref()
            .is_some_and(|rule| rule.to_client.packets > 0);
        let is_open = problems.is_empty();
        if let Some(rule) = &self.rule
            && !answered
            && rule.to_target.packets > 0
        {
            problems.push(format!(
                "{} packets of this rule went to {} and none ever came back: nothing serves the port there, or the answers take another way",
                rule.to_target.packets, rule.target
            ));
        }
        self.conclusion = match (is_open, answered) {
            (false, _) => Conclusion::Fails,
            (true, true) => Conclusion::Works,
            (true, false) => Conclusion::Unproven,
        };
        problems.dedup();
        self.problems = problems;
    }

    /// What comes closest to a rule for the packet, and why it is none.
    fn near_misses(&self, facts: &Facts) -> Vec<String> {
        let mut misses = Vec::new();
        let address = self.listen.ip();
        let port = self.listen.port();
        let is_wan_address = facts.wan_addresses().any(|own| own == address);
        if facts.device(&self.there.ingress).is_some()
            && let Some(side) = facts
                .sides
                .iter()
                .find(|side| side.name == self.there.ingress)
            && side.role == Role::Lan
        {
            misses.push(format!(
                "it comes in by {}, a LAN interface; rules listen on the WAN side",
                side.name
            ));
        }
        for rule in &facts.rules {
            let ports = rule.listen.ports;
            if !(ports.first()..=ports.last()).contains(&port) {
                continue;
            }
            let label = &rule.label;
            let same_family = rule.target.address.is_ipv4() == address.is_ipv4();
            let protocols = rule.protocol.protocols();
            if !protocols
                .iter()
                .any(|protocol| RuleProtocol::from(*protocol) == self.proto)
            {
                misses.push(format!(
                    "rule {label} listens on this port for {} only",
                    rule.protocol.word()
                ));
            } else if !same_family {
                let family = if rule.target.address.is_ipv4() {
                    "IPv4"
                } else {
                    "IPv6"
                };
                misses.push(format!(
                    "rule {label} listens on this port for {family} only"
                ));
            } else if let Some(other) = rule.listen.address.filter(|other| *other != address) {
                misses.push(format!("rule {label} listens on {other} only"));
            } else if rule.listen.address.is_none() && !is_wan_address {
                misses.push(format!(
                    "rule {label} listens on the addresses of the WAN interfaces, and {address} is none of them"
                ));
            }
        }
        for (rule, why) in &facts.closed {
            let ports = rule.listen.ports;
            let is_listening = (ports.first()..=ports.last()).contains(&port)
                && rule.listen.address.is_none_or(|listen| listen == address)
                && rule.target.address.is_ipv4() == address.is_ipv4();
            if is_listening {
                misses.push(format!("rule {} listens there, but {why}", rule.label));
            }
        }
        if misses.is_empty() && facts.rules.is_empty() {
            misses.push("there are no rules".to_owned());
        }
        misses
    }

    /// What is wrong with the interfaces that the packets pass, which the programs alone cannot see.
    fn interfaces(&self) -> Vec<String> {
        let legs = [Some(&self.there), self.back.as_ref()];
        let passed: Vec<_> = legs
            .into_iter()
            .flatten()
            .flat_map(|leg| [Some(&leg.ingress), leg.egress.as_ref()])
            .flatten()
            .collect();
        let about = |finding: &&Finding| {
            let subject = finding.subject.split(' ').next();
            subject.is_some_and(|word| passed.iter().any(|name| *name == word))
        };
        self.findings
            .iter()
            .filter(about)
            .map(|finding| format!("{}: {}", finding.subject, finding.cause))
            .collect()
    }

    /// What nftables does to packets that TC sends.
    fn firewall(&self) -> Option<String> {
        let dropped = self
            .findings
            .iter()
            .find(|finding| finding.id == "firewall-drops-forwarded")?;
        let rule = self.rule.as_ref()?;
        dropped
            .cause
            .contains(&rule.label)
            .then(|| format!("nftables drops it on its way out: {}", dropped.subject))
    }
}

/// What became of a packet that was not sent.
fn sentence(what: &str, leg: &Leg) -> String {
    let because = leg.because.join("; ");
    match leg.fate {
        Fate::Forwarded => format!("{what} is forwarded"),
        Fate::Stack => format!("{what} is translated and given to the kernel: {because}"),
        Fate::Passed => format!("{what} is left to the gateway itself: {because}"),
        Fate::Dropped => format!("{what} is dropped: {because}"),
        Fate::Unseen => because,
    }
}

impl RuleSummary {
    fn of(rule: &RuleFacts) -> Self {
        Self {
            id: rule.id,
            label: rule.label.clone(),
            listen: format!("{} {}", rule.protocol.word(), rule.listen),
            target: rule.target.to_string(),
            to_target: rule.to_target,
            to_client: rule.to_client,
        }
    }
}

impl FlowSummary {
    fn of(flow: &Flow) -> Self {
        Self {
            state: flow.state,
            age_s: flow.age.as_secs_f64(),
            idle_s: flow.idle.as_secs_f64(),
            to_target: flow.to_target.into(),
            to_client: flow.to_client.into(),
        }
    }
}

/// The first address of the WAN interfaces of a family: what is dialled if only a port is named.
pub fn default_listen(facts: &Facts, like: IpAddr) -> Option<IpAddr> {
    facts
        .wan_addresses()
        .find(|own| own.is_ipv4() == like.is_ipv4())
}
