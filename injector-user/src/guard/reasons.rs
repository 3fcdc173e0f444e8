//! The reasons of bans, each text once.

use std::{collections::HashMap, sync::Arc};

/// The reasons that bans have. Each ban that has one counts.
#[derive(Debug, Default)]
pub(super) struct Reasons {
    texts: Vec<Text>,
    numbers: HashMap<Arc<str>, ReasonNumber>,
    /// Places in `texts` that are not used.
    free: Vec<ReasonNumber>,
}

/// Which of the reasons: half as long as a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReasonNumber(u32);

#[derive(Debug)]
struct Text {
    text: Arc<str>,
    bans: usize,
}

impl Reasons {
    /// One more ban has this reason.
    pub(super) fn add(&mut self, text: Arc<str>) -> ReasonNumber {
        if let Some(number) = self.numbers.get(&text)
            && let Some(known) = self.texts.get_mut(number.index())
        {
            known.bans += 1;
            return *number;
        }
        let new = Text { text: Arc::clone(&text), bans: 1 };
        let number = match self.free.pop() {
            Some(number) => {
                if let Some(place) = self.texts.get_mut(number.index()) {
                    *place = new;
                }
                number
            }
            None => {
                self.texts.push(new);
                // Bans are fewer than 2^32 (guard.max_bans).
                ReasonNumber(u32::try_from(self.texts.len() - 1).unwrap_or(u32::MAX))
            }
        };
        self.numbers.insert(text, number);
        number
    }

    /// One ban less has it. A reason without bans is forgotten.
    pub(super) fn remove(&mut self, number: ReasonNumber) {
        let Some(known) = self.texts.get_mut(number.index()) else { return };
        known.bans -= 1;
        if known.bans == 0 {
            self.numbers.remove(&known.text);
            known.text = Arc::default();
            self.free.push(number);
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    pub(super) fn text(&self, number: ReasonNumber) -> Arc<str> {
        self.texts.get(number.index()).map(|known| Arc::clone(&known.text)).unwrap_or_default()
    }
}

impl ReasonNumber {
    const fn index(self) -> usize {
        self.0 as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_kept_once_and_while_a_ban_has_it() {
        let mut reasons = Reasons::default();
        let (one, again) = (reasons.add("one".into()), reasons.add("one".into()));
        let other = reasons.add("other".into());
        assert!(one == again && one != other);
        assert!(Arc::ptr_eq(&reasons.text(one), &reasons.text(again)));
        reasons.remove(one);
        assert_eq!((&*reasons.text(again), &*reasons.text(other)), ("one", "other"));
        reasons.remove(again);
        let third = reasons.add("third".into());
        assert_eq!((third, reasons.texts.len(), reasons.numbers.len()), (one, 2, 2));
        assert_eq!((&*reasons.text(third), &*reasons.text(other)), ("third", "other"));
    }
}
