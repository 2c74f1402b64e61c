//! A measured pipeline: a generator that sends live frames at one end, the gateway, a sink at the other end. All of it runs on
//! one core, the first unless another is chosen, so the time per frame is what one frame costs from end to end.

mod reference;
mod stream;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, PerCpuArray, ProgramArray};
use aya::programs::{ProgramFd, TestRun, TestRunAttrs, TestRunOptions, Xdp, xdp::XdpMode};
use aya::{Ebpf, Pod};
use nix::net::if_::if_nametoindex;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use portfwd::bpf::frames::Frames;

pub use self::reference::{by_rule, cached_floor, floor, mapped_floor, marked_floor, redirect};
pub use self::stream::{Heading, Segment, Stream, Transport};
use self::stream::{MOST_WORDS, client_networks};
use crate::address::{CLIENT, Family};
use crate::lab::Lab;
use crate::link::End;

/// Port that the generated datagrams go to.
pub const PORT: u16 = 5000;
/// What the generator returns if it has nowhere to send a frame.
const XDP_ABORTED: u32 = 0;
/// Frames handed to the kernel at once.
const BATCH: u32 = 64;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PORTFWD_LAB_OBJECT"));

/// What the kernel's generator works from; the same structure as in the lab's kernel object.
#[repr(C)]
#[derive(Clone, Copy)]
struct Plan {
    template: [u16; MOST_WORDS],
    stride: u16,
    egress: u32,
    mask: u32,
    first: u32,
}

// SAFETY: repr(C) integers without padding: 74 + 2 + 4 + 4 + 4 bytes.
unsafe impl Pod for Plan {}
const _: () = assert!(size_of::<Plan>() == 88);

/// In which order a pipeline's flows take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, as they began: the order of the entries in memory.
    Sequential,
    /// All over the table.
    Scattered,
}

/// How many frames of which flows.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Frames.
    pub frames: u32,
    /// Flows that they belong to, a power of two.
    pub flows: u32,
    /// How the flows take turns.
    pub order: Order,
    /// Number of the first flow: streams with other numbers have no flow in common.
    pub first: u32,
}

/// Where frames are counted and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// At the other endpoint, behind the gateway.
    Endpoint,
    /// At the gateway's own interface: what it costs to make a frame and bring it there.
    Gateway,
}

/// Generators and sinks of a lab.
pub struct Pipeline<'lab> {
    lab: &'lab Lab,
    generator: Ebpf,
    core: usize,
    at: Sink,
    to_target: Option<Ebpf>,
    to_client: Option<Ebpf>,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Time per frame sent, nanoseconds.
    pub ns_per_frame: f64,
    /// Share of the frames that did not arrive.
    pub loss: f64,
}

impl<'lab> Pipeline<'lab> {
    /// Puts generators and sinks at the endpoints of a lab. A sink takes all IP packets that come, from the first stream in its
    /// direction on: sockets behind it hear nothing any more.
    pub fn new(lab: &'lab Lab) -> Result<Self> {
        Self::with_sinks(lab, Sink::Endpoint)
    }

    /// The same with the sinks elsewhere.
    pub fn with_sinks(lab: &'lab Lab, at: Sink) -> Result<Self> {
        for (family, network) in client_networks() {
            let via = match family {
                Family::V4 => CLIENT.v4.to_string(),
                Family::V6 => CLIENT.v6.to_string(),
            };
            lab.gateway
                .ip(&format!("route replace {network} via {via}\n"))?;
        }
        Ok(Self {
            lab,
            generator: generator(Frames::Scattered)?,
            core: 0,
            at,
            to_target: None,
            to_client: None,
        })
    }

    /// The same on another core than the first.
    #[must_use]
    pub fn on_core(self, core: usize) -> Self {
        Self { core, ..self }
    }

    /// Sends `frames` frames of `flows` flows (a power of two) to [`PORT`].
    pub fn run(&mut self, frames: u32, flows: u32, order: Order) -> Result<Sample> {
        self.run_to(PORT, frames, flows, order)
    }

