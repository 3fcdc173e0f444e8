//! Rejects new clients of a listener while its sessions finish.

use std::time::{Duration, Instant};

use anyhow::bail;

use super::{active_listener::DrainState, state::Server};
use crate::telemetry::log::target;

impl Server {
    /// Rejects new clients of the named listener, or of all listeners. Sessions are aborted after
    /// `within`, or after the configured time. Returns the names of the listeners.
    ///
    /// # Errors
    /// When no listener has this name.
    pub fn drain(&mut self, name: Option<&str>, within: Option<Duration>) -> anyhow::Result<Vec<String>> {
        let indices = self.find_listeners(name)?;
        let mut drained = Vec::new();
        let mut listeners = std::mem::take(&mut self.listeners);
        for index in indices {
            let Some(active) = listeners.get_mut(index) else { continue };
            active.policies.iter().for_each(|policy| policy.set_draining(true));
            let within = within.unwrap_or(active.settings.timeouts.drain);
            let deadline = Instant::now() + within;
            active.drain = Some(DrainState { deadline });
            self.shared.metrics.set_draining(&active.settings.name, true);
            tracing::info!(target: target::LISTENER, listener = active.settings.name, deadline = ?within, "draining: new connections are rejected, sessions may finish until the deadline");
            let before = std::mem::replace(&mut active.abort_new, active.abort.child_token());
            self.replace_contexts(active);
            active.abort_drained.retain(|abort| !abort.is_cancelled());
            active.abort_drained.push(before);
            // Of several drains, the earliest deadline holds.
            active.abort_drained.iter().for_each(|abort| self.abort_at(deadline, abort.clone()));
            self.reset_inline_at(deadline, &active.settings.name);
            drained.push(active.settings.name.clone());
        }
        self.listeners = listeners;
        self.publish_to_inline();
        Ok(drained)
    }

    /// Accepts new clients again. Sessions from before the drain are still aborted at its deadline.
    /// Returns the names of the listeners that were draining.
    ///
    /// # Errors
    /// When no listener has this name.
    pub fn resume(&mut self, name: Option<&str>) -> anyhow::Result<Vec<String>> {
        let mut resumed = Vec::new();
        for index in self.find_listeners(name)? {
            let Some(active) = self.listeners.get_mut(index).filter(|active| active.drain.is_some()) else {
                continue;
            };
            active.policies.iter().for_each(|policy| policy.set_draining(false));
            active.drain = None;
            if let Some(reopened) = self.closed_to_inline.remove(&active.settings.name) {
                reopened.set();
            }
            self.shared.metrics.set_draining(&active.settings.name, false);
            tracing::info!(target: target::LISTENER, listener = active.settings.name, "draining ended: new connections are accepted again");
            resumed.push(active.settings.name.clone());
        }
        self.publish_to_inline();
        Ok(resumed)
    }

    /// The positions of the named listener, or of all listeners.
    fn find_listeners(&self, name: Option<&str>) -> anyhow::Result<Vec<usize>> {
        let Some(name) = name else { return Ok((0..self.listeners.len()).collect()) };
        match self.listeners.iter().position(|active| active.settings.name == name) {
            Some(index) => Ok(vec![index]),
            None => {
                let all: Vec<_> = self.listeners.iter().map(|active| active.settings.name.as_str()).collect();
                bail!("no listener is named {name:?}; configured listeners: {}", all.join(", "))
            }
        }
    }
}
