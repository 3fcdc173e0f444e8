//! The testbed: network namespaces joined by veth, real mail servers, mail clients, and the
//! programs under test.
//!
//! The targets of `tests/suite` combine these modules; `xtask demo` uses [`netns`] as well. In
//! reading order: [`netns`] creates the three networks, [`mail_host`] starts [`postfix`] and
//! [`dovecot`] in one, [`receivers`] are other servers there, [`haproxy`] or the [`daemon`] under test runs in the next, and
//! [`mail_client`] sends and fetches [`message`]s in the last.

pub mod bpf;
pub mod bpffs;
pub mod certificate;
pub mod crowdsec;
pub mod daemon;
pub mod demo_backend;
pub mod documentation;
pub mod dovecot;
pub mod fail2ban;
pub mod forward;
pub mod group;
pub mod haproxy;
pub mod kube_proxy;
pub mod kubernetes_api;
pub mod log_file;
pub mod mail_client;
pub mod mail_host;
pub mod message;
pub mod metrics;
pub mod netns;
pub mod postfix;
pub mod process;
pub mod receivers;
pub mod resource_usage;
pub mod service;
pub mod sockets;
pub mod tools;
pub mod wait;
