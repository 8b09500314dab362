//! Migration for ports: in the manner of the kernel's `migrate_vma`, page by page, and exclusive access.
//!
//! It runs on the port's thread, with the turn alone, so that no launch runs whose pages it could take, and no other port migrates.

use super::table::{EXCLUSIVE, NAMED, READ, Table, WATCHED, WRITE};
use super::{Owner, PortError, huge};
use crate::bits::Bits;
use crate::coherent;
use crate::core::{Core, Device};
use crate::directory::State;
use crate::error::Error;
use crate::home;
use crate::line::Who;
use crate::migrate::Intent;
use crate::mirror::Reason;
use crate::page::{Span, Va};
use crate::ranges;
use crate::sync::*;
use uhmm_os::maps::{Vma, VmaKind};
use uhmm_os::mem::{self, Advice, Prot};
use uhmm_os::pagemap::Entry;
use uhmm_os::{Errno, PAGE, thread};

/// The ids of ports' devices, as reasons of invalidations name them, begin after those of the core's.
pub(super) const IDS: u32 = 0x100;

/// One migration.
pub(super) struct Job<'a> {
    pub(super) core: &'a Core,
    pub(super) dev: &'a Device,
    pub(super) table: &'a Table,
    pub(super) owner: Owner,
    /// The pages become exclusive.
    pub(super) exclusive: bool,
    /// The next allocation fails, once.
    pub(super) fail: &'a AtomicBool,
}

