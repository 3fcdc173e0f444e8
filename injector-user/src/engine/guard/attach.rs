//! The guard's programs among those that are attached to devices.

use crate::{
    engine::attach::{Notice, Position, ProgramSet},
    telemetry::log::target,
};

/// The programs.
pub(super) static SET: ProgramSet = ProgramSet {
    programs: ["guard", "guard_raw"],
    // Engine inline has to be in front, and asks about bans itself.
    position: Position::AfterFirst,
    handle: u16::from_be_bytes(*b"GU"),
    log,
};

fn log(notice: &Notice<'_>) {
    match *notice {
        Notice::Attached { device, way } | Notice::Moved { device, way } | Notice::Behind { device, way } => {
            tracing::info!(target: target::GUARD, device, way, "program attached: it drops packets of banned sources");
        }
        Notice::Reattached { device, way } => {
            tracing::warn!(target: target::GUARD, device, way, "another program had detached the guard from the device; it is attached again");
        }
        Notice::Failed { device, error } => {
            tracing::error!(target: target::GUARD, device, error, "the program could not be attached; banned sources reach the listeners by this device, which reset their connections");
        }
        Notice::CannotFollow { error } => {
            tracing::error!(target: target::GUARD, error, "the devices cannot be followed; it is tried again every few seconds");
        }
        Notice::Removed { device, index } => {
            tracing::info!(target: target::GUARD, device, index, "program removed: the device is gone, belongs to a bridge, or is not in guard.devices");
        }
        Notice::Unusable { device, reason } => {
            tracing::warn!(target: target::GUARD, device, reason, "a device of guard.devices cannot be used; banned sources reach the listeners by it, which reset their connections");
        }
    }
}
