//! Files with networks: `guard.deny_files` and `guard.allow_files`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

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
    networks: Option<Vec<Network>>,
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
    pub(super) fn networks(&self) -> Option<&[Network]> {
        self.networks.as_deref()
    }

    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    pub(super) fn status(&self) -> ListStatus {
        ListStatus {
            file: self.path.clone(),
            networks: self.networks.as_ref().map_or(0, Vec::len),
            read_at: self.read_at,
            error: self.error.clone(),
        }
    }

    /// Reads the file if it has changed. Whether other networks or another error are in effect now.
    pub(super) fn refresh(&mut self) -> bool {
        let signature = Signature::of(&self.path).ok();
        if signature.is_some_and(|now| !now.is_fresh) && signature == self.seen {
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

/// The networks of a file, in order and each once.
///
/// # Errors
/// Names the file and what is wrong with it.
pub fn read(path: &Path) -> Result<Vec<Network>, String> {
    let text = contents(path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => format!(
            "{}: {error}: the injector reads files in /etc and in the directories that its configuration named when it \
             started, and only as the user that it runs as",
            path.display()
        ),
        _ => format!("{}: {error}", path.display()),
    })?;
    parse(&text).map_err(|bad| {
        let named: Vec<_> = bad
            .iter()
            .take(MAX_NAMED_LINES)
            .map(|(line, what)| format!("{}:{line}: {what}", path.display()))
            .collect();
        let more = bad.len().saturating_sub(MAX_NAMED_LINES);
        let more = if more > 0 { format!("\nand {more} more lines") } else { String::new() };
        format!("{}{more}", named.join("\n"))
    })
}

fn contents(path: &Path) -> io::Result<String> {
    // A pipe would be waited for.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    let mut bytes = Vec::new();
    File::take(file, MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("larger than {} MiB", MAX_BYTES >> 20)));
    }
    // Comments may be in any encoding.
    Ok(String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// One network a line; `#` and `;` begin comments. All bad lines, with their numbers.
fn parse(text: &str) -> Result<Vec<Network>, Vec<(usize, String)>> {
    let (mut networks, mut bad) = (Vec::new(), Vec::new());
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let entry = line.split(['#', ';']).next().unwrap_or_default().trim();
        if entry.is_empty() {
            continue;
        }
        match entry.parse::<Network>().and_then(check_width) {
            Ok(network) => networks.push(network),
            Err(advice) => {
                let entry: String = entry.chars().take(60).collect();
                bad.push((number + 1, format!("{entry:?}: {advice}")));
            }
        }
    }
    if !bad.is_empty() {
        return Err(bad);
    }
    networks.sort_unstable();
    networks.dedup();
    networks.shrink_to_fit();
    Ok(networks)
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
    use std::fs;

    use super::*;

    #[test]
    fn a_list_has_one_network_a_line_and_comments() {
        let text = "\u{feff}; Spamhaus DROP List\r\n192.0.2.0/24 ; SBL1\r\n\n  198.51.100.7 # a host\n2001:DB8::/32;SBL2\n192.0.2.0/24\n";
        let networks: Vec<_> = parse(text).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32"]);
        assert_eq!(parse("# nothing\n"), Ok(Vec::new()));
    }

    #[test]
    fn every_bad_line_is_named() {
        let text = "192.0.2.0/24\n192.0.2.7/24\nmail.example\n0.0.0.0/0\n2001::/8\n192.0.2.1 192.0.2.2\n";
        let bad = parse(text).unwrap_err();
        let lines: Vec<_> = bad.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [2, 3, 4, 5, 6]);
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
        assert!(!file.refresh(), "the same error is not news");
        fs::write(&path, "192.0.2.1\n").unwrap();
        assert!(file.refresh() && file.error().is_none());
        let before = file.networks().unwrap().to_vec();
        // In the same moment, with the same length.
        fs::write(&path, "192.0.2.x\n").unwrap();
        assert!(file.refresh());
        let error = file.error().unwrap();
        assert!(
            error.contains(&format!("{}:1: \"192.0.2.x\": must be a network", path.display())),
            "{error}"
        );
        assert_eq!(file.networks().unwrap(), before);
        assert_eq!(file.status().networks, 1);
        // Replaced by renaming, as tools do.
        fs::write(dir.path().join("new"), "192.0.2.2\n".repeat(3)).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(file.refresh() && file.error().is_none());
        assert_eq!(file.networks().unwrap(), ["192.0.2.2/32".parse().unwrap()]);
        fs::remove_file(&path).unwrap();
        assert!(file.refresh());
        assert_eq!(file.status().networks, 1);
    }

    #[test]
    fn a_message_names_twenty_lines_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deny.txt");
        fs::write(&path, "x\n".repeat(25)).unwrap();
        let error = read(&path).unwrap_err();
        assert_eq!(error.lines().count(), 21);
        assert!(error.ends_with("and 5 more lines"), "{error}");
    }

    #[test]
    fn what_is_not_a_file_or_too_large_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).is_err());
        assert!(read(Path::new("/dev/zero")).unwrap_err().contains("not a file"));
        let path = dir.path().join("large");
        File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(read(&path).unwrap_err().contains("larger than 64 MiB"));
    }
}
