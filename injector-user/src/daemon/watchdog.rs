//! The systemd watchdog: it restarts the service when a worker thread exits or does not respond.

use tokio::time::Instant;

use crate::{control::Control, os::systemd, telemetry::log::target};

/// Sends watchdog pings to systemd while every worker thread responds.
pub(super) async fn feed_watchdog(control: Control) {
    let Some(timeout) = systemd::watchdog_interval() else { return };
    let interval = timeout / 2;
    loop {
        let next = Instant::now() + interval;
        match tokio::time::timeout(interval, control.check_liveness()).await {
            Ok(true) => systemd::notify_watchdog(),
            Ok(false) => {
                tracing::error!(target: target::DAEMON, "a worker thread exited; withholding the systemd watchdog ping, so systemd restarts the service")
            }
            Err(_) => {
                tracing::error!(target: target::DAEMON, "a worker thread is unresponsive; withholding the systemd watchdog ping, so systemd restarts the service")
            }
        }
        tokio::time::sleep_until(next).await;
    }
}
