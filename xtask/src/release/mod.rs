//! The ways to ship the injector: package, installation, image, and manifests.

pub(crate) mod image;
pub(crate) mod install;
pub(crate) mod kubernetes;
pub(crate) mod package;
