//! The groups of tools that can be asked for one by one.

/// What something is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Group {
    /// Building the BPF programs
    Bpf,
    /// The demo, beside the build
    Demo,
    /// The mail servers and clients of the tests
    Mail,
    /// Those that the benchmark compares with, beside the mail servers
    Bench,
    /// What validates the manifests for Kubernetes
    Kubernetes,
    /// Prometheus and what feeds it, for `cargo xtask observe`
    Observe,
    /// What makes the Debian package
    Package,
    /// What makes an image from Debian's packages, and runs it
    Image,
    /// Spelling and dependency checks
    Lint,
    /// cargo-fuzz, and a nightly to compile with
    Fuzz,
    /// Rust's interpreter, which finds undefined behaviour
    Miri,
}

impl Group {
    /// What is installed unless one asks for more: the benchmark is not everybody's, and its needs
    /// are large.
    pub(crate) const USUAL: [Self; 3] = [Self::Bpf, Self::Demo, Self::Mail];
}
