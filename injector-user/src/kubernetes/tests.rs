//! A watcher against an API server that does what real ones do on bad days.

use std::{net::IpAddr, sync::Arc, time::Duration};

use serde_json::json;
use tokio::{sync::watch, time::timeout};

use super::{
    Endpoints, Followed, Readiness, WatchState, Watcher,
    stub_api::{LIMITS, StubApi, slice},
};
use crate::config::{Kubernetes, Network, ServicePort, ServiceRef, WithServices};

/// The longest that anything takes, failures with their pauses included.
const SOON: Duration = Duration::from_secs(15);

fn service() -> ServiceRef {
    "mail/mailserver".parse().unwrap()
}

type Receiver = watch::Receiver<Option<Arc<Endpoints>>>;

/// Waits until the endpoints are these.
async fn becomes(endpoints: &mut Receiver, addresses: &[&str]) {
    let expected: Vec<IpAddr> = addresses.iter().map(|it| it.parse().unwrap()).collect();
    let are = |state: &Option<Arc<Endpoints>>| {
        state.as_ref().is_some_and(|it| it.addresses().into_iter().eq(expected.iter().copied()))
    };
    let became = timeout(SOON, endpoints.wait_for(are)).await.map(|state| state.map(drop));
    assert!(matches!(became, Ok(Ok(()))), "{:?}, not {expected:?}", endpoints.borrow());
}

fn state(watcher: &Watcher) -> WatchState {
    watcher.watched()[0].state.clone()
}

