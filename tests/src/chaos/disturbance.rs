//! What happens to the gateway.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use portfwd::bpf::Tables;

use crate::address::{DualStack, Family, GATEWAY_WAN, SERVER};
use crate::daemon::{Daemon, DaemonOptions, Mode, binary};
use crate::deadline::{PATIENCE, here, wait_until};
use crate::lab::{Lab, LabOptions};
use crate::other_build::OtherBuild;
use crate::udp;

use super::MOVED;
use super::traffic::{CLOSED, ECHO, HIDDEN, Load, SECOND};

/// Another address of the WAN's.
const SPARE: DualStack = DualStack::new(1, 77);
/// How long a link or an address is away.
const AWAY: Duration = Duration::from_millis(300);
/// How long an answer is waited for while an address is new.
const KNOCK: Duration = Duration::from_millis(100);
/// Room in the connection table that is to be full, and clients that fill it.
const ROOM: u32 = 256;
const CLIENTS: usize = 300;
/// Listen port of the clients that fill it.
const CROWD: u16 = 9_000;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Disturbance {
    /// The daemon is killed and started again.
    Restart,
    /// The daemon is killed and another build is started.
    Upgrade,
    /// Every rule leads elsewhere, in one change, and back; flows are kept.
    RuleSwap,
    /// The WAN's address goes and comes back.
    WanChange,
    /// The WAN gets another address in the place of its own, and clients dial that from then on.
    WanMove,
    /// The LAN's link goes down and up.
    LinkFlap,
    /// The kernel forgets every neighbour.
    NeighbourFlush,
    /// The connection table is swept again and again.
    Sweep,
    /// The connection table is full.
    TableFull,
}

impl Disturbance {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Restart,
        Self::Upgrade,
        Self::RuleSwap,
        Self::WanChange,
        Self::WanMove,
        Self::LinkFlap,
        Self::NeighbourFlush,
        Self::Sweep,
        Self::TableFull,
    ];

    /// Its name in the matrix.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Upgrade => "upgrade",
            Self::RuleSwap => "rule swap",
            Self::WanChange => "WAN change",
            Self::WanMove => "WAN move",
            Self::LinkFlap => "link flap",
            Self::NeighbourFlush => "neighbour flush",
            Self::Sweep => "sweep forced",
            Self::TableFull => "table full",
        }
    }
}

/// A gateway to which something happens.
pub(super) struct Scene {
    daemon: Daemon,
    pub(super) lab: Lab,
    family: Family,
    builds: Vec<OtherBuild>,
    turns: usize,
    /// The WAN's address.
    wan: DualStack,
    crowd: Vec<UdpSocket>,
    _echo: udp::Echo,
}

impl Scene {
    pub(super) fn new(mode: Mode, family: Family, disturbance: Disturbance) -> Result<Self> {
        let lab = LabOptions::for_mode(mode).build()?;
        // An interface that goes down keeps what it was given.
        for scope in ["all", "default", "lan0"] {
            let key = format!("net/ipv6/conf/{scope}/keep_addr_on_down");
            lab.gateway.sysctl(&key, "1")?;
        }
        // Else the kernel deletes all addresses of a network with the first of them.
        let key = "net/ipv4/conf/wan0/promote_secondaries";
        lab.gateway.sysctl(key, "1")?;
        lab.server.ip(&format!(
            "address add {}/24 dev s0\naddress add {}/64 dev s0 nodad\n",
            SECOND.v4, SECOND.v6
        ))?;
        let options = DaemonOptions {
            max_flows: (disturbance == Disturbance::TableFull).then_some(ROOM),
            log_at_end: false,
            ..DaemonOptions::new(mode)
        };
        let daemon = options.start(&lab.gateway)?;
        let echo = udp::Echo::start_on(&lab.server, SERVER.endpoint(family, CROWD))?;
        let mut scene = Self {
            daemon,
            lab,
            family,
            builds: Vec::new(),
            turns: 0,
            wan: GATEWAY_WAN,
            crowd: Vec::new(),
            _echo: echo,
        };
        if disturbance == Disturbance::Upgrade {
            scene.builds.push(OtherBuild::new()?);
        }
        scene.apply(SERVER)?;
        Ok(scene)
    }

    /// Has every rule lead to one address.
    fn apply(&self, server: DualStack) -> Result<()> {
        let target = |port| server.endpoint(self.family, port);
        let mut rules = String::new();
        for (proto, port) in [
            ("both", ECHO),
            ("udp", CLOSED),
            ("udp", HIDDEN),
            ("udp", CROWD),
        ] {
            rules += &format!(
                "[[rule]]\nname = \"{proto}-{port}\"\nproto = \"{proto}\"\nlisten = \"{port}\"\n\
                 target = \"{}\"\nflows = \"keep\"\nmasquerade = {}\n",
                target(port),
                port == HIDDEN
            );
        }
        let file = tempfile::NamedTempFile::with_suffix(".toml")?;
        std::fs::write(file.path(), rules)?;
        let path = file.path().display().to_string();
        self.daemon.ok(&["apply", &path]).map(drop)
    }

