//! Chooses the compiler of the BPF programs.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::packages;

/// The target the programs are compiled for: BPF of the host's byte order.
pub(crate) const BPF_TARGET: &str =
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// The variable that names the toolchain to use, whatever else is present.
pub(super) const CHOICE: &str = "INJECTOR_BPF_TOOLCHAIN";

/// rustup's name of its nightly.
pub(super) const NIGHTLY: &str = "nightly";

/// The output of `rustc -vV`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compiler {
    /// Major and minor.
    pub(super) release: (u32, u32),
    /// Whether it is of the nightly channel, which has `-Z build-std`.
    nightly: bool,
    /// The major of the LLVM whose bitcode it writes.
    pub(super) llvm: u32,
}

impl Compiler {
    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| {
            text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": ")).map(str::trim)
        };
        let release = value("release")?;
        let mut numbers = release.split(['.', '-']);
        Some(Self {
            release: (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?),
            nightly: release.contains("nightly") || release.contains("dev"),
            llvm: value("LLVM version")?.split('.').next()?.parse().ok()?,
        })
    }
}

/// A compiler, and in which forms it has `core`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) compiler: Compiler,
    /// Whether its sysroot has a compiled `core` for BPF.
    prebuilt: bool,
    /// Whether its sysroot has the source of `core`.
    source: bool,
}

/// How a toolchain gets `core` for BPF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Core {
    /// It has a compiled one.
    Prebuilt,
    /// It compiles the source, which only a nightly can.
    Built,
}

impl Candidate {
    /// Examines a compiler; `None` if it does not run.
    fn ask(rustc: impl Fn() -> Command) -> Option<Self> {
        let answer = |argument: &[&str]| {
            let output = rustc().args(argument).output().ok().filter(|output| output.status.success())?;
            String::from_utf8(output.stdout).ok()
        };
        let compiler = Compiler::parse(&answer(&["-vV"])?)?;
        let sysroot = PathBuf::from(answer(&["--print", "sysroot"])?.trim());
        Some(Self { compiler, prebuilt: has_prebuilt(&sysroot), source: has_source(&sysroot) })
    }

    /// How it would compile BPF, or why it can't.
    pub(super) fn core(&self, oldest: (u32, u32)) -> Result<Core, String> {
        let (major, minor) = self.compiler.release;
        if self.compiler.release < oldest {
            return Err(format!(
                "is rustc {major}.{minor}, and {}.{} is the oldest supported release",
                oldest.0, oldest.1
            ));
        }
        match self {
            // aya-build compiles `core` with every nightly, so a nightly needs the source.
            Self { compiler: Compiler { nightly: true, .. }, source: true, .. } => Ok(Core::Built),
            Self { compiler: Compiler { nightly: true, .. }, .. } => {
                Err("lacks the component rust-src".into())
            }
            Self { prebuilt: true, .. } => Ok(Core::Prebuilt),
            _ => Err(format!("is not a nightly, and has no prebuilt `core` for {BPF_TARGET}")),
        }
    }
}

fn has_prebuilt(sysroot: &Path) -> bool {
    let libraries = sysroot.join("lib/rustlib").join(BPF_TARGET).join("lib");
    let is_core = |name: &str| name.starts_with("libcore-") && name.ends_with(".rlib");
    fs::read_dir(libraries)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| is_core(&entry.file_name().to_string_lossy()))
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

/// The oldest compiler that the workspace supports.
pub(super) fn oldest() -> (u32, u32) {
    let mut numbers = env!("CARGO_PKG_RUST_VERSION").split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// A program of a rustup toolchain.
pub(super) fn rustup_run(toolchain: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("rustup");
    // Setup reports what is missing. rustup must not download a toolchain or print a backtrace.
    command.args(["run", toolchain]).arg(program).env("RUSTUP_LOG", "warn").env_remove("RUST_BACKTRACE");
    command
}

/// A program that runs with rustup's nightly.
pub(crate) fn nightly(program: impl AsRef<OsStr>) -> Command {
    let mut command = rustup_run(NIGHTLY, program);
    crate::cargo::forget_this_package(&mut command);
    // The cargo that runs this program is not a nightly.
    for name in ["CARGO", "RUSTC", "RUSTDOC"] {
        command.env_remove(name);
    }
    command
}

/// The components of a rustup toolchain; `None` if rustup does not have the toolchain.
pub(super) fn components(toolchain: &str) -> Option<Vec<String>> {
    let mut command = Command::new("rustup");
    command.args(["component", "list", "--installed", "--toolchain", toolchain]);
    let output = command.env_remove("RUST_BACKTRACE").output().ok()?;
    let text = output.status.success().then(|| String::from_utf8(output.stdout).ok())??;
    Some(text.lines().map(str::to_owned).collect())
}

fn ask_rustup(toolchain: &str) -> Option<Candidate> {
    Candidate::ask(|| rustup_run(toolchain, "rustc"))
}

/// The compilers of this machine.
#[derive(Debug, Default)]
pub(super) struct Machine {
    /// `INJECTOR_BPF_TOOLCHAIN`, and that toolchain if rustup has it.
    pub(super) chosen: Option<(String, Option<Candidate>)>,
    /// The distribution's own compiler, `/usr/bin/rustc`.
    pub(super) system: Option<Candidate>,
    /// rustup's `nightly`; examined only if the system's own is not usable.
    pub(super) nightly: Option<Candidate>,
    /// Whether apt has a usable `rustc-web` with `core` for BPF; examined only if it matters.
    pub(super) offered: bool,
}

/// The compiler to use for BPF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CompilerSource {
    /// A toolchain that rustup knows by this name.
    Rustup { name: String, core: Core, llvm: u32 },
    /// `/usr/bin/rustc`, for which rustup needs a name.
    System { llvm: u32 },
    /// Debian's compiler, which must be installed first.
    InstallSystem,
    /// rustup's nightly, which must be installed first, with its source.
    InstallNightly { present: bool },
}

