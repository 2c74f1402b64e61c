//! `portfwd check-port`: whether a published port answers.
//!
//! From inside the gateway the whole path is walked: rule, datapath, target, answer. From outside only another machine can
//! tell: [`helper`] dials the port and says what came of it.

pub mod helper;
mod target;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::Serialize;

use self::helper::Answer;
use crate::{
    diagnose::Facts,
    explain::{Explanation, Fate, Question, default_listen, explain},
    failure::Result,
    instance::Instance,
    ruleset::RuleProtocol,
    transport::Transport,
};

/// A port to check.
#[derive(Clone, Debug)]
pub struct Port {
    /// TCP or UDP.
    pub protocol: Transport,
    /// The port.
    pub port: u16,
    /// The address; otherwise the WAN's first of every family that a rule listens on.
    pub listen: Option<IpAddr>,
    /// The other machine.
    pub helper: Option<SocketAddr>,
}

/// Answer to `check-port`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `tcp` or `udp`.
    pub proto: RuleProtocol,
    /// The port.
    pub port: u16,
    /// Whether it answers, as far as could be looked.
    pub answers: bool,
    /// By address.
    pub checks: Vec<Check>,
}

/// What was found about one address.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was dialled.
    pub listen: SocketAddr,
    /// The path from the inside, step by step.
    pub inside: Vec<Step>,
    /// What the other machine says; `None` if there is none.
    pub outside: Option<Outside>,
}

/// A step of the path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// `rule`, `packet`, `neighbour`, `target` or `answer`.
    pub step: &'static str,
    /// How it stands.
    pub state: State,
    /// In words.
    pub detail: String,
}

/// How a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Good.
    Good,
    /// It fails.
    Bad,
    /// It cannot be told.
    Unknown,
}

/// What the other machine says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Outside {
    /// The other machine.
    pub helper: SocketAddr,
    /// How it stands.
    pub state: State,
    /// In words.
    pub detail: String,
}

/// Clients in the internet: networks for documentation.
const CLIENT_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const CLIENT_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x3fff, 0xfff, 0, 0, 0, 0, 0, 1));
/// A client's port: which it is makes no difference.
const CLIENT_PORT: u16 = 40_000;

/// Checks a port. The thread must be in the instance's network namespace.
pub async fn check(instance: &Instance, facts: &Facts, question: &Port) -> Result<Report> {
    let mut checks = Vec::new();
    for address in addresses(facts, question) {
        checks.push(check_address(instance, facts, question, address).await?);
    }
    Ok(Report {
        proto: question.protocol.into(),
        port: question.port,
        answers: !checks.is_empty() && checks.iter().all(Check::answers),
        checks,
    })
}

/// What to dial: of every family that a rule listens on the port in, the address that the rule names or the WAN's first.
fn addresses(facts: &Facts, question: &Port) -> Vec<IpAddr> {
    if let Some(address) = question.listen {
        return vec![address];
    }
    let mut addresses = Vec::new();
    for like in [CLIENT_V4, CLIENT_V6] {
        let rules = facts.rules.iter().filter(|rule| {
            let ports = rule.listen.ports;
            rule.target.address.is_ipv4() == like.is_ipv4()
                && rule
                    .protocol
                    .protocols()
                    .contains(&question.protocol.protocol())
                && (ports.first()..=ports.last()).contains(&question.port)
        });
        // One for everything else is the last to be asked.
        let rule = rules.min_by_key(|rule| rule.protocol == RuleProtocol::Dmz);
        let listen = rule.map(|rule| rule.listen.address);
        addresses.extend(listen.and_then(|named| named.or_else(|| default_listen(facts, like))));
    }
    if addresses.is_empty() {
        // To say that there is no rule, and what comes closest.
        addresses
            .extend(default_listen(facts, CLIENT_V4).or_else(|| default_listen(facts, CLIENT_V6)));
    }
    addresses
}

