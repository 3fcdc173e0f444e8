//! `[inline]`

use std::{path::PathBuf, time::Duration};

use super::parse::section::{Section, Zero};

/// `[inline]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inline {
    /// Whether the file has the table. The operator then knows that this host forwards packets.
    pub present: bool,
    /// Who translates addresses.
    pub nat: Nat,
    /// Managed NAT: replace the client's address with the host's, so that replies pass this host.
    pub masquerade: bool,
    /// Managed NAT: the name of the nftables table.
    pub table: String,
    /// The directory in a BPF file system for the pins that outlive the daemon.
    pub pin: PathBuf,
    /// The capacity of the flow table. As many connections again can be in the handshake.
    pub flows: u32,
    /// Idle time after which a flow is forgotten.
    pub idle: Duration,
    /// Devices on which clients arrive. Empty: all that are up.
    pub client_devices: Vec<String>,
    /// Devices that lead to backends. Empty: those of the routes to the backends.
    pub backend_devices: Vec<String>,
    /// How programs are attached.
    pub attachment: Attachment,
    /// Enable forwarding where it is off. Otherwise the daemon only reports it.
    pub set_sysctls: bool,
}

impl Default for Inline {
    fn default() -> Self {
        Self {
            present: false,
            nat: Nat::default(),
            masquerade: true,
            table: "injector".to_owned(),
            pin: PathBuf::from("/sys/fs/bpf/injector"),
            flows: 65_536,
            idle: Duration::from_secs(24 * 60 * 60),
            client_devices: Vec::new(),
            backend_devices: Vec::new(),
            attachment: Attachment::default(),
            set_sysctls: false,
        }
    }
}

/// Who translates addresses for the inline engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nat {
    /// The daemon, with an nftables table of its own.
    #[default]
    Managed,
    /// Another program: kube-proxy, Docker, rules of the host.
    External,
}

impl Nat {
    const CHOICES: [(&'static str, Self); 2] = [("managed", Self::Managed), ("external", Self::External)];
}

/// How the inline engine's programs are attached to a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attachment {
    /// tcx if the kernel has it (Linux 6.6), otherwise clsact.
    #[default]
    Auto,
    /// As pinned tcx links.
    Tcx,
    /// As filters of the clsact qdisc.
    Clsact,
}

impl Attachment {
    const CHOICES: [(&'static str, Self); 3] =
        [("auto", Self::Auto), ("tcx", Self::Tcx), ("clsact", Self::Clsact)];
}

pub(super) fn read(section: Section<'_>) -> Inline {
    let mut inline = Inline { present: true, ..Inline::default() };
    inline.nat = section.choice("nat", &Nat::CHOICES).unwrap_or(inline.nat);
    inline.masquerade = section.flag("masquerade").map_or(inline.masquerade, |(_, flag)| flag);
    inline.set_sysctls = section.flag("set_sysctls").map_or(inline.set_sysctls, |(_, flag)| flag);
    inline.attachment = section.choice("attachment", &Attachment::CHOICES).unwrap_or(inline.attachment);
    if let Some((at, table)) = section.string("table") {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if (1..=63).contains(&table.len()) && table.bytes().all(fits) {
            table.clone_into(&mut inline.table);
        } else {
            section.report_field(
                at,
                "table",
                &format!(" {table:?}: must be 1 to 63 of A-Z, a-z, 0-9, _ and -"),
            );
        }
    }
    if let Some(pin) = section.path("pin") {
        inline.pin = pin;
    }
    if let Some((_, flows)) = section.integer("flows", 16, 1 << 24) {
        inline.flows = u32::try_from(flows).unwrap_or(inline.flows);
    }
    inline.idle = section.duration("idle", Zero::Rejected).map_or(inline.idle, |(_, idle)| idle);
    for (field, devices) in
        [("client_devices", &mut inline.client_devices), ("backend_devices", &mut inline.backend_devices)]
    {
        for (_, device) in section.strings(field).unwrap_or_default() {
            devices.push(device.to_owned());
        }
    }
    section.finish();
    inline
}
