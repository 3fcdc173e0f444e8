//! Services of Kubernetes, as `"namespace/name"`.

use std::{fmt, str::FromStr};

/// The longest label of a name (RFC 1123, section 2.1).
const MAX_LABEL: usize = 63;

/// A Service of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceRef {
    namespace: String,
    name: String,
}

impl ServiceRef {
    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its name in the namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for ServiceRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "must be the namespace and the name of a Service, such as \"mail/mailserver\"";
        let Some((namespace, name)) = text.split_once('/') else {
            return Err(match text.split('.').collect::<Vec<_>>()[..] {
                // As cluster DNS names it: mailserver.mail.svc.cluster.local
                [name, namespace, "svc", ..] if is_label(name) && is_label(namespace) => {
                    format!("write \"{namespace}/{name}\"")
                }
                [name] if is_label(name) => {
                    format!("the namespace is missing: write \"NAMESPACE/{name}\"")
                }
                _ => EXPECTED.to_owned(),
            });
        };
        for (part, what) in [(namespace, "namespace"), (name, "Service")] {
            if !is_label(part) {
                return Err(format!(
                    "{part:?} is not the name of a {what}: 1 to {MAX_LABEL} of a-z, 0-9 and -, with no - at \
                     either end"
                ));
            }
        }
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The port of a Service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServicePort {
    /// The name that the Service gives it. The number may differ from one endpoint to the next.
    Name(String),
    /// The number at the endpoints, whatever ports the Service has. Never 0.
    Number(u16),
}

impl FromStr for ServicePort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if is_label(text) && text.bytes().any(|byte| byte.is_ascii_lowercase()) {
            return Ok(Self::Name(text.to_owned()));
        }
        Err(match text.parse::<u16>() {
            Ok(number @ 1..) => format!("a number is written without quotation marks: {number}"),
            _ => format!(
                "must be the name of the Service's port (1 to {MAX_LABEL} of a-z, 0-9 and -, with a letter), or \
                 a number"
            ),
        })
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Number(number) => number.fmt(f),
        }
    }
}

/// Whether the text is a label of RFC 1123, as Kubernetes wants names of namespaces, Services and
/// ports (`k8s.io/apimachinery`, `IsDNS1123Label`).
fn is_label(text: &str) -> bool {
    (1..=MAX_LABEL).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_a_namespace_and_a_name() {
        let long = "a".repeat(MAX_LABEL);
        let longest = format!("{long}/{long}");
        let too_long = format!("mail/{long}a");
        for (text, expected) in [
            ("mailserver/mailserver-proxy", Ok(("mailserver", "mailserver-proxy"))),
            ("0/9", Ok(("0", "9"))),
            (longest.as_str(), Ok((long.as_str(), long.as_str()))),
            ("mailserver", Err("the namespace is missing: write \"NAMESPACE/mailserver\"")),
            ("mx.mail.svc.cluster.local", Err("write \"mail/mx\"")),
            ("mx.mail.svc", Err("write \"mail/mx\"")),
            ("mail.internal:25", Err("must be the namespace and the name of a Service")),
            ("", Err("must be the namespace and the name of a Service")),
            ("/mx", Err("\"\" is not the name of a namespace")),
            ("mail/", Err("\"\" is not the name of a Service")),
            ("mail/mx/25", Err("\"mx/25\" is not the name of a Service")),
            ("Mail/mx", Err("\"Mail\" is not the name of a namespace")),
            ("mail/-mx", Err("\"-mx\" is not the name of a Service")),
            ("mail/mx-", Err("\"mx-\" is not the name of a Service")),
            ("mail/mx.a", Err("\"mx.a\" is not the name of a Service")),
            // These would change the request to the API.
            ("mail/mx?a=b", Err("\"mx?a=b\" is not the name of a Service")),
            ("../mx", Err("\"..\" is not the name of a namespace")),
            (too_long.as_str(), Err("1 to 63 of a-z")),
        ] {
            match (text.parse::<ServiceRef>(), expected) {
                (Ok(service), Ok((namespace, name))) => {
                    assert_eq!((service.namespace(), service.name()), (namespace, name));
                    assert_eq!(service.to_string(), text);
                }
                (Err(error), Err(expected)) => assert!(error.contains(expected), "{text}: {error}"),
                (got, expected) => panic!("{text}: {got:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn a_port_is_a_name_with_a_letter() {
        assert_eq!("smtp-2".parse(), Ok(ServicePort::Name("smtp-2".to_owned())));
        for (text, expected) in [
            ("2525", "a number is written without quotation marks: 2525"),
            ("0", "must be the name"),
            ("70000", "must be the name"),
            ("", "must be the name"),
            ("SMTP", "must be the name"),
            ("smtp,a", "must be the name"),
        ] {
            let error = text.parse::<ServicePort>().unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
