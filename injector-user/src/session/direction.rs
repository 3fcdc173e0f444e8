//! One direction of a connection, as a state machine without I/O: events go in, the next action
//! comes out. The table of states is in `docs/architecture.md`.

/// Which side of the kernel boundary forwards a direction's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataPath {
    /// User space reads and writes, with TCP's own flow control.
    Relayed,
    /// `verdict` redirects the payload to the target.
    Spliced,
    /// `verdict` has redirected more than the target accepts. User space does not read the source
    /// until the target has caught up.
    Paused,
    /// User space has written everything that it read. `verdict` resumes if it agrees.
    Resuming,
}

/// What to do next for a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NextAction {
    /// Read from the source.
    Read,
    /// Write the pending bytes to the target.
    Write,
    /// Wait for the source's FIN.
    AwaitFin,
    /// Wait until the target has caught up.
    AwaitDrain,
    /// Wait until there is something to read, or the kernel forwards again.
    AwaitResume,
    /// Wait until every byte is in the target's send queue.
    AwaitDelivery,
    /// Send the target a FIN.
    SendFin,
    /// Nothing: the direction is finished.
    Finished,
}

/// The state of one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Direction {
    path: DataPath,
    close: CloseState,
    awaiting_check: bool,
    pending: usize,
    read: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CloseState {
    /// The source may send more.
    Open,
    /// The source has sent its FIN; some bytes may not have reached the target's send queue.
    Finishing,
    /// Every byte has reached the target's send queue; the FIN was not sent yet.
    Delivered,
    /// The FIN was sent.
    Finished,
}

impl Direction {
    /// A direction in user space. `read` bytes were read before, and `pending` of these are not yet
    /// written. While it is `awaiting_check` nothing is written: the first bytes may be a forged
    /// header.
    #[must_use]
    pub(super) fn new(read: u64, pending: usize, awaiting_check: bool) -> Self {
        Self { path: DataPath::Relayed, close: CloseState::Open, awaiting_check, pending, read }
    }

    /// What to do next.
    #[must_use]
    pub(super) fn next_action(&self) -> NextAction {
        match (self.close, self.path) {
            (CloseState::Finished, _) => NextAction::Finished,
            (CloseState::Delivered, _) => NextAction::SendFin,
            (CloseState::Open, DataPath::Spliced) => NextAction::AwaitFin,
            (CloseState::Finishing, DataPath::Spliced) => NextAction::AwaitDelivery,
            (_, DataPath::Paused) => NextAction::AwaitDrain,
            (_, DataPath::Resuming) => NextAction::AwaitResume,
            (_, DataPath::Relayed) if self.pending > 0 && !self.awaiting_check => NextAction::Write,
            (_, DataPath::Relayed) => NextAction::Read,
        }
    }

    /// The present data path.
    #[must_use]
    pub(super) fn path(&self) -> DataPath {
        self.path
    }

    /// Bytes that user space read from the source.
    #[must_use]
    pub(super) fn read_bytes(&self) -> u64 {
        self.read
    }

    /// Whether no byte is pending in user space, so that the kernel may take over without changing
    /// the order.
    #[must_use]
    pub(super) fn can_splice(&self) -> bool {
        self.path == DataPath::Relayed
            && self.close == CloseState::Open
            && self.pending == 0
            && !self.awaiting_check
    }

    /// Whether the source has finished sending.
    #[must_use]
    pub(super) fn source_ended(&self) -> bool {
        self.close != CloseState::Open
    }

    /// Whether nothing is written until the first bytes are known.
    #[must_use]
    pub(super) fn is_awaiting_check(&self) -> bool {
        self.awaiting_check
    }

    /// `count` bytes were read from the source; they are pending now.
    pub(super) fn read(&mut self, count: usize) {
        debug_assert!(self.close == CloseState::Open && self.path == DataPath::Relayed);
        self.read += count as u64;
        self.pending += count;
    }

    /// `count` of the pending bytes were written to the target.
    pub(super) fn wrote(&mut self, count: usize) {
        debug_assert!(count <= self.pending && !self.awaiting_check);
        self.pending = self.pending.saturating_sub(count);
        self.check_delivered();
    }

    /// The first bytes are not a forged header.
    pub(super) fn check_passed(&mut self) {
        self.awaiting_check = false;
    }

