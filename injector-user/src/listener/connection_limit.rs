//! A limit on concurrent connections that can be changed while connections exist.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A limit on concurrent connections.
#[derive(Debug)]
pub struct ConnectionLimit {
    max: AtomicUsize,
    in_use: AtomicUsize,
}

/// Counts as one connection until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct ConnectionPermit(Arc<ConnectionLimit>);

impl ConnectionLimit {
    /// At most `max` connections; `None` means unlimited.
    #[must_use]
    pub fn new(max: Option<usize>) -> Arc<Self> {
        Arc::new(Self { max: AtomicUsize::new(max.unwrap_or(usize::MAX)), in_use: AtomicUsize::new(0) })
    }

    /// Changes the limit. Existing connections stay, even above the new limit.
    pub fn resize(&self, max: Option<usize>) {
        self.max.store(max.unwrap_or(usize::MAX), Ordering::Relaxed);
    }

    /// Takes a permit, unless the limit is reached.
    #[must_use]
    pub fn try_acquire(self: &Arc<Self>) -> Option<ConnectionPermit> {
        let max = self.max.load(Ordering::Relaxed);
        let acquire = |in_use| if in_use < max { Some(in_use + 1) } else { None };
        self.in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, acquire).ok()?;
        Some(ConnectionPermit(Arc::clone(self)))
    }

    /// The number of permits in use.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.in_use.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_never_exceeded() {
        let limit = ConnectionLimit::new(Some(2));
        let permits = [limit.try_acquire(), limit.try_acquire(), limit.try_acquire()];
        assert_eq!(permits.each_ref().map(Option::is_some), [true, true, false]);
        drop(permits);
        assert_eq!(limit.in_use(), 0);
        assert!(ConnectionLimit::new(Some(0)).try_acquire().is_none());
        assert!(ConnectionLimit::new(None).try_acquire().is_some());
    }

    #[test]
    fn existing_connections_stay_when_the_limit_shrinks() {
        let limit = ConnectionLimit::new(Some(3));
        let mut permits: Vec<_> = (0..3).filter_map(|_| limit.try_acquire()).collect();
        limit.resize(Some(1));
        assert!(limit.try_acquire().is_none());
        permits.truncate(1);
        assert!(limit.try_acquire().is_none());
        permits.clear();
        assert!(limit.try_acquire().is_some());
    }
}
