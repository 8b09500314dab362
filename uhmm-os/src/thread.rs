//! Threads whose stacks, alternate signal stacks and thread blocks lie in memory of our own, so that nothing they need to run can be
//! moved away from under them.
//!
//! A thread is a pthread, because code of the program and of libraries (a device driver's) may run on it and expects one. Its memory
//! is one mapping, not inherited by a fork except for the thread block:
//!
//! | from the bottom | |
//! |---|---|
//! | control page | what the thread starts with |
//! | guard page, alternate stack | where its signal handlers run |
//! | guard page, stack | glibc puts the thread block (and its static thread-local variables) at the top |
//!
//! Who uses it: `uhmm-core` and drivers. A driver starts its threads by `uhmm_core::own::spawn`, whose memory never migrates.
//!
//! ```
//! use std::sync::atomic::{AtomicU32, Ordering};
//! use uhmm_os::thread;
//!
//! unsafe extern "C" fn work(arg: *mut ()) {
//!     // SAFETY: it is the number below, which lives until the thread has been joined.
//!     let number = unsafe { &*arg.cast::<AtomicU32>() };
//!     number.store(thread::gettid(), Ordering::Relaxed);
//! }
//!
//! let number = AtomicU32::new(0);
//! // SAFETY: `work` returns, and what it uses lives until `join`.
//! let started = unsafe { thread::spawn(c"example", 256 << 10, work, (&raw const number).cast_mut().cast())? };
//! let tid = started.tid();
//! started.join();
//! assert_eq!(number.load(Ordering::Relaxed), tid);
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

use crate::mem::{Advice, Mapping, Prot, Reserve, madvise, map, mprotect};
use crate::signal::{block_most, set_mask};
use crate::syscall::{abi, call};
use crate::{Errno, PAGE};
use core::ffi::{CStr, c_void};
use core::mem::{ManuallyDrop, MaybeUninit};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Bytes of an alternate stack: a signal frame with AVX-512 and AMX state takes 11 KiB, and handlers may serve faults on it.
const ALTERNATE: usize = 64 << 10;
/// Bytes below the stack: control page, guard, alternate stack, guard.
const BELOW: usize = PAGE + PAGE + ALTERNATE + PAGE;
/// The smallest stack: static thread-local variables of the program lie on it too.
const SMALLEST: usize = 64 << 10;
/// Room at the top of a stack that a fork's child must have. glibc links the thread blocks (2.3 KiB each) of all threads on given
/// stacks into one list, together with the main thread's, and takes the forking thread out of it in the child.
const BLOCK_ROOM: usize = 2 * PAGE;

/// What a new thread finds in its control page.
#[repr(C)]
struct Start {
    function: unsafe extern "C" fn(*mut ()),
    arg: *mut (),
    name: [u8; 16],
    alternate: usize,
    /// 0 until the thread runs; the parent waits on it (futex(2)).
    tid: AtomicU32,
}

/// A running thread.
///
/// Dropped without [`join`](Self::join) it runs on, and its memory is never unmapped.
#[derive(Debug)]
pub struct Thread {
    pthread: libc::pthread_t,
    tid: u32,
    /// Its memory; unmapped by `join` alone.
    memory: ManuallyDrop<Mapping>,
}

// SAFETY: a pthread may be joined or detached from any thread.
unsafe impl Send for Thread {}
// SAFETY: all methods on a shared reference read a number.
unsafe impl Sync for Thread {}

/// Starts a thread that calls `f(arg)` and ends when that returns.
///
/// It is named (at most 15 bytes are kept), and so is its memory. From its first instruction it blocks every signal but those that
/// faults raise (see [`block_all_but_faults`](crate::signal::block_all_but_faults)). `stack_len` is rounded up to pages, and to
/// 64 KiB at least. The calling thread waits until the new one runs.
///
/// # Errors
/// Those of [`map`] and pthread_create(3): `EAGAIN`: too many threads; `EINVAL`: the program's static thread-local variables do not
/// fit onto the stack.
///
/// # Safety
/// `f` must be sound to call with `arg` on another thread, must return (neither unwind nor end the thread otherwise), and what it
/// uses must live until then.
pub unsafe fn spawn(name: &CStr, stack_len: usize, f: unsafe extern "C" fn(*mut ()), arg: *mut ()) -> Result<Thread, Errno> {
    let len = Thread::memory_len(stack_len).ok_or(Errno::INVAL)?;
    let memory = map(&Reserve { hint: 0, len, align: PAGE, name, prot: Prot::ReadWrite, exact: false })?;
    // SAFETY: the same promise.
    unsafe { spawn_in(memory, name, f, arg) }
}

