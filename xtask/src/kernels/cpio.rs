//! The archive that the kernel unpacks as its first file system: cpio in the form `newc`
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive in memory.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

impl Archive {
    pub(super) fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER, &[]);
    }

    pub(super) fn file(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, PROGRAM, contents);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entries += 1;
        let (inode, links, name) = (self.entries, 1, path.len() + 1);
        // The fields: inode, mode, user, group, links, time, size, device and special device (two
        // numbers each), length of the name, checksum.
        let numbers = [inode, mode, 0, 0, links, 0, length(contents.len()), 0, 0, 0, 0, length(name), 0];
        self.bytes.extend(b"070701");
        for number in numbers {
            self.bytes.extend(format!("{number:08x}").into_bytes());
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(contents);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A length as the format has it; none of ours comes near its limit of 4 GiB.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("bin/sh", b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701000000010000"), "{:?}", String::from_utf8_lossy(&bytes));
        // The header has 110 bytes, the name and its end 4.
        assert_eq!(&bytes[110..114], b"bin\0");
        assert_eq!(&bytes[116..122], b"070701");
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
    }

    #[test]
    fn cpio_reads_it_where_it_is_installed() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("bin/sh", b"12345");
        let mut list = Command::new("cpio");
        let Ok(mut cpio) = list.arg("-it").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            return;
        };
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        assert_eq!(cpio.wait_with_output().unwrap().stdout, b"bin\nbin/sh\n");
    }
}
