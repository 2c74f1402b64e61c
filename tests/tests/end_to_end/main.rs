//! portfwd end to end: the binary in a gateway's namespace, real sockets on either side of it.

mod addresses;
mod captures;
mod coexistence;
mod command_line;
mod detach;
mod doctor;
mod icmp_errors;
mod instances;
mod interfaces;
mod layouts;
mod live_rules;
mod many_rules;
mod modes;
mod mtu;
mod neighbours;
mod private_sources;
mod ranges;
mod restart;
mod scene;
mod service;
mod soak;
mod table_full;
mod tcp_forwards;
mod tunnel;
mod udp_forwards;
mod wan_address;
