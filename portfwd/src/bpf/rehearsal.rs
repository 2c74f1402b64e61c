//! A private copy of an instance's programs and tables, to find out what they would do to a packet without doing it.
//!
//! A test run of the attached programs themselves would enter flows, count, and take part in every limit. So the same object
//! is loaded once more, with maps of its own that hold what the pinned ones hold; nothing of it is attached or pinned, and all
//! of it goes with the value. Whether the attached programs are of the same build is told by their tags.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapType, ProgramArray},
    programs::{Program, ProgramInfo, TestRun as _, TestRunOptions},
};
use bytemuck::{Pod, Zeroable, bytes_of, cast_slice_mut};
use portfwd_common::{
    abi::{PortCounters, Rule, names},
    datapath::verdict::REASON_SLOTS,
};

use super::{
    OBJECT,
    counters::{Counters, Layout},
    diagnostics,
    load::{SLOW_PATHS, load_program},
    map::{read_array, write_array},
    pins::Pins,
    syscall::{self, BatchEnd, Update},
};

/// Room that a copied hash table has for what the rehearsal enters.
const SPARE: usize = 1_024;
/// Elements that a dump of a hash table begins with.
const BATCH: usize = 4_096;
/// What a program may put before a frame, bytes.
const HEADROOM: usize = 64;

/// The copy. The thread must stay in the instance's network namespace.
pub struct Rehearsal {
    ebpf: Ebpf,
    reasons: MapData,
    counters: Counters,
    cpus: usize,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What the program returned.
    pub code: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Elements of REASONS that grew.
    pub reasons: Vec<u32>,
    /// The port of COUNTERS that grew: the packet was counted for its rule's listen port.
    pub counter: Option<u32>,
}

/// What a map held.
struct Contents {
    name: &'static str,
    kind: MapType,
    capacity: u32,
    count: usize,
    keys: Vec<u8>,
    values: Vec<u8>,
}

/// `struct xdp_md` of the kernel.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct XdpContext {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue: u32,
    egress_ifindex: u32,
}

/// `struct __sk_buff` of the kernel up to the only field that is set; what is missing is zero.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TcContext {
    head: [u32; 10],
    ifindex: u32,
    middle: [u32; 32],
    tail: [u32; 5],
}

const _: () = assert!(size_of::<TcContext>() == 192);

