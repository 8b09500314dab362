//! System calls past libc, and copies to and from memory that may be bad.
//!
//! # Rules
//! * Everything here works before libc is initialised, on any thread, and in a signal handler: nothing is allocated, and no `errno` is written but by [`c`].
//! * The library's own calls go through here and never through libc's functions of the same names, for those are its own.
//! * Memory of the program is never dereferenced: the kernel copies, and says `EFAULT`, or a copy that survives bad addresses does.
#![allow(unsafe_code)] // system calls

use core::sync::atomic::{AtomicUsize, Ordering};
use libc::{c_int, c_long, c_void};
use uhmm_os::copy::guarded;
use uhmm_os::{Errno, system};

/// Makes a system call, numbered as libc does (`SYS_` constants).
///
/// # Safety
/// What it does to the process must be what the caller may do: the arguments are valid for it, or come from the program, which asked for just this call.
#[inline(always)]
pub(crate) unsafe fn call<const N: usize>(number: c_long, args: [usize; N]) -> Result<usize, Errno> {
    // SAFETY: the caller vouches for it.
    unsafe { uhmm_os::syscall::call(number as u32, args) }
}

/// A result as libc's functions give it: the value, or -1 and `errno`. `errno` is as before if all went well.
#[inline(always)]
pub(crate) fn c(result: Result<usize, Errno>) -> isize {
    match result {
        Ok(value) => value as isize,
        Err(error) => {
            set_errno(error.raw_os_error());
            -1
        }
    }
}

/// As [`c`], for what returns an int.
#[inline(always)]
pub(crate) fn int(result: Result<usize, Errno>) -> c_int {
    c(result) as c_int
}

/// Sets `errno`.
pub(crate) fn set_errno(value: c_int) {
    // SAFETY: the calling thread's own word.
    unsafe { *libc::__errno_location() = value };
}

/// `errno`.
pub(crate) fn errno() -> c_int {
    // SAFETY: the calling thread's own word.
    unsafe { *libc::__errno_location() }
}

/// The process. In a forked child another one than in its parent, whichever way it was forked.
#[inline(always)]
pub(crate) fn pid() -> u32 {
    // SAFETY: no arguments, no effects.
    unsafe { call(libc::SYS_getpid, []) }.map_or(0, |pid| pid as u32)
}

/// The calling thread.
pub(crate) fn tid() -> u32 {
    // SAFETY: no arguments, no effects.
    unsafe { call(libc::SYS_gettid, []) }.map_or(0, |tid| tid as u32)
}

/// Closes a descriptor of the library's own.
pub(crate) fn close(fd: c_int) {
    // SAFETY: the descriptor is the caller's.
    let _ = unsafe { call(libc::SYS_close, [fd as usize]) };
}

/// The most bytes of one copy: the kernel stops short of 2 GiB.
const MOST: usize = 1 << 30;

/// The handlers of SIGSEGV and SIGBUS under which a copy of this library's own survives a bad address; 0 before there are such. Five times as fast as the kernel's copies.
static HANDLER: AtomicUsize = AtomicUsize::new(0);

const FAULTS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// The handler of a signal.
fn handler(signal: c_int) -> usize {
    let mut action = [0usize; 4]; // as the kernel has it: the handler, flags, where it returns to, the mask
    // SAFETY: asks only, and the action may be written.
    let asked = unsafe { call(libc::SYS_rt_sigaction, [signal as usize, 0, action.as_mut_ptr() as usize, 8]) };
    if asked.is_ok() { action[0] } else { 0 }
}

/// From now on copies are this library's own where they are safe. To be called when the core runs, which has set the handlers.
pub(crate) fn trust_handlers() {
    let [first, second] = FAULTS.map(handler);
    // Another copy of the core in this process would not know this one's copies.
    let library = |address: usize| {
        let mut info = core::mem::MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: the struct may be written, and zeros are one.
        unsafe {
            libc::dladdr(address as *const c_void, info.as_mut_ptr());
            info.assume_init().dli_fbase as usize
        }
    };
    if first == second && first > 1 && library(first) == library(trust_handlers as *const () as usize) {
        HANDLER.store(first, Ordering::Release);
    }
}

/// Whether a bad address is an error here: the handlers are as they were, and this thread does not block them.
fn survives_faults() -> bool {
    let trusted = HANDLER.load(Ordering::Acquire);
    if trusted == 0 {
        return false;
    }
    let mut mask = 0u64;
    // SAFETY: asks only, and the mask may be written.
    let asked = unsafe { call(libc::SYS_rt_sigprocmask, [libc::SIG_BLOCK as usize, 0, &raw mut mask as usize, 8]) };
    asked.is_ok() && FAULTS.into_iter().all(|signal| mask & 1 << (signal - 1) == 0 && handler(signal) == trusted)
}

