use std::{
    io::{BufReader, Cursor},
    iter,
};

use proptest::prelude::*;

use super::*;

const NOW: u64 = 1_000;
const HOUR: u64 = 3_600_000_000_000;

fn rules(full: bool) -> Rules {
    Rules { full, captcha: Captcha::Ban, max_kept: 100, max_entries: 1000, now_ns: NOW }
}

fn entry(value: &str) -> String {
    format!(
        r#"{{"duration":"1h0m0s","id":7,"origin":"cscli","scenario":"by hand","scope":"Ip","type":"ban","uuid":"x","value":"{value}"}}"#
    )
}

fn networks(answer: &Answer) -> Vec<String> {
    answer.new.iter().map(|new| new.network.to_string()).collect()
}

#[test]
fn an_answer_of_a_lapi_is_read() {
    // As CrowdSec 1.4.6 writes it.
    let text = format!(
        r#"{{"deleted":[{}],"new":[{},{}]}}"#,
        entry("192.0.2.1"),
        entry("192.0.2.2"),
        entry("2001:db8::1")
    );
    let answer = read(text.as_bytes(), &rules(false)).unwrap();
    assert_eq!(networks(&answer), ["192.0.2.2/32", "2001:db8::1/128"]);
    assert_eq!(answer.new[0].until_ns, NOW + HOUR);
    assert_eq!(&*answer.new[0].reason, "cscli: by hand");
    assert!(Arc::ptr_eq(&answer.new[0].reason, &answer.new[1].reason));
    assert_eq!(answer.deleted, [("192.0.2.1".parse().unwrap(), Remediation::Ban)]);
    assert_eq!(answer.origins[0], Origins::from([("cscli".to_owned(), [1, 1])]));
    assert_eq!(answer.origins[1], Origins::from([("cscli".to_owned(), [1, 0])]));
    // All decisions: what was deleted before does not matter.
    assert!(read(text.as_bytes(), &rules(true)).unwrap().deleted.is_empty());
}

