//! The checks that a change must pass, and those that take longer.

pub(crate) mod ci;
pub(crate) mod deny;
#[cfg(test)]
mod docs;
pub(crate) mod fuzz;
#[cfg(test)]
mod imports;
pub(crate) mod miri;
pub(crate) mod typos;
