//! A virtual machine: qemu with another kernel, and this machine's root file system by virtiofs.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::initramfs;
use crate::{
    cargo,
    setup::{self, Kernel},
};

/// How long a machine may take to boot; emulated and beside other work, it took 8 s.
const BOOT_LIMIT: Duration = Duration::from_secs(90);

const MEMORY_MIB: u32 = 3072;

/// How many of the console's last lines are shown.
const SHOWN: usize = 30;

/// What runs the machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    Emulation,
}

impl Accelerator {
    /// KVM if it can be used. That of a PVM guest has no hardware behind it and runs only kernels
    /// made for it.
    pub(super) fn detect() -> Self {
        let usable = File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if usable && !Path::new("/sys/module/kvm_pvm").exists() { Self::Kvm } else { Self::Emulation }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host,migratable=no"],
            Self::Emulation => &["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,la57=off"],
        }
    }
}

/// How a machine ended.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Ended {
    /// Seconds from the kernel's start to the command; `None` if it did not boot.
    pub(super) boot_seconds: Option<f64>,
    /// The command's exit code; `None` if it did not end.
    pub(super) code: Option<i32>,
    /// The console's last lines.
    pub(super) console: String,
}

impl Ended {
    /// What is wrong, apart from the command's exit code.
    pub(super) fn fault(&self) -> Option<String> {
        match (self.boot_seconds, self.code) {
            (None, _) => {
                Some(format!("the kernel did not boot; the console's last lines:\n{}", self.console))
            }
            (_, None) => {
                Some(format!("the command did not end in time; the console's last lines:\n{}", self.console))
            }
            (Some(_), Some(_)) => None,
        }
    }
}

/// Boots a kernel and runs a shell command in it as root. `line` gets each line that it prints.
///
/// A machine that does not boot is started once more, by emulation. Emulated processors run code that
/// another one is changing: once, Linux 7.3 died in `sched_clock_cpu`, whose branch was being patched.
///
/// # Errors
/// When a program that this needs cannot be started. A machine that does not boot is no error.
pub(super) fn run(
    kernel: &Kernel,
    command: &str,
    limit: Duration,
    line: &mut dyn FnMut(&str),
) -> Result<(Accelerator, Ended)> {
    let accelerator = Accelerator::detect();
    let ended = Machine::start(kernel, accelerator, command)?.wait(limit, line)?;
    if ended.boot_seconds.is_some() {
        return Ok((accelerator, ended));
    }
    eprintln!("kernels: {} did not boot, once more by emulation:\n{}", kernel.release, ended.console);
    let emulated = Accelerator::Emulation;
    Ok((emulated, Machine::start(kernel, emulated, command)?.wait(limit, line)?))
}

struct Machine {
    // Dropped in this order: the folder last.
    qemu: Process,
    _virtiofsd: Process,
    folder: tempfile::TempDir,
}

impl Machine {
    fn start(kernel: &Kernel, accelerator: Accelerator, command: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("injector-kernels-").tempdir()?;
        fs::write(folder.path().join("initramfs"), initramfs::build(kernel, command)?)?;
        let virtiofsd = share_root(folder.path(), kernel)?;
        let log = File::create(folder.path().join("qemu.log"))?;
        let mut qemu = qemu(folder.path(), kernel, accelerator);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        Ok(Self { qemu: Process::start(&mut qemu)?, _virtiofsd: virtiofsd, folder })
    }

