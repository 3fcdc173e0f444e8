//! What is valid and probably a mistake. Pure.

use super::{Config, Destination, Listener, ServicePort};
use crate::protocol::Protocol;

/// What probably is a mistake, one line each. `injector check` prints it, and the daemon logs it.
#[must_use]
pub fn remarks(config: &Config) -> Vec<String> {
    let of_listener = |listener| standard_ports(listener).into_iter().chain(numbered_ports(listener));
    config.listeners.iter().flat_map(of_listener).chain(crowdsec(config)).collect()
}

/// A CrowdSec API key that others on the network can read.
fn crowdsec(config: &Config) -> Option<String> {
    let crowdsec = config.guard.as_ref()?.crowdsec.as_ref()?;
    crowdsec.sends_key_in_clear().then(|| {
        format!(
            "guard.crowdsec: url {:?}: the API key crosses the network in clear text; use https:// and ca_file",
            crowdsec.url
        )
    })
}

/// Backends on a port where servers expect no header: they read it as a command of the client.
fn standard_ports(listener: &Listener) -> Vec<String> {
    let remark = |backend: &super::Backend| {
        let port = backend.destination.port()?;
        let standard = |protocol: &Protocol| protocol.standard_port() == Some(port);
        let protocol = Protocol::ALL.into_iter().find(standard)?;
        Some(format!(
            "listener {:?}: backends {:?}: {} is the standard port of {protocol}, where other hosts connect without a \
             header; the backend needs a port of its own that requires the header, such as {}",
            listener.name,
            backend.to_string(),
            port,
            proxy_port(port),
        ))
    };
    listener.backends.iter().filter_map(remark).collect()
}

/// Services with the number of a port: pods that have it under another number get no connections.
fn numbered_ports(listener: &Listener) -> Vec<String> {
    let remark = |backend: &super::Backend| match &backend.destination {
        Destination::Service { service, port: ServicePort::Number(port) } => Some(format!(
            "listener {:?}: backends {:?}: {port} is a number of the pods, whatever ports the service {service} has; \
             write the name of the service's port, which follows its targetPort",
            listener.name,
            backend.to_string(),
        )),
        _ => None,
    };
    listener.backends.iter().filter_map(remark).collect()
}

/// The port that the documentation uses beside a standard port.
const fn proxy_port(standard: u16) -> u16 {
    match standard {
        25 => 2525,
        465 => 4465,
        587 => 5587,
        other => other + 10_000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EXAMPLE;

    fn remarks_on(backend: &str) -> Vec<String> {
        remarks(&Config::parse(&EXAMPLE.replace("mail.internal:2525", backend), "f.toml").unwrap())
    }

    #[test]
    fn a_backend_on_a_standard_port_is_remarked_on() {
        for (backend, protocol, other) in [
            ("mail.internal:25", "smtp", 2525),
            ("192.0.2.20:465", "submissions", 4465),
            ("[2001:db8::20]:993", "imaps", 10993),
            ("mail.internal:4190", "sieve", 14190),
        ] {
            let port = backend.rsplit_once(':').unwrap().1;
            assert_eq!(
                remarks_on(backend),
                [format!(
                    "listener \"smtp\": backends {backend:?}: {port} is the standard port of {protocol}, where other \
                     hosts connect without a header; the backend needs a port of its own that requires the header, \
                     such as {other}"
                )]
            );
        }
        assert_eq!(remarks_on("mail.internal:2525"), [""; 0]);
        assert_eq!(remarks_on("mail.internal:10993"), [""; 0]);
    }

    #[test]
    fn the_number_of_a_services_port_is_remarked_on() {
        let remarks_on_port = |port: &str| {
            let backend = format!("{{ service = \"mail/mailserver\", port = {port} }}");
            let text = EXAMPLE.replace("\"mail.internal:2525\"", &backend);
            remarks(&Config::parse(&text, "f.toml").unwrap())
        };
        assert_eq!(
            remarks_on_port("2525"),
            [
                "listener \"smtp\": backends \"mail/mailserver:2525\": 2525 is a number of the pods, whatever ports \
              the service mail/mailserver has; write the name of the service's port, which follows its targetPort"
            ]
        );
        assert_eq!(remarks_on_port("\"smtp\""), [""; 0]);
    }

    #[test]
    fn an_api_key_in_clear_text_is_remarked_on() {
        let remarks_with = |url: &str| {
            let crowdsec = format!("[guard.crowdsec]\nurl = \"{url}\"\napi_key_file = \"/k\"\n\n");
            remarks(&Config::parse(&format!("{crowdsec}{EXAMPLE}"), "f.toml").unwrap())
        };
        assert_eq!(
            remarks_with("http://lapi.example:8080"),
            [
                "guard.crowdsec: url \"http://lapi.example:8080\": the API key crosses the network in clear text; use \
              https:// and ca_file"
            ]
        );
        assert_eq!(remarks_with("http://127.0.0.1:8080"), [""; 0]);
    }
}
