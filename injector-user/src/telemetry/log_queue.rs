//! The queue between the threads that log and standard error.
//!
//! Who reads the log may stop: a journal that is restarted, a collector whose disk is full. A write
//! to its pipe then waits, and no thread with mail may wait for it. So one thread writes, and the
//! others append to a queue. What does not fit is dropped and counted.

use std::{
    fmt,
    io::{self, ErrorKind, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

use super::target;

/// How many bytes of lines wait: ten thousand lines of the access log.
const MAX_QUEUED: usize = 4 << 20;
/// How long the lines that wait may take at the exit.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before the next attempt where standard error does not block and takes nothing.
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// Where log lines go. Clones share the queue.
#[derive(Clone)]
pub struct LogQueue(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There are lines to write, or the writer has become idle.
    changed: Condvar,
    dropped: AtomicU64,
}

struct State {
    lines: Vec<u8>,
    /// Until the thread runs: lines are written by the thread that logs them.
    writer: Option<Box<dyn Write + Send>>,
    /// The thread is writing what it took.
    writing: bool,
}

impl fmt::Debug for LogQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogQueue").field("dropped", &self.dropped()).finish_non_exhaustive()
    }
}

impl LogQueue {
    /// Writes each line at once, until [`LogQueue::start`].
    #[must_use]
    pub fn new(writer: impl Write + Send + 'static) -> Self {
        let state = State { lines: Vec::new(), writer: Some(Box::new(writer)), writing: false };
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            dropped: AtomicU64::new(0),
        }))
    }

    /// Starts the thread that writes. It gets the rights of the calling thread, so this is called
    /// once they are dropped. The lines that wait are written before the result is dropped, if this
    /// takes no longer than a second.
    ///
    /// # Errors
    /// When the system has no thread left; lines are then written at once.
    pub fn start(&self) -> io::Result<LogThread> {
        let queue = self.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || queue.run())?;
        Ok(LogThread(self.clone()))
    }

    /// How many lines were dropped, because the queue was full or standard error is closed.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    fn run(&self) {
        let Some(mut writer) = self.state().writer.take() else { return };
        let mut reported = 0;
        loop {
            let lines = self.take();
            let lost = write_lines(&mut *writer, &lines);
            let dropped = self.0.dropped.fetch_add(lost, Ordering::Relaxed) + lost;
            // While standard error fails, the report would be lost, too.
            if lost == 0 && dropped != reported {
                let lines = dropped - reported;
                reported = dropped;
                tracing::warn!(target: target::DAEMON, lines, "log lines were dropped, because what reads the log was too slow; mail was not affected");
            }
        }
    }

    /// Waits for lines, and takes them.
    fn take(&self) -> Vec<u8> {
        let mut state = self.state();
        state.writing = false;
        self.0.changed.notify_all();
        while state.lines.is_empty() {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        std::mem::take(&mut state.lines)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if let Some(writer) = &mut state.writer {
            let lost = write_lines(&mut **writer, line);
            self.0.dropped.fetch_add(lost, Ordering::Relaxed);
        } else if state.lines.len() + line.len() > MAX_QUEUED {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            state.lines.extend_from_slice(line);
            self.0.changed.notify_all();
        }
    }

    /// Waits until all lines are written, for at most `limit`.
    fn flush(&self, limit: Duration) {
        let waiting =
            |state: &mut State| state.writer.is_none() && (state.writing || !state.lines.is_empty());
        drop(self.0.changed.wait_timeout_while(self.state(), limit, waiting));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running thread. It goes on after the drop.
#[derive(Debug)]
pub struct LogThread(LogQueue);

impl Drop for LogThread {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

/// One event: the subscriber writes it by one call.
impl Write for LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogQueue {
    type Writer = Self;

    fn make_writer(&'a self) -> Self::Writer {
        self.clone()
    }
}

/// Writes all lines, however long this takes. Returns how many were lost to an error.
fn write_lines(writer: &mut dyn Write, mut lines: &[u8]) -> u64 {
    while !lines.is_empty() {
        match writer.write(lines) {
            Ok(0) => break,
            Ok(written) => lines = lines.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_DELAY),
            Err(_) => break,
        }
    }
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Instant};

    use super::*;

    /// Takes a write for each message that it gets.
    struct Reader {
        may_write: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // The end of the test ends it.
            self.may_write.recv().map_err(|_| ErrorKind::BrokenPipe)?;
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stalled() -> (LogQueue, mpsc::Sender<()>, Arc<Mutex<Vec<u8>>>) {
        let (allow, may_write) = mpsc::channel();
        let written = Arc::default();
        let queue = LogQueue::new(Reader { may_write, written: Arc::clone(&written) });
        (queue, allow, written)
    }

    fn wait_until(condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn lines_are_written_at_once_until_the_thread_runs() {
        let (mut queue, allow, written) = stalled();
        allow.send(()).unwrap();
        queue.write_all(b"one\n").unwrap();
        assert_eq!(*written.lock().unwrap(), b"one\n");
        (0..2).for_each(|_| allow.send(()).unwrap());
        let thread = queue.start().unwrap();
        queue.write_all(b"two\n").unwrap();
        drop(thread);
        assert_eq!(*written.lock().unwrap(), b"one\ntwo\n");
        assert_eq!(queue.dropped(), 0);
    }

    #[test]
    fn a_stalled_reader_delays_no_thread_and_what_does_not_fit_is_counted() {
        let (mut queue, allow, written) = stalled();
        let thread = queue.start().unwrap();
        wait_until(|| queue.state().writer.is_none());
        let start = Instant::now();
        let line = [[b'x'; 1023].as_slice(), b"\n"].concat();
        queue.write_all(b"first\n").unwrap();
        wait_until(|| queue.state().writing);
        for _ in 0..MAX_QUEUED / line.len() + 7 {
            queue.write_all(&line).unwrap();
        }
        assert_eq!(queue.dropped(), 7);
        // Neither does the exit wait for longer than it should.
        drop(thread);
        let waited = start.elapsed();
        assert!(waited >= FLUSH_TIMEOUT && waited < 10 * FLUSH_TIMEOUT, "{waited:?}");
        assert!(written.lock().unwrap().is_empty());
        // The reader is back: what was queued arrives whole and in order.
        (0..2).for_each(|_| allow.send(()).unwrap());
        queue.flush(Duration::from_secs(10));
        let written = written.lock().unwrap();
        assert!(written.starts_with(b"first\nxxx"));
        assert_eq!(written.len(), b"first\n".len() + MAX_QUEUED);
    }

    #[test]
    fn lines_for_a_closed_standard_error_are_counted_as_dropped() {
        let (mut queue, allow, _) = stalled();
        drop(allow);
        let _thread = queue.start().unwrap();
        wait_until(|| queue.state().writer.is_none());
        queue.write_all(b"one\n").unwrap();
        queue.write_all(b"two\n").unwrap();
        queue.flush(Duration::from_secs(10));
        assert_eq!(queue.dropped(), 2);
    }

    /// Takes one byte, then nothing for a while.
    struct NonBlocking(Vec<u8>, u32);

    impl Write for NonBlocking {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 += 1;
            match self.1 % 3 {
                0 => Err(ErrorKind::WouldBlock.into()),
                1 => Err(ErrorKind::Interrupted.into()),
                _ => {
                    self.0.push(bytes[0]);
                    Ok(1)
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_standard_error_that_does_not_block_loses_nothing() {
        let mut writer = NonBlocking(Vec::new(), 0);
        assert_eq!(write_lines(&mut writer, b"a\nb\n"), 0);
        assert_eq!(writer.0, b"a\nb\n");
    }
}