    /// Waits for the end, and ends a machine that takes too long.
    fn wait(mut self, limit: Duration, line: &mut dyn FnMut(&str)) -> Result<Ended> {
        let start = Instant::now();
        let output = self.qemu.0.stdout.take().context("qemu has no output")?;
        let lines = lines(output);
        let status = self.folder.path().join("status");
        loop {
            match lines.recv_timeout(Duration::from_millis(200)) {
                Ok(text) => line(&text),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let booted = Status::read(&status).booted.is_some();
            if start.elapsed() > if booted { limit + BOOT_LIMIT } else { BOOT_LIMIT } {
                break;
            }
        }
        let status = Status::read(&status);
        let console = [tail(&self.folder.path().join("console")), tail(&self.folder.path().join("qemu.log"))];
        Ok(Ended { boot_seconds: status.booted, code: status.exited, console: console.concat() })
    }
}

/// A process that ends with its owner, and with this program.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Result<Self> {
        // SAFETY: prctl(2) with this command takes plain numbers, touches no memory and is
        // async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn();
        Ok(Self(child.with_context(|| format!("cannot start {}", command.get_program().display()))?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the machine has reported.
#[derive(Debug, Default, PartialEq)]
struct Status {
    booted: Option<f64>,
    exited: Option<i32>,
}

impl Status {
    fn read(file: &Path) -> Self {
        Self::parse(&fs::read_to_string(file).unwrap_or_default())
    }

    /// `booted SECONDS` and `exited CODE`, each on a line that is complete.
    fn parse(text: &str) -> Self {
        let mut status = Self::default();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            match line.trim().split_once(' ') {
                Some(("booted", seconds)) => status.booted = seconds.parse().ok(),
                Some(("exited", code)) => status.exited = code.parse().ok(),
                _ => {}
            }
        }
        status
    }
}

fn lines(output: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    lines
}

fn tail(file: &Path) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.iter().skip(lines.len().saturating_sub(SHOWN));
    last.map(|line| format!("  | {}\n", line.trim_end())).collect()
}

/// Starts virtiofsd in a mount namespace of its own, in which the root file system is visible
/// read-only and without what is mounted in it.
fn share_root(folder: &Path, kernel: &Kernel) -> Result<Process> {
    /// Arguments: the folder to show the root in, other file systems to show, `--`, the program.
    const SCRIPT: &str = r#"
        set -eu
        root=$1; shift
        mount --make-rprivate /
        mount --bind / "$root"
        mount -o remount,ro,bind "$root"
        while [ "$1" != -- ]; do mount --bind "$1" "$root$1"; mount -o remount,ro,bind "$root$1"; shift; done
        shift
        ulimit -n "$(ulimit -H -n)"
        exec "$@"
    "#;
    let root = folder.join("root");
    fs::create_dir(&root)?;
    let socket = folder.join("fs.sock");
    let log = File::create(folder.join("virtiofsd.log"))?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(&root);
    command.args(other_file_systems([cargo::workspace(), &kernel.tree])).arg("--");
    command.args(virtiofsd(&setup::virtiofsd()?, &root, &socket));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut process = Process::start(&mut command)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        let ended = process.0.try_wait()?.is_some();
        ensure!(
            !ended && Instant::now() < deadline,
            "virtiofsd does not share the root file system:\n{}",
            tail(&folder.join("virtiofsd.log"))
        );
        thread::sleep(Duration::from_millis(20));
    }
    Ok(process)
}

/// The command line of virtiofsd, which was rewritten with other options.
fn virtiofsd(program: &Path, root: &Path, socket: &Path) -> Vec<String> {
    let old = program.starts_with("/usr/lib/qemu");
    let (program, root, socket) = (program.display().to_string(), root.display(), socket.display());
    let mut words = vec![program, format!("--socket-path={socket}")];
    if old {
        let options = ["cache=always", "sandbox=chroot", "no_posix_lock", "no_flock"].map(ToOwned::to_owned);
        let options = [format!("source={root}")].into_iter().chain(options);
        words.extend(options.flat_map(|option| ["-o".to_owned(), option]));
    } else {
        words.push(format!("--shared-dir={root}"));
        words.extend(["--cache=always", "--sandbox=chroot"].map(ToOwned::to_owned));
    }
    words
}

/// The mount points of these folders, except the root.
fn other_file_systems<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in folders {
        let point = mount_point(folder, &|path| fs::metadata(path).map(|it| it.dev()).ok());
        if point != Path::new("/") && !found.contains(&point) {
            found.push(point);
        }
    }
    found
}

/// The topmost folder on the same device.
fn mount_point(folder: &Path, device: &dyn Fn(&Path) -> Option<u64>) -> PathBuf {
    let own = device(folder);
    let same = folder.ancestors().take_while(|ancestor| device(ancestor) == own);
    same.last().unwrap_or(folder).to_path_buf()
}

