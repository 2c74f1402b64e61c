//! The datapath on the host: tables in plain collections, frames in plain bytes, a clock that is set by hand.
//!
//! It runs the same core as the kernel object, in the same two parts, and keeps the same books. So every rule of NAT is tested
//! here, and the same frames through [`Model`] and through the kernel's programs must give the same bytes.
//!
//! - [`packet`], [`flows`], [`maps`]: what the core asks of its surroundings
//! - [`pools`]: ports that stand for clients
//! - [`usages`]: what has been used of rules' limits
//! - [`rules`]: rules as their maps hold them
//! - [`frame`]: frames to feed in, and those that must come out
//! - [`effort`]: how long random tests go on
//! - [`mutation`]: inputs that nobody thought of
//! - [`corpus`]: those of them that are kept
//! - [`world`]: interfaces, addresses and routes around a gateway

pub mod corpus;
pub mod effort;
pub mod flows;
pub mod frame;
pub mod maps;
pub mod mutation;
pub mod packet;
pub mod pools;
pub mod rules;
pub mod usages;
pub mod world;

use std::{cell::Cell, collections::VecDeque};

pub use self::{flows::FlowMaps, maps::Maps, packet::Bytes};
use crate::{
    abi::{Config, Instant, LinkLayer, Ticks},
    datapath::{
        self, Arrival, Beginning, Context, Departure, DropReason, Event, Flows, Fragments as _,
        Hook, Input, Job, Progress, Step, Tables as _, Verdict, Way, Workspace,
        cutting::{Cut, MAX_PIECES},
        fast, fast_light,
        fragments::{Piece, is_forgotten},
        refusal::{self, Quotation},
        remember,
    },
    net::{
        Address, Family, Ipv4, Ipv6, PacketBuf as _,
        headers::{ETHERNET_LEN, IPV4_LEN, MacWords},
    },
};

/// A gateway.
#[derive(Debug)]
pub struct Model {
    /// The connection table.
    pub flows: FlowMaps,
    /// Rules, interfaces, routes, counters.
    pub maps: Maps,
    /// The time of the next packet.
    pub now: Instant,
    /// Bytes of a frame that XDP finds in the first buffer.
    pub buffer: usize,
    /// Frames that come in again, by the same interface.
    pub backlog: VecDeque<(Vec<u8>, Arrival)>,
    // Kept from packet to packet, as the kernel keeps them: a step that reads what an earlier packet left goes wrong here too.
    work_v4: Workspace<Ipv4>,
    work_v6: Workspace<Ipv6>,
}

/// A frame, given out as often as it is asked for.
#[derive(Clone, Copy)]
struct Frame<'a> {
    packet: Bytes<'a>,
    arrival: Arrival,
    len: u32,
    beginning: Beginning,
}

impl<'a> Input for Frame<'a> {
    type Packet = Bytes<'a>;

    fn frame(&self) -> Bytes<'a> {
        self.packet
    }

    fn arrival(&self) -> Arrival {
        self.arrival
    }

    fn frame_len(&self) -> u32 {
        self.len
    }

    fn beginning(&self) -> Beginning {
        self.beginning
    }
}

impl Model {
    /// A gateway with room for `max_flows` flows of each family.
    pub fn new(config: Config, max_flows: usize) -> Self {
        Self {
            flows: FlowMaps::new(2 * max_flows),
            maps: Maps::new(config),
            now: Instant::from_ticks(0),
            buffer: usize::MAX,
            backlog: VecDeque::new(),
            work_v4: Workspace::default(),
            work_v6: Workspace::default(),
        }
    }

    /// Puts a frame before the datapath, as a hook does: afterwards the frame is as it leaves, and the verdict is counted.
    pub fn run(&mut self, frame: &mut Vec<u8>, arrival: &Arrival) -> Verdict {
        let verdict = self.decide(frame, arrival);
        match verdict {
            Verdict::Pass(reason) if arrival.hook.counts(reason) => {
                self.maps.count_reason(reason.index());
            }
            Verdict::Pass(_) => {}
            Verdict::Drop(reason) => self.maps.count_reason(reason.index()),
            Verdict::Refuse(reason) => {
                self.maps.count_reason(reason.index());
                self.refuse(frame, arrival);
            }
            Verdict::Forward(departure) => self.leave(frame, arrival, &departure),
        }
        verdict
    }

