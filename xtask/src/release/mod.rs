//! What is installed on hosts and clusters: the package, the installation, the image, the
//! manifests.

pub(crate) mod image;
pub(crate) mod install;
pub(crate) mod kubernetes;
pub(crate) mod package;
