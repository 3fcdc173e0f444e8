//! The configuration with which runc runs the image like Kubernetes runs a container of the
//! DaemonSet.

use std::path::Path;

use serde_json::{Value, json};

use super::layout::CONFIG;

/// The container's user and capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Privileges {
    /// Root with only the DaemonSet's four capabilities. Kubernetes gives added capabilities only
    /// to root, because it does not support ambient capabilities.
    DaemonSet,
    /// The image's own user without capabilities, for engine "relay".
    Unprivileged,
}

/// The DaemonSet's `securityContext.capabilities.add`, all others dropped.
pub(super) const CAPABILITIES: [&str; 4] =
    ["CAP_BPF", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_PERFMON"];

/// The parts of a container other than the image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) privileges: Privileges,
    /// The network namespace, in place of the node's (`hostNetwork`).
    pub(super) network: &'a Path,
    /// The configuration's file on this machine.
    pub(super) config: &'a Path,
    /// A BPF file system to mount at `/sys/fs/bpf`.
    pub(super) bpffs: Option<&'a Path>,
    /// A seccomp profile of the kind that container engines ship.
    pub(super) seccomp: &'a Value,
}

/// The `config.json` of a bundle (OCI runtime specification 1.0.2), whose root is `rootfs`.
pub(super) fn config(parts: Parts<'_>) -> Value {
    let (id, capabilities): (u32, &[&str]) = match parts.privileges {
        Privileges::DaemonSet => (0, &CAPABILITIES),
        Privileges::Unprivileged => (65532, &[]),
    };
    let tmpfs = |place: &str, options: &[&str]| json!({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options});
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        tmpfs("/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
               "options": ["nosuid", "noexec", "nodev", "ro"]}),
        tmpfs("/run/injector", &["nosuid", "nodev", "noexec", "mode=0777", "size=1m"]),
        json!({"destination": CONFIG, "type": "bind", "source": parts.config, "options": ["bind", "ro"]}),
    ];
    mounts.extend(parts.bpffs.map(|source| {
        json!({"destination": "/sys/fs/bpf", "type": "bind", "source": source, "options": ["bind", "rw"]})
    }));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": id, "gid": id},
            "cwd": "/",
            "args": ["/usr/bin/injector", "run"],
            "env": [
                format!("INJECTOR_CONFIG={CONFIG}"), "INJECTOR_LOG_FORMAT=json", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
            ],
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                "inheritable": [], "ambient": []
            },
            // allowPrivilegeEscalation: false
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "node",
        "mounts": mounts,
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network", "path": parts.network}
            ],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "seccomp": seccomp(parts.seccomp, capabilities),
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// The rules of a container engine's profile that apply to these capabilities on this processor, in
/// the runtime specification's form.
///
/// Debian's file is Podman's of 2022. Newer engines allow bpf(2) to containers with CAP_BPF
/// (containerd, contrib/seccomp/seccomp_default.go), so that rule is added.
fn seccomp(profile: &Value, capabilities: &[&str]) -> Value {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let lists = |rule: &Value, key: &str, what: &str| -> Vec<String> {
        let list = rule[key][what].as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(|it| it.as_str().map(str::to_owned)).collect()
    };
    let has = |names: &[String]| names.iter().any(|name| capabilities.contains(&name.as_str()));
    let holds = |rule: &&Value| {
        let (caps, arches) = (lists(rule, "includes", "caps"), lists(rule, "includes", "arches"));
        let except = lists(rule, "excludes", "caps");
        (caps.is_empty() || has(&caps))
            && (arches.is_empty() || arches.iter().any(|it| it == arch))
            && !has(&except)
    };
    let rules = profile["syscalls"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut kept: Vec<_> = rules.iter().filter(holds).map(rule).collect();
    if capabilities.contains(&"CAP_BPF") {
        // A rule that refuses the same call would take precedence.
        for names in kept.iter_mut().filter_map(|rule| rule["names"].as_array_mut()) {
            names.retain(|name| name != "bpf");
        }
        kept.retain(|rule| rule["names"].as_array().is_some_and(|names| !names.is_empty()));
        kept.push(json!({"names": ["bpf"], "action": "SCMP_ACT_ALLOW"}));
    }
    let native = if arch == "arm64" { "SCMP_ARCH_AARCH64" } else { "SCMP_ARCH_X86_64" };
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [native],
        "syscalls": kept
    })
}

/// Only the runtime specification's fields, in which numbers that are zero have another meaning.
fn rule(from: &Value) -> Value {
    let mut rule = json!({"names": from["names"], "action": from["action"]});
    if let Some(args) = from["args"].as_array().filter(|args| !args.is_empty()) {
        rule["args"] = args.clone().into();
    }
    if from["errnoRet"].is_u64() {
        rule["errnoRet"] = from["errnoRet"].clone();
    }
    rule
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Value {
        json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {}, "excludes": {}},
                {"names": ["bpf", "mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["bpf", "mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                 "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["sync_file_range2"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["ppc64le"]}}
            ]
        })
    }

    fn verdict(seccomp: &Value, name: &str) -> Vec<String> {
        let rules = seccomp["syscalls"].as_array().unwrap();
        let named = rules.iter().filter(|rule| rule["names"].as_array().unwrap().iter().any(|it| it == name));
        named.map(|rule| rule["action"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn only_a_container_with_the_capability_may_load_programs() {
        let with = seccomp(&profile(), &CAPABILITIES);
        assert_eq!(verdict(&with, "bpf"), ["SCMP_ACT_ALLOW"]);
        assert_eq!(verdict(&with, "mount"), ["SCMP_ACT_ERRNO"]);
        assert_eq!(verdict(&seccomp(&profile(), &[]), "bpf"), ["SCMP_ACT_ERRNO"]);
        assert!(verdict(&with, "sync_file_range2").is_empty(), "for another processor");
        assert_eq!(verdict(&with, "read"), ["SCMP_ACT_ALLOW"]);
    }

    #[test]
    fn the_container_has_the_three_capabilities_and_no_more() {
        let profile = profile();
        let parts = Parts {
            privileges: Privileges::DaemonSet,
            network: Path::new("/run/netns/n"),
            config: Path::new("/c"),
            bpffs: None,
            seccomp: &profile,
        };
        let made = config(parts);
        for set in ["bounding", "effective", "permitted"] {
            assert_eq!(made["process"]["capabilities"][set], json!(CAPABILITIES), "{set}");
        }
        assert_eq!(made["process"]["noNewPrivileges"], true);
        assert_eq!(made["root"]["readonly"], true);
        let none = config(Parts { privileges: Privileges::Unprivileged, ..parts });
        assert_eq!(none["process"]["capabilities"]["bounding"], json!([]));
        assert_eq!(none["process"]["user"]["uid"], 65532);
    }
}
