//! `cargo xtask kubernetes`: validates `deploy/kubernetes` and `deploy/helm` with the real tools,
//! but without a cluster.

mod chart_parity;
mod chart_schema;
mod chart_values;
mod consistency;
pub(crate) mod object;
mod scan;
mod schema;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use self::{
    object::{Object, text},
    scan::{Accepted, Finding},
    schema::Count,
};
use crate::{
    cargo,
    reported::AlreadyReported,
    setup::{self, KubernetesTools},
};

/// Below `deploy/kubernetes/overlays`; for each the chart has `ci/NAME-values.yaml`.
const OVERLAYS: [&str; 5] =
    ["least-privilege", "privileged", "inline", "edge-metallb", "edge-metallb-cluster"];

/// The mail server's side of the example.
const MAIL: &str = "mail";

/// The overlay whose values render the mail server's side too.
const CHART_WITH_MAIL: &str = "edge-metallb";

/// The Job that cleans up a node, which has no chart.
const DETACH: &str = "detach";

/// The release name of the chart, which is also the name of the objects in kustomize.
const RELEASE: &str = "injector";

/// The variable that may name a daemon, instead of a new build.
const BINARY_VARIABLE: &str = "INJECTOR_BIN";

#[derive(clap::Args)]
pub(crate) struct KubernetesArgs {
    /// Keep the output of kustomize and helm in this folder
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
}

/// The objects that one overlay renders to.
struct Rendering {
    name: &'static str,
    file: PathBuf,
    objects: Vec<Object>,
}

/// The results of one overlay, as texts for the table.
#[derive(Default)]
struct Verdicts {
    schema: Vec<Count>,
    chart: String,
    config: String,
    scan: String,
}

pub(crate) fn run(args: &KubernetesArgs) -> Result<()> {
    setup::ensure(&[setup::Group::Kubernetes])?;
    let validator = Validator::new(setup::kubernetes_tools()?, args.keep.as_deref())?;
    let daemon = daemon()?;
    eprintln!("{}\n", validator.versions()?);
    let renderings = validator.kustomize()?;
    let (overlays, others) = renderings.split_at(OVERLAYS.len());
    let [mail, _] = others else { bail!("no mail server") };
    validator.check_validators(&renderings)?;
    let mut faults = Vec::new();
    let mut verdicts: Vec<Verdicts> = renderings.iter().map(|_| Verdicts::default()).collect();
    validator.schemas(&renderings, &mut verdicts, &mut faults)?;
    validator.scans(&renderings, &mut verdicts, &mut faults)?;
    for (rendering, verdicts) in overlays.iter().zip(&mut verdicts) {
        let mut found = validator.chart(rendering, &mail.objects)?;
        verdicts.chart = if found.is_empty() { "same".into() } else { format!("{} DIFFER", found.len()) };
        found.extend(consistency::faults(&rendering.objects, &mail.objects)?);
        match validator.check(&daemon, rendering)? {
            Ok(listeners) => verdicts.config = format!("{listeners} listeners"),
            Err(why) => {
                verdicts.config = "REFUSED".into();
                found.push(format!("injector check: {why}"));
            }
        }
        faults.extend(found.into_iter().map(|fault| format!("{}: {fault}", rendering.name)));
    }
    faults.extend(chart_values::faults(&validator, &daemon)?);
    print!("{}", table(&renderings, &verdicts));
    if faults.is_empty() {
        println!("{}", chart_values::summary());
        println!("\nno faults; nothing ran on a cluster");
        return Ok(());
    }
    println!("\n{} faults", faults.len());
    faults.iter().for_each(|fault| println!("  {fault}"));
    Err(AlreadyReported.into())
}

/// The daemon that checks the configurations; it needs no BPF.
fn daemon() -> Result<PathBuf> {
    if let Some(given) = env::var_os(BINARY_VARIABLE) {
        return Ok(given.into());
    }
    let mut command = cargo::cargo();
    command.args([
        "build",
        "--package",
        "injector-user",
        "--no-default-features",
        "--features",
        "kubernetes",
    ]);
    command.args(["--bin", "injector"]);
    let made = cargo::executables(&mut command)?.into_iter().find(|made| made.target == "injector");
    Ok(made.context("cargo built no program `injector`")?.path)
}

