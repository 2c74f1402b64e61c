//! Client, gateway and server, each a network namespace.
//!
//! ```text
//! client c0 ──── wan0 gateway lan0 ──── s0 server            ServerSide::Direct
//! client c0 ──── wan0 gateway lan0 ── r0 router r1 ── s0 server   ServerSide::BehindRouter
//! client c0 ──── wan0 gateway lan0 ──── s0 server            ServerSide::TwoLans
//!                             lan1 ──── s0 second server
//! ```
//!
//! The servers' default route is the gateway. The client has no route to them: only a translation
//! at the gateway makes them answer.

use std::net::IpAddr;

use anyhow::{Context, Result};

use crate::address::{
    CLIENT, DualStack, Family, GATEWAY_LAN, GATEWAY_SECOND_LAN, GATEWAY_WAN, ROUTER_FAR,
    ROUTER_LAN, SECOND_SERVER, SERVER, SERVER_BEHIND_ROUTER,
};
use crate::bpffs;
use crate::daemon::Mode;
use crate::link::{End, connect};
use crate::namespace::Namespace;

/// What the endpoints leave for hardware to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offloads {
    /// Unfinished checksums and segments of up to 64 KiB, the default of a veth.
    #[default]
    On,
    /// Whole frames with finished checksums, as on a wire: what XDP needs.
    Off,
}

impl Offloads {
    fn set_on(self, end: End<'_>) -> Result<()> {
        match self {
            Self::On => end.turn_gro_on(),
            Self::Off => end.turn_transmit_offloads_off(),
        }
    }
}

/// What is on the gateway's LAN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServerSide {
    /// The server.
    #[default]
    Direct,
    /// A router, and the server behind it.
    BehindRouter {
        /// MTU of the router's route to the server, in bytes, as if a narrow link were further on:
        /// the server's own stays at 1500, so that only an ICMP error of the router tells anybody.
        mtu: u32,
    },
    /// The server, and a second one on a LAN of its own.
    TwoLans,
}

/// How a [`Lab`] is built.
#[derive(Clone, Copy, Debug)]
pub struct LabOptions {
    /// What client and server leave for hardware to do.
    pub offloads: Offloads,
    /// MTU between client and gateway, in bytes.
    pub wan_mtu: u32,
    /// MTU between gateway and LAN, in bytes.
    pub lan_mtu: u32,
    /// What is on the LAN.
    pub server_side: ServerSide,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            offloads: Offloads::default(),
            wan_mtu: 1500,
            lan_mtu: 1500,
            server_side: ServerSide::default(),
        }
    }
}

impl LabOptions {
    /// The options under which `mode` works over veth: XDP needs the offloads off.
    pub fn for_mode(mode: Mode) -> Self {
        let offloads = match mode {
            Mode::Xdp | Mode::XdpGeneric => Offloads::Off,
            Mode::Tc | Mode::Auto => Offloads::On,
        };
        Self {
            offloads,
            ..Self::default()
        }
    }

    /// The same with another server side.
    pub fn server_side(self, server_side: ServerSide) -> Self {
        Self {
            server_side,
            ..self
        }
    }

    /// The same with other offloads.
    pub fn offloads(self, offloads: Offloads) -> Self {
        Self { offloads, ..self }
    }

    /// Builds the lab.
    pub fn build(self) -> Result<Lab> {
        Lab::build(self)
    }
}

/// A client, a gateway and a server, joined by veth pairs; taken down on drop.
pub struct Lab {
    /// Dials the gateway.
    pub client: Namespace,
    /// Where portfwd works, between `wan0` and `lan0`.
    pub gateway: Namespace,
    /// Is dialled through the gateway.
    pub server: Namespace,
    /// The router between gateway and server, with [`ServerSide::BehindRouter`].
    pub router: Option<Namespace>,
    /// The server on the second LAN, with [`ServerSide::TwoLans`].
    pub second_server: Option<Namespace>,
}

impl Lab {
    /// The lab in which `mode` works, with the server on the LAN.
    pub fn for_mode(mode: Mode) -> Result<Self> {
        LabOptions::for_mode(mode).build()
    }

