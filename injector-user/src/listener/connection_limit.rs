//! A limit on how many there may be at one time, which can be changed while some are there.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// So many places.
#[derive(Debug)]
pub struct ConnectionLimit {
    max: AtomicUsize,
    in_use: AtomicUsize,
}

/// One of them, until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct ConnectionPermit(Arc<ConnectionLimit>);

impl ConnectionLimit {
    /// For at most `max`; `None` is no limit.
    #[must_use]
    pub fn new(max: Option<usize>) -> Arc<Self> {
        Arc::new(Self { max: AtomicUsize::new(max.unwrap_or(usize::MAX)), in_use: AtomicUsize::new(0) })
    }

    /// Changes the limit. Who is there stays, even if that is more than there may be from here on.
    pub fn resize(&self, max: Option<usize>) {
        self.max.store(max.unwrap_or(usize::MAX), Ordering::Relaxed);
    }

    /// A place, if there is one left.
    #[must_use]
    pub fn try_acquire(self: &Arc<Self>) -> Option<ConnectionPermit> {
        let max = self.max.load(Ordering::Relaxed);
        let enter = |taken| if taken < max { Some(taken + 1) } else { None };
        self.in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).ok()?;
        Some(ConnectionPermit(Arc::clone(self)))
    }

    /// How many are taken.
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
    fn there_are_never_more_than_there_may_be() {
        let room = ConnectionLimit::new(Some(2));
        let places = [room.try_acquire(), room.try_acquire(), room.try_acquire()];
        assert_eq!(places.each_ref().map(Option::is_some), [true, true, false]);
        drop(places);
        assert_eq!(room.in_use(), 0);
        assert!(ConnectionLimit::new(Some(0)).try_acquire().is_none());
        assert!(ConnectionLimit::new(None).try_acquire().is_some());
    }

    #[test]
    fn who_is_there_stays_when_there_is_less_room() {
        let room = ConnectionLimit::new(Some(3));
        let mut places: Vec<_> = (0..3).filter_map(|_| room.try_acquire()).collect();
        room.resize(Some(1));
        assert!(room.try_acquire().is_none());
        places.truncate(1);
        assert!(room.try_acquire().is_none());
        places.clear();
        assert!(room.try_acquire().is_some());
    }
}
