//! OpenSMTPD. It logs `smtp connected address=CLIENT`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::overlay::{self, User};
use super::{OUTPUT, Receiver, directory, write};
use crate::certificate::Certificate;
use crate::message::DOMAIN;
use crate::netns::Netns;

/// The Debian package, and its program.
const PACKAGE: &str = "opensmtpd";

/// Its own, and one who gets mail.
const USERS: [User; 3] = [
    User { name: "opensmtpd", id: 64991 },
    User { name: "opensmtpq", id: 64992 },
    User { name: "user", id: 64993 },
];

/// Starts it with these listeners, for example those of `docs/receivers.md`, which listen on `ports`.
/// Listeners may use the certificate, as `pki mail`. It accepts mail for `user` in [`DOMAIN`].
///
/// # Errors
/// When the package was not unpacked, or it rejects the listeners.
pub fn start(
    netns: &Netns,
    certificate: &Certificate,
    listeners: &str,
    ports: &[u16],
) -> anyhow::Result<Receiver> {
    let dir = directory("opensmtpd")?;
    let var = dir.path().join("var");
    for (path, mode) in [("spool/smtpd", 0o711), ("lib/opensmtpd/empty", 0o755), ("run", 0o755)] {
        let path = var.join(path);
        fs::create_dir_all(&path)?;
        // It insists on these modes.
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
    }
    let conf = format!(
        "pki mail cert \"{chain}\"
pki mail key \"{key}\"
{listeners}
action \"store\" maildir \"{dir}/mail\"
match from any for domain \"{DOMAIN}\" action \"store\"
",
        chain = certificate.chain.display(),
        key = certificate.key.display(),
        dir = dir.path().display(),
    );
    let conf = write(dir.path(), "smtpd.conf", &conf)?;
    let mut command = overlay::command(netns, PACKAGE, dir.path(), &USERS, "sh")?;
    // The paths of its spool, chroot and control socket are compiled in.
    command.args(["-c", "mount --bind \"$0\" /var && exec smtpd -dv -f \"$1\""]).arg(var).arg(conf);
    Receiver::start("opensmtpd", netns, dir, command, OUTPUT, ports)
}
