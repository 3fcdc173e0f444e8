//! Runs `nft`, never through a shell, and explains its errors.

use std::{
    borrow::Cow,
    fmt,
    io::{self, Write},
    process::{Command, Output, Stdio},
    thread,
};

use caps::{CapSet, Capability};
use nftables::schema::{Chain, FlushObject, NfCmd, NfListObject, NfObject, Nftables, Rule, Table};
use nftables::types::NfFamily;
use serde_json::Value;
use thiserror::Error;

use super::{
    compare::{TableDiff, compare},
    ruleset::{Change, Ruleset},
    service::TableName,
};

/// The first of these that exists; services are often started without the sbin folders in PATH.
const PROGRAMS: [&str; 3] = ["nft", "/usr/sbin/nft", "/sbin/nft"];

/// Why the table could not be read or written. Nothing was changed: nft applies all of a
/// transaction or nothing.
#[derive(Debug, Error)]
pub enum NftError {
    /// No such program.
    #[error(
        "the program nft is neither in PATH nor in /usr/sbin: install the package nftables, or use nat = \"external\""
    )]
    Missing,
    /// The kernel wants CAP_NET_ADMIN in the user namespace that owns the network namespace.
    #[error("changing nftables in this network namespace needs CAP_NET_ADMIN ({said})")]
    NotPermitted {
        /// nft's message.
        said: String,
    },
    /// Part of nf_tables is not there: not built, or a module that cannot be loaded.
    #[error(
        "the kernel lacks {lacks}, needed for {piece} ({said}): load it with modprobe, or use nat = \"external\""
    )]
    Kernel {
        /// The modules to look for.
        lacks: &'static str,
        /// What needed it.
        piece: String,
        /// In nft's words.
        said: String,
    },
    /// Any other error of nft.
    #[error("nft rejected {piece}: {said}")]
    Refused {
        /// The first object that it refuses, or what was asked of it.
        piece: String,
        /// In nft's words.
        said: String,
    },
    /// nft could not be started or talked to.
    #[error("cannot run nft: {0}")]
    Run(#[from] io::Error),
    /// nft's output is not JSON.
    #[error("the output of nft is not JSON: {0}")]
    Answer(#[from] serde_json::Error),
}

impl Ruleset {
    /// Makes these rules the table's whole contents, in one transaction: every packet meets the old
    /// rules or the new ones. Established connections go on as they are. Reads the table first, and
    /// leaves it alone if it is the same.
    ///
    /// Blocks for some 20 ms; two runs of `nft`, more only to find out which rule was refused.
    ///
    /// # Errors
    /// [`NftError`]; then the table is as it was.
    pub fn apply(&self) -> Result<Change, NftError> {
        let (start, change) = match self.diff()? {
            Some(TableDiff::Same) => return Ok(Change::Unchanged),
            Some(TableDiff::OtherRules) => (Start::Flush, Change::Replaced),
            Some(TableDiff::OtherLayout) => (Start::Delete, Change::Remade),
            None => (Start::Flush, Change::Created),
        };
        execute(&self.transaction(start))?;
        Ok(change)
    }

    /// Whether the kernel has exactly these rules, in the chains they belong to, and nothing else
    /// in the table.
    ///
    /// `false` may also mean that this version of nft lists rules in a way that is not recognized;
    /// applying them again does no harm.
    ///
    /// # Errors
    /// [`NftError`]. That there is no table is not one.
    pub fn is_applied(&self) -> Result<bool, NftError> {
        Ok(self.diff()? == Some(TableDiff::Same))
    }

    /// The transaction that [`Self::apply`] gives to `nft -j -f -` where there was no table or one
    /// of the same layout.
    #[must_use]
    pub fn to_json(&self) -> String {
        render(&self.transaction(Start::Flush))
    }

    fn diff(&self) -> Result<Option<TableDiff>, NftError> {
        let listing = list(&["table", "inet", self.table.as_str()])?;
        Ok(listing.map(|listing| compare(self, &listing)))
    }

    fn transaction(&self, start: Start) -> Vec<NfObject<'static>> {
        let table = || NfListObject::Table(table(&self.table));
        let mut commands = vec![NfCmd::Add(table())];
        if start == Start::Delete {
            commands.extend([NfCmd::Delete(table()), NfCmd::Add(table())]);
        }
        commands.extend(self.chains.iter().cloned().map(|chain| NfCmd::Add(NfListObject::Chain(chain))));
        commands.push(NfCmd::Flush(FlushObject::Table(self::table(&self.table))));
        commands.extend(self.rules.iter().cloned().map(|rule| NfCmd::Add(NfListObject::Rule(rule))));
        commands.into_iter().map(NfObject::CmdObject).collect()
    }
}

