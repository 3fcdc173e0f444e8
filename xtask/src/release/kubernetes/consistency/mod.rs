//! Checks that the objects and the configuration in them agree with each other. A schema cannot
//! check this; on a cluster the fault would show as pods that do not start, or as missing mail.

mod access;
mod backends;
mod config;
mod deadlines;
mod operator_ports;
mod ports;
mod references;
mod reload;
mod rollout;
mod services;
#[cfg(test)]
mod tests;

use anyhow::{Context as _, Result};

#[cfg(test)]
pub(super) use self::backends::edge_addresses;
use self::config::Config;
use super::object::{Object, container, text};

/// The file in the ConfigMap.
pub(super) const CONFIG: &str = "injector.toml";

/// Every inconsistency among the objects of one overlay, and between them and the mail server's.
///
/// # Errors
/// When a required object is missing.
pub(super) fn faults(objects: &[Object], mail: &[Object]) -> Result<Vec<String>> {
    let daemons = find(objects, "DaemonSet").context("no DaemonSet")?;
    let pod = &daemons.0["spec"]["template"];
    let daemon = container(pod, "injector").context("no container `injector`")?;
    let map = objects
        .iter()
        .find(|object| object.kind() == "ConfigMap" && object.0["data"][CONFIG].is_string())
        .context("no ConfigMap with a configuration")?;
    let config: Config = toml::from_str(text(&map.0["data"][CONFIG])).context("the configuration")?;
    let mut faults = Vec::new();
    for object in objects {
        faults.extend(references::check(object, objects));
    }
    faults.extend(ports::check(daemon, &config));
    faults.extend(operator_ports::check(pod, daemon));
    faults.extend(deadlines::check(pod, daemon, &config, objects));
    faults.extend(rollout::check(objects, daemons));
    faults.extend(reload::check(pod, &config));
    faults.extend(access::check(objects, daemons, &config));
    faults.extend(services::check(objects, daemons, &config));
    faults.extend(backends::check(&config, mail));
    let proxy_ports = backends::proxy_ports(&config, mail);
    faults.extend(services::check_proxy_ports(objects.iter().chain(mail), &proxy_ports));
    Ok(faults)
}

/// The Service called `NAMESPACE/NAME`.
fn find_service<'a>(objects: &'a [Object], called: &str) -> Option<&'a Object> {
    let (namespace, name) = called.split_once('/')?;
    let mut services = objects.iter().filter(|object| object.kind() == "Service");
    services.find(|service| service.namespace() == namespace && service.name() == name)
}

fn find<'a>(objects: &'a [Object], kind: &str) -> Option<&'a Object> {
    objects.iter().find(|object| object.kind() == kind)
}
