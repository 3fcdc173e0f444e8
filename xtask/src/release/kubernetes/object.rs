//! The objects that kustomize and helm render.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// One object, as the API server would receive it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Object(pub(crate) Value);

impl Object {
    /// All objects of a stream of YAML documents.
    ///
    /// # Errors
    /// When it is not YAML, or a document is not a Kubernetes object.
    pub(crate) fn parse(text: &str) -> Result<Vec<Self>> {
        // YAML 1.1 reads a name such as `n` as "no"; it must stay a name.
        let options = serde_saphyr::options! { strict_booleans: true };
        let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
            .context("the rendered text is not YAML")?;
        let objects: Vec<_> =
            documents.into_iter().filter(|document| !document.is_null()).map(Self).collect();
        for object in &objects {
            let named = [&object.0["apiVersion"], &object.0["kind"], &object.0["metadata"]["name"]];
            ensure!(named.iter().all(|value| value.is_string()), "not a Kubernetes object: {}", object.0);
        }
        Ok(objects)
    }

    pub(crate) fn kind(&self) -> &str {
        text(&self.0["kind"])
    }

    pub(crate) fn name(&self) -> &str {
        text(&self.0["metadata"]["name"])
    }

    pub(crate) fn namespace(&self) -> &str {
        text(&self.0["metadata"]["namespace"])
    }

    /// Whether it is no part of the release, but a pod of `helm test`.
    pub(super) fn is_helm_test(&self) -> bool {
        self.0["metadata"]["annotations"]["helm.sh/hook"] == "test"
    }

    /// `DaemonSet injector/injector`, or without a namespace `Namespace injector`.
    pub(crate) fn id(&self) -> String {
        let namespace = self.namespace();
        let slash = if namespace.is_empty() { "" } else { "/" };
        format!("{} {namespace}{slash}{}", self.kind(), self.name())
    }
}

/// The string, or an empty one if the value is not a string.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The elements of a list, or none if the value is not a list.
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The container of a pod that has this name.
pub(crate) fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    list(&pod["spec"]["containers"]).iter().find(|container| container["name"] == name)
}

/// The value of a container's environment variable, empty if it is not set.
pub(crate) fn variable<'a>(container: &'a Value, name: &str) -> &'a str {
    list(&container["env"])
        .iter()
        .find(|variable| variable["name"] == name)
        .map_or("", |variable| text(&variable["value"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_split_into_objects() {
        let stream = "# a comment\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n---\n\
            apiVersion: v1\nkind: Service\nmetadata: {name: b, namespace: c}\nspec: {ports: [{port: 25}]}\n";
        let objects = Object::parse(stream).unwrap();
        let ids: Vec<_> = objects.iter().map(Object::id).collect();
        assert_eq!(ids, ["Namespace a", "Service c/b"]);
        assert_eq!(list(&objects[1].0["spec"]["ports"])[0]["port"], 25);
    }

    #[test]
    fn anything_else_is_rejected() {
        for stream in ["kind: Service\n", "apiVersion: v1\nkind: Service\nmetadata: {}\n", "a: [", "- 1\n"] {
            assert!(Object::parse(stream).is_err(), "{stream}");
        }
        assert_eq!(Object::parse("").unwrap(), []);
    }
}
