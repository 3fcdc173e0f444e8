//! The counters of the guard's programs.

/// What the programs have dropped. The value is an index of the per-CPU array `GUARD_COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// A packet of a banned source, at the driver.
    Xdp,
    /// A packet of a banned source, at the ingress of a device.
    Tc,
    /// A SYN of a banned source that engine inline would have taken.
    Inline,
}

impl Counter {
    /// All of them, in the order of their indices.
    pub const ALL: [Self; 3] = [Self::Xdp, Self::Tc, Self::Inline];

    /// The label `hook` of `injector_guard_dropped_packets_total`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
            Self::Inline => "inline",
        }
    }
}
