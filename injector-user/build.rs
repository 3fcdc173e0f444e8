//! Builds the BPF programs (`injector-ebpf`) and leaves one object per engine in `OUT_DIR`.
//!
//! Which compiler and linker to use is what `cargo xtask setup` found out and wrote to
//! `bpf-toolchain.env` in the tool cache; this script guesses nothing. Without the feature `bpf` it does nothing.

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "bpf")]
    bpf::build()?;
    Ok(())
}

#[cfg(feature = "bpf")]
mod bpf {
    use std::{
        env,
        ffi::OsString,
        fs,
        path::{Path, PathBuf},
    };

    use aya_build::{Package, Toolchain};

    /// What to do about any failure that has to do with the toolchain.
    const REMEDY: &str =
        "run `cargo xtask setup`, or build with --no-default-features for the relay engine only";

    pub(super) fn build() -> Result<(), String> {
        for name in ["INJECTOR_TOOLS", "XDG_CACHE_HOME", "HOME"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        // aya-build watches injector-ebpf itself; the programs share this crate with the daemon.
        println!("cargo:rerun-if-changed=../injector-common/src");
        let file = tools_dir()?.join("bpf-toolchain.env");
        println!("cargo:rerun-if-changed={}", file.display());
        let text = fs::read_to_string(&file)
            .map_err(|error| format!("BPF toolchain not set up: {REMEDY} ({}: {error})", file.display()))?;
        let settings =
            Settings::parse(&text).map_err(|what| format!("{}: {what}: {REMEDY}", file.display()))?;
        set_environment(&settings)?;
        let programs = Package { name: "injector-ebpf", root_dir: "../injector-ebpf", ..Package::default() };
        aya_build::build_ebpf([programs], Toolchain::Custom(settings.toolchain)).map_err(|error| {
            format!("building the BPF programs with toolchain `{}`: {error:#}", settings.toolchain)
        })
    }

    /// The file's `KEY=VALUE` lines.
    struct Settings<'a> {
        toolchain: &'a str,
        rustc_bootstrap: Option<&'a str>,
        linker_dir: &'a Path,
    }

    impl<'a> Settings<'a> {
        fn parse(text: &'a str) -> Result<Self, String> {
            let value = |key: &str| {
                text.lines()
                    .filter_map(|line| line.split_once('='))
                    .find_map(|(name, value)| (name == key).then_some(value))
                    .filter(|value| !value.is_empty())
            };
            let needed = |key: &str| value(key).ok_or_else(|| format!("no {key}= line"));
            let linker_dir = Path::new(needed("BPF_LINKER_DIR")?);
            if !linker_dir.join("bpf-linker").exists() {
                return Err(format!("no bpf-linker in {}", linker_dir.display()));
            }
            Ok(Self {
                toolchain: needed("TOOLCHAIN")?,
                rustc_bootstrap: value("RUSTC_BOOTSTRAP"),
                linker_dir,
            })
        }
    }

    /// Sets what rustup, cargo and rustc, which aya-build starts, take from the environment.
    fn set_environment(settings: &Settings<'_>) -> Result<(), String> {
        let mut path = vec![settings.linker_dir.to_path_buf()];
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let path = env::join_paths(path).map_err(|error| format!("PATH: {error}"))?;
        let mut variables: Vec<(&str, OsString)> = vec![
            ("PATH", path),
            ("CARGO_BUILD_BUILD_DIR", shared_build_dir()?.into()),
            // aya-build shows everything cargo and rustup say as warnings: let them say only what is one.
            ("CARGO_TERM_QUIET", "true".into()),
            ("RUSTUP_LOG", "warn".into()),
        ];
        variables.extend(settings.rustc_bootstrap.map(|value| ("RUSTC_BOOTSTRAP", value.into())));
        for (name, value) in variables {
            // SAFETY: no other thread has been started by this program yet, so none reads the environment.
            unsafe { env::set_var(name, value) };
        }
        Ok(())
    }

    /// One folder for what every profile and feature of the daemon builds alike: the programs, and `core` for them. It is not
    /// locked by the cargo that runs this script, which locks the folder of its profile.
    fn shared_build_dir() -> Result<PathBuf, String> {
        let out_dir = env::var_os("OUT_DIR").map(PathBuf::from).ok_or("no OUT_DIR")?;
        // target/[triple/]profile/build/package-hash/out
        let profile = out_dir.ancestors().nth(3).ok_or("OUT_DIR is not below a profile's folder")?;
        Ok(profile.with_file_name("bpf-programs"))
    }

    /// The tool cache, by the same rule as `xtask/src/setup/cache.rs`.
    fn tools_dir() -> Result<PathBuf, String> {
        let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        if let Some(path) = env::var_os("INJECTOR_TOOLS").filter(|path| !path.is_empty()) {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(path)
            } else {
                Err(format!("INJECTOR_TOOLS={} must be an absolute path", path.display()))
            };
        }
        absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("injector/tools"))
            .ok_or_else(|| "none of INJECTOR_TOOLS, XDG_CACHE_HOME and HOME names a folder".to_owned())
    }
}
