//! SIGINT, SIGTERM and SIGHUP, while something must be undone before this program ends.

use std::sync::atomic::{AtomicBool, Ordering};

/// Set by the first of these signals.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// While it exists, these signals are noted and do not end this program.
pub(crate) struct Signals {
    before: [(libc::c_int, libc::sighandler_t); 3],
}

impl Signals {
    pub(crate) fn take() -> Self {
        let before = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].map(|signal| {
            // SAFETY: the handler only stores to an atomic, which is async-signal-safe, and has the
            // type that signal(2) wants. A handler, unlike SIG_IGN, is not inherited by the
            // programs that are started.
            (signal, unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) })
        });
        Self { before }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, handler) in self.before.iter().filter(|(_, handler)| *handler != libc::SIG_ERR) {
            // SAFETY: the handler is the one that signal(2) itself returned for this signal.
            unsafe { libc::signal(*signal, *handler) };
        }
    }
}

/// Whether one of the signals has arrived.
pub(crate) fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
