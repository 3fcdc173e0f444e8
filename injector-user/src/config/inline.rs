//! `[inline]`

use std::{path::PathBuf, time::Duration};

use super::parse::section::{Section, Zero};

/// `[inline]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inline {
    /// Whether the file has the table: the operator knows that this host forwards.
    pub present: bool,
    /// Who translates addresses.
    pub nat: Nat,
    /// Managed NAT: the backend sees the host's address as its peer's, so that it answers by this host.
    pub masquerade: bool,
    /// Managed NAT: the name of the nftables table.
    pub table: String,
    /// Folder in a BPF file system for what outlives the daemon.
    pub pin: PathBuf,
    /// Connections that there is room for; as many again that are being opened.
    pub flows: u32,
    /// Silence after which a connection is taken for dead and forgotten.
    pub idle: Duration,
    /// Devices that clients come by; empty: all that are up.
    pub client_devices: Vec<String>,
    /// Devices that lead to backends; empty: those that the routes name.
    pub backend_devices: Vec<String>,
    /// How programs are attached.
    pub attachment: Attachment,
    /// Switch forwarding on where it is off, in place of saying so.
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
    /// The daemon, by a table of its own in nftables.
    #[default]
    Managed,
    /// Somebody else: kube-proxy, Docker, rules of the host.
    External,
}

impl Nat {
    const CHOICES: [(&'static str, Self); 2] = [("managed", Self::Managed), ("external", Self::External)];
}

/// How the inline engine's programs hang on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attachment {
    /// tcx where the kernel has it (Linux 6.6), clsact otherwise.
    #[default]
    Auto,
    /// By links, which are pinned.
    Tcx,
    /// By filters of the clsact qdisc.
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
