//! What the server sees of the inline engine: its counts, its connections, and how to reset them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use injector_common::inline::{Flow, Phase};
use tokio::sync::mpsc::UnboundedSender;

use super::{
    counts::{ListenerCounts, TotalCounts},
    maps::{backend_of, endpoints, is_open},
    programs::InlinePrograms,
};
use crate::{
    engine::{
        bpf::lock,
        usage::{InlineConnection, InlineUsage, UsageCounts},
    },
    os::clock,
};

/// A request to reset connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ResetRequest {
    /// Those of a listener.
    Listener {
        /// Its name.
        listener: String,
        /// Those that were opened before this time, `CLOCK_MONOTONIC`.
        opened_before_ns: u64,
    },
    /// Those that were opened at these times: the operator has ended them.
    Ended(Vec<u64>),
}

/// What the server sees of the engine.
#[derive(Debug)]
pub(super) struct EngineUsage {
    pub(super) inline: Arc<InlinePrograms>,
    pub(super) resets: UnboundedSender<ResetRequest>,
}

impl InlineUsage for EngineUsage {
    fn listener(&self, name: &str) -> Option<Arc<dyn UsageCounts>> {
        let mut listeners = lock(&self.inline.listeners);
        if let Some(known) = listeners.counted.get(name).and_then(std::sync::Weak::upgrade) {
            return Some(known);
        }
        let id = listeners.places.reserve(name)?;
        self.inline.maps.set_name(id, name);
        let usage = ListenerCounts::new(&self.inline.maps, &listeners.places.of(name));
        let usage = Arc::new(usage);
        listeners.counted.insert(name.to_owned(), Arc::downgrade(&usage));
        Some(usage)
    }

    fn all(&self) -> Arc<dyn UsageCounts> {
        Arc::new(TotalCounts::new(&self.inline.maps))
    }

    fn reset(&self, listener: &str, opened_before: Instant) {
        let ago = u64::try_from(opened_before.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let opened_before_ns = clock::monotonic_ns().saturating_sub(ago);
        // Without a receiver the daemon ends.
        let _ = self.resets.send(ResetRequest::Listener { listener: listener.to_owned(), opened_before_ns });
    }

    fn end(&self, ids: Vec<u64>) {
        let _ = self.resets.send(ResetRequest::Ended(ids));
    }

    fn connections(&self) -> Vec<InlineConnection> {
        let now = clock::monotonic_ns();
        let connection = |(_, flow): (u32, Flow)| {
            let name = lock(&self.inline.listeners).places.name(flow.listener).map(Arc::from)?;
            let (client, local) = endpoints(&flow.addresses)?;
            Some(InlineConnection {
                id: flow.created_ns,
                listener: name,
                client,
                local,
                backend: backend_of(&flow),
                age: Duration::from_nanos(now.saturating_sub(flow.created_ns)),
                to_backend: flow.to_backend.bytes,
                to_client: flow.to_client.bytes,
            })
        };
        let open = self.inline.maps.flows_in(Phase::Established).filter(|(_, flow)| is_open(flow));
        open.filter_map(connection).collect()
    }
}
