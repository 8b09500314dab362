//! Coherent devices: their memory is used in place by the CPU, as the kernel's MEMORY_DEVICE_COHERENT is.
//!
//! A page that has migrated to such a device is *Coherent*: the device's page itself has taken its place in the program (UFFDIO_MOVE), and the directory's tag says that
//! it lies in the device's memory. It counts towards the capacity, is evicted when room is needed, and goes home when the device is closed; until then CPU and
//! kernels use it at one address, and no touch faults. What has not migrated is used in place too, so that nothing is ever duplicated, bounced or parked for such a device.
//!
//! # Rules
//! * What the program has mapped is the only copy, and the only truth about contents. The tag is bookkeeping: if the page is another one by now (a copy made for a
//!   child's sake, swapped out and in again), nothing is wrong but the tag.
//! * So whatever happens to a mapping only takes the tag off ([`crate::events`]), and the frame is free. Its place in device memory is vacant then, and filled by the
//!   next copy into it.
//! * Both ways lead over Private, under the block's lock. A page is taken out atomically; who touches it meanwhile waits as for any page that is away. If the kernel
//!   refuses the way in, the page stays Private and comes home when it is touched; if it refuses the way out, the page stays in the program and the tag goes.
//! * While a page is coherent a thread may begin to need it for its end, as any page of the program. So what is taken out is sealed first ([`crate::fixed`]).
#![allow(unsafe_code)] // moves the device's pages into the program

use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::directory::{BlockGuard, State};
use crate::driver::{Dma, DmaKind, Frame};
use crate::fixed;
use crate::home;
use crate::mirror::Reason;
use crate::page::{Cause, PageState, Span, Va};
use crate::pool::{self, Size, Tray};
use crate::ranges::{self, MoveEnd};
use crate::sync::*;
use core::ops::Range;
use uhmm_os::mem::{self, Prot};
use uhmm_os::uffd::{CopyMode, MoveMode};
use uhmm_os::{BLOCK, Errno, PAGE, copy, thread};

/// How often a page that the kernel has in hand for a moment is tried again.
const CONTENDED: usize = 1000;
/// How often it is looked at what will not leave, before it stays.
const LOOKS: usize = 4;

/// Puts private pages of the block into the program: those become coherent that the kernel lets in.
///
/// # Errors
/// `EAGAIN` if an event is unread: let it be read, and try the others again.
pub(crate) fn enter(core: &Core, dev: &Device, state: &mut State, va: Va, pages: Bits) -> Result<(), Errno> {
    // What arrives by a move is writable, also where the program may only read: see `enter_read_only`.
    let unlocked = if core.tags.store() == dev.id() { core.tags.unlocked(va) } else { Bits::EMPTY };
    put_in(core, dev, state, va, pages - unlocked, |run, from| move_in(core, va, run, from))
}

/// As [`enter`], of pages in a mapping that may only be read: a copy arrives with the mapping's rights, and is what the program sees of the page. The frame keeps its own.
///
/// # Errors
/// `EAGAIN` if an event is unread.
pub(crate) fn enter_read_only(core: &Core, dev: &Device, state: &mut State, va: Va, pages: Bits) -> Result<(), Errno> {
    put_in(core, dev, state, va, pages, |run, from| copy_in(core, va, run, from))
}

/// Puts private pages into the program by `step`, which gets runs of them with where they lie in device memory, and says which it has put there.
fn put_in(
    core: &Core,
    dev: &Device,
    state: &mut State,
    va: Va,
    pages: Bits,
    mut step: impl FnMut(Range<usize>, usize) -> (Bits, Result<(), Errno>),
) -> Result<(), Errno> {
    let pages = pages - core.tags.private(va, dev.id());
    dev.changed();
    core.space.mirrors.invalidate(ranges::hull(Span::block(va), pages), Reason::Migrate { to: Some(dev.id()) });
    let (mut entered, mut result) = (Bits::EMPTY, Ok(()));
    ranges::frame_runs(core, state, pages & state.private(), |run, frame| {
        if result.is_ok()
            && let Some(from) = dev.driver.peek(frame)
        {
            let (put, ended) = step(run, from);
            entered |= put;
            result = ended;
        }
    });
    state.shift(entered, PageState::Private, Cause::Enter, PageState::Coherent);
    result
}

