//! `injector run`: flags and environment variables override the file.

use super::args::RunArgs;
use crate::config::{Config, HealthEndpoint, Metrics};

/// Replaces values of the file by those of the command line and the environment.
pub(super) fn apply(config: &mut Config, args: &RunArgs) {
    if let Some(format) = args.log_format {
        config.log.format = format;
    }
    if let Some(level) = args.log_level {
        config.log.level = level;
    }
    if let Some(listen) = args.metrics_listen {
        config.metrics = Some(Metrics { listen });
    }
    if let Some(listen) = args.health_listen {
        config.health = Some(HealthEndpoint { listen });
    }
    if let Some(limit) = args.max_connections {
        config.limits.max_connections = limit;
    }
    if let Some(deadline) = args.stop_deadline {
        config.stop.deadline = deadline;
    }
    if let Some(engine) = args.engine {
        config.listeners.iter_mut().for_each(|listener| listener.engine = engine);
    }
    // An empty variable is an unset one: a manifest may have no value for it.
    for (value, setting) in
        [(&args.node, &mut config.kubernetes.node), (&args.zone, &mut config.kubernetes.zone)]
    {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            *setting = Some(value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser as _;

    use super::*;
    use crate::{
        cli::args::{Cli, Command},
        config::{EXAMPLE, EngineChoice, LogFormat, LogLevel},
    };

    fn run_args(extra: &[&str]) -> RunArgs {
        let words = ["injector", "run", "--config", "f"].iter().chain(extra);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_override_the_file_and_change_nothing_else() {
        let file = Config::parse(EXAMPLE, "f").unwrap();
        let mut same = file.clone();
        apply(&mut same, &run_args(&[]));
        assert_eq!(same, file);

        type Change = fn(&mut Config);
        let cases: [(&[&str], Change); 10] = [
            (&["--log-format", "json"], |c| c.log.format = LogFormat::Json),
            (&["--log-level", "trace"], |c| c.log.level = LogLevel::Trace),
            (&["--metrics-listen", "[::1]:1"], |c| {
                c.metrics = Some(Metrics { listen: "[::1]:1".parse().unwrap() });
            }),
            (&["--health-listen", "[::1]:2"], |c| {
                c.health = Some(HealthEndpoint { listen: "[::1]:2".parse().unwrap() });
            }),
            (&["--max-connections", "7"], |c| c.limits.max_connections = 7),
            (&["--stop-deadline", "0s"], |c| c.stop.deadline = Duration::ZERO),
            (&["--engine", "relay"], |c| c.listeners[0].engine = EngineChoice::Relay),
            (&["--node", "edge-1"], |c| c.kubernetes.node = Some("edge-1".to_owned())),
            (&["--zone", "west"], |c| c.kubernetes.zone = Some("west".to_owned())),
            (&["--zone", ""], |_| ()),
        ];
        for (flags, change) in cases {
            let (mut expected, mut got) = (file.clone(), file.clone());
            change(&mut expected);
            apply(&mut got, &run_args(flags));
            assert_eq!(got, expected, "{flags:?}");
        }
    }
}
