//! Loading the kernel object over the pinned maps, after a comparison of their layouts.
//!
//! aya takes whatever map is pinned under a name, without a look at its sizes. So every pinned map is compared first, and
//! nothing is created unless all that is there fits; or a seal says that it was.
//!
//! Nearly all the time of a start would be the verifier's. Programs that are pinned already, and come from the same object, are
//! taken as they are; others are loaded several at a time, which the kernel allows to whoever has CAP_BPF (`bpf_check` takes its
//! lock for nobody else).

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    panic::resume_unwind,
    sync::Mutex,
    thread,
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfError, EbpfLoader, VerifierLogLevel,
    maps::{Map, MapInfo},
    programs::{Program, ProgramError},
};
use aya_obj::Object;
use bytemuck::bytes_of;
use log::{debug, info};
use nix::sys::utsname::uname;
use portfwd_common::abi::{
    DEFAULT_MAX_FLOWS, DEFAULT_MAX_HALF_OPEN, DEFAULT_MAX_PORTS, config::INTERFACE_SLOTS, names,
};

use super::{
    OBJECT,
    counters::Layout,
    diagnostics,
    frames::Frames,
    half_open, map,
    pins::{Pins, entries},
    room::Room,
    seal::{Seal, break_seals},
    syscall::{
        Update, lookup_element, open_pin, pin_over, program_by_id, program_id, update_element,
    },
    tables::Egress,
};
use crate::{
    failure::{Failure, Kind},
    instance::Instance,
};

/// Every program of the object.
pub(super) const PROGRAMS: [&str; 19] = [
    names::PROGRAM_XDP,
    names::PROGRAM_TC,
    names::PROGRAM_TC_RAW,
    names::PROGRAM_TC_SLOW,
    names::PROGRAM_TC_OUT,
    names::PROGRAM_TC_OUT_RAW,
    names::PROGRAM_CLOCK,
    names::PROGRAM_POOL,
    names::PROGRAM_USAGE,
    names::SLOW_XDP[0],
    names::SLOW_XDP[1],
    names::SLOW_TC[0],
    names::SLOW_TC[1],
    names::SLOW_TC[2],
    names::SLOW_TC[3],
    names::SLOW_TC[4],
    names::SLOW_TC[5],
    names::LIGHT_XDP,
    names::LIGHT_TC,
];
/// Those that take the verifier longest, longest first: they begin at once, and the others fill the rest of the time.
const LONGEST: [&str; 8] = [
    names::SLOW_TC[3],
    names::SLOW_TC[1],
    names::SLOW_TC[2],
    names::SLOW_TC[0],
    names::SLOW_XDP[1],
    names::SLOW_XDP[0],
    names::LIGHT_TC,
    names::LIGHT_XDP,
];
/// The maps by which the hooks' programs find their slow paths.
pub(super) const SLOW_PATHS: [(&str, &[&str]); 2] = [
    (names::XDP_SLOW, &names::SLOW_XDP),
    (names::TC_SLOW, &names::SLOW_TC),
];
/// The kernel sets this on device maps itself (`BPF_F_RDONLY_PROG`).
const SET_BY_KERNEL: u32 = 1 << 7;
/// Lines of the verifier's log that an error shows: what it refused, and where.
const VERIFIER_LINES: usize = 3;
/// How the line begins that ends every log.
const VERIFIER_STATISTICS: &str = "processed ";

/// Sizes that are chosen at the first start and stay with the pins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Connections that fit, of each family.
    pub max_flows: Option<u32>,
    /// Flows that have not proven themselves, of each family.
    pub max_half_open: Option<u32>,
    /// Counted ports.
    pub max_ports: Option<u32>,
}

/// The programs in the kernel, their maps pinned.
pub struct Programs {
    loaded: BTreeMap<&'static str, OwnedFd>,
    /// Those that an earlier start had pinned, and maps of their own, until the new ones are in their places.
    former: Vec<OwnedFd>,
}

/// A pinned map as it is.
struct Pinned {
    name: &'static str,
    info: MapInfo,
}