/// Copies a run of pages of the block at `va`, which lie at `from` in device memory, into the program: those that are there.
fn copy_in(core: &Core, va: Va, run: Range<usize>, from: usize) -> (Bits, Result<(), Errno>) {
    let (mut copied, start) = (Bits::EMPTY, run.start);
    for page in run {
        // SAFETY: as in `move_in`.
        match unsafe { core.space.uffd.copy(va + page * PAGE, from + (page - start) * PAGE, PAGE, CopyMode::empty()) } {
            Ok(()) => copied.set(page),
            Err(partial) if partial.errno == Errno::AGAIN => return (copied, Err(Errno::AGAIN)),
            Err(_) => {} // unmapped, whose event will come
        }
    }
    (copied, Ok(()))
}

/// Moves a run of pages of the block at `va`, which lie at `from` in device memory, into the program: those that are there.
fn move_in(core: &Core, va: Va, run: Range<usize>, from: usize) -> (Bits, Result<(), Errno>) {
    let mut moved = Bits::EMPTY;
    let (mut at, mut most, mut contended) = (run.start, run.len(), 0);
    while at < run.end {
        let n = most.min(run.end - at);
        let (to, from) = (va + at * PAGE, from + (at - run.start) * PAGE);
        // SAFETY: the frames hold the contents that the program expects at `to`, which is empty and watched, as the directory, looked at under the event lock,
        // says; while a change of that is unread the kernel refuses the call, for the program's side is registered in this userfaultfd.
        let result = unsafe { core.space.uffd.move_pages(to, from, n * PAGE, MoveMode::empty()) };
        let done = result.map_or_else(|partial| partial.done / PAGE, |()| n);
        moved |= Bits::range(at..at + done);
        at += done;
        let Err(partial) = result else {
            most = run.len();
            continue;
        };
        match partial.errno {
            Errno::AGAIN if done > 0 => {}
            Errno::AGAIN if core.space.uffd.event_pending() => return (moved, Err(Errno::AGAIN)),
            Errno::AGAIN | Errno::BUSY if contended < CONTENDED => {
                contended += 1;
                thread::yield_now();
            }
            // One call moves within one mapping only.
            Errno::INVAL | Errno::NOENT if n - done > 1 => most = ranges::within_mapping(&core.space, va + at * PAGE, n - done),
            Errno::INVAL if move_in_executable(core, to + done * PAGE, from + done * PAGE) => {
                moved.set(at);
                at += 1;
            }
            Errno::INVAL if move_in_locked(core, to + done * PAGE, from + done * PAGE) => {
                moved.set(at);
                at += 1;
            }
            // Protected meanwhile, or unmapped, whose event will come.
            _ => at += 1,
        }
    }
    (moved, Ok(()))
}

/// As [`move_in`], of one page to a mapping that may be executed: the kernel moves pages only between mappings of the same rights.
fn move_in_executable(core: &Core, to: Va, from: usize) -> bool {
    // SAFETY: the frame is the block's alone, and stays readable and writable; for the move see `move_in`.
    unsafe {
        let _ = mem::mprotect(from, PAGE, Prot::ReadWriteExec);
        let moved = core.space.uffd.move_pages(to, from, PAGE, MoveMode::empty()).is_ok();
        let _ = mem::mprotect(from, PAGE, Prot::ReadWrite);
        moved
    }
}

/// As [`move_in`], of one page to a locked mapping: only for ports is one taken out of such.
fn move_in_locked(core: &Core, to: Va, from: usize) -> bool {
    // SAFETY: as in `move_in`.
    let enter = || unsafe { core.space.uffd.move_pages(to, from, PAGE, MoveMode::empty()).is_ok() };
    core.tags.store() != 0 && pool::while_locked(from, PAGE, enter) == Some(true)
}

/// The `ends` lock, for who is going to take pages of this device out of the program. It comes before a block's.
pub(crate) fn ends<'a>(core: &'a Core, dev: &Device) -> Option<MutexGuard<'a, ()>> {
    dev.driver.info().capabilities.coherent.then(|| core.ends.lock())
}

