//! Keeping in step: what the directory does when the program changes its mappings.
//!
//! All of it runs on the monitor, with the event lock held alone, so that no migration is in its collect or commit step. What is in the copy step
//! has its pages in `busy`: an invalidation takes them out, and the mover sees that when it commits. The device's entries go first, acknowledged; then
//! the directory changes.

use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::{Block, BlockGuard, State};
use crate::home;
use crate::mirror::Reason;
use crate::mode::Mode;
use crate::monitor::Change;
use crate::notifier;
use crate::page::{Cause, PageState, Span, Va};
use crate::pool::Size;
use crate::port::carry::carry;
use crate::ranges::{self, MoveEnd};
use crate::raw_fork;
use uhmm_os::uffd::Userfaultfd;
use uhmm_os::{BLOCK, Errno, PAGE, thread};

/// The events after the one that is followed.
pub(crate) trait Later {
    /// Reads more of them, which lets calls go on that the kernel refuses meanwhile, and those go on who raised them.
    fn read(&mut self);

    /// Pages of `part`, which lies in one block, of which one of them that was read says that their mapping has gone: what is there now is another one's.
    fn unmapped(&self, part: Span) -> Bits;

    /// Where the page is, as far as was read, that was at `va` when what is followed happened. `None`: it was unmapped.
    fn now_at(&self, va: Va) -> Option<Va>;

    /// A child has been filled, and goes on when this is closed; `taken`: kernels lost pages to that, and fault.
    fn filled(&mut self, child: Userfaultfd, taken: bool);
}

/// All addresses of a process.
const EVERYTHING: Span = Span { start: 0, end: 1 << 47 };

/// Follows one event.
pub(crate) fn follow(core: &Core, change: &Change, later: &mut dyn Later) {
    match *change {
        Change::Unmap(span) => unmapped(core, span),
        Change::Fork(fd) => {
            #[allow(unsafe_code)]
            // SAFETY: the descriptor came with the event, which is followed once.
            let child = unsafe { Userfaultfd::from_fork(fd) };
            core.space.mirrors.invalidate(EVERYTHING, Reason::Fork);
            core.tags.forks(core);
            let taken = raw_fork::fill(core, &child);
            later.filled(child, taken);
        }
        Change::Remove(span) if core.tables.is_own_drop(span) => {}
        Change::Remove(span) => {
            core.space.mirrors.invalidate(span, Reason::Discard);
            core.dir.for_each(span, |block, part| {
                invalidate(core, block, part, false);
                drop_now(core, block, part, later);
            });
        }
        Change::Remap { from, to } => remapped(core, from.start, to, from.len(), later),
    }
}

fn unmapped(core: &Core, span: Span) {
    core.space.mirrors.invalidate(span, Reason::Unmap);
    core.space.left.remove(span);
    core.policies.marks.remove(span);
    core.dir.for_each(span, |block, part| invalidate(core, block, part, true));
    // Addresses of the device for blocks that have no mapping left.
    for part in [span.start, span.end.saturating_sub(1)] {
        let block = Span::block(part);
        // What another munmap has taken since, whose event is not followed yet, is still entered in the device's page table.
        let entered = core.dir.get(block.start).is_some_and(|block| !block.lock().win.is_empty());
        if entered {
            continue;
        }
        let rest = core.space.maps.find(block.start);
        if matches!(rest, Ok(next) if next.is_none_or(|vma| vma.start >= block.end)) {
            core.for_each_device(|dev| dev.driver.close_window(block));
        }
    }
    let whole = Span { start: span.start.next_multiple_of(BLOCK), end: span.end / BLOCK * BLOCK };
    if !whole.is_empty() {
        core.for_each_device(|dev| dev.driver.close_window(whole));
    }
}

