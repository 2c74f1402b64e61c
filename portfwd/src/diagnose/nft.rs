//! nftables as `nft -j list ruleset` prints it, and what it would do to a packet.
//!
//! The judgement is cautious: of a match that is not understood the truth is unknown, and a packet is only said to be dropped
//! when no such match could have saved it.

use std::net::IpAddr;

use portfwd_common::abi::Protocol;
use serde_json::Value;

use super::nft_match::{Truth, truth_of};

/// Chains and flowtables.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Firewall {
    chains: Vec<Chain>,
    /// Flowtables that are done in hardware, with their interfaces.
    pub offloaded: Vec<(String, Vec<String>)>,
}

#[derive(Clone, Debug, PartialEq)]
struct Chain {
    family: String,
    table: String,
    name: String,
    base: Option<Base>,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq)]
struct Base {
    hook: String,
    priority: i64,
    drops: bool,
    devices: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct Rule {
    handle: u64,
    expressions: Vec<Value>,
}

/// A packet as a chain would see it. What is `None` is not known.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The interface it came in by.
    pub ingress: Option<&'a str>,
    /// The interface it goes out by.
    pub egress: Option<&'a str>,
    /// Where it goes.
    pub destination: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

/// A rule, or a chain's policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Family, table and chain, as `nft` takes them.
    pub chain: String,
    /// The rule's handle; `None` is the chain's policy.
    pub handle: Option<u64>,
    /// Whether the rule says anything about address or port of the destination.
    pub specific: bool,
}

/// What becomes of a packet in the chains of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is dropped here.
    Drops(Place),
    /// It passes, or that is not known.
    Passes,
}

/// Where the chains of a list of rules lead.
enum End {
    Accept,
    Drop(Option<Rule>),
    /// On to what called the chain.
    Continue,
    /// A match that is not understood decides.
    Unknown,
}

/// Chains that call chains are followed this far; the kernel allows 16.
const DEPTH: usize = 16;

impl Firewall {
    /// Reads what `nft -j list ruleset` prints.
    pub fn parse(json: &Value) -> Self {
        let objects = json["nftables"].as_array().map_or(&[][..], Vec::as_slice);
        let mut firewall = Self::default();
        for object in objects {
            if let Some(chain) = object.get("chain") {
                firewall.chains.extend(Chain::parse(chain));
            } else if let Some(table) = object.get("flowtable") {
                firewall.offloaded.extend(offloaded(table));
            }
        }
        for rule in objects.iter().filter_map(|object| object.get("rule")) {
            let home = firewall.chains.iter_mut().find(|chain| {
                rule["family"] == chain.family.as_str()
                    && rule["table"] == chain.table.as_str()
                    && rule["chain"] == chain.name.as_str()
            });
            if let (Some(chain), Some(rule)) = (home, Rule::parse(rule)) {
                chain.rules.push(rule);
            }
        }
        firewall
    }

    /// Whether there are chains of the device family whose devices are not told: nftables 1.0.6 leaves them out of its JSON.
    pub fn lacks_devices(&self) -> bool {
        let bases = self.chains.iter().filter(|chain| chain.family == "netdev");
        bases
            .filter_map(|chain| chain.base.as_ref())
            .any(|base| base.devices.is_empty())
    }

    /// Takes the devices from what `nft list chains netdev` prints.
    pub fn read_devices(&mut self, text: &str) {
        let (mut table, mut chain) = ("", "");
        for line in text.lines().map(str::trim) {
            let words: Vec<_> = line.split_whitespace().collect();
            match words.as_slice() {
                ["table", "netdev", name, ..] => table = name,
                ["chain", name, ..] => chain = name,
                ["type", _, "hook", _, "device" | "devices", devices @ ..] => {
                    let names = devices.iter().take_while(|word| **word != "priority");
                    let names = names.map(|word| word.trim_matches(['"', ',', '{', '}', '=']));
                    let base = self.chains.iter_mut().find_map(|of| {
                        let is_it = of.family == "netdev" && of.table == table && of.name == chain;
                        of.base.as_mut().filter(|_| is_it)
                    });
                    if let Some(base) = base {
                        let names = names.filter(|name| !name.is_empty());
                        base.devices = names.map(str::to_owned).collect();
                    }
                }
                _ => {}
            }
        }
    }

    /// What the chains of a hook of the IP families would do to a packet.
    pub fn judge(&self, hook: &str, probe: &Probe<'_>) -> Judgement {
        let family = if probe.destination.is_ipv4() {
            "ip"
        } else {
            "ip6"
        };
        self.first_drop(probe, |chain, base| {
            base.hook == hook && (chain.family == "inet" || chain.family == family)
        })
    }

