//! Runs each test in a child process, and tells tests what they need to know of the kernel.

use crate::{modes, opencl_native};
use libtest_mimic::{Arguments, Failed, Trial};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
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
    let opencl = has_opencl();
    let shares = opencl_native::device().is_some();
    if opencl && !shares {
        eprintln!(
            "tests of OpenCL devices that share the process's pointers are ignored: there is none (for the CPU there is Intel's runtime, which does)"
        );
    }
    let lacks = |name: &str| (!opencl && name.starts_with("opencl")) || (!shares && name.starts_with("opencl_native"));
    let mut trials = vec![];
    for test in lesser {
        let name = test.name.trim_start_matches("suite::");
        for mode in [Mode::UserModeOnly, Mode::None].into_iter().filter(|&mode| modes::runs_in(name, mode)) {
            trials.push(Trial::test(format!("{}::{name}", mode.name()), move || child(test.name, Some(mode))));
        }
    }
    for &test in tests {
        let name = test.name.trim_start_matches("suite::");
        trials.push(Trial::test(name, move || child(test.name, None)).with_ignored_flag((test.full && !full) || lacks(name)));
        for mode in [Mode::UserModeOnly, Mode::None] {
            if modes::runs_in(name, mode) {
                let trial = Trial::test(format!("{}::{name}", mode.name()), move || child(test.name, Some(mode)));
                trials.push(trial.with_ignored_flag(lacks(name)));
            }
        }
    }
    let mut arguments = Arguments::from_args();
    // Tests measure nothing, but their races want both cores.
    arguments.test_threads.get_or_insert(2);
    libtest_mimic::run(&arguments, trials).exit();
}

/// Whether there is a device with OpenCL. Where UHMM_OPENCL is `required` its tests run all the same, and fail.
fn has_opencl() -> bool {
    if !uhmm_opencl::devices().is_empty() || std::env::var("UHMM_OPENCL").is_ok_and(|value| value == "required") {
        return true;
    }
    eprintln!(
        "tests of OpenCL are ignored: there is no device (for the CPU, on Debian: apt-get install ocl-icd-libopencl1 pocl-opencl-icd)"
    );
    false
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

/// Which page of the machine's memory is at this address, if the kernel tells (to root it does): 0 if not.
pub fn frame<T>(at: *const T) -> u64 {
    entry(at) & ((1 << 55) - 1)
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

/// Memory of a mapping of its own. It stays with its thread, so that whoever has it, and no slice of it, can change the mapping.
pub struct Pages {
    start: *mut u8,
    len: usize,
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

    /// Takes a mapping over.
    ///
    /// # Safety
    /// It is there, readable and writable, and nobody else uses or unmaps it.
    pub unsafe fn from_raw(start: *mut u8, len: usize) -> Self {
        Pages { start, len }
    }

    pub fn start(&self) -> *mut u8 {
        self.start
    }

    pub fn len(&self) -> usize {
        self.len
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

    pub fn slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: the mapping is ours, of that length, and borrowed with `self`; any bytes are a `T`.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len / size_of::<T>()) }
    }

    /// All of it as atomics.
    pub fn atomics<T: Atomic>(&self) -> &[T] {
        // SAFETY: the mapping is ours, of that length, and borrowed with `self`; any bytes are a `T`, which is there to be shared.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len / size_of::<T>()) }
    }

    /// Where a byte is.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        self.start.wrapping_add(offset)
    }

    /// Makes it longer, or shorter, at another place if need be. Whether the kernel has done it.
    pub fn resize(&mut self, len: usize) -> bool {
        // SAFETY: the mapping is ours, and no slice of it is borrowed.
        let moved = unsafe { libc::mremap(self.start.cast(), self.len, len, libc::MREMAP_MAYMOVE) };
        if moved == libc::MAP_FAILED {
            return false;
        }
        (self.start, self.len) = (moved.cast(), len);
        true
    }

    /// Unmaps pages of it.
    ///
    /// # Safety
    /// They are used no more, until something is mapped there again; and nobody else maps anything there as long as this lives.
    pub unsafe fn unmap(&self, offset: usize, len: usize) {
        assert!(offset.is_multiple_of(4096) && offset <= self.len && len <= self.len - offset);
        // SAFETY: inside the mapping, which is ours; that nobody misses it the caller says.
        assert_eq!(unsafe { libc::munmap(self.at(offset).cast(), len) }, 0);
    }

    /// Moves pages of it to another place, to be there instead of what is there now.
    ///
    /// # Safety
    /// They are used here no more, until something is mapped here again; and the other place is the caller's.
    pub unsafe fn move_to(&self, offset: usize, len: usize, target: *mut u8) {
        assert!(offset.is_multiple_of(4096) && offset <= self.len && len <= self.len - offset);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: from inside the mapping, which is ours; that nobody misses what was at either place the caller says.
        let moved = unsafe { libc::mremap(self.at(offset).cast(), len, len, flags, target) };
        assert_eq!(moved, target.cast(), "{}", std::io::Error::last_os_error());
    }
}

