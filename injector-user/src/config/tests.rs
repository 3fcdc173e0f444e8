//! Each mistake a file can hold, with the exact words it is reported in.

use std::time::Duration;

use super::*;
use crate::protocol::Protocol;

/// A listener without mistakes; cases replace or add lines.
const LISTENER: &str = r#"[[listener]]
name = "smtp"
bind = ["192.0.2.10:25"]
protocol = "smtp"
backends = ["mail.internal:2525"]
"#;

fn problems(text: &str) -> Vec<String> {
    match Config::parse(text, "f.toml") {
        Ok(config) => panic!("no problem found in\n{text}\n{config:#?}"),
        Err(ConfigError::Invalid(problems)) => problems.iter().map(Diagnostic::to_string).collect(),
        Err(other) => panic!("{other}"),
    }
}

#[track_caller]
fn assert_problems(text: &str, expected: &[&str]) {
    assert_eq!(problems(text), expected, "in\n{text}");
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
fn the_example_means_what_it_says() {
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
        protocol: Protocol::Smtp,
        engine: EngineChoice::Auto,
        backends: vec![Backend {
            host: Host::Name("mail.internal".to_owned()),
            port: 2525,
            weight: 1,
            backup: false,
        }],
        health: Health::default(),
        resolve_interval: Duration::from_secs(15),
        max_connections: None,
        timeouts: Timeouts {
            connect: default.connect,
            idle: default.idle,
            header_wait: default.header_wait,
            half_closed: default.half_closed,
            user_timeout: default.user_timeout,
            keepalive: default.keepalive,
            drain: default.drain,
        },
        receiver: Receiver::default(),
    };
    assert_eq!(config.listeners, [expected]);
}

/// The complete example of the documentation, with every field away from its default.
#[test]
fn the_documented_example_parses_and_sets_every_field() {
    let document = include_str!("../../../docs/config.md");
    let (_, rest) = document.split_once("<!-- complete example -->\n```toml\n").unwrap();
    let (text, _) = rest.split_once("```").unwrap();
    let config = Config::parse(text, "docs/config.md").unwrap_or_else(|error| panic!("{error}"));
    assert!(config.metrics.is_some());
    assert!(config.admin.is_some());
    assert_ne!(config.limits, Limits::default());
    assert_ne!(config.stop, Stop::default());
    let (splice, default) = (config.splice, Splice::default());
    assert_ne!(splice.watermarks.high, default.watermarks.high);
    assert_ne!(splice.watermarks.low, default.watermarks.low);
    assert_ne!(splice.watermarks.total_high, default.watermarks.total_high);
    assert_ne!(splice.watermarks.total_limit, default.watermarks.total_limit);
    assert_ne!(splice.enrolment.messages, default.enrolment.messages);
    assert_ne!(splice.enrolment.bytes, default.enrolment.bytes);
    assert_ne!(splice.enrolment.age, default.enrolment.age);
    assert_ne!(splice.header, default.header);
    let (inline, default) = (&config.inline, Inline::default());
    assert_ne!((inline.nat, inline.attachment), (default.nat, default.attachment));
    assert_ne!((inline.masquerade, inline.set_sysctls), (default.masquerade, default.set_sysctls));
    assert_ne!((inline.flows, inline.idle), (default.flows, default.idle));
    assert!(inline.table != default.table && inline.pin != default.pin);
    assert!(!inline.client_devices.is_empty() && !inline.backend_devices.is_empty());
    assert_ne!((config.log.format, config.log.level), (LogFormat::default(), LogLevel::default()));
    let listener = config.listeners.iter().find(|listener| listener.name == "imaps").unwrap();
    let default = Protocol::Imaps.timeouts();
    assert_ne!(listener.timeouts.connect, default.connect);
    assert_ne!(listener.timeouts.idle, default.idle);
    assert_ne!(listener.timeouts.header_wait, default.header_wait);
    assert_ne!(listener.timeouts.half_closed, default.half_closed);
    assert_ne!(listener.timeouts.user_timeout, default.user_timeout);
    assert_ne!(listener.timeouts.keepalive, default.keepalive);
    assert_ne!(listener.timeouts.drain, default.drain);
    assert_ne!(listener.engine, EngineChoice::default());
    assert_ne!(listener.resolve_interval, Duration::from_secs(15));
    assert!(listener.max_connections.is_some());
    assert!(listener.backends.iter().any(|backend| backend.weight != 1));
    assert!(listener.backends.iter().any(|backend| backend.backup));
    let health = listener.health;
    assert_ne!(health.ejection.after, Health::default().ejection.after);
    assert_ne!(health.ejection.time, Health::default().ejection.time);
    let check = health.check.unwrap();
    assert_eq!((check.protocol, check.port), (Some(Protocol::Imap), Some(143)));
    assert_eq!(check.header, CheckHeader::Local);
    assert_ne!((check.interval, check.timeout), (Duration::from_secs(10), Duration::from_secs(5)));
    assert_ne!(check.rise, 2);
    assert_ne!(check.fall, 3);
    let receiver = &listener.receiver;
    assert!(receiver.crc32c && receiver.unique_id && receiver.authority.is_some() && receiver.noop.is_some());
    assert_eq!(receiver.custom.len(), 2);
    assert_ne!(receiver.max_header, Receiver::default().max_header);
}

