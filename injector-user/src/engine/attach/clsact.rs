//! Attachment as a filter of the clsact qdisc, for kernels before 6.6. A filter is not pinned, so
//! its program is, in the place of a link.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::programs::{
    SchedClassifier, TcAttachType,
    tc::{self, NlOptions, TcAttachOptions, TcError, TcHandle},
};

use super::{
    Position, ProgramSet,
    attachment::{Change, Failure},
    device_pins,
    filters::{self, ALL, Filter},
};
use crate::os::bpf;

const INGRESS: TcAttachType = TcAttachType::Ingress;

/// Where the program's filter belongs.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Where it is.
    Here(Filter),
    /// At this priority and handle, in front of the others of the priority.
    At { priority: u16, handle: u32 },
}

/// Decides the place among the filters of a device, in their order, of which `is_own` are the
/// program's: in front of all, if that is possible and wanted. Of one priority the newest BPF filter
/// runs first, and another classifier's priority cannot be shared.
fn place(filters: &[Filter], set: &ProgramSet, is_own: impl Fn(&Filter) -> bool) -> Place {
    let at = |priority| {
        let first = u32::from(set.handle) << 16 | 1;
        let used = |handle: &u32| filters.iter().any(|filter| filter.handle == *handle);
        let handle = (first..).find(|handle| !used(handle)).unwrap_or(first);
        Place::At { priority, handle }
    };
    if set.position == Position::AfterFirst {
        if let Some(own) = filters.iter().find(|filter| is_own(filter)) {
            return Place::Here(own.clone());
        }
        let free = |priority: &u16| filters.iter().all(|filter| filter.priority != *priority);
        // The first priority is left to the program that is to be in front.
        return at((2..=u16::MAX).find(free).unwrap_or(u16::MAX));
    }
    let own = |priority: u16| filters.iter().find(|filter| is_own(filter) && filter.priority == priority);
    if let Some(first) = filters.first().filter(|first| is_own(first)) {
        return Place::Here(first.clone());
    }
    let others: Vec<_> = filters.iter().filter(|filter| !is_own(filter)).collect();
    let can_share = |other: &&&Filter| other.kind == "bpf" && other.protocol == ALL;
    let lowest = others.iter().map(|other| other.priority).min();
    let free = |priority: &u16| {
        let mut there = others.iter().filter(|other| other.priority == *priority);
        // In front of the first of them.
        there.all(|other| can_share(&other) && lowest == Some(*priority))
    };
    let priority = (1..=u16::MAX).find(free).unwrap_or(u16::MAX);
    let blocked = lowest.is_some_and(|lowest| lowest < priority);
    match own(priority).filter(|_| blocked) {
        Some(own) => Place::Here(own.clone()),
        None => at(priority),
    }
}

/// Has the program run at its position among the filters of the device, as far as that is possible. A filter
/// of an earlier daemon is replaced between two packets. Filters of the programs in `others` belong
/// to another daemon's maps.
pub(in crate::engine) fn ensure(
    program: &mut SchedClassifier,
    device: (u32, &str),
    pin: &Path,
    (set, others): (&ProgramSet, &HashSet<u32>),
    may_move: bool,
) -> Result<Change, Failure> {
    let (index, name) = device;
    let own = program.info()?.id();
    add_qdisc(name)?;
    let runs = |filter: &Filter| filter.bpf.as_ref().is_some_and(|bpf| bpf.program == own);
    let is_own = |filter: &Filter| {
        filter.is_of(set) && filter.bpf.as_ref().is_some_and(|bpf| !others.contains(&bpf.program))
    };
    let present = filters::list(index, INGRESS)?;
    let had = present.iter().find(|filter| is_own(filter));
    let place = match (place(&present, set, is_own), had) {
        (Place::At { .. }, Some(own)) if !may_move => Place::Here(own.clone()),
        (place, _) => place,
    };
    // First, so that an interrupted daemon leaves no filter whose owner cannot be found.
    let pinned = pin_program(program, own, pin)?;
    let change = match place {
        Place::Here(filter) if runs(&filter) => Change::None,
        Place::Here(filter) => {
            // The kernel replaces the program under this handle (cls_bpf_change,
            // net/sched/cls_bpf.c: list_replace_rcu).
            let id = program.attach_to_link(filter.link(name, INGRESS)?)?;
            std::mem::forget(program.take_link(id)?);
            Change::Replaced
        }
        Place::At { priority, handle } => {
            attach(program, name, priority, handle)?;
            if had.is_some() { Change::Moved } else { Change::Attached }
        }
    };
    let present = filters::list(index, INGRESS)?;
    let Some(filter) = present.iter().find(|filter| is_own(filter) && runs(filter)) else {
        return Err(io::Error::other("the filter is missing: the device was renamed, or removed").into());
    };
    for other in present.iter().filter(|other| is_own(other) && *other != filter) {
        other.remove(name, INGRESS)?;
    }
    if let Some(beside) = pinned {
        // A link that is pinned there, whose program ran until now.
        device_pins::detach(pin)?;
        fs::rename(beside, pin)?;
    }
    if set.position == Position::AfterFirst {
        return Ok(change);
    }
    // Programs that are attached by tcx run before all filters.
    let mut tcx = bpf::tcx_programs(index, false).unwrap_or_default().into_iter();
    let tcx = tcx.any(|program| !others.contains(&program.program));
    let in_front = !tcx && present.iter().find(|other| *other == filter || !is_own(other)) == Some(filter);
    Ok(if in_front { change } else { Change::Behind })
}

