//! What `cargo xtask cluster` starts: Kubernetes, the file system of a node, and the image of the mail
//! server's pod. All of it comes from Debian's archive; no registry and no module proxy is asked.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    cache::{self, Cache},
    job,
    private_apt::{self, PrivateApt},
};

/// Debian 12 has this version as source only (its binary package is kubectl alone).
pub(crate) const KUBERNETES: &str = "1.20.2";

/// Debian's release with [`KUBERNETES`], containerd, runc, etcd and the CNI plugins.
const SUITE: &str = "bookworm";

/// Kubernetes 1.20 needs Go 1.15 (its build/build-image/cross), which Debian 11 has.
const GO: (&str, &str) = ("1.15", "bullseye");

/// The programs of a cluster, and what pods wait in (kubelet's sandbox).
const PROGRAMS: [&str; 5] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"];

/// A node's packages, besides Debian's minimum.
const NODE: &str = "containerd,runc,containernetworking-plugins,etcd-server,iptables,nftables,conntrack,\
                    ipset,iproute2,procps,kmod,mount,util-linux,ethtool,socat,ca-certificates";

/// The packages of the mail server's image, besides Debian's minimum.
const MAIL: &str = "postfix,dovecot-imapd,dovecot-lmtpd,procps,iproute2";

/// The image's name, without its tag.
pub(crate) const MAIL_IMAGE: &str = "localhost/mail";

/// The sandbox' image, without its tag.
pub(crate) const PAUSE_IMAGE: &str = "localhost/pause";

/// The tag of both.
pub(crate) const TAG: &str = "1";

/// A part that is installed on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Kubernetes' programs and the pause program, built.
    Kubernetes,
    /// A node's file system.
    Node,
    /// The images of the pods, as archives that containerd imports.
    Images,
}

impl Part {
    /// Each needs the ones before it.
    pub(super) const ALL: [Self; 3] = [Self::Kubernetes, Self::Node, Self::Images];

    fn folder(self, cache: &Cache) -> PathBuf {
        cache.tool(&match self {
            Self::Kubernetes => format!("kubernetes-{KUBERNETES}"),
            Self::Node => format!("cluster-node-{SUITE}"),
            Self::Images => format!("cluster-images-{SUITE}"),
        })
    }

    pub(super) fn is_present(self, cache: &Cache) -> bool {
        self.folder(cache).is_dir()
    }

    /// What it is, for a list.
    pub(super) fn name(self) -> String {
        match self {
            Self::Kubernetes => format!("Kubernetes {KUBERNETES}, built"),
            Self::Node => format!("a node's file system, of Debian {SUITE}"),
            Self::Images => format!("the mail server's image, of Debian {SUITE}"),
        }
    }

    /// Builds it.
    ///
    /// # Errors
    /// When the archive cannot be reached, or something does not build. The cache is then unchanged.
    pub(super) fn install(self, cache: &Cache) -> Result<()> {
        // SAFETY: geteuid takes no arguments, touches no memory and cannot fail.
        ensure!(unsafe { libc::geteuid() } == 0, "unpacking Debian's packages with their owners needs root");
        let partial = cache.partial()?;
        let made = match self {
            Self::Kubernetes => kubernetes(cache, partial.path()),
            Self::Node => node(cache, partial.path()),
            Self::Images => images(cache, partial.path()),
        };
        cache::replace(&made.with_context(|| self.name())?, &self.folder(cache))
    }
}

/// The installed parts.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    /// The folder of Kubernetes' programs.
    pub(crate) programs: PathBuf,
    /// A node's file system, which is not changed.
    pub(crate) node: PathBuf,
    /// Archives of images, `NAME.tar`.
    pub(crate) images: PathBuf,
}

/// Finds all parts; `None` if one is missing.
pub(super) fn find(cache: &Cache) -> Option<Tools> {
    let [programs, node, images] = Part::ALL.map(|part| part.folder(cache));
    Part::ALL.iter().all(|part| part.is_present(cache)).then_some(Tools { programs, node, images })
}