/// The reference lists exactly the keys that exist, each once. A heading with a code span
/// (`[splice]`, `listener.backends`) opens the keys of one table.
#[test]
fn the_documentation_names_every_field() {
    let document = include_str!("../../../docs/config.md");
    let mut table = None;
    let mut documented = std::collections::BTreeSet::new();
    for line in document.lines() {
        if line.starts_with("##") {
            let name = line.trim_start_matches('#').trim();
            let code = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'));
            table = code.map(|code| code.trim_matches(['[', ']']));
        } else if let (Some(table), Some(row)) = (table, line.strip_prefix("| `")) {
            let (key, _) = row.split_once('`').unwrap();
            assert!(documented.insert(format!("{table}.{key}")), "{table}.{key} is listed twice");
        }
    }
    // An unknown field is answered with the known ones: they are asked for here.
    let known = |text: &str| -> Vec<String> {
        let all = problems(text);
        let (_, list) = all[0].split_once("known fields: ").unwrap_or_else(|| panic!("{all:?}"));
        list.split(", ").map(str::to_owned).collect()
    };
    let mut real = std::collections::BTreeSet::new();
    for section in ["metrics", "admin", "limits", "splice", "inline", "stop", "log"] {
        let listen = match section {
            "metrics" => "listen = \"127.0.0.1:1\"\n",
            "admin" => "socket = \"/run/x\"\n",
            _ => "",
        };
        let fields = known(&format!("[{section}]\nzzzzzzzz = 1\n{listen}{LISTENER}"));
        real.extend(fields.iter().map(|field| format!("{section}.{field}")));
    }
    real.extend(known(&and("zzzzzzzz = 1")).iter().map(|field| format!("listener.{field}")));
    let backend = "backends = [{ address = \"mail.internal:2525\", zzzzzzzz = 1 }]";
    real.extend(known(&with("backends", backend)).iter().map(|field| format!("listener.backends.{field}")));
    for (section, needed) in [
        ("[listener.timeouts]", ""),
        ("[listener.health]", ""),
        ("[listener.receiver]", ""),
        ("[[listener.receiver.custom]]", "kind = 0xE0\nvalue = \"x\""),
    ] {
        let fields = known(&and(&format!("{section}\nzzzzzzzz = 1\n{needed}")));
        let path = section.trim_matches(['[', ']']);
        real.extend(fields.iter().map(|field| format!("{path}.{field}")));
    }
    // The tables themselves are headings.
    for table in ["listener.timeouts", "listener.health", "listener.receiver", "listener.receiver.custom"] {
        assert!(real.remove(table), "{table} is no longer a field");
    }
    assert_eq!(documented, real);
}

#[test]
fn syntax() {
    assert_problems("[metrics\n", &["f.toml:1:9: unclosed table, expected `]`"]);
    assert_problems(&and("name = \"again\""), &["f.toml:6:1: duplicate key"]);
}

#[test]
fn no_listener() {
    for text in ["", "[limits]\nmax_connections = 1\n", "listener = []"] {
        assert_problems(text, &["f.toml:1:1: no [[listener]]: at least one is needed"]);
    }
    assert_problems(
        "[listener]\nname = \"smtp\"",
        &["f.toml:1:1: listener: must be a list of tables, each written [[listener]], not a table"],
    );
}

