//! Looking at a range for a mirror, with and without faulting pages in. It runs on the mirror's own thread, which has uhmm's descriptors.
//!
//! One round: watch what is mapped, so that every later change is announced; fault in what is wanted, with no lock held; then, block by block under the event
//! lock and the block's, look what is there now. If the mirror's number has changed meanwhile, or something wanted is not there, another round.
//!
//! # Rules
//! * The caller's memory, and that of the range, is touched only while no lock is held.
//! * A page that may be written through a mirror is not registered for missing pages, and not write-protected: [`Mirror::write`](super::Mirror::write) holds the
//!   event lock, and must not wait for the monitor. Whoever wants to take such a page registers it first, and that invalidates ([`crate::space::Space::watch`]).

use super::entry::{Entry, Fault, Request, Want};
use super::registry::Watch;
use crate::bits::{Bits, PAGES};
use crate::core::Core;
use crate::directory::State;
use crate::page::{Span, Va};
use crate::ranges;
use crate::sync::*;
use std::time::{Duration, Instant};
use uhmm_os::maps::Vma;
use uhmm_os::mem::{self, Advice};
use uhmm_os::pagemap;
use uhmm_os::{Errno, PAGE, copy, thread};

/// A range, and what is wanted there.
pub(super) struct Job<'a> {
    pub(super) core: &'a Core,
    pub(super) watch: &'a Watch,
    pub(super) span: Span,
    pub(super) request: Request<'a>,
}

