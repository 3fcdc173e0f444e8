//! Values that an operator may set in the chart, besides those of the overlays: some must render to
//! valid objects, the others must be refused.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Rendering, Validator, chart_schema, consistency,
    object::{Object, text},
    schema,
};

/// Kubernetes limits label values, and names of Services (RFC 1123).
const MAX_LABEL: usize = 63;

/// The CronJob controller appends a time to the name (pkg/apis/batch/validation, `validateCronJobName`).
const MAX_CRON_JOB: usize = 52;

/// The longest name of a release that Helm accepts (pkg/chart/common/util, `ValidateReleaseName`).
const LONGEST_RELEASE: &str = "edge-of-the-mail-system-in-the-datacentre-at-the-lake";

/// Values that the chart must accept.
struct Accepted {
    name: &'static str,
    release: &'static str,
    namespace: &'static str,
    values: &'static str,
    /// Whether the objects and the configuration must agree, as those of an overlay do.
    consistent: bool,
    /// Object, JSON pointer into it, and what must be there, as JSON.
    expected: &'static [(&'static str, &'static str, &'static str)],
}

const ACCEPTED: [Accepted; 5] = [
    Accepted {
        name: "pod",
        release: "injector",
        namespace: "injector",
        values: r#"
image: { repository: registry.mine/injector, digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000" }
imagePullSecrets: [{ name: registry }]
nodeSelector: { mail-edge: "true" }
tolerations: [{ key: dedicated, value: mail, effect: NoExecute }]
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms: [{ matchExpressions: [{ key: zone, operator: In, values: [a] }] }]
podLabels: { team: mail }
podAnnotations: { example.org/backup: "false" }
priorityClass: { create: false, name: system-node-critical }
updateStrategy: { maxUnavailable: 25% }
seccompProfile: { type: Localhost, localhostProfile: bpf.json }
extraEnv: [{ name: RUST_BACKTRACE, value: "1" }]
extraVolumes: [{ name: crowdsec, secret: { secretName: crowdsec } }]
extraVolumeMounts: [{ name: crowdsec, mountPath: /etc/crowdsec, readOnly: true }]
probe: { enabled: true }
metallb: { create: true, pool: mine, addresses: ["2001:db8::25/128"] }
service: { enabled: true, ipFamilyPolicy: SingleStack }
"#,
        consistent: false,
        expected: &[
            (DAEMONS, "/spec/template/spec/imagePullSecrets", r#"[{"name": "registry"}]"#),
            (DAEMONS, "/spec/template/spec/nodeSelector", r#"{"mail-edge": "true"}"#),
            (DAEMONS, "/spec/template/spec/priorityClassName", r#""system-node-critical""#),
            (DAEMONS, "/spec/template/spec/securityContext/seccompProfile/localhostProfile", r#""bpf.json""#),
            (DAEMONS, "/spec/template/metadata/labels/team", r#""mail""#),
            (DAEMONS, "/spec/template/metadata/annotations/example.org~1backup", r#""false""#),
            (DAEMONS, "/spec/updateStrategy/rollingUpdate/maxUnavailable", r#""25%""#),
            (DAEMONS, "/spec/template/spec/containers/0/env/6/name", r#""RUST_BACKTRACE""#),
            (DAEMONS, "/spec/template/spec/containers/0/volumeMounts/3/mountPath", r#""/etc/crowdsec""#),
            (DAEMONS, "/spec/template/spec/volumes/3/secret/secretName", r#""crowdsec""#),
            (PROBE, "/spec/jobTemplate/spec/template/spec/imagePullSecrets", r#"[{"name": "registry"}]"#),
            ("Service injector/injector", "/metadata/annotations/metallb.io~1address-pool", r#""mine""#),
            (
                "L2Advertisement metallb-system/mine",
                "/spec/nodeSelectors",
                r#"[{"matchLabels": {"mail-edge": "true"}}]"#,
            ),
        ],
    },
    Accepted {
        name: "second-release",
        release: "coast",
        namespace: "mail-edge",
        values: r#"
config: |
  admin.socket = "/run/injector/admin.sock"
  stop.deadline = "30s"
  inline.peers = [{ service = "mail-edge/coast-injector-peers" }]
  [[listener]]
  name = "smtp"
  bind = ["0.0.0.0:2500"]
  protocol = "smtp"
  virtual_addresses = [{ service = "mail-edge/coast-injector" }]
  # backends = [{ service = "elsewhere/postfix", port = "smtp" }]
  backends = [{ service = "post/postfix-proxy", port = "smtp" }]
ports: [{ name: smtp, port: 2500 }]
metrics: { port: 9155, scrapeAnnotations: true }
health: { port: 9156 }
backendNamespaces: [post]
inline: { enabled: true }
terminationGracePeriodSeconds: 45
ownServices: { enabled: true }
service: { enabled: true }
podDisruptionBudget: { enabled: true }
mail: { create: true, namespace: post, name: postfix, selector: { app: postfix }, ports: [{ name: smtp, port: 25, proxyPort: 2525 }] }
"#,
        consistent: true,
        expected: &[
            ("PriorityClass coast-injector-edge", "/value", "900000000"),
            ("Service post/postfix-proxy", "/spec/selector", r#"{"app": "postfix"}"#),
            ("NetworkPolicy post/postfix", "/spec/podSelector", r#"{"matchLabels": {"app": "postfix"}}"#),
        ],
    },
    Accepted {
        name: "longest-release",
        release: LONGEST_RELEASE,
        namespace: "injector",
        values: r"
ownServices: { enabled: true }
service: { enabled: true }
podDisruptionBudget: { enabled: true }
podMonitor: { enabled: true, labels: { release: prometheus } }
probe: { enabled: true }
",
        consistent: false,
        expected: &[],
    },
    Accepted {
        name: "mail-in-the-same-namespace",
        release: "injector",
        namespace: "mail",
        values: "mail: { create: true, selector: { app: mail } }",
        consistent: true,
        expected: &[("ServiceAccount mail/injector", "/automountServiceAccountToken", "false")],
    },
    Accepted {
        name: "own-prometheus",
        release: "injector",
        namespace: "injector",
        values: "{ metrics: { scrapeAnnotations: false }, mail: { create: true, selector: { app: mail } } }",
        consistent: true,
        expected: &[(
            DAEMONS,
            "/spec/template/metadata/annotations",
            r#"{"kubectl.kubernetes.io/default-container": "injector"}"#,
        )],
    },
];

const DAEMONS: &str = "DaemonSet injector/injector";
const PROBE: &str = "CronJob injector/injector-probe";

/// Values that a template of the chart must refuse, and a part of the message.
const REFUSED: [(&str, &str); 8] = [
    ("mail: { create: true }", "mail.selector must have the labels"),
    (
        "{ mail: { create: true, selector: { app: mail } }, edgeAddresses: null }",
        "would open the PROXY ports to all",
    ),
    ("drain: { deadline: 5m }", "terminationGracePeriodSeconds (300) must be more than drain.deadline (5m)"),
    ("terminationGracePeriodSeconds: 240", "terminationGracePeriodSeconds (240) must be more"),
    ("backendNamespaces: [post]", "\"mail/mailserver-proxy\", and the injector has no right to read it"),
    (
        "config: '[[listener]] virtual_addresses = [{ service = \"injector/injector\" }]'",
        "the release's own Services are injector/injector and injector/injector-peers",
    ),
    (
        "{ ownServices: { enabled: true }, config: '[[listener]] backends = [{ service = \"injector/other\" }]' }",
        "\"injector/other\", and the injector has no right to read it",
    ),
    (
        "{ drain: { deadline: 4m 59s 1000ms }, terminationGracePeriodSeconds: 300 }",
        "terminationGracePeriodSeconds (300) must be more than drain.deadline (4m 59s 1000ms)",
    ),
];

/// Renders and validates [`ACCEPTED`], and tries the values that must be refused. Returns the faults.
///
/// # Errors
/// When a tool cannot be started, or renders something that is not objects.
pub(super) fn faults(validator: &Validator, daemon: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut files = Vec::new();
    for accepted in &ACCEPTED {
        let output = render(validator, accepted.release, accepted.namespace, accepted.values)?;
        let rendered = match output {
            Ok(rendered) => rendered,
            Err(why) => {
                found.push(format!("values {}: {why}", accepted.name));
                continue;
            }
        };
        let file = validator.folder.join(format!("values.{}.yaml", accepted.name));
        fs::write(&file, &rendered)?;
        let objects = Object::parse(&rendered)?;
        let mut wrong = accepted.faults(&objects)?;
        let rendering = Rendering { name: accepted.name, file: file.clone(), objects };
        wrong.extend(validator.check(daemon, &rendering)?.err());
        found.extend(wrong.into_iter().map(|fault| format!("values {}: {fault}", accepted.name)));
        files.push(file);
    }
    found.extend(schema::ask(&validator.tools.python, &files)?.iter().filter_map(schema::Answer::fault));
    found.extend(refusal_faults(validator)?);
    Ok(found)
}

/// Renders [`REFUSED`] and [`chart_schema::REFUSED`]. Returns what is not refused, or with another message.
fn refusal_faults(validator: &Validator) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut refuse = |values: &str, expected: &str, is_expected: &dyn Fn(&str) -> bool| -> Result<()> {
        match render(validator, super::RELEASE, super::RELEASE, values)? {
            Ok(_) => found.push(format!("the chart accepts values `{values}`")),
            Err(why) if !is_expected(&why) => {
                found.push(format!("the chart refuses values `{values}` without `{expected}`: {why}"));
            }
            Err(_) => {}
        }
        Ok(())
    };
    for (values, expected) in REFUSED {
        refuse(values, expected, &|why| why.contains(expected))?;
    }
    for (values, place, constraint) in chart_schema::REFUSED {
        let expected = format!("{place}: {constraint}");
        refuse(values, &expected, &|why| chart_schema::is_named(why, place, constraint))?;
    }
    Ok(found)
}

/// What was tried, for the result.
pub(super) fn summary() -> String {
    format!(
        "values: {} combinations rendered and valid, {} refused",
        ACCEPTED.len(),
        REFUSED.len() + chart_schema::REFUSED.len()
    )
}

/// The objects as text, or why helm refuses the values.
fn render(
    validator: &Validator,
    release: &str,
    namespace: &str,
    values: &str,
) -> Result<Result<String, String>> {
    let file = validator.folder.join("values.yaml");
    fs::write(&file, values)?;
    let mut helm = validator.helm();
    helm.args(["template", release]).arg(&validator.chart).args(["--namespace", namespace]);
    helm.args(["--kube-version", schema::VERSIONS[0], "--values"]).arg(file);
    let output = helm.output().context("cannot start helm")?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let refusal = || String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok(if output.status.success() { Ok(printed) } else { Err(refusal()) })
}

impl Accepted {
    fn faults(&self, objects: &[Object]) -> Result<Vec<String>> {
        let mut faults: Vec<_> = objects.iter().flat_map(too_long).collect();
        for (id, path, expected) in self.expected {
            let object = objects.iter().find(|object| object.id() == *id);
            let value = object.and_then(|object| object.0.pointer(path));
            if value != Some(&serde_json::from_str::<Value>(expected)?) {
                faults.push(format!("{id} has {value:?} at {path}, and not {expected}"));
            }
        }
        if self.consistent {
            let (mail, edge): (Vec<_>, Vec<_>) = objects.iter().cloned().partition(of_mail);
            ensure!(!mail.is_empty(), "values {}: nothing of the mail server", self.name);
            faults.extend(consistency::faults(&edge, &mail)?);
        }
        Ok(faults)
    }
}

/// Whether the object is of the mail server's side.
fn of_mail(object: &Object) -> bool {
    let labels = &object.0["metadata"]["labels"];
    labels.get("app.kubernetes.io/name").is_none()
}

/// Names and labels that the API server would refuse for their length.
fn too_long(object: &Object) -> Vec<String> {
    let most = if object.kind() == "CronJob" { MAX_CRON_JOB } else { MAX_LABEL };
    let mut faults = Vec::new();
    if object.name().len() > most {
        faults.push(format!("{}: the name has more than {most} characters", object.id()));
    }
    for labels in [&object.0["metadata"]["labels"], &object.0["spec"]["template"]["metadata"]["labels"]] {
        let labels = labels.as_object().into_iter().flatten();
        for (label, _) in labels.filter(|(_, value)| text(value).len() > MAX_LABEL) {
            faults.push(format!("{}: label {label} has more than {MAX_LABEL} characters", object.id()));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(kind: &str, name: &str, label: &str) -> Object {
        let text = format!(
            "apiVersion: v1\nkind: {kind}\nmetadata: {{name: {name}}}\n\
             spec: {{template: {{metadata: {{labels: {{app: {label}}}}}}}}}\n"
        );
        Object::parse(&text).unwrap().remove(0)
    }

    #[test]
    fn names_and_labels_have_a_limit() {
        let of = |kind, name: usize, label: usize| {
            too_long(&object(kind, &"n".repeat(name), &"l".repeat(label))).len()
        };
        assert_eq!([of("CronJob", 52, 63), of("Service", 63, 63)], [0, 0]);
        assert_eq!([of("CronJob", 53, 63), of("Service", 64, 63), of("Service", 63, 64)], [1, 1, 1]);
    }

    #[test]
    fn the_longest_release_is_as_long_as_helm_accepts() {
        assert_eq!(LONGEST_RELEASE.len(), 53);
    }

    #[test]
    fn an_expected_value_that_differs_or_is_missing_is_a_fault() {
        let objects = [object("Service", "a", "l")];
        let of = |path, expected| {
            let expected: &'static [_] = Vec::leak(vec![("Service a", path, expected)]);
            Accepted { expected, consistent: false, ..ACCEPTED[2] }.faults(&objects).unwrap().len()
        };
        let label = "/spec/template/metadata/labels/app";
        assert_eq!([of(label, "\"l\""), of(label, "\"m\""), of("/spec/none", "1")], [0, 1, 1]);
    }
}
