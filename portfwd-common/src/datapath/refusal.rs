//! What the sender of a packet is told that is dropped: an ICMP error, the only packet that portfwd composes.
//!
//! - A client whose flow cannot begin because there is no room for it: host unreachable (RFC 6888 REQ-11, RFC 5508 REQ-8).
//! - Whoever sends a packet of a flow whose client is hidden, there or back, that is too big for the way out, or whose TTL or hop
//!   limit ends here (RFC 1812 sections 4.3.3.3 and 5.3.1, RFC 4443 sections 3.2 and 3.3).
//!
//! The kernel cannot tell them: of the one it has no flow by which to translate a quotation back, of the others both addresses are
//! the gateway's own once they are translated, and what was sent is for the gateway itself.
//!
//! The error takes the place of the packet that it is about, and leaves by the interface by which that came, in its frame turned
//! round. So it costs no route and no neighbour, and nobody else than who has sent the packet gets it.
//!
//! It quotes the IP header and eight bytes behind it, which is what every host can tell a socket by (RFC 792, RFC 4443 section
//! 2.4 (c) allows more). More would be a gift to somebody who sends packets in another's name: so the error is no longer than
//! what it is about and its own two headers, 28 bytes over IPv4 and 48 over IPv6.
//!
//! How many are sent is limited for each receiver, not for all together. The kernel's limit for all was a way to learn from afar
//! what others have been told (CVE-2020-25705), and one client would use it up for the rest. Receivers share [`ERROR_BUDGETS`]
//! words by a secret, so the sum is bounded as well: about a thousand a second, which is the kernel's number for all
//! (`icmp_msgs_per_sec`). A host remembers an MTU for all of its connections to the address, so it needs one error and no more.

use bytemuck::{Pod, Zeroable};

use super::{
    Scene, Views,
    limits::{has_pace, keeps_pace},
    path::Obstacle,
    tables::{Repeat, Repeated, Repeats, Tables},
    verdict::{DropReason, Hook, PassReason, Verdict},
    workspace::{Kind, Workspace},
};
use crate::{
    abi::{ERROR_BUDGETS, FlowDir, LinkLayer, Rate},
    net::{
        Address, Be16, PacketBuf, Sum,
        headers::{Ethernet, ICMP_LEN, IcmpHeader, MacWords},
    },
};

/// Errors that a client gets: four a second, six at once. The burst is the kernel's for each of its peers (`XRLIM_BURST_FACTOR`); its
/// one a second is too few for a network behind one address.
pub const ERROR_RATE: Rate = Rate {
    flows: 4,
    seconds: 1,
    burst: 6,
};
/// Bytes of a transport header that an error quotes.
const QUOTED_TRANSPORT: u32 = 8;
/// Bytes that an error quotes at most: an IPv4 header with options is shorter, IPv6 extension headers may be longer. No more than
/// what a hook brings into reach of an unusual packet.
pub const QUOTED_BYTES: usize = 128;

/// Words that are added up in a step: all at once, LLVM would have them all on the stack first; one by one, the verifier would look at
/// what follows once for every number of them.
const CHUNK: usize = 32;

/// What an error quotes, with zeroes behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Quotation([[u16; CHUNK]; CHUNKS]);

const CHUNKS: usize = QUOTED_BYTES / 2 / CHUNK;

impl Quotation {
    /// Nothing yet.
    pub const EMPTY: Self = Self([[0; CHUNK]; CHUNKS]);
}

/// The headers of an error.
#[derive(Clone, Copy, Debug)]
pub struct ErrorHeaders<A: Address> {
    /// IP.
    pub ip: A::Header,
    /// ICMP.
    pub icmp: IcmpHeader,
}

/// What an error says, in the numbers of its family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notice {
    /// ICMP type.
    kind: u8,
    /// ICMP code.
    code: u8,
    /// The MTU that the packet does not fit into, bytes; 0 if it is about something else.
    mtu: u16,
}

/// What a sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message {
    /// There is no room for the flow.
    NoRoom,
    /// TTL or hop limit ends here.
    HopLimit,
    /// The packet does not fit into the MTU of its way out.
    TooBig,
}

impl Message {
    /// About a packet whose way out has an MTU.
    #[inline(always)]
    const fn notice<A: Address>(self, mtu: u16) -> Notice {
        let ([kind, code], mtu) = match self {
            Self::NoRoom => (A::HOST_UNREACHABLE, 0),
            Self::HopLimit => (A::HOP_LIMIT_EXCEEDED, 0),
            Self::TooBig => (A::PACKET_TOO_BIG, mtu),
        };
        Notice { kind, code, mtu }
    }
}

