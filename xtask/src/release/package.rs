//! `cargo xtask package`: makes a Debian package with cargo-deb and checks its contents.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::install::products;
use crate::{
    build,
    cargo::{self, workspace},
    setup::{self, Group},
};

#[derive(clap::Args)]
pub(crate) struct PackageArgs {
    /// Folder of the package [default: target/debian]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Files that the package must contain, below the root.
const EXPECTED: [&str; 14] = [
    "etc/injector/injector.toml",
    "usr/bin/injector",
    "usr/lib/systemd/system/injector.service",
    "usr/lib/systemd/system/injector.socket",
    "usr/lib/sysusers.d/injector.conf",
    "usr/lib/tmpfiles.d/injector.conf",
    "usr/share/bash-completion/completions/injector",
    "usr/share/doc/injector/copyright",
    "usr/share/doc/injector/fail2ban/action.d/injector.conf",
    "usr/share/doc/injector/fail2ban/jail.d/injector.conf",
    "usr/share/doc/injector/probe/injector-probe.service",
    "usr/share/doc/injector/probe/injector-probe.timer",
    "usr/share/doc/injector/prometheus/injector.rules.yml",
    "usr/share/man/man1/injector-run.1.gz",
];

pub(crate) fn run(args: &PackageArgs) -> Result<()> {
    setup::ensure(&[Group::Bpf, Group::Package])?;
    let binary = build::daemon(true)?;
    generate(&binary, &workspace().join("target/package"))?;
    let package = make(args.out.as_deref().unwrap_or(&workspace().join("target/debian")))?;
    println!(
        "{}\n\n{}\n{}",
        package.display(),
        dpkg_deb("--field", &package)?,
        dpkg_deb("--contents", &package)?
    );
    try_out(&package)?;
    // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        install_in_a_copy(&package)
    } else {
        println!("\nnot tried with dpkg: installing into a copy of this system needs root");
        Ok(())
    }
}

/// Writes the program's manual pages and completions to files, which cargo-deb packs.
fn generate(binary: &Path, folder: &Path) -> Result<()> {
    let man = folder.join("man");
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(&man)?;
    let scratch = tempfile::tempdir()?;
    for (name, page) in products::man(binary, scratch.path())? {
        fs::write(man.join(name), page)?;
    }
    for (shell, name) in [("bash", "injector.bash"), ("zsh", "_injector"), ("fish", "injector.fish")] {
        fs::write(folder.join(name), products::completions(binary, shell)?)?;
    }
    Ok(())
}

/// Runs cargo-deb on the existing build.
fn make(out: &Path) -> Result<PathBuf> {
    fs::create_dir_all(out)?;
    let mut command = Command::new(setup::cargo_deb()?);
    command
        .current_dir(workspace())
        .args(["--no-build", "--strip", "--package", "injector-user", "--output"])
        .arg(out);
    cargo::forget_this_package(&mut command);
    let output = command.output().context("cannot run cargo-deb")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo-deb failed:\n{complaint}");
    if !complaint.trim().is_empty() {
        eprintln!("{}", complaint.trim());
    }
    // It prints the package's path.
    let printed = String::from_utf8_lossy(&output.stdout);
    let path =
        printed.lines().rev().map(Path::new).find(|path| path.extension().is_some_and(|it| it == "deb"));
    path.map(Path::to_path_buf).with_context(|| format!("cargo-deb printed no path of a package: {printed}"))
}

fn dpkg_deb(argument: &str, package: &Path) -> Result<String> {
    let output =
        Command::new("dpkg-deb").arg(argument).arg(package).output().context("cannot run dpkg-deb")?;
    ensure!(output.status.success(), "dpkg-deb: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A script that installs, upgrades, removes and purges the package in a copy of this system, kept in
/// memory.
const COPY: &str = r#"
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
root=$1/root
mkdir "$1/upper" "$1/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount --rbind /dev "$root/dev"
rm -rf "$root/etc/injector" "$root/var/lib/injector"
cp "$2" "$root/injector.deb"
exec chroot "$root" sh -eu -c '
    export DEBIAN_FRONTEND=noninteractive LC_ALL=C
    dpkg --install /injector.deb
    injector --version
    injector check --config /etc/injector/injector.toml > /dev/null
    id injector
    bash -n /usr/share/bash-completion/completions/injector
    systemd-analyze verify --man=no injector.service injector.socket
    for page in /usr/share/man/man1/injector*.1.gz; do
        if LC_ALL=C.UTF-8 man --warnings --local-file "$page" 2>&1 > /dev/null | grep .; then exit 1; fi
    done
    mkdir /var/lib/injector && touch /var/lib/injector/bans
    printf "\n# of the operator\n" >> /etc/injector/injector.toml
    dpkg --install /injector.deb
    grep -q "^. of the operator$" /etc/injector/injector.toml
    dpkg --remove injector
    [ -f /etc/injector/injector.toml ] && [ -f /var/lib/injector/bans ] && [ ! -e /usr/bin/injector ]
    dpkg --purge injector
    [ ! -e /etc/injector ] && [ ! -e /var/lib/injector ]
'
"#;

/// Installs, removes and purges the package with dpkg, which runs its scripts.
fn install_in_a_copy(package: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("inj-package-").tempdir()?;
    println!("\ninstalled by dpkg into a copy of this system, upgraded, removed and purged:");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", COPY, "copy"]);
    let status = command.arg(scratch.path()).arg(package).status().context("cannot run unshare")?;
    ensure!(status.success(), "installing, running or removing the package failed ({status})");
    Ok(())
}

/// Unpacks the package, and runs its program with its configuration.
fn try_out(package: &Path) -> Result<()> {
    let tree = tempfile::tempdir()?;
    let status = Command::new("dpkg-deb").arg("--raw-extract").arg(package).arg(tree.path()).status()?;
    ensure!(status.success(), "dpkg-deb cannot unpack {}", package.display());
    let place = |path: &str| tree.path().join(path);
    let missing: Vec<_> = EXPECTED.iter().filter(|path| !place(path).is_file()).collect();
    ensure!(missing.is_empty(), "not in the package: {missing:?}");
    let script = |name: &str| fs::read_to_string(place("DEBIAN").join(name)).unwrap_or_default();
    ensure!(
        script("conffiles").lines().any(|line| line == "/etc/injector/injector.toml"),
        "the configuration is not a conffile"
    );
    for (name, part) in [
        ("postinst", "systemd-sysusers"),
        ("postinst", "systemd-tmpfiles"),
        ("prerm", "guard detach"),
        ("prerm", "inline detach"),
        ("postrm", "/var/lib/injector"),
    ] {
        ensure!(script(name).contains(part), "{name} has no {part}:\n{}", script(name));
    }
    let unit = fs::read_to_string(place("usr/lib/systemd/system/injector.service"))?;
    ensure!(
        unit.contains("ExecStart=/usr/bin/injector run"),
        "the unit does not start /usr/bin/injector:\n{unit}"
    );
    let program = place("usr/bin/injector");
    for arguments in [vec!["--version".into()], vec!["check".into(), "--config".into(), place(EXPECTED[0])]] {
        let output = Command::new(&program).args(&arguments).output()?;
        let printed = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("the packaged program: {}", String::from_utf8_lossy(&output.stderr));
        }
        println!("{}", printed.trim_end());
    }
    Ok(())
}