#[test]
fn unknown_fields_are_answered_with_what_was_probably_meant() {
    assert_problems(
        &with("backends", "backend = [\"mail.internal:2525\"]"),
        &[
            "f.toml:1:1: listener \"smtp\": backends is missing",
            "f.toml:5:1: listener \"smtp\": unknown field `backend`, did you mean `backends`?",
        ],
    );
    assert_problems(
        &format!("[limit]\n{LISTENER}"),
        &["f.toml:1:2: unknown field `limit`, did you mean `limits`?"],
    );
    assert_problems(
        &format!("[limits]\nmax_conections = 5\n{LISTENER}"),
        &["f.toml:2:1: unknown field `limits.max_conections`, did you mean `limits.max_connections`?"],
    );
    assert_problems(
        &and("[listener.timeouts]\ntls = \"5s\""),
        &["f.toml:7:1: listener \"smtp\": unknown field `timeouts.tls`, known fields: connect, idle, \
             half_closed, user_timeout, drain, keepalive, header_wait"],
    );
    assert_problems(
        &and("[[listener.receiver.custom]]\nkind = 0xE0\nvalue = \"x\"\nvalues = 1"),
        &["f.toml:9:1: listener \"smtp\": unknown field `receiver.custom.values`, did you mean \
             `receiver.custom.value`?"],
    );
}

#[test]
fn missing_fields() {
    assert_problems(
        "\n[[listener]]\nengine = \"relay\"",
        &[
            "f.toml:2:1: listener #1: name is missing",
            "f.toml:2:1: listener #1: protocol is missing",
            "f.toml:2:1: listener #1: bind is missing",
            "f.toml:2:1: listener #1: backends is missing",
        ],
    );
    assert_problems(&format!("[metrics]\n{LISTENER}"), &["f.toml:1:1: metrics.listen is missing"]);
    assert_problems(
        &and("[[listener.receiver.custom]]\nvalue = \"x\""),
        &["f.toml:6:1: listener \"smtp\": receiver.custom.kind is missing"],
    );
}

#[test]
fn wrong_types() {
    assert_problems(
        &with("name", "name = 5"),
        &["f.toml:2:8: listener #1: name: must be a string, not an integer"],
    );
    assert_problems(
        &with("bind", "bind = \"192.0.2.10:25\""),
        &["f.toml:3:8: listener \"smtp\": bind: must be a list of strings, not a string"],
    );
    assert_problems(
        &with("bind", "bind = [25]"),
        &["f.toml:3:9: listener \"smtp\": bind: must be a list of strings, not an integer"],
    );
    assert_problems(&with("bind", "bind = []"), &["f.toml:3:8: listener \"smtp\": bind: must not be empty"]);
    assert_problems(
        &format!("limits = 3\n{LISTENER}"),
        &["f.toml:1:10: limits: must be a table, written [limits], not an integer"],
    );
    assert_problems(
        &and("timeouts = 3"),
        &["f.toml:6:12: listener \"smtp\": timeouts: must be a table, written [listener.timeouts], not \
             an integer"],
    );
    assert_problems(
        &and("[listener.receiver]\ncrc32c = \"yes\"\ncustom = true"),
        &[
            "f.toml:7:10: listener \"smtp\": receiver.crc32c: must be true or false, not a string",
            "f.toml:8:10: listener \"smtp\": receiver.custom: must be a list of tables, each written \
             [[listener.receiver.custom]], not true or false",
        ],
    );
}

#[test]
fn names() {
    let expect =
        |name: &str| format!("f.toml:2:8: listener #1: name {name:?}: must be 1 to 63 of a-z, 0-9, _ and -");
    for name in ["", "SMTP", "a b", "mail.25", "é"] {
        assert_problems(&with("name", &format!("name = {name:?}")), &[&expect(name)]);
    }
    let second = LISTENER.replace("192.0.2.10", "192.0.2.11");
    assert_problems(
        &and(&second),
        &["f.toml:7:8: listener \"smtp\": name \"smtp\": already used by the listener in line 2"],
    );
}

