//! Imports run one way: between the modules of the daemon in one order, and between the files of every crate without a cycle.
//!
//! Read from the `use` declarations and the `crate::` paths of the sources, tests excluded. A re-export (`pub use` in a
//! `mod.rs`) is not an import: who imports through it is taken to import from the file that it names.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use syn::{
    Attribute, Item, ItemMod, ItemUse, UseTree, Visibility,
    visit::{self, Visit},
};

use crate::cargo;

/// The modules of `injector-user`, bottom to top: each may import from those before it.
const ORDER: [&str; 20] = [
    "protocol",
    "config",
    "telemetry",
    "os",
    "net",
    "header",
    "kubernetes",
    "backend",
    "engine",
    "guard",
    "session",
    "listener",
    "server",
    "control",
    "daemon",
    "doctor",
    "probe",
    "cli",
    "lib",
    "main",
];

/// The crates, with the name by which a binary of the same package imports the library.
const CRATES: [(&str, &str); 11] = [
    ("injector-common/src", "injector_common"),
    ("injector-ebpf/src/splice", ""),
    ("injector-ebpf/src/inline", ""),
    ("injector-ebpf/src/guard", ""),
    ("injector-user/src", "injector_user"),
    ("tests/testbed/src", "injector_testbed"),
    ("tests/load/src", "injector_load"),
    ("tests/bench/src", "injector_bench"),
    ("tests/soak/src", "injector_soak"),
    ("xtask/src", ""),
    ("fuzz", ""),
];

/// A module path below the crate's root, such as `engine::splice`.
type Module = Vec<String>;

/// One source file.
#[derive(Debug, Default)]
struct Source {
    /// Every path it imports, from the crate's root.
    imports: BTreeSet<Module>,
    /// What it re-exports: the name and where that comes from.
    reexports: BTreeMap<String, Module>,
    /// The modules that it takes from another folder (`#[path]`).
    outside: BTreeSet<String>,
}

/// The files of one crate by their module paths.
struct Crate {
    name: &'static str,
    files: BTreeMap<Module, Source>,
}

impl Crate {
    fn read(folder: &str, name: &'static str) -> Self {
        let mut files = BTreeMap::new();
        for below in sources(folder) {
            let path = cargo::workspace().join(folder).join(&below);
            let mut module: Module =
                below.with_extension("").iter().map(|part| part.to_str().unwrap().to_owned()).collect();
            if module.last().is_some_and(|last| last == "mod") {
                module.pop();
            }
            let text = fs::read_to_string(&path).unwrap();
            let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let mut reader = Reader { name, module: home(&module), source: Source::default() };
            reader.visit_file(&file);
            files.insert(module, reader.source);
        }
        Self { name, files }
    }

    /// The file in which the item of this path is defined, following re-exports.
    fn file_of(&self, path: &[String]) -> Option<&Module> {
        let (module, source) = (0..=path.len()).rev().find_map(|len| {
            let module = path.get(..len)?;
            // The root's file is `lib` or `main`.
            if module.is_empty() {
                return ["lib", "main"]
                    .iter()
                    .find_map(|root| self.files.get_key_value([(*root).to_owned()].as_slice()));
            }
            self.files.get_key_value(module)
        })?;
        let depth = home(module).len();
        if path.get(depth).is_some_and(|name| source.outside.contains(name)) {
            return None;
        }
        let through = path.get(depth).and_then(|name| source.reexports.get(name));
        match through {
            Some(origin) if origin.as_slice() != path => self.file_of(origin),
            _ => Some(module),
        }
    }

    /// Each file with those that it imports from.
    fn edges(&self) -> BTreeMap<&Module, BTreeSet<&Module>> {
        let targets = |(module, source): (&Module, &Source)| -> BTreeSet<&Module> {
            let found = source.imports.iter().filter_map(|path| self.file_of(path));
            found.filter(|target| *target != module).collect()
        };
        self.files.iter().map(|(module, source)| (module, targets((module, source)))).collect()
    }

    /// Files that import each other, directly or through others.
    fn cycles(&self) -> Vec<Vec<String>> {
        let edges = self.edges();
        let reach = |from: &Module| -> BTreeSet<Module> {
            let mut seen = BTreeSet::new();
            let mut open: Vec<&Module> = edges.get(from).into_iter().flatten().copied().collect();
            while let Some(module) = open.pop() {
                if seen.insert(module.clone()) {
                    open.extend(edges.get(module).into_iter().flatten().copied());
                }
            }
            seen
        };
        let reached: BTreeMap<&Module, BTreeSet<Module>> =
            edges.keys().map(|module| (*module, reach(module))).collect();
        let mut cycles = BTreeSet::new();
        for (module, below) in &reached {
            if below.contains(*module) {
                let with: Vec<_> = reached
                    .iter()
                    .filter(|(other, of_other)| below.contains(**other) && of_other.contains(*module))
                    .map(|(other, _)| format!("{}::{}", self.name, other.join("::")))
                    .collect();
                cycles.insert(with);
            }
        }
        cycles.into_iter().collect()
    }
}

