//! Gateways to compare: portfwd, and what it is measured against.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::programs::{ProgramInfo, loaded_programs};
use clap::ValueEnum;
use portfwd_tests::address::{Family, GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions};
use portfwd_tests::pipeline::{self, PORT, Pipeline, Sink, Stream, Transport};
use portfwd_tests::{Lab, LabOptions, Mode, Offloads, iptables, ipvs, nftables};

/// Port of the server that [`PORT`] is forwarded to.
pub const TARGET_PORT: u16 = 6000;

/// What the gateway of a lab does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Gateway {
    /// Counts and drops what comes in: what the generator costs.
    Nothing,
    /// Redirects everything unread.
    Redirect,
    /// Parse, one lookup, rewrite, redirect.
    Floor,
    /// A trial, measured only if it is named: translation by port and rule without flow entries, the least that it costs.
    ByRule,
    /// A trial, measured only if it is named: the floor with a cache of 8,192 flows in front of its lookup, the least that it
    /// costs.
    CachedFloor,
    /// A trial, measured only if it is named: the floor, which also counts in its entry and writes the time there.
    MarkedFloor,
    /// A trial, measured only if it is named: the floor, whose way out is in a map of interfaces, as portfwd's is.
    MappedFloor,
    /// The kernel's forwarding, without translation.
    Routing,
    /// Destination NAT by nftables.
    Nftables,
    /// The same, with established connections in a flowtable.
    Flowtable,
    /// Destination NAT by the tables of iptables-legacy, which are not those of nftables.
    Iptables,
    /// The kernel's load balancer, with one server.
    Ipvs,
    /// portfwd in native XDP.
    Xdp,
    /// The same, by rules with light tracking.
    XdpLight,
    /// portfwd in generic XDP.
    XdpGeneric,
    /// portfwd in TC.
    Tc,
}

impl Gateway {
    /// Every one, references first.
    pub const ALL: [Self; 16] = [
        Self::Nothing,
        Self::Redirect,
        Self::Floor,
        Self::ByRule,
        Self::CachedFloor,
        Self::MarkedFloor,
        Self::MappedFloor,
        Self::Routing,
        Self::Nftables,
        Self::Flowtable,
        Self::Iptables,
        Self::Ipvs,
        Self::Xdp,
        Self::XdpLight,
        Self::XdpGeneric,
        Self::Tc,
    ];

    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "generate and drop",
            Self::Redirect => "bare redirect",
            Self::Floor => "floor",
            Self::ByRule => "by rule, a trial",
            Self::CachedFloor => "cached floor, a trial",
            Self::MarkedFloor => "floor that counts, a trial",
            Self::MappedFloor => "floor by a map of interfaces, a trial",
            Self::Routing => "kernel forwarding",
            Self::Nftables => "nftables DNAT",
            Self::Flowtable => "nftables flowtable",
            Self::Iptables => "iptables DNAT",
            Self::Ipvs => "IPVS",
            Self::Xdp => "portfwd xdp",
            Self::XdpLight => "portfwd xdp, light",
            Self::XdpGeneric => "portfwd xdp-generic",
            Self::Tc => "portfwd tc",
        }
    }

    /// Whether a kernel may have been built without it.
    pub const fn may_be_missing(self) -> bool {
        matches!(self, Self::Flowtable | Self::Iptables | Self::Ipvs)
    }

    /// Whether it forwards by the connections that the kernel tracks.
    pub const fn has_kernel_track(self) -> bool {
        match self {
            Self::Nftables | Self::Flowtable | Self::Iptables | Self::Ipvs => true,
            Self::Nothing
            | Self::Redirect
            | Self::Floor
            | Self::ByRule
            | Self::CachedFloor
            | Self::MarkedFloor
            | Self::MappedFloor
            | Self::Routing
            | Self::Xdp
            | Self::XdpLight
            | Self::XdpGeneric
            | Self::Tc => false,
        }
    }

    /// Whether it is what the others are there for.
    pub const fn is_portfwd(self) -> bool {
        matches!(
            self,
            Self::Xdp | Self::XdpLight | Self::XdpGeneric | Self::Tc
        )
    }

    /// Whether it says what could be built, not what there is: nobody is compared with it unasked.
    pub const fn is_trial(self) -> bool {
        matches!(
            self,
            Self::ByRule | Self::CachedFloor | Self::MarkedFloor | Self::MappedFloor
        )
    }

    /// Whether it carries a stream: the floor and the trials are TCP and UDP over IPv4, and translation by rule is for clients only.
    pub fn carries(self, stream: &Stream) -> bool {
        match self {
            Self::Floor | Self::CachedFloor | Self::MarkedFloor | Self::MappedFloor => {
                stream.family == Family::V4
            }
            Self::ByRule => {
                stream.family == Family::V4 && stream.heading == pipeline::Heading::ToTarget
            }
            Self::Nothing
            | Self::Redirect
            | Self::Routing
            | Self::Nftables
            | Self::Flowtable
            | Self::Iptables
            | Self::Ipvs
            | Self::Xdp
            | Self::XdpLight
            | Self::XdpGeneric
            | Self::Tc => true,
        }
    }

    /// The stream as this gateway is sent it: one that only routes is dialled past.
    pub fn addressed(self, stream: Stream) -> Stream {
        match (self, stream.heading) {
            (Self::Routing, pipeline::Heading::ToTarget) => {
                let server = match stream.family {
                    Family::V4 => SERVER.v4.into(),
                    Family::V6 => SERVER.v6.into(),
                };
                stream.routed_to(server, TARGET_PORT)
            }
            _ => stream,
        }
    }
}

