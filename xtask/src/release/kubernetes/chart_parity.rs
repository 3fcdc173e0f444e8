//! Compares the objects of kustomize and of the chart.

use serde_json::Value;

use super::object::Object;

/// Labels that every chart sets on its objects, and that no selector uses.
const OF_HELM: [&str; 4] = [
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/version",
    "helm.sh/chart",
];

/// Helm stores its records in the namespace, so the namespace must exist before the chart.
const OF_KUSTOMIZE: &str = "Namespace";

/// Every difference, with its path.
pub(super) fn between(kustomize: &[Object], chart: &[Object]) -> Vec<String> {
    let mut found = Vec::new();
    for object in kustomize.iter().filter(|object| object.kind() != OF_KUSTOMIZE) {
        match chart.iter().find(|other| other.id() == object.id()) {
            None => found.push(format!("{}: not in the chart", object.id())),
            Some(other) => compare(&object.id(), &object.0, &without_labels_of_helm(&other.0), &mut found),
        }
    }
    for object in chart {
        if !kustomize.iter().any(|other| other.id() == object.id()) {
            found.push(format!("{}: only in the chart", object.id()));
        }
    }
    found
}

/// `helm test` runs what the CronJob runs: every difference, and a test that is missing.
pub(super) fn tests(tests: &[Object], chart: &[Object]) -> Vec<String> {
    let jobs: Vec<_> = chart.iter().filter(|object| object.kind() == "CronJob").collect();
    if tests.len() != jobs.len() {
        return vec![format!("the chart has {} CronJobs and {} tests", jobs.len(), tests.len())];
    }
    let mut found = Vec::new();
    for (job, test) in jobs.iter().zip(tests) {
        let pod = &job.0["spec"]["jobTemplate"]["spec"]["template"]["spec"];
        compare(&format!("{} .spec", test.id()), pod, &test.0["spec"], &mut found);
    }
    found
}

fn without_labels_of_helm(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(labels) = object["metadata"]["labels"].as_object_mut() {
        labels.retain(|name, _| !OF_HELM.contains(&name.as_str()));
        if labels.is_empty()
            && let Some(metadata) = object["metadata"].as_object_mut()
        {
            metadata.remove("labels");
        }
    }
    object
}

fn compare(path: &str, ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (name, value) in ours {
                compare(&format!("{path} .{name}"), value, theirs.get(name).unwrap_or(&Value::Null), found);
            }
            for (name, value) in theirs.iter().filter(|(name, _)| !ours.contains_key(*name)) {
                compare(&format!("{path} .{name}"), &Value::Null, value, found);
            }
        }
        // Order matters (arguments, relabelings), so it must be the same.
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            for (at, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                compare(&format!("{path} [{at}]"), ours, theirs, found);
            }
        }
        _ if ours == theirs => {}
        _ => found.push(format!("{path}: kustomize has {ours}, the chart has {theirs}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBJECTS: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: a, labels: {app.kubernetes.io/name: a}}\n\
        spec: {ports: [{port: 25}, {port: 465}]}\n";

    fn objects(text: &str) -> Vec<Object> {
        Object::parse(text).unwrap()
    }

    fn differences(chart: &str) -> Vec<String> {
        between(&objects(OBJECTS), &objects(chart))
    }

    #[test]
    fn labels_of_helm_and_the_namespace_are_ignored() {
        assert_eq!(differences(OBJECTS), [""; 0]);
        assert_eq!(differences(&OBJECTS.replace("name: a}}", "name: a, helm.sh/chart: a-1}}")), [""; 0]);
        let namespace = format!("{OBJECTS}---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n}}\n");
        assert_eq!(between(&objects(&namespace), &objects(OBJECTS)), [""; 0]);
        assert_eq!(differences(&namespace), ["Namespace n: only in the chart"]);
    }

    #[test]
    fn a_test_runs_what_the_cron_job_runs() {
        let job = "apiVersion: batch/v1\nkind: CronJob\nmetadata: {name: a}\n\
            spec: {jobTemplate: {spec: {template: {spec: {image: i}}}}}\n";
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, annotations: {helm.sh/hook: test}}\nspec: {image: i}\n";
        let of = |pod: &str| tests(&objects(pod), &objects(job));
        assert!(objects(pod)[0].is_helm_test() && !objects(job)[0].is_helm_test());
        assert_eq!(of(pod), [""; 0]);
        assert_eq!(of(&pod.replace("image: i", "image: j")).len(), 1);
        assert_eq!(of(""), ["the chart has 1 CronJobs and 0 tests"]);
    }

    #[test]
    fn everything_else_is_compared() {
        for (from, to, expected) in [
            ("25", "26", "Service a .spec .ports [0] .port: kustomize has 25, the chart has 26"),
            ("25", "'25'", "kustomize has 25, the chart has \"25\""),
            (", {port: 465}", "", "Service a .spec .ports: kustomize has"),
            ("spec: {", "spec: {type: ClusterIP, ", "Service a .spec .type: kustomize has null"),
            ("/name: a", "/name: b", "kustomize has \"a\", the chart has \"b\""),
        ] {
            let found = differences(&OBJECTS.replace(from, to));
            assert!(found.len() == 1 && found[0].contains(expected), "{expected}: {found:?}");
        }
        let renamed = differences(&OBJECTS.replace("name: a,", "name: z,"));
        assert_eq!(renamed, ["Service a: not in the chart", "Service z: only in the chart"]);
    }
}
