//! `cargo xtask cluster`: a real Kubernetes on this machine, in network and mount namespaces, and
//! trials of the injector in it.
//!
//! Three nodes with kubelet, containerd and kube-proxy, the control plane, a router, and a client
//! behind it ([`plan`]). Everything comes from Debian's packages; Kubernetes is built from Debian's
//! source package, once, into the tool cache. MetalLB has no package: its part, the route to the
//! public address and the status of the Service, is played by the trials.

mod client;
mod config;
mod deploy;
mod image;
mod init;
mod machines;
mod mail;
mod network;
mod node;
mod pki;
mod plan;
mod state;
mod trials;
mod wait;

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{
    machines::{Clock, Cluster},
    plan::{Cni, Node, ProxyMode},
    state::{Settings, State},
};
use crate::{
    interruption::Signals,
    reported::AlreadyReported,
    setup::{self, Group, KUBERNETES},
};

#[derive(clap::Args)]
pub(crate) struct ClusterArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    settings: SettingsArgs,
    /// Run only the trials whose name contains this text (repeatable)
    #[arg(long, value_name = "FILTER")]
    trial: Vec<String>,
    /// List the trials
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    daemon: image::DaemonArgs,
}

#[derive(clap::Args, Clone, Copy)]
struct SettingsArgs {
    /// How kube-proxy translates
    #[arg(long, value_name = "MODE", default_value = "iptables")]
    proxy_mode: ProxyMode,
    /// How pods are connected to their node
    #[arg(long, value_name = "KIND", default_value = "bridge")]
    cni: Cni,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Start a cluster that keeps running, with the mail server and the injector's image
    Up {
        #[command(flatten)]
        settings: SettingsArgs,
        #[command(flatten)]
        daemon: image::DaemonArgs,
    },
    /// End the cluster, or what is left of one
    Down,
    /// Run kubectl
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a command in a node (control, edge1, edge2, worker), or in the network of `client` or
    /// `router`
    Shell {
        place: String,
        /// [default: bash]
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Build the injector's image again and import it at all nodes
    Image {
        #[command(flatten)]
        daemon: image::DaemonArgs,
    },
    /// The first process of a node
    #[command(hide = true)]
    Init(init::InitArgs),
}

pub(crate) fn run(args: &ClusterArgs) -> Result<()> {
    match &args.verb {
        Some(Verb::Init(args)) => init::run(args),
        Some(Verb::Down) => down(),
        Some(Verb::Up { settings, daemon }) => up(*settings, daemon),
        Some(Verb::Kubectl { arguments }) => hand_over(running()?.kubectl_command().args(arguments)),
        Some(Verb::Shell { place, command }) => shell(place, command),
        Some(Verb::Image { daemon }) => {
            let cluster = running()?;
            image::build_and_import(&cluster, daemon)
        }
        None if args.list => {
            trials::list();
            Ok(())
        }
        None => run_trials(args),
    }
}

/// Trials in a cluster of their own, or in the one that runs.
fn run_trials(args: &ClusterArgs) -> Result<()> {
    ensure_tools()?;
    let _lock = state::lock()?;
    let _signals = Signals::take();
    let begun = Instant::now();
    let (cluster, _end) = if State::existing(setup::cluster_tools()?).is_some() {
        println!("in the cluster that runs already; it stays, and so does the last injector");
        (running()?, None)
    } else {
        let daemon = image::daemon(&args.daemon)?;
        start(args.settings, &daemon).map(|(cluster, end)| (cluster, Some(end)))?
    };
    let passed = trials::run(&cluster, &args.trial)?;
    println!("{:6.1} s  all together", begun.elapsed().as_secs_f32());
    if passed { Ok(()) } else { Err(AlreadyReported.into()) }
}

fn up(settings: SettingsArgs, daemon: &image::DaemonArgs) -> Result<()> {
    ensure_tools()?;
    let _lock = state::lock()?;
    let _signals = Signals::take();
    ensure!(
        State::existing(setup::cluster_tools()?).is_none(),
        "a cluster runs already; `cargo xtask cluster down` ends it"
    );
    let daemon = image::daemon(daemon)?;
    let (_, end) = start(settings, &daemon)?;
    end.keep();
    println!(
        "\nthe cluster runs: `cargo xtask cluster kubectl get pods -A`, `cargo xtask cluster shell edge1`; \
         `cargo xtask cluster down` ends it"
    );
    Ok(())
}

/// A new cluster with mail server and image. Whatever fails, nothing of it stays.
fn start(settings: SettingsArgs, daemon: &std::path::Path) -> Result<(Cluster, End)> {
    if let Some(why) = proxy_mode_obstacle(settings.proxy_mode) {
        bail!("kube-proxy cannot use {} here: {why}", settings.proxy_mode.name());
    }
    // What an earlier run left, if it was killed.
    machines::end()?;
    let end = End { armed: true };
    let settings = Settings { proxy_mode: settings.proxy_mode, cni: settings.cni };
    println!(
        "Kubernetes {KUBERNETES}, kube-proxy {}, pods by {}",
        settings.proxy_mode.name(),
        settings.cni.name()
    );
    let state = State::create(setup::cluster_tools()?, settings)?;
    let cluster = Cluster::start(state, setup::kubernetes_tools()?)?;
    let mut clock = Clock::start();
    image::import(&cluster, daemon)?;
    clock.lap("the injector's image");
    mail::start(&cluster)?;
    clock.lap("the mail server is ready");
    Ok((cluster, end))
}

fn down() -> Result<()> {
    let _lock = state::lock()?;
    // Ended half-way, it would leave the rest.
    let _signals = Signals::take();
    machines::end()
}

/// Ends the cluster on drop.
struct End {
    armed: bool,
}

impl End {
    fn keep(mut self) {
        self.armed = false;
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let mut clock = Clock::start();
        match machines::end() {
            Ok(()) => clock.lap("the cluster ended, and nothing is left"),
            Err(error) => eprintln!("error: {error:#}"),
        }
    }
}

fn ensure_tools() -> Result<()> {
    if let Some(why) = node::obstacle() {
        bail!("no cluster can run here: {why}");
    }
    setup::ensure(&[Group::Bpf, Group::Image, Group::Kubernetes, Group::Cluster])
}

/// Why kube-proxy would silently use another mode (it falls back to iptables).
fn proxy_mode_obstacle(mode: ProxyMode) -> Option<&'static str> {
    let kernel_has_ipvs = || {
        let modprobe = Command::new("modprobe").arg("ip_vs").stderr(Stdio::null()).status();
        modprobe.is_ok_and(|status| status.success()) || std::path::Path::new("/proc/net/ip_vs").exists()
    };
    (mode == ProxyMode::Ipvs && !kernel_has_ipvs()).then_some("the kernel has no IPVS")
}

fn running() -> Result<Cluster> {
    let state = State::existing(setup::cluster_tools()?);
    let state = state.context("no cluster runs; `cargo xtask cluster up` starts one")?;
    Cluster::attach(state, setup::kubernetes_tools()?)
}

fn shell(place: &str, command: &[String]) -> Result<()> {
    let cluster = running()?;
    let words: Vec<&str> =
        if command.is_empty() { vec!["bash"] } else { command.iter().map(String::as_str).collect() };
    let (program, arguments) = words.split_first().context("no command")?;
    let mut command = match (Node::named(place), place) {
        (Some(node), _) => cluster.machine(node).command(program),
        (None, "client") => network::command(&plan::client_netns(), program),
        (None, "router") => network::command(&plan::router_netns(), program),
        (None, _) => bail!("no place {place}: control, edge1, edge2, worker, client or router"),
    };
    hand_over(command.args(arguments))
}

/// Runs a command with this terminal; its failure is its own.
fn hand_over(command: &mut Command) -> Result<()> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(AlreadyReported.into()) }
}