    /// The source has sent its FIN.
    pub(super) fn source_finished(&mut self) {
        if self.close == CloseState::Open {
            self.close = CloseState::Finishing;
        }
        self.awaiting_check = false;
        self.check_delivered();
    }

    /// The kernel forwards from now on.
    pub(super) fn spliced(&mut self) {
        debug_assert!(self.can_splice());
        self.path = DataPath::Spliced;
    }

    /// The kernel may resume.
    pub(super) fn resume_proposed(&mut self) {
        debug_assert!(self.can_splice());
        self.path = DataPath::Resuming;
    }

    /// The kernel has resumed.
    pub(super) fn resumed(&mut self) {
        debug_assert_eq!(self.next_action(), NextAction::AwaitResume);
        self.path = DataPath::Spliced;
    }

    /// The kernel has not resumed, and will not.
    pub(super) fn resume_cancelled(&mut self) {
        debug_assert_eq!(self.next_action(), NextAction::AwaitResume);
        self.path = DataPath::Relayed;
    }

    /// The kernel leaves what the source sends to user space. If the FIN was seen, user space sees
    /// it again behind those bytes.
    pub(super) fn paused(&mut self) {
        debug_assert!(matches!(
            self.next_action(),
            NextAction::AwaitFin | NextAction::AwaitDelivery | NextAction::AwaitResume
        ));
        self.path = DataPath::Paused;
        self.close = CloseState::Open;
    }

    /// User space forwards again: everything that the kernel redirected is in the target's send
    /// queue.
    pub(super) fn moved_to_user_space(&mut self) {
        debug_assert_eq!(self.next_action(), NextAction::AwaitDrain);
        self.path = DataPath::Relayed;
    }

    /// Everything that the source sent is in the target's send queue.
    pub(super) fn delivered(&mut self) {
        debug_assert_eq!(self.next_action(), NextAction::AwaitDelivery);
        self.close = CloseState::Delivered;
    }

    /// The target was sent a FIN.
    pub(super) fn fin_sent(&mut self) {
        debug_assert_eq!(self.next_action(), NextAction::SendFin);
        self.close = CloseState::Finished;
    }

    /// The target accepts nothing any more: the pending bytes are discarded.
    pub(super) fn abandon(&mut self) {
        self.close = CloseState::Finished;
        self.awaiting_check = false;
        self.pending = 0;
    }

