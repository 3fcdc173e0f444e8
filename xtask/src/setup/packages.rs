//! The programs and files that the groups need, with their Debian packages.

use std::{
    env, iter,
    path::{Path, PathBuf},
    process::Command,
};

use super::group::Group;

/// A program or file that the build, the demo or the tests use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tool {
    /// How to find it.
    probe: Probe,
    /// The Debian package that contains it.
    pub(super) package: String,
    /// What it is needed for, to finish the sentence "… is needed for".
    pub(super) why: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Probe {
    /// A program in PATH or an `sbin` folder, which an ordinary user's PATH lacks.
    Program(&'static str),
    /// A file in one of several places, because distributions differ.
    File(Vec<PathBuf>),
}

impl Tool {
    pub(super) fn is_present(&self) -> bool {
        match &self.probe {
            Probe::Program(name) => program(name).is_some(),
            Probe::File(places) => places.iter().any(|place| place.exists()),
        }
    }
}

fn tool(probe: Probe, package: impl Into<String>, why: &'static str) -> Tool {
    Tool { probe, package: package.into(), why }
}

/// The path of a program.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let folders = env::join_paths(env::split_paths(&path).chain(sbin)).ok()?;
    which::which_in(name, Some(folders), Path::new("/")).ok()
}

/// Whether python3 can make virtual environments; Debian has that in a separate package.
pub(super) fn can_make_environments() -> bool {
    let output = Command::new("python3").args(["-c", "import ensurepip, venv"]).output();
    output.is_ok_and(|output| output.status.success())
}

/// tool, Debian package, what it is needed for, groups
const PROGRAMS: &[(&str, &str, &str, &[Group])] = &[
    ("ip", "iproute2", "the network namespaces", &[Group::Demo, Group::Mail, Group::Cluster]),
    ("nginx", "nginx", "a receiver; a proxy to compare with in the benchmark", &[Group::Mail, Group::Bench]),
    ("postfix", "postfix", "postscreen and smtpd behind the injector", &[Group::Mail]),
    ("dovecot", "dovecot-core", "IMAP behind the injector", &[Group::Mail]),
    ("haproxy", "haproxy", "a second receiver, and a sender to compare with", &[Group::Mail]),
    (
        "iptables-nft-restore",
        "iptables",
        "rules like kube-proxy's, inside the tests' namespaces",
        &[Group::Mail],
    ),
    ("nft", "nftables", "dropping and rejecting packets inside the tests' namespaces", &[Group::Mail]),
    ("swaks", "swaks", "an SMTP client that sends PROXY headers of its own, to compare with", &[Group::Mail]),
    ("capsh", "libcap2-bin", "running the daemon with few capabilities", &[Group::Mail]),
    ("openssl", "openssl", "the servers' test certificates", &[Group::Mail]),
    ("valgrind", "valgrind", "counting the daemon's instructions", &[Group::Mail]),
    ("ps", "procps", "listing the processes that a test left", &[Group::Mail]),
    (
        "promtool",
        "prometheus",
        "checking the alerts; scraping the daemon for the dashboard",
        &[Group::Observe],
    ),
    (
        "prometheus-node-exporter",
        "prometheus-node-exporter",
        "reading the probe's text file as on a real host",
        &[Group::Observe],
    ),
    ("prometheus-pushgateway", "prometheus-pushgateway", "receiving the probe's metrics", &[Group::Observe]),
    ("systemd-analyze", "systemd", "the unit's checks, and a systemd to start it in", &[Group::Mail]),
    ("dpkg-deb", "dpkg", "reading the Debian package", &[Group::Package]),
    ("qemu-system-x86_64", "qemu-system-x86", "booting other kernels", &[Group::Kernels]),
    ("modprobe", "kmod", "the modules of other kernels", &[Group::Kernels]),
    ("xz", "xz-utils", "unpacking the modules of other kernels", &[Group::Kernels]),
    (
        "mmdebstrap",
        "mmdebstrap",
        "the image's files, from Debian's packages",
        &[Group::Image, Group::Cluster],
    ),
    ("umoci", "umoci", "the image itself (OCI)", &[Group::Image, Group::Cluster]),
    ("make", "make", "building Kubernetes", &[Group::Cluster]),
    ("gcc", "gcc", "building what pods wait in", &[Group::Cluster]),
    ("nsenter", "util-linux", "entering the nodes of a cluster", &[Group::Cluster]),
    ("runc", "runc", "running the image", &[Group::Image]),
];

