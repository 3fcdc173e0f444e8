//! The filters of a device's ingress hook, read by rtnetlink(7).
//!
//! aya removes filters by name alone, and names are the same in every version. To replace one, its
//! priority and handle are needed.

use std::io;

use aya::programs::{
    Link as _, ProgramError, TcAttachType,
    tc::{SchedClassifierLink, TcHandle},
};
use rtnetlink::{
    packet_core::{DecodeError, parse_string, parse_u32},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcHandle as Parent, TcHeader, TcMessage},
    },
};

use super::{
    ProgramSet,
    netlink::{attribute, dump, short},
};

/// `ETH_P_ALL`, in network order.
pub(in crate::engine) const ALL: u16 = 3_u16.to_be();

/// A filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::engine) struct Filter {
    /// Lower ones run first.
    pub(in crate::engine) priority: u16,
    /// The protocol of its packets, in network order. All filters of a priority have the same.
    pub(in crate::engine) protocol: u16,
    /// Its number among those of its priority.
    pub(in crate::engine) handle: u32,
    /// Its classifier, for example `u32`.
    pub(in crate::engine) kind: String,
    /// The rest, of a BPF filter.
    pub(in crate::engine) bpf: Option<BpfFilter>,
}

/// What only BPF filters have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::engine) struct BpfFilter {
    /// The name that its owner gave it; aya gives it the program's name.
    pub(in crate::engine) name: String,
    /// The id of its program; 0 if the kernel does not say.
    pub(in crate::engine) program: u32,
}

impl Filter {
    /// Whether it is one of the set, of this version or another one with the same names.
    pub(in crate::engine) fn is_of(&self, set: &ProgramSet) -> bool {
        let ours = |bpf: &BpfFilter| set.programs.contains(&bpf.name.as_str());
        self.handle >> 16 == u32::from(set.handle) && self.bpf.as_ref().is_some_and(ours)
    }

    /// The filter as an aya link. Dropping the link removes the filter.
    pub(in crate::engine) fn link(
        &self,
        device: &str,
        direction: TcAttachType,
    ) -> io::Result<SchedClassifierLink> {
        SchedClassifierLink::attached(device, direction, self.priority, TcHandle::from(self.handle), None)
    }

    /// Removes it.
    pub(in crate::engine) fn remove(
        &self,
        device: &str,
        direction: TcAttachType,
    ) -> Result<(), ProgramError> {
        self.link(device, direction).map_err(ProgramError::IOError)?.detach()
    }
}

/// The filters of a device's first chain, in the order in which they run; none without a qdisc for
/// them.
pub(in crate::engine) fn list(index: u32, direction: TcAttachType) -> io::Result<Vec<Filter>> {
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
        // A kernel without classifiers may have tcx. Without a qdisc there are no filters.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => Ok(Vec::new()),
        asked => asked.map(|()| filters),
    }
}

/// One filter of a dump; `None` if the message stands for a whole priority, or the filter is in
/// another chain than the first, where it runs only if a filter of the first says so.
fn filter(message: &[u8]) -> Result<Option<Filter>, DecodeError> {
    /// `TCA_KIND`, `TCA_OPTIONS`, `TCA_CHAIN`, `TCA_BPF_NAME`, `TCA_BPF_ID`, and the length of
    /// struct tcmsg.
    const KIND: u16 = 1;
    const OPTIONS: u16 = 2;
    const CHAIN: u16 = 11;
    const NAME: u16 = 7;
    const ID: u16 = 11;
    const HEADER: usize = 20;

    let header = TcHeader::parse(message)?;
    let attributes = message.get(HEADER..).ok_or_else(short)?;
    let Some(kind) = attribute(attributes, KIND)? else { return Ok(None) };
    let kind = parse_string(&kind)?;
    let options = attribute(attributes, OPTIONS)?;
    let bpf = match (kind.as_str(), &options) {
        ("bpf", Some(options)) => {
            // One that was given as instructions has neither.
            let name = attribute(options, NAME)?.map_or(Ok(String::new()), |name| parse_string(&name))?;
            let program = attribute(options, ID)?.map_or(Ok(0), |id| parse_u32(&id))?;
            Some(BpfFilter { name, program })
        }
        _ => None,
    };
    let handle: u32 = header.handle.into();
    let chain = attribute(attributes, CHAIN)?.map_or(Ok(0), |chain| parse_u32(&chain))?;
    if chain != 0 || (handle == 0 && options.is_none()) {
        return Ok(None);
    }
    let half = |bits: u32| u16::try_from(bits & 0xFFFF).unwrap_or_default();
    let (priority, protocol) = (half(header.info >> 16), half(header.info));
    Ok(Some(Filter { priority, protocol, handle, kind, bpf }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::inline::SET;

    /// An attribute, padded.
    fn attribute_of(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(handle: u32, kind: &[u8], options: Option<&[u8]>) -> Vec<u8> {
        let mut bytes = vec![0, 0, 0, 0];
        for word in [7_u32, handle, 0xFFFF_FFF2, 9 << 16 | u32::from(ALL)] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(attribute_of(1, kind));
        bytes.extend(options.map(|options| attribute_of(2, options)).unwrap_or_default());
        bytes
    }

    #[test]
    fn a_filter_is_parsed_to_priority_handle_name_and_program() {
        let options = [attribute_of(11, &[5, 0, 0, 0]), attribute_of(7, b"inline\0")].concat();
        let parsed = filter(&message(0x494E_0001, b"bpf\0", Some(&options))).unwrap().unwrap();
        let bpf = BpfFilter { name: "inline".to_owned(), program: 5 };
        let expected = Filter {
            priority: 9,
            protocol: ALL,
            handle: 0x494E_0001,
            kind: "bpf".to_owned(),
            bpf: Some(bpf),
        };
        assert!(parsed == expected && parsed.is_of(&SET), "{parsed:?}");
        // Another program may have the same name.
        assert!(!filter(&message(1, b"bpf\0", Some(&options))).unwrap().unwrap().is_of(&SET));
        // Another classifier may use the same attribute numbers for anything.
        let other = filter(&message(0x8000_0800, b"flower\0", Some(b"\x02\0\x07\0"))).unwrap().unwrap();
        assert!(other.kind == "flower" && other.bpf.is_none() && !other.is_of(&SET));
        // The kernel lists each priority before its filters, without options.
        assert_eq!(filter(&message(0, b"bpf\0", None)).unwrap(), None);
        assert!(filter(&[0; 19]).is_err());
    }
}
