//! bpf(2) for what aya does not offer: programs and links by id, and maps of unknown layouts.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

mod map;

pub use map::ByteMap;

/// The commands that are used here (enum bpf_cmd, include/uapi/linux/bpf.h).
mod command {
    pub(super) const MAP_LOOKUP_ELEM: u32 = 1;
    pub(super) const MAP_UPDATE_ELEM: u32 = 2;
    pub(super) const MAP_DELETE_ELEM: u32 = 3;
    pub(super) const MAP_GET_NEXT_KEY: u32 = 4;
    pub(super) const OBJ_PIN: u32 = 6;
    pub(super) const OBJ_GET: u32 = 7;
    pub(super) const PROG_GET_FD_BY_ID: u32 = 13;
    pub(super) const MAP_GET_FD_BY_ID: u32 = 14;
    pub(super) const OBJ_GET_INFO_BY_FD: u32 = 15;
    pub(super) const PROG_QUERY: u32 = 16;
    pub(super) const MAP_UPDATE_BATCH: u32 = 26;
    pub(super) const LINK_CREATE: u32 = 28;
    pub(super) const LINK_UPDATE: u32 = 29;
    pub(super) const LINK_GET_FD_BY_ID: u32 = 30;
    pub(super) const LINK_DETACH: u32 = 34;
}

/// `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` (enum bpf_attach_type).
const TCX: [u32; 2] = [46, 47];
/// `BPF_LINK_TYPE_TCX`, and `BPF_LINK_TYPE_XDP`.
const LINK_TCX: u32 = 11;
const LINK_XDP: u32 = 6;
/// More programs than a device has room for (`BPF_MPROG_MAX`, include/linux/bpf_mprog.h).
const MAX_PROGRAMS: usize = 64;
/// A program with more maps is not ours.
const MAX_MAPS: usize = 64;
/// Room for union bpf_attr, in words.
const ATTR_WORDS: usize = 20;
/// Room for an answer of [`command::OBJ_GET_INFO_BY_FD`], in words.
const INFO_WORDS: usize = 32;

/// A tcx program of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcxProgram {
    /// The program's id.
    pub program: u32,
    /// The id of the link that holds it; 0 if it was attached without one.
    pub link: u32,
}

/// What the kernel says about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Its id.
    pub id: u32,
    /// The id of its program.
    pub program: u32,
    /// The index of its device; 0 if the device is gone, or the link was detached. An index is
    /// valid in the device's network namespace.
    pub device: u32,
}

/// What the kernel says about a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Its id.
    pub id: u32,
    /// Its name: at most 15 bytes.
    pub name: String,
    /// The ids of its maps.
    pub maps: Vec<u32>,
}

/// What the kernel says about a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// Its id.
    pub id: u32,
    /// The length of a key.
    pub key_size: usize,
    /// The length of a value.
    pub value_size: usize,
    /// Its capacity.
    pub max_entries: u32,
    /// Its name: at most 15 bytes.
    pub name: String,
}

/// The type of a BPF object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link.
    Link,
}

/// The type of this descriptor's object; `None` if it is not a BPF object.
///
/// # Errors
/// As readlink(2).
pub fn object(descriptor: BorrowedFd<'_>) -> io::Result<Option<Object>> {
    let name = fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))?;
    let name = name.to_string_lossy();
    let of = |(part, object)| name.contains(part).then_some(object);
    let names = [
        ("bpf-map", Object::Map),
        ("bpf-prog", Object::Program),
        ("bpf-link", Object::Link),
        ("bpf_link", Object::Link),
    ];
    Ok(names.into_iter().find_map(of))
}

/// The tcx programs of a device, in the order in which they run.
///
/// # Errors
/// As bpf(2): `EINVAL` before Linux 6.6, `ENODEV` if the device is gone. Needs CAP_NET_ADMIN.
pub fn tcx_programs(device: u32, egress: bool) -> io::Result<Vec<TcxProgram>> {
    let (mut programs, mut links) = ([0_u32; MAX_PROGRAMS], [0_u32; MAX_PROGRAMS]);
    let mut attr = Attr::new();
    attr.word(0, device).word(4, TCX[usize::from(egress)]).pointer(16, programs.as_mut_ptr());
    attr.word(24, length(MAX_PROGRAMS)).pointer(40, links.as_mut_ptr());
    // SAFETY: both arrays have room for as many entries as `attr` says.
    unsafe { attr.call(command::PROG_QUERY) }?;
    let count = usize::try_from(attr.read(24)).unwrap_or(0).min(MAX_PROGRAMS);
    Ok(programs
        .iter()
        .zip(links)
        .take(count)
        .map(|(program, link)| TcxProgram { program: *program, link })
        .collect())
}

/// Where a tcx program runs among the others of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before all others.
    First,
    /// Right behind the program with this id.
    After(u32),
    /// Behind all others.
    Last,
}

