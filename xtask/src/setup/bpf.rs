//! The toolchain that compiles the BPF programs.

use std::{env, path::PathBuf, process::Command};

use super::toolchain::{self, Core};

/// A toolchain that compiles BPF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BpfToolchain {
    /// Its name in rustup.
    pub(crate) name: String,
    pub(super) core: Core,
    pub(super) linker_dir: PathBuf,
}

impl BpfToolchain {
    /// A program of the toolchain.
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

    /// Whether it must compile `core` itself.
    pub(crate) fn builds_core(&self) -> bool {
        self.core == Core::Built
    }

    /// The crates that a stable compiler allows to use unstable features: `guard` and `inline` use atomic intrinsics,
    /// which `core` gives no other name on this target. The value `1` would make aya-build pass `-Z
    /// build-std`, which needs a source that this compiler lacks.
    fn bootstrap(&self) -> Option<&'static str> {
        (self.core == Core::Prebuilt).then_some("aya_ebpf,guard,inline")
    }

    /// The lines that injector-user's build script reads.
    pub(super) fn record(&self) -> String {
        format!(
            "# Written by `cargo xtask setup`; read by injector-user/build.rs.\n\
             TOOLCHAIN={}\nRUSTC_BOOTSTRAP={}\nBPF_LINKER_DIR={}\n",
            self.name,
            self.bootstrap().unwrap_or_default(),
            self.linker_dir.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_has_what_the_toolchain_needs() {
        let mut toolchain =
            BpfToolchain { name: "bpf".into(), core: Core::Prebuilt, linker_dir: "/t/bin".into() };
        assert!(
            toolchain
                .record()
                .ends_with("TOOLCHAIN=bpf\nRUSTC_BOOTSTRAP=aya_ebpf,guard,inline\nBPF_LINKER_DIR=/t/bin\n")
        );
        toolchain.core = Core::Built;
        assert!(toolchain.record().contains("\nRUSTC_BOOTSTRAP=\n"), "a nightly needs none");
    }
}
