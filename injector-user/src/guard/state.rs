//! The file in which bans of `injector ban` survive a restart of the host, with their reasons.
//!
//! A file and not a map in the kernel: it also serves where BPF is not to be had, survives a boot, and
//! an operator can read it. Its times are of the wall clock, because the kernel's begin at a boot.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use injector_common::guard::Ban;

use super::origin::WantedBan;

const TITLE: &str =
    "# Bans of `injector ban`: network, end (UTC), reason. The injector replaces this file.\n";

/// The end of a ban without end.
const NEVER: &str = "never";

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) wall: SystemTime,
    /// Nanoseconds of `CLOCK_BOOTTIME`.
    pub(super) boottime_ns: u64,
}

/// The bans of the file that are not over, and its lines that are none. `None` if there is no file.
pub(super) fn load(path: &Path, now: Now) -> io::Result<Option<(Vec<WantedBan>, usize)>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(parse(&text, now))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces the file, so that a crash leaves the old or the new one.
pub(super) fn save(path: &Path, bans: &[WantedBan], now: Now) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(format(bans, now).as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

fn format(bans: &[WantedBan], now: Now) -> String {
    let mut text = TITLE.to_owned();
    for ban in bans {
        let end = if ban.until_ns == Ban::FOREVER {
            NEVER.to_owned()
        } else {
            let left = Duration::from_nanos(ban.until_ns.saturating_sub(now.boottime_ns));
            humantime::format_rfc3339_millis(now.wall + left).to_string()
        };
        text.push_str(&format!("{} {end} {}\n", ban.network, ban.reason));
    }
    text
}

fn parse(text: &str, now: Now) -> (Vec<WantedBan>, usize) {
    let (mut bans, mut bad) = (Vec::new(), 0);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        match parse_line(line, now) {
            Some(ban) if ban.until_ns > now.boottime_ns => bans.push(ban),
            Some(_) => {}
            None => bad += 1,
        }
    }
    (bans, bad)
}

fn parse_line(line: &str, now: Now) -> Option<WantedBan> {
    let mut fields = line.splitn(3, ' ');
    let network = fields.next()?.parse().ok()?;
    let until_ns = match fields.next()? {
        NEVER => Ban::FOREVER,
        end => {
            let left = humantime::parse_rfc3339(end).ok()?.duration_since(now.wall).unwrap_or_default();
            now.boottime_ns.saturating_add(u64::try_from(left.as_nanos()).unwrap_or(u64::MAX))
        }
    };
    Some(WantedBan { network, until_ns, reason: Arc::from(fields.next().unwrap_or_default()) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn bans_survive_a_boot_with_the_time_that_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bans");
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let before = Now { wall, boottime_ns: 5000 * SECOND };
        assert!(load(&path, before).unwrap().is_none());
        let ban = |network: &str, until_ns, reason: &str| WantedBan {
            network: network.parse().unwrap(),
            until_ns,
            reason: reason.into(),
        };
        let bans = [
            ban("192.0.2.7", 5100 * SECOND, "fail2ban postfix-sasl"),
            ban("192.0.2.8", 5010 * SECOND, "over by then"),
            ban("2001:db8::/64", Ban::FOREVER, ""),
        ];
        // Of a daemon that was killed.
        fs::write(path.with_extension("new"), "x".repeat(10_000)).unwrap();
        save(&path, &bans, before).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format(&bans, before), "something of it is left");
        let replaced = fs::File::open(&path).unwrap();
        save(&path, &bans, before).unwrap();
        let inode = |file: &fs::File| std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
        assert_ne!(inode(&replaced), inode(&fs::File::open(&path).unwrap()), "a crash leaves one of them");
        let after = Now { wall: wall + Duration::from_secs(60), boottime_ns: 3 * SECOND };
        let (loaded, bad) = load(&path, after).unwrap().unwrap();
        assert_eq!(loaded, [ban("192.0.2.7", 43 * SECOND, "fail2ban postfix-sasl"), bans[2].clone()]);
        assert_eq!(bad, 0);
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn lines_that_are_no_bans_are_counted() {
        let now = Now { wall: SystemTime::UNIX_EPOCH, boottime_ns: 0 };
        let text = "# title\n192.0.2.7/32 never a b  c\nx never y\n192.0.2.7/32 soon\n\n192.0.2.8/32 9999-01-01T00:00:00Z\n";
        let (bans, bad) = parse(text, Now { boottime_ns: 1, ..now });
        assert_eq!(bans.len(), 2);
        assert_eq!(bans[1].until_ns, u64::MAX, "an end that no clock reaches");
        assert_eq!(&*bans[0].reason, "a b  c");
        assert_eq!(bad, 3);
    }

    proptest! {
        /// Ends are kept in milliseconds. A ban that is over does not come back.
        #[test]
        fn bans_are_read_as_they_were_written(
            ends in prop::collection::vec(prop_oneof![0..200 * SECOND, Just(u64::MAX - 1), Just(Ban::FOREVER)], 0..5),
            (written, passed) in (0..100 * SECOND, 0..100 * SECOND),
        ) {
            let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
            let before = Now { wall, boottime_ns: written };
            let after = Now { wall: wall + Duration::from_nanos(passed), boottime_ns: written + passed };
            let ban = |(host, until_ns)| WantedBan {
                network: format!("192.0.2.{host}").parse().unwrap(),
                until_ns,
                reason: "a b".into(),
            };
            let bans: Vec<_> = ends.into_iter().enumerate().map(ban).collect();
            let (read, bad) = parse(&format(&bans, before), after);
            prop_assert_eq!(bad, 0);
            const MS: u64 = 1_000_000;
            for ban in &bans {
                let left = ban.until_ns.saturating_sub(after.boottime_ns);
                match read.iter().find(|read| read.network == ban.network) {
                    Some(read) if ban.until_ns == Ban::FOREVER => prop_assert_eq!(read, ban),
                    Some(read) => {
                        prop_assert!(read.until_ns <= ban.until_ns && ban.until_ns - read.until_ns < MS);
                        prop_assert_eq!(&read.reason, &ban.reason);
                    }
                    None => prop_assert!(left < MS, "{left}"),
                }
            }
        }
    }
}