    /// Sends `frames` frames of `flows` flows (a power of two) to a port of the gateway.
    pub fn run_to(&mut self, port: u16, frames: u32, flows: u32, order: Order) -> Result<Sample> {
        let load = Load {
            frames,
            flows,
            order,
            first: 0,
        };
        self.send(&Stream::to_gateway(port), load)
    }

    /// Sends a stream.
    pub fn send(&mut self, stream: &Stream, load: Load) -> Result<Sample> {
        let before = self.received(stream.heading)?;
        let elapsed = self.pour(stream, load)?;
        let received = self.received(stream.heading)? - before;
        Ok(Sample {
            ns_per_frame: elapsed.as_nanos() as f64 / f64::from(load.frames),
            loss: 1.0 - received as f64 / f64::from(load.frames),
        })
    }

    /// Sends a stream that nobody counts: sockets behind the gateway hear it, and all else. Returns how long it took.
    pub fn pour(&mut self, stream: &Stream, load: Load) -> Result<Duration> {
        let (core, (sender, _)) = (self.core, self.ends(stream));
        let program = self.prepare(stream, load, sender.index()?)?;
        let frame = vec![0_u8; stream.frame_len()];
        let options = TestRunOptions {
            data_in: Some(&frame),
            repeat: load.frames,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::new()
        };
        on_core(core, sender, || {
            let start = Instant::now();
            program.test_run(options)?;
            Ok(start.elapsed())
        })
    }

    /// Runs a program on the frames of a stream, as if they came in at the gateway, and sends nothing. Returns how long that took,
    /// in nanoseconds for each, with what it takes to write the frame.
    pub fn try_out(&mut self, trial: &ProgramFd, stream: &Stream, load: Load) -> Result<f64> {
        /// The kernel's `struct xdp_md`.
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Context {
            data: u32,
            data_end: u32,
            data_meta: u32,
            ingress_ifindex: u32,
            rx_queue_index: u32,
            egress_ifindex: u32,
        }
        // SAFETY: repr(C) integers without padding.
        unsafe impl Pod for Context {}

        let (core, (_, receiver)) = (self.core, self.ends(stream));
        let frame = vec![0_u8; stream.frame_len()];
        let context = Context {
            data: 0,
            data_end: u32::try_from(frame.len())?,
            data_meta: 0,
            ingress_ifindex: receiver.index()?,
            rx_queue_index: 0,
            egress_ifindex: 0,
        };
        self.prepare(stream, load, 0)?;
        if self.put_on_trial(trial).is_err() {
            // A program of the other kind, which this generator cannot call.
            self.generator = generator(Frames::Whole)?;
            self.prepare(stream, load, 0)?;
            self.put_on_trial(trial)?;
        }
        let program = self.prepare(stream, load, 0)?;
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(bytes_of(&context)),
            repeat: load.frames,
            ..TestRunOptions::new()
        };
        on_core(core, receiver, || {
            let start = Instant::now();
            let result = program.test_run(options)?;
            let elapsed = start.elapsed();
            ensure!(
                result.return_value != XDP_ABORTED,
                "the program could not be tried out"
            );
            Ok(elapsed.as_nanos() as f64 / f64::from(load.frames))
        })
    }

    /// Has the generator put its frames before a program.
    fn put_on_trial(&mut self, trial: &ProgramFd) -> Result<()> {
        let mut trials: ProgramArray<_> = self
            .generator
            .map_mut("TRIAL")
            .context("no place for the trial")?
            .try_into()?;
        Ok(trials.set(0, trial, 0)?)
    }

    /// Where the frames of a stream begin, and where they come in at the gateway.
    fn ends(&self, stream: &Stream) -> (End<'lab>, End<'lab>) {
        match stream.heading {
            Heading::ToTarget => (self.lab.client_end(), self.lab.wan_end()),
            Heading::ToClient => (self.lab.server_end(), self.lab.lan_end()),
        }
    }

    /// The generator of a stream, with its plan. Frames leave by the interface with the index `egress`.
    fn prepare(&mut self, stream: &Stream, load: Load, egress: u32) -> Result<&mut Xdp> {
        let Load {
            flows,
            order,
            first,
            frames: _,
        } = load;
        ensure!(flows.is_power_of_two(), "{flows} flows: not a power of two");
        let (sender, receiver) = self.ends(stream);
        let plan = Plan {
            template: stream.template(sender, receiver)?,
            stride: match order {
                Order::Sequential => 1,
                Order::Scattered => 0x9e37,
            },
            egress,
            mask: flows - 1,
            first,
        };
        let mut plans: Array<_, Plan> = self
            .generator
            .map_mut("PLAN")
            .context("no plan")?
            .try_into()?;
        plans.set(0, plan, 0)?;
        let program: &mut Xdp = self
            .generator
            .program_mut(stream.program())
            .context("no generator")?
            .try_into()?;
        if program.fd().is_err() {
            program.load()?;
        }
        Ok(program)
    }

    /// Frames that have come to the sink of a direction, which is put there if it is not.
    fn received(&mut self, heading: Heading) -> Result<u64> {
        let (slot, end) = match (heading, self.at) {
            (Heading::ToTarget, Sink::Endpoint) => (&mut self.to_target, self.lab.server_end()),
            (Heading::ToTarget, Sink::Gateway) => (&mut self.to_target, self.lab.wan_end()),
            (Heading::ToClient, Sink::Endpoint) => (&mut self.to_client, self.lab.client_end()),
            (Heading::ToClient, Sink::Gateway) => (&mut self.to_client, self.lab.lan_end()),
        };
        let sink = match slot {
            Some(sink) => sink,
            None => slot.insert(attach(end, "lab_sink")?),
        };
        let counts: PerCpuArray<_, u64> = sink.map("RECEIVED").context("no counter")?.try_into()?;
        Ok(counts.get(&0, 0)?.iter().sum())
    }
}

