//! A certificate authority of the test run, and the mail servers' certificate.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};

/// The name that clients expect in the certificate, and the mail servers' own.
pub const MAIL_NAME: &str = "mail.example.test";

/// Certificate and key as files, and the authority to trust.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// PEM file with the servers' certificate.
    pub chain: PathBuf,
    /// PEM file with its key, readable by root only.
    pub key: PathBuf,
    /// The authority's certificate, PEM.
    pub authority_pem: String,
}

impl Certificate {
    /// Creates an authority and a certificate for [`MAIL_NAME`] and 127.0.0.1, in `dir`.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        let mut authority = CertificateParams::default();
        authority.distinguished_name.push(DnType::CommonName, "injector test authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;

        let mut mail = CertificateParams::new([MAIL_NAME.to_owned(), "127.0.0.1".to_owned()])?;
        mail.distinguished_name.push(DnType::CommonName, MAIL_NAME);
        let mail_key = KeyPair::generate()?;
        let mail = mail.signed_by(&mail_key, &authority)?;

        let (chain, key) = (dir.join("mail.crt"), dir.join("mail.key"));
        fs::write(&chain, mail.pem()).with_context(|| format!("cannot write {}", chain.display()))?;
        let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&key)?;
        std::io::Write::write_all(&mut file, mail_key.serialize_pem().as_bytes())?;
        Ok(Self { chain, key, authority_pem: authority.pem() })
    }
}