impl Rehearsal {
    /// Copies what is pinned. `rules` are those of the pinned tables, `programs` those that will be run.
    pub fn of(pins: &Pins, rules: &[(u16, Rule)], programs: &[&str]) -> Result<Self> {
        let contents = names::MAPS
            .iter()
            .chain(&[names::EGRESS])
            .filter_map(|name| Contents::read(pins, name).transpose())
            .collect::<Result<Vec<_>>>()?;
        let counted = rules
            .iter()
            .map(|(_, rule)| rule.counter_base + rule.counters())
            .max()
            .unwrap_or(1);
        let mut ebpf = load(&contents, counted)?;
        for map in &contents {
            map.write(&ebpf)
                .with_context(|| format!("cannot copy map {}", map.name))?;
        }
        for name in programs {
            let program = ebpf.program_mut(name);
            let program =
                program.with_context(|| format!("the kernel object has no program {name}"))?;
            load_program(name, program)?;
        }
        link_slow_paths(&mut ebpf)?;
        let Some(Map::PerCpuArray(reasons)) = ebpf.take_map(names::REASONS) else {
            bail!("the kernel object has no per-CPU array {}", names::REASONS);
        };
        let Some(Map::Array(counters)) = ebpf.take_map(names::COUNTERS) else {
            bail!("the kernel object has no array {}", names::COUNTERS);
        };
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error);
        Ok(Self {
            reasons,
            counters: Counters::of(counters)?,
            cpus: cpus.context("cannot read the number of CPUs")?,
            ebpf,
        })
    }

    /// Runs a program on a frame that came in by an interface. What it enters into the tables stays for the next run.
    pub fn run(&mut self, program: &str, ifindex: u32, frame: &[u8]) -> Result<Outcome> {
        let before = (self.read_reasons()?, self.read_counters()?);
        let mut out = vec![0; frame.len() + HEADROOM];
        let result = self
            .test_run(program, ifindex, frame, &mut out)
            .with_context(|| format!("cannot run a copy of program {program}"))?;
        out.truncate(result.1);
        let (reasons, counters) = (self.read_reasons()?, self.read_counters()?);
        Ok(Outcome {
            code: result.0,
            frame: out,
            reasons: grown(&before.0, &reasons),
            counter: grown(&before.1, &counters).first().copied(),
        })
    }

    /// Whether the programs that are pinned are those of this copy.
    pub fn is_same_build(&self, pins: &Pins) -> Result<bool> {
        for (name, program) in self.ebpf.programs() {
            if program.fd().is_err() {
                // Not loaded: it was not asked for.
                continue;
            }
            let own = program.info().context("cannot look at a copied program")?;
            let path = pins.program(name);
            let pinned = ProgramInfo::from_pin(&path)
                .with_context(|| format!("cannot look at program {}", path.display()))?;
            if own.tag() != pinned.tag() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Return value, and length of the frame.
    fn test_run(
        &self,
        name: &str,
        ifindex: u32,
        frame: &[u8],
        out: &mut [u8],
    ) -> Result<(u32, usize)> {
        let xdp = XdpContext {
            data_end: frame.len() as u32,
            ingress_ifindex: ifindex,
            ..XdpContext::zeroed()
        };
        let tc = TcContext {
            ifindex,
            ..TcContext::zeroed()
        };
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(out),
            ..TestRunOptions::new()
        };
        let program = self.ebpf.program(name).context("there is none")?;
        let result = if let Program::Xdp(program) = program {
            program.test_run(TestRunOptions {
                ctx_in: Some(bytes_of(&xdp)),
                ..options
            })
        } else if let Program::SchedClassifier(program) = program {
            program.test_run(TestRunOptions {
                ctx_in: Some(bytes_of(&tc)),
                ..options
            })
        } else {
            bail!("it is of another type")
        }?;
        Ok((result.return_value, result.data_size_out as usize))
    }

    fn read_reasons(&self) -> Result<Vec<u64>> {
        let mut values = vec![0u64; REASON_SLOTS as usize * self.cpus];
        let bytes = cast_slice_mut(&mut values);
        read_array(&self.reasons, 0, REASON_SLOTS as usize, bytes)?;
        Ok(values
            .chunks(self.cpus)
            .map(|own| own.iter().sum())
            .collect())
    }

    fn read_counters(&self) -> Result<Vec<PortCounters>> {
        self.counters.read_range(0, self.counters.ports())
    }
}

/// The elements that differ.
fn grown<T: PartialEq>(before: &[T], after: &[T]) -> Vec<u32> {
    (0..)
        .zip(before.iter().zip(after))
        .filter(|(_, (before, after))| before != after)
        .map(|(index, _)| index)
        .collect()
}

/// Creates the maps. Hash tables are as large as what they hold needs; one that was full stays full.
fn load(contents: &[Contents], counted: u32) -> Result<Ebpf> {
    /// The copy has nothing to say in the log.
    const SILENT: u8 = 0;
    let mut loader = EbpfLoader::new();
    // As at a start of the daemon: nothing in the object depends on the kernel's own types.
    loader.btf(None);
    for map in contents {
        if matches!(map.kind, MapType::Hash | MapType::LruHash) {
            let needed = u32::try_from(map.count + SPARE).unwrap_or(u32::MAX);
            loader.map_max_entries(map.name, needed.min(map.capacity));
        }
    }
    let counters = Layout::of_ports(counted)?;
    counters.settle(&mut loader);
    diagnostics::set_level(&mut loader, &SILENT);
    loader.load(OBJECT).context("cannot create the copied maps")
}

/// Fills the tail calls of those slow paths that are loaded.
fn link_slow_paths(ebpf: &mut Ebpf) -> Result<()> {
    for (map, programs) in SLOW_PATHS {
        for (index, name) in (0..).zip(programs) {
            let loaded = ebpf.program(name).and_then(|program| program.fd().ok());
            let Some(program) = loaded.map(aya::programs::ProgramFd::try_clone) else {
                continue;
            };
            let array = ebpf
                .map_mut(map)
                .context("the kernel object has no such map")?;
            ProgramArray::try_from(array)?.set(index, &program?, 0)?;
        }
    }
    Ok(())
}