#[test]
fn choices() {
    assert_problems(
        &with("protocol", "protocol = \"smpt\""),
        &["f.toml:4:12: listener \"smtp\": protocol \"smpt\": did you mean \"smtp\"? must be one of \
             smtp, submission, \
           submissions, imap, imaps, pop3, pop3s, sieve, plain"],
    );
    assert_problems(
        &with("protocol", "protocol = \"http\""),
        &["f.toml:4:12: listener \"smtp\": protocol \"http\": must be one of smtp, submission, \
             submissions, imap, imaps, \
           pop3, pop3s, sieve, plain"],
    );
    assert_problems(
        &and("engine = \"Relay\""),
        &["f.toml:6:10: listener \"smtp\": engine \"Relay\": did you mean \"relay\"? must be one of \
             auto, inline, splice, relay"],
    );
    assert_problems(
        &format!("[log]\nformat = \"text\"\nlevel = \"warning\"\n{LISTENER}"),
        &[
            "f.toml:2:10: log.format \"text\": must be one of human, json",
            "f.toml:3:9: log.level \"warning\": must be one of error, warn, info, debug, trace",
        ],
    );
    assert_problems(
        &and("[listener.receiver]\nversion = \"2\""),
        &["f.toml:7:11: listener \"smtp\": receiver.version \"2\": did you mean \"v2\"? must be one of \
             v1, v2"],
    );
}

#[test]
fn bind_addresses() {
    for (bind, advice) in [
        ("foo", "must be an IP address and a port, such as \"192.0.2.10:25\" or \"[2001:db8::10]:25\""),
        (
            "192.0.2.10:port",
            "must be an IP address and a port, such as \"192.0.2.10:25\" or \"[2001:db8::10]:25\"",
        ),
        ("192.0.2.10", "the port is missing: write \"192.0.2.10:25\""),
        ("[2001:db8::10]", "the port is missing: write \"[2001:db8::10]:25\""),
        (":25", "the address is missing: write \"0.0.0.0:25\" for IPv4, or \"[::]:25\" for IPv6 and IPv4"),
        ("*:25", "the address is missing: write \"0.0.0.0:25\" for IPv4, or \"[::]:25\" for IPv6 and IPv4"),
        (
            "mx.example:25",
            "\"mx.example\" is not an IP address: write one of this host, such as \"192.0.2.10:25\"",
        ),
        // Where the last group is no hexadecimal number of four digits, the intent is plain.
        ("2001:db8::10:65535", "an IPv6 address must be in brackets: write \"[2001:db8::10]:65535\""),
    ] {
        assert_problems(
            &with("bind", &format!("bind = [{bind:?}]")),
            &[&format!("f.toml:3:9: listener \"smtp\": bind {bind:?}: {advice}")],
        );
    }
    assert_problems(
        &format!("[metrics]\nlisten = \":9145\"\n{LISTENER}"),
        &["f.toml:2:10: metrics.listen \":9145\": the address is missing: write \"0.0.0.0:9145\" for \
             IPv4, or \
           \"[::]:9145\" for IPv6 and IPv4"],
    );
}

#[test]
fn binds_must_not_overlap() {
    assert_problems(
        &with("bind", "bind = [\"192.0.2.10:25\", \"192.0.2.10:25\"]"),
        &["f.toml:3:26: listener \"smtp\": bind \"192.0.2.10:25\": already taken by listener \"smtp\" \
             in line 3"],
    );
    for (one, other) in [
        ("0.0.0.0:25", "192.0.2.10:25"),
        ("192.0.2.10:25", "0.0.0.0:25"),
        ("[::]:25", "0.0.0.0:25"),
        ("[::]:25", "192.0.2.10:25"),
        ("[2001:db8::10]:25", "[::]:25"),
        ("192.0.2.10:25", "[::ffff:192.0.2.10]:25"),
    ] {
        let second = LISTENER.replace("smtp\"\nbind", "mx\"\nbind").replace("192.0.2.10:25", other);
        assert_problems(
            &format!("{}\n{second}", with("bind", &format!("bind = [{one:?}]"))),
            &[&format!(
                "f.toml:8:9: listener \"mx\": bind {other:?}: overlaps {one:?} of listener \"smtp\" in line 3"
            )],
        );
    }
    assert_problems(
        &format!("[metrics]\nlisten = \"0.0.0.0:25\"\n{LISTENER}"),
        &["f.toml:5:9: listener \"smtp\": bind \"192.0.2.10:25\": overlaps \"0.0.0.0:25\" of \
             metrics.listen in line 2"],
    );
    for fine in [
        "\"0.0.0.0:25\", \"192.0.2.10:26\"",
        "\"0.0.0.0:25\", \"[2001:db8::10]:25\"",
        "\"[::1]:0\", \"[::1]:0\"",
    ] {
        Config::parse(&with("bind", &format!("bind = [{fine}]")), "f.toml")
            .unwrap_or_else(|e| panic!("{fine}: {e}"));
    }
}

