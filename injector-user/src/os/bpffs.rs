//! BPF file systems.

use std::{fs, path::PathBuf};

/// The mount points of those that this process sees.
#[must_use]
pub fn mounts() -> Vec<PathBuf> {
    parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// The mount points of BPF file systems, of /proc/self/mountinfo.
fn parse(mountinfo: &str) -> Vec<PathBuf> {
    let mount = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        file_system.starts_with("bpf ").then(|| PathBuf::from(unescape(point)))
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// Blanks are written as `\040` (mangle, fs/seq_file.c).
fn unescape(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (code, character)| path.replace(code, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bpf_file_systems_are_found_among_the_mounts() {
        let mounts = "\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 24 0:26 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700
40 24 0:40 /injector /run/my\\040pins rw - bpf bpf rw
41 24 0:41 / /bpf rw - tmpfs bpf rw
";
        assert_eq!(parse(mounts), [PathBuf::from("/sys/fs/bpf"), PathBuf::from("/run/my pins")]);
    }
}
