//! IMAP4rev1, only what reading one INBOX needs (RFC 3501): LOGIN, SELECT, EXAMINE, FETCH, UID
//! FETCH, NOOP, LOGOUT.
//!
//! No literals from the client and no partial fetches: the commands of the small client crates do
//! without them. Unknown commands get `BAD`.

use std::io;

use super::wire::Wire;
use super::{Message, Shared};

const CAPABILITIES: &str = "IMAP4rev1";

/// Speaks IMAP until the client logs out or the connection breaks.
pub(super) async fn serve(wire: &mut Wire, shared: &Shared) -> io::Result<()> {
    let mut state = State::Greeted;
    wire.send(format!("* OK [CAPABILITY {CAPABILITIES}] demo backend ready\r\n").as_bytes()).await?;
    while let Some(line) = wire.text().await? {
        let answer = answer(&mut state, &line, shared);
        wire.send(&answer).await?;
        if state == State::Over {
            break;
        }
    }
    Ok(())
}

/// RFC 3501 section 3, with SELECT and EXAMINE alike: the mailbox is read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeted,
    LoggedIn,
    Selected,
    Over,
}

/// The complete response to one line, CRLF included.
fn answer(state: &mut State, line: &str, shared: &Shared) -> Vec<u8> {
    let Some((tag, command)) = line.split_once(' ').filter(|(tag, _)| !tag.is_empty()) else {
        return b"* BAD a tag and a command\r\n".to_vec();
    };
    let (mut untagged, outcome) = obey(state, command, shared);
    untagged.extend_from_slice(format!("{tag} {outcome}\r\n").as_bytes());
    untagged
}

/// Executes a command: the untagged responses, and what follows the tag.
fn obey(state: &mut State, command: &str, shared: &Shared) -> (Vec<u8>, &'static str) {
    let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
    match (verb.to_ascii_uppercase().as_str(), *state) {
        ("CAPABILITY", _) => (format!("* CAPABILITY {CAPABILITIES}\r\n").into_bytes(), "OK that is all"),
        ("NOOP", _) => (Vec::new(), "OK nothing done"),
        ("LOGOUT", _) => {
            *state = State::Over;
            (b"* BYE until next time\r\n".to_vec(), "OK logged out")
        }
        ("LOGIN", State::Greeted) => (Vec::new(), login(state, rest, &shared.account)),
        ("SELECT" | "EXAMINE", State::LoggedIn | State::Selected) => select(state, rest, &shared.mailbox()),
        ("FETCH", State::Selected) => fetch(rest, &shared.mailbox(), Numbering::Sequence),
        ("UID", State::Selected) => match rest.split_once(' ') {
            Some((verb, rest)) if verb.eq_ignore_ascii_case("FETCH") => {
                fetch(rest, &shared.mailbox(), Numbering::Uid)
            }
            _ => (Vec::new(), "BAD only UID FETCH"),
        },
        ("LOGIN" | "SELECT" | "EXAMINE" | "FETCH" | "UID", _) => (Vec::new(), "BAD not in this state"),
        _ => (Vec::new(), "BAD command not known"),
    }
}

fn login(state: &mut State, rest: &str, account: &(String, String)) -> &'static str {
    let words = astring(rest).and_then(|(user, rest)| {
        let (password, rest) = astring(rest)?;
        rest.is_empty().then_some((user, password))
    });
    match words {
        None => "BAD LOGIN user password",
        Some(given) if given == *account => {
            *state = State::LoggedIn;
            "OK welcome"
        }
        Some(_) => "NO [AUTHENTICATIONFAILED] wrong user or password",
    }
}