#[test]
fn weights_and_backups_are_checked() {
    let problem = |backends: &str, expected: &str| {
        assert_problems(
            &with("backends", &format!("backends = [{backends}]")),
            &[&format!("f.toml:{expected}")],
        );
    };
    let two = "{ address = \"192.0.2.20:1\", weight = 0 }, { address = \"192.0.2.21:1\", backup = true }";
    problem(
        two,
        "1:1: listener \"smtp\": backends: at least one non-backup backend with weight > 0 is required",
    );
    problem(
        "{ address = \"192.0.2.20:1\", weight = 1001 }",
        "5:50: listener \"smtp\": backends.weight 1001: must be 0 to 1000",
    );
    problem("{ weight = 1 }", "5:13: listener \"smtp\": backends.address is missing");
    problem(
        "{ address = \"192.0.2.20:1\", wieght = 1 }",
        "5:41: listener \"smtp\": unknown field `backends.wieght`, did you mean `backends.weight`?",
    );
    problem(
        "\"192.0.2.20:1\", 5",
        "5:29: listener \"smtp\": backends: must be a list of strings or of tables, not an integer",
    );
    problem(
        "\"192.0.2.20:1\", { address = \"192.0.2.20:1\", backup = true }",
        "5:41: listener \"smtp\": backends \"192.0.2.20:1\": listed twice",
    );
    let fine = "\"192.0.2.20:1\", { address = \"192.0.2.21:1\", weight = 3 }, { address = \"192.0.2.22:1\", backup = true }";
    let config = Config::parse(&with("backends", &format!("backends = [{fine}]")), "f.toml").unwrap();
    let found: Vec<_> = config.listeners[0].backends.iter().map(|it| (it.weight, it.backup)).collect();
    assert_eq!(found, [(1, false), (3, false), (1, true)]);
}

#[test]
fn health_is_checked() {
    let problem = |lines: &str, expected: &[&str]| {
        let expected: Vec<_> = expected.iter().map(|it| format!("f.toml:{it}")).collect();
        let expected: Vec<_> = expected.iter().map(String::as_str).collect();
        assert_problems(&and(&format!("[listener.health]\n{lines}")), &expected);
    };
    problem(
        "check = \"mail\"",
        &[
            "6:1: listener \"smtp\": health.port is missing: the backend's own demands a header. Give one that does \
           not (such as 25), or header = \"local\" where the server takes that",
        ],
    );
    problem(
        "interval = \"5s\"",
        &[
            "6:1: listener \"smtp\": health.interval: has no effect without check = \"tcp\" or check = \"mail\"",
        ],
    );
    problem(
        "check = \"tcp\"\nheader = \"local\"\nprotocol = \"smtp\"",
        &[
            "8:10: listener \"smtp\": health.header: closing right after a header terminates Postfix's smtpd: use check = \"mail\"",
            "9:12: listener \"smtp\": health.protocol: has no effect with check = \"tcp\"",
        ],
    );
    problem(
        "check = \"mail\"\nprotocol = \"plain\"\nport = 25",
        &[
            "8:12: listener \"smtp\": health.protocol \"plain\": check = \"mail\" needs a protocol whose server sends a greeting: use check = \"tcp\"",
        ],
    );
    problem(
        "check = \"mail\"\nheader = \"local\"\n[listener.receiver]\nversion = \"v1\"",
        &["8:10: listener \"smtp\": health.header \"local\": PROXY version 1 has no LOCAL command: \
             set health.port to a port that does not expect a header"],
    );
    problem(
        "check = \"http\"",
        &["7:9: listener \"smtp\": health.check \"http\": must be one of none, tcp, mail"],
    );
    problem("check = \"tcp\"\nrise = 0", &["8:8: listener \"smtp\": health.rise 0: must be 1 to 100"]);
    let config =
        Config::parse(&and("[listener.health]\ncheck = \"mail\"\nport = 25\neject_after = 0\n"), "f")
            .unwrap();
    let health = config.listeners[0].health;
    assert_eq!(health.ejection.after, None);
    let check = health.check.unwrap();
    assert_eq!((check.protocol, check.port, check.rise, check.fall), (Some(Protocol::Smtp), Some(25), 2, 3));
}

