//! The test lab: real packets on one machine.
//!
//! A [`Lab`] is a client, a gateway and a server in network namespaces of their own, joined by veth
//! pairs. A [`Daemon`] is the `portfwd` binary at work in the gateway's namespace. Everything else
//! here makes traffic ([`nginx`], [`udp`], [`tcp`], [`iperf`], [`curl`], [`traceroute`]) or judges
//! it ([`capture`], [`snmp`]).
//!
//! Every resource releases itself, also when a test panics: namespaces are deleted, processes
//! killed by their own pid, files removed. Names hold the process id and a counter, so that several
//! labs live side by side. Nothing is touched that the lab did not make, but for `/sys/fs/bpf`,
//! which is mounted when it is missing.
//!
//! All of it needs root, as portfwd itself does.

pub mod address;
pub mod bpffs;
pub mod budgets;
pub mod capture;
pub mod cgroup;
pub mod chaos;
pub mod conntrack;
pub mod control;
pub mod curl;
pub mod daemon;
pub mod deadline;
pub mod dns;
pub mod foreign_xdp;
pub mod haproxy;
pub mod iperf;
pub mod iptables;
pub mod ipvs;
pub mod kernel_objects;
pub mod lab;
pub mod link;
pub mod machine;
pub mod manual;
pub mod namespace;
pub mod nftables;
pub mod nginx;
pub mod other_build;
pub mod ping;
pub mod pipeline;
pub mod process;
pub mod ring;
pub mod short_connections;
pub mod snmp;
pub mod soak;
pub mod socket;
pub mod stack;
pub mod start_times;
pub mod stun;
pub mod tagger;
pub mod tcp;
pub mod traceroute;
pub mod udp;
pub mod unit;
pub mod vm;
pub mod wire;
pub mod wrk;

pub use address::{DualStack, Family};
pub use daemon::{Daemon, Mode};
pub use lab::{Lab, LabOptions, Offloads, ServerSide};
pub use namespace::Namespace;
pub use process::Process;
