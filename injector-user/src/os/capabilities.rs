//! Capabilities of the process, dropped as soon as they are no longer needed.
//!
//! Capabilities belong to threads, so this runs before the runtime starts any.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};

/// Makes sure that no program that this thread executes, or any that it starts, gets more privileges
/// than it has: not by a set-user-ID file, and not because user 0 gets all capabilities back
/// (execve(2); cap_bprm_creds_from_file, security/commoncap.c).
///
/// # Errors
/// As prctl(2), `PR_SET_NO_NEW_PRIVS`.
pub fn set_no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Drops all capabilities except `keep`, for this thread and all that it starts. Returns the rest.
/// Empties the bounding set where the thread may (`CAP_SETPCAP`).
///
/// # Errors
/// As capset(2) and prctl(2).
pub fn drop_all_except(keep: &[Capability]) -> Result<Vec<Capability>, caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
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

    /// The line of `/proc/self/status` in a program that the thread executes.
    fn executed(line: &str) -> String {
        let output = std::process::Command::new("grep").args([line, "/proc/self/status"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim_start_matches(line).trim().to_owned()
    }

    #[test]
    fn an_executed_program_gets_no_capability_back() {
        let root = rustix::process::geteuid().is_root();
        let restricted = |no_new_privs: bool| {
            let run = move || {
                if no_new_privs {
                    set_no_new_privs().unwrap();
                }
                drop_all_except(&[]).unwrap();
                (executed("CapPrm:"), executed("CapBnd:"))
            };
            std::thread::spawn(run).join().unwrap()
        };
        let none = "0".repeat(16);
        for no_new_privs in [true, false] {
            let (permitted, bounding) = restricted(no_new_privs);
            assert_eq!(permitted, none);
            assert!(!root || bounding == none, "{bounding}");
        }
        // `no_new_privs` alone is enough.
        let permitted = std::thread::spawn(|| {
            set_no_new_privs().unwrap();
            caps::clear(None, CapSet::Effective).unwrap();
            caps::clear(None, CapSet::Permitted).unwrap();
            executed("CapPrm:")
        });
        assert_eq!(permitted.join().unwrap(), none);
    }
}
