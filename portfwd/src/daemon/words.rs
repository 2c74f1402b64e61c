//! The settings of a gateway in words: as the command line of `portfwd run` and `[gateway]` of a
//! file carry them.

use std::{ops::RangeInclusive, time::Duration};

use jiff::SignedDuration;
use portfwd_common::abi::MIN_MAX_HALF_OPEN;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::options::{
    AttachMode, InterfaceOption, MAX_MAX_FLOWS, MAX_MAX_HALF_OPEN, MAX_MAX_PORTS, Options, Role,
    Timeouts,
};
use crate::{
    failure::{Failure, Kind, Result},
    instance::Instance,
};

/// Settings of a gateway. What is not said is the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatewayWords {
    /// Interfaces that clients come in on: `IF` or `IF=MODE`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wan: Vec<String>,
    /// Interfaces that targets are behind: `IF` or `IF=MODE`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lan: Vec<String>,
    /// How to attach where no mode is given: `auto`, `xdp`, `xdp-generic` or `tc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Connections that fit into the connection table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_flows: Option<u32>,
    /// Connections and datagram flows that may be beginning at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_half_open: Option<u32>,
    /// Listen ports that are counted, the sum over all rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ports: Option<u32>,
    /// Whether a SYN's maximum segment size is lowered to what fits; a rule may want it left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mss_clamp: Option<bool>,
    /// Whether a client must be able to be where its packet came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_check: Option<bool>,
    /// How often names that targets are get resolved again, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolve_every: Option<u32>,
    /// How long a silent UDP flow is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub udp_timeout: Option<String>,
    /// How long a silent TCP connection is kept before both sides have acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_opening_timeout: Option<String>,
    /// How long a silent TCP connection is kept that is established.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_established_timeout: Option<String>,
    /// How long a silent TCP connection is kept after both sides have ended it, or one has reset it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_closing_timeout: Option<String>,
}

/// Seconds between two looks at where a name leads, if not said; and at most, a day.
const RESOLVE_EVERY: u32 = 60;
const MAX_RESOLVE_EVERY: u32 = 86_400;
/// Every timeout is longer than the second for which a flow entry is trusted.
const SHORTEST: SignedDuration = SignedDuration::from_secs(2);
/// The datapath's clock tells differences of up to 49 days apart.
const LONGEST: SignedDuration = SignedDuration::from_hours(24 * 30);

impl GatewayWords {
    /// The same settings, but for what is said here too.
    #[must_use]
    pub fn over(self, less: Self) -> Self {
        let list = |more: Vec<String>, less| if more.is_empty() { less } else { more };
        Self {
            wan: list(self.wan, less.wan),
            lan: list(self.lan, less.lan),
            mode: self.mode.or(less.mode),
            max_flows: self.max_flows.or(less.max_flows),
            max_half_open: self.max_half_open.or(less.max_half_open),
            max_ports: self.max_ports.or(less.max_ports),
            mss_clamp: self.mss_clamp.or(less.mss_clamp),
            source_check: self.source_check.or(less.source_check),
            resolve_every: self.resolve_every.or(less.resolve_every),
            udp_timeout: self.udp_timeout.or(less.udp_timeout),
            tcp_opening_timeout: self.tcp_opening_timeout.or(less.tcp_opening_timeout),
            tcp_established_timeout: self
                .tcp_established_timeout
                .or(less.tcp_established_timeout),
            tcp_closing_timeout: self.tcp_closing_timeout.or(less.tcp_closing_timeout),
        }
    }

