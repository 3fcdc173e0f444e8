//! The interface towards a backend, all interfaces, and notifications of changes, by rtnetlink(7).
//!
//! A netlink socket belongs to the network namespace of the thread that opens it. No capability
//! is needed.

use std::{io, net::IpAddr, time::Duration};

use futures_util::{
    StreamExt, TryStreamExt,
    stream::{BoxStream, Stream},
};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder,
    packet_route::{
        link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
        route::{RouteAttribute, RouteMessage, RouteType},
    },
};
use thiserror::Error;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// The number in `ip link`. Another interface may get the number once this one is gone.
    pub index: u32,
    /// For example `eth0`. May change at any time.
    pub name: String,
    /// The format of its packets.
    pub kind: LinkKind,
}

/// The first bytes of an interface's packets, as tc programs see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkKind {
    /// 14 bytes of Ethernet: veth, bridges, VLANs, bonds and most hardware.
    Ethernet,
    /// The IP header: tun, WireGuard, IP in IP, PPP.
    Headerless,
    /// A format that the inline engine does not support; the number is one of `ARPHRD_*`,
    /// include/uapi/linux/if_arp.h.
    Other(u16),
}

impl LinkKind {
    /// Bytes before the IP header; `None` if unknown.
    #[must_use]
    pub const fn header_len(self) -> Option<usize> {
        match self {
            Self::Ethernet => Some(14),
            Self::Headerless => Some(0),
            Self::Other(_) => None,
        }
    }

    fn of(link: LinkLayerType) -> Self {
        use LinkLayerType::{Ether, None, Ppp, Rawip, Sit, Tunnel, Tunnel6};
        match link {
            Ether => Self::Ethernet,
            None | Rawip | Ppp | Tunnel | Tunnel6 | Sit => Self::Headerless,
            other => Self::Other(other.into()),
        }
    }
}

/// Why the inline engine cannot serve a backend, as far as routes are concerned.
#[derive(Debug, Error)]
pub enum RouteError {
    /// The backend is an address of this host, and the kernel does not forward to those.
    #[error(
        "{backend} is an address of this host: the inline engine only forwards, so it cannot serve backends on the \
         host itself; use engine = \"splice\" for them"
    )]
    Local {
        /// The backend's address.
        backend: IpAddr,
    },
    /// No route, or one that rejects.
    #[error("no route to {backend}: {error}")]
    Unreachable {
        /// As asked for.
        backend: IpAddr,
        /// The kernel's error.
        error: io::Error,
    },
    /// A route that TCP cannot use.
    #[error("the route to {backend} has type {kind}; TCP needs a unicast route")]
    NotUnicast {
        /// As asked for.
        backend: IpAddr,
        /// As `ip route` calls it.
        kind: String,
    },
    /// The query failed, or its answer lacks a part.
    #[error("rtnetlink, {question}: {error}")]
    Netlink {
        /// The query.
        question: String,
        /// The kernel's answer, or what is wrong with it.
        error: String,
    },
}

/// Queries to the kernel's routing tables.
#[derive(Debug)]
pub struct Routes {
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
}

impl Routes {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// As socket(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self { handle, _connection: AbortOnDropHandle::new(tokio::spawn(connection)) })
    }

    /// The interface through which the host's own packets to `backend` leave. Ignores rules by
    /// source, mark or incoming interface; of several next hops the kernel chooses one.
    ///
    /// # Errors
    /// [`RouteError`]; `Local` also for what would leave by `lo`.
    pub async fn towards(&self, backend: IpAddr) -> Result<Interface, RouteError> {
        let backend = backend.to_canonical();
        let route = self.route(backend).await?;
        match route.header.kind {
            RouteType::Unicast => {}
            RouteType::Local => return Err(RouteError::Local { backend }),
            RouteType::Unreachable | RouteType::BlackHole | RouteType::Prohibit | RouteType::Throw => {
                let error = io::ErrorKind::NetworkUnreachable.into();
                return Err(RouteError::Unreachable { backend, error });
            }
            kind => {
                return Err(RouteError::NotUnicast { backend, kind: format!("{kind:?}").to_lowercase() });
            }
        }
        let interface = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        let question = || format!("route to {backend}");
        let index = interface.ok_or_else(|| incomplete(question(), "no outgoing interface"))?;
        let link = self.handle.link().get().match_index(index).execute();
        let link = first(link, || format!("link {index}, by which {backend} is reached")).await?;
        if link.header.flags.contains(LinkFlags::Loopback) {
            return Err(RouteError::Local { backend });
        }
        interface_of(&link).ok_or_else(|| incomplete(question(), "an interface without a name"))
    }

    /// The interfaces that are up, without loopback, by index.
    ///
    /// # Errors
    /// [`RouteError::Netlink`].
    pub async fn interfaces(&self) -> Result<Vec<Interface>, RouteError> {
        let links: Vec<LinkMessage> = (self.handle.link().get().execute().try_collect().await)
            .map_err(|error| netlink("all links".to_owned(), &error))?;
        let usable = |link: &&LinkMessage| {
            link.header.flags.contains(LinkFlags::Up) && !link.header.flags.contains(LinkFlags::Loopback)
        };
        let mut interfaces: Vec<_> = links.iter().filter(usable).filter_map(interface_of).collect();
        interfaces.sort();
        Ok(interfaces)
    }

    async fn route(&self, backend: IpAddr) -> Result<RouteMessage, RouteError> {
        let whole = if backend.is_ipv4() { 32 } else { 128 };
        let request = RouteMessageBuilder::<IpAddr>::new().destination_prefix(backend, whole);
        let request =
            request.map_err(|error| incomplete(format!("route to {backend}"), &error.to_string()))?;
        let answer = self.handle.route().get(request.build()).execute();
        match std::pin::pin!(answer).try_next().await {
            Ok(Some(route)) => Ok(route),
            Ok(None) => Err(incomplete(format!("route to {backend}"), "no answer")),
            // Without a route the kernel answers ENETUNREACH; for a rejecting route, the error that
            // the sender would get.
            Err(rtnetlink::Error::NetlinkError(error)) => {
                Err(RouteError::Unreachable { backend, error: error.to_io() })
            }
            Err(error) => Err(netlink(format!("route to {backend}"), &error)),
        }
    }
}

