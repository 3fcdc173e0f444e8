//! What an operator has to do where setup cannot install.

use std::fmt::Write as _;

use super::{apt, missing::Missing, packages};

pub(super) fn package_names(missing: &[Missing]) -> Vec<String> {
    let name = |it: &Missing| match it {
        Missing::Package { name, .. } => Some(name.clone()),
        _ => None,
    };
    missing.iter().filter_map(name).collect()
}

/// Why nothing can be installed here, with what the operator has to do; none if setup can go on by
/// itself.
pub(super) fn refusal(missing: &[Missing]) -> Option<String> {
    let by_hand = missing.iter().find_map(|it| match it {
        Missing::LinkerByHand { llvm } => Some(*llvm),
        _ => None,
    });
    if let Some(llvm) = by_hand {
        return Some(linker_by_hand(llvm));
    }
    let packages = package_names(missing);
    if packages.is_empty() || apt::is_here() && apt::may_install() {
        return None;
    }
    Some(packages_by_hand(&packages, apt::is_here()))
}

/// What an operator does who has to install packages himself.
fn packages_by_hand(packages: &[String], debian: bool) -> String {
    let mut text = String::new();
    if debian {
        text.push_str("what is missing has to be installed by root, so nothing was changed. Run\n\n");
        for command in packages::commands(packages, true) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "    {command}");
        }
    } else {
        text.push_str("this is no Debian-like system, so nothing was changed. Install what these Debian packages hold:\n\n");
        let _ = writeln!(text, "    {}", packages.join(" "));
    }
    text.push_str("\nand then `cargo xtask setup` again; it does the rest without root");
    text
}

fn linker_by_hand(llvm: u32) -> String {
    format!(
        "bpf-linker is missing, and so is an LLVM {llvm} to build it with. Either\n\n    \
         cargo binstall bpf-linker\n\nor any other way to have a released bpf-linker in PATH, or\n\n    \
         LLVM_PREFIX=/where/llvm-{llvm}/is cargo xtask setup"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_install_gets_the_commands() {
        let text = packages_by_hand(&["postfix".into(), "swaks".into()], true);
        for command in packages::commands(&["postfix".into(), "swaks".into()], true) {
            assert!(text.contains(&format!("\n    {command}\n")), "{text}");
        }
        let elsewhere = packages_by_hand(&["swaks".into()], false);
        assert!(elsewhere.contains("    swaks\n") && !elsewhere.contains("apt-get"), "{elsewhere}");
    }

    #[test]
    fn without_packages_there_is_nothing_to_refuse() {
        assert_eq!(refusal(&[Missing::Link { name: "bpf" }, Missing::Linker { llvm: 22 }]), None);
        assert!(refusal(&[Missing::LinkerByHand { llvm: 24 }]).unwrap().contains("LLVM 24"));
    }
}
