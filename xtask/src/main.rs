//! The project's own commands: `cargo xtask <verb>`, one module per verb.

mod bench;
mod build;
mod cargo;
mod check;
mod cluster;
mod demo;
mod interruption;
mod kernels;
mod observe;
mod release;
mod reported;
#[cfg(test)]
mod script;
mod setup;
mod soak;
mod test;
mod test_output;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::{
    check::{ci, deny, fuzz, miri, typos},
    release::{image, install, kubernetes, package},
    reported::AlreadyReported,
};

/// Build, test, measure and package the injector
///
/// Each command first installs the tools that it needs. On a fresh machine `cargo xtask demo` is
/// enough.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install the tools that build, demo and tests need; fast if none is missing
    Setup(setup::SetupArgs),
    /// Build the daemon with its BPF programs
    Build(build::BuildArgs),
    /// Install the daemon on this host, with its systemd unit
    Install(install::InstallArgs),
    /// Remove what `install` installed
    Uninstall(install::UninstallArgs),
    /// Make an OCI image, without a registry
    Image(image::ImageArgs),
    /// Make a Debian package and check its contents
    Package(package::PackageArgs),
    /// Send and fetch mail through the injector in network namespaces, and check the result
    Demo(demo::DemoArgs),
    /// Run the unit tests, then the privileged tests with real mail servers
    Test(test::TestArgs),
    /// Run random sessions through the daemon and compare every byte
    Soak(soak::SoakArgs),
    /// Compare the engines with HAProxy, nginx and kernel NAT in network namespaces
    Bench(bench::BenchArgs),
    /// Boot Debian's kernels in virtual machines, and run self-tests and trials in them
    Kernels(kernels::KernelsArgs),
    /// Start a Kubernetes cluster on this machine and run trials of the injector in it
    Cluster(cluster::ClusterArgs),
    /// Check alerts and dashboard with Prometheus' tools, optionally in a live run
    Observe(observe::ObserveArgs),
    /// Run one end of the load generator in a namespace of the benchmark
    #[command(name = injector_bench::load_process::ARGUMENT, hide = true)]
    LoadEnd {
        /// Which end, and its job
        arguments: Vec<String>,
    },
    /// Validate manifests and chart with schemas, kustomize, helm, a policy scanner and `injector
    /// check`
    Kubernetes(kubernetes::KubernetesArgs),
    /// Check the spelling of code and documentation
    Typos(typos::TyposArgs),
    /// Check licences, duplicates and sources of the dependencies
    Deny(deny::DenyArgs),
    /// Run the parsers' tests under Miri to find undefined behaviour; takes minutes
    Miri(miri::MiriArgs),
    /// Fuzz the parser of PROXY headers
    Fuzz(fuzz::FuzzArgs),
    /// Run all checks that a change must pass: format, spelling, dependencies, lints, docs, build,
    /// tests
    Ci,
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Setup(args) => setup::run(&args),
        Verb::Build(args) => build::run(&args),
        Verb::Install(args) => install::install(&args),
        Verb::Uninstall(args) => install::uninstall(&args),
        Verb::Image(args) => image::run(&args),
        Verb::Package(args) => package::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Kernels(args) => kernels::run(&args),
        Verb::Cluster(args) => cluster::run(&args),
        Verb::Observe(args) => observe::run(&args),
        Verb::LoadEnd { arguments } => bench::end(&arguments),
        Verb::Kubernetes(args) => kubernetes::run(&args),
        Verb::Typos(args) => typos::run(&args),
        Verb::Deny(args) => deny::run(&args),
        Verb::Miri(args) => miri::run(&args),
        Verb::Fuzz(args) => fuzz::run(&args),
        Verb::Ci => ci::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is::<AlreadyReported>() {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
