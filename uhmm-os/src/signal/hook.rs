//! Something that is done before the action of a signal, whatever that is: see [`before`].
//!
//! Rules:
//! * the handler is async-signal-safe, and touches no static of zeros;
//! * the action that was there is taken as it is: its mask and flags are the kernel's business, as before, and the default action really happens;
//! * SIGBUS and SIGSEGV have a handler already ([`install`](super::install)): the hook is called when that one hands on.
//!
//! Who uses it: `uhmm-core`, for `evict_on_signal`.
//!
//! ```
//! use uhmm_os::signal::hook::{self, Moment};
//! use std::sync::atomic::{AtomicU32, Ordering};
//!
//! static SEEN: AtomicU32 = AtomicU32::new(0);
//!
//! hook::before(12, |moment| {
//!     if let Moment::Before { fatal: false } = moment { // no end of the process follows
//!         SEEN.fetch_add(1, Ordering::Relaxed);
//!     }
//! })?; // SIGUSR2
//! hook::remove_all();
//! assert_eq!(SEEN.load(Ordering::Relaxed), 0); // none came
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

use super::{Changing, FAULTS, KernelAction, NOT_OURS, OURS, Previous, action, bit, block, block_most, call_handler, die, send, set_mask};
use crate::Errno;
use crate::syscall::{abi, call};
use core::ffi::{c_int, c_void};
use core::sync::atomic::{AtomicPtr, Ordering};

/// When the hook is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A signal has come to this thread, and its action follows.
    Before {
        /// It is the default action, and ends or stops the process.
        fatal: bool,
    },
    /// After a default action that has stopped the process: it goes on.
    Continued,
}

/// Called in the thread that has the signal, inside its handler, with all signals blocked that the kernel lets be blocked but those of faults. It
/// must be async-signal-safe and must return.
pub type Hook = fn(Moment);

/// Signals are numbered from 1 to 64.
const SIGNALS: usize = 65;

/// What the handler needs. It lies in `.data` whatever its contents.
struct State {
    /// The [`Hook`].
    hook: AtomicPtr<()>,
    previous: [Previous; SIGNALS],
}

// SAFETY: `Previous` is written by who holds `Changing` only, and read through its atomics otherwise.
unsafe impl Sync for State {}

#[unsafe(link_section = ".data")]
static STATE: State = State { hook: AtomicPtr::new(no_hook as *const () as *mut ()), previous: [const { Previous::new() }; SIGNALS] };

fn no_hook(_: Moment) {}

/// Has `hook` called before the action of `signal`, from now on. All signals have the same hook: the last one that was given.
///
/// The default action follows too: it ends the process, dumps core or stops it as without us. Only signals that are there for a program's own use, SIGUSR1,
/// SIGUSR2 and those from 34 on, do not end it.
///
/// # Errors
/// `EINVAL`: no such signal, or one that cannot be handled: SIGKILL, SIGSTOP, and 32 and 33, which are the C library's.
pub fn before(signal: i32, hook: Hook) -> Result<(), Errno> {
    if !(1..SIGNALS as i32).contains(&signal) {
        return Err(Errno::INVAL);
    }
    let _changing = Changing::begin();
    STATE.hook.store(hook as *const () as *mut (), Ordering::Release);
    let previous = &STATE.previous[signal as usize];
    if previous.installed.load(Ordering::Relaxed) == OURS {
        return Ok(());
    }
    if signal != libc::SIGBUS && signal != libc::SIGSEGV {
        // Written before ours is in place: the signal may come at once.
        let before = action(signal, None)?;
        previous.keep(before);
        let replaced = action(signal, Some(&ours(before)))?;
        if replaced.sa_sigaction != before.sa_sigaction {
            previous.keep(replaced); // another thread was in between
        }
    }
    previous.installed.store(OURS, Ordering::Release);
    Ok(())
}

/// Our action with the flags and the mask of the one before.
fn ours(before: libc::sigaction) -> libc::sigaction {
    let keep = libc::SA_NODEFER | libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT | libc::SA_RESTART | libc::SA_ONSTACK;
    let is_handler = before.sa_sigaction != libc::SIG_DFL && before.sa_sigaction != libc::SIG_IGN;
    let flags = if is_handler { before.sa_flags & keep } else { libc::SA_RESTART | libc::SA_ONSTACK | (before.sa_flags & keep) };
    libc::sigaction { sa_sigaction: on_signal as *const () as usize, sa_flags: flags | libc::SA_SIGINFO, ..before }
}

