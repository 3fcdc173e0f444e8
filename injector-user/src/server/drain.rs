//! Rejects new clients of a listener while its sessions finish.

use std::time::{Duration, Instant};

use anyhow::bail;

use super::{active_listener::DrainState, state::Server};
use crate::telemetry::log::target;

impl Server {
    /// Turns new clients of a listener away, of all listeners without a name, and cuts who is there after `within`, or after
    /// what the configuration says. Returns the names.
    ///
    /// # Errors
    /// When there is no such listener.
    pub fn drain(&mut self, name: Option<&str>, within: Option<Duration>) -> anyhow::Result<Vec<String>> {
        let named = self.find_listeners(name)?;
        let mut drained = Vec::new();
        let mut listeners = std::mem::take(&mut self.listeners);
        for index in named {
            let Some(active) = listeners.get_mut(index) else { continue };
            active.policies.iter().for_each(|policy| policy.set_draining(true));
            let within = within.unwrap_or(active.config.timeouts.drain);
            // Packets are not ours to cut.
            let deadline = active.engine.is_some().then(|| Instant::now() + within);
            active.drain = Some(DrainState { deadline });
            self.shared.metrics.set_draining(&active.config.name, true);
            tracing::info!(target: target::LISTENER, listener = active.config.name, deadline = ?within, "draining: new connections are rejected, sessions may finish until the deadline");
            let before = std::mem::replace(&mut active.abort_new, active.abort.child_token());
            self.replace_contexts(active);
            active.abort_drained.retain(|abort| !abort.is_cancelled());
            active.abort_drained.push(before);
            if let Some(deadline) = deadline {
                // Of two drains, the one that ends sooner holds.
                active.abort_drained.iter().for_each(|abort| self.abort_at(deadline, abort.clone()));
            }
            drained.push(active.config.name.clone());
        }
        self.listeners = listeners;
        self.publish_to_inline();
        Ok(drained)
    }

    /// Accepts clients again. Sessions from before the drain are still cut when their time is over. Returns the names of those
    /// that were drained.
    ///
    /// # Errors
    /// When there is no such listener.
    pub fn resume(&mut self, name: Option<&str>) -> anyhow::Result<Vec<String>> {
        let mut resumed = Vec::new();
        for index in self.find_listeners(name)? {
            let Some(active) = self.listeners.get_mut(index).filter(|active| active.drain.is_some()) else {
                continue;
            };
            active.policies.iter().for_each(|policy| policy.set_draining(false));
            active.drain = None;
            self.shared.metrics.set_draining(&active.config.name, false);
            tracing::info!(target: target::LISTENER, listener = active.config.name, "draining ended: new connections are accepted again");
            resumed.push(active.config.name.clone());
        }
        self.publish_to_inline();
        Ok(resumed)
    }

    fn find_listeners(&self, name: Option<&str>) -> anyhow::Result<Vec<usize>> {
        let Some(name) = name else { return Ok((0..self.listeners.len()).collect()) };
        match self.listeners.iter().position(|active| active.config.name == name) {
            Some(index) => Ok(vec![index]),
            None => {
                let all: Vec<_> = self.listeners.iter().map(|active| active.config.name.as_str()).collect();
                bail!("no listener is named {name:?}; configured listeners: {}", all.join(", "))
            }
        }
    }
}
