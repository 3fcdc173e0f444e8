use std::{fs, time::Instant};

use super::{follower::own_addresses, *};

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
    assert_eq!(own_addresses(Ok(vec![network("192.0.2.3")]), &before), [own("192.0.2.3")]);
    let failed = || Err(io::Error::from_raw_os_error(libc::ENOBUFS));
    assert_eq!(own_addresses(failed(), &before), [before[0], before[2]]);
}
