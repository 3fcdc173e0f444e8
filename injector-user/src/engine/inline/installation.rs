//! What daemons have left in the kernel: maps, and the programs that are attached in this network
//! namespace. It is found by what it is, not by the path that is configured now.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use aya::programs::TcAttachType;
use injector_common::inline::{Entry, Flow, Key};

use super::attach::SET;
use crate::{
    engine::attach::{
        filters::{self, Filter},
        routes,
    },
    os::{
        bpf::{self, Object},
        bpffs,
    },
};

/// The layout of the maps. Maps of another layout are in another folder.
pub(super) const VERSION: u32 = 7;

/// Programs of this layout, and of those that have the same names.
const PROGRAMS: [&str; 2] = ["inline", "inline_raw"];
/// Programs of layout 5 and before.
const PROGRAMS_V5: [&str; 6] =
    ["client_in", "client_in_raw", "backend_in", "backend_in_raw", "backend_out", "backend_out_raw"];

const DIRECTIONS: [TcAttachType; 2] = [TcAttachType::Ingress, TcAttachType::Egress];

/// Whose maps these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// This version's.
    Own,
    /// Layout 5, whose programs need the kernel's NAT.
    V5,
    /// Another one with `LISTENERS`, and with `FLOWS` by the same keys.
    Other,
}

/// Maps, and the programs that use them.
#[derive(Debug)]
pub(super) struct Installation {
    /// The folder `v<layout>`; `None` if its pins are out of reach.
    pub(super) folder: Option<PathBuf>,
    pub(super) layout: Layout,
    /// By name.
    pub(super) maps: BTreeMap<String, OwnedFd>,
    pub(super) links: Vec<FoundLink>,
    pub(super) filters: Vec<FoundFilter>,
}

/// A link that is attached here.
#[derive(Debug)]
pub(super) struct FoundLink {
    pub(super) link: OwnedFd,
    pub(super) device: u32,
    pub(super) device_name: String,
    pub(super) program: u32,
}

/// A filter that is attached here.
#[derive(Debug)]
pub(super) struct FoundFilter {
    pub(super) device_name: String,
    pub(super) direction: TcAttachType,
    pub(super) filter: Filter,
}

impl FoundLink {
    /// For messages.
    pub(super) fn describe(&self) -> String {
        let name = bpf::program_by_id(self.program).and_then(|program| bpf::program_info(program.as_fd()));
        let name = name.map_or_else(|_| format!("program {}", self.program), |info| info.name);
        format!("{name} on {} (tcx)", self.device_name)
    }
}

impl FoundFilter {
    /// For messages.
    pub(super) fn describe(&self) -> String {
        format!("{} on {} (filter)", self.name(), self.device_name)
    }

    fn program(&self) -> u32 {
        self.filter.bpf.as_ref().map_or(0, |bpf| bpf.program)
    }

    pub(super) fn name(&self) -> &str {
        self.filter.bpf.as_ref().map_or("", |bpf| &bpf.name)
    }
}

/// A tcx program that is attached here.
#[derive(Debug)]
struct Tcx {
    device: u32,
    device_name: String,
    program: u32,
    link: u32,
}

impl Installation {
    fn new(layout: Layout) -> Self {
        Self { folder: None, layout, maps: BTreeMap::new(), links: Vec::new(), filters: Vec::new() }
    }

    /// Whether any of its programs is attached in this network namespace.
    pub(super) fn is_attached(&self) -> bool {
        !self.links.is_empty() || !self.filters.is_empty()
    }

    /// What is attached, for messages.
    pub(super) fn attached(&self) -> impl Iterator<Item = String> {
        let filters = self.filters.iter().map(FoundFilter::describe);
        self.links.iter().map(FoundLink::describe).chain(filters)
    }

    /// The ids of its programs.
    pub(super) fn programs(&self) -> HashSet<u32> {
        let filters = self.filters.iter().map(FoundFilter::program);
        self.links.iter().map(|link| link.program).chain(filters).collect()
    }

    /// For log lines.
    pub(super) fn place(&self) -> String {
        match &self.folder {
            Some(folder) => folder.display().to_string(),
            None => "a BPF file system that this process does not see".to_owned(),
        }
    }

    /// Removes its pins and folders; what is attached by them goes with them.
    pub(super) fn remove_pins(&self) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        for part in ["links", "maps"] {
            let part = folder.join(part);
            for entry in entries(&part)? {
                fs::remove_file(entry.path())?;
            }
            remove_folder(&part)?;
        }
        remove_folder(folder)
    }

    /// Detaches its programs.
    pub(super) fn detach(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        for found in &self.filters {
            found.filter.remove(&found.device_name, found.direction)?;
        }
        for found in &self.links {
            bpf::detach_link(found.link.as_fd())?;
        }
        Ok(())
    }
}

/// What daemons left.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) installations: Vec<Installation>,
    /// The tcx programs of which this process may not know what they are.
    pub(super) unreadable: Vec<Unreadable>,
}