/// Where `super` and `self` start from: `lib` and `main` are the root.
fn home(module: &Module) -> Module {
    if matches!(module.as_slice(), [only] if only == "lib" || only == "main") {
        Module::new()
    } else {
        module.clone()
    }
}

/// Collects the imports of one file.
struct Reader {
    name: &'static str,
    module: Module,
    source: Source,
}

impl Reader {
    /// The path from the crate's root; `None` if it leads to another crate.
    fn path_below_root(&self, path: &[String]) -> Option<Module> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([self.module.as_slice(), rest].concat()),
            "super" => {
                let mut base = self.module.clone();
                let mut rest = path;
                while let Some((_, further)) = rest.split_first().filter(|(first, _)| *first == "super") {
                    base.pop();
                    rest = further;
                }
                Some([base.as_slice(), rest].concat())
            }
            other if !self.name.is_empty() && other == self.name => Some(rest.to_vec()),
            _ => None,
        }
    }

    fn tree(&mut self, tree: &UseTree, before: &mut Vec<String>, reexport: bool) {
        let (leaf, shown) = match tree {
            UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(&path.tree, before, reexport);
                before.pop();
                return;
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.tree(tree, before, reexport);
                }
                return;
            }
            UseTree::Name(name) if name.ident == "self" => (None, before.last().cloned()),
            UseTree::Name(name) => (Some(name.ident.to_string()), Some(name.ident.to_string())),
            UseTree::Rename(rename) => (Some(rename.ident.to_string()), Some(rename.rename.to_string())),
            UseTree::Glob(_) => (None, None),
        };
        let path: Vec<String> = before.iter().cloned().chain(leaf).collect();
        let Some(path) = self.path_below_root(&path) else { return };
        match (reexport, shown) {
            (true, Some(shown)) => drop(self.source.reexports.insert(shown, path)),
            _ => drop(self.source.imports.insert(path)),
        }
    }
}

impl<'a> Visit<'a> for Reader {
    fn visit_item(&mut self, item: &'a Item) {
        let attributes: &[Attribute] = match item {
            Item::Mod(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            _ => &[],
        };
        let test = |attribute: &Attribute| {
            attribute.path().is_ident("cfg")
                && attribute.parse_args::<syn::Ident>().is_ok_and(|condition| condition == "test")
        };
        if !attributes.iter().any(test) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        if item.attrs.iter().any(|attribute| attribute.path().is_ident("path")) {
            self.source.outside.insert(item.ident.to_string());
        }
        visit::visit_item_mod(self, item);
    }

    fn visit_item_use(&mut self, item: &'a ItemUse) {
        let reexport = !matches!(item.vis, Visibility::Inherited);
        self.tree(&item.tree, &mut Vec::new(), reexport);
    }

    /// `pub(crate)` and its like name a module without importing from it.
    fn visit_visibility(&mut self, _: &'a Visibility) {}

    fn visit_path(&mut self, path: &'a syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if names.first().is_some_and(|first| first == "crate" || first == self.name)
            && let Some(path) = self.path_below_root(&names)
        {
            self.source.imports.insert(path);
        }
        visit::visit_path(self, path);
    }
}

/// The sources below a folder of the repository, tests excluded.
fn sources(folder: &str) -> Vec<PathBuf> {
    let is_source = |file: &Path| {
        file.extension().is_some_and(|extension| extension == "rs")
            && !file.iter().any(|part| part == "tests" || part == "tests.rs")
    };
    let below = super::tracked_files()
        .into_iter()
        .filter_map(|file| Some(file.strip_prefix(folder).ok()?.to_owned()));
    let found: Vec<_> = below.filter(|file| is_source(file)).collect();
    assert!(!found.is_empty(), "no source below {folder}");
    found
}

#[test]
fn the_modules_of_the_daemon_import_one_way() {
    let (folder, name) = CRATES[4];
    let daemon = Crate::read(folder, name);
    let rank = |module: &Module| {
        let top = module.first().map_or("lib", String::as_str);
        ORDER.iter().position(|known| *known == top).unwrap_or_else(|| panic!("{top} is not in ORDER"))
    };
    println!("{}", ORDER[..ORDER.len() - 2].join(" → "));
    let mut arrows = BTreeSet::new();
    let mut back = Vec::new();
    for (module, targets) in daemon.edges() {
        for target in targets {
            if rank(module) != rank(target) {
                arrows.insert((module.first(), target.first()));
            }
            if rank(target) > rank(module) {
                back.push(format!("{} imports {}", module.join("::"), target.join("::")));
            }
        }
    }
    println!(
        "{} files, {} arrows between modules, {} of them backwards",
        daemon.files.len(),
        arrows.len(),
        back.len()
    );
    assert!(back.is_empty(), "imports that run back:\n{}", back.join("\n"));
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut all = Vec::new();
    for (folder, name) in CRATES {
        let name = if name.is_empty() { folder } else { name };
        let one = Crate::read(folder, name);
        let cycles = one.cycles();
        println!("{name}: {} files, {} cycles", one.files.len(), cycles.len());
        all.extend(cycles.into_iter().map(|files| files.join(", ")));
    }
    assert!(all.is_empty(), "cycles:\n{}", all.join("\n"));
}
