//! Bans: by command and by file, at accept and in the kernel, over restarts.

use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use injector_testbed::daemon::{self, GUARD_BANS, GUARD_DROPPED_PACKETS, Injector};
use injector_testbed::netns::{CLIENT, EDGE_OUTSIDE, Family, MAIL, VIP_SPLICE};
use injector_testbed::wait::wait_until;
use serde_json::Value;
use tempfile::TempDir;

use crate::Run;
use crate::testbed::{Config, PORT, Testbed};

pub(crate) const TRIALS: &[(&str, Run)] = &[
    ("bans/a command is in the kernel when it returns, and ends sessions", command),
    ("bans/at accept, without the kernel", at_accept),
];

/// What does not depend on the engine.
pub(crate) const RELAY_TRIALS: &[(&str, Run)] = &[
    ("files are followed", files),
    ("a restart keeps them", restart),
    ("what may not be banned", refused),
    ("a reload", reload),
    ("100,000 from a file do not delay accepts", many),
];

/// How long an answer to a SYN may take; the next SYN comes after a second.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// A guard whose programs see no packet of a client, so that only the daemon decides.
const ONLY_AT_ACCEPT: &str = "devices = [\"lo\"]";

/// The guard of one trial: its pins, and files.
#[derive(Debug)]
struct Site {
    pin: PathBuf,
    dir: TempDir,
}

impl Site {
    fn new(testbed: &Testbed) -> anyhow::Result<Self> {
        Ok(Self { pin: testbed.bpffs.path().join("guard"), dir: TempDir::new()? })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self, engine: &str, lines: &str) -> String {
        let mut config = Config::new(engine);
        config.top = format!("[guard]\npin = \"{}\"\n{lines}\n", self.pin.display());
        config.text()
    }
}

impl Drop for Site {
    /// Maps and links outlive the daemon, and are released with their pins.
    fn drop(&mut self) {
        remove_pins(&self.pin);
    }
}

fn remove_pins(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        if path.is_dir() {
            remove_pins(&path);
        } else {
            let _ = fs::remove_file(path);
        }
    }
    let _ = fs::remove_dir(dir);
}

/// What becomes of a new client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Served,
    /// Accepted, and reset without a byte.
    Reset,
    /// Its SYN has no answer.
    Dropped,
}

fn answer(testbed: &Testbed) -> anyhow::Result<Answer> {
    let address = SocketAddr::new(VIP_SPLICE.of(Family::V4), PORT);
    let mut stream =
        match testbed.topology.client.run(|| TcpStream::connect_timeout(&address, CONNECT_TIMEOUT))? {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::TimedOut => return Ok(Answer::Dropped),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Answer::Reset),
            Err(error) => return Err(error.into()),
        };
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut greeting = [0; 64];
    match stream.read(&mut greeting) {
        Ok(1..) if greeting.starts_with(b"220 ") => Ok(Answer::Served),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Answer::Reset),
        other => bail!("{other:?} in place of a greeting or a reset"),
    }
}

fn becomes(testbed: &Testbed, expected: Answer) -> anyhow::Result<()> {
    wait_until("a new client", || answer(testbed), |answer| *answer == expected).map(drop)
}

fn expect(testbed: &Testbed, expected: Answer) -> anyhow::Result<()> {
    let answer = answer(testbed)?;
    ensure!(answer == expected, "{answer:?}, not {expected:?}");
    Ok(())
}

fn client() -> String {
    CLIENT.v4.to_string()
}

/// The rows of `injector bans`.
fn bans(injector: &Injector, words: &[&str]) -> anyhow::Result<Vec<Value>> {
    let printed = injector.command(&[&["bans", "--json"], words].concat())?;
    let answer: Value = serde_json::from_str(&printed)?;
    Ok(answer["bans"]["rows"].as_array().cloned().unwrap_or_default())
}