/// Takes coherent pages of the block out of the program, so that they are private; what cannot be taken stays there and is the device's no more. Afterwards none
/// of `pages` is coherent.
///
/// # Errors
/// `EAGAIN` if an event is unread, or no tray is free: drop the locks, let it be read, and look again.
pub(crate) fn leave(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, pages: Bits) -> Result<(), Errno> {
    if dev.is_lost() {
        untag(core, state, va, pages); // what the program has mapped it has
        return Ok(());
    }
    let mut looks = 0;
    loop {
        let pages = pages & state.coherent();
        if pages.is_empty() {
            return Ok(());
        }
        let present = core.space.present(Span::block(va)).map_err(|_| Errno::AGAIN)?;
        let here = pages & present.pages;
        // What the kernel has taken (MADV_FREE) has no contents, and what is not watched could be taken from under somebody.
        let here = here & state.reg;
        untag(core, state, va, pages - here);
        let sealed = fixed::seal(core, state, va, here)?;
        untag(core, state, va, here - sealed);
        let size = if present.huge && sealed == Bits::ALL { Size::Huge } else { Size::Small };
        let Some(mut tray) = core.pool.take_empty(size, sealed) else {
            let _ = ranges::unprotect(core, va, sealed);
            return Err(Errno::AGAIN);
        };
        let out = |pages| ranges::move_out(&core.space, va, pages, &tray, None, false);
        let (mut moved, mut end) = out(sealed);
        if end == MoveEnd::Refused
            && core.tags.store() == dev.id()
            && let Some((more, ended)) = pool::while_locked(tray.start, BLOCK, || out(sealed - moved))
        {
            (moved, end) = (moved | more, ended);
        }
        tray.full |= moved;
        let failed = take_back(core, dev, state, &mut tray, moved);
        core.pool.put(tray);
        dev.changed();
        state.shift(moved, PageState::Coherent, Cause::Leave, PageState::Private);
        if !failed.is_empty() {
            home::lose(core, dev, state, va, failed, va).1?;
        }
        state.huge = size == Size::Huge && moved == Bits::ALL;
        // If this fails, the first write does it.
        let _ = ranges::unprotect(core, va, sealed - moved);
        looks += 1;
        match end {
            MoveEnd::Pending => return Err(Errno::AGAIN),
            // Somebody holds a page for a moment (the kernel's own compaction), or has dropped it.
            MoveEnd::Refused | MoveEnd::Vanished if looks < LOOKS => thread::yield_now(),
            _ => untag(core, state, va, sealed - moved),
        }
    }
}

/// Pages of the block that have been moved into a tray are the device's again: those that it does not take.
fn take_back(core: &Core, dev: &Device, state: &State, tray: &mut Tray, pages: Bits) -> Bits {
    let mut failed = Bits::EMPTY;
    ranges::frame_runs(core, state, pages, |run, frame| {
        let taken = dev.driver.take_back(frame, tray.slot(run.start), run.len());
        let rest = run.start + taken..run.end;
        tray.full -= Bits::range(run.start..rest.start);
        if rest.is_empty() {
            return;
        }
        let (host, frame, len) = (tray.slot(rest.start), frame + taken as Frame, rest.len() * PAGE);
        let dma = [Dma { kind: DmaKind::ToDevice, host, frame, offset: 0, len }];
        // The memory is the CPU's, too: it can do what the copy engine does not.
        let copied = dev.transfer(&dma).is_ok()
            // SAFETY: the frame is vacant and nobody else's; the tray is ours. Memory that cannot be written is an error, not a crash.
            || dev.driver.peek(frame).is_some_and(|at| unsafe { copy::guarded(at as *mut u8, host as *const u8, len) }.is_ok());
        if !copied {
            failed |= Bits::range(rest);
        }
    });
    failed
}

/// Takes the tag off coherent pages, which stay where they are.
pub(crate) fn untag(core: &Core, state: &mut State, va: Va, pages: Bits) {
    let pages = pages & state.coherent();
    if pages.is_empty() {
        return;
    }
    let dev = core.device(state.device as usize - 1);
    dev.changed();
    state.shift(pages, PageState::Coherent, Cause::Release, PageState::System);
    ranges::give_frames(core, dev, state, va, pages);
}

/// Pins what the device has of a range that a launch declares, or that is sent ahead: it is not driven out by the rest of it. The device's pin is set.
pub(crate) fn pin(core: &Core, dev: &Device, start: Va, end: Va) {
    core.dir.for_each(Span::touching(start, end), |block, _| block.pin.store(dev.pin(), Ordering::Relaxed));
}

/// Makes room on a full device, or says that there is none: what would have come stays where it is.
pub(crate) fn make_room(core: &Core, dev: &Device) -> bool {
    // Looked for once a launch: what it has declared fills the device by then.
    if dev.full.load(Ordering::Relaxed) {
        return false;
    }
    let made = home::evict_one(core, dev, false).is_ok();
    dev.full.store(!made, Ordering::Relaxed);
    made
}