/// The tools, the sources, and a folder to work in.
struct Validator {
    tools: KubernetesTools,
    kubernetes: PathBuf,
    chart: PathBuf,
    folder: PathBuf,
    /// Removes the folder on drop, unless the operator named it.
    _temporary: Option<tempfile::TempDir>,
}

impl Validator {
    fn new(tools: KubernetesTools, keep: Option<&Path>) -> Result<Self> {
        let temporary = if keep.is_none() { Some(tempfile::tempdir()?) } else { None };
        let folder = match (&temporary, keep) {
            (Some(temporary), _) => temporary.path().to_path_buf(),
            (None, Some(keep)) => keep.to_path_buf(),
            (None, None) => bail!("no folder to work in"),
        };
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let deploy = cargo::workspace().join("deploy");
        let (kubernetes, chart) = (deploy.join("kubernetes"), deploy.join("helm/injector"));
        Ok(Self { tools, kubernetes, chart, folder, _temporary: temporary })
    }

    /// The versions of the validators.
    fn versions(&self) -> Result<String> {
        let kubectl = output(Command::new(&self.tools.kubectl).args(["version", "--client"]))?;
        let helm = output(self.helm().args(["version", "--short"]))?;
        let python = "import importlib.metadata as m\n\
            print(*(f'{name} {m.version(name)}' for name in ('kubernetes-validate', 'checkov')), sep=', ')";
        let validators = output(Command::new(&self.tools.python).args(["-c", python]))?;
        let kubectl = kubectl.lines().map(str::trim).collect::<Vec<_>>().join(", ");
        Ok(format!("kubectl: {kubectl}\nhelm: {}\n{}", helm.trim(), validators.trim()))
    }

    /// Helm without the operator's own plugins and cache.
    fn helm(&self) -> Command {
        let mut command = Command::new(&self.tools.helm);
        for (variable, folder) in [("CACHE", "cache"), ("CONFIG", "config"), ("DATA", "data")] {
            command.env(format!("HELM_{variable}_HOME"), self.folder.join("helm").join(folder));
        }
        command
    }

    fn kustomize(&self) -> Result<Vec<Rendering>> {
        let overlays = OVERLAYS.map(|name| (name, self.kubernetes.join("overlays").join(name)));
        let others = [MAIL, DETACH].map(|name| (name, self.kubernetes.join(name)));
        overlays.into_iter().chain(others).map(|(name, source)| self.kustomize_one(name, &source)).collect()
    }

    fn kustomize_one(&self, name: &'static str, source: &Path) -> Result<Rendering> {
        let text = output(Command::new(&self.tools.kubectl).arg("kustomize").arg(source))?;
        let file = self.folder.join(format!("{name}.yaml"));
        fs::write(&file, &text)?;
        let objects = Object::parse(&text).with_context(|| format!("overlay {name}"))?;
        ensure!(!objects.is_empty(), "overlay {name} renders to nothing");
        Ok(Rendering { name, file, objects })
    }

    /// Checks that the validators reject a deliberate mistake: one that accepts everything would
    /// look like one that found no fault.
    fn check_validators(&self, renderings: &[Rendering]) -> Result<()> {
        let mut wrong = Vec::new();
        let all = renderings.iter().flat_map(|rendering| &rendering.objects);
        let validated =
            ["DaemonSet", "Service", "PodMonitor", "CronJob", "NetworkPolicy", "PodDisruptionBudget", "Job"];
        for kind in validated {
            let object = all.clone().find(|object| object.kind() == kind);
            let mut object = object.with_context(|| format!("no overlay has a {kind}"))?.0.clone();
            object["spec"]["noSuchField"] = Value::Bool(true);
            wrong.push(object.to_string());
        }
        let file = self.folder.join("wrong.yaml");
        fs::write(&file, wrong.join("\n---\n"))?;
        let answers = schema::ask(&self.tools.python, &[file])?;
        for answer in &answers {
            ensure!(answer.fault().is_some(), "the schemas accepted a field that does not exist: {answer:?}");
        }
        ensure!(answers.len() == validated.len() * schema::VERSIONS.len(), "the schemas skipped objects");
        let lint = self.helm().args(["lint", "--set", "noSuchValue=1"]).arg(&self.chart).output()?;
        ensure!(!lint.status.success(), "helm lint accepted a value that does not exist");
        Ok(())
    }

