//! Programs that unit tests write and then run.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

/// Writes an executable script. A child does it: a descriptor of this process that is open for writing would be inherited by what
/// other tests start at that moment, and until these call execve(2) the script is a busy text file (ETXTBSY).
pub(crate) fn write(path: &Path, text: &str) {
    let mut install = Command::new("install");
    install.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped());
    let mut child = install.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}
