//! The parts of the API that all objects share: their names and versions, lists, and events of a
//! watch.

use std::collections::BTreeMap;

use kube::{
    api::{ListParams, WatchParams},
    core::Request,
};
use serde::{Deserialize, de::DeserializeOwned};

use crate::config::ServiceRef;

/// How many objects one answer has at most; the next answer continues the list.
const PAGE: u32 = 250;

/// A kind of objects that say something about a Service.
pub(super) trait Resource: DeserializeOwned + Send + Sync + 'static {
    /// What all of its objects together say.
    type State: PartialEq + Send + Sync + 'static;

    /// Its name in the paths of the API and in a Role.
    const PLURAL: &'static str;
    /// Its API group in a Role.
    const GROUP: &'static str;
    /// The versions of the API that have it, the preferred one first.
    const VERSIONS: &'static [&'static str];

    fn metadata(&self) -> &Metadata;

    /// What the query selects the Service's objects by.
    fn selector(service: &ServiceRef) -> Selector;

    fn state<'o>(objects: impl Iterator<Item = &'o Self>) -> Self::State;
}

/// How a query selects objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Selector {
    Label(String),
    Field(String),
}

/// The name and the version of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) resource_version: String,
}

/// A part of a list.
#[derive(Debug, Deserialize)]
pub(super) struct Page<R> {
    pub(super) metadata: PageMetadata,
    pub(super) items: Vec<R>,
}

/// The version of a list, and where it continues.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMetadata {
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default, rename = "continue")]
    pub(super) next: String,
}

/// One line of a watch.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", content = "object", rename_all = "UPPERCASE")]
pub(super) enum Event<R> {
    Added(R),
    Modified(R),
    Deleted(R),
    Bookmark(Bookmark),
    Error(Status),
}

/// Says up to which version the watch is complete.
#[derive(Debug, Deserialize)]
pub(super) struct Bookmark {
    pub(super) metadata: Metadata,
}

/// Why the API ends a watch.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    #[serde(default)]
    pub(super) code: u16,
    #[serde(default)]
    pub(super) message: String,
}

/// The objects that are there, by name.
pub(super) type Objects<R> = BTreeMap<String, R>;

/// The request for a part of the list of the Service's objects.
pub(super) fn list_request<R: Resource>(
    service: &ServiceRef,
    version: &str,
    next: &str,
) -> Result<hyper::Request<Vec<u8>>, kube::core::request::Error> {
    let params = ListParams { limit: Some(PAGE), ..ListParams::default() };
    let params = match R::selector(service) {
        Selector::Label(label) => params.labels(&label),
        Selector::Field(field) => params.fields(&field),
    };
    let params = if next.is_empty() { params } else { params.continue_token(next) };
    Request::new(path::<R>(service, version)).list(&params)
}

/// The request for all changes after `since`, for so many seconds.
pub(super) fn watch_request<R: Resource>(
    service: &ServiceRef,
    version: &str,
    since: &str,
    seconds: u32,
) -> Result<hyper::Request<Vec<u8>>, kube::core::request::Error> {
    let params = WatchParams::default().timeout(seconds);
    let params = match R::selector(service) {
        Selector::Label(label) => params.labels(&label),
        Selector::Field(field) => params.fields(&field),
    };
    Request::new(path::<R>(service, version)).watch(&params, since)
}

/// The core group has no name and a root of its own (Kubernetes documentation, "API Concepts",
/// "Resource URIs").
fn path<R: Resource>(service: &ServiceRef, version: &str) -> String {
    let root = match R::GROUP {
        "" => format!("/api/{version}"),
        group => format!("/apis/{group}/{version}"),
    };
    format!("{root}/namespaces/{}/{}", service.namespace(), R::PLURAL)
}