fn command(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (_server, site) = (testbed.backend(0)?, Site::new(testbed)?);
    let injector = testbed.start(&site.config(engine, ""))?;
    let mut session = testbed.client()?;
    session.greeted()?;
    session.talk()?;
    let start = Instant::now();
    let printed = injector.command(&["ban", &client(), "--for", "1h", "--reason", "a trial"])?;
    let returned = start.elapsed();
    ensure!(printed.starts_with("198.51.100.7/32 is banned, until 2"), "{printed}");
    ensure!(printed.ends_with("; 1 session ended\n"), "{printed}");
    expect(testbed, Answer::Dropped)?;
    println!("{engine}: `injector ban` returned after {returned:?}, and the next SYN was dropped");
    ensure!(session.talk().is_err(), "the session goes on");
    wait_until(
        "close",
        || injector.sessions_within(1),
        |all| all.iter().all(|it| it.field("reason").as_deref() == Some("ended_by_operator")),
    )?;
    let metrics = injector.metrics()?;
    ensure!(metrics.sum(GUARD_DROPPED_PACKETS, &[]) > 0.5, "{metrics:?}");
    ensure!((metrics.sum(GUARD_BANS, &[("origin", "command")]) - 1.0).abs() < 0.5);
    let rows = bans(&injector, &["--origin", "command"])?;
    ensure!(rows.len() == 1 && rows[0]["reason"] == "a trial", "{rows:?}");
    ensure!(
        rows[0]["remaining_ms"].as_u64().is_some_and(|left| left > 3_500_000 && left <= 3_600_000),
        "{rows:?}"
    );
    ensure!(injector.status()?["guard"]["command"] == 1);
    let printed = injector.command(&["ban", &client()])?;
    ensure!(printed == "198.51.100.7/32 is banned again, without end\n", "{printed}");
    ensure!(bans(&injector, &[])?[0]["until"].is_null());
    let printed = injector.command(&["unban", &client()])?;
    ensure!(printed == "198.51.100.7/32: ban lifted\n", "{printed}");
    expect(testbed, Answer::Served)?;
    let printed = injector.command(&["unban", &client()])?;
    ensure!(printed == "198.51.100.7/32 was not banned by command\n", "{printed}");
    Ok(())
}

fn at_accept(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (server, site) = (testbed.backend(0)?, Site::new(testbed)?);
    let injector = testbed.start(&site.config(engine, ONLY_AT_ACCEPT))?;
    expect(testbed, Answer::Served)?;
    let before = server.seen();
    injector.command(&["ban", "198.51.100.0/24", "--for", "1500ms"])?;
    let banned = Instant::now();
    expect(testbed, Answer::Reset)?;
    let rejected = injector.metrics()?.sum("injector_connections_rejected_total", &[("reason", "banned")]);
    ensure!((rejected - 1.0).abs() < 0.5, "{rejected}");
    ensure!(server.seen() == before, "a banned client reached the backend");
    becomes(testbed, Answer::Served)?;
    let lasted = banned.elapsed();
    ensure!(lasted >= Duration::from_millis(1400), "it lasted {lasted:?}");
    ensure!(bans(&injector, &[])?.is_empty());
    Ok(())
}

