//! Words of a shell command.

/// The text as one word.
pub(super) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_are_quoted() {
        assert_eq!(quote("both sides at once"), "'both sides at once'");
        assert_eq!(quote("client's"), r"'client'\''s'");
    }
}
