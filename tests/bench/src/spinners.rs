//! One busy thread for each processor, at the lowest priority.
//!
//! An idle processor sleeps and takes time to wake: on a virtual machine tens of microseconds,
//! which hide what a system adds. With a spinner there is no idle state. SCHED_IDLE yields to
//! everything else at once, and niceness 19 makes `/proc/stat` count it as `nice`, separate from
//! load.

use std::hint;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::ensure;
use injector_testbed::process::bind_thread;

/// The threads; ended on drop.
#[derive(Debug)]
pub struct Spinners {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Spinners {
    /// # Errors
    /// When a thread cannot be lowered in priority or bound to its processor.
    pub fn start() -> anyhow::Result<Self> {
        let mut spinners = Self { over: Arc::default(), threads: Vec::new() };
        for processor in 0..thread::available_parallelism()?.get() {
            let over = Arc::clone(&spinners.over);
            let (sender, receiver) = std::sync::mpsc::channel();
            spinners.threads.push(thread::spawn(move || {
                let lowered = lower(processor);
                let spins = lowered.is_ok();
                if sender.send(lowered).is_ok() && spins {
                    while !over.load(Ordering::Relaxed) {
                        hint::spin_loop();
                    }
                }
            }));
            receiver.recv()??;
        }
        Ok(spinners)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}

/// Binds the calling thread to a processor, at the lowest priority.
fn lower(processor: usize) -> anyhow::Result<()> {
    bind_thread(processor)?;
    // SAFETY: 0 is the calling thread: on Linux priorities are each thread's own.
    let nice = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
    ensure!(nice == 0, "cannot lower a spinner: {}", io::Error::last_os_error());
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and the parameter lives for the call.
    let idle = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const none) };
    ensure!(idle == 0, "cannot set SCHED_IDLE: {}", io::Error::last_os_error());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use injector_load::cpu::background;
    use std::time::Duration;

    #[test]
    fn spinning_is_counted_as_nice() {
        let spinners = Spinners::start().unwrap();
        let spent = background(Duration::from_millis(300)).unwrap();
        drop(spinners);
        // How much time the spinners get depends on other processes; that it is not idle does not.
        assert!(spent.nice > 0.0 || spent.busy() > spent.idle, "{spent:?}");
    }
}
