//! A machine of the cluster: namespaces with a first process, and the programs that run in it.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::{
    init::{self, IMAGES, PROGRAMS},
    network,
    plan::{Node, PREFIX},
    state::State,
    wait::wait,
};
use crate::{cargo, interruption::is_interrupted};

/// How long a program of a node may take to start.
const LIMIT: Duration = Duration::from_secs(60);

/// Where control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A running node.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) node: Node,
    /// The first process, as this machine counts.
    pid: libc::pid_t,
    folder: PathBuf,
}

impl Machine {
    /// Starts the node's first process; its network namespace must exist.
    ///
    /// # Errors
    /// When the file system cannot be mounted; with the log of the first process.
    pub(super) fn start(node: Node, state: &State) -> Result<Self> {
        let folder = state.node(node);
        let log = folder.join("log");
        fs::create_dir_all(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let output = File::create(log.join("init.log"))?;
        let mut command = network::command(&node.netns(), "setsid");
        command.args(["--fork", "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork"]);
        command.arg("--kill-child=KILL").arg(env::current_exe().context("this program's path")?);
        command.args(["cluster", "init", node.name()]).arg(&state.tools.node).arg(&folder);
        command.args([&state.tools.programs, &state.tools.images, &state.pki()]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        ensure!(command.status().context("cannot run nsenter")?.success(), "cannot enter {}", node.netns());
        let started = wait(&format!("{node}'s file system"), LIMIT, || Ok(Self::find(node, state)));
        let printed = || fs::read_to_string(log.join("init.log")).unwrap_or_default();
        let machine = started.with_context(printed)?;
        control_groups(node)?;
        Ok(machine)
    }

    /// The node, if it runs.
    pub(super) fn find(node: Node, state: &State) -> Option<Self> {
        let first = |pid: &libc::pid_t| Path::new(&format!("/proc/{pid}/root")).join(init::READY).exists();
        // Only those in the node's pid namespace see its root; the first of them is its init.
        let mut pids = network::processes(&node.netns());
        pids.sort_unstable();
        let is_init = |pid: &libc::pid_t| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let mut ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
            ids = ids.trim();
            ids.split_whitespace().count() == 2 && ids.ends_with("\t1")
        };
        let pid = pids.into_iter().find(|pid| is_init(pid) && first(pid))?;
        Some(Self { node, pid, folder: state.node(node) })
    }

    /// A program in all namespaces of the node.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        self.enter(&mut command);
        command.arg(program);
        command
    }

    fn enter(&self, command: &mut Command) {
        command.arg(format!("--target={}", self.pid));
        command.args(["--mount", "--net", "--uts", "--ipc", "--pid", "--root", "--wdns=/"]);
    }

    /// Runs a program in the node, and returns what it printed.
    ///
    /// # Errors
    /// When it fails; with its output.
    pub(super) fn run(&self, words: &[&str]) -> Result<String> {
        let (program, arguments) = words.split_first().context("no program")?;
        output(self.command(program).args(arguments)).with_context(|| format!("at {}", self.node))
    }

    /// Starts a program that runs until it is stopped. Its output is appended to `NAME.log`.
    ///
    /// # Errors
    /// When it cannot be started. A program that ends later is found by waiting for what it makes.
    pub(super) fn start_program(&self, name: &str, words: &[&str]) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log(name))?;
        let mut command = Command::new("setsid");
        command.args(["--fork", "nsenter"]);
        self.enter(&mut command);
        command.args(words).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        ensure!(command.status()?.success(), "cannot start {name} at {}", self.node);
        Ok(())
    }

    /// Ends the programs with this name, and waits until they have ended.
    ///
    /// # Errors
    /// When one does not end.
    pub(super) fn stop_program(&self, name: &str, signal: &str) -> Result<()> {
        // The kernel keeps fifteen characters of a name.
        let name = name.get(..15).unwrap_or(name);
        let signalled = self.command("pkill").args([signal, "-x", name]).status()?;
        ensure!(signalled.success(), "no {name} runs at {}", self.node);
        wait(&format!("the end of {name} at {}", self.node), LIMIT, || {
            let found = self.command("pgrep").args(["-x", name]).stdout(Stdio::null()).status()?;
            Ok((!found.success()).then_some(()))
        })
    }

    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.folder.join("log").join(format!("{name}.log"))
    }

    /// Writes a file in the node.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn write(&self, path: &str, text: &str) -> Result<()> {
        let place = PathBuf::from(format!("/proc/{}/root{path}", self.pid));
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&place, text).with_context(|| format!("cannot write {path} at {}", self.node))
    }

    /// Imports an archive of [`IMAGES`] under this name.
    ///
    /// # Errors
    /// When containerd refuses it.
    pub(super) fn import(&self, archive: &str, name: &str) -> Result<()> {
        let path = format!("{IMAGES}/{archive}");
        self.run(&["ctr", "-n", "k8s.io", "images", "import", "--base-name", name, &path]).map(drop)
    }

    /// Imports an archive that is outside the node.
    ///
    /// # Errors
    /// When containerd refuses it.
    pub(super) fn import_from(&self, archive: &Path, name: &str) -> Result<()> {
        let mut import = self.command("ctr");
        import.args(["-n", "k8s.io", "images", "import", "--base-name", name, "-"]);
        output(import.stdin(File::open(archive)?)).map(drop).with_context(|| format!("at {}", self.node))
    }

    /// The path of one of Kubernetes' programs.
    pub(super) fn program(name: &str) -> String {
        format!("{PROGRAMS}/{name}")
    }
}