async fn check_address(
    instance: &Instance,
    facts: &Facts,
    question: &Port,
    address: IpAddr,
) -> Result<Check> {
    let helper = question
        .helper
        .filter(|helper| helper.is_ipv4() == address.is_ipv4());
    let stranger = if address.is_ipv4() {
        CLIENT_V4
    } else {
        CLIENT_V6
    };
    let listen = SocketAddr::new(address, question.port);
    let asked = Question {
        protocol: question.protocol.protocol(),
        client: SocketAddr::new(helper.map_or(stranger, |helper| helper.ip()), CLIENT_PORT),
        listen,
        ingress: None,
    };
    let explanation = explain(instance, facts, &asked)?;
    let mut inside = vec![rule(&explanation), packet(&explanation)];
    if let Some(target) = explanation.there.translated_destination {
        inside.extend(
            target::reach(
                question.protocol,
                target,
                explanation.there.egress.as_deref(),
            )
            .await?,
        );
        inside.push(answer(&explanation));
    }
    let outside = match helper {
        Some(helper) => Some(ask_helper(helper, question.protocol, listen).await),
        None => None,
    };
    Ok(Check {
        listen,
        inside,
        outside,
    })
}

impl Check {
    /// Whether it answers: as the other machine says, or else as far as can be seen from inside.
    fn answers(&self) -> bool {
        match &self.outside {
            Some(outside) => outside.state == State::Good,
            None => self.inside.iter().all(|step| step.state != State::Bad),
        }
    }
}

fn rule(explanation: &Explanation) -> Step {
    let (state, detail) = match &explanation.rule {
        Some(rule) => (
            State::Good,
            format!("{}: {} -> {}", rule.label, rule.listen, rule.target),
        ),
        None => (
            State::Bad,
            explanation
                .problems
                .first()
                .cloned()
                .unwrap_or_else(|| "none".to_owned()),
        ),
    };
    Step {
        step: "rule",
        state,
        detail,
    }
}

fn packet(explanation: &Explanation) -> Step {
    let there = &explanation.there;
    let (state, detail) = match (there.fate, &there.egress) {
        (Fate::Forwarded, Some(egress)) => (
            State::Good,
            format!("in by {}, forwarded out by {egress}", there.ingress),
        ),
        (Fate::Forwarded | Fate::Stack | Fate::Passed | Fate::Dropped | Fate::Unseen, _) => {
            (State::Bad, explanation.problems.join("; "))
        }
    };
    Step {
        step: "packet",
        state,
        detail,
    }
}

fn answer(explanation: &Explanation) -> Step {
    let counted = explanation
        .rule
        .as_ref()
        .map_or(0, |rule| rule.to_client.packets);
    let (state, detail) = match &explanation.back {
        Some(back) if back.fate == Fate::Forwarded => (
            State::Good,
            format!(
                "would be forwarded by {} if it comes back through this gateway; {counted} packets of this rule have",
                back.ingress
            ),
        ),
        Some(back) => (State::Bad, back.because.join("; ")),
        None => (State::Unknown, "the kernel decides".to_owned()),
    };
    Step {
        step: "answer",
        state,
        detail,
    }
}

async fn ask_helper(helper: SocketAddr, protocol: Transport, listen: SocketAddr) -> Outside {
    let (state, detail) = match helper::ask(helper, protocol, listen).await {
        Ok(answer) => judge(&answer, protocol),
        Err(error) => (
            State::Unknown,
            format!("the helper could not be asked: {error:#}"),
        ),
    };
    Outside {
        helper,
        state,
        detail,
    }
}

fn judge(answer: &Answer, protocol: Transport) -> (State, String) {
    match (answer, protocol) {
        (Answer::Open, _) => (State::Good, "answers".to_owned()),
        (Answer::Refused, _) => (State::Bad, "refused: nothing serves the port".to_owned()),
        (Answer::Silent, Transport::Tcp) => (State::Bad, "no answer".to_owned()),
        // Many services do not answer what they do not understand.
        (Answer::Silent, Transport::Udp) => (
            State::Unknown,
            "no answer, which of a UDP service says nothing".to_owned(),
        ),
        (Answer::Failed(why), _) => (State::Unknown, format!("the helper says: {why}")),
    }
}
