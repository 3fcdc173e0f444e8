//! Programs that unit tests write and then run.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

/// Writes an executable script, through a child process. If this process had the file open for
/// writing, a child that another test starts at that moment would inherit the descriptor, and
/// running the script would fail with ETXTBSY until that child calls execve(2).
pub(crate) fn write(path: &Path, text: &str) {
    let mut install = Command::new("install");
    install.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped());
    let mut child = install.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}
