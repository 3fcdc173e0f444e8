//! A model of one direction, for tests: the real [`Direction`] and the program's real decision
//! ([`Credit::verdict`]), between a source, a kernel that may act at any moment, and a target that
//! checks the order of the bytes.
//!
//! The daemon's steps are as small as its system calls, so that segments arrive between them as on
//! a machine with several processors.

use std::collections::VecDeque;

use injector_common::{
    SeqNumber,
    splice::{Credit, Flow, Verdict},
};
use proptest::prelude::*;

use super::direction::{DataPath, Direction, NextAction};

/// An event. It is ignored where it is not possible.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A segment of this many bytes reaches the source. If it is enrolled, the credit decides the
    /// way.
    Segment(u8),
    /// The source's FIN arrives.
    Fin,
    /// The target breaks.
    TargetGone,
    /// The kernel worker moves this many redirected bytes to the target's send queue.
    Worker(u8),
    /// The daemon does its next action; reads and writes move this many bytes.
    Daemon(u8),
    /// The daemon enrols the direction, or proposes to resume.
    Enrol,
    /// The daemon pauses the direction.
    Pause,
    /// The daemon checks the backlog and grants more credit.
    Grant,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        120 => (1..=40_u8).prop_map(Event::Segment),
        1 => Just(Event::Fin),
        1 => Just(Event::TargetGone),
        200 => (1..=40_u8).prop_map(Event::Worker),
        600 => (1..=40_u8).prop_map(Event::Daemon),
        150 => Just(Event::Enrol),
        40 => Just(Event::Pause),
        60 => Just(Event::Grant),
    ]
}

/// The daemon between two system calls.
#[derive(Clone, Copy, Debug)]
enum InProgress {
    /// The flow was read; the credit is not set yet.
    ProposeResume { seen: Flow, written: u64 },
    /// The credit was set; the flow was not read again yet.
    CancelResume,
    /// The credit was set; the state was not changed yet.
    Pause,
    /// The flow was read; the credit is not set yet.
    Grant { seen: u64 },
}

/// The credit: how many bytes the program may redirect until it stops.
const CREDIT: u64 = 100;

struct Model {
    direction: Direction,
    flow: Flow,
    credit: Credit,
    enrolled: bool,
    read_before: u64,
    in_progress: Option<InProgress>,
    /// Bytes sent. Each byte is known by its number in the stream.
    sent: u64,
    fin: bool,
    target_gone: bool,
    /// In the source's receive queue, for user space to read.
    received: VecDeque<u64>,
    /// Read and not yet written.
    pending: VecDeque<u64>,
    /// Redirected and not yet in the target's send queue.
    backlog: VecDeque<u64>,
    /// Bytes that were put into the target's send queue.
    delivered: u64,
    fin_sent: bool,
}

impl Model {
    fn new() -> Self {
        Self {
            direction: Direction::new(0, 0, false),
            flow: Flow::new(SeqNumber(0)),
            credit: Credit::up_to(0),
            enrolled: false,
            read_before: 0,
            in_progress: None,
            sent: 0,
            fin: false,
            target_gone: false,
            received: VecDeque::new(),
            pending: VecDeque::new(),
            backlog: VecDeque::new(),
            delivered: 0,
            fin_sent: false,
        }
    }

    /// Puts a byte into the target's send queue, where it must follow the one before.
    fn deliver(&mut self, byte: u64) -> Result<(), TestCaseError> {
        prop_assert!(!self.fin_sent, "byte {byte} after the FIN");
        prop_assert_eq!(byte, self.delivered, "lost, repeated or out of order");
        self.delivered += 1;
        Ok(())
    }

    fn apply(&mut self, event: Event) -> Result<(), TestCaseError> {
        match event {
            Event::Segment(count) if !self.fin => self.segment(count.into()),
            Event::Fin => self.fin = true,
            Event::TargetGone if !self.target_gone && self.in_progress.is_none() => {
                self.target_gone = true;
                self.direction.abandon();
            }
            Event::Worker(count) => {
                for _ in 0..count {
                    let Some(byte) = self.backlog.pop_front() else { break };
                    self.deliver(byte)?;
                }
            }
            Event::Daemon(count) => self.daemon(count)?,
            Event::Enrol if self.in_progress.is_none() && self.direction.can_splice() => self.enrol(),
            // To pause, the daemon first sets the credit.
            Event::Pause
                if self.in_progress.is_none() && self.direction.next_action() == NextAction::AwaitFin =>
            {
                self.credit = Credit::up_to(0);
                self.in_progress = Some(InProgress::Pause);
            }
            Event::Grant
                if self.in_progress.is_none() && self.direction.next_action() == NextAction::AwaitFin =>
            {
                self.in_progress =
                    (self.flow.passing == 0).then_some(InProgress::Grant { seen: self.queued() });
            }
            _ => {}
        }
        Ok(())
    }

    fn segment(&mut self, count: u64) {
        let bytes = self.sent..self.sent + count;
        self.sent += count;
        if !self.enrolled {
            return self.received.extend(bytes);
        }
        match self.credit.verdict(&self.flow) {
            Verdict::Pass => {
                self.flow.passed += count;
                self.flow.passing = 1;
                self.received.extend(bytes);
            }
            Verdict::Redirect | Verdict::Resume => {
                self.flow.passing = 0;
                self.flow.redirected += count;
                self.backlog.extend(bytes);
            }
        }
    }

