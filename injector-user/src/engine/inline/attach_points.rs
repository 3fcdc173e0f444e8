//! On which devices the programs belong.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::Context as _;

use super::{
    attach::Role,
    routes::{Interface, LinkKind, RouteError, Routes},
};
use crate::{config::Inline as Settings, telemetry::log::target};

/// The devices for each role: the programs for backends belong on the devices that lead to them.
/// The programs for clients belong on all devices, because clients may use any of them.
pub(super) async fn attach_points(
    settings: &Settings,
    backends: &[SocketAddr],
) -> anyhow::Result<BTreeSet<(Interface, Role)>> {
    let routes = Routes::open().context("opening rtnetlink to read routes")?;
    let devices = routes.interfaces().await?;
    let named = |names: &[String]| -> anyhow::Result<Vec<Interface>> {
        let find = |name: &String| {
            let device = devices.iter().find(|device| device.name == *name).cloned();
            device.with_context(|| format!("device {name:?} does not exist or is down"))
        };
        names.iter().map(find).collect()
    };
    let mut points = BTreeSet::new();
    let clients = if settings.client_devices.is_empty() {
        devices.iter().filter(|device| !matches!(device.kind, LinkKind::Other(_))).cloned().collect()
    } else {
        named(&settings.client_devices)?
    };
    points.extend(clients.into_iter().map(|device| (device, Role::Client)));
    if !settings.backend_devices.is_empty() {
        points.extend(named(&settings.backend_devices)?.into_iter().map(|device| (device, Role::Backend)));
        return Ok(points);
    }
    for backend in backends {
        match routes.towards(backend.ip()).await {
            Ok(device) => drop(points.insert((device, Role::Backend))),
            // The route may come back; until then no packet reaches the backend.
            Err(error @ RouteError::Unreachable { .. }) => {
                tracing::warn!(target: target::ENGINE_INLINE, %backend, %error, "no route to the backend; no connection reaches it until a route appears");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(points)
}
