//! What attaching the program to a device has changed, or why it failed.

pub(in crate::engine) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What attaching has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Change {
    /// Nothing.
    None,
    /// The program was not there.
    Attached,
    /// An earlier daemon's was.
    Replaced,
    /// Another program ran before it; it does not any more.
    Moved,
    /// Another program runs before it.
    Behind,
}