/// Takes the pages away that the program is dropping.
///
/// The kernel announces the drop, and does it some time after this was read. A migration in between would carry the old contents to a device, where the
/// drop does not find them. So what the range holds goes here and now, while no migration can look; the kernel then finds it empty.
///
/// Not what was unmapped after that, by an event that was read already: what is there is new. While such an event is unread the kernel refuses to move anything.
fn drop_now(core: &Core, block: &Block, part: Span, later: &mut dyn Later) {
    let va = Span::block(part.start).start;
    // Copies of other memory are checked at each launch, and an empty page is no clean one.
    let mine = if core.space.mode == Mode::Full { part.bits() } else { core.space.left.bits(part) };
    if mine.is_empty() {
        return;
    }
    loop {
        let state = block.lock();
        // A mirror watches what no migration has registered yet.
        let known = if core.space.mirrors.meet(part) { part.bits() } else { state.reg };
        let watched = mine & (known - state.busy() - later.unmapped(part));
        let Ok(present) = core.space.present(part) else { return };
        let pages = present.pages & watched;
        if pages.is_empty() {
            return;
        }
        // A huge page goes as one: to split it would cost fifty times as much.
        let size = if present.huge && pages == Bits::ALL { Size::Huge } else { Size::Small };
        let Some(mut tray) = core.pool.take_empty(size, pages) else { return };
        let (moved, end) = ranges::take_out(&core.space, va, pages, &tray, false);
        tray.full |= moved;
        core.pool.put(tray);
        match end {
            MoveEnd::All | MoveEnd::Refused => return,
            MoveEnd::Vanished => continue, // the kernel has begun: what it has not come to yet is still to be taken
            MoveEnd::Pending => {}
        }
        drop(state);
        later.read();
        thread::yield_now();
    }
}

/// Everything that devices have of `part` goes.
fn invalidate(core: &Core, block: &Block, part: Span, unregistered: bool) {
    notifier::invalidate(block);
    let mut state = block.lock();
    let bits = part.bits();
    forget(core, &mut state, Span::block(part.start).start, bits);
    if unregistered {
        state.reg -= bits;
    }
}

fn forget(core: &Core, state: &mut State, va: Va, bits: Bits) {
    let lost = bits & state.lost();
    state.shift(lost, PageState::Lost, Cause::Unmap, PageState::System);
    if state.device == 0 {
        return;
    }
    let dev = core.device(state.device as usize - 1);
    count(&dev.counters.invalidations, 1);
    ranges::unmap(core, dev, state, va, bits);
    let moving = bits & state.busy() & state.gone();
    state.shift(moving, PageState::Moving, Cause::Unmap, PageState::System);
    let copying = bits & state.busy();
    state.shift(copying, PageState::Copying, Cause::Unmap, PageState::System);
    let (private, shared, bounced) = (bits & state.private(), bits & state.duplicated(), bits & state.bounced());
    state.shift(private, PageState::Private, Cause::Unmap, PageState::System);
    state.shift(shared, PageState::Duplicated, Cause::Unmap, PageState::System);
    state.shift(bounced, PageState::Bounced, Cause::Unmap, PageState::System);
    // What the program had mapped went with the mapping, or stays in it.
    let coherent = bits & state.coherent();
    state.shift(coherent, PageState::Coherent, Cause::Unmap, PageState::System);
    state.parked -= bits;
    state.spoiled -= bits;
    state.rdonly -= bits;
    state.twins -= bits;
    ranges::give_frames(core, dev, state, va, private | shared | bounced | coherent);
}

/// Copies pages that a migration has taken out, and whose copy step may still be reading them, to where the program expects them now.
fn rescue(core: &Core, state: &State, moving: Bits, target: Va, later: &mut dyn Later) {
    if state.tray == 0 || moving.is_empty() {
        return;
    }
    for page in (moving & state.taken).pages() {
        // The kernel refuses until the one who changed the mapping has woken, and while anything else is unread; by then it may have moved on.
        while let Some(at) = later.now_at(target + page * PAGE)
            && home::copy_page(core, at, state.tray + page * PAGE) == Err(Errno::AGAIN)
        {
            later.read();
            thread::yield_now();
        }
    }
}