/// As [`spawn`], in readable and writable memory that the caller chose; it is unmapped by [`Thread::join`].
///
/// # Errors
/// `EINVAL`: less memory than [`Thread::memory_len`] of the smallest stack; else as [`spawn`]. The memory is unmapped then.
///
/// # Safety
/// As [`spawn`]; nothing else may use the memory.
pub unsafe fn spawn_in(memory: Mapping, name: &CStr, f: unsafe extern "C" fn(*mut ()), arg: *mut ()) -> Result<Thread, Errno> {
    let len = memory.len();
    let stack_len = len.checked_sub(BELOW).filter(|&l| l >= SMALLEST).ok_or(Errno::INVAL)?;
    let (control, alternate, stack) = (memory.start(), memory.start() + 2 * PAGE, memory.start() + BELOW);
    // SAFETY: our own memory, which nobody uses yet.
    unsafe {
        mprotect(control + PAGE, PAGE, Prot::None)?;
        mprotect(stack - PAGE, PAGE, Prot::None)?;
        let _ = madvise(control, len, Advice::NoHugepage); // a stack that is little used should stay little
        madvise(memory.end() - BLOCK_ROOM, BLOCK_ROOM, Advice::DoFork)?;
    }
    let mut short = [0; 16];
    for (to, from) in short.iter_mut().take(15).zip(name.to_bytes()) {
        *to = *from;
    }
    let start = control as *mut Start;
    // SAFETY: the control page is ours, writable, aligned and large enough.
    unsafe { start.write(Start { function: f, arg, name: short, alternate, tid: AtomicU32::new(0) }) };
    let pthread = create(stack, stack_len, start)?;
    // SAFETY: written above; the new thread changes only the atomic.
    let tid = wait_for(unsafe { &(*start).tid });
    Ok(Thread { pthread, tid, memory: ManuallyDrop::new(memory) })
}

/// pthread_create(3) with all but fault signals blocked from the new thread's start.
fn create(stack: usize, stack_len: usize, start: *mut Start) -> Result<libc::pthread_t, Errno> {
    let result = |code: i32| {
        if code == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(code)) }
    };
    let mut attributes = MaybeUninit::uninit();
    let mut pthread = MaybeUninit::uninit();
    // SAFETY: the attributes are initialised first and destroyed last; the stack is mapped, and stays so until the thread is joined;
    // `start` lives as long.
    unsafe {
        result(libc::pthread_attr_init(attributes.as_mut_ptr()))?;
        let created = result(libc::pthread_attr_setstack(attributes.as_mut_ptr(), stack as *mut c_void, stack_len)).and_then(|()| {
            let before = block_most();
            let code = libc::pthread_create(pthread.as_mut_ptr(), attributes.as_ptr(), run, start.cast());
            set_mask(before);
            result(code)
        });
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        created.map(|()| pthread.assume_init())
    }
}

