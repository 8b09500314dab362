//! SIGBUS and SIGSEGV: one handler that repairs what it can and hands everything else on to whoever had the signal before; and, for any signal, something that
//! is done before its action ([`hook`]).
//!
//! A fault goes, in this order, to the fixup of [`copy::guarded`], to the handler given to [`install`], and to
//! the action that was there before. Rules:
//! * the handler is *Fault path* and async-signal-safe: its state is one static that is not zero, so that it lies in `.data`;
//! * a fault that nobody wants kills the process exactly as it would without us: same signal, same instruction, same core dump.
//!
//! Who uses it: `uhmm-core`, which serves device faults so, and defers signals around its locks ([`Deferred`]).
//!
//! ```
//! use uhmm_os::signal::{self, Deferred, FaultInfo};
//!
//! fn repair(fault: &FaultInfo) -> bool {
//!     // Make fault.address valid and return true, or leave the fault to whoever had the signal before.
//!     let _ = fault.address;
//!     false
//! }
//!
//! signal::install(repair)?;
//! let deferred = Deferred::new(); // no handler of the program runs on this thread ...
//! drop(deferred); // ... until now
//! signal::uninstall();
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

pub mod hook;

use crate::syscall::{abi, call};
use crate::{Errno, copy};
use core::cell::UnsafeCell;
use core::ffi::{c_int, c_void};
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

/// What faulted, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultInfo {
    /// SIGBUS (7) or SIGSEGV (11).
    pub signal: i32,
    /// The address that was touched (`si_addr`); 0 if it is not canonical.
    pub address: usize,
    /// It was a write.
    pub write: bool,
    /// The instruction.
    pub rip: usize,
    /// `si_code`, as in sigaction(2).
    pub code: i32,
}

/// Called in the thread that faulted, inside the signal handler. True: the fault is repaired, try the instruction again; false: ask
/// the next one.
pub type FaultHandler = fn(&FaultInfo) -> bool;

const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];
const OURS: u32 = 0x55;
const NOT_OURS: u32 = 0xAA;

/// What the handler needs. INVARIANT: no part is ever all zeros where that would put it into `.bss`; the section is given besides.
struct State {
    /// Held while the actions change: `OURS` or `NOT_OURS`.
    changing: AtomicU32,
    /// The [`FaultHandler`].
    handler: AtomicPtr<()>,
    /// The actions before ours, for SIGBUS and SIGSEGV.
    previous: [Previous; 2],
}

/// An earlier action, written while `changing` is held and before ours is in place.
struct Previous {
    /// `OURS` while our handler is in place, on top or below one of the program's.
    installed: AtomicU32,
    /// `sa_sigaction`.
    action: AtomicUsize,
    /// `sa_flags`.
    flags: AtomicU32,
    /// The signals that its mask blocks, as the kernel writes them.
    mask: AtomicUsize,
    /// All of it, to put it back.
    whole: UnsafeCell<MaybeUninit<libc::sigaction>>,
}

impl Previous {
    const fn new() -> Self {
        Previous {
            installed: AtomicU32::new(NOT_OURS),
            action: AtomicUsize::new(libc::SIG_DFL),
            flags: AtomicU32::new(0),
            mask: AtomicUsize::new(0),
            whole: UnsafeCell::new(MaybeUninit::uninit()),
        }
    }
}

// SAFETY: `whole` is touched only by who holds `changing`; the rest is atomic.
unsafe impl Sync for State {}

#[unsafe(link_section = ".data")]
static STATE: State = State {
    changing: AtomicU32::new(NOT_OURS),
    handler: AtomicPtr::new(no_handler as *const () as *mut ()),
    previous: [Previous::new(), Previous::new()],
};

fn no_handler(_: &FaultInfo) -> bool {
    false
}

/// Keeps two threads from changing the actions at the same time.
struct Changing;

impl Changing {
    fn begin() -> Self {
        while STATE.changing.compare_exchange(NOT_OURS, OURS, Ordering::Acquire, Ordering::Relaxed).is_err() {
            crate::thread::yield_now();
        }
        Changing
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        STATE.changing.store(NOT_OURS, Ordering::Release);
    }
}