fn qemu(folder: &Path, kernel: &Kernel, accelerator: Accelerator) -> Command {
    let processors = thread::available_parallelism().map_or(1, usize::from).min(4);
    let path = |name: &str| folder.join(name).display().to_string();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.args(accelerator.arguments());
    qemu.args(["-smp", &processors.to_string(), "-m", &MEMORY_MIB.to_string()]);
    // virtiofs needs memory that virtiofsd can map.
    qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on")]);
    qemu.args(["-numa", "node,memdev=memory"]);
    qemu.args(["-chardev", &format!("socket,id=fs,path={}", path("fs.sock"))]);
    qemu.args(["-device", "vhost-user-fs-pci,chardev=fs,tag=root"]);
    qemu.args(["-chardev", &format!("file,id=console,path={}", path("console"))]);
    qemu.args(["-serial", "chardev:console", "-device", "virtio-serial-pci"]);
    // Not qemu's stdio: at the end of its input it would close the port.
    qemu.args(["-chardev", "file,id=output,path=/dev/stdout"]);
    qemu.args(["-device", "virtserialport,chardev=output,name=output"]);
    qemu.args(["-chardev", &format!("file,id=status,path={}", path("status"))]);
    qemu.args(["-device", "virtserialport,chardev=status,name=status"]);
    qemu.arg("-kernel").arg(kernel.image()).args(["-initrd", &path("initramfs")]);
    // The processor's mitigations stay on: without them the verifier accepts more.
    let options = "console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable no_timer_check";
    qemu.args(["-append", &format!("{options}{}", time_stamp_counter(accelerator))]);
    qemu
}

/// The rate of the time stamp counter, which an emulated processor has from this one. A kernel that
/// measures it while the emulator waits for a processor gets it wrong: a clock ran nine times too
/// fast.
fn time_stamp_counter(accelerator: Accelerator) -> String {
    match accelerator {
        Accelerator::Kvm => String::new(),
        Accelerator::Emulation => {
            ticks_per_ms().map_or_else(String::new, |khz| format!(" tsc_early_khz={khz}"))
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn ticks_per_ms() -> Option<u128> {
    use std::arch::x86_64::_rdtsc;

    // SAFETY: every x86-64 processor has the instruction, and Linux lets processes use it.
    let ticks = || unsafe { _rdtsc() };
    let (start, first) = (Instant::now(), ticks());
    thread::sleep(Duration::from_millis(100));
    let (counted, took) = (ticks().checked_sub(first)?, start.elapsed());
    (u128::from(counted) * 1_000_000).checked_div(took.as_nanos())
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks_per_ms() -> Option<u128> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_line_by_line() {
        assert_eq!(Status::parse(""), Status::default());
        assert_eq!(Status::parse("booted 2.5"), Status::default());
        assert_eq!(Status::parse("booted 2.51\r\n"), Status { booted: Some(2.51), exited: None });
        let both = Status { booted: Some(3.0), exited: Some(101) };
        assert_eq!(Status::parse("booted 3.0\nexited 101\n"), both);
    }

    #[test]
    fn a_machine_that_did_not_boot_or_end_is_at_fault() {
        let booted = Ended { boot_seconds: Some(3.0), ..Ended::default() };
        assert!(Ended::default().fault().unwrap().contains("did not boot"));
        assert!(booted.fault().unwrap().contains("did not end"));
        assert_eq!(Ended { code: Some(1), ..booted }.fault(), None);
    }

    #[test]
    fn folders_on_other_devices_are_shared_by_their_mount_points() {
        let device = |path: &Path| Some(u64::from(path.starts_with("/home")));
        assert_eq!(mount_point(Path::new("/home/me/injector"), &device), Path::new("/home"));
        assert_eq!(mount_point(Path::new("/srv/injector"), &device), Path::new("/"));
    }

    #[test]
    fn both_programs_called_virtiofsd_are_given_their_options() {
        let line = |program: &str| virtiofsd(Path::new(program), Path::new("/r"), Path::new("/s")).join(" ");
        assert!(line("/usr/lib/qemu/virtiofsd").contains("-o source=/r"));
        assert!(line("/usr/libexec/virtiofsd").contains("--shared-dir=/r"));
    }
}