impl Job<'_> {
    /// Moves what can move of a span to the device.
    pub(super) fn to_device(&self, span: Span) -> Result<(), PortError> {
        let core = self.core;
        core.space.settle();
        let _turn = core.turns.enter(Who::Alone);
        let _prepare = core.prepare.lock();
        self.dev.driver.stand_by();
        self.dev.set_pin(core.next_launch());
        self.dev.full.store(false, Ordering::Relaxed);
        let mut at = span.start;
        while at < span.end {
            let vma = mapping(core, at)?.filter(|vma| vma.read && fits(core, vma, at)).ok_or(PortError::Unfit { address: at })?;
            let part = Span { start: at, end: vma.end.min(span.end) };
            // Others' entries go: what the migration takes is theirs no more.
            core.space.mirrors.invalidate(part, Reason::Migrate { to: Some(IDS + u32::from(self.owner.number)) });
            if vma.is_private_anonymous() {
                // All of the mapping: parts that are watched in another way could not be moved together by mremap(2), nor merged.
                let _ = ranges::watch_span(core, Span { start: vma.start, end: vma.end });
                for part in part.blocks() {
                    self.block_to_device(&vma, part)?;
                }
            } else if !vma.shared && !self.exclusive {
                self.name(&vma, part);
            }
            at = part.end;
        }
        Ok(())
    }

    /// Pages of a private mapping of a file that were written, and so are anonymous: userfaultfd moves nothing out of such a mapping. They stay, and are the device's in name.
    fn name(&self, vma: &Vma, part: Span) {
        let write = if vma.write { WRITE } else { 0 };
        for va in (part.start..part.end).step_by(PAGE) {
            let now = self.page(va);
            if now.present && !now.file_or_shared && self.table.prepare(va) {
                self.table.enter(va, READ | write | NAMED, now.pfn, || true);
            }
        }
    }

    /// How many pages of a span are the device's in name: they are no more.
    fn unname(&self, span: Span) -> u64 {
        let mut count = 0;
        for va in (span.start..span.end).step_by(PAGE) {
            if let Some(word) = self.table.word(va).filter(|word| word.has(NAMED)) {
                self.table.refute(va, word);
                count += u64::from(word.is_frame(self.page(va).pfn));
            }
        }
        count
    }

    /// Pages of one block and one mapping.
    fn block_to_device(&self, vma: &Vma, part: Span) -> Result<(), PortError> {
        let core = self.core;
        let va = Span::block(part.start).start;
        if let Some(block) = core.dir.get(va) {
            let _hold = core.space.hold();
            self.untag_copied(&mut block.lock(), va, part);
        }
        let before = self.resident(part);
        let mut want = part.bits() - before;
        let failing = self.fail.load(Ordering::Relaxed) && !want.is_empty();
        // A block whose pages are one huge page asks for its memory as one. If that fails, the pages are asked for one by one; else the first page stays where it is.
        if failing && self.fail.swap(false, Ordering::Relaxed) && !(want == Bits::ALL && self.is_huge(va)) {
            want -= Bits::one(want.runs().next().map_or(0, |run| run.start));
        }
        self.clear_stale_marks(part, want);
        core.tags.set(va, want, self.owner, self.exclusive);
        let skip = |asked: Span| asked.bits() - want;
        // Exclusive access is for single pages: a touch revokes it for one.
        let split = (failing || self.exclusive) && want == Bits::ALL;
        if vma.write {
            self.make_resident(part, vma.exec, split, &skip)?;
        } else {
            self.move_read_only(part, split, &skip)?;
        }
        self.settle_block(vma, part, before);
        Ok(())
    }

    /// Pages of a mapping that may not be written: see [`unlock`].
    fn move_read_only(&self, part: Span, split: bool, skip: &dyn Fn(Span) -> Bits) -> Result<(), PortError> {
        let core = self.core;
        let mut times = 0;
        let _rights = loop {
            // The program's own change comes first, and no other begins until the protection is back. So what the mapping allows is looked up once more.
            let rights = core.rights.lock();
            if !core.space.mirrors.changing(part) {
                break rights;
            }
            drop(rights);
            thread::pause(times);
            times += 1;
        };
        let Some(vma) = mapping(core, part.start)?.filter(|vma| vma.read && vma.end >= part.end) else { return Ok(()) };
        if vma.write {
            return self.make_resident(part, vma.exec, split, skip);
        }
        let [there, back] = if vma.exec { [Prot::ReadWriteExec, Prot::ReadExec] } else { [Prot::ReadWrite, Prot::Read] };
        if !unlock(core, part, there) {
            return Ok(());
        }
        let moved = self.make_resident(part, vma.exec, split, skip);
        lock(core, part, back);
        if self.owner.coherent && !self.exclusive {
            self.enter_read_only(part);
        }
        moved
    }

    /// What has moved is used in place: it waited for the mapping's protection to be back.
    fn enter_read_only(&self, part: Span) {
        let core = self.core;
        let va = Span::block(part.start).start;
        loop {
            {
                let _hold = core.space.hold();
                let Some(block) = core.dir.get(va) else { return };
                let mut state = block.lock();
                if state.device != self.dev.id() {
                    return;
                }
                let own = self.own(&state, va) & part.bits();
                if coherent::enter_read_only(core, self.dev, &mut state, va, own) != Err(Errno::AGAIN) {
                    return;
                }
            }
            core.space.settle();
        }
    }

    fn make_resident(&self, part: Span, exec: bool, split: bool, skip: &dyn Fn(Span) -> Bits) -> Result<(), PortError> {
        let mut park = |parked: crate::migrate::Parked| self.core.pool.put(parked.tray);
        let mut ask = |part: Span| self.core.make_resident_in(self.dev, part, exec, Intent::Move, skip, &mut park);
        let done = if split {
            // In two parts, neither of which is a whole block: so its pages get their memory one by one.
            let half = part.start + part.len() / 2;
            ask(Span { end: half, ..part }).and_then(|()| ask(Span { start: half, ..part }))
        } else {
            ask(part)
        };
        match done {
            Ok(()) | Err(Error::NoRoom { .. }) => Ok(()),
            Err(Error::System(_, e) | Error::Driver { source: e, .. }) => Err(PortError::System(e)),
            Err(_) => Err(PortError::System(Errno::IO)),
        }
    }

    /// Enters what has moved, and gives what left the look of swapped pages.
    fn settle_block(&self, vma: &Vma, part: Span, before: Bits) {
        let core = self.core;
        let va = Span::block(part.start).start;
        let mut times = 0;
        while !self.mark(part) {
            thread::pause(times);
            times += 1;
            core.space.settle();
        }
        let _hold = core.space.hold();
        let Some(block) = core.dir.get(va) else { return };
        let state = block.lock();
        let moved = (self.own(&state, va) & part.bits()) - before;
        let write = if vma.write { WRITE } else { 0 };
        let exclusive = if self.exclusive { EXCLUSIVE } else { 0 };
        if !self.table.prepare(va) {
            return;
        }
        let mut frames = [Entry::default(); uhmm_os::BLOCK / PAGE];
        let _ = core.space.page_entries(va, &mut frames);
        for page in moved.pages() {
            let at = va + page * PAGE;
            let frame = frames[page].pfn;
            core.tags.note_frame(at, frame);
            self.table.enter(at, READ | write | exclusive | WATCHED, frame, || true);
        }
    }

    /// Marks without a page: MADV_FREE has dropped what was away.
    fn clear_stale_marks(&self, part: Span, want: Bits) {
        if !self.core.space.has_markers() {
            return;
        }
        let mut raw = [Entry::default(); uhmm_os::BLOCK / PAGE];
        let count = part.len() / PAGE;
        let told = self.core.space.page_entries(part.start, &mut raw[..count]).unwrap_or(0);
        let first = part.start % uhmm_os::BLOCK / PAGE;
        let stale = (0..told).filter(|&page| raw[page].swapped && !raw[page].present && raw[page].uffd_wp && want.has(first + page));
        let stale = stale.map(|page| first + page).collect::<Bits>();
        let _ = ranges::unprotect(self.core, Span::block(part.start).start, stale);
    }

    fn page(&self, va: Va) -> Entry {
        let mut now = [Entry::default()];
        self.core.space.page_entries(va, &mut now).map_or(Entry::default(), |_| now[0])
    }

    /// Pages of the block that are the device's: on it alone, or used in place.
    fn own(&self, state: &State, va: Va) -> Bits {
        if state.device != self.dev.id() {
            return Bits::EMPTY;
        }
        let tagged = self.core.tags.of(va, self.owner.number);
        (state.private() | state.coherent()) & if self.exclusive { tagged.exclusive } else { tagged.own }
    }

    /// What copy-on-write has put in the place of a coherent page is no device's.
    fn untag_copied(&self, state: &mut State, va: Va, part: Span) {
        let tags = &self.core.tags;
        if state.device != self.dev.id() {
            return;
        }
        let coherent = (part.bits() & state.coherent()).pages();
        let others = coherent.filter(|page| !tags.is_frame(va + page * PAGE, self.page(va + page * PAGE).pfn));
        let others = others.collect::<Bits>();
        coherent::untag(self.core, state, va, others);
    }

    fn resident(&self, part: Span) -> Bits {
        let _hold = self.core.space.hold();
        self.core.dir.get(part.start).map_or(Bits::EMPTY, |block| block.lock().resident() & part.bits())
    }

    fn is_huge(&self, va: Va) -> bool {
        self.core.space.present(Span::block(va)).is_ok_and(|present| present.huge)
    }

    /// Pages that are on the device alone look swapped in /proc/PID/pagemap, as the kernel's do: a marker in the empty entry. False if an event is unread.
    fn mark(&self, part: Span) -> bool {
        if !self.core.space.has_markers() {
            return true;
        }
        let va = Span::block(part.start).start;
        let _hold = self.core.space.hold();
        let Some(block) = self.core.dir.get(va) else { return true };
        let state = block.lock();
        if state.device != self.dev.id() {
            return true;
        }
        let away = state.private() & self.core.tags.private(va, self.dev.id()) & part.bits();
        away.runs().all(|run| ranges::protect(self.core, ranges::pages(Span::block(va), run)) != Err(Errno::AGAIN))
    }

    /// Takes out of the shared memory whatever is there of a span.
    pub(super) fn take_all_home(&self, span: Span) -> Result<(), PortError> {
        let core = self.core;
        core.space.settle();
        let _turn = core.turns.enter(Who::Alone);
        let _prepare = core.prepare.lock();
        let all = |state: &State, _| state.coherent() | state.private();
        home::send_all_home(core, self.dev, span, all).map_err(|_| PortError::System(Errno::IO))
    }

    /// Moves the device's pages of a span back to the system: how many entries moved.
    pub(super) fn to_system(&self, span: Span) -> Result<u64, PortError> {
        let core = self.core;
        core.space.settle();
        let _turn = core.turns.enter(Who::Alone);
        let _prepare = core.prepare.lock();
        let mut moved = 0;
        let mut at = span.start;
        while at < span.end {
            let vma = mapping(core, at)?.filter(|vma| vma.read && fits(core, vma, at)).ok_or(PortError::Unfit { address: at })?;
            let part = Span { start: at, end: vma.end.min(span.end) };
            for part in part.blocks() {
                moved += self.block_home(part)?;
            }
            moved += if vma.shared { 0 } else { self.unname(part) };
            at = part.end;
        }
        Ok(moved)
    }

    /// Brings the device's pages of a part of one block home: how many entries that were.
    pub(super) fn block_home(&self, part: Span) -> Result<u64, PortError> {
        let core = self.core;
        let va = Span::block(part.start).start;
        let Some(block) = core.dir.get(va) else { return Ok(0) };
        let (own, whole) = {
            let _hold = core.space.hold();
            let mut state = block.lock();
            self.untag_copied(&mut state, va, part);
            (self.own(&state, va) & part.bits(), state.huge)
        };
        if own.is_empty() {
            return Ok(0);
        }
        if own == Bits::ALL {
            huge::prepare(core, va);
        }
        home::send_pages_home(core, self.dev, va, own).map_err(|_| PortError::System(Errno::IO))?;
        let left = {
            let _hold = core.space.hold();
            self.own(&block.lock(), va)
        };
        let came = own - left;
        Ok(if whole && came == Bits::ALL { 1 } else { came.count() as u64 })
    }
}

