//! Where a running cluster keeps its files.

use std::{
    fs, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::plan::{Cni, Node, ProxyMode};
use crate::setup::ClusterTools;

/// One for the whole machine: the names of namespaces and control groups are the machine's too. Not
/// in `/tmp`, which may be in memory, and not on an overlay, which could not carry the nodes' own.
const FOLDER: &str = "/var/tmp/inj-cluster";

/// The abstract socket that a verb holds while it changes the cluster; it ends with its process.
const LOCK: &str = "injector/cluster";

/// What a cluster was started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) proxy_mode: ProxyMode,
    pub(super) cni: Cni,
}

/// The folders of a cluster.
#[derive(Debug, Clone)]
pub(super) struct State {
    folder: PathBuf,
    pub(super) tools: ClusterTools,
    pub(super) settings: Settings,
}

impl State {
    /// Creates the folder of a new cluster.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn create(tools: ClusterTools, settings: Settings) -> Result<Self> {
        let folder = PathBuf::from(FOLDER);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {FOLDER}"))?;
        fs::write(folder.join("settings.json"), serde_json::to_string(&settings)?)?;
        Ok(Self { folder, tools, settings })
    }

    /// The folder of the running cluster; `None` if there is none.
    pub(super) fn existing(tools: ClusterTools) -> Option<Self> {
        let text = fs::read_to_string(Path::new(FOLDER).join("settings.json")).ok()?;
        let settings = serde_json::from_str(&text).ok()?;
        Some(Self { folder: FOLDER.into(), tools, settings })
    }

    pub(super) fn node(&self, node: Node) -> PathBuf {
        self.folder.join(node.name())
    }

    /// The log lines of a container that have each of these texts, of all pods whose namespace and name
    /// begin so. The kubelet writes them on the nodes, so they are found while the API server is away
    /// too.
    pub(super) fn pod_log(&self, pods: &str, container: &str, parts: &[&str]) -> Vec<String> {
        let found = Node::KUBELETS.into_iter().flat_map(|node| {
            let folder = entries(self.node(node).join("upper/var/log/pods"));
            folder
                .into_iter()
                .filter(|path| path.file_name().is_some_and(|it| it.to_string_lossy().starts_with(pods)))
        });
        let logs = found.flat_map(|pod| entries(pod.join(container)));
        let texts = logs.filter_map(|log| fs::read_to_string(log).ok());
        let wanted = |line: &&str| parts.iter().all(|part| line.contains(part));
        texts.flat_map(|text| text.lines().filter(wanted).map(str::to_owned).collect::<Vec<_>>()).collect()
    }

    pub(super) fn pki(&self) -> PathBuf {
        self.folder.join("pki")
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.pki().join("admin.conf")
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

fn entries(folder: PathBuf) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Removes the folder. The nodes have tens of thousands of files, each removal waits for the disk, so
/// what is of different nodes and programs goes at the same time.
///
/// # Errors
/// When something in it is still mounted, for example.
pub(super) fn remove() -> Result<()> {
    let parts = entries(FOLDER.into()).into_iter().flat_map(|node| {
        let inside = if node.is_dir() { entries(node.clone()) } else { Vec::new() };
        inside.into_iter().filter(|path| path.is_dir() && !path.is_symlink())
    });
    thread::scope(|scope| {
        for part in parts {
            // What stays is found below.
            scope.spawn(move || drop(fs::remove_dir_all(part)));
        }
    });
    match fs::remove_dir_all(FOLDER) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {FOLDER}"))
        }
        _ => Ok(()),
    }
}

/// Locks the cluster until the socket is dropped.
///
/// # Errors
/// When another process holds the lock.
pub(super) fn lock() -> Result<UnixListener> {
    match UnixListener::bind_addr(&SocketAddr::from_abstract_name(LOCK)?) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            bail!("another `cargo xtask cluster` is running")
        }
        locked => locked.context("cannot lock the cluster"),
    }
}
