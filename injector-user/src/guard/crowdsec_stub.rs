//! In place of the CrowdSec feed, in a build without the feature `crowdsec`.

use std::io;

use super::Guard;
use crate::{
    config::CrowdSec,
    telemetry::{log::target, metrics::CrowdSecMetrics},
};

const MISSING: &str = "guard.crowdsec is set, but this injector was built without the feature `crowdsec`: remove the table, or use another build";

/// No feed.
#[derive(Debug)]
pub struct Feed(());

impl Feed {
    /// # Errors
    /// When there are settings.
    pub fn start(
        settings: Option<CrowdSec>,
        _table: Guard,
        _max_bans: usize,
        _metrics: CrowdSecMetrics,
    ) -> io::Result<Self> {
        if settings.is_some() { Err(io::Error::other(MISSING)) } else { Ok(Self(())) }
    }

    /// Logs an error when there are settings.
    pub fn configure(&self, settings: Option<CrowdSec>) {
        if settings.is_some() {
            tracing::error!(target: target::GUARD, "{MISSING}");
        }
    }
}
