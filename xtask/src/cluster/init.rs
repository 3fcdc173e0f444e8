//! The first process of a node: makes its file system, and then waits for its orphans.
//!
//! It runs in new mount, pid, UTS and IPC namespaces, and in the node's network namespace. What it
//! mounts is gone when it ends.

use std::{
    ffi::CString,
    fs, io,
    os::unix::{ffi::OsStrExt as _, fs::symlink},
    path::{Path, PathBuf},
    ptr, thread,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{config, plan::Node};

/// Exists in a node whose file system is complete.
pub(super) const READY: &str = "run/up";

/// Where the folder of the node's logs is in the node.
pub(super) const LOGS: &str = "/var/log/node";

/// Where Kubernetes' programs are in a node.
pub(super) const PROGRAMS: &str = "/opt/kubernetes";

/// Where archives of images are in a node.
pub(super) const IMAGES: &str = "/opt/images";

/// What the kubelet sets and belongs to the whole machine: it writes to files instead
/// (pkg/kubelet/cm/container_manager_linux.go, setupKernelTunables).
const SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

#[derive(clap::Args)]
pub(crate) struct InitArgs {
    name: String,
    /// The file system below the node's own layer
    lower: PathBuf,
    /// The folder of what the node writes
    own: PathBuf,
    /// Folders to show in the node: programs, images, certificates
    programs: PathBuf,
    images: PathBuf,
    pki: PathBuf,
}

/// Makes the file system, and stays.
///
/// # Errors
/// When something cannot be mounted.
pub(crate) fn run(args: &InitArgs) -> Result<()> {
    let node = Node::named(&args.name).with_context(|| format!("no node {}", args.name))?;
    let root = file_system(args)?;
    complete(node, &root)?;
    enter(&root)?;
    fs::write(Path::new("/").join(READY), "")?;
    loop {
        // SAFETY: a null status pointer is allowed by waitpid(2), which then stores nothing.
        if unsafe { libc::waitpid(-1, ptr::null_mut(), 0) } < 0 {
            // Without a child there is nothing to wait for.
            thread::sleep(Duration::from_millis(200));
        }
    }
}

fn file_system(args: &InitArgs) -> Result<PathBuf> {
    mount(None, Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, "")?;
    let own = |name: &str| -> Result<PathBuf> {
        let path = args.own.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    };
    let root = own("root")?;
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        args.lower.display(),
        own("upper")?.display(),
        own("work")?.display()
    );
    mount(Some(Path::new("overlay")), &root, "overlay", 0, &layers)?;
    for (kind, place) in [("proc", "proc"), ("sysfs", "sys"), ("bpf", "sys/fs/bpf")] {
        mount(Some(Path::new(kind)), &root.join(place), kind, 0, "")?;
    }
    for place in ["sys/fs/cgroup", "dev"] {
        bind(&Path::new("/").join(place), &root.join(place), libc::MS_REC)?;
    }
    for place in ["run", "tmp"] {
        mount(Some(Path::new("tmpfs")), &root.join(place), "tmpfs", 0, "")?;
    }
    // containerd's own overlays cannot be on an overlay.
    for place in ["containerd", "kubelet", "etcd"] {
        let target = root.join("var/lib").join(place);
        fs::create_dir_all(&target)?;
        bind(&own(place)?, &target, 0)?;
    }
    let shown =
        [(&own("log")?, LOGS), (&args.programs, PROGRAMS), (&args.images, IMAGES), (&args.pki, config::PKI)];
    for (source, place) in shown {
        let target = root.join(place.trim_start_matches('/'));
        fs::create_dir_all(&target)?;
        bind(source, &target, 0)?;
    }
    Ok(root)
}

/// The node's settings and names.
fn complete(node: Node, root: &Path) -> Result<()> {
    let files = root.join("run/settings");
    fs::create_dir_all(&files)?;
    for (key, value) in SETTINGS {
        let file = files.join(key.replace('/', "_"));
        fs::write(&file, format!("{value}\n"))?;
        bind(&file, &root.join("proc/sys").join(key), 0)?;
    }
    fs::create_dir_all(root.join("run/lock"))?;
    fs::write(root.join("etc/hosts"), config::hosts())?;
    fs::write(root.join("etc/resolv.conf"), "")?;
    fs::write(root.join("etc/hostname"), format!("{node}\n"))?;
    let number = u32::from(node.address());
    fs::write(root.join("etc/machine-id"), format!("{number:032x}\n"))?;
    let name = node.name();
    // SAFETY: the pointer and the length are those of one string, which sethostname(2) only reads.
    let set = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
    done(set, "cannot set the host's name")
}

/// Makes the folder the root: chroot(2) would not do, because runc calls pivot_root(2) itself.
fn enter(root: &Path) -> Result<()> {
    let old = root.join("old");
    fs::create_dir_all(&old)?;
    let (new, put_old) = (text(root)?, text(&old)?);
    // SAFETY: both are strings that end with NUL, which the call only reads.
    let moved = unsafe { libc::syscall(libc::SYS_pivot_root, new.as_ptr(), put_old.as_ptr()) };
    done(if moved == 0 { 0 } else { -1 }, "pivot_root")?;
    std::env::set_current_dir("/")?;
    // Volumes of pods must reach the namespaces of their containers.
    mount(None, Path::new("/"), "", libc::MS_REC | libc::MS_SHARED, "")?;
    let old = text(Path::new("/old"))?;
    // SAFETY: a string that ends with NUL, which the call only reads.
    done(unsafe { libc::umount2(old.as_ptr(), libc::MNT_DETACH) }, "cannot unmount the machine's files")?;
    // Debian's links, where an image lacks them.
    for (link, target) in [("/var/run", "/run"), ("/var/lock", "/run/lock")] {
        if !Path::new(link).exists() {
            symlink(target, link)?;
        }
    }
    Ok(())
}

fn bind(source: &Path, target: &Path, flags: libc::c_ulong) -> Result<()> {
    mount(Some(source), target, "", libc::MS_BIND | flags, "")
}

fn mount(source: Option<&Path>, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) -> Result<()> {
    let (source, place) = (text(source.unwrap_or(Path::new("none")))?, text(target)?);
    let (kind, data) = (CString::new(kind)?, CString::new(data)?);
    // SAFETY: all are strings that end with NUL, which mount(2) only reads.
    let mounted =
        unsafe { libc::mount(source.as_ptr(), place.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    done(mounted, "cannot mount").with_context(|| format!("{}", target.display()))
}

fn text(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn done(result: libc::c_int, what: &'static str) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context(what) }
}
