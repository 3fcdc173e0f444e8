//! Backends that read the PROXY header as commands: their port does not expect one.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use super::{pool::Backends, state::Backend};
use crate::telemetry::log::target;

impl Backends {
    /// Records that the backend at `address` answered the header as commands with `line`: its port
    /// does not expect a header. While another backend can, this one gets no connections.
    pub fn note_misread(&self, address: SocketAddr, line: &str) {
        for backend in self.with_address(address) {
            backend.state.counters.misread.fetch_add(1, Ordering::Relaxed);
            backend.state.misreads.store(true, Ordering::Relaxed);
            let is_other = |it: &&Backend| !Arc::ptr_eq(&it.state, &backend.state);
            let replaced = self.all().iter().filter(is_other).any(|other| other.candidate().is_eligible());
            let now = Instant::now();
            if replaced && backend.state.health().eject(now, &self.health.ejection).is_some() {
                backend.state.counters.ejections.fetch_add(1, Ordering::Relaxed);
                self.notify_changed();
            }
            if let Some(count) = self.misread_warning.allow(Instant::now()) {
                let backend = &backend.configured;
                tracing::warn!(target: target::BACKEND, listener = self.listener, %backend, %address, count, answer = line, "the backend reads the PROXY header as commands: port {} is not a PROXY port; its clients get a temporary failure: set `backends` to a port on which the server requires the header, and run `injector doctor`", address.port());
            }
        }
    }

    /// Records that the backend at `address` did not answer a header as commands.
    pub fn note_greeted(&self, address: SocketAddr) {
        // Seldom any, so the addresses are not compared for every session.
        for backend in self.all().iter().filter(|backend| backend.misreads_header()) {
            if backend.addresses().contains(&address) {
                backend.state.misreads.store(false, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::{HealthState, pool::tests::backends};

    #[test]
    fn a_backend_that_reads_headers_as_commands_is_marked_and_replaced() {
        let backends = backends("\"192.0.2.1:25\", \"192.0.2.2:2525\"");
        let address = "192.0.2.1:25".parse().unwrap();
        backends.note_misread(address, "500 5.5.2 Error: bad syntax");
        let [bad, good] = backends.all() else { panic!() };
        assert_eq!((bad.misreads_header(), bad.stats().misread), (true, 1));
        assert_eq!((bad.health_state(), good.health_state()), (HealthState::Ejected, HealthState::Up));
        assert!(!good.misreads_header());
        backends.note_greeted(address);
        assert_eq!((bad.misreads_header(), bad.stats().misread), (false, 1));
    }

    #[test]
    fn the_only_backend_is_not_ejected() {
        let backends = backends("\"192.0.2.1:25\"");
        backends.note_misread("192.0.2.1:25".parse().unwrap(), "500 5.5.2 Error: bad syntax");
        assert_eq!(backends.all()[0].health_state(), HealthState::Up);
        assert_eq!(backends.all()[0].stats().ejections, 0);
    }
}
