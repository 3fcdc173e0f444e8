//! HAProxy as a receiver (`accept-proxy`), in front of a mail server's standard ports on the same
//! host. It logs `[CLIENT]:PORT` of every finished connection.

use super::{OUTPUT, Receiver, directory, write};
use crate::netns::Netns;

/// Starts it with these sections, which listen on `ports`.
///
/// # Errors
/// When HAProxy is not installed or rejects the sections.
pub fn start(netns: &Netns, sections: &str, ports: &[u16]) -> anyhow::Result<Receiver> {
    let dir = directory("haproxy")?;
    let conf = format!(
        "global
    log stdout format raw local0
    maxconn 200
defaults
    mode tcp
    log global
    log-format \"client [%ci]:%cp\"
    timeout connect 5s
    timeout client 30s
    timeout server 30s
{sections}"
    );
    let conf = write(dir.path(), "haproxy.cfg", &conf)?;
    let mut command = netns.command("haproxy");
    command.arg("-db").arg("-f").arg(conf);
    Receiver::start("haproxy", netns, dir, command, OUTPUT, ports)
}
