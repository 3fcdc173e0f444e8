//! Starting processes that end with this one.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;

/// Makes the kernel kill the child when the thread that spawns it ends.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let arm = move || {
        // SAFETY: prctl and getppid are async-signal-safe and touch no memory.
        let (result, current) =
            unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // A parent that exited before the call above sends no signal any more.
        if u32::try_from(current).is_ok_and(|current| current == parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(arm) };
}

/// A command for the lasting thread, and the channel for the result.
type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Spawns on a thread that lives as long as this process.
pub(super) fn spawn_on_lasting_thread(command: Command) -> anyhow::Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                // Sending fails only if the requesting thread has ended.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (answer, spawned) = mpsc::channel();
    spawner.lock().unwrap_or_else(PoisonError::into_inner).send((command, answer))?;
    Ok(spawned.recv()??)
}
