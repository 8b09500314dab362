//! The way home: what the CPU touches, what makes room, and what ends a duplicate.
//!
//! Order, on one locked block: the device's entry goes (acknowledged), the contents are copied into pool pages, the pages move to the program, which maps them
//! and wakes the toucher in one act; only then does the directory call them System. Small returns are copied by the kernel instead
//! (UFFDIO_COPY), for moving a page must flush its old address from other cores. A step that meets an unread event leaves the page on
//! the device, whole, and says so.
//!
//! What a device does not give back, asked twice and page by page, is lost: the program's page is poisoned (UFFDIO_POISON), so that a touch raises SIGBUS, also when
//! uhmm has ended. It never reads as zero, or as it was before.
#![allow(unsafe_code)] // calls of userfaultfd that put pages into the program

use crate::bits::Bits;
use crate::coherent;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::{Block, BlockGuard, Frame, State};
use crate::driver::{Dma, DmaError, DmaKind};
use crate::error::Error;
use crate::mirror::Reason;
use crate::page::{Cause, PageState, Span, Va};
use crate::policy;
use crate::pool::{Size, Tray};
use crate::ranges;
use crate::space::Refusals;
use crate::sync::*;
use core::ops::Range;
use uhmm_os::uffd::{CopyMode, MoveMode, Partial};
use uhmm_os::{Errno, PAGE, thread};

/// Returns of at most so many pages are copied by the kernel: the break-even, and it leaves the trays whole for returns of blocks.
const COPY_UP_TO: usize = 16;
/// Pieces of one batch: 256 runs of 2 pages are the most that a block can have.
const PIECES: usize = 256;

/// Brings private pages of the block home: those that arrived.
///
/// # Errors
/// `EAGAIN` if an event is unread: drop the locks, let it be read, and look again. What arrived before that did arrive.
pub(crate) fn bring_home(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, pages: Bits) -> Result<Bits, Errno> {
    bring_home_to(core, dev, state, va, pages, va)
}

/// As [`bring_home`], for a block whose program pages are now at `to` (mremap).
pub(crate) fn bring_home_to(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, pages: Bits, to: Va) -> Result<Bits, Errno> {
    let pages = pages & state.private();
    // The kernel would refuse what has been copied by then.
    if core.space.uffd.event_pending() {
        return Err(Errno::AGAIN);
    }
    core.space.mirrors.invalidate(ranges::hull(Span::block(va), pages), Reason::Migrate { to: None });
    ranges::unmap(core, dev, state, va, pages);
    ranges::clear_marks(core, dev, pages, to)?;
    let Home { arrived, lost, mut result } = match pages.count() {
        _ if dev.is_lost() => Home { lost: pages, ..Home::NOTHING },
        0..=COPY_UP_TO => copy_home(core, dev, state, pages, to),
        _ => move_home(core, dev, state, pages, to),
    };
    state.shift(arrived, PageState::Private, Cause::Return, PageState::System);
    state.parked -= arrived;
    ranges::give_frames(core, dev, state, va, arrived);
    count(&dev.counters.pages_to_cpu, arrived.count());
    let mut done = arrived;
    if !lost.is_empty() {
        let (poisoned, ended) = lose(core, dev, state, va, lost, to);
        done |= poisoned;
        result = result.and(ended);
    }
    result.map(|()| done)
}

/// Gives private pages up, whose program pages are at `to`: those that are poisoned are lost.
///
/// # Errors
/// As [`bring_home`].
pub(crate) fn lose(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, pages: Bits, to: Va) -> (Bits, Result<(), Errno>) {
    core.has_lost.store(true, Ordering::Relaxed);
    let Poisoned { poisoned, filled, result } = poison(core, pages, to);
    state.shift(poisoned, PageState::Private, Cause::Loss, PageState::Lost);
    state.shift(filled, PageState::Private, Cause::Return, PageState::System);
    let done = poisoned | filled;
    state.parked -= done;
    ranges::give_frames(core, dev, state, va, done);
    count(&dev.counters.pages_lost, poisoned.count());
    (done, result)
}

/// How poisoning pages ended.
struct Poisoned {
    poisoned: Bits,
    /// Something else is there.
    filled: Bits,
    result: Result<(), Errno>,
}

