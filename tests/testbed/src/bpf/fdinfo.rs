//! What `/proc` says of the BPF objects of a process.

use std::collections::BTreeMap;
use std::fs;

/// The BPF objects that a process has open, by the id in this field of their description in
/// `/proc/PID/fdinfo`.
pub(super) fn descriptors_with(pid: u32, id: &str) -> anyhow::Result<BTreeMap<u32, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may have been closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        if let Some(id) = field(&info, id) {
            found.insert(u32::try_from(id)?, info);
        }
    }
    Ok(found)
}

/// The number in a line `NAME: NUMBER`.
pub(super) fn field(info: &str, name: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().parse().ok()
}
