//! The running cluster: starting and ending it, and asking its API.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use injector_testbed::netns::NetnsHandle;
use serde_json::Value;

use super::{
    config, network,
    node::{self, Machine, output},
    pki,
    plan::{Node, ProxyMode, SERVICES},
    state::{self, State},
    wait::wait,
};
use crate::{
    cargo,
    setup::{KubernetesTools, MAIL_IMAGE, PAUSE_IMAGE},
};

/// How long the API server, or a node, may take to be ready.
const LIMIT: Duration = Duration::from_secs(120);

/// A running cluster.
#[derive(Debug, Clone)]
pub(super) struct Cluster {
    pub(super) state: State,
    tools: KubernetesTools,
    machines: Vec<Machine>,
}

impl Cluster {
    /// Starts everything; what was started stays when it fails, for [`end`].
    ///
    /// # Errors
    /// When a part does not start, with its log; or after an interruption.
    pub(super) fn start(state: State, tools: KubernetesTools) -> Result<Self> {
        let mut clock = Clock::start();
        pki::create(&state.pki())?;
        network::create()?;
        let machines = Node::ALL.map(|node| Machine::start(node, &state));
        let machines = machines.into_iter().collect::<Result<Vec<_>>>()?;
        clock.lap("networks and file systems");
        let cluster = Self { state, tools, machines };
        // containerd and its images need no API server.
        thread::scope(|scope| -> Result<()> {
            let prepared = Node::KUBELETS.map(|node| {
                let machine = cluster.machine(node);
                let state = &cluster.state;
                scope.spawn(move || start_containerd(machine, state))
            });
            cluster.start_control()?;
            clock.lap("API server");
            join_all(prepared)
        })?;
        clock.lap("images");
        for node in Node::KUBELETS {
            cluster.start_agents(node)?;
        }
        for node in Node::KUBELETS {
            wait(&format!("node {node}"), LIMIT, || Ok(cluster.is_ready(node).then_some(())))?;
        }
        for node in Node::EDGES {
            cluster.kubectl(&["label", "node", node.name(), "node-role.kubernetes.io/edge="])?;
        }
        clock.lap("nodes are ready");
        Ok(cluster)
    }

    /// The cluster that runs already; `None` if there is none.
    ///
    /// # Errors
    /// When a part of it is missing.
    pub(super) fn attach(state: State, tools: KubernetesTools) -> Result<Self> {
        let machines: Option<Vec<_>> =
            Node::ALL.into_iter().map(|node| Machine::find(node, &state)).collect();
        let machines = machines.context(
            "the running cluster lacks a node: run `cargo xtask cluster down`, and start another one",
        )?;
        Ok(Self { state, tools, machines })
    }

    pub(super) fn machine(&self, node: Node) -> &Machine {
        let found = self.machines.iter().find(|machine| machine.node == node);
        found.unwrap_or_else(|| unreachable!("a cluster has all nodes"))
    }

    fn start_control(&self) -> Result<()> {
        let control = self.machine(Node::Control);
        let url = "http://127.0.0.1:2379";
        control.start_program(
            "etcd",
            &[
                "/usr/bin/etcd",
                "--data-dir=/var/lib/etcd",
                "--listen-client-urls",
                url,
                "--advertise-client-urls",
                url,
                "--listen-peer-urls=http://127.0.0.1:2380",
                // Nothing of a cluster outlives its processes.
                "--unsafe-no-fsync",
            ],
        )?;
        self.start_api_server()?;
        let pki = config::PKI;
        control.start_program(
            "kube-controller-manager",
            &[
                &Machine::program("kube-controller-manager"),
                &format!("--kubeconfig={pki}/controller-manager.conf"),
                &format!("--root-ca-file={pki}/ca.crt"),
                &format!("--service-account-private-key-file={pki}/sa.key"),
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                "--allocate-node-cidrs=false",
                "--controllers=*",
                "--v=1",
            ],
        )?;
        control.start_program(
            "kube-scheduler",
            &[
                &Machine::program("kube-scheduler"),
                &format!("--kubeconfig={pki}/scheduler.conf"),
                "--leader-elect=false",
                "--v=1",
            ],
        )
    }

