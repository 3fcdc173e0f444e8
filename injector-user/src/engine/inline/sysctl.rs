//! Whether the kernel forwards between the interfaces that the inline engine uses, and which
//! sysctls to set if not.
//!
//! [`check`] only reads. Sysctls are set only if the operator has configured it
//! (`inline.set_sysctls = true`) and the caller calls [`set`].
//!
//! `/proc/sys/net` shows the network namespace of the thread that reads it.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Which traffic must be forwarded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// The interfaces on which packets of clients and backends arrive.
    pub interfaces: Vec<String>,
    /// Whether a service listens on IPv4.
    pub ipv4: bool,
    /// Whether a service listens on IPv6.
    pub ipv6: bool,
}

/// One value of `/proc/sys`. Displayed as the line for sysctl.conf(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// With slashes: `net/ipv4/conf/eth0/forwarding`.
    pub key: String,
    /// What it should be.
    pub value: u8,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Only with slashes can sysctl distinguish the dot in the name of a VLAN (eth0.100) from a
        // separator.
        let line = if self.key.contains('.') { self.key.clone() } else { self.key.replace('/', ".") };
        write!(f, "{line} = {}", self.value)
    }
}

/// A finding for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether connections work without the remedy.
    pub severity: Severity,
    /// What is wrong and its effect, without the remedy.
    pub what: String,
    /// The remedy: settings, in the order in which to set them.
    pub settings: Vec<Setting>,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// No connection works.
    Blocks,
    /// Some connections do not work, depending on routes that only the operator knows.
    MayBlock,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.settings.iter().map(ToString::to_string).collect();
        write!(f, "{}; set {}", self.what, lines.join(" and "))
    }
}

/// Why the settings could not be read.
#[derive(Debug, Error)]
pub enum CheckError {
    /// IPv6 is neither built in nor loaded, or it is disabled with `ipv6.disable=1`.
    #[error("a listener uses IPv6, but IPv6 is disabled in this kernel: {} does not exist", .0.display())]
    NoIpv6(PathBuf),
    /// Not readable, or not a number.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// As read(2).
        error: io::Error,
    },
}

/// A value that could not be set.
#[derive(Debug, Error)]
#[error("cannot set {setting}: {error}; set it on the host (in a container /proc/sys is often read-only)")]
pub struct SetError {
    /// The setting. Those before it have been set.
    pub setting: Setting,
    /// As write(2).
    pub error: io::Error,
}

/// The folder of the kernel's settings.
const ROOT: &str = "/proc/sys";

/// Reads the settings that decide whether packets get from one of the interfaces to another. An
/// interface that is gone has no findings.
///
/// # Errors
/// [`CheckError`].
pub fn check(paths: &Paths) -> Result<Vec<Finding>, CheckError> {
    check_in(Path::new(ROOT), paths)
}

/// Sets what findings of [`Severity::Blocks`] require, until the next boot, and returns what was
/// set. The other findings are a matter of judgement: setting them could weaken a protection that
/// the operator wants.
///
/// # Errors
/// [`SetError`] with the first that could not be set.
pub fn set(findings: &[Finding]) -> Result<Vec<Setting>, SetError> {
    set_in(Path::new(ROOT), findings)
}

fn check_in(root: &Path, paths: &Paths) -> Result<Vec<Finding>, CheckError> {
    let sysctls = Sysctls { root };
    let mut findings = Vec::new();
    if paths.ipv4 {
        findings.extend(sysctls.forwarding_ipv4(&paths.interfaces)?);
        for interface in &paths.interfaces {
            findings.extend(sysctls.reverse_path(interface)?);
        }
    }
    if paths.ipv6 {
        let all = "net/ipv6/conf/all/forwarding";
        if sysctls.read(all)?.is_none() {
            return Err(CheckError::NoIpv6(root.join(all)));
        }
        for interface in &paths.interfaces {
            findings.extend(sysctls.disabled_ipv6(interface)?);
        }
        findings.extend(sysctls.forwarding_ipv6(&paths.interfaces)?);
    }
    Ok(findings)
}

fn set_in(root: &Path, findings: &[Finding]) -> Result<Vec<Setting>, SetError> {
    let blocking = findings.iter().filter(|finding| finding.severity == Severity::Blocks);
    let settings: Vec<_> = blocking.flat_map(|finding| &finding.settings).cloned().collect();
    for setting in &settings {
        fs::write(root.join(&setting.key), setting.value.to_string())
            .map_err(|error| SetError { setting: setting.clone(), error })?;
    }
    Ok(settings)
}

struct Sysctls<'a> {
    root: &'a Path,
}

