//! Passes the backlog events of `verdict` on to the direction that they concern.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{MapData, RingBuf};
use injector_common::splice::BacklogEvent;
use tokio::io::Interest;
use zerocopy::FromBytes as _;

use crate::{engine::Bell, os::poll};

/// The bells of all spliced directions, by their source's cookie.
#[derive(Debug, Default)]
pub(super) struct BacklogEvents(Mutex<HashMap<u64, Arc<Bell>>>);

impl BacklogEvents {
    pub(super) fn add(&self, source: u64) -> Arc<Bell> {
        let bell = Arc::new(Bell::default());
        self.lock().insert(source, Arc::clone(&bell));
        bell
    }

    pub(super) fn remove(&self, source: u64) {
        self.lock().remove(&source);
    }

    fn notify(&self, source: u64) {
        if let Some(bell) = self.lock().get(&source) {
            bell.ring();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Bell>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the programs' events as long as the daemon runs.
    pub(super) async fn follow(&self, ring: RingBuf<MapData>) -> io::Result<()> {
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
