//! Files with networks: `guard.deny_files` and `guard.allow_files`.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::network_list::NetworkList;
use crate::config::Network;

/// The largest file: some four million networks.
const MAX_BYTES: u64 = 64 << 20;

/// How many bad lines a message names.
const MAX_NAMED_LINES: usize = 20;

/// The shortest prefixes in a file. A shorter one is more likely a mistake than meant.
const MIN_PREFIX_IPV4: u8 = 8;
const MIN_PREFIX_IPV6: u8 = 16;

/// A file that is followed.
#[derive(Debug)]
pub(super) struct FollowedFile {
    path: PathBuf,
    /// What the file looked like when it was last read.
    seen: Option<Signature>,
    /// Its networks when it was last valid; `None` if it never was.
    networks: Option<NetworkList>,
    /// When it was last valid and read.
    read_at: Option<SystemTime>,
    error: Option<String>,
}

/// Tells whether a file may have changed, without reading it. Links are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signature {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds, of its contents and of its inode.
    times: [i64; 4],
    /// It changed so shortly before it was read that another change may have left no trace in its times.
    is_fresh: bool,
}

/// A file's state, for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListStatus {
    /// The file.
    pub file: PathBuf,
    /// How many networks of it are in effect.
    pub networks: usize,
    /// When it was last valid and read.
    pub read_at: Option<SystemTime>,
    /// Why it cannot be read now. The networks from before stay in effect.
    pub error: Option<String>,
}

impl FollowedFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, seen: None, networks: None, read_at: None, error: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its networks when it was last valid; `None` if it never was.
    pub(super) const fn networks(&self) -> Option<&NetworkList> {
        self.networks.as_ref()
    }

    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    pub(super) fn status(&self) -> ListStatus {
        ListStatus {
            file: self.path.clone(),
            networks: self.networks.as_ref().map_or(0, NetworkList::len),
            read_at: self.read_at,
            error: self.error.clone(),
        }
    }

    /// Reads the file if it has changed. Whether other networks or another error are in effect now.
    pub(super) fn refresh(&mut self) -> bool {
        let signature = Signature::of(&self.path).ok();
        if !may_differ(self.seen, signature) {
            return false;
        }
        let (networks, error) = match read(&self.path) {
            Ok(networks) => (Some(networks), None),
            Err(error) => (None, Some(error)),
        };
        self.seen = signature;
        self.read_at = if networks.is_some() { Some(SystemTime::now()) } else { self.read_at };
        let changed =
            error != self.error || networks.as_ref().is_some_and(|new| self.networks() != Some(new));
        self.error = error;
        self.networks = networks.or(self.networks.take());
        changed
    }
}

impl Signature {
    fn of(path: &Path) -> io::Result<Self> {
        let file = path.metadata()?;
        let age = file.modified()?.elapsed().unwrap_or_default();
        Ok(Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            times: [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()],
            is_fresh: age.as_secs() < 2,
        })
    }
}

/// Whether a file may have changed between these two looks at it; `None` if it could not be looked at.
fn may_differ(seen: Option<Signature>, now: Option<Signature>) -> bool {
    seen != now || now.is_none_or(|now| now.is_fresh)
}

/// The networks of a file.
///
/// # Errors
/// Names the file and what is wrong with it.
pub fn read(path: &Path) -> Result<NetworkList, String> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "{}: {error}: the injector reads files in /etc and in the directories that its configuration named when it \
             started, and only as the user that it runs as",
            path.display()
        ),
        _ => format!("{}: {error}", path.display()),
    };
    let mut entries = Entries::new(BufReader::new(open(path).map_err(failed)?.take(MAX_BYTES + 1)));
    let networks = entries.by_ref().collect();
    if let Some(error) = entries.error {
        return Err(failed(error));
    }
    if entries.reader.get_ref().limit() == 0 {
        return Err(failed(io::Error::other(format!("larger than {} MiB", MAX_BYTES >> 20))));
    }
    if entries.bad == 0 {
        return Ok(networks);
    }
    let named = entries.named.iter().map(|(line, what)| format!("{}:{line}: {what}", path.display()));
    let named = named.collect::<Vec<_>>().join("\n");
    let more = entries.bad - entries.named.len();
    let more = if more > 0 { format!("\nand {more} more lines") } else { String::new() };
    Err(format!("{named}{more}"))
}