#[test]
fn the_admin_socket_is_an_absolute_path() {
    assert_problems(
        &format!("[admin]\nsocket = \"run/x\"\n{LISTENER}"),
        &["f.toml:2:10: admin.socket \"run/x\": must be an absolute path"],
    );
    assert_problems(&format!("[admin]\n{LISTENER}"), &["f.toml:1:1: admin.socket is missing"]);
    let config = Config::parse(&format!("[admin]\nsocket = \"/run/x\"\n{LISTENER}"), "f").unwrap();
    assert_eq!(config.admin, Some(Admin { socket: "/run/x".into() }));
}

#[test]
fn backends_are_checked() {
    for (backend, advice) in [
        (
            "mail.internal",
            "the port is missing: write \"mail.internal:2525\" with the port on which it expects the header",
        ),
        (
            "192.0.2.20",
            "the port is missing: write \"192.0.2.20:2525\" with the port on which it expects the header",
        ),
        (
            "2001:db8::20",
            "the port is missing: write \"[2001:db8::20]:2525\" with the port on which it expects the header",
        ),
        ("2001:db8::20:65535", "an IPv6 address must be in brackets: write \"[2001:db8::20]:65535\""),
        ("mail.internal:0", "port must be 1 to 65535"),
        ("192.0.2.20:0", "port must be 1 to 65535"),
        ("mail.internal:smtp", "port \"smtp\" must be a number from 1 to 65535"),
        ("mail.internal:70000", "port \"70000\" must be a number from 1 to 65535"),
        ("mail_.-x:25", "\"mail_.-x\" is not a host name"),
        ("ma il:25", "\"ma il\" is not a host name"),
        (":2525", "\"\" is not a host name"),
        ("192.0.2:25", "\"192.0.2\" is neither a host name nor an IP address"),
        (
            "0.0.0.0:2525",
            "0.0.0.0 cannot be used as a destination: write the address or name of the mail server",
        ),
        ("[::]:2525", ":: cannot be used as a destination: write the address or name of the mail server"),
        ("[fe80::1%2]:2525", "link-local addresses with a zone are not supported: use a global address"),
    ] {
        assert_problems(
            &with("backends", &format!("backends = [{backend:?}]")),
            &[&format!("f.toml:5:13: listener \"smtp\": backends {backend:?}: {advice}")],
        );
    }
    assert_problems(
        &with("backends", "backends = [\"a:1\", \"A.:1\"]"),
        &["f.toml:5:20: listener \"smtp\": backends \"A.:1\": listed twice"],
    );
    for (bind, backend) in [
        ("192.0.2.10:25", "192.0.2.10:25"),
        ("127.0.0.1:25", "localhost:25"),
        ("0.0.0.0:25", "127.0.0.9:25"),
        ("[::]:25", "[::1]:25"),
        ("[::]:25", "localhost:25"),
        ("192.0.2.10:25", "[::ffff:192.0.2.10]:25"),
    ] {
        let text = with("bind", &format!("bind = [{bind:?}]")).replace("mail.internal:2525", backend);
        assert_problems(
            &text,
            &[&format!(
                "f.toml:5:13: listener \"smtp\": backends {backend:?}: points back at this listener \
                 (bind {bind:?}): connections would loop"
            )],
        );
    }
    for (bind, backend) in
        [("0.0.0.0:25", "[::1]:25"), ("127.0.0.1:25", "127.0.0.2:25"), ("192.0.2.10:25", "localhost:25")]
    {
        let text = with("bind", &format!("bind = [{bind:?}]")).replace("mail.internal:2525", backend);
        Config::parse(&text, "f.toml").unwrap_or_else(|error| panic!("{bind} {backend}: {error}"));
    }
}

