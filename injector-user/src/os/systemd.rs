//! Notifications to systemd, and sockets passed by it (sd_notify(3), sd_listen_fds(3)). Without
//! systemd these functions do nothing.

use crate::telemetry::log::target;
use std::{
    io,
    net::SocketAddr,
    os::fd::{FromRawFd as _, OwnedFd},
    time::Duration,
};

use sd_notify::NotifyState;
use socket2::Socket;

/// The listening sockets that systemd passes (`injector.socket`), by address. To be called once, at
/// startup.
///
/// # Errors
/// If one is not a listening TCP socket.
pub fn listen_sockets() -> io::Result<Vec<(SocketAddr, Socket)>> {
    let handed = sd_notify::listen_fds()?;
    let take = |fd| {
        // SAFETY: systemd passes ownership of these descriptors to this process, and only this
        // function takes them over.
        let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(fd) });
        socket.set_cloexec(true)?;
        let address = socket.local_addr()?.as_socket().filter(|_| socket.is_listener().unwrap_or(false));
        let address = address.ok_or_else(|| {
            io::Error::other(
                "a socket passed by systemd is not a listening TCP socket: use ListenStream=ADDRESS:PORT",
            )
        })?;
        Ok((address, socket))
    };
    handed.map(take).collect()
}

/// All listeners are open.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being reloaded; [`ready`] reports the end.
pub fn reloading() {
    let now = NotifyState::monotonic_usec_now();
    match now {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// New connections are not accepted; sessions may continue for `deadline`.
pub fn stopping(deadline: Duration) {
    let micros = u32::try_from(deadline.as_micros()).unwrap_or(u32::MAX);
    notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros), NotifyState::Status("stopping")]);
}

/// The watchdog interval of the service. `None` without a watchdog.
#[must_use]
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// Sends the watchdog ping.
pub fn notify_watchdog() {
    notify(&[NotifyState::Watchdog]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(target: target::DAEMON, %error, "notifying systemd failed");
    }
}
