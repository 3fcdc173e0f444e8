//! Explains what an operator must do where setup cannot install.

use std::fmt::Write as _;

use super::{apt, missing::Missing, packages};

pub(super) fn package_names(missing: &[Missing]) -> Vec<String> {
    let name = |it: &Missing| match it {
        Missing::Package { name, .. } => Some(name.clone()),
        _ => None,
    };
    missing.iter().filter_map(name).collect()
}

/// Why setup cannot install here, and what the operator must do; `None` if setup can install.
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

/// The commands for an operator who must install packages by hand.
fn packages_by_hand(packages: &[String], debian: bool) -> String {
    let mut text = String::new();
    if debian {
        text.push_str("root must install the missing packages; nothing was changed. Run\n\n");
        for command in packages::commands(packages, true) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "    {command}");
        }
    } else {
        text.push_str("this system does not use Debian packages; nothing was changed. Install the contents of these:\n\n");
        let _ = writeln!(text, "    {}", packages.join(" "));
    }
    text.push_str("\nand then run `cargo xtask setup` again; the rest needs no root");
    text
}

fn linker_by_hand(llvm: u32) -> String {
    format!(
        "bpf-linker is missing, and so is LLVM {llvm} to build it with. Use one of\n\n    \
         cargo binstall bpf-linker\n\nor any other way to have a released bpf-linker in PATH, or\n\n    \
         LLVM_PREFIX=/where/llvm-{llvm}/is cargo xtask setup"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_root_the_commands_are_printed() {
        let text = packages_by_hand(&["postfix".into(), "swaks".into()], true);
        for command in packages::commands(&["postfix".into(), "swaks".into()], true) {
            assert!(text.contains(&format!("\n    {command}\n")), "{text}");
        }
        let elsewhere = packages_by_hand(&["swaks".into()], false);
        assert!(elsewhere.contains("    swaks\n") && !elsewhere.contains("apt-get"), "{elsewhere}");
    }

    #[test]
    fn without_packages_setup_can_install() {
        assert_eq!(refusal(&[Missing::Link { name: "bpf" }, Missing::Linker { llvm: 22 }]), None);
        assert!(refusal(&[Missing::LinkerByHand { llvm: 24 }]).unwrap().contains("LLVM 24"));
    }
}
