//! Starts the guard's programs, and follows the devices.

use std::{
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use aya::Ebpf;
use tokio::{sync::watch, time::MissedTickBehavior};

use super::{
    attach::SET,
    detach::{self, DetachError},
    maps::{self, Maps},
    pins::{self, PinError, Pins},
    programs,
    xdp::{Drivers, mode_name},
};
use crate::{
    config::{Attachment, Guard as Settings},
    engine::{
        attach::{Attached, CHECK_INTERVAL, routes::Changes},
        bans::BanMaps,
        guarded_device::{GuardAttachment, GuardedDevice},
    },
    telemetry::log::target,
};

/// The guard's programs with their maps.
pub struct Guard {
    maps: Arc<Maps>,
    programs: Ebpf,
    attached: Attached,
    drivers: Drivers,
    attachment: watch::Sender<GuardAttachment>,
    pin: PathBuf,
    pins: Pins,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("maps", &self.maps).field("pins", &self.pins).finish_non_exhaustive()
    }
}

/// Loads the programs, with the maps of an earlier daemon if there are any: its bans hold meanwhile.
/// Without `settings`, removes what an earlier daemon left.
///
/// # Errors
/// When another daemon uses them. Where they cannot be loaded, that is logged, and there are none: then
/// listeners reset the connections of banned sources.
pub fn start(settings: Option<&Settings>, attachment: Attachment) -> anyhow::Result<Option<Guard>> {
    let Some(settings) = settings else {
        remove_left();
        return Ok(None);
    };
    let started = load(settings, attachment);
    match started {
        Ok(guard) => Ok(Some(guard)),
        Err(error) if matches!(error.downcast_ref(), Some(PinError::Busy { .. })) => {
            Err(error.context("[guard]"))
        }
        Err(error) => {
            tracing::warn!(target: target::GUARD, error = format!("{error:#}"), "the guard's programs cannot be loaded; listeners reset connections of banned sources instead");
            Ok(None)
        }
    }
}

fn load(settings: &Settings, attachment: Attachment) -> anyhow::Result<Guard> {
    let pins = pins::prepare(&settings.pin)?;
    let (programs, maps) = programs::load(settings, &pins.maps)?;
    let devices = (attachment, settings.devices.as_slice());
    let attached = Attached::new(&SET, devices, pins.links.clone(), std::collections::HashSet::new())
        .context("identifying the network namespace")?;
    let drivers = Drivers::new(settings.xdp, &pins.folder)?;
    let (attachment, _) = watch::channel(GuardAttachment::default());
    Ok(Guard { maps, programs, attached, drivers, attachment, pin: settings.pin.clone(), pins })
}

/// Removes what a daemon with a guard left, now that there is none.
fn remove_left() {
    let left = match pins::in_use_here() {
        Ok(left) => left,
        Err(error) => {
            tracing::debug!(target: target::GUARD, %error, "it is not known what an earlier daemon's guard left");
            return;
        }
    };
    for pin in left {
        remove(&pin);
    }
}

fn remove(pin: &Path) {
    match detach::detach(pin, false) {
        Ok(removed) => {
            let removed = removed.join(", ");
            tracing::info!(target: target::GUARD, removed, "no [guard] is configured: what an earlier daemon's guard left was removed, and its bans are lifted");
        }
        // Another daemon, with a guard.
        Err(DetachError::Running(_)) => {}
        Err(error) => {
            tracing::warn!(target: target::GUARD, %error, "no [guard] is configured, and an earlier daemon's may still drop packets; `injector guard detach` removes it");
        }
    }
}

impl Guard {
    /// The maps.
    #[must_use]
    pub fn maps(&self) -> Arc<dyn BanMaps> {
        Arc::clone(&self.maps) as Arc<dyn BanMaps>
    }

    /// Where the maps are pinned that engine inline's programs ask.
    #[must_use]
    pub fn map_pins(&self) -> &Path {
        &self.pins.maps
    }

    /// Where the links to devices are pinned.
    #[must_use]
    pub fn link_pins(&self) -> &Path {
        &self.pins.links
    }

    /// The directories in which it makes and removes files while it runs.
    #[must_use]
    pub fn directories(&self) -> Vec<PathBuf> {
        vec![self.pin.clone()]
    }

    /// Attaches the programs to the devices that need them. Each failure is logged.
    pub fn attach(&mut self) {
        let _ = self.attached.update(&mut self.programs);
        self.drivers.update(&mut self.programs, &self.maps, self.attached.selected());
        let now = self.current_attachment();
        self.attachment.send_if_modified(|published| {
            let newly_missing = published.missing_pins.is_empty() && !now.missing_pins.is_empty();
            if newly_missing {
                tracing::error!(target: target::GUARD, pins = ?now.missing_pins, "pins of the guard's maps were removed: the bans in them end with this daemon, unless a list or guard.state has them; find out what removes them");
            }
            let changed = *published != now;
            *published = now;
            changed
        });
    }

    /// Where the programs are attached, from the first [`Self::attach`] on.
    #[must_use]
    pub fn attachment(&self) -> watch::Receiver<GuardAttachment> {
        self.attachment.subscribe()
    }

    fn current_attachment(&self) -> GuardAttachment {
        let selected = self.attached.selected().iter().map(|device| GuardedDevice {
            name: device.name.clone(),
            ingress: self.attached.state(device.index),
            driver: self.drivers.state(device.index).map(|state| state.map(mode_name)),
        });
        let unusable = self.attached.unusable().iter().map(|(name, reason)| GuardedDevice {
            name: name.clone(),
            ingress: Err(reason.clone()),
            driver: None,
        });
        GuardAttachment {
            devices: selected.chain(unusable).collect(),
            missing_pins: maps::missing_pins(&self.pins.maps),
        }
    }

    /// Tells the programs the addresses of all listeners.
    pub fn guard_addresses(&self, addresses: &[SocketAddr]) {
        if let Err(error) = self.maps.set_guarded(addresses) {
            tracing::error!(target: target::GUARD, error = format!("{error:#}"), "the programs do not know all listeners; those reset connections of banned sources instead");
        }
    }

    /// Follows devices and the addresses of listeners until the runtime ends.
    ///
    /// # Errors
    /// When the kernel sends no notifications of changes any more.
    pub async fn run(mut self, mut addresses: watch::Receiver<Vec<SocketAddr>>) -> io::Result<()> {
        let mut changes = Changes::watch()?;
        let mut refresh = tokio::time::interval(CHECK_INTERVAL);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = changes.next() => {
                    changed?;
                    self.attach();
                }
                _ = refresh.tick() => self.attach(),
                Ok(()) = addresses.changed() => {
                    let now = addresses.borrow_and_update().clone();
                    self.guard_addresses(&now);
                }
            }
        }
    }
}