/// Waits until the watch fails with this message, and returns the whole.
async fn fails(watcher: &Watcher, message: &str) -> String {
    let failed = async {
        loop {
            match state(watcher).error {
                Some(error) if error.contains(message) => return error,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    timeout(SOON, failed).await.unwrap_or_else(|_| panic!("{:?}, not {message:?}", state(watcher)))
}

#[tokio::test]
async fn changes_are_followed_and_one_watch_serves_all_readers() {
    let api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    let watcher = api.watcher();
    let (mut one, mut other) = (watcher.endpoints(&service()), watcher.clone().endpoints(&service()));
    becomes(&mut one, &["10.0.0.1"]).await;
    api.set("b", slice(&["10.0.0.2", "10.0.0.3"]));
    becomes(&mut one, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]).await;
    api.delete("a");
    becomes(&mut one, &["10.0.0.2", "10.0.0.3"]).await;
    api.set("b", slice(&[]));
    becomes(&mut one, &[]).await;
    becomes(&mut other, &[]).await;
    let (lists, _) = api.requests();
    assert_eq!((lists, watcher.watched().len()), (1, 1));
    assert!(
        api.targets().iter().all(|target| {
            target.starts_with("/apis/discovery.k8s.io/v1/namespaces/mail/endpointslices?")
                && target.contains("labelSelector=kubernetes.io%2Fservice-name%3Dmailserver")
        }),
        "{:?}",
        api.targets()
    );

    // It ends with its last reader, and not before.
    drop(one);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(watcher.watched().len(), 1);
    drop(other);
    let ended = async {
        while !watcher.watched().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, ended).await.unwrap();
    becomes(&mut watcher.endpoints(&service()), &[]).await;
    assert_eq!(api.requests().0, 2, "a new reader has a new watch");
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_where_it_was() {
    let api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    becomes(&mut endpoints, &["10.0.0.1"]).await;
    while api.requests().1 < 3 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    api.set("a", slice(&["10.0.0.2"]));
    becomes(&mut endpoints, &["10.0.0.2"]).await;
    assert_eq!((api.requests().0, state(&watcher).failures), (1, 0));
}

#[tokio::test]
async fn an_old_server_has_another_version_and_long_lists_come_in_parts() {
    let api = StubApi::start().await;
    api.serve_version("v1beta1");
    api.set_page(2);
    for host in 1..=5 {
        api.set(&format!("slice-{host}"), slice(&[&format!("10.0.0.{host}")]));
    }
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"];
    becomes(&mut endpoints, &all).await;
    // Version v1 in vain, and three parts.
    assert_eq!((api.requests().0, state(&watcher).failures), (4, 0));
    // The server is upgraded.
    api.serve_version("v1");
    api.compact();
    api.cut();
    api.set("slice-5", slice(&[]));
    becomes(&mut endpoints, &all[..4]).await;
}

#[tokio::test]
async fn a_version_that_is_too_old_is_listed_again_and_is_no_failure() {
    let api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    api.set("b", slice(&["10.0.0.2"]));
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    becomes(&mut endpoints, &["10.0.0.1", "10.0.0.2"]).await;
    // While the watch between two of them is away, a slice goes, and no event will say so.
    api.set_silent(true);
    api.delete("a");
    api.compact();
    api.set_silent(false);
    becomes(&mut endpoints, &["10.0.0.2"]).await;
    assert_eq!((api.requests().0, state(&watcher).failures), (2, 0));
}

#[tokio::test]
async fn while_the_api_is_away_the_last_state_stays() {
    let mut api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    becomes(&mut endpoints, &["10.0.0.1"]).await;
    assert!(state(&watcher).last_answer.is_some());
    api.down().await;
    fails(&watcher, "no answer from the API server").await;
    api.set("a", slice(&["10.0.0.2"]));
    becomes(&mut endpoints, &["10.0.0.1"]).await;
    // It comes back with another certificate, which the file has.
    api.up().await;
    becomes(&mut endpoints, &["10.0.0.2"]).await;
    assert_eq!(state(&watcher).error, None);
    assert!(state(&watcher).failures > 0);
}

#[tokio::test]
async fn a_server_that_says_nothing_is_left() {
    let api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    api.set_silent(true);
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    becomes(&mut endpoints, &["10.0.0.1"]).await;
    api.set("a", slice(&["10.0.0.2"]));
    fails(&watcher, "no answer from the API server within 1.3s").await;
    becomes(&mut endpoints, &["10.0.0.2"]).await;
}

#[tokio::test]
async fn a_token_is_read_again_when_it_is_refused() {
    let api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    becomes(&mut endpoints, &["10.0.0.1"]).await;
    api.rotate_token("second", false);
    let error = fails(&watcher, "status 401").await;
    assert!(error.contains("kubernetes.kubeconfig"), "{error}");
    api.set("a", slice(&["10.0.0.2"]));
    api.rotate_token("third", true);
    becomes(&mut endpoints, &["10.0.0.2"]).await;
}

#[tokio::test]
async fn without_rights_the_message_names_the_role() {
    let api = StubApi::start().await;
    let forbidden = json!({
        "kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403,
        "message": "endpointslices.discovery.k8s.io is forbidden",
    });
    api.set_answer("403 Forbidden", Some(&forbidden.to_string()));
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    let error = fails(&watcher, "status 403").await;
    for part in [
        "endpointslices.discovery.k8s.io is forbidden",
        "a Role in the namespace \"mail\" with the verbs list and watch",
        "for endpointslices of the API group \"discovery.k8s.io\"",
        "a RoleBinding",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(*endpoints.borrow(), None);
    api.set_answer("", None);
    becomes(&mut endpoints, &[]).await;
}

#[tokio::test]
async fn nonsense_and_endless_answers_change_nothing() {
    let api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    becomes(&mut endpoints, &["10.0.0.1"]).await;
    let long = format!("{{\"metadata\":{{}},\"items\":[],\"x\":\"{}\"}}", "x".repeat(70_000));
    for (body, message) in [
        ("<html>a proxy's page</html>", "cannot be read"),
        ("{\"metadata\":{\"resourceVersion\":\"1\"},\"items\":[{\"metadata\":{}}]}", "without a name"),
        (long.as_str(), "longer than 65536 bytes"),
    ] {
        api.set_answer("200 OK", Some(body));
        fails(&watcher, message).await;
        becomes(&mut endpoints, &["10.0.0.1"]).await;
    }
    api.set_answer("500 Internal Server Error", Some("etcd is away"));
    fails(&watcher, "status 500").await;
    api.set_answer("", None);
    api.set("a", slice(&["10.0.0.2"]));
    becomes(&mut endpoints, &["10.0.0.2"]).await;
}

#[tokio::test]
async fn a_thousand_slices_are_the_most() {
    let api = StubApi::start().await;
    api.set_page(300);
    for number in 0..1001 {
        api.set(&format!("slice-{number}"), json!({ "addressType": "IPv4" }));
    }
    let watcher = api.watcher();
    let mut endpoints = watcher.endpoints(&service());
    fails(&watcher, "more than 1000 objects").await;
    api.delete("slice-7");
    becomes(&mut endpoints, &[]).await;
}

#[tokio::test]
async fn an_endpoint_on_the_node_names_its_zone() {
    let api = StubApi::start().await;
    let settings = Kubernetes { node: Some("edge-1".to_owned()), ..api.settings() };
    let watcher = Watcher::with_limits(settings, LIMITS);
    let mut place = watcher.place();
    assert_eq!(place.borrow().zone, None);
    let _endpoints = watcher.endpoints(&service());
    let mut here = slice(&["10.0.0.1"]);
    here["endpoints"][0]["nodeName"] = json!("edge-1");
    here["endpoints"][0]["zone"] = json!("west");
    api.set("a", here);
    let known = timeout(SOON, place.wait_for(|place| place.zone.as_deref() == Some("west"))).await;
    assert!(matches!(known, Ok(Ok(_))));
    // A zone in the configuration is the operator's.
    let settings =
        Kubernetes { node: Some("edge-1".to_owned()), zone: Some("east".to_owned()), ..api.settings() };
    let watcher = Watcher::with_limits(settings, LIMITS);
    becomes(&mut watcher.endpoints(&service()), &["10.0.0.1"]).await;
    assert_eq!(watcher.place().borrow().zone.as_deref(), Some("east"));
}

#[tokio::test]
async fn addresses_of_a_load_balancer_are_followed() {
    let api = StubApi::start().await;
    let watcher = api.watcher();
    let mut addresses = watcher.load_balancer_addresses(&service());
    for ip in ["192.0.2.10", "192.0.2.11"] {
        api.set("mailserver", json!({ "status": { "loadBalancer": { "ingress": [{ "ip": ip }] } } }));
        let expected: IpAddr = ip.parse().unwrap();
        let became = addresses.wait_for(|it| it.as_ref().is_some_and(|it| **it == [expected]));
        assert!(matches!(timeout(SOON, became).await, Ok(Ok(_))), "{ip}");
    }
    api.delete("mailserver");
    let gone = addresses.wait_for(|it| it.as_ref().is_some_and(|it| it.is_empty()));
    assert!(matches!(timeout(SOON, gone).await, Ok(Ok(_))));
    let target = "/api/v1/namespaces/mail/services?";
    assert!(api.targets().iter().all(|it| it.starts_with(target)), "{:?}", api.targets());
    assert!(api.targets().iter().all(|it| it.contains("fieldSelector=metadata.name%3Dmailserver")));
}

#[tokio::test]
async fn missing_credentials_are_explained_and_looked_for_again() {
    let api = StubApi::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kubeconfig");
    let watcher =
        Watcher::with_limits(Kubernetes { kubeconfig: Some(file.clone()), ..Kubernetes::default() }, LIMITS);
    let mut endpoints = watcher.endpoints(&service());
    let error = fails(&watcher, "kubernetes.kubeconfig").await;
    assert!(error.contains(file.to_str().unwrap()), "{error}");
    let text = std::fs::read_to_string(api.settings().kubeconfig.unwrap()).unwrap();
    let authority = api.settings().kubeconfig.unwrap().with_file_name("ca.crt");
    let text = text.replace("\"ca.crt\"", &format!("{authority:?}"));
    std::fs::write(&file, &text).unwrap();
    becomes(&mut endpoints, &[]).await;
    assert_eq!(endpoints.borrow().as_ref().map(|it| it.with(Readiness::Ready)), Some(Vec::new()));
    let folders = Watcher::directories(&Kubernetes { kubeconfig: Some(file), ..Kubernetes::default() });
    assert!(folders.iter().any(|it| it == authority.parent().unwrap()), "{folders:?}");

    let program = text.replace("\"tokenFile\"", "\"exec\":{\"command\":\"/bin/false\"},\"tokenFile\"");
    std::fs::write(folder.path().join("other"), program).unwrap();
    let settings = Kubernetes { kubeconfig: Some(folder.path().join("other")), ..Kubernetes::default() };
    let watcher = Watcher::with_limits(settings, LIMITS);
    let _endpoints = watcher.endpoints(&service());
    fails(&watcher, "the injector may start none").await;
}

#[tokio::test]
async fn lists_of_the_configuration_follow_services() {
    let api = StubApi::start().await;
    let watcher = api.watcher();
    let listed: Vec<Network> = vec!["10.1.0.0/16".parse().unwrap()];
    let configured = WithServices { listed, services: vec![service()] };
    let mut peers = Followed::endpoints(&configured, &watcher);
    assert!(!peers.is_complete());
    for hosts in [&["10.0.0.1", "10.0.0.2"][..], &["10.0.0.2"], &[]] {
        api.set("a", slice(hosts));
        let expected: Vec<Network> =
            [&["10.1.0.0/16"], hosts].concat().iter().map(|it| it.parse().unwrap()).collect();
        let became = async {
            while !peers.is_complete() || peers.current() != expected {
                peers.changed().await;
            }
        };
        assert!(timeout(SOON, became).await.is_ok(), "{:?}, not {expected:?}", peers.current());
    }
}

#[tokio::test]
async fn a_command_gets_the_addresses_once_or_the_reason() {
    let mut api = StubApi::start().await;
    api.set("a", slice(&["10.0.0.1"]));
    let watcher = api.watcher();
    let now = async |port: ServicePort, within| watcher.addresses_within(&service(), &port, within).await;
    let smtp = ServicePort::Name("smtp".to_owned());
    assert_eq!(now(smtp.clone(), SOON).await, Ok(vec!["10.0.0.1:2525".parse().unwrap()]));
    let error = now(ServicePort::Name("pop3".to_owned()), SOON).await.unwrap_err();
    assert!(error.contains("no port named \"pop3\""), "{error}");
    api.down().await;
    let watcher = api.watcher();
    let error = watcher.addresses_within(&service(), &smtp, Duration::from_millis(500)).await.unwrap_err();
    assert!(error.starts_with("no answer from the API server"), "{error}");
}
