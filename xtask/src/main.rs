//! The project's own commands: `cargo xtask <verb>`, one verb per file.

mod bench;
mod build;
mod cargo;
mod check;
mod demo;
mod observe;
mod release;
#[cfg(test)]
mod script;
mod setup;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::{
    check::{ci, deny, fuzz, miri, typos},
    release::{image, install, kubernetes, package},
};

/// The injector's workbench.
///
/// Every verb first sees to it that what it needs is there, so on a fresh machine `cargo xtask demo` is all there is
/// to type.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Find or install what building, the demo and the tests need; fast when nothing is missing
    Setup(setup::SetupArgs),
    /// Build the daemon, BPF programs included
    Build(build::BuildArgs),
    /// Install the daemon on this host, with its systemd unit
    Install(install::InstallArgs),
    /// Remove what `install` installed
    Uninstall(install::UninstallArgs),
    /// Make an OCI image without a registry, and run it
    Image(image::ImageArgs),
    /// Make a Debian package, and try what is in it
    Package(package::PackageArgs),
    /// Watch mail go through the injector, in network namespaces of its own
    Demo(demo::DemoArgs),
    /// Run the unit tests, then the privileged ones against real mail servers
    Test(test::TestArgs),
    /// Run random sessions through the daemon for minutes, and compare every byte
    Soak(soak::SoakArgs),
    /// Compare the engines with HAProxy, nginx and kernel NAT, in network namespaces of its own
    Bench(bench::BenchArgs),
    /// Check alerts and dashboard with Prometheus' own tools, or by a live run
    Observe(observe::ObserveArgs),
    /// One end of the load generator, in one of bench's namespaces
    #[command(name = injector_bench::load_process::ARGUMENT, hide = true)]
    LoadEnd {
        /// Which, and what it is to do
        arguments: Vec<String>,
    },
    /// Validate the manifests and the chart: schemas, kustomize, helm, a policy scanner, `injector check`
    Kubernetes(kubernetes::KubernetesArgs),
    /// Check the spelling of code and documentation
    Typos(typos::TyposArgs),
    /// Check licences, duplicates and sources of the dependencies
    Deny(deny::DenyArgs),
    /// Run the parsers' tests under Miri, which finds undefined behaviour; takes minutes
    Miri(miri::MiriArgs),
    /// Fuzz the parser of PROXY headers for a few seconds
    Fuzz(fuzz::FuzzArgs),
    /// Everything that must hold before a change lands: format, lint, docs, build, test
    Ci,
}

/// The verb has failed and has already said why.
#[derive(Debug)]
pub(crate) struct AlreadyReported;

impl std::fmt::Display for AlreadyReported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failed, as said above")
    }
}

impl std::error::Error for AlreadyReported {}

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