fn refused(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (_server, site) = (testbed.backend(0)?, Site::new(testbed)?);
    let lines = format!("{ONLY_AT_ACCEPT}\nallow = [\"192.0.2.128/25\"]");
    let injector = testbed.start(&site.config(engine, &lines))?;
    let is_refused = |words: &[&str], advice: &str| {
        let (status, printed) = injector.try_command(&[&["ban"], words].concat())?;
        ensure!(!status.success() && printed.contains(advice), "ban {}: {printed}", words.join(" "));
        Ok(())
    };
    // The addresses of backends come from the running server.
    let backend = MAIL.v4.to_string();
    wait_until("the backend", || injector.try_command(&["ban", &backend]), |(status, _)| !status.success())?;
    is_refused(&[&backend, "--force"], "it is the address of a backend")?;
    is_refused(&[&EDGE_OUTSIDE.v4.to_string()], "it is an address of this host")?;
    is_refused(&[&EDGE_OUTSIDE.v6.to_string()], "it is an address of this host")?;
    is_refused(&["192.0.2.200"], "guard.allow or guard.allow_files contains it")?;
    is_refused(&["198.0.0.0/8"], "add --force")?;
    is_refused(&["2000::/3"], "add --force")?;
    is_refused(&["192.0.2.7/24"], "write \"192.0.2.0/24\"")?;
    is_refused(&["192.0.2.7", "--for", "0s"], "longer than 0")?;
    is_refused(&["192.0.2.7", "--reason", "two\nlines"], "one line")?;
    // Not from where the operator is logged in.
    let from_ssh = |words: &[&str]| -> anyhow::Result<bool> {
        let mut command = Command::new(daemon::binary()?);
        command.args(words).env("INJECTOR_SOCKET", injector.admin_socket());
        command.env("SSH_CONNECTION", "203.0.113.9 50022 198.51.100.1 22").env_remove("SSH_CLIENT");
        Ok(command.output()?.status.success())
    };
    ensure!(!from_ssh(&["ban", "203.0.113.0/24"])?, "the operator banned itself");
    ensure!(from_ssh(&["ban", "203.0.113.8"])? && from_ssh(&["ban", "203.0.113.0/24", "--force"])?);
    // A network may contain them: they stay reachable.
    injector.command(&["ban", "10.0.0.0/8", "--force"])?;
    expect(testbed, Answer::Served)?;
    injector.command(&["ban", "198.0.0.0/8", "--force"])?;
    expect(testbed, Answer::Reset)?;
    Ok(())
}

fn files(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (_server, site) = (testbed.backend(0)?, Site::new(testbed)?);
    let (deny, allow) = (site.file("deny.txt"), site.file("allow.txt"));
    let replace = |file: &Path, text: &str| {
        fs::write(site.file("new"), text)?;
        fs::rename(site.file("new"), file)
    };
    replace(&deny, "; a list\n192.0.2.0/24 ; SBL1\n")?;
    replace(&allow, "# nothing\n")?;
    let lines = format!("{ONLY_AT_ACCEPT}\ndeny_files = [{deny:?}]\nallow_files = [{allow:?}]");
    let injector = testbed.start(&site.config(engine, &lines))?;
    let listed = || Ok(injector.status()?["guard"]["list"].clone());
    wait_until("the list", listed, |count| *count == 1)?;
    let mut session = testbed.client()?;
    session.greeted()?;
    let start = Instant::now();
    replace(&deny, "192.0.2.0/24\n198.51.100.0/24 # the client\n")?;
    becomes(testbed, Answer::Reset)?;
    session.ends(engine)?;
    println!("a changed list was in effect after {:?}", start.elapsed());
    // A bad list changes nothing, and is named with its lines.
    replace(&deny, "192.0.2.0/24\nmail.example\n192.0.2.7/24\n")?;
    let error =
        || Ok(injector.status()?["guard"]["lists"][0]["error"].as_str().unwrap_or_default().to_owned());
    let error = wait_until("an error", error, |error| !error.is_empty())?;
    for line in ["deny.txt:2: \"mail.example\": must be a network", "deny.txt:3: \"192.0.2.7/24\""] {
        ensure!(error.contains(line), "{error}");
    }
    ensure!(injector.command(&["status"])?.contains("list not read: "));
    ensure!(injector.command(&["reload", "--dry-run"])?.contains("warning: "));
    ensure!(injector.metrics()?.sum("injector_guard_list_failed", &[]) > 0.5);
    expect(testbed, Answer::Reset)?;
    let printed = injector.command(&["unban", &client()])?;
    ensure!(
        printed.contains(&format!("still banned: 198.51.100.0/24 by {}: remove it there", deny.display())),
        "{printed}"
    );
    // Allow wins.
    replace(&allow, "198.51.100.7\n")?;
    becomes(testbed, Answer::Served)?;
    replace(&deny, "192.0.2.0/24\n")?;
    wait_until("the list", listed, |count| *count == 1)?;
    ensure!(injector.metrics()?.sum("injector_guard_list_failed", &[]) < 0.5);
    Ok(())
}

