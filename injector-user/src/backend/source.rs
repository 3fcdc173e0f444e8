//! The source addresses of connections to backends, by turns. Pure.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
};

/// The source addresses of a listener.
#[derive(Debug, Default)]
pub(super) struct SourceAddresses {
    ipv4: Vec<IpAddr>,
    ipv6: Vec<IpAddr>,
    turn: AtomicUsize,
}

impl SourceAddresses {
    pub(super) fn new(addresses: &[IpAddr]) -> Self {
        let (ipv4, ipv6) = addresses.iter().partition(|address| address.is_ipv4());
        Self { ipv4, ipv6, turn: AtomicUsize::new(0) }
    }

    /// The sources for a connection to `backend`, in the order in which they are tried: all of its
    /// family, each connection beginning with the next one. `None` is the address that the route
    /// prefers.
    pub(super) fn towards(&self, backend: SocketAddr) -> impl Iterator<Item = Option<IpAddr>> + use<> {
        let mut of_family = if backend.is_ipv4() { self.ipv4.clone() } else { self.ipv6.clone() };
        if let several @ 2.. = of_family.len() {
            of_family.rotate_left(self.turn.fetch_add(1, Ordering::Relaxed) % several);
        }
        let default = of_family.is_empty().then_some(None);
        of_family.into_iter().map(Some).chain(default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_take_turns_and_a_family_without_one_has_the_default() {
        let [one, two, six] = ["10.0.0.1", "10.0.0.2", "fd25::1"].map(|text| text.parse().unwrap());
        let backend = "10.0.0.9:25".parse().unwrap();
        let order = |sources: &SourceAddresses, backend| sources.towards(backend).collect::<Vec<_>>();
        let sources = SourceAddresses::new(&[one, six, two]);
        assert_eq!(order(&sources, backend), [Some(one), Some(two)]);
        assert_eq!(order(&sources, backend), [Some(two), Some(one)]);
        assert_eq!(order(&sources, "[fd25::9]:25".parse().unwrap()), [Some(six)]);
        assert_eq!(order(&SourceAddresses::new(&[six]), backend), [None]);
        assert_eq!(order(&SourceAddresses::default(), backend), [None]);
    }
}