/// Poisons empty, watched pages of the block at `to`, and wakes who waits for them.
fn poison(core: &Core, pages: Bits, to: Va) -> Poisoned {
    let [mut poisoned, mut filled] = [Bits::EMPTY; 2];
    for run in pages.runs() {
        let (mut at, mut most) = (run.start, run.len());
        while at < run.end {
            let n = most.min(run.end - at);
            let result = core.space.uffd.poison(to + at * PAGE, n * PAGE);
            let done = result.map_or_else(|partial| partial.done / PAGE, |()| n);
            poisoned |= Bits::range(at..at + done);
            at += done;
            match result {
                Ok(()) => most = run.len(),
                Err(partial) if partial.errno == Errno::AGAIN && done > 0 => {}
                // One call works within one mapping only.
                Err(partial) if partial.errno == Errno::NOENT && n - done > 1 => {
                    most = ranges::within_mapping(&core.space, to + at * PAGE, n - done);
                }
                Err(partial) => {
                    let result = after(partial.errno, &mut filled, at);
                    return Poisoned { poisoned, filled, result };
                }
            }
        }
    }
    Poisoned { poisoned, filled, result: Ok(()) }
}

/// How pages of one block came home.
struct Home {
    arrived: Bits,
    /// Pages that the device does not give back.
    lost: Bits,
    result: Result<(), Errno>,
}

impl Home {
    const NOTHING: Home = Home { arrived: Bits::EMPTY, lost: Bits::EMPTY, result: Ok(()) };
}

fn copy_home(core: &Core, dev: &Device, state: &State, pages: Bits, to: Va) -> Home {
    let Home { mut arrived, mut lost, mut result } = Home::NOTHING;
    ranges::frame_runs(core, state, pages, |run, frame| {
        if result.is_err() {
            return;
        }
        count(&dev.counters.bytes_to_cpu, run.len() * PAGE); // first, for the copy wakes the toucher, who may look
        let (mut at, mut most) = (run.start, run.len());
        while at < run.end && result.is_ok() {
            let n = most.min(run.end - at);
            let partial = match copy_run(core, dev, at..at + n, frame + (at - run.start) as Frame, to) {
                Ok(Ok(())) => {
                    arrived |= Bits::range(at..at + n);
                    (at, most) = (at + n, run.len());
                    continue;
                }
                Ok(Err(partial)) => partial,
                // Which pages it is shows one by one.
                Err(_) if n > 1 => {
                    most = 1;
                    continue;
                }
                Err(_) => {
                    lost.set(at);
                    at += 1;
                    continue;
                }
            };
            let done = partial.done / PAGE;
            arrived |= Bits::range(at..at + done);
            at += done;
            // One call copies within one mapping only, and says of more that there is none.
            if partial.errno == Errno::NOENT && n - done > 1 {
                most = ranges::within_mapping(&core.space, to + at * PAGE, n - done);
            } else {
                result = after(partial.errno, &mut arrived, at);
            }
        }
    });
    Home { arrived, lost, result }
}

/// Has the kernel copy a run of pages, whose frames follow `frame`.
fn copy_run(core: &Core, dev: &Device, run: Range<usize>, frame: Frame, to: Va) -> Result<Result<(), Partial>, DmaError> {
    let (target, len) = (to + run.start * PAGE, run.len() * PAGE);
    with_contents(core, dev, run.len(), frame, |source| {
        // SAFETY: the frames are not mapped for the device and valid, and `source` has their contents; the target pages are empty and watched, as the directory says.
        unsafe { core.space.uffd.copy(target, source, len, CopyMode::empty()) }
    })
}

/// Calls `f` with an address at which the contents of frames stand that are not in the device's page table: `pages` of them from `frame` on, at most a block.
///
/// # Errors
/// The device's, which does not give them; `f` was not called then.
pub(crate) fn with_contents<R>(core: &Core, dev: &Device, pages: usize, frame: Frame, f: impl FnOnce(usize) -> R) -> Result<R, DmaError> {
    if dev.is_lost() {
        return Err(DmaError::Lost);
    }
    if let Some(source) = dev.driver.peek(frame) {
        return Ok(f(source));
    }
    let tray = core.pool.take_full(&core.space, Size::Small, Bits::range(0..pages), 0);
    let dma = [Dma { kind: DmaKind::ToHost, host: tray.slot(0), frame, offset: 0, len: pages * PAGE }];
    let result = dev.transfer(&dma).map(|()| f(tray.slot(0)));
    core.pool.put(tray);
    result
}

/// Copies one page of a tray into an empty, watched page of the program.
pub(crate) fn copy_page(core: &Core, target: Va, source: usize) -> Result<(), Errno> {
    // SAFETY: the source is a full slot of a tray; the target was taken out of the program, which waits for it.
    unsafe { core.space.uffd.copy(target, source, PAGE, CopyMode::empty()) }.map_err(|partial| partial.errno)
}

