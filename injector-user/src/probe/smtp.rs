//! Sends the message by SMTP.

use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow};
use lettre::{
    address::Envelope,
    transport::smtp::{
        authentication::{Credentials, Mechanism},
        client::{AsyncSmtpConnection, AsyncTokioStream},
        extension::ClientId,
    },
};

use super::{
    args::{Password, ProbeArgs, Security},
    message::Message,
    step::{Clock, Failure, Step},
    tls::{self, LettreStream, Trust},
};

/// Login mechanisms; the server chooses.
const MECHANISMS: [Mechanism; 2] = [Mechanism::Plain, Mechanism::Login];

/// Sends the message, and returns the local address of the connection.
pub(super) async fn send(
    args: &ProbeArgs,
    trust: &Trust,
    password: &Password,
    message: &Message,
    clock: &mut Clock,
) -> Result<IpAddr, Failure> {
    let hello = args.hello.clone().map_or_else(ClientId::default, ClientId::Domain);
    let security = args.smtp_security();
    let name = args.tls_name_of(&args.smtp);

    let tcp = clock.step(Step::SmtpConnect, tls::connect(&args.smtp)).await?;
    let local = tcp.local_addr().map(|address| address.ip().to_canonical());
    let local = local.map_err(|error| Failure { step: Step::SmtpConnect, error: error.to_string() })?;
    let stream: Box<dyn AsyncTokioStream> = match security {
        Security::Implicit => {
            let stream = clock.step(Step::SmtpTls, trust.secure(tcp, name)).await?;
            Box::new(LettreStream { stream })
        }
        Security::None | Security::Starttls => Box::new(tcp),
    };
    let greeting =
        async { AsyncSmtpConnection::connect_with_transport(stream, &hello).await.map_err(server_error) };
    let mut connection = clock.step(Step::SmtpGreeting, greeting).await?;
    if security == Security::Starttls {
        let starttls =
            async { connection.starttls(trust.lettre_parameters(name)?, &hello).await.map_err(server_error) };
        clock.step(Step::SmtpTls, starttls).await?;
    }
    let offered = connection.server_info().get_auth_mechanism(&MECHANISMS).is_some();
    if offered && security != Security::None {
        let credentials = Credentials::new(args.user.clone(), password.expose().to_owned());
        let login = async { connection.auth(&MECHANISMS, &credentials).await.map_err(server_error) };
        clock.step(Step::SmtpLogin, login).await?;
    }
    let send = async {
        let envelope = Envelope::new(Some(args.from.clone()), vec![args.to.clone()])
            .context("cannot build the SMTP envelope")?;
        connection.send(&envelope, &message.for_smtp()).await.map_err(server_error)
    };
    clock.step(Step::SmtpSend, send).await?;
    // The server has accepted the message, so an error here does not matter.
    let _ = connection.quit().await;
    Ok(local)
}

/// Each error in lettre's chain repeats the text of the next, so the first is enough.
fn server_error(error: lettre::transport::smtp::Error) -> anyhow::Error {
    anyhow!("{error}")
}
