//! A measured pipeline: a generator that sends live frames at the client, the gateway, a sink at the server. All of it runs on
//! one core, so the time per frame is what one frame costs from end to end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, PerCpuArray};
use aya::programs::{TestRun, TestRunAttrs, TestRunOptions, Xdp, xdp::XdpMode};
use aya::{Ebpf, Pod};
use nix::net::if_::if_nametoindex;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::address::{CLIENT, GATEWAY_WAN};
use crate::lab::Lab;
use crate::link::End;

/// Port that the generated datagrams go to.
pub const PORT: u16 = 5000;
/// Frames handed to the kernel at once.
const BATCH: u32 = 64;
/// Bytes of a frame: the least that Ethernet carries, without its check sequence.
const FRAME: usize = 60;
const HEADERS: usize = 42;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PORTFWD_LAB_OBJECT"));

/// What the kernel's generator works from; the same structure as in the lab's kernel object.
#[repr(C)]
#[derive(Clone, Copy)]
struct Plan {
    template: [u8; HEADERS],
    stride: u16,
    egress: u32,
    mask: u32,
}

// SAFETY: repr(C) integers without padding: 42 + 2 + 4 + 4 bytes.
unsafe impl Pod for Plan {}
const _: () = assert!(size_of::<Plan>() == 52);

/// In which order a pipeline's flows take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, as they began: the order of the entries in memory.
    Sequential,
    /// All over the table.
    Scattered,
}

/// Generator and sink of a lab.
pub struct Pipeline<'lab> {
    lab: &'lab Lab,
    generator: Ebpf,
    sink: Ebpf,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Time per frame sent.
    pub per_frame: Duration,
    /// Share of the frames that did not arrive.
    pub loss: f64,
}

impl<'lab> Pipeline<'lab> {
    /// Puts a generator and a sink into a lab.
    pub fn new(lab: &'lab Lab) -> Result<Self> {
        let mut generator = Ebpf::load(OBJECT).context("load the generator")?;
        let program: &mut Xdp = generator
            .program_mut("lab_generate")
            .context("no generator")?
            .try_into()?;
        program.load()?;
        let sink = attach(lab.server_end(), "lab_sink")?;
        Ok(Self {
            lab,
            generator,
            sink,
        })
    }

    /// Sends `frames` frames of `flows` flows (a power of two) to [`PORT`].
    pub fn run(&mut self, frames: u32, flows: u32, order: Order) -> Result<Sample> {
        self.run_to(PORT, frames, flows, order)
    }

    /// Sends `frames` frames of `flows` flows (a power of two) to a port of the gateway.
    pub fn run_to(&mut self, port: u16, frames: u32, flows: u32, order: Order) -> Result<Sample> {
        ensure!(flows.is_power_of_two(), "{flows} flows: not a power of two");
        let plan = Plan {
            template: template(self.lab, port)?,
            stride: match order {
                Order::Sequential => 1,
                Order::Scattered => 0x9e37,
            },
            egress: ifindex(self.lab.client_end())?,
            mask: flows - 1,
        };
        let mut plans: Array<_, Plan> = self
            .generator
            .map_mut("PLAN")
            .context("no plan")?
            .try_into()?;
        plans.set(0, plan, 0)?;
        let before = self.received()?;
        let program: &mut Xdp = self
            .generator
            .program_mut("lab_generate")
            .context("no generator")?
            .try_into()?;
        let frame = [0_u8; FRAME];
        let elapsed = self.lab.client.run(|| -> Result<Duration> {
            let mut core = CpuSet::new();
            core.set(0)?;
            sched_setaffinity(Pid::from_raw(0), &core)?;
            let options = TestRunOptions {
                data_in: Some(&frame),
                repeat: frames,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::new()
            };
            let start = Instant::now();
            program.test_run(options)?;
            Ok(start.elapsed())
        })??;
        let received = self.received()? - before;
        Ok(Sample {
            per_frame: elapsed / frames,
            loss: 1.0 - received as f64 / f64::from(frames),
        })
    }

    fn received(&self) -> Result<u64> {
        let counts: PerCpuArray<_, u64> = self
            .sink
            .map("RECEIVED")
            .context("no counter")?
            .try_into()?;
        Ok(counts.get(&0, 0)?.iter().sum())
    }
}

/// Attaches a program of the lab's object to an interface, natively; it goes when the object is dropped.
pub fn attach(end: End<'_>, name: &str) -> Result<Ebpf> {
    let mut object = Ebpf::load(OBJECT).context("load the lab's object")?;
    let program: &mut Xdp = object
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?;
    program.load()?;
    end.namespace
        .run(|| program.attach(end.interface, XdpMode::Driver).map(|_| ()))?
        .with_context(|| format!("attach {name} to {}", end.interface))?;
    Ok(object)
}

/// Redirects all that comes in at the gateway's WAN interface to its LAN interface, unread.
pub fn redirect(lab: &Lab) -> Result<Ebpf> {
    let mut object = attach(lab.wan_end(), "lab_redirect")?;
    let mut egress: Array<_, u32> = object.map_mut("EGRESS").context("no egress")?.try_into()?;
    egress.set(0, ifindex(lab.lan_end())?, 0)?;
    Ok(object)
}

fn ifindex(end: End<'_>) -> Result<u32> {
    Ok(end.namespace.run(|| if_nametoindex(end.interface))??)
}

fn mac(end: End<'_>) -> Result<[u8; 6]> {
    let links = end
        .namespace
        .ip_json(&["link", "show", "dev", end.interface])?;
    let text = links[0]["address"].as_str().context("no MAC address")?;
    let mut mac = [0; 6];
    for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16)?;
    }
    Ok(mac)
}

/// Headers of a UDP datagram from the client to a port of the gateway, the low half of the source address and the source port
/// left out, also of the sums.
fn template(lab: &Lab, port: u16) -> Result<[u8; HEADERS]> {
    let length = (FRAME - 14) as u16;
    let (src, dst) = (CLIENT.v4.octets(), GATEWAY_WAN.v4.octets());
    let mut bytes = Vec::with_capacity(HEADERS);
    bytes.extend(mac(lab.wan_end())?);
    bytes.extend(mac(lab.client_end())?);
    bytes.extend([8, 0, 0x45, 0]);
    bytes.extend(length.to_be_bytes());
    bytes.extend([0, 0, 0x40, 0, 64, 17, 0, 0, src[0], src[1], 0, 0]);
    bytes.extend(dst);
    let sum = header_sum(&bytes[14..34], 0);
    bytes[24..26].copy_from_slice(&sum);
    bytes.extend([0, 0]);
    bytes.extend(port.to_be_bytes());
    bytes.extend((length - 20).to_be_bytes());
    // The payload is zeros and adds nothing.
    let pseudo = u32::from(length - 20) + 17;
    let mut words = bytes[26..40].to_vec();
    words.truncate(14);
    let sum = header_sum(&words, pseudo);
    bytes.extend(sum);
    bytes
        .try_into()
        .map_err(|bytes: Vec<u8>| anyhow::anyhow!("{} bytes of headers", bytes.len()))
}

fn header_sum(bytes: &[u8], extra: u32) -> [u8; 2] {
    let mut sum = extra;
    for word in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (!(sum as u16)).to_be_bytes()
}