fn open(path: &Path) -> io::Result<File> {
    // A pipe would be waited for.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a file")) }
}

/// The networks of a text: one a line; `#` and `;` begin comments. It has one line in memory at a time.
struct Entries<R> {
    reader: R,
    line: Vec<u8>,
    /// Lines that were read.
    count: usize,
    /// Lines that are no networks; the first of them with their numbers, and what is wrong.
    bad: usize,
    named: Vec<(usize, String)>,
    /// Why it cannot be read further.
    error: Option<io::Error>,
}

impl<R: BufRead> Entries<R> {
    const fn new(reader: R) -> Self {
        Self { reader, line: Vec::new(), count: 0, bad: 0, named: Vec::new(), error: None }
    }
}

impl<R: BufRead> Iterator for Entries<R> {
    type Item = Network;

    fn next(&mut self) -> Option<Network> {
        loop {
            self.line.clear();
            match self.reader.read_until(b'\n', &mut self.line) {
                Ok(0) => return None,
                Ok(_) => self.count += 1,
                Err(error) => {
                    self.error = Some(error);
                    return None;
                }
            }
            // Comments may be in any encoding.
            let line = String::from_utf8_lossy(&self.line);
            let line = if self.count == 1 { line.trim_start_matches('\u{feff}') } else { &line };
            let entry = line.split(['#', ';']).next().unwrap_or_default().trim();
            if entry.is_empty() {
                continue;
            }
            match entry.parse::<Network>().and_then(check_width) {
                Ok(network) => return Some(network),
                Err(advice) => {
                    self.bad += 1;
                    if self.named.len() < MAX_NAMED_LINES {
                        let entry: String = entry.chars().take(60).collect();
                        self.named.push((self.count, format!("{entry:?}: {advice}")));
                    }
                }
            }
        }
    }
}