/// A tcx program that only CAP_SYS_ADMIN can identify.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) device_name: String,
    /// The id of its link.
    pub(super) link: u32,
}

/// Finds what daemons left: all that is pinned under `configured`, and what else is attached to
/// devices of this network namespace.
pub(super) fn find(configured: &Path) -> io::Result<Found> {
    let (mut tcx, mut filters) = attached()?;
    let mut found = Vec::new();
    for folder in folders(configured) {
        found.push(read(&folder, &mut tcx, &mut filters)?);
    }
    let unreadable = by_id(&mut found, tcx, &mut filters);
    let configured =
        |known: &Installation| known.folder.as_ref().is_some_and(|folder| folder.starts_with(configured));
    // What has no programs here may be another network namespace's.
    found.retain(|known| known.is_attached() || configured(known));
    // Filters of known names, whose programs cannot be opened without CAP_SYS_ADMIN.
    for filter in filters {
        let layout = if PROGRAMS_V5.contains(&filter.name()) { Layout::V5 } else { Layout::Other };
        let same = |known: &&mut Installation| match layout {
            Layout::V5 => known.layout == Layout::V5 && (known.folder.is_none() || configured(known)),
            // A filter of this layout has its program pinned: it is not one of ours.
            _ => known.folder.is_none() && known.maps.is_empty(),
        };
        match found.iter_mut().find(same) {
            Some(known) => known.filters.push(filter),
            None => found.push(Installation { filters: vec![filter], ..Installation::new(layout) }),
        }
    }
    Ok(Found { installations: found, unreadable })
}

/// What may be ours on the devices: all tcx programs, and filters with our programs' names.
fn attached() -> io::Result<(Vec<Tcx>, Vec<FoundFilter>)> {
    let (mut tcx, mut all_filters) = (Vec::new(), Vec::new());
    for interface in routes::interfaces()? {
        let device_name = interface.name;
        for direction in DIRECTIONS {
            let egress = direction == TcAttachType::Egress;
            // Before Linux 6.6, and for a device that is gone, there are none.
            let programs = bpf::tcx_programs(interface.index, egress).unwrap_or_default();
            tcx.extend(programs.into_iter().map(|program| Tcx {
                device: interface.index,
                device_name: device_name.clone(),
                program: program.program,
                link: program.link,
            }));
            for filter in filters::list(interface.index, direction)?.into_iter().filter(is_ours) {
                // A qdisc of the kind ingress lists its filters for both directions.
                let listed = |found: &FoundFilter| found.device_name == device_name && found.filter == filter;
                if !all_filters.iter().any(listed) {
                    all_filters.push(FoundFilter { device_name: device_name.clone(), direction, filter });
                }
            }
        }
    }
    Ok((tcx, all_filters))
}

fn is_ours(filter: &Filter) -> bool {
    let v5 = filter.bpf.as_ref().is_some_and(|bpf| PROGRAMS_V5.contains(&bpf.name.as_str()));
    v5 || filter.is_of(&SET)
}

/// Reads a folder `v<layout>`, and takes what is attached by its pins out of the lists.
fn read(folder: &Path, tcx: &mut Vec<Tcx>, filters: &mut Vec<FoundFilter>) -> io::Result<Installation> {
    let layout = match version(folder) {
        Some(VERSION) => Layout::Own,
        Some(version) if version <= 5 => Layout::V5,
        _ => Layout::Other,
    };
    let mut installation = Installation { folder: Some(folder.to_owned()), ..Installation::new(layout) };
    for entry in entries(&folder.join("maps"))? {
        if let (Ok(map), Ok(name)) = (bpf::open_pin(&entry.path()), entry.file_name().into_string())
            && bpf::object(map.as_fd())? == Some(Object::Map)
        {
            installation.maps.insert(name, map);
        }
    }
    for entry in entries(&folder.join("links"))? {
        let Ok(object) = bpf::open_pin(&entry.path()) else { continue };
        match bpf::object(object.as_fd())? {
            Some(Object::Link) => {
                let Some(info) = bpf::link_info(object.as_fd())? else { continue };
                let Some(at) = tcx.iter().position(|program| program.link == info.id) else { continue };
                installation.links.push(tcx.swap_remove(at).found(object));
            }
            Some(Object::Program) => {
                let id = bpf::program_info(object.as_fd())?.id;
                let (own, others) =
                    std::mem::take(filters).into_iter().partition(|filter| filter.program() == id);
                *filters = others;
                installation.filters.extend::<Vec<_>>(own);
            }
            _ => {}
        }
    }
    Ok(installation)
}

