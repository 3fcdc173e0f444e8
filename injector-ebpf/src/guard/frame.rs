//! Reading packets, alike at the ingress of a device and at its driver.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::bpf_skb_pull_data,
    programs::{TcContext, XdpContext},
};

/// Where a TCP header has the destination's port.
const PORT: usize = 2;

/// A packet.
pub(super) trait Frame {
    /// Whether all bytes of it can be read, wherever they are. If not, another program decides.
    const READS_ALL: bool;

    /// Where its first bytes are.
    fn bounds(&self) -> (usize, usize);

    /// Brings so many bytes of it together; `false` if it is shorter, or that cannot be done.
    fn pull(&self, len: usize) -> bool;

    /// Reads bytes at any place.
    fn load<T>(&self, at: usize) -> Option<T>;

    /// The port in the TCP header `at` bytes behind the start of the IP header, in network order. Without options, the IP header has
    /// `LEN` bytes.
    fn port<const IP: usize, const LEN: usize>(&self, at: usize) -> Option<u16>;

    /// Its device.
    fn device(&self) -> u32;

    /// For helpers.
    fn context(&self) -> *mut c_void;
}

impl Frame for TcContext {
    const READS_ALL: bool = true;

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn pull(&self, len: usize) -> bool {
        // SAFETY: the program's own context.
        unsafe { bpf_skb_pull_data(self.as_ptr().cast(), len as u32) == 0 }
    }

    #[inline(always)]
    fn load<T>(&self, at: usize) -> Option<T> {
        Self::load(self, at).ok()
    }

    #[inline(always)]
    fn port<const IP: usize, const LEN: usize>(&self, at: usize) -> Option<u16> {
        near_port::<_, IP, LEN>(self, at).or_else(|| Self::load(self, IP + at + PORT).ok())
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        // SAFETY: the program's own context.
        unsafe { (*self.skb.skb).ingress_ifindex }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }
}

impl Frame for XdpContext {
    const READS_ALL: bool = false;

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn pull(&self, _len: usize) -> bool {
        false
    }

    #[inline(always)]
    fn load<T>(&self, _at: usize) -> Option<T> {
        None
    }

    #[inline(always)]
    fn port<const IP: usize, const LEN: usize>(&self, at: usize) -> Option<u16> {
        near_port::<_, IP, LEN>(self, at)
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        self.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr()
    }
}

/// The port right behind an IP header without options, where nearly all packets have it. At one constant offset: the verifier allows no
/// other to a loader without CAP_PERFMON, and LLVM makes a variable one of two.
#[inline(always)]
fn near_port<F: Frame, const IP: usize, const LEN: usize>(frame: &F, at: usize) -> Option<u16> {
    if at == LEN { half(frame, IP + LEN + PORT) } else { None }
}

/// Two bytes of the frame, at a constant offset.
#[inline(always)]
pub(super) fn half<F: Frame>(frame: &F, at: usize) -> Option<u16> {
    let (start, end) = frame.bounds();
    if start + at + 2 > end {
        return None;
    }
    // SAFETY: within the frame. Two bytes lie on an even address in every packet.
    Some(unsafe { ((start + at) as *const u16).read() })
}

/// Four bytes of a packet. Two lie on an even address in every packet, four need not.
#[repr(C, align(2))]
#[derive(Clone, Copy)]
struct Word([u8; 4]);

/// The first words of the IP header, which begins at `IP`, in network order.
#[inline(always)]
pub(super) fn words<F: Frame, const IP: usize, const COUNT: usize>(frame: &F) -> Option<[u32; COUNT]> {
    let (mut start, mut end) = frame.bounds();
    if start + IP + COUNT * 4 > end {
        if !frame.pull(IP + COUNT * 4) {
            return None;
        }
        (start, end) = frame.bounds();
        if start + IP + COUNT * 4 > end {
            return None;
        }
    }
    let front = (start + IP) as *const Word;
    // SAFETY: within what was checked.
    Some(core::array::from_fn(|index| u32::from_ne_bytes(unsafe { front.add(index).read() }.0)))
}