    fn schemas(
        &self,
        renderings: &[Rendering],
        verdicts: &mut [Verdicts],
        faults: &mut Vec<String>,
    ) -> Result<()> {
        let files: Vec<_> = renderings.iter().map(|rendering| rendering.file.clone()).collect();
        let answers = schema::ask(&self.tools.python, &files)?;
        for (rendering, verdicts) in renderings.iter().zip(verdicts) {
            let of_file = || answers.iter().filter(|answer| answer.file == rendering.file);
            let of_version = |version: &str| Count::of(of_file().filter(|answer| answer.version == version));
            verdicts.schema = schema::VERSIONS.map(of_version).to_vec();
            for Count { valid, without, invalid } in &verdicts.schema {
                let expected = rendering.objects.len();
                ensure!(
                    valid + without + invalid == expected,
                    "{}: some objects were not validated",
                    rendering.name
                );
            }
            faults.extend(
                of_file().filter_map(|answer| Some(format!("{}: {}", rendering.name, answer.fault()?))),
            );
        }
        Ok(())
    }

    fn scans(
        &self,
        renderings: &[Rendering],
        verdicts: &mut [Verdicts],
        faults: &mut Vec<String>,
    ) -> Result<()> {
        let list = self.kubernetes.join("accepted-findings.toml");
        let accepted =
            Accepted::parse(&fs::read_to_string(&list)?).with_context(|| list.display().to_string())?;
        let mut found: Vec<(String, Finding)> = Vec::new();
        for (rendering, verdicts) in renderings.iter().zip(verdicts) {
            let scan = scan::scan(&self.tools.python, &rendering.file)?;
            let refused: Vec<_> =
                scan.findings.iter().filter(|finding| !accepted.covers(rendering.name, finding)).collect();
            verdicts.scan =
                format!("{} passed, {} accepted", scan.passed, scan.findings.len() - refused.len());
            if !refused.is_empty() {
                verdicts.scan += &format!(", {} REFUSED", refused.len());
            }
            faults.extend(refused.into_iter().map(|finding| format!("{}: {finding}", rendering.name)));
            found.extend(scan.findings.into_iter().map(|finding| (rendering.name.to_owned(), finding)));
        }
        faults.extend(accepted.idle(&found));
        Ok(())
    }

    /// Lints and renders the chart with this overlay's values, for each version, and compares the
    /// objects.
    fn chart(&self, rendering: &Rendering, mail: &[Object]) -> Result<Vec<String>> {
        let mut expected = rendering.objects.clone();
        if rendering.name == CHART_WITH_MAIL {
            expected.extend_from_slice(mail);
        }
        let mut found = Vec::new();
        for version in schema::VERSIONS {
            let mut lint = self.helm();
            lint.args(["lint", "--strict", "--quiet", "--kube-version", version]).arg(&self.chart);
            output(self.with_values(&mut lint, rendering.name))?;
            let mut template = self.helm();
            template.args(["template", RELEASE]).arg(&self.chart).args(["--namespace", RELEASE]);
            template.args(["--kube-version", version]);
            let text = output(self.with_values(&mut template, rendering.name))?;
            fs::write(self.folder.join(format!("{}.chart.yaml", rendering.name)), &text)?;
            let (tests, objects) =
                Object::parse(&text)?.into_iter().partition::<Vec<_>, _>(Object::is_helm_test);
            let differences = chart_parity::between(&expected, &objects);
            for difference in differences.into_iter().chain(chart_parity::tests(&tests, &objects)) {
                if !found.contains(&difference) {
                    found.push(difference);
                }
            }
        }
        Ok(found)
    }

