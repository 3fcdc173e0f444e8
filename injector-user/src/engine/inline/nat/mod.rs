//! `nat = "managed"`: one nftables table that belongs to the daemon and sends connections on to the backends.
//!
//! [`ruleset`] turns services into rules, without touching anything; [`Ruleset::apply`] makes them the table's whole
//! contents in one transaction; [`remove`] takes the table away. No other table is ever written to.
//!
//! The table is of family `inet` and has two chains:
//! - `prerouting` (nat, priority dstnat) has one rule per listening address: DNAT to the backend of that family, or to
//!   one of several by `numgen random`. What starts on the host itself never passes it.
//! - `postrouting` (nat, priority srcnat) masquerades what `prerouting` has sent on, for services that ask for it.
//!
//! Only the first packet of a connection meets these rules; conntrack remembers the outcome. So established connections
//! outlive a replacement, also by an empty ruleset, with which they can be let finish. They do not outlive [`remove`]: with
//! the last rule of all tables that needs connection tracking, or the last nat chain, the kernel stops translating.
//!
//! Needs `nft` 0.9.7 or newer, and Linux 5.7 or newer for `iif` in postrouting (kernel commit 28f8bfd1ac94).

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