    fn build(options: LabOptions) -> Result<Self> {
        bpffs::ensure_mounted()?;
        let host = |role| -> Result<Namespace> {
            let namespace = Namespace::new(role)?;
            quieten(&namespace)?;
            Ok(namespace)
        };
        let mut lab = Self {
            client: host("client")?,
            gateway: host("gateway")?,
            server: host("server")?,
            router: None,
            second_server: None,
        };
        make_router(&lab.gateway)?;
        lab.join_client(GATEWAY_WAN, options.wan_mtu)?;
        match options.server_side {
            ServerSide::Direct => lab.join_server(options.lan_mtu)?,
            ServerSide::BehindRouter { mtu } => {
                let router = host("router")?;
                lab.join_server_behind(&router, options.lan_mtu, mtu)?;
                lab.router = Some(router);
            }
            ServerSide::TwoLans => {
                lab.join_server(options.lan_mtu)?;
                let second = host("server2")?;
                lab.join_second_server(&second, options.lan_mtu)?;
                lab.second_server = Some(second);
            }
        }
        lab.set_offloads(options.offloads)?;
        Ok(lab)
    }

    fn join_client(&self, wan: DualStack, mtu: u32) -> Result<()> {
        Hop {
            near: (self.client_end(), CLIENT),
            far: (self.wan_end(), wan),
            mtu,
        }
        .build()
    }

    /// Deletes the gateway's WAN interface, and with it the client's.
    pub fn delete_wan(&self) -> Result<()> {
        self.gateway.ip("link del wan0\n")
    }

    /// Makes the WAN again after [`Self::delete_wan`], under another index and with the usual addresses.
    pub fn recreate_wan(&self, offloads: Offloads) -> Result<()> {
        self.recreate_wan_with(offloads, GATEWAY_WAN)
    }

    /// The same with other addresses.
    pub fn recreate_wan_with(&self, offloads: Offloads, wan: DualStack) -> Result<()> {
        self.join_client(wan, 1500)?;
        offloads.set_on(self.client_end())?;
        self.client_end().wait_until_up()?;
        self.wan_end().wait_until_up()
    }

    /// Deletes the gateway's LAN interface, and with it the server's.
    pub fn delete_lan(&self) -> Result<()> {
        self.gateway.ip("link del lan0\n")
    }

    /// Makes the LAN again after [`Self::delete_lan`], with the server on it.
    pub fn recreate_lan(&self, offloads: Offloads) -> Result<()> {
        self.join_server(1500)?;
        offloads.set_on(self.server_end())?;
        self.server_end().wait_until_up()?;
        self.lan_end().wait_until_up()
    }

    fn join_server(&self, mtu: u32) -> Result<()> {
        Hop {
            near: (self.lan_end(), GATEWAY_LAN),
            far: (self.server_end(), SERVER),
            mtu,
        }
        .build()?;
        default_route(&self.server, GATEWAY_LAN)
    }

    fn join_server_behind(&self, router: &Namespace, lan_mtu: u32, far_mtu: u32) -> Result<()> {
        make_router(router)?;
        let end = |interface| End {
            namespace: router,
            interface,
        };
        Hop {
            near: (self.lan_end(), GATEWAY_LAN),
            far: (end("r0"), ROUTER_LAN),
            mtu: lan_mtu,
        }
        .build()?;
        Hop {
            near: (end("r1"), ROUTER_FAR),
            far: (self.server_end(), SERVER_BEHIND_ROUTER),
            mtu: 1500,
        }
        .build()?;
        router.ip(&format!(
            "route replace 10.3.0.0/24 dev r1 src {} mtu lock {far_mtu}\n\
             route replace 2001:db8:3::/64 dev r1 proto kernel metric 256 mtu lock {far_mtu}\n",
            ROUTER_FAR.v4
        ))?;
        default_route(router, GATEWAY_LAN)?;
        default_route(&self.server, ROUTER_FAR)?;
        self.gateway.ip(&format!(
            "route add 10.3.0.0/24 via {}\nroute add 2001:db8:3::/64 via {}\n",
            ROUTER_LAN.v4, ROUTER_LAN.v6
        ))
    }