/// Loads all programs over the instance's pinned maps, creating those that are missing. If that fails, a new instance leaves
/// nothing behind and an old one stays as it was.
pub fn load(instance: &Instance, pins: &Pins, sizes: Sizes, frames: Frames) -> Result<Programs> {
    refuse_other_versions(instance, pins)?;
    let is_new = !pins.exist();
    pins.create()?;
    let loaded = load_over_pins(instance, pins, sizes, &frames.object(OBJECT));
    if loaded.is_err() && is_new {
        // The error that matters is the first.
        if let Err(error) = fs::remove_dir_all(pins.version()) {
            debug!("cannot remove {}: {error}", pins.version().display());
        }
        let _not_empty = fs::remove_dir(pins.instance());
    }
    loaded
}

fn load_over_pins(
    instance: &Instance,
    pins: &Pins,
    sizes: Sizes,
    bytes: &[u8],
) -> Result<Programs> {
    let pinned = pinned_maps(pins)?;
    let pinned_size = |name| {
        pinned
            .iter()
            .find(|map| map.name == name)
            .map(|map| map.info.max_entries())
    };
    let pinned_flows = pinned_size(names::FLOWS_V4).map(|entries| entries / 2);
    let max_flows = settle(
        instance,
        "--max-flows",
        sizes.max_flows,
        pinned_flows,
        DEFAULT_MAX_FLOWS,
    )?;
    let max_half_open = settle(
        instance,
        "--max-half-open",
        sizes.max_half_open,
        pinned_size(names::OPENING_V4)
            .map(half_open::flows)
            .transpose()?,
        DEFAULT_MAX_HALF_OPEN,
    )?;
    let pinned_ports = pinned_size(names::COUNTERS)
        .map(Layout::of_elements)
        .transpose()?;
    let max_ports = settle(
        instance,
        "--max-ports",
        sizes.max_ports,
        pinned_ports.map(|layout| layout.ports()),
        DEFAULT_MAX_PORTS,
    )?;
    let room = Room::of(max_flows, max_half_open, max_ports)?;
    let level = diagnostics::level();
    // The messages of programs that an earlier start has loaded come out of a buffer that went with it.
    if level == diagnostics::OFF
        && let Some(programs) = adopt(pins, bytes)?
    {
        info!("the tables take {room}");
        return Ok(programs);
    }
    let mut loader = thread::scope(|scope| {
        // The library reads the kernel's own types, whoever needs them: meanwhile the maps are compared.
        let loader = scope.spawn(EbpfLoader::new);
        let object = Object::parse(bytes).context("the embedded kernel object is broken")?;
        for map in &pinned {
            compare(instance, map, &object, room.elements(map.name))?;
        }
        anyhow::Ok(loader.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    info!("the tables take {room}");
    // Without the statistics, which would be the last lines.
    loader.verifier_log_level(VerifierLogLevel::DEBUG);
    // Nothing in the object depends on the kernel's own types.
    loader.btf(None);
    for name in names::MAPS {
        loader.map_pin_path(name, pins.maps().join(name));
        if let Some(entries) = room.elements(name) {
            loader.map_max_entries(name, entries);
        }
    }
    room.counters().settle(&mut loader);
    diagnostics::set_level(&mut loader, &level);
    let mut ebpf = loader.load(bytes).map_err(|error| no_maps(error, &room))?;
    diagnostics::follow(&mut ebpf, level, &pins.maps())?;
    let mut programs = Programs {
        loaded: load_programs(&mut ebpf)?,
        former: pinned_programs(pins)?,
    };
    let own = [
        (names::EGRESS, own_map(&ebpf, names::EGRESS)?),
        (names::XDP_SLOW, own_map(&ebpf, names::XDP_SLOW)?),
    ];
    let [(_, egress), (_, xdp_slow)] = &own;
    copy_egress(pins, egress)?;
    programs
        .link_slow_paths_of(xdp_slow.as_fd(), &names::SLOW_XDP)
        .with_context(|| format!("cannot fill map {}", names::XDP_SLOW))?;
    programs.link_slow_paths(pins)?;
    for name in PROGRAMS {
        let path = pins.program(name);
        pin_over(programs.fd(name)?.as_fd(), &path)
            .with_context(|| format!("cannot pin {}", path.display()))?;
    }
    // After the programs that use them: a start that finds another seal than its own loads everything anew. A program array that
    // neither a pin nor a descriptor names is emptied (`map_release_uref`), so the former ones are held until no program is left.
    for (name, map) in &own {
        let path = pins.maps().join(name);
        programs
            .former
            .extend(open_pin(&path).with_context(|| format!("cannot open {}", path.display()))?);
        pin_over(map.as_fd(), &path).with_context(|| format!("cannot pin {}", path.display()))?;
    }
    // Last, so that it tells that everything is in its place.
    match Seal::of(bytes, pins)? {
        Some(seal) if level == diagnostics::OFF => seal.put_on(pins)?,
        Some(_) | None => break_seals(pins)?,
    }
    Ok(programs)
}

/// A map that programs of an earlier start must not share: they may know of another number of buffers, and the kernel lets no
/// program array and no device map have both.
fn own_map(ebpf: &Ebpf, name: &str) -> Result<OwnedFd> {
    let (Some(Map::DevMap(map)) | Some(Map::ProgramArray(map))) = ebpf.map(name) else {
        bail!("the kernel object has no map {name}");
    };
    Ok(map.fd().as_fd().try_clone_to_owned()?)
}

/// Brings what XDP may transmit on from the pinned map, if there is one, into a new one, before any program uses that.
fn copy_egress(pins: &Pins, new: &OwnedFd) -> Result<()> {
    if !pins.maps().join(names::EGRESS).exists() {
        return Ok(());
    }
    let pinned: map::Map<u32, Egress> = map::Map::open(&pins.maps(), names::EGRESS)?;
    for slot in 0..INTERFACE_SLOTS {
        let Some(egress) = pinned.lookup(&slot)? else {
            continue;
        };
        let (key, value) = (slot.to_ne_bytes(), bytes_of(&egress));
        // SAFETY: keys and values of the two are the same.
        unsafe { update_element(new.as_fd(), &key, value, Update::Any) }
            .with_context(|| format!("cannot fill map {}", names::EGRESS))?;
    }
    Ok(())
}

/// The pinned programs, if they are what would be loaded.
fn adopt(pins: &Pins, object: &[u8]) -> Result<Option<Programs>> {
    if !Seal::of(object, pins)?.is_some_and(|seal| seal.is_on(pins)) {
        return Ok(None);
    }
    let mut loaded = BTreeMap::new();
    for name in PROGRAMS {
        let path = pins.program(name);
        let program = open_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
        loaded.insert(
            name,
            program.with_context(|| format!("{} has gone", path.display()))?,
        );
    }
    let programs = Programs {
        loaded,
        former: Vec::new(),
    };
    // A start of another object may have been killed after it had put its slow paths there.
    programs.link_slow_paths(pins)?;
    info!("the programs of an earlier start are the same, and stay");
    Ok(Some(programs))
}

fn refuse_other_versions(instance: &Instance, pins: &Pins) -> Result<()> {
    let others = pins.other_versions()?;
    if others.is_empty() {
        return Ok(());
    }
    let error = format!(
        "instance {} is attached by another version of portfwd (layout {}), whose flows this one cannot read",
        instance.name(),
        others.join(", "),
    );
    Err(Failure::new(Kind::Conflict, error)
        .hint(detach_hint(instance))
        .into())
}

fn detach_hint(instance: &Instance) -> String {
    format!(
        "`{}`, then start it again: rules stay, flows and counters are lost",
        detach_command(instance)
    )
}

fn detach_command(instance: &Instance) -> String {
    format!("{} detach --keep-rules", instance.command())
}

fn pinned_maps(pins: &Pins) -> Result<Vec<Pinned>> {
    let mut pinned = Vec::new();
    for name in names::MAPS {
        let path = pins.maps().join(name);
        if path.exists() {
            let info = MapInfo::from_pin(&path)
                .with_context(|| format!("cannot look at map {}", path.display()))?;
            pinned.push(Pinned { name, info });
        }
    }
    Ok(pinned)
}

fn pinned_programs(pins: &Pins) -> Result<Vec<OwnedFd>> {
    let mut programs = Vec::new();
    for name in entries(&pins.programs())? {
        let path = pins.program(&name);
        let opened = open_pin(&path).with_context(|| format!("cannot open {}", path.display()))?;
        programs.extend(opened);
    }
    Ok(programs)
}

/// The size in force: that of the pins, if there are pins.
fn settle(
    instance: &Instance,
    option: &str,
    wanted: Option<u32>,
    pinned: Option<u32>,
    default: u32,
) -> Result<u32> {
    match (wanted, pinned) {
        (Some(wanted), Some(pinned)) if wanted != pinned => {
            let error = format!(
                "{option} {wanted} was asked for, but the tables in the kernel were made for {pinned}"
            );
            let hint = format!(
                "leave {option} out to keep them, or `{}` to make new ones (flows and counters are lost)",
                detach_command(instance)
            );
            Err(Failure::new(Kind::Conflict, error).hint(hint).into())
        }
        (_, Some(pinned)) => Ok(pinned),
        (wanted, None) => Ok(wanted.unwrap_or(default)),
    }
}

/// Refuses a pinned map that is not what the object would create.
fn compare(
    instance: &Instance,
    pinned: &Pinned,
    object: &Object,
    max_entries: Option<u32>,
) -> Result<()> {
    let Some(expected) = object.maps.get(pinned.name) else {
        bail!("the kernel object has no map {}", pinned.name);
    };
    let info = &pinned.info;
    let map_type = info
        .map_type()
        .context("the kernel reports a map of an unknown type")?;
    for (what, have, want) in [
        ("type", map_type as u32, expected.map_type()),
        ("key size", info.key_size(), expected.key_size()),
        ("value size", info.value_size(), expected.value_size()),
        (
            "size",
            info.max_entries(),
            max_entries.unwrap_or(expected.max_entries()),
        ),
        (
            "flags",
            info.map_flags() & !SET_BY_KERNEL,
            expected.map_flags() & !SET_BY_KERNEL,
        ),
    ] {
        if have != want {
            let error = format!(
                "pinned map {} has {what} {have} where this portfwd needs {want}",
                pinned.name
            );
            return Err(Failure::new(Kind::Conflict, error)
                .hint(detach_hint(instance))
                .into());
        }
    }
    Ok(())
}

/// The maps could not be created; for want of memory it says how much they take.
fn no_maps(error: EbpfError, room: &Room) -> anyhow::Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let mut is_memory = false;
    while let Some(link) = cause {
        let system = link.downcast_ref::<io::Error>();
        is_memory |= system.is_some_and(|error| error.kind() == io::ErrorKind::OutOfMemory);
        cause = link.source();
    }
    if !is_memory {
        return anyhow::Error::new(error).context("cannot create the maps");
    }
    let error = format!("there is no memory for the tables, which take {room}");
    Failure::new(Kind::Failed, error)
        .hint("start with smaller --max-flows, --max-half-open and --max-ports, or raise MemoryMax= of the service")
        .into()
}

/// Has the kernel verify all programs, on as many threads as it has processors for.
fn load_programs(ebpf: &mut Ebpf) -> Result<BTreeMap<&'static str, OwnedFd>> {
    let queue: Vec<_> = ebpf.programs_mut().collect();
    let count = queue.len();
    let queue = Mutex::new(by_size(queue));
    let next = || queue.lock().ok().and_then(|mut queue| queue.pop());
    let work = || -> Result<()> {
        while let Some((name, program)) = next() {
            load_program(name, program)?;
        }
        Ok(())
    };
    let workers =
        thread::available_parallelism().map_or(1, |processors| processors.get().min(count));
    thread::scope(|scope| {
        let started: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut outcome = work();
        for worker in started {
            let theirs = worker.join().unwrap_or_else(|panic| resume_unwind(panic));
            outcome = outcome.and(theirs);
        }
        outcome
    })?;
    let mut loaded = BTreeMap::new();
    for name in PROGRAMS {
        let fd = find_program(ebpf, name)?.fd();
        let fd = fd.with_context(|| format!("program {name} is not loaded"))?;
        loaded.insert(name, fd.as_fd().try_clone_to_owned()?);
    }
    Ok(loaded)
}

/// Those that take the verifier longest come last, where they are taken from first.
fn by_size<'p>(mut programs: Vec<(&'p str, &'p mut Program)>) -> Vec<(&'p str, &'p mut Program)> {
    let rank = |name: &str| LONGEST.iter().position(|long| *long == name);
    programs.sort_by_key(|(name, _)| std::cmp::Reverse(rank(name).unwrap_or(LONGEST.len())));
    programs
}

