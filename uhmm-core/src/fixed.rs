//! Pages that never leave: what uhmm's threads use of the program's memory, and what the end of a thread needs.
//!
//! *The C library's zero statics*: compilers copy large values by memcpy, which reads thresholds there, on any thread, also on those that serve faults.
//!
//! *What a dying thread needs.* A task that is exiting takes no userfault, so what the kernel then does for it would fail: it clears the word of
//! CLONE_CHILD_CLEARTID, for which pthread_join waits, and marks the robust mutexes that the thread still holds, for which their next owner waits. glibc has
//! that word, and the robust list's head, in the thread's control block; the list's entries lie in the mutexes, anywhere. get_robust_list(2) tells the head
//! of every thread.
//!
//! # Rules
//! * A page that may hold such bytes is [`seal`]ed before it leaves or is duplicated: registered, then looked for, then write-protected, then looked
//!   for again, all with the event lock shared. A thread that begins to need a page writes to it: before the protection, so that the second look finds it;
//!   or after, so that the write waits until the page is writable again.
//! * A thread that begins to need a page and dies, all between the two looks, is found all the same if its stack is registered: glibc drops the stack
//!   of a thread that ends (MADV_DONTNEED), and that waits for the monitor, which waits for the event lock.
//! * What the second look finds is made writable by unregistering it, for the kernel refuses to unprotect while such an event is unread.
//! * Program memory is read only where it is there: its block locked, its page present. Whoever reads holds the `ends` lock, under which alone two
//!   blocks may be locked, or no block.

use crate::args::MAX_ARGS;
use crate::bits::Bits;
use crate::core::Core;
use crate::directory::{BlockGuard, State};
use crate::page::{Span, Va};
use crate::ranges;
use uhmm_os::maps::{Vma, VmaKind};
use uhmm_os::tasks::{HEADS, RobustHead};
use uhmm_os::{BLOCK, Errno, PAGE, system, tasks};

/// From the start of glibc's thread control block to the robust list's head, and from the head to its end, rseq area included (2.31 to 2.40).
const BEFORE: usize = 736;
const AFTER: usize = 1632;

fn control_block(head: Va) -> Span {
    Span::touching(head.saturating_sub(BEFORE), head + AFTER)
}

/// Where the C library's zero statics are; empty if that cannot be told.
pub(crate) fn c_library() -> Span {
    system::c_library_statics().map_or(Span::default(), |(start, end)| Span::touching(start, end))
}

/// Pages of `span`, which lies in one block, that must not leave. To be called without a block's lock.
pub(crate) fn pages(core: &Core, span: Span) -> Bits {
    let _one = core.ends.lock();
    look_in(core, span, None)
}

/// Pages of `span` that lie in a thread's stack: of the main thread's mapping, and what lies below a control block in its mapping (a guard page ends that).
pub(crate) fn stacks(vma: &Vma, span: Span) -> Bits {
    if vma.kind == VmaKind::Stack {
        return span.bits();
    }
    let mut found = Bits::EMPTY;
    tasks::for_each_robust_list_head(|head| {
        if vma.start <= head && head < vma.end {
            found |= Span::touching(vma.start, head).and(span).bits();
        }
    });
    found
}

/// Makes those of `pages` unwritable, which are registered and present, that may leave, and returns them. They are called System all
/// the same: who gives up after this leaves a protection that the first write ends. The event lock and the `ends` lock are held.
///
/// # Errors
/// `EAGAIN` if an event is unread; nothing is protected then.
pub(crate) fn seal(core: &Core, state: &mut BlockGuard<'_>, va: Va, pages: Bits) -> Result<Bits, Errno> {
    if pages.is_empty() {
        return Ok(pages);
    }
    let block = Span::block(va);
    let hull = ranges::hull(block, pages);
    let free = pages - look_in(core, hull, Some((block.start, state)));
    let mut sealed = Bits::EMPTY;
    for run in free.runs() {
        if let Err(e) = ranges::protect(core, ranges::pages(block, run.clone())) {
            release(core, state, block, sealed);
            return if e == Errno::AGAIN { Err(e) } else { Ok(Bits::EMPTY) };
        }
        sealed |= Bits::range(run);
    }
    let late = sealed & look_in(core, hull, Some((block.start, state)));
    release(core, state, block, late);
    Ok(sealed - late)
}

/// Edge pages of a launch that were sealed together: two looks for all of them, instead of two for each.
///
/// They stay sealed as long as they are write-protected: whoever begins to need one writes to it, which ends the protection, and who protects it again looks
/// before and after.
#[derive(Debug)]
pub(crate) struct Sealed {
    pages: [Va; EDGES],
    count: usize,
}

/// The most edge pages that a launch has.
const EDGES: usize = 2 * MAX_ARGS;

impl Sealed {
    /// None.
    pub(crate) const fn new() -> Self {
        Sealed { pages: [0; EDGES], count: 0 }
    }

    /// Adds a page that is to be sealed.
    pub(crate) fn push(&mut self, page: Va) {
        if self.count < EDGES && !self.pages[..self.count].contains(&page) {
            self.pages[self.count] = page;
            self.count += 1;
        }
    }

    /// Seals the pages that were added, as far as they are the CPU's and may leave; the others are dropped from the list. No lock is held but that of the launch.
    pub(crate) fn seal(&mut self, core: &Core) {
        let _hold = core.space.hold();
        let _one = core.ends.lock();
        self.retain(|page| watched(core, page));
        if self.count == 0 {
            return;
        }
        self.drop_needed(core, |_| {});
        self.retain(|page| ranges::protect(core, Span { start: page, end: page + PAGE }).is_ok());
        self.drop_needed(core, |page| {
            if let Some(block) = core.dir.get(page) {
                let span = Span::block(page);
                release(core, &mut block.lock(), span, Bits::one((page - span.start) / PAGE));
            }
        });
    }

