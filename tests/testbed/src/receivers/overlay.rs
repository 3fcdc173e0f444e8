//! Servers whose packages cannot be installed beside Postfix: `cargo xtask setup` unpacks them into
//! the tool cache, and here they are laid over `/usr`, in the server's own mount namespace.

use std::path::Path;
use std::process::Command;

use anyhow::ensure;

use super::write;
use crate::netns::Netns;
use crate::tools;

/// A system user of the server, whose group has the same name and number.
#[derive(Clone, Copy, Debug)]
pub(super) struct User {
    pub(super) name: &'static str,
    pub(super) id: u32,
}

/// `ip netns exec` has made a mount namespace that passes nothing on to this machine's.
const LAY_OVER: &str = r#"
set -eu
tree=$1 files=$2
shift 2
mount -t overlay overlay -o "lowerdir=$tree/usr:/usr" /usr
for file in passwd group hosts resolv.conf; do
    mount --bind "$files/$file" "/etc/$file"
done
exec "$@"
"#;

/// A command that runs `program` of a package in the namespace. Its users exist; of hosts it knows
/// only its own; no name server answers it.
///
/// # Errors
/// When the package was not unpacked, or the files in `dir` cannot be written.
pub(super) fn command(
    netns: &Netns,
    package: &str,
    dir: &Path,
    users: &[User],
    program: &str,
) -> anyhow::Result<Command> {
    let tree = tools::folder()?.join(tools::receiver(package));
    ensure!(tree.is_dir(), "{package} is missing: run `cargo xtask setup --only mail`");
    let mut passwd = "root:x:0:0:root:/root:/bin/sh\n".to_owned();
    let mut group = "root:x:0:\nmail:x:8:\n".to_owned();
    for User { name, id } in users {
        passwd.push_str(&format!("{name}:x:{id}:{id}::{}:/bin/false\n", dir.display()));
        group.push_str(&format!("{name}:x:{id}:\n"));
    }
    write(dir, "passwd", &passwd)?;
    write(dir, "group", &group)?;
    write(dir, "hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
    // Nothing listens there: the kernel answers at once.
    write(dir, "resolv.conf", "nameserver 127.0.0.1\n")?;
    let mut command = netns.command("sh");
    command.args(["-c", LAY_OVER, "lay-over"]).arg(tree).arg(dir).arg(program);
    Ok(command)
}
