//! Settings of a running server that only a restart changes.

use crate::config::{Admin, Config, Guard, HealthEndpoint, Inline, Kubernetes, LogFormat, Metrics, Splice};

/// The parts of the configuration that take effect only at startup.
#[derive(Clone, Debug)]
pub struct StartupSettings {
    /// Where metrics and health are served.
    pub metrics: Option<Metrics>,
    /// Where health alone is served.
    pub health: Option<HealthEndpoint>,
    /// Where the control socket is.
    pub admin: Option<Admin>,
    /// How many worker threads there are.
    pub workers: usize,
    /// How the splice engine uses the kernel.
    pub splice: Splice,
    /// How the inline engine uses the host.
    pub inline: Inline,
    /// How Services of Kubernetes are followed.
    pub kubernetes: Kubernetes,
    /// The guard; its lists and limits are not part of what only a restart changes.
    pub guard: Option<Guard>,
    /// The format of log lines.
    pub log_format: LogFormat,
}

impl StartupSettings {
    /// The sections of `config` that differ and need a restart.
    pub(super) fn changed_sections(&self, config: &Config) -> Vec<&'static str> {
        let guard = (self.guard.as_ref(), config.guard.as_ref());
        let guard_differs = |differs: fn(&Guard, &Guard) -> bool| matches!(guard, (Some(before), Some(after)) if differs(before, after));
        let sections = [
            ("metrics", config.metrics != self.metrics),
            ("health", config.health != self.health),
            ("admin", config.admin != self.admin),
            ("limits.workers", config.limits.workers != self.workers),
            ("splice", config.splice != self.splice),
            ("inline", config.inline != self.inline),
            ("kubernetes", config.kubernetes != self.kubernetes),
            ("guard", guard.0.is_some() != guard.1.is_some()),
            ("guard.max_bans", guard_differs(|before, after| before.max_bans != after.max_bans)),
            ("guard.devices", guard_differs(|before, after| before.devices != after.devices)),
            ("guard.xdp", guard_differs(|before, after| before.xdp != after.xdp)),
            ("guard.state", guard_differs(|before, after| before.state != after.state)),
            ("guard.pin", guard_differs(|before, after| before.pin != after.pin)),
            ("log.format", config.log.format != self.log_format),
        ];
        sections.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
    }
}
