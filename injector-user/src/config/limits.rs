//! `[limits]`

use super::parse::section::Section;

/// `[limits]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The limit of concurrent connections over all listeners; at least 1.
    pub max_connections: usize,
    /// Worker threads, 1 to [`Limits::MAX_WORKERS`]. The default is the number of processors.
    pub workers: usize,
}

impl Limits {
    /// More threads do not improve throughput.
    pub const MAX_WORKERS: usize = 64;
}

impl Default for Limits {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self { max_connections: 10_000, workers: processors.min(Self::MAX_WORKERS) }
    }
}

pub(super) fn read(section: Section<'_>) -> Limits {
    let mut limits = Limits::default();
    limits.max_connections = section.count("max_connections").unwrap_or(limits.max_connections);
    let workers = section.integer("workers", 1, Limits::MAX_WORKERS as u64);
    limits.workers = workers.and_then(|(_, given)| usize::try_from(given).ok()).unwrap_or(limits.workers);
    section.finish();
    limits
}