    /// Adds the values of an overlay: those of the chart's `ci`, and the overlay's own configuration.
    fn with_values<'a>(&self, helm: &'a mut Command, overlay: &str) -> &'a mut Command {
        helm.arg("--values").arg(self.chart.join(format!("ci/{overlay}-values.yaml")));
        let config = self.kubernetes.join("overlays").join(overlay).join(consistency::CONFIG);
        if config.is_file() {
            helm.arg("--set-file").arg(format!("config={}", config.display()));
        }
        helm
    }

    /// Has the daemon check every configuration in an overlay. Returns the number of listeners, or
    /// the daemon's error.
    fn check(&self, daemon: &Path, rendering: &Rendering) -> Result<Result<usize, String>> {
        let mut listeners = 0;
        for (name, config) in configurations(&rendering.objects) {
            let file = self.folder.join(format!("{}.{name}.toml", rendering.name));
            fs::write(&file, &config)?;
            let output = Command::new(daemon).args(["check", "--config"]).arg(&file).output();
            let output = output.with_context(|| format!("cannot start {}", daemon.display()))?;
            if !output.status.success() {
                let printed =
                    String::from_utf8_lossy(&output.stderr).replace(&self.folder.display().to_string(), "");
                return Ok(Err(printed.trim().to_owned()));
            }
            listeners += config.matches("\n[[listener]]\n").count();
        }
        ensure!(listeners > 0, "overlay {} has no listener", rendering.name);
        Ok(Ok(listeners))
    }
}

/// The configurations in ConfigMaps, by name of the map.
fn configurations(objects: &[Object]) -> BTreeMap<String, String> {
    let maps = objects.iter().filter(|object| object.kind() == "ConfigMap");
    maps.filter_map(|map| Some((map.name().to_owned(), map.0["data"].get(consistency::CONFIG)?)))
        .map(|(name, config)| (name, text(config).to_owned()))
        .collect()
}

fn table(renderings: &[Rendering], verdicts: &[Verdicts]) -> String {
    const FIRST: usize = 20;
    let mut text = format!("{:FIRST$}  objects valid, by version of Kubernetes\n{:FIRST$}", "", "");
    for version in schema::VERSIONS {
        text += &format!("  {version:6}");
    }
    text += "  chart     injector check  scanner\n";
    for (rendering, verdicts) in renderings.iter().zip(verdicts) {
        text += &format!("{:FIRST$}", rendering.name);
        for count in &verdicts.schema {
            text += &format!("  {count:6}");
        }
        text += &format!("  {:8}  {:14}  {}\n", verdicts.chart, verdicts.config, verdicts.scan);
    }
    if verdicts.iter().flat_map(|verdicts| &verdicts.schema).any(|count| count.without > 0) {
        text += &format!("* no schema available for the others: {}\n", schema::WITHOUT_SCHEMA.join(", "));
    }
    text
}