fn check_width(network: Network) -> Result<Network, String> {
    let least = if network.address().is_ipv4() { MIN_PREFIX_IPV4 } else { MIN_PREFIX_IPV6 };
    if network.prefix() < least {
        return Err(format!("larger than /{least}: if it is meant, write it into the configuration itself"));
    }
    Ok(network)
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, thread, time::Duration};

    use super::*;

    /// The networks and the bad lines of a text.
    fn parse(text: &str) -> (NetworkList, Vec<(usize, String)>) {
        let mut entries = Entries::new(text.as_bytes());
        (entries.by_ref().collect(), entries.named)
    }

    #[test]
    fn a_list_has_one_network_a_line_and_comments() {
        let text = "\u{feff}; Spamhaus DROP List\r\n192.0.2.0/24 ; SBL1\r\n\n  198.51.100.7 # a host\n2001:DB8::/32;SBL2\n192.0.2.0/24\n";
        let (networks, bad) = parse(text);
        let networks: Vec<_> = networks.iter().map(|network| network.to_string()).collect();
        assert_eq!(networks, ["192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32"]);
        assert_eq!(bad, []);
        assert_eq!(parse("# nothing\n"), (NetworkList::default(), Vec::new()));
    }

    #[test]
    fn every_bad_line_is_named() {
        let text = "192.0.2.0/24\n192.0.2.7/24\nmail.example\n0.0.0.0/0\n2000::/15\n192.0.2.1 192.0.2.2\n2000::/16\n10.0.0.0/8\n10.0.0.0/7\n";
        let (_, bad) = parse(text);
        let lines: Vec<_> = bad.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [2, 3, 4, 5, 6, 9]);
        assert!(bad[0].1.contains("write \"192.0.2.0/24\""), "{bad:?}");
        assert!(bad[2].1.contains("larger than /8"), "{bad:?}");
    }

    #[test]
    fn a_bad_file_leaves_the_networks_from_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny.txt");
        let mut file = FollowedFile::new(path.clone());
        assert!(file.refresh());
        assert!(file.error().unwrap().contains("No such file") && file.networks().is_none());
        assert_eq!(file.status().networks, 0);
        assert!(!file.refresh(), "the same error is not news");
        fs::write(&path, "192.0.2.1\n").unwrap();
        assert!(file.refresh() && file.error().is_none());
        let before = file.networks().unwrap().clone();
        // In the same moment, with the same length.
        fs::write(&path, "192.0.2.x\n").unwrap();
        assert!(file.refresh());
        let error = file.error().unwrap();
        assert!(
            error.contains(&format!("{}:1: \"192.0.2.x\": must be a network", path.display())),
            "{error}"
        );
        assert_eq!(*file.networks().unwrap(), before);
        assert_eq!(file.status().networks, 1);
        // Replaced by renaming, as tools do.
        fs::write(dir.path().join("new"), "192.0.2.2\n".repeat(3)).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(file.refresh() && file.error().is_none());
        assert!(file.networks().unwrap().iter().eq(["192.0.2.2/32".parse().unwrap()]));
        fs::remove_file(&path).unwrap();
        assert!(file.refresh());
        assert_eq!(file.status().networks, 1);
    }

    #[test]
    fn a_file_is_read_again_when_it_may_have_changed() {
        let old = Signature { device: 1, inode: 2, size: 3, times: [4; 4], is_fresh: false };
        assert!(!may_differ(Some(old), Some(old)));
        assert!(may_differ(None, Some(old)) && may_differ(Some(old), None) && may_differ(None, None));
        for new in [
            Signature { device: 9, ..old },
            Signature { inode: 9, ..old },
            Signature { size: 9, ..old },
            Signature { times: [4, 4, 4, 9], ..old },
        ] {
            assert!(may_differ(Some(old), Some(new)), "{new:?}");
        }
        // Another change at the same moment leaves no trace.
        let fresh = Signature { is_fresh: true, ..old };
        assert!(may_differ(Some(fresh), Some(fresh)) && may_differ(Some(fresh), Some(old)));
    }

    #[test]
    fn other_networks_are_news_and_the_same_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = FollowedFile::new(dir.path().join("deny.txt"));
        for (text, is_news) in
            [("192.0.2.1\n", true), ("192.0.2.2\n", true), ("# the same\n192.0.2.2\n", false), ("", true)]
        {
            fs::write(file.path(), text).unwrap();
            assert_eq!(file.refresh(), is_news, "{text:?}");
        }
    }

    #[test]
    fn a_file_is_fresh_for_two_seconds() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let is_fresh = |modified| {
            file.as_file().set_modified(modified).unwrap();
            Signature::of(file.path()).unwrap().is_fresh
        };
        let now = SystemTime::now();
        // Also if the clock was set back.
        assert!(is_fresh(now + Duration::from_secs(60)));
        assert!(!is_fresh(now - Duration::from_millis(2500)));
    }

    #[test]
    fn a_message_names_twenty_lines_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny.txt");
        for (bad, end) in [(20, None), (21, Some("and 1 more lines")), (25, Some("and 5 more lines"))] {
            fs::write(&path, format!("{}\n", "x".repeat(1000)).repeat(bad)).unwrap();
            let error = read(&path).unwrap_err();
            assert!(error.lines().all(|line| line.len() < 300), "{error}");
            assert_eq!(error.lines().nth(20), end);
            assert_eq!(error.lines().count(), bad.min(21));
        }
    }

    #[test]
    fn what_is_not_a_file_or_too_large_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).is_err());
        assert!(read(Path::new("/dev/zero")).unwrap_err().contains("not a file"));
        let path = dir.path().join("large");
        File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(read(&path).unwrap_err().contains("larger than 64 MiB"));
        let path = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .unwrap();
        let (sender, read_at_once) = mpsc::channel();
        thread::spawn(move || sender.send(read(&path)).unwrap());
        let error = read_at_once.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
        assert!(error.contains("not a file"), "{error}");
    }
}