#[test]
fn numbers_and_durations() {
    assert_problems(
        &format!("[limits]\nmax_connections = 0\n[stop]\ndeadline = \"30\"\n{}", and("max_connections = -5")),
        &[
            "f.toml:2:19: limits.max_connections 0: must be 1 to 1073741824",
            "f.toml:4:12: stop.deadline \"30\": must be a duration such as \"30s\", \"1m 30s\" or \"250ms\"",
            "f.toml:10:19: listener \"smtp\": max_connections -5: must be 1 to 1073741824",
        ],
    );
    assert_problems(
        &and("resolve_interval = 15"),
        &["f.toml:6:20: listener \"smtp\": resolve_interval: must be a duration such as \"30s\", \"1m \
             30s\" or \"250ms\", \
           not an integer"],
    );
    assert_problems(
        &and("[listener.timeouts]\nconnect = \"0s\"\nidle = \"1year\""),
        &[
            "f.toml:7:11: listener \"smtp\": timeouts.connect \"0s\": must be more than zero",
            "f.toml:8:8: listener \"smtp\": timeouts.idle \"1year\": must be at most 7days",
        ],
    );
    let header_wait = |protocol: &str, wait: &str| {
        let listener = with("protocol", &format!("protocol = {protocol:?}"));
        format!("{listener}\n[listener.timeouts]\nheader_wait = {wait:?}")
    };
    assert_problems(
        &header_wait("imaps", "3s"),
        &["f.toml:7:15: listener \"smtp\": timeouts.header_wait \"3s\": must be less than 3s: Dovecot \
             waits at most 3s \
             for the header"],
    );
    assert_problems(
        &header_wait("smtp", "1s"),
        &["f.toml:7:15: listener \"smtp\": timeouts.header_wait: has no effect with protocol \"smtp\": \
             the server speaks \
           first"],
    );
    let config = Config::parse(&header_wait("plain", "2s 999ms"), "f.toml").unwrap();
    assert_eq!(config.listeners[0].timeouts.header_wait, Duration::from_millis(2999));
    assert_eq!(
        Config::parse(&format!("[stop]\ndeadline = \"0s\"\n{LISTENER}"), "f.toml").unwrap().stop.deadline,
        Duration::ZERO
    );
}

#[test]
fn receivers() {
    let receiver = |lines: &str| and(&format!("[listener.receiver]\n{lines}"));
    let v1_only = |at: &str, field: &str| {
        format!(
            "f.toml:{at}: listener \"smtp\": receiver.{field}: a v1 header is one line of text without \
             TLVs: remove it \
             or use v2"
        )
    };
    let text = receiver(
        "version = \"v1\"\nmax_header = 232\ncrc32c = true\nunique_id = true\nauthority = \
         \"mx.example\"\nnoop = 1\n\
         [[listener.receiver.custom]]\nkind = 0xE0\nvalue = \"x\"",
    );
    let expected = [
        v1_only("8:14", "max_header"),
        v1_only("9:10", "crc32c"),
        v1_only("10:13", "unique_id"),
        v1_only("11:13", "authority"),
        v1_only("12:8", "noop"),
        v1_only("13:1", "custom"),
    ];
    assert_problems(&text, &expected.each_ref().map(String::as_str));
    Config::parse(&receiver("version = \"v1\"\ncrc32c = false"), "f.toml").unwrap();

    assert_problems(
        &receiver("max_header = 51\nnoop = 0"),
        &[
            "f.toml:7:14: listener \"smtp\": receiver.max_header 51: must be 52 to 536",
            "f.toml:8:8: listener \"smtp\": receiver.noop 0: must be 1 to 536",
        ],
    );
    assert_problems(
        &receiver("authority = \"mx example\""),
        &["f.toml:7:13: listener \"smtp\": receiver.authority: \"mx example\" is not a host name"],
    );
    // 52 + 3 + 177 = 232 bytes is the last that fits.
    Config::parse(&receiver("noop = 177"), "f.toml").unwrap();
    assert_problems(
        &receiver("noop = 178"),
        &["f.toml:6:1: listener \"smtp\": receiver: the header would be 233 bytes for a client over \
             IPv6, more than \
           max_header = 232: leave out TLVs, or raise max_header if the receiver reads that much at once"],
    );
    assert_problems(
        &receiver("noop = 482\nmax_header = 536"),
        &["f.toml:6:1: listener \"smtp\": receiver: the header would be 537 bytes for a client over \
             IPv6, more than \
           max_header = 536: leave out TLVs"],
    );
}