    /// A frame leaves, which the kernel forwards: the same hook sees it as what the gateway itself sends, but does not touch it.
    pub fn sees_off(&mut self, frame: &mut [u8], arrival: &Arrival) {
        if self.maps.config.is_some_and(|config| config.has_rests()) {
            let packet = Bytes::new(Cell::from_mut(frame).as_slice_of_cells());
            remember(packet, arrival, &mut self.flows, &self.maps, self.now);
        }
    }

    /// Lets time pass.
    pub fn advance(&mut self, ticks: Ticks) {
        self.now = self.now.plus(ticks);
    }

    fn decide(&mut self, frame: &mut [u8], arrival: &Arrival) -> Verdict {
        if arrival.hook == Hook::TcOut {
            self.sees_off(frame, arrival);
        }
        let len = frame.len();
        let reach = match arrival.hook {
            Hook::Xdp => len.min(self.buffer),
            Hook::Tc | Hook::TcSlow | Hook::TcOut => len,
        };
        let packet = Bytes::new(Cell::from_mut(&mut frame[..reach]).as_slice_of_cells());
        let (flows, maps, now) = (&mut self.flows, &self.maps, self.now);
        let progress = match fast(packet, arrival, flows, maps, now) {
            Progress::Light => fast_light(packet, arrival, flows, maps, now),
            finished @ (Progress::Done(_) | Progress::Slow(_)) => finished,
        };
        match progress {
            Progress::Done(verdict) => verdict,
            Progress::Light => unreachable!("nobody takes it from there"),
            Progress::Slow(family) => {
                let frame = Frame {
                    packet,
                    arrival: *arrival,
                    len: len as u32,
                    beginning: Beginning::default(),
                };
                match family {
                    Family::V4 => {
                        self.work_v4.now = self.now;
                        self.work_v4.bank = self.maps.config.unwrap_or_default().bank();
                        slow(Place {
                            frame,
                            maps: &self.maps,
                            work: &mut self.work_v4,
                            flows: &mut self.flows,
                        })
                    }
                    Family::V6 => {
                        self.work_v6.now = self.now;
                        self.work_v6.bank = self.maps.config.unwrap_or_default().bank();
                        slow(Place {
                            frame,
                            maps: &self.maps,
                            work: &mut self.work_v6,
                            flows: &mut self.flows,
                        })
                    }
                }
            }
        }
    }

    fn leave(&mut self, frame: &mut Vec<u8>, arrival: &Arrival, departure: &Departure) {
        match departure.way {
            Way::Frame | Way::Raw => {}
            Way::NewHeader => put_header(frame, departure.next_hop, departure.source),
            Way::Resolve => {
                self.maps.note(Event::Resolved);
                if arrival.link == LinkLayer::Raw {
                    put_header(frame, [0; 3], [0; 3]);
                }
            }
            Way::Stack => self.maps.note(Event::Stack),
            Way::Hold => self.hold(frame, arrival),
            Way::Again => self.again(frame, arrival),
            Way::Cut => self.cut(frame, arrival, departure.mtu),
        }
    }

    /// The fragment that the family's workspace is about.
    const fn piece(&self, packet: &[u8]) -> Piece {
        match packet.first() {
            Some(0x60..=0x6f) => self.work_v6.piece,
            Some(_) | None => self.work_v4.piece,
        }
    }

    /// Puts an ICMP error in the frame's place.
    fn refuse(&self, frame: &mut Vec<u8>, arrival: &Arrival) {
        let at = arrival.link.header_len();
        match frame[at] >> 4 {
            4 => put_error(frame, at, &self.work_v4, &self.maps),
            _ => put_error(frame, at, &self.work_v6, &self.maps),
        }
        self.maps.note(Event::ErrorSent);
    }

    fn hold(&mut self, frame: &[u8], arrival: &Arrival) {
        let packet = &frame[arrival.link.header_len()..];
        let Piece { held, len, .. } = self.piece(packet);
        let is_there = self.flows.held_since(&held).is_some_and(|since| {
            let config = self.maps.config.unwrap_or_default();
            !is_forgotten(since, &config, self.now)
        });
        if is_there {
            self.maps.count_reason(DropReason::FragmentOverlap.index());
            return;
        }
        let packet = packet[..len as usize].to_vec();
        self.flows.held.insert(held, (self.now, packet));
        self.maps.note(Event::FragmentHeld);
    }

    fn again(&mut self, frame: &mut Vec<u8>, arrival: &Arrival) {
        let at = arrival.link.header_len();
        let held = self.piece(&frame[at..]).held;
        self.backlog.push_back((frame.clone(), *arrival));
        if let Some((_, packet)) = self.flows.held.remove(&held) {
            frame.truncate(at);
            frame.extend(packet);
            self.backlog.push_back((frame.clone(), *arrival));
            self.maps.note(Event::FragmentReleased);
        }
    }

