//! The guard: which sources may open connections. Its decisions are the same in BPF programs and in the daemon.

mod ban;
mod count_word;
mod counter;
mod not_banned;
pub mod packet;
mod ports;
mod settings;
mod source;

pub use ban::{Ban, Listed};
pub use count_word::{CountWord, Counted, Enter, SourcePlaces};
pub use counter::Counter;
pub use not_banned::{NOT_BANNED_SLOTS, NotBanned};
pub use ports::{PORT_WORDS, port_bit};
pub use settings::Settings;
pub use source::{Rate, SourceCounts, SourceKey, SourceLimits, Verdict, admit, mask};
