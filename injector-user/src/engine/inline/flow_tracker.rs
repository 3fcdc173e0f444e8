//! Tracks flows: the programs report events through a ring buffer, and the tracker logs and counts
//! them. It also removes ended flows from `FLOWS`.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::Mutex,
    time::{Duration, Instant},
};

use injector_common::inline::{ClosedFlow, Event, Flag, Flow, Key};
use tokio::io::Interest;
use zerocopy::FromBytes as _;

use super::{
    maps::socket_address,
    programs::{InlinePrograms, endpoints},
};
use crate::{
    engine::bpf::lock,
    os::{clock, poll},
    telemetry::{
        metrics::{ActiveGuard, ListenerMetrics},
        outcome::{AccessLogEntry, Bytes, CloseReason},
    },
};

/// How often ended flows are removed.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How long the reader waits for more events after it has read some. The kernel wakes a reader only
/// if the ring was empty (bpf_ringbuf_commit, kernel/bpf/ringbuf.c): under load the daemon wakes up
/// once per interval, not twice per connection.
const COALESCE: Duration = Duration::from_millis(20);
/// How often all flows are scanned: for their bytes, and for ends without an event.
const SCAN_EVERY: Duration = Duration::from_secs(15);

/// How long a flow stays after its end: a peer may retransmit its last segment for twice the
/// maximum segment lifetime. When the map fills up, new connections matter more than
/// retransmissions of old ones.
const fn time_wait(flows: usize, capacity: usize) -> Duration {
    if flows < capacity / 2 {
        Duration::from_secs(120)
    } else if flows < capacity / 4 * 3 {
        Duration::from_secs(5)
    } else {
        Duration::from_secs(1)
    }
}

/// What the tracker needs to know of a listener.
#[derive(Clone, Debug)]
pub struct ListenerInfo {
    /// Its name.
    pub name: String,
    /// Whether a backend that closes without sending a byte has failed.
    pub expects_banner: bool,
    /// Its counters.
    pub metrics: ListenerMetrics,
}

/// Tracks which flows are open, and how many of their bytes the metrics have counted.
#[derive(Debug)]
pub struct FlowTracker {
    listeners: Vec<ListenerInfo>,
    idle: Duration,
    /// How many flows the map can hold.
    capacity: usize,
    open: Mutex<HashMap<Key, OpenFlow>>,
    time_wait_queue: Mutex<TimeWaitQueue>,
}

/// Flows that have ended and are still in `FLOWS`.
#[derive(Debug, Default)]
struct TimeWaitQueue {
    /// In the order in which they ended, with the time of the end.
    queue: VecDeque<(Instant, ClosedFlow)>,
    /// The creation time of the last flow of each key.
    last: HashMap<Key, u64>,
}

impl TimeWaitQueue {
    /// Adds a flow. Returns `false` if it was present: if two CPUs handle the last FINs of a
    /// connection at the same time, both may report its end.
    fn enter_time_wait(&mut self, key: Key, flow: &Flow) -> bool {
        if self.last.insert(key, flow.created_ns) == Some(flow.created_ns) {
            return false;
        }
        self.queue.push_back((Instant::now(), ClosedFlow::new(key, flow)));
        true
    }

    /// Removes a flow; returns whether it was present.
    fn remove(&mut self, key: &Key, flow: &Flow) -> bool {
        let was = self.last.get(key) == Some(&flow.created_ns);
        if was {
            self.last.remove(key);
            // The flow is added again when it ends again.
            self.queue.retain(|(_, ended)| (ended.key, ended.created_ns) != (*key, flow.created_ns));
        }
        was
    }

    /// Removes and returns the flows that ended longer ago.
    fn take_expired(&mut self, time_wait: Duration) -> Vec<ClosedFlow> {
        let (mut taken, now) = (Vec::new(), Instant::now());
        while let Some((_, ended)) =
            self.queue.pop_front_if(|(since, _)| now.duration_since(*since) > time_wait)
        {
            // A newer flow with the same ports keeps its entry.
            if self.last.get(&ended.key) == Some(&ended.created_ns) {
                self.last.remove(&ended.key);
            }
            taken.push(ended);
        }
        taken
    }
}

#[derive(Debug)]
struct OpenFlow {
    _active: ActiveGuard,
    to_backend: u64,
    to_client: u64,
}

