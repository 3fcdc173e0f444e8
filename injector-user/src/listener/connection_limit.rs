//! A limit on concurrent connections that can be changed while connections exist. It holds for the
//! sessions of the sockets and the connections of the inline engine together.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::engine::usage::UsageCounts;

/// A limit on concurrent connections.
#[derive(Debug)]
pub struct ConnectionLimit {
    max: AtomicUsize,
    max_sessions: AtomicUsize,
    sessions: AtomicUsize,
    inline: Option<Arc<dyn UsageCounts>>,
}

/// Counts as one session until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct ConnectionPermit(Arc<ConnectionLimit>);

impl ConnectionLimit {
    /// At most `max` connections, `None` means unlimited. `inline` has those of the inline engine.
    #[must_use]
    pub fn new(max: Option<usize>, inline: Option<Arc<dyn UsageCounts>>) -> Arc<Self> {
        let (unlimited, sessions) = (AtomicUsize::new(usize::MAX), AtomicUsize::new(0));
        let limit = Self { max: AtomicUsize::default(), max_sessions: unlimited, sessions, inline };
        limit.resize(max);
        Arc::new(limit)
    }

    /// Changes the limit. Existing connections stay, even above the new limit.
    pub fn resize(&self, max: Option<usize>) {
        self.max.store(max.unwrap_or(usize::MAX), Ordering::Relaxed);
        if let Some(inline) = &self.inline {
            inline.set_limit(max.and_then(|max| u32::try_from(max).ok()).unwrap_or(u32::MAX));
        }
    }

    /// Changes the limit on sessions alone, for what only they need.
    pub fn resize_sessions(&self, max: usize) {
        self.max_sessions.store(max, Ordering::Relaxed);
    }

    /// Takes a permit for a session, unless a limit is reached.
    #[must_use]
    pub fn try_acquire(self: &Arc<Self>) -> Option<ConnectionPermit> {
        let max = self.max.load(Ordering::Relaxed).saturating_sub(self.inline_connections());
        let max = max.min(self.max_sessions.load(Ordering::Relaxed));
        let acquire = |sessions| if sessions < max { Some(sessions + 1) } else { None };
        self.sessions.fetch_update(Ordering::Relaxed, Ordering::Relaxed, acquire).ok()?;
        if let Some(inline) = &self.inline {
            inline.add_session();
        }
        Some(ConnectionPermit(Arc::clone(self)))
    }

    /// The number of sessions.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// The number of connections that the inline engine carries.
    #[must_use]
    pub fn inline_connections(&self) -> usize {
        self.inline.as_ref().map_or(0, |inline| usize::try_from(inline.established()).unwrap_or(usize::MAX))
    }

    /// Whether sessions and connections of the inline engine have reached the limit together.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        self.sessions() + self.inline_connections() >= self.max.load(Ordering::Relaxed)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::Relaxed);
        if let Some(inline) = &self.0.inline {
            inline.remove_session();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Debug, Default)]
    struct Inline {
        established: AtomicU32,
        sessions: AtomicU32,
        limit: AtomicU32,
    }

    impl UsageCounts for Inline {
        fn established(&self) -> u32 {
            self.established.load(Ordering::Relaxed)
        }

        fn accepted(&self) -> u64 {
            0
        }

        fn add_session(&self) {
            self.sessions.fetch_add(1, Ordering::Relaxed);
        }

        fn remove_session(&self) {
            self.sessions.fetch_sub(1, Ordering::Relaxed);
        }

        fn set_limit(&self, limit: u32) {
            self.limit.store(limit, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_limit_is_never_exceeded() {
        let limit = ConnectionLimit::new(Some(2), None);
        let permits = [limit.try_acquire(), limit.try_acquire(), limit.try_acquire()];
        assert_eq!(permits.each_ref().map(Option::is_some), [true, true, false]);
        drop(permits);
        assert_eq!(limit.sessions(), 0);
        assert!(ConnectionLimit::new(Some(0), None).try_acquire().is_none());
        assert!(ConnectionLimit::new(None, None).try_acquire().is_some());
    }

    #[test]
    fn existing_connections_stay_when_the_limit_shrinks() {
        let limit = ConnectionLimit::new(Some(3), None);
        let mut permits: Vec<_> = (0..3).filter_map(|_| limit.try_acquire()).collect();
        limit.resize(Some(1));
        assert!(limit.try_acquire().is_none());
        permits.truncate(1);
        assert!(limit.try_acquire().is_none());
        permits.clear();
        assert!(limit.try_acquire().is_some());
    }

    #[test]
    fn sessions_and_inline_connections_share_the_limit() {
        let inline = Arc::new(Inline::default());
        let limit = ConnectionLimit::new(Some(3), Some(Arc::clone(&inline) as Arc<dyn UsageCounts>));
        let published = || {
            let Inline { sessions, limit, .. } = &*inline;
            (sessions.load(Ordering::Relaxed), limit.load(Ordering::Relaxed))
        };
        assert_eq!(published(), (0, 3));
        inline.established.store(2, Ordering::Relaxed);
        let permit = limit.try_acquire();
        assert!(permit.is_some() && limit.try_acquire().is_none() && limit.is_reached());
        assert_eq!(published(), (1, 3));
        drop(permit);
        assert_eq!(published(), (0, 3));
        // Inline may be above a limit that has shrunk.
        limit.resize(Some(1));
        assert!(limit.try_acquire().is_none());
        limit.resize(None);
        assert_eq!(published(), (0, u32::MAX));
        assert!(limit.try_acquire().is_some());
    }

    #[test]
    fn a_limit_on_sessions_leaves_inline_alone() {
        let limit = ConnectionLimit::new(Some(5), None);
        limit.resize_sessions(1);
        let permit = limit.try_acquire();
        assert!(permit.is_some() && limit.try_acquire().is_none() && !limit.is_reached());
    }
}
