//! A rollout replaces a pod before it starts the next, and evictions leave one.

use super::{
    super::object::{Object, list},
    services::selects,
};

/// Two pods with the same host port cannot run on one node. A budget must be one that the disruption
/// controller can compute.
pub(super) fn check(objects: &[Object], daemons: &Object) -> Vec<String> {
    let mut faults = Vec::new();
    let template = &daemons.0["spec"]["template"];
    let surge = &daemons.0["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"];
    if template["spec"]["hostNetwork"] == true && !surge.is_null() && *surge != 0 {
        faults.push(
            "maxSurge must be 0 in the host's network: the new pod would wait for the old one's ports".into(),
        );
    }
    for budget in objects.iter().filter(|object| object.kind() == "PodDisruptionBudget") {
        let spec = &budget.0["spec"];
        // pkg/controller/disruption/disruption.go, getExpectedPodCount: everything else needs the number
        // of replicas, and finders() knows none for a DaemonSet.
        if !spec["minAvailable"].is_u64() || !spec["maxUnavailable"].is_null() {
            faults.push(format!("{}: a DaemonSet needs minAvailable, as a number", budget.id()));
        }
        if !selects(&spec["selector"]["matchLabels"], &template["metadata"]["labels"])
            || !list(&spec["selector"]["matchExpressions"]).is_empty()
        {
            faults.push(format!("{} selects no pod of the DaemonSet", budget.id()));
        }
    }
    faults
}
