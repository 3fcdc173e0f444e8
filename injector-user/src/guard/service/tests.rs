use std::{fs, time::Instant};

use super::*;
use crate::guard::follower::{ordered, own_addresses};

fn service(settings: &config::Guard) -> Service {
    let max_bans = usize::try_from(settings.max_bans).unwrap();
    Service::start(Guard::new(None, max_bans), settings, &["192.0.2.64/26".parse().unwrap()], None).unwrap()
}

fn command(network: &str) -> BanCommand {
    let (duration, reason) = (None, String::new());
    BanCommand { network: network.parse().unwrap(), duration, reason, force: false }
}

fn wait(what: &str, reached: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !reached() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_command_is_checked_before_it_bans() {
    let allow = vec!["203.0.113.0/24".parse().unwrap()];
    let service = service(&config::Guard { allow, max_bans: 2, ..config::Guard::default() });
    let network = |text: &str| -> Network { text.parse().unwrap() };
    let protected = |text: &str, why| Err(BanError::Protected(network(text), why));
    assert_eq!(service.ban(command("203.0.113.7")), protected("203.0.113.7", Protection::Allow));
    assert_eq!(service.ban(command("192.0.2.65")), protected("192.0.2.65", Protection::InlinePeer));
    assert_eq!(service.ban(command("127.0.0.1")), protected("127.0.0.1", Protection::OwnAddress));
    service.set_backends(["10.0.0.7".parse().unwrap()].into());
    let of_backend = || service.ban(command("10.0.0.7")) == protected("10.0.0.7", Protection::Backend);
    wait("the backend is not protected", || {
        let is_protected = of_backend();
        service.unban(network("10.0.0.7"));
        is_protected
    });
    service.set_peers(vec![network("192.0.2.1")]);
    wait("the other peers are not protected", || {
        let is_protected = |text: &str| service.guard().protection(network(text)).is_some();
        is_protected("192.0.2.1") && !is_protected("192.0.2.65")
    });
    assert_eq!(service.ban(command("10.0.0.0/15")), Err(BanError::TooWide(network("10.0.0.0/15"), 16)));
    assert_eq!(service.ban(command("2000::/18")), Err(BanError::TooWide(network("2000::/18"), 19)));
    for duration in [Duration::ZERO, MAX_BAN + Duration::from_secs(1)] {
        let command = BanCommand { duration: Some(duration), ..command("198.18.7.1") };
        assert_eq!(service.ban(command), Err(BanError::Duration));
    }
    for reason in ["two\nlines".to_owned(), "x".repeat(MAX_REASON + 1)] {
        assert_eq!(service.ban(BanCommand { reason, ..command("198.18.7.1") }), Err(BanError::Reason));
    }
    assert_eq!(service.guard().count(Origin::Command), 0);
    assert_eq!(service.ban(BanCommand { force: true, ..command("10.0.0.0/15") }), Ok(false));
    assert_eq!(service.ban(command("198.18.7.1")), Ok(false));
    assert_eq!(service.ban(command("198.18.7.1")), Ok(true));
    assert_eq!(service.ban(command("198.18.7.2")), Err(BanError::Full(2)));
    assert!(service.unban(network("198.18.7.1")).was_banned);
    let again = service.unban(network("198.18.7.1"));
    assert_eq!((again.was_banned, again.remaining.len()), (false, 0));
    let within = service.unban(network("10.0.0.7"));
    assert_eq!(within.remaining[0].ban.network, network("10.0.0.0/15"));
    service.stop();
}

#[test]
fn lists_and_the_state_file_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (deny, missing) = (dir.path().join("deny"), dir.path().join("missing"));
    fs::write(&deny, "192.0.2.1\n192.0.2.2\n").unwrap();
    let settings = config::Guard {
        deny: vec!["198.51.100.0/24".parse().unwrap()],
        deny_files: vec![deny.clone(), missing.clone()],
        state: Some(dir.path().join("bans")),
        ..config::Guard::default()
    };
    let first = service(&settings);
    let listed = |service: &Service| service.guard().count(Origin::List);
    wait("the lists are not applied", || listed(&first) == 3);
    let unreadable = || first.lists().iter().filter(|list| list.error.is_some()).count();
    wait("the missing file is not reported", || unreadable() == 1);
    let reason = first.guard().bans_around("192.0.2.1".parse().unwrap())[0].ban.reason.to_string();
    assert_eq!(reason, deny.display().to_string());
    // Another configuration: without the file that is missing.
    first.set_lists(&config::Guard { deny: Vec::new(), deny_files: vec![deny], ..settings.clone() });
    wait("the other lists are not applied", || listed(&first) == 2);
    let duration = Some(Duration::from_secs(3600));
    let command = BanCommand { duration, reason: "a test".to_owned(), ..command("203.0.113.7") };
    assert_eq!(first.ban(command), Ok(false));
    first.stop();

    let second = service(&settings);
    let bans = second.guard().snapshot(Some(Origin::Command), 10).bans;
    assert_eq!(&*bans[0].ban.reason, "a test");
    let left = bans[0].ban.until_ns - clock::boottime_ns();
    assert!(left > 3_590_000_000_000 && left <= 3_600_000_000_000, "{left}");
    second.stop();
}