    /// As `HalfDuplex::enrol`: the program runs at once on what was received and not read.
    fn enrol(&mut self) {
        let read = self.direction.read_bytes();
        if self.enrolled {
            let written = read - self.read_before;
            if self.flow.passed == written {
                self.in_progress = Some(InProgress::ProposeResume { seen: self.flow, written });
            }
            return;
        }
        self.enrolled = true;
        self.read_before = read;
        self.credit = Credit::up_to(CREDIT);
        self.direction.spliced();
        let waiting = self.received.len() as u64;
        self.received.clear();
        self.sent -= waiting;
        if waiting > 0 {
            self.segment(waiting);
        }
    }

    fn queued(&self) -> u64 {
        self.flow.redirected - self.backlog.len() as u64
    }

    fn daemon(&mut self, count: u8) -> Result<(), TestCaseError> {
        if let Some(in_progress) = self.in_progress.take() {
            self.complete(in_progress);
            return Ok(());
        }
        match self.direction.next_action() {
            NextAction::Read if self.received.is_empty() => {
                // As `HalfDuplex::is_complete`: the byte count shows whether the end of file is the
                // FIN.
                if self.fin && self.sent == self.direction.read_bytes() + self.flow.redirected {
                    self.direction.source_finished();
                }
            }
            NextAction::Read => {
                let count = self.received.len().min(count.into());
                self.pending.extend(self.received.drain(..count));
                self.direction.read(count);
            }
            NextAction::Write => {
                let count = self.pending.len().min(count.into());
                for byte in self.pending.drain(..count).collect::<Vec<_>>() {
                    self.deliver(byte)?;
                }
                self.direction.wrote(count);
            }
            NextAction::AwaitFin if self.flow.passing != 0 => self.direction.paused(),
            NextAction::AwaitFin => {
                if self.fin {
                    self.direction.source_finished();
                }
            }
            NextAction::AwaitDrain if self.backlog.is_empty() => self.direction.moved_to_user_space(),
            NextAction::AwaitResume if self.flow.passing == 0 || !self.received.is_empty() || self.fin => {
                self.credit = Credit::up_to(self.flow.redirected + CREDIT);
                self.in_progress = Some(InProgress::CancelResume);
            }
            // As `SplicedDirection::delivered`.
            NextAction::AwaitDelivery if self.flow.passing != 0 => self.direction.paused(),
            NextAction::AwaitDelivery => {
                if self.direction.read_bytes() + self.flow.redirected == self.sent && self.backlog.is_empty()
                {
                    self.direction.delivered();
                }
            }
            NextAction::SendFin => {
                prop_assert!(self.fin && self.delivered == self.sent, "FIN before the last byte");
                self.fin_sent = true;
                self.direction.fin_sent();
            }
            NextAction::AwaitDrain | NextAction::AwaitResume | NextAction::Finished => {}
        }
        Ok(())
    }

    fn complete(&mut self, in_progress: InProgress) {
        match in_progress {
            InProgress::ProposeResume { seen, written } => {
                self.credit = Credit { limit: seen.redirected + CREDIT, resume_at: written };
                self.direction.resume_proposed();
            }
            InProgress::CancelResume => match (self.flow.passing, self.backlog.len()) {
                (0, _) => self.direction.resumed(),
                (_, 0) => self.direction.resume_cancelled(),
                (_, _) => self.direction.paused(),
            },
            InProgress::Pause => self.direction.paused(),
            InProgress::Grant { seen } => self.credit = Credit::up_to(seen + CREDIT),
        }
    }

    /// After the FIN the direction must finish without further events.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        self.fin = true;
        for _ in 0..2000 {
            if self.in_progress.is_none() && self.direction.next_action() == NextAction::Finished {
                break;
            }
            self.apply(Event::Worker(40))?;
            self.daemon(40)?;
        }
        prop_assert_eq!(self.direction.next_action(), NextAction::Finished, "stuck in {:?}", self.direction);
        if !self.target_gone {
            prop_assert_eq!(self.delivered, self.sent);
            prop_assert!(self.fin_sent);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// No byte is lost, repeated or out of order, the FIN follows the last one, and every direction
    /// finishes.
    #[test]
    fn the_stream_arrives_intact_on_every_data_path(events in prop::collection::vec(event(), 0..300)) {
        let mut model = Model::new();
        for event in events {
            model.apply(event)?;
        }
        model.finish()?;
    }
}

/// The property above means something only if its events reach every transition often.
#[test]
fn the_events_reach_every_data_path() {
    use proptest::{strategy::ValueTree as _, test_runner::TestRunner};

    let mut runner = TestRunner::deterministic();
    let (mut resumed, mut cancelled, mut paused, mut credit_used_up) = (0, 0, 0, 0);
    for _ in 0..250 {
        let events = prop::collection::vec(event(), 300).new_tree(&mut runner).unwrap().current();
        let mut model = Model::new();
        for event in events {
            let before = (model.direction.path(), model.flow.passing);
            model.apply(event).unwrap();
            match (before.0, model.direction.path()) {
                (DataPath::Resuming, DataPath::Spliced) => resumed += 1,
                (DataPath::Resuming, DataPath::Relayed) => cancelled += 1,
                (DataPath::Spliced, DataPath::Paused) => paused += 1,
                _ => {}
            }
            credit_used_up += u32::from(before == (DataPath::Spliced, 0) && model.flow.passing == 1);
        }
    }
    for (what, count) in [
        ("resumed", resumed),
        ("cancelled", cancelled),
        ("paused", paused),
        ("credit used up", credit_used_up),
    ] {
        assert!(count > 20, "{what} only {count} times");
    }
}
