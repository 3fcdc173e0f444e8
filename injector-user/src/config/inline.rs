//! `[inline]`

use std::{net::IpAddr, path::PathBuf};

use toml::de::DeValue;

use super::{
    network::{self, Network},
    parse::section::{Section, Spanned},
    source_addresses::{self, Loopback},
    with_services::{self, WithServices},
};

/// `[inline]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inline {
    /// The source address of connections to backends.
    pub source: Source,
    /// With [`Source::Edge`]: the source addresses of those connections. Empty: the address that the
    /// route to the backend prefers.
    pub source_addresses: Vec<IpAddr>,
    /// Devices on which clients and backends are. Empty: all that are up.
    pub devices: Vec<String>,
    /// How many connections there is room for.
    pub flows: u32,
    /// The directory in a BPF file system for the pins that outlive the daemon.
    pub pin: PathBuf,
    /// How programs are attached.
    pub attachment: Attachment,
    /// Networks of other edges and injectors, whose connections to the backends pass this host. Services
    /// add the addresses of their endpoints.
    pub peers: WithServices<Network>,
}

impl Default for Inline {
    fn default() -> Self {
        Self {
            source: Source::default(),
            source_addresses: Vec::new(),
            devices: Vec::new(),
            flows: 65_536,
            pin: PathBuf::from("/sys/fs/bpf/injector"),
            attachment: Attachment::default(),
            peers: WithServices::default(),
        }
    }
}

/// The source address of connections to backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// An address of this host, so that replies pass it.
    #[default]
    Edge,
    /// The client's. The replies must be routed through this host.
    Client,
}

impl Source {
    const CHOICES: [(&'static str, Self); 2] = [("edge", Self::Edge), ("client", Self::Client)];
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
    let mut inline = Inline::default();
    refuse_former_fields(&section);
    inline.source = section.choice("source", &Source::CHOICES).unwrap_or_default();
    inline.attachment = section.choice("attachment", &Attachment::CHOICES).unwrap_or_default();
    if let Some(addresses) = section.strings("source_addresses") {
        inline.source_addresses = source_addresses(&section, inline.source, &addresses);
    }
    inline.devices = device_names(&section);
    inline.peers = peers(&section);
    if let Some(pin) = section.path("pin") {
        inline.pin = pin;
    }
    if let Some((_, flows)) = section.integer("flows", 16, 1 << 22) {
        inline.flows = u32::try_from(flows).unwrap_or(inline.flows);
    }
    section.finish();
    inline
}

/// Refuses the fields of earlier versions, each with what replaces it.
fn refuse_former_fields(section: &Section<'_>) {
    let mut devices = Vec::new();
    for field in ["client_devices", "backend_devices"] {
        let names = section.former(field).and_then(|(_, names)| names.as_array()).into_iter();
        devices.extend(names.flat_map(|names| names.iter()).filter_map(|name| name.get_ref().as_str()));
    }
    let client = "write source = \"client\"";
    let advice = |field: &str, value: &DeValue<'_>| {
        match (field, value.as_bool(), value.as_str()) {
        ("nat", _, Some("external")) => {
            "is gone: engine \"inline\" translates addresses itself, before rules of others see the packet. Remove \
             this line and the rules that led to the backends' PROXY ports"
                .to_owned()
        }
        ("nat", ..) => {
            "is gone: engine \"inline\" translates addresses itself, without nftables. Remove this line".to_owned()
        }
        ("table", ..) => {
            let table = value.as_str().unwrap_or("injector");
            format!(
                "is gone: engine \"inline\" needs no nftables. Remove this line, and the table that an earlier \
                 version may have left: nft delete table inet {table}"
            )
        }
        ("masquerade", Some(false), _) => format!("is replaced: {client} in place of this line"),
        ("masquerade", ..) => {
            "is replaced: write source = \"edge\", the default, in place of this line".to_owned()
        }
        ("client_devices" | "backend_devices", ..) => {
            format!("is replaced: write devices = {devices:?} in place of client_devices and backend_devices")
        }
        ("set_sysctls", ..) => {
            "is gone: engine \"inline\" needs no forwarding by the host. Remove this line, and turn forwarding off \
             again if nothing else needs it"
                .to_owned()
        }
        _ => {
            let idle = value.as_str().unwrap_or("5m");
            format!(
                "is gone: the timeouts of the listener end its connections with every engine. Remove this line; if the \
                 default does not do, write idle = {idle:?} in [listener.timeouts]"
            )
        }
    }
    };
    for field in ["nat", "table", "masquerade", "client_devices", "backend_devices", "set_sysctls", "idle"] {
        if let Some((at, value)) = section.former(field) {
            section.report_field(at, field, &format!(" {}", advice(field, value)));
        }
    }
}

fn source_addresses(section: &Section<'_>, source: Source, texts: &[Spanned<&str>]) -> Vec<IpAddr> {
    if source == Source::Client
        && let Some((at, _)) = texts.first()
    {
        section.report_field(
            *at,
            source_addresses::FIELD,
            ": source = \"client\" keeps the client's address: remove one of the two",
        );
    }
    source_addresses::read(section, texts, Loopback::Refused)
}

fn peers(section: &Section<'_>) -> WithServices<Network> {
    const FIELD: &str = "peers";
    let (texts, services) = with_services::read(section, FIELD);
    let networks = network::parse(section, FIELD, texts);
    WithServices { listed: networks.into_iter().map(|(_, network)| network).collect(), services }
}

/// The field `devices`.
pub(super) fn device_names(section: &Section<'_>) -> Vec<String> {
    let mut devices = Vec::new();
    for (at, text) in section.strings("devices").unwrap_or_default() {
        if is_device_name(text) {
            devices.push(text.to_owned());
        } else {
            section.report_field(
                at,
                "devices",
                &format!(" {text:?}: must be the name of a device, such as \"eth0\""),
            );
        }
    }
    devices
}

/// The kernel's rule (dev_valid_name, net/core/dev.c).
fn is_device_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_ascii_whitespace())
}
