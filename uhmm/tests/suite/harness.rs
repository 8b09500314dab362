//! Runs each test in a child process, and tells tests what they need to know of the kernel.

use crate::modes;
use libtest_mimic::{Arguments, Failed, Trial};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use uhmm::Mode;

/// A test, and whether it needs the right to handle the kernel's page faults.
#[derive(Clone, Copy)]
pub struct Test {
    pub name: &'static str,
    pub run: fn(),
    pub full: bool,
}

/// Names a function as a test that needs that right.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub const TESTS: &[$crate::harness::Test] = &[$($crate::harness::Test { name: concat!(module_path!(), "::", stringify!($name)), run: $name, full: true },)*];
    };
}

const CHILD: &str = "UHMM_TEST_CHILD";

/// Runs one test if this is a child, else all of them, each in a child.
pub fn run(tests: &[Test], lesser: &'static [Test]) {
    if let Ok(name) = std::env::var(CHILD) {
        let test = tests.iter().chain(lesser).find(|test| test.name == name).expect("a test of that name");
        (test.run)();
        return;
    }
    let full = full_mode();
    if !full {
        eprintln!("tests that need the right to handle the kernel's page faults are ignored: see `uhmm doctor`");
    }
    let mut trials = vec![];
    for test in lesser {
        let name = test.name.trim_start_matches("suite::");
        for mode in [Mode::UserModeOnly, Mode::None].into_iter().filter(|&mode| modes::runs_in(name, mode)) {
            trials.push(Trial::test(format!("{}::{name}", mode.name()), move || child(test.name, Some(mode))));
        }
    }
    for &test in tests {
        let name = test.name.trim_start_matches("suite::");
        trials.push(Trial::test(name, move || child(test.name, None)).with_ignored_flag(test.full && !full));
        for mode in [Mode::UserModeOnly, Mode::None] {
            if modes::runs_in(name, mode) {
                trials.push(Trial::test(format!("{}::{name}", mode.name()), move || child(test.name, Some(mode))));
            }
        }
    }
    let mut arguments = Arguments::from_args();
    // Tests measure nothing, but their races want both cores.
    arguments.test_threads.get_or_insert(2);
    libtest_mimic::run(&arguments, trials).exit();
}

/// Whether this process could have full mode.
fn full_mode() -> bool {
    uhmm::Uhmm::new().is_ok_and(|hmm| hmm.mode() == Mode::Full)
}

/// Runs a test in this mode, or in the best that can be had. The lesser modes are an ordinary user's: root becomes one for them.
fn child(name: &str, mode: Option<Mode>) -> Result<(), Failed> {
    let mut command = again(name);
    if let Some(mode) = mode {
        command = modes::as_ordinary_user(&command)?;
        command.env(Mode::VARIABLE, mode.name());
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut out, mut err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let read = |pipe: &mut dyn Read| {
        let mut text = vec![];
        let _ = pipe.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    };
    let (out, err) = std::thread::scope(|scope| {
        let out = scope.spawn(move || read(&mut out));
        let err = scope.spawn(move || read(&mut err));
        let limit = Instant::now() + Duration::from_secs(120) + seconds(5) * 4;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > limit {
                let _ = child.kill();
                eprintln!("{name} hangs: killed");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        (out.join().unwrap_or_default(), err.join().unwrap_or_default())
    });
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("{status}\n{out}{err}").into()) }
}

/// This binary again, to run one test.
pub fn again(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("our own path"));
    command.env(CHILD, name).env("RUST_BACKTRACE", "0");
    command
}