/// Takes SIGBUS and SIGSEGV over (with `SA_SIGINFO`, `SA_ONSTACK` and `SA_NODEFER`: a handler may fault itself). Earlier actions are
/// kept and chained to. A second call only exchanges the handler: if the program has put a handler of its own over ours since, that
/// one is expected to hand on what it does not know, as ours does.
///
/// # Errors
/// Those of sigaction(2), of which none is known for these signals.
pub fn install(handler: FaultHandler) -> Result<(), Errno> {
    let _changing = Changing::begin();
    STATE.handler.store(handler as *const () as *mut (), Ordering::Release);
    for (signal, previous) in SIGNALS.into_iter().zip(&STATE.previous) {
        if previous.installed.load(Ordering::Relaxed) == OURS {
            continue;
        }
        // Written before ours is in place: a fault may come at once.
        let before = action(signal, None)?;
        previous.keep(before);
        let mut ours = before;
        ours.sa_sigaction = on_fault as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: the mask is a set of ours.
        unsafe { libc::sigemptyset(&mut ours.sa_mask) };
        let replaced = action(signal, Some(&ours))?;
        if replaced.sa_sigaction != before.sa_sigaction {
            previous.keep(replaced); // another thread was in between
        }
        previous.installed.store(OURS, Ordering::Relaxed);
    }
    Ok(())
}

/// Does something that may put other actions over ours, as compilers do for their own crashes, and do not hand on what they do not know: afterwards ours are in place again, and theirs are gone. Where
/// ours were not the current ones before, everything is left as it is.
///
/// ```
/// use uhmm_os::signal;
///
/// signal::install(|_| false)?;
/// let version = signal::keep(|| "a call of a library that installs handlers");
/// assert!(version.len() > 5);
/// # signal::uninstall();
/// # Ok::<(), uhmm_os::Errno>(())
/// ```
pub fn keep<R>(work: impl FnOnce() -> R) -> R {
    let ours = |now: &libc::sigaction| now.sa_sigaction == on_fault as *const () as usize;
    let before = SIGNALS.map(|signal| action(signal, None).ok().filter(ours));
    let result = work();
    let _changing = Changing::begin();
    for ((signal, previous), before) in SIGNALS.into_iter().zip(&STATE.previous).zip(before) {
        // Not if ours have been taken away in order meanwhile.
        if let Some(before) = before
            && previous.installed.load(Ordering::Relaxed) == OURS
            && action(signal, None).is_ok_and(|now| !ours(&now))
        {
            let _ = action(signal, Some(&before));
        }
    }
    result
}

/// Puts the earlier actions back where ours are still the current ones. Where the program has put another over ours, ours stays
/// below it and only chains.
pub fn uninstall() {
    let _changing = Changing::begin();
    STATE.handler.store(no_handler as *const () as *mut (), Ordering::Release);
    for (signal, previous) in SIGNALS.into_iter().zip(&STATE.previous) {
        let on_top = action(signal, None).is_ok_and(|now| now.sa_sigaction == on_fault as *const () as usize);
        if previous.installed.load(Ordering::Relaxed) == OURS && on_top {
            // SAFETY: `install` wrote `whole`, and `changing` is held.
            let before = unsafe { (*previous.whole.get()).assume_init() };
            if action(signal, Some(&before)).is_ok() {
                previous.installed.store(NOT_OURS, Ordering::Relaxed);
            }
        }
    }
}

/// sigaction(2): the action before.
fn action(signal: c_int, new: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: `new` is null or an action whose handler has the form that its flags say; `before` is written on success.
    unsafe {
        match libc::sigaction(signal, new.map_or(core::ptr::null(), |a| a), before.as_mut_ptr()) {
            0 => Ok(before.assume_init()),
            _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
        }
    }
}

impl Previous {
    /// The caller holds `changing`.
    fn keep(&self, action: libc::sigaction) {
        // SAFETY: `changing` is held. glibc's set starts with the kernel's 64 signals.
        let mask = unsafe {
            (*self.whole.get()).write(action);
            (&raw const action.sa_mask).cast::<usize>().read()
        };
        self.mask.store(mask, Ordering::Relaxed);
        self.flags.store(action.sa_flags as u32, Ordering::Relaxed);
        self.action.store(action.sa_sigaction, Ordering::Release);
    }
}