    fn cut(&mut self, frame: &mut Vec<u8>, arrival: &Arrival, mtu: u16) {
        let at = arrival.link.header_len();
        let whole = frame.clone();
        let cut = {
            let cells = Cell::from_mut(frame.as_mut_slice()).as_slice_of_cells();
            Cut::of(Bytes::new(cells).after(at), mtu)
        };
        let Some(cut) = cut else {
            self.maps
                .count_reason(DropReason::FragmentationNeeded.index());
            return;
        };
        self.maps.note(Event::Fragmented);
        for slice in (0..MAX_PIECES).map_while(|number| cut.slice(number)) {
            let from = at + IPV4_LEN + slice.at as usize;
            let mut piece = whole[..at + IPV4_LEN].to_vec();
            piece.extend(&whole[from..from + slice.len as usize]);
            let written = {
                let cells = Cell::from_mut(piece.as_mut_slice()).as_slice_of_cells();
                slice.write_header(Bytes::new(cells).after(at))
            };
            assert_eq!(written, Some(()), "the header is there");
            frame.clone_from(&piece);
            self.backlog.push_back((piece, *arrival));
        }
    }
}

/// Where the steps of the slow path find everything.
struct Place<'w, A: Address> {
    frame: Frame<'w>,
    maps: &'w Maps,
    work: &'w mut Workspace<A>,
    flows: &'w mut FlowMaps,
}

impl<'w, A: Address> Context<A> for Place<'w, A>
where
    FlowMaps: Flows<A>,
{
    type Input = Frame<'w>;
    type Tables = &'w Maps;
    type Flows = FlowMaps;

    fn with<R>(
        &mut self,
        _absent: R,
        step: impl FnOnce(&Job<Frame<'w>, &'w Maps>, &mut Workspace<A>, &mut FlowMaps) -> R,
    ) -> R {
        let job = Job {
            input: self.frame,
            tables: self.maps,
            now: self.work.now,
        };
        step(&job, self.work, self.flows)
    }

    fn returned(step: Step) -> Step {
        step
    }
}

/// The slow path, and behind it the program for fragments.
fn slow<A: Address>(mut place: Place<'_, A>) -> Verdict
where
    FlowMaps: Flows<A>,
{
    let verdict = datapath::slow(&mut place);
    if !verdict.is_for_fragments(place.frame.arrival.hook) {
        return verdict;
    }
    datapath::fragment(&mut place).unwrap_or_else(|| {
        place.frame.beginning = Beginning::FirstFragment;
        datapath::slow(&mut place)
    })
}

/// Puts an ICMP error about the packet behind the first `at` bytes of a frame in its place.
fn put_error<A: Address>(frame: &mut Vec<u8>, at: usize, work: &Workspace<A>, maps: &Maps) {
    let quoted_len = refusal::quoted_len(work);
    let quoted = frame[at..at + quoted_len as usize].to_vec();
    let mut quotation = Quotation::EMPTY;
    bytemuck::bytes_of_mut(&mut quotation)[..quoted.len()].copy_from_slice(&quoted);
    let headers = refusal::error_headers(work, &quotation, quoted_len, maps);
    frame.truncate(at);
    frame.extend(bytemuck::bytes_of(&headers.ip));
    frame.extend(bytemuck::bytes_of(&headers.icmp));
    frame.extend(quoted);
    if at == ETHERNET_LEN {
        let cells = Cell::from_mut(frame.as_mut_slice()).as_slice_of_cells();
        assert_eq!(refusal::turn_round(Bytes::new(cells)), Some(()));
    }
}

/// Puts an Ethernet header before a packet that came without.
fn put_header(packet: &mut Vec<u8>, dst: MacWords, src: MacWords) {
    const IPV4: [u8; 2] = [0x08, 0x00];
    const IPV6: [u8; 2] = [0x86, 0xdd];
    let is_v4 = packet.first().is_some_and(|byte| byte >> 4 == 4);
    let mut header = [0; ETHERNET_LEN];
    header[..6].copy_from_slice(bytemuck::bytes_of(&dst));
    header[6..12].copy_from_slice(bytemuck::bytes_of(&src));
    header[12..].copy_from_slice(if is_v4 { &IPV4 } else { &IPV6 });
    packet.splice(..0, header);
}
