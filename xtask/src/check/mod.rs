//! What must hold before a change lands.

pub(crate) mod ci;
pub(crate) mod deny;
pub(crate) mod fuzz;
pub(crate) mod miri;
pub(crate) mod typos;