    fn join_second_server(&self, second: &Namespace, mtu: u32) -> Result<()> {
        let gateway_end = End {
            namespace: &self.gateway,
            interface: "lan1",
        };
        let server_end = End {
            namespace: second,
            interface: "s0",
        };
        Hop {
            near: (gateway_end, GATEWAY_SECOND_LAN),
            far: (server_end, SECOND_SERVER),
            mtu,
        }
        .build()?;
        default_route(second, GATEWAY_SECOND_LAN)
    }

    fn set_offloads(&self, offloads: Offloads) -> Result<()> {
        let second = self.second_server.as_ref().map(|namespace| End {
            namespace,
            interface: "s0",
        });
        let router = self.router.as_ref().map(|namespace| End {
            namespace,
            interface: "r0",
        });
        let endpoints = [
            Some(self.client_end()),
            Some(self.server_end()),
            second,
            router,
        ];
        endpoints
            .into_iter()
            .flatten()
            .try_for_each(|end| offloads.set_on(end))
    }

    /// The client's interface.
    pub fn client_end(&self) -> End<'_> {
        End {
            namespace: &self.client,
            interface: "c0",
        }
    }

    /// The gateway's interface towards the client.
    pub fn wan_end(&self) -> End<'_> {
        End {
            namespace: &self.gateway,
            interface: "wan0",
        }
    }

    /// The gateway's interface towards the server.
    pub fn lan_end(&self) -> End<'_> {
        End {
            namespace: &self.gateway,
            interface: "lan0",
        }
    }

    /// The server's interface.
    pub fn server_end(&self) -> End<'_> {
        End {
            namespace: &self.server,
            interface: "s0",
        }
    }

    /// The server's addresses.
    pub fn server_address(&self) -> DualStack {
        if self.router.is_some() {
            SERVER_BEHIND_ROUTER
        } else {
            SERVER
        }
    }

    /// The server on the second LAN.
    pub fn second_server(&self) -> Result<&Namespace> {
        self.second_server
            .as_ref()
            .context("this lab has one server")
    }

    /// Gives the gateway's WAN interface another address.
    pub fn add_external_address(&self, address: IpAddr) -> Result<()> {
        self.gateway.ip(&match Family::of(address) {
            Family::V4 => format!("addr add {address}/24 dev wan0\n"),
            Family::V6 => format!("addr add {address}/64 dev wan0 nodad\n"),
        })
    }

    /// Takes an address from the gateway's WAN interface.
    pub fn remove_external_address(&self, address: IpAddr) -> Result<()> {
        self.gateway.ip(&match Family::of(address) {
            Family::V4 => format!("addr del {address}/24 dev wan0\n"),
            Family::V6 => format!("addr del {address}/64 dev wan0\n"),
        })
    }
}

/// A veth pair with its addresses.
struct Hop<'a> {
    near: (End<'a>, DualStack),
    far: (End<'a>, DualStack),
    mtu: u32,
}

impl Hop<'_> {
    fn build(self) -> Result<()> {
        connect(self.near.0, self.far.0)?;
        for (end, address) in [self.near, self.far] {
            let (name, DualStack { v4, v6 }) = (end.interface, address);
            end.namespace.ip(&format!(
                "link set {name} mtu {} up\naddr add {v4}/24 dev {name}\naddr add {v6}/64 dev {name} nodad\n",
                self.mtu
            ))?;
        }
        Ok(())
    }
}

/// Leaves out what would make a lab wait or its packets depend on the clock: duplicate address
/// detection, router solicitations, and the rate limit on ICMP errors.
pub(crate) fn quieten(namespace: &Namespace) -> Result<()> {
    for (key, value) in [
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/default/router_solicitations", "0"),
        ("net/ipv4/icmp_ratelimit", "0"),
        ("net/ipv6/icmp/ratelimit", "0"),
    ] {
        namespace.sysctl(key, value)?;
    }
    Ok(())
}

/// Makes the namespace's kernel forward packets.
fn make_router(namespace: &Namespace) -> Result<()> {
    namespace.sysctl("net/ipv4/ip_forward", "1")?;
    namespace.sysctl("net/ipv6/conf/all/forwarding", "1")
}

fn default_route(namespace: &Namespace, via: DualStack) -> Result<()> {
    namespace.ip(&format!(
        "route add default via {}\nroute add default via {}\n",
        via.v4, via.v6
    ))
}