/// The new place of private pages is gone too: its event was read, and stands in the queue. What was moved on is brought to where it is by now, page by page.
fn move_on(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, bits: Bits, target: Va, later: &mut dyn Later) {
    for page in (bits & state.private()).pages() {
        let offset = page * PAGE;
        while let Some(at) = later.now_at(target.wrapping_add(offset)) {
            match home::bring_home_to(core, dev, state, va, Bits::one(page), at.wrapping_sub(offset)) {
                Err(Errno::AGAIN) => later.read(),
                _ => break,
            }
            thread::yield_now();
        }
    }
}

/// A lost page is here now: the kernel has moved what poisons it, too.
fn move_lost(core: &Core, at: Va) {
    let Ok(block) = core.dir.get_or_make(at) else { return };
    let mut state = block.lock();
    let page = at % BLOCK / PAGE;
    if state.page(page) == PageState::System {
        state.shift(Bits::one(page), PageState::System, Cause::Loss, PageState::Lost);
    }
}

/// The program's pages are at `to` now. What a device has of them comes home there, whatever the new alignment.
fn remapped(core: &Core, from: Va, to: Va, len: usize, later: &mut dyn Later) {
    let old = Span { start: from, end: from + len };
    core.space.mirrors.invalidate(old, Reason::Remap { to });
    core.space.left.remove(old);
    core.policies.marks.moved(old, to);
    core.dir.for_each(old, |block, part| {
        notifier::invalidate(block);
        let va = Span::block(part.start).start;
        let target = to.wrapping_add(va.wrapping_sub(from));
        let bits = part.bits();
        let mut state = block.lock();
        let mut lost = bits & state.lost();
        if state.device == 0 {
            forget(core, &mut state, va, bits);
        } else {
            let dev = core.device(state.device as usize - 1);
            carry(core, dev, &mut state, va, bits, target);
            while !(bits & state.private()).is_empty() {
                let away = bits & state.private();
                match home::bring_home_to(core, dev, &mut state, va, away, target) {
                    Ok(_) => break,
                    // The kernel refuses until the one who changed the mapping has woken, and while anything else is unread.
                    Err(Errno::AGAIN) => later.read(),
                    Err(_) => {
                        move_on(core, dev, &mut state, va, bits, target, later);
                        break;
                    }
                }
                thread::yield_now();
            }
            rescue(core, &state, bits & state.busy() & state.gone(), target, later);
            let shared = bits & (state.duplicated() | (state.busy() - state.gone()));
            lost = bits & state.lost();
            forget(core, &mut state, va, bits);
            for run in shared.runs() {
                // Not by block: the new place may have another alignment.
                while ranges::unprotect_span(core, Span { start: target + run.start * PAGE, end: target + run.end * PAGE })
                    == Err(Errno::AGAIN)
                {
                    later.read();
                    thread::yield_now();
                }
            }
        }
        state.reg -= bits;
        drop(state);
        lost.pages().for_each(|page| move_lost(core, target + page * PAGE));
    });
    // The new place is watched as the old one was. A look that came before this did not know.
    core.space.mirrors.invalidate(Span { start: to, end: to + len }, Reason::Unmap);
    let mut at = to & !(BLOCK - 1);
    while at < to + len {
        if let Ok(block) = core.dir.get_or_make(at) {
            notifier::invalidate(block);
            let part = Span { start: to, end: to + len }.and(Span::block(at));
            let mut state = block.lock();
            let moved_from = from.wrapping_add(part.start.wrapping_sub(to));
            let was = core.dir.get(moved_from).is_some();
            // Of what a mirror watches only the changes are announced: registered here, all of it is as its bit says.
            if was && (!core.space.mirrors.any() || core.space.register(part).is_ok()) {
                state.reg |= part.bits();
            }
        }
        at += BLOCK;
    }
    debug_assert!(len.is_multiple_of(PAGE));
}