/// How a transaction makes room.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    /// The chains stay hooked in and get new rules. With deleted and new chains instead, a packet
    /// could pass the new one before the change takes effect and the old one after
    /// (nf_tables_commit, net/netfilter/nf_tables_api.c): known from reading only, 300 replacements
    /// that way under load have shown no such packet.
    Flush,
    /// All goes, for what else is in the table.
    Delete,
}

/// Deletes the table with everything in it, if it exists. Blocks, as [`Ruleset::apply`].
///
/// Unless other tables make the kernel track and translate connections, this also ends the
/// forwarded connections; apply a ruleset without services first to let them finish.
///
/// # Errors
/// [`NftError`].
pub fn remove(name: &TableName) -> Result<(), NftError> {
    // Deleting what is not there is an error; so it is made sure of first, in the same transaction.
    let commands =
        [NfCmd::Add(NfListObject::Table(table(name))), NfCmd::Delete(NfListObject::Table(table(name)))];
    execute(&commands.map(NfObject::CmdObject))
}

/// Whether there is a table of this name. One run of `nft`.
///
/// # Errors
/// [`NftError`].
pub fn exists(name: &TableName) -> Result<bool, NftError> {
    Ok(list(&["table", "inet", name.as_str()])?.is_some())
}

/// A chain of another program that drops what its rules do not accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DroppingChain {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// The table's name.
    pub table: String,
    /// The chain's name.
    pub chain: String,
}

impl fmt::Display for DroppingChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.family, self.table, self.chain)
    }
}

/// The nftables chains that drop forwarded packets unless a rule accepts them (for example Docker's
/// or ufw's), so that the log can name the chains in which to accept the inline engine's
/// connections. Does not find rules of iptables-legacy.
///
/// # Errors
/// [`NftError`].
pub fn chains_that_drop_forwarded() -> Result<Vec<DroppingChain>, NftError> {
    let listing = list(&["chains"])?.unwrap_or_default();
    let objects = listing.get("nftables").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    Ok(objects.iter().filter_map(|object| dropping(object.get("chain")?)).collect())
}

fn dropping(chain: &Value) -> Option<DroppingChain> {
    let text = |key: &str| chain.get(key).and_then(Value::as_str);
    let drops = text("hook") == Some("forward") && text("policy") == Some("drop");
    let routed = matches!(text("family"), Some("ip" | "ip6" | "inet"));
    let name = |key| text(key).map(ToOwned::to_owned);
    (drops && routed).then(|| {
        Some(DroppingChain { family: name("family")?, table: name("table")?, chain: name("name")? })
    })?
}

fn table(name: &TableName) -> Table<'static> {
    Table { family: NfFamily::INet, name: Cow::Owned(name.as_str().to_owned()), handle: None }
}

/// `nft -j list WHAT…`; `None` if there is no such thing.
fn list(what: &[&str]) -> Result<Option<Value>, NftError> {
    let output = run(&[&["-j", "list"], what].concat(), "")?;
    if output.status.success() {
        return Ok(Some(serde_json::from_slice(&output.stdout)?));
    }
    let said = complaint(&output);
    if said.contains(NOT_THERE) && !said.contains(NO_CACHE) {
        return Ok(None);
    }
    Err(explain(said, Piece::asked(format!("to list {}", what.join(" ")))))
}

