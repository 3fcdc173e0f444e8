//! Tools that are missing, and what they are needed for.

use super::{cargo_deb, cluster, kernels, linker, wheel::Wheel};

/// A missing tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Missing {
    /// A Debian package.
    Package { name: String, why: String },
    /// rustup's nightly, or one of its components.
    Nightly { present: bool, component: &'static str, why: &'static str },
    /// A name by which rustup runs `/usr/bin/rustc`.
    Link { name: &'static str },
    /// bpf-linker for this LLVM, which can be built here.
    Linker { llvm: u32 },
    /// A version of HAProxy, from another Debian release.
    HaProxy { series: &'static str, suite: &'static str },
    /// A server of the tests that is not installed: a mail server beside Postfix, CrowdSec, fail2ban.
    Receiver { package: &'static str, server: &'static str },
    /// One of Debian's kernels.
    Kernel(kernels::Wanted),
    /// cargo-deb, which can be built here.
    CargoDeb,
    /// bpf-linker, if there is no LLVM to build it with.
    LinkerByHand { llvm: u32 },
    /// The validators of the manifests for Kubernetes.
    Kubernetes,
    /// A part of what a cluster is started from.
    Cluster(cluster::Part),
    /// A program that PyPI has.
    Wheel(&'static Wheel),
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Package { name, why } => write!(f, "package {name}: {why}"),
            Self::Nightly { present: false, component, why } => {
                write!(f, "rustup's nightly with {component}: {why}")
            }
            Self::Nightly { present: true, component, why } => {
                write!(f, "component {component} of rustup's nightly: {why}")
            }
            Self::HaProxy { series, suite } => {
                write!(f, "HAProxy {series}, as Debian {suite} has it: for the benchmark")
            }
            Self::Receiver { package, server } => {
                write!(f, "package {package}, unpacked beside the system: {server} with the injector")
            }
            Self::Kernel(wanted) => write!(f, "Debian's kernel {wanted}: trials in other kernels"),
            Self::Kubernetes => f.write_str(
                "kubectl, helm, kubernetes-validate, checkov: validating the manifests for Kubernetes",
            ),
            Self::Cluster(part) => write!(f, "{}: a cluster on this machine", part.name()),
            Self::Wheel(wheel) => write!(f, "{} {}: {}", wheel.program, wheel.version, wheel.why),
            Self::CargoDeb => write!(f, "cargo-deb {}: making the Debian package", cargo_deb::VERSION),
            Self::Link { name } => write!(f, "rustup toolchain `{name}`: a name for /usr/bin/rustc"),
            Self::Linker { llvm } | Self::LinkerByHand { llvm } => {
                write!(f, "bpf-linker {} (LLVM {llvm}): linking the BPF programs", linker::VERSION)
            }
        }
    }
}
