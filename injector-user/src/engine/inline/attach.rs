//! The engine's programs among those that are attached to devices.
//!
//! Where they are missing, packets go to the host's own sockets: splice or relay serves new connections,
//! and inline's own break.

use crate::{
    engine::attach::{Notice, Position, ProgramSet},
    telemetry::log::target,
};

/// The programs.
pub static SET: ProgramSet = ProgramSet {
    programs: ["inline", "inline_raw"],
    position: Position::First,
    handle: u16::from_be_bytes(*b"IN"),
    log,
};

fn log(notice: &Notice<'_>) {
    match *notice {
        Notice::Attached { device, way } => {
            tracing::info!(target: target::ENGINE_INLINE, device, way, "program attached");
        }
        Notice::Reattached { device, way } => {
            tracing::warn!(target: target::ENGINE_INLINE, device, way, "another program had detached inline from the device; it is attached again, and connections through it may have broken");
        }
        Notice::Moved { device, way } => {
            tracing::warn!(target: target::ENGINE_INLINE, device, way, "another program ran before inline and could have taken its packets; inline runs before it again");
        }
        Notice::Behind { device, way } => {
            tracing::warn!(target: target::ENGINE_INLINE, device, way, "another program runs before inline on this device; packets that it accepts or drops never reach inline, and inline connections through it break. Give that program a lower precedence");
        }
        Notice::Failed { device, error } => {
            tracing::error!(target: target::ENGINE_INLINE, device, error, "the program could not be attached; packets of this device go to the host's own sockets, and inline connections through it break");
        }
        Notice::CannotFollow { error } => {
            tracing::error!(target: target::ENGINE_INLINE, error, "the devices cannot be followed; it is tried again every few seconds");
        }
        Notice::Removed { device, index } => {
            tracing::info!(target: target::ENGINE_INLINE, device, index, "program removed: the device is gone, belongs to a bridge, or is not in inline.devices");
        }
        Notice::Unusable { device, reason } => {
            tracing::warn!(target: target::ENGINE_INLINE, device, reason, "a device of inline.devices cannot be used; connections through it are served without inline");
        }
    }
}