fn select(state: &mut State, rest: &str, mailbox: &[Message]) -> (Vec<u8>, &'static str) {
    let is_inbox =
        astring(rest).is_some_and(|(name, rest)| name.eq_ignore_ascii_case("INBOX") && rest.is_empty());
    if !is_inbox {
        // RFC 3501 section 6.3.1: a SELECT that fails leaves no mailbox selected.
        *state = State::LoggedIn;
        return (Vec::new(), "NO there is only INBOX");
    }
    *state = State::Selected;
    let count = mailbox.len();
    let untagged = format!(
        "* FLAGS (\\Seen)\r\n* {count} EXISTS\r\n* 0 RECENT\r\n* OK [UIDVALIDITY 1] as long as the demo runs\r\n\
         * OK [UIDNEXT {}] next\r\n* OK [PERMANENTFLAGS ()] none\r\n",
        count + 1
    );
    (untagged.into_bytes(), "OK [READ-ONLY] selected")
}

/// Whether a client used sequence numbers or UIDs. Nothing is ever expunged, so they are the same
/// numbers; but the response to UID FETCH always has the UID (RFC 3501 section 6.4.8).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Numbering {
    Sequence,
    Uid,
}

fn fetch(rest: &str, mailbox: &[Message], numbering: Numbering) -> (Vec<u8>, &'static str) {
    let Some((set, items)) = rest.split_once(' ') else { return (Vec::new(), "BAD FETCH set items") };
    let (Some(numbers), Some(mut items)) = (numbers(set, mailbox.len()), items_of(items)) else {
        return (Vec::new(), "BAD set or items not understood");
    };
    if numbering == Numbering::Uid && !items.contains(&Item::Uid) {
        items.insert(0, Item::Uid);
    }
    let mut untagged = Vec::new();
    for number in numbers {
        if let Some(message) = mailbox.get(number - 1) {
            untagged.extend_from_slice(format!("* {number} FETCH (").as_bytes());
            for (position, item) in items.iter().enumerate() {
                untagged.extend_from_slice(if position == 0 { b"" } else { b" " });
                item.write(number, &message.content, &mut untagged);
            }
            untagged.extend_from_slice(b")\r\n");
        }
    }
    (untagged, "OK fetched")
}

/// A data item of FETCH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    Flags,
    Uid,
    Size,
    /// A part of the message, under the name that the response has.
    Part(&'static str, Part),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    All,
    Header,
    Text,
}

impl Item {
    fn named(name: &str) -> Option<Self> {
        Some(match name.to_ascii_uppercase().as_str() {
            "FLAGS" => Self::Flags,
            "UID" => Self::Uid,
            "RFC822.SIZE" => Self::Size,
            "RFC822" => Self::Part("RFC822", Part::All),
            "RFC822.HEADER" => Self::Part("RFC822.HEADER", Part::Header),
            "RFC822.TEXT" => Self::Part("RFC822.TEXT", Part::Text),
            "BODY[]" | "BODY.PEEK[]" => Self::Part("BODY[]", Part::All),
            "BODY[HEADER]" | "BODY.PEEK[HEADER]" => Self::Part("BODY[HEADER]", Part::Header),
            "BODY[TEXT]" | "BODY.PEEK[TEXT]" => Self::Part("BODY[TEXT]", Part::Text),
            _ => return None,
        })
    }

    fn write(self, number: usize, content: &[u8], out: &mut Vec<u8>) {
        match self {
            Self::Flags => out.extend_from_slice(b"FLAGS ()"),
            Self::Uid => out.extend_from_slice(format!("UID {number}").as_bytes()),
            Self::Size => out.extend_from_slice(format!("RFC822.SIZE {}", content.len()).as_bytes()),
            Self::Part(name, part) => {
                let bytes = part.of(content);
                out.extend_from_slice(format!("{name} {{{}}}\r\n", bytes.len()).as_bytes());
                out.extend_from_slice(bytes);
            }
        }
    }
}

impl Part {
    /// The header ends with the first empty line, which belongs to it.
    fn of(self, content: &[u8]) -> &[u8] {
        let empty_line = content.windows(4).position(|window| window == b"\r\n\r\n");
        let (header, text) = content.split_at(empty_line.map_or(content.len(), |at| at + 4));
        match self {
            Self::All => content,
            Self::Header => header,
            Self::Text => text,
        }
    }
}

