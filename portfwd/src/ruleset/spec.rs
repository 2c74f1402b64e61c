//! A rule as the operator writes it: PROTO LISTEN TARGET.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::LazyLock,
};

use jiff::Timestamp;
use portfwd_common::{
    abi,
    net::{Address, Family, Ipv4, Ipv6},
};

use super::{
    FlowPolicy, Host, Listen, PortRange, Refusal, RuleProtocol, RuleWords, Schedule, Source,
    Target, element, exceptions::Exception, lease::Expires, limits::Limits, movement::Opening,
    sources::Sources, track::Track,
};

/// A rule that is consistent in itself; whether it fits in with others is the ruleset's business.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RuleSpec {
    name: Option<Box<str>>,
    protocol: RuleProtocol,
    listen: Listen,
    target: Target,
    keeps_mss: bool,
    track: Track,
    flows: Option<FlowPolicy>,
    /// `None` if it says nothing of that: most of thousands of rules do not.
    rare: Option<Box<Rare>>,
}

/// What few rules say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Rare {
    host: Option<Host>,
    source: Source,
    notes: Notes,
    sources: Sources,
    limits: Limits,
    exceptions: Vec<Exception>,
}

/// What a rule says that says nothing of that.
static NOTHING: LazyLock<Rare> = LazyLock::new(Rare::default);

/// What a rule says beside what it does with packets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Notes {
    is_disabled: bool,
    comment: Option<String>,
    tags: Vec<String>,
    expires: Option<Expires>,
    schedule: Option<Schedule>,
}

/// Characters of a comment, at most.
const MAX_COMMENT: usize = 256;
const MAX_NAME: usize = 64;

impl RuleSpec {
    /// Reads what the operator wrote. Everything that can be refused without knowing other rules is
    /// refused here.
    pub fn parse(words: &RuleWords) -> Result<Self, Refusal> {
        let RuleWords {
            proto,
            listen,
            target,
            masquerade: _,
            snat: _,
            mss_clamp,
            track,
            name,
            flows,
            enabled,
            comment,
            tags,
            expires,
            schedule,
            family,
            resolved,
            from,
            not_from,
            rate: _,
            rate_per_source: _,
            max_flows: _,
            max_flows_per_source: _,
            source_prefix: _,
            except: _,
        } = words;
        let protocol: RuleProtocol = proto.parse()?;
        let listen: Listen = listen.parse()?;
        let (target, host) = Target::resolved(target, family.as_deref(), *resolved, listen.ports)?;
        if let Some(name) = name {
            check_name(name)?;
        }
        if let Some(address) = listen.address {
            check_unicast("LISTEN", address)?;
            if address.is_ipv4() != target.address.is_ipv4() {
                return Err(Refusal::FamilyMismatch {
                    listen: address,
                    target: target.address,
                });
            }
            if address == target.address {
                return Err(Refusal::TargetIsListen { address });
            }
        }
        check_unicast("TARGET", target.address)?;
        for ports in [listen.ports, target.ports] {
            let word = match protocol {
                RuleProtocol::Tcp | RuleProtocol::Udp | RuleProtocol::Both => None,
                RuleProtocol::Icmp => Some(PortRange::ECHO),
                RuleProtocol::Dmz => Some(PortRange::REST),
            };
            if word.map_or(!ports.has_numbers(), |word| ports != word) {
                return Err(Refusal::PortsOfProtocol { protocol, ports });
            }
        }
        if listen.ports.count() != target.ports.count() {
            return Err(Refusal::UnequalLength {
                listen: listen.ports,
                target: target.ports,
            });
        }
        let source = Source::parse(words, target.address)?;
        let sources = Sources::parse(from.as_deref(), not_from.as_deref(), target.family())?;
        let limits = Limits::parse(words, target.family())?;
        let flows = flows.as_deref().map(str::parse).transpose()?;
        let track: Track = track
            .as_deref()
            .map(str::parse)
            .transpose()?
            .unwrap_or_default();
        let is_limited = limits.lowered(target.family()).bind();
        track.check(protocol, source, is_limited, flows)?;
        let rare = Rare {
            host,
            source,
            notes: Notes {
                is_disabled: *enabled == Some(false),
                comment: comment.as_deref().map(check_comment).transpose()?,
                tags: check_tags(tags)?,
                expires: expires.as_deref().map(str::parse).transpose()?,
                schedule: schedule.as_deref().map(str::parse).transpose()?,
            },
            sources,
            limits,
            exceptions: Exception::parse_all(words, protocol)?,
        };
        let plain = Self {
            name: name.as_deref().map(Into::into),
            protocol,
            listen,
            target,
            keeps_mss: *mss_clamp == Some(false),
            track,
            flows,
            rare: None,
        };
        Ok(plain.saying(rare))
    }

