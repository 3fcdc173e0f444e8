//! Checksums, with the devices' offloads on and off, observed on the backend's device.
//!
//! The links of [`crate::wire`] have no offloads; here it is veth, which forwards unfinished
//! checksums and large segments.

use std::fs::File;
use std::io::{self, Read as _};
use std::mem;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use etherparse::{SlicedPacket, TransportSlice};
use injector_testbed::netns::{Family, Netns};

use crate::Run;
use crate::tcp;
use crate::testbed::{Testbed, accept, expect, own_header};
use crate::wire::sums_are_right;
use crate::wire_testbed::through;

pub(crate) const TRIALS: &[(&str, Run)] = &[("all off, checksums compared", all_off)];

/// A namespace, and a device in it.
type End<'a> = (&'a Netns, &'static str);

/// A transfer in each direction; every segment that the backend's device receives or sends has
/// correct checksums.
fn all_off(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let topology = &testbed.topology;
    let _off = everywhere_off(testbed)?;
    let done = AtomicBool::new(false);
    let capture = topology.mail.run(|| Capture::new("eth0"))??;
    let counts = std::thread::scope(|scope| {
        let capturing = scope.spawn(|| capture.until(&done));
        let outcome = transfer(testbed, family);
        // Packets in flight.
        std::thread::sleep(Duration::from_millis(20));
        done.store(true, Ordering::Relaxed);
        let counts = capturing.join().map_err(|_| anyhow!("panicked"))??;
        outcome.map(|()| counts)
    })?;
    eprintln!("    {} segments, {} headers", counts.segments, counts.headers);
    ensure!(counts.segments > 1000 && counts.headers == 1, "{counts:?}");
    ensure!(counts.wrong.is_empty(), "wrong checksums: {}", counts.wrong.join("; "));
    Ok(())
}

/// More bytes than sequence numbers can count, segment by segment and with computed checksums.
pub(crate) fn five_gibibytes(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    let _off = everywhere_off(testbed)?;
    tcp::five_gibibytes(testbed, family)
}

/// Offloads are off on every device, until this is dropped.
fn everywhere_off(testbed: &Testbed) -> anyhow::Result<Vec<Offloads<'_>>> {
    let topology = &testbed.topology;
    let ends: [End<'_>; 4] = [
        (&topology.client, "eth0"),
        (&topology.edge, "outside"),
        (&topology.edge, "inside"),
        (&topology.mail, "eth0"),
    ];
    ends.map(Offloads::off).into_iter().collect()
}

fn transfer(testbed: &Testbed, family: Family) -> anyhow::Result<()> {
    const BYTES: usize = 2 << 20;
    let backend = testbed.backend(family)?;
    let _injector = testbed.injector("smtp", "")?;
    let mut client = testbed.client(family)?;
    let mut server = accept(&backend)?;
    own_header(&mut server, &client)?;
    io::Write::write_all(&mut server, b"220 hello")?;
    expect(&mut client, b"220 hello")?;
    through(&client, &server, BYTES, 0)?;
    through(&server, &client, BYTES, 0)
}

#[derive(Debug, Default)]
struct Counts {
    segments: u64,
    headers: u64,
    wrong: Vec<String>,
}

impl Counts {
    fn look_at(&mut self, frame: &[u8]) {
        let Ok(SlicedPacket { net: Some(ip), transport: Some(TransportSlice::Tcp(tcp)), .. }) =
            SlicedPacket::from_ethernet(frame)
        else {
            return;
        };
        self.segments += 1;
        self.headers += u64::from(tcp.payload().starts_with(b"\r\n\r\n\0\r\nQUIT\n"));
        if !sums_are_right(&ip, &tcp) {
            let (sequence, len) = (tcp.sequence_number(), tcp.payload().len());
            self.wrong.push(format!("{} seq {sequence} len {len}", tcp.source_port()));
        }
    }
}

/// All packets of a device (packet(7)).
struct Capture(File);

impl Capture {
    fn new(device: &str) -> anyhow::Result<Self> {
        let all = u16::try_from(libc::ETH_P_ALL)?.to_be();
        // SAFETY: takes no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                i32::from(all),
            )
        };
        ensure!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: just created, and owned by no other value.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        socket2::SockRef::from(&socket).set_recv_buffer_size(32 << 20)?;
        // SAFETY: plain integers, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_protocol = all;
        let name = std::ffi::CString::new(device)?;
        // SAFETY: a string that outlives the call.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) }.cast_signed();
        let len = libc::socklen_t::try_from(size_of_val(&address))?;
        // SAFETY: the address outlives the call, and has the length given.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        ensure!(result == 0, "packet socket on {device}: {}", io::Error::last_os_error());
        Ok(Self(File::from(socket)))
    }

    fn until(&self, done: &AtomicBool) -> anyhow::Result<Counts> {
        let mut counts = Counts::default();
        let mut frame = vec![0; 1 << 16];
        loop {
            let last = done.load(Ordering::Relaxed);
            match (&self.0).read(&mut frame) {
                Ok(len) => counts.look_at(&frame[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if last {
                        return Ok(counts);
                    }
                    std::thread::sleep(Duration::from_micros(500));
                }
                Err(error) => return Err(error).context("capturing"),
            }
        }
    }
}

/// Every offload of a device, as `ethtool --offload` has them (include/uapi/linux/ethtool.h): the
/// commands to get and to set it.
const OFFLOADS: [(u32, u32); 6] = [
    // Generic receive, generic send, TCP send, scatter-gather, checksums sent and received.
    (0x2b, 0x2c),
    (0x23, 0x24),
    (0x1e, 0x1f),
    (0x18, 0x19),
    (0x16, 0x17),
    (0x14, 0x15),
];

/// A device's previous offloads, restored on drop.
struct Offloads<'a> {
    end: End<'a>,
    before: Vec<u32>,
}

impl<'a> Offloads<'a> {
    fn off(end: End<'a>) -> anyhow::Result<Self> {
        let (netns, device) = end;
        let switch = || {
            let mut before = Vec::new();
            for (get, set) in OFFLOADS {
                before.push(ethtool(device, get, 0)?);
                ethtool(device, set, 0)?;
                let now = ethtool(device, get, 0)?;
                if now != 0 {
                    return Err(io::Error::other(format!("{set:#x} stays on")));
                }
            }
            io::Result::Ok(before)
        };
        let before = netns.run(switch)?.with_context(|| format!("offloads of {device}"))?;
        Ok(Self { end, before })
    }
}

impl Drop for Offloads<'_> {
    fn drop(&mut self) {
        let (netns, device) = self.end;
        let switch = || {
            // Checksums first: segmentation needs them.
            OFFLOADS
                .into_iter()
                .zip(&self.before)
                .rev()
                .try_for_each(|((_, set), before)| ethtool(device, set, *before).map(drop))
        };
        if let Err(error) = netns.run(switch).and_then(|done| Ok(done?)) {
            eprintln!("offloads of {device}: {error:#}");
        }
    }
}

/// One `SIOCETHTOOL` with a value, in this thread's namespace.
fn ethtool(device: &str, command: u32, value: u32) -> io::Result<u32> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    let mut argument = [command, value];
    // SAFETY: plain integers and bytes, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut argument).cast();
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    // SAFETY: the request and what it points to outlive the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(argument[1])
}