/// The handler. *Fault path.*
/// No thread's number.
const NOBODY: u32 = u32::MAX;

/// Threads that a signal is on its way to: see [`interrupt`].
#[unsafe(link_section = ".data")]
static INTERRUPTED: [AtomicU32; 16] = [const { AtomicU32::new(NOBODY) }; 16];

/// Ends the [`copy::guarded`] that a thread of this process waits in, for a page that somebody has to provide: as if its memory could not be reached. A thread that is elsewhere by
/// then goes on. The handler must be in place ([`install`]).
pub fn interrupt(tid: u32) {
    if INTERRUPTED.iter().any(|slot| slot.load(Ordering::Acquire) == tid) {
        return; // on its way
    }
    let free = |slot: &&AtomicU32| slot.compare_exchange(NOBODY, tid, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    let Some(slot) = INTERRUPTED.iter().find(free) else { return };
    // SAFETY: numbers only.
    let sent = unsafe {
        let process = call(abi::__NR_getpid, []).unwrap_or(0);
        call(abi::__NR_tgkill, [process, tid as usize, libc::SIGSEGV as usize])
    };
    if sent.is_err() {
        slot.store(NOBODY, Ordering::Release); // it has ended
    }
}

unsafe extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands over a siginfo and a ucontext that are ours until we return.
    let (info_ref, registers) = unsafe { (&*info, &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs) };
    if signal == libc::SIGSEGV && info_ref.si_code == libc::SI_TKILL {
        let tid = crate::thread::gettid();
        if INTERRUPTED.iter().any(|slot| slot.compare_exchange(tid, NOBODY, Ordering::AcqRel, Ordering::Relaxed).is_ok()) {
            if let Some(to) = copy::fixup(registers[libc::REG_RIP as usize] as usize) {
                registers[libc::REG_RDX as usize] = 0;
                registers[libc::REG_RIP as usize] = to as i64;
            }
            return;
        }
    }
    let is_fault = info_ref.si_code > 0 && info_ref.si_code != BUS_MCEERR_AO;
    if is_fault {
        // SAFETY: a fault has an address.
        let address = unsafe { info_ref.si_addr() } as usize;
        let rip = registers[libc::REG_RIP as usize] as usize;
        if let Some(to) = copy::fixup(rip) {
            registers[libc::REG_RDX as usize] = address as i64;
            registers[libc::REG_RIP as usize] = to as i64;
            return;
        }
        // The error code means something for page faults only (exception 14); its bit 1 is set for writes.
        let page_fault = registers[libc::REG_TRAPNO as usize] == 14;
        let write = page_fault && registers[libc::REG_ERR as usize] & 2 != 0;
        let fault = FaultInfo { signal, address, write, rip, code: info_ref.si_code };
        // SAFETY: only `FaultHandler`s are ever stored there.
        let handler: FaultHandler = unsafe { core::mem::transmute(STATE.handler.load(Ordering::Acquire)) };
        if handler(&fault) {
            return;
        }
    }
    // SAFETY: the arguments are the kernel's.
    unsafe { chain(signal, info, context, is_fault) };
}

/// A hardware memory error that nobody has touched yet: a notice, not a fault (sigaction(2)).
const BUS_MCEERR_AO: c_int = 5;

/// Does what would have happened without us.
///
/// # Safety
/// The arguments must be those of a signal handler.
unsafe fn chain(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void, is_fault: bool) {
    let previous = if signal == libc::SIGBUS { &STATE.previous[0] } else { &STATE.previous[1] };
    let action = previous.action.load(Ordering::Acquire);
    hook::before_handing_on(signal, action == libc::SIG_DFL || (is_fault && action == libc::SIG_IGN));
    match action {
        // A signal that was sent (kill(2)) is ignored; a fault cannot be: the kernel kills.
        libc::SIG_IGN if !is_fault => {}
        libc::SIG_DFL | libc::SIG_IGN => die(signal, is_fault),
        _ => {
            let own = if previous.flags.load(Ordering::Relaxed) & libc::SA_NODEFER as u32 == 0 { bit(signal) } else { 0 };
            let before = block(previous.mask.load(Ordering::Relaxed) as u64 | own);
            // SAFETY: as by the contract.
            unsafe { call_handler(previous, action, signal, info, context) };
            set_mask(before);
        }
    }
}

