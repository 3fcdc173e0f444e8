//! Resource limits of the process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit of open descriptors after raising it as far as the hard limit allows. When the
/// kernel refuses to raise it, the present limit is returned.
#[must_use]
pub fn raise_nofile() -> u64 {
    let before = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: before.maximum, ..before };
    let limit = if setrlimit(Resource::Nofile, wanted).is_ok() { wanted } else { before };
    // `None` means no limit.
    limit.current.unwrap_or(u64::MAX)
}