    /// Starts the API server, and waits until it is ready.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub(super) fn start_api_server(&self) -> Result<()> {
        let pki = config::PKI;
        let control = self.machine(Node::Control);
        let address = Node::Control.address();
        control.start_program(
            "kube-apiserver",
            &[
                &Machine::program("kube-apiserver"),
                "--etcd-servers=http://127.0.0.1:2379",
                &format!("--advertise-address={address}"),
                "--bind-address=0.0.0.0",
                "--secure-port=6443",
                &format!("--service-cluster-ip-range={SERVICES}"),
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                &format!("--client-ca-file={pki}/ca.crt"),
                &format!("--tls-cert-file={pki}/apiserver.crt"),
                &format!("--tls-private-key-file={pki}/apiserver.key"),
                &format!("--kubelet-client-certificate={pki}/apiserver-kubelet.crt"),
                &format!("--kubelet-client-key={pki}/apiserver-kubelet.key"),
                "--kubelet-preferred-address-types=InternalIP",
                &format!("--service-account-issuer=https://kubernetes.default.svc.{}", config::DOMAIN),
                &format!("--service-account-key-file={pki}/sa.pub"),
                &format!("--service-account-signing-key-file={pki}/sa.key"),
                // A LoadBalancer without node ports; alpha in this version.
                "--feature-gates=ServiceLBNodePortControl=true",
                "--v=1",
            ],
        )?;
        let log = control.log("kube-apiserver");
        let ready = wait("the API server", LIMIT, || Ok(self.kubectl(&["get", "--raw=/readyz"]).ok()));
        ready.map(drop).with_context(|| format!("its log is {}", log.display()))
    }

    /// Ends the API server at once.
    ///
    /// # Errors
    /// When it does not end.
    pub(super) fn stop_api_server(&self) -> Result<()> {
        self.machine(Node::Control).stop_program("kube-apiserver", "-KILL")
    }

    fn start_agents(&self, node: Node) -> Result<()> {
        let machine = self.machine(node);
        machine.write("/var/lib/kubelet/config.yaml", &config::kubelet(node))?;
        machine.start_program(
            "kubelet",
            &[
                &Machine::program("kubelet"),
                "--config=/var/lib/kubelet/config.yaml",
                &format!("--kubeconfig={}/{node}.conf", config::PKI),
                &format!("--hostname-override={node}"),
                &format!("--node-ip={}", node.address()),
                "--container-runtime=remote",
                "--container-runtime-endpoint=unix:///run/containerd/containerd.sock",
                "--v=2",
            ],
        )?;
        self.start_proxy(node, self.state.settings.proxy_mode)
    }

    fn start_proxy(&self, node: Node, mode: ProxyMode) -> Result<()> {
        let machine = self.machine(node);
        machine.write("/var/lib/kube-proxy.yaml", &config::kube_proxy(node, mode))?;
        let program = Machine::program("kube-proxy");
        machine.start_program("kube-proxy", &[&program, "--config=/var/lib/kube-proxy.yaml", "--v=2"])
    }

    fn is_ready(&self, node: Node) -> bool {
        let path = r#"-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        self.kubectl(&["get", "node", node.name(), path]).is_ok_and(|status| status == "True")
    }

    /// The operator's kubectl, beside the API server.
    pub(super) fn kubectl_command(&self) -> Command {
        let mut command = network::command(&Node::Control.netns(), &self.tools.kubectl);
        command.arg("--kubeconfig").arg(self.state.kubeconfig());
        command
    }

    /// Runs kubectl, and returns what it printed.
    ///
    /// # Errors
    /// When it fails; with its output.
    pub(super) fn kubectl(&self, words: &[&str]) -> Result<String> {
        output(self.kubectl_command().args(words).stdin(Stdio::null()))
    }

    /// An object, or a list of them.
    ///
    /// # Errors
    /// When there is no such object.
    pub(super) fn get(&self, words: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o=json"], words].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {}", words.join(" ")))
    }

    /// Creates or changes objects. kubectl does not compare them with the schema: this version of
    /// Kubernetes lacks fields that newer ones have, and ignores them.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub(super) fn apply(&self, text: &str) -> Result<()> {
        self.feed(&["apply", "--validate=false", "-f", "-"], text)
    }

    fn feed(&self, words: &[&str], text: &str) -> Result<()> {
        let mut command = self.kubectl_command();
        let mut child = command
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start kubectl")?;
        let mut input = child.stdin.take().context("kubectl has no input")?;
        input.write_all(text.as_bytes())?;
        drop(input);
        let done = child.wait_with_output()?;
        let printed = [done.stdout, done.stderr].concat();
        let printed = String::from_utf8_lossy(&printed);
        ensure!(done.status.success(), "`{}` failed:\n{}", cargo::line(&command), printed.trim());
        Ok(())
    }

    /// Renders a folder with a `kustomization.yaml`.
    ///
    /// # Errors
    /// When kustomize fails.
    pub(super) fn kustomize(&self, folder: &Path) -> Result<String> {
        output(Command::new(&self.tools.kubectl).arg("kustomize").arg(folder))
    }

    /// Lets `f` use the API without kubectl's start each time, from beside the API server and as the
    /// operator; it gets the address.
    ///
    /// # Errors
    /// When kubectl's proxy does not start, or `f` fails.
    pub(super) fn with_api<T: Send>(&self, f: impl FnOnce(&str) -> Result<T> + Send) -> Result<T> {
        let mut proxy = self.kubectl_command();
        let mut proxy = proxy.args(["proxy", "--port=8001"]).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let printed = proxy.stdout.take().map(|stdout| BufReader::new(stdout).read_line(&mut line));
        let outcome = match printed {
            Some(Ok(length)) if length > 0 => NetnsHandle::named(&Node::Control.netns())
                .run(|| f("http://127.0.0.1:8001"))
                .and_then(|it| it),
            _ => Err(anyhow!("kubectl's proxy printed nothing")),
        };
        // It may have ended by itself.
        let _ = proxy.kill();
        let _ = proxy.wait();
        outcome
    }

    /// Imports an image at every node.
    ///
    /// # Errors
    /// When a node's containerd refuses it.
    pub(super) fn import(&self, archive: &Path, name: &str) -> Result<()> {
        thread::scope(|scope| {
            join_all(Node::KUBELETS.map(|node| {
                let machine = self.machine(node);
                scope.spawn(move || machine.import_from(archive, name))
            }))
        })
    }
}

