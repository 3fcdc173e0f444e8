//! One direction of a connection, as a state machine without I/O: what was seen goes in, what to do next comes out.
//! The table of states is in `docs/architecture.md`.

/// Which side of the kernel boundary carries a direction's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    /// User space reads and writes, with TCP's own back-pressure.
    Relayed,
    /// `verdict` redirects.
    Spliced,
    /// `verdict` has redirected more than the target takes: the source is left alone until the target has caught up.
    Held,
    /// User space has written all that it was left, and `verdict` takes over again if it sees it so.
    Offered,
}

/// What is to be done next for a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Read from the source.
    Read,
    /// Write what is held to the target.
    Write,
    /// Wait for the source's FIN.
    Hangup,
    /// Wait until the target has caught up.
    Drain,
    /// Wait until there is something to read, or the kernel carries again.
    Handover,
    /// Find out whether everything has reached the target.
    Proof,
    /// Send the target a FIN.
    Fin,
    /// Nothing any more.
    Nothing,
}

/// The state of one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Direction {
    plane: Plane,
    end: Progress,
    gated: bool,
    held: usize,
    read: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// The source may send more.
    Open,
    /// The source has finished; not everything is known to have reached the target.
    Finishing,
    /// Everything has reached the target; the FIN has not.
    Delivered,
    /// The FIN went out.
    Finished,
}

impl Direction {
    /// A direction in user space, of which `read` bytes were read before and `held` of these are not yet written.
    /// While `gated` nothing is written: it is not clear yet whether the source may be served at all.
    #[must_use]
    pub(super) fn new(read: u64, held: usize, gated: bool) -> Self {
        Self { plane: Plane::Relayed, end: Progress::Open, gated, held, read }
    }

    /// What to do next.
    #[must_use]
    pub(super) fn want(&self) -> Want {
        match (self.end, self.plane) {
            (Progress::Finished, _) => Want::Nothing,
            (Progress::Delivered, _) => Want::Fin,
            (Progress::Open, Plane::Spliced) => Want::Hangup,
            (Progress::Finishing, Plane::Spliced) => Want::Proof,
            (_, Plane::Held) => Want::Drain,
            (_, Plane::Offered) => Want::Handover,
            (_, Plane::Relayed) if self.held > 0 && !self.gated => Want::Write,
            (_, Plane::Relayed) => Want::Read,
        }
    }

    /// Which plane carries it now.
    #[must_use]
    pub(super) fn plane(&self) -> Plane {
        self.plane
    }

    /// Bytes that user space read of the source.
    #[must_use]
    pub(super) fn read_bytes(&self) -> u64 {
        self.read
    }

    /// Whether nothing lies between source and target in user space, so that the kernel may take over without changing
    /// the order.
    #[must_use]
    pub(super) fn can_splice(&self) -> bool {
        self.plane == Plane::Relayed && self.end == Progress::Open && self.held == 0 && !self.gated
    }

    /// Whether the source has finished sending.
    #[must_use]
    pub(super) fn ended(&self) -> bool {
        self.end != Progress::Open
    }

    /// `count` bytes were read of the source, which are now held.
    pub(super) fn read(&mut self, count: usize) {
        debug_assert!(self.end == Progress::Open && self.plane == Plane::Relayed);
        self.read += count as u64;
        self.held += count;
    }

    /// `count` of the held bytes were written to the target.
    pub(super) fn wrote(&mut self, count: usize) {
        debug_assert!(count <= self.held && !self.gated);
        self.held = self.held.saturating_sub(count);
        self.settle();
    }

    /// The source may be served.
    pub(super) fn open_gate(&mut self) {
        self.gated = false;
    }

    /// The source has finished.
    pub(super) fn source_finished(&mut self) {
        if self.end == Progress::Open {
            self.end = Progress::Finishing;
        }
        self.gated = false;
        self.settle();
    }

    /// The kernel carries it from here.
    pub(super) fn spliced(&mut self) {
        debug_assert!(self.can_splice());
        self.plane = Plane::Spliced;
    }

    /// The kernel may carry it again.
    pub(super) fn offered(&mut self) {
        debug_assert!(self.can_splice());
        self.plane = Plane::Offered;
    }

    /// The kernel carries it again.
    pub(super) fn resumed(&mut self) {
        debug_assert_eq!(self.want(), Want::Handover);
        self.plane = Plane::Spliced;
    }

    /// The kernel has not taken over, and will not.
    pub(super) fn withdrawn(&mut self) {
        debug_assert_eq!(self.want(), Want::Handover);
        self.plane = Plane::Relayed;
    }

    /// The kernel leaves to user space what the source sends. Its FIN, if it was seen, is seen again behind that.
    pub(super) fn held_back(&mut self) {
        debug_assert!(matches!(self.want(), Want::Hangup | Want::Proof | Want::Handover));
        self.plane = Plane::Held;
        self.end = Progress::Open;
    }

    /// User space carries it again: all that the kernel took of the source is in the target's send queue.
    pub(super) fn moved_to_user_space(&mut self) {
        debug_assert_eq!(self.want(), Want::Drain);
        self.plane = Plane::Relayed;
    }

    /// All that the source sent is in the target's send queue.
    pub(super) fn proven(&mut self) {
        debug_assert_eq!(self.want(), Want::Proof);
        self.end = Progress::Delivered;
    }

    /// The target was sent a FIN.
    pub(super) fn fin_sent(&mut self) {
        debug_assert_eq!(self.want(), Want::Fin);
        self.end = Progress::Finished;
    }

    /// The target takes nothing any more: what is still under way to it is given up.
    pub(super) fn abandon(&mut self) {
        self.end = Progress::Finished;
        self.gated = false;
        self.held = 0;
    }