/// The items in `FLAGS` or `(UID BODY[])`; `None` if one is unknown or there are none.
fn items_of(list: &str) -> Option<Vec<Item>> {
    let inner = list.strip_prefix('(').and_then(|list| list.strip_suffix(')')).unwrap_or(list);
    let items: Vec<Item> = inner.split_ascii_whitespace().map(Item::named).collect::<Option<_>>()?;
    (!items.is_empty()).then_some(items)
}

/// The numbers in a set such as `1,3:5,7:*`, for a mailbox of `count` messages, ascending; `None`
/// if the set is malformed. `*` is the last message, and a range may be written in either order
/// (RFC 3501 section 9, `seq-range`).
fn numbers(set: &str, count: usize) -> Option<Vec<usize>> {
    let bound = |text: &str| match text {
        "*" => Some(count.max(1)),
        digits => digits.parse::<usize>().ok().filter(|number| *number > 0),
    };
    let mut wanted = vec![false; count];
    for range in set.split(',') {
        let (first, last) = range.split_once(':').unwrap_or((range, range));
        let (first, last) = (bound(first)?, bound(last)?);
        let (low, high) = (first.min(last), first.max(last).min(count));
        if low <= high {
            wanted[low - 1..high].fill(true);
        }
    }
    Some((1..=count).filter(|number| wanted[number - 1]).collect())
}

/// Reads an atom or a quoted string and the space after it; `None` for anything else, literals
/// included.
fn astring(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        let is_atom = !word.is_empty() && !word.contains(['"', '(', ')', '{', '\\']);
        return is_atom.then(|| (word.to_owned(), rest));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => {
                let rest = &quoted[at + 1..];
                return Some((value, rest.strip_prefix(' ').unwrap_or(rest)));
            }
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_clipped_to_the_mailbox() {
        let cases: &[(&str, usize, Option<&[usize]>)] = &[
            ("1", 3, Some(&[1])),
            ("*", 3, Some(&[3])),
            ("2:*", 3, Some(&[2, 3])),
            ("*:2", 3, Some(&[2, 3])),
            ("3:1,2", 3, Some(&[1, 2, 3])),
            ("9", 3, Some(&[])),
            ("9:*", 3, Some(&[3])),
            ("1:*", 0, Some(&[])),
            ("1:18446744073709551615", 2, Some(&[1, 2])),
            ("0", 3, None),
            ("", 3, None),
            ("1,", 3, None),
            ("a:b", 3, None),
        ];
        for (set, count, expected) in cases {
            assert_eq!(numbers(set, *count).as_deref(), *expected, "{set} of {count}");
        }
    }

    #[test]
    fn strings_are_unquoted() {
        let cases = [
            (r#""let me in" rest"#, Some(("let me in", "rest"))),
            (r#""a\"b\\c""#, Some((r#"a"b\c"#, ""))),
            ("demo pass", Some(("demo", "pass"))),
            (r#""open"#, None),
            (r#""open\"#, None),
            ("{4}", None),
            ("", None),
        ];
        for (text, expected) in cases {
            let read = astring(text);
            assert_eq!(read.as_ref().map(|(value, rest)| (value.as_str(), *rest)), expected, "{text}");
        }
    }

    #[test]
    fn a_message_is_cut_at_the_first_empty_line() {
        let content = b"Subject: x\r\n\r\nbody\r\n\r\nmore\r\n";
        assert_eq!(Part::Header.of(content), b"Subject: x\r\n\r\n");
        assert_eq!(Part::Text.of(content), b"body\r\n\r\nmore\r\n");
        assert_eq!(Part::Header.of(b"Subject: x\r\n"), b"Subject: x\r\n");
        assert_eq!(
            items_of("(UID BODY.PEEK[TEXT])"),
            Some(vec![Item::Uid, Item::Part("BODY[TEXT]", Part::Text)])
        );
        assert_eq!(items_of("BODY[]<0.10>"), None);
        assert_eq!(items_of("()"), None);
    }
}