/// The paths of nginx' stream module.
pub(super) const NGINX_STREAM: &[&str] =
    &["/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so"];

/// The seccomp profile of Debian's container engines.
pub(crate) const SECCOMP_PROFILE: &str = "/usr/share/containers/seccomp.json";

/// files (any of them), Debian package, what it is needed for, groups
const FILES: &[(&[&str], &str, &str, &[Group])] = &[
    (
        &["/usr/lib/dovecot/imap-login", "/usr/libexec/dovecot/imap-login"],
        "dovecot-imapd",
        "IMAP on 993 and 10993",
        &[Group::Mail],
    ),
    (
        &["/usr/lib/dovecot/lmtp", "/usr/libexec/dovecot/lmtp"],
        "dovecot-lmtpd",
        "delivery from Postfix into the mailbox",
        &[Group::Mail],
    ),
    (
        &["/usr/lib/dovecot/pop3-login", "/usr/libexec/dovecot/pop3-login"],
        "dovecot-pop3d",
        "POP3 behind the injector",
        &[Group::Mail],
    ),
    (
        &[SECCOMP_PROFILE],
        "golang-github-containers-common",
        "the system calls that a container may make",
        &[Group::Image],
    ),
    (
        // The package `busybox` has a program of this name too, which needs libraries.
        &["/var/lib/dpkg/info/busybox-static.list"],
        "busybox-static",
        "mounting the root file system in other kernels",
        &[Group::Kernels],
    ),
    (NGINX_STREAM, "libnginx-mod-stream", "connections through nginx", &[Group::Mail, Group::Bench]),
    (
        &["/usr/lib/nginx/modules/ngx_mail_module.so", "/usr/lib64/nginx/modules/ngx_mail_module.so"],
        "libnginx-mod-mail",
        "SMTP through nginx",
        &[Group::Mail],
    ),
    (
        &["/usr/lib/python3/dist-packages/aiosmtpd"],
        "python3-aiosmtpd",
        "a receiver in Python",
        &[Group::Mail],
    ),
    (
        &["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"],
        "ca-certificates",
        "TLS clients that need certificate authorities",
        &[Group::Mail],
    ),
];

/// The paths of virtiofsd: its own package's, and the one of qemu before Debian 13.
const VIRTIOFSD: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// The program that shares files with a virtual machine.
pub(super) fn virtiofsd() -> Option<PathBuf> {
    VIRTIOFSD.iter().map(PathBuf::from).find(|path| path.is_file())
}

/// virtiofsd as a tool, in the package that this system's releases have it in.
pub(super) fn virtiofsd_package(is_known: impl FnOnce(&str) -> bool) -> Tool {
    let package = if is_known("virtiofsd") { "virtiofsd" } else { "qemu-system-common" };
    let places = VIRTIOFSD.iter().map(PathBuf::from).collect();
    tool(Probe::File(places), package, "sharing the root file system with other kernels")
}

/// All tools of the groups, other than those that build BPF.
pub(super) fn tools(groups: &[Group]) -> Vec<Tool> {
    let wanted = |of: &[Group]| of.iter().any(|group| groups.contains(group));
    let programs = PROGRAMS
        .iter()
        .filter(|(.., of)| wanted(of))
        .map(|(name, package, why, _)| tool(Probe::Program(name), *package, why));
    let files = FILES.iter().filter(|(.., of)| wanted(of)).map(|(places, package, why, _)| {
        tool(Probe::File(places.iter().map(PathBuf::from).collect()), *package, why)
    });
    programs.chain(files).collect()
}

