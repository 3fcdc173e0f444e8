//! The filters of a device's clsact qdisc, read by rtnetlink(7).
//!
//! aya removes filters by name alone, and names are the same in every version. To replace one, its
//! priority and handle are needed. Of a message only the parts named here are read: other
//! programs' filters must not be able to spoil the answer.

use std::io;

use aya::programs::{
    Link as _, ProgramError, TcAttachType,
    tc::{SchedClassifierLink, TcHandle},
};
use rtnetlink::{
    packet_core::{
        DecodeError, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage,
        NlasIterator, parse_i32, parse_string,
    },
    packet_route::{
        RouteNetlinkMessage,
        link::LinkMessage,
        tc::{TcHandle as Parent, TcHeader, TcMessage},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// A BPF filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// Lower ones run first.
    pub(super) priority: u16,
    /// Its number among those of its priority.
    pub(super) handle: u32,
    /// The name that its owner gave it; aya gives it the program's name.
    pub(super) name: String,
}

impl Filter {
    /// The filter as an aya link. Dropping the link removes the filter.
    pub(super) fn link(&self, device: &str, direction: TcAttachType) -> io::Result<SchedClassifierLink> {
        SchedClassifierLink::attached(device, direction, self.priority, TcHandle::from(self.handle), None)
    }

    /// Removes it.
    pub(super) fn remove(&self, device: &str, direction: TcAttachType) -> Result<(), ProgramError> {
        self.link(device, direction).map_err(ProgramError::IOError)?.detach()
    }
}

/// The BPF filters of a device, in the order in which the kernel lists them; none without clsact.
pub(super) fn list(index: u32, direction: TcAttachType) -> io::Result<Vec<Filter>> {
    let minor = match direction {
        TcAttachType::Ingress => Parent::MIN_INGRESS,
        TcAttachType::Egress => Parent::MIN_EGRESS,
        TcAttachType::Custom(_) => return Err(io::ErrorKind::Unsupported.into()),
    };
    let index = i32::try_from(index).map_err(io::Error::other)?;
    let mut request = TcMessage::with_index(index);
    request.header.parent = Parent { major: Parent::CLSACT.major, minor };
    let mut filters = Vec::new();
    let asked = dump(RouteNetlinkMessage::GetTrafficFilter(request), |message| {
        filters.extend(filter(message)?);
        Ok(())
    });
    match asked {
        // A kernel without classifiers may have tcx.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        asked => asked.map(|()| filters),
    }
}

/// Index and name of every device of the network namespace, also of those that are down.
pub(super) fn devices() -> io::Result<Vec<(u32, String)>> {
    /// `IFLA_IFNAME`, and the length of struct ifinfomsg, before which the index is at 4.
    const NAME: u16 = 3;
    const HEADER: usize = 16;

    let mut devices = Vec::new();
    dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        let (header, attributes) = message.split_at_checked(HEADER).ok_or_else(short)?;
        let index = parse_i32(&header[4..8])?;
        if let (Ok(index), Some(name)) = (u32::try_from(index), attribute(attributes, NAME)?) {
            devices.push((index, parse_string(&name)?));
        }
        Ok(())
    })?;
    Ok(devices)
}

/// One filter of a dump; `None` if it is not a BPF filter, or stands for a whole priority.
fn filter(message: &[u8]) -> Result<Option<Filter>, DecodeError> {
    /// `TCA_KIND`, `TCA_OPTIONS`, `TCA_BPF_NAME`, and the length of struct tcmsg.
    const KIND: u16 = 1;
    const OPTIONS: u16 = 2;
    const NAME: u16 = 7;
    const HEADER: usize = 20;

    let header = TcHeader::parse(message)?;
    let attributes = message.get(HEADER..).ok_or_else(short)?;
    let kind = attribute(attributes, KIND)?;
    if kind.as_deref() != Some(b"bpf\0") {
        return Ok(None);
    }
    let Some(options) = attribute(attributes, OPTIONS)? else { return Ok(None) };
    let Some(name) = attribute(&options, NAME)? else { return Ok(None) };
    // The lower half is the protocol.
    let priority = u16::try_from(header.info >> 16).unwrap_or_default();
    Ok(Some(Filter { priority, handle: header.handle.into(), name: parse_string(&name)? }))
}

/// The value of the first attribute of a kind.
fn attribute(attributes: &[u8], kind: u16) -> Result<Option<Vec<u8>>, DecodeError> {
    for found in NlasIterator::new(attributes) {
        let found = found?;
        if found.kind() == kind {
            return Ok(Some(found.value().to_vec()));
        }
    }
    Ok(None)
}

fn short() -> DecodeError {
    DecodeError::from("a message shorter than its header")
}

/// Requests a list, and passes on the payload of each message of the answer.
fn dump(
    request: RouteNetlinkMessage,
    mut each: impl FnMut(&[u8]) -> Result<(), DecodeError>,
) -> io::Result<()> {
    /// The kernel fills up to 32 KiB at once (netlink_dump, net/netlink/af_netlink.c).
    const DATAGRAM: usize = 1 << 16;

    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An attribute, padded.
    fn attribute_of(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: &[u8], options: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 0, 0];
        for word in [7_u32, 0x494E_0001, 0xFFFF_FFF2, 9 << 16 | 0x0300] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(attribute_of(1, kind));
        bytes.extend(attribute_of(2, options));
        bytes
    }

    #[test]
    fn a_filter_is_parsed_to_priority_handle_and_name() {
        let options = [attribute_of(11, &[1, 0, 0, 0]), attribute_of(7, b"client_in\0")].concat();
        let expected = Filter { priority: 9, handle: 0x494E_0001, name: "client_in".to_owned() };
        assert_eq!(filter(&message(b"bpf\0", &options)).unwrap(), Some(expected));
        // Another classifier may use the same attribute numbers for anything.
        assert_eq!(filter(&message(b"flower\0", b"\x02\0\x07\0")).unwrap(), None);
        // The kernel lists each priority before its filters, without options.
        assert_eq!(filter(&message(b"bpf\0", &[])).unwrap(), None);
        assert!(filter(&[0; 19]).is_err());
    }
}
