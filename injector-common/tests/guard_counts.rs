//! The counts of sources in a hash map whose elements are used again at once, by several processors: every interleaving of their
//! instructions. No count is lost or left over, and no element stays.
#![cfg(test)]

use std::collections::HashSet;

use injector_common::guard::{CountWord, Counted, Enter, SourceKey};

/// A step of the protocol that is left out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The word is not compared with the source's.
    Owner,
    /// The word is replaced, whatever it is by now.
    Exchange,
    /// The element is removed without the word being dead before.
    Death,
    /// The word is alive before the element is in the map.
    Birth,
    /// Who finds the counts zero removes the element, though another has marked it.
    Winner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    LookUp,
    Load(usize),
    Exchange(usize, u64, u64),
    Insert,
    Link(usize),
    Begin,
    Hold,
    Establish,
    Leave,
    Check(usize),
    Bury(usize),
    Remove,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Processor {
    source: usize,
    /// How many connections it still opens.
    left: u8,
    step: Step,
    counted: Option<Counted>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// The element of each source.
    table: [Option<usize>; SOURCES],
    words: [u64; ELEMENTS],
    free: [bool; ELEMENTS],
    processors: Vec<Processor>,
}

const SOURCES: usize = 2;
const ELEMENTS: usize = 3;

fn own(source: usize) -> CountWord {
    CountWord::of(&SourceKey { ip: [0, 0, 0, u32::try_from(source).unwrap()], listener: 1 })
}

impl World {
    fn new(sources: &[usize], connections: u8) -> Self {
        let processor = |source: &usize| Processor {
            source: *source,
            left: connections,
            step: Step::LookUp,
            counted: None,
        };
        Self {
            table: [None; SOURCES],
            words: [CountWord::DEAD.0; ELEMENTS],
            free: [true; ELEMENTS],
            processors: sources.iter().map(processor).collect(),
        }
    }

    /// What the world is after the next instruction of one processor.
    fn next(&self, number: usize, without: Without) -> Option<Self> {
        let mut world = self.clone();
        let mut processor = self.processors[number];
        let own = own(processor.source);
        let table = &mut world.table[processor.source];
        processor.step = match processor.step {
            Step::Done => return None,
            Step::LookUp => table.map_or(Step::Insert, Step::Load),
            Step::Load(element) => {
                let word = CountWord(world.words[element]);
                let found = if without == Without::Owner && word != CountWord::DEAD {
                    Enter::Exchange(word.with(Counted::Pending))
                } else {
                    word.enter(own, Counted::Pending, u32::MAX)
                };
                match found {
                    Enter::Exchange(new) => Step::Exchange(element, word.0, new.0),
                    Enter::Retry => Step::LookUp,
                    Enter::Full => unreachable!(),
                }
            }
            Step::Exchange(element, before, new) => {
                if world.words[element] == before || without == Without::Exchange {
                    world.words[element] = new;
                    processor.counted = Some(Counted::Pending);
                    Step::Hold
                } else {
                    Step::LookUp
                }
            }
            // The kernel takes an element that may have been another's a moment ago, copies the value, and links it, all with the
            // bucket's lock.
            Step::Insert => {
                if table.is_some() {
                    // `BPF_NOEXIST`
                    Step::LookUp
                } else {
                    let element = world.free.iter().position(|free| *free)?;
                    world.free[element] = false;
                    let alive = without == Without::Birth;
                    world.words[element] = if alive { own.with(Counted::Pending) } else { CountWord::DEAD }.0;
                    if alive {
                        Step::Link(element)
                    } else {
                        *table = Some(element);
                        Step::Begin
                    }
                }
            }
            Step::Link(element) => {
                *table = Some(element);
                processor.counted = Some(Counted::Pending);
                Step::Hold
            }
            Step::Begin => {
                let element = (*table)?;
                world.words[element] = own.with(Counted::Pending).0;
                processor.counted = Some(Counted::Pending);
                Step::Hold
            }
            Step::Hold => {
                if processor.left.is_multiple_of(2) {
                    Step::Establish
                } else {
                    Step::Leave
                }
            }
            // The element is looked up again: what is counted keeps it.
            Step::Establish => {
                let element = (*table)?;
                world.words[element] = world.words[element].wrapping_add(CountWord::ESTABLISH);
                processor.counted = Some(Counted::Established);
                Step::Leave
            }
            Step::Leave => {
                let element = (*table)?;
                let what = processor.counted.take().unwrap();
                world.words[element] = world.words[element].wrapping_add(CountWord::leave(what));
                Step::Check(element)
            }
            // By now it may be another's.
            Step::Check(element) if world.words[element] == own.0 => Step::Bury(element),
            Step::Check(_) => Step::LookUp,
            Step::Bury(element) => {
                let won = world.words[element] == own.0;
                if won && without != Without::Death {
                    world.words[element] = CountWord::DEAD.0;
                }
                if won || without == Without::Winner { Step::Remove } else { Step::LookUp }
            }
            Step::Remove => {
                if let Some(element) = table.take() {
                    world.free[element] = true;
                }
                Step::LookUp
            }
        };
        let ends = matches!(self.processors[number].step, Step::Check(_) | Step::Bury(_) | Step::Remove);
        if ends && processor.step == Step::LookUp {
            processor.left -= 1;
            if processor.left == 0 {
                processor.step = Step::Done;
            }
        }
        world.processors[number] = processor;
        Some(world)
    }

    /// Whether the counts are those of the connections that exist.
    fn is_exact(&self) -> bool {
        (0..SOURCES).all(|source| {
            let held = |what| {
                let of = |it: &&Processor| it.source == source && it.counted == Some(what);
                u32::try_from(self.processors.iter().filter(of).count()).unwrap()
            };
            let word = self.table[source].map_or(CountWord::DEAD, |element| CountWord(self.words[element]));
            (word.pending(), word.established()) == (held(Counted::Pending), held(Counted::Established))
        })
    }

    fn is_empty(&self) -> bool {
        self.table == [None; SOURCES] && self.free == [true; ELEMENTS]
    }
}

/// Tries all interleavings; returns the number of worlds, or one that is wrong.
fn explore(sources: &[usize], connections: u8, without: Without) -> Result<usize, World> {
    let start = World::new(sources, connections);
    let mut seen = HashSet::from([start.clone()]);
    let mut open = vec![start];
    while let Some(world) = open.pop() {
        if !world.is_exact() {
            return Err(world);
        }
        let mut stuck = true;
        for number in 0..world.processors.len() {
            let Some(next) = world.next(number, without) else { continue };
            stuck = false;
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
        if stuck && !(world.is_empty() && world.processors.iter().all(|it| it.step == Step::Done)) {
            return Err(world);
        }
    }
    Ok(seen.len())
}

#[test]
fn counts_are_exact_in_every_interleaving() {
    for sources in [&[0, 0][..], &[0, 1], &[0, 0, 0], &[0, 0, 1], &[0, 1, 1]] {
        let worlds = explore(sources, 2, Without::Nothing).unwrap_or_else(|world| panic!("{world:?}"));
        assert!(worlds > 100, "{worlds}");
    }
}

#[test]
fn every_step_is_needed() {
    for (without, what) in [
        (Without::Owner, "owner"),
        (Without::Exchange, "exchange"),
        (Without::Death, "death"),
        (Without::Birth, "birth"),
        (Without::Winner, "winner"),
    ] {
        assert!(explore(&[0, 0, 1], 2, without).is_err(), "{what}");
    }
}
