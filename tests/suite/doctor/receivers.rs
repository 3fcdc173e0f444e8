//! Receivers with behaviour that Postfix and Dovecot cannot have: SMTP only with a greeting, a
//! rejected recipient, and QUIT.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use injector_common::proxy::{self, Version};
use injector_testbed::netns::{MAIL, Netns};

/// Accepts only v1, and closes on anything else.
pub(crate) const V1_ONLY: u16 = 2601;
/// Accepts only v2, and closes on anything else.
pub(crate) const V2_ONLY: u16 = 2602;
/// Accepts a header if there is one.
pub(crate) const OPTIONAL: u16 = 2603;
/// Accepts v2, and closes on TLVs.
pub(crate) const NO_TLVS: u16 = 2604;

/// All four; they stop with the process.
#[derive(Debug)]
pub(crate) struct Receivers;

impl Receivers {
    pub(crate) fn start(netns: &Netns) -> anyhow::Result<Self> {
        for port in [V1_ONLY, V2_ONLY, OPTIONAL, NO_TLVS] {
            let listener = netns.run(|| TcpListener::bind((MAIL.v4, port)))?.context("a receiver")?;
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || serve(stream, port));
                }
            });
        }
        Ok(Self)
    }
}

/// The client detects errors.
fn serve(mut stream: TcpStream, port: u16) -> Option<()> {
    let wait = if port == OPTIONAL { Duration::from_millis(300) } else { Duration::from_secs(4) };
    stream.set_read_timeout(Some(wait)).ok()?;
    let mut first = [0; 536];
    let seen = match stream.peek(&mut first) {
        Ok(0) => return None,
        Ok(count) => first.get(..count)?,
        Err(_) if port == OPTIONAL => &[],
        Err(_) => return None,
    };
    let header = match proxy::parse(seen) {
        Ok(parsed) => {
            let known = match port {
                V1_ONLY => parsed.version == Version::One,
                V2_ONLY => parsed.version == Version::Two,
                NO_TLVS => parsed.version == Version::Two && parsed.tlvs.count() == 0,
                _ => true,
            };
            if !known {
                return None;
            }
            parsed.len
        }
        Err(_) if port == OPTIONAL && seen.is_empty() => 0,
        Err(_) => return None,
    };
    stream.read_exact(first.get_mut(..header)?).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.write_all(b"220 demo.example.test ESMTP\r\n").ok()?;
    for line in BufReader::new(stream.try_clone().ok()?).lines() {
        let line = line.ok()?;
        let answer = match line.split([' ', ':']).next()? {
            "EHLO" | "MAIL" | "NOOP" | "RSET" => "250 2.0.0 Ok\r\n",
            "RCPT" => "554 5.7.1 Relay access denied\r\n",
            "QUIT" => "221 2.0.0 Bye\r\n",
            _ => "500 5.5.2 What?\r\n",
        };
        stream.write_all(answer.as_bytes()).ok()?;
        if !answer.starts_with("250") && !answer.starts_with("554") {
            break;
        }
    }
    Some(())
}