/// Calls the handler that the program has registered.
///
/// # Safety
/// The arguments must be those of a signal handler; `action` is no constant.
unsafe fn call_handler(previous: &Previous, action: usize, signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let flags = previous.flags.load(Ordering::Relaxed);
    if flags & libc::SA_RESETHAND as u32 != 0 {
        previous.action.store(libc::SIG_DFL, Ordering::Relaxed);
    }
    // SAFETY: the program registered this function with these flags, so it has this form.
    unsafe {
        if flags & libc::SA_SIGINFO as u32 != 0 {
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = core::mem::transmute(action);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(c_int) = core::mem::transmute(action);
            handler(signal);
        }
    }
}

/// The kernel's sigaction, which is not glibc's.
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Restores the default action; a fault then happens again and kills, a signal that was sent is sent again.
fn die(signal: c_int, is_fault: bool) {
    let default = KernelAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: the structure is the kernel's; the default action needs no restorer.
    let _ = unsafe { call(abi::__NR_rt_sigaction, [signal as usize, &raw const default as usize, 0, 8]) };
    if !is_fault {
        send(signal);
    }
}

/// Sends a signal to the calling thread.
fn send(signal: c_int) {
    // SAFETY: numbers only.
    unsafe {
        let process = call(abi::__NR_getpid, []).unwrap_or(0);
        let _ = call(abi::__NR_tgkill, [process, crate::thread::gettid() as usize, signal as usize]);
    }
}

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Signals that stand for what the thread itself did. Blocking them would not stop them: the kernel would kill. (SIGABRT is none: abort(3) unblocks it.)
const FAULTS: u64 = bit(libc::SIGBUS) | bit(libc::SIGSEGV) | bit(libc::SIGFPE) | bit(libc::SIGILL) | bit(libc::SIGTRAP);
/// What glibc sends to every thread and waits for (pthread_cancel, and setuid and its kin): a thread that blocks the second makes
/// setuid hang.
const GLIBC: u64 = bit(32) | bit(33);

/// Blocks, in the calling thread, every signal that is not a fault of its own, so that no handler of the program runs in a thread of
/// uhmm's. The two that glibc uses between threads stay open. *Fault path.*
pub fn block_all_but_faults() {
    set_mask(!(FAULTS | GLIBC));
}

/// While it lives, signals that are no faults wait for the calling thread, which must drop it itself.
#[derive(Debug)]
pub struct Deferred {
    before: u64,
    /// A mask is a thread's.
    here: PhantomData<*mut ()>,
}

impl Deferred {
    /// From now on.
    pub fn new() -> Self {
        Deferred { before: block_most(), here: PhantomData }
    }
}

impl Default for Deferred {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        set_mask(self.before);
    }
}

/// Blocks the same, and returns the mask before. *Fault path.*
pub(crate) fn block_most() -> u64 {
    block(!(FAULTS | GLIBC))
}

/// Sets the calling thread's mask. *Fault path.*
pub(crate) fn set_mask(mask: u64) {
    // SAFETY: eight bytes, as the kernel has 64 signals.
    let _ = unsafe { call(abi::__NR_rt_sigprocmask, [libc::SIG_SETMASK as usize, &raw const mask as usize, 0, 8]) };
}

/// Blocks more signals in the calling thread, and returns the mask before.
fn block(more: u64) -> u64 {
    let mut before = 0u64;
    let args = [libc::SIG_BLOCK as usize, &raw const more as usize, &raw mut before as usize, 8];
    // SAFETY: eight bytes each, as the kernel has 64 signals.
    let _ = unsafe { call(abi::__NR_rt_sigprocmask, args) };
    before
}
