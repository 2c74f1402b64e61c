//! What `portfwd run` was asked for.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

pub use portfwd_common::abi::Role;

use super::words::GatewayWords;
use crate::instance::Instance;

/// Everything the daemon is told when it starts.
#[derive(Clone, Debug)]
pub struct Options {
    /// Names of pins, socket and state file.
    pub instance: Instance,
    /// Interfaces to attach to, WAN first; no name twice.
    pub interfaces: Vec<InterfaceOption>,
    /// Connections that fit, of each address family; `None` keeps the size of the tables in the
    /// kernel, or takes the default.
    pub max_flows: Option<u32>,
    /// Flows that fit without having proven themselves, of each address family; `None` likewise.
    pub max_half_open: Option<u32>,
    /// Counted ports, the sum over all rules; `None` likewise.
    pub max_ports: Option<u32>,
    /// Whether a SYN's maximum segment size is lowered to what fits.
    pub mss_clamp: bool,
    /// Whether a client must be able to be where its packet came from.
    pub source_check: bool,
    /// Between two looks at where the names lead that targets are.
    pub resolve_every: Duration,
    /// How long silent flows are kept.
    pub timeouts: Timeouts,
    /// The configuration that a start and SIGHUP apply.
    pub config: Option<PathBuf>,
    /// All of it, in words.
    pub words: GatewayWords,
}

/// How long silent flows are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// UDP.
    pub udp: Duration,
    /// TCP before both sides have acknowledged.
    pub tcp_opening: Duration,
    /// TCP established or half-closed.
    pub tcp_established: Duration,
    /// TCP after both FINs or a RST.
    pub tcp_closing: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            // RFC 4787 REQ-5: at least 2 minutes, 5 recommended.
            udp: Duration::from_secs(300),
            // RFC 5382 REQ-5, RFC 7857 section 2.1: at most 4 minutes.
            tcp_opening: Duration::from_secs(120),
            // RFC 5382 REQ-5: at least 2 hours 4 minutes.
            tcp_established: Duration::from_secs(7_440),
            // RFC 7857 section 2.2: 4 minutes.
            tcp_closing: Duration::from_secs(240),
        }
    }
}

/// An interface named by `--wan` or `--lan`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceOption {
    /// Kernel name.
    pub name: String,
    /// Which side of the gateway it is.
    pub role: Role,
    /// How to attach.
    pub mode: AttachMode,
}

/// How to attach to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// Native XDP on a real network card, TC on everything else.
    #[default]
    Auto,
    /// Native XDP, or fail.
    Xdp,
    /// Generic XDP, or fail.
    XdpGeneric,
    /// TC, or fail.
    Tc,
}

/// Largest connection table: 2^26 connections of both families take some 44 GiB.
pub const MAX_MAX_FLOWS: u32 = 1 << 26;
/// Most flows that have not proven themselves.
pub const MAX_MAX_HALF_OPEN: u32 = 1 << 26;
/// Most counted ports.
pub const MAX_MAX_PORTS: u32 = 1 << 26;

impl AttachMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Xdp, Self::XdpGeneric, Self::Tc];

    /// The word on the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Xdp => "xdp",
            Self::XdpGeneric => "xdp-generic",
            Self::Tc => "tc",
        }
    }
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for AttachMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.word() == text)
            .ok_or_else(|| format!("{text:?} is not an attach mode: auto, xdp, xdp-generic or tc"))
    }
}
