//! Values of the chart that its schema (`values.schema.json`) must refuse: at least one for each of its constraints.

/// Values, where they are wrong, and a part of the message of Helm.
pub(super) const REFUSED: &[(&str, &str, &str)] = &[
    ("noSuch: 1", "", "additional properties"),
    ("image: { noSuch: 1 }", "/image", "additional properties"),
    ("image: { repository: null }", "/image", "missing property 'repository'"),
    ("image: { repository: '' }", "/image/repository", "minLength:"),
    ("image: { digest: latest }", "/image/digest", "does not match pattern"),
    ("image: { pullPolicy: Sometimes }", "/image/pullPolicy", "value must be one of"),
    ("imagePullSecrets: [{ name: registry, noSuch: 1 }]", "/imagePullSecrets/0", "additional properties"),
    ("imagePullSecrets: [{}]", "/imagePullSecrets/0", "missing property 'name'"),
    ("imagePullSecrets: [{ name: '' }]", "/imagePullSecrets/0/name", "minLength:"),
    ("config: ''", "/config", "does not match pattern"),
    ("backendNamespaces: [Mail]", "/backendNamespaces/0", "does not match pattern"),
    ("edgeAddresses: []", "/edgeAddresses", "minItems:"),
    ("edgeAddresses: [192.0.2.1]", "/edgeAddresses/0", "does not match pattern"),
    ("mail: { noSuch: 1 }", "/mail", "additional properties"),
    ("mail: { namespace: Mail }", "/mail/namespace", "does not match pattern"),
    ("mail: { name: -mail }", "/mail/name", "does not match pattern"),
    ("mail: { ports: [] }", "/mail/ports", "minItems:"),
    (
        "mail: { ports: [{ name: smtp, port: 25, proxyPort: 2525, noSuch: 1 }] }",
        "/mail/ports/0",
        "additional properties",
    ),
    ("mail: { ports: [{ port: 25, proxyPort: 2525 }] }", "/mail/ports/0", "missing property 'name'"),
    ("mail: { ports: [{ name: smtp, proxyPort: 2525 }] }", "/mail/ports/0", "missing property 'port'"),
    ("mail: { ports: [{ name: smtp, port: 25 }] }", "/mail/ports/0", "missing property 'proxyPort'"),
    (
        "mail: { ports: [{ name: sixteen-letters-, port: 25, proxyPort: 2525 }] }",
        "/mail/ports/0/name",
        "maxLength:",
    ),
    ("mail: { ports: [{ name: smtp, port: 0, proxyPort: 2525 }] }", "/mail/ports/0/port", "minimum:"),
    ("mail: { ports: [{ name: smtp, port: 65536, proxyPort: 2525 }] }", "/mail/ports/0/port", "maximum:"),
    ("mail: { ports: [{ name: smtp, port: 25, proxyPort: 0 }] }", "/mail/ports/0/proxyPort", "minimum:"),
    ("mail: { ports: [{ name: smtp, port: 25, proxyPort: 65536 }] }", "/mail/ports/0/proxyPort", "maximum:"),
    ("podDisruptionBudget: { noSuch: 1 }", "/podDisruptionBudget", "additional properties"),
    ("podDisruptionBudget: { minAvailable: 0 }", "/podDisruptionBudget/minAvailable", "minimum:"),
    ("ownServices: { noSuch: 1 }", "/ownServices", "additional properties"),
    ("ports: [{ name: smtp, port: 25, noSuch: 1 }]", "/ports/0", "additional properties"),
    ("ports: [{ port: 25 }]", "/ports/0", "missing property 'name'"),
    ("ports: [{ name: smtp }]", "/ports/0", "missing property 'port'"),
    ("ports: [{ name: sixteen-letters-, port: 25 }]", "/ports/0/name", "maxLength:"),
    ("ports: [{ name: smtp, port: 0 }]", "/ports/0/port", "minimum:"),
    ("ports: [{ name: smtp, port: 65536 }]", "/ports/0/port", "maximum:"),
    ("metrics: { noSuch: 1 }", "/metrics", "additional properties"),
    ("metrics: { port: 0 }", "/metrics/port", "minimum:"),
    ("metrics: { port: 65536 }", "/metrics/port", "maximum:"),
    ("health: { noSuch: 1 }", "/health", "additional properties"),
    ("health: { port: 0 }", "/health/port", "minimum:"),
    ("health: { port: 65536 }", "/health/port", "maximum:"),
    ("inline: { noSuch: 1 }", "/inline", "additional properties"),
    ("drain: { noSuch: 1 }", "/drain", "additional properties"),
    ("drain: { deadline: 4 minutes }", "/drain/deadline", "does not match pattern"),
    ("terminationGracePeriodSeconds: 0", "/terminationGracePeriodSeconds", "minimum:"),
    ("minReadySeconds: -1", "/minReadySeconds", "minimum:"),
    ("readiness: { noSuch: 1 }", "/readiness", "additional properties"),
    ("readiness: { failureThreshold: 0 }", "/readiness/failureThreshold", "minimum:"),
    ("updateStrategy: { noSuch: 1 }", "/updateStrategy", "additional properties"),
    ("updateStrategy: { maxUnavailable: 0 }", "/updateStrategy/maxUnavailable", "minimum:"),
    ("updateStrategy: { maxUnavailable: 101% }", "/updateStrategy/maxUnavailable", "does not match pattern"),
    ("extraEnv: [{ value: a }]", "/extraEnv/0", "missing property 'name'"),
    ("extraVolumes: [{ emptyDir: {} }]", "/extraVolumes/0", "missing property 'name'"),
    ("extraVolumeMounts: [{ mountPath: /a }]", "/extraVolumeMounts/0", "missing property 'name'"),
    ("extraVolumeMounts: [{ name: a }]", "/extraVolumeMounts/0", "missing property 'mountPath'"),
    ("seccompProfile: { type: null }", "/seccompProfile", "missing property 'type'"),
    ("seccompProfile: { profile: bpf.json }", "/seccompProfile", "invalid propertyName"),
    ("priorityClass: { noSuch: 1 }", "/priorityClass", "additional properties"),
    ("priorityClass: { value: 1000000001 }", "/priorityClass/value", "maximum:"),
    ("reload: { noSuch: 1 }", "/reload", "additional properties"),
    ("service: { noSuch: 1 }", "/service", "additional properties"),
    ("service: { externalTrafficPolicy: All }", "/service/externalTrafficPolicy", "value must be one of"),
    ("service: { ipFamilyPolicy: DualStack }", "/service/ipFamilyPolicy", "value must be one of"),
    ("metallb: { noSuch: 1 }", "/metallb", "additional properties"),
    ("metallb: { addresses: [] }", "/metallb/addresses", "minItems:"),
    ("metallb: { addresses: [''] }", "/metallb/addresses/0", "minLength:"),
    ("podMonitor: { noSuch: 1 }", "/podMonitor", "additional properties"),
    ("probe: { noSuch: 1 }", "/probe", "additional properties"),
    ("probe: { egressPorts: [] }", "/probe/egressPorts", "minItems:"),
    ("probe: { egressPorts: [0] }", "/probe/egressPorts/0", "minimum:"),
    ("probe: { egressPorts: [65536] }", "/probe/egressPorts/0", "maximum:"),
];