    /// In user space no proof of delivery is needed: written bytes are in the target's send queue.
    fn check_delivered(&mut self) {
        if self.close == CloseState::Finishing && self.path == DataPath::Relayed && self.pending == 0 {
            self.close = CloseState::Delivered;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn relayed() -> Direction {
        Direction::new(0, 0, false)
    }

    #[test]
    fn relayed_reads_and_writes_in_turn() {
        let mut direction = relayed();
        assert_eq!(direction.next_action(), NextAction::Read);
        direction.read(100);
        assert_eq!(direction.next_action(), NextAction::Write);
        direction.wrote(60);
        assert_eq!(direction.next_action(), NextAction::Write);
        direction.wrote(40);
        assert_eq!((direction.next_action(), direction.read_bytes()), (NextAction::Read, 100));
    }

    #[test]
    fn a_relayed_fin_waits_for_pending_bytes() {
        let mut direction = relayed();
        direction.read(1);
        direction.source_finished();
        assert_eq!(direction.next_action(), NextAction::Write);
        direction.wrote(1);
        assert_eq!(direction.next_action(), NextAction::SendFin);
        direction.fin_sent();
        assert_eq!(direction.next_action(), NextAction::Finished);
    }

    #[test]
    fn a_spliced_fin_waits_for_proof_of_delivery() {
        let mut direction = relayed();
        direction.spliced();
        assert_eq!(direction.next_action(), NextAction::AwaitFin);
        direction.source_finished();
        assert_eq!(direction.next_action(), NextAction::AwaitDelivery);
        direction.delivered();
        assert_eq!(direction.next_action(), NextAction::SendFin);
    }

    #[test]
    fn an_abandoned_direction_is_finished() {
        let mut direction = relayed();
        direction.read(5);
        direction.abandon();
        assert_eq!((direction.next_action(), direction.source_ended()), (NextAction::Finished, true));
    }

    #[test]
    fn a_paused_direction_moves_to_user_space() {
        let mut direction = relayed();
        direction.spliced();
        direction.paused();
        assert_eq!((direction.next_action(), direction.path()), (NextAction::AwaitDrain, DataPath::Paused));
        direction.moved_to_user_space();
        assert_eq!((direction.next_action(), direction.can_splice()), (NextAction::Read, true));
    }

    #[test]
    fn a_direction_resumes_in_the_kernel_and_may_be_paused_again() {
        let mut direction = relayed();
        direction.resume_proposed();
        assert_eq!((direction.next_action(), direction.can_splice()), (NextAction::AwaitResume, false));
        direction.resume_cancelled();
        assert_eq!(direction.next_action(), NextAction::Read);
        direction.resume_proposed();
        direction.resumed();
        assert_eq!(direction.next_action(), NextAction::AwaitFin);
        direction.paused();
        direction.moved_to_user_space();
        direction.resume_proposed();
        direction.paused();
        assert_eq!(direction.next_action(), NextAction::AwaitDrain);
    }

    #[test]
    fn nothing_is_written_until_the_check_has_passed() {
        let mut direction = Direction::new(0, 0, true);
        direction.read(3);
        assert_eq!((direction.next_action(), direction.can_splice()), (NextAction::Read, false));
        direction.check_passed();
        assert_eq!(direction.next_action(), NextAction::Write);
    }

    #[test]
    fn a_fin_ends_the_check() {
        let mut direction = Direction::new(0, 0, true);
        direction.read(3);
        direction.source_finished();
        assert_eq!(direction.next_action(), NextAction::Write);
    }

    #[test]
    fn the_kernel_takes_over_only_while_no_byte_is_pending() {
        let mut direction = relayed();
        direction.read(1);
        assert!(!direction.can_splice());
        direction.wrote(1);
        assert!(direction.can_splice());
        direction.source_finished();
        assert!(!direction.can_splice());
    }

    /// An event that is applied if the direction's next action allows it.
    #[derive(Clone, Debug)]
    enum Step {
        Send(u8),
        Accept(u8),
        Splice,
        Pause,
        MoveToUserSpace,
        Finish,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..=255_u8).prop_map(Step::Send),
            4 => (1..=255_u8).prop_map(Step::Accept),
            2 => Just(Step::Splice),
            2 => Just(Step::Pause),
            1 => Just(Step::MoveToUserSpace),
            1 => Just(Step::Finish),
        ]
    }

    proptest! {
        /// In every order of events the FIN is sent once, after the last byte.
        #[test]
        fn fin_follows_every_byte(steps in prop::collection::vec(step(), 0..200)) {
            let mut direction = relayed();
            let (mut sent, mut written, mut spliced) = (0_u64, 0_u64, 0_u64);
            for step in steps {
                match (step, direction.next_action()) {
                    (Step::Send(count), NextAction::Read) => {
                        sent += u64::from(count);
                        direction.read(count.into());
                    }
                    (Step::Send(count), NextAction::AwaitFin) => {
                        sent += u64::from(count);
                        spliced += u64::from(count);
                    }
                    (Step::Accept(count), NextAction::Write) => {
                        let count = direction.pending.min(count.into());
                        written += count as u64;
                        direction.wrote(count);
                    }
                    (Step::Splice, _) if direction.can_splice() => direction.spliced(),
                    (Step::Pause, NextAction::AwaitFin | NextAction::AwaitDelivery) => direction.paused(),
                    (Step::MoveToUserSpace, NextAction::AwaitDrain) => direction.moved_to_user_space(),
                    (Step::Finish, NextAction::Read | NextAction::Write | NextAction::AwaitFin) => {
                        direction.source_finished();
                    }
                    _ => {}
                }
                if direction.next_action() == NextAction::SendFin {
                    prop_assert_eq!(sent, written + spliced);
                    prop_assert!(direction.source_ended());
                }
            }
            // Once the target drains, every direction finishes.
            if direction.next_action() == NextAction::AwaitDrain {
                direction.moved_to_user_space();
            }
            direction.source_finished();
            loop {
                match direction.next_action() {
                    NextAction::Write => {
                        written += direction.pending as u64;
                        direction.wrote(direction.pending);
                    }
                    NextAction::AwaitDelivery => direction.delivered(),
                    NextAction::SendFin => direction.fin_sent(),
                    NextAction::Finished => break,
                    action => prop_assert!(false, "{action:?} after the source's FIN"),
                }
            }
            prop_assert_eq!(sent, written + spliced);
        }
    }
}
