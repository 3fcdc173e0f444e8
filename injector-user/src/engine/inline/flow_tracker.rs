//! Logs and counts the connections of the program, and resets those that are over.
//!
//! The program sends an event for each end; the connection itself is read in memory that both
//! share. What stays open is found there every few seconds. The kernel removes connections on its
//! own.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use injector_common::inline::{Event, Flag, Flow, Phase};
use tokio::{
    io::Interest,
    sync::{Notify, mpsc::UnboundedReceiver},
};
use zerocopy::FromBytes as _;

use super::{
    maps::{backend_of, endpoints, is_open},
    programs::InlinePrograms,
    reset::{self, End},
    usage::ResetRequest,
};
use crate::{
    engine::{bpf::lock, served_listener::ServedListener},
    os::{clock, poll},
    protocol::FirstSpeaker,
    telemetry::{
        log::target,
        metrics::{ListenerMetrics, Metrics},
        outcome::{AccessLogEntry, Bytes, CloseReason},
    },
};

/// How long the reader waits for more events after it has read some. The kernel wakes a reader only
/// if the ring was empty (bpf_ringbuf_commit, kernel/bpf/ringbuf.c): under load the daemon wakes up
/// once per interval, not twice per connection.
const COALESCE: Duration = Duration::from_millis(20);
/// How often all connections are scanned: for their bytes, and for ends without an event.
const SCAN_EVERY: Duration = Duration::from_secs(15);
/// An end is taken to be without an event after this time.
const EVENT_LOST_NS: u64 = 2_000_000_000;
/// How many slots are scanned before other tasks have their turn.
const SCAN_SLICE: usize = 4096;

/// Logs and counts connections.
#[derive(Debug)]
pub struct FlowTracker {
    /// The listeners that are served now.
    served: Arc<Mutex<Vec<ServedListener>>>,
    metrics: Metrics,
    /// By name, also of listeners that are gone.
    listeners: Mutex<HashMap<String, ListenerMetrics>>,
    /// By slot.
    known: Mutex<HashMap<u32, Known>>,
    /// The last SYN that each backend refused, by the time of its first packet.
    refused: Mutex<HashMap<SocketAddr, u64>>,
    /// Notified when a backend may have been ejected.
    ejected: Arc<Notify>,
    resets: Mutex<Option<UnboundedReceiver<ResetRequest>>>,
    started_ns: u64,
}

/// What was counted of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    created_ns: u64,
    to_backend: u64,
    to_client: u64,
    /// Its end was logged.
    ended: bool,
}

/// Whether a connection is to be reset.
type IsDue = Box<dyn Fn(&Flow) -> bool + Send + Sync>;

impl FlowTracker {
    pub(super) fn new(
        served: Arc<Mutex<Vec<ServedListener>>>,
        metrics: Metrics,
        ejected: Arc<Notify>,
        resets: UnboundedReceiver<ResetRequest>,
    ) -> Self {
        Self {
            served,
            metrics,
            listeners: Mutex::default(),
            known: Mutex::default(),
            refused: Mutex::default(),
            ejected,
            resets: Mutex::new(Some(resets)),
            started_ns: clock::monotonic_ns(),
        }
    }

    /// Reads events until the runtime ends. Takes over the connections of an earlier daemon.
    ///
    /// # Errors
    /// When it was called already, or the runtime cannot poll the ring buffer.
    pub async fn run(&self, inline: &InlinePrograms) -> io::Result<()> {
        let taken = || io::Error::other("the event ring buffer already has a reader");
        let ring = lock(&inline.maps.events).take().ok_or_else(taken)?;
        let mut resets = lock(&self.resets).take().ok_or_else(taken)?;
        let mut ring = poll::register(ring, Interest::READABLE)?;
        let mut scan = tokio::time::interval(SCAN_EVERY);
        loop {
            tokio::select! {
                ready = ring.readable_mut() => {
                    let mut ready = ready?;
                    while let Some(record) = ready.get_inner_mut().next() {
                        if let Ok((event, _)) = Event::read_from_prefix(&record) {
                            self.handle_event(inline, &event);
                        }
                    }
                    ready.clear_ready();
                    drop(ready);
                    tokio::time::sleep(COALESCE).await;
                }
                _ = scan.tick() => self.scan(inline).await,
                Some(request) = resets.recv() => self.reset_requested(inline, &request).await,
            }
        }
    }

