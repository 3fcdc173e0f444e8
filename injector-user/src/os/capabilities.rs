//! What the daemon may do, given up as soon as it is not needed any more.
//!
//! Capabilities belong to threads: this runs before the runtime starts any.

use caps::{CapSet, Capability, CapsHashSet};

/// Gives up every capability but those in `keep`, for this thread and all that it starts. Returns what is left.
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
    fn nothing_is_left_but_what_is_kept() {
        // On a thread of its own: the other tests keep theirs.
        let left = std::thread::spawn(|| {
            drop_all_except(&[]).unwrap();
            caps::read(None, CapSet::Permitted).unwrap()
        });
        assert!(left.join().unwrap().is_empty());
    }
}
