//! What systemd is told, and what it hands over (sd_notify(3), sd_listen_fds(3)). Without systemd all of it does nothing.

use crate::telemetry::log::target;
use std::{
    io,
    net::SocketAddr,
    os::fd::{FromRawFd as _, OwnedFd},
    time::Duration,
};

use sd_notify::NotifyState;
use socket2::Socket;

/// Sockets that systemd listens on for the daemon (`injector.socket`), by their addresses. To be asked once, at the start.
///
/// # Errors
/// When one is not a TCP socket that listens.
pub fn listen_sockets() -> io::Result<Vec<(SocketAddr, Socket)>> {
    let handed = sd_notify::listen_fds()?;
    let take = |fd| {
        // SAFETY: systemd hands these numbers over to this process, which takes each of them here and nowhere else.
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

/// Every listener is open.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being read again; [`ready`] says when that is over.
pub fn reloading() {
    let now = NotifyState::monotonic_usec_now();
    match now {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// Nobody is let in any more, and sessions may go on for `deadline`.
pub fn stopping(deadline: Duration) {
    let micros = u32::try_from(deadline.as_micros()).unwrap_or(u32::MAX);
    notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros), NotifyState::Status("stopping")]);
}

/// How often systemd wants to hear that the daemon is alive; `None` if it does not.
#[must_use]
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// The daemon is alive.
pub fn notify_watchdog() {
    notify(&[NotifyState::Watchdog]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(target: target::DAEMON, %error, "notifying systemd failed");
    }
}
