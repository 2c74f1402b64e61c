//! Everything that talks to the kernel about BPF: loading, pins, links and maps.
//!
//! ```text
//! bpffs    the file system of the pins
//! pins     where everything of an instance is in bpffs, and how all of it goes
//! load     the embedded object → maps and programs, pinned; or what is pinned already, after a comparison
//! seal     which object the pinned programs come from
//! mode     which programs an interface gets          attach    programs → interfaces, as pinned links
//! tables   the maps by their names in the domain: rules, ports, flows, counters
//! pools    ports that stand for clients: made, kept from the gateway's own, given back
//! rest     how long such a port is nobody's after its last flow
//! map      typed maps with batch operations          syscall   bpf(2)
//! diagnostics  what the datapath tells the log
//! inspect  what is really attached           rehearsal  a private copy of all that, to try a packet on
//! vlan_tags  cards that take VLAN tags off before XDP sees them
//! clock    kernel ticks ↔ CLOCK_MONOTONIC            features  which interfaces take frames from XDP
//! ```

pub mod attach;
pub mod bpffs;
pub mod clock;
pub mod clsact;
pub mod counters;
pub mod cpus;
pub mod diagnostics;
pub mod flows;
pub mod frames;
pub mod half_open;
pub mod inspect;
pub mod load;
pub mod map;
pub mod mode;
pub mod pins;
pub mod pools;
pub mod rehearsal;
mod rest;
mod room;
mod seal;
pub mod sweep;
mod syscall;
pub mod tables;
mod unmet;
pub mod usages;
pub mod vlan_tags;
mod window;
pub mod xdp_features;

pub use attach::Attachment;
pub use flows::Flow;
pub use mode::Mode;
pub use pins::Pins;
pub use tables::{EndpointTrie, SourcePrefix, Tables};

/// The kernel object, built by this crate's build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PORTFWD_OBJECT"));

#[cfg(test)]
mod tests {
    use super::*;

    /// Every start reads all of it, and it is part of the program.
    #[test]
    fn the_kernel_object_has_its_types_and_no_debug_information() {
        let has = |name: &[u8]| OBJECT.windows(name.len()).any(|bytes| bytes == name);
        assert!(has(b".BTF.ext"));
        assert!(!has(b".debug_info"));
    }
}
