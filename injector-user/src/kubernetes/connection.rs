//! The API server and the credentials for it.
//!
//! In a pod these are files of its service account, which the kubelet replaces (Kubernetes
//! documentation, "Configure Service Accounts for Pods"). The client reads the token and the
//! certificate authority again about once a minute. After a failure there is another client, which
//! reads all of them at once.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use super::api_error::{ApiError, causes};
use crate::{config::Kubernetes, os::landlock};

/// Where Kubernetes mounts the service account of a pod.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The way to the API server, which all watches share.
pub(super) struct Connection {
    settings: Kubernetes,
    /// The client, and which one it is.
    client: Mutex<(u64, Option<Client>)>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Connection {
    pub(super) fn new(settings: Kubernetes) -> Self {
        Self { settings, client: Mutex::new((0, None)) }
    }

    /// The client, and its number for [`Self::replace`].
    pub(super) async fn client(&self) -> Result<(u64, Client), ApiError> {
        if let (number, Some(client)) = &*self.client.lock().unwrap_or_else(PoisonError::into_inner) {
            return Ok((*number, client.clone()));
        }
        let client = self.connect().await?;
        let mut current = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((current.0, current.1.get_or_insert(client).clone()))
    }

    /// Has the next request made by another client, because one of the client with this number failed.
    pub(super) fn replace(&self, number: u64) {
        let mut current = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 == number {
            *current = (number + 1, None);
        }
    }

    async fn connect(&self) -> Result<Client, ApiError> {
        let mut config = self.config().await?;
        let auth = &config.auth_info;
        if auth.exec.is_some() || auth.auth_provider.is_some() {
            return Err(ApiError::Settings(
                "the kubeconfig gets its credentials from a program, and the injector may start none: write the \
                 token of a service account into it (tokenFile or token), or a client certificate"
                    .to_owned(),
            ));
        }
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // A failed request is repeated by the watch, which knows more.
        config.default_retry = false;
        Client::try_from(config).map_err(|error| ApiError::Settings(causes(&error)))
    }

    async fn config(&self) -> Result<Config, ApiError> {
        let Some(file) = &self.settings.kubeconfig else {
            return Config::incluster().map_err(|error| {
                ApiError::Settings(format!(
                    "no service account in {SERVICE_ACCOUNT}: {error}; in a pod, mount its token \
                     (automountServiceAccountToken), outside a cluster set kubernetes.kubeconfig"
                ))
            });
        };
        let failed = |error| ApiError::Settings(format!("kubernetes.kubeconfig {}: {error}", file.display()));
        let kubeconfig = Kubeconfig::read_from(file).map_err(failed)?;
        let options =
            KubeConfigOptions { context: self.settings.context.clone(), ..KubeConfigOptions::default() };
        Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(failed)
    }
}

/// The directories that must stay readable for the credentials to be read again.
pub(super) fn directories(settings: &Kubernetes) -> Vec<PathBuf> {
    let Some(file) = &settings.kubeconfig else { return vec![PathBuf::from(SERVICE_ACCOUNT)] };
    let mut directories = landlock::directories_of(file);
    // If it cannot be read now, it may only name files beside it later.
    for named in named_files(file).unwrap_or_default() {
        directories.extend(landlock::directories_of(&named));
    }
    directories
}

/// The files that a kubeconfig names. Relative names count from its own directory.
fn named_files(file: &Path) -> io::Result<Vec<PathBuf>> {
    let kubeconfig = Kubeconfig::read_from(file).map_err(io::Error::other)?;
    let clusters = kubeconfig.clusters.into_iter().filter_map(|named| named.cluster?.certificate_authority);
    let users = kubeconfig.auth_infos.into_iter().filter_map(|named| named.auth_info);
    let users = users.flat_map(|user| [user.token_file, user.client_certificate, user.client_key]);
    Ok(clusters.chain(users.flatten()).map(PathBuf::from).collect())
}
