use serde_json::{Value, json};

use super::compare::{TableDiff, compare};
use super::*;

fn service() -> Service {
    Service {
        name: "smtp".to_owned(),
        listen: vec!["192.0.2.12:25".parse().unwrap()],
        backends: vec![backend("10.25.0.2:2525", 1)],
        masquerade: false,
    }
}

fn backend(address: &str, weight: u32) -> Backend {
    Backend { address: address.parse().unwrap(), weight }
}

fn rules_of(services: &[Service]) -> Ruleset {
    ruleset(&TableName::default(), services).unwrap()
}

/// The rules for services in the order they are added, each as (chain, statements).
fn added(services: &[Service]) -> Vec<(String, Value)> {
    let json: Value = serde_json::from_str(&rules_of(services).to_json()).unwrap();
    let objects = json["nftables"].as_array().unwrap();
    let rules = objects.iter().filter_map(|object| object.pointer("/add/rule"));
    let mut rules = rules.map(|rule| (rule["chain"].as_str().unwrap().to_owned(), rule["expr"].clone()));
    let (chain, tracking) = rules.next().unwrap();
    assert_eq!((chain.as_str(), &tracking), ("prerouting", &tracking_rule()));
    rules.collect()
}

fn tracking_rule() -> Value {
    json!([
        {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "established"}},
        {"accept": null},
    ])
}

fn mistake(change: impl FnOnce(&mut Service)) -> String {
    let mut service = service();
    change(&mut service);
    ruleset(&TableName::default(), &[service]).unwrap_err().to_string()
}

#[test]
fn one_backend_is_plain_dnat() {
    let rules = added(&[service()]);
    let expected = json!([
        {"match": {"op": "!=", "left": {"meta": {"key": "iif"}}, "right": "lo"}},
        {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "192.0.2.12"}},
        {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 25}},
        {"dnat": {"family": "ip", "addr": "10.25.0.2", "port": 2525}},
    ]);
    assert_eq!(rules, [("prerouting".to_owned(), expected)]);
}

#[test]
fn several_backends_get_shares_in_lowest_terms() {
    let backends = vec![
        backend("10.25.0.2:2525", 300),
        backend("10.25.0.3:2526", 100),
        backend("10.25.0.4:2527", 0),
        backend("[fd25::2]:2525", 7),
    ];
    let rules = added(&[Service { backends, ..service() }]);
    let expected = json!({"dnat": {"family": "ip", "addr": {"map": {
        "key": {"numgen": {"mode": "random", "mod": 4, "offset": 0}},
        "data": {"set": [
            [{"range": [0, 2]}, {"concat": ["10.25.0.2", 2525]}],
            [3, {"concat": ["10.25.0.3", 2526]}],
        ]},
    }}}});
    assert_eq!(rules[0].1[3], expected);
}

#[test]
fn families_do_not_mix() {
    let listen = vec!["[::]:25".parse().unwrap(), "[2001:db8::1]:26".parse().unwrap()];
    let backends = vec![backend("10.25.0.2:2525", 1), backend("[fd25::2]:2525", 1)];
    let rules = added(&[Service { listen, backends, ..service() }]);
    let dnat = json!({"dnat": {"family": "ip6", "addr": "fd25::2", "port": 2525}});
    assert_eq!(rules.len(), 2);
    assert!(rules.iter().all(|(_, statements)| statements.as_array().unwrap().contains(&dnat)), "{rules:?}");
}

#[test]
fn any_address_comes_after_single_ones() {
    let any = Service { name: "any".to_owned(), listen: vec!["0.0.0.0:25".parse().unwrap()], ..service() };
    let rules = added(&[any, service()]);
    let local = json!({"match": {
        "op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local",
    }});
    let is_any = |at: usize| rules[at].1.as_array().unwrap().contains(&local);
    assert!(!is_any(0) && is_any(1), "{rules:?}");
}