/// What the new thread runs.
extern "C" fn run(start: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` filled it in, and it is unmapped only after this thread has ended.
    let start = unsafe { &*start.cast::<Start>() };
    set_alternate_stack(Some(start.alternate));
    // SAFETY: the name ends in a zero.
    let _ = unsafe { call(abi::__NR_prctl, [linux_raw_sys::prctl::PR_SET_NAME as usize, start.name.as_ptr() as usize]) };
    start.tid.store(gettid(), Ordering::Release);
    // SAFETY: a wake-up; the word is the parent's to wait on.
    let _ = unsafe { call(abi::__NR_futex, [start.tid.as_ptr() as usize, abi::FUTEX_WAKE as usize | PRIVATE, 1]) };
    // SAFETY: the promise made to `spawn`.
    unsafe { (start.function)(start.arg) };
    set_alternate_stack(None);
    core::ptr::null_mut()
}

const PRIVATE: usize = abi::FUTEX_PRIVATE_FLAG as usize;

fn wait_for(tid: &AtomicU32) -> u32 {
    loop {
        let now = tid.load(Ordering::Acquire);
        if now != 0 {
            return now;
        }
        // SAFETY: waits while the word is 0; no time limit.
        let _ = unsafe { call(abi::__NR_futex, [tid.as_ptr() as usize, abi::FUTEX_WAIT as usize | PRIVATE, 0, 0]) };
    }
}

/// sigaltstack(2) for the calling thread.
fn set_alternate_stack(at: Option<usize>) {
    let stack = libc::stack_t {
        ss_sp: at.unwrap_or(0) as *mut c_void,
        ss_flags: if at.is_some() { 0 } else { libc::SS_DISABLE },
        ss_size: if at.is_some() { ALTERNATE } else { 0 },
    };
    // SAFETY: the stack is memory of this thread's own, or none.
    let _ = unsafe { call(abi::__NR_sigaltstack, [&raw const stack as usize, 0]) };
}

impl Thread {
    /// Bytes of memory that a thread with a stack of `stack_len` takes (rounded up to pages, and to 64 KiB at least); `None` if
    /// that is no number.
    pub fn memory_len(stack_len: usize) -> Option<usize> {
        stack_len.max(SMALLEST).checked_next_multiple_of(PAGE)?.checked_add(BELOW)
    }

    /// The kernel's number of the thread.
    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// Waits until it has ended and the kernel knows it no more, and unmaps its memory.
    ///
    /// pthread_join(3) returns when the kernel has cleared the thread's word, which is before it closes the descriptors that only this thread
    /// had: for some microseconds it would still stand in `/proc/self/task`, with them.
    pub fn join(self) {
        let mut me = ManuallyDrop::new(self);
        let tid = me.tid as usize;
        // SAFETY: joined once, as `self` is consumed; after that neither the thread nor glibc uses the memory.
        unsafe {
            if libc::pthread_join(me.pthread, core::ptr::null_mut()) == 0 {
                ManuallyDrop::drop(&mut me.memory);
                let pid = call::<0>(abi::__NR_getpid, []).unwrap_or(0);
                // Signal 0 only asks whether the thread is there (tgkill(2)).
                while call(abi::__NR_tgkill, [pid, tid, 0]).is_ok() {
                    yield_now();
                }
            }
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // SAFETY: neither joined nor detached yet; its memory stays.
        unsafe { libc::pthread_detach(self.pthread) };
    }
}

/// The calling thread's number. *Fault path.*
pub fn gettid() -> u32 {
    // SAFETY: no arguments; it cannot fail.
    unsafe { call(abi::__NR_gettid, []) }.unwrap_or(0) as u32
}

/// The calling process's number, asked of the kernel: right also in a child that nobody was told of. *Fault path.*
pub fn getpid() -> u32 {
    // SAFETY: no arguments; it cannot fail.
    unsafe { call(abi::__NR_getpid, []) }.unwrap_or(0) as u32
}

/// The most bytes of a thread's name, its end not counted.
pub const NAME: usize = 15;

/// Does something with the calling thread named `name`, of which [`NAME`] bytes count. Threads that are made meanwhile have that name from then on, unless they choose another: so the threads that a
/// library makes can be known ([`tasks::is_named`](crate::tasks::is_named)).
///
/// ```
/// use uhmm_os::{tasks, thread};
///
/// let tid = thread::named(c"library", || {
///     std::thread::spawn(|| thread::gettid()).join().unwrap();
///     assert!(tasks::is_named(thread::gettid(), c"library"));
///     thread::gettid()
/// });
/// assert!(!tasks::is_named(tid, c"library"));
/// ```
pub fn named<R>(name: &CStr, work: impl FnOnce() -> R) -> R {
    let mut before = [0u8; NAME + 1];
    let ask = |option: u32, at: usize| {
        // SAFETY: the kernel reads a name up to its end, or writes 16 bytes where there is room for them.
        unsafe { call(abi::__NR_prctl, [option as usize, at]) }.is_ok()
    };
    let known = ask(linux_raw_sys::prctl::PR_GET_NAME, before.as_mut_ptr() as usize);
    ask(linux_raw_sys::prctl::PR_SET_NAME, name.as_ptr() as usize);
    let result = work();
    if known {
        ask(linux_raw_sys::prctl::PR_SET_NAME, before.as_ptr() as usize);
    }
    result
}

/// Lets another thread run. *Fault path.*
pub fn yield_now() {
    // SAFETY: no arguments; it cannot fail.
    let _ = unsafe { call(abi::__NR_sched_yield, []) };
}

/// Waits for a moment: lets another thread run the first 20 `times`, then sleeps 50 us, so that whoever is waited for gets the core even if there are more threads
/// than cores. *Fault path.*
pub fn pause(times: u32) {
    if times < 20 {
        return yield_now();
    }
    sleep_micros(50);
}

/// Sleeps, for less than a second; a signal ends it. *Fault path.*
pub fn sleep_micros(micros: u32) {
    let time = [0usize, micros as usize % 1_000_000 * 1000]; // struct timespec
    // SAFETY: the structure is valid for reads; the remaining time is not asked for.
    let _ = unsafe { call(abi::__NR_nanosleep, [time.as_ptr() as usize, 0]) };
}

/// The core that the calling thread runs on just now. *Fault path.*
pub(crate) fn current_core() -> usize {
    let mut core = 0u32;
    // SAFETY: four bytes are written.
    let _ = unsafe { call(abi::__NR_getcpu, [&raw mut core as usize, 0, 0]) };
    core as usize
}

/// Cores that masks can name.
const CORES: usize = 8192;
type CoreMask = [usize; CORES / usize::BITS as usize];

/// Binds the calling thread to these cores (sched_setaffinity(2)). *Fault path.*
///
/// # Errors
/// `EINVAL`: none of them may be used, or a number is above 8191.
pub fn set_affinity(cores: &[usize]) -> Result<(), Errno> {
    let mut mask: CoreMask = [0; _];
    for &core in cores {
        *mask.get_mut(core / 64).ok_or(Errno::INVAL)? |= 1 << (core % 64);
    }
    // SAFETY: the mask is read.
    unsafe { call(abi::__NR_sched_setaffinity, [0, size_of_val(&mask), mask.as_ptr() as usize]) }.map(|_| ())
}

/// How many cores the calling thread may run on (sched_getaffinity(2)); 1 at least. *Fault path.*
pub fn num_cores() -> usize {
    let mut mask: CoreMask = [0; _];
    // SAFETY: the mask is written, up to its size.
    let _ = unsafe { call(abi::__NR_sched_getaffinity, [0, size_of_val(&mask), mask.as_mut_ptr() as usize]) };
    mask.iter().map(|word| word.count_ones() as usize).sum::<usize>().max(1)
}

/// Keeps a thread off the core of who wakes it, so that both run at once.
///
/// A kernel often wakes a thread on its waker's core, and corrects that only when it balances, milliseconds later; until then the woken one waits there although another
/// core sleeps. (Measured on a virtual machine of two cores: preparing a launch and bringing its result home took a tenth longer.)
///
/// ```
/// use uhmm_os::thread::Aside;
///
/// use std::sync::mpsc::channel;
///
/// let aside = &Aside::default();
/// let ((ready, is_ready), (wake, woken)) = (channel(), channel());
/// std::thread::scope(|scope| {
///     scope.spawn(move || {
///         aside.enter(); // this thread is the one that will be woken
///         ready.send(()).unwrap();
///         woken.recv().unwrap();
///     });
///     is_ready.recv().unwrap();
///     aside.keep_off(); // not on this core
///     wake.send(()).unwrap();
/// });
/// ```
#[derive(Debug)]
pub struct Aside {
    tid: AtomicU32,
    /// Where the thread may run at all.
    allowed: [AtomicUsize; CORES / usize::BITS as usize],
    /// The core that it is kept off, and one; 0 if none yet.
    off: AtomicUsize,
}

impl Default for Aside {
    fn default() -> Self {
        Aside { tid: AtomicU32::new(0), allowed: [const { AtomicUsize::new(0) }; _], off: AtomicUsize::new(0) }
    }
}

impl Aside {
    /// Makes the calling thread the one that is kept off others' cores.
    pub fn enter(&self) {
        let mut mask: CoreMask = [0; _];
        // SAFETY: the mask is written, up to its size.
        let _ = unsafe { call(abi::__NR_sched_getaffinity, [0, size_of_val(&mask), mask.as_mut_ptr() as usize]) };
        for (to, from) in self.allowed.iter().zip(mask) {
            to.store(from, Ordering::Relaxed);
        }
        self.tid.store(gettid(), Ordering::Release);
    }

    /// From now on the thread, which must live, does not run on the caller's core, unless that is the only one it may use. Costs a system call, and another one if
    /// the caller's core is not that of the last time. *Fault path.*
    pub fn keep_off(&self) {
        let (tid, core) = (self.tid.load(Ordering::Acquire), current_core());
        if tid == 0 || core >= CORES || self.off.swap(core + 1, Ordering::Relaxed) == core + 1 {
            return;
        }
        let mut mask: CoreMask = core::array::from_fn(|word| self.allowed[word].load(Ordering::Relaxed));
        mask[core / 64] &= !(1 << (core % 64));
        // SAFETY: the mask is read. An error (no core would be left, or they are others by now) changes nothing.
        let _ = unsafe { call(abi::__NR_sched_setaffinity, [tid as usize, size_of_val(&mask), mask.as_ptr() as usize]) };
    }
}

const CLOSE_RANGE_UNSHARE: usize = 2; // close_range(2), not in the generated bindings

/// Gives the calling thread a descriptor table of its own that holds only descriptors 0, 1 and 2: nothing that the rest of the
/// program closes affects it from now on, nor the other way round.
///
/// Descriptors that this thread needs must be opened after this call; those of other threads are `EBADF` here.
///
/// # Errors
/// Those of close_range(2) and unshare(2): `ENOMEM`.
pub fn unshare_files() -> Result<(), Errno> {
    let first = 3;
    let last = u32::MAX as usize;
    // SAFETY: only this thread's view changes, which is what it asks for.
    unsafe {
        if call(abi::__NR_close_range, [first, last, CLOSE_RANGE_UNSHARE]).is_ok() {
            return Ok(());
        }
        call(abi::__NR_unshare, [abi::CLONE_FILES as usize])?;
        if call(abi::__NR_close_range, [first, last, 0]).is_err() {
            let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 20);
            for fd in first..most as usize {
                let _ = call(abi::__NR_close, [fd]);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "thread_tests.rs"]
mod tests;