    fn rare(&self) -> &Rare {
        self.rare.as_deref().unwrap_or(&NOTHING)
    }

    /// The same rule with other rare words.
    fn saying(self, rare: Rare) -> Self {
        let rare = (rare != *NOTHING).then(|| Box::new(rare));
        Self { rare, ..self }
    }

    /// Whether the words make sense, as far as can be told before a name is resolved.
    pub fn check(words: &RuleWords) -> Result<(), Refusal> {
        Self::on_paper(words).map(drop)
    }

    /// The rule, with an address that stands in for those of a name that is not resolved yet.
    pub fn on_paper(words: &RuleWords) -> Result<Self, Refusal> {
        /// Stand for the addresses of a name: addresses that nobody listens on (RFC 2544, RFC 6666).
        const STAND_INS: [IpAddr; 2] = [
            IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1)),
            IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1)),
        ];
        match Self::parse(words) {
            Err(Refusal::Unresolved { .. }) => {
                let parse = |address| {
                    Self::parse(&RuleWords {
                        resolved: Some(address),
                        ..words.clone()
                    })
                };
                // One family may be right where the other is not.
                let [v4, v6] = STAND_INS.map(parse);
                v4.or(v6)
            }
            other => other,
        }
    }

    /// The name that its target is, if it is one.
    pub fn host(&self) -> Option<&Host> {
        self.rare().host.as_ref()
    }

    /// The same rule with another address of the name that its target is.
    pub fn led_to(&self, address: IpAddr) -> Result<Self, Refusal> {
        Self::parse(&RuleWords {
            resolved: Some(address),
            ..self.words()
        })
    }

    /// What [`RuleSpec::parse`] makes this rule of.
    pub fn words(&self) -> RuleWords {
        let rare = self.rare();
        let family = rare.host.as_ref().and_then(Host::family);
        let words = RuleWords {
            proto: self.protocol.word().to_owned(),
            listen: self.listen.to_string(),
            target: match &rare.host {
                Some(host) => format!("{host}:{}", self.target.ports),
                None => self.target.to_string(),
            },
            masquerade: rare.source.is_masquerade(),
            snat: rare.source.snat().map(|source| source.to_string()),
            mss_clamp: self.keeps_mss.then_some(false),
            track: (self.track != Track::default()).then(|| self.track.word().to_owned()),
            name: self.name().map(str::to_owned),
            flows: self.flows.map(|policy| policy.word().to_owned()),
            enabled: rare.notes.is_disabled.then_some(false),
            comment: rare.notes.comment.clone(),
            tags: rare.notes.tags.clone(),
            expires: rare.notes.expires.map(|expires| expires.to_string()),
            schedule: rare.notes.schedule.as_ref().map(Schedule::to_string),
            family: family.map(|family| family.word().to_owned()),
            resolved: rare.host.as_ref().map(|_| self.target.address),
            from: rare.sources.from(),
            not_from: rare.sources.not_from(),
            except: rare.exceptions.iter().map(Exception::to_string).collect(),
            ..RuleWords::default()
        };
        rare.limits.put(words)
    }

    /// Whether the two do the same with every packet that they let in, whatever else they say.
    pub fn forwards_like(&self, other: &Self) -> bool {
        let packets = |spec: &Self| {
            let plain = Self {
                name: None,
                flows: None,
                rare: None,
                ..*spec
            };
            plain.saying(Rare {
                source: spec.source(),
                exceptions: spec.exceptions().to_vec(),
                ..Rare::default()
            })
        };
        packets(self) == packets(other)
    }

    /// Whether an element of RULES that bears this rule's id is this rule, and not what it said
    /// before.
    pub fn is_at(&self, element: &abi::Rule) -> bool {
        let protocol = element.protocol();
        let own = self.protocol.protocols().contains(&protocol);
        own && element::is_same(element, &element::element(element.id, protocol, self))
    }

    /// Whether the maximum segment size that a SYN says stays as it is.
    pub const fn keeps_mss(&self) -> bool {
        self.keeps_mss
    }

    /// How closely its flows are followed.
    pub const fn track(&self) -> Track {
        self.track
    }

    /// Whether packets find it at all.
    pub fn is_enabled(&self) -> bool {
        !self.rare().notes.is_disabled
    }

    /// What it says to people.
    pub fn comment(&self) -> Option<&str> {
        self.rare().notes.comment.as_deref()
    }

    /// Its tags.
    pub fn tags(&self) -> &[String] {
        &self.rare().notes.tags
    }

    /// When it ends, if it does.
    pub fn expires(&self) -> Option<Expires> {
        self.rare().notes.expires
    }

    /// Whether it has a lease or a schedule.
    pub fn is_timed(&self) -> bool {
        self.rare().notes.expires.is_some() || self.rare().notes.schedule.is_some()
    }

    /// The same rule with an end.
    #[must_use]
    pub fn ending(mut self, end: Timestamp) -> Self {
        let mut rare = self.rare.take().map(|rare| *rare).unwrap_or_default();
        rare.notes.expires = Some(Expires::At(end));
        self.saying(rare)
    }

    /// When packets find it, if not always.
    pub fn schedule(&self) -> Option<&Schedule> {
        self.rare().notes.schedule.as_ref()
    }

    /// Whether packets find it at a point in time.
    pub fn opening(&self, now: Timestamp) -> Opening {
        let is_due = |schedule: &Schedule| schedule.is_open(now);
        if self.is_enabled() && self.schedule().is_none_or(is_due) {
            Opening::Open
        } else {
            Opening::Closed
        }
    }

    /// What becomes of its flows when it changes or goes, if it says so.
    pub fn flows(&self) -> Option<FlowPolicy> {
        self.flows
    }

    /// Its name, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Its protocols.
    pub fn protocol(&self) -> RuleProtocol {
        self.protocol
    }

    /// What it listens on.
    pub fn listen(&self) -> Listen {
        self.listen
    }

    /// Where it forwards to.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Whom the target takes for the client.
    pub fn source(&self) -> Source {
        self.rare().source
    }

    /// Who may use it.
    pub fn sources(&self) -> &Sources {
        &self.rare().sources
    }

    /// How many flows it takes.
    pub fn limits(&self) -> &Limits {
        &self.rare().limits
    }

    /// Ports that it leaves to the gateway, if it takes everything else.
    pub fn exceptions(&self) -> &[Exception] {
        &self.rare().exceptions
    }

    /// The family of both its sides: that of the target.
    pub fn family(&self) -> Family {
        self.target.family()
    }
}

