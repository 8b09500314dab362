//! Reading and writing through a port's page table. All of it runs on the port's own thread.
//!
//! # Rules
//! * The caller's memory, and the process's that may have to come from somewhere, is touched while no lock is held: bytes go by way of a page of the thread's own.
//! * What is read counts only if the entry is still there afterwards; what is written is written under the locks that a change of the page needs.
#![allow(unsafe_code)] // the accesses themselves

use super::PortError;
use super::table::{READ, Table, WATCHED, WRITE, Word};
use crate::core::Core;
use crate::directory::State;
use crate::page::{PageState, Span, Va};
use crate::sync::*;
use uhmm_os::pagemap::Entry;
use uhmm_os::{BLOCK, PAGE, copy, thread};

/// Pages whose frames are looked up at once.
const LOOK: usize = 64;

/// A page of bytes on its way.
pub(super) type Bounce = [u8; PAGE];

/// How one page was reached.
enum Reached {
    Done,
    /// It has no entry, or one that is not true any more.
    Missing,
    /// It is on its way somewhere.
    Again,
}

/// The device's reads, page by page: how many pages were read before one that has no entry.
pub(super) fn read(core: &Core, table: &Table, number: u8, start: Va, out: &mut [u8]) -> Result<usize, PortError> {
    let mut bounce: Bounce = [0; PAGE];
    let mut frames = [Entry::default(); LOOK];
    for (page, out) in out.chunks_mut(PAGE).enumerate() {
        let va = start + page * PAGE;
        if page % LOOK == 0 {
            frames.fill(Entry::default());
            let _ = core.space.page_entries(va, &mut frames);
        }
        let mut then = Some(frames[page % LOOK]);
        // What is not as it was a moment ago is looked at once more.
        let reached = until(|| read_page(core, table, number, va, then.take(), &mut bounce));
        if !reached {
            return Ok(page);
        }
        out.copy_from_slice(&bounce[..out.len()]);
    }
    Ok(out.len() / PAGE)
}

/// The device's writes: how many pages were written.
///
/// # Safety
/// As [`super::Port::write`].
pub(super) unsafe fn write(core: &Core, table: &Table, number: u8, start: Va, data: &[u8]) -> Result<usize, PortError> {
    let mut bounce: Bounce = [0; PAGE];
    for (page, data) in data.chunks(PAGE).enumerate() {
        let va = start + page * PAGE;
        bounce.copy_from_slice(data);
        // SAFETY: the caller's promise.
        if !until(|| unsafe { write_page(core, table, number, va, &bounce) }) {
            return Ok(page);
        }
    }
    Ok(data.len() / PAGE)
}

/// Tries until it is clear: whether it was reached.
fn until(mut f: impl FnMut() -> Reached) -> bool {
    let mut times = 0;
    loop {
        match f() {
            Reached::Done => return true,
            Reached::Missing => return false,
            Reached::Again => thread::pause(times),
        }
        times += 1;
    }
}

/// Where the CPU finds the contents of a private page that is the device's own, or exclusive and so entered: its frame.
fn own_frame(core: &Core, state: &State, number: u8, va: Va, word: Word) -> Option<usize> {
    let page = va % BLOCK / PAGE;
    let tagged = core.tags.of(va, number);
    let ours = tagged.own.has(page) || (tagged.exclusive.has(page) && word.has(super::table::EXCLUSIVE));
    let dev = core.device((state.device as usize).checked_sub(1)?);
    let frame = core.dir.frame(state, page);
    dev.driver.peek(frame).filter(|_| ours && state.device == core.tags.store())
}

fn read_page(core: &Core, table: &Table, number: u8, va: Va, then: Option<Entry>, out: &mut Bounce) -> Reached {
    let Some(word) = table.word(va).filter(|word| word.has(READ)) else { return Reached::Missing };
    let page = va % BLOCK / PAGE;
    let private = {
        let _hold = core.space.hold();
        match core.dir.get(va) {
            None => false,
            Some(block) => {
                let state = block.lock();
                match state.page(page) {
                    PageState::Moving | PageState::Copying => return Reached::Again,
                    PageState::Private => {
                        let Some(at) = own_frame(core, &state, number, va, word) else {
                            table.refute(va, word);
                            return Reached::Missing;
                        };
                        // SAFETY: a frame of that memory, which stays the page's while its block is locked; and memory of the caller's own.
                        unsafe { core::ptr::copy_nonoverlapping(at as *const u8, out.as_mut_ptr(), PAGE) };
                        true
                    }
                    _ => false,
                }
            }
        }
    };
    if !private {
        let same = then.is_some_and(|then| then.present && word.is_frame(then.pfn)) || frame_is(core, va, word);
        if !same {
            table.refute(va, word);
            return Reached::Missing;
        }
        // SAFETY: what cannot be read is an error, not a crash; the destination is borrowed exclusively.
        let copied = unsafe { copy::guarded(out.as_mut_ptr(), va as *const u8, PAGE) };
        if copied.is_err() {
            table.refute(va, word);
            return Reached::Missing;
        }
    }
    fence(Ordering::SeqCst);
    core.space.mirrors.epoch();
    if table.word(va) == Some(word) { Reached::Done } else { Reached::Missing }
}