    fn handle_event(&self, inline: &InlinePrograms, event: &Event) {
        let Some(flow) = inline.maps.flow(event.slot).filter(|flow| flow.created_ns == event.created_ns)
        else {
            return;
        };
        match event.kind {
            Event::ENDED => {
                let superseded = flow.is(Flag::Superseded) && !flow.closed();
                let reason = self.close_reason(inline, &flow);
                if self.ended(inline, event.slot, &flow, reason) && superseded {
                    // The client has forgotten the connection; the backend has not.
                    self.reset(vec![flow], &[End::Backend]);
                }
            }
            Event::EXPIRED if self.ended(inline, event.slot, &flow, expiry_reason(&flow)) => {
                self.reset(vec![flow], &[End::Client, End::Backend]);
            }
            Event::REFUSED => self.refused(inline, &flow),
            _ => {}
        }
    }

    /// A backend refused a SYN. This is counted, but not logged as a connection: the SYN's source
    /// may be forged.
    fn refused(&self, inline: &InlinePrograms, flow: &Flow) {
        let Some(name) = name(inline, flow) else { return };
        self.listener(&name).closed(CloseReason::BackendRefused);
        let backend = backend_of(flow);
        lock(&self.refused).insert(backend, flow.created_ns);
        if let Some(served) = self.served(&name) {
            served.backends.note_refused(backend);
            self.ejected.notify_one();
        }
    }

    /// A connection was established, by this time at the latest.
    fn established(&self, name: &str, flow: &Flow) {
        let metrics = self.listener(name);
        if flow.is(Flag::Sent) {
            metrics.header_sent();
        }
        let backend = backend_of(flow);
        // An older connection proves nothing.
        if lock(&self.refused).get(&backend).is_none_or(|refused| flow.created_ns > *refused) {
            lock(&self.refused).remove(&backend);
            if let Some(served) = self.served(name) {
                served.backends.note_connected(backend);
            }
        }
    }

    /// Counts what is new of a connection. Returns `false` if its end was logged before.
    fn update(&self, inline: &InlinePrograms, slot: u32, flow: &Flow, ends: bool) -> bool {
        let Some(name) = name(inline, flow) else { return false };
        let mut all = lock(&self.known);
        let fresh = Known { created_ns: flow.created_ns, ..Known::default() };
        let (known, new) = match all.entry(slot) {
            Entry::Vacant(entry) => (entry.insert(fresh), true),
            Entry::Occupied(entry) => {
                let known = entry.into_mut();
                let other = known.created_ns != flow.created_ns;
                if other {
                    *known = fresh;
                }
                (known, other)
            }
        };
        let ended = known.ended;
        known.ended |= ends;
        let since = |now: u64, before: &mut u64| {
            let bytes = now.saturating_sub(std::mem::replace(before, now));
            Bytes { spliced: bytes, ..Bytes::default() }
        };
        let bytes = (
            since(flow.to_backend.bytes, &mut known.to_backend),
            since(flow.to_client.bytes, &mut known.to_client),
        );
        drop(all);
        if new {
            self.established(&name, flow);
        }
        self.listener(&name).bytes(bytes.0, bytes.1);
        !ended
    }

    /// Logs the end of a connection, once. Returns `false` if it was logged before.
    fn ended(&self, inline: &InlinePrograms, slot: u32, flow: &Flow, reason: CloseReason) -> bool {
        if !self.update(inline, slot, flow, true) {
            return false;
        }
        let Some(name) = name(inline, flow) else { return true };
        self.listener(&name).closed(reason);
        let Some((client, local)) = endpoints(&flow.addresses) else { return true };
        let bytes = |spliced| Bytes { spliced, ..Bytes::default() };
        let entry = AccessLogEntry {
            client,
            local,
            listener: name.into(),
            backend: Some(backend_of(flow)),
            engine: "inline",
            to_backend: bytes(flow.to_backend.bytes),
            to_client: bytes(flow.to_client.bytes),
            duration: Duration::from_nanos(end_ns(flow, reason).saturating_sub(flow.created_ns)),
            unique_id: None,
            reason,
            error: None,
        };
        entry.log();
        true
    }

    fn close_reason(&self, inline: &InlinePrograms, flow: &Flow) -> CloseReason {
        let served = name(inline, flow).and_then(|name| self.served(&name));
        let speaks_first = served.map(|served| served.listener.protocol.speaks_first());
        close_reason(flow, speaks_first.is_some_and(|first| first != FirstSpeaker::Unknown))
    }

