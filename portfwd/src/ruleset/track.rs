//! How closely a rule's flows are followed: `--track`.

use std::str::FromStr;

use super::{FlowPolicy, Refusal, RuleProtocol, Source};

/// How closely flows are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Track {
    /// Every packet is told to its flow's entry.
    #[default]
    Full,
    /// Packets are translated by the rule, and some are told to the entry.
    Light,
}

impl Track {
    const ALL: [Self; 2] = [Self::Full, Self::Light];

    /// The word on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Light => "light",
        }
    }

    /// Refuses what a rule that is tracked like this cannot say besides.
    pub(super) fn check(
        self,
        protocol: RuleProtocol,
        source: Source,
        is_limited: bool,
        flows: Option<FlowPolicy>,
    ) -> Result<(), Refusal> {
        let refuse = |what| Err(Refusal::NotLight { what });
        if self == Self::Full {
            return Ok(());
        }
        match protocol {
            RuleProtocol::Tcp | RuleProtocol::Udp | RuleProtocol::Both => {}
            RuleProtocol::Icmp => return refuse(NotLight::Icmp),
            RuleProtocol::Dmz => return refuse(NotLight::Dmz),
        }
        match source {
            Source::Client => {}
            Source::Masquerade => return refuse(NotLight::Masquerade),
            Source::Snat(_) => return refuse(NotLight::Snat),
        }
        if is_limited {
            return refuse(NotLight::Limits);
        }
        match flows {
            None | Some(FlowPolicy::Kill) => Ok(()),
            Some(FlowPolicy::Keep | FlowPolicy::Drain) => refuse(NotLight::Flows),
        }
    }
}

impl FromStr for Track {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let named = Self::ALL.into_iter().find(|track| track.word() == text);
        named.ok_or_else(|| Refusal::UnknownTrack {
            text: text.to_owned(),
        })
    }
}

/// What a rule with light tracking cannot say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotLight {
    /// ICMP.
    Icmp,
    /// Everything else.
    Dmz,
    /// `--masquerade`.
    Masquerade,
    /// `--snat`.
    Snat,
    /// Any limit.
    Limits,
    /// `--flows keep` or `drain`.
    Flows,
}

impl NotLight {
    /// What it is, and why.
    pub const fn because(self) -> &'static str {
        match self {
            Self::Icmp => "is for tcp and udp: echo has no ports",
            Self::Dmz => "is for certain ports: only entries tell what a dmz rule has taken",
            Self::Masquerade => {
                "excludes --masquerade: only an entry tells whom a port of the gateway stands for"
            }
            Self::Snat => "excludes --snat: only an entry tells whom a port of it stands for",
            Self::Limits => "excludes limits: flows are counted by their entries",
            Self::Flows => "excludes --flows keep and drain: its packets follow the rule at once",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RuleSpec, RuleWords};
    use super::*;

    fn light(line: &str) -> RuleWords {
        RuleWords {
            track: Some("light".into()),
            ..RuleWords::line(line)
        }
    }

    #[test]
    fn light_tracking_is_another_rule_and_reads_back() {
        for line in ["tcp 80 10.0.0.2", "both 203.0.113.5:1-9 10.0.0.2:11-19"] {
            let [plain, said, light] = [None, Some("full"), Some("light")].map(|track| {
                let track = track.map(str::to_owned);
                let line = RuleWords::line(line);
                RuleSpec::parse(&RuleWords { track, ..line }).unwrap()
            });
            assert_eq!(plain, said);
            assert_eq!(plain.words().track, None);
            assert!(!light.forwards_like(&plain));
            assert_eq!(RuleSpec::parse(&light.words()).unwrap(), light);
        }
    }

    #[test]
    fn what_only_entries_can_do_is_refused_with_light_tracking() {
        let plain = light("tcp 80 10.0.0.2");
        let text = |text: &str| Some(text.to_owned());
        for (words, what) in [
            (light("icmp echo 10.0.0.2"), NotLight::Icmp),
            (light("dmz rest 10.0.0.2"), NotLight::Dmz),
            (
                RuleWords {
                    masquerade: true,
                    ..plain.clone()
                },
                NotLight::Masquerade,
            ),
            (
                RuleWords {
                    snat: text("10.0.0.1"),
                    ..plain.clone()
                },
                NotLight::Snat,
            ),
            (
                RuleWords {
                    max_flows: Some(5),
                    ..plain.clone()
                },
                NotLight::Limits,
            ),
            (
                RuleWords {
                    rate_per_source: text("5/s"),
                    ..plain.clone()
                },
                NotLight::Limits,
            ),
            (
                RuleWords {
                    flows: text("keep"),
                    ..plain.clone()
                },
                NotLight::Flows,
            ),
            (
                RuleWords {
                    flows: text("drain"),
                    ..plain.clone()
                },
                NotLight::Flows,
            ),
        ] {
            let refused = RuleSpec::parse(&words).unwrap_err();
            assert_eq!(refused, Refusal::NotLight { what }, "{words:?}");
            assert!(refused.to_string().starts_with("--track light "));
        }
        for words in [
            RuleWords {
                flows: text("kill"),
                ..plain.clone()
            },
            RuleWords {
                from: Some(vec!["192.0.2.0/24".into()]),
                ..plain.clone()
            },
        ] {
            assert!(RuleSpec::parse(&words).is_ok(), "{words:?}");
        }
        let unknown = RuleWords {
            track: text("none"),
            ..plain
        };
        assert!(matches!(
            RuleSpec::parse(&unknown),
            Err(Refusal::UnknownTrack { .. })
        ));
    }
}