/// How long a race runs: UHMM_TEST_SECONDS, or the given number.
pub fn seconds(default: u64) -> Duration {
    let asked = std::env::var("UHMM_TEST_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(asked.unwrap_or(default))
}

/// Whether the kernel has a page at this address (/proc/self/pagemap, bit 63).
pub fn present<T>(at: *const T) -> bool {
    // In memory, or on its way to another place there (compaction).
    entry(at) >> 62 != 0
}

fn entry<T>(at: *const T) -> u64 {
    let pagemap = File::open("/proc/self/pagemap").expect("pagemap");
    let mut entry = [0; 8];
    pagemap.read_exact_at(&mut entry, at as u64 / 4096 * 8).expect("an entry");
    u64::from_ne_bytes(entry)
}

/// Pages of the slice, wholly inside it, that the kernel has.
pub fn pages_present<T>(data: &[T]) -> usize {
    let start = (data.as_ptr() as usize).next_multiple_of(4096);
    let end = data.as_ptr_range().end as usize & !4095;
    (start..end).step_by(4096).filter(|&at| present(at as *const u8)).count()
}

/// Anonymous memory of its own mapping.
pub struct Pages {
    pub start: *mut u8,
    pub len: usize,
}

impl Pages {
    pub fn new(len: usize) -> Self {
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Pages { start: start.cast(), len }
    }

    /// On a 2 MiB boundary, in huge pages where there are any.
    pub fn huge(len: usize) -> Self {
        let pages = Pages::new(len + (2 << 20));
        let start = (pages.start as usize).next_multiple_of(2 << 20) as *mut u8;
        // SAFETY: inside the new mapping, and contents do not change.
        unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        std::mem::forget(pages);
        Pages { start, len }
    }

    pub fn slice<T>(&mut self) -> &mut [T] {
        // SAFETY: the mapping is ours, of that length, and borrowed with `self`; tests ask for numbers, and words of atomics, which any bytes are.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len / size_of::<T>()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A device of `mib` MiB with two workers.
pub fn device(mib: usize) -> (uhmm::Uhmm, uhmm::Device) {
    let hmm = uhmm::Uhmm::new().expect("full rights");
    let dev = hmm.soft("soft").memory(mib << 20).threads(2).open().expect("a device");
    (hmm, dev)
}

/// Launches [`increment`] on this device over `data`, over and over until `end`, and after each launch looks whether all is as it should be: calls `look` with
/// the data and the number that each element has now.
pub fn increment_until(end: Instant, dev: &uhmm::Device, start: u32, len: usize, look: impl Fn(&[u32], u32)) {
    let mut data = vec![start; len];
    let mut expected = start;
    while Instant::now() < end {
        dev.run(&increment, groups(data.len()), uhmm::args![uhmm::inout(&mut data)]).unwrap();
        expected += 1;
        look(&data, expected);
    }
    assert!(data.iter().all(|&x| x == expected));
}

/// Forks; the child ends after `right`, and the parent looks whether that was true there. The child does only what is safe after a fork of a process with threads.
pub fn in_a_child(right: impl FnOnce() -> bool) {
    // SAFETY: the child runs `right` and ends without unwinding into its parent's frames.
    let pid = unsafe { libc::fork() };
    assert_ne!(pid, -1);
    if pid == 0 {
        let right = std::panic::catch_unwind(std::panic::AssertUnwindSafe(right)).unwrap_or(false);
        // SAFETY: it ends here.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    let mut status = 0;
    // SAFETY: our child, and a status of our own.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0);
}

/// This thread's number.
pub fn gettid() -> i32 {
    // SAFETY: it has no arguments.
    unsafe { libc::gettid() }
}

/// Raises a signal in this thread.
pub fn raise(signal: i32) -> i32 {
    // SAFETY: what the signal's handler does is its own affair.
    unsafe { libc::raise(signal) }
}

/// Adds 1 to every element of argument 0, in parts of 1000.
pub fn increment(ctx: &uhmm::Ctx<'_>) {
    for x in ctx.out::<u32>(0).chunk(1000) {
        *x = x.wrapping_add(1);
    }
}

/// Groups for [`increment`].
pub fn groups(len: usize) -> usize {
    len.div_ceil(1000)
}
