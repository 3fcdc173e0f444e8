//! Forwards each backlog event of `verdict` to the session of its direction.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{MapData, RingBuf};
use injector_common::splice::BacklogEvent;
use tokio::io::Interest;
use zerocopy::FromBytes as _;

use crate::{engine::BacklogNotify, os::poll};

/// The notifiers of all spliced directions, by their source's cookie.
#[derive(Debug, Default)]
pub(super) struct BacklogNotifiers(Mutex<HashMap<u64, Arc<BacklogNotify>>>);

impl BacklogNotifiers {
    pub(super) fn register(&self, source: u64) -> Arc<BacklogNotify> {
        let notify = Arc::new(BacklogNotify::default());
        self.lock().insert(source, Arc::clone(&notify));
        notify
    }

    pub(super) fn unregister(&self, source: u64) {
        self.lock().remove(&source);
    }

    fn notify(&self, source: u64) {
        if let Some(notify) = self.lock().get(&source) {
            notify.notify();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<BacklogNotify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the program's events while the daemon runs.
    pub(super) async fn run(&self, ring: RingBuf<MapData>) -> io::Result<()> {
        let mut ring = poll::register(ring, Interest::READABLE)?;
        loop {
            let mut ready = ring.readable_mut().await?;
            while let Some(record) = ready.get_inner_mut().next() {
                if let Ok((event, _)) = BacklogEvent::read_from_prefix(&record) {
                    self.notify(event.source);
                }
            }
            ready.clear_ready();
        }
    }
}