impl FlowTracker {
    /// A tracker for these listeners, in the order of their ids. Flows without a packet for `idle`
    /// count as dead; the map holds `capacity` flows.
    #[must_use]
    pub fn new(listeners: Vec<ListenerInfo>, idle: Duration, capacity: usize) -> Self {
        Self { listeners, idle, capacity, open: Mutex::default(), time_wait_queue: Mutex::default() }
    }

    /// Reads events and removes ended flows until the runtime ends. Takes over the flows of an
    /// earlier daemon.
    ///
    /// # Errors
    /// When it was called already, or the runtime cannot poll the ring buffer.
    pub async fn run(&self, inline: &InlinePrograms) -> io::Result<()> {
        let ring = lock(&inline.maps.events).take();
        let ring = ring.ok_or_else(|| io::Error::other("the event ring buffer already has a reader"))?;
        let mut ring = poll::register(ring, Interest::READABLE)?;
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        let mut scan = tokio::time::interval(SCAN_EVERY);
        loop {
            tokio::select! {
                ready = ring.readable_mut() => {
                    let mut ready = ready?;
                    while let Some(record) = ready.get_inner_mut().next() {
                        if let Ok((event, _)) = Event::read_from_prefix(&record) {
                            self.handle_event(&event);
                        }
                    }
                    ready.clear_ready();
                    drop(ready);
                    tokio::time::sleep(COALESCE).await;
                }
                _ = sweep.tick() => self.sweep(inline),
                _ = scan.tick() => self.scan(inline),
            }
        }
    }

    fn handle_event(&self, event: &Event) {
        match event.kind {
            Event::ACKNOWLEDGED => self.flow_established(event.key, &event.flow),
            Event::ENDED => self.flow_closed(&event.key, &event.flow, self.close_reason(&event.flow)),
            Event::REFUSED => self.flow_refused(&event.flow),
            _ => {}
        }
    }

    /// A backend refused a SYN. This is counted, but not logged as a connection: the SYN's source
    /// may be forged.
    fn flow_refused(&self, flow: &Flow) {
        if let Some(listener) = self.listener(flow) {
            listener.metrics.closed(CloseReason::BackendRefused);
        }
    }

    /// A flow that counted as reset goes on.
    fn flow_reopened(&self, key: Key, flow: &Flow) {
        let Some(listener) = self.listener(flow) else { return };
        let (to_backend, to_client) = (flow.to_backend.bytes, flow.to_client.bytes);
        let entry = OpenFlow { _active: listener.metrics.active(), to_backend, to_client };
        lock(&self.open).insert(key, entry);
    }

    fn flow_established(&self, key: Key, flow: &Flow) {
        let Some(listener) = self.listener(flow) else { return };
        let metrics = &listener.metrics;
        let mut open = lock(&self.open);
        open.entry(key).or_insert_with(|| {
            metrics.accepted();
            metrics.header_sent();
            OpenFlow { _active: metrics.active(), to_backend: 0, to_client: 0 }
        });
    }

    fn flow_closed(&self, key: &Key, flow: &Flow, reason: CloseReason) {
        let Some(listener) = self.listener(flow) else { return };
        if !lock(&self.time_wait_queue).enter_time_wait(*key, flow) {
            return;
        }
        self.update_bytes(key, flow);
        lock(&self.open).remove(key);
        listener.metrics.closed(reason);
        let Some((client, local)) = endpoints(&flow.addresses) else { return };
        let bytes = |spliced| Bytes { spliced, ..Bytes::default() };
        let entry = AccessLogEntry {
            client,
            local,
            listener: listener.name.as_str().into(),
            backend: Some(socket_address(&key.backend)),
            engine: "inline",
            to_backend: bytes(flow.to_backend.bytes),
            to_client: bytes(flow.to_client.bytes),
            duration: Duration::from_nanos(flow.last_ns.saturating_sub(flow.created_ns)),
            unique_id: None,
            reason,
            error: None,
        };
        entry.log();
    }

    fn close_reason(&self, flow: &Flow) -> CloseReason {
        let expects_banner = self.listener(flow).is_some_and(|listener| listener.expects_banner);
        let silent = expects_banner && flow.to_client.bytes == 0;
        if flow.is(Flag::ClientRst) {
            CloseReason::ClientReset
        } else if flow.is(Flag::BackendRst) {
            if silent { CloseReason::NoBanner } else { CloseReason::BackendReset }
        } else if flow.is(Flag::ClientFirst) {
            CloseReason::ClientClosed
        } else if silent {
            CloseReason::NoBanner
        } else {
            CloseReason::BackendClosed
        }
    }

