//! The SIGBUS handler that lets a thread serve its own faults, installed only while a floor runs.
//!
//! Rules: one floor at a time; what is not a fault of that floor goes to the handler that was there before; the handler makes
//! system calls and copies, and nothing else.

use crate::fault::Core;
use crate::{Error, Result};
use core::ffi::{c_int, c_void};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

static RUNNING: Mutex<()> = Mutex::new(());
static CURRENT: AtomicPtr<Core> = AtomicPtr::new(core::ptr::null_mut());
/// The handler that was there before, and its flags. They outlive the installation: another thread may still be on its way there.
static BEFORE: [AtomicUsize; 2] = [AtomicUsize::new(libc::SIG_DFL), AtomicUsize::new(0)];

/// The installed handler. Dropping it puts the one before back.
pub(crate) struct Installed<'a> {
    before: libc::sigaction,
    _floor: &'a Core,
    _one_at_a_time: MutexGuard<'static, ()>,
}

/// Lets threads serve their own faults on `floor`.
pub(crate) fn install(floor: &Core) -> Result<Installed<'_>> {
    let guard = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: all zeros is a valid sigaction.
    let mut ours: libc::sigaction = unsafe { core::mem::zeroed() };
    ours.sa_sigaction = on_sigbus as *const () as usize;
    // Not deferred: uhmm's own handler, chained to, may fault in turn.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
    // SAFETY: as above.
    let mut before: libc::sigaction = unsafe { core::mem::zeroed() };
    // SAFETY: asks for the present handler; both pointers are valid or null.
    if unsafe { libc::sigaction(libc::SIGBUS, core::ptr::null(), &raw mut before) } != 0 {
        return Err(Error::last("sigaction"));
    }
    BEFORE[0].store(before.sa_sigaction, Ordering::Relaxed);
    BEFORE[1].store(before.sa_flags as usize, Ordering::Relaxed);
    CURRENT.store(core::ptr::from_ref(floor).cast_mut(), Ordering::Release);
    // SAFETY: `on_sigbus` has the signature that SA_SIGINFO asks for and is safe to run at any point of any thread.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, core::ptr::null_mut()) } != 0 {
        CURRENT.store(core::ptr::null_mut(), Ordering::Release);
        return Err(Error::last("sigaction"));
    }
    Ok(Installed { before, _floor: floor, _one_at_a_time: guard })
}

impl Drop for Installed<'_> {
    fn drop(&mut self) {
        // SAFETY: what sigaction itself reported earlier.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const self.before, core::ptr::null_mut()) };
        CURRENT.store(core::ptr::null_mut(), Ordering::Release);
    }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let floor = CURRENT.load(Ordering::Acquire);
    if !floor.is_null() {
        // SAFETY: the kernel passes a valid siginfo to a handler installed with SA_SIGINFO.
        let address = unsafe { (*info).si_addr() } as usize;
        // SAFETY: `Installed` borrows the floor until after `CURRENT` was cleared, and only the floor's own threads, which end
        // before that, touch its range; a foreign fault reads nothing but the bounds of a range, while the floor is borrowed.
        if unsafe { (*floor).serve(address) } {
            return;
        }
    }
    let [handler, flags] = [BEFORE[0].load(Ordering::Relaxed), BEFORE[1].load(Ordering::Relaxed)];
    match handler {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The touch is made again and ends the process, as it would have without us.
            // SAFETY: the default action needs no handler.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        }
        handler if flags & libc::SA_SIGINFO as usize != 0 => {
            // SAFETY: it was installed with SA_SIGINFO, so this is its signature.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = unsafe { core::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: it was installed without SA_SIGINFO, so this is its signature.
            let handler: extern "C" fn(c_int) = unsafe { core::mem::transmute(handler) };
            handler(signal);
        }
    }
}