impl Job<'_> {
    /// Looks until all that is wanted is there and nothing has come between: the mirror's number, and how many rounds it took.
    pub(super) fn run(&self, out: &mut [Entry], budget: Duration) -> Result<(u64, u32), Fault> {
        let limit = Instant::now().checked_add(budget);
        let mut rounds = 0u32;
        loop {
            rounds = rounds.saturating_add(1);
            if let Some(seq) = self.round(out)? {
                return Ok((seq, rounds));
            }
            if limit.is_some_and(|limit| Instant::now() >= limit) {
                return Err(Fault::Busy { rounds });
            }
            thread::pause(rounds);
        }
    }

    fn round(&self, out: &mut [Entry]) -> Result<Option<u64>, Fault> {
        let mirrors = &self.core.space.mirrors;
        let seq = self.watch.seq.load(Ordering::SeqCst);
        if mirrors.changing(self.span) || !self.touch()? {
            return Ok(None);
        }
        let mut at = 0;
        for part in self.span.blocks() {
            let count = part.len() / PAGE;
            let mut wants = [Want::Nothing; PAGES];
            (0..count).for_each(|page| wants[page] = self.request.of(at + page));
            let mut found = [Entry::default(); PAGES];
            if !self.look(part, &wants[..count], &mut found[..count])? {
                return Ok(None);
            }
            out[at..at + count].copy_from_slice(&found[..count]);
            at += count;
        }
        let same = self.watch.seq.load(Ordering::SeqCst) == seq && !mirrors.changing(self.span);
        Ok(same.then_some(seq))
    }

    fn want(&self, va: Va) -> Want {
        self.request.of((va - self.span.start) / PAGE)
    }

    /// Faults in what is wanted. False if a mapping changed under it.
    fn touch(&self) -> Result<bool, Fault> {
        let mut at = self.span.start;
        while at < self.span.end {
            let vma = self.core.space.maps.find(at).map_err(Fault::System)?.filter(|vma| vma.start < self.span.end);
            let mapped = vma.map_or(self.span.end, |vma| vma.start.max(at));
            if let Some(address) = (at..mapped).step_by(PAGE).find(|&va| self.want(va) != Want::Nothing) {
                return Err(Fault::Unmapped { address });
            }
            let Some(vma) = vma else { break };
            let part = Span { start: mapped, end: vma.end.min(self.span.end) };
            for block in part.blocks() {
                if !self.touch_block(&vma, block)? {
                    return Ok(false);
                }
            }
            at = part.end;
        }
        Ok(true)
    }

    fn touch_block(&self, vma: &Vma, part: Span) -> Result<bool, Fault> {
        let away = {
            // Once a change that has returned is followed: of a mapping that is just being moved a part would seem to be nowhere, and be brought home.
            let _hold = self.core.space.hold();
            match self.core.dir.get(part.start) {
                Some(block) if self.request.leave => block.lock().private(),
                Some(block) if self.request.own != 0 => self.own(&block.lock(), part.start),
                _ => Bits::EMPTY,
            }
        };
        let left = |va: Va| away.has(va % uhmm_os::BLOCK / PAGE);
        let mut at = part.start;
        while at < part.end {
            let want = self.want(at);
            let mut end = at + PAGE;
            while end < part.end && self.want(end) == want && left(end) == left(at) {
                end += PAGE;
            }
            let write = want == Want::Write;
            if want != Want::Nothing {
                // Of what is no memory nobody asks whether it may be written.
                let denied = !vma.read || (write && !vma.write);
                if denied && vma.read && self.core.space.is_no_memory(vma, at) {
                    return Err(Fault::Unreachable { address: at });
                }
                if denied {
                    return Err(Fault::Protected { address: at, write: vma.read });
                }
                if !left(at) && !self.populate(vma, Span { start: at, end }, write)? {
                    return Ok(false);
                }
            }
            at = end;
        }
        Ok(true)
    }

    /// Private pages of the asking port's device.
    fn own(&self, state: &State, va: Va) -> Bits {
        let tags = &self.core.tags;
        let here = self.request.own != 0 && state.device != 0 && state.device == tags.store();
        if here { state.private() & tags.of(va, self.request.own).own } else { Bits::EMPTY }
    }

    /// Faults pages in, all with the same permission. False if the mapping has changed.
    fn populate(&self, vma: &Vma, span: Span, write: bool) -> Result<bool, Fault> {
        if !self.request.wait
            && vma.is_private_anonymous()
            && self.core.space.watch_events(Span { start: vma.start, end: vma.end }) == Err(Errno::BUSY)
        {
            // Another userfaultfd's: as for the kernel, which does not wait while it holds the mappings' lock, what is not there cannot be had.
            let present = self.core.space.present(span).map_err(Fault::System)?;
            if let Some(page) = (span.bits() - present.pages).pages().next() {
                return Err(Fault::Unreachable { address: Span::block(span.start).start + page * PAGE });
            }
        }
        if fault_in(span, write) {
            return Ok(true);
        }
        if self.core.space.is_no_memory(vma, span.start) {
            return Err(Fault::Unreachable { address: span.start }); // the CPU may well touch it
        }
        for address in (span.start..span.end).step_by(PAGE) {
            let page = Span { start: address, end: address + PAGE };
            if fault_in(page, write) {
                continue;
            }
            // A page that is away, in a process whose system calls cannot bring it: a touch does.
            let mut byte = 0u8;
            #[allow(unsafe_code)]
            // SAFETY: what cannot be read is an error, not a crash; nobody else has the byte that is written.
            let touched = unsafe { copy::guarded(&raw mut byte, address as *const u8, 1) }.is_ok();
            if touched && (!write || fault_in(page, write)) {
                continue;
            }
            let now = self.core.space.mapping(address).map_err(Fault::System)?;
            return match now {
                Some(now) if same(&now, vma) => Err(Fault::Unreachable { address }),
                _ => Ok(false),
            };
        }
        Ok(true)
    }

    /// What is there, of a part of one block. False if something wanted is not, or a migration is under way.
    fn look(&self, part: Span, wants: &[Want], found: &mut [Entry]) -> Result<bool, Fault> {
        let (core, space) = (self.core, &self.core.space);
        let _hold = space.hold();
        let block = core.dir.get_or_make(part.start).map_err(Fault::System)?;
        let mut state = block.lock();
        if state.busy().meets(part.bits()) {
            return Ok(false);
        }
        if !self.free_written(&mut state, part, wants) {
            return Ok(false);
        }
        let mut at = part.start;
        while at < part.end {
            let Some(vma) = space.maps.find(at).map_err(Fault::System)?.filter(|vma| vma.start < part.end) else { break };
            let here = Span { start: vma.start.max(at), end: vma.end.min(self.span.end) };
            // All of the mapping that the look is about, so that it is split but twice. What the kernel has from now on announces its changes.
            // For a port all of the mapping: it may be moved as a whole later, and is one huge page maybe; and a look that faults nothing changes nothing.
            let watch = if self.request.own != 0 { Span { start: vma.start, end: vma.end } } else { here };
            let asked = vma.is_private_anonymous() && !(self.request.own != 0 && self.request.leave);
            let watched = asked && space.watch_events(watch).is_ok();
            match space.mapping(here.start).map_err(Fault::System)? {
                Some(now) if same(&now, &vma) => {}
                _ => return Ok(false),
            }
            let here = here.and(part);
            let first = (here.start - part.start) / PAGE;
            let range = first..first + here.len() / PAGE;
            self.describe(&state, &vma, watched, here, &wants[range.clone()], &mut found[range]).map_err(Fault::System)?;
            at = here.end;
        }
        let served = |(want, entry): (&Want, &Entry)| match want {
            Want::Nothing => true,
            Want::Read => entry.may_read() || entry.is_own() || (self.request.leave && entry.on_device().is_some()),
            Want::Write => {
                entry.may_write() || (entry.is_own() && entry.mapping_allows().1) || (self.request.leave && entry.on_device().is_some())
            }
        };
        Ok(wants.iter().zip(&*found).all(served))
    }

    /// Pages that are wanted for writing are watched for events only. False if they cannot be.
    fn free_written(&self, state: &mut State, part: Span, wants: &[Want]) -> bool {
        if self.request.own != 0 {
            return true; // a port looks that the page is there and not write-protected before each write
        }
        let first = part.start % uhmm_os::BLOCK / PAGE;
        let mut written = Bits::EMPTY;
        wants.iter().enumerate().filter(|(_, want)| **want == Want::Write).for_each(|(page, _)| written.set(first + page));
        // Whatever the directory says: what was registered while an event was unread is not noted there.
        let freed = written - (state.private() | state.duplicated() | state.coherent());
        for run in freed.runs() {
            let span = ranges::pages(Span::block(part.start), run.clone());
            if self.core.space.uffd.unregister(span.start, span.len()).is_err() {
                return false; // it has just been unmapped, or lies in several mappings of which one is another's
            }
            state.reg -= Bits::range(run);
        }
        // What a device still has is brought home, or given up, by the next round's touch.
        self.request.leave || !written.meets(state.private() | state.duplicated())
    }

    /// The entries of pages of one mapping.
    fn describe(&self, state: &State, vma: &Vma, watched: bool, here: Span, wants: &[Want], found: &mut [Entry]) -> Result<(), Errno> {
        let present = self.core.space.present(here)?;
        let own = self.own(state, here.start);
        let device_file = self.core.tags.is_device(vma.dev, vma.inode);
        let mut no_memory = None; // all of a mapping is, or nothing
        let mut raw = [pagemap::Entry::default(); PAGES];
        let told = self.core.space.page_entries(here.start, &mut raw[..found.len()])?;
        for (page, entry) in found.iter_mut().enumerate() {
            let bit = (here.start % uhmm_os::BLOCK) / PAGE + page;
            let mut flags = Entry::MAPPED | if watched { Entry::WATCHED } else { 0 };
            flags |= if vma.read { Entry::MAP_READ } else { 0 };
            flags |= if vma.write { Entry::MAP_WRITE } else { 0 };
            flags |= if device_file { Entry::DEVICE_FILE } else { 0 };
            let private = state.private().has(bit);
            let coherent = state.coherent().has(bit);
            let now = if page < told { raw[page] } else { pagemap::Entry::default() };
            let coherent = coherent && self.core.tags.is_frame(here.start + page * PAGE, now.pfn);
            if private {
                flags |= Entry::PRIVATE;
                flags |= if own.has(bit) { Entry::OWN } else { 0 };
                flags |= if state.huge && state.private() == Bits::ALL { Entry::HUGE } else { 0 };
            } else if now.present {
                let zero = present.zero.has(bit);
                // After a write fault the page is the program's own, whatever the count of its mappings says.
                let own = vma.shared || (!now.file_or_shared && (now.exclusive || wants[page] == Want::Write));
                flags |= if vma.read { Entry::READ } else { 0 };
                flags |= if vma.read && vma.write && !zero && !now.uffd_wp && own { Entry::WRITE } else { 0 };
                flags |= if zero { Entry::ZERO } else { 0 };
                flags |= if present.huge_pages.has(bit) { Entry::HUGE } else { 0 };
                flags |= if vma.page_size == 1 << 30 { Entry::GIANT } else { 0 };
                flags |= if coherent { Entry::COHERENT } else { 0 };
            } else if *no_memory.get_or_insert_with(|| self.core.space.is_no_memory(vma, here.start)) {
                flags |= Entry::NO_MEMORY;
            }
            *entry = Entry::new(flags, if private || coherent { state.device } else { 0 });
        }
        Ok(())
    }
}

/// Whether what was looked up of a mapping is still so.
fn same(now: &Vma, then: &Vma) -> bool {
    let facts = |vma: &Vma| (vma.read, vma.write, vma.shared, vma.kind, vma.inode, vma.dev);
    facts(now) == facts(then)
}

/// Has the kernel fault pages in.
fn fault_in(span: Span, write: bool) -> bool {
    let advice = if write { Advice::PopulateWrite } else { Advice::PopulateRead };
    for _ in 0..100 {
        #[allow(unsafe_code)]
        // SAFETY: it changes no contents: the pages are made present as a touch would.
        match unsafe { mem::madvise(span.start, span.len(), advice) } {
            Ok(()) => return true,
            Err(Errno::AGAIN | Errno::INTR | Errno::BUSY) => thread::yield_now(),
            Err(_) => return false,
        }
    }
    false
}