/// The output of a command. An interruption ends it, unless there was one already when it was started:
/// then it undoes something.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let undoes = is_interrupted();
    // In a group of its own, so that a terminal interrupts this program alone.
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn();
    let child = child.with_context(|| format!("cannot start `{}`", cargo::line(command)))?;
    let group = child.id().cast_signed();
    let output = thread::scope(|scope| {
        let waiting = scope.spawn(|| child.wait_with_output());
        while !waiting.is_finished() {
            if !undoes && is_interrupted() {
                // SAFETY: kill touches no memory; the group's first process was not waited for before.
                unsafe { libc::kill(-group, libc::SIGKILL) };
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
        waiting.join().map_err(|_| anyhow!("a thread panicked"))
    })??;
    ensure!(undoes || !is_interrupted(), "interrupted");
    if !output.status.success() {
        let printed = [output.stdout, output.stderr].concat();
        bail!(
            "`{}` failed ({}):\n{}",
            cargo::line(command),
            output.status,
            String::from_utf8_lossy(&printed).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The folders of all hierarchies of control groups.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(CGROUPS).context(CGROUPS)?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect())
}

/// Those of version 1, in which the nodes have groups. Programs in a node make some in the other one.
fn hierarchies_v1() -> Result<Vec<PathBuf>> {
    Ok(hierarchies()?.into_iter().filter(|path| !path.ends_with("unified")).collect())
}

/// Creates the node's control groups. The kubelet makes none above its own, and a group of
/// `cpuset` is empty at first.
fn control_groups(node: Node) -> Result<()> {
    for hierarchy in hierarchies_v1()? {
        let mut group = hierarchy;
        for name in [PREFIX, node.name()] {
            let parent = group.clone();
            group.push(name);
            fs::create_dir_all(&group).with_context(|| format!("cannot create {}", group.display()))?;
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = fs::read(parent.join(file)) {
                    fs::write(group.join(file), value)?;
                }
            }
        }
    }
    Ok(())
}

/// Why nodes cannot run here.
pub(super) fn obstacle() -> Option<String> {
    if let Some(why) = injector_testbed::netns::unavailable() {
        return Some(why.into());
    }
    if !cfg!(target_arch = "x86_64") {
        return Some("kubectl is available only for x86-64".into());
    }
    // Version 2 was not tried.
    let version_1 =
        Path::new(CGROUPS).join("cpu").is_dir() || Path::new(CGROUPS).join("cpu,cpuacct").is_dir();
    (!version_1).then(|| format!("{CGROUPS} has no control groups of version 1"))
}

/// Ends all processes of all nodes, and removes their control groups; returns what could not be
/// removed.
pub(super) fn end_all() -> Vec<String> {
    // The first process of a node takes all others along; the rest run in its network alone.
    for netns in network::existing() {
        for pid in network::processes(&netns) {
            // SAFETY: kill touches no memory; the pid was listed as running in our own namespace.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    let gone = || {
        let left = network::existing().iter().any(|netns| !network::processes(netns).is_empty());
        let groups = groups();
        groups.iter().for_each(|group| remove_group(group));
        (!left && groups.iter().all(|group| !group.exists())).then_some(())
    };
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while gone().is_none() && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut left: Vec<_> = groups().iter().map(|group| group.display().to_string()).collect();
    for netns in network::existing() {
        if let Err(error) = network::remove(&netns) {
            left.push(format!("{error:#}"));
        }
    }
    left
}

/// The cluster's control groups, one in each hierarchy.
fn groups() -> Vec<PathBuf> {
    let all = hierarchies().unwrap_or_default();
    all.into_iter().map(|folder| folder.join(PREFIX)).filter(|group| group.exists()).collect()
}

/// Removes a control group and those below it; those with processes stay.
fn remove_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    // The caller looks whether it is gone.
    let _ = fs::remove_dir(group);
}