/// Builds Kubernetes from Debian's source package with Debian 11's Go; the modules that it needs are
/// in its source.
fn kubernetes(cache: &Cache, work: &Path) -> Result<PathBuf> {
    eprintln!("setup: Kubernetes {KUBERNETES} from source; takes about five minutes …");
    let log = job::fresh(cache.log("kubernetes-build")?)?;
    let go = go(work, &log)?;
    let source = source(work, &log)?;
    let finished = work.join("finished");
    fs::create_dir(&finished)?;
    // Its makefiles copy what they have built by `rsync -pc FROM TO`, and nothing else by rsync.
    let shims = work.join("shims");
    fs::create_dir(&shims)?;
    fs::write(shims.join("rsync"), "#!/bin/sh\nshift\nexec cp -p \"$@\"\n")?;
    fs::set_permissions(shims.join("rsync"), fs::Permissions::from_mode(0o755))?;
    let version = work.join("version");
    fs::write(
        &version,
        format!(
            "KUBE_GIT_COMMIT='unknown'\nKUBE_GIT_TREE_STATE='clean'\nKUBE_GIT_VERSION='v{KUBERNETES}'\n\
             KUBE_GIT_MAJOR='1'\nKUBE_GIT_MINOR='20'\n"
        ),
    )?;
    // Go 1.15 finds the package k8s.io/kubernetes by its place below GOPATH.
    let gopath = source.join(".go");
    fs::create_dir_all(gopath.join("src/k8s.io"))?;
    symlink("../../..", gopath.join("src/k8s.io/kubernetes"))?;
    let path = std::env::var("PATH").unwrap_or_default();
    let wanted = PROGRAMS.map(|name| format!("cmd/{name}")).join(" ");
    let mut make = Command::new("make");
    make.arg("-C").arg(gopath.join("src/k8s.io/kubernetes")).arg(format!("WHAT={wanted}"));
    make.arg("GOLDFLAGS=-s -w").env("GOROOT", &go).env("GOPATH", &gopath);
    make.env("PATH", format!("{}:{}:{path}", go.join("bin").display(), shims.display()));
    make.envs([("CGO_ENABLED", "0"), ("GOFLAGS", "-mod=vendor"), ("GOPROXY", "off")]);
    make.env("GOCACHE", work.join("gocache")).env("HOME", work).env("KUBE_GIT_VERSION_FILE", version);
    job::run(&mut make, &log)?;
    for program in PROGRAMS {
        fs::rename(source.join("_output/bin").join(program), finished.join(program))
            .with_context(|| format!("the build made no {program}"))?;
    }
    let mut pause = Command::new("gcc");
    pause.args(["-static", "-O2", &format!("-DVERSION=v{KUBERNETES}"), "-o"]).arg(finished.join("pause"));
    job::run(pause.arg(source.join("build/pause/linux/pause.c")), &log)?;
    job::run(Command::new(finished.join("kubelet")).arg("--version"), &log)?;
    Ok(finished)
}

/// Unpacks Go; returns its GOROOT.
fn go(work: &Path, log: &Path) -> Result<PathBuf> {
    let (version, suite) = GO;
    let apt = PrivateApt::new(&work.join("apt-go"), suite)?;
    job::run(apt.command("apt-get").arg("update"), log)?;
    let packages = work.join("go-packages");
    fs::create_dir(&packages)?;
    let mut download = apt.command("apt-get");
    download.current_dir(&packages).arg("download");
    download.args(["go", "src"].map(|part| format!("golang-{version}-{part}")));
    job::run(&mut download, log)?;
    let tree = work.join("go");
    private_apt::unpack(&packages, &tree, log)?;
    Ok(tree.join(format!("usr/lib/go-{version}")))
}