#[test]
fn empty_lists_unknown_keys_and_either_order_are_accepted() {
    for text in [
        r#"{"new":null,"deleted":null}"#,
        r#"{"deleted":[],"new":[]}"#,
        r#"{"new":[]}"#,
        r#" {"links":{"a":[1,{"b":2}]},"new":[],"more":"x"} "#,
    ] {
        assert_eq!(read(text.as_bytes(), &rules(true)).unwrap(), Answer::default(), "{text}");
    }
    let text = format!(r#"{{"new":[{}],"deleted":[{}]}}"#, entry("192.0.2.2"), entry("192.0.2.1"));
    let answer = read(text.as_bytes(), &rules(false)).unwrap();
    assert_eq!((answer.new.len(), answer.deleted.len()), (1, 1));
}

#[test]
fn what_is_no_ban_is_counted() {
    let country = entry("DE").replace("Ip", "Country");
    let throttle = entry("192.0.2.1").replace("ban", "throttle");
    let simulated = entry("192.0.2.1").replace(r#""id":7"#, r#""simulated":true"#);
    let text = format!(
        r#"{{"new":[{country},{country},{throttle},{simulated},{},{},{{}},{}]}}"#,
        entry("nonsense"),
        entry("192.0.2.1").replace("1h0m0s", "soon"),
        entry("192.0.2.9"),
    );
    let answer = read(text.as_bytes(), &rules(true)).unwrap();
    assert_eq!(networks(&answer), ["192.0.2.9/32"]);
    let ignored = |why| answer.ignored[Ignored::ALL.iter().position(|it| *it == why).unwrap()];
    assert_eq!(ignored(Ignored::Scope), 2);
    assert_eq!(ignored(Ignored::Type), 2);
    assert_eq!(ignored(Ignored::Simulated), 1);
    assert_eq!(ignored(Ignored::Invalid), 2);
    assert_eq!(ignored(Ignored::Full), 0);
}

#[test]
fn nonsense_is_an_error() {
    let good = format!(r#"{{"new":[{}]}}"#, entry("192.0.2.1"));
    for text in [
        "",
        "<!DOCTYPE html><html><body>502 Bad Gateway</body></html>",
        "null",
        "[]",
        "{}",
        r#"{"message":"access forbidden"}"#,
        r#"{"new":{}}"#,
        r#"{"new":[[]]}"#,
        r#"{"new":[{"value":7}]}"#,
        &format!("{good}{good}"),
        &format!("{good} more"),
    ] {
        assert!(matches!(read(text.as_bytes(), &rules(true)), Err(StreamError::Json(_))), "{text}");
    }
}

#[test]
fn a_long_list_is_cut_and_a_long_delta_is_an_error() {
    let entries = |count: u32| {
        let entries: Vec<_> = (0..count).map(|at| entry(&std::net::Ipv4Addr::from(at).to_string())).collect();
        format!(r#"{{"new":[{}]}}"#, entries.join(","))
    };
    let answer = read(entries(150).as_bytes(), &rules(true)).unwrap();
    assert_eq!((answer.new.len(), answer.cut), (100, false));
    assert_eq!(answer.ignored[Ignored::ALL.iter().position(|it| *it == Ignored::Full).unwrap()], 50);
    let answer = read(entries(1000).as_bytes(), &rules(true)).unwrap();
    assert!(!answer.cut);
    let answer = read(entries(1001).as_bytes(), &rules(true)).unwrap();
    assert_eq!((answer.new.len(), answer.cut), (100, true));
    assert!(matches!(read(entries(1001).as_bytes(), &rules(false)), Err(StreamError::TooMany(1001))));
}

/// What a reader gives of a text without end.
fn endless(start: &str, repeated: &'static [u8]) -> impl Read {
    let more = iter::repeat(()).map(move |()| repeated);
    struct Endless<I>(I);
    impl<I: Iterator<Item = &'static [u8]>> Read for Endless<I> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let piece = self.0.next().unwrap();
            let count = piece.len().min(buffer.len());
            buffer[..count].copy_from_slice(&piece[..count]);
            Ok(count)
        }
    }
    Cursor::new(start.as_bytes().to_vec()).chain(Endless(more))
}

#[test]
fn one_entry_without_end_takes_no_memory() {
    for (start, repeated) in [
        (r#"{"new":[{"value":""#, &b"x"[..]),
        (r#"{"new":[{"value":["#, b"[0],"),
        (r#"{"new":["#, b" "),
        (r#"{""#, b"k"),
        (r#"{"x":["#, b"1,"),
        (r#"{"new":[],"#, b"\"x\":1,"),
        (r#"{"new":[]}"#, b" "),
    ] {
        let error = read(BufReader::new(endless(start, repeated)), &rules(true)).unwrap_err().to_string();
        assert!(
            error.contains("an entry has more than") || error.contains("invalid type"),
            "{start}: {error}"
        );
    }
    // Entries without end: the list is cut.
    let answer = read(BufReader::new(endless(r#"{"new":[{}"#, b",{}")), &rules(true)).unwrap();
    assert!(answer.cut);
}

#[test]
fn many_reasons_and_origins_share_memory() {
    let entries: Vec<_> = (0..900u32)
        .map(|at| {
            entry("192.0.2.1").replace("by hand", &format!("s{at}")).replace("cscli", &format!("o{at}"))
        })
        .collect();
    let text = format!(r#"{{"new":[{}]}}"#, entries.join(","));
    let answer = read(text.as_bytes(), &Rules { max_kept: 1000, ..rules(true) }).unwrap();
    assert_eq!(answer.origins[0].len(), MAX_ORIGINS + 1);
    assert_eq!(answer.origins[0]["other"], [900 - MAX_ORIGINS as u64, 0]);
    // Each entry with a reason of its own.
    let count = u32::try_from(MAX_REASONS).unwrap() + 100;
    let entries: Vec<_> =
        (0..count).map(|at| entry("192.0.2.1").replace("by hand", &format!("s{at}"))).collect();
    let many = Rules { max_kept: 10_000, max_entries: 10_000, ..rules(true) };
    let answer = read(format!(r#"{{"new":[{}]}}"#, entries.join(",")).as_bytes(), &many).unwrap();
    let reasons: HashSet<_> = answer.new.iter().map(|new| &new.reason).collect();
    assert_eq!((answer.new.len(), reasons.len()), (MAX_REASONS + 100, MAX_REASONS + 1));
    let long = entry("192.0.2.1").replace("by hand", &format!("\\u0007{}", "y".repeat(500)));
    let answer = read(format!(r#"{{"new":[{long}]}}"#).as_bytes(), &rules(true)).unwrap();
    assert_eq!(answer.new[0].reason.chars().count(), MAX_REASON);
    assert!(!answer.new[0].reason.contains('\u{7}'));
    let list = entry("192.0.2.1").replace("cscli", "lists").replace("by hand", "drop");
    let answer = read(format!(r#"{{"new":[{list}]}}"#).as_bytes(), &rules(true)).unwrap();
    assert_eq!(answer.origins[0], Origins::from([("lists:drop".to_owned(), [1, 0])]));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), start in 0usize..3) {
        let mut text = ["", r#"{"new":["#, r#"{"deleted":[{"value":""#][start].as_bytes().to_vec();
        text.extend(bytes);
        let _ = read(text.as_slice(), &rules(true));
    }

    /// Nothing of an answer that ends too early counts.
    #[test]
    fn a_part_of_an_answer_is_an_error(count in 0usize..5, at in 0.0f64..1.0, full in any::<bool>()) {
        let entries: Vec<_> = (0..count).map(|at| entry(&format!("192.0.2.{at}"))).collect();
        let text = format!(r#"{{"deleted":[{}],"new":[{}]}}"#, entries.join(","), entries.join(","));
        prop_assert_eq!(read(text.as_bytes(), &rules(full)).unwrap().new.len(), count);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position in the text")]
        let cut = (text.len() as f64 * at) as usize;
        prop_assert!(read(&text.as_bytes()[..cut], &rules(full)).is_err());
    }

    /// How the bytes arrive does not matter.
    #[test]
    fn pieces_are_read_as_the_whole(size in 1usize..40) {
        struct Pieces<'a>(&'a [u8], usize);
        impl Read for Pieces<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let count = self.1.min(self.0.len()).min(buffer.len());
                buffer[..count].copy_from_slice(&self.0[..count]);
                self.0 = &self.0[count..];
                Ok(count)
            }
        }
        let text = format!(r#"{{"deleted":null,"new":[{},{}]}}"#, entry("192.0.2.1"), entry("2001:db8::1"));
        let whole = read(text.as_bytes(), &rules(false)).unwrap();
        prop_assert_eq!(read(BufReader::with_capacity(16, Pieces(text.as_bytes(), size)), &rules(false)).unwrap(), whole);
    }
}
