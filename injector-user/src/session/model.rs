//! A model of one direction, for tests: the real [`Direction`] and the real rule of the program ([`Credit::way`]) between a
//! source, a kernel that may do its part at any moment, and a target that remembers the order in which bytes came.
//!
//! The daemon's steps are as small as its system calls, so that segments fall between them as they do on a machine with
//! more than one processor.

use std::collections::VecDeque;

use injector_common::{
    SeqNumber,
    splice::{Credit, Flow, Verdict},
};
use proptest::prelude::*;

use super::direction::{DataPath, Direction, NextAction};

/// What may happen next, where it can.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A segment of so many bytes reaches the source; in the program's hands it goes where the credit says.
    Segment(u8),
    /// The source's FIN arrives.
    Fin,
    /// The target dies.
    TargetGone,
    /// The kernel's worker moves so many redirected bytes to the target's send queue.
    Worker(u8),
    /// The daemon does the next thing that its state asks for; writes take so many bytes.
    Daemon(u8),
    /// Enough has passed in user space: the kernel is to take over, or is offered to.
    Enrol,
    /// The target lags: hold.
    Pause,
    /// What stalls a daemon for a while ends: it looks, and grants more.
    Grant,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        120 => (1..=40_u8).prop_map(Step::Segment),
        1 => Just(Step::Fin),
        1 => Just(Step::TargetGone),
        200 => (1..=40_u8).prop_map(Step::Worker),
        600 => (1..=40_u8).prop_map(Step::Daemon),
        150 => Just(Step::Enrol),
        40 => Just(Step::Pause),
        60 => Just(Step::Grant),
    ]
}

/// A daemon in the middle of several system calls.
#[derive(Clone, Copy, Debug)]
enum Doing {
    /// An offer: the flow was read, the credit is not set.
    ProposeResume { seen: Flow, written: u64 },
    /// A withdrawal: the credit is set, the flow not read again.
    CancelResume,
    /// A hold: the credit is set, the state not changed.
    Pause,
    /// A grant: the flow was read.
    Grant { seen: u64 },
}

/// How many bytes the program may redirect before it stops by itself.
const CREDIT: u64 = 100;