fn find_program<'e>(ebpf: &'e Ebpf, name: &str) -> Result<&'e Program> {
    ebpf.program(name)
        .with_context(|| format!("the kernel object has no program {name}"))
}

/// Has the kernel verify a program.
pub(super) fn load_program(name: &str, program: &mut Program) -> Result<()> {
    let loaded = if let Program::Xdp(program) = program {
        program.load()
    } else if let Program::SchedClassifier(program) = program {
        program.load()
    } else {
        bail!(
            "program {name} of the kernel object is of type {:?}",
            program.prog_type()
        )
    };
    loaded.map_err(|error| rejection(name, error))
}

/// The kernel's refusal of a program, with what the verifier said last.
fn rejection(name: &str, error: ProgramError) -> anyhow::Error {
    let refused = format!("kernel {} refuses program {name}", kernel_release());
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return anyhow::Error::new(error).context(refused);
    };
    let log = verifier_log.to_string();
    debug!("verifier log of {name}:\n{log}");
    let lines: Vec<_> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with(VERIFIER_STATISTICS))
        .collect();
    let last = lines[lines.len().saturating_sub(VERIFIER_LINES)..].join(" | ");
    let hint = "RUST_LOG=debug shows the whole log of the verifier";
    Failure::during(format!("{refused} ({last})"), &io_error)
        .hint(hint)
        .into()
}

