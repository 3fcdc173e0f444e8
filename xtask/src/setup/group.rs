//! Groups of tools, which can be installed separately.

/// What tools are needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Group {
    /// Compiler and linker of the BPF programs
    Bpf,
    /// Tools of the demo, other than those of the build
    Demo,
    /// Mail servers and clients of the tests
    Mail,
    /// Proxies that the benchmark compares with, other than those of the tests
    Bench,
    /// Debian's kernels, and an emulator to boot them in
    Kernels,
    /// Validators of the manifests for Kubernetes
    Kubernetes,
    /// A Kubernetes to start here, for `cargo xtask cluster`
    Cluster,
    /// Prometheus and its exporters, for `cargo xtask observe`
    Observe,
    /// Tools that make the Debian package
    Package,
    /// Tools that make an image from Debian's packages, and run it
    Image,
    /// Spelling and dependency checks
    Lint,
    /// cargo-fuzz, and a nightly to compile with
    Fuzz,
    /// Rust's interpreter, which finds undefined behaviour
    Miri,
}

impl Group {
    /// The default groups.
    pub(crate) const USUAL: [Self; 3] = [Self::Bpf, Self::Demo, Self::Mail];
}