    /// Updates the byte counters.
    fn update_bytes(&self, key: &Key, flow: &Flow) {
        let Some(listener) = self.listener(flow) else { return };
        let mut open = lock(&self.open);
        let Some(entry) = open.get_mut(key) else { return };
        let since = |now: u64, before: &mut u64| {
            let bytes = now.saturating_sub(std::mem::replace(before, now));
            Bytes { spliced: bytes, ..Bytes::default() }
        };
        listener.metrics.bytes(
            since(flow.to_backend.bytes, &mut entry.to_backend),
            since(flow.to_client.bytes, &mut entry.to_client),
        );
    }

    /// Removes flows that ended long enough ago.
    fn sweep(&self, inline: &InlinePrograms) {
        let mut time_wait_queue = lock(&self.time_wait_queue);
        let time_wait = time_wait(time_wait_queue.queue.len(), self.capacity);
        let ended = time_wait_queue.take_expired(time_wait);
        drop(time_wait_queue);
        inline.remove_flows(&ended);
    }

    fn scan(&self, inline: &InlinePrograms) {
        let now = clock::monotonic_ns();
        let flows = inline.maps.flows();
        let time_wait = time_wait(flows.len(), self.capacity);
        let mut expired = Vec::new();
        for (key, flow) in flows {
            let silent = Duration::from_nanos(now.saturating_sub(flow.last_ns));
            if flow.closed() {
                // The flow is from an earlier daemon, or its event was lost.
                if silent > COALESCE && lock(&self.open).contains_key(&key) {
                    self.flow_closed(&key, &flow, self.close_reason(&flow));
                }
                if silent > time_wait {
                    expired.push(ClosedFlow::new(key, &flow));
                }
                continue;
            }
            if lock(&self.time_wait_queue).remove(&key, &flow) {
                self.flow_reopened(key, &flow);
            }
            if silent > self.idle {
                expired.push(ClosedFlow::new(key, &flow));
                self.flow_closed(&key, &flow, CloseReason::Idle);
                continue;
            }
            if flow.is(Flag::Acknowledged) {
                self.flow_established(key, &flow);
                self.update_bytes(&key, &flow);
            }
        }
        inline.remove_flows(&expired);
    }

    fn listener(&self, flow: &Flow) -> Option<&ListenerInfo> {
        self.listeners.get(usize::try_from(flow.listener).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_ends_once() {
        let mut ended = TimeWaitQueue::default();
        let (key, flow) = (Key::default(), |created_ns| Flow { created_ns, ..Flow::default() });
        assert!(ended.enter_time_wait(key, &flow(1)) && !ended.enter_time_wait(key, &flow(1)));
        // A new flow with the same ports, while the first is still present.
        assert!(ended.enter_time_wait(key, &flow(2)));
        assert_eq!(ended.take_expired(Duration::from_secs(60)), []);
        assert!(!ended.enter_time_wait(key, &flow(2)), "it is still there");
        let both = [1, 2].map(|created_ns| ClosedFlow { key, created_ns, last_ns: 0 });
        assert_eq!(ended.take_expired(Duration::ZERO), both);
        assert_eq!(ended.take_expired(Duration::ZERO), []);
        assert!(ended.last.is_empty());
    }

    #[test]
    fn a_reopened_flow_may_end_again() {
        let mut ended = TimeWaitQueue::default();
        let (key, flow) = (Key::default(), Flow { created_ns: 1, ..Flow::default() });
        assert!(!ended.remove(&key, &flow));
        assert!(ended.enter_time_wait(key, &flow));
        assert!(!ended.remove(&key, &Flow { created_ns: 2, ..flow }));
        assert!(ended.remove(&key, &flow) && !ended.remove(&key, &flow));
        assert!(ended.enter_time_wait(key, &flow));
        assert_eq!(ended.take_expired(Duration::ZERO).len(), 1);
    }

    #[test]
    fn ended_flows_are_removed_sooner_when_the_map_fills_up() {
        let seconds = |flows| time_wait(flows, 65_536).as_secs();
        assert_eq!([0, 32_767, 32_768, 49_151, 49_152, 65_536].map(seconds), [120, 120, 5, 5, 1, 1]);
    }
}
