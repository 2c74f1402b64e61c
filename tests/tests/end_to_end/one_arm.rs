//! A gateway with one arm: clients and servers are on the same segment, behind one interface.
//!
//! ```text
//!             ┌── gw0 gateway
//! switch br0 ─┼── h0 host: a client beside the server, and a router with clients behind it
//!             └── s0 server, whose router is the gateway
//! ```

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use portfwd_tests::address::DualStack;
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::deadline::{PATIENCE, here};
use portfwd_tests::link::{End, connect};
use portfwd_tests::{Family, Namespace, bpffs, tcp, udp};
use rstest::rstest;

const GATEWAY: DualStack = DualStack::new(8, 1);
const SERVER: DualStack = DualStack::new(8, 10);
const NEIGHBOUR: DualStack = DualStack::new(8, 7);
/// Behind the host, as its own second address.
const REMOTE: DualStack = DualStack::new(108, 7);
const CLIENT_PORT: u16 = 20_000;

struct OneArm {
    daemon: Daemon,
    host: Namespace,
    server: Namespace,
    _gateway: Namespace,
    _switch: Namespace,
}

impl OneArm {
    fn new(mode: Mode) -> Result<Self> {
        bpffs::ensure_mounted()?;
        let (switch, gateway) = (Namespace::new("switch")?, Namespace::new("gateway")?);
        let (host, server) = (Namespace::new("host")?, Namespace::new("server")?);
        for namespace in [&gateway, &host, &server] {
            namespace.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
            namespace.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        }
        gateway.sysctl("net/ipv4/ip_forward", "1")?;
        gateway.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        switch.ip("link add br0 type bridge forward_delay 0\nlink set br0 up\n")?;
        let ends = [
            (&gateway, "gw0", GATEWAY),
            (&host, "h0", NEIGHBOUR),
            (&server, "s0", SERVER),
        ];
        for (namespace, interface, DualStack { v4, v6 }) in ends {
            let port = format!("p-{interface}");
            let (near, far) = (
                End {
                    namespace: &switch,
                    interface: &port,
                },
                End {
                    namespace,
                    interface,
                },
            );
            connect(near, far)?;
            switch.ip(&format!("link set {port} master br0 up\n"))?;
            namespace.ip(&format!(
                "link set {interface} up\naddr add {v4}/24 dev {interface}\naddr add {v6}/64 dev {interface} nodad\n"
            ))?;
            // Whole frames, as on a wire.
            near.turn_transmit_offloads_off()?;
            near.turn_gro_on()?;
            far.turn_transmit_offloads_off()?;
            far.turn_gro_on()?;
        }
        server.ip(&format!(
            "route add default via {}\nroute add default via {}\n",
            GATEWAY.v4, GATEWAY.v6
        ))?;
        host.ip(&format!(
            "addr add {}/32 dev h0\naddr add {}/128 dev h0 nodad\n",
            REMOTE.v4, REMOTE.v6
        ))?;
        gateway.ip(&format!(
            "route add {}/32 via {}\nroute add {}/128 via {}\n",
            REMOTE.v4, NEIGHBOUR.v4, REMOTE.v6, NEIGHBOUR.v6
        ))?;
        let options = DaemonOptions {
            wan: vec!["gw0".into()],
            lan: vec!["gw0".into()],
            ..DaemonOptions::new(mode)
        };
        Ok(Self {
            daemon: options.start(&gateway)?,
            host,
            server,
            _gateway: gateway,
            _switch: switch,
        })
    }

    fn forward(&self, options: &[&str]) -> Result<()> {
        for (name, family) in [("over-ipv4", Family::V4), ("over-ipv6", Family::V6)] {
            let target = SERVER.endpoint(family, 80).to_string();
            self.daemon
                .add_with(name, ["both", "8080", &target], options)?;
        }
        Ok(())
    }

    /// Talks to the server from an address, and says whom the server took for the client.
    fn talk(&self, client: &Namespace, from: SocketAddr) -> Result<SocketAddr> {
        let family = Family::of(from.ip());
        let (udp_echo, _tcp_echo) = (
            udp::Echo::start(&self.server, family, 80)?,
            tcp::Echo::start(&self.server, family, 80)?,
        );
        let listen = GATEWAY.endpoint(family, 8080);
        let socket = udp::bind(client, from)?;
        socket.set_read_timeout(Some(here(PATIENCE)))?;
        socket.connect(listen)?;
        for _ in 0..3 {
            udp::exchange(&socket, b"in and out").with_context(|| format!("from {from}"))?;
        }
        let mut stream = tcp::connect(client, listen)?;
        tcp::exchange(&mut stream, &vec![7; 100_000])
            .with_context(|| format!("by TCP, beside {from}"))?;
        udp::close(client, socket)?;
        let peers: BTreeSet<_> = udp_echo.peers();
        assert_eq!(peers.len(), 1);
        Ok(peers.into_iter().collect::<Vec<_>>()[0])
    }
}

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn one_interface_is_enough(#[case] mode: Mode) -> Result<()> {
    let lab = OneArm::new(mode)?;
    lab.forward(&[])?;
    for family in Family::BOTH {
        // From elsewhere: the server sees the client, and answers by way of its router.
        let remote = REMOTE.endpoint(family, CLIENT_PORT);
        assert_eq!(lab.talk(&lab.host, remote)?, remote);
        // From beside the server, and from the server itself: it would answer past the gateway.
        let near = [(&lab.host, NEIGHBOUR), (&lab.server, SERVER)];
        for ((client, from), port) in near.into_iter().zip(CLIENT_PORT..) {
            let seen = lab.talk(client, from.endpoint(family, port))?;
            assert_eq!(seen, GATEWAY.endpoint(family, port));
        }
    }
    let status = lab.daemon.ok(&["-j", "status"])?;
    assert!(status.contains("\"role\":\"wan+lan\""), "{status}");
    Ok(())
}

/// The server's router is not the gateway: it has no route to the clients at all.
#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn a_server_with_another_router_is_reached_by_masquerade(#[case] mode: Mode) -> Result<()> {
    let lab = OneArm::new(mode)?;
    let DualStack { v4, v6 } = GATEWAY;
    lab.server.ip(&format!(
        "route del default via {v4}\nroute del default via {v6}\n"
    ))?;
    lab.forward(&["--masquerade"])?;
    for family in Family::BOTH {
        for from in [REMOTE, NEIGHBOUR] {
            let seen = lab.talk(&lab.host, from.endpoint(family, CLIENT_PORT))?;
            assert_eq!(seen.ip(), GATEWAY.of(family));
        }
    }
    Ok(())
}