/// Whether the CPU's page table still has the page there that the entry is about.
fn frame_is(core: &Core, va: Va, word: Word) -> bool {
    let mut now = [Entry::default()];
    matches!(core.space.page_entries(va, &mut now), Ok(1)) && now[0].present && word.is_frame(now[0].pfn)
}

/// # Safety
/// As [`super::Port::write`].
unsafe fn write_page(core: &Core, table: &Table, number: u8, va: Va, bytes: &Bounce) -> Reached {
    let Some(word) = table.word(va).filter(|word| word.has(WRITE)) else { return Reached::Missing };
    if core.space.uffd.event_pending() {
        core.space.settle();
    }
    let page = va % BLOCK / PAGE;
    let _hold = core.space.hold();
    let Ok(block) = core.dir.get_or_make(va) else { return Reached::Missing };
    let state = block.lock();
    // What was erased before the locks were had is seen here; what comes now waits for them.
    if table.word(va) != Some(word) {
        return Reached::Missing;
    }
    match state.page(page) {
        PageState::Moving | PageState::Copying => Reached::Again,
        PageState::Private => match own_frame(core, &state, number, va, word) {
            Some(at) => {
                // SAFETY: as in `read_page`.
                unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, PAGE) };
                Reached::Done
            }
            None => {
                table.refute(va, word);
                Reached::Missing
            }
        },
        _ => {
            // Of what another userfaultfd watches the program's own handler may be waited for, which may need these locks.
            let locks = (_hold, state);
            if !word.has(WATCHED) {
                drop(locks);
            }
            // The page is there and not write-protected. If the program takes its mapping away now, the write waits for a page in whatever is there then, and the monitor for the
            // locks: it ends the write.
            // SAFETY: the source is ours; what cannot be written is an error, not a crash; for what is, the caller vouches.
            let write = || frame_is(core, va, word) && unsafe { copy::guarded(va as *mut u8, bytes.as_ptr(), PAGE) }.is_ok();
            let Some(written) = core.tags.as_writer(thread::gettid(), write) else { return Reached::Again };
            if !written {
                table.refute(va, word);
            }
            if written { Reached::Done } else { Reached::Missing }
        }
    }
}

/// Enters pages of a span that were looked up, with the frames that the CPU's page table has now. False if something came between.
pub(super) fn enter(core: &Core, table: &Table, pages: &crate::mirror::Pages, valid: impl Fn() -> bool) -> bool {
    let mut raw = [Entry::default(); 64];
    let mut at = pages.span.start;
    while at < pages.span.end {
        let count = ((pages.span.end - at) / PAGE).min(raw.len());
        let told = core.space.page_entries(at, &mut raw[..count]).unwrap_or(0);
        for (page, now) in raw[..count].iter().enumerate() {
            let va = at + page * PAGE;
            let Some(entry) = pages.at(va) else { continue };
            let frame = if page < told { now.pfn } else { 0 };
            let (_, may_write) = entry.mapping_allows();
            let flags = match entry.is_own() {
                true => READ | if may_write { WRITE } else { 0 },
                false if entry.may_read() => READ | if entry.may_write() { WRITE } else { 0 },
                false => continue,
            };
            let flags = flags | if entry.is_watched() { WATCHED } else { 0 };
            if !table.prepare(va) || !table.enter(va, flags, frame, &valid) {
                return false;
            }
        }
        at += count * PAGE;
    }
    true
}

const _: () = assert!(BLOCK.is_multiple_of(PAGE));

/// The span of whole pages from `start` on.
pub(super) fn span(start: Va, bytes: usize) -> Span {
    Span { start, end: start.saturating_add(bytes) }
}
