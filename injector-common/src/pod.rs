//! The map ABI as aya's plain data.

use zerocopy::{FromBytes, IntoBytes};

use crate::{guard, inline, splice};

/// Implements `Pod` for types whose layout zerocopy has checked.
macro_rules! pod {
    ($($value:ty),* $(,)?) => {$(
        const _: () = plain::<$value>();

        // SAFETY: `plain` accepts only types without padding, of which every bit pattern is valid.
        unsafe impl aya::Pod for $value {}
    )*};
}

const fn plain<T: FromBytes + IntoBytes>() {}

pod!(
    guard::Ban,
    guard::Rate,
    guard::Settings,
    guard::SourceCounts,
    guard::SourceKey,
    guard::SourceLimits,
    inline::Address,
    inline::Backend,
    inline::BackendTable,
    inline::Entry,
    inline::Event,
    inline::Flow,
    inline::Key,
    inline::Listener,
    inline::Settings,
    inline::Template,
    inline::Usage,
    splice::Credit,
    splice::Flow,
    splice::Header,
);