/// Atomic numbers.
///
/// # Safety
/// Any bytes are one.
pub unsafe trait Atomic {}
// SAFETY: any bytes are a number.
unsafe impl Atomic for std::sync::atomic::AtomicU8 {}
// SAFETY: as above.
unsafe impl Atomic for std::sync::atomic::AtomicU32 {}
// SAFETY: as above.
unsafe impl Atomic for std::sync::atomic::AtomicU64 {}

/// A bare pointer to the start of `data`. As for any pointer, what a kernel does with it is argued there.
pub fn bare<T: bytemuck::Pod>(data: &mut [T]) -> uhmm::Arg<'_> {
    // SAFETY: the data is there, and nobody else's, as long as the argument lives.
    unsafe { uhmm::ptr(data.as_mut_ptr()) }
}

/// The start and length of whole pages.
fn whole<T>(data: &[T]) -> (*mut libc::c_void, usize) {
    let (start, len) = (data.as_ptr(), size_of_val(data));
    assert!((start as usize | len).is_multiple_of(4096) && len > 0, "whole pages: {start:?}, {len} bytes");
    (start.cast_mut().cast(), len)
}

/// Tells the kernel about whole pages, which are used as before, or hold zeroes from now on.
pub fn advise<T: bytemuck::Pod>(data: &mut [T], advice: i32) {
    let harmless = [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP];
    assert!(harmless.contains(&advice));
    let (start, len) = whole(data);
    // SAFETY: whole pages, and borrowed exclusively. These advices leave them there; bytes may turn to zeroes, at once or later, and all bytes are a `T`.
    let result = unsafe { libc::madvise(start, len, advice) };
    // A kernel without huge pages knows nothing of them.
    assert!(result == 0 || [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE].contains(&advice), "{}", std::io::Error::last_os_error());
}

/// Maps new memory in place of whole pages: zeroes.
pub fn map_anew<T: bytemuck::Pod>(data: &mut [T]) {
    let (start, len) = whole(data);
    // SAFETY: whole pages, and borrowed exclusively. Others take their place, of zeroes, which are a `T`.
    unsafe { map_at(start as usize, len, libc::MAP_FIXED) };
}

/// Maps new memory at an address: its start.
///
/// # Safety
/// What is there, if it may be replaced, is the caller's.
pub unsafe fn map_at(at: usize, len: usize, how: i32) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | how;
    // SAFETY: that nobody misses what was there the caller says.
    let start = unsafe { libc::mmap(at as *mut _, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_eq!(start as usize, at, "{}", std::io::Error::last_os_error());
    start.cast()
}

/// A new mapping, where the kernel likes, that stays for good.
pub fn map(len: usize, access: i32, flags: i32, file: Option<&File>) -> *mut u8 {
    assert_eq!(flags & libc::MAP_FIXED, 0);
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: a new mapping where the kernel likes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
    assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    start.cast()
}

/// New shared memory, of zeroes, that stays for good.
pub fn shared(len: usize) -> &'static mut [u8] {
    let start = map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None);
    // SAFETY: nobody else has it, and nobody unmaps it.
    unsafe { std::slice::from_raw_parts_mut(start, len) }
}

