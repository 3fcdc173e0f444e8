//! `[admin]`

use std::path::PathBuf;

use super::parse::section::Section;

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// The absolute path of the control socket, on which `injector status` and other commands
    /// connect.
    pub socket: PathBuf,
}

pub(super) fn read(section: Section<'_>) -> Option<Admin> {
    let socket = section.required("socket", |section, field| section.path(field));
    section.finish();
    Some(Admin { socket: socket? })
}
