//! Capabilities of the process, dropped as soon as they are no longer needed.
//!
//! Capabilities belong to threads, so this runs before the runtime starts any.

use caps::{CapSet, Capability, CapsHashSet};

/// Drops all capabilities except `keep`, for this thread and all that it starts. Returns the rest.
///
/// # Errors
/// As capset(2).
pub fn drop_all_except(keep: &[Capability]) -> Result<Vec<Capability>, caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = permitted.into_iter().filter(|capability| keep.contains(capability)).collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    Ok(kept.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_other_capabilities_are_dropped() {
        // On a thread of its own, because other tests need theirs.
        let left = std::thread::spawn(|| {
            drop_all_except(&[]).unwrap();
            caps::read(None, CapSet::Permitted).unwrap()
        });
        assert!(left.join().unwrap().is_empty());
    }
}