    /// Has it happen once, and says for how long there was no way.
    pub(super) fn disturb(&mut self, disturbance: Disturbance, load: &Load) -> Result<Duration> {
        self.turns += 1;
        let gateway = &self.lab.gateway;
        let (own, spare) = (GATEWAY_WAN.of(self.family), SPARE.of(self.family));
        let bits = match self.family {
            Family::V4 => "24",
            Family::V6 => "64 nodad",
        };
        match disturbance {
            Disturbance::Restart => self.start_again()?,
            Disturbance::Upgrade => {
                let next = match self.builds.first() {
                    Some(other) if self.turns % 2 == 1 => other.path().to_owned(),
                    Some(_) | None => binary()?,
                };
                self.daemon.use_binary(&next);
                self.start_again()?;
            }
            Disturbance::RuleSwap => {
                self.apply(SECOND)?;
                self.apply(SERVER)?;
            }
            Disturbance::WanChange => {
                let began = Instant::now();
                gateway.ip(&format!("address del {own}/{bits} dev wan0\n").replace(" nodad", ""))?;
                std::thread::sleep(AWAY);
                gateway.ip(&format!("address add {own}/{bits} dev wan0\n"))?;
                return Ok(began.elapsed());
            }
            Disturbance::WanMove => self.move_wan(bits, load)?,
            Disturbance::LinkFlap => {
                let began = Instant::now();
                gateway.ip("link set lan0 down\n")?;
                std::thread::sleep(AWAY);
                gateway.ip("link set lan0 up\n")?;
                self.lab.lan_end().wait_until_up()?;
                self.lab.server_end().wait_until_up()?;
                return Ok(began.elapsed());
            }
            Disturbance::NeighbourFlush => gateway.ip("neigh flush all\n")?,
            Disturbance::Sweep => {
                // Whatever changes the WAN's addresses has the table swept at once.
                for _ in 0..5 {
                    gateway.ip(&format!("address add {spare}/{bits} dev wan0\n"))?;
                    self.daemon.ok(&["status"])?;
                    gateway.ip(
                        &format!("address del {spare}/{bits} dev wan0\n").replace(" nodad", "")
                    )?;
                    self.daemon.ok(&["status"])?;
                }
            }
            Disturbance::TableFull => {
                let dialled = GATEWAY_WAN.endpoint(self.family, CROWD);
                for _ in self.crowd.len()..CLIENTS {
                    let client = udp::connect(&self.lab.client, dialled)?;
                    for _ in 0..2 {
                        udp::exchange(&client, b"room for one more")?;
                    }
                    self.crowd.push(client);
                }
            }
        }
        Ok(Duration::ZERO)
    }

    /// Puts another address in the place of the WAN's, and fails unless within a second a flow to the new one has begun and none to
    /// the old one is left.
    fn move_wan(&mut self, bits: &str, load: &Load) -> Result<()> {
        let new = if self.wan == SPARE {
            GATEWAY_WAN
        } else {
            SPARE
        };
        let old = std::mem::replace(&mut self.wan, new);
        let (new_ip, old_ip) = (new.of(self.family), old.of(self.family));
        let tables = Tables::open_pinned(&self.daemon.pins())?;
        let began = Instant::now();
        self.lab.gateway.ip(&format!(
            "address add {new_ip}/{bits} dev wan0\naddress del {old_ip}/{} dev wan0\n",
            bits.trim_end_matches(" nodad")
        ))?;
        load.dial(new);
        let client = udp::connect(&self.lab.client, new.endpoint(self.family, ECHO))?;
        client.set_read_timeout(Some(KNOCK))?;
        wait_until("the new address to be forwarded", PATIENCE, || {
            Ok(udp::exchange(&client, b"moved here?").is_ok())
        })?;
        let forwarded = began.elapsed();
        wait_until("the flows to the old address to end", PATIENCE, || {
            let flows = tables.flows()?;
            Ok(flows.iter().all(|flow| flow.listen.ip() != old_ip))
        })?;
        let ended = began.elapsed();
        ensure!(
            forwarded.max(ended) <= here(MOVED),
            "the new address was forwarded after {forwarded:?}, the old one's flows were gone after {ended:?}"
        );
        Ok(())
    }

    fn start_again(&mut self) -> Result<()> {
        self.daemon.kill9()?;
        self.daemon.start()
    }
}