/// What an error at `page` means: it arrived in another way, it has nowhere to go (`ENOENT`: its event will come), or an event is unread (`EAGAIN`).
fn after(errno: Errno, arrived: &mut Bits, page: usize) -> Result<(), Errno> {
    if errno == Errno::EXIST {
        // Somebody filled the page meanwhile: what is there is newer.
        arrived.set(page);
    }
    Err(if errno == Errno::NOENT { errno } else { Errno::AGAIN })
}

fn move_home(core: &Core, dev: &Device, state: &State, pages: Bits, to: Va) -> Home {
    let huge = state.huge && state.whole && pages == Bits::ALL && to.is_multiple_of(uhmm_os::BLOCK);
    let (size, lack) = if huge { (Size::Huge, 0) } else { (Size::Small, COPY_UP_TO) };
    let mut tray = core.pool.take_full(&core.space, size, pages, lack);
    // A few pages that the best tray lacks (edges of arguments, which left by themselves) are copied by the kernel.
    let lacking = pages - tray.full;
    let pages = pages - lacking;
    let mut dma = [Dma { kind: DmaKind::ToHost, host: 0, frame: 0, offset: 0, len: 0 }; PIECES];
    let mut pieces = 0;
    let mut failed = Bits::EMPTY;
    let start = tray.start;
    let mut send = |list: &[Dma]| {
        if dev.transfer(list).is_err() {
            let runs = list.iter().map(|dma| (dma.host - start) / PAGE..(dma.host - start + dma.len) / PAGE);
            runs.for_each(|run| failed |= Bits::range(run));
        }
    };
    ranges::frame_runs(core, state, pages, |run, frame| {
        if pieces == PIECES {
            send(&dma);
            pieces = 0;
        }
        dma[pieces] = Dma { kind: DmaKind::ToHost, host: tray.slot(run.start), frame, offset: 0, len: run.len() * PAGE };
        pieces += 1;
    });
    send(&dma[..pieces]);
    // Those are asked for in smaller parts, after the others have come.
    let (pages, lacking) = (pages - failed, lacking | failed);
    count(&dev.counters.bytes_to_cpu, pages.count() * PAGE);
    let (mut arrived, mut result) = deliver(core, &mut tray, pages, to);
    core.pool.put(tray);
    let mut lost = Bits::EMPTY;
    if result.is_ok() && !lacking.is_empty() {
        let copied = copy_home(core, dev, state, lacking, to);
        arrived |= copied.arrived;
        (lost, result) = (copied.lost, copied.result);
    }
    Home { arrived, lost, result }
}

/// Moves pages of a tray, which are full, into the empty, watched pages of the program's block at `to`: those that arrived.
///
/// # Errors
/// `EAGAIN` and `ENOENT` as in [`bring_home`].
pub(crate) fn deliver(core: &Core, tray: &mut Tray, pages: Bits, to: Va) -> (Bits, Result<(), Errno>) {
    let mut arrived = Bits::EMPTY;
    let mut result = Ok(());
    'runs: for run in pages.runs() {
        let (mut at, mut most) = (run.start, run.len());
        while at < run.end {
            let n = most.min(run.end - at);
            // SAFETY: the tray's pages are ours, full of the block's contents; the target pages are empty and watched, as the directory says.
            let Err(partial) = (unsafe { core.space.uffd.move_pages(to + at * PAGE, tray.slot(at), n * PAGE, MoveMode::empty()) }) else {
                tray.full -= Bits::range(at..at + n);
                arrived |= Bits::range(at..at + n);
                at += n;
                most = run.len();
                continue;
            };
            let done = partial.done / PAGE;
            tray.full -= Bits::range(at..at + done);
            arrived |= Bits::range(at..at + done);
            at += done;
            match partial.errno {
                Errno::AGAIN if done > 0 || !core.space.uffd.event_pending() => {}
                Errno::INVAL if n > 1 => most = ranges::within_mapping(&core.space, to + at * PAGE, n),
                Errno::INVAL => {
                    // A mapping that no page can move to (protected or locked meanwhile): a copy can.
                    // SAFETY: as above.
                    let copied = unsafe { core.space.uffd.copy(to + at * PAGE, tray.slot(at), PAGE, CopyMode::empty()) };
                    if let Err(partial) = copied {
                        result = after(partial.errno, &mut arrived, at);
                        break 'runs;
                    }
                    arrived.set(at);
                    at += 1;
                }
                errno => {
                    result = after(errno, &mut arrived, at);
                    break 'runs;
                }
            }
        }
    }
    (arrived, result)
}

