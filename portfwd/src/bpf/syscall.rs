//! The commands of bpf(2) that aya has no call for: batch operations, lookup-and-delete, and links by interface index with
//! no fallback to netlink (which could not be pinned).
//!
//! Every command has an attribute structure of its own, a prefix of the kernel's `union bpf_attr`; the kernel takes what is
//! missing for zero.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use bytemuck::{Pod, Zeroable};

/// Commands, `enum bpf_cmd` of the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
enum Command {
    LookupElement = 1,
    UpdateElement = 2,
    DeleteElement = 3,
    NextKey = 4,
    Pin = 6,
    OpenPin = 7,
    OpenProgramById = 13,
    Info = 15,
    QueryPrograms = 16,
    LookupAndDelete = 21,
    LookupBatch = 24,
    UpdateBatch = 26,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ElementAttribute {
    map: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BatchAttribute {
    token_in: u64,
    token_out: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: RawFd,
    element_flags: u64,
    flags: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PinAttribute {
    path: u64,
    object: RawFd,
    flags: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct IdAttribute {
    id: u32,
    next: u32,
    flags: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct QueryAttribute {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
    program_attach_flags: u64,
    links: u64,
    link_attach_flags: u64,
    revision: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct InfoAttribute {
    object: RawFd,
    length: u32,
    info: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkCreateAttribute {
    program: RawFd,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkUpdateAttribute {
    link: RawFd,
    new_program: RawFd,
    flags: u32,
    old_program: RawFd,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkDetachAttribute {
    link: RawFd,
}

/// Calls bpf(2).
///
/// # Safety
/// Every address and file descriptor in `attribute` must be good for what `command` does with it, for as long as the call
/// takes.
unsafe fn bpf<A: Pod>(command: Command, attribute: &mut A) -> io::Result<i32> {
    // SAFETY: the attribute is a valid structure of the size given; what is in it is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as u32,
            std::ptr::from_mut(attribute),
            size_of::<A>(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|result| *result >= 0)
        .ok_or_else(io::Error::last_os_error)
}

/// As [`bpf`], for commands that return a file descriptor.
///
/// # Safety
/// As for [`bpf`].
unsafe fn bpf_open<A: Pod>(command: Command, attribute: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attribute) }?;
    // SAFETY: the kernel has just made it for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address<T: ?Sized>(reference: &T) -> u64 {
    std::ptr::from_ref(reference).cast::<u8>() as u64
}

fn address_mut<T: ?Sized>(reference: &mut T) -> u64 {
    std::ptr::from_mut(reference).cast::<u8>() as u64
}

/// What an update does with a key that is there, or is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// Write in any case.
    Any,
    /// Only if there is no such key.
    NoExist,
}

impl Update {
    const fn flags(self) -> u64 {
        match self {
            Self::Any => 0,
            Self::NoExist => 1,
        }
    }
}

/// Reads an element; false if it is not there.
///
/// # Safety
/// `key` and `value` are as long as the map's keys and values are for user space (values per CPU: all possible CPUs).
pub(super) unsafe fn lookup_element(
    map: BorrowedFd<'_>,
    key: &[u8],
    value: &mut [u8],
) -> io::Result<bool> {
    // SAFETY: the caller's promise.
    unsafe { element(Command::LookupElement, map, key, address_mut(value), 0) }
}

/// Takes an element out of a hash map; false if it is not there.
///
/// # Safety
/// As for [`lookup_element`].
pub(super) unsafe fn take_element(
    map: BorrowedFd<'_>,
    key: &[u8],
    value: &mut [u8],
) -> io::Result<bool> {
    // SAFETY: the caller's promise.
    unsafe { element(Command::LookupAndDelete, map, key, address_mut(value), 0) }
}

/// Writes an element; false if [`Update::NoExist`] met a key that is there.
///
/// # Safety
/// As for [`lookup_element`].
pub(super) unsafe fn update_element(
    map: BorrowedFd<'_>,
    key: &[u8],
    value: &[u8],
    how: Update,
) -> io::Result<bool> {
    // SAFETY: the caller's promise.
    match unsafe {
        element(
            Command::UpdateElement,
            map,
            key,
            address(value),
            how.flags(),
        )
    } {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        other => other,
    }
}

/// Deletes an element; false if it is not there.
///
/// # Safety
/// `key` is as long as the map's keys.
pub(super) unsafe fn delete_element(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    // SAFETY: the caller's promise; a deletion has no value.
    unsafe { element(Command::DeleteElement, map, key, 0, 0) }
}

/// # Safety
/// `key` is as long as the map's keys; `value` is the address of as much memory as `command` reads or writes.
unsafe fn element(
    command: Command,
    map: BorrowedFd<'_>,
    key: &[u8],
    value: u64,
    flags: u64,
) -> io::Result<bool> {
    let mut attribute = ElementAttribute {
        map: map.as_raw_fd(),
        padding: 0,
        key: address(key),
        value,
        flags,
    };
    // SAFETY: the caller's promise.
    match unsafe { bpf(command, &mut attribute) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The key after `key` in the map's own order, or the first; false if there is none.
///
/// # Safety
/// `key` and `next` are as long as the map's keys.
pub(super) unsafe fn next_key(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    next: &mut [u8],
) -> io::Result<bool> {
    let mut attribute = ElementAttribute {
        map: map.as_raw_fd(),
        padding: 0,
        // No key, rather than an empty one, asks for the first.
        key: key.map_or(0, address),
        value: address_mut(next),
        flags: 0,
    };
    // SAFETY: the caller's promise.
    match unsafe { bpf(Command::NextKey, &mut attribute) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// How a batch lookup ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BatchEnd {
    /// There is more.
    More,
    /// The whole map has been seen.
    Done,
    /// Not even the first bucket of the hash map fits into the buffers; nothing was read.
    TooSmall,
}

/// Reads up to `count` elements after `token_in` (`None`: from the start). The token is a bucket number for hash maps and the
/// last key for arrays. Returns how many were read.
///
/// # Safety
/// `keys` and `values` have room for `count` elements of the map, see [`lookup_element`]; its keys have at least four bytes.
pub(super) unsafe fn lookup_batch(
    map: BorrowedFd<'_>,
    token_in: Option<u32>,
    token_out: &mut u32,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(u32, BatchEnd)> {
    let mut attribute = BatchAttribute {
        token_in: token_in.as_ref().map_or(0, address),
        token_out: address_mut(token_out),
        keys: address_mut(keys),
        values: address_mut(values),
        count,
        map: map.as_raw_fd(),
        ..BatchAttribute::zeroed()
    };
    // SAFETY: the caller's promise; the tokens are the four bytes that the kernel reads and writes.
    match unsafe { bpf(Command::LookupBatch, &mut attribute) } {
        Ok(_) => Ok((attribute.count, BatchEnd::More)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            Ok((attribute.count, BatchEnd::Done))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok((0, BatchEnd::TooSmall)),
        Err(error) => Err(error),
    }
}

/// Writes `count` elements.
///
/// # Safety
/// `keys` and `values` hold `count` elements of the map, see [`lookup_element`].
pub(super) unsafe fn update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> io::Result<()> {
    let mut attribute = BatchAttribute {
        keys: address(keys),
        values: address(values),
        count,
        map: map.as_raw_fd(),
        ..BatchAttribute::zeroed()
    };
    // SAFETY: the caller's promise.
    unsafe { bpf(Command::UpdateBatch, &mut attribute) }.map(drop)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Pins a map, program or link. The path must not exist.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attribute = PinAttribute {
        path: path.as_ptr() as u64,
        object: object.as_raw_fd(),
        flags: 0,
    };
    // SAFETY: the path is a C string that lives through the call.
    unsafe { bpf(Command::Pin, &mut attribute) }.map(drop)
}

/// Pins in place of what is pinned there, which nobody finds missing in between.
pub(super) fn pin_over(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push("~");
    let temporary = Path::new(&temporary);
    match fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    pin(object, temporary)?;
    fs::rename(temporary, path)
}

/// Opens what is pinned at a path; `None` if nothing is.
pub(super) fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    let mut attribute = PinAttribute {
        path: path.as_ptr() as u64,
        ..PinAttribute::zeroed()
    };
    // SAFETY: the path is a C string that lives through the call.
    match unsafe { bpf_open(Command::OpenPin, &mut attribute) } {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a program that is loaded. The kernel lets nobody but CAP_SYS_ADMIN do so.
pub(super) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attribute = IdAttribute {
        id,
        next: 0,
        flags: 0,
    };
    // SAFETY: no addresses.
    unsafe { bpf_open(Command::OpenProgramById, &mut attribute) }
}

/// Where a link attaches a program, `enum bpf_attach_type` of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum AttachType {
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// Attaches a program to an interface of the thread's network namespace, behind others on the same hook. It is detached when
/// the last descriptor and pin of the link go.
pub(super) fn create_link(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: AttachType,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attribute = LinkCreateAttribute {
        program: program.as_raw_fd(),
        ifindex,
        attach_type: attach_type as u32,
        flags,
    };
    // SAFETY: no addresses.
    unsafe { bpf_open(Command::LinkCreate, &mut attribute) }
}

/// Puts another program into a link; every packet meets the one or the other.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attribute = LinkUpdateAttribute {
        link: link.as_raw_fd(),
        new_program: program.as_raw_fd(),
        ..LinkUpdateAttribute::zeroed()
    };
    // SAFETY: no addresses.
    unsafe { bpf(Command::LinkUpdate, &mut attribute) }.map(drop)
}

/// Detaches a link now, whoever else holds it.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attribute = LinkDetachAttribute {
        link: link.as_raw_fd(),
    };
    // SAFETY: no addresses.
    unsafe { bpf(Command::LinkDetach, &mut attribute) }.map(drop)
}

/// What the kernel says about a link on an interface: the head of its `struct bpf_link_info`, in which XDP and TCX agree.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct LinkInfo {
    /// `enum bpf_link_type`.
    pub kind: u32,
    /// Number of the link.
    pub id: u32,
    /// Number of the program in it.
    pub program: u32,
    padding: u32,
    /// Interface, 0 once the interface is gone or the link detached.
    pub ifindex: u32,
    tail: u32,
}

/// Asks the kernel about a link.
pub(super) fn link_info(link: &impl AsFd) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::zeroed();
    let mut attribute = InfoAttribute {
        object: link.as_fd().as_raw_fd(),
        length: size_of::<LinkInfo>() as u32,
        info: address_mut(&mut info),
    };
    // SAFETY: the structure lives through the call and is as long as it says.
    unsafe { bpf(Command::Info, &mut attribute) }?;
    Ok(info)
}

/// What the kernel says about a program: the head of its `struct bpf_prog_info`.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct ProgramInfo {
    kind: u32,
    id: u32,
}

/// Number of a program.
pub(super) fn program_id(program: &impl AsFd) -> io::Result<u32> {
    let mut info = ProgramInfo::zeroed();
    let mut attribute = InfoAttribute {
        object: program.as_fd().as_raw_fd(),
        length: size_of::<ProgramInfo>() as u32,
        info: address_mut(&mut info),
    };
    // SAFETY: the structure lives through the call and is as long as it says.
    unsafe { bpf(Command::Info, &mut attribute) }?;
    Ok(info.id)
}

/// Numbers of the programs on a hook of an interface of the thread's network namespace, in the order in which they run.
pub(super) fn attached_programs(ifindex: u32, attach_type: AttachType) -> io::Result<Vec<u32>> {
    // As many as a hook takes (BPF_MPROG_MAX of the kernel).
    let mut programs = [0_u32; 64];
    let mut attribute = QueryAttribute {
        ifindex,
        attach_type: attach_type as u32,
        programs: address_mut(&mut programs),
        count: programs.len() as u32,
        ..QueryAttribute::zeroed()
    };
    // SAFETY: the array lives through the call and is as long as it says.
    unsafe { bpf(Command::QueryPrograms, &mut attribute) }?;
    let count = programs.len().min(attribute.count as usize);
    Ok(programs[..count].to_vec())
}
