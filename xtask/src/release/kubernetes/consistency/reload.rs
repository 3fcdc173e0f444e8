//! The container `reload` watches the daemon's configuration and uses the daemon's control socket.

use serde_json::Value;

use super::{
    super::object::{container, list, text, variable},
    config::Config,
};

/// The second container has the first reload the same file, through its control socket.
pub(super) fn check(pod: &Value, config: &Config) -> Vec<String> {
    let (Some(daemon), Some(reload)) = (container(pod, "injector"), container(pod, "reload")) else {
        return vec!["no container `reload`".into()];
    };
    let mut faults = Vec::new();
    let file = variable(daemon, "INJECTOR_CONFIG");
    if !list(&reload["args"]).iter().any(|word| word == file) {
        faults.push(format!("the container `reload` does not watch {file}"));
    }
    let socket = variable(reload, "INJECTOR_SOCKET");
    if socket != config.admin.socket {
        faults.push(format!(
            "the container `reload` uses {socket}, the injector listens on {}",
            config.admin.socket
        ));
    }
    for (name, container) in [("injector", daemon), ("reload", reload)] {
        for path in [file, socket] {
            let mounts = list(&container["volumeMounts"]);
            let shared = mounts.iter().any(|mount| {
                let under = path.strip_prefix(text(&mount["mountPath"]));
                under.is_some_and(|rest| rest.starts_with('/')) && mount["subPath"].is_null()
            });
            if !shared {
                faults.push(format!("{path} is in no volume of the container `{name}`"));
            }
        }
    }
    faults
}