/// Attaches a program to the ingress of a device by tcx. Not by the device's name, which may be
/// another's by now.
///
/// # Errors
/// As bpf(2): `ENOENT` if the program that it is to run behind is not there.
pub fn attach_tcx(program: BorrowedFd<'_>, device: u32, place: Place) -> io::Result<OwnedFd> {
    /// `BPF_F_BEFORE` and `BPF_F_AFTER`; without a program or link: before, or behind all.
    const BEFORE: u32 = 1 << 3;
    const AFTER: u32 = 1 << 4;
    /// `BPF_F_ID`: the other program is given by its id.
    const BY_ID: u32 = 1 << 5;

    let (flags, other) = match place {
        Place::First => (BEFORE, 0),
        Place::After(other) => (AFTER | BY_ID, other),
        Place::Last => (AFTER, 0),
    };
    let mut attr = Attr::new();
    attr.word(0, descriptor(program)).word(4, device).word(8, TCX[0]).word(12, flags).word(16, other);
    // SAFETY: no pointers; the call returns a new descriptor.
    unsafe { attr.open(command::LINK_CREATE) }
}

/// Where an XDP program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the device's driver.
    Native,
    /// In the kernel, before a packet is handled.
    Generic,
}

/// Attaches an XDP program to a device, by its index.
///
/// # Errors
/// As bpf(2): `EBUSY` or `EEXIST` if there is another program, `EOPNOTSUPP` if the driver has no XDP,
/// `EINVAL` before Linux 5.9.
pub fn attach_xdp(program: BorrowedFd<'_>, device: u32, mode: XdpMode) -> io::Result<OwnedFd> {
    /// `BPF_XDP` (enum bpf_attach_type), `XDP_FLAGS_SKB_MODE` and `XDP_FLAGS_DRV_MODE`.
    const XDP: u32 = 37;
    const SKB_MODE: u32 = 1 << 1;
    const DRV_MODE: u32 = 1 << 2;

    let flags = if mode == XdpMode::Native { DRV_MODE } else { SKB_MODE };
    let mut attr = Attr::new();
    attr.word(0, descriptor(program)).word(4, device).word(8, XDP).word(12, flags);
    // SAFETY: no pointers; the call returns a new descriptor.
    unsafe { attr.open(command::LINK_CREATE) }
}

/// Replaces a link's program, between two packets.
///
/// # Errors
/// As bpf(2): `ENOLINK` if the link is detached.
pub fn replace_program(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Attr::new();
    attr.word(0, descriptor(link)).word(4, descriptor(program));
    // SAFETY: no pointers.
    unsafe { attr.call(command::LINK_UPDATE) }.map(drop)
}

/// A link by its id.
///
/// # Errors
/// As bpf(2). Needs CAP_SYS_ADMIN.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(command::LINK_GET_FD_BY_ID, id)
}

/// A program by its id.
///
/// # Errors
/// As bpf(2). Needs CAP_SYS_ADMIN.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(command::PROG_GET_FD_BY_ID, id)
}

/// A map by its id.
///
/// # Errors
/// As bpf(2). Needs CAP_SYS_ADMIN.
pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(command::MAP_GET_FD_BY_ID, id)
}

/// Opens a pinned object.
///
/// # Errors
/// As bpf(2).
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr::new();
    attr.pointer(0, path.as_ptr());
    // SAFETY: the path ends with a zero; the call returns a new descriptor.
    unsafe { attr.open(command::OBJ_GET) }
}

/// Pins an object.
///
/// # Errors
/// As bpf(2): `EEXIST` if the path exists, `EPERM` if it is not in a BPF file system.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr::new();
    attr.pointer(0, path.as_ptr()).word(8, descriptor(object));
    // SAFETY: the path ends with a zero.
    unsafe { attr.call(command::OBJ_PIN) }.map(drop)
}

/// Detaches a link from its device, even if other processes or pins hold the link.
///
/// # Errors
/// As bpf(2).
pub fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Attr::new();
    attr.word(0, descriptor(link));
    // SAFETY: no pointers.
    unsafe { attr.call(command::LINK_DETACH) }.map(drop)
}

/// What the kernel says about a tcx link; `None` if the link is of another type.
///
/// # Errors
/// As bpf(2).
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<Option<LinkInfo>> {
    link_info_of(LINK_TCX, link)
}

/// The same of an XDP link.
///
/// # Errors
/// As bpf(2).
pub fn xdp_link_info(link: BorrowedFd<'_>) -> io::Result<Option<LinkInfo>> {
    link_info_of(LINK_XDP, link)
}

fn link_info_of(expected: u32, link: BorrowedFd<'_>) -> io::Result<Option<LinkInfo>> {
    let info = info(link, [0; INFO_WORDS])?;
    let [kind, id, program, _, device, ..] = words(&info);
    Ok((kind == expected).then_some(LinkInfo { id, program, device }))
}

/// What the kernel says about a program.
///
/// # Errors
/// As bpf(2).
pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    /// struct bpf_prog_info: `nr_map_ids`, `map_ids` and `name`.
    const COUNT: usize = 52;
    const IDS: usize = 56;
    const NAME: usize = 64;

    let mut maps = [0_u32; MAX_MAPS];
    let mut question = [0_u64; INFO_WORDS];
    question[COUNT / 8] = u64::from_ne_bytes(join([0, length(MAX_MAPS)]));
    question[IDS / 8] = address(maps.as_mut_ptr());
    let info = info(program, question)?;
    let [_, id, ..] = words(&info);
    let count = usize::try_from(words(&info)[COUNT / 4]).unwrap_or(0).min(MAX_MAPS);
    Ok(ProgramInfo { id, name: name(&info, NAME), maps: maps.into_iter().take(count).collect() })
}