    /// What the chains of the device family would do to a packet on its way out of its egress interface.
    pub fn judge_egress(&self, probe: &Probe<'_>) -> Judgement {
        self.first_drop(probe, |chain, base| {
            chain.family == "netdev"
                && base.hook == "egress"
                && base
                    .devices
                    .iter()
                    .any(|device| Some(device.as_str()) == probe.egress)
        })
    }

    /// Rules that give a packet's destination to another machine, in the chains of the prerouting hook.
    pub fn destination_nat(&self, probe: &Probe<'_>) -> Option<Place> {
        let family = if probe.destination.is_ipv4() {
            "ip"
        } else {
            "ip6"
        };
        let chains = self.chains.iter().filter(|chain| {
            let is_hooked = chain
                .base
                .as_ref()
                .is_some_and(|base| base.hook == "prerouting");
            is_hooked && (chain.family == "inet" || chain.family == family)
        });
        for chain in chains {
            let found = chain.rules.iter().find(|rule| {
                let translates = |expression: &Value| {
                    expression.get("dnat").is_some() || expression.get("redirect").is_some()
                };
                rule.expressions.iter().any(translates)
                    && rule.truth(probe) == Truth::Yes
                    && rule.is_specific()
            });
            if let Some(rule) = found {
                return Some(chain.place(Some(rule)));
            }
        }
        None
    }

    /// The rules of the postrouting hook that hide sources behind an interface's own address, each with the ports it takes, if it
    /// names any.
    pub fn masquerades(&self, egress: &str) -> Vec<(Place, Option<(u16, u16)>)> {
        let mut found = Vec::new();
        for chain in &self.chains {
            if chain
                .base
                .as_ref()
                .is_none_or(|base| base.hook != "postrouting")
            {
                continue;
            }
            for rule in &chain.rules {
                let statement = rule.expressions.iter().find_map(|expression| {
                    expression
                        .get("masquerade")
                        .or_else(|| expression.get("snat"))
                });
                if let Some(statement) = statement
                    && rule.may_leave_by(egress)
                {
                    found.push((chain.place(Some(rule)), port_range(&statement["port"])));
                }
            }
        }
        found
    }

    fn first_drop(&self, probe: &Probe<'_>, applies: impl Fn(&Chain, &Base) -> bool) -> Judgement {
        let mut chains: Vec<_> = self
            .chains
            .iter()
            .filter_map(|chain| Some((chain, chain.base.as_ref()?)))
            .filter(|(chain, base)| applies(chain, base))
            .collect();
        chains.sort_by_key(|(_, base)| base.priority);
        for (chain, base) in chains {
            let place = match self.run(chain, probe, DEPTH) {
                End::Drop(rule) => chain.place(rule.as_ref()),
                End::Continue if base.drops => chain.place(None),
                End::Accept | End::Continue | End::Unknown => continue,
            };
            return Judgement::Drops(place);
        }
        Judgement::Passes
    }

    fn run(&self, chain: &Chain, probe: &Probe<'_>, depth: usize) -> End {
        if depth == 0 {
            return End::Unknown;
        }
        // Whether a rule that is not understood may have ended it already.
        let mut maybe_over = false;
        for rule in &chain.rules {
            let truth = rule.truth(probe);
            if truth == Truth::No {
                continue;
            }
            let end = match rule.verdict(probe) {
                Verdict::Accept => End::Accept,
                Verdict::Drop => End::Drop(Some(rule.clone())),
                Verdict::Jump(name) => self.call(chain, &name, probe, depth),
                Verdict::Return => {
                    return if maybe_over {
                        End::Unknown
                    } else {
                        End::Continue
                    };
                }
                Verdict::Unknown => End::Unknown,
                Verdict::None => End::Continue,
            };
            match (truth, end) {
                (_, End::Continue) => {}
                (Truth::Yes, End::Drop(_)) if maybe_over => return End::Unknown,
                (Truth::Yes, end @ (End::Accept | End::Drop(_))) => return end,
                // Whether it is dropped here makes no difference to whether it is dropped later.
                (Truth::Unknown, End::Drop(_)) => {}
                (Truth::Yes | Truth::Unknown, _) => maybe_over = true,
                (Truth::No, _) => {}
            }
        }
        if maybe_over {
            End::Unknown
        } else {
            End::Continue
        }
    }