    /// Pages of a block that are sealed still. The event lock and the block's are held.
    pub(crate) fn still(&self, core: &Core, block: Va) -> Bits {
        let mut still = Bits::EMPTY;
        for &page in &self.pages[..self.count] {
            if Span::block(page).start == block && core.space.is_protected(page) {
                still.set(page % BLOCK / PAGE);
            }
        }
        still
    }

    fn retain(&mut self, mut keep: impl FnMut(Va) -> bool) {
        let mut kept = 0;
        for index in 0..self.count {
            if keep(self.pages[index]) {
                self.pages[kept] = self.pages[index];
                kept += 1;
            }
        }
        self.count = kept;
    }

    /// Drops what must not leave, after `f`.
    fn drop_needed(&mut self, core: &Core, f: impl Fn(Va)) {
        let mut needed = [false; EDGES];
        let told = look(core, None, &mut |stays| {
            for (needed, &page) in needed.iter_mut().zip(&self.pages[..self.count]) {
                *needed |= stays.start < page + PAGE && page < stays.end;
            }
        });
        let mut index = 0;
        self.retain(|page| {
            let stays = needed[index] || !told;
            index += 1;
            if stays {
                f(page);
            }
            !stays
        });
    }
}

/// Whether the page is the CPU's, with nothing of it on its way, and watched from now on.
fn watched(core: &Core, page: Va) -> bool {
    let Ok(block) = core.dir.get_or_make(page) else { return false };
    let mut state = block.lock();
    let at = page % BLOCK / PAGE;
    if (state.private() | state.duplicated() | state.busy()).has(at) {
        return false;
    }
    if !state.reg.has(at) {
        let mut part = Bits::EMPTY;
        let _ = core.space.watch(Span { start: page, end: page + PAGE }, None, |watched| part |= watched.bits());
        state.reg |= part;
    }
    state.reg.has(at)
}

/// Makes pages writable whatever is unread.
fn release(core: &Core, state: &mut BlockGuard<'_>, block: Span, pages: Bits) {
    for run in pages.runs() {
        let span = ranges::pages(block, run.clone());
        // An error: it was unmapped, or lies in two mappings of which one cannot be watched; then page by page.
        if core.space.uffd.unregister(span.start, span.len()).is_err() {
            for at in (span.start..span.end).step_by(PAGE) {
                let _ = core.space.uffd.unregister(at, PAGE);
            }
        }
        state.reg -= Bits::range(run);
        if core.space.mirrors.meet(span) {
            let _ = core.space.watch_events(span); // an error: it has been unmapped, and a mirror was told
        }
    }
}

/// Pages of `span`, which lies in one block, that must not leave.
fn look_in(core: &Core, span: Span, locked: Option<(Va, &State)>) -> Bits {
    let mut found = Bits::EMPTY;
    let told = look(core, locked, &mut |stays| found |= stays.and(span).bits());
    if told { found } else { span.bits() } // nothing is free
}

/// Calls `stays` with all that must not leave; false if that cannot be told. `locked` is the block whose lock the caller holds.
fn look(core: &Core, locked: Option<(Va, &State)>, stays: &mut dyn FnMut(Span)) -> bool {
    fn walk(core: &Core, locked: Option<(Va, &State)>, head: Va, words: RobustHead, stays: &mut dyn FnMut(Span)) {
        let entry = |start: Va, len: usize| {
            if let Some(end) = start.checked_add(len) {
                stays(Span::touching(start, end));
            }
        };
        tasks::for_each_robust_entry(head, words, |at, words| read(core, at, words, locked), entry);
    }
    stays(core.c_library);
    // Most heads lie where nothing was ever watched, and are read together.
    let (mut far, mut count, mut words) = ([0; HEADS], 0, [RobustHead::default(); HEADS]);
    let told = tasks::for_each_robust_list_head(|head| {
        stays(control_block(head));
        if count < HEADS && core.dir.get(head).is_none() && core.dir.get(head + size_of::<RobustHead>()).is_none() {
            far[count] = head;
            count += 1;
            return;
        }
        let mut words = RobustHead::default();
        if read(core, head, &mut words, locked) {
            walk(core, locked, head, words, stays);
        }
    });
    let read_ones = tasks::read_heads(&far, &mut words, count);
    for index in 0..count {
        // Beyond the first that is gone, because its thread has ended, each is tried for itself.
        if index < read_ones || read(core, far[index], &mut words[index], locked) {
            walk(core, locked, far[index], words[index], stays);
        }
    }
    told
}

/// Reads words of the program's, if their pages are there.
fn read(core: &Core, at: Va, words: &mut [usize], locked: Option<(Va, &State)>) -> bool {
    let span = Span { start: at, end: at.saturating_add(size_of_val(words)) };
    if span.end > 1 << 47 {
        return false;
    }
    if Span::touching(span.start, span.end).len() > PAGE {
        return words.chunks_mut(1).enumerate().all(|(index, word)| read(core, at + index * size_of::<usize>(), word, locked));
    }
    let there = |state: &State| {
        // A registered page that is not there would be waited for.
        !state.gone().has(at % BLOCK / PAGE)
            && core.space.present(Span::touching(at, at + 1)).is_ok_and(|present| !present.pages.is_empty())
    };
    match locked {
        Some((va, state)) if va == Span::block(at).start => there(state) && tasks::read_words(at, words),
        _ => match core.dir.get(at) {
            Some(block) => {
                let state = block.lock();
                there(&state) && tasks::read_words(at, words)
            }
            None => tasks::read_words(at, words),
        },
    }
}
