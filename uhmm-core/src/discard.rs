//! Discarding: the program says that it does not need what a range holds any more, so nobody copies it.
//!
//! It is MADV_DONTNEED on the whole pages of the range, with the guarantees that this alone does not give: what the range is was looked at before anything
//! was changed; no launch runs meanwhile that could be using the pages, and none begins; no lease has them; and when it returns, the directory has followed, so that the
//! devices' frames are free. The kernel announces the drop to the monitor, which forgets what devices have ([`crate::events`]) as for any program that drops
//! pages: frames are given back and nothing is copied, whatever state a page was in.
//!
//! The thread that asks makes the call itself: it needs no descriptor. It is alone meanwhile ([`crate::line`]), with signals deferred, for a handler of ours on this
//! thread would wait for the evictor, and that for a turn.
#![allow(unsafe_code)] // drops pages of the program, which says that it may be done

use crate::core::Core;
use crate::error::Error;
use crate::flight::{self, Conflict};
use crate::line::{Turn, Who};
use crate::page::Span;
use crate::process::{self, CoreRef};
use uhmm_os::mem::{self, Advice};
use uhmm_os::signal::Deferred;
use uhmm_os::{Errno, thread};

impl CoreRef {
    /// Drops the contents of the pages that lie wholly between `start` and `end`, wherever they are: they read as zeros from then on. Nothing is copied.
    /// Waits for running launches.
    ///
    /// ```
    /// use uhmm_core::{CoreRef, Error};
    ///
    /// fn forget(core: &CoreRef, scratch: &mut [u8]) -> Result<(), Error> {
    ///     let start = scratch.as_ptr() as usize;
    ///     // SAFETY: they are borrowed exclusively, and any bytes are valid.
    ///     unsafe { core.discard(start, start + scratch.len()) }
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::Discard`] if not all of it is private anonymous memory, or a lease has some of it: nothing has changed then. [`Error::Reentrant`] from a kernel.
    ///
    /// # Safety
    /// Nobody minds that these bytes turn to zeros, at any time during the call.
    pub unsafe fn discard(&self, start: usize, end: usize) -> Result<(), Error> {
        let core = self.core();
        if core.has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        if end > 1 << 47 {
            return Err(Error::Discard { address: end, why: "it is beyond the address space" });
        }
        let span = Span::inside(start, end);
        if span.is_empty() {
            return Ok(());
        }
        {
            let held = process::lock()?;
            held.ask_keeper(move |core: &Core| check(core, span)).ok_or(Error::System("reach the keeper", Errno::SRCH))??;
        }
        let _alone = alone(core, span)?;
        // SAFETY: by the contract.
        let dropped = unsafe {
            // Before Linux 5.18 locked memory is refused.
            match mem::madvise(span.start, span.len(), Advice::DontNeedLocked) {
                Err(Errno::INVAL) => mem::madvise(span.start, span.len(), Advice::DontNeed),
                other => other,
            }
        };
        // The call returns when its event was read; this, when it was followed.
        drop(core.space.hold());
        dropped.map_err(|e| Error::System("drop the range's pages", e))
    }
}

/// Waits until no launch runs, and no lease that was released has pages of the span.
fn alone(core: &Core, span: Span) -> Result<(Turn<'_>, Deferred), Error> {
    let mut times = 0;
    loop {
        // Signals go on when the turn has ended, in this order.
        let deferred = Deferred::new();
        let turn = core.turns.enter(Who::Alone);
        match flight::who_has(core, span.start, span.end) {
            None => return Ok((turn, deferred)),
            Some(Conflict::Busy(Error::Busy { address, .. })) => {
                return Err(Error::Discard { address, why: "a lease has it: release that first" });
            }
            Some(_) => drop(turn), // the one who is waited for may need it
        }
        // Not by the bell of flights, whose lock a thread with signals has better not.
        thread::pause(times);
        times += 1;
    }
}

/// Whether all of it is of the kind that reads as zeros when it was dropped.
fn check(core: &Core, span: Span) -> Result<(), Error> {
    let mut at = span.start;
    while at < span.end {
        let vma = core.space.mapping(at).map_err(|e| Error::System("look up mappings", e))?;
        at = match vma {
            Some(vma) if vma.is_private_anonymous() => vma.end,
            Some(vma) if vma.shared => return Err(Error::Discard { address: at, why: "it is shared memory, which others see too" }),
            Some(_) => return Err(Error::Discard { address: at, why: "it is a file's, and would read as the file again" }),
            None => return Err(Error::Discard { address: at, why: "nothing is mapped there" }),
        };
    }
    Ok(())
}
