//! Lists of addresses and networks to which Services of Kubernetes add more.

use std::fmt;

use super::{
    parse::section::{Entry, Section, Spanned},
    service::ServiceRef,
};

/// What the file lists, and the Services that have more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WithServices<T> {
    /// As written.
    pub listed: Vec<T>,
    /// Distinct.
    pub services: Vec<ServiceRef>,
}

impl<T> Default for WithServices<T> {
    fn default() -> Self {
        Self { listed: Vec::new(), services: Vec::new() }
    }
}

impl<T> WithServices<T> {
    /// Whether there is neither.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty() && self.services.is_empty()
    }
}

impl<T: fmt::Display> fmt::Display for WithServices<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed = self.listed.iter().map(ToString::to_string);
        let services = self.services.iter().map(|service| format!("those of service {service}"));
        f.write_str(&listed.chain(services).collect::<Vec<_>>().join(", "))
    }
}

/// Reads a list of strings and of tables with `service`: the strings, and the Services. Each invalid
/// Service is reported.
pub(super) fn read<'t>(
    section: &Section<'t>,
    field: &'static str,
) -> (Vec<Spanned<&'t str>>, Vec<ServiceRef>) {
    let (mut texts, mut services) = (Vec::new(), Vec::new());
    for entry in section.entries(field).unwrap_or_default() {
        let table = match entry {
            Entry::Text(text) => {
                texts.push(text);
                continue;
            }
            Entry::Table(table) => table,
        };
        if let Some((at, text)) = table.required("service", |table, field| table.string(field)) {
            match text.parse::<ServiceRef>() {
                Ok(service) if services.contains(&service) => {
                    table.report_field(at, "service", &format!(" {text:?}: is there twice"));
                }
                Ok(service) => services.push(service),
                Err(advice) => table.report_field(at, "service", &format!(" {text:?}: {advice}")),
            }
        }
        table.finish();
    }
    (texts, services)
}