/// Whether Helm's message names this place and this constraint.
pub(super) fn is_named(message: &str, place: &str, constraint: &str) -> bool {
    // The names of a table's keys are judged without their place.
    let place = if constraint == PROPERTY_NAME { "" } else { place };
    message.lines().any(|line| line.contains(&format!("at '{place}': ")) && line.contains(constraint))
}

const PROPERTY_NAME: &str = "invalid propertyName";

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use serde_json::Value;

    use super::*;
    use crate::cargo;

    /// The constraints of a schema, other than types, as Helm names them.
    fn constraints(root: &Value, schema: &Value, place: &str, found: &mut BTreeSet<(String, String)>) {
        let definition = schema["$ref"].as_str().and_then(|name| root.pointer(name.strip_prefix('#')?));
        let schema = definition.unwrap_or(schema);
        let fields = schema.as_object().unwrap();
        let mut is = |constraint: String| found.insert((place.to_owned(), constraint));
        for (keyword, value) in fields {
            match keyword.as_str() {
                "minimum" | "maximum" | "minItems" | "minLength" | "maxLength" => is(format!("{keyword}:")),
                "pattern" => is("does not match pattern".to_owned()),
                "enum" => is("value must be one of".to_owned()),
                "propertyNames" => is(PROPERTY_NAME.to_owned()),
                "additionalProperties" if *value == Value::Bool(false) => {
                    is("additional properties".to_owned())
                }
                "required" => value
                    .as_array()
                    .unwrap()
                    .iter()
                    .all(|name| is(format!("missing property '{}'", name.as_str().unwrap()))),
                "$schema" | "definitions" | "type" | "properties" | "items" | "additionalProperties" => true,
                other => panic!("{place}: {other} is not known"),
            };
        }
        for (name, property) in fields.get("properties").and_then(Value::as_object).into_iter().flatten() {
            constraints(root, property, &format!("{place}/{name}"), found);
        }
        if let Some(item) = fields.get("items") {
            constraints(root, item, &format!("{place}/0"), found);
        }
    }

    /// So none can be taken out of the schema, or added to it, unnoticed.
    #[test]
    fn each_constraint_of_the_schema_refuses_something() {
        let file = cargo::workspace().join("deploy/helm/injector/values.schema.json");
        let schema: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
        let mut found = BTreeSet::new();
        constraints(&schema, &schema, "", &mut found);
        let refused =
            REFUSED.iter().map(|(_, place, constraint)| (place.to_string(), constraint.to_string()));
        assert_eq!(refused.collect::<BTreeSet<_>>(), found);
    }

    #[test]
    fn a_refusal_names_place_and_constraint() {
        let message = "Error: values don't meet the specifications\n- at '/drain': additional properties 'a' not allowed\n\
                       - at '': invalid propertyName 'profile'";
        assert!(is_named(message, "/drain", "additional properties"));
        assert!(is_named(message, "/seccompProfile", PROPERTY_NAME));
        assert!(!is_named(message, "/drain", "minimum:") && !is_named(message, "", "additional properties"));
    }
}