impl Sysctls<'_> {
    /// IPv4 checks only the interface on which a packet arrives (ip_route_input_slow,
    /// net/ipv4/route.c); `net.ipv4.ip_forward` only sets all of them at once.
    fn forwarding_ipv4(&self, interfaces: &[String]) -> Result<Option<Finding>, CheckError> {
        let settings =
            self.not_one(interfaces, |interface| format!("net/ipv4/conf/{interface}/forwarding"))?;
        let what = "IPv4 is not forwarded: what clients or backends send is dropped (net.ipv4.ip_forward = 1 would \
                    turn forwarding on for every interface of the host)";
        Ok(blocking(what, settings))
    }

    /// IPv6 checks the setting for all interfaces, and since Linux 6.17 also `force_forwarding` of
    /// the interface on which a packet arrives (ip6_forward, net/ipv6/ip6_output.c).
    fn forwarding_ipv6(&self, interfaces: &[String]) -> Result<Option<Finding>, CheckError> {
        if self.read("net/ipv6/conf/all/forwarding")?.is_some_and(|value| value != 0) {
            return Ok(None);
        }
        let forced = |interface: &str| format!("net/ipv6/conf/{interface}/force_forwarding");
        let what = "IPv6 is not forwarded: what clients or backends send is dropped";
        if self.read(&forced("all"))?.is_some() {
            return Ok(blocking(what, self.not_one(interfaces, forced)?));
        }
        let mut settings = self.router_advertisements()?;
        let all = Setting { key: "net/ipv6/conf/all/forwarding".to_owned(), value: 1 };
        settings.push(all);
        Ok(blocking(what, settings))
    }

    /// A host that forwards ignores router advertisements unless `accept_ra` is 2, and would lose a
    /// default route from one (Documentation/networking/ip-sysctl.rst).
    fn router_advertisements(&self) -> Result<Vec<Setting>, CheckError> {
        let folder = self.root.join("net/ipv6/conf");
        let unreadable = |error| CheckError::Read { path: folder.clone(), error };
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(unreadable)? {
            names.extend(entry.map_err(unreadable)?.file_name().into_string());
        }
        names.retain(|name| !matches!(name.as_str(), "all" | "default" | "lo"));
        names.sort();
        let mut settings = Vec::new();
        for name in names {
            let key = format!("net/ipv6/conf/{name}/accept_ra");
            if self.read(&key)? == Some(1) {
                settings.push(Setting { key, value: 2 });
            }
        }
        Ok(settings)
    }

    fn disabled_ipv6(&self, interface: &str) -> Result<Option<Finding>, CheckError> {
        let key = format!("net/ipv6/conf/{interface}/disable_ipv6");
        let disabled = self.read(&key)?.is_some_and(|value| value != 0);
        let settings = if disabled { vec![Setting { key, value: 0 }] } else { Vec::new() };
        Ok(blocking(&format!("{interface} has IPv6 turned off"), settings))
    }

    /// The kernel uses the larger of the interface's value and the one for all (IN_DEV_RPFILTER,
    /// include/linux/inetdevice.h).
    fn reverse_path(&self, interface: &str) -> Result<Option<Finding>, CheckError> {
        let key = format!("net/ipv4/conf/{interface}/rp_filter");
        let Some(own) = self.read(&key)? else { return Ok(None) };
        let all = self.read("net/ipv4/conf/all/rp_filter")?.unwrap_or_default();
        Ok((own.max(all) == 1).then(|| Finding {
            severity: Severity::MayBlock,
            what: format!(
                "{interface} drops packets from addresses that this host would answer by another interface (strict \
                 rp_filter): clients and backends whose routes differ by direction cannot connect"
            ),
            settings: vec![Setting { key, value: 2 }],
        }))
    }

    /// The settings to make, for each interface that has the setting and where it is not 1.
    fn not_one(
        &self,
        interfaces: &[String],
        key: impl Fn(&str) -> String,
    ) -> Result<Vec<Setting>, CheckError> {
        let mut settings = Vec::new();
        for key in interfaces.iter().map(|interface| key(interface)) {
            if self.read(&key)?.is_some_and(|value| value != 1) {
                settings.push(Setting { key, value: 1 });
            }
        }
        Ok(settings)
    }

    /// `None` if the setting or the interface does not exist.
    fn read(&self, key: &str) -> Result<Option<i64>, CheckError> {
        let path = self.root.join(key);
        let read = fs::read_to_string(&path).and_then(|text| {
            text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        });
        match read {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CheckError::Read { path, error }),
        }
    }
}