/// Adds a filter with the program, and returns it.
pub(in crate::engine) fn add(
    program: &mut SchedClassifier,
    device: (u32, &str),
    set: &ProgramSet,
) -> Result<Filter, Failure> {
    let (index, name) = device;
    add_qdisc(name)?;
    let Place::At { priority, handle } = place(&filters::list(index, INGRESS)?, set, |_| false) else {
        return Err("no place for a filter".into());
    };
    attach(program, name, priority, handle)?;
    let mut present = filters::list(index, INGRESS)?.into_iter();
    let filter = present.find(|filter| filter.handle == handle && filter.priority == priority);
    filter.ok_or_else(|| "the filter is missing".into())
}

fn add_qdisc(device: &str) -> Result<(), Failure> {
    match tc::qdisc_add_clsact(device) {
        Ok(()) | Err(TcError::AlreadyAttached) => Ok(()),
        // Also a qdisc of the kind ingress, which serves as well.
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn attach(program: &mut SchedClassifier, device: &str, priority: u16, handle: u32) -> Result<(), Failure> {
    let options = NlOptions { priority, handle: TcHandle::from(handle), ..NlOptions::default() };
    let id = program.attach_with_options(device, INGRESS, TcAttachOptions::Netlink(options))?;
    // The filter stays when the daemon exits.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Pins the program beside the pin of an earlier one, so that a later daemon knows whose the filter
/// is.
fn pin_program(program: &SchedClassifier, own: u32, pin: &Path) -> Result<Option<PathBuf>, Failure> {
    let pinned = bpf::open_pin(pin).and_then(|pinned| bpf::program_info(pinned.as_fd()));
    if pinned.is_ok_and(|pinned| pinned.id == own) {
        return Ok(None);
    }
    Ok(Some(device_pins::pin_beside(program.fd()?.as_fd(), pin)?))
}

/// Removes the filters of the set, but of the programs in `others`; `false` if there are none.
pub(in crate::engine) fn remove(
    index: u32,
    name: &str,
    set: &ProgramSet,
    others: &HashSet<u32>,
) -> Result<bool, Failure> {
    let mut found = filters::list(index, INGRESS)?;
    let is_other = |filter: &Filter| filter.bpf.as_ref().is_some_and(|bpf| others.contains(&bpf.program));
    found.retain(|filter| filter.is_of(set) && !is_other(filter));
    for filter in &found {
        filter.remove(name, INGRESS)?;
    }
    Ok(!found.is_empty())
}

#[cfg(test)]
mod tests {
    use super::{super::filters::BpfFilter, *};
    use crate::engine::inline::SET;

    const OWN: u32 = (SET.handle as u32) << 16 | 1;

    fn filter(priority: u16, kind: &str, handle: u32) -> Filter {
        let bpf = BpfFilter { name: "inline".to_owned(), program: 7 };
        let bpf = (kind == "bpf").then_some(bpf);
        Filter { priority, protocol: ALL, handle, kind: kind.to_owned(), bpf }
    }

    #[test]
    fn the_filter_goes_before_the_others() {
        let at = |priority, handle| Place::At { priority, handle };
        let own = filter(1, "bpf", OWN);
        let lower = filter(5, "bpf", OWN);
        let foreign = |priority| filter(priority, "bpf", 1);
        let u32s = |priority| filter(priority, "u32", 0x8000_0800);
        let ip = Filter { protocol: 8, ..foreign(1) };
        for (filters, expected) in [
            (vec![], at(1, OWN)),
            (vec![own.clone()], Place::Here(own.clone())),
            (vec![own.clone(), foreign(1)], Place::Here(own.clone())),
            (vec![lower.clone(), u32s(9)], Place::Here(lower.clone())),
            (vec![u32s(49152)], at(1, OWN)),
            // A priority of BPF filters can be shared, and others' cannot.
            (vec![foreign(1)], at(1, OWN)),
            (vec![foreign(1), own.clone()], at(1, OWN + 1)),
            (vec![u32s(1)], at(2, OWN)),
            (vec![ip.clone()], at(2, OWN)),
            (vec![u32s(1), foreign(2), u32s(4)], at(3, OWN)),
            (vec![u32s(3), lower.clone()], at(1, OWN + 1)),
            // It stays where it cannot be in front.
            (vec![u32s(1), filter(2, "bpf", OWN)], Place::Here(filter(2, "bpf", OWN))),
            (vec![u32s(1), lower], at(2, OWN + 1)),
        ] {
            let own = |filter: &Filter| filter.is_of(&SET);
            assert_eq!(place(&filters, &SET, own), expected, "{filters:?}");
        }
    }

    #[test]
    fn a_program_that_may_be_behind_leaves_the_first_priority_free() {
        const BEHIND: ProgramSet = ProgramSet {
            programs: ["guard", "guard_raw"],
            position: Position::AfterFirst,
            handle: 7,
            log: |_| {},
        };
        let own = Filter {
            bpf: Some(BpfFilter { name: "guard".to_owned(), program: 8 }),
            ..filter(2, "bpf", 7 << 16 | 1)
        };
        let at = |priority| Place::At { priority, handle: 7 << 16 | 1 };
        for (filters, expected) in [
            (vec![], at(2)),
            (vec![filter(1, "bpf", OWN)], at(2)),
            (vec![filter(2, "u32", 1), filter(3, "bpf", 1)], at(4)),
            // It does not move.
            (vec![filter(1, "u32", 1), own.clone()], Place::Here(own.clone())),
        ] {
            assert_eq!(place(&filters, &BEHIND, |filter| filter.is_of(&BEHIND)), expected, "{filters:?}");
        }
        // Nor does it keep another one from being in front.
        let first = place(&[own], &SET, |filter| filter.is_of(&SET));
        assert_eq!(first, Place::At { priority: 1, handle: OWN });
    }
}
