//! Which compiler makes the BPF programs.

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

/// Names the toolchain to use, whatever else is there.
pub(super) const CHOICE: &str = "INJECTOR_BPF_TOOLCHAIN";

/// What rustup calls its nightly.
pub(super) const NIGHTLY: &str = "nightly";

/// What `rustc -vV` says about a compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Compiler {
    /// Major and minor.
    pub(super) release: (u32, u32),
    /// Of the nightly channel, which has `-Z build-std`.
    nightly: bool,
    /// Major of the LLVM whose bitcode it writes.
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

/// A compiler together with what it has of `core`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) compiler: Compiler,
    /// `core` for BPF, compiled, lies in its sysroot.
    prebuilt: bool,
    /// The source of `core` lies in its sysroot.
    source: bool,
}

/// How a toolchain comes by `core` for BPF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Core {
    /// It has it.
    Prebuilt,
    /// It compiles it, which only a nightly does.
    Built,
}

impl Candidate {
    /// Asks a compiler; none when it doesn't run.
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
                "is rustc {major}.{minor}, and {}.{} is the oldest that will do",
                oldest.0, oldest.1
            ));
        }
        match self {
            // aya-build compiles `core` with every nightly, so there the source is what counts.
            Self { compiler: Compiler { nightly: true, .. }, source: true, .. } => Ok(Core::Built),
            Self { compiler: Compiler { nightly: true, .. }, .. } => {
                Err("lacks the component rust-src".into())
            }
            Self { prebuilt: true, .. } => Ok(Core::Prebuilt),
            _ => Err(format!("is no nightly, and has no prebuilt `core` for {BPF_TARGET}")),
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

/// The oldest compiler the workspace says it builds with.
pub(super) fn oldest() -> (u32, u32) {
    let mut numbers = env!("CARGO_PKG_RUST_VERSION").split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// A program out of a rustup toolchain.
pub(super) fn rustup_run(toolchain: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("rustup");
    // What is missing is said by setup; rustup shall neither fetch a toolchain unasked nor print
    // its own backtrace.
    command.args(["run", toolchain]).arg(program).env("RUSTUP_LOG", "warn").env_remove("RUST_BACKTRACE");
    command
}

/// A program that runs with rustup's nightly.
pub(crate) fn nightly(program: impl AsRef<OsStr>) -> Command {
    let mut command = rustup_run(NIGHTLY, program);
    crate::cargo::forget_this_package(&mut command);
    // What runs this program is not a nightly.
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

/// What this machine has, as far as the choice depends on it.
#[derive(Debug, Default)]
pub(super) struct Machine {
    /// `INJECTOR_BPF_TOOLCHAIN`, and that toolchain if rustup has it.
    pub(super) chosen: Option<(String, Option<Candidate>)>,
    /// The distribution's own compiler, `/usr/bin/rustc`.
    pub(super) system: Option<Candidate>,
    /// rustup's `nightly`; asked only when the system's own won't do.
    pub(super) nightly: Option<Candidate>,
    /// apt has `rustc-web` and its `core` for BPF, new enough; asked only when it matters.
    pub(super) offered: bool,
}

/// The way BPF programs are compiled here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// With a toolchain that rustup knows by this name.
    Rustup { name: String, core: Core, llvm: u32 },
    /// With `/usr/bin/rustc`, which rustup has to be told about.
    System { llvm: u32 },
    /// With Debian's compiler, once installed.
    InstallSystem,
    /// With rustup's nightly, once it is there with its source.
    InstallNightly { present: bool },
}

/// Chooses: what the operator named, what is there, what Debian has, a nightly.
///
/// # Errors
/// When the toolchain that the operator named won't do.
pub(super) fn choose(machine: &Machine, oldest: (u32, u32)) -> Result<Way> {
    let usable = |candidate: &Option<Candidate>| {
        let candidate = candidate.as_ref()?;
        Some((candidate.core(oldest).ok()?, candidate.compiler.llvm))
    };
    if let Some((name, candidate)) = &machine.chosen {
        let Some(candidate) = candidate else {
            bail!("{CHOICE}={name}: rustup has no such toolchain; `rustup toolchain list` shows what it has");
        };
        return match candidate.core(oldest) {
            Ok(core) => Ok(Way::Rustup { name: name.clone(), core, llvm: candidate.compiler.llvm }),
            Err(why) => bail!("{CHOICE}={name}: this toolchain cannot compile for BPF: it {why}"),
        };
    }
    if let Some((_, llvm)) = usable(&machine.system) {
        return Ok(Way::System { llvm });
    }
    if let Some((core, llvm)) = usable(&machine.nightly) {
        return Ok(Way::Rustup { name: "nightly".into(), core, llvm });
    }
    if machine.offered {
        return Ok(Way::InstallSystem);
    }
    Ok(Way::InstallNightly { present: machine.nightly.is_some() })
}

/// Looks at this machine. `offered` is asked last, for it is slow.
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
    let will_do =
        |candidate: &Option<Candidate>| candidate.as_ref().is_some_and(|it| it.core(oldest()).is_ok());
    machine.system = Candidate::ask(|| Command::new("/usr/bin/rustc"));
    if !will_do(&machine.system) {
        machine.nightly = ask_rustup("nightly");
        machine.offered = !will_do(&machine.nightly) && offered();
    }
    Ok(machine)
}

/// What rustup calls the system's compiler, and whether it does already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    Made(&'static str),
    Wanted(&'static str),
}

/// `bpf`, unless the operator has given that name to something else.
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

/// Whether `rustup run NAME cargo` works: a linked toolchain has no cargo of its own, and rustup
/// lends it that of its nightly, beta or stable.
pub(super) fn has_cargo(name: &str) -> Result<()> {
    let output = rustup_run(name, "cargo").arg("--version").output().context("cannot start rustup")?;
    if !output.status.success() {
        bail!(
            "toolchain `{name}` finds no cargo (rustup lends one of nightly, beta or stable): \
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

    fn way(machine: &Machine) -> Way {
        choose(machine, OLDEST).unwrap()
    }

    #[test]
    fn a_compilers_own_words_are_understood() {
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
        assert_eq!(way(&machine), Way::System { llvm: 22 });
    }

    #[test]
    fn a_nightly_counts_only_with_its_source() {
        let with = Machine {
            nightly: candidate("1.97.0-nightly", false, true),
            offered: true,
            ..Machine::default()
        };
        assert_eq!(way(&with), Way::Rustup { name: "nightly".into(), core: Core::Built, llvm: 22 });
        let without = candidate("1.97.0-nightly", false, false);
        let offered = Machine { nightly: without.clone(), offered: true, ..Machine::default() };
        assert_eq!(way(&offered), Way::InstallSystem);
        let elsewhere = Machine { nightly: without, ..Machine::default() };
        assert_eq!(way(&elsewhere), Way::InstallNightly { present: true });
        assert_eq!(way(&Machine::default()), Way::InstallNightly { present: false });
    }

    #[test]
    fn an_old_compiler_or_one_without_core_is_replaced() {
        for system in [candidate("1.85.0", true, false), candidate("1.96.0", false, false)] {
            assert_eq!(way(&Machine { system, offered: true, ..Machine::default() }), Way::InstallSystem);
        }
    }

    #[test]
    fn the_operators_choice_is_kept_or_refused_with_a_reason() {
        let chosen = |candidate: Option<Candidate>| Machine {
            chosen: Some(("mine".into(), candidate)),
            system: self::candidate("1.96.0", true, false),
            ..Machine::default()
        };
        assert_eq!(
            way(&chosen(candidate("1.99.0", true, false))),
            Way::Rustup { name: "mine".into(), core: Core::Prebuilt, llvm: 22 }
        );
        for (candidate, reason) in [
            (None, "no such toolchain"),
            (candidate("1.97.0-nightly", false, false), "rust-src"),
            (candidate("1.97.0", false, true), "no nightly"),
            (candidate("1.85.0", true, true), "1.95 is the oldest"),
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
    fn the_workspace_says_what_is_oldest() {
        assert!(oldest() >= (1, 85), "edition 2024 needs 1.85: {:?}", oldest());
    }
}
