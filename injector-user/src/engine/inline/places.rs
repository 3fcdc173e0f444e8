//! Which listener has which place in `USAGE` and `TEMPLATES`. Pure.
//!
//! A connection refers to its listener by the place alone, and outlives the daemon: so a name keeps
//! its place while any connection of it lives. A listener whose header changes gets another place:
//! its connections keep the header that they were opened with.

use std::time::{Duration, Instant};

use injector_common::inline::{Template, Usage};
use zerocopy::IntoBytes as _;

/// How long a place must have been without connections before it is another's: longer than ended
/// connections stay.
const REST: Duration = Duration::from_secs(150);

/// The places, by id; [`Usage::ALL`] is never used.
#[derive(Debug)]
pub(super) struct Places(Vec<Option<Place>>);

#[derive(Debug)]
struct Place {
    name: String,
    /// `None` until the headers are known.
    templates: Option<[Template; 2]>,
    /// New connections of the name have this place.
    current: bool,
    idle_since: Option<Instant>,
}

/// A place that an earlier daemon has given.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) id: u32,
    pub(super) name: String,
    pub(super) templates: [Template; 2],
    /// A listener leads to it.
    pub(super) current: bool,
}

impl Places {
    pub(super) fn new(found: Vec<Found>) -> Self {
        let mut places: Vec<Option<Place>> = (0..Usage::COUNT).map(|_| None).collect();
        for Found { id, name, templates, current } in found {
            if let Some(place) = places.get_mut(index(id)) {
                *place = Some(Place { name, templates: Some(templates), current, idle_since: None });
            }
        }
        Self(places)
    }

    fn all(&self) -> impl Iterator<Item = (u32, &Place)> {
        (0..).zip(&self.0).filter_map(|(id, place)| Some((id, place.as_ref()?)))
    }

    /// The name at this place.
    pub(super) fn name(&self, id: u32) -> Option<&str> {
        Some(&self.0.get(index(id))?.as_ref()?.name)
    }

    /// All places of this name.
    pub(super) fn of(&self, name: &str) -> Vec<u32> {
        self.all().filter(|(_, place)| place.name == name).map(|(id, _)| id).collect()
    }

    /// The place of new connections of this name.
    pub(super) fn current(&self, name: &str) -> Option<u32> {
        self.all().find(|(_, place)| place.current && place.name == name).map(|(id, _)| id)
    }

    /// The place of new connections of this name; takes a free one if it has none.
    pub(super) fn reserve(&mut self, name: &str) -> Option<u32> {
        self.current(name).or_else(|| self.take(name))
    }

    /// The place of new connections of this name with these headers. `true` if the headers must be
    /// written there.
    pub(super) fn with_templates(&mut self, name: &str, templates: &[Template; 2]) -> Option<(u32, bool)> {
        let same = |place: &Place| {
            place.name == name && place.templates.as_ref().is_none_or(|other| same(other, templates))
        };
        let found = self.all().filter(|(_, place)| same(place)).max_by_key(|(_, place)| place.current);
        let id = match found.map(|(id, _)| id) {
            Some(id) => id,
            None => self.take(name)?,
        };
        for (other, place) in (0..).zip(&mut self.0) {
            if let Some(place) = place.as_mut().filter(|place| place.name == name) {
                place.current = other == id;
            }
        }
        let place = self.0.get_mut(index(id))?.as_mut()?;
        place.idle_since = None;
        Some((id, place.templates.replace(*templates).is_none()))
    }

    fn take(&mut self, name: &str) -> Option<u32> {
        let (id, free) = (0..).zip(&mut self.0).skip(1).find(|(_, place)| place.is_none())?;
        *free = Some(Place { name: name.to_owned(), templates: None, current: true, idle_since: None });
        Some(id)
    }