/// Finds out by the ids of programs and maps whose the rest is, which needs CAP_SYS_ADMIN. What is
/// not ours stays out. Returns the programs that cannot be opened.
fn by_id(found: &mut Vec<Installation>, tcx: Vec<Tcx>, filters: &mut Vec<FoundFilter>) -> Vec<Unreadable> {
    let mut unreadable = Vec::new();
    for tcx in tcx {
        let known = maps_of(tcx.program).and_then(|maps| Ok((maps, bpf::link_by_id(tcx.link)?)));
        match known {
            Ok((Some((layout, maps)), link)) => owner(found, layout, maps).links.push(tcx.found(link)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                unreadable.push(Unreadable { device_name: tcx.device_name, link: tcx.link });
            }
            // Another software's, or gone by now.
            _ => {}
        }
    }
    for filter in std::mem::take(filters) {
        match maps_of(filter.program()) {
            Ok(Some((layout, maps))) => owner(found, layout, maps).filters.push(filter),
            _ => filters.push(filter),
        }
    }
    unreadable
}

impl Tcx {
    fn found(self, link: OwnedFd) -> FoundLink {
        FoundLink { link, device: self.device, device_name: self.device_name, program: self.program }
    }
}

/// The installation that has one of these maps: one that is known, or a new one.
fn owner(
    found: &mut Vec<Installation>,
    layout: Layout,
    maps: BTreeMap<String, OwnedFd>,
) -> &mut Installation {
    let ids = |maps: &BTreeMap<String, OwnedFd>| -> HashSet<u32> {
        maps.values().filter_map(|map| Some(bpf::map_info(map.as_fd()).ok()?.id)).collect()
    };
    let own = ids(&maps);
    let at = found.iter().position(|known| !own.is_disjoint(&ids(&known.maps)));
    let at = at.unwrap_or_else(|| {
        found.push(Installation::new(layout));
        found.len() - 1
    });
    let known = &mut found[at];
    if known.folder.is_none() {
        for (name, map) in maps {
            known.maps.entry(name).or_insert(map);
        }
    }
    known
}

/// The maps of a program of ours, and their layout; `None` if the program is another software's.
fn maps_of(program: u32) -> io::Result<Option<(Layout, BTreeMap<String, OwnedFd>)>> {
    let info = bpf::program_info(bpf::program_by_id(program)?.as_fd())?;
    let v5 = PROGRAMS_V5.contains(&info.name.as_str());
    if !v5 && !PROGRAMS.contains(&info.name.as_str()) {
        return Ok(None);
    }
    let mut maps = BTreeMap::new();
    let mut layout = if v5 { Layout::V5 } else { Layout::Own };
    for id in info.maps {
        let map = bpf::map_by_id(id)?;
        let info = bpf::map_info(map.as_fd())?;
        let expected = match info.name.as_str() {
            "FLOWS" => Some((size_of::<Key>(), size_of::<Entry>())),
            "CONNECTIONS" => Some((size_of::<u32>(), size_of::<Flow>())),
            _ => None,
        };
        if !v5 && expected.is_some_and(|sizes| sizes != (info.key_size, info.value_size)) {
            layout = Layout::Other;
        }
        maps.insert(info.name, map);
    }
    // Other software may have programs of the same name.
    let ours = maps.contains_key("FLOWS") || maps.contains_key("LISTENERS");
    Ok(ours.then_some((layout, maps)))
}

/// The folders `v<layout>` with maps or links, under the configured one and in all BPF file systems
/// that this process sees.
fn folders(configured: &Path) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for root in std::iter::once(configured.to_owned()).chain(bpffs::mounts()) {
        let mut folders = vec![(root, 0)];
        while let Some((folder, depth)) = folders.pop() {
            let Ok(metadata) = fs::symlink_metadata(&folder) else { continue };
            if !metadata.is_dir() || !seen.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            if version(&folder).is_some() && ["maps", "links"].iter().any(|part| folder.join(part).is_dir()) {
                found.push(folder);
            } else if depth < MAX_DEPTH {
                let inside = entries(&folder).unwrap_or_default().into_iter();
                folders.extend(inside.map(|entry| (entry.path(), depth + 1)));
            }
        }
    }
    found
}

/// How deep in a BPF file system a pin folder may be.
const MAX_DEPTH: u32 = 6;

/// The layout's number in a folder's name.
fn version(folder: &Path) -> Option<u32> {
    folder.file_name()?.to_str()?.strip_prefix('v')?.parse().ok()
}

/// The entries of a folder; none if it does not exist.
pub(super) fn entries(folder: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.collect(),
    }
}

/// Removes an empty folder, if it exists.
pub(super) fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_by_their_layout() {
        for (folder, expected) in
            [("/b/injector/v6", Some(6)), ("/b/v5", Some(5)), ("/b/v", None), ("/b/vault", None), ("/", None)]
        {
            assert_eq!(version(Path::new(folder)), expected);
        }
    }

    #[test]
    fn folders_of_any_layout_are_found() {
        let root = tempfile::tempdir().unwrap();
        for folder in ["a/v6/maps", "a/v5/links", "b/c/v7/maps", "d/v9", "a/other/maps"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let mut found = folders(root.path());
        found.retain(|folder| folder.starts_with(root.path()));
        found.sort();
        let expected = ["a/v5", "a/v6", "b/c/v7"].map(|folder| root.path().join(folder));
        assert_eq!(found, expected);
    }
}
