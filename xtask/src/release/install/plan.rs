//! Decides the steps of installing and uninstalling; `apply` carries them out.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
};

use super::{
    layout::{CONFIG, Layout, STATE},
    manifest::Manifest,
};

/// A file to install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Product {
    /// Its path in the installed system.
    pub(crate) path: PathBuf,
    pub(crate) mode: u32,
    pub(crate) content: Vec<u8>,
    /// Whether it is written only once: afterwards it belongs to the operator.
    pub(crate) config: bool,
}

/// What exists at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum There {
    Nothing,
    Folder,
    /// A file with this content and mode.
    Same,
    /// Something else that is not a folder.
    Other,
}

/// The system to install into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum System {
    /// A tree for another machine (`--destdir`): only files.
    Tree,
    /// This machine without a running systemd, as in a container.
    Idle,
    /// This machine with a running systemd.
    Systemd,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    MakeFolder(PathBuf),
    Write {
        product: Product,
        replaces: bool,
    },
    Unchanged {
        path: PathBuf,
        mode: u32,
    },
    /// The operator's configuration.
    Keep(PathBuf),
    RemoveFile(PathBuf),
    /// Removed only if it is empty.
    RemoveFolder(PathBuf),
    Run {
        command: Vec<String>,
        tolerant: bool,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeFolder(path) => write!(f, "create   0755  {}/", path.display()),
            Self::Write { product: Product { path, mode, .. }, replaces } => {
                let verb = if *replaces { "replace" } else { "write" };
                write!(f, "{verb:<8} {mode:04o}  {}", path.display())
            }
            Self::Unchanged { path, mode } => write!(f, "as it is {mode:04o}  {}", path.display()),
            Self::Keep(path) => write!(f, "keep           {}", path.display()),
            Self::RemoveFile(path) => write!(f, "remove         {}", path.display()),
            Self::RemoveFolder(path) => write!(f, "remove         {}/  (if empty)", path.display()),
            Self::Run { command, tolerant } => {
                write!(f, "run            {}", command.join(" "))?;
                f.write_str(if *tolerant { "  (may fail)" } else { "" })
            }
        }
    }
}

fn run(words: &[&str]) -> Step {
    Step::Run { command: words.iter().map(|&word| word.to_owned()).collect(), tolerant: false }
}

fn try_to(words: &[&str]) -> Step {
    Step::Run { command: words.iter().map(|&word| word.to_owned()).collect(), tolerant: true }
}

/// The steps of `install`. `before` is the manifest of an earlier installation; `there` compares a
/// path with the file to install.
pub(crate) fn install(
    layout: &Layout,
    products: Vec<Product>,
    before: &Manifest,
    there: &dyn Fn(&Path, Option<&Product>) -> There,
    system: System,
    start: bool,
) -> Vec<Step> {
    let mut after = Manifest::default();
    let mut folders: BTreeSet<PathBuf> = before.folders.iter().cloned().collect();
    let mut made = BTreeSet::new();
    let mut files = Vec::new();
    let manifest = layout.manifest();
    let places = products.iter().map(|product| product.path.as_path()).chain([manifest.as_path()]);
    for folder in places.flat_map(|path| path.ancestors().skip(1)) {
        if there(folder, None) == There::Nothing && made.insert(folder.to_path_buf()) {
            folders.insert(folder.to_path_buf());
        }
    }
    for product in products {
        let found = there(&product.path, Some(&product));
        if product.config {
            after.configs.push(product.path.clone());
        } else {
            after.files.push(product.path.clone());
        }
        files.push(match found {
            There::Same => Step::Unchanged { path: product.path, mode: product.mode },
            There::Other | There::Folder if product.config => Step::Keep(product.path),
            _ => Step::Write { replaces: found != There::Nothing, product },
        });
    }
    let gone = |path: &Path| there(path, None) == There::Nothing;
    let stale = before.files.iter().filter(|path| !after.files.contains(path) && **path != manifest);
    let stale = stale.filter(|path| !gone(path));
    files.extend(stale.map(|path| Step::RemoveFile(path.clone())));
    after.files.push(manifest.clone());
    after.folders = folders.into_iter().collect();
    let record = Product { path: manifest, mode: 0o644, content: after.render().into_bytes(), config: false };
    files.push(match there(&record.path, Some(&record)) {
        There::Same => Step::Unchanged { path: record.path, mode: record.mode },
        found => Step::Write { replaces: found != There::Nothing, product: record },
    });
    // Parents come first, because paths sort in this order.
    let folders = made.into_iter().map(Step::MakeFolder);
    folders.chain(files).chain(after_install(layout, system, start)).collect()
}