struct Model {
    direction: Direction,
    flow: Flow,
    credit: Credit,
    enrolled: bool,
    read_before: u64,
    doing: Option<Doing>,
    /// Bytes are numbered in the order in which the source sends them.
    sent: u64,
    fin: bool,
    target_gone: bool,
    /// At the source, for user space to read.
    received: VecDeque<u64>,
    /// Read and not written.
    held: VecDeque<u64>,
    /// Redirected, not in the target's send queue.
    parked: VecDeque<u64>,
    /// The target's send queue, and all before.
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
            doing: None,
            sent: 0,
            fin: false,
            target_gone: false,
            received: VecDeque::new(),
            held: VecDeque::new(),
            parked: VecDeque::new(),
            delivered: 0,
            fin_sent: false,
        }
    }

    /// The next byte in the target's queue must be the next that was sent.
    fn deliver(&mut self, byte: u64) -> Result<(), TestCaseError> {
        prop_assert!(!self.fin_sent, "byte {byte} behind the FIN");
        prop_assert_eq!(byte, self.delivered, "lost, repeated or overtaken");
        self.delivered += 1;
        Ok(())
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Segment(count) if !self.fin => self.segment(count.into()),
            Step::Fin => self.fin = true,
            Step::TargetGone if !self.target_gone && self.doing.is_none() => {
                self.target_gone = true;
                self.direction.abandon();
            }
            Step::Worker(count) => {
                for _ in 0..count {
                    let Some(byte) = self.parked.pop_front() else { break };
                    self.deliver(byte)?;
                }
            }
            Step::Daemon(count) => self.daemon(count)?,
            Step::Enrol if self.doing.is_none() && self.direction.can_splice() => self.enrol(),
            // Setting the credit is the hold's first call.
            Step::Pause if self.doing.is_none() && self.direction.next_action() == NextAction::AwaitFin => {
                self.credit = Credit::up_to(0);
                self.doing = Some(Doing::Pause);
            }
            Step::Grant if self.doing.is_none() && self.direction.next_action() == NextAction::AwaitFin => {
                self.doing = (self.flow.passing == 0).then_some(Doing::Grant { seen: self.taken() });
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
                self.parked.extend(bytes);
            }
        }
    }

    /// As `HalfDuplex::enrol`: what was received and not read goes through the program at once (the kick).
    fn enrol(&mut self) {
        let read = self.direction.read_bytes();
        if self.enrolled {
            let written = read - self.read_before;
            if self.flow.passed == written {
                self.doing = Some(Doing::ProposeResume { seen: self.flow, written });
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

    fn taken(&self) -> u64 {
        self.flow.redirected - self.parked.len() as u64
    }

    fn daemon(&mut self, count: u8) -> Result<(), TestCaseError> {
        if let Some(doing) = self.doing.take() {
            self.go_on(doing);
            return Ok(());
        }
        match self.direction.next_action() {
            NextAction::Read if self.received.is_empty() => {
                // `HalfDuplex::complete`: the count tells whether the end of file is the end.
                if self.fin && self.sent == self.direction.read_bytes() + self.flow.redirected {
                    self.direction.source_finished();
                }
            }
            NextAction::Read => {
                let count = self.received.len().min(count.into());
                self.held.extend(self.received.drain(..count));
                self.direction.read(count);
            }
            NextAction::Write => {
                let count = self.held.len().min(count.into());
                for byte in self.held.drain(..count).collect::<Vec<_>>() {
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
            NextAction::AwaitDrain if self.parked.is_empty() => self.direction.moved_to_user_space(),
            NextAction::AwaitResume if self.flow.passing == 0 || !self.received.is_empty() || self.fin => {
                self.credit = Credit::up_to(self.flow.redirected + CREDIT);
                self.doing = Some(Doing::CancelResume);
            }
            // `Spliced::delivered`.
            NextAction::AwaitDelivery if self.flow.passing != 0 => self.direction.paused(),
            NextAction::AwaitDelivery => {
                if self.direction.read_bytes() + self.flow.redirected == self.sent && self.parked.is_empty() {
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

    fn go_on(&mut self, doing: Doing) {
        match doing {
            Doing::ProposeResume { seen, written } => {
                self.credit = Credit { limit: seen.redirected + CREDIT, resume_at: written };
                self.direction.resume_proposed();
            }
            Doing::CancelResume => match (self.flow.passing, self.parked.len()) {
                (0, _) => self.direction.resumed(),
                (_, 0) => self.direction.resume_cancelled(),
                (_, _) => self.direction.paused(),
            },
            Doing::Pause => self.direction.paused(),
            Doing::Grant { seen } => self.credit = Credit::up_to(seen + CREDIT),
        }
    }

    /// Nothing more comes: the rest must go its way by itself.
    fn run_out(&mut self) -> Result<(), TestCaseError> {
        self.fin = true;
        for _ in 0..2000 {
            if self.doing.is_none() && self.direction.next_action() == NextAction::Finished {
                break;
            }
            self.take(Step::Worker(40))?;
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

    /// No byte is lost, repeated or overtaken, the FIN comes after the last, and every direction comes to its end.
    #[test]
    fn whatever_the_planes_do_the_stream_arrives(steps in prop::collection::vec(step(), 0..300)) {
        let mut model = Model::new();
        for step in steps {
            model.take(step)?;
        }
        model.run_out()?;
    }
}

/// The property is worth nothing if its steps never get anywhere.
#[test]
fn the_steps_reach_every_plane() {
    use proptest::{strategy::ValueTree as _, test_runner::TestRunner};

    let mut runner = TestRunner::deterministic();
    let (mut resumed, mut void, mut held, mut ran_out) = (0, 0, 0, 0);
    for _ in 0..250 {
        let steps = prop::collection::vec(step(), 300).new_tree(&mut runner).unwrap().current();
        let mut model = Model::new();
        for step in steps {
            let before = (model.direction.path(), model.flow.passing);
            model.take(step).unwrap();
            match (before.0, model.direction.path()) {
                (DataPath::Resuming, DataPath::Spliced) => resumed += 1,
                (DataPath::Resuming, DataPath::Relayed) => void += 1,
                (DataPath::Spliced, DataPath::Paused) => held += 1,
                _ => {}
            }
            ran_out += u32::from(before == (DataPath::Spliced, 0) && model.flow.passing == 1);
        }
    }
    for (what, count) in [("resumed", resumed), ("void", void), ("held", held), ("ran out", ran_out)] {
        assert!(count > 20, "{what} only {count} times");
    }
}
