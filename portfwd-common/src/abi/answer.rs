//! What answers to packets that left the gateway would be. A rule for everything else leaves them alone.

use bytemuck::{Pod, Zeroable};

use super::{FlowKey, Protocol};
use crate::net::{Address, Ipv6, be::Ports};

/// Key of ANSWERS: a 5-tuple as the answer carries it. One map serves both families, because only a first packet that no other rule
/// is for is looked up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct AnswerKey {
    /// Source in the first bytes ([`Address::widen`]).
    pub src: Ipv6,
    /// Destination, likewise.
    pub dst: Ipv6,
    /// Both ports.
    pub ports: Ports,
    /// [`Protocol::class`] of family and protocol.
    pub class: u32,
}

impl AnswerKey {
    /// The key of a packet that comes in.
    #[inline(always)]
    pub fn new<A: Address>(key: &FlowKey<A>, protocol: Protocol) -> Self {
        Self {
            src: key.src.widen(),
            dst: key.dst.widen(),
            ports: key.ports,
            class: u32::from(protocol.class(A::FAMILY)),
        }
    }
}

const _: () = assert!(size_of::<AnswerKey>() == 40);
