//! The error of a verb that has printed its reason.

/// The verb has failed and has printed the reason.
#[derive(Debug)]
pub(crate) struct AlreadyReported;

impl std::fmt::Display for AlreadyReported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failed; the reason is printed above")
    }
}

impl std::error::Error for AlreadyReported {}