#[test]
fn own_addresses_stay_protected_while_they_cannot_be_listed() {
    let network = |text: &str| text.parse::<Network>().unwrap();
    let own = |text: &str| (network(text), Protection::OwnAddress);
    let before = [own("192.0.2.1"), (network("192.0.2.2"), Protection::Backend), own("2001:db8::1")];
    let found = Ok(vec!["192.0.2.3".parse().unwrap()]);
    assert_eq!(own_addresses(found, &before), [network("192.0.2.3")]);
    let failed = || Err(io::Error::from_raw_os_error(libc::ENOBUFS));
    assert_eq!(own_addresses(failed(), &before), [before[0].0, before[2].0]);
}

#[test]
fn a_protected_network_has_its_first_reason() {
    let networks = |texts: &[&str]| -> Vec<Network> { texts.iter().map(|it| it.parse().unwrap()).collect() };
    let protected = ordered([
        (Protection::InlinePeer, networks(&["192.0.2.1", "192.0.2.2"])),
        (Protection::Gateway, networks(&["192.0.2.3", "192.0.2.1"])),
        (Protection::Allow, networks(&["192.0.2.2"])),
    ]);
    let expected = networks(&["192.0.2.1", "192.0.2.2", "192.0.2.3"]);
    let reasons = [Protection::Gateway, Protection::Allow, Protection::Gateway];
    assert_eq!(protected, expected.into_iter().zip(reasons).collect::<Vec<_>>());
}

#[test]
fn a_file_that_cannot_be_read_keeps_what_it_said_before() {
    let dir = tempfile::tempdir().unwrap();
    let [deny, later, allow] = ["deny", "later", "allow"].map(|name| dir.path().join(name));
    fs::write(&deny, "192.0.2.1\n").unwrap();
    fs::write(&allow, "192.0.2.128/25\n").unwrap();
    let network = |text: &str| -> Network { text.parse().unwrap() };
    // What an earlier daemon read from a file that is not there now.
    let guard = Guard::new(None, 10);
    let left = WantedBan { network: network("192.0.2.9"), until_ns: Ban::FOREVER, reason: "".into() };
    guard.change(Origin::List, [left], Vec::new());
    let settings = config::Guard {
        deny: vec![network("203.0.113.0/24")],
        deny_files: vec![deny.clone(), later.clone()],
        allow_files: vec![allow.clone()],
        ..config::Guard::default()
    };
    let service = Service::start(guard, &settings, &[], None).unwrap();
    let is_listed = |text: &str| service.guard().has(Origin::List, network(text));
    wait("the file is not read", || is_listed("192.0.2.1"));
    assert!(is_listed("192.0.2.9"));
    fs::write(&later, "192.0.2.2\n").unwrap();
    wait("the other file is not read", || is_listed("192.0.2.2") && !is_listed("192.0.2.9"));
    // A reload keeps it, too. Only what the configuration itself said before ends.
    fs::write(&deny, "nonsense\n").unwrap();
    fs::write(&allow, "nonsense\n").unwrap();
    wait("the errors are not seen", || {
        service.lists().iter().filter(|list| list.error.is_some()).count() == 2
    });
    service.set_lists(&config::Guard { deny: vec![network("198.51.100.0/24")], ..settings });
    wait("the other list is not applied", || is_listed("198.51.100.0/24"));
    assert!(is_listed("192.0.2.1") && is_listed("192.0.2.2") && !is_listed("203.0.113.0/24"));
    assert_eq!(service.guard().protection(network("192.0.2.200")), Some(Protection::Allow));
    service.stop();
}

#[test]
fn the_thread_saves_removes_what_is_over_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("bans");
    let settings = config::Guard { state: Some(state.clone()), ..config::Guard::default() };
    let first = service(&settings);
    wait("there is no state file", || state.exists());
    assert_eq!(first.ban(command("198.18.7.1")), Ok(false));
    let is_saved = |text: &str| fs::read_to_string(&state).unwrap_or_default().contains(text);
    wait("the ban is not saved", || is_saved("198.18.7.1/32 never"));
    assert!(first.unban("198.18.7.1".parse().unwrap()).was_banned);
    wait("the ban is saved still", || !is_saved("198.18.7.1"));
    let short = BanCommand { duration: Some(Duration::from_millis(20)), ..command("198.18.7.2") };
    assert_eq!(first.ban(short), Ok(false));
    wait("the ban is not removed", || first.guard().count(Origin::Command) == 0);
    wait("the ban is not saved", || is_saved("198.18.7.2"));
    // Without a change, nothing is written.
    fs::remove_file(&state).unwrap();
    first.stop();
    assert!(!state.exists());
    let thread = Arc::downgrade(&first.0);
    drop(first);
    wait("the thread goes on", || thread.strong_count() == 0);
}

#[cfg(feature = "crowdsec")]
#[test]
fn a_reload_follows_another_lapi() {
    let lapi = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    lapi.set_nonblocking(true).unwrap();
    let key = tempfile::NamedTempFile::new().unwrap();
    fs::write(key.path(), "secret").unwrap();
    let settings = config::Guard::default();
    let service = service(&settings);
    service.start_crowdsec(&settings, CrowdSecMetrics::default()).unwrap();
    let crowdsec = Some(config::CrowdSec {
        url: format!("http://{}", lapi.local_addr().unwrap()),
        api_key_file: key.path().to_owned(),
        ca_file: None,
        interval: Duration::from_secs(20),
        captcha: config::Captcha::Ban,
        origins: Vec::new(),
        scenarios_containing: Vec::new(),
        usage_metrics: false,
    });
    service.set_lists(&config::Guard { crowdsec, ..settings });
    wait("the LAPI is not asked", || lapi.accept().is_ok());
    service.stop();
}
