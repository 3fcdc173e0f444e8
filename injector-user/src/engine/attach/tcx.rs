//! Attachment by tcx (Linux 6.6): one pinned link for each device.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::programs::{SchedClassifier, TcAttachType};

use super::{
    Position, ProgramSet,
    attachment::{Change, Failure},
    clsact,
    device_pins::replace_pin,
};
use crate::{
    os::bpf::{self, LinkInfo, Object, Place, TcxProgram},
    telemetry::log::target,
};

/// Whether the kernel has tcx, asked of any device.
pub(in crate::engine) fn is_supported(device: u32) -> bool {
    let unknown = |error: io::Error| error.raw_os_error() == Some(libc::EINVAL);
    !bpf::tcx_programs(device, false).is_err_and(unknown)
}

/// Has the program run at its position among the tcx programs of the device. An earlier program under
/// this pin is replaced between two packets.
pub(in crate::engine) fn ensure(
    program: &mut SchedClassifier,
    device: (u32, &str),
    pin: &Path,
    set: &ProgramSet,
    may_move: bool,
) -> Result<Change, Failure> {
    let index = device.0;
    let own = program.info()?.id();
    let present = bpf::tcx_programs(index, false)?;
    if set.position == Position::AfterFirst {
        return ensure_somewhere(program, index, pin, &present);
    }
    let change = match live_link(pin, index, &present) {
        None => attach(program, index, pin).map(|()| Change::Attached)?,
        Some((link, info)) => {
            let in_front = present.first().is_some_and(|first| first.link == info.id);
            match (in_front, info.program == own) {
                (true, true) => return Ok(Change::None),
                (true, false) => {
                    bpf::replace_program(link.as_fd(), program.fd()?.as_fd())?;
                    Change::Replaced
                }
                // For a moment both run. The second one sees what the first has left alone, with
                // the same maps, and leaves it alone too.
                (false, false) => {
                    attach(program, index, pin)?;
                    bpf::detach_link(link.as_fd())?;
                    Change::Moved
                }
                (false, true) if may_move => move_to_front(program, device, link.as_fd(), pin, set)?,
                (false, true) => return Ok(Change::Behind),
            }
        }
    };
    let first = bpf::tcx_programs(index, false)?.into_iter().next();
    if first.is_some_and(|first| first.program == own) { Ok(change) } else { Ok(Change::Behind) }
}

/// Has the program run behind the first one. Once it is attached it stays where it is, whatever comes
/// or goes.
fn ensure_somewhere(
    program: &SchedClassifier,
    device: u32,
    pin: &Path,
    present: &[TcxProgram],
) -> Result<Change, Failure> {
    match live_link(pin, device, present) {
        None => {
            let place = present.first().map_or(Place::First, |first| Place::After(first.program));
            let link = match bpf::attach_tcx(program.fd()?.as_fd(), device, place) {
                // The other program is gone meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    bpf::attach_tcx(program.fd()?.as_fd(), device, Place::Last)?
                }
                link => link?,
            };
            replace_pin(link.as_fd(), pin)?;
            Ok(Change::Attached)
        }
        Some((_, info)) if info.program == program.info()?.id() => Ok(Change::None),
        Some((link, _)) => {
            bpf::replace_program(link.as_fd(), program.fd()?.as_fd())?;
            Ok(Change::Replaced)
        }
    }
}

/// The kernel attaches a program only once to a hook (bpf_mprog_exists, kernel/bpf/mprog.c). So
/// that no packet passes without it, it runs as a filter meanwhile. Where no filter can be added,
/// it stays behind.
fn move_to_front(
    program: &mut SchedClassifier,
    device: (u32, &str),
    link: BorrowedFd<'_>,
    pin: &Path,
    set: &ProgramSet,
) -> Result<Change, Failure> {
    let filter = match clsact::add(program, device, set) {
        Ok(filter) => filter,
        Err(error) => {
            let (device, error) = (device.1, crate::engine::bpf::chain(&*error));
            tracing::debug!(target: target::ENGINE, device, error, "no filter could be added; the program is not moved");
            return Ok(Change::Behind);
        }
    };
    let remove = || filter.remove(device.1, TcAttachType::Ingress);
    if let Err(error) = bpf::detach_link(link) {
        remove()?;
        return Err(error.into());
    }
    // If that fails, the filter stays: the next attempt removes it once a link is attached.
    attach(program, device.0, pin)?;
    remove()?;
    Ok(Change::Moved)
}

/// The link under this pin, if it is attached to the device.
fn live_link(pin: &Path, device: u32, present: &[TcxProgram]) -> Option<(OwnedFd, LinkInfo)> {
    let link = bpf::open_pin(pin).ok()?;
    if bpf::object(link.as_fd()).ok()? != Some(Object::Link) {
        return None;
    }
    let info = bpf::link_info(link.as_fd()).ok()??;
    // The index may be that of a device of another network namespace.
    let here = info.device == device && present.iter().any(|program| program.link == info.id);
    here.then_some((link, info))
}

/// Attaches the program, and gives its link the pin's place.
fn attach(program: &SchedClassifier, device: u32, pin: &Path) -> Result<(), Failure> {
    let link = bpf::attach_tcx(program.fd()?.as_fd(), device, Place::First)?;
    Ok(replace_pin(link.as_fd(), pin)?)
}
