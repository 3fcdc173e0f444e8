//! Why the API does not say what it should.

use std::time::Duration;

use super::resource::{Resource, Status};
use crate::config::ServiceRef;

/// Why a list or a watch failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("{0}")]
    Settings(String),
    #[error(
        "the API server does not accept the injector's credentials (status 401: {0}): a pod needs its service \
         account's token mounted, a host outside the cluster a valid one in kubernetes.kubeconfig"
    )]
    Unauthorized(String),
    #[error(
        "the API server does not allow it (status 403: {message}): write a Role in the namespace {namespace:?} with \
         the verbs list and watch for {resource} of the API group {group:?}, and a RoleBinding that gives it to the \
         injector's service account"
    )]
    Forbidden { namespace: String, resource: &'static str, group: &'static str, message: String },
    #[error("the API server has no {resource} in version {}", versions.join(" or "))]
    NotServed { resource: &'static str, versions: &'static [&'static str] },
    #[error("the API server answered with status {code}: {message}")]
    Status { code: u16, message: String },
    /// The list must be read again. No failure.
    #[error("the API server no longer has all changes since the last answer")]
    Gone,
    #[error("no answer from the API server: {0}")]
    Unreachable(String),
    #[error("no answer from the API server within {0:?}")]
    TimedOut(Duration),
    #[error("the API server's answer is longer than {0} bytes")]
    TooLong(u64),
    #[error("the service has more than {0} objects of this kind")]
    TooMany(usize),
    #[error("the API server's answer cannot be read: {0}")]
    Malformed(String),
}

impl ApiError {
    /// What a status other than success means for a request for `R`.
    pub(super) fn of_status<R: Resource>(service: &ServiceRef, status: Status) -> Self {
        let Status { code, message } = status;
        match code {
            401 => Self::Unauthorized(message),
            403 => Self::Forbidden {
                namespace: service.namespace().to_owned(),
                resource: R::PLURAL,
                group: R::GROUP,
                message,
            },
            404 => Self::NotServed { resource: R::PLURAL, versions: R::VERSIONS },
            410 => Self::Gone,
            code => Self::Status { code, message },
        }
    }

    pub(super) fn of_client<R: Resource>(service: &ServiceRef, error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => {
                Self::of_status::<R>(service, Status { code: status.code, message: status.message.clone() })
            }
            error => Self::Unreachable(causes(error)),
        }
    }

    /// Whether another kind of failure needs another action of the operator, so that it is logged again.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// An error of the client with its innermost cause, which says most: the outer ones only name layers.
pub(super) fn causes(error: &kube::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