/// What the sender of the packet is to be told, by what the step before has come to; `None` if nothing.
#[inline(always)]
fn message<A: Address>(work: &Workspace<A>) -> Option<Message> {
    let reason = match work.verdict() {
        Verdict::Drop(reason) => reason,
        Verdict::Pass(_) | Verdict::Refuse(_) | Verdict::Forward(_) => return None,
    };
    match reason {
        DropReason::TableFull | DropReason::NoPort => match work.direction {
            FlowDir::Original => Some(Message::NoRoom),
            FlowDir::Reply => None,
        },
        DropReason::NoWayOut => match work.subject.kind {
            Kind::Segment => match work.subject.load.obstacle(work.path.mtu) {
                Some(Obstacle::HopLimit) => Some(Message::HopLimit),
                Some(Obstacle::TooBig) => Some(Message::TooBig),
                // That there is no route may be so on purpose (`ip route add blackhole`).
                Some(Obstacle::MustBeFragmented | Obstacle::NoRoute) | None => None,
            },
            // Nobody is told of an error (RFC 1122 section 3.2.2).
            Kind::Error | Kind::Malformed => None,
        },
        DropReason::BadTcpFlags
        | DropReason::TupleClash
        | DropReason::FragmentationNeeded
        | DropReason::Vanished
        | DropReason::RewriteFailed
        | DropReason::PrivateSource
        | DropReason::BadFragment
        | DropReason::FragmentOverlap
        | DropReason::FragmentRefused
        | DropReason::FragmentTooLarge
        | DropReason::RstOutOfWindow
        | DropReason::ErrorOutOfWindow
        | DropReason::NoSource
        | DropReason::SourceRefused
        | DropReason::SourceRate
        | DropReason::SourceFlows
        | DropReason::RuleRate
        | DropReason::RuleFlows
        | DropReason::MartianSource => None,
    }
}

/// Whether the step before has dropped a packet whose sender is to be told.
#[inline(always)]
pub fn is_due<A: Address>(work: &Workspace<A>) -> bool {
    message(work).is_some()
}

/// What becomes of a packet whose drop [is due](is_due) to be told of. XDP leaves it, untouched, to TC, which comes to the same
/// again and can send the error; but only if there is one to be sent: a flood goes no further than XDP.
#[inline(always)]
pub fn tell<A, P, T>(work: &mut Workspace<A>, views: &Views<P>, scene: &Scene<'_, T>) -> Verdict
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let verdict = work.verdict();
    let Verdict::Drop(reason) = verdict else {
        return verdict;
    };
    let Some(message) = message(work) else {
        return verdict;
    };
    if !may_be_told(work, views, scene) {
        return verdict;
    }
    // By numbers: the program that writes them has one way for all.
    work.notice = message.notice::<A>(work.path.mtu);
    let slot = budget_slot(work.key.src, scene.config.seed);
    let Some(budget) = scene.tables.error_budget(slot) else {
        return verdict;
    };
    let (config, now) = (scene.config, scene.now);
    match scene.arrival.hook {
        Hook::Xdp if has_pace(&budget, &ERROR_RATE, config, now) => {
            work.claim.hand_on();
            Verdict::Pass(PassReason::SlowPath)
        }
        Hook::Tc | Hook::TcSlow if keeps_pace(&budget, &ERROR_RATE, config, now) => {
            Verdict::Refuse(reason)
        }
        // The gateway itself gets none by the wire.
        Hook::Xdp | Hook::Tc | Hook::TcSlow | Hook::TcOut => verdict,
    }
}