async fn first<T>(
    answers: impl Stream<Item = Result<T, rtnetlink::Error>>,
    question: impl Fn() -> String,
) -> Result<T, RouteError> {
    let answer = std::pin::pin!(answers).try_next().await.map_err(|error| netlink(question(), &error))?;
    answer.ok_or_else(|| incomplete(question(), "no answer"))
}

fn netlink(question: String, error: &rtnetlink::Error) -> RouteError {
    let error = match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io().to_string(),
        other => other.to_string(),
    };
    RouteError::Netlink { question, error }
}

fn incomplete(question: String, error: &str) -> RouteError {
    RouteError::Netlink { question, error: error.to_owned() }
}

fn interface_of(link: &LinkMessage) -> Option<Interface> {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let kind = LinkKind::of(link.header.link_layer_type);
    Some(Interface { index: link.header.index, name, kind })
}

/// Notifies the caller of changes of links, addresses, routes or rules, so that it queries
/// [`Routes`] again.
pub struct Changes {
    /// One item for each message; its content does not matter. Lost messages (ENOBUFS) are an item
    /// too.
    messages: BoxStream<'static, ()>,
    /// The time of the first change that no call of `next` has reported yet.
    since: Option<Instant>,
    _connection: AbortOnDropHandle<()>,
}

/// Changes come in bursts: a link that goes down takes its routes along, a routing daemon writes
/// thousands.
const QUIET: Duration = Duration::from_millis(100);
/// How long a burst may delay the caller.
const LONGEST: Duration = Duration::from_secs(1);

impl Changes {
    /// Subscribes to changes, in the calling thread's network namespace. A caller that subscribes
    /// before it queries [`Routes`] misses no change.
    ///
    /// # Errors
    /// As socket(2) and bind(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch() -> io::Result<Self> {
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(Self { messages: messages.map(|_| ()).boxed(), since: None, _connection: connection })
    }

    /// Returns after a change, once nothing more has changed for 100 ms, or 1 s after the first
    /// change. Changes before the call count. Cancel safe: the next call reports what a dropped
    /// call received.
    ///
    /// # Errors
    /// When the socket has failed for good; watch anew.
    pub async fn next(&mut self) -> io::Result<()> {
        let closed = || io::Error::other("the rtnetlink socket for route changes failed");
        let since = match self.since {
            Some(since) => since,
            None => {
                self.messages.next().await.ok_or_else(closed)?;
                *self.since.insert(Instant::now())
            }
        };
        let end = since + LONGEST;
        // The next call reports an end of the stream; this change counts first.
        while let Ok(Some(())) = timeout_at(end.min(Instant::now() + QUIET), self.messages.next()).await {
            // If the stream is always ready, the timer is never polled.
            if Instant::now() >= end {
                break;
            }
        }
        self.since = None;
        Ok(())
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_kinds_give_the_offset_of_the_ip_header() {
        let cases = [
            (LinkLayerType::Ether, Some(14)),
            (LinkLayerType::None, Some(0)),
            (LinkLayerType::Tunnel, Some(0)),
            (LinkLayerType::Ppp, Some(0)),
            (LinkLayerType::Infiniband, None),
            (LinkLayerType::Ipgre, None),
        ];
        for (link, header_len) in cases {
            assert_eq!(LinkKind::of(link).header_len(), header_len, "{link:?}");
        }
        assert_eq!(LinkKind::of(LinkLayerType::Ipgre), LinkKind::Other(778));
    }
}
