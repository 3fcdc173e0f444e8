//! A limit on how many there may be at one time, which can be changed while some are there.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// So many places.
#[derive(Debug)]
pub struct Room {
    most: AtomicUsize,
    taken: AtomicUsize,
}

/// One of them, until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Place(Arc<Room>);

impl Room {
    /// For at most `most`; `None` is no limit.
    #[must_use]
    pub fn new(most: Option<usize>) -> Arc<Self> {
        Arc::new(Self { most: AtomicUsize::new(most.unwrap_or(usize::MAX)), taken: AtomicUsize::new(0) })
    }

    /// Changes the limit. Who is there stays, even if that is more than there may be from here on.
    pub fn resize(&self, most: Option<usize>) {
        self.most.store(most.unwrap_or(usize::MAX), Ordering::Relaxed);
    }

    /// A place, if there is one left.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Option<Place> {
        let most = self.most.load(Ordering::Relaxed);
        let enter = |taken| if taken < most { Some(taken + 1) } else { None };
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).ok()?;
        Some(Place(Arc::clone(self)))
    }

    /// How many are taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_never_more_than_there_may_be() {
        let room = Room::new(Some(2));
        let places = [room.enter(), room.enter(), room.enter()];
        assert_eq!(places.each_ref().map(Option::is_some), [true, true, false]);
        drop(places);
        assert_eq!(room.taken(), 0);
        assert!(Room::new(Some(0)).enter().is_none());
        assert!(Room::new(None).enter().is_some());
    }

    #[test]
    fn who_is_there_stays_when_there_is_less_room() {
        let room = Room::new(Some(3));
        let mut places: Vec<_> = (0..3).filter_map(|_| room.enter()).collect();
        room.resize(Some(1));
        assert!(room.enter().is_none());
        places.truncate(1);
        assert!(room.enter().is_none());
        places.clear();
        assert!(room.enter().is_some());
    }
}
