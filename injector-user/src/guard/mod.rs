//! The guard: banned sources and limits on each source, in front of every engine.

mod chunk_map;
#[cfg_attr(not(feature = "crowdsec"), path = "crowdsec_stub.rs")]
pub mod crowdsec;
mod follower;
mod handle;
pub mod lists;
mod network_list;
mod not_banned;
pub mod origin;
mod prefix_map;
mod reasons;
mod service;
mod shared;
mod state;
mod table;

pub use handle::{Applied, Guard, Protection, Snapshot};
pub use lists::ListStatus;
pub use not_banned::NotBannedSources;
pub use origin::{ListedBan, Origin, WantedBan};
pub use service::{BanCommand, BanError, MAX_BAN, Service, Unbanned, dropped};
