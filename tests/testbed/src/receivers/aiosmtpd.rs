//! aiosmtpd, Python's SMTP server. The program prints `client [CLIENT]:PORT`.

use super::{OUTPUT, Receiver, directory, write};
use crate::certificate::Certificate;
use crate::netns::{MAIL, Netns};

/// `$1`, `$2`: certificate and key. `$3`: the port. Then the addresses.
const PROGRAM: &str = r#"
import asyncio, ssl, sys
from aiosmtpd.smtp import SMTP


class Handler:
    async def handle_PROXY(self, server, session, envelope, header):
        print(f"client [{header.src_addr}]:{header.src_port}", flush=True)
        return True

    async def handle_RCPT(self, server, session, envelope, address, options):
        if not address.endswith("@example.test"):
            return "550 5.7.1 relay not permitted"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        return "250 OK"


async def main(chain, key, port, *addresses):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(chain, key)
    loop = asyncio.get_running_loop()
    for address in addresses:
        await loop.create_server(
            lambda: SMTP(Handler(), hostname="mail.example.test", tls_context=tls, loop=loop, SETTINGS),
            address,
            int(port),
        )
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
"#;

/// Starts it with these arguments of `SMTP`, for example those of `docs/receivers.md`.
///
/// # Errors
/// When aiosmtpd is not installed, or rejects them.
pub fn start(
    netns: &Netns,
    certificate: &Certificate,
    settings: &str,
    port: u16,
) -> anyhow::Result<Receiver> {
    let dir = directory("aiosmtpd")?;
    let program = write(dir.path(), "server.py", &PROGRAM.replace("SETTINGS", settings.trim()))?;
    // Debian's own Python, which has Debian's packages.
    let mut command = netns.command("/usr/bin/python3");
    command.arg(program).arg(&certificate.chain).arg(&certificate.key);
    command.args([port.to_string(), MAIL.v4.to_string(), MAIL.v6.to_string()]);
    Receiver::start("aiosmtpd", netns, dir, command, OUTPUT, &[port])
}