    /// Counts the bytes of all open connections, and logs ends whose event was lost.
    async fn scan(&self, inline: &InlinePrograms) {
        let now = clock::monotonic_ns();
        let lost = |flow: &Flow| now.saturating_sub(flow.last_ns) > EVENT_LOST_NS;
        let mut open = inline.maps.flows_in(Phase::Established);
        loop {
            let mut scanned = 0;
            for (slot, flow) in open.by_ref().take(SCAN_SLICE) {
                scanned += 1;
                if !flow.closed() {
                    self.update(inline, slot, &flow, false);
                } else if lost(&flow) && (flow.created_ns >= self.started_ns || self.is_open(slot, &flow)) {
                    self.ended(inline, slot, &flow, self.close_reason(inline, &flow));
                }
            }
            if scanned < SCAN_SLICE {
                break;
            }
            tokio::task::yield_now().await;
        }
        // Those that are gone: what they were stands in their slots until these are used again.
        let gone: Vec<_> = lock(&self.known).iter().map(|(slot, known)| (*slot, *known)).collect();
        for (slot, known) in gone {
            let flow = inline.maps.flow(slot);
            let same = flow.as_ref().filter(|flow| flow.created_ns == known.created_ns);
            match same {
                Some(flow) if Phase::of(flow.phase) == Phase::Established => continue,
                Some(flow) if !known.ended && !lost(flow) => continue,
                Some(flow) if !known.ended => {
                    let reason =
                        if flow.closed() { self.close_reason(inline, flow) } else { expiry_reason(flow) };
                    self.ended(inline, slot, flow, reason);
                }
                // An event may still come.
                Some(_) => continue,
                None => {}
            }
            lock(&self.known).remove(&slot);
        }
    }

    /// Whether this connection was seen open, and not yet logged as ended.
    fn is_open(&self, slot: u32, flow: &Flow) -> bool {
        let known = lock(&self.known).get(&slot).copied();
        known.is_some_and(|known| known.created_ns == flow.created_ns && !known.ended)
    }

    /// Resets the connections of a listener, at the deadline of a drain or after it was removed, or
    /// those that the operator has ended.
    async fn reset_requested(&self, inline: &InlinePrograms, request: &ResetRequest) {
        let places = match request {
            ResetRequest::Listener { listener, .. } => lock(&inline.listeners).places.of(listener),
            ResetRequest::Ended(_) => Vec::new(),
        };
        let (due, reason): (IsDue, _) = match request {
            ResetRequest::Listener { opened_before_ns, .. } => {
                let opened_before_ns = *opened_before_ns;
                (Box::new(move |flow| is_due(flow, &places, opened_before_ns)), CloseReason::Aborted)
            }
            ResetRequest::Ended(ids) => {
                let ids: HashSet<u64> = ids.iter().copied().collect();
                (Box::new(move |flow| ids.contains(&flow.created_ns)), CloseReason::EndedByOperator)
            }
        };
        // Handshakes first: those that finish meanwhile are found among the established ones.
        for (slot, _) in inline.maps.flows_in(Phase::Pending).filter(|(_, flow)| due(flow)) {
            inline.maps.abandon_handshake(slot);
        }
        let mut flows = Vec::new();
        let established = inline.maps.flows_in(Phase::Established);
        for (slot, flow) in established.filter(|(_, flow)| is_open(flow) && due(flow)) {
            self.ended(inline, slot, &flow, reason);
            inline.maps.abandon(slot);
            flows.push(flow);
            if flows.len().is_multiple_of(SCAN_SLICE) {
                tokio::task::yield_now().await;
            }
        }
        if !flows.is_empty() {
            let count = flows.len();
            match request {
                ResetRequest::Listener { listener, .. } => {
                    tracing::info!(target: target::ENGINE_INLINE, listener, count, "inline connections reset: their deadline is over");
                }
                ResetRequest::Ended(_) => {
                    tracing::info!(target: target::ENGINE_INLINE, count, "inline connections reset: the operator has ended them");
                }
            }
            self.reset(flows, &[End::Client, End::Backend]);
        }
    }

    /// Resets connections, on another thread.
    #[expect(clippy::unused_self, reason = "a part of the tracker's work")]
    fn reset(&self, flows: Vec<Flow>, ends: &'static [End]) {
        tokio::task::spawn_blocking(move || {
            let failed = flows.iter().filter_map(|flow| reset::reset(flow, ends).err());
            let (mut count, mut last) = (0_u32, None);
            for error in failed {
                (count, last) = (count + 1, Some(error));
            }
            if let Some(error) = last {
                tracing::warn!(target: target::ENGINE_INLINE, count, %error, "connections could not be reset; their ends time out by themselves");
            }
        });
    }

    fn listener(&self, name: &str) -> ListenerMetrics {
        let mut listeners = lock(&self.listeners);
        if let Some(known) = listeners.get(name) {
            return known.clone();
        }
        listeners.entry(name.to_owned()).or_insert_with(|| self.metrics.listener(name, "inline")).clone()
    }

    fn served(&self, name: &str) -> Option<ServedListener> {
        lock(&self.served).iter().find(|served| served.listener.name == name).cloned()
    }
}

