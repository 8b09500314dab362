//! fork: both processes see the contents as of the fork.
//!
//! The child inherits neither uhmm's threads nor its memory, and a page that is away has nothing in the child. So before a fork everything comes
//! home (what ports' coherent devices have is in the program, and stays), and no launch begins until it is over; the launch that runs is waited for. The child starts without uhmm, and may start one of its own.
//! What bypasses libc's fork (raw clone, `_Fork`) goes past this; vfork and posix_spawn need nothing, for they share the address space until exec.
#![allow(unsafe_code)] // handlers that libc calls, and a lock that is taken in one and released in another

use crate::core::{CURRENT, Core, EVERYTHING, NONE, current};
use crate::home;
use crate::left;
use crate::line::{Turn, Who};
use crate::mirror::Reason;
use crate::process::{self, CoreRef, Held};
use crate::sync::*;
use std::time::Duration;
use uhmm_os::signal::Deferred;
use uhmm_os::{Errno, system, thread};

/// The core that is alone over a fork.
static HELD: AtomicUsize = AtomicUsize::new(0);
static REGISTERED: AtomicBool = AtomicBool::new(false);

/// Has libc call the handlers, from the first core of this copy of the crate on.
pub(crate) fn register() -> Result<(), Errno> {
    if REGISTERED.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    // SAFETY: the handlers are this copy's code, which stays in the process (`system::pin_library`), and do nothing without a core.
    unsafe { system::atfork(before, after_in_parent, after_in_child) }
}

/// Whether a thread is between the handlers: everything is home, and its launches wait.
pub(crate) fn under_way() -> bool {
    HELD.load(Ordering::Acquire) != 0
}

extern "C" fn before() {
    let Some(core) = current() else { return };
    if core.has_worker(thread::gettid()) {
        return; // a kernel that forks: its own launch cannot be waited for
    }
    let Some(user) = CoreRef::running() else { return }; // it has ended since
    // A handler on this thread that waits for the evictor would wait for one that waits for this. Once `under_way` tells of the fork, the evictor does not wait.
    let _deferred = Deferred::new();
    let Some((held, turn)) = alone(user.core()) else { return };
    let asked = held.ask_keeper(|core: &Core| {
        send_home(core);
        core.space.mirrors.invalidate(EVERYTHING, Reason::Fork);
        core.space.left.for_each(|span| left::inherit(span, true));
        core::ptr::from_ref(core) as usize
    });
    if let Some(core) = asked {
        HELD.store(core, Ordering::Release);
        core::mem::forget((held, turn));
        core::mem::forget(user);
    }
}

/// Brings everything home, but for pages of ports that the program has mapped: the child gets them as any other page.
fn send_home(core: &Core) {
    core.for_each_device(|dev| {
        if dev.id() != core.tags.store() {
            return core.evict_device(dev);
        }
        let _ = home::send_all_home(core, dev, EVERYTHING, |state, _| state.private());
    });
    core.tags.forks(core);
}

/// The turn, so that no launch runs, and the lock, so that no device begins or ends, until the fork is over. The turn comes first: a launch is waited for without
/// the lock, which its kernel may want. `None` if address space is refused.
fn alone(core: &Core) -> Option<(Held, Turn<'_>)> {
    loop {
        let turn = core.turns.enter(Who::Alone);
        if let Some(held) = process::try_lock().ok()? {
            return Some((held, turn));
        }
        drop(turn);
        std::thread::sleep(Duration::from_micros(50));
    }
}

extern "C" fn after_in_parent() {
    let core = HELD.load(Ordering::Acquire);
    if core != 0 {
        let user = CoreRef::kept(core as *const Core);
        user.core().space.left.for_each(|span| left::inherit(span, false));
        user.core().turns.leave();
        HELD.store(0, Ordering::Release); // as long as the turn lasts, `under_way` says so
        drop(Held::again());
    }
}

extern "C" fn after_in_child() {
    HELD.store(0, Ordering::Release);
    CURRENT.store(NONE, Ordering::Release);
}
