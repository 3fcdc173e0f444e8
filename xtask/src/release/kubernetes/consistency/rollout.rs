//! A rollout replaces a pod before it starts the next.

use serde_json::Value;

/// Two pods with the same host port cannot run on one node.
pub(super) fn check(daemons: &Value) -> Option<String> {
    let update = &daemons["spec"]["updateStrategy"]["rollingUpdate"];
    (daemons["spec"]["template"]["spec"]["hostNetwork"] == true && update["maxSurge"] != 0).then(|| {
        "maxSurge must be 0 in the host's network: the new pod would wait for the old one's ports".into()
    })
}