/// The output of a command.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start `{}`", cargo::line(command)))?;
    if !output.status.success() {
        let printed =
            [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat();
        let name = command.get_program();
        let name = Path::new(name).file_name().unwrap_or(OsStr::new("a tool")).to_string_lossy();
        bail!("`{}` failed ({}); {name} printed:\n{}", cargo::line(command), output.status, printed.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn every_overlay_and_every_values_file_is_checked() {
        let deploy = cargo::workspace().join("deploy");
        let mut overlays = OVERLAYS.map(str::to_owned);
        overlays.sort();
        assert_eq!(files(&deploy.join("kubernetes/overlays")), overlays);
        let mut values = overlays.map(|name| format!("{name}-values.yaml"));
        values.sort();
        assert_eq!(files(&deploy.join("helm/injector/ci")), values);
    }

    #[test]
    fn every_supported_version_is_validated() {
        let chart = fs::read_to_string(cargo::workspace().join("deploy/helm/injector/Chart.yaml")).unwrap();
        assert!(chart.contains(&format!("kubeVersion: \">={}.0-0\"", schema::VERSIONS[0])), "{chart}");
    }

    /// Otherwise a misspelt value would be accepted, and have no effect.
    #[test]
    fn the_schema_describes_every_value_and_no_other() {
        let chart = cargo::workspace().join("deploy/helm/injector");
        let read = |file| fs::read_to_string(chart.join(file)).unwrap();
        let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
        let values: Value = serde_saphyr::from_str(&read("values.yaml")).unwrap();
        let mut differences = Vec::new();
        compare("values", &values, &schema, &mut differences);
        // Helm passes it to every chart.
        assert_eq!(differences, ["values.global: no default"]);
    }

    fn compare(path: &str, value: &Value, schema: &Value, differences: &mut Vec<String>) {
        let (Some(values), Some(properties)) = (value.as_object(), schema["properties"].as_object()) else {
            return;
        };
        if schema["additionalProperties"] != false {
            differences.push(format!("{path}: other values are accepted"));
        }
        for name in properties.keys().filter(|name| !values.contains_key(*name)) {
            differences.push(format!("{path}.{name}: no default"));
        }
        for (name, value) in values {
            match properties.get(name) {
                Some(schema) => compare(&format!("{path}.{name}"), value, schema, differences),
                None => differences.push(format!("{path}.{name}: not in the schema")),
            }
        }
    }

    /// The policy, the chart and Dovecot must trust the same addresses.
    #[test]
    fn the_edge_nodes_addresses_are_the_same_everywhere() {
        let workspace = cargo::workspace();
        let read = |file: &str| fs::read_to_string(workspace.join(file)).unwrap();
        let policy = Object::parse(&read("deploy/kubernetes/mail/networkpolicy.yaml")).unwrap();
        let addresses: Vec<_> =
            consistency::edge_addresses(&policy).iter().map(ToString::to_string).collect();
        assert!(!addresses.is_empty());
        let page = read("docs/kubernetes.md");
        let dovecot = page.lines().find_map(|line| line.trim().strip_prefix("haproxy_trusted_networks = "));
        assert_eq!(dovecot, Some(addresses.join(" ").as_str()));
    }

    /// Operators plan with these times.
    #[test]
    fn the_documented_times_of_a_shutdown_are_those_of_the_pod() {
        let workspace = cargo::workspace();
        let read = |file: &str| fs::read_to_string(workspace.join(file)).unwrap();
        let daemons = Object::parse(&read("deploy/kubernetes/base/daemonset.yaml")).unwrap();
        let pod = &daemons[0].0["spec"]["template"]["spec"];
        let injector = &pod["containers"][0];
        let drain =
            text(injector["lifecycle"]["preStop"]["exec"]["command"].as_array().unwrap().last().unwrap());
        let page = read("docs/kubernetes.md");
        assert!(page.contains(&format!("`injector drain --wait --deadline {drain}`")), "{drain}");
        let grace = pod["terminationGracePeriodSeconds"].to_string();
        assert!(page.contains(&format!("SIGKILL {grace} s after")), "{grace}");
    }

    #[test]
    fn only_maps_with_a_configuration_are_checked() {
        let stream = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {injector.toml: \"x = 1\"}\n---\n\
            apiVersion: v1\nkind: ConfigMap\nmetadata: {name: b}\ndata: {other: y}\n";
        let found = configurations(&Object::parse(stream).unwrap());
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [("a".to_owned(), "x = 1".to_owned())]);
    }

    #[test]
    fn the_error_of_a_failing_tool_is_reported() {
        let error = output(Command::new("sh").args(["-c", "echo said; echo why >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("sh printed:\nsaid\nwhy"), "{error}");
        assert_eq!(output(Command::new("echo").arg("fine")).unwrap(), "fine\n");
    }

    #[test]
    fn the_table_has_a_line_for_each_overlay() {
        let rendering = |name| Rendering { name, file: PathBuf::new(), objects: Vec::new() };
        let count = Count { valid: 4, without: 2, invalid: 1 };
        let verdicts = Verdicts { schema: vec![count; 5], scan: "9 passed".into(), ..Verdicts::default() };
        let text = table(&[rendering("edge"), rendering("mail")], &[verdicts, Verdicts::default()]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(lines[1].contains("1.29") && lines[2].contains("4/7* 1 INVALID"));
        assert!(
            lines[2].ends_with("9 passed")
                && lines[3].starts_with("mail")
                && lines[4].contains("IPAddressPool")
        );
    }
}
