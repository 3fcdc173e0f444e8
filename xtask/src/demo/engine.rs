//! The engines that the demo shows.

/// What carries the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Engine {
    /// The kernel, between two sockets (sockmap); needs root
    Splice,
    /// The daemon, by read and write
    Relay,
}

impl Engine {
    /// Its name in the daemon's configuration and log.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Splice => "splice",
            Self::Relay => "relay",
        }
    }
}
