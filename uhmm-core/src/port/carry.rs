//! Pages of ports' devices whose mapping the program moves: they stay on the device, and their new addresses are noted.
//!
//! On the monitor, with the event lock held alone. The kernel has moved the empty entries, with their marks, and what of coherent devices is mapped.
//!
//! # Rules
//! * Two blocks are locked here at the same time, which is done nowhere else.
//! * What is at the new address by now is newer: what was to come there goes.

use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::directory::{BlockGuard, State};
use crate::driver::{Dma, DmaKind, Frame};
use crate::page::{Cause, PageState, Va};
use crate::ranges;
use uhmm_os::{BLOCK, PAGE};

/// Takes the resident pages `bits` of the block at `va` along to where they are now: the block's first page would be at `to`. What cannot be taken stays noted here.
pub(crate) fn carry(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, bits: Bits, to: Va) {
    let pages = bits & (state.private() | state.coherent());
    if dev.id() != core.tags.store() || state.mover != 0 || pages.is_empty() {
        return;
    }
    if to.is_multiple_of(BLOCK) {
        part(core, dev, state, va, pages, to, 0);
        return;
    }
    // The block's pages lie in two blocks now.
    let first = (BLOCK - to % BLOCK) / PAGE;
    let low = Bits::range(0..first);
    part(core, dev, state, va, pages & low, to & !(BLOCK - 1), (crate::bits::PAGES - first) as isize);
    part(core, dev, state, va, pages - low, (to & !(BLOCK - 1)).wrapping_add(BLOCK), -(first as isize));
}

/// Pages that all lie in one block now: page `p` is page `p + shift` of the block at `to`.
fn part(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, pages: Bits, to: Va, shift: isize) {
    if pages.is_empty() || to >> 47 != 0 {
        return;
    }
    let Ok(target) = core.dir.get_or_make(to) else { return };
    if core::ptr::eq(target, state.block()) {
        within(core, dev, state, to, pages, shift);
        return;
    }
    let mut target = target.lock();
    if (target.device != 0 && target.device != dev.id()) || target.mover != 0 {
        return;
    }
    let moved = |page: usize| page.wrapping_add_signed(shift);
    let private = state.private();
    let newer = pages.pages().filter(|&page| private.has(page) && is_present(core, to + moved(page) * PAGE));
    let newer = newer.collect::<Bits>();
    let whole = shift == 0 && pages == Bits::ALL && newer.is_empty() && (target.resident() | target.busy()).is_empty();
    if whole && target.device == 0 {
        swap(core, dev, state, &mut target, va, to, private);
    } else if !take(core, dev, state, &mut target, pages - newer, to, moved) {
        return;
    } else {
        leave(core, dev, state, va, pages);
    }
    for page in (pages - newer).pages() {
        core.tags.moved(va + page * PAGE, to + moved(page) * PAGE);
    }
    if target.device != 0 {
        dev.mem.touch(&core.dir, to);
    }
    dev.changed();
}

/// Pages stay in their block, at other places, which the kernel has emptied: none of them is one of the old ones.
fn within(core: &Core, dev: &Device, state: &mut BlockGuard<'_>, va: Va, pages: Bits, shift: isize) {
    let moved = |page: usize| page.wrapping_add_signed(shift);
    let newer = pages.pages().filter(|&page| state.private().has(page) && is_present(core, va + moved(page) * PAGE));
    let newer = newer.collect::<Bits>();
    let there = (pages - newer).pages().map(&moved).collect::<Bits>();
    if there.meets(state.resident() | state.busy()) || ranges::take_frames(core, dev, state, va, there).is_err() {
        return;
    }
    let private = (pages - newer) & state.private();
    let copied = private.pages().all(|page| copy(dev, core.dir.frame(state, page), core.dir.frame(state, moved(page))));
    if !copied {
        ranges::give_frames(core, dev, state, va, there);
        return;
    }
    let there_private = private.pages().map(&moved).collect::<Bits>();
    enter(state, there_private, there - there_private);
    leave(core, dev, state, va, pages);
    for page in (pages - newer).pages() {
        core.tags.moved(va + page * PAGE, va + moved(page) * PAGE);
    }
    dev.changed();
}

/// Whether there is a page, and not only a mark.
fn is_present(core: &Core, va: Va) -> bool {
    let mut now = [uhmm_os::pagemap::Entry::default()];
    core.space.page_entries(va, &mut now).is_ok() && now[0].present
}

/// All pages of one block become all pages of another: the frames stay what they are.
fn swap(core: &Core, dev: &Device, state: &mut State, target: &mut State, va: Va, to: Va, private: Bits) {
    core.dir.swap_frames(state, target);
    if target.whole {
        dev.mem.set_owner(core.dir.frame(target, 0), to);
    }
    target.device = dev.id();
    target.huge = core::mem::take(&mut state.huge);
    target.touches = 0;
    let coherent = state.coherent();
    state.shift(private, PageState::Private, Cause::Unmap, PageState::System);
    state.shift(coherent, PageState::Coherent, Cause::Unmap, PageState::System);
    enter(target, private, coherent);
    state.device = 0;
    dev.mem.forget(&core.dir, va);
}

fn enter(target: &mut State, private: Bits, coherent: Bits) {
    target.shift(private, PageState::System, Cause::Remap, PageState::Private);
    target.shift(coherent, PageState::System, Cause::Remap, PageState::Coherent);
    target.reg |= private | coherent;
}

/// Pages get frames in the new block, and contents. False, with nothing changed, if there is no room, or the device does not copy.
fn take(core: &Core, dev: &Device, state: &State, target: &mut State, pages: Bits, to: Va, moved: impl Fn(usize) -> usize) -> bool {
    let there = pages.pages().map(&moved).collect::<Bits>();
    let lack = there - target.resident();
    if ranges::take_frames(core, dev, target, to, lack).is_err() {
        return false;
    }
    target.device = dev.id();
    let (mut private, mut coherent) = (Bits::EMPTY, Bits::EMPTY);
    let copied = pages.pages().all(|page| {
        if state.coherent().has(page) {
            coherent.set(moved(page)); // the page itself is in the program
            return true;
        }
        private.set(moved(page));
        copy(dev, core.dir.frame(state, page), core.dir.frame(target, moved(page)))
    });
    let entered = if copied { private | coherent } else { Bits::EMPTY };
    enter(target, private & entered, coherent & entered);
    target.huge = false;
    ranges::give_frames(core, dev, target, to, lack - entered);
    copied
}

fn copy(dev: &Device, from: Frame, to: Frame) -> bool {
    dev.driver
        .peek(from)
        .is_some_and(|host| dev.transfer(&[Dma { kind: DmaKind::ToDevice, host, frame: to, offset: 0, len: PAGE }]).is_ok())
}

/// The old block has these pages no more.
fn leave(core: &Core, dev: &Device, state: &mut State, va: Va, pages: Bits) {
    let (private, coherent) = (pages & state.private(), pages & state.coherent());
    state.shift(private, PageState::Private, Cause::Unmap, PageState::System);
    state.shift(coherent, PageState::Coherent, Cause::Unmap, PageState::System);
    state.huge = false;
    ranges::give_frames(core, dev, state, va, pages);
}
