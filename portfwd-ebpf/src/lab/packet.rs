//! What the floor and the trials beside it have in common: how a packet is read, and how it leaves. TCP and UDP over IPv4.

use aya_ebpf::{helpers::generated::bpf_redirect, programs::XdpContext};
use portfwd_common::{
    abi::{FlowKey, Rewrite},
    net::{Delta, Ipv4, be::Ports},
};

/// The way out of a packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Way {
    /// Both addresses, as they lie in the frame.
    pub macs: [u32; 3],
    /// Index of the interface.
    pub egress: u32,
}

/// What becomes of the packets of a flow.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Change {
    /// The 5-tuple that takes the place of the packet's.
    pub rewrite: Rewrite<Ipv4>,
    /// The way out.
    pub way: Way,
}

/// What a translation changes in the header sums.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Deltas {
    /// Change of the addresses' words.
    pub address: Delta,
    /// Change of the ports' words.
    pub port: Delta,
}

/// The start of a frame of IPv4 without options.
#[repr(C)]
#[derive(Clone, Copy)]
struct Frame {
    macs: [u16; 6],
    ethertype: u16,
    version: u16,
    length: u16,
    identification: u16,
    fragment: u16,
    hop: u16,
    header_sum: u16,
}

const _: () = assert!(size_of::<Change>() == 32 && size_of::<Deltas>() == 4);

/// Offsets of what is in words of 32 bits: only 2-aligned, but loaded and stored as if aligned, for the reason at `copy_words` in
/// the datapath's `xdp.rs`.
const SRC: usize = size_of::<Frame>();
const DST: usize = SRC + 4;
const PORTS: usize = DST + 4;
const END: usize = PORTS + 4;

const IPV4: u16 = 0x0800_u16.to_be();
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Offsets of the header sums behind the IP header.
const TCP_SUM: usize = 34 + 16;
const UDP_SUM: usize = 34 + 6;

/// A packet that can be forwarded; its headers up to the ports are there.
pub struct Packet {
    data: usize,
    hop: u16,
}

/// The header sum of a packet's transport, which is there.
#[derive(Clone, Copy)]
pub struct TransportSum(*mut u16);

impl Packet {
    /// Reads the headers. The 5-tuple, of which maps are given the address, comes by itself: as a field it would keep all of the
    /// structure on the stack.
    #[inline(always)]
    pub fn read(ctx: &XdpContext) -> Option<(Self, FlowKey<Ipv4>)> {
        let data = ctx.data();
        if data + END > ctx.data_end() {
            return None;
        }
        // SAFETY: the comparison above; frames are 2-aligned, and so is the structure.
        let Frame {
            ethertype,
            version,
            fragment,
            hop,
            ..
        } = unsafe { *(data as *const Frame) };
        let [ttl, protocol] = hop.to_ne_bytes();
        let whole = fragment & 0x3fff_u16.to_be() == 0;
        if ethertype != IPV4 || version.to_ne_bytes()[0] != 0x45 || !whole || ttl <= 1 {
            return None;
        }
        // SAFETY: as above.
        let key = unsafe {
            FlowKey {
                src: *((data + SRC) as *const Ipv4),
                dst: *((data + DST) as *const Ipv4),
                ports: *((data + PORTS) as *const Ports),
                protocol: u32::from(protocol),
            }
        };
        Some((Self { data, hop }, key))
    }

    /// The bytes of the IP packet.
    #[inline(always)]
    pub fn length(&self) -> u16 {
        // SAFETY: `read` has compared.
        u16::from_be(unsafe { (*(self.data as *const Frame)).length })
    }

    /// Where its transport has its sum, if it is TCP or UDP.
    #[inline(always)]
    pub fn transport_sum(&self, ctx: &XdpContext) -> Option<TransportSum> {
        let [_, protocol] = self.hop.to_ne_bytes();
        let sum_at = match protocol {
            TCP => TCP_SUM,
            UDP => UDP_SUM,
            _ => return None,
        };
        if self.data + sum_at + 2 > ctx.data_end() {
            return None;
        }
        Some(TransportSum((self.data + sum_at) as *mut u16))
    }

    /// Sends it on with another 5-tuple.
    #[inline(always)]
    pub fn translate(&self, ctx: &XdpContext, change: &Change) -> Option<u32> {
        self.rewrite(ctx, change)?;
        Some(redirect(&change.way))
    }

    /// Gives it another 5-tuple, and what changes with it.
    #[inline(always)]
    pub fn rewrite(&self, ctx: &XdpContext, change: &Change) -> Option<()> {
        let sum = self.transport_sum(ctx)?;
        let rewrite = &change.rewrite;
        // SAFETY: `read` has compared; for the words see at `SRC`.
        unsafe {
            *((self.data + SRC) as *mut Ipv4) = rewrite.src;
            *((self.data + DST) as *mut Ipv4) = rewrite.dst;
            *((self.data + PORTS) as *mut Ports) = rewrite.ports;
        }
        let deltas = Deltas {
            address: rewrite.address_delta,
            port: rewrite.port_delta,
        };
        self.hop(sum, deltas, &change.way);
        Some(())
    }

    /// Sends it on to another destination; the port is in wire order.
    #[inline(always)]
    pub fn send_to(
        &self,
        sum: TransportSum,
        (address, port): (Ipv4, u16),
        deltas: Deltas,
        way: &Way,
    ) -> u32 {
        // SAFETY: `read` has compared; for the words see at `SRC`.
        unsafe {
            *((self.data + DST) as *mut Ipv4) = address;
            *((self.data + PORTS + 2) as *mut u16) = port;
        }
        self.hop(sum, deltas, way);
        redirect(way)
    }

    /// Changes what a translation changes besides the 5-tuple: sums, hop limit, MAC addresses.
    #[inline(always)]
    fn hop(&self, TransportSum(sum): TransportSum, deltas: Deltas, way: &Way) {
        let [ttl, protocol] = self.hop.to_ne_bytes();
        let frame = self.data as *mut Frame;
        // SAFETY: `read` and `transport_sum` have compared, and the frame is 2-aligned.
        unsafe {
            let delta = deltas.address.sum().plus(deltas.port.word());
            *sum = if protocol == UDP {
                delta.apply_udp(*sum)
            } else {
                delta.apply(*sum)
            };
            let ([a, b, c], macs) = (way.macs, frame as *mut u32);
            *macs = a;
            *macs.add(1) = b;
            *macs.add(2) = c;
            // One less in the high byte of the word that holds hop limit and protocol (RFC 1141).
            let hop = u16::from_ne_bytes([ttl - 1, protocol]);
            (*frame).hop = hop;
            (*frame).header_sum = deltas
                .address
                .sum()
                .replace(self.hop, hop)
                .apply((*frame).header_sum);
        }
    }
}

#[inline(always)]
fn redirect(way: &Way) -> u32 {
    // SAFETY: a helper with integer arguments.
    unsafe { bpf_redirect(way.egress, 0) as u32 }
}
