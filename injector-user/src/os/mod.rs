//! The operating system: system calls, capabilities, systemd. The daemon's `unsafe` code is here.

pub mod allocator;
#[cfg(feature = "bpf")]
pub mod bpf;
#[cfg(feature = "bpf")]
pub mod bpffs;
pub mod capabilities;
pub mod clock;
pub mod epoll;
pub mod gateways;
pub mod landlock;
pub mod listening;
#[cfg(feature = "bpf")]
pub mod mmap;
pub mod poll;
pub mod rlimit;
pub mod sockopt;
#[cfg(feature = "bpf")]
pub mod sysctl;
pub mod systemd;
#[cfg(feature = "bpf")]
pub mod tcp_reset;

/// Both ends of a TCP connection over loopback.
#[cfg(test)]
pub(crate) fn tcp_pair() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}