/// One copy between memory of the library's own and the program's, by the kernel.
///
/// # Safety
/// `own` is valid for `len` bytes, of reads or writes as the call does.
unsafe fn copy(number: c_long, own: usize, len: usize, theirs: u64) -> Result<(), Errno> {
    let pid = pid() as usize;
    let mut done = 0;
    while done < len {
        let part = (len - done).min(MOST);
        let local = libc::iovec { iov_base: (own + done) as *mut c_void, iov_len: part };
        let remote = libc::iovec { iov_base: theirs.wrapping_add(done as u64) as *mut c_void, iov_len: part };
        let (local, remote) = (&raw const local as usize, &raw const remote as usize);
        // SAFETY: both vectors live until the call returns; the local one is valid by the contract, the remote one is the kernel's to check.
        let copied = unsafe { call(number, [pid, local, 1, remote, 1, 0]) }?;
        if copied == 0 {
            return Err(Errno::FAULT);
        }
        done += copied;
    }
    Ok(())
}

/// Copies from an address that the program gave.
///
/// # Errors
/// `EFAULT`; what was copied up to then is unknown.
pub(crate) fn copy_in(to: &mut [u8], from: u64) -> Result<(), Errno> {
    if survives_faults() {
        // SAFETY: the slice is valid for writes, a bad address is an error.
        return unsafe { guarded(to.as_mut_ptr(), from as *const u8, to.len()) }.map_err(|_| Errno::FAULT);
    }
    // SAFETY: the slice is valid for writes.
    unsafe { copy(libc::SYS_process_vm_readv, to.as_mut_ptr() as usize, to.len(), from) }
}

/// Copies to an address that the program gave.
///
/// # Errors
/// `EFAULT`; what was copied up to then is there.
pub(crate) fn copy_out(to: u64, from: &[u8]) -> Result<(), Errno> {
    if survives_faults() {
        // SAFETY: the program gave the address for that, and a bad one is an error.
        return unsafe { guarded(to as *mut u8, from.as_ptr(), from.len()) }.map_err(|_| Errno::FAULT);
    }
    // SAFETY: the slice is valid for reads.
    unsafe { copy(libc::SYS_process_vm_writev, from.as_ptr() as usize, from.len(), to) }
}

/// A file in memory, closed on exec.
pub(crate) fn memfd() -> Result<c_int, Errno> {
    let name = c"uhmm dmirror";
    // SAFETY: the name is a string.
    unsafe { call(libc::SYS_memfd_create, [name.as_ptr() as usize, libc::MFD_CLOEXEC as usize]) }.map(|fd| fd as c_int)
}

/// A connected pair of sockets that keep messages apart, closed on exec.
pub(crate) fn socketpair() -> Result<[c_int; 2], Errno> {
    let mut pair = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the array is valid for two descriptors.
    unsafe { call(libc::SYS_socketpair, [libc::AF_UNIX as usize, kind as usize, 0, pair.as_mut_ptr() as usize]) }?;
    Ok(pair)
}

/// What has happened at a descriptor, of `events`, waiting up to `timeout` milliseconds (-1: for ever), or a moment: who waits for something looks again.
pub(crate) fn poll(fd: c_int, events: i16, timeout: c_int) -> i16 {
    let mut polled = [libc::pollfd { fd, events, revents: 0 }];
    poll_all(&mut polled, timeout);
    polled[0].revents
}

/// As [`poll`], at several.
pub(crate) fn poll_all(polled: &mut [libc::pollfd], timeout: c_int) {
    const MOMENT: c_int = 10;
    // SAFETY: so many entries.
    let mut wait = |timeout: c_int| unsafe { call(libc::SYS_poll, [polled.as_mut_ptr() as usize, polled.len(), timeout as usize]) };
    // So it is if there are more entries than the program may have descriptors.
    if wait(timeout) == Err(Errno::INVAL) {
        let timeout = if timeout < 0 { MOMENT } else { timeout.min(MOMENT) };
        let _ = system::with_more_files(|| wait(timeout));
    }
}

/// Reads or writes (`number`: pread64 or pwrite64) a file from its beginning, from or to any address: all of it.
///
/// # Errors
/// `EFAULT` for bad memory, or a file that is shorter.
///
/// # Safety
/// Whoever reads bytes into memory may write there.
pub(crate) unsafe fn transfer(number: c_long, fd: c_int, at: u64, len: usize) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let part = (len - done).min(MOST);
        // SAFETY: the kernel checks the address; the caller vouches for what is written there.
        match unsafe { call(number, [fd as usize, at as usize + done, part, done]) } {
            Ok(0) => return Err(Errno::FAULT),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Random bits.
pub(crate) fn random() -> u64 {
    let mut bits = 0u64;
    // SAFETY: eight bytes that may be written.
    let got = unsafe { call(libc::SYS_getrandom, [&raw mut bits as usize, 8, 0]) };
    if got == Ok(8) {
        return bits;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a timespec that may be written.
    let _ = unsafe { call(libc::SYS_clock_gettime, [libc::CLOCK_MONOTONIC as usize, &raw mut time as usize]) };
    (time.tv_nsec as u64) << 32 ^ time.tv_sec as u64 ^ u64::from(pid()) << 16
}
