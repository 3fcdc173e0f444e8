//! Which process listens at an address.

use std::{
    collections::HashSet,
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name: the program's, up to 15 characters.
    pub name: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// The process that listens at `address`, or at its port of all addresses, in this thread's network
/// namespace. `None` if there is none, or if it may not be looked at.
#[must_use]
pub fn process_at(address: SocketAddr) -> Option<Process> {
    let mut inodes = HashSet::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        let sockets = text.lines().skip(1).filter_map(parse_listening);
        inodes.extend(sockets.filter(|(bound, _)| covers(*bound, address)).map(|(_, inode)| inode));
    }
    if inodes.is_empty() {
        return None;
    }
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| has_socket(*pid, &inodes)).find_map(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
        Some(Process { pid, name })
    })
}

/// Whether a socket bound to `bound` keeps others from `wanted`.
fn covers(bound: SocketAddr, wanted: SocketAddr) -> bool {
    let (ip, other) = (bound.ip().to_canonical(), wanted.ip().to_canonical());
    let any = ip.is_unspecified() || other.is_unspecified();
    bound.port() == wanted.port() && (ip == other || any && (ip.is_ipv4() == other.is_ipv4() || ip.is_ipv6()))
}

/// Whether the process has one of these sockets.
fn has_socket(pid: u32, inodes: &HashSet<u64>) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        let Ok(link) = fs::read_link(descriptor.path()) else { return false };
        let inode =
            link.to_str().and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        inode.is_some_and(|inode| inodes.contains(&inode))
    })
}

/// Address and inode of a listening socket (state 0A), of a line of `/proc/net/tcp` or `tcp6`. The
/// kernel prints addresses as 32-bit words in host order (get_tcp4_sock, net/ipv4/tcp_ipv4.c).
fn parse_listening(line: &str) -> Option<(SocketAddr, u64)> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let [_, local, _, "0A", _, _, _, _, _, inode, ..] = fields[..] else { return None };
    let (address, port) = local.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = if address.len() == 8 {
        IpAddr::V4(Ipv4Addr::from(word(0)?))
    } else {
        let mut octets = [0; 16];
        for (index, chunk) in octets.chunks_exact_mut(4).enumerate() {
            chunk.copy_from_slice(&word(index * 8)?);
        }
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    Some((SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?), inode.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_listening_process_is_found() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let address = listener.local_addr().unwrap();
            let found = process_at(address).unwrap();
            assert_eq!(found.pid, std::process::id(), "{address}");
            assert!(!found.name.is_empty());
            drop(listener);
            assert_eq!(process_at(address), None, "{address}");
        }
    }

    #[test]
    fn a_wildcard_covers_every_address_of_its_port() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (bound, wanted, expected) in [
            ("127.0.0.1:25", "127.0.0.1:25", true),
            ("127.0.0.1:25", "127.0.0.1:26", false),
            ("127.0.0.1:25", "127.0.0.2:25", false),
            ("0.0.0.0:25", "192.0.2.1:25", true),
            ("[::]:25", "192.0.2.1:25", true),
            ("[::]:25", "[2001:db8::1]:25", true),
            ("192.0.2.1:25", "0.0.0.0:25", true),
            ("0.0.0.0:25", "[2001:db8::1]:25", false),
            ("[::ffff:192.0.2.1]:25", "192.0.2.1:25", true),
        ] {
            assert_eq!(covers(address(bound), address(wanted)), expected, "{bound} {wanted}");
        }
    }

    #[test]
    fn lines_of_both_tables_are_read() {
        let line = "   0: 0100007F:2382 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0";
        let found = parse_listening(line).unwrap();
        assert_eq!((found.0.port(), found.1), (0x2382, 4711));
        assert_eq!(parse_listening(&line.replace(" 0A ", " 01 ")), None);
        assert_eq!(parse_listening("  sl  local_address rem_address   st"), None);
    }
}