fn restart(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (_server, site) = (testbed.backend(0)?, Site::new(testbed)?);
    // In the kernel: also after a kill, and while no daemon runs.
    let config = site.config(engine, "");
    let injector = testbed.start(&config)?;
    injector.command(&["ban", &client(), "--for", "1h"])?;
    drop(injector);
    expect(testbed, Answer::Dropped)?;
    let injector = testbed.start(&config)?;
    expect(testbed, Answer::Dropped)?;
    let rows = bans(&injector, &[])?;
    ensure!(rows.len() == 1 && rows[0]["reason"] == "from before the restart", "{rows:?}");
    injector.command(&["unban", &client()])?;
    expect(testbed, Answer::Served)?;
    drop(injector);
    remove_pins(&site.pin);
    // In the state file: with the reason, and without the kernel.
    let config = site.config(engine, &format!("{ONLY_AT_ACCEPT}\nstate = {:?}", site.file("bans")));
    let injector = testbed.start(&config)?;
    injector.command(&["ban", &client(), "--for", "1h", "--reason", "a trial"])?;
    injector.command(&["ban", "192.0.2.9"])?;
    injector.stop()?;
    remove_pins(&site.pin);
    let injector = testbed.start(&config)?;
    expect(testbed, Answer::Reset)?;
    let rows = bans(&injector, &["--origin", "command"])?;
    ensure!(rows.len() == 2, "{rows:?}");
    ensure!(rows[1]["reason"] == "a trial" && rows[1]["remaining_ms"].as_u64() < Some(3_600_000), "{rows:?}");
    ensure!(rows[0]["until"].is_null(), "{rows:?}");
    Ok(())
}

fn reload(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    let (_server, site) = (testbed.backend(0)?, Site::new(testbed)?);
    let injector = testbed.start(&site.config(engine, ONLY_AT_ACCEPT))?;
    injector.rewrite(&site.config(engine, &format!("{ONLY_AT_ACCEPT}\ndeny = [\"198.51.100.0/24\"]")))?;
    let printed = injector.command(&["reload"])?;
    ensure!(printed == "no changes\n", "{printed}");
    becomes(testbed, Answer::Reset)?;
    let lines = "devices = [\"lo\"]\nmax_bans = 5\ndeny = [\"198.51.100.0/24\"]\nallow = [\"198.51.100.7\"]";
    injector.rewrite(&site.config(engine, lines))?;
    let printed = injector.command(&["reload"])?;
    ensure!(printed.ends_with("needs a restart: guard.max_bans\n"), "{printed}");
    becomes(testbed, Answer::Served)?;
    injector.rewrite(&Config::new(engine).text())?;
    let printed = injector.command(&["reload", "--dry-run"])?;
    ensure!(printed.contains("would need a restart: guard\n"), "{printed}");
    Ok(())
}

fn many(testbed: &Testbed, engine: &str) -> anyhow::Result<()> {
    const COUNT: u32 = 100_000;
    let (_server, site) = (testbed.backend(0)?, Site::new(testbed)?);
    let deny = site.file("deny.txt");
    let injector = testbed.start(&site.config(engine, &format!("deny_files = [{deny:?}]")))?;
    let mut text = String::new();
    for number in 0..COUNT {
        let address = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(100, 64, 0, 0)) + number * 7);
        writeln!(text, "{address}")?;
    }
    fs::write(site.file("new"), text)?;
    fs::rename(site.file("new"), &deny)?;
    let (start, mut longest, mut served) = (Instant::now(), Duration::ZERO, 0);
    loop {
        let before = Instant::now();
        let mut client = testbed.client()?;
        client.greeted()?;
        longest = longest.max(before.elapsed());
        served += 1;
        if served % 20 == 0 && injector.metrics()?.sum("injector_guard_list_networks", &[]) > 0.5 {
            break;
        }
        ensure!(start.elapsed() < Duration::from_secs(60), "not loaded");
    }
    println!(
        "{COUNT} bans of a file were in effect after {:?}; {served} clients meanwhile, the slowest greeting after {longest:?}",
        start.elapsed()
    );
    ensure!(longest < Duration::from_secs(1), "a client waited for {longest:?}");
    ensure!(injector.status()?["guard"]["list"] == COUNT);
    Ok(())
}
