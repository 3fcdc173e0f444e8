//! netlink(7) by blocking requests.
//!
//! Of an answer only the parts that are needed are read: attributes that other programs or newer
//! kernels put into it must not be able to spoil it.

use std::io;

use rtnetlink::{
    packet_core::{
        DecodeError, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage,
        NlasIterator, parse_i32,
    },
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// The value of the first attribute of a kind.
pub(in crate::engine) fn attribute(attributes: &[u8], kind: u16) -> Result<Option<Vec<u8>>, DecodeError> {
    for found in NlasIterator::new(attributes) {
        let found = found?;
        if found.kind() == kind {
            return Ok(Some(found.value().to_vec()));
        }
    }
    Ok(None)
}

pub(in crate::engine) fn short() -> DecodeError {
    DecodeError::from("a message shorter than its header")
}

/// Requests a list from rtnetlink(7), and passes on the payload of each message of the answer.
pub(in crate::engine) fn dump(
    request: RouteNetlinkMessage,
    each: impl FnMut(&[u8]) -> Result<(), DecodeError>,
) -> io::Result<()> {
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    exchange(NETLINK_ROUTE, &bytes, each)
}

/// Sends a request for a list, and passes on the payload of each message of the answer.
pub(in crate::engine) fn exchange(
    protocol: isize,
    request: &[u8],
    mut each: impl FnMut(&[u8]) -> Result<(), DecodeError>,
) -> io::Result<()> {
    /// The kernel fills up to 32 KiB at once (netlink_dump, net/netlink/af_netlink.c).
    const DATAGRAM: usize = 1 << 16;

    let socket = Socket::new(protocol)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(request, 0)?;
    loop {
        let mut datagram = Vec::with_capacity(DATAGRAM);
        socket.recv(&mut datagram, 0)?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            match message.message_type() {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = message.payload().get(..4).ok_or_else(|| io::Error::other(short()))?;
                    let code = parse_i32(code).map_err(io::Error::other)?;
                    return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                }
                _ => each(message.payload()).map_err(io::Error::other)?,
            }
            let len = usize::try_from(message.length()).map_err(io::Error::other)?;
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