/// All of it, or nothing and the reason.
fn execute(objects: &[NfObject<'static>]) -> Result<(), NftError> {
    let output = run(&["-j", "-f", "-"], &render(objects))?;
    if output.status.success() {
        return Ok(());
    }
    let refused = first_refused(objects, check)?;
    let (piece, said) = match refused.and_then(|(at, said)| Some((objects.get(at)?, said))) {
        Some((object, said)) => (Piece::of(object), said),
        // A second attempt would succeed: another program changed the table in between.
        None => (Piece::asked("the transaction".to_owned()), complaint(&output)),
    };
    Err(explain(said, piece))
}

/// The first object that makes a transaction fail, with nft's message. nft does not report this for
/// JSON, so it is found by trying.
fn first_refused(
    objects: &[NfObject<'static>],
    try_out: impl Fn(&[NfObject<'static>]) -> Result<Output, NftError>,
) -> Result<Option<(usize, String)>, NftError> {
    let (mut accepted, mut end, mut refused) = (0, objects.len(), None);
    while accepted < end {
        let middle = accepted + (end - accepted) / 2;
        let output = try_out(objects.get(..=middle).unwrap_or_default())?;
        if output.status.success() {
            accepted = middle + 1;
        } else {
            end = middle;
            refused = Some((middle, complaint(&output)));
        }
    }
    Ok(refused)
}

/// As far as the kernel would take it, without changing anything.
fn check(objects: &[NfObject<'static>]) -> Result<Output, NftError> {
    run(&["-c", "-j", "-f", "-"], &render(objects))
}

fn render(objects: &[NfObject<'static>]) -> String {
    let objects = Nftables { objects: Cow::Owned(objects.to_vec()) };
    // Strings and numbers always have a JSON form; nft would refuse an empty text.
    serde_json::to_string(&objects).unwrap_or_default()
}

/// Runs nft on a thread of its own, which hands CAP_NET_ADMIN on: a daemon that is not root has it
/// as a capability that would otherwise be lost at exec(2).
fn run(args: &[&str], input: &str) -> Result<Output, NftError> {
    let inside = || {
        // Fails if the daemon lacks the capability; nft then reports it.
        let _ = caps::raise(None, CapSet::Inheritable, Capability::CAP_NET_ADMIN)
            .and_then(|()| caps::raise(None, CapSet::Ambient, Capability::CAP_NET_ADMIN));
        start(&PROGRAMS, args, input)
    };
    thread::scope(|scope| scope.spawn(inside).join())
        .unwrap_or_else(|_| Err(io::Error::other("the thread that ran it panicked").into()))
}

fn start(programs: &[&str], args: &[&str], input: &str) -> Result<Output, NftError> {
    for program in programs {
        let mut command = Command::new(program);
        command.args(args).env("LC_ALL", "C");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            child => child?,
        };
        // All of the input is read before anything is answered, so neither side waits for the
        // other. Where nft gives up early, its complaint says more than the broken pipe.
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        if output.status.success() {
            written?;
        }
        return Ok(output);
    }
    Err(NftError::Missing)
}

/// What a refusal is about.
#[derive(Debug)]
struct Piece {
    name: String,
    /// The kernel modules that serve it.
    modules: &'static str,
}

impl Piece {
    fn asked(name: String) -> Self {
        Self { name, modules: "nf_tables" }
    }

    fn of(object: &NfObject<'static>) -> Self {
        let NfObject::CmdObject(command) = object else { return Self::asked("the transaction".to_owned()) };
        match command {
            NfCmd::Add(NfListObject::Chain(chain)) => Self::of_chain(chain),
            NfCmd::Add(NfListObject::Rule(rule)) => Self::of_rule(rule),
            NfCmd::Add(NfListObject::Table(table)) => Self::asked(format!("table inet {}", table.name)),
            NfCmd::Delete(NfListObject::Table(table)) => {
                Self::asked(format!("to delete table inet {}", table.name))
            }
            NfCmd::Flush(FlushObject::Table(table)) => {
                Self::asked(format!("to flush table inet {}", table.name))
            }
            _ => Self::asked("the transaction".to_owned()),
        }
    }

    fn of_chain(chain: &Chain<'_>) -> Self {
        let name = format!("the nat chain {} of table inet {}", chain.name, chain.table);
        Self { name, modules: "nf_nat with nft_chain_nat" }
    }

    fn of_rule(rule: &Rule<'_>) -> Self {
        let statements = serde_json::to_string(&rule.expr).unwrap_or_default();
        let service = rule.comment.as_deref().unwrap_or_default();
        let name = format!("the rule of {service} in chain {}: {statements}", rule.chain);
        Self { name, modules: "one of nft_nat, nft_masq, nft_ct, nft_fib_inet and nft_numgen" }
    }
}

/// ENOENT, which the kernel also gives for an expression or a chain type that it does not have.
const NOT_THERE: &str = "No such file or directory";
/// What nft says first if it cannot even ask for what there is.
const NO_CACHE: &str = "cache initialization failed";

fn explain(said: String, piece: Piece) -> NftError {
    let has = |part: &str| said.contains(part);
    if has("Operation not permitted") || has("Permission denied") {
        return NftError::NotPermitted { said };
    }
    // Our transactions speak only of what they have made themselves, so ENOENT is about the
    // kernel's parts.
    if has(NOT_THERE) || has("not supported") || has(NO_CACHE) {
        return NftError::Kernel { lacks: piece.modules, piece: piece.name, said };
    }
    NftError::Refused { piece: piece.name, said }
}

/// nft's first line of complaint, without the place in the input, which for JSON is always the
/// same.
fn complaint(output: &Output) -> String {
    // With -j and a syntax error in the JSON, nft complains on standard output.
    let text =
        [&output.stderr, &output.stdout].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    let line = text.lines().map(str::trim).find(|line| !line.is_empty());
    match line {
        Some(line) => line.trim_start_matches("internal:0:0-0: ").trim_start_matches("Error: ").to_owned(),
        None => format!("it ended with {} and said nothing", output.status),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

    use super::*;

    fn explained(stderr: &str, piece: Piece) -> NftError {
        let output = Output {
            status: ExitStatus::from_raw(256),
            stdout: Vec::new(),
            stderr: stderr.as_bytes().to_vec(),
        };
        explain(complaint(&output), piece)
    }

    fn chain() -> Piece {
        Piece { name: "a chain".to_owned(), modules: "nf_nat with nft_chain_nat" }
    }

    #[test]
    fn a_missing_program_error_names_the_package() {
        let error = start(&["/nonexistent/nft", "/nonexistent/too"], &[], "").unwrap_err();
        assert!(matches!(error, NftError::Missing));
        assert!(error.to_string().contains("package nftables"), "{error}");
    }

    #[test]
    fn errors_of_nft_are_classified() {
        let cases = [
            (
                "Operation not permitted (you must be root)\nnetlink: Error: cache initialization failed",
                "CAP_NET_ADMIN",
            ),
            (
                "internal:0:0-0: Error: Could not process rule: No such file or directory\n\n",
                "lacks nf_nat with nft_chain_nat, needed for a chain (Could not process rule",
            ),
            ("internal:0:0-0: Error: Could not process rule: Operation not supported", "lacks nf_nat"),
            ("netlink: Error: cache initialization failed: Protocol not supported", "lacks nf_nat"),
            (
                "internal:0:0-0: Error: Could not process rule: Device or resource busy",
                "nft rejected a chain: Could not process rule: Device or resource busy",
            ),
            ("", "it ended with exit status: 1 and said nothing"),
        ];
        for (stderr, expected) in cases {
            let error = explained(stderr, chain()).to_string();
            assert!(error.contains(expected), "{stderr:?} became {error:?}");
        }
    }

    #[test]
    fn the_first_refused_object_is_found() {
        let named = |name: String| {
            let table = Table { family: NfFamily::INet, name: Cow::Owned(name), handle: None };
            NfObject::CmdObject(NfCmd::Add(NfListObject::Table(table)))
        };
        let objects: Vec<_> = (0..9).map(|number| named(format!("t{number}"))).collect();
        for first in 0..=objects.len() {
            let try_out = |tried: &[NfObject<'static>]| {
                let status = ExitStatus::from_raw(if tried.len() > first { 256 } else { 0 });
                let stderr = format!("Error: after {}\n", tried.len()).into_bytes();
                Ok(Output { status, stdout: Vec::new(), stderr })
            };
            let found = first_refused(&objects, try_out).unwrap();
            let expected = (first < objects.len()).then(|| (first, format!("after {}", first + 1)));
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn only_forward_chains_of_routed_families_are_reported() {
        let chain = |family: &str, hook: &str, policy: &str| serde_json::json!({"family": family, "table": "filter", "name": "F", "hook": hook, "policy": policy});
        let found = dropping(&chain("ip", "forward", "drop")).unwrap();
        assert_eq!(found.to_string(), "ip filter F");
        for other in [
            chain("ip", "input", "drop"),
            chain("ip", "forward", "accept"),
            chain("bridge", "forward", "drop"),
            serde_json::json!({"family": "ip", "table": "filter", "name": "plain"}),
        ] {
            assert_eq!(dropping(&other), None);
        }
    }
}