/// The rules of a portfwd gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// [`PORT`] over both families.
    One,
    /// That, and so many others, in the file that the state is kept in.
    Among(u32),
    /// All ports.
    Range,
}

/// What a gateway must have room for.
#[derive(Clone, Debug)]
pub struct Room {
    /// Flows.
    pub flows: u32,
    /// Rules.
    pub rules: Rules,
    /// Another build of portfwd.
    pub build: Option<PathBuf>,
}

impl Room {
    /// What a connection table has room for.
    pub fn connections(&self) -> u64 {
        u64::from(roomy(self))
    }
}

/// A gateway at work between a generator and a sink. What keeps it at work ends with it.
pub struct Bench<'lab> {
    /// Generator and sink.
    pub pipeline: Pipeline<'lab>,
    lab: &'lab Lab,
    programs: Vec<Ebpf>,
    daemon: Option<Daemon>,
}

/// A lab as all of these gateways need it: every frame whole, as on a wire.
pub fn lab() -> Result<Lab> {
    LabOptions::default().offloads(Offloads::Off).build()
}

impl<'lab> Bench<'lab> {
    /// Puts a gateway to work in a lab of its own.
    pub fn new(gateway: Gateway, lab: &'lab Lab, room: &Room) -> Result<Self> {
        // A veth end without XDP takes redirected frames only with GRO on.
        for end in [lab.wan_end(), lab.lan_end()] {
            end.turn_gro_on()?;
        }
        let mut bench = Self {
            pipeline: match gateway {
                Gateway::Nothing => Pipeline::with_sinks(lab, Sink::Gateway)?,
                Gateway::Redirect
                | Gateway::Floor
                | Gateway::ByRule
                | Gateway::CachedFloor
                | Gateway::MarkedFloor
                | Gateway::MappedFloor
                | Gateway::Routing
                | Gateway::Nftables
                | Gateway::Flowtable
                | Gateway::Iptables
                | Gateway::Ipvs
                | Gateway::Xdp
                | Gateway::XdpLight
                | Gateway::XdpGeneric
                | Gateway::Tc => Pipeline::new(lab)?,
            },
            lab,
            programs: Vec::new(),
            daemon: None,
        };
        match gateway {
            Gateway::Nothing | Gateway::Routing => {}
            Gateway::Redirect => bench.programs.extend(pipeline::redirect(lab)?),
            Gateway::Floor => bench
                .programs
                .push(pipeline::floor(lab, TARGET_PORT, roomy(room))?),
            Gateway::ByRule => bench.programs.push(pipeline::by_rule(lab, TARGET_PORT)?),
            Gateway::CachedFloor => {
                bench
                    .programs
                    .push(pipeline::cached_floor(lab, TARGET_PORT, roomy(room))?);
            }
            Gateway::MarkedFloor => {
                bench
                    .programs
                    .push(pipeline::marked_floor(lab, TARGET_PORT, roomy(room))?);
            }
            Gateway::MappedFloor => {
                bench
                    .programs
                    .push(pipeline::mapped_floor(lab, TARGET_PORT, roomy(room))?);
            }
            Gateway::Nftables => nftables::forward(&lab.gateway, &forwards())?,
            Gateway::Flowtable => {
                let interfaces = [lab.wan_end(), lab.lan_end()].map(|end| end.interface);
                nftables::forward_by_flowtable(&lab.gateway, &forwards(), interfaces)?;
            }
            Gateway::Iptables => iptables::forward(&lab.gateway, &forwards())?,
            Gateway::Ipvs => ipvs::forward(&lab.gateway, &forwards())?,
            Gateway::Xdp => bench.daemon = Some(portfwd(lab, Mode::Xdp, room, "")?),
            Gateway::XdpLight => bench.daemon = Some(portfwd(lab, Mode::Xdp, room, LIGHT)?),
            Gateway::XdpGeneric => bench.daemon = Some(portfwd(lab, Mode::XdpGeneric, room, "")?),
            Gateway::Tc => bench.daemon = Some(portfwd(lab, Mode::Tc, room, "")?),
        }
        Ok(bench)
    }

