//! nginx, in front of a mail server's standard ports on the same host: `mail`, which asks a program
//! over HTTP where each client goes, and `stream`, which does not know the protocol.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use anyhow::Context;

use super::{Receiver, directory, write};
use crate::certificate::Certificate;
use crate::netns::Netns;

/// The port of the program that nginx asks, as in `docs/receivers.md`.
const AUTH_PORT: u16 = 3080;

/// What the program answers: Postfix on the standard port.
const ANSWER: &[u8] =
    b"HTTP/1.0 200 OK\r\nAuth-Status: OK\r\nAuth-Server: 127.0.0.1\r\nAuth-Port: 25\r\n\r\n";

/// Starts it with these blocks `mail` and `stream`, which listen on `ports`. The log has
/// `mail [CLIENT]` and `stream [CLIENT]`.
///
/// # Errors
/// When nginx or a module is not installed, or it rejects the blocks.
pub fn start(
    netns: &Netns,
    certificate: &Certificate,
    blocks: &str,
    ports: &[u16],
) -> anyhow::Result<Receiver> {
    let dir = directory("nginx")?;
    let log = dir.path().join("clients");
    fs::write(&log, "")?;
    answer(netns, File::options().append(true).open(&log)?)?;
    let blocks = blocks
        .replace("/etc/ssl/mail.crt", &certificate.chain.display().to_string())
        .replace("/etc/ssl/mail.key", &certificate.key.display().to_string())
        .replace(
            "stream {",
            &format!(
                "stream {{\n log_format client 'stream [$remote_addr]';\n access_log {} client;",
                log.display()
            ),
        );
    let modules = modules()?;
    let conf = format!(
        "load_module {modules}/ngx_mail_module.so;
load_module {modules}/ngx_stream_module.so;
daemon off;
user root;
worker_processes 1;
pid {dir}/pid;
error_log {dir}/error.log info;
events {{ worker_connections 256; }}
{blocks}",
        dir = dir.path().display(),
    );
    let conf = write(dir.path(), "nginx.conf", &conf)?;
    let mut command = netns.command("nginx");
    command.arg("-e").arg(dir.path().join("error.log")).arg("-c").arg(conf);
    Receiver::start("nginx", netns, dir, command, "clients", ports)
}

/// The folder of the modules, which differs between distributions.
fn modules() -> anyhow::Result<String> {
    let places = ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"];
    let place = places.into_iter().find(|place| Path::new(place).join("ngx_mail_module.so").exists());
    place.map(str::to_owned).context("nginx' mail module is missing: run `cargo xtask setup --only mail`")
}

/// Answers nginx' questions until the process ends, and logs the clients in them.
fn answer(netns: &Netns, mut log: File) -> anyhow::Result<()> {
    let listener = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, AUTH_PORT)))??;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // nginx detects errors.
            let _ = answer_one(&stream, &mut log);
        }
    });
    Ok(())
}

fn answer_one(mut stream: &TcpStream, log: &mut File) -> std::io::Result<()> {
    for line in BufReader::new(stream).lines() {
        let line = line?;
        if let Some(client) = line.strip_prefix("Client-IP: ") {
            writeln!(log, "mail [{client}]")?;
        }
        if line.is_empty() {
            break;
        }
    }
    stream.write_all(ANSWER)
}