/// The name of the listener by which the connection came, of this daemon or an earlier one.
fn name(inline: &InlinePrograms, flow: &Flow) -> Option<String> {
    lock(&inline.listeners).places.name(flow.listener).map(str::to_owned)
}

/// Whether a request to reset the connections of these places is for this one.
fn is_due(flow: &Flow, places: &[u32], opened_before_ns: u64) -> bool {
    places.contains(&flow.listener) && flow.created_ns < opened_before_ns && is_open(flow)
}

/// When it ended: with its last packet, unless the daemon has ended it now.
fn end_ns(flow: &Flow, reason: CloseReason) -> u64 {
    match reason {
        CloseReason::Idle
        | CloseReason::HalfClosed
        | CloseReason::ClientFin
        | CloseReason::Aborted
        | CloseReason::EndedByOperator => clock::monotonic_ns(),
        _ => flow.last_ns,
    }
}

/// Why the connection has ended.
fn close_reason(flow: &Flow, expects_banner: bool) -> CloseReason {
    let silent = expects_banner && flow.to_client.bytes == 0;
    if flow.is(Flag::ClientRst) {
        CloseReason::ClientReset
    } else if flow.is(Flag::BackendRst) {
        if silent { CloseReason::NoBanner } else { CloseReason::BackendReset }
    } else if !flow.closed() {
        // The client has opened another one with the same port: it has forgotten this one.
        CloseReason::ClientTimedOut
    } else if flow.is(Flag::ClientFirst) {
        CloseReason::ClientClosed
    } else if silent {
        CloseReason::NoBanner
    } else {
        CloseReason::BackendClosed
    }
}

/// Why the connection was silent for too long.
fn expiry_reason(flow: &Flow) -> CloseReason {
    if flow.waits_for_client_fin() {
        CloseReason::ClientFin
    } else if flow.is(Flag::ClientFin) || flow.is(Flag::BackendFin) {
        CloseReason::HalfClosed
    } else {
        CloseReason::Idle
    }
}

#[cfg(test)]
mod tests {
    use injector_common::inline::DirectionStats;

    use super::*;

    fn flow(flags: &[Flag], to_client: u64) -> Flow {
        let to_client = DirectionStats { packets: 1, bytes: to_client };
        let mut flow = Flow { to_client, ..Flow::default() };
        flags.iter().for_each(|flag| flow.set(*flag));
        flow
    }

    #[test]
    fn the_flags_say_who_has_ended_the_connection() {
        use CloseReason::{BackendClosed, BackendReset, ClientClosed, ClientReset, ClientTimedOut, NoBanner};
        use Flag::{BackendFin, BackendRst, ClientFin, ClientFirst, ClientRst, Superseded};
        for (flags, bytes, expected) in [
            (&[ClientFin, ClientFirst, BackendFin][..], 5, ClientClosed),
            (&[ClientFin, BackendFin], 5, BackendClosed),
            (&[ClientFin, BackendFin], 0, NoBanner),
            (&[BackendRst], 0, NoBanner),
            (&[BackendRst], 5, BackendReset),
            (&[ClientRst], 0, ClientReset),
            (&[Superseded], 5, ClientTimedOut),
            (&[Superseded, ClientFin, ClientFirst, BackendFin], 5, ClientClosed),
        ] {
            assert_eq!(close_reason(&flow(flags, bytes), true), expected, "{flags:?}, {bytes} bytes");
        }
        assert_eq!(close_reason(&flow(&[ClientFin, BackendFin], 0), false), BackendClosed);
    }

    #[test]
    fn silence_has_three_reasons() {
        assert_eq!(expiry_reason(&flow(&[], 5)), CloseReason::Idle);
        assert_eq!(expiry_reason(&flow(&[Flag::BackendFin], 5)), CloseReason::ClientFin);
        let mut undelivered = flow(&[Flag::BackendFin], 5);
        undelivered.backend.end = undelivered.backend.acked + 1;
        assert_eq!(expiry_reason(&undelivered), CloseReason::HalfClosed);
        assert_eq!(expiry_reason(&flow(&[Flag::ClientFin], 5)), CloseReason::HalfClosed);
    }

    #[test]
    fn a_deadline_is_for_what_is_open_on_all_places_of_the_listener() {
        let flow = |listener, created_ns| Flow { listener, created_ns, ..Flow::default() };
        let due = |flow: &Flow| is_due(flow, &[1, 3], 100);
        assert!(due(&flow(1, 99)) && due(&flow(3, 0)));
        assert!(!due(&flow(1, 100)) && !due(&flow(2, 99)));
        for flag in [Flag::Superseded, Flag::ClientRst] {
            let mut ended = flow(1, 99);
            ended.set(flag);
            assert!(!due(&ended), "{flag:?}");
        }
    }
}
