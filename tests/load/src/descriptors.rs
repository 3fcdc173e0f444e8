//! The limit on open descriptors.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit to the hard one: thousands of idle connections are one descriptor each.
pub(crate) fn raise_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // If this fails, a connection above the limit reports an error.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
