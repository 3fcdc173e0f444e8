//! Compares the table that nft lists with the wanted one.

use std::net::IpAddr;

use nftables::schema::{NfListObject, NfObject, Nftables};
use serde_json::Value;

use super::{rules, ruleset::Ruleset};

/// What the kernel has under the table's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TableDiff {
    /// Exactly these chains and rules.
    Same,
    /// These chains, with other rules.
    OtherRules,
    /// Something that replacing the rules would leave behind: other chains, maps, sets.
    OtherLayout,
}

/// Compares by meaning: nft rewrites what it was given, and adds handles.
///
/// If a version of nft writes something that is not recognized, the result is
/// [`TableDiff::OtherRules`] instead of [`TableDiff::Same`]; never the other way round.
pub(super) fn compare(ruleset: &Ruleset, listing: &Value) -> TableDiff {
    let listed = listing.get("nftables").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let listed: Vec<Value> = listed
        .iter()
        .filter(|object| object.get("metainfo").is_none() && object.get("table").is_none())
        .map(|object| plain(object.clone()))
        .collect();
    let is_rule = |object: &Value| object.get("rule").is_some();
    let (listed_rules, listed_layout): (Vec<_>, Vec<_>) = listed.into_iter().partition(is_rule);
    if listed_layout != objects(ruleset.chains.iter().cloned().map(NfListObject::Chain)) {
        return TableDiff::OtherLayout;
    }
    let rules_of = |rules: &[Value], chain: &str| -> Vec<Value> {
        let of_chain = |object: &&Value| object.pointer("/rule/chain").and_then(Value::as_str) == Some(chain);
        rules.iter().filter(of_chain).cloned().collect()
    };
    let wanted = objects(ruleset.rules.iter().cloned().map(NfListObject::Rule));
    let same = [rules::PREROUTING, rules::POSTROUTING]
        .iter()
        .all(|chain| rules_of(&wanted, chain) == rules_of(&listed_rules, chain));
    if same { TableDiff::Same } else { TableDiff::OtherRules }
}

/// As they look in a listing.
fn objects(objects: impl Iterator<Item = NfListObject<'static>>) -> Vec<Value> {
    let objects = Nftables { objects: objects.map(NfObject::ListObject).collect() };
    // Our own objects, made of strings and numbers, always have a JSON form; without it nothing
    // compares equal.
    let mut json = serde_json::to_value(objects).unwrap_or_default();
    let objects =
        json.get_mut("nftables").and_then(Value::as_array_mut).map(std::mem::take).unwrap_or_default();
    objects.into_iter().map(plain).collect()
}

/// One of several ways to write the same: without handles, numbers as numbers, addresses as Rust
/// writes them, sets sorted, flags as lists.
fn plain(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let members = members.into_iter().filter(|(key, _)| key != "handle");
            Value::Object(members.map(|(key, value)| plain_member(key, value)).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(plain).collect()),
        Value::String(text) => {
            if let Ok(number) = text.parse::<u32>() {
                number.into()
            } else if let Ok(address) = text.parse::<IpAddr>() {
                address.to_string().into()
            } else {
                text.into()
            }
        }
        other => other,
    }
}

fn plain_member(key: String, value: Value) -> (String, Value) {
    // A comment is free text, even if it looks like a number.
    if key == "comment" {
        return (key, value);
    }
    let value = match (key.as_str(), plain(value)) {
        ("set", Value::Array(mut items)) => {
            items.sort_by_key(Value::to_string);
            Value::Array(items)
        }
        ("flags", flag @ Value::String(_)) => Value::Array(vec![flag]),
        (_, value) => value,
    };
    (key, value)
}
