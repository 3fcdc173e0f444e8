//! Where the guard's programs are attached, for `injector status`.

use std::path::PathBuf;

/// Where the guard's programs run, and what of theirs is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardAttachment {
    /// The devices that are to have them, and those of `guard.devices` that cannot.
    pub devices: Vec<GuardedDevice>,
    /// Pins of maps that were removed while the daemon runs.
    pub missing_pins: Vec<PathBuf>,
}

/// A device on which packets of banned sources are to be dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardedDevice {
    /// Its name.
    pub name: String,
    /// How the program is attached to its ingress (`tcx`, `clsact`), or why it is not.
    pub ingress: Result<&'static str, String>,
    /// In which XDP mode the program is attached to its driver (`native`, `generic`), or why it is not;
    /// `None` if `guard.xdp` does not ask for it.
    pub driver: Option<Result<&'static str, String>>,
}