/// Fetches and unpacks the source, as its project released it.
fn source(work: &Path, log: &Path) -> Result<PathBuf> {
    let apt = PrivateApt::new(&work.join("apt-source"), SUITE)?;
    job::run(apt.command("apt-get").arg("update"), log)?;
    let fetched = work.join("source-package");
    fs::create_dir(&fetched)?;
    let mut download = apt.command("apt-get");
    job::run(download.current_dir(&fetched).args(["source", "--download-only", "kubernetes"]), log)?;
    let mut archives = fs::read_dir(&fetched)?.filter_map(|entry| Some(entry.ok()?.path()));
    let is_original = |path: &PathBuf| path.to_string_lossy().contains(".orig.tar.");
    let archive = archives.find(is_original).context("Debian's source package has no original source")?;
    ensure!(
        archive.to_string_lossy().contains(KUBERNETES),
        "Debian {SUITE} no longer has Kubernetes {KUBERNETES}: {}",
        archive.display()
    );
    let tree = work.join("source");
    fs::create_dir(&tree)?;
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(&archive).arg("--strip-components=1").arg("-C").arg(&tree);
    job::run(&mut tar, log)?;
    Ok(tree)
}

fn node(cache: &Cache, work: &Path) -> Result<PathBuf> {
    eprintln!("setup: a node's file system from Debian's packages …");
    let log = job::fresh(cache.log("cluster-node")?)?;
    let tree = work.join("tree");
    debian(NODE, &tree, &log)?;
    let mut chroot = Command::new("chroot");
    job::run(chroot.arg(&tree).args(["containerd", "--version"]), &log)?;
    Ok(tree)
}

fn images(cache: &Cache, work: &Path) -> Result<PathBuf> {
    eprintln!("setup: the mail server's image from Debian's packages …");
    let log = job::fresh(cache.log("cluster-images")?)?;
    let finished = work.join("finished");
    fs::create_dir(&finished)?;
    let mail = work.join("mail.tar");
    debian(MAIL, &mail, &log)?;
    image(&mail, &["/bin/bash"], &finished.join("mail.tar"), &log)?;
    let pause = work.join("pause.tar");
    let programs = Part::Kubernetes.folder(cache);
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&pause).arg("-C").arg(&programs).args(["--numeric-owner", "pause"]);
    job::run(&mut tar, &log)?;
    image(&pause, &["/pause"], &finished.join("pause.tar"), &log)?;
    Ok(finished)
}

/// Installs packages into a folder, or an archive if the name ends so. Their scripts run inside.
fn debian(packages: &str, target: &Path, log: &Path) -> Result<()> {
    let archive = private_apt::archive()?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--variant=minbase", &format!("--include={packages}")]);
    for unwanted in ["man", "locale", "doc", "info"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{unwanted}/*"));
    }
    command.args(["--aptopt=APT::Sandbox::User \"root\"", "--aptopt=Acquire::Languages \"none\"", SUITE]);
    job::run(command.arg(target).arg(archive), log)
}

/// Makes an image with one layer, as an archive that `ctr images import` reads.
fn image(layer: &Path, entrypoint: &[&str], archive: &Path, log: &Path) -> Result<()> {
    let layout = layer.with_extension("layout");
    let image = format!("{}:{TAG}", layout.display());
    let umoci = |words: &[&str]| {
        let mut command = Command::new("umoci");
        command.args(words);
        command
    };
    job::run(umoci(&["init", "--layout"]).arg(&layout), log)?;
    job::run(&mut umoci(&["new", "--image", &image]), log)?;
    job::run(umoci(&["raw", "add-layer", "--image", &image]).arg(layer), log)?;
    let mut config = umoci(&["config", "--image", &image]);
    config.args(entrypoint.iter().flat_map(|word| ["--config.entrypoint", word]));
    config.args(["--config.env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
    job::run(&mut config, log)?;
    job::run(Command::new("tar").arg("-cf").arg(archive).arg("-C").arg(&layout).arg("."), log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tools_are_found_when_all_parts_are_there() {
        let (_temporary, cache) = super::super::cache::scratch();
        for part in Part::ALL {
            assert!(find(&cache).is_none(), "without {}", part.name());
            fs::create_dir_all(part.folder(&cache)).unwrap();
        }
        assert_eq!(find(&cache).unwrap().programs, cache.tool("kubernetes-1.20.2"));
    }
}
