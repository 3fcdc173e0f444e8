//! Certificates and kubeconfigs of the cluster, as kubeadm names them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SanType,
};

use super::{
    config,
    plan::{API_SERVICE, Node},
};

/// Creates all files in a new folder.
///
/// # Errors
/// When it cannot be written.
pub(super) fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut authority = CertificateParams::default();
    authority.distinguished_name = name("kubernetes-ca", None);
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    fs::write(folder.join("ca.crt"), authority.pem())?;
    // Tokens of service accounts.
    let tokens = KeyPair::generate()?;
    fs::write(folder.join("sa.key"), tokens.serialize_pem())?;
    fs::write(folder.join("sa.pub"), tokens.public_key_pem())?;

    let names = ["", ".default", ".default.svc"].map(|rest| format!("kubernetes{rest}"));
    let mut server = CertificateParams::new(names)?;
    let addresses = [Node::Control.address(), API_SERVICE, Ipv4Addr::LOCALHOST];
    server
        .subject_alt_names
        .extend(addresses.into_iter().map(|address| SanType::IpAddress(IpAddr::V4(address))));
    server.distinguished_name = name("kube-apiserver", None);
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    sign(folder, "apiserver", server, &authority)?;

    client(folder, &authority, "apiserver-kubelet", "kube-apiserver-kubelet-client", Some("system:masters"))?;
    for (file, user, group) in [
        ("admin", "kubernetes-admin", Some("system:masters")),
        ("controller-manager", "system:kube-controller-manager", None),
        ("scheduler", "system:kube-scheduler", None),
        ("proxy", "system:kube-proxy", None),
    ] {
        user_of(folder, &authority, file, user, group)?;
    }
    for node in Node::KUBELETS {
        user_of(folder, &authority, node.name(), &format!("system:node:{node}"), Some("system:nodes"))?;
    }
    Ok(())
}

type Authority = CertifiedIssuer<'static, KeyPair>;

/// A user, its group, and its kubeconfig.
fn user_of(folder: &Path, authority: &Authority, file: &str, user: &str, group: Option<&str>) -> Result<()> {
    client(folder, authority, file, user, group)?;
    fs::write(folder.join(format!("{file}.conf")), config::kubeconfig(file))?;
    Ok(())
}

fn client(folder: &Path, authority: &Authority, file: &str, user: &str, group: Option<&str>) -> Result<()> {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(user, group);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    sign(folder, file, params, authority)
}

fn sign(folder: &Path, file: &str, mut params: CertificateParams, authority: &Authority) -> Result<()> {
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, authority)?;
    fs::write(folder.join(format!("{file}.crt")), certificate.pem())?;
    fs::write(folder.join(format!("{file}.key")), key.serialize_pem())?;
    Ok(())
}

/// Kubernetes takes the user from the common name, and the groups from the organisations.
fn name(user: &str, group: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, user);
    if let Some(group) = group {
        name.push(DnType::OrganizationName, group);
    }
    name
}
