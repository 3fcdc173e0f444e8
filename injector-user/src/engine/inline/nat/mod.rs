//! `nat = "managed"`: one nftables table of the daemon's that forwards connections to the backends.
//!
//! [`ruleset`] turns services into rules and changes nothing; [`Ruleset::apply`] makes them the
//! whole contents of the table in one transaction; [`remove`] deletes the table. The daemon writes
//! to no other table.
//!
//! The table is of family `inet` and has two chains:
//! - `prerouting` (nat, priority dstnat) has one rule per listening address: DNAT to the backend of
//!   that family, or to one of several by `numgen random`. Packets of the host itself do not pass
//!   it.
//! - `postrouting` (nat, priority srcnat) masquerades what `prerouting` has forwarded, for services
//!   that need it.
//!
//! Only the first packet of a connection meets these rules; conntrack stores the outcome. So
//! established connections survive a replacement, also by an empty ruleset, which lets them finish.
//! They do not survive [`remove`]: with the last rule of all tables that needs connection tracking,
//! or the last nat chain, the kernel stops translating.
//!
//! Needs `nft` 0.9.7 or newer, and Linux 5.7 or newer for `iif` in postrouting (kernel commit
//! 28f8bfd1ac94).

mod compare;
mod nft;
mod rules;
mod ruleset;
mod service;
#[cfg(test)]
mod tests;

pub use self::{
    nft::{DroppingChain, NftError, chains_that_drop_forwarded, exists, remove},
    ruleset::{Change, Ruleset, ruleset},
    service::{Backend, NatError, Service, TableName},
};
