//! Configuration files, valid and broken. `broken/` holds files with errors and their messages.

mod broken;
mod documentation;
mod listener;
mod receiver;

use std::time::Duration;

use super::*;
use crate::protocol::Protocol;

/// A valid listener; tests replace or add lines.
const LISTENER: &str = r#"[[listener]]
name = "smtp"
bind = ["192.0.2.10:25"]
protocol = "smtp"
backends = ["mail.internal:2525"]
"#;

fn diagnostics(text: &str) -> Vec<String> {
    match Config::parse(text, "f.toml") {
        Ok(config) => panic!("no error found in\n{text}\n{config:#?}"),
        Err(ConfigError::Invalid(diagnostics)) => diagnostics.iter().map(Diagnostic::to_string).collect(),
        Err(other) => panic!("{other}"),
    }
}

#[track_caller]
fn assert_diagnostics(text: &str, expected: &[&str]) {
    assert_eq!(diagnostics(text), expected, "in\n{text}");
}

/// The listener with the line of one field replaced.
fn with(field: &str, line: &str) -> String {
    let replace =
        |old: &str| if old.starts_with(&format!("{field} =")) { line.to_owned() } else { old.to_owned() };
    let text: Vec<String> = LISTENER.lines().map(replace).collect();
    text.join("\n")
}

/// The listener with further lines from line 6 on.
fn and(lines: &str) -> String {
    format!("{LISTENER}{lines}")
}

#[test]
fn the_example_has_the_documented_meaning() {
    let config = Config::parse(EXAMPLE, "f.toml").unwrap();
    assert_eq!(config.metrics, Some(Metrics { listen: "127.0.0.1:9145".parse().unwrap() }));
    assert_eq!(
        (config.limits, config.splice, config.stop, config.log),
        (Limits::default(), Splice::default(), Stop::default(), Log::default())
    );
    let default = Protocol::Smtp.timeouts();
    let expected = Listener {
        name: "smtp".to_owned(),
        bind: vec!["192.0.2.10:25".parse().unwrap(), "[2001:db8::10]:25".parse().unwrap()],
        virtual_addresses: WithServices::default(),
        translated_sources: Vec::new(),
        protocol: Protocol::Smtp,
        engine: EngineChoice::Auto,
        backends: vec![Backend {
            destination: Destination::Name { name: "mail.internal".to_owned(), port: 2525 },
            weight: 1,
            backup: false,
            max_connections: None,
        }],
        balance: Balance::Weighted,
        max_queue: 100,
        health: Health::default(),
        source_addresses: Vec::new(),
        resolve_interval: Duration::from_secs(15),
        max_connections: None,
        per_source: PerSource::default(),
        timeouts: Timeouts {
            connect: default.connect,
            queue: Duration::from_secs(30),
            idle: default.idle,
            header_wait: default.header_wait,
            half_closed: default.half_closed,
            client_fin: default.client_fin,
            user_timeout: default.user_timeout,
            keepalive: default.keepalive,
            drain: default.drain,
        },
        receiver: Receiver::default(),
    };
    assert_eq!(config.listeners, [expected]);
}

#[test]
fn the_admin_socket_is_an_absolute_path() {
    let config = Config::parse(&format!("[admin]\nsocket = \"/run/x\"\n{LISTENER}"), "f").unwrap();
    assert_eq!(config.admin, Some(Admin { socket: "/run/x".into() }));
}

#[test]
fn the_shutdown_deadline_may_be_zero() {
    assert_eq!(
        Config::parse(&format!("[stop]\ndeadline = \"0s\"\n{LISTENER}"), "f.toml").unwrap().stop.deadline,
        Duration::ZERO
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = Config::load(Path::new("/nonexistent/injector.toml")).unwrap_err();
    assert_eq!(
        // As `injector` prints it, with all causes.
        format!("{:#}", anyhow::Error::from(error)),
        "cannot read the configuration /nonexistent/injector.toml: No such file or directory (os error 2)"
    );
}

#[test]
fn a_file_is_loaded() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), EXAMPLE).unwrap();
    assert_eq!(Config::load(file.path()).unwrap(), Config::parse(EXAMPLE, "").unwrap());
}

#[test]
fn a_build_without_kubernetes_refuses_services_and_says_which_feature_it_lacks() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (name, replacement) in [
        ("mail/mailserver", "[{ service = \"mail/mailserver\", port = \"smtp\" }]"),
        (
            "injector/injector",
            "[\"mail.internal:2525\"]\nvirtual_addresses = [{ service = \"injector/injector\" }]",
        ),
    ] {
        let text = LISTENER.replace("[\"mail.internal:2525\"]", replacement);
        fs::write(file.path(), &text).unwrap();
        let config = Config::parse(&text, "").unwrap();
        assert_eq!(Config::load_for(file.path(), true).unwrap(), config);
        let error = Config::load_for(file.path(), false).unwrap_err().to_string();
        assert!(error.contains(&format!("the service {name} cannot be followed")), "{error}");
        assert!(error.contains("built without the feature `kubernetes`"), "{error}");
        assert_eq!(Config::load(file.path()).is_ok(), cfg!(feature = "kubernetes"));
    }
    fs::write(file.path(), LISTENER).unwrap();
    assert!(Config::load_for(file.path(), false).is_ok());
}

#[test]
fn the_summary_shows_the_effective_configuration() {
    let text = and(
        "[[listener]]\nname = \"imaps\"\nbind = [\"[::]:993\"]\nprotocol = \"imaps\"\nengine = \"relay\"\n\
         backends = [{ address = \"192.0.2.20:10993\", weight = 3 }, { address = \"192.0.2.21:10993\", backup = true }]\n\
         max_connections = 50\n[listener.health]\ncheck = \"mail\"\nprotocol = \"imap\"\nport = 143\neject_after = 0\n\
         [listener.receiver]\n\
         crc32c = true\nunique_id = true\n\
         [[listener]]\nname = \"packets\"\nbind = [\"192.0.2.11:465\"]\nprotocol = \"submissions\"\nengine = \"inline\"\n\
         backends = [\"192.0.2.20:4465\", { service = \"mail/mailserver\", port = \"submissions\" }]\n\
         max_connections = 50\nvirtual_addresses = [\"198.51.100.1\", { service = \"injector/injector\" }]\n\
         translated_sources = [\"10.0.0.0/24\", \"10.0.1.1\"]\n",
    );
    let mut config = Config::parse(&text, "f.toml").unwrap();
    // The default is the number of processors.
    config.limits.workers = 2;
    insta::assert_snapshot!("summary", summary(&config));
}