    /// What the daemon is told. Everything that can be refused without looking at the machine is
    /// refused here.
    pub fn options(&self, instance: Instance) -> Result<Options> {
        let mut interfaces: Vec<InterfaceOption> = Vec::new();
        for (role, words) in [(Role::Wan, &self.wan), (Role::Lan, &self.lan)] {
            if words.is_empty() {
                return Err(
                    Failure::new(Kind::Usage, "interfaces of both sides must be named")
                        .hint("`portfwd run --wan IF --lan IF`, or wan and lan in [gateway]"),
                );
            }
            for word in words {
                let interface = self.interface(role, word)?;
                let known = interfaces
                    .iter_mut()
                    .find(|other| other.name == interface.name);
                match known {
                    None => interfaces.push(interface),
                    // A gateway with one arm.
                    Some(other)
                        if other.role == Role::Wan
                            && role == Role::Lan
                            && other.mode == interface.mode =>
                    {
                        other.role = Role::Both;
                    }
                    Some(_) => {
                        let error = format!("interface {} is named twice", interface.name);
                        return Err(Failure::new(Kind::Usage, error).hint(
                            "once --wan, or --lan, or both with the same mode if it is the gateway's only arm",
                        ));
                    }
                }
            }
        }
        count("max_flows", self.max_flows, 1..=MAX_MAX_FLOWS)?;
        let half_open = MIN_MAX_HALF_OPEN..=MAX_MAX_HALF_OPEN;
        count("max_half_open", self.max_half_open, half_open)?;
        count("max_ports", self.max_ports, 1..=MAX_MAX_PORTS)?;
        count("resolve_every", self.resolve_every, 1..=MAX_RESOLVE_EVERY)?;
        Ok(Options {
            instance,
            interfaces,
            max_flows: self.max_flows,
            max_half_open: self.max_half_open,
            max_ports: self.max_ports,
            mss_clamp: self.mss_clamp.unwrap_or(true),
            source_check: self.source_check.unwrap_or(true),
            resolve_every: Duration::from_secs(self.resolve_every.unwrap_or(RESOLVE_EVERY).into()),
            timeouts: self.timeouts()?,
            config: None,
            words: self.clone(),
        })
    }

    fn timeouts(&self) -> Result<Timeouts> {
        let default = Timeouts::default();
        Ok(Timeouts {
            udp: timeout("udp_timeout", self.udp_timeout.as_deref(), default.udp)?,
            tcp_opening: timeout(
                "tcp_opening_timeout",
                self.tcp_opening_timeout.as_deref(),
                default.tcp_opening,
            )?,
            tcp_established: timeout(
                "tcp_established_timeout",
                self.tcp_established_timeout.as_deref(),
                default.tcp_established,
            )?,
            tcp_closing: timeout(
                "tcp_closing_timeout",
                self.tcp_closing_timeout.as_deref(),
                default.tcp_closing,
            )?,
        })
    }

    fn interface(&self, role: Role, word: &str) -> Result<InterfaceOption> {
        let (name, mode) = match word.split_once('=') {
            Some((name, mode)) => (name, Some(mode)),
            None => (word, self.mode.as_deref()),
        };
        let mode = mode.map_or(Ok(AttachMode::Auto), str::parse);
        // As the kernel judges names (dev_valid_name).
        let legal = !name.is_empty() && name.len() < libc::IFNAMSIZ && !matches!(name, "." | "..");
        if !legal || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
            return Err(Failure::new(
                Kind::Usage,
                format!("{name:?} is not the name of an interface"),
            )
            .hint("`ip link` lists them"));
        }
        Ok(InterfaceOption {
            name: name.to_owned(),
            role,
            mode: mode.map_err(|error: String| Failure::new(Kind::Usage, error))?,
        })
    }
}

fn count(key: &str, number: Option<u32>, range: RangeInclusive<u32>) -> Result<()> {
    if number.is_none_or(|number| range.contains(&number)) {
        return Ok(());
    }
    Err(
        Failure::new(Kind::Usage, format!("{key} is out of range")).hint(format!(
            "a number from {} to {}",
            range.start(),
            range.end()
        )),
    )
}

fn timeout(key: &str, text: Option<&str>, default: Duration) -> Result<Duration> {
    let Some(text) = text else {
        return Ok(default);
    };
    let length = text
        .parse::<SignedDuration>()
        .ok()
        .filter(|length| (SHORTEST..=LONGEST).contains(length));
    length.map(SignedDuration::unsigned_abs).ok_or_else(|| {
        Failure::new(Kind::Usage, format!("{key} {text:?} is not a timeout"))
            .hint("from 2s to 720h, for example 30s, 5m or 2h 4m")
    })
}