/// Ends that: earlier actions are put back where ours are still the current ones, and below others ours only hand on.
pub fn remove_all() {
    let _changing = Changing::begin();
    STATE.hook.store(no_hook as *const () as *mut (), Ordering::Release);
    for (signal, previous) in STATE.previous.iter().enumerate().filter(|(_, previous)| previous.installed.load(Ordering::Relaxed) == OURS) {
        let signal = signal as c_int;
        if signal == libc::SIGBUS || signal == libc::SIGSEGV {
            previous.installed.store(NOT_OURS, Ordering::Relaxed);
        } else if action(signal, None).is_ok_and(|now| now.sa_sigaction == on_signal as *const () as usize) {
            // SAFETY: `before` wrote `whole`, and `changing` is held.
            let before = unsafe { (*previous.whole.get()).assume_init() };
            if action(signal, Some(&before)).is_ok() {
                previous.installed.store(NOT_OURS, Ordering::Relaxed);
            }
        }
    }
}

/// For the handler of faults, before it hands on. *Fault path.*
pub(super) fn before_handing_on(signal: c_int, fatal: bool) {
    if STATE.previous[signal as usize].installed.load(Ordering::Acquire) == OURS {
        call_hook(Moment::Before { fatal });
    }
}

fn call_hook(moment: Moment) {
    let mask = block_most();
    // SAFETY: only `Hook`s are ever stored there.
    let hook: Hook = unsafe { core::mem::transmute(STATE.hook.load(Ordering::Acquire)) };
    hook(moment);
    set_mask(mask);
}

/// What a signal does by default (signal(7)).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Default {
    Nothing,
    Stop,
    End,
}

fn default_of(signal: c_int) -> Default {
    match signal {
        libc::SIGCHLD | libc::SIGCONT | libc::SIGURG | libc::SIGWINCH => Default::Nothing,
        libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => Default::Stop,
        libc::SIGUSR1 | libc::SIGUSR2 | 34.. => Default::Nothing, // not so in signal(7), but so in `before`
        _ => Default::End,
    }
}

/// The handler. The kernel has applied the mask and the flags of the action before, but for SA_RESETHAND.
unsafe extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = &STATE.previous[signal as usize];
    let then = previous.action.load(Ordering::Acquire);
    let default = default_of(signal);
    call_hook(Moment::Before { fatal: then == libc::SIG_DFL && default != Default::Nothing });
    match (then, default) {
        (libc::SIG_IGN, _) | (libc::SIG_DFL, Default::Nothing) => {}
        (libc::SIG_DFL, Default::Stop) => stop(signal),
        (libc::SIG_DFL, Default::End) => {
            // What the thread did itself happens again; what was sent is sent again.
            // SAFETY: the kernel hands over a siginfo.
            let again = matches!(signal, libc::SIGILL | libc::SIGFPE) && unsafe { (*info).si_code } > 0;
            die(signal, again);
        }
        // SAFETY: the arguments are the kernel's.
        _ => unsafe { call_handler(previous, then, signal, info, context) },
    }
}

/// The default action that stops the process, until it is continued.
fn stop(signal: c_int) {
    let default = KernelAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    let mut before = KernelAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    let actions = [signal as usize, &raw const default as usize, &raw mut before as usize, 8];
    // SAFETY: the structures are the kernel's; the default action needs no restorer.
    if unsafe { call(abi::__NR_rt_sigaction, actions) }.is_ok() {
        send(signal);
        let mask = block(0);
        set_mask(mask & !bit(signal)); // here it stops
        set_mask(mask);
        // SAFETY: what was there before, as the kernel has told it.
        let _ = unsafe { call(abi::__NR_rt_sigaction, [signal as usize, &raw const before as usize, 0, 8]) };
    }
    call_hook(Moment::Continued);
}

const _: () = assert!(FAULTS & bit(libc::SIGABRT) == 0, "a signal that is sent to the process must not go to a thread that serves it");