/// Debian's own way to compile for BPF: a compiler with a prebuilt `core`.
pub(super) const DEBIAN_COMPILER: [(&str, &str); 2] = [
    ("rustc-web", "compiling the BPF programs"),
    ("libstd-rust-web-dev-bpf", "the prebuilt `core` for BPF: no nightly and no build-std"),
];

/// What linking bpf-linker with Debian's LLVM needs.
pub(super) fn linker_needs(llvm: u32) -> Vec<Tool> {
    let file = |path: String| Probe::File(vec![path.into()]);
    vec![
        tool(Probe::Program("c++"), "g++", "the C++ library that LLVM needs"),
        tool(
            file(format!("/usr/include/llvm-{llvm}/llvm/IR/Module.h")),
            format!("llvm-{llvm}-dev"),
            "bpf-linker is linked with the compiler's own LLVM",
        ),
        tool(
            file(format!("/usr/lib/llvm-{llvm}/lib/libPolly.a")),
            format!("libpolly-{llvm}-dev"),
            "a part of that LLVM",
        ),
        tool(file("/usr/include/zlib.h".into()), "zlib1g-dev", "a library that LLVM needs"),
        tool(file("/usr/include/zstd.h".into()), "libzstd-dev", "a library that LLVM needs"),
    ]
}

/// The commands that install these packages. With `update` they download the package lists first.
pub(super) fn commands(packages: &[String], update: bool) -> Vec<String> {
    let preseed = packages
        .iter()
        .any(|name| name == "postfix")
        .then(|| format!("echo '{POSTFIX_ANSWER}' | sudo debconf-set-selections"));
    let install = format!(
        "sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {}",
        packages.join(" ")
    );
    update
        .then(|| "sudo apt-get update".to_owned())
        .into_iter()
        .chain(preseed)
        .chain(iter::once(install))
        .collect()
}

/// The answer to the question of Postfix' installer: the tests write their own configuration.
pub(super) const POSTFIX_ANSWER: &str = "postfix postfix/main_mailer_type select No configuration";

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tools: &[Tool]) -> Vec<&str> {
        tools.iter().map(|tool| tool.package.as_str()).collect()
    }

    #[test]
    fn the_demo_needs_only_iproute2_and_a_build_none_of_these() {
        assert_eq!(names(&tools(&[Group::Demo])), ["iproute2"]);
        assert_eq!(names(&tools(&[Group::Bpf])), [""; 0]);
    }

    #[test]
    fn a_tool_of_two_groups_is_named_once() {
        let both = tools(&Group::USUAL);
        assert_eq!(both, tools(&[Group::Mail]));
        let packages = names(&both);
        let mut unique = packages.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), packages.len(), "{packages:?}");
        assert!(packages.contains(&"postfix") && packages.contains(&"dovecot-lmtpd"));
    }

    #[test]
    fn the_linkers_packages_follow_the_compilers_llvm() {
        let packages = linker_needs(23);
        assert!(names(&packages).contains(&"llvm-23-dev"));
        assert!(names(&packages).contains(&"libpolly-23-dev"));
        assert!(packages.iter().all(|tool| !tool.why.is_empty()));
    }

    #[test]
    fn virtiofsd_is_in_its_own_package_or_in_that_of_qemu() {
        assert_eq!(virtiofsd_package(|name| name == "virtiofsd").package, "virtiofsd");
        assert_eq!(virtiofsd_package(|_| false).package, "qemu-system-common");
    }

    #[test]
    fn the_question_of_postfix_is_answered_before_installing() {
        let commands = commands(&["postfix".into(), "swaks".into()], true);
        assert_eq!(commands.len(), 3);
        assert_eq!(commands[0], "sudo apt-get update");
        assert!(commands[1].contains("No configuration"));
        assert!(commands[2].ends_with("--no-install-recommends postfix swaks"));
        assert_eq!(super::commands(&["swaks".into()], false).len(), 1);
    }

    #[test]
    fn a_missing_program_is_missing() {
        assert!(program("sh").is_some());
        assert!(program("no-such-program-of-the-injector").is_none());
        assert!(!tool(Probe::File(vec!["/no/such/file".into()]), "none", "none").is_present());
    }
}