    /// In user space there is nothing to prove: what is written is in the target's queue.
    fn settle(&mut self) {
        if self.end == Progress::Finishing && self.plane == Plane::Relayed && self.held == 0 {
            self.end = Progress::Delivered;
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
        assert_eq!(direction.want(), Want::Read);
        direction.read(100);
        assert_eq!(direction.want(), Want::Write);
        direction.wrote(60);
        assert_eq!(direction.want(), Want::Write);
        direction.wrote(40);
        assert_eq!((direction.want(), direction.read_bytes()), (Want::Read, 100));
    }

    #[test]
    fn a_relayed_fin_waits_for_what_is_held() {
        let mut direction = relayed();
        direction.read(1);
        direction.source_finished();
        assert_eq!(direction.want(), Want::Write);
        direction.wrote(1);
        assert_eq!(direction.want(), Want::Fin);
        direction.fin_sent();
        assert_eq!(direction.want(), Want::Nothing);
    }

    #[test]
    fn a_spliced_fin_waits_for_the_proof() {
        let mut direction = relayed();
        direction.spliced();
        assert_eq!(direction.want(), Want::Hangup);
        direction.source_finished();
        assert_eq!(direction.want(), Want::Proof);
        direction.proven();
        assert_eq!(direction.want(), Want::Fin);
    }

    #[test]
    fn an_abandoned_direction_wants_nothing() {
        let mut direction = relayed();
        direction.read(5);
        direction.abandon();
        assert_eq!((direction.want(), direction.ended()), (Want::Nothing, true));
    }

    #[test]
    fn a_held_direction_goes_back_to_user_space() {
        let mut direction = relayed();
        direction.spliced();
        direction.held_back();
        assert_eq!((direction.want(), direction.plane()), (Want::Drain, Plane::Held));
        direction.moved_to_user_space();
        assert_eq!((direction.want(), direction.can_splice()), (Want::Read, true));
    }

    #[test]
    fn a_direction_goes_back_to_the_kernel_and_may_be_held_again() {
        let mut direction = relayed();
        direction.offered();
        assert_eq!((direction.want(), direction.can_splice()), (Want::Handover, false));
        direction.withdrawn();
        assert_eq!(direction.want(), Want::Read);
        direction.offered();
        direction.resumed();
        assert_eq!(direction.want(), Want::Hangup);
        direction.held_back();
        direction.moved_to_user_space();
        direction.offered();
        direction.held_back();
        assert_eq!(direction.want(), Want::Drain);
    }

    #[test]
    fn a_gate_keeps_reading_and_writes_nothing() {
        let mut direction = Direction::new(0, 0, true);
        direction.read(3);
        assert_eq!((direction.want(), direction.can_splice()), (Want::Read, false));
        direction.open_gate();
        assert_eq!(direction.want(), Want::Write);
    }

    #[test]
    fn a_finished_source_opens_the_gate() {
        let mut direction = Direction::new(0, 0, true);
        direction.read(3);
        direction.source_finished();
        assert_eq!(direction.want(), Want::Write);
    }

    #[test]
    fn the_kernel_takes_over_only_when_nothing_is_held() {
        let mut direction = relayed();
        direction.read(1);
        assert!(!direction.can_splice());
        direction.wrote(1);
        assert!(direction.can_splice());
        direction.source_finished();
        assert!(!direction.can_splice());
    }

    /// What a source does, as far as the direction's wishes let it.
    #[derive(Clone, Debug)]
    enum Step {
        Sends(u8),
        Accepts(u8),
        Splices,
        Holds,
        TakesBack,
        Finishes,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..=255_u8).prop_map(Step::Sends),
            4 => (1..=255_u8).prop_map(Step::Accepts),
            2 => Just(Step::Splices),
            2 => Just(Step::Holds),
            1 => Just(Step::TakesBack),
            1 => Just(Step::Finishes),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order, the FIN goes out once and after the last byte.
        #[test]
        fn fin_follows_every_byte(steps in prop::collection::vec(step(), 0..200)) {
            let mut direction = relayed();
            let (mut sent, mut written, mut carried) = (0_u64, 0_u64, 0_u64);
            for step in steps {
                match (step, direction.want()) {
                    (Step::Sends(count), Want::Read) => {
                        sent += u64::from(count);
                        direction.read(count.into());
                    }
                    (Step::Sends(count), Want::Hangup) => {
                        sent += u64::from(count);
                        carried += u64::from(count);
                    }
                    (Step::Accepts(count), Want::Write) => {
                        let count = direction.held.min(count.into());
                        written += count as u64;
                        direction.wrote(count);
                    }
                    (Step::Splices, _) if direction.can_splice() => direction.spliced(),
                    (Step::Holds, Want::Hangup | Want::Proof) => direction.held_back(),
                    (Step::TakesBack, Want::Drain) => direction.moved_to_user_space(),
                    (Step::Finishes, Want::Read | Want::Write | Want::Hangup) => direction.source_finished(),
                    _ => {}
                }
                if direction.want() == Want::Fin {
                    prop_assert_eq!(sent, written + carried);
                    prop_assert!(direction.ended());
                }
            }
            // Then the target drains: it always comes to an end.
            if direction.want() == Want::Drain {
                direction.moved_to_user_space();
            }
            direction.source_finished();
            loop {
                match direction.want() {
                    Want::Write => {
                        written += direction.held as u64;
                        direction.wrote(direction.held);
                    }
                    Want::Proof => direction.proven(),
                    Want::Fin => direction.fin_sent(),
                    Want::Nothing => break,
                    want => prop_assert!(false, "{want:?} after the end"),
                }
            }
            prop_assert_eq!(sent, written + carried);
        }
    }
}