/// What the kernel says about a map.
///
/// # Errors
/// As bpf(2).
pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    const NAME: usize = 24;

    let info = info(map, [0; INFO_WORDS])?;
    let [_, id, key_size, value_size, max_entries, ..] = words(&info);
    let size = |size: u32| usize::try_from(size).map_err(io::Error::other);
    Ok(MapInfo {
        id,
        key_size: size(key_size)?,
        value_size: size(value_size)?,
        max_entries,
        name: name(&info, NAME),
    })
}

fn by_id(command: u32, id: u32) -> io::Result<OwnedFd> {
    let mut attr = Attr::new();
    attr.word(0, id);
    // SAFETY: no pointers; the call returns a new descriptor.
    unsafe { attr.open(command) }
}

fn info(object: BorrowedFd<'_>, mut info: [u64; INFO_WORDS]) -> io::Result<[u64; INFO_WORDS]> {
    let mut attr = Attr::new();
    attr.word(0, descriptor(object)).word(4, length(size_of_val(&info))).pointer(8, info.as_mut_ptr());
    // SAFETY: `info` is as long as `attr` says. What pointers it contains lead to room that the
    // caller owns.
    unsafe { attr.call(command::OBJ_GET_INFO_BY_FD) }?;
    Ok(info)
}

fn words(info: &[u64; INFO_WORDS]) -> [u32; INFO_WORDS * 2] {
    let mut words = [0; INFO_WORDS * 2];
    for (word, bytes) in words.iter_mut().zip(info.iter().flat_map(|word| split(word.to_ne_bytes()))) {
        *word = bytes;
    }
    words
}

fn split([a, b, c, d, e, f, g, h]: [u8; 8]) -> [u32; 2] {
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

fn join([first, second]: [u32; 2]) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d, e, f, g, h]
}

/// The name at this offset: `BPF_OBJ_NAME_LEN` bytes.
fn name(info: &[u64; INFO_WORDS], at: usize) -> String {
    let bytes = info.iter().flat_map(|word| word.to_ne_bytes()).skip(at).take(16);
    let bytes: Vec<_> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn length(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

fn descriptor(of: BorrowedFd<'_>) -> u32 {
    // Descriptors are not negative.
    u32::try_from(of.as_raw_fd()).unwrap_or(u32::MAX)
}

fn address<T>(of: *const T) -> u64 {
    u64::try_from(of.expose_provenance()).unwrap_or_default()
}

/// union bpf_attr: fields by their offset.
struct Attr([u64; ATTR_WORDS]);

impl Attr {
    const fn new() -> Self {
        Self([0; ATTR_WORDS])
    }

    fn word(&mut self, at: usize, value: u32) -> &mut Self {
        if let Some(word) = self.0.get_mut(at / 8) {
            let [first, second] = split(word.to_ne_bytes());
            let both = if at.is_multiple_of(8) { [value, second] } else { [first, value] };
            *word = u64::from_ne_bytes(join(both));
        }
        self
    }

    fn pointer<T>(&mut self, at: usize, value: *const T) -> &mut Self {
        if let Some(word) = self.0.get_mut(at / 8) {
            *word = address(value);
        }
        self
    }

    fn read(&self, at: usize) -> u32 {
        let both = self.0.get(at / 8).map_or([0; 2], |word| split(word.to_ne_bytes()));
        both[usize::from(!at.is_multiple_of(8))]
    }

    /// # Safety
    /// The pointers in it must lead to room of the length that the command reads or writes.
    unsafe fn call(&mut self, command: u32) -> io::Result<libc::c_long> {
        // SAFETY: by the caller; the kernel reads and writes no more of `self` than its size.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), size_of_val(&self.0)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    /// # Safety
    /// As [`Attr::call`]; and the command must return a new descriptor.
    unsafe fn open(&mut self, command: u32) -> io::Result<OwnedFd> {
        // SAFETY: by the caller.
        let result = unsafe { self.call(command) }?;
        let descriptor = RawFd::try_from(result).map_err(io::Error::other)?;
        // SAFETY: new, and by nothing else owned.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_at_their_offsets() {
        let mut attr = Attr::new();
        attr.word(0, 7).word(4, 46).word(24, 64);
        assert_eq!((attr.read(0), attr.read(4), attr.read(24), attr.read(28)), (7, 46, 64, 0));
        assert_eq!(attr.0[0].to_ne_bytes(), join([7, 46]));
    }

    #[test]
    fn names_end_at_zero() {
        let mut info = [0; INFO_WORDS];
        info[3] = u64::from_ne_bytes(*b"FLOWS\0\0\0");
        assert_eq!(name(&info, 24), "FLOWS");
    }
}