impl Contents {
    /// Reads a pinned map; `None` for one that is not copied: counters begin at zero, program arrays are filled anew.
    fn read(pins: &Pins, name: &'static str) -> Result<Option<Self>> {
        let path = pins.maps().join(name);
        let reading = || format!("cannot read map {}", path.display());
        let data = MapData::from_pin(&path).with_context(reading)?;
        let info = data.info().with_context(reading)?;
        let mut contents = Self {
            name,
            kind: info.map_type().with_context(reading)?,
            capacity: info.max_entries(),
            count: 0,
            keys: Vec::new(),
            values: Vec::new(),
        };
        let (key, value) = (info.key_size() as usize, info.value_size() as usize);
        let descriptor = data.fd().as_fd();
        if name == names::COUNTERS {
            // They begin at zero.
            return Ok(None);
        }
        let is_copied = matches!(name, names::SOURCE_USAGE | names::ANSWERS);
        let read = if contents.kind == MapType::Hash || is_copied {
            contents.read_hash(descriptor, key, value)
        } else if contents.kind == MapType::Array {
            contents.read_array(&data, value)
        } else if matches!(contents.kind, MapType::LpmTrie | MapType::DevMap) {
            contents.read_one_by_one(descriptor, key, value)
        } else if contents.kind == MapType::LruHash {
            // What waits for more of its datagram: no packet that is tried is a fragment.
            Ok(())
        } else {
            // Reasons, and what the rehearsal makes itself.
            return Ok(None);
        };
        read.with_context(reading)?;
        Ok(Some(contents))
    }

    fn read_hash(&mut self, map: BorrowedFd<'_>, key: usize, value: usize) -> Result<()> {
        let mut capacity = BATCH;
        let mut token = None;
        loop {
            let (mut keys, mut values) = (vec![0; capacity * key], vec![0; capacity * value]);
            let mut next = 0;
            // SAFETY: both buffers have room for `capacity` elements of the sizes that the kernel has told; the token of a hash
            // table is four bytes.
            let (count, end) = unsafe {
                syscall::lookup_batch(
                    map,
                    token,
                    &mut next,
                    &mut keys,
                    &mut values,
                    capacity as u32,
                )
            }?;
            let count = count as usize;
            self.keys.extend(&keys[..count * key]);
            self.values.extend(&values[..count * value]);
            self.count += count;
            match end {
                BatchEnd::More => token = Some(next),
                BatchEnd::Done => return Ok(()),
                BatchEnd::TooSmall => capacity *= 2,
            }
        }
    }

    fn read_array(&mut self, data: &MapData, value: usize) -> Result<()> {
        self.count = self.capacity as usize;
        self.values = vec![0; self.count * value];
        read_array(data, 0, self.count, &mut self.values)
    }

    /// For maps whose token of a batch is a whole key, and for device maps, which have no batches.
    fn read_one_by_one(&mut self, map: BorrowedFd<'_>, key: usize, value: usize) -> Result<()> {
        let mut current: Option<Vec<u8>> = None;
        loop {
            let mut next = vec![0; key];
            // SAFETY: both keys are as long as the kernel has told.
            if !unsafe { syscall::next_key(map, current.as_deref(), &mut next) }? {
                return Ok(());
            }
            let mut element = vec![0; value];
            // SAFETY: key and value are as long as the kernel has told.
            if unsafe { syscall::lookup_element(map, &next, &mut element) }? {
                self.keys.extend(&next);
                self.values.extend(&element);
                self.count += 1;
            }
            current = Some(next);
        }
    }

    /// Writes all of it into the map of the same name.
    fn write(&self, ebpf: &Ebpf) -> Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        let map = ebpf.map(self.name).context("there is none")?;
        let (Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::Array(data)
        | Map::LpmTrie(data)
        | Map::DevMap(data)) = map
        else {
            bail!("it is of another type");
        };
        let descriptor = data.fd().as_fd();
        if self.kind == MapType::Array {
            return write_array(data, 0, self.count, &self.values);
        }
        let (key, value) = (self.keys.len() / self.count, self.values.len() / self.count);
        let elements = self.keys.chunks(key).zip(self.values.chunks(value));
        for (key, value) in elements {
            // SAFETY: keys and values are as long as those of the map they came from, which has the same layout: `open` and
            // the loader have compared it.
            unsafe { syscall::update_element(descriptor, key, value, Update::Any) }?;
        }
        Ok(())
    }
}