fn kernel_release() -> String {
    uname().map_or_else(
        |_| "of unknown version".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

impl Programs {
    /// Puts slow paths where the programs of TC call them, unless they are there. Programs of an earlier start that still run
    /// call the new ones from here on: the layouts are the same.
    fn link_slow_paths(&self, pins: &Pins) -> Result<()> {
        let linking = || format!("cannot fill map {}", names::TC_SLOW);
        let map = open_pin(&pins.maps().join(names::TC_SLOW))
            .with_context(linking)?
            .context("it has gone")
            .with_context(linking)?;
        self.link_slow_paths_of(map.as_fd(), &names::SLOW_TC)
            .with_context(linking)
    }

    fn link_slow_paths_of(&self, map: BorrowedFd<'_>, programs: &[&str]) -> Result<()> {
        for (index, name) in (0_u32..).zip(programs) {
            let (program, key) = (self.fd(name)?, index.to_ne_bytes());
            let mut there = [0; 4];
            // SAFETY: keys and values of a program array have four bytes; what is read from it is a program's number.
            let is_there = unsafe { lookup_element(map, &key, &mut there) }?;
            if is_there && u32::from_ne_bytes(there) == program_id(program)? {
                continue;
            }
            let descriptor = program.as_raw_fd().to_ne_bytes();
            // SAFETY: as above; what is written to it is a descriptor.
            unsafe { update_element(map, &key, &descriptor, Update::Any) }?;
        }
        Ok(())
    }

    /// A loaded program.
    pub fn fd(&self, name: &str) -> Result<&OwnedFd> {
        self.loaded
            .get(name)
            .with_context(|| format!("the kernel object has no program {name}"))
    }

    /// The programs are in their places, and nothing will be taken back: the kernel frees those of the earlier start.
    pub fn forget_former(&mut self) {
        self.former.clear();
    }

    /// The program of a number, of this start or of an earlier one. Others are opened by their number, which takes CAP_SYS_ADMIN;
    /// `None` without it.
    pub(super) fn by_id(&self, id: u32) -> Result<Option<OwnedFd>> {
        for name in PROGRAMS {
            let own = self.fd(name)?;
            if program_id(own)? == id {
                return Ok(Some(own.try_clone()?));
            }
        }
        for former in &self.former {
            if program_id(former)? == id {
                return Ok(Some(former.try_clone()?));
            }
        }
        match program_by_id(id) {
            Ok(program) => Ok(Some(program)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot open program {id}")),
        }
    }
}