/// Chooses the operator's toolchain, else one that is present, else Debian's compiler, else a
/// nightly.
///
/// # Errors
/// When the operator's toolchain is not usable.
pub(super) fn choose(machine: &Machine, oldest: (u32, u32)) -> Result<CompilerSource> {
    let usable = |candidate: &Option<Candidate>| {
        let candidate = candidate.as_ref()?;
        Some((candidate.core(oldest).ok()?, candidate.compiler.llvm))
    };
    if let Some((name, candidate)) = &machine.chosen {
        let Some(candidate) = candidate else {
            bail!("{CHOICE}={name}: rustup has no such toolchain; `rustup toolchain list` shows what it has");
        };
        return match candidate.core(oldest) {
            Ok(core) => {
                Ok(CompilerSource::Rustup { name: name.clone(), core, llvm: candidate.compiler.llvm })
            }
            Err(why) => bail!("{CHOICE}={name}: this toolchain cannot compile for BPF: it {why}"),
        };
    }
    if let Some((_, llvm)) = usable(&machine.system) {
        return Ok(CompilerSource::System { llvm });
    }
    if let Some((core, llvm)) = usable(&machine.nightly) {
        return Ok(CompilerSource::Rustup { name: "nightly".into(), core, llvm });
    }
    if machine.offered {
        return Ok(CompilerSource::InstallSystem);
    }
    Ok(CompilerSource::InstallNightly { present: machine.nightly.is_some() })
}

/// Examines this machine. `offered` is slow, so it is called last.
pub(super) fn look(offered: impl FnOnce() -> bool) -> Result<Machine> {
    if packages::program("rustup").is_none() {
        bail!(
            "rustup is not in PATH: it runs the compiler for BPF beside yours; install it from your distribution or rustup.rs"
        );
    }
    let mut machine = Machine::default();
    if let Some(name) = std::env::var_os(CHOICE).filter(|name| !name.is_empty()) {
        let name = name.into_string().ok().with_context(|| format!("{CHOICE} is not UTF-8"))?;
        let candidate = ask_rustup(&name);
        machine.chosen = Some((name, candidate));
        return Ok(machine);
    }
    let is_usable =
        |candidate: &Option<Candidate>| candidate.as_ref().is_some_and(|it| it.core(oldest()).is_ok());
    machine.system = Candidate::ask(|| Command::new("/usr/bin/rustc"));
    if !is_usable(&machine.system) {
        machine.nightly = ask_rustup("nightly");
        machine.offered = !is_usable(&machine.nightly) && offered();
    }
    Ok(machine)
}

/// rustup's name of the system's compiler, and whether it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    Made(&'static str),
    Wanted(&'static str),
}

/// The name `bpf`, unless the operator uses it for another toolchain.
pub(super) fn system_link() -> Result<Link> {
    for name in ["bpf", "injector-bpf"] {
        let Ok(output) = rustup_run(name, "rustc").args(["--print", "sysroot"]).output() else { continue };
        if !output.status.success() {
            return Ok(Link::Wanted(name));
        }
        if String::from_utf8_lossy(&output.stdout).trim() == "/usr" {
            return Ok(Link::Made(name));
        }
    }
    bail!(
        "rustup has toolchains `bpf` and `injector-bpf`, and neither is /usr: name the one to use in {CHOICE}"
    )
}

/// Checks that `rustup run NAME cargo` works. A linked toolchain has no cargo, so rustup runs that
/// of its nightly, beta or stable.
pub(super) fn has_cargo(name: &str) -> Result<()> {
    let output = rustup_run(name, "cargo").arg("--version").output().context("cannot start rustup")?;
    if !output.status.success() {
        bail!(
            "toolchain `{name}` has no cargo (rustup would run that of nightly, beta or stable): \
             `rustup toolchain install stable`"
        );
    }
    Ok(())
}

/// The LLVM major of a package that depends on `libllvmNN`, from `apt-cache show`.
pub(super) fn llvm_of_package(description: &str) -> Option<u32> {
    let depends = description.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    depends.split([',', '|']).find_map(|word| {
        let digits = word.trim().strip_prefix("libllvm")?;
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    })
}