#[test]
fn custom_tlvs() {
    let custom = |lines: &str| and(&format!("[[listener.receiver.custom]]\n{lines}"));
    for (lines, expected) in [
        (
            "kind = 0xDF\nvalue = \"x\"",
            "7:8: listener \"smtp\": receiver.custom.kind 0xDF: must be 0xE0 to 0xEF",
        ),
        ("kind = 0xE0", "6:1: listener \"smtp\": receiver.custom.value is missing (text; or hex for bytes)"),
        ("kind = 0xE0\nvalue = \"\"", "8:9: listener \"smtp\": receiver.custom.value: must not be empty"),
        (
            "kind = 0xE0\nvalue = \"x\"\nhex = \"00\"",
            "9:7: listener \"smtp\": receiver.custom.hex: give either value or hex, not both",
        ),
        (
            "kind = 0xE0\nhex = \"0\"",
            "8:7: listener \"smtp\": receiver.custom.hex \"0\": must be pairs of hexadecimal digits, such \
             as \"c0ffee\"",
        ),
        (
            "kind = 0xE0\nhex = \"zz\"",
            "8:7: listener \"smtp\": receiver.custom.hex \"zz\": must be pairs of hexadecimal digits, \
             such as \"c0ffee\"",
        ),
        (
            "kind = 0xE0\nvalue = \"x\"\n[[listener.receiver.custom]]\nkind = 224\nvalue = \"y\"",
            "10:8: listener \"smtp\": receiver.custom.kind 0xE0: given twice",
        ),
    ] {
        assert_problems(&custom(lines), &[&format!("f.toml:{expected}")]);
    }
    let text =
        custom("kind = 0xE0\nvalue = \"é\"\n[[listener.receiver.custom]]\nkind = 0xEF\nhex = \"c0FFee\"");
    let config = Config::parse(&text, "f.toml").unwrap();
    assert_eq!(
        config.listeners[0].receiver.custom,
        [
            CustomTlv { kind: 0xE0, value: "é".as_bytes().to_vec() },
            CustomTlv { kind: 0xEF, value: vec![0xC0, 0xFF, 0xEE] },
        ]
    );
}

#[test]
fn all_mistakes_of_a_file_are_reported_in_its_order() {
    let text = "[metrics]\nlisten = \"x\"\n[[listener]]\nname = \"a\"\nbind = [\"y\"]\nprotocol = \"z\"\n\
                backends = [\"b:0\"]\n\
                [[listener]]\nname = \"a\"\n";
    let lines: Vec<_> =
        problems(text).iter().map(|p| p.split(':').nth(1).unwrap().parse::<u32>().unwrap()).collect();
    assert_eq!(lines, [2, 5, 6, 7, 8, 8, 8, 9]);
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = Config::load(Path::new("/nonexistent/injector.toml")).unwrap_err().to_string();
    assert_eq!(
        error,
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
fn the_summary_shows_what_would_run() {
    let text = and(
        "[[listener]]\nname = \"imaps\"\nbind = [\"[::]:993\"]\nprotocol = \"imaps\"\nengine = \"relay\"\n\
         backends = [{ address = \"192.0.2.20:10993\", weight = 3 }, { address = \"192.0.2.21:10993\", backup = true }]\n\
         max_connections = 50\n[listener.health]\ncheck = \"mail\"\nprotocol = \"imap\"\nport = 143\neject_after = 0\n\
         [listener.receiver]\n\
         crc32c = true\nunique_id = true\n\
         [[listener]]\nname = \"packets\"\nbind = [\"192.0.2.11:465\"]\nprotocol = \"submissions\"\nengine = \"inline\"\n\
         backends = [\"192.0.2.20:4465\"]\nmax_connections = 50\n",
    );
    let expected = "\
smtp (smtp, engine auto)
  listens on   192.0.2.10:25
  backends     mail.internal:2525 (names resolved every 15s)
  health       not checked; ejected for 30s after 3 failed connections
  header       PROXY v2, up to 52 bytes, no TLVs
  timeouts     connect 5s, idle 11m, half-closed 11m
  dead peers   probed after 1m, timed out after 5m
  draining     sessions may finish for 2m

imaps (imaps, engine relay)
  listens on   [::]:993
  backends     192.0.2.20:10993 (weight 3), 192.0.2.21:10993 (backup)
  health       mail (imap) on port 143, every 10s within 5s, down after 3, up after 2
  header       PROXY v2, up to 94 bytes, crc32c, unique_id
  timeouts     connect 5s, idle 35m, half-closed 1m, header waits 1s for the client
  dead peers   probed after 1m, timed out after 5m
  draining     sessions may finish for 30m
  connections  at most 50

packets (submissions, engine inline)
  listens on   192.0.2.11:465
  backends     192.0.2.20:4465
  health       not checked; ejected for 30s after 3 failed connections
  header       PROXY v2, up to 52 bytes, no TLVs
  timeouts     set by client and backend; the header goes with the client's first bytes
  draining     established connections are not aborted
  connections  max_connections is not enforced by engine inline

3 listeners, at most 10000 connections, 2 worker threads, sessions may finish for 30s after SIGTERM
no metrics (add [metrics] listen)
no control socket (add [admin] socket)
";
    assert_eq!(summary(&Config::parse(&text, "f.toml").unwrap()), expected);
}