/// The mapping at an address.
pub(super) fn mapping(core: &Core, at: Va) -> Result<Option<Vma>, PortError> {
    let found = core.space.mapping(at).map_err(PortError::System)?;
    Ok(found.filter(|vma| !super::is_ours(Span { start: vma.start, end: vma.end })))
}

/// Whether pages of a mapping can migrate at all.
fn fits(core: &Core, vma: &Vma, at: Va) -> bool {
    vma.kind != VmaKind::Special && !core.tags.is_device(vma.dev, vma.inode) && !is_pool(vma) && !core.space.is_no_memory(vma, at)
}

/// Whether it is of huge pages of a pool (hugetlbfs).
fn is_pool(vma: &Vma) -> bool {
    vma.page_size > PAGE
}

/// Makes a read-only range writable for the kernel's move, while userfaultfd keeps the program from writing there: what is there is write-protected first, and what is not is
/// watched. No touch is served until the protection is back ([`Tags::is_unlocked`](super::tags::Tags::is_unlocked)), for what came home could be written: a writer waits, and gets its SIGSEGV then.
fn unlock(core: &Core, part: Span, prot: Prot) -> bool {
    if ranges::watch_span(core, part).is_err() {
        return false;
    }
    core.tags.set_unlocked(part);
    if let Some(block) = core.dir.get(part.start) {
        drop(block.lock()); // a touch that was just being served has been
    }
    #[allow(unsafe_code)]
    // SAFETY: nobody can write there meanwhile.
    let done = protect_present(core, part) && unsafe { mem::mprotect(part.start, part.len(), prot) }.is_ok();
    if !done {
        relock(core, part);
    }
    done
}

/// Write-protects what is there of a part of a block.
fn protect_present(core: &Core, part: Span) -> bool {
    let Ok(present) = core.space.present(part) else { return false };
    let runs = present.pages.runs().map(|run| ranges::pages(Span::block(part.start), run));
    runs.into_iter().all(|run| ranges::protect(core, run).is_ok())
}

/// The protection is as it was, and what did not move is the program's as before.
fn lock(core: &Core, part: Span, prot: Prot) {
    #[allow(unsafe_code)]
    // SAFETY: as it was.
    let _ = unsafe { mem::mprotect(part.start, part.len(), prot) };
    relock(core, part);
}

fn relock(core: &Core, part: Span) {
    if let Ok(present) = core.space.present(part) {
        let _ = ranges::unprotect(core, part.start, present.pages);
    }
    core.tags.set_unlocked(Span::default());
}

/// Makes pages of a span present and the program's own, as a write by it would.
pub(super) fn own_pages(span: Span) -> Result<(), Errno> {
    #[allow(unsafe_code)]
    // SAFETY: it changes no contents.
    unsafe {
        mem::madvise(span.start, span.len(), Advice::PopulateWrite)
    }
}
