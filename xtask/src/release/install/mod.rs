//! `cargo xtask install` and `uninstall`: the daemon on an edge host that systemd runs.
//!
//! `plan.rs` decides the steps, which are printed before `apply.rs` carries them out. `manifest.rs`
//! records what was installed, and only that is removed.

mod apply;
mod layout;
mod manifest;
mod plan;
pub(crate) mod products;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    apply::Tree,
    layout::{CONFIG, Layout},
    plan::{Step, System},
};
use crate::{build, setup};

#[derive(clap::Args)]
pub(crate) struct InstallArgs {
    /// Folder to install below; units go where systemd finds them, the configuration always to
    /// /etc/injector
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Install into this tree as the root of a system, and run no commands
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Install this program instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Enable the service and (re)start it; without this a running service keeps the old program
    #[arg(long)]
    start: bool,
}

#[derive(clap::Args)]
pub(crate) struct UninstallArgs {
    /// Folder that it was installed below
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Tree that it was installed into
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Remove the configuration and the bans in /var/lib/injector too
    #[arg(long)]
    purge: bool,
}

pub(crate) fn install(args: &InstallArgs) -> Result<()> {
    let system = system(args.destdir.as_deref());
    may_change(args.destdir.as_deref(), args.dry_run, "install")?;
    ensure!(args.prefix.is_absolute(), "--prefix {} must be an absolute path", args.prefix.display());
    if args.start && system != System::Systemd {
        bail!("--start needs a running systemd: there is no /run/systemd/system, or --destdir is set");
    }
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => {
            setup::ensure(&[setup::Group::Bpf])?;
            build::daemon(true)?
        }
    };
    let layout = Layout::new(&args.prefix);
    let tree = Tree::new(args.destdir.as_deref());
    let before = tree.manifest(&layout.manifest())?.unwrap_or_default();
    let products = products::all(&layout, &binary)?;
    let look = |path: &Path, wanted: Option<&plan::Product>| tree.look(path, wanted);
    let steps = plan::install(&layout, products, &before, &look, system, args.start);
    show(&steps, args.destdir.as_deref());
    if args.dry_run {
        println!("\nnothing was changed (--dry-run)");
        return Ok(());
    }
    tree.carry_out(&steps)?;
    println!("\n{}", next(system, args.start));
    Ok(())
}

pub(crate) fn uninstall(args: &UninstallArgs) -> Result<()> {
    may_change(args.destdir.as_deref(), args.dry_run, "uninstall")?;
    let layout = Layout::new(&args.prefix);
    let tree = Tree::new(args.destdir.as_deref());
    let manifest = tree.manifest(&layout.manifest())?.with_context(|| {
        let place = tree.place(&layout.manifest());
        format!("nothing is installed there: {} is missing (was --prefix another one?)", place.display())
    })?;
    let look = |path: &Path| tree.look(path, None);
    let steps = plan::uninstall(&layout, &manifest, &look, system(args.destdir.as_deref()), args.purge);
    show(&steps, args.destdir.as_deref());
    if args.dry_run {
        println!("\nnothing was changed (--dry-run)");
        return Ok(());
    }
    tree.carry_out(&steps)?;
    println!(
        "\nuninstalled; the user `injector` is kept, and so are drop-ins in /etc/systemd/system/injector.service.d"
    );
    Ok(())
}

fn system(destdir: Option<&Path>) -> System {
    match destdir {
        Some(_) => System::Tree,
        // sd_booted(3)
        None if Path::new("/run/systemd/system").is_dir() => System::Systemd,
        None => System::Idle,
    }
}

/// Root is needed only for this machine's own folders.
fn may_change(destdir: Option<&Path>, dry_run: bool, verb: &str) -> Result<()> {
    // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if root || dry_run || destdir.is_some() {
        return Ok(());
    }
    bail!(
        "to {verb} takes root, and nothing was changed. Build as yourself (cargo xtask build --release) and then run\n\n    \
         sudo --preserve-env=PATH cargo xtask {verb}{}\n\nor give --destdir, or --dry-run to see what it would do",
        if verb == "install" { " --binary target/release/injector" } else { "" }
    )
}

fn show(steps: &[Step], destdir: Option<&Path>) {
    if let Some(destdir) = destdir {
        println!("below {}:", destdir.display());
    }
    steps.iter().for_each(|step| println!("{step}"));
}