/// Sets what may be done with whole pages.
///
/// # Safety
/// What is forbidden nobody does, until it is allowed again.
pub unsafe fn protect<T>(data: &[T], access: i32) {
    let (start, len) = whole(data);
    // SAFETY: memory of a slice; that nobody minds the caller says.
    assert_eq!(unsafe { libc::mprotect(start, len, access) }, 0);
}

/// What memory holds now.
pub fn read<T: Copy>(at: &T) -> T {
    // SAFETY: a reference.
    unsafe { std::ptr::from_ref(at).read_volatile() }
}

/// Writes to memory, now.
pub fn write<T: Copy>(at: &mut T, value: T) {
    // SAFETY: an exclusive reference.
    unsafe { std::ptr::from_mut(at).write_volatile(value) }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        assert_eq!(unsafe { libc::munmap(self.start.cast(), self.len) }, 0);
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

/// Forks, or makes a child that the C library is not told of; it ends after `right`, with 0 if that was true there, and does only what is safe after a fork of
/// a process with threads.
pub fn fork(raw: bool, right: impl FnOnce() -> bool) -> i32 {
    // SAFETY: the child runs `right` and ends without unwinding into its parent's frames. Of clone's arguments only the signal is not 0: it is a fork.
    let pid = unsafe { if raw { libc::syscall(libc::SYS_clone, libc::SIGCHLD as libc::c_ulong, 0, 0, 0, 0) as i32 } else { libc::fork() } };
    assert_ne!(pid, -1);
    if pid == 0 {
        let right = std::panic::catch_unwind(std::panic::AssertUnwindSafe(right)).unwrap_or(false);
        // SAFETY: it ends here.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    pid
}

/// How a child has ended.
pub fn wait(child: i32) -> i32 {
    let mut status = 0;
    // SAFETY: a status of our own.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    status
}

/// Forks; the child ends after `right`, and the parent looks whether that was true there.
pub fn in_a_child(right: impl FnOnce() -> bool) {
    assert_eq!(wait(fork(false, right)), 0);
}

/// Whether this is root's process.
pub fn is_root() -> bool {
    // SAFETY: it has no arguments.
    unsafe { libc::geteuid() == 0 }
}

/// Pages of memory that the machine has.
pub fn physical_pages() -> usize {
    // SAFETY: it only tells a number.
    unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) as usize }
}

/// Locks the pages of a slice, which are not changed by that. Whether the kernel did it.
pub fn lock<T>(data: &[T]) -> bool {
    // SAFETY: memory of a slice; locking neither reads nor writes it.
    unsafe { libc::mlock(data.as_ptr().cast(), size_of_val(data)) == 0 }
}

/// Unlocks them.
pub fn unlock<T>(data: &[T]) {
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(data.as_ptr().cast(), size_of_val(data)) }, 0);
}

/// An empty file in memory.
pub fn memfd() -> File {
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"uhmm-test".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: a new descriptor, which nobody else has.
    unsafe { File::from_raw_fd(fd) }
}

/// Lets this function handle a signal.
///
/// # Safety
/// It does only what is safe wherever the signal may interrupt a thread.
pub unsafe fn handle(signal: i32, handler: Handler, flags: i32) {
    // SAFETY: zeroes are such a structure: no signal is blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    (action.sa_sigaction, action.sa_flags) = match handler {
        Handler::Plain(handler) => (handler as *const () as usize, flags & !libc::SA_SIGINFO),
        Handler::Info(handler) => (handler as *const () as usize, flags | libc::SA_SIGINFO),
    };
    // SAFETY: a function of the kind that the flags name; for what it does the caller vouches.
    assert_eq!(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }, 0);
}

/// The kinds of signal handlers.
pub enum Handler {
    Plain(extern "C" fn(i32)),
    Info(extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void)),
}

/// What is done at a signal now.
pub fn action(signal: i32) -> libc::sigaction {
    // SAFETY: zeroes are such a structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a structure of our own.
    assert_eq!(unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) }, 0);
    action
}

/// Sends a signal to a thread of this process. What its handler does is its own affair.
pub fn send(thread: i32, signal: i32) {
    // SAFETY: it has numbers only.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
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
