//! The image as an OCI layout: Debian's files in one layer, the daemon in the next.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    command::{below, quietly},
    rootfs::USER,
    source_time::Time,
};
use crate::cargo;

/// The image's name in its layout.
pub(crate) const TAG: &str = "latest";

/// The configuration's path in the image.
pub(super) const CONFIG: &str = "/etc/injector/injector.toml";

/// Creates the layout, in place of an older one.
///
/// # Errors
/// When umoci fails.
pub(super) fn build(out: &Path, base: &Path, binary: &Path, time: Time, scratch: &Path) -> Result<()> {
    if out.exists() {
        ensure!(out.join("oci-layout").is_file(), "{} exists and is not an OCI image", out.display());
        fs::remove_dir_all(out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    if let Some(parent) = out.parent() {
        fs::create_dir_all(parent)?;
    }
    let umoci = Umoci { image: format!("{}:{TAG}", out.display()), created: time.rfc3339()? };
    quietly(Command::new("umoci").args(["init", "--layout"]).arg(out))?;
    umoci.run(&["new"], &[])?;
    let bundle = scratch.join("made");
    umoci.run(&["unpack"], &[&bundle])?;
    let root = bundle.join("rootfs");
    quietly(Command::new("cp").args(["-a", "--"]).arg(base.join(".")).arg(&root))?;
    date(&root, time)?;
    umoci.repack(&bundle, "Debian: the C library")?;
    daemon(&root, binary)?;
    date(&root, time)?;
    umoci.repack(&bundle, "the injector")?;
    umoci.configure()?;
    quietly(Command::new("umoci").args(["gc", "--layout"]).arg(out))
}

struct Umoci {
    image: String,
    created: String,
}

impl Umoci {
    fn run(&self, words: &[&str], paths: &[&Path]) -> Result<()> {
        let mut command = Command::new("umoci");
        command.args(words).args(["--image", &self.image]).args(paths);
        quietly(&mut command)
    }

    /// Makes a layer from the changes in the bundle.
    fn repack(&self, bundle: &Path, what: &str) -> Result<()> {
        let history = ["--history.author", AUTHOR, "--history.created_by", what];
        let created = ["--history.created", self.created.as_str()];
        self.run(&[&["repack", "--refresh-bundle"], &history[..], &created[..]].concat(), &[bundle])
    }

    fn configure(&self) -> Result<()> {
        let version = format!("org.opencontainers.image.version={}", env!("CARGO_PKG_VERSION"));
        let labels = [
            "org.opencontainers.image.title=injector",
            "org.opencontainers.image.description=PROXY protocol injector for mail",
            "org.opencontainers.image.licenses=MIT OR Apache-2.0",
            version.as_str(),
        ];
        let mut words =
            vec!["config", "--no-history", "--created", self.created.as_str(), "--author", AUTHOR];
        words.extend(["--config.user", USER, "--config.workingdir", "/"]);
        words.extend(["--config.entrypoint", "/usr/bin/injector", "--config.cmd", "run"]);
        let config = format!("INJECTOR_CONFIG={CONFIG}");
        words.extend(["--config.env", config.as_str(), "--config.env", "INJECTOR_LOG_FORMAT=json"]);
        words.extend([
            "--config.env",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "--config.stopsignal",
            "SIGTERM",
        ]);
        words.extend(labels.iter().flat_map(|label| ["--config.label", label]));
        self.run(&words, &[])
    }
}

const AUTHOR: &str = "cargo xtask image";

/// The program without debug information, and an example configuration.
fn daemon(root: &Path, binary: &Path) -> Result<()> {
    let program = root.join("usr/bin/injector");
    fs::create_dir_all(root.join("usr/bin"))?;
    quietly(Command::new("strip").args(["--strip-debug", "-o"]).arg(&program).arg(binary))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let doc = root.join("usr/share/doc/injector");
    fs::create_dir_all(&doc)?;
    fs::copy(cargo::workspace().join("deploy/injector.toml"), doc.join("injector.toml"))?;
    Ok(())
}

/// Sets all times, because a layer contains the times of its files.
fn date(root: &Path, time: Time) -> Result<()> {
    let stamp = format!("@{}", time.system().duration_since(std::time::UNIX_EPOCH)?.as_secs());
    let mut paths = below(root)?;
    paths.push(root.to_path_buf());
    for some in paths.chunks(500) {
        quietly(Command::new("touch").args(["--no-dereference", "--date", &stamp, "--"]).args(some))?;
    }
    Ok(())
}

/// Size, layers and configuration, as text.
///
/// # Errors
/// When it is not an OCI layout.
pub(super) fn describe(out: &Path) -> Result<String> {
    let index = json(&out.join("index.json"))?;
    let digest = index["manifests"][0]["digest"].as_str().context("no manifest in index.json")?;
    let manifest = json(&blob(out, digest)?)?;
    let config = json(&blob(out, manifest["config"]["digest"].as_str().unwrap_or_default())?)?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    let size = |layer: &Value| layer["size"].as_u64().unwrap_or_default();
    let total: u64 = layers.iter().map(size).sum();
    let mut text = format!(
        "image    {}:{TAG}\ndigest   {digest}\nsize     {} KiB packed\n",
        out.display(),
        total / 1024
    );
    let history = config["history"].as_array().map(Vec::as_slice).unwrap_or_default();
    for (layer, step) in layers.iter().zip(history) {
        let what = step["created_by"].as_str().unwrap_or_default();
        text.push_str(&format!("layer    {:>6} KiB  {what}\n", size(layer) / 1024));
    }
    text.push_str(&format!(
        "created  {}\nconfig   {:#}",
        config["created"].as_str().unwrap_or_default(),
        config["config"]
    ));
    Ok(text)
}

fn blob(out: &Path, digest: &str) -> Result<PathBuf> {
    let (kind, sum) = digest.split_once(':').with_context(|| format!("not a digest: {digest:?}"))?;
    Ok(out.join("blobs").join(kind).join(sum))
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}