fn check_tags(tags: &[String]) -> Result<Vec<String>, Refusal> {
    let mut checked: Vec<String> = Vec::new();
    for tag in tags {
        let is_legal = !tag.is_empty() && tag.len() <= MAX_NAME && tag.chars().all(is_word);
        if !is_legal {
            return Err(Refusal::IllegalTag {
                text: tag.to_owned(),
            });
        }
        if !checked.contains(tag) {
            checked.push(tag.to_owned());
        }
    }
    Ok(checked)
}

fn check_comment(comment: &str) -> Result<String, Refusal> {
    let is_line = !comment.chars().any(char::is_control);
    if is_line && comment.chars().count() <= MAX_COMMENT {
        Ok(comment.to_owned())
    } else {
        Err(Refusal::IllegalComment { max: MAX_COMMENT })
    }
}

/// What names and tags are made of.
fn is_word(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-')
}

fn check_name(name: &str) -> Result<(), Refusal> {
    let numeric = name.chars().all(|c| c.is_ascii_digit());
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_word) || numeric {
        return Err(Refusal::IllegalName {
            name: name.to_owned(),
        });
    }
    Ok(())
}

/// The same test that the datapath puts packets to: what it would leave to the kernel can be no
/// rule.
pub(super) fn check_unicast(side: &'static str, address: IpAddr) -> Result<(), Refusal> {
    let unicast = match address {
        IpAddr::V4(v4) => Ipv4::from(v4).is_unicast(),
        IpAddr::V6(v6) => Ipv6::from(v6).is_unicast(),
    };
    if unicast {
        Ok(())
    } else {
        Err(Refusal::NotUnicast { side, address })
    }
}