    /// Frees the places that nothing refers to: `live` is whether a connection has it, `held`
    /// whether its name is still a listener's. Returns the freed ones.
    pub(super) fn release(
        &mut self,
        live: impl Fn(u32) -> bool,
        held: impl Fn(&str) -> bool,
        now: Instant,
    ) -> Vec<u32> {
        let mut freed = Vec::new();
        for (id, slot) in (0..).zip(&mut self.0) {
            let Some(place) = slot else { continue };
            if live(id) || (place.current && held(&place.name)) {
                place.idle_since = None;
            } else if now.duration_since(*place.idle_since.get_or_insert(now)) >= REST {
                *slot = None;
                freed.push(id);
            }
        }
        freed
    }
}

fn index(id: u32) -> usize {
    usize::try_from(id).unwrap_or(usize::MAX)
}

fn same(one: &[Template; 2], other: &[Template; 2]) -> bool {
    one.iter().zip(other).all(|(one, other)| one.as_bytes() == other.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn templates(byte: u8) -> [Template; 2] {
        let rendered = [byte; 64];
        [false, true].map(|ipv6| Template::new(&rendered, ipv6, false).unwrap())
    }

    fn empty() -> Places {
        Places::new(Vec::new())
    }

    #[test]
    fn a_name_keeps_its_place() {
        let mut places = empty();
        assert_eq!(places.reserve("mx"), Some(1));
        assert_eq!(places.reserve("imap"), Some(2));
        assert_eq!(places.with_templates("mx", &templates(1)), Some((1, true)));
        assert_eq!(places.with_templates("mx", &templates(1)), Some((1, false)));
        assert_eq!((places.name(2), places.name(3), places.current("mx")), (Some("imap"), None, Some(1)));
    }

    #[test]
    fn another_header_takes_another_place_and_back() {
        let mut places = empty();
        assert_eq!(places.with_templates("mx", &templates(1)), Some((1, true)));
        assert_eq!(places.with_templates("mx", &templates(2)), Some((2, true)));
        assert_eq!((places.current("mx"), places.of("mx")), (Some(2), vec![1, 2]));
        assert_eq!(places.with_templates("mx", &templates(1)), Some((1, false)));
        assert_eq!(places.current("mx"), Some(1));
    }

    #[test]
    fn a_place_is_free_once_its_connections_are_long_over() {
        let (mut places, start) = (empty(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        places.with_templates("old", &templates(1));
        places.with_templates("mx", &templates(1));
        places.with_templates("mx", &templates(2));
        let held = |name: &str| name == "mx";
        assert_eq!(places.release(|id| id == 1, held, at(0)), Vec::<u32>::new());
        assert_eq!(places.release(|id| id == 1, held, at(200)), [2]);
        // A connection came to life again meanwhile.
        assert_eq!(places.release(|_| false, held, at(300)), Vec::<u32>::new());
        assert_eq!(places.release(|id| id == 1, held, at(440)), Vec::<u32>::new());
        assert_eq!(places.release(|_| false, held, at(500)), Vec::<u32>::new());
        assert_eq!(places.release(|_| false, held, at(651)), [1]);
        assert_eq!((places.current("mx"), places.of("old")), (Some(3), vec![]));
        assert_eq!(places.reserve("new"), Some(1));
    }

    #[test]
    fn places_are_found_again_by_name_and_header() {
        let found = |id, name: &str, byte, current| Found {
            id,
            name: name.to_owned(),
            templates: templates(byte),
            current,
        };
        let mut places = Places::new(vec![found(7, "mx", 1, false), found(9, "mx", 2, true)]);
        assert_eq!(places.reserve("mx"), Some(9));
        assert_eq!(places.with_templates("mx", &templates(2)), Some((9, false)));
        assert_eq!(places.reserve("imap"), Some(1));
    }

    #[test]
    fn no_place_is_left() {
        let mut places = empty();
        for number in 1..Usage::COUNT {
            assert_eq!(places.reserve(&number.to_string()), Some(number));
        }
        assert_eq!(places.reserve("one more"), None);
        assert_eq!(places.with_templates("one more", &templates(1)), None);
    }
}