    /// The XDP program on the gateway's WAN interface.
    pub fn wan_program(&self) -> Result<ProgramInfo> {
        let interface = self.lab.wan_end();
        let link = interface
            .namespace
            .ip_json(&["link", "show", "dev", interface.interface])?;
        let id = link[0]["xdp"]["prog"]["id"]
            .as_u64()
            .with_context(|| format!("no XDP program on {}", interface.interface))?;
        program(u32::try_from(id)?)
    }

    /// The daemon, if the gateway has one.
    pub fn daemon(&self) -> Option<&Daemon> {
        self.daemon.as_ref()
    }
}

/// A loaded program by its number.
pub fn program(id: u32) -> Result<ProgramInfo> {
    loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == id)
        .with_context(|| format!("program {id} is gone"))
}

fn forwards() -> [nftables::Forward; 2] {
    let forward = |listen: SocketAddr, target: SocketAddr| nftables::Forward { listen, target };
    [
        forward(
            (GATEWAY_WAN.v4, PORT).into(),
            (SERVER.v4, TARGET_PORT).into(),
        ),
        forward(
            (GATEWAY_WAN.v6, PORT).into(),
            (SERVER.v6, TARGET_PORT).into(),
        ),
    ]
}

/// A hash map is not to be filled to the brim.
fn roomy(room: &Room) -> u32 {
    room.flows.max(1024) * 2
}

/// What a rule says besides to have light tracking.
const LIGHT: &str = "track = \"light\"\n";

/// portfwd with rules, each of which says `more` besides.
fn portfwd(lab: &Lab, mode: Mode, room: &Room, more: &str) -> Result<Daemon> {
    let mut options = DaemonOptions::new(mode);
    options.max_flows = Some(roomy(room));
    options.log_at_end = false;
    let daemon = options.start_as(&lab.gateway, room.build.as_deref())?;
    let rules = match room.rules {
        Rules::One => forwarded(more),
        Rules::Among(others) => others_than_forwarded(others) + &forwarded(more),
        Rules::Range => [SERVER.v4.to_string(), SERVER.v6.to_string()]
            .map(|target| rule("both", "1-65535", &target) + more)
            .concat(),
    };
    apply(&daemon, &rules)?;
    Ok(daemon)
}

/// Has a daemon apply a configuration of rules.
pub fn apply(daemon: &Daemon, rules: &str) -> Result<()> {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile()?;
    file.write_all(rules.as_bytes())?;
    let path = file.path().to_string_lossy().into_owned();
    daemon.ok(&["apply", &path]).map(drop)
}

/// A rule in words of a configuration.
pub fn rule(proto: &str, listen: &str, target: &str) -> String {
    format!("[[rule]]\nproto = \"{proto}\"\nlisten = \"{listen}\"\ntarget = \"{target}\"\n")
}

/// [`PORT`] over both families.
fn forwarded(more: &str) -> String {
    let targets = [
        format!("{}:{TARGET_PORT}", SERVER.v4),
        format!("[{}]:{TARGET_PORT}", SERVER.v6),
    ];
    targets
        .map(|target| rule("both", &PORT.to_string(), &target) + more)
        .concat()
}

/// So many rules, none of which is for [`PORT`].
pub fn others_than_forwarded(count: u32) -> String {
    (0..count)
        .map(|number| {
            let (port, host) = (10_000 + number % 40_000, 10 + number % 200);
            let proto = if number < 40_000 { "tcp" } else { "udp" };
            rule(proto, &port.to_string(), &format!("10.2.0.{host}:80"))
        })
        .collect()
}

/// Whether a stream needs both ends to have spoken before its flows are established.
pub fn needs_handshake(stream: &Stream) -> bool {
    match stream.transport {
        Transport::Tcp(_) => true,
        Transport::Udp => stream.heading == pipeline::Heading::ToClient,
    }
}
