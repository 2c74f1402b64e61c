//! A gateway that is a virtual machine with two network cards, between a client and a server of this one.
//!
//! ```text
//! client c0 ─tap─ wan0 machine lan0 ─tap─ s0 server
//! ```
//!
//! Client and server are network namespaces as in a [`crate::Lab`], with the same addresses; what they send comes out of the cards'
//! receive queues in the machine, by way of the emulated hardware. Inside, portfwd is started and asked by its serial line.

mod console;
mod guest;

use std::ffi::OsString;

use anyhow::{Context, Result};

pub use console::Console;
pub use guest::Attached;

use crate::address::{CLIENT, DualStack, GATEWAY_LAN, SERVER};
use crate::deadline::{PATIENCE, wait_until};
use crate::lab::quieten;
use crate::link::End;
use crate::namespace::Namespace;

/// A network card of the machine.
struct Card {
    /// Its name there.
    name: &'static str,
    /// The interface at its other end, in the namespace of the client or the server.
    end: &'static str,
    /// Its hardware address.
    mac: &'static str,
}

const CARDS: [Card; 2] = [
    Card {
        name: "wan0",
        end: "c0",
        mac: "52:54:00:00:01:01",
    },
    Card {
        name: "lan0",
        end: "s0",
        mac: "52:54:00:00:02:01",
    },
];

/// What the machine's network cards are like.
#[derive(Clone, Copy, Debug)]
pub struct Cards {
    /// Pairs of queues. The driver takes one for each of the machine's CPUs, and wants another for each for what XDP sends.
    pub queues: u32,
    /// More options of `virtio-net-pci`, such as `guest_tso4=off`.
    pub options: &'static [&'static str],
}

/// A machine that runs; it is ended, and the namespaces are deleted, on drop.
pub struct Vm {
    console: Console,
    /// Dials the gateway.
    pub client: Namespace,
    /// Is dialled through the gateway.
    pub server: Namespace,
    /// Where the machine's own process is.
    hypervisor: Namespace,
}

impl Vm {
    /// Boots a machine by a command, to which the cards are added.
    pub fn boot(command: &[OsString], cards: Cards) -> Result<Self> {
        let client = Namespace::new("client")?;
        let server = Namespace::new("server")?;
        let hypervisor = Namespace::new("vm")?;
        quieten(&client)?;
        quieten(&server)?;
        // The machine must not outlive this process, however it ends.
        let mut machine = hypervisor.command("setpriv")?;
        machine
            .args(["--pdeathsig", "KILL", "--"])
            .args(command)
            .args(cards.arguments());
        let mut vm = Self {
            console: Console::open(machine)?,
            client,
            server,
            hypervisor,
        };
        vm.join()?;
        vm.console.wait_until_ready()?;
        vm.set_up_cards()?;
        vm.meet_neighbours()?;
        Ok(vm)
    }

    /// Gives client and server the other ends of the cards, which the machine makes in its own namespace when it starts.
    fn join(&self) -> Result<()> {
        for (namespace, end, address) in
            [(&self.client, "c0", CLIENT), (&self.server, "s0", SERVER)]
        {
            wait_until("the machine's network cards", PATIENCE, || {
                let links = self.hypervisor.ip_json(&["link", "show"])?;
                let links = links.as_array().context("ip shows no list")?;
                Ok(links.iter().any(|link| link["ifname"] == end))
            })?;
            let DualStack { v4, v6 } = address;
            self.hypervisor
                .ip(&format!("link set {end} netns {}\n", namespace.name()))?;
            // The machine is slow: what it has not taken yet is to wait, not to be dropped.
            namespace.ip(&format!(
                "link set {end} txqueuelen 20000 up\naddr add {v4}/24 dev {end}\naddr add {v6}/64 dev {end} nodad\n"
            ))?;
        }
        self.server.ip(&format!(
            "route add default via {}\nroute add default via {}\n",
            GATEWAY_LAN.v4, GATEWAY_LAN.v6
        ))
    }

    /// The client's interface.
    pub fn client_end(&self) -> End<'_> {
        End {
            namespace: &self.client,
            interface: "c0",
        }
    }

    /// The server's interface.
    pub fn server_end(&self) -> End<'_> {
        End {
            namespace: &self.server,
            interface: "s0",
        }
    }
}

impl Cards {
    /// As qemu takes them.
    fn arguments(self) -> Vec<String> {
        let Self { queues, options } = self;
        // One vector for each queue, one for the control queue and one for changes of the configuration.
        let vectors = 2 * queues + 2;
        let options: String = options.iter().map(|option| format!(",{option}")).collect();
        let several = if queues > 1 { "on" } else { "off" };
        let mut arguments = Vec::new();
        for Card { name, end, mac } in CARDS {
            arguments.extend([
                "-netdev".to_owned(),
                format!("tap,id={name},ifname={end},script=no,downscript=no,vhost=off,queues={queues}"),
                "-device".to_owned(),
                format!("virtio-net-pci,netdev={name},mac={mac},mq={several},vectors={vectors},romfile={options}"),
            ]);
        }
        arguments
    }
}
