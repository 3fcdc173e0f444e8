//! The injector's engines with and without the guard.

use super::System;
use super::injector::{DENY_FILE, Engine, PIN, engine};
use crate::attacker;

/// The engines that are compared.
const ENGINES: [&str; 3] = ["relay", "splice", "inline"];

/// Bans of others in the systems called `…+guard-100k`.
const MANY: u32 = 100_000;

/// More than any source of the testbed has, so that limits are looked up and never reached.
const UNREACHED: Variant = Variant::Limits { connections: 1_000_000, rate: 1_000_000 };

/// Twice what the good client of a flood needs.
const CLOSE: Variant = Variant::Limits { connections: 100, rate: 200 };

/// A way to configure the guard.
#[derive(Clone, Copy, Debug)]
enum Variant {
    /// Not at all, like its baseline: how far a measurement of equals is from zero.
    Off,
    /// Without limits and bans.
    On,
    /// With bans of others.
    ManyBans,
    /// With limits on each source: open connections, and new ones per second.
    Limits { connections: u32, rate: u32 },
    /// With the attacker's networks banned, and `guard.xdp` of this value.
    Banned { xdp: &'static str },
}

impl Variant {
    /// What follows the engine's name.
    fn suffix(self) -> String {
        match self {
            Self::Off => "nothing".to_owned(),
            Self::On => "guard".to_owned(),
            Self::ManyBans => "guard-100k".to_owned(),
            Self::Limits { .. } => "guard-limits".to_owned(),
            Self::Banned { xdp: "off" } => "ban-tc".to_owned(),
            Self::Banned { xdp } => format!("ban-xdp-{xdp}"),
        }
    }

    fn about(self) -> String {
        match self {
            Self::Off => "without the guard, like what it is compared with".to_owned(),
            Self::On => "with the guard, without bans and limits".to_owned(),
            Self::ManyBans => format!("with the guard and {MANY} bans of others"),
            Self::Limits { connections, rate } => {
                format!(
                    "with the guard and limits on each source: {connections} connections, {rate} new ones per second"
                )
            }
            Self::Banned { xdp: "off" } => {
                "with the attacker's networks banned, at the device's ingress".to_owned()
            }
            Self::Banned { xdp } => {
                format!("with the attacker's networks banned, by XDP ({xdp}) and at the device's ingress")
            }
        }
    }

    /// The tables of the configuration.
    fn table(self) -> String {
        let own = match self {
            Self::Off => return String::new(),
            Self::On => String::new(),
            Self::ManyBans => format!("deny_files = [\"{DENY_FILE}\"]\n"),
            Self::Limits { connections, rate } => format!(
                "max_connections_per_source = {connections}\nmax_rate_per_source = {rate}\n\
                 burst_per_source = {rate}\n"
            ),
            Self::Banned { .. } => format!("deny = {:?}\n", attacker::networks()),
        };
        let xdp = if let Self::Banned { xdp } = self { xdp } else { "off" };
        format!("[guard]\npin = \"{PIN}/guard\"\nxdp = \"{xdp}\"\n{own}\n")
    }

    /// Engine inline asks the same lists itself, before the program at the ingress.
    fn bans_attacker_at(self, engine: &str) -> Option<&'static str> {
        match self {
            Self::Banned { xdp: "off" } if engine == "inline" => Some("inline"),
            Self::Banned { xdp: "off" } => Some("tc"),
            Self::Banned { .. } => Some("xdp"),
            Self::Off | Self::On | Self::ManyBans | Self::Limits { .. } => None,
        }
    }

    /// An engine with this guard.
    fn with(self, name: &str) -> Engine {
        let plain = engine(name);
        Engine {
            name: format!("{name}+{}", self.suffix()),
            about: format!("{name} {}", self.about()),
            tables: format!("{}{}", plain.tables, self.table()),
            bans: self.bans(),
            bans_attacker_at: self.bans_attacker_at(name),
            ..plain
        }
    }

    const fn bans(self) -> u32 {
        if let Self::ManyBans = self { MANY } else { 0 }
    }
}

/// Each engine with the guard, for what it costs clean traffic, and as it is, for comparison.
pub(super) fn clean() -> Vec<System> {
    let of_engine = |name| {
        [Variant::Off, Variant::On, Variant::ManyBans, UNREACHED].map(|variant| {
            let baseline = Some(Box::new(engine(name).system()));
            System { baseline, ..variant.with(name).system() }
        })
    };
    ENGINES.into_iter().flat_map(of_engine).collect()
}

/// Each engine without the guard and with all that may help against a flood.
pub(super) fn flooded() -> Vec<System> {
    let banned = ["off", "generic", "native"].map(|xdp| Variant::Banned { xdp });
    let of_engine = |name| {
        let variants = std::iter::once(CLOSE).chain(banned).map(move |variant| variant.with(name));
        std::iter::once(engine(name)).chain(variants).map(Engine::system)
    };
    ENGINES.into_iter().flat_map(of_engine).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_compared_with_its_engine() {
        let names: Vec<_> = clean().into_iter().map(|system| system.name).collect();
        assert_eq!(names[..4], ["relay+nothing", "relay+guard", "relay+guard-100k", "relay+guard-limits"]);
        assert_eq!(names.len(), 12);
        for system in clean() {
            let (engine, _) = system.name.split_once('+').unwrap();
            let baseline = system.baseline.unwrap();
            assert_eq!(baseline.name, engine);
            assert!(!baseline.config.contains("[guard]"));
            assert_eq!(system.config == baseline.config, system.name.ends_with("+nothing"));
        }
    }

    #[test]
    fn only_variants_have_a_guard_and_each_has_its_own() {
        for mut systems in [clean(), flooded()] {
            systems.retain(|system| !system.name.ends_with("+nothing"));
            let mut configs: Vec<_> = systems.iter().map(|system| system.config.clone()).collect();
            for system in &systems {
                let config: toml::Table = system.config.parse().unwrap();
                assert_eq!(config.contains_key("guard"), system.name.contains('+'), "{}", system.name);
            }
            configs.sort();
            configs.dedup();
            assert_eq!(configs.len(), systems.len());
        }
        let banned = flooded().into_iter().find(|system| system.name == "inline+ban-xdp-native").unwrap();
        assert!(banned.config.contains("deny = [\"198.18.0.0/16\", \"198.19.0.0/16\"]"), "{}", banned.config);
        assert!(banned.config.contains("xdp = \"native\""), "{}", banned.config);
        let hooks: Vec<_> = flooded().into_iter().filter_map(|system| system.bans_attacker_at).collect();
        assert_eq!(hooks, ["tc", "xdp", "xdp", "tc", "xdp", "xdp", "inline", "xdp", "xdp"]);
    }
}
