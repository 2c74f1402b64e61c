//! A TCP connection through the gateway, both of whose sides count as stacks do.

use portfwd_common::{
    abi::{FlowEntry, Protocol},
    datapath::{
        DropReason,
        conntrack::{Half, Pair},
        tcp::{Side, TcpState},
    },
    model::{
        flows::FlowMap,
        frame::{Draft, Transport},
        rules::Forward,
        world::{World, at},
    },
    net::Address,
};

use crate::gateway::{Gateway, Outcome};

pub const FIN: u8 = 0x11;
pub const SYN: u8 = 0x02;
pub const SYN_ACK: u8 = 0x12;
pub const ACK: u8 = 0x10;
pub const RST: u8 = 0x04;
pub const RST_ACK: u8 = 0x14;

/// Who sends a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    Client,
    Backend,
}

pub use Sender::{Backend, Client};

/// Segments by their flags.
pub type Segments = [(Sender, u8)];

/// SYN, SYN-ACK, third segment.
pub const HANDSHAKE: &Segments = &[(Client, SYN), (Backend, SYN_ACK), (Client, ACK)];

/// Window scale of both sides.
pub const SCALE: u8 = 7;
/// Window of both sides, as on the wire.
pub const WINDOW: u16 = 300;
/// The same in bytes.
pub const WINDOW_BYTES: u32 = (WINDOW as u32) << SCALE;

/// A connection of one client to one port. The numbers of both sides wrap soon, the client's as unsigned, the backend's as signed.
pub struct Conversation {
    pub gateway: Gateway,
    pub world: World,
    /// The client's next sequence number, and the backend's.
    next: [u32; 2],
}

impl Conversation {
    pub fn new(world: &World) -> Self {
        Self {
            gateway: Gateway::new(&[Forward::new(Protocol::Tcp, 80, at(world.target, 8080))]),
            world: *world,
            next: [0xffff_ff00, 0x7fff_ffff],
        }
    }

    /// After these segments.
    pub fn after(world: &World, segments: &Segments) -> Self {
        let mut conversation = Self::new(world);
        conversation.send_all(segments);
        conversation
    }

    /// After a handshake and some data both ways, all of it acknowledged.
    pub fn established(world: &World) -> Self {
        let mut conversation = Self::after(world, HANDSHAKE);
        for sender in [Client, Backend, Client] {
            let data = conversation.segment(sender, ACK).payload([7; 100]);
            conversation.carry(sender, &data);
        }
        // All of it is acknowledged.
        conversation.send_all(&[(Backend, ACK), (Client, ACK)]);
        assert_eq!(conversation.state(), Some(TcpState::Established));
        conversation
    }

    /// The side's next segment, as it sends it.
    pub fn segment(&self, sender: Sender, flags: u8) -> Draft {
        let (own, other) = match sender {
            Client => (0, 1),
            Backend => (1, 0),
        };
        let (source, destination) = match sender {
            Client => (self.client(), at(self.world.listen, 80)),
            Backend => (at(self.world.target, 8080), self.client()),
        };
        let acknowledgement = if flags & ACK != 0 {
            self.next[other]
        } else {
            0
        };
        Draft {
            window: WINDOW,
            tcp_options: if flags & SYN != 0 {
                vec![2, 4, 5, 120, 1, 3, 3, SCALE]
            } else {
                Vec::new()
            },
            ..Draft::tcp(source, destination, flags).numbers(self.next[own], acknowledgement)
        }
    }

    /// A segment by its flags, which both sides take note of.
    pub fn send(&mut self, sender: Sender, flags: u8) {
        let segment = self.segment(sender, flags);
        self.carry(sender, &segment);
    }

    pub fn send_all(&mut self, segments: &Segments) {
        for (sender, flags) in segments {
            self.send(*sender, *flags);
        }
    }

    /// A segment that comes through, and whose sender goes on behind it.
    #[track_caller]
    pub fn carry(&mut self, sender: Sender, segment: &Draft) {
        self.forge(sender, segment);
        let own = match sender {
            Client => 0,
            Backend => 1,
        };
        let taken = segment.payload.len() as u32 + u32::from(takes_a_number(segment));
        self.next[own] = segment.sequence.wrapping_add(taken);
    }

    /// A segment that comes through, but of which nobody takes note.
    #[track_caller]
    pub fn forge(&mut self, sender: Sender, segment: &Draft) {
        let outcome = self.pass(sender, segment);
        let (client, listen, target) = (
            self.client(),
            at(self.world.listen, 80),
            at(self.world.target, 8080),
        );
        match sender {
            Client => outcome.reached_lan(&segment.between(client, target).hop().packet()),
            Backend => outcome.reached_wan(&segment.between(listen, client).hop().packet()),
        }
    }

    /// A segment that does not come through.
    #[track_caller]
    pub fn refuse(&mut self, sender: Sender, segment: &Draft) {
        self.pass(sender, segment)
            .dropped(DropReason::RstOutOfWindow);
    }

    pub fn pass(&mut self, sender: Sender, segment: &Draft) -> Outcome {
        match sender {
            Client => self.gateway.wan(&segment.packet()),
            Backend => self.gateway.lan(&segment.packet()),
        }
    }

    pub fn client(&self) -> std::net::SocketAddr {
        at(self.world.client, 40_000)
    }

    /// The state of the connection, if it has an entry that has not expired.
    pub fn state(&self) -> Option<TcpState> {
        let pair = self.pair()?;
        let config = self.gateway.model.maps.config.unwrap();
        (!pair.is_expired(Protocol::Tcp, &config, self.gateway.model.now)).then(|| pair.tcp_state())
    }

    /// What both sides have shown.
    pub fn sides(&self) -> [Side; 2] {
        let pair = self.pair().expect("there is a flow");
        [pair.original.side, pair.reply.side]
    }

    pub fn pair(&self) -> Option<Pair> {
        let flows = &self.gateway.model.flows;
        pair_of(&flows.v4)
            .or_else(|| pair_of(&flows.v6))
            .or_else(|| pair_of(&flows.opening_v4))
            .or_else(|| pair_of(&flows.opening_v6))
    }

    /// Whether the connection lives for exactly so many seconds from now.
    #[track_caller]
    pub fn lives_for(&mut self, seconds: u32) {
        let now = self.gateway.model.now;
        self.gateway.wait(seconds);
        assert_ne!(self.state(), None, "gone before {seconds} s");
        self.gateway.wait(1);
        assert_eq!(self.state(), None, "still there after {seconds} s");
        self.gateway.model.now = now;
    }
}

/// Whether a segment's SYN or FIN takes a sequence number.
fn takes_a_number(segment: &Draft) -> bool {
    match segment.transport {
        Transport::Tcp(flags) => flags & 0x03 != 0,
        Transport::Udp | Transport::UdpWithoutSum | Transport::Echo => false,
    }
}

fn pair_of<A: Address>(flows: &FlowMap<A>) -> Option<Pair> {
    let half = |entry: &FlowEntry<A>| Half::from(entry);
    let original = flows.values().find(|entry| entry.marks & 1 == 0)?;
    let reply = flows.values().find(|entry| entry.marks & 1 == 1)?;
    Pair::of(half(original), half(reply))
}