/// The Rust release of a package, from `apt-cache show`.
pub(super) fn release_of_package(description: &str) -> Option<(u32, u32)> {
    let version = description.lines().find_map(|line| line.strip_prefix("Version: "))?;
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STABLE: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
        commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\n\
        LLVM version: 22.1.8\n";
    const OLDEST: (u32, u32) = (1, 95);

    fn candidate(release: &str, prebuilt: bool, source: bool) -> Option<Candidate> {
        let compiler =
            Compiler::parse(&STABLE.replace("release: 1.96.0", &format!("release: {release}"))).unwrap();
        Some(Candidate { compiler, prebuilt, source })
    }

    fn way(machine: &Machine) -> CompilerSource {
        choose(machine, OLDEST).unwrap()
    }

    #[test]
    fn the_version_of_a_compiler_is_parsed() {
        assert_eq!(Compiler::parse(STABLE), Some(Compiler { release: (1, 96), nightly: false, llvm: 22 }));
        let nightly =
            STABLE.replace("release: 1.96.0", "release: 1.97.0-nightly").replace("22.1.8", "23.0.0-rust");
        assert_eq!(Compiler::parse(&nightly), Some(Compiler { release: (1, 97), nightly: true, llvm: 23 }));
        assert_eq!(Compiler::parse("rustc 1.96.0"), None);
        assert_eq!(Compiler::parse(""), None);
    }

    #[test]
    fn the_systems_compiler_comes_before_a_nightly() {
        let machine = Machine {
            system: candidate("1.96.0", true, false),
            nightly: candidate("1.97.0-nightly", false, true),
            ..Machine::default()
        };
        assert_eq!(way(&machine), CompilerSource::System { llvm: 22 });
    }

    #[test]
    fn a_nightly_counts_only_with_its_source() {
        let with = Machine {
            nightly: candidate("1.97.0-nightly", false, true),
            offered: true,
            ..Machine::default()
        };
        assert_eq!(
            way(&with),
            CompilerSource::Rustup { name: "nightly".into(), core: Core::Built, llvm: 22 }
        );
        let without = candidate("1.97.0-nightly", false, false);
        let offered = Machine { nightly: without.clone(), offered: true, ..Machine::default() };
        assert_eq!(way(&offered), CompilerSource::InstallSystem);
        let elsewhere = Machine { nightly: without, ..Machine::default() };
        assert_eq!(way(&elsewhere), CompilerSource::InstallNightly { present: true });
        assert_eq!(way(&Machine::default()), CompilerSource::InstallNightly { present: false });
    }

    #[test]
    fn an_old_compiler_or_one_without_core_is_replaced() {
        for system in [candidate("1.85.0", true, false), candidate("1.96.0", false, false)] {
            assert_eq!(
                way(&Machine { system, offered: true, ..Machine::default() }),
                CompilerSource::InstallSystem
            );
        }
    }

    #[test]
    fn the_operators_choice_is_used_or_rejected_with_a_reason() {
        let chosen = |candidate: Option<Candidate>| Machine {
            chosen: Some(("mine".into(), candidate)),
            system: self::candidate("1.96.0", true, false),
            ..Machine::default()
        };
        assert_eq!(
            way(&chosen(candidate("1.99.0", true, false))),
            CompilerSource::Rustup { name: "mine".into(), core: Core::Prebuilt, llvm: 22 }
        );
        for (candidate, reason) in [
            (None, "no such toolchain"),
            (candidate("1.97.0-nightly", false, false), "rust-src"),
            (candidate("1.97.0", false, true), "not a nightly"),
            (candidate("1.85.0", true, true), "1.95 is the oldest supported"),
        ] {
            let error = choose(&chosen(candidate), OLDEST).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("INJECTOR_BPF_TOOLCHAIN=mine"), "{error}");
        }
    }

    #[test]
    fn core_is_found_by_its_files() {
        let sysroot = tempfile::tempdir().unwrap();
        assert!(!has_prebuilt(sysroot.path()) && !has_source(sysroot.path()));
        let libraries = sysroot.path().join("lib/rustlib").join(BPF_TARGET).join("lib");
        fs::create_dir_all(&libraries).unwrap();
        fs::write(libraries.join("libcompiler_builtins-1.rlib"), "").unwrap();
        assert!(!has_prebuilt(sysroot.path()));
        fs::write(libraries.join("libcore-1.rlib"), "").unwrap();
        assert!(has_prebuilt(sysroot.path()));
    }

    #[test]
    fn a_packages_llvm_and_release_are_known_before_it_is_installed() {
        let description = "Package: libstd-rust-web-1.96\nVersion: 1.96.0+dfsg1-1~deb12u2\n\
            Depends: libc6 (>= 2.34), libllvm22 (>= 1:22.1.0), libstdc++6 (>= 11)\nDescription: Rust\n";
        assert_eq!(llvm_of_package(description), Some(22));
        assert_eq!(release_of_package(description), Some((1, 96)));
        assert_eq!(llvm_of_package("Depends: libc6\n"), None);
        assert_eq!(release_of_package(""), None);
    }

    #[test]
    fn the_workspace_states_the_oldest_compiler() {
        assert!(oldest() >= (1, 85), "edition 2024 needs 1.85: {:?}", oldest());
    }
}