/// Whether an ICMP error may be sent about the packet (RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7, RFC 4443 section 2.4
/// (e)). That it is no ICMP error, no later fragment and sent to nobody else has been seen to.
#[inline(always)]
fn may_be_told<A, P, T>(work: &Workspace<A>, views: &Views<P>, scene: &Scene<'_, T>) -> bool
where
    A: Address,
    P: PacketBuf,
    T: Tables,
{
    let source = work.key.src;
    let is_whole = match work.verdict() {
        // What several packets were put together into has the headers of the first, and the kernel quotes these of it, too.
        Verdict::Drop(DropReason::NoWayOut) => true,
        Verdict::Drop(_) | Verdict::Refuse(_) | Verdict::Pass(_) | Verdict::Forward(_) => {
            scene.arrival.segment_size == 0
        }
    };
    is_whole
        && source.is_unicast()
        && !is_broadcast(source, scene)
        && !scene.tables.is_local(source)
        && is_from_station(views.frame, scene.arrival.link)
}

/// Whether an address is all hosts of the network that the packet came in from.
#[inline(always)]
fn is_broadcast<A: Address, T>(address: A, scene: &Scene<'_, T>) -> bool {
    scene.ingress.is_near(address) && address.is_all_ones_behind(scene.ingress.prefix::<A>())
}

/// Whether a frame comes from one station: no group has sent it.
#[inline(always)]
fn is_from_station<P: PacketBuf>(frame: P, link: LinkLayer) -> bool {
    const GROUP: u8 = 1;
    match link {
        LinkLayer::Ethernet => frame
            .read::<Ethernet>(0)
            .is_some_and(|header| header.src[0].to_ne_bytes()[0] & GROUP == 0),
        LinkLayer::Raw => true,
    }
}

/// The word that limits a client's errors: that of its address, over IPv6 of its network of 64 bits. Which clients share one, only
/// somebody with the secret can tell.
#[inline(always)]
fn budget_slot<A: Address>(client: A, secret: [u32; 2]) -> u32 {
    let [first, second, ..] = client.widen().first_bits(64).raw();
    let key = u64::from(secret[0]) << 32 | u64::from(secret[1]);
    let client = u64::from(first) << 32 | u64::from(second);
    // The multiplier is 2^64 divided by the golden ratio, the second round has every bit reach every other.
    let once = (client ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let twice = (once ^ once >> 32 ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (twice >> 32) as u32 % ERROR_BUDGETS
}

/// Bytes that the error about a packet quotes of it, from its IP header on; at most [`QUOTED_BYTES`], and a multiple of four.
#[inline(always)]
pub fn quoted_len<A: Address>(work: &Workspace<A>) -> u32 {
    let len = work.unfolded.header_len() + QUOTED_TRANSPORT;
    if len > QUOTED_BYTES as u32 {
        QUOTED_BYTES as u32
    } else {
        len
    }
}

/// Adds up what an error quotes.
struct Adding<'a> {
    quotation: &'a Quotation,
    at: usize,
    sum: Sum,
}

impl Repeated for Adding<'_> {
    #[inline(always)]
    fn step(&mut self) -> Repeat {
        match self.quotation.0.get(self.at) {
            Some(words) => {
                for word in words {
                    self.sum = self.sum.plus(u32::from(*word));
                }
                self.at += 1;
                Repeat::GoOn
            }
            None => Repeat::Enough,
        }
    }
}

/// The headers of the error about a packet that was [refused](Verdict::Refuse), of which it quotes so many bytes.
#[inline(always)]
pub fn error_headers<A: Address>(
    work: &Workspace<A>,
    quotation: &Quotation,
    quoted_len: u32,
    repeat: &impl Repeats,
) -> ErrorHeaders<A> {
    let len = (ICMP_LEN as u32 + quoted_len) as u16;
    let mut adding = Adding {
        quotation,
        at: 0,
        sum: Sum::ZERO,
    };
    repeat.repeat(CHUNKS as u32, &mut adding);
    // Read behind the loop: across it they would be kept on the stack.
    let (gateway, sender) = (work.key.dst, work.key.src);
    let Notice { kind, code, mtu } = work.notice;
    let mtu = Be16::new(mtu).word();
    let sum = A::icmp_pseudo_header(gateway, sender, len)
        .and(adding.sum)
        .plus(u32::from(
            Be16::new(u16::from_be_bytes([kind, code])).word(),
        ))
        .plus(u32::from(mtu));
    ErrorHeaders {
        ip: A::icmp_packet(gateway, sender, len),
        icmp: IcmpHeader {
            kind,
            code,
            header_sum: sum.header_sum(),
            // Both families have it in the second half.
            rest: [0, mtu],
        },
    }
}

/// Sends an Ethernet frame back to where it came from. `None` if it has no header.
#[inline(always)]
#[must_use]
pub fn turn_round<P: PacketBuf>(frame: P) -> Option<()> {
    let [own, sender]: [MacWords; 2] = frame.read(0)?;
    frame.write(0, [sender, own])
}