#[cfg(test)]
mod tests {
    use portfwd_common::abi::Protocol;
    use proptest::prelude::*;

    use super::*;

    fn parse(listen: &str, target: &str) -> Result<String, Refusal> {
        RuleSpec::parse(&RuleWords::new("tcp", listen, target))
            .map(|spec| format!("{} -> {}", spec.listen, spec.target))
    }

    #[test]
    fn what_the_operator_writes_is_understood() {
        for (listen, target, expected) in [
            ("80", "10.0.0.2", "80 -> 10.0.0.2:80"),
            ("8080", "10.0.0.2:80", "8080 -> 10.0.0.2:80"),
            ("1000-1999", "10.0.0.2", "1000-1999 -> 10.0.0.2:1000-1999"),
            (
                "1000-1999",
                "10.0.0.2:5000-5999",
                "1000-1999 -> 10.0.0.2:5000-5999",
            ),
            ("1-65535", "10.0.0.2", "1-65535 -> 10.0.0.2:1-65535"),
            ("80-80", "10.0.0.2", "80 -> 10.0.0.2:80"),
            (
                "203.0.113.5:443",
                "10.0.0.2",
                "203.0.113.5:443 -> 10.0.0.2:443",
            ),
            (
                "203.0.113.5:1-9",
                "10.0.0.2:11-19",
                "203.0.113.5:1-9 -> 10.0.0.2:11-19",
            ),
            ("80", "2001:db8::2", "80 -> [2001:db8::2]:80"),
            ("80", "[2001:db8::2]", "80 -> [2001:db8::2]:80"),
            (
                "80-81",
                "[2001:db8::2]:90-91",
                "80-81 -> [2001:db8::2]:90-91",
            ),
            (
                "[2001:db8::1]:80",
                "2001:db8::2",
                "[2001:db8::1]:80 -> [2001:db8::2]:80",
            ),
        ] {
            assert_eq!(parse(listen, target).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn icmp_has_echo_in_the_place_of_a_port_and_nothing_else_has() {
        let parse = |protocol, listen, target| {
            let words = RuleWords::new(protocol, listen, target);
            RuleSpec::parse(&words).map(|spec| {
                assert_eq!(RuleSpec::parse(&spec.words()).as_ref(), Ok(&spec));
                format!("{} {} -> {}", spec.protocol(), spec.listen(), spec.target())
            })
        };
        for (listen, target, expected) in [
            ("echo", "10.0.0.2", "icmp echo -> 10.0.0.2:echo"),
            ("echo", "10.0.0.2:echo", "icmp echo -> 10.0.0.2:echo"),
            ("echo", "2001:db8::2", "icmp echo -> [2001:db8::2]:echo"),
            (
                "203.0.113.5:echo",
                "10.0.0.2",
                "icmp 203.0.113.5:echo -> 10.0.0.2:echo",
            ),
        ] {
            assert_eq!(parse("icmp", listen, target).as_deref(), Ok(expected));
        }
        for (protocol, listen, target) in [
            ("icmp", "80", "10.0.0.2"),
            ("icmp", "1-65535", "10.0.0.2"),
            ("icmp", "echo", "10.0.0.2:80"),
            ("tcp", "echo", "10.0.0.2"),
            ("both", "80", "10.0.0.2:echo"),
        ] {
            let refused = parse(protocol, listen, target);
            assert!(
                matches!(refused, Err(Refusal::PortsOfProtocol { .. })),
                "{protocol} {listen} {target}: {refused:?}"
            );
        }
        assert!(matches!(
            parse("icmp", "echo-echo", "10.0.0.2"),
            Err(Refusal::IllegalPorts { .. })
        ));
    }

    #[test]
    fn dmz_has_rest_in_the_place_of_ports_and_may_leave_some() {
        let parse = |words: RuleWords| {
            RuleSpec::parse(&words).map(|spec| {
                assert_eq!(RuleSpec::parse(&spec.words()).as_ref(), Ok(&spec));
                let [protocol, listen, target] = [
                    spec.protocol().to_string(),
                    spec.listen().to_string(),
                    spec.target().to_string(),
                ];
                (
                    format!("{protocol} {listen} -> {target}"),
                    spec.words().except,
                )
            })
        };
        let excepting = |words: RuleWords, except: &[&str]| RuleWords {
            except: except.iter().map(|text| (*text).to_owned()).collect(),
            ..words
        };
        for (listen, target, expected) in [
            ("rest", "10.0.0.2", "dmz rest -> 10.0.0.2:rest"),
            ("rest", "10.0.0.2:rest", "dmz rest -> 10.0.0.2:rest"),
            ("rest", "2001:db8::2", "dmz rest -> [2001:db8::2]:rest"),
            (
                "203.0.113.5:rest",
                "10.0.0.2",
                "dmz 203.0.113.5:rest -> 10.0.0.2:rest",
            ),
        ] {
            let words = RuleWords::new("dmz", listen, target);
            let said = ["tcp/22", "icmp", "udp/500-4500", "tcp/22"];
            let (rule, except) = parse(excepting(words.clone(), &said)).unwrap();
            assert_eq!(rule, expected);
            assert_eq!(except, ["tcp/22", "icmp", "udp/500-4500"]);
            // Which makes another rule of it.
            let [with, without] = [&said[..], &[]]
                .map(|except| RuleSpec::parse(&excepting(words.clone(), except)).unwrap());
            assert!(!with.forwards_like(&without));
        }
        for (protocol, listen, target) in [
            ("dmz", "80", "10.0.0.2"),
            ("dmz", "1-65535", "10.0.0.2"),
            ("dmz", "echo", "10.0.0.2"),
            ("dmz", "rest", "10.0.0.2:80"),
            ("both", "rest", "10.0.0.2"),
            ("icmp", "rest", "10.0.0.2"),
            ("tcp", "80", "10.0.0.2:rest"),
        ] {
            let refused = parse(RuleWords::new(protocol, listen, target));
            assert!(
                matches!(refused, Err(Refusal::PortsOfProtocol { .. })),
                "{protocol} {listen} {target}: {refused:?}"
            );
        }
        for (words, except, reason) in [
            ("tcp 80 10.0.0.2", "tcp/22", "ExceptionsOfProtocol"),
            ("both 1-65535 10.0.0.2", "tcp/22", "ExceptionsOfProtocol"),
            ("dmz rest 10.0.0.2", "ssh", "IllegalException"),
        ] {
            let refusal = parse(excepting(RuleWords::line(words), &[except])).unwrap_err();
            assert!(
                format!("{refusal:?}").starts_with(reason),
                "{words}: {refusal:?}"
            );
        }
        let many: Vec<_> = (1..=65).map(|port| format!("tcp/{port}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let dmz = RuleWords::line("dmz rest 10.0.0.2");
        assert!(parse(excepting(dmz.clone(), &many[..64])).is_ok());
        assert!(matches!(
            parse(excepting(dmz, &many)),
            Err(Refusal::TooManyExceptions { .. })
        ));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_reason() {
        for (listen, target, reason) in [
            ("0", "10.0.0.2", "IllegalPorts"),
            ("80", "10.0.0.2:0", "IllegalPorts"),
            ("0-10", "10.0.0.2", "IllegalPorts"),
            ("65536", "10.0.0.2", "IllegalPorts"),
            ("20-10", "10.0.0.2", "IllegalPorts"),
            ("+80", "10.0.0.2", "IllegalPorts"),
            ("80-", "10.0.0.2", "IllegalPorts"),
            ("-80", "10.0.0.2", "IllegalPorts"),
            ("", "10.0.0.2", "IllegalPorts"),
            ("http", "10.0.0.2", "IllegalPorts"),
            ("203.0.113.5", "10.0.0.2", "ListenWithoutPort"),
            ("2001:db8::1:80", "2001:db8::2", "ListenWithoutPort"),
            ("[2001:db8::1]", "2001:db8::2", "ListenWithoutPort"),
            ("[2001:db8::1]80", "2001:db8::2", "IllegalListen"),
            ("[203.0.113.5]:80", "10.0.0.2", "IllegalListen"),
            ("example.org:80", "10.0.0.2", "IllegalListen"),
            ("80", "example.org", "Unresolved"),
            ("80", "example.org:0", "IllegalPorts"),
            ("80", "exa mple", "IllegalTarget"),
            ("80", "8080", "IllegalTarget"),
            ("80", "fe80::2%eth0", "IllegalTarget"),
            ("80-89", "10.0.0.2:80", "UnequalLength"),
            ("80-89", "10.0.0.2:80-88", "UnequalLength"),
            ("80", "10.0.0.2:80-89", "UnequalLength"),
            ("203.0.113.5:80", "2001:db8::2", "FamilyMismatch"),
            ("[2001:db8::1]:80", "10.0.0.2", "FamilyMismatch"),
            ("10.0.0.2:80", "10.0.0.2:81", "TargetIsListen"),
            ("80", "127.0.0.1", "NotUnicast"),
            ("80", "224.0.0.1", "NotUnicast"),
            ("80", "0.0.0.0", "NotUnicast"),
            ("80", "255.255.255.255", "NotUnicast"),
            ("80", "::1", "NotUnicast"),
            ("80", "::", "NotUnicast"),
            ("80", "ff02::1", "NotUnicast"),
            ("80", "fe80::2", "NotUnicast"),
            ("80", "::ffff:10.0.0.2", "NotUnicast"),
            ("0.0.0.0:80", "10.0.0.2", "NotUnicast"),
            ("[::]:80", "2001:db8::2", "NotUnicast"),
        ] {
            let refusal = parse(listen, target).unwrap_err();
            assert!(
                format!("{refusal:?}").starts_with(reason),
                "{listen} {target}: {refusal:?}"
            );
        }
        assert!(matches!(
            RuleSpec::parse(&RuleWords::line("sctp 80 10.0.0.2")),
            Err(Refusal::UnknownProtocol { .. })
        ));
    }

    #[test]
    fn a_target_by_name_says_its_name_and_where_it_led() {
        let words = RuleWords {
            resolved: Some("10.0.0.2".parse().unwrap()),
            family: Some("ipv4".into()),
            ..RuleWords::new("tcp", "8080", "Web.lan:80")
        };
        let spec = RuleSpec::parse(&words).unwrap();
        assert_eq!(spec.target().to_string(), "10.0.0.2:80");
        assert_eq!(spec.host().map(Host::name), Some("web.lan"));
        assert_eq!(RuleSpec::parse(&spec.words()).unwrap(), spec);
        let moved = spec.led_to("10.0.0.3".parse().unwrap()).unwrap();
        assert_eq!(moved.target().to_string(), "10.0.0.3:80");
        assert!(!moved.forwards_like(&spec));
        let loopback = "127.0.0.1".parse().unwrap();
        assert!(matches!(
            spec.led_to(loopback),
            Err(Refusal::NotUnicast { .. })
        ));
        // Before it is resolved, all else can be told.
        let check = |listen, target| RuleSpec::check(&RuleWords::new("tcp", listen, target));
        assert_eq!(check("80", "web.lan"), Ok(()));
        assert_eq!(check("[2001:db8::1]:80", "web.lan"), Ok(()));
        assert!(matches!(
            check("80-81", "web.lan:80"),
            Err(Refusal::UnequalLength { .. })
        ));
    }

    #[test]
    fn a_rule_may_want_segment_sizes_left_which_is_another_rule() {
        let rule = |mss_clamp| {
            let words = RuleWords::line("tcp 80 10.0.0.2");
            RuleSpec::parse(&RuleWords { mss_clamp, ..words }).unwrap()
        };
        let [plain, said, left] = [None, Some(true), Some(false)].map(rule);
        assert_eq!(plain, said);
        assert!(!left.forwards_like(&plain));
        for (spec, flags) in [(plain, 0), (left, abi::Rule::KEEPS_MSS)] {
            assert_eq!(RuleSpec::parse(&spec.words()).unwrap(), spec);
            let element = element::element(1, Protocol::Tcp, &spec);
            assert_eq!(element.flags & abi::Rule::KEEPS_MSS, flags);
        }
    }

    #[test]
    fn names_are_words_that_are_no_ids() {
        let named = |name: &str| RuleSpec::parse(&RuleWords::line("tcp 80 10.0.0.2").named(name));
        for name in ["web", "web-1", "a.b_c", "1a", &"x".repeat(64)] {
            assert!(named(name).is_ok(), "{name}");
        }
        for name in ["", "12", "Web", "a b", "a/b", "ä", "a,b", &"x".repeat(65)] {
            assert!(
                matches!(named(name), Err(Refusal::IllegalName { .. })),
                "{name}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(
            address in proptest::option::of(any::<[u8; 4]>()), v6 in any::<bool>(), tail in any::<u64>(),
            first in 1..=u16::MAX, length in 0..=u16::MAX, target_first in 1..=u16::MAX,
        ) {
            let last = first.saturating_add(length);
            prop_assume!(u32::from(target_first) + u32::from(last - first) <= 0xffff);
            let ports = PortRange::new(first, last).unwrap();
            let to_ip = |octets: [u8; 4]| if v6 {
                IpAddr::from([0x2001_u16, 0xdb8, u16::from(octets[0]), 0, 0, 0, 0, u16::from(octets[3])])
            } else {
                IpAddr::from(octets)
            };
            let listen = Listen { address: address.map(to_ip), ports };
            prop_assert_eq!(listen.to_string().parse::<Listen>().unwrap(), listen);
            let target_ports = PortRange::new(target_first, target_first + (last - first)).unwrap();
            let target = Target { address: to_ip([10, 0, 0, tail as u8]), ports: target_ports };
            prop_assert_eq!(Target::parse(&target.to_string(), ports).unwrap(), target);
        }

        #[test]
        fn exceptions_that_are_printed_read_back(
            ports in prop::collection::vec((0..3_usize, 1..=u16::MAX, 0..=u16::MAX), 0..20),
        ) {
            let except: Vec<_> = ports.iter().map(|(protocol, first, length)| {
                let ports = PortRange::new(*first, first.saturating_add(*length)).unwrap();
                format!("{}/{ports}", ["tcp", "udp", "both"][*protocol])
            }).collect();
            let words = RuleWords { except, ..RuleWords::line("dmz rest 10.0.0.2") };
            let spec = RuleSpec::parse(&words).unwrap();
            prop_assert_eq!(RuleSpec::parse(&spec.words()).unwrap(), spec);
        }

        #[test]
        fn no_input_panics(protocol in ".*", listen in ".*", target in "\\PC*", name in ".*") {
            let _ = RuleSpec::parse(&RuleWords::new(&protocol, &listen, &target).named(&name));
            let _ = RuleSpec::parse(&RuleWords::new("tcp", &listen, &target));
        }
    }
}