type Joined<'scope> = thread::ScopedJoinHandle<'scope, Result<()>>;

fn join_all<const N: usize>(threads: [Joined<'_>; N]) -> Result<()> {
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    Ok(())
}

fn start_containerd(machine: &Machine, state: &State) -> Result<()> {
    machine.write("/etc/containerd/config.toml", &config::containerd())?;
    machine.write("/etc/cni/net.d/10-pods.conflist", &config::cni(machine.node, state.settings.cni))?;
    machine.start_program("containerd", &["/usr/bin/containerd"])?;
    let node = machine.node;
    let log = machine.log("containerd");
    wait(&format!("containerd at {node}"), LIMIT, || {
        Ok(machine.run(&["ctr", "-n", "k8s.io", "version"]).ok())
    })
    .with_context(|| fs::read_to_string(log).unwrap_or_default())?;
    machine.import("pause.tar", PAUSE_IMAGE)?;
    machine.import("mail.tar", MAIL_IMAGE)
}

/// Ends whatever there is of a cluster, also one that is incomplete or whose files are gone.
///
/// # Errors
/// When something could not be removed; it is named.
pub(super) fn end() -> Result<()> {
    let left = node::end_all();
    state::remove()?;
    if left.is_empty() {
        return Ok(());
    }
    bail!("left behind: {}", left.join(", "))
}

/// Prints how long each step took.
#[derive(Debug)]
pub(super) struct Clock {
    last: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { last: Instant::now() }
    }

    pub(super) fn lap(&mut self, what: &str) {
        println!("{:6.1} s  {what}", self.last.elapsed().as_secs_f32());
        self.last = Instant::now();
    }
}
