//! `injector ban`, `unban` and `bans`.

use std::{env, net::IpAddr};

use anyhow::bail;

use super::{
    args::{BanArgs, BansArgs, UnbanArgs},
    control::send,
};
use crate::control::Request;

/// What sshd sets: the client's address first (sshd(8), environment).
const SSH_VARIABLES: [&str; 2] = ["SSH_CONNECTION", "SSH_CLIENT"];

/// Bans an address or a network.
///
/// # Errors
/// When the operator is logged in from there, or the daemon does not answer or rejects the command.
pub fn ban(args: BanArgs) -> anyhow::Result<()> {
    let BanArgs { control, network, duration, reason, force } = args;
    let sessions = SSH_VARIABLES.iter().filter_map(|name| env::var(name).ok());
    if let (Some(own), false) =
        (sessions.filter_map(|it| client_of(&it)).find(|own| network.contains(*own)), force)
    {
        bail!("{network} contains {own}, from which you are logged in: if that is meant, add --force");
    }
    let duration_ms = duration.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let network = network.to_string();
    send(&control, &Request::Ban { network, duration_ms, reason, force }).map(drop)
}

/// Lifts a ban.
///
/// # Errors
/// When the daemon does not answer.
pub fn unban(args: &UnbanArgs) -> anyhow::Result<()> {
    send(&args.control, &Request::Unban { network: args.network.to_string() }).map(drop)
}

/// Prints the bans.
///
/// # Errors
/// When the daemon does not answer.
pub fn bans(args: &BansArgs) -> anyhow::Result<()> {
    send(&args.control, &Request::Bans { origin: args.origin, limit: Some(args.limit) }).map(drop)
}

/// The client's address in one of [`SSH_VARIABLES`], whose fields spaces separate.
fn client_of(session: &str) -> Option<IpAddr> {
    let address = session.split(' ').next()?;
    // A link-local client has its zone in it.
    let address = address.split('%').next()?;
    address.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Network;

    #[test]
    fn the_operator_is_found_in_what_sshd_sets() {
        let in_network = |session: &str, network: &str| {
            client_of(session).is_some_and(|own| network.parse::<Network>().unwrap().contains(own))
        };
        assert!(in_network("192.0.2.7 50022 192.0.2.1 22", "192.0.2.0/24"));
        assert!(in_network("::ffff:192.0.2.7 50022 22", "192.0.2.7"));
        assert!(in_network("fe80::1%eth0 50022 22", "fe80::/64"));
        assert!(!in_network("192.0.2.7 50022 22", "192.0.2.8"));
        assert!(!in_network("", "0.0.0.0/0"));
    }
}