    fn call(&self, from: &Chain, name: &str, probe: &Probe<'_>, depth: usize) -> End {
        self.chains
            .iter()
            .find(|chain| {
                chain.family == from.family && chain.table == from.table && chain.name == name
            })
            .map_or(End::Unknown, |chain| self.run(chain, probe, depth - 1))
    }
}

/// What a rule does with a packet that it matches.
enum Verdict {
    Accept,
    Drop,
    Jump(String),
    Return,
    Unknown,
    None,
}

impl Chain {
    fn parse(json: &Value) -> Option<Self> {
        let text = |key: &str| Some(json.get(key)?.as_str()?.to_owned());
        let base = text("hook").map(|hook| Base {
            hook,
            priority: json["prio"].as_i64().unwrap_or_default(),
            drops: json["policy"] == "drop",
            devices: names(&json["dev"]),
        });
        Some(Self {
            family: text("family")?,
            table: text("table")?,
            name: text("name")?,
            base,
            rules: Vec::new(),
        })
    }

    fn place(&self, rule: Option<&Rule>) -> Place {
        Place {
            chain: format!("{} {} {}", self.family, self.table, self.name),
            handle: rule.map(|rule| rule.handle),
            specific: rule.is_some_and(Rule::is_specific),
        }
    }
}

impl Rule {
    fn parse(json: &Value) -> Option<Self> {
        Some(Self {
            handle: json["handle"].as_u64()?,
            expressions: json["expr"].as_array()?.clone(),
        })
    }

    fn truth(&self, probe: &Probe<'_>) -> Truth {
        self.expressions
            .iter()
            .map(|expression| truth_of(expression, probe))
            .fold(Truth::Yes, Truth::and)
    }

    fn verdict(&self, probe: &Probe<'_>) -> Verdict {
        for expression in &self.expressions {
            if let Some(map) = expression.get("vmap") {
                return super::nft_match::mapped(map, probe).map_or(Verdict::Unknown, |found| {
                    found.map_or(Verdict::None, verdict)
                });
            }
            match verdict(expression) {
                Verdict::None => {}
                found @ (Verdict::Accept
                | Verdict::Drop
                | Verdict::Jump(_)
                | Verdict::Return
                | Verdict::Unknown) => return found,
            }
        }
        Verdict::None
    }

    /// Whether it says anything about the destination's address or port.
    fn is_specific(&self) -> bool {
        self.expressions.iter().any(|expression| {
            let field = &expression["match"]["left"]["payload"]["field"];
            field == "daddr" || field == "dport"
        })
    }

    /// Whether it does not exclude packets that leave by an interface.
    fn may_leave_by(&self, egress: &str) -> bool {
        self.expressions.iter().all(|expression| {
            let key = &expression["match"]["left"]["meta"]["key"];
            let (op, right) = (&expression["match"]["op"], &expression["match"]["right"]);
            let is_egress = key == "oifname" || key == "oif";
            !is_egress || *op != "==" || !right.is_string() || *right == egress
        })
    }
}

/// A statement's verdict.
fn verdict(statement: &Value) -> Verdict {
    let Some((name, argument)) = statement
        .as_object()
        .and_then(|object| object.iter().next())
    else {
        return Verdict::None;
    };
    match name.as_str() {
        "accept" => Verdict::Accept,
        "drop" | "reject" => Verdict::Drop,
        "return" => Verdict::Return,
        "jump" | "goto" => argument["target"]
            .as_str()
            .map_or(Verdict::Unknown, |target| Verdict::Jump(target.to_owned())),
        "queue" | "tproxy" | "synproxy" => Verdict::Unknown,
        _ => Verdict::None,
    }
}

fn offloaded(table: &Value) -> Option<(String, Vec<String>)> {
    let is_offloaded = names(&table["flags"]).iter().any(|flag| flag == "offload");
    let name = format!(
        "{} {} {}",
        table["family"].as_str()?,
        table["table"].as_str()?,
        table["name"].as_str()?
    );
    is_offloaded.then(|| (name, names(&table["dev"])))
}

/// A name, or a list of them.
fn names(json: &Value) -> Vec<String> {
    match json {
        Value::String(name) => vec![name.clone()],
        Value::Array(list) => list
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
    }
}

fn port_range(json: &Value) -> Option<(u16, u16)> {
    let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
    match json.get("range") {
        Some(range) => Some((port(&range[0])?, port(&range[1])?)),
        None => port(json).map(|port| (port, port)),
    }
}

#[cfg(test)]
#[path = "nft_tests.rs"]
mod tests;