fn blocking(what: &str, settings: Vec<Setting>) -> Option<Finding> {
    let severity = Severity::Blocks;
    (!settings.is_empty()).then(|| Finding { severity, what: what.to_owned(), settings })
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// A tree like /proc/sys with correct settings, except for `changes`; an empty value removes
    /// one.
    fn tree(changes: &[(&str, &str)]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        let mut values = vec![];
        for interface in ["all", "default", "lo", "eth0", "eth1.7"] {
            values.push((format!("net/ipv4/conf/{interface}/forwarding"), "1\n"));
            values.push((format!("net/ipv4/conf/{interface}/rp_filter"), "0\n"));
            values.push((format!("net/ipv6/conf/{interface}/forwarding"), "1\n"));
            values.push((format!("net/ipv6/conf/{interface}/disable_ipv6"), "0\n"));
            values.push((format!("net/ipv6/conf/{interface}/accept_ra"), "1\n"));
        }
        values.extend(changes.iter().map(|&(key, value)| (key.to_owned(), value)));
        for (key, value) in values {
            let path = root.path().join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if value.is_empty() { fs::remove_file(path).unwrap() } else { fs::write(path, value).unwrap() }
        }
        root
    }

    fn paths() -> Paths {
        Paths { interfaces: ["eth0", "eth1.7"].map(str::to_owned).into(), ipv4: true, ipv6: true }
    }

    fn lines(root: &TempDir) -> Vec<(Severity, Vec<String>)> {
        let findings = check_in(root.path(), &paths()).unwrap();
        let lines = |finding: &Finding| finding.settings.iter().map(ToString::to_string).collect();
        findings.iter().map(|finding| (finding.severity, lines(finding))).collect()
    }

    /// The changes, and the one finding that they cause.
    type Case<'a> = (&'a [(&'a str, &'a str)], Severity, &'a [&'a str]);

    #[test]
    fn findings_carry_the_line_to_set() {
        use Severity::{Blocks, MayBlock};
        let force = [
            ("net/ipv6/conf/all/forwarding", "0"),
            ("net/ipv6/conf/all/force_forwarding", "0"),
            ("net/ipv6/conf/eth0/force_forwarding", "0"),
            ("net/ipv6/conf/eth1.7/force_forwarding", "1"),
        ];
        let cases: [Case<'_>; 6] = [
            (
                &[("net/ipv4/conf/eth0/forwarding", "0"), ("net/ipv4/conf/eth1.7/forwarding", "0")],
                Blocks,
                &["net.ipv4.conf.eth0.forwarding = 1", "net/ipv4/conf/eth1.7/forwarding = 1"],
            ),
            (
                &[("net/ipv4/conf/all/rp_filter", "1"), ("net/ipv4/conf/eth1.7/rp_filter", "2")],
                MayBlock,
                &["net.ipv4.conf.eth0.rp_filter = 2"],
            ),
            (&[("net/ipv4/conf/eth0/rp_filter", "1")], MayBlock, &["net.ipv4.conf.eth0.rp_filter = 2"]),
            (&[("net/ipv6/conf/eth0/disable_ipv6", "1")], Blocks, &["net.ipv6.conf.eth0.disable_ipv6 = 0"]),
            (
                &[("net/ipv6/conf/all/forwarding", "0"), ("net/ipv6/conf/eth1.7/accept_ra", "0")],
                Blocks,
                &["net.ipv6.conf.eth0.accept_ra = 2", "net.ipv6.conf.all.forwarding = 1"],
            ),
            (&force, Blocks, &["net.ipv6.conf.eth0.force_forwarding = 1"]),
        ];
        assert_eq!(lines(&tree(&[])), []);
        for (changes, severity, expected) in cases {
            assert_eq!(lines(&tree(changes)), [(severity, expected.iter().map(|&l| l.to_owned()).collect())]);
        }
    }

    #[test]
    fn only_blocking_settings_are_set_and_then_nothing_blocks() {
        let root = tree(&[
            ("net/ipv4/conf/eth0/forwarding", "0"),
            ("net/ipv4/conf/eth0/rp_filter", "1"),
            ("net/ipv6/conf/all/forwarding", "0"),
        ]);
        let findings = check_in(root.path(), &paths()).unwrap();
        let set = set_in(root.path(), &findings).unwrap();
        assert_eq!(set.len(), 4, "{set:?}");
        let left = check_in(root.path(), &paths()).unwrap();
        assert!(left.len() == 1 && left[0].severity == Severity::MayBlock, "{left:?}");
    }

    #[test]
    fn a_family_without_services_is_not_checked() {
        let root = tree(&[("net/ipv6/conf/all/forwarding", "0"), ("net/ipv4/conf/eth0/forwarding", "0")]);
        let neither = Paths { ipv4: false, ipv6: false, ..paths() };
        assert_eq!(check_in(root.path(), &neither).unwrap(), []);
    }

    #[test]
    fn missing_ipv6_is_an_error_and_a_missing_interface_is_not() {
        let root = tree(&[("net/ipv6/conf/all/forwarding", "")]);
        let error = check_in(root.path(), &paths()).unwrap_err();
        assert!(error.to_string().contains("IPv6 is disabled in this kernel"), "{error}");
        let gone = Paths { interfaces: vec!["eth9".to_owned()], ipv4: true, ipv6: false };
        assert_eq!(check_in(root.path(), &gone).unwrap(), []);
    }

    #[test]
    fn a_setting_that_cannot_be_set_is_named() {
        let root = tempfile::tempdir().unwrap();
        let setting = Setting { key: "net/ipv4/conf/eth0/forwarding".to_owned(), value: 1 };
        let findings = blocking("IPv4", vec![setting]);
        let error = set_in(root.path(), findings.as_slice()).unwrap_err().to_string();
        assert!(error.contains("cannot set net.ipv4.conf.eth0.forwarding = 1: "), "{error}");
    }
}