fn next(system: System, start: bool) -> String {
    match system {
        System::Systemd if start => "installed and started: journalctl -u injector".to_owned(),
        System::Systemd => format!(
            "installed. Edit {CONFIG}, then\n\n    systemctl enable --now injector\n\nor, where it runs already, \
             systemctl restart injector"
        ),
        System::Idle => {
            format!("installed; systemd does not run here: start it with `injector run --config {CONFIG}`")
        }
        System::Tree => {
            "installed into the tree; run systemd-sysusers and systemd-tmpfiles on its system".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::script;

    /// A program that answers like the daemon, because building the daemon takes minutes.
    fn program(folder: &Path) -> PathBuf {
        let path = folder.join("injector");
        let script = "#!/bin/sh\ncase $1 in\nman) echo page > \"$3/injector.1\" ;;\n\
                      completions) echo \"for $2\" ;;\n*) exit 1 ;;\nesac\n";
        script::write(&path, script);
        path
    }

    /// Every path below, with its mode and content.
    fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        let mut left = vec![root.to_path_buf()];
        while let Some(folder) = left.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
                let content = if path.is_dir() { Vec::new() } else { fs::read(&path).unwrap() };
                if path.is_dir() {
                    left.push(path.clone());
                }
                found.insert(path, (mode, content));
            }
        }
        found
    }

    struct Host {
        _scratch: tempfile::TempDir,
        binary: PathBuf,
        root: PathBuf,
    }

    impl Host {
        /// A tree with some folders and a file of another package.
        fn new() -> Self {
            let scratch = tempfile::tempdir().unwrap();
            let root = scratch.path().join("root");
            fs::create_dir_all(root.join("usr/local/bin")).unwrap();
            fs::create_dir_all(root.join("etc")).unwrap();
            fs::write(root.join("usr/local/bin/other"), "").unwrap();
            Self { binary: program(scratch.path()), root, _scratch: scratch }
        }

        fn install(&self, dry_run: bool) -> Result<()> {
            install(&InstallArgs {
                prefix: "/usr/local".into(),
                destdir: Some(self.root.clone()),
                dry_run,
                binary: Some(self.binary.clone()),
                start: false,
            })
        }

        fn uninstall(&self, purge: bool) -> Result<()> {
            uninstall(&UninstallArgs {
                prefix: "/usr/local".into(),
                destdir: Some(self.root.clone()),
                dry_run: false,
                purge,
            })
        }
    }

    #[test]
    fn uninstalling_removes_every_file_and_folder_that_was_installed() {
        let host = Host::new();
        let before = tree(&host.root);
        host.install(true).unwrap();
        assert_eq!(tree(&host.root), before, "a dry run changes nothing");
        host.install(false).unwrap();
        let after = tree(&host.root);
        let mode = |path: &str| after.get(&host.root.join(path)).map(|(mode, _)| *mode);
        assert_eq!(mode("usr/local/bin/injector"), Some(0o755));
        assert_eq!(mode("usr/local/lib/systemd/system/injector.socket"), Some(0o644));
        assert_eq!(mode("usr/local/share/man/man1/injector.1"), Some(0o644));
        assert_eq!(mode("etc/injector/injector.toml"), Some(0o644));
        let unit = host.root.join("usr/local/lib/systemd/system/injector.service");
        let unit = fs::read_to_string(unit).unwrap();
        assert!(unit.contains("ExecStart=/usr/local/bin/injector run"), "{unit}");
        assert!(!unit.contains("=/usr/bin/injector"), "{unit}");
        host.install(false).unwrap();
        assert_eq!(tree(&host.root), after, "a second run changes nothing");
        host.uninstall(true).unwrap();
        assert_eq!(tree(&host.root), before);
        assert!(host.uninstall(true).unwrap_err().to_string().contains("--prefix"));
    }

    #[test]
    fn an_operators_configuration_outlives_upgrade_and_removal() {
        let host = Host::new();
        host.install(false).unwrap();
        let config = host.root.join("etc/injector/injector.toml");
        fs::write(&config, "mine").unwrap();
        host.install(false).unwrap();
        host.uninstall(false).unwrap();
        assert_eq!(fs::read_to_string(&config).unwrap(), "mine");
        assert!(!host.root.join("usr/local/share").exists());
    }

    #[test]
    fn a_relative_prefix_is_rejected() {
        let host = Host::new();
        let args = InstallArgs {
            prefix: "usr".into(),
            destdir: Some(host.root.clone()),
            dry_run: true,
            binary: Some(host.binary.clone()),
            start: false,
        };
        assert!(install(&args).unwrap_err().to_string().contains("absolute"));
    }
}
