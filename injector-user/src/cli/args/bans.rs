//! The arguments of `injector ban`, `unban` and `bans`.

use std::time::Duration;

use clap::Args;

use super::ControlArgs;
use crate::{config::Network, control::wire::BanOrigin, guard::MAX_BAN};

pub(super) const EXAMPLES: &str = "\
Examples:
  Ban an address for an hour, with the reason that `injector bans` lists
    $ injector ban 198.51.100.7 --for 1h --reason \"password guessing\"

  Ban a network until it is lifted
    $ injector ban 2001:db8:bad::/48
    $ injector unban 2001:db8:bad::/48";

/// Arguments of `injector ban`.
#[derive(Clone, Debug, Args)]
pub struct BanArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// An address, or a network such as 198.51.100.0/24 or 2001:db8::/64
    #[arg(value_name = "ADDRESS|NETWORK")]
    pub network: Network,

    /// How long, such as 1h or \"30days\", up to ten years [default: without end]
    #[arg(long = "for", env = "INJECTOR_FOR", value_name = "DURATION", value_parser = parse_ban)]
    pub duration: Option<Duration>,

    /// Why, in a few words
    #[arg(long, env = "INJECTOR_REASON", value_name = "TEXT")]
    pub reason: Option<String>,

    /// Also a network larger than /16 (IPv6: /19), or one with the address that you are logged in from
    #[arg(long, env = "INJECTOR_FORCE")]
    pub force: bool,
}

/// Arguments of `injector unban`.
#[derive(Clone, Debug, Args)]
pub struct UnbanArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// The address or network, as it was banned
    #[arg(value_name = "ADDRESS|NETWORK")]
    pub network: Network,
}

/// Arguments of `injector bans`.
#[derive(Clone, Debug, Args)]
pub struct BansArgs {
    /// The control socket, and the format of the reply
    #[command(flatten)]
    pub control: ControlArgs,

    /// Only those that this origin wants
    #[arg(long, env = "INJECTOR_ORIGIN", value_name = "ORIGIN")]
    pub origin: Option<BanOrigin>,

    /// Limit to the first N
    #[arg(long, env = "INJECTOR_LIMIT", value_name = "N", default_value_t = 1000)]
    pub limit: usize,
}

fn parse_ban(text: &str) -> Result<Duration, &'static str> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration.is_zero() => Err("must be longer than 0"),
        Ok(duration) if duration > MAX_BAN => {
            Err("must be at most ten years; without --for a ban has no end")
        }
        Ok(duration) => Ok(duration),
        Err(_) => Err("must be a duration such as 1h, \"1day 12h\" or 600s"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::args::{Cli, Command};

    #[test]
    fn a_ban_lasts_from_seconds_to_years() {
        let parse = |time: &str| {
            let words = ["injector", "ban", "192.0.2.7", "--for", time];
            match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
                Command::Ban(args) => Ok(args.duration.unwrap()),
                _ => Err("another command".to_owned()),
            }
        };
        assert_eq!(parse("600s"), Ok(Duration::from_secs(600)));
        assert_eq!(parse("2years"), Ok(humantime::parse_duration("2years").unwrap()));
        for (time, advice) in [("0s", "longer than 0"), ("11years", "at most ten years"), ("600", "600s")] {
            assert!(parse(time).unwrap_err().contains(advice), "{time}");
        }
    }

    #[test]
    fn what_is_not_a_network_is_refused_with_advice() {
        for (text, advice) in [
            ("192.0.2.7/24", "write \"192.0.2.0/24\""),
            ("::ffff:192.0.2.7", "write \"192.0.2.7\""),
            ("fe80::1%eth0", "write \"fe80::1\""),
            ("mail.example.org", "must be a network"),
            ("192.0.2.7:25", "must be a network"),
        ] {
            let error = Cli::try_parse_from(["injector", "ban", text]).unwrap_err().to_string();
            assert!(error.contains(advice), "{text}: {error}");
        }
    }
}