/// Ends duplicates: the device's copies go, and the CPU may write again.
///
/// # Errors
/// `EAGAIN` as in [`bring_home`]; the device's copies are gone all the same.
pub(crate) fn drop_duplicates(core: &Core, dev: &Device, state: &mut State, va: Va, pages: Bits) -> Result<(), Errno> {
    let pages = pages & state.duplicated();
    if pages.is_empty() {
        return Ok(());
    }
    ranges::unmap(core, dev, state, va, pages);
    state.shift(pages, PageState::Duplicated, Cause::CpuWrite, PageState::System);
    ranges::give_frames(core, dev, state, va, pages);
    ranges::unprotect(core, va, pages)
}

/// Brings everything of the block that holds `va` home, whatever it takes; snapshots stay, and so does what a flight holds.
pub(crate) fn send_home(core: &Core, dev: &Device, va: Va) -> Result<(), Error> {
    send_pages_home(core, dev, va, Bits::ALL)
}

/// As [`send_home`], for some pages of the block.
pub(crate) fn send_pages_home(core: &Core, dev: &Device, va: Va, pages: Bits) -> Result<(), Error> {
    send_but(core, dev, va, pages, &|va| dev.flights.held(va))
}

/// The same, but for what is `kept` of the block.
pub(crate) fn send_but(core: &Core, dev: &Device, va: Va, pages: Bits, kept: &dyn Fn(Va) -> Bits) -> Result<(), Error> {
    let va = Span::block(va).start;
    let mut refusals = Refusals::new(&core.space);
    loop {
        let hold = core.space.hold();
        let ends = coherent::ends(core, dev);
        let Some(block) = core.dir.get(va) else { return Ok(()) };
        let mut state = block.lock();
        if state.device != dev.id() {
            return Ok(());
        }
        if state.mover != 0 {
            drop((state, ends, hold));
            thread::yield_now();
            continue;
        }
        // A lost device keeps nothing for anybody.
        let pages = if dev.is_lost() { pages } else { pages - kept(va) };
        let shared = state.duplicated() & pages;
        let mut result = drop_duplicates(core, dev, &mut state, va, shared);
        if result.is_ok() {
            result = coherent::leave(core, dev, &mut state, va, pages);
        }
        if result.is_ok() {
            let away = (state.private() & pages) - state.parked; // parked pages are the running launch's
            result = bring_home(core, dev, &mut state, va, away).map(|_| ());
        }
        drop((state, ends, hold));
        match result {
            Ok(()) => return Ok(()),
            Err(_) => {
                refusals.wait();
            }
        }
    }
}

/// As [`send_pages_home`], for those pages of every block that meets `span` which `which` names of what the device has there.
pub(crate) fn send_all_home(core: &Core, dev: &Device, span: Span, which: impl Fn(&State, Va) -> Bits) -> Result<(), Error> {
    let mut result = Ok(());
    core.dir.for_each(span, |block, part| {
        let pages = {
            let _hold = core.space.hold();
            let state = block.lock();
            if state.device == dev.id() { which(&state, part.start) & part.bits() } else { Bits::EMPTY }
        };
        if !pages.is_empty() {
            let sent = send_pages_home(core, dev, part.start, pages);
            result = core::mem::replace(&mut result, Ok(())).and(sent);
        }
    });
    result
}

/// Makes room: sends a block home that no running launch has declared, the least recently used one or another if the policy says so; with `force`, failing that, one that it has but
/// can bear to lose, since the device will fault on it.
///
/// # Errors
/// [`Error::NoRoom`] if there is none.
pub(crate) fn evict_one(core: &Core, dev: &Device, force: bool) -> Result<(), Error> {
    let (pin, oldest) = (dev.pin(), dev.flights.oldest());
    // What has to stay would be chosen again and again.
    let may = |va, block: &Block| !block.keep.load(Ordering::Relaxed) && dev.flights.held(va).is_empty();
    let mut va = policy::leaving(core, dev, |va, block| {
        let needed = block.pin.load(Ordering::Relaxed);
        may(va, block) && needed < oldest && (pin == 0 || needed != pin)
    });
    if va.is_none() && force {
        va = policy::leaving(core, dev, may);
    }
    let Some(va) = va else {
        let info = dev.driver.info();
        return Err(Error::NoRoom { device: info.name, needed: uhmm_os::BLOCK, capacity: info.memory });
    };
    count(&dev.counters.evictions, 1);
    if let Some(block) = core.dir.get(va) {
        policy::one_more(&block.past.evictions);
    }
    send_home(core, dev, va)
}