fn after_install(layout: &Layout, system: System, start: bool) -> Vec<Step> {
    if system == System::Tree {
        return Vec::new();
    }
    let (sysusers, tmpfiles) = (layout.sysusers(), layout.tmpfiles());
    let mut steps = vec![
        run(&["systemd-sysusers", &sysusers.to_string_lossy()]),
        // Only engine "inline" needs a BPF file system, to pin its maps.
        try_to(&["systemd-tmpfiles", "--create", &tmpfiles.to_string_lossy()]),
    ];
    if system == System::Systemd {
        steps.push(run(&["systemctl", "daemon-reload"]));
        if start {
            steps.push(run(&["systemctl", "enable", "injector.service"]));
            steps.push(run(&["systemctl", "restart", "injector.service"]));
        }
    }
    steps
}

/// The steps of `uninstall`.
pub(crate) fn uninstall(
    layout: &Layout,
    manifest: &Manifest,
    there: &dyn Fn(&Path) -> There,
    system: System,
    purge: bool,
) -> Vec<Step> {
    let mut steps = Vec::new();
    if system == System::Systemd {
        steps.push(try_to(&["systemctl", "disable", "--now", "injector.socket", "injector.service"]));
    }
    if system != System::Tree {
        // Programs and maps stay in the kernel, and only the program can remove them.
        let program = layout.program();
        let program = program.to_string_lossy();
        let config = there(Path::new(CONFIG)) == There::Nothing;
        for part in ["guard", "inline"] {
            let detach: &[&str] = &[&program, part, "detach", "--config", CONFIG];
            steps.push(try_to(if config { &detach[..3] } else { detach }));
        }
        // Folders that tmpfiles.d/injector.conf created.
        let made = ["/sys/fs/bpf/injector", "/run/injector-bpf/injector", "/run/injector-bpf"];
        steps.push(try_to(&[&["rmdir", "--ignore-fail-on-non-empty"], &made[..]].concat()));
    }
    if purge && system != System::Tree {
        steps.push(run(&["rm", "-rf", STATE]));
    }
    let configs = manifest.configs.iter();
    steps.extend(
        configs
            .filter(|path| there(path) != There::Nothing)
            .map(|path| if purge { Step::RemoveFile(path.clone()) } else { Step::Keep(path.clone()) }),
    );
    let files = manifest.files.iter().filter(|path| there(path) != There::Nothing);
    steps.extend(files.cloned().map(Step::RemoveFile));
    let mut folders: BTreeSet<_> = manifest.folders.iter().map(PathBuf::as_path).collect();
    if purge {
        // It exists already if an earlier installation was removed without its configuration.
        folders.extend(manifest.configs.iter().filter_map(|config| config.parent()));
    }
    // Contents come before their folder.
    let folders = folders.into_iter().rev().filter(|path| there(path) == There::Folder);
    steps.extend(folders.map(|path| Step::RemoveFolder(path.to_path_buf())));
    if system == System::Systemd {
        steps.push(run(&["systemctl", "daemon-reload"]));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(path: &str, config: bool) -> Product {
        Product { path: path.into(), mode: 0o644, content: b"x".to_vec(), config }
    }

    fn layout() -> Layout {
        Layout::new(Path::new("/usr/local"))
    }

    fn products() -> Vec<Product> {
        vec![product("/usr/local/bin/injector", false), product(CONFIG, true)]
    }

    /// A system with `/`, `/usr`, `/usr/local`, `/usr/local/bin`, `/etc`, and these files.
    fn there<'a>(files: &'a [(&'a str, There)]) -> impl Fn(&Path, Option<&Product>) -> There + 'a {
        move |path, _| {
            if ["/", "/usr", "/usr/local", "/usr/local/bin", "/etc"].iter().any(|it| Path::new(it) == path) {
                return There::Folder;
            }
            files.iter().find(|(file, _)| Path::new(file) == path).map_or(There::Nothing, |(_, what)| *what)
        }
    }

    fn lines(steps: &[Step]) -> Vec<String> {
        steps.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_first_install_writes_everything_and_starts_nothing() {
        let steps = install(&layout(), products(), &Manifest::default(), &there(&[]), System::Systemd, false);
        assert_eq!(
            lines(&steps),
            [
                "create   0755  /etc/injector/",
                "create   0755  /usr/local/share/",
                "create   0755  /usr/local/share/injector/",
                "write    0644  /usr/local/bin/injector",
                "write    0644  /etc/injector/injector.toml",
                "write    0644  /usr/local/share/injector/manifest",
                "run            systemd-sysusers /usr/local/lib/sysusers.d/injector.conf",
                "run            systemd-tmpfiles --create /usr/local/lib/tmpfiles.d/injector.conf  (may fail)",
                "run            systemctl daemon-reload",
            ]
        );
    }

    #[test]
    fn a_changed_configuration_is_kept() {
        for (found, kept) in [(There::Other, true), (There::Nothing, false)] {
            let files = [(CONFIG, found)];
            let steps =
                install(&layout(), products(), &Manifest::default(), &there(&files), System::Tree, false);
            assert_eq!(steps.contains(&Step::Keep(CONFIG.into())), kept, "{found:?}");
        }
    }

    #[test]
    fn the_manifest_lists_new_files_and_earlier_folders() {
        let before = Manifest { folders: vec!["/usr/local/bin".into()], ..Manifest::default() };
        let steps = install(&layout(), products(), &before, &there(&[]), System::Tree, false);
        let Some(Step::Write { product, .. }) = steps.last() else { panic!("{steps:?}") };
        let manifest = Manifest::parse(std::str::from_utf8(&product.content).unwrap()).unwrap();
        assert_eq!(manifest.configs, [Path::new(CONFIG)]);
        assert_eq!(
            manifest.files,
            ["/usr/local/bin/injector", "/usr/local/share/injector/manifest"].map(Path::new)
        );
        assert_eq!(
            manifest.folders,
            ["/etc/injector", "/usr/local/bin", "/usr/local/share", "/usr/local/share/injector"]
                .map(Path::new)
        );
    }

    #[test]
    fn files_that_only_an_earlier_release_had_are_removed() {
        let before = Manifest { files: vec!["/usr/local/share/old".into()], ..Manifest::default() };
        for (found, removed) in [(There::Other, true), (There::Nothing, false)] {
            let files = [("/usr/local/share/old", found)];
            let steps = install(&layout(), products(), &before, &there(&files), System::Tree, false);
            assert_eq!(
                steps.contains(&Step::RemoveFile("/usr/local/share/old".into())),
                removed,
                "{steps:?}"
            );
        }
    }

    #[test]
    fn commands_run_only_with_a_running_systemd() {
        let commands = |system, start| {
            let steps = install(&layout(), products(), &Manifest::default(), &there(&[]), system, start);
            steps.iter().filter(|step| matches!(step, Step::Run { .. })).count()
        };
        assert_eq!(commands(System::Tree, true), 0);
        assert_eq!(commands(System::Idle, true), 2);
        assert_eq!(commands(System::Systemd, true), 5);
    }

    #[test]
    fn uninstalling_leaves_the_configuration_unless_purged() {
        let manifest = Manifest {
            files: vec!["/usr/local/bin/injector".into(), "/gone".into()],
            configs: vec![CONFIG.into()],
            folders: vec!["/etc/injector".into(), "/etc/injector/deep".into()],
        };
        let files = [
            ("/usr/local/bin/injector", There::Other),
            (CONFIG, There::Other),
            ("/etc/injector", There::Folder),
            ("/etc/injector/deep", There::Folder),
        ];
        let look = there(&files);
        let look = |path: &Path| look(path, None);
        let steps = |purge| lines(&uninstall(&layout(), &manifest, &look, System::Tree, purge));
        assert_eq!(
            steps(false),
            [
                "keep           /etc/injector/injector.toml",
                "remove         /usr/local/bin/injector",
                "remove         /etc/injector/deep/  (if empty)",
                "remove         /etc/injector/  (if empty)",
            ]
        );
        assert_eq!(steps(true)[0], "remove         /etc/injector/injector.toml");
    }

    #[test]
    fn purging_removes_the_state_of_this_host() {
        let steps = |system, purge| {
            lines(&uninstall(&layout(), &Manifest::default(), &|_| There::Nothing, system, purge))
        };
        let removes =
            |system, purge| steps(system, purge).iter().any(|line| line.contains("rm -rf /var/lib/injector"));
        assert!(removes(System::Idle, true));
        assert!(!removes(System::Idle, false) && !removes(System::Tree, true));
    }

    #[test]
    fn inline_is_detached_before_the_program_is_removed() {
        let manifest = Manifest { files: vec!["/usr/local/bin/injector".into()], ..Manifest::default() };
        let files = [("/usr/local/bin/injector", There::Other), (CONFIG, There::Other)];
        let look = there(&files);
        let steps = lines(&uninstall(&layout(), &manifest, &|path| look(path, None), System::Systemd, false));
        let place = |part: &str| steps.iter().position(|line| line.contains(part)).unwrap();
        assert!(place("disable --now") < place("inline detach --config /etc/injector/injector.toml"));
        assert!(place("guard detach") < place("remove         /usr/local/bin/injector"));
        assert!(place("inline detach") < place("remove         /usr/local/bin/injector"));
    }
}