/// The generator, for programs on trial that know of such frames.
fn generator(frames: Frames) -> Result<Ebpf> {
    Ebpf::load(&frames.object(OBJECT)).context("load the generator")
}

/// Runs something in an interface's namespace, and on one core.
fn on_core<T: Send>(
    core: usize,
    end: End<'_>,
    run: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    end.namespace.run(|| {
        let mut cores = CpuSet::new();
        cores.set(core)?;
        sched_setaffinity(Pid::from_raw(0), &cores)?;
        run()
    })?
}

/// The bytes of a kernel structure.
fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: as large as the value is, whose bytes are all initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Attaches a program of the lab's object to an interface, natively; it goes when the object is dropped.
pub fn attach(end: End<'_>, name: &str) -> Result<Ebpf> {
    let mut object = Ebpf::load(OBJECT).context("load the lab's object")?;
    attach_of(&mut object, end, name)?;
    Ok(object)
}

fn attach_of(object: &mut Ebpf, end: End<'_>, name: &str) -> Result<()> {
    let program: &mut Xdp = object
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?;
    // To a second interface it goes as it is.
    if program.fd().is_err() {
        program.load()?;
    }
    end.namespace
        .run(|| program.attach(end.interface, XdpMode::Driver).map(|_| ()))?
        .with_context(|| format!("attach {name} to {}", end.interface))
}

impl End<'_> {
    /// Its interface's index.
    pub fn index(self) -> Result<u32> {
        Ok(self.namespace.run(|| if_nametoindex(self.interface))??)
    }

    /// Its interface's MAC address.
    pub fn mac(self) -> Result<[u8; 6]> {
        let links = self
            .namespace
            .ip_json(&["link", "show", "dev", self.interface])?;
        let text = links[0]["address"].as_str().context("no MAC address")?;
        let mut mac = [0; 6];
        for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
            *byte = u8::from_str_radix(digits, 16)?;
        }
        Ok(mac)
    }
}