#[test]
fn masquerade_is_for_this_listener_and_its_backends() {
    let backends =
        vec![backend("10.25.0.2:2525", 1), backend("10.25.0.2:2525", 1), backend("10.25.0.3:2525", 1)];
    let rules = added(&[Service { backends, masquerade: true, ..service() }]);
    let expected = json!([
        {"match": {"op": "!=", "left": {"meta": {"key": "iif"}}, "right": "0"}},
        {"match": {"op": "==",
            "left": {"concat": [
                {"payload": {"protocol": "ip", "field": "daddr"}},
                {"payload": {"protocol": "tcp", "field": "dport"}},
            ]},
            "right": {"set": [{"concat": ["10.25.0.2", 2525]}, {"concat": ["10.25.0.3", 2525]}]},
        }},
        {"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}},
        {"match": {"op": "==", "left": {"ct": {"key": "ip daddr", "dir": "original"}}, "right": "192.0.2.12"}},
        {"match": {"op": "==", "left": {"ct": {"key": "proto-dst", "dir": "original"}}, "right": 25}},
        {"masquerade": null},
    ]);
    assert_eq!(rules[1], ("postrouting".to_owned(), expected));
}

#[test]
fn mapped_addresses_are_ipv4() {
    let listen = vec!["[::ffff:192.0.2.12]:25".parse().unwrap()];
    let backends = vec![backend("[::ffff:10.25.0.2]:2525", 1)];
    assert_eq!(added(&[Service { listen, backends, ..service() }]), added(&[service()]));
}

#[test]
fn only_the_named_table_is_touched() {
    let table: TableName = "injector-test_2".parse().unwrap();
    let json: Value = serde_json::from_str(&ruleset(&table, &[service()]).unwrap().to_json()).unwrap();
    for object in json["nftables"].as_array().unwrap() {
        let (verb, object) = object.as_object().unwrap().iter().next().unwrap();
        let (kind, object) = object.as_object().unwrap().iter().next().unwrap();
        let named = if kind == "table" { &object["name"] } else { &object["table"] };
        assert_eq!((named, &object["family"]), (&json!("injector-test_2"), &json!("inet")), "{verb} {kind}");
    }
}

#[test]
fn errors_name_the_listener_or_the_backend() {
    let v6 = || vec!["192.0.2.12:25".parse().unwrap(), "[2001:db8::1]:25".parse().unwrap()];
    let listen = |text: &str| vec![text.parse().unwrap()];
    let heavy = || vec![backend("10.25.0.2:1", u32::MAX), backend("10.25.0.3:1", 2)];
    let cases = [
        (mistake(|s| s.listen = v6()), "smtp: [2001:db8::1]:25 has no IPv6 backend of weight 1 or more"),
        (mistake(|s| s.backends = vec![]), "smtp: 192.0.2.12:25 has no IPv4 backend"),
        (mistake(|s| s.backends[0].weight = 0), "smtp: 192.0.2.12:25 has no IPv4 backend"),
        (mistake(|s| s.backends = heavy()), "add up to more than 4294967295"),
        (mistake(|s| s.listen = vec![]), "smtp: no address to listen on"),
        (mistake(|s| s.listen = listen("192.0.2.12:0")), "smtp: cannot listen on 192.0.2.12:0: port 0"),
        (mistake(|s| s.listen = listen("127.0.0.1:25")), "loopback"),
        (mistake(|s| s.listen = listen("[fe80::1]:25")), "link-local"),
        (mistake(|s| s.listen = listen("255.255.255.255:25")), "broadcast"),
        (
            mistake(|s| s.listen = ["192.0.2.12:25"; 2].map(|at| at.parse().unwrap()).into()),
            "already used by smtp",
        ),
        (
            mistake(|s| s.backends[0] = backend("0.0.0.0:25", 1)),
            "smtp: 0.0.0.0:25 cannot be a backend: it names no host",
        ),
        (mistake(|s| s.backends[0] = backend("[::1]:25", 1)), "smtp: [::1]:25 cannot be a backend"),
        (mistake(|s| s.backends[0] = backend("10.25.0.2:0", 1)), "port 0"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message:?} should say {expected:?}");
    }
}

#[test]
fn equal_weights_up_to_the_largest_fit() {
    let backends = vec![backend("10.25.0.2:1", u32::MAX), backend("10.25.0.3:1", u32::MAX)];
    let rules = added(&[Service { backends, ..service() }]);
    assert_eq!(rules[0].1[3]["dnat"]["addr"]["map"]["key"]["numgen"]["mod"], 2);
}

#[test]
fn table_names_are_plain_words() {
    for good in ["injector", "a", "Injector-2_b", &"x".repeat(63)] {
        assert_eq!(good.parse::<TableName>().unwrap().as_str(), good);
    }
    for bad in ["", "2x", "-x", "a b", "a;b", "a\nb", "é", &"x".repeat(64)] {
        assert_eq!(bad.parse::<TableName>(), Err(NatError::TableName(bad.to_owned())));
    }
}

#[test]
fn comments_cannot_break_a_saved_ruleset() {
    let name = format!("a\"b\\c\nd{}", "é".repeat(200));
    let ruleset = rules_of(&[Service { name, ..service() }]);
    let comment = ruleset.rules[1].comment.clone().unwrap();
    assert_eq!(comment.get(..7), Some("a_b_c_d"));
    assert_eq!(comment.len(), 127);
}

/// What nft 1.0.6 lists for a service, and what other versions write differently.
#[test]
fn an_equivalent_listing_is_recognized() {
    let backends = vec![backend("10.25.0.2:2525", 3), backend("10.25.0.3:2525", 1)];
    let listen = vec!["0.0.0.0:25".parse().unwrap()];
    let ruleset = rules_of(&[Service { listen, backends, ..service() }]);
    let chain = |name: &str, prio: i32| {
        json!({"chain": {"family": "inet", "table": "injector", "name": name, "handle": 7, "type": "nat",
            "hook": name, "prio": prio, "policy": "accept"}})
    };
    let rule = |flags: Value, port: Value| {
        json!({"rule": {"family": "inet", "table": "injector", "chain": "prerouting", "handle": 9, "comment": "smtp",
        "expr": [
            {"match": {"op": "!=", "left": {"meta": {"key": "iif"}}, "right": "lo"}},
            {"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv4"}},
            {"match": {"op": "==", "left": {"fib": {"result": "type", "flags": flags}}, "right": "local"}},
            {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": port}},
            {"dnat": {"family": "ip", "addr": {"map": {
                "key": {"numgen": {"mode": "random", "mod": 4, "offset": 0}},
                "data": {"set": [
                    [3, {"concat": ["10.25.0.3", 2525]}],
                    [{"range": [0, 2]}, {"concat": ["10.25.0.2", 2525]}],
                ]},
            }}}},
        ]}})
    };
    let listing = |rules: &[Value], extra: &[Value]| {
        let head =
            [json!({"metainfo": {"version": "1.0.6"}}), json!({"table": {"name": "injector", "handle": 1}})];
        let chains = [chain("prerouting", -100), chain("postrouting", 100)];
        let tracking = json!({"rule": {"family": "inet", "table": "injector", "chain": "prerouting", "handle": 8,
            "comment": "keeps_connections_tracked", "expr": tracking_rule()}});
        let objects = [&head[..], &chains, extra, &[tracking], rules].concat();
        json!({"nftables": objects})
    };
    let as_written = rule(json!(["daddr"]), json!(25));
    let set = json!({"set": {"family": "inet", "table": "injector", "name": "s", "type": "mark"}});
    let cases = [
        (listing(std::slice::from_ref(&as_written), &[]), TableDiff::Same),
        (listing(&[rule(json!("daddr"), json!("25"))], &[]), TableDiff::Same),
        (listing(&[rule(json!("daddr"), json!(26))], &[]), TableDiff::OtherRules),
        (listing(&[], &[]), TableDiff::OtherRules),
        (listing(&[as_written.clone(), as_written.clone()], &[]), TableDiff::OtherRules),
        (listing(&[as_written], &[set]), TableDiff::OtherLayout),
        (json!({"nftables": []}), TableDiff::OtherLayout),
    ];
    for (listing, expected) in cases {
        assert_eq!(compare(&ruleset, &listing), expected, "{listing}");
    }
}
